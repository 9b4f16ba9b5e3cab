//! Reading WAL from a safekeeper: a thread with a connection of its own.
//!
//! ```text
//!   thread     Greeting ──►  ◄── Greeting   Read ──► Read ──►  ◄── ReadResponse  Read ──► ...
//!                                                       │
//!   main loop  ◄── bounded channel of chunks ◄──────────┘
//! ```
//!
//! It serves two purposes: to compare the local log with the donor's before a reign begins, and to
//! feed a member whose next byte has left `pg_wal`. Each Read is conditional on the term; an answer
//! of another term ends it, for the donor may have been told to cut its log by then.
//!
//! Memory is bounded: chunks of at most 1 MiB, and as many as [`CHUNKS_MAX`] and the one in hand.
//! The thread ends when the range is read, at the first error, or when the [`Donor`] is dropped.

use std::io::Write;

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};
use safekeeper_protocol::codec::{decode_acceptor_message, encode_proposer_message};
use safekeeper_protocol::{
    AcceptorMessage, Append, ConfigurationVersion, Lsn, ProposerGreeting, ProposerMessage, Read,
    ReadResponse, Term,
};

use safekeeper_wire::channel::Channel;

use crate::connect::{Dial, connect};
use crate::pgwire::{Inbox, Outbox};
use crate::threads::{self, Waker};

/// Chunks that wait for the main loop: one to go on with while the next is on its way.
const CHUNKS_MAX: usize = 2;
/// Reads on their way, so that the donor's disk and the network work at the same time.
const READS_MAX: usize = 2;

/// What to read.
#[derive(Clone, Debug)]
pub struct DonorRequest {
    pub dial: Dial,
    pub greeting: ProposerGreeting,
    pub configuration_version: ConfigurationVersion,
    pub term: Term,
    pub begin_lsn: Lsn,
    /// Not beyond what the donor has flushed.
    pub end_lsn: Lsn,
}

pub enum DonorEvent {
    /// The next stretch of WAL.
    Chunk {
        begin_lsn: Lsn,
        wal: Vec<u8>,
    },
    /// The range was read to its end.
    Done,
    /// The donor keeps WAL from here on only, which is beyond what was to be read next.
    Removed {
        oldest_lsn: Lsn,
    },
    Failed(String),
    Panicked(String),
}

/// The main loop's end.
pub struct Donor {
    events: Receiver<DonorEvent>,
}

impl Donor {
    pub fn start(request: DonorRequest, waker: Waker) -> std::io::Result<Donor> {
        let (sender, events) = bounded(CHUNKS_MAX);
        let panicked = (sender.clone(), waker.clone());
        let body = move || {
            let last = match read_range(&request, &sender, &waker) {
                Ok(ended) => ended,
                Err(reason) => DonorEvent::Failed(reason),
            };
            // An error here means that the receiver is gone: nobody wants to know.
            let _ = sender.send(last);
            waker.wake();
        };
        threads::spawn("donor".to_owned(), body, move |text| {
            let (sender, waker) = panicked;
            let _ = sender.send(DonorEvent::Panicked(text));
            waker.wake();
        })?;
        Ok(Donor { events })
    }

    /// One that says what a test wants.
    #[cfg(test)]
    pub fn that_says(events: Receiver<DonorEvent>) -> Donor {
        Donor { events }
    }

    /// What has come, if anything. After anything but a chunk nothing more comes.
    pub fn poll(&self) -> Option<DonorEvent> {
        match self.events.try_recv() {
            Ok(event) => Some(event),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(DonorEvent::Failed(
                "reading from the donor has ended".to_owned(),
            )),
        }
    }
}

struct Connection {
    stream: Channel,
    inbox: Inbox,
}

impl Connection {
    fn send(&mut self, message: &ProposerMessage) -> Result<(), String> {
        let mut outbox = Outbox::default();
        let encoded: Result<(), String> = outbox.push(|out| {
            encode_proposer_message(message, out);
            Ok(())
        });
        encoded?;
        let drained = outbox
            .drain(&mut self.stream)
            .map_err(|error| error.to_string())?;
        let flushed = self.stream.flush().map_err(|error| error.to_string());
        if drained {
            flushed
        } else {
            Err("timed out".to_owned())
        }
    }

    fn receive<T>(
        &mut self,
        take: impl FnOnce(AcceptorMessage, &[u8]) -> Result<T, String>,
    ) -> Result<T, String> {
        loop {
            if let Some(payload) = self
                .inbox
                .next_payload()
                .map_err(|error| error.to_string())?
            {
                let decoded = decode_acceptor_message(payload);
                let (message, wal) = decoded.map_err(|error| error.to_string())?;
                return take(message, wal);
            }
            // The stream blocks, so "nothing" means that its time-out has passed.
            if !self
                .inbox
                .fill(&mut self.stream)
                .map_err(|error| error.to_string())?
            {
                return Err("timed out".to_owned());
            }
        }
    }
}

/// Reads it all and sends it on; the reason if it could not.
fn read_range(
    request: &DonorRequest,
    chunks: &Sender<DonorEvent>,
    waker: &Waker,
) -> Result<DonorEvent, String> {
    let mut connection = Connection {
        stream: connect(&request.dial)
            .map_err(|error| error.to_string())?
            .stream,
        inbox: Inbox::default(),
    };
    connection.send(&ProposerMessage::Greeting(request.greeting.clone()))?;
    connection.receive(|message, _| match message {
        AcceptorMessage::Greeting(_) => Ok(()),
        _ => Err("answered with another message than a greeting".to_owned()),
    })?;

    let (mut asked_lsn, mut read_lsn) = (request.begin_lsn, request.begin_lsn);
    let mut on_their_way = 0;
    while read_lsn < request.end_lsn {
        while on_their_way < READS_MAX && asked_lsn < request.end_lsn {
            let read = Read {
                configuration_version: request.configuration_version,
                term: request.term,
                begin_lsn: asked_lsn,
                len: chunk_len(asked_lsn, request.end_lsn),
            };
            connection.send(&ProposerMessage::Read(read))?;
            asked_lsn = asked_lsn + u64::from(read.len);
            on_their_way += 1;
        }
        let wanted = chunk_len(read_lsn, request.end_lsn);
        let wal = connection.receive(|message, wal| match message {
            AcceptorMessage::ReadResponse(response) => {
                check(&response, request.term, read_lsn, wanted)?;
                let kept = response.len > 0;
                Ok(kept.then(|| wal.to_vec()).ok_or(response.oldest_lsn))
            }
            _ => Err("answered with another message than WAL".to_owned()),
        })?;
        let wal = match wal {
            Ok(wal) => wal,
            Err(oldest_lsn) => return Ok(DonorEvent::Removed { oldest_lsn }),
        };
        on_their_way -= 1;
        let begin_lsn = read_lsn;
        read_lsn = read_lsn + wal.len() as u64;
        if chunks.send(DonorEvent::Chunk { begin_lsn, wal }).is_err() {
            break;
        }
        waker.wake();
    }
    Ok(DonorEvent::Done)
}

fn chunk_len(begin_lsn: Lsn, end_lsn: Lsn) -> u32 {
    let rest = end_lsn.saturating_distance_from(begin_lsn);
    u32::try_from(rest).unwrap_or(u32::MAX).min(Append::LEN_MAX)
}

fn check(response: &ReadResponse, term: Term, begin_lsn: Lsn, wanted: u32) -> Result<(), String> {
    if response.term != term {
        return Err(format!("donor is in term {}, not {term}", response.term));
    }
    if begin_lsn < response.oldest_lsn && response.len == 0 {
        return Ok(());
    }
    if response.begin_lsn != begin_lsn || response.len != wanted {
        return Err(format!(
            "donor sent {} bytes from {} instead of {wanted} from {begin_lsn}",
            response.len, response.begin_lsn
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::time::Duration;

    use safekeeper_protocol::codec::{decode_proposer_message, encode_acceptor_message};
    use safekeeper_protocol::{
        AcceptorGreeting, ClusterIdentity, Configuration, Incarnation, MemberId, PeerAddress,
        ProposerId, TermHistory,
    };

    use safekeeper_wire::credentials::Credentials;

    use crate::threads::waker;

    const TERM: Term = Term(7);

    /// The byte of the donor's log at a position.
    fn byte_at(lsn: u64) -> u8 {
        (lsn % 251) as u8
    }

    /// A safekeeper that answers greetings and reads from an endless log, in a term that moves on
    /// after some reads.
    fn donor(moves_on_after: usize) -> u16 {
        use std::io::Read as _;
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut length = [0; 4];
            stream.read_exact(&mut length).expect("a start packet");
            let rest = u32::from_be_bytes(length) as usize - 4;
            stream.read_exact(&mut vec![0; rest]).expect("its body");
            stream
                .write_all(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I")
                .expect("sent");
            stream.read_exact(&mut [0; 5 + 15]).expect("a query");
            stream.write_all(b"W\0\0\0\x07\0\0\0").expect("sent");
            let (mut inbox, mut reads) = (Inbox::default(), 0);
            loop {
                let Ok(payload) = inbox.next_payload() else {
                    return;
                };
                let Some(payload) = payload else {
                    match inbox.fill(&mut stream) {
                        Ok(_) => continue,
                        Err(_) => return,
                    }
                };
                let (message, _) = decode_proposer_message(payload).expect("a message");
                let mut out = Vec::new();
                match message {
                    ProposerMessage::Greeting(_) => {
                        let greeting = AcceptorMessage::Greeting(AcceptorGreeting {
                            member_id: MemberId(1),
                            incarnation: Incarnation(1),
                            term: TERM,
                            configuration: Configuration::default(),
                            history: TermHistory::default(),
                            flush_lsn: Lsn(1 << 40),
                            commit_lsn: Lsn(0),
                            rival_heard_ms: AcceptorGreeting::NEVER_HEARD,
                        });
                        encode_acceptor_message(&greeting, &mut out);
                    }
                    ProposerMessage::Read(read) => {
                        let moved_on = reads == moves_on_after;
                        reads += 1;
                        let response = AcceptorMessage::ReadResponse(ReadResponse {
                            term: if moved_on { Term(8) } else { TERM },
                            begin_lsn: read.begin_lsn,
                            len: if moved_on { 0 } else { read.len },
                            oldest_lsn: Lsn(1000),
                        });
                        encode_acceptor_message(&response, &mut out);
                        if !moved_on {
                            let range = read.begin_lsn.0..read.begin_lsn.0 + u64::from(read.len);
                            out.extend(range.map(byte_at));
                        }
                    }
                    other => panic!("{other:?}"),
                }
                let length = (out.len() as u32 + 4).to_be_bytes();
                if stream
                    .write_all(&[&b"d"[..], &length, &out].concat())
                    .is_err()
                {
                    return;
                }
            }
        });
        port
    }

    fn read(port: u16, begin: u64, end: u64) -> (Vec<u8>, Option<String>) {
        let (waker, _receiver) = waker().expect("a socket pair");
        let request = DonorRequest {
            dial: Dial {
                address: PeerAddress {
                    host: "127.0.0.1".into(),
                    port,
                },
                credentials: Credentials::trusted("me"),
                timeout: Duration::from_secs(5),
            },
            greeting: ProposerGreeting {
                proposer_id: ProposerId(1),
                cluster: ClusterIdentity {
                    system_id: 1,
                    name: "main".into(),
                    pg_major: 15,
                    segment_size: 1 << 24,
                },
            },
            configuration_version: ConfigurationVersion::NONE,
            term: TERM,
            begin_lsn: Lsn(begin),
            end_lsn: Lsn(end),
        };
        let donor = Donor::start(request, waker).expect("a thread");
        let mut got = Vec::new();
        loop {
            match donor.poll() {
                None => std::thread::yield_now(),
                Some(DonorEvent::Chunk { begin_lsn, wal }) => {
                    assert_eq!(begin_lsn, Lsn(begin + got.len() as u64));
                    got.extend(wal);
                }
                Some(DonorEvent::Done) => return (got, None),
                Some(DonorEvent::Removed { oldest_lsn }) => {
                    return (got, Some(format!("removed below {oldest_lsn}")));
                }
                Some(DonorEvent::Failed(text) | DonorEvent::Panicked(text)) => {
                    return (got, Some(text));
                }
            }
        }
    }

    #[test]
    fn a_range_is_read_in_order() {
        let (begin, end) = (5000, 5000 + 3 * 1024 * 1024 + 17);
        let (got, error) = read(donor(usize::MAX), begin, end);
        assert_eq!(error, None);
        assert!(got.iter().copied().eq((begin..end).map(byte_at)));
    }

    #[test]
    fn a_donor_that_follows_another_term_is_not_believed() {
        let (got, error) = read(donor(1), 5000, 5000 + 3 * 1024 * 1024);
        assert_eq!(got.len(), 1024 * 1024);
        assert_eq!(error.as_deref(), Some("donor is in term 8, not 7"));
    }

    #[test]
    fn a_donor_that_cannot_be_reached_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        drop(listener);
        let (_, error) = read(port, 1, 2);
        assert!(error.expect("an error").starts_with("Connection refused"));
    }
}
