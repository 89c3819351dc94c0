//! An encrypted store on a live volume: it becomes one while it is in use; locked it goes on recording and shows nothing; unlocked all is there.

use crate::copies::{expect_refused, fields, sh};
use crate::{Outcome, export, protect};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use varve_tests::scenario::{Installation, digest, pause, say};

const MARKER: &str = "the secret of the house is kept in the third drawer";

/// Runs `varve` with something to read.
fn with_input(varve: &Installation, arguments: &[&str], input: &str) -> Result<String, String> {
    let mut child = Command::new(varve.program("varve"))
        .arg("--root")
        .arg(varve.root())
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| e.to_string())?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin
            .write_all(input.as_bytes())
            .map_err(|e| e.to_string())?;
    }
    let output = child.wait_with_output().map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    match output.status.success() {
        true => Ok(said),
        false => Err(format!("{said}{}", String::from_utf8_lossy(&output.stderr))),
    }
}

/// The store's daemon begins anew.
pub fn restart(varve: &Installation) -> Outcome {
    restart_with(varve, || Ok(()))
}

/// The same, and something is done before it starts again.
pub fn restart_with(varve: &Installation, between: impl FnOnce() -> Outcome) -> Outcome {
    let socket = varve.root().join("run/varve/varved.sock");
    sh(&format!(
        "fuser -k -KILL {} 2>/dev/null || pkill -KILL -x varved",
        socket.display()
    ))?;
    pause(300);
    between()?;
    varve.varve(&["up"])?;
    varve.wait_protected()
}

struct Story<'a> {
    varve: &'a Installation,
    mapped: String,
}

impl Story<'_> {
    fn write(&self, number: u32) -> Outcome {
        sh(&format!(
            "yes '{MARKER} {number}' | head -c 24M | dd of={} bs=1M seek={} oflag=direct iflag=fullblock status=none",
            self.mapped,
            number * 24
        ))
        .map(drop)
    }

    /// Files of the store in which the marker stands.
    fn files_that_tell(&self) -> Result<usize, String> {
        // The write log is on the machine that is protected, beside the device itself; it is not encrypted.
        let store = self.varve.root().join("var/lib/varve/store");
        let found = sh(&format!(
            "grep -rlF '{MARKER}' {} | grep -v scratch || true",
            store.display()
        ))?;
        Ok(found.lines().count())
    }

    /// Waits until everything that was sealed is compressed and encrypted.
    fn wait_encrypted(&self) -> Outcome {
        let since = Instant::now();
        loop {
            let json = self.varve.varve(&["--json", "key", "status"])?;
            let settled = self.varve.varve(&["--json", "history"])?;
            let waits = fields(&settled, "unsettled_bytes")
                .first()
                .is_none_or(|bytes| bytes != "0");
            let counts: Vec<u64> = json
                .split("plain_and_encrypted")
                .nth(1)
                .unwrap_or_default()
                .split(|c: char| !c.is_ascii_digit())
                .filter_map(|number| number.parse().ok())
                .take(2)
                .collect();
            if !waits && counts.first() == Some(&0) && counts.get(1) > Some(&0) {
                return Ok(());
            }
            if since.elapsed() > Duration::from_secs(90) {
                return Err(format!("{json}\n{settled}\n{}", self.varve.messages()));
            }
            pause(300);
        }
    }

    fn reads(&self, instant: &str, wanted: &str) -> Outcome {
        let image = export(self.varve, instant, false)?;
        let found = digest(&image)?;
        self.varve.varve(&["unexport", &image])?;
        match found == wanted {
            true => Ok(()),
            false => Err(format!("{instant} does not read as it was")),
        }
    }
}

/// The whole story.
pub fn encrypted(varve: &Installation, device: &str) -> Outcome {
    let start = Instant::now();
    std::fs::create_dir_all(varve.root().join("etc/varve")).map_err(|e| e.to_string())?;
    // Uncompressed, so that only encryption hides anything.
    std::fs::write(
        varve.root().join("etc/varve/store.toml"),
        "compression = \"none\"\n",
    )
    .map_err(|e| e.to_string())?;
    let mapped = protect(varve, device)?;
    varve.wait_protected()?;
    let story = Story { varve, mapped };
    story.write(0)?;
    varve.wait_protected()?;
    varve.varve(&["mark", "plain"])?;
    let plain = digest(&story.mapped)?;
    story.reads("plain", &plain)?;
    let since = Instant::now();
    while story.files_that_tell()? == 0 {
        if since.elapsed() > Duration::from_secs(60) {
            return Err("the marker is in no file: nothing would be proved".to_owned());
        }
        pause(300);
    }
    by_key_file(&story, &plain)?;
    say(
        start,
        "what was there is encrypted, too, and read through a key file",
    );
    let newer = by_passphrase(&story)?;
    say(
        start,
        "locked, it goes on recording and shows nothing; unlocked, all is there",
    );
    rescued(&story, &newer)?;
    say(start, "exported keys open it again");
    varve.varve(&["rewind", "plain", "--yes"])?;
    let mapped = varve.device("disk")?;
    if digest(&mapped)? != plain {
        return Err("a rewind out of an encrypted history is not what was".to_owned());
    }
    varve.compare()?;
    varve.varve(&["scrub"])?;
    varve.varve(&["down"]).map(drop)
}

fn by_key_file(story: &Story<'_>, plain: &str) -> Outcome {
    let varve = story.varve;
    let place = varve
        .root()
        .join("etc/varve/store.key")
        .display()
        .to_string();
    let inside = varve
        .root()
        .join("var/lib/varve/store/key")
        .display()
        .to_string();
    let refused = varve.varve(&["key", "init", "--key-file", &inside]);
    if refused.is_ok() {
        return Err("a key was put into the store itself".to_owned());
    }
    varve.varve(&["key", "init", "--key-file", &place])?;
    let mode = sh(&format!("stat -c %a {place}"))?;
    if mode.trim() != "600" {
        return Err(format!("{place} has mode {mode}"));
    }
    expect_refused(
        varve.varve(&["key", "init", "--key-file", &place]),
        "S017-encrypted",
    )?;
    story.wait_encrypted()?;
    if story.files_that_tell()? != 0 {
        return Err("what was there before is still to be read".to_owned());
    }
    story.reads("plain", plain)?;
    restart(varve)?;
    story.reads("plain", plain)?;
    let pid = sh("pgrep -n -x varved")?;
    let limits = sh(&format!(
        "grep 'Max core file size' /proc/{}/limits",
        pid.trim()
    ))?;
    if limits
        .split_whitespace()
        .filter(|word| *word == "0")
        .count()
        != 2
    {
        return Err(format!("a core of varved would be written: {limits}"));
    }
    Ok(())
}

/// What a disk has spoilt is found without keys.
fn damaged_while_locked(varve: &Installation) -> Outcome {
    varve.varve(&["scrub", "--stored"])?;
    let largest = format!(
        "find {} -name '*.seg' -printf '%s %p\\n' | sort -n | tail -n 1 | cut -d' ' -f2",
        varve.root().join("var/lib/varve/store").display()
    );
    let victim = sh(&largest)?;
    let flip = || {
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(victim.trim())?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, 6000)?;
        file.write_all_at(&[byte[0] ^ 4], 6000)
    };
    flip().map_err(|e| format!("{victim}: {e}"))?;
    match varve.varve(&["scrub", "--stored"]) {
        Err(said) if said.contains("DAMAGED") && said.contains("varve key unlock") => {}
        other => return Err(format!("a flipped bit was not found: {other:?}")),
    }
    flip().map_err(|e| format!("{victim}: {e}"))
}

/// Gives the digest of what was written while it was locked.
fn by_passphrase(story: &Story<'_>) -> Result<String, String> {
    let varve = story.varve;
    with_input(varve, &["key", "rotate"], "open sesame\n")?;
    restart(varve)?;
    expect_refused(varve.varve(&["export", "plain"]), "S015-no-key")?;
    expect_refused(varve.varve(&["rewind", "plain", "--yes"]), "S015-no-key")?;
    expect_refused(varve.varve(&["scrub"]), "S015-no-key")?;
    damaged_while_locked(varve)?;
    let status = varve.varve(&["status"])?;
    if !status.contains("SAFE (protected)") || !status.contains("the store is locked") {
        return Err(format!(
            "a locked store is no reason not to protect, but to be told: {status}"
        ));
    }
    story.write(1)?;
    varve.wait_protected()?;
    varve.varve(&["mark", "locked"])?;
    let newer = digest(&story.mapped)?;
    expect_refused(
        with_input(varve, &["key", "unlock"], "open barley\n"),
        "S018-wrong-key",
    )?;
    with_input(varve, &["key", "unlock"], "open sesame\n")?;
    story.reads("locked", &newer)?;
    story.wait_encrypted()?;
    if story.files_that_tell()? != 0 {
        return Err("what was recorded while it was locked stayed in the clear".to_owned());
    }
    story.reads("locked", &newer)?;
    for text in [
        varve.messages(),
        sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")?,
    ] {
        if text.contains("open sesame") {
            return Err("a passphrase was told".to_owned());
        }
    }
    Ok(newer)
}

/// The file of keys is lost with its copy.
fn rescued(story: &Story<'_>, newer: &str) -> Outcome {
    let varve = story.varve;
    let file = varve.root().join("rescue").display().to_string();
    let warns = || {
        let status = varve.varve(&["status"])?;
        Ok::<bool, String>(status.contains("its key lies in this store only"))
    };
    if !warns()? {
        return Err("it was not said that the key was never exported".to_owned());
    }
    with_input(varve, &["key", "export", &file], "for the worst day\n")?;
    if warns()? {
        return Err("an exported key still counts as one that lies here only".to_owned());
    }
    expect_refused(
        with_input(varve, &["key", "export", &file], "x\n"),
        "X015-key",
    )?;
    sh(&format!(
        "find {} \\( -name keys -o -name keys-copy \\) -delete",
        varve.root().join("var").display()
    ))?;
    restart(varve)?;
    expect_refused(varve.varve(&["export", "plain"]), "S015-no-key")?;
    with_input(varve, &["key", "init"], "another\n")?;
    expect_refused(
        with_input(varve, &["key", "import", &file], "for the best day\n"),
        "S018-wrong-key",
    )?;
    with_input(varve, &["key", "import", &file], "for the worst day\n")?;
    story.reads("locked", newer)
}
