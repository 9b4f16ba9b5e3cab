//! What a connection begins with: the startup packet, or one of three requests in its place. Read
//! here for those who come to us, and written for our own clients (`wal_client.rs`).
//!
//! ```text
//!   4 code       3 << 16 | minor: startup, then "name\0value\0" pairs and one more "\0"
//!                1234 << 16 | 5678: cancel      5679: TLS, please      5680: GSSAPI, please
//! ```
//!
//! Which cluster a consumer means stands in `options`, as settings of a session do with Postgres:
//! `options='-c cluster=main'`.

use crate::pgwire::{ErrorReport, Input, PROTOCOL_3_0};

const CODE_CANCEL: u32 = 1234 << 16 | 5678;
const CODE_SSL: u32 = 1234 << 16 | 5679;
const CODE_GSSENC: u32 = 1234 << 16 | 5680;

/// The startup packet, as far as we use it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Startup {
    pub user: String,
    pub application_name: String,
    /// Cluster chosen by `options`.
    pub cluster: Option<String>,
    /// The peer asked for a later 3.x than 3.0, or for options of the protocol.
    pub negotiate: bool,
    pub unrecognized: Vec<String>,
}

/// What a peer may begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opening {
    /// It would like TLS, and waits for one byte in answer.
    Tls,
    /// The same with GSSAPI.
    Gssapi,
    /// It would like a query cancelled; nothing here can be.
    Cancel,
    Startup(Startup),
}

/// Longest name of a user, in bytes, as of a role in Postgres.
pub const NAME_LEN_MAX: usize = 63;

/// The question whether the server would encrypt, length word included.
pub fn ssl_request() -> [u8; 8] {
    let mut packet = [0, 0, 0, 8, 0, 0, 0, 0];
    packet[4..].copy_from_slice(&CODE_SSL.to_be_bytes());
    packet
}

/// The packet with which a client of ours begins, its length word included. `parameters` are names
/// and values; `user` must be among them.
pub fn encode_startup(parameters: &[(&str, &str)]) -> Vec<u8> {
    let mut packet = vec![0; 4];
    packet.extend_from_slice(&PROTOCOL_3_0.to_be_bytes());
    for text in parameters.iter().flat_map(|(name, value)| [name, value]) {
        // A zero byte inside would end the text early.
        packet.extend(text.bytes().filter(|byte| *byte != 0));
        packet.push(0);
    }
    packet.push(0);
    let len = u32::try_from(packet.len()).expect("names and values of a command line are short");
    packet[..4].copy_from_slice(&len.to_be_bytes());
    packet
}

/// The setting that chooses a cluster, for `options`.
pub fn cluster_option(name: &str) -> String {
    let mut option = "-c cluster=".to_owned();
    for c in name.chars() {
        if c == '\\' || c.is_ascii_whitespace() {
            option.push('\\');
        }
        option.push(c);
    }
    option
}

/// The peer's next packet before the session has begun, if it is here.
pub fn next_opening(input: &mut Input) -> Result<Option<Opening>, ErrorReport> {
    input.next_startup_packet()?.map(parse_opening).transpose()
}

fn parse_opening(packet: &[u8]) -> Result<Opening, ErrorReport> {
    let (code, rest) = packet
        .split_first_chunk::<4>()
        .ok_or_else(|| ErrorReport::protocol("startup packet ends too early"))?;
    match u32::from_be_bytes(*code) {
        CODE_SSL => Ok(Opening::Tls),
        CODE_GSSENC => Ok(Opening::Gssapi),
        CODE_CANCEL => Ok(Opening::Cancel),
        version if version >> 16 == 3 => {
            let negotiate = version != PROTOCOL_3_0;
            parse_startup(rest, negotiate).map(Opening::Startup)
        }
        version => Err(ErrorReport::new(
            "0A000",
            format!(
                "unsupported frontend protocol {}.{}: server supports 3.0",
                version >> 16,
                version & 0xFFFF
            ),
        )),
    }
}

fn parse_startup(mut rest: &[u8], negotiate: bool) -> Result<Startup, ErrorReport> {
    let malformed = || ErrorReport::protocol("invalid startup packet layout");
    let mut startup = Startup {
        negotiate,
        ..Startup::default()
    };
    loop {
        let name = take_cstr(&mut rest).ok_or_else(malformed)?;
        if name.is_empty() {
            break;
        }
        let value = take_cstr(&mut rest).ok_or_else(malformed)?;
        match name {
            "user" => startup.user = short(value),
            "application_name" => startup.application_name = short(value),
            "options" => {
                if let Some(cluster) = cluster_of_options(value) {
                    startup.cluster = Some(cluster);
                }
            }
            _ if name.starts_with("_pq_.") => {
                startup.negotiate = true;
                startup.unrecognized.push(name.to_owned());
            }
            _ => {}
        }
    }
    if !rest.is_empty() {
        return Err(malformed());
    }
    if startup.user.is_empty() {
        return Err(ErrorReport::new(
            "28000",
            "no PostgreSQL user name specified in startup packet",
        ));
    }
    Ok(startup)
}

/// As much of a name as Postgres takes (`NAMEDATALEN`): it goes into logs before it is known whose it is.
fn short(name: &str) -> String {
    name[..name.floor_char_boundary(NAME_LEN_MAX)].to_owned()
}

fn take_cstr<'a>(rest: &mut &'a [u8]) -> Option<&'a str> {
    let len = rest.iter().position(|byte| *byte == 0)?;
    let text = std::str::from_utf8(&rest[..len]).ok()?;
    *rest = &rest[len + 1..];
    Some(text)
}

/// NAME of `-c cluster=NAME`, `-ccluster=NAME` or `--cluster=NAME`; the last one counts. Other
/// settings are a server's and mean nothing here.
fn cluster_of_options(options: &str) -> Option<String> {
    let mut cluster = None;
    let mut words = split_options(options).into_iter();
    while let Some(word) = words.next() {
        let assignment = match word.strip_prefix("-c") {
            Some("") => words.next().unwrap_or_default(),
            Some(assignment) => assignment.to_owned(),
            None => word.strip_prefix("--").unwrap_or_default().to_owned(),
        };
        if let Some(name) = assignment.strip_prefix("cluster=") {
            cluster = Some(name.to_owned());
        }
    }
    cluster
}

/// Words parted by white space, where a backslash takes the next character as it is
/// (`pg_split_opts` in `utils/init/postinit.c`).
fn split_options(options: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = options.chars();
    while let Some(c) = chars.next() {
        match c {
            c if c.is_ascii_whitespace() => words.extend(word.take()),
            '\\' => word.get_or_insert_default().extend(chars.next()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn startup_packet(version: u32, parameters: &[(&str, &str)]) -> Vec<u8> {
        let mut packet = version.to_be_bytes().to_vec();
        for (name, value) in parameters {
            packet.extend(format!("{name}\0{value}\0").bytes());
        }
        packet.push(0);
        packet
    }

    #[test]
    fn long_names_are_cut() {
        let name = format!("{}\u{e4}{}", "x".repeat(62), "y".repeat(5000));
        let packet = startup_packet(
            PROTOCOL_3_0,
            &[("user", &name), ("application_name", &name)],
        );
        let Ok(Opening::Startup(startup)) = parse_opening(&packet) else {
            panic!("a startup packet");
        };
        assert_eq!(startup.user, "x".repeat(62));
        assert_eq!(startup.application_name, startup.user);
    }

    #[test]
    fn options_choose_the_cluster_as_libpq_users_write_them() {
        for (options, cluster) in [
            ("", None),
            ("-c cluster=main", Some("main")),
            ("-ccluster=main", Some("main")),
            ("--cluster=main", Some("main")),
            ("  -c work_mem=1MB   -c cluster=a\\ b", Some("a b")),
            ("--cluster=a --cluster=b", Some("b")),
            ("-c", None),
            ("cluster=main", None),
            ("-c cluster=", Some("")),
        ] {
            assert_eq!(cluster_of_options(options).as_deref(), cluster, "{options}");
        }
    }

    #[test]
    fn what_a_client_of_ours_sends_is_what_a_server_reads() {
        for name in ["main", "a b", "back\\slash", "tab\there", "häuser"] {
            let options = cluster_option(name);
            let packet = encode_startup(&[("user", "me"), ("options", &options)]);
            let len = u32::from_be_bytes([packet[0], packet[1], packet[2], packet[3]]);
            assert_eq!(len as usize, packet.len());
            let expected = Startup {
                user: "me".to_owned(),
                cluster: Some(name.to_owned()),
                ..Startup::default()
            };
            assert_eq!(
                parse_opening(&packet[4..]),
                Ok(Opening::Startup(expected)),
                "{name}"
            );
        }
    }

    #[test]
    fn startup_packets_by_cases() {
        let parsed = |packet: &[u8]| parse_opening(packet);
        let plain = parsed(&startup_packet(
            PROTOCOL_3_0,
            &[("user", "u"), ("replication", "true")],
        ));
        assert!(matches!(plain, Ok(Opening::Startup(s)) if s.user == "u" && !s.negotiate));

        let later = parsed(&startup_packet(
            PROTOCOL_3_0 | 2,
            &[("user", "u"), ("_pq_.x", "1")],
        ));
        let Ok(Opening::Startup(later)) = later else {
            panic!("{later:?}")
        };
        assert!(later.negotiate);
        assert_eq!(later.unrecognized, ["_pq_.x"]);

        assert_eq!(parsed(&CODE_SSL.to_be_bytes()), Ok(Opening::Tls));
        assert_eq!(parsed(&CODE_GSSENC.to_be_bytes()), Ok(Opening::Gssapi));
        assert_eq!(parsed(&CODE_CANCEL.to_be_bytes()), Ok(Opening::Cancel));
        for (packet, sqlstate) in [
            (startup_packet(2 << 16, &[("user", "u")]), "0A000"),
            (startup_packet(PROTOCOL_3_0, &[]), "28000"),
            (PROTOCOL_3_0.to_be_bytes().to_vec(), "08P01"),
            (vec![0, 3, 0, 0, b'u', b's'], "08P01"),
            (vec![0, 3, 0, 0, 0xFF, 0, 0], "08P01"),
            (vec![0, 3, 0, 0, 0, 0], "08P01"),
            (vec![0, 3], "08P01"),
        ] {
            let refused = parsed(&packet).expect_err("refused");
            assert_eq!(refused.sqlstate, sqlstate, "{packet:?}");
        }
    }
}
