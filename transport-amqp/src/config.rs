//! How to connect, and what to declare.

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use antiphon_core::{Error, ErrorKind};
use lapin::uri::{AMQPScheme, AMQPUri};

/// What the broker offers, and other clients take.
const FRAME_MAX: u32 = 128 * 1024;

/// The parameters of the URL that are ours.
const QUEUE_TYPE: &str = "queue_type";
const DURABLE: &str = "durable";
const CA_FILE: &str = "ca_file";
const CERTIFICATE_FILE: &str = "certificate_file";
const KEY_FILE: &str = "key_file";
const OWN: [&str; 5] = [QUEUE_TYPE, DURABLE, CA_FILE, CERTIFICATE_FILE, KEY_FILE];

/// How to reach a RabbitMQ broker. `Debug` shows no password.
#[derive(Clone)]
#[non_exhaustive]
pub struct AmqpConfig {
    /// The longest time that [`connect`](crate::AmqpTransport::connect) takes. Default: 10 s.
    pub connect_timeout: Duration,
    /// The heartbeat that is asked of the broker, in whole seconds. A silent peer is given up after two of them.
    /// Default: 10 s. Shorter: false alarms on a busy machine. Longer: a cut cable is noticed later.
    pub heartbeat: Duration,
    /// What a service queue is declared as, if there is none. Default: [`QueueType::Quorum`].
    pub queue_type: QueueType,
    /// Whether service queues that are declared here, and requests that are sent, survive a restart of the broker. Default: true.
    ///
    /// Without it a request costs the broker less, and is silently gone if the broker goes down: its caller learns that at its
    /// deadline. It needs [`QueueType::Classic`]. A queue that is there is used as it is, and dead letters are kept in any case.
    /// Brokers may be told to refuse such queues (`deprecated_features.permit.transient_nonexcl_queues`).
    pub durable: bool,
    /// After what time without a consumer the broker removes the queue of one node (`SERVICE@NODE`).
    /// Default: 30 min. At least 1 ms.
    pub node_queue_expires: Duration,
    /// The largest AMQP frame, in bytes. Larger bodies take several frames, but all headers of a message must fit into one: the
    /// broker splits them for nobody, so a message with larger ones than this, from any peer, would end the connection each time
    /// that it is delivered. The connection that consumes takes about 64 times as much memory.
    /// Default: 128 KiB, as the broker and other clients have it; at least 4 KiB.
    pub frame_max: u32,
    /// A PEM file with the certificates of the authorities to trust, in place of the platform's own (which `SSL_CERT_FILE` can
    /// name, on Linux and the BSDs). It is read each time that a connection is made. Only over TLS, as the next two. Default: none.
    pub ca_file: Option<PathBuf>,
    /// A PEM file with the certificate that we show to a server which asks for one, and those between it and its authority.
    /// Only with [`key_file`](Self::key_file). Default: none.
    pub certificate_file: Option<PathBuf>,
    /// A PEM file with the key of [`certificate_file`](Self::certificate_file), not encrypted. Default: none.
    pub key_file: Option<PathBuf>,
    uri: AMQPUri,
}

/// The kind of a service queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum QueueType {
    /// Replicated; what it confirmed survives the loss of a minority of its nodes.
    #[default]
    Quorum,
    /// On one node, twice as fast. What it confirmed survives a restart of the node.
    Classic,
}

impl QueueType {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Quorum => "quorum",
            Self::Classic => "classic",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        [Self::Quorum, Self::Classic]
            .into_iter()
            .find(|queue_type| queue_type.as_str() == name)
    }
}

impl AmqpConfig {
    /// Takes `amqp://USER:PASSWORD@HOST:PORT/VHOST`, or `amqps://` with the feature `rustls`. User and password are `guest`,
    /// the port is 5672 (5671) and the virtual host is `/` unless given; a slash in its name is written `%2f`. The parameters
    /// `heartbeat` (seconds), `frame_max` (bytes), `queue_type` (`quorum` or `classic`), `durable` (`true` or `false`), `ca_file`,
    /// `certificate_file` and `key_file` set the fields of these names: `amqp://h/?queue_type=classic&durable=false`. In a value,
    /// `+` is a space, and `%2B` a plus.
    ///
    /// # Errors
    /// `Invalid` if it is no such URL, a parameter of ours has no such value or comes twice, or quorum queues are not to be durable; `Unsupported` for `amqps://` without the feature.
    pub fn from_url(url: &str) -> Result<Self, Error> {
        let (url, own) = split_own(url);
        let (mut queue_type, mut durable) = (QueueType::default(), true);
        let (mut ca_file, mut certificate_file, mut key_file) = (None, None, None);
        for (index, (name, value)) in own.iter().enumerate() {
            if own.iter().take(index).any(|(earlier, _)| earlier == name) {
                return Err(invalid(format!("{name} is given twice")));
            }
            match name.as_ref() {
                QUEUE_TYPE => {
                    queue_type = QueueType::parse(value)
                        .ok_or_else(|| invalid("queue_type is neither quorum nor classic"))?;
                }
                DURABLE => {
                    durable = value
                        .parse()
                        .map_err(|_| invalid("durable is neither true nor false"))?;
                }
                CA_FILE => ca_file = Some(PathBuf::from(value.as_ref())),
                CERTIFICATE_FILE => certificate_file = Some(PathBuf::from(value.as_ref())),
                _ => key_file = Some(PathBuf::from(value.as_ref())),
            }
        }
        // What is wrong is not repeated: it may hold a password.
        let mut uri: AMQPUri = url
            .parse()
            .map_err(|_| invalid("not a URL like amqp://user:password@host:5672/vhost"))?;
        if uri.scheme == AMQPScheme::AMQPS && cfg!(not(feature = "rustls")) {
            let message = "amqps:// needs the feature `rustls`";
            return Err(Error::not_executed(ErrorKind::Unsupported, message));
        }
        // "amqp://host/" names no virtual host either: whoever writes the slash means the default one.
        if uri.vhost.is_empty() {
            uri.vhost = "/".to_owned();
        }
        let heartbeat = uri.query.heartbeat.filter(|&seconds| seconds > 0);
        let config = Self {
            connect_timeout: Duration::from_secs(10),
            heartbeat: Duration::from_secs(heartbeat.unwrap_or(10).into()),
            queue_type,
            durable,
            node_queue_expires: Duration::from_secs(30 * 60),
            frame_max: uri.query.frame_max.unwrap_or(FRAME_MAX),
            ca_file,
            certificate_file,
            key_file,
            uri,
        };
        config.check()?;
        Ok(config)
    }

    /// # Errors
    /// `Invalid` if its fields contradict each other.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if !self.durable && self.queue_type == QueueType::Quorum {
            return Err(invalid("quorum queues are always durable"));
        }
        let identity = (&self.certificate_file, &self.key_file);
        if matches!(identity, (Some(_), None) | (None, Some(_))) {
            return Err(invalid("certificate_file and key_file go together"));
        }
        let files = [&self.ca_file, &self.certificate_file];
        if files.iter().any(|file| file.is_some()) && !self.is_secure() {
            return Err(invalid(
                "ca_file, certificate_file and key_file need amqps://",
            ));
        }
        Ok(())
    }

    /// True over TLS.
    pub(crate) fn is_secure(&self) -> bool {
        self.uri.scheme == AMQPScheme::AMQPS
    }

    /// The address to dial, with all settings in it but TLS, which is wrapped around it.
    pub(crate) fn uri(&self) -> AMQPUri {
        let mut uri = self.uri.clone();
        uri.scheme = AMQPScheme::AMQP;
        let seconds = self.heartbeat.as_secs().clamp(1, u16::MAX.into());
        uri.query.heartbeat = Some(u16::try_from(seconds).unwrap_or(u16::MAX));
        uri.query.frame_max = Some(self.frame_max.max(4096));
        uri
    }

    /// The host and port, for people.
    pub(crate) fn address(&self) -> String {
        let authority = &self.uri.authority;
        format!("{}:{}", authority.host, authority.port)
    }
}

impl fmt::Debug for AmqpConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AmqpConfig")
            .field("address", &self.address())
            .field("vhost", &self.uri.vhost)
            .field("user", &self.uri.authority.userinfo.username)
            .field("connect_timeout", &self.connect_timeout)
            .field("heartbeat", &self.heartbeat)
            .field("queue_type", &self.queue_type)
            .field("durable", &self.durable)
            .field("node_queue_expires", &self.node_queue_expires)
            .field("frame_max", &self.frame_max)
            .field("ca_file", &self.ca_file)
            .field("certificate_file", &self.certificate_file)
            .field("key_file", &self.key_file)
            .finish()
    }
}

/// Parameters of a URL: name and value.
type Parameters<'a> = Vec<(Cow<'a, str>, Cow<'a, str>)>;

/// The URL without the parameters that are ours, and these.
fn split_own(url: &str) -> (String, Parameters<'_>) {
    let Some((address, query)) = url.split_once('?') else {
        return (url.to_owned(), Vec::new());
    };
    let (mut rest, mut own) = (Vec::new(), Vec::new());
    for parameter in query.split('&') {
        match url::form_urlencoded::parse(parameter.as_bytes()).next() {
            Some((name, value)) if OWN.contains(&name.as_ref()) => own.push((name, value)),
            _ => rest.push(parameter),
        }
    }
    match rest.is_empty() {
        true => (address.to_owned(), own),
        false => (format!("{address}?{}", rest.join("&")), own),
    }
}

pub(crate) fn invalid(message: impl Into<String>) -> Error {
    Error::not_executed(ErrorKind::Invalid, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_virtual_host() {
        for url in [
            "amqp://h",
            "amqp://h:5672",
            "amqp://h:5672/",
            "amqp://h/%2f",
        ] {
            assert_eq!(AmqpConfig::from_url(url).unwrap().uri.vhost, "/", "{url}");
        }
        assert_eq!(
            AmqpConfig::from_url("amqp://h/a%2Fb").unwrap().uri.vhost,
            "a/b"
        );
    }

    #[test]
    fn parameters_of_the_url_are_settings() {
        let config = AmqpConfig::from_url("amqp://h?heartbeat=3&frame_max=8192").unwrap();
        assert_eq!(
            (config.heartbeat, config.frame_max),
            (Duration::from_secs(3), 8192)
        );
        let uri = AmqpConfig::from_url("amqp://h").unwrap().uri();
        assert_eq!(
            (uri.query.heartbeat, uri.query.frame_max),
            (Some(10), Some(131_072))
        );
    }

    #[test]
    fn the_queue_type_is_ours() {
        let config =
            AmqpConfig::from_url("amqp://h/?heartbeat=3&queue_type=classic&frame_max=8192")
                .unwrap();
        assert_eq!(config.queue_type, QueueType::Classic);
        assert_eq!(
            (config.heartbeat, config.frame_max),
            (Duration::from_secs(3), 8192)
        );
        for (url, queue_type) in [
            ("amqp://h/?queue_type=classic", QueueType::Classic),
            ("amqp://h?queue_type=quorum", QueueType::Quorum),
            ("amqp://h/", QueueType::Quorum),
        ] {
            let config = AmqpConfig::from_url(url).unwrap();
            assert_eq!((config.queue_type, &*config.uri.vhost), (queue_type, "/"));
        }
        for url in ["amqp://h/?queue_type=stream", "amqp://h/?queue_type="] {
            let error = AmqpConfig::from_url(url).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{url}");
        }
    }

    #[test]
    fn files_are_named_whole_and_only_for_tls() {
        let fields = |url| {
            let config = AmqpConfig::from_url(url)?;
            Ok::<_, Error>((config.ca_file, config.certificate_file, config.key_file))
        };
        let file = |name: &str| Some(PathBuf::from(name));
        if cfg!(feature = "rustls") {
            let url = "amqps://h/?ca_file=/a%20b=%26.pem&certificate_file=c&key_file=k";
            assert_eq!(
                fields(url).unwrap(),
                (file("/a b=&.pem"), file("c"), file("k"))
            );
            let alone = fields("amqps://h/?key_file=k").unwrap_err();
            assert_eq!(alone.kind(), ErrorKind::Invalid);
        }
        let plain = fields("amqp://h/?ca_file=/a.pem").unwrap_err();
        assert_eq!(plain.kind(), ErrorKind::Invalid);
    }

    #[test]
    fn a_parameter_is_given_once() {
        let twice = "amqp://h/?queue_type=classic&heartbeat=3&queue_type=quorum";
        let error = AmqpConfig::from_url(twice).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.message().contains("queue_type"), "{error:?}");
    }

    #[test]
    fn only_classic_queues_are_transient() {
        for (url, durable) in [
            ("amqp://h/?queue_type=classic", true),
            ("amqp://h/?durable=true", true),
            ("amqp://h/?queue_type=classic&durable=false", false),
        ] {
            assert_eq!(AmqpConfig::from_url(url).unwrap().durable, durable, "{url}");
        }
        for url in [
            "amqp://h/?durable=false",
            "amqp://h/?queue_type=classic&durable=no",
        ] {
            let error = AmqpConfig::from_url(url).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{url}");
        }
    }

    #[test]
    fn a_password_is_never_shown() {
        let config = AmqpConfig::from_url("amqp://user:s3cret@h").unwrap();
        assert!(!format!("{config:?}").contains("s3cret"));
        let error = AmqpConfig::from_url("amqp://user:s3cret@h:port").unwrap_err();
        assert!(!format!("{error:?} {error}").contains("s3cret"));
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
}
