//! Shards come and go while clients write: out and in again, with faults on the way, at random, and for a shard that never starts. What
//! was acknowledged is read again from whoever owns it by then, and the journal's own audit must find nothing.

use super::{
    World,
    cluster::{GOSSIP_MAX, REPLICAS, SETTLED_MAX, SHARDS, acquainted, kept, members_of, settled, sized},
};
use crate::support::{
    journal::Journal,
    keys::{Keys, any_node},
    load::{Figures, Load, Log, maximum},
    process::{kill_server, signal},
    resp::Role,
    slots,
    subject::{PATIENCE, Subject},
    wait::until,
};
use anyhow::{Context, bail};
use k8s_openapi::api::{
    apps::v1::StatefulSet,
    core::v1::{Node, Secret},
    policy::v1::PodDisruptionBudget,
};
use kube::{
    Api, Resource, ResourceExt,
    api::{ListParams, Patch, PatchParams},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, HashSet},
    ops::RangeInclusive,
    time::{Duration, Instant},
};

/// Shards at first.
pub(super) const FEW: u16 = SHARDS;
/// Shards after scaling out.
const MANY: u16 = 5;
/// Small keys that are there before anything moves: several jobs' worth of copying, written in a moment.
const KEYS: usize = 100_000;
/// The writers, and the slots near which each writes: one stays with shard 0 whatever happens, the others are the first to go from each
/// of three shards.
const WRITERS: [(&str, u16); 4] = [("stays", 50), ("of 0", 5_400), ("of 1", 10_850), ("of 2", 16_300)];
/// Acknowledged writes of each writer before anything moves.
const WRITES: usize = 500;
/// Until all slots are where they shall be: new shards start, or a killed operator's Lease runs out, before anything moves.
pub(super) const RESHARD_MAX: Duration = Duration::from_secs(300);
/// Reshards that are tried until a fault falls within one: slots are on their way for about a second.
const TRIES_MAX: usize = 4;
/// Reshards in each of which the operator is killed.
const OPERATOR_KILLS: usize = 5;
/// Latest moment of that after slots were seen to move: they do so for a second or two.
const MOMENT_MAX_MS: u64 = 1_000;
/// Loads, one after the other, of the rounds with random numbers of shards: one that goes on for all of them makes sets that are too
/// large to be read at once.
const LOADS: usize = 4;
/// Rounds under each.
const ROUNDS: usize = 5;
/// Numbers of shards to choose from: fewer have no majority, and more are too many for one machine.
const RANDOM_SHARDS: RangeInclusive<u16> = 3..=7;
/// How long nothing may move while a new shard cannot start: many turns of the operator.
const STILL: Duration = Duration::from_secs(10);

/// Slots by shard.
pub(super) type Counts = BTreeMap<u16, usize>;

/// Three shards become five and three again.
pub async fn out_in(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    let run = Run::start(subject, FEW).await?;
    let out = reshard(subject, MANY).await.context("out")?;
    let claims: HashSet<String> = subject.claims().await?.into_iter().collect();
    let back = reshard(subject, FEW).await.context("in")?;
    let left: HashSet<String> = subject.claims().await?.into_iter().collect();
    if let Some(lost) = claims.difference(&left).next() {
        bail!("the claim {lost} is gone: volumes are the user's");
    }
    let told = run.finish(subject, &[]).await?;
    Ok(format!("{FEW} -> {MANY} in {:.1} s, back in {:.1} s; {told}", out.as_secs_f64(), back.as_secs_f64()))
}

/// Reshards with a fault in the middle of each.
pub async fn faults(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    let run = Run::start(subject, FEW).await?;
    let (mut kills, mut told) = (Vec::new(), Vec::new());
    for fault in [Fault::Operator, Fault::Source, Fault::Target, Fault::Another] {
        let at_once = || Duration::ZERO;
        let struck = with_fault(world, fault, at_once, &mut kills).await;
        let (took, _) = struck.with_context(|| format!("{fault:?}"))?;
        run.load.flows(SETTLED_MAX).await.with_context(|| format!("after {fault:?}"))?;
        told.push(format!("{fault:?} {:.1} s", took.as_secs_f64()));
    }
    reshard(subject, FEW).await?;
    Ok(format!("killed on the way: {}; {}", told.join(", "), run.finish(subject, &kills).await?))
}

/// The operator killed at a random moment of each of five reshards, after the first slots have moved.
pub async fn operator_killed(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    let (seed, mut random) = seeded()?;
    let run = Run::start(subject, FEW).await?;
    let mut told = Vec::new();
    for number in 1..=OPERATOR_KILLS {
        // Kubelet's pause after a kill doubles each time; a new pod has none.
        world.operator.scale(0).await?;
        world.operator.scale(1).await?;
        let moment = || Duration::from_millis(random.random_range(0..=MOMENT_MAX_MS));
        let (took, moment) = with_fault(world, Fault::Operator, moment, &mut Vec::new())
            .await
            .with_context(|| format!("kill {number}, seed {seed}"))?;
        run.load.flows(SETTLED_MAX).await.with_context(|| format!("after kill {number}, seed {seed}"))?;
        told.push(format!("{} ms: {:.1} s", moment.as_millis(), took.as_secs_f64()));
    }
    reshard(subject, FEW).await?;
    let figures = run.finish(subject, &[]).await.with_context(|| format!("seed {seed}"))?;
    Ok(format!("operator killed after {}; {figures}", told.join(", ")))
}

/// A source of random numbers that can be had again, and what that takes.
fn seeded() -> anyhow::Result<(u64, StdRng)> {
    let seed: u64 = match std::env::var("VALKEEPER_SEED") {
        Ok(text) => text.parse().context("VALKEEPER_SEED is no number")?,
        Err(_) => rand::rng().random(),
    };
    println!("     VALKEEPER_SEED={seed}");
    Ok((seed, StdRng::seed_from_u64(seed)))
}

/// Random numbers of shards, one after the other; sometimes the next wish comes while slots are on their way.
pub async fn rounds(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    let (seed, mut random) = seeded()?;
    let (mut shards, mut told) = (FEW, vec![format!("{FEW}")]);
    for load in 1..=LOADS {
        let run = Run::start(subject, shards).await?;
        for round in 1..=ROUNDS {
            let others: Vec<u16> = RANDOM_SHARDS.filter(|other| *other != shards).collect();
            shards = others.get(random.random_range(0..others.len())).copied().unwrap_or(FEW);
            let context = || format!("load {load}, round {round}, {shards} shards, seed {seed}");
            let hasty = random.random_ratio(1, 4) && round < ROUNDS;
            told.push(if hasty {
                let before = counts(subject).await?;
                subject.apply(&sized(shards, REPLICAS)).await?;
                under_way(subject, &before).await.with_context(context)?;
                format!("({shards})")
            } else {
                reshard(subject, shards).await.with_context(context)?;
                shards.to_string()
            });
            run.load.flows(SETTLED_MAX).await.with_context(context)?;
        }
        let figures = run.finish(subject, &[]).await.with_context(|| format!("load {load}, seed {seed}"))?;
        told.push(format!("[{figures}]"));
    }
    reshard(subject, FEW).await?;
    Ok(format!("shards {}; those in parentheses were not awaited", told.join(" ")))
}

/// A new shard that no node takes, and a user who thinks better of it: nothing ever moves.
pub async fn never_starts(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    settled(subject, FEW, REPLICAS).await?;
    cordon(world, Nodes::Closed).await?;
    let story = while_cordoned(subject).await;
    cordon(world, Nodes::Open).await?;
    let (before, known, took) = story?;
    settled(subject, FEW, REPLICAS).await?;
    let (after, recorded) = (counts(subject).await?, Journal::of(subject).await?.reshards()?.len());
    if after != before || recorded != known {
        bail!("{before:?} became {after:?}, reshards {known} became {recorded}, for a shard that never was");
    }
    Ok(format!("Ready again {:.1} s after the wish was taken back", took.as_secs_f64()))
}

async fn while_cordoned(subject: &Subject) -> anyhow::Result<(Counts, usize, Duration)> {
    // As long as only one node was cordoned, its primaries handed over.
    settled(subject, FEW, REPLICAS).await?;
    let (before, known) = (counts(subject).await?, Journal::of(subject).await?.reshards()?.len());
    subject.apply(&sized(FEW + 1, REPLICAS)).await?;
    let wanted = members_of(FEW + 1, REPLICAS);
    until("pods of the new shard", PATIENCE, || async {
        match (subject.members().await?.len(), subject.running().await?) {
            (pods, running) if pods == wanted && running == members_of(FEW, REPLICAS) => Ok(()),
            (pods, running) => bail!("{pods} pods, of which {running} run"),
        }
    })
    .await?;
    let begun = Instant::now();
    while begun.elapsed() < STILL {
        let now = counts(subject).await?;
        if now != before {
            bail!("{before:?} became {now:?} though no pod of shard {FEW} runs");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    subject.condition("Ready", "False", PATIENCE).await?;
    let took = reshard(subject, FEW).await?;
    Ok((before, known, took))
}

/// Whether nodes take new pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Nodes {
    Open,
    Closed,
}

/// What `kubectl cordon` and `uncordon` do, to every node.
async fn cordon(world: &World, wanted: Nodes) -> anyhow::Result<()> {
    let nodes: Api<Node> = Api::all(world.client.clone());
    for node in nodes.list(&ListParams::default()).await?.items {
        let patch = Patch::Merge(json!({ "spec": { "unschedulable": wanted == Nodes::Closed } }));
        nodes.patch(&node.name_any(), &PatchParams::default(), &patch).await?;
    }
    Ok(())
}

/// Keys and a load that a scenario begins with, and what is asked of them at its end.
pub(super) struct Run {
    keys: Keys,
    load: Load,
    begun: Instant,
}

impl Run {
    pub(super) async fn start(subject: &Subject, shards: u16) -> anyhow::Result<Run> {
        settled(subject, shards, REPLICAS).await?;
        Run::with(subject, Keys::write(subject, KEYS).await?).await
    }

    /// With other keys, of a cluster that is settled.
    pub(super) async fn with(subject: &Subject, keys: Keys) -> anyhow::Result<Run> {
        let mut node = any_node(subject).await?;
        let near = WRITERS.map(|(_, slot)| slot);
        let tags = tokio::task::spawn_blocking(move || slots::tags_near(&mut node, &near)).await??;
        let names = WRITERS.map(|(name, _)| name);
        let load = Load::on_slots(subject, names.into_iter().zip(tags).collect()).await?;
        load.grows_by(WRITES, SETTLED_MAX).await?;
        Ok(Run { keys, load, begun: Instant::now() })
    }

    /// Reads everything back. `kills`: when a primary was killed; nothing else excuses a loss.
    pub(super) async fn finish(self, subject: &Subject, kills: &[Instant]) -> anyhow::Result<String> {
        let Run { keys, load, begun } = self;
        load.flows(SETTLED_MAX).await?;
        let logs = load.finish()?;
        let mut figures = Figures::default();
        for log in &logs {
            figures.add_loss(log, &kept(subject, &log.key).await?, kills);
        }
        figures.nothing_lost()?;
        keys.read(subject).await?;
        let gap = |log: &Log| log.gap_ms(begun, None);
        let gaps = logs.iter().map(gap).collect::<anyhow::Result<Vec<f64>>>()?;
        Ok(format!("{}, worst gap {:.0} ms, {} keys read", figures.loss, maximum(&gaps), keys.count()))
    }
}

/// Asks for so many shards and waits until all is as if there had never been another number.
pub(super) async fn reshard(subject: &Subject, shards: u16) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    subject.apply(&sized(shards, REPLICAS)).await?;
    complete(subject, shards).await?;
    Ok(begun.elapsed())
}

pub(super) async fn complete(subject: &Subject, shards: u16) -> anyhow::Result<()> {
    until("every shard to have its share", RESHARD_MAX, || async { even(&counts(subject).await?, shards) })
        .await?;
    until("nothing to be left of other shards", PATIENCE, || nothing_beyond(subject, shards)).await?;
    subject.ready().await?;
    settled(subject, shards, REPLICAS).await?;
    let count = members_of(shards, REPLICAS);
    until("every node to know its fellows and nobody else", GOSSIP_MAX, || acquainted(subject, count))
        .await?;
    even(&counts(subject).await?, shards)
}

/// How many slots each shard has, as one node sees it.
pub(super) async fn counts(subject: &Subject) -> anyhow::Result<Counts> {
    let (members, mut node) = (subject.members().await?, any_node(subject).await?);
    let by_address = tokio::task::spawn_blocking(move || slots::runs(&mut node)).await??;
    let mut counts = Counts::new();
    for (address, count) in slots::counts(&by_address) {
        let owner = members.iter().find(|member| member.address == Some(address));
        let shard = owner.and_then(|member| shard_of(subject, &member.name));
        *counts.entry(shard.with_context(|| format!("{address} is no member"))?).or_default() += count;
    }
    Ok(counts)
}

/// The shard in the name of a pod, a workload or a Secret.
pub(super) fn shard_of(subject: &Subject, name: &str) -> Option<u16> {
    let rest = name.strip_prefix(&subject.name)?.strip_prefix('-')?;
    let rest = rest.strip_prefix("identity-").unwrap_or(rest);
    rest.split('-').next()?.parse().ok()
}

/// All slots are served, by just so many shards, and nobody has more than one beside its share.
pub(super) fn even(counts: &Counts, shards: u16) -> anyhow::Result<()> {
    let all = usize::from(slots::COUNT);
    let share = all / usize::from(shards);
    let wanted: Vec<u16> = (0..shards).collect();
    let is_even = counts.values().all(|count| (share..=share + 1).contains(count));
    if !is_even || !counts.keys().eq(&wanted) || counts.values().sum::<usize>() != all {
        bail!("{counts:?} is not {share} slots each of {shards} shards");
    }
    Ok(())
}

/// No pod, workload, budget or identity of a shard that shall not be there.
async fn nothing_beyond(subject: &Subject, shards: u16) -> anyhow::Result<()> {
    let pods = subject.members().await?.into_iter().map(|member| member.name);
    let mut names: Vec<String> = pods.collect();
    names.extend(names_of::<StatefulSet>(subject).await?);
    names.extend(names_of::<PodDisruptionBudget>(subject).await?);
    names.extend(names_of::<Secret>(subject).await?);
    let beyond = |name: &&String| shard_of(subject, name).is_some_and(|shard| shard >= shards);
    match names.iter().find(beyond) {
        Some(left) => bail!("{left} is left"),
        None => Ok(()),
    }
}

async fn names_of<K>(subject: &Subject) -> anyhow::Result<Vec<String>>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(subject.client.clone(), &subject.namespace);
    let of_it = ListParams::default().labels(&format!("valkeeper.io/cluster={}", subject.name));
    Ok(api.list(&of_it).await?.items.iter().map(|object| object.name_any()).collect())
}

/// Waits until slots have begun to move; who has how many then.
pub(super) async fn under_way(subject: &Subject, before: &Counts) -> anyhow::Result<Counts> {
    let moved = until("slots to be on their way", RESHARD_MAX, || async {
        let now = counts(subject).await?;
        if now == *before { bail!("nothing has moved") } else { Ok(now) }
    });
    Ok(moved.await?.0)
}

/// Whose process is killed in the middle of a reshard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The operator's.
    Operator,
    /// The server of a primary that gives slots.
    Source,
    /// The server of one that gets some.
    Target,
    /// The server of a primary whose slots nobody has touched yet.
    Another,
}

impl Fault {
    /// The shard that it is about, by who had and who has how many slots.
    pub(super) fn victim(self, before: &Counts, now: &Counts, shards: u16) -> Option<u16> {
        let had = |shard: u16| before.get(&shard).copied().unwrap_or_default();
        let has = |shard: u16| now.get(&shard).copied().unwrap_or_default();
        let mut all = 0..FEW.max(MANY);
        match self {
            Fault::Operator => None,
            Fault::Source => all.find(|shard| has(*shard) < had(*shard) && has(*shard) > 0),
            Fault::Target => all.find(|shard| has(*shard) > had(*shard)),
            Fault::Another => all.rfind(|shard| has(*shard) == had(*shard) && *shard < shards),
        }
    }

    /// How the audit of the reshard names it.
    fn recorded_as(self) -> &'static str {
        match self {
            Fault::Operator => "epoch ",
            Fault::Source | Fault::Target | Fault::Another => "Failover of shard ",
        }
    }
}

/// Reshards until the fault fell within one, as the journal has it, so long after slots were seen to move as `moment` says; how long that
/// reshard took, and the moment.
async fn with_fault(
    world: &World,
    fault: Fault,
    mut moment: impl FnMut() -> Duration,
    kills: &mut Vec<Instant>,
) -> anyhow::Result<(Duration, Duration)> {
    let subject = &world.ledger;
    for _ in 0..TRIES_MAX {
        let before = counts(subject).await?;
        // When shards go, each job has a source of its own and one of the others waits untouched.
        let to = if before.len() == usize::from(FEW) { MANY } else { FEW };
        let begun = Instant::now();
        subject.apply(&sized(to, REPLICAS)).await?;
        let now = under_way(subject, &before).await?;
        let moment = moment();
        tokio::time::sleep(moment).await;
        kills.extend(strike(world, fault, fault.victim(&before, &now, to)).await?);
        complete(subject, to).await?;
        let reshards = Journal::of(subject).await?.reshards()?;
        let last = reshards.last().context("the journal has no reshard")?;
        let meanwhile = last["beside"].as_array().map(Vec::as_slice).unwrap_or_default();
        let is_it =
            |beside: &Value| beside["what"].as_str().is_some_and(|w| w.starts_with(fault.recorded_as()));
        if meanwhile.iter().any(is_it) {
            return Ok((begun.elapsed(), moment));
        }
        println!("     {fault:?} was killed too late, or there was none: {now:?} of {before:?}");
    }
    bail!("no fault fell within one of {TRIES_MAX} reshards")
}

/// Kills a process; the time just before, if it was a server's.
pub(super) async fn strike(
    world: &World,
    fault: Fault,
    victim: Option<u16>,
) -> anyhow::Result<Option<Instant>> {
    let subject = &world.ledger;
    if fault == Fault::Operator {
        signal(world.operator.pid().await?, "KILL")?;
        return Ok(None);
    }
    let Some(shard) = victim else { return Ok(None) };
    let roles = subject.roles().await?;
    let of_it = |name: &str| shard_of(subject, name) == Some(shard);
    let primary = roles.iter().find(|(member, role)| *role == Role::Primary && of_it(&member.name));
    let (member, _) = primary.with_context(|| format!("shard {shard} has no primary"))?;
    Ok(Some(kill_server(world.place, &subject.namespace, member)?))
}
