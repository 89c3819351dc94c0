//! Scrubbing: everything is read again and checked, and for each damage it is said which instants and which blocks are lost. Only what can be made
//! again from something whole is changed: runs and maps.
//!
//! What lies in memory of a file is dropped before it is read: a scrub is about the disk.
//!
//! A scrub of what is stored ([`ScrubJob::stored`]) compares every byte with its checksum and unpacks nothing: that finds what a disk has spoilt, as fast as
//! the disk reads, and without keys. A segment in which it finds anything is read as above.
//!
//! A segment is whole if every batch of it parses, follows its predecessor and matches its checksums, its bytes have the root that they were sealed
//! with, and its records are those of its run. If it is not, each of the run's records is tried by itself: what can be read is not lost.

use crate::changed::merged;
use crate::map_file::MapCursor;
use crate::maps::MapPlace;
use crate::prune::{is_damaged, root_and_damage};
use crate::segment_file::{SegmentBytes, SegmentFile};
use crate::volume::Segments;
use crate::{Closed, StoreError, StoredSegment, VolumeStore, durable, run_file};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use varve_format::{Hash128, Lsn, RunEntry, SegmentSequence, WallTime};
use varve_log::{ReadAt, SegmentReader};

/// Something that is not what it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// In words.
    pub what: String,
    /// The segment, if it is one.
    pub segment: Option<SegmentSequence>,
    /// Bytes of the volume that cannot be read: (first, length); in order, neighbours merged. Empty: everything that was recorded can still be read,
    /// unless it is `unplaced`.
    pub blocks: Vec<(u64, u64)>,
    /// First instant that lacks them, and its time.
    pub from: Option<(Lsn, WallTime)>,
    /// First instant that has all of them again, because they were written anew; none if the newest lacks them, too.
    pub until: Option<(Lsn, WallTime)>,
    /// Whether something is lost by it is said in `what`, or with other damage, not here.
    pub unplaced: bool,
}

impl Damage {
    /// Damage of a segment that no block is lost by.
    fn of(segment: &StoredSegment, why: &str) -> Damage {
        Damage {
            segment: Some(segment.sequence),
            ..Damage::without_place(&format!("{}: {why}", segment.path().display()))
        }
    }

    /// What a second reading did not find again.
    fn once(segment: &StoredSegment, why: &str) -> Damage {
        let why = format!(
            "{why}. Read again it was whole: nothing is lost, but what it lies on, or the way from there, is not to be trusted"
        );
        Damage::of(segment, &why)
    }

    /// Damage that no block is lost by.
    #[must_use]
    pub fn without_place(what: &str) -> Damage {
        Damage {
            what: what.to_owned(),
            segment: None,
            blocks: Vec::new(),
            from: None,
            until: None,
            unplaced: false,
        }
    }

    /// What was found when the store was opened. The hole that a lost segment leaves is told by itself.
    pub(crate) fn known(what: impl AsRef<str>) -> Damage {
        Damage {
            unplaced: true,
            ..Damage::without_place(what.as_ref())
        }
    }
}

/// What a scrub has found.
#[derive(Clone, Debug, Default)]
pub struct Scrubbed {
    /// Segments that were read.
    pub segments: u64,
    /// Bytes of files that were read.
    pub bytes: u64,
    /// Bytes of history that they hold.
    pub history_bytes: u64,
    /// What is wrong.
    pub damage: Vec<Damage>,
    /// Maps that are damaged, and are to be made again.
    pub maps: Vec<PathBuf>,
}

/// How much is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    Everything,
    Stored,
    ForIndexes,
}

/// A scrub of what there is now. It needs no lock of the store.
pub struct ScrubJob {
    pub(crate) segments: Segments,
    pub(crate) maps: Vec<MapPlace>,
    pub(crate) known: Vec<String>,
    closed: Vec<Closed>,
    /// Where the history goes on from what this store never held.
    began: Lsn,
    reading: Reading,
    /// Segments are missing that wait for their key.
    waits_for_key: bool,
    /// While it is there, nobody deletes the history.
    _lease: Arc<()>,
}

impl VolumeStore {
    /// A scrub of what there is now.
    #[must_use]
    pub fn scrub(&self) -> ScrubJob {
        ScrubJob {
            segments: self.shared_segments(),
            maps: self.maps.all(),
            known: self.damaged().to_vec(),
            closed: self.timeline().closed().to_vec(),
            began: self.began(),
            reading: Reading::Everything,
            waits_for_key: self.waits_for_key(),
            _lease: self.lease(),
        }
    }

    /// Gives up the maps that a scrub found damaged: the next [`VolumeStore::next_map`] names them.
    pub fn discard_maps(&mut self, scrubbed: &Scrubbed) {
        self.maps.discard_all(&scrubbed.maps);
    }
}

impl ScrubJob {
    /// The same scrub, but compressed segments are not unpacked: what is stored has the checksums that it was proved with when it was compressed.
    #[must_use]
    pub fn stored(mut self) -> ScrubJob {
        self.reading = Reading::Stored;
        self
    }

    /// The same scrub, to make indexes anew: runs that are not what their segments say, and, if nothing is lost, all maps ([`VolumeStore::discard_maps`] gives
    /// those up).
    #[must_use]
    pub fn for_indexes(mut self) -> ScrubJob {
        self.reading = Reading::ForIndexes;
        self
    }

    /// Bytes of files that it will read, about.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let segments = self.segments.values().map(|segment| segment.stored_bytes);
        segments.sum::<u64>() + self.maps.iter().map(|map| map.bytes).sum::<u64>()
    }

    /// Segments there are.
    #[must_use]
    pub fn segment_count(&self) -> u64 {
        self.segments.len() as u64
    }

    /// Bytes of the segments below `from`.
    #[must_use]
    pub fn bytes_below(&self, from: SegmentSequence) -> u64 {
        let segments = self.segments.range(..from);
        segments.map(|(_, segment)| segment.stored_bytes).sum()
    }

    /// Runs it from segment `from` on. `progress` hears after each file which segment is next and what was found until now, and says whether to go on.
    pub fn run(
        &self,
        from: SegmentSequence,
        mut progress: impl FnMut(SegmentSequence, &Scrubbed) -> ControlFlow<()>,
    ) -> Scrubbed {
        let mut found = Scrubbed::default();
        let before = self.segments.range(..from).next_back();
        let mut previous = before.map(|(_, segment)| (Arc::clone(segment), None));
        for (sequence, segment) in self.segments.range(from..) {
            let before = previous.as_ref().map(|(before, _)| &**before);
            found.damage.extend(self.hole_before(segment, before));
            let hash = self.segment(segment, previous.as_ref(), &mut found);
            previous = Some((Arc::clone(segment), hash));
            if progress(SegmentSequence(sequence.0 + 1), &found).is_break() {
                return found;
            }
        }
        // Where a segment has lost records, a map may be the last to know what they were.
        let is_whole = found.damage.iter().all(|damage| damage.blocks.is_empty());
        for map in &self.maps {
            if self.reading == Reading::ForIndexes && is_whole {
                found.maps.push(map.path.clone());
                continue;
            }
            durable::forget_cached(&map.path);
            if let Err(error) = check_map(map) {
                found.maps.push(map.path.clone());
                let what = format!("{error}. It is made again");
                found.damage.push(Damage::without_place(&what));
            }
            found.bytes += map.bytes;
            if progress(SegmentSequence(u64::MAX), &found).is_break() {
                return found;
            }
        }
        found.damage.extend(self.known.iter().map(Damage::known));
        found
    }

    /// Writes damaged runs anew, out of segments that are whole. What fails is said with the rest of the damage.
    fn mend(&self, segment: &StoredSegment, entries: &[RunEntry]) -> Result<(), StoreError> {
        let file = SegmentFile::open(segment)?;
        let source = SegmentBytes::new(&file);
        let reader = SegmentReader::open(source, 0, segment.data_bytes);
        let header = *reader.map_err(StoreError::segment(file.path()))?.header();
        let (mut head, events) = run_file::head_of(&header, file.footer(), entries);
        head.stored_at = segment.stored_at.0.into();
        run_file::write(&segment.run_path(), &head, entries, &events)
    }

    /// Reads a segment; gives the hash of its last batch. One that was pruned while it was read is read again.
    fn segment(
        &self,
        segment: &StoredSegment,
        previous: Option<&(Arc<StoredSegment>, Option<Hash128>)>,
        found: &mut Scrubbed,
    ) -> Option<Hash128> {
        let pruned = || SegmentFile::open(segment).map(|file| file.kept_root());
        found.segments += 1;
        found.bytes += segment.stored_bytes;
        found.history_bytes += segment.data_bytes;
        let so_far = found.damage.len();
        durable::forget_cached(&segment.path());
        durable::forget_cached(&segment.run_path());
        let first = pruned();
        let mut before = first.as_ref().ok().copied().flatten();
        let hash = loop {
            let hash = self.segment_once(segment, previous, found);
            if found.damage.len() == so_far {
                break hash;
            }
            let after = pruned().ok().flatten();
            if after == before {
                break hash;
            }
            before = after;
            found.damage.truncate(so_far);
        };
        if let (Err(error), true) = (first, found.damage.len() == so_far) {
            found.damage.push(Damage::once(segment, &error.to_string()));
        }
        hash
    }

    fn segment_once(
        &self,
        segment: &StoredSegment,
        previous: Option<&(Arc<StoredSegment>, Option<Hash128>)>,
        found: &mut Scrubbed,
    ) -> Option<Hash128> {
        let Some(wrong) = (self.reading == Reading::Stored)
            .then(|| self.as_stored(segment))
            .flatten()
        else {
            return self.unpacked(segment, previous, found);
        };
        match wrong {
            Wrong::Nothing => {}
            // Without its key no record can be read: all of them are named.
            Wrong::Locked(why) => found.damage.push(self.damage(segment, why)),
            Wrong::Elsewhere(why) => found.damage.push(Damage::of(segment, &why)),
            Wrong::Readable(why) => {
                let before = found.damage.len();
                let hash = self.unpacked(segment, previous, found);
                if found.damage.len() == before {
                    found.damage.push(Damage::once(segment, &why));
                }
                return hash;
            }
        }
        None
    }

    /// Reads all of a segment, unpacked; gives the hash of its last batch.
    fn unpacked(
        &self,
        segment: &StoredSegment,
        previous: Option<&(Arc<StoredSegment>, Option<Hash128>)>,
        found: &mut Scrubbed,
    ) -> Option<Hash128> {
        let follows = |(before, hash): &(Arc<StoredSegment>, Option<Hash128>)| Follows {
            lsn_end: before.lsn_end,
            next: before.sequence.0 + 1 == segment.sequence.0,
            hash: (before.epoch == segment.epoch).then_some(*hash).flatten(),
        };
        if let Ok(file) = SegmentFile::open(segment)
            && file.kept_root().is_some()
        {
            if let Err(why) = self.pruned(segment, &file, found) {
                found.damage.push(self.damage(segment, why));
            }
            return None; // Its batches are not there any more.
        }
        match whole(segment, previous.map(follows)) {
            Ok((hash, entries)) => {
                if let Some(why) = run_is_wrong(segment, &entries) {
                    let mended = match self.mend(segment, &entries) {
                        Ok(()) => "It was made again from its segment".to_owned(),
                        Err(error) => format!("It could not be made again: {error}"),
                    };
                    let what = format!("{why}. {mended}");
                    found.damage.push(Damage::without_place(&what));
                }
                Some(hash)
            }
            Err(why) => {
                found.damage.push(self.damage(segment, why));
                None
            }
        }
    }

    /// A pruned segment: what it keeps has the root that it was written with, and every record of its run its checksum.
    fn pruned(
        &self,
        segment: &StoredSegment,
        file: &SegmentFile,
        found: &mut Scrubbed,
    ) -> Result<(), String> {
        let (head, entries, events) = run_file::of_segment(file).map_err(|e| e.to_string())?;
        let (root, damaged) =
            root_and_damage(segment, file, &entries).map_err(|error| error.to_string())?;
        if file.kept_root() != Some(root) {
            return Err("its bytes do not have the root that they were pruned with".to_owned());
        }
        if let Some(entry) = damaged {
            return Err(format!(
                "the record at LSN {} is not what it was",
                entry.lsn()
            ));
        }
        // A run that says more is one that pruning has not come to yet.
        let path = segment.run_path();
        let run = run_file::read_head(&path)
            .and_then(|(run, _)| Ok((run, run_file::read_entries(segment)?)));
        let why = match run {
            Ok((run, _)) if run.pruned_for != head.pruned_for => return Ok(()),
            Ok((_, run)) if run == entries => return Ok(()),
            Ok(_) => format!(
                "{}: it says something else than its segment",
                path.display()
            ),
            Err(error) => error.to_string(),
        };
        let mended = run_file::write(&path, &head, &entries, &events);
        let mended = mended.map_or_else(
            |error| format!("It could not be made again: {error}"),
            |()| "It was made again from its segment".to_owned(),
        );
        let what = format!("{why}. {mended}");
        found.damage.push(Damage::without_place(&what));
        Ok(())
    }

    /// Compares a compressed segment with its checksums. None: there is nothing to compare without unpacking it.
    fn as_stored(&self, segment: &StoredSegment) -> Option<Wrong> {
        let file = match SegmentFile::open(segment) {
            Ok(file) => file,
            Err(error) => return Some(Wrong::Readable(error.to_string())),
        };
        if !file.is_settled() {
            return None;
        }
        if let Err(damage) = file.check_stored() {
            return Some(match file.is_locked() {
                true => Wrong::Locked(format!(
                    "{damage}. At most what is named here is lost; which of it, only its key can tell: varve key unlock, then varve scrub"
                )),
                false => Wrong::Readable(damage.to_string()),
            });
        }
        let run_of_its_own = match file.kept_root() {
            Some(_) => run_file::of_segment(&file).map(drop),
            None => Ok(()),
        };
        let run = run_of_its_own
            .and_then(|()| run_file::read_entries(segment).map(drop))
            .and_then(|()| run_file::read_head(&segment.run_path()).map(drop));
        if let Err(damage) = run {
            return Some(match file.is_locked() {
                true => Wrong::Elsewhere(format!(
                    "its run: {damage}. With its key it is made again: varve key unlock, then varve scrub"
                )),
                false => Wrong::Readable(format!("its run: {damage}")),
            });
        }
        Some(Wrong::Nothing)
    }

    /// What is missing between two segments, or before the first one. Numbers may be left out: a segment in which nothing was recorded is none.
    pub(crate) fn hole_before(
        &self,
        segment: &StoredSegment,
        before: Option<&StoredSegment>,
    ) -> Option<Damage> {
        let end = before.map_or(self.began, |before| before.lsn_end);
        if segment.previous_lsn_end == end {
            return None;
        }
        let waits = match self.waits_for_key {
            true => ". What waits for its key may lie there: varve key unlock",
            false => "",
        };
        let there = match before {
            Some(_) => format!("what is there before it ends at {end}"),
            None => "nothing of what was before it is there".to_owned(),
        };
        let what = format!(
            "history has a hole before segment {}: it goes on behind LSN {}, {there}{waits}",
            segment.sequence, segment.previous_lsn_end
        );
        // What was in it may have been written anywhere: nothing resolves until all of the device was read again.
        let mut closed = self.closed.iter();
        let again = closed.rfind(|closed| closed.from <= end && segment.lsn_start <= closed.to);
        let again = again.filter(|closed| !closed.open);
        Some(Damage {
            blocks: vec![(0, segment.volume_bytes)],
            from: Some((
                end.plus(1),
                before.map_or(segment.time_start, |before| before.time_end),
            )),
            until: again.map(|closed| (closed.to.plus(1), closed.to_time)),
            ..Damage::without_place(&what)
        })
    }

    /// What a damaged segment has lost.
    pub(crate) fn damage(&self, segment: &StoredSegment, why: String) -> Damage {
        let mut damage = Damage {
            what: format!("{}: {why}", segment.path().display()),
            segment: Some(segment.sequence),
            blocks: Vec::new(),
            from: None,
            until: None,
            unplaced: false,
        };
        let entries = match segment.entries() {
            Ok(entries) => entries,
            // The run is made again from the segment, once that can be read.
            Err(error) if error.wants_key() && frames_are_whole(segment) => {
                damage.what += "; what it is made again from is locked. Nothing is known to be lost: varve key unlock, then varve scrub";
                return damage;
            }
            Err(error) => {
                damage.what += &format!("; its run, too: {error}");
                damage.blocks = vec![(0, segment.volume_bytes)];
                damage.from = Some((segment.lsn_start, segment.time_start));
                return damage;
            }
        };
        let lost = lost_records(segment, &entries);
        if let Some(first) = lost.first() {
            damage.from = Some((first.lsn().plus(1), first.time()));
        }
        let ends = |entry: &RunEntry| entry.offset.get().saturating_add(entry.length.get());
        let ranges = lost.iter().map(|entry| (entry.offset.get(), ends(entry)));
        damage.blocks = merged(ranges.collect());
        damage.until = self.written_again(segment, &entries, &lost);
        damage
    }

    /// When everything of `lost` had been written anew.
    fn written_again(
        &self,
        segment: &StoredSegment,
        entries: &[RunEntry],
        lost: &[RunEntry],
    ) -> Option<(Lsn, WallTime)> {
        let last = lost.last()?.lsn();
        let (mut left, mut next) = (Vec::new(), lost.iter().peekable());
        let later = self
            .segments
            .range(SegmentSequence(segment.sequence.0 + 1)..);
        let later = later.map(|(_, segment)| segment.entries().unwrap_or_default());
        for entries in std::iter::once(entries.to_vec()).chain(later) {
            for entry in entries.iter().filter(|entry| entry.changes_image()) {
                let (start, length) = (entry.offset.get(), entry.length.get());
                cover(&mut left, start, length);
                if next.next_if(|lost| lost.lsn == entry.lsn).is_some() {
                    left.push((start, start.saturating_add(length)));
                }
                if left.is_empty() && entry.lsn() >= last {
                    return Some((entry.lsn().plus(1), entry.time()));
                }
            }
        }
        None
    }
}

/// Whether a locked segment lacks nothing but its key.
fn frames_are_whole(segment: &StoredSegment) -> bool {
    SegmentFile::open(segment).is_ok_and(|file| file.check_stored().is_ok())
}

/// Takes `[offset, offset + length)` out of ranges (start, end).
fn cover(left: &mut Vec<(u64, u64)>, offset: u64, length: u64) {
    let (from, to) = (offset, offset.saturating_add(length));
    if !left.iter().any(|(start, end)| *start < to && from < *end) {
        return;
    }
    let parts = std::mem::take(left).into_iter().flat_map(|(start, end)| {
        let before = (start, end.min(from));
        let behind = (start.max(to), end);
        [before, behind].into_iter().filter(|(s, e)| s < e)
    });
    *left = parts.collect();
}

/// Records of a damaged segment whose payload cannot be read.
fn lost_records(segment: &StoredSegment, entries: &[RunEntry]) -> Vec<RunEntry> {
    let writes = entries
        .iter()
        .filter(|entry| entry.kind == varve_format::RecordKind::Write as u8);
    let Ok(file) = SegmentFile::open(segment) else {
        return writes.copied().collect();
    };
    let mut source = SegmentBytes::new(&file);
    let is_lost = |entry: &&RunEntry| is_damaged(segment, &mut source, entry);
    writes.filter(is_lost).copied().collect()
}

/// What is wrong with the run of a segment that is whole.
fn run_is_wrong(segment: &StoredSegment, entries: &[RunEntry]) -> Option<String> {
    let path = segment.run_path();
    match run_file::read_entries(segment).and_then(|run| Ok((run, run_file::read_head(&path)?))) {
        Ok((run, _)) if run == entries => None,
        Ok(_) => Some(format!(
            "{}: it says something else than its segment",
            path.display()
        )),
        Err(error) => Some(error.to_string()),
    }
}

/// What is wrong with a segment that is not unpacked.
enum Wrong {
    Nothing,
    /// Records are lost, and only its key can tell which.
    Locked(String),
    /// Nothing of what it holds is lost.
    Elsewhere(String),
    /// Unpacked, it tells what is lost.
    Readable(String),
}

/// What the segment before says.
struct Follows {
    lsn_end: Lsn,
    next: bool,
    hash: Option<Hash128>,
}

/// Reads a segment from one end to the other. Gives the hash of its last batch and what its run must be, or what is wrong.
fn whole(
    segment: &StoredSegment,
    previous: Option<Follows>,
) -> Result<(Hash128, Vec<RunEntry>), String> {
    let path = segment.path();
    let file = SegmentFile::open(segment).map_err(|error| error.to_string())?;
    let mut source = Hashing {
        source: SegmentBytes::new(&file),
        hasher: blake3::Hasher::new(),
        hashed: 0,
    };
    let (header, entries, hash) =
        run_file::index_with_hash(&path, &mut source as &mut dyn ReadAt, segment.data_bytes)
            .map_err(|error| error.to_string())?;
    let root = *source.hasher.finalize().as_bytes();
    if source.hashed != segment.data_bytes || root != segment.root {
        return Err("its bytes do not have the root that they were sealed with".to_owned());
    }
    if let Some(before) = previous {
        if before.next && before.lsn_end.0 != header.previous_lsn_end.get() {
            return Err(format!(
                "it says that history ended at LSN {} before it, the segment before ends at {}",
                header.previous_lsn_end.get(),
                before.lsn_end
            ));
        }
        if before.next
            && before
                .hash
                .is_some_and(|hash| hash != header.previous_hash())
        {
            return Err("it does not follow the segment before it".to_owned());
        }
    }
    Ok((hash, entries))
}

/// Hashes what is read one behind the other.
struct Hashing<'a> {
    source: SegmentBytes<'a>,
    hasher: blake3::Hasher,
    hashed: u64,
}

impl ReadAt for Hashing<'_> {
    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        self.source.read_at(offset, bytes)?;
        if offset == self.hashed {
            self.hasher.update(bytes);
            self.hashed += bytes.len() as u64;
        }
        Ok(())
    }
}

/// A map's head, and every page of it.
fn check_map(map: &MapPlace) -> Result<(), StoreError> {
    let mut cursor = MapCursor::new(Arc::new(map.open()?));
    while cursor.advance()?.is_some() {}
    Ok(())
}
