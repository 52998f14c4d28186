//! The names of keys. Every key of a service carries the hash tag `{service}`, every key of a client `{client}`.

use antiphon_core::{ReplyAddress, ServiceName};
use uuid::Uuid;

/// The longest client name in a reply address, in bytes.
const CLIENT_MAX: usize = 64;

/// The keys of a service.
#[derive(Debug)]
pub(crate) struct ServiceKeys {
    /// Requests that nobody has taken yet.
    pub(crate) queue: String,
    /// Work that came back, in pairs of attempt and frame.
    pub(crate) returned: String,
    /// "There may be work."
    pub(crate) bell: String,
    /// Every session and when its lease ends.
    pub(crate) sessions: String,
    /// The sessions that take work.
    pub(crate) live: String,
    /// The exclusive owner and its fencing number.
    pub(crate) owner: String,
    /// Dead letters.
    pub(crate) dead: String,
    /// The inboxes of its servers, and until when each is there.
    pub(crate) audience: String,
    prefix: String,
}

impl ServiceKeys {
    pub(crate) fn new(service: &ServiceName) -> Self {
        let prefix = format!("{{{service}}}:");
        let key = |suffix: &str| format!("{prefix}{suffix}");
        Self {
            queue: key("q"),
            returned: key("r"),
            bell: key("bell"),
            sessions: key("s"),
            live: key("l"),
            owner: key("x"),
            dead: key("dead"),
            audience: key("a"),
            prefix,
        }
    }

    /// What a session holds.
    pub(crate) fn held(&self, session: &str) -> String {
        format!("{}p:{session}", self.prefix)
    }

    /// The body of a request, if it has its own key.
    pub(crate) fn body(&self, id: &str) -> String {
        format!("{}b:{id}", self.prefix)
    }
}

/// The keys of an inbox. Its address is the key of its list.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct InboxKeys {
    list: ReplyAddress,
}

impl InboxKeys {
    /// An inbox with a random name.
    pub(crate) fn random() -> Option<Self> {
        Self::parse(&ReplyAddress::new(&format!("{{{}}}:i", random_id())).ok()?)
    }

    /// The inbox of a reply address; `None` if it is not of our grammar, `{[A-Za-z0-9_.-]{1,64}}:i`. No other key can
    /// be named by a reply address, whoever sends it.
    pub(crate) fn parse(address: &ReplyAddress) -> Option<Self> {
        let client = address.as_str().strip_prefix('{')?.strip_suffix("}:i")?;
        let valid = (1..=CLIENT_MAX).contains(&client.len())
            && client
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'));
        valid.then(|| Self {
            list: address.clone(),
        })
    }

    pub(crate) fn address(&self) -> &ReplyAddress {
        &self.list
    }

    pub(crate) fn list(&self) -> &str {
        self.list.as_str()
    }

    /// "There may be replies."
    pub(crate) fn bell(&self) -> String {
        format!("{}:w", self.list())
    }

    /// Which reader may acknowledge.
    pub(crate) fn epoch(&self) -> String {
        format!("{}:e", self.list())
    }

    /// The epoch, if there is one as long as the inbox lives: of a plain peer's nothing is known.
    pub(crate) fn sign_of_life(&self) -> Option<String> {
        let client = self.list().strip_prefix('{')?.strip_suffix("}:i")?;
        is_random_id(client).then(|| self.epoch())
    }

    /// The body of what arrives there, if it has its own key.
    pub(crate) fn body(&self, id: &str) -> String {
        format!("{}:b:{id}", self.list())
    }
}

/// 32 hexadecimal digits that nobody can guess.
pub(crate) fn random_id() -> String {
    Uuid::new_v4().simple().to_string()
}

/// True for what [`random_id`] could have made.
pub(crate) fn is_random_id(id: &str) -> bool {
    id.len() == 32
        && id
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_inboxes_are_reply_addresses() {
        let ours = InboxKeys::random().unwrap();
        assert_eq!(ours.sign_of_life(), Some(ours.epoch()));
        assert_eq!(InboxKeys::parse(ours.address()), Some(ours));
        for good in ["{a}:i", "{plain.client-7_x}:i"] {
            let plain = InboxKeys::parse(&ReplyAddress::new(good).unwrap()).unwrap();
            assert_eq!(plain.sign_of_life(), None, "{good}");
        }
        for bad in [
            "a",
            "{}:i",
            "{a}:q",
            "{a}:i:b:1",
            "{a}:dead",
            "{a b}:i",
            "{a}b}:i",
            "{{a}:i",
            "x{a}:i",
        ] {
            assert!(
                InboxKeys::parse(&ReplyAddress::new(bad).unwrap()).is_none(),
                "{bad}"
            );
        }
        let long = format!("{{{}}}:i", "x".repeat(65));
        assert!(InboxKeys::parse(&ReplyAddress::new(&long).unwrap()).is_none());
    }

    #[test]
    fn keys_of_a_service_share_its_tag() {
        let keys = ServiceKeys::new(&ServiceName::new("fib@node-7").unwrap());
        assert_eq!(keys.queue, "{fib@node-7}:q");
        assert_eq!(keys.held("ab"), "{fib@node-7}:p:ab");
        assert_eq!(keys.body("cd"), "{fib@node-7}:b:cd");
    }
}
