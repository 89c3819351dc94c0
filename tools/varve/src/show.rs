//! Images that stay after the command: as block devices, over NBD, mounted.

use crate::image::HeldImage;
use crate::past::{ask, instant, unexpected};
use crate::{Context, daemons};
use serde::Serialize;
use std::path::Path;
use std::process::Command;
use varve_cli::{MountMode, mount_copy, node_of, output_of, show_time, with_clock_times};
use varve_control::{ControlError, StoreOp, StoreReply};

/// Shows an instant, for as long as this command lasts, or until it is kept: one that is broken off leaves nothing behind.
fn show(
    context: &Context,
    volume: Option<String>,
    text: &str,
    (nbd, since): (Option<String>, Option<&str>),
    writable: bool,
) -> Result<HeldImage, ControlError> {
    let volume = daemons::volume(context, volume)?;
    let op = StoreOp::Export {
        volume,
        instant: instant(text)?,
        writable,
        nbd,
        since: since.map(instant).transpose()?,
        held: true,
    };
    HeldImage::show(context, &op)
}

#[derive(Serialize)]
struct Shown<'a> {
    device: &'a str,
    lsn: u64,
    time_ns: i64,
    mounted: Option<&'a Path>,
}

/// `varve export`.
pub fn export(
    context: &Context,
    volume: Option<String>,
    text: &str,
    (nbd, since): (Option<String>, Option<&str>),
    writable: bool,
) -> Result<(), ControlError> {
    let nbd = nbd
        .map(std::path::absolute)
        .transpose()?
        .map(|path| path.display().to_string());
    let image = show(context, volume, text, (nbd, since), writable)?;
    let (device, lsn, time_ns) = (image.device.clone(), image.lsn, image.time_ns);
    image.keep()?;
    context.output.result(
        &Shown {
            device: &device,
            lsn,
            time_ns,
            mounted: None,
        },
        || {
            context.output.say(format!(
                "{} (lsn:{lsn}) is at {device}; end it with: varve unexport {device}",
                show_time(time_ns)
            ));
        },
    );
    Ok(())
}

/// `varve mount`. The file system may replay its journal into the overlay; the mount itself is read-only unless asked otherwise.
pub fn mount(
    context: &Context,
    volume: Option<String>,
    text: &str,
    directory: &Path,
    writable: bool,
    partition: Option<u32>,
) -> Result<(), ControlError> {
    if !directory.is_dir() {
        return Err(ControlError::new(
            "X005-directory",
            format!("{} is not a directory", directory.display()),
        ));
    }
    let image = show(context, volume, text, (None, None), true)?;
    let (device, lsn, time_ns) = (image.device.clone(), image.lsn, image.time_ns);
    let node = node_of(&device, partition);
    let mode = if writable {
        MountMode::Writable
    } else {
        MountMode::ReadOnly
    };
    if let Err(mut failed) = mount_copy(&node, directory, mode, &[]) {
        let _ = image.close();
        failed.message += ". If the volume is a whole disk, say --partition N";
        return Err(failed);
    }
    image.keep()?;
    context.output.result(
        &Shown {
            device: &device,
            lsn,
            time_ns,
            mounted: Some(directory),
        },
        || {
            context.output.say(format!(
                "{} (lsn:{lsn}) is mounted on {}; end it with: varve umount {}",
                show_time(time_ns),
                directory.display(),
                directory.display()
            ));
        },
    );
    Ok(())
}

/// `varve umount`.
pub fn umount(context: &Context, directory: &Path) -> Result<(), ControlError> {
    let directory = std::fs::canonicalize(directory)?;
    let node = output_of(
        "findmnt",
        &[
            "-n",
            "-v", // Without the directory of it that is mounted (`[/@]`).
            "-o",
            "SOURCE",
            "--mountpoint",
            &directory.display().to_string(),
        ],
    );
    if node.is_empty() {
        return Err(ControlError::new(
            "X007-mount",
            format!("nothing is mounted on {}", directory.display()),
        ));
    }
    let StoreReply::Exports { exports } = ask(context, &StoreOp::Exports, "")? else {
        return Err(unexpected());
    };
    let device = exports
        .iter()
        .map(|export| &export.0)
        .find(|device| node == **device || node.starts_with(&format!("{device}p")));
    let device = device.ok_or_else(|| {
        ControlError::new(
            "X003-unknown",
            format!(
                "{} is not an image of ours; use umount",
                directory.display()
            ),
        )
    })?;
    let outcome = Command::new("umount").arg(&directory).output()?;
    if !outcome.status.success() {
        return Err(ControlError::new(
            "V012-busy",
            String::from_utf8_lossy(&outcome.stderr).trim().to_owned(),
        ));
    }
    unexport(context, device.clone())
}

/// `varve unexport`.
pub fn unexport(context: &Context, device: String) -> Result<(), ControlError> {
    ask(
        context,
        &StoreOp::Unexport {
            device: device.clone(),
        },
        "",
    )?;
    context
        .output
        .result(&device, || context.output.say(format!("{device} is gone")));
    Ok(())
}

/// `varve exports`.
pub fn exports(context: &Context) -> Result<(), ControlError> {
    let StoreReply::Exports { exports } = ask(context, &StoreOp::Exports, "")? else {
        return Err(unexpected());
    };
    context.output.result(&exports, || {
        for (device, what) in &exports {
            println!("{device}  {}", with_clock_times(what));
        }
    });
    Ok(())
}
