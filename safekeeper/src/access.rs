//! Who is asked for a password, by address and name: the `[[access]]` tables of the configuration file, as
//! `pg_hba.conf` is for Postgres.
//!
//! ```text
//!   [[access]]                      the first rule that fits decides; none fits: refused
//!   address = "127.0.0.0/8"
//!   method = "trust"
//!
//!   [[access]]
//!   address = "10.0.0.0/24"         or "all"
//!   user = "standby1"               or "all"
//!   method = "scram"                or "trust", "reject"
//! ```
//!
//! Without any rule everybody is trusted; then only a loopback address may be listened on, unless the
//! operator says `trust_network`.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, de::Error as _};

/// What a rule demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Nothing.
    Trust,
    /// The password of a user, by SCRAM-SHA-256.
    Scram,
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
    method: Method,
}

impl AccessRule {
    fn fits(&self, address: IpAddr, user: &str) -> bool {
        self.address
            .is_none_or(|network| network.contains(&address))
            && self.user.as_deref().is_none_or(|name| name == user)
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
pub fn method_for(rules: &[AccessRule], address: IpAddr, user: &str) -> Option<Method> {
    if rules.is_empty() {
        return Some(Method::Trust);
    }
    // An IPv4 host that came by an IPv6 socket.
    let address = address.to_canonical();
    let rule = rules.iter().find(|rule| rule.fits(address, user));
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
            "#,
        );
        for (address, user, method) in [
            ("127.0.0.1", "walproposer", Some(Method::Trust)),
            ("::ffff:127.0.0.1", "walproposer", Some(Method::Trust)),
            ("127.0.0.1", "standby", None),
            ("10.0.0.66", "standby", Some(Method::Reject)),
            ("10.0.0.65", "standby", Some(Method::Scram)),
            ("10.0.1.65", "standby", None),
            ("::1", "standby", Some(Method::Scram)),
            ("fe80::1", "standby", None),
        ] {
            let address = address.parse().expect("an address");
            assert_eq!(
                method_for(&rules, address, user),
                method,
                "{address} {user}"
            );
        }
        let anywhere = "198.51.100.1".parse().expect("an address");
        assert_eq!(method_for(&[], anywhere, "x"), Some(Method::Trust));
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
