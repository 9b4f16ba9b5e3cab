//! A standby becomes the primary through the quorum. (design §7.3)

use std::time::Duration;

use cluster_tests::ledger::{Acknowledged, Ledger};
use cluster_tests::link::{Direction, Link};
use cluster_tests::place::give_to_server_user;
use cluster_tests::poll::{SOON, never_within, wait_for, wait_until};
use cluster_tests::postgres::{Postgres, Stop};
use cluster_tests::process::signal_descendant;
use cluster_tests::safekeeper::Safekeeper;
use cluster_tests::wal_compare::file_names;
use cluster_tests::{BackgroundCommit, Cluster, safekeepers_setting};
use safekeeper_protocol::Lsn;

/// The primary dies under load; a standby takes over with all that was acknowledged; other standbys
/// follow it over the switch, from the safekeepers alone. Three times in a row.
#[test]
fn three_promotions_in_a_row_lose_nothing() {
    let mut cluster = Cluster::start();
    let ledger = Ledger::start(&cluster.primary, 4);
    let mut standbys: Vec<Postgres> = (1..=3)
        .map(|n| cluster.start_standby(&format!("standby{n}")))
        .collect();
    wait_until("rows are acknowledged", SOON, || {
        ledger.acknowledged() > 500
    });
    cluster.primary.kill9();
    let acknowledged = ledger.stop();
    let mut tables = Vec::new();
    for n in 1..=3 {
        let mut promoted = standbys.remove(0);
        let before = term(&cluster);
        assert_eq!(promoted.value(PROMOTE), "t", "promotion {n}");
        // One term for the promotion, in which the worker goes on.
        assert_eq!(term(&cluster), before + 1);
        acknowledged.assert_all_in(&promoted);
        let table = format!("after_{n}");
        promoted.sql(&format!("create table {table} (a int)"));
        tables.push(table);
        assert_eq!(
            promoted.value("select tli from pg_stat_walproposer"),
            (n + 1).to_string()
        );
        let end = promoted.flush_lsn();
        for standby in &standbys {
            wait_replayed(standby, end);
            acknowledged.assert_all_in(standby);
            for table in &tables {
                standby.sql(&format!("select * from {table}"));
            }
        }
        promoted.kill9();
    }
    for safekeeper in &cluster.safekeepers {
        let (ok, report) = safekeeper.verify();
        assert!(ok, "{report}");
    }
}

/// The primary goes on writing while a standby is promoted. What it can get acknowledged before it
/// is fenced is on the new primary, and nothing after that.
#[test]
fn a_primary_that_is_alive_is_fenced() {
    let mut cluster = Cluster::start();
    let standby = cluster.start_standby("standby");
    let ledger = Ledger::start(&cluster.primary, 4);
    wait_until("rows are acknowledged", SOON, || {
        ledger.acknowledged() > 200
    });
    assert_eq!(standby.value(PROMOTE), "t");
    let fenced = ledger.acknowledged();
    never_within(
        "the fenced primary acknowledges",
        Duration::from_secs(3),
        || ledger.acknowledged() > fenced,
    );
    let reign = term(&cluster);
    cluster.primary.kill9();
    let acknowledged = ledger.stop();
    acknowledged.assert_all_in(&standby);
    standby.sql("create table new_reign (a int)");
    assert_eq!(
        term(&cluster),
        reign,
        "the fenced primary disturbed the reign"
    );
}

/// A standby that lags is not promoted before it has replayed all that was committed.
#[test]
fn what_was_committed_is_replayed_first() {
    let mut cluster = Cluster::start();
    cluster.primary.sql("create table t (n int)");
    let standby = cluster.start_standby("standby");
    wait_replayed(&standby, cluster.wait_all_caught_up(SOON));
    standby.sql("select pg_wal_replay_pause()");
    cluster
        .primary
        .sql("insert into t select generate_series(1, 20000)");
    cluster.primary.kill9();

    // In vain: it says what it waits for, and stays a standby.
    let log = warning_of(&standby, "select walproposer_promote(3)");
    assert!(log.contains("and replay is paused"), "{log}");
    assert_eq!(standby.value("select pg_is_in_recovery()"), "t");
    let promotion = BackgroundCommit::start(standby.config(), PROMOTE.to_owned());
    never_within("it is promoted", Duration::from_secs(2), || {
        promotion.answered()
    });
    standby.sql("select pg_wal_replay_resume()");
    promotion.wait(SOON).expect("it is promoted");
    assert_eq!(standby.value("select count(*) from t"), "20000");
    // The first attempt took timeline 2, and left nothing.
    assert_eq!(standby.value("select tli from pg_stat_walproposer"), "3");
    assert_no_placeholders(&standby);
    standby.sql("insert into t values (0)");
}

/// What is replayed removes rows that the session could see which asks for the promotion. Replay does
/// not wait for it, however patient it is told to be.
#[test]
fn replay_does_not_wait_for_whoever_waits_for_it() {
    let mut cluster = Cluster::start();
    cluster.primary.pgbench_init(1);
    let mut standby = Postgres::base_backup_of(&cluster.primary, &cluster.dir, "standby");
    cluster.follow_safekeepers(&standby);
    standby.configure("max_standby_streaming_delay = -1");
    standby.start();
    wait_replayed(&standby, cluster.wait_all_caught_up(SOON));
    standby.sql("select pg_wal_replay_pause()");
    cluster.primary.pgbench(4, Duration::from_secs(2));
    cluster.primary.sql("vacuum");
    let end = cluster.wait_all_caught_up(SOON);
    cluster.primary.kill9();
    let promotion = BackgroundCommit::start(standby.config(), PROMOTE.to_owned());
    wait_until("it waits for replay", SOON, || {
        standby.log().contains("; replaying up to there")
    });
    standby.sql("select pg_wal_replay_resume()");
    promotion.wait(SOON).expect("it is promoted");
    assert_eq!(standby.value("select pg_is_in_recovery()"), "f");
    assert!(standby.flush_lsn() > end);
}

/// The standby's WAL receiver hangs: the safekeeper that it has dialled stands still, and takes
/// connections all the same. A promotion does not wait for that one.
#[test]
fn a_receiver_that_hangs_does_not_hold_up_a_promotion() {
    let mut cluster = Cluster::start();
    cluster.primary.sql("create table t (n int)");
    let mut standby = Postgres::base_backup_of(&cluster.primary, &cluster.dir, "standby");
    cluster.follow_safekeepers(&standby);
    standby.restore_by_fetch_wal();
    standby.start();
    wait_replayed(&standby, cluster.wait_all_caught_up(SOON));
    cluster.safekeepers[0].process().pause();
    let receivers = || standby.process().children_named("walreceiver");
    let streaming = receivers();
    for receiver in &streaming {
        signal_descendant(*receiver, libc::SIGTERM);
    }
    wait_until("another receiver dials the first of the list", SOON, || {
        receivers().iter().any(|pid| !streaming.contains(pid))
    });
    cluster
        .primary
        .sql("insert into t select generate_series(1, 1000)");
    cluster.primary.kill9();
    assert_eq!(standby.value(PROMOTE), "t");
    assert_eq!(standby.value("select count(*) from t"), "1000");
    let log = standby.log();
    assert!(
        log.contains("promotion: restarting the WAL receiver"),
        "{log}"
    );
    cluster.safekeepers[0].process().resume();
}

/// Recovery is ended by others, but too late: the preparation was given up by then. The server has a
/// timeline of its own all the same, and leads, since the log ended just there.
#[test]
fn recovery_that_is_ended_too_late_is_ended_by_hand() {
    let mut cluster = Cluster::start();
    let standby = cluster.start_standby("standby");
    cluster.primary.kill9();
    assert_eq!(
        standby.value("select walproposer_prepare_promotion(1)"),
        "t"
    );
    wait_until("it is given up", SOON, || {
        standby.log().contains("promotion: given up")
    });
    assert_eq!(standby.value("select pg_promote()"), "t");
    standby.sql("create table t (a int)");
    assert_eq!(standby.value("select tli from pg_stat_walproposer"), "3");
}

/// Without a quorum nothing is promoted; nor if whoever asked thinks better of it.
#[test]
fn without_a_quorum_a_standby_stays_one() {
    let mut cluster = Cluster::start();
    let standby = cluster.start_standby("standby");
    cluster.primary.kill9();
    cluster.safekeepers[0].kill9();
    cluster.safekeepers[1].kill9();
    let log = warning_of(&standby, "select walproposer_promote(2)");
    assert!(
        log.contains("this standby was not promoted: no quorum: 1 members reachable, 2 needed"),
        "{log}"
    );
    let cancelled = standby.try_sql("set statement_timeout = '1s'; select walproposer_promote(60)");
    assert!(cancelled.is_err());
    wait_until("the request is withdrawn", SOON, || {
        standby.log().matches("promotion: given up").count() == 2
    });
    assert_eq!(standby.value("select pg_is_in_recovery()"), "t");
    for (statement, error) in [
        ("select walproposer_promote(0)", "must be positive"),
        (
            "select walproposer_prepare_promotion(-1)",
            "must be positive",
        ),
    ] {
        let text = standby.try_sql(statement).expect_err("refused");
        assert!(text.to_string().contains("db error"), "{text:?}");
        let text = text
            .as_db_error()
            .expect("the server's")
            .message()
            .to_owned();
        assert!(text.contains(error), "{statement}: {text}");
    }
    cluster.safekeepers[0].start();
    assert_eq!(standby.value(PROMOTE), "t");
    let error = standby.try_sql(PROMOTE).expect_err("it is no standby");
    let error = error
        .as_db_error()
        .expect("the server's")
        .message()
        .to_owned();
    assert_eq!(error, "recovery is not in progress");
}

/// For HA managers, which end recovery themselves. If they don't, the old primary may lead again: its
/// log is byte for byte the committed one (L1).
#[test]
fn a_prepared_promotion_is_finished_by_others_or_given_up() {
    let mut cluster = Cluster::start();
    cluster.primary.sql("create table t (who text)");
    let standby = cluster.start_standby("standby");
    cluster.primary.kill9();
    assert_eq!(
        standby.value("select walproposer_prepare_promotion(3)"),
        "t"
    );
    assert_eq!(standby.value("select pg_is_in_recovery()"), "t");
    wait_until("it is given up", SOON, || {
        standby
            .log()
            .contains("given up: recovery was not ended in time")
    });
    cluster.primary.start();
    cluster.primary.sql("insert into t values ('old primary')");
    cluster.wait_streaming(3);
    let end = cluster.primary.flush_lsn();
    wait_replayed(&standby, end);

    cluster.primary.kill9();
    assert_eq!(
        standby.value("select walproposer_prepare_promotion(60)"),
        "t"
    );
    let reign = term(&cluster);
    assert_eq!(standby.value("select pg_promote()"), "t");
    standby.sql("insert into t values ('new primary')");
    assert_eq!(term(&cluster), reign, "it goes on in the prepared term");
    assert_eq!(standby.value("select tli from pg_stat_walproposer"), "3");
    assert_no_placeholders(&standby);
}

/// A standby that lost sight of the log is promoted by hand, too early: it never leads, and disturbs
/// nobody. One that is promoted by hand just where the log ends does.
#[test]
fn promoted_by_hand_a_standby_leads_only_where_the_log_ended() {
    let mut cluster = Cluster::start();
    cluster.primary.sql("create table t (who text)");
    let mut early = cluster.start_standby("early");
    let right = cluster.start_standby("right");
    wait_replayed(&early, cluster.wait_all_caught_up(SOON));
    early.configure("primary_conninfo = ''");
    early.reload();
    wait_until("it receives nothing any more", SOON, || {
        early.value("select count(*) from pg_stat_wal_receiver") == "0"
    });
    cluster.primary.sql("insert into t values ('unseen')");
    let end = cluster.wait_all_caught_up(SOON);
    wait_replayed(&right, end);
    cluster.primary.kill9();

    let before = term(&cluster);
    early.sql("select pg_promote()");
    let lost = BackgroundCommit::start(early.config(), "insert into t values ('lost')".to_owned());
    let refusal = wait_for("it says why it does not lead", SOON, || {
        let rows = early.try_sql("select last_error from pg_stat_walproposer");
        let text = rows.ok()?.first()?.first()?.clone()?;
        text.contains("cannot continue the quorum's log")
            .then_some(text)
    });
    assert!(refusal.contains("written without a term from"), "{refusal}");
    never_within("its commit", Duration::from_secs(3), || lost.answered());
    assert_eq!(term(&cluster), before, "it disturbed the quorum");
    early.kill9();
    assert!(lost.wait(SOON).is_err());
    let log = early.start_refused();
    assert!(log.contains("must not start as a primary"), "{log}");

    // The other has all of the log, and nobody else is alive.
    assert_eq!(right.value("select pg_promote()"), "t");
    right.sql("insert into t values ('by hand')");
    assert_eq!(
        right.value("select string_agg(who, ', ' order by who) from t"),
        "by hand, unseen"
    );
}

/// The candidate is killed at each step of its promotion; then another one finishes, with all that
/// was acknowledged.
#[test]
fn a_candidate_that_dies_on_its_way_to_a_reign_leaves_the_quorum_to_another() {
    for step in [Step::Asked, Step::Voted, Step::Elected] {
        one_dies_and_another_finishes(step);
    }
}

#[test]
fn a_candidate_that_dies_while_recovery_ends_leaves_the_quorum_to_another() {
    for step in [Step::Replaying, Step::Ending, Step::Ended] {
        one_dies_and_another_finishes(step);
    }
}

fn one_dies_and_another_finishes(step: Step) {
    println!("killed when {step:?}");
    let mut crowd = Crowd::start();
    crowd.cluster.primary.kill9();
    let acknowledged = crowd.ledger.take().expect("it runs").stop();
    crowd.kill_first_at(step);
    let second = &crowd.second;
    assert_eq!(second.value(PROMOTE), "t", "after {step:?}");
    acknowledged.assert_all_in(second);
    second.sql("create table done (a int)");
    crowd.bring_first_back(step, &acknowledged);
}

/// Where a candidate is when it is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// It has greeted too few to ask for votes.
    Asked,
    /// A majority has voted; none has taken its Elected.
    Voted,
    /// Some have taken it, and no more than that is known.
    Elected,
    /// A majority follows; replay is not there yet.
    Replaying,
    /// The history is persisted, Postgres has been told to end recovery.
    Ending,
    /// On its new timeline; its worker does not lead yet.
    Ended,
}

/// A primary with clients, and two standbys; the first one's proposer goes through links.
struct Crowd {
    ledger: Option<Ledger>,
    links: Vec<Link>,
    first: Postgres,
    second: Postgres,
    cluster: Cluster,
}

impl Crowd {
    fn start() -> Crowd {
        let cluster = Cluster::start();
        let ledger = Ledger::start(&cluster.primary, 2);
        let second = cluster.start_standby("second");
        let mut first = Postgres::base_backup_of(&cluster.primary, &cluster.dir, "first");
        cluster.follow_safekeepers(&first);
        let links: Vec<Link> = cluster
            .safekeepers
            .iter()
            .map(|safekeeper| Link::to(safekeeper.address()))
            .collect();
        first.configure(&safekeepers_setting(links.iter().map(Link::address)));
        first.start();
        wait_until("rows are acknowledged", SOON, || {
            ledger.acknowledged() > 100
        });
        Crowd {
            ledger: Some(ledger),
            links,
            first,
            second,
            cluster,
        }
    }

    /// Has the first promoted, holds it where it is to die, and kills it there.
    fn kill_first_at(&mut self, step: Step) {
        let before = term(&self.cluster);
        match step {
            Step::Asked => self.links[1..].iter().for_each(Link::cut_both),
            // Nearly half a second between what is asked and what is answered.
            Step::Voted | Step::Elected => {
                for link in &self.links {
                    link.delay(Duration::from_millis(200));
                }
            }
            Step::Replaying => drop(self.first.sql("select pg_wal_replay_pause()")),
            Step::Ending | Step::Ended => {}
        }
        let promotion = BackgroundCommit::start(self.first.config(), PROMOTE.to_owned());
        let said = |text: &str| {
            wait_until(text, SOON, || self.first.log().contains(text));
        };
        match step {
            Step::Asked => said("no quorum: 1 members reachable"),
            Step::Voted => wait_until("a majority has voted", SOON, || {
                term(&self.cluster) > before
            }),
            Step::Elected => wait_until("one has taken its Elected", SOON, || {
                self.cluster.safekeepers.iter().any(|safekeeper| {
                    last_reign(&self.cluster, safekeeper).is_some_and(|term| term > before)
                })
            }),
            Step::Replaying => said("; replaying up to there"),
            Step::Ending => said("promotion: ending recovery"),
            Step::Ended => {
                said("promotion: ending recovery");
                for link in &self.links {
                    link.cut(Direction::ToTarget);
                }
                said("promotion: recovery has ended");
            }
        }
        self.first.kill9();
        // What was on its way must not arrive later and be taken for a rival's life.
        self.links.iter().for_each(Link::break_connections);
        assert!(step == Step::Ended || promotion.wait(SOON).is_err());
    }

    /// The one that was killed is of use again: as a standby, unless it has begun a timeline.
    fn bring_first_back(&mut self, step: Step, acknowledged: &Acknowledged) {
        let end = self.second.flush_lsn();
        for link in &self.links {
            link.delay(Duration::ZERO);
            link.heal();
        }
        let mut is_standby = self.first.data().join("standby.signal").exists();
        if !is_standby {
            assert!(matches!(step, Step::Ending | Step::Ended));
            let log = self.first.start_refused();
            assert!(log.contains("must not start as a primary"), "{log}");
            // Killed after its file was removed, and before it began a timeline.
            is_standby = log.contains("Create \"standby.signal\"");
            assert!(is_standby || log.contains("Run pg_rewind"), "{log}");
            if is_standby {
                self.first.touch("standby.signal");
                self.leave_history_of_half_a_promotion(&log);
            }
        }
        if is_standby {
            self.first.start();
            wait_replayed(&self.first, end);
            acknowledged.assert_all_in(&self.first);
            assert_no_placeholders(&self.first);
        }
        let reign = term(&self.cluster);
        self.second.sql("create table still_leads (a int)");
        assert_eq!(term(&self.cluster), reign);
        self.first_stops();
    }

    /// Its history file is written before all that: a moment that is hard to hit from outside.
    fn leave_history_of_half_a_promotion(&self, log: &str) {
        let tli = log
            .split("promoted to timeline ")
            .nth(1)
            .and_then(|rest| rest.split(',').next())
            .and_then(|number| number.parse::<u32>().ok())
            .expect("it says which");
        let path = self.first.wal_dir().join(format!("{tli:08X}.history"));
        if !path.exists() {
            // The other one began its timeline at the same place.
            let theirs = file_names(&self.second.wal_dir());
            let theirs = theirs.iter().rfind(|name| name.ends_with(".history"));
            let theirs = self.second.wal_dir().join(theirs.expect("it was promoted"));
            std::fs::copy(theirs, &path).expect("the server does not run");
            give_to_server_user(&path);
        }
    }

    fn first_stops(&mut self) {
        if self.first.is_started() {
            self.first.stop(Stop::Fast);
        }
    }
}

const PROMOTE: &str = "select walproposer_promote(60)";

/// The highest that two of the running safekeepers have.
fn term(cluster: &Cluster) -> u64 {
    let running = cluster.safekeepers.iter().filter(|s| s.runs());
    let mut terms: Vec<u64> = running
        .map(|safekeeper| {
            let status = safekeeper.cluster(cluster.system_id).expect("it answers");
            status["term"].as_u64().expect("a number")
        })
        .collect();
    terms.sort_unstable();
    terms[terms.len().saturating_sub(2)]
}

/// The last term in a safekeeper's history.
fn last_reign(cluster: &Cluster, safekeeper: &Safekeeper) -> Option<u64> {
    let status = safekeeper.cluster(cluster.system_id)?;
    status["term_history"].as_array()?.last()?["term"].as_u64()
}

#[track_caller]
fn wait_replayed(standby: &Postgres, lsn: Lsn) {
    let what = format!("{} replays {lsn}", standby.name());
    wait_until(&what, SOON, || standby.replay_lsn() >= lsn);
}

/// What the server's log says while a promotion is asked for in vain.
#[track_caller]
fn warning_of(standby: &Postgres, statement: &str) -> String {
    let before = standby.log().len();
    assert_eq!(standby.value(statement), "f", "{statement}");
    standby.log()[before..].to_owned()
}

/// The newest history file is a real one: a standby that starts would take it for its timeline.
fn assert_no_placeholders(server: &Postgres) {
    let entries = std::fs::read_dir(server.wal_dir()).expect("listed");
    let files = entries.flatten().map(|entry| entry.path());
    let newest = files
        .filter(|path| path.extension().is_some_and(|it| it == "history"))
        .max();
    if let Some(path) = newest {
        let text = std::fs::read_to_string(&path).expect("a text");
        assert!(!text.starts_with('#'), "{}: {text}", path.display());
    }
}
