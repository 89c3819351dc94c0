//! The open set: regions that may hold writes which the origin's cache could still lose. After a power cut exactly these are read again.
//!
//! A region opens with the first record in it. It is hot once that record is durable in the log: from then on writes to it start on the
//! origin at once. It closes only at a checkpoint, after an origin flush that covered its last write.

use std::collections::HashMap;
use varve_format::Lsn;

#[derive(Clone, Copy)]
struct Region {
    /// LSN of the record that opened it.
    opened: Lsn,
    /// LSN of the last record in it.
    last: Lsn,
}

/// The open set.
pub struct OpenRegions {
    region_bytes: u64,
    capacity: usize,
    regions: HashMap<u32, Region>,
}

impl OpenRegions {
    /// An empty set with room for `capacity` regions.
    #[must_use]
    pub fn new(region_bytes: u32, capacity: usize) -> OpenRegions {
        OpenRegions {
            region_bytes: u64::from(region_bytes),
            capacity,
            regions: HashMap::with_capacity(capacity * 2),
        }
    }

    fn span(&self, offset: u64, length: u64) -> std::ops::RangeInclusive<u32> {
        (offset / self.region_bytes) as u32
            ..=((offset + length.max(1) - 1) / self.region_bytes) as u32
    }

    /// The LSN that must be durable before a write to the range may start on the origin; `None` if a region is not open yet.
    #[must_use]
    pub fn gate(&self, offset: u64, length: u64) -> Option<Lsn> {
        self.span(offset, length).try_fold(Lsn(0), |gate, index| {
            Some(gate.max(self.regions.get(&index)?.opened.plus(1)))
        })
    }

    /// Regions of the range that are not open yet.
    #[must_use]
    pub fn missing(&self, offset: u64, length: u64) -> usize {
        self.span(offset, length)
            .filter(|index| !self.regions.contains_key(index))
            .count()
    }

    /// Whether so many more fit.
    #[must_use]
    pub fn has_room(&self, more: usize) -> bool {
        self.regions.len() + more <= self.capacity
    }

    /// Notes a record in the range.
    pub fn touch(&mut self, offset: u64, length: u64, lsn: Lsn) {
        for index in self.span(offset, length) {
            self.regions
                .entry(index)
                .and_modify(|region| region.last = lsn)
                .or_insert(Region {
                    opened: lsn,
                    last: lsn,
                });
        }
    }

    /// Opens a region that a checkpoint or a crash left open.
    pub fn reopen(&mut self, index: u32, lsn: Lsn) {
        self.regions.entry(index).or_insert(Region {
            opened: Lsn(0),
            last: lsn,
        });
    }

    /// Closes what the origin holds durably: every region whose last record is below `stable`. Regions used at or after `recent` stay hot, unless
    /// the set is more than half full.
    pub fn retire(&mut self, stable: Lsn, recent: Lsn) {
        let keep_hot = self.regions.len() * 2 <= self.capacity;
        self.regions
            .retain(|_, region| region.last >= stable || (keep_hot && region.last >= recent));
    }

    /// Whether a checkpoint at `stable` could close any region.
    #[must_use]
    pub fn can_retire(&self, stable: Lsn) -> bool {
        self.regions.values().any(|region| region.last < stable)
    }

    /// Whether more than half of the places are taken.
    #[must_use]
    pub fn is_crowded(&self) -> bool {
        self.regions.len() * 2 > self.capacity
    }

    /// Regions whose last record is at or above `lsn`, as ranges.
    pub fn touched_since(&self, lsn: Lsn) -> impl Iterator<Item = (u64, u64)> + '_ {
        let bytes = self.region_bytes;
        self.regions
            .iter()
            .filter(move |(_, region)| region.last >= lsn)
            .map(move |(index, _)| (u64::from(*index) * bytes, bytes))
    }

    /// The indexes of all open regions, sorted.
    #[must_use]
    pub fn indexes(&self) -> Vec<u32> {
        let mut indexes: Vec<u32> = self.regions.keys().copied().collect();
        indexes.sort_unstable();
        indexes
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.regions.clear();
    }

    /// Number of open regions.
    #[must_use]
    pub fn len(&self) -> usize {
        self.regions.len()
    }
}
