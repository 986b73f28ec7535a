//! Passwords that are lost or changed: the operator goes on looking and failing over, as agents know whom their servers let in, and the members
//! take the new ones up.

use super::World;
use crate::support::{
    load::{Figures, Load},
    process::kill_server,
    resp::Reply,
    subject::{Member, PATIENCE, Subject},
    wait::until,
};
use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::{
    Api,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use serde_json::json;
use std::{collections::BTreeSet, time::Duration};

/// Until a primary has a replica in sync again.
const SETTLED_MAX: Duration = Duration::from_secs(120);
/// Acknowledged writes before the Secrets go.
const WRITES: usize = 500;
/// For the last of them to reach a replica.
const REPLICATED: Duration = Duration::from_secs(1);
/// Until every member has been restarted with the new passwords: for each kubelet takes up to 90 s to bring a changed Secret.
const ROLLED_MAX: Duration = Duration::from_secs(600);

/// All Secrets of the cluster are deleted while the operator is away: nobody knows the passwords any more. It comes back, and a primary is killed.
/// Clients have the old password of the application, which each member lets in until it is made anew: nothing is asked of them any more.
pub async fn lost(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    subject.protected(SETTLED_MAX).await?;
    let before = pods(subject).await?;
    let load = Load::start(subject).await?;
    load.grows_by(WRITES, PATIENCE).await?;
    world.operator.scale(0).await?;
    let secrets = secrets(subject);
    for kind in ["auth", "system", "identity-0"] {
        secrets.delete(&format!("{}-{kind}", subject.name), &DeleteParams::default()).await?;
    }
    let logs = load.finish()?;
    tokio::time::sleep(REPLICATED).await;
    world.operator.scale(1).await?;
    let made = completed(subject).await?;
    let (route, primary) = routed(subject).await?;
    let fault = kill_server(subject.place, &subject.namespace, &primary)?;
    until("the write Service to lead to another", PATIENCE, || async {
        let now = subject.route().await?;
        if now.is_empty() || now == route { bail!("it leads to {now:?}") } else { Ok(()) }
    })
    .await?;
    let moved = fault.elapsed();
    let rolled = anew(subject, &before).await?;
    let figures = Figures::of(subject, &logs, &[]).await?;
    figures.nothing_lost()?;
    Ok(format!(
        "made anew after {:.1} s; the write Service moved {} ms after the kill; {}; all members anew {:.0} s after",
        made.as_secs_f64(),
        moved.as_millis(),
        figures.loss,
        rolled.as_secs_f64()
    ))
}

/// Somebody writes other passwords of replication and of the operator's user where they are kept.
pub async fn changed(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    subject.protected(SETTLED_MAX).await?;
    let before = pods(subject).await?;
    let load = Load::start(subject).await?;
    let other = |what: &str| format!("{what}-{}", rand::random::<u64>());
    let patch = json!({ "stringData": {
        "operator-password": other("operator"), "replica-password": other("replica"),
    } });
    let name = format!("{}-system", subject.name);
    secrets(subject).patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await?;
    // Otherwise it is read within twenty minutes.
    subject.annotate("example.com/passwords", &other("changed")).await?;
    kill_while_new(subject, load, before).await
}

fn secrets(subject: &Subject) -> Api<Secret> {
    Api::namespaced(subject.client.clone(), &subject.namespace)
}

/// As soon as the Secret has them, and long before every member has, the primary is killed. In the end every member is a new one.
async fn kill_while_new(subject: &Subject, load: Load, before: BTreeSet<String>) -> anyhow::Result<String> {
    let made = completed(subject).await?;
    let (_, primary) = routed(subject).await?;
    let fault = kill_server(subject.place, &subject.namespace, &primary)?;
    load.flows(Duration::from_secs(10)).await?;
    let logs = load.finish()?;
    let rolled = anew(subject, &before).await?;
    let figures = Figures::of(subject, &logs, &[fault]).await?;
    figures.nothing_lost()?;
    Ok(format!(
        "taken in after {:.1} s; {}; all members anew {:.0} s after",
        made.as_secs_f64(),
        figures.line(),
        rolled.as_secs_f64()
    ))
}

/// How long it took until what members mount has the password of the Secret.
async fn completed(subject: &Subject) -> anyhow::Result<Duration> {
    let name = format!("{}-system", subject.name);
    let completed = until("the Secret to be completed", PATIENCE, || async {
        let Some(secret) = secrets(subject).get_opt(&name).await? else { bail!("it is not there") };
        let data = secret.data.unwrap_or_default();
        let text = |key: &str| data.get(key).map(|bytes| String::from_utf8_lossy(&bytes.0).into_owned());
        let (auth, password) = (text("auth.conf").unwrap_or_default(), text("replica-password"));
        let is_taken_in = password.is_some_and(|password| auth.contains(&password));
        if is_taken_in { Ok(()) } else { bail!("what is mounted has another password") }
    });
    Ok(completed.await?.1)
}

/// Where the write Service leads, and whose address that is: not every member lets in the new password of the application yet.
async fn routed(subject: &Subject) -> anyhow::Result<(Vec<String>, Member)> {
    let (route, members) = (subject.route().await?, subject.members().await?);
    let serves = members.into_iter().find(|m| m.address.is_some_and(|a| route == [a.to_string()]));
    let primary = serves.with_context(|| format!("the write Service leads to {route:?}"))?;
    Ok((route, primary))
}

/// Waits until every member is a new one that lets in whoever has the password of the application; how long that took.
async fn anew(subject: &Subject, before: &BTreeSet<String>) -> anyhow::Result<Duration> {
    let ((), rolled) = until("members that were made with the new passwords", ROLLED_MAX, || async {
        let now = pods(subject).await?;
        if now.len() != before.len() || now.intersection(before).next().is_some() {
            bail!("not every pod is another: {now:?}");
        }
        for member in subject.members().await? {
            let reply = subject.call(&member, &["PING"]).await?;
            if !matches!(&reply, Reply::Text(text) if text == "PONG") {
                bail!("{} says {reply:?}", member.name);
            }
        }
        Ok(())
    })
    .await?;
    subject.ready().await?;
    subject.protected(SETTLED_MAX).await?;
    Ok(rolled)
}

/// The UIDs of the members' pods.
async fn pods(subject: &Subject) -> anyhow::Result<BTreeSet<String>> {
    let api: Api<Pod> = Api::namespaced(subject.client.clone(), &subject.namespace);
    let of_cluster = ListParams::default().labels(&format!("valkeeper.io/cluster={}", subject.name));
    Ok(api.list(&of_cluster).await?.items.into_iter().filter_map(|pod| pod.metadata.uid).collect())
}
