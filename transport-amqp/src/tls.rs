//! TLS: whom to trust, and who we are.

use std::io;

use antiphon_core::Error;
use futures_io::{AsyncRead, AsyncWrite};
use lapin::tcp::{AsyncTcpStream, RustlsConnector, RustlsConnectorConfig};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::config::{AmqpConfig, invalid};

/// Puts TLS around the stream, if the address asks for that.
///
/// # Errors
/// The peer does not speak TLS, or is not who it should be; the files that the configuration names are of no use any more.
pub(crate) async fn wrap<S>(
    config: &AmqpConfig,
    stream: AsyncTcpStream<S>,
) -> io::Result<AsyncTcpStream<S>>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    if !config.is_secure() {
        return Ok(stream);
    }
    let connector = connector(config).map_err(io::Error::other)?;
    let wrapped = stream.into_rustls(&connector, config.host()).await;
    wrapped.map_err(|error| io::Error::new(error.kind(), format!("TLS: {error}")))
}

/// Makes connections secure, by the files that the configuration names. They are read and checked here.
pub(crate) fn connector(config: &AmqpConfig) -> Result<RustlsConnector, Error> {
    let read = |name: &str, file: &Option<_>| {
        let read = file.as_ref().map(std::fs::read).transpose();
        read.map_err(|error| invalid(format!("the {name} cannot be read: {error}")))
    };
    let trusted = match read("ca_file", &config.ca_file)? {
        Some(pem) => RustlsConnectorConfig::default()
            .with_parsable_certificates(certificates("ca_file", &pem)?),
        None => RustlsConnectorConfig::new_with_platform_verifier(),
    };
    let certificate = read("certificate_file", &config.certificate_file)?;
    let connector = match certificate.zip(read("key_file", &config.key_file)?) {
        Some((certificate, key)) => {
            let chain = certificates("certificate_file", &certificate)?;
            let key = PrivateKeyDer::from_pem_slice(&key)
                .map_err(|error| invalid(format!("no key in the key_file: {error}")))?;
            trusted.connector_with_single_cert(chain, key)
        }
        None => trusted.connector_with_no_client_auth(),
    };
    connector.map_err(|error| invalid(format!("ca_file, certificate_file and key_file: {error}")))
}

fn certificates(name: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(invalid(format!("the {name} has no certificates in PEM"))),
    }
}
