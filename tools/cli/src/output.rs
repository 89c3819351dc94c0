//! What a command prints: words for people, one JSON envelope for programs, progress on a terminal only.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::io::{self, BufRead, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use varve_control::{ControlError, Progress};

/// The error was said with a result.
static SAID: AtomicBool = AtomicBool::new(false);

/// How to print.
#[derive(Clone, Copy, Debug, Default)]
pub struct Output {
    /// Name of the program, before its errors.
    pub program: &'static str,
    /// One JSON object on standard output, errors included.
    pub json: bool,
    /// Nothing but what was asked for.
    pub quiet: bool,
}

#[derive(Serialize)]
struct Envelope<'a, T> {
    /// 1: first version.
    schema: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<T>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a ControlError>,
}

/// Lets a reader that goes away (`varve history | head`) end the command quietly, as it does with other tools.
pub fn end_quietly_without_reader() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let said = info.payload().downcast_ref::<String>();
        if said.is_some_and(|text| text.contains("Broken pipe")) {
            std::process::exit(141); // 128 + SIGPIPE
        }
        usual(info);
    }));
}

impl Output {
    /// Prints a result: as JSON, or with `words`.
    pub fn result<T: Serialize>(&self, value: &T, words: impl FnOnce()) {
        if self.json {
            self.envelope(&Envelope {
                schema: 1,
                result: Some(value),
                error: None,
            });
        } else {
            words();
        }
    }

    /// Prints what was done of a thing that was not done wholly, and gives back why: as JSON both are one object.
    pub fn partly<T: Serialize>(
        &self,
        value: &T,
        error: ControlError,
        words: impl FnOnce(),
    ) -> ControlError {
        if self.json {
            SAID.store(true, Ordering::Relaxed);
            self.envelope(&Envelope {
                schema: 1,
                result: Some(value),
                error: Some(&error),
            });
        } else {
            words();
        }
        error
    }

    fn envelope<T: Serialize>(&self, envelope: &Envelope<'_, T>) {
        let mut out = io::stdout().lock();
        let written = serde_json::to_writer_pretty(&mut out, envelope).map_err(io::Error::from);
        if let Err(error) = written
            .and_then(|()| writeln!(out))
            .and_then(|()| out.flush())
        {
            // Half an answer must not look like a whole one.
            if error.kind() == io::ErrorKind::BrokenPipe {
                std::process::exit(141); // 128 + SIGPIPE
            }
            eprintln!("{}: standard output: {error}", self.program);
            std::process::exit(1);
        }
    }

    /// Prints an error and gives the exit code for it.
    pub fn error(&self, error: &ControlError) -> ExitCode {
        if self.json && SAID.load(Ordering::Relaxed) {
            // With the result.
        } else if self.json {
            self.envelope(&Envelope::<()> {
                schema: 1,
                result: None,
                error: Some(error),
            });
        } else {
            eprintln!("{}: {error}", self.program);
        }
        ExitCode::from(exit_code(error))
    }

    /// A line for people, unless quiet or JSON.
    pub fn say(&self, text: impl AsRef<str>) {
        if !self.quiet && !self.json {
            println!("{}", text.as_ref());
        }
    }

    /// A progress bar for bytes; hidden where standard error is no terminal.
    pub fn bar(&self, what: &str) -> impl FnMut(Progress) + use<> {
        let visible = !self.quiet && !self.json && io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(
            None,
            if visible {
                ProgressDrawTarget::stderr()
            } else {
                ProgressDrawTarget::hidden()
            },
        );
        let style = ProgressStyle::with_template(
            "{msg} [{bar:40}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        );
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_message(what.to_owned());
        move |progress: Progress| {
            bar.set_length(progress.total);
            bar.set_position(progress.done);
            if progress.done >= progress.total {
                bar.finish_and_clear();
            }
        }
    }
}

/// The exit code of an error: 1 failed, 2 wrong usage, 3 partial, 4 not found, 5 locked or busy, 6 not authorised, 7 integrity.
#[must_use]
pub fn exit_code(error: &ControlError) -> u8 {
    match error.code.split('-').next().unwrap_or_default() {
        "V019" | "V027" | "I002" | "I003" | "I004" | "I006" | "I007" | "X003" | "H001" => 4,
        _ if error.code == "X006-mount" => 1,
        "I005" | "V031" | "X006" => 2,
        "V010" | "V012" | "V023" | "S003" | "S013" | "H003" => 5,
        "S002" | "S004" | "S005" | "S006" | "S009" | "S010" | "S024" | "H006" | "H019" => 7,
        "H021" | "X017" => 3,
        "C006" | "S015" | "S018" | "S021" => 6,
        _ => 1,
    }
}

/// Asks on the terminal; without one the answer is no.
#[must_use]
pub fn confirm(question: &str) -> bool {
    if !io::stdin().is_terminal() {
        return false;
    }
    eprint!("{question} [y/N] ");
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line).is_ok() && matches!(line.trim(), "y" | "Y" | "yes")
}

/// Bytes with a unit.
#[must_use]
pub fn show_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}
