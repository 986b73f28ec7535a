//! Which slots go where, and in which pieces. A plan is made anew whenever it is needed, from who owns what now: a transfer that
//! failed, was cancelled or was half done by someone else needs no memory of its own.

use crate::{
    ids::ShardId,
    slots::{SLOTS, SlotSet},
};
use std::collections::{BTreeMap, BTreeSet};

/// Most that one job moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Keys, as far as they are spread evenly.
    pub keys_max: u64,
    /// Slots.
    pub slots_max: usize,
    /// Runs of slots: each is two arguments of one command, and some bytes of a record.
    pub runs_max: usize,
}

/// Of atomic slot migration. The source stands still for all its slots when it deletes what it handed over: 0.5 to 2.6 microseconds a
/// key, after some 90 ms of handing over that each job costs: below 200 ms, where the servers have a processor and a disk each. Slots as
/// such cost nothing, but each job has every node of the cluster sync its `nodes.conf`: where there are few keys, one job takes all.
pub const JOB: Limits = Limits { keys_max: 40_000, slots_max: SLOTS as usize, runs_max: 256 };

/// Key by key, which goes on by itself and is not stopped by a pause: some seconds' worth at 30,000 keys a second.
pub const JOB_BY_KEY: Limits = Limits { keys_max: 100_000, slots_max: 256, runs_max: 256 };

/// Slots that one shard gives to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move {
    /// Who owns them.
    pub from: ShardId,
    /// Who shall.
    pub to: ShardId,
    /// The slots.
    pub slots: SlotSet,
}

/// The moves after which each of `wanted` has its share, and nobody else has anything. As few slots as possible move; the shards then
/// differ by one slot at most. Slots that nobody owns are not looked at.
pub fn plan(owned: &BTreeMap<ShardId, SlotSet>, wanted: &BTreeSet<ShardId>) -> Vec<Move> {
    if wanted.is_empty() {
        return Vec::new();
    }
    let mut moves: BTreeMap<(ShardId, ShardId), Vec<u16>> = BTreeMap::new();
    for (from, to, slot) in by_count(owned, wanted) {
        moves.entry((from, to)).or_default().push(slot);
    }
    let collected = moves.into_iter();
    collected.map(|((from, to), slots)| Move { from, to, slots: slots.into_iter().collect() }).collect()
}

/// Donors give their highest slots, so that what stays is of one piece.
fn by_count(owned: &BTreeMap<ShardId, SlotSet>, wanted: &BTreeSet<ShardId>) -> Vec<(ShardId, ShardId, u16)> {
    let count = |shard: &ShardId| owned.get(shard).map_or(0, SlotSet::len);
    let (each, more) = {
        let all: usize = owned.values().map(SlotSet::len).sum();
        (all / wanted.len(), all % wanted.len())
    };
    // Who has most keeps the one that is left over.
    let mut by_size: Vec<ShardId> = wanted.iter().copied().collect();
    by_size.sort_by_key(|shard| (std::cmp::Reverse(count(shard)), *shard));
    let shares: BTreeMap<ShardId, usize> =
        by_size.iter().enumerate().map(|(at, shard)| (*shard, each + usize::from(at < more))).collect();
    let mut given = owned.iter().flat_map(|(shard, slots)| {
        let surplus = slots.len().saturating_sub(shares.get(shard).copied().unwrap_or(0));
        slots.iter().rev().take(surplus).map(|slot| (*shard, slot)).collect::<Vec<_>>()
    });
    let mut goes = Vec::new();
    for (to, share) in &shares {
        let missing = share.saturating_sub(count(to));
        goes.extend(given.by_ref().take(missing).map(|(from, slot)| (from, *to, slot)));
    }
    goes
}

/// As many of the slots as one job may have, from the highest down, so that what stays is of one piece. `keys` are those of all
/// `owned` slots of their owner, taken to be spread evenly.
pub fn first_job(slots: &SlotSet, owned: usize, keys: u64, limits: Limits) -> SlotSet {
    let Limits { keys_max, slots_max, runs_max } = limits;
    let each = keys / (owned as u64).max(1);
    let fitting = usize::try_from(keys_max / each.max(1)).unwrap_or(slots_max).clamp(1, slots_max);
    let lowest = slots.runs().nth_back(runs_max.saturating_sub(1)).map_or(0, |(first, _)| first);
    slots.iter().rev().take(fitting).take_while(|slot| *slot >= lowest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shards(numbers: impl IntoIterator<Item = u16>) -> BTreeSet<ShardId> {
        numbers.into_iter().map(ShardId).collect()
    }

    fn owned(texts: &[&str]) -> BTreeMap<ShardId, SlotSet> {
        let parsed = texts.iter().map(|text| text.parse().unwrap());
        (0..).map(ShardId).zip(parsed).collect()
    }

    fn moved(owned: &BTreeMap<ShardId, SlotSet>, moves: &[Move]) -> BTreeMap<ShardId, SlotSet> {
        let mut after = owned.clone();
        for Move { from, to, slots } in moves {
            let left = after[from].without(slots);
            assert_eq!(left.len() + slots.len(), after[from].len(), "{from} gives what it has not");
            after.insert(*from, left);
            let more = after.get(to).cloned().unwrap_or_default();
            assert!(more.common(slots).is_empty(), "{to} gets what it has");
            after.insert(*to, more.with(slots));
        }
        after
    }

    fn text(moves: &[Move]) -> Vec<String> {
        moves.iter().map(|m| format!("{} to {}: {}", m.from, m.to, m.slots)).collect()
    }

    #[test]
    fn three_shards_become_five_and_three_again_with_as_few_moves_as_possible() {
        let three = owned(&["0-5460", "5461-10922", "10923-16383"]);
        let out = plan(&three, &shards(0..5));
        assert_eq!(out.iter().map(|m| m.slots.len()).sum::<usize>(), 3_277 + 3_276);
        let five = moved(&three, &out);
        assert!(five.values().all(|slots| (3_276..=3_277).contains(&slots.len())), "{five:?}");
        assert_eq!(plan(&five, &shards(0..5)), []);
        let back = plan(&five, &shards(0..3));
        assert_eq!(back.iter().map(|m| m.slots.len()).sum::<usize>(), 3_277 + 3_276);
        assert!(back.iter().all(|m| m.from.0 >= 3 && m.to.0 < 3), "{:?}", text(&back));
    }

    #[test]
    fn a_balance_of_one_slot_more_is_none_to_mend() {
        let three = owned(&["0-5460", "5461-10922", "10923-16383"]);
        assert_eq!(plan(&three, &shards(0..3)), []);
        assert_eq!(plan(&three, &BTreeSet::new()), []);
        let one = owned(&["0-16383"]);
        assert_eq!(text(&plan(&one, &shards(0..2))), ["0 to 1: 8192-16383"]);
    }

    #[test]
    fn a_shard_that_takes_anothers_place_gets_all_of_it() {
        let two = owned(&["0-8191", "8192-16383"]);
        assert_eq!(text(&plan(&two, &shards([1, 7]))), ["0 to 7: 0-8191"]);
    }

    #[test]
    fn a_job_is_cut_by_keys_and_by_slots() {
        let all: SlotSet = "0-2999".parse().unwrap();
        assert_eq!(first_job(&all, 3_000, 0, JOB), all);
        let scattered: SlotSet = (0..3_000).filter(|slot| slot % 3 != 0).collect();
        let first = first_job(&scattered, 3_000, 0, JOB);
        assert_eq!((first.runs().count(), first.len()), (JOB.runs_max, 2 * JOB.runs_max));
        assert_eq!(first.iter().next_back(), Some(2_999), "from the highest down");
        assert_eq!(first_job(&all, 3_000, 3_000_000, JOB).to_string(), "2960-2999", "1,000 keys a slot");
        assert_eq!(first_job(&all, 3_000, 900_000_000, JOB).to_string(), "2999", "no slot can be cut");
        assert_eq!(first_job(&all, 3_000, 3_000_000, JOB_BY_KEY).to_string(), "2900-2999");
        assert_eq!(first_job(&all, 3_000, 0, JOB_BY_KEY).to_string(), "2744-2999");
        assert!(first_job(&SlotSet::default(), 0, 0, JOB).is_empty());
    }

    /// Slots dealt out among some shards, some to nobody.
    fn dealt() -> impl Strategy<Value = BTreeMap<ShardId, SlotSet>> {
        (1_u16..8, 1_u16..600, any::<u64>()).prop_map(|(shards, run, seed)| {
            let owner = |slot: u16| {
                let mixed = (u64::from(slot / run) ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
                (mixed % u64::from(shards + 1)) as u16
            };
            let all: SlotSet = (0..SLOTS).collect();
            let of = |shard: u16| all.iter().filter(|slot| owner(*slot) == shard).collect();
            (0..shards).map(|shard| (ShardId(shard), of(shard))).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_plan_keeps_all_slots_evens_them_out_and_moves_no_more_than_it_must(
            owned in dealt(), wanted in prop::collection::btree_set((0_u16..10).prop_map(ShardId), 1..8)
        ) {
            let moves = plan(&owned, &wanted);
            let after = moved(&owned, &moves);
            let all: usize = owned.values().map(SlotSet::len).sum();
            let sizes: Vec<usize> = wanted.iter().map(|s| after.get(s).map_or(0, SlotSet::len)).collect();
            prop_assert_eq!(sizes.iter().sum::<usize>(), all);
            prop_assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1, "{:?}", sizes);
            // What is above the larger share must go in any plan, and what is below the smaller one must come.
            let (floor, ceiling) = (all / wanted.len(), all.div_ceil(wanted.len()));
            let now = |s: &ShardId| owned.get(s).map_or(0, SlotSet::len);
            let leaving: usize = owned.keys().filter(|s| !wanted.contains(s)).map(now).sum();
            let above: usize = wanted.iter().map(|s| now(s).saturating_sub(ceiling)).sum();
            let below: usize = wanted.iter().map(|s| floor.saturating_sub(now(s))).sum();
            let moving: usize = moves.iter().map(|m| m.slots.len()).sum();
            let least = (leaving + above).max(below);
            prop_assert!((least..=leaving + above + wanted.len()).contains(&moving), "{} of at least {}", moving, least);
        }
    }
}
