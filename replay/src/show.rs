//! `show SEQ`: one record in full, with the effects, outcomes and readings that belong to it.

use crate::{
    Error, batch,
    history::History,
    line::{self, Joined},
    report::{Finding, Report},
    table::Table,
};
use serde::Serialize;
use std::fmt::Write;
use valkeeper_core::{
    decision::{BlockReason, Decision, WaitReason},
    effect::Outcome,
    event::{Event, Record},
    ids::{EffectId, Seq, Timestamp},
    observation::{Evidence, Executed},
};

/// One effect of a decision and what became of it.
#[derive(Clone, Debug, Serialize)]
pub struct EffectShown {
    /// Its identity: the same in logs of the executor.
    pub id: EffectId,
    /// What was to be done.
    pub text: String,
    /// What became of it, if that is recorded.
    pub outcome: Option<String>,
    /// Milliseconds from the decision to its end, if the record of the decision is there.
    pub ended_after_ms: Option<i64>,
}

/// One record in full.
#[derive(Clone, Debug, Serialize)]
pub struct Shown<'a> {
    /// The record as it is in the journal.
    pub record: &'a Record,
    /// Its line.
    pub text: String,
    /// What its reason codes mean.
    pub explained: Vec<(&'static str, &'static str)>,
    /// Effects of the decision that the record makes or ends.
    pub effects: Vec<EffectShown>,
    /// Sequence of the record that ended or closed the decision.
    pub ended_by: Option<Seq>,
}

/// Finds a record. Errors: as [`History::record`].
pub fn show(history: &History, seq: Seq) -> Result<Shown<'_>, Error> {
    let joined = Joined::new(history);
    let record = history.record(seq)?;
    let deciding = line::ended(record).map_or(seq, |executed| executed.decision);
    let decision = joined.decision(deciding);
    let end = joined.end(deciding);
    let executed = end.and_then(line::ended);
    let uid = history.end().cluster_uid;
    let begun = history.record(deciding).ok().map(|r| r.time);
    let effects = decision.map(|d| effects(d, &uid, deciding, begun, executed)).unwrap_or_default();
    let ended_by = end.filter(|_| decision.is_some()).map(|r| r.seq);
    Ok(Shown { record, text: joined.text(record), explained: explained(record), effects, ended_by })
}

fn effects(
    decision: &Decision,
    uid: &str,
    seq: Seq,
    begun: Option<Timestamp>,
    executed: Option<&Executed>,
) -> Vec<EffectShown> {
    let named = decision.reissue_of.unwrap_or(seq);
    let outcome = |i: usize| -> Option<&(Timestamp, Outcome)> { executed.and_then(|e| e.outcomes.get(i)) };
    let shown = decision.effects.iter().enumerate().map(|(i, effect)| EffectShown {
        id: EffectId::derive(uid, named, i),
        text: effect.to_string(),
        outcome: outcome(i).map(|(_, outcome)| outcome.to_string()),
        ended_after_ms: outcome(i).zip(begun).map(|((at, _), begun)| at.millis_since(begun)),
    });
    shown.collect()
}

/// Codes in a record with their explanations, each once.
fn explained(record: &Record) -> Vec<(&'static str, &'static str)> {
    let mut codes = Vec::new();
    if let Some(decision) = line::decided(record) {
        codes.push((decision.reason.code(), decision.reason.explain()));
        let rejected = decision.candidates.iter().filter_map(|c| c.rejected);
        codes.extend(rejected.map(|r| (r.code(), r.explain())));
    }
    if let Event::StandingChanged { standing, evidence: _ } = &record.event {
        let blocks = standing.blocks.iter().map(|b| b.reason);
        codes.extend(blocks.map(|r: BlockReason| (r.code(), r.explain())));
        let rejected = standing.blocks.iter().flat_map(|b| &b.candidates).filter_map(|c| c.rejected);
        codes.extend(rejected.map(|r| (r.code(), r.explain())));
        let waits = standing.waits.iter().map(|w| w.reason);
        codes.extend(waits.map(|r: WaitReason| (r.code(), r.explain())));
    }
    let mut seen = std::collections::BTreeSet::new();
    codes.retain(|(code, _)| seen.insert(*code));
    codes
}

impl Shown<'_> {
    fn readings(&self, text: &mut String, evidence: &Evidence) {
        if evidence.readings.is_empty() {
            text.push_str("\nno readings\n");
            return;
        }
        let mut table = Table::new(["reading", "offset", "age", "last io", "replicas online"]);
        for (member, reading) in &evidence.readings {
            table.push([
                member.to_string(),
                reading.offset.to_string(),
                format!("{} ms", self.record.time.millis_since(reading.taken_at)),
                reading.last_io_ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms} ms")),
                reading.replicas_online.to_string(),
            ]);
        }
        let _ = write!(text, "\n{}", table.aligned());
    }

    fn decision(&self, text: &mut String, decision: &Decision) {
        let _ = writeln!(text, "step     {:?}, {}", decision.step, decision.scope);
        if let Some(member) = decision.grant {
            let _ = writeln!(text, "grant    {member} (number {})", self.record.seq);
        }
        if !decision.candidates.is_empty() {
            let mut table = Table::new(["candidate", "offset", "verdict"]);
            for c in &decision.candidates {
                let offset = c.offset.map_or_else(|| "unknown".to_owned(), |o| o.to_string());
                table.push([
                    c.member.to_string(),
                    offset,
                    c.rejected.map_or("chosen", |r| r.code()).to_owned(),
                ]);
            }
            let _ = write!(text, "\n{}", table.aligned());
        }
        for discard in &decision.discards {
            let _ = writeln!(text, "\ndiscard  {}", line::discard(discard));
        }
    }
}

impl Report for Shown<'_> {
    fn text(&self) -> String {
        let record = self.record;
        let mut text = String::new();
        let _ = writeln!(text, "seq      {} ({})", record.seq, record.event.name());
        let _ = writeln!(text, "time     {}", record.time);
        let _ = writeln!(text, "epoch    {}", record.epoch);
        let _ = writeln!(text, "what     {}", self.text);
        if let Some(decision) = line::decided(record) {
            self.decision(&mut text, decision);
        }
        if let Some(evidence) = batch::evidence(record) {
            self.readings(&mut text, evidence);
        }
        if !self.effects.is_empty() {
            let mut table = Table::new(["effect", "outcome", "after", "id"]);
            for effect in &self.effects {
                let after = effect.ended_after_ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms} ms"));
                let outcome = effect.outcome.clone().unwrap_or_else(|| "not recorded".to_owned());
                table.push([effect.text.clone(), outcome, after, effect.id.to_string()]);
            }
            let _ = write!(text, "\n{}", table.aligned());
            let ended =
                self.ended_by.map_or_else(|| "still open".to_owned(), |seq| format!("ended by record {seq}"));
            let _ = writeln!(text, "{ended}");
        }
        if !self.explained.is_empty() {
            text.push('\n');
        }
        for (code, meaning) in &self.explained {
            let _ = writeln!(text, "{code}: {meaning}");
        }
        text
    }

    fn csv(&self) -> Option<String> {
        None
    }

    fn finding(&self) -> Finding {
        Finding::Clean
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::story;

    #[test]
    fn a_decision_is_shown_with_candidates_readings_effects_and_outcomes() {
        let records = History::from(story::failover());
        let text = show(&records, Seq(13)).unwrap().text();
        for expected in [
            "grant    0-1 (number 13)",
            "0-2        1180     Behind",
            "0-1      1200    0 ms  100 ms",
            "8 ms   ",
            "ended by record 14",
            "LostPrimary: It is the lost primary itself.",
        ] {
            assert!(text.contains(expected), "{expected:?} in\n{text}");
        }
    }

    #[test]
    fn outcomes_are_shown_with_the_effects_that_had_them() {
        let records = History::from(story::failover());
        let shown = show(&records, Seq(22)).unwrap();
        assert_eq!(shown.effects[0].outcome.as_deref(), Some("failed: timed out"));
        assert_eq!(shown.effects[0].ended_after_ms, Some(100));
        assert_eq!(shown.effects[0].id, EffectId::derive("5f0c1d2e-uid", Seq(20), 0));
    }

    #[test]
    fn a_record_that_is_not_there_is_named_with_the_range_that_is() {
        let records = History::from(story::failover());
        let error = show(&records, Seq(99)).unwrap_err();
        assert_eq!(error.to_string(), "there is no record 99: the stream holds 1 to 22");
        assert!(error.is_usage());
    }
}
