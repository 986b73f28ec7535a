//! The members' pods: what the watch shows and, of those it shows no more, what the API server says by name. The watch is by
//! label: that a pod is gone from it may mean no more than that someone removed a label.

use crate::{
    cluster::Cluster,
    k8s::{self, apply},
    objects,
};
use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio::time::Instant;
use valkeeper_core::{
    ids::MemberId,
    observation::{Observed, Why},
};

/// Bound on asking for a vanished pod. A healthy API server answers in some 10 ms, and a failover may be waiting for it: it
/// does not need the answer, because the server of a pod that is gone does not answer either.
const ASK_MAX: Duration = Duration::from_millis(300);

/// How long such an answer holds while the pod stays away from the watch. Nothing wakes us when it changes, and asking may
/// cost [`ASK_MAX`] of a turn.
const ANSWER_AGE_MAX: Duration = Duration::from_secs(5);

/// Pods by member.
pub type Pods = BTreeMap<MemberId, Observed<Arc<Pod>>>;

/// What was said of pods that the watch shows no more.
#[derive(Default)]
pub struct Vanished(BTreeMap<MemberId, Answer>);

#[derive(Clone)]
struct Answer {
    /// UID of the pod that vanished; `None` if it was not looked at since this writer took over.
    uid: Option<String>,
    at: Instant,
    pod: Observed<Arc<Pod>>,
}

/// The pods of these members.
pub async fn look(cluster: &mut Cluster, ids: BTreeSet<MemberId>) -> Pods {
    let (namespace, name) = cluster.id.owner.clone();
    let (mut pods, mut missing) = (Pods::new(), Vec::new());
    for id in ids {
        if let Some(pod) = cluster.shell.world.pods.get(&namespace, &objects::names::pod(&name, id)) {
            pods.insert(id, Observed::Present(pod));
            continue;
        }
        match cluster.state.members.get(&id).map(|m| &m.facts.pod) {
            Some(Observed::Present(known)) => missing.push((id, Some(known.uid.clone()))),
            Some(Observed::Unknown(_)) => {
                missing.push((id, cluster.vanished.0.get(&id).and_then(|answer| answer.uid.clone())));
            }
            // Known to be gone, or never there.
            Some(Observed::Absent) | None => {
                pods.insert(id, Observed::Absent);
            }
        }
    }
    let asked = missing.into_iter().map(|(id, uid)| {
        let known = cluster.vanished.0.get(&id).filter(|a| a.uid == uid && a.at.elapsed() < ANSWER_AGE_MAX);
        let (cluster, known) = (&*cluster, known.cloned());
        async move {
            if let Some(known) = known {
                return (id, known);
            }
            let pod = ask(cluster, id, uid.as_deref()).await;
            (id, Answer { uid, at: Instant::now(), pod })
        }
    });
    let vanished: BTreeMap<MemberId, Answer> = join_all(asked).await.into_iter().collect();
    pods.extend(vanished.iter().map(|(id, answer)| (*id, answer.pod.clone())));
    cluster.vanished = Vanished(vanished);
    pods
}

async fn ask(cluster: &Cluster, id: MemberId, uid: Option<&str>) -> Observed<Arc<Pod>> {
    let (namespace, name) = &cluster.id.owner;
    let pod_name = objects::names::pod(name, id);
    let call = apply::get_pod(&cluster.shell.clients.requests, namespace, &pod_name);
    let silent = || Err(k8s::Error::Ambiguous { what: format!("get Pod/{pod_name}"), source: None });
    let answer = tokio::time::timeout(ASK_MAX, call).await.unwrap_or_else(|_elapsed| silent());
    if let Err(error) = &answer {
        tracing::warn!(member = %id, error = k8s::chain(error), "a pod vanished, and nobody says whether it is gone");
    }
    of_answer(answer, uid)
}

/// What an answer says of the pod with this UID, or of any if it is not known.
fn of_answer(answer: Result<Option<Pod>, k8s::Error>, uid: Option<&str>) -> Observed<Arc<Pod>> {
    match answer {
        Ok(Some(pod)) if uid.is_none() || pod.uid().as_deref() == uid => Observed::Present(Arc::new(pod)),
        Ok(Some(_) | None) => Observed::Absent,
        Err(_) => Observed::Unknown(Why::ApiError),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.uid = Some(uid.to_owned());
        pod
    }

    #[test]
    fn a_pod_that_only_lost_its_label_is_still_there() {
        assert_eq!(of_answer(Ok(Some(pod("u1"))), Some("u1")), Observed::Present(Arc::new(pod("u1"))));
        assert_eq!(of_answer(Ok(Some(pod("u1"))), None), Observed::Present(Arc::new(pod("u1"))));
    }

    #[test]
    fn a_pod_is_gone_if_its_name_is_free_or_anothers() {
        assert_eq!(of_answer(Ok(None), Some("u1")), Observed::Absent);
        assert_eq!(of_answer(Ok(Some(pod("u2"))), Some("u1")), Observed::Absent);
    }

    #[test]
    fn no_answer_is_no_proof_that_a_pod_is_gone() {
        let silent = k8s::Error::Ambiguous { what: "get Pod/orders-0-0".into(), source: None };
        assert_eq!(of_answer(Err(silent), Some("u1")), Observed::Unknown(Why::ApiError));
    }
}
