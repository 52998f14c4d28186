//! Frames of AMQP 0-9-1 on a connection that only publishes. What comes with every message is written and read here; all that is
//! rare, by the codec of the client library.

use amq_protocol::frame::{AMQPFrame, gen_frame, parse_frame};
use amq_protocol::protocol::AMQPClass;
use amq_protocol::protocol::basic::gen_properties;
use lapin::BasicProperties;

const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const END: u8 = 0xCE;

/// Type, channel and size in front of a frame, and its end.
const OVERHEAD: usize = 8;
const FRONT: usize = 7;

const BASIC: u16 = 60;
const PUBLISH: u16 = 40;
const ACK: u16 = 80;

/// An acknowledgement: class, method, tag, flags.
const ACK_SIZE: usize = 13;

/// Where a message goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Destination<'a> {
    pub(crate) exchange: &'a str,
    pub(crate) routing_key: &'a str,
    /// It comes back if no queue takes it.
    pub(crate) mandatory: bool,
}

/// A frame that came.
#[derive(Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "it is looked at, and never kept")]
pub(crate) enum Frame {
    /// The broker has it.
    Ack {
        channel: u16,
        tag: u64,
        multiple: bool,
    },
    /// Anything else.
    Other(AMQPFrame),
}

/// Appends a message.
///
/// # Errors
/// Why it cannot be written; nothing was appended.
pub(crate) fn put_message(
    out: &mut Vec<u8>,
    channel: u16,
    to: Destination<'_>,
    properties: &BasicProperties,
    body: &[u8],
    frame_max: usize,
) -> Result<(), String> {
    let start = out.len();
    let result = try_put_message(out, channel, to, properties, body, frame_max);
    if result.is_err() {
        out.truncate(start);
    }
    result
}

fn try_put_message(
    out: &mut Vec<u8>,
    channel: u16,
    to: Destination<'_>,
    properties: &BasicProperties,
    body: &[u8],
    frame_max: usize,
) -> Result<(), String> {
    let frame = begin(out, METHOD, channel);
    out.extend_from_slice(&BASIC.to_be_bytes());
    out.extend_from_slice(&PUBLISH.to_be_bytes());
    out.extend_from_slice(&[0, 0]);
    put_short(out, to.exchange)?;
    put_short(out, to.routing_key)?;
    out.push(u8::from(to.mandatory));
    end(out, frame)?;

    let header = out.len();
    let frame = begin(out, HEADER, channel);
    out.extend_from_slice(&BASIC.to_be_bytes());
    out.extend_from_slice(&[0, 0]);
    out.extend_from_slice(&(body.len() as u64).to_be_bytes());
    let generated = gen_properties(properties)(std::mem::take(out).into());
    (*out, _) = generated.map_err(|error| error.to_string())?.into_inner();
    end(out, frame)?;
    // The broker would close the connection, and all that is on it would be lost with it.
    if out.len() - header > frame_max {
        return Err("headers that do not fit into one frame".to_owned());
    }

    for part in body.chunks(frame_max.saturating_sub(OVERHEAD).max(1)) {
        let frame = begin(out, BODY, channel);
        out.extend_from_slice(part);
        end(out, frame)?;
    }
    Ok(())
}

/// Appends a method.
///
/// # Errors
/// Why it cannot be written.
pub(crate) fn put_method(out: &mut Vec<u8>, channel: u16, method: AMQPClass) -> Result<(), String> {
    put_frame(out, &AMQPFrame::Method(channel, method))
}

/// Appends any frame.
///
/// # Errors
/// Why it cannot be written.
pub(crate) fn put_frame(out: &mut Vec<u8>, frame: &AMQPFrame) -> Result<(), String> {
    let generated = gen_frame(frame)(Vec::new().into());
    let (bytes, _) = generated.map_err(|error| error.to_string())?.into_inner();
    out.extend_from_slice(&bytes);
    Ok(())
}

/// Reads the first frame, and says how long it was; `None` if it is not all there.
///
/// # Errors
/// Why it is none.
pub(crate) fn take_frame(bytes: &[u8]) -> Result<Option<(Frame, usize)>, String> {
    let Some((front, rest)) = bytes.split_first_chunk::<FRONT>() else {
        return Ok(None);
    };
    let &[kind, channel_high, channel_low, ref size @ ..] = front;
    let channel = u16::from_be_bytes([channel_high, channel_low]);
    let Ok(size) = usize::try_from(u32::from_be_bytes(*size)) else {
        return Err("a frame that is too large".to_owned());
    };
    // A broker of another version answers with its protocol header, which is no frame.
    if kind == b'A' {
        return Err("the broker does not speak AMQP 0-9-1".to_owned());
    }
    let Some(payload) = rest.get(..size) else {
        return Ok(None);
    };
    let Some(&last) = rest.get(size) else {
        return Ok(None);
    };
    if last != END {
        return Err("a frame without an end".to_owned());
    }
    let length = size + OVERHEAD;
    if kind == METHOD
        && let Some(frame) = ack(channel, payload)
    {
        return Ok(Some((frame, length)));
    }
    match parse_frame(&bytes[..length]) {
        Ok((_, frame)) => Ok(Some((Frame::Other(frame), length))),
        Err(error) => Err(format!("an unreadable frame: {error}")),
    }
}

fn ack(channel: u16, payload: &[u8]) -> Option<Frame> {
    let payload: &[u8; ACK_SIZE] = payload.try_into().ok()?;
    let (method, rest) = payload.split_first_chunk::<4>()?;
    let (tag, flags) = rest.split_first_chunk::<8>()?;
    let [c0, c1, m0, m1] = *method;
    let is_ack = u16::from_be_bytes([c0, c1]) == BASIC && u16::from_be_bytes([m0, m1]) == ACK;
    is_ack.then(|| Frame::Ack {
        channel,
        tag: u64::from_be_bytes(*tag),
        multiple: flags.first().is_some_and(|flags| flags & 1 == 1),
    })
}

/// Where the payload of a frame begins.
struct Begun(usize);

fn begin(out: &mut Vec<u8>, kind: u8, channel: u16) -> Begun {
    out.push(kind);
    out.extend_from_slice(&channel.to_be_bytes());
    out.extend_from_slice(&[0; 4]);
    Begun(out.len())
}

fn end(out: &mut Vec<u8>, Begun(start): Begun) -> Result<(), String> {
    let size = u32::try_from(out.len() - start).map_err(|_| "a frame that is too large")?;
    // `begin` left room for it.
    out[start - 4..start].copy_from_slice(&size.to_be_bytes());
    out.push(END);
    Ok(())
}

fn put_short(out: &mut Vec<u8>, text: &str) -> Result<(), String> {
    let size = u8::try_from(text.len()).map_err(|_| "a name of more than 255 bytes")?;
    out.push(size);
    out.extend_from_slice(text.as_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use amq_protocol::protocol::{basic, confirm};
    use lapin::types::FieldTable;

    const TO: Destination<'_> = Destination {
        exchange: "amq.direct",
        routing_key: "fib",
        mandatory: true,
    };

    fn frames(mut bytes: &[u8]) -> Vec<Frame> {
        let mut frames = Vec::new();
        while let Some((frame, length)) = take_frame(bytes).unwrap() {
            frames.push(frame);
            bytes = &bytes[length..];
        }
        assert!(bytes.is_empty());
        frames
    }

    /// The client library's own codec reads what is written here.
    #[test]
    fn a_message_is_read_as_it_was_written() {
        let mut table = FieldTable::default();
        table.insert("tenant".into(), lapin::types::AMQPValue::LongInt(7));
        let properties = BasicProperties::default()
            .with_headers(table)
            .with_correlation_id("7".into())
            .with_expiration("2000".into());
        let body: Vec<u8> = (0..100).collect();
        let mut out = b"before".to_vec();
        put_message(&mut out, 3, TO, &properties, &body, 48).unwrap();
        let got = frames(&out[6..]);
        let Frame::Other(AMQPFrame::Method(3, method)) = &got[0] else {
            panic!("{got:?}");
        };
        assert_eq!(
            *method,
            AMQPClass::Basic(basic::AMQPMethod::Publish(basic::Publish {
                exchange: "amq.direct".into(),
                routing_key: "fib".into(),
                mandatory: true,
                immediate: false,
            }))
        );
        let Frame::Other(AMQPFrame::Header(3, header)) = &got[1] else {
            panic!("{got:?}");
        };
        assert_eq!(
            (header.class_id, header.body_size, &header.properties),
            (60, 100, &properties)
        );
        let bodies: Vec<_> = got[2..]
            .iter()
            .map(|frame| match frame {
                Frame::Other(AMQPFrame::Body(3, part)) => part.clone(),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(
            bodies.iter().map(Vec::len).collect::<Vec<_>>(),
            [40, 40, 20]
        );
        assert_eq!(bodies.concat(), body);
    }

    #[test]
    fn an_empty_body_has_no_frame() {
        let mut out = Vec::new();
        put_message(&mut out, 1, TO, &BasicProperties::default(), b"", 4096).unwrap();
        assert_eq!(frames(&out).len(), 2);
    }

    #[test]
    fn what_cannot_be_written_leaves_nothing() {
        let mut out = b"before".to_vec();
        let long = "x".repeat(256);
        let to = Destination {
            routing_key: &long,
            ..TO
        };
        put_message(&mut out, 1, to, &BasicProperties::default(), b"", 4096).unwrap_err();
        assert_eq!(out, b"before");
        let mut table = FieldTable::default();
        let large = "x".repeat(4096);
        let large = lapin::types::AMQPValue::LongString(large.into());
        table.insert("large".into(), large);
        let properties = BasicProperties::default().with_headers(table);
        put_message(&mut out, 1, TO, &properties, b"", 4096).unwrap_err();
        assert_eq!(out, b"before");
        put_message(&mut out, 1, TO, &properties, b"", 8192).unwrap();
    }

    #[test]
    fn frames_are_read_when_they_are_whole() {
        let ack = basic::Ack {
            delivery_tag: 300,
            multiple: true,
        };
        let mut out = Vec::new();
        put_method(&mut out, 2, AMQPClass::Basic(basic::AMQPMethod::Ack(ack))).unwrap();
        for end in 0..out.len() {
            assert_eq!(take_frame(&out[..end]).unwrap(), None, "{end}");
        }
        let ack = Frame::Ack {
            channel: 2,
            tag: 300,
            multiple: true,
        };
        assert_eq!(take_frame(&out).unwrap(), Some((ack, 21)));
        let select = AMQPClass::Confirm(confirm::AMQPMethod::SelectOk(confirm::SelectOk {}));
        put_method(&mut out, 2, select.clone()).unwrap();
        put_frame(&mut out, &AMQPFrame::Heartbeat).unwrap();
        let got = frames(&out);
        assert_eq!(got[1], Frame::Other(AMQPFrame::Method(2, select)));
        assert_eq!(got[2], Frame::Other(AMQPFrame::Heartbeat));
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        let mut out = Vec::new();
        put_frame(&mut out, &AMQPFrame::Heartbeat).unwrap();
        *out.last_mut().unwrap() = 0;
        take_frame(&out).unwrap_err();
        take_frame(b"AMQP\0\0\x09\x01").unwrap_err();
        take_frame(&[1, 0, 1, 0, 0, 0, 1, 9, END]).unwrap_err();
    }
}
