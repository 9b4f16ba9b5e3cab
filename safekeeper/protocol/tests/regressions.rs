//! Cases that reviews and simulation have found, too small or too odd for a scenario file: one
//! state machine is fed by hand, and asked what it does.

use safekeeper_protocol::*;

const A: ProposerId = ProposerId(0xA);

fn cluster() -> ClusterIdentity {
    ClusterIdentity {
        system_id: 7,
        name: "main".into(),
        pg_major: 15,
        segment_size: 1 << 20,
    }
}
fn member(id: u64, incarnation: u128) -> Member {
    Member {
        id: MemberId(id),
        incarnation: Incarnation(incarnation),
        host: format!("sk{id}"),
        port: 5454,
    }
}
fn version() -> ConfigurationVersion {
    ConfigurationVersion {
        term: Term(1),
        generation: 1,
    }
}
fn configuration() -> Configuration {
    Configuration {
        lineage: Lineage(1),
        version: version(),
        members: (1..=3).map(|id| member(id, id.into())).collect(),
        new_members: None,
    }
}
fn history(entries: &[(u64, u64)]) -> TermHistory {
    TermHistory::new(
        entries
            .iter()
            .map(|&(term, lsn)| TermEntry {
                term: Term(term),
                tli: Tli(1),
                start_lsn: Lsn(lsn),
            })
            .collect(),
    )
    .unwrap()
}
fn local(entries: &[(u64, u64)], end: u64) -> LocalLog {
    LocalLog {
        history: history(entries),
        tli: Tli(1),
        end_lsn: Lsn(end),
        unled_from: None,
        timeline_files: Vec::new(),
        configuration: Configuration::default(),
    }
}
fn proposer(local: LocalLog) -> Proposer {
    let peers = (1..=3)
        .map(|id| PeerAddress {
            host: format!("sk{id}"),
            port: 5454,
        })
        .collect();
    let settings = ProposerSettings {
        proposer_id: A,
        cluster: cluster(),
        peers,
        member_timeout_ms: 10_000,
        seed: 1,
    };
    Proposer::new(settings, local, Standing::Running, 0)
}
fn greeting(
    id: u64,
    term: u64,
    log: &[(u64, u64)],
    flush: u64,
    configuration: Configuration,
) -> AcceptorMessage {
    AcceptorMessage::Greeting(AcceptorGreeting {
        member_id: MemberId(id),
        incarnation: Incarnation(id.into()),
        term: Term(term),
        configuration,
        history: history(log),
        flush_lsn: Lsn(flush),
        commit_lsn: Lsn(0),
        rival_heard_ms: AcceptorGreeting::NEVER_HEARD,
    })
}
fn vote(term: u64, log: &[(u64, u64)], flush: u64) -> AcceptorMessage {
    AcceptorMessage::VoteResponse(VoteResponse {
        configuration_version: version(),
        granted: true,
        term: Term(term),
        history: history(log),
        flush_lsn: Lsn(flush),
        commit_lsn: Lsn(0),
    })
}
fn wal(end: u64) -> LocalWal {
    LocalWal {
        end_lsn: Lsn(end),
        flush_lsn: Lsn(end),
    }
}
fn flushed(term: u64, lsn: u64) -> AcceptorMessage {
    AcceptorMessage::AppendResponse(AppendResponse {
        configuration_version: version(),
        term: Term(term),
        write_lsn: Lsn(lsn),
        flush_lsn: Lsn(lsn),
        commit_lsn: Lsn(0),
        feedback: StandbyFeedback::default(),
    })
}
const P1: PeerIdx = PeerIdx(0);
const P2: PeerIdx = PeerIdx(1);
const P3: PeerIdx = PeerIdx(2);

/// Elected in term 3 by 1 and 2, which have answered Elected; the log is 2@100000 up to 100100.
fn leading() -> (Proposer, Vec<ProposerAction>) {
    let mut out = Vec::new();
    let mut p = proposer(local(&[(2, 0x10_0000)], 0x10_0100));
    for peer in [P1, P2] {
        p.on_connected(peer, 0, &mut out);
    }
    for (peer, id) in [(P1, 1), (P2, 2)] {
        p.on_message(
            peer,
            &greeting(id, 2, &[(2, 0x10_0000)], 0x10_0100, configuration()),
            0,
            &mut out,
        );
    }
    p.on_compared(Compared::Equal, 0, &mut out);
    for peer in [P1, P2] {
        p.on_message(peer, &vote(3, &[(2, 0x10_0000)], 0x10_0100), 0, &mut out);
    }
    p.on_history_persisted(0, &mut out);
    assert!(p.is_leading());
    (p, out)
}

#[test]
fn a_slow_answer_to_elected_is_no_reason_to_spin() {
    let (mut p, mut out) = leading();
    p.on_tick(3_000, &mut out);
    assert_eq!(
        p.next_append(P1, wal(0x10_0100), 3_000),
        None,
        "nothing to do for 1"
    );
    assert!(
        p.next_tick_ms(|_| true) > 3_000,
        "woken again at {} although it is 3000",
        p.next_tick_ms(|_| true)
    );
}

#[test]
fn a_deposed_proposer_has_nothing_to_do() {
    let (mut p, mut out) = leading();
    p.on_message(P1, &flushed(3, 0x10_0100), 1, &mut out);
    p.on_message(P2, &flushed(9, 0x10_0100), 1, &mut out);
    assert_eq!(p.state_name(), "deposed");
    p.on_tick(3_000, &mut out);
    assert!(
        p.next_tick_ms(|_| true) > 3_000,
        "woken again at {} although it is 3000",
        p.next_tick_ms(|_| true)
    );
}

#[test]
fn a_member_whose_socket_is_full_is_no_reason_to_spin() {
    let (mut p, mut out) = leading();
    p.on_message(P1, &flushed(3, 0x10_0100), 1, &mut out);
    p.on_message(P2, &flushed(3, 0x10_0100), 2_900, &mut out);
    let _ = p.next_append(P2, wal(0x10_0200), 2_900);
    // 1 is stopped and its socket full: the host can't call next_append for it.
    p.on_tick(3_000, &mut out);
    assert!(
        p.next_tick_ms(|peer| peer != P1) > 3_000,
        "woken again at {} although it is 3000",
        p.next_tick_ms(|peer| peer != P1)
    );
}

#[test]
fn silence_after_configure_is_noticed() {
    let (mut p, mut out) = leading();
    p.on_connected(P3, 10, &mut out);
    let provisional = ConfigurationVersion {
        generation: 0,
        ..version()
    };
    let old = Configuration {
        version: provisional,
        ..configuration()
    };
    out.clear();
    p.on_message(P3, &greeting(3, 1, &[], 0, old), 10, &mut out);
    assert!(
        matches!(
            out[..],
            [ProposerAction::Send {
                message: ProposerMessage::Configure(_),
                ..
            }]
        ),
        "{out:?}"
    );
    out.clear();
    p.on_tick(60_000, &mut out);
    assert!(
        out.iter()
            .any(|a| matches!(a, ProposerAction::Disconnect { peer, .. } if *peer == P3)),
        "{out:?}"
    );
}

#[test]
fn a_late_grant_of_an_earlier_attempt_ends_nothing() {
    let mut out = Vec::new();
    let mut p = proposer(local(&[(2, 0x10_0000)], 0x10_0100));
    for peer in [P1, P2, P3] {
        p.on_connected(peer, 0, &mut out);
    }
    for (peer, id) in [(P1, 1), (P2, 2)] {
        p.on_message(
            peer,
            &greeting(id, 5, &[(2, 0x10_0000)], 0x10_0100, configuration()),
            0,
            &mut out,
        );
    }
    p.on_compared(Compared::Equal, 0, &mut out);
    assert_eq!((p.state_name(), p.term()), ("voting", Term(6)));
    // 3 was asked in term 3 by this proposer, long ago on this connection, and is slow.
    p.on_message(P3, &vote(3, &[(2, 0x10_0000)], 0x10_0100), 0, &mut out);
    assert_eq!(p.state_name(), "voting");
}

#[test]
fn a_later_configuration_of_an_older_term_is_replaced_by_ours() {
    let (mut p, mut out) = leading();
    for peer in [P1, P2] {
        p.on_message(peer, &flushed(3, 0x10_0100), 1, &mut out);
        p.next_append(peer, wal(0x10_0200), 2);
        p.on_message(peer, &flushed(3, 0x10_0200), 3, &mut out);
    }
    assert_eq!(p.commit_lsn(), Lsn(0x10_0200));
    // One that a change of members had left on 3 before we were elected, and nowhere else.
    let later = Configuration {
        version: ConfigurationVersion {
            term: Term(2),
            generation: 1,
        },
        new_members: Some(vec![member(1, 1), member(4, 4)]),
        ..configuration()
    };
    p.on_connected(P3, 4, &mut out);
    out.clear();
    p.on_message(
        P3,
        &greeting(3, 2, &[(2, 0x10_0000)], 0x10_0100, later),
        4,
        &mut out,
    );
    assert!(p.is_leading());
    let ours = ConfigurationVersion {
        term: Term(3),
        generation: 1,
    };
    assert_eq!(p.configuration().version, ours);
    assert!(p.configuration().same_members(&configuration()));
    let told = |action: &ProposerAction| match action {
        ProposerAction::Send {
            to,
            message: ProposerMessage::Configure(configure),
        } => (configure.configuration.version == ours).then_some(*to),
        _ => None,
    };
    let told: Vec<PeerIdx> = out.iter().filter_map(told).collect();
    assert_eq!(told, [P1, P2, P3]);
}

#[test]
fn after_a_reign_the_tail_is_no_longer_unled() {
    // Override from 100080 on; then term 3 was won from there and its WAL is on the quorum.
    let log = LocalLog {
        unled_from: Some(Lsn(0x10_0080)),
        ..local(&[(2, 0x10_0000)], 0x10_0100)
    };
    let donor = Log::new(&history(&[(2, 0x10_0000)]), Lsn(0x10_0080));
    let Verdict::Lead(claim) = decide(&log, Standing::Running, &donor, 1 << 20) else {
        panic!()
    };
    let won = claim
        .history
        .succeeded_by(TermEntry {
            term: Term(3),
            tli: Tli(1),
            start_lsn: claim.start_lsn,
        })
        .unwrap();
    // The write that records the reign clears the mark.
    let again = LocalLog {
        history: won.clone(),
        end_lsn: Lsn(0x10_0200),
        unled_from: None,
        ..log
    };
    let donor = Log::new(&won, Lsn(0x10_0180));
    let verdict = decide(&again, Standing::Running, &donor, 1 << 20);
    assert!(matches!(verdict, Verdict::Lead(_)), "{verdict:?}");
}

#[test]
fn reigns_without_a_byte_do_not_fill_the_history() {
    // A worker that dies 4096 times before it has written anything.
    let mut log = local(&[(1, 0x10_0000)], 0x10_0100);
    for term in 2..=5000 {
        let donor = Log::new(&log.history, Lsn(0x10_0100));
        let Verdict::Lead(claim) = decide(&log, Standing::Running, &donor, 1 << 20) else {
            panic!()
        };
        log.history = claim
            .history
            .succeeded_by(TermEntry {
                term: Term(term),
                tli: Tli(1),
                start_lsn: claim.start_lsn,
            })
            .unwrap();
    }
    let mut bytes = Vec::new();
    codec::encode_history(&log.history, &mut bytes);
    assert_eq!(
        codec::Input(&bytes).history().map(|h| h.last()),
        Ok(log.history.last())
    );
}

#[test]
fn a_new_incarnation_does_not_vote_for_the_old_one() {
    let joint = Configuration {
        lineage: Lineage(1),
        version: version(),
        members: vec![member(1, 1), member(2, 2), member(3, 3)],
        new_members: Some(vec![member(1, 101), member(2, 2), member(3, 3)]),
    };
    // Either such a configuration is refused, or 1's new incarnation counts in the new set only.
    // With 1 (new, empty) and 2 alone the old set {1 old, 2, 3} has one vote of three.
    let voters = [member(1, 101), member(2, 2)];
    let counted = joint.has_quorum(|member| voters.contains(member));
    assert!(joint.defect().is_some() || !counted, "counted in both sets");
}

fn acceptor(log: &[(u64, u64)], flush: u64, commit: u64, term: u64) -> Acceptor {
    let state = AcceptorState {
        cluster: cluster(),
        term: Term(term),
        configuration: configuration(),
        history: history(log),
        commit_lsn: Lsn(commit),
    };
    Acceptor::new(MemberId(1), Incarnation(1), state, Lsn(flush))
}
fn elected(term: u64, log: &[(u64, u64)], start: u64) -> Elected {
    Elected {
        configuration_version: version(),
        term: Term(term),
        history: history(log),
        start_lsn: Lsn(start),
        timeline_files: vec![],
    }
}
const SESSION: Session = Session {
    id: 1,
    proposer_id: A,
};

#[test]
fn a_read_beyond_the_end_of_positions_is_refused() {
    let acceptor = acceptor(&[(2, 0x10_0000)], 0x10_0100, 0, 5);
    let mut out = Vec::new();
    let read = Read {
        configuration_version: version(),
        term: Term(5),
        begin_lsn: Lsn(u64::MAX),
        len: 8,
    };
    assert!(acceptor.on_read(&read, &mut out).is_err(), "{out:?}");
}

#[test]
fn an_empty_log_keeps_commit_below_flush() {
    // Term 2 was elected and, without a byte, announced as committed up to its start.
    let mut acceptor = acceptor(&[(2, 0x20_0000)], 0x20_0000, 0x20_0000, 2);
    let mut out = Vec::new();
    let taken = acceptor.on_elected(
        SESSION,
        &elected(3, &[(3, 0x10_0000)], 0x10_0000),
        0,
        &mut out,
    );
    assert!(
        taken.is_err() || acceptor.commit_lsn() <= acceptor.flush_lsn(),
        "commit {} flush {}",
        acceptor.commit_lsn(),
        acceptor.flush_lsn()
    );
}

#[test]
fn a_log_with_other_beginnings_is_removed_before_a_later_one_begins() {
    let mut acceptor = acceptor(&[(2, 0x10_0000)], 0x10_0100, 0, 2);
    let mut out = Vec::new();
    acceptor
        .on_elected(
            SESSION,
            &elected(3, &[(3, 0x30_0000)], 0x30_0000),
            0,
            &mut out,
        )
        .unwrap();
    let first_cut = out.iter().find_map(|a| match a {
        AcceptorAction::Truncate { end_lsn, .. } => Some(*end_lsn),
        _ => None,
    });
    assert!(
        first_cut <= Some(Lsn(0x10_0100)),
        "cut at {first_cut:?}, beyond the log's end"
    );
}

#[test]
fn more_peers_than_a_configuration_may_name() {
    let n = 17;
    let peers = (1..=n)
        .map(|id| PeerAddress {
            host: format!("sk{id}"),
            port: 5454,
        })
        .collect();
    let settings = ProposerSettings {
        proposer_id: A,
        cluster: cluster(),
        peers,
        member_timeout_ms: 10_000,
        seed: 1,
    };
    let mut p = Proposer::new(settings, local(&[], 0x10_0100), Standing::Running, 0);
    let mut out = Vec::new();
    for i in 0..n {
        p.on_connected(PeerIdx(i), 0, &mut out);
    }
    for i in 0..n {
        p.on_message(
            PeerIdx(i),
            &greeting(i as u64 + 1, 0, &[], 0, Configuration::default()),
            0,
            &mut out,
        );
    }
    for action in &out {
        if let ProposerAction::Send { message, .. } = action {
            let mut bytes = Vec::new();
            codec::encode_proposer_message(message, &mut bytes);
            codec::decode_proposer_message(&bytes).expect("our own encoding");
        }
    }
}

#[test]
fn a_segment_size_that_is_none_is_refused_by_the_codec() {
    let mut bytes = Vec::new();
    codec::encode_cluster(
        &ClusterIdentity {
            segment_size: 0,
            ..cluster()
        },
        &mut bytes,
    );
    assert!(codec::Input(&bytes).cluster().is_err());
}

#[test]
fn rival_heard_by_a_majority_counts_although_one_member_has_a_higher_term() {
    let mut out = Vec::new();
    let mut p = proposer(local(&[(2, 0x10_0000)], 0x10_0100));
    for peer in [P1, P2] {
        p.on_connected(peer, 0, &mut out);
    }
    // 1 gave its vote in term 3 to a candidate that died; 2 (and 3) follow a healthy primary in term 2.
    p.on_message(
        P1,
        &greeting(1, 3, &[(2, 0x10_0000)], 0x10_0100, configuration()),
        0,
        &mut out,
    );
    let AcceptorMessage::Greeting(mut alive) =
        greeting(2, 2, &[(2, 0x10_0000)], 0x10_0100, configuration())
    else {
        panic!()
    };
    alive.rival_heard_ms = 20;
    p.on_message(P2, &AcceptorMessage::Greeting(alive), 0, &mut out);
    assert_eq!(p.state_name(), "waiting", "a healthy reign is disturbed");
}

#[test]
fn a_new_term_is_above_the_local_history() {
    // All safekeepers were made anew: their terms are lower than the local log's.
    let mut out = Vec::new();
    let mut p = proposer(local(&[(7, 0x10_0000)], 0x10_0100));
    for peer in [P1, P2] {
        p.on_connected(peer, 0, &mut out);
    }
    for (peer, id) in [(P1, 1), (P2, 2)] {
        p.on_message(peer, &greeting(id, 2, &[], 0, configuration()), 0, &mut out);
    }
    assert!(
        p.term() > Term(7),
        "asks for {} below its own log's term 7",
        p.term()
    );
}

fn greet(
    p: &mut Proposer,
    id: u64,
    term: u64,
    log: &[(u64, u64)],
    flush: u64,
    now: u64,
    out: &mut Vec<ProposerAction>,
) {
    let peer = PeerIdx(id as usize - 1);
    p.on_message(
        peer,
        &greeting(id, term, log, flush, configuration()),
        now,
        out,
    );
}

/// Between its vote for B in term 5 and B's Elected of term 5 acceptor 1 greets A with its old
/// log. A compares with it "in term 5"; meanwhile B cuts that log and writes, in term 5. The read is
/// granted, the bytes differ, and A never stands again, although B dies and A's log is the quorum's.
#[test]
fn a_log_that_changed_within_the_term_is_no_difference() {
    let mut donor = Acceptor::new(
        MemberId(1),
        Incarnation(1),
        AcceptorState {
            cluster: cluster(),
            term: Term(5),
            configuration: configuration(),
            history: history(&[(1, 10)]),
            commit_lsn: Lsn(20),
        },
        Lsn(50),
    );
    let mut out = Vec::new();
    let mut a = proposer(local(&[(1, 10)], 50));
    for peer in 0..3 {
        a.on_connected(PeerIdx(peer), 0, &mut out);
    }
    let mut answers = Vec::new();
    donor
        .on_greeting(
            &ProposerGreeting {
                proposer_id: A,
                cluster: cluster(),
            },
            0,
            &mut answers,
        )
        .unwrap();
    let AcceptorAction::Send(message) = &answers[0] else {
        panic!()
    };
    a.on_message(PeerIdx(0), message, 0, &mut out);
    greet(&mut a, 2, 5, &[(1, 10)], 50, 0, &mut out);
    let asked = out.iter().find_map(|action| match action {
        ProposerAction::Compare {
            donor,
            term,
            begin_lsn,
            end_lsn,
        } => Some((*donor, *term, *begin_lsn, *end_lsn)),
        _ => None,
    });
    assert_eq!(asked, Some((PeerIdx(0), Term(5), Lsn(10), Lsn(50))));
    // B, of its own term 4 from 30 on, takes over 1 in term 5.
    let b = Session {
        id: 9,
        proposer_id: ProposerId(0xB),
    };
    let mut acts = Vec::new();
    donor
        .on_elected(
            b,
            &Elected {
                configuration_version: version(),
                term: Term(5),
                history: history(&[(1, 10), (5, 30)]),
                start_lsn: Lsn(30),
                timeline_files: vec![],
            },
            1,
            &mut acts,
        )
        .unwrap();
    assert!(
        acts.iter()
            .any(|x| matches!(x, AcceptorAction::Truncate { .. }))
    );
    donor
        .on_append(
            b,
            &Append {
                configuration_version: version(),
                term: Term(5),
                tli: Tli(1),
                begin_lsn: Lsn(30),
                len: 20,
                commit_lsn: Lsn(0),
                truncate_lsn: Lsn(0),
                reply_requested: false,
            },
            1,
            &mut acts,
        )
        .unwrap();
    donor.on_flushed(Lsn(50), &mut acts);
    assert_eq!((donor.term(), donor.flush_lsn()), (Term(5), Lsn(50))); // so a Read of term 5 is answered
    a.on_compared(Compared::Differs { at: Lsn(30) }, 2, &mut out);
    // 1 and B are gone for good. 2 and 3 hold A's log.
    a.on_disconnected(PeerIdx(0), 3);
    out.clear();
    for now in [2_000, 20_000, 40_000] {
        a.on_tick(now, &mut out);
        greet(&mut a, 2, 5, &[(1, 10)], 50, now, &mut out);
        greet(&mut a, 3, 5, &[(1, 10)], 50, now, &mut out);
    }
    assert_ne!(a.state_name(), "refused", "{out:?}");
}

/// A safekeeper that claims an end far beyond what was ever written, under our own term, is
/// believed: it counts for commits, and as a learner ends the worker by an overflow.
#[test]
fn a_learner_that_claims_an_impossible_end() {
    let mut out = Vec::new();
    let mut a = proposer(local(&[(1, 10)], 50));
    for peer in 0..3 {
        a.on_connected(PeerIdx(peer), 0, &mut out);
    }
    for id in 1..=2 {
        greet(&mut a, id, 1, &[(1, 10)], 50, 0, &mut out);
    }
    a.on_compared(Compared::Equal, 0, &mut out);
    for id in 0..2 {
        a.on_message(PeerIdx(id), &vote(2, &[(1, 10)], 50), 0, &mut out);
    }
    a.on_history_persisted(0, &mut out);
    assert!(a.is_leading());
    for id in 0..2 {
        a.on_message(PeerIdx(id), &flushed(2, 50), 0, &mut out);
    }
    let four = a.add_peer(PeerAddress {
        host: "sk4".into(),
        port: 1,
    });
    a.on_connected(four, 0, &mut out);
    a.change_members(
        (1..=4).map(|id| member(id, id.into())).collect(),
        Lsn(0),
        0,
        &mut out,
    )
    .unwrap();
    let stamped = a.configuration().clone();
    for id in 0..2 {
        a.on_message(
            PeerIdx(id),
            &AcceptorMessage::ConfigureResponse(ConfigureResponse {
                term: Term(2),
                configuration: stamped.clone(),
                flush_lsn: Lsn(50),
            }),
            0,
            &mut out,
        );
    }
    assert_eq!(a.change_step(), Some("catching up"));
    let end = u64::MAX - 1;
    a.on_message(
        four,
        &greeting(4, 2, &[(1, 10), (2, 50)], end, stamped.clone()),
        0,
        &mut out,
    );
    let mut answer = flushed(2, end);
    if let AcceptorMessage::AppendResponse(r) = &mut answer {
        r.configuration_version = stamped.version;
    }
    a.on_message(four, &answer, 0, &mut out);
    let claims = |action: &ProposerAction| matches!(action, ProposerAction::Disconnect { peer, reason } if *peer == four && reason.contains("never sent"));
    assert!(out.iter().any(claims), "{out:?}");
    assert_eq!(a.commit_lsn(), Lsn(50));
}
