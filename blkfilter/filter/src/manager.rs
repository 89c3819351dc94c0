//! All volumes of one daemon: opening, showing, taking away, closing. A thread (ublk: two) per volume; this room only talks to them.

use crate::copies::ShownCopy;
use crate::driver::{CopyAlert, Message};
use crate::origin;
use crate::places::{holds_log, is_apart, open_log, open_state};
use crate::running::{Files, Mode, Running, ublk_record};
use crate::{AckPolicy, SurvivingMemory, VolumeConfig};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use varve_control::{Ack, ControlError, Paths, SpecError, VolumeInfo, VolumeSpec};
use varve_format::{Lsn, SegmentSequence, VolumeId, WallTime};
use varve_front::Geometry;

/// How long a volume's start may take: its newest log segment is read, and a surviving buffer written.
pub(crate) const START_WAIT: Duration = Duration::from_secs(60);
pub(crate) const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// How a volume is opened.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    /// It must have everything, and takes over nobody's data.
    New,
    /// It is offered even if its log or state file is gone: in bypass.
    Known,
    /// The same, some time after it failed: nothing is waited for.
    Again,
}

pub(crate) enum Slot {
    Running(Box<Running>),
    Failed(VolumeSpec, ControlError),
    /// Begins at the next boot.
    Waiting(VolumeSpec),
    /// Is closed and opened again: it is protected, and comes back in a moment.
    Starting(VolumeSpec),
}

/// Code of the error for a device that is not there (yet).
const MISSING: &str = "V027-missing";
/// What may pass by itself: not there, busy for a moment, of no size yet.
const RETRIED: [&str; 4] = [MISSING, "V012-busy", "V013-device", "V028-size"];
/// A device that is smaller than this is none.
const DEVICE_BYTES_MIN: u64 = 1 << 20;

/// All volumes.
pub struct Manager {
    pub(crate) paths: Paths,
    slots: Mutex<BTreeMap<String, Slot>>,
    /// Volumes whose files cannot be read, and why: they do not run, and that is said.
    unread: Mutex<Vec<VolumeInfo>>,
    /// Held by whatever adds, removes or restarts a volume: one at a time.
    changing: Mutex<()>,
    /// Hot copies that are shown, by name.
    shown_copies: Mutex<BTreeMap<String, ShownCopy>>,
    /// Held while a record of hot copies is read, changed and written.
    copy_records: Mutex<()>,
    /// Volumes tell that their hot copies are lost.
    pub(crate) alerts: (Sender<CopyAlert>, Receiver<CopyAlert>),
}

pub(crate) fn error(code: &str, message: impl std::fmt::Display) -> ControlError {
    ControlError::new(code, message)
}

impl Slot {
    pub(crate) fn spec(&self) -> &VolumeSpec {
        match self {
            Slot::Running(running) => &running.spec,
            Slot::Failed(spec, _) | Slot::Waiting(spec) | Slot::Starting(spec) => spec,
        }
    }
}

impl Manager {
    /// A manager of the volumes under `paths`.
    #[must_use]
    pub fn new(paths: Paths) -> Manager {
        Manager {
            paths,
            slots: Mutex::new(BTreeMap::new()),
            unread: Mutex::default(),
            changing: Mutex::new(()),
            shown_copies: Mutex::new(BTreeMap::new()),
            copy_records: Mutex::new(()),
            alerts: unbounded(),
        }
    }

    pub(crate) fn slots(&self) -> MutexGuard<'_, BTreeMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn shown_copies(&self) -> MutexGuard<'_, BTreeMap<String, ShownCopy>> {
        self.shown_copies
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn copy_records(&self) -> MutexGuard<'_, ()> {
        self.copy_records
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens volumes whose device was not there before: at a boot disks come when they come.
    pub fn open_late_ones(&self) {
        let _changing = self.changing();
        let missing = |slot: &Slot| match slot {
            Slot::Failed(spec, why)
                if RETRIED.contains(&why.code.as_str()) && spec.device.exists() =>
            {
                Some(spec.clone())
            }
            _ => None,
        };
        let specs: Vec<VolumeSpec> = self.slots().values().filter_map(missing).collect();
        for spec in specs {
            let name = spec.name.clone();
            let Err(error) = self.open_with(spec.clone(), None, How::Again) else {
                continue;
            };
            let slot = Slot::Failed(spec, error.clone());
            let before = self.slots().insert(name.clone(), slot);
            // Said once, not four times a second.
            if !matches!(before, Some(Slot::Failed(_, old)) if old.code == error.code) {
                eprintln!("blkfilter: {name}: {error}");
            }
        }
    }

    /// Opens every volume that has a file. One that fails does not keep the others from starting.
    pub fn open_all(&self) {
        let _changing = self.changing();
        for spec in varve_control::load_specs(&self.paths.volumes()) {
            match spec {
                Ok(spec) if spec.begins_after_boot == origin::boot_id() => {
                    self.slots().insert(spec.name.clone(), Slot::Waiting(spec));
                }
                Ok(spec) => {
                    // One that is protected is not one that was.
                    let former = self
                        .paths
                        .former_volumes()
                        .join(format!("{}.toml", spec.id));
                    let _ = std::fs::remove_file(former);
                    let name = spec.name.clone();
                    if let Err(error) = self.open(spec.clone(), None) {
                        eprintln!("blkfilter: {name}: {error}");
                        self.slots().insert(name, Slot::Failed(spec, error));
                    }
                }
                Err(why) => {
                    eprintln!("blkfilter: {why}");
                    let mut unread = self.unread.lock().unwrap_or_else(PoisonError::into_inner);
                    unread.push(unread_info(&why));
                }
            }
        }
    }

    /// Protects a new volume: claims the device, makes its files, starts it, and only then writes the file that lasts.
    pub fn protect(&self, mut spec: VolumeSpec) -> Result<VolumeInfo, ControlError> {
        let _changing = self.changing();
        self.refuse_taken(&spec)?;
        let name = spec.name.clone();
        let there: Vec<PathBuf> = self
            .places(&spec)
            .map(|place| place.0)
            .into_iter()
            .filter(|path| path.exists())
            .collect();
        self.open_with(spec.clone(), None, How::New)
            .inspect_err(|_| {
                // What was made for it goes again; what was there before stays.
                self.wipe_places(&spec, |path| !there.contains(path));
            })?;
        spec.apart = is_apart(&spec, &self.paths.volumes());
        varve_control::save_spec(&self.paths.volumes(), &spec)
            .map_err(|e| error("V011-config", e))?;
        self.info(&name)
    }

    /// Makes log, state file and the file that lasts for a device that is in use now.
    pub fn prepare(&self, mut spec: VolumeSpec) -> Result<VolumeInfo, ControlError> {
        let _changing = self.changing();
        self.refuse_taken(&spec)?;
        spec.begins_after_boot = origin::boot_id();
        config_of(&spec)?;
        open_log(&spec, true)?;
        open_state(&spec, true)?;
        spec.apart = is_apart(&spec, &self.paths.volumes());
        varve_control::save_spec(&self.paths.volumes(), &spec)
            .map_err(|e| error("V011-config", e))?;
        let name = spec.name.clone();
        self.slots().insert(name.clone(), Slot::Waiting(spec));
        self.info(&name)
    }

    /// A name or a device that a volume has already; a log that would record its own writes.
    fn refuse_taken(&self, spec: &VolumeSpec) -> Result<(), ControlError> {
        if self.slots().contains_key(&spec.name) {
            let message = format!(
                "a volume named {} is protected already; choose another with --name",
                spec.name
            );
            return Err(error("V010-exists", message));
        }
        for path in [&spec.log, &spec.state, &self.paths.store()] {
            if let Some(volume) = varve_control::mapped_volume_under(&self.paths, path) {
                let message = format!(
                    "{} lies on {volume}, which is protected itself: it would record its own writes. Choose another place",
                    path.display()
                );
                return Err(error("V034-loop", message));
            }
        }
        let own = [
            ("the device", &spec.device),
            ("the log", &spec.log),
            ("the state file", &spec.state),
        ];
        for (index, (what, path)) in own.iter().enumerate() {
            for (other, second) in &own[index + 1..] {
                if varve_control::is_same_storage(path, second) {
                    let message = format!(
                        "{what} {} and {other} {} are the same storage: one would overwrite the other. Choose another place. Nothing was changed",
                        path.display(),
                        second.display()
                    );
                    return Err(error("V037-same", message));
                }
            }
        }
        let slots = self.slots();
        for volume in slots.values().map(Slot::spec) {
            let taken = [&volume.device, &volume.log, &volume.state];
            if let Some((what, path)) = own.iter().skip(1).find(|(_, path)| {
                taken
                    .iter()
                    .any(|place| varve_control::is_same_storage(place, path))
            }) {
                let message = format!(
                    "{what} {} belongs to the volume `{}`. Choose another place. Nothing was changed",
                    path.display(),
                    volume.name
                );
                return Err(error("V037-same", message));
            }
        }
        let specs = slots.values().map(Slot::spec);
        if let Some(other) = specs
            .into_iter()
            .find(|other| varve_control::is_same_storage(&other.device, &spec.device))
        {
            let message = format!(
                "{} is protected already, as `{}`",
                spec.device.display(),
                other.name
            );
            return Err(error("V010-exists", message));
        }
        Ok(())
    }

    /// Opens a volume that was stopped; if that fails, it stays known as failed.
    pub(crate) fn reopen(&self, spec: VolumeSpec) -> Result<(), ControlError> {
        self.open(spec.clone(), None).inspect_err(|failed| {
            let name = spec.name.clone();
            eprintln!("blkfilter: {name}: {failed}");
            self.slots()
                .insert(name, Slot::Failed(spec.clone(), failed.clone()));
        })
    }

    pub(crate) fn open(&self, spec: VolumeSpec, rewind: Option<Lsn>) -> Result<(), ControlError> {
        self.open_with(spec, rewind, How::Known)
    }

    /// Opens a volume. A rewind whose end had its place in memory only, when its daemon was killed, has ended once that is in the log: then the device is
    /// shown.
    fn open_with(
        &self,
        spec: VolumeSpec,
        rewind: Option<Lsn>,
        how: How,
    ) -> Result<(), ControlError> {
        let name = spec.name.clone();
        if self.open_once(spec, rewind, how)? {
            let spec = self.stop(&name)?;
            self.open_once(spec, None, How::Known)?;
        }
        Ok(())
    }

    /// Opens it; says whether it takes writes of a rewind of which it then knows nothing.
    fn open_once(
        &self,
        spec: VolumeSpec,
        rewind: Option<Lsn>,
        how: How,
    ) -> Result<bool, ControlError> {
        let strict = how == How::New;
        let recover = self.recorded_ublk(&spec.name);
        let origin = origin::claim_origin(
            &spec.device,
            how != How::Again && (recover.is_some() || self.memory_path(&spec).exists()),
        )
        .map_err(|e| claim_error(&spec.device, &e))?;
        let mut geometry = origin::geometry(&origin)
            .map_err(|e| error("V013-device", format!("{}: {e}", spec.device.display())))?;
        let mut spec = spec;
        let resized = follow_size(&mut spec, &mut geometry, recover.is_some(), strict)?;
        let config = config_of(&spec)?;
        let log = open_log(&spec, strict)?;
        let state = open_state(&spec, strict)?;
        let memory_bytes = SurvivingMemory::bytes_needed(&config);
        let memory = origin::open_memory(&self.memory_path(&spec), memory_bytes).map_err(|e| {
            error(
                "V016-memory",
                format!("surviving memory under {}: {e}", self.paths.run().display()),
            )
        })?;
        let copies = self.copies_at_start(&spec, &origin);
        let files = Files {
            origin,
            log,
            state,
            memory,
            memory_bytes,
            copies,
            alerts: self.alerts.0.clone(),
        };
        let interrupted = rewind.is_none().then(|| files.peek(&config)).flatten();
        let mode = if rewind.is_some() || interrupted.is_some() {
            Mode::Rewinding(rewind)
        } else {
            Mode::Offered
        };
        let running = Running::launch(&self.paths, spec, config, geometry, files, mode, recover)?;
        if resized
            && let Err(failed) = varve_control::save_spec(&self.paths.volumes(), &running.spec)
        {
            eprintln!("blkfilter: {}: {failed}", running.spec.name);
        }
        let (spec, attached) = (running.spec.clone(), running.attached.clone());
        let history_end = running.history_end;
        let has_ended =
            matches!(running.mode, Mode::Rewinding(None)) && running.rewind_target.is_none();
        self.slots()
            .insert(running.spec.name.clone(), Slot::Running(Box::new(running)));
        let (gone, newest) = attached.unwrap_or_default();
        self.copies_started(&spec, &gone, newest, history_end);
        Ok(has_ended)
    }

    fn memory_path(&self, spec: &VolumeSpec) -> PathBuf {
        self.paths.run().join(format!("{}.memory", spec.id))
    }

    /// The ublk device that an earlier daemon of this boot left behind.
    fn recorded_ublk(&self, name: &str) -> Option<u32> {
        varve_front::ublk::recorded(&ublk_record(&self.paths, name))
    }

    /// A volume's figures.
    pub fn info(&self, name: &str) -> Result<VolumeInfo, ControlError> {
        let slots = self.slots();
        match slots.get(name) {
            Some(Slot::Running(running)) => Ok(running.info()),
            Some(Slot::Failed(spec, why)) => Ok(idle_info(spec, "failed", &why.to_string())),
            Some(Slot::Waiting(spec)) => Ok(idle_info(
                spec,
                "waiting",
                "protection begins at the next boot",
            )),
            Some(Slot::Starting(spec)) => Ok(idle_info(spec, "starting", "it is being opened")),
            None => Err(error(
                "V019-unknown",
                format!("no volume is named {name}; `varve status` lists them"),
            )),
        }
    }

    /// All volumes' figures.
    pub fn infos(&self) -> Vec<VolumeInfo> {
        let names: Vec<String> = self.slots().keys().cloned().collect();
        let unread = self.unread.lock().unwrap_or_else(PoisonError::into_inner);
        let infos = names.iter().filter_map(|name| self.info(name).ok());
        let is_there = |unread: &&VolumeInfo| {
            let file = self.paths.volumes().join(format!("{}.toml", unread.name));
            !names.contains(&unread.name) && file.exists()
        };
        infos
            .chain(unread.iter().filter(is_there).cloned())
            .collect()
    }

    /// Sends a message to a volume's thread.
    /// Of every volume, whatever its state.
    pub(crate) fn specs(&self) -> Vec<VolumeSpec> {
        self.slots()
            .values()
            .map(|slot| slot.spec().clone())
            .collect()
    }

    /// Where a running volume is shown.
    pub(crate) fn mapped(&self, name: &str) -> Result<String, ControlError> {
        match self.slots().get(name) {
            Some(Slot::Running(running)) => Ok(running.mapped.clone()),
            _ => Err(error(
                "V019-unknown",
                format!("no running volume is named {name}; `varve status` lists them"),
            )),
        }
    }

    pub(crate) fn tell(&self, name: &str, message: Message) -> Result<(), ControlError> {
        let slots = self.slots();
        let Some(Slot::Running(running)) = slots.get(name) else {
            return Err(error(
                "V019-unknown",
                format!("no running volume is named {name}; `varve status` lists them"),
            ));
        };
        let _ = running.messages.send(message);
        running.waker.wake();
        Ok(())
    }

    pub(crate) fn ask<T>(
        &self,
        name: &str,
        wait: Duration,
        message: impl FnOnce(Sender<T>) -> Message,
    ) -> Result<T, ControlError> {
        let (reply, answer) = bounded(1);
        self.tell(name, message(reply))?;
        answer.recv_timeout(wait).map_err(|_| {
            error(
                "V020-late",
                format!("volume {name} did not answer in {} s", wait.as_secs()),
            )
        })
    }

    /// Seals the open segment.
    pub fn seal(&self, name: &str) -> Result<(SegmentSequence, Lsn), ControlError> {
        self.ask(name, ANSWER_WAIT, Message::Seal)
    }

    /// The history lacks something: everything is compared, and what differs copied. Whether that has begun.
    pub fn doubt(&self, name: &str) -> Result<bool, ControlError> {
        self.ask(name, ANSWER_WAIT, Message::Doubt)
    }

    /// The history ends behind the log: an epoch begins behind it. Whether that could be done now.
    pub fn go_on_above(
        &self,
        name: &str,
        end: (SegmentSequence, Lsn),
        since: WallTime,
    ) -> Result<bool, ControlError> {
        self.ask(name, ANSWER_WAIT, |reply| {
            Message::GoOnAbove(end, since, reply)
        })
    }

    /// A comparison with the history has come this far; whether it should go on.
    pub fn verified(
        &self,
        name: &str,
        number: u64,
        below: u64,
        equal: Vec<(u64, u64)>,
    ) -> Result<bool, ControlError> {
        self.ask(name, ANSWER_WAIT, |reply| {
            Message::Verified(number, below, equal, reply)
        })
    }

    /// The store has everything below.
    pub fn release(&self, name: &str, below: SegmentSequence) -> Result<(), ControlError> {
        let _ = self.tell(name, Message::Release(below)); // Gone meanwhile: nothing to release.
        Ok(())
    }

    /// Stops a volume cleanly; gives back its spec. Until its caller opens it again, or takes it out, it is said to be starting.
    pub(crate) fn stop(&self, name: &str) -> Result<VolumeSpec, ControlError> {
        {
            let slots = self.slots();
            match slots.get(name) {
                Some(Slot::Running(running)) => {
                    if !running.mapped.is_empty() && is_busy(&running.mapped) {
                        return Err(error(
                            "V012-busy",
                            format!(
                                "{} is mounted or in use; unmount it first (`findmnt {}` shows where)",
                                running.mapped, running.mapped
                            ),
                        ));
                    }
                }
                Some(Slot::Failed(spec, _) | Slot::Waiting(spec)) => return Ok(spec.clone()),
                Some(Slot::Starting(_)) => {
                    let message = format!("{name} is being opened; say it again in a moment");
                    return Err(error("V012-busy", message));
                }
                None => {
                    return Err(error(
                        "V019-unknown",
                        format!("no volume is named {name}; `varve status` lists them"),
                    ));
                }
            }
        }
        let running = {
            let mut slots = self.slots();
            match slots.remove(name) {
                Some(Slot::Running(running)) => {
                    // Whoever looks meanwhile is not told that there is no such volume.
                    let slot = Slot::Starting(running.spec.clone());
                    slots.insert(name.to_owned(), slot);
                    running
                }
                other => {
                    other.and_then(|slot| slots.insert(name.to_owned(), slot));
                    return Err(error(
                        "V019-unknown",
                        format!("no running volume is named {name}"),
                    ));
                }
            }
        };
        running.stopper.stop();
        let closed = running
            .closed
            .recv_timeout(START_WAIT)
            .unwrap_or_else(|_| Err("it did not close in time".to_owned()));
        if let Ok(Err(why)) = running.thread.join() {
            eprintln!("blkfilter: {name}: {why}");
        }
        let _ = std::fs::remove_file(ublk_record(&self.paths, name));
        let _ = std::fs::remove_file(self.paths.devices().join(name));
        if let Err(why) = closed {
            eprintln!("blkfilter: {name}: {why}");
        }
        Ok(running.spec)
    }

    /// Where a volume keeps what is its own, and how many bytes.
    fn places(&self, spec: &VolumeSpec) -> [(PathBuf, u64); 3] {
        let slots = varve_format::STATE_SLOTS * varve_format::STATE_SLOT_BYTES;
        [
            (spec.log.clone(), spec.segment_bytes * spec.segment_count),
            (spec.state.clone(), slots as u64),
            (self.memory_path(spec), 0),
        ]
    }

    fn wipe_places(&self, spec: &VolumeSpec, wanted: impl Fn(&PathBuf) -> bool) {
        for (path, bytes) in self.places(spec) {
            // A device only if it still is the one: its name may mean another by now.
            if wanted(&path)
                && (path.is_file() || (path == spec.log && path.exists() && holds_log(spec)))
                && let Err(failed) = origin::wipe(&path, bytes)
            {
                eprintln!("blkfilter: {}: {}: {failed}", spec.name, path.display());
            }
        }
    }

    /// Ends protection: the origin is a plain disk again. Log and state file are removed; the store keeps its history.
    pub fn unprotect(&self, name: &str) -> Result<(), ControlError> {
        let _changing = self.changing();
        self.refuse_copied(name, "unprotecting")?;
        let begun = match self.slots().get(name) {
            Some(Slot::Waiting(_)) | None => None,
            Some(slot) => Some(slot.spec().clone()),
        };
        let former = self.paths.former_volumes();
        if let Some(spec) = &begun {
            // Its history is found by that. Before anything is ended: then nothing is half done.
            varve_control::save_former(&former, spec).map_err(|e| error("V011-config", e))?;
        }
        let take_back = || {
            if let Some(spec) = &begun {
                let _ = std::fs::remove_file(former.join(format!("{}.toml", spec.id)));
            }
        };
        let spec = self.stop(name).inspect_err(|_| take_back())?;
        match std::fs::remove_file(self.paths.volumes().join(format!("{name}.toml"))) {
            Err(failed) if failed.kind() != std::io::ErrorKind::NotFound => {
                take_back();
                match &begun {
                    Some(_) => drop(self.reopen(spec)),
                    None => drop(self.slots().insert(name.to_owned(), Slot::Waiting(spec))),
                }
                return Err(failed.into());
            }
            _ => {}
        }
        self.slots().remove(name);
        self.wipe_places(&spec, |_| true);
        // It is nobody's origin any more: udev and systemd are to look at it again.
        if let Ok(metadata) = std::fs::metadata(&spec.device) {
            let number = std::os::unix::fs::MetadataExt::rdev(&metadata);
            let _ = std::fs::write(varve_control::sysfs(number).join("uevent"), "change");
        }
        Ok(())
    }

    /// Follows a device that was grown or shrunk: closes the volume and opens it with the new size.
    pub fn resize(&self, name: &str) -> Result<VolumeInfo, ControlError> {
        let _changing = self.changing();
        self.refuse_copied(name, "following another size")?;
        let spec = self.stop(name)?;
        self.reopen(spec)?;
        self.info(name)
    }

    /// Whether a volume runs, or a hot copy is shown.
    pub fn has_running(&self) -> bool {
        let slots = self.slots();
        slots.values().any(|slot| matches!(slot, Slot::Running(_)))
            || !self.shown_copies().is_empty()
    }

    /// Closes what is not in use; what is in use is left to the next daemon, which takes it over.
    pub fn shutdown(&self) {
        let _changing = self.changing();
        self.hide_copies();
        let names: Vec<String> = self.slots().keys().cloned().collect();
        for name in names {
            if let Err(error) = self.stop(&name) {
                eprintln!("blkfilter: {name}: left running for the next daemon: {error}");
            }
        }
    }
}

fn claim_error(device: &Path, why: &std::io::Error) -> ControlError {
    match why.raw_os_error() {
        Some(libc::EBUSY) => error(
            "V012-busy",
            format!(
                "{} is mounted, swap, part of LVM or md, or in use by another program. Unmount it first, or use `varve protect --at-next-boot`",
                device.display()
            ),
        ),
        Some(libc::ENOENT) => error(
            MISSING,
            format!(
                "{} does not exist; `lsblk` lists devices. It is opened as soon as it is there",
                device.display()
            ),
        ),
        _ => error("V013-device", format!("{}: {why}", device.display())),
    }
}

/// Takes over the size that the device has now; whether it is another one than before. The history of a device that was grown or shrunk goes on.
fn follow_size(
    spec: &mut VolumeSpec,
    geometry: &mut Geometry,
    recovering: bool,
    strict: bool,
) -> Result<bool, ControlError> {
    if geometry.bytes == spec.bytes {
        return Ok(false);
    }
    let message = format!(
        "{} is {} bytes, it was {}",
        spec.device.display(),
        geometry.bytes,
        spec.bytes
    );
    if strict || geometry.bytes < DEVICE_BYTES_MIN {
        let what = "Nothing was changed. Look at the device (`lsblk -b`), then try again";
        return Err(error("V028-size", format!("{message}. {what}")));
    }
    if recovering && geometry.bytes > spec.bytes {
        // The kernel still shows the device with its old size: it is followed when that is taken away.
        geometry.bytes = spec.bytes;
        return Ok(false);
    }
    eprintln!("blkfilter: {}: {message}: following it", spec.name);
    spec.bytes = geometry.bytes;
    Ok(true)
}

/// What is told of a volume whose file cannot be read.
fn unread_info(why: &SpecError) -> VolumeInfo {
    let name = why.path().file_stem().unwrap_or_default();
    VolumeInfo {
        name: name.to_string_lossy().into_owned(),
        state: "failed".to_owned(),
        note: format!("V011-config: {why}; then restart blkfilter"),
        ..VolumeInfo::default()
    }
}

fn idle_info(spec: &VolumeSpec, state: &str, note: &str) -> VolumeInfo {
    VolumeInfo {
        name: spec.name.clone(),
        id: spec.id.clone(),
        device: spec.device.display().to_string(),
        bytes: spec.bytes,
        state: state.to_owned(),
        note: note.to_owned(),
        ..VolumeInfo::default()
    }
}

fn config_of(spec: &VolumeSpec) -> Result<VolumeConfig, ControlError> {
    let id = VolumeId::parse(&spec.id)
        .ok_or_else(|| error("V029-id", "the volume's id is not 32 hex digits"))?;
    let mut config = VolumeConfig::new(id, spec.bytes, spec.sector_bytes);
    config.segment_bytes = spec.segment_bytes;
    config.segment_count = spec.segment_count;
    config.open_regions_max = ((spec.resync_bytes_max / u64::from(config.region_bytes)) as usize)
        .clamp(64, varve_format::OPEN_REGIONS_MAX);
    config.log_wait_max_ns = spec.log_wait_max_ms * 1_000_000;
    config.ack = match spec.ack {
        Ack::Async => AckPolicy::Async,
        Ack::Local => AckPolicy::Local,
    };
    Ok(config)
}

/// Whether somebody has a device to himself; what cannot be opened nobody has.
pub(crate) fn is_busy(device: &str) -> bool {
    varve_control::is_busy(Path::new(device)).unwrap_or(false)
}
