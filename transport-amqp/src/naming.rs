//! What this transport calls things on the broker.

use antiphon_core::{Error, ErrorKind, ServiceName};
use lapin::types::ShortString;
use uuid::Uuid;

/// Suffixes of the queues that stand beside a service's own.
const RETRY: &str = ".retry";
const DEAD: &str = ".dead";
const OWNER: &str = ".owner";

/// The queues of one service.
#[derive(Clone, Debug)]
pub(crate) struct QueueNames {
    /// Requests.
    pub(crate) main: ShortString,
    /// Requests that were in the hands of a server that died, run one at a time.
    pub(crate) retry: ShortString,
    /// Requests that nobody will run any more.
    pub(crate) dead: ShortString,
    /// Held exclusively by the connection of an exclusive subscriber.
    pub(crate) owner: ShortString,
    /// True for the queue of one node, which expires when it is not used.
    pub(crate) is_node: bool,
}

impl QueueNames {
    /// # Errors
    /// `Invalid` for a name that is another service's queue.
    pub(crate) fn new(service: &ServiceName) -> Result<Self, Error> {
        let (main, name) = (main_queue(service)?, service.as_str());
        // A service name has at most 129 bytes, so that no suffix can reach the 255 of a short string.
        Ok(Self {
            main,
            retry: format!("{name}{RETRY}").into(),
            dead: format!("{name}{DEAD}").into(),
            owner: format!("{name}{OWNER}").into(),
            is_node: service.node().is_some(),
        })
    }
}

/// The queue of a service's requests.
///
/// # Errors
/// `Invalid` for a name that is another service's queue.
pub(crate) fn main_queue(service: &ServiceName) -> Result<ShortString, Error> {
    let name = service.as_str();
    if [RETRY, DEAD, OWNER]
        .iter()
        .any(|suffix| name.ends_with(suffix))
    {
        let message = format!("{name:?}: on RabbitMQ names in .retry, .dead and .owner are taken");
        return Err(Error::not_executed(ErrorKind::Invalid, message));
    }
    Ok(name.into())
}

/// A new inbox. Nobody can guess it, and it is not of the `amq.` names, which only the broker may give.
pub(crate) fn random_inbox() -> String {
    format!("antiphon.inbox.{}", Uuid::new_v4().simple())
}

/// The tag of our consumers, of which each has a channel of its own. What the broker would give comes with every delivery, and is longer.
pub(crate) const CONSUMER: &str = "antiphon";

/// The exchange through which every server of a service is reached. Every broker has it.
pub(crate) const TO_ALL: &str = "amq.direct";

/// By what every server of a service is reached through it.
const ALL: &str = "antiphon.all.";

/// The routing key for every server of a service.
pub(crate) fn all_of(service: &ServiceName) -> ShortString {
    format!("{ALL}{service}").into()
}

/// The reverse of [`all_of`]: the service's name, if it is one; none for another key.
pub(crate) fn service_of_all(routing_key: &str) -> Option<&str> {
    routing_key.strip_prefix(ALL)
}

/// A queue by which one exclusive subscription is known.
pub(crate) fn random_marker() -> ShortString {
    format!("antiphon.owner.{}", Uuid::new_v4().simple()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_service_fits() {
        let name = format!("{}@{}", "s".repeat(64), "n".repeat(64));
        let names = QueueNames::new(&ServiceName::new(&name).unwrap()).unwrap();
        assert_eq!(names.retry.as_str(), format!("{name}.retry"));
        assert!(names.is_node);
    }

    #[test]
    fn a_routing_key_names_its_service() {
        let service = ServiceName::new("fib@a").unwrap();
        assert_eq!(all_of(&service).as_str(), "antiphon.all.fib@a");
        assert_eq!(service_of_all(all_of(&service).as_str()), Some("fib@a"));
        assert_eq!(service_of_all("fib@a"), None);
    }

    #[test]
    fn the_queue_of_another_service_is_no_service() {
        for taken in ["fib.retry", "fib.dead", "fib.owner", "fib@a.dead"] {
            let error = QueueNames::new(&ServiceName::new(taken).unwrap()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{taken}");
        }
    }
}
