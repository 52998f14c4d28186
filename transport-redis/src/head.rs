//! The head of a frame: its line of JSON, as it is read and as it is written.

use std::borrow::Cow;
use std::fmt;

use antiphon_core::{ContentType, CorrelationId, Fault, Headers};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

#[derive(Deserialize)]
pub(crate) struct RequestHead<'a> {
    #[serde(default)]
    pub(crate) v: Option<u32>,
    #[serde(borrow)]
    pub(crate) id: Cow<'a, str>,
    #[serde(borrow, default)]
    pub(crate) to: Option<Cow<'a, str>>,
    #[serde(default)]
    pub(crate) exp: Option<u64>,
    #[serde(default)]
    pub(crate) ttl: Option<u64>,
    #[serde(default)]
    pub(crate) of: Option<u64>,
    #[serde(borrow, default)]
    pub(crate) m: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    pub(crate) ct: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    pub(crate) h: Pairs<'a>,
    #[serde(borrow, default)]
    pub(crate) at: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
pub(crate) struct ReplyHead<'a> {
    #[serde(default)]
    pub(crate) v: Option<u32>,
    #[serde(borrow)]
    pub(crate) id: Cow<'a, str>,
    #[serde(default)]
    pub(crate) err: Option<Fault>,
    #[serde(borrow, default)]
    pub(crate) ran: Option<Cow<'a, str>>,
    #[serde(default)]
    pub(crate) sig: Option<serde_json::Value>,
    #[serde(borrow, default)]
    pub(crate) n: Option<Cow<'a, str>>,
    /// Of a request only.
    #[serde(borrow, default)]
    pub(crate) s: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    pub(crate) ct: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    pub(crate) h: Pairs<'a>,
    #[serde(borrow, default)]
    pub(crate) at: Option<Cow<'a, str>>,
}

/// A JSON object of texts, in its order.
#[derive(Default)]
pub(crate) struct Pairs<'a>(pub(crate) Vec<(Cow<'a, str>, Cow<'a, str>)>);

/// A text that is borrowed where it can be: `Cow` alone is always copied inside other types.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Pairs<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairsVisitor;

        impl<'de> Visitor<'de> for PairsVisitor {
            type Value = Pairs<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of texts")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some((Text(name), Text(value))) = map.next_entry()? {
                    pairs.push((name, value));
                }
                Ok(Pairs(pairs))
            }
        }

        deserializer.deserialize_map(PairsVisitor)
    }
}

/// The line of JSON, as it is written.
pub(crate) struct Line<'a>(&'a mut Vec<u8>);

impl<'a> Line<'a> {
    pub(crate) fn new(id: &CorrelationId, out: &'a mut Vec<u8>) -> Self {
        Self::begin(br#"{"v":1,"id":"#, id, out)
    }

    /// Without the version, by which its writer says that it understands signals.
    pub(crate) fn of_plain_peer(id: &CorrelationId, out: &'a mut Vec<u8>) -> Self {
        Self::begin(br#"{"id":"#, id, out)
    }

    fn begin<const N: usize>(start: &[u8; N], id: &CorrelationId, out: &'a mut Vec<u8>) -> Self {
        out.extend_from_slice(start);
        match id.uuid_text() {
            Some(uuid) => {
                out.push(b'"');
                out.extend_from_slice(&uuid);
                out.push(b'"');
            }
            None => id.with_str(|id| write_text(out, id)),
        }
        Self(out)
    }

    /// A member whose name comes with its comma and colon.
    pub(crate) fn text<const N: usize>(&mut self, name: &[u8; N], value: &str) {
        self.0.extend_from_slice(name);
        write_text(self.0, value);
    }

    /// As [`text`](Self::text), of a grammar in which nothing must be escaped; its first quote comes with its name.
    pub(crate) fn plain<const N: usize>(&mut self, name: &[u8; N], value: &str) {
        self.0.extend_from_slice(name);
        self.0.extend_from_slice(value.as_bytes());
        self.0.push(b'"');
    }

    pub(crate) fn number<const N: usize>(&mut self, name: &[u8; N], value: u64) {
        self.0.extend_from_slice(name);
        let mut digits = itoa::Buffer::new();
        self.0.extend_from_slice(digits.format(value).as_bytes());
    }

    pub(crate) fn raw<const N: usize>(&mut self, name: &[u8; N], json: &[u8]) {
        self.0.extend_from_slice(name);
        self.0.extend_from_slice(json);
    }

    pub(crate) fn common(
        &mut self,
        content_type: Option<&ContentType>,
        headers: &Headers,
        apart: Option<&str>,
    ) {
        match content_type {
            Some(json) if *json == ContentType::JSON => {
                self.0.extend_from_slice(br#","ct":"application/json""#);
            }
            Some(other) => self.text(br#","ct":"#, other.as_str()),
            None => {}
        }
        if !headers.is_empty() {
            self.0.extend_from_slice(br#","h":"#);
            for (index, (name, value)) in headers.iter().enumerate() {
                self.0.push(if index == 0 { b'{' } else { b',' });
                write_text(self.0, name);
                self.0.push(b':');
                write_text(self.0, value);
            }
            self.0.push(b'}');
        }
        if let Some(id) = apart {
            self.plain(br#","at":""#, id);
        }
    }

    pub(crate) fn end(self, body: &[u8]) {
        self.0.extend_from_slice(b"}\n");
        self.0.extend_from_slice(body);
    }
}

/// Writes a JSON string.
pub(crate) fn write_text(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    let is_plain = |byte: u8| byte >= b' ' && byte != b'"' && byte != b'\\';
    // All of it: that is faster than to stop at the first.
    if text
        .bytes()
        .fold(true, |plain, byte| plain & is_plain(byte))
    {
        out.extend_from_slice(text.as_bytes());
    } else {
        for byte in text.bytes() {
            match byte {
                b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
                control if control < b' ' => {
                    out.extend_from_slice(format!("\\u{control:04x}").as_bytes());
                }
                plain => out.push(plain),
            }
        }
    }
    out.push(b'"');
}
