//! Servers that stand still until the broker has given their requests to somebody else, and then run again: what had reached their
//! sockets and buffers is not theirs any more.

use std::net::SocketAddr;
use std::process::{ExitCode, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use antiphon_amqp::{AmqpConfig, AmqpTransport};
use antiphon_conformance::proxy::replace_authority;
use antiphon_core::{ErrorKind, Fault, Server};
use bytes::Bytes;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::bench::{Bench, PROMPT, eventually, fresh};

/// So many requests lie in the buffers of a server that stands still.
const REQUESTS: usize = 8;

/// By which this program knows that it is to be a server: its broker, its heartbeat in seconds, its service, and whether it is the
/// owner.
const ROLE: &str = "ANTIPHON_TEST_FROZEN_SERVER";

/// Serves in this process, if it was started for that, until the service is another's. It says all that happens.
pub(crate) fn serve() -> Option<ExitCode> {
    let role = std::env::var(ROLE).ok()?;
    let mut role = role.split(' ');
    let (url, heartbeat) = (role.next()?, role.next()?);
    let (service, mode) = (role.next()?, role.next()?);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut config = AmqpConfig::from_url(url).unwrap();
        config.heartbeat = Duration::from_secs(heartbeat.parse().unwrap());
        let transport = Arc::new(AmqpTransport::connect(config).await.unwrap());
        let server = Server::new(transport).prefetch(2 * REQUESTS);
        let server = match mode {
            "owner" => server.exclusive(),
            _ => server,
        };
        let server = server.handle_raw(service, |_: Bytes| async {
            println!("ran");
            Ok::<_, Fault>("")
        });
        let mut server = server.start().await.unwrap();
        println!("serves");
        println!("over: {:?}", server.over().await.kind());
    });
    Some(ExitCode::SUCCESS)
}

/// A server in a process of its own. It is killed when this is dropped.
struct Frozen {
    child: Child,
    said: Lines<BufReader<ChildStdout>>,
}

impl Frozen {
    /// Starts one, and freezes it once it serves.
    async fn start(url: &str, heartbeat: u64, service: &str, mode: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .env(ROLE, format!("{url} {heartbeat} {service} {mode}"))
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(said.next_line().await.unwrap().as_deref(), Some("serves"));
        let frozen = Self { child, said };
        frozen.signal("-STOP").await;
        frozen
    }

    async fn signal(&self, signal: &str) {
        let id = self.child.id().unwrap().to_string();
        let sent = Command::new("kill").args([signal, &id]).status().await;
        assert!(sent.unwrap().success());
    }

    /// What it has said since it serves; it has ended.
    async fn rest(&mut self) -> Vec<String> {
        let mut rest = Vec::new();
        while let Some(line) = self.said.next_line().await.unwrap() {
            rest.push(line);
        }
        rest
    }
}

/// Passes on what is sent to a broker, and what it sends, until it lets go of those connections that there are then: each side sees a
/// clean end, behind all that was sent.
async fn relay(broker: String) -> (SocketAddr, CancellationToken) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let let_go = CancellationToken::new();
    let until = let_go.clone();
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let until = match until.is_cancelled() {
                true => CancellationToken::new(),
                false => until.clone(),
            };
            let mut far = TcpStream::connect(&broker).await.unwrap();
            tokio::spawn(async move {
                let both = tokio::io::copy_bidirectional(&mut near, &mut far);
                let _ = until.run_until_cancelled(both).await;
                drop(far);
                let _ = near.shutdown().await;
                let _ = tokio::io::copy(&mut near, &mut tokio::io::sink()).await;
            });
        }
    });
    (address, let_go)
}

/// Sends requests to a server that stands still, which the broker has given all of them then.
async fn fill(bench: &Bench, service: &str) {
    let client = bench.client().await;
    for _ in 0..REQUESTS {
        client.notify_raw(service, "").await.unwrap();
    }
    bench.messages(service, 0).await;
}

/// A server that tells of each request, and does nothing else.
fn telling(transport: Arc<AmqpTransport>, service: &str) -> (Server, mpsc::UnboundedReceiver<()>) {
    let (tell, told) = mpsc::unbounded_channel();
    let server =
        Server::new(transport)
            .prefetch(2 * REQUESTS)
            .handle_raw(service, move |_: Bytes| {
                tell.send(()).unwrap();
                async { Ok::<_, Fault>("") }
            });
    (server, told)
}

async fn all(told: &mut mpsc::UnboundedReceiver<()>) {
    for _ in 0..REQUESTS {
        told.recv().await.unwrap();
    }
}

pub(crate) async fn an_owner_that_was_frozen_starts_nothing_of_its_successors(bench: Bench) {
    let service = fresh("frozen-owner");
    let mut owner = Frozen::start(bench.broker.url(), 1, &service, "owner").await;
    fill(&bench, &service).await;
    let (newcomer, mut ran) = telling(bench.connect().await, &service);
    let _newcomer = newcomer.take_over().start().await.unwrap();
    all(&mut ran).await;
    owner.signal("-CONT").await;
    assert_eq!(owner.rest().await, ["over: AlreadyOwned"]);
    assert!(ran.try_recv().is_err(), "each ran once");
}

/// As when its broker closes its connection, which in truth takes as long as it takes the owner to find out by itself.
pub(crate) async fn an_owner_that_was_frozen_does_not_believe_its_buffers(bench: Bench) {
    let service = fresh("frozen-buffers");
    let (address, let_go) = relay(bench.broker.authority()).await;
    let url = replace_authority(bench.broker.url(), address);
    let mut owner = Frozen::start(&url, 4, &service, "owner").await;
    let since = Instant::now();
    fill(&bench, &service).await;
    let_go.cancel();
    let (newcomer, mut ran) = telling(bench.connect().await, &service);
    let _newcomer = newcomer.take_over().start().await.unwrap();
    all(&mut ran).await;
    // Longer than half a heartbeat, and shorter than two, after which it asks nobody.
    tokio::time::sleep_until(since + Duration::from_millis(2500)).await;
    assert!(since.elapsed() < Duration::from_secs(7), "{since:?}");
    owner.signal("-CONT").await;
    assert_eq!(owner.rest().await, ["over: AlreadyOwned"]);
    assert!(ran.try_recv().is_err(), "each ran once");
}

pub(crate) async fn a_server_that_was_frozen_leaves_its_requests_to_others(bench: Bench) {
    let service = fresh("frozen");
    let mut frozen = Frozen::start(bench.broker.url(), 1, &service, "one").await;
    fill(&bench, &service).await;
    let (other, mut ran) = telling(bench.connect().await, &service);
    let _other = other.start().await.unwrap();
    all(&mut ran).await;
    let plain = bench.plain().await;
    let serve = async |servers: u32| {
        eventually(&format!("{servers} serve"), async || {
            plain.look(&service).await.unwrap().consumer_count() == servers
        })
        .await;
    };
    serve(1).await;
    frozen.signal("-CONT").await;
    // It is back, and was done with all else before.
    serve(2).await;
    frozen.child.start_kill().unwrap();
    assert_eq!(frozen.rest().await, [""; 0]);
    assert!(ran.try_recv().is_err(), "each ran once");
}

/// Runs it on a runtime of its own, which it may hold up.
fn on_its_own_thread(
    run: impl Future<Output = ()> + Send + 'static,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(run);
    })
}

/// Its runtime stands still for longer than it may be sure, and the broker waits for longer than that: it asks, and goes on.
pub(crate) async fn a_server_that_hung_for_a_while_goes_on(bench: Bench) {
    let service = fresh("hung");
    let mut config = bench.config();
    config.heartbeat = Duration::from_secs(4);
    let (started, is_started) = oneshot::channel();
    let (hang, hangs) = std::sync::mpsc::channel::<()>();
    let (stop, stopped) = oneshot::channel::<()>();
    let served = service.clone();
    let (ran, mut has_run) = oneshot::channel();
    let hanging = on_its_own_thread(async move {
        let transport = Arc::new(AmqpTransport::connect(config).await.unwrap());
        let (server, mut told) = telling(transport, &served);
        let server = server.start().await.unwrap();
        started.send(()).unwrap();
        let _ = hangs.recv();
        all(&mut told).await;
        ran.send(()).unwrap();
        let _ = stopped.await;
        assert!(told.try_recv().is_err(), "each ran once");
        server.shutdown().await.unwrap();
    });
    is_started.await.unwrap();
    let since = Instant::now();
    fill(&bench, &service).await;
    tokio::time::sleep_until(since + Duration::from_secs(3)).await;
    assert!(has_run.try_recv().is_err(), "it stands still");
    drop(hang);
    let has_run = tokio::time::timeout(PROMPT, has_run).await;
    has_run.expect("it goes on").unwrap();
    drop(stop);
    hanging.join().unwrap();
}

/// Its runtime stands still, and so do the heartbeats of its connections, which the broker ends then. Its first request does that, and the
/// others are with it already.
pub(crate) async fn a_newcomer_gets_the_service_of_an_owner_that_hangs(bench: Bench) {
    let service = fresh("hangs");
    let mut config = bench.config();
    config.heartbeat = Duration::from_secs(1);
    let client = bench.client().await;
    // The queue is there once it was served.
    bench.fib(&service).await.shutdown().await.unwrap();
    for _ in 0..REQUESTS {
        client.notify_raw(&service, "").await.unwrap();
    }
    let (over, is_over) = oneshot::channel();
    let (hangs, mut does_hang) = mpsc::unbounded_channel();
    let (release, released) = std::sync::mpsc::channel::<()>();
    let released = Arc::new(Mutex::new(released));
    let served = service.clone();
    let hanging = on_its_own_thread(async move {
        let transport = Arc::new(AmqpTransport::connect(config).await.unwrap());
        let server = Server::new(transport)
            .exclusive()
            .prefetch(2 * REQUESTS)
            .handle_raw(&served, move |_: Bytes| {
                hangs.send(()).unwrap();
                // As long as the case at the most: it ends its sender.
                let _ = released.lock().unwrap().recv();
                async { Ok::<_, Fault>("owner") }
            });
        let mut server = server.start().await.unwrap();
        over.send(server.over().await.kind()).unwrap();
    });
    does_hang.recv().await.unwrap();
    bench.messages(&service, 0).await;
    let (newcomer, mut ran) = telling(bench.connect().await, &service);
    let since = Instant::now();
    let _newcomer = newcomer.take_over().start().await.unwrap();
    // Three heartbeats, and the grace and the two seconds in which it could have handed over.
    assert!(
        since.elapsed() < Duration::from_secs(8),
        "{:?}",
        since.elapsed()
    );
    all(&mut ran).await;
    drop(release);
    assert_eq!(is_over.await.unwrap(), ErrorKind::AlreadyOwned);
    hanging.join().unwrap();
    assert!(does_hang.try_recv().is_err(), "it started another one");
    assert!(ran.try_recv().is_err(), "each ran once");
}
