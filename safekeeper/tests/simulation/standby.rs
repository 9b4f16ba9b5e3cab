//! Standbys, fed by safekeepers alone, and how one becomes the primary.
//!
//! ```text
//!   data of a safekeeper,   ──► Standby ──promote──► (Proposer, step by step) ──► Running on the
//!   or an old primary's,          │                     dies: a standby again       next timeline
//!   cut to what is committed      └──by hand──────────────────────────────────► Running, unled
//! ```
//!
//! A standby takes what any safekeeper shows it, follows a switch of timelines as a walreceiver
//! does (the end of the old one, then the history file of the next), and expects every page to be
//! of the timeline that the file names. If it ever stands on a timeline that a safekeeper's newest
//! one does not descend from, a promotion that died was shown to it, and there is no way back.

use safekeeper_client::wal_client::TimelineEnd;
use safekeeper_protocol::{LocalLog, Lsn, Standing, Tli};
use safekeeper_wal::{TimelineHistory, WalDecoder};

use super::checker::Event as Fact;
use super::cluster::Cluster;
use super::faults::Mark;
use super::network::{NodeIdx, ServerIdx};
use super::node::Outcome;
use super::postgres::{DataDir, LocalHistory, Postgres, Settings, builder, new_proposer_id};
use super::random::Random;

/// The part of a server that receives and replays.
#[derive(Debug)]
pub struct Standby {
    node: NodeIdx,
    /// Has taken in all WAL there is.
    decoder: WalDecoder,
    /// Of the record that has come in part, some came from a disk that has decayed.
    suspect: bool,
}

impl Standby {
    /// Replays the WAL that is there, and ends it behind the last whole record.
    pub fn start(data: &mut DataDir, node: NodeIdx) -> Standby {
        data.find_end();
        // A timeline of which it has lost all WAL again is one to follow anew.
        data.cut_to(data.end());
        Standby {
            node,
            decoder: data.decoded(),
            suspect: false,
        }
    }

    /// End of the last record that has been replayed.
    pub fn replayed(&self) -> Lsn {
        self.decoder.record_end()
    }
}

impl Postgres {
    /// Begins to promote this standby: only a proposer, so far.
    pub fn begin_promotion(&mut self, id: u64, settings: Settings, random: &mut Random, now: u64) {
        let process = self.new_process(id, settings, Standing::Standby, random, now);
        self.process = Some(process);
    }

    /// What is compared of a standby's log: what it has replayed. Its history file is void.
    pub fn standby_log(&self, log: LocalLog) -> LocalLog {
        match &self.standby {
            Some(standby) => LocalLog {
                end_lsn: standby.replayed(),
                history: Default::default(),
                configuration: Default::default(),
                unled_from: None,
                ..log
            },
            None => log,
        }
    }

    /// Recovery ends, on a new timeline. Returns where that begins.
    fn end_recovery(&mut self, tli: Tli, promotion: u64) -> Option<Lsn> {
        let standby = self.standby.take()?;
        let switch_lsn = standby.replayed();
        self.data.cut_to(switch_lsn);
        self.data.begin_timeline(tli, promotion);
        self.data.is_standby = false;
        self.data.by_hand = self.data.promoted_by_hand;
        if let Some(process) = &mut self.process {
            process.wal = Some(builder(tli, switch_lsn, standby.decoder.last_record()));
            process.promotes_to = None;
        }
        // The record of the end of recovery is on disk before anybody can connect.
        self.insert(80);
        self.data.flush_lsn = self.data.end();
        Some(switch_lsn)
    }
}

impl Cluster {
    /// What a walreceiver does in one round.
    pub fn stream(&mut self, idx: ServerIdx) {
        let other = self.random.below(self.nodes.len() as u64) as usize;
        let moves = self.random.chance(50);
        let len = match self.is_healing {
            true => 1 << 20,
            false => self.random.range(1..100_000),
        };
        let Some(standby) = &mut self.servers[idx].standby else {
            return;
        };
        if moves {
            standby.node = other;
        }
        let node = standby.node;
        if !self.receive(idx, node, len)
            && let Some(standby) = &mut self.servers[idx].standby
        {
            standby.node = other;
        }
        self.replay(idx);
    }

    /// False if this safekeeper is of no use now.
    fn receive(&mut self, idx: ServerIdx, from: NodeIdx, len: u64) -> bool {
        let node = &self.nodes[from];
        let reachable = node.stopped_until_ms <= self.now_ms && self.network.is_open(idx, from);
        let Some(keeper) = node.keeper().filter(|_| reachable) else {
            return false;
        };
        let (view, commit_lsn) = (keeper.view(), keeper.commit_lsn());
        let data = &self.servers[idx].data;
        let (tli, begin) = (data.tli(), data.end());
        self.say(|| format!("server {idx} has {begin} of {tli}, node {from} shows {commit_lsn}"));
        let newest = view.newest_tli(commit_lsn);
        let limit = match view.end_of_timeline(tli, commit_lsn) {
            Ok(None) => commit_lsn,
            Ok(Some(TimelineEnd { end_lsn, next_tli })) => {
                assert!(
                    begin <= end_lsn,
                    "consumer_sees_only_committed: server {idx} has {begin} of timeline {tli}, \
                     which ended at {end_lsn}"
                );
                if begin == end_lsn {
                    let file = view.timeline_file(next_tli).map(|file| file.into_owned());
                    self.follow(idx, next_tli, file.map(|file| file.content));
                    return true;
                }
                end_lsn.min(commit_lsn)
            }
            Err(_) => {
                assert!(
                    newest < tli,
                    "consumer_sees_only_committed: server {idx} was shown timeline {tli}, of \
                     which timeline {newest} knows nothing"
                );
                return false;
            }
        };
        if limit <= begin {
            // It may merely lag.
            return !self.random.chance(200);
        }
        match self.nodes[from].consume(begin, len.min(limit - begin)) {
            Outcome::Died => {
                self.node_died(from);
                false
            }
            Outcome::Done(None) => false,
            Outcome::Done(Some(bytes)) => self.received(idx, from, &bytes),
        }
    }

    fn received(&mut self, idx: ServerIdx, from: NodeIdx, bytes: &[u8]) -> bool {
        let node = &self.nodes[from];
        let server = &mut self.servers[idx];
        let standby = server.standby.as_mut().expect("it receives");
        let begin = server.data.end();
        if standby.decoder.record_end() == begin {
            standby.suspect = false;
        }
        standby.suspect |= node.is_lost;
        let suspect = standby.suspect;
        debug_assert_eq!(standby.decoder.position(), begin);
        if let Err(error) = standby.decoder.feed(bytes) {
            assert!(
                suspect,
                "consumer_sees_only_committed: safekeeper {} sent server {idx} what is no WAL at \
                 {begin}: {error}",
                node.id
            );
            // As a walreceiver that is started anew.
            server.standby = Some(Standby::start(&mut server.data, from));
            return false;
        }
        server.data.wal.extend_from_slice(bytes);
        if self.random.chance(700) {
            server.data.flush_lsn = server.data.end();
        }
        if !suspect {
            let node = node.id.0;
            self.checker.observe(&Fact::Consumed { node, begin, bytes });
        }
        true
    }

    /// The old timeline has been received to its end.
    fn follow(&mut self, idx: ServerIdx, tli: Tli, file: Option<Vec<u8>>) {
        let server = &mut self.servers[idx];
        let (old, end) = (server.data.timelines.tli, server.data.end());
        let content = file.unwrap_or_else(|| {
            panic!("consumer_sees_only_committed: timeline {tli} is shown without its history file")
        });
        let text = String::from_utf8_lossy(&content).into_owned();
        let history = TimelineHistory::parse(tli.0, &text).expect("a history file of a server");
        assert_eq!(
            history.switch_point(old),
            Some(end),
            "consumer_sees_only_committed: the history file of timeline {tli} says otherwise"
        );
        server.data.take_timeline(history, content);
        let standby = server.standby.as_mut().expect("it receives");
        standby
            .decoder
            .expect_timelines(server.data.timelines.clone());
        self.tally.add(Mark::TimelineFollowed);
    }

    /// Has the promotion been waiting for what is replayed by now?
    pub fn replay(&mut self, idx: ServerIdx) {
        let server = &mut self.servers[idx];
        let (Some(standby), Some(process)) = (&server.standby, &mut server.process) else {
            return;
        };
        let Some(end_lsn) = process.replay_to else {
            return;
        };
        let replayed = standby.replayed();
        if replayed > end_lsn {
            return self.stop_promotion(idx);
        }
        if replayed == end_lsn {
            process.replay_to = None;
            self.with_proposer(idx, |proposer, _, out| proposer.on_replayed(out));
        }
    }

    /// `walproposer_promote()`. False if this server is no running standby.
    pub fn promote(&mut self, idx: ServerIdx) -> bool {
        if self.servers[idx].standby.is_none() || self.servers[idx].process.is_some() {
            return false;
        }
        let (id, settings) = (self.next_proposer_id(), self.settings());
        let mut random = self.random.fork();
        let now_ms = self.server_clock(idx);
        self.servers[idx].begin_promotion(id, settings, &mut random, now_ms);
        self.say(|| format!("server {idx} is to be promoted, as proposer {id}"));
        self.dial_all(idx);
        true
    }

    /// What promotes it is gone, it stays a standby.
    pub fn stop_promotion(&mut self, idx: ServerIdx) {
        self.close_all(idx);
        let server = &mut self.servers[idx];
        if server.process.take().is_some() {
            self.tally.add(Mark::PromotionDied);
            server.data.history = LocalHistory::default();
            server.data.next_history = None;
        }
    }

    /// Postgres has ended recovery.
    pub fn promoted(&mut self, idx: ServerIdx, proposer: u64) {
        let Some((tli, switch_lsn)) = self.switch_timeline(idx, proposer) else {
            return;
        };
        let files = self.servers[idx].data.timeline_files.clone();
        self.with_proposer(idx, |proposer, now_ms, out| {
            proposer.on_promoted(tli, switch_lsn, files, now_ms, out)
        });
    }

    /// It is on its new timeline; its proposer does not know yet.
    pub fn switch_timeline(&mut self, idx: ServerIdx, proposer: u64) -> Option<(Tli, Lsn)> {
        let tli = self.process_of(idx, proposer)?.promotes_to?;
        self.n_promotions += 1;
        let promotion = self.n_promotions;
        let switch_lsn = self.servers[idx].end_recovery(tli, promotion)?;
        self.say(|| format!("server {idx} is promoted to timeline {tli} at {switch_lsn}"));
        Some((tli, switch_lsn))
    }

    /// `pg_ctl promote`, without asking anybody.
    pub fn promote_by_hand(&mut self, idx: ServerIdx) -> bool {
        let server = &mut self.servers[idx];
        if server.process.is_some() {
            return false;
        }
        let Some(standby) = &server.standby else {
            return false;
        };
        let history = LocalHistory {
            unled_from: Some(standby.replayed()),
            ..LocalHistory::default()
        };
        let tli = Tli(server.data.timelines.tli + 1);
        server.data.history = history;
        server.data.promoted_by_hand = true;
        self.n_promotions += 1;
        let promotion = self.n_promotions;
        let (id, settings) = (self.next_proposer_id(), self.settings());
        let mut random = self.random.fork();
        let now_ms = self.server_clock(idx);
        let server = &mut self.servers[idx];
        // A process first, to write the WAL; then a worker that stands with what is there.
        server.begin_promotion(id, settings, &mut random, now_ms);
        server.end_recovery(tli, promotion);
        self.say(|| format!("server {idx} is promoted by hand to timeline {tli}"));
        self.restart_worker(idx);
        true
    }

    /// The data directory of a standby that was made with what this safekeeper shows.
    pub fn data_from_node(&mut self, idx: NodeIdx) -> Option<DataDir> {
        let node = &self.nodes[idx];
        let keeper = node.keeper().filter(|_| !node.is_lost)?;
        let (history, oldest_lsn, _) = node.log()?;
        let (view, commit_lsn) = (keeper.view(), keeper.commit_lsn());
        let first = history.first()?;
        let end = commit_lsn.max(oldest_lsn);
        let newest = view.newest_tli(commit_lsn);
        let mut data = DataDir {
            proposer_id: new_proposer_id(&mut self.random),
            wal: node.log_bytes(&history, oldest_lsn, end),
            base: oldest_lsn,
            flush_lsn: end,
            history: LocalHistory::default(),
            next_history: None,
            timelines: TimelineHistory::root(first.tli.0),
            timeline_files: Vec::new(),
            is_standby: true,
            promoted_by_hand: false,
            by_hand: false,
            promotion: 0,
        };
        for tli in (first.tli.0 + 1..=newest.0).map(Tli) {
            if let Some(file) = view.timeline_file(tli) {
                let text = String::from_utf8_lossy(&file.content).into_owned();
                let parsed = TimelineHistory::parse(tli.0, &text).expect("a server's own file");
                data.take_timeline(parsed, file.content.clone());
            }
        }
        assert_eq!(
            data.tli(),
            newest,
            "consumer_sees_only_committed: timeline {newest} is shown without its history file"
        );
        Some(data)
    }

    /// A server that may not lead comes back as a standby: its WAL is cut to what it shares with
    /// the quorum, as pg_rewind does, or if that is all of it, stays as it is.
    pub fn rejoin(&mut self, idx: ServerIdx) -> bool {
        if self.servers[idx].standby.is_some() {
            return false;
        }
        let data = &self.servers[idx].data;
        let shared = self
            .checker
            .shared_with(data.base, &data.wal, &data.timelines);
        let Some(shared) = shared.filter(|shared| *shared > data.base) else {
            return false;
        };
        self.crash_server(idx);
        let server = &mut self.servers[idx];
        let end = server.data.end();
        if shared < end {
            server.data.cut_to(shared);
        } else {
            self.tally.add(Mark::RejoinedAsItIs);
        }
        server.data.flush_lsn = server.data.end();
        server.data.is_standby = true;
        server.data.promoted_by_hand = false;
        server.data.history = LocalHistory::default();
        server.is_given_up = false;
        self.say(|| format!("server {idx} comes back as a standby, cut from {end} to {shared}"));
        self.start_server(idx);
        true
    }
}
