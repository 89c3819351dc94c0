//! The ublk front end, through libublk: one queue, one thread, one ring for ublk commands, origin and log alike.
//!
//! User recovery: when the daemon dies the kernel keeps the device and its requests; [`serve`] with `recover` takes them over, and requests that
//! were in flight come again (REISSUE). Until then I/O waits.

// UNSAFETY: wraps libublk's request buffers as our own memory for the time of the queue.
#![expect(unsafe_code)]

use crate::device::{Device, DeviceFactory, RingPort, Stopper, Waker};
use crate::loopback::{RingTimer, TIMER, arm_bell, dispatch, push_into};
use crate::{Geometry, Request, RequestKind};
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::helpers::IoBuf;
use libublk::io::{BufDescList, UblkDev, UblkQueue, with_task_io_ring_mut};
use libublk::{BufDesc, UblkError, UblkFlags, UblkIORes, sys};
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use varve_log::{Buffer, Memory, TARGET_BIT};

/// Requests in flight.
pub const DEPTH: u16 = 64;
/// Requests that the block layer may have in flight: fewer than the depth, so that a command is always there to be cancelled and a dead daemon is
/// noticed at once on kernels before 6.15.
const REQUESTS_MAX: u16 = DEPTH - 4;
/// Most bytes of one request: one batch.
const IO_BYTES_MAX: u32 = 256 << 10;

/// Why a ublk device could not be made.
#[derive(Debug)]
pub enum UblkFrontError {
    /// The kernel has no ublk (no /dev/ublk-control).
    Missing,
    /// libublk's word.
    Library(String),
}

impl fmt::Display for UblkFrontError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UblkFrontError::Missing => write!(
                f,
                "this kernel has no ublk: `modprobe ublk_drv`, or use the fallback (`--front fuse`)"
            ),
            UblkFrontError::Library(text) => write!(f, "ublk: {text}"),
        }
    }
}

impl std::error::Error for UblkFrontError {}

impl From<UblkError> for UblkFrontError {
    fn from(error: UblkError) -> UblkFrontError {
        UblkFrontError::Library(error.to_string())
    }
}

/// Whether this kernel offers ublk.
#[must_use]
pub fn is_available() -> bool {
    std::path::Path::new("/dev/ublk-control").exists()
}

/// What to make.
#[derive(Clone, Debug)]
pub struct UblkOptions {
    /// Device number; `None`: the kernel chooses.
    pub id: Option<u32>,
    /// Take over a device whose daemon died.
    pub recover: bool,
    /// Whether the device outlives this process (volumes do, images do not).
    pub lasting: bool,
    /// Its shape.
    pub geometry: Geometry,
    /// Where its number is left before it appears: for udev, and for whoever takes it over.
    pub record: Option<std::path::PathBuf>,
}

/// Longest discard or write-zeroes: it opens so many regions at once, far fewer than may be open.
const RANGE_SECTORS_MAX: u32 = (crate::RANGE_BYTES_MAX >> 9) as u32;

/// The device whose number a dead process left at `record`, if it is still there.
#[must_use]
pub fn recorded(record: &std::path::Path) -> Option<u32> {
    let id: u32 = std::fs::read_to_string(record).ok()?.trim().parse().ok()?;
    std::path::Path::new(&format!("/dev/ublkc{id}"))
        .exists()
        .then_some(id)
}

type SharedFactory = Arc<Mutex<Option<DeviceFactory>>>;

/// Makes the device and drives it until `stopper` says stop. `started` is called with the device's number once it is there. Runs on the calling
/// thread and one more.
pub fn serve(
    options: &UblkOptions,
    factory: DeviceFactory,
    waker: &Waker,
    stopper: &Stopper,
    started: impl FnOnce(u32) + Send + Sync + 'static,
) -> Result<(), UblkFrontError> {
    if !is_available() {
        return Err(UblkFrontError::Missing);
    }
    let control = build(options)?;
    if let Some(record) = &options.record {
        let _ = std::fs::write(record, control.dev_info().dev_id.to_string());
    }
    let geometry = options.geometry;
    let shared: SharedFactory = Arc::new(Mutex::new(Some(factory)));
    let (queue_waker, queue_stopper) = (waker.clone(), stopper.clone());
    let (stopper, waker) = (stopper.clone(), waker.clone());
    let ending = Arc::new(Ending::default());
    let queue_ending = Arc::clone(&ending);
    let lasting = options.lasting;
    control.run_target(
        move |device| {
            set_parameters(device, &geometry);
            Ok(())
        },
        move |queue_id, device| {
            let factory = shared.lock().ok().and_then(|mut slot| slot.take());
            if let Some(factory) = factory {
                run_queue(queue_id, device, factory, &queue_waker, &queue_ending);
            }
            queue_ending.ended.store(true, Ordering::Release);
            queue_stopper.stop(); // If the kernel stopped the queue, the waiting thread goes on, too.
        },
        move |control| {
            let id = control.dev_info().dev_id;
            tune(id);
            started(id);
            while !stopper.is_stopping() {
                std::thread::sleep(Duration::from_millis(20));
            }
            if lasting {
                control.disown();
            }
            let _ = control.kill_dev();
            ending.see(&waker);
        },
    )?;
    if lasting {
        let _ = control.del_dev();
    }
    Ok(())
}

/// How a queue ends whose device is gone.
#[derive(Default)]
struct Ending {
    /// The kernel has stopped the device: no request is left, and none comes.
    gone: AtomicBool,
    /// The queue's thread is past its loop.
    ended: AtomicBool,
}

/// How long the kernel may take to give back the commands of a device that it has stopped.
const LAST_COMMANDS: Duration = Duration::from_secs(1);

impl Ending {
    /// Waits until the queue has ended. A command that is handed to the kernel in the moment in which it stops the device never comes back (seen on
    /// 7.3 with four devices under load): after a while the queue is told to go without it.
    fn see(&self, waker: &Waker) {
        let since = Instant::now();
        while !self.ended.load(Ordering::Acquire) && since.elapsed() < 30 * LAST_COMMANDS {
            if since.elapsed() > LAST_COMMANDS {
                if !self.gone.swap(true, Ordering::AcqRel) {
                    eprintln!(
                        "varve: the kernel keeps a command of a ublk device that it has stopped; going on without it"
                    );
                }
                waker.wake();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Everything happens on the calling thread, because libublk's control ring belongs to a thread. Some kernels never come back from ADD_DEV: whoever
/// waits for `started` must not wait for ever.
fn build(options: &UblkOptions) -> Result<UblkCtrl, UblkFrontError> {
    let recovery = if options.lasting {
        u64::from(sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE)
    } else {
        0
    };
    let (mut id, mut flags) = (options.id, UblkFlags::UBLK_DEV_F_ADD_DEV);
    if let (true, Some(old)) = (options.recover, options.id) {
        let control = UblkCtrl::new_simple(old as i32)?;
        if u32::from(control.dev_info().state) == sys::UBLK_S_DEV_DEAD {
            // Whoever made it died before it was shown: nobody uses it, and there is nothing to take over.
            control.del_dev()?;
            id = None;
        } else {
            control.start_user_recover()?;
            flags = UblkFlags::UBLK_DEV_F_RECOVER_DEV;
        }
    }
    let control = UblkCtrlBuilder::default()
        .name("varve")
        .id(id.map_or(-1, |id| id as i32))
        .nr_queues(1)
        .depth(DEPTH)
        .io_buf_bytes(IO_BYTES_MAX)
        .ctrl_flags(recovery)
        .dev_flags(flags)
        .build()?;
    Ok(control)
}

fn set_parameters(device: &mut UblkDev, geometry: &Geometry) {
    let shift = |bytes: u32| bytes.trailing_zeros() as u8;
    let mut attributes = sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA;
    if geometry.read_only {
        attributes |= sys::UBLK_ATTR_READ_ONLY;
    }
    let max_sectors = device.dev_info.max_io_buf_bytes >> 9;
    let mut types = sys::UBLK_PARAM_TYPE_BASIC;
    let mut discard = sys::ublk_param_discard::default();
    if geometry.discard_granularity > 0 {
        types |= sys::UBLK_PARAM_TYPE_DISCARD;
        discard.discard_granularity = geometry.discard_granularity;
        discard.max_discard_sectors = RANGE_SECTORS_MAX;
        discard.max_write_zeroes_sectors = RANGE_SECTORS_MAX;
        discard.max_discard_segments = 1;
    }
    device.tgt.dev_size = geometry.bytes;
    device.tgt.sq_depth = 1024;
    device.tgt.cq_depth = 4096;
    device.tgt.params = sys::ublk_params {
        types,
        basic: sys::ublk_param_basic {
            attrs: attributes,
            logical_bs_shift: shift(geometry.sector_bytes),
            physical_bs_shift: shift(geometry.physical_bytes.max(geometry.sector_bytes)),
            io_opt_shift: shift(IO_BYTES_MAX),
            io_min_shift: shift(geometry.physical_bytes.max(geometry.sector_bytes)),
            max_sectors,
            dev_sectors: geometry.bytes >> 9,
            ..Default::default()
        },
        discard,
        ..Default::default()
    };
}

/// Lets the kernel notice a dead daemon soon. Not having these knobs costs time, nothing else.
fn tune(id: u32) {
    let queue = format!("/sys/block/ublkb{id}/queue");
    let _ = std::fs::write(format!("{queue}/nr_requests"), REQUESTS_MAX.to_string());
    let _ = std::fs::write(format!("{queue}/io_timeout"), "1000");
}

fn push_shared(entry: &io_uring::squeue::Entry) {
    with_task_io_ring_mut(|ring| push_into(ring, entry));
}

fn run_queue(
    queue_id: u16,
    device: &UblkDev,
    factory: DeviceFactory,
    waker: &Waker,
    ending: &Ending,
) {
    let buffers = device.alloc_queue_io_bufs();
    let Ok(queue) = UblkQueue::new(queue_id, device) else {
        return;
    };
    let port = RingPort { push: push_shared };
    let mut target = factory(port.clone());
    let wrapped: Vec<Buffer> = buffers.iter().map(wrap).collect();
    let Ok(queue) = queue.submit_fetch_commands_unified(BufDescList::Slices(Some(&buffers))) else {
        return;
    };
    arm_bell(&port, waker);
    let mut timer = RingTimer::new();
    let (now, after) = target.end_turn();
    timer.arm(&port, now, after);
    loop {
        let turn = queue.flush_and_wake_io_tasks(
            |user_data, completion, last| {
                if user_data & TARGET_BIT != 0 {
                    if user_data == TIMER {
                        timer.fired();
                    }
                    dispatch(
                        target.as_mut(),
                        &port,
                        waker,
                        user_data,
                        completion.result(),
                    );
                } else if completion.result() == sys::UBLK_IO_RES_OK as i32 {
                    submit(
                        &queue,
                        (user_data & 0xffff) as u16,
                        &wrapped,
                        target.as_mut(),
                    );
                }
                if last {
                    target.run();
                    answer(&queue, &buffers, target.as_mut());
                    let (now, after) = target.end_turn();
                    timer.arm(&port, now, after);
                }
            },
            1,
        );
        match turn {
            Ok(_) if ending.gone.load(Ordering::Acquire) => break,
            Ok(_) => {}
            Err(UblkError::QueueIsDown) => break,
            // A debugger, a frozen group, a suspended machine: the wait was interrupted, nothing more.
            Err(UblkError::IOError(error))
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
                ) => {}
            Err(error) => {
                // Going on is impossible, and stopping would take the device from its users. A dead daemon is harmless: the next one takes over.
                eprintln!(
                    "varve: the ublk queue failed ({error}); ending the process, so that the next one can recover the device"
                );
                std::process::abort();
            }
        }
    }
    ending.ended.store(true, Ordering::Release);
    drain(target.as_mut(), &port, waker);
    target.closed();
}

fn wrap(buffer: &IoBuf<u8>) -> Buffer {
    let start = NonNull::new(buffer.as_mut_ptr()).expect("an allocation is not null");
    // SAFETY: the IoBuf outlives the queue, and with it every request; between requests only the kernel touches it.
    let memory = unsafe { Memory::borrowed(start, buffer.len()) };
    Buffer::new(&memory, 0, buffer.len())
}

fn submit(queue: &UblkQueue<'_>, tag: u16, buffers: &[Buffer], target: &mut dyn Device) {
    let descriptor = queue.get_iod(tag);
    // Sectors are 512 bytes here whatever the device's are.
    let (offset, length) = (
        descriptor.start_sector << 9,
        u64::from(descriptor.nr_sectors) << 9,
    );
    let kind = match descriptor.op_flags & 0xff {
        sys::UBLK_IO_OP_READ => RequestKind::Read,
        sys::UBLK_IO_OP_WRITE => RequestKind::Write,
        sys::UBLK_IO_OP_FLUSH => RequestKind::Flush,
        sys::UBLK_IO_OP_DISCARD => RequestKind::Discard,
        sys::UBLK_IO_OP_WRITE_ZEROES => RequestKind::Zero,
        _ => {
            let _ = queue.complete_io_cmd_unified(
                tag,
                BufDesc::RawAddress(buffers[tag as usize].pointer()),
                Ok(UblkIORes::Result(-libc::EOPNOTSUPP)),
            );
            return;
        }
    };
    // A flush has no place; the kernel leaves something else there.
    let (offset, length) = if kind == RequestKind::Flush {
        (0, 0)
    } else {
        (offset, length)
    };
    let has_bytes = matches!(kind, RequestKind::Read | RequestKind::Write);
    target.submit(Request {
        tag: u32::from(tag),
        kind,
        offset,
        length,
        force_unit_access: descriptor.op_flags & sys::UBLK_IO_F_FUA != 0,
        buffer: has_bytes.then(|| buffers[tag as usize].slice(0, length as usize)),
    });
}

fn answer(queue: &UblkQueue<'_>, buffers: &[IoBuf<u8>], target: &mut dyn Device) {
    while let Some(answer) = target.take_answer() {
        let tag = answer.tag as u16;
        let descriptor = queue.get_iod(tag);
        // FLUSH, DISCARD and WRITE_ZEROES complete with 0, not with a byte count.
        let bytes = match descriptor.op_flags & 0xff {
            sys::UBLK_IO_OP_READ | sys::UBLK_IO_OP_WRITE => (descriptor.nr_sectors << 9) as i32,
            _ => 0,
        };
        let result = answer.result.map_or_else(|errno| -errno, |()| bytes);
        let _ = queue.complete_io_cmd_unified(
            tag,
            BufDesc::Slice(buffers[tag as usize].as_slice()),
            Ok(UblkIORes::Result(result)),
        );
    }
}

/// The queue is down; what is still in the ring belongs to the device.
fn drain(target: &mut dyn Device, port: &RingPort, waker: &Waker) {
    for _ in 0..10_000 {
        target.run();
        while target.take_answer().is_some() {}
        if target.is_quiet() {
            return;
        }
        let mut taken = Vec::new();
        with_task_io_ring_mut(|ring| {
            let _ = ring.submit();
            taken.extend(
                ring.completion()
                    .map(|entry| (entry.user_data(), entry.result())),
            );
        });
        if taken.is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        for (user_data, result) in taken
            .into_iter()
            .filter(|(user_data, _)| user_data & TARGET_BIT != 0)
        {
            dispatch(target, port, waker, user_data, result);
        }
    }
}
