//! What the platform trusts, when it trusts nobody. It says so by the environment, which a process is given once.
#![cfg(all(feature = "rustls", unix, not(target_vendor = "apple")))]

use std::process::Command;

use antiphon_amqp::{AmqpConfig, AmqpTransport};
use antiphon_core::ErrorKind;

/// Names a file with the certificates that the platform trusts.
const TRUSTED: &str = "SSL_CERT_FILE";

const NONE: &str = "/nonexistent/trusted.pem";

#[test]
fn a_platform_that_trusts_nobody_is_told_as_such() {
    if std::env::var(TRUSTED).as_deref() != Ok(NONE) {
        let this = std::env::current_exe().unwrap();
        let mut command = Command::new(this);
        command.env(TRUSTED, NONE).env("SSL_CERT_DIR", NONE);
        assert!(command.status().unwrap().success());
        return;
    }
    let config = AmqpConfig::from_url("amqps://127.0.0.1:1").unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let error = runtime.block_on(AmqpTransport::connect(config)).err();
    let error = error.expect("a connection that cannot be made");
    assert_eq!(error.kind(), ErrorKind::Connect, "{error:?}");
    let message = error.message();
    assert!(
        message.contains("platform") && !message.contains("_file"),
        "{message}"
    );
}
