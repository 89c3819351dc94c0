//! Hot copies when their volume starts: opened, believed or given up, shown again.

use super::files::{CopyMemoryFile, SpoolFiles, copy_memory_path, open_spool, spool_memory_path};
use super::{identity, lose};
use crate::hot_copy::{CopyMemory, Lost, SpoolMemory};
use crate::manager::Manager;
use crate::origin;
use crate::places::LATE_WAIT;
use std::fs::File;
use varve_control::{CopySet, CopySpec, VolumeSpec};
use varve_format::{Lsn, VolumeId};
use varve_log::Memory;

impl Manager {
    /// Opens what a volume that starts needs for its hot copies. Trouble with them never keeps the volume from starting: then they are lost.
    pub(crate) fn copies_at_start(
        &self,
        spec: &VolumeSpec,
        origin_file: &File,
    ) -> Option<SpoolFiles> {
        let set = self.copy_set(&spec.name)?;
        let opened = self.open_copies(spec, &set, origin_file);
        match opened {
            Ok(files) => files,
            Err(why) => {
                eprintln!("blkfilter: {}: its hot copies are lost: {why}", spec.name);
                let why = if set.volume_bytes == spec.bytes {
                    "failed"
                } else {
                    "doubt"
                };
                // Those that are shown must not go on as if nothing were.
                self.lose_in_memory(&set);
                let marked = self.change_copies(&spec.name, None, |set| lose(set, why, |_| true));
                if let Err(error) = marked {
                    eprintln!("blkfilter: {error}");
                }
                None
            }
        }
    }

    fn open_copies(
        &self,
        spec: &VolumeSpec,
        set: &CopySet,
        origin_file: &File,
    ) -> Result<Option<SpoolFiles>, String> {
        if set.copies.iter().all(|copy| !copy.lost.is_empty()) {
            return Ok(None);
        }
        if set.volume_id != spec.id {
            return Err("they are of another volume of this name".to_owned());
        }
        if set.volume_bytes != spec.bytes {
            return Err("the device has changed its size".to_owned());
        }
        let text = |error: std::io::Error| error.to_string();
        // At a boot disks and file systems come when they come.
        let since = std::time::Instant::now();
        let lasting = set
            .copies
            .iter()
            .any(|copy| copy.persist && copy.lost.is_empty());
        while lasting && !set.spool.exists() && since.elapsed() < LATE_WAIT {
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        let (volume, id) = ids(set).ok_or("their record is damaged")?;
        let spool = open_spool(set, volume, id)
            .map_err(|error| format!("{}: {error}", set.spool.display()))?;
        let memory_bytes = SpoolMemory::bytes_needed(set.extents);
        let memory = origin::open_memory(&spool_memory_path(&self.paths, &spec.id), memory_bytes)
            .map_err(text)?;
        let identity = identity(volume, origin_file).map_err(text)?;
        let valid = set.copies.iter().filter(|copy| copy.lost.is_empty());
        let copies = valid
            .map(|copy| self.copy_memory(spec, identity, copy))
            .collect::<std::io::Result<_>>()
            .map_err(text)?;
        Ok(Some(SpoolFiles {
            spool,
            memory,
            id,
            extents: set.extents,
            identity,
            copies,
        }))
    }

    fn lose_in_memory(&self, set: &CopySet) {
        let bytes = CopyMemory::bytes_needed(set.volume_bytes);
        for copy in &set.copies {
            let path = copy_memory_path(&self.paths, &set.volume_id, copy.generation);
            let file = File::options().read(true).write(true).open(path);
            let whole = file.and_then(|file| {
                (file.metadata()?.len() >= bytes as u64)
                    .then(|| Memory::of_file(&file, bytes))
                    .transpose()
            });
            if let Ok(Some(memory)) = whole {
                CopyMemory::new(memory, set.volume_bytes).lose(Lost::Failed);
            }
        }
    }

    pub(super) fn copy_memory(
        &self,
        spec: &VolumeSpec,
        identity: [u8; 16],
        copy: &CopySpec,
    ) -> std::io::Result<CopyMemoryFile> {
        let path = copy_memory_path(&self.paths, &spec.id, copy.generation);
        Ok(CopyMemoryFile {
            file: origin::open_memory(&path, CopyMemory::bytes_needed(spec.bytes))?,
            generation: copy.generation,
            persist: copy.persist,
            volume_bytes: spec.bytes,
            identity,
        })
    }

    /// After a volume has started: notes which copies did not outlive the reboot, and shows the others.
    pub(crate) fn copies_started(
        &self,
        spec: &VolumeSpec,
        gone: &[u32],
        newest: u32,
        history_end: Lsn,
    ) {
        let changed = self.change_copies(&spec.name, None, |set| {
            lose(set, "reboot", |copy| gone.contains(&copy.generation));
            set.generation_last = set.generation_last.max(newest);
            // A power cut may have taken the records before the cut: its number means another instant now.
            for copy in set
                .copies
                .iter_mut()
                .filter(|copy| copy.lsn > history_end.0)
            {
                copy.lsn = 0;
            }
        });
        let set = match changed {
            Ok(set) => set,
            Err(error) => {
                eprintln!("blkfilter: {error}");
                return;
            }
        };
        for copy in &set.copies {
            if self.shown_copies().contains_key(&copy.name) {
                continue; // The volume was only restarted.
            }
            if let Err(error) = self.show_copy(spec, &set, copy) {
                eprintln!("blkfilter: hot copy {}: {error}", copy.name);
            }
        }
    }
}

fn ids(set: &CopySet) -> Option<(VolumeId, [u8; 16])> {
    Some((
        VolumeId::parse(&set.volume_id)?,
        VolumeId::parse(&set.spool_id)?.0,
    ))
}
