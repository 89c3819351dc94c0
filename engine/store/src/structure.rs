//! The quick check: whether every file is there, is what its name says, and follows the one before it. Data is not read; that is what a scrub is for.

use crate::scrub::{Damage, ScrubJob};
use crate::segment_file::SegmentFile;
use crate::{StoreError, StoredSegment, run_file};

impl ScrubJob {
    /// Looks at headers, footers, tables, runs and maps.
    #[must_use]
    pub fn structure(&self) -> Vec<Damage> {
        let mut damage: Vec<Damage> = self.known.iter().map(Damage::known).collect();
        let mut before = None;
        for segment in self.segments.values() {
            if let Err(error) = head_of(segment) {
                damage.push(self.damage(segment, error.to_string()));
            }
            damage.extend(self.hole_before(segment, before));
            before = Some(&**segment);
        }
        for map in &self.maps {
            if let Err(error) = map.open() {
                damage.push(Damage::without_place(&error.to_string()));
            }
        }
        damage
    }
}

fn head_of(segment: &StoredSegment) -> Result<(), StoreError> {
    SegmentFile::open(segment)?;
    run_file::read_entries(segment)?;
    run_file::read_head(&segment.run_path()).map(|_| ())
}
