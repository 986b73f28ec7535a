//! A resource that cannot come up says why, in the words of whoever knows, and comes up once that is corrected.

use super::{World, remove_with_claims};
use crate::support::{
    subject::{PATIENCE, Subject},
    wait::until,
};
use anyhow::{Context, bail};
use k8s_openapi::api::{
    core::v1::{ContainerState, Pod},
    events::v1::Event,
};
use kube::{Api, ResourceExt, api::ListParams};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// The resource of this scenario.
const OTHER: &str = "payments";
/// From the pod's own word, or for the server's from its start, to the word in the status: what a platform team was promised.
const TOLD_WITHIN: Duration = Duration::from_secs(5);

/// One after the other: a PriorityClass and an image that do not exist, a selector that no node satisfies, a directive that Valkey refuses, and a toleration
/// that the API server refuses. In the end a spec that is right.
pub async fn says_why(world: &World) -> anyhow::Result<String> {
    let subject = Subject { name: OTHER.to_owned(), ..world.subject.clone() };
    remove_with_claims(&subject).await?;
    let image = json!({ "image": "valkey.invalid/valkey:9.9.9", "version": "9.1" });
    let selector = json!({ "scheduling": { "nodeSelector": { "disk": "none" } } });
    let directive = json!({ "config": { "locale-collate": "nowhere" } });
    let mut told = Vec::new();
    let priority = json!({ "scheduling": { "priorityClassName": "highest" } });
    let cases: [(Value, Sign, [&str; 2]); 4] = [
        (priority, is_not_made, ["PriorityClass", "highest"]),
        (image, waits, ["ErrImagePull", "valkey.invalid"]),
        (selector, has_no_place, ["Unschedulable", "node"]),
        (directive, runs, ["locale", "exit 1"]),
    ];
    for (change, sign, words) in cases {
        let begun = Instant::now();
        let after = blocked(&subject, change, sign, words).await?;
        let all = begun.elapsed();
        warned(&subject, words[0]).await?;
        told.push(format!("{} {:.1} s ({:.1} s in all)", words[0], after.as_secs_f64(), all.as_secs_f64()));
    }
    let toleration = json!({ "scheduling": { "tolerations": [{ "key": "a", "operator": "Sometimes" }] } });
    told.push(format!("toleration {:.1} s", refused(&subject, toleration).await?.as_secs_f64()));
    subject.apply(&spec(json!({}))).await?;
    let ready_after = subject.ready().await?;
    subject.apply(&spec(json!({ "version": "8.0" }))).await?;
    until("Ready to say that the version differs", PATIENCE, || async {
        let ready = subject.said("Ready").await?;
        let is_told =
            ready.message.contains("spec.version: \"8.0\"") && ready.message.contains("allowed: 9.1");
        if is_told { Ok(()) } else { bail!("Ready says {}: {}", ready.reason, ready.message) }
    })
    .await?;
    subject.apply(&spec(json!({ "version": "9.1" }))).await?;
    subject.ready().await?;
    remove_with_claims(&subject).await?;
    Ok(format!("{}; Ready {:.1} s after the correction", told.join(", "), ready_after.as_secs_f64()))
}

fn spec(change: Value) -> Value {
    let mut spec = json!({
        "topology": "Standalone", "profile": "Cache", "resources": super::spec()["resources"],
    });
    if let (Some(spec), Value::Object(change)) = (spec.as_object_mut(), change) {
        spec.extend(change);
    }
    spec
}

/// What a pod's status shows from when on the operator is to speak.
type Sign = fn(Option<&Pod>) -> bool;

fn is_not_made(pod: Option<&Pod>) -> bool {
    pod.is_none()
}

fn waits(pod: Option<&Pod>) -> bool {
    server_is(pod, |state| {
        let reason = state.waiting.as_ref().and_then(|waiting| waiting.reason.as_deref());
        matches!(reason, Some("ErrImagePull" | "ImagePullBackOff"))
    })
}

fn has_no_place(pod: Option<&Pod>) -> bool {
    let mut conditions =
        pod.and_then(|pod| pod.status.as_ref()).into_iter().flat_map(|s| s.conditions.iter().flatten());
    conditions.any(|c| c.type_ == "PodScheduled" && c.status == "False")
}

fn runs(pod: Option<&Pod>) -> bool {
    server_is(pod, |state| state.running.is_some())
}

fn server_is(pod: Option<&Pod>, so: impl Fn(&ContainerState) -> bool) -> bool {
    let mut all = pod
        .and_then(|pod| pod.status.as_ref())
        .into_iter()
        .flat_map(|s| s.container_statuses.iter().flatten());
    all.any(|container| container.name == "valkey" && container.state.as_ref().is_some_and(&so))
}

/// How long it took from the pod's word until Ready and Stalled said why no member starts.
async fn blocked(subject: &Subject, change: Value, sign: Sign, words: [&str; 2]) -> anyhow::Result<Duration> {
    subject.apply(&spec(change)).await?;
    let pods: Api<Pod> = Api::namespaced(subject.client.clone(), &subject.namespace);
    until(&format!("the pod to show what leads to {words:?}"), PATIENCE, || async {
        let pod = pods.get_opt(&format!("{OTHER}-0-0")).await?;
        if sign(pod.as_ref()) { Ok(()) } else { bail!("it does not") }
    })
    .await?;
    let ((), after) = until(&format!("the status to say {words:?}"), PATIENCE, || async {
        for kind in ["Stalled", "Ready"] {
            let condition = subject.said(kind).await?;
            let is_told = words.iter().all(|word| condition.message.contains(word));
            if condition.reason != "MemberCannotStart" || !is_told {
                bail!("{kind} says {}: {}", condition.reason, condition.message);
            }
        }
        Ok(())
    })
    .await?;
    within(after, words[0])
}

/// How long it took until Ready said what the API server does not take.
async fn refused(subject: &Subject, change: Value) -> anyhow::Result<Duration> {
    subject.apply(&spec(change)).await?;
    let ((), after) = until("Ready to say what is refused", PATIENCE, || async {
        let ready = subject.said("Ready").await?;
        let is_told =
            ["tolerations[0].operator", "Sometimes"].iter().all(|word| ready.message.contains(word));
        if is_told { Ok(()) } else { bail!("Ready says {}: {}", ready.reason, ready.message) }
    })
    .await?;
    within(after, "the toleration")
}

fn within(after: Duration, what: &str) -> anyhow::Result<Duration> {
    if after <= TOLD_WITHIN {
        Ok(after)
    } else {
        bail!("{what} was told after {:.1} s only", after.as_secs_f64())
    }
}

/// Waits for a Warning about it.
async fn warned(subject: &Subject, word: &str) -> anyhow::Result<()> {
    let events: Api<Event> = Api::namespaced(subject.client.clone(), &subject.namespace);
    // Events of a former resource of that name are still there.
    let uid = subject.get().await?.uid().context("a resource without UID")?;
    let of_it = ListParams::default().fields(&format!("regarding.uid={uid}"));
    until(&format!("an Event with {word}"), PATIENCE, || async {
        let is_it = |event: &Event| {
            event.type_.as_deref() == Some("Warning")
                && event.note.as_deref().is_some_and(|note| note.contains(word))
        };
        if events.list(&of_it).await?.items.iter().any(is_it) { Ok(()) } else { bail!("there is none") }
    })
    .await
    .map(|_| ())
}
