//! Why a pod does not run, in the words of the scheduler, of kubelet, or of what ended in it.

use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod};
use kube::ResourceExt;
use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;
use valkeeper_core::words;

/// A cause that has stood for this long is told. A pod that waits for its volume, or an image that comes at the second try, is usual.
const STANDS: Duration = Duration::from_secs(3);
/// The words of a cause that stays are taken anew this often: some count nodes and tries, and every change is a record.
const REPEATED: Duration = Duration::from_secs(60);

/// Causes that stand, by the pod's UID.
#[derive(Debug, Default)]
pub struct Troubles(Mutex<BTreeMap<String, Standing>>);

#[derive(Debug)]
struct Standing {
    cause: Cause,
    since: Instant,
    taken_at: Instant,
}

/// A kind, of which only another makes news at once, and words.
#[derive(Debug, PartialEq, Eq)]
struct Cause {
    kind: String,
    words: String,
    /// True if the words are about when it is tried again.
    is_pause: bool,
}

impl Troubles {
    /// What is told of the pod, `now`.
    pub fn told(&self, pod: &Pod, now: Instant) -> Option<String> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let uid = pod.uid().unwrap_or_default();
        let Some(cause) = cause(pod) else {
            all.remove(&uid);
            return None;
        };
        match all.get_mut(&uid) {
            Some(known) if known.cause.kind == cause.kind => {
                let is_due = known.cause.is_pause || now.duration_since(known.taken_at) >= REPEATED;
                if is_due && !cause.is_pause {
                    (known.cause, known.taken_at) = (cause, now);
                }
                (now.duration_since(known.since) >= STANDS).then(|| known.cause.words.clone())
            }
            Some(_) | None => {
                all.insert(uid, Standing { cause, since: now, taken_at: now });
                None
            }
        }
    }

    /// Forgets pods that are gone.
    pub fn keep(&self, is_there: impl Fn(&str) -> bool) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|uid, _| is_there(uid));
    }
}

fn cause(pod: &Pod) -> Option<Cause> {
    if pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let status = pod.status.as_ref()?;
    let mut conditions = status.conditions.iter().flatten();
    let unscheduled = conditions.find(|c| c.type_ == "PodScheduled" && c.status == "False");
    if let Some(condition) = unscheduled {
        return Some(said("Unscheduled", condition.reason.as_deref(), condition.message.as_deref()));
    }
    if status.phase.as_deref() == Some("Failed") {
        return Some(said("Failed", status.reason.as_deref(), status.message.as_deref()));
    }
    let init = status.init_container_statuses.iter().flatten();
    init.chain(status.container_statuses.iter().flatten()).find_map(of_container)
}

fn of_container(status: &ContainerStatus) -> Option<Cause> {
    let state = status.state.as_ref()?;
    if let Some(waiting) = &state.waiting {
        let reason = waiting.reason.as_deref().unwrap_or_default();
        return match reason {
            "" | "ContainerCreating" | "PodInitializing" => None,
            // What kubelet says of the image it says in turns with its pauses.
            "ErrImagePull" | "ImagePullBackOff" => {
                let cause = said("Image", Some("ErrImagePull"), waiting.message.as_deref());
                Some(Cause { is_pause: reason == "ImagePullBackOff", ..cause })
            }
            // Its message is about the pause.
            "CrashLoopBackOff" => status.last_state.as_ref().and_then(|last| ended(&status.name, last)),
            _ => Some(said(reason, Some(reason), waiting.message.as_deref())),
        };
    }
    ended(&status.name, state)
}

/// A container that has ended by a failure.
fn ended(name: &str, state: &ContainerState) -> Option<Cause> {
    let ended = state.terminated.as_ref().filter(|ended| ended.exit_code != 0)?;
    let reason = ended.reason.as_deref().unwrap_or("Error");
    let what = format!("container {name} ended with {} ({reason})", ended.exit_code);
    Some(said("Ended", Some(&what), ended.message.as_deref()))
}

/// One line of what was said.
fn said(kind: &str, reason: Option<&str>, message: Option<&str>) -> Cause {
    let said = [reason, message].into_iter().flatten().filter(|text| !text.is_empty());
    let all = said.collect::<Vec<_>>().join(": ");
    Cause { kind: kind.to_owned(), words: words::of_others(&all, words::CHARS_MAX), is_pause: false }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(status: &Value) -> Pod {
        serde_json::from_value(json!({ "metadata": { "uid": "p-1" }, "status": status })).unwrap()
    }

    fn waiting(reason: &str, message: &str) -> Pod {
        let state = json!({ "waiting": { "reason": reason, "message": message } });
        let status = json!({ "name": "valkey", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state });
        pod(&json!({ "containerStatuses": [status] }))
    }

    fn words(pod: &Pod) -> Option<String> {
        cause(pod).map(|cause| cause.words)
    }

    #[test]
    fn a_cause_is_said_in_the_words_of_who_knows_it() {
        let condition = json!({ "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": "0/2 nodes are available:\n2 node(s) did not match." });
        let unscheduled = pod(&json!({ "phase": "Pending", "conditions": [condition] }));
        let told = "Unschedulable: 0/2 nodes are available: 2 node(s) did not match.";
        assert_eq!(words(&unscheduled).as_deref(), Some(told));
        let image = words(&waiting("ErrImagePull", "not found"));
        assert_eq!(image.as_deref(), Some("ErrImagePull: not found"));
        let missing = words(&waiting("CreateContainerConfigError", "secret \"s\" not found"));
        assert_eq!(missing.as_deref(), Some("CreateContainerConfigError: secret \"s\" not found"));
        let ended = json!({ "terminated": { "exitCode": 1, "reason": "Error", "message": "no such file" } });
        let status = json!({ "name": "agent", "image": "", "imageID": "", "ready": false, "restartCount": 3,
            "state": { "waiting": { "reason": "CrashLoopBackOff" } }, "lastState": ended });
        let crashed = words(&pod(&json!({ "initContainerStatuses": [status] })));
        assert_eq!(crashed.as_deref(), Some("container agent ended with 1 (Error): no such file"));
        let evicted = pod(&json!({ "phase": "Failed", "reason": "Evicted", "message": "low on memory" }));
        assert_eq!(words(&evicted).as_deref(), Some("Evicted: low on memory"));
        let long = words(&waiting("ErrImagePull", &"x".repeat(10_000))).unwrap();
        assert_eq!(long.chars().count(), words::CHARS_MAX);
    }

    #[test]
    fn what_is_usual_or_about_to_go_is_no_trouble() {
        for reason in ["", "ContainerCreating", "PodInitializing"] {
            assert_eq!(cause(&waiting(reason, "")), None);
        }
        let mut going = waiting("ErrImagePull", "not found");
        going.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        assert_eq!(cause(&going), None);
        assert_eq!(cause(&pod(&json!({ "phase": "Running" }))), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_cause_is_told_once_it_has_stood_for_a_moment_and_its_words_stay_for_a_while() {
        let troubles = Troubles::default();
        let told = |pod: &Pod| troubles.told(pod, Instant::now());
        let (pull, pause) =
            (waiting("ErrImagePull", "not found"), waiting("ImagePullBackOff", "back-off 10s"));
        assert_eq!(told(&pull), None);
        tokio::time::advance(STANDS).await;
        assert_eq!(told(&pause).as_deref(), Some("ErrImagePull: not found"), "the pause is no other cause");
        tokio::time::advance(REPEATED).await;
        assert_eq!(told(&pause).as_deref(), Some("ErrImagePull: not found"));
        assert_eq!(told(&waiting("ErrImagePull", "denied")).as_deref(), Some("ErrImagePull: denied"));
        assert_eq!(told(&waiting("InvalidImageName", "no")), None, "another cause");
        assert_eq!(told(&waiting("", "")), None);
        troubles.keep(|_| false);
        assert_eq!(told(&pull), None, "it begins anew");
    }
}
