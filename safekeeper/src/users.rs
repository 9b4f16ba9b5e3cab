//! Who may log in: names, what each may do, and what proves their password.
//!
//! `D/users.toml`, made by `safekeeper user add`, for its owner only. A password stands in it as a verifier
//! (`safekeeper_wire::scram`), from which it can't be had:
//!
//! ```text
//!   salt_key = "..."                           drawn at random once; see safekeeper_wire::scram
//!
//!   [[user]]
//!   name = "walproposer"
//!   roles = ["proposer"]
//!   verifier = "SCRAM-SHA-256$4096:..."
//! ```
//!
//! The file is replaced as a whole. A running daemon reads it again on SIGHUP; one that can't be read leaves
//! the users as they were.

use std::fmt::{self, Display};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::process::geteuid;
use safekeeper_wire::scram::{SaltKey, Verifier, random};
use safekeeper_wire::startup::NAME_LEN_MAX;
use serde::{Deserialize, Serialize};

use crate::identity::IDENTITY_FILE;

/// In the data directory.
pub const USERS_FILE: &str = "users.toml";
const USERS_TMP: &str = "users.toml.tmp";

/// What a user may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Push WAL, vote: everything that a primary does here. And read.
    Proposer,
    /// Read WAL as a standby does, and have replication slots.
    Replication,
    /// See how far the log has come, and settings, and slots.
    Monitor,
    /// What all others may but push WAL.
    Admin,
}

impl Role {
    pub const ALL: [Role; 4] = [
        Role::Proposer,
        Role::Replication,
        Role::Monitor,
        Role::Admin,
    ];
}

impl Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Proposer => "proposer",
            Role::Replication => "replication",
            Role::Monitor => "monitor",
            Role::Admin => "admin",
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub roles: Vec<Role>,
    /// `None`: it has no password, and comes with a certificate.
    pub verifier: Option<Verifier>,
}

/// As it stands in the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct UserEntry {
    name: String,
    roles: Vec<Role>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    verifier: Option<String>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct UsersFile {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    salt_key: Option<String>,
    #[serde(default)]
    user: Vec<UserEntry>,
}

#[derive(Debug, thiserror::Error)]
pub enum UsersError {
    #[error("could not {doing} {}: {source}", path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{}: {problem}", path.display())]
    Invalid { path: PathBuf, problem: String },
    #[error(
        "{} can be read by others than its owner (mode {mode:03o}); it must be 0600",
        path.display()
    )]
    Permissions { path: PathBuf, mode: u32 },
    #[error("invalid user name \"{0}\": expected 1 to {NAME_LEN_MAX} bytes, none of them zero")]
    Name(String),
    #[error("user \"{0}\" exists already")]
    Exists(String),
    #[error("user \"{0}\" does not exist")]
    Unknown(String),
}

/// All users of a data directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Users {
    users: Vec<User>,
    /// `None`: not drawn yet.
    salt_key: Option<SaltKey>,
}

impl Users {
    /// None where there is no file.
    pub fn load(data_dir: &Path) -> Result<Users, UsersError> {
        let path = data_dir.join(USERS_FILE);
        let failed = |source| UsersError::Io {
            doing: "read",
            path: path.clone(),
            source,
        };
        let mode = match std::fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Users::default()),
            metadata => metadata.map_err(failed)?.permissions().mode() & 0o777,
        };
        if mode & 0o077 != 0 {
            return Err(UsersError::Permissions { path, mode });
        }
        let text = std::fs::read_to_string(&path).map_err(failed)?;
        Users::parse(&text).map_err(|problem| UsersError::Invalid { path, problem })
    }

    fn parse(text: &str) -> Result<Users, String> {
        let file: UsersFile = toml::from_str(text).map_err(|error| error.message().to_owned())?;
        let mut users = Users::default();
        for entry in file.user {
            // What stands there is not repeated: a log is read by many.
            let parsed = entry.verifier.as_deref().map(|text| {
                Verifier::parse(text)
                    .ok_or_else(|| format!("user \"{}\" has an invalid verifier", entry.name))
            });
            let verifier = parsed.transpose()?;
            let user = User {
                name: entry.name,
                roles: entry.roles,
                verifier,
            };
            users.add(user).map_err(|error| error.to_string())?;
        }
        if let Some(text) = file.salt_key {
            let key = STANDARD.decode(text).ok();
            let key = key.and_then(|key| SaltKey::try_from(key).ok());
            users.salt_key = Some(key.ok_or("invalid salt_key: expected 32 bytes, as base64")?);
        }
        Ok(users)
    }

    /// Replaces the file.
    pub fn store(&mut self, data_dir: &Path) -> Result<(), UsersError> {
        if self.salt_key.is_none() {
            self.salt_key = Some(random().map_err(|source| UsersError::Io {
                doing: "get random bytes for",
                path: data_dir.join(USERS_FILE),
                source,
            })?);
        }
        let entry = |user: &User| UserEntry {
            name: user.name.clone(),
            roles: user.roles.clone(),
            verifier: user.verifier.as_ref().map(Verifier::to_text),
        };
        let file = UsersFile {
            salt_key: self.salt_key.map(|key| STANDARD.encode(key)),
            user: self.users.iter().map(entry).collect(),
        };
        let text = toml::to_string(&file).expect("texts and lists of texts");
        let (tmp, path) = (data_dir.join(USERS_TMP), data_dir.join(USERS_FILE));
        let written = || {
            // One that a crash has left may have another mode.
            match std::fs::remove_file(&tmp) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&tmp)?;
            if geteuid().is_root()
                && let Ok(identity) = std::fs::metadata(data_dir.join(IDENTITY_FILE))
            {
                // Whoever reads that one reads this one.
                fchown(&file, Some(identity.uid()), Some(identity.gid()))?;
            }
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&tmp, &path)?;
            File::open(data_dir)?.sync_all()
        };
        written().map_err(|source| UsersError::Io {
            doing: "write",
            path: path.clone(),
            source,
        })
    }

    pub fn add(&mut self, user: User) -> Result<(), UsersError> {
        let name = &user.name;
        if name.is_empty() || name.len() > NAME_LEN_MAX || name.contains('\0') {
            return Err(UsersError::Name(user.name));
        }
        if self.find(name).is_some() {
            return Err(UsersError::Exists(user.name));
        }
        self.users.push(user);
        Ok(())
    }

    pub fn remove(&mut self, name: &str) -> Result<User, UsersError> {
        let at = self.users.iter().position(|user| user.name == name);
        let at = at.ok_or_else(|| UsersError::Unknown(name.to_owned()))?;
        Ok(self.users.remove(at))
    }

    pub fn find(&self, name: &str) -> Option<&User> {
        self.users.iter().find(|user| user.name == name)
    }

    pub fn list(&self) -> &[User] {
        &self.users
    }

    /// What those are asked with who are not here; another one for each restart would tell who is.
    pub fn salt_key(&self) -> Option<&SaltKey> {
        self.salt_key.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str) -> User {
        User {
            name: name.to_owned(),
            roles: vec![Role::Replication],
            verifier: Some(Verifier::of_password("secret")),
        }
    }

    #[test]
    fn users_survive_in_a_file_that_others_cannot_read() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(Users::load(dir.path()).expect("none"), Users::default());
        let mut users = Users::default();
        users.add(user("standby")).expect("new");
        let strange = User {
            roles: Role::ALL.to_vec(),
            verifier: None,
            ..user("quote \" and line\n")
        };
        users.add(strange).expect("new");
        users.store(dir.path()).expect("stored");
        let salt_key = *users.salt_key().expect("drawn");
        users.store(dir.path()).expect("stored again");
        assert_eq!(users.salt_key(), Some(&salt_key));
        assert_eq!(Users::load(dir.path()).expect("there"), users);
        let path = dir.path().join(USERS_FILE);
        let text = std::fs::read_to_string(&path).expect("a file");
        assert!(!text.contains("secret"), "{text}");
        let mode = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode));
        mode(0o640).expect("our own file");
        let refused = Users::load(dir.path()).expect_err("others can read it");
        assert!(refused.to_string().contains("640"), "{refused}");
    }

    /// `sudo safekeeper user add`: the daemon runs as another user. Who is not root can't and need not do that.
    #[test]
    fn what_root_writes_belongs_to_the_daemon() {
        let dir = tempfile::tempdir().expect("a directory");
        let identity = dir.path().join(IDENTITY_FILE);
        std::fs::write(&identity, "").expect("written");
        if !geteuid().is_root() {
            return eprintln!("not tested: only root gives files away");
        }
        std::os::unix::fs::chown(&identity, Some(65534), Some(65533)).expect("root may");
        Users::default().store(dir.path()).expect("stored");
        let metadata = std::fs::metadata(dir.path().join(USERS_FILE)).expect("there");
        assert_eq!((metadata.uid(), metadata.gid()), (65534, 65533));
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_name_is_there_once_and_can_go() {
        let mut users = Users::default();
        users.add(user("a")).expect("new");
        assert!(matches!(users.add(user("a")), Err(UsersError::Exists(_))));
        for name in ["", "zero\0", &"x".repeat(64)] {
            assert!(matches!(users.add(user(name)), Err(UsersError::Name(_))));
        }
        assert_eq!(
            users.remove("a").map(|user| user.name).ok(),
            Some("a".into())
        );
        assert!(matches!(users.remove("a"), Err(UsersError::Unknown(_))));
    }

    #[test]
    fn what_is_no_users_file_is_refused_without_repeating_it() {
        let verifier = Verifier::of_password("secret").to_text();
        let entry = |name: &str, role: &str, verifier: &str| {
            format!(
                "[[user]]\nname = \"{name}\"\nroles = [\"{role}\"]\nverifier = \"{verifier}\"\n"
            )
        };
        let good = entry("a", "proposer", &verifier);
        assert!(Users::parse(&good).is_ok());
        for text in [
            "[[user]]\nname = \"a\"",
            "[[user]]\nroles = [\"proposer\"]",
            "users = 1",
            "[",
            &entry("a", "king", &verifier),
            &entry("a", "proposer", "hunter2"),
            &entry("", "proposer", &verifier),
            &format!("{good}{good}"),
            &format!("salt_key = \"hunter2\"\n{good}"),
        ] {
            let error = Users::parse(text).expect_err(text);
            assert!(
                !error.contains("hunter2") && !error.contains(&verifier[20..]),
                "{error}"
            );
        }
    }
}
