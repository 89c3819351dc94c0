//! A whole system: systemd orders the daemons and the mounts, udev makes the links, and the same disk is booted again and again.
//!
//! `VARVE_TEST_SYSTEM` names the image (`tests/vm/build-system` makes one). Without it this says so and does nothing; with CI=true that is a failure.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use varve_tests::guest::{Kernel, disk, programs, repository, uml_kernels};

const SYSTEM: &str = "VARVE_TEST_SYSTEM";
const DATA_MIB: u64 = 200;

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(repository())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// One disk with a system and one with data.
struct Machine {
    directory: tempfile::TempDir,
    kernel: PathBuf,
    data: PathBuf,
}

impl Machine {
    fn new(kernel: &Path, image: &str) -> Machine {
        let directory = tempfile::tempdir().unwrap();
        let data = disk(directory.path(), "data", DATA_MIB);
        let machine = Machine {
            directory,
            kernel: kernel.to_path_buf(),
            data,
        };
        run("cp", &["--sparse=always", image, &machine.path("system")]);
        run(
            "mkfs.ext4",
            &[
                "-q",
                "-F",
                "-U",
                "11111111-2222-3333-4444-555555555555",
                &machine.path("data"),
            ],
        );
        let place = machine.path("mounted");
        std::fs::create_dir_all(&place).unwrap();
        run("mount", &["-o", "loop", &machine.path("system"), &place]);
        let destination = format!("DESTDIR={place}");
        let from = format!("PROGRAMS={}", programs().display());
        run("make", &["-s", "install", &destination, &from]);
        let table = Path::new(&place).join("etc/fstab");
        let text = std::fs::read_to_string(&table).unwrap();
        std::fs::write(
            &table,
            format!("{text}UUID=11111111-2222-3333-4444-555555555555 /srv ext4 defaults 0 2\n"),
        )
        .unwrap();
        run("umount", &[&place]);
        machine
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    /// Boots, runs the script, and shuts down, or cuts the power.
    fn boot(&self, what: &str, cut: bool, script: &str) -> String {
        for attempt in 0.. {
            let mut runner = Command::new(repository().join("tests/vm/run-system"));
            runner
                .arg(&self.kernel)
                .arg(self.path("system"))
                .args(["-m", "1024", "-t", "240", "-c", &self.path("console")])
                .arg("-d")
                .arg(&self.data);
            if cut {
                runner.arg("-k");
            }
            let output = runner
                .args([
                    "--",
                    &format!("set -ex\nexport PS4='+ ' VARVE_QUIET=\n{script}"),
                ])
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            println!("== {what}:\n{text}");
            if output.status.success() {
                return text;
            }
            let console = std::fs::read_to_string(self.path("console")).unwrap_or_default();
            // A kernel that died before anything ran is infrastructure.
            let died = output.status.code() == Some(125)
                && text.is_empty()
                && console.contains("Kernel panic");
            assert!(
                died && attempt == 0,
                "{what}: {}\n{text}\n{}\n{console}",
                output.status,
                String::from_utf8_lossy(&output.stderr),
            );
            println!("INFRASTRUCTURE: the guest died; once more");
        }
        unreachable!("the loop ends by return or panic")
    }
}

#[test]
fn system_protects_a_mounted_device_at_the_next_boot_and_takes_it_back() {
    let Ok(image) = std::env::var(SYSTEM) else {
        assert!(
            std::env::var("CI").is_err(),
            "{SYSTEM} is not set: in CI a missing system image is a failure"
        );
        println!(
            "SKIPPED: {SYSTEM} is not set (tests/vm/build-system makes an image): no systemd, no udev was tested"
        );
        return;
    };
    for kernel in uml_kernels() {
        let Kernel::Uml(kernel) = kernel else {
            continue;
        };
        let machine = Machine::new(&kernel, &image);
        machine.boot("before", false, r#"
            test "$(findmnt -no SOURCE /srv)" = /dev/ubdb
            echo treasure > /srv/file
            cp /etc/fstab /root/fstab
            systemctl enable --now blkfilter varved
            # In use: refused, with the way out named.
            ! varve protect /dev/ubdb 2>/tmp/refusal || exit 1
            grep -q 'at-next-boot' /tmp/refusal
            varve protect --at-next-boot /dev/ubdb --name data --log-size 64 --dry-run
            cmp /etc/fstab /root/fstab
            varve protect --at-next-boot /dev/ubdb --name data --log-size 64
            grep -q '^/dev/varve/data /srv ext4 defaults,x-systemd.after=blkfilter.service 0 2' /etc/fstab
            # The disk that is mounted now stays what it is for systemd.
            udevadm trigger -c change /dev/ubdb; udevadm settle; sleep 1
            test "$(findmnt -no SOURCE /srv)" = /dev/ubdb
            # Not before: also if the daemon starts anew.
            systemctl restart blkfilter
            varve status && exit 1 || test $? = 3
            varve status | grep -q waiting
            man -w varve 2>/dev/null || test -s /usr/share/man/man1/varve-protect.1
        "#);
        machine.boot("protected by the boot", false, r#"
            findmnt -no SOURCE /srv | grep -E '^/dev/(ublkb|varve)'
            test "$(cat /srv/file)" = treasure
            test -z "$(systemctl --failed --no-legend)"
            varve status --wait 60
            # Names lead to the mapped device, not to the disk behind it.
            test "$(readlink -f /dev/disk/by-uuid/11111111-2222-3333-4444-555555555555)" = "$(readlink -f /dev/varve/data)"
            varve mark before-disaster
            # A restart of the daemon under a mounted file system.
            systemctl restart blkfilter
            echo more > /srv/file2; sync
            rm /srv/file
            varve status --wait 60
            varve mount before-disaster /mnt
            test "$(cat /mnt/file)" = treasure
            # An image of the past has the same UUID: by that nobody finds it, nor does systemd.
            udevadm settle
            test "$(readlink -f /dev/disk/by-uuid/11111111-2222-3333-4444-555555555555)" = "$(readlink -f /dev/varve/data)"
            udevadm info --query=property "$(findmnt -no SOURCE /mnt)" | grep -x SYSTEMD_READY=0
            varve umount /mnt
            ! ls /run/varve/*.image-ublk || exit 1
            # A mount that systemd does not know to order: served until it is gone, all the same.
            mkdir -p /other; mount /dev/varve/data /other; echo last > /other/file4
        "#);
        machine.boot(
            "after an ordinary shutdown",
            true,
            r#"
            journalctl -b -u blkfilter | grep 'closed cleanly before: nothing to do'
            journalctl -b -1 -u blkfilter | grep -v 'left running' | tail -n 3
            varve status
            test ! -e /srv/file -a "$(cat /srv/file2)" = more
            varve compare
            varve points | grep before-disaster
            test "$(cat /srv/file4)" = last
            echo unfinished > /srv/file3; sync
        "#,
        );
        machine.boot(
            "after a power cut",
            false,
            r#"
            journalctl -b -u blkfilter | grep 'not closed cleanly'
            varve status --wait 60
            test "$(cat /srv/file3)" = unfinished
            varve compare
            # Back out: refused while it is mounted, then one command.
            ! varve unprotect data || exit 1
            umount /srv
            varve unprotect data
            cmp /etc/fstab /root/fstab
            systemctl daemon-reload
            mount /srv
            test "$(findmnt -no SOURCE /srv)" = /dev/ubdb
        "#,
        );
        machine.boot(
            "without Varve again",
            false,
            r#"
            test "$(findmnt -no SOURCE /srv)" = /dev/ubdb
            test "$(cat /srv/file2)" = more
            test -z "$(systemctl --failed --no-legend)"
            varve protect --at-next-boot /dev/ubdb --name again --log-size 64
            ! cmp -s /etc/fstab /root/fstab
        "#,
        );
        machine.boot(
            "a second time, and the way out of a machine that does not come up",
            false,
            r#"
            varve status --wait 60
            findmnt -no SOURCE /srv | grep -E '^/dev/(ublkb|varve)'
            echo rescued > /srv/file5; sync
            # While blkfilter runs the other way is the right one.
            ! varve unprotect again --offline 2>/tmp/refusal || exit 1
            grep -q 'systemctl stop' /tmp/refusal
            umount /srv
            systemctl stop varved blkfilter
            varve unprotect again --offline
            cmp /etc/fstab /root/fstab
            systemctl daemon-reload
            mount /srv
            test "$(findmnt -no SOURCE /srv)" = /dev/ubdb
            test "$(cat /srv/file5)" = rescued
        "#,
        );
        machine.boot(
            "the way out was taken",
            false,
            r#"
            test "$(findmnt -no SOURCE /srv)" = /dev/ubdb
            test "$(cat /srv/file5)" = rescued
            test -z "$(systemctl --failed --no-legend)"
            varve status > /tmp/status && exit 1 || test $? = 3
            grep 'Nothing is protected' /tmp/status
            varve history --volume again
        "#,
        );
    }
}
