//! Kubernetes Events, each with its place in the journal: Events expire after an hour, the journal does not.

use super::{Error, bounded};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use valkeeper_core::ids::Seq;

/// Longest note the API server takes is 1 kB; the place in the journal must fit behind it.
const NOTE_BYTES_MAX: usize = 960;

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
    /// What was done: the verb of an effect, or the step.
    pub action: String,
    /// What it means, in words.
    pub note: String,
    /// The record it is about.
    pub seq: Seq,
}

/// Publishes Events about the user's resources.
#[derive(Clone)]
pub struct Publisher {
    recorder: Recorder,
}

impl Publisher {
    /// A publisher that names `instance` (the pod) as the reporter.
    pub fn new(client: Client, instance: String) -> Self {
        let reporter = Reporter {
            controller: "valkeeper.io/operator".to_owned(),
            instance: Some(instance),
        };
        Publisher {
            recorder: Recorder::new(client, reporter),
        }
    }

    /// Publishes `news` about the object `regarding`.
    ///
    /// # Errors
    /// As [`bounded`]. An Event that is lost is not repeated: what it says is in the journal.
    pub async fn publish(&self, news: &News, regarding: &ObjectReference) -> Result<(), Error> {
        let event = Event {
            type_: match news.severity {
                Severity::Normal => EventType::Normal,
                Severity::Warning => EventType::Warning,
            },
            reason: news.reason.to_owned(),
            note: Some(note(&news.note, news.seq)),
            action: news.action.clone(),
            secondary: None,
        };
        bounded("publish an Event", self.recorder.publish(&event, regarding)).await
    }
}

/// The text of an Event: bounded, with the place in the journal at its end.
fn note(text: &str, seq: Seq) -> String {
    let mut end = text.len().min(NOTE_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{} [j:{seq}]", text.get(..end).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_note_ends_with_its_place_in_the_journal() {
        assert_eq!(note("promoted 0-1", Seq(1842)), "promoted 0-1 [j:1842]");
    }

    #[test]
    fn a_long_note_is_cut_between_characters_and_keeps_its_place() {
        let cut = note(&"é".repeat(1000), Seq(7));
        assert!(cut.len() <= 1024 && cut.ends_with("é [j:7]"));
    }
}
