//! What every benchmark gives: a table, plots, the machine, and all figures for machines.

use serde::Serialize;
use serde_json::Value;

use super::super::output::{self, Column};
use super::plot::Plot;
use crate::measure::rounds::Summary;

/// The result of one benchmark.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// `load`, `attach`, `drive` or `memory`.
    pub(super) bench: &'static str,
    /// Name and version of the program.
    pub(super) version: &'static str,
    /// What was found, in one sentence.
    pub(super) found: String,
    /// The machine, as pairs of what and how.
    pub(super) machine: Vec<(String, String)>,
    #[serde(skip)]
    pub(super) table: Table,
    #[serde(skip)]
    pub(super) plots: Vec<Plot>,
    /// How it was measured, and what to keep in mind.
    pub(super) notes: Vec<String>,
    /// Every figure of every round.
    pub(super) figures: Value,
}

/// Name and version, as reports give them.
pub(super) const VERSION: &str = concat!("lodestream ", env!("CARGO_PKG_VERSION"));

/// Rows below a head.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) columns: &'static [Column],
    pub(super) rows: Vec<Vec<String>>,
}

impl Report {
    /// The table, what was found, and the notes.
    pub(super) fn text(&self) -> String {
        let mut text = output::table(self.table.columns, self.table.rows.clone());
        text.push_str(&format!("\n{}\n", self.found));
        for note in &self.notes {
            text.push_str(&format!("- {note}\n"));
        }
        text
    }
}

/// `0.912 (0.843–0.955)`: the median, and between what the values lie.
pub(super) fn spread(summary: Option<Summary>, digits: usize) -> String {
    summary.map_or_else(
        || "-".to_owned(),
        |Summary { median, least, most, .. }| format!("{median:.digits$} ({least:.digits$}–{most:.digits$})"),
    )
}

/// Bytes per second as GiB/s.
pub(super) fn gib(bytes: f64) -> f64 {
    bytes / (1u64 << 30) as f64
}
