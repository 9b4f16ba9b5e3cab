//! Clients that write, and remember what was acknowledged to them.
//!
//! Each client inserts rows `(client, number)` with numbers that only grow, one per transaction. A
//! number is *acknowledged* once COMMIT has returned without an error and without a warning:
//! Postgres warns when it gives up waiting for the quorum, and such a row is promised to nobody. If
//! the connection breaks before the answer, the row's fate is unknown; the client goes on with the
//! next number, and the check at the end allows either.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use postgres::{Client, Config, NoTls};

use crate::postgres::Postgres;

/// Clients at work. See the head of this file.
pub struct Ledger {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    clients: Vec<JoinHandle<Vec<u64>>>,
}

/// What was acknowledged: for each client its numbers, in order.
pub struct Acknowledged(Vec<Vec<u64>>);

impl Ledger {
    /// Creates the table and starts so many clients.
    pub fn start(primary: &Postgres, clients: usize) -> Ledger {
        primary
            .sql("create table ledger (client int, number bigint, primary key (client, number))");
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged = Arc::new(AtomicU64::new(0));
        let start_client = |client| {
            let (config, stop) = (primary.config(), stop.clone());
            let count = acknowledged.clone();
            thread::spawn(move || write_rows(&config, client, &stop, &count))
        };
        let clients = (0..clients).map(start_client).collect();
        Ledger {
            stop,
            acknowledged,
            clients,
        }
    }

    /// How many rows were acknowledged up to now.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// Lets each client finish its transaction. The server must be able to answer, or be dead.
    pub fn stop(self) -> Acknowledged {
        self.stop.store(true, Ordering::Relaxed);
        let join = |client: JoinHandle<_>| client.join().expect("a client does not panic");
        Acknowledged(self.clients.into_iter().map(join).collect())
    }
}

impl Acknowledged {
    pub fn count(&self) -> usize {
        self.0.iter().map(Vec::len).sum()
    }

    /// Panics unless every acknowledged row is in this server's table.
    #[track_caller]
    pub fn assert_all_in(&self, postgres: &Postgres) {
        let rows = postgres.sql("select client, number from ledger");
        let parse = |value: &Option<String>| value.as_deref().and_then(|text| text.parse().ok());
        let there: HashSet<(u64, u64)> = rows
            .iter()
            .map(|row| {
                (
                    parse(&row[0]).expect("an int"),
                    parse(&row[1]).expect("a bigint"),
                )
            })
            .collect();
        let all = (0u64..)
            .zip(&self.0)
            .flat_map(|(client, rows)| rows.iter().map(move |n| (client, *n)));
        let lost: Vec<_> = all.filter(|row| !there.contains(row)).collect();
        assert!(
            lost.is_empty(),
            "{} of {} acknowledged rows are lost, the first is {:?}",
            lost.len(),
            self.count(),
            lost[0],
        );
    }
}

fn write_rows(config: &Config, client: usize, stop: &AtomicBool, count: &AtomicU64) -> Vec<u64> {
    let mut acknowledged = Vec::new();
    let mut connection = None;
    for number in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let Some((connected, warned)) = &mut connection else {
            connection = connect(config);
            if connection.is_none() {
                // The server restarts; asking it a thousand times a second would not help it.
                thread::sleep(Duration::from_millis(50));
            }
            continue;
        };
        let insert = format!("insert into ledger values ({client}, {number})");
        match connected.batch_execute(&insert) {
            Ok(()) if !warned.swap(false, Ordering::Relaxed) => {
                acknowledged.push(number);
                count.fetch_add(1, Ordering::Relaxed);
            }
            Ok(()) => {}
            Err(_) => connection = None,
        }
    }
    acknowledged
}

/// A connection, and whether a warning came on it.
fn connect(config: &Config) -> Option<(Client, Arc<AtomicBool>)> {
    let warned = Arc::new(AtomicBool::new(false));
    let mut config = config.clone();
    let seen = warned.clone();
    config.notice_callback(move |notice| {
        if notice.severity() == "WARNING" {
            seen.store(true, Ordering::Relaxed);
        }
    });
    Some((config.connect(NoTls).ok()?, warned))
}
