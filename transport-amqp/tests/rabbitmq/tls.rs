//! RabbitMQ over TLS: who is trusted, and what is said of it.

use std::time::{Duration, Instant};

use antiphon_amqp::{AmqpConfig, AmqpTransport};
use antiphon_conformance::brokers::Certificates;
use antiphon_conformance::proxy::{Proxy, replace_authority};
use antiphon_core::{ConnectionState, Error, ErrorKind, Executed, Transport};
use tokio::time::timeout;

use crate::bench::Bench;
use crate::{NotRun, Verdict};

/// What cannot work is told within this time, which is far below that of connecting.
const AT_ONCE: Duration = Duration::from_secs(5);

fn config(url: &str) -> AmqpConfig {
    AmqpConfig::from_url(url).unwrap()
}

/// The URL for TLS, and whom to trust there.
fn tls(bench: &Bench) -> Result<(String, &Certificates), NotRun> {
    let url = bench.broker.tls_url();
    let tls = url.zip(bench.certificates.as_ref());
    tls.ok_or_else(|| NotRun("the broker has no TLS".to_owned()))
}

/// The error of a connection that cannot be made, which has to come at once.
async fn refusal(config: AmqpConfig) -> Error {
    let begun = Instant::now();
    let error = AmqpTransport::connect(config).await.err();
    let error = error.expect("a connection that cannot be made");
    let took = begun.elapsed();
    assert!(took < AT_ONCE, "{error:?} after {took:?}");
    assert_eq!(error.executed(), Executed::No);
    error
}

pub(crate) async fn only_who_is_trusted_is_talked_to(bench: Bench) -> Verdict {
    let (url, certificates) = tls(&bench)?;
    let mut trusting = config(&url);
    trusting.ca_file = Some(certificates.ca_file());
    let transport = AmqpTransport::connect(trusting).await.unwrap();
    transport.close().await;

    let stranger = refusal(config(&url)).await;
    assert_eq!(stranger.kind(), ErrorKind::Connect);
    assert!(stranger.message().contains("certificate"), "{stranger:?}");

    let others = Certificates::create().unwrap();
    let mut other = config(&url);
    other.ca_file = Some(others.ca_file());
    assert_eq!(refusal(other).await.kind(), ErrorKind::Connect);
    Ok(())
}

pub(crate) async fn the_wrong_port_is_told_at_once(bench: Bench) -> Verdict {
    let (_, certificates) = tls(&bench)?;
    let authority = bench.broker.tls_authority().unwrap_or_default();
    let plain = refusal(config(&format!("amqp://{authority}"))).await;
    assert_eq!(plain.kind(), ErrorKind::Connect);
    let mut secure = config(&format!("amqps://{}", bench.broker.authority()));
    secure.ca_file = Some(certificates.ca_file());
    assert_eq!(refusal(secure).await.kind(), ErrorKind::Connect);
    Ok(())
}

pub(crate) async fn a_client_shows_its_certificate(bench: Bench) -> Verdict {
    let (url, certificates) = tls(&bench)?;
    // As it is written where there is nothing but a URL.
    let url = format!(
        "{url}/?ca_file={}&certificate_file={}&key_file={}",
        certificates.ca_file().display(),
        certificates.client_certificate_file().display(),
        certificates.client_key_file().display(),
    );
    let transport = AmqpTransport::connect(config(&url)).await.unwrap();
    let seen = bench
        .ctl(&["list_connections", "peer_cert_subject"])
        .await?;
    let named = seen.lines().filter(|line| line.contains("CN=client"));
    assert_eq!(named.count(), 2, "both connections show it: {seen}");
    transport.close().await;
    Ok(())
}

/// Nobody listens there: it is told before anything is sent.
pub(crate) async fn files_of_no_use_are_told_before_connecting(_: Bench) {
    let certificates = Certificates::create().unwrap();
    let others = Certificates::create().unwrap();
    let nowhere = || config("amqps://127.0.0.1:1");
    let (mut missing, mut empty, mut half) = (nowhere(), nowhere(), nowhere());
    missing.ca_file = Some(certificates.ca_file().with_extension("none"));
    empty.ca_file = Some(certificates.client_key_file());
    half.key_file = Some(certificates.client_key_file());
    let mut foreign = nowhere();
    foreign.certificate_file = Some(certificates.client_certificate_file());
    foreign.key_file = Some(others.client_key_file());
    let mut plain = config("amqp://127.0.0.1:1");
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
pub(crate) async fn a_file_that_does_not_end_is_given_up(_: Bench) {
    let certificates = Certificates::create().unwrap();
    let pipe = certificates.ca_file().with_extension("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    let mut config = config("amqps://127.0.0.1:1");
    config.ca_file = Some(pipe);
    config.connect_timeout = Duration::from_millis(300);
    let (told, ended) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let connected = runtime.block_on(AmqpTransport::connect(config));
        drop(runtime);
        let _ = told.send(connected.err());
    });
    let error = timeout(AT_ONCE, ended).await.expect("an end in time");
    let error = error.unwrap().expect("a connection that cannot be made");
    assert_eq!(error.kind(), ErrorKind::Connect, "{error:?}");
    assert_eq!(error.executed(), Executed::No);
}

pub(crate) async fn files_that_go_bad_are_told(bench: Bench) -> Verdict {
    let (url, certificates) = tls(&bench)?;
    let authority = bench.broker.tls_authority().unwrap_or_default();
    let proxy = Proxy::start(authority).await.unwrap();
    let ours = certificates.ca_file().with_extension("ours");
    std::fs::copy(certificates.ca_file(), &ours).unwrap();
    let mut config = config(&replace_authority(&url, proxy.addr()));
    config.ca_file = Some(ours.clone());
    let transport = AmqpTransport::connect(config).await.unwrap();
    let mut state = transport.state();

    std::fs::write(&ours, "nothing of use").unwrap();
    proxy.cut().await;
    let told = state.wait_for(|state| {
        matches!(state, ConnectionState::Disconnected { reason } if reason.contains("ca_file"))
    });
    timeout(AT_ONCE, told).await.expect("the reason").unwrap();

    std::fs::copy(certificates.ca_file(), &ours).unwrap();
    let back = state.wait_for(|state| *state == ConnectionState::Connected);
    timeout(AT_ONCE, back).await.expect("the broker").unwrap();
    transport.close().await;
    Ok(())
}
