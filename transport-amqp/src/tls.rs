//! TLS: whom to trust, and who we are.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use antiphon_core::{Error, ErrorKind};
use futures_io::{AsyncRead, AsyncWrite};
use lapin::tcp::{AsyncTcpStream, RustlsConnector, RustlsConnectorConfig};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::oneshot;

use crate::config::{AmqpConfig, invalid};

/// What is in the files that the configuration names, or else what the platform trusts.
#[derive(Clone)]
pub(crate) struct Tls(Arc<RustlsConnector>);

impl Tls {
    /// Reads and checks the files; `None` if the address asks for no TLS.
    ///
    /// # Errors
    /// `Invalid` if one cannot be read, or is not what it should be; `Connect` if none says whom to trust, and the platform trusts nobody.
    pub(crate) async fn read(config: &AmqpConfig) -> Result<Option<Self>, Error> {
        if !config.is_secure() {
            return Ok(None);
        }
        let config = config.clone();
        let (told, read) = oneshot::channel();
        // A file may be on a mount whose server is gone. A thread of its own, as the runtime would wait for one of its pool when it ends.
        let reader = thread::Builder::new().name("antiphon-tls".to_owned());
        let started = reader.spawn(move || {
            // Who no longer waits for it has been told.
            let _ = told.send(connector(&config));
        });
        started.map_err(|error| connect(format!("no thread to read files: {error}")))?;
        let connector = read.await;
        let connector = connector.map_err(|_| connect("the files were not read"))??;
        Ok(Some(Self(Arc::new(connector))))
    }

    /// Puts TLS around the stream.
    ///
    /// # Errors
    /// The peer does not speak TLS, or is not who it should be.
    pub(crate) async fn wrap<S>(
        &self,
        host: &str,
        stream: AsyncTcpStream<S>,
    ) -> io::Result<AsyncTcpStream<S>>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let wrapped = stream.into_rustls(&self.0, host).await;
        wrapped.map_err(|error| io::Error::new(error.kind(), format!("TLS: {error}")))
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

fn connector(config: &AmqpConfig) -> Result<RustlsConnector, Error> {
    let trusted = match &config.ca_file {
        Some(file) => RustlsConnectorConfig::default()
            .with_parsable_certificates(certificates("ca_file", file)?),
        None => RustlsConnectorConfig::new_with_platform_verifier(),
    };
    let untrusting = |error: io::Error| match &config.ca_file {
        Some(file) => invalid(format!("the ca_file {}: {error}", file.display())),
        None => connect(format!("whom the platform trusts is not known: {error}")),
    };
    let Some((certificate, key)) = config
        .certificate_file
        .as_ref()
        .zip(config.key_file.as_ref())
    else {
        return trusted.connector_with_no_client_auth().map_err(untrusting);
    };
    let chain = certificates("certificate_file", certificate)?;
    let named = key.display();
    let key = PrivateKeyDer::from_pem_slice(&contents("key_file", key)?)
        .map_err(|error| invalid(format!("no key in the key_file {named}: {error}")))?;
    let connector = trusted.clone().connector_with_single_cert(chain, key);
    // Both of it come as one error.
    connector.map_err(|error| match trusted.connector_with_no_client_auth() {
        Err(error) => untrusting(error),
        Ok(_) => {
            let certificate = certificate.display();
            invalid(format!(
                "the certificate_file {certificate} and the key_file {named}: {error}"
            ))
        }
    })
}

fn certificates(name: &str, file: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let pem = contents(name, file)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(invalid(format!(
            "the {name} {} has no certificates in PEM",
            file.display()
        ))),
    }
}

fn contents(name: &str, file: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(file).map_err(|error| {
        let file = file.display();
        invalid(format!("the {name} {file} cannot be read: {error}"))
    })
}

fn connect(message: impl Into<String>) -> Error {
    Error::not_executed(ErrorKind::Connect, message)
}
