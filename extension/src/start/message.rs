//! What the candidate says to the postmaster, over a pipe.
//!
//! ```text
//!   offset  size
//!   0       1     kind: L log, N nothing to recover, W won, R refused, F failed
//!   1       4     length of what follows, little-endian
//!   5       ...   W: term 8, bytes completed 8, beyond the checkpoint 1, then term history and
//!                 configuration as on the wire; R: reason, a zero byte, hint; L, F: a text
//! ```
//!
//! Both ends are the same program, but the postmaster must not fall over whatever comes: lengths
//! are checked, and what can't be read is an error like any other.

use safekeeper_protocol::codec::{DecodeError, Input, encode_configuration, encode_history};
use safekeeper_protocol::{Lsn, Term, WonTerm};

/// A history of the greatest length takes 80 kB, a configuration 9 kB.
const LEN_MAX: usize = 256 * 1024;
const HEADER_LEN: usize = 5;

#[derive(Debug, PartialEq, Eq)]
pub enum FromCandidate {
    /// A line for the log; more follows.
    Log(String),
    NothingToRecover,
    Won {
        won: WonTerm,
        /// Bytes that were appended to the local log.
        completed: u64,
        /// There is WAL behind the last checkpoint's record.
        is_beyond_checkpoint: bool,
    },
    Refused {
        reason: String,
        hint: String,
    },
    Failed(String),
}

#[derive(Debug, PartialEq, Eq)]
pub struct MessageError(pub String);

impl FromCandidate {
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let kind = match self {
            FromCandidate::Log(text) => {
                body.extend_from_slice(text.as_bytes());
                b'L'
            }
            FromCandidate::NothingToRecover => b'N',
            FromCandidate::Won {
                won,
                completed,
                is_beyond_checkpoint,
            } => {
                body.extend_from_slice(&encode_won(won));
                body.extend_from_slice(&completed.to_be_bytes());
                body.push(u8::from(*is_beyond_checkpoint));
                b'W'
            }
            FromCandidate::Refused { reason, hint } => {
                body.extend_from_slice(reason.as_bytes());
                body.push(0);
                body.extend_from_slice(hint.as_bytes());
                b'R'
            }
            FromCandidate::Failed(text) => {
                body.extend_from_slice(text.as_bytes());
                b'F'
            }
        };
        let len = u32::try_from(body.len()).unwrap_or(u32::MAX);
        let mut message = vec![kind];
        message.extend_from_slice(&len.to_le_bytes());
        message.extend_from_slice(&body);
        message
    }

    fn decode(kind: u8, body: &[u8]) -> Result<FromCandidate, MessageError> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(match kind {
            b'L' => FromCandidate::Log(text(body)),
            b'N' => FromCandidate::NothingToRecover,
            b'W' => {
                let mut input = Input(body);
                let decoded = (|| {
                    let won = take_won(&mut input)?;
                    let (completed, beyond) = (input.u64()?, input.bool()?);
                    input.end()?;
                    Ok::<_, DecodeError>((won, completed, beyond))
                })();
                let (won, completed, is_beyond_checkpoint) =
                    decoded.map_err(|error| MessageError(error.to_string()))?;
                FromCandidate::Won {
                    won,
                    completed,
                    is_beyond_checkpoint,
                }
            }
            b'R' => {
                let at = body.iter().position(|&byte| byte == 0);
                let (reason, hint) = body.split_at(at.unwrap_or(body.len()));
                FromCandidate::Refused {
                    reason: text(reason),
                    hint: text(hint.get(1..).unwrap_or_default()),
                }
            }
            b'F' => FromCandidate::Failed(text(body)),
            kind => return Err(MessageError(format!("message of unknown kind {kind}"))),
        })
    }
}

/// Also how a won term lies in shared memory.
pub fn encode_won(won: &WonTerm) -> Vec<u8> {
    let mut bytes = won.term.0.to_be_bytes().to_vec();
    bytes.extend_from_slice(&won.sent_lsn.0.to_be_bytes());
    encode_history(&won.history, &mut bytes);
    encode_configuration(&won.configuration, &mut bytes);
    bytes
}

pub fn decode_won(bytes: &[u8]) -> Result<WonTerm, DecodeError> {
    let mut input = Input(bytes);
    let won = take_won(&mut input)?;
    input.end()?;
    Ok(won)
}

fn take_won(input: &mut Input<'_>) -> Result<WonTerm, DecodeError> {
    Ok(WonTerm {
        term: Term(input.u64()?),
        sent_lsn: Lsn(input.u64()?),
        history: input.history()?,
        configuration: input.configuration()?,
    })
}

/// Bytes from the pipe, until they are a message.
#[derive(Default)]
pub struct Inbox(Vec<u8>);

impl Inbox {
    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub fn next(&mut self) -> Result<Option<FromCandidate>, MessageError> {
        let Some(&[kind, a, b, c, d]) = self.0.first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        let len = u32::from_le_bytes([a, b, c, d]) as usize;
        if len > LEN_MAX {
            return Err(MessageError(format!("message of {len} bytes")));
        }
        let Some(body) = self.0.get(HEADER_LEN..HEADER_LEN + len) else {
            return Ok(None);
        };
        let message = FromCandidate::decode(kind, body)?;
        self.0.drain(..HEADER_LEN + len);
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safekeeper_protocol::{Configuration, TermEntry, TermHistory, Tli};

    fn messages() -> Vec<FromCandidate> {
        let entry = TermEntry {
            term: Term(3),
            tli: Tli(1),
            start_lsn: Lsn(0x100),
        };
        vec![
            FromCandidate::Log("waiting".to_owned()),
            FromCandidate::NothingToRecover,
            FromCandidate::Won {
                won: WonTerm {
                    term: Term(3),
                    history: TermHistory::new(vec![entry]).expect("one reign"),
                    configuration: Configuration::default(),
                    sent_lsn: Lsn(0x180),
                },
                completed: 17,
                is_beyond_checkpoint: true,
            },
            FromCandidate::Refused {
                reason: "diverged".to_owned(),
                hint: "rewind".to_owned(),
            },
            FromCandidate::Failed("broken".to_owned()),
        ]
    }

    #[test]
    fn messages_arrive_as_they_were_sent_in_whatever_pieces() {
        let bytes: Vec<u8> = messages().iter().flat_map(FromCandidate::encode).collect();
        for piece in [1, 3, 7, 4096] {
            let (mut inbox, mut got) = (Inbox::default(), Vec::new());
            for part in bytes.chunks(piece) {
                inbox.push(part);
                while let Some(message) = inbox.next().expect("sound") {
                    got.push(message);
                }
            }
            assert_eq!(got, messages(), "in pieces of {piece}");
        }
    }

    #[test]
    fn nonsense_is_an_error_and_costs_no_memory() {
        for bytes in [
            &[b'L', 255, 255, 255, 255][..],
            &[b'X', 0, 0, 0, 0],
            &[b'W', 1, 0, 0, 0, 7],
        ] {
            let mut inbox = Inbox::default();
            inbox.push(bytes);
            assert!(inbox.next().is_err(), "{bytes:?}");
        }
    }
}
