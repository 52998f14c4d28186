//! Dials Redis, and has the client library greet it.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures_util::future::select_ok;
use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, ConnectionAddr, ConnectionInfo, RedisConnectionInfo, RedisResult,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, lookup_host};

use crate::socket::Duplex;

/// Connects, and introduces us to the server.
pub(crate) async fn dial(info: &ConnectionInfo) -> RedisResult<Box<dyn Duplex>> {
    let stream: Box<dyn Duplex> = match info.addr() {
        ConnectionAddr::Tcp(host, port) => Box::new(connect(host, *port).await?),
        #[cfg(feature = "rustls")]
        ConnectionAddr::TcpTls {
            host,
            port,
            insecure: false,
            ..
        } => Box::new(secure(host, connect(host, *port).await?).await?),
        // No other one comes from the addresses that we take.
        _ => {
            let message = "the address is of a kind that is not supported";
            return Err(io::Error::new(io::ErrorKind::Unsupported, message).into());
        }
    };
    greet(info.redis_settings(), stream).await
}

/// Tries all addresses of the host at once.
async fn connect(host: &str, port: u16) -> io::Result<TcpStream> {
    let attempts: Vec<_> = lookup_host((host, port))
        .await?
        .map(|address| Box::pin(TcpStream::connect(address)))
        .collect();
    if attempts.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            "the host has no address",
        ));
    }
    let (stream, _) = select_ok(attempts).await?;
    // Or a small command waits for the acknowledgement of the one before.
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// TLS, as the client library does it: trusted is whom the system trusts.
#[cfg(feature = "rustls")]
async fn secure(
    host: &str,
    stream: TcpStream,
) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    use tokio_rustls::TlsConnector;
    use tokio_rustls::rustls::pki_types::ServerName;
    use tokio_rustls::rustls::{ClientConfig, RootCertStore};

    let mut trusted = RootCertStore::empty();
    let mut found = rustls_native_certs::load_native_certs();
    if let Some(error) = found.errors.pop() {
        return Err(io::Error::other(error));
    }
    for certificate in found.certs {
        trusted.add(certificate).map_err(io::Error::other)?;
    }
    let config = ClientConfig::builder()
        .with_root_certificates(trusted)
        .with_no_client_auth();
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let connector = TlsConnector::from(Arc::new(config));
    connector.connect(name, stream).await
}

/// Lends the stream to the client library for what it does first: protocol, user, database, its name.
async fn greet(
    settings: &RedisConnectionInfo,
    stream: Box<dyn Duplex>,
) -> RedisResult<Box<dyn Duplex>> {
    let lent = Lent(Arc::new(Mutex::new(Some(stream))));
    let config = AsyncConnectionConfig::new();
    let greeted = MultiplexedConnection::new_with_config(settings, lent.clone(), config).await?;
    // It has read the answers to what it asked, and the server says no more than that.
    drop(greeted);
    let stream = lent.lock().take();
    let lost = || io::Error::from(io::ErrorKind::NotConnected);
    Ok(stream.ok_or_else(lost)?)
}

/// A stream that can be taken back.
#[derive(Clone)]
struct Lent(Arc<Mutex<Option<Box<dyn Duplex>>>>);

impl Lent {
    fn lock(&self) -> MutexGuard<'_, Option<Box<dyn Duplex>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn poll<T>(
        &self,
        poll: impl FnOnce(Pin<&mut dyn Duplex>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        match &mut *self.lock() {
            Some(stream) => poll(Pin::new(stream.as_mut())),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

impl AsyncRead for Lent {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll(|stream| stream.poll_read(context, buffer))
    }
}

impl AsyncWrite for Lent {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll(|stream| stream.poll_write(context, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(|stream| stream.poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(|stream| stream.poll_shutdown(context))
    }
}
