//! Which slots go where, and in which pieces. A plan is made anew whenever it is needed, from who owns what now: a transfer that
//! failed, was cancelled or was half done by someone else needs no memory of its own.

use crate::{
    ids::ShardId,
    slots::{SLOTS, SlotSet},
    weights::{Loads, UNIT},
};
use std::{
    cmp::{Ordering, Reverse},
    collections::{BTreeMap, BTreeSet},
};

/// Most that one job moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Keys.
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

/// Where no shard has this part of its share too much or too little, by load, it is even: keys come and go while slots move, and what is in
/// a slot is known by and large. One in so many.
const TOLERANCE: u64 = 50;

/// How far a reshard is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Course {
    /// Slots that have moved.
    pub settled: SlotSet,
    /// Slots that are on their way, by who gets them; who gives them owns them still.
    pub awaited: BTreeMap<ShardId, SlotSet>,
}

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

/// The moves after which each of `wanted` has its share, and nobody else has anything. By number of slots as few as possible move, and the
/// shards then differ by one slot at most. By load no shard has more than its share for long that could give a slot to one with less: what
/// is in one slot stays together, and what is settled stays where it is, unless its shard has to go. Slots that nobody owns are not looked
/// at.
pub fn plan(
    owned: &BTreeMap<ShardId, SlotSet>,
    wanted: &BTreeSet<ShardId>,
    loads: Option<&Loads>,
    course: &Course,
) -> Vec<Move> {
    if wanted.is_empty() {
        return Vec::new();
    }
    let by_load = loads.map(|loads| by_load(owned, wanted, loads, &course.settled));
    let mut moves: BTreeMap<(ShardId, ShardId), Vec<u16>> = BTreeMap::new();
    // Where nearly all is in a few slots, a shard might be left without any.
    for (from, to, slot) in by_load
        .filter(|goes| all_have_some(owned, wanted, goes))
        .unwrap_or_else(|| by_count(owned, wanted, &course.awaited))
    {
        moves.entry((from, to)).or_default().push(slot);
    }
    let collected = moves.into_iter();
    collected.map(|((from, to), slots)| Move { from, to, slots: slots.into_iter().collect() }).collect()
}

/// Donors give their highest slots, so that what stays is of one piece.
fn by_count(
    owned: &BTreeMap<ShardId, SlotSet>,
    wanted: &BTreeSet<ShardId>,
    awaited: &BTreeMap<ShardId, SlotSet>,
) -> Vec<Goes> {
    let count = |shard: &ShardId| owned.get(shard).map_or(0, SlotSet::len);
    let (each, more) = {
        let all: usize = owned.values().map(SlotSet::len).sum();
        (all / wanted.len(), all % wanted.len())
    };
    // What is left over stays with who has it, by what each will have when all that is on its way has arrived: whichever job ends first, a plan
    // that is made anew goes on, and no slot comes back. Then who has more need not give it, who has less gets it anyhow, and who has just
    // enough is last.
    let leaving = awaited.values().fold(SlotSet::default(), |all, slots| all.with(slots));
    let will_have = |shard: &ShardId| {
        let comes = awaited.get(shard).map_or(0, SlotSet::len);
        owned.get(shard).map_or(0, |slots| slots.without(&leaving).len()) + comes
    };
    let turn = |has: usize| match has.cmp(&each) {
        Ordering::Greater if has == each + 1 => 0,
        Ordering::Greater => 1,
        Ordering::Less => 2,
        Ordering::Equal => 3,
    };
    let mut by_size: Vec<(usize, ShardId)> = wanted.iter().map(|shard| (will_have(shard), *shard)).collect();
    by_size.sort_by_key(|(has, shard)| (turn(*has), Reverse(*has), *shard));
    let shares: BTreeMap<ShardId, usize> =
        by_size.iter().enumerate().map(|(at, (_, shard))| (*shard, each + usize::from(at < more))).collect();
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

/// A slot that goes from one shard to another.
type Goes = (ShardId, ShardId, u16);

/// Who has to go gives everything; where somebody has clearly more or less than its share, who has more gives what is not more than the rest
/// of that. It goes to who has less and will not have more: so every move brings both nearer, and a plan that is made anew in the middle
/// goes on.
fn by_load(
    owned: &BTreeMap<ShardId, SlotSet>,
    wanted: &BTreeSet<ShardId>,
    loads: &Loads,
    settled: &SlotSet,
) -> Vec<Goes> {
    let has = |shard: &ShardId| owned.get(shard).map_or(0, |slots| loads.sum(slots));
    let all = owned.keys().fold(0_u64, |sum, shard| sum.saturating_add(has(shard)));
    let share = all / wanted.len().max(1) as u64;
    let surplus = |shard: &ShardId| has(shard).saturating_sub(share);
    let goes_away = |(shard, _): &(&ShardId, &SlotSet)| !wanted.contains(shard);
    let (going, staying): (Vec<_>, Vec<_>) = owned.iter().partition(goes_away);
    let enough = share / TOLERANCE;
    let lacks = wanted.iter().any(|shard| has(shard) < share.saturating_sub(enough));
    let gives = |(shard, _): &(&ShardId, &SlotSet)| surplus(shard) > if lacks { 0 } else { enough };
    let giving: Vec<_> = staying.into_iter().filter(gives).collect();
    let sums =
        going.iter().map(|(shard, _)| has(shard)).chain(giving.iter().map(|(shard, _)| surplus(shard)));
    let levels = wanted.iter().map(|shard| (*shard, has(shard))).collect();
    let mut filling = Filling::new(levels, share, sums.fold(0, u64::saturating_add));
    let mut goes: Vec<Goes> = Vec::new();
    for (from, slots) in going {
        for slot in by_class(slots, loads) {
            let to = filling.fitting(loads.slot(slot)).or_else(|| filling.least());
            goes.extend(to.map(|to| (*from, filling.put(to, loads.slot(slot)), slot)));
        }
    }
    for (from, slots) in giving {
        let mut left = surplus(from);
        for slot in by_class(&slots.without(settled), loads) {
            let load = loads.slot(slot);
            let to = filling.fitting(load).filter(|_| load <= left);
            left -= to.map_or(0, |_| load);
            goes.extend(to.map(|to| (*from, filling.put(to, load), slot)));
        }
    }
    goes
}

/// Shards that get slots.
struct Filling {
    /// What each has.
    levels: BTreeMap<ShardId, u64>,
    /// What none shall have more than.
    share: u64,
    /// What all get to that have less, if it is spread evenly.
    level: u64,
}

impl Filling {
    /// So much more is spread over those that have less than the share, the lowest first.
    fn new(levels: BTreeMap<ShardId, u64>, share: u64, more: u64) -> Filling {
        let mut loads: Vec<u64> = levels.values().copied().filter(|load| *load < share).collect();
        loads.sort_unstable();
        let (mut sum, mut level) = (more, u64::MAX);
        for (at, load) in loads.into_iter().enumerate() {
            if load >= level {
                break;
            }
            sum = sum.saturating_add(load);
            level = sum / (at as u64 + 1);
        }
        Filling { levels, share, level: level.min(share) }
    }

    /// Who takes so much without having more than its share: one that is not yet as full as all shall be, else the one that has least.
    fn fitting(&self, load: u64) -> Option<ShardId> {
        let fits = |(_, has): &(&ShardId, &u64)| has.saturating_add(load) <= self.share;
        let filled = |(_, has): &(&ShardId, &u64)| has.saturating_add(load / 2) <= self.level;
        let first = self.levels.iter().filter(fits).find(filled);
        let found = first.or_else(|| self.levels.iter().filter(fits).min_by_key(|(_, has)| **has));
        found.map(|(shard, _)| *shard)
    }

    fn least(&self) -> Option<ShardId> {
        self.levels.iter().min_by_key(|(_, has)| **has).map(|(shard, _)| *shard)
    }

    fn put(&mut self, to: ShardId, load: u64) -> ShardId {
        let level = self.levels.entry(to).or_default();
        *level = level.saturating_add(load);
        to
    }
}

/// The slots with most first, by powers of two, so that few slots move; among like ones the highest first, so that what stays is of one
/// piece.
fn by_class(slots: &SlotSet, loads: &Loads) -> Vec<u16> {
    let mut all: Vec<u16> = slots.iter().rev().collect();
    all.sort_by_key(|slot| Reverse(loads.slot(*slot).checked_ilog2()));
    all
}

/// True if no shard ends without a slot.
fn all_have_some(owned: &BTreeMap<ShardId, SlotSet>, wanted: &BTreeSet<ShardId>, goes: &[Goes]) -> bool {
    let given = |shard: &ShardId| goes.iter().filter(|(from, _, _)| from == shard).count();
    let gets = |shard: &ShardId| goes.iter().any(|(_, to, _)| to == shard);
    let keeps = |shard: &ShardId| owned.get(shard).is_some_and(|slots| slots.len() > given(shard));
    wanted.iter().all(|shard| keeps(shard) || gets(shard))
}

/// As many of the slots as one job may have, from the highest down, so that what stays is of one piece; at least one. `keys` are those in
/// each, in [`UNIT`]ths.
pub fn first_job(slots: &SlotSet, keys: &Loads, limits: Limits) -> SlotSet {
    let Limits { keys_max, slots_max, runs_max } = limits;
    let lowest = slots.runs().nth_back(runs_max.saturating_sub(1)).map_or(0, |(first, _)| first);
    let mut sum = 0_u64;
    let fits = |(at, slot): &(usize, u16)| {
        sum = sum.saturating_add(keys.slot(*slot));
        *at == 0 || sum <= keys_max.saturating_mul(UNIT)
    };
    let all = slots.iter().rev().take(slots_max).take_while(|slot| *slot >= lowest);
    all.enumerate().take_while(fits).map(|(_, slot)| slot).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{spec::Balance, weights::SlotWeights};
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
        let out = plan(&three, &shards(0..5), None, &Course::default());
        assert_eq!(out.iter().map(|m| m.slots.len()).sum::<usize>(), 3_277 + 3_276);
        let five = moved(&three, &out);
        assert!(five.values().all(|slots| (3_276..=3_277).contains(&slots.len())), "{five:?}");
        assert_eq!(plan(&five, &shards(0..5), None, &Course::default()), []);
        let back = plan(&five, &shards(0..3), None, &Course::default());
        assert_eq!(back.iter().map(|m| m.slots.len()).sum::<usize>(), 3_277 + 3_276);
        assert!(back.iter().all(|m| m.from.0 >= 3 && m.to.0 < 3), "{:?}", text(&back));
    }

    #[test]
    fn a_balance_of_one_slot_more_is_none_to_mend() {
        let three = owned(&["0-5460", "5461-10922", "10923-16383"]);
        assert_eq!(plan(&three, &shards(0..3), None, &Course::default()), []);
        assert_eq!(plan(&three, &BTreeSet::new(), None, &Course::default()), []);
        let one = owned(&["0-16383"]);
        assert_eq!(text(&plan(&one, &shards(0..2), None, &Course::default())), ["0 to 1: 8192-16383"]);
    }

    #[test]
    fn a_shard_that_takes_anothers_place_gets_all_of_it() {
        let two = owned(&["0-8191", "8192-16383"]);
        assert_eq!(text(&plan(&two, &shards([1, 7]), None, &Course::default())), ["0 to 7: 0-8191"]);
    }

    #[test]
    fn a_job_is_cut_by_keys_and_by_slots() {
        let all: SlotSet = "0-2999".parse().unwrap();
        let each = |keys| Loads::even(keys * UNIT);
        assert_eq!(first_job(&all, &each(0), JOB), all);
        let scattered: SlotSet = (0..3_000).filter(|slot| slot % 3 != 0).collect();
        let first = first_job(&scattered, &each(0), JOB);
        assert_eq!((first.runs().count(), first.len()), (JOB.runs_max, 2 * JOB.runs_max));
        assert_eq!(first.iter().next_back(), Some(2_999), "from the highest down");
        assert_eq!(first_job(&all, &each(1_000), JOB).to_string(), "2960-2999", "1,000 keys a slot");
        assert_eq!(first_job(&all, &each(300_000), JOB).to_string(), "2999", "no slot can be cut");
        assert_eq!(first_job(&all, &each(1_000), JOB_BY_KEY).to_string(), "2900-2999");
        assert_eq!(first_job(&all, &each(0), JOB_BY_KEY).to_string(), "2744-2999");
        assert!(first_job(&SlotSet::default(), &each(0), JOB).is_empty());
    }

    #[test]
    fn by_load_who_lacks_much_is_helped_though_nobody_has_much_too_much() {
        // Fifteen shards of 1,000 slots each, and one of 700.
        let runs = (0..16_u16).map(|shard| (shard * 1_000, if shard < 15 { 999 } else { 699 }));
        let sixteen: BTreeMap<ShardId, SlotSet> = (0..)
            .map(ShardId)
            .zip(runs.map(|(first, last)| format!("{first}-{}", first + last).parse().unwrap()))
            .collect();
        let moves = plan(&sixteen, &shards(0..16), Some(&Loads::even(UNIT)), &Course::default());
        assert!(moves.iter().all(|m| m.to == ShardId(15)), "{:?}", text(&moves));
        let after = moved(&sixteen, &moves);
        assert!(after.values().all(|slots| (970..=982).contains(&slots.len())), "{after:?}");
        // A hundredth more or less is none to mend.
        let near = owned(&["0-8100", "8101-16383"]);
        assert_eq!(plan(&near, &shards(0..2), Some(&Loads::even(UNIT)), &Course::default()), []);
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

    /// A few slots with very much, many with some, and many with nothing.
    fn loads() -> impl Strategy<Value = Loads> {
        (any::<u64>(), 0_u64..5_000).prop_map(|(seed, some)| {
            let mixed = |slot: u64| (slot ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
            let keys = |slot: u64| match mixed(slot) % 1_000 {
                0 => 3_000_000,
                1..=300 => some,
                301..=400 => mixed(slot + 1) % 1_000,
                _ => 0,
            };
            let counts: Vec<(u16, u64)> = (0..SLOTS).map(|slot| (slot, keys(u64::from(slot / 7)))).collect();
            Loads::of([SlotWeights::sum_up(&counts, 0)].iter(), Balance::Keys).unwrap()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn by_count_no_slot_moves_twice_whichever_job_ends_first_or_fails(
            count in 1_u16..9, wanted in 1_u16..9, keys in 20_usize..900, order in any::<u64>()
        ) {
            // Even, as a reshard before has left it.
            let all: BTreeMap<ShardId, SlotSet> = [(ShardId(0), SlotSet::all())].into();
            let even = moved(&all, &plan(&all, &shards(0..count), None, &Course::default()));
            let (mut now, wanted) = (even, shards(0..wanted));
            let mut under_way: BTreeMap<ShardId, Move> = BTreeMap::new();
            let mut gone = SlotSet::default();
            for step in 0_u64..2_000 {
                // Who has a job under way owns its slots still, and gives no other meanwhile.
                let mut course = Course::default();
                for job in under_way.values() {
                    let awaited = course.awaited.entry(job.to).or_default();
                    *awaited = awaited.with(&job.slots);
                }
                for planned in plan(&now, &wanted, None, &course) {
                    let slots = planned.slots.iter().rev().take(keys).collect();
                    under_way.entry(planned.from).or_insert(Move { slots, ..planned });
                }
                let Some(mixed) = (order ^ step).wrapping_mul(0x9e37_79b9_7f4a_7c15).checked_rem(under_way.len() as u64) else {
                    break;
                };
                let ends = *under_way.keys().nth(mixed as usize).unwrap();
                let job = under_way.remove(&ends).unwrap();
                // Some fail, and are not on their way any more.
                if mixed % 5 == 0 && step % 3 == 0 {
                    continue;
                }
                prop_assert!(gone.common(&job.slots).is_empty(), "{} again, from {} to {}", job.slots, job.from, job.to);
                gone = gone.with(&job.slots);
                now = moved(&now, &[job]);
            }
            prop_assert!(plan(&now, &wanted, None, &Course::default()).is_empty());
        }

        #[test]
        fn every_plan_keeps_all_slots_evens_them_out_and_moves_no_more_than_it_must(
            owned in dealt(), wanted in prop::collection::btree_set((0_u16..10).prop_map(ShardId), 1..8)
        ) {
            let moves = plan(&owned, &wanted, None, &Course::default());
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

        #[test]
        fn by_load_job_after_job_ends_no_slot_moves_twice_and_nobody_has_much_too_much(
            owned in dealt(), wanted in prop::collection::btree_set((0_u16..10).prop_map(ShardId), 1..8), loads in loads()
        ) {
            let mut now = owned.clone();
            let mut gone = SlotSet::default();
            let mut jobs = 0;
            loop {
                let moves = plan(&now, &wanted, Some(&loads), &Course { settled: gone.clone(), ..Course::default() });
                let Some(first) = moves.first() else { break };
                // Each shard gives a job at a time.
                let mut told: BTreeSet<ShardId> = BTreeSet::new();
                let jobs_now: Vec<Move> = moves.iter().filter(|m| told.insert(m.from)).map(|m| {
                    let slots = m.slots.iter().rev().take(500).collect();
                    Move { from: m.from, to: m.to, slots }
                }).collect();
                for job in &jobs_now {
                    prop_assert!(gone.common(&job.slots).is_empty(), "{} again, at {:?}", job.slots, first);
                    gone = gone.with(&job.slots);
                }
                now = moved(&now, &jobs_now);
                jobs += 1;
                prop_assert!(jobs < 200, "no end");
            }
            let has = |s: &ShardId| now.get(s).map_or(0, |slots| loads.sum(slots));
            prop_assert!(now.keys().filter(|s| !wanted.contains(s)).all(|s| has(s) == 0));
            let all: u64 = now.keys().map(has).sum();
            let share = all / wanted.len() as u64;
            let least = wanted.iter().map(has).min().unwrap_or_default();
            for shard in &wanted {
                let more = has(shard).saturating_sub(share);
                let some = now.get(shard).map(|slots| slots.without(&gone)).into_iter().flat_map(|slots| slots.iter().collect::<Vec<_>>());
                let smallest = some.map(|slot| loads.slot(slot)).min().unwrap_or(u64::MAX);
                // What is more stays only where no slot is small enough to go, or nobody has room for it.
                prop_assert!(
                    more <= share / TOLERANCE || smallest > more || smallest.saturating_add(least) > share,
                    "{} has {} of {}, least {}, smallest {}", shard, has(shard), share, least, smallest
                );
            }
        }
    }
}
