//! The codec, tried with generated messages, with damaged ones and with any bytes at all.
//!
//! The property for bytes is the one that `scripts/fuzz` searches with; here it gets a few thousand
//! inputs with every `cargo test`.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use safekeeper_protocol::codec::{
    Input, decode_acceptor_message, decode_proposer_message, encode_acceptor_message,
    encode_cluster, encode_configuration, encode_history, encode_proposer_message,
};
use safekeeper_protocol::{
    AcceptorGreeting, AcceptorMessage, Append, AppendResponse, ClusterIdentity, Configuration,
    ConfigurationVersion, Configure, ConfigureResponse, Elected, Incarnation, Lineage, Lsn, Member,
    MemberId, ProposerGreeting, ProposerId, ProposerMessage, Read, ReadResponse, StandbyFeedback,
    Term, TermEntry, TermHistory, TimelineFile, Tli, VoteRequest, VoteResponse,
};

#[path = "../../tests/support/damage.rs"]
mod damage;
#[path = "../../fuzz/src/protocol_messages.rs"]
mod protocol_messages;

use damage::{any_bytes, damaged};
use protocol_messages::{check, seeds};

#[test]
fn every_seed_is_a_message_and_keeps_the_property() {
    for seed in seeds() {
        let is_message =
            decode_proposer_message(&seed).is_ok() || decode_acceptor_message(&seed).is_ok();
        assert!(is_message, "{seed:?}");
        check(&seed);
    }
}

#[test]
fn no_claimed_count_or_length_costs_more_than_the_bytes_that_came() {
    for seed in seeds() {
        for at in 0..seed.len() {
            for claim in [&[0xFF; 4][..], &[0, 0x10, 0, 0], &[0xFF; 2], &[0x03, 0xFF]] {
                let mut bytes = seed.clone();
                let end = bytes.len().min(at + claim.len());
                bytes[at..end].copy_from_slice(&claim[..end - at]);
                check(&bytes);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn what_decodes_encodes_to_the_same_bytes(bytes in prop_oneof![any_bytes(), damaged(seeds())]) {
        check(&bytes);
    }
}

proptest! {
    #[test]
    fn a_proposers_message_survives_the_wire(message in proposer_message(), wal in vec(any::<u8>(), 0..50)) {
        let (message, wal) = match message {
            ProposerMessage::Append(append) => {
                let len = wal.len() as u32;
                (ProposerMessage::Append(Append { len, ..append }), wal)
            }
            other => (other, Vec::new()),
        };
        let mut bytes = Vec::new();
        encode_proposer_message(&message, &mut bytes);
        bytes.extend(&wal);
        prop_assert_eq!(decode_proposer_message(&bytes), Ok((message, &wal[..])));
    }

    #[test]
    fn an_acceptors_message_survives_the_wire(message in acceptor_message(), wal in vec(any::<u8>(), 0..50)) {
        let (message, wal) = match message {
            AcceptorMessage::ReadResponse(response) => {
                let len = wal.len() as u32;
                (AcceptorMessage::ReadResponse(ReadResponse { len, ..response }), wal)
            }
            other => (other, Vec::new()),
        };
        let mut bytes = Vec::new();
        encode_acceptor_message(&message, &mut bytes);
        bytes.extend(&wal);
        prop_assert_eq!(decode_acceptor_message(&bytes), Ok((message, &wal[..])));
    }

    /// As they stand in the control file, one behind the other.
    #[test]
    fn parts_of_messages_survive_by_themselves(
        cluster in cluster(), configuration in configuration(), history in history()
    ) {
        let mut bytes = Vec::new();
        encode_cluster(&cluster, &mut bytes);
        encode_configuration(&configuration, &mut bytes);
        encode_history(&history, &mut bytes);
        let mut input = Input(&bytes);
        prop_assert_eq!(input.cluster(), Ok(cluster));
        prop_assert_eq!(input.configuration(), Ok(configuration));
        prop_assert_eq!(input.history(), Ok(history));
        prop_assert_eq!(input.end(), Ok(()));
    }
}

fn lsn() -> impl Strategy<Value = Lsn> {
    any::<u64>().prop_map(Lsn)
}

fn term() -> impl Strategy<Value = Term> {
    any::<u64>().prop_map(Term)
}

fn version() -> impl Strategy<Value = ConfigurationVersion> {
    (term(), any::<u32>()).prop_map(|(term, generation)| ConfigurationVersion { term, generation })
}

fn cluster() -> impl Strategy<Value = ClusterIdentity> {
    (any::<u64>(), "[a-zé_ ]{0,20}", any::<u16>(), 20u32..=30).prop_map(
        |(system_id, name, pg_major, exponent)| ClusterIdentity {
            system_id,
            name,
            pg_major,
            segment_size: 1 << exponent,
        },
    )
}

fn members() -> impl Strategy<Value = Vec<Member>> {
    let member = (any::<u64>(), any::<u128>(), "[a-z.:-]{0,30}", any::<u16>()).prop_map(
        |(id, incarnation, host, port)| Member {
            id: MemberId(id),
            incarnation: Incarnation(incarnation),
            host,
            port,
        },
    );
    vec(member, 0..=Configuration::MEMBERS_MAX)
}

fn configuration() -> impl Strategy<Value = Configuration> {
    let parts = (any::<u128>(), version(), members(), option::of(members()));
    parts.prop_map(|(lineage, version, members, new_members)| Configuration {
        lineage: Lineage(lineage),
        version,
        members,
        new_members,
    })
}

/// Sorted numbers make one that goes forward.
fn history() -> impl Strategy<Value = TermHistory> {
    let steps = vec((1u64..1 << 40, 0u32..3, any::<u32>()), 0..40);
    (steps, 0u32..3).prop_map(|(steps, more_tlis)| {
        let (mut term, mut tli, mut lsn) = (0, 1, 0);
        let entries = steps.into_iter().map(|(terms, tlis, bytes)| {
            term += terms;
            tli += tlis;
            lsn += u64::from(bytes);
            TermEntry {
                term: Term(term),
                tli: Tli(tli),
                start_lsn: Lsn(lsn),
            }
        });
        let history = TermHistory::new(entries.collect()).expect("it goes forward");
        let newest_tli = Tli(history.newest_tli().0 + more_tlis);
        history.with_newest_tli(newest_tli)
    })
}

fn timeline_files() -> impl Strategy<Value = Vec<TimelineFile>> {
    let file = (any::<u32>(), vec(any::<u8>(), 0..100)).prop_map(|(tli, content)| TimelineFile {
        tli: Tli(tli),
        content,
    });
    vec(file, 0..5)
}

fn append() -> impl Strategy<Value = Append> {
    let positions = (lsn(), lsn(), lsn());
    (version(), term(), any::<u32>(), positions, any::<bool>()).prop_map(
        |(configuration_version, term, tli, (begin_lsn, commit_lsn, truncate_lsn), reply)| Append {
            configuration_version,
            term,
            tli: Tli(tli),
            begin_lsn,
            len: 0,
            commit_lsn,
            truncate_lsn,
            reply_requested: reply,
        },
    )
}

fn proposer_message() -> impl Strategy<Value = ProposerMessage> {
    prop_oneof![
        (any::<u128>(), cluster()).prop_map(|(id, cluster)| {
            let proposer_id = ProposerId(id);
            ProposerMessage::Greeting(ProposerGreeting {
                proposer_id,
                cluster,
            })
        }),
        (term(), configuration()).prop_map(|(term, configuration)| {
            ProposerMessage::Configure(Configure {
                term,
                configuration,
            })
        }),
        (version(), term()).prop_map(|(configuration_version, term)| {
            ProposerMessage::VoteRequest(VoteRequest {
                configuration_version,
                term,
            })
        }),
        (version(), term(), history(), lsn(), timeline_files()).prop_map(
            |(configuration_version, term, history, start_lsn, timeline_files)| {
                ProposerMessage::Elected(Elected {
                    configuration_version,
                    term,
                    history,
                    start_lsn,
                    timeline_files,
                })
            }
        ),
        append().prop_map(ProposerMessage::Append),
        (version(), term(), lsn(), any::<u32>()).prop_map(
            |(configuration_version, term, begin_lsn, len)| {
                ProposerMessage::Read(Read {
                    configuration_version,
                    term,
                    begin_lsn,
                    len,
                })
            }
        ),
    ]
}

fn acceptor_greeting() -> impl Strategy<Value = AcceptorGreeting> {
    let identity = (any::<u64>(), any::<u128>(), any::<u32>());
    (identity, term(), configuration(), history(), (lsn(), lsn())).prop_map(
        |((id, incarnation, rival_heard_ms), term, configuration, history, (flush, commit))| {
            AcceptorGreeting {
                member_id: MemberId(id),
                incarnation: Incarnation(incarnation),
                term,
                configuration,
                history,
                flush_lsn: flush,
                commit_lsn: commit,
                rival_heard_ms,
            }
        },
    )
}

fn append_response() -> impl Strategy<Value = AppendResponse> {
    let feedback =
        (lsn(), any::<u64>(), any::<u64>()).prop_map(|(apply_lsn, xmin, catalog_xmin)| {
            StandbyFeedback {
                apply_lsn,
                xmin,
                catalog_xmin,
            }
        });
    (version(), term(), (lsn(), lsn(), lsn()), feedback).prop_map(
        |(configuration_version, term, (write_lsn, flush_lsn, commit_lsn), feedback)| {
            AppendResponse {
                configuration_version,
                term,
                write_lsn,
                flush_lsn,
                commit_lsn,
                feedback,
            }
        },
    )
}

fn acceptor_message() -> impl Strategy<Value = AcceptorMessage> {
    prop_oneof![
        acceptor_greeting().prop_map(AcceptorMessage::Greeting),
        (term(), configuration(), lsn()).prop_map(|(term, configuration, flush_lsn)| {
            AcceptorMessage::ConfigureResponse(ConfigureResponse {
                term,
                configuration,
                flush_lsn,
            })
        }),
        (version(), any::<bool>(), term(), history(), (lsn(), lsn())).prop_map(
            |(configuration_version, granted, term, history, (flush_lsn, commit_lsn))| {
                AcceptorMessage::VoteResponse(VoteResponse {
                    configuration_version,
                    granted,
                    term,
                    history,
                    flush_lsn,
                    commit_lsn,
                })
            }
        ),
        append_response().prop_map(AcceptorMessage::AppendResponse),
        (term(), lsn(), lsn()).prop_map(|(term, begin_lsn, oldest_lsn)| {
            AcceptorMessage::ReadResponse(ReadResponse {
                term,
                begin_lsn,
                len: 0,
                oldest_lsn,
            })
        }),
    ]
}
