//! The commands of a replication connection, from text.
//!
//! What a physical consumer may say to a WAL sender (`repl_gram.y`), and `START_WAL_PUSH`, which is
//! ours: a proposer's connection begins with it.
//!
//! A text that begins with none of the known words is taken for SQL and refused as a WAL sender
//! refuses it, the empty one too; one that begins with such a word and goes on wrongly is a syntax
//! error. Key words are in upper case. Names may be quoted as in SQL.

use safekeeper_protocol::{Lsn, Tli};
use safekeeper_wire::pgwire::ErrorReport;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplicationCommand {
    IdentifySystem,
    Show(String),
    TimelineHistory(Tli),
    StartReplication {
        slot: Option<String>,
        start_lsn: Lsn,
        /// None: the newest.
        tli: Option<Tli>,
    },
    ReadReplicationSlot(String),
    CreateReplicationSlot {
        slot: String,
        temporary: bool,
        /// WAL is reserved at once, not at first use.
        reserve_wal: bool,
    },
    DropReplicationSlot {
        slot: String,
        /// If it is in use.
        wait: bool,
    },
    /// 17 and later; for logical slots only.
    AlterReplicationSlot(String),
    StartWalPush,
}

/// The command in `text`; a semicolon may end it.
pub fn parse(text: &str) -> Result<ReplicationCommand, ErrorReport> {
    let mut words = Words { rest: text };
    let first = match words.next() {
        Ok(Some(Word::Plain(first))) => first,
        Err(report) if report.message != SYNTAX_ERROR => return Err(report),
        _ => return Err(not_a_command()),
    };
    let command = parse_command(first, &mut words)?;
    match words.next()? {
        None => Ok(command),
        Some(_) => Err(syntax_error()),
    }
}

fn parse_command(first: &str, words: &mut Words<'_>) -> Result<ReplicationCommand, ErrorReport> {
    match first {
        "IDENTIFY_SYSTEM" => Ok(ReplicationCommand::IdentifySystem),
        "SHOW" => Ok(ReplicationCommand::Show(words.name()?)),
        "TIMELINE_HISTORY" => Ok(ReplicationCommand::TimelineHistory(words.tli()?)),
        "START_REPLICATION" => parse_start_replication(words),
        "READ_REPLICATION_SLOT" => Ok(ReplicationCommand::ReadReplicationSlot(words.name()?)),
        "CREATE_REPLICATION_SLOT" => parse_create_slot(words),
        "DROP_REPLICATION_SLOT" => Ok(ReplicationCommand::DropReplicationSlot {
            slot: words.name()?,
            wait: words.skip_keyword("WAIT"),
        }),
        "ALTER_REPLICATION_SLOT" => {
            let slot = words.name()?;
            words.options()?;
            Ok(ReplicationCommand::AlterReplicationSlot(slot))
        }
        "START_WAL_PUSH" => Ok(ReplicationCommand::StartWalPush),
        "BASE_BACKUP" | "UPLOAD_MANIFEST" => Err(ErrorReport::new(
            "0A000",
            "a safekeeper has no data directory to back up",
        )
        .hint("Take base backups from the primary or a standby.")),
        _ => Err(not_a_command()),
    }
}

fn parse_start_replication(words: &mut Words<'_>) -> Result<ReplicationCommand, ErrorReport> {
    let slot = if words.skip_keyword("SLOT") {
        Some(words.name()?)
    } else {
        None
    };
    words.skip_keyword("PHYSICAL");
    if words.skip_keyword("LOGICAL") {
        return Err(logical());
    }
    let start_lsn = words.lsn()?;
    let tli = if words.skip_keyword("TIMELINE") {
        Some(words.tli()?)
    } else {
        None
    };
    Ok(ReplicationCommand::StartReplication {
        slot,
        start_lsn,
        tli,
    })
}

/// `name [TEMPORARY] PHYSICAL`, then key words as up to 14, or options in brackets.
fn parse_create_slot(words: &mut Words<'_>) -> Result<ReplicationCommand, ErrorReport> {
    let slot = words.name()?;
    let temporary = words.skip_keyword("TEMPORARY");
    if words.skip_keyword("LOGICAL") {
        return Err(logical());
    }
    words.keyword("PHYSICAL")?;
    let reserve_wal = match words.next_is('(') {
        true => reserve_wal_of(&words.options()?)?,
        false => reserve_wal_of_keywords(words)?,
    };
    Ok(ReplicationCommand::CreateReplicationSlot {
        slot,
        temporary,
        reserve_wal,
    })
}

/// What is for logical slots only is a mistake at a physical one (`parseCreateReplSlotOptions`).
fn reserve_wal_of(options: &[(String, Option<String>)]) -> Result<bool, ErrorReport> {
    let mut reserve_wal = None;
    for (name, value) in options {
        match name.as_str() {
            "reserve_wal" if reserve_wal.is_none() => {
                reserve_wal = Some(boolean(name, value.as_deref())?);
            }
            "reserve_wal" | "snapshot" | "two_phase" | "failover" => return Err(redundant()),
            _ => {
                let message = format!("unrecognized option: {name}");
                return Err(ErrorReport::new("XX000", message));
            }
        }
    }
    Ok(reserve_wal.unwrap_or(false))
}

fn reserve_wal_of_keywords(words: &mut Words<'_>) -> Result<bool, ErrorReport> {
    let reserve_wal = words.skip_keyword("RESERVE_WAL");
    for keyword in [
        "RESERVE_WAL",
        "EXPORT_SNAPSHOT",
        "NOEXPORT_SNAPSHOT",
        "USE_SNAPSHOT",
        "TWO_PHASE",
    ] {
        if words.skip_keyword(keyword) {
            return Err(redundant());
        }
    }
    Ok(reserve_wal)
}

/// As `defGetBoolean` takes it: no value is yes.
fn boolean(name: &str, value: Option<&str>) -> Result<bool, ErrorReport> {
    match value.map(str::to_ascii_lowercase).as_deref() {
        None | Some("true" | "on" | "1") => Ok(true),
        Some("false" | "off" | "0") => Ok(false),
        Some(_) => Err(ErrorReport::new(
            "42601",
            format!("{name} requires a Boolean value"),
        )),
    }
}

fn redundant() -> ErrorReport {
    ErrorReport::new("42601", "conflicting or redundant options")
}

fn logical() -> ErrorReport {
    ErrorReport::new(
        "0A000",
        "a safekeeper does not decode WAL for logical replication",
    )
    .hint("Logical replication slots are made on the primary, and read from there.")
}

/// What a text that begins with no command is told.
pub fn not_a_command() -> ErrorReport {
    ErrorReport::new(
        "0A000",
        "cannot execute SQL commands in WAL sender for physical replication",
    )
}

const SYNTAX_ERROR: &str = "syntax error";

/// A WAL sender does not say where.
fn syntax_error() -> ErrorReport {
    ErrorReport::new("42601", SYNTAX_ERROR)
}

/// Longest name, in bytes (`NAMEDATALEN - 1`); what is longer is cut, as by `truncate_identifier`.
const NAME_LEN_MAX: usize = 63;

fn truncated(mut name: String) -> String {
    name.truncate(name.floor_char_boundary(NAME_LEN_MAX));
    name
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Word<'a> {
    /// A key word, number, LSN or unquoted name.
    Plain(&'a str),
    Quoted(String),
    /// What stands in single quotes: the value of an option.
    Text(String),
}

struct Words<'a> {
    rest: &'a str,
}

impl<'a> Words<'a> {
    /// The next word; none at the end or before a final semicolon.
    fn next(&mut self) -> Result<Option<Word<'a>>, ErrorReport> {
        let rest = self.rest.trim_start();
        if rest
            .trim_end_matches(|c: char| c == ';' || c.is_whitespace())
            .is_empty()
        {
            self.rest = "";
            return Ok(None);
        }
        if let Some(quoted) = rest.strip_prefix('"') {
            return Ok(Some(Word::Quoted(self.quoted(quoted, '"')?)));
        }
        if let Some(text) = rest.strip_prefix('\'') {
            return Ok(Some(Word::Text(self.quoted(text, '\'')?)));
        }
        let is_inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '/' | '.' | '$');
        let len = rest.find(|c| !is_inside(c)).unwrap_or(rest.len());
        if len == 0 {
            return Err(syntax_error());
        }
        let (word, rest) = rest.split_at(len);
        self.rest = rest;
        Ok(Some(Word::Plain(word)))
    }

    /// After the opening quote; two quotes stand for one.
    fn quoted(&mut self, mut rest: &'a str, quote: char) -> Result<String, ErrorReport> {
        let mut name = String::new();
        loop {
            let (part, after) = rest
                .split_once(quote)
                .ok_or_else(|| ErrorReport::new("42601", "unterminated quoted string"))?;
            name.push_str(part);
            match after.strip_prefix(quote) {
                Some(more) => {
                    name.push(quote);
                    rest = more;
                }
                None => {
                    self.rest = after;
                    return Ok(name);
                }
            }
        }
    }

    fn plain(&mut self) -> Result<&'a str, ErrorReport> {
        match self.next()? {
            Some(Word::Plain(word)) => Ok(word),
            _ => Err(syntax_error()),
        }
    }

    /// Unquoted names are in lower case, as in SQL.
    fn name(&mut self) -> Result<String, ErrorReport> {
        match self.next()? {
            Some(Word::Plain(word)) => Ok(truncated(word.to_ascii_lowercase())),
            Some(Word::Quoted(name)) => Ok(truncated(name)),
            _ => Err(syntax_error()),
        }
    }

    fn keyword(&mut self, keyword: &str) -> Result<(), ErrorReport> {
        match self.skip_keyword(keyword) {
            true => Ok(()),
            false => Err(syntax_error()),
        }
    }

    fn next_is(&self, symbol: char) -> bool {
        self.rest.trim_start().starts_with(symbol)
    }

    fn skip_symbol(&mut self, symbol: char) -> bool {
        let rest = self.rest.trim_start().strip_prefix(symbol);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    /// `(name [value], ...)`: names in lower case, values as they are.
    fn options(&mut self) -> Result<Vec<(String, Option<String>)>, ErrorReport> {
        if !self.skip_symbol('(') {
            return Err(syntax_error());
        }
        let mut options = Vec::new();
        loop {
            let name = self.name()?;
            let value = match self.next_is(',') || self.next_is(')') {
                true => None,
                false => Some(self.value()?),
            };
            options.push((name, value));
            if self.skip_symbol(')') {
                return Ok(options);
            }
            if !self.skip_symbol(',') {
                return Err(syntax_error());
            }
        }
    }

    /// A word, a quoted name, or a text in single quotes.
    fn value(&mut self) -> Result<String, ErrorReport> {
        match self.next()? {
            Some(Word::Plain(word)) => Ok(word.to_owned()),
            Some(Word::Quoted(word) | Word::Text(word)) => Ok(word),
            None => Err(syntax_error()),
        }
    }

    fn tli(&mut self) -> Result<Tli, ErrorReport> {
        let digits = self.plain()?;
        if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(syntax_error());
        }
        match digits.parse() {
            Ok(tli) if tli > 0 => Ok(Tli(tli)),
            _ => Err(ErrorReport::new(
                "42601",
                format!("invalid timeline {digits}"),
            )),
        }
    }

    fn lsn(&mut self) -> Result<Lsn, ErrorReport> {
        self.plain()?.parse().map_err(|_| syntax_error())
    }

    fn skip_keyword(&mut self, keyword: &str) -> bool {
        let before = self.rest;
        match self.next() {
            Ok(Some(Word::Plain(word))) if word == keyword => true,
            _ => {
                self.rest = before;
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(slot: Option<&str>, start_lsn: u64, tli: Option<u32>) -> ReplicationCommand {
        ReplicationCommand::StartReplication {
            slot: slot.map(str::to_owned),
            start_lsn: Lsn(start_lsn),
            tli: tli.map(Tli),
        }
    }

    fn create(slot: &str, temporary: bool, reserve_wal: bool) -> ReplicationCommand {
        ReplicationCommand::CreateReplicationSlot {
            slot: slot.to_owned(),
            temporary,
            reserve_wal,
        }
    }

    #[test]
    fn names_are_cut_where_a_primary_cuts_them() {
        let name = |text: &str| match parse(&format!("READ_REPLICATION_SLOT \"{text}\"")) {
            Ok(ReplicationCommand::ReadReplicationSlot(name)) => name,
            other => panic!("{other:?}"),
        };
        assert_eq!(name(&"a".repeat(70)), "a".repeat(63));
        assert_eq!(name(&"é".repeat(40)), "é".repeat(31));
        assert_eq!(name(""), "");
    }

    #[test]
    fn understands_what_receivers_send() {
        for (text, command) in [
            ("IDENTIFY_SYSTEM", ReplicationCommand::IdentifySystem),
            (" IDENTIFY_SYSTEM ; ", ReplicationCommand::IdentifySystem),
            (
                "SHOW wal_segment_size",
                ReplicationCommand::Show("wal_segment_size".into()),
            ),
            (
                "TIMELINE_HISTORY 3",
                ReplicationCommand::TimelineHistory(Tli(3)),
            ),
            (
                "START_REPLICATION 0/3000000 TIMELINE 1",
                start(None, 0x300_0000, Some(1)),
            ),
            (
                "START_REPLICATION PHYSICAL 1/A",
                start(None, 0x1_0000_000A, None),
            ),
            (
                "START_REPLICATION SLOT \"stand\"\"by\" 0/0 TIMELINE 4294967295;",
                start(Some("stand\"by"), 0, Some(u32::MAX)),
            ),
            (
                "START_REPLICATION SLOT Sb PHYSICAL 0/8",
                start(Some("sb"), 8, None),
            ),
            (
                "READ_REPLICATION_SLOT \"s\"",
                ReplicationCommand::ReadReplicationSlot("s".into()),
            ),
            (
                "CREATE_REPLICATION_SLOT s PHYSICAL",
                create("s", false, false),
            ),
            (
                "CREATE_REPLICATION_SLOT \"s\" PHYSICAL (RESERVE_WAL)",
                create("s", false, true),
            ),
            (
                "CREATE_REPLICATION_SLOT \"s\" TEMPORARY PHYSICAL ( RESERVE_WAL true );",
                create("s", true, true),
            ),
            (
                "CREATE_REPLICATION_SLOT s PHYSICAL(reserve_wal 'off')",
                create("s", false, false),
            ),
            (
                "CREATE_REPLICATION_SLOT s TEMPORARY PHYSICAL RESERVE_WAL",
                create("s", true, true),
            ),
            (
                "DROP_REPLICATION_SLOT s",
                ReplicationCommand::DropReplicationSlot {
                    slot: "s".into(),
                    wait: false,
                },
            ),
            (
                "DROP_REPLICATION_SLOT s WAIT",
                ReplicationCommand::DropReplicationSlot {
                    slot: "s".into(),
                    wait: true,
                },
            ),
            (
                "ALTER_REPLICATION_SLOT s (FAILOVER true, two_phase)",
                ReplicationCommand::AlterReplicationSlot("s".into()),
            ),
            ("START_WAL_PUSH", ReplicationCommand::StartWalPush),
        ] {
            assert_eq!(parse(text), Ok(command), "{text}");
        }
    }

    #[test]
    fn refuses_the_rest_with_the_codes_of_a_primary() {
        for (text, sqlstate) in [
            ("", "0A000"),
            (" ; ", "0A000"),
            ("SELECT 1", "0A000"),
            ("identify_system", "0A000"),
            ("-- IDENTIFY_SYSTEM", "0A000"),
            ("'text'", "0A000"),
            ("'text", "42601"),
            ("\"quoted\"", "0A000"),
            ("START_REPLICATION SLOT s LOGICAL 0/0", "0A000"),
            ("BASE_BACKUP", "0A000"),
            ("IDENTIFY_SYSTEM 1", "42601"),
            ("IDENTIFY_SYSTEM; IDENTIFY_SYSTEM", "42601"),
            ("SHOW", "42601"),
            ("SHOW \"a", "42601"),
            ("TIMELINE_HISTORY", "42601"),
            ("TIMELINE_HISTORY 0", "42601"),
            ("TIMELINE_HISTORY 4294967296", "42601"),
            ("START_REPLICATION", "42601"),
            ("START_REPLICATION 0/0 TIMELINE", "42601"),
            ("START_REPLICATION zero", "42601"),
            ("START_REPLICATION 0/123456789", "42601"),
            ("START_REPLICATION timeline 1", "42601"),
            ("CREATE_REPLICATION_SLOT s LOGICAL pgoutput", "0A000"),
            ("CREATE_REPLICATION_SLOT s TEMPORARY LOGICAL p (x)", "0A000"),
            ("CREATE_REPLICATION_SLOT", "42601"),
            ("CREATE_REPLICATION_SLOT s", "42601"),
            ("CREATE_REPLICATION_SLOT s PHYSICAL ()", "42601"),
            ("CREATE_REPLICATION_SLOT s PHYSICAL (", "42601"),
            ("CREATE_REPLICATION_SLOT s PHYSICAL (RESERVE_WAL", "42601"),
            (
                "CREATE_REPLICATION_SLOT s PHYSICAL (RESERVE_WAL 'a",
                "42601",
            ),
            (
                "CREATE_REPLICATION_SLOT s PHYSICAL (RESERVE_WAL 2)",
                "42601",
            ),
            ("CREATE_REPLICATION_SLOT s PHYSICAL (RESERVE_WAL,)", "42601"),
            (
                "CREATE_REPLICATION_SLOT s PHYSICAL (RESERVE_WAL, RESERVE_WAL)",
                "42601",
            ),
            ("CREATE_REPLICATION_SLOT s PHYSICAL (TWO_PHASE)", "42601"),
            ("CREATE_REPLICATION_SLOT s PHYSICAL TWO_PHASE", "42601"),
            ("CREATE_REPLICATION_SLOT s PHYSICAL (sparkle)", "XX000"),
            ("DROP_REPLICATION_SLOT", "42601"),
            ("DROP_REPLICATION_SLOT s NOW", "42601"),
            ("ALTER_REPLICATION_SLOT s", "42601"),
            ("START_WAL_PUSH '", "42601"),
        ] {
            let refused = parse(text).expect_err(text);
            assert_eq!(refused.sqlstate, sqlstate, "{text}: {}", refused.message);
        }
    }
}
