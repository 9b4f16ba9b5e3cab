//! A replication connection spoken by hand, to a primary or to a safekeeper, and what it hears as text:
//! so that the two can be laid side by side.
//!
//! ```text
//!   T systemid:25:-1 timeline:23:4 …                    a result's columns with their types
//!   D 7312…|1|0/3000148|NULL                            a row
//!   C IDENTIFY_SYSTEM                                   a completion
//!   E ERROR 42704 replication slot "x" does not exist   an error, then its detail, hint and the rest
//!   W · c · w 0/3000000-0/3000148 · k 0/3000148         a copy, and what is in it
//!   Z I                                                 ready for the next command
//! ```
//!
//! An error's source file, line and routine are left out: no client acts on them.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use safekeeper_protocol::Lsn;

use crate::poll::SOON;
use crate::postgres::Postgres;
use crate::safekeeper::Safekeeper;

/// One connection. See the head of this file.
pub struct WalSender {
    stream: Box<dyn Stream>,
    greeting: Vec<String>,
}

trait Stream: Read + Write + Send {}
impl Stream for TcpStream {}
impl Stream for UnixStream {}

impl WalSender {
    /// A physical walsender of this server.
    pub fn of_primary(primary: &Postgres) -> WalSender {
        let stream = UnixStream::connect(primary.socket_dir().join(".s.PGSQL.5432"));
        let stream = stream.expect("the server listens");
        stream
            .set_read_timeout(Some(SOON))
            .expect("a time that is not zero");
        WalSender::open(Box::new(stream))
    }

    pub fn of_safekeeper(safekeeper: &Safekeeper) -> WalSender {
        let stream = TcpStream::connect(safekeeper.address()).expect("the daemon listens");
        stream
            .set_read_timeout(Some(SOON))
            .expect("a time that is not zero");
        WalSender::open(Box::new(stream))
    }

    fn open(stream: Box<dyn Stream>) -> WalSender {
        let mut connection = WalSender {
            stream,
            greeting: Vec::new(),
        };
        let mut body = 0x0003_0000_u32.to_be_bytes().to_vec();
        for text in [
            "user",
            "postgres",
            "replication",
            "true",
            "application_name",
            "by_hand",
        ] {
            body.extend_from_slice(text.as_bytes());
            body.push(0);
        }
        body.push(0);
        let len = u32::try_from(body.len() + 4).expect("it is short");
        let packet = [&len.to_be_bytes()[..], &body].concat();
        connection
            .stream
            .write_all(&packet)
            .expect("the server reads");
        connection.greeting = connection.until_ready();
        connection
    }

    /// What it said before it was ready for the first command.
    pub fn greeting(&self) -> &[String] {
        &self.greeting
    }

    /// Sends a command and hears all there is to hear, up to where it is ready for the next one.
    pub fn command(&mut self, text: &str) -> Vec<String> {
        self.send(b'Q', &[text.as_bytes(), &[0]].concat());
        self.until_ready()
    }

    /// The same for a command that begins a copy: up to there, if it comes so far.
    pub fn begin_copy(&mut self, text: &str) -> Vec<String> {
        self.send(b'Q', &[text.as_bytes(), &[0]].concat());
        self.until(|line| line == "W" || line.starts_with('Z'))
    }

    /// In a copy: up to the message of WAL that ends there. Messages about the time are left out, and
    /// what comes in several is put together.
    pub fn wal_up_to(&mut self, end: Lsn) -> (Lsn, Vec<u8>) {
        let (mut begin, mut wal) = (None, Vec::new());
        loop {
            let (tag, body) = self.frame().expect("the stream goes on");
            assert_eq!(tag, b'd', "{}", line(tag, &body));
            if body[0] != b'w' {
                continue;
            }
            let lsn = lsn_at(&body, 1);
            let begin = *begin.get_or_insert(lsn);
            assert_eq!(lsn, begin + wal.len() as u64, "a gap");
            wal.extend_from_slice(&body[25..]);
            if lsn + (body.len() - 25) as u64 >= end {
                return (begin, wal);
            }
        }
    }

    /// After our CopyDone: all but WAL and times that are on their way still.
    pub fn until_copy_ends(&mut self) -> Vec<String> {
        let mut lines = self.until_ready();
        lines.retain(|line| !line.starts_with('w') && !line.starts_with('k'));
        lines
    }

    /// Where the source ends the copy: its WAL, put together, and what it says then. Ours ends with its.
    pub fn until_copy_ends_by_itself(&mut self) -> Vec<String> {
        let mut lines: Vec<String> = Vec::new();
        let mut streamed: Option<(String, String)> = None;
        loop {
            for line in self.until(|line| line == "c" || line.starts_with('w')) {
                if let Some((begin, end)) = line.strip_prefix("w ").and_then(|r| r.split_once('-'))
                {
                    let first = streamed.take().map_or(begin.to_owned(), |(first, last)| {
                        assert_eq!(last, begin, "a gap");
                        first
                    });
                    streamed = Some((first, end.to_owned()));
                } else if !line.starts_with('k') {
                    lines.push(line);
                }
            }
            if lines
                .last()
                .is_some_and(|line| line == "c" || line == "hung up")
            {
                break;
            }
        }
        let (begin, end) = streamed.expect("some WAL");
        lines.push(format!("w {begin}-{end}"));
        self.send(b'c', b"");
        lines.extend(self.until_ready());
        lines
    }

    pub fn send(&mut self, tag: u8, body: &[u8]) {
        let len = u32::try_from(body.len() + 4).expect("it is short");
        let message = [&[tag][..], &len.to_be_bytes(), body].concat();
        self.stream.write_all(&message).expect("the server reads");
    }

    /// Up to where it is ready for the next command, or hangs up.
    pub fn until_ready(&mut self) -> Vec<String> {
        self.until(|line| line.starts_with('Z'))
    }

    fn until(&mut self, is_last: impl Fn(&str) -> bool) -> Vec<String> {
        let mut lines = Vec::new();
        while let Some((tag, body)) = self.frame() {
            let line = line(tag, &body);
            let last = is_last(&line);
            lines.push(line);
            if last {
                return lines;
            }
        }
        lines.push("hung up".to_owned());
        lines
    }

    /// `None` at the end of the stream.
    fn frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut head = [0; 5];
        self.stream.read_exact(&mut head).ok()?;
        let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        assert!((4..16 << 20).contains(&len), "a message of {len} bytes");
        let mut body = vec![0; len - 4];
        self.stream.read_exact(&mut body).ok()?;
        Some((head[0], body))
    }
}

fn line(tag: u8, body: &[u8]) -> String {
    match tag {
        b'T' => format!("T {}", columns(body)),
        b'D' => format!("D {}", values(body)),
        b'E' | b'N' => format!("{} {}", tag as char, report(body)),
        b'C' => format!("C {}", strings(body).join(" ")),
        b'S' => format!("S {}", strings(body).join(" = ")),
        b'd' if body.first() == Some(&b'w') && body.len() >= 25 => {
            let begin = lsn_at(body, 1);
            format!("w {begin}-{}", begin + (body.len() - 25) as u64)
        }
        b'd' if body.first() == Some(&b'k') => format!("k {}", lsn_at(body, 1)),
        b'Z' => format!("Z {}", body[0] as char),
        // A key that opens nothing here, and the form of a copy that has none.
        b'K' | b'W' => (tag as char).to_string(),
        _ => format!("{} {body:?}", tag as char)
            .trim_end_matches(" []")
            .to_owned(),
    }
}

fn lsn_at(body: &[u8], at: usize) -> Lsn {
    Lsn(u64::from_be_bytes(
        body[at..at + 8].try_into().expect("eight bytes"),
    ))
}

fn strings(body: &[u8]) -> Vec<String> {
    let body = body.strip_suffix(&[0]).unwrap_or(body);
    body.split(|byte| *byte == 0)
        .map(|text| String::from_utf8_lossy(text).into_owned())
        .collect()
}

fn columns(mut body: &[u8]) -> String {
    let mut columns = Vec::new();
    let count = take(&mut body, 2)[1];
    for _ in 0..count {
        let end = body.iter().position(|byte| *byte == 0).expect("a name");
        let name = String::from_utf8_lossy(take(&mut body, end)).into_owned();
        take(&mut body, 1);
        let rest = take(&mut body, 18);
        let type_oid = u32::from_be_bytes(rest[6..10].try_into().expect("four bytes"));
        let size = i16::from_be_bytes([rest[10], rest[11]]);
        // Where a column comes from and its modifier differ by version, and nobody looks.
        assert_eq!(rest[16..], [0, 0], "{name} is not sent as text");
        columns.push(format!("{name}:{type_oid}:{size}"));
    }
    columns.join(" ")
}

fn values(mut body: &[u8]) -> String {
    let mut values = Vec::new();
    let count = take(&mut body, 2)[1];
    for _ in 0..count {
        let len = i32::from_be_bytes(take(&mut body, 4).try_into().expect("four bytes"));
        values.push(match usize::try_from(len) {
            Ok(len) => take(&mut body, len).escape_ascii().to_string(),
            Err(_) => "NULL".to_owned(),
        });
    }
    values.join("|")
}

/// Severity, code and text of an error, and after them what else a client may show.
fn report(body: &[u8]) -> String {
    let fields = strings(body);
    let field = |code: char| fields.iter().find_map(|field| field.strip_prefix(code));
    let mut text = ['V', 'C', 'M']
        .map(|code| field(code).unwrap_or("?"))
        .join(" ");
    assert_eq!(field('S'), field('V'), "messages are in English");
    for field in fields.iter().filter(|field| !field.is_empty()) {
        if !"SVCMFLR".contains(&field[..1]) {
            text.push_str(&format!(" [{field}]"));
        }
    }
    text
}

fn take<'a>(body: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (taken, rest) = body.split_at(len);
    *body = rest;
    taken
}
