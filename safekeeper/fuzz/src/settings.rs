//! Text that people and other safekeepers write: the file of settings, and the answer that
//! `safekeeper status` gets.
//!
//! A file and the same settings given one by one must come to the same. A status that is understood
//! must survive being told again, and show as a table.

use safekeeper::config::Config;
use safekeeper::status::{ClusterStatus, LsnText, SlotStatus, Status, members_table, status_table};
use safekeeper_protocol::Lsn;

pub fn check(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    check_settings(text);
    if let Ok(status) = serde_json::from_str::<Status>(text) {
        check_status(status);
    }
}

fn check_settings(text: &str) {
    let whole = Config::from_toml(text);
    let Ok(table) = text.parse::<toml::Table>() else {
        assert!(whole.is_err());
        return;
    };
    let mut config = Config::default();
    let one_by_one = table
        .into_iter()
        .try_for_each(|(name, value)| config.set(&name, value))
        .map(|()| config);
    // Which of several mistakes is named is a matter of order.
    assert_eq!(whole.is_ok(), one_by_one.is_ok());
    if let Ok(whole) = whole {
        assert_eq!(Ok(&whole), one_by_one.as_ref());
        // Anything but an address would have to be looked up.
        let is_address = |text: &str| text.parse::<std::net::SocketAddr>().is_ok();
        if is_address(&whole.listen) && is_address(&whole.http) {
            let _ = whole.addresses();
        }
    }
}

fn check_status(status: Status) {
    let json = serde_json::to_string(&status).expect("numbers and text");
    assert_eq!(
        serde_json::from_str::<Status>(&json).ok().as_ref(),
        Some(&status)
    );
    let n_clusters = status.clusters.len();
    let statuses = [("127.0.0.1:7676".to_owned(), status)];
    assert!(status_table(&statuses).lines().count() > n_clusters.max(1));
    assert!(!members_table(&statuses).is_empty());
}

/// Every setting, and a status with a cluster.
pub fn seeds() -> Vec<Vec<u8>> {
    let settings = r#"
listen = "127.0.0.1:5454"
http = "[::1]:7676"
trust_network = true
max_connections = 7
wal_keep_size = "2MB"
max_wal_keep = "64 GB"
min_free_space = "256MB"
max_replication_slots = 5
wal_sender_timeout = "90s"
log_format = "json"
log_level = "debug"
"#;
    let slot = SlotStatus {
        slot_name: "standby1".to_owned(),
        temporary: false,
        active: true,
        active_by: Some("standby1 at 10.0.0.5:40112".to_owned()),
        restart_lsn: Some(LsnText(Lsn(0x123_4568))),
        xmin: Some(700),
        catalog_xmin: None,
        wal_status: Some("reserved".to_owned()),
    };
    let status = Status {
        id: 1,
        incarnation: "ab".to_owned(),
        version: "0.1.0".to_owned(),
        clusters: vec![ClusterStatus {
            slots: vec![slot],
            over_bound: Some("max_wal_keep".to_owned()),
            ..ClusterStatus::default()
        }],
    };
    let json = serde_json::to_string(&status).expect("numbers and text");
    vec![
        settings.into(),
        "wal_keep_size = 0\nmax_wal_keep = 1\nwal_sender_timeout = '1min'".into(),
        "max_wal_keep = 0\nlog_level = \"off\"".into(),
        json.into_bytes(),
    ]
}
