//! From a URL to a backend.

use std::sync::Arc;

use antiphon_core::{
    Client, ClientConfig, ConnectionState, Error, ErrorKind, Server, Transport, Workers,
};

/// Connects to the broker that a URL names, by its scheme: `memory://NAME`, `redis://`, `rediss://`, `amqp://` or `amqps://`.
///
/// It takes at most 10 s. From then on the connection heals itself; see [`Connection::state`].
///
/// # Errors
/// `Unsupported` for a scheme whose backend is not compiled in, naming the feature to enable; `Invalid` for a URL that is none;
/// `Connect` if the broker cannot be reached, refuses the credentials (at once), or does not answer in time. No message shows a
/// password.
///
/// # Examples
/// ```
/// # async fn demo() -> Result<(), antiphon::Error> {
/// let connection = antiphon::connect("memory://demo").await?;
/// let client = connection.client().await?;
/// # Ok(()) }
/// ```
pub async fn connect(url: &str) -> Result<Connection, Error> {
    Ok(Connection::new(open(url).await?))
}

async fn open(url: &str) -> Result<Arc<dyn Transport>, Error> {
    let Some((scheme, _)) = url.split_once("://") else {
        let message = "a broker URL has a scheme, such as redis://localhost";
        return Err(Error::not_executed(ErrorKind::Invalid, message));
    };
    match scheme {
        #[cfg(feature = "memory")]
        "memory" => {
            let config = antiphon_memory::MemoryConfig::from_url(url)?;
            Ok(Arc::new(
                antiphon_memory::MemoryTransport::connect(config).await?,
            ))
        }
        #[cfg(feature = "redis")]
        "redis" | "rediss" => {
            let config = antiphon_redis::RedisConfig::from_url(url)?;
            Ok(Arc::new(
                antiphon_redis::RedisTransport::connect(config).await?,
            ))
        }
        #[cfg(feature = "amqp")]
        "amqp" | "amqps" => {
            let config = antiphon_amqp::AmqpConfig::from_url(url)?;
            Ok(Arc::new(
                antiphon_amqp::AmqpTransport::connect(config).await?,
            ))
        }
        _ => Err(absent(scheme)),
    }
}

/// A connection to a broker, from which clients and servers are made. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Connection {
    transport: Arc<dyn Transport>,
}

impl Connection {
    /// A connection over a transport that was configured by hand, or is not ours.
    #[must_use]
    pub fn new(transport: Arc<dyn Transport>) -> Self {
        Self { transport }
    }

    /// Opens a client with the default settings.
    ///
    /// # Errors
    /// As of [`Client::open`].
    pub async fn client(&self) -> Result<Client, Error> {
        self.client_with(ClientConfig::default()).await
    }

    /// Opens a client.
    ///
    /// # Errors
    /// As of [`Client::open`].
    pub async fn client_with(&self, config: ClientConfig) -> Result<Client, Error> {
        Client::open(Arc::clone(&self.transport), config).await
    }

    /// Begins a server.
    pub fn server(&self) -> Server {
        Server::new(Arc::clone(&self.transport))
    }

    /// Starts a pool of servers in this process, each with a prefetch of 1. `build` adds the handlers to each, and is told its
    /// number, from 0. On memory it is all that there is; on a broker it is a part of the fleet, by the same code.
    ///
    /// # Errors
    /// As of [`Server::start`].
    pub async fn workers(
        &self,
        workers: usize,
        build: impl FnMut(usize, Server) -> Server,
    ) -> Result<Workers, Error> {
        Workers::start(&self.transport, workers, build).await
    }

    /// The connection's state, now and as it changes.
    #[must_use]
    pub fn state(&self) -> tokio::sync::watch::Receiver<ConnectionState> {
        self.transport.state()
    }

    /// The transport below.
    #[must_use]
    pub fn transport(&self) -> &Arc<dyn Transport> {
        &self.transport
    }

    /// Closes it: calls that wait end with `Closed`, and requests that servers hold go back. Shut servers down first.
    /// Idempotent; at most 5 s.
    pub async fn close(&self) {
        self.transport.close().await;
    }
}

/// Why there is no backend for a scheme.
fn absent(scheme: &str) -> Error {
    let feature = match scheme {
        "memory" => "memory",
        "redis" | "rediss" => "redis",
        "amqp" | "amqps" => "amqp",
        _ => {
            let message = format!(
                "no backend has the scheme {scheme:?}; there are memory, redis, rediss, amqp and amqps"
            );
            return Error::not_executed(ErrorKind::Unsupported, message);
        }
    };
    let message = format!(
        "{scheme}:// needs the feature {feature:?} of the crate antiphon, which is not compiled in"
    );
    Error::not_executed(ErrorKind::Unsupported, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_backend_names_its_feature() {
        for (scheme, feature) in [("memory", "memory"), ("rediss", "redis"), ("amqps", "amqp")] {
            let error = absent(scheme);
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(
                error.message().contains(&format!("feature {feature:?}")),
                "{error}"
            );
        }
    }

    #[tokio::test]
    async fn a_url_is_checked_before_any_io() {
        assert_eq!(
            connect("localhost").await.unwrap_err().kind(),
            ErrorKind::Invalid
        );
        assert_eq!(
            connect("kafka://localhost").await.unwrap_err().kind(),
            ErrorKind::Unsupported
        );
        #[cfg(not(feature = "redis"))]
        assert!(
            connect("redis://localhost")
                .await
                .unwrap_err()
                .message()
                .contains("redis")
        );
    }
}
