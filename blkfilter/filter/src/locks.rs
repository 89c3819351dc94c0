//! Ranges that are in flight: writes on their way to the origin, and blocks that a span is copying. None overlap.
//!
//! A table of fixed size, scanned: with 128 entries that is faster than any tree, and it never allocates.

/// The ranges in flight.
pub struct RangeLocks {
    ranges: Vec<(u64, u64)>,
    free: Vec<u16>,
}

impl RangeLocks {
    /// A table with `capacity` places.
    #[must_use]
    pub fn new(capacity: usize) -> RangeLocks {
        RangeLocks {
            ranges: vec![(0, 0); capacity],
            free: (0..capacity as u16).rev().collect(),
        }
    }

    /// Whether `[start, end)` overlaps a locked range.
    #[must_use]
    pub fn overlaps(&self, start: u64, end: u64) -> bool {
        self.ranges
            .iter()
            .any(|range| range.0 < end && start < range.1)
    }

    /// Locks `[start, end)`; the caller has asked [`RangeLocks::overlaps`]. `None`: the table is full.
    pub fn lock(&mut self, start: u64, end: u64) -> Option<u16> {
        let place = self.free.pop()?;
        self.ranges[place as usize] = (start, end);
        Some(place)
    }

    /// Unlocks a range.
    pub fn unlock(&mut self, place: u16) {
        self.ranges[place as usize] = (0, 0);
        self.free.push(place);
    }
}
