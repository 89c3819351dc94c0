//! A small cache: what came first goes first. Its bound is a number of values, whose size the user of it knows.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};

struct Kept<K, V> {
    values: HashMap<K, V>,
    order: VecDeque<K>,
}

/// Up to `limit` values.
pub(crate) struct Cache<K, V> {
    limit: usize,
    kept: Mutex<Kept<K, V>>,
}

impl<K: Copy + Eq + Hash, V: Clone> Cache<K, V> {
    /// An empty one.
    pub(crate) fn new(limit: usize) -> Cache<K, V> {
        Cache {
            limit,
            kept: Mutex::new(Kept {
                values: HashMap::new(),
                order: VecDeque::new(),
            }),
        }
    }

    /// The value of `key`, made if it is not there. Two that miss at once both make it.
    pub(crate) fn get<E>(&self, key: K, make: impl FnOnce() -> Result<V, E>) -> Result<V, E> {
        if let Some(value) = self.lock().values.get(&key) {
            return Ok(value.clone());
        }
        let value = make()?;
        let mut kept = self.lock();
        if kept.values.insert(key, value.clone()).is_none() {
            kept.order.push_back(key);
            if kept.order.len() > self.limit
                && let Some(oldest) = kept.order.pop_front()
            {
                kept.values.remove(&oldest);
            }
        }
        Ok(value)
    }

    /// Drops a value.
    pub(crate) fn forget(&self, key: &K) {
        let mut kept = self.lock();
        if kept.values.remove(key).is_some() {
            kept.order.retain(|other| other != key);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept<K, V>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
