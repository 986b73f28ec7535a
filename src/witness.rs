//! What is known of a journal outside of it: how far it had come when the resource's status was written, and what a person has said
//! about a loss. The status is written lazily, so it may lag behind; a journal that lags behind it was cut short or rolled back.

use crate::api::v1alpha1::{ACCEPT_LOSS, JournalPosition, REPAIR, ValkeyCluster};
use kube::ResourceExt;
use valkeeper_core::ids::Seq;
use valkeeper_journal::Anchor;

/// Digits of a hash that name a place: nobody meets two, and people can copy them. What was said of one loss is said of no other.
const PLACE_DIGITS_MIN: usize = 12;

/// What the journal of a resource is compared with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Witness {
    /// A record that it must hold.
    pub anchor: Option<Anchor>,
    /// A person accepted that records up to the anchor are gone.
    pub may_lose: bool,
    /// A person asked for a repair from the second copy.
    pub may_repair: bool,
}

impl Witness {
    /// What the resource says.
    pub fn of(resource: &ValkeyCluster) -> Witness {
        let shown = resource.status.as_ref().and_then(|status| status.journal.as_ref());
        let uid = resource.metadata.uid.as_deref();
        // A status that came with a backup speaks of another resource's journal.
        let Some(anchor) = shown.filter(|shown| Some(shown.stream.as_str()) == uid).and_then(anchor) else {
            return Witness::default();
        };
        let hash = anchor.hash.to_string();
        let names = |annotation: &str| {
            let said = resource.annotations().get(annotation).map(|said| said.trim());
            said.is_some_and(|said| said.len() >= PLACE_DIGITS_MIN && hash.starts_with(said))
        };
        Witness { anchor: Some(anchor), may_lose: names(ACCEPT_LOSS), may_repair: names(REPAIR) }
    }

    /// What a second copy must hold: without it, it is a loss, which must have been accepted.
    pub fn needed(&self) -> Option<Anchor> {
        self.anchor.filter(|_| !self.may_lose)
    }
}

fn anchor(position: &JournalPosition) -> Option<Anchor> {
    let JournalPosition { stream: _, seq, epoch: _, hash } = position;
    Some(Anchor { seq: Seq(u64::try_from(*seq).ok()?), hash: hash.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::v1alpha1::ValkeyClusterStatus;
    use valkeeper_journal::Hash;

    fn resource(hash: &str, said: &[(&str, &str)]) -> ValkeyCluster {
        let spec = serde_json::json!({ "topology": "Replication" });
        let mut resource = ValkeyCluster::new("orders", serde_json::from_value(spec).unwrap());
        resource.metadata.uid = Some("uid-1".to_owned());
        let journal =
            Some(JournalPosition { stream: "uid-1".to_owned(), seq: 42, epoch: 3, hash: hash.to_owned() });
        resource.status = Some(ValkeyClusterStatus { journal, ..ValkeyClusterStatus::default() });
        let said = said.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned()));
        resource.annotations_mut().extend(said);
        resource
    }

    #[test]
    fn a_loss_is_accepted_and_a_repair_is_asked_for_at_one_place_and_no_other() {
        let hash = Hash([7; 32]);
        let anchor = Some(Anchor { seq: Seq(42), hash });
        let of = |said: &[(&str, &str)]| Witness::of(&resource(&hash.to_string(), said));
        let place = &hash.to_string()[..PLACE_DIGITS_MIN];
        let nothing = Witness { anchor, may_lose: false, may_repair: false };
        assert_eq!((of(&[]), nothing.needed()), (nothing, anchor));
        for other in ["42", "yes", "", "0707", "080808080808"] {
            assert_eq!(of(&[(ACCEPT_LOSS, other), (REPAIR, other)]), nothing, "{other}");
        }
        let accepted = of(&[(ACCEPT_LOSS, place)]);
        assert_eq!((accepted, accepted.needed()), (Witness { may_lose: true, ..nothing }, None));
        let asked = of(&[(REPAIR, &hash.to_string())]);
        assert_eq!((asked, asked.needed()), (Witness { may_repair: true, ..nothing }, anchor));
    }

    #[test]
    fn a_status_without_a_hash_or_of_another_resource_is_no_anchor() {
        assert_eq!(Witness::of(&resource("", &[])), Witness::default());
        assert_eq!(Witness::of(&resource("beef", &[])), Witness::default());
        let mut restored = resource(&Hash([7; 32]).to_string(), &[]);
        restored.metadata.uid = Some("uid-2".to_owned());
        assert_eq!(Witness::of(&restored), Witness::default());
    }
}
