//! `hcp --to`: a copy of the device, copied out: to a file or device (sparse, resumable, verified), to standard output, to NBD, or as qcow2.
//!
//! What is copied is a hot copy, made for the purpose, or one that exists; a device that nobody writes to, or a file, is copied as it is.
//! A hot copy that was made for it goes when all is done. If the command is interrupted it stays, and the same command goes on where it was.

use crate::create::make;
use crate::engine::{Job, Plan, copy_ranges, stream};
use crate::list::find_copy;
use crate::resume::Resume;
use crate::source::find;
use crate::{Cli, Context};
use serde::Serialize;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;
use varve_cli::device::{mounted_on, size};
use varve_cli::{daemons, show_bytes};
use varve_control::{ControlError, CopyInfo, FilterOp, FilterReply, is_same_storage};

#[derive(Serialize)]
struct Copied {
    source: String,
    target: String,
    bytes: u64,
    read_bytes: u64,
    written_bytes: u64,
    verified: bool,
    seconds: f64,
    /// The hot copy, if it was kept.
    kept: Option<String>,
}

/// What is read.
struct Origin {
    path: PathBuf,
    bytes: u64,
    copy: Option<CopyInfo>,
    /// The hot copy was made for this command.
    made: bool,
}

/// `hcp --to TARGET DEVICE`.
pub fn copy_out(context: &Context, cli: &Cli, device: &str, to: &str) -> Result<(), ControlError> {
    let target = Target::parse(to)?;
    let resume = target.file().and_then(Resume::load);
    target.check(context, cli, resume.is_some())?;
    let origin = origin(context, cli, device, resume.as_ref())?;
    let outcome = copy_from(context, cli, to, &target, &origin, resume);
    if outcome.is_err()
        && let Some(copy) = origin.copy.as_ref().filter(|_| origin.made)
        && target.file().and_then(Resume::load).is_none()
    {
        // Nothing to go on from: what was made for it goes.
        let name = copy.name.clone();
        let op = FilterOp::CopyRemove { name };
        let _ = daemons::filter(&context.paths)?.call::<_, FilterReply>(&op);
    }
    outcome
}

fn copy_from(
    context: &Context,
    cli: &Cli,
    to: &str,
    target: &Target,
    origin: &Origin,
    resume: Option<Resume>,
) -> Result<(), ControlError> {
    // After the cut: what the base lacks by then is all that can differ.
    let changed = match (&cli.incremental_from, &origin.copy) {
        (Some(base), Some(copy)) => Some(changed_since(context, base, copy)?),
        (Some(_), None) => {
            return Err(ControlError::new(
                "H015-base",
                "--incremental-from is for hot copies: nothing is known of what changed in a file or an unprotected device",
            ));
        }
        (None, _) => None,
    };
    let begun = Instant::now();
    let mut copied = Copied {
        source: origin.path.display().to_string(),
        target: to.to_owned(),
        bytes: origin.bytes,
        read_bytes: 0,
        written_bytes: 0,
        verified: false,
        seconds: 0.0,
        kept: None,
    };
    match target {
        Target::Stdout => {
            copied.read_bytes = stream(&origin.path, origin.bytes, bar(context, "copying"))?;
            copied.written_bytes = copied.read_bytes;
        }
        Target::Nbd(uri) => by_tool(&origin.path, uri)?,
        Target::Qcow2(path) => {
            qcow2(&origin.path, path, cli.no_verify)?;
            copied.verified = !cli.no_verify;
        }
        Target::File(path) => {
            // Only what this copy began, in a file that is still as it was left.
            let resume = resume.filter(|resume| {
                let same = origin.copy.as_ref().is_some_and(|copy| resume.is_of(copy));
                same && size(path) == Some(origin.bytes)
            });
            let from = resume.as_ref().map_or(0, |resume| resume.done);
            if from > 0 {
                context
                    .output
                    .say(format!("  going on behind the first {}", show_bytes(from)));
            }
            let plan = Plan {
                source: origin.path.clone(),
                target: path.clone(),
                bytes: origin.bytes,
                from,
                only: changed,
                verify: !cli.no_verify,
                overwrite: cli.overwrite || resume.is_some(),
            };
            let record = origin.copy.as_ref().map(|copy| Resume::of(path, copy));
            let Job { read, written } =
                copy_ranges(&plan, record.as_ref(), |what| bar(context, what))?;
            (copied.read_bytes, copied.written_bytes) = (read, written);
            copied.verified = plan.verify;
        }
    }
    copied.seconds = begun.elapsed().as_secs_f64();
    // What was copied must still have been the copy at the end.
    if let Some(copy) = &origin.copy {
        let now = find_copy(context, &copy.name)?;
        if !now.lost.is_empty() {
            return Err(ControlError::new(
                "H006-lost",
                format!(
                    "the hot copy {} was given up while it was copied ({}): {to} is not a copy of one instant. {}",
                    copy.name, now.lost, now.note
                ),
            ));
        }
        if origin.made && cli.name.is_none() && cli.incremental_from.is_none() {
            let op = FilterOp::CopyRemove {
                name: copy.name.clone(),
            };
            daemons::filter(&context.paths)?.call::<_, FilterReply>(&op)?;
        } else {
            copied.kept = Some(copy.name.clone());
        }
    }
    say(context, &copied);
    Ok(())
}

fn say(context: &Context, copied: &Copied) {
    context.output.result(copied, || {
        let verified = if copied.verified { ", verified" } else { "" };
        let text = format!(
            "  {} copied to {} in {:.1} s ({} read, {} written{verified})",
            show_bytes(copied.bytes),
            copied.target,
            copied.seconds,
            show_bytes(copied.read_bytes),
            show_bytes(copied.written_bytes)
        );
        if copied.target == "-" {
            eprintln!("{text}");
        } else {
            context.output.say(text);
            if let Some(name) = &copied.kept {
                context.output.say(format!(
                    "  the hot copy {name} is kept: --incremental-from {name} copies what changed since; hcp -r {name} ends it"
                ));
            }
        }
    });
}

fn bar(context: &Context, what: &str) -> impl FnMut(u64, u64) + use<> {
    let mut show = context.output.bar(what);
    move |done, total| show(varve_control::Progress { done, total })
}

/// Finds or makes what is to be read.
fn origin(
    context: &Context,
    cli: &Cli,
    device: &str,
    resume: Option<&Resume>,
) -> Result<Origin, ControlError> {
    let of_copy = |copy: CopyInfo, made: bool| Origin {
        path: PathBuf::from(&copy.copy),
        bytes: copy.bytes,
        copy: Some(copy),
        made,
    };
    if let Ok(copy) = find_copy(context, device) {
        return Ok(of_copy(copy, false));
    }
    match find(context, device) {
        Ok(source) => {
            if source.partition.is_some() {
                return Err(ControlError::new(
                    "H013-partition",
                    format!(
                        "{device} is a partition of {}: copy the whole disk (its partition table goes with it), or make a copy (`hcp --skip-mount {device}`) and say which of its partitions: hcp --to FILE /dev/…pN",
                        source.volume.mapped
                    ),
                ));
            }
            // The copy of an interrupted command.
            if let Some(copy) = resume
                .and_then(|resume| {
                    find_copy(context, &resume.copy)
                        .ok()
                        .map(|copy| (resume, copy))
                })
                .filter(|(resume, copy)| {
                    resume.is_of(copy) && copy.volume == source.volume.name && copy.lost.is_empty()
                })
                .map(|(_, copy)| copy)
            {
                return Ok(of_copy(copy, true));
            }
            let made = make(context, cli, std::slice::from_ref(&source), false)?;
            let copy = made
                .into_iter()
                .next()
                .ok_or_else(|| daemons::unexpected("blkfilter"))?;
            Ok(of_copy(copy, true))
        }
        Err(unmapped) => plain(device, unmapped),
    }
}

/// A file, or a device that nobody writes to.
fn plain(device: &str, unmapped: ControlError) -> Result<Origin, ControlError> {
    let Ok(path) = std::fs::canonicalize(device) else {
        return Err(unmapped);
    };
    let metadata = std::fs::metadata(&path)?;
    let kind = metadata.file_type();
    let quiet = kind.is_file() || (kind.is_block_device() && is_quiet(&path));
    match (quiet, size(&path)) {
        (true, Some(bytes)) => Ok(Origin {
            path,
            bytes,
            copy: None,
            made: false,
        }),
        _ => Err(unmapped),
    }
}

/// Whether nobody can be writing to a device: it is read-only, or neither mounted nor held by anything.
fn is_quiet(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    let read_only = std::fs::read_to_string(Path::new("/sys/class/block").join(name).join("ro"));
    if read_only.is_ok_and(|text| text.trim() == "1") {
        return true;
    }
    const O_EXCL: i32 = 0o200;
    let exclusive = std::fs::File::options()
        .read(true)
        .custom_flags(O_EXCL)
        .open(path);
    mounted_on(path).is_empty() && exclusive.is_ok()
}

/// Ranges that were overwritten on the device since a hot copy was cut.
fn changed_since(
    context: &Context,
    base: &str,
    copy: &CopyInfo,
) -> Result<Vec<(u64, u64)>, ControlError> {
    let base = find_copy(context, base)?;
    if base.volume != copy.volume || base.created_ns > copy.created_ns {
        return Err(ControlError::new(
            "H015-base",
            format!(
                "{} is no base for {}: it is of volume {} and must be an older copy of {}",
                base.name, copy.name, base.volume, copy.volume
            ),
        ));
    }
    let op = FilterOp::CopyChanged { name: base.name };
    match daemons::filter(&context.paths)?.call(&op)? {
        FilterReply::Ranges { ranges } => Ok(ranges),
        _ => Err(daemons::unexpected("blkfilter")),
    }
}

enum Target {
    Stdout,
    Nbd(String),
    Qcow2(PathBuf),
    File(PathBuf),
}

impl Target {
    fn parse(text: &str) -> Result<Target, ControlError> {
        let path = || std::path::absolute(text);
        Ok(match text {
            "-" => Target::Stdout,
            _ if text.starts_with("nbd://") || text.starts_with("nbd+unix://") => {
                Target::Nbd(text.to_owned())
            }
            _ if text.ends_with(".qcow2") => Target::Qcow2(path()?),
            _ => Target::File(path()?),
        })
    }

    /// Before anything is made: whether it may be written, and can be.
    fn check(&self, context: &Context, cli: &Cli, resumable: bool) -> Result<(), ControlError> {
        let exists = |path: &Path| {
            ControlError::new(
                "H018-target",
                format!(
                    "{} holds something already. Nothing was written; remove it, choose another name, or say --overwrite",
                    path.display()
                ),
            )
        };
        match self {
            Target::Stdout => Ok(()),
            Target::Nbd(_) => has_tool("nbdcopy", "libnbd-bin"),
            Target::Qcow2(path) => {
                has_tool("qemu-img", "qemu-utils")?;
                if path.exists() && !cli.overwrite {
                    return Err(exists(path));
                }
                Ok(())
            }
            Target::File(path) => {
                let is_device =
                    std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device());
                if cli.incremental_from.is_some() {
                    return if path.exists() {
                        Ok(())
                    } else {
                        Err(ControlError::new(
                            "H015-base",
                            format!(
                                "{} is not there: --incremental-from needs a file or device that holds the older copy",
                                path.display()
                            ),
                        ))
                    };
                }
                if is_device {
                    refuse_volumes(context, path)?;
                }
                let holds = if is_device {
                    holds_data(path)?
                } else {
                    std::fs::metadata(path).is_ok_and(|metadata| metadata.len() > 0)
                };
                if holds && !resumable && !cli.overwrite {
                    return Err(exists(path));
                }
                Ok(())
            }
        }
    }

    fn file(&self) -> Option<&Path> {
        match self {
            Target::File(path) => Some(path),
            _ => None,
        }
    }
}

/// A device that belongs to a volume is nobody's target.
fn refuse_volumes(context: &Context, path: &Path) -> Result<(), ControlError> {
    for volume in daemons::volumes(&context.paths).unwrap_or_default() {
        for place in [&volume.device, &volume.mapped] {
            if !place.is_empty() && is_same_storage(path, Path::new(place)) {
                return Err(ControlError::new(
                    "V037-same",
                    format!(
                        "{} belongs to the volume `{}`. Nothing was written",
                        path.display(),
                        volume.name
                    ),
                ));
            }
        }
    }
    Ok(())
}

/// Whether the first MiB of a device is not all zero.
fn holds_data(path: &Path) -> Result<bool, ControlError> {
    let mut area = Vec::new();
    std::io::Read::read_to_end(
        &mut std::io::Read::take(std::fs::File::open(path)?, 1 << 20),
        &mut area,
    )?;
    Ok(area.iter().any(|byte| *byte != 0))
}

fn has_tool(program: &str, package: &str) -> Result<(), ControlError> {
    run_tool(program, package, &["--version"])
}

fn run_tool(program: &str, package: &str, arguments: &[&str]) -> Result<(), ControlError> {
    let outcome = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| {
            ControlError::new(
                "H014-tool",
                format!("{program}: {error}; install {package}"),
            )
        })?;
    if outcome.status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&outcome.stderr).trim().to_owned();
    Err(ControlError::new("H014-tool", format!("{program}: {why}")))
}

/// To an NBD server: libnbd's own tool does it.
fn by_tool(source: &Path, uri: &str) -> Result<(), ControlError> {
    run_tool(
        "nbdcopy",
        "libnbd-bin",
        &["--flush", "--", &source.display().to_string(), uri],
    )
}

fn qcow2(source: &Path, target: &Path, no_verify: bool) -> Result<(), ControlError> {
    // For nobody else's eyes: qemu-img keeps the mode of what is there.
    std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(target)?;
    let (source, target) = (source.display().to_string(), target.display().to_string());
    run_tool(
        "qemu-img",
        "qemu-utils",
        &[
            "convert", "-f", "raw", "-O", "qcow2", "-W", "-T", "none", &source, &target,
        ],
    )?;
    if no_verify {
        return Ok(());
    }
    run_tool(
        "qemu-img",
        "qemu-utils",
        &["compare", "-f", "raw", "-F", "qcow2", &source, &target],
    )
}
