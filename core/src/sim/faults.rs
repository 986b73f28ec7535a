//! Faults of the operator itself, one per run of a story: the battery goes through all of them.

use super::world::World;
use crate::{
    agent::Brief,
    effect::{Effect, Outcome},
    ids::Seq,
};

/// What goes wrong in a run, at most once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Perturbation {
    /// Nothing.
    #[default]
    None,
    /// The operator dies right after the write that holds this record, before any effect.
    CrashAfter(Seq),
    /// The operator dies after the effects of this decision, before their outcomes are recorded.
    LoseOutcome(Seq),
    /// The n-th effect of the run fails without being done.
    FailEffect(usize),
    /// The n-th effect of the run is done, but its answer is lost: it counts as failed.
    DoneButFailed(usize),
    /// The n-th effect of the run is done twice.
    RepeatEffect(usize),
    /// Already happened.
    Spent,
}

impl Perturbation {
    /// Takes a due crash.
    pub fn take_crash(&mut self, head: Seq) -> bool {
        let due = matches!(self, Perturbation::CrashAfter(seq) if *seq <= head);
        if due {
            *self = Perturbation::Spent;
        }
        due
    }

    /// Takes a due loss of outcome.
    pub fn loses_outcome(&mut self, decision: Seq) -> bool {
        let due = matches!(self, Perturbation::LoseOutcome(seq) if *seq == decision);
        if due {
            *self = Perturbation::Spent;
        }
        due
    }

    /// Executes one effect, or not, or twice.
    pub fn apply(&mut self, world: &mut World, effect: &Effect, terms: &Brief) -> Outcome {
        let due = match self {
            Perturbation::FailEffect(n) | Perturbation::DoneButFailed(n) | Perturbation::RepeatEffect(n) => {
                let due = *n == 0;
                *n = n.saturating_sub(1);
                due
            }
            Perturbation::None
            | Perturbation::CrashAfter(_)
            | Perturbation::LoseOutcome(_)
            | Perturbation::Spent => false,
        };
        if !due {
            return world.execute(effect, terms);
        }
        match std::mem::replace(self, Perturbation::Spent) {
            Perturbation::FailEffect(_) => Outcome::Failed("injected".into()),
            Perturbation::DoneButFailed(_) => {
                world.execute(effect, terms);
                Outcome::Failed("injected: the answer was lost".into())
            }
            Perturbation::RepeatEffect(_) => {
                let first = world.execute(effect, terms);
                world.execute(effect, terms);
                first
            }
            Perturbation::None
            | Perturbation::CrashAfter(_)
            | Perturbation::LoseOutcome(_)
            | Perturbation::Spent => world.execute(effect, terms),
        }
    }
}
