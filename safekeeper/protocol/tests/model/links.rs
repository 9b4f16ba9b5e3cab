//! Connections: what is sent arrives in order, at some time, or not at all once it is broken.
//!
//! The two sides learn of an end at different times. A server that gives up a connection dials anew
//! at once, while the safekeeper may still be reading the [`Old`] one; of three connections the
//! oldest is gone. A safekeeper that dies ends all of its own; what it said before may still be
//! heard.

use safekeeper_protocol::*;

use super::step::{NOW_MS, Run, Step};
use super::world::*;

/// Answers and greetings of one step, at most: there are six links, and few words on each.
const HEARD_MAX: usize = 500;

impl Run<'_> {
    pub fn connect(&mut self, server: usize, safekeeper: usize) {
        let link = self.world.links[server][safekeeper].edit();
        let slot = link.old.as_ref().map_or(0, |old| 1 - old.slot);
        *link = Link {
            open: true,
            slot,
            old: link.old.take(),
            ..Link::default()
        };
        self.held[server][safekeeper] = false;
        let peer = self.world.servers[server].peer(safekeeper);
        self.drive(server, |proposer, out| {
            proposer.on_connected(peer, NOW_MS, out)
        });
    }

    /// The server's end is closed; what it sent may still arrive.
    pub fn give_up(&mut self, server: usize, safekeeper: usize) {
        let link = self.world.links[server][safekeeper].edit();
        if !link.open {
            return;
        }
        let (slot, ended) = (link.slot, link.ended);
        let requests = std::mem::take(&mut link.requests);
        let older = link.old.take();
        *link = Link::default();
        let acceptor = &mut self.world.safekeepers[safekeeper].edit().acceptor;
        if ended || requests.is_empty() {
            if !ended {
                acceptor.on_disconnected(World::session(server, slot));
            }
            link.old = older;
        } else {
            // Of three connections the oldest is cut in the middle of what it said.
            if let Some(older) = older {
                acceptor.on_disconnected(World::session(server, older.slot));
            }
            link.old = Some(Old { slot, requests });
        }
    }

    pub fn disconnect(&mut self, server: usize, safekeeper: usize) {
        self.give_up(server, safekeeper);
        let peer = self.world.servers[server].peer(safekeeper);
        self.drive(server, |proposer, _| proposer.on_disconnected(peer, NOW_MS));
    }

    pub fn reconnect(&mut self, server: usize, safekeeper: usize) {
        if self.world.servers[server].proposer.is_some() {
            self.connect(server, safekeeper);
        }
    }

    /// What a given-up connection still holds is dropped if it changes nothing, now or ever: a
    /// greeting, or a message of a term that is over, if the acceptor treats it so.
    pub fn drop_old_news(&mut self) {
        for server in 0..SERVERS {
            for safekeeper in 0..SAFEKEEPERS {
                while let Some(old) = &self.world.links[server][safekeeper].old {
                    let acceptor = &self.world.safekeepers[safekeeper].acceptor;
                    let Some((message, _)) = old.requests.front() else {
                        break;
                    };
                    let over = match message {
                        ProposerMessage::Greeting(_) => true,
                        ProposerMessage::VoteRequest(m) => m.term <= acceptor.term(),
                        ProposerMessage::Elected(m) => m.term < acceptor.term(),
                        ProposerMessage::Append(m) => m.term < acceptor.term(),
                        ProposerMessage::Configure(_) | ProposerMessage::Read(_) => false,
                    };
                    if !over || acceptor.needs_flush() {
                        break;
                    }
                    let before = self.world.clone();
                    let (session, message) = (World::session(server, old.slot), message.clone());
                    let taken = self.handle(safekeeper, session, &message, &Vec::new(), None);
                    let changed =
                        *self.world.safekeepers[safekeeper] != *before.safekeepers[safekeeper];
                    self.world = before;
                    if changed {
                        // Not as it should be: let it happen as a step that a trace shows.
                        break;
                    }
                    self.end_old_request(server, safekeeper, taken);
                }
            }
        }
    }

    pub fn hold_what_is_late(&mut self, before: &World) {
        for (held, links) in self.held.iter_mut().zip(&before.links) {
            for (held, link) in held.iter_mut().zip(links) {
                *held = !link.answers.is_empty();
            }
        }
    }

    /// The end of a step: what was answered is heard, unless it is late. `None` if nothing is late
    /// although it should be.
    pub fn settle(&mut self, step: Step) -> Option<()> {
        if self.world.faults.safekeeper_crashes == 0 {
            // A flush shows only if something can happen before it.
            for safekeeper in 0..SAFEKEEPERS {
                self.flush(safekeeper);
            }
        }
        if let Step::Deliver {
            server,
            safekeeper,
            late: true,
        } = step
            && self.world.links[server][safekeeper].answers.is_empty()
        {
            return None;
        }
        let mut heard = 0;
        while self.hear_one() || self.greet_one() {
            heard += 1;
            // One refuses, on each connection anew, what the other will say again.
            if heard > HEARD_MAX {
                self.world.accuse(Violation::Endless);
                break;
            }
        }
        Some(())
    }

    /// A link for which it holds.
    fn link_with(&self, holds: impl Fn(usize, usize, &Link) -> bool) -> Option<(usize, usize)> {
        let pairs = (0..SERVERS)
            .flat_map(|server| (0..SAFEKEEPERS).map(move |safekeeper| (server, safekeeper)));
        pairs.into_iter().find(|&(server, safekeeper)| {
            holds(server, safekeeper, &self.world.links[server][safekeeper])
        })
    }

    fn hear_one(&mut self) -> bool {
        let found = self.link_with(|server, safekeeper, link| {
            !self.held[server][safekeeper] && !link.answers.is_empty()
        });
        let Some((server, safekeeper)) = found else {
            return false;
        };
        if let Some(answer) = self.world.links[server][safekeeper]
            .edit()
            .answers
            .pop_front()
        {
            self.hear(server, safekeeper, &answer);
        }
        true
    }

    fn greet_one(&mut self) -> bool {
        let found = self.link_with(|server, safekeeper, link| {
            let greeting = matches!(
                link.requests.front(),
                Some((ProposerMessage::Greeting(_), _))
            );
            self.scope.prompt_greetings && !self.held[server][safekeeper] && greeting
        });
        let Some((server, safekeeper)) = found else {
            return false;
        };
        if let Some((message, entries)) = self.world.links[server][safekeeper]
            .edit()
            .requests
            .pop_front()
        {
            self.hand_over(server, safekeeper, &message, &entries);
        }
        true
    }

    pub fn hear(&mut self, server: usize, safekeeper: usize, answer: &AcceptorMessage) {
        let peer = self.world.servers[server].peer(safekeeper);
        self.drive(server, |proposer, out| {
            proposer.on_message(peer, answer, NOW_MS, out)
        });
        let link = &self.world.links[server][safekeeper];
        if link.open && link.ended && link.answers.is_empty() {
            self.disconnect(server, safekeeper);
            self.reconnect(server, safekeeper);
        }
    }

    pub fn deliver_old(&mut self, server: usize, safekeeper: usize) {
        let link = self.world.links[server][safekeeper].edit();
        let Some(old) = &mut link.old else { return };
        let slot = old.slot;
        let Some((message, entries)) = old.requests.pop_front() else {
            return;
        };
        old.requests.push_front((message.clone(), Vec::new()));
        let taken = self.handle(
            safekeeper,
            World::session(server, slot),
            &message,
            &entries,
            None,
        );
        self.end_old_request(server, safekeeper, taken);
        self.scope.seen.stale.count();
    }

    /// The oldest request of a given-up connection was `taken`, or refused, which ends it.
    pub fn end_old_request(&mut self, server: usize, safekeeper: usize, taken: bool) {
        let link = self.world.links[server][safekeeper].edit();
        let Some(old) = &mut link.old else { return };
        old.requests.pop_front();
        if old.requests.is_empty() || !taken {
            let session = World::session(server, old.slot);
            link.old = None;
            self.world.safekeepers[safekeeper]
                .edit()
                .acceptor
                .on_disconnected(session);
        }
    }
}
