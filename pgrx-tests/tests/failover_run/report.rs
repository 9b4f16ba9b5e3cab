//! The figures of a run.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use cluster_tests::ledger::Acknowledged;

use crate::fault::Fault;
use crate::rejoin::Way;

#[derive(Default)]
pub struct Report {
    cycles: BTreeMap<Fault, usize>,
    /// From the fault to the first commit that the promoted standby acknowledged.
    gaps: BTreeMap<Fault, Vec<Duration>>,
    ways: BTreeMap<(Fault, &'static str), usize>,
    reasons: Vec<String>,
    acknowledged: usize,
    shown: usize,
    longest_gap: Duration,
}

impl Report {
    pub fn cycle(&mut self, fault: Fault) {
        *self.cycles.entry(fault).or_default() += 1;
    }

    pub fn failed_over(&mut self, fault: Fault, gap: Duration) {
        self.gaps.entry(fault).or_default().push(gap);
    }

    pub fn rejoined(&mut self, fault: Fault, way: Way) {
        let name = match way {
            Way::AsItIs => "as it was",
            Way::Rewound => "by pg_rewind",
            Way::BaseBackup(why) => {
                self.reasons.push(why);
                "by a base backup"
            }
        };
        *self.ways.entry((fault, name)).or_default() += 1;
    }

    pub fn acknowledged(&mut self, all: &Acknowledged, shown: usize) {
        self.acknowledged = all.count();
        self.longest_gap = all.longest_gap();
        self.shown = shown;
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |what: &str, value: String| writeln!(f, "| {what:<58} | {value:>24} |");
        row("cycles", self.cycles.values().sum::<usize>().to_string())?;
        for (fault, count) in &self.cycles {
            row(&format!("  {fault:?}"), count.to_string())?;
        }
        row("acknowledged commits", self.acknowledged.to_string())?;
        // One that was lost would have ended the run.
        row("  of them lost", "0".to_owned())?;
        row(
            "rows shown to readers on both hosts",
            self.shown.to_string(),
        )?;
        row("  of them lost", "0".to_owned())?;
        row("longest time without a commit, ms", ms(self.longest_gap))?;
        for (fault, gaps) in &self.gaps {
            let what = match fault {
                Fault::Kill => "kill -9 of the primary to the first commit on the standby".into(),
                fault => format!("{fault:?} to the first commit on the standby"),
            };
            row(&what, format!("({} times)", gaps.len()))?;
            let mut sorted = gaps.clone();
            sorted.sort_unstable();
            let at = |percent: usize| ms(sorted[(sorted.len() - 1) * percent / 100]);
            let quantiles = format!("{} / {} / {}", at(50), at(90), at(100));
            row("  median / 90 % / longest, ms", quantiles)?;
        }
        for ((fault, way), count) in &self.ways {
            let what = format!("old primary rejoined {way} after {fault:?}");
            row(&what, count.to_string())?;
        }
        for why in &self.reasons {
            writeln!(f, "base backup because: {why}")?;
        }
        Ok(())
    }
}

fn ms(duration: Duration) -> String {
    duration.as_millis().to_string()
}
