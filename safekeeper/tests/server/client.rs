//! Hand-made clients: one that speaks Postgres's protocol, and on top of it a proposer.
//!
//! They do what they are told and check nothing by themselves, so that a test can lie, too.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use safekeeper_protocol::codec::{decode_acceptor_message, encode_proposer_message};
use safekeeper_protocol::*;
use safekeeper_wal::synthetic::WalBuilder;
use safekeeper_wal::{PgVersion, SegmentSize, WalFormat};

/// Longer than anything a test waits for; what takes longer is stuck.
const PATIENCE: Duration = Duration::from_secs(30);

pub const SEGMENT: u64 = 1 << 20;
/// Where the logs of these tests begin.
pub const LOG_START: Lsn = Lsn(2 * SEGMENT);

#[derive(Debug, PartialEq, Eq)]
pub struct PgError {
    pub sqlstate: String,
    pub message: String,
    pub detail: String,
    pub hint: String,
}

pub type Row = Vec<Option<String>>;

/// What a consumer is sent.
#[derive(Debug, PartialEq, Eq)]
pub enum StreamMessage {
    Wal {
        begin: Lsn,
        known_end: Lsn,
        wal: Vec<u8>,
    },
    Keepalive {
        end: Lsn,
        reply_requested: bool,
    },
}

#[derive(Debug)]
pub struct Client {
    pub socket: TcpStream,
}

impl Client {
    pub fn raw(address: SocketAddr) -> Client {
        let socket = TcpStream::connect(address).expect("connected");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        socket.set_nodelay(true).expect("no delay");
        Client { socket }
    }

    /// A startup packet is sent.
    pub fn opened_by(address: SocketAddr, user: &str) -> Client {
        let mut client = Client::raw(address);
        client.send_startup(&[("user", user), ("replication", "true")]);
        client
    }

    fn send_startup(&mut self, parameters: &[(&str, &str)]) {
        let mut body = (3u32 << 16).to_be_bytes().to_vec();
        for (name, value) in parameters {
            body.extend(format!("{name}\0{value}\0").bytes());
        }
        body.push(0);
        self.send_raw(&[&(body.len() as u32 + 4).to_be_bytes(), body.as_slice()].concat());
    }

    /// Through the handshake, with these startup parameters beside the user.
    pub fn connect(address: SocketAddr, parameters: &[(&str, &str)]) -> Result<Client, PgError> {
        let mut client = Client::raw(address);
        client.send_startup(&[&[("user", "test"), ("replication", "true")], parameters].concat());
        client.until_ready().map(|_| client)
    }

    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).expect("sent");
    }

    pub fn send(&mut self, tag: u8, body: &[u8]) {
        let len = body.len() as u32 + 4;
        self.send_raw(&[&[tag], len.to_be_bytes().as_slice(), body].concat());
    }

    /// The next message, or none at the end of the stream.
    pub fn receive(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut head = [0; 5];
        if let Err(error) = self.socket.read_exact(&mut head) {
            assert!(!is_timeout(&error), "nothing was said for {PATIENCE:?}");
            return None;
        }
        let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        let mut body = vec![0; len - 4];
        self.socket
            .read_exact(&mut body)
            .expect("the rest of the message");
        Some((head[0], body))
    }

    pub fn query(&mut self, text: &str) -> Result<Vec<Row>, PgError> {
        self.send(b'Q', format!("{text}\0").as_bytes());
        self.until_ready()
    }

    /// Begin a copy, and come back when it has begun.
    pub fn start(&mut self, text: &str) -> Result<(), PgError> {
        self.send(b'Q', format!("{text}\0").as_bytes());
        match self.receive() {
            Some((b'W', _)) => Ok(()),
            Some((b'E', body)) => Err(parse_error(&body)),
            other => panic!("expected a copy, got {other:?}"),
        }
    }

    /// Rows up to ReadyForQuery, or the first error.
    pub fn until_ready(&mut self) -> Result<Vec<Row>, PgError> {
        let mut rows = Vec::new();
        let mut error = None;
        loop {
            match self.receive() {
                Some((b'Z', _)) => return error.map_or(Ok(rows), Err),
                Some((b'E', body)) => error = error.or(Some(parse_error(&body))),
                Some((b'D', body)) => rows.push(parse_row(&body)),
                Some(_) => {}
                None => return Err(error.expect("an error before the connection closed")),
            }
        }
    }

    /// What the server says before it closes the connection.
    pub fn last_words(&mut self) -> Option<PgError> {
        let mut words = None;
        while let Some((tag, body)) = self.receive() {
            if tag == b'E' {
                words = Some(parse_error(&body));
            }
        }
        words
    }

    /// The next message of a stream, or what ends it: a tag and a body.
    pub fn stream_message(&mut self) -> Result<StreamMessage, (u8, Vec<u8>)> {
        let (tag, body) = self.receive().expect("a message");
        if tag != b'd' {
            return Err((tag, body));
        }
        let number = |at: usize| {
            let bytes = body[at..at + 8].first_chunk::<8>().expect("eight bytes");
            Lsn(u64::from_be_bytes(*bytes))
        };
        Ok(match body[0] {
            b'w' => StreamMessage::Wal {
                begin: number(1),
                known_end: number(9),
                wal: body[25..].to_vec(),
            },
            b'k' => StreamMessage::Keepalive {
                end: number(1),
                reply_requested: body[17] != 0,
            },
            tag => panic!("unexpected stream message {tag}"),
        })
    }

    /// WAL from `begin` until `end`; checks that messages join and end where they should.
    pub fn stream_until(&mut self, begin: Lsn, end: Lsn) -> Vec<u8> {
        let mut wal = Vec::new();
        while begin + (wal.len() as u64) < end {
            let message = self.stream_message().expect("WAL");
            let StreamMessage::Wal {
                begin: at,
                known_end,
                wal: bytes,
            } = message
            else {
                continue;
            };
            assert_eq!(at, begin + wal.len() as u64, "a gap in the stream");
            wal.extend(bytes);
            let message_end = begin + wal.len() as u64;
            assert!(
                message_end <= known_end,
                "{message_end} is above {known_end}"
            );
            assert!(
                message_end.0.is_multiple_of(8192) || message_end == known_end,
                "a message ends at {message_end}, neither a page's end nor {known_end}"
            );
        }
        wal
    }

    pub fn standby_reply(&mut self, lsns: [Lsn; 3], reply_requested: bool) {
        let mut body = vec![b'r'];
        for lsn in lsns {
            body.extend(lsn.0.to_be_bytes());
        }
        body.extend([0; 8]);
        body.push(u8::from(reply_requested));
        self.send(b'd', &body);
    }

    pub fn hot_standby_feedback(&mut self, xmin: u32, epoch: u32) {
        let mut body = vec![b'h'];
        body.extend([0; 8]);
        for number in [xmin, epoch, 0, 0] {
            body.extend(number.to_be_bytes());
        }
        self.send(b'd', &body);
    }
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
    )
}

pub fn parse_error(body: &[u8]) -> PgError {
    let field = |code: u8| {
        let fields = body.split(|byte| *byte == 0);
        let found = fields
            .into_iter()
            .find(|field| field.first() == Some(&code));
        found.map_or(String::new(), |field| {
            String::from_utf8_lossy(&field[1..]).into_owned()
        })
    };
    PgError {
        sqlstate: field(b'C'),
        message: field(b'M'),
        detail: field(b'D'),
        hint: field(b'H'),
    }
}

fn parse_row(mut body: &[u8]) -> Row {
    body = &body[2..];
    let mut row = Vec::new();
    while let Some((len, rest)) = body.split_first_chunk::<4>() {
        let len = i32::from_be_bytes(*len);
        let (value, rest) = rest.split_at(usize::try_from(len).unwrap_or(0));
        row.push((len >= 0).then(|| String::from_utf8_lossy(value).into_owned()));
        body = rest;
    }
    row
}

pub fn cluster(system_id: u64, name: &str) -> ClusterIdentity {
    ClusterIdentity {
        system_id,
        name: name.into(),
        pg_major: 15,
        segment_size: SEGMENT as u32,
    }
}

pub fn builder(system_id: u64, tli: u32, start: Lsn) -> WalBuilder {
    let format = WalFormat {
        version: PgVersion::V15,
        segment_size: SegmentSize::new(SEGMENT as u32).expect("a size"),
        system_id,
    };
    WalBuilder::new(format, tli, start)
}

pub fn entry(term: u64, tli: u32, start_lsn: Lsn) -> TermEntry {
    TermEntry {
        term: Term(term),
        tli: Tli(tli),
        start_lsn,
    }
}

/// A proposer's connection, and what it believes.
#[derive(Debug)]
pub struct Proposer {
    pub client: Client,
    pub cluster: ClusterIdentity,
    pub id: ProposerId,
    pub term: Term,
    pub version: ConfigurationVersion,
    pub history: TermHistory,
    pub commit_lsn: Lsn,
    pub truncate_lsn: Lsn,
}

impl Proposer {
    pub fn connect(address: SocketAddr, cluster: ClusterIdentity) -> Proposer {
        let client = Client::connect(address, &[]).expect("connected");
        Proposer::of(client, cluster)
    }

    fn of(mut client: Client, cluster: ClusterIdentity) -> Proposer {
        client.start("START_WAL_PUSH").expect("pushing");
        Proposer {
            client,
            cluster,
            id: ProposerId(7),
            term: Term::NONE,
            version: ConfigurationVersion::NONE,
            history: TermHistory::default(),
            commit_lsn: Lsn::INVALID,
            truncate_lsn: Lsn::INVALID,
        }
    }

    /// Greets, configures this safekeeper as the only member if need be, and wins a term in which
    /// the log goes on at its end, or begins at [`LOG_START`].
    pub fn lead(address: SocketAddr, cluster: ClusterIdentity) -> Proposer {
        Proposer::connect(address, cluster).elected()
    }

    /// The same on a connection that has been let in.
    pub fn lead_by(client: Client, cluster: ClusterIdentity) -> Proposer {
        Proposer::of(client, cluster).elected()
    }

    fn elected(self) -> Proposer {
        let mut proposer = self;
        let greeting = proposer.greet();
        proposer.term = greeting.term.next().expect("a next term");
        if greeting.configuration.is_none() {
            proposer.configure_first(&greeting);
            proposer.term = Term(2);
        }
        let vote = proposer.vote();
        assert!(vote.granted, "{vote:?}");
        let start_lsn = if vote.history.is_empty() {
            LOG_START
        } else {
            vote.flush_lsn
        };
        let clipped = vote.history.clipped_to(start_lsn);
        let mine = entry(proposer.term.0, 1, start_lsn);
        proposer.history = clipped.succeeded_by(mine).expect("a history");
        proposer.commit_lsn = vote.commit_lsn;
        let response = proposer.elect(start_lsn, Vec::new());
        assert_eq!(
            (response.term, response.flush_lsn),
            (proposer.term, start_lsn)
        );
        proposer
    }

    pub fn send(&mut self, message: &ProposerMessage, wal: &[u8]) {
        let mut body = Vec::new();
        encode_proposer_message(message, &mut body);
        body.extend_from_slice(wal);
        self.client.send(b'd', &body);
    }

    /// The next answer, and its WAL.
    pub fn receive_wal(&mut self) -> Result<(AcceptorMessage, Vec<u8>), PgError> {
        match self.client.receive().expect("an answer") {
            (b'd', body) => {
                let (message, wal) = decode_acceptor_message(&body).expect("a message");
                Ok((message, wal.to_vec()))
            }
            (b'E', body) => Err(parse_error(&body)),
            other => panic!("unexpected {other:?}"),
        }
    }

    pub fn receive(&mut self) -> Result<AcceptorMessage, PgError> {
        self.receive_wal().map(|(message, _)| message)
    }

    pub fn try_greet(&mut self) -> Result<AcceptorGreeting, PgError> {
        let greeting = ProposerMessage::Greeting(ProposerGreeting {
            proposer_id: self.id,
            cluster: self.cluster.clone(),
        });
        self.send(&greeting, &[]);
        match self.receive()? {
            AcceptorMessage::Greeting(greeting) => {
                self.version = greeting.configuration.version;
                Ok(greeting)
            }
            other => panic!("unexpected {other:?}"),
        }
    }

    pub fn greet(&mut self) -> AcceptorGreeting {
        self.try_greet().expect("greeted")
    }

    pub fn configure_first(&mut self, greeting: &AcceptorGreeting) {
        self.configure_members(vec![Member {
            id: greeting.member_id,
            incarnation: greeting.incarnation,
            host: "localhost".into(),
            port: 5454,
        }]);
    }

    /// In the two steps of a first configuration.
    pub fn configure_members(&mut self, members: Vec<Member>) {
        for generation in [ConfigurationVersion::PROVISIONAL, 1] {
            self.version = ConfigurationVersion {
                term: Term(1),
                generation,
            };
            let configuration = Configuration {
                lineage: Lineage(1),
                version: self.version,
                members: members.clone(),
                new_members: None,
            };
            let configure = ProposerMessage::Configure(Configure {
                term: Term(1),
                configuration: configuration.clone(),
            });
            self.send(&configure, &[]);
            match self.receive() {
                Ok(AcceptorMessage::ConfigureResponse(response)) => {
                    assert_eq!(response.configuration, configuration);
                }
                other => panic!("unexpected {other:?}"),
            }
        }
    }

    pub fn vote(&mut self) -> VoteResponse {
        let request = ProposerMessage::VoteRequest(VoteRequest {
            configuration_version: self.version,
            term: self.term,
        });
        self.send(&request, &[]);
        match self.receive() {
            Ok(AcceptorMessage::VoteResponse(response)) => response,
            other => panic!("unexpected {other:?}"),
        }
    }

    pub fn elect(&mut self, start_lsn: Lsn, timeline_files: Vec<TimelineFile>) -> AppendResponse {
        self.send_elected(start_lsn, timeline_files);
        self.append_response().expect("elected")
    }

    pub fn send_elected(&mut self, start_lsn: Lsn, timeline_files: Vec<TimelineFile>) {
        let elected = ProposerMessage::Elected(Elected {
            configuration_version: self.version,
            term: self.term,
            history: self.history.clone(),
            start_lsn,
            timeline_files,
        });
        self.send(&elected, &[]);
    }

    pub fn send_append(&mut self, begin_lsn: Lsn, wal: &[u8]) {
        let append = ProposerMessage::Append(Append {
            configuration_version: self.version,
            term: self.term,
            tli: self.history.tli_at(begin_lsn).unwrap_or(Tli(1)),
            begin_lsn,
            len: wal.len() as u32,
            commit_lsn: self.commit_lsn,
            truncate_lsn: self.truncate_lsn,
            reply_requested: wal.is_empty(),
        });
        self.send(&append, wal);
    }

    /// Appends and waits for the answer.
    pub fn append(&mut self, begin_lsn: Lsn, wal: &[u8]) -> Result<AppendResponse, PgError> {
        self.send_append(begin_lsn, wal);
        self.append_response()
    }

    /// Everything `wal` holds, in pieces of `piece` bytes, until all of it is acknowledged.
    pub fn append_all(&mut self, wal: &WalBuilder, piece: usize) -> AppendResponse {
        let mut lsn = wal.start();
        for bytes in wal.bytes().chunks(piece) {
            self.send_append(lsn, bytes);
            lsn = lsn + bytes.len() as u64;
        }
        loop {
            let response = self.append_response().expect("appended");
            if response.flush_lsn >= wal.position() {
                return response;
            }
        }
    }

    /// Tells commit_lsn in a heartbeat; returns the answer to it.
    pub fn commit(&mut self, commit_lsn: Lsn) -> AppendResponse {
        self.commit_lsn = commit_lsn;
        self.append(Lsn::INVALID, &[])
            .expect("a heartbeat's answer")
    }

    pub fn append_response(&mut self) -> Result<AppendResponse, PgError> {
        match self.receive()? {
            AcceptorMessage::AppendResponse(response) => Ok(response),
            other => panic!("unexpected {other:?}"),
        }
    }
}
