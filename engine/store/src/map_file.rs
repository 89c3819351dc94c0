//! A map on disk: opened by its header, fences and bitmap; its pages are read, and checked, when they are asked for.

use crate::StoreError;
use crate::cache::Cache;
use roaring::RoaringBitmap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use varve_format::{
    BLOCK_BYTES, FormatError, MAP_GRANULE_BYTES, MAP_PAGE_BYTES, MAP_PAGE_EXTENTS, MapExtent,
    MapHeader, VolumeId, crc32c, parse_map_page,
};

/// Pages of all maps of a volume, by [`varve_format::map_tag`] and number. 16 KiB each.
pub(crate) type PageCache = Cache<(u64, u32), Arc<[MapExtent]>>;

/// An open map.
pub(crate) struct MapFile {
    file: File,
    path: PathBuf,
    volume: VolumeId,
    tag: u64,
    extent_count: u64,
    file_bytes: u64,
    fences: Vec<u64>,
    touched: RoaringBitmap,
    pages: Arc<PageCache>,
}

/// The bit of a byte. Volumes of more than 256 TiB share the last one.
pub(crate) fn granule(offset: u64) -> u32 {
    u32::try_from(offset / MAP_GRANULE_BYTES).unwrap_or(u32::MAX)
}

impl MapFile {
    /// Opens the map of a group.
    pub(crate) fn open(
        path: &Path,
        volume: VolumeId,
        tag: u64,
        pages: &Arc<PageCache>,
    ) -> Result<MapFile, StoreError> {
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
            volume,
            tag,
            extent_count: header.extent_count.get(),
            file_bytes,
            fences,
            touched,
            pages: Arc::clone(pages),
        })
    }

    /// The same as it is on the disk now.
    pub(crate) fn reopen(&self) -> Result<MapFile, StoreError> {
        MapFile::open(&self.path, self.volume, self.tag, &self.pages)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    pub(crate) fn page_count(&self) -> u32 {
        self.fences.len() as u32
    }

    /// Reads a page, and checks it.
    pub(crate) fn read_page(&self, page: u32) -> Result<Arc<[MapExtent]>, StoreError> {
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
        if extents.first().map(|first| first.offset.get()) != fence {
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
            let extents = self.pages.get((self.tag, page), make)?;
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
