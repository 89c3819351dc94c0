//! Hot copies of volumes at work: their records, the list of them, their end, and making their loss known and durable.

mod create;
pub(crate) mod files;
mod show;
mod start;
mod store;

use crate::SurvivingIdentity;
use crate::driver::{CopyAlert, Message};
use crate::hot_copy::CopyMemory;
use crate::manager::{ANSWER_WAIT, Manager, error};
use crate::origin;
use files::{EXTENT_BYTES, copy_memory_path, copy_record, overlay_path};
use std::fs::File;
use std::time::Duration;
use varve_control::{ControlError, CopyInfo, CopySet, CopySpec};
use varve_format::VolumeId;
use varve_log::Memory;

/// How long until a record that could not be written is tried again.
const RECORD_AGAIN: Duration = Duration::from_millis(250);
/// Changed ranges that are nearer to each other than this are one.
const NEAR_BYTES: u64 = 64 << 10;
/// An answer has at most about so many ranges.
const RANGES_MAX: u64 = 200_000;

pub(crate) use show::ShownCopy;
pub use show::copy_name;

fn unknown(name: &str) -> ControlError {
    error(
        "H001-unknown",
        format!("no hot copy is named {name}; `hcp -l` lists them"),
    )
}

impl Manager {
    fn copy_set(&self, volume: &str) -> Option<CopySet> {
        CopySet::load(&self.paths, volume)
    }

    /// Changes the record of a volume's hot copies, durably; `new` is what it is if there is none yet. Nobody else changes it meanwhile.
    fn change_copies(
        &self,
        volume: &str,
        new: Option<&CopySet>,
        change: impl FnOnce(&mut CopySet),
    ) -> Result<CopySet, ControlError> {
        let _records = self.copy_records();
        let Some(mut set) = self.copy_set(volume).or_else(|| new.cloned()) else {
            return Ok(CopySet::default());
        };
        change(&mut set);
        set.save(&self.paths).map_err(|why| {
            error(
                "H002-record",
                format!("the record of the hot copies of {volume}: {why}"),
            )
        })?;
        Ok(set)
    }

    /// The names of the volumes that have hot copies.
    fn copied_volumes(&self) -> Vec<String> {
        let directory = std::fs::read_dir(self.paths.copy_sets());
        let mut names: Vec<String> = directory
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                name.strip_suffix(".toml").map(str::to_owned)
            })
            .filter(|name| !name.starts_with('.'))
            .collect();
        names.sort();
        names
    }

    /// Whether a volume has hot copies; then it cannot go away.
    pub(crate) fn refuse_copied(&self, volume: &str, what: &str) -> Result<(), ControlError> {
        let Some(set) = self.copy_set(volume) else {
            return Ok(());
        };
        let names: Vec<&str> = set.copies.iter().map(|copy| copy.name.as_str()).collect();
        Err(error(
            "H003-copied",
            format!(
                "{volume} has hot copies ({}), which {what} would end. Nothing was changed; remove them first: hcp -r {}",
                names.join(", "),
                names.first().unwrap_or(&"NAME")
            ),
        ))
    }

    /// Makes the loss of hot copies durable and lets the volume go on. Never returns.
    pub fn follow_copies(&self) {
        let alerts = self.alerts.1.clone();
        for CopyAlert { volume, why } in alerts {
            eprintln!(
                "blkfilter: ALERT: the hot copies of {volume} are valid no more ({}): {}. The volume itself is not affected",
                why.name(),
                explain(why.name())
            );
            while let Err(error) =
                self.change_copies(&volume, None, |set| lose(set, why.name(), |_| true))
            {
                eprintln!("blkfilter: {error}; trying again");
                std::thread::sleep(RECORD_AGAIN);
            }
            let _ = self.tell(&volume, Message::CopiesMarked);
        }
    }

    /// All hot copies.
    pub fn copy_infos(&self) -> Vec<CopyInfo> {
        let mut infos = Vec::new();
        for name in self.copied_volumes() {
            let Some(set) = self.copy_set(&name) else {
                continue;
            };
            let volume = self.info(&name).unwrap_or_default();
            let status = self.ask(&name, ANSWER_WAIT, Message::Status).ok();
            for copy in &set.copies {
                let figures = status.as_ref().and_then(|status| {
                    status
                        .copies
                        .iter()
                        .find(|figures| figures.0 == copy.generation)
                });
                let lost = match figures.and_then(|figures| figures.2) {
                    Some(now) if copy.lost.is_empty() => now.to_owned(),
                    _ => copy.lost.clone(),
                };
                let device = self
                    .shown_copies()
                    .get(&copy.name)
                    .map(|shown| shown.device.clone());
                infos.push(CopyInfo {
                    name: copy.name.clone(),
                    volume: name.clone(),
                    device: volume.device.clone(),
                    mapped: volume.mapped.clone(),
                    copy: device.unwrap_or_default(),
                    store: set.spool.display().to_string(),
                    store_bytes: set.extents * EXTENT_BYTES,
                    store_free_bytes: status.as_ref().map_or(0, |status| status.spool_free_bytes),
                    bytes: set.volume_bytes,
                    created_ns: copy.created_ns,
                    lsn: copy.lsn,
                    frozen_us: copy.frozen_us,
                    changed_bytes: figures.map_or(0, |figures| figures.1),
                    persist: copy.persist,
                    writable: copy.writable,
                    note: explain(&lost).to_owned(),
                    lost,
                });
            }
        }
        infos
    }

    /// Ranges that were overwritten since a hot copy was cut; may be more, never less. Runs that are near each other are one, so that the list stays
    /// short.
    pub fn copy_changed(&self, name: &str) -> Result<Vec<(u64, u64)>, ControlError> {
        let (set, copy) = self.find_copy(name)?;
        let memory = origin::open_memory(
            &copy_memory_path(&self.paths, &set.volume_id, copy.generation),
            CopyMemory::bytes_needed(set.volume_bytes),
        )?;
        let memory = Memory::of_file(&memory, CopyMemory::bytes_needed(set.volume_bytes))?;
        let memory = CopyMemory::new(memory, set.volume_bytes);
        if !copy.lost.is_empty() || memory.lost().is_some() {
            let message = format!(
                "{name} is valid no more: nothing is known of what changed since. Copy everything: leave --incremental-from out"
            );
            return Err(error("H006-lost", message));
        }
        let changed = memory.changed();
        let near = (set.volume_bytes / RANGES_MAX).max(NEAR_BYTES);
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        let mut at = 0;
        while let Some((offset, length)) = changed.next_run(at, u64::MAX) {
            at = offset + length;
            match ranges.last_mut() {
                Some(last) if offset - (last.0 + last.1) < near => last.1 = at - last.0,
                _ => ranges.push((offset, length)),
            }
        }
        Ok(ranges)
    }

    fn find_copy(&self, name: &str) -> Result<(CopySet, CopySpec), ControlError> {
        let found = self.copied_volumes().into_iter().find_map(|volume| {
            let set = self.copy_set(&volume)?;
            let copy = set.copies.iter().find(|copy| copy.name == name)?.clone();
            Some((set, copy))
        });
        found.ok_or_else(|| unknown(name))
    }

    /// Ends a hot copy.
    pub fn copy_remove(&self, name: &str) -> Result<(), ControlError> {
        let _changing = self.changing();
        self.end_copy(name)
    }

    fn end_copy(&self, name: &str) -> Result<(), ControlError> {
        let (set, copy) = self.find_copy(name)?;
        self.hide_copy(name)?;
        // First the record: a copy whose blocks may be forgotten must not come back after a power cut.
        let set = self.change_copies(&set.volume, None, |set| {
            set.copies.retain(|other| other.name != name);
        })?;
        self.forget_copy(&set, &copy);
        Ok(())
    }

    /// Takes back what was made for a copy that is not to be.
    fn forget_copy(&self, set: &CopySet, copy: &CopySpec) {
        let _ = self.ask(&set.volume, ANSWER_WAIT, |reply| {
            Message::RemoveCopy(copy.generation, reply)
        });
        for path in [
            copy_memory_path(&self.paths, &set.volume_id, copy.generation),
            overlay_path(&self.paths, &set.volume_id, copy.generation),
            copy_record(&self.paths, &copy.name),
            self.paths.copies().join(&copy.name),
        ] {
            let _ = std::fs::remove_file(path);
        }
        if set.copies.is_empty() {
            self.end_spool(set);
        }
    }
}

fn identity(volume: VolumeId, file: &File) -> std::io::Result<[u8; 16]> {
    Ok(SurvivingIdentity {
        boot: origin::boot_id(),
        device: origin::identity(file)?,
        volume,
    }
    .hash())
}

fn lose(set: &mut CopySet, why: &str, which: impl Fn(&CopySpec) -> bool) {
    for copy in &mut set.copies {
        if copy.lost.is_empty() && which(copy) {
            why.clone_into(&mut copy.lost);
        }
    }
}

/// What the word means, and what to do.
fn explain(why: &str) -> &'static str {
    match why {
        "" => "",
        "full" => {
            "the place for changed blocks is full; make a new copy with a larger one (--store-size, or another -c)"
        }
        "failed" => {
            "the place for changed blocks cannot be written or read; look at its disk, make a new copy elsewhere (-c)"
        }
        "late" => {
            "the disk for changed blocks is too slow for the writes to the device; make a new copy on a faster one (-c)"
        }
        "doubt" => "the device was written without Varve meanwhile; make a new copy",
        "reboot" => "the machine was rebooted, and it was not made with --persist; make a new copy",
        _ => "see the log of blkfilter",
    }
}
