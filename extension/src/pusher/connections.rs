//! What comes in from the members, and what fails.
//!
//! A connection that fails is closed and dialled again by its [`Peer`](crate::peer::Peer); here it
//! is told to the proposer and, if it is news, to the log.

use std::time::Duration;

use pgrx::PgSqlErrorCode;
use safekeeper_protocol::{AcceptorMessage, Lsn, PeerIdx};

use super::{Pusher, millis, thread_panicked};
use crate::peer::DialEvent;
use crate::postgres;

/// Reads from one socket in one turn, so that a member that says much does not hold up the others.
const READS_PER_TURN: usize = 16;

impl Pusher {
    pub(super) fn poll_dials(&mut self) {
        let now_ms = self.now_ms();
        for at in 0..self.members.len() {
            let peer = &mut self.members[at].peer;
            if let Err(error) = peer.dial_if_due(now_ms, &self.waker) {
                postgres::error(
                    PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES,
                    format!("could not start a thread: {error}"),
                    "",
                );
            }
            match peer.poll_dial(now_ms) {
                DialEvent::Nothing => {}
                DialEvent::Connected => {
                    self.round_trip = self.round_trip_to_majority();
                    self.proposer
                        .on_connected(PeerIdx(at), now_ms, &mut self.actions);
                    self.carry_out();
                }
                DialEvent::Failed(reason) => self.close(at, &reason),
                DialEvent::Panicked(text) => thread_panicked(&text),
            }
        }
    }

    fn round_trip_to_majority(&self) -> Duration {
        let up = self.members.iter().filter(|member| member.peer.is_up());
        let mut times: Vec<Duration> = up.map(|member| member.peer.round_trip()).collect();
        times.sort_unstable();
        let last = times.get(self.members.len() / 2).or(times.last());
        last.copied().unwrap_or_default()
    }

    pub(super) fn receive(&mut self, at: usize) {
        for reads in 1.. {
            let may_be_more = match self.members[at].peer.receive() {
                Ok(more) => more,
                Err(error) => return self.close(at, &error.to_string()),
            };
            loop {
                match self.members[at].peer.next_message() {
                    Ok(Some(message)) => self.on_message(at, &message),
                    Ok(None) => break,
                    Err(error) => return self.close(at, &error.to_string()),
                }
            }
            // Of what is decrypted already the socket will not tell.
            let has_input = reads < READS_PER_TURN || self.members[at].peer.has_input();
            if !may_be_more || !has_input {
                return;
            }
        }
    }

    fn on_message(&mut self, at: usize, message: &AcceptorMessage) {
        match message {
            AcceptorMessage::Greeting(greeting) if self.members[at].peer.on_greeted() => {
                let address = &self.members[at].peer.dial().address;
                let id = greeting.member_id;
                postgres::log(format!("connected to safekeeper {id} at {address}"));
            }
            AcceptorMessage::AppendResponse(response) => {
                let now = self.started.elapsed();
                self.members[at].lag.acknowledged(response.flush_lsn, now);
            }
            _ => {}
        }
        let now = self.started.elapsed();
        self.proposer
            .on_message(PeerIdx(at), message, millis(now), &mut self.actions);
        self.carry_out();
        self.on_feedback(now);
    }

    /// Ends a member's connection; it is dialled again after a pause.
    pub(super) fn close(&mut self, at: usize, reason: &str) {
        let now_ms = self.now_ms();
        let member = &mut self.members[at];
        let was_up = member.peer.is_up();
        if member.peer.close(reason, now_ms) {
            let address = &member.peer.dial().address;
            let what = if was_up {
                "lost connection to"
            } else {
                "could not connect to"
            };
            postgres::log(format!("{what} safekeeper {address}: {reason}"));
        }
        member.feed.stop();
        member.lag.forget();
        member.told_lsn = Lsn::INVALID;
        self.round_trip = self.round_trip_to_majority();
        if was_up {
            self.proposer.on_disconnected(PeerIdx(at), now_ms);
        }
    }
}
