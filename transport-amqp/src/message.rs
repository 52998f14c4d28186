//! Requests and replies as AMQP messages: standard properties, so that any client in any language is a peer.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use antiphon_core::transport::Incoming;
use antiphon_core::{
    ContentType, CorrelationId, Deadline, Executed, Fault, Headers, Method, Node, Outcome, Reply,
    ReplyAddress, Request, ServiceName, Signal, Signals,
};
use bytes::Bytes;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};

/// The `app_id` of requests of ours: the peer understands our headers. Any other one means a plain peer. A property of the broker's own
/// costs all three less than a table of headers.
const APP: &str = "antiphon/1";
/// What said so before it, and still does: a header, whatever its value.
const VERSION: &str = "antiphon-version";
/// How the names of our own headers begin.
const OWN: &str = "antiphon-";
/// On requests that no handler is to be started for before the caller says so: `1`.
const OFFER: &str = "antiphon-offer";
/// On replies that are not a value: `fault` or `signal`.
const OUTCOME: &str = "antiphon-outcome";
/// Beside it: `no`, `maybe` or `yes`.
const EXECUTED: &str = "antiphon-executed";
/// On signals: what is said, as one line of JSON.
const SIGNAL: &str = "antiphon-signal";
/// On replies to what every server of a service was asked: whose it is.
const NODE: &str = "antiphon-node";
/// On requests in a retry queue: which attempt the next one is.
const ATTEMPT: &str = "antiphon-attempt";
/// On dead letters: why.
const REASON: &str = "antiphon-reason";

/// The longest reason, in bytes.
const REASON_MAX: usize = 1024;

const FAULT: &str = "fault";
const SIGNALLED: &str = "signal";
const OFFERED: &str = "1";

/// Kept on disk where the queue is.
const PERSISTENT: u8 = 2;
const TRANSIENT: u8 = 1;

/// The longest expiration that the broker takes, in milliseconds: 49 days.
const EXPIRATION_MAX: u64 = u32::MAX as u64;

/// The same, but not kept on disk.
pub(crate) fn transient(properties: BasicProperties) -> BasicProperties {
    properties.with_delivery_mode(TRANSIENT)
}

/// The properties of a request that has `remaining` to live.
pub(crate) fn encode_request(request: &Request, remaining: Option<Duration>) -> BasicProperties {
    let mut table = encode_headers(&request.headers);
    if request.signals == Signals::Offer {
        table.insert(OFFER.into(), text(OFFERED));
    }
    let mut properties = BasicProperties::default()
        .with_app_id(APP.into())
        .with_delivery_mode(PERSISTENT)
        .with_correlation_id(request.id.with_str(|id| id.into()));
    if !table.inner().is_empty() {
        properties = properties.with_headers(table);
    }
    if let Some(reply_to) = &request.reply_to {
        properties = properties.with_reply_to(reply_to.as_str().into());
    }
    if let Some(content_type) = &request.content_type {
        properties = properties.with_content_type(content_type.as_str().into());
    }
    if let Some(method) = &request.method {
        properties = properties.with_type(method.as_str().into());
    }
    if let Some(remaining) = remaining {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        properties = properties
            .with_expiration(expiration(remaining))
            .with_timestamp(now.unwrap_or_default().as_secs());
    }
    properties
}

/// The properties and body of a reply. `correlation` is what the request had, byte for byte; `plain` says that the caller
/// knows none of our headers.
pub(crate) fn encode_reply(
    reply: &Reply,
    correlation: Option<ShortString>,
    plain: bool,
) -> (BasicProperties, Bytes) {
    let mut table = encode_headers(&reply.headers);
    let mut content_type = reply.content_type.clone();
    let mut body = reply.body.clone();
    match &reply.outcome {
        Outcome::Fault { fault, executed } => {
            body = fault.to_body();
            if plain {
                content_type = Some(ContentType::JSON);
            } else {
                table.insert(OUTCOME.into(), text(FAULT));
                table.insert(EXECUTED.into(), text(executed.as_str()));
            }
        }
        Outcome::Signal(signal) => {
            table.insert(OUTCOME.into(), text(SIGNALLED));
            table.insert(SIGNAL.into(), text(&signal.to_text()));
        }
        _ => {}
    }
    if let Some(node) = &reply.node
        && !plain
    {
        table.insert(NODE.into(), text(node.as_str()));
    }
    let mut properties = BasicProperties::default();
    if !table.inner().is_empty() {
        properties = properties.with_headers(table);
    }
    if let Some(correlation) = correlation {
        properties = properties.with_correlation_id(correlation);
    }
    if let Some(content_type) = content_type {
        properties = properties.with_content_type(content_type.as_str().into());
    }
    (properties, body)
}

/// What a message in an inbox is that was sent to the inbox itself; `None` for what a later version has to say before its reply.
pub(crate) fn decode_reply(properties: &BasicProperties, body: Vec<u8>) -> Option<Incoming> {
    let undecodable = |id, reason| Some(Incoming::Undecodable { id, reason });
    let Some(id) = properties.correlation_id() else {
        return undecodable(None, "a reply without correlation id".to_owned());
    };
    let id = match CorrelationId::parse(id.as_str()) {
        Ok(id) => id,
        Err(error) => return undecodable(None, error.message().to_owned()),
    };
    let (outcome, body) = match find(properties, OUTCOME) {
        None => (Outcome::Value, Bytes::from(body)),
        Some(FAULT) => {
            let Some(fault) = Fault::from_body(&body) else {
                return undecodable(Some(id), "a fault that is not one".to_owned());
            };
            let executed = find(properties, EXECUTED).map_or(Executed::Maybe, Executed::parse);
            (Outcome::Fault { fault, executed }, Bytes::new())
        }
        Some(SIGNALLED) => {
            let signal = Signal::parse(find(properties, SIGNAL)?)?;
            (Outcome::Signal(signal), Bytes::from(body))
        }
        Some(other) => {
            let reason = format!("a reply with the unknown outcome {other:?}");
            return undecodable(Some(id), reason);
        }
    };
    Some(Incoming::Reply(Arc::new(Reply {
        id,
        outcome,
        headers: decode_headers(properties),
        content_type: decode_content_type(properties),
        node: find(properties, NODE).and_then(|node| Node::new(node).ok()),
        body,
    })))
}

/// What a message in an inbox is that was sent to every server of a service.
pub(crate) fn decode_broadcast(
    service: &str,
    properties: &BasicProperties,
    body: Vec<u8>,
) -> Incoming {
    let service = ServiceName::new(service).map_err(|error| error.message().to_owned());
    let decoded = service.and_then(|service| {
        let request = Arc::new(decode_request(properties, Bytes::from(body))?);
        Ok(Incoming::Request { service, request })
    });
    // Without its id: it is no answer to anything of ours.
    decoded.unwrap_or_else(|reason| Incoming::Undecodable { id: None, reason })
}

/// What a message in a service's queue is.
///
/// # Errors
/// Why it is no request.
pub(crate) fn decode_request(properties: &BasicProperties, body: Bytes) -> Result<Request, String> {
    let id = match properties.correlation_id() {
        Some(id) => {
            CorrelationId::parse(id.as_str()).map_err(|error| error.message().to_owned())?
        }
        // A plain peer that does not care; whatever is sent back to it will not carry one either.
        None => CorrelationId::random(),
    };
    let reply_to = match properties.reply_to() {
        Some(address) if !address.as_str().is_empty() => {
            let address = ReplyAddress::new(address.as_str());
            Some(address.map_err(|error| error.message().to_owned())?)
        }
        _ => None,
    };
    let method = match properties.kind() {
        Some(name) if is_plain(properties) => Method::new(name.as_str()).ok(),
        Some(name) => Some(Method::new(name.as_str()).map_err(|error| error.message().to_owned())?),
        None => None,
    };
    let deadline = time_to_live(properties).map(|budget| {
        let sent = properties.timestamp().map(Duration::from_secs);
        let at = sent.and_then(|sent| UNIX_EPOCH.checked_add(sent)?.checked_add(budget));
        Deadline {
            at: at.unwrap_or_else(|| Deadline::after(budget).at),
            budget,
        }
    });
    Ok(Request {
        id,
        reply_to,
        deadline,
        method,
        headers: decode_headers(properties),
        content_type: decode_content_type(properties),
        signals: decode_signals(properties),
        body,
    })
}

/// True for the request of a peer that knows nothing of us.
pub(crate) fn is_plain(properties: &BasicProperties) -> bool {
    let app = properties.app_id().as_ref().map(ShortString::as_str);
    app != Some(APP) && find(properties, VERSION).is_none()
}

/// What was left of a request's time when it was sent.
pub(crate) fn time_to_live(properties: &BasicProperties) -> Option<Duration> {
    let text = properties.expiration().as_ref()?;
    text.as_str().parse().ok().map(Duration::from_millis)
}

/// Which attempt a message from a retry queue is; at least the second.
pub(crate) fn attempt(properties: &BasicProperties) -> u32 {
    let attempt = find(properties, ATTEMPT).and_then(|text| text.parse().ok());
    attempt.unwrap_or(2).max(2)
}

/// The properties of a request that goes to a queue once more: all that its sender set, with what is left of its time.
/// If it is to be `bare`, without headers other than ours.
pub(crate) fn forward(
    properties: &BasicProperties,
    attempt: u32,
    remaining: Option<Duration>,
    bare: bool,
) -> BasicProperties {
    let mut table = own_headers(properties, bare);
    if attempt > 1 {
        table.insert(ATTEMPT.into(), text(&attempt.to_string()));
    }
    let forwarded = keep(properties, table);
    match remaining {
        Some(remaining) => forwarded.with_expiration(expiration(remaining)),
        None => forwarded,
    }
}

/// The properties of a dead letter: all that its sender set but the expiration, and why it is dead, in at most 1 KiB.
pub(crate) fn bury(
    properties: &BasicProperties,
    attempt: u32,
    reason: &str,
    bare: bool,
) -> BasicProperties {
    let mut table = own_headers(properties, bare);
    // All headers must fit into one frame.
    let end = (0..=reason.len().min(REASON_MAX)).rfind(|&at| reason.is_char_boundary(at));
    let reason = end.map_or("", |end| &reason[..end]);
    table.insert(ATTEMPT.into(), text(&attempt.to_string()));
    table.insert(REASON.into(), text(reason));
    keep(properties, table)
}

/// The headers that may be published again. Brokers route by `CC` and `BCC`, and count in `x-delivery-count`.
fn own_headers(properties: &BasicProperties, bare: bool) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in properties.headers().iter().flatten() {
        let kept = match name.as_str() {
            "CC" | "BCC" | "x-delivery-count" => false,
            name => !bare || name.starts_with(OWN),
        };
        if kept {
            table.insert(name.clone(), value.clone());
        }
    }
    table
}

/// The same properties, but for the headers, the expiration, and `user_id`: the broker refuses another user's.
fn keep(properties: &BasicProperties, table: FieldTable) -> BasicProperties {
    let mut kept = BasicProperties::default()
        .with_headers(table)
        .with_delivery_mode(PERSISTENT);
    macro_rules! keep {
        ($($from:ident => $with:ident),*) => {
            $(if let Some(value) = properties.$from() { kept = kept.$with(value.clone()); })*
        };
    }
    keep!(
        content_type => with_content_type,
        content_encoding => with_content_encoding,
        priority => with_priority,
        correlation_id => with_correlation_id,
        reply_to => with_reply_to,
        message_id => with_message_id,
        timestamp => with_timestamp,
        kind => with_type,
        app_id => with_app_id
    );
    kept
}

/// Milliseconds as the broker wants them. Zero would mean: only if a server takes it at this very moment.
fn expiration(remaining: Duration) -> ShortString {
    let millis = u64::try_from(remaining.as_millis()).unwrap_or(u64::MAX);
    millis.clamp(1, EXPIRATION_MAX).to_string().into()
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

fn find<'a>(properties: &'a BasicProperties, name: &str) -> Option<&'a str> {
    as_text(properties.headers().as_ref()?.inner().get(name)?)
}

fn as_text(value: &AMQPValue) -> Option<&str> {
    match value {
        AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok(),
        AMQPValue::ShortString(text) => Some(text.as_str()),
        _ => None,
    }
}

fn encode_headers(headers: &Headers) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in headers.iter() {
        table.insert(name.into(), text(value));
    }
    table
}

/// The headers that are of our grammar; what else plain peers and brokers add is not for handlers.
fn decode_headers(properties: &BasicProperties) -> Headers {
    let mut headers = Headers::new();
    for (name, value) in properties.headers().iter().flatten() {
        // A refusal of each of ours would cost more than all the rest.
        if !name.as_str().starts_with(OWN)
            && let Some(value) = as_text(value)
        {
            let _ = headers.insert(name.as_str(), value);
        }
    }
    headers
}

/// A plain peer would take a signal for the reply.
fn decode_signals(properties: &BasicProperties) -> Signals {
    match find(properties, OFFER) {
        _ if is_plain(properties) => Signals::None,
        Some(OFFERED) => Signals::Offer,
        _ => Signals::Running,
    }
}

fn decode_content_type(properties: &BasicProperties) -> Option<ContentType> {
    let content_type = properties.content_type().as_ref()?;
    ContentType::new(content_type.as_str()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use antiphon_core::Code;

    fn request() -> Request {
        let mut request = Request::new(Deadline::after(Duration::from_secs(2)), "30");
        request.id = CorrelationId::parse("f47ac10b-58cc-4372-a567-0e02b2c3d479").unwrap();
        request.reply_to = Some(ReplyAddress::new("antiphon.inbox.1").unwrap());
        request.method = Some(Method::new("fib").unwrap());
        request.content_type = Some(ContentType::JSON);
        request.headers.insert("tenant", "a").unwrap();
        request
    }

    #[test]
    fn golden_request() {
        let properties = encode_request(&request(), Some(Duration::from_millis(1999)));
        assert_eq!(
            properties.correlation_id().as_ref().unwrap().as_str(),
            "f47ac10b-58cc-4372-a567-0e02b2c3d479"
        );
        assert_eq!(
            properties.reply_to().as_ref().unwrap().as_str(),
            "antiphon.inbox.1"
        );
        assert_eq!(properties.kind().as_ref().unwrap().as_str(), "fib");
        assert_eq!(
            properties.content_type().as_ref().unwrap().as_str(),
            "application/json"
        );
        assert_eq!(properties.expiration().as_ref().unwrap().as_str(), "1999");
        assert_eq!(*properties.delivery_mode(), Some(2));
        assert!(properties.timestamp().is_some());
        let headers: Vec<_> = properties.headers().as_ref().unwrap().into_iter().collect();
        let names: Vec<_> = headers.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["tenant"]);
        assert_eq!(*headers[0].1, text("a"));
        assert_eq!(properties.app_id().as_ref().unwrap().as_str(), "antiphon/1");
    }

    #[test]
    fn a_request_of_ours_needs_no_headers() {
        let mut bare = request();
        bare.headers = Headers::new();
        let properties = encode_request(&bare, None);
        assert_eq!(properties.headers(), &None);
        assert!(!is_plain(&properties));
        // What goes round again is still ours.
        assert!(!is_plain(&forward(&properties, 2, None, true)));
        assert!(!is_plain(&bury(&properties, 2, "poison", true)));
    }

    #[test]
    fn the_header_that_was_there_first_says_the_same() {
        let mut table = FieldTable::default();
        table.insert(VERSION.into(), text("1"));
        let before = BasicProperties::default().with_headers(table);
        assert!(!is_plain(&before));
        assert_eq!(decode_signals(&before), Signals::Running);
        let other = BasicProperties::default().with_app_id("billing".into());
        assert!(is_plain(&other));
    }

    #[test]
    fn a_request_comes_back_as_it_was() {
        let sent = request();
        let properties = encode_request(&sent, Some(Duration::from_secs(2)));
        let got = decode_request(&properties, sent.body.clone()).unwrap();
        assert_eq!(
            (&got.id, &got.reply_to, &got.method),
            (&sent.id, &sent.reply_to, &sent.method)
        );
        assert_eq!(
            (&got.headers, &got.content_type, &got.body),
            (&sent.headers, &sent.content_type, &sent.body)
        );
        assert_eq!(got.signals, Signals::Running);
        let deadline = got.deadline.unwrap();
        assert_eq!(deadline.budget, Duration::from_secs(2));
        let late = SystemTime::now() + Duration::from_secs(2);
        assert!(late.duration_since(deadline.at).unwrap() < Duration::from_secs(2));
    }

    #[test]
    fn an_expiration_is_never_zero() {
        for (remaining, wire) in [
            (Duration::ZERO, "1"),
            (Duration::from_micros(10), "1"),
            (Duration::MAX, "4294967295"),
        ] {
            assert_eq!(expiration(remaining).as_str(), wire);
        }
    }

    #[test]
    fn a_value_needs_no_headers() {
        let reply = Reply::value(request().id, "832040");
        let (properties, body) = encode_reply(&reply, Some("7".into()), false);
        assert_eq!((properties.headers(), &body[..]), (&None, &b"832040"[..]));
        assert_eq!(properties.correlation_id().as_ref().unwrap().as_str(), "7");
    }

    #[test]
    fn golden_fault() {
        let fault = Fault::new(Code::OutOfRange, "n > 93");
        let reply = Reply::fault(request().id, fault.clone(), Executed::Yes);
        let (properties, body) = encode_reply(&reply, Some("7".into()), false);
        assert_eq!(
            &body[..],
            br#"{"error":{"code":"out_of_range","message":"n > 93"}}"#
        );
        assert_eq!(
            (find(&properties, OUTCOME), find(&properties, EXECUTED)),
            (Some("fault"), Some("yes"))
        );
        let Some(Incoming::Reply(got)) = decode_reply(&properties, body.to_vec()) else {
            panic!("a reply");
        };
        assert_eq!(
            got.outcome,
            Outcome::Fault {
                fault,
                executed: Executed::Yes
            }
        );
        assert!(got.body.is_empty());

        let (properties, plain) = encode_reply(&reply, Some("7".into()), true);
        assert_eq!((properties.headers(), plain), (&None, body));
        assert_eq!(
            properties.content_type().as_ref().unwrap().as_str(),
            "application/json"
        );
    }

    #[test]
    fn a_plain_peer_is_understood() {
        let properties = BasicProperties::default()
            .with_correlation_id("1".into())
            .with_reply_to("amq.gen-abc".into())
            .with_type("not a method!".into());
        let request = decode_request(&properties, Bytes::from_static(b"30")).unwrap();
        assert!(is_plain(&properties));
        assert_eq!(request.id.to_string(), "1");
        assert_eq!(
            (request.deadline, request.method, request.content_type),
            (None, None, None)
        );
        assert_eq!(request.signals, Signals::None);
        let reply = decode_reply(
            &BasicProperties::default().with_correlation_id("1".into()),
            b"x".to_vec(),
        );
        let Some(Incoming::Reply(reply)) = reply else {
            panic!("{reply:?}")
        };
        assert_eq!((&reply.outcome, &reply.node), (&Outcome::Value, &None));
    }

    #[test]
    fn golden_offer() {
        let mut asked = request();
        asked.signals = Signals::Offer;
        let properties = encode_request(&asked, None);
        assert_eq!(find(&properties, "antiphon-offer"), Some("1"));
        let got = |properties| {
            decode_request(properties, Bytes::new())
                .map(|request| request.signals)
                .unwrap()
        };
        assert_eq!(got(&properties), Signals::Offer);
        // Whoever has it next is still to offer it.
        assert_eq!(got(&forward(&properties, 2, None, true)), Signals::Offer);
        assert_eq!(find(&encode_request(&request(), None), OFFER), None);
    }

    #[test]
    fn golden_signal() {
        let node = Node::new("n1").unwrap();
        let every = Duration::from_secs(5);
        let mut said = Reply::signal(
            request().id,
            Signal::Running {
                node: node.clone(),
                every,
            },
        );
        said.body = Bytes::from_static(b"half");
        let (properties, body) = encode_reply(&said, Some("7".into()), false);
        let signal = r#"{"signal":"running","node":"n1","every_ms":5000}"#;
        assert_eq!(
            (find(&properties, OUTCOME), find(&properties, SIGNAL)),
            (Some("signal"), Some(signal))
        );
        let Some(Incoming::Reply(got)) = decode_reply(&properties, body.to_vec()) else {
            panic!("a reply");
        };
        assert_eq!((&got.outcome, &got.body), (&said.outcome, &said.body));
        assert!(include_str!("../../docs/wire-format.md").contains(&format!("`{signal}`")));
        for unknown in [r#"{"signal":"later","node":"n1"}"#, "30"] {
            let mut table = FieldTable::default();
            table.insert(OUTCOME.into(), text(SIGNALLED));
            table.insert(SIGNAL.into(), text(unknown));
            let later = properties.clone().with_headers(table);
            assert!(decode_reply(&later, Vec::new()).is_none(), "{unknown}");
        }

        let mut reply = Reply::value(request().id, "832040");
        reply.node = Some(node);
        let (properties, body) = encode_reply(&reply, Some("7".into()), false);
        assert_eq!(find(&properties, NODE), Some("n1"));
        let Some(Incoming::Reply(got)) = decode_reply(&properties, body.to_vec()) else {
            panic!("a reply");
        };
        assert_eq!(got.node, reply.node);
        let (plain, _) = encode_reply(&reply, Some("7".into()), true);
        assert_eq!(plain.headers(), &None);
    }

    #[test]
    fn what_is_said_to_all_is_a_request() {
        let sent = request();
        let properties = encode_request(&sent, Some(Duration::from_secs(2)));
        let Incoming::Request { service, request } =
            decode_broadcast("fib@a", &properties, sent.body.to_vec())
        else {
            panic!("a request");
        };
        assert_eq!((service.as_str(), &request.id), ("fib@a", &sent.id));
        assert_eq!(request.deadline.unwrap().budget, Duration::from_secs(2));
        // Not an answer to the call of that id.
        let strange = decode_broadcast("no service", &properties, Vec::new());
        assert!(matches!(strange, Incoming::Undecodable { id: None, .. }));
    }

    #[test]
    fn foreign_headers_are_ignored() {
        let mut table = FieldTable::default();
        table.insert("x-death".into(), AMQPValue::Void);
        table.insert("Upper".into(), text("1"));
        table.insert("number".into(), AMQPValue::LongInt(1));
        table.insert("fine".into(), text("yes"));
        let properties = BasicProperties::default().with_headers(table);
        let headers = decode_headers(&properties);
        assert_eq!(headers.iter().collect::<Vec<_>>(), [("fine", "yes")]);
    }

    #[test]
    fn what_is_no_reply_is_told_with_its_id() {
        let none = decode_reply(&BasicProperties::default(), Vec::new());
        assert!(matches!(none, Some(Incoming::Undecodable { id: None, .. })));
        let mut table = FieldTable::default();
        table.insert(OUTCOME.into(), text(FAULT));
        let properties = BasicProperties::default()
            .with_correlation_id("1".into())
            .with_headers(table);
        let bad = decode_reply(&properties, b"no json".to_vec());
        assert!(matches!(
            bad,
            Some(Incoming::Undecodable { id: Some(_), .. })
        ));
    }

    #[test]
    fn what_goes_round_again_stays_as_it_is() {
        let properties = encode_request(&request(), Some(Duration::from_secs(2)));
        let again = forward(&properties, 3, Some(Duration::from_millis(700)), false);
        assert_eq!(attempt(&again), 3);
        assert_eq!(time_to_live(&again), Some(Duration::from_millis(700)));
        assert!(!is_plain(&again));
        assert_eq!(again.correlation_id(), properties.correlation_id());
        let bare = forward(&properties, 3, None, true);
        assert_eq!((attempt(&bare), find(&bare, "tenant")), (3, None));
        assert_eq!(find(&again, "tenant"), Some("a"));
        let long = bury(&properties, 6, &"\u{e9}x".repeat(1024), false);
        assert_eq!(find(&long, REASON).map(str::len), Some(1023));
        let dead = bury(&properties, 6, "poison", false);
        assert_eq!(
            (time_to_live(&dead), find(&dead, REASON)),
            (None, Some("poison"))
        );
        assert_eq!(
            (dead.reply_to(), dead.kind()),
            (properties.reply_to(), properties.kind())
        );
        assert_eq!(attempt(&BasicProperties::default()), 2);
    }

    /// The page names every header that we write, and its fault is ours.
    #[test]
    fn the_page_on_the_wire_format_is_true() {
        let page = include_str!("../../docs/wire-format.md");
        for header in [
            VERSION, OFFER, OUTCOME, EXECUTED, SIGNAL, NODE, ATTEMPT, REASON,
        ] {
            assert!(page.contains(&format!("| `{header}` |")), "{header}");
        }
        assert!(page.contains(&format!("| `app_id` | `{APP}`")));
        let body = Fault::new(Code::OutOfRange, "n > 93").to_body();
        let example = format!("```json\n{}\n```", std::str::from_utf8(&body).unwrap());
        assert!(page.contains(&example), "{example}");
    }
}
