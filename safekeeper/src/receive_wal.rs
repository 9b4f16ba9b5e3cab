//! A proposer's connection, from START_WAL_PUSH to its end.
//!
//! ```text
//!   asleep in recv ──► a message ──► take the keeper ──► carry it out ──┐
//!        ▲                                 ▲                            │
//!        │                                 └── more has arrived ◄───────┤
//!        │                                                              ▼ the input is dry,
//!        └──── send the answers ◄──── give the keeper back ◄──── flush   or a turn is long enough
//! ```
//!
//! One thread receives, writes, flushes and answers; a hand-over to another would cost half as
//! much again for every commit. What arrives during a flush is in the next one: that is all the
//! batching there is. The keeper is held while messages are at hand, never while waiting for a
//! socket, and never given back with WAL that is not flushed.
//!
//! WAL goes from the receive buffer to the file. No byte is copied, nothing is allocated for a
//! message, no control file is written for a commit.
//!
//! A proposer of a cluster that nobody has configured here speaks to an acceptor that holds
//! nothing; only the first configuration makes a directory (see [`Clusters::handle_unknown`]).

use std::net::SocketAddr;
use std::sync::Arc;

use safekeeper_protocol::codec::{
    MESSAGE_LEN_MAX, decode_proposer_message, encode_acceptor_message,
};
use safekeeper_protocol::{
    AcceptorMessage, ClusterIdentity, Lsn, ProposerGreeting, ProposerMessage, Read, ReadResponse,
    Session,
};
use safekeeper_wire::pgwire::{ConnectionError, ErrorReport, Filled, Wait};

use crate::clusters::{Clusters, Unknown};
use crate::connection::Connection;
use crate::keeper::{Keeper, PushError, Reader, Turn};

/// Length word of the longest CopyData: a message and the word itself.
const FRAME_LEN_MAX: usize = 4 + MESSAGE_LEN_MAX;

/// After so much input a turn ends even if more has arrived, in bytes: a stream without a pause
/// gets answers, and others who need the keeper get it.
const TURN_LEN_MAX: usize = 16 * 1024 * 1024;

/// Serve a proposer until it leaves. The connection is of no use afterwards.
pub fn receive(connection: &mut Connection, clusters: &Clusters) -> Result<(), ConnectionError> {
    connection.output.copy_both();
    connection.send()?;
    let mut push = Push {
        clusters,
        address: connection.peer(),
        session_id: connection.id(),
        proposer: None,
        keeper: None,
        replies: Vec::new(),
        wal: Vec::new(),
        reader: None,
    };
    let ended = push.run(connection);
    push.leave();
    ended
}

/// One proposer's connection.
struct Push<'a> {
    clusters: &'a Clusters,
    address: SocketAddr,
    session_id: u64,
    /// From its first greeting.
    proposer: Option<(Session, ClusterIdentity)>,
    /// None while the cluster is unknown here.
    keeper: Option<Arc<Keeper>>,
    replies: Vec<AcceptorMessage>,
    /// What was read for a ReadResponse.
    wal: Vec<u8>,
    reader: Option<Reader>,
}

/// What is to be done once the keeper has been given back.
enum Next {
    /// Answer, and wait for more.
    Answer,
    Read(Read),
    /// The proposer has said good-bye.
    End,
}

impl Push<'_> {
    fn run(&mut self, connection: &mut Connection) -> Result<(), ConnectionError> {
        loop {
            connection.wait_for_frame(FRAME_LEN_MAX)?;
            let next = match self.keeper.clone() {
                Some(keeper) => self.take_turn(connection, &keeper)?,
                None => self.handle_without_keeper(connection)?,
            };
            for reply in self.replies.drain(..) {
                connection
                    .output
                    .copy_data(|out| encode_acceptor_message(&reply, out));
            }
            match next {
                Next::Answer => {}
                Next::Read(read) => self.answer_read(connection, read)?,
                Next::End => {
                    connection.output.copy_done();
                    connection.send()?;
                    return Ok(());
                }
            }
            connection.send()?;
        }
    }

    /// Everything that has arrived, in one turn and with one flush.
    fn take_turn(
        &mut self,
        connection: &mut Connection,
        keeper: &Keeper,
    ) -> Result<Next, ConnectionError> {
        let mut turn = keeper.take_turn();
        let mut taken = 0;
        let next = loop {
            let Some(frame) = connection.input.next_frame(FRAME_LEN_MAX).map_err(fatal)? else {
                if connection.input.fill(&mut connection.channel, Wait::No)? == Filled::Some {
                    continue;
                }
                break Next::Answer;
            };
            taken += frame.body.len();
            let Some(payload) = payload_of(frame.tag, frame.body)? else {
                break Next::End;
            };
            let (message, wal) = decode(payload)?;
            let now_ms = connection.clock.now_ms();
            match message {
                ProposerMessage::Append(append) => {
                    let session = self.session()?;
                    turn.append(session, &append, wal, now_ms, &mut self.replies)
                        .map_err(push_failed)?;
                }
                ProposerMessage::Read(read) => break Next::Read(read),
                message => {
                    self.handle(&mut turn, message, now_ms)?;
                    break Next::Answer;
                }
            }
            if taken >= TURN_LEN_MAX {
                break Next::Answer;
            }
        };
        turn.finish(&mut self.replies);
        Ok(next)
    }

    /// The rare messages: all but Append and Read.
    fn handle(
        &mut self,
        turn: &mut Turn<'_>,
        message: ProposerMessage,
        now_ms: u64,
    ) -> Result<(), ConnectionError> {
        if let ProposerMessage::Greeting(greeting) = &message {
            self.check_same_proposer(greeting)?;
        }
        let session = self.session()?;
        turn.handle(session, self.address, &message, now_ms, &mut self.replies)
            .map_err(push_failed)
    }

    /// One message while there is no keeper: the first greeting finds it, if it exists, and a
    /// first configuration makes it.
    fn handle_without_keeper(
        &mut self,
        connection: &mut Connection,
    ) -> Result<Next, ConnectionError> {
        let Some(frame) = connection.input.next_frame(FRAME_LEN_MAX).map_err(fatal)? else {
            return Ok(Next::Answer);
        };
        let Some(payload) = payload_of(frame.tag, frame.body)? else {
            return Ok(Next::End);
        };
        let (message, wal) = decode(payload)?;
        let now_ms = connection.clock.now_ms();
        if let ProposerMessage::Greeting(greeting) = &message {
            match &self.proposer {
                Some(_) => self.check_same_proposer(greeting)?,
                None => self.meet(greeting)?,
            }
        }
        let session = self.session()?;
        let Some((_, cluster)) = &self.proposer else {
            return Err(greeting_expected());
        };
        match self
            .clusters
            .handle_unknown(cluster, session, &message, now_ms, &mut self.replies)
            .map_err(push_failed)?
        {
            Unknown::Handled => {}
            Unknown::Read(read) => return Ok(Next::Read(read)),
            Unknown::Created(keeper) => self.keeper = Some(keeper),
            Unknown::Known(keeper) => {
                let mut turn = keeper.take_turn();
                let handled = match &message {
                    ProposerMessage::Append(append) => {
                        turn.append(session, append, wal, now_ms, &mut self.replies)
                    }
                    ProposerMessage::Read(read) => {
                        let read = *read;
                        drop(turn);
                        self.keeper = Some(keeper);
                        return Ok(Next::Read(read));
                    }
                    message => {
                        turn.handle(session, self.address, message, now_ms, &mut self.replies)
                    }
                };
                turn.finish(&mut self.replies);
                handled.map_err(push_failed)?;
                self.keeper = Some(keeper);
            }
        }
        Ok(Next::Answer)
    }

    /// The first greeting says who the proposer is and of which cluster.
    fn meet(&mut self, greeting: &ProposerGreeting) -> Result<(), ConnectionError> {
        let session = Session {
            id: self.session_id,
            proposer_id: greeting.proposer_id,
        };
        log::debug!(
            "proposer connected from={} proposer_id={} system_id={} cluster={}",
            self.address,
            greeting.proposer_id,
            greeting.cluster.system_id,
            greeting.cluster.name
        );
        self.proposer = Some((session, greeting.cluster.clone()));
        Ok(())
    }

    /// A session belongs to one proposer of one cluster.
    fn check_same_proposer(&self, greeting: &ProposerGreeting) -> Result<(), ConnectionError> {
        let same = self.proposer.as_ref().is_some_and(|(session, cluster)| {
            session.proposer_id == greeting.proposer_id
                && cluster.system_id == greeting.cluster.system_id
        });
        if same {
            return Ok(());
        }
        Err(fatal(ErrorReport::protocol(
            "greeting of another proposer on the same connection",
        )))
    }

    fn session(&self) -> Result<Session, ConnectionError> {
        let proposer = self.proposer.as_ref();
        proposer.map(|known| known.0).ok_or_else(greeting_expected)
    }

    /// WAL for a candidate, or for a proposer that feeds a member with it. What is below flush_lsn
    /// stays as it is for as long as the term does; so if the term is the same after the files
    /// were read as it was before, the bytes are of that term's log.
    fn answer_read(
        &mut self,
        connection: &mut Connection,
        read: Read,
    ) -> Result<(), ConnectionError> {
        let mut response = ReadResponse {
            term: read.term,
            begin_lsn: read.begin_lsn,
            len: 0,
            oldest_lsn: Lsn::INVALID,
        };
        self.wal.clear();
        if let Some(keeper) = self.keeper.clone() {
            let before = keeper.begin_read(&read).map_err(push_failed)?;
            response.term = before.term;
            response.oldest_lsn = before.oldest_lsn;
            let available = before.flush_lsn.saturating_distance_from(read.begin_lsn);
            let is_here = available > 0 && read.begin_lsn >= before.oldest_lsn;
            if is_here && before.term == read.term {
                let end_lsn = read.begin_lsn + available.min(u64::from(read.len));
                let reader = self.reader.get_or_insert_with(|| keeper.reader());
                keeper.read_flushed(reader, read.begin_lsn..end_lsn, &mut self.wal)?;
                let after = keeper.begin_read(&read).map_err(push_failed)?;
                response.term = after.term;
                response.oldest_lsn = after.oldest_lsn;
                if after.term != read.term {
                    self.wal.clear();
                }
            }
        }
        response.len = u32::try_from(self.wal.len()).expect("not more than was asked for");
        connection.output.copy_data(|out| {
            encode_acceptor_message(&AcceptorMessage::ReadResponse(response), out);
            out.extend_from_slice(&self.wal);
        });
        Ok(())
    }

    fn leave(&mut self) {
        let Some((session, cluster)) = &self.proposer else {
            return;
        };
        let led = match &self.keeper {
            Some(keeper) => keeper.take_turn().disconnect(*session),
            None => false,
        };
        // A proposer that may not lead comes again and again; that is no change of state.
        let level = if led {
            log::Level::Info
        } else {
            log::Level::Debug
        };
        log::log!(
            level,
            "proposer disconnected from={} system_id={} cluster={}",
            self.address,
            cluster.system_id,
            cluster.name
        );
    }
}

/// The message inside a CopyData; none for the end of the copy.
fn payload_of(tag: u8, body: &[u8]) -> Result<Option<&[u8]>, ConnectionError> {
    match tag {
        b'd' => Ok(Some(body)),
        b'c' | b'X' => Ok(None),
        tag => Err(fatal(ErrorReport::protocol(format!(
            "unexpected message tag 0x{tag:02x} while WAL is pushed"
        )))),
    }
}

fn decode(payload: &[u8]) -> Result<(ProposerMessage, &[u8]), ConnectionError> {
    decode_proposer_message(payload)
        .map_err(|error| fatal(ErrorReport::protocol(error.to_string())))
}

fn fatal(report: ErrorReport) -> ConnectionError {
    ConnectionError::Fatal(report)
}

fn greeting_expected() -> ConnectionError {
    fatal(ErrorReport::protocol(
        "the first message on a connection must be a greeting",
    ))
}

/// The refusal as the proposer and the log hear it.
fn push_failed(error: PushError) -> ConnectionError {
    fatal(error.report())
}
