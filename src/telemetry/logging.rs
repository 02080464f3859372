//! Logging to standard error, as text or JSON, with a filter that can be changed while the daemon runs.
//!
//! What callers must not log: file contents, tensor data, credentials. Paths and digests are fine.

use std::io::IsTerminal;

use thiserror::Error;
use tracing::Subscriber;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use crate::config::{Log, LogFormat, level};
use crate::error::{Code, Error};

/// Why logging could not be set up or changed.
#[derive(Debug, Error)]
pub enum LoggingError {
    /// The filter does not parse.
    #[error("the log level `{text}` is not valid ({reason}); allowed: {allowed}", allowed = level::ALLOWED)]
    Level {
        /// The filter.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Logging was set up before, or its filter is gone.
    #[error("logging cannot be set up: {0}")]
    SetUp(String),
}

impl From<LoggingError> for Error {
    fn from(error: LoggingError) -> Self {
        let code = match error {
            LoggingError::Level { .. } => Code::ConfigInvalid,
            LoggingError::SetUp(_) => Code::Internal,
        };
        Error::new(code, error.to_string())
    }
}

/// Changes the filter of the running log.
#[derive(Debug, Clone)]
pub struct LogControl {
    filter: reload::Handle<EnvFilter, Registry>,
}

impl LogControl {
    /// Replaces the filter (`info`, `info,lodestream::tier=debug`). On an error the old one stays.
    pub fn set_level(&self, text: &str) -> Result<(), LoggingError> {
        let filter = parse(text)?;
        self.filter.reload(filter).map_err(|error| LoggingError::SetUp(error.to_string()))
    }
}

/// Sets up the log of the process, once, to standard error.
pub fn init(log: &Log) -> Result<LogControl, LoggingError> {
    let colour = std::io::stderr().is_terminal();
    let (subscriber, control) = subscriber(log, std::io::stderr, colour)?;
    subscriber.try_init().map_err(|error| LoggingError::SetUp(error.to_string()))?;
    Ok(control)
}

/// A subscriber that writes to `writer`, and the control of its filter.
fn subscriber<W>(
    log: &Log,
    writer: W,
    colour: bool,
) -> Result<(impl Subscriber + Send + Sync + use<W>, LogControl), LoggingError>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let (filter, handle) = reload::Layer::new(parse(&log.level)?);
    let subscriber = Registry::default().with(filter).with(form(log.format, writer, colour));
    Ok((subscriber, LogControl { filter: handle }))
}

fn form<S, W>(format: LogFormat, writer: W, colour: bool) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'s> LookupSpan<'s>,
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    match format {
        LogFormat::Text => fmt::layer().with_writer(writer).with_ansi(colour).boxed(),
        // Spans are flattened into one object: the request's and the job's id stand beside the message.
        LogFormat::Json => {
            fmt::layer().json().flatten_event(true).with_current_span(false).with_writer(writer).boxed()
        }
    }
}

fn parse(text: &str) -> Result<EnvFilter, LoggingError> {
    level::parse(text).map_err(|reason| LoggingError::Level { text: text.to_owned(), reason })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl Captured {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn log_with(
        format: LogFormat,
        level: &str,
    ) -> (impl Subscriber + Send + Sync + use<>, LogControl, Captured) {
        let captured = Captured::default();
        let writer = captured.clone();
        let log = Log { format, level: level.to_owned() };
        let (subscriber, control) = subscriber(&log, move || writer.clone(), false).unwrap();
        (subscriber, control, captured)
    }

    #[test]
    fn the_level_changes_while_running_and_a_bad_one_changes_nothing() {
        let (subscriber, control, captured) = log_with(LogFormat::Text, "info");
        tracing::subscriber::with_default(subscriber, || {
            tracing::debug!("first");
            control.set_level("debug").unwrap();
            tracing::debug!("second");
            assert!(matches!(control.set_level("degub"), Err(LoggingError::Level { .. })));
            tracing::debug!("third");
        });
        let text = captured.text();
        assert!(!text.contains("first") && text.contains("second") && text.contains("third"), "{text}");
    }

    #[test]
    fn json_is_one_object_a_line_with_the_ids_of_the_spans() {
        let (subscriber, _control, captured) = log_with(LogFormat::Json, "info");
        tracing::subscriber::with_default(subscriber, || {
            let _request = tracing::info_span!("request", request = "c1-7").entered();
            tracing::info!(bytes = 5, "line\nbreak");
        });
        let text = captured.text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 1, "{text}");
        let object: serde_json::Value = serde_json::from_str(lines[0]).unwrap();
        assert_eq!(object["message"], "line\nbreak");
        assert_eq!(object["bytes"], 5);
        assert_eq!(object["spans"][0]["request"], "c1-7");
    }

    #[test]
    fn a_bad_level_is_a_configuration_error() {
        let log = Log { format: LogFormat::Text, level: "loud".to_owned() };
        let error = subscriber(&log, std::io::stderr, false).err().unwrap();
        let error = Error::from(error);
        assert_eq!(error.code, Code::ConfigInvalid);
        assert!(error.message.contains("loud") && error.message.contains("info"), "{error}");
    }
}
