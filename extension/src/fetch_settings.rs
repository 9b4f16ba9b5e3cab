//! `walproposer.toml` in the data directory: what `safekeeper fetch-wal` must know to serve as this
//! server's `restore_command`.
//!
//! ```text
//!   safekeepers = ["10.0.0.11:5454", "[2001:db8::3]:5454"]
//!   cluster_name = "main"
//!   user = "postgres"
//!   passfile = "/etc/postgresql/walproposer.pgpass"     if walproposer.conninfo names one, and likewise
//!   sslmode = "verify-full"                             sslrootcert, sslcert, sslkey, sslcrl
//!   channel_binding = "prefer"
//! ```
//!
//! The command runs without a server to ask: during recovery, or for pg_rewind. So each start leaves
//! its settings here, a standby's too, and base backups take the file along. It says whom to ask for
//! WAL, and nothing else: nobody leads or follows by it.
//!
//! It is replaced as a whole, and only if it would change: written under another name, fsynced,
//! renamed, the directory fsynced. A crash leaves the old one or the new one, and perhaps
//! `walproposer.toml.new`, which the next replacement overwrites.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use safekeeper_protocol::PeerAddress;
use safekeeper_wire::tls::ClientTls;

use crate::conninfo::Conninfo;

const FILE_NAME: &str = "walproposer.toml";
const NEW_FILE_NAME: &str = "walproposer.toml.new";

/// Puts it into `data_dir`, unless it is there.
pub fn store(
    data_dir: &Path,
    safekeepers: &[PeerAddress],
    cluster_name: &str,
    user: &str,
    conninfo: &Conninfo,
) -> io::Result<()> {
    let text = text(safekeepers, cluster_name, user, conninfo);
    let path = data_dir.join(FILE_NAME);
    if std::fs::read(&path).is_ok_and(|there| there == text.as_bytes()) {
        return Ok(());
    }
    let new_path = data_dir.join(NEW_FILE_NAME);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o640)
        .open(&new_path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new_path, &path)?;
    File::open(data_dir)?.sync_all()
}

fn text(
    safekeepers: &[PeerAddress],
    cluster_name: &str,
    user: &str,
    conninfo: &Conninfo,
) -> String {
    let ClientTls {
        mode,
        root_cert,
        crl,
        cert,
        key,
    } = &conninfo.tls;
    let files: String = [
        ("passfile", &conninfo.passfile),
        ("sslrootcert", root_cert),
        ("sslcert", cert),
        ("sslkey", key),
        ("sslcrl", crl),
    ]
    .into_iter()
    .filter_map(|(name, path)| Some((name, path.as_ref()?)))
    .map(|(name, path)| format!("{name} = {}\n", quoted(&path.to_string_lossy())))
    .collect();
    let addresses: Vec<_> = safekeepers.iter().map(address).collect();
    format!(
        "# Written by the extension walproposer at each start, for `safekeeper fetch-wal`.\n\
         safekeepers = [{}]\n\
         cluster_name = {}\n\
         user = {}\n\
         sslmode = \"{mode}\"\n\
         channel_binding = \"{}\"\n\
         {files}",
        addresses.join(", "),
        quoted(cluster_name),
        quoted(user),
        conninfo.binding
    )
}

fn address(address: &PeerAddress) -> String {
    let PeerAddress { host, port } = address;
    if host.contains(':') {
        quoted(&format!("[{host}]:{port}"))
    } else {
        quoted(&format!("{host}:{port}"))
    }
}

/// As a basic string of TOML.
fn quoted(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => {
                write!(out, "\\u{:04X}", u32::from(c)).expect("a string takes all");
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::parse_addresses;
    use crate::conninfo::parse_conninfo;

    #[test]
    fn it_is_written_once_and_again_when_it_changes() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(FILE_NAME);
        let safekeepers = parse_addresses("a:1, [::1]:2").expect("a good list");
        let conninfo = parse_conninfo("passfile=/p sslmode=verify-ca sslrootcert=/r");
        let conninfo = conninfo.expect("a good text");
        let store = |name| {
            store(dir.path(), &safekeepers, name, "me", &conninfo).expect("stored");
        };
        let inode = || {
            let metadata = std::fs::metadata(&path).expect("there");
            std::os::unix::fs::MetadataExt::ino(&metadata)
        };
        store("a \"b\" \\ \n ü");
        let text = std::fs::read_to_string(&path).expect("read");
        let lines: Vec<_> = text.lines().skip(1).collect();
        assert_eq!(
            lines,
            [
                "safekeepers = [\"a:1\", \"[::1]:2\"]",
                "cluster_name = \"a \\\"b\\\" \\\\ \\u000A ü\"",
                "user = \"me\"",
                "sslmode = \"verify-ca\"",
                "channel_binding = \"prefer\"",
                "passfile = \"/p\"",
                "sslrootcert = \"/r\"",
            ]
        );
        let before = inode();
        store("a \"b\" \\ \n ü");
        assert_eq!(inode(), before);
        // What a crash left is no hindrance.
        std::fs::write(dir.path().join(NEW_FILE_NAME), "half a fi").expect("written");
        store("other");
        let text = std::fs::read_to_string(&path).expect("read");
        assert!(text.contains("cluster_name = \"other\""), "{text}");
        assert!(!dir.path().join(NEW_FILE_NAME).exists());
    }
}
