//! A consumer's side of streaming replication: a client of safekeepers that asks and takes WAL.
//!
//! ```text
//!   here                                     a safekeeper (any WAL sender)
//!     SSLRequest                   ──►                                   as far as sslmode says so
//!     startup packet               ──►
//!                                  ◄──     AuthenticationOk, ReadyForQuery
//!     'Q' IDENTIFY_SYSTEM          ──►
//!                                  ◄──     one row, ReadyForQuery
//!     'Q' START_REPLICATION        ──►
//!                                  ◄──     CopyBothResponse
//!                                  ◄──     'w' WAL, 'k' sign of life      as events, one at a time
//!     'r' write, flush, apply      ──►
//!                                  ◄──     CopyDone, next timeline        if this one has ended
//! ```
//!
//! Calls block, each for as long as its time-out at most (`connect` three times that: for each address, for TLS,
//! for the login), whatever the peer does: what it sends without need (notices, settings) does not give it more
//! time. Every length and number is checked where it enters; WAL that does not go on where the last message
//! ended is an error. After an error of the connection nothing more can be asked.
//!
//! Not here: whether the WAL is sound; what is done with it.

use std::io::{self, IoSlice};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use safekeeper_protocol::{Lsn, Tli};
use safekeeper_wal::SegmentSize;
use safekeeper_wire::channel::Channel;
use safekeeper_wire::credentials::Credentials;
use safekeeper_wire::login::{Login, LoginError, LoginStep};
use safekeeper_wire::pgwire::{ErrorReport, Filled, Input, Output, Wait, closed};
use safekeeper_wire::standby_message::encode_status;
use safekeeper_wire::startup::{cluster_option, encode_startup};
use safekeeper_wire::tls::TlsError;

/// Longest message that is taken, in bytes: a WAL sender cuts WAL into pieces of 128 KiB, and
/// history files are far shorter.
const MESSAGE_LEN_MAX: usize = 1 << 20;

/// Bytes before the WAL in a 'w' message: tag, begin, end, time.
const WAL_HEADER_LEN: usize = 25;
/// A whole 'k' message: tag, end, time, whether a reply is wanted.
const KEEPALIVE_LEN: usize = 18;

/// Whom to ask, and as whom.
#[derive(Clone, Debug)]
pub struct WalClientConfig {
    /// `host:port`.
    pub address: String,
    pub credentials: Credentials,
    pub application_name: String,
    /// Needed where a safekeeper serves several clusters.
    pub cluster: Option<String>,
    /// For each address of the host, for the handshake, and for the answer to each question.
    pub timeout: Duration,
}

/// What the peer said in the form of an error.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerError {
    pub sqlstate: String,
    pub message: String,
    pub detail: String,
}

impl std::fmt::Display for ServerError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)?;
        if !self.detail.is_empty() {
            write!(f, " ({})", self.detail)?;
        }
        Ok(())
    }
}

/// Why there is no answer, or no good one.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("could not translate host name to an address: {0}")]
    Resolve(io::Error),
    #[error("could not connect: {0}")]
    Connect(io::Error),
    #[error("connection lost: {0}")]
    Lost(#[from] io::Error),
    #[error("no answer within {:.1} s", .0.as_secs_f32())]
    TimedOut(Duration),
    /// Bytes that no WAL sender sends.
    #[error("invalid answer: {0}")]
    Protocol(String),
    #[error("{0}")]
    Server(ServerError),
    #[error(transparent)]
    Tls(TlsError),
    #[error(transparent)]
    Login(#[from] LoginError),
}

impl From<ErrorReport> for ClientError {
    fn from(report: ErrorReport) -> ClientError {
        ClientError::Protocol(report.message)
    }
}

fn invalid(what: impl Into<String>) -> ClientError {
    ClientError::Protocol(what.into())
}

type Asked<T> = Result<T, ClientError>;

/// The answer to IDENTIFY_SYSTEM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SystemIdentity {
    pub system_id: u64,
    /// The newest timeline.
    pub tli: Tli,
    /// Where its WAL ends: a safekeeper's commit_lsn.
    pub end_lsn: Lsn,
}

/// Where a timeline that has ended gave way to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimelineEnd {
    pub end_lsn: Lsn,
    pub next_tli: Tli,
}

/// A message of the peer, copied out of the buffer.
struct Message {
    tag: u8,
    body: Vec<u8>,
}

/// A session that waits for a command.
#[derive(Debug)]
pub struct WalClient {
    channel: Channel,
    input: Input,
    output: Output,
    timeout: Duration,
}

impl WalClient {
    pub fn connect(config: &WalClientConfig) -> Asked<WalClient> {
        let socket = dial(&config.address, config.timeout)?;
        socket.set_nodelay(true)?;
        // A peer whose host is gone is noticed by what we report to it.
        let user_timeout = u32::try_from(config.timeout.as_millis()).unwrap_or(u32::MAX);
        rustix::net::sockopt::set_tcp_user_timeout(&socket, user_timeout)
            .map_err(io::Error::from)?;
        let mut client = WalClient {
            channel: socket.into(),
            input: Input::default(),
            output: Output::default(),
            timeout: config.timeout,
        };
        let (host, port) = host_and_port(&config.address);
        let Credentials { tls, .. } = &config.credentials;
        let deadline = client.deadline();
        let encrypted = client.channel.request_tls(tls, host, deadline);
        encrypted.map_err(|error| match error {
            TlsError::Io(error) if error.kind() == io::ErrorKind::TimedOut => {
                ClientError::TimedOut(config.timeout)
            }
            TlsError::Io(error) => ClientError::Lost(error),
            error => ClientError::Tls(error),
        })?;
        let socket = client.channel.socket();
        socket.set_write_timeout(Some(config.timeout))?;
        let end_point = client.channel.peer_end_point();
        let login = config.credentials.login(host, port, end_point);
        client.shake_hands(config, login)?;
        Ok(client)
    }

    fn shake_hands(&mut self, config: &WalClientConfig, mut login: Login) -> Asked<()> {
        let options = config.cluster.as_deref().map(cluster_option);
        let mut parameters = vec![
            ("user", config.credentials.user.as_str()),
            ("application_name", config.application_name.as_str()),
            ("replication", "true"),
        ];
        parameters.extend(options.as_deref().map(|options| ("options", options)));
        let startup = encode_startup(&parameters);
        self.channel.send_all(&mut [IoSlice::new(&startup)])?;
        let deadline = self.deadline();
        loop {
            let message = self.next_message(deadline)?;
            match message.tag {
                b'R' => {
                    if let LoginStep::Answer(answer) = login.on_request(&message.body)? {
                        self.output
                            .message(b'p', |out| out.extend_from_slice(&answer));
                        self.output.send(&mut self.channel)?;
                    }
                }
                // The key that opens nothing; "I don't know that option".
                b'K' | b'v' => {}
                b'Z' => return Ok(login.finish()?),
                tag => return Err(unexpected(tag, "in the handshake")),
            }
        }
    }

    pub fn identify_system(&mut self) -> Asked<SystemIdentity> {
        let row = self.query_row("IDENTIFY_SYSTEM")?;
        Ok(SystemIdentity {
            system_id: number(&row, 0)?,
            tli: Tli(number(&row, 1)?),
            end_lsn: lsn(&row, 2)?,
        })
    }

    /// `SHOW wal_segment_size`.
    pub fn segment_size(&mut self) -> Asked<SegmentSize> {
        let row = self.query_row("SHOW wal_segment_size")?;
        let text = text(&row, 0)?;
        parse_segment_size(text).ok_or_else(|| invalid(format!("wal_segment_size is \"{text}\"")))
    }

    /// The text of a timeline's history file.
    pub fn timeline_history(&mut self, tli: Tli) -> Asked<String> {
        let row = self.query_row(&format!("TIMELINE_HISTORY {tli}"))?;
        text(&row, 1).map(str::to_owned)
    }

    /// Asks for a result of one row; its values as text, none for NULL.
    pub fn query_row(&mut self, command: &str) -> Asked<Vec<Option<String>>> {
        self.send_query(command)?;
        let deadline = self.deadline();
        let (mut row, mut error) = (None, None);
        loop {
            let message = match self.next_message(deadline) {
                // The session goes on; its ReadyForQuery is still to come.
                Err(ClientError::Server(said)) => {
                    error = Some(said);
                    continue;
                }
                // A fatal one closes the connection behind it.
                Err(_) if error.is_some() => break,
                other => other?,
            };
            match message.tag {
                b'T' | b'C' => {}
                b'D' if row.is_none() => row = Some(parse_row(&message.body)?),
                b'D' => return Err(invalid(format!("{command} has more than one row"))),
                b'Z' => break,
                tag => return Err(unexpected(tag, command)),
            }
        }
        match error {
            Some(said) => Err(ClientError::Server(said)),
            None => row.ok_or_else(|| invalid(format!("{command} has no row"))),
        }
    }

    /// WAL of timeline `tli` from `start_lsn` on. A peer that has not got so far lets us wait.
    pub fn start_replication(mut self, start_lsn: Lsn, tli: Tli) -> Asked<WalStream> {
        self.send_query(&format!(
            "START_REPLICATION PHYSICAL {start_lsn} TIMELINE {tli}"
        ))?;
        let deadline = self.deadline();
        let message = self.next_message(deadline)?;
        let ended = match message.tag {
            b'W' => None,
            // Nothing to stream on this timeline, only the next one to tell.
            b'T' => Some(self.read_timeline_end(deadline)?),
            tag => return Err(unexpected(tag, "in answer to START_REPLICATION")),
        };
        Ok(WalStream {
            client: self,
            position: start_lsn,
            ended,
        })
    }

    /// After CopyDone: the row that names the next timeline.
    fn read_timeline_end(&mut self, deadline: Instant) -> Asked<TimelineEnd> {
        let mut end = None;
        loop {
            let message = self.next_message(deadline)?;
            match message.tag {
                b'T' | b'C' => {}
                b'D' => {
                    let row = parse_row(&message.body)?;
                    end = Some(TimelineEnd {
                        next_tli: Tli(number(&row, 0)?),
                        end_lsn: lsn(&row, 1)?,
                    });
                }
                b'Z' => return end.ok_or_else(|| invalid("the stream ended without a reason")),
                tag => return Err(unexpected(tag, "at the end of a stream")),
            }
        }
    }

    fn send_query(&mut self, command: &str) -> Asked<()> {
        self.output.message(b'Q', |out| {
            out.extend_from_slice(command.as_bytes());
            out.push(0);
        });
        Ok(self.output.send(&mut self.channel)?)
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
    }

    /// The next message that says something: an error is returned as one.
    fn next_message(&mut self, deadline: Instant) -> Asked<Message> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ClientError::TimedOut(self.timeout));
            }
            let Some(frame) = self.input.next_frame(MESSAGE_LEN_MAX)? else {
                self.fill(left)?;
                continue;
            };
            match frame.tag {
                b'E' => return Err(ClientError::Server(parse_error(frame.body))),
                b'N' | b'S' => {}
                tag => {
                    let body = frame.body.to_vec();
                    return Ok(Message { tag, body });
                }
            }
        }
    }

    /// Receive once.
    fn fill(&mut self, patience: Duration) -> Asked<()> {
        let socket = self.channel.socket();
        socket.set_read_timeout(Some(patience))?;
        match self.input.fill(&mut self.channel, Wait::Yes)? {
            Filled::Some => Ok(()),
            Filled::Nothing => Err(ClientError::TimedOut(self.timeout)),
            Filled::Closed => Err(closed().into()),
        }
    }
}

/// What a stream brings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WalEvent {
    /// The next bytes; never none.
    Wal { begin_lsn: Lsn, wal: Vec<u8> },
    /// The peer is there. It may want a report.
    Keepalive { end_lsn: Lsn, reply_requested: bool },
    /// All of this timeline has been sent. Nothing follows.
    TimelineEnd(TimelineEnd),
}

/// WAL as it comes.
#[derive(Debug)]
pub struct WalStream {
    client: WalClient,
    /// Where the next WAL begins.
    position: Lsn,
    ended: Option<TimelineEnd>,
}

impl WalStream {
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// None: nothing has come within `patience`.
    pub fn next_event(&mut self, patience: Duration) -> Asked<Option<WalEvent>> {
        if let Some(end) = self.ended {
            return Ok(Some(WalEvent::TimelineEnd(end)));
        }
        let message = match self.client.next_message(Instant::now() + patience) {
            Err(ClientError::TimedOut(_)) => return Ok(None),
            other => other?,
        };
        match message.tag {
            b'd' => self.on_copy_data(message.body).map(Some),
            b'c' => {
                self.client.output.copy_done();
                self.client.output.send(&mut self.client.channel)?;
                let deadline = self.client.deadline();
                let end = self.client.read_timeline_end(deadline)?;
                if end.end_lsn != self.position {
                    let (end_lsn, position) = (end.end_lsn, self.position);
                    return Err(invalid(format!(
                        "the timeline ends at {end_lsn}, WAL was sent up to {position}"
                    )));
                }
                self.ended = Some(end);
                Ok(Some(WalEvent::TimelineEnd(end)))
            }
            tag => Err(unexpected(tag, "in a stream of WAL")),
        }
    }

    fn on_copy_data(&mut self, mut body: Vec<u8>) -> Asked<WalEvent> {
        match body.first() {
            Some(b'w') => {
                let begin_lsn = lsn_at(&body, 1)?;
                if begin_lsn != self.position {
                    let expected = self.position;
                    return Err(invalid(format!(
                        "WAL of {begin_lsn} where that of {expected} was due"
                    )));
                }
                if body.len() <= WAL_HEADER_LEN {
                    return Err(invalid("a message of WAL without any"));
                }
                body.drain(..WAL_HEADER_LEN);
                let end = begin_lsn.checked_add(body.len() as u64);
                self.position = end.ok_or_else(|| invalid("WAL beyond the last position"))?;
                let wal = body;
                Ok(WalEvent::Wal { begin_lsn, wal })
            }
            Some(b'k') if body.len() == KEEPALIVE_LEN => Ok(WalEvent::Keepalive {
                end_lsn: lsn_at(&body, 1)?,
                reply_requested: body[KEEPALIVE_LEN - 1] != 0,
            }),
            _ => Err(invalid(format!(
                "stream message of {} bytes, tag {:?}",
                body.len(),
                body.first()
            ))),
        }
    }

    /// Tells the peer how far the WAL has come here. Must be done now and then, or it takes us for
    /// dead.
    pub fn report(&mut self, write_lsn: Lsn, flush_lsn: Lsn, apply_lsn: Lsn) -> Asked<()> {
        let output = &mut self.client.output;
        output.copy_data(|out| encode_status([write_lsn, flush_lsn, apply_lsn], out));
        Ok(output.send(&mut self.client.channel)?)
    }

    /// The session, for the next command, once the timeline has ended.
    pub fn into_client(self) -> Option<WalClient> {
        self.ended.is_some().then_some(self.client)
    }
}

fn dial(address: &str, timeout: Duration) -> Asked<TcpStream> {
    let mut last_error = io::Error::other("it has no address");
    for address in address.to_socket_addrs().map_err(ClientError::Resolve)? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(socket) => return Ok(socket),
            Err(error) => last_error = error,
        }
    }
    Err(ClientError::Connect(last_error))
}

fn host_and_port(address: &str) -> (&str, u16) {
    let (host, port) = address.rsplit_once(':').unwrap_or((address, ""));
    let host = host.trim_start_matches('[').trim_end_matches(']');
    (host, port.parse().unwrap_or(0))
}

fn unexpected(tag: u8, place: &str) -> ClientError {
    invalid(format!("message 0x{tag:02x} {place}"))
}

fn lsn_at(body: &[u8], at: usize) -> Asked<Lsn> {
    let bytes = body.get(at..).and_then(|rest| rest.first_chunk::<8>());
    let bytes = bytes.ok_or_else(|| invalid("a stream message is cut off"))?;
    Ok(Lsn(u64::from_be_bytes(*bytes)))
}

/// Count, then for each value its length, or -1 for NULL, and its bytes.
fn parse_row(body: &[u8]) -> Asked<Vec<Option<String>>> {
    let cut_off = || invalid("a row is cut off");
    let (count, mut rest) = body.split_first_chunk::<2>().ok_or_else(cut_off)?;
    let mut row = Vec::new();
    for _ in 0..u16::from_be_bytes(*count) {
        let (len, after) = rest.split_first_chunk::<4>().ok_or_else(cut_off)?;
        let Ok(len) = usize::try_from(i32::from_be_bytes(*len)) else {
            row.push(None);
            rest = after;
            continue;
        };
        let (value, after) = after.split_at_checked(len).ok_or_else(cut_off)?;
        let value = String::from_utf8(value.to_vec()).map_err(|_| invalid("a value is no text"))?;
        row.push(Some(value));
        rest = after;
    }
    if rest.is_empty() {
        Ok(row)
    } else {
        Err(invalid("a row goes on behind its last value"))
    }
}

fn text(row: &[Option<String>], at: usize) -> Asked<&str> {
    let value = row.get(at).and_then(Option::as_deref);
    value.ok_or_else(|| invalid(format!("a row has no value {}", at + 1)))
}

fn number<T: std::str::FromStr>(row: &[Option<String>], at: usize) -> Asked<T> {
    let text = text(row, at)?;
    let parsed = text.parse();
    parsed.map_err(|_| invalid(format!("\"{text}\" is not a number that was expected")))
}

fn lsn(row: &[Option<String>], at: usize) -> Asked<Lsn> {
    let text = text(row, at)?;
    let parsed = text.parse();
    parsed.map_err(|_| invalid(format!("\"{text}\" is not a position in the WAL")))
}

/// As `SHOW` prints it: `16MB`, `1GB`.
fn parse_segment_size(text: &str) -> Option<SegmentSize> {
    let (digits, shift) = match text.strip_suffix("GB") {
        Some(digits) => (digits, 30),
        None => (text.strip_suffix("MB")?, 20),
    };
    let bytes = digits.parse::<u32>().ok()?.checked_mul(1 << shift)?;
    SegmentSize::new(bytes).ok()
}

/// Fields of one letter and a text; those that are not told are empty.
fn parse_error(body: &[u8]) -> ServerError {
    let mut error = ServerError::default();
    for field in body.split(|byte| *byte == 0) {
        let Some((code, text)) = field.split_first() else {
            continue;
        };
        // It may end up in a log of one line an event.
        let text = String::from_utf8_lossy(text).replace(char::is_control, " ");
        match code {
            b'C' => error.sqlstate = text,
            b'M' => error.message = text,
            b'D' => error.detail = text,
            _ => {}
        }
    }
    error
}

#[cfg(test)]
#[path = "wal_client/tests.rs"]
mod tests;
