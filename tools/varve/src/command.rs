//! The user's command, run in an image that is mounted: what it finds there is its exit code.

use crate::image::HeldImage;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use varve_control::ControlError;

/// What it found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Exit code 0.
    Good,
    /// Exit codes 1 to 124, and 128 to 255.
    Bad,
    /// Exit code 125: this instant says nothing.
    Skip,
}

/// A command that ends with us, and all that it starts with it.
fn contained(command: &[&str]) -> Command {
    let mut contained = Command::new("setpriv");
    contained
        .args(["--pdeathsig", "KILL", "--"])
        .args(["unshare", "--pid", "--fork", "--kill-child", "--"])
        .args(command);
    contained
}

/// Runs it through the shell (what it leaves running ends with it), with the image's directory as working directory. What it prints goes to standard error: standard output is ours.
pub fn run(command: &str, image: &HeldImage, directory: &Path) -> Result<Verdict, ControlError> {
    let failed = |why: String| {
        ControlError::new(
            "X012-command",
            format!(
                "the command could not be run at {} ({why}): {command}. Exit code 0 means good, 1 to 124 bad, 125 cannot tell",
                image.instant()
            ),
        )
    };
    // In a PID namespace: what it leaves running would hold the image.
    static HAS_NAMESPACES: OnceLock<bool> = OnceLock::new();
    let has_namespaces = HAS_NAMESPACES.get_or_init(|| {
        let tried = contained(&["true"]).output();
        tried.is_ok_and(|tried| tried.status.success())
    });
    if !has_namespaces {
        return Err(failed("this machine gives it no PID namespace".to_owned()));
    }
    let status = contained(&["sh", "-c", command])
        .current_dir(directory)
        .env("VARVE_IMAGE", directory)
        .env("VARVE_DEVICE", &image.device)
        .env("VARVE_LSN", image.lsn.to_string())
        .env("VARVE_TIME_NS", image.time_ns.to_string())
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .status()
        .map_err(|error| failed(error.to_string()))?;
    match (status.code(), status.signal()) {
        (Some(0), _) => Ok(Verdict::Good),
        (Some(125), _) => Ok(Verdict::Skip),
        (Some(code @ (126 | 127)), _) => Err(failed(format!("exit code {code}"))),
        (Some(_), _) => Ok(Verdict::Bad),
        (None, signal) => Err(failed(format!("signal {}", signal.unwrap_or_default()))),
    }
}
