//! Comparing the local log with the donor's, byte by byte, before a reign begins (design §4.4).
//!
//! The donor is read on a thread; each chunk that comes is held against the same bytes of `pg_wal`.
//! What either side has removed is left out: it was compared when an earlier reign began.

use safekeeper_protocol::{Compared, Lsn, PeerIdx, Term};

use crate::donor::{Donor, DonorEvent, DonorRequest};
use crate::threads::Waker;
use crate::wal_source::{WalRead, WalSource};

/// What the proposer asked to compare, as far as it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    pub donor: PeerIdx,
    pub term: Term,
    pub begin_lsn: Lsn,
    pub end_lsn: Lsn,
}

pub struct Comparison {
    donor: Donor,
    pub stretch: Stretch,
}

/// What came of looking at a comparison.
pub enum ComparisonEvent {
    /// Still going on.
    Nothing,
    Ended(Compared),
    /// The donor keeps WAL from here on only: compare that.
    Removed {
        oldest_lsn: Lsn,
    },
    Panicked(String),
}

impl Comparison {
    /// Asks the donor for as much of the stretch as is kept here; `Err` is the outcome if there is
    /// nothing to ask for, or nobody to ask.
    pub fn begin(
        stretch: Stretch,
        source: &WalSource,
        waker: Waker,
        request: impl FnOnce(Stretch) -> DonorRequest,
    ) -> Result<Comparison, Compared> {
        let unavailable = |reason: String| Compared::Unavailable { reason };
        let oldest_lsn = source
            .oldest_lsn(stretch.end_lsn)
            .map_err(|error| unavailable(format!("could not list pg_wal: {error}")))?;
        let stretch = Stretch {
            begin_lsn: stretch.begin_lsn.max(oldest_lsn),
            ..stretch
        };
        if stretch.begin_lsn >= stretch.end_lsn {
            return Err(Compared::Equal);
        }
        let donor = Donor::start(request(stretch), waker)
            .map_err(|error| unavailable(error.to_string()))?;
        Ok(Comparison { donor, stretch })
    }

    pub fn poll(&self, source: &mut WalSource) -> ComparisonEvent {
        while let Some(event) = self.donor.poll() {
            match event {
                DonorEvent::Chunk { begin_lsn, wal } => match differs(source, begin_lsn, &wal) {
                    Ok(None) => {}
                    Ok(Some(at)) => return ComparisonEvent::Ended(Compared::Differs { at }),
                    Err(reason) => return unavailable(reason),
                },
                DonorEvent::Done => return ComparisonEvent::Ended(Compared::Equal),
                DonorEvent::Removed { oldest_lsn } => {
                    return ComparisonEvent::Removed { oldest_lsn };
                }
                DonorEvent::Failed(reason) => return unavailable(reason),
                DonorEvent::Panicked(text) => return ComparisonEvent::Panicked(text),
            }
        }
        ComparisonEvent::Nothing
    }
}

fn unavailable(reason: String) -> ComparisonEvent {
    ComparisonEvent::Ended(Compared::Unavailable { reason })
}

/// The first position at which the local log holds another byte.
fn differs(source: &mut WalSource, begin_lsn: Lsn, wal: &[u8]) -> Result<Option<Lsn>, String> {
    let mut local = vec![0; wal.len()];
    match source.read(begin_lsn, &mut local) {
        Ok(WalRead::Filled) => {
            let at = local
                .iter()
                .zip(wal)
                .position(|(ours, theirs)| ours != theirs);
            Ok(at.map(|at| begin_lsn + at as u64))
        }
        Ok(WalRead::Gone) => Err(format!(
            "local WAL from {begin_lsn} on was removed meanwhile"
        )),
        Err(error) => Err(error.to_string()),
    }
}
