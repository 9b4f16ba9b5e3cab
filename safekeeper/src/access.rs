//! Who is asked for what, by address, encryption and name: the `[[access]]` tables of the configuration file,
//! as `pg_hba.conf` is for Postgres.
//!
//! ```text
//!   [[access]]                      the first rule that fits decides; none fits: refused
//!   address = "127.0.0.0/8"
//!   method = "trust"
//!
//!   [[access]]
//!   address = "10.0.0.0/24"         or "all"
//!   user = "standby1"               or "all"
//!   tls = true                      only if it is encrypted; false: only if it is not
//!   method = "scram"                or "cert", "trust", "reject"
//! ```
//!
//! A rule that asks for a certificate fits those, too, who do not encrypt, and refuses them: else they would go
//! on to a rule that asks for less. `tls = true` says that they are meant to.
//!
//! Without any rule everybody is trusted; then only a loopback address may be listened on, unless the
//! operator says `trust_network`.

use std::io;
use std::net::IpAddr;
use std::path::Path;

use ipnet::IpNet;
use safekeeper_wire::scram::{SaltKey, random};
use safekeeper_wire::tls::{ServerTls, ServerTlsFiles, TlsError};
use serde::{Deserialize, Deserializer, de::Error as _};

use crate::config::{Config, ConfigError};
use crate::users::{USERS_FILE, Users, UsersError};

/// What a rule demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Nothing.
    Trust,
    /// The password of a user, by SCRAM-SHA-256.
    Scram,
    /// A certificate whose common name is the user's.
    Cert,
    /// That they stay out.
    Reject,
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccessRule {
    #[serde(default, deserialize_with = "network")]
    address: Option<IpNet>,
    #[serde(default, deserialize_with = "name")]
    user: Option<String>,
    tls: Option<bool>,
    method: Method,
}

impl AccessRule {
    fn fits(&self, address: IpAddr, is_encrypted: bool, user: &str) -> bool {
        self.address
            .is_none_or(|network| network.contains(&address))
            && self.tls.is_none_or(|tls| tls == is_encrypted)
            && self.user.as_deref().is_none_or(|name| name == user)
    }

    /// Nobody gets in by it who does not encrypt.
    pub fn needs_tls(&self) -> bool {
        self.tls == Some(true) || self.needs_certificate()
    }

    /// Nobody gets in by it at all: it fits those only who do not encrypt, and asks them for a certificate.
    pub fn contradicts_itself(&self) -> bool {
        self.tls == Some(false) && self.needs_certificate()
    }

    pub fn needs_certificate(&self) -> bool {
        self.method == Method::Cert
    }

    /// It lets in somebody from another host who proves nothing.
    fn trusts_strangers(&self) -> bool {
        let is_near = self.address.is_some_and(|network| {
            network.network().is_loopback() && network.broadcast().is_loopback()
        });
        self.method == Method::Trust && !is_near
    }
}

/// What is demanded of a user who comes from there; `None`: no rule fits.
pub fn method_for(
    rules: &[AccessRule],
    address: IpAddr,
    is_encrypted: bool,
    user: &str,
) -> Option<Method> {
    if rules.is_empty() {
        return Some(Method::Trust);
    }
    // An IPv4 host that came by an IPv6 socket.
    let address = address.to_canonical();
    let rule = rules
        .iter()
        .find(|rule| rule.fits(address, is_encrypted, user));
    rule.map(|rule| rule.method)
}

/// Whether everybody from another host must prove who they are.
pub fn keep_strangers_out(rules: &[AccessRule]) -> bool {
    !rules.is_empty() && !rules.iter().any(AccessRule::trusts_strangers)
}

fn network<'de, D: Deserializer<'de>>(value: D) -> Result<Option<IpNet>, D::Error> {
    let text = String::deserialize(value)?;
    if text == "all" {
        return Ok(None);
    }
    let address = text.parse::<IpAddr>().map(IpNet::from);
    let network = text.parse::<IpNet>().or(address);
    network.map(|network| Some(network.trunc())).map_err(|_| {
        D::Error::custom(format!(
            "invalid address \"{text}\", expected one such as \"10.0.0.0/24\", or \"all\""
        ))
    })
}

fn name<'de, D: Deserializer<'de>>(value: D) -> Result<Option<String>, D::Error> {
    let name = String::deserialize(value)?;
    Ok((name != "all").then_some(name))
}

/// Who gets in, and what connections are encrypted with: all that is read again on SIGHUP.
#[derive(Debug)]
pub struct AccessControl {
    pub users: Users,
    /// For asking those who are not among them.
    pub salt_key: SaltKey,
    pub rules: Vec<AccessRule>,
    /// `None`: nothing is encrypted.
    pub tls: Option<ServerTls>,
}

/// Why it stays as it is.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    #[error(transparent)]
    Users(#[from] UsersError),
    /// A file that is being written looks like this, too.
    #[error(
        "there is no [[access]] table any more, by which everybody would be let in: if that is meant, restart"
    )]
    NoRules,
    #[error(
        "{USERS_FILE} is empty or gone, by which nobody could log in: if that is meant, restart"
    )]
    NoUsers,
    #[error("could not get random bytes: {0}")]
    Random(io::Error),
    #[error("tls: {0}")]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl AccessControl {
    /// Whether `config`'s rules are enough for the addresses that are listened on is for the caller to check.
    pub fn load(data_dir: &Path, config: &Config) -> Result<AccessControl, AccessError> {
        let files = config.tls.clone().map(|files| ServerTlsFiles {
            cert: files.cert,
            key: files.key,
            client_ca: files.client_ca,
            client_crl: files.client_crl,
        });
        let users = Users::load(data_dir)?;
        let salt_key = match users.salt_key() {
            Some(key) => *key,
            None => {
                if !users.list().is_empty() {
                    log::warn!(
                        "{USERS_FILE} has no salt_key, so that a restart tells strangers which users there are; \
                         \"safekeeper user add\" and \"remove\" write one"
                    );
                }
                random().map_err(AccessError::Random)?
            }
        };
        Ok(AccessControl {
            users,
            salt_key,
            rules: config.access.clone(),
            tls: files.as_ref().map(ServerTls::load).transpose()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Rules {
        access: Vec<AccessRule>,
    }

    fn rules(text: &str) -> Vec<AccessRule> {
        toml::from_str::<Rules>(text).expect("valid").access
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let rules = rules(
            r#"
            [[access]]
            address = "127.0.0.0/8"
            user = "walproposer"
            method = "trust"
            [[access]]
            address = "10.0.0.66"
            method = "reject"
            [[access]]
            address = "10.0.0.9/24"
            method = "scram"
            [[access]]
            address = "::1/128"
            user = "all"
            method = "scram"
            [[access]]
            address = "192.0.2.0/24"
            method = "cert"
            [[access]]
            address = "192.0.2.0/24"
            method = "trust"
            [[access]]
            address = "203.0.113.0/24"
            tls = true
            method = "cert"
            [[access]]
            address = "203.0.113.0/24"
            method = "scram"
            [[access]]
            address = "198.51.100.0/24"
            tls = true
            method = "scram"
            "#,
        );
        for (address, is_encrypted, user, method) in [
            ("127.0.0.1", false, "walproposer", Some(Method::Trust)),
            (
                "::ffff:127.0.0.1",
                false,
                "walproposer",
                Some(Method::Trust),
            ),
            ("127.0.0.1", false, "standby", None),
            ("10.0.0.66", false, "standby", Some(Method::Reject)),
            ("10.0.0.65", false, "standby", Some(Method::Scram)),
            ("10.0.1.65", false, "standby", None),
            ("::1", false, "standby", Some(Method::Scram)),
            ("fe80::1", false, "standby", None),
            ("192.0.2.1", true, "standby", Some(Method::Cert)),
            ("192.0.2.1", false, "standby", Some(Method::Cert)),
            ("203.0.113.1", true, "standby", Some(Method::Cert)),
            ("203.0.113.1", false, "standby", Some(Method::Scram)),
            ("198.51.100.1", true, "standby", Some(Method::Scram)),
            ("198.51.100.1", false, "standby", None),
        ] {
            let address = address.parse().expect("an address");
            assert_eq!(
                method_for(&rules, address, is_encrypted, user),
                method,
                "{address} {user}"
            );
        }
        let anywhere = "198.51.100.1".parse().expect("an address");
        assert_eq!(method_for(&[], anywhere, false, "x"), Some(Method::Trust));
    }

    #[test]
    fn strangers_are_let_in_by_trust_beyond_loopback_only() {
        let rule = |address: &str, method: &str| {
            rules(&format!(
                "[[access]]\naddress = \"{address}\"\nmethod = \"{method}\""
            ))
        };
        for (address, method, kept_out) in [
            ("127.0.0.0/8", "trust", true),
            ("::1", "trust", true),
            ("127.0.0.0/7", "trust", false),
            ("all", "trust", false),
            ("10.0.0.0/8", "trust", false),
            ("all", "scram", true),
            ("all", "reject", true),
        ] {
            assert_eq!(
                keep_strangers_out(&rule(address, method)),
                kept_out,
                "{address}"
            );
        }
        assert!(!keep_strangers_out(&[]));
    }

    #[test]
    fn errors_name_what_is_wrong() {
        for (text, named) in [
            (
                "address = \"10.0.0.0/33\"\nmethod = \"scram\"",
                "10.0.0.0/33",
            ),
            ("address = \"host\"\nmethod = \"scram\"", "host"),
            ("method = \"md5\"", "md5"),
            ("address = \"all\"", "method"),
            ("adress = \"all\"\nmethod = \"scram\"", "adress"),
        ] {
            let text = format!("[[access]]\n{text}");
            let error = toml::from_str::<Rules>(&text).err().expect("refused");
            assert!(error.to_string().contains(named), "{error}");
        }
    }
}
