//! Redis over TLS: who is trusted, and what is said of it.
#![cfg(feature = "rustls")]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use antiphon_conformance::brokers::{self, Broker, BrokerKind, BrokerOptions, Certificates};
use antiphon_core::{Error, ErrorKind, Executed, Transport};
use antiphon_redis::{RedisConfig, RedisTransport};

/// What cannot work is told within this time, which is far below that of connecting.
const AT_ONCE: Duration = Duration::from_secs(3);

/// A private server with TLS; `None`, with the reason printed, if there is none.
async fn broker(certificates: &Certificates, clients: &str) -> Option<Broker> {
    let options = BrokerOptions::new(BrokerKind::Redis)
        .tls(certificates)
        .setting("tls-auth-clients", clients);
    match brokers::start(options).await {
        Ok(broker) => Some(broker),
        Err(missing) if missing.is_failure() => panic!("{missing}"),
        Err(missing) => {
            println!("not run: {missing}");
            None
        }
    }
}

fn config(url: &str) -> RedisConfig {
    RedisConfig::from_url(url).unwrap()
}

/// The error of a connection that cannot be made, which has to come at once.
async fn refusal(config: RedisConfig) -> Error {
    let begun = Instant::now();
    let error = RedisTransport::connect(config).await.err();
    let error = error.expect("a connection that cannot be made");
    let took = begun.elapsed();
    assert!(took < AT_ONCE, "{error:?} after {took:?}");
    assert_eq!(error.executed(), Executed::No);
    error
}

#[tokio::test]
async fn only_who_is_trusted_is_talked_to() {
    let certificates = Certificates::create().unwrap();
    let Some(broker) = broker(&certificates, "no").await else {
        return;
    };
    let url = broker.tls_url().unwrap();
    let mut trusting = config(&url);
    trusting.ca_file = Some(certificates.ca_file());
    let transport = RedisTransport::connect(trusting).await.unwrap();
    transport.close().await;

    let stranger = refusal(config(&url)).await;
    assert_eq!(stranger.kind(), ErrorKind::Connect);
    assert!(stranger.message().contains("certificate"), "{stranger:?}");

    let others = Certificates::create().unwrap();
    let mut other = config(&url);
    other.ca_file = Some(others.ca_file());
    assert_eq!(refusal(other).await.kind(), ErrorKind::Connect);
}

#[tokio::test]
async fn the_wrong_port_is_told() {
    let certificates = Certificates::create().unwrap();
    let Some(broker) = broker(&certificates, "no").await else {
        return;
    };
    let authority = broker.tls_authority().unwrap();
    let plain = refusal(config(&format!("redis://{authority}"))).await;
    assert_eq!(plain.kind(), ErrorKind::Connect);
    let mut secure = config(&format!("rediss://{}", broker.authority()));
    secure.ca_file = Some(certificates.ca_file());
    // Redis waits for the end of what it takes for a line.
    secure.connect_timeout = Duration::from_secs(1);
    assert_eq!(refusal(secure).await.kind(), ErrorKind::Connect);
}

#[tokio::test]
async fn a_client_shows_its_certificate() {
    let certificates = Certificates::create().unwrap();
    let Some(broker) = broker(&certificates, "yes").await else {
        return;
    };
    // As it is written where there is nothing but a URL.
    let url = |files: &[(&str, PathBuf)]| {
        let files = files
            .iter()
            .map(|(name, file)| format!("{name}={}", file.display()));
        let files: Vec<_> = files.collect();
        format!("{}/?{}", broker.tls_url().unwrap(), files.join("&"))
    };
    let ca = ("ca_file", certificates.ca_file());
    let nameless = refusal(config(&url(std::slice::from_ref(&ca)))).await;
    assert_eq!(nameless.kind(), ErrorKind::Connect);
    let named = url(&[
        ca,
        ("certificate_file", certificates.client_certificate_file()),
        ("key_file", certificates.client_key_file()),
    ]);
    let transport = RedisTransport::connect(config(&named)).await.unwrap();
    transport.close().await;
}

/// Nobody listens there: it is told before anything is sent.
#[tokio::test]
async fn files_of_no_use_are_told_before_connecting() {
    let certificates = Certificates::create().unwrap();
    let others = Certificates::create().unwrap();
    let nowhere = || config("rediss://127.0.0.1:1");
    let (mut missing, mut empty, mut half) = (nowhere(), nowhere(), nowhere());
    missing.ca_file = Some(certificates.ca_file().with_extension("none"));
    empty.ca_file = Some(certificates.client_key_file());
    half.key_file = Some(certificates.client_key_file());
    let mut foreign = nowhere();
    foreign.certificate_file = Some(certificates.client_certificate_file());
    foreign.key_file = Some(others.client_key_file());
    let mut plain = config("redis://127.0.0.1:1");
    plain.ca_file = Some(certificates.ca_file());
    for config in [missing, empty, half, foreign, plain] {
        let shown = format!("{config:?}");
        let error = refusal(config).await;
        assert_eq!(error.kind(), ErrorKind::Invalid, "{shown}: {error:?}");
    }
    assert_eq!(refusal(nowhere()).await.kind(), ErrorKind::Connect);
}

/// A pipe that nobody writes to, as a mount whose server is gone. Its reader is not to keep the runtime from ending either.
#[cfg(unix)]
#[tokio::test]
async fn a_file_that_does_not_end_is_given_up() {
    let certificates = Certificates::create().unwrap();
    let pipe = certificates.ca_file().with_extension("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    let mut config = config("rediss://127.0.0.1:1");
    config.ca_file = Some(pipe);
    config.connect_timeout = Duration::from_millis(300);
    let (told, ended) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let connected = runtime.block_on(RedisTransport::connect(config));
        drop(runtime);
        let _ = told.send(connected.err());
    });
    let error = tokio::time::timeout(AT_ONCE, ended).await;
    let error = error.expect("an end in time").unwrap();
    let error = error.expect("a connection that cannot be made");
    assert_eq!(error.kind(), ErrorKind::Connect, "{error:?}");
    assert_eq!(error.executed(), Executed::No);
}
