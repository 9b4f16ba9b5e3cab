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
//! Replication slots are not kept yet; a SLOT clause is answered as for one that does not exist.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use safekeeper_client::wal_client::TimelineEnd;
use safekeeper_protocol::{Lsn, Tli};
use safekeeper_wal::PAGE_SIZE;
use safekeeper_wire::pgwire::{ColumnType, ConnectionError, ErrorReport, Filled, Wait, closed};
use safekeeper_wire::standby_message::{
    STANDBY_MESSAGE_LEN_MAX, StandbyMessage, decode_standby_message, invalid_tag, postgres_time,
};

use crate::connection::{Connection, STALL_TIMEOUT};
use crate::consumers::{Attached, ConsumerState};
use crate::keeper::{Keeper, Reader};
use crate::replication_command::ReplicationCommand;

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
        ReplicationCommand::ReadReplicationSlot(_) => {
            // What a primary answers for a slot that does not exist.
            output.one_row(&[
                ("slot_type", ColumnType::Text, None),
                ("restart_lsn", ColumnType::Text, None),
                ("restart_tli", ColumnType::Int8, None),
            ]);
            output.command_complete("READ_REPLICATION_SLOT");
        }
        ReplicationCommand::CreateReplicationSlot => {
            return Err(command_error(
                "0A000",
                "replication slots are not supported by this version of safekeeper",
            ));
        }
        ReplicationCommand::DropReplicationSlot(slot) => return Err(no_such_slot(&slot)),
        ReplicationCommand::StartReplication {
            slot: Some(slot), ..
        } => return Err(no_such_slot(&slot)),
        ReplicationCommand::StartReplication { start_lsn, tli, .. } => {
            return start_replication(connection, keeper, start_lsn, tli);
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

fn no_such_slot(slot: &str) -> ConnectionError {
    command_error(
        "42704",
        format!("replication slot \"{slot}\" does not exist"),
    )
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
        reader: keeper.reader(),
        tli,
        end,
        sent_lsn: start_lsn,
        wal: Vec::new(),
        may_have_replied: true,
        last_heard: Instant::now(),
        reply_requested: false,
        sending: true,
        receiving: true,
    };
    connection.output.copy_both();
    connection.send()?;
    let timeout = connection.shared.config.wal_sender_timeout;
    connection.socket.set_write_timeout(timeout)?;
    let ended = sender.stream(connection);
    // Last words wait no longer for a full socket than WAL did.
    let patience = match &ended {
        Ok(()) => STALL_TIMEOUT,
        Err(_) => timeout.map_or(STALL_TIMEOUT, |timeout| timeout.min(STALL_TIMEOUT)),
    };
    connection.socket.set_write_timeout(Some(patience))?;
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
    reader: Reader,
    tli: Tli,
    /// Where the timeline being streamed ends; none while it is the newest.
    end: Option<TimelineEnd>,
    sent_lsn: Lsn,
    /// What WAL is sent from, as long as the longest message. Given back when nothing has come for so long
    /// that it is time for a sign of life.
    wal: Vec<u8>,
    /// The consumer may have said something since its replies were last taken.
    may_have_replied: bool,
    last_heard: Instant,
    /// It has been asked for a sign of life since it was last heard.
    reply_requested: bool,
    /// No CopyDone from us yet.
    sending: bool,
    /// No CopyDone from the consumer yet.
    receiving: bool,
}

impl Sender<'_> {
    /// Until both sides have said CopyDone.
    fn stream(&mut self, connection: &mut Connection) -> Result<(), ConnectionError> {
        while self.sending || self.receiving {
            if self.may_have_replied {
                self.take_replies(connection)?;
            }
            let caught_up = self.send_some(connection)?;
            self.look_after_time(connection)?;
            connection.send()?;
            self.may_have_replied = true;
            if caught_up && (self.sending || self.receiving) {
                self.sleep(connection)?;
            }
        }
        Ok(())
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
        let end_lsn = send_end(self.sent_lsn, limit);
        self.send_wal(connection, end_lsn, limit)?;
        Ok(end_lsn == commit_lsn)
    }

    fn send_wal(
        &mut self,
        connection: &mut Connection,
        end_lsn: Lsn,
        limit: Lsn,
    ) -> Result<(), ConnectionError> {
        let begin = self.sent_lsn;
        let len = usize::try_from(end_lsn - begin).expect("a message's worth");
        if self.wal.len() < len {
            self.wal.resize(len, 0);
        }
        let wal = &mut self.wal[..len];
        self.keeper.read_committed(&mut self.reader, begin, wal)?;
        connection.output.copy_data_begin(len, |out| {
            out.push(b'w');
            out.extend_from_slice(&begin.0.to_be_bytes());
            out.extend_from_slice(&limit.0.to_be_bytes());
            out.extend_from_slice(&postgres_time().to_be_bytes());
        });
        connection.send_with(wal)?;
        self.keeper.metrics.sent_wal_bytes.inc_by(len as u64);
        self.sent_lsn = end_lsn;
        self.attached.update(|p| {
            p.sent_lsn = end_lsn;
            if end_lsn == limit {
                p.state = ConsumerState::Streaming;
            }
        });
        Ok(())
    }

    /// Everything the consumer has said, without waiting.
    fn take_replies(&mut self, connection: &mut Connection) -> Result<(), ConnectionError> {
        while self.receiving {
            let next = connection.input.next_frame(STANDBY_MESSAGE_LEN_MAX);
            let Some(frame) = next.map_err(ConnectionError::Fatal)? else {
                match connection.input.fill(&connection.socket, Wait::No)? {
                    Filled::Some => continue,
                    Filled::Nothing => return Ok(()),
                    Filled::Closed => return Err(closed().into()),
                }
            };
            self.last_heard = Instant::now();
            self.reply_requested = false;
            let wants_answer = match frame.tag {
                b'd' => self.on_reply(frame.body)?,
                b'c' => {
                    self.receiving = false;
                    if self.sending {
                        self.sending = false;
                        connection.output.copy_done();
                    }
                    false
                }
                b'X' => return Err(closed().into()),
                tag => return Err(ConnectionError::Fatal(invalid_tag(tag))),
            };
            if wants_answer {
                self.keepalive(connection, false);
            }
        }
        Ok(())
    }

    /// A standby's report. True if it wants an answer.
    fn on_reply(&mut self, body: &[u8]) -> Result<bool, ConnectionError> {
        match decode_standby_message(body).map_err(ConnectionError::Fatal)? {
            StandbyMessage::Status {
                write_lsn,
                flush_lsn,
                apply_lsn,
                reply_requested,
            } => {
                // A position beyond what was sent is no report of ours to rely on.
                let known = |lsn: Lsn| lsn.min(self.sent_lsn);
                self.attached.report(|p| {
                    p.write_lsn = known(write_lsn);
                    p.flush_lsn = known(flush_lsn);
                    p.apply_lsn = known(apply_lsn);
                });
                Ok(reply_requested)
            }
            StandbyMessage::Feedback { xmin, catalog_xmin } => {
                self.attached.report(|p| {
                    p.xmin = xmin;
                    p.catalog_xmin = catalog_xmin;
                });
                Ok(false)
            }
        }
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
                PollFd::from_borrowed_fd(connection.socket.as_fd(), PollFlags::IN),
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
