//! What a safekeeper tells about itself: `/v1/status`, and the tables of `safekeeper status`.
//!
//! ```text
//!   {"id":1, "incarnation":"…", "version":"0.1.0", "clusters":[
//!     {"system_id":"…", "name":"main", "pg_major":15, "segment_size":16777216, "term":4,
//!      "configuration":{"version":"4.1", "members":[{"id":1,"incarnation":"…","host":"…","port":5454}],
//!                       "new_members":null},
//!      "term_history":[{"term":4,"tli":1,"start_lsn":"0/1000000"}],
//!      "write_lsn":"0/1000100", "flush_lsn":…, "commit_lsn":…, "oldest_lsn":…,
//!      "proposer":"10.0.0.5:40112",
//!      "standbys":[{"application_name":…, "address":…, "state":"streaming", "sent_lsn":…, …}],
//!      "slots":[{"slot_name":…, "temporary":false, "active":true, "active_by":…, "restart_lsn":…,
//!                "xmin":…, "catalog_xmin":…, "wal_status":"reserved"}], "slots_error":null,
//!      "over_bound":null, "error":null}]}
//! ```
//!
//! Positions are text as Postgres prints them; 64-bit identifiers are text too, since JSON's
//! numbers lose their last digits in many readers.

use std::fmt::Write as _;

use safekeeper_protocol::{ClusterIdentity, Configuration, Lsn, Member, TermHistory};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A position, as text in JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct LsnText(pub Lsn);

impl Serialize for LsnText {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for LsnText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<LsnText, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(LsnText).map_err(serde::de::Error::custom)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub id: u64,
    pub incarnation: String,
    pub version: String,
    pub clusters: Vec<ClusterStatus>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterStatus {
    pub system_id: String,
    pub name: String,
    pub pg_major: u16,
    pub segment_size: u32,
    pub term: u64,
    pub configuration: ConfigurationStatus,
    pub term_history: Vec<TermStatus>,
    pub write_lsn: LsnText,
    pub flush_lsn: LsnText,
    pub commit_lsn: LsnText,
    pub oldest_lsn: LsnText,
    /// Address of the elected proposer, while it is connected.
    pub proposer: Option<String>,
    pub standbys: Vec<StandbyStatus>,
    #[serde(default)]
    pub slots: Vec<SlotStatus>,
    /// Why the slots are not known.
    #[serde(default)]
    pub slots_error: Option<String>,
    /// Setting by which WAL is being removed that somebody needs.
    #[serde(default)]
    pub over_bound: Option<String>,
    /// Appends refused since the start because their WAL is damaged.
    pub damaged_appends: u64,
    /// Why the cluster is not served.
    pub error: Option<String>,
}

impl ClusterStatus {
    pub fn of(cluster: &ClusterIdentity) -> ClusterStatus {
        ClusterStatus {
            system_id: cluster.system_id.to_string(),
            name: cluster.name.clone(),
            pg_major: cluster.pg_major,
            segment_size: cluster.segment_size,
            ..ClusterStatus::default()
        }
    }

    /// Name for people and for the label of metrics.
    pub fn label(&self) -> String {
        if self.name.is_empty() {
            self.system_id.clone()
        } else {
            self.name.clone()
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigurationStatus {
    pub version: String,
    pub members: Vec<MemberStatus>,
    pub new_members: Option<Vec<MemberStatus>>,
}

impl From<&Configuration> for ConfigurationStatus {
    fn from(configuration: &Configuration) -> ConfigurationStatus {
        let list = |members: &[Member]| members.iter().map(MemberStatus::from).collect();
        ConfigurationStatus {
            version: configuration.version.to_string(),
            members: list(&configuration.members),
            new_members: configuration.new_members.as_deref().map(list),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberStatus {
    pub id: u64,
    pub incarnation: String,
    pub host: String,
    pub port: u16,
}

impl From<&Member> for MemberStatus {
    fn from(member: &Member) -> MemberStatus {
        MemberStatus {
            id: member.id.0,
            incarnation: member.incarnation.to_string(),
            host: member.host.clone(),
            port: member.port,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TermStatus {
    pub term: u64,
    pub tli: u32,
    pub start_lsn: LsnText,
}

pub fn term_history(history: &TermHistory) -> Vec<TermStatus> {
    let entries = history.entries().iter();
    entries
        .map(|entry| TermStatus {
            term: entry.term.0,
            tli: entry.tli.0,
            start_lsn: LsnText(entry.start_lsn),
        })
        .collect()
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandbyStatus {
    pub application_name: String,
    pub address: String,
    pub state: String,
    pub sent_lsn: LsnText,
    pub write_lsn: LsnText,
    pub flush_lsn: LsnText,
    pub apply_lsn: LsnText,
}

/// As `pg_replication_slots` has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotStatus {
    pub slot_name: String,
    pub temporary: bool,
    pub active: bool,
    /// Application and address.
    pub active_by: Option<String>,
    pub restart_lsn: Option<LsnText>,
    pub xmin: Option<u32>,
    pub catalog_xmin: Option<u32>,
    /// `reserved` within wal_keep_size, `extended` beyond it, `lost` for ever; none while nothing is
    /// reserved.
    pub wal_status: Option<String>,
}

/// The table of `safekeeper status`: one line a cluster, and one for each standby below it.
pub fn status_table(statuses: &[(String, Status)]) -> String {
    let mut rows = vec![row([
        "ADDRESS", "ID", "CLUSTER", "PG", "TERM", "WRITE", "FLUSH", "COMMIT", "PROPOSER",
    ])];
    let mut notes = String::new();
    for (address, status) in statuses {
        let id = status.id.to_string();
        if status.clusters.is_empty() {
            rows.push(row([address, &id, "(none)", "", "", "", "", "", ""]));
        }
        for cluster in &status.clusters {
            rows.push(row([
                address,
                &id,
                &cluster.label(),
                &cluster.pg_major.to_string(),
                &cluster.term.to_string(),
                &cluster.write_lsn.0.to_string(),
                &cluster.flush_lsn.0.to_string(),
                &cluster.commit_lsn.0.to_string(),
                cluster.proposer.as_deref().unwrap_or("-"),
            ]));
            for standby in &cluster.standbys {
                let _ = writeln!(
                    notes,
                    "{address}: cluster {}: {} at {}, {}: sent {}, flushed {}, applied {}",
                    cluster.label(),
                    standby.application_name,
                    standby.address,
                    standby.state,
                    standby.sent_lsn.0,
                    standby.flush_lsn.0,
                    standby.apply_lsn.0
                );
            }
            for slot in &cluster.slots {
                let restart_lsn = slot.restart_lsn.map(|lsn| lsn.0.to_string());
                let xmin = slot.xmin.map(|xmin| xmin.to_string());
                let _ = writeln!(
                    notes,
                    "{address}: cluster {}: slot {}{}, {}, {}: restart {}, xmin {}",
                    cluster.label(),
                    slot.slot_name,
                    if slot.temporary { " (temporary)" } else { "" },
                    if slot.active { "active" } else { "inactive" },
                    slot.wal_status.as_deref().unwrap_or("nothing reserved"),
                    restart_lsn.as_deref().unwrap_or("-"),
                    xmin.as_deref().unwrap_or("-")
                );
            }
            let problems = [
                ("slots are not known", &cluster.slots_error),
                ("WAL is removed that is needed, over", &cluster.over_bound),
            ];
            for (problem, why) in problems {
                if let Some(why) = why {
                    let label = cluster.label();
                    let _ = writeln!(notes, "{address}: cluster {label}: {problem}: {why}");
                }
            }
            if let Some(error) = &cluster.error {
                let _ = writeln!(
                    notes,
                    "{address}: cluster {}: not served: {error}",
                    cluster.label()
                );
            }
        }
    }
    aligned(&rows) + &notes
}

/// The table of `safekeeper members`: who the members are, as each safekeeper knows it.
pub fn members_table(statuses: &[(String, Status)]) -> String {
    let mut rows = vec![row([
        "ADDRESS",
        "CLUSTER",
        "CONFIGURATION",
        "SET",
        "ID",
        "MEMBER",
        "INCARNATION",
    ])];
    for (address, status) in statuses {
        for cluster in &status.clusters {
            let configuration = &cluster.configuration;
            let old = configuration
                .members
                .iter()
                .map(|member| ("current", member));
            let new = configuration.new_members.iter().flatten();
            for (set, member) in old.chain(new.map(|member| ("new", member))) {
                rows.push(row([
                    address,
                    &cluster.label(),
                    &configuration.version,
                    set,
                    &member.id.to_string(),
                    &format!("{}:{}", member.host, member.port),
                    &member.incarnation,
                ]));
            }
        }
    }
    aligned(&rows)
}

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

fn aligned(rows: &[Vec<String>]) -> String {
    let n_columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |i: usize| {
        let cells = rows.iter().filter_map(|row| row.get(i));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..n_columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let line_start = text.len();
        for (cell, width) in row.iter().zip(&widths) {
            // By hand: a width in a format string ends at 65,535 with a panic, and a cell may be
            // as long as another safekeeper's answer.
            let n_spaces = width - cell.chars().count() + 2;
            text.push_str(cell);
            text.extend(std::iter::repeat_n(' ', n_spaces));
        }
        text.truncate(line_start + text[line_start..].trim_end().len());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Status {
        Status {
            id: 1,
            incarnation: "ab".into(),
            version: "0.1.0".into(),
            clusters: vec![ClusterStatus {
                system_id: "7000000000000000001".into(),
                name: "main".into(),
                pg_major: 15,
                segment_size: 1 << 24,
                term: 4,
                commit_lsn: LsnText(Lsn(0x16B_3748)),
                configuration: ConfigurationStatus {
                    version: "4.1".into(),
                    members: vec![MemberStatus {
                        id: 1,
                        incarnation: "ab".into(),
                        host: "sk1".into(),
                        port: 5454,
                    }],
                    new_members: None,
                },
                standbys: vec![StandbyStatus {
                    application_name: "walreceiver".into(),
                    address: "127.0.0.1:9".into(),
                    state: "streaming".into(),
                    sent_lsn: LsnText(Lsn(1)),
                    write_lsn: LsnText(Lsn(1)),
                    flush_lsn: LsnText(Lsn(1)),
                    apply_lsn: LsnText(Lsn(1)),
                }],
                error: Some("broken".into()),
                ..ClusterStatus::default()
            }],
        }
    }

    #[test]
    fn json_and_back() {
        let json = serde_json::to_string(&status()).expect("serializes");
        assert!(json.contains(r#""commit_lsn":"0/16B3748""#), "{json}");
        assert_eq!(
            serde_json::from_str::<Status>(&json).expect("parses"),
            status()
        );
        assert!(serde_json::from_str::<LsnText>("\"x/y\"").is_err());
    }

    #[test]
    fn tables_say_who_and_how_far() {
        let statuses = [("127.0.0.1:7676".to_owned(), status())];
        let table = status_table(&statuses);
        assert!(
            table.contains("127.0.0.1:7676  1   main     15  4"),
            "{table}"
        );
        assert!(
            table.contains("cluster main: walreceiver at 127.0.0.1:9, streaming"),
            "{table}"
        );
        assert!(table.contains("not served: broken"), "{table}");
        let table = members_table(&statuses);
        assert!(
            table.contains("4.1            current  1   sk1:5454"),
            "{table}"
        );
    }

    #[test]
    fn a_table_takes_a_cell_of_any_length() {
        // Another safekeeper's word; and the width of a format string ends at 65,535.
        let mut long = status();
        long.clusters[0].name = "é".repeat(70_000);
        let statuses = [("a".to_owned(), long), ("b".to_owned(), status())];
        let table = status_table(&statuses);
        let columns: Vec<usize> = table
            .lines()
            .skip(1)
            .take(2)
            .map(|line| line.chars().count())
            .collect();
        assert_eq!(columns[0], columns[1], "the columns behind it are aligned");
        assert!(members_table(&statuses).contains(&"é".repeat(70_000)));
    }
}
