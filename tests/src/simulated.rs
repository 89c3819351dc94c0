//! A volume on a simulated machine, driven by a random script, with a model of what it promised.
//!
//! Every write carries a stamp (request number, sector) in each of its sectors, so that each sector of origin and history names the
//! request it came from. The model remembers when each request was issued and answered, and which flush was answered after it.

mod promises;

use crate::history::History;
use crate::simulated_copies::{SPOOL_BYTES, SimCopies};
use blkfilter::{
    AckPolicy, Law, Rules, StartReport, SurvivingIdentity, SurvivingMemory, Volume, VolumeConfig,
};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use varve_format::{Fingerprint, Lsn, SegmentSequence, VolumeId, VolumeState, WallTime};
use varve_front::{Request, RequestKind};
use varve_log::{Buffer, CrashPlan, Disk, DiskFault, Medium, Memory, SimMachine, SimMedium};

const SECTOR: usize = 512;
/// Volume size: no multiple of anything round.
pub const VOLUME_BYTES: usize = 96 * 1024 + 3 * SECTOR;
const SEGMENT_BYTES: u64 = 320 * 1024;
const SEGMENT_COUNT: u64 = 24;

/// A request as the model remembers it.
#[derive(Clone, Debug)]
struct Issued {
    kind: RequestKind,
    offset: usize,
    length: usize,
    issued_at: u64,
    answered_at: Option<u64>,
    /// A flush (or the request's own force-unit-access) was answered that covers it.
    durable: bool,
    /// A power cut came before any flush: nothing is promised any more.
    lost: bool,
    ok: bool,
}

/// A request that waits for its answer.
struct InFlight {
    /// Its number.
    number: u64,
    /// When it was issued, by the model's clock and by the machine's.
    issued_at: u64,
    since_ns: u64,
}

/// What a sector holds, read from its stamp. Zero: nothing, or zeroed or discarded.
fn stamp_of(sector: &[u8]) -> u64 {
    u64::from_le_bytes(sector[..8].try_into().unwrap())
}

/// The script's parameters.
#[derive(Clone, Copy, Debug)]
pub struct Script {
    /// Seed of everything.
    pub seed: u64,
    /// Requests to issue.
    pub requests: u64,
    /// Break the log now and then.
    pub log_faults: bool,
    /// When writes are answered.
    pub ack: AckPolicy,
    /// Cut hot copies now and then, and break their spool.
    pub copies: bool,
}

/// How the run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// The power goes; unflushed writes go this way.
    Power(CrashPlan),
    /// The process is killed.
    Kill,
}

/// The simulated volume.
pub struct Simulated<R: Rules = Law> {
    /// The machine.
    pub machine: Rc<RefCell<SimMachine>>,
    medium: SimMedium,
    memory: Option<Rc<Memory>>,
    volume: Option<Volume<R>>,
    issued: Vec<Issued>,
    in_flight: HashMap<u32, InFlight>,
    clock: u64,
    next_tag: u32,
    snapshots: Vec<(Lsn, Vec<u8>)>,
    /// Reports of all starts.
    pub reports: Vec<StartReport>,
    config: VolumeConfig,
    script_random: u64,
    /// How often bypass was seen.
    pub bypasses: u64,
    /// The longest that a request has waited for its answer, by the machine's clock.
    pub longest_ns: u64,
    kernel_writes: u64,
    /// Which boot of the machine it is.
    boot: [u8; 16],
    broken: Option<String>,
    comparison: Option<Comparison>,
    /// Whether the comparison with the history flushes the origin first, as it must.
    pub flush_before_comparing: bool,
    /// Whether somebody compares a volume in doubt with its history.
    pub compares: bool,
    /// Bytes that comparisons have found equal.
    pub found_equal: u64,
    /// How many instants between were compared with what the device was then.
    pub instants: Cell<u64>,
    /// Hot copies, if the script has some.
    pub copies: Option<SimCopies>,
}

/// A comparison of the origin with the history, as the store's daemon does it.
struct Comparison {
    number: u64,
    image: Vec<u8>,
    cursor: usize,
}

impl<R: Rules> Simulated<R> {
    /// A fresh machine.
    #[must_use]
    pub fn new(script: Script) -> Simulated<R> {
        let sizes = [
            VOLUME_BYTES,
            (SEGMENT_BYTES * SEGMENT_COUNT) as usize,
            8192,
            if script.copies { SPOOL_BYTES } else { 0 },
        ];
        let machine = Rc::new(RefCell::new(SimMachine::new(script.seed, sizes)));
        let mut config = VolumeConfig::new(VolumeId([9; 16]), VOLUME_BYTES as u64, SECTOR as u32);
        config.region_bytes = 8192;
        config.open_regions_max = 12;
        config.stable_bytes = 96 << 10;
        config.stable_interval_ns = 20_000_000;
        config.heal_interval_ns = 5_000_000;
        config.verify_wait_ns = 20_000_000;
        config.segment_bytes = SEGMENT_BYTES;
        config.segment_count = SEGMENT_COUNT;
        config.slots = 6;
        config.depth = 16;
        config.copy_bytes = 16384;
        config.ack = script.ack;
        Simulated {
            medium: SimMedium::new(&machine),
            machine,
            memory: None,
            volume: None,
            issued: Vec::new(),
            in_flight: HashMap::new(),
            clock: 0,
            next_tag: 0,
            snapshots: Vec::new(),
            reports: Vec::new(),
            config,
            script_random: script.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            bypasses: 0,
            longest_ns: 0,
            kernel_writes: 0,
            boot: [1; 16],
            broken: None,
            comparison: None,
            flush_before_comparing: true,
            compares: true,
            found_equal: 0,
            instants: Cell::new(0),
            copies: None,
        }
        .with_copies(script.copies)
    }

    fn with_copies(mut self, wanted: bool) -> Simulated<R> {
        self.copies = wanted.then(|| SimCopies::new(&self.machine, VOLUME_BYTES));
        self
    }

    fn random(&mut self, below: u64) -> u64 {
        self.script_random ^= self.script_random << 13;
        self.script_random ^= self.script_random >> 7;
        self.script_random ^= self.script_random << 17;
        self.script_random % below
    }

    fn crashed(&self) -> bool {
        self.machine.borrow().is_crashed()
    }

    /// Starts the volume. False: the machine crashed meanwhile.
    pub fn start(&mut self) -> bool {
        let bytes = SurvivingMemory::bytes_needed(&self.config);
        let memory = self
            .memory
            .get_or_insert_with(|| Memory::anonymous(bytes).unwrap())
            .clone();
        let identity = SurvivingIdentity {
            boot: "boot".to_owned(),
            device: "device".to_owned(),
            volume: self.config.volume,
        };
        let surviving = SurvivingMemory::new(memory, &identity);
        let kernel = Fingerprint {
            kernel_writes: self.kernel_writes,
            boot: self.boot,
            ..Fingerprint::default()
        };
        match Volume::start(&mut self.medium, self.config, surviving, kernel, None) {
            Ok((mut volume, report)) => {
                if let Some(copies) = self.copies.as_mut()
                    && !copies.attach(&mut volume, &mut self.medium)
                {
                    return false;
                }
                if report.in_bypass {
                    let end = self.history().end;
                    self.snapshots.retain(|(lsn, _)| *lsn <= end);
                    if let Some(copies) = self.copies.as_mut() {
                        copies.forget_instants_above(end);
                    }
                }
                self.reports.push(report);
                self.volume = Some(volume);
                !self.crashed()
            }
            Err(error) => {
                assert!(self.crashed(), "the volume did not start: {error}");
                false
            }
        }
    }

    /// One turn: run, maybe one completion, answers. False: crashed.
    fn turn(&mut self) -> bool {
        if self.volume.is_some() && self.random(3) == 0 && self.compares {
            self.compare_some();
        }
        let Some(volume) = self.volume.as_mut() else {
            return false;
        };
        volume.run(&mut self.medium);
        match self.medium.poll(false) {
            Some(completion) => {
                volume.complete(&mut self.medium, completion);
                volume.run(&mut self.medium);
            }
            None => self.machine.borrow_mut().advance(1_000_000),
        }
        if self.machine.borrow().is_crashed() {
            return false;
        }
        if let Some(copies) = self.copies.as_mut() {
            let random = self.machine.borrow_mut().random();
            copies.follow(volume, &mut self.medium, random);
        }
        let now = self.medium.now().monotonic_ns;
        while let Some(answer) = volume.take_answer() {
            self.clock += 1;
            let Some(waiting) = self.in_flight.remove(&answer.tag) else {
                continue;
            };
            let (at, issued_at) = (self.clock, waiting.issued_at);
            self.longest_ns = self.longest_ns.max(now - waiting.since_ns);
            let request = &mut self.issued[waiting.number as usize];
            request.answered_at = Some(at);
            request.ok = answer.result.is_ok();
            let kind = request.kind;
            if kind == RequestKind::Flush && answer.result.is_ok() {
                for earlier in self
                    .issued
                    .iter_mut()
                    .filter(|r| r.ok && !r.lost && r.answered_at.is_some_and(|a| a < issued_at))
                {
                    earlier.durable = true;
                }
            }
        }
        true
    }

    /// If a comparison is wanted, does some of it.
    fn compare_some(&mut self) {
        const BLOCK: usize = 4096;
        let Some(status) = self.volume.as_ref().map(Volume::status) else {
            return;
        };
        if status.verify_wanted == 0 {
            self.comparison = None;
            return;
        }
        let number = status.verify_wanted;
        if self.comparison.as_ref().is_none_or(|c| c.number != number) {
            // The store holds what is durable in the log, at most.
            let history = self.history();
            let end = history.end.min(status.log.durable_lsn);
            if self.flush_before_comparing {
                self.machine.borrow_mut().disk(Disk::Origin).flush_all();
            }
            self.comparison = Some(Comparison {
                number,
                image: history.image(end, VOLUME_BYTES),
                cursor: 0,
            });
        }
        let Some(comparison) = self.comparison.as_mut() else {
            return;
        };
        let end = (comparison.cursor + 4 * BLOCK).min(VOLUME_BYTES);
        let mut equal = Vec::new();
        for at in (comparison.cursor..end).step_by(BLOCK) {
            let stop = (at + BLOCK).min(VOLUME_BYTES);
            if self.machine.borrow().content(Disk::Origin)[at..stop] == comparison.image[at..stop] {
                equal.push((at as u64, (stop - at) as u64));
            }
        }
        comparison.cursor = end;
        let below = if end == VOLUME_BYTES {
            u64::MAX
        } else {
            end as u64
        };
        let now = self.medium.now().monotonic_ns;
        if let Some(volume) = self.volume.as_mut()
            && volume.verified(now, number, below, &equal)
        {
            self.found_equal += equal.iter().map(|range| range.1).sum::<u64>();
        }
    }

    fn issue(&mut self, kind: RequestKind, offset: usize, length: usize, force_unit_access: bool) {
        let number = self.issued.len() as u64;
        let tag = self.next_tag;
        self.next_tag += 1;
        self.clock += 1;
        let buffer = (kind == RequestKind::Write).then(|| {
            let buffer = Buffer::anonymous(length).unwrap();
            buffer.write_with(|bytes| {
                for (index, sector) in bytes.chunks_mut(SECTOR).enumerate() {
                    sector.fill(number as u8);
                    sector[..8].copy_from_slice(&(number + 1).to_le_bytes());
                    sector[8..16]
                        .copy_from_slice(&((offset / SECTOR + index) as u64).to_le_bytes());
                }
            });
            buffer
        });
        self.issued.push(Issued {
            kind,
            offset,
            length,
            issued_at: self.clock,
            answered_at: None,
            durable: false,
            lost: false,
            ok: false,
        });
        let waiting = InFlight {
            number,
            issued_at: self.clock,
            since_ns: self.medium.now().monotonic_ns,
        };
        self.in_flight.insert(tag, waiting);
        let request = Request {
            tag,
            kind,
            offset: offset as u64,
            length: length as u64,
            force_unit_access,
            buffer,
        };
        if let Some(volume) = self.volume.as_mut() {
            volume.submit(&mut self.medium, request);
        }
    }

    /// Drives the volume through the script until it ends (true) or the machine crashes (false).
    pub fn run(&mut self, script: Script) -> bool {
        for step in 0..script.requests {
            let since = self.machine.borrow().operations();
            for turn in 0.. {
                if self.in_flight.len() < 8 {
                    break;
                }
                if !self.turn() {
                    return false;
                }
                assert!(
                    turn < 100_000,
                    "no answer any more since operation {since}: {:?}",
                    self.status()
                );
            }
            let choice = self.random(100);
            let length = (1 + self.random(if choice < 10 { 48 } else { 10 })) as usize * SECTOR;
            let offset = if self.random(3) == 0 {
                8192
            } else {
                self.random(((VOLUME_BYTES - length) / SECTOR) as u64 + 1) as usize * SECTOR
            };
            let fua = self.random(12) == 0;
            match choice {
                0..70 => self.issue(RequestKind::Write, offset, length, fua),
                70..82 => self.issue(RequestKind::Flush, 0, 0, false),
                82..88 => self.issue(RequestKind::Zero, offset, length, fua),
                88..92 => self.issue(RequestKind::Discard, offset, length, false),
                92..95 => self.volume.as_mut().unwrap().seal(),
                95 => self.snapshot_when_idle(),
                96.. if self.copies.is_some() => self.change_copies(),
                _ => self.machine.borrow_mut().advance(3_000_000),
            }
            if script.log_faults && step % 25 == 12 {
                let fault = [DiskFault::Stalled, DiskFault::FailWrites][self.random(2) as usize];
                self.machine.borrow_mut().disk(Disk::Log).fault = fault;
            }
            if let Some(copies) = self.copies.as_ref().filter(|_| script.log_faults) {
                match step % 20 {
                    9 => copies.fault(if script.seed.is_multiple_of(2) {
                        DiskFault::FailWrites
                    } else {
                        DiskFault::Stalled
                    }),
                    14 => copies.fault(DiskFault::None),
                    _ => {}
                }
            }
            if step % 25 == 22 {
                self.machine.borrow_mut().disk(Disk::Log).fault = DiskFault::None;
            }
            for _ in 0..self.random(6) {
                if !self.turn() {
                    return false;
                }
            }
            self.bypasses +=
                u64::from(self.volume.as_ref().unwrap().state() == VolumeState::Bypass);
        }
        self.settle()
    }

    /// Writes until so many writes have gone past the log. False: it never comes to that.
    pub fn run_in_bypass(&mut self, writes: u64) -> bool {
        let mut past = 0;
        for _ in 0..5000 {
            if self.in_flight.len() < 6 {
                let offset = self.random((VOLUME_BYTES / 4096) as u64 - 1) as usize * 4096;
                self.issue(RequestKind::Write, offset, 4096, false);
                let state = self.volume.as_ref().map(|volume| volume.state());
                past += u64::from(state == Some(VolumeState::Bypass));
            }
            if !self.turn() {
                return false;
            }
            if past > writes && self.in_flight.is_empty() || past > writes + 6 {
                return true;
            }
        }
        false
    }

    /// Runs until every request is answered and the volume is protected again. False: crashed.
    pub fn settle(&mut self) -> bool {
        let fault = self.machine.borrow_mut().disk(Disk::Log).fault;
        if fault != DiskFault::IgnoreFlush {
            self.machine.borrow_mut().disk(Disk::Log).fault = DiskFault::None;
        }
        if let Some(copies) = &self.copies {
            copies.fault(DiskFault::None);
        }
        for _ in 0..200_000 {
            let volume = self.volume.as_ref().unwrap();
            if self.in_flight.is_empty()
                && volume.state() == VolumeState::Protected
                && !volume.in_span()
                && volume.is_idle()
            {
                break;
            }
            if !self.turn() {
                return false;
            }
        }
        let state = self.volume.as_ref().unwrap().state();
        assert_eq!(
            state,
            VolumeState::Protected,
            "never settled: {:?}",
            self.volume.as_ref().unwrap().status()
        );
        let end = self.volume.as_ref().unwrap().next_lsn();
        self.volume.as_mut().unwrap().seal();
        for _ in 0..100_000 {
            if self.volume.as_ref().unwrap().durable_lsn() >= end {
                return true;
            }
            if !self.turn() {
                return false;
            }
        }
        panic!("the log never became durable");
    }

    fn change_copies(&mut self) {
        let random = self.random(1 << 20);
        if let (Some(copies), Some(volume)) = (self.copies.as_mut(), self.volume.as_mut()) {
            copies.change(volume, random);
        }
    }

    /// Takes the origin's content as an oracle if the volume happens to be idle and in no span.
    fn snapshot_when_idle(&mut self) {
        for _ in 0..2000 {
            let volume = self.volume.as_ref().unwrap();
            if volume.is_idle() && volume.state() == VolumeState::Protected && !volume.in_span() {
                let lsn = volume.next_lsn();
                self.snapshots
                    .push((lsn, self.machine.borrow().content(Disk::Origin).to_vec()));
                return;
            }
            if !self.turn() {
                return;
            }
        }
    }

    /// The process or the machine is gone.
    pub fn cut(&mut self, cut: Cut) {
        let promised = self
            .volume
            .take()
            .filter(|v| v.state() != VolumeState::Bypass)
            .map_or(Lsn(0), |v| v.durable_lsn());
        self.in_flight.clear();
        match cut {
            Cut::Power(plan) => {
                self.machine.borrow_mut().power_cut(plan);
                self.memory = None;
                if let Some(copies) = self.copies.as_mut() {
                    copies.power_cut();
                }
                for request in self.issued.iter_mut().filter(|request| !request.durable) {
                    request.lost = true;
                }
                // What the log had not made durable is not history any more.
                let end = self.history().end;
                if end < promised {
                    self.broken = Some(format!(
                        "records below {promised} were durable, the log ends at {end}"
                    ));
                }
                self.snapshots.retain(|(lsn, _)| *lsn <= end);
                if let Some(copies) = self.copies.as_mut() {
                    copies.forget_instants_above(end);
                }
            }
            Cut::Kill => {
                self.machine.borrow_mut().kill_process();
            }
        }
    }

    /// A write is answered; a flush that nobody asked for fails; then somebody asks for one. Whether he is told that all is well.
    pub fn flush_after_one_that_failed_for_nobody(&mut self) -> bool {
        let all_answered = |sim: &mut Self| {
            while !sim.in_flight.is_empty() {
                assert!(sim.turn());
            }
        };
        self.issue(RequestKind::Write, 4096, 4096, false);
        all_answered(self);
        self.machine.borrow_mut().disk(Disk::Origin).fault = DiskFault::FailWrites;
        let before = self.status().origin_errors;
        for _ in 0..10_000 {
            if self.status().origin_errors > before {
                break;
            }
            assert!(self.turn());
        }
        assert!(self.status().origin_errors > before, "no flush has failed");
        self.machine.borrow_mut().disk(Disk::Origin).fault = DiskFault::None;
        self.issue(RequestKind::Flush, 0, 0, false);
        all_answered(self);
        self.issued.last().unwrap().ok
    }

    /// Seals the open segment, so that all of the log can be taken.
    pub fn seal(&mut self) {
        assert!(self.settle());
        for _ in 0..100_000 {
            if self.volume.as_ref().unwrap().segment_is_empty() {
                // The header of the next one lands a moment later.
                for _ in 0..50 {
                    assert!(self.turn());
                }
                return;
            }
            assert!(self.turn());
        }
        panic!("the segment is never sealed");
    }

    /// Tells the volume where the history ends, behind its log.
    pub fn go_on_above(&mut self, end: (SegmentSequence, Lsn), since: WallTime) -> bool {
        let volume = self.volume.as_mut().unwrap();
        volume.go_on_above(&mut self.medium, end, since)
    }

    /// Closes the volume cleanly.
    pub fn close(&mut self) {
        let (kernel_writes, boot) = (self.kernel_writes, self.boot);
        let kernel = || Fingerprint {
            kernel_writes,
            boot,
            ..Fingerprint::default()
        };
        self.volume
            .take()
            .unwrap()
            .close(&mut self.medium, kernel)
            .unwrap();
    }

    /// The regions that may be open at once, from the next start on.
    pub fn limit_open_regions(&mut self, most: usize) {
        self.config.open_regions_max = most;
    }

    /// How the volume is set up.
    #[must_use]
    pub fn config(&self) -> &VolumeConfig {
        &self.config
    }

    /// The volume's figures.
    #[must_use]
    pub fn status(&self) -> blkfilter::VolumeStatus {
        self.volume.as_ref().unwrap().status()
    }

    /// The state now.
    #[must_use]
    pub fn state(&self) -> VolumeState {
        self.volume.as_ref().unwrap().state()
    }

    /// What the log disk holds.
    #[must_use]
    pub fn history(&self) -> History {
        History::read(
            self.machine.borrow().content(Disk::Log),
            SEGMENT_BYTES,
            SEGMENT_COUNT,
        )
    }

    /// Writes to the origin without Varve.
    pub fn tamper(&mut self, offset: usize, data: &[u8]) {
        self.machine
            .borrow_mut()
            .disk(Disk::Origin)
            .tamper(offset, data);
        self.kernel_writes += 1;
    }

    /// The machine is booted.
    pub fn boot_again(&mut self) {
        self.kernel_writes = 0;
        self.boot[0] += 1;
    }

    /// The same under another system, which was booted in between: the counter begins anew there.
    pub fn tamper_elsewhere(&mut self, offset: usize, data: &[u8]) {
        self.tamper(offset, data);
        self.boot_again();
    }

    /// The same, into the origin's cache only.
    pub fn scribble(&mut self, offset: usize, data: &[u8]) {
        self.machine
            .borrow_mut()
            .disk(Disk::Origin)
            .scribble(offset, data);
        self.kernel_writes += 1;
    }

    /// Forgets what was promised about the origin's content (after tampering).
    pub fn forget_flushed(&mut self) {
        for request in &mut self.issued {
            request.durable = false;
        }
    }
}
