//! The frame: one line of JSON, a newline, the body as raw bytes.
//!
//! Requests: `v` version (1; absent: a plain peer, who understands no signals), `id`, `to` reply address, `exp` the deadline in
//! Redis milliseconds, `ttl` the budget in milliseconds, `of` 1 if an offer is awaited, `m` method, `s` the service of what is
//! said to all its servers, `ct` content type, `h` headers, `at` the id of the body's own key. Replies: `v`, `id`, `n` the
//! node, `ct`, `h`, `at`, for a fault `err` and `ran`, for a signal `sig`. What has its default is left out; what is not known
//! is ignored.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use antiphon_core::{
    ContentType, CorrelationId, Deadline, Error, Executed, Headers, Method, Node, Outcome, Reply,
    ReplyAddress, Request, ServiceName, Signal, Signals,
};
use bytes::{Buf, Bytes};

use crate::head::{Line, Pairs, ReplyHead, RequestHead, write_text};
use crate::naming;
use crate::scan::{self, Last};

const VERSION: u32 = 1;

/// When a request expires, as it is on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Expiry {
    /// By the clock of Redis, in milliseconds since the epoch.
    pub(crate) at: Option<u64>,
    /// What was left when it was sent, in milliseconds.
    pub(crate) budget: Option<u64>,
}

/// A request as it was on the wire.
#[derive(Debug)]
pub(crate) struct RequestFrame {
    /// The request; its body is empty if it is apart. Nobody else has it yet.
    pub(crate) request: Arc<Request>,
    pub(crate) expiry: Expiry,
    /// The id of the key that holds the body.
    pub(crate) apart: Option<String>,
}

/// A reply as it was on the wire.
#[derive(Debug)]
pub(crate) struct ReplyFrame {
    /// The reply; its body is empty if it is apart. Nobody else has it yet.
    pub(crate) reply: Arc<Reply>,
    /// The id of the key that holds the body.
    pub(crate) apart: Option<String>,
}

/// What arrives at an inbox.
#[derive(Debug)]
pub(crate) enum Letter {
    Reply(ReplyFrame),
    /// Said to every server of the service.
    Request {
        service: ServiceName,
        frame: RequestFrame,
    },
    /// A signal of a later version.
    Ignored,
}

/// The most characters of why something is not a frame.
const REASON_MAX: usize = 256;

/// Something that is not a frame, and what could be read of it.
#[derive(Debug)]
pub(crate) struct BadFrame {
    pub(crate) id: Option<CorrelationId>,
    pub(crate) reply_to: Option<ReplyAddress>,
    pub(crate) reason: String,
}

/// Appends a request's frame; with `apart`, its body is in the key of that id.
pub(crate) fn encode_request(
    request: &Request,
    expiry: Expiry,
    apart: Option<&str>,
    out: &mut Vec<u8>,
) {
    encode(request, None, expiry, apart, out);
}

/// Appends the frame of what is said to every server of a service; with `apart`, its body is in the inbox's key of that id.
pub(crate) fn encode_broadcast(
    service: &ServiceName,
    request: &Request,
    expiry: Expiry,
    apart: Option<&str>,
    out: &mut Vec<u8>,
) {
    encode(request, Some(service), expiry, apart, out);
}

fn encode(
    request: &Request,
    service: Option<&ServiceName>,
    expiry: Expiry,
    apart: Option<&str>,
    out: &mut Vec<u8>,
) {
    let mut line = match request.signals {
        Signals::None => Line::of_plain_peer(&request.id, out),
        _ => Line::new(&request.id, out),
    };
    if let Some(reply_to) = &request.reply_to {
        line.text(br#","to":"#, reply_to.as_str());
    }
    if let Some(at) = expiry.at {
        line.number(br#","exp":"#, at);
    }
    if let Some(budget) = expiry.budget {
        line.number(br#","ttl":"#, budget);
    }
    if request.signals == Signals::Offer {
        line.number(br#","of":"#, 1);
    }
    if let Some(method) = &request.method {
        line.plain(br#","m":""#, method.as_str());
    }
    if let Some(service) = service {
        line.plain(br#","s":""#, service.as_str());
    }
    line.common(request.content_type.as_ref(), &request.headers, apart);
    line.end(if apart.is_some() { &[] } else { &request.body });
}

/// Appends a reply's frame; with `apart`, its body is in the key of that id.
pub(crate) fn encode_reply(reply: &Reply, apart: Option<&str>, out: &mut Vec<u8>) {
    let mut line = Line::new(&reply.id, out);
    match &reply.outcome {
        Outcome::Fault { fault, executed } => {
            // A fault is made of text and numbers only, so it always has a JSON form.
            line.raw(
                br#","err":"#,
                &serde_json::to_vec(fault).unwrap_or_else(|_| b"{\"code\":\"unknown\"}".to_vec()),
            );
            line.plain(br#","ran":""#, executed.as_str());
        }
        Outcome::Signal(signal) => line.raw(br#","sig":"#, signal.to_text().as_bytes()),
        _ => {}
    }
    if let Some(node) = &reply.node {
        line.plain(br#","n":""#, node.as_str());
    }
    line.common(reply.content_type.as_ref(), &reply.headers, apart);
    line.end(if apart.is_some() { &[] } else { &reply.body });
}

/// How the frames of requests of ours with this id begin, and no others.
pub(crate) fn beginnings(id: &CorrelationId) -> [Vec<u8>; 2] {
    let (mut ours, mut plain) = (Vec::new(), Vec::new());
    Line::new(id, &mut ours);
    Line::of_plain_peer(id, &mut plain);
    [ours, plain]
}

/// Reads a request. What the `last` one had is not made again.
pub(crate) fn decode_request(mut frame: Bytes, last: &mut Last) -> Result<RequestFrame, BadFrame> {
    match scan::request(&mut frame, last) {
        Some(request) => Ok(request),
        None => decode_any_request(frame),
    }
}

/// By all the rules.
pub(crate) fn decode_any_request(frame: Bytes) -> Result<RequestFrame, BadFrame> {
    let line = line(&frame);
    let head: RequestHead<'_> = serde_json::from_slice(line).map_err(|error| bad(line, &error))?;
    let convert = || -> Result<_, Error> {
        check_version(head.v)?;
        let expiry = Expiry {
            at: head.exp,
            budget: head.ttl,
        };
        let request = Request {
            id: CorrelationId::parse(&head.id)?,
            reply_to: head.to.as_deref().map(ReplyAddress::new).transpose()?,
            deadline: deadline(expiry),
            method: head.m.as_deref().map(Method::new).transpose()?,
            headers: headers(&head.h)?,
            content_type: head.ct.as_deref().map(ContentType::new).transpose()?,
            signals: match (head.v, head.of) {
                (None, _) => Signals::None,
                (Some(_), Some(1)) => Signals::Offer,
                (Some(_), _) => Signals::Running,
            },
            body: Bytes::new(),
        };
        Ok((request, expiry, apart(head.at.as_deref())?))
    };
    let (mut request, expiry, apart) = convert().map_err(|error| bad(line, &error.message()))?;
    let head = line.len();
    request.body = behind(frame, head);
    Ok(RequestFrame {
        request: Arc::new(request),
        expiry,
        apart,
    })
}

/// Reads what arrived at an inbox.
pub(crate) fn decode_letter(mut frame: Bytes) -> Result<Letter, BadFrame> {
    match scan::reply(&mut frame) {
        Some(reply) => Ok(Letter::Reply(reply)),
        None => decode_any_letter(frame),
    }
}

/// By all the rules.
pub(crate) fn decode_any_letter(frame: Bytes) -> Result<Letter, BadFrame> {
    let line = line(&frame);
    let head: ReplyHead<'_> = serde_json::from_slice(line).map_err(|error| bad(line, &error))?;
    if let Some(service) = &head.s {
        let service = ServiceName::new(service).map_err(|error| bad(line, &error.message()))?;
        let frame = decode_any_request(frame)?;
        return Ok(Letter::Request { service, frame });
    }
    let convert = || -> Result<_, Error> {
        check_version(head.v)?;
        let executed = head.ran.as_deref().map_or(Executed::Maybe, Executed::parse);
        let outcome = match (&head.sig, &head.err) {
            (Some(signal), _) => match Signal::parse(&signal.to_string()) {
                Some(signal) => Outcome::Signal(signal),
                None => return Ok(None),
            },
            (None, Some(fault)) => Outcome::Fault {
                fault: fault.clone(),
                executed,
            },
            (None, None) => Outcome::Value,
        };
        let reply = Reply {
            id: CorrelationId::parse(&head.id)?,
            outcome,
            headers: headers(&head.h)?,
            content_type: head.ct.as_deref().map(ContentType::new).transpose()?,
            node: head.n.as_deref().map(Node::new).transpose()?,
            body: Bytes::new(),
        };
        Ok(Some((reply, apart(head.at.as_deref())?)))
    };
    let converted = convert().map_err(|error| bad(line, &error.message()))?;
    let Some((mut reply, apart)) = converted else {
        return Ok(Letter::Ignored);
    };
    let head = line.len();
    reply.body = behind(frame, head);
    Ok(Letter::Reply(ReplyFrame {
        reply: Arc::new(reply),
        apart,
    }))
}

/// The head of a dead letter; a newline and the frame as it was follow.
pub(crate) fn dead_letter_head(reason: &str, attempt: u32, at: u64) -> Vec<u8> {
    let mut head = format!("{{\"v\":{VERSION},\"attempt\":{attempt},\"at\":{at}").into_bytes();
    head.extend_from_slice(b",\"reason\":");
    write_text(&mut head, reason);
    head.push(b'}');
    head
}

/// The deadline behind an expiry, with `at` by the clock of Redis.
pub(crate) fn deadline(expiry: Expiry) -> Option<Deadline> {
    // Without a budget it is what is left when it is taken, which the caller of this knows.
    let budget = Duration::from_millis(expiry.budget.or_else(|| expiry.at.map(|_| 0))?);
    let at = match expiry.at {
        Some(at) => UNIX_EPOCH.checked_add(Duration::from_millis(at)),
        None => SystemTime::now().checked_add(budget),
    };
    Some(Deadline {
        at: at.unwrap_or(UNIX_EPOCH),
        budget,
    })
}

fn line(frame: &Bytes) -> &[u8] {
    let end = frame.iter().position(|&byte| byte == b'\n');
    &frame[..end.unwrap_or(frame.len())]
}

/// What is behind a line and its newline. Cut in place: a slice of its own would cost an allocation.
fn behind(mut frame: Bytes, line: usize) -> Bytes {
    frame.advance((line + 1).min(frame.len()));
    frame
}

fn check_version(version: Option<u32>) -> Result<(), Error> {
    match version {
        None | Some(VERSION) => Ok(()),
        Some(version) => Err(invalid(format!("frame version {version}"))),
    }
}

fn headers(pairs: &Pairs<'_>) -> Result<Headers, Error> {
    let mut headers = Headers::new();
    for (name, value) in &pairs.0 {
        headers.insert(name, value)?;
    }
    Ok(headers)
}

fn apart(id: Option<&str>) -> Result<Option<String>, Error> {
    match id {
        Some(id) if !naming::is_random_id(id) => {
            Err(invalid("the id of the body is not 32 hexadecimal digits"))
        }
        id => Ok(id.map(str::to_owned)),
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::not_executed(antiphon_core::ErrorKind::Invalid, message)
}

/// What can be told of a line that is not a frame: its id and reply address, if they are there and valid.
fn bad(line: &[u8], reason: &dyn fmt::Display) -> BadFrame {
    // It may quote what it could not read, of any length.
    let reason: String = reason.to_string().chars().take(REASON_MAX).collect();
    let loose: serde_json::Value = serde_json::from_slice(line).unwrap_or_default();
    let text = |name: &str| loose.get(name).and_then(serde_json::Value::as_str);
    BadFrame {
        id: text("id").and_then(|id| CorrelationId::parse(id).ok()),
        reply_to: text("to").and_then(|to| ReplyAddress::new(to).ok()),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use antiphon_core::{Code, Fault};

    use super::*;

    fn encode_request(request: &Request, expiry: Expiry, apart: Option<&str>) -> Vec<u8> {
        let mut frame = Vec::new();
        super::encode_request(request, expiry, apart, &mut frame);
        frame
    }

    fn encode_reply(reply: &Reply, apart: Option<&str>) -> Vec<u8> {
        let mut frame = Vec::new();
        super::encode_reply(reply, apart, &mut frame);
        frame
    }

    fn decode_request(frame: Bytes) -> Result<RequestFrame, BadFrame> {
        super::decode_request(frame, &mut Last::default())
    }

    fn decode_reply(frame: Bytes) -> Result<ReplyFrame, BadFrame> {
        decode_letter(frame).map(|letter| match letter {
            Letter::Reply(frame) => frame,
            other => panic!("not a reply: {other:?}"),
        })
    }

    const ID: &str = "f47ac10b-58cc-4372-a567-0e02b2c3d479";

    fn request(body: &'static [u8]) -> Request {
        Request {
            id: CorrelationId::parse(ID).unwrap(),
            reply_to: Some(ReplyAddress::new("{c1}:i").unwrap()),
            deadline: None,
            method: None,
            headers: Headers::new(),
            content_type: None,
            signals: Signals::Running,
            body: Bytes::from_static(body),
        }
    }

    #[test]
    fn golden_request() {
        let expiry = Expiry {
            at: Some(1_764_000_000_000),
            budget: Some(30_000),
        };
        let golden: &[u8] =
            b"{\"v\":1,\"id\":\"f47ac10b-58cc-4372-a567-0e02b2c3d479\",\"to\":\"{c1}:i\",\
            \"exp\":1764000000000,\"ttl\":30000}\n\x00\xff\n30";
        assert_eq!(
            encode_request(&request(b"\x00\xff\n30"), expiry, None),
            golden
        );
        let frame = decode_request(Bytes::from_static(golden)).unwrap();
        assert_eq!(frame.request.id.to_string(), ID);
        assert_eq!(frame.request.reply_to.as_ref().unwrap().as_str(), "{c1}:i");
        assert_eq!(&frame.request.body[..], b"\x00\xff\n30");
        assert_eq!(frame.expiry, expiry);
        assert_eq!(
            frame.request.deadline.unwrap().budget,
            Duration::from_secs(30)
        );
    }

    #[test]
    fn golden_request_with_everything() {
        let mut full = request(b"the body is elsewhere");
        full.id = CorrelationId::parse("a \"foreign\" \\ id").unwrap();
        full.method = Some(Method::new("fib.fast").unwrap());
        full.content_type = Some(ContentType::JSON);
        full.headers.insert("b", "q\"\u{e9}").unwrap();
        full.headers.insert("a", "1").unwrap();
        let golden = "{\"v\":1,\"id\":\"a \\\"foreign\\\" \\\\ id\",\"to\":\"{c1}:i\",\"m\":\"fib.fast\",\
            \"ct\":\"application/json\",\"h\":{\"b\":\"q\\\"\u{e9}\",\"a\":\"1\"},\
            \"at\":\"0123456789abcdef0123456789abcdef\"}\n";
        let encoded = encode_request(
            &full,
            Expiry::default(),
            Some("0123456789abcdef0123456789abcdef"),
        );
        assert_eq!(String::from_utf8(encoded.clone()).unwrap(), golden);
        let frame = decode_request(Bytes::from(encoded)).unwrap();
        assert_eq!(frame.request.id, full.id);
        assert_eq!(frame.request.headers, full.headers);
        assert_eq!(frame.request.method, full.method);
        assert_eq!(frame.request.content_type, full.content_type);
        assert_eq!(
            frame.apart.as_deref(),
            Some("0123456789abcdef0123456789abcdef")
        );
        assert!(frame.request.deadline.is_none() && frame.request.body.is_empty());
    }

    #[test]
    fn golden_replies() {
        let id = CorrelationId::parse(ID).unwrap();
        let value = Reply::value(id.clone(), &b"832040"[..]);
        let golden: &[u8] = b"{\"v\":1,\"id\":\"f47ac10b-58cc-4372-a567-0e02b2c3d479\"}\n832040";
        assert_eq!(encode_reply(&value, None), golden);
        let back = decode_reply(Bytes::from_static(golden)).unwrap();
        assert_eq!(
            (&back.reply.outcome, &back.reply.body[..]),
            (&Outcome::Value, &b"832040"[..])
        );

        let fault = Reply::fault(
            id,
            Fault::new(Code::OutOfRange, "n > \"93\""),
            Executed::Yes,
        );
        let golden: &[u8] = b"{\"v\":1,\"id\":\"f47ac10b-58cc-4372-a567-0e02b2c3d479\",\
            \"err\":{\"code\":\"out_of_range\",\"message\":\"n > \\\"93\\\"\"},\"ran\":\"yes\"}\n";
        assert_eq!(encode_reply(&fault, None), golden);
        assert_eq!(
            decode_reply(Bytes::from_static(golden))
                .unwrap()
                .reply
                .outcome,
            fault.outcome
        );
    }

    #[test]
    fn a_foreign_producer_needs_only_an_id() {
        let frame = decode_request(Bytes::from_static(
            b"{\"id\": \"7\", \"to\": \"{me}:i\", \"later\": [1]}\n30",
        ))
        .unwrap();
        assert_eq!(
            (frame.expiry, frame.request.deadline),
            (Expiry::default(), None)
        );
        assert_eq!(&frame.request.body[..], b"30");
        assert!(
            decode_request(Bytes::from_static(b"{\"id\":\"7\"}"))
                .unwrap()
                .request
                .body
                .is_empty()
        );
        let budget = decode_request(Bytes::from_static(b"{\"id\":\"7\",\"ttl\":1500}\n")).unwrap();
        assert_eq!(
            budget.request.deadline.unwrap().budget,
            Duration::from_millis(1500)
        );
    }

    #[test]
    fn of_a_bad_frame_the_id_and_the_address_are_told_if_they_are_valid() {
        let bad =
            |text: &'static str| decode_request(Bytes::from_static(text.as_bytes())).unwrap_err();
        let newer = bad("{\"v\":2,\"id\":\"7\",\"to\":\"{me}:i\"}\n");
        assert_eq!(newer.id.unwrap().to_string(), "7");
        assert_eq!(newer.reply_to.unwrap().as_str(), "{me}:i");
        assert!(newer.reason.contains("version 2"), "{}", newer.reason);
        for text in [
            "",
            "\n",
            "30",
            "[]",
            "{\"id\":7}",
            "{\"id\":\"\"}",
            "\u{1}\n{}",
        ] {
            assert!(bad(text).id.is_none(), "{text:?}");
        }
        assert!(
            bad("{\"id\":\"7\",\"at\":\"../x\"}\n")
                .reason
                .contains("hexadecimal")
        );
        assert!(bad("{\"id\":\"7\",\"h\":{\"x-a\":\"1\"}}\n").id.is_some());
        assert!(
            decode_reply(Bytes::from_static(b"{\"id\":\"7\",\"err\":1}\n"))
                .unwrap_err()
                .id
                .is_some()
        );
    }

    #[test]
    fn what_is_said_to_all_servers_comes_back_as_it_was() {
        let service = ServiceName::new("fib@n1").unwrap();
        for signals in [Signals::None, Signals::Running, Signals::Offer] {
            let mut said = request(b"30");
            said.signals = signals;
            let mut bytes = Vec::new();
            encode_broadcast(&service, &said, Expiry::default(), None, &mut bytes);
            let letter = decode_letter(Bytes::from(bytes.clone())).unwrap();
            let Letter::Request { service: to, frame } = letter else {
                panic!("not a request: {letter:?}");
            };
            assert_eq!((to, frame.request.signals), (service.clone(), signals));
            assert_eq!(&frame.request.body[..], b"30");
            let starts = |beginning: &Vec<u8>| bytes.starts_with(beginning);
            assert!(beginnings(&said.id).iter().any(starts));
            let other = CorrelationId::parse("f47ac10b").unwrap();
            assert!(!beginnings(&other).iter().any(starts));
        }
        let misnamed = decode_letter(Bytes::from_static(b"{\"id\":\"7\",\"s\":\"a b\"}\n"));
        assert_eq!(misnamed.unwrap_err().id.unwrap().to_string(), "7");
    }

    #[test]
    fn signals_come_back_and_unknown_ones_are_ignored() {
        let id = CorrelationId::parse(ID).unwrap();
        let node = Node::new("n1").unwrap();
        let mut progress = Reply::signal(id, Signal::Progress { node });
        progress.body = Bytes::from_static(b"7");
        let back = decode_reply(Bytes::from(encode_reply(&progress, None))).unwrap();
        assert_eq!(
            (&back.reply.outcome, &back.reply.body),
            (&progress.outcome, &progress.body)
        );
        for unknown in ["{\"signal\":\"later\",\"node\":\"n1\"}", "5", "\"x\"", "{}"] {
            let line = format!("{{\"v\":1,\"id\":\"7\",\"sig\":{unknown}}}\n");
            let letter = decode_letter(Bytes::from(line)).unwrap();
            assert!(matches!(letter, Letter::Ignored), "{letter:?}");
        }
    }

    #[test]
    fn golden_dead_letter_head() {
        let head = dead_letter_head("not a\n\"frame\"", 2, 5);
        assert_eq!(
            String::from_utf8(head).unwrap(),
            "{\"v\":1,\"attempt\":2,\"at\":5,\"reason\":\"not a\\u000a\\\"frame\\\"\"}"
        );
    }

    /// The examples of the page are what we write, and what we write is what we read.
    #[test]
    fn the_page_on_the_wire_format_is_true() {
        let page = include_str!("../../docs/wire-format.md");
        let mut sent = request(b"30");
        sent.method = Some(Method::new("add").unwrap());
        sent.content_type = Some(ContentType::JSON);
        sent.headers.insert("tenant", "a").unwrap();
        let expiry = Expiry {
            at: Some(1_764_000_000_000),
            budget: Some(30_000),
        };
        let mut value = Reply::value(sent.id.clone(), "832040");
        value.content_type = Some(ContentType::JSON);
        let fault = Fault::new(Code::OutOfRange, "n > 93");
        let fault = Reply::fault(sent.id.clone(), fault, Executed::Yes);
        let node = Node::new("n1").unwrap();
        let every = Duration::from_secs(5);
        let running = Signal::Running {
            node: node.clone(),
            every,
        };
        let offer = Signal::Offer {
            node: node.clone(),
            to: ReplyAddress::new("{s1}:i").unwrap(),
            id: CorrelationId::parse("7").unwrap(),
        };
        let mut named = value.clone();
        named.node = Some(node);
        let mut offered = request(b"30");
        offered.signals = Signals::Offer;
        let mut cancel = request(b"7\n");
        (cancel.reply_to, cancel.signals) = (None, Signals::None);
        cancel.method = Some(Method::new("antiphon.cancel").unwrap());
        let service = ServiceName::new("fib").unwrap();
        let mut said = Vec::new();
        encode_broadcast(&service, &cancel, expiry, None, &mut said);
        for frame in [
            encode_request(&sent, expiry, None),
            encode_reply(&value, None),
            encode_reply(&fault, None),
            encode_reply(&Reply::signal(sent.id.clone(), running), None),
            encode_reply(&named, None),
            encode_request(&offered, expiry, None),
            encode_reply(&Reply::signal(sent.id.clone(), offer), None),
            said,
        ] {
            let example = format!("```text\n{}\n```", String::from_utf8(frame).unwrap());
            assert!(page.contains(&example), "{example}");
        }
    }
}
