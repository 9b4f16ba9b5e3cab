//! Feeding a member whose next byte has left `pg_wal`: from another safekeeper that has it.
//!
//! A feed reads from the donor's position on in order, and hands out what it has at hand. It is
//! begun when the member needs it and dropped when `pg_wal` has the member's next byte again, or
//! the member is gone.

use safekeeper_protocol::Lsn;

use crate::donor::{Donor, DonorEvent, DonorRequest};
use crate::threads::Waker;

/// Between two attempts to find a donor that works.
const PAUSE_MS: u64 = 1000;

#[derive(Default)]
pub struct Feed {
    donor: Option<Donor>,
    chunk: Option<(Lsn, Vec<u8>)>,
    /// No donor is asked before.
    pause_until_ms: u64,
    /// Counts attempts, so that each goes to the next donor.
    attempts: usize,
    error: String,
}

impl Feed {
    /// Why the last attempt failed; empty if it did not.
    pub fn error(&self) -> &str {
        &self.error
    }

    /// When a donor will be asked again after a failure, if one is needed.
    pub fn next_attempt_ms(&self) -> u64 {
        if self.error.is_empty() || self.donor.is_some() {
            u64::MAX
        } else {
            self.pause_until_ms
        }
    }

    /// The member needs nothing from here.
    pub fn stop(&mut self) {
        if self.donor.is_some() || self.chunk.is_some() || !self.error.is_empty() {
            *self = Feed::default();
        }
    }

    /// End of the WAL from `lsn` on that is at hand; `lsn` if there is none. Then a donor is asked,
    /// `request` naming it: the n-th of those there are, for the n that it is given.
    pub fn available(
        &mut self,
        lsn: Lsn,
        now_ms: u64,
        waker: &Waker,
        request: impl FnOnce(usize) -> Result<DonorRequest, String>,
    ) -> Result<Lsn, FeedPanicked> {
        loop {
            if let Some((begin_lsn, wal)) = &self.chunk {
                let end_lsn = *begin_lsn + wal.len() as u64;
                if *begin_lsn <= lsn && lsn < end_lsn {
                    return Ok(end_lsn);
                }
                self.chunk = None;
            }
            let Some(donor) = &self.donor else {
                break;
            };
            match donor.poll() {
                None => return Ok(lsn),
                Some(DonorEvent::Chunk { begin_lsn, wal }) => {
                    self.error.clear();
                    self.chunk = Some((begin_lsn, wal));
                }
                Some(DonorEvent::Done) => self.donor = None,
                Some(DonorEvent::Removed { oldest_lsn }) => {
                    self.fail(format!("donor keeps WAL from {oldest_lsn} on only"), now_ms);
                }
                Some(DonorEvent::Failed(reason)) => self.fail(reason, now_ms),
                Some(DonorEvent::Panicked(text)) => return Err(FeedPanicked(text)),
            }
        }
        if now_ms >= self.pause_until_ms {
            let started = request(self.attempts).and_then(|request| {
                Donor::start(request, waker.clone()).map_err(|error| error.to_string())
            });
            self.attempts += 1;
            match started {
                Ok(donor) => self.donor = Some(donor),
                Err(reason) => self.fail(reason, now_ms),
            }
        }
        Ok(lsn)
    }

    /// WAL that [`Feed::available`] said is at hand; `None` if it is not.
    pub fn wal(&self, lsn: Lsn, len: u32) -> Option<&[u8]> {
        let (begin_lsn, wal) = self.chunk.as_ref()?;
        let from = usize::try_from(lsn.0.checked_sub(begin_lsn.0)?).ok()?;
        wal.get(from..)?.get(..len as usize)
    }

    fn fail(&mut self, reason: String, now_ms: u64) {
        self.error = reason;
        self.donor = None;
        self.pause_until_ms = now_ms + PAUSE_MS;
    }
}

/// The feed's thread panicked: a defect of ours, on which the worker ends.
#[derive(Debug)]
pub struct FeedPanicked(pub String);
