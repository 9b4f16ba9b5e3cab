//! Clients that write, and remember what was acknowledged to them.
//!
//! Each row has a number of its own, one transaction each. A number is *acknowledged* once COMMIT
//! has returned without an error and without a warning: Postgres warns when it gives up waiting for
//! the quorum, and such a row is promised to nobody. If the connection breaks before the answer,
//! the row's fate is unknown; the client goes on with another number, and the check at the end
//! allows either.
//!
//! The clients can be sent to another server. Those that still wait for an answer of the former one
//! stay there until they have it, or their connection breaks, and then end: if it should come, it
//! counts like any other.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use postgres::{Client, Config, NoTls};

use crate::postgres::{Postgres, text_rows};

/// Clients at work. See the head of this file.
pub struct Ledger {
    shared: Arc<Shared>,
    at_once: usize,
    clients: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    next_number: AtomicU64,
    /// How often the clients were sent to another server.
    moves: AtomicU64,
    acknowledged: Mutex<Vec<Acknowledgement>>,
}

/// A promise that was made to a client.
#[derive(Clone, Debug)]
pub struct Acknowledgement {
    pub number: u64,
    /// Who made it.
    pub server: Arc<str>,
    /// In which it led when the client connected; `None` if it did not.
    pub term: Option<u64>,
    pub at: Instant,
}

/// What was acknowledged, in the order in which the clients learned of it.
pub struct Acknowledged(Vec<Acknowledgement>);

impl Ledger {
    /// Creates the table and starts so many clients.
    pub fn start(primary: &Postgres, clients: usize) -> Ledger {
        primary.sql("create table ledger (number bigint primary key, term bigint)");
        let mut ledger = Ledger {
            shared: Arc::new(Shared::default()),
            at_once: clients,
            clients: Vec::new(),
        };
        ledger.send_to(primary);
        ledger
    }

    /// From now on they write here.
    pub fn send_to(&mut self, primary: &Postgres) {
        let moves = self.shared.moves.fetch_add(1, Ordering::SeqCst) + 1;
        for _ in 0..self.at_once {
            let client = Writer {
                shared: self.shared.clone(),
                server: primary.name().into(),
                config: primary.config(),
                moves,
            };
            self.clients
                .push(thread::spawn(move || client.write_rows()));
        }
    }

    /// How many rows were acknowledged up to now.
    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledgements().len() as u64
    }

    /// All acknowledgements up to now.
    pub fn so_far(&self) -> Acknowledged {
        Acknowledged(self.shared.acknowledgements().clone())
    }

    /// The first acknowledgement by a server since a moment.
    pub fn first_by(&self, server: &Postgres, since: Instant) -> Option<Instant> {
        let all = self.shared.acknowledgements();
        let by_it = |ack: &&Acknowledgement| &*ack.server == server.name();
        let later = all.iter().rev().take_while(|ack| ack.at >= since);
        later.filter(by_it).map(|ack| ack.at).last()
    }

    /// Lets each client finish its transaction. The servers must be able to answer, or be dead.
    pub fn stop(self) -> Acknowledged {
        self.shared.stop.store(true, Ordering::SeqCst);
        for client in self.clients {
            client.join().expect("a client does not panic");
        }
        let all = std::mem::take(&mut *self.shared.acknowledgements());
        Acknowledged(all)
    }
}

impl Acknowledged {
    pub fn count(&self) -> usize {
        self.0.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Acknowledgement> {
        self.0.iter()
    }

    /// Panics unless every acknowledged row is in this server's table.
    #[track_caller]
    pub fn assert_all_in(&self, postgres: &Postgres) {
        let there = numbers_in(postgres);
        let lost = self.0.iter().filter(|ack| !there.contains(&ack.number));
        let lost: Vec<_> = lost.collect();
        assert!(
            lost.is_empty(),
            "{} of {} acknowledged rows are lost, the first is {:?}",
            lost.len(),
            self.count(),
            lost[0],
        );
    }

    /// Panics if two servers acknowledged in one term (`one_proposer_per_term`).
    #[track_caller]
    pub fn assert_one_server_per_term(&self) {
        let mut servers: BTreeMap<u64, &str> = BTreeMap::new();
        for ack in &self.0 {
            let Some(term) = ack.term else { continue };
            let server = servers.entry(term).or_insert(&ack.server);
            assert_eq!(
                *server, &*ack.server,
                "two servers acknowledged in term {term}"
            );
        }
    }

    /// The longest time in which nobody was acknowledged anything.
    pub fn longest_gap(&self) -> Duration {
        let gaps = self.0.windows(2);
        let gaps = gaps.map(|pair| pair[1].at.saturating_duration_since(pair[0].at));
        gaps.max().unwrap_or_default()
    }
}

/// All rows of a server's table.
#[track_caller]
pub fn numbers_in(postgres: &Postgres) -> HashSet<u64> {
    numbers(&postgres.sql("select number from ledger"))
}

pub(crate) fn numbers(rows: &[crate::postgres::Row]) -> HashSet<u64> {
    let parse = |row: &crate::postgres::Row| row[0].as_deref()?.parse().ok();
    rows.iter()
        .map(|row| parse(row).expect("a bigint"))
        .collect()
}

impl Shared {
    fn acknowledgements(&self) -> std::sync::MutexGuard<'_, Vec<Acknowledgement>> {
        self.acknowledged
            .lock()
            .expect("no holder of the lock panics")
    }
}

/// The server restarts, or is a standby yet: asking it a thousand times a second would not help it.
const PAUSE: Duration = Duration::from_millis(20);

struct Writer {
    shared: Arc<Shared>,
    server: Arc<str>,
    config: Config,
    /// When it was sent.
    moves: u64,
}

impl Writer {
    fn write_rows(&self) {
        let mut connection = None;
        while self.is_wanted() {
            let Some(connected) = &mut connection else {
                connection = Connection::to(&self.config);
                if connection.is_none() {
                    thread::sleep(PAUSE);
                }
                continue;
            };
            let number = self.shared.next_number.fetch_add(1, Ordering::SeqCst);
            match connected.insert(number) {
                Ok(true) => self
                    .shared
                    .acknowledgements()
                    .push(self.acknowledgement(number, connected.term)),
                Ok(false) => {}
                Err(_) => {
                    connection = None;
                    thread::sleep(PAUSE);
                }
            }
        }
    }

    fn is_wanted(&self) -> bool {
        !self.shared.stop.load(Ordering::SeqCst)
            && self.shared.moves.load(Ordering::SeqCst) == self.moves
    }

    fn acknowledgement(&self, number: u64, term: Option<u64>) -> Acknowledgement {
        Acknowledgement {
            number,
            server: self.server.clone(),
            term,
            at: Instant::now(),
        }
    }
}

struct Connection {
    client: Client,
    /// A warning came since it was last looked at.
    warned: Arc<AtomicBool>,
    term: Option<u64>,
}

impl Connection {
    fn to(config: &Config) -> Option<Connection> {
        let warned = Arc::new(AtomicBool::new(false));
        let mut config = config.clone();
        let seen = warned.clone();
        config.notice_callback(move |notice| {
            if notice.severity() == "WARNING" {
                seen.store(true, Ordering::SeqCst);
            }
        });
        let mut client = config.connect(NoTls).ok()?;
        let query = "select term from pg_stat_walproposer where state = 'leading'";
        let rows = text_rows(&mut client, query).ok()?;
        let term = rows.first().and_then(|row| row[0].as_deref()?.parse().ok());
        Some(Connection {
            client,
            warned,
            term,
        })
    }

    /// Whether the row was acknowledged.
    fn insert(&mut self, number: u64) -> Result<bool, postgres::Error> {
        let term = self.term.map_or("null".to_owned(), |term| term.to_string());
        let insert = format!("insert into ledger values ({number}, {term})");
        self.client.batch_execute(&insert)?;
        Ok(!self.warned.swap(false, Ordering::SeqCst))
    }
}
