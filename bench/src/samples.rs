//! What was measured: one sample a run, each a few named numbers.
//!
//! Parts of the bench add samples; the report takes medians, and ratios of two setups *within a
//! round*, whose runs were neighbours in time on a disk that has good and bad minutes.

use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

use crate::setups::Kind;

#[derive(Default, Serialize)]
pub struct Samples(Vec<Sample>);

#[derive(Serialize)]
struct Sample {
    part: &'static str,
    /// What differs within a part, such as the number of clients.
    point: String,
    setup: &'static str,
    round: u32,
    values: BTreeMap<&'static str, f64>,
}

/// The middle, and how far the rounds lie apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Samples {
    pub fn add(
        &mut self,
        part: &'static str,
        point: &str,
        kind: Kind,
        round: u32,
        values: Vec<(&'static str, f64)>,
    ) {
        let line: Vec<_> = values.iter().map(|(n, v)| format!("{n} {v:.3}")).collect();
        let setup = kind.name();
        eprintln!("{part} {point} {setup} #{round}: {}", line.join(", "));
        self.0.push(Sample {
            part,
            point: point.to_owned(),
            setup,
            round,
            values: values.into_iter().collect(),
        });
    }

    /// In the order in which they were first measured.
    pub fn points(&self, part: &str) -> Vec<String> {
        let mut seen = BTreeSet::new();
        let points = self.0.iter().filter(|sample| sample.part == part);
        points
            .filter(|sample| seen.insert(&sample.point))
            .map(|sample| sample.point.clone())
            .collect()
    }

    pub fn has(&self, part: &str, kind: Kind) -> bool {
        let setup = kind.name();
        let mut samples = self.0.iter();
        samples.any(|sample| sample.part == part && sample.setup == setup)
    }

    /// One value of a setup over all rounds, if it was measured.
    pub fn spread(&self, part: &str, point: &str, kind: Kind, value: &str) -> Option<Spread> {
        Spread::of(self.by_round(part, point, kind, value).into_values())
    }

    /// The same of the quotient of two setups, round by round.
    pub fn ratio(
        &self,
        part: &str,
        point: &str,
        (over, under): (Kind, Kind),
        value: &str,
    ) -> Option<Spread> {
        let over = self.by_round(part, point, over, value);
        let under = self.by_round(part, point, under, value);
        let both = over
            .iter()
            .filter_map(|(round, over)| Some(over / under.get(round)?));
        Spread::of(both)
    }

    /// The same of any question to the samples of one setup and round.
    fn by_round(&self, part: &str, point: &str, kind: Kind, value: &str) -> BTreeMap<u32, f64> {
        let setup = kind.name();
        let of_it = self
            .0
            .iter()
            .filter(|sample| sample.part == part && sample.point == point && sample.setup == setup);
        of_it
            .filter_map(|sample| Some((sample.round, *sample.values.get(value)?)))
            .collect()
    }
}

impl Spread {
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let mut values: Vec<_> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Spread { median, min, max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_within_a_round() {
        let mut samples = Samples::default();
        for (round, factor) in [(0, 1.0), (1, 10.0), (2, 0.1)] {
            samples.add("p", "x", Kind::Ours, round, vec![("tps", 3.0 * factor)]);
            samples.add("p", "x", Kind::Stock, round, vec![("tps", 2.0 * factor)]);
        }
        // A round without its counterpart counts for nothing.
        samples.add("p", "x", Kind::Ours, 3, vec![("tps", 1e9)]);
        let ratio = samples.ratio("p", "x", (Kind::Ours, Kind::Stock), "tps");
        let ratio = ratio.unwrap();
        for value in [ratio.median, ratio.min, ratio.max] {
            assert!((value - 1.5).abs() < 1e-9, "{ratio:?}");
        }
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        let spread = Spread::of([4.0, 1.0, 2.0, 3.0]).unwrap();
        assert!((spread.median - 2.5).abs() < 1e-9);
        assert_eq!(Spread::of([]), None);
    }
}
