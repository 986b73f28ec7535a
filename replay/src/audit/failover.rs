//! `audit failover`: each failover from the last sign of the old primary to the end, with what was measured said exactly.

use super::{Figure, indented, invariants, told};
use crate::{
    batch::evidence,
    history::History,
    line::{self, Joined},
    report::{Finding, Report},
    rules,
    table::Table,
};
use serde::Serialize;
use std::fmt::Write;
use valkeeper_core::{
    decision::{Candidate, Decision, Discard, Operation, OperationChange, OperationKind, Reason, Scope},
    effect::{Effect, Outcome},
    event::{Event, Record},
    ids::{MemberId, ReplId, Seq, Timestamp},
    observation::{Evidence, Observed, ServerFacts, ServerRole},
};

/// A point on the way of a failover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Milestone {
    /// What happened.
    pub what: String,
    /// The record that shows it.
    pub seq: Seq,
    /// When it happened: the time of the record, or of the outcome within it.
    pub time: Timestamp,
    /// Milliseconds since the milestone before.
    pub after_ms: Option<i64>,
}

/// How long writes had nowhere to go, as far as a journal can tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Outage {
    /// From the record that shows the loss to the write route verified, or to the promotion where nothing was routed.
    pub from_loss_ms: i64,
    /// From the last sign of the old primary instead: the outage cannot have been longer.
    pub from_last_sign_ms: Option<i64>,
    /// The end that was measured to.
    pub until: String,
}

/// What the promotion left behind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Loss {
    /// Last known offset of the old primary minus the offset of the chosen, at least 0, in bytes.
    pub known_bytes: i64,
    /// Last known offset of the old primary.
    pub old_offset: i64,
    /// Age of that reading at the promotion, milliseconds. What was written since is not counted.
    pub reading_age_ms: i64,
    /// Offset of the chosen.
    pub chosen_offset: i64,
}

/// One failover.
#[derive(Clone, Debug, Serialize)]
pub struct Failover {
    /// The record that opened it.
    pub id: Seq,
    /// True if its beginning is gone: it was open where the stream was cut, and what is said of it is what is left.
    pub is_cut: bool,
    /// What failed over.
    pub scope: Scope,
    /// The primary that was lost.
    pub lost: Option<MemberId>,
    /// The member that was promoted, or was to be.
    pub chosen: Option<MemberId>,
    /// How it ended, with the code of the decision that closed it; `None` if it is open.
    pub ended: Option<(Seq, &'static str)>,
    /// From the last sign of the old primary to the end.
    pub milestones: Vec<Milestone>,
    /// Members considered in the last promoting decision, best first.
    pub candidates: Vec<Candidate>,
    /// Readings that it was made from.
    pub evidence: Evidence,
    /// Outage, if the write route came back.
    pub outage: Option<Outage>,
    /// Loss, if the old primary's and the chosen's offsets are known.
    pub loss: Option<Loss>,
    /// Writes that were discarded, as recorded when the old primary returned.
    pub discards: Vec<Discard>,
    /// Invariants that records of this failover break.
    pub violations: Vec<(Seq, String)>,
}

/// Every failover of a stream.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub struct Failovers(pub Vec<Failover>);

/// Audits every failover in a stream; also one whose beginning is gone, as far as it is there.
pub fn failovers(history: &History) -> Failovers {
    let (records, violations) = (history.records(), rules::violations(history));
    let opened = records.iter().enumerate().filter_map(|(index, r)| {
        let decision = line::decided(r).filter(|d| opens(d))?;
        Some((index, Opening::recorded(r.seq, decision)))
    });
    let open = history.start().operations.iter().filter(|o| o.kind == OperationKind::Failover);
    let open = open.map(|operation| (0, Opening::gone(operation)));
    let joined = Joined::new(history);
    let stories = open.chain(opened).filter_map(|(at, opening)| Story::new(records, &joined, at, opening));
    Failovers(stories.map(|story| story.audit(&violations)).collect())
}

fn opens(decision: &Decision) -> bool {
    matches!(&decision.operation, Some(OperationChange::Open { kind: OperationKind::Failover, .. }))
}

fn closes(decision: &Decision) -> bool {
    matches!(&decision.operation, Some(OperationChange::Close { kind: OperationKind::Failover }))
}

/// How a failover began.
struct Opening {
    seq: Seq,
    scope: Scope,
    lost: Option<MemberId>,
    /// True if it began because the old primary refused its clients, which answered all the while.
    refused: bool,
    /// True if the record of it is in the stream.
    recorded: bool,
}

impl Opening {
    fn recorded(seq: Seq, decision: &Decision) -> Opening {
        let lost = match &decision.operation {
            Some(OperationChange::Open { member, .. }) => member.or(decision.about),
            Some(OperationChange::Advance { .. } | OperationChange::Close { .. }) | None => decision.about,
        };
        let refused = decision.reason == Reason::PrimaryShutOut;
        Opening { seq, scope: decision.scope, lost, refused, recorded: true }
    }

    fn gone(operation: &Operation) -> Opening {
        let refused = operation.cause == Reason::PrimaryShutOut;
        Opening {
            seq: operation.id,
            scope: operation.scope,
            lost: operation.member,
            refused,
            recorded: false,
        }
    }
}

/// The records of one failover and where it lies among the others.
struct Story<'a> {
    before: &'a [Record],
    opening: Opening,
    /// From the opening record, or the first that is there, to the next failover of the same scope, or the end of the stream.
    after: &'a [Record],
    joined: &'a Joined<'a>,
    /// The record that closed it and its decision.
    closing: Option<(&'a Record, &'a Decision)>,
}

impl<'a> Story<'a> {
    /// The story that begins at an index.
    fn new(records: &'a [Record], joined: &'a Joined<'a>, index: usize, opening: Opening) -> Option<Self> {
        let (before, rest) = records.split_at_checked(index)?;
        let (seq, scope) = (opening.seq, opening.scope);
        let again =
            |r: &Record| r.seq != seq && line::decided(r).is_some_and(|d| d.scope == scope && opens(d));
        let end = rest.iter().position(again).unwrap_or(rest.len());
        let after = rest.get(..end)?;
        let mut decisions = after.iter().filter_map(|r| line::decided(r).map(|d| (r, d)));
        let closing = decisions.find(|(_, d)| d.scope == scope && closes(d));
        Some(Story { before, opening, after, joined, closing })
    }

    /// Records of the operation itself.
    fn during(&self) -> &'a [Record] {
        let end = self.closing.and_then(|(closing, _)| self.after.iter().position(|r| r.seq == closing.seq));
        end.and_then(|i| self.after.get(..=i)).unwrap_or(self.after)
    }

    fn decisions(&self) -> impl Iterator<Item = (&'a Record, &'a Decision)> {
        let scope = self.opening.scope;
        self.during()
            .iter()
            .filter_map(move |r| line::decided(r).filter(|d| d.scope == scope).map(|d| (r, d)))
    }

    /// The last decision to promote, with whom and at which history and offset.
    fn promotion(&self) -> Option<(&'a Record, &'a Decision, Promoted<'a>)> {
        let promoting = |d: &'a Decision| d.effects.iter().find_map(promoted);
        self.decisions().filter_map(|(r, d)| promoting(d).map(|p| (r, d, p))).last()
    }

    /// Whom a decision promotes that is gone, if its outcome was still open where the stream was cut.
    fn chosen_before(&self) -> Option<MemberId> {
        let gone = self.joined.decisions_before(self.after.first()?.seq);
        let mut gone = gone.filter(|d| !self.opening.recorded && d.scope == self.opening.scope);
        gone.find_map(|d| d.effects.iter().find_map(promoted)).map(|promoted| promoted.member)
    }

    fn audit(&self, violations: &[(Seq, String)]) -> Failover {
        let promotion = self.promotion();
        let chosen =
            promotion.as_ref().map(|(_, _, promoted)| promoted.member).or_else(|| self.chosen_before());
        let last_sign = self.last_sign();
        let loss_seen = self.loss_seen();
        let done = |wanted: &dyn Fn(&Effect) -> bool| self.verified(wanted);
        let promoted = chosen.and_then(|c| {
            let seen = || self.seen(|e| is_primary(e, c)).map(|(seq, time)| (seq, time, "seen"));
            done(&|e| promoted(e).is_some_and(|p| p.member == c))
                .map(|(s, t)| (s, t, "verified"))
                .or_else(seen)
        });
        let routed = chosen.and_then(|c| {
            done(&|e| matches!(e, Effect::Route { to, .. } if *to == c))
                .map(|(seq, time)| (seq, time, "verified"))
        });
        let mut milestones = Vec::new();
        let mut add = |what: String, seq: Seq, time: Timestamp| {
            milestones.push(Milestone { what, seq, time, after_ms: None });
        };
        if let Some((seq, time)) = last_sign {
            add("last recorded sign of the old primary".to_owned(), seq, time);
        }
        if let Some(record) = loss_seen {
            add(format!("loss seen: {}", line::text(record)), record.seq, record.time);
        }
        // A change of operator on the way explains a late look and a decision made twice.
        let since = last_sign.map_or(self.opening.seq, |(seq, _)| seq);
        let way = self.before.iter().filter(|r| r.seq > since).chain(self.during());
        for record in way.filter(|r| matches!(r.event, Event::EpochStarted { .. })) {
            add(line::text(record), record.seq, record.time);
        }
        for (record, decision) in self.decisions() {
            let about = decision.about.map(|m| format!(" {m}")).unwrap_or_default();
            let effects: Vec<String> = decision.effects.iter().map(line::effect_name).collect();
            let effects =
                if effects.is_empty() { String::new() } else { format!(": {}", effects.join(", ")) };
            add(format!("decided {}{about}{effects}", decision.reason), record.seq, record.time);
        }
        if let Some((seq, time, how)) = promoted {
            add(format!("promotion {how}"), seq, time);
        }
        if let Some((seq, time, how)) = routed {
            add(format!("write route {how}"), seq, time);
        }
        let end = routed.map(|(_, time, _)| (time, "the write route verified")).or_else(|| {
            promoted.map(|(_, time, _)| (time, "the promotion (no move of the write route is recorded)"))
        });
        let during = self.during();
        let within =
            |seq: Seq| during.first().zip(during.last()).is_some_and(|(a, z)| a.seq <= seq && seq <= z.seq);
        Failover {
            id: self.opening.seq,
            is_cut: !self.opening.recorded,
            scope: self.opening.scope,
            lost: self.opening.lost,
            chosen,
            ended: self.closing.map(|(record, decision)| (record.seq, decision.reason.code())),
            milestones: in_order(milestones),
            candidates: promotion.as_ref().map(|(_, d, _)| d.candidates.clone()).unwrap_or_default(),
            evidence: promotion.as_ref().and_then(|(r, _, _)| evidence(r)).cloned().unwrap_or_default(),
            outage: end.and_then(|(time, until)| outage(last_sign, loss_seen, time, until)),
            loss: promotion.and_then(|(record, _, promoted)| self.loss(record, &promoted)),
            discards: self.discards(),
            violations: violations.iter().filter(|(seq, _)| within(*seq)).cloned().collect(),
        }
    }

    /// Last record that shows the old primary as primary, or the last reading of it while it was, if that is later.
    fn last_sign(&self) -> Option<(Seq, Timestamp)> {
        let lost = self.opening.lost?;
        let shown = self.before.iter().rev().find(|r| is_primary(&r.event, lost))?;
        let until = self.loss_seen().map_or(self.opening.seq, |r| r.seq);
        let readings = self.before.iter().filter(|r| r.seq > shown.seq && r.seq < until);
        let taken = readings.filter_map(|r| Some((r.seq, evidence(r)?.readings.get(&lost)?.taken_at)));
        taken.chain([(shown.seq, shown.time)]).max_by_key(|(_, time)| *time)
    }

    /// First record after the last that showed the old primary as primary: gone, silent, or something else.
    fn loss_seen(&self) -> Option<&'a Record> {
        let lost = self.opening.lost?;
        let serves =
            |e: &Event| matches!(e, Event::NodeChanged { member, node } if *member == lost && !node.down);
        let shown = |e: &Event| is_primary(e, lost) || self.opening.refused && serves(e);
        let last = self.before.iter().rposition(|r| shown(&r.event));
        let since = self.before.get(last.map_or(0, |i| i + 1)..)?;
        let gone = |e: &Event| matches!(e, Event::ServerChanged { member, server: _ } if *member == lost);
        let refuses =
            |e: &Event| matches!(e, Event::NodeChanged { member, node } if *member == lost && node.down);
        since.iter().find(|r| gone(&r.event) || self.opening.refused && refuses(&r.event))
    }

    /// When an effect of a decision of this scope was verified.
    fn verified(&self, wanted: &dyn Fn(&Effect) -> bool) -> Option<(Seq, Timestamp)> {
        let scope = self.opening.scope;
        let decided = |seq: Seq| self.joined.decision(seq).filter(|d| d.scope == scope);
        self.after.iter().filter_map(|r| line::ended(r).map(|executed| (r.seq, executed))).find_map(
            |(seq, executed)| {
                let effects = decided(executed.decision)?.effects.iter().zip(&executed.outcomes);
                let mut done =
                    effects.filter(|(effect, (_, outcome))| *outcome == Outcome::Verified && wanted(effect));
                done.next().map(|(_, (time, _))| (seq, *time))
            },
        )
    }

    fn seen(&self, wanted: impl Fn(&Event) -> bool) -> Option<(Seq, Timestamp)> {
        self.after.iter().find(|r| wanted(&r.event)).map(|r| (r.seq, r.time))
    }

    fn loss(&self, deciding: &Record, promoted: &Promoted<'_>) -> Option<Loss> {
        let lost = self.opening.lost?;
        // Only a reading taken while it was primary of the promoted history can be compared with the chosen's offset.
        let upto = self.loss_seen().map_or(self.opening.seq, |r| r.seq);
        let same_history = |r: &&Record| is_primary_of(&r.event, lost, promoted.replid);
        let since = self.before.iter().rev().find(same_history)?.seq;
        let records = self.before.iter().filter(|r| r.seq >= since && r.seq < upto);
        let last = records.filter_map(|r| evidence(r)?.readings.get(&lost)).max_by_key(|r| r.taken_at)?;
        Some(Loss {
            known_bytes: last.offset.saturating_sub(promoted.offset).max(0),
            old_offset: last.offset,
            reading_age_ms: deciding.time.millis_since(last.taken_at),
            chosen_offset: promoted.offset,
        })
    }

    fn discards(&self) -> Vec<Discard> {
        let decisions = self.after.iter().filter_map(line::decided).filter(|d| d.scope == self.opening.scope);
        decisions.flat_map(|d| d.discards.iter().cloned()).collect()
    }
}

/// Whom a `Promote` promotes.
struct Promoted<'a> {
    member: MemberId,
    replid: &'a ReplId,
    offset: i64,
}

fn promoted(effect: &Effect) -> Option<Promoted<'_>> {
    if let Effect::Promote { server, replid, offset, consents: _, by: _ } = effect {
        Some(Promoted { member: server.member, replid, offset: *offset })
    } else {
        None
    }
}

fn primary_facts(event: &Event, id: MemberId) -> Option<&ServerFacts> {
    if let Event::ServerChanged { member, server: Observed::Present(facts) } = event
        && *member == id
        && facts.role == ServerRole::Primary
    {
        Some(facts)
    } else {
        None
    }
}

fn is_primary(event: &Event, id: MemberId) -> bool {
    primary_facts(event, id).is_some()
}

fn is_primary_of(event: &Event, id: MemberId, history: &ReplId) -> bool {
    primary_facts(event, id).is_some_and(|facts| facts.replid == *history)
}

fn in_order(mut milestones: Vec<Milestone>) -> Vec<Milestone> {
    milestones.sort_by_key(|m| (m.time, m.seq));
    let mut before: Option<Timestamp> = None;
    for milestone in &mut milestones {
        milestone.after_ms = before.map(|b| milestone.time.millis_since(b));
        before = Some(milestone.time);
    }
    milestones
}

fn outage(
    last_sign: Option<(Seq, Timestamp)>,
    loss_seen: Option<&Record>,
    end: Timestamp,
    until: &str,
) -> Option<Outage> {
    let from_loss_ms = end.millis_since(loss_seen?.time);
    let from_last_sign_ms = last_sign.map(|(_, time)| end.millis_since(time));
    Some(Outage { from_loss_ms, from_last_sign_ms, until: until.to_owned() })
}

impl Failover {
    fn heading(&self) -> String {
        let name = |member: Option<MemberId>| member.map_or_else(|| "?".to_owned(), |m| m.to_string());
        let ended = match self.ended {
            Some((seq, code)) => format!("{code} at {seq}"),
            None => "OPEN".to_owned(),
        };
        let cut = if self.is_cut { "; its beginning is gone" } else { "" };
        format!(
            "failover {} of {}: {} -> {}, {ended}{cut}",
            self.id,
            self.scope,
            name(self.lost),
            name(self.chosen)
        )
    }

    fn judgement(&self, text: &mut String) {
        if self.candidates.is_empty() {
            return;
        }
        let mut table = Table::new(["candidate", "offset", "verdict", "why"]);
        for Candidate { member, offset, rejected } in &self.candidates {
            let offset = offset.map_or_else(|| "unknown".to_owned(), |o| o.to_string());
            let (verdict, why) = rejected.map_or(("chosen", ""), |r| (r.code(), r.explain()));
            table.push([member.to_string(), offset, verdict.to_owned(), why.to_owned()]);
        }
        let _ = write!(text, "\n{}", indented(&table.aligned()));
    }

    fn figures(&self) -> Vec<Figure> {
        let mut figures = Vec::new();
        figures.push(match &self.outage {
            Some(Outage { from_loss_ms, from_last_sign_ms, until }) => {
                let bound = from_last_sign_ms
                    .map(|ms| format!("; at most {ms} ms, from the last recorded sign of the old primary"));
                let bound = bound.unwrap_or_default();
                ("outage", format!("{from_loss_ms} ms from the record of the loss to {until}{bound}"))
            }
            None => ("outage", "not known: no verified promotion or no record of the loss".to_owned()),
        });
        figures.push(match &self.loss {
            Some(Loss { known_bytes, old_offset, reading_age_ms, chosen_offset }) => (
                "loss",
                format!(
                    "{known_bytes} bytes are known: old primary's last known offset {old_offset} (read {reading_age_ms} ms \
                     before the promotion was decided) against {chosen_offset}; later writes are not counted"
                ),
            ),
            None => ("loss", "not known: no reading of the old primary on the promoted history".to_owned()),
        });
        figures.extend(self.discards.iter().map(|d| ("discarded", line::discard(d))));
        figures.extend(invariants(&self.violations));
        figures
    }
}

impl Report for Failovers {
    fn text(&self) -> String {
        if self.0.is_empty() {
            return "no failover is recorded\n".to_owned();
        }
        let mut text = String::new();
        for (index, failover) in self.0.iter().enumerate() {
            let gap = if index == 0 { "" } else { "\n" };
            let _ = writeln!(text, "{gap}{}", failover.heading());
            let mut table = Table::new(["time", "after", "seq", "what"]);
            for Milestone { what, seq, time, after_ms } in &failover.milestones {
                let after = after_ms.map(|ms| format!("+{ms} ms")).unwrap_or_default();
                table.push([time.to_string(), after, seq.to_string(), what.clone()]);
            }
            let _ = write!(text, "\n{}", indented(&table.aligned()));
            failover.judgement(&mut text);
            text.push('\n');
            text.push_str(&told(failover.figures()));
        }
        text
    }

    fn csv(&self) -> Option<String> {
        let mut table =
            Table::new(["failover", "scope", "lost", "chosen", "ended", "outage_ms", "loss_known_bytes"]);
        for f in &self.0 {
            table.push([
                f.id.to_string(),
                f.scope.to_string(),
                f.lost.map(|m| m.to_string()).unwrap_or_default(),
                f.chosen.map(|m| m.to_string()).unwrap_or_default(),
                f.ended.map(|(_, code)| code.to_owned()).unwrap_or_default(),
                f.outage.as_ref().map(|o| o.from_loss_ms.to_string()).unwrap_or_default(),
                f.loss.as_ref().map(|l| l.known_bytes.to_string()).unwrap_or_default(),
            ]);
        }
        Some(table.csv())
    }

    fn finding(&self) -> Finding {
        if self.0.iter().any(|f| !f.violations.is_empty()) { Finding::Found } else { Finding::Clean }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::story;

    fn audited(records: &[Record]) -> Failover {
        let Failovers(mut all) = failovers(&records.to_vec().into());
        assert_eq!(all.len(), 1);
        all.remove(0)
    }

    #[test]
    fn a_failover_is_audited_from_the_last_sign_to_the_end() {
        let failover = audited(&story::failover());
        let told: Vec<(String, Option<i64>)> =
            failover.milestones.iter().map(|m| (m.what.clone(), m.after_ms)).collect();
        let expected = [
            ("last recorded sign of the old primary", None),
            ("loss seen: 0-0 server gone", Some(59_990)),
            ("decided PrimaryGone 0-0: promote 0-1, route shard 0 to 0-1, attach 0-2 to 0-1", Some(0)),
            ("promotion verified", Some(8)),
            ("write route verified", Some(10)),
            ("decided FailoverComplete 0-1", Some(2)),
        ];
        assert_eq!(told, expected.map(|(what, after)| (what.to_owned(), after)));
        assert_eq!(failover.heading(), "failover 13 of shard 0: 0-0 -> 0-1, FailoverComplete at 18");
    }

    #[test]
    fn outage_and_loss_say_what_was_measured() {
        let mut records = story::failover();
        // The old primary's last reading: 1000 when it was adopted, the chosen is at 1200: nothing is known to be lost.
        let failover = audited(&records);
        assert_eq!(
            failover.outage.as_ref().map(|o| (o.from_loss_ms, o.from_last_sign_ms)),
            Some((18, Some(60_008)))
        );
        assert_eq!(failover.loss.as_ref().map(|l| (l.known_bytes, l.reading_age_ms)), Some((0, 59_990)));
        assert_eq!(
            failover.discards.first().map(line::discard).as_deref(),
            Some("0-0 loses 100 bytes (aaaaaaaa:1200 to 1300)")
        );
        assert_eq!(failover.violations, []);
        // A later reading says more.
        if let Event::Decided { decision: _, evidence } = &mut records[10].event {
            *evidence = story::readings(10, &[(0, 1260)]);
        }
        assert_eq!(audited(&records).loss.map(|l| l.known_bytes), Some(60));
    }

    #[test]
    fn a_failover_that_never_ended_is_open_and_its_outage_unknown() {
        let records = story::failover();
        let failover = audited(&records[..13]);
        assert_eq!((failover.ended, failover.outage), (None, None));
        assert_eq!(failover.chosen, Some(story::member(1)));
        assert!(failovers(&records[..13].to_vec().into()).text().contains("0-0 -> 0-1, OPEN"));
    }

    #[test]
    fn a_promotion_beside_a_living_primary_is_a_violation() {
        let mut records = story::failover();
        records[11].event = story::server(0, "run-0", ServerRole::Primary, 'a');
        assert_eq!(failovers(&records.clone().into()).finding(), Finding::Found);
        assert!(
            failovers(&records.clone().into())
                .text()
                .contains("VIOLATION   record 13: promotes 0-1 while 0-0 is seen to be primary")
        );
    }

    #[test]
    fn no_failover_is_said_in_words() {
        assert_eq!(failovers(&story::adopted().0.into()).text(), "no failover is recorded\n");
    }
}
