//! A consumer of committed WAL, who goes from one safekeeper to the next.

use std::ops::Range;

use safekeeper_protocol::Lsn;
use safekeeper_wal::{WalDecoder, WalError};

use super::checker::Event as Fact;
use super::cluster::{Cluster, Event};
use super::faults::Mark;
use super::network::NodeIdx;
use super::node::Outcome;
use super::{SEGMENT_SIZE, wal_format};

/// A consumer goes from one safekeeper to the next and expects the same log everywhere. Like a
/// standby it takes nothing for granted before it has the whole record.
#[derive(Debug)]
pub struct Consumer {
    pub node: NodeIdx,
    pub lsn: Lsn,
    decoder: WalDecoder,
    /// What came on this connection, from its beginning on.
    begin: Lsn,
    received: Vec<u8>,
}

impl Consumer {
    /// Connects and asks for WAL from the start of the segment that holds `lsn`.
    pub fn new(node: NodeIdx, lsn: Lsn) -> Consumer {
        let begin = lsn.segment_start(SEGMENT_SIZE);
        Consumer {
            node,
            lsn: begin,
            decoder: WalDecoder::new(wal_format(), begin),
            begin,
            received: Vec::new(),
        }
    }

    /// Takes in what was sent. The stretch of whole records that came with it; an error if they
    /// make no sense.
    fn take(&mut self, bytes: &[u8]) -> Result<Option<(Lsn, &[u8])>, WalError> {
        self.received.extend_from_slice(bytes);
        self.lsn = self.lsn + bytes.len() as u64;
        let mut whole: Option<Range<Lsn>> = None;
        let fed = self.decoder.feed_with(bytes, |record| {
            let start = whole.as_ref().map_or(record.start_lsn, |range| range.start);
            whole = Some(start..record.end_lsn);
        });
        fed?;
        Ok(whole.map(|range| {
            let at = |lsn: Lsn| (lsn - self.begin) as usize;
            (range.start, &self.received[at(range.start)..at(range.end)])
        }))
    }
}

impl Cluster {
    pub fn consume(&mut self) {
        let in_ms = self.random.range(20..300);
        self.at(in_ms, Event::Consume);
        if self.random.chance(100) {
            let node = self.random.below(self.nodes.len() as u64) as usize;
            self.consumer = Consumer::new(node, self.consumer.lsn);
        }
        let idx = self.consumer.node;
        let len = self.random.range(1..200_000);
        let node = &mut self.nodes[idx];
        if node.stopped_until_ms > self.now_ms {
            return;
        }
        let Some((_, oldest_lsn, _)) = node.log() else {
            return;
        };
        if oldest_lsn > self.consumer.lsn {
            // It has fallen behind, and begins anew with what is there.
            self.consumer = Consumer::new(idx, oldest_lsn);
        }
        match node.consume(self.consumer.lsn, len) {
            Outcome::Died => self.node_died(idx),
            Outcome::Done(None) => {}
            Outcome::Done(Some(bytes)) => self.consumed(idx, &bytes),
        }
    }

    pub fn consumed(&mut self, idx: NodeIdx, bytes: &[u8]) {
        let node = &self.nodes[idx];
        match self.consumer.take(bytes) {
            Ok(None) => {}
            Ok(Some((begin, bytes))) => {
                let node = node.id.0;
                self.checker.observe(&Fact::Consumed { node, begin, bytes });
                self.tally.add(Mark::ConsumerFed);
            }
            // The rest of a record with whose beginning damaged bytes had come: the safekeeper
            // checks a record with its last byte, and so does its consumer.
            Err(_) if node.is_lost => self.consumer = Consumer::new(idx, self.consumer.lsn),
            Err(error) => panic!(
                "consumer_sees_only_committed: safekeeper {} sent what is no WAL: {error}",
                node.id
            ),
        }
    }
}
