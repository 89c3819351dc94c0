//! Images of the past against what the device, or its writer, was at that time.

use crate::{Outcome, export, protect, stamper_on_zeroes};
use std::time::Instant;
use varve_tests::scenario::{
    Installation, check_file_system, digest, finish_fio, make_file_system, run, say, start_fio,
};
use varve_tests::stamps::read_stamps;

/// Images at many instants of a file system under load: frozen ones equal the device as it was read then; others mount, and pass the checker.
pub fn instants(varve: &Installation, device: &str, kind: &str, count: usize) -> Outcome {
    let start = Instant::now();
    let mapped = protect(varve, device)?;
    let (live, past) = ("/mnt/live", "/mnt/past");
    for directory in [live, past] {
        std::fs::create_dir_all(directory).map_err(|e| e.to_string())?;
    }
    make_file_system(kind, &mapped)?;
    // btrfs discards on a thread of its own, which no freeze stops.
    let options = if kind == "btrfs" { "nodiscard" } else { "rw" };
    run("mount", &["-o", options, &mapped, live])?;
    say(start, &format!("{kind} on {mapped}"));
    let mut frozen = Vec::new();
    let mut loose = Vec::new();
    for index in 0..count {
        let fio = start_fio(live, 8, 2, 2)?;
        std::fs::write(
            format!("{live}/note-{index}"),
            format!("{index}").repeat(1000 + index),
        )
        .map_err(|e| e.to_string())?;
        // At least three of few, ten of many.
        if index % (count / 3).clamp(1, 3) == 0 {
            let name = format!("loose-{index}");
            varve.varve(&["mark", &name])?;
            loose.push(name);
        }
        finish_fio(fio)?;
        run("fsfreeze", &["--freeze", live])?;
        let name = format!("frozen-{index}");
        let outcome = varve.varve(&["mark", &name]).and_then(|_| digest(&mapped));
        run("fsfreeze", &["--unfreeze", live])?;
        frozen.push((name, outcome?));
    }
    say(
        start,
        &format!("{} frozen and {} loose instants", frozen.len(), loose.len()),
    );
    for (name, expected) in &frozen {
        let image = export(varve, name, false)?;
        let found = digest(&image)?;
        varve.varve(&["unexport", &image])?;
        if found != *expected {
            return Err(format!(
                "the image at {name} is not what the device was: {found} instead of {expected}"
            ));
        }
    }
    say(start, "every frozen image equals the device as it was");
    for name in &loose {
        let image = export(varve, name, true)?;
        let options = if kind == "xfs" { "nouuid" } else { "rw" };
        // btrfs refuses a second file system of the same UUID beside the mounted one; it is checked as it is.
        if kind != "btrfs" {
            run("mount", &["-o", options, &image, past])?;
            run("umount", &[past])?;
        }
        check_file_system(kind, &image)?;
        varve.varve(&["unexport", &image])?;
    }
    say(
        start,
        "unfrozen images replay their journals and pass the checker",
    );
    run("umount", &[live])?;
    varve.compare()?;
    varve.varve(&["unprotect", "disk"])?;
    check_file_system(kind, device)?;
    run("mount", &[device, live])?;
    run("umount", &[live])?;
    varve.varve(&["down"])?;
    Ok(())
}

/// An independent oracle: a writer that knows what every block holds at each instant, at flush boundaries and between.
pub fn stamps(varve: &Installation, device: &str, count: u64) -> Outcome {
    const BLOCKS: u64 = 512;
    let start = Instant::now();
    let mapped = protect(varve, device)?;
    let mut writer = stamper_on_zeroes(&mapped, BLOCKS)?;
    let mut models = Vec::new();
    for index in 0..count {
        for step in 0..40 + index * 3 {
            writer.write(step % 11 == 10 || (index % 2 == 0 && step == 39 + index * 3))?;
        }
        let name = format!("stamp-{index}");
        varve.varve(&["mark", &name])?;
        models.push((name, writer.model.clone()));
    }
    for (name, model) in &models {
        let image = export(varve, name, false)?;
        let found = read_stamps(&image, BLOCKS)?;
        varve.varve(&["unexport", &image])?;
        if let Some(block) = (0..BLOCKS as usize).find(|block| found[*block] != model[*block]) {
            return Err(format!(
                "{name}: block {block} holds stamp {}, the writer had written {}",
                found[block], model[block]
            ));
        }
    }
    drop(writer);
    say(
        start,
        &format!("{count} instants equal the writer's own memory"),
    );
    varve.compare()?;
    varve.varve(&["down"])?;
    Ok(())
}

/// Every transaction that SQLite (synchronous=FULL) acknowledged before an instant is in the image of that instant.
pub fn sqlite(varve: &Installation, device: &str) -> Outcome {
    let start = Instant::now();
    let mapped = protect(varve, device)?;
    std::fs::create_dir_all("/mnt/live").map_err(|e| e.to_string())?;
    std::fs::create_dir_all("/mnt/past").map_err(|e| e.to_string())?;
    make_file_system("ext4", &mapped)?;
    run("mount", &[&mapped, "/mnt/live"])?;
    let sql = |statement: &str| run("sqlite3", &["/mnt/live/db", statement]);
    sql("PRAGMA journal_mode=WAL; CREATE TABLE t (n INTEGER PRIMARY KEY, pad TEXT);")?;
    let mut acknowledged = Vec::new();
    for n in 1..=40 {
        sql(&format!(
            "PRAGMA synchronous=FULL; INSERT INTO t VALUES ({n}, hex(randomblob(600)));"
        ))?;
        if n % 8 == 0 {
            let name = format!("row-{n}");
            varve.varve(&["mark", &name])?;
            acknowledged.push((name, n));
        }
    }
    for (name, rows) in acknowledged {
        varve
            .varve(&["mount", &name, "/mnt/past", "--writable"])
            .map_err(|e| format!("{e}\n{}", varve.messages()))?;
        let found = run(
            "sqlite3",
            &[
                "/mnt/past/db",
                "PRAGMA integrity_check; SELECT count(*) FROM t;",
            ],
        )?;
        varve.varve(&["umount", "/mnt/past"])?;
        if found.trim() != format!("ok\n{rows}") {
            return Err(format!(
                "{name}: {rows} rows were acknowledged, the image says {found:?}"
            ));
        }
    }
    run("umount", &["/mnt/live"])?;
    say(
        start,
        "every acknowledged transaction is in every later image",
    );
    varve.varve(&["down"])?;
    Ok(())
}
