//! TLS: whom to trust, and who we are.

use antiphon_core::Error;
use redis::{Client, ClientTlsConfig, ConnectionInfo, TlsCertificates};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use crate::config::{RedisConfig, invalid};

/// The address, with what is in the files that the configuration names. They are read and checked here.
pub(crate) fn secure(config: &RedisConfig, info: ConnectionInfo) -> Result<ConnectionInfo, Error> {
    // The redis crate uses the process's own cryptography, and panics if nobody chose any. An error says that somebody did meanwhile.
    if CryptoProvider::get_default().is_none() {
        let _ = aws_lc_rs::default_provider().install_default();
    }
    let read = |name: &str, file: &Option<_>| {
        let read = file.as_ref().map(std::fs::read).transpose();
        read.map_err(|error| invalid(&format!("the {name} cannot be read: {error}")))
    };
    let root_cert = read("ca_file", &config.ca_file)?;
    if let Some(pem) = &root_cert {
        certificates("ca_file", pem)?;
    }
    let certificate = read("certificate_file", &config.certificate_file)?;
    let client_tls = match certificate.zip(read("key_file", &config.key_file)?) {
        Some((client_cert, client_key)) => Some(identity(client_cert, client_key)?),
        None => None,
    };
    if root_cert.is_none() && client_tls.is_none() {
        return Ok(info);
    }
    let files = TlsCertificates {
        client_tls,
        root_cert,
    };
    let client = Client::build_with_tls(info, files)
        .map_err(|error| invalid(&format!("the ca_file is of no use: {error}")))?;
    Ok(client.get_connection_info().clone())
}

/// The certificate and the key, once they are known to belong together.
fn identity(client_cert: Vec<u8>, client_key: Vec<u8>) -> Result<ClientTlsConfig, Error> {
    let chain = certificates("certificate_file", &client_cert)?;
    let key = PrivateKeyDer::from_pem_slice(&client_key)
        .map_err(|error| invalid(&format!("no key in the key_file: {error}")))?;
    ClientConfig::builder()
        .with_root_certificates(RootCertStore::empty())
        .with_client_auth_cert(chain, key)
        .map_err(|error| invalid(&format!("certificate_file and key_file: {error}")))?;
    Ok(ClientTlsConfig {
        client_cert,
        client_key,
    })
}

fn certificates(name: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(invalid(&format!("the {name} has no certificates in PEM"))),
    }
}
