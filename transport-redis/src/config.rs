//! How to connect, and what to promise.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use antiphon_core::{Error, ErrorKind};
use redis::IntoConnectionInfo;
use url::Url;

/// The shortest lease: below it, renewals would be late by chance.
const LEASE_MIN: Duration = Duration::from_millis(300);

/// The shortest life of an inbox that nobody reads.
const INBOX_TTL_MIN: Duration = Duration::from_millis(300);

/// How to connect to Redis. `Debug` hides the password.
#[derive(Clone)]
#[non_exhaustive]
pub struct RedisConfig {
    url: Url,
    /// The most time for the first connection, all steps together. Default: 10 s. Wrong credentials and a refused
    /// connection end it at once.
    pub connect_timeout: Duration,
    /// For how long a server owns its deliveries without renewing; it renews three times as often. Default: 10 s, least:
    /// 300 ms. Shorter finds dead servers sooner; too short, and a busy host loses its leases and work is done twice.
    pub lease: Duration,
    /// For how long replies wait for a client that is away, and what is left of a call stays on the broker. Default: 60 s,
    /// least: 300 ms. The same on clients and servers. Shorter than an outage, and replies are lost in it.
    pub inbox_ttl: Duration,
    /// The largest body that travels inside its frame, in bytes; larger ones get a key of their own. Default: 16 KiB.
    pub inline_body: usize,
    /// The most dead letters kept of one service; older ones are dropped. Default: 1,000.
    pub dead_letters: usize,
    /// A PEM file with the certificates of the authorities to trust, in place of the platform's own (which `SSL_CERT_FILE` can
    /// name). It is read once, as a transport connects. A server also needs that what the platform trusts can be read, though it is
    /// not used then: the redis crate, which renews the leases, reads it first. Only over TLS, as the next two. Default: none.
    pub ca_file: Option<PathBuf>,
    /// A PEM file with the certificate that we show to a server which asks for one, and those between it and its authority.
    /// Only with [`key_file`](Self::key_file). Default: none.
    pub certificate_file: Option<PathBuf>,
    /// A PEM file with the key of [`certificate_file`](Self::certificate_file), not encrypted. Default: none.
    pub key_file: Option<PathBuf>,
    /// Accept a server whose `maxmemory-policy` may evict keys, and with them requests. Default: false.
    pub allow_eviction: bool,
}

impl RedisConfig {
    /// The default configuration for `redis://[user[:password]@]host[:port][/db]`, or `rediss://` for TLS. Its parameters
    /// `ca_file`, `certificate_file` and `key_file` set the fields of these names: `rediss://h/?ca_file=/etc/ssl/ours.pem`. In a
    /// value, `+` is a space, and `%2B` a plus.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for anything else, and if one of these comes twice; [`ErrorKind::Unsupported`] for `rediss://` without the feature `rustls`.
    pub fn from_url(url: &str) -> Result<Self, Error> {
        // The parser's own errors may quote what they could not read, so they are not passed on.
        let url = Url::parse(url).map_err(|_| invalid("not a URL"))?;
        match url.scheme() {
            "redis" => {}
            "rediss" if cfg!(feature = "rustls") => {}
            "rediss" => {
                let message = "rediss:// needs the feature rustls, which is not compiled in";
                return Err(Error::not_executed(ErrorKind::Unsupported, message));
            }
            _ => return Err(invalid("the scheme is neither redis nor rediss")),
        }
        if url.host_str().is_none_or(str::is_empty) {
            return Err(invalid("no host"));
        }
        url.clone()
            .into_connection_info()
            .map_err(|_| invalid("not redis://[user[:password]@]host[:port][/db]"))?;
        let file = |name: &str| {
            let mut values = url.query_pairs().filter(|(key, _)| key == name);
            match (values.next(), values.next()) {
                (value, None) => Ok(value.map(|(_, value)| PathBuf::from(value.as_ref()))),
                _ => Err(invalid(&format!("{name} is given twice"))),
            }
        };
        let (ca_file, certificate_file) = (file("ca_file")?, file("certificate_file")?);
        let key_file = file("key_file")?;
        Ok(Self {
            ca_file,
            certificate_file,
            key_file,
            url,
            connect_timeout: Duration::from_secs(10),
            lease: Duration::from_secs(10),
            inbox_ttl: Duration::from_secs(60),
            inline_body: 16 * 1024,
            dead_letters: 1000,
            allow_eviction: false,
        })
    }

    /// How the redis crate calls the server.
    pub(crate) fn connection_info(&self) -> Result<redis::ConnectionInfo, Error> {
        self.url
            .clone()
            .into_connection_info()
            .map_err(|_| invalid("not a URL of Redis"))
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.lease < LEASE_MIN {
            return Err(invalid("the lease is below 300 ms"));
        }
        if self.inbox_ttl < INBOX_TTL_MIN {
            return Err(invalid("the inbox_ttl is below 300 ms"));
        }
        let identity = (&self.certificate_file, &self.key_file);
        if matches!(identity, (Some(_), None) | (None, Some(_))) {
            return Err(invalid("certificate_file and key_file go together"));
        }
        let files = [&self.ca_file, &self.certificate_file];
        if files.iter().any(|file| file.is_some()) && self.url.scheme() != "rediss" {
            return Err(invalid(
                "ca_file, certificate_file and key_file need rediss://",
            ));
        }
        Ok(())
    }

    /// The user that connects, host, port and database; no password.
    fn place(&self) -> String {
        let mut shown = self.url.clone();
        if shown.password().is_some() {
            // It has a host, so it can have a password.
            let _ = shown.set_password(Some("***"));
        }
        shown.set_query(None);
        shown.to_string()
    }
}

impl fmt::Debug for RedisConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisConfig")
            .field("url", &self.place())
            .field("connect_timeout", &self.connect_timeout)
            .field("lease", &self.lease)
            .field("inbox_ttl", &self.inbox_ttl)
            .field("inline_body", &self.inline_body)
            .field("dead_letters", &self.dead_letters)
            .field("ca_file", &self.ca_file)
            .field("certificate_file", &self.certificate_file)
            .field("key_file", &self.key_file)
            .field("allow_eviction", &self.allow_eviction)
            .finish()
    }
}

pub(crate) fn invalid(message: &str) -> Error {
    Error::not_executed(ErrorKind::Invalid, format!("Redis: {message}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_password_is_never_shown() {
        let config = RedisConfig::from_url("redis://ann:s3cret@localhost:7000/2").unwrap();
        let shown = format!("{config:?}");
        assert!(shown.contains("ann:***@localhost:7000/2"), "{shown}");
        for bad in [
            "redis://:s3cret@",
            "amqp://a:s3cret@h",
            "s3cret",
            "redis://a:s3cret@h/x",
            "redis:///1",
            "redis://a:s3cret@h/?ca_file=a&ca_file=b",
        ] {
            let error = RedisConfig::from_url(bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{bad}");
            assert!(!format!("{error:?}").contains("s3cret"), "{error:?}");
        }
    }
}
