//! The names of keys. Every key of a service carries the hash tag `{service}`, every key of a client `{client}`.

use std::sync::atomic::{AtomicU64, Ordering};

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
    /// Every session.
    pub(crate) sessions: String,
    /// The sessions that take work.
    pub(crate) live: String,
    /// The sessions that hold work, or did a moment ago.
    pub(crate) holding: String,
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
            holding: key("h"),
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
    /// The inbox of one of our clients.
    pub(crate) fn new(client: &str) -> Option<Self> {
        Self::parse(&ReplyAddress::new(&format!("{{{client}}}:i")).ok()?)
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
        let (process, number) = client.split_once('.')?;
        let ours = is_random_id(process) && number.bytes().all(|byte| byte.is_ascii_digit());
        ours.then(|| self.epoch())
    }

    /// The body of what arrives there, if it has its own key.
    pub(crate) fn body(&self, id: &str) -> String {
        format!("{}:b:{id}", self.list())
    }
}

/// A process, or rather one transport of it, as the broker knows it. The names of its sessions and inboxes begin with its own.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    named: AtomicU64,
}

impl Default for Process {
    fn default() -> Self {
        Self {
            name: random_id(),
            named: AtomicU64::new(0),
        }
    }
}

impl Process {
    /// A name for something of its own, never used before.
    pub(crate) fn next_name(&self) -> String {
        format!(
            "{}.{}",
            self.name,
            self.named.fetch_add(1, Ordering::Relaxed)
        )
    }

    /// The key that is there while it lives.
    pub(crate) fn sign_of_life(&self) -> String {
        sign_of_life(&self.name)
    }

    /// The bell by which it wakes itself.
    pub(crate) fn bell(&self) -> String {
        format!("{{{}}}:w", self.name)
    }

    pub(crate) fn is_mine(&self, session: &str) -> bool {
        process_of(session) == self.name
    }
}

/// The process that a session belongs to.
pub(crate) fn process_of(session: &str) -> &str {
    session
        .split_once('.')
        .map_or(session, |(process, _)| process)
}

/// The key that is there while that process lives. The scripts that must find it by a session's name spell it the same way.
pub(crate) fn sign_of_life(process: &str) -> String {
    format!("{{{process}}}:alive")
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
        let process = Process::default();
        let ours = InboxKeys::new(&process.next_name()).unwrap();
        assert_eq!(ours.sign_of_life(), Some(ours.epoch()));
        assert_eq!(InboxKeys::parse(ours.address()), Some(ours));
        let foreign = format!("{{{}}}:i", random_id());
        for good in ["{a}:i", "{plain.client-7_x}:i", &foreign] {
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
    fn a_session_tells_its_process() {
        let process = Process::default();
        let (one, two) = (process.next_name(), process.next_name());
        assert_ne!(one, two);
        assert!(process.is_mine(&one) && process.is_mine(&two));
        assert!(!Process::default().is_mine(&one));
        assert_eq!(sign_of_life(process_of(&one)), process.sign_of_life());
        assert_eq!(process_of("foreign"), "foreign");
    }

    #[test]
    fn keys_of_a_service_share_its_tag() {
        let keys = ServiceKeys::new(&ServiceName::new("fib@node-7").unwrap());
        assert_eq!(keys.queue, "{fib@node-7}:q");
        assert_eq!(keys.held("ab"), "{fib@node-7}:p:ab");
        assert_eq!(keys.body("cd"), "{fib@node-7}:b:cd");
    }
}
