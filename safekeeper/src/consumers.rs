//! Who streams from a cluster at the moment, how far each one is, and how they are woken.
//!
//! A sender waits for two things at once, a message of its consumer and a new commit_lsn, so it
//! sleeps in poll(2) on its socket and on an eventfd of its own. To be woken costs the keeper a
//! system call, hence only those who sleep are:
//!
//! ```text
//!   sender                                 keeper
//!   asleep = true                          publish commit_lsn
//!   read commit_lsn; new: don't sleep      asleep: set false, write to the eventfd
//!   poll
//! ```
//!
//! Both sides write first and read second, with a full fence in between, so at least one of them
//! sees the other: no wake-up is lost.
//!
//! Beside that this is where the reports of all standbys become the one that travels to the
//! primary with every answer: the lowest replay position and the oldest xmin. Slots keep the xmin
//! of a standby that is away.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use safekeeper_protocol::{Lsn, StandbyFeedback};

use crate::slots::Slots;

/// As `pg_stat_replication.state` names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConsumerState {
    Catchup,
    Streaming,
}

impl ConsumerState {
    pub fn name(self) -> &'static str {
        match self {
            ConsumerState::Catchup => "catchup",
            ConsumerState::Streaming => "streaming",
        }
    }
}

/// How far one consumer is. What it has not reported is [`Lsn::INVALID`] or 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub state: ConsumerState,
    /// It holds, or needs nothing of, what lies below.
    pub start_lsn: Lsn,
    pub sent_lsn: Lsn,
    pub write_lsn: Lsn,
    pub flush_lsn: Lsn,
    pub apply_lsn: Lsn,
    /// Oldest transactions it needs, with epoch.
    pub xmin: u64,
    pub catalog_xmin: u64,
}

impl Progress {
    fn starting_at(start_lsn: Lsn) -> Progress {
        Progress {
            state: ConsumerState::Catchup,
            start_lsn,
            sent_lsn: Lsn::INVALID,
            write_lsn: Lsn::INVALID,
            flush_lsn: Lsn::INVALID,
            apply_lsn: Lsn::INVALID,
            xmin: 0,
            catalog_xmin: 0,
        }
    }

    /// Below this it will not ask for WAL again, not even after a reconnect.
    pub fn needed_from(&self) -> Lsn {
        self.start_lsn.max(self.flush_lsn)
    }
}

/// One streaming connection.
#[derive(Debug)]
pub struct Consumer {
    pub application_name: String,
    pub address: SocketAddr,
    progress: Mutex<Progress>,
    asleep: AtomicBool,
    wake: OwnedFd,
}

impl Consumer {
    pub fn progress(&self) -> Progress {
        *lock(&self.progress)
    }

    fn wake(&self) {
        if self.asleep.swap(false, Ordering::SeqCst) {
            // It can only fail by a full counter, and then the sender is awake.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

/// The consumers of one cluster.
#[derive(Debug)]
pub struct Consumers {
    slots: Arc<Slots>,
    /// Never held for longer than it takes to look at: whoever commits wakes them all.
    attached: Mutex<Vec<Arc<Consumer>>>,
    feedback: Mutex<StandbyFeedback>,
    /// What was gathered later is published later.
    gathering: Mutex<()>,
}

impl Consumers {
    pub fn new(slots: Arc<Slots>) -> Consumers {
        let consumers = Consumers {
            slots,
            attached: Mutex::default(),
            feedback: Mutex::default(),
            gathering: Mutex::default(),
        };
        consumers.gather_feedback();
        consumers
    }

    /// Add one that streams from `start_lsn`, until the returned value is dropped.
    pub fn attach(
        &self,
        application_name: &str,
        address: SocketAddr,
        start_lsn: Lsn,
    ) -> io::Result<Attached<'_>> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let consumer = Arc::new(Consumer {
            application_name: application_name.to_owned(),
            address,
            progress: Mutex::new(Progress::starting_at(start_lsn)),
            asleep: AtomicBool::new(false),
            wake,
        });
        lock(&self.attached).push(consumer.clone());
        Ok(Attached {
            consumers: self,
            consumer,
        })
    }

    /// Called after a new commit_lsn was published.
    pub fn wake(&self) {
        fence(Ordering::SeqCst);
        for consumer in lock(&self.attached).iter() {
            consumer.wake();
        }
    }

    pub fn list(&self) -> Vec<Arc<Consumer>> {
        lock(&self.attached).clone()
    }

    /// WAL from here on is needed by somebody who is connected; none if nobody is.
    pub fn needed_from(&self) -> Option<Lsn> {
        lock(&self.attached)
            .iter()
            .map(|consumer| consumer.progress().needed_from())
            .min()
    }

    /// What goes to the primary.
    pub fn feedback(&self) -> StandbyFeedback {
        *lock(&self.feedback)
    }

    /// Somebody has reported, come or gone, a slot too: what the primary hears may change. Receivers
    /// that replay nothing report no apply position and hold nothing back by it.
    pub fn gather_feedback(&self) {
        let _gathering = lock(&self.gathering);
        let attached = self.list();
        let (slot_xmin, slot_catalog_xmin) = self.slots.xmins();
        let reported: Vec<Progress> = attached.iter().map(|c| c.progress()).collect();
        let least = |values: &mut dyn Iterator<Item = u64>| values.filter(|v| *v > 0).min();
        let mut xmins = reported.iter().map(|p| p.xmin).chain([slot_xmin]);
        let catalog_xmins = reported.iter().map(|p| p.catalog_xmin);
        let mut catalog_xmins = catalog_xmins.chain([slot_catalog_xmin]);
        *lock(&self.feedback) = StandbyFeedback {
            apply_lsn: Lsn(least(&mut reported.iter().map(|p| p.apply_lsn.0)).unwrap_or(0)),
            xmin: least(&mut xmins).unwrap_or(0),
            catalog_xmin: least(&mut catalog_xmins).unwrap_or(0),
        };
    }
}

/// A sender's own entry.
#[derive(Debug)]
pub struct Attached<'a> {
    consumers: &'a Consumers,
    consumer: Arc<Consumer>,
}

impl Attached<'_> {
    /// True if the primary may have to hear of it, by [`Consumers::gather_feedback`].
    pub fn update(&self, change: impl FnOnce(&mut Progress)) -> bool {
        let heard = |p: &Progress| (p.apply_lsn, p.xmin, p.catalog_xmin);
        let mut progress = lock(&self.consumer.progress);
        let before = heard(&progress);
        change(&mut progress);
        heard(&progress) != before
    }

    /// Announce that this thread is about to sleep. Whoever calls this looks for news once more
    /// before it does, and calls [`Attached::awake`] afterwards.
    pub fn fall_asleep(&self) {
        self.consumer.asleep.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    pub fn awake(&self) {
        // If nobody has woken us, nothing has been written, nor will be.
        if !self.consumer.asleep.swap(false, Ordering::SeqCst) {
            // Whatever has been written is consumed in one read. What comes only now wakes us once more.
            let _ = rustix::io::read(&self.consumer.wake, &mut [0; 8]);
        }
    }

    /// Readable once there is news.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.consumer.wake.as_fd()
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        lock(&self.consumers.attached).retain(|c| !Arc::ptr_eq(c, &self.consumer));
        self.consumers.gather_feedback();
    }
}

/// A panic ends the daemon, so a poisoned lock is only ever seen by a test that failed already.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};

    fn address() -> SocketAddr {
        ([127, 0, 0, 1], 1).into()
    }

    fn consumers() -> Consumers {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let disk = Arc::new(crate::disk::RealDisk::new(dir.path()));
        Consumers::new(Arc::new(Slots::open(disk, 1)))
    }

    fn has_news(attached: &Attached<'_>) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(attached.wake_fd(), PollFlags::IN)];
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut fds, Some(&now)).expect("poll") > 0
    }

    #[test]
    fn only_a_sleeper_is_woken_and_only_once() {
        let consumers = consumers();
        let one = consumers
            .attach("one", address(), Lsn(1))
            .expect("an eventfd");
        consumers.wake();
        assert!(!has_news(&one));
        one.fall_asleep();
        consumers.wake();
        assert!(has_news(&one));
        one.awake();
        assert!(!has_news(&one));
        consumers.wake();
        assert!(!has_news(&one));
    }

    #[test]
    fn the_primary_hears_the_least_of_what_was_reported() {
        let consumers = consumers();
        let receiver = consumers
            .attach("pg_receivewal", address(), Lsn(100))
            .expect("attached");
        let near = consumers
            .attach("near", address(), Lsn(100))
            .expect("attached");
        let far = consumers
            .attach("far", address(), Lsn(50))
            .expect("attached");
        let report = |consumer: &Attached<'_>, change: &dyn Fn(&mut Progress)| {
            if consumer.update(change) {
                consumers.gather_feedback();
            }
        };
        report(&receiver, &|p| p.flush_lsn = Lsn(300));
        assert_eq!(consumers.feedback(), StandbyFeedback::default());
        report(&near, &|p| {
            (p.flush_lsn, p.apply_lsn, p.xmin) = (Lsn(300), Lsn(290), 9)
        });
        report(&far, &|p| {
            (p.flush_lsn, p.apply_lsn, p.xmin) = (Lsn(200), Lsn(150), 7)
        });
        assert_eq!(
            consumers.feedback(),
            StandbyFeedback {
                apply_lsn: Lsn(150),
                xmin: 7,
                catalog_xmin: 0
            }
        );
        assert_eq!(consumers.needed_from(), Some(Lsn(200)));
        drop(far);
        assert_eq!(consumers.feedback().apply_lsn, Lsn(290));
        assert_eq!(consumers.needed_from(), Some(Lsn(300)));
        drop(near);
        drop(receiver);
        assert_eq!(consumers.feedback(), StandbyFeedback::default());
        assert_eq!(consumers.needed_from(), None);
    }
}
