//! What runs inside a guest (or on this machine, for the fallback): real devices, real file systems, real databases, the real programs.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// An installation under test.
pub struct Installation {
    root: PathBuf,
    bin: PathBuf,
}

/// Runs a command and gives its standard output; fails with all that it said.
pub fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .map_err(|e| format!("{program}: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        return Err(format!(
            "{program} {arguments:?}: {}\n{text}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    Ok(text)
}

/// Digest of a whole device or file, through direct reads of the given path.
pub fn digest(path: &str) -> Result<String, String> {
    run(
        "sh",
        &[
            "-c",
            &format!("dd if={path} bs=1M iflag=direct status=none | sha256sum"),
        ],
    )
}

impl Installation {
    /// An installation whose lasting files lie in `root`, and whose run directory is in memory.
    pub fn new(root: &Path) -> Result<Installation, String> {
        let run_directory = root.join("run");
        std::fs::create_dir_all(&run_directory).map_err(|e| e.to_string())?;
        if !run(
            "findmnt",
            &["-n", "--mountpoint", &run_directory.display().to_string()],
        )
        .is_ok_and(|text| text.contains("tmpfs"))
        {
            run(
                "mount",
                &[
                    "-t",
                    "tmpfs",
                    "varve-run",
                    &run_directory.display().to_string(),
                ],
            )?;
        }
        let bin = std::env::var("VARVE_BIN")
            .map_err(|_| "VARVE_BIN must name the directory of the programs")?;
        Ok(Installation {
            root: root.to_path_buf(),
            bin: PathBuf::from(bin),
        })
    }

    /// Everything of it lies here.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// One of the programs.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }

    /// Runs `varve`.
    pub fn varve(&self, arguments: &[&str]) -> Result<String, String> {
        let root = self.root.display().to_string();
        let mut all = vec!["--root", root.as_str()];
        all.extend_from_slice(arguments);
        run(&self.bin.join("varve").display().to_string(), &all)
    }

    /// The mapped device.
    pub fn device(&self, name: &str) -> Result<String, String> {
        let link = self.root.join("run/varve/dev").join(name);
        std::fs::canonicalize(&link)
            .map(|path| path.display().to_string())
            .map_err(|e| format!("{}: {e}", link.display()))
    }

    /// The daemons' messages.
    pub fn messages(&self) -> String {
        ["blkfilter.log", "varved.log"]
            .iter()
            .filter_map(|name| std::fs::read_to_string(self.root.join("run/varve").join(name)).ok())
            .collect()
    }

    /// Starts blkfilter as a child, so that it can be killed.
    pub fn filter(&self) -> Result<Child, String> {
        self.filter_from(&self.bin.join("blkfilter"))
    }

    /// Another file of the same program, as an upgrade brings it.
    pub fn copy_of_filter(&self, number: u32) -> Result<PathBuf, String> {
        let copy = std::env::temp_dir().join(format!("blkfilter-{number}"));
        std::fs::copy(self.bin.join("blkfilter"), &copy).map_err(|e| e.to_string())?;
        Ok(copy)
    }

    /// Starts a given blkfilter.
    pub fn filter_from(&self, program: &Path) -> Result<Child, String> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.root.join("run/varve/blkfilter.log"))
            .map_err(|e| e.to_string())?;
        Command::new(program)
            .arg("--root")
            .arg(&self.root)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|e| e.to_string())
    }

    /// Waits until every volume is protected.
    pub fn wait_protected(&self) -> Result<(), String> {
        self.varve(&["status", "--wait", "120"])
            .map(|_| ())
            .map_err(|e| format!("{e}\n{}", self.messages()))
    }

    /// The end's promise: nothing differs.
    pub fn compare(&self) -> Result<(), String> {
        self.varve(&["compare"])
            .map(|_| ())
            .map_err(|e| format!("{e}\n{}", self.messages()))
    }
}

/// Makes a file system; small enough for the guest.
pub fn make_file_system(kind: &str, device: &str) -> Result<(), String> {
    let force = if kind == "ext4" { "-F" } else { "-f" };
    run(&format!("mkfs.{kind}"), &["-q", force, device]).map(|_| ())
}

/// The file system's own checker. The journal has been replayed by a mount before.
pub fn check_file_system(kind: &str, device: &str) -> Result<(), String> {
    match kind {
        "ext4" => run("fsck.ext4", &["-fn", device]),
        "xfs" => run("xfs_repair", &["-n", device]),
        _ => run("btrfs", &["check", "--force", device]),
    }
    .map(|_| ())
}

/// A background fio with verification; returns its child and the file of its report.
pub fn start_fio(
    directory: &str,
    depth: u32,
    megabytes: u32,
    seconds: u32,
) -> Result<Child, String> {
    Command::new("fio")
        .args([
            "--name=load",
            "--rw=randwrite",
            "--bs=4k",
            "--ioengine=libaio",
            "--direct=1",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
        ])
        .args([
            "--minimal",
            "--fallocate=none",
            "--verify_state_save=0",
            "--time_based=0",
            "--loops=100000",
        ])
        .arg(format!("--directory={directory}"))
        .arg(format!("--iodepth={depth}"))
        .arg(format!("--size={megabytes}m"))
        .arg(format!("--runtime={seconds}"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("fio: {e}"))
}

/// Waits for fio; any I/O error or mismatch is an error here.
pub fn finish_fio(child: Child) -> Result<String, String> {
    let output = child.wait_with_output().map_err(|e| e.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        Ok(text)
    } else {
        Err(format!(
            "fio: {}\n{text}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        ))
    }
}

/// Says something with the time since the start.
pub fn say(start: Instant, text: &str) {
    println!("[{:6.2}] {text}", start.elapsed().as_secs_f64());
    let _ = std::io::stdout().flush();
}

/// Sleeps.
pub fn pause(milliseconds: u64) {
    std::thread::sleep(Duration::from_millis(milliseconds));
}
