//! Shows a device to the kernel on a thread of its own: through ublk, or the fallback.

use crate::{DeviceFactory, Geometry, Stopper, Waker, fuse, ublk};
use crossbeam_channel::{Receiver, bounded};
use std::path::PathBuf;
use std::thread::JoinHandle;

/// How a device is shown.
#[derive(Clone, Debug)]
pub struct Showing {
    /// Name of its thread.
    pub thread: String,
    /// Through ublk; else through FUSE and a loop device.
    pub through_ublk: bool,
    /// Its shape.
    pub geometry: Geometry,
    /// The ublk device of a dead process that is taken over.
    pub recover: Option<u32>,
    /// Whether it outlives this process (ublk only).
    pub lasting: bool,
    /// Where the number of the ublk device is left, before the device appears.
    pub record: Option<PathBuf>,
    /// Where the fallback's file system is mounted.
    pub directory: PathBuf,
}

/// A device that is being shown.
pub struct Shown {
    /// Brings the path of the block device once it is there; is closed if it never will be.
    pub device: Receiver<String>,
    /// Ends once the device is gone.
    pub thread: JoinHandle<Result<(), String>>,
}

/// Starts the thread.
pub fn show(
    showing: Showing,
    factory: DeviceFactory,
    waker: &Waker,
    stopper: &Stopper,
) -> std::io::Result<Shown> {
    let (shown_in, device) = bounded(1);
    let (waker, stopper) = (waker.clone(), stopper.clone());
    let thread = std::thread::Builder::new()
        .name(showing.thread)
        .spawn(move || {
            if showing.through_ublk {
                let options = ublk::UblkOptions {
                    id: showing.recover,
                    recover: showing.recover.is_some(),
                    lasting: showing.lasting,
                    geometry: showing.geometry,
                    record: showing.record,
                };
                let started = move |id: u32| {
                    let _ = shown_in.send(format!("/dev/ublkb{id}"));
                };
                let served = ublk::serve(&options, factory, &waker, &stopper, started);
                // Its number is another's soon.
                if let Some(record) = options.record.filter(|_| !options.lasting) {
                    let _ = std::fs::remove_file(record);
                }
                return served.map_err(|error| error.to_string());
            }
            let started = move |path: &str| {
                let _ = shown_in.send(path.to_owned());
            };
            let directory = showing.directory;
            let result = fuse::serve(
                &directory,
                showing.geometry,
                factory,
                &waker,
                &stopper,
                started,
            );
            let _ = std::fs::remove_dir(&directory);
            result.map_err(|error| error.to_string())
        })?;
    Ok(Shown { device, thread })
}
