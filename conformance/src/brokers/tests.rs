//! The life of a broker, on each kind that this machine can provide.

use std::time::Duration;

use tokio::net::TcpStream;

use super::environment::{self, Source};
use super::*;
use crate::proxy::{Proxy, replace_authority};

const PATIENCE: Duration = Duration::from_secs(5);

/// A broker as the environment says, or none if the machine cannot provide it and need not.
async fn provided(options: BrokerOptions) -> Option<Broker> {
    match start(options).await {
        Ok(broker) => Some(broker),
        Err(missing) if missing.is_failure() => panic!("{missing}"),
        Err(missing) => {
            println!("not run: {missing}");
            None
        }
    }
}

/// The same for a broker that has to be ours.
async fn configured(options: BrokerOptions) -> Option<Broker> {
    let sources = environment::sources(options.kind).unwrap();
    if sources
        .iter()
        .any(|source| matches!(source, Source::Url(_)))
    {
        println!("not run: a broker that is given by URL cannot be configured");
        return None;
    }
    provided(options).await
}

async fn redis_command(broker: &Broker, command: &[&str]) -> String {
    let mut socket = TcpStream::connect(broker.authority()).await.unwrap();
    probe::ask(&mut socket, command).await.unwrap()
}

/// What every broker of ours does, if it is ours.
async fn lives(broker: &Broker) {
    println!("{} at {}", broker.name(), broker.url());
    assert!(
        broker
            .version()
            .is_some_and(|version| version.contains('.')),
        "{:?}",
        broker.version()
    );
    if let Err(error) = broker.stop(Stop::Graceful).await {
        assert_eq!(error.kind(), io::ErrorKind::Unsupported, "{error}");
        return println!("not run: {error}");
    }
    assert!(
        TcpStream::connect(broker.authority()).await.is_err(),
        "a stopped broker takes no connection"
    );
    assert_eq!(broker.pid(), None);
    broker.stop(Stop::Kill).await.unwrap();
    broker.resume().await.unwrap();
    broker.resume().await.unwrap();
    let pid = broker.pid();
    broker.restart(Stop::Kill).await.unwrap();
    if let Some(pid) = pid {
        assert_ne!(broker.pid(), Some(pid));
    }
    assert!(!broker.log_tail().await.is_empty());
    broker.freeze().await.unwrap();
    let frozen = probe::identify(broker.kind(), broker.url()).await;
    broker.thaw().await.unwrap();
    assert_eq!(frozen.unwrap_err().kind(), io::ErrorKind::TimedOut);
    probe::ready(broker.kind(), &broker.authority(), PATIENCE, || Ok(()))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_lives() {
    let Some(broker) = provided(BrokerOptions::new(BrokerKind::Redis)).await else {
        return;
    };
    lives(&broker).await;
    assert_eq!(
        broker.ctl(&["status"]).await.unwrap_err().kind(),
        io::ErrorKind::Unsupported
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn valkey_lives() {
    let Some(broker) = provided(BrokerOptions::new(BrokerKind::Valkey)).await else {
        return;
    };
    lives(&broker).await;
    assert_eq!(broker.kind(), BrokerKind::Valkey);
}

#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_lives() {
    let Some(broker) = provided(BrokerOptions::new(BrokerKind::RabbitMq)).await else {
        return;
    };
    lives(&broker).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rabbitmq_is_configured_and_controlled() {
    let options = BrokerOptions::new(BrokerKind::RabbitMq).setting("heartbeat", "17");
    let Some(broker) = configured(options).await else {
        return;
    };
    let heartbeat = broker.ctl(&["eval", "application:get_env(rabbit, heartbeat)."]);
    assert_eq!(heartbeat.await.unwrap().trim(), "{ok,17}");
    broker.ctl(&["add_vhost", "kept"]).await.unwrap();
    broker.restart(Stop::Graceful).await.unwrap();
    let hosts = broker.ctl(&["--silent", "list_vhosts"]).await.unwrap();
    assert!(hosts.lines().any(|host| host == "kept"), "{hosts}");
    let error = broker.ctl(&["no_such_command"]).await.unwrap_err();
    assert!(error.to_string().contains("no_such_command"), "{error}");
}

#[test]
fn brokers_can_be_driven_from_any_thread() {
    fn moves<T: Send>(_future: impl Fn(&'static Broker) -> T) {}
    moves(|broker| broker.ctl(&[]));
    moves(|broker| broker.restart(Stop::Kill));
    moves(|broker| broker.freeze());
    moves(|broker| broker.thaw());
    moves(|broker| broker.log_tail());
    fn starts<T: Send>(_future: impl Fn(BrokerOptions) -> T) {}
    starts(start);
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_is_configured() {
    let options = BrokerOptions::new(BrokerKind::Redis).setting("maxmemory", "7mb");
    let Some(broker) = configured(options).await else {
        return;
    };
    let memory = redis_command(&broker, &["INFO", "memory"]).await;
    assert!(memory.contains("maxmemory:7340032"), "{memory}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_durable_redis_forgets_nothing_when_it_is_killed() {
    let Some(broker) = configured(BrokerOptions::new(BrokerKind::Redis).durable()).await else {
        return;
    };
    let stored = redis_command(&broker, &["SET", "key", "kept"]).await;
    assert_eq!(stored, "+OK");
    broker.restart(Stop::Kill).await.unwrap();
    let value = redis_command(&broker, &["GET", "key"]).await;
    assert_eq!(value.trim_end(), "kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_stands_in_front_of_a_broker() {
    let Some(broker) = provided(BrokerOptions::new(BrokerKind::Redis)).await else {
        return;
    };
    let proxy = Proxy::start(broker.authority()).await.unwrap();
    let url = replace_authority(broker.url(), proxy.addr());
    assert_eq!(
        probe::identify(broker.kind(), &url)
            .await
            .unwrap()
            .version
            .as_deref(),
        broker.version()
    );
    proxy.blackhole();
    assert!(probe::identify(broker.kind(), &url).await.is_err());
}

#[tokio::test]
async fn a_dropped_process_leaves_nothing() {
    if !environment::sources(BrokerKind::Redis)
        .unwrap()
        .contains(&Source::Process)
    {
        return println!("not run: ANTIPHON_BROKERS leaves no processes");
    }
    let broker = match Broker::start(&BrokerOptions::new(BrokerKind::Redis), Source::Process).await
    {
        Ok(broker) => broker,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return println!("not run: {error}");
        }
        Err(error) => panic!("{error}"),
    };
    let pid = broker.pid().unwrap();
    let authority = broker.authority();
    drop(broker);
    assert!(TcpStream::connect(authority).await.is_err());
    assert!(process::signal(pid, "0").await.is_err());
}

#[test]
fn a_broker_may_outlive_its_runtime() {
    let runtime = || {
        tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .unwrap()
    };
    let first = runtime();
    let Some(broker) = first.block_on(configured(BrokerOptions::new(BrokerKind::Redis))) else {
        return;
    };
    drop(first);
    let authority = broker.authority();
    runtime().block_on(broker.restart(Stop::Kill)).unwrap();
    drop(broker);
    assert!(std::net::TcpStream::connect(authority).is_err());
}

#[tokio::test]
async fn a_server_that_does_not_start_says_why() {
    if process::find_program(&["redis-server"]).is_err() {
        return println!("not run: redis-server is not installed");
    }
    let options = BrokerOptions::new(BrokerKind::Redis).setting("no-such-setting", "1");
    let error = Broker::start(&options, Source::Process)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("no-such-setting"), "{error}");
}

#[tokio::test]
async fn a_url_where_nobody_listens_is_an_error() {
    let source = Source::Url(format!("redis://127.0.0.1:{}", free_port().unwrap()));
    let options = BrokerOptions::new(BrokerKind::Redis);
    assert_eq!(
        Broker::start(&options, source).await.unwrap_err().kind(),
        io::ErrorKind::ConnectionRefused
    );
}
