//! `varve drill`: is an instant of use? It is mounted into an overlay, so that its journals are replayed; the file systems' own checkers look at it, and a
//! command of the user's, which may write there. What was found is noted with the history: `varve status` shows the last proven instant.

use crate::command::{self, Verdict};
use crate::image::{HeldImage, looking};
use crate::past::{ask, instant};
use crate::{Context, daemons};
use clap::Args;
use serde::Serialize;
use std::path::Path;
use std::process::{Command, ExitCode};
use varve_cli::{MountMode, file_system, keep_mounts_private, node_of, output_of};
use varve_control::{ControlError, DrillInfo, StoreOp};

#[derive(Args)]
pub struct DrillArgs {
    /// As for `mount`.
    #[arg(long, value_name = "INSTANT", default_value = "now")]
    at: String,
    /// Run in each file system of the image (also $VARVE_IMAGE), which may be written to; exit code 0: good, 1 to 124: bad, 125: not of this one.
    #[arg(long, value_name = "COMMAND")]
    exec: Option<String>,
    /// Only this partition of a whole disk's image.
    #[arg(long, value_name = "N")]
    partition: Option<u32>,
}

const SWAP: &str = "swap";

/// What was found of one file system.
#[derive(Serialize)]
struct Part {
    partition: Option<u32>,
    file_system: String,
    mounted: bool,
    /// None: there is no checker for this kind.
    checked: Option<bool>,
    /// None: no command was given, or it said nothing of this one.
    command: Option<bool>,
    /// Something kept it from being looked at to the end.
    unfinished: bool,
    /// That it is not mounted says nothing about it.
    not_to_be_mounted: bool,
    /// What went wrong, in the words of who found it.
    said: String,
}

impl Part {
    fn is_good(&self) -> bool {
        // Nobody expects anything of swap.
        self.file_system == SWAP
            || self.not_to_be_mounted
            || self.mounted && self.checked != Some(false) && self.command != Some(false)
    }

    fn is_proven(&self) -> bool {
        self.is_good() && (self.checked.is_some() || self.command.is_some())
    }

    fn words(&self) -> String {
        if self.file_system == SWAP {
            return format!("partition {}, swap", self.partition.unwrap_or_default());
        }
        let place = match self.partition {
            Some(number) => format!("partition {number}, {}", self.file_system),
            None => self.file_system.clone(),
        };
        let place = match self.file_system.is_empty() {
            true => format!("{place}no file system that is known here"),
            false => place,
        };
        let verdict = |word: &str, verdict: Option<bool>| match verdict {
            Some(true) => format!(", {word} good"),
            Some(false) => format!(", {word} BAD"),
            None => String::new(),
        };
        format!(
            "{place}: {}{}{}{}",
            if self.mounted {
                "mounted"
            } else {
                "NOT MOUNTED"
            },
            verdict("checker", self.checked),
            verdict("command", self.command),
            if self.unfinished {
                ", NOT LOOKED AT TO THE END"
            } else {
                ""
            }
        )
    }
}

#[derive(Serialize)]
struct Held {
    volume: String,
    #[serde(flatten)]
    drill: DrillInfo,
    parts: Vec<Part>,
}

/// Holds a drill.
pub fn run(
    context: &Context,
    volume: Option<String>,
    args: &DrillArgs,
) -> Result<ExitCode, ControlError> {
    let volume = daemons::volume(context, volume)?;
    let wanted = instant(&args.at)?;
    keep_mounts_private()?;
    let mut image = HeldImage::open(context, &volume, &wanted, true)?;
    let directory = looking(context);
    let mut parts = Vec::new();
    for (partition, kind) in file_systems(&image.device, args.partition) {
        // Whatever keeps it from being proven is noted with the rest.
        parts.push(look(&mut image, &directory, partition, kind, args));
    }
    let proven = parts.iter().all(|part| part.is_good() && !part.unfinished)
        && parts.iter().any(Part::is_proven);
    let words: Vec<String> = parts.iter().map(Part::words).collect();
    let drill = DrillInfo {
        held_ns: jiff::Timestamp::now().as_nanosecond() as i64,
        lsn: image.lsn,
        time_ns: image.time_ns,
        proven,
        found: words.join("; "),
    };
    let when = image.instant();
    // What could not be told about proves nothing, and disproves nothing either; that there is nothing known any more tells something.
    let untold = |part: &Part| part.not_to_be_mounted && !part.file_system.is_empty();
    if !parts.iter().all(untold) {
        let op = StoreOp::Drilled {
            volume: volume.clone(),
            drill: drill.clone(),
        };
        ask(context, &op, "")?;
    }
    let held = Held {
        volume,
        drill,
        parts,
    };
    context.output.result(&held, || {
        for part in &held.parts {
            println!("{}", part.words());
            for line in part.said.lines() {
                println!("    {line}");
            }
        }
        let verdict = match (proven, held.parts.iter().all(Part::is_good)) {
            (true, _) => "proven",
            (false, true) => "NOT PROVEN: not all of it could be looked at; what is said above, or --exec COMMAND, may help",
            (false, false) => {
                "NOT GOOD. Look for the last good instant: varve bisect --good INSTANT --exec COMMAND"
            }
        };
        println!("{} at {when}: {verdict}", held.volume);
    });
    image.close()?;
    Ok(match proven {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(7),
    })
}

/// The file systems of an image: (partition, kind); all partitions of a disk, or what there is instead.
fn file_systems(device: &str, only: Option<u32>) -> Vec<(Option<u32>, String)> {
    let found = |partition| (partition, file_system(&node_of(device, partition)));
    let whole = found(only);
    let there = |number: &u32| Path::new(&format!("{device}p{number}")).exists();
    let mut parts = (1..=128).filter(there).peekable();
    match only {
        None if whole.1.is_empty() && parts.peek().is_some() => {
            let holds = |number: &u32| !holds_none(&node_of(device, Some(*number)));
            parts
                .filter(holds)
                .map(|number| found(Some(number)))
                .collect()
        }
        _ => vec![whole],
    }
}

/// Whether the table of partitions says that one holds no file system: BIOS boot, PReP, an extended one.
fn holds_none(node: &str) -> bool {
    const NONE: [&str; 6] = [
        "21686148-6449-6e6f-744e-656564454649",
        "9e1a2d38-c612-4316-aa26-8b49521e5a8b",
        "0x41",
        "0x5",
        "0xf",
        "0x85",
    ];
    let kind = output_of(
        "blkid",
        &["-p", "-o", "value", "-s", "PART_ENTRY_TYPE", node],
    );
    NONE.contains(&kind.to_lowercase().as_str())
}

/// Looks at one. What goes wrong is what was found.
fn look(
    image: &mut HeldImage,
    directory: &Path,
    partition: Option<u32>,
    kind: String,
    args: &DrillArgs,
) -> Part {
    let mut part = Part {
        partition,
        file_system: kind,
        mounted: false,
        checked: None,
        command: None,
        unfinished: false,
        not_to_be_mounted: false,
        said: String::new(),
    };
    if part.file_system != SWAP
        && let Err(failed) = mount_and_check(&mut part, image, directory, args)
    {
        part.said += &failed.message;
        part.unfinished = true;
        if let Some(why) = not_to_be_mounted(&part, &failed) {
            part.not_to_be_mounted = true;
            part.said += &format!("\n{why}");
        }
    }
    if (part.unfinished || !part.is_good())
        && let Some(why) = image.trouble()
    {
        part.unfinished = true;
        part.not_to_be_mounted = false;
        part.said += &format!("\n{why}");
    }
    part
}

/// Why something that is whole cannot be mounted here.
fn not_to_be_mounted(part: &Part, failed: &ControlError) -> Option<&'static str> {
    const HOLDS_OTHERS: [&str; 6] = [
        "crypto_LUKS",
        "LVM2_member",
        "linux_raid_member",
        "zfs_member",
        "bcache",
        "drbd",
    ];
    let kind = part.file_system.as_str();
    if part.mounted || failed.code != "X006-mount" {
        return None;
    }
    match kind {
        "" => Some("what it holds is not known here: look at it with varve export INSTANT"),
        kind if HOLDS_OTHERS.contains(&kind) => Some(
            "it holds no file system itself: open it by hand, from varve export INSTANT --writable",
        ),
        "btrfs" if failed.message.contains("File exists") => Some(
            "this kernel mounts no second btrfs of the same UUID (6.7 and newer do): unmount the volume for a moment, or look at it on another machine",
        ),
        _ => None,
    }
}

fn mount_and_check(
    part: &mut Part,
    image: &mut HeldImage,
    directory: &Path,
    args: &DrillArgs,
) -> Result<(), ControlError> {
    let options = ["nosuid", "nodev"];
    image.mount(part.partition, directory, MountMode::Writable, &options)?;
    part.mounted = true;
    let ran = args
        .exec
        .as_ref()
        .map(|command| command::run(command, image, directory));
    // Whatever became of the command: the next partition is mounted in the same place.
    image.unmount()?;
    part.command = match ran.transpose()? {
        Some(Verdict::Good) => Some(true),
        Some(Verdict::Bad) => Some(false),
        Some(Verdict::Skip) | None => None,
    };
    let node = node_of(&image.device, part.partition);
    let Some((program, arguments, package)) = checker(&part.file_system) else {
        return Ok(());
    };
    let outcome = Command::new(program)
        .args(arguments)
        .arg(&node)
        .output()
        .map_err(|error| {
            ControlError::new(
                "H014-tool",
                format!("{program}: {error}; install {package}"),
            )
        })?;
    part.checked = Some(outcome.status.success());
    if !outcome.status.success() {
        part.said = format!(
            "{program}: {}
{}{}",
            outcome.status,
            String::from_utf8_lossy(&outcome.stdout),
            String::from_utf8_lossy(&outcome.stderr)
        );
    }
    Ok(())
}

/// Who looks at a file system without changing it: program, arguments, and the package that brings it.
fn checker(kind: &str) -> Option<(&'static str, &'static [&'static str], &'static str)> {
    Some(match kind {
        "ext2" | "ext3" | "ext4" => ("e2fsck", &["-f", "-n"], "e2fsprogs"),
        "xfs" => ("xfs_repair", &["-n"], "xfsprogs"),
        "btrfs" => ("btrfs", &["check", "--readonly"], "btrfs-progs"),
        "vfat" => ("fsck.vfat", &["-n"], "dosfstools"),
        "f2fs" => ("fsck.f2fs", &["--dry-run"], "f2fs-tools"),
        _ => return None,
    })
}
