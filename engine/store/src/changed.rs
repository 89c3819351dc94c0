//! Which ranges were written between two instants, by records: a rewrite of the same bytes counts.

use crate::map_file::MapCursor;
use crate::maps::Layer;
use crate::{StoreError, VolumeStore};
use std::sync::Arc;
use varve_format::Lsn;

/// Ranges that are kept before neighbours are merged: bounds memory at about twice what the answer needs, and 16 MiB.
const RANGES_BEFORE_MERGING: usize = 1 << 20;

/// What was written between two instants. It needs no lock of the store.
pub struct Changes {
    layers: Vec<Layer>,
    /// While it is there, nobody deletes the history.
    _lease: Arc<()>,
}

impl VolumeStore {
    /// What records of `[from, to)` changed.
    pub fn changes(&self, from: Lsn, to: Lsn) -> Result<Changes, StoreError> {
        Ok(Changes {
            layers: self.layers(from, to)?,
            _lease: self.lease(),
        })
    }
}

impl Changes {
    /// Ranges (first byte, length), in order, neighbours merged. All of the interval's maps are read for it.
    pub fn ranges(self) -> Result<Vec<(u64, u64)>, StoreError> {
        let mut ranges = Vec::new();
        let mut limit = RANGES_BEFORE_MERGING;
        let mut note = |start: u64, end: u64| {
            ranges.push((start, end));
            if ranges.len() >= limit {
                merge(&mut ranges);
                limit = RANGES_BEFORE_MERGING.max(ranges.len() * 2);
            }
        };
        for layer in self.layers {
            match layer {
                Layer::Replayed(replay) => replay
                    .extents()
                    .iter()
                    .for_each(|extent| note(extent.offset.get(), extent.end())),
                Layer::Map(map) => {
                    let mut cursor = MapCursor::new(Arc::clone(&map));
                    while let Some(extent) = cursor.advance()? {
                        note(extent.offset.get(), extent.end());
                    }
                }
            }
        }
        Ok(merged(ranges))
    }
}

/// Ranges (start, end) as (start, length), in order, neighbours merged.
pub(crate) fn merged(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    merge(&mut ranges);
    let length = |(start, end): (u64, u64)| (start, end - start);
    ranges.into_iter().map(length).collect()
}

/// Sorts ranges (start, end) and joins those that touch.
fn merge(ranges: &mut Vec<(u64, u64)>) {
    ranges.sort_unstable();
    let mut kept = 0;
    for index in 0..ranges.len() {
        let (start, end) = ranges[index];
        if kept > 0 && start <= ranges[kept - 1].1 {
            ranges[kept - 1].1 = ranges[kept - 1].1.max(end);
        } else {
            ranges[kept] = (start, end);
            kept += 1;
        }
    }
    ranges.truncate(kept);
}
