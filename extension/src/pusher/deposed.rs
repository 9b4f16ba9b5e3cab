//! Another primary has been elected: what becomes of this server (design §7.4).
//!
//! No commit is released from the moment we know, whatever `walproposer.on_deposed` says; it only
//! says what becomes of the server:
//!
//! | | |
//! |---|---|
//! | `shutdown` | it stops, at once |
//! | `read_only` | reads go on, writes are refused (`read_only.rs`) |
//! | `wait` | commits wait, for ever |
//!
//! The stop is an *immediate* one. A fast one would end the waits of commits in flight, show their
//! rows to whoever is still there, and write a shutdown checkpoint: WAL that no quorum will ever
//! have. Then a data directory that could rejoin as it is would have diverged by stopping. The next
//! start is refused by `start.rs`, with both positions and the advice that fits.
//!
//! How we know:
//!
//! * A member's answer that carries a higher term ends the reign at once. That another has *won* it
//!   is not said by that: a candidacy that died may have left it on one member. So the worker ends,
//!   and the next one looks: it finds the other's WAL when it greets, waits while the other is alive
//!   and has written none, or leads again.
//! * A healthy primary's worker is started again for other reasons too, and must never take a passing
//!   view for a successor. So what counts is not that somebody is alive, nor a higher term (our own
//!   candidacies raise it, and die), but WAL on a member's disk, written in a term that is above
//!   every one this server was ever elected in. A safekeeper takes WAL only from a proposer that a
//!   majority has voted for. From that vote on nothing of ours could be committed, and it is not
//!   for a later view to undo it. Our own terms are all known: each was in the local history file
//!   before a byte was sent in it.
//! * Or both logs agree by their terms and differ in bytes, twice, with a checked read of the
//!   donor's. Then this proposer never stands again.
//!
//! All else waits as before: in doubt nothing is stopped. So does a server that no quorum has ever
//! elected (first use, promoted by hand), since it has no reign to lose, and one that was started
//! by `walproposer.start_without_quorum`, on purpose.

use safekeeper_protocol::{Term, TermHistory, WaitReason};

use super::Pusher;
use crate::settings::{self, OnDeposed};
use crate::{postgres, shmem, worker};

impl Pusher {
    pub(super) fn on_deposed(&mut self, by: Term) {
        let own = self.proposer.term();
        let what = format!("a safekeeper follows term {by}, this server was in term {own}");
        if self.wal_sender.is_none() {
            // A promotion, or the last WAL of a stop: it ends here, and the server is not concerned.
            self.deposed = Some(what);
            return;
        }
        postgres::warning(
            format!("{what}: no commit is acknowledged here until it is known who leads"),
            "",
        );
        worker::end();
    }

    /// Not elected, for this reason: because another has reigned since?
    pub(super) fn look_for_a_successor(&mut self, reason: &WaitReason) {
        let is_worker = self.wal_sender.is_some();
        if !is_worker || self.deposed.is_some() || settings::start_without_quorum() {
            return;
        }
        if let Some(how_we_know) = replaced(reason, &self.local.history) {
            self.lose_reign(how_we_know);
        }
    }

    /// A worker that had found a successor's WAL is elected after all: that WAL was never
    /// committed, and those who hold it are no majority.
    pub(super) fn on_elected_again(&mut self) {
        self.deposed = None;
        shmem::set_read_only(false);
    }

    fn lose_reign(&mut self, how_we_know: String) {
        self.deposed = Some(how_we_know);
        self.obey_on_deposed();
    }

    /// Also after a reload: an administrator may have decided otherwise.
    pub(super) fn obey_on_deposed(&self) {
        let Some(how_we_know) = &self.deposed else {
            return;
        };
        postgres::warning(
            format!("{how_we_know}: no commit is acknowledged here any more"),
            "",
        );
        let setting = settings::on_deposed();
        shmem::set_read_only(setting == OnDeposed::ReadOnly);
        match setting {
            OnDeposed::Shutdown => {
                postgres::warning(
                    format!("stopping this server immediately: {how_we_know}"),
                    "Start it as a standby of the present primary. If its log has diverged, run pg_rewind before; \
                     a start as a primary is refused, and tells which of the two it is.",
                );
                postgres::stop_server_immediately();
            }
            OnDeposed::ReadOnly => postgres::warning(
                "this server is read-only from here on",
                "Have its clients connect to the present primary, then stop it and have it rejoin as a standby.",
            ),
            OnDeposed::Wait => postgres::warning(
                "commits wait here, and will not be answered",
                "Stop this server, and have it rejoin as a standby.",
            ),
        }
    }
}

/// How a reason for not being elected shows that another has reigned. `own` is all terms in which
/// this server was elected, unclipped. See the head of this file.
fn replaced(reason: &WaitReason, own: &TermHistory) -> Option<String> {
    let own_last = own.last()?.term;
    match reason {
        WaitReason::Diverged(divergence) => {
            // Not the last entry of the history: that reign may be an empty one.
            let run = divergence.donor.runs().last()?;
            (run.term > own_last).then(|| {
                format!(
                    "another primary has written WAL in term {}, up to {}; this one led last in term {own_last}",
                    run.term, run.end
                )
            })
        }
        WaitReason::BytesDiffer { .. } => Some(reason.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use safekeeper_protocol::{Divergence, Log, Lsn, TermEntry, Tli};

    use super::*;

    fn history(entries: &[(u64, u64)]) -> TermHistory {
        let entry = |&(term, start): &(u64, u64)| TermEntry {
            term: Term(term),
            tli: Tli(1),
            start_lsn: Lsn(start),
        };
        TermHistory::new(entries.iter().map(entry).collect()).expect("a history")
    }

    fn diverged(local: &TermHistory, donor: &[(u64, u64)], donor_end: u64) -> WaitReason {
        WaitReason::Diverged(Divergence {
            local: Log::new(local, Lsn(50)),
            unled_from: None,
            donor: Log::new(&history(donor), Lsn(donor_end)),
            common: None,
        })
    }

    #[test]
    fn only_wal_of_a_later_term_is_a_successors() {
        let own = history(&[(1, 10), (3, 40)]);
        let is_replaced = |reason: &WaitReason| replaced(reason, &own).is_some();
        assert!(is_replaced(&diverged(&own, &[(1, 10), (4, 45)], 60)));
        // Elected, or given up: a reign without WAL proves nothing.
        assert!(!is_replaced(&diverged(
            &own,
            &[(1, 10), (3, 40), (4, 60)],
            60
        )));
        // Of a dead rival, whom we have outlived.
        assert!(!is_replaced(&diverged(&own, &[(1, 10), (2, 30)], 60)));
        // Our own.
        assert!(!is_replaced(&diverged(&own, &[(1, 10), (3, 40)], 60)));
    }

    #[test]
    fn who_is_alive_proves_nothing() {
        let own = history(&[(1, 10)]);
        for reason in [
            WaitReason::Rival { term: Term(7) },
            WaitReason::NoQuorum {
                greeted: 1,
                needed: 2,
            },
            WaitReason::Donor("gone".to_owned()),
        ] {
            assert_eq!(replaced(&reason, &own), None, "{reason}");
        }
    }

    #[test]
    fn other_bytes_are_final() {
        let reason = WaitReason::BytesDiffer { at: Lsn(20) };
        assert!(replaced(&reason, &history(&[(1, 10)])).is_some());
    }

    #[test]
    fn who_never_led_has_nothing_to_lose() {
        let own = TermHistory::default();
        let reason = diverged(&own, &[(1, 10)], 60);
        assert_eq!(replaced(&reason, &own), None);
    }
}
