//! Pruning: what no kept instant needs leaves the segments' files. Addresses stay, so runs, maps and images go on meaning what they meant.
//!
//! Kept instants cut history into intervals. Within one, of each block only the last write is ever seen: a record all of whose blocks were written again
//! before the interval's end is needed by nobody. A sweep goes through the records backwards and remembers which blocks were written since the end of
//! the interval it is in; what they cover is struck. Memory: a bitmap of blocks, at most 32 MiB for a TiB, and 16 MiB for what was written in parts of blocks.
//!
//!   … w(7) │ w(9) w(7) w(9) ◀──sweep──  │ kept    the first w(9) goes; the w(7) left of the other kept instant │ stays
//!
//! A map may name a record that was pruned: nobody asks it for that, because a newer layer of every image at a kept instant has the block.
//!
//! Crash, step by step: instants are struck from the list first (`kept`), durably. Then for each segment: the new file is written, flushed, read back
//! from the disk (every record that it keeps against its checksum), renamed over the old one; then its run. Before the rename the old segment is whole;
//! between the two renames the run says more than is there, of what nobody needs, and the segment is pruned again because its run does not say that it
//! was; a lost run is made again from the copy in the segment. Each record that is kept is therefore read from the disk before its old copy goes.

use crate::kept::KeptInstants;
use crate::segment_file::{SegmentBytes, SegmentFile};
use crate::settle::from_the_disk;
use crate::settled_file;
use crate::volume::Segments;
use crate::{Compression, StoreError, StoredSegment, VolumeStore, durable, run_file};
use roaring::RoaringBitmap;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use varve_format::{
    BLOCK_BYTES, Lsn, RECORD_PAYLOAD_BYTES_MAX, RecordKind, RunEntry, RunHeader, SETTLED_BYTES_MAX,
    SegmentSequence, payload_crc,
};
use varve_log::ReadAt;

/// A segment is written anew when at least one in so many of its bytes goes: what stays in spite of that is less than a tenth.
const WORTH_ONE_IN: u64 = 10;

/// Logical sectors are no smaller.
const SECTOR: u64 = 512;
/// Blocks that are remembered in parts: 16 MiB or so.
const PARTS_MAX: usize = 1 << 20;

/// What was seen of a segment: for which instants it was looked at.
pub(crate) type Looked = BTreeMap<SegmentSequence, u64>;

/// Blocks that were written since the end of the interval, going backwards.
struct Cover {
    blocks: RoaringBitmap,
    /// Of blocks that were written in parts: a bit for each sector of 512 bytes.
    parts: HashMap<u32, u8>,
    /// The interval's end.
    until: Lsn,
}

/// A range of the volume: the blocks that it covers wholly, and sectors of the two at its edges.
struct Range {
    whole: std::ops::Range<u32>,
    edges: [Option<(u32, u8)>; 2],
}

impl Range {
    /// None: it is none, or lies where no bitmap reaches (16 TiB).
    fn of(offset: u64, length: u64) -> Option<Range> {
        let end = offset.checked_add(length)?;
        let last = u32::try_from(end.div_ceil(BLOCK_BYTES)).ok()?;
        let first = (offset / BLOCK_BYTES) as u32;
        // The sectors of a block that lie in the range, rounded inwards.
        let mask = |block: u32| {
            let start = u64::from(block) * BLOCK_BYTES;
            (0..8).fold(0u8, |mask, sector| {
                let at = start + sector * SECTOR;
                mask | u8::from(offset <= at && at + SECTOR <= end) << sector
            })
        };
        let whole = |block: u32| mask(block) == u8::MAX;
        let mut range = Range {
            whole: first..last,
            edges: [None, None],
        };
        if length == 0 {
            return None;
        }
        if !whole(first) {
            range.edges[0] = Some((first, mask(first)));
            range.whole.start += 1;
        }
        if last - 1 > first && !whole(last - 1) {
            range.edges[1] = Some((last - 1, mask(last - 1)));
            range.whole.end -= 1;
        }
        Some(range)
    }
}

impl Cover {
    /// Whether all of a range was written.
    fn has(&self, offset: u64, length: u64) -> bool {
        let Some(range) = Range::of(offset, length) else {
            return false;
        };
        if !(offset | length).is_multiple_of(SECTOR) {
            return false; // No device writes like that.
        }
        let edge = |(block, mask): (u32, u8)| {
            let written = self.parts.get(&block).copied().unwrap_or(0);
            self.blocks.contains(block) || written & mask == mask
        };
        let whole = range.whole.is_empty() || self.blocks.contains_range(range.whole);
        whole && range.edges.into_iter().flatten().all(edge)
    }

    /// Notes a range.
    fn add(&mut self, offset: u64, length: u64) {
        let Some(range) = Range::of(offset, length) else {
            return;
        };
        self.blocks.insert_range(range.whole);
        for (block, mask) in range.edges.into_iter().flatten() {
            let room = self.parts.len() < PARTS_MAX || self.parts.contains_key(&block);
            if self.blocks.contains(block) || !room {
                continue; // Less is remembered than was written: more stays.
            }
            let written = self.parts.entry(block).or_default();
            *written |= mask;
            if *written == u8::MAX {
                self.parts.remove(&block);
                self.blocks.insert(block);
            }
        }
    }

    fn clear(&mut self, until: Lsn) {
        self.blocks.clear();
        self.parts.clear();
        self.until = until;
    }
}

/// A sweep from the newest segment below the limit to the oldest. It needs no lock of the store; when what is kept changes, another one takes over.
pub struct Sweep {
    directory: Arc<Path>,
    segments: Segments,
    /// In order, the limit included.
    kept: Vec<Lsn>,
    /// Segments to look at, oldest first.
    dirty: Vec<SegmentSequence>,
    /// Everything from here on was swept.
    at: SegmentSequence,
    cover: Cover,
    compression: Compression,
    /// Some did not fit on the disk.
    full: Option<StoreError>,
    /// Whoever deletes the history waits for a step, not for a sweep.
    lease: Weak<()>,
}

/// One step of a sweep.
pub enum Swept {
    /// There is nothing left to look at.
    Done,
    /// Records were read.
    Read,
    /// A segment was looked at, and stays as it is.
    Stays(SegmentSequence, u64),
    /// A segment's new file is there, proved.
    Pruned(Box<PrunedSegment>),
}

/// What became of the first half of a step.
pub enum Written {
    /// Nothing was written.
    Nothing(Swept),
    /// What a segment has left.
    Segment(Box<UnprovedSegment>),
}

/// What a segment has left, written and neither flushed nor proved.
pub struct UnprovedSegment {
    source: SegmentFile,
    written: File,
    pruned: PrunedSegment,
    /// While it is there, nobody deletes the history.
    _lease: Arc<()>,
}

impl UnprovedSegment {
    /// The file that is to be proved.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.pruned.new
    }
}

/// A segment without what nobody needs.
pub struct PrunedSegment {
    before: Arc<StoredSegment>,
    after: StoredSegment,
    new: PathBuf,
    head: RunHeader,
    entries: Vec<RunEntry>,
    events: Vec<RunEntry>,
}

/// What is needed of a segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Bytes of writes that stay.
    pub kept_bytes: u64,
    /// Bytes of writes that go.
    pub gone_bytes: u64,
}

/// The instants that decide what is needed of a segment: those in it, and the first behind it. None: it reaches above the limit.
fn deciding(kept: &[Lsn], segment: &StoredSegment) -> Option<(u64, Lsn)> {
    let from = kept.partition_point(|lsn| *lsn <= segment.lsn_start);
    let behind = kept.partition_point(|lsn| *lsn < segment.lsn_end);
    let until = *kept.get(behind)?;
    let mut hasher = blake3::Hasher::new();
    for lsn in &kept[from.min(behind)..=behind] {
        hasher.update(&lsn.0.to_le_bytes());
    }
    let mut hash = [0u8; 8];
    hasher.finalize_xof().fill(&mut hash);
    Some((u64::from_le_bytes(hash).max(1), until))
}

impl VolumeStore {
    /// A sweep of what is to be pruned; none if nothing is.
    #[must_use]
    pub fn sweep(&self, compression: Compression) -> Option<Sweep> {
        self.sweep_for(self.kept(), compression)
            .filter(|sweep| !sweep.dirty.is_empty())
    }

    /// The same for another list of instants: to say what it would prune.
    #[must_use]
    pub fn sweep_for(&self, kept: &KeptInstants, compression: Compression) -> Option<Sweep> {
        if kept.below == Lsn(0) || self.lists_differ || self.kept_is_lost {
            return None;
        }
        let mut instants: Vec<Lsn> = kept
            .entries
            .iter()
            .map(varve_format::KeptEntry::lsn)
            .collect();
        instants.retain(|lsn| *lsn < kept.below);
        instants.push(kept.below);
        let is_dirty = |segment: &&StoredSegment| {
            segment.lsn_end <= kept.below
                && segment.stored_bytes > 0
                && segment.data_bytes <= SETTLED_BYTES_MAX
                && deciding(&instants, segment).is_some_and(|(hash, _)| {
                    hash != segment.pruned_for && self.looked.get(&segment.sequence) != Some(&hash)
                })
        };
        let dirty = self
            .segments()
            .filter(is_dirty)
            .map(|s| s.sequence)
            .collect();
        let mut below = self.segments().rev();
        let newest = below.find(|segment| segment.lsn_start < kept.below);
        let at = newest.map_or(SegmentSequence(0), |segment| {
            SegmentSequence(segment.sequence.0 + 1)
        });
        Some(Sweep {
            directory: Arc::clone(self.directory()),
            segments: self.shared_segments(),
            kept: instants,
            dirty,
            at,
            cover: Cover {
                blocks: RoaringBitmap::new(),
                parts: HashMap::new(),
                until: kept.below,
            },
            compression,
            full: None,
            lease: Arc::downgrade(&self.lease()),
        })
    }

    /// Remembers that a segment stays as it is for these instants.
    pub fn stays(&mut self, sequence: SegmentSequence, hash: u64) {
        self.looked.insert(sequence, hash);
    }

    /// Gives a pruned segment its place.
    pub fn replace_pruned(&mut self, pruned: &PrunedSegment) -> Result<(), StoreError> {
        let sequence = pruned.before.sequence;
        let same = |now: &Arc<StoredSegment>| now.pruned_for == pruned.before.pruned_for;
        if !self.segment(sequence).is_some_and(same) {
            let _ = std::fs::remove_file(&pruned.new);
            return Err(StoreError::Missing(sequence));
        }
        self.name_proved(&pruned.new, &pruned.before.path())?;
        run_file::write(
            &pruned.before.run_path(),
            &pruned.head,
            &pruned.entries,
            &pruned.events,
        )?;
        self.pruned(pruned.after.clone());
        Ok(())
    }
}

impl PrunedSegment {
    /// Bytes that its file is smaller.
    #[must_use]
    pub fn freed_bytes(&self) -> u64 {
        self.before
            .stored_bytes
            .saturating_sub(self.after.stored_bytes)
    }
}

impl Sweep {
    /// Whether `kept` is still what it sweeps for.
    #[must_use]
    pub fn is_for(&self, kept: &KeptInstants) -> bool {
        let below = kept.entries.iter().map(varve_format::KeptEntry::lsn);
        let below = below.filter(|lsn| *lsn < kept.below);
        below.chain([kept.below]).eq(self.kept.iter().copied())
    }

    /// Segments that are left to look at.
    #[must_use]
    pub fn left(&self) -> usize {
        self.dirty.len()
    }

    /// The next segment. After an error the sweep is to be given up.
    pub fn step(&mut self) -> Result<Swept, StoreError> {
        match self.write_next()? {
            Written::Nothing(swept) => Ok(swept),
            Written::Segment(unproved) => self.prove(*unproved),
        }
    }

    /// The first half of a step: what a segment has left is written, and not proved yet.
    pub fn write_next(&mut self) -> Result<Written, StoreError> {
        let nothing = |swept| Ok(Written::Nothing(swept));
        let Some(lease) = self.lease.upgrade() else {
            return nothing(Swept::Done);
        };
        let Some((segment, is_dirty)) = self.next() else {
            return self.full.take().map_or(nothing(Swept::Done), Err);
        };
        let deciding = deciding(&self.kept, &segment);
        let Some((hash, until)) = deciding.filter(|_| is_dirty) else {
            // What cannot be read covers nothing: more stays.
            if let Ok(entries) = segment.entries() {
                self.strike(&entries);
            }
            return nothing(Swept::Read);
        };
        let Ok(entries) = segment.entries() else {
            return nothing(Swept::Stays(segment.sequence, hash));
        };
        let needed = self.strike(&entries);
        let verdict = verdict_of(&entries, &needed);
        if verdict.gone_bytes == 0
            || verdict.gone_bytes * WORTH_ONE_IN < verdict.gone_bytes + verdict.kept_bytes
        {
            return nothing(Swept::Stays(segment.sequence, hash));
        }
        let mut flags = needed.iter();
        let kept: Vec<RunEntry> = entries
            .iter()
            .filter(|_| flags.next() == Some(&true))
            .copied()
            .collect();
        let new = durable::unfinished(&segment.path());
        debug_assert!(new.starts_with(&self.directory));
        let written = self.write(&segment, kept, (hash, until), &new);
        let written = written.inspect_err(|_| {
            let _ = std::fs::remove_file(&new);
        });
        match written {
            Ok((source, written, pruned)) => Ok(Written::Segment(Box::new(UnprovedSegment {
                source,
                written,
                pruned,
                _lease: lease,
            }))),
            Err(error) => self.failed(&segment, hash, error).map(Written::Nothing),
        }
    }

    /// The second half: it is read back from the disk.
    pub fn prove(&mut self, unproved: UnprovedSegment) -> Result<Swept, StoreError> {
        let pruned = unproved.pruned;
        let (segment, hash) = (Arc::clone(&pruned.before), pruned.head.pruned_for.get());
        let (written, new) = (unproved.written, pruned.new.as_path());
        let proved =
            from_the_disk(written, new, &segment.keys).and_then(|(written, stored_bytes)| {
                prove(&segment, &unproved.source, &written, &pruned.entries, new)?;
                Ok(stored_bytes)
            });
        match proved {
            Ok(stored_bytes) => {
                let mut pruned = pruned;
                pruned.after.stored_bytes = stored_bytes;
                Ok(Swept::Pruned(Box::new(pruned)))
            }
            Err(error) => {
                let _ = std::fs::remove_file(new);
                self.failed(&segment, hash, error)
            }
        }
    }

    fn failed(
        &mut self,
        segment: &StoredSegment,
        hash: u64,
        error: StoreError,
    ) -> Result<Swept, StoreError> {
        match error {
            // A disk that does not take what is written: that goes for all of them.
            error @ (StoreError::ReadOnly(_) | StoreError::Proof(_)) => Err(error),
            error if error.wants_key() => Err(error),
            StoreError::Io(path, error) if path != segment.path() => {
                Err(StoreError::Io(path, error))
            }
            // An older one, of which less is left, may fit, and make room.
            error @ StoreError::Full(_) => {
                self.full = Some(error);
                Ok(Swept::Read)
            }
            // What is wrong with the segment a scrub says. Whole or not, nothing of it is thrown away, and it holds up no other.
            _ => Ok(Swept::Stays(segment.sequence, hash)),
        }
    }

    /// What would stay and go of the next segments; nothing is written. None: there is nothing left to look at.
    pub fn look(&mut self) -> Result<Option<Verdict>, StoreError> {
        let Some((segment, is_dirty)) = self.next() else {
            return Ok(None);
        };
        let entries = match segment.entries() {
            Err(StoreError::Damaged(..)) => return Ok(Some(Verdict::default())),
            entries => entries?,
        };
        let needed = self.strike(&entries);
        let verdict = verdict_of(&entries, &needed);
        Ok(Some(if is_dirty {
            verdict
        } else {
            Verdict::default()
        }))
    }

    /// The next segment whose records matter: to be looked at itself, or in the same interval as the next that is. Whether it is the former.
    fn next(&mut self) -> Option<(Arc<StoredSegment>, bool)> {
        let wanted = *self.dirty.last()?;
        let until = self.segments.get(&wanted).map(|segment| {
            let behind = self.kept.partition_point(|lsn| *lsn < segment.lsn_end);
            self.kept.get(behind).copied().unwrap_or(segment.lsn_end)
        })?;
        let mut below = self.segments.range(..self.at).rev();
        let (sequence, segment) =
            below.find(|(sequence, segment)| **sequence == wanted || segment.lsn_start < until)?;
        self.at = *sequence;
        let is_dirty = *sequence == wanted;
        if is_dirty {
            self.dirty.pop();
        }
        Some((Arc::clone(segment), is_dirty))
    }

    /// Which of a segment's records somebody needs; and notes what they cover.
    fn strike(&mut self, entries: &[RunEntry]) -> Vec<bool> {
        let mut needed = vec![true; entries.len()];
        for (entry, needed) in entries.iter().zip(&mut needed).rev() {
            let index = self.kept.partition_point(|lsn| *lsn <= entry.lsn());
            // Above the limit every instant resolves.
            let Some(until) = self.kept.get(index) else {
                continue;
            };
            if *until != self.cover.until {
                self.cover.clear(*until);
            }
            let (offset, length) = (entry.offset.get(), entry.length.get());
            let sane = offset.checked_add(length).is_some();
            if !entry.changes_image() || entry.is_event() || length == 0 || !sane {
                continue;
            }
            *needed = !self.cover.has(offset, length);
            self.cover.add(offset, length);
        }
        needed
    }

    fn write(
        &self,
        segment: &Arc<StoredSegment>,
        entries: Vec<RunEntry>,
        (hash, until): (u64, Lsn),
        new: &Path,
    ) -> Result<(SegmentFile, File, PrunedSegment), StoreError> {
        let source = SegmentFile::open(segment)?;
        let events: Vec<RunEntry> = entries.iter().filter(|e| e.is_event()).copied().collect();
        let mut head = RunHeader::new(
            source.footer(),
            segment.volume_bytes,
            segment.sector_bytes,
            &entries,
            &events,
        );
        head.pruned_for = hash.into();
        head.pruned_until = until.0.into();
        head.stored_at = segment.stored_at.0.into();
        let blocks = blocks_of(segment, &entries)?;
        let run = run_file::encode(&head, &entries, &events);
        let kept = settled_file::Kept {
            blocks: &blocks,
            run: &run,
        };
        let written =
            settled_file::write(&source, &entries, new, (self.compression, 1), Some(&kept))?;
        let after = StoredSegment::new(
            (&self.directory, &segment.keys),
            &head,
            events.clone(),
            0, // It is known once it was flushed.
        );
        let pruned = PrunedSegment {
            before: Arc::clone(segment),
            after,
            new: new.to_path_buf(),
            head,
            entries,
            events,
        };
        Ok((source, written, pruned))
    }
}

fn verdict_of(entries: &[RunEntry], needed: &[bool]) -> Verdict {
    let mut verdict = Verdict::default();
    for (entry, needed) in entries.iter().zip(needed) {
        if entry.kind == RecordKind::Write as u8 {
            match needed {
                true => verdict.kept_bytes += entry.length.get(),
                false => verdict.gone_bytes += entry.length.get(),
            }
        }
    }
    verdict
}

/// Where a record's payload lies in its segment; of a point, its name.
fn payload_of(entry: &RunEntry) -> Option<(u64, u64)> {
    let has = entry.kind == RecordKind::Write as u8 || entry.kind == RecordKind::Point as u8;
    (has && entry.length.get() > 0).then_some((entry.payload.get(), entry.length.get()))
}

/// The blocks of a segment that payloads of these records touch.
fn blocks_of(segment: &StoredSegment, entries: &[RunEntry]) -> Result<Vec<bool>, StoreError> {
    let mut blocks = vec![false; (segment.data_bytes / BLOCK_BYTES) as usize];
    for (at, length) in entries.iter().filter_map(payload_of) {
        let end = at
            .checked_add(length)
            .filter(|end| *end <= segment.data_bytes);
        let end = end.ok_or_else(|| {
            StoreError::Damaged(
                segment.run_path(),
                varve_format::FormatError::Field("run.payload"),
            )
        })?;
        blocks[(at / BLOCK_BYTES) as usize..end.div_ceil(BLOCK_BYTES) as usize].fill(true);
    }
    Ok(blocks)
}

/// Every record that was kept is what it was, in the file that was written.
fn prove(
    segment: &StoredSegment,
    source: &SegmentFile,
    written: &SegmentFile,
    entries: &[RunEntry],
    new: &Path,
) -> Result<(), StoreError> {
    let unproved = || StoreError::Proof(new.to_path_buf());
    let (root, damaged) = root_and_damage(segment, written, entries).map_err(|_| unproved())?;
    if written.kept_root() != Some(root) {
        return Err(unproved());
    }
    if run_file::of_segment(written).map_err(|_| unproved())?.1 != entries {
        return Err(unproved());
    }
    match damaged {
        None => Ok(()),
        // Which of the two is wrong?
        Some(entry) => {
            let mut source = SegmentBytes::new(source);
            match is_damaged(segment, &mut source, entry) {
                true => Err(StoreError::Root(segment.sequence)),
                false => Err(unproved()),
            }
        }
    }
}

/// BLAKE3 of what a segment keeps, and the first record whose payload is not there as it was recorded; each frame is read once.
pub(crate) fn root_and_damage<'a>(
    segment: &StoredSegment,
    file: &SegmentFile,
    entries: &'a [RunEntry],
) -> Result<([u8; 32], Option<&'a RunEntry>), StoreError> {
    // Payloads lie in the order of the records. Where they do not, it only takes longer.
    let mut left = entries.iter().peekable();
    let mut damaged = None;
    let root = settled_file::root_and(file, |source, before| {
        let lies_before = |entry: &&RunEntry| {
            payload_of(entry)
                .is_none_or(|(at, length)| at.checked_add(length).is_some_and(|end| end <= before))
        };
        while let Some(entry) = left.next_if(lies_before) {
            if damaged.is_none() && is_damaged(segment, source, entry) {
                damaged = Some(entry);
            }
        }
    })?;
    // What is left lies behind the segment's end.
    Ok((
        root,
        damaged.or_else(|| left.find(|entry| payload_of(entry).is_some())),
    ))
}

/// Whether a record's payload is not there as it was recorded.
pub(crate) fn is_damaged(
    segment: &StoredSegment,
    source: &mut SegmentBytes<'_>,
    entry: &RunEntry,
) -> bool {
    payload_of(entry).is_some_and(|(at, length)| {
        let mut payload = vec![0u8; length.min(RECORD_PAYLOAD_BYTES_MAX) as usize];
        let read = source.read_at(at, &mut payload);
        let crc = payload_crc(segment.epoch, entry.lsn(), &payload);
        read.is_err() || crc != entry.payload_crc.get()
    })
}
