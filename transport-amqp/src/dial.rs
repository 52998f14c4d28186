//! Dials the broker, and keeps a hold on the socket.
//!
//! The client library has a thread of its own for each connection, which ends when its socket does. It has no way to be told:
//! a connection that is given up, or was never made, would keep both until its heartbeats run out, if it has any yet.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lapin::tcp::{AMQPUriTcpExt, AsyncTcpStream};
use lapin::{Connection, ConnectionProperties, runtime};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::config::AmqpConfig;
use crate::error::Failure;

/// A hold on a connection's socket.
#[derive(Clone, Debug, Default)]
pub(crate) struct Grip {
    let_go: CancellationToken,
    socket: Arc<OnceLock<TcpStream>>,
}

/// Cuts the connection unless it is told otherwise.
struct CutOnDrop(Option<Grip>);

/// Connects within `limit`. **Cancel safety**: dropping the future ends whatever was begun.
pub(crate) async fn dial(
    config: &AmqpConfig,
    name: &str,
    limit: Duration,
) -> Result<(Connection, Grip), Failure> {
    let properties =
        ConnectionProperties::default().with_connection_name(format!("antiphon {name}").into());
    let grip = Grip::default();
    let mut unless_connected = CutOnDrop(Some(grip.clone()));
    let connector = grip.clone();
    let uri = config.uri();
    #[cfg(feature = "rustls")]
    let config = config.clone();
    let connect = Connection::connector(
        uri,
        runtime::default_runtime()?,
        async move |uri, runtime| {
            let dial = async {
                let stream = uri.connect_async(&runtime).await?;
                #[cfg(feature = "rustls")]
                let stream = crate::tls::wrap(&config, stream).await?;
                Ok::<_, io::Error>(stream)
            };
            let dialled = connector.let_go.run_until_cancelled(dial).await;
            let stream = dialled
                .ok_or(io::ErrorKind::TimedOut)
                .map_err(io::Error::from)??;
            let plain = match &stream {
                AsyncTcpStream::Plain(plain) => Some(plain),
                #[cfg(feature = "rustls")]
                AsyncTcpStream::Rustls(secure) => Some(secure.get_ref().0),
                _ => None,
            };
            if let Some(plain) = plain {
                connector.grasp(duplicate(plain.get_ref())?);
            }
            Ok(stream)
        },
        properties,
    );
    match timeout(limit, connect).await {
        Ok(connection) => {
            let connection = connection?;
            unless_connected.0 = None;
            Ok((connection, grip))
        }
        Err(_) => Err(Failure::TimedOut("connecting")),
    }
}

impl Grip {
    /// Ends the connection at once, whatever the peer does: all who use it are told.
    pub(crate) fn cut(&self) {
        self.let_go.cancel();
        if let Some(socket) = self.socket.get() {
            // An error means that it is over already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// True once it was cut.
    pub(crate) fn is_cut(&self) -> bool {
        self.let_go.is_cancelled()
    }

    /// Resolves once it was cut.
    pub(crate) async fn cut_off(&self) {
        self.let_go.cancelled().await;
    }

    fn grasp(&self, socket: TcpStream) {
        let _ = self.socket.set(socket);
        // Cut just before there was anything to cut.
        if self.is_cut() {
            self.cut();
        }
    }
}

impl Drop for CutOnDrop {
    fn drop(&mut self) {
        if let Some(grip) = self.0.take() {
            grip.cut();
        }
    }
}

/// The same socket once more.
#[cfg(unix)]
fn duplicate(stream: &tokio::net::TcpStream) -> io::Result<TcpStream> {
    use std::os::fd::AsFd;
    stream.as_fd().try_clone_to_owned().map(TcpStream::from)
}

/// The same socket once more.
#[cfg(windows)]
fn duplicate(stream: &tokio::net::TcpStream) -> io::Result<TcpStream> {
    use std::os::windows::io::AsSocket;
    stream.as_socket().try_clone_to_owned().map(TcpStream::from)
}
