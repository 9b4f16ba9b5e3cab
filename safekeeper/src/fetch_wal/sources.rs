//! Whom `fetch-wal` asks: those of `--from`, or those that the extension named in the data directory.
//!
//! `walproposer.toml` is written by the extension at each start of a server, and goes with every
//! base backup:
//!
//! ```text
//!   safekeepers = ["10.0.0.11:5454", "10.0.0.12:5454", "10.0.0.13:5454"]
//!   cluster_name = "main"
//!   user = "postgres"                         and what else walproposer.conninfo says of credentials.rs
//! ```
//!
//! A later version may say more in it, which is passed over.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use safekeeper_wire::credentials::Credentials;
use serde::Deserialize;

use super::FetchRequest;
use crate::credentials::CredentialsEntry;

const FILE_NAME: &str = "walproposer.toml";
/// A list of sixteen names takes 5 kB.
const FILE_LEN_MAX: u64 = 64 * 1024;

const DEFAULT_PORT: u16 = 5454;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    /// `host:port`; at least one.
    pub addresses: Vec<String>,
    pub cluster: Option<String>,
    pub credentials: Credentials,
}

#[derive(Debug, Default, Deserialize)]
struct NamedByExtension {
    safekeepers: Vec<String>,
    cluster_name: Option<String>,
    #[serde(flatten)]
    credentials: CredentialsEntry,
}

impl Sources {
    /// `data_dir` is the one that %p lies in, as far as that can be told.
    pub fn find(request: &FetchRequest<'_>, data_dir: Option<&Path>) -> Result<Sources, String> {
        let named = if request.from.is_empty() {
            named_in(data_dir)?
        } else {
            NamedByExtension {
                safekeepers: request.from.to_vec(),
                ..NamedByExtension::default()
            }
        };
        let entries = named.safekeepers.iter().flat_map(|list| list.split(','));
        let mut addresses = Vec::new();
        for entry in entries {
            let address = parse_address(entry.trim())?;
            // Two answers of one safekeeper are no majority.
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        if addresses.is_empty() {
            return Err(format!(
                "{FILE_NAME} names no safekeeper; name them with --from HOST:PORT"
            ));
        }
        let mut credentials = named.credentials.credentials(os_user);
        if let Some(user) = request.user {
            credentials.user = user.to_owned();
        }
        Ok(Sources {
            addresses,
            cluster: request.cluster.map(str::to_owned).or(named.cluster_name),
            credentials,
        })
    }
}

fn named_in(data_dir: Option<&Path>) -> Result<NamedByExtension, String> {
    let Some(data_dir) = data_dir else {
        return Err(format!(
            "the path does not lie in a pg_wal directory beside which {FILE_NAME} could name the safekeepers; name \
             them with --from HOST:PORT"
        ));
    };
    let path = data_dir.join(FILE_NAME);
    let text = File::open(&path).and_then(|file| {
        let mut text = String::new();
        file.take(FILE_LEN_MAX).read_to_string(&mut text)?;
        Ok(text)
    });
    let text = text.map_err(|error| {
        format!(
            "could not read \"{}\", which the extension walproposer writes when a server starts: {error}; name the \
             safekeepers with --from HOST:PORT",
            path.display()
        )
    })?;
    toml::from_str(&text).map_err(|error| {
        let error = error.message();
        format!(
            "\"{}\" is not as the extension writes it: {error}",
            path.display()
        )
    })
}

/// With a port: the default one if none is named.
fn parse_address(entry: &str) -> Result<String, String> {
    let malformed = |what: &str| format!("\"{entry}\" in the list of safekeepers {what}");
    let (host, port) = match entry.rsplit_once(':') {
        // The colon is one of an IPv6 address's own.
        Some((host, rest)) if !rest.contains(']') => (host, Some(rest)),
        _ => (entry, None),
    };
    if host.is_empty() {
        return Err(malformed("has no host"));
    }
    let bracketed = host.starts_with('[') && host.ends_with(']');
    if host.contains(':') && !bracketed {
        return Err(malformed(
            "is not of the form host:port; an IPv6 address stands in brackets",
        ));
    }
    let port = match port {
        None => DEFAULT_PORT,
        Some(port) => port
            .parse()
            .ok()
            .filter(|&number: &u16| number != 0 && port.bytes().all(|b| b.is_ascii_digit()))
            .ok_or_else(|| malformed("has an invalid port: it must be a number from 1 to 65535"))?,
    };
    Ok(format!("{host}:{port}"))
}

/// The name libpq would take, as far as the environment tells it.
fn os_user() -> String {
    let named = |name| std::env::var(name).ok().filter(|user| !user.is_empty());
    named("PGUSER")
        .or_else(|| named("USER"))
        .unwrap_or_else(|| "postgres".to_owned())
}

#[cfg(test)]
mod tests {
    use safekeeper_wire::login::BindingMode;
    use safekeeper_wire::tls::{ClientTls, SslMode};

    use super::*;

    fn request(from: &[String]) -> FetchRequest<'_> {
        FetchRequest {
            file: "",
            from,
            cluster: None,
            user: Some("me"),
        }
    }

    #[test]
    fn the_command_line_names_them() {
        let from = ["a:1, b ,[::1]".to_owned(), "c:7,a:1".to_owned()];
        let sources = Sources::find(&request(&from), None).expect("a good list");
        assert_eq!(sources.addresses, ["a:1", "b:5454", "[::1]:5454", "c:7"]);
        assert_eq!(
            (sources.cluster, sources.credentials.user.as_str()),
            (None, "me")
        );
        for (entry, what) in [
            ("a:0", "port"),
            ("a:+1", "port"),
            ("a:65536", "port"),
            ("::1", "brackets"),
            ("a,,b", "no host"),
            (":5", "no host"),
        ] {
            let refused = Sources::find(&request(&[entry.to_owned()]), None).expect_err(entry);
            assert!(refused.contains(what), "{entry}: {refused}");
        }
    }

    #[test]
    fn or_the_data_directory_does() {
        let dir = tempfile::tempdir().expect("a directory");
        let find = |text: &str| {
            std::fs::write(dir.path().join(FILE_NAME), text).expect("written");
            Sources::find(&request(&[]), Some(dir.path()))
        };
        let sources = find(
            "safekeepers = [\"a:1\", \"[::1]:2\"]\ncluster_name = \"x y\"\nuser = \"u\"\npassfile = \"/p\"\nsslmode = \"verify-full\"\nsslrootcert = \"/r\"\nchannel_binding = \"require\"\nlater = 1\n",
        );
        let expected = Sources {
            addresses: vec!["a:1".into(), "[::1]:2".into()],
            cluster: Some("x y".into()),
            credentials: Credentials {
                user: "me".into(),
                passfile: Some("/p".into()),
                tls: ClientTls {
                    mode: SslMode::VerifyFull,
                    root_cert: Some("/r".into()),
                    ..ClientTls::default()
                },
                binding: BindingMode::Require,
            },
        };
        assert_eq!(sources, Ok(expected));
        for text in [
            "safekeepers = []",
            "safekeepers = 7",
            "user = \"x\"",
            "safekeepers = [\"a\"]\nsslmode = \"often\"",
            "safekeepers = [\"a\"]\nchannel_binding = \"often\"",
            "\u{0}",
        ] {
            find(text).expect_err(text);
        }
        std::fs::remove_file(dir.path().join(FILE_NAME)).expect("removed");
        for data_dir in [Some(dir.path()), None] {
            let refused = Sources::find(&request(&[]), data_dir).expect_err("nobody is named");
            assert!(refused.contains("--from"), "{refused}");
        }
    }
}
