//! What readers may know of a cluster without taking its keeper: an unchanging picture, replaced
//! as a whole when the control file or the timeline files are.
//!
//! A timeline exists for readers once commit_lsn is beyond its begin:
//!
//! ```text
//!   term history   (4, tli 1, 0/1000000)          (5, tli 2, 0/1400000)
//!   commit_lsn                      0/1300000                             newest: 1
//!                                       0/1400000                         newest: 1
//!                                           0/1400060                     newest: 2, 1 has ended
//! ```

use std::borrow::Cow;

use safekeeper_client::wal_client::TimelineEnd;
use safekeeper_protocol::{AcceptorState, Lsn, TimelineFile, Tli};
use safekeeper_wal::{GIVEN_UP, TimelineHistory, TimelineSwitch};
use safekeeper_wire::pgwire::ErrorReport;

#[derive(Clone, Debug)]
pub struct View {
    pub state: AcceptorState,
    timeline_files: Vec<TimelineFile>,
}

impl View {
    pub fn new(state: AcceptorState, timeline_files: Vec<TimelineFile>) -> View {
        View {
            state,
            timeline_files,
        }
    }

    /// The newest timeline that may be shown; that of the log's begin while nothing is committed.
    pub fn newest_tli(&self, commit_lsn: Lsn) -> Tli {
        let entries = self.state.history.entries();
        let shown = entries
            .iter()
            .rev()
            .find(|entry| entry.start_lsn < commit_lsn);
        shown.or(entries.first()).map_or(Tli(1), |entry| entry.tli)
    }

    /// Of which timeline a position is, in the history of the newest that may be shown; a switch
    /// belongs to the newer one (`tliOfPointInHistory`).
    pub fn tli_of(&self, lsn: Lsn, commit_lsn: Lsn) -> Tli {
        let newest = self.newest_tli(commit_lsn);
        let known = self.timeline_file(newest).and_then(|file| {
            let text = str::from_utf8(&file.content).ok()?;
            TimelineHistory::parse(newest.0, text).ok()
        });
        match known {
            Some(history) => {
                let mut ancestors = history.ancestors.iter();
                let found = ancestors.find(|ancestor| lsn < ancestor.end_lsn);
                found.map_or(newest, |ancestor| Tli(ancestor.tli))
            }
            None => self.state.history.tli_at(lsn).unwrap_or(newest).min(newest),
        }
    }

    /// All history files, the newest first.
    pub fn timeline_files(&self) -> &[TimelineFile] {
        &self.timeline_files
    }

    /// WAL is found and checked as with the other.
    pub fn same_timelines(&self, other: &View) -> bool {
        self.state.history == other.state.history && self.timeline_files == other.timeline_files
    }

    /// The history file of a timeline, as Postgres wrote it; timeline 1 has none. A safekeeper that
    /// got the timeline's WAL from a donor, for a standby that had not come so far, has not got its
    /// file: then one that says the same.
    pub fn timeline_file(&self, tli: Tli) -> Option<Cow<'_, TimelineFile>> {
        let file = self.timeline_files.iter().find(|file| file.tli == tli);
        file.map(Cow::Borrowed)
            .or_else(|| self.file_by_terms(tli).map(Cow::Owned))
    }

    /// From the newest older file, or from timeline 1, by way of the term history.
    fn file_by_terms(&self, tli: Tli) -> Option<TimelineFile> {
        let entries = self.state.history.entries();
        entries.iter().find(|entry| entry.tli == tli)?;
        let older = self.timeline_files.iter().find(|file| file.tli < tli);
        let mut history = match older {
            Some(file) => TimelineHistory::parse(file.tli.0, str::from_utf8(&file.content).ok()?),
            None => Ok(TimelineHistory::root(1)),
        }
        .ok()?;
        // The older one must be one of the log's, so that nothing is left out between them.
        entries.iter().find(|entry| entry.tli.0 == history.tli)?;
        let newer = entries.iter().filter(|entry| entry.tli <= tli);
        for entry in newer {
            if entry.tli.0 > history.tli {
                history.ancestors.push(TimelineSwitch {
                    tli: history.tli,
                    end_lsn: entry.start_lsn,
                    reason: "as the safekeepers know it".to_owned(),
                });
                history.tli = entry.tli.0;
            }
        }
        let content = history.to_string().into_bytes();
        // The first timeline has no file.
        (!history.ancestors.is_empty()).then_some(TimelineFile { tli, content })
    }

    /// What a follower gets that asks for the history of `tli`, none newer being shown than `newest`.
    /// It asks for every number between its own timeline and the newest.
    pub fn shown_timeline_file(&self, tli: Tli, newest: Tli) -> Option<Cow<'_, TimelineFile>> {
        if tli > newest {
            return None;
        }
        self.timeline_file(tli)
            .or_else(|| self.given_up_file(tli, newest).map(Cow::Owned))
    }

    /// For a number that a promotion has taken which was given up: no ancestor of the newest, and
    /// not in the log.
    fn given_up_file(&self, tli: Tli, newest: Tli) -> Option<TimelineFile> {
        let entries = self.state.history.entries();
        let first = entries.first()?.tli;
        let is_known = entries.iter().any(|entry| entry.tli == tli);
        let is_ancestor = self.end_by_file(tli, newest).is_some();
        // Of what was before the log began, too little is known.
        let given_up = tli > first && tli < newest && !is_known && !is_ancestor;
        given_up.then(|| TimelineFile {
            tli,
            content: GIVEN_UP.as_bytes().to_vec(),
        })
    }

    /// None if `tli` is the newest; an error if it is not an ancestor of the newest.
    pub fn end_of_timeline(
        &self,
        tli: Tli,
        commit_lsn: Lsn,
    ) -> Result<Option<TimelineEnd>, ErrorReport> {
        let newest = self.newest_tli(commit_lsn);
        if tli == newest {
            return Ok(None);
        }
        let end = self
            .end_by_file(tli, newest)
            .or_else(|| self.end_by_terms(tli, newest));
        match end {
            Some(end) if tli < newest => Ok(Some(end)),
            _ => Err(ErrorReport::new(
                "XX000",
                format!("requested timeline {tli} is not in this server's history"),
            )),
        }
    }

    /// The newest timeline's history file names all its ancestors, those before our log too.
    fn end_by_file(&self, tli: Tli, newest: Tli) -> Option<TimelineEnd> {
        let file = self.timeline_file(newest)?;
        let history = TimelineHistory::parse(newest.0, str::from_utf8(&file.content).ok()?).ok()?;
        let at = history.ancestors.iter().position(|a| a.tli == tli.0)?;
        let next = history.ancestors.get(at + 1).map_or(newest.0, |a| a.tli);
        Some(TimelineEnd {
            end_lsn: history.ancestors[at].end_lsn,
            next_tli: Tli(next),
        })
    }

    fn end_by_terms(&self, tli: Tli, newest: Tli) -> Option<TimelineEnd> {
        let entries = self.state.history.entries();
        entries.iter().find(|entry| entry.tli == tli)?;
        let next = entries
            .iter()
            .find(|entry| entry.tli > tli && entry.tli <= newest)?;
        Some(TimelineEnd {
            end_lsn: next.start_lsn,
            next_tli: next.tli,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safekeeper_protocol::{ClusterIdentity, Term, TermEntry, TermHistory};

    /// Timelines 2 (to 0x100), 5 (to 0x200), 6; the log begins on 2.
    fn view(with_file: bool) -> View {
        let mut state = AcceptorState::unconfigured(ClusterIdentity {
            system_id: 1,
            name: "main".into(),
            pg_major: 15,
            segment_size: 1 << 20,
        });
        let entry = |term, tli, start_lsn| TermEntry {
            term: Term(term),
            tli: Tli(tli),
            start_lsn: Lsn(start_lsn),
        };
        state.history = TermHistory::new(vec![
            entry(1, 2, 0x50),
            entry(3, 2, 0x80),
            entry(4, 5, 0x100),
            entry(5, 6, 0x200),
            entry(6, 6, 0x210),
        ])
        .expect("a history");
        let file = TimelineFile {
            tli: Tli(6),
            content: b"1\t0/20\tx\n2\t0/100\tx\n5\t0/200\tx\n".to_vec(),
        };
        View::new(state, if with_file { vec![file] } else { vec![] })
    }

    #[test]
    fn a_timeline_is_shown_once_a_byte_of_it_is_committed() {
        let view = view(true);
        for (commit_lsn, tli) in [
            (0, 2),
            (0x50, 2),
            (0x100, 2),
            (0x101, 5),
            (0x200, 5),
            (0x201, 6),
            (0x999, 6),
        ] {
            assert_eq!(
                view.newest_tli(Lsn(commit_lsn)),
                Tli(tli),
                "{commit_lsn:#x}"
            );
        }
    }

    #[test]
    fn a_switch_belongs_to_the_newer_timeline() {
        for with_file in [true, false] {
            let view = view(with_file);
            for (lsn, commit_lsn, tli) in [
                (0x50, 0x999, 2),
                (0xFF, 0x999, 2),
                (0x100, 0x999, 5),
                (0x1FF, 0x999, 5),
                (0x200, 0x999, 6),
                (0x300, 0x999, 6),
                (0x200, 0x200, 5),
            ] {
                let found = view.tli_of(Lsn(lsn), Lsn(commit_lsn));
                assert_eq!(found, Tli(tli), "{lsn:#x} at {commit_lsn:#x}, {with_file}");
            }
        }
        assert_eq!(view(true).tli_of(Lsn(0x1F), Lsn(0x999)), Tli(1));
    }

    #[test]
    fn ends_of_timelines_by_cases() {
        let ends = |end_lsn, next_tli| {
            Ok(Some(TimelineEnd {
                end_lsn: Lsn(end_lsn),
                next_tli: Tli(next_tli),
            }))
        };
        for with_file in [true, false] {
            let view = view(with_file);
            let end = |tli, commit_lsn| {
                view.end_of_timeline(Tli(tli), Lsn(commit_lsn))
                    .map_err(|_| ())
            };
            assert_eq!(end(6, 0x999), Ok(None));
            assert_eq!(end(5, 0x999), ends(0x200, 6));
            assert_eq!(end(2, 0x999), ends(0x100, 5));
            assert_eq!(
                end(1, 0x999),
                if with_file { ends(0x20, 2) } else { Err(()) }
            );
            assert_eq!(end(3, 0x999), Err(()));
            assert_eq!(end(7, 0x999), Err(()));
            // Before anything of timeline 6 is committed.
            assert_eq!(end(5, 0x200), Ok(None));
            assert_eq!(end(6, 0x200), Err(()));
        }
    }

    #[test]
    fn a_number_that_was_given_up_has_a_file_that_nobody_follows() {
        for with_file in [true, false] {
            let view = view(with_file);
            let shown = |tli| {
                let file = view.shown_timeline_file(Tli(tli), Tli(6))?.into_owned();
                Some(String::from_utf8(file.content).expect("text"))
            };
            for tli in [3, 4] {
                assert_eq!(shown(tli).as_deref(), Some(GIVEN_UP), "timeline {tli}");
            }
            assert_eq!(shown(1), None);
            assert_eq!(shown(7), None);
            assert_ne!(shown(6).as_deref(), Some(GIVEN_UP));
            assert_ne!(shown(5).as_deref(), Some(GIVEN_UP));
            assert_eq!(view.shown_timeline_file(Tli(4), Tli(2)), None, "not yet");
        }
    }

    #[test]
    fn a_file_that_never_came_is_written_from_the_term_history() {
        let mut view = view(true);
        let text = |view: &View, tli| {
            let file = view.timeline_file(Tli(tli))?.into_owned();
            Some(String::from_utf8(file.content).expect("text"))
        };
        assert_eq!(
            text(&view, 5),
            None,
            "the file before it is missing as well"
        );
        view.timeline_files.push(TimelineFile {
            tli: Tli(2),
            content: b"1\t0/20\tx\n".to_vec(),
        });
        let five = "1\t0/20\tx\n\n2\t0/100\tas the safekeepers know it\n";
        assert_eq!(text(&view, 5).as_deref(), Some(five));
        assert_eq!(text(&view, 2).as_deref(), Some("1\t0/20\tx\n"));
        assert_eq!(text(&view, 3), None);
        assert_eq!(text(&view, 1), None);
    }
}
