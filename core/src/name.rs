//! Validated names. Queue names, keys and headers are built from these types only, so nothing that a
//! broker would misread can reach it.

use std::fmt;
use std::sync::Arc;

use crate::error::{Error, ErrorKind};

/// The longest service, node or method name, in bytes.
const NAME_MAX: usize = 64;

/// The longest reply address and foreign correlation id, in bytes: the limit of an AMQP short string.
pub(crate) const SHORT_MAX: usize = 255;

/// The name of a service, `[A-Za-z0-9_.-]{1,64}`, or of one node of it, `fib@node-7`.
///
/// Cloning is cheap.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName {
    full: Arc<str>,
}

impl ServiceName {
    /// Parses a name.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it is not of the grammar.
    pub fn new(name: &str) -> Result<Self, Error> {
        let valid = match name.split_once('@') {
            Some((service, node)) => is_name(service) && is_name(node),
            None => is_name(name),
        };
        if valid {
            Ok(Self { full: name.into() })
        } else {
            Err(invalid(
                "service name",
                name,
                "[A-Za-z0-9_.-]{1,64}, optionally @node",
            ))
        }
    }

    /// The whole name, with the node if there is one.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.full
    }

    /// The part before `@`.
    #[must_use]
    pub fn service(&self) -> &str {
        self.full
            .split_once('@')
            .map_or(&*self.full, |(service, _)| service)
    }

    /// The part after `@`, for the queue of one node.
    #[must_use]
    pub fn node(&self) -> Option<&str> {
        self.full.split_once('@').map(|(_, node)| node)
    }

    /// The same service on one node, `fib@node-7`; of one node's queue already, that of the other node.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the node is not of the grammar.
    pub fn at(&self, node: impl IntoNode) -> Result<Self, Error> {
        let node = node.into_node()?;
        Ok(Self {
            full: format!("{}@{node}", self.service()).into(),
        })
    }
}

impl TryFrom<&str> for ServiceName {
    type Error = Error;

    fn try_from(name: &str) -> Result<Self, Error> {
        Self::new(name)
    }
}

impl TryFrom<String> for ServiceName {
    type Error = Error;

    fn try_from(name: String) -> Result<Self, Error> {
        Self::new(&name)
    }
}

impl TryFrom<&String> for ServiceName {
    type Error = Error;

    fn try_from(name: &String) -> Result<Self, Error> {
        Self::new(name)
    }
}

impl TryFrom<&Self> for ServiceName {
    type Error = Error;

    fn try_from(name: &Self) -> Result<Self, Error> {
        Ok(name.clone())
    }
}

impl From<std::convert::Infallible> for Error {
    fn from(never: std::convert::Infallible) -> Self {
        match never {}
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.full)
    }
}

impl fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.full, f)
    }
}

/// The name of a method within a service, `[A-Za-z0-9_.-]{1,64}`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Method(Arc<str>);

impl Method {
    /// Parses a method name.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it is not of the grammar.
    pub fn new(name: &str) -> Result<Self, Error> {
        if is_name(name) {
            Ok(Self(name.into()))
        } else {
            Err(invalid("method", name, "[A-Za-z0-9_.-]{1,64}"))
        }
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// The name of one server among those of a service, `[A-Za-z0-9_.-]{1,64}`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Node(Arc<str>);

impl Node {
    /// Parses a node's name.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it is not of the grammar.
    pub fn new(name: &str) -> Result<Self, Error> {
        if is_name(name) {
            Ok(Self(name.into()))
        } else {
            Err(invalid("node", name, "[A-Za-z0-9_.-]{1,64}"))
        }
    }

    /// The name of a server that was given none: nobody else's.
    #[must_use]
    pub(crate) fn random() -> Self {
        let id = uuid::Uuid::new_v4().simple().to_string();
        Self(format!("node-{}", &id[..12]).into())
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// What may be given as a node: a [`Node`], or text that is parsed before any I/O.
pub trait IntoNode {
    /// The node, or why it is none.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it is not of the grammar.
    fn into_node(self) -> Result<Node, Error>;
}

impl IntoNode for Node {
    fn into_node(self) -> Result<Node, Error> {
        Ok(self)
    }
}

impl IntoNode for &Node {
    fn into_node(self) -> Result<Node, Error> {
        Ok(self.clone())
    }
}

impl IntoNode for &str {
    fn into_node(self) -> Result<Node, Error> {
        Node::new(self)
    }
}

impl IntoNode for &String {
    fn into_node(self) -> Result<Node, Error> {
        Node::new(self)
    }
}

impl IntoNode for String {
    fn into_node(self) -> Result<Node, Error> {
        Node::new(&self)
    }
}

/// Where a reply goes: 1 to 255 bytes of printable ASCII. A transport accepts only the addresses that it
/// could have made, or that a plain peer of its broker could have.
///
/// It is a capability: whoever knows it can send replies there. `Debug` therefore shows its first eight bytes only.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ReplyAddress(Arc<str>);

impl ReplyAddress {
    /// Takes an address.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it is empty, longer than 255 bytes or not printable ASCII.
    pub fn new(address: &str) -> Result<Self, Error> {
        if is_short_text(address) {
            Ok(Self(address.into()))
        } else {
            Err(invalid(
                "reply address",
                address,
                "1 to 255 bytes of printable ASCII",
            ))
        }
    }

    /// The address as the broker knows it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ReplyAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReplyAddress({}..)", &self.0[..self.0.len().min(8)])
    }
}

/// The media type of a body, 1 to 255 bytes of printable ASCII, such as `application/json`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ContentType(std::borrow::Cow<'static, str>);

impl ContentType {
    /// `application/json`.
    pub const JSON: Self = Self(std::borrow::Cow::Borrowed("application/json"));

    /// Takes a media type.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it is empty, longer than 255 bytes or not printable ASCII.
    pub fn new(media_type: &str) -> Result<Self, Error> {
        if media_type == Self::JSON.as_str() {
            return Ok(Self::JSON);
        }
        if is_short_text(media_type) {
            Ok(Self(media_type.to_owned().into()))
        } else {
            Err(invalid(
                "content type",
                media_type,
                "1 to 255 bytes of printable ASCII",
            ))
        }
    }

    /// The media type.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ContentType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

fn is_name(name: &str) -> bool {
    (1..=NAME_MAX).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

pub(crate) fn is_short_text(text: &str) -> bool {
    (1..=SHORT_MAX).contains(&text.len()) && text.bytes().all(|byte| (b' '..=b'~').contains(&byte))
}

pub(crate) fn invalid(what: &str, value: &str, grammar: &str) -> Error {
    let shown: String = value.chars().take(80).collect();
    Error::not_executed(
        ErrorKind::Invalid,
        format!("{what} {shown:?} is not {grammar}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_names() {
        for good in ["fib", "fib@node-7", "a.b_c-D9", &"x".repeat(64)] {
            assert_eq!(ServiceName::new(good).unwrap().as_str(), good);
        }
        for bad in [
            "",
            "@",
            "fib@",
            "@node",
            "a@b@c",
            "a b",
            "{a}",
            "a*",
            "é",
            "a\0",
            &"x".repeat(65),
        ] {
            assert_eq!(
                ServiceName::new(bad).unwrap_err().kind(),
                ErrorKind::Invalid,
                "{bad:?}"
            );
        }
        let node = ServiceName::new("fib@node-7").unwrap();
        assert_eq!((node.service(), node.node()), ("fib", Some("node-7")));
    }

    #[test]
    fn debug_of_a_reply_address_hides_it() {
        let address = ReplyAddress::new("0123456789abcdef").unwrap();
        assert_eq!(format!("{address:?}"), "ReplyAddress(01234567..)");
    }
}
