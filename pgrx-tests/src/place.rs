//! Where a test lives: its directory, its address, and who runs its processes.
//!
//! Postgres refuses to run as root, so when the tests are run by root every process of a cluster
//! runs as `postgres`, and owns its files. Otherwise all is run by whoever runs the tests.
//!
//! A test's directory is short, because the path of a Unix socket has room for 107 bytes. It is
//! removed when the test passes; when it fails it is kept, and its path and the last lines of its
//! logs are printed.
//!
//! Addresses need no search for a free port, which could be taken between the search and the use,
//! or while a daemon is down for a moment: each test process has a loopback address of its own,
//! made of its process id, and counts its ports.

use std::ffi::CString;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;

/// The programs under test, as `scripts/cluster-tests` stages them.
pub struct Programs;

impl Programs {
    /// The daemon: `SAFEKEEPER_BIN`.
    pub fn safekeeper() -> PathBuf {
        Programs::existing(
            "SAFEKEEPER_BIN",
            std::env::var_os("SAFEKEEPER_BIN").map(PathBuf::from),
        )
    }

    /// One of Postgres's: from `PG_BINDIR`, whose server must have the extension.
    pub fn postgres(name: &str) -> PathBuf {
        let bindir = std::env::var_os("PG_BINDIR").map(PathBuf::from);
        Programs::existing("PG_BINDIR", bindir.map(|dir| dir.join(name)))
    }

    /// A program of somebody else's, which `scripts/install-deps` installs.
    pub fn installed(name: &str) -> PathBuf {
        let path = Path::new("/usr/bin").join(name);
        assert!(
            path.exists(),
            "{} does not exist; scripts/install-deps installs it",
            path.display()
        );
        path
    }

    fn existing(variable: &str, path: Option<PathBuf>) -> PathBuf {
        let path = path.unwrap_or_else(|| {
            panic!("{variable} is not set; scripts/cluster-tests builds what is needed and sets it")
        });
        assert!(
            path.exists(),
            "{} does not exist (from {variable})",
            path.display()
        );
        path
    }
}

/// Who runs Postgres and the safekeepers, if not ourselves.
#[derive(Clone, Copy, Debug)]
pub struct ServerUser {
    pub uid: u32,
    pub gid: u32,
}

impl ServerUser {
    /// `postgres` for root, nobody else for others.
    pub fn other_than_us() -> Option<ServerUser> {
        // Asked once: the answer comes in memory that another thread's question would change.
        static USER: OnceLock<Option<ServerUser>> = OnceLock::new();
        *USER.get_or_init(ServerUser::look_up)
    }

    fn look_up() -> Option<ServerUser> {
        // SAFETY: no preconditions, cannot fail.
        if unsafe { libc::geteuid() } != 0 {
            return None;
        }
        let name = CString::new("postgres").expect("no zero byte in it");
        // SAFETY: the name is a C string. The result points to static memory that only another
        // call of this family changes, and there is none; its two numbers are copied at once.
        let user = unsafe { libc::getpwnam(name.as_ptr()).as_ref() }.map(|entry| ServerUser {
            uid: entry.pw_uid,
            gid: entry.pw_gid,
        });
        Some(user.expect("root needs a user `postgres` to run servers as"))
    }
}

/// A test's directory. See the head of this file.
pub struct TestDir {
    path: PathBuf,
}

impl TestDir {
    pub fn new() -> TestDir {
        TestDir::new_in(Path::new("/tmp"))
    }

    /// The same on another file system.
    pub fn new_in(parent: &Path) -> TestDir {
        let dir = tempfile::Builder::new().prefix("skt-").tempdir_in(parent);
        let dir = dir.unwrap_or_else(|e| panic!("could not create in {}: {e}", parent.display()));
        let path = dir.keep();
        give_to_server_user(&path);
        TestDir { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Creates a directory below, owned by the server's user and closed to others, as Postgres
    /// demands of its data directory.
    pub fn create(&self, name: &str) -> PathBuf {
        let path = self.path.join(name);
        fs::create_dir(&path).expect("could not create a directory of the test");
        give_to_server_user(&path);
        path
    }
}

impl Default for TestDir {
    fn default() -> TestDir {
        TestDir::new()
    }
}

/// Hands over one file or directory, not what is below it.
pub fn give_to_server_user(path: &Path) {
    if let Some(user) = ServerUser::other_than_us() {
        chown(path, Some(user.uid), Some(user.gid)).expect("root may change an owner");
    }
    if path.is_dir() {
        fs::set_permissions(path, fs::Permissions::from_mode(0o700))
            .expect("an owner may change the mode");
    }
}

/// Copies a directory with all that is below it, for the server's user. Sockets are left out.
pub fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap_or_else(|e| panic!("could not create {}: {e}", to.display()));
    give_to_server_user(to);
    let entries =
        fs::read_dir(from).unwrap_or_else(|e| panic!("could not read {}: {e}", from.display()));
    for entry in entries {
        let entry = entry.expect("could not read a directory");
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type().expect("the kind of a directory entry");
        if kind.is_dir() {
            copy_tree(&path, &target);
        } else if kind.is_file() {
            fs::copy(&path, &target)
                .unwrap_or_else(|e| panic!("could not copy {}: {e}", path.display()));
            give_to_server_user(&target);
        }
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        if !thread::panicking() {
            // A directory left behind is untidy and no reason to fail.
            let _ = fs::remove_dir_all(&self.path);
            return;
        }
        eprintln!("the test's directory is kept: {}", self.path.display());
        for log in logs_below(&self.path) {
            eprintln!("--- end of {}", log.display());
            eprintln!("{}", last_lines(&log, 30));
        }
    }
}

fn logs_below(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut logs: Vec<_> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .collect();
    logs.sort();
    logs
}

fn last_lines(path: &Path, count: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// An address nobody else has, and that nobody gets while we don't use it.
pub fn unused_address() -> SocketAddr {
    /// Below the ports that the kernel gives to clients, which may be any of ours otherwise.
    static NEXT_PORT: AtomicU16 = AtomicU16::new(20_000);
    // Process ids have 22 bits; 127.64.0.0 and the three quarters above it are as many.
    let pid = std::process::id();
    let ip = Ipv4Addr::from(0x7F40_0000 | (pid & 0x003F_FFFF));
    SocketAddr::new(ip.into(), NEXT_PORT.fetch_add(1, Ordering::Relaxed))
}
