//! The files of one volume's history: opened, locked, listed. In memory there is what the runs say of their segments, and which maps there are; no
//! records.
//!
//! A run is what the store believes: if it is damaged it is made again from its segment, and if the segment is damaged its run still says what it
//! held, so that exactly that cannot be read. Only where both are lost history has a hole.

use crate::kept::KeptInstants;
use crate::key_list::KeyNames;
use crate::maps::Maps;
use crate::prune::Looked;
use crate::segment::{run_path, segment_path};
use crate::segment_file::SegmentFile;
use crate::{Nearest, Outside, StoreError, StoredSegment, Timeline, VolumeKeys, durable, run_file};
use nix::fcntl::{Flock, FlockArg};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use varve_format::{EpochId, FormatError, Lsn, RunHeader, SegmentSequence, VolumeId, WallTime};

/// Segments by number. Images that are open share it; it is copied when it changes while they do.
pub(crate) type Segments = Arc<BTreeMap<SegmentSequence, Arc<StoredSegment>>>;

type OpenInstants = Arc<Mutex<BTreeMap<Lsn, usize>>>;

/// While it is there its instant is kept.
pub(crate) struct InstantLease {
    open: OpenInstants,
    lsn: Lsn,
    _lease: Arc<()>,
}

impl Drop for InstantLease {
    fn drop(&mut self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.lsn) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.lsn);
            }
        }
    }
}

/// One volume's history.
pub struct VolumeStore {
    directory: Arc<Path>,
    /// What segments may be encrypted with.
    keys: Arc<VolumeKeys>,
    pub(crate) used_keys: KeyNames,
    /// Names of points that were asked for.
    pub(crate) point_names: Mutex<BTreeMap<Lsn, String>>,
    /// A segment whose run is lost cannot be read before its key is there.
    waits_for_key: bool,
    /// A segment and its run are there, and could not be read, or a newer version wrote them.
    unread: BTreeSet<SegmentSequence>,
    volume: VolumeId,
    segments: Segments,
    pub(crate) maps: Maps,
    timeline: Timeline,
    damaged: Vec<String>,
    pub(crate) healed: Vec<String>,
    /// Images that are open hold one, too.
    in_use: Arc<()>,
    /// LSNs of images that are open, and how many of each.
    open: OpenInstants,
    /// The store's own clock, if who opened it has told.
    pub(crate) now: Option<WallTime>,
    /// Segments that pruning has looked at, and left as they are.
    pub(crate) looked: Looked,
    /// The two lists of kept instants may not say the same: nothing is pruned by one that the other would take back.
    pub(crate) lists_differ: bool,
    /// Both lists are there, or were, and neither can be read: nothing is struck, pinned or pruned by what is not known.
    pub(crate) kept_is_lost: bool,
    /// What the first segment that this store ever had went on from.
    began: Option<Lsn>,
    _lock: Flock<File>,
}

/// Segments in the midst of an epoch that are not of it, and that epoch. Epochs never come back.
fn foreign(
    segments: &BTreeMap<SegmentSequence, Arc<StoredSegment>>,
) -> Vec<(SegmentSequence, EpochId)> {
    let last_of: HashMap<EpochId, SegmentSequence> = segments
        .iter()
        .map(|(sequence, segment)| (segment.epoch, *sequence))
        .collect();
    let mut found = Vec::new();
    let mut around: Option<(EpochId, SegmentSequence)> = None;
    for (sequence, segment) in segments {
        match around {
            Some((epoch, last)) if *sequence < last && segment.epoch != epoch => {
                found.push((*sequence, epoch));
            }
            Some((epoch, last)) if *sequence <= last && segment.epoch == epoch => {}
            _ => {
                around = last_of
                    .get(&segment.epoch)
                    .map(|last| (segment.epoch, *last))
            }
        }
    }
    found
}

impl VolumeStore {
    /// Opens (or makes) a volume's history under `root`. A damaged file is set aside in [`VolumeStore::damaged`]; the rest stays readable.
    pub fn open(root: &Path, volume: VolumeId) -> Result<VolumeStore, StoreError> {
        VolumeStore::open_with(root, volume, Arc::default())
    }

    /// The same with a volume's keys.
    pub fn open_with(
        root: &Path,
        volume: VolumeId,
        keys: Arc<VolumeKeys>,
    ) -> Result<VolumeStore, StoreError> {
        let directory: Arc<Path> = volume_directory(root, volume).into();
        let parts = ["segments", "runs", "maps"].map(|part| directory.join(part));
        let above = directory.ancestors().skip(1).take(1);
        let folders = above.chain([&*directory]).chain(parts.iter().map(|p| &**p));
        for folder in folders {
            durable::private_directory(folder).map_err(StoreError::io(folder))?;
        }
        let lock_path = directory.join("lock");
        if !lock_path.exists() {
            drop(durable::begin(&lock_path)?);
        }
        // Not for writing: that would keep the file system from being remounted read-only.
        let file = File::open(&lock_path).map_err(StoreError::io(&lock_path))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|_| StoreError::Locked(directory.to_path_buf()))?;
        let mut store = VolumeStore {
            maps: Maps::new(&directory, volume),
            used_keys: KeyNames::new(),
            waits_for_key: false,
            unread: BTreeSet::new(),
            point_names: Mutex::default(),
            directory,
            keys,
            volume,
            segments: Segments::default(),
            timeline: Timeline::default(),
            damaged: Vec::new(),
            healed: Vec::new(),
            in_use: Arc::new(()),
            open: OpenInstants::default(),
            now: None,
            looked: Looked::new(),
            lists_differ: false,
            kept_is_lost: false,
            began: None,
            _lock: lock,
        };
        store.load()?;
        Ok(store)
    }

    fn load(&mut self) -> Result<(), StoreError> {
        let (mut sequences, mut newest) = (BTreeSet::new(), None);
        for (part, ending) in [("segments", "seg"), ("runs", "run")] {
            for path in durable::list(&self.directory.join(part))? {
                match sequence_of(&path, ending) {
                    None if sequence_of(&path, LOST_RUN).is_some() => {}
                    Some(sequence) => {
                        sequences.insert(sequence);
                        if part == "segments" {
                            newest = newest.max(Some(sequence));
                        }
                    }
                    None => self.damaged.push(format!(
                        "{} is not a file of this store; it is left alone",
                        path.display()
                    )),
                }
            }
        }
        // A run behind the newest segment: its segment was lost. If it is still in the log, it is taken again.
        let (mut segments, mut lost_runs) = (BTreeMap::new(), BTreeSet::new());
        for sequence in sequences {
            if Some(sequence) > newest {
                // Under its name it would later stand for a segment that maps were made without.
                let run = run_path(&self.directory, sequence);
                let lost = run.with_extension(LOST_RUN);
                let renamed = std::fs::rename(&run, &lost);
                lost_runs.insert(renamed.map_or(run, |()| lost));
                continue;
            }
            match self.load_segment(sequence) {
                Ok(segment) => {
                    segments.insert(sequence, Arc::new(segment));
                }
                Err(error) => {
                    self.waits_for_key |= error.wants_key();
                    let mut what = error.to_string();
                    if may_be_whole(&error) {
                        self.unread.insert(sequence);
                        what += ". It may be whole: nothing is pruned meanwhile, and it is tried again. If its disk fails: varve salvage. If it is to be given up: \
                                 move that file away";
                    }
                    self.damaged.push(what);
                }
            }
        }
        for (sequence, of) in foreign(&segments) {
            segments.remove(&sequence);
            self.damaged.push(format!(
                "{} is of another epoch than what is before and behind it ({of}): it was recorded by another machine, or is a file of another store. It is left alone",
                segment_path(&self.directory, sequence).display()
            ));
        }
        self.segments = Arc::new(segments);
        for path in durable::list(&self.directory.join("runs"))? {
            if sequence_of(&path, LOST_RUN).is_some() {
                lost_runs.insert(path);
            }
        }
        lost_runs.iter().for_each(|path| self.load_lost_run(path));
        self.load_used_keys();
        let (there, unread) = (Arc::clone(&self.segments), self.unread.clone());
        let count = |places: std::ops::Range<u64>| {
            let places = SegmentSequence(places.start)..SegmentSequence(places.end);
            (there.range(places.clone()).count() + unread.range(places).count()) as u64
        };
        // What waits for its key has not gone: maps that cover it stay.
        if !self.waits_for_key {
            self.maps.load(count, &mut self.healed)?;
        }
        self.timeline = Timeline::of(self.segments());
        if self.refuse_without_key(Lsn(u64::MAX)).is_err() {
            self.keys.lock_if_off();
        }
        self.load_kept();
        let noted = std::fs::read_to_string(self.directory.join(BEGAN));
        self.began = noted
            .ok()
            .and_then(|text| text.trim().parse().ok().map(Lsn));
        let first = self.segments().next().map(|first| first.previous_lsn_end);
        self.note_beginning(first);
        Ok(())
    }

    /// Notes where the history begins, once: so a beginning that is lost later is told from one that there never was.
    fn note_beginning(&mut self, first: Option<Lsn>) {
        // While a part of it is not known it may begin before what is.
        let Some(first) = first.filter(|_| self.began.is_none() && !self.is_partly_unknown())
        else {
            return;
        };
        let path = self.directory.join(BEGAN);
        let noted = durable::create(&path, |file| {
            writeln!(file, "{first}").map_err(StoreError::io(&path))
        });
        // What could not be noted is noted when it is opened again.
        if noted.is_ok() {
            self.began = Some(first);
        }
    }

    /// What the first segment that this store ever had went on from.
    pub(crate) fn began(&self) -> Lsn {
        let first = self.segments().next().map(|first| first.previous_lsn_end);
        self.began.or(first).unwrap_or(Lsn::FIRST)
    }

    /// The run of a segment that was lost when it was the newest: what that held is said, until the log has given it again.
    fn load_lost_run(&mut self, path: &Path) {
        let Some(sequence) = sequence_of(path, LOST_RUN).or_else(|| sequence_of(path, "run"))
        else {
            return;
        };
        let head = run_file::read_head(path).ok();
        let told = head.map(|(head, _)| (head.lsn_start(), Lsn(head.lsn_end.get())));
        let again = |(start, end): (Lsn, Lsn)| {
            self.segment(sequence)
                .is_some_and(|segment| segment.lsn_start == start && segment.lsn_end == end)
        };
        if told.is_some_and(again) {
            let _ = std::fs::remove_file(path);
            return;
        }
        let held = told.map_or_else(
            || "what it held is not known".to_owned(),
            |(start, end)| format!("the history from LSN {start} to {end} was in it"),
        );
        self.damaged.push(format!(
            "{}, the last one there was then: {held} ({} says which blocks)",
            is_lost(&segment_path(&self.directory, sequence)),
            path.display()
        ));
    }

    fn load_kept(&mut self) {
        let (kept, mut problems) = KeptInstants::load(&self.directory, self.volume);
        // The two say the same again before anything is pruned by what one of them says.
        if let Some(kept) = kept.as_ref().filter(|_| !problems.is_empty())
            && let Err(error) = kept.write(&self.directory, self.volume)
        {
            self.lists_differ = true;
            problems.push(error.to_string());
        }
        // What the segments were pruned for: behind the last of these everything resolves, whatever the lists say.
        let pruned = self.segments().filter(|segment| segment.pruned_for != 0);
        let until = pruned.map(|segment| segment.pruned_until).max();
        let until = until.unwrap_or(Lsn(0));
        let mut kept = match kept {
            Some(kept) => {
                self.healed.extend(problems.iter().map(|why| {
                    format!(
                        "{why}. The other list of kept instants is whole, and was written in its place"
                    )
                }));
                kept
            }
            None => {
                self.kept_is_lost = !problems.is_empty();
                KeptInstants::default()
            }
        };
        if until > kept.below {
            self.kept_is_lost = true;
            kept = KeptInstants {
                below: until,
                below_time: self.time_of(until).unwrap_or(WallTime(i64::MIN)),
                entries: Vec::new(),
            };
        }
        if self.kept_is_lost {
            let why = problems.join("; ");
            self.damaged.push(self.lost_kept(kept.below, &why));
        }
        self.timeline.set_kept(Arc::new(kept));
    }

    fn lost_kept(&self, below: Lsn, why: &str) -> String {
        let lost = StoreError::KeptLost(self.directory.join("kept"));
        let why = match why {
            "" => String::new(),
            why => format!(" ({why})"),
        };
        match below {
            Lsn(0) => format!("{lost}{why}"),
            below => format!(
                "{lost}{why}. Until then nothing below LSN {below} resolves, though what was kept of it is there"
            ),
        }
    }

    /// Gives up the instants of lists that are lost, durably: from now on what only they needed may go. Says whether there was anything to give up.
    pub fn give_up_kept(&mut self) -> Result<bool, StoreError> {
        if !std::mem::take(&mut self.kept_is_lost) {
            return Ok(false);
        }
        let kept = (**self.kept()).clone();
        self.set_kept(kept)
            .inspect_err(|_| self.kept_is_lost = true)?;
        let told = StoreError::KeptLost(self.directory.join("kept")).to_string();
        self.damaged.retain(|what| !what.starts_with(&told));
        Ok(true)
    }

    fn load_segment(&mut self, sequence: SegmentSequence) -> Result<StoredSegment, StoreError> {
        let path = segment_path(&self.directory, sequence);
        let run = run_path(&self.directory, sequence);
        let stored_bytes = std::fs::metadata(&path).map(|found| found.len());
        let (head, events) = match run_file::read_head(&run) {
            Ok(found) if found.0.volume == self.volume.0 && found.0.sequence() == sequence => {
                // Half a segment is noticed here; what else may be wrong with it when it is read.
                if let Err(error) = &stored_bytes {
                    let what = format!("{}: {error}. What it held cannot be read", path.display());
                    self.damaged.push(what);
                }
                found
            }
            // Lost, damaged or another one's: the segment itself has everything. What a newer version wrote stays as it is.
            found => {
                let is_newer = matches!(
                    &found,
                    Err(StoreError::Damaged(_, FormatError::Newer { .. }))
                );
                let file = SegmentFile::open_path(&path, &self.keys)?;
                let footer = *file.footer();
                if footer.volume != self.volume.0 || file.sequence() != sequence {
                    let error = FormatError::Foreign("segment of another volume or place");
                    return Err(StoreError::Damaged(path, error));
                }
                let (mut head, entries, events) = run_file::of_segment(&file)?;
                if head.stored_at.get() == 0 {
                    // When it was written last: it may seem younger than it is, not older.
                    head.stored_at = modified_ns(&path).into();
                }
                if is_newer {
                    self.healed.push(format!(
                        "{}: a newer version wrote it. It is done without",
                        run.display()
                    ));
                } else if let Err(error) = run_file::write(&run, &head, &entries, &events) {
                    self.healed.push(format!("{error}. It is done without"));
                }
                (head, events)
            }
        };
        Ok(StoredSegment::new(
            (&self.directory, &self.keys),
            &head,
            events,
            stored_bytes.unwrap_or(0),
        ))
    }

    /// Gives a proved segment file its place, once its key is listed. If that fails, what has no name yet does not stay: on a full disk it would keep it full.
    pub(crate) fn name_proved(&mut self, new: &Path, path: &Path) -> Result<(), StoreError> {
        let named = self
            .note_key_of(new)
            .and_then(|()| durable::name(new, path));
        named.inspect_err(|_| {
            let _ = std::fs::remove_file(new);
        })
    }

    pub(crate) fn add(&mut self, segment: StoredSegment) {
        // One that was lost, and that the log has given again.
        let lost = segment.run_path().with_extension(LOST_RUN);
        let same = |(head, _): (RunHeader, _)| {
            head.lsn_start() == segment.lsn_start && head.lsn_end.get() == segment.lsn_end.0
        };
        if run_file::read_head(&lost).is_ok_and(same) && std::fs::remove_file(lost).is_ok() {
            let told = is_lost(&segment.path());
            self.damaged.retain(|what| !what.starts_with(&told));
        }
        self.note_beginning(Some(segment.previous_lsn_end));
        self.timeline.add(&segment);
        Arc::make_mut(&mut self.segments).insert(segment.sequence, Arc::new(segment));
    }

    /// Notes that a segment was pruned.
    pub(crate) fn pruned(&mut self, segment: StoredSegment) {
        Arc::make_mut(&mut self.segments).insert(segment.sequence, Arc::new(segment));
    }

    /// Notes the new size of a segment whose file was replaced.
    pub(crate) fn replaced(&mut self, sequence: SegmentSequence, stored_bytes: u64) {
        if let Some(segment) = Arc::make_mut(&mut self.segments).get_mut(&sequence) {
            let segment = Arc::make_mut(segment);
            segment.stored_bytes = stored_bytes;
            segment.settled = true;
        }
    }

    pub(crate) fn directory(&self) -> &Arc<Path> {
        &self.directory
    }

    /// The volume.
    #[must_use]
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// Segments in the order of their sequence.
    pub fn segments(&self) -> impl DoubleEndedIterator<Item = &StoredSegment> {
        self.segments.values().map(|segment| &**segment)
    }

    /// All of them, as they are now.
    pub(crate) fn shared_segments(&self) -> Segments {
        Arc::clone(&self.segments)
    }

    /// A segment by its number.
    pub(crate) fn segment(&self, sequence: SegmentSequence) -> Option<&Arc<StoredSegment>> {
        self.segments.get(&sequence)
    }

    /// Segments with these numbers.
    pub(crate) fn segments_in(
        &self,
        sequences: std::ops::Range<u64>,
    ) -> impl DoubleEndedIterator<Item = &StoredSegment> {
        let range = SegmentSequence(sequences.start)..SegmentSequence(sequences.end);
        self.segments.range(range).map(|(_, segment)| &**segment)
    }

    /// The newest segment.
    #[must_use]
    pub fn newest(&self) -> Option<SegmentSequence> {
        self.segments.keys().next_back().copied()
    }

    /// Spans, gaps, points, instants.
    #[must_use]
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// Files that could not be read, in words.
    #[must_use]
    pub fn damaged(&self) -> &[String] {
        &self.damaged
    }

    /// What was not as it should be when the store was opened, and is made good by itself; in words.
    #[must_use]
    pub fn healed(&self) -> &[String] {
        &self.healed
    }

    /// Bytes of all files: segments, runs, maps.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        let entry = varve_format::RUN_ENTRY_BYTES as u64;
        let segment = |segment: &StoredSegment| {
            let entries = segment.entry_count + segment.events.len() as u64;
            segment.stored_bytes + varve_format::BLOCK_BYTES + entries * entry
        };
        self.segments().map(segment).sum::<u64>() + self.maps.stored_bytes()
    }

    /// Bytes of the segments that are not compressed yet.
    #[must_use]
    pub fn unsettled_bytes(&self) -> u64 {
        let sealed = self.segments().filter(|segment| !segment.settled);
        sealed.map(|segment| segment.stored_bytes).sum()
    }

    /// Whether images of this history are open.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        Arc::strong_count(&self.in_use) > 1
    }

    pub(crate) fn lease(&self) -> Arc<()> {
        Arc::clone(&self.in_use)
    }

    pub(crate) fn lease_at(&self, lsn: Lsn) -> InstantLease {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        *open.entry(lsn).or_default() += 1;
        InstantLease {
            open: Arc::clone(&self.open),
            lsn,
            _lease: self.lease(),
        }
    }

    /// Instants that images are open at.
    pub(crate) fn open_instants(&self) -> Vec<Lsn> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.keys().copied().collect()
    }

    /// Tells the time of the store's own clock: what is taken from now on ages by it.
    pub fn set_now(&mut self, now: WallTime) {
        self.now = Some(now);
    }

    /// What retention has left.
    #[must_use]
    pub fn kept(&self) -> &Arc<KeptInstants> {
        self.timeline.kept()
    }

    /// Puts another list into its place, durably.
    pub(crate) fn set_kept(&mut self, kept: KeptInstants) -> Result<(), StoreError> {
        if self.kept_is_lost {
            return Err(StoreError::KeptLost(self.directory.join("kept")));
        }
        kept.write(&self.directory, self.volume)?;
        self.lists_differ = false;
        self.point_names
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|lsn, _| kept.resolves(*lsn));
        self.timeline.set_kept(Arc::new(kept));
        Ok(())
    }

    /// Size of the volume at `lsn` and its logical sector, in bytes: they change only where a new epoch begins, with a segment of its own.
    #[must_use]
    pub fn shape(&self, lsn: Lsn) -> (u64, u32) {
        let newest = self
            .segments()
            .rev()
            .find(|segment| segment.lsn_start < lsn);
        newest
            .or_else(|| self.segments().next())
            .map_or((0, 512), |segment| {
                (segment.volume_bytes, segment.sector_bytes)
            })
    }

    /// Time of the last record below `lsn`; of the first one if there is none.
    pub fn time_of(&self, lsn: Lsn) -> Result<WallTime, StoreError> {
        // Records that would tell may be pruned.
        if let Some(kept) = self.kept().get(lsn) {
            return Ok(kept.time());
        }
        if lsn == self.kept().below && lsn > Lsn(0) {
            return Ok(self.kept().below_time);
        }
        let told = |segment: &&StoredSegment| segment.entry_count > 0;
        let mut below = self.segments().rev().filter(told);
        let Some(segment) = below.find(|segment| segment.lsn_start < lsn) else {
            let first = self.segments().find(told);
            return Ok(first.map_or(WallTime(0), |segment| segment.time_start));
        };
        if segment.lsn_end <= lsn {
            return Ok(segment.time_end);
        }
        let entries = segment.entries()?;
        let index = entries.partition_point(|entry| entry.lsn() < lsn);
        // The first record of a segment may have none before it here: then the segment before tells.
        match index.checked_sub(1) {
            Some(index) => Ok(entries[index].time()),
            None => Ok(below
                .next()
                .map_or(segment.time_start, |before| before.time_end)),
        }
    }

    /// The LSN whose image holds every record up to `time`.
    pub fn at_time(&self, time: WallTime) -> Result<Lsn, StoreError> {
        if time < self.kept().below_time {
            let kept = self.kept().at_time(time);
            return Ok(kept.map_or(Lsn(0), varve_format::KeptEntry::lsn));
        }
        // Times never run backwards within an epoch; where the clock was set back between two, the later record counts.
        let newest = self
            .segments()
            .rev()
            .find(|segment| segment.entry_count > 0 && segment.time_start <= time);
        let Some(segment) = newest else {
            return Ok(Lsn(0));
        };
        if segment.time_end <= time {
            return Ok(segment.lsn_end);
        }
        let entries = segment.entries()?;
        let last = entries.iter().rev().find(|entry| entry.time() <= time);
        Ok(last.map_or(segment.lsn_start, |entry| entry.lsn().plus(1)))
    }

    /// Whether `lsn` resolves; if not, what does.
    pub fn check(&self, lsn: Lsn) -> Result<Result<Lsn, Nearest>, StoreError> {
        match self.timeline.check(lsn) {
            Ok(lsn) => Ok(Ok(lsn)),
            Err(outside) => Ok(Err(self.with_times(&outside)?)),
        }
    }

    /// Whether single writes are missing at `time`: the gap around it, with the nearest instants on both sides.
    pub fn gap_at(&self, time: WallTime) -> Result<Option<Nearest>, StoreError> {
        let Some((since, after)) = self.timeline.gap_at(time) else {
            return Ok(None);
        };
        let resolves = |lsn: &Lsn| self.timeline.check(*lsn).is_ok();
        let outside = Outside {
            before: Some(self.at_time(since)?).filter(resolves),
            after: Some(after).filter(resolves),
            reason: None,
            pruned: false,
        };
        self.with_times(&outside).map(Some)
    }

    /// Whether retention has pruned the instant at `time`: the nearest on both sides that are left.
    pub fn pruned_at(&self, time: WallTime) -> Result<Option<Nearest>, StoreError> {
        let kept = self.kept();
        let before = kept.at_time(time);
        // Where the store's clock lags behind the machine's, times behind the limit's belong to records below it, too.
        let is_behind = time >= kept.below_time && self.at_time(time)? >= kept.below;
        if is_behind || before.is_some_and(|before| before.time() == time) {
            return Ok(None);
        }
        let (_, after) = kept.around(before.map_or(Lsn(0), |before| before.lsn().plus(1)));
        let outside = Outside {
            before: before.map(varve_format::KeptEntry::lsn),
            after: Some(after),
            reason: None,
            pruned: true,
        };
        self.with_times(&outside).map(Some)
    }

    fn with_times(&self, outside: &Outside) -> Result<Nearest, StoreError> {
        let with_time = |lsn: Option<Lsn>| {
            lsn.map(|lsn| self.time_of(lsn).map(|time| (lsn, time)))
                .transpose()
        };
        Ok(Nearest {
            before: with_time(outside.before)?,
            after: with_time(outside.after)?,
            reason: outside.reason,
            pruned: outside.pruned,
        })
    }

    /// Its segments, to be looked at without the store.
    #[must_use]
    pub fn shared_list(&self) -> Vec<Arc<StoredSegment>> {
        self.segments.values().cloned().collect()
    }

    /// Whether a part of it is not known before its key is there: nothing must be concluded from what it lacks. It is opened anew then.
    #[must_use]
    pub fn waits_for_key(&self) -> bool {
        self.waits_for_key
    }

    /// Whether a part of it could not be read and may be whole, for whatever reason: nothing is struck by what is not known, and it is opened anew.
    #[must_use]
    pub fn is_partly_unknown(&self) -> bool {
        self.waits_for_key || !self.unread.is_empty()
    }

    /// When its oldest instant may have been: the beginning of time, if what is not known may lie before all that is.
    #[must_use]
    pub fn oldest_time(&self) -> WallTime {
        let first = self.segments().next();
        let unread = self.unread.first();
        match first {
            Some(first)
                if unread.is_none_or(|unread| first.sequence < *unread) && !self.waits_for_key =>
            {
                first.time_start
            }
            _ => WallTime(i64::MIN),
        }
    }

    /// Whether the lists of kept instants are lost: nothing of them is decided before somebody has.
    #[must_use]
    pub fn kept_is_lost(&self) -> bool {
        self.kept_is_lost
    }

    pub(crate) fn keys(&self) -> &Arc<VolumeKeys> {
        &self.keys
    }
}

/// No history has as many segments.
const SEQUENCES: u64 = 1 << 60;

fn modified_ns(path: &Path) -> i64 {
    let modified = std::fs::metadata(path).and_then(|found| found.modified());
    let since = modified
        .ok()
        .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    since.map_or(i64::MAX, |since| since.as_nanos() as i64)
}

/// Whether a file that could not be opened may be well: its disk did not answer, or a newer version wrote it.
fn may_be_whole(error: &StoreError) -> bool {
    match error {
        StoreError::Io(_, error) => !matches!(
            error.kind(),
            std::io::ErrorKind::NotFound | std::io::ErrorKind::UnexpectedEof
        ),
        StoreError::Damaged(_, error) => matches!(error, FormatError::Newer { .. }),
        _ => false,
    }
}

fn is_lost(path: &Path) -> String {
    format!("{} is lost", path.display())
}

/// The file that says where the history begins: an LSN.
const BEGAN: &str = "began";
/// What a run is called whose segment, the newest one, was lost.
const LOST_RUN: &str = "lost-run";

fn sequence_of(path: &Path, ending: &str) -> Option<SegmentSequence> {
    let known = path.extension().is_some_and(|found| found == ending);
    let name = path.file_stem()?.to_str()?;
    let sequence = name.parse().ok().map(SegmentSequence)?;
    // Only as it is written here: two names of one number would be two segments.
    (known && name.len() == 20 && sequence.0 < SEQUENCES).then_some(sequence)
}

/// Where the history of a volume lies under a store's root.
#[must_use]
pub fn volume_directory(root: &Path, volume: VolumeId) -> PathBuf {
    root.join("volumes").join(volume.to_string())
}
