//! `varve`: protects devices, shows their past, brings it back. It asks the daemons; it opens neither logs nor stores itself.

mod bisect;
mod command;
mod daemons;
mod doctor;
mod drill;
mod export;
mod files;
mod fstab;
mod image;
mod key;
mod manual;
mod next_boot;
mod past;
mod policy;
mod proof;
mod protect;
mod show;
mod status;

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use varve_cli::Output;
use varve_control::{ControlError, Paths};

/// Continuous data protection for Linux block devices: every write recorded, any instant back.
///
/// Begin with `varve doctor`, then `varve up`, then `varve protect /dev/sdX`. `varve status` answers "am I safe?".
/// What others call a snapshot or a backup of an instant is an image here: `varve mount '5 minutes ago' /mnt`.
///
/// Exit codes: 0 ok, 1 failed, 2 wrong usage, 3 partly, 4 not found, 5 locked or busy, 6 not authorised, 7 integrity.
#[derive(Parser)]
#[command(name = "varve", version, verbatim_doc_comment)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct Common {
    /// Answer with one JSON object, errors included.
    #[arg(long, global = true)]
    json: bool,
    /// Say nothing but what was asked for.
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Everything under this directory instead of / (also: VARVE_ROOT).
    #[arg(long, global = true, value_name = "DIR")]
    root: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Check this machine: kernel, ublk, memory, disks; says what to do.
    Doctor,
    /// Start the daemons (where systemd does not).
    Up,
    /// Stop the daemons; volumes that are in use are taken over by the next start.
    Down,
    /// Am I safe? Every volume on one screen; exit code 0 only if all are protected.
    Status {
        /// Wait up to this many seconds until every volume is protected.
        #[arg(long, value_name = "SECONDS")]
        wait: Option<u64>,
    },
    /// Protect a device from now on (it must not be mounted; what is on it stays).
    Protect(protect::ProtectArgs),
    /// Stop protecting: the device is a plain disk again; its history stays in the store.
    Unprotect {
        /// Volume.
        volume: String,
        /// Also delete its history; of a volume that is protected no more: now.
        #[arg(long)]
        forget: bool,
        /// Even if its log holds what the store could not take (its disk is full, or the volume does not run): that is lost.
        #[arg(long)]
        drop_log: bool,
        /// Without the daemons (rescue): the next boot does not know the volume, and mounts are as they were before.
        #[arg(long, conflicts_with = "forget")]
        offline: bool,
    },
    /// Follow a device that was grown or shrunk (unmounted; its history goes on).
    Resize {
        /// Volume.
        volume: String,
    },
    /// Give this instant a name.
    Mark {
        /// Name of the recovery point.
        #[arg(value_name = "NAME")]
        label: String,
        /// With its file systems frozen for that moment, so that they are clean in it.
        #[arg(long)]
        freeze: bool,
        #[command(flatten)]
        volume: Volume,
    },
    /// List recovery points.
    Points {
        #[command(flatten)]
        volume: Volume,
    },
    /// From when to when can I go back? Span, gaps, rates.
    History {
        #[command(flatten)]
        volume: Volume,
    },
    /// Mount an instant: `varve mount '2026-11-22 14:03:07.5' /mnt`.
    Mount {
        /// A time, `5 minutes ago`, `lsn:N`, a point's name, or `now`.
        instant: String,
        /// Where.
        directory: PathBuf,
        /// Writable (into a scratch overlay; gone at umount).
        #[arg(long)]
        writable: bool,
        /// Partition of a whole disk's image.
        #[arg(long, value_name = "N")]
        partition: Option<u32>,
        #[command(flatten)]
        volume: Volume,
    },
    /// Unmount an instant and take its device away.
    Umount {
        /// Where it is mounted.
        directory: PathBuf,
    },
    /// Show an instant as a block device, or over NBD; or copy it out.
    Export {
        /// As for `mount`.
        instant: String,
        /// Serve NBD on this Unix socket instead of a block device.
        #[arg(long, value_name = "SOCKET")]
        nbd: Option<String>,
        /// With --nbd: also say what was written since this instant (`qemu:dirty-bitmap:varve`).
        #[arg(
            long,
            value_name = "INSTANT",
            requires = "nbd",
            conflicts_with = "writable"
        )]
        since: Option<String>,
        /// Writable (into a scratch overlay).
        #[arg(long)]
        writable: bool,
        #[command(flatten)]
        copy: export::CopyArgs,
        #[command(flatten)]
        volume: Volume,
    },
    /// End an export.
    Unexport {
        /// The device or socket that `export` named.
        device: String,
    },
    /// List exports.
    Exports,
    /// Files of the past: list them, see their versions, get one back.
    Files {
        #[command(subcommand)]
        command: files::FilesCommand,
    },
    /// Find the last instant at which something was still good: each is mounted read-only, and a command decides.
    Bisect {
        #[command(flatten)]
        args: bisect::BisectArgs,
        #[command(flatten)]
        volume: Volume,
    },
    /// Write an instant back over the device. Recorded, so that it can be undone by another rewind.
    Rewind {
        /// As for `mount`.
        instant: String,
        /// Only say how much would be written.
        #[arg(long)]
        dry_run: bool,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        volume: Volume,
    },
    /// Which block ranges were written between two instants?
    Diff {
        /// The older.
        from: String,
        /// The newer.
        to: String,
        #[command(flatten)]
        volume: Volume,
    },
    /// Which block ranges were written since an instant? For what copies only changes.
    Changed {
        /// As for `mount`.
        #[arg(long, value_name = "INSTANT")]
        since: String,
        /// Until when.
        #[arg(long, value_name = "INSTANT", default_value = "now")]
        until: String,
        #[command(flatten)]
        volume: Volume,
    },
    /// Compare the device with the end of its history.
    Compare {
        #[command(flatten)]
        volume: Volume,
    },
    /// Read all of the history again and prove it: what is damaged, which instants and blocks lack it. Goes on where it was broken off.
    Scrub {
        /// Not faster than this, in MiB a second.
        #[arg(long, value_name = "MIB")]
        rate: Option<u64>,
        /// Only compare what is stored with its checksums: as fast as the disk, and without keys; nothing is unpacked.
        #[arg(long)]
        stored: bool,
        #[command(flatten)]
        volume: Volume,
    },
    /// Prove that an instant is of use: mount it in an overlay, replay its journal, check it; `status` shows the last one that was proven.
    Drill {
        #[command(flatten)]
        args: drill::DrillArgs,
        #[command(flatten)]
        volume: Volume,
    },
    /// Look at the structure of the history, quickly: is every file there, and what it says it is?
    Check {
        #[command(flatten)]
        volume: Volume,
    },
    /// Make all indexes anew from the history itself: what runs say is compared with it, maps are made again in the background. Nothing needs this
    /// unless an index is suspected: what is damaged or lost is made again by itself.
    Rebuild {
        /// Both lists of the instants that were kept are lost, and nobody has them any more: those instants go, and what only they needed.
        #[arg(long)]
        give_up_kept: bool,
        #[command(flatten)]
        volume: Volume,
    },
    /// Copy all that a failing disk still gives of the store into a new one, and say what is lost.
    Salvage {
        /// An empty directory, on another disk.
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
    },
    /// What is kept of the past, and for how long.
    Policy {
        #[command(flatten)]
        volume: Volume,
        #[command(subcommand)]
        command: Option<policy::PolicyCommand>,
    },
    /// Keep an instant whatever the policy says.
    Pin {
        /// As for `mount`.
        instant: String,
        #[command(flatten)]
        volume: Volume,
    },
    /// The policy decides about an instant again.
    Unpin {
        /// As for `mount`.
        instant: String,
        #[command(flatten)]
        volume: Volume,
    },
    /// Encryption of the history at rest: what opens it.
    Key {
        #[command(subcommand)]
        command: Option<key::KeyCommand>,
    },
    /// Print completions for a shell (`make install` puts them where shells look).
    Completions {
        /// bash, zsh, fish, …
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a directory (`make install` does).
    Manual {
        /// Where.
        directory: PathBuf,
    },
    /// Show the formats' byte tables.
    Dump {
        /// The tables in FORMAT.md.
        #[arg(long, required = true)]
        layout: bool,
    },
}

#[derive(Args)]
struct Volume {
    /// Volume; not needed while there is only one.
    #[arg(long = "volume", short = 'V', value_name = "NAME", global = true)]
    name: Option<String>,
}

/// What every command needs.
struct Context {
    paths: Paths,
    output: Output,
}

fn main() -> ExitCode {
    varve_cli::end_quietly_without_reader();
    let cli = Cli::parse();
    let root = cli
        .common
        .root
        .or_else(|| std::env::var_os("VARVE_ROOT").map(PathBuf::from))
        .unwrap_or_else(|| PathBuf::from("/"));
    // Standard output is the copy.
    let to_stdout =
        matches!(&cli.command, Command::Export { copy, .. } if copy.to.as_deref() == Some("-"));
    let output = Output {
        program: "varve",
        json: cli.common.json && !to_stdout,
        quiet: cli.common.quiet || to_stdout,
    };
    let context = Context {
        paths: Paths::new(root),
        output,
    };
    match run(&context, cli.command) {
        Ok(code) => code,
        Err(error) => output.error(&error),
    }
}

fn run(context: &Context, command: Command) -> Result<ExitCode, ControlError> {
    let done = |()| ExitCode::SUCCESS;
    match command {
        Command::Doctor => Ok(doctor::run(context)),
        Command::Up => daemons::up(context).map(done),
        Command::Down => daemons::down(context).map(done),
        Command::Status { wait } => status::run(context, wait),
        Command::Protect(args) => protect::protect(context, &args).map(done),
        Command::Unprotect {
            volume,
            forget,
            drop_log,
            offline,
        } => {
            let how = protect::Ending {
                forget,
                drop_log,
                offline,
            };
            protect::unprotect(context, &volume, &how).map(done)
        }
        Command::Resize { volume } => protect::resize(context, &volume).map(done),
        Command::Mark {
            label,
            freeze,
            volume,
        } => past::mark(context, volume.name, &label, freeze).map(done),
        Command::Points { volume } => past::points(context, volume.name).map(done),
        Command::History { volume } => past::history(context, volume.name).map(done),
        Command::Mount {
            instant,
            directory,
            writable,
            partition,
            volume,
        } => show::mount(
            context,
            volume.name,
            &instant,
            &directory,
            writable,
            partition,
        )
        .map(done),
        Command::Umount { directory } => show::umount(context, &directory).map(done),
        Command::Export {
            instant,
            nbd,
            since,
            writable,
            copy,
            volume,
        } => match &copy.to {
            Some(to) => export::copy(context, volume.name, &instant, to, &copy),
            None => show::export(
                context,
                volume.name,
                &instant,
                (nbd, since.as_deref()),
                writable,
            ),
        }
        .map(done),
        Command::Unexport { device } => show::unexport(context, device).map(done),
        Command::Exports => show::exports(context).map(done),
        Command::Files { command } => files::run(context, command),
        Command::Bisect { args, volume } => bisect::run(context, volume.name, &args).map(done),
        Command::Rewind {
            instant,
            dry_run,
            yes,
            volume,
        } => past::rewind(context, volume.name, &instant, dry_run, yes).map(done),
        Command::Diff { from, to, volume } => {
            past::diff(context, volume.name, &from, &to).map(done)
        }
        Command::Changed {
            since,
            until,
            volume,
        } => past::diff(context, volume.name, &since, &until).map(done),
        Command::Compare { volume } => past::compare(context, volume.name),
        Command::Scrub {
            rate,
            stored,
            volume,
        } => proof::scrub(context, volume.name, rate, stored),
        Command::Rebuild {
            give_up_kept,
            volume,
        } => proof::rebuild(context, volume.name, give_up_kept),
        Command::Check { volume } => proof::check(context, volume.name),
        Command::Drill { args, volume } => drill::run(context, volume.name, &args),
        Command::Salvage { to } => proof::salvage(context, &to),
        Command::Policy { volume, command } => {
            let command = command.unwrap_or(policy::PolicyCommand::Show);
            policy::run(context, volume.name, command).map(done)
        }
        Command::Pin { instant, volume } => {
            policy::pin(context, volume.name, &instant, true).map(done)
        }
        Command::Unpin { instant, volume } => {
            policy::pin(context, volume.name, &instant, false).map(done)
        }
        Command::Key { command } => {
            key::run(context, &command.unwrap_or(key::KeyCommand::Status)).map(done)
        }
        Command::Completions { shell } => {
            manual::completions(shell);
            Ok(ExitCode::SUCCESS)
        }
        Command::Manual { directory } => manual::pages(&directory).map(done),
        Command::Dump { .. } => {
            print!("{}", varve_format::layout::markdown());
            Ok(ExitCode::SUCCESS)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Cli;
    use clap::CommandFactory;

    #[test]
    fn every_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
