//! What `varved` does: follows the logs, answers questions about the past.

use crate::export::Exports;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use varve_control::{
    Client, ControlError, FilterOp, FilterReply, Instant, Paths, PointInfo, Reporter, StoreOp,
    StoreReply, VolumeHistory, VolumeInfo, VolumeSpec, load_specs,
};
use varve_format::{Lsn, RecordKind, SegmentSequence, VolumeId, WallTime};
use varve_restore::{RestoreError, differences};
use varve_store::{Image, Nearest, StoreError, VolumeStore, ingest};

/// How often the logs are looked at.
const FOLLOW_EVERY: Duration = Duration::from_millis(500);

/// The service.
pub struct Service {
    paths: Paths,
    stores: Mutex<BTreeMap<String, VolumeStore>>,
    exports: Exports,
    /// Volumes that this process is rewinding; another's interrupted rewind is finished by `follow`.
    rewinding: Mutex<BTreeSet<String>>,
}

/// Held while this process writes a rewind.
struct RewindClaim {
    service: Arc<Service>,
    name: String,
}

impl Drop for RewindClaim {
    fn drop(&mut self) {
        self.service
            .rewinding
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .remove(&self.name);
    }
}

fn error(code: &str, message: impl std::fmt::Display) -> ControlError {
    ControlError::new(code, message)
}

fn store_error(failed: &StoreError) -> ControlError {
    error(failed.code(), failed)
}

impl Service {
    /// A service over `paths`.
    #[must_use]
    pub fn new(paths: Paths) -> Service {
        Service {
            paths,
            stores: Mutex::new(BTreeMap::new()),
            exports: Exports::default(),
            rewinding: Mutex::new(BTreeSet::new()),
        }
    }

    fn stores(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, VolumeStore>> {
        self.stores
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// One rewind of a volume at a time in this process.
    fn claim_rewind(self: &Arc<Self>, name: &str) -> Option<RewindClaim> {
        let mut claimed = self
            .rewinding
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        claimed.insert(name.to_owned()).then(|| RewindClaim {
            service: Arc::clone(self),
            name: name.to_owned(),
        })
    }

    fn specs(&self) -> Vec<VolumeSpec> {
        load_specs(&self.paths.volumes())
            .into_iter()
            .filter_map(Result::ok)
            .collect()
    }

    fn filter(&self) -> Result<Client, ControlError> {
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

    fn info(&self, name: &str) -> Result<VolumeInfo, ControlError> {
        match self.filter()?.call(&FilterOp::Status)? {
            FilterReply::Status { volumes, .. } => volumes
                .into_iter()
                .find(|volume| volume.name == name)
                .ok_or_else(|| {
                    error(
                        "V019-unknown",
                        format!("no volume is named {name}; `varve status` lists them"),
                    )
                }),
            _ => Err(error("C005-answer", "blkfilter gave an unexpected answer")),
        }
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
                if let (Some(target), "rewinding") = (volume.rewind_target, volume.state.as_str())
                    && let Some(claim) = self.claim_rewind(&volume.name)
                {
                    // On a thread of its own: the log must go on being drained.
                    let (service, volume) = (Arc::clone(self), volume.clone());
                    std::thread::spawn(move || {
                        if let Err(failed) = service.finish_rewind(&volume, Lsn(target)) {
                            eprintln!("varved: {}: {failed}", volume.name);
                            std::thread::sleep(Duration::from_secs(5));
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

    fn with_store<T>(
        &self,
        id: &str,
        work: impl FnOnce(&mut VolumeStore) -> Result<T, ControlError>,
    ) -> Result<T, ControlError> {
        let mut stores = self.stores();
        if !stores.contains_key(id) {
            let volume = VolumeId::parse(id)
                .ok_or_else(|| error("V029-id", "the volume's id is not 32 hex digits"))?;
            let store =
                VolumeStore::open(&self.paths.store(), volume).map_err(|e| store_error(&e))?;
            for damage in store.damaged() {
                eprintln!("varved: {id}: {damage}");
            }
            stores.insert(id.to_owned(), store);
        }
        stores
            .get_mut(id)
            .map_or_else(|| Err(error("S003-locked", "the store went away")), work)
    }

    /// Takes every sealed segment below `below` into the store and lets the log recycle it.
    fn take(&self, volume: &VolumeInfo, below: SegmentSequence) -> Result<(), ControlError> {
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
        let done = self.with_store(&volume.id, |store| {
            let mut log = File::open(&spec.log)
                .map_err(|e| error("V014-log", format!("the log {}: {e}", spec.log.display())))?;
            ingest(
                store,
                &mut log,
                spec.segment_bytes,
                spec.segment_count,
                below,
            )
            .map_err(|e| store_error(&e))
        })?;
        for problem in &done.problems {
            eprintln!("varved: {}: {problem}", volume.name);
        }
        self.filter()?.call::<_, FilterReply>(&FilterOp::Release {
            name: volume.name.clone(),
            below: done.below.0,
        })?;
        Ok(())
    }

    /// Brings the store up to this moment.
    fn refresh(&self, name: &str) -> Result<VolumeInfo, ControlError> {
        let volume = self.info(name)?;
        if matches!(volume.state.as_str(), "failed" | "bypass") {
            return Ok(volume); // The log may not answer; history up to now can still be read.
        }
        if let FilterReply::Sealed { sealed } = self.filter()?.call(&FilterOp::Seal {
            name: name.to_owned(),
        })? {
            self.take(&volume, SegmentSequence(sealed.below))?;
        }
        Ok(volume)
    }

    fn resolve(&self, store: &VolumeStore, instant: &Instant) -> Result<Lsn, ControlError> {
        let timeline = store.timeline();
        let wanted = match instant {
            Instant::Now => timeline.last().ok_or_else(|| {
                error(
                    "I001-none",
                    "there is no whole image yet: the first full copy is running",
                )
            })?,
            Instant::Lsn(lsn) => Lsn(*lsn),
            Instant::Time(ns) => {
                let first = timeline.first().map(|lsn| timeline.time_of(lsn));
                if first.is_some_and(|first| WallTime(*ns) < first) {
                    return Err(error(
                        "I002-before",
                        format!(
                            "that is before the history begins, which is at {}",
                            clock(first.map_or(0, |t| t.0))
                        ),
                    ));
                }
                if let Some(nearest) = timeline.gap_at(WallTime(*ns)) {
                    return Err(error(
                        "I006-gap",
                        describe("that time", "in a gap without single writes", &nearest),
                    ));
                }
                timeline.at_time(WallTime(*ns))
            }
            Instant::Point(name) => {
                let point = timeline
                    .points
                    .iter()
                    .rev()
                    .find(|point| read_name(store, point).as_deref() == Some(name));
                point.map(|point| point.lsn).ok_or_else(|| {
                    error(
                        "I003-point",
                        format!("no recovery point is named {name:?}; `varve points` lists them"),
                    )
                })?
            }
        };
        timeline.check(wanted).map_err(|nearest| {
            let why = nearest.reason.map_or("outside the history", span_name);
            error(
                "I004-closed",
                describe(&format!("LSN {wanted}"), why, &nearest),
            )
        })
    }

    /// Answers one question.
    pub fn answer(
        self: &Arc<Self>,
        op: StoreOp,
        reporter: &mut Reporter<'_>,
    ) -> Result<StoreReply, ControlError> {
        match op {
            StoreOp::Ping => Ok(StoreReply::Done),
            StoreOp::History { volume } => {
                let info = self.refresh(&volume)?;
                self.with_store(&info.id, |store| {
                    Ok(StoreReply::History {
                        history: Box::new(history(store)),
                    })
                })
            }
            StoreOp::Resolve { volume, instant } => {
                let info = self.refresh(&volume)?;
                self.with_store(&info.id, |store| {
                    let lsn = self.resolve(store, &instant)?;
                    Ok(StoreReply::Resolved {
                        lsn: lsn.0,
                        time_ns: store.timeline().time_of(lsn).0,
                    })
                })
            }
            StoreOp::Export {
                volume,
                instant,
                writable,
                nbd,
            } => {
                let (image, time_ns) = self.image(&volume, &instant)?;
                let lsn = image.lsn().0;
                let what = format!(
                    "{volume} at LSN {lsn} ({}){}",
                    clock(time_ns),
                    if writable { ", writable" } else { "" }
                );
                let device = self.exports.show(&self.paths, image, what, writable, nbd)?;
                Ok(StoreReply::Shown {
                    device,
                    lsn,
                    time_ns,
                })
            }
            StoreOp::Unexport { device } => {
                self.exports.hide(&device)?;
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
            StoreOp::Forget { id } => {
                self.stores().remove(&id);
                let path = VolumeId::parse(&id)
                    .map(|volume| self.paths.store().join("volumes").join(volume.to_string()));
                let path =
                    path.ok_or_else(|| error("V029-id", "the volume's id is not 32 hex digits"))?;
                std::fs::remove_dir_all(&path)
                    .map_err(|e| error("S001-io", format!("{}: {e}", path.display())))?;
                Ok(StoreReply::Done)
            }
            StoreOp::Shutdown => {
                self.exports.hide_all();
                std::process::exit(0);
            }
        }
    }

    fn image(&self, volume: &str, instant: &Instant) -> Result<(Image, i64), ControlError> {
        let info = self.refresh(volume)?;
        self.with_store(&info.id, |store| {
            let lsn = self.resolve(store, instant)?;
            let image = Image::open(store, lsn).map_err(|e| store_error(&e))?;
            Ok((image, store.timeline().time_of(lsn).0))
        })
    }

    /// Ranges that were written between two instants (by records: a rewrite of the same bytes counts).
    fn diff(&self, volume: &str, from: &Instant, to: &Instant) -> Result<StoreReply, ControlError> {
        let info = self.refresh(volume)?;
        self.with_store(&info.id, |store| {
            let (from, to) = (self.resolve(store, from)?, self.resolve(store, to)?);
            let (from, to) = (from.min(to), from.max(to));
            let mut ranges: Vec<(u64, u64)> = store
                .segments()
                .flat_map(|segment| segment.entries.iter())
                .filter(|entry| {
                    (from.0..to.0).contains(&entry.lsn.get())
                        && entry.kind().is_ok_and(RecordKind::changes_image)
                })
                .map(|entry| (entry.offset.get(), entry.offset.get() + entry.length.get()))
                .collect();
            ranges.sort_unstable();
            let mut merged: Vec<(u64, u64)> = Vec::new();
            for (start, end) in ranges {
                match merged.last_mut() {
                    Some(last) if start <= last.1 => last.1 = last.1.max(end),
                    _ => merged.push((start, end)),
                }
            }
            let ranges: Vec<(u64, u64)> = merged
                .into_iter()
                .map(|(start, end)| (start, end - start))
                .collect();
            let bytes = ranges.iter().map(|range| range.1).sum();
            Ok(StoreReply::Ranges { ranges, bytes })
        })
    }

    /// Origin against image. Blocks that are written meanwhile differ for a moment, so whatever differs is looked at again, with a newer image.
    fn compare(
        &self,
        volume: &str,
        reporter: &mut Reporter<'_>,
    ) -> Result<StoreReply, ControlError> {
        let (image, _) = self.image(volume, &Instant::Now)?;
        let info = self.info(volume)?;
        let origin = open_origin(&info.device)?;
        let mut suspects: Vec<(u64, u64)> = Vec::new();
        let note = |offset: u64, bytes: &[u8], list: &mut Vec<(u64, u64)>| {
            list.push((offset, bytes.len() as u64))
        };
        differences(
            &image,
            &origin,
            |offset, bytes| {
                note(offset, bytes, &mut suspects);
                Ok(())
            },
            |done, total| reporter.report(done, total),
        )
        .map_err(|e| restore_error(&e))?;
        for _ in 0..20 {
            if suspects.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
            let (image, _) = self.image(volume, &Instant::Now)?;
            let mut still = Vec::new();
            for (offset, length) in suspects {
                let (mut ours, theirs) = (
                    vec![0u8; length as usize],
                    read_aligned(&origin, offset, length)?,
                );
                image.read(offset, &mut ours).map_err(|e| store_error(&e))?;
                if ours != theirs {
                    still.push((offset, length));
                }
            }
            suspects = still;
        }
        let bytes = suspects.iter().map(|range| range.1).sum();
        Ok(StoreReply::Ranges {
            ranges: suspects,
            bytes,
        })
    }

    fn rewind(
        self: &Arc<Self>,
        volume: &str,
        instant: &Instant,
        dry_run: bool,
        reporter: &mut Reporter<'_>,
    ) -> Result<StoreReply, ControlError> {
        let info = self.info(volume)?;
        if let (Some(target), "rewinding") = (info.rewind_target, info.state.as_str()) {
            let message = format!(
                "a rewind to LSN {target} is being written, or was interrupted and is being finished; wait for it (`varve status`)"
            );
            return Err(error("V023-rewinding", message));
        }
        let (image, time_ns) = self.image(volume, instant)?;
        let target = image.lsn();
        if dry_run {
            let origin = open_origin(&info.device)?;
            let bytes = differences(
                &image,
                &origin,
                |_, _| Ok(()),
                |done, total| reporter.report(done, total),
            )
            .map_err(|e| restore_error(&e))?;
            return Ok(StoreReply::Rewound {
                lsn: target.0,
                time_ns,
                written_bytes: bytes,
                undo_lsn: 0,
            });
        }
        if info.state != "protected" {
            return Err(error(
                "V030-state",
                format!(
                    "{volume} is {}: a rewind could not be undone from here. Wait until `varve status` says protected",
                    info.state
                ),
            ));
        }
        drop(image);
        let _claim = self.claim_rewind(volume).ok_or_else(|| {
            error(
                "V023-rewinding",
                format!("{volume} is being rewound already; wait for it (`varve status`)"),
            )
        })?;
        self.filter()?
            .call::<_, FilterReply>(&FilterOp::RewindBegin {
                name: volume.to_owned(),
                target: target.0,
            })?;
        // The span has begun: what is below it is the present before the rewind.
        let begun = self.refresh(volume)?;
        let undo_lsn = self.with_store(&begun.id, |store| {
            Ok(store.timeline().last().map_or(0, |lsn| lsn.0))
        })?;
        let written_bytes = self.write_back(&begun, target, reporter)?;
        Ok(StoreReply::Rewound {
            lsn: target.0,
            time_ns,
            written_bytes,
            undo_lsn,
        })
    }

    /// The span is open: writes what differs and ends it.
    fn write_back(
        &self,
        info: &VolumeInfo,
        target: Lsn,
        reporter: &mut Reporter<'_>,
    ) -> Result<u64, ControlError> {
        let mut report = |done, total| {
            let _ = reporter.report(done, total);
        };
        self.write_back_with(info, target, &mut report)
    }

    fn write_back_with(
        &self,
        info: &VolumeInfo,
        target: Lsn,
        report: &mut dyn FnMut(u64, u64),
    ) -> Result<u64, ControlError> {
        let image = self.with_store(&info.id, |store| {
            Image::open(store, target).map_err(|e| store_error(&e))
        })?;
        let origin = open_origin(&info.device)?;
        let mut filter = self.filter()?;
        let name = info.name.clone();
        let write = |offset: u64, bytes: &[u8]| {
            let op = FilterOp::RewindWrite {
                name: name.clone(),
                offset,
            };
            filter
                .call_with::<_, FilterReply>(&op, bytes, |_| {})
                .map(|_| ())
                .map_err(|e| e.to_string())
        };
        // A client that goes away does not leave a rewind half done.
        let go_on = |done, total| {
            report(done, total);
            true
        };
        let written = differences(&image, &origin, write, go_on).map_err(|e| restore_error(&e))?;
        self.filter()?
            .call::<_, FilterReply>(&FilterOp::RewindEnd {
                name: info.name.clone(),
            })?;
        Ok(written)
    }

    /// A daemon died in a rewind: it is finished before the device is offered again.
    fn finish_rewind(&self, info: &VolumeInfo, target: Lsn) -> Result<(), ControlError> {
        self.refresh(&info.name)?;
        let written = self.write_back_with(info, target, &mut |_, _| {})?;
        eprintln!(
            "varved: {}: the interrupted rewind to LSN {target} is finished ({written} bytes were still to be written)",
            info.name
        );
        Ok(())
    }
}

fn open_origin(path: &str) -> Result<File, ControlError> {
    let open = |flags| File::options().read(true).custom_flags(flags).open(path);
    match open(libc::O_DIRECT) {
        Err(failed) if failed.raw_os_error() == Some(libc::EINVAL) => open(0),
        result => result,
    }
    .map_err(|e| error("V013-device", format!("{path}: {e}")))
}

fn read_aligned(file: &File, offset: u64, length: u64) -> Result<Vec<u8>, ControlError> {
    let mut space = vec![0u8; length as usize + 4096];
    let skip = space.as_ptr().align_offset(4096);
    file.read_exact_at(&mut space[skip..skip + length as usize], offset)?;
    Ok(space[skip..skip + length as usize].to_vec())
}

fn restore_error(failed: &RestoreError) -> ControlError {
    match failed {
        RestoreError::Store(inner) => store_error(inner),
        other => error("R001-restore", other),
    }
}

fn read_name(store: &VolumeStore, point: &varve_store::Event) -> Option<String> {
    let segment = store
        .segments()
        .find(|segment| segment.footer.sequence.get() == point.segment)?;
    let mut name = vec![0u8; point.entry.length.get().min(255) as usize];
    File::open(&segment.path)
        .ok()?
        .read_exact_at(&mut name, point.entry.payload.get())
        .ok()?;
    String::from_utf8(name).ok()
}

fn history(store: &VolumeStore) -> VolumeHistory {
    let timeline = store.timeline();
    let mut answer = VolumeHistory {
        records: timeline.records(),
        stored_bytes: store.stored_bytes(),
        payload_bytes: store
            .segments()
            .flat_map(|s| s.entries.iter())
            .filter(|e| e.kind == RecordKind::Write as u8)
            .map(|e| e.length.get())
            .sum(),
        ..VolumeHistory::default()
    };
    if let (Some(first), Some(last)) = (timeline.first(), timeline.last()) {
        (answer.first_lsn, answer.first_ns) = (first.0, timeline.time_of(first).0);
        (answer.last_lsn, answer.last_ns) = (last.0, timeline.time_of(last).0);
    }
    answer.closed = timeline
        .closed()
        .iter()
        .map(|c| {
            (
                c.from.0,
                c.to.0,
                c.from_time.0,
                c.to_time.0,
                span_name(c.kind).to_owned(),
            )
        })
        .collect();
    answer.gaps = timeline
        .gaps
        .iter()
        .map(|gap| (gap.entry.offset.get() as i64, gap.time.0))
        .collect();
    answer.points = timeline
        .points
        .iter()
        .map(|point| PointInfo {
            name: read_name(store, point).unwrap_or_default(),
            lsn: point.lsn.0,
            time_ns: point.time.0,
        })
        .collect();
    answer
}

fn span_name(kind: varve_format::SpanKind) -> &'static str {
    use varve_format::SpanKind::{BaseCopy, CatchUp, Resync, Rewind, Verify};
    match kind {
        BaseCopy => "first full copy",
        Resync => "resync after a crash",
        CatchUp => "catch-up after a bypass",
        Verify => "full check",
        Rewind => "rewind",
    }
}

fn describe(wanted: &str, why: &str, nearest: &Nearest) -> String {
    let side = |instant: Option<(Lsn, WallTime)>, word: &str| {
        instant.map_or_else(
            || format!("none {word}"),
            |(lsn, time)| format!("{word} it lsn:{lsn} ({})", clock(time.0)),
        )
    };
    format!(
        "{wanted} does not resolve ({why}); the nearest instants: {}, {}",
        side(nearest.before, "before"),
        side(nearest.after, "after")
    )
}

/// A time for messages: seconds since the epoch; `varve` shows clock times of its own.
fn clock(ns: i64) -> String {
    format!(
        "@{}.{:03}",
        ns.div_euclid(1_000_000_000),
        ns.rem_euclid(1_000_000_000) / 1_000_000
    )
}
