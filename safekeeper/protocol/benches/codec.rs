//! What the two messages of the hot path cost: the header of WAL, and the answer to it.
//!
//! The WAL behind the header is never copied by the codec, so its length must make no difference;
//! `decode an Append of 1 MiB` would show it.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use safekeeper_protocol::codec::{
    APPEND_HEADER_LEN, decode_acceptor_message, decode_proposer_message, encode_acceptor_message,
    encode_append,
};
use safekeeper_protocol::{
    AcceptorMessage, Append, AppendResponse, ConfigurationVersion, Lsn, StandbyFeedback, Term, Tli,
};

const VERSION: ConfigurationVersion = ConfigurationVersion {
    term: Term(3),
    generation: 2,
};

fn append(len: u32) -> Append {
    Append {
        configuration_version: VERSION,
        term: Term(7),
        tli: Tli(1),
        begin_lsn: Lsn(0x16B_3748),
        len,
        commit_lsn: Lsn(0x16B_3700),
        truncate_lsn: Lsn(0x16B_0000),
        reply_requested: false,
    }
}

fn codec(c: &mut Criterion) {
    let mut out = Vec::with_capacity(256);
    c.bench_function("encode an Append", |b| {
        let append = append(400);
        b.iter(|| {
            out.clear();
            encode_append(black_box(&append), &mut out);
            black_box(out.len())
        });
    });
    for (name, len) in [
        ("decode an Append of 400 bytes", 400),
        ("decode an Append of 1 MiB", Append::LEN_MAX),
    ] {
        let mut message = Vec::new();
        encode_append(&append(len), &mut message);
        assert_eq!(message.len(), APPEND_HEADER_LEN);
        message.resize(APPEND_HEADER_LEN + len as usize, 0x5A);
        c.bench_function(name, |b| {
            b.iter(|| {
                let (message, wal) =
                    decode_proposer_message(black_box(&message)).expect("a sound message");
                black_box((&message, wal.len()));
            });
        });
    }

    let response = AcceptorMessage::AppendResponse(AppendResponse {
        configuration_version: VERSION,
        term: Term(7),
        write_lsn: Lsn(0x16B_38E0),
        flush_lsn: Lsn(0x16B_38E0),
        commit_lsn: Lsn(0x16B_3700),
        feedback: StandbyFeedback::default(),
    });
    c.bench_function("encode an AppendResponse", |b| {
        b.iter(|| {
            out.clear();
            encode_acceptor_message(black_box(&response), &mut out);
            black_box(out.len())
        });
    });
    let mut message = Vec::new();
    encode_acceptor_message(&response, &mut message);
    c.bench_function("decode an AppendResponse", |b| {
        b.iter(|| {
            let (response, rest) =
                decode_acceptor_message(black_box(&message)).expect("a sound message");
            black_box((&response, rest.len()));
        });
    });
}

criterion_group!(benches, codec);
criterion_main!(benches);
