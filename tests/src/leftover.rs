//! What a killed story leaves behind. A daemon whose mount namespace ends with it dies in the unmount of a file system that it serves itself; the
//! kernel then waits for it for ever, and so does whoever looks at that file system next. Aborting its FUSE connection ends that.
//!
//! Each connection that a story has is noted in a file with the story's process; the next story aborts those whose process is gone.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const CONNECTIONS: &str = "/sys/fs/fuse/connections";

/// The FUSE connections of a running story.
pub struct Connections {
    place: PathBuf,
    seen: BTreeSet<String>,
}

impl Connections {
    /// None yet; aborts what stories left that are gone. `place`: a directory that all stories of this machine share.
    #[must_use]
    pub fn new(place: PathBuf) -> Connections {
        std::fs::create_dir_all(&place).unwrap();
        for note in std::fs::read_dir(&place).unwrap().flatten() {
            let owner = std::fs::read_to_string(note.path()).unwrap_or_default();
            if !Path::new("/proc").join(owner.trim()).exists() {
                abort(&note.file_name().to_string_lossy());
                let _ = std::fs::remove_file(note.path());
            }
        }
        Connections {
            place,
            seen: BTreeSet::new(),
        }
    }

    /// Notes what `process` has mounted in its own mount namespace.
    pub fn look(&mut self, process: u32) {
        let mine = mounted("self");
        for connection in mounted(&process.to_string()) {
            if !mine.contains(&connection) && self.seen.insert(connection.clone()) {
                let _ = std::fs::write(self.place.join(connection), std::process::id().to_string());
            }
        }
    }

    /// The story is over: nobody needs them any more.
    pub fn end(self) {
        for connection in &self.seen {
            abort(connection);
            let _ = std::fs::remove_file(self.place.join(connection));
        }
    }
}

/// Numbers of the FUSE connections that a process sees mounted: `… 0:NUMBER … - fuse…`, see proc_pid_mountinfo(5).
fn mounted(process: &str) -> BTreeSet<String> {
    let table = std::fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap_or_default();
    table
        .lines()
        .filter(|line| {
            line.split_once(" - ")
                .is_some_and(|(_, kind)| kind.starts_with("fuse") && !kind.starts_with("fusectl"))
        })
        .filter_map(|line| {
            line.split(' ')
                .nth(2)?
                .strip_prefix("0:")
                .map(str::to_owned)
        })
        .collect()
}

fn abort(connection: &str) {
    if !Path::new(CONNECTIONS).join(connection).exists() {
        let _ = std::process::Command::new("mount")
            .args(["-t", "fusectl", "none", CONNECTIONS])
            .output();
    }
    if mounted("self").contains(connection) {
        return; // The number is somebody else's by now.
    }
    let _ = std::fs::write(Path::new(CONNECTIONS).join(connection).join("abort"), "1");
    let loops = std::process::Command::new("losetup")
        .args(["--list", "--noheadings", "--output", "NAME,BACK-MAJ:MIN"])
        .output();
    let table = loops.map_or(String::new(), |o| {
        String::from_utf8_lossy(&o.stdout).into_owned()
    });
    for line in table.lines() {
        let mut words = line.split_whitespace();
        if let (Some(name), Some(on)) = (words.next(), words.next())
            && on.strip_prefix("0:") == Some(connection)
        {
            let _ = std::process::Command::new("losetup")
                .args(["--detach", name])
                .output();
        }
    }
}
