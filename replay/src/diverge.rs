//! `diverge`: what would today's policy decide? At each turn that recorded a decision or a change of standing, the rules
//! run again over the state before it and the recorded readings. Recorded history is never changed by this.

use crate::{
    batch::{Batch, batches, evidence},
    history::History,
    line,
    report::{Finding, Report},
    rules::Policy,
    table::Table,
};
use serde::Serialize;
use std::fmt::Write;
use valkeeper_core::{
    decision::{Decision, Standing, Verdict},
    event::Record,
    ids::{Seq, Timestamp},
    observation::Evidence,
    state::ClusterState,
};

/// A turn that would go otherwise.
#[derive(Clone, Debug, Serialize)]
pub struct Divergence {
    /// First record of the recorded judgement.
    pub seq: Seq,
    /// RFC 3339, UTC.
    pub time: String,
    /// Recorded decisions that are not made now.
    pub only_recorded: Vec<Decision>,
    /// Decisions made now that are not recorded.
    pub only_today: Vec<Decision>,
    /// Recorded and present standing, if they differ.
    pub standing: Option<(Standing, Standing)>,
}

/// The answer of `diverge`.
#[derive(Clone, Debug, Serialize)]
pub struct Divergences {
    /// The policy that decided again.
    pub policy: &'static str,
    /// Turns that were judged again.
    pub turns_judged: usize,
    /// Recorded decisions in them.
    pub decisions_judged: usize,
    /// First record of a turn that is not judged, because the beginning of it is gone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cut_turn: Option<Seq>,
    /// Turns that differ.
    pub divergences: Vec<Divergence>,
}

/// Judges every turn again by `policy`.
pub fn diverge(history: &History, policy: Policy) -> Divergences {
    diverge_by(history, policy.name(), |state, evidence, now| policy.decide(state, evidence, now))
}

/// Judges every turn again by any function.
pub fn diverge_by(
    history: &History,
    policy: &'static str,
    decide: impl Fn(&ClusterState, &Evidence, Timestamp) -> Verdict,
) -> Divergences {
    let mut found =
        Divergences { policy, turns_judged: 0, decisions_judged: 0, divergences: Vec::new(), cut_turn: None };
    let mut state = history.start().clone();
    for (index, batch) in batches(history.records()).enumerate() {
        batch.seen.iter().for_each(|record| state.apply(record));
        if index == 0 && is_cut_through(history, &batch) {
            found.cut_turn = batch.judged.first().map(|r| r.seq);
        } else if batch.evidence().is_some() {
            let divergence = judge(&state, batch.judged, &decide);
            found.turns_judged += 1;
            found.decisions_judged += batch.judged.iter().filter_map(line::decided).count();
            found.divergences.extend(divergence);
        }
        batch.judged.iter().for_each(|record| state.apply(record));
    }
    found
}

/// True if records that are gone may belong to the first turn: then what is left of its judgement is no whole one.
fn is_cut_through(history: &History, first: &Batch<'_>) -> bool {
    let same = |record: &Record| {
        history.gone().is_some_and(|gone| gone.until == record.time) && history.start().epoch == record.epoch
    };
    first.seen.is_empty() && first.judged.first().is_some_and(same)
}

/// Decides again what is recorded as `judged` after `state`; `None` if it would be the same.
fn judge(
    state: &ClusterState,
    judged: &[Record],
    decide: &impl Fn(&ClusterState, &Evidence, Timestamp) -> Verdict,
) -> Option<Divergence> {
    let (first, evidence) = (judged.first()?, judged.iter().find_map(evidence)?);
    let verdict = decide(state, evidence, first.time);
    let whole = compare(first, judged, &verdict, &after(state, judged).standing)?;
    // While time stands still (a clock that was set back, a simulation), a decision without effects and what the next
    // turn made of it look like one turn. They are the same if they are the same one after the other.
    for (split, record) in (1..judged.len()).zip(judged) {
        if !line::decided(record).is_some_and(|d| d.effects.is_empty()) {
            continue;
        }
        let Some((turn, next)) = judged.split_at_checked(split) else { break };
        let then = after(state, turn);
        if compare(first, turn, &verdict, &then.standing).is_none() && judge(&then, next, decide).is_none() {
            return None;
        }
    }
    Some(whole)
}

fn after(state: &ClusterState, records: &[Record]) -> ClusterState {
    let mut state = state.clone();
    records.iter().for_each(|record| state.apply(record));
    state
}

fn compare(first: &Record, judged: &[Record], verdict: &Verdict, standing: &Standing) -> Option<Divergence> {
    let Verdict { decisions, standing: standing_today, wake_at: _ } = verdict;
    let mut only_today: Vec<Decision> = decisions.iter().map(without_reissue).collect();
    let mut only_recorded = Vec::new();
    for decision in judged.iter().filter_map(line::decided) {
        let decision = without_reissue(decision);
        match only_today.iter().position(|d| *d == decision) {
            Some(same) => {
                only_today.remove(same);
            }
            None => only_recorded.push(decision),
        }
    }
    let standing = (standing != standing_today).then(|| (standing.clone(), standing_today.clone()));
    let differs = !only_recorded.is_empty() || !only_today.is_empty() || standing.is_some();
    let (seq, time) = (first.seq, first.time.to_string());
    differs.then_some(Divergence { seq, time, only_recorded, only_today, standing })
}

/// The turn sets `reissue_of` after `decide()`: it is no part of the verdict.
fn without_reissue(decision: &Decision) -> Decision {
    Decision { reissue_of: None, ..decision.clone() }
}

/// Names of the fields in which two decisions differ, for when their lines read the same.
fn fields_that_differ(a: &Decision, b: &Decision) -> Vec<&'static str> {
    let differing = [
        ("step", a.step != b.step),
        ("scope", a.scope != b.scope),
        ("reason", a.reason != b.reason),
        ("about", a.about != b.about),
        ("operation", a.operation != b.operation),
        ("grant", a.grant != b.grant),
        ("candidates", a.candidates != b.candidates),
        ("discards", a.discards != b.discards),
        ("effects", a.effects != b.effects),
    ];
    differing.into_iter().filter_map(|(name, differs)| differs.then_some(name)).collect()
}

impl Divergence {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = Vec::new();
        let told = |d: &Decision| {
            let candidates: Vec<String> = d.candidates.iter().map(line::candidate).collect();
            let candidates =
                if candidates.is_empty() { String::new() } else { format!(" [{}]", candidates.join(", ")) };
            format!("{}{candidates}", line::decision(d))
        };
        lines.extend(self.only_recorded.iter().map(|d| ("recorded", told(d))));
        lines.extend(self.only_today.iter().map(|d| ("now", told(d))));
        if let ([recorded], [today]) = (self.only_recorded.as_slice(), self.only_today.as_slice()) {
            lines.push(("differ in", fields_that_differ(recorded, today).join(", ")));
        }
        if let Some((recorded, today)) = &self.standing {
            lines.push(("recorded", line::standing(recorded)));
            lines.push(("now", line::standing(today)));
        }
        lines
    }
}

impl Report for Divergences {
    fn text(&self) -> String {
        let Divergences { policy, turns_judged, decisions_judged, cut_turn, divergences } = self;
        let mut text = String::new();
        if let Some(seq) = cut_turn {
            let _ = writeln!(text, "the turn of record {seq} is not judged: its beginning is gone");
        }
        for divergence in divergences {
            let _ = writeln!(text, "{}  seq {}", divergence.time, divergence.seq);
            for (who, what) in divergence.lines() {
                let _ = writeln!(text, "  {who:<9}  {what}");
            }
        }
        let verdict = match divergences.len() {
            0 => "every one would be decided the same".to_owned(),
            1 => "1 turn would go otherwise".to_owned(),
            n => format!("{n} turns would go otherwise"),
        };
        let _ = writeln!(
            text,
            "{turns_judged} turns with {decisions_judged} decisions judged again (policy {policy}): {verdict}"
        );
        text
    }

    fn csv(&self) -> Option<String> {
        let mut table = Table::new(["seq", "time", "which", "text"]);
        for divergence in &self.divergences {
            for (which, text) in divergence.lines() {
                table.push([divergence.seq.to_string(), divergence.time.clone(), which.to_owned(), text]);
            }
        }
        Some(table.csv())
    }

    fn finding(&self) -> Finding {
        Finding::of(&self.divergences)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::story;
    use valkeeper_core::{event::Event, ids::MemberId};
    use valkeeper_journal::{Folded, Lineage, StreamId};

    /// A policy that knows the story by heart: what is recorded at each sequence it is asked about.
    fn by_heart(records: &[Record]) -> impl Fn(&ClusterState, &Evidence, Timestamp) -> Verdict {
        move |state, _, _| {
            let after: Vec<&Record> = records
                .iter()
                .filter(|r| r.seq > state.head)
                .take_while(|r| crate::batch::evidence(r).is_some())
                .collect();
            let decisions = after.iter().filter_map(|r| line::decided(r)).cloned().collect();
            let mut then = state.clone();
            after.iter().for_each(|r| then.apply(r));
            Verdict { decisions, standing: then.standing, wake_at: None }
        }
    }

    #[test]
    fn the_same_policy_decides_the_same() {
        let records = story::failover();
        let found = diverge_by(&records.clone().into(), "by heart", by_heart(&records));
        assert_eq!((found.turns_judged, found.decisions_judged), (4, 4));
        assert_eq!(found.finding(), Finding::Clean, "{}", found.text());
        assert!(found.text().ends_with("every one would be decided the same\n"));
    }

    #[test]
    fn another_choice_is_found_where_it_was_made() {
        let records = story::failover();
        let same = by_heart(&records);
        let found = diverge_by(&records.clone().into(), "other", |state, evidence, now| {
            let mut verdict = same(state, evidence, now);
            for decision in &mut verdict.decisions {
                decision.grant = decision.grant.map(|_| MemberId::new(0, 2));
            }
            verdict
        });
        let seqs: Vec<u64> = found.divergences.iter().map(|d| d.seq.0).collect();
        assert_eq!(seqs, [11, 13]);
        assert!(found.text().contains("  differ in  grant\n"), "{}", found.text());
        assert_eq!(found.finding(), Finding::Found);
    }

    #[test]
    fn a_reissue_and_its_original_are_the_same_decision() {
        let mut records = story::failover();
        let truth = records.clone();
        if let Event::Decided { decision, evidence: _ } = &mut records[12].event {
            decision.reissue_of = Some(Seq(5));
        }
        assert_eq!(
            diverge_by(&records.clone().into(), "by heart", by_heart(&truth)).finding(),
            Finding::Clean
        );
    }

    #[test]
    fn two_turns_of_one_time_are_judged_one_after_the_other() {
        let mut book = story::adopted();
        let readings = || story::readings(10, &[(0, 1000), (1, 1000), (2, 1000)]);
        let waits = story::syncing(0);
        let seq = book.add(10, Event::StandingChanged { standing: waits.clone(), evidence: readings() });
        let adopts = line::decided(&book.0[10]).cloned();
        let found = diverge_by(&book.0.clone().into(), "two turns", |state, _, _| match &adopts {
            Some(adopts) if state.head < Seq(seq.0 - 1) => {
                Verdict { decisions: vec![adopts.clone()], ..Verdict::default() }
            }
            Some(_) | None => Verdict { standing: waits.clone(), ..Verdict::default() },
        });
        assert_eq!(found.finding(), Finding::Clean, "{}", found.text());
    }

    #[test]
    fn another_standing_is_a_divergence_too() {
        let records = story::failover();
        let same = by_heart(&records);
        let found = diverge_by(&records.clone().into(), "hasty", |state, evidence, now| Verdict {
            standing: Standing::default(),
            ..same(state, evidence, now)
        });
        let seqs: Vec<u64> = found.divergences.iter().map(|d| d.seq.0).collect();
        assert_eq!(seqs, [20]);
        assert!(found.text().contains("now        nothing waits"), "{}", found.text());
    }

    #[test]
    fn a_turn_that_was_cut_through_is_not_judged_and_those_after_it_are() {
        let records = story::failover();
        // After record 20 the second half of a judgement is left: one standing without the decision that led to it.
        for (through, cut_turn, judged) in
            [(20, Some(Seq(21)), 0), (19, Some(Seq(20)), 0), (18, None, 1), (13, None, 2)]
        {
            let (gone, left) = records.split_at(through);
            let head = story::sealed(gone).last().unwrap().head();
            let state = ClusterState::fold(gone);
            let folded = Folded::new(&StreamId("5f0c1d2e-uid".into()), head, Lineage::FIRST, &state).unwrap();
            let history = History::new(Some(&folded), left.to_vec());
            let found = diverge_by(&history, "by heart", by_heart(&records));
            assert_eq!((found.cut_turn, found.turns_judged), (cut_turn, judged), "cut after {through}");
            assert_eq!(found.finding(), Finding::Clean, "{}", found.text());
        }
    }
}
