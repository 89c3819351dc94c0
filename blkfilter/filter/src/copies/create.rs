//! Making hot copies: what each needs, then one cut for all of them, with their file systems frozen for that moment.

use super::files::CopyMemoryFile;
use super::{explain, identity, unknown};
use crate::driver::Message;
use crate::freeze::Frozen;
use crate::manager::{ANSWER_WAIT, Manager, START_WAIT, Slot, error};
use crate::running::Mode;
use crossbeam_channel::{Receiver, bounded};
use std::fs::File;
use std::time::{Duration, Instant};
use varve_control::{
    ControlError, CopyInfo, CopySet, CopySpec, NewCopy, VolumeSpec, is_used_beside,
};
use varve_format::{Lsn, VolumeId};

/// Copies of one volume at most: each costs a bit per block when a block is saved.
const COPIES_MAX: usize = 64;
/// Writes are held no longer than this for a cut over several volumes.
const HOLD_MAX: Duration = Duration::from_secs(1);

/// For each copy the LSN of its cut, and who says that what was admitted before has landed.
type Instants = Vec<(Lsn, Receiver<()>)>;

/// A copy that is about to be cut.
struct CutCopy {
    spec: CopySpec,
    /// The volume's copies before it.
    set: CopySet,
    note: String,
}

impl CutCopy {
    fn add_note(&mut self, text: &str) {
        if !self.note.is_empty() {
            self.note += "; ";
        }
        self.note += text;
    }
}

/// What is known of a volume that is to be copied.
pub(super) struct Source {
    pub spec: VolumeSpec,
    mapped: String,
    pub identity: [u8; 16],
}

impl Manager {
    /// Makes hot copies of one instant, and shows them.
    pub fn copy_create(
        &self,
        wanted: &[NewCopy],
        persist: bool,
        writable: bool,
        freeze: bool,
    ) -> Result<Vec<CopyInfo>, ControlError> {
        let _changing = self.changing();
        let mut sources = Vec::new();
        for (index, copy) in wanted.iter().enumerate() {
            if wanted[..index]
                .iter()
                .any(|other| other.volume == copy.volume)
            {
                let message = format!("{} is named twice", copy.volume);
                return Err(error("H004-twice", message));
            }
            sources.push(self.source(&copy.volume)?);
        }
        let mut cuts: Vec<CutCopy> = Vec::new();
        for (source, copy) in sources.iter().zip(wanted) {
            let prepared = self.prepare_copy(source, copy, &cuts, (persist, writable));
            cuts.push(prepared.inspect_err(|_| {
                // Spools that were made for the others.
                for cut in cuts.iter().filter(|cut| cut.set.copies.is_empty()) {
                    self.end_spool(&cut.set);
                }
            })?);
        }
        if let Err(failed) = self.cut_all(&sources, &mut cuts, freeze) {
            self.take_back(&cuts);
            return Err(failed);
        }
        let mut infos = Vec::new();
        for (source, cut) in sources.iter().zip(&cuts) {
            if let Err(failed) = self.show_copy(&source.spec, &cut.set, &cut.spec) {
                for cut in &cuts {
                    let _ = self.end_copy(&cut.spec.name);
                }
                return Err(failed);
            }
        }
        for cut in &cuts {
            let all = self.copy_infos();
            let found = all.into_iter().find(|info| info.name == cut.spec.name);
            infos.push(CopyInfo {
                note: cut.note.clone(),
                ..found.ok_or_else(|| unknown(&cut.spec.name))?
            });
        }
        Ok(infos)
    }

    /// None of them is to be.
    fn take_back(&self, cuts: &[CutCopy]) {
        for cut in cuts {
            let volume = cut.set.volume.clone();
            let changed = self.change_copies(&volume, Some(&cut.set), |set| {
                set.copies.retain(|copy| copy.name != cut.spec.name);
                // Never used again: blocks may have been saved under it.
                set.generation_last = set.generation_last.max(cut.spec.generation);
            });
            match changed {
                Ok(set) => self.forget_copy(&set, &cut.spec),
                Err(error) => eprintln!("blkfilter: {error}"),
            }
        }
    }

    fn source(&self, name: &str) -> Result<Source, ControlError> {
        let (spec, mapped) = {
            let slots = self.slots();
            match slots.get(name) {
                Some(Slot::Running(running)) if running.mode == Mode::Offered => {
                    (running.spec.clone(), running.mapped.clone())
                }
                Some(_) => {
                    return Err(error(
                        "H005-idle",
                        format!("volume {name} is not being offered now; see `varve status`"),
                    ));
                }
                None => {
                    return Err(error(
                        "V019-unknown",
                        format!("no volume is named {name}; `varve status` lists them"),
                    ));
                }
            }
        };
        let volume = VolumeId::parse(&spec.id)
            .ok_or_else(|| error("V029-id", "the volume's id is not 32 hex digits"))?;
        let identity = identity(volume, &File::open(&spec.device)?)?;
        Ok(Source {
            spec,
            mapped,
            identity,
        })
    }

    /// Spool, record and memory of a copy that is to be cut.
    fn prepare_copy(
        &self,
        source: &Source,
        wanted: &NewCopy,
        others: &[CutCopy],
        (persist, writable): (bool, bool),
    ) -> Result<CutCopy, ControlError> {
        let spec = &source.spec;
        let infos = self.copy_infos();
        let is_taken = |name: &str| {
            infos.iter().any(|info| info.name == name)
                || others.iter().any(|cut| cut.spec.name == name)
        };
        let name = if wanted.name.is_empty() {
            (1u32..)
                .map(|number| format!("hcp{number}"))
                .find(|name| !is_taken(name))
                .unwrap_or_default()
        } else {
            wanted.name.clone()
        };
        let full = self
            .copy_set(&spec.name)
            .is_some_and(|set| set.copies.len() >= COPIES_MAX);
        let fits = (1..=32).contains(&name.len())
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
            && !name.starts_with('.');
        let taken = is_taken(&name);
        if !fits || taken || full {
            let message = if taken {
                format!(
                    "a hot copy named {name} exists; choose another name, or remove it: hcp -r {name}"
                )
            } else if fits {
                format!(
                    "{} has {COPIES_MAX} hot copies, which is the most; remove one first: hcp -l",
                    spec.name
                )
            } else {
                format!(
                    "{name:?} cannot be the name of a copy: 1 to 32 letters, digits, `-`, `_`, `.`"
                )
            };
            return Err(error("H007-name", message));
        }
        let mut note = String::new();
        let set = match self.copy_set(&spec.name) {
            Some(set) if set.copies.iter().any(|copy| copy.lost.is_empty()) => {
                if let Some(store) = &wanted.store
                    && !set.spool.starts_with(store)
                {
                    note = format!(
                        "all hot copies of {} share {}: not {}",
                        spec.name,
                        set.spool.display(),
                        store.display()
                    );
                }
                set
            }
            Some(set) => {
                return Err(error(
                    "H006-lost",
                    format!(
                        "the hot copies of {} are valid no more; remove them first: hcp -r {}",
                        spec.name,
                        set.copies.first().map_or("NAME", |copy| copy.name.as_str())
                    ),
                ));
            }
            None => self.new_spool(source, wanted)?,
        };
        Ok(CutCopy {
            spec: CopySpec {
                name,
                generation: set.generation_last + 1,
                persist,
                writable,
                ..CopySpec::default()
            },
            set,
            note,
        })
    }

    /// The cut itself: freeze, hold, cut, go on, thaw, record.
    fn cut_all(
        &self,
        sources: &[Source],
        cuts: &mut [CutCopy],
        freeze: bool,
    ) -> Result<(), ControlError> {
        let mut memories = Vec::new();
        for (source, cut) in sources.iter().zip(cuts.iter()) {
            memories.push(self.copy_memory(&source.spec, source.identity, &cut.spec)?);
        }
        let frozen = if freeze {
            self.freeze_sources(sources, cuts)?
        } else {
            None
        };
        let outcome = self.cut_held(sources, memories);
        let in_time = frozen
            .as_ref()
            .is_none_or(|frozen| Instant::now() < frozen.until());
        let frozen_for = frozen.map(Frozen::thaw);
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_nanos() as i64);
        outcome.and_then(|(instants, held)| {
            for ((cut, source), (lsn, settled)) in cuts.iter_mut().zip(sources).zip(instants) {
                cut.spec.created_ns = now;
                cut.spec.lsn = lsn.0;
                if let Some(held) = held {
                    cut.add_note(&format!(
                        "writes to all of them were held for {:.3} seconds",
                        held.as_secs_f64()
                    ));
                }
                match frozen_for {
                    Some(pause) if in_time => cut.spec.frozen_us = pause.as_micros() as u64,
                    Some(_) => cut.add_note("the file system was thawed at its deadline, before the cut: the copy is crash-consistent"),
                    None => {}
                }
                settled.recv_timeout(START_WAIT).map_err(|_| {
                    let message = format!("volume {} did not land its writes in time", source.spec.name);
                    error("V020-late", message)
                })?;
                let (set, spec) = (cut.set.clone(), cut.spec.clone());
                cut.set = self.change_copies(&source.spec.name, Some(&set), |set| {
                    set.generation_last = spec.generation;
                    set.copies.push(spec);
                })?;
                // Given up meanwhile: whoever made that known may not have found it in the record.
                let status = self.ask(&source.spec.name, ANSWER_WAIT, Message::Status)?;
                let lost = status
                    .copies
                    .iter()
                    .find(|copy| copy.0 == cut.spec.generation)
                    .and_then(|copy| copy.2);
                if let Some(why) = lost {
                    let message = format!(
                        "the copy was given up while it was made ({why}): {}",
                        explain(why)
                    );
                    return Err(error("H006-lost", message));
                }
            }
            Ok(())
        })
    }

    fn freeze_sources(
        &self,
        sources: &[Source],
        cuts: &mut [CutCopy],
    ) -> Result<Option<Frozen>, ControlError> {
        let mapped = sources.iter().map(|source| source.mapped.as_str());
        let spools = cuts.iter().map(|cut| cut.set.spool.clone());
        let frozen = self
            .freeze_devices(mapped, spools.collect())
            .map_err(|mut refused| {
                refused.message += "; use --no-freeze, or move that";
                refused
            })?;
        let frozen = match frozen {
            Ok(frozen) => frozen,
            Err(why) => {
                for cut in cuts.iter_mut() {
                    cut.add_note(&format!("not frozen ({why}): the copy is crash-consistent"));
                }
                return Ok(None);
            }
        };
        let places = frozen.as_ref().map_or(&[][..], Frozen::directories);
        for (source, cut) in sources.iter().zip(cuts.iter_mut()) {
            if is_used_beside(&source.mapped, places) {
                cut.add_note(&format!(
                    "{} is in use by more than file systems that could be frozen, or has a part of one that lies on other devices, too: those are as a power cut would leave them",
                    source.mapped
                ));
            }
        }
        Ok(frozen)
    }

    /// Cuts all of them at one instant: where there are several, writes to all are held meanwhile. Gives for how long.
    fn cut_held(
        &self,
        sources: &[Source],
        memories: Vec<CopyMemoryFile>,
    ) -> Result<(Instants, Option<Duration>), ControlError> {
        let several = sources.len() > 1;
        let begun = Instant::now();
        let release = || {
            for source in sources.iter().filter(|_| several) {
                let _ = self.tell(&source.spec.name, Message::GoOn);
            }
        };
        let cut = || {
            for source in sources.iter().filter(|_| several) {
                self.ask(&source.spec.name, HOLD_MAX, |reply| {
                    Message::Hold(HOLD_MAX, reply)
                })?;
            }
            let mut asked = Vec::new();
            for (source, memory) in sources.iter().zip(memories) {
                let (cut_in, cut) = bounded(1);
                let (settled_in, settled) = bounded(1);
                self.tell(&source.spec.name, Message::Cut(memory, cut_in, settled_in))?;
                asked.push((cut, settled));
            }
            let mut instants = Vec::new();
            for (cut, settled) in asked {
                let lsn = cut
                    .recv_timeout(ANSWER_WAIT)
                    .map_err(|_| error("V020-late", "a volume did not cut in time"))?
                    .map_err(|why| error("H008-store", why))?;
                instants.push((lsn, settled));
            }
            if several && begun.elapsed() >= HOLD_MAX {
                return Err(error(
                    "H010-instant",
                    "the volumes could not be held until all were cut: the copies would not be of one instant. None was made; try again",
                ));
            }
            Ok(instants)
        };
        let outcome = cut();
        release();
        outcome.map(|instants| (instants, several.then(|| begun.elapsed())))
    }
}
