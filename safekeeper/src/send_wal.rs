//! A consumer's connection: what a WAL sender answers (`replication/walsender.c`).
//!
//! ```text
//!   consumer                               here
//!     START_REPLICATION 0/3000000  ──►
//!                                  ◄──     CopyBothResponse
//!                                  ◄──     'w' begin, end, time, WAL     as fast as it is taken
//!     'r' write, flush, apply      ──►
//!     'h' xmin                     ──►
//!                                  ◄──     'k' end, time, reply?         when it is silent
//!     CopyDone                     ──►                                   either side may end it
//!                                  ◄──     CopyDone
//!                                  ◄──     next timeline, if this one has ended
//!                                  ◄──     CommandComplete
//! ```
//!
//! Sent is committed WAL, `sent_lsn <= commit_lsn`, and never a byte more. The thread reads the
//! published commit_lsn and the files; it never takes the keeper. It sleeps in poll(2), on its
//! socket and on the wake-up of consumers.rs, so both a message and new WAL are dealt with at once.
//!
//! A 'w' message ends at a page boundary unless it ends where committed WAL ends: a standby that
//! is told of a record in two pieces off a boundary may take it for a damaged one.
//!
//! A consumer that starts ahead of commit_lsn waits. A primary would refuse it, but here commit_lsn
//! is persisted lazily and a safekeeper may lag, so it is no fault of the consumer's.
//!
//! A consumer that takes nothing holds one message and its thread, which waits in send(2), for as long as
//! wal_sender_timeout; then it is dropped.
//!
//! A timeline is shown only once commit_lsn is beyond its begin: a standby that followed an
//! earlier sign of it might follow a promotion that dies.
//!
//! WAL that has been removed here is relayed from a peer that still has it (relay.rs).
//!
//! A consumer with a slot moves it by its reports (slots.rs). When the slot is lost, because its WAL
//! was more than may be kept, the stream ends as a primary ends it: by a signal, it seems.

use std::ops::Range;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use safekeeper_client::wal_client::TimelineEnd;
use safekeeper_protocol::{Lsn, Tli};
use safekeeper_wal::PAGE_SIZE;
use safekeeper_wire::pgwire::{
    ColumnType, ConnectionError, ErrorReport, Filled, Output, Wait, closed,
};
use safekeeper_wire::standby_message::{
    STANDBY_MESSAGE_LEN_MAX, StandbyMessage, decode_standby_message, invalid_tag, postgres_time,
};

use crate::config::PEERS_USER;
use crate::connection::{Connection, STALL_TIMEOUT};
use crate::consumers::{Attached, ConsumerState};
use crate::keeper::{Keeper, Reader};
use crate::relay::{self, Relay};
use crate::replication_command::{ReplicationCommand, not_a_command};
use crate::slots::{Acquired, Holder, SlotLimit};

/// Reports of a consumer that are taken before it is sent the next WAL: more than one that means it has said.
const REPLIES_PER_TURN: usize = 64;

/// Most WAL in one message, in bytes (`MAX_SEND_SIZE`): sixteen pages.
const SEND_LEN_MAX: u64 = 16 * PAGE_SIZE as u64;

/// Any command but START_WAL_PUSH.
pub fn run_command(
    connection: &mut Connection,
    keeper: &Keeper,
    command: ReplicationCommand,
) -> Result<(), ConnectionError> {
    let output = &mut connection.output;
    match command {
        ReplicationCommand::IdentifySystem => {
            let commit_lsn = keeper.commit_lsn();
            let system_id = keeper.cluster().system_id.to_string();
            let tli = keeper.view().newest_tli(commit_lsn).to_string();
            // It became wider in 16; as text it is the same.
            let tli_type = match keeper.cluster().pg_major {
                ..16 => ColumnType::Int4,
                _ => ColumnType::Int8,
            };
            output.one_row(&[
                ("systemid", ColumnType::Text, Some(system_id.as_bytes())),
                ("timeline", tli_type, Some(tli.as_bytes())),
                (
                    "xlogpos",
                    ColumnType::Text,
                    Some(commit_lsn.to_string().as_bytes()),
                ),
                ("dbname", ColumnType::Text, None),
            ]);
            output.command_complete("IDENTIFY_SYSTEM");
        }
        ReplicationCommand::Show(name) => {
            let value = setting(keeper, &name).ok_or_else(|| {
                command_error(
                    "42704",
                    format!("unrecognized configuration parameter \"{name}\""),
                )
            })?;
            output.one_row(&[(&name, ColumnType::Text, Some(value.as_bytes()))]);
            output.command_complete("SHOW");
        }
        ReplicationCommand::TimelineHistory(tli) => {
            let view = keeper.view();
            let newest = view.newest_tli(keeper.commit_lsn());
            let file = view.shown_timeline_file(tli, newest);
            let name = safekeeper_wal::history_file_name(tli.0);
            let file = file.ok_or_else(|| {
                command_error(
                    "58P01",
                    format!("could not open file \"pg_wal/{name}\": No such file or directory"),
                )
            })?;
            output.one_row(&[
                ("filename", ColumnType::Text, Some(name.as_bytes())),
                ("content", ColumnType::Text, Some(&file.content)),
            ]);
            output.command_complete("TIMELINE_HISTORY");
        }
        ReplicationCommand::ReadReplicationSlot(slot) => read_slot(output, keeper, &slot)?,
        ReplicationCommand::CreateReplicationSlot {
            slot,
            temporary,
            reserve_wal,
        } => create_slot(connection, keeper, &slot, temporary, reserve_wal)?,
        ReplicationCommand::DropReplicationSlot { slot, wait } => {
            let id = connection.id();
            let is_there = || connection.is_peer_there();
            let dropped = keeper.slots.drop_slot(&slot, id, wait, is_there);
            dropped.map_err(ConnectionError::Command)?;
            keeper.consumers.gather_feedback();
            log::info!(
                "replication slot dropped slot={slot} cluster={}",
                keeper.cluster().name
            );
            connection.output.command_complete("DROP_REPLICATION_SLOT");
        }
        ReplicationCommand::AlterReplicationSlot(slot) => return Err(alter_slot(keeper, &slot)),
        ReplicationCommand::StartReplication {
            slot,
            start_lsn,
            tli,
        } => {
            let holder = holder(connection);
            let acquire = |slot: &String| keeper.slots.acquire(slot, &holder);
            let slot = slot.as_ref().map(acquire).transpose();
            let slot = slot.map_err(ConnectionError::Command)?;
            return start_replication(connection, keeper, slot, start_lsn, tli);
        }
        ReplicationCommand::StartWalPush => {
            unreachable!("dealt with by the caller")
        }
    }
    Ok(())
}

fn command_error(sqlstate: &'static str, message: impl Into<String>) -> ConnectionError {
    ConnectionError::Command(ErrorReport::new(sqlstate, message))
}

/// NULLs for a slot that does not exist, and where nothing is reserved.
fn read_slot(output: &mut Output, keeper: &Keeper, slot: &str) -> Result<(), ConnectionError> {
    let found = keeper.slots.read(slot).map_err(ConnectionError::Command)?;
    let restart_lsn = found.and_then(|slot| slot.restart_lsn);
    let tli = restart_lsn.map(|lsn| {
        let tli = keeper.view().tli_of(lsn, keeper.commit_lsn());
        tli.to_string()
    });
    let restart_lsn = restart_lsn.map(|lsn| lsn.to_string());
    let bytes = |text: &'static str| found.map(|_| text.as_bytes());
    output.one_row(&[
        ("slot_type", ColumnType::Text, bytes("physical")),
        (
            "restart_lsn",
            ColumnType::Text,
            restart_lsn.as_deref().map(str::as_bytes),
        ),
        (
            "restart_tli",
            ColumnType::Int8,
            tli.as_deref().map(str::as_bytes),
        ),
    ]);
    output.command_complete("READ_REPLICATION_SLOT");
    Ok(())
}

fn create_slot(
    connection: &mut Connection,
    keeper: &Keeper,
    slot: &str,
    temporary: bool,
    reserve_wal: bool,
) -> Result<(), ConnectionError> {
    let limit = SlotLimit {
        max: connection.shared.config.max_replication_slots,
        pg_major: keeper.cluster().pg_major,
    };
    let restart_lsn = reserve_wal.then(|| keeper.reservable_lsn());
    keeper
        .slots
        .create(slot, &holder(connection), temporary, restart_lsn, limit)
        .map_err(ConnectionError::Command)?;
    log::info!(
        "replication slot made slot={slot} temporary={temporary} cluster={} restart_lsn={} from={}",
        keeper.cluster().name,
        restart_lsn.unwrap_or(Lsn::INVALID),
        connection.peer()
    );
    // A physical slot has no point that is consistent, and the same 0/0 on a primary.
    connection.output.one_row(&[
        ("slot_name", ColumnType::Text, Some(slot.as_bytes())),
        ("consistent_point", ColumnType::Text, Some(b"0/0")),
        ("snapshot_name", ColumnType::Text, None),
        ("output_plugin", ColumnType::Text, None),
    ]);
    connection
        .output
        .command_complete("CREATE_REPLICATION_SLOT");
    Ok(())
}

/// There are no logical slots here, and before 17 there was no such command.
fn alter_slot(keeper: &Keeper, slot: &str) -> ConnectionError {
    if keeper.cluster().pg_major < 17 {
        return ConnectionError::Command(not_a_command());
    }
    match keeper.slots.read(slot) {
        Err(report) => ConnectionError::Command(report),
        Ok(None) => command_error(
            "42704",
            format!("replication slot \"{slot}\" does not exist"),
        ),
        Ok(Some(_)) => command_error(
            "0A000",
            "cannot use ALTER_REPLICATION_SLOT with a physical replication slot",
        ),
    }
}

fn holder(connection: &Connection) -> Holder {
    Holder {
        connection_id: connection.id(),
        description: format!(
            "{} at {}",
            connection.startup.application_name,
            connection.peer()
        ),
    }
}

/// The settings that consumers ask for, as a primary would show them.
fn setting(keeper: &Keeper, name: &str) -> Option<String> {
    let cluster = keeper.cluster();
    Some(match name {
        "wal_segment_size" => {
            let mib = cluster.segment_size >> 20;
            if mib.is_multiple_of(1024) {
                format!("{}GB", mib >> 10)
            } else {
                format!("{mib}MB")
            }
        }
        "wal_level" => "replica".into(),
        "TimeZone" | "timezone" => "UTC".into(),
        "data_directory_mode" => "0700".into(),
        "server_version" => format!("{}.0", cluster.pg_major),
        "server_version_num" => format!("{}0000", cluster.pg_major),
        "wal_block_size" | "block_size" => PAGE_SIZE.to_string(),
        "in_hot_standby" | "is_superuser" => "off".into(),
        "integer_datetimes" | "standard_conforming_strings" => "on".into(),
        "server_encoding" | "client_encoding" => "UTF8".into(),
        _ => return None,
    })
}

fn start_replication(
    connection: &mut Connection,
    keeper: &Keeper,
    slot: Option<Acquired<'_>>,
    start_lsn: Lsn,
    tli: Option<Tli>,
) -> Result<(), ConnectionError> {
    let commit_lsn = keeper.commit_lsn();
    let view = keeper.view();
    let tli = tli.unwrap_or(view.newest_tli(commit_lsn));
    let end = view
        .end_of_timeline(tli, commit_lsn)
        .map_err(ConnectionError::Command)?;
    if let Some(end) = end {
        if end.end_lsn < start_lsn {
            return Err(ConnectionError::Command(
                ErrorReport::new(
                    "XX000",
                    format!(
                        "requested starting point {start_lsn} on timeline {tli} is not in this \
                         server's history"
                    ),
                )
                .detail(format!(
                    "This server's history forked from timeline {tli} at {}.",
                    end.end_lsn
                )),
            ));
        }
        if end.end_lsn == start_lsn {
            // Nothing to stream, only the next timeline to tell.
            finish(connection, Some(end));
            return Ok(());
        }
    }
    let attached = keeper.consumers.attach(
        &connection.startup.application_name,
        connection.peer(),
        start_lsn,
    )?;
    log::info!(
        "streaming started from={} application_name={} cluster={} tli={tli} start_lsn={start_lsn}",
        connection.peer(),
        connection.startup.application_name,
        keeper.cluster().name
    );
    let mut sender = Sender {
        keeper,
        attached,
        slot,
        reader: keeper.reader(),
        relay: None,
        tried_peers: Vec::new(),
        tli,
        end,
        sent_lsn: start_lsn,
        wal: Vec::new(),
        may_have_replied: true,
        has_more_replies: false,
        last_heard: Instant::now(),
        reply_requested: false,
        sending: true,
        receiving: true,
    };
    connection.output.copy_both();
    connection.send()?;
    let timeout = connection.shared.config.wal_sender_timeout;
    connection.channel.socket().set_write_timeout(timeout)?;
    let ended = sender.stream(connection);
    // Last words wait no longer for a full socket than WAL did.
    let patience = match &ended {
        Ok(()) => STALL_TIMEOUT,
        Err(_) => timeout.map_or(STALL_TIMEOUT, |timeout| timeout.min(STALL_TIMEOUT)),
    };
    connection
        .channel
        .socket()
        .set_write_timeout(Some(patience))?;
    log::info!(
        "streaming ended from={} application_name={} cluster={} tli={tli} sent_lsn={}",
        connection.peer(),
        connection.startup.application_name,
        keeper.cluster().name,
        sender.sent_lsn
    );
    if let Err(ConnectionError::Lost(error)) = &ended
        && error.kind() == std::io::ErrorKind::WouldBlock
    {
        // There is no room for last words to whoever takes none.
        log::warn!(
            "{} (it takes nothing) from={} application_name={}",
            timed_out().message,
            connection.peer(),
            connection.startup.application_name
        );
    }
    ended?;
    let end = sender.end;
    finish(connection, end);
    Ok(())
}

fn timed_out() -> ErrorReport {
    ErrorReport::new(
        "08006",
        "terminating walsender process due to replication timeout",
    )
}

/// The command is over: which timeline comes next, and two completions. The second says nothing
/// new, but `libpqrcv_endstreaming` waits for it.
fn finish(connection: &mut Connection, end: Option<TimelineEnd>) {
    let output = &mut connection.output;
    if let Some(end) = end {
        let (tli, start) = (end.next_tli.to_string(), end.end_lsn.to_string());
        output.one_row(&[
            ("next_tli", ColumnType::Int8, Some(tli.as_bytes())),
            (
                "next_tli_startpos",
                ColumnType::Text,
                Some(start.as_bytes()),
            ),
        ]);
    }
    output.command_complete("START_STREAMING");
    output.command_complete("START_REPLICATION");
}

/// One consumer's stream.
struct Sender<'a> {
    keeper: &'a Keeper,
    attached: Attached<'a>,
    slot: Option<Acquired<'a>>,
    reader: Reader,
    /// Where WAL comes from that is not here any more.
    relay: Option<Relay>,
    /// Those who were asked for such WAL.
    tried_peers: Vec<String>,
    tli: Tli,
    /// Where the timeline being streamed ends; none while it is the newest.
    end: Option<TimelineEnd>,
    sent_lsn: Lsn,
    /// What WAL is sent from, as long as the longest message. Given back when nothing has come for so long
    /// that it is time for a sign of life.
    wal: Vec<u8>,
    /// The consumer may have said something since its replies were last taken.
    may_have_replied: bool,
    /// It has, and not all of that was taken.
    has_more_replies: bool,
    last_heard: Instant,
    /// It has been asked for a sign of life since it was last heard.
    reply_requested: bool,
    /// No CopyDone from us yet.
    sending: bool,
    /// No CopyDone from the consumer yet.
    receiving: bool,
}

/// What reports that were taken together come to.
#[derive(Default)]
struct Report {
    /// The primary is to hear of them.
    is_news: bool,
    wants_answer: bool,
}

impl Sender<'_> {
    /// Until both sides have said CopyDone.
    fn stream(&mut self, connection: &mut Connection) -> Result<(), ConnectionError> {
        while self.sending || self.receiving {
            if self.may_have_replied {
                self.take_replies(connection)?;
            }
            let sent = self.send_some(connection);
            // When its WAL has just been removed, this comes first.
            self.look_after_slot()?;
            let caught_up = sent?;
            self.look_after_time(connection)?;
            connection.send()?;
            self.may_have_replied = true;
            if caught_up && !self.has_more_replies && (self.sending || self.receiving) {
                self.sleep(connection)?;
            }
        }
        Ok(())
    }

    /// Whoever lost its slot has lost its WAL, soon if not yet.
    fn look_after_slot(&self) -> Result<(), ConnectionError> {
        match &self.slot {
            Some(slot) if slot.is_lost() => Err(ConnectionError::Fatal(ErrorReport::new(
                "57P01",
                "terminating connection due to administrator command",
            ))),
            _ => Ok(()),
        }
    }

    /// The next message of WAL, if there is any to send. True if there is no more for now.
    fn send_some(&mut self, connection: &mut Connection) -> Result<bool, ConnectionError> {
        if !self.sending {
            return Ok(true);
        }
        let commit_lsn = self.keeper.commit_lsn();
        if self.end.is_none() {
            let view = self.keeper.view();
            self.end = view
                .end_of_timeline(self.tli, commit_lsn)
                .map_err(ConnectionError::Fatal)?;
        }
        let limit = match self.end {
            Some(end) if self.sent_lsn >= end.end_lsn => {
                connection.output.copy_done();
                self.sending = false;
                return Ok(true);
            }
            Some(end) => end.end_lsn.min(commit_lsn),
            None => commit_lsn,
        };
        if limit <= self.sent_lsn {
            self.attached.update(|p| p.state = ConsumerState::Streaming);
            return Ok(true);
        }
        let oldest_lsn = self.keeper.oldest_lsn();
        if self.sent_lsn < oldest_lsn && self.relay_some(connection, oldest_lsn, limit)? {
            return Ok(false);
        }
        let end_lsn = send_end(self.sent_lsn, limit);
        self.send_wal(connection, end_lsn, limit)?;
        Ok(end_lsn == commit_lsn)
    }

    /// The same with WAL that only a peer has, up to where the own begins. False if none has it.
    fn relay_some(
        &mut self,
        connection: &mut Connection,
        oldest_lsn: Lsn,
        limit: Lsn,
    ) -> Result<bool, ConnectionError> {
        let range = self.sent_lsn..limit.min(oldest_lsn);
        let relay = self.relay.take().or_else(|| {
            let relays = relay::is_relayed(&connection.startup.application_name);
            relays.then(|| {
                let credentials = connection
                    .shared
                    .config
                    .peers
                    .credentials(|| PEERS_USER.to_owned());
                let tried = &mut self.tried_peers;
                Relay::open(self.keeper, &credentials, self.tli, &range, tried)
            })?
        });
        let Some(mut relay) = relay else {
            return Ok(false);
        };
        match relayed_end(&relay.range(), range.end) {
            Some(end_lsn) => {
                let wal = relay.take(end_lsn);
                self.keeper
                    .metrics
                    .relayed_wal_bytes
                    .inc_by(wal.len() as u64);
                connection.output.copy_data(|out| {
                    put_wal_header(range.start, limit, out);
                    out.extend_from_slice(&wal);
                });
                self.note_sent(end_lsn, limit);
            }
            // The next one is asked for the rest.
            None if !relay.wait_for_more() => return Ok(true),
            None => {}
        }
        self.relay = Some(relay);
        Ok(true)
    }

    fn send_wal(
        &mut self,
        connection: &mut Connection,
        end_lsn: Lsn,
        limit: Lsn,
    ) -> Result<(), ConnectionError> {
        (self.relay, self.tried_peers) = (None, Vec::new());
        let begin = self.sent_lsn;
        let len = usize::try_from(end_lsn - begin).expect("a message's worth");
        if self.wal.len() < len {
            self.wal.resize(len, 0);
        }
        let wal = &mut self.wal[..len];
        self.keeper.read_committed(&mut self.reader, begin, wal)?;
        connection
            .output
            .copy_data_begin(len, |out| put_wal_header(begin, limit, out));
        connection.send_with(wal)?;
        self.note_sent(end_lsn, limit);
        Ok(())
    }

    fn note_sent(&mut self, end_lsn: Lsn, limit: Lsn) {
        let len = end_lsn - self.sent_lsn;
        self.keeper.metrics.sent_wal_bytes.inc_by(len);
        self.sent_lsn = end_lsn;
        self.attached.update(|p| {
            p.sent_lsn = end_lsn;
            if end_lsn == limit {
                p.state = ConsumerState::Streaming;
            }
        });
    }

    /// What the consumer has said, without waiting; of much only the beginning. Several wishes for an answer have
    /// one. So however fast it speaks, it costs no memory, and others little time.
    fn take_replies(&mut self, connection: &mut Connection) -> Result<(), ConnectionError> {
        let (mut taken, mut report) = (0, Report::default());
        while self.receiving && taken < REPLIES_PER_TURN {
            let next = connection.input.next_frame(STANDBY_MESSAGE_LEN_MAX);
            let Some(frame) = next.map_err(ConnectionError::Fatal)? else {
                match connection.input.fill(&mut connection.channel, Wait::No)? {
                    Filled::Some => continue,
                    Filled::Nothing => break,
                    Filled::Closed => return Err(closed().into()),
                }
            };
            taken += 1;
            self.last_heard = Instant::now();
            self.reply_requested = false;
            match frame.tag {
                b'd' => self.on_reply(frame.body, &mut report)?,
                b'c' => self.receiving = false,
                b'X' => return Err(closed().into()),
                tag => return Err(ConnectionError::Fatal(invalid_tag(tag))),
            }
        }
        self.has_more_replies = self.receiving && taken == REPLIES_PER_TURN;
        if report.is_news {
            self.keeper.consumers.gather_feedback();
        }
        if report.wants_answer && self.sending {
            self.keepalive(connection, false);
        }
        if self.sending && !self.receiving {
            self.sending = false;
            connection.output.copy_done();
        }
        Ok(())
    }

    /// A standby's report.
    fn on_reply(&mut self, body: &[u8], report: &mut Report) -> Result<(), ConnectionError> {
        match decode_standby_message(body).map_err(ConnectionError::Fatal)? {
            StandbyMessage::Status {
                write_lsn,
                flush_lsn,
                apply_lsn,
                reply_requested,
            } => {
                // A position beyond what was sent is no report of ours to rely on.
                let known = |lsn: Lsn| lsn.min(self.sent_lsn);
                // First: what the slot does not keep yet, the connection still does.
                if let Some(slot) = &self.slot {
                    slot.flushed(known(flush_lsn));
                }
                report.is_news |= self.attached.update(|p| {
                    p.write_lsn = known(write_lsn);
                    p.flush_lsn = known(flush_lsn);
                    p.apply_lsn = known(apply_lsn);
                });
                report.wants_answer |= reply_requested;
            }
            StandbyMessage::Feedback { xmin, catalog_xmin } => {
                if let Some(slot) = &self.slot {
                    report.is_news |= slot.needs_transactions(xmin, catalog_xmin);
                }
                report.is_news |= self.attached.update(|p| {
                    p.xmin = xmin;
                    p.catalog_xmin = catalog_xmin;
                });
            }
        }
        Ok(())
    }

    /// Ask a consumer that has been silent for half the timeout; drop it after the whole.
    fn look_after_time(&mut self, connection: &mut Connection) -> Result<(), ConnectionError> {
        let Some(timeout) = connection.shared.config.wal_sender_timeout else {
            return Ok(());
        };
        if self.last_heard.elapsed() >= timeout {
            // It may have spoken while we waited for it to take what we sent.
            self.take_replies(connection)?;
        }
        let silence = self.last_heard.elapsed();
        if silence >= timeout {
            return Err(ConnectionError::Fatal(timed_out()));
        }
        if silence >= timeout / 2 && !self.reply_requested {
            self.reply_requested = true;
            self.keepalive(connection, true);
        }
        Ok(())
    }

    fn keepalive(&self, connection: &mut Connection, reply_requested: bool) {
        // It may have started ahead of what is committed here.
        let end_lsn = self.sent_lsn.min(self.keeper.commit_lsn());
        connection.output.copy_data(|out| {
            out.push(b'k');
            out.extend_from_slice(&end_lsn.0.to_be_bytes());
            out.extend_from_slice(&postgres_time().to_be_bytes());
            out.push(u8::from(reply_requested));
        });
    }

    /// Until the consumer speaks, commit_lsn moves, or it is time for a sign of life.
    fn sleep(&mut self, connection: &Connection) -> Result<(), ConnectionError> {
        self.attached.fall_asleep();
        let has_news = self.sending && self.keeper.commit_lsn() > self.sent_lsn;
        if !has_news {
            let timeout = connection.shared.config.wal_sender_timeout.map(|timeout| {
                let due = if self.reply_requested {
                    timeout
                } else {
                    timeout / 2
                };
                let left = due.saturating_sub(self.last_heard.elapsed());
                Timespec::try_from(left + Duration::from_millis(1)).unwrap_or(Timespec {
                    tv_sec: 60,
                    tv_nsec: 0,
                })
            });
            let mut fds = [
                PollFd::from_borrowed_fd(connection.channel.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.attached.wake_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => self.wal = Vec::new(),
                Ok(_) => self.may_have_replied = !fds[0].revents().is_empty(),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(std::io::Error::from(errno).into()),
            }
        }
        self.attached.awake();
        Ok(())
    }
}

fn put_wal_header(begin: Lsn, known_end: Lsn, out: &mut Vec<u8>) {
    out.push(b'w');
    out.extend_from_slice(&begin.0.to_be_bytes());
    out.extend_from_slice(&known_end.0.to_be_bytes());
    out.extend_from_slice(&postgres_time().to_be_bytes());
}

/// How far WAL of a peer can be sent of which `here` has come, if all up to `end` is wanted: as own WAL is,
/// and to a page boundary while there is more to come. None: not at all yet.
fn relayed_end(here: &Range<Lsn>, end: Lsn) -> Option<Lsn> {
    let limit = match here.end < end {
        true => here.end.segment_start(PAGE_SIZE),
        false => end,
    };
    (limit > here.start).then(|| send_end(here.start, limit))
}

/// Where a message that begins at `begin` ends, if WAL up to `limit` may be sent: there, or at the
/// last page boundary that is not too far.
fn send_end(begin: Lsn, limit: Lsn) -> Lsn {
    match begin.checked_add(SEND_LEN_MAX) {
        Some(far) if far < limit => far.segment_start(PAGE_SIZE),
        _ => limit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_peer_sends_is_passed_on_by_pages() {
        for (begin, here, end, sent) in [
            (0, 100, 1000, None),
            (0, 8191, 100_000, None),
            (0, 8192, 100_000, Some(8192)),
            (8000, 8192 + 50, 100_000, Some(8192)),
            (8192, 8192 + 50, 100_000, None),
            (0, 100_000, 8192, Some(8192)),
            (0, 1000, 1000, Some(1000)),
            (1000, 1000, 1000, None),
            (0, 10 * SEND_LEN_MAX, 10 * SEND_LEN_MAX, Some(SEND_LEN_MAX)),
        ] {
            let found = relayed_end(&(Lsn(begin)..Lsn(here)), Lsn(end));
            assert_eq!(found, sent.map(Lsn), "{begin}..{here} of {end}");
        }
    }

    #[test]
    fn messages_end_at_pages_unless_at_the_end() {
        let max = SEND_LEN_MAX;
        for (begin, limit, end) in [
            (0, 100, 100),
            (0, max, max),
            (0, max + 1, max),
            (100, max + 100, max + 100),
            (100, max + 101, max),
            (8192, 10 * max, 8192 + max),
            (u64::MAX - 10, u64::MAX, u64::MAX),
        ] {
            assert_eq!(
                send_end(Lsn(begin), Lsn(limit)),
                Lsn(end),
                "{begin}..{limit}"
            );
        }
    }
}
