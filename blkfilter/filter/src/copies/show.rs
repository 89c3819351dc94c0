//! Hot copies as block devices: shown on threads of their own, taken over from a dead daemon, taken away.

use super::files::{copy_memory_path, copy_record, overlay_path, spool_memory_path};
use crate::driver::FailedDevice;
use crate::hot_copy::{CopyDevice, CopyFiles, CopyMemory, SpoolMemory};
use crate::manager::{Manager, START_WAIT, error, is_busy};
use crate::origin;
use crate::running::{link, not_shown};
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use varve_control::{
    ControlError, CopySet, CopySpec, FrontKind, IMAGE, IMAGE_RECORD, Paths, VolumeSpec,
};
use varve_front::{
    Device, DeviceFactory, Geometry, RingPort, Showing, Stopper, Waker, show, show_partitions, ublk,
};

/// Tags of a front end.
const DEPTH: usize = 64;

/// A hot copy that is shown.
pub(crate) struct ShownCopy {
    /// Its block device.
    pub device: String,
    stopper: Stopper,
    thread: std::thread::JoinHandle<Result<(), String>>,
}

impl Manager {
    /// Shows a copy as a block device.
    pub(super) fn show_copy(
        &self,
        spec: &VolumeSpec,
        set: &CopySet,
        copy: &CopySpec,
    ) -> Result<(), ControlError> {
        let record = copy_record(&self.paths, &copy.name);
        let recover = ublk::recorded(&record);
        // One that is lost is shown only if a dead daemon showed it: whoever uses it gets errors, and can let go.
        if !copy.lost.is_empty() && recover.is_none() {
            return Ok(());
        }
        let files = if copy.lost.is_empty() {
            Some(self.copy_files(spec, set, copy)?)
        } else {
            None
        };
        let geometry = Geometry {
            bytes: spec.bytes,
            sector_bytes: spec.sector_bytes,
            physical_bytes: 4096,
            discard_granularity: 0,
            read_only: !copy.writable,
        };
        let waker = Waker::new()?;
        let stopper = Stopper::new(&waker);
        let (name, fallback) = (copy.name.clone(), stopper.clone());
        let factory: DeviceFactory = Box::new(move |port: RingPort| -> Box<dyn Device> {
            let Some(files) = files else {
                return Box::new(FailedDevice::new());
            };
            match CopyDevice::new(&name, files, port, DEPTH) {
                Ok(device) => Box::new(device),
                Err(failed) => {
                    eprintln!("blkfilter: hot copy {name}: {failed}");
                    fallback.stop();
                    Box::new(FailedDevice::new())
                }
            }
        });
        let showing = Showing {
            thread: format!("copy-{}", copy.name),
            through_ublk: match spec.front {
                FrontKind::Ublk => true,
                FrontKind::Fuse => false,
                FrontKind::Auto => ublk::is_available(),
            },
            geometry,
            recover,
            lasting: true,
            record: Some(record),
            directory: self
                .paths
                .run()
                .join("fuse")
                .join(format!("copy-{}", copy.name)),
        };
        let shown = show(showing, factory, &waker, &stopper)?;
        let Ok(device) = shown.device.recv_timeout(START_WAIT) else {
            return Err(not_shown(&stopper, shown.thread));
        };
        link(&self.paths.copies(), &copy.name, &device);
        show_partitions(&device);
        self.shown_copies().insert(
            copy.name.clone(),
            ShownCopy {
                device,
                stopper,
                thread: shown.thread,
            },
        );
        Ok(())
    }

    fn copy_files(
        &self,
        spec: &VolumeSpec,
        set: &CopySet,
        copy: &CopySpec,
    ) -> Result<CopyFiles, ControlError> {
        let copy_memory = origin::open_memory(
            &copy_memory_path(&self.paths, &spec.id, copy.generation),
            CopyMemory::bytes_needed(spec.bytes),
        )?;
        let overlay = copy.writable.then(|| {
            let path = overlay_path(&self.paths, &spec.id, copy.generation);
            std::fs::create_dir_all(self.paths.spools())?;
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)?;
            file.set_len(spec.bytes)?;
            Ok::<File, std::io::Error>(file)
        });
        Ok(CopyFiles {
            origin: origin::open_for_reading(&spec.device)?,
            spool: origin::open_for_reading(&set.spool)?,
            overlay: overlay.transpose()?,
            spool_memory: origin::open_memory(
                &spool_memory_path(&self.paths, &spec.id),
                SpoolMemory::bytes_needed(set.extents),
            )?,
            extents: set.extents,
            copy_memory,
            volume_bytes: spec.bytes,
        })
    }

    /// Takes a copy's device away, unless it is in use.
    pub(super) fn hide_copy(&self, name: &str) -> Result<(), ControlError> {
        let Some(shown) = self.shown_copies().remove(name) else {
            return Ok(());
        };
        if is_busy(&shown.device) {
            let message = format!(
                "the hot copy {name} ({0}) is mounted or in use; unmount it first (`findmnt {0}` shows where)",
                shown.device
            );
            self.shown_copies().insert(name.to_owned(), shown);
            return Err(error("V012-busy", message));
        }
        shown.stopper.stop();
        if let Ok(Err(why)) = shown.thread.join() {
            eprintln!("blkfilter: hot copy {name}: {why}");
        }
        let _ = std::fs::remove_file(copy_record(&self.paths, name));
        let _ = std::fs::remove_file(self.paths.copies().join(name));
        Ok(())
    }

    /// At the end of this daemon: copies that are in use are left for the next one, the others are shown again by it.
    pub(crate) fn hide_copies(&self) {
        let names: Vec<String> = self.shown_copies().keys().cloned().collect();
        for name in names {
            if let Err(why) = self.hide_copy(&name) {
                eprintln!("blkfilter: {name}: left running for the next daemon: {why}");
            }
        }
    }
}

/// For udev: the hot copy, or the image of the past, that a device shows. Both carry the UUIDs and labels of the volume, by which nobody may find them.
#[must_use]
pub fn copy_name(paths: &Paths, device: &str) -> Option<String> {
    if let Some(number) = device.strip_prefix("/dev/loop") {
        return looped_name(paths, number.split('p').next()?);
    }
    let number = device.strip_prefix("/dev/ublkb")?;
    let number = number.split('p').next()?;
    let recorded = |ending: &str| {
        let mut entries = std::fs::read_dir(paths.run()).ok()?.flatten();
        entries.find_map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let name = name.strip_suffix(ending)?.to_owned();
            let recorded = std::fs::read_to_string(entry.path()).ok()?;
            (recorded.trim() == number).then_some(name)
        })
    };
    // A volume's own device is none of them, whatever a dead daemon has left there.
    match recorded(".ublk") {
        Some(_) => None,
        None => recorded(".copy-ublk").or_else(|| recorded(IMAGE_RECORD)),
    }
}

/// The same for the fallback: a loop device lies on a file in a directory of that name.
fn looped_name(paths: &Paths, number: &str) -> Option<String> {
    let backing = std::fs::read(format!("/sys/block/loop{number}/loop/backing_file")).ok()?;
    let backing = Path::new(OsStr::from_bytes(backing.trim_ascii_end()));
    let directory = backing.parent()?;
    let shown = std::fs::canonicalize(paths.run()).ok()?.join("fuse");
    let name = directory.file_name()?.to_str()?;
    let is_second = name.starts_with("copy-") || name.starts_with(IMAGE);
    let is_volume = || paths.volumes().join(format!("{name}.toml")).exists();
    (directory.parent() == Some(&shown) && is_second && !is_volume()).then(|| name.to_owned())
}
