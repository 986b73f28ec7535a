//! Nodes of a Valkey Cluster and what is in their slots, on one line each.

use std::collections::BTreeMap;
use valkeeper_core::{
    effect::short,
    ids::{MemberId, NodeId},
    observation::{Export, ExportState, NodeFacts},
    slots::{SLOTS, SlotSet},
    weights::SlotWeights,
};

/// A member's node in a Valkey Cluster in a few words: what it is, and what of the others is not as it should be.
pub fn node(member: MemberId, node: &NodeFacts) -> String {
    let NodeFacts {
        id,
        primary,
        epoch,
        slots,
        knows,
        meeting,
        failed,
        covered,
        exports,
        exports_unread,
        import_failed,
        migrating,
        importing,
        down,
    } = node;
    let role = match primary {
        None => "primary".to_owned(),
        Some(of) => format!("replica of {}", short(&of.to_string())),
    };
    let mut said = vec![format!("{member} node {} {role}", short(&id.to_string())), format!("epoch {epoch}")];
    said.extend(primary.is_none().then(|| format!("{} slots", slots.len())));
    said.push(format!("knows {}", knows.len()));
    said.extend((!meeting.is_empty()).then(|| format!("is meeting {}", meeting.len())));
    said.extend((!failed.is_empty()).then(|| format!("holds {} for dead", failed.len())));
    said.extend((*covered < SLOTS).then(|| format!("sees an owner for {covered} of {SLOTS} slots")));
    said.extend(exports.iter().map(export));
    said.extend(import_failed.as_ref().map(|failed| {
        format!("did not get slots from {} ({})", short(&failed.from.to_string()), failed.words)
    }));
    let open = |slots: &BTreeMap<u16, NodeId>| slots.keys().copied().collect::<SlotSet>();
    said.extend((!migrating.is_empty()).then(|| format!("{} leave key by key", open(migrating))));
    said.extend((!importing.is_empty()).then(|| format!("{} come key by key", open(importing))));
    said.extend(down.then(|| "REFUSES CLIENTS".to_owned()));
    said.extend(exports_unread.then(|| "does not say what it hands over".to_owned()));
    said.join(", ")
}

fn export(export: &Export) -> String {
    let Export { slots, to, state } = export;
    let to = to.to_string();
    match state {
        ExportState::Running => format!("hands the slots {slots} over to {}", short(&to)),
        ExportState::Failed(words) => {
            format!("did not hand the slots {slots} over to {} ({words})", short(&to))
        }
    }
}

/// What is in the slots of a node: in all, and where most is.
pub fn weighed(member: MemberId, weights: Option<&SlotWeights>) -> String {
    let Some(weights) = weights else { return format!("{member} does not tell what is in its slots") };
    let most = weights.runs.iter().max_by_key(|(_, keys)| *keys).filter(|(_, keys)| *keys > 0);
    let most = most.map(|(slots, keys)| format!(", most in {slots}: {keys}")).unwrap_or_default();
    let (keys, slots) = (weights.keys(), weights.slots().len());
    format!("{member} has {keys} keys in {slots} slots, {} bytes{most}", weights.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::story;

    #[test]
    fn a_node_says_which_slots_it_hands_over_and_what_came_of_the_last_try() {
        let export = |slots: &str, state| Export {
            slots: slots.parse().unwrap(),
            to: "b".repeat(40).parse().unwrap(),
            state,
        };
        let lost = ExportState::Failed("Connection lost to target".into());
        let exports = vec![export("0-9 12", ExportState::Running), export("20", lost)];
        let told = node(MemberId::new(0, 0), &NodeFacts { exports, ..story::node() });
        let end = ", hands the slots 0-9 12 over to bbbbbbbb, did not hand the slots 20 over to bbbbbbbb (Connection lost to target)";
        assert!(told.ends_with(end), "{told}");
    }

    #[test]
    fn what_was_counted_says_how_much_there_is_and_where_most() {
        let me = MemberId::new(0, 0);
        let weights = SlotWeights::sum_up(&[(3, 1), (4, 900), (7, 0)], 4_096);
        assert_eq!(weighed(me, Some(&weights)), "0-0 has 901 keys in 3 slots, 4096 bytes, most in 4: 900");
        assert_eq!(
            weighed(me, Some(&SlotWeights::sum_up(&[(3, 0)], 9))),
            "0-0 has 0 keys in 1 slots, 9 bytes"
        );
        assert_eq!(weighed(me, None), "0-0 does not tell what is in its slots");
    }
}
