//! `audit reshard` and `blame slot` over journals that the simulator tells with the real rules, and over such journals with a record
//! exchanged for a wrong one.
#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]

use run::{answer, code};
use valkeeper_core::{
    effect::Effect,
    event::{Event, Record},
    ids::{MemberId, Seq},
    observation::{Export, ExportState, SpecFact},
    sim::{Perturbation, Story},
    state::ClusterState,
};
use valkeeper_journal::{Folded, Lineage, StreamId};
use valkeeper_replay::{
    audit::reshard::{Reshard, Reshards, reshards},
    blame,
    history::History,
    report::{Finding, Report},
};

mod run;
mod story;

const TWO: &str = "cluster topology=Cluster shards=2 replicas=1 profile=Durable
    run
    write 20 to 0
    write 20 to 1
";

fn told(script: &str) -> Vec<Record> {
    let script = format!("{TWO}{script}");
    let mut records = Story::parse(&script).run(Perturbation::default(), |_, _| {}).unwrap().records;
    // The journal writes the baseline in the first writer's epoch.
    records[0].epoch = records[1].epoch;
    records
}

fn grown() -> Vec<Record> {
    told("set shards=3\nrun\n")
}

fn audited(records: &[Record]) -> Vec<Reshard> {
    let Reshards(all) = reshards(&records.to_vec().into());
    all
}

fn figures(text: &str, name: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| line.trim_start().strip_prefix(name))
        .map(|t| t.trim().to_owned())
        .collect()
}

/// The effects of a record that sends jobs.
fn jobs_of(record: &mut Record) -> Option<&mut Vec<Effect>> {
    let Event::Decided { decision, evidence: _ } = &mut record.event else { return None };
    let is_job = |effect: &Effect| matches!(effect, Effect::MigrateSlots { .. });
    decision.effects.iter().any(is_job).then_some(&mut decision.effects)
}

/// A shard hands over 2,730 slots of 8,192 with 320,000 keys, 40,000 keys at a time, and two do.
const JOBS: usize = 8;

#[test]
fn a_reshard_is_told_from_the_wish_to_the_last_slot() {
    let records = grown();
    let all = audited(&records);
    let [one] = all.as_slice() else { panic!("{} reshards", all.len()) };
    assert_eq!((one.shards_before, one.shards_wanted, one.asked_by.as_str()), (2, 3, "generation 2"));
    let asked = records.iter().find(|r| Some(r.seq) == one.asked_at).map(|r| &r.event);
    assert!(
        matches!(asked, Some(Event::SpecChanged(SpecFact::Valid(spec))) if spec.shards == 3),
        "{asked:?}"
    );
    let planned: Vec<String> =
        one.plan.iter().map(|p| format!("{} to {}: {}", p.from, p.to, p.slots)).collect();
    assert_eq!(planned, ["0 to 2: 5462-8191", "1 to 2: 13653-16383"]);
    assert_eq!(one.jobs.len(), JOBS);
    for job in &one.jobs {
        let (accepted, arrived) = (job.outcome.as_ref().map(|(at, _)| *at).unwrap(), job.arrived.unwrap());
        assert!(job.sent.seq < accepted.seq && accepted.seq < arrived.seq, "{job:?}");
        assert!(job.sent.time < accepted.time && accepted.time < arrived.time, "{job:?}");
        assert_eq!((job.again, &job.failed), (None, &None));
        assert!(job.keys.is_some());
    }
    assert_eq!(one.changes.iter().map(|c| c.slots.len()).sum::<usize>(), 2_730 + 2_731);
    assert!(one.deviations.is_empty() && one.beside.is_empty() && one.violations.is_empty(), "{one:?}");
    assert_eq!(one.ended.map(|(_, code)| code), Some("ReshardComplete"));
    let text = Reshards(all).text();
    let asked = format!("generation 2 (record {})", one_asked(&records));
    assert!(text.contains(&format!(": 2 -> 3 shards, asked by {asked}, ReshardComplete at ")), "{text}");
    assert_eq!(figures(&text, "moved"), ["5461 slots; 8 jobs, of which 0 sent again, 0 refused, 0 failed"]);
    assert_eq!(figures(&text, "invariants"), ["hold"]);
}

fn one_asked(records: &[Record]) -> Seq {
    records.iter().rfind(|r| matches!(r.event, Event::SpecChanged(_))).map(|r| r.seq).unwrap()
}

#[test]
fn a_source_that_dies_shows_as_jobs_sent_again_and_as_a_failover_meanwhile() {
    let all = audited(&told("set shards=3\nrun 1580ms\nkill 0-0\nrun\nexpect balanced\n"));
    let [one] = all.as_slice() else { panic!("{} reshards", all.len()) };
    let lost = one.jobs.iter().find(|job| job.from == MemberId::new(0, 0)).unwrap();
    assert_eq!((lost.arrived, lost.end().as_str()), (None, "nothing was seen of it"));
    let again = one.jobs.iter().find(|job| job.again == Some(lost.sent.seq)).unwrap();
    assert_eq!((again.from, &again.slots), (MemberId::new(0, 1), &lost.slots));
    assert!(again.arrived.is_some());
    let beside = one.beside.first().unwrap();
    assert_eq!(beside.what, "Failover of shard 0");
    assert!(lost.sent.seq < beside.from.seq && beside.until.unwrap().seq < again.sent.seq);
    assert!(one.stall.unwrap().ms > 150, "a job alone takes as long: {:?}", one.stall);
    assert_eq!(one.violations, []);
}

#[test]
fn what_valkey_says_of_a_job_that_failed_is_told_of_that_job() {
    let all = audited(&told(
        "refuse-slots NOAUTH\nset shards=3\nrun 3s\naccept-slots\nrun 60s\nrun\nexpect balanced\n",
    ));
    let [one] = all.as_slice() else { panic!("{} reshards", all.len()) };
    let (failed, arrived): (Vec<_>, Vec<_>) = one.jobs.iter().partition(|job| job.arrived.is_none());
    assert!(failed.len() >= 2, "{one:?}");
    for job in &failed {
        assert_eq!(job.failed.as_ref().map(|(_, words)| words.as_str()), Some("NOAUTH"), "{job:?}");
    }
    assert_eq!(arrived.len(), JOBS);
    assert!(arrived.iter().all(|job| job.failed.is_none()), "{arrived:?}");
    assert_eq!(one.violations, []);
}

#[test]
fn a_wish_that_changes_on_the_way_is_a_deviation_and_no_violation() {
    let all =
        audited(&told("set shards=3\nrun\nset shards=2\nrun 300ms\nset shards=4\nrun\nexpect balanced\n"));
    let [out, back] = all.as_slice() else { panic!("{} reshards", all.len()) };
    assert!(out.deviations.is_empty());
    assert!(
        back.deviations.iter().any(|told| told.contains("not planned at first")),
        "{:?}",
        back.deviations
    );
    assert!(back.beside.iter().any(|b| b.what.contains("4 x 2 members")), "{:?}", back.beside);
    assert_eq!(back.violations, []);
}

#[test]
fn a_job_that_its_giver_cancelled_when_its_slots_had_arrived_is_told() {
    let mut records = grown();
    let (slots, arrived) = {
        let all = audited(&records);
        let job = all.first().unwrap().jobs.iter().find(|job| job.from.shard.0 == 0).unwrap();
        (job.slots.clone(), job.arrived.unwrap().seq)
    };
    let is_said = |record: &&mut Record| {
        let of = MemberId::new(0, 0);
        record.seq >= arrived && matches!(record.event, Event::NodeChanged { member, .. } if member == of)
    };
    let Record { seq, event: Event::NodeChanged { member: _, node }, .. } =
        records.iter_mut().find(is_said).unwrap()
    else {
        panic!("0-0 says nothing after {arrived}")
    };
    let seq = *seq;
    let to = "2".repeat(40).parse().unwrap();
    node.exports.push(Export { slots: slots.clone(), to, state: ExportState::Failed("cancelled".into()) });
    let all = audited(&records);
    let [one] = all.as_slice() else { panic!("{} reshards", all.len()) };
    let told = one.deviations.iter().find(|told| told.contains("(cancelled)"));
    let begins = format!("1025 ({slots}) slots arrived at {arrived}, and their giver 0-0 said at {seq} that");
    assert!(told.is_some_and(|told| told.starts_with(&begins)), "{begins}: {:?}", one.deviations);
}

#[test]
fn slots_that_move_again_for_no_reason_are_a_violation() {
    let mut records = told("set shards=3\nrun\nset shards=2\nrun\nexpect balanced\n");
    assert_eq!(reshards(&records.clone().into()).finding(), Finding::Clean);
    let reason = one_asked(&records);
    let unsaid = records.iter_mut().find(|r| r.seq == reason).unwrap();
    unsaid.event = Event::LevelRaised { level: 1, version: "0.1.0".into() };
    let all = reshards(&records.into());
    assert_eq!(all.finding(), Finding::Found);
    assert!(all.text().contains("slots moved again without a reason"), "{}", all.text());
}

#[test]
fn two_jobs_of_one_shard_at_once_are_a_violation() {
    let mut records = grown();
    let effects = records.iter_mut().find_map(jobs_of).unwrap();
    effects[1] = effects[0].clone();
    let all = reshards(&records.into());
    assert_eq!(all.finding(), Finding::Found);
    assert!(all.text().contains("sends a job of shard 0 while one of "), "{}", all.text());
}

#[test]
fn a_job_that_is_sent_before_the_one_before_it_has_an_outcome_is_a_violation() {
    let mut records = grown();
    let first = records.iter_mut().position(|r| jobs_of(r).is_some()).unwrap();
    let ended = records.iter().skip(first).position(|r| matches!(r.event, Event::EffectsEnded(_))).unwrap();
    records[first + ended].event = Event::LevelRaised { level: 1, version: "0.1.0".into() };
    let all = reshards(&records.into());
    assert!(all.text().contains("while one of "), "{}", all.text());
}

#[test]
fn slots_that_nobody_was_told_to_move_are_called_so() {
    let (mut records, mut untold) = (grown(), 0);
    for record in &mut records {
        if let Some(effects) = jobs_of(record) {
            untold += effects.len() - 1;
            effects.truncate(1);
        }
    }
    assert!(untold > 0, "two are sent at a time, at first");
    let all = audited(&records);
    let told = all.iter().flat_map(|one| &one.deviations).filter(|t| t.contains("no job of this journal"));
    assert_eq!(told.count(), untold, "of two that are sent at a time one is left: {all:?}");
}

/// What a journal looks like whose beginning was cut after a record.
fn cut(records: &[Record], after: Seq) -> History {
    let (gone, left) = records.split_at(after.0 as usize);
    let head = story::sealed(gone).last().unwrap().head();
    let id = StreamId("uid-1".into());
    let folded = Folded::new(&id, head, Lineage::FIRST, &ClusterState::fold(gone)).unwrap();
    History::new(Some(&folded), left.to_vec())
}

#[test]
fn a_reshard_whose_beginning_is_gone_is_told_as_far_as_it_is_there() {
    let records = grown();
    let whole = audited(&records).remove(0);
    let Reshards(all) = reshards(&cut(&records, whole.jobs[0].sent.seq));
    let [one] = all.as_slice() else { panic!("{} reshards", all.len()) };
    assert!(one.is_cut);
    assert_eq!((one.id, one.opened, one.ended), (whole.id, whole.opened, whole.ended));
    assert_eq!(one.jobs.len(), whole.jobs.len(), "those whose outcome was open are known");
    assert_eq!(one.violations, []);
    assert!(Reshards(all).text().contains("its beginning is gone"));
}

#[test]
fn a_slot_is_blamed_on_each_shard_and_primary_that_had_it() {
    let records = told("set shards=3\nrun\nkill 2-0\nrun\n");
    let history: History = records.clone().into();
    let blamed = |slot: &str| blame::slot(&history, slot.parse().unwrap()).unwrap();
    let owners = blamed("16383").owners;
    let who: Vec<String> =
        owners.iter().map(|o| format!("{} {}", o.shard.unwrap(), o.primary.unwrap())).collect();
    assert_eq!(who, ["1 1-0", "2 2-0", "2 2-1"]);
    let why: Vec<&str> = owners.iter().filter_map(|o| o.reason).map(|(code, _)| code).collect();
    assert_eq!(why, ["SlotsAssigned", "SlotsHandedOver", "PrimaryGone"]);
    assert!(owners.windows(2).all(|pair| pair[0].until == Some(pair[1].since)), "{owners:?}");
    assert_eq!(owners.last().and_then(|o| o.until), None);
    let text = blamed("16383").text();
    assert!(text.starts_with("slot 16383 now: shard 2, primary 2-1\n"), "{text}");
    assert!(text.contains("    same shard, another primary, as decided at "), "{text}");
    assert_eq!(blamed("0").owners.len(), 1);
    // Without the decisions it is what was seen.
    let mut unsaid = records;
    for record in &mut unsaid {
        if let Some(effects) = jobs_of(record) {
            effects.clear();
        }
    }
    let seen = blame::slot(&unsaid.into(), "16383".parse().unwrap()).unwrap().owners;
    assert!(seen[1].how.starts_with("seen in gossip"), "{seen:?}");
}

#[test]
fn the_owner_of_a_slot_before_a_cut_is_known_and_why_is_not() {
    let records = grown();
    let closed = audited(&records)[0].ended.unwrap().0.seq;
    let owners = blame::slot(&cut(&records, closed), "16383".parse().unwrap()).unwrap();
    let [one] = owners.owners.as_slice() else { panic!("{owners:?}") };
    assert_eq!((one.shard.map(|id| id.0), one.since.seq, one.reason), (Some(2), closed, None));
    assert!(owners.gone.is_some());
}

#[test]
fn the_program_answers_in_every_format_and_says_what_is_no_slot() {
    let journal = story::exported(None, &story::sealed(&grown()));
    for args in [["audit", "reshard"].as_slice(), &["blame", "slot", "16383"]] {
        for format in ["table", "json", "jsonl", "csv"] {
            let (code, out, err) = answer(&journal, &[args, &["-o", format]].concat());
            assert_eq!((code, err.as_str(), out.is_empty()), (0, "", false), "{args:?} {format}");
        }
    }
    let (code, out, _) = answer(&journal, &["audit", "reshard", "-o", "json"]);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, json[0]["jobs"].as_array().map(Vec::len)), (0, Some(JOBS)));
    assert_eq!(json[0]["jobs"][0]["slots"], "7167-8191");
    for wrong in ["16384", "-1", "a", ""] {
        let (code, _, err) = answer(&journal, &["blame", "slot", "--", wrong]);
        assert_eq!(code, 2);
        assert!(err.contains(&format!("expected a slot, 0 to 16383, not {wrong:?}")), "{err}");
    }
    let other = story::exported(None, &story::sealed(&story::failover()));
    let (code_of_none, _, err) = answer(&other, &["blame", "slot", "7"]);
    assert_eq!(
        (code_of_none, err.as_str()),
        (2, "valkeeper-replay: nothing in this stream is about slot 7\n")
    );
    assert_eq!(answer(&other, &["audit", "reshard"]).1, "no reshard is recorded\n");
}

#[test]
fn a_broken_invariant_is_an_exit_code() {
    let mut records = grown();
    let effects = records.iter_mut().find_map(jobs_of).unwrap();
    effects[1] = effects[0].clone();
    assert_eq!(code(&story::exported(None, &story::sealed(&records)), &["audit", "reshard"]), 3);
}
