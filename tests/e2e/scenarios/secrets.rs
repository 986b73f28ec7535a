//! No secret byte is anywhere but in Secrets, whatever the operator does and however much it says of it.

use super::{NAMESPACE, World, gone, spec};
use crate::support::{
    MANAGER,
    journal::Journal,
    operator,
    process::{kill_server, pids_in_pod, proc_text},
    secrets::{LogFiles, Marker, markers_of, pods_of, text_of},
    subject::PATIENCE,
    wait::until,
};
use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::Secret;
use kube::{
    Api, ResourceExt,
    api::{Patch, PatchParams},
};
use serde_json::json;
use std::{process::Command, time::Duration};

/// The user's own Secret.
const PASSWORD_SECRET: &str = "orders-own-password";
/// Every character that some spelling escapes, and enough others.
const PASSWORD: &str = "p\"w\\d /é&<+>%=#'?:@ marker-of-the-user-0123456789";
/// Where the operator's process finds its token.
const TOKEN: &str = "var/run/secrets/kubernetes.io/serviceaccount/token";
/// Everything of a namespace that is not a Secret.
const KINDS: &str = "configmaps,events,events.events.k8s.io,pods,deployments,statefulsets,controllerrevisions,services,endpointslices,\
                     leases,poddisruptionbudgets,persistentvolumeclaims,valkeyclusters";
/// Until a promotion and a rollout are through.
const SETTLED_MAX: Duration = Duration::from_secs(120);

/// A life with everything that the operator does, at its loudest; then the search.
pub async fn nowhere(world: &World) -> anyhow::Result<String> {
    world.operator.log_level("trace").await?;
    let told = loud(world).await;
    world.operator.log_level("info").await?;
    told
}

async fn loud(world: &World) -> anyhow::Result<String> {
    let subject = &world.subject;
    let begun = world.audit.as_ref().context("no audit log")?.end()?;
    let mut logs = LogFiles::of(&[NAMESPACE, operator::NAMESPACE])?;
    own_password(world).await?;
    let mut wanted = spec();
    wanted["auth"] = json!({ "passwordSecret": { "name": PASSWORD_SECRET } });
    subject.apply(&wanted).await?;
    subject.ready().await?;
    logs.look()?;
    let uid = subject.get().await?.uid().context("no UID")?;
    let markers = markers(world, &uid).await?;
    controls(world, &markers).await?;
    failover_and_switchover(world).await?;
    logs.look()?;
    let mut texts = processes(world).await?;
    restart(world).await?;
    logs.look()?;
    texts.extend(processes(world).await?);
    texts.extend(objects(world)?);
    subject.delete().await?;
    gone(subject).await?;
    logs.look()?;
    texts.extend(objects(world)?);
    let journal = Journal::of_uid(&world.client, &uid).await?;
    texts.push(("export of the journal".to_owned(), journal.ask(&["export"])?));
    texts.push(("journals".to_owned(), text_of(&journal.path)?));
    texts.push(("audit log".to_owned(), world.audit.as_ref().context("no audit log")?.text_since(begun)?));
    let of_logs = logs.read()?;
    loud_enough(&of_logs)?;
    let spoken: usize = of_logs.iter().map(|(_, text)| text.len()).sum();
    texts.extend(of_logs);
    let bytes: usize = texts.iter().map(|(_, text)| text.len()).sum();
    let found = search(&markers, &texts);
    if !found.is_empty() {
        bail!("secrets in the open:\n     {}", found.join("\n     "));
    }
    let spellings: usize = markers.iter().map(|marker| marker.spellings.len()).sum();
    Ok(format!(
        "{} secrets in {spellings} spellings, none in {} texts of {:.1} MB, {:.1} MB of them logs",
        markers.len(),
        texts.len(),
        bytes as f64 / 1e6,
        spoken as f64 / 1e6,
    ))
}

async fn own_password(world: &World) -> anyhow::Result<()> {
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret",
        "metadata": { "name": PASSWORD_SECRET, "namespace": NAMESPACE },
        "stringData": { "password": PASSWORD },
    });
    let api: Api<Secret> = Api::namespaced(world.client.clone(), NAMESPACE);
    api.patch(PASSWORD_SECRET, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&secret)).await?;
    Ok(())
}

/// Everything secret that the operator has to do with.
async fn markers(world: &World, uid: &str) -> anyhow::Result<Vec<Marker>> {
    let name = &world.subject.name;
    let (root, issuer) = ("valkeeper-pki".to_owned(), format!("valkeeper-pki-{uid}"));
    let secrets = [
        (NAMESPACE, format!("{name}-auth")),
        (NAMESPACE, format!("{name}-system")),
        (NAMESPACE, format!("{name}-identity-0")),
        (operator::NAMESPACE, root),
        (operator::NAMESPACE, issuer),
    ];
    let mut markers = Vec::new();
    for (namespace, secret) in &secrets {
        markers.extend(markers_of(&world.client, namespace, secret).await?);
    }
    let token = proc_text(world.operator.pid().await?, &format!("root/{TOKEN}"));
    let signature = token.trim().rsplit('.').next().context("no token")?;
    markers.push(Marker::of_text("signature of the operator's token", signature)?);
    Ok(markers)
}

/// The search finds each secret where it may be, and each spelling where it is planted.
async fn controls(world: &World, markers: &[Marker]) -> anyhow::Result<()> {
    let api: Api<Secret> = Api::namespaced(world.client.clone(), NAMESPACE);
    let secrets = [format!("{}-auth", world.subject.name), format!("{}-identity-0", world.subject.name)];
    for name in &secrets {
        let text = serde_json::to_string(&api.get(name).await?)?;
        let of = |marker: &&Marker| marker.name.ends_with(&format!("/{name}"));
        if let Some(unseen) = markers.iter().filter(of).find(|marker| marker.is_in(&text).is_none()) {
            bail!("the search does not find {} where it is", unseen.name);
        }
    }
    for marker in markers {
        for (how, spelling) in &marker.spellings {
            let planted =
                [("planted".to_owned(), format!("a line before\n{{\"message\":\"x{spelling}y\"}}\n"))];
            if search(std::slice::from_ref(marker), &planted).len() != 1 {
                bail!("the search does not find {} in a line with it, {how}", marker.name);
            }
        }
    }
    let wrong: String = PASSWORD.chars().rev().collect();
    if !search(markers, &[("wrong".to_owned(), wrong)]).is_empty() {
        bail!("the search finds what is not there");
    }
    Ok(())
}

/// What was found where. Never the text around it: this ends up in a log, too.
fn search(markers: &[Marker], texts: &[(String, String)]) -> Vec<String> {
    let found = |(place, text): &(String, String)| -> Vec<String> {
        let hits = markers
            .iter()
            .filter_map(|marker| Some(format!("{place}: {}, {}", marker.name, marker.is_in(text)?)));
        hits.collect()
    };
    texts.iter().flat_map(found).collect()
}

async fn failover_and_switchover(world: &World) -> anyhow::Result<()> {
    let subject = &world.subject;
    let lost = subject.protected(SETTLED_MAX).await?;
    kill_server(world.place, &subject.namespace, &lost)?;
    let moved = |from: String| async move {
        let now = subject.primary().await?;
        if now.name == from { bail!("it is {from} still") } else { Ok(now) }
    };
    until("another primary", SETTLED_MAX, || moved(lost.name.clone())).await?;
    subject.ready().await?;
    let now = subject.protected(SETTLED_MAX).await?;
    let back = lost.name.strip_prefix(&format!("{}-", subject.name)).context("no such member")?;
    subject.annotate("valkeeper.io/switchover", back).await?;
    until("the switchover", SETTLED_MAX, || moved(now.name.clone())).await?;
    subject.ready().await.map(|_| ())
}

async fn restart(world: &World) -> anyhow::Result<()> {
    let subject = &world.subject;
    let old = subject.members().await?;
    subject.annotate("valkeeper.io/restart", "secrets").await?;
    until("every member to be another pod", PATIENCE, || async {
        let now = subject.members().await?;
        let left = old.iter().find(|old| now.iter().any(|now| now.uid == old.uid));
        if let Some(left) = left { bail!("{} is the old one", left.name) } else { Ok(()) }
    })
    .await?;
    subject.ready().await.map(|_| ())
}

/// Arguments and environment of every process of operator and members.
async fn processes(world: &World) -> anyhow::Result<Vec<(String, String)>> {
    let mut texts = Vec::new();
    for namespace in [NAMESPACE, operator::NAMESPACE] {
        for uid in pods_of(&world.client, namespace).await? {
            for pid in pids_in_pod(&uid)? {
                for file in ["cmdline", "environ"] {
                    let name = proc_text(pid, "comm");
                    texts.push((format!("{file} of {}", name.trim_end()), proc_text(pid, file)));
                }
            }
        }
    }
    for program in ["valkeeper", "valkeeper-agent", "valkey-server"] {
        let environ = format!("environ of {program}");
        if !texts.iter().any(|(place, text)| *place == environ && !text.is_empty()) {
            bail!("no process {program} was seen");
        }
    }
    Ok(texts)
}

/// Everything in both namespaces but Secrets.
fn objects(world: &World) -> anyhow::Result<Vec<(String, String)>> {
    let mut texts = Vec::new();
    for namespace in [world.subject.namespace.as_str(), operator::NAMESPACE] {
        let output = Command::new("kubectl")
            .args(["get", KINDS, "-o", "json", "--show-managed-fields", "-n", namespace])
            .output()?;
        if !output.status.success() {
            bail!("kubectl: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        texts.push((format!("objects of {namespace}"), String::from_utf8_lossy(&output.stdout).into_owned()));
    }
    Ok(texts)
}

/// The operator did speak at trace level, and servers and agents spoke.
fn loud_enough(logs: &[(String, String)]) -> anyhow::Result<()> {
    let has = |place: &str, words: &str| {
        logs.iter().any(|(path, text)| path.contains(place) && text.contains(words))
    };
    for (place, words) in [
        ("/operator/", "TRACE"),
        ("/valkey/", "the server is primary"),
        ("/valkey/", "Ready to accept connections"),
    ] {
        if !has(place, words) {
            bail!("no log in {place} says {words:?}");
        }
    }
    Ok(())
}
