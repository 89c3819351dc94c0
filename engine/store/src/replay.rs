//! Records laid over each other in memory: what the few segments that no map covers yet have left of a volume.

use crate::{StoreError, StoredSegment};
use std::collections::BTreeMap;
use varve_format::{
    FormatError, Lsn, MAP_UNIT_BYTES, MapExtent, RECORD_PAYLOAD_BYTES_MAX, RunEntry,
    SegmentSequence,
};
use zerocopy::FromZeros;

/// Extents that do not overlap, by their first byte.
#[derive(Default)]
pub(crate) struct Replay {
    extents: BTreeMap<u64, MapExtent>,
}

impl Replay {
    /// Lays a segment's records of `[from, to)` over what is there.
    pub(crate) fn lay_segment(
        &mut self,
        segment: &StoredSegment,
        from: Lsn,
        to: Lsn,
    ) -> Result<(), StoreError> {
        let entries = segment.entries()?;
        let wanted = entries.iter().skip_while(|entry| entry.lsn() < from);
        for entry in wanted.take_while(|entry| entry.lsn() < to) {
            if entry.changes_image() && entry.length.get() > 0 {
                let extent = extent_of(entry, segment.sequence)
                    .map_err(|error| StoreError::Damaged(segment.run_path(), error))?;
                self.lay(extent);
            }
        }
        Ok(())
    }

    fn lay(&mut self, new: MapExtent) {
        let (start, end) = (new.offset.get(), new.end());
        if let Some((&at, &before)) = self.extents.range(..start).next_back()
            && before.end() > start
        {
            self.extents.insert(at, before.clip(at, start));
            if before.end() > end {
                self.extents.insert(end, before.clip(end, before.end()));
            }
        }
        while let Some((&at, &covered)) = self.extents.range(start..end).next() {
            self.extents.remove(&at);
            if covered.end() > end {
                self.extents.insert(end, covered.clip(end, covered.end()));
            }
        }
        self.extents.insert(start, new);
    }

    /// Adds what it has of `[start, end)` to `found`, clipped, in order.
    pub(crate) fn find(&self, start: u64, end: u64, found: &mut Vec<MapExtent>) {
        let before = self.extents.range(..start).next_back();
        let first = before
            .filter(|(_, extent)| extent.end() > start)
            .map_or(start, |(at, _)| *at);
        let range = self.extents.range(first..end);
        found.extend(range.map(|(_, extent)| extent.clip(start, end)));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// All of them, in order.
    pub(crate) fn extents(&self) -> impl Iterator<Item = &MapExtent> {
        self.extents.values()
    }

    /// The same, given away.
    pub(crate) fn into_extents(self) -> impl Iterator<Item = MapExtent> {
        self.extents.into_values()
    }
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
