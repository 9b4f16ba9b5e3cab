//! Reading from a donor: to compare bytes before an election, to complete a log before recovery, and
//! to feed a member with WAL that the server itself has not, or has not any more.

use safekeeper_protocol::{Compared, Completed, Lsn, PeerIdx, ProposerMessage, Read};

use super::cluster::{Cluster, Event};
use super::faults::Mark;
use super::network::{NodeIdx, ServerIdx};
use super::node::{NotRead, Outcome};
use super::postgres::Reading;

impl Cluster {
    /// Reads the next stretch from the donor.
    pub fn read_donor(&mut self, idx: ServerIdx, proposer: u64) {
        let random_len = self.random.range(1..100_000) as u32;
        let Some(process) = self.process_of(idx, proposer) else {
            return;
        };
        let Some(mut reading) = process.reading.take() else {
            return;
        };
        let version = process.proposer.configuration().version;
        if reading.next < reading.end {
            let left = (reading.end - reading.next).min(1 << 20) as u32;
            let read = Read {
                configuration_version: version,
                term: reading.term,
                begin_lsn: reading.next,
                len: left.min(random_len),
            };
            let bytes = match self.read_from(idx, reading.donor, read) {
                Outcome::Done(Ok(bytes)) => bytes,
                // What the donor has removed can't be compared.
                Outcome::Done(Err(NotRead::Removed { oldest_lsn })) if !reading.completes => {
                    reading.next = oldest_lsn.min(reading.end);
                    self.process_of(idx, proposer)
                        .expect("looked up above")
                        .reading = Some(reading);
                    return self.at(
                        1,
                        Event::ReadDonor {
                            server: idx,
                            proposer,
                        },
                    );
                }
                Outcome::Done(Err(_)) => return self.donor_failed(idx, &reading),
                Outcome::Died => {
                    self.node_died(reading.donor);
                    return self.donor_failed(idx, &reading);
                }
            };
            let end = reading.next + bytes.len() as u64;
            let data = &mut self.servers[idx].data;
            if reading.completes {
                data.complete(&bytes);
            } else if data.bytes(reading.next, end) != bytes {
                let at = reading.next;
                let outcome = Compared::Differs { at };
                return self.with_proposer(idx, |proposer, now_ms, out| {
                    proposer.on_compared(outcome, now_ms, out)
                });
            }
            reading.next = end;
            let process = self.process_of(idx, proposer).expect("looked up above");
            process.reading = Some(reading);
            let in_ms = self.random.range(1..10);
            return self.at(
                in_ms,
                Event::ReadDonor {
                    server: idx,
                    proposer,
                },
            );
        }
        if reading.completes {
            // A donor checks no record that is read in two parts, and its disk may have decayed.
            self.servers[idx].data.find_end();
            if self.servers[idx].data.end() < reading.end {
                return self.donor_failed(idx, &reading);
            }
            self.tally.add(Mark::CompletedFromQuorum);
            self.with_proposer(idx, |proposer, now_ms, out| {
                proposer.on_completed(Completed::Whole, now_ms, out)
            });
        } else {
            self.with_proposer(idx, |proposer, now_ms, out| {
                proposer.on_compared(Compared::Equal, now_ms, out)
            });
        }
    }

    pub fn donor_failed(&mut self, idx: ServerIdx, reading: &Reading) {
        self.say(|| format!("server {idx} can't read from its donor"));
        if reading.completes {
            // What has been read so far is WAL like any other.
            self.servers[idx].data.find_end();
            let outcome = Completed::Partly {
                end_lsn: self.servers[idx].data.end(),
                reason: "the donor failed".into(),
            };
            self.with_proposer(idx, |proposer, now_ms, out| {
                proposer.on_completed(outcome, now_ms, out)
            });
        } else {
            let outcome = Compared::Unavailable {
                reason: "the donor failed".into(),
            };
            self.with_proposer(idx, |proposer, now_ms, out| {
                proposer.on_compared(outcome, now_ms, out)
            });
        }
    }

    pub fn push_one(&mut self, idx: ServerIdx, peer: usize) -> bool {
        let now_ms = self.server_clock(idx);
        let mut wal = self.servers[idx].local_wal();
        let Some(process) = &mut self.servers[idx].process else {
            return false;
        };
        let Some(id) = process.connections[peer] else {
            return false;
        };
        // A socket takes only so much.
        let in_flight = self
            .network
            .connections
            .get(&id)
            .map_or(0, |c| c.to_node.messages.len());
        if in_flight > 8 {
            return false;
        }
        let mut from_donor = None;
        if let Some(next) = process.proposer.next_lsn(PeerIdx(peer)) {
            let append_len_max = process.append_len_max;
            if next < self.servers[idx].data.base || next >= wal.end_lsn {
                let bytes = self.read_for(idx, next).unwrap_or_default();
                wal.end_lsn = next + bytes.len() as u64;
                from_donor = Some(bytes);
            } else {
                wal.end_lsn = wal.end_lsn.min(next + append_len_max);
            }
        }
        let Some(process) = &mut self.servers[idx].process else {
            return false;
        };
        let Some(append) = process.proposer.next_append(PeerIdx(peer), wal, now_ms) else {
            return false;
        };
        let end = append.begin_lsn + u64::from(append.len);
        if append.len > 0 && from_donor.is_some() {
            self.tally.add(Mark::FedFromDonor);
        }
        let bytes = match from_donor {
            Some(bytes) => bytes[..append.len as usize].to_vec(),
            None => self.servers[idx].data.bytes(append.begin_lsn, end).to_vec(),
        };
        self.send(idx, peer, &ProposerMessage::Append(append), &bytes);
        append.len > 0
    }

    /// What a member lacks and the server has not at hand, from one who follows this term.
    fn read_for(&mut self, idx: ServerIdx, begin_lsn: Lsn) -> Option<Vec<u8>> {
        let process = self.servers[idx].process.as_ref()?;
        let donors = process.proposer.donors_for(begin_lsn);
        let donor = self.random.pick(&donors)?.0;
        let read = Read {
            configuration_version: process.proposer.configuration().version,
            term: process.proposer.term(),
            begin_lsn,
            len: 200_000,
        };
        match self.read_from(idx, donor, read) {
            Outcome::Done(Ok(bytes)) => Some(bytes),
            Outcome::Done(Err(_)) => None,
            Outcome::Died => {
                self.node_died(donor);
                None
            }
        }
    }

    fn read_from(
        &mut self,
        idx: ServerIdx,
        donor: NodeIdx,
        read: Read,
    ) -> Outcome<Result<Vec<u8>, NotRead>> {
        let node = &mut self.nodes[donor];
        let reachable = node.is_up()
            && node.stopped_until_ms <= self.now_ms
            && self.network.is_open(idx, donor);
        match reachable {
            true => node.read(read),
            false => Outcome::Done(Err(NotRead::Failed)),
        }
    }
}
