//! So many at a time of each: one peer that comes again and again keeps nobody else out.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Places, so many for each key.
pub struct PerKey<K> {
    max: usize,
    taken: Arc<Mutex<HashMap<K, usize>>>,
}

/// A place, which is free again when this is dropped.
pub struct Place<K: Eq + Hash> {
    key: K,
    taken: Arc<Mutex<HashMap<K, usize>>>,
}

impl<K: Eq + Hash + Clone> PerKey<K> {
    /// `max` places for each key.
    pub fn new(max: usize) -> PerKey<K> {
        PerKey { max, taken: Arc::default() }
    }

    /// A place, if one is free.
    pub fn enter(&self, key: K) -> Option<Place<K>> {
        let mut taken = lock(&self.taken);
        let count = taken.entry(key.clone()).or_default();
        if *count >= self.max {
            return None;
        }
        *count += 1;
        Some(Place { key, taken: Arc::clone(&self.taken) })
    }
}

impl<K: Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut taken = lock(&self.taken);
        if let Some(count) = taken.get_mut(&self.key) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                taken.remove(&self.key);
            }
        }
    }
}

fn lock<K>(taken: &Mutex<HashMap<K, usize>>) -> MutexGuard<'_, HashMap<K, usize>> {
    // Every change under it is one step.
    taken.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_all_of_his_places_keeps_no_other_out_and_nothing_is_remembered_of_who_has_gone() {
        let places = PerKey::new(2);
        let held = [places.enter("a"), places.enter("a")];
        assert!(held.iter().all(Option::is_some) && places.enter("a").is_none());
        assert!(places.enter("b").is_some());
        let [first, _second] = held;
        drop(first);
        assert!(places.enter("a").is_some());
        assert_eq!(lock(&places.taken).keys().collect::<Vec<_>>(), [&"a"]);
    }
}
