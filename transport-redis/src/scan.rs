//! Reads frames as we write them: our members in our order, no spaces, no escapes. It says nothing about any other frame, which
//! must then be read by all the rules.

use std::sync::Arc;
use std::{mem, str};

use antiphon_core::{
    ContentType, CorrelationId, Headers, Method, Node, Outcome, Reply, ReplyAddress, Request,
    Signals,
};
use bytes::{Buf, Bytes};

use crate::frame::{self, Expiry, ReplyFrame, RequestFrame};
use crate::naming::{self, InboxKeys};

/// Of the requests before: mostly the next one comes from the same client, for the same method.
#[derive(Debug, Default)]
pub(crate) struct Last {
    inbox: Option<InboxKeys>,
    method: Option<Method>,
}

impl Last {
    /// The keys of the inbox with this address; `None` if it is not one of this transport.
    pub(crate) fn inbox(&mut self, address: &ReplyAddress) -> Option<InboxKeys> {
        let same = |inbox: &InboxKeys| inbox.address() == address;
        if !self.inbox.as_ref().is_some_and(same) {
            self.inbox = Some(InboxKeys::parse(address)?);
        }
        self.inbox.clone()
    }

    fn read_address(&self, scan: &mut Scan<'_>) -> Option<ReplyAddress> {
        match &self.inbox {
            Some(inbox) if scan.is_text(inbox.list()) => Some(inbox.address().clone()),
            _ => ReplyAddress::new(scan.text()?).ok(),
        }
    }

    fn read_method(&mut self, scan: &mut Scan<'_>) -> Option<Method> {
        match &self.method {
            Some(method) if scan.is_text(method.as_str()) => Some(method.clone()),
            _ => {
                self.method = Some(Method::new(scan.text()?).ok()?);
                self.method.clone()
            }
        }
    }
}

/// Reads a request; its body is what is left of the frame.
pub(crate) fn request(frame: &mut Bytes, last: &mut Last) -> Option<RequestFrame> {
    let mut scan = Scan { rest: frame };
    let mut signals = if scan.skip(br#"{"v":1,"id":""#) {
        Signals::Running
    } else if scan.skip(br#"{"id":""#) {
        Signals::None
    } else {
        return None;
    };
    let id = scan.id()?;
    let reply_to = scan.member(br#","to":""#, |scan| last.read_address(scan))?;
    let expiry = Expiry {
        at: scan.member(br#","exp":"#, Scan::number)?,
        budget: scan.member(br#","ttl":"#, Scan::number)?,
    };
    if scan.skip(br#","of":1"#) && signals == Signals::Running {
        signals = Signals::Offer;
    }
    let method = scan.member(br#","m":""#, |scan| last.read_method(scan))?;
    let (content_type, headers, apart) = common(&mut scan)?;
    let body = scan.end()?;
    let request = Arc::new(Request {
        id,
        reply_to,
        deadline: frame::deadline(expiry),
        method,
        headers,
        content_type,
        signals,
        body: last_of(frame, body),
    });
    Some(RequestFrame {
        request,
        expiry,
        apart,
    })
}

/// Reads a reply that is a value; its body is what is left of the frame.
pub(crate) fn reply(frame: &mut Bytes) -> Option<ReplyFrame> {
    let mut scan = Scan { rest: frame };
    if !scan.skip(br#"{"v":1,"id":""#) {
        return None;
    }
    let id = scan.id()?;
    let node = scan.member(br#","n":""#, |scan| Node::new(scan.text()?).ok())?;
    let (content_type, headers, apart) = common(&mut scan)?;
    let body = scan.end()?;
    let reply = Arc::new(Reply {
        id,
        outcome: Outcome::Value,
        headers,
        content_type,
        node,
        body: last_of(frame, body),
    });
    Some(ReplyFrame { reply, apart })
}

fn common(scan: &mut Scan<'_>) -> Option<(Option<ContentType>, Headers, Option<String>)> {
    let content_type = scan.member(br#","ct":""#, |scan| {
        if scan.is_text(ContentType::JSON.as_str()) {
            return Some(ContentType::JSON);
        }
        ContentType::new(scan.text()?).ok()
    })?;
    let headers = scan.member(br#","h":{""#, headers)?.unwrap_or_default();
    let apart = scan.member(br#","at":""#, |scan| {
        let id = scan.text()?;
        naming::is_random_id(id).then(|| id.to_owned())
    })?;
    Some((content_type, headers, apart))
}

/// Headers, of which there is one at least; the quote before its name was read.
fn headers(scan: &mut Scan<'_>) -> Option<Headers> {
    let mut headers = Headers::new();
    loop {
        let name = scan.text()?;
        if !scan.skip(br#":""#) {
            return None;
        }
        headers.insert(name, scan.text()?).ok()?;
        if scan.skip(b"}") {
            return Some(headers);
        }
        if !scan.skip(br#",""#) {
            return None;
        }
    }
}

/// Cut in place: a slice of its own would cost an allocation.
fn last_of(frame: &mut Bytes, length: usize) -> Bytes {
    let mut body = mem::take(frame);
    body.advance(body.len().saturating_sub(length));
    body
}

/// What is left of a frame. Where something else comes than was asked for, the whole frame is to be read in another way.
struct Scan<'a> {
    rest: &'a [u8],
}

impl<'a> Scan<'a> {
    /// Goes behind this, if it is what comes.
    fn skip<const N: usize>(&mut self, expected: &[u8; N]) -> bool {
        match self.rest.split_first_chunk() {
            Some((first, rest)) if first == expected => {
                self.rest = rest;
                true
            }
            _ => false,
        }
    }

    /// A member, if it is the next one; it begins with its comma.
    fn member<const N: usize, T>(
        &mut self,
        name: &[u8; N],
        read: impl FnOnce(&mut Self) -> Option<T>,
    ) -> Option<Option<T>> {
        if self.skip(name) {
            read(self).map(Some)
        } else {
            Some(None)
        }
    }

    /// Goes behind this text, whose first quote was read, if it is what comes. It is one that needs no escapes.
    fn is_text(&mut self, expected: &str) -> bool {
        match self.rest.strip_prefix(expected.as_bytes()) {
            Some([b'"', rest @ ..]) => {
                self.rest = rest;
                true
            }
            _ => false,
        }
    }

    /// A text whose first quote was read.
    fn text(&mut self) -> Option<&'a str> {
        let plain = |byte: &u8| (b' '..0x7f).contains(byte) && !matches!(byte, b'"' | b'\\');
        let end = self.rest.iter().position(|byte| !plain(byte))?;
        let (text, [b'"', rest @ ..]) = self.rest.split_at_checked(end)? else {
            return None;
        };
        self.rest = rest;
        str::from_utf8(text).ok()
    }

    /// An id whose first quote was read.
    fn id(&mut self) -> Option<CorrelationId> {
        if let Some((text, [b'"', rest @ ..])) = self.rest.split_first_chunk()
            && let Some(id) = CorrelationId::parse_uuid(text)
        {
            self.rest = rest;
            return Some(id);
        }
        CorrelationId::parse(self.text()?).ok()
    }

    fn number(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        let mut length = 0;
        for byte in self.rest {
            let digit = byte.wrapping_sub(b'0');
            if digit > 9 {
                break;
            }
            value = value.wrapping_mul(10).wrapping_add(digit.into());
            length += 1;
        }
        let (digits, rest) = self.rest.split_at_checked(length)?;
        // So many digits always fit, and JSON has no leading zeros.
        if !(1..=19).contains(&length) || (length > 1 && digits.starts_with(b"0")) {
            return None;
        }
        self.rest = rest;
        Some(value)
    }

    /// The end of the line. Gives the length of the body behind it.
    fn end(self) -> Option<usize> {
        match self.rest {
            [b'}', b'\n', body @ ..] => Some(body.len()),
            [b'}'] => Some(0),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::frame::{self, Letter};

    use super::*;

    const HEAD: &str = r#"{"v":1,"id":"f47ac10b-58cc-4372-a567-0e02b2c3d479""#;

    fn ours() -> Vec<String> {
        let mut lines: Vec<String> = [
            r#","to":"{c1}:i","exp":1764000000000,"ttl":30000,"m":"add","ct":"application/json","h":{"a":"1","b.c":"{x} y"},"at":"0123456789abcdef0123456789abcdef"}"#,
            r#","to":"{c2}:i","exp":0,"ttl":9999999999999999999,"of":1,"m":"sub","ct":"a/b"}"#,
            r#","ttl":7}"#,
            r#","n":"n1","ct":"text/plain","h":{"a":"1"}}"#,
            "}",
        ]
        .map(|rest| format!("{HEAD}{rest}\nbody\n"))
        .into();
        lines.push(r#"{"id":"7","to":"{me}:i"}"#.to_owned());
        lines.push(format!("{}}}\n", &HEAD.replace("\"v\":1,", "")));
        lines
    }

    /// All that is told of a request; `None` if it cannot be read.
    fn told(read: Option<RequestFrame>) -> Option<String> {
        read.map(
            |RequestFrame {
                 mut request,
                 expiry,
                 apart,
             }| {
                let request_mut = Arc::make_mut(&mut request);
                if expiry.at.is_none() {
                    // It counts from now.
                    request_mut.deadline = None;
                }
                let address = request.reply_to.as_ref().map(ReplyAddress::as_str);
                format!("{request:?} {address:?} {expiry:?} {apart:?}")
            },
        )
    }

    fn read_request(frame: &[u8], last: &mut Last) -> Option<RequestFrame> {
        request(&mut Bytes::copy_from_slice(frame), last)
    }

    fn read_reply(frame: &[u8]) -> Option<String> {
        reply(&mut Bytes::copy_from_slice(frame)).map(|frame| format!("{frame:?}"))
    }

    /// What is read here is what serde reads there.
    fn agrees(frame: &[u8], last: &mut Last) -> (bool, bool) {
        let bytes = Bytes::copy_from_slice(frame);
        let (ours, reply) = (told(read_request(frame, last)), read_reply(frame));
        if ours.is_some() {
            let theirs = told(frame::decode_any_request(bytes.clone()).ok());
            assert_eq!(ours, theirs, "{}", String::from_utf8_lossy(frame));
        }
        if reply.is_some() {
            let theirs = match frame::decode_any_letter(bytes) {
                Ok(Letter::Reply(frame)) => Some(format!("{frame:?}")),
                _ => None,
            };
            assert_eq!(reply, theirs, "{}", String::from_utf8_lossy(frame));
        }
        (ours.is_some(), reply.is_some())
    }

    fn known() -> Last {
        let mut last = Last::default();
        last.inbox(&ReplyAddress::new("{c1}:i").unwrap()).unwrap();
        last.method = Some(Method::new("add").unwrap());
        last
    }

    #[test]
    fn our_own_frames_are_read() {
        let read: Vec<_> = ours()
            .iter()
            .map(|line| agrees(line.as_bytes(), &mut known()))
            .collect();
        let (only_request, only_reply, both) = ((true, false), (false, true), (true, true));
        assert_eq!(
            read,
            [
                only_request,
                only_request,
                only_request,
                only_reply,
                both,
                only_request,
                only_request
            ]
        );
        let mut last = Last::default();
        for line in ours() {
            assert_eq!(
                told(read_request(line.as_bytes(), &mut last)),
                told(read_request(line.as_bytes(), &mut known()))
            );
        }
        assert_eq!(last.method.unwrap().as_str(), "sub");
    }

    /// Each byte lost, doubled, replaced by every other one or followed by it, and the frame cut everywhere.
    #[test]
    fn what_is_almost_ours_is_read_as_serde_reads_it() {
        let mut last = known();
        let mut read = 0;
        for line in ours() {
            let line = line.as_bytes();
            for at in 0..line.len() {
                let (front, back) = line.split_at(at);
                for byte in 0..=u8::MAX {
                    for behind in [back, &back[1..]] {
                        let frame = [front, &[byte], behind].concat();
                        read += usize::from(agrees(&frame, &mut last).0);
                    }
                }
                agrees(&[front, &back[1..]].concat(), &mut last);
                agrees(front, &mut last);
                agrees(back, &mut last);
            }
        }
        // Other digits, letters and bodies.
        assert!(read > 1000, "{read}");
    }

    #[test]
    fn all_others_are_left_to_serde() {
        for line in [
            "",
            "{",
            "{}",
            "{\"id\":\"7\"",
            "{\"id\":\"7\"}x",
            "{\"id\":\"7\",}",
            "{\"id\": \"7\"}",
            "{ \"id\":\"7\"}",
            "{\"id\":7}",
            "{\"id\":\"\"}",
            "{\"id\":\"7\",\"id\":\"8\"}",
            "{\"id\":\"\\u0037\"}",
            "{\"id\":\"\u{1}\"}",
            "{\"id\":\"\u{e9}\"}",
            "{\"id\":\"\u{7f}\"}",
            "{\"v\":01,\"id\":\"7\"}",
            "{\"v\":2,\"id\":\"7\"}",
            "{\"v\":,\"id\":\"7\"}",
            "{\"v\":-1,\"id\":\"7\"}",
            "{\"v\":1.5,\"id\":\"7\"}",
            "{\"v\":99999999999999999999,\"id\":\"7\"}",
            "{\"v\":1,\"id\":\"7\",\"exp\":01}",
            "{\"v\":1,\"id\":\"7\",\"exp\":}",
            "{\"v\":1,\"id\":\"7\",\"exp\":1e3}",
            "{\"v\":1,\"id\":\"7\",\"exp\":18446744073709551615}",
            "{\"v\":1,\"id\":\"7\",\"exp\":18446744073709551616}",
            "{\"v\":1,\"id\":\"7\",\"ttl\":1,\"exp\":1}",
            "{\"v\":1,\"id\":\"7\",\"of\":10}",
            "{\"v\":1,\"id\":\"7\",\"m\":\"a b\"}",
            "{\"v\":1,\"id\":\"7\",\"h\":{}}",
            "{\"v\":1,\"id\":\"7\",\"h\":{\"a\":\"b\",}}",
            "{\"v\":1,\"id\":\"7\",\"h\":{\"x-a\":\"b\"}}",
            "{\"v\":1,\"id\":\"7\",\"at\":\"0f\"}",
            "{\"v\":1,\"id\":\"7\",\"s\":\"fib\"}",
            "{\"v\":1,\"id\":\"7\",\"err\":{\"code\":\"internal\",\"message\":\"\"}}",
            "{\"v\":1,\"id\":\"7\",\"sig\":{}}",
            "{\"id\":\"7\",\"later\":1}",
            "[\"id\"]",
        ] {
            let mut frame = Bytes::from(line);
            assert!(request(&mut frame, &mut known()).is_none(), "{line}");
            assert!(reply(&mut frame).is_none(), "{line}");
            assert_eq!(frame, line, "left as it was");
        }
    }
}
