//! A disk whose writes and flushes take as long as a file says: a real block device (ublk) over a file or device. Kill it, and the disk is pulled.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use varve_front::ublk::{self, UblkOptions};
use varve_front::{
    Answer, Device, DeviceFactory, Errno, Geometry, Request, RequestKind, Stopper, Waker, fuse,
    monotonic_ns,
};
use varve_log::Buffer;

struct SlowDisk {
    /// Opened for direct I/O: nothing is gained by this machine's page cache.
    backing: File,
    /// Aligned memory for it.
    bounce: Buffer,
    control: PathBuf,
    /// Requests, and when each is served.
    waiting: VecDeque<(u64, Request)>,
    answers: VecDeque<Answer>,
}

impl SlowDisk {
    fn delay_ns(&self) -> u64 {
        let text = std::fs::read_to_string(&self.control).unwrap_or_default();
        text.trim().parse::<u64>().unwrap_or(0) * 1_000_000
    }

    fn serve(&self, request: &Request) -> Result<(), Errno> {
        let outcome = match (request.kind, &request.buffer) {
            (RequestKind::Flush, _) => self.backing.sync_data(),
            (RequestKind::Read, Some(buffer)) => {
                let bounce = self.bounce.slice(0, request.length as usize);
                let read =
                    bounce.write_with(|bytes| self.backing.read_exact_at(bytes, request.offset));
                buffer.write_with(|bytes| bounce.read_with(|found| bytes.copy_from_slice(found)));
                read
            }
            (RequestKind::Write, Some(buffer)) => {
                let bounce = self.bounce.slice(0, request.length as usize);
                buffer.read_with(|bytes| bounce.write_with(|space| space.copy_from_slice(bytes)));
                bounce.read_with(|bytes| self.backing.write_all_at(bytes, request.offset))
            }
            _ => {
                let zeroes = self.bounce.slice(0, 4096.min(request.length as usize));
                zeroes.write_with(|bytes| bytes.fill(0));
                (0..request.length)
                    .step_by(zeroes.read_with(<[u8]>::len))
                    .try_for_each(|at| {
                        zeroes.read_with(|bytes| {
                            self.backing.write_all_at(bytes, request.offset + at)
                        })
                    })
            }
        };
        outcome.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))
    }
}

impl Device for SlowDisk {
    fn submit(&mut self, request: Request) {
        let delay = match request.kind {
            RequestKind::Read => 0,
            _ => self.delay_ns(),
        };
        self.waiting.push_back((monotonic_ns() + delay, request));
    }
    fn completion(&mut self, _user_data: u64, _result: i32) {}
    fn woken(&mut self) {}
    fn run(&mut self) {
        let now = monotonic_ns();
        let (due, waiting) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|(due, _)| *due <= now);
        self.waiting = waiting;
        for (_, request) in due {
            let result = self.serve(&request);
            self.answers.push_back(Answer {
                tag: request.tag,
                result,
            });
        }
    }
    fn take_answer(&mut self) -> Option<Answer> {
        self.answers.pop_front()
    }
    fn end_turn(&mut self) -> (u64, u64) {
        let now = monotonic_ns();
        let next = self.waiting.iter().map(|(due, _)| *due).min();
        let wait = next.map_or(1_000_000_000, |due| due.saturating_sub(now).max(50_000));
        (now, wait)
    }
    fn is_quiet(&self) -> bool {
        self.waiting.is_empty() && self.answers.is_empty()
    }
    fn closed(&mut self) {}
}

struct Parts {
    factory: DeviceFactory,
    geometry: Geometry,
    waker: Waker,
    stopper: Stopper,
}

fn parts(backing: &str, control: &Path) -> Result<Parts, String> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(backing)
        .map_err(|e| format!("{backing}: {e}"))?;
    let bytes = std::io::Seek::seek(&mut &file, std::io::SeekFrom::End(0))
        .map_err(|e| format!("{backing}: {e}"))?;
    let control = control.to_path_buf();
    let waker = Waker::new().map_err(|e| e.to_string())?;
    let stopper = Stopper::new(&waker);
    let factory: DeviceFactory = Box::new(move |_port| {
        Box::new(SlowDisk {
            backing: file,
            // On this thread: such memory is not sent to another.
            bounce: Buffer::anonymous(2 << 20).unwrap(),
            control,
            waiting: VecDeque::new(),
            answers: VecDeque::new(),
        })
    });
    let geometry = Geometry {
        bytes,
        sector_bytes: 512,
        physical_bytes: 4096,
        discard_granularity: 0,
        read_only: false,
    };
    Ok(Parts {
        factory,
        geometry,
        waker,
        stopper,
    })
}

/// Serves `/dev/ublkb{id}` over `backing` until the process ends. `control` holds the milliseconds that a write or flush takes; no file: none.
///
/// # Errors
/// If the backing cannot be opened or the device not be made.
pub fn serve(backing: &str, control: &Path, id: u32) -> Result<(), String> {
    let parts = parts(backing, control)?;
    let options = UblkOptions {
        id: Some(id),
        recover: false,
        lasting: false,
        geometry: parts.geometry,
        record: None,
    };
    ublk::serve(
        &options,
        parts.factory,
        &parts.waker,
        &parts.stopper,
        |_| {},
    )
    .map_err(|e| e.to_string())
}

/// The same through FUSE and a loop device, whose path it prints: what the fallback's way costs by itself.
///
/// # Errors
/// As above.
pub fn serve_fuse(backing: &str, directory: &Path) -> Result<(), String> {
    let parts = parts(backing, Path::new("/nonexistent"))?;
    fuse::serve(
        directory,
        parts.geometry,
        parts.factory,
        &parts.waker,
        &parts.stopper,
        |device| println!("{device}"),
    )
    .map_err(|e| e.to_string())
}
