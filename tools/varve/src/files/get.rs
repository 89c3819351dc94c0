//! Getting a file or a tree back. `cp` copies, because it keeps what there is to keep; what is there already is replaced only if that was said, and in
//! one step, when the new one is whole.
//!
//! The target may lie in a directory that somebody else owns, who may rename what is in it and put links in its place at any moment. So nothing is written by
//! a path: directories are opened once, looked at, and named by what is open.

use crate::Context;
use crate::files::place::Place;
use crate::files::{Tree, kind_of, name_of};
use nix::errno::Errno;
use nix::fcntl::{OFlag, RenameFlags, openat, renameat, renameat2};
use nix::sys::stat::{Mode, mkdirat};
use serde::Serialize;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use varve_cli::{show_bytes, show_time};
use varve_control::{ControlError, Instant, at_signal, signals};

/// Where it goes.
pub struct Target {
    /// A directory, or a name.
    pub to: Option<PathBuf>,
    /// Whole trees.
    pub all: bool,
    /// A file may be replaced.
    pub overwrite: bool,
}

#[derive(Serialize)]
struct Got {
    volume: String,
    lsn: u64,
    time_ns: i64,
    path: String,
    to: String,
    kind: &'static str,
    bytes: u64,
    /// What `cp` said of what could not be read, or kept.
    incomplete: Vec<String>,
}

/// Whether what was copied may still get its name.
#[derive(PartialEq, Eq)]
enum Naming {
    Open,
    BrokenOff,
}

fn refused(why: String) -> ControlError {
    ControlError::new("X011-target", why)
}

/// Gets it.
pub fn run(
    context: &Context,
    place: &Place,
    instant: &Instant,
    target: &Target,
) -> Result<(), ControlError> {
    let to = destination(place, target)?;
    let tree = Tree::open(context, place, instant)?;
    let found = tree.find(&place.inside)?;
    let metadata = found.metadata()?;
    if metadata.is_dir() && !target.all {
        return Err(refused(format!(
            "{} is a directory: say --all to get all that is in it",
            place.named.display()
        )));
    }
    if metadata.is_dir() && to.exists() {
        return Err(refused(format!(
            "{} is there already, and a tree is not mixed into another. Nothing was written; choose another name with --to",
            to.display()
        )));
    }
    let workshop = Workshop::beside(&to)?;
    let (leftover, naming) = (workshop.path.clone(), Arc::new(Mutex::new(Naming::Open)));
    let broken_off = Arc::clone(&naming);
    at_signal(move |code| {
        // What has its name is there, whole; what has none gets none any more.
        *broken_off.lock().unwrap_or_else(PoisonError::into_inner) = Naming::BrokenOff;
        let _ = std::fs::remove_dir_all(&leftover);
        code
    });
    let copied = copy(&tree, place, &workshop.part(), metadata.is_dir())
        .and_then(|incomplete| put(&workshop, &to, target.overwrite, &naming).map(|()| incomplete));
    let _ = std::fs::remove_dir_all(&workshop.path);
    let incomplete = copied?;
    let got = Got {
        volume: place.volume.clone(),
        lsn: tree.image.lsn,
        time_ns: tree.image.time_ns,
        path: place.named.display().to_string(),
        to: to.display().to_string(),
        kind: kind_of(&metadata),
        bytes: metadata.len(),
        incomplete,
    };
    drop(found);
    tree.close()?;
    let words = || {
        let size = match got.kind {
            "file" => format!(", {}", show_bytes(got.bytes)),
            kind => format!(", a {kind}"),
        };
        context.output.say(format!(
            "{} as it was {} (lsn:{}) is {}{size}",
            got.path,
            show_time(got.time_ns),
            got.lsn,
            got.to
        ));
        got.incomplete
            .iter()
            .for_each(|what| eprintln!("INCOMPLETE  {what}"));
    };
    let partly = |count| {
        ControlError::new(
            "X017-partly",
            format!(
                "all of {} is there but for {count} things that are named above: what is said to be unreadable is not whole. `varve scrub` says which instants have it whole; where the target \
                 cannot hold owners or attributes, get the tree onto a file system that can",
                got.path
            ),
        )
    };
    match got.incomplete.len() {
        0 => {
            context.output.result(&got, words);
            Ok(())
        }
        count => Err(context.output.partly(&got, partly(count), words)),
    }
}

/// Where it goes, looked at before anything is opened.
fn destination(place: &Place, target: &Target) -> Result<PathBuf, ControlError> {
    let name = match place.inside.file_name() {
        Some(name) => name.to_owned(),
        None => place.volume.clone().into(), // The top of the file system.
    };
    let to = target.to.clone().unwrap_or_else(|| PathBuf::from("."));
    let to = std::path::absolute(if to.is_dir() { to.join(name) } else { to })?;
    if place
        .inside
        .components()
        .any(|part| part == Component::ParentDir)
    {
        return Err(refused(format!(
            "{}: say which file is meant without `..`",
            place.named.display()
        )));
    }
    let parent = to.parent().unwrap_or(Path::new("/"));
    if !parent.is_dir() {
        return Err(refused(format!("{} is not a directory", parent.display())));
    }
    if to.is_dir() && !to.is_symlink() {
        return Err(refused(format!(
            "{} is a directory. Nothing was written; choose another name with --to",
            to.display()
        )));
    }
    if (to.exists() || to.is_symlink()) && !target.overwrite {
        return Err(refused(format!(
            "{} is there already. Nothing was written; choose another name with --to, or say --overwrite",
            to.display()
        )));
    }
    Ok(to)
}

/// Whether nobody but us can change what lies in a directory.
fn is_alone(directory: &File) -> std::io::Result<bool> {
    let is = directory.metadata()?;
    Ok(is.uid() == nix::unistd::geteuid().as_raw() && is.mode() & 0o022 == 0)
}

/// Whether a directory is the one that was made: ours, or, where root is nobody (NFS), nobody's, and closed to others. File systems that keep no owners know no
/// links either: nothing can be put into its place there that leads elsewhere.
fn is_ours(directory: &File) -> std::io::Result<bool> {
    const NOBODY: u32 = 65534;
    const EXFAT: i64 = 0x2011_bab0;
    let is = directory.metadata()?;
    let own = nix::unistd::geteuid().as_raw();
    let kind = nix::sys::statfs::fstatfs(directory)?.filesystem_type();
    let knows_no_links = kind == nix::sys::statfs::MSDOS_SUPER_MAGIC || kind.0 as i64 == EXFAT;
    Ok([own, NOBODY].contains(&is.uid()) && is.mode() & 0o077 == 0 || knows_no_links)
}

/// What is copied is called so until it is whole.
const PART: &str = "part";

/// A directory of its own beside the target, for as long as what is copied is not whole: nobody else's, and under a name that nobody knows before.
struct Workshop {
    /// The directory that the target gets its name in.
    parent: File,
    /// The one beside the target, and its path: by that it is removed, which follows no link.
    directory: File,
    path: PathBuf,
}

impl Workshop {
    fn beside(to: &Path) -> Result<Workshop, ControlError> {
        let above = to.parent().unwrap_or(Path::new("/"));
        let mut random = [0u8; 8];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        let name = format!(".varve-{:016x}", u64::from_ne_bytes(random));
        let path = above.join(&name);
        let failed = |error: std::io::Error| refused(format!("{}: {error}", path.display()));
        let parent = File::open(above).map_err(failed)?;
        mkdirat(&parent, name.as_str(), Mode::S_IRWXU).map_err(|errno| failed(errno.into()))?;
        // `cp` gets it, too: it is not closed for children.
        let how = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
        let opened = openat(&parent, name.as_str(), how, Mode::empty());
        let opened = opened.map(File::from).map_err(|errno| failed(errno.into()));
        let checked = opened.and_then(|directory| {
            match is_alone(&parent).map_err(failed)? || is_ours(&directory).map_err(failed)? {
                true => Ok(directory),
                false => Err(refused(format!(
                    "others can write {}, and what is made in it is not ours alone: they could put other things in its place. Nothing was written; choose a \
                     directory with --to that only you can write",
                    above.display()
                ))),
            }
        });
        let directory = checked.inspect_err(|_| {
            let _ = std::fs::remove_dir(&path);
        })?;
        Ok(Workshop {
            parent,
            directory,
            path,
        })
    }

    /// Where the part is copied to.
    fn part(&self) -> PathBuf {
        name_of(&self.directory).join(PART)
    }
}

/// Copies; gives what was said of parts of a tree that could not be copied. The rest of it is there.
fn copy(
    tree: &Tree,
    place: &Place,
    part: &Path,
    is_tree: bool,
) -> Result<Vec<String>, ControlError> {
    // The name is resolved by us, within the image; `cp` gets a directory that is open, and a name that it does not follow.
    let (parent, name) = match (place.inside.parent(), place.inside.file_name()) {
        (Some(parent), Some(name)) => (tree.find_directory(parent)?, PathBuf::from(name)),
        _ => (tree.find_directory(Path::new("/"))?, PathBuf::from(".")),
    };
    let mut cp = Command::new("cp");
    cp.env("LC_ALL", "C") // What it says is looked at.
        .current_dir(name_of(&parent))
        .args([
            "--recursive",
            "--no-dereference",
            "--preserve=mode,ownership,timestamps,links,xattr",
            "--sparse=auto",
            "--no-target-directory",
            "--",
        ])
        .arg(Path::new(".").join(name))
        .arg(part);
    let outcome = signals::output(&mut cp);
    let outcome =
        outcome.map_err(|error| ControlError::new("H014-tool", format!("cp: {error}")))?;
    if outcome.status.success() {
        return Ok(Vec::new());
    }
    let why = String::from_utf8_lossy(&outcome.stderr).trim().to_owned();
    // A disk that is full ends it; one file that cannot be read does not take the others with it.
    let is_full = ["No space left", "quota exceeded"]
        .iter()
        .any(|full| why.contains(full));
    let went_on = outcome.status.code() == Some(1) && !why.is_empty();
    // A file whose owner or attributes the target cannot hold is there all the same.
    let attributes_only = || {
        let about = [
            "failed to preserve",
            "preserving",
            "setting attribute",
            "cannot preserve",
        ];
        let lines: Vec<&str> = why.lines().collect();
        let about_them = |line: &&str| {
            let said = line.strip_prefix("cp: ").unwrap_or_default();
            about.iter().any(|words| said.starts_with(words))
        };
        lines.iter().all(about_them) && part.symlink_metadata().is_ok()
    };
    let is_there = match is_tree {
        true => part.is_dir(),
        false => attributes_only(),
    };
    if is_there && went_on && !is_full {
        return Ok(why.lines().map(str::to_owned).collect());
    }
    Err(ControlError::new(
        "H017-write",
        format!("{why}. Nothing was left in the target"),
    ))
}

/// Gives it its name once all of it is on the disk.
fn put(
    workshop: &Workshop,
    to: &Path,
    overwrite: bool,
    naming: &Mutex<Naming>,
) -> Result<(), ControlError> {
    let failed = |error: std::io::Error| {
        ControlError::new("H017-write", format!("{}: {error}", to.display()))
    };
    let (from, parent) = (&workshop.directory, &workshop.parent);
    let name = to.file_name().unwrap_or_default();
    nix::unistd::syncfs(parent).map_err(|errno| failed(errno.into()))?;
    let flags = match overwrite {
        true => RenameFlags::empty(),
        false => RenameFlags::RENAME_NOREPLACE,
    };
    let naming = naming.lock().unwrap_or_else(PoisonError::into_inner);
    if *naming == Naming::BrokenOff {
        return Err(failed(std::io::ErrorKind::Interrupted.into()));
    }
    let named = match renameat2(from, PART, parent, name, flags) {
        // A file system that does not know the flag (it was looked at before).
        Err(Errno::EINVAL) => renameat(from, PART, parent, name),
        other => other,
    };
    named.map_err(|errno| failed(errno.into()))?;
    parent.sync_all().map_err(failed)
}
