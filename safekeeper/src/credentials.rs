//! As whom this safekeeper, or one of its commands, connects to others: as it stands in a TOML file, in
//! libpq's words.
//!
//! ```text
//!   user = "safekeeper"
//!   passfile = "/etc/safekeeper/pgpass"             else PGPASSFILE, or .pgpass at home
//!   sslmode = "verify-full"                         else prefer
//!   sslrootcert = "/etc/safekeeper/authority.crt"
//!   sslcert = "/etc/safekeeper/safekeeper.crt"
//!   sslkey = "/etc/safekeeper/safekeeper.key"
//!   sslcrl = "/etc/safekeeper/authority.crl"
//!   channel_binding = "require"                     else prefer
//! ```

use std::fmt::Display;
use std::path::PathBuf;
use std::str::FromStr;

use safekeeper_wire::credentials::Credentials;
use safekeeper_wire::login::BindingMode;
use safekeeper_wire::passfile::default_passfile;
use safekeeper_wire::tls::{ClientTls, SslMode};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

/// Each of them may be missing. Other keys are passed over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct CredentialsEntry {
    pub user: Option<String>,
    passfile: Option<PathBuf>,
    #[serde(deserialize_with = "parsed")]
    sslmode: SslMode,
    sslrootcert: Option<PathBuf>,
    sslcert: Option<PathBuf>,
    sslkey: Option<PathBuf>,
    sslcrl: Option<PathBuf>,
    #[serde(deserialize_with = "parsed")]
    channel_binding: BindingMode,
}

impl CredentialsEntry {
    /// All there are.
    pub const KEYS: [&str; 8] = [
        "user",
        "passfile",
        "sslmode",
        "sslrootcert",
        "sslcert",
        "sslkey",
        "sslcrl",
        "channel_binding",
    ];

    /// `user` counts if the entry names none.
    pub fn credentials(&self, user: impl FnOnce() -> String) -> Credentials {
        let entry = self.clone();
        Credentials {
            user: entry.user.unwrap_or_else(user),
            passfile: entry.passfile.or_else(default_passfile),
            tls: ClientTls {
                mode: entry.sslmode,
                root_cert: entry.sslrootcert,
                cert: entry.sslcert,
                key: entry.sslkey,
                crl: entry.sslcrl,
            },
            binding: entry.channel_binding,
        }
    }
}

fn parsed<'de, D, T>(value: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: Display>,
{
    String::deserialize(value)?
        .parse()
        .map_err(D::Error::custom)
}
