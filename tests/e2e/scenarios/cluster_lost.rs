//! Topology Cluster when more is lost than a process: a shard divided by the network, volumes with all that their nodes knew, and a cache,
//! which keeps nothing on any volume.

use super::{
    World,
    cluster::{
        Outages, REPLICAS, SETTLED_MAX, SHARDS, Shard, client, kept, kill_alone, killed, load, load_of,
        none_of, settled, sized, tags,
    },
    cluster_life::{replica_of, whole},
    isolation::{INSIDE, OUTSIDE, own_address, two_sides},
    remove_with_claims,
};
use crate::support::{
    journal::Journal,
    keys::Keys,
    load::{Load, Target},
    net::{From, cut, cut_port},
    nodes::Nodes,
    process::{pid_in_pod, signal, wipe_data},
    resp::Reply,
    subject::{Member, PATIENCE, Subject},
    wait::until,
};
use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    ops::RangeInclusive,
    time::{Duration, Instant},
};

/// Acknowledged writes of each client before a fault.
const WRITES: usize = 1_000;
/// Keys spread over all slots, read one by one afterwards.
const KEYS: usize = 30_000;
/// The shard that is in trouble.
const HIT: u16 = 1;
/// The writers of the others.
const OTHERS: [&str; 2] = ["0", "2"];
/// Slots of one of them in a new cluster.
const OTHER_SLOTS: RangeInclusive<u16> = 0..=5_460;
/// Kills of one shard's primary in a row.
const KILLS: usize = 3;
/// Bound on each thing that is to happen while the bus is cut: all of them end before the cut does by itself.
const BUS_CUT_MAX: Duration = Duration::from_secs(60);
/// Where nodes talk to each other.
const BUS_PORT: u16 = 16_379;
/// Bound on each wait of a client that writes single keys.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);

/// A primary cut from everybody but a client beside it: it must stop accepting writes before its replica begins.
pub async fn divided(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    let before = settled(subject, SHARDS, REPLICAS).await?;
    let hit = shard(&before, HIT)?;
    let address = hit.primary.address.context("no address")?;
    let replica = replica_of(subject, hit).await?.address.context("no address")?;
    let tag = tags(subject, &before).await?.into_iter().nth(usize::from(HIT)).context("no tag")?;
    let sides = [(INSIDE, address), (OUTSIDE, replica)];
    let targets = sides.map(|(side, member)| (side, Target::PrimaryAt { member, tag: tag.clone() }));
    let sides = Load::on(targets.into(), &subject.reach, &subject.password().await?)?;
    sides.grows_of(INSIDE, WRITES, SETTLED_MAX).await?;
    let others: Vec<Shard> = before.iter().filter(|shard| shard.number != HIT).cloned().collect();
    let load = load_of(subject, &others, &OTHERS).await?;
    let broken = cut(&hit.primary, &From::Everyone, &[own_address(address)?])?;
    let since = broken.since;
    sides.grows_of(OUTSIDE, WRITES, SETTLED_MAX).await.context("after the cut")?;
    broken.heal()?;
    let after = settled(subject, SHARDS, REPLICAS).await?;
    if shard(&after, HIT)?.primary.name == hit.primary.name {
        bail!("{} is primary again, although another was elected", hit.primary.name);
    }
    whole(subject, SHARDS, REPLICAS).await?;
    let outages = Outages::of(subject, &load.finish()?, &BTreeMap::from([(HIT, since)])).await?;
    let logs = sides.finish()?;
    let mut kept_by_side = BTreeMap::new();
    for log in &logs {
        kept_by_side.insert(log.client, kept(subject, &log.key).await?);
    }
    Ok(format!("{}; {}", two_sides(&logs, &kept_by_side, since)?, outages.line()?))
}

/// The cluster bus reaches one primary no more, and everything else does: operator, clients, its replica. That refuses its clients then, and
/// its replica takes over; Ready says who does not hear whom, and the old primary follows when the bus reaches it again.
pub async fn bus_cut(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    let before = settled(subject, SHARDS, REPLICAS).await?;
    let keys = Keys::write(subject, KEYS).await?;
    let hit = shard(&before, HIT)?;
    let load = self::load(subject, &before).await?;
    let decided =
        async || Ok::<usize, anyhow::Error>(Journal::of(subject).await?.lines("PrimaryShutOut")?.len());
    let known = decided().await?;
    let broken = cut_port(&hit.primary, BUS_PORT)?;
    let since = broken.since;
    until("the primary to be replaced", BUS_CUT_MAX, || async {
        if decided().await? > known {
            Ok(())
        } else {
            bail!("nobody decided that {} is shut out", hit.primary.name)
        }
    })
    .await?;
    load.flows(BUS_CUT_MAX).await.context("with the old primary off the bus")?;
    let off = format!(
        "port {BUS_PORT}: {} and ",
        hit.primary.name.trim_start_matches(&format!("{}-", subject.name))
    );
    until("Ready to say who does not hear whom", BUS_CUT_MAX, || async {
        let (ready, _) = subject.condition("Ready", "False", BUS_CUT_MAX).await?;
        if ready.message.contains(&off) { Ok(()) } else { bail!("{}: {}", ready.reason, ready.message) }
    })
    .await?;
    let healed = broken.heal()?;
    whole(subject, SHARDS, REPLICAS).await?;
    let took = healed.elapsed().as_secs_f64();
    let after = settled(subject, SHARDS, REPLICAS).await?;
    if shard(&after, HIT)?.primary.name == hit.primary.name {
        bail!("{} is primary again, although another took its place", hit.primary.name);
    }
    if decided().await? != known + 1 {
        bail!("{} times instead of once a primary was said to be shut out", decided().await? - known);
    }
    let outages = Outages::of(subject, &load.finish()?, &BTreeMap::from([(HIT, since)])).await?;
    keys.read(subject).await?;
    Ok(format!(
        "{} -> {}; whole {took:.1} s after the bus was; {}; {} keys read",
        hit.primary.name,
        shard(&after, HIT)?.primary.name,
        outages.line()?,
        keys.count(),
    ))
}

/// A replica's claim and pod are deleted; then a primary's files are removed while its server stands still, and its agent is killed. Both
/// come back as other nodes under the same name, and nobody knows those of before.
pub async fn volumes_lost(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    let before = settled(subject, SHARDS, REPLICAS).await?;
    let keys = Keys::write(subject, KEYS).await?;

    let replica = replica_of(subject, shard(&before, HIT)?).await?;
    let node = node_id(subject, &replica.name).await?;
    let load = self::load(subject, &before).await?;
    let begun = Instant::now();
    subject.delete_claim_of(&replica.name).await?;
    subject.delete_pod(&replica.name).await?;
    another_node(subject, &replica.name, &node).await?;
    whole(subject, SHARDS, REPLICAS).await?;
    let replaced = begun.elapsed();
    let outages = Outages::of(subject, &load.finish()?, &BTreeMap::from([(HIT, begun)])).await?;
    outages.nothing_is_excused().context("of a replica's volume")?;

    let before = settled(subject, SHARDS, REPLICAS).await?;
    let primary = &shard(&before, HIT)?.primary;
    let node = node_id(subject, &primary.name).await?;
    let load = self::load(subject, &before).await?;
    let (server, agent) =
        (pid_in_pod(&primary.uid, "valkey-server")?, pid_in_pod(&primary.uid, "valkeeper-agent")?);
    // It would write down once more who it is.
    let fault = signal(server, "STOP")?;
    wipe_data(primary, true)?;
    signal(agent, "KILL")?;
    load.flows(SETTLED_MAX).await.context("after the primary's loss")?;
    another_node(subject, &primary.name, &node).await?;
    whole(subject, SHARDS, REPLICAS).await?;
    let healed = fault.elapsed();
    let outages = Outages::of(subject, &load.finish()?, &BTreeMap::from([(HIT, fault)])).await?;
    keys.read(subject).await?;
    Ok(format!(
        "{} another node, whole after {:.1} s; {} too, after {:.1} s; {}; {} keys read",
        replica.name,
        replaced.as_secs_f64(),
        primary.name,
        healed.as_secs_f64(),
        outages.line()?,
        keys.count(),
    ))
}

/// No persistence at all: one primary killed three times in a row, an agent with its server, two at once, one with the operator away;
/// nothing is lost. At last all pods of one shard: its slots are served again, empty, and the others keep what they have.
pub async fn cache(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    let mut spec = sized(SHARDS, REPLICAS);
    spec["profile"] = json!("Cache");
    spec["persistence"] = Value::Null;
    subject.apply(&spec).await?;
    subject.ready().await?;
    settled(subject, SHARDS, REPLICAS).await?;
    let keys = Keys::write(subject, KEYS).await?;
    let mut told = Vec::new();
    for _ in 0..KILLS {
        told.push(killed(world, SHARDS, &[HIT]).await?);
    }
    told.push(format!("with its agent: {}", agent_killed(subject).await?));
    told.push(killed(world, SHARDS, &[0, 2]).await?);
    told.push(format!("operator away: {}", kill_alone(world).await?));
    keys.read(subject).await.context("after the kills")?;
    told.push(format!("{} keys read; {}", keys.count(), shard_lost(subject).await?));
    Journal::of(subject).await?.holds()?;
    remove_with_claims(subject).await?;
    Ok(told.join(" | "))
}

/// A primary's agent killed, and so its container, which is back in a moment.
async fn agent_killed(subject: &Subject) -> anyhow::Result<String> {
    let before = settled(subject, SHARDS, REPLICAS).await?;
    let load = load(subject, &before).await?;
    let fault = signal(pid_in_pod(&shard(&before, HIT)?.primary.uid, "valkeeper-agent")?, "KILL")?;
    load.flows(SETTLED_MAX).await?;
    whole(subject, SHARDS, REPLICAS).await?;
    Outages::of(subject, &load.finish()?, &BTreeMap::from([(HIT, fault)])).await?.line()
}

/// Every pod of a shard deleted at once, with all that anybody had of its slots.
async fn shard_lost(subject: &Subject) -> anyhow::Result<String> {
    let before = settled(subject, SHARDS, REPLICAS).await?;
    let others: Vec<Shard> = before.iter().filter(|shard| shard.number != HIT).cloned().collect();
    let tag = tags(subject, &before).await?.into_iter().nth(usize::from(HIT)).context("no tag")?;
    let key = tag.key("tests:lost");
    if ask(subject, &["SET", &key, "1"]).await?.text() != Some("OK") {
        bail!("{key} was not written");
    }
    // The slots are where a new cluster has them: nothing has moved here.
    let keys = Keys::write_into(&Nodes::of(subject).await?, OTHER_SLOTS, KEYS, 0).await?;
    let load = load_of(subject, &others, &OTHERS).await?;
    let prefix = format!("{}-{HIT}-", subject.name);
    let members = subject.members().await?;
    let lost: Vec<&Member> = members.iter().filter(|member| member.name.starts_with(&prefix)).collect();
    let fault = Instant::now();
    for member in &lost {
        subject.delete_pod(&member.name).await?;
    }
    let old = lost.iter().map(|member| member.uid.clone()).collect();
    until("new pods of the shard", PATIENCE, || none_of(subject, &old)).await?;
    until("the lost shard's slots to be served, empty", PATIENCE, || async {
        let reply = ask(subject, &["GET", &key]).await?;
        if reply == Reply::Nil { Ok(()) } else { bail!("{key} is {reply:?}") }
    })
    .await?;
    let served = fault.elapsed();
    whole(subject, SHARDS, REPLICAS).await?;
    let ready = fault.elapsed();
    if Journal::of(subject).await?.lines("SlotsReclaimed")?.is_empty() {
        bail!("nobody decided that the slots of shard {HIT} are given out again");
    }
    load.flows(SETTLED_MAX).await?;
    let outages = Outages::of(subject, &load.finish()?, &BTreeMap::from([(HIT, fault)])).await?;
    outages.nothing_is_excused()?;
    keys.read(subject).await.context("of the other shards")?;
    let (served, ready) = (served.as_secs_f64(), ready.as_secs_f64());
    Ok(format!(
        "a whole shard lost: its slots served again after {served:.1} s, whole after {ready:.1} s; {}",
        outages.line()?
    ))
}

async fn ask(subject: &Subject, words: &[&str]) -> anyhow::Result<Reply> {
    let mut client = client(subject, CALL_TIMEOUT).await?;
    let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    let call = move || client.call(&words.iter().map(String::as_str).collect::<Vec<_>>());
    Ok(tokio::task::spawn_blocking(call).await??)
}

pub(super) fn shard(shards: &[Shard], number: u16) -> anyhow::Result<&Shard> {
    shards.iter().find(|shard| shard.number == number).with_context(|| format!("there is no shard {number}"))
}

/// The id of a member's node, by its own word.
pub(super) async fn node_id(subject: &Subject, name: &str) -> anyhow::Result<String> {
    let members = subject.members().await?;
    let member =
        members.iter().find(|member| member.name == name).with_context(|| format!("no pod {name}"))?;
    let reply = subject.call(member, &["CLUSTER", "MYID"]).await?;
    Ok(reply.text().with_context(|| format!("{name}: {reply:?}"))?.to_owned())
}

/// Waits until a member's node is another.
async fn another_node(subject: &Subject, name: &str, old: &str) -> anyhow::Result<()> {
    until(&format!("{name} to be another node"), PATIENCE, || async {
        if node_id(subject, name).await? == old { bail!("it is {old} still") } else { Ok(()) }
    })
    .await
    .map(|_| ())
}
