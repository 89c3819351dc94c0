//! What `varved` does: follows the logs, answers questions about the past.

use crate::another_log::OTHER_LOG;
use crate::describe::{clock, history};
use crate::export::{Exports, NbdExport};
use crate::keys::Keys;
use crate::resolve::{ENDED, resolve};
use crate::rewind::Unfinished;
use crate::store_clock::StoreClock;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use varve_control::{
    Client, ControlError, FilterOp, FilterReply, Instant, Paths, Reporter, StoreOp, StorePolicy,
    StoreReply, VolumeInfo, VolumeSpec, find_former, load_specs,
};
use varve_format::{Lsn, SegmentSequence, VolumeId, WallTime};
use varve_log::DirectFile;
use varve_store::{Drill, Image, StoreError, VolumeStore, ingest};

/// How often the logs are looked at.
const FOLLOW_EVERY: Duration = Duration::from_millis(500);

/// Where a rewind goes that has begun, and after which the device was not shown again.
pub(crate) fn open_rewind(volume: &VolumeInfo) -> Option<u64> {
    let runs = !matches!(volume.state.as_str(), "failed" | "waiting" | "starting");
    volume.rewind_target.filter(|_| runs)
}

/// The log could not seal its open segment in time.
pub(crate) const LATE: &str = "V020-late";
/// State of a volume that is protected no more, and whose history is there.
pub(crate) const UNPROTECTED: &str = "unprotected";

fn not_running(spec: &VolumeSpec) -> VolumeInfo {
    VolumeInfo {
        name: spec.name.clone(),
        id: spec.id.clone(),
        device: spec.device.display().to_string(),
        bytes: spec.bytes,
        state: UNPROTECTED.to_owned(),
        ..VolumeInfo::default()
    }
}

/// The service.
pub struct Service {
    paths: Paths,
    stores: Mutex<BTreeMap<String, VolumeStore>>,
    exports: Exports,
    pub(crate) keys: Keys,
    /// Volumes that this process is rewinding or comparing; another's interrupted rewind is finished by `follow`.
    claimed: Mutex<BTreeSet<String>>,
    /// By which history ages; not read before it is needed.
    clock: Mutex<Option<StoreClock>>,
    /// Histories whose logs were taken since this process began: what was in them may say what is still needed (a rewind that was interrupted).
    taken: Mutex<BTreeSet<String>>,
    /// Histories take too much, and nothing of them may go.
    pub(crate) space_is_stuck: AtomicBool,
    /// The history that holds it up, because a part of it is not known.
    pub(crate) space_held_up_by: Mutex<String>,
    /// Histories of which what could not be read was tried again since this daemon began.
    retried: Mutex<BTreeSet<String>>,
    /// The daemon was told to end; and points on the schedule that are being made.
    pub(crate) ending: AtomicBool,
    pub(crate) points_under_way: AtomicUsize,
    /// Rewinds that are open and could not be finished, by history.
    unfinished_rewinds: Mutex<BTreeMap<String, Unfinished>>,
}

/// Held while this process rewinds or compares a volume.
pub(crate) struct Claim {
    service: Arc<Service>,
    name: String,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.service
            .claimed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.name);
    }
}

pub(crate) fn error(code: &str, message: impl std::fmt::Display) -> ControlError {
    ControlError::new(code, message)
}

pub(crate) fn store_error(failed: &StoreError) -> ControlError {
    error(failed.code(), failed)
}

pub(crate) fn now_ns() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |time| time.as_nanos() as i64)
}

impl Service {
    /// A service over `paths`.
    #[must_use]
    pub fn new(paths: Paths) -> Service {
        Service {
            paths,
            stores: Mutex::new(BTreeMap::new()),
            exports: Exports::default(),
            keys: Keys::default(),
            claimed: Mutex::new(BTreeSet::new()),
            clock: Mutex::new(None),
            taken: Mutex::new(BTreeSet::new()),
            space_is_stuck: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            points_under_way: AtomicUsize::new(0),
            space_held_up_by: Mutex::default(),
            retried: Mutex::default(),
            unfinished_rewinds: Mutex::new(BTreeMap::new()),
        }
    }

    pub(crate) fn unfinished_rewinds(&self) -> MutexGuard<'_, BTreeMap<String, Unfinished>> {
        self.unfinished_rewinds
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn note_taken(&self, id: &str, is: bool) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        match is {
            true => taken.insert(id.to_owned()),
            false => taken.remove(id),
        };
    }

    /// Whether a history holds what its log has sealed, or did since this process began, and no rewind is under way.
    pub(crate) fn was_taken(&self, id: &str) -> bool {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        // What is protected no more has no log that could hold anything.
        taken.contains(id) || !self.specs().iter().any(|spec| spec.id == id)
    }

    /// The store's time, in nanoseconds since 1970.
    pub(crate) fn clock_ns(&self) -> i64 {
        let mut clock = self.clock.lock().unwrap_or_else(PoisonError::into_inner);
        clock
            .get_or_insert_with(|| StoreClock::open(&self.paths.store()))
            .now_ns()
    }

    fn stores(&self) -> MutexGuard<'_, BTreeMap<String, VolumeStore>> {
        self.stores.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One rewind or comparison of a volume at a time in this process.
    pub(crate) fn claim(self: &Arc<Self>, name: &str) -> Option<Claim> {
        let mut claimed = self.claimed.lock().unwrap_or_else(PoisonError::into_inner);
        claimed.insert(name.to_owned()).then(|| Claim {
            service: Arc::clone(self),
            name: name.to_owned(),
        })
    }

    /// Volumes that are protected.
    pub(crate) fn specs(&self) -> Vec<VolumeSpec> {
        let specs = load_specs(&self.paths.volumes()).into_iter();
        specs.filter_map(Result::ok).collect()
    }

    /// The same, and those that were and whose history is there.
    fn known_specs(&self) -> Vec<VolumeSpec> {
        let former = load_specs(&self.paths.former_volumes()).into_iter();
        let mut specs = self.specs();
        specs.extend(former.filter_map(Result::ok));
        specs
    }

    /// A volume by its name, or its ID; one that is protected comes first.
    fn spec_of(&self, name: &str) -> Result<VolumeSpec, ControlError> {
        let is_it = |spec: &VolumeSpec| spec.name == name || spec.id == name;
        match self.specs().into_iter().find(is_it) {
            Some(spec) => Ok(spec),
            None => self.former_spec(name),
        }
    }

    fn former_spec(&self, name: &str) -> Result<VolumeSpec, ControlError> {
        find_former(&self.paths.former_volumes(), name)
    }

    pub(crate) fn filter(&self) -> Result<Client, ControlError> {
        let socket = self.paths.filter_socket();
        Client::connect(&socket).map_err(|e| {
            error(
                "D001-filter",
                format!(
                    "blkfilter does not answer on {}: {e}; start it",
                    socket.display()
                ),
            )
        })
    }

    pub(crate) fn info(&self, name: &str) -> Result<VolumeInfo, ControlError> {
        match self.filter()?.call(&FilterOp::Status)? {
            FilterReply::Status { volumes, .. } => volumes
                .into_iter()
                .find(|volume| volume.name == name)
                .map_or_else(|| self.former_spec(name).map(|spec| not_running(&spec)), Ok),
            _ => Err(error("C005-answer", "blkfilter gave an unexpected answer")),
        }
    }

    /// A full store takes nothing, and must be pruned all the same, or it stays full. What the log holds then cannot need an instant of the past that is not
    /// known here: the data path has read it, and knows of no rewind, or of one that the history knows, too.
    fn makes_room(&self, volume: &VolumeInfo, outcome: &Result<(), ControlError>) -> bool {
        let runs = matches!(
            volume.state.as_str(),
            "protected" | "bypass" | "healing" | "rewinding"
        );
        let full = outcome.as_ref().is_err_and(|why| why.code == "S007-full");
        let known = |target: u64| {
            let known = self.if_open(&volume.id, |store| store.rewind_target());
            // One that goes somewhere else by now needs that, too.
            known.flatten() == Some(Lsn(target))
                && self.redirected(&volume.id, Lsn(target)) == Lsn(target)
        };
        runs && full && volume.rewind_target.is_none_or(known)
    }

    /// Takes history out of the logs as it is sealed, and finishes rewinds that were interrupted. Never returns.
    pub fn follow(self: &Arc<Self>) {
        let mut told: BTreeMap<String, String> = BTreeMap::new();
        loop {
            std::thread::sleep(FOLLOW_EVERY);
            let Ok(FilterReply::Status { volumes, .. }) = self
                .filter()
                .and_then(|mut filter| filter.call(&FilterOp::Status))
            else {
                continue;
            };
            for volume in volumes {
                if open_rewind(&volume).is_some()
                    && volume.state != "bypass"
                    && !self.rewind_rests(&volume.id)
                    && let Some(claim) = self.claim(&volume.name)
                {
                    // On a thread of its own: the log must go on being drained.
                    let (service, name) = (Arc::clone(self), volume.name.clone());
                    std::thread::spawn(move || {
                        service.finish_rewind(&name);
                        drop(claim);
                    });
                }
                if volume.verify_wanted != 0
                    && let Some(claim) = self.claim(&volume.name)
                {
                    let (service, volume) = (Arc::clone(self), volume.clone());
                    std::thread::spawn(move || {
                        match service.verify(&volume) {
                            Ok(None) => {}
                            Ok(Some(equal)) => eprintln!(
                                "varved: {}: compared with its history: {} MiB of {} MiB are equal and need not be copied",
                                volume.name,
                                equal >> 20,
                                volume.bytes >> 20
                            ),
                            Err(failed) => {
                                eprintln!("varved: {}: comparing: {failed}", volume.name)
                            }
                        }
                        drop(claim);
                    });
                }
                let outcome = if volume.segments_held > 1
                    && (volume.state != "bypass"
                        || volume.segments_held >= volume.segment_count - 2)
                {
                    self.take(&volume, SegmentSequence(volume.sequence))
                } else {
                    Ok(())
                };
                if self.makes_room(&volume, &outcome) {
                    self.note_taken(&volume.id, true);
                } else if open_rewind(&volume).is_some()
                    || matches!(volume.state.as_str(), "failed" | "starting")
                {
                    self.note_taken(&volume.id, false);
                } else if outcome.is_ok() {
                    self.note_taken(&volume.id, true);
                }
                // Said once, not twice a second.
                match outcome {
                    Err(failed) if told.get(&volume.name) != Some(&failed.message) => {
                        eprintln!("varved: {}: {failed}", volume.name);
                        told.insert(volume.name, failed.message);
                    }
                    Err(_) => {}
                    Ok(()) => {
                        told.remove(&volume.name);
                    }
                }
            }
        }
    }

    /// Takes away all that is shown.
    pub fn hide_all(&self) {
        self.exports.hide_all();
    }

    pub(crate) fn paths(&self) -> &Paths {
        &self.paths
    }

    /// The ID of a volume, by its file: the data path need not answer.
    pub(crate) fn id_of(&self, name: &str) -> Result<String, ControlError> {
        self.spec_of(name).map(|spec| spec.id)
    }

    /// What a history's volume is called.
    pub(crate) fn name_of(&self, id: &str) -> String {
        let spec = self.known_specs().into_iter().find(|spec| spec.id == id);
        spec.map_or_else(|| id.to_owned(), |spec| spec.name)
    }

    /// Opens the histories of all volumes. What cannot be opened is said when it is asked for.
    pub(crate) fn open_all(&self) {
        if varve_control::mapped_volume_under(&self.paths, &self.paths.store()).is_some() {
            return; // `take` says what is wrong with that.
        }
        for spec in self.known_specs() {
            let _ = self.with_store(&spec.id, |_| Ok(()));
        }
    }

    /// Histories that are open, by ID.
    pub(crate) fn open_ids(&self) -> Vec<String> {
        let known = self.known_specs().into_iter().map(|spec| spec.id);
        let known: BTreeSet<String> = known.collect();
        let open = self.stores().keys().cloned().collect::<Vec<_>>();
        open.into_iter().filter(|id| known.contains(id)).collect()
    }

    /// Closes a history that nobody uses. What uses it for a moment (a comparison that has just lost its volume, a map being made) is waited for.
    pub(crate) fn stores_without(
        &self,
        id: &str,
    ) -> Result<MutexGuard<'_, BTreeMap<String, VolumeStore>>, ControlError> {
        for _ in 0..100 {
            let mut stores = self.stores();
            if !stores.get(id).is_some_and(VolumeStore::is_in_use) {
                stores.remove(id);
                return Ok(stores);
            }
            drop(stores);
            std::thread::sleep(Duration::from_millis(100));
        }
        Err(error(
            "S013-in-use",
            "an instant of this history is mounted or exported, or it is being scrubbed; end that first (`varve exports`)",
        ))
    }

    /// Opens histories anew of which a part was not known: its key is there now, or, if `all`, its disk may answer again. One that is in use waits.
    pub(crate) fn reopen_unknown(&self, all: bool) {
        for id in self.open_ids() {
            let is_due = |store: &VolumeStore| {
                let has_keys = || store.refuse_without_key(Lsn(u64::MAX)).is_ok();
                store.waits_for_key() && has_keys() || all && store.is_partly_unknown()
            };
            let mut stores = self.stores();
            let Some(store) = stores.get(&id).filter(|store| is_due(store)) else {
                continue;
            };
            if !store.is_in_use() {
                stores.remove(&id);
                drop(stores);
                if let Err(why) = self.with_store(&id, |_| Ok(())) {
                    eprintln!("varved: {id}: {}", why.message);
                }
            }
            if all {
                let mut retried = self.retried.lock().unwrap_or_else(PoisonError::into_inner);
                retried.insert(id);
            }
        }
    }

    /// Whether what is not known of a history may be known soon, without anybody's doing.
    fn may_be_known_soon(&self, store: &VolumeStore, id: &str) -> bool {
        let retried = self.retried.lock().unwrap_or_else(PoisonError::into_inner);
        store.waits_for_key() || store.is_partly_unknown() && !retried.contains(id)
    }

    /// Works with a history that is open; one that was forgotten is not made again.
    pub(crate) fn if_open<T>(
        &self,
        id: &str,
        work: impl FnOnce(&mut VolumeStore) -> T,
    ) -> Option<T> {
        self.stores().get_mut(id).map(work)
    }

    pub(crate) fn with_store<T>(
        &self,
        id: &str,
        work: impl FnOnce(&mut VolumeStore) -> Result<T, ControlError>,
    ) -> Result<T, ControlError> {
        let mut stores = self.stores();
        if !stores.contains_key(id) {
            let volume = VolumeId::parse(id)
                .ok_or_else(|| error("V029-id", "the volume's id is not 32 hex digits"))?;
            let root = self.paths.store();
            let keys = self
                .keys
                .of_volume(&root, &self.paths.store_policy(), volume);
            let store = VolumeStore::open_with(&root, volume, keys).map_err(|e| store_error(&e))?;
            for damage in store.damaged().iter().chain(store.healed()) {
                eprintln!("varved: {id}: {damage}");
            }
            stores.insert(id.to_owned(), store);
        }
        stores
            .get_mut(id)
            .map_or_else(|| Err(error("S003-locked", "the store went away")), work)
    }

    /// Takes every sealed segment below `below` into the store and lets the log recycle it.
    pub(crate) fn take(
        &self,
        volume: &VolumeInfo,
        below: SegmentSequence,
    ) -> Result<(), ControlError> {
        let spec = self.specs().into_iter().find(|spec| spec.id == volume.id);
        let spec = spec.ok_or_else(|| {
            error(
                "V019-unknown",
                format!(
                    "{} has no file in {}",
                    volume.name,
                    self.paths.volumes().display()
                ),
            )
        })?;
        let place = self.paths.store();
        if let Some(under) = varve_control::mapped_volume_under(&self.paths, &place) {
            let message = format!(
                "the store {} lies on {under}, which is protected itself: it would record its own writes. Nothing is taken out of the logs until it lies \
                 somewhere else",
                place.display()
            );
            return Err(error("V034-loop", message));
        }
        let now = WallTime(self.clock_ns());
        let done = self.with_store(&volume.id, |store| {
            store.set_now(now);
            let mut log = DirectFile::open(&spec.log)
                .map_err(|e| error("V014-log", format!("the log {}: {e}", spec.log.display())))?;
            ingest(
                store,
                &mut log,
                spec.segment_bytes,
                spec.segment_count,
                below,
            )
            .map_err(|e| store_error(&e))
        });
        if done.as_ref().is_err_and(|why| why.code == OTHER_LOG) {
            self.go_on_behind(volume)?;
        }
        let done = done?;
        for problem in &done.problems {
            eprintln!("varved: {}: {problem}", volume.name);
        }
        let incomplete = self.with_store(&volume.id, |store| {
            let is_known = !self.may_be_known_soon(store, &volume.id);
            Ok(store.timeline().is_incomplete() && is_known)
        })?;
        if incomplete && volume.state == "protected" {
            let op = FilterOp::Doubt {
                name: volume.name.clone(),
            };
            if let FilterReply::Wanted { wanted: true } = self.filter()?.call(&op)? {
                eprintln!(
                    "varved: {}: the history lacks a part: nothing can be restored from after it. The device is compared with what there is",
                    volume.name
                );
            }
        }
        self.filter()?.call::<_, FilterReply>(&FilterOp::Release {
            name: volume.name.clone(),
            below: done.below.0,
        })?;
        Ok(())
    }

    /// Brings the store up to this moment.
    pub(crate) fn refresh(&self, name: &str) -> Result<VolumeInfo, ControlError> {
        let volume = self.info(name)?;
        if matches!(
            volume.state.as_str(),
            "failed" | "starting" | "bypass" | UNPROTECTED
        ) {
            return Ok(volume); // The log may not answer; history up to now can still be read.
        }
        let seal = FilterOp::Seal {
            name: name.to_owned(),
        };
        match self.filter()?.call(&seal) {
            Ok(FilterReply::Sealed { sealed }) => {
                self.take(&volume, SegmentSequence(sealed.below))?;
                // A bypass that has begun meanwhile seals nothing: then it must not seem that all is here.
                return self.info(name);
            }
            // A log without a free place seals nothing: why it has none is what is to be said.
            Err(late) if late.code == LATE => {
                self.take(&volume, SegmentSequence(volume.sequence))?;
                return Err(late);
            }
            Err(other) => return Err(other),
            Ok(_) => {}
        }
        Ok(volume)
    }

    /// The same as far as it can be done: a store that takes nothing more (it is full, or read-only), or gets nothing, still shows what it has. The error says
    /// why it is behind.
    pub(crate) fn refresh_if_possible(
        &self,
        name: &str,
    ) -> Result<(VolumeInfo, Option<ControlError>), ControlError> {
        match self.refresh(name) {
            Ok(info) if info.state == "bypass" => {
                let why = format!(
                    "{name} is in bypass since {}: what was written since then is on the device alone ({})",
                    clock(info.bypass_since_ns),
                    info.bypass_reason
                );
                Ok((info, Some(error("I006-gap", why))))
            }
            Ok(info) if info.state == UNPROTECTED => {
                let why =
                    format!("{name} is protected no more: what was written since is in no history");
                Ok((info, Some(error(ENDED, why))))
            }
            Ok(info) if matches!(info.state.as_str(), "failed" | "starting") => {
                let why = format!(
                    "{name} does not run ({}): what its log holds and the history does not is not there",
                    info.note
                );
                Ok((info, Some(error(LATE, why))))
            }
            Ok(info) => Ok((info, None)),
            Err(why) if why.code.starts_with('S') || why.code == LATE => {
                Ok((self.info(name)?, Some(why)))
            }
            Err(other) => Err(other),
        }
    }

    /// Answers one question.
    pub fn answer(
        self: &Arc<Self>,
        op: StoreOp,
        attached: Vec<u8>,
        reporter: &mut Reporter<'_>,
    ) -> Result<StoreReply, ControlError> {
        match op {
            StoreOp::Ping => Ok(StoreReply::Done),
            StoreOp::History { volume } => {
                let (info, behind) = self.refresh_if_possible(&volume)?;
                self.read_point_names(&info.id)?;
                let asked = |store: &mut VolumeStore| {
                    let known = history(store).map_err(|e| store_error(&e))?;
                    Ok((known, store.volume()))
                };
                let (mut history, volume) = self.with_store(&info.id, asked)?;
                history.keys_not_exported = self.keys_not_exported(volume);
                let policy = StorePolicy::load(&self.paths.store_policy()).unwrap_or_default();
                history.space = self.space(&policy.space);
                history.behind = match open_rewind(&info) {
                    Some(_) => self.why_unfinished(&info.id).or(behind),
                    None => behind,
                };
                Ok(StoreReply::History {
                    history: Box::new(history),
                })
            }
            StoreOp::Resolve { volume, instant } => {
                let (id, behind) = self.refreshed_for(&volume, &instant)?;
                self.with_store(&id, |store| {
                    let lsn = resolve(store, &instant, behind.as_ref())?;
                    Ok(StoreReply::Resolved {
                        lsn: lsn.0,
                        time_ns: store.time_of(lsn).map_err(|e| store_error(&e))?.0,
                    })
                })
            }
            StoreOp::Export {
                volume,
                instant,
                writable,
                nbd,
                since,
                held,
            } => {
                if since.is_some() && nbd.is_none() {
                    return Err(error(
                        "C003-question",
                        "a dirty bitmap is told over NBD only",
                    ));
                }
                let (image, time_ns) = self.image(&volume, &instant)?;
                let lsn = image.lsn().0;
                let what = format!(
                    "{volume} at LSN {lsn} ({}){}",
                    clock(time_ns),
                    if writable { ", writable" } else { "" }
                );
                let dirty = |since: Instant| match self.diff(&volume, &since, &Instant::Lsn(lsn))? {
                    StoreReply::Ranges { ranges, .. } => Ok(ranges),
                    _ => Err(error("C005-answer", "no ranges")),
                };
                let dirty = since.map(dirty).transpose()?;
                let nbd = nbd.map(|socket| NbdExport { socket, dirty });
                let shown = self.exports.show(&self.paths, image, what, writable, nbd);
                let (device, number) = shown?;
                if held {
                    let (service, device) = (Arc::clone(self), device.clone());
                    reporter.at_end(move || service.exports.let_go(&device, number));
                }
                Ok(StoreReply::Shown {
                    device,
                    lsn,
                    time_ns,
                })
            }
            StoreOp::Middle {
                volume,
                after,
                before,
            } => self.with_store(&self.id_of(&volume)?, |store| {
                let middle = store.timeline().middle(Lsn(after), Lsn(before));
                let time = |lsn: Lsn| store.time_of(lsn).map_err(|e| store_error(&e));
                Ok(match middle {
                    Some(lsn) => StoreReply::Resolved {
                        lsn: lsn.0,
                        time_ns: time(lsn)?.0,
                    },
                    None => StoreReply::Nothing,
                })
            }),
            StoreOp::Unexport { device } => {
                self.exports.hide_unused(&device)?;
                Ok(StoreReply::Done)
            }
            StoreOp::KeepShown { device } => {
                self.exports.keep(&device)?;
                Ok(StoreReply::Done)
            }
            StoreOp::TakeAll { volume } => {
                let (info, behind) = self.refresh_if_possible(&volume)?;
                if info.state == "bypass" {
                    // What was sealed before it can be taken all the same.
                    let _ = self.take(&info, SegmentSequence(info.sequence));
                }
                match behind {
                    Some(why) => Err(why),
                    None => Ok(StoreReply::Done),
                }
            }
            StoreOp::ImageTrouble { device } => {
                let (lacks_blocks, no_room) = self.exports.trouble(&device)?;
                Ok(StoreReply::ImageTrouble {
                    lacks_blocks,
                    no_room,
                })
            }
            StoreOp::GiveUpKept { volume } => {
                self.with_store(&self.id_of(&volume)?, |store| {
                    store.give_up_kept().map_err(|e| store_error(&e))
                })?;
                Ok(StoreReply::Done)
            }
            StoreOp::Exports => Ok(StoreReply::Exports {
                exports: self.exports.list(),
            }),
            StoreOp::Diff { volume, from, to } => self.diff(&volume, &from, &to),
            StoreOp::Compare { volume } => self.compare(&volume, reporter),
            StoreOp::Rewind {
                volume,
                instant,
                dry_run,
            } => self.rewind(&volume, &instant, dry_run, reporter),
            StoreOp::Scrub {
                volume,
                bytes_per_second,
                how,
            } => self.scrub(&volume, bytes_per_second, how, reporter),
            StoreOp::Check { volume } => self.check(&volume),
            StoreOp::Salvage { to } => self.salvage(&to, reporter),
            StoreOp::Drilled { volume, drill } => {
                let drill = Drill {
                    held: WallTime(drill.held_ns),
                    lsn: Lsn(drill.lsn),
                    time: WallTime(drill.time_ns),
                    proven: drill.proven,
                    found: drill.found,
                };
                let note = |store: &mut VolumeStore| store.note_drill(&drill);
                self.with_store(&self.id_of(&volume)?, |store| {
                    note(store).map_err(|e| store_error(&e))
                })?;
                Ok(StoreReply::Done)
            }
            StoreOp::Policy {
                volume,
                change,
                bytes,
            } => self.policy(&volume, change, bytes, reporter),
            StoreOp::Pin {
                volume,
                instant,
                pinned,
            } => self.pin(&volume, &instant, pinned),
            StoreOp::Keys {
                ask,
                secret_bytes,
                is_key_file,
            } => self.keys_asked(ask, (secret_bytes, is_key_file), attached),
            StoreOp::Forget { id } => self.forget(&id),
            StoreOp::Shutdown => {
                self.end_all();
                std::process::exit(0);
            }
        }
    }

    /// The ID of a volume whose history reaches up to an instant, or why it may not. What was taken long ago needs no new segment.
    pub(crate) fn refreshed_for(
        &self,
        volume: &str,
        instant: &Instant,
    ) -> Result<(String, Option<ControlError>), ControlError> {
        if let (Instant::Lsn(lsn), Ok(id)) = (instant, self.id_of(volume)) {
            let known = self.with_store(&id, |store| {
                let timeline = store.timeline();
                Ok(Lsn(*lsn) <= timeline.end() && timeline.check(Lsn(*lsn)).is_ok())
            })?;
            if known {
                return Ok((id, None));
            }
        }
        let (info, behind) = self.refresh_if_possible(volume)?;
        if matches!(instant, Instant::Point(_)) {
            self.read_point_names(&info.id)?;
        }
        Ok((info.id, behind))
    }

    /// Reads the names of recovery points, so that they are known: without the lock of the stores, because each lies in a segment.
    fn read_point_names(&self, id: &str) -> Result<(), ControlError> {
        let job = self.with_store(id, |store| Ok(store.names_to_read()))?;
        if let Some(job) = job {
            let names = job.run();
            self.with_store(id, |store| {
                store.learn_names(names);
                Ok(())
            })?;
        }
        Ok(())
    }

    pub(crate) fn image(
        &self,
        volume: &str,
        instant: &Instant,
    ) -> Result<(Image, i64), ControlError> {
        let (id, behind) = self.refreshed_for(volume, instant)?;
        self.with_store(&id, |store| {
            let lsn = resolve(store, instant, behind.as_ref())?;
            let image = Image::open(store, lsn).map_err(|e| store_error(&e))?;
            let time = store.time_of(lsn).map_err(|e| store_error(&e))?;
            Ok((image, time.0))
        })
    }
}
