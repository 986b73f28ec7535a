//! Stories as text: one command a line, `#` comments. See `docs/ARCHITECTURE.md`, "Stories".

use super::{Perturbation, Sim, World};
use crate::{
    decision::BlockReason,
    ids::{Digest, MemberId, Seq, ShardId},
    invariant,
    observation::ObjectRef,
    projection::status::{Condition, ConditionKind, status},
    slots::SlotSet,
    spec::{
        Balance, DesiredCluster, FailoverMode, FailoverPolicy, IoThreads, Isolation, Profile, Settings,
        SwitchoverWish, Topology,
    },
};
use std::collections::{BTreeMap, BTreeSet};

/// A story that does not go as written.
#[derive(Debug, thiserror::Error)]
#[error("line {line} ({command}): {why}")]
pub struct StoryError {
    /// Line of the script, from 1.
    pub line: usize,
    /// The command.
    pub command: String,
    /// What went wrong.
    pub why: String,
}

/// A parsed script.
#[derive(Clone, Debug)]
pub struct Story {
    lines: Vec<(usize, String)>,
}

impl Story {
    /// Takes the script apart; empty lines and comments are dropped. Commands are checked when they run.
    pub fn parse(text: &str) -> Self {
        let commands = text
            .lines()
            .enumerate()
            .map(|(i, l)| (i + 1, l.split('#').next().unwrap_or("").trim().to_owned()));
        Story { lines: commands.filter(|(_, l)| !l.is_empty()).collect() }
    }

    /// Runs the story against a fresh world. `on_command` is told of each command and of how many records there were before it.
    pub fn run(
        &self,
        perturbation: Perturbation,
        mut on_command: impl FnMut(&str, usize),
    ) -> Result<Sim, StoryError> {
        let mut sim = Sim::new(World::new(default_spec()), perturbation);
        for (line, command) in &self.lines {
            on_command(command, sim.records.len());
            let fail = |why: String| StoryError { line: *line, command: command.clone(), why };
            let words: Vec<&str> = command.split_whitespace().collect();
            let done = perform(&mut sim, &words);
            // Folding everything again is dear: once, at the end of the story, whichever end it comes to.
            let is_last = done.is_err() || self.lines.last().is_some_and(|(last, _)| last == line);
            if let Some(broken) =
                is_last.then(|| invariant::check(&sim.records)).and_then(|b| b.first().cloned())
            {
                return Err(fail(format!("invariant broken at {}: {}", broken.seq, broken.text)));
            }
            done.map_err(fail)?;
        }
        Ok(sim)
    }
}

fn default_spec() -> DesiredCluster {
    DesiredCluster {
        generation: 1,
        topology: Topology::Replication,
        shards: 1,
        replicas_per_shard: 2,
        profile: Profile::Cache,
        failover: FailoverPolicy {
            mode: FailoverMode::Automatic,
            detection_window_ms: 3_000,
            isolation: Isolation::On,
        },
        switchover: None,
        confirm_blank: None,
        volatile: false,
        paused: false,
        io_threads: IoThreads::Off,
        balance: Balance::Slots,
        rebalance: None,
        version: None,
        settings: None,
        refused: None,
    }
}

fn perform(sim: &mut Sim, words: &[&str]) -> Result<(), String> {
    match words {
        ["cluster", settings @ ..] => {
            settings.iter().try_for_each(|s| set(sim, s))?;
            sim.start();
            Ok(())
        }
        ["set", settings @ ..] => {
            sim.world.spec.generation += 1;
            settings.iter().try_for_each(|s| set(sim, s))
        }
        ["run"] => sim.run(None),
        ["run", time] => sim.run(Some(millis(time)?)),
        ["write", n, rest @ ..] => {
            let (shard, lagging) = write_options(rest)?;
            let n: u64 = number(n)?;
            let acked = sim.world.write(shard, n, &lagging);
            if acked == n { Ok(()) } else { Err(format!("{acked} of {n} writes were acknowledged")) }
        }
        ["break-revision", name] => {
            sim.world.broken.insert(Digest((*name).to_owned()));
            Ok(())
        }
        ["end-namespace"] => {
            sim.world.namespace_ends = true;
            sim.world.delete_all();
            Ok(())
        }
        ["refuse-pods", name] => {
            sim.world.unmade.insert(Digest((*name).to_owned()));
            Ok(())
        }
        ["break-server", name] => {
            sim.world.refused.insert(Digest((*name).to_owned()));
            Ok(())
        }
        ["edit", object, "by", who] => {
            let object = object.replacen("sts/", "StatefulSet/", 1);
            let object = ObjectRef::try_from(object)?;
            sim.world.edit_object(&object, who)
        }
        ["take", object, "for", who] => sim.world.take_name(&ObjectRef::try_from((*object).to_owned())?, who),
        ["free", object] => sim.world.free_name(&ObjectRef::try_from((*object).to_owned())?),
        ["stop-operator"] => {
            sim.stop();
            Ok(())
        }
        ["start-operator" | "restart-operator"] => {
            sim.start();
            Ok(())
        }
        ["lose-journal"] => {
            sim.records.clear();
            sim.start();
            Ok(())
        }
        ["recreate"] => {
            sim.stop();
            sim.world.delete_all();
            sim.run(Some(10_000))?;
            sim.records.clear();
            sim.start();
            Ok(())
        }
        // For random lives: a fault that cannot happen now does not.
        ["try", rest @ ..] => {
            let _ = perform(sim, rest);
            Ok(())
        }
        ["expect", what @ ..] => expect(sim, what),
        _ => fault(sim, words),
    }
}

/// What happens to members, their network and their clocks.
fn fault(sim: &mut Sim, words: &[&str]) -> Result<(), String> {
    match words {
        ["kill", ids @ ..] => each(ids, |id| sim.world.kill(id)),
        ["freeze", ids @ ..] => each(ids, |id| sim.world.set_frozen(id, true)),
        ["thaw", ids @ ..] => each(ids, |id| sim.world.set_frozen(id, false)),
        ["freeze-pod", ids @ ..] => each(ids, |id| sim.world.set_pod_frozen(id, true)),
        ["thaw-pod", ids @ ..] => each(ids, |id| sim.world.set_pod_frozen(id, false)),
        ["part", ids @ ..] => {
            let ids = ids.iter().map(|id| member(id)).collect::<Result<Vec<_>, _>>()?;
            sim.world.divide(&ids);
            Ok(())
        }
        // A promotion by an operator that nobody remembers: the promises are all that is left of it.
        ["promise", ids @ .., "to", candidate, "above", grant] => {
            let (candidate, grant) = (member(candidate)?, number(grant)?);
            each(ids, |id| sim.world.promise_above(id, candidate, Seq(grant)))
        }
        ["unite"] => {
            sim.world.unite();
            Ok(())
        }
        ["drift", id, ppm] => {
            sim.world.set_drift(member(id)?, number(ppm)?);
            Ok(())
        }
        ["post", "lost", lost, "repeated", repeated, "late", late, "seed", seed] => {
            sim.world.set_post(number(lost)?, number(repeated)?, millis(late)?, number(seed)?);
            Ok(())
        }
        ["save", ids @ ..] => each(ids, |id| sim.world.save(id)),
        ["delete-pod", ids @ ..] => each(ids, |id| sim.world.delete_pod(id)),
        ["wipe", ids @ ..] => each(ids, |id| {
            sim.world.wipe(id);
            Ok(())
        }),
        ["cut", ids @ ..] => each(ids, |id| {
            sim.world.set_cut(id, true);
            Ok(())
        }),
        ["heal", ids @ ..] => each(ids, |id| {
            sim.world.set_cut(id, false);
            Ok(())
        }),
        ["bus-cut", ids @ ..] => each(ids, |id| {
            sim.world.set_off_bus(id, true);
            Ok(())
        }),
        ["bus-heal", ids @ ..] => each(ids, |id| {
            sim.world.set_off_bus(id, false);
            Ok(())
        }),
        ["node-silent", ids @ ..] => each(ids, |id| {
            sim.world.set_node_silent(id, true);
            Ok(())
        }),
        ["node-back", ids @ ..] => each(ids, |id| {
            sim.world.set_node_silent(id, false);
            Ok(())
        }),
        ["cordon", ids @ ..] => each(ids, |id| sim.world.set_cordoned(id, true)),
        ["uncordon", ids @ ..] => each(ids, |id| sim.world.set_cordoned(id, false)),
        ["promote-by-hand", id] => sim.world.promote_by_hand(member(id)?),
        _ => fault_of_one_side(sim, words),
    }
}

/// What some of a member's parts, or some of the others, see and the rest does not.
fn fault_of_one_side(sim: &mut Sim, words: &[&str]) -> Result<(), String> {
    let world = &mut sim.world;
    match words {
        ["unseen", ids @ ..] => for_all(ids, |id| world.set_unseen(id, true)),
        ["seen", ids @ ..] => for_all(ids, |id| world.set_unseen(id, false)),
        ["disobey", ids @ ..] => for_all(ids, |id| world.set_disobedient(id, true)),
        ["obey", ids @ ..] => for_all(ids, |id| world.set_disobedient(id, false)),
        ["fill-disk", ids @ ..] => for_all(ids, |id| world.set_full(id, true)),
        ["free-disk", ids @ ..] => for_all(ids, |id| world.set_full(id, false)),
        ["refuse-settings", words @ ..] => {
            world.settings_refused = Some(words.join(" "));
            Ok(())
        }
        ["accept-settings"] => {
            world.settings_refused = None;
            Ok(())
        }
        ["confine", id, "to", ids @ ..] => {
            let to = ids.iter().map(|id| member(id)).collect::<Result<_, _>>()?;
            world.confine(member(id)?, to);
            Ok(())
        }
        _ => fault_of_slots(sim, words),
    }
}

/// What happens to slots on their way, and to new shards.
fn fault_of_slots(sim: &mut Sim, words: &[&str]) -> Result<(), String> {
    match words {
        ["refuse-slots", words @ ..] => {
            sim.world.slots_refused = Some(words.join(" "));
            Ok(())
        }
        ["hang-slots"] => {
            sim.world.slots_hang = true;
            Ok(())
        }
        ["half-move", slot, from, "to", to] => sim.world.half_move(number(slot)?, member(from)?, member(to)?),
        ["unhang-slots"] => {
            sim.world.slots_hang = false;
            Ok(())
        }
        ["accept-slots"] => {
            sim.world.slots_refused = None;
            Ok(())
        }
        ["no-place-for", shard] => {
            sim.world.set_unschedulable(ShardId(number(shard)?), true);
            Ok(())
        }
        ["fill", slots, keys] => {
            let slots: SlotSet = slots.parse().map_err(|why| format!("{why}"))?;
            let keys = number(keys)?;
            sim.world.fill(&slots, keys);
            Ok(())
        }
        ["tells-no-keys"] => {
            sim.world.tells_keys = false;
            Ok(())
        }
        ["place-for", shard] => {
            sim.world.set_unschedulable(ShardId(number(shard)?), false);
            Ok(())
        }
        _ => Err("unknown command".into()),
    }
}

fn set(sim: &mut Sim, setting: &&str) -> Result<(), String> {
    let (key, value) = setting.split_once('=').ok_or("expected KEY=VALUE")?;
    let spec = &mut sim.world.spec;
    match key {
        "topology" => {
            spec.topology = match value {
                "Replication" => Topology::Replication,
                "Cluster" => Topology::Cluster,
                _ => return Err("topology is Replication or Cluster".into()),
            }
        }
        "shards" => spec.shards = number(value)?,
        "replicas" => spec.replicas_per_shard = number(value)?,
        "window" => spec.failover.detection_window_ms = millis(value)?,
        "profile" => {
            spec.profile = match value {
                "Cache" => Profile::Cache,
                "Durable" => Profile::Durable,
                _ => return Err("profile is Cache or Durable".into()),
            }
        }
        "isolation" => {
            spec.failover.isolation = match value {
                "On" => Isolation::On,
                "Off" => Isolation::Off,
                _ => return Err("isolation is On or Off".into()),
            }
        }
        "failover" => {
            spec.failover.mode = match value {
                "Automatic" => FailoverMode::Automatic,
                "Manual" => FailoverMode::Manual,
                _ => return Err("failover is Automatic or Manual".into()),
            }
        }
        "switchover" => {
            // Each wish is another one, unless the story names it.
            let (to, word) = value.split_once('@').map_or((value, None), |(to, _)| (to, Some(value)));
            let token = word.map_or_else(|| format!("{value}@{}", spec.generation), str::to_owned);
            spec.switchover = Some(SwitchoverWish { to: member(to)?, token });
        }
        "member-services" => sim.world.has_member_services = value == "true",
        "volatile" => spec.volatile = value == "true",
        "confirm-blank" => spec.confirm_blank = Some(value.to_owned()),
        "paused" => spec.paused = value == "true",
        "io-threads" => spec.io_threads = if value == "On" { IoThreads::On } else { IoThreads::Off },
        "balance" => {
            spec.balance = match value {
                "Slots" => Balance::Slots,
                "Keys" => Balance::Keys,
                "Bytes" => Balance::Bytes,
                _ => return Err("balance is Slots, Keys or Bytes".into()),
            }
        }
        "rebalance" => spec.rebalance = (value != "no").then(|| value.to_owned()),
        "settings" => {
            let settings = Settings { digest: Digest(value.to_owned()), named: BTreeMap::new() };
            spec.settings = Some(settings);
        }
        "version" => spec.version = Some(value.to_owned()),
        "refused" => spec.refused = (value != "no").then(|| value.to_owned()),
        "files" => sim.world.snapshots = value == "Rdb",
        "repl-timeout" => sim.world.repl_timeout_ms = Some(millis(value)?),
        "loading" => sim.world.loading_ms = millis(value)?,
        "append" => sim.world.append_ms = millis(value)?,
        "release" => sim.world.release = value.to_owned(),
        "deleting" => sim.world.deleting = value == "true",
        "revision" => sim.world.revision = Digest(value.to_owned()),
        "invalid" => sim.world.invalid = (value != "no").then(|| value.to_owned()),
        _ => return Err(format!("unknown setting {key}")),
    }
    Ok(())
}

fn expect(sim: &mut Sim, what: &[&str]) -> Result<(), String> {
    let shown = |ok: bool, found: String| if ok { Ok(()) } else { Err(found) };
    match what {
        ["primary", id] => {
            let id = member(id)?;
            let (live, routed) = (sim.world.primaries(id.shard), sim.world.routed(id.shard));
            shown(live == [id] && routed == Some(id), format!("primaries {live:?}, routed {routed:?}"))
        }
        ["lost", "0", "on", id] => {
            let lost = sim.world.lost(member(id)?);
            shown(lost == 0, format!("{lost} acknowledged writes are missing"))
        }
        ["no-write-lost"] => (0..sim.world.spec.shards).map(ShardId).try_for_each(|shard| {
            let live = sim.world.primaries(shard);
            let lost = live.first().map(|id| sim.world.lost(*id));
            let is_whole = live.len() == 1 && lost == Some(0);
            shown(is_whole, format!("shard {shard}: primaries {live:?}, missing {lost:?}"))
        }),
        ["ready"] => {
            let conditions = status(&sim.state).conditions;
            let ready = conditions.iter().find(|c| c.kind == ConditionKind::Ready);
            shown(ready.is_some_and(|c| c.holds), format!("{ready:?}"))
        }
        ["ready-or-blocked", code] => expect(sim, &["ready"])
            .or_else(|ready| expect(sim, &["blocked", code]).map_err(|e| format!("{ready}; {e}"))),
        ["blocked", code] => {
            let found: Vec<&str> = sim.state.standing.blocks.iter().map(|b| b.reason.code()).collect();
            BlockReason::ALL.iter().find(|r| r.code() == *code).ok_or("no such reason")?;
            shown(found.contains(code), format!("blocks: {found:?}, waits: {:?}", sim.state.standing.waits))
        }
        ["decided", code] => {
            let found = reasons(sim);
            shown(found.contains(code), format!("decided: {found:?}"))
        }
        ["not-decided", code] => {
            let found = reasons(sim);
            shown(!found.contains(code), format!("decided: {found:?}"))
        }
        ["even-keys", percent] => {
            shown(sim.world.keys_off_mean() <= number(percent)?, format!("{} %", sim.world.keys_off_mean()))
        }
        ["quiet"] => {
            let before = sim.records.len();
            sim.run(Some(30_000))?;
            let new = sim.records.get(before..).unwrap_or_default();
            shown(new.is_empty(), format!("recorded while nothing changed: {new:?}"))
        }
        ["both-writable", time] => {
            let (found, allowed) = (sim.world.both_writable_ms, millis(time)?);
            shown(found <= allowed, format!("two members accepted writes at the same time for {found} ms"))
        }
        ["routed", id] => {
            let id = member(id)?;
            let routed = sim.world.routed(id.shard);
            shown(routed == Some(id) && sim.world.writes_at(id), format!("routed {routed:?}"))
        }
        ["serves", id] => {
            let id = member(id)?;
            let live = sim.world.primaries(id.shard);
            shown(live == [id] && sim.world.writes_at(id), format!("primaries {live:?}"))
        }
        ["writable", id] => shown(sim.world.writes_at(member(id)?), "it refuses writes".into()),
        ["not-writable", id] => shown(!sim.world.writes_at(member(id)?), "it accepts writes".into()),
        ["released"] => shown(sim.world.is_released(), "the finalizer is still on".into()),
        ["object", object, "corrected"] => {
            let object = ObjectRef::try_from(object.replacen("sts/", "StatefulSet/", 1))?;
            let facts = sim.state.objects.get(&object).ok_or("not known")?;
            shown(facts.live.present().is_some_and(|l| l.digest == facts.wanted), format!("{facts:?}"))
        }
        _ => expect_of_nodes(sim, what),
    }
}

/// What the status shall say, and what a Valkey Cluster and its configuration shall be like.
fn expect_of_nodes(sim: &Sim, what: &[&str]) -> Result<(), String> {
    let shown = |ok: bool, found: String| if ok { Ok(()) } else { Err(found) };
    match what {
        ["waiting", code] => {
            let found: Vec<&str> = sim.state.standing.waits.iter().map(|w| w.reason.code()).collect();
            shown(found.contains(code), format!("waits: {found:?}"))
        }
        ["reconciling", code, words @ ..] => {
            let conditions = status(&sim.state).conditions;
            let found = conditions.iter().find(|c| c.kind == ConditionKind::Ready && !c.holds);
            let is_it = |c: &Condition| c.reason.code() == *code && c.message.contains(&words.join(" "));
            shown(found.is_some_and(is_it), format!("{found:?}"))
        }
        ["not-ready", words @ ..] => {
            let conditions = status(&sim.state).conditions;
            let found = conditions.iter().find(|c| c.kind == ConditionKind::Ready && !c.holds);
            shown(found.is_some_and(|c| c.message.contains(&words.join(" "))), format!("{found:?}"))
        }
        ["resharding", words @ ..] => {
            let found = status(&sim.state).resharding.and_then(|r| r.message).unwrap_or_default();
            shown(found.ends_with(&words.join(" ")), found)
        }
        ["settings", digest, "on", ids @ ..] => ids.iter().try_for_each(|id| {
            let found = sim.world.settings(member(id)?);
            shown(found.as_deref() == Some(*digest), format!("{id} has {found:?}"))
        }),
        ["closed"] => shown(!sim.world.has_open_slots(), "slots are half moved".into()),
        ["unbalanced"] => shown(sim.world.imbalance().is_some(), "every shard has its share".into()),
        ["balanced"] => sim.world.imbalance().map_or(Ok(()), Err),
        ["removed", shard] => {
            shown(sim.world.is_removed(ShardId(number(shard)?)), "its workload or a pod is there".into())
        }
        ["member-services", expected @ ..] => {
            let there = sim.world.member_services();
            shown(there == expected, format!("there are those of {}", there.join(" ")))
        }
        ["acquainted"] => {
            shown(sim.world.is_acquainted(), "not every node knows every other where it is".into())
        }
        _ => Err("unknown expectation".into()),
    }
}

fn reasons(sim: &Sim) -> Vec<&'static str> {
    sim.records.iter().filter_map(|r| r.event.decided()).map(|d| d.reason.code()).collect()
}

fn write_options(words: &[&str]) -> Result<(ShardId, BTreeSet<MemberId>), String> {
    match words {
        [] => Ok((ShardId(0), BTreeSet::new())),
        ["to", shard, rest @ ..] => Ok((ShardId(number(shard)?), write_options(rest)?.1)),
        ["lagging", ids @ ..] => Ok((ShardId(0), ids.iter().map(|i| member(i)).collect::<Result<_, _>>()?)),
        _ => Err("expected: write N [to SHARD] [lagging MEMBER...]".into()),
    }
}

fn for_all(ids: &[&str], mut action: impl FnMut(MemberId)) -> Result<(), String> {
    ids.iter().map(|id| member(id)).try_for_each(|id| id.map(&mut action))
}

fn each(ids: &[&str], mut action: impl FnMut(MemberId) -> Result<(), String>) -> Result<(), String> {
    ids.iter().try_for_each(|id| action(member(id)?))
}

fn member(text: &str) -> Result<MemberId, String> {
    text.parse().map_err(|e: crate::ids::NotAMember| e.to_string())
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{text:?} is not a number"))
}

fn millis(text: &str) -> Result<i64, String> {
    match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(ms), _) => number(ms),
        (None, Some(s)) => Ok(number::<i64>(s)? * 1_000),
        (None, None) => Err(format!("{text:?}: expected a time such as 500ms or 3s")),
    }
}
