//! A private broker, and short ways to use it.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test target uses its own part"
)]

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use antiphon_core::transport::{
    Delivery, Inbox, InboxEvent, Incoming, Outbound, Subscription, SubscriptionEvent,
};
use antiphon_core::{
    Deadline, Error, Reply, ReplyAddress, Request, ServiceName, Ticket, Transport,
};
use antiphon_redis::{RedisConfig, RedisTransport};
use tokio::time::timeout;

/// No step of a test takes longer.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How long a request of a test lives.
pub const BUDGET: Duration = Duration::from_secs(20);

/// Of those who connect by [`connect`].
pub const LEASE: Duration = Duration::from_millis(600);

/// A Redis server: a private process, or the one that the environment names.
pub struct Broker {
    pub url: String,
    process: Option<(Child, PathBuf)>,
    arguments: Vec<String>,
}

impl Broker {
    /// The server of `ANTIPHON_REDIS_URL`, else a private one; `None`, with the reason printed, if there is neither.
    pub async fn any() -> Option<Self> {
        match std::env::var("ANTIPHON_REDIS_URL") {
            Ok(url) => Some(Self {
                url,
                process: None,
                arguments: Vec::new(),
            }),
            Err(_) => Self::private(&[]).await,
        }
    }

    /// A private server; `None`, with the reason printed, if there is no `redis-server`.
    pub async fn private(arguments: &[&str]) -> Option<Self> {
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let directory =
            std::env::temp_dir().join(format!("antiphon-redis-{}-{port}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let arguments: Vec<String> = [
            "--port",
            &port.to_string(),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
        ]
        .iter()
        .copied()
        .chain(arguments.iter().copied())
        .map(str::to_owned)
        .collect();
        let Ok(process) = spawn(&arguments, &directory) else {
            std::fs::remove_dir_all(&directory).unwrap();
            let required =
                std::env::var("ANTIPHON_REQUIRE_BROKERS").is_ok_and(|value| value == "1");
            assert!(
                !required,
                "ANTIPHON_REQUIRE_BROKERS is set, and there is no redis-server"
            );
            println!("not run: no redis-server is installed, and ANTIPHON_REDIS_URL is not set");
            return None;
        };
        let broker = Self {
            url: format!("redis://127.0.0.1:{port}"),
            process: Some((process, directory)),
            arguments,
        };
        broker.is_up().await;
        Some(broker)
    }

    pub fn config(&self) -> RedisConfig {
        RedisConfig::from_url(&self.url).unwrap()
    }

    pub async fn connect(&self) -> RedisTransport {
        RedisTransport::connect(self.config()).await.unwrap()
    }

    /// A plain connection, to look and to meddle.
    pub async fn plain(&self) -> redis::aio::MultiplexedConnection {
        let client = redis::Client::open(self.url.as_str()).unwrap();
        let config = redis::AsyncConnectionConfig::new().set_response_timeout(Some(PATIENCE));
        client
            .get_multiplexed_async_connection_with_config(&config)
            .await
            .unwrap()
    }

    /// Kills the process, and starts it again with nothing in its memory.
    pub async fn restart(&mut self, pause: Duration) {
        self.restart_with(tokio::time::sleep(pause)).await;
    }

    /// Kills the process, and starts it again after `meanwhile`.
    pub async fn restart_with(&mut self, meanwhile: impl Future<Output = ()>) {
        let (process, directory) = self.process.as_mut().expect("a private server");
        process.kill().unwrap();
        process.wait().unwrap();
        meanwhile.await;
        *process = spawn(&self.arguments, directory).unwrap();
        self.is_up().await;
    }

    /// Sends the process a signal.
    pub fn signal(&self, name: &str) {
        let id = self
            .process
            .as_ref()
            .expect("a private server")
            .0
            .id()
            .to_string();
        assert!(
            Command::new("kill")
                .args([name, &id])
                .status()
                .unwrap()
                .success()
        );
    }

    async fn is_up(&self) {
        let client = redis::Client::open(self.url.as_str()).unwrap();
        within("the server starts", async {
            while client.get_multiplexed_async_connection().await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if let Some((process, directory)) = &mut self.process {
            let _ = process.kill();
            let _ = process.wait();
            let _ = std::fs::remove_dir_all(directory);
        }
    }
}

fn spawn(arguments: &[String], directory: &PathBuf) -> std::io::Result<Child> {
    Command::new("redis-server")
        .args(arguments)
        .current_dir(directory)
        .stdout(Stdio::null())
        .spawn()
}

/// Connects with a short lease.
pub async fn connect(broker: &Broker) -> RedisTransport {
    let mut config = broker.config();
    config.lease = LEASE;
    RedisTransport::connect(config).await.unwrap()
}

/// Bounds a step.
pub async fn within<T>(step: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("{step}: it took longer than {PATIENCE:?}"))
}

/// A service that nobody else uses.
pub fn fresh_service() -> ServiceName {
    ServiceName::new(&format!("t-{}", uuid::Uuid::new_v4().simple())).unwrap()
}

pub fn request(
    reply_to: &ReplyAddress,
    budget: Duration,
    body: impl Into<bytes::Bytes>,
) -> Request {
    let mut request = Request::new(Deadline::after(budget), body);
    request.reply_to = Some(reply_to.clone());
    request
}

pub async fn send(
    transport: &RedisTransport,
    service: &ServiceName,
    request: Request,
) -> Result<(), Error> {
    let (service, ticket) = (service.clone(), Ticket::new());
    within(
        "send",
        transport.send(Outbound::Request {
            service,
            request: request.into(),
            expect_responder: false,
            ticket,
        }),
    )
    .await
}

/// The next deliveries.
pub async fn deliveries(subscription: &mut dyn Subscription) -> Vec<Delivery> {
    match within("a delivery", subscription.recv()).await {
        SubscriptionEvent::Deliveries(deliveries) => deliveries,
        other => panic!("{other:?}"),
    }
}

/// The next delivery, which is alone.
pub async fn delivery(subscription: &mut dyn Subscription) -> Delivery {
    let mut deliveries = deliveries(subscription).await;
    assert_eq!(deliveries.len(), 1);
    deliveries.remove(0)
}

/// The next reply, which is alone.
pub async fn reply(inbox: &mut dyn Inbox) -> Reply {
    match within("a reply", inbox.recv()).await {
        InboxEvent::Replies(mut replies) if replies.len() == 1 => match replies.remove(0) {
            Incoming::Reply(reply) => std::sync::Arc::unwrap_or_clone(reply),
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    }
}
