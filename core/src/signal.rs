//! What a server says about a request before its reply.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::envelope::CorrelationId;
use crate::name::{Node, ReplyAddress};

/// What a request's caller wants to hear besides the reply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Signals {
    /// Nothing: it is a plain peer of the broker, and would take a signal for its reply.
    #[default]
    None,
    /// That it is running, and how far it is.
    Running,
    /// The same, and before a handler is started an [`Offer`](Signal::Offer), which it accepts or leaves.
    Offer,
}

/// What a server says about a request before its reply. It travels as a message to the caller's inbox.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Signal {
    /// A handler works on it.
    Running {
        /// Where.
        node: Node,
        /// The next one follows within this time, while the server lives and the handler runs.
        every: Duration,
    },
    /// How far the handler is: the body of the message.
    Progress {
        /// Where.
        node: Node,
    },
    /// A server has it, and starts its handler when it is told to: by a value, to the address, under the id. A fault tells it to
    /// leave it: nobody waits for it any more. A server makes it to who wants that, and when it may not have been told
    /// that the request was given up; then silence is an assent.
    Offer {
        /// Where.
        node: Node,
        /// The server's inbox.
        to: ReplyAddress,
        /// The id under which the server waits.
        id: CorrelationId,
    },
}

impl Signal {
    /// The signal as one line of JSON, for transports.
    #[must_use]
    pub fn to_text(&self) -> String {
        let (signal, node) = match self {
            Self::Running { node, .. } => ("running", node),
            Self::Progress { node } => ("progress", node),
            Self::Offer { node, .. } => ("offer", node),
        };
        let mut wire = Wire {
            signal: signal.to_owned(),
            node: node.as_str().to_owned(),
            ..Wire::default()
        };
        match self {
            Self::Running { every, .. } => {
                wire.every_ms = Some(u64::try_from(every.as_millis()).unwrap_or(u64::MAX));
            }
            Self::Progress { .. } => {}
            Self::Offer { to, id, .. } => {
                wire.to = Some(to.as_str().to_owned());
                wire.id = Some(id.to_string());
            }
        }
        serde_json::to_string(&wire).unwrap_or_default()
    }

    /// The reverse of [`to_text`](Self::to_text); none for what is not one, or one of a later version.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let wire: Wire = serde_json::from_str(text).ok()?;
        let node = Node::new(&wire.node).ok()?;
        match &*wire.signal {
            "running" => Some(Self::Running {
                node,
                every: Duration::from_millis(wire.every_ms?),
            }),
            "progress" => Some(Self::Progress { node }),
            "offer" => Some(Self::Offer {
                node,
                to: ReplyAddress::new(&wire.to?).ok()?,
                id: CorrelationId::parse(&wire.id?).ok()?,
            }),
            _ => None,
        }
    }
}

#[derive(Default, Serialize, Deserialize)]
struct Wire {
    signal: String,
    node: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    every_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    to: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_texts() {
        let node = Node::new("n1").unwrap();
        let to = ReplyAddress::new("{c1}:i").unwrap();
        let id = CorrelationId::parse("7").unwrap();
        let every = Duration::from_secs(5);
        for (signal, text) in [
            (
                Signal::Running {
                    node: node.clone(),
                    every,
                },
                r#"{"signal":"running","node":"n1","every_ms":5000}"#,
            ),
            (
                Signal::Progress { node: node.clone() },
                r#"{"signal":"progress","node":"n1"}"#,
            ),
            (
                Signal::Offer { node, to, id },
                r#"{"signal":"offer","node":"n1","to":"{c1}:i","id":"7"}"#,
            ),
        ] {
            assert_eq!(signal.to_text(), text);
            assert_eq!(Signal::parse(text), Some(signal));
        }
        assert_eq!(Signal::parse(r#"{"signal":"later","node":"n1"}"#), None);
        assert_eq!(Signal::parse("30"), None);
    }
}
