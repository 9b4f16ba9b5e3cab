//! What one safekeeper can give of a file.
//!
//! It is asked for its end first, and for the stream only if that lies beyond the segment's begin:
//! a stream that starts where nothing is committed would wait. An offer is made when the first
//! bytes have come, so that a safekeeper that has removed the segment makes none.

use std::time::{Duration, Instant};

use safekeeper_client::wal_client::{
    ClientError, SystemIdentity, WalClient, WalClientConfig, WalEvent, WalStream,
};
use safekeeper_protocol::{Lsn, Tli};
use safekeeper_wal::{TimelineHistory, history_file_name, parse_segment_file_name};

use super::target::{Target, Temporary};

/// WAL that is committed is sent at once; longer without any, and the safekeeper is given up.
const STALL_TIMEOUT: Duration = Duration::from_secs(10);

/// A transfer that is slower than this on the whole is given up, and the next safekeeper asked.
const BYTES_PER_SECOND_MIN: u64 = 1 << 20;

/// "undefined_file": the segment or history file has been removed, or never was.
const UNDEFINED_FILE: &str = "58P01";

#[derive(Clone, Debug)]
pub enum Wanted {
    History(Tli),
    /// Name of a segment, of whatever size.
    Segment(String),
}

#[derive(Clone, Debug)]
pub struct Question {
    pub wanted: Wanted,
    /// Of the data directory that it is for.
    pub system_id: Option<u64>,
}

#[derive(Debug)]
pub enum Answer {
    History(String),
    Segment(SegmentOffer),
    /// It does not have it.
    Absent,
    /// It had it once, and says so.
    Removed(String),
}

/// A segment, whole or in part, whose first bytes are here.
#[derive(Debug)]
pub struct SegmentOffer {
    stream: WalStream,
    first: Vec<u8>,
    begin_lsn: Lsn,
    /// Not beyond the segment's.
    end_lsn: Lsn,
    segment_size: u64,
}

pub fn ask(config: &WalClientConfig, question: &Question) -> Result<Answer, ClientError> {
    let mut client = WalClient::connect(config)?;
    let identity = client.identify_system()?;
    if let Some(expected) = question.system_id
        && expected != identity.system_id
    {
        return Err(ClientError::Protocol(format!(
            "it serves the cluster of system identifier {}, this server's is {expected}",
            identity.system_id
        )));
    }
    match &question.wanted {
        Wanted::History(tli) => ask_history(&mut client, *tli),
        Wanted::Segment(name) => ask_segment(client, name, identity),
    }
}

fn ask_history(client: &mut WalClient, tli: Tli) -> Result<Answer, ClientError> {
    let text = match client.timeline_history(tli) {
        Err(ClientError::Server(said)) if said.sqlstate == UNDEFINED_FILE => {
            return Ok(Answer::Absent);
        }
        other => other?,
    };
    parse_history(tli, &text)?;
    Ok(Answer::History(text))
}

fn parse_history(tli: Tli, text: &str) -> Result<TimelineHistory, ClientError> {
    TimelineHistory::parse(tli.0, text)
        .map_err(|error| ClientError::Protocol(format!("{}: {error}", history_file_name(tli.0))))
}

fn ask_segment(
    mut client: WalClient,
    name: &str,
    identity: SystemIdentity,
) -> Result<Answer, ClientError> {
    let size = client.segment_size()?;
    let Some((tli, segno)) = parse_segment_file_name(name, size) else {
        return Ok(Answer::Absent);
    };
    let segment_size = u64::from(size.bytes());
    let begin_lsn = segno.checked_mul(segment_size).map(Lsn);
    let range = begin_lsn.and_then(|begin| Some((begin, begin.checked_add(segment_size)?)));
    let (Some((begin_lsn, segment_end)), Some(timeline_end)) =
        (range, end_of_timeline(&mut client, Tli(tli), identity)?)
    else {
        return Ok(Answer::Absent);
    };
    let end_lsn = timeline_end.min(segment_end);
    if end_lsn <= begin_lsn {
        return Ok(Answer::Absent);
    }
    let first = client
        .start_replication(begin_lsn, Tli(tli))
        .and_then(|mut stream| {
            let first = next_wal(&mut stream)?;
            Ok((stream, first))
        });
    match first {
        Ok((stream, first)) => Ok(Answer::Segment(SegmentOffer {
            stream,
            first,
            begin_lsn,
            end_lsn,
            segment_size,
        })),
        Err(ClientError::Server(said)) if said.sqlstate == UNDEFINED_FILE => {
            Ok(Answer::Removed(said.message))
        }
        Err(error) => Err(error),
    }
}

/// Where committed WAL of `tli` ends; none if the timeline is none of this safekeeper's.
fn end_of_timeline(
    client: &mut WalClient,
    tli: Tli,
    identity: SystemIdentity,
) -> Result<Option<Lsn>, ClientError> {
    if tli == identity.tli {
        return Ok(Some(identity.end_lsn));
    }
    if tli > identity.tli {
        return Ok(None);
    }
    let history = parse_history(identity.tli, &client.timeline_history(identity.tli)?)?;
    Ok(history
        .switch_point(tli.0)
        .map(|end| end.min(identity.end_lsn)))
}

/// The next WAL, passing over signs of life.
fn next_wal(stream: &mut WalStream) -> Result<Vec<u8>, ClientError> {
    let deadline = Instant::now() + STALL_TIMEOUT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match stream.next_event(left)? {
            Some(WalEvent::Wal { wal, .. }) => return Ok(wal),
            Some(WalEvent::Keepalive {
                reply_requested, ..
            }) => {
                if reply_requested {
                    // We are alive, and hold nothing back.
                    let received = stream.position();
                    stream.report(received, Lsn::INVALID, Lsn::INVALID)?;
                }
            }
            Some(WalEvent::TimelineEnd(end)) => {
                return Err(ClientError::Protocol(format!(
                    "the timeline ends at {}, short of what was offered",
                    end.end_lsn
                )));
            }
            None => return Err(ClientError::TimedOut(STALL_TIMEOUT)),
        }
    }
}

impl SegmentOffer {
    pub fn len(&self) -> u64 {
        self.end_lsn - self.begin_lsn
    }

    pub fn is_whole(&self) -> bool {
        self.len() == self.segment_size
    }

    pub fn bring(self, target: &Target) -> Result<(), String> {
        let temporary = self.receive(target)?;
        temporary.finish().map_err(|error| target.failed(&error))
    }

    /// With zeros behind it. False if `file` beside the target begins with the same bytes.
    pub fn bring_part(self, file: &str, target: &Target) -> Result<bool, String> {
        let segment_size = self.segment_size;
        let mut temporary = self.receive(target)?;
        if temporary.is_beginning_of(file) {
            return Ok(false);
        }
        let filled = temporary.fill_up(segment_size);
        let finished = filled.and_then(|()| temporary.finish());
        finished.map_err(|error| target.failed(&error))?;
        Ok(true)
    }

    fn receive(mut self, target: &Target) -> Result<Temporary<'_>, String> {
        let mut temporary = target.create().map_err(|error| target.failed(&error))?;
        let (mut left, mut wal) = (self.len(), self.first);
        let patience = STALL_TIMEOUT + Duration::from_secs(left / BYTES_PER_SECOND_MIN);
        let deadline = Instant::now() + patience;
        loop {
            // The stream does not know where we want to stop.
            let len = usize::try_from(left).map_or(wal.len(), |left| left.min(wal.len()));
            temporary
                .write(&wal[..len])
                .map_err(|error| target.failed(&error))?;
            left -= len as u64;
            if left == 0 {
                return Ok(temporary);
            }
            if Instant::now() >= deadline {
                return Err(ClientError::TimedOut(patience).to_string());
            }
            wal = next_wal(&mut self.stream).map_err(|error| error.to_string())?;
        }
    }
}
