//! Which maps there are, which are to be made, and which an image asks.
//!
//!   level 2  [      0 … 63       ]
//!   level 1  [ 0 … 7 ][ 8 … 15 ]…            [ 64 … 71 ]
//!   segments                                              72  73  74 (part)
//!
//! An image below the cut in segment 74 asks: 74 up to the cut, 73, 72 (replayed), then the maps 64…71 and 0…63. So at most seven segments and a part
//! are replayed, and at most seven maps of each level are asked: the number of levels is the logarithm of the history's length.
//! A group gets its map when a segment behind it is there: then none of its segments can still come.

use crate::map_file::{MapCursor, MapFile, PageCache};
use crate::map_merge::{MapIdentity, write_merged, write_replay};
use crate::replay::Replay;
use crate::{StoreError, StoredSegment, VolumeStore, durable};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use varve_format::{Lsn, MAP_FAN, VolumeId, map_tag};

/// Pages of maps that are kept in memory: 1024 × 16 KiB = 16 MiB for each volume.
const PAGES_KEPT: usize = 1024;
/// Levels that there can be: 8^21 segments are more than 64 bits of sequence number.
const LEVEL_MAX: u32 = 20;

/// The maps of a volume.
pub(crate) struct Maps {
    directory: PathBuf,
    volume: VolumeId,
    pages: Arc<PageCache>,
    /// By level and group.
    known: BTreeMap<(u32, u64), Arc<MapFile>>,
    /// Those that cannot be made until the store is opened again.
    given_up: BTreeSet<(u32, u64)>,
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
            volume,
            pages: Arc::new(PageCache::new(PAGES_KEPT)),
            known: BTreeMap::new(),
            given_up: BTreeSet::new(),
        }
    }

    fn path(&self, level: u32, group: u64) -> PathBuf {
        self.directory.join(format!("{level:02}-{group:020}.map"))
    }

    /// Opens what is there. A damaged map is removed: it is made again.
    pub(crate) fn load(&mut self, damaged: &mut Vec<String>) -> Result<(), StoreError> {
        for path in durable::list(&self.directory)? {
            let name = path.file_stem().and_then(|name| name.to_str());
            let parts = name.and_then(|name| name.split_once('-'));
            let numbers = parts.and_then(|(l, g)| Some((l.parse().ok()?, g.parse().ok()?)));
            let opened = match numbers {
                Some((level, group)) if path == self.path(level, group) => self.open(level, group),
                _ => continue,
            };
            if let Err(error) = opened {
                damaged.push(format!("{error}. It is made again"));
                let _ = std::fs::remove_file(&path);
            }
        }
        Ok(())
    }

    fn open(&mut self, level: u32, group: u64) -> Result<(), StoreError> {
        let path = self.path(level, group);
        let map = MapFile::open(&path, self.volume, map_tag(level, group), &self.pages)?;
        self.known.insert((level, group), Arc::new(map));
        Ok(())
    }

    pub(crate) fn stored_bytes(&self) -> u64 {
        self.known.values().map(|map| map.file_bytes()).sum()
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<MapFile>> {
        self.known.values()
    }

    /// Gives up a map that turned out to be damaged.
    pub(crate) fn discard(&mut self, path: &Path) {
        self.known.retain(|_, map| map.path() != path);
        let _ = std::fs::remove_file(path);
    }
}

/// A map to be made. It needs no lock of the store: what it reads never changes.
pub struct MapJob {
    identity: MapIdentity,
    path: PathBuf,
    segments: Vec<Arc<StoredSegment>>,
    maps: Vec<Arc<MapFile>>,
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
            let groups = first / span(level)..newest / span(level);
            if groups.is_empty() {
                return None;
            }
            for group in groups {
                let key = (level, group);
                if self.maps.known.contains_key(&key) || self.maps.given_up.contains(&key) {
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
            let children = (level - 1, group * MAP_FAN)..(level - 1, (group + 1) * MAP_FAN);
            maps = self
                .maps
                .known
                .range(children)
                .map(|(_, map)| Arc::clone(map))
                .collect();
            for child in group * MAP_FAN..(group + 1) * MAP_FAN {
                let places = child * span(level - 1)..(child + 1) * span(level - 1);
                let has_segments = self.segments_in(places).next().is_some();
                if has_segments && !self.maps.known.contains_key(&(level - 1, child)) {
                    return None; // It could not be made.
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
        })
    }

    /// Takes a map that was made into use.
    pub fn add_map(&mut self, job: &MapJob) -> Result<(), StoreError> {
        self.maps.open(job.identity.level, job.identity.group)
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
            if let Some((map, start)) = self.map_that_ends_at(below, first_whole) {
                layers.extend(replayed(&uncovered, from, to)?);
                uncovered.clear();
                layers.push(Layer::Map(map));
                below = start;
            } else if segment.sequence.0 + 1 < below {
                // Places without a segment; a group may end within them.
                below = (segment.sequence.0 + 1).max((below - 1) / MAP_FAN * MAP_FAN);
            } else {
                uncovered.push(segment);
                below = segment.sequence.0;
            }
        }
        layers.extend(replayed(&uncovered, from, to)?);
        Ok(layers)
    }

    /// The largest map whose group ends before place `end` and begins at `first` or behind it, and where it begins.
    fn map_that_ends_at(&self, end: u64, first: u64) -> Option<(Arc<MapFile>, u64)> {
        (1..=LEVEL_MAX)
            .rev()
            .filter(|level| end > 0 && end.is_multiple_of(span(*level)))
            .find_map(|level| {
                let group = end / span(level) - 1;
                let map = self.maps.known.get(&(level, group))?;
                let start = group * span(level);
                // Before the first segment of all there is nothing that could be too much.
                let all = self.segments_in(0..first).next().is_none();
                (start >= first || all).then(|| (Arc::clone(map), start))
            })
    }
}

/// Lays segments, given newest first, over each other.
fn replayed(segments: &[&StoredSegment], from: Lsn, to: Lsn) -> Result<Option<Layer>, StoreError> {
    let replay = Replay::of(segments.iter().rev().copied(), from, to)?;
    Ok((!replay.is_empty()).then_some(Layer::Replayed(replay)))
}
