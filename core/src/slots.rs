//! Sets of Valkey Cluster's hash slots, in the notation of `CLUSTER NODES`: `0-5460 6000`.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Number of slots. Valkey Cluster specification, "Key distribution model".
pub const SLOTS: u16 = 16_384;

/// A set of slots.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct SlotSet {
    /// First and last of each run, in order; no two runs touch.
    runs: Vec<(u16, u16)>,
}

/// A text that is no set of slots.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} in a list of slots: wanted are numbers below {SLOTS} and ranges such as 0-5460, separated by spaces"
)]
pub struct SlotSetError {
    /// The part that is wrong.
    pub text: String,
}

impl SlotSet {
    /// All slots.
    pub fn all() -> SlotSet {
        SlotSet { runs: vec![(0, SLOTS - 1)] }
    }

    /// How many slots there are.
    pub fn len(&self) -> usize {
        self.runs.iter().map(|(first, last)| usize::from(last - first) + 1).sum()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// True if the slot is one of them.
    pub fn contains(&self, slot: u16) -> bool {
        let before = self.runs.partition_point(|(first, _)| *first <= slot);
        before.checked_sub(1).and_then(|at| self.runs.get(at)).is_some_and(|(_, last)| slot <= *last)
    }

    /// First and last slot of each run, in order: the arguments of `ADDSLOTSRANGE` and `SLOTSRANGE`.
    pub fn runs(&self) -> impl DoubleEndedIterator<Item = (u16, u16)> + '_ {
        self.runs.iter().copied()
    }

    /// Every slot, in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = u16> + '_ {
        self.runs.iter().flat_map(|(first, last)| *first..=*last)
    }

    /// Those that are in `other`, too.
    pub fn common(&self, other: &SlotSet) -> SlotSet {
        self.combine(other, |mine, theirs| mine && theirs)
    }

    /// Those that are not in `other`.
    pub fn without(&self, other: &SlotSet) -> SlotSet {
        self.combine(other, |mine, theirs| mine && !theirs)
    }

    /// Those that are in either.
    pub fn with(&self, other: &SlotSet) -> SlotSet {
        self.combine(other, |mine, theirs| mine || theirs)
    }

    /// The slots of these runs, which may be in any order, and touch or overlap.
    fn joined(mut all: Vec<(u16, u16)>) -> SlotSet {
        all.sort_unstable();
        let mut runs: Vec<(u16, u16)> = Vec::new();
        for (first, end) in all {
            match runs.last_mut() {
                Some((_, last)) if first <= last.saturating_add(1) => *last = end.max(*last),
                Some(_) | None => runs.push((first, end)),
            }
        }
        SlotSet { runs }
    }

    /// The slots for which `keep` holds, told whether each set has them; by runs, as sets have few of them.
    fn combine(&self, other: &SlotSet, keep: impl Fn(bool, bool) -> bool) -> SlotSet {
        let mut bounds: Vec<u16> = self.runs().chain(other.runs()).flat_map(|(a, b)| [a, b + 1]).collect();
        bounds.sort_unstable();
        let mut runs: Vec<(u16, u16)> = Vec::new();
        for (first, end) in bounds.iter().zip(bounds.iter().skip(1)).filter(|(first, end)| first < end) {
            if !keep(self.contains(*first), other.contains(*first)) {
                continue;
            }
            match runs.last_mut() {
                Some((_, last)) if *last + 1 == *first => *last = end - 1,
                Some(_) | None => runs.push((*first, end - 1)),
            }
        }
        SlotSet { runs }
    }
}

impl FromIterator<u16> for SlotSet {
    /// In any order; what is no slot is left out.
    fn from_iter<I: IntoIterator<Item = u16>>(slots: I) -> SlotSet {
        SlotSet::joined(slots.into_iter().filter(|slot| *slot < SLOTS).map(|slot| (slot, slot)).collect())
    }
}

impl fmt::Display for SlotSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (first, last)) in self.runs().enumerate() {
            let space = if at == 0 { "" } else { " " };
            if first == last { write!(f, "{space}{first}")? } else { write!(f, "{space}{first}-{last}")? }
        }
        Ok(())
    }
}

impl FromStr for SlotSet {
    type Err = SlotSetError;

    fn from_str(text: &str) -> Result<SlotSet, SlotSetError> {
        let mut runs = Vec::new();
        for part in text.split_whitespace() {
            let wrong = || SlotSetError { text: part.to_owned() };
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (u16, u16) =
                (first.parse().map_err(|_| wrong())?, last.parse().map_err(|_| wrong())?);
            if first > last || last >= SLOTS {
                return Err(wrong());
            }
            runs.push((first, last));
        }
        Ok(SlotSet::joined(runs))
    }
}

impl TryFrom<String> for SlotSet {
    type Error = SlotSetError;

    fn try_from(text: String) -> Result<SlotSet, SlotSetError> {
        text.parse()
    }
}

impl From<SlotSet> for String {
    fn from(slots: SlotSet) -> String {
        slots.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_set_reads_as_valkey_writes_it() {
        for text in ["", "0-16383", "7", "0-5460 6000 6002-6003"] {
            assert_eq!(text.parse::<SlotSet>().unwrap().to_string(), text);
        }
        assert_eq!("3 1-2 2".parse::<SlotSet>().unwrap().to_string(), "1-3");
        assert_eq!("9 0-100 3-4 50-102 103 105".parse::<SlotSet>().unwrap().to_string(), "0-103 105");
        for wrong in ["16384", "0-16384", "5-4", "a", "1-", "-1", "[93-<-0123]"] {
            let refused = wrong.parse::<SlotSet>().unwrap_err();
            assert_eq!(refused.text, wrong);
        }
    }

    proptest! {
        #[test]
        fn sets_behave_as_sets(one in prop::collection::btree_set(0..SLOTS, 0..200), other in prop::collection::btree_set(0..SLOTS, 0..200)) {
            let (a, b): (SlotSet, SlotSet) = (one.iter().copied().collect(), other.iter().copied().collect());
            prop_assert_eq!(a.len(), one.len());
            prop_assert_eq!(a.iter().collect::<Vec<_>>(), one.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(a.with(&b), one.union(&other).copied().collect());
            prop_assert_eq!(a.common(&b), one.intersection(&other).copied().collect());
            prop_assert_eq!(a.without(&b), one.difference(&other).copied().collect());
            prop_assert!((0..SLOTS).all(|slot| a.contains(slot) == one.contains(&slot)));
            let text = serde_json::to_string(&a).unwrap();
            prop_assert_eq!(serde_json::from_str::<SlotSet>(&text).unwrap(), a);
        }
    }
}
