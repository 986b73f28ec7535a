//! Words of the user that were served, or refused for good: each is one request, and must not come true once
//! more.

use super::ClusterState;
use crate::{
    decision::{Decision, OperationKind, Reason, StepName},
    observation::ObjectFacts,
    spec::{Profile, Verb},
};

/// Words that are remembered for each verb, the latest. A wish that nobody has taken back is among them, as
/// only words that the resource has are spent; whoever comes back to one from before sixteen others means it.
/// Count.
pub const SPENT_MAX: usize = 16;

impl ClusterState {
    /// True if the word was served, or refused for good. What it says elsewhere does not count.
    pub fn is_spent(&self, verb: Verb, word: &str) -> bool {
        let known = self.spent.get(&verb).is_some_and(|words| words.iter().any(|known| known == word));
        known || self.spent_tokens.contains(word)
    }

    /// Remembers a word, the latest last; the oldest go.
    pub(super) fn spend(&mut self, verb: Verb, word: &str) {
        let words = self.spent.entry(verb).or_default();
        words.retain(|known| known != word);
        words.push(word.to_owned());
        let surplus = words.len().saturating_sub(SPENT_MAX);
        words.drain(..surplus);
    }

    /// Words that an earlier build remembered of all verbs together, and of its own. Those that the resource
    /// still has must not come true by being read anew; nobody knows what they were said for.
    pub(super) fn sort_spent_words(&mut self) {
        let legacy = std::mem::take(&mut self.spent_tokens);
        for (verb, word) in self.wishes().into_iter().filter(|(_, word)| legacy.contains(word)) {
            self.spend(verb, &word);
        }
    }

    /// A rollout has ended. The user's word by which members were restarted that kept their data in memory alone was for this revision of every
    /// shard, and for nothing later.
    pub(super) fn note_rolled(&mut self) {
        let Some(spec) = self.spec.as_ref().filter(|spec| spec.volatile && spec.replicas_per_shard == 0)
        else {
            return;
        };
        let Some(word) = spec.confirm_blank.clone() else { return };
        let rolls = |facts: &ObjectFacts| {
            let (wanted, live) = (facts.wanted_revision.as_ref()?, facts.live.present()?);
            let members = self.members_of(facts.shard?).filter_map(|(_, member)| member.facts.pod.present());
            let old = members.filter(|pod| pod.revision != *wanted).count();
            (live.revision.as_ref() != Some(wanted) || old > 0).then_some(())
        };
        if !self.objects.values().any(|facts| rolls(facts).is_some()) {
            self.spend(Verb::ConfirmBlank, &word);
        }
    }

    /// What the resource asks for.
    fn wishes(&self) -> Vec<(Verb, String)> {
        let Some(spec) = &self.spec else { return Vec::new() };
        let switchover = spec.switchover.as_ref().map(|wish| (Verb::Switchover, wish.token.clone()));
        let blank = spec.confirm_blank.clone().map(|word| (Verb::ConfirmBlank, word));
        let rebalance = spec.rebalance.clone().map(|word| (Verb::Rebalance, word));
        [switchover, blank, rebalance].into_iter().flatten().collect()
    }

    /// The user's word by which a decision of an operation is made, if there is one.
    pub(super) fn word_of(
        &self,
        kind: OperationKind,
        decision: &Decision,
        asked_by: &str,
    ) -> Option<(Verb, String)> {
        let spec = self.spec.as_ref()?;
        match kind {
            OperationKind::Switchover => {
                let wish = spec.switchover.as_ref().filter(|wish| wish.token == asked_by)?;
                Some((Verb::Switchover, wish.token.clone()))
            }
            OperationKind::Failover => {
                // Earlier builds called it a first beginning.
                let before = decision.reason == Reason::Bootstrap && decision.step == StepName::Failover;
                let anew = before || decision.reason == Reason::DataLost;
                let word =
                    spec.confirm_blank.as_ref().filter(|_| anew && spec.profile == Profile::Durable)?;
                Some((Verb::ConfirmBlank, word.clone()))
            }
            OperationKind::Rollout | OperationKind::Reshard => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        event::{Event, Record},
        ids::{Seq, Timestamp, WriterEpoch},
    };

    #[test]
    fn words_that_an_earlier_build_spent_do_not_come_true_and_its_own_are_forgotten() {
        let mut fold = serde_json::to_value(ClusterState::default()).unwrap();
        fold["spent_tokens"] = serde_json::json!(["0-1@monday", "operator", "yes"]);
        fold["spec"] = serde_json::json!({
            "generation": 1, "topology": "Replication", "shards": 1, "replicas_per_shard": 1, "profile": "Durable",
            "failover": { "mode": "Automatic", "detection_window_ms": 3000 },
            "switchover": { "to": "0-1", "token": "0-1@monday" }, "confirm_blank": "tuesday",
        });
        let mut state: ClusterState = serde_json::from_value(fold).unwrap();
        assert!(state.is_spent(Verb::Switchover, "0-1@monday") && state.is_spent(Verb::ConfirmBlank, "yes"));
        let event = Event::EpochStarted { writer: "w".into(), version: "v".into(), lost_through: None };
        state.apply(&Record { seq: Seq(2), epoch: WriterEpoch(2), time: Timestamp(0), event });
        assert!(state.is_spent(Verb::Switchover, "0-1@monday"));
        assert!(!state.is_spent(Verb::ConfirmBlank, "0-1@monday"), "it was said for the other");
        assert!(!state.is_spent(Verb::ConfirmBlank, "tuesday") && state.spent_tokens.is_empty());
    }

    #[test]
    fn the_oldest_words_of_a_verb_go_and_those_of_the_others_stay() {
        let mut state = ClusterState::default();
        state.spend(Verb::ConfirmBlank, "0");
        for n in 0..=SPENT_MAX {
            state.spend(Verb::Switchover, &n.to_string());
        }
        state.spend(Verb::Switchover, "5");
        assert!(!state.is_spent(Verb::Switchover, "0") && state.is_spent(Verb::ConfirmBlank, "0"));
        assert!(state.is_spent(Verb::Switchover, "1") && !state.is_spent(Verb::Rebalance, "1"));
        state.spend(Verb::Switchover, "again");
        state.spend(Verb::Switchover, "and again");
        assert!(state.is_spent(Verb::Switchover, "5"), "it was said last but two");
        assert_eq!(state.spent.get(&Verb::Switchover).map(Vec::len), Some(SPENT_MAX));
    }
}
