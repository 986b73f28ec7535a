//! Why the pods of a StatefulSet are not made, in the words of whoever refuses them (a quota, Pod Security, a missing PriorityClass): only
//! Events of the StatefulSet have them.

use crate::k8s::{self, events};
use k8s_openapi::api::events::v1::Event;
use kube::Client;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;
use valkeeper_core::words;

/// Pods that are missing for this long are asked about. Their controller makes them within a second.
const STANDS: Duration = Duration::from_secs(2);
/// Between two questions: the controller tries again with growing pauses, and each try may be refused for another reason.
const ASK_PERIOD: Duration = Duration::from_secs(5);
/// The reason of the controller's Events about that.
const REASON: &str = "FailedCreate";

/// StatefulSets that lack pods, by UID.
#[derive(Clone, Default)]
pub struct Creations(Arc<Mutex<BTreeMap<String, Lack>>>);

struct Lack {
    since: Instant,
    asked_at: Option<Instant>,
    words: Option<String>,
}

impl Creations {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Lack>> {
        // Never held across an await, and every change under it is one step.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of why the StatefulSet lacks pods, if it does. From time to time that is asked, beside the turns.
    pub fn told(&self, client: &Client, namespace: &str, uid: &str, lacks: bool) -> Option<String> {
        let mut all = self.lock();
        if !lacks {
            all.remove(uid);
            return None;
        }
        let now = Instant::now();
        let lack = all.entry(uid.to_owned()).or_insert(Lack { since: now, asked_at: None, words: None });
        let is_due = lack.asked_at.is_none_or(|at| now.duration_since(at) >= ASK_PERIOD);
        if now.duration_since(lack.since) >= STANDS && is_due {
            lack.asked_at = Some(now);
            tokio::spawn(self.clone().ask(client.clone(), namespace.to_owned(), uid.to_owned()));
        }
        lack.words.clone()
    }

    async fn ask(self, client: Client, namespace: String, uid: String) {
        match events::of_object(&client, &namespace, &uid, REASON).await {
            Ok(found) => {
                if let Some(lack) = self.lock().get_mut(&uid) {
                    lack.words = newest(&found).or(lack.words.take());
                }
            }
            Err(error) => tracing::warn!(error = k8s::chain(&error), "why pods are not made cannot be asked"),
        }
    }
}

/// The words of the event that was seen last.
fn newest(events: &[Event]) -> Option<String> {
    let seen_at = |event: &&Event| {
        let series = event.series.as_ref().map(|series| series.last_observed_time.0);
        let last = event.deprecated_last_timestamp.as_ref().map(|at| at.0);
        series.or(last).max(event.event_time.as_ref().map(|at| at.0))
    };
    let note = events.iter().max_by_key(seen_at)?.note.as_ref()?;
    Some(words::of_others(note, words::CHARS_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_event_that_was_seen_last_is_told() {
        let event = |note: &str, at: &str| -> Event {
            serde_json::from_value(json!({
                "metadata": { "name": note }, "note": note, "deprecatedLastTimestamp": at, "eventTime": null,
            }))
            .unwrap()
        };
        let events = [
            event("the quota is used up", "2026-01-01T00:00:02Z"),
            event("no PriorityClass", "2026-01-01T00:00:03Z"),
            event("a webhook", "2026-01-01T00:00:01Z"),
        ];
        assert_eq!(newest(&events).as_deref(), Some("no PriorityClass"));
        assert_eq!(newest(&[]), None);
    }
}
