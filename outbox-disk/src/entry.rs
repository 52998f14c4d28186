//! A kept reply as bytes: a line of JSON, and its body as it is.

use std::borrow::Cow;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use antiphon_core::{
    ContentType, CorrelationId, Executed, Fault, Headers, KeptReply, Node, OutboxKey, Outcome,
    Reply, ReplyAddress,
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct Head<'a> {
    kept_ms: u64,
    lasts_ms: u64,
    #[serde(borrow, default, skip_serializing_if = "Vec::is_empty")]
    headers: Vec<(Cow<'a, str>, Cow<'a, str>)>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    content_type: Option<Cow<'a, str>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    node: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fault: Option<Fault>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    executed: Option<Cow<'a, str>>,
}

/// Neither part can have a newline in it.
pub(crate) fn encode_key(key: &OutboxKey) -> Vec<u8> {
    format!("{}\n{}", key.to.as_str(), key.id).into_bytes()
}

/// None for what is no reply.
pub(crate) fn encode(kept: &KeptReply) -> Option<Vec<u8>> {
    let reply = &kept.reply;
    let (fault, executed) = match &reply.outcome {
        Outcome::Value => (None, None),
        Outcome::Fault { fault, executed } => (Some(fault.clone()), Some(executed.as_str().into())),
        _ => return None,
    };
    let pair = |(name, value)| (Cow::Borrowed(name), Cow::Borrowed(value));
    let head = Head {
        kept_ms: millis(kept.kept_at.duration_since(UNIX_EPOCH).unwrap_or_default()),
        lasts_ms: millis(kept.lasts),
        headers: reply.headers.iter().map(pair).collect(),
        content_type: reply.content_type.as_ref().map(|kind| kind.as_str().into()),
        node: reply.node.as_ref().map(|node| node.as_str().into()),
        fault,
        executed,
    };
    let mut bytes = serde_json::to_vec(&head).ok()?;
    bytes.reserve(reply.body.len() + 1);
    bytes.push(b'\n');
    bytes.extend_from_slice(&reply.body);
    Some(bytes)
}

/// The reverse of both; what is wrong with it, if it cannot be read.
pub(crate) fn decode(key: &[u8], value: &[u8], unsent: bool) -> Result<KeptReply, String> {
    let key = std::str::from_utf8(key).map_err(|error| error.to_string())?;
    let (to, id) = key.split_once('\n').ok_or("a key of one part")?;
    let end = value
        .iter()
        .position(|byte| *byte == b'\n')
        .ok_or("a reply without a head")?;
    let (head, body) = value.split_at(end);
    let head: Head<'_> = serde_json::from_slice(head).map_err(|error| error.to_string())?;
    let reply = reply(id, head_outcome(&head), &head, body).map_err(|error| error.to_string())?;
    Ok(KeptReply {
        to: ReplyAddress::new(to).map_err(|error| error.to_string())?,
        reply: reply.into(),
        unsent,
        kept_at: UNIX_EPOCH
            .checked_add(Duration::from_millis(head.kept_ms))
            .unwrap_or_else(SystemTime::now),
        lasts: Duration::from_millis(head.lasts_ms),
    })
}

fn head_outcome(head: &Head<'_>) -> Outcome {
    match (&head.fault, &head.executed) {
        (Some(fault), executed) => Outcome::Fault {
            fault: fault.clone(),
            executed: Executed::parse(executed.as_deref().unwrap_or_default()),
        },
        (None, _) => Outcome::Value,
    }
}

fn reply(
    id: &str,
    outcome: Outcome,
    head: &Head<'_>,
    body: &[u8],
) -> Result<Reply, antiphon_core::Error> {
    let mut headers = Headers::new();
    for (name, value) in &head.headers {
        headers.insert(name, value)?;
    }
    let content_type = head.content_type.as_deref().map(ContentType::new);
    let body = Bytes::copy_from_slice(body.get(1..).unwrap_or_default());
    Ok(Reply {
        outcome,
        headers,
        content_type: content_type.transpose()?,
        node: head.node.as_deref().map(Node::new).transpose()?,
        ..Reply::value(CorrelationId::parse(id)?, body)
    })
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use antiphon_core::Code;

    use super::*;

    fn back(kept: &KeptReply) -> KeptReply {
        decode(
            &encode_key(&kept.key()),
            &encode(kept).unwrap(),
            kept.unsent,
        )
        .unwrap()
    }

    #[test]
    fn a_reply_comes_back_as_it_was() {
        let mut reply = Reply::value(CorrelationId::random(), &b"\nany\0bytes\xff"[..]);
        reply.headers.insert("trace", "a \"b\" \\").unwrap();
        reply.content_type = Some(ContentType::JSON);
        reply.node = Some(Node::new("n1").unwrap());
        let kept = KeptReply {
            to: ReplyAddress::new("{c1}:i").unwrap(),
            reply: reply.into(),
            unsent: true,
            kept_at: UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
            lasts: Duration::from_millis(30_500),
        };
        assert_eq!(format!("{:?}", back(&kept)), format!("{kept:?}"));
        assert_eq!(
            String::from_utf8_lossy(&encode(&kept).unwrap()),
            "{\"kept_ms\":1700000000123,\"lasts_ms\":30500,\"headers\":[[\"trace\",\"a \\\"b\\\" \\\\\"]],\
             \"content_type\":\"application/json\",\"node\":\"n1\"}\n\nany\0bytes\u{fffd}"
        );

        let fault =
            Fault::new(Code::NotFound, "no\nsuch").with_details(serde_json::json!({"a": 1}));
        let id = CorrelationId::parse("7 of a plain peer").unwrap();
        let fault = KeptReply {
            reply: Reply::fault(id, fault, Executed::Yes).into(),
            unsent: false,
            ..kept
        };
        assert_eq!(format!("{:?}", back(&fault)), format!("{fault:?}"));
    }

    #[test]
    fn what_is_none_is_told() {
        for (key, value) in [
            (&b"\xff\n1"[..], &b"{\"kept_ms\":1,\"lasts_ms\":1}\n"[..]),
            (b"one", b"{\"kept_ms\":1,\"lasts_ms\":1}\n"),
            (b"inbox\n1", b"{\"kept_ms\":1,\"lasts_ms\":1}"),
            (b"inbox\n1", b"{}\n"),
            (b"\n1", b"{\"kept_ms\":1,\"lasts_ms\":1}\n"),
            (b"inbox\n", b"{\"kept_ms\":1,\"lasts_ms\":1}\n"),
        ] {
            assert!(decode(key, value, true).is_err(), "{key:?} {value:?}");
        }
    }
}
