//! `audit`: reports of whole operations, from the record that opened them to the one that closed them.

pub mod failover;
pub mod reshard;

use valkeeper_core::ids::Seq;

/// A line of a report: what it is about, and what is said of it.
type Figure = (&'static str, String);

/// Whether every invariant held, or each record that breaks one.
fn invariants(violations: &[(Seq, String)]) -> Vec<Figure> {
    if violations.is_empty() {
        return vec![("invariants", "hold".to_owned())];
    }
    violations.iter().map(|(seq, text)| ("VIOLATION", format!("record {seq}: {text}"))).collect()
}

fn told(figures: Vec<Figure>) -> String {
    figures.into_iter().map(|(name, value)| format!("  {name:<10}  {value}\n")).collect()
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}
