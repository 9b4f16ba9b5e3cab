//! Sends to each member what it can take: WAL from `pg_wal`, or from a donor where that has left
//! it; heartbeats; news of commits.

use safekeeper_protocol::{Append, LocalWal, Lsn, PeerIdx};

use super::{Member, Pusher, thread_panicked};
use crate::feed::FeedPanicked;
use crate::wal_source::WalRead;

/// Appends for one member in one turn, so that a member that catches up does not hold up the
/// others' commits: 4 MiB take about a millisecond to copy.
const APPENDS_PER_TURN: usize = 4;

impl Pusher {
    pub(super) fn send_all(&mut self) {
        self.more_to_send = false;
        let local_end_lsn = self.local_end_lsn();
        for at in 0..self.members.len() {
            if let Err(reason) = self.send(at, local_end_lsn) {
                self.close(at, &reason);
            }
        }
    }

    fn send(&mut self, at: usize, local_end_lsn: Lsn) -> Result<(), String> {
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
            let (end_lsn, from_files) = self.at_hand(at, next_lsn, local_end_lsn)?;
            let now_ms = self.now_ms();
            let wal = LocalWal {
                end_lsn,
                flush_lsn: local_end_lsn,
            };
            let Some(append) = self.proposer.next_append(peer, wal, now_ms) else {
                return Ok(());
            };
            self.send_append(at, &append, from_files)?;
        }
        self.more_to_send = true;
        self.members[at]
            .peer
            .flush()
            .map_err(|error| error.to_string())
    }

    /// End of the WAL from `lsn` on that can be sent now, and whether it is in `pg_wal`.
    fn at_hand(&mut self, at: usize, lsn: Lsn, local_end_lsn: Lsn) -> Result<(Lsn, bool), String> {
        // A standby brings the members to the start of its term, beyond the end of its own log.
        let wanted_lsn = match self.standby_end_lsn {
            Some(_) => self.proposer.term_start_lsn(),
            None => local_end_lsn,
        };
        if lsn >= wanted_lsn {
            return Ok((lsn, true));
        }
        if lsn < local_end_lsn && self.source.has(lsn).map_err(|error| error.to_string())? {
            self.members[at].feed.stop();
            return Ok((local_end_lsn, true));
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
            Ok(end_lsn) => Ok((end_lsn, false)),
            Err(FeedPanicked(text)) => thread_panicked(&text),
        }
    }

    fn send_append(&mut self, at: usize, append: &Append, from_files: bool) -> Result<(), String> {
        let Member { peer, feed, lag } = &mut self.members[at];
        let source = &mut self.source;
        peer.send_append(append, |wal| {
            // A heartbeat: nothing need be at hand.
            if wal.is_empty() {
                return Ok(());
            }
            if !from_files {
                let copied = feed.copy(append.begin_lsn, wal);
                return copied
                    .then_some(())
                    .ok_or("WAL from a donor is not at hand".to_owned());
            }
            match source.read(append.begin_lsn, wal) {
                Ok(WalRead::Filled) => Ok(()),
                Ok(WalRead::Gone) => Err(format!(
                    "WAL from {} on was removed meanwhile",
                    append.begin_lsn
                )),
                Err(error) => Err(error.to_string()),
            }
        })?;
        let len = u64::from(append.len);
        if len > 0 {
            let (end_lsn, now) = (append.begin_lsn + len, self.started.elapsed());
            lag.sent(end_lsn, now);
            self.lag.sent(end_lsn, now);
            self.positions.sent_lsn = self.positions.sent_lsn.max(end_lsn);
            let counter = match from_files {
                true => &mut self.status.bytes_from_files,
                false => &mut self.status.bytes_from_donor,
            };
            *counter += len;
        }
        Ok(())
    }
}
