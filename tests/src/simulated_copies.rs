//! Hot copies on the simulated machine: cut at any moment of a script, read through the same view as the real device's reader, remembered.
//!
//! Two oracles: the image of the log at the LSN of the cut, and what the copy showed when it was announced. It must never show anything else.

use crate::history::History;
use blkfilter::hot_copy::{CopyMemory, HotCopies, HotCopy, Source, SpoolMemory, View};
use blkfilter::{Rules, Volume};
use std::cell::RefCell;
use std::rc::Rc;
use varve_format::{Lsn, SPOOL_EXTENT_PAGES, SPOOL_EXTENTS_AT, VolumeState, crc32c};
use varve_log::{Disk, Memory, SimMachine, SimMedium};

const BLOCK: usize = 4096;
/// Extents of the spool: room for a few generations of the whole volume, so that extents are used again and sometimes there is none.
const EXTENTS: u64 = 6;
/// Size of the spool's disk.
pub const SPOOL_BYTES: usize = (SPOOL_EXTENTS_AT + EXTENTS * SPOOL_EXTENT_PAGES * 4096) as usize;
const COPIES_MAX: usize = 4;
const SPOOL: [u8; 16] = [5; 16];
const IDENTITY: [u8; 16] = [6; 16];

struct SimCopy {
    generation: u32,
    memory: Rc<Memory>,
    persist: bool,
    lsn: Lsn,
    cut: u64,
    flush: Option<u64>,
    /// What it showed when it was announced; from then on it is promised.
    content: Option<Vec<u8>>,
    /// Recorded (durably) as valid no more.
    lost: bool,
}

/// The copies, and what lasts of them.
pub struct SimCopies {
    machine: Rc<RefCell<SimMachine>>,
    volume_bytes: usize,
    spool: Rc<Memory>,
    copies: Vec<SimCopy>,
    generation_last: u32,
    /// Copies cut, announced, lost; announced ones found again after a power cut.
    pub counts: [u64; 4],
    broken: Option<String>,
}

fn copy_of(copy: &SimCopy, volume_bytes: usize) -> CopyMemory {
    CopyMemory::new(Rc::clone(&copy.memory), volume_bytes as u64)
}

impl SimCopies {
    /// No copies.
    #[must_use]
    pub fn new(machine: &Rc<RefCell<SimMachine>>, volume_bytes: usize) -> SimCopies {
        let spool = Memory::anonymous(SpoolMemory::bytes_needed(EXTENTS)).unwrap();
        let memory = SpoolMemory::new(Rc::clone(&spool), EXTENTS);
        memory.format(IDENTITY, SPOOL);
        memory.complete();
        SimCopies {
            machine: Rc::clone(machine),
            volume_bytes,
            spool,
            copies: Vec::new(),
            generation_last: 0,
            counts: [0; 4],
            broken: None,
        }
    }

    fn spool_memory(&self) -> SpoolMemory {
        SpoolMemory::new(Rc::clone(&self.spool), EXTENTS)
    }

    /// The volume has started: its copies, too. False: the machine crashed meanwhile.
    pub fn attach<R: Rules>(&mut self, volume: &mut Volume<R>, medium: &mut SimMedium) -> bool {
        let memory = self.spool_memory();
        let hot = if memory.is(IDENTITY, SPOOL) {
            self.generation_last = self.generation_last.max(memory.relink());
            // Nobody was told of these.
            self.copies.retain(|copy| copy.content.is_some());
            let copies = self.copies.iter();
            let copies =
                copies.map(|copy| HotCopy::new(copy_of(copy, self.volume_bytes), copy.persist));
            HotCopies::new(memory, SPOOL, copies.collect())
        } else {
            memory.format(IDENTITY, SPOOL);
            // What lasts: announced, and not recorded as lost.
            self.copies
                .retain(|copy| copy.persist && copy.content.is_some() && !copy.lost);
            let copies = self.copies.iter().map(|copy| {
                let memory = copy_of(copy, self.volume_bytes);
                memory.format(IDENTITY, copy.generation);
                memory.changed().clear_all();
                HotCopy::new(memory, true)
            });
            let Ok((hot, newest)) = HotCopies::rebuild(medium, memory, SPOOL, copies.collect())
            else {
                assert!(
                    self.machine.borrow().is_crashed(),
                    "the spool cannot be read"
                );
                return false;
            };
            self.generation_last = self.generation_last.max(newest);
            self.counts[3] += self.copies.len() as u64;
            self.spool_memory().complete();
            hot
        };
        volume.attach_copies(hot);
        true
    }

    /// The power is cut: memory is gone.
    pub fn power_cut(&mut self) {
        self.spool = Memory::anonymous(SpoolMemory::bytes_needed(EXTENTS)).unwrap();
        self.generation_last = self.copies.iter().map(|c| c.generation).max().unwrap_or(0);
    }

    /// The history was lost from there on, and its numbers are used again: they say nothing of older copies.
    pub fn forget_instants_above(&mut self, end: Lsn) {
        for copy in self.copies.iter_mut().filter(|copy| copy.lsn > end) {
            copy.lsn = Lsn(0);
        }
    }

    /// Cuts a copy, or removes one.
    pub fn change<R: Rules>(&mut self, volume: &mut Volume<R>, random: u64) {
        let full = self.copies.len() >= COPIES_MAX;
        if full || (random.is_multiple_of(3) && !self.copies.is_empty()) {
            let copy = self
                .copies
                .remove((random / 3) as usize % self.copies.len());
            volume.remove_copy(copy.generation);
            return;
        }
        if self
            .copies
            .iter()
            .any(|copy| copy_of(copy, self.volume_bytes).lost().is_some())
        {
            // As the daemon has it: first the lost ones go.
            for copy in self.copies.drain(..) {
                volume.remove_copy(copy.generation);
            }
            return;
        }
        self.generation_last += 1;
        let bytes = CopyMemory::bytes_needed(self.volume_bytes as u64);
        let copy = SimCopy {
            generation: self.generation_last,
            memory: Memory::anonymous(bytes).unwrap(),
            persist: random.is_multiple_of(2),
            // In bypass and in spans no LSN means this instant.
            lsn: if volume.state() == VolumeState::Protected && !volume.in_span() {
                volume.next_lsn()
            } else {
                Lsn(0)
            },
            cut: 0,
            flush: None,
            content: None,
            lost: false,
        };
        let memory = copy_of(&copy, self.volume_bytes);
        memory.format(IDENTITY, copy.generation);
        let cut = volume.cut_copy(HotCopy::new(memory, copy.persist)).unwrap();
        self.counts[0] += 1;
        self.copies.push(SimCopy { cut, ..copy });
    }

    /// After a turn: announces copies that have settled, records losses.
    pub fn follow<R: Rules>(
        &mut self,
        volume: &mut Volume<R>,
        medium: &mut SimMedium,
        random: u64,
    ) {
        let waiting: Vec<usize> = (0..self.copies.len())
            .filter(|index| self.copies[*index].content.is_none())
            .collect();
        for index in waiting {
            let copy = &mut self.copies[index];
            if !volume.is_settled(copy.cut) {
                continue;
            }
            if copy.persist {
                let generation = *copy
                    .flush
                    .get_or_insert_with(|| volume.flush_origin(medium));
                if !volume.is_flushed(generation) {
                    continue;
                }
            }
            if copy_of(copy, self.volume_bytes).lost().is_some() {
                copy.content = Some(Vec::new());
                continue;
            }
            match self.read(index) {
                Ok(content) => {
                    self.copies[index].content = Some(content);
                    self.counts[1] += 1;
                }
                Err(broken) => self.broken = Some(broken),
            }
        }
        if let Some(hot) = volume.copies_mut() {
            self.counts[2] += u64::from(hot.take_alert().is_some());
            // The record takes its time.
            if hot.mark_wanted() && random.is_multiple_of(5) {
                self.copies.iter_mut().for_each(|copy| copy.lost = true);
                hot.marked();
            }
        }
    }

    fn read(&self, index: usize) -> Result<Vec<u8>, String> {
        let copy = &self.copies[index];
        let view = View::new(self.spool_memory(), copy_of(copy, self.volume_bytes));
        let mut content = vec![0u8; self.volume_bytes.next_multiple_of(BLOCK)];
        let machine = self.machine.borrow();
        for (block, target) in content.chunks_mut(BLOCK).enumerate() {
            let at = block * BLOCK;
            match view.source(block as u64) {
                Source::Origin => {
                    let end = (at + BLOCK).min(self.volume_bytes);
                    target[..end - at].copy_from_slice(&machine.content(Disk::Origin)[at..end]);
                }
                Source::Spool(saved) => {
                    if !view.read_buffered(saved, target) {
                        let from = SPOOL_EXTENTS_AT as usize + saved.page as usize * BLOCK;
                        target.copy_from_slice(&machine.content(Disk::Spool)[from..from + BLOCK]);
                    }
                    if crc32c(target) != saved.crc {
                        return Err(format!(
                            "copy {}: block {block} in page {} does not match its CRC",
                            copy.generation, saved.page
                        ));
                    }
                }
                other => {
                    return Err(format!(
                        "copy {}: block {block}: {other:?}",
                        copy.generation
                    ));
                }
            }
        }
        content.truncate(self.volume_bytes);
        Ok(content)
    }

    /// Every valid copy still shows what it showed, and that is the image at its LSN.
    pub fn check(&self, history: &History) -> Result<(), String> {
        if let Some(broken) = &self.broken {
            return Err(broken.clone());
        }
        for (index, copy) in self.copies.iter().enumerate() {
            let Some(promised) = &copy.content else {
                continue;
            };
            if copy_of(copy, self.volume_bytes).lost().is_some() || promised.is_empty() {
                continue;
            }
            let content = self.read(index)?;
            let differs = |other: &[u8]| {
                (0..self.volume_bytes / 512)
                    .find(|sector| content[sector * 512..][..512] != other[sector * 512..][..512])
            };
            let stamp = |bytes: &[u8], sector: usize| {
                u64::from_le_bytes(bytes[sector * 512..][..8].try_into().unwrap())
            };
            if let Some(sector) = differs(promised) {
                return Err(format!(
                    "copy {} (persist {}): sector {sector} holds request {}, when the copy was announced it was {}",
                    copy.generation,
                    copy.persist,
                    stamp(&content, sector),
                    stamp(promised, sector)
                ));
            }
            // The records up to the cut may have been given up in a bypass or a power cut.
            let recorded = copy.lsn > Lsn(1) && history.entries.contains_key(&Lsn(copy.lsn.0 - 1));
            if recorded
                && history.resolves(copy.lsn)
                && let Some(sector) = differs(&history.image(copy.lsn, self.volume_bytes))
            {
                let image = history.image(copy.lsn, self.volume_bytes);
                return Err(format!(
                    "copy {}: sector {sector} holds request {}, in the image at {} it is {}",
                    copy.generation,
                    stamp(&content, sector),
                    copy.lsn,
                    stamp(&image, sector)
                ));
            }
        }
        Ok(())
    }

    /// Breaks the spool's disk, or mends it.
    pub fn fault(&self, fault: varve_log::DiskFault) {
        self.machine.borrow_mut().disk(Disk::Spool).fault = fault;
    }
}
