//! How many descriptors the process may have, and whether the settings fit in.
//!
//! ```text
//!   max_connections * PER_CONNECTION + strangers * PER_STRANGER + http::CONNECTIONS_MAX + RESERVE
//!       <=  RLIMIT_NOFILE
//! ```
//!
//! A safekeeper that runs out of descriptors can't open its next segment, and commits wait. So the
//! limit is raised as far as it goes when the daemon starts, and settings that could still use it
//! up are refused then, not at the peak of load.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::ConfigError;
use crate::http;
use crate::server::STRANGERS_MAX;

/// A consumer's connection: its socket, the copy by which it is shut down, the eventfd that wakes
/// its sender, and the segment being read. A proposer's has the same without the eventfd.
const PER_CONNECTION: u64 = 4;

/// One that has not shown who it is: its socket and the copy.
const PER_STRANGER: u64 = 2;

/// Standard streams, listeners, signals, the runtime, the lock of the data directory; and for each
/// of a few clusters the segment being written, the one being made, and the control file.
const RESERVE: u64 = 64;

/// Raises the soft limit to the hard one, and returns what holds now; none if there is no limit.
pub fn raise_limit() -> Option<u64> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return limit.current;
    }
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(error) => {
            log::warn!("could not raise the limit of open files ({error})");
            limit.current
        }
    }
}

/// Whether so many connections can be served within `limit`.
pub fn check(max_connections: usize, limit: Option<u64>) -> Result<(), ConfigError> {
    let Some(limit) = limit else {
        return Ok(());
    };
    let strangers = 2 * STRANGERS_MAX as u64 * PER_STRANGER;
    let reserve = RESERVE + strangers + http::CONNECTIONS_MAX as u64;
    let possible = limit.saturating_sub(reserve) / PER_CONNECTION;
    if max_connections as u64 <= possible {
        return Ok(());
    }
    Err(ConfigError::new(format!(
        "max_connections: {max_connections} connections do not fit into the limit of {limit} open \
         files (each takes {PER_CONNECTION}, and {reserve} are kept for the rest): set it to at \
         most {possible}, or raise the limit (ulimit -n, LimitNOFILE)"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_fit_or_are_refused_with_the_number_that_would() {
        let strangers = 2 * STRANGERS_MAX as u64 * PER_STRANGER;
        let reserve = RESERVE + strangers + http::CONNECTIONS_MAX as u64;
        for (max_connections, limit, fits) in [
            (100, Some(1024), true),
            (100, Some(reserve + 400), true),
            (100, Some(reserve + 399), false),
            (1, Some(10), false),
            (1000, Some(1024), false),
            (usize::MAX, None, true),
        ] {
            let checked = check(max_connections, limit);
            assert_eq!(checked.is_ok(), fits, "{max_connections} {limit:?}");
        }
        let error = check(1000, Some(1024)).expect_err("refused").to_string();
        assert!(error.contains("max_connections: 1000"), "{error}");
        assert!(error.contains("at most 182"), "{error}");
    }

    #[test]
    fn the_soft_limit_is_raised_to_the_hard_one() {
        assert_eq!(raise_limit(), getrlimit(Resource::Nofile).maximum);
        assert_eq!(
            getrlimit(Resource::Nofile).current,
            getrlimit(Resource::Nofile).maximum
        );
    }
}
