//! An image that this command looks into: it is shown for nobody else, and gone with the command, however that ends.

use crate::past::unexpected;
use crate::{Context, daemons};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use varve_cli::{MountMode, mount_copy, node_of, show_time, with_clock_times};
use varve_control::{Client, ControlError, Instant, StoreOp, StoreReply};

/// Where images are mounted; each command sees its own there.
pub fn looking(context: &Context) -> PathBuf {
    context.paths.run().join("looking")
}

/// An image, for as long as this lives.
pub struct HeldImage {
    client: Client,
    /// Its block device.
    pub device: String,
    /// Its instant.
    pub lsn: u64,
    /// Its time, ns.
    pub time_ns: i64,
    mounted: Option<PathBuf>,
}

/// What keeps an image from telling anything about the past.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// A part of it that was looked at could not be read: it is the history that is damaged, not what it shows.
    LacksBlocks,
    /// What was written to it, as mounting does, had no room.
    NoRoom,
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Trouble::LacksBlocks => {
                "the history lacks a part of it: varve scrub says which instants have it"
            }
            Trouble::NoRoom => {
                "there was no room for what mounting it writes: make room on the store's disk, then try again"
            }
        })
    }
}

impl HeldImage {
    /// Shows an instant. Writable means: into a scratch overlay.
    pub fn open(
        context: &Context,
        volume: &str,
        instant: &Instant,
        writable: bool,
    ) -> Result<HeldImage, ControlError> {
        let op = StoreOp::Export {
            volume: volume.to_owned(),
            instant: instant.clone(),
            writable,
            nbd: None,
            since: None,
            held: true,
        };
        HeldImage::show(context, &op)
    }

    /// The same, as it is asked for.
    pub fn show(context: &Context, op: &StoreOp) -> Result<HeldImage, ControlError> {
        let mut client = daemons::store(context)?;
        let shown = client.call(op).map_err(|mut error: ControlError| {
            error.message = with_clock_times(&error.message);
            error
        });
        match shown? {
            StoreReply::Shown {
                device,
                lsn,
                time_ns,
            } => Ok(HeldImage {
                client,
                device,
                lsn,
                time_ns,
                mounted: None,
            }),
            _ => Err(unexpected()),
        }
    }

    /// It stays when this command has ended.
    pub fn keep(mut self) -> Result<(), ControlError> {
        let op = StoreOp::KeepShown {
            device: self.device.clone(),
        };
        self.client.call::<_, StoreReply>(&op).map(|_| ())
    }

    /// In words.
    pub fn instant(&self) -> String {
        format!("{} (lsn:{})", show_time(self.time_ns), self.lsn)
    }

    /// Mounts the image or one of its partitions; its journal is replayed into the overlay. Mounts must be this process's own by now.
    pub fn mount(
        &mut self,
        partition: Option<u32>,
        directory: &Path,
        mode: MountMode,
        options: &[&str],
    ) -> Result<(), ControlError> {
        std::fs::create_dir_all(directory)?;
        let node = node_of(&self.device, partition);
        mount_copy(&node, directory, mode, options)?;
        self.mounted = Some(directory.to_path_buf());
        Ok(())
    }

    /// What kept it from being looked at: then nothing is known of what it shows.
    pub fn trouble(&mut self) -> Option<Trouble> {
        let op = StoreOp::ImageTrouble {
            device: self.device.clone(),
        };
        match self.client.call(&op) {
            Ok(StoreReply::ImageTrouble {
                lacks_blocks: true, ..
            }) => Some(Trouble::LacksBlocks),
            Ok(StoreReply::ImageTrouble { no_room: true, .. }) => Some(Trouble::NoRoom),
            _ => None,
        }
    }

    /// Unmounts it; it goes on being shown.
    pub fn unmount(&mut self) -> Result<(), ControlError> {
        let Some(directory) = self.mounted.take() else {
            return Ok(());
        };
        let outcome = Command::new("umount").arg(&directory).output()?;
        if outcome.status.success() {
            return Ok(());
        }
        let why = String::from_utf8_lossy(&outcome.stderr).trim().to_owned();
        // It goes with this process at the latest.
        let _ = Command::new("umount").arg("-l").arg(&directory).output();
        Err(ControlError::new("V012-busy", why))
    }

    /// Takes it away.
    pub fn close(mut self) -> Result<(), ControlError> {
        let unmounted = self.unmount();
        let op = StoreOp::Unexport {
            device: self.device.clone(),
        };
        self.client.call::<_, StoreReply>(&op)?;
        unmounted
    }
}
