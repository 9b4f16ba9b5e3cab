//! Whatever the daemon reads from the network or its own files, tried with generated values, with
//! damaged encodings and with any bytes at all; and what the proposer reads, as far as it needs no
//! Postgres.
//!
//! The properties for bytes are the ones that `scripts/fuzz` searches with: see there what they are.

use std::path::Path;
use std::time::Duration;

use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use safekeeper::config::Config;
use safekeeper::control_file;
use safekeeper::identity::{self, Identity};
use safekeeper::replication_command::{ReplicationCommand, parse};
use safekeeper::slot_file::{self, SlotData};
use safekeeper_protocol::{
    AcceptorState, ClusterIdentity, Incarnation, Lsn, MemberId, Term, TermEntry, TermHistory, Tli,
};
use safekeeper_wire::pgwire::{ErrorReport, Filled, Input};
use safekeeper_wire::startup::{Opening, next_opening};

mod support {
    pub mod damage;
}
#[path = "../fuzz/src/data_files.rs"]
mod data_files;
#[path = "../fuzz/src/local_history.rs"]
mod local_history;
#[path = "../fuzz/src/postgres_messages.rs"]
mod postgres_messages;
#[path = "../fuzz/src/safekeeper_messages.rs"]
mod safekeeper_messages;
#[path = "../fuzz/src/settings.rs"]
mod settings;

use support::damage::{any_bytes, damaged};

#[test]
fn every_seed_keeps_its_property() {
    for (seeds, check) in [
        (data_files::seeds(), data_files::check as fn(&[u8])),
        (local_history::seeds(), local_history::check),
        (postgres_messages::seeds(), postgres_messages::check),
        (safekeeper_messages::seeds(), safekeeper_messages::check),
        (settings::seeds(), settings::check),
    ] {
        seeds.iter().for_each(|seed| check(seed));
    }
}

// A control file is 128 KiB, which takes a debug build its time.
proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_damaged_state_is_refused_or_means_what_it_says(
        bytes in prop_oneof![any_bytes(), damaged(data_files::seeds())]
    ) {
        data_files::check(&bytes);
    }

    #[test]
    fn a_state_survives_its_file_and_no_flipped_bit_does(state in state(), bit in any::<Index>()) {
        let path = Path::new("control");
        let mut bytes = control_file::encode(&state);
        prop_assert_eq!(control_file::decode(&bytes, path).ok(), Some(state));
        let bit = bit.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(control_file::decode(&bytes, path).is_err());
    }
}

proptest! {
    #[test]
    fn an_identity_survives_its_file(id in 1..u64::MAX, incarnation in any::<u128>()) {
        let identity = Identity { id: MemberId(id), incarnation: Incarnation(incarnation) };
        let bytes = identity::encode(&identity);
        prop_assert_eq!(identity::decode(&bytes, Path::new("d")).ok(), Some(identity));
    }

    #[test]
    fn a_session_is_understood_the_same_in_any_pieces(
        bytes in prop_oneof![any_bytes(), damaged(postgres_messages::seeds())]
    ) {
        postgres_messages::check(&bytes);
    }

    #[test]
    fn a_startup_packet_says_what_was_put_into_it(
        user in "[a-z]{1,20}", application in "[ -~é]{0,40}", cluster in option::of("[a-z0-9_]{1,20}")
    ) {
        let options = cluster.as_ref().map(|name| format!("-c cluster={name}")).unwrap_or_default();
        let mut packet = 0x0003_0000u32.to_be_bytes().to_vec();
        for text in ["user", &user, "application_name", &application, "options", &options] {
            packet.extend(text.bytes().chain([0]));
        }
        packet.push(0);
        let Ok(Some(Opening::Startup(startup))) = opening(&packet) else {
            panic!("{packet:?} was not understood");
        };
        prop_assert_eq!(startup.user, user);
        prop_assert_eq!(startup.application_name, application);
        prop_assert_eq!(startup.cluster, cluster);
    }

    #[test]
    fn a_command_is_understood_as_it_was_written(
        slot in option::of("[ -~é]{1,20}"), start_lsn in any::<u64>().prop_map(Lsn),
        tli in option::of(1u32..), physical in select(vec!["", "PHYSICAL ", "PHYSICAL  "]),
    ) {
        let slot_text = slot.as_ref().map(|s| format!("SLOT \"{}\" ", s.replace('"', "\"\"")));
        let tli_text = tli.map(|tli| format!(" TIMELINE {tli};"));
        let (slot_text, tli_text) = (slot_text.unwrap_or_default(), tli_text.unwrap_or_default());
        let text = format!("START_REPLICATION {slot_text}{physical}{start_lsn}{tli_text}");
        let command = ReplicationCommand::StartReplication { slot, start_lsn, tli: tli.map(Tli) };
        prop_assert_eq!(parse(&text), Ok(command), "{}", text);
    }

    #[test]
    fn no_text_is_more_than_refused(text in "\\PC{0,60}") {
        let _ = parse(&text);
        let _ = parse(&format!("START_REPLICATION {text}"));
        let _ = parse(&format!("CREATE_REPLICATION_SLOT {text}"));
        let _ = parse(&format!("CREATE_REPLICATION_SLOT s PHYSICAL ({text}"));
    }

    #[test]
    fn a_slot_is_made_as_it_was_written(
        slot in "[ -~é]{0,20}", temporary in any::<bool>(), reserve_wal in option::of(any::<bool>()),
        in_brackets in any::<bool>(),
    ) {
        let options = match (reserve_wal, in_brackets) {
            (Some(value), true) => format!("(RESERVE_WAL {value})"),
            (Some(true), false) => "RESERVE_WAL".to_owned(),
            _ => String::new(),
        };
        let kind = if temporary { "TEMPORARY PHYSICAL" } else { "PHYSICAL" };
        let quoted = slot.replace('"', "\"\"");
        let text = format!("CREATE_REPLICATION_SLOT \"{quoted}\" {kind} {options}");
        let reserve_wal = reserve_wal.unwrap_or(false);
        let command = ReplicationCommand::CreateReplicationSlot { slot, temporary, reserve_wal };
        prop_assert_eq!(parse(&text), Ok(command), "{}", text);
    }

    #[test]
    fn slots_survive_their_file_and_no_flipped_bit_does(slots in slots(), bit in any::<Index>()) {
        let path = Path::new("slots");
        let mut bytes = slot_file::encode(&slots);
        prop_assert_eq!(slot_file::decode(&bytes, path).ok(), Some(slots));
        let bit = bit.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(slot_file::decode(&bytes, path).is_err());
    }

    #[test]
    fn what_a_safekeeper_says_is_understood_the_same_in_any_pieces(
        bytes in prop_oneof![any_bytes(), damaged(safekeeper_messages::seeds())]
    ) {
        safekeeper_messages::check(&bytes);
    }

    #[test]
    fn a_damaged_local_history_is_refused_or_means_what_it_says(
        bytes in prop_oneof![any_bytes(), damaged(local_history::seeds())]
    ) {
        local_history::check(&bytes);
    }

    #[test]
    fn settings_are_the_same_as_a_file_and_one_by_one(
        bytes in prop_oneof![any_bytes(), damaged(settings::seeds())]
    ) {
        settings::check(&bytes);
    }

    #[test]
    fn quantities_are_taken_with_their_unit(
        n in 1u64..1 << 20,
        (size, bytes) in select(vec![("B", 1), ("kB", 1 << 10), ("MB", 1 << 20), ("GB", 1 << 30)]),
        (time, ms) in select(vec![("ms", 1), ("s", 1000), ("min", 60_000), ("h", 3_600_000)]),
    ) {
        let text = format!("wal_keep_size = \"{n}{size}\"\nwal_sender_timeout = \"{n} {time}\"");
        let config = Config::from_toml(&text).expect("valid");
        prop_assert_eq!(config.wal_keep_size, n * bytes);
        prop_assert_eq!(config.wal_sender_timeout, Some(Duration::from_millis(n * ms)));
    }
}

/// What a packet, without its length word, is taken for when it arrives.
fn opening(packet: &[u8]) -> Result<Option<Opening>, ErrorReport> {
    let len = u32::try_from(4 + packet.len()).expect("a short one");
    let bytes = [&len.to_be_bytes(), packet].concat();
    let mut input = Input::default();
    let filled = input.fill_with(|room| {
        room[..bytes.len()].copy_from_slice(&bytes);
        Ok(bytes.len())
    });
    assert!(matches!(filled, Ok(Filled::Some)));
    next_opening(&mut input)
}

fn slots() -> impl Strategy<Value = Vec<SlotData>> {
    let slot = (any::<bool>(), 1u64.., any::<[u64; 2]>());
    btree_map("[a-z0-9_]{1,63}", slot, 0..10).prop_map(|slots| {
        let slots = slots
            .into_iter()
            .map(|(name, (lost, lsn, [xmin, catalog_xmin]))| SlotData {
                name,
                restart_lsn: Lsn(if lost { 0 } else { lsn }),
                xmin,
                catalog_xmin,
                lost,
            });
        slots.collect()
    })
}

fn state() -> impl Strategy<Value = AcceptorState> {
    let cluster = (any::<u64>(), "[a-z_é]{0,30}", 15u16..=18, 20u32..=30).prop_map(
        |(system_id, name, pg_major, exponent)| ClusterIdentity {
            system_id,
            name,
            pg_major,
            segment_size: 1 << exponent,
        },
    );
    let reigns = vec((1u64..1000, any::<u32>()), 0..30);
    (cluster, any::<u64>(), any::<u64>(), reigns).prop_map(|(cluster, term, commit_lsn, reigns)| {
        let (mut last_term, mut start) = (0, 0);
        let entries = reigns.into_iter().map(|(terms, bytes)| {
            last_term += terms;
            start += u64::from(bytes);
            TermEntry {
                term: Term(last_term),
                tli: Tli(1),
                start_lsn: Lsn(start),
            }
        });
        let history = TermHistory::new(entries.collect()).expect("it goes forward");
        AcceptorState {
            term: Term(term),
            history,
            commit_lsn: Lsn(commit_lsn),
            ..AcceptorState::unconfigured(cluster)
        }
    })
}
