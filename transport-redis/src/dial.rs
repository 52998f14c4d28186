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
    RedisError, RedisResult,
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
    tls: Option<Tls>,
}

impl Dialler {
    /// Reads and checks the files for TLS, which may take any time.
    pub(crate) async fn new(config: &RedisConfig) -> Result<Self, Error> {
        let info = config.connection_info()?;
        #[cfg(feature = "rustls")]
        let (info, tls) = match info.addr() {
            ConnectionAddr::TcpTls { .. } => {
                let (info, tls) = tls::secure(config, info).await?;
                (info, Some(tls))
            }
            _ => (info, None),
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
        let stream = self.connect().await?;
        greet(self.info.redis_settings(), stream).await
    }

    async fn connect(&self) -> io::Result<Box<dyn Duplex>> {
        let address = self.info.addr();
        #[cfg(feature = "rustls")]
        if let ConnectionAddr::TcpTls {
            host,
            port,
            insecure: false,
            ..
        } = address
            && let Some(tls) = &self.tls
        {
            let stream = connect(host, *port).await?;
            return Ok(Box::new(tls.wrap(host, stream).await?));
        }
        match address {
            ConnectionAddr::Tcp(host, port) => Ok(Box::new(connect(host, *port).await?)),
            // No other one comes from the addresses that we take.
            _ => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the address is of a kind that is not supported",
            )),
        }
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
    let greeted = MultiplexedConnection::new_with_config(settings, lent.clone(), config);
    let greeted = greeted.await.map_err(without_arguments)?;
    // It has read the answers to what it asked, and the server says no more than that.
    drop(greeted);
    let stream = lent.lock().take();
    let lost = || io::Error::from(io::ErrorKind::NotConnected);
    Ok(stream.ok_or_else(lost)?)
}

/// A server that does not know the first command, or has it renamed, repeats what it was sent: the password too.
pub(crate) fn without_arguments(error: RedisError) -> RedisError {
    match error.detail() {
        Some(detail) if detail.contains("unknown command") => {
            let message = "the server does not know HELLO, of Redis 6 and newer";
            io::Error::new(io::ErrorKind::Unsupported, message).into()
        }
        _ => error,
    }
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

#[cfg(test)]
mod tests {
    use redis::RedisConnectionInfo;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    /// As Redis 7 does to a command that it does not know, or knows by another name.
    #[tokio::test]
    async fn a_server_that_repeats_what_it_is_sent_is_not_quoted() {
        let (near, mut far) = duplex(1 << 16);
        let server = async move {
            let answer = b"-ERR unknown command 'HELLO', with args beginning with: '3' 'AUTH' 'default' 's3cret' \r\n";
            let _ = far.read_u8().await;
            let _ = far.write_all(&answer.repeat(8)).await;
            let mut rest = Vec::new();
            let _ = far.read_to_end(&mut rest).await;
        };
        let settings = RedisConnectionInfo::default()
            .set_protocol(ProtocolVersion::RESP3)
            .set_password("s3cret");
        let greeting = async { greet(&settings, Box::new(near)).await.err() };
        let (error, ()) = tokio::join!(greeting, server);
        let error = error.unwrap().to_string();
        assert!(
            error.contains("HELLO") && !error.contains("s3cret"),
            "{error}"
        );
    }
}
