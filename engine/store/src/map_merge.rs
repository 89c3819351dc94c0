//! Makes maps: out of the runs of eight segments, or out of eight smaller maps, in one pass and little memory.
//!
//! Crash: a map that is not whole has no name; it is made again.

use crate::map_file::{MapCursor, granule};
use crate::replay::Replay;
use crate::{StoreError, durable};
use roaring::RoaringBitmap;
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::Path;
use varve_format::{
    BLOCK_BYTES, MAP_PAGE_EXTENTS, MapExtent, MapHeader, VolumeId, crc32c, encode_map_page, map_tag,
};

/// What a map is called and says of itself.
pub(crate) struct MapIdentity {
    pub(crate) volume: VolumeId,
    pub(crate) level: u32,
    pub(crate) group: u64,
    pub(crate) segment_count: u64,
}

/// Writes extents, in order, into a new map at `path`, durably.
struct MapWriter<'a> {
    out: BufWriter<&'a mut File>,
    path: &'a Path,
    identity: &'a MapIdentity,
    page: Vec<MapExtent>,
    fences: Vec<u8>,
    touched: RoaringBitmap,
    count: u64,
}

impl MapWriter<'_> {
    fn push(&mut self, extent: MapExtent) -> Result<(), StoreError> {
        self.touched
            .insert_range(granule(extent.offset.get())..=granule(extent.end() - 1));
        self.page.push(extent);
        self.count += 1;
        if self.page.len() == MAP_PAGE_EXTENTS {
            self.end_page()?;
        }
        Ok(())
    }

    fn end_page(&mut self) -> Result<(), StoreError> {
        let Some(first) = self.page.first() else {
            return Ok(());
        };
        let number = (self.fences.len() / 8) as u32;
        self.fences
            .extend_from_slice(&first.offset.get().to_le_bytes());
        let tag = map_tag(self.identity.level, self.identity.group);
        let page = encode_map_page(number, tag, &self.page);
        self.page.clear();
        self.put(&page)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.out.write_all(bytes).map_err(StoreError::io(self.path))
    }

    fn finish(mut self) -> Result<(), StoreError> {
        self.end_page()?;
        let mut bitmap = Vec::new();
        self.touched.optimize();
        self.touched
            .serialize_into(&mut bitmap)
            .map_err(StoreError::io(self.path))?;
        let mut header = MapHeader::empty();
        header.volume = self.identity.volume.0;
        header.level = self.identity.level.into();
        header.group = self.identity.group.into();
        header.segment_count = self.identity.segment_count.into();
        header.extent_count = self.count.into();
        header.page_count = ((self.fences.len() / 8) as u64).into();
        header.fences_crc = crc32c(&self.fences).into();
        header.bitmap_bytes = (bitmap.len() as u64).into();
        header.bitmap_crc = crc32c(&bitmap).into();
        let fences = std::mem::take(&mut self.fences);
        self.put(&fences)?;
        self.put(&bitmap)?;
        self.out
            .seek(SeekFrom::Start(0))
            .map_err(StoreError::io(self.path))?;
        self.put(&header.to_block())?;
        self.out.flush().map_err(StoreError::io(self.path))
    }
}

fn write(
    path: &Path,
    identity: &MapIdentity,
    fill: impl FnOnce(&mut MapWriter<'_>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    durable::create(path, |file| {
        let mut writer = MapWriter {
            out: BufWriter::with_capacity(1 << 18, file),
            path,
            identity,
            page: Vec::with_capacity(MAP_PAGE_EXTENTS),
            fences: Vec::new(),
            touched: RoaringBitmap::new(),
            count: 0,
        };
        writer.put(&[0u8; BLOCK_BYTES as usize])?;
        fill(&mut writer)?;
        writer.finish()
    })
}

/// Writes what was replayed.
pub(crate) fn write_replay(
    path: &Path,
    identity: &MapIdentity,
    replay: &Replay,
) -> Result<(), StoreError> {
    write(path, identity, |writer| {
        let mut extents = replay.extents().iter();
        extents.try_for_each(|extent| writer.push(*extent))
    })
}

/// Writes what smaller maps, oldest first, have left of the volume.
pub(crate) fn write_merged(
    path: &Path,
    identity: &MapIdentity,
    cursors: Vec<MapCursor>,
) -> Result<(), StoreError> {
    write(path, identity, |writer| {
        merge(cursors, |extent| writer.push(extent))
    })
}

/// Goes through the volume once. At each place the newest cursor that has something there wins.
fn merge(
    mut cursors: Vec<MapCursor>,
    mut emit: impl FnMut(MapExtent) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    // Newest first.
    cursors.reverse();
    let mut heads = Vec::with_capacity(cursors.len());
    for cursor in &mut cursors {
        heads.push(cursor.advance()?);
    }
    let mut at = 0;
    loop {
        let starts = heads.iter().flatten().map(|head| head.offset.get().max(at));
        let Some(start) = starts.min() else {
            return Ok(());
        };
        let covers = |head: &Option<MapExtent>| head.is_some_and(|h| h.offset.get() <= start);
        let Some(winner) = heads.iter().position(covers) else {
            return Ok(());
        };
        let newer = heads[..winner].iter().flatten();
        let limit = newer.map(|head| head.offset.get()).min();
        if let Some(head) = heads[winner] {
            let end = head.end().min(limit.unwrap_or(u64::MAX));
            emit(head.clip(start, end))?;
            at = end;
        }
        for (head, cursor) in heads.iter_mut().zip(&mut cursors) {
            while head.is_some_and(|h| h.end() <= at) {
                *head = cursor.advance()?;
            }
        }
    }
}
