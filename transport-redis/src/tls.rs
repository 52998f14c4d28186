//! TLS: whom to trust, and who we are.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use antiphon_core::{Error, ErrorKind};
use redis::{Client, ClientTlsConfig, ConnectionInfo, TlsCertificates};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use rustls_native_certs::load_native_certs;
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::config::{RedisConfig, invalid};

/// What is in the files that the configuration names, or else what the platform trusts.
pub(crate) struct Tls(TlsConnector);

/// Reads and checks the files, which may take any time: what is in them for us and, in the address, for the redis crate.
///
/// # Errors
/// `Invalid` if one cannot be read, or is not what it should be; `Connect` if none says whom to trust, and the platform does not either.
pub(crate) async fn secure(
    config: &RedisConfig,
    info: ConnectionInfo,
) -> Result<(ConnectionInfo, Tls), Error> {
    let config = config.clone();
    let (told, read) = oneshot::channel();
    // A file may be on a mount whose server is gone. A thread of its own, as the runtime would wait for one of its pool when it ends.
    let reader = thread::Builder::new().name("antiphon-tls".to_owned());
    let started = reader.spawn(move || {
        // Who no longer waits for it has been told.
        let _ = told.send(read_all(&config, info));
    });
    started.map_err(|error| connect(&format!("no thread to read files: {error}")))?;
    read.await.map_err(|_| connect("the files were not read"))?
}

impl Tls {
    /// Shakes hands with the server.
    pub(crate) async fn wrap(
        &self,
        host: &str,
        stream: TcpStream,
    ) -> io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        self.0.connect(name, stream).await
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

fn read_all(config: &RedisConfig, info: ConnectionInfo) -> Result<(ConnectionInfo, Tls), Error> {
    // The process's own cryptography is used, and rustls panics if nobody chose any. An error says that somebody did meanwhile.
    if CryptoProvider::get_default().is_none() {
        let _ = aws_lc_rs::default_provider().install_default();
    }
    let ca = File::read("ca_file", &config.ca_file)?;
    let certificate = File::read("certificate_file", &config.certificate_file)?;
    let identity = certificate.zip(File::read("key_file", &config.key_file)?);

    let trusted = match &ca {
        Some(ca) => {
            let trusted = roots(ca.certificates()?);
            trusted.map_err(|error| invalid(&format!("{ca}: {error}")))?
        }
        None => platform()?,
    };
    let client = ClientConfig::builder().with_root_certificates(trusted);
    let client = match &identity {
        Some((certificate, key)) => {
            let chain = certificate.certificates()?;
            let secret = PrivateKeyDer::from_pem_slice(&key.contents)
                .map_err(|error| invalid(&format!("no key in {key}: {error}")))?;
            let named = client.with_client_auth_cert(chain, secret);
            named.map_err(|error| invalid(&format!("{certificate} and {key}: {error}")))?
        }
        None => client.with_no_client_auth(),
    };
    let tls = Tls(TlsConnector::from(Arc::new(client)));
    if ca.is_none() && identity.is_none() {
        return Ok((info, tls));
    }
    let files = TlsCertificates {
        client_tls: identity.map(|(certificate, key)| ClientTlsConfig {
            client_cert: certificate.contents,
            client_key: key.contents,
        }),
        root_cert: ca.map(|ca| ca.contents),
    };
    let client = Client::build_with_tls(info, files)
        .map_err(|error| invalid(&format!("the files for TLS are of no use: {error}")))?;
    Ok((client.get_connection_info().clone(), tls))
}

/// Whom the platform trusts.
fn platform() -> Result<RootCertStore, Error> {
    let unknown = |error: &dyn fmt::Display| {
        connect(&format!("whom the platform trusts is not known: {error}"))
    };
    let mut found = load_native_certs();
    match found.errors.pop() {
        Some(error) => Err(unknown(&error)),
        None => roots(found.certs).map_err(|error| unknown(&error)),
    }
}

fn roots(certificates: Vec<CertificateDer<'static>>) -> Result<RootCertStore, rustls::Error> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(certificate)?;
    }
    Ok(roots)
}

/// A file that the configuration names, shown by the field and its path.
struct File<'a> {
    field: &'static str,
    path: &'a Path,
    contents: Vec<u8>,
}

impl<'a> File<'a> {
    fn read(field: &'static str, path: &'a Option<PathBuf>) -> Result<Option<Self>, Error> {
        let Some(path) = path else {
            return Ok(None);
        };
        let mut file = Self {
            field,
            path,
            contents: Vec::new(),
        };
        file.contents = std::fs::read(path)
            .map_err(|error| invalid(&format!("{file} cannot be read: {error}")))?;
        Ok(Some(file))
    }

    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, Error> {
        let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&self.contents).collect();
        match found {
            Ok(found) if !found.is_empty() => Ok(found),
            _ => Err(invalid(&format!("{self} has no certificates in PEM"))),
        }
    }
}

impl fmt::Display for File<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the {} {}", self.field, self.path.display())
    }
}

fn connect(message: &str) -> Error {
    Error::not_executed(ErrorKind::Connect, format!("Redis: {message}"))
}
