//! `hcp --to`: a copy of the device, copied out: to a file or device (sparse, resumable, verified), to standard output, to NBD, or as qcow2.
//!
//! What is copied is a hot copy, made for the purpose, or one that exists; a device that nobody writes to, or a file, is copied as it is.
//! A hot copy that was made for it goes when all is done. If the command is interrupted it stays, and the same command goes on where it was.

use crate::create::make;
use crate::list::find_copy;
use crate::source::find;
use crate::{Cli, Context};
use serde::Serialize;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use varve_cli::copy_out::{self, Allowed, Copied, Identity, Options, Resume, Source, Target};
use varve_cli::daemons;
use varve_cli::device::{mounted_on, size};
use varve_control::{ControlError, CopyInfo, FilterOp, FilterReply, at_signal};

#[derive(Serialize)]
struct Done {
    #[serde(flatten)]
    copied: Copied,
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
    let part = || target.file().and_then(Resume::load);
    let resume = part();
    let allowed = Allowed {
        anything: cli.overwrite,
        a_part: resume.is_some(),
        an_older_copy: cli.incremental_from.is_some(),
    };
    if allowed.an_older_copy && target.file().is_none() {
        return Err(ControlError::new(
            "H015-base",
            format!(
                "{target} cannot hold an older copy: --incremental-from goes onto a file or a device. Nothing was written"
            ),
        ));
    }
    target.check(&context.paths, allowed)?;
    let origin = origin(context, cli, device, resume.as_ref())?;
    if target.file().is_none()
        && let Some(copy) = origin.copy.as_ref().filter(|_| origin.made)
    {
        ends_with_the_command(context, copy);
    }
    let outcome = copy_from(context, cli, &target, &origin);
    if outcome.is_err()
        && let Some(copy) = origin.copy.as_ref().filter(|_| origin.made)
        && part().is_none_or(|part| part.source != identity(copy, true))
    {
        // Nothing to go on from: what was made for it goes.
        let name = copy.name.clone();
        let op = FilterOp::CopyRemove { name };
        let _ = daemons::filter(&context.paths)?.call::<_, FilterReply>(&op);
    }
    outcome
}

/// What cannot be gone on with leaves no copy behind when the command is broken off.
fn ends_with_the_command(context: &Context, copy: &CopyInfo) {
    let (paths, name) = (context.paths.clone(), copy.name.clone());
    at_signal(move |code| {
        let op = FilterOp::CopyRemove { name };
        // The copy goes when nobody has it open any more: this process has, until it ends.
        let filter = daemons::filter(&paths);
        if let Ok(Ok(mut filter)) = filter.map(|filter| filter.answer_within(PATIENCE)) {
            let _ = filter.call::<_, FilterReply>(&op);
        }
        code
    });
}

fn copy_from(
    context: &Context,
    cli: &Cli,
    target: &Target,
    origin: &Origin,
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
    let identity = origin.copy.as_ref().map(|copy| identity(copy, origin.made));
    let source = Source {
        path: &origin.path,
        bytes: origin.bytes,
        identity: identity.as_ref(),
    };
    let options = Options {
        only: changed,
        overwrite: cli.overwrite,
        verify: !cli.no_verify,
    };
    let copied = copy_out::copy_out(&context.output, source, target, options)?;
    let mut kept = None;
    // What was copied must still have been the copy at the end.
    if let Some(copy) = &origin.copy {
        let now = find_copy(context, &copy.name)?;
        if !now.lost.is_empty() {
            return Err(ControlError::new(
                "H006-lost",
                format!(
                    "the hot copy {} was given up while it was copied ({}): {target} is not a copy of one instant. {}",
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
            kept = Some(copy.name.clone());
        }
    }
    say(context, &Done { copied, kept });
    Ok(())
}

/// How long a command that is broken off waits for the daemon.
const PATIENCE: Duration = Duration::from_secs(2);
/// Before the name of a copy that was made for the command, and goes with it.
const MADE: &str = "made:";

fn identity(copy: &CopyInfo, made: bool) -> Identity {
    Identity {
        name: match made {
            true => format!("{MADE}{}", copy.name),
            false => copy.name.clone(),
        },
        time_ns: copy.created_ns,
        bytes: copy.bytes,
    }
}

fn say(context: &Context, done: &Done) {
    context.output.result(done, || {
        let text = format!("  {}", done.copied.words());
        if done.copied.target == "-" {
            eprintln!("{text}");
        } else {
            context.output.say(text);
            if let Some(name) = &done.kept {
                context.output.say(format!(
                    "  the hot copy {name} is kept: --incremental-from {name} copies what changed since; hcp -r {name} ends it"
                ));
            }
        }
    });
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
                    // One that somebody else has made is not ours to end.
                    let name = resume.source.name.strip_prefix(MADE)?;
                    let copy = find_copy(context, name).ok()?;
                    Some((resume, copy))
                })
                .filter(|(resume, copy)| {
                    resume.source == identity(copy, true)
                        && copy.volume == source.volume.name
                        && copy.lost.is_empty()
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
