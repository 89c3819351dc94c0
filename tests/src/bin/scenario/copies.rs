//! Hot copies of devices under full load: they show their instant and nothing else, whoever is killed and whatever breaks.

use crate::{Outcome, protect};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use varve_tests::scenario::{
    Installation, check_file_system, digest, finish_fio, make_file_system, pause, run, say,
    start_fio,
};
use varve_tests::writers::Writers;

/// Sectors that are written: 16 MiB.
const SECTORS: u64 = 32 << 10;

pub fn sh(script: &str) -> Result<String, String> {
    run("sh", &["-c", script])
}

/// Runs `hcp`.
pub fn hcp(varve: &Installation, arguments: &[&str]) -> Result<String, String> {
    let root = varve.root().display().to_string();
    let mut all = vec!["--root", root.as_str()];
    all.extend_from_slice(arguments);
    run(&varve.program("hcp").display().to_string(), &all)
}

/// The values of a field in JSON, in order.
pub fn fields(json: &str, name: &str) -> Vec<String> {
    json.split(&format!("\"{name}\": "))
        .skip(1)
        .map(|rest| {
            let end = rest.find([',', '\n', '}']).unwrap_or(rest.len());
            rest[..end].trim().trim_matches('"').to_owned()
        })
        .collect()
}

/// Makes copies; gives (name, device) of each.
pub fn copy(varve: &Installation, arguments: &[&str]) -> Result<Vec<(String, String)>, String> {
    let mut all = vec!["--json", "--skip-mount"];
    all.extend_from_slice(arguments);
    let json = hcp(varve, &all).map_err(|e| format!("{e}\n{}", varve.messages()))?;
    Ok(fields(&json, "name")
        .into_iter()
        .zip(fields(&json, "copy"))
        .collect())
}

/// A protected device whose first sectors are zero.
pub fn zeroed(varve: &Installation, device: &str) -> Result<String, String> {
    let mapped = protect(varve, device)?;
    varve.wait_protected()?;
    let bytes = (SECTORS * 512).to_string();
    run(
        "blkdiscard",
        &["-z", "-f", "-o", "0", "-l", &bytes, &mapped],
    )?;
    Ok(mapped)
}

pub fn end(varve: &Installation) -> Outcome {
    varve.wait_protected()?;
    varve.compare()?;
    varve.varve(&["down"])?;
    Ok(())
}

pub fn expect_refused(result: Result<String, String>, code: &str) -> Outcome {
    match result {
        Ok(text) => Err(format!("{code} was expected, it went well: {text}")),
        Err(text) if text.contains(code) => Ok(()),
        Err(text) => Err(format!("{code} was expected: {text}")),
    }
}

/// Copies of a raw device under full load; all live at once, then go one by one while the others must stay what they are.
pub fn stamps(varve: &Installation, device: &str, count: usize) -> Outcome {
    let start = Instant::now();
    let mapped = zeroed(varve, device)?;
    let mut writers = Writers::start(&[&mapped], 4, SECTORS)?;
    let mut copies = Vec::new();
    for index in 0..count {
        pause(100 + 37 * (index as u64 % 5));
        let before = writers.before();
        let made = copy(
            varve,
            &[
                if index % 2 == 0 { "disk" } else { &mapped },
                "--store-size",
                "256",
            ],
        )?;
        let (name, path) = made.into_iter().next().ok_or("no copy")?;
        // Read while everything is being overwritten.
        let held = writers.check(&[&path], &before)?;
        copies.push((name, path, held, before));
    }
    pause(500);
    for (name, path, held, before) in &copies {
        let again = writers.check(&[path], before)?;
        if again != *held {
            return Err(format!("{name} has changed: {held:?}, now {again:?}"));
        }
    }
    let writes = writers.stop()?;
    say(
        start,
        &format!("{count} copies are instants of {writes} writes, and stay so"),
    );
    // The history knows the same instant.
    let (name, path, ..) = copies.last().ok_or("no copy")?;
    let shown = hcp(varve, &["--json", "-s", name])?;
    let lsn = fields(&shown, "lsn").into_iter().next().unwrap_or_default();
    let past = hcp(
        varve,
        &[
            "--json",
            "--skip-mount",
            "-o",
            "--at",
            &format!("lsn:{lsn}"),
            "disk",
        ],
    )?;
    let image = fields(&past, "copy").into_iter().next().unwrap_or_default();
    if digest(path)? != digest(&image)? {
        return Err(format!("{name} is not the image at lsn:{lsn}"));
    }
    hcp(varve, &["-r", &image])?;
    say(
        start,
        &format!("a copy equals the image of the history at lsn:{lsn}"),
    );
    // The middle ones go first: what they share with others must stay.
    while !copies.is_empty() {
        let (name, ..) = copies.remove(copies.len() / 2);
        hcp(varve, &["-r", &name])?;
        for (name, path, held, before) in copies.iter().step_by(3) {
            if writers.check(&[path], before)? != *held {
                return Err(format!("{name} has changed since another copy was removed"));
            }
        }
    }
    say(start, "removing copies leaves the others what they were");
    if !hcp(varve, &["-l"])?.contains("no hot copies") {
        return Err("copies are left".to_owned());
    }
    end(varve)
}

/// Frozen copies pass the checker with a clean journal; others after its replay. The pause that a writer sees is what is reported.
pub fn file_system(varve: &Installation, device: &str, kind: &str, count: usize) -> Outcome {
    let start = Instant::now();
    let mapped = protect(varve, device)?;
    let live = "/mnt/live";
    std::fs::create_dir_all(live).map_err(|e| e.to_string())?;
    make_file_system(kind, &mapped)?;
    run("mount", &[&mapped, live])?;
    let file = format!("{live}/stamped");
    let mut checked = 0;
    for index in 0..count {
        std::fs::write(&file, vec![0u8; SECTORS as usize * 512]).map_err(|e| e.to_string())?;
        run("sync", &["-f", live])?;
        let fio = start_fio(live, 8, 4, 3)?;
        let mut writers = Writers::start(&[&file], 2, SECTORS)?;
        let asked = Arc::new(AtomicBool::new(false));
        let longest = longest_fsync(live, Arc::clone(&asked));
        pause(400);
        let before = writers.before();
        let frozen = index % 2 == 0;
        let mut arguments = vec!["--json", "--skip-mount", live];
        if !frozen {
            arguments.push("--no-freeze");
        }
        let json = hcp(varve, &arguments).map_err(|e| format!("{e}\n{}", varve.messages()));
        asked.store(true, Ordering::Release);
        let json = json?;
        let longest = longest.join().map_err(|_| "the fsync writer panicked")??;
        writers.stop()?;
        finish_fio(fio)?;
        let first = |name: &str| fields(&json, name).into_iter().next().unwrap_or_default();
        let (name, path) = (first("name"), first("copy"));
        let reported: u64 = first("frozen_us")
            .parse()
            .map_err(|_| format!("no pause in {json}"))?;
        if frozen != (reported > 0) {
            return Err(format!(
                "frozen {frozen}, but the pause is {reported}: {json}"
            ));
        }
        // A writer cannot be held longer than it was frozen, but for what a write takes anyway.
        if frozen && reported > longest.as_micros() as u64 + 20_000 {
            return Err(format!(
                "a pause of {reported} us is reported, a writer saw {longest:?}"
            ));
        }
        say(
            start,
            &format!("{kind}: frozen for {reported} us, the longest fsync took {longest:?}"),
        );
        // XFS marks its log dirty when it freezes, so that whoever mounts a copy looks for orphans, and counts free blocks then: checked below.
        if frozen && kind != "xfs" {
            clean_journal(kind, &path)?;
            check_file_system(kind, &path)?;
        }
        let place = format!("/mnt/copy-{index}");
        std::fs::create_dir_all(&place).map_err(|e| e.to_string())?;
        let options = if kind == "xfs" { "nouuid" } else { "rw" };
        if run("mount", &["-o", options, &path, &place]).is_ok() {
            if frozen {
                writers.check(&[&format!("{place}/stamped")], &before)?;
                checked += 1;
            }
            std::fs::write(format!("{place}/written"), b"to the copy")
                .map_err(|e| e.to_string())?;
            expect_refused(busy(varve, &name, &place), "V012-busy")?;
            run("umount", &[&place])?;
        } else if kind != "btrfs" {
            return Err(format!("{kind}: {path} cannot be mounted"));
        }
        check_file_system(kind, &path)?;
        hcp(varve, &["-r", &name])?;
    }
    say(
        start,
        &format!(
            "{kind}: {checked} frozen copies hold all that was answered, and no more than was written"
        ),
    );
    // Read-only, as somebody would look into one.
    if kind != "btrfs" {
        std::fs::write(format!("{live}/looked-for"), b"there").map_err(|e| e.to_string())?;
        let place = "/mnt/looked-into";
        let json = hcp(varve, &["--json", "-o", "-m", place, live])?;
        let text =
            std::fs::read_to_string(format!("{place}/looked-for")).map_err(|e| e.to_string())?;
        if text != "there" {
            return Err(format!(
                "{kind}: what was written before the copy is not in it: {json}"
            ));
        }
        hcp(varve, &["-r", place])?;
    }
    if checked < count.div_ceil(2) {
        println!(
            "SKIPPED: {kind}: only {checked} of {} frozen copies could be mounted beside their origin here",
            count.div_ceil(2)
        );
    }
    run("umount", &[live])?;
    check_file_system(kind, &mapped)?;
    end(varve)
}

/// Removing a copy while somebody works in it.
fn busy(varve: &Installation, name: &str, place: &str) -> Result<String, String> {
    let mut user = std::process::Command::new("sleep")
        .arg("60")
        .current_dir(place)
        .spawn()
        .map_err(|e| e.to_string())?;
    let result = hcp(varve, &["-r", name]);
    let _ = user.kill();
    let _ = user.wait();
    result
}

pub fn clean_journal(kind: &str, path: &str) -> Outcome {
    match kind {
        "ext4" if sh(&format!("dumpe2fs -h {path} 2>/dev/null"))?.contains("needs_recovery") => {
            Err(format!(
                "{path}: the journal of a frozen copy wants recovery"
            ))
        }
        _ => Ok(()),
    }
}

/// The longest time that a write with fsync takes, until `enough`.
pub fn longest_fsync(
    live: &str,
    enough: Arc<AtomicBool>,
) -> std::thread::JoinHandle<Result<Duration, String>> {
    let path = format!("{live}/fsynced");
    std::thread::spawn(move || {
        use std::io::Write;
        let mut file = std::fs::File::create(path).map_err(|e| e.to_string())?;
        let mut longest = Duration::ZERO;
        while !enough.load(Ordering::Acquire) {
            let since = Instant::now();
            file.write_all(b"x").map_err(|e| e.to_string())?;
            file.sync_data().map_err(|e| e.to_string())?;
            longest = longest.max(since.elapsed());
        }
        Ok(longest)
    })
}

/// The daemon is killed with copies at work; and while it freezes.
pub fn killed(varve: &Installation, device: &str, rounds: u32) -> Outcome {
    let start = Instant::now();
    std::fs::create_dir_all(varve.root().join("run/varve")).map_err(|e| e.to_string())?;
    let mut filter = varve.filter()?;
    pause(300);
    let mapped = zeroed(varve, device)?;
    let mut writers = Writers::start(&[&mapped], 4, SECTORS)?;
    let mut copies = Vec::new();
    for round in 0..rounds {
        pause(300 + 130 * u64::from(round % 5));
        let before = writers.before();
        // Each copy may need all that the writers write to.
        let mut arguments = vec!["disk", "--store-size", "600"];
        if round % 3 == 1 {
            arguments.push("--persist");
        }
        let (name, path) = copy(varve, &arguments)?
            .into_iter()
            .next()
            .ok_or("no copy")?;
        let held = writers.check(&[&path], &before)?;
        // What is written to a copy survives its daemon.
        let text = format!("round {round}");
        sh(&format!(
            "printf '{text:-<4096}' | dd of={path} bs=4096 seek=4200 oflag=direct conv=notrunc status=none"
        ))?;
        copies.push((name, path, held, before, text));
        pause(200);
        filter.kill().map_err(|e| e.to_string())?;
        filter.wait().map_err(|e| e.to_string())?;
        filter = varve.filter()?;
        let back = Instant::now();
        digest_of_block(&mapped, 0)?;
        say(
            start,
            &format!(
                "kill {}: stalled for {:.3} s",
                round + 1,
                back.elapsed().as_secs_f64()
            ),
        );
        for (name, path, held, before, text) in &copies {
            let now = writers
                .check(&[path], before)
                .map_err(|e| format!("{e}\n{}", varve.messages()))?;
            if now != *held {
                return Err(format!(
                    "{name} has changed since a daemon was killed\n{}",
                    varve.messages()
                ));
            }
            let kept = sh(&format!(
                "dd if={path} bs=4096 skip=4200 count=1 iflag=direct status=none"
            ))?;
            if !kept.starts_with(text.as_str()) {
                return Err(format!("{name}: what was written to it is gone"));
            }
        }
    }
    writers.stop()?;
    say(start, &format!("{rounds} kills: every copy is what it was"));
    for (name, ..) in &copies {
        hcp(varve, &["-r", name])?;
    }
    killed_while_freezing(varve, &mapped, &mut filter, rounds)?;
    say(start, "killed while freezing: the file system goes on");
    end(varve)?;
    let _ = filter.wait();
    Ok(())
}

fn digest_of_block(path: &str, block: u64) -> Result<String, String> {
    sh(&format!(
        "dd if={path} bs=4096 skip={block} count=1 iflag=direct status=none | sha256sum"
    ))
}

fn killed_while_freezing(
    varve: &Installation,
    mapped: &str,
    filter: &mut std::process::Child,
    rounds: u32,
) -> Outcome {
    let live = "/mnt/live";
    std::fs::create_dir_all(live).map_err(|e| e.to_string())?;
    make_file_system("ext4", mapped)?;
    run("mount", &[mapped, live])?;
    for round in 0..rounds {
        let root = varve.root().display().to_string();
        let mut asking = std::process::Command::new(varve.program("hcp"))
            .args(["--root", &root, "--skip-mount", live])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .map_err(|e| e.to_string())?;
        pause(u64::from(round) * 23 % 160);
        match round % 3 {
            0 => {
                asking.kill().map_err(|e| e.to_string())?;
            }
            1 => {
                filter.kill().map_err(|e| e.to_string())?;
                filter.wait().map_err(|e| e.to_string())?;
                *filter = varve.filter()?;
            }
            // The helper that froze it, too.
            _ => {
                filter.kill().map_err(|e| e.to_string())?;
                let _ = run("pkill", &["-KILL", "-f", "blkfilter --freeze"]);
                filter.wait().map_err(|e| e.to_string())?;
                *filter = varve.filter()?;
            }
        }
        let _ = asking.wait();
        let since = Instant::now();
        std::fs::write(format!("{live}/round"), format!("{round}")).map_err(|e| e.to_string())?;
        run("sync", &["-f", live])?;
        if since.elapsed() > Duration::from_secs(15) {
            return Err(format!("round {round}: frozen for {:?}", since.elapsed()));
        }
        // Whatever copy came of it is whole, or is not there.
        let listed = loop {
            match hcp(varve, &["--json", "-l"]) {
                Err(why) if why.contains("C007") && since.elapsed() < Duration::from_secs(10) => {
                    pause(50); // The next daemon is about to listen.
                }
                listed => break listed?,
            }
        };
        for name in fields(&listed, "name") {
            let shown = hcp(varve, &["--json", "-s", &name])?;
            let path = fields(&shown, "copy")
                .into_iter()
                .next()
                .unwrap_or_default();
            digest_of_block(&path, 1)?;
            hcp(varve, &["-r", &name])?;
        }
    }
    run("umount", &[live])?;
    Ok(())
}

/// Too little room, too many copies, discards, wrong names: clear words, and the volume goes on.
pub fn limits(varve: &Installation, device: &str) -> Outcome {
    let start = Instant::now();
    expect_refused(hcp(varve, &["/dev/null"]), "C007-daemon")?;
    let mapped = zeroed(varve, device)?;
    expect_refused(hcp(varve, &["/no/such"]), "V027-missing")?;
    expect_refused(hcp(varve, &["/dev/null"]), "H012-unmapped")?;
    expect_refused(hcp(varve, &["-r", "nothing"]), "H001-unknown")?;
    expect_refused(hcp(varve, &["-s", "nothing"]), "H001-unknown")?;
    expect_refused(hcp(varve, &["disk", "--store-size", "1"]), "H011-room")?;
    expect_refused(
        hcp(varve, &["disk", "--store-size", "99999999"]),
        "H011-room",
    )?;
    expect_refused(hcp(varve, &["disk", "-c", device]), "V037-same")
        .or_else(|_| expect_refused(hcp(varve, &["disk", "-c", device]), "H008-store"))?;
    expect_refused(hcp(varve, &["disk", "--name", "../x"]), "H007-name")?;
    let mut writers = Writers::start(&[&mapped], 4, SECTORS)?;
    let before = writers.before();
    let (name, path) = copy(varve, &["disk", "--name", "small", "--store-size", "16"])?
        .into_iter()
        .next()
        .ok_or("no copy")?;
    expect_refused(hcp(varve, &["disk", "--name", "small"]), "H007-name")?;
    expect_refused(varve.varve(&["unprotect", "disk"]), "H003-copied")?;
    let held = writers.check(&[&path], &before);
    // 16 MiB are written again and again: the room for changed blocks is full soon.
    let since = Instant::now();
    while fields(&hcp(varve, &["--json", "-l"])?, "lost")
        .first()
        .map(String::as_str)
        != Some("full")
    {
        if since.elapsed() > Duration::from_secs(60) {
            return Err("the copy is never given up".to_owned());
        }
        pause(100);
    }
    held.map(|_| ()).or_else(|why| {
        if why.contains("reading") {
            Ok(())
        } else {
            Err(why)
        }
    })?;
    if digest_of_block(&path, 3).is_ok() && writers.check(&[&path], &before).is_ok() {
        return Err("a copy that was given up can still be read".to_owned());
    }
    if !varve.messages().contains("ALERT: the hot copies of disk") {
        return Err("nobody was alerted".to_owned());
    }
    expect_refused(copy(varve, &["disk"]).map(|_| String::new()), "H006-lost")?;
    hcp(varve, &["-r", &name])?;
    say(
        start,
        "a full place for changed blocks: the copy ends, the volume goes on",
    );

    let mut copies = Vec::new();
    for _ in 0..16 {
        let before = writers.before();
        let (name, path) = copy(varve, &["disk", "--store-size", "600"])?
            .into_iter()
            .next()
            .ok_or("no copy")?;
        copies.push((name, path, before));
    }
    writers.stop()?;
    let mut held = Vec::new();
    for (_, path, before) in &copies {
        held.push(writers.check(&[path], before)?);
    }
    run("blkdiscard", &["-f", &mapped])?;
    let bytes = (SECTORS * 512).to_string();
    run(
        "blkdiscard",
        &["-z", "-f", "-o", "0", "-l", &bytes, &mapped],
    )?;
    for ((name, path, before), held) in copies.iter().zip(&held) {
        if writers.check(&[path], before)? != *held {
            return Err(format!(
                "{name} is not what it was before the device was discarded"
            ));
        }
    }
    say(
        start,
        "sixteen copies outlive a discard of the whole device",
    );
    for (name, ..) in &copies {
        hcp(varve, &["-r", name])?;
    }
    let _ = digest(&mapped)?;
    end(varve)
}

/// Copies are copied out: whole, sparse, in part, to standard output, as qcow2.
pub fn out(varve: &Installation, device: &str) -> Outcome {
    let start = Instant::now();
    let mapped = zeroed(varve, device)?;
    let place = varve.root().join("out");
    std::fs::create_dir_all(&place).map_err(|e| e.to_string())?;
    let file = |name: &str| place.join(name).display().to_string();
    let same = |path: &str, name: &str| -> Outcome {
        let shown = hcp(varve, &["--json", "-s", name])?;
        let copy = fields(&shown, "copy")
            .into_iter()
            .next()
            .unwrap_or_default();
        if digest(path)? == digest(&copy)? {
            return Ok(());
        }
        Err(format!("{path} is not what {name} is"))
    };
    let mut writers = Writers::start(&[&mapped], 4, SECTORS)?;
    pause(500);
    let (image, second, third) = (file("image"), file("second"), file("third"));
    hcp(
        varve,
        &[
            "--to",
            &image,
            "--name",
            "base",
            "--store-size",
            "600",
            "disk",
        ],
    )?;
    same(&image, "base")?;
    expect_refused(hcp(varve, &["--to", &image, "disk"]), "H018-target")?;
    pause(300);
    let increment = [
        "--json",
        "--to",
        &image,
        "--incremental-from",
        "base",
        "--name",
        "next",
        "disk",
    ];
    let json = hcp(varve, &increment)?;
    same(&image, "next")?;
    let written = fields(&json, "written_bytes")
        .into_iter()
        .next()
        .unwrap_or_default();
    let written: u64 = written.parse().map_err(|_| json.clone())?;
    if written == 0 || written > 64 << 20 {
        return Err(format!(
            "{written} bytes were written for what changed in a moment: {json}"
        ));
    }
    say(start, &format!("an increment wrote {} MiB", written >> 20));
    hcp(varve, &["--to", &second, "base"])?;
    same(&second, "base")?;
    let streamed = sh(&format!(
        "{} --root {} --to - base | sha256sum",
        varve.program("hcp").display(),
        varve.root().display()
    ))?;
    if streamed.split(' ').next() != digest(&second)?.split(' ').next() {
        return Err(format!("standard output is not the copy: {streamed}"));
    }
    let no_base = ["--to", &file("x"), "--incremental-from", "base", "disk"];
    expect_refused(hcp(varve, &no_base), "H015-base")?;
    // An increment goes onto its base only: one letter must not cost another disk's backup.
    let other = file("other");
    for script in [
        format!(
            "cp --sparse=always {image} {other} && printf x | dd of={other} bs=1 seek=50M conv=notrunc status=none"
        ),
        format!("head -c 1M {image} > {other}"),
    ] {
        // (Where it was not written since: behind what the writers stamp.)
        sh(&format!("rm -f {other}; {script}"))?;
        let was = digest(&other)?;
        let wrong = ["--to", &other, "--incremental-from", "base", "base"];
        expect_refused(hcp(varve, &wrong), "H015-base")?;
        if digest(&other)? != was {
            return Err("what is no base was written to".to_owned());
        }
    }
    std::fs::remove_file(&other).map_err(|e| e.to_string())?;
    one_that_is_mine(varve, &file("mine"))?;
    broken_off(varve)?;
    if run("qemu-img", &["--version"]).is_ok() {
        hcp(varve, &["--to", &file("image.qcow2"), "base"])?;
        run("qemu-img", &["compare", &file("image.qcow2"), &second])?;
        say(start, "qcow2 is the same");
    } else {
        println!("SKIPPED: there is no qemu-img: qcow2 was not tested");
    }
    // A file is copied as it is.
    hcp(varve, &["--to", &third, &second])?;
    run("cmp", &[&second, &third])?;
    let blocks = std::fs::metadata(&third).map_err(|e| e.to_string())?;
    if std::os::unix::fs::MetadataExt::blocks(&blocks) * 512 > 64 << 20 {
        return Err("zeroes were written out".to_owned());
    }
    // Killed in the middle, the same command ends what was begun.
    let mut interrupted = 0;
    for round in 0..4 {
        let to = file(&format!("killed-{round}"));
        let progress = std::path::PathBuf::from(format!("{to}.varve-progress"));
        let mut asking = std::process::Command::new(varve.program("hcp"))
            .arg("--root")
            .arg(varve.root())
            .args(["--quiet", "--to", &to, "disk"])
            .spawn()
            .map_err(|e| e.to_string())?;
        let since = Instant::now();
        while !progress.exists() && since.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(1));
        }
        pause(round * 7);
        let _ = asking.kill();
        let _ = asking.wait();
        if progress.exists() {
            interrupted += 1;
            hcp(varve, &["--to", &to, "disk"])?;
        }
        let _ = std::fs::remove_file(&to);
    }
    if interrupted == 0 {
        return Err("no command was interrupted in the middle".to_owned());
    }
    say(
        start,
        &format!("{interrupted} interrupted commands were finished by the next"),
    );
    writers.stop()?;
    for name in fields(&hcp(varve, &["--json", "-l"])?, "name") {
        hcp(varve, &["-r", &name])?;
    }
    let _ = std::fs::remove_dir_all(&place);
    end(varve)
}

/// A copying out of a copy that somebody has made, interrupted, is not gone on with by a command for the device, which would end it.
fn one_that_is_mine(varve: &Installation, to: &str) -> Outcome {
    hcp(varve, &["--skip-mount", "--name", "mine", "disk"])?;
    let progress = std::path::PathBuf::from(format!("{to}.varve-progress"));
    // It may be done before it can be interrupted.
    for _ in 0..5 {
        let mut asking = std::process::Command::new(varve.program("hcp"))
            .arg("--root")
            .arg(varve.root())
            .args(["--quiet", "--to", to, "--overwrite", "mine"])
            .spawn()
            .map_err(|e| e.to_string())?;
        let since = Instant::now();
        while !progress.exists() && since.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = asking.kill();
        let _ = asking.wait();
        if progress.exists() {
            break;
        }
    }
    if !progress.exists() {
        return Err("the command was not interrupted in the middle".to_owned());
    }
    hcp(varve, &["--to", to, "--overwrite", "disk"])?;
    hcp(varve, &["-r", "mine"]).map_err(|e| format!("somebody's copy was ended: {e}"))?;
    std::fs::remove_file(to).map_err(|e| e.to_string())
}

/// What cannot be gone on with leaves no copy when it is broken off.
fn broken_off(varve: &Installation) -> Outcome {
    let names = || Ok::<_, String>(fields(&hcp(varve, &["--json", "-l"])?, "name"));
    let before = names()?;
    let mut asking = std::process::Command::new(varve.program("hcp"))
        .arg("--root")
        .arg(varve.root())
        .args(["--to", "-", "disk"])
        .stdout(std::process::Stdio::piped()) // Nobody reads.
        .spawn()
        .map_err(|e| e.to_string())?;
    let since = Instant::now();
    while names()? == before {
        if since.elapsed() > Duration::from_secs(10) {
            return Err("no copy was made for standard output".to_owned());
        }
        pause(20);
    }
    pause(300);
    run("kill", &["-TERM", &asking.id().to_string()])?;
    asking.wait().map_err(|e| e.to_string())?;
    // It goes when the command, which had it open, has ended.
    let since = Instant::now();
    while names()? != before {
        if since.elapsed() > Duration::from_secs(15) {
            return Err("a command that was broken off has left its copy".to_owned());
        }
        pause(100);
    }
    Ok(())
}

/// Several devices at one instant: nothing is in one copy that was issued after something was answered that another copy lacks.
pub fn group(varve: &Installation, rounds: u32) -> Outcome {
    let start = Instant::now();
    let names = ["one", "two", "three", "four"];
    varve.varve(&["up"])?;
    let mut mapped = Vec::new();
    for name in names {
        let path = varve
            .root()
            .join(format!("{name}.disk"))
            .display()
            .to_string();
        sh(&format!("truncate -s 64M {path}"))?;
        varve.varve(&["protect", &path, "--name", name, "--log-size", "128"])?;
        mapped.push(varve.device(name)?);
    }
    varve.wait_protected()?;
    let devices: Vec<&str> = mapped.iter().map(String::as_str).collect();
    let mut writers = Writers::start(&devices, 1, SECTORS / 2)?;
    expect_refused(hcp(varve, &["--group", "one", "one"]), "H004-twice")?;
    for round in 0..rounds {
        pause(200);
        let before = writers.before();
        let mut arguments = vec!["--json", "--skip-mount", "--group"];
        arguments.extend(names);
        let json = hcp(varve, &arguments).map_err(|e| format!("{e}\n{}", varve.messages()))?;
        let copies = fields(&json, "copy");
        let copies: Vec<&str> = copies.iter().map(String::as_str).collect();
        writers.check(&copies, &before)?;
        let note = fields(&json, "note").into_iter().next().unwrap_or_default();
        say(start, &format!("round {round}: {note}"));
        for name in fields(&json, "name") {
            hcp(varve, &["-r", &name])?;
        }
    }
    writers.stop()?;
    varve.varve(&["down"])?;
    Ok(())
}
