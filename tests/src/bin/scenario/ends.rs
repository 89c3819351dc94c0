//! How things end: images that are in use, daemons that are killed while they show something, protection whose log nobody could take, histories that
//! outlive it.

use crate::copies::{expect_refused, fields, sh};
use crate::encrypted::restart;
use crate::{Outcome, export};
use std::path::Path;
use std::time::Instant;
use varve_tests::scenario::{Installation, digest, pause, run, say};

struct Story<'a> {
    varve: &'a Installation,
    root: &'a Path,
    device: String,
}

/// Everything, with the store on a small disk of its own.
pub fn ends(varve: &Installation, root: &Path) -> Outcome {
    let store = root.join("var/lib/varve/store").display().to_string();
    let device = root.join("device").display().to_string();
    sh(&format!(
        "truncate -s 16M {device} && mkdir -p {store} && mount -t tmpfs -o size=64m none {store}"
    ))?;
    let story = Story {
        varve,
        root,
        device,
    };
    let outcome = story.life();
    let down = varve.varve(&["down"]);
    let _ = run("umount", &["-l", &store]);
    outcome.and(down.map(|_| ()))
}

impl Story<'_> {
    fn path(&self, name: &str) -> String {
        self.root.join(name).display().to_string()
    }

    fn protect(&self) -> Result<String, String> {
        let arguments = [
            "protect",
            &self.device,
            "--name",
            "disk",
            "--log-size",
            "64",
        ];
        self.varve.varve(&arguments)?;
        self.varve.wait_protected()?;
        self.varve.device("disk")
    }

    fn write(&self, mapped: &str, at: u32) -> Outcome {
        sh(&format!(
            "dd if=/dev/urandom of={mapped} bs=1M count=4 seek={at} oflag=direct conv=notrunc status=none"
        ))
        .map(|_| ())
    }

    fn life(&self) -> Outcome {
        let start = Instant::now();
        let varve = self.varve;
        varve.varve(&["up"])?;
        let mapped = self.protect()?;
        let directory = self.path("mnt");
        sh(&format!(
            "mkfs.ext4 -q -F {mapped} && mkdir -p {directory} && mount {mapped} {directory} && echo first > {directory}/file && umount {directory}"
        ))?;
        varve.varve(&["mark", "before"])?;
        let before = digest(&mapped)?;
        self.images_in_use(&directory)?;
        say(start, "an image in use is not taken away");
        self.dead_daemons(&before)?;
        say(
            start,
            "what dead daemons have left is gone, and devices are shown again",
        );
        self.broken_file()?;
        say(start, "a volume whose file cannot be read is said");
        let mapped = varve.device("disk")?;
        self.full_store(&mapped)?;
        say(start, "a log that nobody could take is not deleted");
        self.former(&before)?;
        say(
            start,
            "a history outlives its protection, and goes when it is said",
        );
        Ok(())
    }

    fn images_in_use(&self, directory: &str) -> Outcome {
        let image = export(self.varve, "before", true)?;
        sh(&format!("mount -o ro {image} {directory}"))?;
        expect_refused(self.varve.varve(&["unexport", &image]), "V012-busy")?;
        let text =
            std::fs::read_to_string(format!("{directory}/file")).map_err(|e| e.to_string())?;
        if text != "first\n" {
            return Err(format!("the file has {text:?}"));
        }
        let exports = self.varve.varve(&["exports"])?;
        if !exports.contains(&image) {
            return Err(format!("{image} is not among {exports}"));
        }
        run("umount", &[directory])?;
        self.varve.varve(&["unexport", &image]).map(|_| ())
    }

    /// Loop devices and mounts of images that nobody serves any more.
    fn left_over(&self) -> Result<String, String> {
        let shown = self.path("run/varve/fuse/image-");
        sh(&format!(
            "cat /sys/block/loop*/loop/backing_file 2>/dev/null | grep -F {shown} || true; grep -F {shown} /proc/self/mounts || true"
        ))
    }

    fn dead_daemons(&self, before: &str) -> Outcome {
        let varve = self.varve;
        let socket = self.path("run/varve/varved.sock");
        export(varve, "before", true)?;
        restart(varve)?; // Killed.
        let left = self.left_over()?;
        if !left.is_empty() {
            return Err(format!("a killed varved has left {left}"));
        }
        export(varve, "before", true)?;
        sh(&format!(
            "fuser -k -TERM {socket} 2>/dev/null || pkill -TERM -x varved"
        ))?;
        let mut left = self.left_over()?;
        for _ in 0..300 {
            if left.is_empty() {
                break;
            }
            pause(200);
            left = self.left_over()?;
        }
        if !left.is_empty() {
            return Err(format!("a varved that was told to end has left {left}"));
        }
        varve.varve(&["up"])?;
        let socket = self.path("run/varve/blkfilter.sock");
        sh(&format!(
            "fuser -k -KILL {socket} 2>/dev/null || pkill -KILL -x blkfilter"
        ))?;
        pause(500);
        varve.varve(&["up"])?;
        varve.wait_protected()?;
        match digest(&varve.device("disk")?)? == before {
            true => Ok(()),
            false => Err("the device is not what it was before its daemon was killed".to_owned()),
        }
    }

    fn broken_file(&self) -> Outcome {
        let varve = self.varve;
        let file = self.path("etc/varve/volumes/other.toml");
        std::fs::write(&file, "name = \"oth").map_err(|e| e.to_string())?;
        varve.varve(&["down"])?;
        varve.varve(&["up"])?;
        let said = varve.varve(&["--json", "status"]);
        std::fs::remove_file(&file).map_err(|e| e.to_string())?;
        let said = said
            .err()
            .ok_or("a volume that cannot be read is not missed")?;
        if !said.contains("other.toml") {
            return Err(format!("its file is not named: {said}"));
        }
        varve.varve(&["down"])?;
        varve.varve(&["up"])?;
        varve.wait_protected()
    }

    fn full_store(&self, mapped: &str) -> Outcome {
        let varve = self.varve;
        let filler = self.path("var/lib/varve/store/filler");
        sh(&format!(
            "dd if=/dev/zero of={filler} bs=64k status=none || true"
        ))?;
        self.write(mapped, 0)?;
        expect_refused(varve.varve(&["unprotect", "disk"]), "S007-full")?;
        let status = varve.varve(&["--json", "history"])?;
        if !status.contains("\"behind\": {") {
            return Err(format!("the history is not behind: {status}"));
        }
        let last = digest(mapped)?;
        std::fs::remove_file(&filler).map_err(|e| e.to_string())?;
        varve.varve(&["unprotect", "disk"])?;
        // Nothing of it was lost.
        self.shows("now", "disk", &last)
    }

    fn shows(&self, instant: &str, volume: &str, wanted: &str) -> Outcome {
        let text = self
            .varve
            .varve(&["--json", "export", instant, "--volume", volume])?;
        let image = fields(&text, "device")
            .into_iter()
            .next()
            .unwrap_or_default();
        let found = digest(&image)?;
        self.varve.varve(&["unexport", &image])?;
        match found == wanted {
            true => Ok(()),
            false => Err(format!("{instant} of {volume} is not what it was")),
        }
    }

    fn former(&self, before: &str) -> Outcome {
        let varve = self.varve;
        varve.varve(&["history", "--volume", "disk"])?;
        self.shows("before", "disk", before)?;
        // Now is its last instant; a later time is in no history.
        pause(2000);
        expect_refused(
            varve.varve(&["export", "1 second ago", "--volume", "disk"]),
            "V022-unprotected",
        )?;
        let of = |command: &[&str]| varve.varve(&[command, &["--volume", "disk"]].concat());
        expect_refused(of(&["compare"]), "V022-unprotected")?;
        expect_refused(of(&["rewind", "before", "--yes"]), "V030-state")?;
        // Another volume takes its name: the old one has its ID.
        let mapped = self.protect()?;
        expect_refused(of(&["export", "before"]), "I003-")?;
        let former = sh(&format!(
            "basename -s .toml {}/*",
            self.path("etc/varve/volumes/former")
        ))?;
        let id = former.trim();
        self.shows("before", id, before)?;
        // Its device is gone: what its log holds is not said to be in the history.
        self.write(&mapped, 4)?;
        varve.varve(&["down"])?;
        let away = self.path("away");
        std::fs::rename(&self.device, &away).map_err(|e| e.to_string())?;
        varve.varve(&["up"])?;
        expect_refused(of(&["export", "now"]), "V020-late")?;
        expect_refused(varve.varve(&["unprotect", "disk"]), "V020-late")?;
        varve.varve(&["unprotect", "disk", "--drop-log"])?;
        expect_refused(
            varve.varve(&["unprotect", "disk", "--forget"]),
            "V031-which",
        )?;
        let former = sh(&format!(
            "basename -s .toml -a {}/*",
            self.path("etc/varve/volumes/former")
        ))?;
        for id in former.split_whitespace() {
            varve.varve(&["unprotect", id, "--forget"])?;
        }
        expect_refused(
            varve.varve(&["unprotect", "disk", "--forget"]),
            "V019-unknown",
        )?;
        let left = sh(&format!(
            "ls {} {}",
            self.path("etc/varve/volumes/former"),
            self.path("var/lib/varve/store/volumes")
        ))?;
        match left
            .lines()
            .any(|line| line.len() >= 32 && !line.ends_with(':'))
        {
            true => Err(format!("what was to be deleted is there: {left}")),
            false => Ok(()),
        }
    }
}
