//! Commands of the user's that the daemon runs.

use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use varve_control::signals;

const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Who may write the file may run commands as root: that must be root alone.
pub(crate) fn refuse_others(path: &Path) -> Result<(), String> {
    let metadata = std::fs::metadata(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let own = nix::unistd::geteuid().as_raw();
    if metadata.uid() == own && metadata.mode() & 0o022 == 0 {
        return Ok(());
    }
    Err(format!(
        "not run: {} can be written by others than root (chmod go-w, chown root)",
        path.display()
    ))
}

/// Runs a command through the shell; when its time is over, or `is_over` says so, it is killed, with all that it started. `begun` hears of the process.
pub(crate) fn run(
    command: &str,
    variables: &[(&str, &str)],
    limit: Duration,
    is_over: &dyn Fn() -> bool,
    begun: impl FnOnce(&Running),
) -> Result<(), String> {
    let mut shell = Command::new("sh");
    shell
        .args(["-c", command])
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .process_group(0);
    let child = signals::spawn(&mut shell);
    let mut child = child.map_err(|error| format!("sh: {error}"))?;
    let running = Running::of(child.id());
    if let Some(running) = &running {
        begun(running);
    }
    match wait(&mut child, limit, is_over) {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(format!("`{command}`: {status}")),
        None => {
            kill_all(child.id());
            let _ = child.wait();
            Err(match is_over() {
                true => format!("`{command}` was ended: varved ends"),
                false => format!(
                    "`{command}` was ended: it took more than {} s",
                    limit.as_secs()
                ),
            })
        }
    }
}

fn kill_all(group: u32) {
    let group = nix::unistd::Pid::from_raw(group.cast_signed());
    let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
}

/// A command that runs, so that another daemon knows it again: process numbers are used again, together with the time of the start they are not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Running {
    process: u32,
    /// Ticks since the machine started.
    since: u64,
}

impl Running {
    fn of(process: u32) -> Option<Running> {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        // Behind the name, which may hold anything: the state is field 3, the start field 22.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?;
        let since = fields.nth(18)?.parse().ok()?;
        (state != "Z").then_some(Running { process, since })
    }

    pub(crate) fn line(&self) -> String {
        format!("{} {}", self.process, self.since)
    }

    pub(crate) fn parse(line: &str) -> Option<Running> {
        let (process, since) = line.split_once(' ')?;
        Some(Running {
            process: process.parse().ok()?,
            since: since.parse().ok()?,
        })
    }

    /// Waits for its end; when its time is over it is killed, with all that it started.
    pub(crate) fn end(&self, limit: Duration) {
        let since = Instant::now();
        while Running::of(self.process).as_ref() == Some(self) {
            if since.elapsed() >= limit {
                return kill_all(self.process);
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

fn wait(child: &mut Child, limit: Duration, is_over: &dyn Fn() -> bool) -> Option<ExitStatus> {
    let since = Instant::now();
    while since.elapsed() < limit && !is_over() {
        match child.try_wait() {
            Ok(None) => std::thread::sleep(LOOK_EVERY),
            Ok(Some(status)) => return Some(status),
            Err(_) => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::{Running, refuse_others};
    use std::os::unix::fs::PermissionsExt;
    use std::time::{Duration, Instant};

    fn run(command: &str, variables: &[(&str, &str)], limit: Duration) -> Result<(), String> {
        super::run(command, variables, limit, &|| false, |_| ())
    }

    #[test]
    fn one_that_outlives_its_daemon_is_known_again() {
        let limit = Duration::from_secs(20);
        let mut noted = None;
        let whole = super::run("sleep 3", &[], limit, &|| false, |running| {
            noted = Running::parse(&running.line());
            // Still there: it is waited for.
            let begun = Instant::now();
            running.end(Duration::from_secs(10));
            assert!(begun.elapsed() > Duration::from_secs(1));
        });
        assert!(whole.is_ok());
        let noted = noted.unwrap();
        let begun = Instant::now();
        // Gone; and a process that has its number is another one.
        noted.end(limit);
        let other = Running {
            process: std::process::id(),
            since: 0,
        };
        other.end(limit);
        assert!(begun.elapsed() < Duration::from_secs(5));
        // One that does not end is ended.
        let begun = Instant::now();
        let outcome = super::run("sleep 30", &[], limit, &|| false, |running| {
            running.end(Duration::from_millis(200));
        });
        assert!(outcome.is_err() && begun.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_command_tells_by_its_exit_code_and_ends_with_its_time() {
        let limit = Duration::from_secs(20);
        assert!(run("test $WHAT = that", &[("WHAT", "that")], limit).is_ok());
        assert!(run("exit 3", &[], limit).unwrap_err().contains("3"));
        let flag = std::env::temp_dir().join(format!("varve-hook-{}", std::process::id()));
        let begun = Instant::now();
        let command = format!("(sleep 6; touch {}) & sleep 30", flag.display());
        let why = run(&command, &[], Duration::from_millis(300)).unwrap_err();
        assert!(why.contains("was ended"), "{why}");
        assert!(begun.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(6300));
        assert!(!flag.exists(), "what it had started went on");
    }

    #[test]
    fn a_file_that_others_write_says_nothing() {
        let path = std::env::temp_dir().join(format!("varve-hook-file-{}", std::process::id()));
        std::fs::write(&path, "").unwrap();
        let mode = |mode| {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        mode(0o644);
        assert!(refuse_others(&path).is_ok());
        mode(0o664);
        assert!(refuse_others(&path).is_err());
        std::fs::remove_file(&path).unwrap();
        assert!(refuse_others(&path).is_err());
    }
}
