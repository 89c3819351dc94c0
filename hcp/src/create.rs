//! Making copies: asks the data path, then mounts, and says step by step what was done.

use crate::source::{Source, find};
use crate::{Cli, Context};
use serde::Serialize;
use std::path::{Path, PathBuf};
use varve_cli::{MountMode, daemons, file_system, mount_copy, node_of, show_bytes, show_time};
use varve_control::{ControlError, CopyInfo, FilterOp, FilterReply, NewCopy};

/// A copy, and where it is mounted.
#[derive(Serialize)]
pub struct Made {
    /// The copy.
    #[serde(flatten)]
    pub copy: CopyInfo,
    /// Where it is mounted, if it is.
    pub mounted: Option<PathBuf>,
    /// What there is to know about the mount.
    pub mount_note: String,
}

/// Makes hot copies of one instant, and says what was done.
pub fn make(
    context: &Context,
    cli: &Cli,
    sources: &[Source],
    writable: bool,
) -> Result<Vec<CopyInfo>, ControlError> {
    for source in sources {
        context.output.say(format!(
            "Hot copy of {} (volume {}, shown as {}) …",
            source.name, source.volume.name, source.volume.mapped
        ));
    }
    let wanted = sources
        .iter()
        .map(|source| {
            let store = cli.changed_blocks.as_ref().map(std::path::absolute);
            Ok(NewCopy {
                volume: source.volume.name.clone(),
                name: cli.name.clone().unwrap_or_default(),
                store: store.transpose()?,
                store_bytes: cli.store_size.unwrap_or(0) << 20,
                quota: cli.quota,
            })
        })
        .collect::<Result<Vec<NewCopy>, ControlError>>()?;
    let op = FilterOp::CopyCreate {
        copies: wanted,
        persist: cli.persist,
        writable,
        freeze: !cli.no_freeze,
    };
    let FilterReply::Copies { copies } = daemons::filter(&context.paths)?.call(&op)? else {
        return Err(daemons::unexpected("blkfilter"));
    };
    for copy in &copies {
        say_steps(context, copy);
    }
    Ok(copies)
}

/// `hcp DEVICE`, `hcp --group DEVICE…`.
pub fn copy(context: &Context, cli: &Cli) -> Result<(), ControlError> {
    let names: Vec<&String> = cli.device.iter().chain(&cli.group).collect();
    let sources: Vec<Source> = names
        .iter()
        .map(|name| find(context, name))
        .collect::<Result<_, _>>()?;
    let copies = make(context, cli, &sources, !cli.read_only)?;
    let (mut made, mut unmounted) = (Vec::new(), false);
    for (source, copy) in sources.iter().zip(copies) {
        let (mounted, mount_note) = if cli.skip_mount {
            (None, None)
        } else {
            let mode = match cli.read_only {
                false => MountMode::Writable,
                // Nothing is written to it, no journal either: a frozen XFS has one.
                true => MountMode::Untouched,
            };
            mount(context, cli, source, &copy.copy, mode)
        };
        if let Some(place) = &mounted {
            context
                .output
                .say(format!("  mounted on {}", place.display()));
        }
        if let Some(note) = &mount_note {
            context.output.say(format!("  {}", note.text));
        }
        unmounted |= mount_note
            .as_ref()
            .is_some_and(|note| cli.is_unmounted(note));
        context
            .output
            .say(format!("  end it with: hcp -r {}", copy.name));
        made.push(Made {
            copy,
            mounted,
            mount_note: mount_note.map_or_else(String::new, |note| note.text),
        });
    }
    finish(context, &made, unmounted)
}

/// Says what was made, and whether something is not mounted that should be.
pub fn finish<T: Serialize>(
    context: &Context,
    made: &T,
    unmounted: bool,
) -> Result<(), ControlError> {
    if unmounted {
        return Err(context.output.partly(made, unmounted_error(), || {}));
    }
    context.output.result(made, || {});
    Ok(())
}

/// Why a copy is not mounted.
pub struct MountNote {
    /// In words.
    pub text: String,
    /// There is nothing that could be.
    pub is_no_fault: bool,
}

impl Cli {
    /// Whether this is not what was asked for.
    pub fn is_unmounted(&self, note: &MountNote) -> bool {
        !note.is_no_fault || self.mount_point.is_some()
    }
}

/// Whoever goes on as if it were mounted there works on an empty directory.
fn unmounted_error() -> ControlError {
    ControlError::new(
        "H021-unmounted",
        "the copy is there, but it is not mounted where it should be (see above)",
    )
}

/// When, and which instant of the history that is, if it is one.
pub fn created(copy: &CopyInfo) -> String {
    let time = show_time(copy.created_ns);
    match copy.lsn {
        0 => time,
        lsn => format!("{time} (lsn:{lsn})"),
    }
}

fn say_steps(context: &Context, copy: &CopyInfo) {
    let say = |text: String| context.output.say(text);
    say(format!(
        "  changed blocks go to {} ({}, {} free)",
        copy.store,
        show_bytes(copy.store_bytes),
        show_bytes(copy.store_free_bytes)
    ));
    if copy.frozen_us > 0 {
        let seconds = copy.frozen_us as f64 / 1e6;
        say(format!(
            "  the file system was frozen for {seconds:.3} seconds"
        ));
    }
    if !copy.note.is_empty() {
        say(format!("  note: {}", copy.note));
    }
    say(format!("  created {}", created(copy)));
    say(format!("  hot copy {} is {}", copy.name, copy.copy));
    if copy.persist {
        say(
            "  it survives a reboot and a power cut; what is written to the copy itself does not"
                .to_owned(),
        );
    }
}

/// Mounts a copy; a copy that cannot be mounted is a copy all the same.
pub fn mount(
    context: &Context,
    cli: &Cli,
    source: &Source,
    device: &str,
    mode: MountMode,
) -> (Option<PathBuf>, Option<MountNote>) {
    let node = node_of(device, source.partition);
    if file_system(&node).is_empty() {
        let partitions = partitions(device);
        let text = if partitions.is_empty() {
            format!("{node} holds no file system that is known here: not mounted")
        } else {
            format!(
                "{node} is a whole disk: not mounted. Its partitions: {}",
                partitions.join(", ")
            )
        };
        let is_no_fault = true;
        return (None, Some(MountNote { text, is_no_fault }));
    }
    let place = cli
        .mount_point
        .clone()
        .unwrap_or_else(|| default_place(context, source));
    let mounted = std::fs::create_dir_all(&place)
        .map_err(|error| {
            ControlError::new("X005-directory", format!("{}: {error}", place.display()))
        })
        .and_then(|()| mount_copy(&node, &place, mode, &[]));
    match mounted {
        Ok(()) => (Some(place), None),
        Err(failed) => {
            let text = format!("not mounted: {}", failed.message);
            let is_no_fault = false;
            (None, Some(MountNote { text, is_no_fault }))
        }
    }
}

/// `/var/hotcopy/DEVICE`; the second copy of a device gets a number behind it.
fn default_place(context: &Context, source: &Source) -> PathBuf {
    let name = Path::new(&source.name).file_name().map_or_else(
        || source.volume.name.clone(),
        |n| n.to_string_lossy().into_owned(),
    );
    let base = context.paths.root().join("var/hotcopy");
    let is_free = |place: &PathBuf| {
        let text = place.display().to_string();
        varve_cli::output_of("findmnt", &["-n", "-o", "SOURCE", "--mountpoint", &text]).is_empty()
    };
    (1..)
        .map(|number| match number {
            1 => base.join(&name),
            _ => base.join(format!("{name}-{number}")),
        })
        .find(is_free)
        .unwrap_or(base)
}

fn partitions(device: &str) -> Vec<String> {
    (1..=128)
        .map(|number| format!("{device}p{number}"))
        .filter(|node| Path::new(node).exists())
        .collect()
}
