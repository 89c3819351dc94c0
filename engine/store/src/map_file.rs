//! A map on disk: opened by its header, fences and bitmap; its pages are read, and checked, when they are asked for.

use crate::StoreError;
use crate::cache::Cache;
use roaring::RoaringBitmap;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use varve_format::{
    BLOCK_BYTES, FormatError, MAP_GRANULE_BYTES, MAP_PAGE_BYTES, MAP_PAGE_EXTENTS, MapExtent,
    MapHeader, VolumeId, crc32c, parse_map_page,
};

/// What all maps of a volume share.
pub(crate) struct Shared {
    pub(crate) volume: VolumeId,
    /// Pages, by the number of the opening and their own. 16 KiB each.
    pages: Cache<(u64, u32), Arc<[MapExtent]>>,
    /// Tags of maps that turned out to be damaged: no image asks them any more, and they are made again.
    suspects: Mutex<BTreeSet<u64>>,
    openings: AtomicU64,
}

impl Shared {
    pub(crate) fn new(volume: VolumeId, pages: usize) -> Arc<Shared> {
        Arc::new(Shared {
            volume,
            pages: Cache::new(pages),
            suspects: Mutex::default(),
            openings: AtomicU64::new(0),
        })
    }

    fn suspects(&self) -> std::sync::MutexGuard<'_, BTreeSet<u64>> {
        self.suspects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn suspect(&self, tag: u64) {
        self.suspects().insert(tag);
    }

    pub(crate) fn is_suspect(&self, tag: u64) -> bool {
        self.suspects().contains(&tag)
    }

    pub(crate) fn trust(&self, tag: u64) {
        self.suspects().remove(&tag);
    }
}

/// An open map.
pub(crate) struct MapFile {
    file: File,
    path: PathBuf,
    tag: u64,
    opening: u64,
    extent_count: u64,
    file_bytes: u64,
    fences: Vec<u64>,
    touched: RoaringBitmap,
    shared: Arc<Shared>,
}

/// The bit of a byte. Volumes of more than 256 TiB share the last one.
pub(crate) fn granule(offset: u64) -> u32 {
    u32::try_from(offset / MAP_GRANULE_BYTES).unwrap_or(u32::MAX)
}

/// Reads the head of a group's map: its size, too.
pub(crate) fn read_head(
    path: &Path,
    volume: VolumeId,
    tag: u64,
) -> Result<(File, MapHeader, u64), StoreError> {
    let damaged = |error| StoreError::Damaged(path.to_path_buf(), error);
    let file = File::open(path).map_err(StoreError::io(path))?;
    let file_bytes = file.metadata().map_err(StoreError::io(path))?.len();
    let mut block = vec![0u8; BLOCK_BYTES.min(file_bytes) as usize];
    file.read_exact_at(&mut block, 0)
        .map_err(StoreError::io(path))?;
    let header = MapHeader::parse(&block, file_bytes).map_err(damaged)?;
    if header.volume != volume.0 || header.tag() != tag {
        return Err(damaged(FormatError::Foreign("map")));
    }
    Ok((file, header, file_bytes))
}

impl MapFile {
    /// Opens the map of a group.
    pub(crate) fn open(path: &Path, tag: u64, shared: &Arc<Shared>) -> Result<MapFile, StoreError> {
        let damaged = |error| StoreError::Damaged(path.to_path_buf(), error);
        let (file, header, file_bytes) = read_head(path, shared.volume, tag)?;
        let mut bytes = vec![0u8; (file_bytes - header.fences_at()) as usize];
        file.read_exact_at(&mut bytes, header.fences_at())
            .map_err(StoreError::io(path))?;
        let (fences, bitmap) = bytes.split_at(header.page_count.get() as usize * 8);
        if crc32c(fences) != header.fences_crc.get() || crc32c(bitmap) != header.bitmap_crc.get() {
            return Err(damaged(FormatError::Checksum));
        }
        let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
        let fences: Vec<u64> = fences.chunks_exact(8).map(number).collect();
        let touched = RoaringBitmap::deserialize_from(bitmap)
            .map_err(|_| damaged(FormatError::Field("map.bitmap")))?;
        if !fences.is_sorted() {
            return Err(damaged(FormatError::Field("map.fences")));
        }
        Ok(MapFile {
            file,
            path: path.to_path_buf(),
            tag,
            opening: shared.openings.fetch_add(1, Ordering::Relaxed),
            extent_count: header.extent_count.get(),
            file_bytes,
            fences,
            touched,
            shared: Arc::clone(shared),
        })
    }

    pub(crate) fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    pub(crate) fn page_count(&self) -> u32 {
        self.fences.len() as u32
    }

    /// Reads a page, and checks it. One that is damaged or cannot be read ends the trust in the whole map: it is made again elsewhere on the disk.
    pub(crate) fn read_page(&self, page: u32) -> Result<Arc<[MapExtent]>, StoreError> {
        self.checked_page(page).inspect_err(|error| {
            if matches!(error, StoreError::Damaged(..) | StoreError::Io(..)) {
                self.shared.suspect(self.tag);
            }
        })
    }

    fn checked_page(&self, page: u32) -> Result<Arc<[MapExtent]>, StoreError> {
        let mut bytes = vec![0u8; MAP_PAGE_BYTES];
        let at = BLOCK_BYTES + u64::from(page) * MAP_PAGE_BYTES as u64;
        self.file
            .read_exact_at(&mut bytes, at)
            .map_err(StoreError::io(&self.path))?;
        let before = u64::from(page) * MAP_PAGE_EXTENTS as u64;
        let count = (self.extent_count - before).min(MAP_PAGE_EXTENTS as u64) as usize;
        let damaged = |error| StoreError::Damaged(self.path.clone(), error);
        let extents = parse_map_page(&bytes, page, self.tag, count).map_err(damaged)?;
        let fence = self.fences.get(page as usize).copied();
        let next = self.fences.get(page as usize + 1).copied();
        let reaches = extents.last().map_or(0, MapExtent::end);
        if extents.first().map(|first| first.offset.get()) != fence
            || next.is_some_and(|next| reaches > next)
        {
            return Err(damaged(FormatError::Field("map.fences")));
        }
        Ok(extents.into())
    }

    /// Adds what it has of `[start, end)` to `found`, clipped, in order.
    pub(crate) fn find(
        &self,
        start: u64,
        end: u64,
        found: &mut Vec<MapExtent>,
    ) -> Result<(), StoreError> {
        let granules = granule(start)..=granule(end - 1);
        if self.touched.range_cardinality(granules) == 0 {
            return Ok(());
        }
        let behind = self.fences.partition_point(|fence| *fence <= start);
        let mut page = behind.saturating_sub(1) as u32;
        while page < self.page_count() && self.fences[page as usize] < end {
            let make = || self.read_page(page);
            let extents = self.shared.pages.get((self.opening, page), make)?;
            let from = extents.partition_point(|extent| extent.end() <= start);
            for extent in &extents[from..] {
                if extent.offset.get() >= end {
                    return Ok(());
                }
                found.push(extent.clip(start, end));
            }
            page += 1;
        }
        Ok(())
    }
}

/// A map's extents in order, page by page, past the cache.
pub(crate) struct MapCursor {
    map: Arc<MapFile>,
    page: u32,
    extents: Arc<[MapExtent]>,
    next: usize,
}

impl MapCursor {
    pub(crate) fn new(map: Arc<MapFile>) -> MapCursor {
        MapCursor {
            map,
            page: 0,
            extents: Arc::new([]),
            next: 0,
        }
    }

    /// The next extent.
    pub(crate) fn advance(&mut self) -> Result<Option<MapExtent>, StoreError> {
        while self.next == self.extents.len() {
            if self.page == self.map.page_count() {
                return Ok(None);
            }
            self.extents = self.map.read_page(self.page)?;
            (self.page, self.next) = (self.page + 1, 0);
        }
        self.next += 1;
        Ok(Some(self.extents[self.next - 1]))
    }
}
