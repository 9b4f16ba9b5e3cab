//! The demand that broken rules are noticed, for each test program that can notice.
//!
//! [`unnoticed`] takes away one rule after the other and asks the program whether it finds out. It
//! prints a line of the table for each, and returns those that this program answers for
//! (`Mutation::caught_by`) and has not noticed. `MUTATION=VoteNotDurable` asks for that one alone, `EVERY=1` for
//! those too that others answer for alone.
//!
//! A panic is how most of them are found: those are kept quiet, so that the table can be read.

use std::time::Instant;

use safekeeper_protocol::mutation::{Catcher, Mutation, switch_on};

pub enum Verdict {
    /// After so many seeds or states; the invariant that was violated.
    Caught {
        after: u64,
        by: String,
    },
    Missed {
        after: u64,
    },
    /// The program has no part that this rule is about.
    MeansNothingHere,
}

pub fn unnoticed(
    catcher: Catcher,
    unit: &str,
    find: impl Fn(Mutation) -> Verdict,
) -> Vec<Mutation> {
    let only = std::env::var("MUTATION").ok();
    let every = std::env::var_os("EVERY").is_some() || only.is_some();
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let mut missed = Vec::new();
    for mutation in Mutation::ALL {
        let name = format!("{mutation:?}");
        let is_ours = mutation.caught_by().contains(&catcher);
        if only.as_ref().is_some_and(|only| *only != name) || !is_ours && !every {
            continue;
        }
        let begun = Instant::now();
        switch_on(Some(mutation));
        let verdict = find(mutation);
        switch_on(None);
        let (after, by) = match verdict {
            Verdict::Caught { after, by } => (after, by),
            Verdict::Missed { after } => {
                if is_ours {
                    missed.push(mutation);
                }
                (after, "NOT CAUGHT".to_owned())
            }
            Verdict::MeansNothingHere => continue,
        };
        let seconds = begun.elapsed().as_secs_f64();
        let layer = format!("{catcher:?}").to_lowercase();
        println!("| {name:<29} | {layer:<10} | {after:>9} {unit:<9} | {seconds:>6.1} s | {by}");
    }
    std::panic::set_hook(usual);
    missed
}
