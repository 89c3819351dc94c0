//! An image: a volume as of an LSN, read like a disk. Every byte is checked against its record's CRC before it is given out.
//!
//! For now the extents are built by going through the runs once (about two million entries a second); a later index replaces that behind
//! the same interface.

use crate::{StoreError, VolumeStore};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Mutex;
use varve_format::{EpochId, Lsn, RecordKind, RunEntry, SegmentSequence, payload_crc};

/// Payloads kept in memory: 64 × 64 KiB.
const CACHE_PAYLOADS: usize = 64;

/// What a range of an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    /// Bytes that were written.
    Data,
    /// Zero.
    Zero,
    /// Undefined (discarded, or unreadable when it was copied): reads zero, comparisons skip it.
    Undefined,
}

/// A range of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageRange {
    /// First byte.
    pub offset: u64,
    /// Length.
    pub length: u64,
    /// What it is.
    pub kind: RangeKind,
}

#[derive(Clone, Copy)]
struct Extent {
    end: u64,
    segment: u32,
    entry: RunEntry,
}

struct Source {
    file: File,
    epoch: EpochId,
    sequence: SegmentSequence,
}

#[derive(Default)]
struct Cache {
    payloads: HashMap<u64, Vec<u8>>,
    order: VecDeque<u64>,
}

/// A volume as of an LSN.
pub struct Image {
    bytes: u64,
    sector_bytes: u32,
    lsn: Lsn,
    extents: BTreeMap<u64, Extent>,
    sources: Vec<Source>,
    cache: Mutex<Cache>,
}

impl Image {
    /// Opens the image at `lsn`. The caller has asked the timeline whether it resolves. Files stay open: the image outlives changes of the store.
    pub fn open(store: &VolumeStore, lsn: Lsn) -> Result<Image, StoreError> {
        let (bytes, sector_bytes) = store.shape(lsn)?;
        let mut image = Image {
            bytes,
            sector_bytes,
            lsn,
            extents: BTreeMap::new(),
            sources: Vec::new(),
            cache: Mutex::new(Cache::default()),
        };
        for segment in store
            .segments()
            .filter(|segment| Lsn(segment.footer.lsn_start.get()) < lsn)
        {
            let path: &PathBuf = &segment.path;
            let file = File::open(path).map_err(StoreError::io(path))?;
            let index = image.sources.len() as u32;
            let sequence = SegmentSequence(segment.footer.sequence.get());
            image.sources.push(Source {
                file,
                epoch: EpochId(segment.footer.epoch),
                sequence,
            });
            for entry in segment
                .entries
                .iter()
                .take_while(|entry| Lsn(entry.lsn.get()) < lsn)
            {
                if entry.kind().is_ok_and(RecordKind::changes_image) {
                    image.lay(index, *entry);
                }
            }
        }
        Ok(image)
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Logical sector in bytes: 512 or 4096.
    #[must_use]
    pub fn sector_bytes(&self) -> u32 {
        self.sector_bytes
    }

    /// The instant.
    #[must_use]
    pub fn lsn(&self) -> Lsn {
        self.lsn
    }

    /// Lays a record over what is there.
    fn lay(&mut self, segment: u32, entry: RunEntry) {
        let (start, end) = (entry.offset.get(), entry.offset.get() + entry.length.get());
        if start == end {
            return;
        }
        if let Some((&at, &before)) = self.extents.range(..start).next_back()
            && before.end > start
        {
            self.extents.insert(
                at,
                Extent {
                    end: start,
                    ..before
                },
            );
            if before.end > end {
                self.extents.insert(end, before);
            }
        }
        while let Some((&at, &covered)) = self.extents.range(start..end).next() {
            self.extents.remove(&at);
            if covered.end > end {
                self.extents.insert(end, covered);
            }
        }
        self.extents.insert(
            start,
            Extent {
                end,
                segment,
                entry,
            },
        );
    }

    /// The ranges of `[offset, offset + length)`, without holes: what no record tells of is zero.
    #[must_use]
    pub fn ranges(&self, offset: u64, length: u64) -> Vec<ImageRange> {
        let mut found = Vec::new();
        self.each(offset, length, |range, _| {
            found.push(range);
            Ok(())
        })
        .unwrap_or_default();
        found
    }

    fn each(
        &self,
        offset: u64,
        length: u64,
        mut visit: impl FnMut(ImageRange, Option<&Extent>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let end = offset + length;
        let mut at = offset;
        let first = self
            .extents
            .range(..=offset)
            .next_back()
            .filter(|(_, extent)| extent.end > offset)
            .map_or(offset, |(start, _)| *start);
        for (&start, extent) in self.extents.range(first..end) {
            if start > at {
                visit(
                    ImageRange {
                        offset: at,
                        length: start - at,
                        kind: RangeKind::Zero,
                    },
                    None,
                )?;
                at = start;
            }
            let stop = extent.end.min(end);
            let kind = match extent.entry.kind() {
                Ok(RecordKind::Write) => RangeKind::Data,
                Ok(RecordKind::Zero) => RangeKind::Zero,
                _ => RangeKind::Undefined,
            };
            visit(
                ImageRange {
                    offset: at,
                    length: stop - at,
                    kind,
                },
                Some(extent),
            )?;
            at = stop;
        }
        if at < end {
            visit(
                ImageRange {
                    offset: at,
                    length: end - at,
                    kind: RangeKind::Zero,
                },
                None,
            )?;
        }
        Ok(())
    }

    /// Reads `target.len()` bytes from `offset`.
    pub fn read(&self, offset: u64, target: &mut [u8]) -> Result<(), StoreError> {
        let length = target.len() as u64;
        self.each(offset, length, |range, extent| {
            let start = (range.offset - offset) as usize;
            let part = &mut target[start..start + range.length as usize];
            match (range.kind, extent) {
                (RangeKind::Data, Some(extent)) => self.read_extent(extent, range.offset, part),
                _ => {
                    part.fill(0);
                    Ok(())
                }
            }
        })
    }

    fn read_extent(
        &self,
        extent: &Extent,
        offset: u64,
        target: &mut [u8],
    ) -> Result<(), StoreError> {
        let entry = &extent.entry;
        let skip = (offset - entry.offset.get()) as usize;
        let mut cache = self
            .cache
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let lsn = entry.lsn.get();
        if !cache.payloads.contains_key(&lsn) {
            let payload = self.load(extent)?;
            if cache.order.len() >= CACHE_PAYLOADS
                && let Some(oldest) = cache.order.pop_front()
            {
                cache.payloads.remove(&oldest);
            }
            cache.order.push_back(lsn);
            cache.payloads.insert(lsn, payload);
        }
        if let Some(payload) = cache.payloads.get(&lsn) {
            target.copy_from_slice(&payload[skip..skip + target.len()]);
        }
        Ok(())
    }

    /// Reads a record's whole payload and checks it.
    fn load(&self, extent: &Extent) -> Result<Vec<u8>, StoreError> {
        let (entry, source) = (&extent.entry, &self.sources[extent.segment as usize]);
        let damaged = || StoreError::Payload {
            segment: source.sequence,
            lsn: entry.lsn.get(),
            offset: entry.offset.get(),
            length: entry.length.get(),
        };
        if entry.length.get() > varve_format::RECORD_PAYLOAD_BYTES_MAX {
            return Err(damaged());
        }
        let mut payload = vec![0u8; entry.length.get() as usize];
        source
            .file
            .read_exact_at(&mut payload, entry.payload.get())
            .map_err(|_| damaged())?;
        if payload_crc(source.epoch, Lsn(entry.lsn.get()), &payload) != entry.payload_crc.get() {
            return Err(damaged());
        }
        Ok(payload)
    }
}
