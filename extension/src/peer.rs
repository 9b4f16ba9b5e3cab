//! One safekeeper's connection and pipeline.
//!
//! ```text
//!             due                    connected
//!   Down ───────────► Dialling ────────────────────► Up
//!    ▲                   │ failed                     │ error, or told to
//!    └───────────────────┴────────────────────────────┘
//!       and again after a pause that doubles, up to two seconds, or half of one where nobody listens
//! ```
//!
//! The socket does not block; the worker's loop says when it can be read and written. Nothing is
//! kept here that can be read again: what a hanging member has not taken is at most one message
//! with WAL and a few small ones, and the proposer is asked for the next only when that is gone.
//!
//! What messages mean is not known here, nor where WAL comes from.

use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError};
use safekeeper_protocol::codec::{
    DecodeError, decode_acceptor_message, encode_append, encode_proposer_message,
};
use safekeeper_protocol::{AcceptorMessage, Append, ProposerMessage};

use safekeeper_wire::channel::Channel;

use crate::connect::{Connected, Dial, Dialled, connect_in_background};
use crate::pgwire::{Inbox, Outbox, WireError};
use crate::threads::Waker;

/// Pause after the first failure. A safekeeper that restarts is back within a second.
const PAUSE_MS_MIN: u64 = 100;
/// What a host that is away or a handshake that fails costs is bounded by it.
const PAUSE_MS_MAX: u64 = 2000;
/// While a host says that nobody listens, which costs next to nothing: a safekeeper may start there any
/// moment, and commits may be waiting for it.
const PAUSE_MS_MAX_REFUSED: u64 = 500;
/// A connection that lived so long was a good one: its end is news, and is dialled again at once.
const LIVED_MS: u64 = 5000;

#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("{0}")]
    Decode(#[from] DecodeError),
}

enum Link {
    Down { until_ms: u64 },
    Dialling(Receiver<Dialled>),
    Up(Box<Connection>),
}

struct Connection {
    stream: Channel,
    inbox: Inbox,
    outbox: Outbox,
    since_ms: u64,
    greeted: bool,
}

/// What came of looking at a dial.
pub enum DialEvent {
    /// Still dialling, or nothing to dial.
    Nothing,
    Connected,
    /// Could not connect; to be reported with [`Peer::close`].
    Failed(String),
    Panicked(String),
}

pub struct Peer {
    dial: Dial,
    link: Link,
    /// In a row, without a connection that lived.
    failures: u32,
    /// Nobody listened at the last dial.
    refused: bool,
    connections: u64,
    round_trip: Duration,
    last_error: String,
    /// The last reason that was logged.
    reported: String,
    random: RandomState,
}

impl Peer {
    pub fn new(dial: Dial) -> Peer {
        Peer {
            dial,
            link: Link::Down { until_ms: 0 },
            failures: 0,
            refused: false,
            connections: 0,
            round_trip: Duration::ZERO,
            last_error: String::new(),
            reported: String::new(),
            random: RandomState::new(),
        }
    }

    pub fn dial(&self) -> &Dial {
        &self.dial
    }

    /// The next connections. One that is open stays.
    pub fn dial_by(&mut self, dial: Dial) {
        self.dial = dial;
    }

    /// Connections after the first.
    pub fn reconnects(&self) -> u64 {
        self.connections.saturating_sub(1)
    }

    /// Why the last connection ended, or the last dial failed; whether all is well is told by the
    /// state, not by this.
    pub fn last_error(&self) -> &str {
        &self.last_error
    }

    /// From a question to its answer, when the connection was opened.
    pub fn round_trip(&self) -> Duration {
        self.round_trip
    }

    pub fn is_up(&self) -> bool {
        matches!(self.link, Link::Up(_))
    }

    /// It is up, or being dialled.
    pub fn is_tried(&self) -> bool {
        !matches!(self.link, Link::Down { .. })
    }

    /// The open connection's socket, and whether bytes wait to be taken by it.
    pub fn socket(&self) -> Option<(RawFd, bool)> {
        match &self.link {
            Link::Up(up) => Some((up.stream.socket().as_raw_fd(), up.has_output())),
            _ => None,
        }
    }

    /// When [`Peer::dial_if_due`] has something to do.
    pub fn next_dial_ms(&self) -> u64 {
        match self.link {
            Link::Down { until_ms } => until_ms,
            _ => u64::MAX,
        }
    }

    /// Starts to dial if the pause is over. An error means that no thread can be had.
    pub fn dial_if_due(&mut self, now_ms: u64, waker: &Waker) -> io::Result<()> {
        if now_ms >= self.next_dial_ms() {
            let outcome = connect_in_background(self.dial.clone(), waker.clone())?;
            self.link = Link::Dialling(outcome);
        }
        Ok(())
    }

    /// Has the dial come to an end?
    pub fn poll_dial(&mut self, now_ms: u64) -> DialEvent {
        let Link::Dialling(outcome) = &self.link else {
            return DialEvent::Nothing;
        };
        match outcome.try_recv() {
            Err(TryRecvError::Empty) => DialEvent::Nothing,
            Err(TryRecvError::Disconnected) => {
                DialEvent::Panicked("connecting thread ended without a word".to_owned())
            }
            Ok(Dialled::Panicked(text)) => DialEvent::Panicked(text),
            Ok(Dialled::Failed { reason, refused }) => {
                self.refused = refused;
                DialEvent::Failed(reason)
            }
            Ok(Dialled::Connected(Connected { stream, round_trip })) => {
                self.refused = false;
                self.connections += 1;
                self.round_trip = round_trip;
                self.link = Link::Up(Box::new(Connection {
                    stream,
                    inbox: Inbox::default(),
                    outbox: Outbox::default(),
                    since_ms: now_ms,
                    greeted: false,
                }));
                DialEvent::Connected
            }
        }
    }

    /// One read from the socket: `true` if there may be more.
    pub fn receive(&mut self) -> Result<bool, PeerError> {
        match &mut self.link {
            Link::Up(up) => Ok(up.inbox.fill(&mut up.stream)? && !up.inbox.is_drained()),
            _ => Ok(false),
        }
    }

    /// Something has arrived of which the socket does not tell any more.
    pub fn has_input(&mut self) -> bool {
        match &mut self.link {
            Link::Up(up) => up.stream.has_input(),
            _ => false,
        }
    }

    /// The next message that has arrived in full.
    pub fn next_message(&mut self) -> Result<Option<AcceptorMessage>, PeerError> {
        let Link::Up(up) = &mut self.link else {
            return Ok(None);
        };
        let Some(payload) = up.inbox.next_payload()? else {
            return Ok(None);
        };
        let (message, _) = decode_acceptor_message(payload)?;
        Ok(Some(message))
    }

    /// Puts a message on its way, if there is a connection.
    pub fn send(&mut self, message: &ProposerMessage) {
        if let Link::Up(up) = &mut self.link {
            let encoded: Result<(), std::convert::Infallible> = up.outbox.push(|out| {
                encode_proposer_message(message, out);
                Ok(())
            });
            // The error has no values.
            let Ok(()) = encoded;
        }
    }

    /// May the proposer be asked for the next Append?
    pub fn can_take_append(&self) -> bool {
        matches!(&self.link, Link::Up(up) if !up.has_output())
    }

    /// Sends an Append with its WAL; when [`Peer::can_take_append`] says so.
    pub fn send_append(&mut self, append: &Append, wal: &[u8]) -> Result<(), PeerError> {
        if let Link::Up(up) = &mut self.link {
            up.outbox
                .send(&mut up.stream, wal, |out| encode_append(append, out))
                .map_err(WireError::from)?;
        }
        Ok(())
    }

    /// Gives the socket as much as it takes.
    pub fn flush(&mut self) -> Result<(), PeerError> {
        if let Link::Up(up) = &mut self.link {
            up.outbox.drain(&mut up.stream).map_err(WireError::from)?;
        }
        Ok(())
    }

    /// The member has greeted: the connection works. `true` if that is worth a line in the log.
    pub fn on_greeted(&mut self) -> bool {
        let Link::Up(up) = &mut self.link else {
            return false;
        };
        let first = !std::mem::replace(&mut up.greeted, true);
        let news = first && self.failures <= 1;
        if news {
            self.reported.clear();
        }
        news
    }

    /// Ends the connection or the dial, to try again after a pause. `true` if the reason is worth
    /// a line in the log: it is new, or the connection had been good.
    pub fn close(&mut self, reason: &str, now_ms: u64) -> bool {
        if let Link::Up(up) = &self.link
            && now_ms.saturating_sub(up.since_ms) >= LIVED_MS
        {
            self.failures = 0;
            self.reported.clear();
        }
        let doubled = PAUSE_MS_MIN << self.failures.min(10);
        self.failures = self.failures.saturating_add(1);
        let longest = if self.refused {
            PAUSE_MS_MAX_REFUSED
        } else {
            PAUSE_MS_MAX
        };
        let pause_ms = self.jittered(doubled.min(longest));
        self.link = Link::Down {
            until_ms: now_ms + pause_ms,
        };
        reason.clone_into(&mut self.last_error);
        let news = self.reported != reason;
        reason.clone_into(&mut self.reported);
        news
    }

    /// Gives the other side what is still to be sent, and waits until it has closed its end, for at
    /// most `time`: if we just closed ours, answers that nobody has read would break the connection
    /// before it has read all of ours.
    pub fn say_goodbye(&mut self, time: Duration) {
        let down = Link::Down { until_ms: u64::MAX };
        if let Link::Up(mut up) = std::mem::replace(&mut self.link, down) {
            // Nobody is left to be told of a failure.
            let _ = up.say_goodbye(time);
        }
    }

    /// Half of it to all of it, so that primaries that lost one safekeeper do not return in step.
    fn jittered(&self, ms: u64) -> u64 {
        let random = self.random.hash_one((self.connections, self.failures));
        ms / 2 + random % (ms / 2 + 1)
    }
}

impl Connection {
    /// Bytes wait to be taken by the socket.
    fn has_output(&self) -> bool {
        !self.outbox.is_empty() || self.stream.has_output()
    }

    fn say_goodbye(&mut self, time: Duration) -> io::Result<()> {
        let deadline = Instant::now() + time;
        self.stream.set_nonblocking(false)?;
        self.outbox.drain(&mut self.stream.until(deadline))?;
        self.stream.end_output();
        let mut answers = [0; 4096];
        while self.stream.until(deadline).read(&mut answers)? > 0 {}
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    use safekeeper_protocol::codec::encode_acceptor_message;
    use safekeeper_protocol::{
        AppendResponse, ConfigurationVersion, Lsn, PeerAddress, StandbyFeedback, Term, Tli,
    };

    use safekeeper_wire::credentials::Credentials;

    use crate::threads::waker;

    fn peer(port: u16) -> Peer {
        Peer::new(Dial {
            address: PeerAddress {
                host: "127.0.0.1".into(),
                port,
            },
            credentials: Credentials::trusted("me"),
            timeout: Duration::from_secs(5),
        })
    }

    /// Dials until the outcome is there.
    fn dialled(peer: &mut Peer, now_ms: u64) -> DialEvent {
        let (waker, _receiver) = waker().expect("a socket pair");
        peer.dial_if_due(now_ms, &waker).expect("a thread");
        loop {
            match peer.poll_dial(now_ms) {
                DialEvent::Nothing => std::thread::yield_now(),
                event => return event,
            }
        }
    }

    fn connected() -> (Peer, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let mut peer = peer(listener.local_addr().expect("bound").port());
        let server = std::thread::spawn(move || {
            let (mut server, _) = listener.accept().expect("a client");
            server
                .write_all(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05IW\0\0\0\x07\0\0\0")
                .expect("sent");
            // What the handshake says is of no interest here: 15 bytes behind the start packet.
            let mut length = [0; 4];
            server.read_exact(&mut length).expect("a start packet");
            let rest = u32::from_be_bytes(length) as usize - 4 + 5 + "START_WAL_PUSH\0".len();
            server.read_exact(&mut vec![0; rest]).expect("a query");
            server
        });
        assert!(matches!(dialled(&mut peer, 0), DialEvent::Connected));
        (peer, server.join().expect("a server"))
    }

    fn append(len: u32) -> Append {
        Append {
            configuration_version: ConfigurationVersion::NONE,
            term: Term(1),
            tli: Tli(1),
            begin_lsn: Lsn(100),
            len,
            commit_lsn: Lsn(50),
            truncate_lsn: Lsn(50),
            reply_requested: false,
        }
    }

    #[test]
    fn pauses_double_up_to_a_bound_and_start_anew_after_a_good_connection() {
        let mut peer = peer(1);
        for bound in [100, 200, 400, 800, 1600, 2000, 2000, 2000] {
            assert_pauses_up_to(bound, &mut peer, "timed out");
        }
        let (mut peer, _server) = connected();
        peer.failures = 9;
        peer.close("lost", LIVED_MS);
        assert!(peer.next_dial_ms() <= LIVED_MS + 100);
    }

    #[track_caller]
    fn assert_pauses_up_to(bound: u64, peer: &mut Peer, reason: &str) {
        let now_ms = 7;
        peer.close(reason, now_ms);
        let pause = peer.next_dial_ms() - now_ms;
        assert!((bound / 2..=bound).contains(&pause), "{pause} of {bound}");
    }

    /// It may be a safekeeper that starts anew, and commits wait for it.
    #[test]
    fn where_nobody_listens_pauses_are_short() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let mut peer = peer(listener.local_addr().expect("bound").port());
        drop(listener);
        for bound in [100, 200, 400, 500, 500] {
            let DialEvent::Failed(reason) = dialled(&mut peer, u64::MAX - 1) else {
                panic!("somebody listens");
            };
            assert_pauses_up_to(bound, &mut peer, &reason);
        }
    }

    #[test]
    fn a_reason_is_news_once() {
        let mut peer = peer(1);
        assert!(peer.close("refused", 0));
        assert!(!peer.close("refused", 1));
        assert!(peer.close("timed out", 2));
        assert_eq!(peer.last_error(), "timed out");
    }

    #[test]
    fn appends_and_answers_cross_the_connection() {
        let (mut peer, mut server) = connected();
        peer.send_append(&append(3), b"WAL").expect("sent");
        let mut header = [0; 5];
        server.read_exact(&mut header).expect("a message");
        let mut body =
            vec![0; u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize - 4];
        server.read_exact(&mut body).expect("its body");
        assert!(body.ends_with(b"WAL"));

        let response = AcceptorMessage::AppendResponse(AppendResponse {
            configuration_version: ConfigurationVersion::NONE,
            term: Term(1),
            write_lsn: Lsn(103),
            flush_lsn: Lsn(103),
            commit_lsn: Lsn(50),
            feedback: StandbyFeedback::default(),
        });
        let mut payload = Vec::new();
        encode_acceptor_message(&response, &mut payload);
        let length = (payload.len() as u32 + 4).to_be_bytes();
        server
            .write_all(&[&b"d"[..], &length, &payload].concat())
            .expect("answered");
        let got = loop {
            match peer.next_message().expect("a sound answer") {
                Some(message) => break message,
                None => drop(peer.receive().expect("open")),
            }
        };
        assert_eq!(got, response);
    }

    #[test]
    fn a_member_that_hangs_costs_one_message() {
        let (mut peer, _server) = connected();
        let wal = vec![7; Append::LEN_MAX as usize];
        let mut messages = 0;
        while peer.can_take_append() {
            peer.send_append(&append(Append::LEN_MAX), &wal)
                .expect("open");
            messages += 1;
            assert!(messages < 1000, "the socket takes without end");
        }
        assert!(peer.socket().expect("open").1);
    }
}
