//! TLS: whom to trust, and who we are.

use std::io;
use std::sync::Arc;

use antiphon_core::Error;
use redis::{Client, ClientTlsConfig, ConnectionInfo, TlsCertificates};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use rustls_native_certs::load_native_certs;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::config::{RedisConfig, invalid};

/// What is in the files that the configuration names.
#[derive(Debug, Default)]
pub(crate) struct Tls {
    /// `None` for whom the platform trusts.
    trusted: Option<Vec<CertificateDer<'static>>>,
    identity: Option<Identity>,
}

/// A certificate and those above it, and the key of the first.
type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// What is in the files that the configuration names, for us and, in the address, for the redis crate. They are read and checked here.
pub(crate) fn secure(
    config: &RedisConfig,
    info: ConnectionInfo,
) -> Result<(ConnectionInfo, Tls), Error> {
    // The process's own cryptography is used, and rustls panics if nobody chose any. An error says that somebody did meanwhile.
    if CryptoProvider::get_default().is_none() {
        let _ = aws_lc_rs::default_provider().install_default();
    }
    let read = |name: &str, file: &Option<_>| {
        let read = file.as_ref().map(std::fs::read).transpose();
        read.map_err(|error| invalid(&format!("the {name} cannot be read: {error}")))
    };
    let root_cert = read("ca_file", &config.ca_file)?;
    let certificate = read("certificate_file", &config.certificate_file)?;
    let files = certificate.zip(read("key_file", &config.key_file)?);
    let trusted = root_cert.as_ref();
    let tls = Tls {
        trusted: trusted
            .map(|pem| certificates("ca_file", pem))
            .transpose()?,
        identity: files
            .as_ref()
            .map(|(certificate, key)| identity(certificate, key))
            .transpose()?,
    };
    if root_cert.is_none() && files.is_none() {
        return Ok((info, tls));
    }
    let files = TlsCertificates {
        client_tls: files.map(|(client_cert, client_key)| ClientTlsConfig {
            client_cert,
            client_key,
        }),
        root_cert,
    };
    let client = Client::build_with_tls(info, files)
        .map_err(|error| invalid(&format!("the ca_file is of no use: {error}")))?;
    Ok((client.get_connection_info().clone(), tls))
}

impl Tls {
    /// Shakes hands with the server.
    pub(crate) async fn wrap(
        &self,
        host: &str,
        stream: TcpStream,
    ) -> io::Result<TlsStream<TcpStream>> {
        let config = self.client_config().map_err(io::Error::other)?;
        let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        let connector = TlsConnector::from(Arc::new(config));
        connector.connect(name, stream).await
    }

    fn client_config(&self) -> Result<ClientConfig, Box<dyn std::error::Error + Send + Sync>> {
        let trusted = match &self.trusted {
            Some(trusted) => trusted.clone(),
            None => {
                let mut found = load_native_certs();
                if let Some(error) = found.errors.pop() {
                    return Err(error.into());
                }
                found.certs
            }
        };
        let mut roots = RootCertStore::empty();
        for certificate in trusted {
            roots.add(certificate)?;
        }
        let config = ClientConfig::builder().with_root_certificates(roots);
        Ok(match &self.identity {
            Some((chain, key)) => config.with_client_auth_cert(chain.clone(), key.clone_key())?,
            None => config.with_no_client_auth(),
        })
    }
}

/// The certificate and the key, once they are known to belong together.
fn identity(certificate: &[u8], key: &[u8]) -> Result<Identity, Error> {
    let chain = certificates("certificate_file", certificate)?;
    let key = PrivateKeyDer::from_pem_slice(key)
        .map_err(|error| invalid(&format!("no key in the key_file: {error}")))?;
    ClientConfig::builder()
        .with_root_certificates(RootCertStore::empty())
        .with_client_auth_cert(chain.clone(), key.clone_key())
        .map_err(|error| invalid(&format!("certificate_file and key_file: {error}")))?;
    Ok((chain, key))
}

fn certificates(name: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(invalid(&format!("the {name} has no certificates in PEM"))),
    }
}
