//! The slice of Postgres's v3 protocol we speak, and the buffers between it and a socket.
//!
//! ```text
//!   before the startup packet      4 length (itself included), 4 code, rest
//!   ever after                     1 tag, 4 length (itself included), body
//! ```
//!
//! A length word is held against a limit before a byte is made room for: 10,000 bytes before and
//! during authentication, as in Postgres, and what the command at hand may need after it. Numbers
//! are big-endian. A peer can send whatever it likes; the worst that comes of it is an
//! [`ErrorReport`] and a closed connection.
//!
//! [`Input`] gives frames as slices of its buffer, so WAL goes from the socket to the file without
//! a copy. A large frame is read up to its own end and not beyond, so that the next one begins at
//! the front of an empty buffer and nothing needs to be moved.
//!
//! Not here: the socket and its encryption (channel.rs), authentication, and what any command means.

use std::io::{self, IoSlice};

use crate::channel::Channel;

/// Longest startup packet and longest message before a command has been accepted, in bytes
/// (`MAX_STARTUP_PACKET_LENGTH` in `libpq/pqcomm.h`).
pub const LEN_MAX_UNAUTHENTICATED: usize = 10_000;

/// Read at once when no large frame is known to be on its way, in bytes: several hundred commits'
/// worth, and small enough for every connection to have it.
const READ_AHEAD: usize = 128 * 1024;

/// An output buffer that grew beyond this is given back, in bytes.
const OUTPUT_KEPT: usize = 256 * 1024;

/// Protocol 3.0, the version we answer in.
pub const PROTOCOL_3_0: u32 = 3 << 16;

/// What a peer is told when something can't be done: Postgres's fields of an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorReport {
    pub sqlstate: &'static str,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
}

impl ErrorReport {
    pub fn new(sqlstate: &'static str, message: impl Into<String>) -> ErrorReport {
        ErrorReport {
            sqlstate,
            message: message.into(),
            detail: None,
            hint: None,
        }
    }

    pub fn detail(mut self, detail: impl Into<String>) -> ErrorReport {
        self.detail = Some(detail.into());
        self
    }

    pub fn hint(mut self, hint: impl Into<String>) -> ErrorReport {
        self.hint = Some(hint.into());
        self
    }

    /// Bytes that are not our protocol.
    pub fn protocol(message: impl Into<String>) -> ErrorReport {
        ErrorReport::new("08P01", message)
    }
}

/// Why a command or a connection came to its end.
#[derive(Debug)]
pub enum ConnectionError {
    /// Nothing more can be said: the peer is gone, or does not listen.
    Lost(io::Error),
    /// The command failed and the connection goes on.
    Command(ErrorReport),
    /// The peer is told, then the connection is closed.
    Fatal(ErrorReport),
}

impl From<io::Error> for ConnectionError {
    fn from(error: io::Error) -> ConnectionError {
        ConnectionError::Lost(error)
    }
}

/// The peer has closed its side.
pub fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "closed by the peer")
}

/// How reading ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// There is more than before.
    Some,
    /// Nothing has arrived, or not within the socket's read timeout.
    Nothing,
    /// The peer has closed its side.
    Closed,
}

/// Whether [`Input::fill`] waits, up to the socket's read timeout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    Yes,
    No,
}

/// One message of the peer.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    pub tag: u8,
    pub body: &'a [u8],
}

/// What has arrived and was not looked at yet: `buffer[begin..end]`.
#[derive(Debug)]
pub struct Input {
    buffer: Vec<u8>,
    begin: usize,
    end: usize,
    /// Length of the frame that begins at `begin`, as far as known: what is needed at least.
    wanted: usize,
}

impl Default for Input {
    fn default() -> Input {
        Input {
            buffer: vec![0; READ_AHEAD],
            begin: 0,
            end: 0,
            wanted: 0,
        }
    }
}

impl Input {
    /// The next frame if it is here as a whole. `len_max` is for its length word.
    pub fn next_frame(&mut self, len_max: usize) -> Result<Option<Frame<'_>>, ErrorReport> {
        let Some((tag, len)) = self.frame_len(len_max)? else {
            return Ok(None);
        };
        Ok(self.take(len).map(|frame| Frame {
            tag,
            body: &frame[5..],
        }))
    }

    /// Whether [`Input::next_frame`] would return one.
    pub fn has_frame(&mut self, len_max: usize) -> Result<bool, ErrorReport> {
        let len = self.frame_len(len_max)?.map(|(_, len)| len);
        Ok(len.is_some_and(|len| len <= self.end - self.begin))
    }

    /// Tag and whole length of the next frame, once its head is here.
    fn frame_len(&mut self, len_max: usize) -> Result<Option<(u8, usize)>, ErrorReport> {
        let available = &self.buffer[self.begin..self.end];
        let Some((&[tag, a, b, c, d], _)) = available.split_first_chunk::<5>() else {
            self.wanted = 5;
            return Ok(None);
        };
        let len = u32::from_be_bytes([a, b, c, d]) as usize;
        if !(4..=len_max).contains(&len) {
            return Err(ErrorReport::protocol(format!(
                "invalid message length {len} after tag 0x{tag:02x}, expected 4 to {len_max}"
            )));
        }
        self.wanted = 1 + len;
        Ok(Some((tag, 1 + len)))
    }

    /// The next packet of the form that has no tag yet, without its length word.
    pub fn next_startup_packet(&mut self) -> Result<Option<&[u8]>, ErrorReport> {
        let available = &self.buffer[self.begin..self.end];
        let Some((word, _)) = available.split_first_chunk::<4>() else {
            self.wanted = 4;
            return Ok(None);
        };
        let len = u32::from_be_bytes(*word) as usize;
        if !(8..=LEN_MAX_UNAUTHENTICATED).contains(&len) {
            return Err(ErrorReport::protocol(format!(
                "invalid length of startup packet: {len}"
            )));
        }
        Ok(self.take(len).map(|packet| &packet[4..]))
    }

    fn take(&mut self, len: usize) -> Option<&[u8]> {
        if self.end - self.begin < len {
            self.wanted = len;
            return None;
        }
        let begin = self.begin;
        self.begin += len;
        self.wanted = 0;
        Some(&self.buffer[begin..begin + len])
    }

    /// Something has arrived that is not a whole frame.
    pub fn is_inside_frame(&self) -> bool {
        self.begin < self.end
    }

    /// What has arrived.
    pub fn arrived(&self) -> &[u8] {
        &self.buffer[self.begin..self.end]
    }

    /// Forget what has arrived.
    pub fn discard(&mut self) {
        (self.begin, self.end, self.wanted) = (0, 0, 0);
    }

    /// Receive once.
    pub fn fill(&mut self, channel: &mut Channel, wait: Wait) -> io::Result<Filled> {
        self.fill_with(|room| channel.receive(room, wait))
    }

    /// Take in what `receive` puts at the front of the room it is given: so many bytes, 0 for the
    /// end of the stream. Tests speak to a decoder through this, without a socket.
    pub fn fill_with(
        &mut self,
        receive: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<Filled> {
        let room = self.make_room();
        match receive(&mut self.buffer[room]) {
            Ok(0) => Ok(Filled::Closed),
            Ok(n) => {
                self.end += n;
                Ok(Filled::Some)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Filled::Nothing),
            Err(error) => Err(error),
        }
    }

    /// Where the next bytes go; never empty.
    fn make_room(&mut self) -> std::ops::Range<usize> {
        if self.begin == self.end {
            (self.begin, self.end) = (0, 0);
        }
        if self.begin + self.wanted > self.buffer.len() || self.end == self.buffer.len() {
            self.buffer.copy_within(self.begin..self.end, 0);
            (self.begin, self.end) = (0, self.end - self.begin);
        }
        if self.buffer.len() < self.wanted {
            self.buffer.resize(self.wanted, 0);
        }
        let limit = self.begin + self.wanted.max(READ_AHEAD);
        self.end..limit.min(self.buffer.len())
    }
}

/// What is to be sent, message after message.
#[derive(Debug, Default)]
pub struct Output {
    buffer: Vec<u8>,
}

impl Output {
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Send all of it, waiting for the peer up to the socket's write timeout.
    pub fn send(&mut self, channel: &mut Channel) -> io::Result<()> {
        self.send_with(channel, &[])
    }

    /// The same, and behind it bytes that lie elsewhere: the rest of a message begun with
    /// [`Output::copy_data_begin`].
    pub fn send_with(&mut self, channel: &mut Channel, rest: &[u8]) -> io::Result<()> {
        channel.send_all(&mut [IoSlice::new(&self.buffer), IoSlice::new(rest)])?;
        self.buffer.clear();
        self.buffer.shrink_to(OUTPUT_KEPT);
        Ok(())
    }

    /// The beginning of a copy's message, of which `rest_len` bytes are still to come.
    pub fn copy_data_begin(&mut self, rest_len: usize, begin: impl FnOnce(&mut Vec<u8>)) {
        let start = self.buffer.len();
        self.buffer.extend_from_slice(&[b'd', 0, 0, 0, 0]);
        begin(&mut self.buffer);
        let len = u32::try_from(self.buffer.len() - start - 1 + rest_len)
            .expect("every message we build is far below 4 GiB");
        self.buffer[start + 1..start + 5].copy_from_slice(&len.to_be_bytes());
    }

    /// One message: `tag`, length, and what `body` appends.
    pub fn message(&mut self, tag: u8, body: impl FnOnce(&mut Vec<u8>)) {
        let result: Result<(), std::convert::Infallible> = self.try_message(tag, |out| {
            body(out);
            Ok(())
        });
        match result {
            Ok(()) => {}
            Err(never) => match never {},
        }
    }

    /// One message, or none of it if `body` fails.
    pub fn try_message<E>(
        &mut self,
        tag: u8,
        body: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        let start = self.buffer.len();
        self.buffer.extend_from_slice(&[tag, 0, 0, 0, 0]);
        if let Err(error) = body(&mut self.buffer) {
            self.buffer.truncate(start);
            return Err(error);
        }
        let len = u32::try_from(self.buffer.len() - start - 1)
            .expect("every message we build is far below 4 GiB");
        self.buffer[start + 1..start + 5].copy_from_slice(&len.to_be_bytes());
        Ok(())
    }

    pub fn copy_data(&mut self, body: impl FnOnce(&mut Vec<u8>)) {
        self.message(b'd', body);
    }

    pub fn copy_both(&mut self) {
        // Overall format 0 (text), no columns: as walsender sends it.
        self.message(b'W', |out| out.extend_from_slice(&[0, 0, 0]));
    }

    pub fn copy_done(&mut self) {
        self.message(b'c', |_| {});
    }

    pub fn command_complete(&mut self, tag: &str) {
        self.message(b'C', |out| put_cstr(out, tag));
    }

    /// Always outside a transaction: there are none here.
    pub fn ready_for_query(&mut self) {
        self.message(b'Z', |out| out.push(b'I'));
    }

    pub fn authentication_ok(&mut self) {
        self.message(b'R', |out| out.extend_from_slice(&0u32.to_be_bytes()));
    }

    /// `AuthenticationSASL`: the mechanisms that are offered.
    pub fn authentication_sasl(&mut self, mechanisms: &[&str]) {
        self.message(b'R', |out| {
            out.extend_from_slice(&10u32.to_be_bytes());
            for mechanism in mechanisms {
                put_cstr(out, mechanism);
            }
            out.push(0);
        });
    }

    /// `AuthenticationSASLContinue` or, at the end, `AuthenticationSASLFinal`.
    pub fn authentication_sasl_data(&mut self, is_final: bool, data: &str) {
        let code: u32 = if is_final { 12 } else { 11 };
        self.message(b'R', |out| {
            out.extend_from_slice(&code.to_be_bytes());
            out.extend_from_slice(data.as_bytes());
        });
    }

    pub fn parameter_status(&mut self, name: &str, value: &str) {
        self.message(b'S', |out| {
            put_cstr(out, name);
            put_cstr(out, value);
        });
    }

    pub fn backend_key_data(&mut self, pid: u32, key: u32) {
        self.message(b'K', |out| {
            out.extend_from_slice(&pid.to_be_bytes());
            out.extend_from_slice(&key.to_be_bytes());
        });
    }

    /// "I speak 3.0 and don't know these options."
    pub fn negotiate_protocol_version(&mut self, unrecognized: &[String]) {
        self.message(b'v', |out| {
            out.extend_from_slice(&PROTOCOL_3_0.to_be_bytes());
            out.extend_from_slice(&(unrecognized.len() as u32).to_be_bytes());
            for option in unrecognized {
                put_cstr(out, option);
            }
        });
    }

    /// `severity` is `ERROR` or `FATAL`.
    pub fn error(&mut self, severity: &str, report: &ErrorReport) {
        self.message(b'E', |out| {
            let mut field = |code: u8, text: &str| {
                out.push(code);
                put_cstr(out, text);
            };
            field(b'S', severity);
            field(b'V', severity);
            field(b'C', report.sqlstate);
            field(b'M', &report.message);
            if let Some(detail) = &report.detail {
                field(b'D', detail);
            }
            if let Some(hint) = &report.hint {
                field(b'H', hint);
            }
            out.push(0);
        });
    }

    /// A result of one row. A column is its name, its type and its value.
    pub fn one_row(&mut self, columns: &[(&str, ColumnType, Option<&[u8]>)]) {
        let count = u16::try_from(columns.len()).expect("our results have a handful of columns");
        self.message(b'T', |out| {
            out.extend_from_slice(&count.to_be_bytes());
            for (name, column_type, _) in columns {
                put_cstr(out, name);
                out.extend_from_slice(&0u32.to_be_bytes()); // of no table
                out.extend_from_slice(&0u16.to_be_bytes());
                let (oid, len) = column_type.oid_and_len();
                out.extend_from_slice(&oid.to_be_bytes());
                out.extend_from_slice(&len.to_be_bytes());
                out.extend_from_slice(&(-1i32).to_be_bytes()); // no modifier
                out.extend_from_slice(&0u16.to_be_bytes()); // text
            }
        });
        self.message(b'D', |out| {
            out.extend_from_slice(&count.to_be_bytes());
            for (_, _, value) in columns {
                match value {
                    None => out.extend_from_slice(&(-1i32).to_be_bytes()),
                    Some(value) => {
                        let len = u32::try_from(value.len()).expect("history files are small");
                        out.extend_from_slice(&len.to_be_bytes());
                        out.extend_from_slice(value);
                    }
                }
            }
        });
    }
}

/// Types of our result columns, in text format.
#[derive(Clone, Copy, Debug)]
pub enum ColumnType {
    Text,
    Int4,
    Int8,
}

impl ColumnType {
    /// From `catalog/pg_type.dat`.
    fn oid_and_len(self) -> (u32, i16) {
        match self {
            ColumnType::Text => (25, -1),
            ColumnType::Int4 => (23, 4),
            ColumnType::Int8 => (20, 8),
        }
    }
}

/// Text as the protocol ends it; a zero byte inside would end it early.
fn put_cstr(out: &mut Vec<u8>, text: &str) {
    out.extend(text.bytes().filter(|byte| *byte != 0));
    out.push(0);
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpStream;

    use super::*;
    use std::net::TcpListener;

    fn input_of(bytes: &[u8]) -> Input {
        let mut buffer = bytes.to_vec();
        buffer.resize(bytes.len().max(READ_AHEAD), 0);
        Input {
            buffer,
            begin: 0,
            end: bytes.len(),
            wanted: 0,
        }
    }

    #[test]
    fn a_length_word_is_refused_before_its_bytes_arrive() {
        for (bytes, len_max) in [
            ([b'Q', 0, 0, 0, 3], 100),
            ([b'Q', 0, 0, 0, 101], 100),
            ([b'd', 0xFF, 0xFF, 0xFF, 0xFF], 1 << 21),
        ] {
            assert!(input_of(&bytes).next_frame(len_max).is_err(), "{bytes:?}");
        }
        for len in [0u32, 7, 10_001, u32::MAX] {
            let mut input = input_of(&len.to_be_bytes());
            assert!(input.next_startup_packet().is_err(), "{len}");
        }
    }

    #[test]
    fn frames_are_cut_out_of_any_pieces() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound");
        let sizes = [0usize, 1, 10, 60_000, 300_000, 5, 1_000_000, 3];
        let writer = std::thread::spawn(move || {
            let mut socket = TcpStream::connect(address).expect("connected");
            for (i, size) in sizes.into_iter().enumerate() {
                let mut output = Output::default();
                output.message(b'a' + i as u8, |out| out.resize(out.len() + size, i as u8));
                for piece in output.buffer.chunks(77_777) {
                    socket.write_all(piece).expect("written");
                }
            }
        });
        let (socket, _) = listener.accept().expect("accepted");
        let mut channel = Channel::from(socket);
        let mut input = Input::default();
        for (i, size) in sizes.into_iter().enumerate() {
            loop {
                if let Some(frame) = input.next_frame(1 << 21).expect("valid") {
                    assert_eq!(frame.tag, b'a' + i as u8);
                    assert_eq!(frame.body.len(), size);
                    assert!(frame.body.iter().all(|byte| *byte == i as u8));
                    break;
                }
                let filled = input.fill(&mut channel, Wait::Yes).expect("read");
                assert_eq!(filled, Filled::Some);
            }
        }
        writer.join().expect("no panic");
        assert_eq!(
            input.fill(&mut channel, Wait::Yes).expect("read"),
            Filled::Closed
        );
        assert!(!input.is_inside_frame());
    }

    #[test]
    fn an_error_has_the_fields_libpq_expects() {
        let mut output = Output::default();
        output.error(
            "FATAL",
            &ErrorReport::new("58P01", "gone").hint("try\0 later"),
        );
        assert_eq!(
            output.buffer,
            b"E\0\0\0\x2bSFATAL\0VFATAL\0C58P01\0Mgone\0Htry later\0\0"
        );
    }

    #[test]
    fn a_message_that_fails_leaves_nothing() {
        let mut output = Output::default();
        let failed = output.try_message(b'd', |out| {
            out.push(1);
            Err("no")
        });
        assert_eq!(failed, Err("no"));
        assert!(output.is_empty());
    }
}
