//! Kubernetes Events, each with its place in the journal: Events expire after an hour, the journal does not.
//!
//! Not through kube's `Recorder`: it merges Events of one reason into a series that keeps the note of the first, and
//! with it the first's place in the journal. Here an Event is named by its record, so publishing twice is once.

use super::{Error, bounded};
use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff,
};
use kube::{
    Api, Client,
    api::{ListParams, PostParams},
};
use valkeeper_core::ids::Seq;

/// Longest note the API server takes is 1 kB; the place in the journal must fit behind it.
const NOTE_BYTES_MAX: usize = 960;

/// Longest action the API server takes.
const ACTION_BYTES_MAX: usize = 128;

/// Most Events that are read at once. They expire after an hour, and repeated ones are one.
const READ_MAX: u32 = 50;

/// Name of the reporting controller.
const CONTROLLER: &str = "valkeeper.io/operator";

/// Events with this reason about the object with this UID, whoever reports them.
///
/// # Errors
/// The API server's.
pub async fn of_object(
    client: &Client,
    namespace: &str,
    uid: &str,
    reason: &str,
) -> Result<Vec<Event>, Error> {
    let events: Api<Event> = Api::namespaced(client.clone(), namespace);
    let of_it = ListParams::default().fields(&format!("regarding.uid={uid},reason={reason}")).limit(READ_MAX);
    Ok(bounded("list the events of an object", events.list(&of_it)).await?.items)
}

/// How serious an Event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Something happened as it should.
    Normal,
    /// Someone may have to look.
    Warning,
}

/// One Event to publish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    /// Severity.
    pub severity: Severity,
    /// A reason code of the core.
    pub reason: &'static str,
    /// What was done: the rule, or the verb of an effect.
    pub action: String,
    /// What it means, in words.
    pub note: String,
    /// The record it is about.
    pub seq: Seq,
    /// Number of the Event among those about this record.
    pub index: usize,
}

/// Publishes Events about the users' resources.
#[derive(Clone)]
pub struct Publisher {
    client: Client,
    /// Name of the pod.
    instance: String,
}

impl Publisher {
    /// A publisher that names `instance` (the pod) as the reporter.
    pub fn new(client: Client, instance: String) -> Self {
        Publisher { client, instance }
    }

    /// Publishes `news` about the object `regarding`.
    ///
    /// # Errors
    /// As [`bounded`]. An Event that is lost is not repeated: what it says is in the journal.
    pub async fn publish(&self, news: &News, regarding: &ObjectReference) -> Result<(), Error> {
        let namespace = regarding.namespace.clone().unwrap_or_default();
        let api: Api<Event> = Api::namespaced(self.client.clone(), &namespace);
        let event = self.event(news, regarding);
        match bounded("publish an Event", api.create(&PostParams::default(), &event)).await {
            // Published by an earlier attempt.
            Err(Error::Conflict { .. }) => Ok(()),
            other => other.map(|_| ()),
        }
    }

    fn event(&self, news: &News, regarding: &ObjectReference) -> Event {
        let News { severity, reason, action, note, seq, index } = news;
        let text = |t: &Option<String>| t.clone().unwrap_or_default();
        let uid = text(&regarding.uid);
        let mut event = Event {
            type_: Some(format!("{severity:?}")),
            reason: Some((*reason).to_owned()),
            note: Some(noted(note, *seq)),
            action: Some(cut(action, ACTION_BYTES_MAX).to_owned()),
            event_time: Some(MicroTime(jiff::Timestamp::now())),
            reporting_controller: Some(CONTROLLER.to_owned()),
            reporting_instance: Some(self.instance.clone()),
            regarding: Some(regarding.clone()),
            ..Event::default()
        };
        event.metadata.namespace.clone_from(&regarding.namespace);
        // The UID, because a resource of the same name has a journal of its own.
        event.metadata.name =
            Some(format!("{}.{}.{seq}.{index}", text(&regarding.name), valkeeper_core::effect::short(&uid)));
        event
    }
}

/// The text of an Event: bounded, with the place in the journal at its end.
fn noted(text: &str, seq: Seq) -> String {
    format!("{} [j:{seq}]", cut(text, NOTE_BYTES_MAX))
}

/// The longest beginning of `text` that has `bytes_max` bytes at most and ends between characters.
fn cut(text: &str, bytes_max: usize) -> &str {
    let mut end = text.len().min(bytes_max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_note_ends_with_its_place_in_the_journal() {
        assert_eq!(noted("promoted 0-1", Seq(1842)), "promoted 0-1 [j:1842]");
    }

    #[test]
    fn a_long_note_is_cut_between_characters_and_keeps_its_place() {
        let cut = noted(&"é".repeat(1000), Seq(7));
        assert!(cut.len() <= 1024 && cut.ends_with("é [j:7]"));
    }
}
