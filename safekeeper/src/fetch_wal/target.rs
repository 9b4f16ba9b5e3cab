//! Where `fetch-wal` puts a file: `%p`, and what lies around it.
//!
//! `%p` is `pg_wal/RECOVERYXLOG` for a server in recovery, whose working directory is the data
//! directory, and `<target>/pg_wal/<segment>` for pg_rewind. So the data directory is above it.
//!
//! The file is written under a name that only this process has, locked while it lives, and renamed:
//! `%p` is the whole file or nothing. A command that a killed server left behind may still be at
//! work when the next one runs; neither writes into the other's, and one whose parent is gone brings
//! nothing to its name any more.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Ending of temporary files.
const ENDING: &str = ".fetching";

static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

#[derive(Clone, Debug)]
pub struct Target {
    path: PathBuf,
    name: OsString,
    /// Where it lies; not empty.
    dir: PathBuf,
    data_dir: Option<PathBuf>,
    /// Process that has asked for it.
    parent: u32,
}

impl Target {
    pub fn new(path: &Path) -> Result<Target, String> {
        let name = path.file_name();
        let name = name.ok_or_else(|| format!("\"{}\" is no path of a file", path.display()))?;
        let dir = or_here(path.parent().unwrap_or(Path::new("")));
        let is_pg_wal = dir.file_name().is_some_and(|name| name == "pg_wal");
        let data_dir = is_pg_wal.then(|| or_here(dir.parent().unwrap_or(Path::new(""))));
        Ok(Target {
            path: path.to_owned(),
            name: name.to_owned(),
            data_dir: data_dir.map(Path::to_owned),
            dir: dir.to_owned(),
            parent: std::os::unix::process::parent_id(),
        })
    }

    pub fn data_dir(&self) -> Option<&Path> {
        self.data_dir.as_deref()
    }

    /// Whose WAL it must be: the first number in the control file, in the machine's byte order.
    pub fn system_id(&self) -> Option<u64> {
        let mut bytes = [0; 8];
        let mut file = File::open(self.data_dir()?.join("global/pg_control")).ok()?;
        file.read_exact(&mut bytes).ok()?;
        Some(u64::from_ne_bytes(bytes)).filter(|id| *id != 0)
    }

    /// The server is in a recovery that ends where there is no more WAL.
    pub fn ends_with_the_archive(&self) -> bool {
        let has = |name| self.data_dir().is_some_and(|dir| dir.join(name).exists());
        has("recovery.signal") && !has("standby.signal")
    }

    /// There is a file of this name beside the target, which recovery takes if it gets no other.
    pub fn has_beside(&self, file: &str) -> bool {
        self.name != file && self.dir.join(file).is_file()
    }

    /// A small file as a whole.
    pub fn put(&self, bytes: &[u8]) -> Result<(), String> {
        let mut temporary = self.create().map_err(|error| self.failed(&error))?;
        let written = temporary.write(bytes);
        let finished = written.and_then(|()| temporary.finish());
        finished.map_err(|error| self.failed(&error))
    }

    pub fn failed(&self, error: &io::Error) -> String {
        format!("could not write \"{}\": {error}", self.path.display())
    }

    pub fn create(&self) -> io::Result<Temporary<'_>> {
        self.remove_leftovers()?;
        let mut name = self.name.clone();
        name.push(format!(".{}{ENDING}", std::process::id()));
        let path = self.dir.join(name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            // What Postgres's umask lets a group read, this may be read by it, too.
            .mode(0o640)
            .open(&path)?;
        let temporary = Temporary {
            target: self,
            file,
            path,
            len: 0,
            is_renamed: false,
        };
        // If another one has taken it for a leftover just now, the rename will fail.
        temporary.file.try_lock()?;
        Ok(temporary)
    }

    /// Temporary files that nobody has locked: their writers are dead.
    fn remove_leftovers(&self) -> io::Result<()> {
        let mut begin = self.name.clone();
        begin.push(".");
        let begin = begin.into_encoded_bytes();
        for entry in std::fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().as_encoded_bytes();
            if !name.starts_with(&begin) || !name.ends_with(ENDING.as_bytes()) {
                continue;
            }
            // Whoever else removes it does us a favour.
            if let Ok(file) = File::open(&path)
                && file.try_lock().is_ok()
            {
                let _ = std::fs::remove_file(&path);
            }
        }
        Ok(())
    }
}

/// A file before it has its name. Removed when dropped.
#[derive(Debug)]
pub struct Temporary<'a> {
    target: &'a Target,
    file: File,
    path: PathBuf,
    len: u64,
    is_renamed: bool,
}

impl Temporary<'_> {
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Zeros up to `len`. They are written, not left out: a standby will write into this file, and
    /// must not find the disk full then.
    pub fn fill_up(&mut self, len: u64) -> io::Result<()> {
        while self.len < len {
            let left = len - self.len;
            let piece = usize::try_from(left).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
            self.write(&ZEROS[..piece])?;
        }
        Ok(())
    }

    /// Whether all that was written is also the beginning of the file `name` beside the target.
    pub fn is_beginning_of(&mut self, name: &str) -> bool {
        if !self.target.has_beside(name) {
            return false;
        }
        let local = File::open(self.target.dir.join(name));
        let equal = local.and_then(|local| {
            self.file.seek(SeekFrom::Start(0))?;
            let equal = same_bytes(&self.file, local, self.len);
            self.file.seek(SeekFrom::Start(self.len))?;
            equal
        });
        // What can't be read is no better than what we bring.
        equal.unwrap_or(false)
    }

    /// On stable storage under its name when it returns.
    pub fn finish(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        if std::os::unix::process::parent_id() != self.target.parent {
            return Err(io::Error::other("whoever asked for it is gone"));
        }
        std::fs::rename(&self.path, &self.target.path)?;
        self.is_renamed = true;
        File::open(&self.target.dir)?.sync_all()
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if !self.is_renamed {
            // Else the next call does it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn same_bytes(mut ours: &File, mut theirs: File, len: u64) -> io::Result<bool> {
    let (mut a, mut b) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    let mut left = len;
    while left > 0 {
        let piece = usize::try_from(left).map_or(a.len(), |left| left.min(a.len()));
        ours.read_exact(&mut a[..piece])?;
        theirs.read_exact(&mut b[..piece])?;
        if a[..piece] != b[..piece] {
            return Ok(false);
        }
        left -= piece as u64;
    }
    Ok(true)
}

/// The directory a relative path begins in has an empty name.
fn or_here(path: &Path) -> &Path {
    if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_directory_is_above_pg_wal() {
        for (path, data_dir) in [
            ("pg_wal/RECOVERYXLOG", Some(".")),
            ("./pg_wal/RECOVERYXLOG", Some(".")),
            ("/d/pg_wal/x", Some("/d")),
            ("/d/pg_wal/sub/x", None),
            ("x", None),
            ("/tmp/x", None),
        ] {
            let target = Target::new(Path::new(path)).expect(path);
            assert_eq!(target.data_dir(), data_dir.map(Path::new), "{path}");
        }
        for path in ["", "/", ".."] {
            assert!(Target::new(Path::new(path)).is_err(), "{path}");
        }
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(dir)
            .expect("a directory")
            .map(|entry| entry.expect("an entry").file_name().into_string())
            .map(|name| name.expect("UTF-8"))
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_there_as_a_whole_or_not_at_all() {
        let dir = tempfile::tempdir().expect("a directory");
        let target = Target::new(&dir.path().join("x")).expect("a path");
        std::fs::write(dir.path().join("x.1.fetching"), "of a dead one").expect("written");
        std::fs::write(dir.path().join("y.1.fetching"), "another's").expect("written");
        let mut temporary = target.create().expect("created");
        temporary.write(b"abc").expect("written");
        let own = format!("x.{}.fetching", std::process::id());
        assert_eq!(names(dir.path()), [own.as_str(), "y.1.fetching"]);
        // One that lives is left alone.
        target.remove_leftovers().expect("looked");
        assert!(dir.path().join(&own).exists());
        drop(temporary);
        assert_eq!(names(dir.path()), ["y.1.fetching"]);

        let mut temporary = target.create().expect("created");
        temporary.write(b"abc").expect("written");
        temporary.fill_up(100_000).expect("filled");
        temporary.finish().expect("finished");
        assert_eq!(names(dir.path()), ["x", "y.1.fetching"]);
        let bytes = std::fs::read(dir.path().join("x")).expect("read");
        assert_eq!((bytes.len(), &bytes[..4]), (100_000, &b"abc\0"[..]));
    }

    #[test]
    fn a_part_is_compared_with_what_is_there() {
        let dir = tempfile::tempdir().expect("a directory");
        let target = Target::new(&dir.path().join("x")).expect("a path");
        let mut temporary = target.create().expect("created");
        let wal = vec![7; 100_000];
        temporary.write(&wal).expect("written");
        let mut is_beginning_of = |bytes: &[u8]| {
            std::fs::write(dir.path().join("local"), bytes).expect("written");
            temporary.is_beginning_of("local")
        };
        assert!(is_beginning_of(&[wal.as_slice(), &[1, 2, 3]].concat()));
        assert!(is_beginning_of(&wal));
        assert!(!is_beginning_of(&wal[1..]));
        let mut other = wal.clone();
        other[99_999] = 8;
        assert!(!is_beginning_of(&other));
        assert!(!temporary.is_beginning_of("nothing"));
        // What it is to replace is no other file.
        std::fs::write(dir.path().join("x"), &wal).expect("written");
        assert!(!temporary.is_beginning_of("x"));
        temporary.write(b"!").expect("at the end");
        temporary.finish().expect("finished");
        assert_eq!(
            std::fs::read(dir.path().join("x")).expect("read").len(),
            100_001
        );
    }

    #[test]
    fn only_a_recovery_that_is_no_standby_ends_with_the_archive() {
        let dir = tempfile::tempdir().expect("a directory");
        let target = Target::new(&dir.path().join("pg_wal/x")).expect("a path");
        assert!(!target.ends_with_the_archive());
        std::fs::write(dir.path().join("recovery.signal"), "").expect("written");
        assert!(target.ends_with_the_archive());
        std::fs::write(dir.path().join("standby.signal"), "").expect("written");
        assert!(!target.ends_with_the_archive());
        assert_eq!(target.system_id(), None);
        std::fs::create_dir(dir.path().join("global")).expect("made");
        let control = dir.path().join("global/pg_control");
        std::fs::write(control, 77u64.to_ne_bytes()).expect("written");
        assert_eq!(target.system_id(), Some(77));
    }
}
