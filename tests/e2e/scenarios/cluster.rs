//! Topology Cluster: formed from nothing, a primary killed, two at once, every pod deleted at once. Its clients ask the nodes where slots
//! are and follow redirections; whether all slots are served, every node is asked itself.

use super::{World, remove_with_claims, spec};
use crate::support::{
    journal::Journal,
    load::{Figures, Load, Log, TIMEOUT_READ},
    process::kill_server,
    resp::{Reply, Role},
    slots::{self, Client, Tag},
    subject::{Member, PATIENCE, Subject},
    wait::until,
};
use anyhow::{Context, bail};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, HashSet},
    time::{Duration, Instant},
};

/// Shards of the Valkey Cluster under test: the fewest of which a majority is left when one primary is lost.
pub(super) const SHARDS: u16 = 3;
/// Replicas of each shard.
pub(super) const REPLICAS: u16 = 1;
/// Names of the writers: each writes to the shard of the number with which it begins, and as many are taken as there are shards.
const CLIENTS: [&str; 5] = ["0", "1", "2", "3", "4"];
/// Acknowledged writes of each writer before a fault.
const WRITES: usize = 1_000;
/// Keys that are spread over all slots: two hundred for each shard, read one by one in a moment.
const KEYS: usize = 600;
/// Bound on each wait of a client that writes and reads single keys.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// Until each shard is served, and its primary has its replica in sync again: kubelet's back-off is the longest part.
pub(super) const SETTLED_MAX: Duration = Duration::from_secs(120);
/// Until every node sees what the primaries saw when the cluster became Ready: gossip tells it within a node timeout or two.
pub(super) const GOSSIP_MAX: Duration = Duration::from_secs(10);

/// The Valkey Cluster of the scenarios.
pub fn ledger() -> Value {
    sized(SHARDS, REPLICAS)
}

pub(super) fn sized(shards: u16, replicas: u16) -> Value {
    let mut spec = spec();
    spec["topology"] = json!("Cluster");
    spec["shards"] = json!(shards);
    spec["replicas"] = json!(replicas);
    spec
}

pub(super) fn members_of(shards: u16, replicas: u16) -> usize {
    usize::from(shards) * (usize::from(replicas) + 1)
}

/// A shard whose roles are as they shall be.
#[derive(Clone, Debug)]
pub(super) struct Shard {
    pub(super) number: u16,
    pub(super) primary: Member,
}

/// Three shards with a replica each, from nothing.
pub async fn create(world: &World) -> anyhow::Result<String> {
    formed(&world.ledger, SHARDS, REPLICAS).await
}

/// One shard without replicas, from nothing. Its size cannot change, so it goes again.
pub async fn create_alone(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    let told = formed(subject, 1, 0).await?;
    Journal::of(subject).await?.holds()?;
    remove_with_claims(subject).await?;
    Ok(told)
}

/// One shard's primary process killed without warning.
pub async fn kill(world: &World) -> anyhow::Result<String> {
    killed(world, SHARDS, &[1]).await
}

/// Two of three primaries killed at once: nobody is left who could elect others by a majority.
pub async fn two_killed(world: &World) -> anyhow::Result<String> {
    killed(world, SHARDS, &[0, 2]).await
}

/// The same of one with the operator away: gossip elects its replica, and its own agent makes place for that.
pub async fn kill_alone(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    let before = settled(subject, SHARDS, REPLICAS).await?;
    let load = load(subject, &before).await?;
    world.operator.scale(0).await?;
    let targets: Vec<&Shard> = before.iter().filter(|shard| shard.number == 2).collect();
    let faults = kill_at_once(world, &targets)?;
    load.flows(SETTLED_MAX).await.context("after the kill")?;
    let alone = settled_by_themselves(subject).await;
    world.operator.scale(1).await?;
    alone?;
    settled(subject, SHARDS, REPLICAS).await?;
    subject.ready().await?;
    Outages::of(subject, &load.finish()?, &faults).await?.line()
}

/// All slots are served by every node's word, without anybody's help.
async fn settled_by_themselves(subject: &Subject) -> anyhow::Result<()> {
    let count = members_of(SHARDS, REPLICAS);
    until("the nodes to settle it among themselves", SETTLED_MAX, || nodes_say(subject, count, &[])).await?;
    Ok(())
}

/// Creates it; how long which part took. Every node says that all slots are served, and each shard takes a write.
async fn formed(subject: &Subject, shards: u16, replicas: u16) -> anyhow::Result<String> {
    let count = members_of(shards, replicas);
    subject.apply(&sized(shards, replicas)).await?;
    let (running, ready) = tokio::try_join!(subject.all_running(count), subject.ready())?;
    let (_, later) =
        until("every node to see every other", GOSSIP_MAX, || acquainted(subject, count)).await?;
    let shards = settled(subject, shards, replicas).await?;
    let redirections = write_and_read(subject, &shards).await?;
    if redirections + 1 < shards.len() {
        bail!("a client that knew one node was sent to another only {redirections} times");
    }
    Ok(format!(
        "Ready after {:.1} s, {count} pods running after {:.1} s; by every node's own word {:.1} s later; {redirections} redirections \
         followed",
        ready.as_secs_f64(),
        running.as_secs_f64(),
        later.as_secs_f64(),
    ))
}

/// Every node serves all slots, and knows its fellow members and nobody else.
pub(super) async fn acquainted(subject: &Subject, count: usize) -> anyhow::Result<()> {
    let known = count.to_string();
    nodes_say(subject, count, &[("cluster_known_nodes", known.as_str())]).await
}

/// Every node says that all slots are served, and what else is wanted of its `CLUSTER INFO`.
async fn nodes_say(subject: &Subject, count: usize, more: &[(&str, &str)]) -> anyhow::Result<()> {
    let all = [("cluster_state", "ok"), ("cluster_slots_assigned", "16384"), ("cluster_slots_ok", "16384")];
    let members = subject.members().await?;
    if members.len() != count {
        bail!("{} of {count} pods", members.len());
    }
    for member in &members {
        let reply = subject.call(member, &["CLUSTER", "INFO"]).await.context(member.name.clone())?;
        let text = reply.text().with_context(|| format!("{}: {reply:?}", member.name))?;
        for (field, wanted) in all.iter().chain(more) {
            let said = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
            if said.map(str::trim_end) != Some(*wanted) {
                bail!("{} says {field} {said:?}, not {wanted}", member.name);
            }
        }
    }
    Ok(())
}

/// Each shard's primary, if it is one by its own word and its label, with all replicas in sync.
pub(super) async fn shards_now(subject: &Subject, shards: u16, replicas: u16) -> anyhow::Result<Vec<Shard>> {
    let roles = subject.roles().await?;
    let mut found = Vec::new();
    for number in 0..shards {
        let prefix = format!("{}-{number}-", subject.name);
        let of_shard: Vec<_> = roles.iter().filter(|(m, _)| m.name.starts_with(&prefix)).collect();
        let primaries: Vec<_> = of_shard.iter().filter(|(_, role)| *role == Role::Primary).collect();
        let [(primary, _)] = primaries.as_slice() else {
            bail!("shard {number} has {} primaries", primaries.len());
        };
        let in_sync = |role: &Role| matches!(role, Role::Replica { of: _, link } if link == "connected");
        let linked = of_shard.iter().filter(|(_, role)| in_sync(role)).count();
        if linked != usize::from(replicas) {
            bail!("shard {number} has {linked} replicas with a link");
        }
        for (member, role) in of_shard {
            let wanted = if *role == Role::Primary { "primary" } else { "replica" };
            if member.label.as_deref() != Some(wanted) {
                bail!("{} is {role:?} and labelled {:?}", member.name, member.label);
            }
        }
        // A replica's link is there before its primary feeds it.
        let told = subject.call(primary, &["INFO", "replication"]).await?;
        let fed = told.text().unwrap_or_default().matches("state=online").count();
        if fed != usize::from(replicas) {
            bail!("{} feeds {fed} replicas", primary.name);
        }
        found.push(Shard { number, primary: primary.clone() });
    }
    Ok(found)
}

/// Waits until a fault may come: all slots are served by every node's word, and each primary has its replicas.
pub(super) async fn settled(subject: &Subject, shards: u16, replicas: u16) -> anyhow::Result<Vec<Shard>> {
    let found = until("every shard to have its primary and replicas", SETTLED_MAX, || async {
        nodes_say(subject, members_of(shards, replicas), &[]).await?;
        shards_now(subject, shards, replicas).await
    });
    Ok(found.await?.0)
}

/// A hash tag for each shard, in their order.
pub(super) async fn tags(subject: &Subject, shards: &[Shard]) -> anyhow::Result<Vec<Tag>> {
    let first = shards.first().context("no shards")?;
    let mut node = subject.connect(&first.primary, CALL_TIMEOUT).await?;
    let by_owner = tokio::task::spawn_blocking(move || slots::tags(&mut node)).await??;
    let of = |shard: &Shard| {
        let tag = shard.primary.address.and_then(|address| by_owner.get(&address)).cloned();
        tag.with_context(|| format!("{} serves no slot of {by_owner:?}", shard.primary.name))
    };
    shards.iter().map(of).collect()
}

/// A client that begins at any member that answers.
pub(super) async fn client(subject: &Subject, timeout: Duration) -> anyhow::Result<Client> {
    let roles = subject.roles().await?;
    let first = roles.iter().find_map(|(member, _)| member.address).context("nobody answers")?;
    Ok(Client::new(subject.reach.clone(), first, subject.password().await?, timeout))
}

/// A write and a read in each shard, by a client that knows one node; then the primaries are asked themselves. How often the client
/// was sent elsewhere.
async fn write_and_read(subject: &Subject, shards: &[Shard]) -> anyhow::Result<usize> {
    let tags = tags(subject, shards).await?;
    let keys: Vec<String> = tags.iter().map(|tag| tag.key("tests:formed")).collect();
    let (mut client, written) = (client(subject, CALL_TIMEOUT).await?, keys.clone());
    let redirections = tokio::task::spawn_blocking(move || -> anyhow::Result<usize> {
        for key in &written {
            let (set, got) = (client.call(&["SET", key, key])?, client.call(&["GET", key])?);
            if (set.text(), got.text()) != (Some("OK"), Some(key)) {
                bail!("{key}: SET {set:?}, GET {got:?}");
            }
        }
        Ok(client.redirections)
    });
    let redirections = redirections.await??;
    for (shard, key) in shards.iter().zip(&keys) {
        let kept = subject.call(&shard.primary, &["GET", key]).await?;
        if kept.text() != Some(key) {
            bail!("{} has {kept:?} as {key}", shard.primary.name);
        }
    }
    Ok(redirections)
}

/// A writer for each shard.
pub(super) async fn load(subject: &Subject, shards: &[Shard]) -> anyhow::Result<Load> {
    load_of(subject, shards, CLIENTS.get(..shards.len()).context("more shards than writers have names")?)
        .await
}

/// Writers of these names, each to the shard of the number with which its name begins.
pub(super) async fn load_of(
    subject: &Subject,
    shards: &[Shard],
    names: &[&'static str],
) -> anyhow::Result<Load> {
    let tags = tags(subject, shards).await?;
    let tag_of = |name: &&'static str| {
        let number = shard_of_writer(name)?;
        let found = shards.iter().zip(&tags).find(|(shard, _)| shard.number == number);
        found.map(|(_, tag)| (*name, tag.clone())).with_context(|| format!("there is no shard {number}"))
    };
    let writers = names.iter().map(tag_of).collect::<anyhow::Result<Vec<_>>>()?;
    let load = Load::on_slots(subject, writers).await?;
    load.grows_by(WRITES, SETTLED_MAX).await?;
    Ok(load)
}

fn shard_of_writer(name: &str) -> anyhow::Result<u16> {
    let number = name.split(' ').next().unwrap_or(name);
    number.parse().with_context(|| format!("the writer {name} has no shard"))
}

/// Kills the primaries of these shards, out of so many, under load.
pub(super) async fn killed(world: &World, shards: u16, which: &[u16]) -> anyhow::Result<String> {
    let subject = &world.ledger;
    let before = settled(subject, shards, REPLICAS).await?;
    let load = load(subject, &before).await?;
    let targets: Vec<&Shard> = before.iter().filter(|shard| which.contains(&shard.number)).collect();
    let faults = kill_at_once(world, &targets)?;
    load.flows(SETTLED_MAX).await.context("after the kill")?;
    let after = settled(subject, shards, REPLICAS).await?;
    subject.ready().await?;
    let outages = Outages::of(subject, &load.finish()?, &faults).await?;
    let changes = before.iter().zip(&after).filter(|(old, _)| which.contains(&old.number));
    let changes: Vec<String> =
        changes.map(|(old, new)| format!("{} -> {}", old.primary.name, new.primary.name)).collect();
    Ok(format!("{}; {}", changes.join(", "), outages.line()?))
}

/// Kills primaries side by side; the time just before each kill, by shard.
pub(super) fn kill_at_once(world: &World, targets: &[&Shard]) -> anyhow::Result<BTreeMap<u16, Instant>> {
    let kill = |shard: &Shard| kill_server(world.place, &world.ledger.namespace, &shard.primary);
    std::thread::scope(|scope| {
        let kills: Vec<_> = targets.iter().map(|shard| (shard.number, scope.spawn(|| kill(shard)))).collect();
        let ended = kills.into_iter().map(|(number, kill)| {
            let at = kill.join().map_err(|_| anyhow::anyhow!("a kill panicked"))??;
            Ok((number, at))
        });
        ended.collect()
    })
}

/// Every pod deleted at once, under load: what was acknowledged is there again, whoever comes back first.
pub async fn all_deleted(world: &World) -> anyhow::Result<String> {
    let subject = &world.ledger;
    let before = settled(subject, SHARDS, REPLICAS).await?;
    let run = format!("{:x}", std::time::UNIX_EPOCH.elapsed()?.as_nanos());
    write_keys(subject, &run).await?;
    let load = load(subject, &before).await?;
    let old: HashSet<String> = subject.members().await?.into_iter().map(|member| member.uid).collect();
    let fault = Instant::now();
    for member in subject.members().await? {
        subject.delete_pod(&member.name).await?;
    }
    let new_pods = async {
        until("every pod to be another", PATIENCE, || none_of(subject, &old)).await?;
        subject.all_running(members_of(SHARDS, REPLICAS)).await?;
        anyhow::Ok(fault.elapsed())
    };
    let keys = async {
        until("every key to be read from new pods", PATIENCE, || async {
            none_of(subject, &old).await?;
            read_keys(subject, &run).await
        })
        .await?;
        anyhow::Ok(fault.elapsed())
    };
    // Pods are Kubernetes' part of it.
    let (running, read) = tokio::try_join!(new_pods, keys)?;
    // A node that was away is held for dead by others for some seconds after its return, served as it is.
    until("all slots to be served by every node's word", SETTLED_MAX, || {
        nodes_say(subject, members_of(SHARDS, REPLICAS), &[])
    })
    .await?;
    let served = fault.elapsed();
    load.flows(SETTLED_MAX).await.context("after the deletion")?;
    subject.ready().await?;
    let ready = fault.elapsed();
    settled(subject, SHARDS, REPLICAS).await?;
    let faults = (0..SHARDS).map(|number| (number, fault)).collect();
    let outages = Outages::of(subject, &load.finish()?, &faults).await?;
    // Nobody was killed: every server could write down what it had acknowledged.
    outages.nothing_is_excused()?;
    Ok(format!(
        "{KEYS} keys of all slots read after {:.1} s (the last pod ran after {:.1} s), served by every node's word after {:.1} s, Ready \
         after {:.1} s; {}",
        read.as_secs_f64(),
        running.as_secs_f64(),
        served.as_secs_f64(),
        ready.as_secs_f64(),
        outages.line()?,
    ))
}

/// No pod has one of these uids.
pub(super) async fn none_of(subject: &Subject, old: &HashSet<String>) -> anyhow::Result<()> {
    match subject.members().await?.iter().find(|member| old.contains(&member.uid)) {
        Some(left) => bail!("{} is the old one still", left.name),
        None => Ok(()),
    }
}

fn keys(run: &str) -> impl Iterator<Item = (String, String)> {
    (0..KEYS).map(move |number| (format!("tests:spread:{number}"), format!("{run}-{number}")))
}

/// Writes the keys of this run, each acknowledged.
async fn write_keys(subject: &Subject, run: &str) -> anyhow::Result<()> {
    let (mut client, pairs) = (client(subject, CALL_TIMEOUT).await?, keys(run).collect::<Vec<_>>());
    let write = move || -> anyhow::Result<()> {
        for (key, value) in &pairs {
            let reply = client.call(&["SET", key, value])?;
            if reply.text() != Some("OK") {
                bail!("SET {key}: {reply:?}");
            }
        }
        Ok(())
    };
    tokio::task::spawn_blocking(write).await?
}

/// Reads them; the first that is not as it was written is an error.
async fn read_keys(subject: &Subject, run: &str) -> anyhow::Result<()> {
    let (mut client, pairs) = (client(subject, CALL_TIMEOUT).await?, keys(run).collect::<Vec<_>>());
    let read = move || -> anyhow::Result<()> {
        for (key, value) in &pairs {
            let reply = client.call(&["GET", key])?;
            if reply.text() != Some(value.as_str()) {
                bail!("{key} is {reply:?} and was {value}");
            }
        }
        Ok(())
    };
    tokio::task::spawn_blocking(read).await?
}

/// What the writers saw of one moment of faults.
pub(super) struct Outages {
    /// Longest gap between acknowledgements from the first fault on, of each shard that had a fault, in milliseconds.
    pub(super) hit: BTreeMap<String, f64>,
    /// The same of the other shards.
    others: BTreeMap<String, f64>,
    /// Of all writers.
    loss: Figures,
}

impl Outages {
    /// Reads everything back from whoever owns it.
    pub(super) async fn of(
        subject: &Subject,
        logs: &[Log],
        faults: &BTreeMap<u16, Instant>,
    ) -> anyhow::Result<Outages> {
        let first = faults.values().min().context("no fault")?;
        let mut outages = Outages { hit: BTreeMap::new(), others: BTreeMap::new(), loss: Figures::default() };
        for log in logs {
            let fault = faults.get(&shard_of_writer(log.client)?).copied();
            // A shard without a fault has no excuse for any loss.
            outages.loss.add_loss(log, &kept(subject, &log.key).await?, fault.as_slice());
            let gap = log.gap_ms(*first, None)?;
            let list = if fault.is_some() { &mut outages.hit } else { &mut outages.others };
            list.insert(log.client.to_owned(), gap);
        }
        Ok(outages)
    }

    /// Fails on any loss: where nobody was killed, no write was on its way to replicas when its primary went.
    pub(super) fn nothing_is_excused(&self) -> anyhow::Result<()> {
        self.loss.nothing_lost()?;
        if self.loss.loss.in_flight > 0 { bail!("{}", self.loss.loss) } else { Ok(()) }
    }

    pub(super) fn line(&self) -> anyhow::Result<String> {
        self.loss.nothing_lost()?;
        let told = |gaps: &BTreeMap<String, f64>| {
            let each = gaps.iter().map(|(shard, ms)| format!("shard {shard} {ms:.0} ms"));
            each.collect::<Vec<_>>().join(", ")
        };
        let others = match self.others.len() {
            0 => String::new(),
            _ => format!(" (of the others {})", told(&self.others)),
        };
        let hit =
            if self.hit.is_empty() { "outage".to_owned() } else { format!("outage {}", told(&self.hit)) };
        Ok(format!("{hit}{others}; {}", self.loss.loss))
    }
}

/// The members of a set of numbers, read from its owner.
pub(super) async fn kept(subject: &Subject, key: &str) -> anyhow::Result<HashSet<u64>> {
    let (mut client, key) = (client(subject, TIMEOUT_READ).await?, key.to_owned());
    let read = move || client.call(&["SMEMBERS", &key]);
    let reply = tokio::task::spawn_blocking(read).await??;
    Ok(reply.list().iter().filter_map(Reply::text).filter_map(|text| text.parse().ok()).collect())
}
