//! A connection as the proposer reads it: the handshake, then CopyData with messages inside.
//!
//! The first byte of the input is the size of the pieces in which the rest arrives. It must be
//! understood the same in pieces as in one, and cost no more memory than two messages.
//!
//! The module under test is the extension's, which needs no Postgres; it is included as it is, so
//! that neither the extension's build nor the daemon's knows of the other's.

use std::io::{self, Read, Write};

use allocation_counter::{measure, opt_out};
use safekeeper_protocol::codec::{MESSAGE_LEN_MAX, decode_acceptor_message};
use safekeeper_wire::login::{BindingMode, Login, Password};
use safekeeper_wire::tls::EndPoint;

#[allow(dead_code)]
#[path = "../../../extension/src/pgwire.rs"]
mod pgwire;

use pgwire::{Inbox, start_wal_push};

/// Twice the longest message, as Inbox says, and twice that while it is being moved.
const HEAP_MAX: u64 = 4 * MESSAGE_LEN_MAX as u64;

pub fn check(input: &[u8]) {
    let Some((&piece, stream)) = input.split_first() else {
        return;
    };
    let whole = converse(stream, usize::MAX);
    let in_pieces = converse(stream, 1 + usize::from(piece));
    assert_eq!(whole, in_pieces, "in pieces of {}", 1 + usize::from(piece));
}

/// A safekeeper that says `says` and does not listen.
struct Peer<'a> {
    says: &'a [u8],
    piece: usize,
}

impl Read for Peer<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let len = room.len().min(self.piece).min(self.says.len());
        room[..len].copy_from_slice(&self.says[..len]);
        self.says = &self.says[len..];
        Ok(len)
    }
}

impl Write for Peer<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// All that was understood of `stream`, in order, as text.
fn converse(stream: &[u8], piece: usize) -> Vec<String> {
    let mut said = Vec::new();
    let mut note = |what: String| opt_out(|| said.push(what));
    let heap = measure(|| {
        let mut peer = Peer {
            says: stream,
            piece,
        };
        let login = Login::new(
            Some(Password::new("secret".to_owned())),
            EndPoint::Clear,
            BindingMode::Prefer,
        );
        if let Err(error) = start_wal_push(&mut peer, "me", login) {
            return note(error.to_string());
        }
        let mut inbox = Inbox::default();
        loop {
            match inbox.next_payload() {
                Ok(Some(payload)) => note(format!("{:?}", decode_acceptor_message(payload))),
                Ok(None) => {
                    if let Err(error) = inbox.fill(&mut peer) {
                        return note(error.to_string());
                    }
                }
                Err(error) => return note(error.to_string()),
            }
        }
    })
    .bytes_max;
    assert!(heap <= HEAP_MAX, "{heap} bytes on the heap");
    said
}

/// A session that goes well, one that is refused, one that ends with an error.
pub fn seeds() -> Vec<Vec<u8>> {
    const ERROR: &[u8] = b"SFATAL\0VFATAL\0C55000\0Mno\0Dbecause\0Hdo so\0\0";
    let handshake = [
        message(b'R', &[0, 0, 0, 0]),
        message(b'S', b"server_version\x0015.0\0"),
        message(b'N', b"Mnever mind\0\0"),
        message(b'K', &[0; 8]),
        message(b'Z', b"I"),
        message(b'W', &[0, 0, 0]),
    ]
    .concat();
    let append_response = [b"A\x01".as_slice(), &[0; 68]].concat();
    let read_response = [b"R\x01".as_slice(), &[0; 19], &[3], &[0; 8], b"wal"].concat();
    vec![
        [
            &[2][..],
            &handshake,
            &message(b'd', &append_response),
            &message(b'S', b"a\0b\0"),
            &message(b'd', &read_response),
            &message(b'E', ERROR),
        ]
        .concat(),
        [&[0][..], &handshake, &message(b'c', b"")].concat(),
        [&[5][..], &message(b'R', &[0, 0, 0, 10])].concat(),
        [&[9][..], &message(b'E', ERROR)].concat(),
    ]
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(4 + body.len()).expect("seeds are short");
    [&[kind][..], &len.to_be_bytes(), body].concat()
}
