//! The slice of Postgres's protocol (version 3) that a proposer speaks to a safekeeper.
//!
//! ```text
//!   proposer                               safekeeper
//!     SSLRequest            ◄────────►       as sslmode says (safekeeper_wire::channel)
//!     StartupMessage        ─────────►
//!                           ◄────────►       R, p: a password, if one is asked for (safekeeper_wire::login)
//!                           ◄─────────       R AuthenticationOk, S ParameterStatus..., K, Z
//!     Q START_WAL_PUSH      ─────────►
//!                           ◄─────────       W CopyBothResponse
//!     d CopyData            ◄────────►       d CopyData       the codec's messages, both ways
//!                           ◄─────────       E ErrorResponse  ends it
//!
//!   offset  size
//!   0       1     type (not in StartupMessage)
//!   1       4     length, big-endian, counts itself but not the type
//!   5       ...   body
//! ```
//!
//! A length is held against a limit before anything is allocated for it, so a peer that sends
//! rubbish costs a connection and nothing else. Sockets are not known here: [`Inbox`] and
//! [`Outbox`] are the two halves of a connection, filled and drained by whoever owns the socket.

use std::fmt;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::time::{Duration, Instant};

use safekeeper_protocol::codec::MESSAGE_LEN_MAX;
use safekeeper_wire::login::{Login, LoginError, LoginStep};

const PROTOCOL_VERSION: u32 = 3 << 16;

/// Type and length.
const HEADER_LEN: usize = 5;

/// Longest body before WAL flows: parameters and errors are far shorter.
const HANDSHAKE_LEN_MAX: usize = 64 * 1024;

/// What one read asks for. Acknowledgements take 100 bytes, chunks of WAL (from a donor) 1 MiB.
const READ_LEN: usize = 16 * 1024;

/// An ErrorResponse.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerError {
    pub severity: String,
    pub code: String,
    pub message: String,
    pub detail: String,
    pub hint: String,
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if !self.detail.is_empty() {
            write!(f, " ({})", self.detail)?;
        }
        Ok(())
    }
}

impl ServerError {
    /// Fields are a letter and a text that ends with a zero byte. Damaged ones are left out: an
    /// error about an error helps nobody.
    fn parse(body: &[u8]) -> ServerError {
        let mut error = ServerError::default();
        for field in body.split(|&b| b == 0) {
            let Some((&kind, text)) = field.split_first() else {
                continue;
            };
            let text = String::from_utf8_lossy(text).into_owned();
            match kind {
                b'S' => error.severity = text,
                b'C' => error.code = text,
                b'M' => error.message = text,
                b'D' => error.detail = text,
                b'H' => error.hint = text,
                _ => {}
            }
        }
        error
    }
}

/// Why a connection can't go on.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("{0}")]
    Server(ServerError),
    #[error("safekeeper closed the connection")]
    Closed,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error(
        "message of type 0x{kind:02x} with a length of {len} bytes exceeds the limit of {limit}"
    )]
    Length { kind: u8, len: u32, limit: usize },
    #[error("unexpected message of type 0x{0:02x}")]
    Unexpected(u8),
    #[error(transparent)]
    Login(#[from] LoginError),
}

/// Opens a connection for pushing WAL on a stream that blocks, until a deadline of its own. Not a
/// byte is read beyond the last message. Returns how long the last question took to be answered, for
/// which the safekeeper asks no disk.
pub fn start_wal_push(
    stream: &mut (impl Read + Write),
    user: &str,
    mut login: Login,
) -> Result<Duration, WireError> {
    stream.write_all(&startup_message(user))?;
    while let (kind, body) = read_message(stream)?
        && kind != b'Z'
    {
        if kind == b'R' {
            if let LoginStep::Answer(answer) = login.on_request(&body)? {
                stream.write_all(&message(b'p', &answer))?;
            }
        } else if !matches!(kind, b'S' | b'K' | b'v') {
            return Err(WireError::Unexpected(kind));
        }
    }
    login.finish()?;
    let asked = Instant::now();
    stream.write_all(&message(b'Q', b"START_WAL_PUSH\0"))?;
    match read_message(stream)? {
        (b'W', _) => Ok(asked.elapsed()),
        (kind, _) => Err(WireError::Unexpected(kind)),
    }
}

fn startup_message(user: &str) -> Vec<u8> {
    startup_message_with(&[
        ("user", user),
        ("database", "replication"),
        ("replication", "true"),
        ("application_name", "walproposer"),
    ])
}

/// The message that opens a connection. Names and values hold no zero byte.
pub fn startup_message_with(parameters: &[(&str, &str)]) -> Vec<u8> {
    let mut body = PROTOCOL_VERSION.to_be_bytes().to_vec();
    for &(name, value) in parameters {
        for text in [name, value] {
            body.extend_from_slice(text.as_bytes());
            body.push(0);
        }
    }
    body.push(0);
    let mut out = len_word(body.len()).to_vec();
    out.extend_from_slice(&body);
    out
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![kind];
    out.extend_from_slice(&len_word(body.len()));
    out.extend_from_slice(body);
    out
}

/// The length word of a body of at most [`MESSAGE_LEN_MAX`] bytes and some.
fn len_word(body_len: usize) -> [u8; 4] {
    u32::try_from(body_len + 4)
        .expect("bodies are far below 4 GiB")
        .to_be_bytes()
}

/// The next message that is not a notice; errors become errors.
pub fn read_message(stream: &mut impl Read) -> Result<(u8, Vec<u8>), WireError> {
    loop {
        let mut header = [0; HEADER_LEN];
        stream.read_exact(&mut header).map_err(end_is_closed)?;
        let (kind, len) = parse_header(&header, HANDSHAKE_LEN_MAX)?;
        let mut body = vec![0; len];
        stream.read_exact(&mut body).map_err(end_is_closed)?;
        match kind {
            b'E' => return Err(WireError::Server(ServerError::parse(&body))),
            b'N' => {}
            _ => return Ok((kind, body)),
        }
    }
}

fn end_is_closed(error: io::Error) -> WireError {
    match error.kind() {
        ErrorKind::UnexpectedEof => WireError::Closed,
        ErrorKind::WouldBlock => io::Error::from(ErrorKind::TimedOut).into(),
        _ => error.into(),
    }
}

/// Type and length of the body.
fn parse_header(header: &[u8; HEADER_LEN], limit: usize) -> Result<(u8, usize), WireError> {
    let [kind, word @ ..] = *header;
    let len = u32::from_be_bytes(word);
    let body_len = len.checked_sub(4).and_then(|len| usize::try_from(len).ok());
    match body_len {
        Some(body_len) if body_len <= limit => Ok((kind, body_len)),
        _ => Err(WireError::Length { kind, len, limit }),
    }
}

/// What has arrived and was not looked at yet.
#[derive(Default)]
pub struct Inbox {
    buffer: Vec<u8>,
    /// The part of `buffer` that holds bytes.
    begin: usize,
    end: usize,
    /// The last read has left nothing behind, as far as it could know.
    is_drained: bool,
}

impl Inbox {
    /// Did the last read get less than it had room for?
    pub fn is_drained(&self) -> bool {
        self.is_drained
    }

    /// One read from `stream`. `false` if there is nothing (it does not block, or timed out).
    pub fn fill(&mut self, stream: &mut impl Read) -> Result<bool, WireError> {
        if self.begin == self.end {
            (self.begin, self.end) = (0, 0);
        }
        if self.buffer.len() - self.end < READ_LEN {
            self.buffer.copy_within(self.begin..self.end, 0);
            (self.begin, self.end) = (0, self.end - self.begin);
            // A message is at most MESSAGE_LEN_MAX long and taken out when it is there: so the
            // buffer stays below twice that.
            self.buffer
                .resize(self.end.next_multiple_of(READ_LEN) + READ_LEN, 0);
        }
        loop {
            match stream.read(&mut self.buffer[self.end..]) {
                Ok(0) => return Err(WireError::Closed),
                Ok(n) => {
                    self.end += n;
                    self.is_drained = self.end < self.buffer.len();
                    return Ok(true);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Payload of the next CopyData message that is there in full.
    pub fn next_payload(&mut self) -> Result<Option<&[u8]>, WireError> {
        loop {
            let arrived = &self.buffer[self.begin..self.end];
            let Some(header) = arrived.first_chunk() else {
                return Ok(None);
            };
            let (kind, len) = parse_header(header, MESSAGE_LEN_MAX)?;
            if arrived.len() < HEADER_LEN + len {
                return Ok(None);
            }
            let body_begin = self.begin + HEADER_LEN;
            self.begin = body_begin + len;
            let body = body_begin..body_begin + len;
            match kind {
                b'd' => return Ok(Some(&self.buffer[body])),
                b'E' => {
                    return Err(WireError::Server(ServerError::parse(&self.buffer[body])));
                }
                b'N' | b'S' => {}
                b'c' => return Err(WireError::Closed),
                _ => return Err(WireError::Unexpected(kind)),
            }
        }
    }
}

/// What is to be sent and was not taken by the socket yet.
#[derive(Default)]
pub struct Outbox {
    buffer: Vec<u8>,
    sent: usize,
}

impl Outbox {
    pub fn is_empty(&self) -> bool {
        self.sent == self.buffer.len()
    }

    /// Adds a CopyData message; `write` appends its payload. If it fails, nothing is added.
    pub fn push<E>(&mut self, write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Result<(), E> {
        let begin = self.begin_message();
        let written = write(&mut self.buffer);
        match &written {
            Ok(()) => self.end_message(begin, 0),
            Err(_) => self.buffer.truncate(begin),
        }
        written
    }

    /// Sends a CopyData message whose payload is what `write` appends, and `rest` behind it; what the
    /// stream does not take at once is kept. Only when nothing is kept.
    pub fn send(
        &mut self,
        stream: &mut impl Write,
        rest: &[u8],
        write: impl FnOnce(&mut Vec<u8>),
    ) -> io::Result<()> {
        debug_assert!(self.is_empty(), "messages would overtake one another");
        let begin = self.begin_message();
        write(&mut self.buffer);
        self.end_message(begin, rest.len());
        let parts = [IoSlice::new(&self.buffer), IoSlice::new(rest)];
        let taken = write_some(|| stream.write_vectored(&parts))?;
        self.sent = taken.min(self.buffer.len());
        let of_rest = taken - self.sent;
        if of_rest < rest.len() {
            self.buffer.extend_from_slice(&rest[of_rest..]);
        }
        Ok(())
    }

    /// Gives the socket as much as it takes; `true` if that was all.
    pub fn drain(&mut self, stream: &mut impl Write) -> io::Result<bool> {
        while !self.is_empty() {
            match write_some(|| stream.write(&self.buffer[self.sent..]))? {
                0 => return Ok(false),
                taken => self.sent += taken,
            }
        }
        // What an encrypted stream has taken may not be sent yet.
        match stream.flush() {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            flushed => flushed.map(|()| true),
        }
    }

    /// Where it begins: its payload goes behind what is there then.
    fn begin_message(&mut self) -> usize {
        if self.is_empty() {
            self.buffer.clear();
            self.sent = 0;
        }
        let begin = self.buffer.len();
        self.buffer.extend_from_slice(&[b'd', 0, 0, 0, 0]);
        begin
    }

    /// `rest` bytes of its payload are not in the buffer.
    fn end_message(&mut self, begin: usize, rest: usize) {
        let word = len_word(self.buffer.len() - begin - HEADER_LEN + rest);
        self.buffer[begin + 1..begin + HEADER_LEN].copy_from_slice(&word);
    }
}

/// One write that is not interrupted; 0 if the stream takes nothing now.
fn write_some(mut write: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match write() {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(0),
            written => return written,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safekeeper_wire::login::BindingMode;
    use safekeeper_wire::tls::EndPoint;

    /// A peer that says what it was told beforehand, in pieces, and keeps what it hears.
    struct Scripted {
        says: Vec<u8>,
        piece: usize,
        heard: Vec<u8>,
    }

    impl Read for Scripted {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            let n = self.piece.min(out.len()).min(self.says.len());
            out[..n].copy_from_slice(&self.says[..n]);
            self.says.drain(..n);
            Ok(n)
        }
    }

    impl Write for Scripted {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let n = self.piece.min(bytes.len());
            self.heard.extend_from_slice(&bytes[..n]);
            Ok(n)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Who has no password.
    fn stranger() -> Login {
        Login::new(None, EndPoint::Clear, BindingMode::Prefer)
    }

    fn peer(messages: &[(u8, &[u8])]) -> Scripted {
        let says = messages
            .iter()
            .flat_map(|(kind, body)| message(*kind, body))
            .collect();
        Scripted {
            says,
            piece: 3,
            heard: Vec::new(),
        }
    }

    const ERROR: &[u8] = b"SFATAL\0C55000\0Mno\0Dbecause\0Hdo so\0\0";

    #[test]
    fn the_handshake_ends_where_wal_begins() {
        let mut peer = peer(&[
            (b'R', &[0, 0, 0, 0]),
            (b'S', b"server_version\x0015.0\0"),
            (b'N', b"Mnever mind\0\0"),
            (b'K', &[0; 8]),
            (b'Z', b"I"),
            (b'W', &[0, 0, 0]),
            (b'd', b"first"),
        ]);
        start_wal_push(&mut peer, "me", stranger()).expect("a good handshake");
        let heard = String::from_utf8_lossy(&peer.heard).into_owned();
        assert!(
            heard.contains("\0user\0me\0") || heard.contains("user\0me\0"),
            "{heard:?}"
        );
        assert!(heard.ends_with("START_WAL_PUSH\0"), "{heard:?}");
        assert_eq!(peer.says, message(b'd', b"first"));
    }

    #[test]
    fn a_handshake_that_goes_wrong_says_why() {
        for (messages, want) in [
            (vec![(b'E', ERROR)], "no (because)"),
            (vec![], "safekeeper closed the connection"),
            (
                vec![(b'R', &b"\0\0\0\x0aSCRAM-SHA-256\0\0"[..])],
                "a password is asked for, and none is known",
            ),
            (vec![(b'T', &[][..])], "unexpected message of type 0x54"),
            (
                vec![(b'R', b"\0\0\0\0"), (b'Z', b"I"), (b'C', b"")],
                "unexpected message of type 0x43",
            ),
            (
                vec![(b'Z', b"I"), (b'W', b"\0\0\0")],
                "the server begins a session without having let us in",
            ),
        ] {
            let error = start_wal_push(&mut peer(&messages), "me", stranger()).expect_err(want);
            assert_eq!(error.to_string(), want);
        }
        let mut rubbish = Scripted {
            says: b"HTTP/1.1 400 ".to_vec(),
            piece: 9,
            heard: vec![],
        };
        let error =
            start_wal_push(&mut rubbish, "me", stranger()).expect_err("a length of a gigabyte");
        assert!(error.to_string().contains("exceeds the limit"), "{error}");
    }

    #[test]
    fn messages_are_put_together_from_pieces_of_any_size() {
        let long = vec![7u8; 100_000];
        for piece in [1, 2, 5, 4096, 1 << 20] {
            let mut peer = peer(&[
                (b'd', b"one"),
                (b'N', b"\0"),
                (b'd', &long),
                (b'd', b""),
                (b'E', ERROR),
            ]);
            peer.piece = piece;
            let mut inbox = Inbox::default();
            let mut got: Vec<Vec<u8>> = Vec::new();
            let error = loop {
                match inbox.next_payload() {
                    Ok(Some(payload)) => got.push(payload.to_vec()),
                    Ok(None) => assert!(inbox.fill(&mut peer).expect("more to come")),
                    Err(error) => break error,
                }
            };
            assert_eq!(
                got,
                [b"one".to_vec(), long.clone(), Vec::new()],
                "piece {piece}"
            );
            assert_eq!(error.to_string(), "no (because)");
        }
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_anything_is_allocated() {
        for len in [3u32, 0, u32::MAX, MESSAGE_LEN_MAX as u32 + 5] {
            let mut bytes = vec![b'd'];
            bytes.extend_from_slice(&len.to_be_bytes());
            let mut peer = Scripted {
                says: bytes,
                piece: 99,
                heard: vec![],
            };
            let mut inbox = Inbox::default();
            assert!(inbox.fill(&mut peer).expect("five bytes"));
            assert!(
                matches!(inbox.next_payload(), Err(WireError::Length { .. })),
                "{len}"
            );
            assert!(inbox.buffer.len() <= 2 * READ_LEN);
        }
    }

    #[test]
    fn what_the_socket_does_not_take_stays() {
        let mut outbox = Outbox::default();
        let add = |outbox: &mut Outbox, text: &'static [u8]| {
            outbox.push(|out| {
                out.extend_from_slice(text);
                Ok::<(), ()>(())
            })
        };
        add(&mut outbox, b"abc").expect("cannot fail");
        assert_eq!(
            outbox.push(|out| {
                out.push(1);
                Err(())
            }),
            Err(())
        );
        add(&mut outbox, b"").expect("cannot fail");
        let mut peer = peer(&[]);
        assert!(outbox.drain(&mut peer).expect("a peer that takes all"));
        assert_eq!(
            peer.heard,
            [message(b'd', b"abc"), message(b'd', b"")].concat()
        );
        assert!(outbox.is_empty());
    }

    #[test]
    fn a_message_in_two_parts_arrives_whole_whatever_the_socket_takes() {
        let wal: Vec<u8> = (0..=255).collect();
        for piece in [1, 4, 7, 8, 9, 100, 1000] {
            let mut outbox = Outbox::default();
            let mut peer = peer(&[]);
            peer.piece = piece;
            let write = |out: &mut Vec<u8>| out.extend_from_slice(b"abc");
            outbox.send(&mut peer, &wal, write).expect("open");
            assert!(peer.heard.len() <= piece, "one call to the socket");
            assert!(outbox.drain(&mut peer).expect("a peer that takes all"));
            let payload = [b"abc", &wal[..]].concat();
            assert_eq!(peer.heard, message(b'd', &payload), "piece {piece}");
        }
    }
}
