//! Recovery points on a live volume: under load, with file systems frozen, on a schedule with commands around, at mount, unmount and boot.

use crate::copies::{clean_journal, expect_refused, fields, longest_fsync, sh};
use crate::encrypted::{restart, restart_with};
use crate::{Outcome, export, protect};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use varve_tests::scenario::{Installation, make_file_system, pause, run, say};

/// A point, as `varve points` tells of it.
#[derive(Clone, Debug)]
struct Point {
    name: String,
    lsn: String,
    clean: bool,
    application: bool,
}

struct Story<'a> {
    varve: &'a Installation,
    live: String,
}

impl Story<'_> {
    fn points(&self) -> Result<Vec<Point>, String> {
        let json = self.varve.varve(&["--json", "points"])?;
        let all = |field: &str| fields(&json, field);
        let of = |field: &str| {
            all(field)
                .iter()
                .map(|text| text == "true")
                .collect::<Vec<_>>()
        };
        let (clean, application) = (of("file_system_consistent"), of("application_consistent"));
        let named = all("name").into_iter().zip(all("lsn"));
        Ok(named
            .zip(clean)
            .zip(application)
            .map(|(((name, lsn), clean), application)| Point {
                name,
                lsn,
                clean,
                application,
            })
            .collect())
    }

    /// Waits until there are so many whose name begins like this.
    fn wait_for(&self, begins: &str, count: usize) -> Result<Vec<Point>, String> {
        let since = Instant::now();
        loop {
            let mut points = self.points()?;
            points.retain(|point| point.name.starts_with(begins));
            if points.len() >= count {
                return Ok(points);
            }
            if since.elapsed() > Duration::from_secs(60) {
                return Err(format!(
                    "{} points `{begins}` instead of {count}\n{}",
                    points.len(),
                    self.varve.messages()
                ));
            }
            pause(200);
        }
    }

    fn policy(&self, text: &str) -> Outcome {
        let path = self.varve.root().join("etc/varve/store.toml");
        std::fs::write(&path, text).map_err(|e| e.to_string())
    }

    /// Whether the journal in the image of a point is clean.
    fn is_clean(&self, instant: &str) -> Result<bool, String> {
        let image = export(self.varve, instant, false)?;
        let clean = clean_journal("ext4", &image).is_ok();
        let checked = match clean {
            true => run("e2fsck", &["-fn", &image]).map(drop),
            false => Ok(()),
        };
        self.varve.varve(&["unexport", &image])?;
        checked.map(|()| clean)
    }

    fn write(&self, name: &str) -> Outcome {
        sh(&format!(
            "echo {name} >{}/{name} && sync -f {}",
            self.live, self.live
        ))
        .map(drop)
    }
}

/// Everything in one life.
pub fn points(varve: &Installation, device: &str) -> Outcome {
    let start = Instant::now();
    let mapped = protect(varve, device)?;
    varve.wait_protected()?;
    make_file_system("ext4", &mapped)?;
    let live = varve.root().join("live");
    std::fs::create_dir_all(&live).map_err(|e| e.to_string())?;
    let story = Story {
        varve,
        live: live.display().to_string(),
    };
    pause(1000);
    sh(&format!("mount {mapped} {}", story.live))?;
    story.wait_for("mounted", 1)?;
    say(start, "a mount has its point");
    frozen(&story, start)?;
    scheduled(&story, start)?;
    unwanted(&story, &mapped)?;
    sh(&format!("umount {}", story.live))?;
    let unmounted = story.wait_for("unmounted", 1)?;
    let last = unmounted.last().ok_or("no point")?;
    if !last.clean || !story.is_clean(&format!("lsn:{}", last.lsn))? {
        return Err(format!("not clean after the unmount: {last:?}"));
    }
    say(start, "an unmount has its point, and is clean");
    booted(&story)?;
    say(
        start,
        "a boot has its point, a restart of the daemon has none",
    );
    varve.compare()?;
    varve.varve(&["down"]).map(drop)
}

/// File systems on what is built on the device, as LVM does it, are frozen, too; swap space beside them needs nothing, and what is mounted where it cannot be
/// reached is told.
pub fn stacked(varve: &Installation, device: &str) -> Outcome {
    const MIB: u64 = 2048; // Sectors.
    let start = Instant::now();
    let mapped = protect(varve, device)?;
    varve.wait_protected()?;
    let live = varve.root().join("live");
    std::fs::create_dir_all(&live).map_err(|e| e.to_string())?;
    let story = Story {
        varve,
        live: live.display().to_string(),
    };
    let names = ["lv", "swap", "away", "over"];
    for (name, (from, size)) in names
        .iter()
        .zip([(0, 200), (200, 32), (232, 40), (272, 32)])
    {
        let table = format!("0 {} linear {mapped} {}", size * MIB, from * MIB);
        sh(&format!(
            "dmsetup create {name} --table '{table}' && dmsetup mknodes"
        ))?;
    }
    make_file_system("ext4", "/dev/mapper/lv")?;
    make_file_system("ext4", "/dev/mapper/away")?;
    make_file_system("ext4", "/dev/mapper/over")?;
    pause(500);
    sh(&format!("mount /dev/mapper/lv {}", story.live))?;
    sh("mkswap -q /dev/mapper/swap && swapon /dev/mapper/swap")?;
    story.wait_for("mounted", 1)?;
    frozen(&story, start)?;
    say(start, "frozen through what is built on the device");
    let away = varve.root().join("away");
    std::fs::create_dir_all(&away).map_err(|e| e.to_string())?;
    let flag = varve.root().join("is-away");
    let mount = format!(
        "mount /dev/mapper/away {} && touch {} && sleep 1000",
        away.display(),
        flag.display()
    );
    let mut hidden = std::process::Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &mount])
        .process_group(0)
        .spawn()
        .map_err(|e| e.to_string())?;
    let since = Instant::now();
    while !flag.exists() && since.elapsed() < Duration::from_secs(20) {
        pause(50);
    }
    let told = varve.varve(&["--json", "mark", "not-all", "--freeze"]);
    let group = nix::unistd::Pid::from_raw(hidden.id().cast_signed());
    nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL)
        .map_err(|e| e.to_string())?;
    let _ = hidden.wait();
    let is = |clean: bool, what: &str, told: &str| {
        let found = fields(told, "file_system_consistent");
        match found == [clean.to_string()] && (clean || told.contains("is in use")) {
            true => Ok(()),
            false => Err(format!("{what}: {told}")),
        }
    };
    is(false, "what is mounted elsewhere was not frozen", &told?)?;
    let mark = |name: &str| varve.varve(&["--json", "mark", name, "--freeze"]);
    is(true, "it has gone", &mark("all-again")?)?;
    let place = away.display();
    sh(&format!("mount /dev/mapper/away {place}"))?;
    is(true, "two are frozen", &mark("both")?)?;
    sh(&format!("mount /dev/mapper/over {place}"))?;
    is(false, "one lies under another", &mark("covered")?)?;
    sh(&format!("umount {place} && umount {place}"))?;
    // Its own writes would be recorded.
    let small = varve.root().join("small");
    let small = small.display().to_string();
    sh(&format!("truncate -s 4M {small}"))?;
    let log = format!("{}/log", story.live);
    expect_refused(
        varve.varve(&[
            "protect",
            &small,
            "--name",
            "p",
            "--log",
            &log,
            "--log-size",
            "16",
        ]),
        "V034-loop",
    )?;
    // A part of it lies on another disk: that no freeze makes whole.
    let other = varve.root().join("other-disk");
    let other = other.display();
    let disk = sh(&format!(
        "truncate -s 8M {other} && losetup -f --show {other}"
    ))?;
    let disk = disk.trim();
    let half = 8 * MIB;
    sh(&format!(
        "printf '0 {half} linear {mapped} {}\n{half} {half} linear {disk} 0\n' | dmsetup create split && dmsetup mknodes",
        304 * MIB
    ))?;
    is(false, "a part of it lies elsewhere", &mark("split")?)?;
    sh(&format!(
        "dmsetup remove --retry split && losetup -d {disk}"
    ))?;
    is(true, "nothing is split any more", &mark("whole")?)?;
    say(
        start,
        "what is mounted elsewhere, covered, or in parts is told",
    );
    // A file system that cannot be frozen keeps no other from it.
    let helper = sh(&format!(
        "printf t | {} --freeze /proc {}",
        varve.program("blkfilter").display(),
        story.live
    ))?;
    if !helper.starts_with("frozen 0\n") || !helper.contains("thawed") {
        return Err(format!("one that cannot be frozen: {helper}"));
    }
    sh(&format!("swapoff /dev/mapper/swap; umount {}", story.live))?;
    for name in names {
        sh(&format!("dmsetup remove --retry {name}"))?;
    }
    varve.compare()?;
    varve.varve(&["down"]).map(drop)
}

/// By hand, beside a writer that flushes.
fn frozen(story: &Story<'_>, start: Instant) -> Outcome {
    let varve = story.varve;
    let enough = Arc::new(AtomicBool::new(false));
    let writer = longest_fsync(&story.live, Arc::clone(&enough));
    pause(500);
    let mut longest_freeze: f64 = 0.0;
    for round in 0..5 {
        varve.wait_protected()?;
        varve.varve(&["mark", &format!("crash-{round}")])?;
        let json = varve.varve(&["--json", "mark", &format!("clean-{round}"), "--freeze"])?;
        let seconds = fields(&json, "frozen_seconds")
            .into_iter()
            .next()
            .unwrap_or_default();
        let seconds: f64 = seconds.parse().map_err(|_| json.clone())?;
        longest_freeze = longest_freeze.max(seconds);
        if fields(&json, "file_system_consistent") != ["true"] {
            return Err(json);
        }
        pause(100);
    }
    enough.store(true, Ordering::Release);
    let longest = writer.join().map_err(|_| "the writer panicked")??;
    say(
        start,
        &format!(
            "frozen for {longest_freeze:.3} s at most; the longest fsync took {:.3} s",
            longest.as_secs_f64()
        ),
    );
    if longest_freeze > 2.0 || longest > Duration::from_secs(5) {
        return Err("frozen for too long".to_owned());
    }
    let mut dirty = 0;
    for round in 0..5 {
        if !story.is_clean(&format!("clean-{round}"))? {
            return Err(format!("clean-{round} is not clean"));
        }
        dirty += u32::from(!story.is_clean(&format!("crash-{round}"))?);
    }
    if dirty == 0 {
        return Err("no other point was dirty either: freezing proved nothing".to_owned());
    }
    Ok(())
}

/// Who wants no points at mount and unmount gets none.
fn unwanted(story: &Story<'_>, mapped: &str) -> Outcome {
    let count = || -> Result<usize, String> {
        let mut points = story.points()?;
        points.retain(|point| point.name.contains("mounted"));
        Ok(points.len())
    };
    story.policy("[points]\nevents = false\n")?;
    pause(1500);
    let before = count()?;
    sh(&format!("umount {}", story.live))?;
    pause(1500);
    sh(&format!("mount {mapped} {}", story.live))?;
    pause(1500);
    story.policy("")?;
    pause(1500);
    match count()? {
        after if after == before => Ok(()),
        after => Err(format!("{} points that nobody wants", after - before)),
    }
}

/// On a schedule; what goes wrong with the commands is told, and never costs the point.
fn scheduled(story: &Story<'_>, start: Instant) -> Outcome {
    let varve = story.varve;
    expect_refused(
        varve.varve(&["policy", "set", "--points", "often"]),
        "X006-policy",
    )?;
    expect_refused(
        varve.varve(&["policy", "set", "--points", "1ms"]),
        "X006-policy",
    )?;
    varve.varve(&["policy", "set", "--points", "1s"])?;
    let live = &story.live;
    let policy = |before: &str, seconds: u32| {
        format!(
            "[points]\nevery = \"1s\"\nfreeze = true\nbefore = \"{before}\"\nafter = \"rm -f {live}/ready; sync -f {live}; echo $VARVE_VOLUME $VARVE_POINT >>{live}/../after\"\nhook_seconds = {seconds}\n"
        )
    };
    story.policy(&policy(&format!("touch {live}/ready"), 20))?;
    for number in 0..12 {
        story.write(&format!("work-{number}"))?;
        pause(500);
    }
    let made = story.wait_for("scheduled", 3)?;
    let told: Vec<&Point> = made.iter().filter(|point| point.application).collect();
    if told.len() < 2 {
        return Err(format!("{made:?}\n{}", varve.messages()));
    }
    for point in &told {
        let at = format!("lsn:{}", point.lsn);
        if !point.clean || !story.is_clean(&at)? {
            return Err(format!("{point:?} is not clean"));
        }
        let listed = varve.varve(&["--json", "files", "list", live, "--at", &at])?;
        if !listed.contains("/ready\"") {
            return Err(format!(
                "{point:?} was made before the command had run, or after the other"
            ));
        }
        let after =
            std::fs::read_to_string(varve.root().join("after")).map_err(|e| e.to_string())?;
        if !after.contains(&format!("disk {}\n", point.name)) {
            return Err(format!("no command was run after {}: {after}", point.name));
        }
    }
    say(
        start,
        &format!(
            "{} points on the schedule, the commands around each",
            told.len()
        ),
    );
    // Nothing is written, by commands neither: there is nothing to make a point of. (What the file system still writes by itself may make one or two.)
    story.policy("[points]\nevery = \"1s\"\n")?;
    sh(&format!("sync -f {live}"))?;
    pause(6500);
    let before = story.points()?.len();
    pause(6000);
    let after = story.points()?;
    if after.len() > before + 2 {
        return Err(format!("points of nothing: {after:?}"));
    }
    // Commands that fail, that hang, that anybody may change.
    let path = varve.root().join("etc/varve/store.toml");
    for (text, mode, why) in [
        (policy("exit 3", 20), 0o644, "exit status: 3"),
        (policy("sleep 100", 1), 0o644, "was ended"),
        (
            policy(&format!("touch {live}/stolen"), 20),
            0o666,
            "can be written by others",
        ),
    ] {
        story.policy(&text)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode))
            .map_err(|e| e.to_string())?;
        let count = story.wait_for("scheduled", 1)?.len();
        pause(1500);
        story.write("more")?;
        let made = story.wait_for("scheduled", count + 1)?;
        let last = made.last().ok_or("no point")?;
        if last.application || !last.clean {
            return Err(format!("{why}: {last:?}"));
        }
        if !varve.messages().contains(why) {
            return Err(format!("nothing was said of {why}: {}", varve.messages()));
        }
        pause(500);
    }
    if sh(&format!("ls {live}"))?.contains("stolen") {
        return Err("a command was run that anybody could have written".to_owned());
    }
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644))
        .map_err(|e| e.to_string())?;
    say(
        start,
        "commands that fail, hang, or are anybody's cost no point",
    );
    killed_between(
        story,
        &policy("touch $VARVE_BEGUN; sleep 10; touch $VARVE_HELD", 20),
    )?;
    stopped_between(
        story,
        &policy("touch $VARVE_BEGUN; touch $VARVE_HELD; sleep 100", 120),
    )?;
    varve.varve(&["policy", "set", "--points", "0"])?;
    say(
        start,
        "the daemon stopped or killed between the commands: the second one is run at its start",
    );
    Ok(())
}

/// A daemon that is stopped lets go what the first command holds, and does not wait for that.
fn stopped_between(story: &Story<'_>, policy: &str) -> Outcome {
    let (varve, held) = (story.varve, story.varve.root().join("held-2"));
    let begun = varve.root().join("begun-2");
    let policy = policy.replace("$VARVE_HELD", &held.display().to_string());
    let policy = policy.replace("$VARVE_BEGUN", &begun.display().to_string());
    let let_go = format!("after = \"rm -f {}; ", held.display());
    story.policy(&policy.replace("after = \"", &let_go))?;
    story.write("work-before-a-stop")?;
    let since = Instant::now();
    while !held.exists() {
        if since.elapsed() > Duration::from_secs(30) {
            return Err(format!("no command was run: {}", varve.messages()));
        }
        pause(50);
    }
    let process = sh(&format!(
        "pgrep -o -f 'varved --root {}'",
        varve.root().display()
    ))?;
    let since = Instant::now();
    sh(&format!("kill -TERM {}", process.trim()))?;
    while sh(&format!("kill -0 {} 2>/dev/null", process.trim())).is_ok() {
        if since.elapsed() > Duration::from_secs(40) {
            return Err("a daemon that is stopped waits for a command".to_owned());
        }
        pause(50);
    }
    if held.exists() {
        return Err("what the first command holds stays held without the daemon".to_owned());
    }
    story.policy("")?;
    varve.varve(&["up"])?;
    varve.wait_protected()
}

/// What the first command holds, the second lets go, although the daemon that ran the one was killed while it was still about to take hold.
fn killed_between(story: &Story<'_>, policy: &str) -> Outcome {
    let (varve, held) = (story.varve, story.varve.root().join("held"));
    let (begun, let_go) = (varve.root().join("begun"), varve.root().join("let-go"));
    let named = |policy: &str, name: &str, path: &std::path::Path| {
        policy.replace(name, &path.display().to_string())
    };
    let policy = named(policy, "$VARVE_HELD", &held);
    let policy = named(&policy, "$VARVE_BEGUN", &begun);
    let policy = policy.replace(
        "after = \"",
        &format!(
            "after = \"mv {} {} 2>/dev/null; ",
            held.display(),
            let_go.display()
        ),
    );
    story.policy(&policy)?;
    pause(1500);
    story.write("last-work")?;
    let wait = |what: &str, path: &std::path::Path, seconds| {
        let since = Instant::now();
        while !path.exists() {
            if since.elapsed() > Duration::from_secs(seconds) {
                return Err(format!("{what}: {}", varve.messages()));
            }
            pause(50);
        }
        Ok(())
    };
    wait("no command was run", &begun, 20)?;
    restart_with(varve, || {
        // A policy that cannot be read for now puts it off, no more.
        story.policy("[points\n")
    })?;
    pause(1000);
    if let_go.exists() {
        return Err("a command was run that nobody could read".to_owned());
    }
    // No other point may do it.
    story.policy(&policy.replace("\"1s\"", "\"1h\""))?;
    wait("what was held stays held", &let_go, 30)
}

/// The machine has started since the daemon ran last; or only the daemon has.
fn booted(story: &Story<'_>) -> Outcome {
    let varve = story.varve;
    let booted = || {
        let mut points = story.points()?;
        points.retain(|point| point.name.starts_with("booted"));
        Ok::<usize, String>(points.len())
    };
    restart(varve)?;
    pause(1500);
    if booted()? != 0 {
        return Err("neither protecting nor a restart of the daemon is a boot".to_owned());
    }
    let boot = sh(&format!(
        "find {} -name boot",
        varve.root().join("var").display()
    ))?;
    std::fs::write(boot.trim(), "another").map_err(|e| format!("{boot}: {e}"))?;
    restart(varve)?;
    story.wait_for("booted", 1)?;
    pause(1500);
    match booted()? {
        1 => Ok(()),
        count => Err(format!("{count} points of one boot")),
    }
}
