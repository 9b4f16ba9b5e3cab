//! What is asked for, from the environment: `scripts/bench` explains each.
//!
//! A value that can't be understood ends the program: a bench that measures something else than it
//! was asked for is worse than none.

use std::env;
use std::fmt::Display;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::hosts::{self, Point};
use crate::setups::Kind;

pub struct Options {
    /// Where tables, plot and samples go.
    pub out: PathBuf,
    /// `None`: all parts.
    only: Option<Vec<Part>>,
    pub setups: Vec<Kind>,
    /// Of small transactions on one machine. See [`Options::few_rounds`].
    pub rounds: u32,
    /// Length of what is measured in one run of pgbench.
    pub time: Duration,
    pub clients: Vec<u32>,
    /// Of emulated hosts.
    pub points: Vec<Point>,
    /// Half of the processors are the emulated primary's alone.
    pub own_processors: bool,
    pub scale: u32,
    pub bulk_megabytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Clients,
    Bulk,
    Slow,
    Hosts,
    CatchUp,
    FanOut,
}

impl Options {
    pub fn from_environment() -> Options {
        let is_on = |name| variable(name).is_some_and(|value| value != "0");
        let quick = is_on("QUICK");
        let (rounds, seconds, megabytes) = if quick { (1, 3, 256) } else { (9, 4, 512) };
        Options {
            out: variable("OUT").map_or_else(|| PathBuf::from("target/bench"), PathBuf::from),
            only: list("ONLY"),
            setups: list("SETUPS").unwrap_or_else(|| vec![Kind::Local, Kind::Stock, Kind::Ours]),
            rounds: number("ROUNDS").unwrap_or(rounds),
            time: Duration::from_secs(number("SECONDS_EACH").unwrap_or(seconds)),
            clients: list("CLIENTS").unwrap_or_else(|| vec![1, 8, 32]),
            points: list("POINTS").unwrap_or_else(|| {
                let few = if quick { 2 } else { hosts::POINTS.len() };
                hosts::POINTS[..few].to_vec()
            }),
            own_processors: is_on("OWN_PROCESSORS"),
            scale: number("SCALE").unwrap_or(10),
            bulk_megabytes: number("BULK_MB").unwrap_or(megabytes),
        }
    }

    pub fn wants(&self, part: Part) -> bool {
        self.only.as_ref().is_none_or(|only| only.contains(&part))
    }

    /// Where a round takes long, or lies close to the next.
    pub fn few_rounds(&self, most: u32) -> u32 {
        self.rounds.min(most)
    }

    /// Those that were asked for, in an order that differs from round to round: a disk is slower
    /// after a burst of writes, and nobody shall always come after the same one.
    pub fn order(&self, round: u32) -> Vec<Kind> {
        let mut order = self.setups.clone();
        let len = order.len();
        order.rotate_left(round as usize % len);
        // Rotation alone keeps the neighbours.
        if round as usize / len % 2 == 1 {
            order.reverse();
        }
        order
    }
}

impl FromStr for Part {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Part, Self::Err> {
        Ok(match name {
            "clients" => Part::Clients,
            "bulk" => Part::Bulk,
            "slow" => Part::Slow,
            "hosts" => Part::Hosts,
            "catchup" => Part::CatchUp,
            "fanout" => Part::FanOut,
            _ => return Err("one of clients, bulk, slow, hosts, catchup, fanout"),
        })
    }
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn number<T: FromStr>(name: &str) -> Option<T>
where
    T::Err: Display,
{
    variable(name).map(|text| parsed(name, &text))
}

fn list<T: FromStr>(name: &str) -> Option<Vec<T>>
where
    T::Err: Display,
{
    variable(name).map(|text| {
        text.split([',', ' '])
            .map(|word| parsed(name, word))
            .collect()
    })
}

fn parsed<T: FromStr>(name: &str, text: &str) -> T
where
    T::Err: Display,
{
    text.parse()
        .unwrap_or_else(|error| panic!("{name}: {text:?}: {error}"))
}
