//! The head of a frame: its line of JSON, as it is read and as it is written.

use std::borrow::Cow;
use std::fmt::{self, Write as _};

use antiphon_core::{ContentType, CorrelationId, Fault, Headers};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::scan::Flat;

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

impl<'a> RequestHead<'a> {
    pub(crate) fn of(flat: Flat<'a>) -> Option<Self> {
        Some(Self {
            v: flat.version.map(u32::try_from).transpose().ok()?,
            id: flat.id?.into(),
            to: flat.to.map(Cow::from),
            exp: flat.exp,
            ttl: flat.ttl,
            of: None,
            m: flat.method.map(Cow::from),
            ct: flat.content_type.map(Cow::from),
            h: Pairs::default(),
            at: flat.apart.map(Cow::from),
        })
    }
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

impl<'a> ReplyHead<'a> {
    pub(crate) fn of(flat: Flat<'a>) -> Option<Self> {
        Some(Self {
            v: flat.version.map(u32::try_from).transpose().ok()?,
            id: flat.id?.into(),
            err: None,
            ran: None,
            sig: None,
            n: None,
            s: None,
            ct: flat.content_type.map(Cow::from),
            h: Pairs::default(),
            at: flat.apart.map(Cow::from),
        })
    }
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
        out.extend_from_slice(b"{\"v\":1,\"id\":");
        id.with_str(|id| write_text(out, id));
        Self(out)
    }

    /// Without the version, by which its writer says that it understands signals.
    pub(crate) fn of_plain_peer(id: &CorrelationId, out: &'a mut Vec<u8>) -> Self {
        out.extend_from_slice(b"{\"id\":");
        id.with_str(|id| write_text(out, id));
        Self(out)
    }

    pub(crate) fn text(&mut self, name: &str, value: &str) {
        self.name(name);
        write_text(self.0, value);
    }

    pub(crate) fn number(&mut self, name: &str, value: u64) {
        self.name(name);
        write_number(self.0, value);
    }

    pub(crate) fn raw(&mut self, name: &str, json: &[u8]) {
        self.name(name);
        self.0.extend_from_slice(json);
    }

    pub(crate) fn common(
        &mut self,
        content_type: Option<&ContentType>,
        headers: &Headers,
        apart: Option<&str>,
    ) {
        if let Some(content_type) = content_type {
            self.text("ct", content_type.as_str());
        }
        if !headers.is_empty() {
            self.name("h");
            for (index, (name, value)) in headers.iter().enumerate() {
                self.0.push(if index == 0 { b'{' } else { b',' });
                write_text(self.0, name);
                self.0.push(b':');
                write_text(self.0, value);
            }
            self.0.push(b'}');
        }
        if let Some(id) = apart {
            self.text("at", id);
        }
    }

    pub(crate) fn end(self, body: &[u8]) {
        self.0.extend_from_slice(b"}\n");
        self.0.extend_from_slice(body);
    }

    fn name(&mut self, name: &str) {
        self.0.extend_from_slice(b",\"");
        self.0.extend_from_slice(name.as_bytes());
        self.0.extend_from_slice(b"\":");
    }
}

/// Writes the digits of a number, without the machinery of `fmt`.
fn write_number(out: &mut Vec<u8>, mut value: u64) {
    let start = out.len();
    loop {
        // A digit always fits.
        out.push(b'0' + (value % 10) as u8);
        value /= 10;
        if value == 0 {
            break;
        }
    }
    out[start..].reverse();
}

/// Writes a JSON string.
pub(crate) fn write_text(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    if text
        .bytes()
        .all(|byte| byte >= b' ' && byte != b'"' && byte != b'\\')
    {
        out.extend_from_slice(text.as_bytes());
    } else {
        let mut escaped = String::with_capacity(text.len() + 8);
        for character in text.chars() {
            match character {
                '"' | '\\' => escaped.extend(['\\', character]),
                // Writing to a string cannot fail.
                control if control < ' ' => drop(write!(escaped, "\\u{:04x}", u32::from(control))),
                plain => escaped.push(plain),
            }
        }
        out.extend_from_slice(escaped.as_bytes());
    }
    out.push(b'"');
}
