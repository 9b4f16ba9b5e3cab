//! One safekeeper: a machine with a simulated disk, and on it, while it runs, the daemon's own
//! `Clusters` and `Keeper`.
//!
//! This file stands where the daemon's connection threads do (`receive_wal.rs`): it decodes what
//! has arrived, takes a turn for it, and hands back the encoded answers once the turn is finished.
//! A turn in which storage fails, or the machine stops, answers nothing.
//!
//! A panic of the code under test is a process that ends. It may only do so after an error of the
//! disk; any other panic is a finding and goes up.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use safekeeper::clusters::{Clusters, Segments, Unknown};
use safekeeper::control_file::{cluster_dir, read_state, wal_dir};
use safekeeper::disk::Disk;
use safekeeper::identity::Identity;
use safekeeper::keeper::{Keeper, PushError, Reader, STORAGE_FAILED};
use safekeeper::metrics::Metrics;
use safekeeper::retention::Retention;
use safekeeper::segment::Timelines;
use safekeeper_protocol::codec::{decode_proposer_message, encode_acceptor_message};
use safekeeper_protocol::{
    AcceptorMessage, AcceptorState, ClusterIdentity, Incarnation, Lsn, MemberId, ProposerMessage,
    Read, Session, TermHistory, Tli,
};
use safekeeper_wal::{SegmentSize, segment_file_name};

use super::disk::{Holds, SimulatedDisk};
use super::random::Random;
use super::{SEGMENT_SIZE, SYSTEM_ID};

/// A machine.
pub struct Node {
    pub id: MemberId,
    pub incarnation: Incarnation,
    pub disk: SimulatedDisk,
    pub process: Option<Process>,
    /// Struck by something it can't come back from: committed WAL or the control file were damaged.
    /// An operator would take it out, or wipe it and begin anew with an incarnation of its own.
    pub is_lost: bool,
    /// Its clock runs ahead of everybody else's by so much.
    pub clock_ahead_ms: u64,
    /// It does nothing before.
    pub stopped_until_ms: u64,
    /// Each turn takes so long, and nothing is read from sockets meanwhile.
    pub turn_ms: u64,
    pub busy_until_ms: u64,
    /// Errors of the disk when the process was started: more than that excuse its end.
    excused: u64,
}

/// What runs on it.
pub struct Process {
    pub clusters: Clusters,
    sessions: BTreeMap<u64, Peer>,
    /// Highest position that this process has published or told.
    pub commit_lsn: Lsn,
    /// Below it, what this process has acknowledged was looked at already.
    pub looked_at: Lsn,
}

struct Peer {
    session: Session,
    cluster: ClusterIdentity,
    keeper: Option<Arc<Keeper>>,
}

/// What a turn sends back.
#[derive(Debug, Default)]
pub struct Answers {
    pub messages: Vec<AcceptorMessage>,
    /// The connection ends, for this reason.
    pub end: Option<Ended>,
}

/// Why nothing was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotRead {
    /// Unreachable, of another term, or damaged.
    Failed,
    /// WAL below this position is no longer there.
    Removed { oldest_lsn: Lsn },
}

#[derive(Debug)]
pub enum Ended {
    Refused,
    DamagedWal,
    NoSpace,
}

/// What became of something that was asked of a process.
pub enum Outcome<T> {
    Done(T),
    /// The process ended, or the machine stopped, before it was done.
    Died,
}

impl Node {
    pub fn new(id: u64, random: &mut Random) -> Node {
        Node {
            id: MemberId(id),
            incarnation: Incarnation(u128::from(random.next()) << 64 | u128::from(random.next())),
            disk: SimulatedDisk::new(random.fork()),
            process: None,
            is_lost: false,
            clock_ahead_ms: 0,
            stopped_until_ms: 0,
            turn_ms: 0,
            busy_until_ms: 0,
            excused: 0,
        }
    }

    /// Starts the process; false if it ended again at once.
    pub fn start(&mut self) -> bool {
        assert!(self.process.is_none(), "a process is started once");
        self.excused = self.disk.struck().io_errors;
        let (disk, identity) = (self.disk.clone(), self.identity());
        let opened = self.guarded(|_| {
            // What `DataDir::open` does first.
            disk.sync_everything()?;
            let disk = Arc::new(disk);
            Clusters::with_disk(
                disk,
                identity,
                Arc::new(Metrics::default()),
                Segments::MadeWhenNeeded,
            )
        });
        let Outcome::Done(Ok(clusters)) = opened else {
            return false;
        };
        self.process = Some(Process {
            clusters,
            sessions: BTreeMap::new(),
            commit_lsn: Lsn::INVALID,
            looked_at: Lsn::INVALID,
        });
        true
    }

    fn identity(&self) -> Identity {
        Identity {
            id: self.id,
            incarnation: self.incarnation,
        }
    }

    pub fn is_up(&self) -> bool {
        self.process.is_some()
    }

    /// The keeper, if the process runs and serves the cluster.
    pub fn keeper(&self) -> Option<Arc<Keeper>> {
        self.process.as_ref()?.clusters.keepers().pop()
    }

    /// Handles what has arrived on a connection, in one turn where possible.
    pub fn take(&mut self, session_id: u64, frames: &[Vec<u8>], now_ms: u64) -> Outcome<Answers> {
        let now_ms = now_ms + self.clock_ahead_ms;
        self.run(|process| process.take(session_id, frames, now_ms))
    }

    pub fn disconnect(&mut self, session_id: u64) -> Outcome<()> {
        self.run(|process| {
            if let Some(Peer {
                session,
                keeper: Some(keeper),
                ..
            }) = process.sessions.remove(&session_id)
            {
                keeper.take_turn().disconnect(session);
            }
        })
    }

    pub fn housekeep(&mut self, wal_keep_size: u64) -> Outcome<()> {
        let retention = Retention {
            wal_keep_size,
            max_wal_keep: None,
            min_free_space: 0,
        };
        self.run(|process| process.clusters.housekeep(&retention))
    }

    /// What a consumer would be sent from `begin` on, at most `len` bytes; none if there is
    /// nothing committed, or it can't be read.
    pub fn consume(&mut self, begin: Lsn, len: u64) -> Outcome<Option<Vec<u8>>> {
        self.run(|process| {
            let keeper = process.clusters.keepers().pop()?;
            let end_lsn = keeper.commit_lsn().min(begin + len);
            if begin >= end_lsn {
                return None;
            }
            let mut wal = vec![0; (end_lsn - begin) as usize];
            let mut reader = keeper.reader();
            keeper.read_committed(&mut reader, begin, &mut wal).ok()?;
            Some(wal)
        })
    }

    /// The answer to a Read, as `receive_wal.rs` makes it.
    pub fn read(&mut self, read: Read) -> Outcome<Result<Vec<u8>, NotRead>> {
        self.run(|process| {
            let keeper = process.clusters.keepers().pop().ok_or(NotRead::Failed)?;
            let before = keeper.begin_read(&read).map_err(|_| NotRead::Failed)?;
            let available = before.flush_lsn.saturating_distance_from(read.begin_lsn);
            if before.term != read.term || available == 0 {
                return Err(NotRead::Failed);
            }
            if read.begin_lsn < before.oldest_lsn {
                return Err(NotRead::Removed {
                    oldest_lsn: before.oldest_lsn,
                });
            }
            let end_lsn = read.begin_lsn + available.min(u64::from(read.len));
            let mut reader: Reader = keeper.reader();
            let mut wal = Vec::new();
            keeper
                .read_flushed(&mut reader, read.begin_lsn..end_lsn, &mut wal)
                .map_err(|_| NotRead::Failed)?;
            Ok(wal)
        })
    }

    fn run<T>(&mut self, with: impl FnOnce(&mut Process) -> T) -> Outcome<T> {
        let Some(mut process) = self.process.take() else {
            return Outcome::Died;
        };
        match self.guarded(|_| with(&mut process)) {
            Outcome::Done(value) => {
                self.process = Some(process);
                Outcome::Done(value)
            }
            Outcome::Died => {
                // Its memory is gone; dropping it must not write.
                Outcome::Died
            }
        }
    }

    fn guarded<T>(&mut self, with: impl FnOnce(&mut Node) -> T) -> Outcome<T> {
        let result = catch_unwind(AssertUnwindSafe(|| with(self)));
        match result {
            _ if self.disk.has_crashed() => Outcome::Died,
            Ok(value) => Outcome::Done(value),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
                let excused = self.disk.struck().io_errors > self.excused;
                if text.starts_with(STORAGE_FAILED) && excused {
                    return Outcome::Died;
                }
                resume_unwind(panic)
            }
        }
    }

    /// The process is gone, for whatever reason. What it had written can be read, unless the power
    /// was cut.
    pub fn end(&mut self, power_cut: bool) {
        self.process = None;
        if power_cut {
            self.disk.cut_power();
        } else {
            self.disk.kill();
        }
    }

    /// Somebody has put an empty disk into the machine and called `init`.
    pub fn wipe(&mut self, random: &mut Random) {
        self.process = None;
        *self = Node::new(self.id.0, random);
    }

    // ---- what the judge looks at ----------------------------------------------------------

    /// State in the control file, if there is one that can be read.
    pub fn state(&self) -> Option<AcceptorState> {
        self.disk
            .undisturbed(|disk| read_state(disk, SYSTEM_ID).ok())
    }

    pub fn control_path() -> PathBuf {
        cluster_dir(SYSTEM_ID).join("control")
    }

    /// The file in which a reader of a log with this history finds the byte at `lsn`: of those
    /// timelines that have a part in the segment, the newest one's that is there.
    pub fn segment_path(&self, timelines: &Timelines, lsn: Lsn) -> PathBuf {
        let begin = lsn.segment_start(SEGMENT_SIZE);
        let end = begin + u64::from(SEGMENT_SIZE);
        let path = |tli: Tli| {
            let name = segment_file_name(tli.0, lsn.segno(SEGMENT_SIZE), SegmentSize::MIN);
            wal_dir(SYSTEM_ID).join(name)
        };
        let mut paths: Vec<PathBuf> = timelines.candidates(begin, end).map(path).collect();
        while paths.len() > 1 && !self.disk.is_there(&paths[0]) {
            paths.remove(0);
        }
        paths.into_iter().next().unwrap_or_else(|| path(Tli(1)))
    }

    /// Whether these bytes stand in the log, for a reader and on the platter.
    pub fn holds(&self, history: &TermHistory, begin: Lsn, bytes: &[u8]) -> Holds {
        let timelines = Timelines::new(history);
        let mut all = Holds {
            readable: true,
            durable: true,
        };
        for (lsn, part) in parts(begin, bytes) {
            let offset = lsn.segment_offset(SEGMENT_SIZE) as usize;
            let one = self
                .disk
                .holds(&self.segment_path(&timelines, lsn), offset, part);
            all.readable &= one.readable;
            all.durable &= one.durable;
        }
        all
    }

    /// The bytes of the log as a reader sees them; zeros where there is no file.
    pub fn log_bytes(&self, history: &TermHistory, begin: Lsn, end: Lsn) -> Vec<u8> {
        let timelines = Timelines::new(history);
        let mut bytes = vec![0; usize::try_from(end - begin).expect("a log in memory")];
        for (lsn, part) in parts(begin, &bytes.clone()) {
            let offset = lsn.segment_offset(SEGMENT_SIZE) as usize;
            if let Some(file) = self.disk.read(&self.segment_path(&timelines, lsn)) {
                let at = (lsn - begin) as usize;
                bytes[at..at + part.len()].copy_from_slice(&file[offset..offset + part.len()]);
            }
        }
        bytes
    }

    /// History and end of the log that the process holds.
    pub fn log(&self) -> Option<(TermHistory, Lsn, Lsn)> {
        let keeper = self.keeper()?;
        let status = keeper.status();
        let view = keeper.view();
        Some((
            view.state.history.clone(),
            status.oldest_lsn.0,
            status.flush_lsn.0,
        ))
    }
}

/// The stretch cut at segments' ends.
fn parts(begin: Lsn, bytes: &[u8]) -> impl Iterator<Item = (Lsn, &[u8])> {
    let (mut lsn, mut rest) = (begin, bytes);
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let room = (SEGMENT_SIZE - lsn.segment_offset(SEGMENT_SIZE)) as usize;
        let (part, after) = rest.split_at(rest.len().min(room));
        let at = lsn;
        (lsn, rest) = (lsn + part.len() as u64, after);
        Some((at, part))
    })
}

impl Process {
    fn take(&mut self, session_id: u64, frames: &[Vec<u8>], now_ms: u64) -> Answers {
        let mut answers = Answers::default();
        let mut rest = frames;
        while !rest.is_empty() && answers.end.is_none() {
            let n_before = answers.messages.len();
            let known = self
                .sessions
                .get(&session_id)
                .and_then(|peer| peer.keeper.clone());
            let taken = match known {
                Some(keeper) => self.take_turn(&keeper, session_id, rest, now_ms, &mut answers),
                None => self.take_without_keeper(session_id, &rest[0], now_ms, &mut answers),
            };
            match taken {
                Ok(n) => rest = &rest[n..],
                Err(error) => {
                    // A turn that ends by an error answers nothing.
                    answers.messages.truncate(n_before);
                    answers.end = Some(ended(error));
                }
            }
        }
        answers
    }

    /// As many frames as one turn takes: appends, up to the first message of another kind.
    fn take_turn(
        &mut self,
        keeper: &Keeper,
        session_id: u64,
        frames: &[Vec<u8>],
        now_ms: u64,
        answers: &mut Answers,
    ) -> Result<usize, PushError> {
        let session = self.sessions[&session_id].session;
        let mut turn = keeper.take_turn();
        let mut taken = 0;
        for frame in frames {
            taken += 1;
            let (message, wal) = decode_proposer_message(frame).expect("encoded by ourselves");
            if let ProposerMessage::Append(append) = message {
                turn.append(session, &append, wal, now_ms, &mut answers.messages)?;
            } else {
                turn.handle(session, address(), &message, now_ms, &mut answers.messages)?;
                break;
            }
        }
        turn.finish(&mut answers.messages);
        Ok(taken)
    }

    fn take_without_keeper(
        &mut self,
        session_id: u64,
        frame: &[u8],
        now_ms: u64,
        answers: &mut Answers,
    ) -> Result<usize, PushError> {
        let (message, _) = decode_proposer_message(frame).expect("encoded by ourselves");
        if let ProposerMessage::Greeting(greeting) = &message {
            self.sessions.entry(session_id).or_insert_with(|| Peer {
                session: Session {
                    id: session_id,
                    proposer_id: greeting.proposer_id,
                },
                cluster: greeting.cluster.clone(),
                keeper: None,
            });
        }
        let peer = self
            .sessions
            .get_mut(&session_id)
            .expect("a proposer greets first");
        let (clusters, replies) = (&self.clusters, &mut answers.messages);
        match clusters.handle_unknown(&peer.cluster, peer.session, &message, now_ms, replies)? {
            Unknown::Handled => Ok(1),
            Unknown::Read(_) => unreachable!("reads go their own way"),
            Unknown::Created(keeper) => {
                peer.keeper = Some(keeper);
                Ok(1)
            }
            // The message is for the keeper.
            Unknown::Known(keeper) => {
                peer.keeper = Some(keeper);
                Ok(0)
            }
        }
    }
}

fn ended(error: PushError) -> Ended {
    match error {
        PushError::Damaged(_) => Ended::DamagedWal,
        PushError::NoSpace(_) => Ended::NoSpace,
        PushError::Refused(_) | PushError::Cluster(_) => Ended::Refused,
    }
}

fn address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 5454))
}

/// The answer's bytes on the wire.
pub fn encode(message: &AcceptorMessage) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_acceptor_message(message, &mut bytes);
    bytes
}
