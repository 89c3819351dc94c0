//! A small cache: what came first goes first. Its bound is a number of values, or what they weigh.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};

struct Kept<K, V> {
    values: HashMap<K, V>,
    order: VecDeque<K>,
    weight: usize,
}

/// Values that together weigh up to `limit`, and the newest in any case.
pub(crate) struct Cache<K, V> {
    limit: usize,
    weigh: fn(&V) -> usize,
    kept: Mutex<Kept<K, V>>,
}

impl<K: Copy + Eq + Hash, V: Clone> Cache<K, V> {
    /// An empty one for so many values.
    pub(crate) fn new(limit: usize) -> Cache<K, V> {
        Cache::weighed(limit, |_| 1)
    }

    /// An empty one for values of so much weight.
    pub(crate) fn weighed(limit: usize, weigh: fn(&V) -> usize) -> Cache<K, V> {
        Cache {
            limit,
            weigh,
            kept: Mutex::new(Kept {
                values: HashMap::new(),
                order: VecDeque::new(),
                weight: 0,
            }),
        }
    }

    /// The value of `key`, made if it is not there. Two that miss at once both make it.
    pub(crate) fn get<E>(&self, key: K, make: impl FnOnce() -> Result<V, E>) -> Result<V, E> {
        if let Some(value) = self.lock().values.get(&key) {
            return Ok(value.clone());
        }
        let value = make()?;
        self.put(key, value.clone());
        Ok(value)
    }

    /// Whether a value is there.
    pub(crate) fn has(&self, key: &K) -> bool {
        self.lock().values.contains_key(key)
    }

    /// Keeps a value, if there is none.
    pub(crate) fn put(&self, key: K, value: V) {
        let mut kept = self.lock();
        if kept.values.contains_key(&key) {
            return;
        }
        kept.weight += (self.weigh)(&value);
        kept.values.insert(key, value);
        kept.order.push_back(key);
        while kept.weight > self.limit
            && kept.order.len() > 1
            && let Some(oldest) = kept.order.pop_front()
        {
            self.drop_value(&mut kept, &oldest);
        }
    }

    /// Drops a value.
    pub(crate) fn forget(&self, key: &K) {
        let mut kept = self.lock();
        if kept.values.contains_key(key) {
            self.drop_value(&mut kept, key);
            kept.order.retain(|other| other != key);
        }
    }

    fn drop_value(&self, kept: &mut Kept<K, V>, key: &K) {
        if let Some(value) = kept.values.remove(key) {
            kept.weight -= (self.weigh)(&value);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept<K, V>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::Cache;
    use std::convert::Infallible;

    #[test]
    fn it_holds_no_more_than_it_may_and_the_newest_in_any_case() {
        let cache: Cache<u32, Vec<u8>> = Cache::weighed(1000, Vec::len);
        let get = |key: u32, length: usize| {
            cache
                .get(key, || Ok::<_, Infallible>(vec![key as u8; length]))
                .unwrap()
        };
        for key in 0..500 {
            get(key, 1 + key as usize % 90);
            let weight: usize = (0..=key)
                .filter(|key| cache.has(key))
                .map(|key| 1 + key as usize % 90)
                .sum();
            assert!(weight <= 1000 && cache.has(&key), "{weight} at {key}");
        }
        // What came first went first.
        assert!(cache.has(&499) && cache.has(&490) && !cache.has(&400));
        get(600, 5000);
        assert!(cache.has(&600) && !cache.has(&499));
        get(601, 10);
        assert!(cache.has(&601) && !cache.has(&600));
        cache.forget(&601);
        assert!(!cache.has(&601));
        assert_eq!(get(601, 3), [89; 3]);
    }
}
