//! Decoder, end of log and timeline history, tried with generated logs and with any bytes at all.
//!
//! The properties are the ones that `scripts/fuzz` searches with: see there what they are.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use safekeeper_protocol::Lsn;
use safekeeper_wal::{TimelineHistory, TimelineSwitch};

#[path = "../../../tests/support/damage.rs"]
mod damage;
#[path = "../../../fuzz/src/timeline_history.rs"]
mod timeline_history;
#[path = "../../../fuzz/src/wal_bytes.rs"]
mod wal_bytes;
#[path = "../../../fuzz/src/wal_records.rs"]
mod wal_records;

use damage::{any_bytes, damaged};

#[test]
fn every_seed_keeps_its_property() {
    wal_records::seeds()
        .iter()
        .for_each(|seed| wal_records::check(seed));
    wal_bytes::seeds()
        .iter()
        .for_each(|seed| wal_bytes::check(seed));
    let histories = timeline_history::seeds();
    histories
        .iter()
        .for_each(|seed| timeline_history::check(seed));
}

/// Records of any kind, then damage or none.
fn recipe() -> impl Strategy<Value = Vec<u8>> {
    let letter = select(b"nnnNrbeost".to_vec());
    let records = vec((letter, any::<u8>()), 0..12);
    let damage = vec(
        (
            any::<u8>(),
            any::<u8>(),
            select(vec![1u8, 2, 4, 0x80, 0xFF]),
        ),
        0..3,
    );
    (any::<[u8; 3]>(), records, damage).prop_map(|(head, records, damage)| {
        let mut recipe = head.to_vec();
        recipe.extend(
            records
                .into_iter()
                .flat_map(|(letter, argument)| [letter, argument]),
        );
        recipe.extend(b".\0");
        recipe.extend(
            damage
                .into_iter()
                .flat_map(|(what, at, xor)| [what, at, xor]),
        );
        recipe
    })
}

fn history() -> impl Strategy<Value = TimelineHistory> {
    let switch = (1u32..1000, any::<u32>(), "[ -~éß]{0,30}");
    (1u32..1000, vec(switch, 0..8)).prop_map(|(tlis, switches)| {
        let (mut tli, mut end_lsn) = (0, Lsn(0));
        let mut ancestors = Vec::new();
        for (tlis, bytes, reason) in switches {
            tli += tlis;
            end_lsn = end_lsn + u64::from(bytes);
            let reason = reason.trim().to_owned();
            ancestors.push(TimelineSwitch {
                tli,
                end_lsn,
                reason,
            });
        }
        let tli = tli + tlis;
        TimelineHistory { tli, ancestors }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn logs_are_read_back_in_any_pieces_and_damage_is_noticed(recipe in recipe()) {
        wal_records::check(&recipe);
    }

    #[test]
    fn damaged_pages_are_read_the_same_in_any_pieces(bytes in damaged(wal_bytes::seeds())) {
        wal_bytes::check(&bytes);
    }
}

proptest! {
    #[test]
    fn bytes_of_no_origin_are_read_the_same_in_any_pieces(bytes in any_bytes()) {
        wal_bytes::check(&bytes);
        wal_records::check(&bytes);
    }

    #[test]
    fn a_history_survives_its_file(history in history()) {
        let text = history.to_string();
        prop_assert_eq!(TimelineHistory::parse(history.tli, &text), Ok(history));
    }

    #[test]
    fn a_damaged_history_is_refused_or_means_what_it_says(
        bytes in prop_oneof![any_bytes(), damaged(timeline_history::seeds())]
    ) {
        timeline_history::check(&bytes);
    }
}
