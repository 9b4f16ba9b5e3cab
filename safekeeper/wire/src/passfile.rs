//! Passwords of clients, as libpq keeps them: `~/.pgpass`, or the file that `passfile` names.
//! (`passwordFromFile` in `interfaces/libpq/fe-connect.c`)
//!
//! ```text
//!   # host:port:database:user:password      * fits anything; \ before a : or \ in a field
//!   10.0.0.11:5454:replication:walproposer:secret
//! ```
//!
//! The database of a replication connection is `replication`. The first line that fits counts. Where there is
//! no file, or something else than one, there is no password. A file that can't be read, or that others can read,
//! is refused, if a password is asked for; libpq warns, if at all, and goes on without.

use std::io::{self, ErrorKind};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::login::Password;

#[derive(Debug, thiserror::Error)]
pub enum PassfileError {
    #[error("could not read password file {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "password file {} can be read by others than its owner (mode {mode:03o}); it must be 0600",
        path.display()
    )]
    Permissions { path: PathBuf, mode: u32 },
}

/// Where libpq looks if it is told nothing: `PGPASSFILE`, or `.pgpass` at home.
pub fn default_passfile() -> Option<PathBuf> {
    let named = std::env::var_os("PGPASSFILE").filter(|path| !path.is_empty());
    let at_home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".pgpass"));
    named.map(PathBuf::from).or_else(at_home)
}

/// For a replication connection. None if no line fits, or there is no file.
pub fn find_password(
    path: &Path,
    host: &str,
    port: u16,
    user: &str,
) -> Result<Option<Password>, PassfileError> {
    let failed = |source| PassfileError::Io {
        path: path.to_owned(),
        source,
    };
    let metadata = match std::fs::metadata(path) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        metadata => metadata.map_err(failed)?,
    };
    // A device or a pipe could keep us for ever.
    if !metadata.is_file() {
        return Ok(None);
    }
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        let path = path.to_owned();
        return Err(PassfileError::Permissions { path, mode });
    }
    let text = std::fs::read_to_string(path).map_err(failed)?;
    let wanted = [host, &port.to_string(), "replication", user];
    let password = text.lines().find_map(|line| password_of(line, &wanted));
    Ok(password.map(Password::new))
}

/// The last field of a line whose others fit.
fn password_of(line: &str, wanted: &[&str; 4]) -> Option<String> {
    if line.starts_with('#') {
        return None;
    }
    let mut rest = line;
    for wanted in wanted {
        let (field, behind) = next_field(rest)?;
        let fits = rest.starts_with("*:") || field == *wanted;
        rest = fits.then_some(behind)?;
    }
    // It ends with the line, or, as libpq reads it, with a colon without a backslash.
    next_field(&format!("{rest}:")).map(|(password, _)| password)
}

/// Up to the next colon, which is left out.
fn next_field(text: &str) -> Option<(String, &str)> {
    let mut field = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            ':' => return Some((field, &text[at + 1..])),
            '\\' => field.extend(chars.next().map(|(_, c)| c)),
            c => field.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(text: &str, mode: u32) -> Result<Option<Password>, PassfileError> {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("pgpass");
        std::fs::write(&path, text).expect("written");
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(&path, permissions).expect("our own");
        find_password(&path, "10.0.0.1", 5454, "me")
    }

    #[test]
    fn the_first_line_that_fits_counts() {
        for (text, password) in [
            ("10.0.0.1:5454:replication:me:secret\n", Some("secret")),
            ("*:*:*:me:a\n*:*:*:*:b\n", Some("a")),
            ("*:*:*:you:a\n*:*:*:*:b\n", Some("b")),
            ("#*:*:*:*:a\n\n*:*:*:*:b", Some("b")),
            ("10.0.0.2:*:*:*:a\n", None),
            ("*:5432:*:*:a\n", None),
            ("*:*:postgres:*:a\n", None),
            ("*:*:*:*:a\\:b\\\\c\n", Some("a:b\\c")),
            ("*:*:*:m\\e:a\n", Some("a")),
            ("*:*:*:*\n", None),
            ("*:*:*:*:\n", Some("")),
            ("", None),
        ] {
            let expected = password.map(|text| Password::new(text.to_owned()));
            assert_eq!(find(text, 0o600).expect("read"), expected, "{text}");
        }
    }

    #[test]
    fn a_file_for_all_to_read_is_refused_and_one_that_is_not_there_is_none() {
        let refused = find("*:*:*:*:a", 0o644).expect_err("others can read it");
        assert!(refused.to_string().contains("644"), "{refused}");
        for nowhere in ["/nonexistent/pgpass", "/dev/null/.pgpass", "/dev/null", "/"] {
            let found = find_password(Path::new(nowhere), "h", 1, "u");
            assert_eq!(found.expect("no file"), None, "{nowhere}");
        }
        // What can't be looked at for another reason is told.
        let dir = tempfile::tempdir().expect("a directory");
        let circle = dir.path().join("circle");
        std::os::unix::fs::symlink(&circle, &circle).expect("made");
        let refused = find_password(&circle, "h", 1, "u").expect_err("a circle");
        assert!(refused.to_string().contains("circle"), "{refused}");
    }
}
