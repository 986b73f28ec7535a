//! When a shard lost its primary, and whether a replica had its link until then.

use super::{ClusterState, MemberState, link_of};
use crate::{
    decision::{Scope, Standing, StepName, WaitReason},
    ids::{MemberId, ShardId, Timestamp},
    observation::{Link, Source},
    spec::{DesiredCluster, SwitchoverWish},
};
use serde::{Deserialize, Serialize};

/// A replica whose link went down at most this long before the primary was seen lost still counts as in sync:
/// the loss of the primary is what broke the link, and looks are a second apart. Milliseconds.
const BROKEN_BY_LOSS_MS: i64 = 2_000;

/// The loss of a shard's primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// The member whose grant is in force and that does not serve.
    pub of: MemberId,
    /// When it was first seen so since it last served, within this epoch. It is not lost as long as a replica
    /// or its agent hears it.
    pub at: Timestamp,
}

impl ClusterState {
    /// The first look at which the member whose grant is in force does not serve is the loss. Whatever
    /// becomes of it after that, silent, gone, at the gate or loaded, it had no more to give.
    pub(super) fn note_loss(&mut self, id: ShardId) {
        let now = self.head_time;
        let wish = self.spec.as_ref().and_then(|spec| spec.switchover.as_ref());
        if wish.is_some_and(|wish| wish.to.shard == id) && self.has_serving_primary(id) {
            self.named = None;
        }
        let Some(shard) = self.shards.get_mut(&id) else { return };
        let serves = |id: MemberId| self.members.get(&id).is_some_and(|m| m.is_primary());
        let lost = shard.in_force.filter(|holder| !serves(*holder));
        shard.lost = lost.map(|of| shard.lost.filter(|known| known.of == of).unwrap_or(Loss { of, at: now }));
    }

    /// Whether a new wish names the data of a shard that has lost its primary.
    pub(super) fn note_named(&mut self, spec: &DesiredCluster) {
        let before = self.spec.as_ref().and_then(|spec| spec.switchover.as_ref());
        if before == spec.switchover.as_ref() {
            return;
        }
        let counts = |wish: &&SwitchoverWish| !self.has_serving_primary(wish.to.shard);
        self.named = spec.switchover.as_ref().filter(counts).map(|wish| wish.token.clone());
    }

    fn has_serving_primary(&self, id: ShardId) -> bool {
        let holder = self.shards.get(&id).and_then(|shard| shard.in_force);
        holder.and_then(|holder| self.members.get(&holder)).is_some_and(MemberState::is_primary)
    }

    /// A primary that a member was still hearing is lost now at the earliest.
    pub(super) fn apply_standing(&mut self, standing: &Standing) {
        let heard: Vec<ShardId> = self.shards.keys().copied().filter(|id| self.is_heard_of(*id)).collect();
        for id in heard {
            if let Some(lost) = self.shards.get_mut(&id).and_then(|shard| shard.lost.as_mut()) {
                lost.at = self.head_time;
            }
        }
        self.standing = standing.clone();
        self.forget_failing();
    }

    /// True if the shard's primary is silent to the operator only, as far as was found last.
    fn is_heard_of(&self, id: ShardId) -> bool {
        let heard = [WaitReason::PrimaryAliveForReplicas, WaitReason::PrimaryAliveForAgent];
        self.standing.waits.iter().any(|wait| {
            wait.step == StepName::Failover && wait.scope == Scope::Shard(id) && heard.contains(&wait.reason)
        })
    }

    /// When the shard lost its primary; now, if it has not.
    fn lost_at(&self, id: ShardId, now: Timestamp) -> Timestamp {
        let Some(shard) = self.shards.get(&id) else { return now };
        let Some(holder) = shard.in_force.and_then(|of| self.members.get(&of)) else { return now };
        if holder.is_primary() || self.is_heard_of(id) {
            return now;
        }
        // Folds of earlier builds do not have it.
        shard.lost.map_or(holder.server_changed_at, |lost| lost.at)
    }

    /// True if the member runs as replica but had no link to the primary for a while, when that was lost or
    /// until now.
    pub fn is_detached(&self, id: MemberId, now: Timestamp) -> bool {
        let Some(member) = self.members.get(&id) else { return false };
        let Some((Source::Member(_) | Source::Foreign(_), Link::Down | Link::Syncing)) =
            link_of(&member.facts.server)
        else {
            return false;
        };
        let known_before = member.was_detached.is_some()
            && member.was_detached.as_ref() == member.server().map(|s| &s.run_id);
        known_before || self.lost_at(id.shard, now).millis_since(member.link_since) > BROKEN_BY_LOSS_MS
    }
}
