//! Records laid over each other in memory: what the few segments that no map covers yet have left of a volume.

use crate::{StoreError, StoredSegment};
use std::collections::BTreeMap;
use varve_format::{
    FormatError, Lsn, MAP_UNIT_BYTES, MapExtent, RECORD_PAYLOAD_BYTES_MAX, RunEntry,
    SegmentSequence,
};
use zerocopy::FromZeros;

/// Extents that do not overlap, in the order of the volume.
pub(crate) struct Replay {
    extents: Vec<MapExtent>,
}

impl Replay {
    /// Lays the segments' records of `[from, to)` over each other. Segments come oldest first.
    pub(crate) fn of<'a>(
        segments: impl Iterator<Item = &'a StoredSegment>,
        from: Lsn,
        to: Lsn,
    ) -> Result<Replay, StoreError> {
        let mut records = Vec::new();
        for segment in segments {
            let entries = segment.entries()?;
            let wanted = entries.iter().skip_while(|entry| entry.lsn() < from);
            for entry in wanted.take_while(|entry| entry.lsn() < to) {
                if entry.changes_image() && entry.length.get() > 0 {
                    let extent = extent_of(entry, segment.sequence)
                        .map_err(|error| StoreError::Damaged(segment.run_path(), error))?;
                    records.push(extent);
                }
            }
        }
        Ok(Replay {
            extents: overlay(records),
        })
    }

    /// Adds what it has of `[start, end)` to `found`, clipped, in order.
    pub(crate) fn find(&self, start: u64, end: u64, found: &mut Vec<MapExtent>) {
        let first = self.extents.partition_point(|extent| extent.end() <= start);
        let touching = self.extents[first..].iter();
        let touching = touching.take_while(|extent| extent.offset.get() < end);
        found.extend(touching.map(|extent| extent.clip(start, end)));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// All of them, in order.
    pub(crate) fn extents(&self) -> &[MapExtent] {
        &self.extents
    }
}

/// What is left of records that were laid over each other in the order of their LSN. Most overlap nothing: sorting finds the few that do, and only
/// those go through a tree, which is much slower.
fn overlay(mut records: Vec<MapExtent>) -> Vec<MapExtent> {
    records.sort_unstable_by_key(|record| (record.offset.get(), record.lsn.get()));
    let mut left = Vec::with_capacity(records.len());
    let mut from = 0;
    while from < records.len() {
        let mut end = records[from].end();
        let mut to = from + 1;
        while to < records.len() && records[to].offset.get() < end {
            end = end.max(records[to].end());
            to += 1;
        }
        match &mut records[from..to] {
            [alone] => left.push(*alone),
            several => {
                several.sort_unstable_by_key(|record| record.lsn.get());
                let mut tree = BTreeMap::new();
                several.iter().for_each(|record| lay(&mut tree, *record));
                left.extend(tree.into_values());
            }
        }
        from = to;
    }
    left
}

/// Lays a record over what is there.
fn lay(extents: &mut BTreeMap<u64, MapExtent>, new: MapExtent) {
    let (start, end) = (new.offset.get(), new.end());
    if let Some((&at, &before)) = extents.range(..start).next_back()
        && before.end() > start
    {
        extents.insert(at, before.clip(at, start));
        if before.end() > end {
            extents.insert(end, before.clip(end, before.end()));
        }
    }
    while let Some((&at, &covered)) = extents.range(start..end).next() {
        extents.remove(&at);
        if covered.end() > end {
            extents.insert(end, covered.clip(end, covered.end()));
        }
    }
    extents.insert(start, new);
}

/// A record as an extent.
fn extent_of(entry: &RunEntry, segment: SegmentSequence) -> Result<MapExtent, FormatError> {
    let mut extent = MapExtent::new_zeroed();
    extent.offset = entry.offset;
    extent.length = entry.length;
    extent.lsn = entry.lsn;
    extent.segment = segment.0.into();
    extent.kind = entry.kind;
    let whole = |number: u64| number.is_multiple_of(MAP_UNIT_BYTES);
    if !whole(entry.offset.get()) || !whole(entry.length.get()) {
        return Err(FormatError::Field("run.offset"));
    }
    if entry.offset.get().checked_add(entry.length.get()).is_none() {
        return Err(FormatError::Field("run.length"));
    }
    if extent.is_write() {
        let units = u32::try_from(entry.payload.get() / MAP_UNIT_BYTES);
        let bounded = entry.length.get() <= RECORD_PAYLOAD_BYTES_MAX;
        let payload = units
            .ok()
            .filter(|_| bounded && whole(entry.payload.get()))
            .ok_or(FormatError::Field("run.payload"))?;
        extent.payload = payload.into();
        extent.payload_bytes = (entry.length.get() as u32).into();
        extent.payload_crc = entry.payload_crc;
    }
    Ok(extent)
}
