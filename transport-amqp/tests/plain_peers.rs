//! Plain AMQP programs, as the RabbitMQ tutorial has them, against our server and our client. They are in Python, with pika.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use antiphon_amqp::{AmqpConfig, AmqpTransport};
use antiphon_conformance::brokers::{self, Broker, BrokerKind, BrokerOptions};
use antiphon_core::{Client, ClientConfig, Code, ErrorKind, Fault, Server};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// No step takes longer.
const PATIENCE: Duration = Duration::from_secs(30);

/// A broker and a Python that has pika; `None`, with the reason printed, if one of them is missing.
async fn set_up() -> Option<(Broker, String)> {
    let python = std::env::var("ANTIPHON_PYTHON").unwrap_or_else(|_| "python3".into());
    let has_pika = Command::new(&python)
        .args(["-c", "import pika"])
        .stderr(Stdio::null())
        .status()
        .await;
    if !has_pika.is_ok_and(|status| status.success()) {
        assert!(
            !brokers::required(),
            "{python} has no pika, and ANTIPHON_REQUIRE_BROKERS is set"
        );
        println!("not run: {python} has no pika");
        return None;
    }
    match brokers::start(BrokerOptions::new(BrokerKind::RabbitMq)).await {
        Ok(broker) => Some((broker, python)),
        Err(unavailable) => {
            assert!(!unavailable.is_failure(), "{unavailable}");
            println!("not run: {unavailable}");
            None
        }
    }
}

async fn transport(broker: &Broker) -> Arc<AmqpTransport> {
    let config = AmqpConfig::from_url(broker.url()).unwrap();
    Arc::new(AmqpTransport::connect(config).await.unwrap())
}

/// A Python program of this folder, killed when it is dropped.
fn peer(python: &str, program: &str, arguments: &[&str]) -> Child {
    let program = format!("{}/tests/peers/{program}", env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new(python);
    command
        .arg(program)
        .args(arguments)
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

async fn output(peer: Child) -> String {
    let output = timeout(PATIENCE, peer.wait_with_output())
        .await
        .expect("the peer ends")
        .unwrap();
    assert!(
        output.status.success(),
        "the peer failed: {}",
        output.status
    );
    String::from_utf8(output.stdout).unwrap()
}

async fn fib(n: u64) -> Result<u64, Fault> {
    if n > 93 {
        return Err(Fault::new(Code::OutOfRange, "n is above 93"));
    }
    Ok((0..n)
        .fold((0_u64, 1_u64), |(this, next), _| {
            (next, this.wrapping_add(next))
        })
        .0)
}

#[tokio::test]
async fn peers_of_the_tutorial() {
    let Some((broker, python)) = set_up().await else {
        return;
    };
    plain_clients_are_answered(&broker, &python).await;
    a_plain_server_is_understood(&broker, &python).await;
}

/// By an exclusive queue of the broker's naming, and by direct reply-to; a fault is its body.
async fn plain_clients_are_answered(broker: &Broker, python: &str) {
    let server = Server::new(transport(broker).await)
        .handle("fib", fib)
        .start()
        .await
        .unwrap();
    let asked = [broker.url(), "fib", "30", "93", "94", "no number"];
    let fault = |code, message| format!(r#"{{"error":{{"code":"{code}","message":"{message}"}}}}"#);
    for how in [&[][..], &["--direct"]] {
        let answers = output(peer(python, "rpc_client.py", &[&asked, how].concat())).await;
        let answers: Vec<&str> = answers.lines().collect();
        assert_eq!(answers[..2], ["832040", "12200160415121876738"]);
        assert_eq!(answers[2], fault("out_of_range", "n is above 93"));
        assert!(
            answers[3].starts_with(r#"{"error":{"code":"invalid_argument""#),
            "{}",
            answers[3]
        );
    }
    server.shutdown().await.unwrap();
}

/// It only echoes the correlation id, and declares its queue itself.
async fn a_plain_server_is_understood(broker: &Broker, python: &str) {
    let mut server = peer(python, "rpc_server.py", &[broker.url(), "rpc_queue", "2"]);
    let stdout = server.stdout.take().unwrap();
    let ready = timeout(PATIENCE, BufReader::new(stdout).lines().next_line())
        .await
        .expect("the peer is ready");
    assert_eq!(ready.unwrap().as_deref(), Some("ready"));

    let client = Client::open(transport(broker).await, ClientConfig::default())
        .await
        .unwrap();
    let answer: u64 = client
        .call("rpc_queue", &30)
        .expect_responder()
        .await
        .unwrap();
    assert_eq!(answer, 832_040);
    let wrong: Result<Vec<u64>, _> = client.call("rpc_queue", &10).await;
    assert_eq!(wrong.unwrap_err().kind(), ErrorKind::BadReply);
    assert_eq!(client.stats().unknown, 0);
    assert!(
        timeout(PATIENCE, server.wait())
            .await
            .expect("the peer ends")
            .unwrap()
            .success()
    );
}
