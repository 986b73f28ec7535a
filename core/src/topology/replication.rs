//! Replication: one primary per shard, `REPLICAOF` and `FAILOVER`.

use crate::{
    decide::View,
    effect::{Effect, Promotion},
    ids::MemberId,
    observation::{Link, RoleLabel, Source},
    topology::{label, replica_link, route, server},
};

/// Bound on the pause of writes in a planned handover: longer than any replica that is in sync needs, shorter than what
/// clients take for an outage of their own. Milliseconds.
pub(super) const HANDOVER_MAX_MS: u32 = 3_000;

/// Demote, promote, route, then everything that may fail without harm.
pub fn promote(view: &View<'_>, chosen: MemberId) -> Vec<Effect> {
    let (Some(target), Some(facts), Some(reading)) =
        (server(view, chosen), view.member(chosen).and_then(|m| m.server()), view.reading(chosen))
    else {
        return Vec::new();
    };
    let (replid, offset, consents) = (facts.replid.clone(), reading.offset, consents(view, chosen));
    let mut effects = demote_others(view, chosen);
    effects.push(Effect::Promote { server: target, replid, offset, consents, by: Promotion::Detach });
    effects.extend(route(view, chosen));
    effects.extend(label(view, chosen, RoleLabel::Primary));
    effects.extend(attach_others(view, chosen, &[chosen]));
    effects
}

/// Members that are seen to be primary without the right to be it follow the chosen one before that is promoted: two at a
/// time are never wanted.
fn demote_others(view: &View<'_>, chosen: MemberId) -> Vec<Effect> {
    let stale = view.state.members_of(chosen.shard).filter(|(id, m)| *id != chosen && m.is_primary());
    stale.filter_map(|(id, _)| attach(view, id, chosen)).collect()
}

/// Hand over, route, send the clients away from the old primary, then the rest.
pub fn hand_over(view: &View<'_>, from: MemberId, to: MemberId) -> Vec<Effect> {
    let (Some(old), Some(new)) = (server(view, from), server(view, to)) else {
        return Vec::new();
    };
    let mut effects = vec![Effect::Handover {
        from: old.clone(),
        to: new,
        timeout_ms: HANDOVER_MAX_MS,
        node: None,
        consents: consents(view, to),
    }];
    effects.extend(route(view, to));
    effects.push(Effect::Disconnect { server: old });
    effects.extend(label(view, to, RoleLabel::Primary));
    // The old primary is labelled when its agent passes no more clients on: it is no replica to read from until then.
    effects.extend(attach_others(view, to, &[from, to]));
    effects
}

/// What the member's agent has consented to so far; it refuses to be promoted if that has changed meanwhile.
pub(super) fn consents(view: &View<'_>, member: MemberId) -> u64 {
    view.member(member).and_then(|m| m.agent()).map_or(0, |a| a.consents)
}

/// Every other member that answers as replica follows `primary`.
pub(super) fn attach_others(view: &View<'_>, primary: MemberId, except: &[MemberId]) -> Vec<Effect> {
    let others = view.state.members_of(primary.shard).filter(|(id, _)| !except.contains(id));
    others
        .filter(|(id, _)| view.reading(*id).is_some() && replica_link(view, *id).is_some())
        .filter_map(|(id, _)| super::attach(view, id, primary))
        .collect()
}

/// `REPLICAOF` the primary's address, if the member's agent answers.
pub fn attach(view: &View<'_>, member: MemberId, primary: MemberId) -> Option<Effect> {
    view.member(member)?.agent()?;
    let to_address = view.member(primary)?.address()?.to_owned();
    Some(Effect::Attach { server: server(view, member)?, to: primary, to_address, node: None })
}

/// A primary that answers, or a replica that streams from it.
pub fn is_ready(view: &View<'_>, member: MemberId, primary: MemberId) -> bool {
    let Some(known) = view.member(member) else {
        return false;
    };
    if known.server().is_none_or(|s| s.loading) || view.state.is_leaving(member) {
        return false;
    }
    if member == primary {
        return known.is_primary();
    }
    replica_link(view, member)
        .is_some_and(|(source, link)| source == Source::Member(primary) && link == Link::Up)
}
