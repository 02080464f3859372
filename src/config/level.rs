//! The log filter, checked more strictly than `tracing-subscriber` does.
//!
//! `EnvFilter` takes a misspelt level (`inof`) for the name of a target: it would silently turn every other line
//! off. Here a word without `=` must be a level.

use tracing_subscriber::EnvFilter;

/// What is allowed, for error messages.
pub const ALLOWED: &str =
    "off, error, warn, info, debug or trace, or a list such as `info,lodestream::tier=debug`";

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// The filter of a text such as `info` or `info,lodestream=debug`; else what is wrong with it.
pub fn parse(text: &str) -> Result<EnvFilter, String> {
    for directive in text.split(',') {
        let directive = directive.trim();
        let level = directive.rsplit_once('=').map_or(directive, |(_, level)| level);
        if !LEVELS.contains(&level.to_ascii_lowercase().as_str()) {
            return Err(format!("`{directive}` has no level"));
        }
    }
    EnvFilter::try_new(text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn takes_levels_and_targets() {
        for text in
            ["info", "WARN", "info,lodestream=debug", "lodestream::tier=trace,off", "a[span{x=1}]=debug"]
        {
            assert!(parse(text).is_ok(), "{text}: {:?}", parse(text).err());
        }
    }

    #[test]
    fn refuses_what_would_silence_the_log() {
        for text in ["", "inof", "info,", "lodestream", "lodestream=verbose", "=", "[=info"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
