//! Guests: real kernels that run a command as root on this machine's files, and power cuts of them.
//!
//! `VARVE_TEST_KERNELS` names them, separated by colons: a User Mode Linux kernel (`tests/vm/build-kernel` makes one), or a directory, in which
//! `tests/vm/run-qemu` keeps the distribution's own kernel. Without it tests say so loudly and do nothing; with CI=true that is a failure.
//! `VARVE_TEST_SIZE=large` asks for the large numbers (`make vm`).

use crate::leftover::Connections;
use std::io::{BufRead, BufReader, Lines, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::Duration;

/// The smallest disk that every file system accepts (XFS: 300 MiB).
pub const ORIGIN_MIB: u64 = 320;
const KERNELS: &str = "VARVE_TEST_KERNELS";
/// The runner's exit status for a guest that died without one.
pub const DIED: i32 = 125;

/// The repository.
#[must_use]
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

/// The directory of the programs: that of the running test's parent.
#[must_use]
pub fn programs() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().parent().unwrap().to_path_buf()
}

/// Path of the `scenario` program.
#[must_use]
pub fn scenario_program() -> String {
    programs().join("scenario").display().to_string()
}

/// Whether the large numbers are asked for.
#[must_use]
pub fn large() -> bool {
    std::env::var("VARVE_TEST_SIZE").is_ok_and(|size| size == "large")
}

/// The small or the large number.
#[must_use]
pub fn sized(small: u32, large_number: u32) -> u32 {
    if large() { large_number } else { small }
}

/// A kernel that runs guests.
#[derive(Clone, Debug)]
pub enum Kernel {
    /// A User Mode Linux kernel.
    Uml(PathBuf),
    /// The distribution's kernel in QEMU, without acceleration; the directory keeps it.
    Qemu(PathBuf),
}

/// Makes each test twice: `uml::NAME` and `stock::NAME`, over the kernels of that kind. They run beside each other, one of each kind at a time.
#[macro_export]
macro_rules! in_guests {
    ($($(#[$attribute:meta])* $name:ident: $story:expr;)+) => {
        mod uml {
            #[allow(unused_imports, reason = "what the stories need differs")]
            use super::*;
            $($(#[$attribute])* #[test] fn $name() { $crate::guest::uml_kernels().iter().for_each($story); })+
        }
        mod stock {
            #[allow(unused_imports, reason = "what the stories need differs")]
            use super::*;
            $($(#[$attribute])* #[test] fn $name() { $crate::guest::stock_kernels().iter().for_each($story); })+
        }
    };
}

/// User Mode Linux kernels that can run here; with the small numbers the newest (by the order in which they are named), because a distribution's older
/// one stands beside it.
#[must_use]
pub fn uml_kernels() -> Vec<Kernel> {
    let mut found = kernels(|kernel| !kernel.is_emulated());
    if !large() {
        found.drain(..found.len().saturating_sub(1));
    }
    found
}

/// The distribution's kernels, emulated.
#[must_use]
pub fn stock_kernels() -> Vec<Kernel> {
    kernels(Kernel::is_emulated)
}

/// The kernels that can run here. One that is named and cannot boot is a failure, but for one known reason.
fn kernels(wanted: impl Fn(&Kernel) -> bool) -> Vec<Kernel> {
    let Ok(named) = std::env::var(KERNELS) else {
        assert!(
            std::env::var("CI").is_err(),
            "{KERNELS} is not set: in CI a missing test kernel is a failure"
        );
        println!(
            "SKIPPED: {KERNELS} is not set; no real ublk was tested (tests/vm/build-kernel makes a kernel)"
        );
        return Vec::new();
    };
    let found: Vec<Kernel> = named
        .split(':')
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
        .map(|path| {
            assert!(path.exists(), "{} does not exist", path.display());
            if path.is_dir() {
                Kernel::Qemu(path)
            } else {
                Kernel::Uml(path)
            }
        })
        .filter(wanted)
        .filter(Kernel::boots)
        .collect();
    if found.is_empty() {
        assert!(
            std::env::var("CI").is_err(),
            "{KERNELS} names no kernel of this kind that runs here: in CI that is a failure"
        );
        println!("SKIPPED: {KERNELS} names no kernel of this kind that runs here");
    }
    found
}

impl Kernel {
    /// Its name in messages.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Kernel::Uml(path) | Kernel::Qemu(path) => path.display().to_string(),
        }
    }

    /// Whether it is emulated, and slow.
    #[must_use]
    pub fn is_emulated(&self) -> bool {
        matches!(self, Kernel::Qemu(_))
    }

    fn boots(&self) -> bool {
        let Kernel::Uml(path) = self else {
            return true; // Whether it does, the test itself shows; it takes seconds.
        };
        if (0..2).any(|_| self.run(&[], &[], 60, "true").status.success()) {
            return true;
        }
        // User Mode Linux without seccomp mode reserves too little space for the registers of CPUs with AMX: init dies at once.
        let amx = std::fs::read_to_string("/proc/cpuinfo")
            .unwrap_or_default()
            .contains("amx_tile");
        let help = Command::new(path).arg("--help").output().unwrap();
        let seccomp = String::from_utf8_lossy(&help.stdout).contains("seccomp=");
        assert!(amx && !seccomp, "{} does not boot", path.display());
        println!(
            "SKIPPED: {} cannot run on this CPU (AMX registers, and no seccomp mode in this kernel)",
            path.display()
        );
        false
    }

    fn runner(&self, disks: &[&Path], writable: &[&Path], seconds: u32, script: &str) -> Command {
        let (program, path) = match self {
            Kernel::Uml(path) => ("tests/vm/run", path),
            Kernel::Qemu(path) => ("tests/vm/run-qemu", path),
        };
        let seconds = if self.is_emulated() {
            seconds * sized(2, 4)
        } else {
            seconds
        };
        let mut runner = Command::new(repository().join(program));
        runner
            .arg(path)
            .args(["-m", "1536", "-t", &seconds.to_string()]);
        for disk in disks {
            runner.arg("-d").arg(disk);
        }
        for directory in writable {
            runner.arg("-w").arg(directory);
        }
        // The programs may lie where the guest has a fresh file system.
        runner.arg("-w").arg(programs());
        runner
            .env("VARVE_BIN", programs())
            .args(["--", "bash", "-c", script]);
        runner
    }

    /// Runs a shell script in a guest with these disks (/dev/ubda, /dev/ubdb, …) and writable directories.
    #[must_use]
    pub fn run(&self, disks: &[&Path], writable: &[&Path], seconds: u32, script: &str) -> Output {
        self.runner(disks, writable, seconds, script)
            .output()
            .unwrap()
    }

    /// Runs a script that must end well; gives what it said. A guest that dies without a status is infrastructure: tried once more, loudly, with
    /// what `prepare` makes anew.
    pub fn must(
        &self,
        what: &str,
        prepare: &mut dyn FnMut() -> Vec<PathBuf>,
        seconds: u32,
        script: &str,
    ) -> String {
        for attempt in 0.. {
            let disks = prepare();
            let disks: Vec<&Path> = disks.iter().map(PathBuf::as_path).collect();
            let output = self.run(&disks, &[], seconds, script);
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            println!("{} {what}:\n{text}", self.name());
            if output.status.code() == Some(DIED) && attempt == 0 {
                println!("INFRASTRUCTURE: the guest died without a status; once more");
                continue;
            }
            assert!(
                output.status.success(),
                "{what} under {}: {}\n{text}\n{}",
                self.name(),
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
            return text;
        }
        unreachable!("the loop ends by return or panic")
    }

    /// Starts a guest whose power will be cut.
    #[must_use]
    pub fn start(&self, disks: &[&Path], writable: &[&Path], script: &str) -> Doomed {
        let mut child = self
            .runner(disks, writable, 300, script)
            .process_group(0)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Doomed { child, lines }
    }
}

/// A guest that runs until its power is cut.
pub struct Doomed {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Doomed {
    /// Waits until it says `word`; gives all that it said before.
    pub fn wait_for(&mut self, word: &str) -> String {
        let mut said = String::new();
        let found = self.lines.by_ref().map_while(Result::ok).any(|line| {
            said += &line;
            said.push('\n');
            line.contains(word)
        });
        assert!(found, "it never said {word}:\n{said}");
        said
    }

    /// Cuts the power: the guest and all its processes are gone; what its disks had completed stays in their files.
    pub fn cut(mut self) {
        assert!(
            self.child.try_wait().unwrap().is_none(),
            "the guest ended before the cut: nothing was interrupted"
        );
        let group = format!("-{}", self.child.id());
        assert!(
            Command::new("kill")
                .args(["-KILL", "--", &group])
                .status()
                .unwrap()
                .success()
        );
        let _ = self.child.wait();
    }
}

/// A sparse file as a disk.
#[must_use]
pub fn disk(directory: &Path, name: &str, megabytes: u64) -> PathBuf {
    let path = directory.join(name);
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(megabytes << 20).unwrap();
    path
}

/// Runs a scenario through FUSE and loop on this machine's own kernel.
pub fn fallback(arguments: &[&str]) {
    if !Path::new("/dev/fuse").exists() || !Path::new("/dev/loop-control").exists() {
        assert!(
            std::env::var("CI").is_err(),
            "in CI a missing /dev/fuse is a failure"
        );
        println!("SKIPPED: no /dev/fuse or /dev/loop-control here");
        return;
    }
    let mut connections = Connections::new(programs().join("tmp-connections"));
    let directory = tempfile::tempdir().unwrap();
    let origin = disk(directory.path(), "origin", ORIGIN_MIB);
    let root = directory.path().join("root");
    std::fs::create_dir_all(&root).unwrap();
    // A mount namespace of its own: the tests' mounts end with it.
    let mut child = Command::new("unshare")
        .args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            "mount -t tmpfs none /mnt && exec \"$@\"",
            "sh",
        ])
        .arg(scenario_program())
        .arg(arguments[0])
        .arg(&root)
        .arg(&origin)
        .args(&arguments[1..])
        .env("VARVE_BIN", programs())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = stdout.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });
    let status = loop {
        connections.look(child.id());
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    let _ = Command::new(programs().join("varve"))
        .arg("--root")
        .arg(&root)
        .arg("down")
        .output();
    connections.end();
    let text = reader.join().unwrap();
    println!("fallback {arguments:?}:\n{text}");
    assert!(status.success(), "fallback {arguments:?}: {status}\n{text}");
}
