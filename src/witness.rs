//! What is known of a journal outside of it: how far it had come when the resource's status was written, and what a person has said
//! about a loss. The status is written lazily, so it may lag behind; a journal that lags behind it was cut short or rolled back.

use crate::api::v1alpha1::{ACCEPT_LOSS, JournalPosition, REPAIR, ValkeyCluster};
use kube::ResourceExt;
use valkeeper_core::ids::Seq;
use valkeeper_journal::Anchor;

/// What the journal of a resource is compared with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Witness {
    /// A record that it must hold.
    pub anchor: Option<Anchor>,
    /// A person accepted that records up to this one are gone: there is no anchor then.
    pub lost_through: Option<Seq>,
    /// A person asked for a repair from the second copy, which must reach this record.
    pub repair: Option<Seq>,
}

impl Witness {
    /// What the resource says.
    pub fn of(resource: &ValkeyCluster) -> Witness {
        let said = |annotation: &str| {
            let text = resource.annotations().get(annotation)?;
            text.trim().parse().ok().map(Seq)
        };
        let shown = resource.status.as_ref().and_then(|status| status.journal.as_ref()).and_then(anchor);
        let accepted = said(ACCEPT_LOSS);
        // Only for the loss that was looked at: the next one must be accepted anew.
        let lost_through = accepted.filter(|seq| shown.is_some_and(|anchor| anchor.seq == *seq));
        let anchor = if lost_through.is_some() { None } else { shown };
        Witness { anchor, lost_through, repair: said(REPAIR) }
    }
}

fn anchor(position: &JournalPosition) -> Option<Anchor> {
    let JournalPosition { seq, epoch: _, hash } = position;
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
        let journal = Some(JournalPosition { seq: 42, epoch: 3, hash: hash.to_owned() });
        resource.status = Some(ValkeyClusterStatus { journal, ..ValkeyClusterStatus::default() });
        let said = said.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned()));
        resource.annotations_mut().extend(said);
        resource
    }

    #[test]
    fn the_status_is_the_anchor_until_a_person_accepts_that_very_loss() {
        let hash = Hash([7; 32]);
        let anchored = Some(Anchor { seq: Seq(42), hash });
        let of = |said: &[(&str, &str)]| Witness::of(&resource(&hash.to_string(), said));
        assert_eq!(of(&[]), Witness { anchor: anchored, lost_through: None, repair: None });
        assert_eq!(of(&[(ACCEPT_LOSS, "41")]).anchor, anchored);
        assert_eq!(of(&[(ACCEPT_LOSS, "yes")]).anchor, anchored);
        let accepted = of(&[(ACCEPT_LOSS, "42")]);
        assert_eq!((accepted.anchor, accepted.lost_through), (None, Some(Seq(42))));
        assert_eq!(of(&[(REPAIR, " 42")]).repair, Some(Seq(42)));
    }

    #[test]
    fn a_status_of_a_version_without_hashes_is_no_anchor() {
        assert_eq!(Witness::of(&resource("", &[])), Witness::default());
        assert_eq!(Witness::of(&resource("beef", &[])), Witness::default());
    }
}
