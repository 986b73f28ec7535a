//! What a verb answers: text for people, JSON for programs, rows where there are rows, and whether something was found.

use crate::Error;
use serde::Serialize;

/// Whether a report names a divergence or a violation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// Nothing to report.
    Clean,
    /// At least one: exit code 3.
    Found,
}

impl Finding {
    /// `Found` if there is anything in it.
    pub fn of<T>(items: &[T]) -> Self {
        if items.is_empty() { Finding::Clean } else { Finding::Found }
    }
}

/// Format of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Aligned text for people.
    #[default]
    Table,
    /// One JSON document.
    Json,
    /// One JSON document per line.
    Jsonl,
    /// Comma-separated values with a header, for verbs that answer with a list.
    Csv,
}

/// The answer of a verb.
pub trait Report: Serialize {
    /// For people; ends with a line feed unless empty.
    fn text(&self) -> String;

    /// As comma-separated values, if the answer is a list.
    fn csv(&self) -> Option<String>;

    /// Whether a divergence or violation is in it.
    fn finding(&self) -> Finding;
}

/// Renders a report. Errors: [`Error::NoRows`] if CSV is asked of an answer that is not a list.
pub fn render(report: &impl Report, format: Format) -> Result<String, Error> {
    match format {
        Format::Table => Ok(report.text()),
        Format::Json => Ok(serde_json::to_string_pretty(report).map_err(Error::Json)? + "\n"),
        Format::Jsonl => match serde_json::to_value(report).map_err(Error::Json)? {
            serde_json::Value::Array(items) => Ok(items.iter().map(|item| format!("{item}\n")).collect()),
            one @ (serde_json::Value::Null
            | serde_json::Value::Bool(_)
            | serde_json::Value::Number(_)
            | serde_json::Value::String(_)
            | serde_json::Value::Object(_)) => Ok(format!("{one}\n")),
        },
        Format::Csv => report.csv().ok_or(Error::NoRows),
    }
}
