//! What a broker needs to be reached over TLS, and its clients to trust it.

#[cfg(feature = "tls")]
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::process::Directory;

/// An authority of the test's own, with a certificate for a broker on this host and one for its clients: PEM files in a temporary
/// directory, which goes with the last clone.
#[derive(Clone, Debug)]
pub struct Certificates {
    directory: Arc<Directory>,
}

/// The files, by their names in the directory.
const CA: &str = "ca.pem";
const SERVER: &str = "server.pem";
const SERVER_KEY: &str = "server.key";
const CLIENT: &str = "client.pem";
const CLIENT_KEY: &str = "client.key";

impl Certificates {
    /// New ones. The broker's is for `localhost` and `127.0.0.1`; that of its clients is for `client`.
    ///
    /// # Errors
    /// If they cannot be made, or written.
    #[cfg(feature = "tls")]
    pub fn create() -> io::Result<Self> {
        use rcgen::{
            BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
            KeyPair, KeyUsagePurpose,
        };

        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        authority
            .distinguished_name
            .push(DnType::CommonName, "antiphon tests");
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let ca = authority.self_signed(&key).map_err(io::Error::other)?;
        let issuer = Issuer::from_params(&authority, &key);

        let this = Self {
            directory: Arc::new(Directory::create()?),
        };
        this.write(CA, &ca.pem())?;
        let server = (SERVER, SERVER_KEY, vec!["localhost", "127.0.0.1"]);
        let client = (CLIENT, CLIENT_KEY, vec!["client"]);
        for ((certificate_file, key_file, names), purpose) in [
            (server, ExtendedKeyUsagePurpose::ServerAuth),
            (client, ExtendedKeyUsagePurpose::ClientAuth),
        ] {
            let names: Vec<_> = names.into_iter().map(str::to_owned).collect();
            let mut params = CertificateParams::new(names.clone()).map_err(io::Error::other)?;
            params.extended_key_usages = vec![purpose];
            for name in names.into_iter().take(1) {
                params.distinguished_name.push(DnType::CommonName, name);
            }
            let key = KeyPair::generate().map_err(io::Error::other)?;
            let certificate = params.signed_by(&key, &issuer).map_err(io::Error::other)?;
            this.write(certificate_file, &certificate.pem())?;
            this.write(key_file, &key.serialize_pem())?;
        }
        Ok(this)
    }

    /// The authority's own certificate.
    #[must_use]
    pub fn ca_file(&self) -> PathBuf {
        self.file(CA)
    }

    /// The certificate of a client.
    #[must_use]
    pub fn client_certificate_file(&self) -> PathBuf {
        self.file(CLIENT)
    }

    /// The key of a client.
    #[must_use]
    pub fn client_key_file(&self) -> PathBuf {
        self.file(CLIENT_KEY)
    }

    pub(super) fn server_certificate_file(&self) -> PathBuf {
        self.file(SERVER)
    }

    pub(super) fn server_key_file(&self) -> PathBuf {
        self.file(SERVER_KEY)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    #[cfg(feature = "tls")]
    fn write(&self, name: &str, text: &str) -> io::Result<()> {
        std::fs::write(self.file(name), text)
    }
}
