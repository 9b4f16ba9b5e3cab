//! Log lines on stderr, one an event, as text or as JSON.
//!
//! ```text
//!   2026-01-31T12:00:00.123Z INFO  voted cluster=main term=4
//!   {"ts":"2026-01-31T12:00:00.123Z","level":"info","message":"voted cluster=main term=4"}
//! ```
//!
//! The hosts of state machines log, the machines don't; and an error is logged where it is handled,
//! never where it is passed on. Nothing at info repeats per transaction.

use std::io::Write;

use log::LevelFilter;
use serde::Deserialize;

/// Form of the lines.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, serde::Serialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// Send the log of this process to stderr. Called once, by `main`.
pub fn start(format: LogFormat, level: LevelFilter) {
    env_logger::Builder::new()
        // What the libraries of the control plane have to say is for their authors.
        .filter_level(LevelFilter::Warn)
        .filter_module("safekeeper", level)
        .format(move |out, record| {
            let time = out.timestamp_millis();
            match format {
                LogFormat::Text => writeln!(
                    out,
                    "{time} {:<5} {}",
                    record.level(),
                    OneLine(record.args())
                ),
                LogFormat::Json => writeln!(
                    out,
                    "{}",
                    serde_json::json!({
                        "ts": time.to_string(),
                        "level": record.level().as_str().to_ascii_lowercase(),
                        "message": record.args().to_string(),
                    })
                ),
            }
        })
        .init();
}

/// Text in which a peer's line feed can't begin a line that we did not write.
struct OneLine<'a, 'b>(&'a std::fmt::Arguments<'b>);

impl std::fmt::Display for OneLine<'_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = self.0.to_string();
        for c in text.chars() {
            match c {
                '\n' => f.write_str("\\n")?,
                c if c.is_control() => write!(f, "\\x{:02x}", u32::from(c))?,
                c => write!(f, "{c}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_cannot_forge_a_line() {
        let name = "standby\n2026 ERROR all is lost\x1b[2J";
        assert_eq!(
            OneLine(&format_args!("{name}")).to_string(),
            "standby\\n2026 ERROR all is lost\\x1b[2J"
        );
    }
}
