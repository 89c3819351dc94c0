//! The place for changed blocks: chosen, made, and given back.

use super::create::Source;
use super::files::{EXTENT_BYTES, SpoolFiles, make_spool, spool_memory_path};
use crate::driver::Message;
use crate::hot_copy::SpoolMemory;
use crate::manager::{ANSWER_WAIT, Manager, Slot, error};
use crate::origin;
use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;
use varve_control::{ControlError, CopySet, NewCopy};
use varve_format::VolumeId;

/// The smallest spool: what the writers that are under way may need at once.
const EXTENTS_MIN: u64 = 64;
/// By its first and last part a device is taken for one that holds data: the first is wiped at the end, the last is never written.
const WIPED_BYTES: u64 = 1 << 20;
/// The largest spool that is made unasked: 32 GiB; its index takes 144 MiB of memory.
const EXTENTS_MAX: u64 = (32 << 30) / EXTENT_BYTES;

impl Manager {
    /// Makes a spool for a volume that has none, and tells the volume.
    pub(super) fn new_spool(
        &self,
        source: &Source,
        wanted: &NewCopy,
    ) -> Result<CopySet, ControlError> {
        let spec = &source.spec;
        let place = wanted.store.clone().unwrap_or_else(|| self.paths.spools());
        let is_device = std::fs::metadata(&place).is_ok_and(|m| m.file_type().is_block_device());
        let spool = if is_device {
            varve_control::lasting_path(&place)
        } else {
            place.join(format!("{}.spool", spec.id))
        };
        if let Some(volume) = varve_control::mapped_volume_under(&self.paths, &place) {
            let message = format!(
                "{} lies on {volume}, which is protected itself: saving a block would overwrite others. Choose another place with -c",
                place.display()
            );
            return Err(error("V034-loop", message));
        }
        let slots = self.slots();
        for volume in slots.values().map(Slot::spec) {
            for taken in [&volume.device, &volume.log, &volume.state] {
                if is_device && varve_control::is_same_storage(taken, &place) {
                    let message = format!(
                        "{} belongs to the volume `{}`. Choose another place with -c. Nothing was changed",
                        place.display(),
                        volume.name
                    );
                    return Err(error("V037-same", message));
                }
            }
        }
        drop(slots);
        if !is_device {
            std::fs::create_dir_all(&place)
                .map_err(|e| error("H008-store", format!("{}: {e}", place.display())))?;
            // What an earlier daemon did not come to record.
            let _ = std::fs::remove_file(&spool);
        }
        let extents = extents_for(&place, is_device, spec.bytes, wanted)?;
        let volume = VolumeId::parse(&spec.id).unwrap_or_default();
        let mut id = [0u8; 16];
        std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut id)?;
        let set = CopySet {
            volume: spec.name.clone(),
            volume_id: spec.id.clone(),
            volume_bytes: spec.bytes,
            spool,
            spool_id: VolumeId(id).to_string(),
            extents,
            ..CopySet::default()
        };
        let failed = |e: std::io::Error| {
            let message = format!(
                "the place for changed blocks, {}: {e}. Nothing was changed; choose another with -c",
                set.spool.display()
            );
            error("H008-store", message)
        };
        let file = make_spool(&set, volume, id).map_err(failed)?;
        self.attach_spool(source, &set, file, id)
            .inspect_err(|_| self.end_spool(&set))?;
        Ok(set)
    }

    fn attach_spool(
        &self,
        source: &Source,
        set: &CopySet,
        file: File,
        id: [u8; 16],
    ) -> Result<(), ControlError> {
        let (spec, extents) = (&source.spec, set.extents);
        let memory_bytes = SpoolMemory::bytes_needed(extents);
        let memory = origin::open_memory(&spool_memory_path(&self.paths, &spec.id), memory_bytes)
            .map_err(|e| {
            error(
                "V016-memory",
                format!("memory for the hot copies: {e}; a smaller --store-size needs less"),
            )
        })?;
        let files = Box::new(SpoolFiles {
            spool: file,
            memory,
            id,
            extents,
            identity: source.identity,
            copies: Vec::new(),
        });
        self.ask(&spec.name, ANSWER_WAIT, |reply| {
            Message::AttachCopies(files, reply)
        })?
        .map_err(|why| error("V016-memory", why))
    }

    /// The last copy is gone: the spool, too.
    pub(super) fn end_spool(&self, set: &CopySet) {
        for _ in 0..100 {
            match self.ask(&set.volume, ANSWER_WAIT, Message::DetachCopies) {
                Ok(false) => std::thread::sleep(Duration::from_millis(20)), // A batch is on its way.
                _ => break,
            }
        }
        if let Err(failed) = origin::wipe(&set.spool, WIPED_BYTES)
            && failed.kind() != std::io::ErrorKind::NotFound
        {
            eprintln!("blkfilter: {}: {failed}", set.spool.display());
        }
        let _ = std::fs::remove_file(spool_memory_path(&self.paths, &set.volume_id));
    }
}

/// Extents of a new spool.
fn extents_for(
    place: &Path,
    is_device: bool,
    volume_bytes: u64,
    wanted: &NewCopy,
) -> Result<u64, ControlError> {
    let keep = |bytes: u64| bytes / 100 * u64::from(100 - wanted.quota.min(99));
    let room = if is_device {
        let geometry = origin::geometry(&File::open(place)?)?;
        keep(geometry.bytes).min(geometry.bytes.saturating_sub(WIPED_BYTES))
    } else {
        let stat = nix::sys::statvfs::statvfs(place).map_err(std::io::Error::from)?;
        let all = stat.blocks() * stat.fragment_size();
        (stat.blocks_available() * stat.fragment_size()).saturating_sub(all - keep(all))
    };
    let most = room.saturating_sub(varve_format::SPOOL_EXTENTS_AT) / EXTENT_BYTES;
    // A header for 63 blocks, and what extents lose at their ends.
    let whole_volume = (volume_bytes / EXTENT_BYTES) * 66 / 63 + EXTENTS_MIN;
    let extents = match wanted.store_bytes {
        0 if is_device => most.min(EXTENTS_MAX),
        0 => (whole_volume / 5).clamp(EXTENTS_MIN, EXTENTS_MAX).min(most),
        bytes => bytes / EXTENT_BYTES,
    };
    if extents < EXTENTS_MIN || extents > most {
        return Err(error(
            "H011-room",
            format!(
                "{} has room for {} MiB of changed blocks (-q {} keeps {} % free), {} MiB are needed. Choose another place with -c, or a smaller --store-size",
                place.display(),
                (most * EXTENT_BYTES) >> 20,
                wanted.quota,
                wanted.quota,
                (extents.max(EXTENTS_MIN) * EXTENT_BYTES) >> 20
            ),
        ));
    }
    Ok(extents)
}
