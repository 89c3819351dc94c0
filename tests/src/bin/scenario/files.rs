//! Files of the past on a live volume: found, listed, told apart, got back with all that belongs to them; the moment found at which one broke.

use crate::copies::{expect_refused, fields, sh};
use crate::{Outcome, export, protect};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use varve_tests::scenario::{Installation, make_file_system, pause, say};

/// Everything that `cp` can keep or lose.
const TREE: &str = r#"
mkdir -p www/deep/deeper
head -c 300000 /dev/urandom >www/page
printf 'root only' >www/secret; chown 12:34 www/secret; chmod 4750 www/secret
ln www/page www/deep/same-page
ln -s ../page www/deep/to-page
ln -s /etc evil
mkfifo www/pipe
truncate -s 40M www/holes; printf end >>www/holes
touch -d '2001-02-03 04:05:06.789' www/page
python3 -c "import os; os.setxattr('www/secret', 'user.colour', b'red')"
mkdir 'www/with space'; printf x >'www/with space/line
break'
touch -h -d '2003-01-01 00:00:00' www/deep/to-page
touch -d '2002-01-01 00:00:00' www/deep www
"#;

/// What must be the same of a tree: names, kinds, owners, modes, times, links, blocks, attributes, content.
const DESCRIBE: &str = r#"
cd "$1" && find . -type d -printf '%P|%y|%u:%g|%m|%T@\n' -o -printf '%P|%y|%u:%g|%m|%T@|%n|%l|%s\n' | sort
find . -type f -exec sha256sum {} + | sort
python3 -c "
import os
for root, _, names in os.walk('.'):
    for name in sorted(names):
        path = os.path.join(root, name)
        print(path, [(n, os.getxattr(path, n, follow_symlinks=False)) for n in sorted(os.listxattr(path, follow_symlinks=False))])
" | sort
"#;

fn describe(path: &str) -> Result<String, String> {
    sh(&format!("set -- '{path}'; {DESCRIBE}"))
}

struct Story<'a> {
    varve: &'a Installation,
    place: String,
    out: PathBuf,
}

impl Story<'_> {
    fn inside(&self, script: &str) -> Result<String, String> {
        sh(&format!("set -e; cd {}; {script}\nsync", self.place))
    }

    fn mark(&self, name: &str) -> Outcome {
        self.varve.wait_protected()?;
        self.varve.varve(&["mark", name]).map(drop)
    }

    fn out(&self, name: &str) -> String {
        self.out.join(name).display().to_string()
    }

    /// Nothing of a command is left: no mount here, no image.
    fn is_tidy(&self) -> Outcome {
        let since = Instant::now();
        loop {
            let exports = self.varve.varve(&["exports"])?;
            let mounts = sh("cat /proc/self/mountinfo")?;
            if exports.is_empty() && !mounts.contains("/looking") {
                return Ok(());
            }
            if since.elapsed() > Duration::from_secs(15) {
                return Err(format!("left behind: {exports}\n{mounts}"));
            }
            pause(100);
        }
    }
}

/// The whole story.
pub fn files(varve: &Installation, device: &str, kind: &str) -> Outcome {
    let start = Instant::now();
    let mapped = protect(varve, device)?;
    varve.wait_protected()?;
    make_file_system(kind, &mapped)?;
    let place = varve.root().join("live");
    let out = varve.root().join("got");
    for directory in [&place, &out] {
        std::fs::create_dir_all(directory).map_err(|e| e.to_string())?;
    }
    let place = place.display().to_string();
    sh(&format!("mount {mapped} {place}"))?;
    let story = Story { varve, place, out };
    trees(&story)?;
    say(start, "trees come back as they were");
    versions(&story)?;
    say(start, "every version of a file was found");
    bisect(&story)?;
    say(start, "the record that broke it was found");
    drills(&story, kind)?;
    say(start, "a good instant was proven, a broken one was not");
    ended(&story)?;
    say(start, "a command that was killed leaves nothing");
    sh(&format!("umount {}", story.place))?;
    varve.compare()?;
    varve.varve(&["down"]).map(drop)
}

fn trees(story: &Story<'_>) -> Outcome {
    let varve = story.varve;
    let live = |name: &str| format!("{}/{name}", story.place);
    story.inside(TREE)?;
    let wanted = describe(&live("www"))?;
    let blocks = sh(&format!("stat -c %b {}", live("www/holes")))?;
    story.mark("whole")?;
    story.inside("rm -r www; mkdir www; echo other >www/page")?;
    // By the name that it has while the volume is mounted, and by the one within the volume.
    for path in [live("www"), "/www".to_owned()] {
        let listed = varve.varve(&["--json", "files", "list", &path, "--at", "whole", "-R"])?;
        let names = fields(&listed, "path").len();
        if names != 10 || !listed.contains("\"link\": \"../page\"") {
            return Err(format!("{path}: {names} names: {listed}"));
        }
    }
    let got = story.out("www");
    expect_refused(
        varve.varve(&["files", "get", &live("www"), "--at", "whole", "--to", &got]),
        "--all",
    )?;
    varve.varve(&[
        "files",
        "get",
        &live("www"),
        "--at",
        "whole",
        "--to",
        &got,
        "--all",
    ])?;
    let found = describe(&got)?;
    if found != wanted {
        let differs = wanted.lines().zip(found.lines()).find(|(a, b)| a != b);
        return Err(format!("the tree came back differently: {differs:?}"));
    }
    let found_blocks: u64 = sh(&format!("stat -c %b {got}/holes"))?
        .trim()
        .parse()
        .unwrap_or(u64::MAX);
    if found_blocks * 512 > 1 << 20 {
        return Err(format!(
            "the holes came back full: {found_blocks} blocks, there were {blocks}"
        ));
    }
    // Where attributes cannot be kept the rest is kept, and it is said (exit code 3).
    let poor = story.out("poor");
    sh(&format!("mkdir {poor} && mount -t ramfs none {poor}"))?;
    let tree = format!("{poor}/www");
    let partly = varve.varve(&[
        "files", "get", "/www", "--at", "whole", "--all", "--to", &tree,
    ]);
    let sums = |tree: &str| {
        sh(&format!(
            "cd {tree} && find . -type f -exec sha256sum {{}} + | sort"
        ))
    };
    let (whole, part) = (sums(&got), sums(&tree));
    sh(&format!("umount {poor} && rmdir {poor}"))?;
    expect_refused(partly, "X017-partly")?;
    if whole? != part? {
        return Err("what could be kept of the tree is not what it was".to_owned());
    }
    // A tree is not mixed into another; a file is not overwritten unasked.
    expect_refused(
        varve.varve(&[
            "files",
            "get",
            "/www",
            "--at",
            "whole",
            "--to",
            &story.out("."),
            "--all",
        ]),
        "X011-target",
    )?;
    let page = story.out("page");
    std::fs::write(&page, "mine").map_err(|e| e.to_string())?;
    let get = ["files", "get", "/www/page", "--at", "whole", "--to", &page];
    expect_refused(varve.varve(&get), "X011-target")?;
    if std::fs::read(&page).ok().as_deref() != Some(b"mine") {
        return Err("what was there was touched".to_owned());
    }
    varve.varve(&[&get[..], &["--overwrite"]].concat())?;
    sh(&format!("cmp {page} {got}/page"))?;
    // A link in an image leads nowhere out of it.
    expect_refused(
        varve.varve(&[
            "files",
            "get",
            "/evil/passwd",
            "--at",
            "whole",
            "--to",
            &story.out("stolen"),
        ]),
        "X003-unknown",
    )?;
    expect_refused(
        varve.varve(&["files", "list", "/../../etc/passwd", "--at", "whole"]),
        "X003-unknown",
    )?;
    varve.varve(&[
        "files",
        "get",
        "/evil",
        "--at",
        "whole",
        "--to",
        &story.out("link"),
    ])?;
    let link = std::fs::read_link(story.out("link")).map_err(|e| e.to_string())?;
    if link.as_os_str() != "/etc" {
        return Err(format!("the link became one to {}", link.display()));
    }
    expect_refused(
        varve.varve(&["files", "get", "/nothing", "--at", "whole"]),
        "X003-unknown",
    )?;
    expect_refused(
        varve.varve(&[
            "files",
            "get",
            "/www/deep/..",
            "--at",
            "whole",
            "--all",
            "--to",
            &story.out("up"),
        ]),
        "X011-target",
    )?;
    // A name that is no text does not spoil the others.
    story.inside("touch \"$(printf 'latin\\351')\"")?;
    let listed = varve.varve(&["--json", "files", "list", "/", "--at", "now"])?;
    if !listed.contains("latin") || !listed.trim_end().ends_with('}') {
        return Err(format!("a name that is no text: {listed}"));
    }
    let left = sh(&format!("ls -A {}", story.out.display()))?;
    if left.contains(".varve-") {
        return Err(format!("parts were left: {left}"));
    }
    story.is_tidy()
}

fn versions(story: &Story<'_>) -> Outcome {
    let varve = story.varve;
    story.mark("before-versions")?;
    for version in 1..=4 {
        story.inside(&format!("printf '%0{}d' 0 >log", version * 1000))?;
        pause(1300);
        story.inside(&format!("echo {version} >noise-{version}"))?;
        pause(200);
    }
    story.inside("rm log")?;
    pause(1300);
    story.inside("echo x >noise")?;
    let found = varve.varve(&[
        "--json",
        "files",
        "versions",
        "/log",
        "--since",
        "before-versions",
        "--step",
        "0.2",
    ])?;
    let sizes: Vec<String> = fields(&found, "bytes");
    // The newest first; that a new file is empty for a moment may be seen, too.
    let told: Vec<&str> = sizes
        .iter()
        .map(String::as_str)
        .filter(|size| *size != "0")
        .collect();
    if told != ["4000", "3000", "2000", "1000"] {
        return Err(format!("versions of {told:?} bytes: {found}"));
    }
    // Each can be got back by the instant that is named with it.
    let lsn = fields(&found, "last_lsn");
    let newest = lsn.get(1).cloned().unwrap_or_default();
    let to = story.out("log");
    varve.varve(&[
        "files",
        "get",
        "/log",
        "--at",
        &format!("lsn:{newest}"),
        "--to",
        &to,
    ])?;
    if std::fs::metadata(&to).map_err(|e| e.to_string())?.len() != 4000 {
        return Err(format!(
            "lsn:{newest} does not hold the version that is said to be there: {found}"
        ));
    }
    expect_refused(
        varve.varve(&["files", "versions", "/never", "--since", "before-versions"]),
        "X003-unknown",
    )?;
    story.is_tidy()
}

fn bisect(story: &Story<'_>) -> Outcome {
    let varve = story.varve;
    story.inside("echo fine >state")?;
    story.mark("was-good")?;
    for step in 0..40 {
        if step == 23 {
            story.inside("echo broken >state")?;
        }
        story.inside(&format!("echo {step} >counter"))?;
    }
    story.mark("is-bad")?;
    let command = "grep -q fine state";
    let found = varve.varve(&[
        "--json", "bisect", "--good", "was-good", "--bad", "is-bad", "--exec", command,
    ])?;
    let lsns: Vec<u64> = fields(&found, "lsn")
        .iter()
        .filter_map(|lsn| lsn.parse().ok())
        .collect();
    let [good, bad] = lsns[..] else {
        return Err(found);
    };
    if bad != good + 1 {
        return Err(format!("not the single record: {found}"));
    }
    for (lsn, wanted) in [(good, "fine\n"), (bad, "broken\n")] {
        let to = story.out(&format!("state-{lsn}"));
        varve.varve(&[
            "files",
            "get",
            "/state",
            "--at",
            &format!("lsn:{lsn}"),
            "--to",
            &to,
        ])?;
        let is = std::fs::read_to_string(&to).map_err(|e| e.to_string())?;
        if is != wanted {
            return Err(format!("at lsn:{lsn} the state was {is:?}: {found}"));
        }
    }
    expect_refused(
        varve.varve(&["bisect", "--good", "is-bad", "--exec", command]),
        "X013-bisect",
    )?;
    expect_refused(
        varve.varve(&[
            "bisect",
            "--good",
            "was-good",
            "--bad",
            "is-bad",
            "--exec",
            "no-such-command",
        ]),
        "X012-command",
    )?;
    story.is_tidy()
}

/// What a drill finds is what the checker and the command find; the last proven instant stays known.
fn drills(story: &Story<'_>, kind: &str) -> Outcome {
    let varve = story.varve;
    let status = || varve.varve(&["status"]);
    if !status()?.contains("last proven NONE") {
        return Err(format!("proven without a drill: {}", status()?));
    }
    let good = varve.varve(&["--json", "drill", "--at", "was-good"])?;
    if !good.contains("\"checked\": true") || !good.contains("\"proven\": true") {
        return Err(good);
    }
    // The command may write, into the overlay.
    let write = "echo drill >drilled && grep -q fine state";
    varve.varve(&["drill", "--at", "was-good", "--exec", write])?;
    expect_refused(
        varve.varve(&["drill", "--at", "is-bad", "--exec", write]),
        "command BAD",
    )?;
    let now = status()?;
    if !now.contains("last proven 2") || !now.contains("NOT PROVEN") {
        return Err(format!("status does not tell what the drills found: {now}"));
    }
    // A process that it leaves running holds nothing up.
    let left = "(exec setsid sleep 300) >/dev/null 2>&1 & grep -q fine state";
    varve.varve(&["drill", "--at", "was-good", "--exec", left])?;
    if story.inside("ls")?.contains("drilled") {
        return Err("the drill wrote to the device".to_owned());
    }
    // A file system that is broken where only its checker looks. (The live one is whole again before anything reads it.)
    if kind == "ext4" {
        story.inside("fsfreeze -f . && fsfreeze -u .")?;
        let mapped = varve.device("disk")?;
        // The bitmap of a group of blocks says that all of it is in use.
        let said = |what: &str| {
            let found = sh(&format!(
                "dumpe2fs {mapped} 2>/dev/null | sed -n 's/^{what} *\\([0-9]*\\).*/\\1/p' | tail -n 1"
            ))?;
            Ok::<String, String>(found.trim().to_owned())
        };
        let (size, block, keep) = (
            said("Block size:")?,
            said("  Block bitmap at")?,
            story.out("bitmap"),
        );
        let write = format!(
            "dd of={mapped} bs={size} count=1 seek={block} oflag=direct status=none iflag=fullblock"
        );
        sh(&format!(
            "dd if={mapped} of={keep} bs={size} count=1 skip={block} iflag=direct status=none && head -c {size} /dev/zero | tr '\\0' '\\377' | {write}"
        ))?;
        story.mark("broken")?;
        sh(&format!("{write} if={keep}"))?;
        expect_refused(varve.varve(&["drill", "--at", "broken"]), "checker BAD")?;
    }
    story.is_tidy()
}

/// SIGKILL while an image is mounted for a command.
fn ended(story: &Story<'_>) -> Outcome {
    let varve = story.varve;
    let flag = story.out("looking");
    let mut asking = Command::new(varve.program("varve"))
        .arg("--root")
        .arg(varve.root())
        .args(["bisect", "--good", "was-good", "--exec"])
        .arg(format!("touch {flag}; exec sleep 3"))
        .stdout(Stdio::null())
        .spawn()
        .map_err(|e| e.to_string())?;
    let since = Instant::now();
    while !std::path::Path::new(&flag).exists() {
        if since.elapsed() > Duration::from_secs(30) {
            return Err("the command was not run".to_owned());
        }
        pause(10);
    }
    let shown = varve.varve(&["exports"])?;
    let _ = asking.kill();
    let _ = asking.wait();
    if shown.is_empty() {
        return Err("no image was shown while it was looked into".to_owned());
    }
    story.is_tidy()
}

/// Whether a range is more than an edge of another.
fn is_inside(place: &std::ops::Range<u64>, offset: u64, length: u64) -> bool {
    place.end.min(offset + length) > place.start.max(offset)
}

/// Metadata contexts, asked for by programs that are not ours.
fn over_nbd(varve: &Installation, raw: &str, data_at: u64) -> Outcome {
    if sh("nbdinfo --version").is_err() || sh("nbdcopy --version").is_err() {
        println!("SKIPPED: there is no nbdinfo or nbdcopy: metadata contexts were not tested");
        return Ok(());
    }
    let place = varve.root().join("out");
    let file = |name: &str| place.join(name).display().to_string();
    let (socket, precious) = (file("nbd.sock"), file("precious"));
    std::fs::write(&precious, "mine").map_err(|e| e.to_string())?;
    let taken = varve.varve(&["export", "then", "--nbd", &precious]);
    if taken.is_ok() || std::fs::read(&precious).ok().as_deref() != Some(b"mine") {
        return Err("a file was taken for a socket".to_owned());
    }
    varve.varve(&["export", "now", "--nbd", &socket, "--since", "then"])?;
    let uri = format!("nbd+unix:///?socket={socket}");
    let map = |context: &str| -> Result<Vec<(u64, u64, u64)>, String> {
        let told = sh(&format!("nbdinfo --map={context} '{uri}'"))?;
        let line = |line: &str| {
            let mut words = line.split_whitespace().map(|word| word.parse().ok());
            Some((words.next()??, words.next()??, words.next()??))
        };
        told.lines()
            .map(|text| line(text).ok_or_else(|| format!("not understood: {told}")))
            .collect()
    };
    // At first 60 MiB at 7 MiB, then 90 MiB at the beginning.
    let bytes: u64 = sh(&format!("nbdinfo --size '{uri}'"))?
        .trim()
        .parse()
        .map_err(|_| "no size")?;
    // In order, without holes; all of `place` in one state, and most of the rest in another. (A disk that is slow for a moment has more copied than was written.)
    let tells = |context: &str, place: std::ops::Range<u64>, state: u64, rest: u64| -> Outcome {
        let told = map(context)?;
        let (mut at, mut others) = (0, 0);
        for (offset, length, is) in &told {
            let meets = *offset < place.end && offset + length > place.start;
            if *offset != at || meets && *is != state && is_inside(&place, *offset, *length) {
                return Err(format!("{context}: {told:?}"));
            }
            at = offset + length;
            others += if *is == rest { *length } else { 0 };
        }
        match at == bytes && others > (bytes - (place.end - place.start)) / 2 {
            true => Ok(()),
            false => Err(format!("{context}: {told:?}")),
        }
    };
    let written = 90 << 20;
    tells("base:allocation", 0..written, 0, 3)?;
    tells("qemu:dirty-bitmap:varve", 0..written, 1, 0)?;
    varve.varve(&["unexport", &socket])?;
    varve.varve(&["export", "then", "--nbd", &socket])?;
    let end = data_at + (60 << 20);
    tells("base:allocation", data_at..end, 0, 3)?;
    sh(&format!(
        "nbdcopy '{uri}' {0} && cmp {0} {raw}",
        file("by-nbdcopy")
    ))?;
    if sh("qemu-img --version").is_ok() {
        sh(&format!("qemu-img compare -f raw -F raw '{uri}' {raw}"))?;
    }
    varve.varve(&["unexport", &socket]).map(drop)
}

/// `varve export --to`: a file, a device, qcow2, standard output; interrupted and gone on with.
pub fn export_to(varve: &Installation, device: &str) -> Outcome {
    let start = Instant::now();
    let mapped = protect(varve, device)?;
    varve.wait_protected()?;
    let place = varve.root().join("out");
    std::fs::create_dir_all(&place).map_err(|e| e.to_string())?;
    let file = |name: &str| place.join(name).display().to_string();
    sh(&format!("blkdiscard -z -f {mapped}"))?;
    sh(&format!(
        "head -c 60M /dev/urandom | dd of={mapped} bs=1M seek=7 oflag=direct status=none iflag=fullblock"
    ))?;
    varve.varve(&["mark", "then"])?;
    sh(&format!(
        "head -c 90M /dev/urandom | dd of={mapped} bs=1M oflag=direct status=none iflag=fullblock"
    ))?;
    let image = export(varve, "then", false)?;
    let same = |path: &str| {
        sh(&format!(
            "cmp -n $(blockdev --getsize64 {image}) {image} {path}"
        ))
        .map(drop)
    };
    let raw = file("raw");
    varve.varve(&["export", "then", "--to", &raw])?;
    same(&raw)?;
    let blocks: u64 = sh(&format!("stat -c %b {raw}"))?
        .trim()
        .parse()
        .unwrap_or(u64::MAX);
    if blocks * 512 > 64 << 20 {
        return Err(format!("zeroes were written out: {blocks} blocks"));
    }
    expect_refused(
        varve.varve(&["export", "then", "--to", &raw]),
        "H018-target",
    )?;
    expect_refused(
        varve.varve(&["export", "then", "--to", device]),
        "V037-same",
    )?;
    expect_refused(
        varve.varve(&["export", "then", "--to", &mapped]),
        "V037-same",
    )?;
    let own = varve.root().join("var/lib/varve");
    for path in ["log/disk.log", "store/new"] {
        let path = own.join(path).display().to_string();
        let refused = varve.varve(&["export", "then", "--to", &path, "--overwrite"]);
        expect_refused(refused, "V037-same")?;
    }
    let streamed = sh(&format!(
        "{} --root {} export then --to - | cmp - {raw}",
        varve.program("varve").display(),
        varve.root().display()
    ))?;
    if !streamed.is_empty() {
        return Err(streamed);
    }
    say(start, "a file and standard output are the instant");
    // A device that is larger than the volume.
    let disk = file("disk");
    sh(&format!("truncate -s 1G {disk}"))?;
    let looped = sh(&format!("losetup -f --show {disk}"))?.trim().to_owned();
    let outcome = varve
        .varve(&["export", "then", "--to", &looped])
        .and_then(|_| same(&looped))
        .and_then(|()| {
            expect_refused(
                varve.varve(&["export", "then", "--to", &looped]),
                "H018-target",
            )
        });
    sh(&format!("losetup -d {looped}"))?;
    outcome?;
    if sh("qemu-img --version").is_ok() {
        varve.varve(&["export", "then", "--to", &file("image.qcow2")])?;
        sh(&format!("qemu-img compare {} {raw}", file("image.qcow2")))?;
    } else {
        println!("SKIPPED: there is no qemu-img: qcow2 was not tested");
    }
    over_nbd(varve, &raw, 7 << 20)?;
    say(
        start,
        "an NBD client learns what lies where, and what was written",
    );
    let mut interrupted = 0;
    for round in 0..6 {
        let to = file(&format!("killed-{round}"));
        let progress = PathBuf::from(format!("{to}.varve-progress"));
        let mut asking = Command::new(varve.program("varve"))
            .arg("--root")
            .arg(varve.root())
            .args(["--quiet", "export", "then", "--to", &to])
            .spawn()
            .map_err(|e| e.to_string())?;
        let since = Instant::now();
        while !progress.exists() && since.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(1));
        }
        pause(round * 10);
        let _ = asking.kill();
        let _ = asking.wait();
        if progress.exists() {
            interrupted += 1;
            expect_refused(varve.varve(&["export", "now", "--to", &to]), "H018-target")?;
            varve.varve(&["export", "then", "--to", &to])?;
            same(&to)?;
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
    varve.varve(&["unexport", &image])?;
    let since = Instant::now();
    while !varve.varve(&["exports"])?.is_empty() {
        if since.elapsed() > Duration::from_secs(15) {
            return Err("a command that was killed left its image".to_owned());
        }
        pause(100);
    }
    let _ = std::fs::remove_dir_all(&place);
    varve.varve(&["down"]).map(drop)
}
