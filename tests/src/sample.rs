//! Histories for tests of the store: made by the real log writer, taken by the real ingest, without a device. Their images are known by a second way.
//!
//! The ring lies in memory and completes at once: what a crash does to a log is another test's business.

use std::collections::{BTreeSet, VecDeque};
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use varve_format::{
    Checkpoint, EpochId, FRAME_ENTRY_BYTES, Hash128, Lsn, Record, RecordKind, SegmentSequence,
    SettledHeader, SpanKind, VolumeId, VolumeState, WallTime,
};
use varve_log::{
    BatchBuffer, Completion, Disk, LogGeometry, LogWriter, Medium, Memory, Now, Operation, ReadAt,
    SLOT_BYTES, SegmentOpening,
};
use varve_store::{
    Compression, Image, Ladder, Policy, Scrubbed, Secret, StoreError, StoreKeys, Swept,
    VolumeStore, ingest, volume_directory,
};

/// The volume of all samples.
pub const VOLUME: VolumeId = VolumeId([5; 16]);
const SEGMENT_COUNT: u64 = 4;
const SLOTS: usize = 16;

/// A log disk in memory.
struct Ring {
    content: Vec<u8>,
    done: VecDeque<Completion>,
    time_ns: u64,
}

impl Medium for Ring {
    fn submit(&mut self, _: Disk, token: u64, operation: Operation) {
        if let Operation::Write { offset, buffer } = operation {
            let at = offset as usize;
            buffer.read_with(|bytes| self.content[at..at + bytes.len()].copy_from_slice(bytes));
        }
        let result = Ok(());
        self.done.push_back(Completion { token, result });
    }
    fn poll(&mut self, _: bool) -> Option<Completion> {
        self.done.pop_front()
    }
    fn now(&self) -> Now {
        Now {
            monotonic_ns: self.time_ns,
            wall: WallTime(self.time_ns as i64),
        }
    }
    fn random_id(&mut self) -> [u8; 16] {
        [1; 16]
    }
}

/// What a record did, for the second way.
#[derive(Clone, Debug)]
struct Step {
    lsn: Lsn,
    offset: u64,
    payload: Vec<u8>,
    zeroed: u64,
}

/// Records a history into a store.
pub struct Sample {
    /// The store.
    pub store: VolumeStore,
    volume_bytes: u64,
    segment_bytes: u64,
    ring: Ring,
    writer: LogWriter,
    /// Payload of the open batch.
    pending: u64,
    steps: Vec<Step>,
    remembers: bool,
    random: u64,
    /// The log's disk gives other bytes when it is asked for the same ones again.
    pub lies_again: bool,
}

/// A log whose disk lies when it is asked again; not about the heads of segments, which are looked at in any case.
struct LiesAgain<'a> {
    content: &'a [u8],
    segment_bytes: u64,
    seen: BTreeSet<u64>,
}

impl ReadAt for LiesAgain<'_> {
    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        bytes.copy_from_slice(&self.content[offset as usize..][..bytes.len()]);
        for (block, bytes) in (offset / 4096..).zip(bytes.chunks_mut(4096)) {
            let is_head = (block * 4096).is_multiple_of(self.segment_bytes);
            if !is_head && !self.seen.insert(block) {
                bytes[0] ^= 1;
            }
        }
        Ok(())
    }
}

impl Sample {
    /// A new history of a volume, in a store under `root`. `remembers`: keeps everything for [`Sample::image`], too.
    ///
    /// # Panics
    /// If the store cannot be made.
    #[must_use]
    pub fn new(root: &Path, volume_bytes: u64, segment_bytes: u64, remembers: bool) -> Sample {
        let store = VolumeStore::open(root, VOLUME).unwrap();
        Sample::with(store, volume_bytes, segment_bytes, remembers)
    }

    /// The same in a store that is open already, and empty.
    ///
    /// # Panics
    /// If nothing can be recorded.
    #[must_use]
    pub fn with(
        store: VolumeStore,
        volume_bytes: u64,
        segment_bytes: u64,
        remembers: bool,
    ) -> Sample {
        Sample::of_epoch(
            EpochId([3; 16]),
            store,
            volume_bytes,
            segment_bytes,
            remembers,
        )
    }

    /// The same, recorded in another epoch.
    ///
    /// # Panics
    /// If nothing can be recorded.
    #[must_use]
    pub fn of_epoch(
        epoch: EpochId,
        store: VolumeStore,
        volume_bytes: u64,
        segment_bytes: u64,
        remembers: bool,
    ) -> Sample {
        let geometry = LogGeometry {
            volume: VOLUME,
            segment_bytes,
            segment_count: SEGMENT_COUNT,
            volume_bytes,
            sector_bytes: 512,
            region_bytes: 1 << 20,
        };
        let memory = Memory::anonymous(SLOTS * SLOT_BYTES).unwrap();
        let mut ring = Ring {
            content: vec![0; (segment_bytes * SEGMENT_COUNT) as usize],
            done: VecDeque::new(),
            time_ns: 1_000_000_000,
        };
        let buffer = BatchBuffer::new(&memory, 0, SLOTS, 512);
        let mut writer = LogWriter::new(geometry, buffer, 1 << 40).unwrap();
        let opening = SegmentOpening {
            epoch,
            parent_epoch: EpochId([0; 16]),
            sequence: SegmentSequence(1),
            lsn_start: Lsn(1),
            previous_lsn_end: Lsn(1),
            previous_bytes: 0,
            previous_hash: Hash128::default(),
        };
        writer.begin_epoch(&mut ring, opening, SegmentSequence(1), &checkpoint());
        let mut sample = Sample {
            store,
            volume_bytes,
            segment_bytes,
            ring,
            writer,
            pending: 0,
            steps: Vec::new(),
            remembers,
            random: 0x2545_f491_4f6c_dd1d,
            lies_again: false,
        };
        let begin = sample.span(RecordKind::SpanBegin, 0);
        sample.span(RecordKind::SpanEnd, begin.0);
        sample
    }

    /// A number that nobody can tell the next of.
    pub fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn span(&mut self, kind: RecordKind, argument: u64) -> Lsn {
        let mut record = Record::new(kind, 0, 0, argument);
        record.detail = SpanKind::BaseCopy as u8;
        self.append(record, &[])
    }

    fn append(&mut self, record: Record, payload: &[u8]) -> Lsn {
        self.ring.time_ns += 1000;
        // A batch must fit into a segment, behind its header and with its own.
        if self.pending + payload.len() as u64 + 4 * 4096 > self.segment_bytes {
            self.writer.want_durable(self.writer.next_lsn());
            while self.writer.durable_lsn() < self.writer.next_lsn() {
                self.turn();
            }
            self.pending = 0;
        }
        self.pending += payload.len() as u64;
        while !self.writer.has_room(1, payload.len(), false) {
            self.turn();
        }
        let now = self.ring.now();
        let copy = |bytes: &mut [u8]| bytes.copy_from_slice(payload);
        let (lsn, chunk) = self.writer.append(now, record, payload.len(), copy);
        // The origin has it.
        self.writer.buffer().mark_done(chunk);
        lsn
    }

    /// One turn of the log: writes what is closed, rolls a full segment, and lets the store take it.
    fn turn(&mut self) {
        self.ring.time_ns += 2_000_000;
        self.writer.pump(&mut self.ring);
        while let Some(done) = self.ring.poll(false) {
            self.writer.complete(done.token, done.result);
        }
        if self.writer.wants_roll() {
            self.writer.roll(&mut self.ring, &checkpoint());
            self.take();
        }
    }

    fn take(&mut self) {
        let mut honest: &[u8] = &self.ring.content;
        let mut lying = LiesAgain {
            content: &self.ring.content,
            segment_bytes: self.segment_bytes,
            seen: BTreeSet::new(),
        };
        let log: &mut dyn ReadAt = match self.lies_again {
            true => &mut lying,
            false => &mut honest,
        };
        let below = self.writer.status().sequence;
        let done = ingest(
            &mut self.store,
            log,
            self.segment_bytes,
            SEGMENT_COUNT,
            below,
        )
        .unwrap();
        assert!(done.problems.is_empty(), "{:?}", done.problems);
        self.writer.release_below(done.below);
    }

    /// Records a write.
    pub fn write(&mut self, offset: u64, payload: Vec<u8>) -> Lsn {
        assert!(offset + payload.len() as u64 <= self.volume_bytes);
        let record = Record::new(RecordKind::Write, offset, payload.len() as u64, 0);
        let lsn = self.append(record, &payload);
        if self.remembers {
            self.steps.push(Step {
                lsn,
                offset,
                payload,
                zeroed: 0,
            });
        }
        lsn
    }

    /// Records a zeroing, or a discard.
    pub fn zero(&mut self, kind: RecordKind, offset: u64, length: u64) -> Lsn {
        let lsn = self.append(Record::new(kind, offset, length, 0), &[]);
        if self.remembers {
            self.steps.push(Step {
                lsn,
                offset,
                payload: Vec::new(),
                zeroed: length,
            });
        }
        lsn
    }

    /// Records a point.
    pub fn point(&mut self, name: &str) -> Lsn {
        self.point_with(name, 0)
    }

    /// Records a point with bits in its detail.
    pub fn point_with(&mut self, name: &str, detail: u8) -> Lsn {
        let record = Record::new(RecordKind::Point, 0, 0, 0).with_detail(detail);
        self.append(record, name.as_bytes())
    }

    /// Seals what is open; the store has everything then.
    pub fn seal(&mut self) -> Lsn {
        let end = self.writer.next_lsn();
        self.writer.want_seal();
        while self.store.timeline().end() < end {
            self.turn();
        }
        end
    }

    /// Writes of all sizes over all places, zeroings, discards, rewrites: `records` of them, then a seal.
    pub fn mixed(&mut self, records: u64) -> Lsn {
        let sectors = self.volume_bytes / 512;
        for _ in 0..records {
            let (what, place) = (self.random() % 100, self.random());
            let length = match self.random() % 4 {
                0 => 512 * (1 + self.random() % 16),
                1 => 4096 * (1 + self.random() % 16),
                _ => 4096,
            };
            let offset = match self.random() % 3 {
                0 => place % sectors * 512,
                // A hot corner, so that much is overwritten.
                1 => place % (sectors / 16) * 512,
                _ => place % (sectors / 8) * 4096,
            };
            let length = length.min(self.volume_bytes - offset);
            let length = length.min(self.segment_bytes / 4 / 512 * 512);
            match what {
                0..3 => {
                    let length = (length * 20).min(self.volume_bytes - offset);
                    self.zero(RecordKind::Zero, offset, length);
                }
                3..5 => {
                    self.zero(RecordKind::Discard, offset, length);
                }
                _ => {
                    let payload = self.content(length as usize);
                    self.write(offset, payload);
                }
            }
        }
        self.seal()
    }

    /// Content as disks have it: some zero, some text, some noise, some of it seen before.
    fn content(&mut self, length: usize) -> Vec<u8> {
        let seed = self.random();
        match seed % 4 {
            0 => vec![0; length],
            1 => vec![(seed >> 8) as u8 % 7; length],
            2 => format!("line {} of a log file\n", seed % 5000)
                .bytes()
                .cycle()
                .take(length)
                .collect(),
            _ => {
                let mut bytes = vec![0u8; length];
                for part in bytes.chunks_mut(8) {
                    let word = self.random().to_le_bytes();
                    part.copy_from_slice(&word[..part.len()]);
                }
                bytes
            }
        }
    }

    /// The volume as of `lsn`, by applying every record to zeroes.
    #[must_use]
    pub fn image(&self, lsn: Lsn) -> Vec<u8> {
        assert!(self.remembers);
        let mut image = vec![0u8; self.volume_bytes as usize];
        for step in self.steps.iter().take_while(|step| step.lsn < lsn) {
            let at = step.offset as usize;
            image[at..at + step.zeroed as usize].fill(0);
            image[at..at + step.payload.len()].copy_from_slice(&step.payload);
        }
        image
    }

    /// Makes every map that is missing; gives their number.
    pub fn map_all(&mut self) -> u64 {
        map_all(&mut self.store).unwrap()
    }

    /// A small history in every form: sealed, settled, with maps.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn small(root: &Path, settled: bool) -> Sample {
        let sample = Sample::of_size(root, settled, 220);
        assert!(sample.store.segments().count() > 16);
        sample
    }

    /// The same of so many records.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn of_size(root: &Path, settled: bool, records: u64) -> Sample {
        let mut sample = Sample::new(root, 1 << 20, 32 << 10, true);
        sample.mixed(records);
        sample.map_all();
        if settled {
            sample.settle_all(Compression::Zstd(3));
        }
        sample
    }

    /// Settles every segment.
    pub fn settle_all(&mut self, compression: Compression) -> u64 {
        settle_all(&mut self.store, compression).unwrap()
    }
}

/// What opens the keys of a sample that is encrypted.
#[must_use]
pub fn sample_secret() -> Secret {
    Secret::KeyFile(vec![42; 64].into())
}

/// Opens a sample, with its keys if it has any.
pub fn open_keyed(root: &Path) -> Result<VolumeStore, StoreError> {
    let mut keys = StoreKeys::load(root);
    match keys.unlock(&sample_secret()) {
        Ok(()) | Err(StoreError::NoKeys) => {}
        Err(other) => return Err(other),
    }
    let (handle, made) = keys.of_volume(VOLUME);
    made?;
    VolumeStore::open_with(root, VOLUME, handle)
}

/// Makes every map that is missing; gives their number.
pub fn map_all(store: &mut VolumeStore) -> Result<u64, StoreError> {
    let mut made = 0;
    while let Some(job) = store.next_map() {
        job.run()?;
        store.add_map(&job)?;
        made += 1;
    }
    Ok(made)
}

/// Settles every segment; gives their number.
pub fn settle_all(store: &mut VolumeStore, compression: Compression) -> Result<u64, StoreError> {
    let mut settled = 0;
    while let Some(job) = store.next_to_settle(compression, &|_| false) {
        store.replace(&job.compress(1)?.prove()?)?;
        settled += 1;
    }
    Ok(settled)
}

/// Prunes all that is to be pruned; gives how many segments were written anew.
pub fn sweep(store: &mut VolumeStore, compression: Compression) -> Result<u64, StoreError> {
    let mut pruned = 0;
    while let Some(mut sweep) = store.sweep(compression) {
        loop {
            match sweep.step()? {
                Swept::Done => break,
                Swept::Read => {}
                Swept::Stays(sequence, hash) => store.stays(sequence, hash),
                Swept::Pruned(done) => {
                    store.replace_pruned(&done)?;
                    pruned += 1;
                }
            }
        }
    }
    Ok(pruned)
}

/// Keeps every instant of the last part of a history (`all` per cent of its time) and nothing before, and prunes it; gives how many segments were written
/// anew.
///
/// # Panics
/// If there is no history.
pub fn prune_to(
    store: &mut VolumeStore,
    all: i64,
    compression: Compression,
) -> Result<u64, StoreError> {
    let now = store.time_of(store.timeline().end()).unwrap();
    let begun = store.segments().next().unwrap().time_start;
    let policy = Policy {
        ladder: Ladder {
            all: Some((now.0 - begun.0) * all / 100),
            rungs: Vec::new(),
        },
        immutable: 0,
    };
    if let Some(plan) = store.plan(&policy, now).run()? {
        store.keep(&plan)?;
    }
    sweep(store, compression)
}

/// The files of a kind (`segments`, `runs`, `maps`) of the history under `root`, in order.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn files(root: &Path, kind: &str) -> Vec<PathBuf> {
    let folder = volume_directory(root, VOLUME).join(kind);
    let entries = std::fs::read_dir(folder).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// Flips a bit of a file.
///
/// # Panics
/// If it cannot be read or written.
pub fn flip(path: &Path, bit: u64) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
    std::fs::write(path, bytes).unwrap();
}

/// A file as a newer version might write it: its head says so, under its checksum.
#[must_use]
pub fn newer(bytes: &[u8]) -> Vec<u8> {
    // Behind checksum and magic: the version.
    let mut bytes = bytes.to_vec();
    bytes[8] = 99;
    let head = bytes.len().min(4096);
    let crc = varve_format::crc32c(&bytes[4..head]);
    bytes[..4].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Where two frames lie in a settled segment's file.
///
/// # Panics
/// If it is none, or has fewer.
#[must_use]
pub fn frames_of(file: &[u8], one: usize, other: usize) -> (Range<usize>, Range<usize>) {
    let header = SettledHeader::parse(&file[..4096], file.len() as u64).unwrap();
    let place = |number: usize| {
        let at = header.tables_at.get() as usize + number * FRAME_ENTRY_BYTES;
        let from = u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize;
        let length = u32::from_le_bytes(file[at + 8..at + 12].try_into().unwrap()) as usize;
        from..from + length
    };
    (place(one), place(other))
}

/// A settled segment's file that was changed, with its checksums made anew, as somebody would who wants it to be believed.
///
/// # Panics
/// If it is none.
#[must_use]
pub fn with_checksums(mut file: Vec<u8>) -> Vec<u8> {
    let mut header = SettledHeader::parse(&file[..4096], file.len() as u64).unwrap();
    let tables = header.tables_at.get() as usize;
    for number in 0..header.frame_count() as usize {
        let at = tables + number * FRAME_ENTRY_BYTES;
        let place = frames_of(&file, number, number).0;
        let crc = varve_format::frame_crc(&file[place], header.sequence.get(), number as u64);
        file[at + 12..at + 16].copy_from_slice(&crc.to_le_bytes());
    }
    let end = tables + header.tables_stored_bytes() as usize;
    header.tables_crc = varve_format::crc32c(&file[tables..end]).into();
    file[..4096].copy_from_slice(&header.to_block());
    file
}

/// The whole image at `lsn`.
///
/// # Panics
/// If it cannot be read.
#[must_use]
pub fn read(store: &VolumeStore, lsn: Lsn) -> Vec<u8> {
    let image = Image::open(store, lsn).unwrap();
    let mut bytes = vec![0; image.bytes() as usize];
    image.read(0, &mut bytes).unwrap();
    bytes
}

/// A whole scrub.
#[must_use]
pub fn scrub(store: &VolumeStore) -> Scrubbed {
    let go_on = |_, _: &Scrubbed| ControlFlow::Continue(());
    store.scrub().run(SegmentSequence(0), go_on)
}

/// Compares what is stored with its checksums.
#[must_use]
pub fn scrub_stored(store: &VolumeStore) -> Scrubbed {
    let go_on = |_, _: &Scrubbed| ControlFlow::Continue(());
    store.scrub().stored().run(SegmentSequence(0), go_on)
}

fn checkpoint() -> Checkpoint {
    Checkpoint {
        stable_lsn: Lsn(1),
        span: None,
        copy_cursor: u64::MAX,
        state: VolumeState::Protected,
        regions: Vec::new(),
    }
}
