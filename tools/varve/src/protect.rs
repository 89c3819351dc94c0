//! Protecting a device and ending it.

use crate::next_boot;
use crate::{Context, daemons};
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use varve_cli::device::{refuse_in_use, same_disk, shape};
use varve_cli::{show_bytes, with_clock_times};
use varve_control::{
    Ack, ControlError, FilterOp, FilterReply, FrontKind, Progress, StoreOp, StoreReply, VolumeInfo,
    VolumeSpec, lasting_path,
};

/// How long a log that is given up is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
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
    /// For a device that is mounted now: rewrites /etc/fstab, and protection begins with the next boot. `varve unprotect` takes it back.
    #[arg(long)]
    at_next_boot: bool,
    /// Only say what would be done.
    #[arg(long)]
    dry_run: bool,
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
    if args.at_next_boot {
        return next_boot::protect(context, spec, &device, args.dry_run);
    }
    refuse_in_use(&device)?;
    if args.dry_run {
        context.output.result(&spec, || {
            println!(
                "{} ({}) would be protected as `{}`, with its log in {}. Nothing was changed",
                device.display(),
                show_bytes(spec.bytes),
                spec.name,
                spec.log.display()
            );
        });
        return Ok(());
    }
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
        device: lasting_path(device),
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
        begins_after_boot: String::new(),
        apart: false,
        name,
    })
}

fn absolute(path: PathBuf) -> Result<PathBuf, ControlError> {
    Ok(lasting_path(&std::path::absolute(path)?))
}

fn random_id() -> Result<String, ControlError> {
    let mut bytes = [0u8; 16];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
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

/// `varve resize`.
pub fn resize(context: &Context, name: &str) -> Result<(), ControlError> {
    let reply = daemons::filter(context)?.call(&FilterOp::Resize {
        name: name.to_owned(),
    })?;
    let FilterReply::Volume { volume } = reply else {
        return Err(ControlError::new(
            "C005-answer",
            "blkfilter gave an unexpected answer",
        ));
    };
    context.output.result(&Protected { volume: &volume }, || {
        context.output.say(format!(
            "{name} has {} now; {}. `varve status` tells when it is whole again",
            show_bytes(volume.bytes),
            volume.note
        ));
    });
    Ok(())
}

/// How protection ends.
pub struct Ending {
    /// The history is deleted, too.
    pub forget: bool,
    /// What the log holds and the store could not take may be lost.
    pub drop_log: bool,
    /// Without the daemons, for a machine that does not come up with them.
    pub offline: bool,
}

/// `varve unprotect`.
pub fn unprotect(context: &Context, name: &str, how: &Ending) -> Result<(), ControlError> {
    // Its mounts are to be made what they were: before anything is ended it is known whether that can be done.
    next_boot::table_text(context)?;
    if how.forget && !how.offline {
        refuse_open_images(context, name)?;
    }
    let ended = if how.offline {
        next_boot::take_away(context, name).map(|device| (device, None))
    } else {
        end_protection(context, name, how)
    };
    // Also for a volume that is not known any more: its mounts must not lead nowhere.
    let unknown = ended
        .as_ref()
        .is_err_and(|error| error.code.starts_with("V019"));
    let fstab_restored = if ended.is_ok() || unknown {
        next_boot::restore_mounts(context, name)?
    } else {
        false
    };
    let (device, history) = match ended {
        // Its protection has ended before, and its history was left.
        Err(_) if unknown && how.forget => {
            let former = varve_control::find_former(&context.paths.former_volumes(), name)?;
            (former.device.display().to_string(), Some(former.id))
        }
        ended => ended?,
    };
    if let (true, Some(id)) = (how.forget, history.clone()) {
        daemons::store(context)?.call::<_, StoreReply>(&StoreOp::Forget { id })?;
    }
    #[derive(Serialize)]
    struct Unprotected {
        device: String,
        history: &'static str,
        fstab_restored: bool,
    }
    let ended = Unprotected {
        device,
        history: match how.forget {
            true => "deleted",
            false => "kept",
        },
        fstab_restored,
    };
    context.output.result(&ended, || {
        context.output.say(format!(
            "{} is a plain disk again; its history is {}{}",
            ended.device,
            ended.history,
            if fstab_restored {
                "; /etc/fstab is as it was before"
            } else {
                ""
            }
        ));
        if let (false, Some(id)) = (how.forget, &history) {
            context.output.say(format!(
                "  `varve history --volume {id}`, mount, files and export go on showing it (by the name {name}, too, while no other volume has it); `varve unprotect {id} --forget` deletes it"
            ));
        }
    });
    Ok(())
}

/// A history of which an instant is shown cannot be deleted: that is said before anything is ended.
fn refuse_open_images(context: &Context, name: &str) -> Result<(), ControlError> {
    let reply = daemons::store(context)?.call(&StoreOp::Exports)?;
    let StoreReply::Exports { exports } = reply else {
        return Ok(());
    };
    let ours = |what: &str| what.starts_with(&format!("{name} at LSN "));
    match exports.iter().find(|(_, what)| ours(what)) {
        Some((device, what)) => Err(ControlError::new(
            "S013-in-use",
            format!(
                "{device} shows {what}: while it does, the history cannot be deleted. Nothing was changed. `varve umount DIRECTORY`, or `varve unexport {device}`, first"
            ),
        )),
        None => Ok(()),
    }
}

/// Closes the volume; gives its device, and its ID if it has a history.
fn end_protection(
    context: &Context,
    name: &str,
    how: &Ending,
) -> Result<(String, Option<String>), ControlError> {
    let volumes = daemons::volumes(context)?;
    let volume = volumes.into_iter().find(|volume| volume.name == name);
    let volume = volume.ok_or_else(|| {
        ControlError::new(
            "V019-unknown",
            format!("no volume is named {name}; `varve status` lists them"),
        )
    })?;
    if volume.state != "waiting" && !how.forget && !how.drop_log {
        taken(context, name, None).map_err(|why| untaken(name, &why))?;
    } else if volume.state != "waiting" && !how.forget {
        // What can be taken at once is; nobody waits for a log that is given up.
        let _ = taken(context, name, Some(PATIENCE));
    }
    daemons::filter(context)?.call::<_, FilterReply>(&FilterOp::Unprotect {
        name: name.to_owned(),
    })?;
    let id = (volume.state != "waiting").then_some(volume.id);
    Ok((volume.device, id))
}

/// Has the store take what the log still holds; an error says why it has not.
fn taken(context: &Context, name: &str, limit: Option<Duration>) -> Result<(), ControlError> {
    let op = StoreOp::TakeAll {
        volume: name.to_owned(),
    };
    let mut store = daemons::store(context)?;
    if let Some(limit) = limit {
        store = store.answer_within(limit)?;
    }
    store.call::<_, StoreReply>(&op).map(|_| ())
}

fn untaken(name: &str, why: &ControlError) -> ControlError {
    // What was not found is an instant, not the volume.
    let code = match why.code.as_str() {
        "I006-gap" => "V020-late",
        code => code,
    };
    ControlError::new(
        code,
        with_clock_times(&format!(
            "{name}: what the log holds may not all be in the history: {}. Unprotecting deletes the log. Nothing was changed. Mend that first; or give up \
             what is only there: `varve unprotect {name} --drop-log` (--forget deletes all of the history)",
            why.message
        )),
    )
}
