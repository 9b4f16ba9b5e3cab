//! Certificates for tests: an authority, and what it signs.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer,
    KeyIdMethod, KeyPair, KeyUsagePurpose, PKCS_ED25519, RevokedCertParams, date_time_ymd,
};

/// Of the next certificate.
static NEXT_SERIAL: AtomicU64 = AtomicU64::new(1);

/// One that signs.
pub struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// Whom a certificate is for, and whether it is still good.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    pub common_name: &'a str,
    /// Names and addresses of hosts.
    pub hosts: &'a [&'a str],
    pub is_expired: bool,
}

/// The files of a certificate and its key.
#[derive(Clone, Debug)]
pub struct Issued {
    pub cert: PathBuf,
    pub key: PathBuf,
    serial: u64,
}

impl Authority {
    pub fn new(common_name: &str) -> Authority {
        Authority::with_key(common_name, KeyPair::generate().expect("a key"))
    }

    /// Signs by Ed25519: certificates to which nothing can be bound.
    pub fn without_hash(common_name: &str) -> Authority {
        let key = KeyPair::generate_for(&PKCS_ED25519).expect("a key");
        Authority::with_key(common_name, key)
    }

    fn with_key(common_name: &str, key: KeyPair) -> Authority {
        let mut params = params(common_name, &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).expect("signed");
        Authority {
            pem: certificate.pem(),
            issuer: Issuer::new(params, key),
        }
    }

    /// Its own certificate, as `NAME.crt` in `dir`.
    pub fn store(&self, dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(format!("{name}.crt"));
        std::fs::write(&path, &self.pem).expect("written");
        path
    }

    /// Signs, and puts `NAME.crt` and `NAME.key` into `dir`.
    pub fn issue(&self, dir: &Path, name: &str, subject: Subject<'_>) -> Issued {
        let mut params = params(subject.common_name, subject.hosts);
        if subject.is_expired {
            params.not_before = date_time_ymd(2019, 1, 1);
            params.not_after = date_time_ymd(2020, 1, 1);
        }
        let serial = NEXT_SERIAL.fetch_add(1, Ordering::Relaxed);
        params.serial_number = Some(serial.into());
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        let issued = Issued {
            cert: dir.join(format!("{name}.crt")),
            key: dir.join(format!("{name}.key")),
            serial,
        };
        std::fs::write(&issued.cert, certificate.pem()).expect("written");
        std::fs::write(&issued.key, key.serialize_pem()).expect("written");
        let only_owner = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&issued.key, only_owner).expect("our own file");
        issued
    }

    /// A list of what is not good any more, as `NAME.crl` in `dir`; the list itself is, up to this year.
    pub fn revoke(&self, dir: &Path, name: &str, revoked: &[&Issued], up_to: i32) -> PathBuf {
        let since = date_time_ymd(2019, 1, 1);
        let revoked = revoked.iter().map(|issued| RevokedCertParams {
            serial_number: issued.serial.into(),
            revocation_time: since,
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: since,
            next_update: date_time_ymd(up_to, 1, 1),
            crl_number: 1u64.into(),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.issuer).expect("signed");
        let path = dir.join(format!("{name}.crl"));
        std::fs::write(&path, list.pem().expect("encoded")).expect("written");
        path
    }
}

fn params(common_name: &str, hosts: &[&str]) -> CertificateParams {
    let hosts: Vec<_> = hosts.iter().map(|host| (*host).to_owned()).collect();
    let mut params = CertificateParams::new(hosts).expect("names of hosts");
    params
        .distinguished_name
        .push(DnType::CommonName, common_name);
    params
}
