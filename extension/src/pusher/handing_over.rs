//! A reign that goes on in another process: how the worker gives it away at a stop, and how the last
//! sender brings it to its end. (`stop.rs`)

use std::time::Duration;

use safekeeper_protocol::{Lsn, PeerIdx, WonTerm};

use super::Pusher;

/// Each member has so long to take what is on its way to it.
const GOODBYE: Duration = Duration::from_millis(500);

impl Pusher {
    /// This one does not lead any more then.
    pub fn hand_over(&mut self) -> Option<WonTerm> {
        self.proposer.hand_over()
    }

    pub fn is_leading(&self) -> bool {
        self.proposer.is_leading()
    }

    pub fn is_deposed(&self) -> bool {
        self.deposed.is_some()
    }

    pub fn commit_lsn(&self) -> Lsn {
        self.proposer.commit_lsn()
    }

    /// A member that can be reached, as far as is known, has yet to flush the WAL below `end_lsn`.
    pub fn is_awaiting(&self, end_lsn: Lsn) -> bool {
        let mut members = self.members.iter().enumerate();
        members.any(|(at, member)| {
            let of_peer = self.proposer.peer_status(PeerIdx(at));
            member.peer.is_tried() && of_peer.flush_lsn < end_lsn
        })
    }

    /// Ends all connections when the members have taken what was sent, the news of the last commit
    /// above all.
    pub fn say_goodbye(&mut self) {
        self.news_due_ms = 0;
        self.send_all();
        for member in &mut self.members {
            member.peer.say_goodbye(GOODBYE);
        }
    }
}
