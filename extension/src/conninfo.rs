//! What all connections to safekeepers have in common: `walproposer.conninfo`, in libpq's words.
//!
//! ```text
//!   user=walproposer passfile=/etc/postgresql/walproposer.pgpass connect_timeout=5
//!   sslmode=verify-full sslrootcert=/etc/ssl/safekeepers.crt
//! ```
//!
//! `keyword=value`, separated by blanks; a value with blanks stands in single quotes, and in it
//! `\'` and `\\` are a quote and a backslash, as libpq reads it. (`interfaces/libpq/fe-connect.c`)
//!
//! A word that is not acted upon here is an error: to pass over one like `channel_binding=require` would be a
//! lie. So are words given twice, and a password, which everybody could read there.

use std::path::PathBuf;
use std::time::Duration;

use safekeeper_protocol::PeerAddress;
use safekeeper_wire::credentials::Credentials;
use safekeeper_wire::login::BindingMode;
use safekeeper_wire::passfile::default_passfile;
use safekeeper_wire::tls::{ClientTls, SslMode};

use crate::connect::Dial;

/// How to connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conninfo {
    /// `None`: the name of the operating system's user, as libpq does it.
    pub user: Option<String>,
    /// `None`: where libpq looks, `PGPASSFILE` or `.pgpass` at home.
    pub passfile: Option<PathBuf>,
    pub tls: ClientTls,
    pub binding: BindingMode,
    /// For each address a host name resolves to, and again for the handshake.
    pub connect_timeout: Duration,
}

/// Long enough for a slow handshake, short against an operator's patience.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

impl Conninfo {
    /// How to reach one safekeeper; `os_user` is who we are.
    pub fn dial(&self, address: &PeerAddress, os_user: impl FnOnce() -> String) -> Dial {
        Dial {
            address: address.clone(),
            credentials: Credentials {
                user: self.user.clone().unwrap_or_else(os_user),
                passfile: self.passfile.clone().or_else(default_passfile),
                tls: self.tls.clone(),
                binding: self.binding,
            },
            timeout: self.connect_timeout,
        }
    }
}

impl Default for Conninfo {
    fn default() -> Conninfo {
        Conninfo {
            user: None,
            passfile: None,
            tls: ClientTls::default(),
            binding: BindingMode::default(),
            connect_timeout: CONNECT_TIMEOUT,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConninfoError {
    #[error("missing \"=\" after \"{0}\"")]
    NoValue(String),
    #[error("the quoted value of \"{0}\" has no end")]
    Unterminated(String),
    #[error("unknown keyword \"{0}\"")]
    Unknown(String),
    #[error("passwords do not stand in the configuration: name a file in \"passfile\"")]
    Password,
    #[error("keyword \"{0}\" is missing, which the others need")]
    Missing(&'static str),
    #[error("keyword \"{0}\" is given twice")]
    Twice(String),
    #[error("invalid value \"{value}\" of \"{keyword}\": {expected}")]
    Invalid {
        keyword: String,
        value: String,
        expected: &'static str,
    },
}

pub fn parse_conninfo(text: &str) -> Result<Conninfo, ConninfoError> {
    let mut conninfo = Conninfo::default();
    let mut seen: Vec<String> = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (keyword, value, after) = next_word(rest)?;
        rest = after;
        if seen.contains(&keyword) {
            return Err(ConninfoError::Twice(keyword));
        }
        apply(&mut conninfo, &keyword, value)?;
        seen.push(keyword);
    }
    let ClientTls {
        mode,
        root_cert,
        crl,
        cert,
        key,
    } = &conninfo.tls;
    let missing = match mode {
        SslMode::VerifyCa | SslMode::VerifyFull if root_cert.is_none() => Some("sslrootcert"),
        _ if crl.is_some() && root_cert.is_none() => Some("sslrootcert"),
        _ if cert.is_some() && key.is_none() => Some("sslkey"),
        _ if key.is_some() && cert.is_none() => Some("sslcert"),
        _ => None,
    };
    match missing {
        Some(keyword) => Err(ConninfoError::Missing(keyword)),
        None => Ok(conninfo),
    }
}

fn apply(conninfo: &mut Conninfo, keyword: &str, value: String) -> Result<(), ConninfoError> {
    let invalid = |value: String, expected| ConninfoError::Invalid {
        keyword: keyword.to_owned(),
        value,
        expected,
    };
    match keyword {
        "user" if value.is_empty() || value.contains('\0') => {
            Err(invalid(value, "expected a name"))
        }
        "user" => {
            conninfo.user = Some(value);
            Ok(())
        }
        // It is read by other processes, too, in other directories.
        "passfile" if !value.starts_with('/') => Err(invalid(value, "expected an absolute path")),
        "passfile" => {
            conninfo.passfile = Some(value.into());
            Ok(())
        }
        "connect_timeout" => {
            let seconds = value
                .parse()
                .ok()
                .filter(|seconds| (1..=3600).contains(seconds));
            let seconds = seconds.ok_or_else(|| invalid(value, "expected 1 to 3600 seconds"))?;
            conninfo.connect_timeout = Duration::from_secs(seconds);
            Ok(())
        }
        "sslmode" => {
            conninfo.tls.mode = value.parse().map_err(|_| {
                invalid(
                    value,
                    "expected disable, prefer, require, verify-ca or verify-full",
                )
            })?;
            Ok(())
        }
        "channel_binding" => {
            conninfo.binding = value
                .parse()
                .map_err(|_| invalid(value, "expected disable, prefer or require"))?;
            Ok(())
        }
        "sslrootcert" | "sslcert" | "sslkey" | "sslcrl" if !value.starts_with('/') => {
            Err(invalid(value, "expected an absolute path"))
        }
        "sslrootcert" => {
            conninfo.tls.root_cert = Some(value.into());
            Ok(())
        }
        "sslcert" => {
            conninfo.tls.cert = Some(value.into());
            Ok(())
        }
        "sslkey" => {
            conninfo.tls.key = Some(value.into());
            Ok(())
        }
        "sslcrl" => {
            conninfo.tls.crl = Some(value.into());
            Ok(())
        }
        "password" => Err(ConninfoError::Password),
        _ => Err(ConninfoError::Unknown(keyword.to_owned())),
    }
}

/// Splits `keyword = value` off the front: keyword, value and what follows.
fn next_word(text: &str) -> Result<(String, String, &str), ConninfoError> {
    let end = text
        .find(|c: char| c == '=' || c.is_whitespace())
        .unwrap_or(text.len());
    let (keyword, rest) = text.split_at(end);
    let keyword = keyword.to_owned();
    let Some(rest) = rest.trim_start().strip_prefix('=') else {
        return Err(ConninfoError::NoValue(keyword));
    };
    let rest = rest.trim_start();
    let quoted = rest.strip_prefix('\'');
    let body = quoted.unwrap_or(rest);
    let mut value = String::new();
    let mut chars = body.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            '\'' if quoted.is_some() => {
                return Ok((keyword, value, body[at + 1..].trim_start()));
            }
            _ if quoted.is_none() && c.is_whitespace() => {
                return Ok((keyword, value, body[at..].trim_start()));
            }
            _ => value.push(c),
        }
    }
    match quoted {
        Some(_) => Err(ConninfoError::Unterminated(keyword)),
        None => Ok((keyword, value, "")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_as_libpq_reads_them() {
        for (text, user, seconds) in [
            ("", None, 10),
            ("user=wp", Some("wp"), 10),
            (" user = wp  connect_timeout=3 ", Some("wp"), 3),
            ("user='w p\\'s \\\\'connect_timeout=3", Some("w p's \\"), 3),
            ("user=a\\ b", Some("a b"), 10),
            ("sslmode=disable", None, 10),
        ] {
            let got = parse_conninfo(text).expect(text);
            assert_eq!(got.user.as_deref(), user, "{text}");
            assert_eq!(got.connect_timeout, Duration::from_secs(seconds), "{text}");
        }
    }

    #[test]
    fn encryption_is_as_demanded() {
        let tls = |text: &str| parse_conninfo(text).expect(text).tls;
        assert_eq!(tls(""), ClientTls::default());
        assert_eq!(tls("sslmode=disable"), ClientTls::disabled());
        let all = tls("sslmode=verify-full sslrootcert=/r sslcert=/c sslkey=/k sslcrl=/l");
        let expected = ClientTls {
            mode: SslMode::VerifyFull,
            root_cert: Some("/r".into()),
            crl: Some("/l".into()),
            cert: Some("/c".into()),
            key: Some("/k".into()),
        };
        assert_eq!(all, expected);
        let binding = |text: &str| parse_conninfo(text).expect(text).binding;
        assert_eq!(binding(""), BindingMode::Prefer);
        assert_eq!(binding("channel_binding=require"), BindingMode::Require);
    }

    #[test]
    fn what_would_not_be_acted_upon_is_an_error() {
        for (text, want) in [
            ("user", "missing \"=\" after \"user\""),
            ("user=a b", "missing \"=\" after \"b\""),
            ("user='a", "the quoted value of \"user\" has no end"),
            ("usr=a", "unknown keyword \"usr\""),
            ("=a", "unknown keyword \"\""),
            ("host=a", "unknown keyword \"host\""),
            ("user=a user=b", "keyword \"user\" is given twice"),
            (
                "passfile=x",
                "invalid value \"x\" of \"passfile\": expected an absolute path",
            ),
            (
                "password=secret",
                "passwords do not stand in the configuration: name a file in \"passfile\"",
            ),
            (
                "channel_binding=yes",
                "invalid value \"yes\" of \"channel_binding\": expected disable, prefer or require",
            ),
            (
                "sslcrl=/x",
                "keyword \"sslrootcert\" is missing, which the others need",
            ),
            (
                "sslmode=verify-full",
                "keyword \"sslrootcert\" is missing, which the others need",
            ),
            (
                "sslcert=/x",
                "keyword \"sslkey\" is missing, which the others need",
            ),
            (
                "sslkey=/x",
                "keyword \"sslcert\" is missing, which the others need",
            ),
            (
                "sslrootcert=x",
                "invalid value \"x\" of \"sslrootcert\": expected an absolute path",
            ),
            ("user=", "invalid value \"\" of \"user\": expected a name"),
            (
                "connect_timeout=0",
                "invalid value \"0\" of \"connect_timeout\": expected 1 to 3600 seconds",
            ),
            (
                "connect_timeout=x",
                "invalid value \"x\" of \"connect_timeout\": expected 1 to 3600 seconds",
            ),
            (
                "sslmode=allow",
                "invalid value \"allow\" of \"sslmode\": expected disable, prefer, require, verify-ca or \
                 verify-full",
            ),
        ] {
            assert_eq!(
                parse_conninfo(text).expect_err(text).to_string(),
                want,
                "{text}"
            );
        }
    }
}
