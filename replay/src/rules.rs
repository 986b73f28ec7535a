//! The rules of the core as replay uses them, and policies that are wrong on purpose: a test that `diverge` finds
//! nothing proves something only if a mutated policy is found.

use crate::history::History;
use valkeeper_core::{
    decide::decide,
    decision::Verdict,
    ids::{Seq, Timestamp},
    invariant::check_from,
    observation::{Evidence, Reading},
    spec::FailoverMode,
    state::ClusterState,
};

/// Which policy decides again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Policy {
    /// The policy of this program's version.
    #[default]
    Today,
    /// Offsets are judged upside down: the replica furthest behind looks best.
    PreferLowestOffset,
    /// A silent primary is given no time.
    IgnoreWindow,
    /// The operator never promotes by itself.
    NeverFailOver,
}

impl Policy {
    /// Name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Today => "today",
            Policy::PreferLowestOffset => "prefer-lowest-offset",
            Policy::IgnoreWindow => "ignore-window",
            Policy::NeverFailOver => "never-fail-over",
        }
    }

    /// Decides by this policy.
    pub fn decide(self, state: &ClusterState, evidence: &Evidence, now: Timestamp) -> Verdict {
        match self {
            Policy::Today => decide(state, evidence, now),
            Policy::PreferLowestOffset => decide(state, &upside_down(evidence), now),
            Policy::IgnoreWindow => {
                let mut state = state.clone();
                if let Some(spec) = &mut state.spec {
                    spec.failover.detection_window_ms = 0;
                }
                decide(&state, evidence, now)
            }
            Policy::NeverFailOver => {
                let mut state = state.clone();
                if let Some(spec) = &mut state.spec {
                    spec.failover.mode = FailoverMode::Manual;
                }
                decide(&state, evidence, now)
            }
        }
    }
}

/// The same readings with the highest offset exchanged for the lowest, and so on between them.
fn upside_down(evidence: &Evidence) -> Evidence {
    let offsets = || evidence.readings.values().map(|r| r.offset);
    let sum = offsets().min().unwrap_or(0).saturating_add(offsets().max().unwrap_or(0));
    let mirrored = |r: &Reading| Reading { offset: sum.saturating_sub(r.offset), ..r.clone() };
    let readings = evidence.readings.iter().map(|(id, r)| (*id, mirrored(r))).collect();
    Evidence { readings, last_answers: evidence.last_answers.clone() }
}

/// Invariants of the journal that the records break, as (sequence, text).
pub fn violations(history: &History) -> Vec<(Seq, String)> {
    check_from(history.start().clone(), history.records()).into_iter().map(|v| (v.seq, v.text)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::story;

    #[test]
    fn upside_down_makes_the_last_the_first_and_keeps_the_range() {
        let turned = upside_down(&story::readings(0, &[(0, 900), (1, 1200), (2, 1180)]));
        let offsets: Vec<i64> = turned.readings.values().map(|r| r.offset).collect();
        assert_eq!(offsets, [1200, 900, 920]);
        assert_eq!(upside_down(&Evidence::default()), Evidence::default());
    }
}
