//! One volume brought to life: its files, its thread, its front end; and what it says of itself.

use crate::copies::files::SpoolFiles;
use crate::driver::{CopyAlert, FailedDevice, Message, VolumeDevice, describe};
use crate::manager::{ANSWER_WAIT, START_WAIT, error};
use crate::origin;
use crate::start::peek_rewind;
use crate::{
    Law, RewindRequest, StartReport, SurvivingIdentity, SurvivingMemory, Volume, VolumeConfig,
    VolumeStatus,
};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use std::fs::File;
use std::path::{Path, PathBuf};
use varve_control::{ControlError, FrontKind, Paths, VolumeInfo, VolumeSpec};
use varve_format::Lsn;
use varve_front::channel::{self, JobSender};
use varve_front::{
    Device, DeviceFactory, Geometry, RingPort, Showing, Stopper, Waker, show, show_partitions, ublk,
};
use varve_log::{Disk, Memory, OwnRing, UringMedium};

/// What to do with the device once it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Offer it.
    Offered,
    /// Only a rewind writes.
    Rewinding(Option<Lsn>),
}

/// A volume at work.
pub(crate) struct Running {
    pub spec: VolumeSpec,
    pub mode: Mode,
    pub front: &'static str,
    pub mapped: String,
    pub note: String,
    pub reread_bytes: u64,
    pub rewind_target: Option<Lsn>,
    pub attached: Option<Attached>,
    /// Where the history from before this start ends.
    pub history_end: Lsn,
    pub messages: Sender<Message>,
    pub waker: Waker,
    pub stopper: Stopper,
    pub jobs: Option<JobSender>,
    pub closed: Receiver<Result<(), String>>,
    pub thread: std::thread::JoinHandle<Result<(), String>>,
}

/// Everything a volume needs, opened and claimed.
pub(crate) struct Files {
    pub origin: File,
    pub log: File,
    pub state: File,
    pub memory: File,
    pub memory_bytes: usize,
    /// What its hot copies need, if it has some.
    pub copies: Option<SpoolFiles>,
    pub alerts: Sender<CopyAlert>,
}

/// Hot copies that are lost, and the highest generation ever used.
type Attached = (Vec<u32>, u32);
type Started = (
    Volume<Law>,
    UringMedium<OwnRing>,
    StartReport,
    Option<Attached>,
);

impl Files {
    /// Whether the log ends inside a rewind: then the device must not be offered before it is finished.
    pub fn peek(&self, config: &VolumeConfig) -> Option<Lsn> {
        let ring = OwnRing::new(16).ok()?;
        let mut medium = UringMedium::new(ring, self.origin.try_clone().ok()?).ok()?;
        medium.set(Disk::Log, Some(self.log.try_clone().ok()?));
        medium.set(Disk::State, Some(self.state.try_clone().ok()?));
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
        let mut medium = UringMedium::new(ring, self.origin).map_err(text)?;
        medium.set(Disk::Log, Some(self.log));
        medium.set(Disk::State, Some(self.state));
        let surviving = SurvivingMemory::new(memory, &identity);
        let (mut volume, report) = Volume::start(&mut medium, config, surviving, kernel, rewind)
            .map_err(|e| e.to_string())?;
        let attached = self
            .copies
            .map(|copies| copies.attach(&mut volume, &mut medium, report.origin_in_doubt));
        Ok((volume, medium, report, attached))
    }
}

impl Running {
    /// Starts its thread and waits until its device is there.
    pub fn launch(
        paths: &Paths,
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
        let rewind = match mode {
            Mode::Rewinding(Some(target)) => Some(RewindRequest { target }),
            _ => None,
        };
        let stop_on_failure = stopper.clone();
        let (name, alerts) = (spec.name.clone(), files.alerts.clone());
        let factory: DeviceFactory = Box::new(move |port: RingPort| -> Box<dyn Device> {
            match files.start(config, rewind) {
                Ok((volume, medium, report, attached)) => {
                    let _ = report_in.send(Ok((report, attached)));
                    Box::new(VolumeDevice::new(
                        volume,
                        medium,
                        port,
                        inbox,
                        origin::kernel_counters,
                        closed_in,
                        (name, alerts),
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
        let (shown, thread) = if front == "none" {
            let (shown_in, shown) = bounded(1);
            let _ = shown_in.send(String::new());
            let (waker, stopper) = (waker.clone(), stopper.clone());
            let thread = std::thread::Builder::new()
                .name(format!("volume-{}", spec.name))
                .spawn(move || {
                    channel::serve(&receiver, factory, &waker, &stopper).map_err(|e| e.to_string())
                })?;
            (shown, thread)
        } else {
            let showing = Showing {
                thread: format!("volume-{}", spec.name),
                through_ublk: use_ublk,
                geometry,
                recover,
                lasting: true,
                record: Some(ublk_record(paths, &spec.name)),
                directory: paths.run().join("fuse").join(&spec.name),
            };
            let shown = show(showing, factory, &waker, &stopper)?;
            (shown.device, shown.thread)
        };
        let (report, attached) = match report_out.recv_timeout(START_WAIT) {
            Ok(Ok(started)) => started,
            Ok(Err(text)) => return Err(error("V017-start", text)),
            Err(_) => return Err(not_shown(&stopper, thread)),
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
            Err(_) => return Err(not_shown(&stopper, thread)),
        };
        if !mapped.is_empty() {
            link(&paths.devices(), &spec.name, &mapped);
            show_partitions(&mapped);
        }
        let jobs = matches!(mode, Mode::Rewinding(_)).then_some(jobs);
        let (note, reread_bytes, rewind_target) =
            (describe(&report), report.reread_bytes, report.rewind_target);
        let history_end = report.history_end;
        eprintln!("blkfilter: {}: {note}", spec.name);
        Ok(Running {
            spec,
            mode,
            front,
            mapped,
            note,
            reread_bytes,
            rewind_target,
            attached,
            history_end,
            messages,
            waker,
            stopper,
            jobs,
            closed,
            thread,
        })
    }

    /// Its figures.
    pub fn info(&self) -> VolumeInfo {
        let (reply, answer) = bounded::<VolumeStatus>(1);
        let _ = self.messages.send(Message::Status(reply));
        self.waker.wake();
        let spec = &self.spec;
        let mut info = VolumeInfo {
            name: spec.name.clone(),
            id: spec.id.clone(),
            device: spec.device.display().to_string(),
            mapped: self.mapped.clone(),
            front: self.front.to_owned(),
            bytes: spec.bytes,
            note: self.note.clone(),
            reread_bytes: self.reread_bytes,
            rewind_target: self.rewind_target.map(|lsn| lsn.0),
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
        info.verified_bytes = status.verified_bytes;
        info.verify_wanted = status.verify_wanted;
        info.origin_errors = status.origin_errors;
        info.log_bytes = status.log.bytes_written;
        info.memory_locked = status.memory_locked;
        info.copies = status.copies.len() as u64;
        info.copies_lost = status.copies.iter().filter(|copy| copy.2.is_some()).count() as u64;
        info
    }
}

/// Nothing came of a device in time: ends its thread, and says why, if it knows.
pub(crate) fn not_shown(
    stopper: &Stopper,
    thread: std::thread::JoinHandle<Result<(), String>>,
) -> ControlError {
    stopper.stop();
    let why = if thread.is_finished() {
        thread.join().ok().and_then(Result::err).unwrap_or_default()
    } else {
        "the kernel did not answer (a known fault of some kernels' ADD_DEV: `varve doctor`)"
            .to_owned()
    };
    error(
        "V018-front",
        format!("the device could not be shown: {why}"),
    )
}

/// Where a daemon leaves the number of the ublk device for the next one.
pub(crate) fn ublk_record(paths: &Paths, name: &str) -> PathBuf {
    paths.run().join(format!("{name}.ublk"))
}

/// Makes the link by which a device is named.
pub(crate) fn link(directory: &Path, name: &str, mapped: &str) {
    let link = directory.join(name);
    let _ = std::fs::create_dir_all(directory);
    let _ = std::fs::remove_file(&link);
    if let Err(error) = std::os::unix::fs::symlink(mapped, &link) {
        eprintln!("blkfilter: {}: {error}", link.display());
    }
    // Now that its name can be asked for, udev is to look at it once more: it makes the links that systemd waits for.
    if let Some(kernel_name) = mapped.strip_prefix("/dev/") {
        let _ = std::fs::write(format!("/sys/class/block/{kernel_name}/uevent"), "change");
    }
}
