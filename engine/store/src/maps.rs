//! Which maps there are, which are to be made, and which an image asks.
//!
//!   level 2  [      0 … 63       ]
//!   level 1  [ 0 … 7 ][ 8 … 15 ]…            [ 64 … 71 ]
//!   segments                                              72  73  74 (part)
//!
//! An image below the cut in segment 74 asks: 74 up to the cut, 73, 72 (replayed), then the maps 64…71 and 0…63. So at most seven segments and a part
//! are replayed, and at most seven maps of each level are asked: the number of levels is the logarithm of the history's length.
//! A group gets its map when a segment behind it is there: then none of its segments can still come.

use crate::cache::Cache;
use crate::map_file::{MapCursor, MapFile, Shared, read_head};
use crate::map_merge::{MapIdentity, write_merged, write_replay};
use crate::replay::Replay;
use crate::{StoreError, StoredSegment, VolumeStore, durable};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use varve_format::{Lsn, MAP_FAN, VolumeId, map_tag};

/// Pages of maps that are kept in memory: 1024 × 16 KiB = 16 MiB for each volume.
const PAGES_KEPT: usize = 1024;
/// Levels that there can be: 8^21 segments are more than 64 bits of sequence number.
const LEVEL_MAX: u32 = 20;

/// Maps that are kept open. An image keeps those that it asks open by itself.
const MAPS_KEPT: usize = 32;

/// A map on disk.
#[derive(Clone, Copy, Debug)]
struct Known {
    bytes: u64,
}

/// The maps of a volume: which there are. They are opened when they are asked.
pub(crate) struct Maps {
    directory: PathBuf,
    shared: Arc<Shared>,
    /// By level and group.
    known: BTreeMap<(u32, u64), Known>,
    open: Cache<(u32, u64), Arc<MapFile>>,
    /// Those that cannot be made until the store is opened again.
    given_up: BTreeSet<(u32, u64)>,
}

/// Where a map is, for who reads all of them.
#[derive(Clone)]
pub(crate) struct MapPlace {
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    tag: u64,
    shared: Arc<Shared>,
}

impl MapPlace {
    pub(crate) fn open(&self) -> Result<MapFile, StoreError> {
        MapFile::open(&self.path, self.tag, &self.shared)
    }
}

/// A layer of an image.
pub(crate) enum Layer {
    /// Segments that no map covers.
    Replayed(Replay),
    /// A group of them.
    Map(Arc<MapFile>),
}

impl Layer {
    /// Adds what it has of `[start, end)` to `found`, clipped, in order.
    pub(crate) fn find(
        &self,
        start: u64,
        end: u64,
        found: &mut Vec<varve_format::MapExtent>,
    ) -> Result<(), StoreError> {
        match self {
            Layer::Replayed(replay) => {
                replay.find(start, end, found);
                Ok(())
            }
            Layer::Map(map) => map.find(start, end, found),
        }
    }
}

/// Segments of a group.
fn span(level: u32) -> u64 {
    MAP_FAN.pow(level)
}

impl Maps {
    pub(crate) fn new(directory: &Path, volume: VolumeId) -> Maps {
        Maps {
            directory: directory.join("maps"),
            shared: Shared::new(volume, PAGES_KEPT),
            known: BTreeMap::new(),
            open: Cache::new(MAPS_KEPT),
            given_up: BTreeSet::new(),
        }
    }

    fn path(&self, level: u32, group: u64) -> PathBuf {
        self.directory.join(format!("{level:02}-{group:020}.map"))
    }

    /// Finds what is there. A map that is damaged, or was made of other segments than there are in its group, is removed: it is made again. What it was
    /// is said in `healed`. One that cannot be read now is left alone, and not used.
    pub(crate) fn load(
        &mut self,
        segments_of: impl Fn(Range<u64>) -> u64,
        healed: &mut Vec<String>,
    ) -> Result<(), StoreError> {
        for path in durable::list(&self.directory)? {
            let name = path.file_stem().and_then(|name| name.to_str());
            let parts = name.and_then(|name| name.split_once('-'));
            let numbers = parts.and_then(|(l, g)| Some((l.parse().ok()?, g.parse().ok()?)));
            let ours = |(level, group): &(u32, u64)| {
                (1..=LEVEL_MAX).contains(level)
                    && *group < u64::MAX / span(*level)
                    && path == self.path(*level, *group)
            };
            let Some((level, group)) = numbers.filter(ours) else {
                continue;
            };
            let places = group * span(level)..(group + 1) * span(level);
            let why = match self.note(level, group) {
                Ok(count) if count == segments_of(places) => continue,
                Ok(_) => format!("{}: segments have come or gone since", path.display()),
                Err(StoreError::Damaged(path, why)) => format!("{}: {why}", path.display()),
                Err(error) => {
                    healed.push(format!("{error}. It is not used"));
                    continue;
                }
            };
            healed.push(format!("{why}. It is made again"));
            self.discard(level, group);
        }
        Ok(())
    }

    /// Takes a map into use; gives the number of its segments.
    fn note(&mut self, level: u32, group: u64) -> Result<u64, StoreError> {
        let path = self.path(level, group);
        let (_, header, bytes) = read_head(&path, self.shared.volume, map_tag(level, group))?;
        self.known.insert((level, group), Known { bytes });
        self.open.forget(&(level, group));
        self.shared.trust(map_tag(level, group));
        Ok(header.segment_count.get())
    }

    fn discard(&mut self, level: u32, group: u64) {
        self.known.remove(&(level, group));
        self.open.forget(&(level, group));
        let _ = std::fs::remove_file(self.path(level, group));
    }

    /// Whether a map is there, and trusted.
    fn has(&self, level: u32, group: u64) -> bool {
        self.known.contains_key(&(level, group)) && !self.shared.is_suspect(map_tag(level, group))
    }

    /// Opens a map. One that turns out to be damaged is not there from then on.
    fn get(&self, level: u32, group: u64) -> Option<Arc<MapFile>> {
        if !self.has(level, group) {
            return None;
        }
        let tag = map_tag(level, group);
        let open = || MapFile::open(&self.path(level, group), tag, &self.shared).map(Arc::new);
        let opened = self.open.get((level, group), open);
        opened.inspect_err(|_| self.shared.suspect(tag)).ok()
    }

    pub(crate) fn stored_bytes(&self) -> u64 {
        self.known.values().map(|map| map.bytes).sum()
    }

    pub(crate) fn all(&self) -> Vec<MapPlace> {
        let place = |(&(level, group), known): (&(u32, u64), &Known)| MapPlace {
            path: self.path(level, group),
            bytes: known.bytes,
            tag: map_tag(level, group),
            shared: Arc::clone(&self.shared),
        };
        self.known.iter().map(place).collect()
    }

    /// Gives up maps that turned out to be damaged.
    pub(crate) fn discard_all(&mut self, paths: &[PathBuf]) {
        let damaged = |&&(level, group): &&(u32, u64)| paths.contains(&self.path(level, group));
        let keys: Vec<(u32, u64)> = self.known.keys().filter(damaged).copied().collect();
        keys.into_iter()
            .for_each(|(level, group)| self.discard(level, group));
    }
}

/// A map to be made. It needs no lock of the store: what it reads never changes.
pub struct MapJob {
    identity: MapIdentity,
    path: PathBuf,
    segments: Vec<Arc<StoredSegment>>,
    maps: Vec<Arc<MapFile>>,
    /// While it is there, nobody deletes the history.
    _lease: Arc<()>,
}

impl MapJob {
    /// Makes it.
    pub fn run(&self) -> Result<(), StoreError> {
        if self.maps.is_empty() {
            let segments = self.segments.iter().map(|segment| &**segment);
            let replay = Replay::of(segments, Lsn(0), Lsn(u64::MAX))?;
            return write_replay(&self.path, &self.identity, &replay);
        }
        let cursors = self.maps.iter().map(|map| MapCursor::new(Arc::clone(map)));
        write_merged(&self.path, &self.identity, cursors.collect())
    }

    /// Whether a path is the map's that it makes.
    #[must_use]
    pub fn writes(&self, path: &Path) -> bool {
        path == self.path || path == durable::unfinished(&self.path)
    }

    /// Whether it is made of smaller maps.
    #[must_use]
    pub fn reads_maps(&self) -> bool {
        !self.maps.is_empty()
    }

    /// Bytes that are read for it, about.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let entry = varve_format::RUN_ENTRY_BYTES as u64;
        let runs = self
            .segments
            .iter()
            .map(|segment| segment.entry_count * entry);
        runs.sum::<u64>() + self.maps.iter().map(|map| map.file_bytes()).sum::<u64>()
    }
}

impl VolumeStore {
    /// The next map that is to be made, if any: the smallest first.
    #[must_use]
    pub fn next_map(&self) -> Option<MapJob> {
        let newest = self.newest()?.0;
        let first = self.segments().next()?.sequence.0;
        for level in 1..=LEVEL_MAX {
            if newest / span(level) <= first / span(level) {
                return None;
            }
            // Groups that have segments, and a segment behind them.
            let mut from = 0;
            while let Some(segment) = self.segments_in(from..u64::MAX).next() {
                let group = segment.sequence.0 / span(level);
                if group >= newest / span(level) {
                    break;
                }
                from = (group + 1) * span(level);
                if self.maps.has(level, group) || self.maps.given_up.contains(&(level, group)) {
                    continue;
                }
                if let Some(job) = self.map_job(level, group) {
                    return Some(job);
                }
            }
        }
        None
    }

    fn map_job(&self, level: u32, group: u64) -> Option<MapJob> {
        let places = group * span(level)..(group + 1) * span(level);
        let segment_count = self.segments_in(places.clone()).count() as u64;
        if segment_count == 0 {
            return None;
        }
        let (mut segments, mut maps) = (Vec::new(), Vec::new());
        if level == 1 {
            let sequences = self.segments_in(places).map(|segment| segment.sequence);
            segments = sequences.filter_map(|s| self.segment(s).cloned()).collect();
        } else {
            for child in group * MAP_FAN..(group + 1) * MAP_FAN {
                let places = child * span(level - 1)..(child + 1) * span(level - 1);
                if self.segments_in(places).next().is_some() {
                    maps.push(self.maps.get(level - 1, child)?); // None: it could not be made.
                }
            }
        }
        Some(MapJob {
            identity: MapIdentity {
                volume: self.volume(),
                level,
                group,
                segment_count,
            },
            path: self.maps.path(level, group),
            segments,
            maps,
            _lease: self.lease(),
        })
    }

    /// Takes a map that was made into use.
    pub fn add_map(&mut self, job: &MapJob) -> Result<(), StoreError> {
        let noted = self.maps.note(job.identity.level, job.identity.group);
        noted.map(|_| ())
    }

    /// Does without a map that cannot be made: what it would cover is replayed.
    pub fn give_up_map(&mut self, job: &MapJob) {
        let key = (job.identity.level, job.identity.group);
        self.maps.given_up.insert(key);
    }

    /// What all records of `[from, to)` have left of the volume, newest first.
    pub(crate) fn layers(&self, from: Lsn, to: Lsn) -> Result<Vec<Layer>, StoreError> {
        let mut layers = Vec::new();
        let within = |segment: &&StoredSegment| segment.lsn_start < to && segment.lsn_end > from;
        let Some(newest) = self.segments().rev().find(within) else {
            return Ok(layers);
        };
        // Below this nothing is asked, and a map that reaches below it would say too much.
        let whole = self.segments().find(|segment| segment.lsn_start >= from);
        let first_whole = whole.map_or(u64::MAX, |segment| segment.sequence.0);
        // Newest first, until a map takes over.
        let mut uncovered: Vec<&StoredSegment> = Vec::new();
        let mut below = newest.sequence.0 + 1;
        if newest.lsn_end > to {
            uncovered.push(newest);
            below -= 1;
        }
        loop {
            let next = self.segments_in(0..below).next_back();
            let Some(segment) = next.filter(|segment| segment.lsn_end > from) else {
                break;
            };
            if let Some((map, start)) = self.map_with(segment.sequence.0, below, first_whole) {
                layers.extend(replayed(&uncovered, from, to)?);
                uncovered.clear();
                layers.push(Layer::Map(map));
                below = start;
            } else {
                uncovered.push(segment);
                below = segment.sequence.0;
            }
        }
        layers.extend(replayed(&uncovered, from, to)?);
        Ok(layers)
    }

    /// The largest map whose group has segment `sequence`, and nothing at place `end` or behind it, nor below `first`; and where the group begins.
    fn map_with(&self, sequence: u64, end: u64, first: u64) -> Option<(Arc<MapFile>, u64)> {
        (1..=LEVEL_MAX).rev().find_map(|level| {
            let group = sequence / span(level);
            let start = group * span(level);
            let behind = start.checked_add(span(level));
            if behind.is_none_or(|behind| behind > end) || !self.maps.has(level, group) {
                return None;
            }
            // Before the first segment of all there is nothing that could be too much.
            let too_much = start < first && self.segments_in(start..first).next().is_some();
            let map = (!too_much).then(|| self.maps.get(level, group)).flatten()?;
            Some((map, start))
        })
    }
}

/// Lays segments, given newest first, over each other.
fn replayed(segments: &[&StoredSegment], from: Lsn, to: Lsn) -> Result<Option<Layer>, StoreError> {
    let replay = Replay::of(segments.iter().rev().copied(), from, to)?;
    Ok((!replay.is_empty()).then_some(Layer::Replayed(replay)))
}
