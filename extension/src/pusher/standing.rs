//! What others see of the pusher: the replication slot, and the rows of the views.

use safekeeper_protocol::PeerIdx;

use super::Pusher;
use crate::slot::{Slot, position_to_keep};
use crate::standby_xmin::{Xmins, to_hold};
use crate::{postgres, settings, shmem};

/// The replication slot is moved, or tried for, this often at most.
const SLOT_PAUSE_MS: u64 = 1000;
/// The views are written this often at most while WAL flows.
const PUBLISH_PAUSE_MS: u64 = 10;

impl Pusher {
    pub(super) fn keep_slot(&mut self) {
        let now_ms = self.now_ms();
        if now_ms < self.slot_due_ms || !self.proposer.is_leading() {
            return;
        }
        self.slot_due_ms = now_ms + SLOT_PAUSE_MS;
        let commit_lsn = self.proposer.commit_lsn();
        let Some(slot) = &mut self.slot else {
            return self.acquire_slot();
        };
        if !commit_lsn.is_valid() {
            return;
        }
        let members = (0..self.members.len()).map(PeerIdx);
        let following = members.filter(|&peer| self.proposer.next_lsn(peer).is_some());
        let flushed = following.map(|peer| self.proposer.peer_status(peer).flush_lsn);
        let floor = slot.restart_lsn();
        let keep = position_to_keep(flushed, commit_lsn, floor, settings::max_member_lag());
        // The quorum may have more than the local disk does: after a crash WAL begins no later than that
        // ends.
        slot.advance(keep.min(postgres::flushed_lsn()));
        self.hold_transactions(now_ms);
    }

    /// For standbys behind the members.
    fn hold_transactions(&mut self, now_ms: u64) {
        for (at, member) in self.members.iter_mut().enumerate() {
            let peer = PeerIdx(at);
            let follows = self.proposer.next_lsn(peer).is_some();
            let said = follows.then(|| self.proposer.peer_status(peer).feedback);
            let xmins = said.map(|feedback| Xmins {
                xmin: feedback.xmin,
                catalog_xmin: feedback.catalog_xmin,
            });
            member.standby_xmins.note(xmins, now_ms);
        }
        let members = self.members.iter().map(|member| &member.standby_xmins);
        if let (Some(slot), Some(xmins)) = (&mut self.slot, to_hold(members, now_ms)) {
            slot.hold_transactions(xmins);
        }
    }

    fn acquire_slot(&mut self) {
        match Slot::acquire(&self.slot_name) {
            Ok(slot) => {
                self.slot = Some(slot);
                self.slot_obstacle.clear();
            }
            Err(obstacle) => {
                let obstacle = obstacle.to_string();
                if self.slot_obstacle != obstacle {
                    postgres::log(format!(
                        "WAL is not kept for safekeepers that lag: {obstacle}"
                    ));
                    self.slot_obstacle = obstacle;
                }
            }
        }
    }

    /// While WAL flows, not at every turn: what the views show may be that much older.
    pub(super) fn publish_if_due(&mut self) {
        if self.now_ms() >= self.publish_due_ms() || !self.wal_moved {
            self.publish();
        }
    }

    /// When what was left out is to be made up for.
    pub(super) fn publish_due_ms(&self) -> u64 {
        match self.wal_moved {
            true => self.published_ms + PUBLISH_PAUSE_MS,
            false => u64::MAX,
        }
    }

    fn publish(&mut self) {
        self.published_ms = self.now_ms();
        self.wal_moved = false;
        let proposer = &self.proposer;
        let status = &mut *self.status;
        let configuration = proposer.configuration();
        status.state.set(proposer.state_name());
        status.term = proposer.term().0;
        status.generation = configuration.version.generation;
        status.tli = self.tli;
        status.sent_lsn = self.positions.sent_lsn;
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        status.members_configured = count(configuration.members.len());
        status.quorum_size = match configuration.is_none() {
            true => 0,
            false => count(configuration.quorum_size()),
        };
        let now = self.started.elapsed();
        let mut active = 0;
        status.n_peers = self.members.len();
        for (at, (row, member)) in status.peers.iter_mut().zip(&self.members).enumerate() {
            let of_peer = proposer.peer_status(PeerIdx(at));
            active += u32::from(proposer.next_lsn(PeerIdx(at)).is_some());
            let dial = member.peer.dial();
            row.id = of_peer.member_id.map_or(0, |id| id.0);
            row.host.set(&dial.address.host);
            row.port = dial.address.port;
            row.state.set(of_peer.state);
            row.term = of_peer.term.0;
            row.sent_lsn = of_peer.sent_lsn;
            row.flush_lsn = of_peer.flush_lsn;
            row.commit_lsn = of_peer.commit_lsn;
            let lag = member
                .lag
                .current(now)
                .and_then(|lag| i64::try_from(lag.as_micros()).ok());
            row.flush_lag_us = lag.unwrap_or(-1);
            row.reconnects = member.peer.reconnects();
            let fed = member.feed.error();
            row.last_error.set(if fed.is_empty() {
                member.peer.last_error()
            } else {
                fed
            });
        }
        status.members_active = active;
        let waiting = proposer.wait_reason().map(ToString::to_string);
        let reason = self
            .deposed
            .clone()
            .or(waiting)
            .unwrap_or_else(|| self.slot_obstacle.clone());
        status.last_error.set(&reason);
        shmem::publish(status);
    }
}
