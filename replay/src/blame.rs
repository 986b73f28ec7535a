//! `blame slot N`: who has owned a slot from when to when, and why each time. A failover keeps the slot in its shard and changes whom
//! clients find there, so the primaries are told, too.

use crate::{
    Error,
    history::{Gone, History},
    line::{self, Joined},
    moves::{Job, Moves, Stamp},
    report::{Finding, Report},
    table::Table,
};
use serde::Serialize;
use std::{fmt::Write, str::FromStr};
use valkeeper_core::{
    decision::Decision,
    effect::Effect,
    event::Record,
    ids::{MemberId, Seq, ShardId},
    slots::SLOTS,
    state::ClusterState,
};

/// A slot of a Valkey Cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Slot(u16);

/// A text that is no [`Slot`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a slot, 0 to {last}, not {0:?}", last = SLOTS - 1)]
pub struct NotASlot(String);

impl FromStr for Slot {
    type Err = NotASlot;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = text.parse().ok().filter(|slot| *slot < SLOTS);
        number.map(Slot).ok_or_else(|| NotASlot(text.to_owned()))
    }
}

/// Whose a slot was for a while.
#[derive(Clone, Debug, Serialize)]
pub struct Owner {
    /// The shard; `None`: nobody's.
    pub shard: Option<ShardId>,
    /// The shard's primary, if one holds a grant.
    pub primary: Option<MemberId>,
    /// From this record on.
    pub since: Stamp,
    /// Until this one; `None`: to the end of the stream.
    pub until: Option<Stamp>,
    /// How it came to be.
    pub how: String,
    /// The decision that it followed from, if one did.
    pub decision: Option<Seq>,
    /// Code and meaning of that decision's reason.
    pub reason: Option<(&'static str, &'static str)>,
}

/// The answer of `blame slot`.
#[derive(Clone, Debug, Serialize)]
pub struct Owners {
    /// The slot.
    pub slot: Slot,
    /// Records that are gone, in which it may have had other owners.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gone: Option<Gone>,
    /// Who owned it, in order.
    pub owners: Vec<Owner>,
}

/// Who owned a slot, and why. Errors: [`Error::NeverSeen`] if nobody ever did.
pub fn slot(history: &History, slot: Slot) -> Result<Owners, Error> {
    let (joined, moves) = (Joined::new(history), Moves::of(history));
    let mut state = history.start().clone();
    let mut owners: Vec<Owner> = Vec::new();
    let mut last = (None, None);
    if let Some(gone) = history.gone() {
        last = owner(&state, slot);
        let since = Stamp { seq: gone.through, time: gone.until };
        if last.0.is_some() {
            owners.push(Owner::new(last, since, "as the records that are gone left it".to_owned(), None));
        }
    }
    for record in history.records() {
        state.apply(record);
        let now = owner(&state, slot);
        if now == last {
            continue;
        }
        let at = Stamp::from(record);
        if let Some(before) = owners.last_mut() {
            before.until = Some(at);
        }
        let change = moves.changes.iter().find(|c| c.at.seq == record.seq && c.slots.contains(slot.0));
        let job = change.and_then(|c| {
            moves.jobs.iter().find(|job| Some(job.sent.seq) == c.job && job.slots.contains(slot.0))
        });
        let (how, decision) =
            if now.0 == last.0 { promoted(history, record, now.1) } else { given(record, job) };
        owners.push(Owner::new(now, at, how, decision.and_then(|seq| Some((seq, joined.decision(seq)?)))));
        last = now;
    }
    if owners.is_empty() {
        return Err(Error::NeverSeen { subject: format!("slot {}", slot.0) });
    }
    Ok(Owners { slot, gone: history.gone().cloned(), owners })
}

/// The shard that owns a slot, and the member of it that holds the grant.
fn owner(state: &ClusterState, slot: Slot) -> (Option<ShardId>, Option<MemberId>) {
    let found = state.shards.iter().find(|(_, shard)| shard.slots.contains(slot.0));
    (found.map(|(id, _)| *id), found.and_then(|(_, shard)| shard.in_force))
}

/// How a slot came to another shard, and by which decision.
fn given(record: &Record, job: Option<&Job>) -> (String, Option<Seq>) {
    let adds = |d: &Decision| d.effects.iter().any(|e| matches!(e, Effect::AddSlots { .. }));
    match (line::decided(record).filter(|d| adds(d)), job) {
        (Some(_), _) => ("the operator gave it".to_owned(), Some(record.seq)),
        (None, Some(job)) => {
            let how = format!("handed over from {} to {}, as decided at {}", job.from, job.to, job.sent.seq);
            (how, Some(job.sent.seq))
        }
        (None, None) => ("seen in gossip: no decision of this journal moved it".to_owned(), None),
    }
}

/// How a shard's primary became another, and by which decision: the last that granted it the shard.
fn promoted(history: &History, record: &Record, primary: Option<MemberId>) -> (String, Option<Seq>) {
    let until = history.records().iter().rev().filter(|r| r.seq <= record.seq);
    let granted = until.filter(|r| line::decided(r).is_some_and(|d| primary.is_some() && d.grant == primary));
    match granted.map(|r| r.seq).next() {
        Some(seq) => (format!("same shard, another primary, as decided at {seq}"), Some(seq)),
        None => ("same shard, another primary, as it was seen".to_owned(), None),
    }
}

impl Owner {
    fn new(
        (shard, primary): (Option<ShardId>, Option<MemberId>),
        since: Stamp,
        how: String,
        decision: Option<(Seq, &Decision)>,
    ) -> Owner {
        let reason = decision.map(|(_, d)| (d.reason.code(), d.reason.explain()));
        Owner { shard, primary, since, until: None, how, decision: decision.map(|(seq, _)| seq), reason }
    }

    fn who(&self) -> String {
        let shard = self.shard.map_or_else(|| "nobody".to_owned(), |id| format!("shard {id}"));
        let primary = self.primary.map(|member| format!(", primary {member}"));
        format!("{shard}{}", primary.unwrap_or_default())
    }
}

impl Report for Owners {
    fn text(&self) -> String {
        let mut text = String::new();
        if let Some(now) = self.owners.last() {
            let _ = writeln!(text, "slot {} now: {}", self.slot.0, now.who());
        }
        if let Some(gone) = &self.gone {
            let _ = writeln!(text, "     {gone}");
        }
        text.push('\n');
        for owner in &self.owners {
            let Owner { since, until, how, reason, .. } = owner;
            let until = until.map(|at| format!(", until [j:{}] {}", at.seq, at.time)).unwrap_or_default();
            let _ = writeln!(text, "{}  [j:{}]  {}{until}", since.time, since.seq, owner.who());
            let _ = writeln!(text, "    {how}");
            if let Some((code, meaning)) = reason {
                let _ = writeln!(text, "    because: {code}: {meaning}");
            }
        }
        text
    }

    fn csv(&self) -> Option<String> {
        let mut table =
            Table::new(["seq", "time", "until_seq", "shard", "primary", "decision", "reason", "how"]);
        for Owner { shard, primary, since, until, how, decision, reason } in &self.owners {
            table.push([
                since.seq.to_string(),
                since.time.to_string(),
                until.map(|at| at.seq.to_string()).unwrap_or_default(),
                shard.map(|id| id.to_string()).unwrap_or_default(),
                primary.map(|member| member.to_string()).unwrap_or_default(),
                decision.map(|seq| seq.to_string()).unwrap_or_default(),
                reason.map(|(code, _)| code.to_owned()).unwrap_or_default(),
                how.clone(),
            ]);
        }
        Some(table.csv())
    }

    fn finding(&self) -> Finding {
        Finding::Clean
    }
}
