//! Dials the broker, and keeps a hold on the socket.
//!
//! The client library has a thread of its own for each connection, which ends when its socket does. It has no way to be told:
//! a connection that is given up, or was never made, would keep both until its heartbeats run out, if it has any yet.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, OnceLock};

use antiphon_core::Error;
use futures_io::{AsyncRead, AsyncWrite};
use lapin::tcp::{AMQPUriTcpExt, AsyncTcpStream};
use lapin::uri::AMQPUri;
use lapin::{Connection, ConnectionProperties, runtime};
use tokio_util::sync::CancellationToken;

use crate::config::AmqpConfig;
use crate::error::Failure;
#[cfg(feature = "rustls")]
use crate::tls::Tls;

/// Where the broker is, and whom to trust there.
#[derive(Clone)]
pub(crate) struct Dialler {
    uri: AMQPUri,
    #[cfg(feature = "rustls")]
    tls: Option<Tls>,
}

/// A hold on a connection's socket.
#[derive(Clone, Debug, Default)]
pub(crate) struct Grip {
    let_go: CancellationToken,
    socket: Arc<OnceLock<TcpStream>>,
}

/// Cuts the connection unless it is told otherwise.
struct CutOnDrop(Option<Grip>);

impl Dialler {
    /// Reads and checks the files for TLS, which may take any time.
    ///
    /// # Errors
    /// `Invalid` if they are of no use; `Connect` if there are none, and the platform trusts nobody.
    pub(crate) async fn new(config: &AmqpConfig) -> Result<Self, Error> {
        Ok(Self {
            uri: config.uri(),
            #[cfg(feature = "rustls")]
            tls: Tls::read(config).await?,
        })
    }

    /// The address, with all settings in it but TLS.
    pub(crate) fn uri(&self) -> &AMQPUri {
        &self.uri
    }

    /// Puts TLS around the stream, if the address asks for that.
    pub(crate) async fn secure<S>(&self, stream: AsyncTcpStream<S>) -> io::Result<AsyncTcpStream<S>>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        #[cfg(feature = "rustls")]
        if let Some(tls) = &self.tls {
            return tls.wrap(&self.uri.authority.host, stream).await;
        }
        Ok(stream)
    }
}

/// Connects. **Cancel safety**: dropping the future ends whatever was begun.
pub(crate) async fn dial(dialler: &Dialler, name: &str) -> Result<(Connection, Grip), Failure> {
    let properties =
        ConnectionProperties::default().with_connection_name(format!("antiphon {name}").into());
    let grip = Grip::default();
    let mut unless_connected = CutOnDrop(Some(grip.clone()));
    let connector = grip.clone();
    let dialler = dialler.clone();
    let connect = Connection::connector(
        dialler.uri.clone(),
        runtime::default_runtime()?,
        async move |uri, runtime| {
            let dial = async {
                let stream = uri.connect_async(&runtime).await?;
                dialler.secure(stream).await
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
    let connection = connect.await?;
    unless_connected.0 = None;
    Ok((connection, grip))
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
