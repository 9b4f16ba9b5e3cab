//! Follows the log of a cluster, record by record, over timelines and over the loss of whoever sends it.
//!
//! ```text
//!   addresses ─► connect ─► who are you? ─► WAL from where the last record ended ─► decoder ─► records
//!       ▲                                        │
//!       └── the next one, after a pause ◄── lost, or it has no more of what we need
//! ```
//!
//! Who sends may be a safekeeper or a primary: both speak streaming replication. Every page and every
//! checksum is checked. After a loss of the connection the log goes on at the next address exactly where
//! the last whole record ended: none is missed, none comes twice. Another server is believed only if it
//! serves the same system identifier and its history has what was read so far; otherwise following ends
//! with an error that says so, since what was read is not part of that server's log.
//!
//! Held in memory are the bytes of the record under way, at most one record's, and one message.
//!
//! Positions are reported to the sender: written and flushed is what the caller has been given. So it may
//! be let go there; a caller that stores WAL should follow by a slot of its own and its own client.

use std::time::{Duration, Instant};

use safekeeper_protocol::{Lsn, Tli};
use safekeeper_wal::page::page_header_size;
use safekeeper_wal::record::RECORD_HEADER_SIZE;
use safekeeper_wal::{
    HistoryError, PAGE_SIZE, PgVersion, Record, TimelineHistory, WalDecoder, WalError, WalFormat,
};
use safekeeper_wire::credentials::Credentials;

use crate::wal_client::{
    ClientError, SystemIdentity, WalClient, WalClientConfig, WalEvent, WalStream,
};

/// Whom to follow, and from where.
#[derive(Clone, Debug)]
pub struct FollowerConfig {
    /// Each `host:port`; asked in turn.
    pub addresses: Vec<String>,
    pub credentials: Credentials,
    pub application_name: String,
    /// Needed where a safekeeper serves several clusters.
    pub cluster: Option<String>,
    /// For each step of connecting, and for a sender that says nothing.
    pub timeout: Duration,
    /// The first record is the first that begins there or behind; `None`: where the log ends now.
    pub start_lsn: Option<Lsn>,
    /// The timeline to begin on; `None`: the one that the log was on at the start.
    pub tli: Option<Tli>,
}

/// Why following has ended. What was given before is sound.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// Nobody could be followed; what each said last.
    #[error("{address}: {source}")]
    Client {
        address: String,
        source: ClientError,
    },
    #[error("{address} sends damaged WAL: {source}")]
    Damaged { address: String, source: WalError },
    #[error("{address} serves the cluster of system identifier {found}, expected {expected}")]
    OtherCluster {
        address: String,
        found: u64,
        expected: u64,
    },
    #[error(
        "{address} is on timeline {newest}, whose history does not have {lsn} of timeline {tli}: its log is \
         another one"
    )]
    OtherHistory {
        address: String,
        newest: Tli,
        lsn: Lsn,
        tli: Tli,
    },
    #[error("{address} has an invalid history file: {source}")]
    History {
        address: String,
        source: HistoryError,
    },
    #[error("{address} is of PostgreSQL version number {version_num:?}, which is not known here")]
    Version {
        address: String,
        version_num: Option<String>,
    },
    #[error("no address to follow")]
    NoAddress,
}

impl FollowError {
    /// Another address, or the same one later, may do.
    pub fn may_pass(&self) -> bool {
        matches!(self, FollowError::Client { .. })
    }

    /// The WAL wanted is not to be had there any more.
    pub fn is_removed(&self) -> bool {
        matches!(
            self,
            FollowError::Client { source: ClientError::Server(said), .. } if said.sqlstate == "58P01"
        )
    }
}

/// A record with its bytes.
#[derive(Clone, Copy, Debug)]
pub struct FollowedRecord<'a> {
    pub record: Record,
    pub version: PgVersion,
    /// What follows its header, page headers taken out.
    pub body: &'a [u8],
}

/// What a turn has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// WAL has come; its whole records were given.
    Records,
    /// None has, within the patience, or none follows: the sender's log ends there.
    Quiet { end_lsn: Option<Lsn> },
    /// The log goes on, on another timeline, from here.
    TimelineSwitch { tli: Tli, lsn: Lsn },
}

/// See the head of this file.
///
/// ```no_run
/// use std::time::Duration;
/// use safekeeper_client::follower::{Follower, FollowerConfig};
/// use safekeeper_wire::credentials::Credentials;
/// use safekeeper_wire::login::BindingMode;
/// use safekeeper_wire::passfile::default_passfile;
/// use safekeeper_wire::tls::ClientTls;
///
/// let mut follower = Follower::connect(FollowerConfig {
///     addresses: vec!["10.0.0.11:5454".into(), "10.0.0.12:5454".into()],
///     credentials: Credentials {
///         user: "pageserver".into(),
///         passfile: default_passfile(),
///         tls: ClientTls::default(),
///         binding: BindingMode::default(),
///     },
///     application_name: "pageserver1".into(),
///     cluster: None,
///     timeout: Duration::from_secs(10),
///     start_lsn: None,
///     tli: None,
/// })?;
/// loop {
///     follower.turn(Duration::from_secs(1), |it| {
///         println!("{} {} bytes", it.record.start_lsn, it.body.len());
///     })?;
/// }
/// # #[allow(unreachable_code)]
/// # Ok::<(), safekeeper_client::follower::FollowError>(())
/// ```
#[derive(Debug)]
pub struct Follower {
    config: FollowerConfig,
    /// Of `config.addresses`.
    at: usize,
    stream: Option<WalStream>,
    system_id: u64,
    version: PgVersion,
    tli: Tli,
    decoder: WalDecoder,
    /// WAL from here up to the decoder's position: the beginning of the record under way.
    pending: Vec<u8>,
    pending_lsn: Lsn,
    format: WalFormat,
    /// Records that begin before this are not given.
    start_lsn: Lsn,
    /// Where the sender's log ended when it was asked last.
    end_lsn: Lsn,
    reported: Instant,
}

/// Reported at least this often, so that a sender does not take us for dead.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// How a sender presents itself.
struct Sender {
    client: WalClient,
    identity: SystemIdentity,
    format: WalFormat,
    /// Of its newest timeline.
    history: TimelineHistory,
}

impl Follower {
    /// The first address that answers is followed.
    pub fn connect(config: FollowerConfig) -> Result<Follower, FollowError> {
        let mut last_error = FollowError::NoAddress;
        for at in 0..config.addresses.len() {
            match Follower::begin(&config, at) {
                Err(error) if error.may_pass() => last_error = error,
                other => return other,
            }
        }
        Err(last_error)
    }

    fn begin(config: &FollowerConfig, at: usize) -> Result<Follower, FollowError> {
        let sender = greet(config, at)?;
        let Sender {
            identity,
            format,
            ref history,
            ..
        } = sender;
        let start_lsn = config.start_lsn.unwrap_or(identity.end_lsn);
        let tli = config.tli.unwrap_or_else(|| tli_with(history, start_lsn));
        let page = start_lsn.segment_start(PAGE_SIZE);
        let mut follower = Follower {
            config: config.clone(),
            at,
            stream: None,
            system_id: identity.system_id,
            version: format.version,
            tli,
            decoder: WalDecoder::new(format, page),
            pending: Vec::new(),
            pending_lsn: page,
            format,
            start_lsn,
            end_lsn: identity.end_lsn,
            reported: Instant::now(),
        };
        follower.stream_from(sender, page)?;
        Ok(follower)
    }

    /// Where the last whole record ended: everything below has been given.
    pub fn position(&self) -> Lsn {
        self.decoder.record_end()
    }

    /// WAL has been taken, and checked, up to here; mostly the beginning of a record lies below.
    pub fn received_lsn(&self) -> Lsn {
        self.decoder.position()
    }

    /// Where the sender's log ended when the connection was made.
    pub fn end_lsn(&self) -> Lsn {
        self.end_lsn
    }

    /// The timeline that is being read.
    pub fn tli(&self) -> Tli {
        self.tli
    }

    /// Who is being followed, or was last.
    pub fn address(&self) -> &str {
        &self.config.addresses[self.at]
    }

    pub fn version(&self) -> PgVersion {
        self.version
    }

    /// Waits for WAL up to `patience`, and gives every record that it makes whole. After an error that
    /// [may pass](FollowError::may_pass), [`Follower::reconnect`] goes on.
    pub fn turn(
        &mut self,
        patience: Duration,
        on_record: impl FnMut(FollowedRecord<'_>),
    ) -> Result<Turn, FollowError> {
        let address = self.address().to_owned();
        let lost = |source| FollowError::Client {
            address: address.clone(),
            source,
        };
        let Some(stream) = &mut self.stream else {
            let lost_before = std::io::Error::from(std::io::ErrorKind::NotConnected);
            return Err(lost(ClientError::Lost(lost_before)));
        };
        let turn = match stream.next_event(patience).map_err(lost)? {
            None => Turn::Quiet { end_lsn: None },
            Some(WalEvent::Keepalive {
                end_lsn,
                reply_requested,
            }) => {
                if reply_requested {
                    self.report()?;
                }
                Turn::Quiet {
                    end_lsn: Some(end_lsn),
                }
            }
            Some(WalEvent::Wal { wal, .. }) => match self.take(&wal, on_record) {
                Ok(()) => Turn::Records,
                Err(_) if self.begins_inside_padding() => {
                    self.begin_with_segment()?;
                    Turn::Quiet { end_lsn: None }
                }
                Err(source) => return Err(FollowError::Damaged { address, source }),
            },
            Some(WalEvent::TimelineEnd(end)) => {
                self.tli = end.next_tli;
                let client = self.stream.take().and_then(WalStream::into_client);
                let client = client.expect("a stream that has ended gives its session back");
                let begun = client.start_replication(end.end_lsn, end.next_tli);
                self.stream = Some(begun.map_err(lost)?);
                Turn::TimelineSwitch {
                    tli: end.next_tli,
                    lsn: end.end_lsn,
                }
            }
        };
        if self.reported.elapsed() >= REPORT_EVERY {
            self.report()?;
        }
        Ok(turn)
    }

    /// Tells the sender how far the log has been taken.
    pub fn report(&mut self) -> Result<(), FollowError> {
        self.reported = Instant::now();
        let (write_lsn, flush_lsn) = (self.decoder.position(), self.decoder.record_end());
        let Some(stream) = &mut self.stream else {
            return Ok(());
        };
        // Nothing is replayed here, so nobody's commit waits for that.
        let reported = stream.report(write_lsn, flush_lsn, Lsn::INVALID);
        reported.map_err(|source| self.failed(source))
    }

    /// Tries each address once, the one behind the last one first, and goes on where the last whole record
    /// ended.
    pub fn reconnect(&mut self) -> Result<(), FollowError> {
        self.stream = None;
        let n_addresses = self.config.addresses.len();
        let mut last_error = FollowError::NoAddress;
        for _ in 0..n_addresses {
            self.at = (self.at + 1) % n_addresses;
            match self.resume() {
                Err(error) if error.may_pass() => last_error = error,
                other => return other,
            }
        }
        Err(last_error)
    }

    fn resume(&mut self) -> Result<(), FollowError> {
        let sender = greet(&self.config, self.at)?;
        let address = self.address().to_owned();
        if sender.identity.system_id != self.system_id {
            return Err(FollowError::OtherCluster {
                address,
                found: sender.identity.system_id,
                expected: self.system_id,
            });
        }
        let lsn = self.decoder.record_end();
        let newest = sender.identity.tli;
        if newest < self.tli {
            // It has not heard of our timeline yet.
            return Err(self.failed(ClientError::Protocol(format!(
                "it is on timeline {newest}, behind timeline {}",
                self.tli
            ))));
        }
        let is_known = match newest == self.tli {
            true => true,
            false => sender
                .history
                .switch_point(self.tli.0)
                .is_some_and(|end| lsn <= end),
        };
        if !is_known {
            return Err(FollowError::OtherHistory {
                address,
                newest,
                lsn,
                tli: self.tli,
            });
        }
        // What came behind the last record is asked for again.
        let decoder = match self.decoder.last_record() {
            None => WalDecoder::new(self.format, lsn),
            last => WalDecoder::after_record(self.format, lsn, last),
        };
        self.restart(sender, decoder)
    }

    /// Nothing was decoded yet, and there need not be a page where we began: the zeros behind a switch
    /// record have none.
    fn begins_inside_padding(&self) -> bool {
        let begin = self.decoder.record_end();
        self.decoder.last_record().is_none() && begin != self.segment_with(begin)
    }

    fn begin_with_segment(&mut self) -> Result<(), FollowError> {
        let segment = self.segment_with(self.decoder.record_end());
        let sender = greet(&self.config, self.at)?;
        self.restart(sender, WalDecoder::new(self.format, segment))
    }

    fn segment_with(&self, lsn: Lsn) -> Lsn {
        lsn.segment_start(self.format.segment_size.bytes())
    }

    fn restart(&mut self, sender: Sender, decoder: WalDecoder) -> Result<(), FollowError> {
        let begin = decoder.position();
        self.decoder = decoder;
        (self.pending_lsn, self.pending) = (begin, Vec::new());
        self.end_lsn = sender.identity.end_lsn;
        self.stream_from(sender, begin)
    }

    fn stream_from(&mut self, sender: Sender, begin: Lsn) -> Result<(), FollowError> {
        let begun = sender.client.start_replication(begin, self.tli);
        self.stream = Some(begun.map_err(|source| self.failed(source))?);
        Ok(())
    }

    fn take(
        &mut self,
        wal: &[u8],
        mut on_record: impl FnMut(FollowedRecord<'_>),
    ) -> Result<(), WalError> {
        self.pending.extend_from_slice(wal);
        let (pending, pending_lsn, format) = (&self.pending, self.pending_lsn, self.format);
        let (start_lsn, version) = (self.start_lsn, self.version);
        let mut body = Vec::new();
        let fed = self.decoder.feed_with(wal, |record| {
            if record.start_lsn >= start_lsn {
                read_body(pending, pending_lsn, record, &format, &mut body);
                on_record(FollowedRecord {
                    record: *record,
                    version,
                    body: &body,
                });
            }
        });
        let done = self.decoder.record_end();
        let len = usize::try_from(done - self.pending_lsn).expect("it is in memory");
        self.pending.drain(..len);
        self.pending_lsn = done;
        fed
    }

    fn failed(&self, source: ClientError) -> FollowError {
        FollowError::Client {
            address: self.address().to_owned(),
            source,
        }
    }
}

/// The record's bytes behind its header, out of WAL that begins at `wal_lsn` and has all of it.
fn read_body(wal: &[u8], wal_lsn: Lsn, record: &Record, format: &WalFormat, body: &mut Vec<u8>) {
    body.clear();
    let mut left = record.header.total_len as usize;
    let mut lsn = record.start_lsn;
    while left > 0 {
        let page = lsn.segment_start(PAGE_SIZE);
        if lsn == page {
            lsn = lsn + u64::from(page_header_size(page, format));
        }
        let page_end = page + u64::from(PAGE_SIZE);
        let len = left.min((page_end - lsn) as usize);
        let from = (lsn - wal_lsn) as usize;
        body.extend_from_slice(&wal[from..from + len]);
        left -= len;
        lsn = lsn + len as u64;
    }
    body.drain(..RECORD_HEADER_SIZE as usize);
}

fn greet(config: &FollowerConfig, at: usize) -> Result<Sender, FollowError> {
    let address = &config.addresses[at];
    let lost = |source| FollowError::Client {
        address: address.clone(),
        source,
    };
    let mut client = WalClient::connect(&WalClientConfig {
        address: address.clone(),
        credentials: config.credentials.clone(),
        application_name: config.application_name.clone(),
        cluster: config.cluster.clone(),
        timeout: config.timeout,
    })
    .map_err(lost)?;
    let identity = client.identify_system().map_err(lost)?;
    let segment_size = client.segment_size().map_err(lost)?;
    let row = client.query_row("SHOW server_version_num").map_err(lost)?;
    let version_num = row.into_iter().next().flatten();
    let number = version_num.as_deref().and_then(|text| text.parse().ok());
    let version = number.and_then(PgVersion::from_version_num);
    let version = version.ok_or_else(|| FollowError::Version {
        address: address.clone(),
        version_num: version_num.clone(),
    })?;
    let tli = identity.tli;
    let history = match tli.0 {
        1 => TimelineHistory::root(1),
        _ => {
            let text = client.timeline_history(tli).map_err(lost)?;
            TimelineHistory::parse(tli.0, &text).map_err(|source| FollowError::History {
                address: address.clone(),
                source,
            })?
        }
    };
    Ok(Sender {
        client,
        identity,
        format: WalFormat {
            version,
            segment_size,
            system_id: identity.system_id,
        },
        history,
    })
}

/// The timeline on which `lsn` was written.
fn tli_with(history: &TimelineHistory, lsn: Lsn) -> Tli {
    Tli(history.tli_at(lsn))
}
