//! Sends to each member what it can take: WAL from here, or from a donor where that has left
//! `pg_wal`; heartbeats; news of commits.
//!
//! WAL goes out before it is flushed here, as soon as it is worth a message (`early_push.rs`): the
//! members flush it at the same time as this server does. What is flushed here goes out at once, unless
//! it would only wait at the members, or more is coming.
//!
//! News of a commit travels with the next WAL. Where none follows, it goes by itself after a moment; at
//! once if somebody waits already for standbys to replay.

use std::time::Duration;

use safekeeper_protocol::{Append, LocalWal, Lsn, PeerIdx};

use super::{Member, Pusher, millis, thread_panicked};
use crate::early_push::{EarlyPush, Pause, Situation};
use crate::feed::FeedPanicked;
use crate::local_wal::Origins;
use crate::{postgres, settings, shmem};

/// Appends for one member in one turn, so that a member that catches up does not hold up the
/// others' commits: 4 MiB take about a millisecond to copy.
const APPENDS_PER_TURN: usize = 4;

/// A member is told of commits this often at least.
const NEWS_MS_MAX: u64 = 50;

/// Where a member's next WAL is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Here,
    Donor,
}

impl Pusher {
    pub(super) fn send_all(&mut self) {
        self.more_to_send = false;
        let (local, early) = self.sendable();
        for at in 0..self.members.len() {
            if let Err(reason) = self.send(at, local) {
                self.close(at, &reason);
            }
        }
        if let Some(situation) = early {
            let sent_lsn = self.positions.sent_lsn;
            self.early_push.pushed(&situation, local.end_lsn, sent_lsn);
        }
    }

    /// How far WAL is to be sent now; and how things stand, if that is early. What was pushed early stays
    /// sent.
    fn sendable(&mut self) -> (LocalWal, Option<Situation>) {
        if let Some(end_lsn) = self.standby_end_lsn {
            let local = LocalWal {
                end_lsn,
                flush_lsn: end_lsn,
            };
            return (local, None);
        }
        let flush_lsn = postgres::flushed_lsn();
        self.local_wal.prefers_files = !settings::read_wal_buffers();
        let sent_lsn = self.positions.sent_lsn;
        let mut end_lsn = flush_lsn.max(sent_lsn);
        self.flush_lsn = flush_lsn;
        let situation = self.situation();
        let mut early = None;
        self.left_flushed = false;
        if self.pushes_early()
            && let Some(buffers) = &self.local_wal.buffers
        {
            if self.early_push.is_due(situation, || buffers.reserved_lsn()) {
                end_lsn = end_lsn.max(buffers.inserted_lsn());
                early = Some(situation);
            } else if self.early_push.holds_back(&situation) {
                self.left_flushed = end_lsn > sent_lsn;
                end_lsn = sent_lsn;
            }
        }
        (LocalWal { end_lsn, flush_lsn }, early)
    }

    /// WAL is pushed before it is flushed, when that is due.
    fn pushes_early(&self) -> bool {
        self.local_wal.buffers.is_some()
            && !self.local_wal.prefers_files
            && self.standby_end_lsn.is_none()
            && self.proposer.is_leading()
    }

    /// If that is done at all.
    pub(super) fn early_push(&self) -> Option<&EarlyPush> {
        self.pushes_early().then_some(&self.early_push)
    }

    pub(super) fn situation(&self) -> Situation {
        Situation {
            now: self.started.elapsed(),
            hint: shmem::latest_hint(),
            sent_lsn: self.positions.sent_lsn,
            flush_lsn: self.flush_lsn,
            commit_lsn: self.proposer.commit_lsn(),
            round_trip: self.round_trip,
        }
    }

    /// When a member is to be told of the last commit though there is no WAL for it. However fast
    /// commits follow one another, it hears of one now and then: it may be waiting for a donor.
    fn news_due_ms(&self, at: usize) -> u64 {
        self.news_due_ms.min(self.members[at].told_ms + NEWS_MS_MAX)
    }

    /// When some member is to be told of it; `None` if they know.
    pub(super) fn next_news_ms(&self) -> Option<u64> {
        let commit_lsn = self.proposer.commit_lsn();
        let members = self.members.iter().enumerate();
        let lack_it = members.filter(|(at, member)| {
            member.told_lsn < commit_lsn
                && member.peer.can_take_append()
                && self.proposer.next_lsn(PeerIdx(*at)).is_some()
        });
        lack_it.map(|(at, _)| self.news_due_ms(at)).min()
    }

    /// Nothing is to be sent before the members answer, which will wake us, or more commits come.
    pub fn pause(&self) -> Option<Pause> {
        self.early_push()?.pause(&self.situation())
    }

    /// A commit was announced while something else was done, or what was held back need not be any more.
    pub fn has_work(&self) -> bool {
        let has_hint = |early_push: &EarlyPush| early_push.has_hint(&self.situation());
        self.left_flushed || self.early_push().is_some_and(has_hint)
    }

    fn send(&mut self, at: usize, local: LocalWal) -> Result<(), String> {
        let peer = PeerIdx(at);
        for _ in 0..APPENDS_PER_TURN {
            self.members[at]
                .peer
                .flush()
                .map_err(|error| error.to_string())?;
            if !self.members[at].peer.can_take_append() {
                return Ok(());
            }
            let Some(next_lsn) = self.proposer.next_lsn(peer) else {
                return Ok(());
            };
            let (end_lsn, place) = self.at_hand(at, next_lsn, local.end_lsn)?;
            let now = self.started.elapsed();
            let now_ms = millis(now);
            if end_lsn <= next_lsn && now_ms < self.news_due_ms(at) {
                return Ok(());
            }
            let at_hand = LocalWal { end_lsn, ..local };
            let Some(append) = self.proposer.next_append(peer, at_hand, now_ms) else {
                return Ok(());
            };
            self.send_append(at, &append, place, now)?;
        }
        self.more_to_send = true;
        Ok(())
    }

    /// End of the WAL from `lsn` on that can be sent now, and where it is.
    fn at_hand(&mut self, at: usize, lsn: Lsn, end_lsn: Lsn) -> Result<(Lsn, Place), String> {
        // A standby brings the members to the start of its term, beyond the end of its own log.
        let wanted_lsn = match self.standby_end_lsn {
            Some(_) => self.proposer.term_start_lsn(),
            None => end_lsn,
        };
        if lsn >= wanted_lsn {
            return Ok((lsn, Place::Here));
        }
        if lsn < end_lsn && self.local_wal.has(lsn)? {
            self.members[at].feed.stop();
            return Ok((end_lsn, Place::Here));
        }
        let now_ms = self.now_ms();
        let mut feed = std::mem::take(&mut self.members[at].feed);
        let available = feed.available(lsn, now_ms, &self.waker, |attempt| {
            let donors = self.proposer.donors_for(lsn);
            let none =
                || format!("WAL from {lsn} on has left pg_wal, and no safekeeper has it to give");
            let &donor = donors.get(attempt % donors.len().max(1)).ok_or_else(none)?;
            let end_lsn = self.proposer.peer_status(donor).flush_lsn;
            Ok(self.donor_request(donor, self.proposer.term(), lsn, end_lsn))
        });
        self.members[at].feed = feed;
        match available {
            Ok(end_lsn) => Ok((end_lsn, Place::Donor)),
            Err(FeedPanicked(text)) => thread_panicked(&text),
        }
    }

    fn send_append(
        &mut self,
        at: usize,
        append: &Append,
        place: Place,
        now: Duration,
    ) -> Result<(), String> {
        let Member {
            peer,
            feed,
            lag,
            told_lsn,
            told_ms,
            standby_xmins: _,
        } = &mut self.members[at];
        let Append { begin_lsn, len, .. } = *append;
        let (wal, origins) = match place {
            // A heartbeat: nothing need be at hand.
            _ if len == 0 => (&[][..], Origins::default()),
            Place::Here => self.local_wal.read(begin_lsn, len)?,
            Place::Donor => {
                let wal = feed.wal(begin_lsn, len);
                let wal = wal.ok_or("WAL from a donor is not at hand")?;
                self.status.bytes_from_donor += u64::from(len);
                (wal, Origins::default())
            }
        };
        peer.send_append(append, wal)
            .map_err(|error| error.to_string())?;
        *told_lsn = append.commit_lsn;
        *told_ms = millis(now);
        if len > 0 {
            let end_lsn = begin_lsn + u64::from(len);
            lag.sent(end_lsn, now);
            self.lag.sent(end_lsn, now);
            self.positions.sent_lsn = self.positions.sent_lsn.max(end_lsn);
            self.status.bytes_from_buffers += origins.buffers;
            self.status.bytes_from_files += origins.files;
            self.wal_moved = true;
        }
        Ok(())
    }
}
