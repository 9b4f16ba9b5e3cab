//! What a streaming consumer says, inside CopyData, while WAL flows the other way.
//!
//! ```text
//!   'r' status      write_lsn 8, flush_lsn 8, apply_lsn 8, time 8, reply requested 1
//!   'h' feedback    time 8, xmin 4, epoch 4, catalog xmin 4, epoch 4
//! ```
//!
//! Numbers are big-endian. What stands behind the last field is passed over, as a primary does: a
//! later version may have more to say. (`ProcessStandbyMessage` in `replication/walsender.c`)

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use safekeeper_protocol::Lsn;

use crate::pgwire::ErrorReport;

/// Longest message of a streaming consumer, in bytes. A status has 34.
pub const STANDBY_MESSAGE_LEN_MAX: usize = 1000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StandbyMessage {
    /// How far it is. The positions are its own word and may be anything.
    Status {
        write_lsn: Lsn,
        flush_lsn: Lsn,
        apply_lsn: Lsn,
        reply_requested: bool,
    },
    /// The oldest transactions it needs, with epoch; 0 if none.
    Feedback { xmin: u64, catalog_xmin: u64 },
}

/// The message in the body of a CopyData.
pub fn decode_standby_message(body: &[u8]) -> Result<StandbyMessage, ErrorReport> {
    let (&tag, fields) = body.split_first().ok_or_else(|| invalid_tag(0))?;
    let number = |at: usize| {
        let bytes = fields.get(at..).and_then(|rest| rest.first_chunk::<8>());
        bytes
            .map(|bytes| u64::from_be_bytes(*bytes))
            .ok_or_else(|| invalid_tag(tag))
    };
    match tag {
        b'r' => Ok(StandbyMessage::Status {
            write_lsn: Lsn(number(0)?),
            flush_lsn: Lsn(number(8)?),
            apply_lsn: Lsn(number(16)?),
            reply_requested: *fields.get(32).ok_or_else(|| invalid_tag(tag))? != 0,
        }),
        b'h' => Ok(StandbyMessage::Feedback {
            xmin: full_xid(number(8)?),
            catalog_xmin: full_xid(number(16)?),
        }),
        tag => Err(invalid_tag(tag)),
    }
}

/// The body of a status from a client of ours: positions written, flushed and applied.
pub fn encode_status(lsns: [Lsn; 3], out: &mut Vec<u8>) {
    out.push(b'r');
    for lsn in lsns {
        out.extend_from_slice(&lsn.0.to_be_bytes());
    }
    out.extend_from_slice(&postgres_time().to_be_bytes());
    out.push(0);
}

/// Seconds from 1970 to 2000, where Postgres's clock begins.
const POSTGRES_EPOCH: Duration = Duration::from_secs(946_684_800);

/// Microseconds since 2000, as Postgres counts.
pub fn postgres_time() -> i64 {
    let since_1970 = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let since_2000 = since_1970.saturating_sub(POSTGRES_EPOCH);
    i64::try_from(since_2000.as_micros()).unwrap_or(i64::MAX)
}

/// Epoch and transaction id stand the other way round on the wire; 0 means none.
fn full_xid(wire: u64) -> u64 {
    let (xid, epoch) = (wire >> 32, wire & 0xFFFF_FFFF);
    if xid == 0 { 0 } else { epoch << 32 | xid }
}

/// The answer to what no standby says.
pub fn invalid_tag(tag: u8) -> ErrorReport {
    ErrorReport::protocol(format!("invalid standby message type 0x{tag:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tag and 8-byte numbers.
    fn message(tag: u8, numbers: &[u64]) -> Vec<u8> {
        let mut body = vec![tag];
        for number in numbers {
            body.extend(number.to_be_bytes());
        }
        body
    }

    #[test]
    fn a_status_is_read_to_its_last_byte_and_needs_it() {
        let mut body = message(b'r', &[3, 2, 1, 99]);
        assert!(decode_standby_message(&body).is_err());
        body.push(1);
        let status = StandbyMessage::Status {
            write_lsn: Lsn(3),
            flush_lsn: Lsn(2),
            apply_lsn: Lsn(1),
            reply_requested: true,
        };
        assert_eq!(decode_standby_message(&body), Ok(status));
    }

    #[test]
    fn a_status_of_ours_is_read_as_it_was_meant() {
        let mut body = Vec::new();
        encode_status([Lsn(3), Lsn(2), Lsn(1)], &mut body);
        let status = StandbyMessage::Status {
            write_lsn: Lsn(3),
            flush_lsn: Lsn(2),
            apply_lsn: Lsn(1),
            reply_requested: false,
        };
        assert_eq!(decode_standby_message(&body), Ok(status));
    }

    #[test]
    fn feedback_has_the_epoch_behind_the_transaction_id() {
        let body = message(b'h', &[99, 0x0000_0007_0000_0002, 0x0000_0000_0000_0002]);
        let feedback = StandbyMessage::Feedback {
            xmin: 0x0000_0002_0000_0007,
            catalog_xmin: 0,
        };
        assert_eq!(decode_standby_message(&body), Ok(feedback));
        assert!(decode_standby_message(&body[..24]).is_err());
    }

    #[test]
    fn what_no_standby_says_is_refused_by_its_type() {
        for (body, named) in [(&b""[..], "0x00"), (b"q", "0x71"), (b"r", "0x72")] {
            let refused = decode_standby_message(body).expect_err(named);
            assert!(refused.message.contains(named), "{}", refused.message);
        }
    }
}
