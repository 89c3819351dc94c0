//! Images that are shown: as block devices or over NBD. Each has a thread; ending one ends its thread.

use crate::background::ROOM_BYTES;
use crate::image_device::{ImageDevice, read_or_say};
use crate::overlay::{Overlay, Scratch};
use crossbeam_channel::bounded;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use varve_control::{ControlError, IMAGE, IMAGE_RECORD, Paths, is_busy};
use varve_front::nbd_context::{BASE_ALLOCATION, MetaContext, STATE_DIRTY, STATE_HOLE, STATE_ZERO};
use varve_front::{
    Device, DeviceFactory, Geometry, ReadBytes, RingPort, Showing, Stopper, Waker, nbd, show,
    show_partitions, ublk,
};
use varve_front::{channel, fuse};
use varve_store::{Image, RangeKind};

/// Memory that an overlay in /run leaves.
const MEMORY_LEFT_BYTES: u64 = 16 << 20;
const SHOW_WAIT: Duration = Duration::from_secs(30);
/// How long a device that is to end may seem to be in use: who has just unmounted it is not told to do so.
const UNUSED_WAIT: Duration = Duration::from_secs(3);
/// How long what is shown may take to end with the daemon.
const END_WAIT: Duration = Duration::from_secs(8);
/// How long the device of a client that has gone may still be in use: its mounts end with it, a moment later.
const LET_GO_WAIT: Duration = Duration::from_secs(10);

struct Export {
    /// Device names are used again; this is not.
    number: u64,
    what: String,
    /// It stays when whoever asked for it has gone.
    kept: bool,
    image: Arc<Image>,
    /// What was written to it had no room.
    no_room: Arc<AtomicBool>,
    stopper: Stopper,
    thread: std::thread::JoinHandle<Result<(), String>>,
}

fn unknown(name: &str) -> ControlError {
    ControlError::new(
        "X003-unknown",
        format!("{name} is not an image of ours; `varve exports` lists them"),
    )
}

fn next_number() -> u64 {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    NUMBER.fetch_add(1, Ordering::Relaxed)
}

/// An image that is served over NBD.
pub struct NbdExport {
    /// Where.
    pub socket: String,
    /// Ranges (offset, length) that were written since another instant, in order.
    pub dirty: Option<Vec<(u64, u64)>>,
}

/// `base:allocation` of an image.
fn allocation(image: &Arc<Image>) -> MetaContext {
    let image = Arc::clone(image);
    MetaContext {
        name: BASE_ALLOCATION.to_owned(),
        tell: Box::new(move |offset, length| {
            let ranges = image
                .ranges(offset, length)
                .map_err(std::io::Error::other)?;
            let state = |kind| match kind {
                RangeKind::Data => 0,
                RangeKind::Zero | RangeKind::Undefined => STATE_HOLE | STATE_ZERO,
            };
            Ok(ranges
                .iter()
                .map(|range| (range.length, state(range.kind)))
                .collect())
        }),
    }
}

/// Reads an image from any thread.
fn reading(image: &Arc<Image>) -> ReadBytes {
    let image = Arc::clone(image);
    Arc::new(move |offset, bytes| read_or_say(&image, offset, bytes))
}

/// What was written, under the name by which clients know such bitmaps.
fn dirty_bitmap(ranges: Vec<(u64, u64)>) -> MetaContext {
    MetaContext {
        name: "qemu:dirty-bitmap:varve".to_owned(),
        tell: Box::new(move |offset, length| {
            let (mut at, end) = (offset, offset + length);
            let mut states = Vec::new();
            let first = ranges.partition_point(|range| range.0 + range.1 <= offset);
            for (start, bytes) in &ranges[first..] {
                if *start >= end {
                    break;
                }
                let (start, stop) = ((*start).max(at), (start + bytes).min(end));
                if start > at {
                    states.push((start - at, 0));
                }
                states.push((stop - start, STATE_DIRTY));
                at = stop;
            }
            if at < end {
                states.push((end - at, 0));
            }
            Ok(states)
        }),
    }
}

/// Takes away what a daemon that was killed has left of its images: mounts of which nothing can be asked any more, and what says which device shows one.
pub fn clear_dead(paths: &Paths) {
    for record in std::fs::read_dir(paths.run())
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = record.file_name().to_string_lossy().into_owned();
        let process = name
            .strip_suffix(IMAGE_RECORD)
            .and_then(|name| name.strip_prefix(IMAGE)?.split('-').next());
        // One that was started beside another is refused in a moment: what that shows is there. What has our own number is an earlier process's.
        let own = std::process::id().to_string();
        let is_dead = |process: &str| process == own || !Path::new("/proc").join(process).exists();
        if process.is_some_and(is_dead) {
            let _ = std::fs::remove_file(record.path());
        }
    }
    let shown = std::fs::read_dir(paths.run().join("fuse"));
    for directory in shown.into_iter().flatten().flatten() {
        if directory.file_name().to_string_lossy().starts_with(IMAGE) {
            fuse::clear_dead(&directory.path());
            let _ = std::fs::remove_dir(directory.path());
        }
    }
}

/// All exports.
#[derive(Default)]
pub struct Exports {
    shown: Mutex<BTreeMap<String, Export>>,
}

impl Exports {
    fn shown(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Export>> {
        self.shown
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Shows an image; the answer is the block device, or the NBD socket, and the number of this export.
    pub fn show(
        &self,
        paths: &Paths,
        image: Image,
        what: String,
        writable: bool,
        nbd: Option<NbdExport>,
    ) -> Result<(String, u64), ControlError> {
        let geometry = Geometry {
            bytes: image.bytes(),
            sector_bytes: image.sector_bytes(),
            physical_bytes: 4096,
            discard_granularity: 0,
            read_only: !writable,
        };
        let overlay = if writable {
            let (beside, memory) = (paths.store().join("scratch"), paths.run().join("scratch"));
            let places = [
                Scratch {
                    directory: &beside,
                    leaves: ROOM_BYTES,
                },
                Scratch {
                    directory: &memory,
                    leaves: MEMORY_LEFT_BYTES,
                },
            ];
            Some(Overlay::new(&places, image.bytes()).map_err(|e| {
                let message = format!(
                    "there is no place for what is written to the image, neither in {} nor in {}: {e}. `varve export INSTANT` shows it read-only, without any; mount that with `-o ro,noload` (ext4) or \
                     `-o ro,norecovery` (xfs)",
                    beside.display(),
                    memory.display()
                );
                ControlError::new("X001-overlay", message)
            })?)
        } else {
            None
        };
        let no_room = overlay.as_ref().map(Overlay::failed).unwrap_or_default();
        let image = Arc::new(image);
        let shown_image = Arc::clone(&image);
        // What is written to an overlay is not told of.
        let allocated = (!writable).then(|| allocation(&image));
        let read = (!writable).then(|| reading(&image));
        let factory: DeviceFactory = Box::new(move |_port: RingPort| -> Box<dyn Device> {
            Box::new(ImageDevice::new(image, overlay))
        });
        let waker = Waker::new()?;
        let stopper = Stopper::new(&waker);
        let number = next_number();
        let (shown, thread) = match nbd {
            Some(NbdExport { socket, dirty }) => {
                let contexts = allocated.into_iter().chain(dirty.map(dirty_bitmap));
                let contexts: Arc<Vec<MetaContext>> = Arc::new(contexts.collect());
                let (shown_in, shown) = bounded(1);
                let (waker, stopper) = (waker.clone(), stopper.clone());
                let thread = std::thread::Builder::new()
                    .name("export".to_owned())
                    .spawn(move || {
                        let (jobs, receiver) = channel::jobs(&waker);
                        let served = nbd::Served {
                            geometry,
                            jobs,
                            read,
                            contexts,
                        };
                        nbd::listen(Path::new(&socket), served, &stopper)
                            .map_err(|e| format!("{socket}: {e}"))?;
                        let _ = shown_in.send(socket);
                        channel::serve(&receiver, factory, &waker, &stopper)
                            .map_err(|e| e.to_string())
                    })?;
                (shown, thread)
            }
            None => {
                let name = format!("{IMAGE}{}-{number}", std::process::id());
                let showing = Showing {
                    thread: "export".to_owned(),
                    through_ublk: ublk::is_available(),
                    geometry,
                    recover: None,
                    lasting: false,
                    record: Some(paths.run().join(format!("{name}{IMAGE_RECORD}"))),
                    directory: paths.run().join("fuse").join(name),
                };
                let shown = show(showing, factory, &waker, &stopper)?;
                (shown.device, shown.thread)
            }
        };
        match shown.recv_timeout(SHOW_WAIT) {
            Ok(name) => {
                if name.starts_with("/dev/") {
                    show_partitions(&name);
                }
                self.shown().insert(
                    name.clone(),
                    Export {
                        number,
                        what,
                        kept: false,
                        image: shown_image,
                        no_room,
                        stopper,
                        thread,
                    },
                );
                Ok((name, number))
            }
            Err(_) => {
                stopper.stop();
                let why = if thread.is_finished() {
                    thread.join().ok().and_then(Result::err).unwrap_or_default()
                } else {
                    "no answer".to_owned()
                };
                Err(ControlError::new(
                    "X002-show",
                    format!("the image could not be shown: {why}"),
                ))
            }
        }
    }

    /// Ends the export of a client that has gone, if it has not ended it itself.
    pub fn let_go(&self, name: &str, number: u64) {
        let ends = |export: &Export| export.number == number && !export.kept;
        let is_there = || self.shown().get(name).is_some_and(ends);
        let since = Instant::now();
        while is_there()
            && is_busy(Path::new(name)).unwrap_or(false)
            && since.elapsed() < LET_GO_WAIT
        {
            std::thread::sleep(Duration::from_millis(20));
        }
        if is_there()
            && let Err(failed) = self.hide(name)
        {
            eprintln!("varved: {name}: {failed}");
        }
    }

    /// What is shown for a client stays when that has gone.
    pub fn keep(&self, name: &str) -> Result<(), ControlError> {
        match self.shown().get_mut(name) {
            Some(export) => export.kept = true,
            None => return Err(unknown(name)),
        }
        Ok(())
    }

    /// Whether something that was read of it could not be read, and whether something that was written to it had no room.
    pub fn trouble(&self, name: &str) -> Result<(bool, bool), ControlError> {
        let shown = self.shown();
        let export = shown.get(name).ok_or_else(|| unknown(name))?;
        let no_room = export.no_room.load(Ordering::Relaxed);
        Ok((export.image.lacks_blocks(), no_room))
    }

    /// Ends an export that nobody uses. Who has just unmounted it is waited for: udev may be looking at it.
    pub fn hide_unused(&self, name: &str) -> Result<(), ControlError> {
        let is_ours = self.shown().contains_key(name);
        let since = Instant::now();
        while is_ours && is_busy(Path::new(name)).unwrap_or(false) {
            if since.elapsed() > UNUSED_WAIT {
                return Err(ControlError::new(
                    "V012-busy",
                    format!(
                        "{name} is mounted or in use; unmount it first (`findmnt -S {name}` and `lsblk {name}` show where). Nothing was changed"
                    ),
                ));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        self.hide(name)
    }

    /// Ends an export.
    pub fn hide(&self, name: &str) -> Result<(), ControlError> {
        let export = self.shown().remove(name);
        let export = export.ok_or_else(|| unknown(name))?;
        export.stopper.stop();
        match export.thread.join() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(why)) => Err(ControlError::new("X004-hide", why)),
            Err(_) => Err(ControlError::new("X004-hide", "its thread panicked")),
        }
    }

    /// What is shown: (device, what).
    pub fn list(&self) -> Vec<(String, String)> {
        self.shown()
            .iter()
            .map(|(name, export)| (name.clone(), export.what.clone()))
            .collect()
    }

    /// Ends all. What somebody goes on using is waited for no longer than [`END_WAIT`]: it ends with the process.
    pub fn hide_all(&self) {
        let ending: Vec<Export> = std::mem::take(&mut *self.shown()).into_values().collect();
        ending.iter().for_each(|export| export.stopper.stop());
        let since = Instant::now();
        while ending.iter().any(|export| !export.thread.is_finished()) && since.elapsed() < END_WAIT
        {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
