//! The reign: bring members under it, hand out WAL, count what is flushed.

use super::*;

impl Proposer {
    /// Bring a greeted peer under the reign: configuration first if it lacks it, then Elected.
    pub(super) fn welcome(&mut self, peer: PeerIdx, now_ms: u64, out: &mut Actions) {
        let Some(greeting) = self.links[peer.0]
            .as_ref()
            .and_then(|link| link.greeting.as_ref())
        else {
            return;
        };
        let (term, version) = (greeting.term, greeting.configuration.version);
        // A stranger's term is not ours to heed: it was won, if it was, in another quorum.
        if !self.is_fed(peer) {
            return;
        }
        if !self.speaks_for_member(peer) && (term > self.term || self.is_of_other_lineage(peer)) {
            // A learner counts for nothing: that it can't be fed is told by the view.
            return;
        }
        if term > self.term {
            return self.depose(term, out);
        }
        if version > self.configuration.version {
            return self.on_later_configuration(peer, version, now_ms, out);
        }
        if version < self.configuration.version {
            let configuration = self.configuration.clone();
            self.send_configure(peer, self.term, &configuration, now_ms, out);
        } else {
            self.note_held(peer);
            self.elect(peer, now_ms, out);
            self.advance_change(now_ms, out);
        }
    }

    /// Send Elected, unless the peer is no member or has it already on this connection.
    pub(super) fn elect(&mut self, peer: PeerIdx, now_ms: u64, out: &mut Actions) {
        let Some(link) = &self.links[peer.0] else {
            return;
        };
        let Some(greeting) = &link.greeting else {
            return;
        };
        if !self.is_fed(peer) || link.stream.is_some() {
            return;
        }
        let theirs = Log::new(&greeting.history, greeting.flush_lsn);
        let ours = Log::new(&self.history, Lsn(u64::MAX));
        let log_start = self
            .history
            .first()
            .map_or(Lsn::INVALID, |entry| entry.start_lsn);
        let start_lsn = match common_end(&theirs, &ours) {
            Some(common) => common,
            // A log that is still to begin need not hold what nobody keeps any more.
            None if theirs.runs().next().is_none() => {
                log_start.max(self.begin_for_learner(greeting))
            }
            None => log_start,
        };
        if start_lsn > self.sent_lsn.max(self.term_start_lsn()) {
            let reason = format!("claims WAL up to {start_lsn} of our term, which was never sent");
            return self.disconnect(peer, &reason, out);
        }
        let elected = self.elected_from(start_lsn);
        if let Some(link) = &mut self.links[peer.0] {
            link.stream = Some(Stream {
                following: false,
                start_lsn,
                sent_lsn: start_lsn,
                write_lsn: start_lsn,
            });
            link.last_sent_ms = now_ms;
            link.last_heard_ms = now_ms;
        }
        out.push(ProposerAction::Send {
            to: peer,
            message: ProposerMessage::Elected(elected),
        });
    }

    pub(super) fn elected_from(&self, start_lsn: Lsn) -> Elected {
        Elected {
            configuration_version: self.configuration.version,
            term: self.term,
            history: self.history.clone(),
            start_lsn,
            timeline_files: self.timeline_files(),
        }
    }

    /// The newest ones, as far as a message holds them.
    pub(super) fn timeline_files(&self) -> Vec<TimelineFile> {
        let files = self
            .local
            .timeline_files
            .iter()
            .take(TimelineFile::COUNT_MAX);
        let mut len = 0;
        files
            .take_while(|file| {
                len += file.content.len();
                file.content.len() <= TimelineFile::LEN_MAX && len <= MESSAGE_LEN_MAX / 2
            })
            .cloned()
            .collect()
    }

    pub(super) fn on_append_response(
        &mut self,
        peer: PeerIdx,
        response: &AppendResponse,
        now_ms: u64,
        out: &mut Actions,
    ) {
        if !self.reigns() {
            return;
        }
        if response.term > self.term {
            return match self.speaks_for_member(peer) {
                true => self.depose(response.term, out),
                false => self.disconnect(peer, "follows a later term, and is no member", out),
            };
        }
        if response.configuration_version > self.configuration.version {
            return self.on_later_configuration(peer, response.configuration_version, now_ms, out);
        }
        let Some(link) = &mut self.links[peer.0] else {
            return;
        };
        link.term = response.term;
        link.commit_lsn = response.commit_lsn;
        link.feedback = response.feedback;
        let (Some(greeting), Some(stream)) = (&link.greeting, &mut link.stream) else {
            return self.disconnect(peer, "acknowledgement before election", out);
        };
        if response.term < self.term {
            return self.disconnect(peer, "acknowledgement of an older term", out);
        }
        if !stream.following && response.flush_lsn != stream.sent_lsn {
            let reason = format!(
                "follows from {} instead of {}",
                response.flush_lsn, stream.sent_lsn
            );
            return self.disconnect(peer, &reason, out);
        }
        if response.write_lsn > stream.sent_lsn || response.flush_lsn > response.write_lsn {
            return self.disconnect(peer, "acknowledges WAL that was not sent", out);
        }
        stream.following = true;
        stream.write_lsn = stream.write_lsn.max(response.write_lsn);
        let (id, incarnation) = (greeting.member_id, greeting.incarnation);
        let acknowledged = self.acknowledged.entry((id, incarnation)).or_default();
        *acknowledged = response.flush_lsn.max(*acknowledged);
        self.advance_commit(out);
        self.advance_change(now_ms, out);
    }

    /// What a majority of all members has flushed in this term; one that has not taken this
    /// term's Elected counts as nothing. Only from the term's start on: older WAL on a majority
    /// may still lose to a log of a newer term that a minority holds (Raft §5.4.2).
    pub(super) fn advance_commit(&mut self, out: &mut Actions) {
        let reached = self
            .configuration
            .quorum_lsn(|member| self.flushed(member.id, member.incarnation));
        let own = reached >= self.term_start_lsn() || is_on(Mutation::CommitWithoutTermStart);
        if own && reached > self.commit_lsn {
            self.commit_lsn = reached;
            out.push(ProposerAction::Commit(reached));
            self.replay_if_complete(out);
        }
    }

    /// [`Lsn::INVALID`] for one that has acknowledged nothing in this term.
    pub(super) fn flushed(&self, id: MemberId, incarnation: Incarnation) -> Lsn {
        self.acknowledged
            .get(&(id, incarnation))
            .copied()
            .unwrap_or(Lsn::INVALID)
    }

    /// The next Append for this peer: WAL if there is some to send and the window is open, else a
    /// heartbeat if one is due or `commit_lsn` has moved, else nothing. It counts as sent: a host
    /// that can't deliver it must disconnect.
    ///
    /// A host that has no WAL at hand at [`Self::next_lsn`] passes that as the end of its WAL.
    pub fn next_append(&mut self, peer: PeerIdx, wal: LocalWal, now_ms: u64) -> Option<Append> {
        if !self.reigns() {
            return None;
        }
        self.local_flush_lsn = self.local_flush_lsn.max(wal.flush_lsn);
        let end_lsn = match self.phase {
            // The term has no WAL of its own before Postgres has switched to its timeline.
            Phase::Promoting(_) => wal.end_lsn.min(self.term_start_lsn()),
            _ => wal.end_lsn,
        };
        let heartbeat_ms = self.heartbeat_ms();
        let truncate_lsn = self.truncate_lsn();
        let link = self.links[peer.0].as_mut()?;
        let stream = link.stream.as_mut().filter(|stream| stream.following)?;

        let begin_lsn = stream.sent_lsn;
        let tli = self.history.tli_at(begin_lsn)?;
        let len = if begin_lsn.saturating_distance_from(stream.write_lsn) < WINDOW {
            let next_tli = self
                .history
                .entries()
                .iter()
                .find(|e| e.start_lsn > begin_lsn && e.tli != tli);
            let end = next_tli.map_or(end_lsn, |entry| entry.start_lsn.min(end_lsn));
            end.saturating_distance_from(begin_lsn)
                .min(u64::from(Append::LEN_MAX))
        } else {
            0
        };
        let heartbeat_due = link.ask || now_ms >= link.last_sent_ms + heartbeat_ms;
        if len == 0 && !heartbeat_due && link.commit_told >= self.commit_lsn {
            return None;
        }
        stream.sent_lsn = begin_lsn + len;
        self.sent_lsn = self.sent_lsn.max(stream.sent_lsn);
        // News of a commit that carries no WAL and wants no answer is no sign of life of the
        // member: it must not put off the heartbeat that asks for one.
        if len > 0 || heartbeat_due {
            link.last_sent_ms = now_ms;
            link.ask = false;
        }
        link.commit_told = self.commit_lsn;
        Some(Append {
            configuration_version: self.configuration.version,
            term: self.term,
            tli,
            begin_lsn,
            len: u32::try_from(len).expect("at most LEN_MAX"),
            commit_lsn: self.commit_lsn,
            truncate_lsn,
            reply_requested: len == 0 && heartbeat_due,
        })
    }

    /// Somebody waits for standbys to replay: the next Append to each peer that has some, and whose last report
    /// is of less than `commit_lsn`, asks for an answer, which tells how far they are.
    pub fn ask_for_feedback(&mut self) {
        for link in self.links.iter_mut().flatten() {
            let apply_lsn = link.feedback.apply_lsn;
            link.ask |= apply_lsn.is_valid() && apply_lsn < self.commit_lsn;
        }
    }

    /// Where this peer's next byte lies; `None` if it does not follow.
    pub fn next_lsn(&self, peer: PeerIdx) -> Option<Lsn> {
        let stream = self.links[peer.0]
            .as_ref()?
            .stream
            .filter(|stream| stream.following)?;
        self.reigns().then_some(stream.sent_lsn)
    }

    /// A later configuration has turned up. If it is of an older term than ours, it was never
    /// decided: a majority of those who would have had to know of it did not when they elected us,
    /// and will take nothing of that term any more. Ours takes its place, under our term.
    fn on_later_configuration(
        &mut self,
        peer: PeerIdx,
        version: ConfigurationVersion,
        now_ms: u64,
        out: &mut Actions,
    ) {
        if version.term < self.term {
            self.hand_out(self.configuration.clone(), now_ms, out);
        } else {
            self.disconnect(
                peer,
                "holds a configuration of our term that we did not write",
                out,
            );
        }
    }

    fn is_of_other_lineage(&self, peer: PeerIdx) -> bool {
        let greeting = self.links[peer.0]
            .as_ref()
            .and_then(|link| link.greeting.as_ref());
        greeting.is_some_and(|greeting| {
            let theirs = &greeting.configuration;
            !theirs.is_none() && theirs.lineage != self.configuration.lineage
        })
    }

    /// This term is ours, and members follow it.
    pub(super) fn reigns(&self) -> bool {
        matches!(self.phase, Phase::Leading | Phase::Promoting(_))
    }

    /// Connected peers that have flushed WAL beyond `lsn` in this term, the most advanced first.
    /// Any of them may feed another: what an acceptor of this term has flushed is our own log.
    pub fn donors_for(&self, lsn: Lsn) -> Vec<PeerIdx> {
        let mut donors: Vec<(Lsn, PeerIdx)> = self
            .member_links()
            .filter(|(_, link)| link.stream.is_some_and(|stream| stream.following))
            .filter_map(|(peer, link)| {
                let greeting = link.greeting.as_ref()?;
                Some((self.flushed(greeting.member_id, greeting.incarnation), peer))
            })
            .filter(|(flush_lsn, _)| *flush_lsn > lsn)
            .collect();
        donors.sort_by(|a, b| b.cmp(a));
        donors.into_iter().map(|(_, peer)| peer).collect()
    }

    /// What every member (one that is about to become one included), and the local disk, has
    /// flushed; [`Lsn::INVALID`] while one of them is unheard in this term.
    pub(super) fn truncate_lsn(&self) -> Lsn {
        let members = self.configuration.all_members().chain(self.learners());
        let lowest = members
            .map(|member| self.flushed(member.id, member.incarnation))
            .min();
        let lowest = lowest.unwrap_or(Lsn::INVALID).min(self.local_flush_lsn);
        lowest.min(self.commit_lsn)
    }

    pub(super) fn heartbeat_ms(&self) -> u64 {
        self.settings.member_timeout_ms / HEARTBEATS_PER_TIMEOUT
    }

    /// A higher term exists: whatever this server writes from now on, no quorum will take it.
    pub(super) fn depose(&mut self, term: Term, out: &mut Actions) {
        self.end_reign(Phase::Deposed);
        out.push(ProposerAction::Deposed { term });
    }

    pub(super) fn end_reign(&mut self, phase: Phase) {
        self.phase = phase;
        for link in self.links.iter_mut().flatten() {
            link.stream = None;
        }
    }
}
