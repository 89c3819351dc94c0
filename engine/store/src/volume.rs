//! The files of one volume's history: opened, locked, listed.

use crate::{StoreError, Timeline, ingest};
use nix::fcntl::{Flock, FlockArg};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use varve_format::{
    Lsn, RunEntry, RunHeader, SEGMENT_FOOTER_BYTES, SegmentFooter, SegmentSequence, VolumeId,
};

/// A sealed segment at rest.
#[derive(Clone, Debug)]
pub struct StoredSegment {
    /// Its footer.
    pub footer: SegmentFooter,
    /// Its file.
    pub path: PathBuf,
    /// Its records, without intents and checkpoints, in LSN order.
    pub entries: Vec<RunEntry>,
}

/// One volume's history.
pub struct VolumeStore {
    directory: PathBuf,
    volume: VolumeId,
    segments: BTreeMap<SegmentSequence, StoredSegment>,
    timeline: Timeline,
    damaged: Vec<String>,
    _lock: Flock<File>,
}

impl VolumeStore {
    /// Opens (or makes) a volume's history under `root`. A damaged file is set aside in [`VolumeStore::damaged`]; the rest stays readable.
    pub fn open(root: &Path, volume: VolumeId) -> Result<VolumeStore, StoreError> {
        let directory = root.join("volumes").join(volume.to_string());
        for part in ["segments", "runs"] {
            let path = directory.join(part);
            std::fs::create_dir_all(&path).map_err(StoreError::io(&path))?;
        }
        let lock_path = directory.join("lock");
        if !lock_path.exists() {
            File::create(&lock_path).map_err(StoreError::io(&lock_path))?;
        }
        // Not for writing: that would keep the file system from being remounted read-only.
        let file = File::open(&lock_path).map_err(StoreError::io(&lock_path))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|_| StoreError::Locked(directory.clone()))?;
        let mut store = VolumeStore {
            directory,
            volume,
            segments: BTreeMap::new(),
            timeline: Timeline::default(),
            damaged: Vec::new(),
            _lock: lock,
        };
        store.load()?;
        Ok(store)
    }

    fn load(&mut self) -> Result<(), StoreError> {
        let folder = self.directory.join("segments");
        let mut paths: Vec<PathBuf> = std::fs::read_dir(&folder)
            .map_err(StoreError::io(&folder))?
            .flatten()
            .map(|entry| entry.path())
            .collect();
        paths.sort();
        for path in paths {
            if path.extension().is_some_and(|extension| extension == "new") {
                std::fs::remove_file(&path).map_err(StoreError::io(&path))?;
                continue;
            }
            match self.load_segment(&path) {
                Ok(segment) => {
                    self.segments
                        .insert(SegmentSequence(segment.footer.sequence.get()), segment);
                }
                Err(error) => self.damaged.push(error.to_string()),
            }
        }
        self.rebuild_timeline();
        Ok(())
    }

    fn load_segment(&self, path: &Path) -> Result<StoredSegment, StoreError> {
        let footer = read_footer(path)?;
        if footer.volume != self.volume.0 {
            return Err(StoreError::Damaged(
                path.to_path_buf(),
                varve_format::FormatError::Foreign("volume"),
            ));
        }
        let run = self.run_path(SegmentSequence(footer.sequence.get()));
        let entries = match read_run(&run, &footer) {
            Ok(entries) => entries,
            Err(_) => {
                // Lost or damaged: the segment itself has everything.
                let entries = ingest::index_file(path, &footer)?;
                ingest::write_run(&run, &footer, &entries)?;
                entries
            }
        };
        Ok(StoredSegment {
            footer,
            path: path.to_path_buf(),
            entries,
        })
    }

    pub(crate) fn add(&mut self, segment: StoredSegment) {
        self.segments
            .insert(SegmentSequence(segment.footer.sequence.get()), segment);
        self.rebuild_timeline();
    }

    fn rebuild_timeline(&mut self) {
        self.timeline = Timeline::of(self.segments.values());
    }

    pub(crate) fn segment_path(&self, sequence: SegmentSequence) -> PathBuf {
        self.directory
            .join("segments")
            .join(format!("{:020}.seg", sequence.0))
    }

    pub(crate) fn run_path(&self, sequence: SegmentSequence) -> PathBuf {
        self.directory
            .join("runs")
            .join(format!("{:020}.run", sequence.0))
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The volume.
    #[must_use]
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// Segments in the order of their sequence.
    pub fn segments(&self) -> impl DoubleEndedIterator<Item = &StoredSegment> {
        self.segments.values()
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

    /// Bytes of all segment files.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.segments
            .values()
            .map(|s| s.footer.data_bytes.get() + SEGMENT_FOOTER_BYTES as u64)
            .sum()
    }

    /// Size of the volume at `lsn` and its logical sector, in bytes: they change only where a new epoch begins, with a segment of its own.
    pub fn shape(&self, lsn: Lsn) -> Result<(u64, u32), StoreError> {
        let before = |segment: &&StoredSegment| Lsn(segment.footer.lsn_start.get()) < lsn;
        let newest = self.segments.values().rev().find(before);
        let Some(segment) = newest.or_else(|| self.segments.values().next()) else {
            return Ok((0, 512));
        };
        let file = File::open(&segment.path).map_err(StoreError::io(&segment.path))?;
        let reader = varve_log::SegmentReader::open(file, 0, segment.footer.data_bytes.get())
            .map_err(StoreError::segment(&segment.path))?;
        let header = reader.header();
        let sector_bytes = match header.sector_bytes.get() {
            4096 => 4096,
            _ => 512,
        };
        Ok((header.volume_bytes.get(), sector_bytes))
    }
}

fn read_footer(path: &Path) -> Result<SegmentFooter, StoreError> {
    let file = File::open(path).map_err(StoreError::io(path))?;
    let length = file.metadata().map_err(StoreError::io(path))?.len();
    let mut block = vec![0u8; SEGMENT_FOOTER_BYTES];
    let at = length.checked_sub(SEGMENT_FOOTER_BYTES as u64);
    let at = at.ok_or_else(|| {
        StoreError::Damaged(
            path.to_path_buf(),
            varve_format::FormatError::Truncated {
                needed: SEGMENT_FOOTER_BYTES as u64,
                found: length,
            },
        )
    })?;
    file.read_exact_at(&mut block, at)
        .map_err(StoreError::io(path))?;
    let footer = SegmentFooter::parse(&block)
        .map_err(|error| StoreError::Damaged(path.to_path_buf(), error))?;
    if footer.data_bytes.get() != at {
        let error = varve_format::FormatError::Truncated {
            needed: footer.data_bytes.get(),
            found: at,
        };
        return Err(StoreError::Damaged(path.to_path_buf(), error));
    }
    Ok(footer)
}

fn read_run(path: &Path, footer: &SegmentFooter) -> Result<Vec<RunEntry>, StoreError> {
    let bytes = std::fs::read(path).map_err(StoreError::io(path))?;
    let damaged = |error| StoreError::Damaged(path.to_path_buf(), error);
    let (header, entries) = RunHeader::parse(&bytes).map_err(damaged)?;
    if header.volume != footer.volume || header.sequence.get() != footer.sequence.get() {
        return Err(damaged(varve_format::FormatError::Foreign("segment")));
    }
    Ok(entries.to_vec())
}
