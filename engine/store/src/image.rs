//! An image: a volume as of an LSN, read like a disk. Every byte is checked before it is given out: against its record's CRC, or, where only a part of a
//! record is wanted of a settled segment, against those of its frames.
//!
//! It opens by asking which maps cover the history below the LSN (see `maps`), and reads the records of at most eight segments. What a range is, it
//! asks layer by layer, newest first, until nothing of the range is left. Segment files are opened when they are read from.

use crate::cache::Cache;
use crate::maps::Layer;
use crate::segment_file::{FrameCache, SegmentFile, frame_cache};
use crate::volume::{InstantLease, Segments};
use crate::{StoreError, VolumeStore};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use varve_format::{Lsn, MAP_UNIT_BYTES, MapExtent, RecordKind, SegmentSequence, payload_crc};

/// Payloads kept in memory: 64 × at most 64 KiB = 4 MiB.
const PAYLOADS_KEPT: usize = 64;
/// Frames kept in memory, in bytes.
const FRAMES_KEPT_BYTES: usize = 16 << 20;
/// Segment files kept open. A settled one of 64 MiB has tables of about 160 KiB: 10 MiB.
const FILES_KEPT: usize = 64;
/// A read that is longer is shared among processors: unpacking costs more than reading.
const SHARED_BYTES: usize = 128 << 10;
/// What of a long read is done at a time.
const PART_BYTES: usize = 1 << 20;
/// What is unpacked ahead of a read at a time: a quarter of what is kept, because others read meanwhile.
const FETCHED_BYTES: u64 = FRAMES_KEPT_BYTES as u64 / 4;

/// What a range of an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    /// Bytes that were written.
    Data,
    /// Zero.
    Zero,
    /// Undefined (discarded, or unreadable when it was copied): reads zero, comparisons skip it.
    Undefined,
}

/// A range of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageRange {
    /// First byte.
    pub offset: u64,
    /// Length.
    pub length: u64,
    /// What it is.
    pub kind: RangeKind,
}

/// A volume as of an LSN.
pub struct Image {
    bytes: u64,
    sector_bytes: u32,
    lsn: Lsn,
    layers: Vec<Layer>,
    segments: Segments,
    files: Cache<u64, Arc<SegmentFile>>,
    payloads: Cache<u64, Arc<Vec<u8>>>,
    frames: FrameCache,
    /// A read has failed.
    lacks_blocks: AtomicBool,
    /// While it is there, nobody deletes the history, and its instant is kept.
    _lease: InstantLease,
}

impl Image {
    /// Opens the image at `lsn`. One that wants a key that is not there is refused now, not when it is read: a rewind must not stop halfway. The caller has asked the timeline whether it resolves; what was pruned is refused here, too. It outlives changes of
    /// the store.
    pub fn open(store: &VolumeStore, lsn: Lsn) -> Result<Image, StoreError> {
        if !store.kept().resolves(lsn) {
            return Err(StoreError::PrunedInstant(lsn));
        }
        store.encrypts()?;
        store.refuse_without_key(lsn)?;
        let (bytes, sector_bytes) = store.shape(lsn);
        Ok(Image {
            bytes,
            sector_bytes,
            lsn,
            layers: store.layers(Lsn(0), lsn)?,
            segments: store.shared_segments(),
            files: Cache::new(FILES_KEPT),
            payloads: Cache::new(PAYLOADS_KEPT),
            frames: frame_cache(FRAMES_KEPT_BYTES),
            lacks_blocks: AtomicBool::new(false),
            _lease: store.lease_at(lsn),
        })
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Logical sector in bytes: 512 or 4096.
    #[must_use]
    pub fn sector_bytes(&self) -> u32 {
        self.sector_bytes
    }

    /// The instant.
    #[must_use]
    pub fn lsn(&self) -> Lsn {
        self.lsn
    }

    /// Layers that a read asks at most.
    #[must_use]
    pub fn layer_count(&self) -> usize {
        self.layers.len()
    }

    /// The ranges of `[offset, offset + length)`, without holes: what no record tells of is zero.
    pub fn ranges(&self, offset: u64, length: u64) -> Result<Vec<ImageRange>, StoreError> {
        let mut ranges = Vec::new();
        let mut at = offset;
        let mut push = |from: u64, to: u64, kind| {
            if to > from {
                ranges.push(ImageRange {
                    offset: from,
                    length: to - from,
                    kind,
                });
            }
        };
        for extent in self.extents(offset, length)? {
            push(at, extent.offset.get(), RangeKind::Zero);
            let kind = match extent.kind {
                kind if kind == RecordKind::Write as u8 => RangeKind::Data,
                kind if kind == RecordKind::Zero as u8 => RangeKind::Zero,
                _ => RangeKind::Undefined,
            };
            push(extent.offset.get(), extent.end(), kind);
            at = extent.end();
        }
        push(at, offset + length, RangeKind::Zero);
        Ok(ranges)
    }

    /// What records have left of `[offset, offset + length)`: in order, without overlaps.
    fn extents(&self, offset: u64, length: u64) -> Result<Vec<MapExtent>, StoreError> {
        let mut found = Vec::new();
        if length == 0 {
            return Ok(found);
        }
        let mut open = vec![(offset, offset + length)];
        for layer in &self.layers {
            let mut left = Vec::new();
            for (start, end) in open {
                let first = found.len();
                layer.find(start, end, &mut found)?;
                let mut at = start;
                for extent in &found[first..] {
                    if extent.offset.get() > at {
                        left.push((at, extent.offset.get()));
                    }
                    at = extent.end();
                }
                if end > at {
                    left.push((at, end));
                }
            }
            open = left;
            if open.is_empty() {
                break;
            }
        }
        found.sort_unstable_by_key(|extent| extent.offset.get());
        Ok(found)
    }

    /// Reads `target.len()` bytes from `offset`; a long range on several processors.
    pub fn read(&self, offset: u64, target: &mut [u8]) -> Result<(), StoreError> {
        for (part, target) in (0..).zip(target.chunks_mut(PART_BYTES)) {
            let read = self.read_part(offset + part * PART_BYTES as u64, target);
            read.inspect_err(|_| self.lacks_blocks.store(true, Ordering::Relaxed))?;
        }
        Ok(())
    }

    /// Whether something that was asked of it until now could not be read.
    #[must_use]
    pub fn lacks_blocks(&self) -> bool {
        self.lacks_blocks.load(Ordering::Relaxed)
    }

    fn read_part(&self, offset: u64, target: &mut [u8]) -> Result<(), StoreError> {
        let extents = self.extents(offset, target.len() as u64)?;
        if target.len() > SHARED_BYTES && !self.fetch(&extents) {
            let half = (target.len() / 2).next_multiple_of(SHARED_BYTES / 2);
            let (first, second) = target.split_at_mut(half);
            self.read_part(offset, first)?;
            return self.read_part(offset + half as u64, second);
        }
        self.read_extents(&extents, offset, target)
    }

    /// Brings the frames that extents lie in into the cache: each is read and unpacked once, neighbours with one read, the processors each their share. False: these are too many at a time.
    fn fetch(&self, extents: &[MapExtent]) -> bool {
        let mut wanted: BTreeMap<u64, (Arc<SegmentFile>, Vec<u64>)> = BTreeMap::new();
        for extent in extents.iter().filter(|extent| extent.is_write()) {
            if wanted.len() > FILES_KEPT / 2 {
                return false;
            }
            // What cannot be opened is told by whoever reads it.
            if let Ok((file, at)) = self.place_of(extent) {
                let at = at + u64::from(extent.skip.get()) * MAP_UNIT_BYTES;
                let (file, frames) = wanted
                    .entry(extent.segment.get())
                    .or_insert_with(|| (file, Vec::new()));
                frames.extend(file.frames_of(at, extent.length.get()));
            }
        }
        let mut bytes = 0;
        for (file, frames) in wanted.values_mut() {
            frames.sort_unstable();
            frames.dedup();
            frames.retain(|frame| !file.has_frame(*frame, &self.frames));
            bytes += frames.len() as u64 * file.frame_bytes();
        }
        if bytes > FETCHED_BYTES {
            return false;
        }
        let groups = wanted.values().flat_map(|(file, frames)| {
            let groups = file.neighbours(frames);
            groups.map(move |group| (file, group))
        });
        let groups: Vec<_> = groups.collect();
        groups
            .into_par_iter()
            .for_each(|(file, group)| file.fetch(group, &self.frames));
        true
    }

    /// Fills `target`, which begins at `offset`, with what `extents` are.
    fn read_extents(
        &self,
        extents: &[MapExtent],
        offset: u64,
        target: &mut [u8],
    ) -> Result<(), StoreError> {
        if target.len() > SHARED_BYTES && extents.len() > 1 {
            let (before, behind) = extents.split_at(extents.len() / 2);
            let at = behind[0].offset.get();
            let (first, second) = target.split_at_mut((at - offset) as usize);
            let (first, second) = rayon::join(
                || self.read_extents(before, offset, first),
                || self.read_extents(behind, at, second),
            );
            return first.and(second);
        }
        let mut at = 0;
        for extent in extents {
            let start = (extent.offset.get() - offset) as usize;
            let end = start + extent.length.get() as usize;
            target[at..start].fill(0);
            match extent.is_write() {
                true => self.read_extent(extent, &mut target[start..end])?,
                false => target[start..end].fill(0),
            }
            at = end;
        }
        target[at..].fill(0);
        Ok(())
    }

    fn read_extent(&self, extent: &MapExtent, target: &mut [u8]) -> Result<(), StoreError> {
        if target.len() as u64 == u64::from(extent.payload_bytes.get()) {
            return self.load(extent, target);
        }
        let skip = u64::from(extent.skip.get()) * MAP_UNIT_BYTES;
        let (file, at) = self.place_of(extent)?;
        // Its frames have checksums, and were proved to hold what the payload's was made of.
        if file.is_settled() && skip + target.len() as u64 <= extent.payload_bytes.get().into() {
            return file
                .read(at + skip, target, &self.frames)
                .map_err(|error| or_no_key(error, |why| lost(extent, &why)));
        }
        // Only whole payloads have a checksum: who wants a part of one is likely to want the rest.
        let payload = self.payloads.get(extent.lsn.get(), || {
            let mut payload = vec![0u8; extent.payload_bytes.get() as usize];
            self.load(extent, &mut payload).map(|()| Arc::new(payload))
        })?;
        let skip = skip as usize;
        // The format promises that an extent lies within its payload.
        let part = payload.get(skip..skip + target.len());
        target.copy_from_slice(part.ok_or_else(|| lost(extent, "its map is wrong"))?);
        Ok(())
    }

    /// The file of a record's payload, and where in it that lies.
    fn place_of(&self, extent: &MapExtent) -> Result<(Arc<SegmentFile>, u64), StoreError> {
        let sequence = SegmentSequence(extent.segment.get());
        let lost = |why: String| lost(extent, &why);
        let segment = self
            .segments
            .get(&sequence)
            .ok_or_else(|| lost("the segment is missing".to_owned()))?;
        let open = || SegmentFile::open(segment).map(Arc::new);
        let file = self
            .files
            .get(sequence.0, open)
            .map_err(|error| or_no_key(error, lost))?;
        Ok((file, u64::from(extent.payload.get()) * MAP_UNIT_BYTES))
    }

    /// Reads a record's whole payload and checks it.
    fn load(&self, extent: &MapExtent, payload: &mut [u8]) -> Result<(), StoreError> {
        let lost = |why: String| lost(extent, &why);
        let (file, at) = self.place_of(extent)?;
        file.read(at, payload, &self.frames)
            .map_err(|error| or_no_key(error, lost))?;
        let crc = payload_crc(file.epoch(), Lsn(extent.lsn.get()), payload);
        match crc == extent.payload_crc.get() {
            true => Ok(()),
            false => Err(lost("its checksum does not match".to_owned())),
        }
    }
}

/// What wants a key is not lost.
fn or_no_key(error: StoreError, lost: impl Fn(String) -> StoreError) -> StoreError {
    match error {
        error if error.wants_key() => error,
        other => lost(other.to_string()),
    }
}

fn lost(extent: &MapExtent, why: &str) -> StoreError {
    StoreError::Payload {
        segment: SegmentSequence(extent.segment.get()),
        lsn: extent.lsn.get(),
        offset: extent.offset.get(),
        length: extent.length.get(),
        why: why.to_owned(),
    }
}
