//! All volumes of one daemon: opening, showing, taking away, closing. A thread (ublk: two) per volume; this room only talks to them.

use crate::driver::{FailedDevice, Message, VolumeDevice, describe};
use crate::origin;
use crate::start::peek_rewind;
use crate::{
    AckPolicy, Law, RewindRequest, SurvivingIdentity, SurvivingMemory, Volume, VolumeConfig,
    VolumeStatus,
};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;
use varve_control::{Ack, ControlError, FrontKind, Paths, VolumeInfo, VolumeSpec};
use varve_format::{Lsn, SegmentSequence, VolumeId};
use varve_front::channel::{self, JobSender};
use varve_front::{Device, DeviceFactory, RingPort, Stopper, Waker, fuse, ublk};
use varve_front::{Geometry, RequestKind};
use varve_log::{Memory, OwnRing, UringMedium};

/// How long a volume's start may take: its newest log segment is read, and a surviving buffer written.
const START_WAIT: Duration = Duration::from_secs(60);
const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// What to do with the device once it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Offer it.
    Offered,
    /// Only a rewind writes.
    Rewinding(Option<Lsn>),
}

struct Running {
    spec: VolumeSpec,
    mode: Mode,
    front: &'static str,
    mapped: String,
    note: String,
    reread_bytes: u64,
    rewind_target: Option<Lsn>,
    messages: Sender<Message>,
    waker: Waker,
    stopper: Stopper,
    jobs: Option<JobSender>,
    closed: Receiver<Result<(), String>>,
    thread: std::thread::JoinHandle<Result<(), String>>,
}

enum Slot {
    Running(Box<Running>),
    Failed(VolumeSpec, String),
}

/// All volumes.
pub struct Manager {
    paths: Paths,
    slots: Mutex<BTreeMap<String, Slot>>,
}

fn error(code: &str, message: impl std::fmt::Display) -> ControlError {
    ControlError::new(code, message)
}

impl Manager {
    /// A manager of the volumes under `paths`.
    #[must_use]
    pub fn new(paths: Paths) -> Manager {
        Manager {
            paths,
            slots: Mutex::new(BTreeMap::new()),
        }
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Slot>> {
        self.slots
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Opens every volume that has a file. One that fails does not keep the others from starting.
    pub fn open_all(&self) {
        for spec in varve_control::load_specs(&self.paths.volumes()) {
            match spec {
                Ok(spec) => {
                    let name = spec.name.clone();
                    if let Err(error) = self.open(spec.clone(), None) {
                        eprintln!("blkfilter: {name}: {error}");
                        self.slots()
                            .insert(name, Slot::Failed(spec, error.to_string()));
                    }
                }
                Err(error) => eprintln!("blkfilter: {error}"),
            }
        }
    }

    /// Protects a new volume: claims the device, makes its files, starts it, and only then writes the file that lasts.
    pub fn protect(&self, spec: VolumeSpec) -> Result<VolumeInfo, ControlError> {
        if self.slots().contains_key(&spec.name) {
            return Err(error(
                "V010-exists",
                format!(
                    "a volume named {} is protected already; choose another with --name",
                    spec.name
                ),
            ));
        }
        let name = spec.name.clone();
        self.open_with(spec.clone(), None, true)?;
        varve_control::save_spec(&self.paths.volumes(), &spec)
            .map_err(|e| error("V011-config", e))?;
        self.info(&name)
    }

    fn open(&self, spec: VolumeSpec, rewind: Option<Lsn>) -> Result<(), ControlError> {
        self.open_with(spec, rewind, false)
    }

    /// Opens a volume. A new one must have everything (`strict`); an old one is offered even if its log or state file is gone: in bypass.
    fn open_with(
        &self,
        spec: VolumeSpec,
        rewind: Option<Lsn>,
        strict: bool,
    ) -> Result<(), ControlError> {
        let recover = self.recorded_ublk(&spec.name);
        let origin = origin::claim_origin(
            &spec.device,
            recover.is_some() || self.memory_path(&spec).exists(),
        )
        .map_err(|e| claim_error(&spec.device, &e))?;
        let geometry = origin::geometry(&origin)
            .map_err(|e| error("V013-device", format!("{}: {e}", spec.device.display())))?;
        check_size(&spec, &geometry)?;
        let config = config_of(&spec)?;
        let log = or_broken(
            origin::open_log(&spec.log, spec.segment_bytes * spec.segment_count),
            strict,
        )
        .map_err(|e| error("V014-log", format!("the log {}: {e}", spec.log.display())))?;
        let state = or_broken(origin::open_state(&spec.state), strict).map_err(|e| {
            error(
                "V015-state",
                format!("the state file {}: {e}", spec.state.display()),
            )
        })?;
        let memory_bytes = SurvivingMemory::bytes_needed(&config);
        let memory = origin::open_memory(&self.memory_path(&spec), memory_bytes).map_err(|e| {
            error(
                "V016-memory",
                format!("surviving memory under {}: {e}", self.paths.run().display()),
            )
        })?;
        let files = Files {
            origin,
            log,
            state,
            memory,
            memory_bytes,
        };
        let interrupted = rewind.is_none().then(|| files.peek(&config)).flatten();
        let mode = if rewind.is_some() || interrupted.is_some() {
            Mode::Rewinding(rewind)
        } else {
            Mode::Offered
        };
        let running = self.launch(spec, config, geometry, files, mode, recover)?;
        self.slots()
            .insert(running.spec.name.clone(), Slot::Running(Box::new(running)));
        Ok(())
    }

    fn launch(
        &self,
        spec: VolumeSpec,
        config: VolumeConfig,
        geometry: Geometry,
        files: Files,
        mode: Mode,
        recover: Option<u32>,
    ) -> Result<Running, ControlError> {
        let waker = Waker::new()?;
        let stopper = Stopper::new(&waker);
        let (messages, inbox) = unbounded();
        let (report_in, report_out) = bounded(1);
        let (closed_in, closed) = bounded(1);
        let (shown_in, shown) = bounded(1);
        let rewind = match mode {
            Mode::Rewinding(Some(target)) => Some(RewindRequest { target }),
            _ => None,
        };
        let stop_on_failure = stopper.clone();
        let factory: DeviceFactory = Box::new(move |port: RingPort| -> Box<dyn Device> {
            match files.start(config, rewind) {
                Ok((volume, medium, report)) => {
                    let _ = report_in.send(Ok(report));
                    Box::new(VolumeDevice::new(
                        volume,
                        medium,
                        port,
                        inbox,
                        origin::kernel_counters,
                        closed_in,
                    ))
                }
                Err(text) => {
                    let _ = report_in.send(Err(text));
                    stop_on_failure.stop();
                    Box::new(FailedDevice::new())
                }
            }
        });
        let (jobs, receiver) = channel::jobs(&waker);
        let use_ublk = match spec.front {
            FrontKind::Ublk => true,
            FrontKind::Fuse => false,
            FrontKind::Auto => ublk::is_available(),
        };
        let front = match mode {
            Mode::Rewinding(_) => "none",
            Mode::Offered if use_ublk => "ublk",
            Mode::Offered => "fuse",
        };
        let record = self.ublk_record(&spec.name);
        let directory = self.paths.run().join("fuse").join(&spec.name);
        let (thread_waker, thread_stopper) = (waker.clone(), stopper.clone());
        let thread = std::thread::Builder::new()
            .name(format!("volume-{}", spec.name))
            .spawn(move || match front {
                "none" => {
                    let _ = shown_in.send(String::new());
                    channel::serve(&receiver, factory, &thread_waker, &thread_stopper)
                        .map_err(|e| e.to_string())
                }
                "ublk" => {
                    let options = ublk::UblkOptions {
                        id: recover,
                        recover: recover.is_some(),
                        lasting: true,
                        geometry,
                    };
                    let started = move |id: u32| {
                        let _ = std::fs::write(&record, id.to_string());
                        let _ = shown_in.send(format!("/dev/ublkb{id}"));
                    };
                    ublk::serve(&options, factory, &thread_waker, &thread_stopper, started)
                        .map_err(|e| e.to_string())
                }
                _ => {
                    let started = move |path: &str| {
                        let _ = shown_in.send(path.to_owned());
                    };
                    fuse::serve(
                        &directory,
                        geometry,
                        factory,
                        &thread_waker,
                        &thread_stopper,
                        started,
                    )
                    .map_err(|e| e.to_string())
                }
            })?;
        let report = match report_out.recv_timeout(START_WAIT) {
            Ok(Ok(report)) => report,
            Ok(Err(text)) => return Err(error("V017-start", text)),
            Err(_) => {
                let why = if thread.is_finished() {
                    thread.join().ok().and_then(Result::err).unwrap_or_default()
                } else {
                    "the kernel did not answer (a known fault of some kernels' ADD_DEV: `varve doctor`)".to_owned()
                };
                return Err(error(
                    "V018-front",
                    format!("the device could not be shown: {why}"),
                ));
            }
        };
        if report.in_bypass && matches!(mode, Mode::Rewinding(Some(_))) {
            stopper.stop();
            let _ = thread.join();
            return Err(error(
                "V026-bypass",
                "the log is in bypass: a rewind could not be recorded. Nothing was changed; see `varve status`",
            ));
        }
        let mapped = match shown.recv_timeout(START_WAIT) {
            Ok(mapped) => mapped,
            Err(_) => {
                stopper.stop();
                let why = if thread.is_finished() {
                    thread.join().ok().and_then(Result::err).unwrap_or_default()
                } else {
                    "the kernel did not answer (a known fault of some kernels' ADD_DEV: `varve doctor`)".to_owned()
                };
                return Err(error(
                    "V018-front",
                    format!("the device could not be shown: {why}"),
                ));
            }
        };
        if !mapped.is_empty() {
            self.link(&spec.name, &mapped);
        }
        let jobs = matches!(mode, Mode::Rewinding(_)).then_some(jobs);
        let (note, reread_bytes, rewind_target) =
            (describe(&report), report.reread_bytes, report.rewind_target);
        eprintln!("blkfilter: {}: {note}", spec.name);
        Ok(Running {
            spec,
            mode,
            front,
            mapped,
            note,
            reread_bytes,
            rewind_target,
            messages,
            waker,
            stopper,
            jobs,
            closed,
            thread,
        })
    }

    fn memory_path(&self, spec: &VolumeSpec) -> PathBuf {
        self.paths.run().join(format!("{}.memory", spec.id))
    }

    fn ublk_record(&self, name: &str) -> PathBuf {
        self.paths.run().join(format!("{name}.ublk"))
    }

    /// The ublk device that an earlier daemon of this boot left behind.
    fn recorded_ublk(&self, name: &str) -> Option<u32> {
        let id: u32 = std::fs::read_to_string(self.ublk_record(name))
            .ok()?
            .trim()
            .parse()
            .ok()?;
        Path::new(&format!("/dev/ublkc{id}")).exists().then_some(id)
    }

    fn link(&self, name: &str, mapped: &str) {
        let directory = self.paths.devices();
        let link = directory.join(name);
        let _ = std::fs::create_dir_all(&directory);
        let _ = std::fs::remove_file(&link);
        if let Err(error) = std::os::unix::fs::symlink(mapped, &link) {
            eprintln!("blkfilter: {}: {error}", link.display());
        }
    }

    /// A volume's figures.
    pub fn info(&self, name: &str) -> Result<VolumeInfo, ControlError> {
        let slots = self.slots();
        match slots.get(name) {
            Some(Slot::Running(running)) => Ok(info_of(running)),
            Some(Slot::Failed(spec, why)) => Ok(VolumeInfo {
                name: spec.name.clone(),
                id: spec.id.clone(),
                device: spec.device.display().to_string(),
                bytes: spec.bytes,
                state: "failed".to_owned(),
                note: why.clone(),
                ..VolumeInfo::default()
            }),
            None => Err(error(
                "V019-unknown",
                format!("no volume is named {name}; `varve status` lists them"),
            )),
        }
    }

    /// All volumes' figures.
    pub fn infos(&self) -> Vec<VolumeInfo> {
        let names: Vec<String> = self.slots().keys().cloned().collect();
        names
            .iter()
            .filter_map(|name| self.info(name).ok())
            .collect()
    }

    fn ask<T>(
        &self,
        name: &str,
        wait: Duration,
        message: impl FnOnce(Sender<T>) -> Message,
    ) -> Result<T, ControlError> {
        let (reply, answer) = bounded(1);
        {
            let slots = self.slots();
            let Some(Slot::Running(running)) = slots.get(name) else {
                return Err(error(
                    "V019-unknown",
                    format!("no running volume is named {name}; `varve status` lists them"),
                ));
            };
            let _ = running.messages.send(message(reply));
            running.waker.wake();
        }
        answer.recv_timeout(wait).map_err(|_| {
            error(
                "V020-late",
                format!("volume {name} did not answer in {} s", wait.as_secs()),
            )
        })
    }

    /// Appends a recovery point.
    pub fn mark(&self, name: &str, label: &str) -> Result<Lsn, ControlError> {
        if label.is_empty() || label.len() > 255 {
            return Err(error("V021-label", "a point's name has 1 to 255 bytes"));
        }
        self.ask(name, ANSWER_WAIT, |reply| Message::Mark(label.to_owned(), reply))?
            .ok_or_else(|| error("V022-unprotected", format!("volume {name} records no writes now (bypass, or no room): no point was made; see `varve status`")))
    }

    /// Seals the open segment.
    pub fn seal(&self, name: &str) -> Result<(SegmentSequence, Lsn), ControlError> {
        self.ask(name, ANSWER_WAIT, Message::Seal)
    }

    /// The store has everything below.
    pub fn release(&self, name: &str, below: SegmentSequence) -> Result<(), ControlError> {
        let slots = self.slots();
        if let Some(Slot::Running(running)) = slots.get(name) {
            let _ = running.messages.send(Message::Release(below));
            running.waker.wake();
        }
        Ok(())
    }

    /// Stops a volume cleanly; gives back its spec.
    fn stop(&self, name: &str) -> Result<VolumeSpec, ControlError> {
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
                Some(Slot::Failed(spec, _)) => return Ok(spec.clone()),
                None => {
                    return Err(error(
                        "V019-unknown",
                        format!("no volume is named {name}; `varve status` lists them"),
                    ));
                }
            }
        }
        let Some(Slot::Running(running)) = self.slots().remove(name) else {
            return Err(error(
                "V019-unknown",
                format!("no running volume is named {name}"),
            ));
        };
        running.stopper.stop();
        let closed = running
            .closed
            .recv_timeout(START_WAIT)
            .unwrap_or_else(|_| Err("it did not close in time".to_owned()));
        if let Ok(Err(why)) = running.thread.join() {
            eprintln!("blkfilter: {name}: {why}");
        }
        let _ = std::fs::remove_file(self.ublk_record(name));
        let _ = std::fs::remove_file(self.paths.devices().join(name));
        if let Err(why) = closed {
            eprintln!("blkfilter: {name}: {why}");
        }
        Ok(running.spec)
    }

    /// Ends protection: the origin is a plain disk again. Log and state file are removed; the store keeps its history.
    pub fn unprotect(&self, name: &str) -> Result<(), ControlError> {
        let spec = self.stop(name)?;
        std::fs::remove_file(self.paths.volumes().join(format!("{name}.toml")))?;
        self.slots().remove(name);
        for path in [&spec.log, &spec.state, &self.memory_path(&spec)] {
            if path.is_file() {
                let _ = std::fs::remove_file(path);
            }
        }
        Ok(())
    }

    /// Takes the device away and opens a rewind span, or goes on with one that was interrupted.
    pub fn rewind_begin(&self, name: &str, target: Lsn) -> Result<(), ControlError> {
        {
            let slots = self.slots();
            if let Some(Slot::Running(running)) = slots.get(name)
                && matches!(running.mode, Mode::Rewinding(_))
            {
                return match running.rewind_target {
                    Some(old) if old == target => Ok(()),
                    old => Err(error(
                        "V023-rewinding",
                        format!(
                            "a rewind to LSN {} was interrupted; finish it first: `varve rewind lsn:{}`",
                            old.unwrap_or_default(),
                            old.unwrap_or_default()
                        ),
                    )),
                };
            }
        }
        let spec = self.stop(name)?;
        self.open(spec.clone(), Some(target)).inspect_err(|failed| {
            eprintln!("blkfilter: {name}: rewind: {failed}");
            let _ = self.open(spec.clone(), None);
        })
    }

    /// Writes in a rewind.
    pub fn rewind_write(&self, name: &str, offset: u64, data: Vec<u8>) -> Result<(), ControlError> {
        let jobs = match self.slots().get(name) {
            Some(Slot::Running(running)) => running.jobs.clone(),
            _ => None,
        };
        let jobs = jobs.ok_or_else(|| {
            error(
                "V024-no-rewind",
                format!("volume {name} is not being rewound"),
            )
        })?;
        let mut at = offset;
        for part in data.chunks(channel::JOB_BYTES_MAX) {
            let length = part.len() as u64;
            jobs.call(RequestKind::Write, at, length, part.to_vec(), false)
                .map_err(|errno| {
                    error(
                        "V025-write",
                        format!(
                            "writing at {at}: {}",
                            std::io::Error::from_raw_os_error(errno)
                        ),
                    )
                })?;
            at += length;
        }
        Ok(())
    }

    /// Ends the rewind and shows the device again.
    pub fn rewind_end(&self, name: &str) -> Result<(), ControlError> {
        let jobs = match self.slots().get(name) {
            Some(Slot::Running(running)) => running.jobs.clone(),
            _ => None,
        };
        let jobs = jobs.ok_or_else(|| {
            error(
                "V024-no-rewind",
                format!("volume {name} is not being rewound"),
            )
        })?;
        jobs.call(RequestKind::Flush, 0, 0, Vec::new(), false)
            .map_err(|errno| {
                error(
                    "V025-write",
                    format!("flushing: {}", std::io::Error::from_raw_os_error(errno)),
                )
            })?;
        if !self.ask(name, START_WAIT, Message::EndRewind)? {
            return Err(error(
                "V026-bypass",
                "the log is in bypass: the rewind's end could not be recorded. Try again once `varve status` says healing or protected",
            ));
        }
        let spec = self.stop(name)?;
        self.open(spec, None)
    }

    /// Closes what is not in use; what is in use is left to the next daemon, which takes it over.
    pub fn shutdown(&self) {
        let names: Vec<String> = self.slots().keys().cloned().collect();
        for name in names {
            if let Err(error) = self.stop(&name) {
                eprintln!("blkfilter: {name}: left running for the next daemon: {error}");
            }
        }
    }
}

/// Stands in for a file that cannot be opened: every read and write of it fails, which leads to bypass, not to a missing device.
fn or_broken(opened: std::io::Result<File>, strict: bool) -> std::io::Result<File> {
    match opened {
        Err(failed) if !strict => {
            eprintln!("blkfilter: {failed}: the volume starts without it");
            File::open("/dev/null")
        }
        result => result,
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
            "V027-missing",
            format!("{} does not exist; `lsblk` lists devices", device.display()),
        ),
        _ => error("V013-device", format!("{}: {why}", device.display())),
    }
}

fn check_size(spec: &VolumeSpec, geometry: &Geometry) -> Result<(), ControlError> {
    if geometry.bytes != spec.bytes {
        let how = if geometry.bytes < spec.bytes {
            "shrunk"
        } else {
            "grown"
        };
        return Err(error(
            "V028-size",
            format!(
                "{} is {} bytes, it was {} when it was protected: it has {how}, or is another device. Nothing was changed. `varve unprotect {}` and `varve protect` begin a new history",
                spec.device.display(),
                geometry.bytes,
                spec.bytes,
                spec.name
            ),
        ));
    }
    Ok(())
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

fn is_busy(mapped: &str) -> bool {
    use std::os::unix::fs::OpenOptionsExt;
    let open = File::options()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(mapped);
    matches!(open, Err(e) if e.raw_os_error() == Some(libc::EBUSY))
}

fn info_of(running: &Running) -> VolumeInfo {
    let (reply, answer) = bounded::<VolumeStatus>(1);
    let _ = running.messages.send(Message::Status(reply));
    running.waker.wake();
    let spec = &running.spec;
    let mut info = VolumeInfo {
        name: spec.name.clone(),
        id: spec.id.clone(),
        device: spec.device.display().to_string(),
        mapped: running.mapped.clone(),
        front: running.front.to_owned(),
        bytes: spec.bytes,
        note: running.note.clone(),
        reread_bytes: running.reread_bytes,
        rewind_target: running.rewind_target.map(|lsn| lsn.0),
        segment_count: spec.segment_count,
        ..VolumeInfo::default()
    };
    let Ok(status) = answer.recv_timeout(ANSWER_WAIT) else {
        info.state = "failed".to_owned();
        info.note = "its thread does not answer".to_owned();
        return info;
    };
    info.state = status.state.name().to_owned();
    info.next_lsn = status.log.next_lsn.0;
    info.durable_lsn = status.log.durable_lsn.0;
    info.sequence = status.log.sequence.0;
    info.segments_held = status.log.segments_held;
    info.last_record_ns = status.last_record_time.0;
    info.marked_bytes = status.marked_bytes;
    info.open_bytes = status.open_bytes;
    if let Some((since, reason, unmarked)) = status.bypass {
        info.bypass_since_ns = since.0;
        info.bypass_reason = reason;
        info.bypass_unmarked = unmarked;
    }
    info.writes = status.writes;
    info.write_bytes = status.write_bytes;
    info.reads = status.reads;
    info.flushes = status.flushes;
    info.cold_writes = status.cold_writes;
    info.bypasses = status.bypasses;
    info.bypassed_bytes = status.bypassed_bytes;
    info.copied_bytes = status.copied_bytes;
    info.origin_errors = status.origin_errors;
    info.log_bytes = status.log.bytes_written;
    info.memory_locked = status.memory_locked;
    info
}

/// Everything a volume needs, opened and claimed.
struct Files {
    origin: File,
    log: File,
    state: File,
    memory: File,
    memory_bytes: usize,
}

type Started = (Volume<Law>, UringMedium<OwnRing>, crate::StartReport);

impl Files {
    /// Whether the log ends inside a rewind: then the device must not be offered before it is finished.
    fn peek(&self, config: &VolumeConfig) -> Option<Lsn> {
        let ring = OwnRing::new(16).ok()?;
        let mut medium = UringMedium::new(
            ring,
            self.origin.try_clone().ok()?,
            self.log.try_clone().ok()?,
            self.state.try_clone().ok()?,
        )
        .ok()?;
        peek_rewind(&mut medium, config)
    }

    fn start(self, config: VolumeConfig, rewind: Option<RewindRequest>) -> Result<Started, String> {
        let text = |e: std::io::Error| e.to_string();
        let identity = SurvivingIdentity {
            boot: origin::boot_id(),
            device: origin::identity(&self.origin).map_err(text)?,
            volume: config.volume,
        };
        let memory = Memory::of_file(&self.memory, self.memory_bytes).map_err(text)?;
        if let Err(error) = memory.lock() {
            eprintln!(
                "blkfilter: memory is not locked ({error}): under memory pressure writes may be slow; see `varve doctor`"
            );
        }
        let kernel = origin::kernel_counters(&self.origin);
        let ring = OwnRing::new(256).map_err(text)?;
        let mut medium = UringMedium::new(ring, self.origin, self.log, self.state).map_err(text)?;
        let surviving = SurvivingMemory::new(memory, &identity);
        let (volume, report) = Volume::start(&mut medium, config, surviving, kernel, rewind)
            .map_err(|e| e.to_string())?;
        Ok((volume, medium, report))
    }
}
