//! What the store does by itself: history is compressed while the volume is written, images stay what they were, damage is found and said.

use crate::copies::{expect_refused, sh};
use crate::{Outcome, export, protect, stamper_on_zeroes};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use varve_tests::scenario::{Installation, digest, pause, run};

fn number(text: &str, field: &str) -> Option<u64> {
    let rest = text.split(&format!("\"{field}\": ")).nth(1)?;
    rest.split([',', '\n']).next()?.trim().parse().ok()
}

fn until_settled(varve: &Installation) -> Outcome {
    for _ in 0..1200 {
        let history = varve.varve(&["--json", "history"])?;
        if number(&history, "unsettled_bytes") == Some(0) {
            return Ok(());
        }
        pause(250);
    }
    Err(format!("it never was compressed\n{}", varve.messages()))
}

fn digest_of(varve: &Installation, instant: &str) -> Result<String, String> {
    let image = export(varve, instant, false)?;
    let found = digest(&image)?;
    varve.varve(&["unexport", &image])?;
    Ok(found)
}

fn segments(varve: &Installation) -> Result<Vec<PathBuf>, String> {
    let list = format!(
        "ls -S {}/var/lib/varve/store/volumes/*/segments/*.seg",
        varve.root().display()
    );
    Ok(run("sh", &["-c", &list])?
        .lines()
        .map(PathBuf::from)
        .collect())
}

/// A bit is wrong in the largest run; that is made anew, and so are all maps.
fn rebuilt(varve: &Installation) -> Outcome {
    let store = format!("{}/var/lib/varve/store/volumes", varve.root().display());
    let runs = run("sh", &["-c", &format!("ls -S {store}/*/runs/*.run")])?;
    let victim = runs.lines().next().ok_or("no run")?;
    let file = std::fs::File::options().read(true).write(true).open(victim);
    let file = file.map_err(|e| format!("{victim}: {e}"))?;
    let at = file.metadata().map_or(0, |metadata| metadata.len()) * 2 / 3;
    let mut byte = [0u8];
    let flipped = file
        .read_exact_at(&mut byte, at)
        .and_then(|()| file.write_all_at(&[byte[0] ^ 1], at));
    flipped.map_err(|e| format!("{victim}: {e}"))?;
    let list = format!("find {store} -name '*.map' -printf '%p %T@\\n'");
    let maps = || run("sh", &["-c", &list]);
    let before = maps()?;
    match varve.varve(&["rebuild"]) {
        Err(said) if said.contains("made again from its segment") => {}
        other => return Err(format!("a damaged run was not made again: {other:?}")),
    }
    let since = Instant::now();
    while maps().map_or(0, |now| now.lines().count()) < before.lines().count() {
        if since.elapsed() > Duration::from_secs(60) {
            return Err("the maps were not made again".to_owned());
        }
        pause(200);
    }
    let kept = maps()?;
    if before.lines().any(|map| kept.contains(map)) {
        return Err(format!("a map was not made anew:\n{before}\n{kept}"));
    }
    varve.varve(&["rebuild"]).map(drop)
}

/// Everything in one life.
pub fn store_life(varve: &Installation, device: &str) -> Outcome {
    let mapped = protect(varve, device)?;
    varve.wait_protected()?;
    let mut writer = stamper_on_zeroes(&mapped, 2048)?;
    for step in 0..300 {
        writer.write(step % 50 == 49)?;
    }
    varve.varve(&["mark", "early"])?;
    let early = digest_of(varve, "early")?;
    // Each look at the past seals a segment: enough of them for a map.
    for round in 0..12 {
        for step in 0..40 {
            writer.write(step == 39)?;
        }
        varve.varve(&["mark", &format!("point-{round}")])?;
        varve.varve(&["history"])?;
    }
    let later = digest_of(varve, "point-9")?;
    until_settled(varve)?;
    let maps = format!(
        "ls {}/var/lib/varve/store/volumes/*/maps/*.map",
        varve.root().display()
    );
    let maps = run("sh", &["-c", &maps])?;
    println!("maps: {}", maps.lines().count());
    if digest_of(varve, "early")? != early || digest_of(varve, "point-9")? != later {
        return Err("an instant is another one since it was compressed".to_owned());
    }
    varve.compare()?;
    print!("{}", varve.varve(&["scrub"])?);
    print!("{}", varve.varve(&["check"])?);

    rebuilt(varve)?;
    if digest_of(varve, "early")? != early || digest_of(varve, "point-9")? != later {
        return Err("an instant is another one since the indexes were made anew".to_owned());
    }

    // One bit of the largest segment.
    let victim = segments(varve)?.into_iter().next().ok_or("no segment")?;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&victim);
    let file = file.map_err(|e| format!("{}: {e}", victim.display()))?;
    let mut byte = [0u8];
    let mut flip = || {
        file.read_exact_at(&mut byte, 6000)?;
        file.write_all_at(&[byte[0] ^ 4], 6000)
    };
    flip().map_err(|e| e.to_string())?;
    for how in [&["scrub"][..], &["scrub", "--stored"]] {
        match varve.varve(how) {
            Err(said) if said.contains("DAMAGED") => {
                println!("{said}");
            }
            other => return Err(format!("a flipped bit was not found: {other:?}")),
        }
    }
    flip().map_err(|e| e.to_string())?;
    varve.varve(&["scrub", "--rate", "1000"])?;
    varve.varve(&["scrub", "--stored"])?;
    scrub_goes_on(varve)?;
    what_changed(varve, &mapped)?;
    lost_lists(varve)?;
    salvaged(varve)?;
    if digest_of(varve, "early")? != early || digest_of(varve, "point-9")? != later {
        return Err("an instant is another one in the salvaged store".to_owned());
    }
    throttled(varve)?;
    varve.varve(&["down"]).map(drop)
}

/// Compressing takes no more of a processor than the policy says.
fn throttled(varve: &Installation) -> Outcome {
    let mapped = varve.device("disk")?;
    let policy = varve.root().join("etc/varve/store.toml");
    let policy = |text: &str| std::fs::write(&policy, text).map_err(|e| e.to_string());
    until_settled(varve)?;
    policy("compression = \"zstd:19\"\nbackground_percent = 10\n")?;
    pause(2000);
    for _ in 0..3 {
        sh(&format!(
            "head -c 6M /dev/urandom | base64 -w0 | dd of={mapped} bs=1M iflag=fullblock oflag=direct count=8 status=none"
        ))?;
        varve.varve(&["history"])?;
    }
    let unsettled = || told(&varve.varve(&["--json", "history"])?, "unsettled_bytes");
    let process = format!("varved --root {}", varve.root().display());
    let process = run("pgrep", &["-o", "-f", &process])?;
    let used = || -> Result<f64, String> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.trim()));
        let stat = stat.map_err(|e| e.to_string())?;
        // Behind the name, which may have spaces: user and system time, in hundredths of a second.
        let times = stat.rsplit(')').next().unwrap_or_default();
        let times = times.split_whitespace().skip(11).take(2);
        Ok(times
            .filter_map(|time| time.parse::<f64>().ok())
            .sum::<f64>()
            / 100.0)
    };
    let (before, begun, first) = (unsettled()?, Instant::now(), used()?);
    pause(8000);
    let share = (used()? - first) / begun.elapsed().as_secs_f64();
    let left = unsettled()?;
    println!("compressing took {share:.2} of a processor; {left} of {before} bytes are left");
    if left == 0 {
        return Err("it had too little to do".to_owned());
    }
    if share > 0.4 {
        return Err(format!("{share:.2} of a processor, instead of a tenth"));
    }
    policy("background_percent = 100\n")
}

fn told(json: &str, name: &str) -> Result<u64, String> {
    number(json, name).ok_or_else(|| format!("no {name} in {json}"))
}

/// No faster than it is told; broken off, it goes on where it was.
fn scrub_goes_on(varve: &Installation) -> Outcome {
    let whole = varve.varve(&["--json", "scrub"])?;
    let mut asking = std::process::Command::new(varve.program("varve"))
        .arg("--root")
        .arg(varve.root())
        .args(["scrub", "--rate", "1"])
        .stdout(std::process::Stdio::null())
        .spawn()
        .map_err(|e| e.to_string())?;
    let (place, since) = (
        format!(
            "cat {}/var/lib/varve/store/volumes/*/scrub",
            varve.root().display()
        ),
        Instant::now(),
    );
    let position = || {
        sh(&place)
            .ok()
            .and_then(|text| text.trim().parse::<u64>().ok())
    };
    while position().unwrap_or(0) < 4 {
        if since.elapsed() > Duration::from_secs(60) {
            return Err("a slow scrub does not say how far it has come".to_owned());
        }
        pause(20);
    }
    run("kill", &["-INT", &asking.id().to_string()])?;
    let _ = asking.wait();
    pause(500);
    let begun = Instant::now();
    let rest = varve.varve(&["--json", "scrub", "--rate", "1"])?;
    let (took, bytes) = (begun.elapsed(), told(&rest, "bytes")?);
    if told(&rest, "from_segment")? == 0 || bytes >= told(&whole, "bytes")? {
        return Err(format!("it did not go on where it was broken off: {rest}"));
    }
    // The last file is not waited for.
    if took.as_secs_f64() < bytes as f64 / f64::from(1 << 20) / 3.0 {
        return Err(format!(
            "{bytes} bytes were read in {took:?}, at one MiB a second"
        ));
    }
    Ok(())
}

/// What was written since an instant, to the block; and what a rewind would write, which changes nothing.
fn what_changed(varve: &Installation, mapped: &str) -> Outcome {
    varve.varve(&["mark", "unchanged"])?;
    sh(&format!(
        "dd if=/dev/urandom of={mapped} bs=4k seek=16384 count=3 oflag=direct conv=notrunc status=none"
    ))?;
    let changed = varve.varve(&["--json", "changed", "--since", "unchanged"])?;
    let compact: String = changed.split_whitespace().collect();
    if !compact.contains("[[67108864,12288]]") {
        return Err(format!("12 KiB at 64 MiB were written: {changed}"));
    }
    let before = digest(mapped)?;
    let would = varve.varve(&["--json", "rewind", "unchanged", "--dry-run"])?;
    if told(&would, "written_bytes")? == 0 || digest(mapped)? != before {
        return Err(format!("a dry run: {would}"));
    }
    Ok(())
}

/// Both lists of kept instants are lost: that is said, nothing is pinned by what is not known, and somebody decides.
fn lost_lists(varve: &Installation) -> Outcome {
    varve.varve(&["pin", "early"])?;
    varve.varve(&["down"])?;
    sh(&format!(
        "for list in {}/var/lib/varve/store/volumes/*/kept*; do echo lost >$list; done",
        varve.root().display()
    ))?;
    varve.varve(&["up"])?;
    varve.wait_protected()?;
    expect_refused(varve.varve(&["check"]), "--give-up-kept")?;
    expect_refused(varve.varve(&["pin", "point-9"]), "S024-kept-lost")?;
    varve.varve(&["rebuild", "--give-up-kept"])?;
    varve.varve(&["pin", "point-9"])?;
    varve.varve(&["check"]).map(drop)
}

/// The copy that salvaging makes takes the store's place.
fn salvaged(varve: &Installation) -> Outcome {
    let store = varve.root().join("var/lib/varve/store");
    let (store, copy) = (
        store.display(),
        format!("{}/salvaged", varve.root().display()),
    );
    varve.varve(&["salvage", "--to", &copy])?;
    varve.varve(&["down"])?;
    sh(&format!("rm -r {store} && mv {copy} {store}"))?;
    varve.varve(&["up"])?;
    varve.wait_protected()?;
    varve.varve(&["check"]).map(drop)
}
