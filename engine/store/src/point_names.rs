//! The names of recovery points: they lie in segments, as payloads, and are encrypted with the rest.

use crate::cache::Cache;
use crate::segment_file::SegmentFile;
use crate::{Event, StoreError, VolumeStore};
use std::sync::PoisonError;
use varve_format::{FormatError, RECORD_PAYLOAD_BYTES_MAX, SegmentSequence, payload_crc};

/// Reads names of recovery points, each once. The segment that one was read from is likely to have the next one, too, and stays open until then; no longer:
/// it may be replaced.
pub struct PointNames<'a> {
    store: &'a VolumeStore,
    file: Option<(SegmentSequence, SegmentFile)>,
}

impl PointNames<'_> {
    /// The name of a point.
    pub fn of(&mut self, point: &Event) -> Result<String, StoreError> {
        let known = &self.store.point_names;
        let known = || known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(name) = known().get(&point.lsn) {
            return Ok(name.clone());
        }
        let name = self.read(point)?;
        known().insert(point.lsn, name.clone());
        Ok(name)
    }

    fn read(&mut self, point: &Event) -> Result<String, StoreError> {
        let segment = self.store.segment(point.segment);
        let segment = segment.ok_or(StoreError::Missing(point.segment))?;
        let file = match self.file.take() {
            Some((sequence, file)) if sequence == point.segment => file,
            _ => SegmentFile::open(segment)?,
        };
        let (_, file) = self.file.insert((point.segment, file));
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

impl VolumeStore {
    /// Reads the names of recovery points.
    #[must_use]
    pub fn point_names(&self) -> PointNames<'_> {
        PointNames {
            store: self,
            file: None,
        }
    }
}
