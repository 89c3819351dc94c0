//! Files of the past: what there was, which versions a file had, getting one back.
//!
//! An image is mounted read-only where only this command sees it. Names in it are resolved as if the image were all there is: a link in it cannot lead
//! out of it.

mod get;
mod place;
mod versions;

use crate::Context;
use crate::image::{HeldImage, Trouble, looking};
use crate::past::instant;
use clap::Subcommand;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2, readlinkat};
use place::Place;
use serde::Serialize;
use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use varve_cli::{MountMode, keep_mounts_private, show_time};
use varve_control::{ControlError, Instant};

/// Nothing of an image acts on this machine.
const MOUNT_OPTIONS: [&str; 3] = ["nosuid", "nodev", "noexec"];

#[derive(Subcommand)]
pub enum FilesCommand {
    /// What was in a directory: `varve files list /srv/www --at '1 hour ago'`.
    List {
        /// Where it is while the volume is mounted, or within the volume.
        #[arg(default_value = "/")]
        path: PathBuf,
        /// As for `mount`.
        #[arg(long, value_name = "INSTANT", default_value = "now")]
        at: String,
        /// And all below it.
        #[arg(long, short = 'R')]
        recursive: bool,
        #[command(flatten)]
        which: place::Which,
    },
    /// Which versions a file had, and from when to when.
    Versions {
        /// As for `list`.
        path: PathBuf,
        /// From this instant on (default: the beginning of the history).
        #[arg(long, value_name = "INSTANT")]
        since: Option<String>,
        /// Up to this instant.
        #[arg(long, value_name = "INSTANT", default_value = "now")]
        until: String,
        /// What lay less than this many seconds between two others may be missed.
        #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
        step: f64,
        /// Not more versions than this.
        #[arg(long, value_name = "N", default_value_t = 50)]
        most: usize,
        #[command(flatten)]
        which: place::Which,
    },
    /// Get a file back, with owner, mode, times, extended attributes and holes: `varve files get /srv/a.txt --at '1 hour ago' --to /tmp/`.
    Get {
        /// As for `list`.
        path: PathBuf,
        /// As for `mount`.
        #[arg(long, value_name = "INSTANT")]
        at: String,
        /// A directory, or the new name (default: its name, in this directory).
        #[arg(long, value_name = "PATH")]
        to: Option<PathBuf>,
        /// A directory with all that is in it.
        #[arg(long)]
        all: bool,
        /// A file that is there may be replaced.
        #[arg(long)]
        overwrite: bool,
        #[command(flatten)]
        which: place::Which,
    },
}

pub fn run(context: &Context, command: FilesCommand) -> Result<ExitCode, ControlError> {
    let done = |()| ExitCode::SUCCESS;
    keep_mounts_private()?;
    match command {
        FilesCommand::List {
            path,
            at,
            recursive,
            which,
        } => {
            let place = place::find(context, &which, &path)?;
            list(context, &place, &instant(&at)?, recursive)
        }
        FilesCommand::Versions {
            path,
            since,
            until,
            step,
            most,
            which,
        } => {
            let place = place::find(context, &which, &path)?;
            let since = since.as_deref().map(instant).transpose()?;
            let wanted = versions::Wanted {
                since,
                until: instant(&until)?,
                step_ns: (step.max(0.0) * 1e9) as i64,
                most,
            };
            versions::run(context, &place, &wanted).map(done)
        }
        FilesCommand::Get {
            path,
            at,
            to,
            all,
            overwrite,
            which,
        } => {
            let place = place::find(context, &which, &path)?;
            let target = get::Target { to, all, overwrite };
            get::run(context, &place, &instant(&at)?, &target).map(done)
        }
    }
}

/// An image, mounted for this command alone.
struct Tree {
    image: HeldImage,
    root: File,
}

impl Tree {
    fn open(context: &Context, place: &Place, instant: &Instant) -> Result<Tree, ControlError> {
        let mut image = HeldImage::open(context, &place.volume, instant, true)?;
        let directory = looking(context);
        let mut options = MOUNT_OPTIONS.to_vec();
        options.extend(place.top_level.then_some("subvolid=5"));
        let mounted = image.mount(place.partition, &directory, MountMode::ReadOnly, &options);
        if let Err(mut failed) = mounted {
            // That says nothing of what there was at that instant.
            if let Some(why) = image.trouble().filter(|why| *why == Trouble::NoRoom) {
                let message = format!("{}: {why}", image.instant());
                return Err(ControlError::new("X001-overlay", message));
            }
            if place.partition.is_none() {
                failed.message += ". If the volume is a whole disk, say --partition N";
            }
            return Err(failed);
        }
        let root = File::open(&directory)?;
        Ok(Tree { image, root })
    }

    /// Opens a name in the image, for looking at it. The last part of it may be a link, which is not followed.
    fn find(&self, path: &Path) -> Result<File, ControlError> {
        self.open_in(path, OFlag::O_NOFOLLOW)
    }

    /// Opens a directory in the image.
    fn find_directory(&self, path: &Path) -> Result<File, ControlError> {
        self.open_in(path, OFlag::O_DIRECTORY)
    }

    fn open_in(&self, path: &Path, further: OFlag) -> Result<File, ControlError> {
        let inside = Path::new("/").join(path);
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC | further)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        openat2(&self.root, &inside, how)
            .map(File::from)
            .map_err(|errno| {
                let error = std::io::Error::from(errno);
                ControlError::new(
                    match error.kind() {
                        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {
                            "X003-unknown"
                        }
                        _ => "C001-io",
                    },
                    format!(
                        "{} at {}: {error}. `varve files list` shows what there was",
                        inside.display(),
                        self.image.instant()
                    ),
                )
            })
    }

    fn close(self) -> Result<(), ControlError> {
        drop(self.root);
        self.image.close()
    }
}

/// A name for an open file or directory, for tools and calls that take names.
fn name_of(file: &File) -> PathBuf {
    use std::os::fd::AsRawFd;
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[derive(Serialize)]
struct Entry {
    /// Names need not be UTF-8: what is not, is replaced.
    path: String,
    kind: &'static str,
    bytes: u64,
    mode: u32,
    uid: u32,
    gid: u32,
    modified_ns: i64,
    /// Where a link leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    link: Option<String>,
}

fn kind_of(metadata: &Metadata) -> &'static str {
    match metadata.mode() & 0o170_000 {
        0o040_000 => "directory",
        0o100_000 => "file",
        0o120_000 => "link",
        0o060_000 => "block-device",
        0o020_000 => "character-device",
        0o010_000 => "pipe",
        0o140_000 => "socket",
        _ => "unknown",
    }
}

fn modified_ns(metadata: &Metadata) -> i64 {
    metadata.mtime() * 1_000_000_000 + metadata.mtime_nsec()
}

fn entry(path: PathBuf, link: Option<PathBuf>, metadata: &Metadata) -> Entry {
    let kind = kind_of(metadata);
    Entry {
        path: path.display().to_string(),
        kind,
        bytes: metadata.len(),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        modified_ns: modified_ns(metadata),
        link: link.map(|link| link.display().to_string()),
    }
}

/// What is in a directory. One that cannot be read does not hide the others.
fn collect(
    directory: &Path,
    shown: &Path,
    recursive: bool,
    entries: &mut Vec<Entry>,
    unreadable: &mut Vec<String>,
) {
    let mut found = Vec::new();
    let failed = |error: std::io::Error| format!("{}: {error}", printable(shown));
    match std::fs::read_dir(directory) {
        Ok(all) => {
            for one in all {
                match one {
                    Ok(one) => found.push(one),
                    Err(error) => unreadable.push(failed(error)),
                }
            }
        }
        Err(error) => unreadable.push(failed(error)),
    }
    found.sort_by_key(std::fs::DirEntry::file_name);
    for one in found {
        let path = shown.join(one.file_name());
        match one.metadata() {
            Ok(metadata) => {
                let link = std::fs::read_link(one.path()).ok();
                entries.push(entry(path.clone(), link, &metadata));
                if recursive && metadata.is_dir() {
                    collect(&one.path(), &path, recursive, entries, unreadable);
                }
            }
            Err(error) => unreadable.push(format!("{}: {error}", printable(&path))),
        }
    }
}

fn list(
    context: &Context,
    place: &Place,
    instant: &Instant,
    recursive: bool,
) -> Result<ExitCode, ControlError> {
    let tree = Tree::open(context, place, instant)?;
    let found = tree.find(&place.inside)?;
    let metadata = found.metadata()?;
    let (mut entries, mut unreadable) = (Vec::new(), Vec::new());
    if metadata.is_dir() {
        let directory = name_of(&found);
        collect(
            &directory,
            &place.named,
            recursive,
            &mut entries,
            &mut unreadable,
        );
    } else {
        let link = readlinkat(&found, "").ok().map(PathBuf::from);
        entries.push(entry(place.named.clone(), link, &metadata));
    }
    drop(found);
    #[derive(Serialize)]
    struct Listed {
        volume: String,
        lsn: u64,
        time_ns: i64,
        entries: Vec<Entry>,
        /// What could not be read, and why.
        unreadable: Vec<String>,
    }
    let listed = Listed {
        volume: place.volume.clone(),
        lsn: tree.image.lsn,
        time_ns: tree.image.time_ns,
        entries,
        unreadable,
    };
    tree.close()?;
    context.output.result(&listed, || {
        context.output.say(format!(
            "{} at {} (lsn:{}):",
            place.named.display(),
            show_time(listed.time_ns),
            listed.lsn
        ));
        for entry in &listed.entries {
            let link = match &entry.link {
                Some(to) => format!(" -> {}", printable(Path::new(to))),
                None => String::new(),
            };
            println!(
                "{}{:04o} {:>5} {:>5} {:>12} {} {}{link}",
                match entry.kind {
                    "directory" => 'd',
                    "file" => '-',
                    "link" => 'l',
                    _ => '?',
                },
                entry.mode,
                entry.uid,
                entry.gid,
                entry.bytes,
                show_time(entry.modified_ns),
                printable(Path::new(&entry.path))
            );
        }
        for why in &listed.unreadable {
            eprintln!("unreadable: {why}");
        }
    });
    Ok(match listed.unreadable.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(3),
    })
}

/// Names in an image are anybody's: nothing in them drives the terminal.
fn printable(path: &Path) -> String {
    let text = path.display().to_string();
    match text.chars().any(char::is_control) {
        true => text.escape_debug().to_string(),
        false => text,
    }
}
