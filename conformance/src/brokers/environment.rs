//! What the environment says about brokers.

use std::env;

use super::BrokerKind;

/// Where a broker may come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// It runs already.
    Url(String),
    /// A container of this image.
    Container(String),
    /// A private process.
    Process,
}

/// True if `ANTIPHON_REQUIRE_BROKERS` is `1`: a test that finds no broker must fail. (Valkey is required only if
/// `ANTIPHON_VALKEY_URL` or `ANTIPHON_VALKEY_IMAGE` is set as well.)
#[must_use]
pub fn required() -> bool {
    env::var("ANTIPHON_REQUIRE_BROKERS").is_ok_and(|value| value == "1")
}

/// True if a test of this kind of broker must fail where there is none. Few machines have Valkey, which to a client is
/// Redis: it is required only where it is named.
pub(super) fn is_required(kind: BrokerKind) -> bool {
    let names = names(kind);
    let named = || {
        [names.url, names.image]
            .iter()
            .any(|name| env::var_os(name).is_some())
    };
    required() && (kind != BrokerKind::Valkey || named())
}

/// Where to look for a broker, in this order.
pub(super) fn sources(kind: BrokerKind) -> Result<Vec<Source>, String> {
    choose(kind, |name| {
        env::var(name).ok().filter(|value| !value.is_empty())
    })
}

fn choose(
    kind: BrokerKind,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Vec<Source>, String> {
    let names = names(kind);
    let url = variable(names.url).map(Source::Url);
    let container =
        Source::Container(variable(names.image).unwrap_or_else(|| names.default_image.to_owned()));
    match variable("ANTIPHON_BROKERS").as_deref() {
        None => Ok(url
            .into_iter()
            .chain([container, Source::Process])
            .collect()),
        Some("none") => Ok(Vec::new()),
        Some("url") => url
            .map(|url| vec![url])
            .ok_or_else(|| format!("ANTIPHON_BROKERS=url, but no {}", names.url)),
        Some("containers") => Ok(vec![container]),
        Some("processes") => Ok(vec![Source::Process]),
        Some(other) => Err(format!(
            "ANTIPHON_BROKERS={other}: it is url, containers, processes or none"
        )),
    }
}

struct Names {
    url: &'static str,
    image: &'static str,
    default_image: &'static str,
}

fn names(kind: BrokerKind) -> Names {
    match kind {
        BrokerKind::Redis => Names {
            url: "ANTIPHON_REDIS_URL",
            image: "ANTIPHON_REDIS_IMAGE",
            default_image: "redis:8",
        },
        BrokerKind::Valkey => Names {
            url: "ANTIPHON_VALKEY_URL",
            image: "ANTIPHON_VALKEY_IMAGE",
            default_image: "valkey/valkey:8",
        },
        BrokerKind::RabbitMq => Names {
            url: "ANTIPHON_AMQP_URL",
            image: "ANTIPHON_RABBITMQ_IMAGE",
            default_image: "rabbitmq:4",
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(kind: BrokerKind, variables: &[(&str, &str)]) -> Result<Vec<Source>, String> {
        choose(kind, |name| {
            variables
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_order_is_url_container_process() {
        let url = Source::Url("redis://somewhere".to_owned());
        let official = Source::Container("redis:8".to_owned());
        let own = Source::Container("mine:1".to_owned());
        let variables = [
            ("ANTIPHON_REDIS_URL", "redis://somewhere"),
            ("ANTIPHON_REDIS_IMAGE", "mine:1"),
        ];
        assert_eq!(
            chosen(BrokerKind::Redis, &[]).unwrap(),
            [official, Source::Process]
        );
        assert_eq!(
            chosen(BrokerKind::Redis, &variables).unwrap(),
            [url, own, Source::Process]
        );
        let rabbitmq = Source::Container("rabbitmq:4".to_owned());
        assert_eq!(
            chosen(BrokerKind::RabbitMq, &variables).unwrap(),
            [rabbitmq, Source::Process]
        );
    }

    #[test]
    fn the_choice_can_be_restricted() {
        let only = |choice| {
            chosen(
                BrokerKind::RabbitMq,
                &[
                    ("ANTIPHON_BROKERS", choice),
                    ("ANTIPHON_AMQP_URL", "amqp://somewhere"),
                ],
            )
        };
        assert_eq!(only("none").unwrap(), []);
        assert_eq!(
            only("url").unwrap(),
            [Source::Url("amqp://somewhere".to_owned())]
        );
        assert_eq!(
            only("containers").unwrap(),
            [Source::Container("rabbitmq:4".to_owned())]
        );
        assert_eq!(only("processes").unwrap(), [Source::Process]);
        assert!(only("proceses").unwrap_err().contains("proceses"));
        assert!(
            chosen(BrokerKind::Redis, &[("ANTIPHON_BROKERS", "url")])
                .unwrap_err()
                .contains("ANTIPHON_REDIS_URL")
        );
    }
}
