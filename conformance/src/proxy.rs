//! A TCP proxy between a transport and its broker, with faults on demand.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::brokers;

/// How long the proxy tries to reach the broker for one connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes moved at once.
const CHUNK: usize = 16 * 1024;

/// A TCP proxy on a free loopback port. It moves bytes and knows nothing of any protocol.
///
/// Its tasks live on the runtime that it was started on. Dropping it ends all its connections and frees the port.
#[derive(Debug)]
pub struct Proxy {
    addr: SocketAddr,
    shared: Arc<Shared>,
    /// The task that accepts; none while new connections are refused.
    acceptor: tokio::sync::Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    upstream: String,
    flow: watch::Sender<Flow>,
    generation: Mutex<Generation>,
}

/// The connections that the next cut ends.
#[derive(Clone, Debug, Default)]
struct Generation {
    cut: CancellationToken,
    connections: TaskTracker,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    Open,
    Held,
}

impl Proxy {
    /// Starts a proxy in front of `upstream`, a `host:port`. It is reached anew for each connection, so it may go away
    /// and come back.
    ///
    /// # Errors
    /// If no loopback port can be had.
    pub async fn start(upstream: impl Into<String>) -> io::Result<Self> {
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, brokers::free_port()?));
        let listener = TcpListener::bind(addr).await?;
        let shared = Arc::new(Shared {
            upstream: upstream.into(),
            flow: watch::Sender::new(Flow::Open),
            generation: Mutex::default(),
        });
        let acceptor = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self {
            addr,
            shared,
            acceptor: tokio::sync::Mutex::new(Some(acceptor)),
        })
    }

    /// Where clients connect instead of to the broker. It never changes.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The number of connections that are open now.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.generation().connections.len()
    }

    /// Resets all connections, on both sides. New ones are accepted as before.
    ///
    /// **Resolves when** the present ones are closed.
    pub async fn cut(&self) {
        let Generation { cut, connections } = std::mem::take(&mut *self.shared.generation());
        cut.cancel();
        connections.close();
        connections.wait().await;
    }

    /// Resets all connections, and refuses new ones until [`restore`](Self::restore).
    ///
    /// **Resolves when** nobody listens on the port and all connections are closed.
    pub async fn refuse(&self) {
        if let Some(acceptor) = self.acceptor.lock().await.take() {
            acceptor.abort();
            // An aborted task has dropped its listener by the time that it has ended, not when it is told to.
            let _ = acceptor.await;
        }
        self.cut().await;
    }

    /// Leaves all sockets open, and takes new ones, but moves nothing in either direction until
    /// [`restore`](Self::restore). What was sent meanwhile arrives then.
    pub fn blackhole(&self) {
        self.shared.flow.send_replace(Flow::Held);
    }

    /// Ends a [`refuse`](Self::refuse) and a [`blackhole`](Self::blackhole).
    ///
    /// # Errors
    /// If the port cannot be bound again.
    pub async fn restore(&self) -> io::Result<()> {
        self.shared.flow.send_replace(Flow::Open);
        let mut acceptor = self.acceptor.lock().await;
        if acceptor.is_none() {
            let listener = TcpListener::bind(self.addr).await?;
            *acceptor = Some(tokio::spawn(accept(listener, Arc::clone(&self.shared))));
        }
        Ok(())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(acceptor) = self.acceptor.get_mut() {
            acceptor.abort();
        }
        self.shared.generation().cut.cancel();
    }
}

impl Shared {
    fn generation(&self) -> MutexGuard<'_, Generation> {
        self.generation
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The URL with `addr` in place of its host and port; user, password, path and query stay. A text without `://` is
/// returned as it is.
#[must_use]
pub fn replace_authority(url: &str, addr: SocketAddr) -> String {
    match host_and_port(url) {
        Some(range) => format!("{}{addr}{}", &url[..range.start], &url[range.end..]),
        None => url.to_owned(),
    }
}

/// Where `host:port` lies within a URL.
pub(crate) fn host_and_port(url: &str) -> Option<std::ops::Range<usize>> {
    let authority = url.find("://")? + "://".len();
    let end = url[authority..]
        .find(['/', '?', '#'])
        .map_or(url.len(), |length| authority + length);
    let start = url[authority..end]
        .rfind('@')
        .map_or(authority, |at| authority + at + 1);
    Some(start..end)
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let Ok((client, _)) = listener.accept().await else {
            // Out of file descriptors, most likely: without a pause this loop would spin until some are free.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let Generation { cut, connections } = shared.generation().clone();
        connections.spawn(serve(
            client,
            shared.upstream.clone(),
            shared.flow.subscribe(),
            cut,
        ));
    }
}

/// One connection, from accept to close. Both sockets end with a reset, unless both sides have closed by themselves.
async fn serve(
    mut client: TcpStream,
    upstream: String,
    mut flow: watch::Receiver<Flow>,
    cut: CancellationToken,
) {
    let dialled = async {
        opened(&mut flow).await?;
        tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(&upstream)).await?
    };
    let broker = tokio::select! {
        broker = dialled => broker,
        () = cut.cancelled() => Err(io::ErrorKind::ConnectionReset.into()),
    };
    let Ok(mut broker) = broker else {
        let _ = client.set_zero_linger();
        return;
    };
    for socket in [&client, &broker] {
        let _ = socket.set_nodelay(true);
    }
    let ended = {
        // Borrowed halves: owned ones would say a proper goodbye when they are dropped, before the reset.
        let (from_client, to_client) = client.split();
        let (from_broker, to_broker) = broker.split();
        tokio::select! {
            ended = async {
                tokio::try_join!(pump(from_client, to_broker, flow.clone()), pump(from_broker, to_client, flow.clone()))
            } => ended.map(|_| ()),
            () = cut.cancelled() => Err(io::ErrorKind::ConnectionReset.into()),
        }
    };
    if ended.is_err() {
        let _ = client.set_zero_linger();
        let _ = broker.set_zero_linger();
    }
}

/// Moves bytes in one direction until the end of the stream.
async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut flow: watch::Receiver<Flow>,
) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        opened(&mut flow).await?;
        let length = tokio::select! {
            biased;
            changed = flow.changed() => {
                changed.map_err(|_| io::ErrorKind::ConnectionReset)?;
                continue;
            }
            length = from.read(&mut chunk) => length?,
        };
        // The black hole may have opened between the read and here: what is in hand then waits with the rest.
        opened(&mut flow).await?;
        match chunk.get(..length) {
            None | Some([]) => return to.shutdown().await,
            Some(bytes) => to.write_all(bytes).await?,
        }
    }
}

/// Waits until bytes may flow; an error if the proxy is gone.
async fn opened(flow: &mut watch::Receiver<Flow>) -> io::Result<()> {
    match flow.wait_for(|flow| *flow == Flow::Open).await {
        Ok(_) => Ok(()),
        Err(_) => Err(io::ErrorKind::ConnectionReset.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);
    const MOMENT: Duration = Duration::from_millis(150);

    /// A server that sends back what it gets, and a proxy in front of it.
    async fn echo() -> Proxy {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let upstream = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = socket.split();
                    tokio::io::copy(&mut from, &mut to).await
                });
            }
        });
        Proxy::start(upstream.to_string()).await.unwrap()
    }

    async fn connect(proxy: &Proxy) -> TcpStream {
        let mut socket = TcpStream::connect(proxy.addr()).await.unwrap();
        exchange(&mut socket, b"hello").await;
        socket
    }

    async fn exchange(socket: &mut TcpStream, bytes: &[u8]) {
        socket.write_all(bytes).await.unwrap();
        receive(socket, bytes).await;
    }

    async fn receive(socket: &mut TcpStream, expected: &[u8]) {
        let mut received = vec![0; expected.len()];
        tokio::time::timeout(PATIENCE, socket.read_exact(&mut received))
            .await
            .expect("bytes in time")
            .unwrap();
        assert_eq!(received, expected);
    }

    async fn assert_reset(socket: &mut TcpStream) {
        let read = tokio::time::timeout(PATIENCE, socket.read(&mut [0; 8]))
            .await
            .expect("an end in time");
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn bytes_pass_and_connections_are_counted() {
        let proxy = echo().await;
        assert_eq!(proxy.connections(), 0);
        let mut first = connect(&proxy).await;
        let second = connect(&proxy).await;
        assert_eq!(proxy.connections(), 2);
        let large = vec![7; 5 * CHUNK + 3];
        let (mut from, mut to) = first.split();
        let mut received = vec![0; large.len()];
        let (sent, got) = tokio::join!(to.write_all(&large), from.read_exact(&mut received));
        sent.unwrap();
        got.unwrap();
        assert_eq!(received, large);
        // A half-closed connection still brings what the other side has to say, then its end.
        to.shutdown().await.unwrap();
        assert_eq!(from.read(&mut [0; 8]).await.unwrap(), 0);
        drop((first, second));
        tokio::time::timeout(PATIENCE, async {
            while proxy.connections() > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await
        .expect("closed connections are no longer counted");
    }

    #[tokio::test]
    async fn a_cut_resets_the_present_connections_only() {
        let proxy = echo().await;
        let mut old = connect(&proxy).await;
        proxy.cut().await;
        assert_eq!(proxy.connections(), 0);
        assert_reset(&mut old).await;
        let mut new = connect(&proxy).await;
        exchange(&mut new, b"again").await;
    }

    #[tokio::test]
    async fn refused_until_restored_on_the_same_port() {
        let proxy = echo().await;
        let addr = proxy.addr();
        let mut old = connect(&proxy).await;
        proxy.refuse().await;
        assert_reset(&mut old).await;
        assert_eq!(
            TcpStream::connect(addr).await.unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );
        proxy.refuse().await;
        proxy.restore().await.unwrap();
        proxy.restore().await.unwrap();
        assert_eq!(proxy.addr(), addr);
        connect(&proxy).await;
    }

    #[tokio::test]
    async fn a_black_hole_holds_bytes_and_keeps_sockets() {
        let proxy = echo().await;
        let mut old = connect(&proxy).await;
        proxy.blackhole();
        old.write_all(b"held").await.unwrap();
        let mut new = TcpStream::connect(proxy.addr()).await.unwrap();
        new.write_all(b"too").await.unwrap();
        for socket in [&mut old, &mut new] {
            assert!(
                tokio::time::timeout(MOMENT, socket.read(&mut [0; 8]))
                    .await
                    .is_err(),
                "nothing flows"
            );
        }
        assert_eq!(proxy.connections(), 2);
        proxy.restore().await.unwrap();
        receive(&mut old, b"held").await;
        receive(&mut new, b"too").await;
    }

    #[tokio::test]
    async fn a_cut_ends_what_a_black_hole_holds() {
        let proxy = echo().await;
        let mut old = connect(&proxy).await;
        proxy.blackhole();
        tokio::time::timeout(PATIENCE, proxy.cut())
            .await
            .expect("cut in time");
        assert_reset(&mut old).await;
    }

    #[tokio::test]
    async fn a_broker_that_is_gone_resets_the_client() {
        let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .unwrap()
            .local_addr()
            .unwrap();
        let proxy = Proxy::start(closed.to_string()).await.unwrap();
        let mut socket = TcpStream::connect(proxy.addr()).await.unwrap();
        assert_reset(&mut socket).await;
    }

    #[tokio::test]
    async fn a_dropped_proxy_leaves_nothing() {
        let proxy = echo().await;
        let addr = proxy.addr();
        let mut socket = connect(&proxy).await;
        drop(proxy);
        assert_reset(&mut socket).await;
        tokio::time::timeout(PATIENCE, async {
            while TcpStream::connect(addr).await.is_ok() {}
        })
        .await
        .expect("the port is free again");
    }

    #[test]
    fn a_url_keeps_everything_but_its_authority() {
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, 1234));
        for (url, expected) in [
            ("redis://localhost", "redis://127.0.0.1:1234"),
            (
                "redis://:p%40ss@host:6379/3?x=1",
                "redis://:p%40ss@127.0.0.1:1234/3?x=1",
            ),
            (
                "amqp://guest:gu@est@[::1]:5672/%2f",
                "amqp://guest:gu@est@127.0.0.1:1234/%2f",
            ),
            (
                "amqp://host?heartbeat=5#a@b",
                "amqp://127.0.0.1:1234?heartbeat=5#a@b",
            ),
            ("not a url", "not a url"),
        ] {
            assert_eq!(replace_authority(url, addr), expected);
        }
    }
}
