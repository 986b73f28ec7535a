//! How much is in the slots of one primary: counted slot by slot (`CLUSTER COUNTKEYSINSLOT`) and kept in few pieces, so that a record of it
//! stays small. From these a plan is balanced by keys or bytes, and jobs are cut.

use crate::{
    slots::{SLOTS, SlotSet},
    spec::Balance,
};
use serde::{Deserialize, Serialize};

/// Into so many parts of about the same number of keys the slots of a node are cut; what lies between slots that hold as much alone is a
/// part, too, so that there may be twice as many and some. Count.
const PARTS: u64 = 32;

/// Loads are counted in parts of a key, or of a byte, as a slot of an evenly filled run may have less than one.
pub const UNIT: u64 = 1_024;

/// More than any slot has, so that the sum of all does not overflow. In [`UNIT`]ths.
const LOAD_MAX: u64 = u64::MAX >> 16;

/// What a slot costs beside its keys, in keys: slots without any are spread as well.
const SLOT_KEYS: u64 = 1;

/// The same in bytes.
const SLOT_BYTES: u64 = 100;

/// What is in the slots of one primary.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotWeights {
    /// Slots that lie together, with the number of keys in them: spread evenly there, as far as anybody knows.
    pub runs: Vec<(SlotSet, u64)>,
    /// Bytes that the data set of the node takes (INFO `used_memory_dataset`).
    pub bytes: u64,
}

impl SlotWeights {
    /// Sums up the number of keys of each slot, in order of the slots.
    pub fn sum_up(counts: &[(u16, u64)], bytes: u64) -> SlotWeights {
        let all: u64 = counts.iter().fold(0, |sum, (_, keys)| sum.saturating_add(*keys));
        let part = all.div_ceil(PARTS).max(1);
        let mut runs = Vec::new();
        let (mut slots, mut sum) = (Vec::new(), 0_u64);
        for (slot, keys) in counts {
            // What holds as much as a part does not hide among others.
            if !slots.is_empty() && (sum >= part || *keys >= part) {
                runs.push((std::mem::take(&mut slots).into_iter().collect(), std::mem::take(&mut sum)));
            }
            slots.push(*slot);
            sum = sum.saturating_add(*keys);
        }
        if !slots.is_empty() {
            runs.push((slots.into_iter().collect(), sum));
        }
        SlotWeights { runs, bytes }
    }

    /// The slots that were counted.
    pub fn slots(&self) -> SlotSet {
        self.runs.iter().fold(SlotSet::default(), |all, (slots, _)| all.with(slots))
    }

    /// Number of keys in all of them.
    pub fn keys(&self) -> u64 {
        self.runs.iter().fold(0, |sum, (_, keys)| sum.saturating_add(*keys))
    }
}

/// The load of every slot, in [`UNIT`]ths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loads(Vec<u64>);

impl Loads {
    /// What a plan goes by: what nodes counted of their slots, and what a slot costs beside. One that nobody counted has as much as the
    /// others have on average. `None` if nothing was counted, or it does not matter.
    pub fn of<'a>(counted: impl Iterator<Item = &'a SlotWeights> + Clone, balance: Balance) -> Option<Loads> {
        match balance {
            Balance::Slots => None,
            Balance::Keys => Loads::fill(counted, |_, slots, keys| {
                share(keys, slots.len()).saturating_add(SLOT_KEYS * UNIT)
            }),
            // Some servers do not know what their data set takes.
            Balance::Bytes if counted.clone().any(|weights| weights.bytes == 0 && weights.keys() > 0) => {
                Loads::of(counted, Balance::Keys)
            }
            Balance::Bytes => Loads::fill(counted, |weights, slots, keys| {
                let bytes = u128::from(keys) * u128::from(weights.bytes) / u128::from(weights.keys().max(1));
                let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
                share(bytes, slots.len()).saturating_add(SLOT_BYTES * UNIT)
            }),
        }
    }

    /// Nothing but keys: what a job goes by.
    pub fn of_keys<'a>(counted: impl Iterator<Item = &'a SlotWeights>) -> Option<Loads> {
        Loads::fill(counted, |_, slots, keys| share(keys, slots.len()))
    }

    /// The same where all slots of a node have more by now than was counted in them.
    #[must_use]
    pub fn grown(mut self, slots: &SlotSet, keys: u64) -> Loads {
        let (counted, now) = (self.sum(slots), keys.saturating_mul(UNIT));
        if counted == 0 && keys > 0 {
            return Loads::even(share(keys, slots.len()));
        }
        if now > counted {
            for load in &mut self.0 {
                let grown = u128::from(*load) * u128::from(now) / u128::from(counted);
                *load = u64::try_from(grown).unwrap_or(u64::MAX).min(LOAD_MAX);
            }
        }
        self
    }

    /// The same for every slot, in [`UNIT`]ths.
    pub fn even(each: u64) -> Loads {
        Loads(vec![each; usize::from(SLOTS)])
    }

    fn fill<'a>(
        counted: impl Iterator<Item = &'a SlotWeights>,
        each: impl Fn(&SlotWeights, &SlotSet, u64) -> u64,
    ) -> Option<Loads> {
        let mut known: Vec<Option<u64>> = vec![None; usize::from(SLOTS)];
        for weights in counted {
            for (slots, keys) in &weights.runs {
                let each = each(weights, slots, *keys);
                for slot in slots.iter() {
                    if let Some(load) = known.get_mut(usize::from(slot)) {
                        *load = Some(each);
                    }
                }
            }
        }
        let (sum, count) = known
            .iter()
            .flatten()
            .fold((0_u64, 0_u64), |(sum, count), load| (sum.saturating_add(*load), count + 1));
        let mean = sum.checked_div(count)?;
        Some(Loads(known.into_iter().map(|load| load.unwrap_or(mean)).collect()))
    }

    /// Of one slot.
    pub fn slot(&self, slot: u16) -> u64 {
        self.0.get(usize::from(slot)).copied().unwrap_or_default()
    }

    /// Of some.
    pub fn sum(&self, slots: &SlotSet) -> u64 {
        slots.iter().fold(0, |sum, slot| sum.saturating_add(self.slot(slot)))
    }
}

/// What one of so many slots has of all, in [`UNIT`]ths.
pub fn share(all: u64, slots: usize) -> u64 {
    let each = u128::from(all) * u128::from(UNIT) / (slots.max(1) as u128);
    u64::try_from(each).unwrap_or(u64::MAX).min(LOAD_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(weights: &SlotWeights) -> Vec<String> {
        weights.runs.iter().map(|(slots, keys)| format!("{slots}: {keys}")).collect()
    }

    #[test]
    fn what_is_spread_evenly_is_told_in_few_parts_and_what_stands_out_by_itself() {
        let even: Vec<(u16, u64)> = (0..6_400).map(|slot| (slot, 10)).collect();
        let weights = SlotWeights::sum_up(&even, 0);
        assert_eq!(weights.runs.len(), 32);
        assert_eq!(
            weights.runs.first().map(|(slots, keys)| (slots.to_string(), *keys)),
            Some(("0-199".into(), 2_000))
        );
        let hot: Vec<(u16, u64)> = [(3, 0), (4, 1), (6, 900), (7, 0), (9, 1)].into();
        assert_eq!(text(&SlotWeights::sum_up(&hot, 0)), ["3-4: 1", "6: 900", "7 9: 1"]);
        assert_eq!(text(&SlotWeights::sum_up(&[(1, 0), (2, 0)], 0)), ["1-2: 0"]);
        assert_eq!(SlotWeights::sum_up(&[], 7), SlotWeights { runs: Vec::new(), bytes: 7 });
    }

    #[test]
    fn a_slot_weighs_what_is_in_it_and_a_little_more() {
        let weights = |bytes| SlotWeights {
            runs: vec![("0-3".parse().unwrap(), 40), ("9".parse().unwrap(), 60)],
            bytes,
        };
        let of = |balance| Loads::of([weights(10_000)].iter(), balance).unwrap();
        let by_keys = of(Balance::Keys);
        assert_eq!([0, 3, 9].map(|slot| by_keys.slot(slot)), [11 * UNIT, 11 * UNIT, 61 * UNIT]);
        assert_eq!(by_keys.slot(5), (4 * 11 + 61) * UNIT / 5, "nobody has counted it");
        let by_bytes = of(Balance::Bytes);
        assert_eq!([0, 9].map(|slot| by_bytes.slot(slot)), [1_100 * UNIT, 6_100 * UNIT]);
        assert_eq!(Loads::of([].iter(), Balance::Keys), None);
        let empty = Loads::of([SlotWeights::sum_up(&[(1, 0)], 0)].iter(), Balance::Bytes).unwrap();
        assert_eq!(empty.slot(1), SLOT_BYTES * UNIT, "no keys, and nothing divided by them");
    }

    #[test]
    fn a_server_that_does_not_know_what_its_data_takes_is_counted_by_keys() {
        let one =
            |slots: &str, keys, bytes| SlotWeights { runs: vec![(slots.parse().unwrap(), keys)], bytes };
        let counted = [one("0", 10, 10_000), one("1", 30, 0)];
        assert_eq!(Loads::of(counted.iter(), Balance::Bytes), Loads::of(counted.iter(), Balance::Keys));
    }

    #[test]
    fn what_has_grown_since_it_was_counted_weighs_more() {
        let slots: SlotSet = "0-1".parse().unwrap();
        let loads = |a, b| {
            let runs = vec![("0".parse().unwrap(), a), ("1".parse().unwrap(), b)];
            Loads::of_keys([SlotWeights { runs, bytes: 0 }].iter()).unwrap()
        };
        let of = |loads: Loads| [loads.slot(0) / UNIT, loads.slot(1) / UNIT];
        assert_eq!(of(loads(10, 30).grown(&slots, 40)), [10, 30]);
        assert_eq!(of(loads(10, 30).grown(&slots, 20)), [10, 30], "fewer is no danger");
        assert_eq!(of(loads(10, 30).grown(&slots, 400)), [100, 300]);
        assert_eq!(of(loads(0, 0).grown(&slots, 400)), [200, 200]);
        assert_eq!(of(loads(0, 0).grown(&slots, 0)), [0, 0]);
    }

    proptest! {
        #[test]
        fn nothing_that_was_counted_is_lost(counts in prop::collection::btree_map(0..SLOTS, 0_u64..1 << 40, 0..500)) {
            let counts: Vec<(u16, u64)> = counts.into_iter().collect();
            let weights = SlotWeights::sum_up(&counts, 0);
            prop_assert_eq!(weights.slots(), counts.iter().map(|(slot, _)| *slot).collect::<SlotSet>());
            prop_assert_eq!(weights.keys(), counts.iter().map(|(_, keys)| *keys).sum::<u64>());
            prop_assert!(weights.runs.len() <= 3 * PARTS as usize, "{} parts", weights.runs.len());
        }
    }
}
