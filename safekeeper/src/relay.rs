//! WAL that is not here any more, for a consumer that asks for it all the same: brought from a
//! safekeeper that still has it.
//!
//! ```text
//!   consumer asks from     this one's WAL begins
//!          │                      │
//!          ├── from a peer ───────┼── from own files ──────► commit_lsn
//! ```
//!
//! The other members are asked one after another. What one of them sends is forwarded only if it is of
//! this cluster and timeline, decodes (page headers, the chain of records, checksums) and is committed:
//! a safekeeper sends nothing else, and nothing above the own commit_lsn is forwarded. One that fails
//! in between is followed by the next, and not asked again for this stream. If nobody has it, the
//! consumer is told what a primary would tell.
//!
//! One message of WAL is held at a time. The stream holds the peer's WAL back as any consumer's does.
//!
//! A peer that has not got it either must not ask us in turn: it knows by the name we give.

use std::ops::Range;
use std::time::{Duration, Instant};

use safekeeper_client::wal_client::{ClientError, WalClient, WalClientConfig, WalEvent, WalStream};
use safekeeper_protocol::{Lsn, Tli};
use safekeeper_wal::{PAGE_SIZE, WalDecoder, WalError, WalFormat};
use safekeeper_wire::credentials::Credentials;

use crate::keeper::Keeper;
use crate::segment::{Timelines, wal_format};
use crate::timeline_files::expected_timelines;

/// `application_name` of a safekeeper that asks for somebody else.
pub const RELAY_NAME: &str = "safekeeper relay";

/// Those who ask every safekeeper by themselves want to know what this one has.
const ASK_ALL: [&str; 2] = [RELAY_NAME, "fetch-wal"];

/// For each step of asking one peer. A consumer's patience is a minute.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);

/// WAL that is committed is sent at once; longer without any, and the peer is given up.
const STALL_TIMEOUT: Duration = Duration::from_secs(10);

/// The consumer may speak meanwhile.
const WAIT_AT_ONCE: Duration = Duration::from_millis(200);

/// A consumer of this name is served from elsewhere if need be.
pub fn is_relayed(application_name: &str) -> bool {
    !ASK_ALL.contains(&application_name)
}

/// A stream from a peer.
#[derive(Debug)]
pub struct Relay {
    pub address: String,
    stream: WalStream,
    decoder: WalDecoder,
    /// Checked, and not yet taken; ends at `decoder`'s position.
    wal: Vec<u8>,
    /// Where WAL that is wanted begins.
    begin: Lsn,
    /// For WAL that did not come.
    waited: Duration,
}

/// Why a peer is of no use.
#[derive(Debug, thiserror::Error)]
enum RelayError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("it serves the cluster of system identifier {0}")]
    OtherCluster(u64),
    #[error("its committed WAL ends at {0}")]
    TooShort(Lsn),
    #[error("it sends damaged WAL: {0}")]
    Damaged(#[from] WalError),
    #[error("the timeline ends at {0} there")]
    Ended(Lsn),
    #[error("nothing came for {} s", STALL_TIMEOUT.as_secs())]
    Stalled,
}

impl Relay {
    /// A stream of `tli` whose first bytes are here, from somebody who has all of `range` and is not among
    /// `tried`, where those go who are asked. None if nobody has it.
    pub fn open(
        keeper: &Keeper,
        credentials: &Credentials,
        tli: Tli,
        range: &Range<Lsn>,
        tried: &mut Vec<String>,
    ) -> Option<Relay> {
        let (name, begin) = (&keeper.cluster().name, range.start);
        for address in keeper.peers() {
            if tried.contains(&address) {
                continue;
            }
            tried.push(address.clone());
            match Relay::open_from(keeper, credentials, &address, tli, range) {
                Ok(relay) => {
                    log::info!(
                        "relays WAL that is not here any more cluster={name} peer={address} begin_lsn={begin}"
                    );
                    return Some(relay);
                }
                Err(error) => log::info!(
                    "WAL is not to be had from a peer cluster={name} peer={address} begin_lsn={begin} ({error})"
                ),
            }
        }
        None
    }

    fn open_from(
        keeper: &Keeper,
        credentials: &Credentials,
        address: &str,
        tli: Tli,
        range: &Range<Lsn>,
    ) -> Result<Relay, RelayError> {
        let page = range.start.segment_start(PAGE_SIZE);
        match Relay::open_at(keeper, credentials, address, tli, range, page) {
            // No page begins there: it lies inside the zeros behind a switch record.
            Err(RelayError::Damaged(_)) => {
                let segment = range.start.segment_start(keeper.cluster().segment_size);
                Relay::open_at(keeper, credentials, address, tli, range, segment)
            }
            other => other,
        }
    }

    fn open_at(
        keeper: &Keeper,
        credentials: &Credentials,
        address: &str,
        tli: Tli,
        range: &Range<Lsn>,
        start: Lsn,
    ) -> Result<Relay, RelayError> {
        let cluster = keeper.cluster();
        let mut client = WalClient::connect(&WalClientConfig {
            address: address.to_owned(),
            credentials: credentials.clone(),
            application_name: RELAY_NAME.to_owned(),
            cluster: Some(cluster.system_id.to_string()),
            timeout: ANSWER_TIMEOUT,
        })?;
        let identity = client.identify_system()?;
        if identity.system_id != cluster.system_id {
            return Err(RelayError::OtherCluster(identity.system_id));
        }
        if identity.end_lsn < range.end {
            return Err(RelayError::TooShort(identity.end_lsn));
        }
        let stream = client.start_replication(start, tli)?;
        let mut relay = Relay {
            address: address.to_owned(),
            stream,
            decoder: decoder(keeper, start),
            wal: Vec::new(),
            begin: range.start,
            waited: Duration::ZERO,
        };
        // Only with the first bytes it has shown that it has them.
        while relay.wal.is_empty() {
            relay.receive(ANSWER_TIMEOUT)?;
        }
        Ok(relay)
    }

    /// Waits a moment for more. False if the peer has none for us any more.
    pub fn wait_for_more(&mut self) -> bool {
        match self.receive(WAIT_AT_ONCE) {
            Ok(()) => true,
            Err(error) => {
                log::warn!("relaying ended peer={} ({error})", self.address);
                false
            }
        }
    }

    /// What is here, and was not taken yet.
    pub fn range(&self) -> Range<Lsn> {
        self.begin..self.begin + self.wal.len() as u64
    }

    /// The next bytes, up to `end_lsn`, which is in [`Relay::range`].
    pub fn take(&mut self, end_lsn: Lsn) -> Vec<u8> {
        let len = usize::try_from(end_lsn - self.begin).expect("not more than is here");
        let rest = self.wal.split_off(len);
        self.begin = end_lsn;
        std::mem::replace(&mut self.wal, rest)
    }

    /// One message at most.
    fn receive(&mut self, patience: Duration) -> Result<(), RelayError> {
        let started = Instant::now();
        match self.stream.next_event(patience)? {
            Some(WalEvent::Wal { begin_lsn, wal }) => {
                self.decoder.feed(&wal)?;
                let lead = self.begin.saturating_distance_from(begin_lsn);
                let wanted = usize::try_from(lead).ok().and_then(|lead| wal.get(lead..));
                self.wal.extend_from_slice(wanted.unwrap_or_default());
                self.waited = Duration::ZERO;
                return Ok(());
            }
            Some(WalEvent::Keepalive {
                reply_requested: true,
                ..
            }) => self.report()?,
            Some(WalEvent::TimelineEnd(end)) => return Err(RelayError::Ended(end.end_lsn)),
            Some(WalEvent::Keepalive { .. }) | None => {}
        }
        self.waited += started.elapsed();
        match self.waited < STALL_TIMEOUT {
            true => Ok(()),
            false => Err(RelayError::Stalled),
        }
    }

    /// We are alive, and what was passed on need not be kept.
    fn report(&mut self) -> Result<(), RelayError> {
        let taken = self.begin.min(self.stream.position());
        Ok(self.stream.report(taken, taken, Lsn::INVALID)?)
    }
}

/// Expects what the own log's history says.
fn decoder(keeper: &Keeper, start: Lsn) -> WalDecoder {
    let format: WalFormat = wal_format(keeper.cluster())
        .expect("the WAL of this cluster was opened, so its shape is supported");
    let view = keeper.view();
    let timelines = Timelines::new(&view.state.history);
    let mut decoder = WalDecoder::new(format, start);
    decoder.expect_timelines(expected_timelines(view.timeline_files(), &timelines));
    decoder
}
