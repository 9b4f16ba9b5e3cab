//! Clients that read, and remember every row of the ledger that a server has ever shown them.
//!
//! What a server has shown must be there for ever, acknowledged or not: somebody may have acted on
//! it. One reader for each server, primary or standby; it connects again whenever it must, and asks
//! as fast as it is answered.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use postgres::{Client, Config, NoTls};

use crate::ledger::{numbers, numbers_in};
use crate::poll::SOON;
use crate::postgres::{Postgres, text_rows};

/// Readers at work. See the head of this file.
pub struct Readers {
    shared: Arc<Shared>,
    readers: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    reads: AtomicU64,
    /// By number, and who showed it first.
    shown: Mutex<HashMap<u64, Arc<str>>>,
}

/// A row may become visible after one with a higher number: so many are asked for again. There are
/// fewer clients than that.
const OVERLAP: u64 = 200;
/// Between two reads: each may see new rows, and the servers have other things to do.
const PAUSE: Duration = Duration::from_millis(10);

impl Readers {
    pub fn start<'a>(servers: impl IntoIterator<Item = &'a Postgres>) -> Readers {
        let shared = Arc::new(Shared::default());
        let start = |server: &Postgres| {
            let (shared, config) = (shared.clone(), server.config());
            let name: Arc<str> = server.name().into();
            thread::spawn(move || shared.read(&name, &config))
        };
        let readers = servers.into_iter().map(start).collect();
        Readers { shared, readers }
    }

    /// How many reads were answered up to now.
    pub fn reads(&self) -> u64 {
        self.shared.reads.load(Ordering::SeqCst)
    }

    /// How many rows were ever shown.
    pub fn shown(&self) -> usize {
        self.shared.shown().len()
    }

    /// Panics unless every row that was ever shown is in this server's table. A standby may show a
    /// row before the primary does, which has to hear first that it is committed: so the primary is
    /// given a moment.
    #[track_caller]
    pub fn assert_all_in(&self, postgres: &Postgres) {
        let shown = self.shared.shown().clone();
        let started = Instant::now();
        loop {
            let there = numbers_in(postgres);
            let lost = shown.iter().filter(|(number, _)| !there.contains(number));
            let lost: Vec<_> = lost.collect();
            if lost.is_empty() {
                return;
            }
            assert!(
                started.elapsed() < SOON,
                "{} of {} rows that were shown are lost, the first is {:?}",
                lost.len(),
                shown.len(),
                lost[0],
            );
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// The servers must be able to answer, or be dead.
    pub fn stop(self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for reader in self.readers {
            reader.join().expect("a reader does not panic");
        }
    }
}

impl Shared {
    fn shown(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Arc<str>>> {
        self.shown.lock().expect("no holder of the lock panics")
    }

    fn read(&self, server: &Arc<str>, config: &Config) {
        let mut connection: Option<Client> = None;
        let mut seen_up_to = 0_u64;
        while !self.stop.load(Ordering::SeqCst) {
            thread::sleep(PAUSE);
            let Some(client) = &mut connection else {
                connection = config.connect(NoTls).ok();
                continue;
            };
            let from = seen_up_to.saturating_sub(OVERLAP);
            let query = format!("select number from ledger where number >= {from}");
            match text_rows(client, &query) {
                Ok(rows) => {
                    let numbers = numbers(&rows);
                    seen_up_to = numbers.iter().copied().fold(seen_up_to, u64::max);
                    let mut shown = self.shown();
                    for number in numbers {
                        shown.entry(number).or_insert_with(|| server.clone());
                    }
                    self.reads.fetch_add(1, Ordering::SeqCst);
                }
                Err(_) => connection = None,
            }
        }
    }
}
