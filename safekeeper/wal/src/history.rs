//! Timeline history files: where a cluster's timelines parted, oldest first.
//!
//! `00000003.history` tells the ancestry of timeline 3, a line for each ancestor:
//!
//! ```text
//! 1<TAB>0/3000148<TAB>no recovery target specified
//!
//! 2<TAB>0/5A00000<TAB>before transaction 731
//! ```
//!
//! Timeline 1 ended at 0/3000148, where 2 began; that ended at 0/5A00000, where 3 began and still
//! goes on. Empty lines and lines that begin with `#` say nothing; a server leaves an empty line
//! between entries. The rest of a line behind the position is for people. (`access/transam/timeline.c`)
//!
//! A number may belong to a timeline that never had a byte: a promotion took it and was given up.
//! Servers that follow look for the files of all numbers up to the newest, one after another, and
//! stop at a gap; so there is a file for such a number too, which names no ancestor and is therefore
//! followed by nobody ([`GIVEN_UP`]).
//!
//! Positions are half-open: the byte at a switch point belongs to the newer timeline. Timeline
//! numbers grow; positions do not go back.

use std::fmt;

use safekeeper_protocol::Lsn;

/// What the history file of a timeline says that was given up before it had a byte.
pub const GIVEN_UP: &str =
    "# walproposer: this timeline was begun by a promotion that was given up\n";

/// Is that what it says, or what a crash has left of it?
pub fn is_given_up(content: &[u8]) -> bool {
    GIVEN_UP.as_bytes().starts_with(content) || content.iter().all(|&byte| byte == 0)
}

/// A timeline and its ancestors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimelineHistory {
    /// The timeline told of.
    pub tli: u32,
    /// Oldest first; `tli` strictly grows and stays below the own one, `end_lsn` never goes back.
    pub ancestors: Vec<TimelineSwitch>,
}

/// The end of an ancestor, where its child began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimelineSwitch {
    pub tli: u32,
    pub end_lsn: Lsn,
    /// Free text, one line.
    pub reason: String,
}

/// A line of a history file that makes no sense; `line` counts from 1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of the history of timeline {tli}: {problem}")]
pub struct HistoryError {
    pub tli: u32,
    pub line: usize,
    pub problem: &'static str,
}

impl TimelineHistory {
    /// A timeline without ancestors, such as the first of a cluster.
    pub fn root(tli: u32) -> TimelineHistory {
        TimelineHistory {
            tli,
            ancestors: Vec::new(),
        }
    }

    /// Reads the text of the history file of `tli`.
    pub fn parse(tli: u32, text: &str) -> Result<TimelineHistory, HistoryError> {
        let mut history = TimelineHistory::root(tli);
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let error = |problem| HistoryError {
                tli,
                line: number,
                problem,
            };
            let switch = parse_line(line).map_err(error)?;
            history.push(switch).map_err(error)?;
        }
        Ok(history)
    }

    /// Adds the youngest ancestor.
    fn push(&mut self, switch: TimelineSwitch) -> Result<(), &'static str> {
        if switch.tli >= self.tli {
            return Err("timeline is not below its child's");
        }
        if let Some(last) = self.ancestors.last() {
            if switch.tli <= last.tli {
                return Err("timelines are not in increasing sequence");
            }
            if switch.end_lsn < last.end_lsn {
                return Err("switch point lies before the one above it");
            }
        }
        self.ancestors.push(switch);
        Ok(())
    }

    /// The timeline on which the byte at `lsn` was written.
    pub fn tli_at(&self, lsn: Lsn) -> u32 {
        self.ancestors
            .iter()
            .find(|a| lsn < a.end_lsn)
            .map_or(self.tli, |a| a.tli)
    }

    /// Where `tli` ended: `None` if it is the newest, or not in this history.
    pub fn switch_point(&self, tli: u32) -> Option<Lsn> {
        self.ancestors
            .iter()
            .find(|a| a.tli == tli)
            .map(|a| a.end_lsn)
    }

    /// Where `tli` began: the start of all WAL for the oldest, `None` if not in this history.
    pub fn begin(&self, tli: u32) -> Option<Lsn> {
        let tlis = self.ancestors.iter().map(|a| a.tli).chain([self.tli]);
        let begins = [Lsn::INVALID]
            .into_iter()
            .chain(self.ancestors.iter().map(|a| a.end_lsn));
        tlis.zip(begins)
            .find(|(t, _)| *t == tli)
            .map(|(_, begin)| begin)
    }
}

impl fmt::Display for TimelineHistory {
    /// The text of the history file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, a) in self.ancestors.iter().enumerate() {
            let gap = if i == 0 { "" } else { "\n" };
            writeln!(f, "{gap}{}\t{}\t{}", a.tli, a.end_lsn, a.reason)?;
        }
        Ok(())
    }
}

fn parse_line(line: &str) -> Result<TimelineSwitch, &'static str> {
    let (tli, rest) = first_word(line);
    let (lsn, reason) = first_word(rest);
    // u32's own parser would take a leading '+'.
    let digits = !tli.is_empty() && tli.bytes().all(|b| b.is_ascii_digit());
    let tli = tli.parse().ok().filter(|&tli| digits && tli != 0);
    Ok(TimelineSwitch {
        tli: tli.ok_or("expected a numeric timeline ID")?,
        end_lsn: lsn.parse().map_err(|_| "expected a WAL switch point")?,
        reason: reason.to_owned(),
    })
}

fn first_word(line: &str) -> (&str, &str) {
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    (word, rest.trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "1\t0/3000148\tno recovery target specified\n\n2\t1/5A00000\tat restore point \"x\"\n";

    fn two_switches() -> TimelineHistory {
        TimelineHistory::parse(4, TEXT).expect("a good file")
    }

    #[test]
    fn a_file_of_a_server_is_read_and_written_back_the_same() {
        let history = two_switches();
        assert_eq!(history.ancestors.len(), 2);
        assert_eq!(history.ancestors[1].tli, 2);
        assert_eq!(history.ancestors[1].end_lsn, Lsn(0x1_05A0_0000));
        assert_eq!(history.ancestors[1].reason, "at restore point \"x\"");
        assert_eq!(history.to_string(), TEXT);
        assert_eq!(TimelineHistory::parse(1, ""), Ok(TimelineHistory::root(1)));
        assert_eq!(TimelineHistory::root(1).to_string(), "");
    }

    #[test]
    fn comments_blanks_and_missing_reasons_are_allowed() {
        let text = "# restored by hand\n\n   \n  1 0/10   \r\n2\t0/10";
        let history = TimelineHistory::parse(3, text).expect("a good file");
        assert_eq!(history.to_string(), "1\t0/10\t\n\n2\t0/10\t\n");
    }

    #[test]
    fn a_switch_point_belongs_to_the_newer_timeline() {
        let history = two_switches();
        for (lsn, tli) in [
            (0, 1),
            (0x300_0147, 1),
            (0x300_0148, 2),
            (0x1_059F_FFFF, 2),
            (0x1_05A0_0000, 4),
            (u64::MAX, 4),
        ] {
            assert_eq!(history.tli_at(Lsn(lsn)), tli, "{}", Lsn(lsn));
        }
        assert_eq!(history.switch_point(2), Some(Lsn(0x1_05A0_0000)));
        assert_eq!(history.switch_point(4), None);
        assert_eq!(history.switch_point(3), None);
        assert_eq!(history.begin(1), Some(Lsn(0)));
        assert_eq!(history.begin(2), Some(Lsn(0x300_0148)));
        assert_eq!(history.begin(4), Some(Lsn(0x1_05A0_0000)));
        assert_eq!(history.begin(3), None);
    }

    #[test]
    fn a_line_that_makes_no_sense_is_named() {
        for (text, line, problem) in [
            ("x\t0/1\t", 1, "expected a numeric timeline ID"),
            ("0\t0/1\t", 1, "expected a numeric timeline ID"),
            ("+1\t0/1\t", 1, "expected a numeric timeline ID"),
            ("99999999999\t0/1\t", 1, "expected a numeric timeline ID"),
            ("\n1", 2, "expected a WAL switch point"),
            ("1\t0-1\t", 1, "expected a WAL switch point"),
            (
                "2\t0/1\t\n1\t0/2\t",
                2,
                "timelines are not in increasing sequence",
            ),
            (
                "1\t0/1\t\n1\t0/2\t",
                2,
                "timelines are not in increasing sequence",
            ),
            (
                "1\t0/3\t\n2\t0/2\t",
                2,
                "switch point lies before the one above it",
            ),
            ("5\t0/3\t", 1, "timeline is not below its child's"),
        ] {
            let error = HistoryError {
                tli: 5,
                line,
                problem,
            };
            assert_eq!(TimelineHistory::parse(5, text), Err(error), "{text:?}");
        }
    }
}
