//! Which certificates there are and what is demanded of the peer's: the files behind both ends of an
//! encrypted connection (channel.rs).
//!
//! | libpq's `sslmode` | encrypted         | the server's certificate must be                     |
//! |-------------------|-------------------|------------------------------------------------------|
//! | `disable`         | never             |                                                      |
//! | `prefer`          | if it is offered  | signed by an authority in `sslrootcert`, if given    |
//! | `require`         | always            | the same                                             |
//! | `verify-ca`       | always            | signed by an authority in `sslrootcert`              |
//! | `verify-full`     | always            | and be that of the host that was asked for           |
//!
//! Files are PEM. They are read when they are used: a client's for each connection, a server's at its start
//! and when it is told to. A private key that others can read is refused. TLS is 1.2 or 1.3. The name of a
//! host must be among a certificate's alternative names, where libpq still takes the common name.
//!
//! Where there is a file of revocations, it must have a list of every authority between a certificate and its
//! root, none of them out of date; as with OpenSSL, by which libpq and Postgres do it. (`fe-secure-openssl.c`)

use std::fmt;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::{Error as PemError, PemObject};
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig,
    SignatureScheme,
};
use sha2::{Digest, Sha256, Sha384, Sha512};
use x509_parser::asn1_rs::oid;
use x509_parser::oid_registry::{
    OID_HASH_SHA1, OID_NIST_HASH_SHA256, OID_NIST_HASH_SHA384, OID_NIST_HASH_SHA512,
    OID_PKCS1_MD5WITHRSAENC, OID_PKCS1_SHA1WITHRSA, OID_PKCS1_SHA256WITHRSA,
    OID_PKCS1_SHA384WITHRSA, OID_PKCS1_SHA512WITHRSA, OID_SIG_ECDSA_WITH_SHA256,
    OID_SIG_ECDSA_WITH_SHA384, OID_SIG_ECDSA_WITH_SHA512, Oid,
};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::signature_algorithm::SignatureAlgorithm;

/// The protocol's name in a handshake (`PG_ALPN_PROTOCOL` in `libpq/pqcomm.h`).
pub const ALPN: &[u8] = b"postgresql";

/// RFC 5758's, which the registry lacks.
const OID_SIG_ECDSA_WITH_SHA1: Oid<'static> = oid!(1.2.840.10045.4.1);

/// Permission bits that a private key may not have.
const KEY_MODE_FORBIDDEN: u32 = 0o077;
/// The same if root owns it: a group may be trusted with it.
const ROOTS_KEY_MODE_FORBIDDEN: u32 = 0o037;

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("could not read {what} {}: {source}", path.display())]
    Read {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{}: {problem}", path.display())]
    File { path: PathBuf, problem: String },
    #[error(
        "private key {} can be read by others than its owner (mode {mode:03o}); it must be 0600",
        path.display()
    )]
    Permissions { path: PathBuf, mode: u32 },
    #[error("sslmode={0} needs sslrootcert, the file of the authorities that are trusted")]
    NoRoots(SslMode),
    #[error("sslcrl needs sslrootcert, the file of the authorities that are trusted")]
    RevokedByNobody,
    #[error("sslcert and sslkey are given together or not at all")]
    HalfAPair,
    #[error("the server does not support TLS, and sslmode demands it")]
    NotOffered,
    /// What it said may be of anybody, as nothing is encrypted yet.
    #[error("the server refuses the connection, and its log says why: it may have too many")]
    Refused,
    #[error("0x{0:02x} is no answer to the question for TLS")]
    Answer(u8),
    #[error("\"{0}\" is no host name that a certificate could have")]
    HostName(String),
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// How much a client demands; see the head of this file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SslMode {
    Disable,
    #[default]
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl SslMode {
    const ALL: [(SslMode, &str); 5] = [
        (SslMode::Disable, "disable"),
        (SslMode::Prefer, "prefer"),
        (SslMode::Require, "require"),
        (SslMode::VerifyCa, "verify-ca"),
        (SslMode::VerifyFull, "verify-full"),
    ];
}

impl fmt::Display for SslMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = SslMode::ALL.iter().find(|(mode, _)| mode == self);
        f.write_str(known.map_or("", |(_, name)| name))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid sslmode \"{0}\": expected disable, prefer, require, verify-ca or verify-full")]
pub struct SslModeError(String);

impl FromStr for SslMode {
    type Err = SslModeError;

    fn from_str(text: &str) -> Result<SslMode, SslModeError> {
        let known = SslMode::ALL.iter().find(|(_, name)| *name == text);
        known
            .map(|(mode, _)| *mode)
            .ok_or_else(|| SslModeError(text.to_owned()))
    }
}

/// What a client demands and shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientTls {
    pub mode: SslMode,
    /// Authorities that are trusted.
    pub root_cert: Option<PathBuf>,
    /// What these have revoked.
    pub crl: Option<PathBuf>,
    /// Shown to a server that asks for it.
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
}

impl ClientTls {
    /// For connections that are never encrypted.
    pub fn disabled() -> ClientTls {
        ClientTls {
            mode: SslMode::Disable,
            ..ClientTls::default()
        }
    }

    pub fn is_needed(&self) -> bool {
        !matches!(self.mode, SslMode::Disable | SslMode::Prefer)
    }

    pub fn verifies_name(&self) -> bool {
        self.mode == SslMode::VerifyFull
    }

    /// Reads the files; `None` if nothing is to be encrypted.
    pub fn load(&self) -> Result<Option<Arc<ClientConfig>>, TlsError> {
        if self.mode == SslMode::Disable {
            return Ok(None);
        }
        let provider = Arc::new(ring::default_provider());
        let verifier: Arc<dyn ServerCertVerifier> = match &self.root_cert {
            None if matches!(self.mode, SslMode::VerifyCa | SslMode::VerifyFull) => {
                return Err(TlsError::NoRoots(self.mode));
            }
            None if self.crl.is_some() => return Err(TlsError::RevokedByNobody),
            None => Arc::new(AnyServer(provider.clone())),
            Some(path) => {
                let roots = Arc::new(authorities(path)?);
                let builder = WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
                    .with_crls(revocations(self.crl.as_deref())?)
                    .enforce_revocation_expiration();
                let by_name = builder.build().map_err(|error| invalid(path, error))?;
                match self.mode {
                    SslMode::VerifyFull => by_name,
                    _ => Arc::new(AnyName(by_name)),
                }
            }
        };
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => builder
                .with_client_auth_cert(certificates(cert)?, private_key(key)?)
                .map_err(|error| invalid(cert, error))?,
            (None, None) => builder.with_no_client_auth(),
            _ => return Err(TlsError::HalfAPair),
        };
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Some(Arc::new(config)))
    }
}

/// A server's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerTlsFiles {
    /// Its certificate, and behind it those of the authorities between it and a root.
    pub cert: PathBuf,
    pub key: PathBuf,
    /// Authorities of clients' certificates; `None`: no client is asked for one.
    pub client_ca: Option<PathBuf>,
    /// What these have revoked.
    pub client_crl: Option<PathBuf>,
}

/// What a server encrypts with.
#[derive(Clone, Debug)]
pub struct ServerTls {
    pub config: Arc<ServerConfig>,
    /// What clients bind their proofs to (`tls-server-end-point`); `None` if its certificate is signed in a
    /// way for which that is not defined.
    pub end_point: Option<Vec<u8>>,
}

impl ServerTls {
    pub fn load(files: &ServerTlsFiles) -> Result<ServerTls, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?;
        let builder = match &files.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let roots = Arc::new(authorities(path)?);
                // Who needs one is a matter of the rules; one that is shown must be good.
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                    .with_crls(revocations(files.client_crl.as_deref())?)
                    .enforce_revocation_expiration()
                    .allow_unauthenticated()
                    .build()
                    .map_err(|error| invalid(path, error))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let chain = certificates(&files.cert)?;
        let end_point = chain.first().and_then(end_point);
        let mut config = builder
            .with_single_cert(chain, private_key(&files.key)?)
            .map_err(|error| invalid(&files.cert, error))?;
        // Nobody resumes sessions here, as with Postgres (`be-secure-openssl.c`).
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(ServerTls {
            config: Arc::new(config),
            end_point,
        })
    }
}

fn invalid(path: &Path, problem: impl fmt::Display) -> TlsError {
    TlsError::File {
        path: path.to_owned(),
        problem: problem.to_string(),
    }
}

fn unreadable(what: &'static str, path: &Path, error: PemError) -> TlsError {
    match error {
        PemError::Io(source) => TlsError::Read {
            what,
            path: path.to_owned(),
            source,
        },
        error => invalid(path, format!("no {what} in PEM form: {error}")),
    }
}

/// All of one kind that a file has; at least one.
fn pem_items<T: PemObject>(what: &'static str, path: &Path) -> Result<Vec<T>, TlsError> {
    let failed = |error| unreadable(what, path, error);
    let items: Result<Vec<_>, _> = T::pem_file_iter(path).map_err(failed)?.collect();
    let items = items.map_err(failed)?;
    match items.is_empty() {
        true => Err(invalid(path, format!("no {what} in PEM form"))),
        false => Ok(items),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    pem_items("certificate", path)
}

fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots
            .add(certificate)
            .map_err(|error| invalid(path, error))?;
    }
    Ok(roots)
}

/// Nothing is revoked where there is no file.
fn revocations(
    path: Option<&Path>,
) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    path.map_or(Ok(Vec::new()), |path| pem_items("revocation list", path))
}

/// Permissions as libpq and Postgres demand them (`libpq/be-secure-common.c`).
fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    use std::os::unix::fs::MetadataExt;
    let what = "private key";
    let metadata = std::fs::metadata(path).map_err(|source| TlsError::Read {
        what,
        path: path.to_owned(),
        source,
    })?;
    let forbidden = match metadata.uid() {
        0 => ROOTS_KEY_MODE_FORBIDDEN,
        _ => KEY_MODE_FORBIDDEN,
    };
    let mode = metadata.permissions().mode() & 0o777;
    if mode & forbidden != 0 {
        let path = path.to_owned();
        return Err(TlsError::Permissions { path, mode });
    }
    PrivateKeyDer::from_pem_file(path).map_err(|error| unreadable(what, path, error))
}

/// The subject's common name.
pub fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let mut names = certificate.subject().iter_common_name();
    let name = names.next()?.as_str().ok()?;
    // Which of several is meant nobody can know.
    (names.next().is_none()).then(|| name.to_owned())
}

/// What a client's proof of its password can be bound to. (RFC 5929, section 4)
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndPoint {
    /// The connection is not encrypted.
    Clear,
    /// It is, by a certificate of which the hash is not defined.
    NoHash,
    /// Of the server's certificate.
    Hash(Vec<u8>),
}

/// Hash of a certificate by the function it is signed with, or a better one if that is weak. `None` for signatures
/// that have not one, such as Ed25519's. (RFC 5929, section 4.1; `be_tls_get_certificate_hash`)
pub fn end_point(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let signature = &parsed.signature_algorithm;
    match SignatureAlgorithm::try_from(signature) {
        Ok(SignatureAlgorithm::RSASSA_PSS(parameters)) => {
            hash_for(parameters.hash_algorithm_oid(), certificate)
        }
        _ => hash_for(&signature.algorithm, certificate),
    }
}

/// Of `bytes`, where something is signed, or hashed, by this algorithm.
fn hash_for(algorithm: &Oid<'_>, bytes: &[u8]) -> Option<Vec<u8>> {
    const SHA256: [Oid<'_>; 7] = [
        OID_PKCS1_MD5WITHRSAENC,
        OID_PKCS1_SHA1WITHRSA,
        OID_SIG_ECDSA_WITH_SHA1,
        OID_HASH_SHA1,
        OID_PKCS1_SHA256WITHRSA,
        OID_SIG_ECDSA_WITH_SHA256,
        OID_NIST_HASH_SHA256,
    ];
    const SHA384: [Oid<'_>; 3] = [
        OID_PKCS1_SHA384WITHRSA,
        OID_SIG_ECDSA_WITH_SHA384,
        OID_NIST_HASH_SHA384,
    ];
    const SHA512: [Oid<'_>; 3] = [
        OID_PKCS1_SHA512WITHRSA,
        OID_SIG_ECDSA_WITH_SHA512,
        OID_NIST_HASH_SHA512,
    ];
    if SHA256.contains(algorithm) {
        Some(Sha256::digest(bytes).to_vec())
    } else if SHA384.contains(algorithm) {
        Some(Sha384::digest(bytes).to_vec())
    } else if SHA512.contains(algorithm) {
        Some(Sha512::digest(bytes).to_vec())
    } else {
        None
    }
}

/// Takes any certificate, of which the server must only have the key: `sslmode=require` keeps out who
/// listens, not who pretends.
#[derive(Debug)]
struct AnyServer(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            cert,
            dss,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Takes a certificate that the inner one would take for some host.
#[derive(Debug)]
struct AnyName(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let by_name =
            self.0
                .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        match by_name {
            // The name is looked at when everything else has been found good.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by `openssl req -x509`, with `-sha1`, `-sigopt rsa_padding_mode:pss` and so on.
    #[test]
    fn weak_functions_are_replaced_and_those_of_pss_are_found() {
        for (pem, len) in [
            (include_bytes!("tls/testdata/rsa_md5.pem").as_slice(), 32),
            (include_bytes!("tls/testdata/rsa_sha1.pem"), 32),
            (include_bytes!("tls/testdata/ecdsa_sha1.pem"), 32),
            (include_bytes!("tls/testdata/pss_sha256.pem"), 32),
            (include_bytes!("tls/testdata/pss_sha384.pem"), 48),
        ] {
            let certificate = CertificateDer::from_pem_slice(pem).expect("a certificate");
            let hash = match len {
                48 => Sha384::digest(&certificate).to_vec(),
                _ => Sha256::digest(&certificate).to_vec(),
            };
            assert_eq!(end_point(&certificate), Some(hash));
        }
        assert_eq!(end_point(&CertificateDer::from(vec![0x30, 0])), None);
    }
}
