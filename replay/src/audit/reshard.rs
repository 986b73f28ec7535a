//! `audit reshard`: each change of the number of shards from the record that asked for it to the last slot, job by job, and whether what
//! must hold of slots held.

use super::{Figure, indented, invariants, told};
use crate::{
    history::History,
    line,
    moves::{Change, Job, Moves, Stamp, named, owned},
    report::{Finding, Report},
    rules,
    table::Table,
};
use serde::Serialize;
use std::{collections::BTreeMap, fmt::Write};
use valkeeper_core::{
    decision::{Decision, OperationChange, OperationKind, Scope},
    effect::Outcome,
    event::{Event, Record},
    ids::{Seq, ShardId, Timestamp},
    observation::SpecFact,
    slots::SlotSet,
    state::ClusterState,
    steps::reshard::planned,
};

/// Slots that one shard was to give to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Planned {
    /// Who had them.
    pub from: ShardId,
    /// Who was to get them.
    pub to: ShardId,
    /// The slots.
    pub slots: SlotSet,
}

/// Something else that was done meanwhile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Beside {
    /// What.
    pub what: String,
    /// Its first record.
    pub from: Stamp,
    /// Its last, if it has an end and came to it.
    pub until: Option<Stamp>,
}

/// The longest time in which no slot arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Stall {
    /// How long it was, milliseconds.
    pub ms: i64,
    /// The arrival before it, or the beginning.
    pub from: Seq,
    /// The arrival after it.
    pub until: Seq,
}

/// One change of the number of shards.
#[derive(Clone, Debug, Serialize)]
pub struct Reshard {
    /// The record that opened it.
    pub id: Seq,
    /// True if its beginning is gone: it was open where the stream was cut, and what is said of it is what is left.
    pub is_cut: bool,
    /// Who asked for it.
    pub asked_by: String,
    /// The record of the spec that asked.
    pub asked_at: Option<Seq>,
    /// Shards that owned slots before.
    pub shards_before: usize,
    /// Shards of the spec.
    pub shards_wanted: u16,
    /// When it was opened.
    pub opened: Timestamp,
    /// When it was closed, with the code of the decision; `None` if it is open.
    pub ended: Option<(Stamp, &'static str)>,
    /// What was to move when it began.
    pub plan: Vec<Planned>,
    /// Every job, in order.
    pub jobs: Vec<Job>,
    /// Every change of who owns what, in order.
    pub changes: Vec<Change>,
    /// What else was done meanwhile: failovers, changes of the spec, changes of operator.
    pub beside: Vec<Beside>,
    /// Longest time without an arrival.
    pub stall: Option<Stall>,
    /// What went otherwise than first planned.
    pub deviations: Vec<String>,
    /// Invariants that records of this reshard, or after it, break.
    pub violations: Vec<(Seq, String)>,
}

/// Every reshard of a stream.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub struct Reshards(pub Vec<Reshard>);

/// Audits every reshard in a stream; also one whose beginning is gone, as far as it is there.
pub fn reshards(history: &History) -> Reshards {
    let moves = Moves::of(history);
    let mut violations = rules::violations(history);
    violations.extend(moves.overlaps.iter().cloned());
    violations.extend(shrunk(&moves.changes));
    violations.extend(moved_twice(history.records(), &moves.changes));
    violations.sort();
    let openings = openings(history);
    let next = |at: usize| openings.get(at + 1).map(|later| later.id);
    let audited = openings.iter().enumerate();
    Reshards(audited.map(|(at, one)| one.audit(history.records(), &moves, &violations, next(at))).collect())
}

/// How a reshard began.
struct Opening {
    id: Seq,
    is_cut: bool,
    asked_by: String,
    asked_at: Option<Seq>,
    opened: Timestamp,
    shards_before: usize,
    shards_wanted: u16,
    plan: Vec<Planned>,
}

fn openings(history: &History) -> Vec<Opening> {
    let (mut state, mut spec_at) = (history.start().clone(), None);
    let mut openings: Vec<Opening> = opening(&state, None, true).into_iter().collect();
    for record in history.records() {
        state.apply(record);
        if let Event::SpecChanged(SpecFact::Valid(_)) = &record.event {
            spec_at = Some(record.seq);
        }
        if line::decided(record).is_some_and(opens) {
            openings.extend(opening(&state, spec_at, false));
        }
    }
    openings
}

/// What the open reshard of a state is about. What it plans is made from who owns what, and sending a job changes nothing of that.
fn opening(state: &ClusterState, asked_at: Option<Seq>, is_cut: bool) -> Option<Opening> {
    let open = state.operation(OperationKind::Reshard, Scope::Cluster)?;
    let plan = planned(state).into_iter().map(|m| Planned { from: m.from, to: m.to, slots: m.slots });
    Some(Opening {
        id: open.id,
        is_cut,
        asked_by: open.asked_by.clone(),
        asked_at,
        opened: open.opened_at,
        shards_before: owned(state).len(),
        shards_wanted: state.spec.as_ref().map_or(0, |spec| spec.shards),
        plan: plan.collect(),
    })
}

fn opens(decision: &Decision) -> bool {
    matches!(&decision.operation, Some(OperationChange::Open { kind: OperationKind::Reshard, .. }))
}

fn closes(decision: &Decision) -> bool {
    matches!(&decision.operation, Some(OperationChange::Close { kind: OperationKind::Reshard }))
}

impl Opening {
    /// The audit of it, up to the next one of the stream.
    fn audit(
        &self,
        records: &[Record],
        moves: &Moves,
        violations: &[(Seq, String)],
        next: Option<Seq>,
    ) -> Reshard {
        let of_it = |seq: Seq| seq >= self.id && next.is_none_or(|next| seq < next);
        let mut decisions = records.iter().filter_map(|r| line::decided(r).map(|d| (r, d)));
        let closing = decisions.find(|(r, d)| of_it(r.seq) && closes(d));
        let ended = closing.map(|(record, decision)| (Stamp::from(record), decision.reason.code()));
        let during = |seq: Seq| of_it(seq) && ended.is_none_or(|(end, _)| seq <= end.seq);
        let changes: Vec<Change> = moves.changes.iter().filter(|c| during(c.at.seq)).cloned().collect();
        let jobs: Vec<Job> = moves.jobs.iter().filter(|job| of_it(job.sent.seq)).cloned().collect();
        let mut deviations = deviations(&self.plan, &changes, ended.is_some());
        deviations.extend(jobs.iter().filter_map(dispute));
        Reshard {
            id: self.id,
            is_cut: self.is_cut,
            asked_by: self.asked_by.clone(),
            asked_at: self.asked_at,
            shards_before: self.shards_before,
            shards_wanted: self.shards_wanted,
            opened: self.opened,
            ended,
            plan: self.plan.clone(),
            jobs,
            beside: beside(records, during),
            stall: stall(Stamp { seq: self.id, time: self.opened }, &changes),
            deviations,
            violations: violations.iter().filter(|(seq, _)| of_it(*seq)).cloned().collect(),
            changes,
        }
    }
}

/// Other operations, changes of the spec and of the operator among some records.
fn beside(records: &[Record], during: impl Fn(Seq) -> bool) -> Vec<Beside> {
    let mut found: Vec<Beside> = Vec::new();
    let mut open: BTreeMap<String, usize> = BTreeMap::new();
    for record in records.iter().filter(|r| during(r.seq)) {
        let at = Stamp::from(record);
        if let Event::EpochStarted { .. } | Event::SpecChanged(_) = &record.event {
            found.push(Beside { what: line::text(record), from: at, until: Some(at) });
        }
        let Some(decision) = line::decided(record) else { continue };
        let name = |kind: &OperationKind| format!("{kind:?} of {}", decision.scope);
        match &decision.operation {
            Some(OperationChange::Open { kind, .. }) if *kind != OperationKind::Reshard => {
                open.insert(name(kind), found.len());
                found.push(Beside { what: name(kind), from: at, until: None });
            }
            Some(OperationChange::Close { kind }) => {
                if let Some(known) = open.remove(&name(kind)).and_then(|index| found.get_mut(index)) {
                    known.until = Some(at);
                }
            }
            Some(OperationChange::Open { .. } | OperationChange::Advance { .. }) | None => {}
        }
    }
    found
}

fn stall(opened: Stamp, changes: &[Change]) -> Option<Stall> {
    let points = std::iter::once(opened).chain(changes.iter().map(|c| c.at));
    let pairs = points.zip(changes.iter().map(|c| c.at));
    let stalls = pairs.map(|(a, b)| Stall { ms: b.time.millis_since(a.time), from: a.seq, until: b.seq });
    stalls.max_by_key(|stall| stall.ms)
}

/// Slots that went elsewhere than first planned, more than once, or not at all.
fn deviations(plan: &[Planned], changes: &[Change], is_over: bool) -> Vec<String> {
    let mut told = Vec::new();
    let (mut moved, mut again) = (SlotSet::default(), SlotSet::default());
    let shard = |id: Option<ShardId>| id.map_or_else(|| "nobody".to_owned(), |id| id.to_string());
    for Change { at, from, to, slots, job, finished: _ } in changes {
        again = again.with(&moved.common(slots));
        moved = moved.with(slots);
        let as_planned = plan.iter().filter(|p| Some(p.from) == *from && Some(p.to) == *to);
        let other = as_planned.fold(slots.clone(), |left, p| left.without(&p.slots));
        let way = format!("from {} to {} at {}", shard(*from), shard(*to), at.seq);
        if job.is_none() {
            told.push(format!("{} slots went {way}, and no job of this journal moved them", named(slots)));
        } else if !other.is_empty() {
            told.push(format!("{} slots went {way}, as was not planned at first", named(&other)));
        }
    }
    if !again.is_empty() {
        told.push(format!("{} slots moved more than once", named(&again)));
    }
    let all = plan.iter().fold(SlotSet::default(), |all, p| all.with(&p.slots));
    let left = all.without(&moved);
    if is_over && !left.is_empty() {
        told.push(format!("{} slots stayed where they were", named(&left)));
    }
    told
}

/// A job that was cancelled, or given up, by its giver when its taker had the slots already.
fn dispute(job: &Job) -> Option<String> {
    let (arrived, (at, words)) = (job.arrived?, job.disputed.as_ref()?);
    Some(format!(
        "{} slots arrived at {}, and their giver {} said at {} that they did not ({words}): what it acknowledged until it heard of \
         it may be lost",
        named(&job.slots),
        arrived.seq,
        job.from,
        at.seq,
    ))
}

/// Slots that had an owner and have none: an owner that is lost is replaced, never forgotten.
fn shrunk(changes: &[Change]) -> impl Iterator<Item = (Seq, String)> {
    changes.iter().filter(|change| change.to.is_none()).map(|change| {
        let Change { at, from, to: _, slots, job: _, finished: _ } = change;
        let from = from.map_or_else(|| "nobody".to_owned(), |id| id.to_string());
        (at.seq, format!("{} slots were those of shard {from} and are nobody's", named(slots)))
    })
}

/// Slots that were handed over twice with no change of the spec and no failover since the first job was sent: the plan had no reason to
/// change.
fn moved_twice(records: &[Record], changes: &[Change]) -> Vec<(Seq, String)> {
    let is_reason = |r: &&Record| match line::decided(r).and_then(|d| d.operation.as_ref()) {
        Some(OperationChange::Open { kind, .. } | OperationChange::Close { kind }) => {
            *kind == OperationKind::Failover
        }
        Some(OperationChange::Advance { .. }) | None => matches!(r.event, Event::SpecChanged(_)),
    };
    let mut reasons = records.iter().filter(is_reason).map(|r| r.seq).peekable();
    let (mut last_reason, mut moved, mut found) = (Seq(0), SlotSet::default(), Vec::new());
    for change in changes {
        while let Some(reason) = reasons.next_if(|seq| *seq <= change.at.seq) {
            (last_reason, moved) = (reason, SlotSet::default());
        }
        // Whoever else moves slots, or leaves them half moved, is answerable for himself, and whoever moves them back has a reason.
        let Some(sent) = change.job.filter(|_| !change.finished) else {
            moved = moved.without(&change.slots);
            continue;
        };
        let again = moved.common(&change.slots);
        if !again.is_empty() {
            found.push((change.at.seq, format!("{} slots moved again without a reason", named(&again))));
        }
        if sent > last_reason {
            moved = moved.with(&change.slots);
        }
    }
    found
}

impl Reshard {
    fn heading(&self) -> String {
        let ended = match &self.ended {
            Some((at, code)) => format!("{code} at {}", at.seq),
            None => "OPEN".to_owned(),
        };
        let at = self.asked_at.map(|seq| format!(" (record {seq})")).unwrap_or_default();
        let cut = if self.is_cut { "; its beginning is gone" } else { "" };
        format!(
            "reshard {}: {} -> {} shards, asked by {}{at}, {ended}{cut}",
            self.id, self.shards_before, self.shards_wanted, self.asked_by
        )
    }

    fn planned(&self) -> String {
        let mut table = Table::new(["from", "to", "slots first planned"]);
        for Planned { from, to, slots } in &self.plan {
            table.push([from.to_string(), to.to_string(), named(slots)]);
        }
        table.aligned()
    }

    fn told_jobs(&self) -> String {
        let mut table =
            Table::new(["job", "time", "from", "to", "slots", "keys", "accepted", "arrived", "end"]);
        for job in &self.jobs {
            let after = |at: Timestamp| format!("+{} ms", at.millis_since(job.sent.time));
            let accepted = job.outcome.as_ref().filter(|(_, outcome)| *outcome == Outcome::Verified);
            let again = job.again.map(|seq| format!(" (again as {seq})")).unwrap_or_default();
            table.push([
                job.sent.seq.to_string(),
                job.sent.time.to_string(),
                job.from.to_string(),
                job.to.to_string(),
                named(&job.slots),
                job.keys.map_or_else(|| "-".to_owned(), |keys| keys.to_string()),
                accepted.map_or_else(|| "-".to_owned(), |(at, _)| after(at.time)),
                job.arrived.map_or_else(|| "-".to_owned(), |at| after(at.time)),
                format!("{}{again}", job.end()),
            ]);
        }
        table.aligned()
    }

    fn duration_ms(&self) -> Option<i64> {
        self.ended.map(|(at, _)| at.time.millis_since(self.opened))
    }

    /// How many jobs there were, how many were sent again, how many Valkey refused or gave up.
    fn counts(&self) -> [usize; 4] {
        let count = |wanted: &dyn Fn(&Job) -> bool| self.jobs.iter().filter(|job| wanted(job)).count();
        [
            self.jobs.len(),
            count(&|job| job.again.is_some()),
            count(&|job| matches!(job.outcome, Some((_, Outcome::Failed(_))))),
            count(&|job| job.failed.is_some()),
        ]
    }

    fn slots_moved(&self) -> usize {
        self.changes.iter().map(|change| change.slots.len()).sum()
    }

    fn figures(&self) -> Vec<Figure> {
        let mut figures = Vec::new();
        let duration = self.duration_ms().map(|ms| format!("{ms} ms from the first job to the end"));
        figures.push(("duration", duration.unwrap_or_else(|| "not over".to_owned())));
        let [jobs, again, refused, failed] = self.counts();
        let moved = self.slots_moved();
        figures.push((
            "moved",
            format!(
                "{moved} slots; {jobs} jobs, of which {again} sent again, {refused} refused, {failed} failed"
            ),
        ));
        figures.extend(self.stall.map(|Stall { ms, from, until }| {
            ("stall", format!("{ms} ms at most without an arrival, from record {from} to {until}"))
        }));
        figures.extend(self.beside.iter().map(|Beside { what, from, until }| {
            let records = match until {
                Some(until) if until.seq == from.seq => format!("record {}", from.seq),
                Some(until) => format!("records {} to {}", from.seq, until.seq),
                None => format!("from record {} on", from.seq),
            };
            ("meanwhile", format!("{records}: {what}"))
        }));
        figures.extend(self.deviations.iter().map(|text| ("deviation", text.clone())));
        figures.extend(invariants(&self.violations));
        figures
    }
}

impl Report for Reshards {
    fn text(&self) -> String {
        if self.0.is_empty() {
            return "no reshard is recorded\n".to_owned();
        }
        let mut text = String::new();
        for (index, reshard) in self.0.iter().enumerate() {
            let gap = if index == 0 { "" } else { "\n" };
            let _ = writeln!(text, "{gap}{}", reshard.heading());
            let _ = write!(text, "\n{}", indented(&reshard.planned()));
            let _ = writeln!(text, "\n{}", indented(&reshard.told_jobs()));
            text.push_str(&told(reshard.figures()));
        }
        text
    }

    fn csv(&self) -> Option<String> {
        let mut table = Table::new([
            "reshard",
            "asked_by",
            "shards_before",
            "shards_wanted",
            "ended",
            "ms",
            "jobs",
            "again",
            "refused",
            "failed",
            "slots_moved",
            "stall_ms",
        ]);
        for r in &self.0 {
            let [jobs, again, refused, failed] = r.counts().map(|count| count.to_string());
            table.push([
                r.id.to_string(),
                r.asked_by.clone(),
                r.shards_before.to_string(),
                r.shards_wanted.to_string(),
                r.ended.map(|(_, code)| code.to_owned()).unwrap_or_default(),
                r.duration_ms().map(|ms| ms.to_string()).unwrap_or_default(),
                jobs,
                again,
                refused,
                failed,
                r.slots_moved().to_string(),
                r.stall.map(|stall| stall.ms.to_string()).unwrap_or_default(),
            ]);
        }
        Some(table.csv())
    }

    fn finding(&self) -> Finding {
        if self.0.iter().any(|r| !r.violations.is_empty()) { Finding::Found } else { Finding::Clean }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(seq: u64, from: u16, to: Option<u16>, slots: &str) -> Change {
        let at = Stamp { seq: Seq(seq), time: Timestamp(seq as i64 * 1_000_000) };
        let (from, to) = (Some(ShardId(from)), to.map(ShardId));
        Change { at, from, to, slots: slots.parse().unwrap(), job: Some(Seq(seq - 1)), finished: false }
    }

    #[test]
    fn slots_that_are_nobodys_any_more_are_a_violation() {
        let changes = [change(5, 0, Some(1), "1-9"), change(7, 1, None, "3")];
        let told: Vec<_> = shrunk(&changes).collect();
        assert_eq!(told, [(Seq(7), "1 (3) slots were those of shard 1 and are nobody's".to_owned())]);
    }

    #[test]
    fn the_longest_time_without_an_arrival_may_be_the_first() {
        let opened = Stamp { seq: Seq(1), time: Timestamp(1_000_000) };
        let changes = [change(5, 0, Some(1), "1"), change(7, 0, Some(1), "2")];
        let longest = stall(opened, &changes);
        assert_eq!(longest, Some(Stall { ms: 4, from: Seq(1), until: Seq(5) }));
        assert_eq!(stall(opened, &[]), None);
    }

    #[test]
    fn what_went_elsewhere_twice_or_not_at_all_is_a_deviation() {
        let plan = [Planned { from: ShardId(0), to: ShardId(2), slots: "1-9".parse().unwrap() }];
        assert_eq!(deviations(&plan, &[change(5, 0, Some(2), "1-9")], true), Vec::<String>::new());
        let changes =
            [change(5, 0, Some(2), "1-4"), change(7, 2, Some(1), "4"), change(9, 0, Some(1), "5-8")];
        let told = [
            "1 (4) slots went from 2 to 1 at 7, as was not planned at first",
            "4 (5-8) slots went from 0 to 1 at 9, as was not planned at first",
            "1 (4) slots moved more than once",
        ];
        assert_eq!(deviations(&plan, &changes, false), told);
        let left = deviations(&plan, &changes, true);
        assert_eq!(left.last().map(String::as_str), Some("1 (9) slots stayed where they were"));
    }
}
