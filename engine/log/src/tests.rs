//! Tests of the log over the simulated medium: what was durable is found again, whatever the crash left.

use crate::{
    BatchBuffer, CrashPlan, LogGeometry, LogWriter, Medium, Memory, SLOT_BYTES, SegmentOpening,
    SimMachine, SimMedium, scan,
};
use std::cell::RefCell;
use std::rc::Rc;
use varve_format::{
    Checkpoint, EpochId, Hash128, Lsn, Record, RecordKind, SegmentSequence, VolumeId, VolumeState,
};

const SEGMENT: u64 = 64 * 1024;

fn geometry() -> LogGeometry {
    LogGeometry {
        volume: VolumeId([7; 16]),
        segment_bytes: SEGMENT,
        segment_count: 6,
        volume_bytes: 1 << 20,
        sector_bytes: 512,
        region_bytes: 65536,
    }
}

fn checkpoint() -> Checkpoint {
    Checkpoint {
        stable_lsn: Lsn(1),
        span: None,
        copy_cursor: u64::MAX,
        state: VolumeState::Protected,
        regions: vec![3],
    }
}

fn writer(medium: &mut SimMedium) -> LogWriter {
    let memory = Memory::anonymous(8 * SLOT_BYTES).unwrap();
    let mut writer =
        LogWriter::new(geometry(), BatchBuffer::new(&memory, 0, 8, 512), 1 << 40).unwrap();
    let opening = SegmentOpening {
        epoch: EpochId([1; 16]),
        parent_epoch: EpochId([0; 16]),
        sequence: SegmentSequence(1),
        lsn_start: Lsn(1),
        previous_lsn_end: Lsn(1),
        previous_bytes: 0,
        previous_hash: Hash128::default(),
    };
    writer.begin_epoch(medium, opening, SegmentSequence(1), &checkpoint());
    writer
}

/// Appends writes until the machine crashes; returns the highest LSN that was reported durable.
fn run(machine: &Rc<RefCell<SimMachine>>, records: u64) -> Lsn {
    let mut medium = SimMedium::new(machine);
    let mut writer = writer(&mut medium);
    let mut appended = 0;
    loop {
        let full = appended == records;
        if !full
            && writer.has_room(1, 4096, false)
            && machine.borrow_mut().random().is_multiple_of(2)
        {
            let record = Record::new(RecordKind::Write, (appended % 64) * 4096, 4096, 0);
            writer.append(medium.now(), record, 4096, |bytes| {
                bytes.fill(appended as u8)
            });
            appended += 1;
            if appended.is_multiple_of(5) || appended == records {
                writer.want_durable(writer.next_lsn());
            }
        }
        writer.pump(&mut medium);
        if writer.wants_roll() {
            writer.release_below(SegmentSequence(writer.status().sequence.0));
            writer.roll(&mut medium, &checkpoint());
        }
        match medium.poll(false) {
            Some(completion) => writer.complete(completion.token, completion.result),
            None => machine.borrow_mut().advance(200_000),
        }
        if machine.borrow().is_crashed() || (full && writer.durable_lsn() == writer.next_lsn()) {
            return writer.durable_lsn();
        }
    }
}

#[test]
fn crash_at_every_operation_keeps_every_durable_record() {
    let mut rolled = false;
    for plan in [CrashPlan::DropAll, CrashPlan::Random, CrashPlan::KeepAll] {
        for crash_at in 1..400 {
            let machine = Rc::new(RefCell::new(SimMachine::new(
                crash_at,
                [0, SEGMENT as usize * 6, 0, 0],
            )));
            machine.borrow_mut().crash_at(crash_at);
            let durable = run(&machine, 60);
            machine.borrow_mut().power_cut(plan);
            let found = scan(&mut SimMedium::new(&machine), &geometry()).unwrap();
            let end = found.as_ref().map_or(Lsn(1), |scan| scan.tail.lsn_end);
            assert!(
                end >= durable,
                "crash at {crash_at}: {durable} was durable, {end} found"
            );
            rolled |= found.is_some_and(|scan| scan.tail.sequence > SegmentSequence(2));
        }
    }
    assert!(rolled, "the run was too short to roll segments");
}

#[test]
fn a_log_disk_that_ignores_flushes_is_caught_by_this_test() {
    let caught = (1..400).any(|crash_at| {
        let machine = Rc::new(RefCell::new(SimMachine::new(
            crash_at,
            [0, SEGMENT as usize * 6, 0, 0],
        )));
        machine.borrow_mut().disk(crate::Disk::Log).fault = crate::DiskFault::IgnoreFlush;
        machine.borrow_mut().crash_at(crash_at);
        let durable = run(&machine, 60);
        machine.borrow_mut().power_cut(CrashPlan::DropAll);
        scan(&mut SimMedium::new(&machine), &geometry())
            .unwrap()
            .map_or(Lsn(1), |scan| scan.tail.lsn_end)
            < durable
    });
    assert!(caught);
}

#[test]
fn log_of_another_volume_is_refused() {
    let machine = Rc::new(RefCell::new(SimMachine::new(
        1,
        [0, SEGMENT as usize * 6, 0, 0],
    )));
    run(&machine, 3);
    let other = LogGeometry {
        volume: VolumeId([8; 16]),
        ..geometry()
    };
    assert!(scan(&mut SimMedium::new(&machine), &other).is_err());
}

/// A log of three segments, the second and third full to some degree, and its writer, all durable.
fn three_segments() -> (Rc<RefCell<SimMachine>>, LogWriter) {
    let machine = Rc::new(RefCell::new(SimMachine::new(
        9,
        [0, SEGMENT as usize * 6, 0, 0],
    )));
    let mut medium = SimMedium::new(&machine);
    let mut writer = writer(&mut medium);
    while writer.status().sequence < SegmentSequence(3) {
        if writer.has_room(1, 4096, false) {
            let record = Record::new(RecordKind::Write, 0, 4096, 0);
            writer.append(medium.now(), record, 4096, |bytes| bytes.fill(1));
        }
        settle(&mut writer, &mut medium);
    }
    (machine, writer)
}

fn settle(writer: &mut LogWriter, medium: &mut SimMedium) {
    writer.want_durable(writer.next_lsn());
    while writer.durable_lsn() < writer.next_lsn() || !writer.is_quiet() {
        writer.pump(medium);
        if writer.wants_roll() {
            writer.roll(medium, &checkpoint());
        }
        if let Some(completion) = medium.poll(false) {
            writer.complete(completion.token, completion.result);
        }
    }
}

#[test]
fn a_damaged_header_does_not_release_what_lies_before_it() {
    let (machine, writer) = three_segments();
    assert_eq!(writer.status().segments_held, 3);
    let found = |machine: &Rc<RefCell<SimMachine>>| {
        scan(&mut SimMedium::new(machine), &geometry())
            .unwrap()
            .unwrap()
    };
    assert_eq!(found(&machine).oldest, SegmentSequence(1));
    // The second segment lies in the third place.
    let mut log = machine.borrow_mut();
    log.disk(crate::Disk::Log)
        .tamper(2 * SEGMENT as usize + 100, &[0xee; 8]);
    drop(log);
    assert_eq!(found(&machine).oldest, SegmentSequence(1));
}

/// Only the header of a segment landed, of an epoch that began behind numbers that were given up: nothing of them is durable.
#[test]
fn a_segment_without_records_makes_nothing_durable() {
    let (machine, mut writer) = three_segments();
    let mut medium = SimMedium::new(&machine);
    let end = writer.next_lsn();
    let opening = SegmentOpening {
        epoch: EpochId([2; 16]),
        parent_epoch: EpochId([1; 16]),
        sequence: SegmentSequence(4),
        lsn_start: Lsn(end.0 + 50),
        previous_lsn_end: end,
        previous_bytes: 0,
        previous_hash: Hash128::default(),
    };
    writer.begin_epoch(&mut medium, opening, SegmentSequence(1), &checkpoint());
    while !writer.is_quiet() {
        writer.pump(&mut medium);
        if let Some(completion) = medium.poll(false) {
            writer.complete(completion.token, completion.result);
        }
    }
    let found = scan(&mut medium, &geometry()).unwrap().unwrap();
    assert_eq!(found.tail.sequence, SegmentSequence(4));
    assert_eq!(found.tail.lsn_end, Lsn(end.0 + 50));
    assert_eq!(found.tail.durable, end);
}

/// Whoever can write the log may write a record of any length: it costs neither time nor memory.
#[test]
fn a_record_longer_than_any_is_damage() {
    let (machine, mut writer) = three_segments();
    let mut medium = SimMedium::new(&machine);
    let record = Record::new(RecordKind::Discard, 0, 1 << 62, 0);
    writer.append(medium.now(), record, 0, |_| {});
    settle(&mut writer, &mut medium);
    assert!(scan(&mut medium, &geometry()).is_err());
}
