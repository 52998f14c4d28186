//! Dials Redis, and has the client library greet it.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use antiphon_core::Error;
use futures_util::future::select_ok;
use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::{
    AsyncConnectionConfig, ConnectionAddr, ConnectionInfo, ProtocolVersion, RedisConnectionInfo,
    RedisResult,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, lookup_host};

use crate::config::RedisConfig;
use crate::socket::Duplex;
#[cfg(feature = "rustls")]
use crate::tls::{self, Tls};

/// Where Redis is, and as whom we come.
#[derive(Debug)]
pub(crate) struct Dialler {
    info: ConnectionInfo,
    #[cfg(feature = "rustls")]
    tls: Tls,
}

impl Dialler {
    pub(crate) fn new(config: &RedisConfig) -> Result<Self, Error> {
        let info = config.connection_info()?;
        #[cfg(feature = "rustls")]
        let (info, tls) = match info.addr() {
            ConnectionAddr::TcpTls { .. } => tls::secure(config, info)?,
            _ => (info, Tls::default()),
        };
        // The protocol that `wire` reads.
        let settings = info
            .redis_settings()
            .clone()
            .set_protocol(ProtocolVersion::RESP3);
        let info = info
            // Without nodelay a small command waits for the acknowledgement of the one before.
            .set_tcp_settings(TcpSettings::default().set_nodelay(true))
            .set_redis_settings(settings);
        Ok(Self {
            info,
            #[cfg(feature = "rustls")]
            tls,
        })
    }

    pub(crate) fn info(&self) -> &ConnectionInfo {
        &self.info
    }

    /// Connects, and introduces us to the server.
    pub(crate) async fn dial(&self) -> RedisResult<Box<dyn Duplex>> {
        let stream: Box<dyn Duplex> = match self.info.addr() {
            ConnectionAddr::Tcp(host, port) => Box::new(connect(host, *port).await?),
            #[cfg(feature = "rustls")]
            ConnectionAddr::TcpTls {
                host,
                port,
                insecure: false,
                ..
            } => Box::new(self.tls.wrap(host, connect(host, *port).await?).await?),
            // No other one comes from the addresses that we take.
            _ => {
                let message = "the address is of a kind that is not supported";
                return Err(io::Error::new(io::ErrorKind::Unsupported, message).into());
            }
        };
        greet(self.info.redis_settings(), stream).await
    }
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
    stream.set_nodelay(true)?;
    Ok(stream)
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
