//! What travels: requests and replies, as plain data.

use std::fmt;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Executed};
use crate::fault::Fault;
use crate::name::{self, ContentType, Method, Node, ReplyAddress};
use crate::signal::{Signal, Signals};

/// Ties a reply to its request.
///
/// Ours are random UUIDs (version 4). A plain peer of the broker may send anything of 1 to 255 bytes of printable
/// ASCII, and gets it back unchanged.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct CorrelationId(Id);

#[derive(Clone, PartialEq, Eq, Hash)]
enum Id {
    /// A UUID, as two words: as bytes it would be moved about unaligned.
    Uuid(u64, u64),
    Foreign(Box<str>),
}

impl CorrelationId {
    /// A new random id.
    #[must_use]
    pub fn random() -> Self {
        Self::from_uuid(Uuid::new_v4())
    }

    fn from_uuid(uuid: Uuid) -> Self {
        let (high, low) = uuid.as_u64_pair();
        Self(Id::Uuid(high, low))
    }

    /// Takes an id from the wire.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it is empty, longer than 255 bytes or not printable ASCII.
    pub fn parse(text: &str) -> Result<Self, Error> {
        if let Ok(bytes) = text.as_bytes().try_into()
            && let Some(id) = Self::parse_uuid(bytes)
        {
            return Ok(id);
        }
        if name::is_short_text(text) {
            Ok(Self(Id::Foreign(text.into())))
        } else {
            Err(name::invalid(
                "correlation id",
                text,
                "1 to 255 bytes of printable ASCII",
            ))
        }
    }

    /// Takes an id of ours from the wire, as [`uuid_text`](Self::uuid_text) gives it. `None` for any other spelling: as a number it would
    /// come back changed.
    #[must_use]
    pub fn parse_uuid(text: &[u8; 36]) -> Option<Self> {
        // All of it: that is faster than to stop at the first.
        let upper = text
            .iter()
            .fold(false, |upper, byte| upper | byte.is_ascii_uppercase());
        // Of this length only the spelling with hyphens is one.
        let uuid = Uuid::try_parse_ascii(text).ok()?;
        (!upper).then(|| Self::from_uuid(uuid))
    }

    /// An id of ours as it is on the wire, a UUID in lower case with hyphens; `None` for a foreign one.
    #[must_use]
    pub fn uuid_text(&self) -> Option<[u8; 36]> {
        match self.0 {
            Id::Uuid(high, low) => {
                let mut text = [0; 36];
                let uuid = Uuid::from_u64_pair(high, low);
                uuid.hyphenated().encode_lower(&mut text);
                Some(text)
            }
            Id::Foreign(_) => None,
        }
    }

    /// The number behind an id of ours; `None` for a foreign one.
    pub(crate) fn as_u128(&self) -> Option<u128> {
        match self.0 {
            Id::Uuid(high, low) => Some(u128::from(high) << 64 | u128::from(low)),
            Id::Foreign(_) => None,
        }
    }

    #[cfg(test)]
    pub(crate) fn from_u128(id: u128) -> Self {
        Self::from_uuid(Uuid::from_u128(id))
    }

    /// Calls `f` with the id as it is on the wire, without allocating.
    pub fn with_str<T>(&self, f: impl FnOnce(&str) -> T) -> T {
        match &self.0 {
            Id::Uuid(high, low) => {
                let uuid = Uuid::from_u64_pair(*high, *low);
                f(uuid.hyphenated().encode_lower(&mut Uuid::encode_buffer()))
            }
            Id::Foreign(text) => f(text),
        }
    }
}

impl fmt::Display for CorrelationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.with_str(|text| f.write_str(text))
    }
}

impl fmt::Debug for CorrelationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.with_str(|text| fmt::Debug::fmt(text, f))
    }
}

/// When the caller stops waiting: a point in time by its own wall clock, and the budget that was left when it sent.
///
/// Hosts' clocks differ, so nobody judges by `at`: what counts is the budget, less the time that the broker knows
/// the request to have waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    /// The sender's wall clock at the end, to the precision of the transport (RabbitMQ: seconds). Up to 100 ms early, since a client
    /// does not read its clock for each call: for people who read messages. Judge by the budget.
    pub at: SystemTime,
    /// What was left when it was sent.
    pub budget: Duration,
}

impl Deadline {
    /// The deadline that lies `budget` ahead.
    #[must_use]
    pub fn after(budget: Duration) -> Self {
        Self::of(SystemTime::now(), budget)
    }

    pub(crate) fn of(now: SystemTime, budget: Duration) -> Self {
        Self {
            at: now.checked_add(budget).unwrap_or(now),
            budget,
        }
    }
}

/// The most headers of one message.
const HEADERS_MAX: usize = 64;

/// The most bytes of all header names and values of one message.
const HEADERS_BYTES_MAX: usize = 8 * 1024;

/// User headers, in the order in which they were set.
///
/// Names are lower case, `[a-z0-9._-]{1,64}`; `antiphon-*`, `x-*`, `cc` and `bcc` are refused, because brokers or this
/// library give them a meaning. At most 64 headers and 8 KiB in all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers(Vec<(Box<str>, Box<str>)>);

impl Headers {
    /// No headers.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Sets a header, replacing its former value.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a name that is not allowed, a value with a control character, or too many headers.
    pub fn insert(&mut self, name: &str, value: &str) -> Result<(), Error> {
        if !is_header_name(name) {
            return Err(name::invalid(
                "header name",
                name,
                "[a-z0-9._-]{1,64} outside antiphon-*, x-*, cc and bcc",
            ));
        }
        if value.chars().any(char::is_control) {
            return Err(name::invalid(
                "header value",
                value,
                "text without control characters",
            ));
        }
        let others = || self.0.iter().filter(|(other, _)| &**other != name);
        let bytes: usize = others().map(|(name, value)| name.len() + value.len()).sum();
        if others().count() == HEADERS_MAX || bytes + name.len() + value.len() > HEADERS_BYTES_MAX {
            return Err(Error::not_executed(
                ErrorKind::Invalid,
                "more than 64 headers or 8 KiB of them",
            ));
        }
        self.0.retain(|(other, _)| &**other != name);
        self.0.push((name.into(), value.into()));
        Ok(())
    }

    /// The value of a header.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(other, _)| &**other == name)
            .map(|(_, value)| &**value)
    }

    /// All headers.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (&**name, &**value))
    }

    /// True if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn is_header_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
        && !name.starts_with("antiphon-")
        && !name.starts_with("x-")
        && name != "cc"
        && name != "bcc"
}

/// A request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Ties the reply to it.
    pub id: CorrelationId,
    /// Where the reply goes; none for a one-way request.
    pub reply_to: Option<ReplyAddress>,
    /// When its caller stops waiting; none only from plain peers that set no deadline.
    pub deadline: Option<Deadline>,
    /// The method within the service; none for a service that has only one.
    pub method: Option<Method>,
    /// User headers.
    pub headers: Headers,
    /// What the body is; none from plain peers means: whatever the handler expects.
    pub content_type: Option<ContentType>,
    /// What its caller wants to hear besides the reply.
    pub signals: Signals,
    /// The body.
    pub body: Bytes,
}

impl Request {
    /// A request with a random id, and all that is optional left out.
    #[must_use]
    pub fn new(deadline: Deadline, body: impl Into<Bytes>) -> Self {
        Self {
            id: CorrelationId::random(),
            reply_to: None,
            deadline: Some(deadline),
            method: None,
            headers: Headers::new(),
            content_type: None,
            signals: Signals::Running,
            body: body.into(),
        }
    }
}

/// A reply.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The id of the request.
    pub id: CorrelationId,
    /// How it ended.
    pub outcome: Outcome,
    /// User headers.
    pub headers: Headers,
    /// What the body is.
    pub content_type: Option<ContentType>,
    /// Who replies, to a request that went to every server of a service.
    pub node: Option<Node>,
    /// The value, or that of a progress; for a fault it is empty, since the fault itself is in the outcome.
    pub body: Bytes,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Outcome {
    /// The body is the answer.
    Value,
    /// It failed: by a handler's own fault (executed `Yes`), or refused by the server.
    Fault {
        /// The error.
        fault: Fault,
        /// What the server knows of this request's execution.
        executed: Executed,
    },
    /// It has not: the server has something to say before its reply.
    Signal(Signal),
}

impl Reply {
    /// The answer to the request `id`.
    #[must_use]
    pub fn value(id: CorrelationId, body: impl Into<Bytes>) -> Self {
        Self {
            id,
            outcome: Outcome::Value,
            headers: Headers::new(),
            content_type: None,
            node: None,
            body: body.into(),
        }
    }

    /// The failure of the request `id`.
    #[must_use]
    pub fn fault(id: CorrelationId, fault: Fault, executed: Executed) -> Self {
        Self::bare(id, Outcome::Fault { fault, executed })
    }

    /// Something about the request `id` before its reply.
    #[must_use]
    pub fn signal(id: CorrelationId, signal: Signal) -> Self {
        Self::bare(id, Outcome::Signal(signal))
    }

    fn bare(id: CorrelationId, outcome: Outcome) -> Self {
        Self {
            id,
            outcome,
            headers: Headers::new(),
            content_type: None,
            node: None,
            body: Bytes::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_id_is_echoed_unchanged() {
        let upper = "F47AC10B-58CC-4372-A567-0E02B2C3D479";
        for text in [
            "1",
            upper,
            "urn:uuid:f47ac10b-58cc-4372-a567-0e02b2c3d479",
            &"x".repeat(255),
        ] {
            let id = CorrelationId::parse(text).unwrap();
            assert_eq!(id.to_string(), text);
            assert_eq!(id.as_u128(), None);
        }
        assert!(CorrelationId::parse("1").unwrap().uuid_text().is_none());
        let lower = upper.to_lowercase();
        let id = CorrelationId::parse(&lower).unwrap();
        assert_eq!(id.to_string(), lower);
        assert_eq!(id, CorrelationId::from_u128(id.as_u128().unwrap()));
        assert!(CorrelationId::parse("").is_err());
        assert!(CorrelationId::parse(&"x".repeat(256)).is_err());
    }

    /// The library of UUIDs is the judge.
    #[test]
    fn an_id_of_ours_is_a_uuid_in_lower_case_with_hyphens() {
        let digits = (0..16).map(|digit: u128| digit << (4 * digit) | digit << (124 - 4 * digit));
        let random = (0..1000).map(|_| Uuid::new_v4().as_u128());
        for number in digits.chain([0, u128::MAX]).chain(random) {
            let uuid = Uuid::from_u128(number);
            let id = CorrelationId::from_u128(number);
            let text = id.uuid_text().unwrap();
            assert_eq!(text, *uuid.hyphenated().to_string().as_bytes());
            assert_eq!(CorrelationId::parse_uuid(&text), Some(id));
            // Any other byte at any place is another id, or none of ours.
            let place = (number % 36) as usize;
            for byte in 0..=u8::MAX {
                let mut other = text;
                other[place] = byte;
                let parsed = CorrelationId::parse_uuid(&other);
                let expected = str::from_utf8(&other)
                    .ok()
                    .and_then(|text| Uuid::try_parse(text).ok())
                    .filter(|uuid| uuid.hyphenated().to_string().as_bytes() == other);
                assert_eq!(
                    parsed.and_then(|id| id.as_u128()),
                    expected.map(|uuid| uuid.as_u128())
                );
            }
        }
    }

    #[test]
    fn reserved_and_malformed_headers_are_refused() {
        let mut headers = Headers::new();
        for bad in [
            "",
            "Upper",
            "a b",
            "antiphon-version",
            "x-match",
            "cc",
            "bcc",
            &"n".repeat(65),
        ] {
            assert_eq!(
                headers.insert(bad, "v").unwrap_err().kind(),
                ErrorKind::Invalid,
                "{bad:?}"
            );
        }
        assert!(headers.insert("ok", "a\nb").is_err());
        headers.insert("trace.id", "1").unwrap();
        headers.insert("trace.id", "2").unwrap();
        assert_eq!(headers.iter().collect::<Vec<_>>(), [("trace.id", "2")]);
        assert!(headers.insert("big", &"v".repeat(8200)).is_err());
    }
}
