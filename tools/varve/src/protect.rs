//! Protecting a device and ending it.

use crate::{Context, daemons};
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use varve_cli::show_bytes;
use varve_control::{
    Ack, ControlError, FilterOp, FilterReply, FrontKind, Progress, StoreOp, StoreReply, VolumeInfo,
    VolumeSpec,
};

/// Smallest device worth protecting: below this the log's own structures are larger.
const BYTES_MIN: u64 = 1 << 20;

#[derive(Clone, Copy, ValueEnum)]
enum FrontChoice {
    Auto,
    Ublk,
    Fuse,
}

#[derive(Clone, Copy, ValueEnum)]
enum AckChoice {
    Async,
    Local,
}

#[derive(Args)]
pub struct ProtectArgs {
    /// The device: a disk, a partition, a logical volume (or a file).
    device: PathBuf,
    /// Short name; by default the device's.
    #[arg(long)]
    name: Option<String>,
    /// Where the log ring goes, best on another disk than the device.
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Where the state file goes, best on another disk than the log.
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Size of the log ring in MiB: how far the store may fall behind.
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u64).range(16..=1_048_576))]
    log_size: u64,
    /// How the mapped device is shown.
    #[arg(long, value_enum, default_value = "auto")]
    front: FrontChoice,
    /// When writes are acknowledged: `async`, at the device's completion; `local`, when device and log hold them durably.
    #[arg(long, value_enum, default_value = "async")]
    ack: AckChoice,
    /// Do not wait for the first full copy.
    #[arg(long)]
    no_wait: bool,
}

#[derive(Serialize)]
struct Protected<'a> {
    volume: &'a VolumeInfo,
}

/// `varve protect`.
pub fn protect(context: &Context, args: &ProtectArgs) -> Result<(), ControlError> {
    let device = std::fs::canonicalize(&args.device).map_err(|e| {
        ControlError::new(
            "V027-missing",
            format!("{}: {e}; `lsblk` lists devices", args.device.display()),
        )
    })?;
    let spec = spec(context, args, &device)?;
    refuse_in_use(&device)?;
    let mut filter = daemons::filter(context)?;
    let FilterReply::Volume { volume } = filter.call(&FilterOp::Protect { spec: spec.clone() })?
    else {
        return Err(ControlError::new(
            "C005-answer",
            "blkfilter gave an unexpected answer",
        ));
    };
    context.output.say(format!(
        "{} is protected as `{}`: use {} instead of it from now on.",
        device.display(),
        spec.name,
        mapped(context, &volume)
    ));
    if same_disk(&spec.log, &device) {
        context.output.say("  note: the log is on the same disk as the device; both are lost together (--log chooses another place)");
    }
    if same_disk(&spec.log, &spec.state) {
        context.output.say("  note: log and state file are on one disk; if it dies in a power cut, everything is read again once (--state chooses another place)");
    }
    let volume = if args.no_wait {
        *volume
    } else {
        wait_for_copy(context, &spec.name)?
    };
    context.output.result(&Protected { volume: &volume }, || {
        context.output.say(match volume.state.as_str() {
            "protected" => {
                "  the first full copy is done: from here on every instant can be brought back"
                    .to_owned()
            }
            state => format!("  state: {state}; `varve status` tells when it is protected"),
        });
    });
    Ok(())
}

fn mapped(context: &Context, volume: &VolumeInfo) -> String {
    format!(
        "{} ({})",
        context.paths.devices().join(&volume.name).display(),
        volume.mapped
    )
}

fn spec(context: &Context, args: &ProtectArgs, device: &Path) -> Result<VolumeSpec, ControlError> {
    let metadata = std::fs::metadata(device)?;
    let kind = metadata.file_type();
    if !kind.is_block_device() && !kind.is_file() {
        return Err(ControlError::new(
            "V013-device",
            format!("{} is neither a block device nor a file", device.display()),
        ));
    }
    let (bytes, sector_bytes) = if kind.is_file() {
        (metadata.len() / 512 * 512, 512)
    } else {
        shape(&metadata)?
    };
    if bytes < BYTES_MIN {
        return Err(ControlError::new(
            "V032-small",
            format!(
                "{} has {}: too small, 1 MiB is the least",
                device.display(),
                show_bytes(bytes)
            ),
        ));
    }
    let base = device
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let name = args
        .name
        .clone()
        .unwrap_or_else(|| base.split('.').next().unwrap_or_default().to_owned());
    if !VolumeSpec::is_valid_name(&name) {
        return Err(ControlError::new(
            "V033-name",
            format!(
                "{name:?} cannot be a volume's name: letters, digits, '-', '_' and '.'; choose one with --name"
            ),
        ));
    }
    let segment_bytes = (args.log_size << 20 >> 4).clamp(1 << 20, 32 << 20);
    Ok(VolumeSpec {
        id: random_id()?,
        device: device.to_path_buf(),
        log: absolute(
            args.log
                .clone()
                .unwrap_or_else(|| context.paths.log().join(format!("{name}.log"))),
        )?,
        state: absolute(
            args.state
                .clone()
                .unwrap_or_else(|| context.paths.state().join(format!("{name}.state"))),
        )?,
        bytes,
        sector_bytes,
        segment_bytes,
        segment_count: (args.log_size << 20) / segment_bytes,
        ack: match args.ack {
            AckChoice::Async => Ack::Async,
            AckChoice::Local => Ack::Local,
        },
        front: match args.front {
            FrontChoice::Auto => FrontKind::Auto,
            FrontChoice::Ublk => FrontKind::Ublk,
            FrontChoice::Fuse => FrontKind::Fuse,
        },
        resync_bytes_max: 512 << 20,
        log_wait_max_ms: 250,
        name,
    })
}

fn absolute(path: PathBuf) -> Result<PathBuf, ControlError> {
    Ok(std::path::absolute(path)?)
}

/// Size and logical sector of a block device, from sysfs.
fn shape(metadata: &std::fs::Metadata) -> Result<(u64, u32), ControlError> {
    let directory = sysfs(metadata.rdev());
    let number = |name: &str| {
        std::fs::read_to_string(directory.join(name))
            .ok()
            .and_then(|text| text.trim().parse::<u64>().ok())
    };
    let sectors = number("size").ok_or_else(|| {
        ControlError::new(
            "V013-device",
            format!("{} has no size", directory.display()),
        )
    })?;
    let logical = number("queue/logical_block_size")
        .or_else(|| number("../queue/logical_block_size"))
        .unwrap_or(512);
    Ok((sectors * 512, logical as u32))
}

fn sysfs(rdev: u64) -> PathBuf {
    // The C library's layout of device numbers: 12 + 20 bits of major, 8 + 12 + 12 of minor.
    let major = ((rdev >> 8) & 0xfff) | ((rdev >> 32) & !0xfff);
    let minor = (rdev & 0xff) | ((rdev >> 12) & !0xff);
    PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
}

fn random_id() -> Result<String, ControlError> {
    let mut bytes = [0u8; 16];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Names what holds the device, before the daemon's exclusive open would only say "busy".
fn refuse_in_use(device: &Path) -> Result<(), ControlError> {
    let metadata = std::fs::metadata(device)?;
    if !metadata.file_type().is_block_device() {
        return Ok(());
    }
    let busy = |what: String| {
        Err(ControlError::new(
            "V012-busy",
            format!("{} {what}", device.display()),
        ))
    };
    let number = {
        let path = sysfs(metadata.rdev());
        path.file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default()
    };
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if let Some(place) = mounts
        .lines()
        .find(|line| line.split(' ').nth(2) == Some(&number))
        .and_then(|line| line.split(' ').nth(4))
    {
        return busy(format!(
            "is mounted on {place}. Unmount it (`umount {place}`), protect it, and mount the mapped device instead"
        ));
    }
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    if swaps.lines().any(|line| {
        line.split_whitespace()
            .next()
            .is_some_and(|path| std::fs::canonicalize(path).is_ok_and(|p| p == device))
    }) {
        return busy(format!(
            "is swap. `swapoff {}` first; swap itself is not worth protecting",
            device.display()
        ));
    }
    let holders: Vec<String> = std::fs::read_dir(sysfs(metadata.rdev()).join("holders"))
        .map(|entries| {
            entries
                .flatten()
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .collect()
        })
        .unwrap_or_default();
    if !holders.is_empty() {
        return busy(format!(
            "belongs to {} (LVM, md or dm). Protect that device instead",
            holders.join(", ")
        ));
    }
    Ok(())
}

fn same_disk(left: &Path, right: &Path) -> bool {
    let disk = |path: &Path| {
        let metadata = path.ancestors().find_map(|p| std::fs::metadata(p).ok())?;
        Some(if metadata.file_type().is_block_device() {
            metadata.rdev()
        } else {
            metadata.dev()
        })
    };
    disk(left).is_some() && disk(left) == disk(right)
}

/// Shows the first full copy's progress until it is done.
fn wait_for_copy(context: &Context, name: &str) -> Result<VolumeInfo, ControlError> {
    let mut bar = context.output.bar("first full copy");
    loop {
        let volumes = daemons::volumes(context)?;
        let Some(volume) = volumes.into_iter().find(|volume| volume.name == name) else {
            return Err(ControlError::new(
                "V019-unknown",
                format!("volume {name} went away"),
            ));
        };
        bar(Progress {
            done: volume.bytes - volume.marked_bytes.min(volume.bytes),
            total: volume.bytes,
        });
        if matches!(volume.state.as_str(), "protected" | "failed") {
            return Ok(volume);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// `varve unprotect`.
pub fn unprotect(context: &Context, name: &str, forget: bool) -> Result<(), ControlError> {
    let volumes = daemons::volumes(context)?;
    let volume = volumes.into_iter().find(|volume| volume.name == name);
    let volume = volume.ok_or_else(|| {
        ControlError::new(
            "V019-unknown",
            format!("no volume is named {name}; `varve status` lists them"),
        )
    })?;
    if !forget && volume.state != "failed" {
        // What the log still holds goes into the store first.
        daemons::store(context)?.call::<_, StoreReply>(&StoreOp::History {
            volume: name.to_owned(),
        })?;
    }
    daemons::filter(context)?.call::<_, FilterReply>(&FilterOp::Unprotect {
        name: name.to_owned(),
    })?;
    if forget {
        daemons::store(context)?.call::<_, StoreReply>(&StoreOp::Forget {
            id: volume.id.clone(),
        })?;
    }
    #[derive(Serialize)]
    struct Unprotected {
        device: String,
        history: &'static str,
    }
    let history = if forget { "deleted" } else { "kept" };
    context.output.result(
        &Unprotected {
            device: volume.device.clone(),
            history,
        },
        || {
            context.output.say(format!(
                "{} is a plain disk again; its history is {history}",
                volume.device
            ));
        },
    );
    Ok(())
}
