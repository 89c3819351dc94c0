//! Devices of other shapes: 4096-byte sectors, sizes that are no multiple of anything round, partitions on a mapped whole disk.

use crate::Outcome;
use std::path::Path;
use varve_tests::scenario::{Installation, finish_fio, pause, run, start_fio};
use varve_tests::stamps::{Stamper, read_stamps};

fn sh(script: &str) -> Result<String, String> {
    run("sh", &["-c", script])
}

/// A disk of `bytes` with sectors of `sector` bytes, as a loop device over a file.
fn make_disk(root: &Path, name: &str, bytes: u64, sector: u32) -> Result<String, String> {
    let file = root.join(name).display().to_string();
    sh(&format!("truncate -s {bytes} {file}"))?;
    let device = run(
        "losetup",
        &[
            "--find",
            "--show",
            "--sector-size",
            &sector.to_string(),
            &file,
        ],
    )?;
    Ok(device.trim().to_owned())
}

/// All of it, for both sector sizes.
pub fn shapes(varve: &Installation, root: &Path) -> Outcome {
    varve.varve(&["up"])?;
    for sector in [512, 4096] {
        let bytes = (200 << 20) + 7 * u64::from(sector);
        let device = make_disk(root, &format!("shape-{sector}"), bytes, sector)?;
        let outcome = whole_disk(varve, &device, bytes, sector);
        let detached = run("losetup", &["--detach", &device]);
        outcome?;
        detached?;
        println!("{sector}-byte sectors: held");
    }
    varve.varve(&["down"]).map(|_| ())
}

fn whole_disk(varve: &Installation, device: &str, bytes: u64, sector: u32) -> Outcome {
    let (live, past) = ("/mnt/live", "/mnt/past");
    for directory in [live, past] {
        std::fs::create_dir_all(directory).map_err(|e| e.to_string())?;
    }
    // A partition table that was there before: it is part of what is protected.
    sh(&format!(
        "printf 'start=1MiB, size=64MiB\\nsize=100MiB\\n' | sfdisk -q --label gpt {device}"
    ))?;
    varve.varve(&["protect", device, "--name", "shape", "--log-size", "256"])?;
    let mapped = varve.device("shape")?;
    let found = sh(&format!(
        "blockdev --getsize64 {mapped}; blockdev --getss {mapped}"
    ))?;
    if found.split_whitespace().collect::<Vec<_>>() != [bytes.to_string(), sector.to_string()] {
        return Err(format!(
            "{mapped} is {found:?} instead of {bytes} and {sector}"
        ));
    }
    // The last sectors, which make no whole block.
    let last = bytes - u64::from(sector);
    sh(&format!(
        "head -c {sector} /dev/urandom > /tmp/last; dd if=/tmp/last of={mapped} bs={sector} seek={} oflag=direct conv=notrunc status=none",
        last / u64::from(sector)
    ))?;
    let partition = |number: u32| -> Result<String, String> {
        let path = format!("{mapped}p{number}");
        for _ in 0..600 {
            if Path::new(&path).exists() {
                return Ok(path);
            }
            pause(50);
        }
        Err(format!("{path} is not there"))
    };
    let (first, second) = (partition(1)?, partition(2)?);
    run("mkfs.ext4", &["-q", "-F", &first])?;
    run("mount", &[&first, live])?;
    let fio = start_fio(live, 16, 16, 3)?;
    let mut writer = Stamper::new(&second, 1024)?;
    for step in 0..300 {
        writer.write(step % 25 == 24)?;
    }
    finish_fio(fio)?;
    sh(&format!("echo note > {live}/note; sync -f {live}"))?;
    varve.varve(&["mark", "good"])?;
    sh(&format!("rm {live}/note; fstrim {live} || true"))?;
    // Discard and write-zeroes through the mapped device.
    sh(&format!(
        "blkdiscard -f -o 0 -l 1MiB {second}; blkdiscard -z -f -o 1MiB -l 1MiB {second}"
    ))?;
    for step in 0..100 {
        writer.write(step % 25 == 24)?;
    }
    varve.varve(&["mount", "good", past, "--partition", "1"])?;
    let note = sh(&format!("cat {past}/note"))?;
    varve.varve(&["umount", past])?;
    if note != "note\n" {
        return Err(format!("the partition's past says {note:?}"));
    }
    drop(writer);
    run("umount", &[live])?;
    varve.compare()?;
    // Back to it, partition table and all.
    varve.varve(&["rewind", "good", "--yes"])?;
    let mapped = varve.device("shape")?;
    let first = format!("{mapped}p1");
    for _ in 0..600 {
        if Path::new(&first).exists() {
            break;
        }
        pause(50);
    }
    run("mount", &[&first, live])?;
    sh(&format!("test \"$(cat {live}/note)\" = note"))?;
    run("umount", &[live])?;
    read_stamps(&format!("{mapped}p2"), 1024)?;
    sh(&format!(
        "dd if={mapped} bs={sector} skip={} iflag=direct status=none | cmp - /tmp/last",
        last / u64::from(sector)
    ))?;
    varve.compare()?;
    varve.varve(&["unprotect", "shape", "--forget"]).map(|_| ())
}
