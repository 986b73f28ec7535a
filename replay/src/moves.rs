//! How slots went from shard to shard: every change of who owns what in a history, and the job of atomic slot migration that it
//! belongs to. A job is three records: the decision that sent it, the outcome that says whether Valkey took it, and the first
//! record at which its slots are seen at the other shard.

use crate::{
    history::History,
    line::{self, Joined},
};
use serde::Serialize;
use std::collections::BTreeMap;
use valkeeper_core::{
    decision::Decision,
    effect::{Effect, Means, Outcome},
    event::{Event, Record},
    ids::{MemberId, Seq, ShardId, Timestamp},
    observation::ExportState,
    slots::SlotSet,
    state::ClusterState,
    topology::half_moved::half_moved,
};

/// A record, and when what it shows happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Stamp {
    /// The record.
    pub seq: Seq,
    /// The time of the record, or of the outcome within it.
    pub time: Timestamp,
}

impl From<&Record> for Stamp {
    fn from(record: &Record) -> Self {
        Stamp { seq: record.seq, time: record.time }
    }
}

/// What one `MigrateSlots` was told to do and what became of it.
#[derive(Clone, Debug, Serialize)]
pub struct Job {
    /// The decision that sent it.
    pub sent: Stamp,
    /// Who gives.
    pub from: MemberId,
    /// Who gets.
    pub to: MemberId,
    /// The slots.
    pub slots: SlotSet,
    /// How many keys that should have been.
    pub keys: Option<u64>,
    /// The decision that sent some of these slots the same way before, in vain.
    pub again: Option<Seq>,
    /// True if it finishes slots that were left half moved.
    pub finishes: bool,
    /// What the agent said of it: verified means that Valkey took the job.
    pub outcome: Option<(Stamp, Outcome)>,
    /// First record at which all of its slots are the other shard's.
    pub arrived: Option<Stamp>,
    /// When it was seen to have come to nothing, with Valkey's words.
    pub failed: Option<(Stamp, String)>,
    /// When its node said, with which words, that it came to nothing, though its slots had arrived: it served them on until it heard of that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disputed: Option<(Stamp, String)>,
    #[serde(skip)]
    is_atomic: bool,
    #[serde(skip)]
    missing: SlotSet,
}

/// Slots that have another shard from a record on.
#[derive(Clone, Debug, Serialize)]
pub struct Change {
    /// The record that shows it.
    pub at: Stamp,
    /// Whose they were.
    pub from: Option<ShardId>,
    /// Whose they are.
    pub to: Option<ShardId>,
    /// The slots.
    pub slots: SlotSet,
    /// The decision of the job that moved them; `None`: nobody was told to, as far as this history knows.
    pub job: Option<Seq>,
    /// True if that job finished what was left half moved.
    pub finished: bool,
}

/// All of it.
#[derive(Clone, Debug, Default)]
pub struct Moves {
    /// Jobs, in order.
    pub jobs: Vec<Job>,
    /// Changes, in order.
    pub changes: Vec<Change>,
    /// Jobs that were sent while another of the same shard ran: the decision, and how that is known.
    pub overlaps: Vec<(Seq, String)>,
}

/// Slots by owner.
pub fn owned(state: &ClusterState) -> BTreeMap<ShardId, SlotSet> {
    let shards = state.shards.iter().filter(|(_, shard)| !shard.slots.is_empty());
    shards.map(|(id, shard)| (*id, shard.slots.clone())).collect()
}

impl Moves {
    /// Folds a history once.
    pub fn of(history: &History) -> Moves {
        let joined = Joined::new(history);
        let mut state = history.start().clone();
        let (mut moves, mut before) = (Moves::default(), owned(&state));
        for (seq, pending) in &state.pending {
            let sent = Stamp { seq: *seq, time: state.head_time };
            moves.send(&joined, &state, sent, &pending.decision);
        }
        for record in history.records() {
            if let Some(decision) = line::decided(record) {
                moves.overlap(&state, record.seq, decision);
                moves.note_failures(&state, record.into(), None);
                moves.send(&joined, &state, record.into(), decision);
            }
            state.apply(record);
            if let Event::NodeChanged { member, node: _ } = &record.event {
                moves.note_failures(&state, record.into(), Some(*member));
                moves.note_disputes(&state, record.into(), *member);
            }
            let after = owned(&state);
            if after != before {
                moves.note_changes(&before, &after, record.into());
                before = after;
            }
        }
        moves
    }

    /// The decision's jobs, with the outcomes that are recorded of them.
    fn send(&mut self, joined: &Joined<'_>, state: &ClusterState, sent: Stamp, decision: &Decision) {
        let open = half_moved(state).iter().fold(SlotSet::default(), |all, m| all.with(&m.slots));
        let end = joined.end(sent.seq);
        let outcomes = end.and_then(|record| Some((record.seq, &line::ended(record)?.outcomes)));
        for (at, effect) in decision.effects.iter().enumerate() {
            let Effect::MigrateSlots { server, slots, to, node: _, keys, by } = effect else { continue };
            if server.member == *to {
                continue;
            }
            let outcome = outcomes.and_then(|(seq, outcomes)| {
                let (time, outcome) = outcomes.get(at)?;
                Some((Stamp { seq, time: *time }, outcome.clone()))
            });
            let from = server.member;
            let same = |job: &&Job| {
                job.from.shard == from.shard
                    && job.to.shard == to.shard
                    && !job.missing.common(slots).is_empty()
            };
            let again = self.jobs.iter().rev().find(same).map(|job| job.sent.seq);
            self.jobs.push(Job {
                sent,
                from,
                to: *to,
                slots: slots.clone(),
                keys: *keys,
                again,
                finishes: slots.without(&open).is_empty(),
                outcome,
                arrived: None,
                failed: None,
                disputed: None,
                is_atomic: *by == Means::Atomic,
                missing: slots.clone(),
            });
        }
    }

    /// Two jobs of a shard at once: in one decision, or one while what became of another is not recorded. The core's own invariant
    /// knows those that the node itself tells of.
    fn overlap(&mut self, state: &ClusterState, seq: Seq, decision: &Decision) {
        let mut busy: BTreeMap<ShardId, Seq> = BTreeMap::new();
        for (open, pending) in &state.pending {
            if decision.reissue_of != Some(*open) && pending.epoch == state.epoch {
                busy.extend(sources(&pending.decision).map(|shard| (shard, *open)));
            }
        }
        for shard in sources(decision) {
            if let Some(other) = busy.insert(shard, seq) {
                self.overlaps.push((seq, format!("sends a job of shard {shard} while one of {other} runs")));
            }
        }
    }

    /// Jobs of which their node says that they came to nothing: when it says it, or when it is not said anew because it is the
    /// same as before, and something else is decided.
    fn note_failures(&mut self, state: &ClusterState, at: Stamp, of: Option<MemberId>) {
        let open = self.jobs.iter_mut().filter(|job| job.is_on_its_way(at.seq));
        for job in open.filter(|job| of.is_none_or(|id| id == job.from)) {
            let node = state.members.get(&job.from).and_then(|member| member.node());
            let words =
                node.into_iter().flat_map(|node| &node.exports).find_map(|export| match &export.state {
                    ExportState::Failed(words) if export.slots == job.slots => Some(words.clone()),
                    ExportState::Failed(_) | ExportState::Running => None,
                });
            job.failed = words.map(|words| (at, words));
        }
    }

    /// Atomic jobs whose slots have arrived, and of which their node says the contrary.
    fn note_disputes(&mut self, state: &ClusterState, at: Stamp, of: MemberId) {
        let node = state.members.get(&of).and_then(|member| member.node());
        for export in node.into_iter().flat_map(|node| &node.exports) {
            let ExportState::Failed(words) = &export.state else { continue };
            let last = self.jobs.iter_mut().rev().find(|job| job.from == of && job.slots == export.slots);
            if let Some(job) =
                last.filter(|job| job.is_atomic && job.arrived.is_some() && job.disputed.is_none())
            {
                job.disputed = Some((at, words.clone()));
            }
        }
    }

    fn note_changes(
        &mut self,
        before: &BTreeMap<ShardId, SlotSet>,
        after: &BTreeMap<ShardId, SlotSet>,
        at: Stamp,
    ) {
        let none = SlotSet::default();
        for (to, slots) in after {
            let mut rest = slots.without(before.get(to).unwrap_or(&none));
            for (from, had) in before {
                let given = rest.common(had);
                rest = rest.without(&given);
                self.change(at, Some(*from), Some(*to), given);
            }
            self.change(at, None, Some(*to), rest);
        }
        let owned = after.values().fold(none, |all, slots| all.with(slots));
        for (from, had) in before {
            self.change(at, Some(*from), None, had.without(&owned));
        }
    }

    /// Credits a change to the job that was to bring it about: the last that Valkey took, or of which nothing else is known.
    fn change(&mut self, at: Stamp, from: Option<ShardId>, to: Option<ShardId>, mut slots: SlotSet) {
        while !slots.is_empty() {
            let way = (from, to);
            let fitting = |job: &&mut Job| {
                way == (Some(job.from.shard), Some(job.to.shard)) && !job.missing.common(&slots).is_empty()
            };
            let job = self.jobs.iter_mut().filter(fitting).max_by_key(|job| (job.likelihood(), job.sent.seq));
            let mut moved = slots.clone();
            let sent = job.map(|job| {
                moved = job.missing.common(&slots);
                job.missing = job.missing.without(&moved);
                job.arrived = job.missing.is_empty().then_some(at);
                (job.sent.seq, job.finishes)
            });
            slots = slots.without(&moved);
            let (job, finished) = sent.unzip();
            let finished = finished.unwrap_or_default();
            self.changes.push(Change { at, from, to, slots: moved, job, finished });
        }
    }
}

fn sources(decision: &Decision) -> impl Iterator<Item = ShardId> + '_ {
    decision.effects.iter().filter_map(|effect| {
        if let Effect::MigrateSlots { server, .. } = effect { Some(server.member.shard) } else { None }
    })
}

impl Job {
    /// True if Valkey had taken it before a record, and nothing is known of its end.
    fn is_on_its_way(&self, at: Seq) -> bool {
        let taken = self.outcome.as_ref().is_some_and(|(stamp, _)| stamp.seq < at);
        taken && self.arrived.is_none() && self.failed.is_none() && self.likelihood() == LIKELY
    }

    /// How likely slots that arrive are this job's.
    fn likelihood(&self) -> u8 {
        match (&self.failed, &self.outcome) {
            (Some(_), _) => 1,
            (None, Some((_, Outcome::Verified))) => LIKELY,
            (None, None) => 2,
            // An answer that did not come in time is a failure, too.
            (None, Some((_, Outcome::Failed(_) | Outcome::Refused(_) | Outcome::Futile(_)))) => 1,
            (None, Some((_, Outcome::Superseded(_) | Outcome::Skipped))) => 0,
        }
    }

    /// What became of it, in a few words.
    pub fn end(&self) -> String {
        match (&self.arrived, &self.failed, &self.outcome) {
            (Some(at), _, _) => format!("arrived at {}", at.seq),
            (None, Some((at, words)), _) => format!("FAILED, seen at {}: {words}", at.seq),
            (
                None,
                None,
                Some((at, Outcome::Failed(words) | Outcome::Refused(words) | Outcome::Futile(words))),
            ) => {
                format!("REFUSED at {}: {words}", at.seq)
            }
            (None, None, Some((at, Outcome::Superseded(why)))) => format!("not sent, at {}: {why}", at.seq),
            (None, None, Some((_, Outcome::Skipped))) => "not sent: the one before it failed".to_owned(),
            (None, None, Some((_, Outcome::Verified))) => "nothing was seen of it".to_owned(),
            (None, None, None) => "no outcome is recorded".to_owned(),
        }
    }
}

/// [`Job::likelihood`] of one that Valkey took.
const LIKELY: u8 = 3;

/// A set of slots in a few words: how many, and which unless that is a long list.
pub fn named(slots: &SlotSet) -> String {
    match slots.runs().count() {
        0 => "0".to_owned(),
        1..=RUNS_TOLD_MAX => format!("{} ({slots})", slots.len()),
        runs => format!("{} (in {runs} runs)", slots.len()),
    }
}

/// Runs of slots that a line of text has room for: more hide what else is in it. JSON has them all.
const RUNS_TOLD_MAX: usize = 3;
