//! Every setting: name, default, check.
//!
//! | setting             | default          | means                                                     |
//! |---------------------|------------------|-----------------------------------------------------------|
//! | `listen`            | `127.0.0.1:5454` | where proposers and consumers connect                     |
//! | `http`              | `127.0.0.1:7676` | where metrics and status are served                       |
//! | `trust_network`     | `false`          | listen beyond loopback though anybody is let in           |
//! | `access`            | none             | tables: who is asked for a password (access.rs)           |
//! | `tls`               | none             | table: `cert`, `key`, `client_ca`, `client_crl`; without it nothing is encrypted |
//! | `peers`             | see credentials.rs | table: as whom other safekeepers are asked for WAL (relay.rs) |
//! | `max_connections`   | `100`            | connections at a time on `listen`; 5, or half, only for those who may push |
//! | `wal_keep_size`     | `1GB`            | WAL kept below commit_lsn that nobody connected needs     |
//! | `max_wal_keep`      | `64GB`           | WAL kept below commit_lsn whoever needs it; 0 has no bound |
//! | `min_free_space`    | `256MB`          | below it the oldest WAL goes, whoever needs it; 0: never  |
//! | `max_replication_slots` | `10`         | replication slots of one cluster; at most 256             |
//! | `wal_sender_timeout`| `60s`            | a consumer that says or takes nothing for longer is dropped; 0 waits for ever |
//! | `log_format`        | `text`           | or `json`                                                 |
//! | `log_level`         | `info`           | `error`, `warn`, `info`, `debug`, `trace`                 |
//!
//! They come from a TOML file and from the command line, which wins. A key that is not in the table
//! and a value that does not fit are errors that name them. Sizes and times take Postgres's units
//! (kB, MB, GB of 1024; ms, s, min).
//!
//! A member of the quorum that is away, or a consumer that lags, holds WAL back on all others up to
//! `max_wal_keep`. Beyond that the oldest goes, and a warning says who still needed it: a full disk
//! would stop commits instead. A consumer is then told that its WAL has been removed (58P01), and
//! must get it from elsewhere. It should be well below the size of the disk.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::LevelFilter;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::access::{AccessRule, keep_strangers_out};
use crate::credentials::CredentialsEntry;
use crate::logging::LogFormat;
use crate::slot_file::SLOTS_MAX;

pub const DEFAULT_LISTEN: &str = "127.0.0.1:5454";
pub const DEFAULT_HTTP: &str = "127.0.0.1:7676";

/// As whom other safekeepers are asked for WAL, if nothing else is said.
pub const PEERS_USER: &str = "safekeeper";

/// Tools give their first command at once; who needs longer than a minute only takes a place.
const FIRST_COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// A setting that can't be used; the text names it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl ConfigError {
    pub fn new(text: String) -> ConfigError {
        ConfigError(text)
    }
}

/// The settings in effect.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub listen: String,
    pub http: String,
    pub trust_network: bool,
    /// Who is asked for a password. In the file only.
    pub access: Vec<AccessRule>,
    /// In the file only.
    pub tls: Option<TlsFiles>,
    /// In the file only.
    #[serde(deserialize_with = "peers")]
    pub peers: CredentialsEntry,
    pub max_connections: usize,
    /// In bytes.
    #[serde(deserialize_with = "size")]
    pub wal_keep_size: u64,
    /// In bytes; not below `wal_keep_size`. None: as much as anybody needs.
    #[serde(deserialize_with = "bound")]
    pub max_wal_keep: Option<u64>,
    /// In bytes, of the disk.
    #[serde(deserialize_with = "size")]
    pub min_free_space: u64,
    /// Of one cluster.
    pub max_replication_slots: usize,
    /// None: consumers may be silent for ever.
    #[serde(deserialize_with = "timeout")]
    pub wal_sender_timeout: Option<Duration>,
    pub log_format: LogFormat,
    #[serde(deserialize_with = "level")]
    pub log_level: LevelFilter,
    /// For a connection to give its first command. Not a setting, except for tests.
    #[serde(skip)]
    pub first_command_timeout: Duration,
}

/// PEM files for encrypted connections (`safekeeper_wire::tls`).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    pub cert: PathBuf,
    pub key: PathBuf,
    /// Authorities of clients' certificates.
    pub client_ca: Option<PathBuf>,
    /// What these have revoked.
    pub client_crl: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            listen: DEFAULT_LISTEN.into(),
            http: DEFAULT_HTTP.into(),
            trust_network: false,
            access: Vec::new(),
            tls: None,
            peers: CredentialsEntry::default(),
            max_connections: 100,
            wal_keep_size: 1 << 30,
            max_wal_keep: Some(64 << 30),
            min_free_space: 256 << 20,
            max_replication_slots: 10,
            wal_sender_timeout: Some(Duration::from_secs(60)),
            log_format: LogFormat::Text,
            log_level: LevelFilter::Info,
            first_command_timeout: FIRST_COMMAND_TIMEOUT,
        }
    }
}

impl Config {
    pub fn from_file(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            ConfigError(format!(
                "could not read configuration file {}: {error}",
                path.display()
            ))
        })?;
        Config::from_toml(&text)
            .map_err(|error| ConfigError(format!("{}: {error}", path.display())))
    }

    pub fn from_toml(text: &str) -> Result<Config, ConfigError> {
        toml::from_str(text).map_err(|error| ConfigError(error.to_string().trim_end().to_owned()))
    }

    /// Set one setting from the command line, by its name in the table above.
    pub fn set(&mut self, name: &str, value: toml::Value) -> Result<(), ConfigError> {
        let table = toml::Table::from_iter([(name.to_owned(), value)]);
        let parsed = Config::deserialize(table)
            .map_err(|error| ConfigError(format!("{name}: {}", error.message())))?;
        match name {
            "listen" => self.listen = parsed.listen,
            "http" => self.http = parsed.http,
            "trust_network" => self.trust_network = parsed.trust_network,
            "max_connections" => self.max_connections = parsed.max_connections,
            "wal_keep_size" => self.wal_keep_size = parsed.wal_keep_size,
            "max_wal_keep" => self.max_wal_keep = parsed.max_wal_keep,
            "min_free_space" => self.min_free_space = parsed.min_free_space,
            "max_replication_slots" => {
                self.max_replication_slots = parsed.max_replication_slots;
            }
            "wal_sender_timeout" => self.wal_sender_timeout = parsed.wal_sender_timeout,
            "log_format" => self.log_format = parsed.log_format,
            "log_level" => self.log_level = parsed.log_level,
            name => unreachable!("{name} would have been refused as unknown"),
        }
        Ok(())
    }

    /// The two addresses to listen on, `listen` first, if all settings go together.
    pub fn addresses(&self) -> Result<(SocketAddr, SocketAddr), ConfigError> {
        let listen = resolve("listen", &self.listen)?;
        let http = resolve("http", &self.http)?;
        self.check(listen, http)?;
        Ok((listen, http))
    }

    /// Whether the settings go together where these addresses are listened on, whatever `listen` and `http` say.
    pub fn check(&self, listen: SocketAddr, http: SocketAddr) -> Result<(), ConfigError> {
        if self.max_connections == 0 {
            return Err(ConfigError("max_connections: must be at least 1".into()));
        }
        if self.max_replication_slots > SLOTS_MAX {
            return Err(ConfigError(format!(
                "max_replication_slots: {} is more than {SLOTS_MAX}",
                self.max_replication_slots
            )));
        }
        if let Some(max) = self.max_wal_keep
            && max < self.wal_keep_size
        {
            return Err(ConfigError(format!(
                "max_wal_keep: {max} is less than wal_keep_size, {}",
                self.wal_keep_size
            )));
        }
        if let Some(tls) = &self.tls
            && tls.client_crl.is_some()
            && tls.client_ca.is_none()
        {
            return Err(ConfigError(
                "tls.client_crl needs tls.client_ca, the authorities whose certificates it revokes"
                    .into(),
            ));
        }
        let (has_tls, has_client_ca) = match &self.tls {
            Some(tls) => (true, tls.client_ca.is_some()),
            None => (false, false),
        };
        for (n, rule) in (1..).zip(&self.access) {
            if rule.contradicts_itself() {
                return Err(ConfigError(format!(
                    "access: rule {n} asks for a certificate where tls = false, and without encryption \
                     there is none"
                )));
            }
            if rule.needs_tls() && !has_tls {
                return Err(ConfigError(format!(
                    "access: rule {n} is for encrypted connections, and there is no [tls] table"
                )));
            }
            if rule.needs_certificate() && !has_client_ca {
                return Err(ConfigError(format!(
                    "access: rule {n} asks for a certificate, and tls.client_ca does not say who may sign one"
                )));
            }
        }
        let is_open = |address: SocketAddr| !address.ip().is_loopback() && !self.trust_network;
        if is_open(listen) && !keep_strangers_out(&self.access) {
            return Err(ConfigError(format!(
                "listen: {listen} can be reached from other hosts, and anybody there could write and read \
                 WAL. Say in [[access]] tables of the configuration file who must give a password, or \
                 listen on a loopback address, or set trust_network = true (--trust-network) if the \
                 network keeps strangers out"
            )));
        }
        if is_open(http) {
            return Err(ConfigError(format!(
                "http: {http} can be reached from other hosts, and nobody is asked who they are there. \
                 Serve it on a loopback address, or set trust_network = true (--trust-network) if the \
                 network keeps strangers out"
            )));
        }
        Ok(())
    }
}

fn resolve(name: &str, text: &str) -> Result<SocketAddr, ConfigError> {
    text.to_socket_addrs()
        .map_err(|error| ConfigError(format!("{name}: \"{text}\" is not host:port: {error}")))?
        .next()
        .ok_or_else(|| ConfigError(format!("{name}: \"{text}\" has no address")))
}

fn peers<'de, D: Deserializer<'de>>(value: D) -> Result<CredentialsEntry, D::Error> {
    let table = toml::Table::deserialize(value)?;
    let is_known = |key: &&String| CredentialsEntry::KEYS.contains(&key.as_str());
    if let Some(key) = table.keys().find(|key| !is_known(key)) {
        return Err(D::Error::unknown_field(key, &CredentialsEntry::KEYS));
    }
    CredentialsEntry::deserialize(table).map_err(D::Error::custom)
}

/// A number with an optional unit.
#[derive(Deserialize)]
#[serde(untagged)]
enum Quantity {
    Number(u64),
    Text(String),
    Other(toml::Value),
}

impl Quantity {
    /// `units` are the names and what each stands for; a bare number counts as `unit_of_number`.
    fn scaled(&self, units: &[(&str, u64)], unit_of_number: u64) -> Result<u64, String> {
        let (number, unit) = match self {
            Quantity::Number(number) => (*number, unit_of_number),
            Quantity::Text(text) => {
                let digits = text.bytes().take_while(u8::is_ascii_digit).count();
                let (number, unit) = text.split_at(digits);
                let number = number
                    .parse()
                    .map_err(|_| format!("invalid value \"{text}\""))?;
                let unit = match unit.trim() {
                    "" => unit_of_number,
                    name => {
                        units
                            .iter()
                            .find(|unit| unit.0 == name)
                            .ok_or_else(|| {
                                let known: Vec<_> = units.iter().map(|unit| unit.0).collect();
                                format!("invalid unit in \"{text}\", expected {}", known.join(", "))
                            })?
                            .1
                    }
                };
                (number, unit)
            }
            Quantity::Other(value) => return Err(format!("invalid value {value}")),
        };
        number
            .checked_mul(unit)
            .ok_or_else(|| "value is too large".to_owned())
    }
}

fn size<'de, D: Deserializer<'de>>(value: D) -> Result<u64, D::Error> {
    let units = [
        ("B", 1),
        ("kB", 1 << 10),
        ("MB", 1 << 20),
        ("GB", 1 << 30),
        ("TB", 1 << 40),
    ];
    Quantity::deserialize(value)?
        .scaled(&units, 1)
        .map_err(D::Error::custom)
}

fn bound<'de, D: Deserializer<'de>>(value: D) -> Result<Option<u64>, D::Error> {
    Ok(Some(size(value)?).filter(|size| *size > 0))
}

fn timeout<'de, D: Deserializer<'de>>(value: D) -> Result<Option<Duration>, D::Error> {
    let units = [("ms", 1), ("s", 1000), ("min", 60_000), ("h", 3_600_000)];
    let ms = Quantity::deserialize(value)?
        .scaled(&units, 1)
        .map_err(D::Error::custom)?;
    Ok((ms > 0).then(|| Duration::from_millis(ms)))
}

fn level<'de, D: Deserializer<'de>>(value: D) -> Result<LevelFilter, D::Error> {
    let text = String::deserialize(value)?;
    text.parse()
        .map_err(|_| D::Error::custom(format!("invalid level \"{text}\"")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_gives_the_defaults() {
        assert_eq!(Config::from_toml(""), Ok(Config::default()));
    }

    #[test]
    fn every_setting_can_be_set_in_both_ways() {
        let toml = r#"
            listen = "127.0.0.1:1"
            http = "127.0.0.1:2"
            trust_network = true
            max_connections = 7
            wal_keep_size = "2MB"
            max_wal_keep = "0"
            min_free_space = "3MB"
            max_replication_slots = 3
            wal_sender_timeout = "0"
            log_format = "json"
            log_level = "debug"
        "#;
        let config = Config::from_toml(toml).expect("valid");
        assert_eq!(config.wal_keep_size, 2 << 20);
        assert_eq!(config.max_wal_keep, None);
        assert_eq!(config.wal_sender_timeout, None);
        let mut set = Config::default();
        for (name, value) in toml.parse::<toml::Table>().expect("a table") {
            set.set(&name, value).expect("known");
        }
        assert_eq!(set, config);
    }

    #[test]
    fn errors_name_the_key() {
        for (text, named) in [
            ("listne = \"x\"", "listne"),
            ("max_connections = \"many\"", "max_connections"),
            ("max_connections = -1", "max_connections"),
            ("wal_keep_size = \"1XB\"", "wal_keep_size"),
            ("wal_keep_size = -5", "wal_keep_size"),
            ("wal_keep_size = \"99999999999TB\"", "wal_keep_size"),
            ("max_wal_keep = \"much\"", "max_wal_keep"),
            ("min_free_space = \"some\"", "min_free_space"),
            ("max_replication_slots = -1", "max_replication_slots"),
            ("wal_sender_timeout = \"soon\"", "wal_sender_timeout"),
            ("wal_sender_timeout = 1.5", "wal_sender_timeout"),
            ("log_format = \"xml\"", "log_format"),
            ("log_level = \"loud\"", "log_level"),
            ("trust_network = 1", "trust_network"),
        ] {
            let error = Config::from_toml(text).expect_err(text).to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
        let error = Config::default()
            .set("log_level", "loud".into())
            .expect_err("refused");
        assert_eq!(error.to_string(), "log_level: invalid level \"loud\"");
    }

    #[test]
    fn what_is_kept_at_any_rate_is_not_more_than_what_may_be_kept() {
        let config = |text: &str| Config::from_toml(text).expect("valid");
        for (text, accepted) in [
            ("wal_keep_size = \"64GB\"", true),
            ("wal_keep_size = \"65GB\"", false),
            ("wal_keep_size = \"65GB\"\nmax_wal_keep = 0", true),
            ("wal_keep_size = 0\nmax_wal_keep = 1", true),
        ] {
            assert_eq!(config(text).addresses().is_ok(), accepted, "{text}");
        }
    }

    #[test]
    fn a_rule_by_which_nobody_gets_in_is_refused() {
        for (text, problem) in [
            ("tls = true\nmethod = \"scram\"", "no [tls] table"),
            ("method = \"cert\"", "no [tls] table"),
            (
                "tls = false\nmethod = \"cert\"",
                "rule 1 asks for a certificate",
            ),
        ] {
            let text = format!("[[access]]\n{text}");
            let config = Config::from_toml(&text).expect("valid");
            let error = config.addresses().expect_err(&text).to_string();
            assert!(error.contains(problem), "{text}: {error}");
        }
        let tls = "[tls]\ncert = \"c\"\nkey = \"k\"\n";
        for (ca, rule, accepted) in [
            ("", "method = \"cert\"", false),
            ("client_ca = \"a\"\n", "method = \"cert\"", true),
            (
                "client_ca = \"a\"\n",
                "tls = false\nmethod = \"cert\"",
                false,
            ),
        ] {
            let config = Config::from_toml(&format!("{tls}{ca}[[access]]\n{rule}"));
            let is_accepted = config.expect("valid").addresses().is_ok();
            assert_eq!(is_accepted, accepted, "{ca}{rule}");
        }
    }

    #[test]
    fn listens_beyond_loopback_only_when_told_so_in_so_many_words() {
        for (listen, http, trust_network, accepted) in [
            ("127.0.0.1:1", "[::1]:2", false, true),
            ("0.0.0.0:1", "127.0.0.1:2", false, false),
            ("127.0.0.1:1", "0.0.0.0:2", false, false),
            ("0.0.0.0:1", "0.0.0.0:2", true, true),
            ("127.0.0.1", "127.0.0.1:2", false, false),
            ("127.0.0.1:99999", "127.0.0.1:2", false, false),
        ] {
            let config = Config {
                listen: listen.into(),
                http: http.into(),
                trust_network,
                ..Config::default()
            };
            assert_eq!(config.addresses().is_ok(), accepted, "{listen} {http}");
        }
    }
}
