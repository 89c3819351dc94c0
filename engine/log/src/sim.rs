//! A simulated machine: disks with volatile caches, a clock and a scheduler, all driven by one seed.
//!
//! Operations complete in random order. A disk acknowledges writes into its cache; only a flush makes durable what had completed
//! before the flush was submitted. At a crash each sector of each write that is not durable is independently kept or lost (torn), in
//! flight or completed; a kept older write never covers a kept newer one. Every submission and every completion is one operation of
//! the count at which a crash can be ordered.

use crate::medium::{Completion, Disk, IoError, Medium, Now, Operation};
use std::cell::RefCell;
use std::rc::Rc;
use varve_format::WallTime;

const SECTOR: usize = 512;

/// What is wrong with a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskFault {
    /// Nothing.
    #[default]
    None,
    /// Every write and flush fails.
    FailWrites,
    /// Nothing completes.
    Stalled,
    /// Reads and flushes complete, writes do not.
    StalledWrites,
    /// Flushes answer at once and do nothing: a disk, or a build, that lies.
    IgnoreFlush,
}

/// What a crash does to unflushed writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashPlan {
    /// All of them are lost.
    DropAll,
    /// All of them are kept, in flight ones too.
    KeepAll,
    /// Each sector of each is kept or lost at random.
    Random,
}

struct CachedWrite {
    offset: usize,
    data: Vec<u8>,
    completed_at: u64,
}

/// One disk.
#[derive(Default)]
pub struct SimDisk {
    /// What a power cut leaves for certain.
    durable: Vec<u8>,
    /// What reads see.
    current: Vec<u8>,
    cached: Vec<CachedWrite>,
    /// What is wrong with it.
    pub fault: DiskFault,
}

struct InFlight {
    disk: Disk,
    token: u64,
    operation: Operation,
    submitted_at: u64,
}

/// The machine.
pub struct SimMachine {
    disks: [SimDisk; 4],
    in_flight: Vec<InFlight>,
    operations: u64,
    crash_at: Option<u64>,
    crashed: bool,
    seed: u64,
    now_ns: u64,
}

impl SimMachine {
    /// A machine with disks of these sizes (origin, log, state, spool), all zero.
    #[must_use]
    pub fn new(seed: u64, sizes: [usize; 4]) -> SimMachine {
        let disk = |bytes| SimDisk {
            durable: vec![0; bytes],
            current: vec![0; bytes],
            ..SimDisk::default()
        };
        SimMachine {
            disks: sizes.map(disk),
            in_flight: Vec::new(),
            operations: 0,
            crash_at: None,
            crashed: false,
            seed: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            now_ns: 1_000_000_000,
        }
    }

    /// The next random number (xorshift64*).
    pub fn random(&mut self) -> u64 {
        self.seed ^= self.seed >> 12;
        self.seed ^= self.seed << 25;
        self.seed ^= self.seed >> 27;
        self.seed.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Lets time pass.
    pub fn advance(&mut self, ns: u64) {
        self.now_ns += ns;
    }

    /// Crashes when the count of operations reaches `at`.
    pub fn crash_at(&mut self, at: u64) {
        self.crash_at = Some(at);
    }

    /// Operations so far.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.operations
    }

    /// Whether it has crashed.
    #[must_use]
    pub fn is_crashed(&self) -> bool {
        self.crashed
    }

    /// A disk, to break it or to write behind our back.
    pub fn disk(&mut self, disk: Disk) -> &mut SimDisk {
        &mut self.disks[disk as usize]
    }

    /// What reads of a disk see.
    #[must_use]
    pub fn content(&self, disk: Disk) -> &[u8] {
        &self.disks[disk as usize].current
    }

    /// The process dies, the machine lives on: operations in flight complete or are lost, caches stay.
    pub fn kill_process(&mut self) {
        for flight in std::mem::take(&mut self.in_flight) {
            if self.random().is_multiple_of(2) {
                let _lost_with_the_process = self.apply(&flight);
            }
        }
        self.crash_at = None;
        self.crashed = false;
    }

    /// The power goes and comes back: what `plan` leaves is all there is.
    pub fn power_cut(&mut self, plan: CrashPlan) {
        for flight in std::mem::take(&mut self.in_flight) {
            if let Operation::Write { offset, buffer } = &flight.operation {
                let data = buffer.read_with(<[u8]>::to_vec);
                self.disks[flight.disk as usize].cached.push(CachedWrite {
                    offset: *offset as usize,
                    data,
                    completed_at: u64::MAX,
                });
            }
        }
        for index in 0..self.disks.len() {
            let cached = std::mem::take(&mut self.disks[index].cached);
            // Half of the random crashes lose whole writes, the other half tear them.
            let tear = self.random().is_multiple_of(2);
            for write in cached {
                let mut keep = self.random().is_multiple_of(2);
                for (number, sector) in write.data.chunks(SECTOR).enumerate() {
                    if tear {
                        keep = self.random().is_multiple_of(2);
                    }
                    if plan == CrashPlan::KeepAll || (plan == CrashPlan::Random && keep) {
                        let at = write.offset + number * SECTOR;
                        self.disks[index].durable[at..at + sector.len()].copy_from_slice(sector);
                    }
                }
            }
            let disk = &mut self.disks[index];
            disk.current.clone_from(&disk.durable);
            disk.fault = if disk.fault == DiskFault::IgnoreFlush {
                disk.fault
            } else {
                DiskFault::None
            };
        }
        self.now_ns += 5_000_000_000;
        self.crash_at = None;
        self.crashed = false;
    }

    fn count_operation(&mut self) {
        self.operations += 1;
        if self.crash_at.is_some_and(|at| self.operations >= at) {
            self.crashed = true;
        }
    }

    fn apply(&mut self, flight: &InFlight) -> Result<(), IoError> {
        let operations = self.operations;
        let disk = &mut self.disks[flight.disk as usize];
        let changes = !matches!(flight.operation, Operation::Read { .. });
        if changes && disk.fault == DiskFault::FailWrites {
            return Err(IoError::EIO);
        }
        match &flight.operation {
            Operation::Read { offset, buffer } => {
                let start = *offset as usize;
                let Some(source) = disk.current.get(start..start + buffer.len()) else {
                    return Err(IoError::EIO);
                };
                buffer.write_with(|target| target.copy_from_slice(source));
            }
            Operation::Write { offset, buffer } => {
                let data = buffer.read_with(<[u8]>::to_vec);
                disk.write(*offset as usize, data, operations)?;
            }
            Operation::Discard { offset, length } | Operation::Zero { offset, length } => {
                disk.write(*offset as usize, vec![0; *length as usize], operations)?;
            }
            Operation::Flush => {
                if disk.fault != DiskFault::IgnoreFlush {
                    disk.flush(flight.submitted_at);
                }
            }
        }
        Ok(())
    }
}

impl SimDisk {
    fn write(&mut self, offset: usize, data: Vec<u8>, completed_at: u64) -> Result<(), IoError> {
        let Some(target) = self.current.get_mut(offset..offset + data.len()) else {
            return Err(IoError::EIO);
        };
        target.copy_from_slice(&data);
        self.cached.push(CachedWrite {
            offset,
            data,
            completed_at,
        });
        Ok(())
    }

    fn flush(&mut self, submitted_at: u64) {
        for write in std::mem::take(&mut self.cached) {
            if write.completed_at < submitted_at {
                self.durable[write.offset..write.offset + write.data.len()]
                    .copy_from_slice(&write.data);
            } else {
                self.cached.push(write);
            }
        }
    }

    /// Makes everything that was written durable.
    pub fn flush_all(&mut self) {
        self.flush(u64::MAX);
    }

    /// Writes without Varve: behind our back; into the cache only.
    pub fn scribble(&mut self, offset: usize, data: &[u8]) {
        let _ = self.write(offset, data.to_vec(), 0);
    }

    /// Writes durably without Varve: behind our back.
    pub fn tamper(&mut self, offset: usize, data: &[u8]) {
        self.current[offset..offset + data.len()].copy_from_slice(data);
        self.durable[offset..offset + data.len()].copy_from_slice(data);
    }
}

/// One process's view of a [`SimMachine`].
#[derive(Clone)]
pub struct SimMedium {
    machine: Rc<RefCell<SimMachine>>,
}

impl SimMedium {
    /// The machine's disks and clock.
    #[must_use]
    pub fn new(machine: &Rc<RefCell<SimMachine>>) -> SimMedium {
        SimMedium {
            machine: Rc::clone(machine),
        }
    }
}

impl Medium for SimMedium {
    fn submit(&mut self, disk: Disk, token: u64, operation: Operation) {
        let mut machine = self.machine.borrow_mut();
        if machine.crashed {
            return;
        }
        if let Operation::Read { buffer, .. } | Operation::Write { buffer, .. } = &operation {
            assert!(
                !buffer.is_empty(),
                "a read or write of nothing looks like the end of the disk"
            );
            assert!(
                (buffer.pointer() as usize).is_multiple_of(SECTOR),
                "direct I/O needs aligned memory"
            );
        }
        machine.count_operation();
        let submitted_at = machine.operations;
        machine.in_flight.push(InFlight {
            disk,
            token,
            operation,
            submitted_at,
        });
    }

    fn poll(&mut self, _wait: bool) -> Option<Completion> {
        let mut machine = self.machine.borrow_mut();
        if machine.crashed {
            return None;
        }
        let ready: Vec<usize> = (0..machine.in_flight.len())
            .filter(|i| {
                let flight = &machine.in_flight[*i];
                match machine.disks[flight.disk as usize].fault {
                    DiskFault::Stalled => false,
                    DiskFault::StalledWrites => {
                        matches!(flight.operation, Operation::Read { .. } | Operation::Flush)
                    }
                    DiskFault::None | DiskFault::FailWrites | DiskFault::IgnoreFlush => true,
                }
            })
            .collect();
        if ready.is_empty() {
            return None;
        }
        let pick = ready[(machine.random() % ready.len() as u64) as usize];
        machine.count_operation();
        if machine.crashed {
            return None;
        }
        let passed = 10_000 + machine.random() % 100_000;
        machine.advance(passed);
        let flight = machine.in_flight.remove(pick);
        let result = machine.apply(&flight);
        Some(Completion {
            token: flight.token,
            result,
        })
    }

    fn now(&self) -> Now {
        let ns = self.machine.borrow().now_ns;
        Now {
            monotonic_ns: ns,
            wall: WallTime(1_700_000_000_000_000_000 + ns as i64),
        }
    }

    fn random_id(&mut self) -> [u8; 16] {
        let mut machine = self.machine.borrow_mut();
        let mut id = [0u8; 16];
        id[..8].copy_from_slice(&machine.random().to_le_bytes());
        id[8..].copy_from_slice(&machine.random().to_le_bytes());
        id
    }
}
