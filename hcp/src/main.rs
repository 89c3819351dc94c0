//! `hcp`: a point-in-time copy of a live device, at once. It asks the daemons; it opens neither logs nor stores itself.

mod create;
mod list;
mod out;
mod past;
mod source;

use clap::{CommandFactory, Parser};
use std::path::PathBuf;
use std::process::ExitCode;
use varve_cli::Output;
use varve_control::{ControlError, Paths};

/// A point-in-time copy of a live device, at once: `hcp /dev/sdb1` freezes the file system for a moment, cuts, thaws, shows the copy as a block device
/// and mounts it. The device goes on being used; what is overwritten on it is kept for the copy until `hcp -r`.
///
///   hcp /dev/sdb1                       copy, mounted under /var/hotcopy/sdb1
///   hcp -o -m /mnt/copy /dev/sdb1       read-only, mounted on /mnt/copy
///   hcp --at '5 minutes ago' /dev/sdb1  the device as it was then
///   hcp --group /dev/sdb1 /dev/sdc1     both at one instant
///   hcp --to /backup/sdb1.img /dev/sdb1 copied out, verified
///   hcp -l                              what copies there are
///   hcp -r hcp1                         unmount and end one
///
/// The device must be protected by Varve (`varve protect`). Others call this a snapshot.
///
/// Exit codes: 0 ok, 1 failed, 2 wrong usage, 3 partly (a copy that is not mounted), 4 not found, 5 locked or busy, 6 not authorised, 7 integrity.
#[derive(Parser)]
#[command(
    name = "hcp",
    version,
    verbatim_doc_comment,
    disable_version_flag = true
)]
#[command(group = clap::ArgGroup::new("what").args(["list", "remove", "show_hcp_device", "completions", "manual"]))]
struct Cli {
    /// Device to copy: the mapped one, the one under it, a partition, a mount point, or a volume's name.
    #[arg(required_unless_present_any = ["what", "group", "version"])]
    device: Option<String>,
    /// Mount the copy here (default: /var/hotcopy/DEVICE).
    #[arg(short, long, value_name = "DIR", conflicts_with = "skip_mount")]
    mount_point: Option<PathBuf>,
    /// Do not mount it.
    #[arg(long)]
    skip_mount: bool,
    /// The copy cannot be written to, and is mounted read-only.
    #[arg(short = 'o', long)]
    read_only: bool,
    /// Where the blocks go that are overwritten on the device: a directory, or a device that holds nothing.
    #[arg(short, long, value_name = "DEV|DIR")]
    changed_blocks: Option<PathBuf>,
    /// Per cent of that place that stay free.
    #[arg(short, long, value_name = "PCT", default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=99))]
    quota: u32,
    /// Size of the place for changed blocks, in MiB (default: a fifth of the device).
    #[arg(long, value_name = "MIB")]
    store_size: Option<u64>,
    /// List the copies.
    #[arg(short, long)]
    list: bool,
    /// End a copy: its device, its name, or where it is mounted. It is unmounted first.
    #[arg(short, long, value_name = "DEVICE")]
    remove: Option<String>,
    /// Show one copy: its device, its name, or where it is mounted.
    #[arg(short, long, value_name = "DEVICE")]
    show_hcp_device: Option<String>,
    /// Name of the copy.
    #[arg(long)]
    name: Option<String>,
    /// The copy survives a reboot and a power cut (what is written to the copy itself does not).
    #[arg(long)]
    persist: bool,
    /// A copy of the past: a time, `5 minutes ago`, `lsn:N`, or a recovery point's name.
    #[arg(long, value_name = "INSTANT", conflicts_with_all = ["persist", "changed_blocks", "group", "quota", "store_size", "name", "no_freeze"])]
    at: Option<String>,
    /// Copy several devices at one instant.
    #[arg(long, value_name = "DEVICE", num_args = 1.., conflicts_with_all = ["device", "mount_point", "name"])]
    group: Vec<String>,
    /// Copy it out: to FILE (sparse; resumable), to FILE.qcow2, to `-` (standard output), or to nbd://HOST/EXPORT. DEVICE may also be a hot copy, a
    /// file, or a device that nobody writes to.
    #[arg(long, value_name = "TARGET", conflicts_with_all = ["group", "at", "mount_point"])]
    to: Option<String>,
    /// With --to: FILE holds what the hot copy NAME is; only what changed since is copied.
    #[arg(long, value_name = "NAME", requires = "to")]
    incremental_from: Option<String>,
    /// With --to: what FILE or the device holds may be overwritten.
    #[arg(long, requires = "to")]
    overwrite: bool,
    /// With --to: do not read the target again.
    #[arg(long, requires = "to")]
    no_verify: bool,
    /// Do not freeze the file system: the copy is what a power cut would leave.
    #[arg(long)]
    no_freeze: bool,
    /// Answer with one JSON object, errors included.
    #[arg(long)]
    json: bool,
    /// Say nothing but what was asked for.
    #[arg(long)]
    quiet: bool,
    /// Everything of Varve lies under this directory instead of / (also: VARVE_ROOT).
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Print the version.
    #[arg(short = 'v', long)]
    version: bool,
    /// Print completions for a shell.
    #[arg(long, value_name = "SHELL", hide = true)]
    completions: Option<clap_complete::Shell>,
    /// Write the manual page into a directory.
    #[arg(long, value_name = "DIR", hide = true)]
    manual: Option<PathBuf>,
}

/// What every part needs.
struct Context {
    paths: Paths,
    output: Output,
}

fn main() -> ExitCode {
    varve_cli::end_quietly_without_reader();
    let cli = Cli::parse();
    let root = cli
        .root
        .clone()
        .or_else(|| std::env::var_os("VARVE_ROOT").map(PathBuf::from))
        .unwrap_or_else(|| PathBuf::from("/"));
    // Standard output is the copy.
    let to_stdout = cli.to.as_deref() == Some("-");
    let output = Output {
        program: "hcp",
        json: cli.json && !to_stdout,
        quiet: cli.quiet || to_stdout,
    };
    let context = Context {
        paths: Paths::new(root),
        output,
    };
    match run(&context, &cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(mut error) => {
            error.message = varve_cli::with_clock_times(&error.message);
            output.error(&error)
        }
    }
}

fn run(context: &Context, cli: &Cli) -> Result<(), ControlError> {
    if cli.version {
        println!("hcp {}", env!("CARGO_PKG_VERSION"));
        return Ok(());
    }
    if let Some(shell) = cli.completions {
        clap_complete::generate(shell, &mut Cli::command(), "hcp", &mut std::io::stdout());
        return Ok(());
    }
    if let Some(directory) = &cli.manual {
        std::fs::create_dir_all(directory)?;
        clap_mangen::generate_to(Cli::command(), directory)?;
        return Ok(());
    }
    if cli.list {
        return list::list(context);
    }
    if let Some(which) = &cli.show_hcp_device {
        return list::show(context, which);
    }
    if let Some(which) = &cli.remove {
        return list::remove(context, which);
    }
    match (&cli.at, &cli.to, &cli.device) {
        (Some(instant), _, Some(device)) => past::copy(context, cli, device, instant),
        (None, Some(to), Some(device)) => out::copy_out(context, cli, device, to),
        _ => create::copy(context, cli),
    }
}

#[cfg(test)]
mod tests {
    use super::Cli;
    use clap::{CommandFactory, Parser};

    #[test]
    fn every_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn old_command_lines_are_understood() {
        for line in [
            "hcp /dev/sdb1",
            "hcp -m /mnt/x -o -c /spool -q 10 /dev/sdb1",
            "hcp --mount-point /mnt/x --read-only --changed-blocks /dev/sdc --quota 10 /dev/sdb1",
            "hcp --skip-mount /dev/sdb1",
            "hcp -l",
            "hcp --list",
            "hcp -r /dev/hcp1",
            "hcp --remove /dev/hcp1",
            "hcp -s /dev/hcp1",
            "hcp --show-hcp-device /dev/hcp1",
            "hcp -v",
            "hcp --version",
            "hcp --group /dev/sdb1 /dev/sdc1",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
        for line in [
            "hcp",
            "hcp -q 100 /dev/sdb1",
            "hcp -l -r x",
            "hcp --at now",
            // What a copy of the past has none of is not passed over in silence.
            "hcp --at now --name x /dev/sdb1",
            "hcp --at now -q 10 /dev/sdb1",
            "hcp --at now --no-freeze /dev/sdb1",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }
}
