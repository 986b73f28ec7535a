//! What is folded of effects that ended: what was done is so until it is seen otherwise, and what failed is counted.

use super::{ClusterState, MemberFacts, MemberState, Pending, migration_key};
use crate::{
    decision::Scope,
    effect::{Effect, Means, Outcome},
    ids::{Digest, MemberId, Timestamp},
    observation::{Executed, Link, Observed, ServerRole, Source},
    words,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Settings that a server has refused by its own word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingsRefused {
    /// Which.
    pub settings: Digest,
    /// In these words, the last time.
    pub words: String,
    /// How often.
    pub count: u32,
}

/// What fails again and again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failing {
    /// The key of [`failure_key`]: of the same kind, and about the same.
    pub key: String,
    /// The effect, as it reads.
    pub effect: String,
    /// When it failed first since it last succeeded.
    pub since: Timestamp,
    /// How often since then.
    pub count: u32,
    /// What was said the last time.
    pub words: String,
}

impl ClusterState {
    /// Keeps what fails for those who look at the resource: in each scope the last one.
    fn note_failing(&mut self, scope: Scope, effect: &Effect, at: Timestamp, outcome: &Outcome) {
        let (key, scope) = (failure_key(scope, effect), scope.to_string());
        let known = self.failing.remove(&scope);
        let is_same = known.as_ref().is_some_and(|known| known.key == key);
        match outcome {
            Outcome::Failed(why) | Outcome::Refused(why) => {
                let (since, count) = known.filter(|_| is_same).map_or((at, 0), |k| (k.since, k.count));
                let words = words::of_others(why, words::CHARS_MAX);
                let (effect, count) = (effect.to_string(), count.saturating_add(1));
                self.failing.insert(scope, Failing { key, effect, since, count, words });
            }
            Outcome::Verified if is_same => {}
            Outcome::Verified | Outcome::Superseded(_) | Outcome::Futile(_) | Outcome::Skipped => {
                self.failing.extend(known.map(|known| (scope, known)));
            }
        }
    }

    /// Where nothing waits, is blocked or is under way any more, nothing fails.
    pub(super) fn forget_failing(&mut self) {
        let waits = self.standing.waits.iter().map(|wait| wait.scope);
        let blocks = self.standing.blocks.iter().map(|block| block.scope);
        let open = self.operations.iter().map(|open| open.scope);
        let busy: BTreeSet<String> = waits.chain(blocks).chain(open).map(|scope| scope.to_string()).collect();
        self.failing.retain(|scope, _| busy.contains(scope));
    }

    pub(super) fn apply_outcomes(&mut self, executed: &Executed) {
        let Some(Pending { decision, epoch: _ }) = self.pending.remove(&executed.decision) else {
            return;
        };
        for (effect, (at, outcome)) in decision.effects.iter().zip(&executed.outcomes) {
            let key = failure_key(decision.scope, effect);
            self.note_words(effect, outcome);
            self.note_settings(effect, outcome);
            self.note_failing(decision.scope, effect, *at, outcome);
            match outcome {
                // It was told, and nothing more: whether it comes to anything is seen later, or never.
                Outcome::Verified if is_only_told(effect) => {
                    let (count, last) = self.failures.entry(key).or_default();
                    (*count, *last) = (count.saturating_add(1), *at);
                }
                Outcome::Verified => {
                    self.failures.remove(&key);
                    self.released |= matches!(effect, Effect::ReleaseFinalizer);
                    self.note_verified(effect);
                }
                Outcome::Failed(why) | Outcome::Refused(why) | Outcome::Superseded(why) => {
                    self.forget_other_settings(effect, &key);
                    let (count, last) = self.failures.entry(key).or_default();
                    (*count, *last) = (count.saturating_add(1), *at);
                    self.note_refused(effect, why);
                }
                Outcome::Futile(_) => self.namespace_ends = true,
                Outcome::Skipped => {}
            }
        }
        if let Scope::Shard(shard) = decision.scope {
            self.note_loss(shard);
        }
    }

    /// Keeps the words of an object's failure for those who look at the resource.
    fn note_words(&mut self, effect: &Effect, outcome: &Outcome) {
        let (Effect::Apply { object, .. } | Effect::Delete { object, .. }) = effect else { return };
        match outcome {
            Outcome::Failed(why) | Outcome::Refused(why) => {
                self.refusals.insert(object.clone(), words::of_others(why, words::CHARS_MAX));
            }
            Outcome::Verified | Outcome::Superseded(_) => {
                self.refusals.remove(object);
            }
            Outcome::Futile(_) | Outcome::Skipped => {}
        }
    }

    /// What failed with other settings of that member counts no more.
    fn forget_other_settings(&mut self, effect: &Effect, key: &str) {
        let Effect::Configure { server, .. } = effect else { return };
        let of_member = settings_key(server.member, "");
        self.failures.retain(|known, _| known == key || !known.starts_with(&of_member));
    }

    /// The same of settings that a server has refused by its own word.
    fn note_settings(&mut self, effect: &Effect, outcome: &Outcome) {
        let Effect::Configure { server, settings } = effect else { return };
        let Some(known) = self.members.get_mut(&server.member) else { return };
        match outcome {
            Outcome::Refused(why) => {
                let before = known.settings_refused.take().filter(|before| before.settings == *settings);
                let count = before.map_or(0, |before| before.count).saturating_add(1);
                let words = words::of_others(why, words::CHARS_MAX);
                known.settings_refused = Some(SettingsRefused { settings: settings.clone(), words, count });
            }
            Outcome::Verified => {
                known.settings_refused = None;
                if let Observed::Present(agent) = &mut known.facts.agent {
                    agent.settings = Some(settings.clone());
                }
            }
            Outcome::Failed(_) | Outcome::Superseded(_) | Outcome::Futile(_) | Outcome::Skipped => {}
        }
    }

    fn note_verified(&mut self, effect: &Effect) {
        match effect {
            Effect::DeletePod { member, pod_uid, grace_s: _ } => {
                self.condemned.insert(*member, pod_uid.clone());
            }
            Effect::Promote { server, replid: _, offset: _, consents: _, by: _ } => {
                self.note_promotion(server.member, &server.run_id);
            }
            Effect::Handover { from, to, timeout_ms: _, consents: _, node: _ } => {
                if let Some(MemberState {
                    facts: MemberFacts { server: Observed::Present(facts), .. }, ..
                }) = self.members.get_mut(&from.member)
                {
                    facts.role = ServerRole::Replica { source: Source::Member(to.member), link: Link::Down };
                }
                self.note_promotion(to.member, &to.run_id);
            }
            // The process is gone, whatever the look that is under way still says.
            Effect::Fence { server } => {
                if let Some(known) = self.members.get_mut(&server.member) {
                    known.facts.server = Observed::Absent;
                }
            }
            // Of what was cancelled some may have come to its end just before.
            Effect::MigrateSlots { by: Means::Atomic, .. } => {}
            Effect::MigrateSlots { server, slots, to: _, node: _, keys: _, by: Means::ByKey } => {
                self.note_closed(server.member.shard, slots);
            }
            Effect::Attach { .. }
            | Effect::Meet { .. }
            | Effect::AddSlots { .. }
            | Effect::Forget { .. }
            | Effect::Promise { .. }
            | Effect::Brief { .. }
            | Effect::Route { .. }
            | Effect::Unroute { .. }
            | Effect::Label { .. }
            | Effect::Configure { .. }
            | Effect::Disconnect { .. }
            | Effect::Apply { .. }
            | Effect::Delete { .. }
            | Effect::ReleaseFinalizer => {}
        }
    }

    /// A promotion that was verified has been seen: the member is primary until another look says otherwise.
    fn note_promotion(&mut self, id: MemberId, run_id: &str) {
        self.shards.entry(id.shard).or_default().in_force = Some(id);
        if let Some(MemberState { facts: MemberFacts { server: Observed::Present(facts), .. }, .. }) =
            self.members.get_mut(&id)
            && facts.run_id == run_id
        {
            facts.role = ServerRole::Primary;
        }
        if let Some(node) = self.members.get_mut(&id).and_then(|m| m.facts.node.as_mut()) {
            node.primary = None;
        }
    }
}

/// True of what goes on by itself once it was accepted. Open slots are closed at once.
fn is_only_told(effect: &Effect) -> bool {
    let closes = matches!(effect, Effect::MigrateSlots { server, to, .. } if server.member == *to);
    matches!(effect, Effect::Meet { .. } | Effect::MigrateSlots { .. }) && !closes
}

/// Key under which promotions of a member are counted that came to nothing.
pub fn promotion_key(of: MemberId) -> String {
    format!("{}/promote/{of}", Scope::Shard(of.shard))
}

/// Key under which a member's promises are counted that were refused.
pub fn promise_key(of: MemberId) -> String {
    format!("{}/promise/{of}", Scope::Shard(of.shard))
}

/// Key under which handovers to a member are counted that came to nothing.
pub fn handover_key(to: MemberId) -> String {
    format!("{}/handover/{to}", Scope::Shard(to.shard))
}

/// Key under which is counted how often a member did not get these settings.
fn settings_key(of: MemberId, settings: &str) -> String {
    format!("{}/configure/{of}/{settings}", Scope::Shard(of.shard))
}

/// Key under which repeated failures of an effect are counted.
pub fn failure_key(scope: Scope, effect: &Effect) -> String {
    match effect {
        Effect::Apply { object, .. } => format!("{scope}/apply/{object}"),
        Effect::Attach { server, .. } => format!("{scope}/attach/{}", server.member),
        Effect::Label { member, .. } => format!("{scope}/label/{member}"),
        // Other settings are another matter.
        Effect::Configure { server, settings } => settings_key(server.member, &settings.0),
        Effect::Meet { server, member, .. } => format!("{scope}/meet/{}/{member}", server.member),
        Effect::AddSlots { server, .. } => format!("{scope}/add-slots/{}", server.member),
        Effect::Forget { server, .. } => format!("{scope}/forget/{}", server.member),
        Effect::MigrateSlots { server, .. } => migration_key(server.member.shard),
        Effect::Delete { object, .. } => format!("{scope}/delete/{object}"),
        // One that refuses says nothing of the others.
        Effect::Promote { server, .. } => promotion_key(server.member),
        Effect::Handover { to, .. } => handover_key(to.member),
        Effect::Promise { member, .. } => promise_key(*member),
        Effect::Fence { .. }
        | Effect::Route { .. }
        | Effect::Unroute { .. }
        | Effect::Disconnect { .. }
        | Effect::DeletePod { .. }
        | Effect::ReleaseFinalizer => format!("{scope}/{}", effect.verb()),
        Effect::Brief { member, .. } => format!("{scope}/brief/{member}"),
    }
}
