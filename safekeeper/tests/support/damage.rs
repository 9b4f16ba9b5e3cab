//! Real encodings with damage: what the property tests of all crates try their decoders with,
//! beside bytes of no origin.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

/// One thing done to bytes. Places are fractions of the length at hand.
#[derive(Clone, Debug)]
enum Damage {
    Overwrite(Index, u8),
    /// As a length word or a count might be: the highest of its kind, or one too many.
    Claim(Index, u32),
    Insert(Index, u8),
    Remove(Index),
    Cut(Index),
    /// Everything up to the one place once more, at the other.
    Repeat(Index, Index),
}

/// One of `seeds`, with one to four kinds of damage done to it.
pub fn damaged(seeds: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let damage = prop_oneof![
        4 => (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Damage::Overwrite(at, byte)),
        3 => (any::<Index>(), claim()).prop_map(|(at, claim)| Damage::Claim(at, claim)),
        1 => (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Damage::Insert(at, byte)),
        1 => any::<Index>().prop_map(Damage::Remove),
        1 => any::<Index>().prop_map(Damage::Cut),
        1 => any::<(Index, Index)>().prop_map(|(from, to)| Damage::Repeat(from, to)),
    ];
    (select(seeds), vec(damage, 1..=4)).prop_map(|(mut bytes, damages)| {
        for damage in &damages {
            apply(&mut bytes, damage);
        }
        bytes
    })
}

/// Bytes of no origin.
pub fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..200)
}

fn claim() -> impl Strategy<Value = u32> {
    prop_oneof![
        Just(u32::MAX),
        Just(u32::MAX >> 1),
        (0u32..32, 0u32..3).prop_map(|(bits, more)| (1 << bits) - 1 + more),
    ]
}

fn apply(bytes: &mut Vec<u8>, damage: &Damage) {
    if bytes.is_empty() {
        return;
    }
    let len = bytes.len();
    match damage {
        Damage::Overwrite(at, byte) => bytes[at.index(len)] = *byte,
        Damage::Claim(at, claim) => {
            let word = claim.to_be_bytes();
            let at = at.index(len);
            let end = len.min(at + word.len());
            bytes[at..end].copy_from_slice(&word[..end - at]);
        }
        Damage::Insert(at, byte) => bytes.insert(at.index(len), *byte),
        Damage::Remove(at) => drop(bytes.remove(at.index(len))),
        Damage::Cut(at) => bytes.truncate(at.index(len)),
        Damage::Repeat(from, to) => {
            let again = bytes[..from.index(len)].to_vec();
            let to = to.index(len);
            bytes.splice(to..to, again);
        }
    }
}
