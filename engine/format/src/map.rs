//! A map: what a group of consecutive segments has left of a volume, as extents that do not overlap, in the order of the volume.
//!
//!   header block │ pages of 16 KiB (341 extents each) │ fences: first byte of each page │ bitmap of the 64 KiB granules that are touched
//!
//! An image asks maps from the newest to the oldest and never replays what they cover. Each page has its own checksum and names its map, so that
//! opening one reads the header, the fences and the bitmap only. A map can always be made again from the runs.

use crate::segment::check_head;
use crate::{BLOCK_BYTES, FormatError, RecordKind, VERSION, crc32c};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of an extent.
pub const MAP_EXTENT_BYTES: usize = 48;
/// Size of a page.
pub const MAP_PAGE_BYTES: usize = 16 * 1024;
/// Extents of a full page: (16,384 − 16) / 48.
pub const MAP_PAGE_EXTENTS: usize = (MAP_PAGE_BYTES - MAP_PAGE_HEAD_BYTES) / MAP_EXTENT_BYTES;
/// What a bit of the bitmap stands for.
pub const MAP_GRANULE_BYTES: u64 = 64 * 1024;
/// Segments of a group of level 1; a group of level n holds this many of level n − 1.
pub const MAP_FAN: u64 = 8;
/// Payloads lie at multiples of this in a segment, and extents begin and end at multiples of it.
pub const MAP_UNIT_BYTES: u64 = 512;

const MAP_PAGE_HEAD_BYTES: usize = 16;
const MAGIC: [u8; 4] = *b"VMAP";

/// The first block of a map.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
pub struct MapHeader {
    /// CRC-32C of everything after itself in this block.
    pub crc: U32,
    /// `VMAP`.
    pub magic: [u8; 4],
    /// Format version.
    pub version: U16,
    /// Features that a reader may ignore.
    pub compat: U16,
    /// Features that a reader must know.
    pub incompat: U32,
    /// The volume.
    pub volume: [u8; 16],
    /// Level of the group: it holds `8^level` places for segments.
    pub level: U32,
    /// CRC-32C of the fences.
    pub fences_crc: U32,
    /// Number of the group: its first segment is `group × 8^level`.
    pub group: U64,
    /// Segments that were there when it was made.
    pub segment_count: U64,
    /// Extents in all pages.
    pub extent_count: U64,
    /// Pages.
    pub page_count: U64,
    /// Length of the bitmap (a portable Roaring bitmap of granule numbers) behind the fences.
    pub bitmap_bytes: U64,
    /// CRC-32C of the bitmap.
    pub bitmap_crc: U32,
    /// Zero.
    pub reserved: [u8; 4012],
}
const _: () = assert!(size_of::<MapHeader>() == BLOCK_BYTES as usize);

impl MapHeader {
    /// A header with magic and version set and everything else zero.
    #[must_use]
    pub fn empty() -> MapHeader {
        let mut header: MapHeader = zerocopy::FromZeros::new_zeroed();
        header.magic = MAGIC;
        header.version = U16::new(VERSION);
        header
    }

    /// The header's block with its checksum.
    #[must_use]
    pub fn to_block(mut self) -> [u8; BLOCK_BYTES as usize] {
        self.crc = U32::new(crc32c(&self.as_bytes()[4..]));
        let mut block = [0u8; BLOCK_BYTES as usize];
        block.copy_from_slice(self.as_bytes());
        block
    }

    /// Checks and copies a header out of its block. `file_bytes` bounds what it says of its file.
    pub fn parse(block: &[u8], file_bytes: u64) -> Result<MapHeader, FormatError> {
        let (header, _) =
            MapHeader::read_from_prefix(block).map_err(|_| FormatError::Truncated {
                needed: BLOCK_BYTES,
                found: block.len() as u64,
            })?;
        check_head(
            header.magic == MAGIC,
            header.crc.get(),
            header.as_bytes(),
            header.version.get(),
            header.incompat.get(),
        )?;
        let pages = header.page_count.get();
        let needed = pages
            .checked_mul(MAP_PAGE_BYTES as u64 + 8)
            .and_then(|bytes| bytes.checked_add(BLOCK_BYTES))
            .and_then(|bytes| bytes.checked_add(header.bitmap_bytes.get()))
            .ok_or(FormatError::Field("map.page_count"))?;
        if needed != file_bytes {
            return Err(FormatError::Truncated {
                needed,
                found: file_bytes,
            });
        }
        if header.extent_count.get().div_ceil(MAP_PAGE_EXTENTS as u64) != pages {
            return Err(FormatError::Field("map.extent_count"));
        }
        Ok(header)
    }

    /// What each page of this map names.
    #[must_use]
    pub fn tag(&self) -> u64 {
        map_tag(self.level.get(), self.group.get())
    }

    /// Where the fences begin in the file.
    #[must_use]
    pub fn fences_at(&self) -> u64 {
        BLOCK_BYTES + self.page_count.get() * MAP_PAGE_BYTES as u64
    }
}

/// Level and group in one number, for pages.
#[must_use]
pub fn map_tag(level: u32, group: u64) -> u64 {
    group << 8 | u64::from(level & 0xff)
}

/// The head of a page; its extents follow.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
pub struct MapPageHead {
    /// CRC-32C of everything after itself in the page.
    pub crc: U32,
    /// Number of the page: another one was read from a wrong place.
    pub page: U32,
    /// [`map_tag`]: a page of another map.
    pub tag: U64,
}
const _: () = assert!(size_of::<MapPageHead>() == MAP_PAGE_HEAD_BYTES);

/// Makes a page of up to [`MAP_PAGE_EXTENTS`] extents; the rest of a short one is zero.
#[must_use]
pub fn encode_map_page(page: u32, tag: u64, extents: &[MapExtent]) -> Vec<u8> {
    let mut bytes = vec![0u8; MAP_PAGE_BYTES];
    let body = extents.as_bytes();
    bytes[MAP_PAGE_HEAD_BYTES..MAP_PAGE_HEAD_BYTES + body.len()].copy_from_slice(body);
    let mut head = MapPageHead {
        crc: U32::new(0),
        page: page.into(),
        tag: tag.into(),
    };
    bytes[..MAP_PAGE_HEAD_BYTES].copy_from_slice(head.as_bytes());
    head.crc = U32::new(crc32c(&bytes[4..]));
    bytes[..MAP_PAGE_HEAD_BYTES].copy_from_slice(head.as_bytes());
    bytes
}

/// Checks a page and gives its `count` extents: in order, not overlapping, whole units.
pub fn parse_map_page(
    bytes: &[u8],
    page: u32,
    tag: u64,
    count: usize,
) -> Result<&[MapExtent], FormatError> {
    let truncated = || FormatError::Truncated {
        needed: MAP_PAGE_BYTES as u64,
        found: bytes.len() as u64,
    };
    let (head, rest) = MapPageHead::ref_from_prefix(bytes).map_err(|_| truncated())?;
    if bytes.len() != MAP_PAGE_BYTES || count > MAP_PAGE_EXTENTS {
        return Err(truncated());
    }
    if crc32c(&bytes[4..]) != head.crc.get() {
        return Err(FormatError::Checksum);
    }
    if head.page.get() != page || head.tag.get() != tag {
        return Err(FormatError::Foreign("map"));
    }
    let extents = <[MapExtent]>::ref_from_bytes(&rest[..count * MAP_EXTENT_BYTES])
        .map_err(|_| FormatError::Field("map.extents"))?;
    let mut from = 0;
    for extent in extents {
        let start = extent.offset.get();
        let end = start.checked_add(extent.length.get());
        let end = end.ok_or(FormatError::Field("map.length"))?;
        if start < from || end <= start || !extent.is_sound() {
            return Err(FormatError::Field("map.offset"));
        }
        from = end;
    }
    Ok(extents)
}

/// A part of a volume, and the record that last wrote it within the map's group.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, PartialEq, Eq,
)]
pub struct MapExtent {
    /// First byte of the volume.
    pub offset: U64,
    /// Length in bytes.
    pub length: U64,
    /// LSN of the record.
    pub lsn: U64,
    /// Sequence of its segment.
    pub segment: U64,
    /// Where its payload begins in the segment, in units of 512 bytes.
    pub payload: U32,
    /// CRC-32C of the whole payload, epoch and LSN.
    pub payload_crc: U32,
    /// Length of the whole payload in bytes; 0 for what is not a write.
    pub payload_bytes: U32,
    /// Where this extent begins in the payload, in units of 512 bytes.
    pub skip: U16,
    /// [`RecordKind`].
    pub kind: u8,
    /// Zero.
    pub reserved: u8,
}
const _: () = assert!(size_of::<MapExtent>() == MAP_EXTENT_BYTES);

impl MapExtent {
    /// First byte behind it.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset.get() + self.length.get()
    }

    /// Whether it is a write.
    #[must_use]
    pub fn is_write(&self) -> bool {
        self.kind == RecordKind::Write as u8
    }

    /// The part of it that lies in `[start, end)`, which it must touch.
    #[must_use]
    pub fn clip(&self, start: u64, end: u64) -> MapExtent {
        let mut clipped = *self;
        let from = self.offset.get().max(start);
        let to = self.end().min(end);
        clipped.offset = from.into();
        clipped.length = to.saturating_sub(from).into();
        if self.is_write() {
            let units = (from - self.offset.get()) / MAP_UNIT_BYTES;
            clipped.skip = (self.skip.get() + units as u16).into();
        }
        clipped
    }

    /// Whether its fields fit together: a write lies within its payload.
    fn is_sound(&self) -> bool {
        let known = RecordKind::ALL
            .into_iter()
            .any(|kind| kind as u8 == self.kind && kind.changes_image());
        let whole = self.offset.get().is_multiple_of(MAP_UNIT_BYTES)
            && self.length.get().is_multiple_of(MAP_UNIT_BYTES);
        let skip = u64::from(self.skip.get()) * MAP_UNIT_BYTES;
        let end = skip.checked_add(self.length.get());
        let inside = end.is_some_and(|end| end <= u64::from(self.payload_bytes.get()));
        let bounded = u64::from(self.payload_bytes.get()) <= crate::RECORD_PAYLOAD_BYTES_MAX;
        known && whole && bounded && (inside || !self.is_write())
    }
}
