//! The names of recovery points: they lie in segments, as payloads, and are encrypted with the rest.

use crate::cache::Cache;
use crate::segment_file::SegmentFile;
use crate::{Event, StoreError, StoredSegment, VolumeStore};
use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard, PoisonError};
use varve_format::{FormatError, Lsn, RECORD_PAYLOAD_BYTES_MAX, SegmentSequence, payload_crc};

/// Reads names of recovery points, each once. The segment that one was read from is likely to have the next one, too, and stays open until then; no longer:
/// it may be replaced.
pub struct PointNames<'a> {
    store: &'a VolumeStore,
    file: LastFile,
}

impl PointNames<'_> {
    /// The name of a point.
    pub fn of(&mut self, point: &Event) -> Result<String, StoreError> {
        if let Some(name) = self.store.known_names().get(&point.lsn) {
            return Ok(name.clone());
        }
        let segment = self.store.segment(point.segment);
        let segment = segment.ok_or(StoreError::Missing(point.segment))?;
        let name = self.file.name(point, segment)?;
        self.store.known_names().insert(point.lsn, name.clone());
        Ok(name)
    }
}

/// The segment that a name was read from last.
#[derive(Default)]
struct LastFile(Option<(SegmentSequence, SegmentFile)>);

impl LastFile {
    fn name(&mut self, point: &Event, segment: &StoredSegment) -> Result<String, StoreError> {
        let file = match self.0.take() {
            Some((sequence, file)) if sequence == point.segment => file,
            _ => SegmentFile::open(segment)?,
        };
        let (_, file) = self.0.insert((point.segment, file));
        let bytes = point.entry.length.get();
        let mut name = vec![0u8; bytes.min(RECORD_PAYLOAD_BYTES_MAX) as usize];
        let cache = Cache::new(1);
        file.read(point.entry.payload.get(), &mut name, &cache)?;
        if payload_crc(segment.epoch, point.lsn, &name) != point.entry.payload_crc.get() {
            return Err(StoreError::Damaged(segment.path(), FormatError::Checksum));
        }
        Ok(String::from_utf8_lossy(&name).into_owned())
    }
}

/// Names that are not known yet, to be read without a lock of the store.
pub struct NamesJob {
    wanted: Vec<(Event, Arc<StoredSegment>)>,
    /// While it is there, nobody deletes the history.
    _lease: Arc<()>,
}

impl NamesJob {
    /// Reads them. One that cannot be read stays unknown.
    #[must_use]
    pub fn run(self) -> Vec<(Lsn, String)> {
        let mut file = LastFile::default();
        let mut name = |(point, segment): &(Event, Arc<StoredSegment>)| {
            Some((point.lsn, file.name(point, segment).ok()?))
        };
        self.wanted.iter().filter_map(&mut name).collect()
    }
}

impl VolumeStore {
    /// Reads the names of recovery points.
    #[must_use]
    pub fn point_names(&self) -> PointNames<'_> {
        PointNames {
            store: self,
            file: LastFile::default(),
        }
    }

    fn known_names(&self) -> MutexGuard<'_, BTreeMap<Lsn, String>> {
        self.point_names
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The name of a point, if it was read before.
    #[must_use]
    pub fn known_name(&self, point: &Event) -> Option<String> {
        self.known_names().get(&point.lsn).cloned()
    }

    /// The names of points that resolve and were not read yet; none: there are none.
    #[must_use]
    pub fn names_to_read(&self) -> Option<NamesJob> {
        let known = self.known_names();
        let timeline = self.timeline();
        let unknown = timeline
            .points
            .iter()
            .filter(|point| !known.contains_key(&point.lsn) && timeline.check(point.lsn).is_ok());
        let wanted: Vec<_> = unknown
            .filter_map(|point| Some((point.clone(), Arc::clone(self.segment(point.segment)?))))
            .collect();
        (!wanted.is_empty()).then(|| NamesJob {
            wanted,
            _lease: self.lease(),
        })
    }

    /// Takes names that were read.
    pub fn learn_names(&self, names: Vec<(Lsn, String)>) {
        self.known_names().extend(names);
    }
}
