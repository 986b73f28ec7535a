//! Two operators: the one that leads stands still in the middle of a failover, the other takes over and does it, and then the first
//! goes on. Whatever it still had in its hands arrives, late, and must change nothing.

use super::{World, leadership::led};
use crate::support::{
    audit_log::{Asked, AuditLog},
    journal::{Journal, claims, newest, number, one_writer_at_a_time},
    load::{IN_FLIGHT, Load, Log, TIMEOUT_READ, Target, turns},
    net::{Cut, cut_calls, cut_held_calls},
    operator::Instance,
    process::{epoch_in_ledger, is_stopped, kill_server, signal},
    resp::Reach,
    subject::Member,
    wait::until,
};
use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::Service;
use kube::{Api, ResourceExt};
use serde_json::Value;
use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

/// Until a primary has a replica in sync again, and for everything that follows a takeover.
const SETTLED_MAX: Duration = Duration::from_secs(120);
/// How long the first operator stands still at least: longer than the Lease and everything that its writes wait for.
const STANDSTILL: Duration = Duration::from_secs(20);
/// Acknowledged writes before the fault, and after the first operator went on.
const WRITES: usize = 1_000;
/// Port of the agents.
const AGENT_PORT: u16 = 7443;
/// Port of the API server's Service.
const API_PORT: u16 = 443;
/// Names of the writers, each of which writes to one member.
const CLIENTS: [&str; 3] = ["0", "1", "2"];

/// Where the first operator is stopped, and so what it has under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// The decision is in the journal; the promotion is on its way to the agent.
    AfterTheRecord,
    /// The decision is on its way to the journal.
    BeforeTheRecord,
}

/// Stopped between the commit of a promotion and its effect.
pub async fn two_operators(world: &World) -> anyhow::Result<String> {
    with_two(world, Moment::AfterTheRecord).await
}

/// Stopped with a record under way that the API server does not have yet.
pub async fn late_append(world: &World) -> anyhow::Result<String> {
    with_two(world, Moment::BeforeTheRecord).await
}

async fn with_two(world: &World, moment: Moment) -> anyhow::Result<String> {
    let single = world.operator.pair().await?;
    let told = deposed(world, moment).await;
    world.operator.alone(single).await?;
    told
}

/// The first operator, as it was when it was stopped. It goes on when this is dropped, whatever became of the scenario.
struct Stopped {
    first: Instance,
    since: Instant,
    cut: Cut,
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = signal(self.first.pid, "CONT");
    }
}

async fn deposed(world: &World, moment: Moment) -> anyhow::Result<String> {
    let (subject, audit) = (&world.subject, world.audit.as_ref().context("no audit log")?);
    led(world).await?;
    let primary = subject.protected(SETTLED_MAX).await?;
    let members = subject.members().await?;
    let uid = subject.get().await?.uid().context("no UID")?;
    let first = world.operator.leader().await?;
    let epoch = epoch(world, &uid).await?;
    let load = on_each(world, &members).await?;
    let begun = audit.end()?;
    let (mut stopped, fault) = stop_in_a_failover(world, &uid, &first, &primary, moment).await?;
    // Another writes into the journal, and then clients write again.
    until("another to claim the journal", SETTLED_MAX, || async {
        let now = self::epoch(world, &uid).await?;
        if now > epoch { Ok(()) } else { bail!("epoch {now}") }
    })
    .await?;
    let took_over = stopped.since.elapsed();
    subject.ready().await?;
    let outage = fault.elapsed();
    let second = world.operator.leader().await?;
    if second.name == first.name {
        bail!("{} leads although it stands still", first.name);
    }
    tokio::time::sleep(STANDSTILL.saturating_sub(stopped.since.elapsed())).await;
    let now = subject.protected(SETTLED_MAX).await?;
    obeyed(world, epoch + 1).await?;
    let late = go_on(world, &mut stopped).await?;
    load.grows_of(client(&members, &now)?, WRITES, SETTLED_MAX).await?;
    obeyed(world, epoch + 1).await?;
    let logs = load.finish()?;
    let seen = Seen { world, audit, begun, uid: &uid, first: &first, second: &second };
    let refused = seen.nothing_of_the_first(epoch, moment).await?;
    let acknowledged = one_after_the_other(world, &members, &logs, [&primary, &now], fault).await?;
    Ok(format!(
        "{} stood still for {:.1} s with {late} bytes under way, {} claimed after {:.1} s and was done after {:.1} s; {refused}; {} \
         -> {}, 0 of {acknowledged} acknowledged writes lost, one writable at a time",
        first.name,
        stopped.since.elapsed().as_secs_f64(),
        second.name,
        took_over.as_secs_f64(),
        outage.as_secs_f64(),
        primary.name,
        now.name,
    ))
}

/// A writer for each member, whatever its role: who accepts writes is seen by who acknowledges them.
async fn on_each(world: &World, members: &[Member]) -> anyhow::Result<Load> {
    let mut targets = Vec::new();
    for (client, member) in CLIENTS.iter().zip(members) {
        targets.push((*client, Target::Member(member.address.context("no address")?)));
    }
    let load = Load::on(targets, &Reach::Direct, &world.subject.password().await?)?;
    let primary = world.subject.primary().await?;
    load.grows_of(client(members, &primary)?, WRITES, SETTLED_MAX).await?;
    Ok(load)
}

/// Name of the writer to a member.
fn client(members: &[Member], member: &Member) -> anyhow::Result<&'static str> {
    let at = members.iter().position(|m| m.name == member.name).context("no such member")?;
    CLIENTS.get(at).copied().context("more members than writers")
}

/// Kills the primary and stops the operator that leads at the moment in question. What it sends from then on waits in its pod's kernel.
async fn stop_in_a_failover(
    world: &World,
    uid: &str,
    first: &Instance,
    primary: &Member,
    moment: Moment,
) -> anyhow::Result<(Stopped, Instant)> {
    let subject = &world.subject;
    let before = newest(&world.client, uid).await?.last().map_or(0, |record| number(record, "seq"));
    let cut = match moment {
        Moment::AfterTheRecord => cut_held_calls(first.pid, AGENT_PORT)?,
        Moment::BeforeTheRecord => cut_calls(first.pid, &[api_address(world).await?], API_PORT)?,
    };
    let fault = kill_server(world.place, &subject.namespace, primary)?;
    match moment {
        Moment::AfterTheRecord => {
            let decided = || async {
                let records = newest(&world.client, uid).await?;
                let promotes = |r: &Value| number(r, "seq") > before && promotes(r);
                records.into_iter().find(promotes).context("no promotion is decided")
            };
            until("the decision to be in the journal", SETTLED_MAX, decided).await?;
        }
        Moment::BeforeTheRecord => {
            until("a record to be under way", SETTLED_MAX, || async {
                match cut.unsent()? {
                    // A renewal of the Lease is smaller.
                    bytes if bytes > APPEND_BYTES_MIN => Ok(()),
                    bytes => bail!("{bytes} bytes wait to be sent"),
                }
            })
            .await?;
        }
    }
    let since = signal(first.pid, "STOP")?;
    let stopped = Stopped { first: first.clone(), since, cut };
    until("the first operator to stand still", SETTLED_MAX, || async {
        if is_stopped(first.pid) { Ok(()) } else { bail!("it runs") }
    })
    .await?;
    let under_way = stopped.cut.unsent()?;
    let records = newest(&world.client, uid).await?;
    let since_then: Vec<&Value> = records.iter().filter(|r| number(r, "seq") > before).collect();
    let decided = since_then.iter().any(|r| promotes(r));
    let ended = since_then.iter().any(|r| r.pointer("/event/EffectsEnded").is_some());
    if under_way == 0 || ended || decided != (moment == Moment::AfterTheRecord) {
        bail!(
            "not stopped {moment:?}: {under_way} bytes under way, decided {decided}, effects ended {ended}"
        );
    }
    Ok((stopped, fault))
}

/// A renewal of the Lease has about 1,400 bytes with its envelope, and at most two of them wait when the record comes; an append sends
/// the whole head object.
const APPEND_BYTES_MIN: u64 = 4_000;

fn promotes(record: &Value) -> bool {
    let effects = record.pointer("/event/Decided/decision/effects").and_then(Value::as_array);
    effects.is_some_and(|effects| effects.iter().any(|effect| effect.get("Promote").is_some()))
}

async fn api_address(world: &World) -> anyhow::Result<IpAddr> {
    let services: Api<Service> = Api::namespaced(world.client.clone(), "default");
    let service = services.get("kubernetes").await?;
    Ok(service.spec.and_then(|spec| spec.cluster_ip).context("no address")?.parse()?)
}

/// Epoch of the newest record.
async fn epoch(world: &World, uid: &str) -> anyhow::Result<i64> {
    let records = newest(&world.client, uid).await?;
    Ok(number(records.last().context("an empty tail")?, "epoch"))
}

/// Every agent has written down the epoch.
async fn obeyed(world: &World, epoch: i64) -> anyhow::Result<()> {
    for member in world.subject.members().await? {
        let known = epoch_in_ledger(&member)?;
        if known != epoch {
            bail!("the agent of {} knows epoch {known}, not {epoch}", member.name);
        }
    }
    Ok(())
}

/// What was under way arrives while the first operator still stands; then it goes on, until it says that it stands by. Bytes that
/// arrived late.
async fn go_on(world: &World, stopped: &mut Stopped) -> anyhow::Result<u64> {
    let late = stopped.cut.unsent()?;
    stopped.cut.mend()?;
    until("what was under way to arrive", SETTLED_MAX, || async {
        match stopped.cut.unsent()? {
            0 => Ok(()),
            bytes => bail!("{bytes} bytes wait"),
        }
    })
    .await?;
    signal(stopped.first.pid, "CONT")?;
    until("the first operator to see that another leads", SETTLED_MAX, || async {
        let log = world.operator.log_of(&stopped.first.name).await?;
        let after = log.rsplit("\"leading\"").next().unwrap_or_default();
        if after.contains("another leads") { Ok(()) } else { bail!("it does not say so") }
    })
    .await?;
    Ok(late)
}

/// What is known of a takeover.
struct Seen<'a> {
    world: &'a World,
    audit: &'a AuditLog,
    begun: u64,
    uid: &'a str,
    first: &'a Instance,
    second: &'a Instance,
}

impl Seen<'_> {
    /// Journal and API server accepted nothing of the first operator once the second had claimed the journal.
    async fn nothing_of_the_first(&self, epoch: i64, moment: Moment) -> anyhow::Result<String> {
        let Seen { world, audit, begun, uid, first, second } = self;
        let journal = Journal::of(&world.subject).await?;
        journal.holds()?;
        let records = journal.records()?;
        one_writer_at_a_time(&records)?;
        let last = claims(&records).pop().context("nobody claimed the journal")?;
        if last.0 != epoch + 1 || !second.has(&last.1) {
            bail!("the last claim is {last:?}, not one of {} with epoch {}", second.name, epoch + 1);
        }
        let asked = audit.asked_since(*begun)?;
        let by = |one: &Instance| asked.iter().filter(|a| a.by == one.name).collect::<Vec<&Asked>>();
        let claimed = by(second).into_iter().find(|a| a.is_done() && a.is_of_head(uid));
        let claimed = claimed.context("the audit log has no claim of the second operator")?;
        let after = |one: &Instance| -> Vec<&Asked> {
            by(one).into_iter().filter(|a| a.answered > claimed.answered && !a.is_lease).collect()
        };
        if let Some(done) = after(first).into_iter().find(|a| a.is_done()) {
            bail!("{} of the first operator was accepted after the second's claim: {done:?}", done.what);
        }
        // The same search finds what the second did.
        if !after(second).iter().any(|a| a.is_done() && a.what.starts_with("update endpointslices/")) {
            bail!("the audit log does not have the second operator's move of the route");
        }
        let late = after(first).into_iter().filter(|a| a.is_of_head(uid)).count();
        match (moment, late) {
            (Moment::BeforeTheRecord, 0) => bail!("the late record never came to the API server"),
            (Moment::BeforeTheRecord, _) => Ok(format!("{late} late write(s) of the journal refused")),
            (Moment::AfterTheRecord, _) => {
                let log = world.operator.log_of(&first.name).await?;
                let said = log.lines().rfind(|line| line.contains("\"ended\"") && line.contains("promote"));
                let said: Option<Value> = said.and_then(|line| serde_json::from_str(line).ok());
                let outcome = said.as_ref().and_then(|line| line.get("outcome")?.as_str()).unwrap_or("none");
                Ok(format!(
                    "the late promotion changed nothing (the first operator's word for it: {outcome})"
                ))
            }
        }
    }
}

/// First the old primary acknowledged, then the new one, and nothing that was acknowledged is lost. How much that was.
async fn one_after_the_other(
    world: &World,
    members: &[Member],
    logs: &[Log],
    [old, new]: [&Member; 2],
    fault: Instant,
) -> anyhow::Result<usize> {
    let order: Vec<&str> = turns(logs).into_iter().map(|(client, _)| client).collect();
    if order != [client(members, old)?, client(members, new)?] {
        bail!("writes were acknowledged by {order:?} in turn, not by {} and then by {}", old.name, new.name);
    }
    for log in logs {
        let kept = world.subject.set(&log.key, TIMEOUT_READ).await?;
        if let Some(at) =
            log.missing(&kept).into_iter().find(|at| *at + IN_FLIGHT < fault || *at > fault + IN_FLIGHT)
        {
            bail!(
                "a write acknowledged {:.1} ms after the fault is lost",
                at.saturating_duration_since(fault).as_secs_f64() * 1000.0
            );
        }
    }
    Ok(logs.iter().map(Log::count).sum())
}
