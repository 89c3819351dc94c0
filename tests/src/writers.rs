//! Writers under full load that stamp every sector with {CRC, sequence, sector, time}, and an oracle of what any instant of theirs must look like.
//!
//! Each writer has a lane of sectors of its own (lanes meet in the middle of blocks) and one write in flight. So a copy shows of each lane exactly its
//! first N writes; and no write that was answered before another was issued may be missing if the other is there. One clock orders all of it, over
//! several devices, too.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use varve_format::crc32c;
use varve_log::Buffer;

const SECTOR: usize = 512;
const O_DIRECT: i32 = 0o40000;
/// Longest write: 64 KiB.
const SECTORS_MAX: u64 = 128;

/// One write of a lane.
#[derive(Clone, Copy, Debug)]
struct Written {
    sequence: u64,
    first: u64,
    sectors: u64,
    issued: u64,
    /// `u64::MAX` until it is answered.
    answered: u64,
}

struct Lane {
    device: usize,
    first: u64,
    sectors: u64,
    writes: Mutex<Vec<Written>>,
}

struct Shared {
    clock: AtomicU64,
    stop: AtomicBool,
    failed: Mutex<Option<String>>,
    lanes: Vec<Lane>,
}

/// The writers.
pub struct Writers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What was certain before a copy was asked for: how many writes of each lane were answered.
pub struct Before(Vec<usize>);

/// What a copy holds: the number of writes of each lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held(Vec<usize>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn stamp(target: &mut [u8], sequence: u64, sector: u64) {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    target.fill(sequence as u8);
    target[4..12].copy_from_slice(&sequence.to_le_bytes());
    target[12..20].copy_from_slice(&sector.to_le_bytes());
    target[20..28].copy_from_slice(&(since.map_or(0, |t| t.as_nanos() as u64)).to_le_bytes());
    let crc = crc32c(&target[4..]);
    target[..4].copy_from_slice(&crc.to_le_bytes());
}

/// The sequence in a sector; zero if nobody wrote it.
fn read_stamp(bytes: &[u8], sector: u64) -> Result<u64, String> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(0);
    }
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default());
    let crc = u32::from_le_bytes(bytes[..4].try_into().unwrap_or_default());
    if crc != crc32c(&bytes[4..]) || word(12) != sector {
        return Err(format!(
            "sector {sector} is torn or another's: it says {}",
            word(12)
        ));
    }
    Ok(word(4))
}

impl Writers {
    /// Starts `per_device` writers on each device (or file), which must be zero in its first `sectors` sectors.
    pub fn start(devices: &[&str], per_device: u64, sectors: u64) -> Result<Writers, String> {
        let mut lanes = Vec::new();
        for device in 0..devices.len() {
            // Borders in the middle of blocks: neighbours share them.
            let border = |lane: u64| match lane {
                0 => 0,
                _ if lane == per_device => sectors,
                _ => sectors / per_device * lane / 8 * 8 + 3,
            };
            for lane in 0..per_device {
                lanes.push(Lane {
                    device,
                    first: border(lane),
                    sectors: border(lane + 1) - border(lane),
                    writes: Mutex::new(Vec::new()),
                });
            }
        }
        let shared = Arc::new(Shared {
            clock: AtomicU64::new(1),
            stop: AtomicBool::new(false),
            failed: Mutex::new(None),
            lanes,
        });
        let mut threads = Vec::new();
        for index in 0..shared.lanes.len() {
            let path = devices[shared.lanes[index].device].to_owned();
            let file = File::options()
                .write(true)
                .custom_flags(O_DIRECT)
                .open(&path)
                .map_err(|e| format!("{path}: {e}"))?;
            let shared = Arc::clone(&shared);
            threads.push(std::thread::spawn(move || {
                if let Err(why) = shared.write(index, &file) {
                    *lock(&shared.failed) = Some(format!("{path}: {why}"));
                }
            }));
        }
        Ok(Writers { shared, threads })
    }

    /// What is certain now.
    #[must_use]
    pub fn before(&self) -> Before {
        let answered = |lane: &Lane| {
            let writes = lock(&lane.writes);
            let open = writes.last().is_some_and(|last| last.answered == u64::MAX);
            writes.len() - usize::from(open)
        };
        Before(self.shared.lanes.iter().map(answered).collect())
    }

    /// Ends the writers; any error of theirs is one here. Gives how many writes there were.
    pub fn stop(&mut self) -> Result<usize, String> {
        self.shared.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        if let Some(why) = lock(&self.shared.failed).take() {
            return Err(format!("a writer failed: {why}"));
        }
        Ok(self
            .shared
            .lanes
            .iter()
            .map(|lane| lock(&lane.writes).len())
            .sum())
    }

    /// Reads copies of the devices (in their order), and says what they hold: a prefix of each lane, with all of `before`, and nothing that was issued
    /// after something that is missing had been answered.
    pub fn check(&self, copies: &[&str], before: &Before) -> Result<Held, String> {
        let mut held = Vec::new();
        let mut newest_issue = 0;
        for (index, lane) in self.shared.lanes.iter().enumerate() {
            let path = copies[lane.device];
            let writes = lock(&lane.writes).clone();
            let found = read_lane(path, lane)?;
            let newest = found.iter().copied().max().unwrap_or(0);
            let count = writes.partition_point(|write| write.sequence <= newest);
            if newest > 0 && writes.get(count.wrapping_sub(1)).map(|w| w.sequence) != Some(newest) {
                return Err(format!("{path}: sequence {newest}, which nobody wrote"));
            }
            if count < before.0[index] {
                return Err(format!(
                    "{path}: lane {index} holds {count} writes, {} were answered before the copy was asked for",
                    before.0[index]
                ));
            }
            let mut model = vec![0u64; lane.sectors as usize];
            for write in &writes[..count] {
                let start = (write.first - lane.first) as usize;
                model[start..start + write.sectors as usize].fill(write.sequence);
                newest_issue = newest_issue.max(write.issued);
            }
            if let Some(sector) = (0..found.len()).find(|sector| found[*sector] != model[*sector]) {
                return Err(format!(
                    "{path}: sector {} holds sequence {}, with {count} writes of lane {index} (the newest: {newest}) it is {}",
                    lane.first + sector as u64,
                    found[sector],
                    model[sector]
                ));
            }
            held.push(count);
        }
        for (index, lane) in self.shared.lanes.iter().enumerate() {
            if let Some(missing) = lock(&lane.writes).get(held[index])
                && missing.answered < newest_issue
            {
                return Err(format!(
                    "{}: write {} of lane {index} is missing, though it was answered before a write was issued that is there",
                    copies[lane.device], held[index]
                ));
            }
        }
        Ok(Held(held))
    }
}

impl Shared {
    fn write(&self, index: usize, file: &File) -> std::io::Result<()> {
        let lane = &self.lanes[index];
        let buffer = Buffer::anonymous(SECTORS_MAX as usize * SECTOR)?;
        let mut random = (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut next = |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        for sequence in 1.. {
            if self.stop.load(Ordering::Acquire) {
                return Ok(());
            }
            // Most are whole blocks; some begin or end inside one; a few are long.
            let (sectors, align) = match next(10) {
                0..6 => (8, 8),
                6..9 => (1 + next(20), 1),
                _ => (1 + next(SECTORS_MAX - 1), 1),
            };
            let mut first = lane.first + next(lane.sectors - sectors + 1);
            if align == 8 && first / 8 * 8 >= lane.first {
                first = first / 8 * 8;
            }
            let length = sectors as usize * SECTOR;
            buffer.write_with(|bytes| {
                for (number, sector) in bytes[..length].chunks_mut(SECTOR).enumerate() {
                    stamp(sector, sequence, first + number as u64);
                }
            });
            let issued = self.clock.fetch_add(1, Ordering::AcqRel);
            lock(&lane.writes).push(Written {
                sequence,
                first,
                sectors,
                issued,
                answered: u64::MAX,
            });
            buffer.read_with(|bytes| file.write_all_at(&bytes[..length], first * SECTOR as u64))?;
            let answered = self.clock.fetch_add(1, Ordering::AcqRel);
            if let Some(last) = lock(&lane.writes).last_mut() {
                last.answered = answered;
            }
        }
        Ok(())
    }
}

fn read_lane(path: &str, lane: &Lane) -> Result<Vec<u64>, String> {
    let file = File::options()
        .read(true)
        .custom_flags(O_DIRECT)
        .open(path)
        .map_err(|e| format!("{path}: {e}"))?;
    let chunk = 1 << 20;
    let buffer = Buffer::anonymous(chunk).map_err(|e| e.to_string())?;
    let mut found = Vec::with_capacity(lane.sectors as usize);
    let end = lane.first + lane.sectors;
    let mut sector = lane.first / 8 * 8;
    while sector < end {
        let length = (((end - sector) as usize).next_multiple_of(8) * SECTOR).min(chunk);
        let read = buffer
            .write_with(|bytes| file.read_at(&mut bytes[..length], sector * SECTOR as u64))
            .map_err(|e| format!("{path}: reading sector {sector}: {e}"))?;
        if read == 0 {
            return Err(format!("{path} ends at sector {sector}"));
        }
        buffer.read_with(|bytes| -> Result<(), String> {
            for bytes in bytes[..read].chunks_exact(SECTOR) {
                if sector >= lane.first && sector < end {
                    found.push(read_stamp(bytes, sector)?);
                }
                sector += 1;
            }
            Ok(())
        })?;
    }
    Ok(found)
}
