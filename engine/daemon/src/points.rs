//! Recovery points that are made by themselves: on a schedule, with the user's commands around each; at mount, unmount and boot.
//!
//! One thread looks at the clock and at what is mounted. A scheduled point is made by a thread of its own, because a command may take its time.

use crate::scheduled_point::ScheduledPoint;
use crate::service::{Service, error, now_ns};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use varve_control::{
    ControlError, FilterOp, FilterReply, PointPolicy, StorePolicy, VolumeInfo, mounts_of,
};
use varve_store::parse_span;

/// How long points on the schedule may take to end with the daemon; after it the next one runs their second command. systemd waits for longer.
const POINTS_END: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Points are no closer than this.
const EVERY_MIN_NS: i64 = 1_000_000_000;
/// Beside the store: the boot in which volumes were seen last.
const BOOT: &str = "boot";
/// A volume that records again later than this after the daemon's start has no point of the boot.
const BOOT_FOR: Duration = Duration::from_secs(15 * 60);

/// What is known of a volume.
#[derive(Default)]
struct Known {
    mounts: Option<BTreeSet<PathBuf>>,
    /// When its last scheduled point was due, ns of the wall clock.
    last_ns: Option<i64>,
    /// Its counter of writes once that was made, and the commands had run.
    writes: Option<u64>,
    /// Makes it, and gives that counter.
    job: Option<JoinHandle<Option<u64>>>,
}

struct Points {
    service: Arc<Service>,
    known: BTreeMap<String, Known>,
    /// This boot, and the volumes that have had no point of it yet.
    boot: Option<(String, BTreeSet<String>)>,
    /// Volumes (ID, name) at whose points an earlier daemon may have been killed; until the policy was read.
    left_over: Vec<(String, String)>,
    began: Instant,
    said: String,
}

/// Works until the process ends.
pub(crate) fn run(service: Arc<Service>) {
    let last = std::fs::read_to_string(service.paths().store().join(BOOT)).unwrap_or_default();
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let is_new = id.trim() != last.trim();
    let known = varve_control::load_specs(&service.paths().volumes());
    let known = known.into_iter().filter_map(Result::ok);
    let known: Vec<_> = known.map(|spec| (spec.id, spec.name)).collect();
    let ids = known.iter().map(|(id, _)| id.clone());
    let boot = is_new.then(|| (id.trim().to_owned(), ids.collect()));
    let mut points = Points {
        service,
        known: BTreeMap::new(),
        boot,
        left_over: known,
        began: Instant::now(),
        said: String::new(),
    };
    loop {
        points.look();
        std::thread::sleep(LOOK_EVERY);
    }
}

impl Points {
    fn look(&mut self) {
        let path = self.service.paths().store_policy();
        let policy = StorePolicy::load(&path).and_then(|policy| {
            let every = every(&policy.points)
                .map_err(|why| format!("{}: points.every: {why}", path.display()))?;
            Ok((policy.points, every))
        });
        let (policy, every) = match policy {
            Ok((policy, every)) => {
                self.end_what_was_begun(&policy);
                (policy, every)
            }
            Err(why) => {
                self.say(format!("{why}. No points are made on a schedule"));
                (PointPolicy::default(), None)
            }
        };
        let status = self
            .service
            .filter()
            .and_then(|mut filter| filter.call(&FilterOp::Status));
        let Ok(FilterReply::Status { volumes, .. }) = status else {
            return;
        };
        let runs = |known: &Known| known.job.as_ref().is_some_and(|job| !job.is_finished());
        self.known
            .retain(|id, known| volumes.iter().any(|volume| volume.id == *id) || runs(known));
        for volume in volumes.iter().filter(|volume| !volume.mapped.is_empty()) {
            self.mounted(volume, policy.events);
            if let Some(every) = every
                && volume.state == "protected"
            {
                self.scheduled(volume, every, &policy);
            }
        }
        self.booted(&volumes, policy.events);
    }

    /// Once, when the policy is first read. Until it has ended, the volume gets no new point on the schedule.
    fn end_what_was_begun(&mut self, policy: &PointPolicy) {
        for (id, name) in std::mem::take(&mut self.left_over) {
            let begun = self.service.begun_point(&id);
            if !begun.exists() {
                continue;
            }
            let rest = ScheduledPoint {
                service: Arc::clone(&self.service),
                volume: name,
                policy: policy.clone(),
                begun,
                before: (id.clone(), None),
            };
            self.known.entry(id).or_default().job = Some(std::thread::spawn(move || {
                rest.run_rest();
                None
            }));
        }
    }

    /// Said once, not four times a second.
    fn say(&mut self, text: String) {
        if text != self.said {
            eprintln!("varved: {text}");
            self.said = text;
        }
    }

    /// A mount or an unmount since the last look.
    fn mounted(&mut self, volume: &VolumeInfo, wanted: bool) {
        let device = std::fs::canonicalize(&volume.mapped).unwrap_or_default();
        let now: BTreeSet<PathBuf> = mounts_of(&device.display().to_string())
            .into_iter()
            .collect();
        let known = self.known.entry(volume.id.clone()).or_default();
        let Some(before) = known.mounts.replace(now.clone()) else {
            return;
        };
        if before == now || !wanted {
            return;
        }
        let what = match now.is_subset(&before) {
            true => "unmounted",
            false => "mounted",
        };
        // What is mounted nowhere is clean.
        let point = Point {
            name: named(what),
            freeze: now.is_empty(),
            application: false,
        };
        if let Err(failed) = point.make(&self.service, &volume.name) {
            self.say(format!("{}: no point `{what}`: {failed}", volume.name));
        }
    }

    /// Once for each volume after the machine has started, when it records again; not if that is long afterwards.
    fn booted(&mut self, volumes: &[VolumeInfo], wanted: bool) {
        let Some((boot, waiting)) = &mut self.boot else {
            return;
        };
        let in_time = self.began.elapsed() < BOOT_FOR;
        let ready = |volume: &&VolumeInfo| volume.state == "protected" && wanted && in_time;
        let mut failed = None;
        for volume in volumes.iter().filter(ready) {
            if waiting.remove(&volume.id) {
                let point = Point {
                    name: named("booted"),
                    freeze: false,
                    application: false,
                };
                let made = point.make(&self.service, &volume.name);
                failed = made
                    .err()
                    .map(|why| format!("{}: no point `booted`: {why}", volume.name));
            }
        }
        if waiting.is_empty() || !wanted || !in_time {
            let place = self.service.paths().store();
            let _ = std::fs::create_dir_all(&place)
                .and_then(|()| std::fs::write(place.join(BOOT), boot.as_bytes()));
            self.boot = None;
        }
        if let Some(failed) = failed {
            self.say(failed);
        }
    }

    fn scheduled(&mut self, volume: &VolumeInfo, every: i64, policy: &PointPolicy) {
        let known = self.known.entry(volume.id.clone()).or_default();
        let now = now_ns();
        let Some(last) = known.last_ns else {
            // A restart of this daemon makes no point that is not due; nor does it put off one that is.
            let noted = std::fs::read_to_string(self.service.last_point(&volume.id));
            let noted = noted.ok().and_then(|text| text.trim().parse::<i64>().ok());
            known.last_ns = Some(noted.unwrap_or(now).min(now));
            if noted.is_none() {
                self.service.note_last_point(&volume.id, now);
            }
            return;
        };
        // A clock that was set back does not stop the schedule.
        let is_due = (now - last).abs() >= every;
        let is_done = known.job.as_ref().is_none_or(JoinHandle::is_finished);
        if !is_due || !is_done {
            return;
        }
        if let Some(job) = known.job.take() {
            known.writes = job.join().ok().flatten();
        }
        if known.writes == Some(volume.writes) {
            return;
        }
        known.last_ns = Some(now);
        self.service.note_last_point(&volume.id, now);
        let job = ScheduledPoint {
            service: Arc::clone(&self.service),
            volume: volume.name.clone(),
            policy: policy.clone(),
            begun: self.service.begun_point(&volume.id),
            before: (volume.id.clone(), Some(last)),
        };
        known.job = Some(std::thread::spawn(move || job.run()));
    }
}

/// How often; none: on no schedule.
pub(crate) fn every(policy: &PointPolicy) -> Result<Option<i64>, String> {
    match policy.every.trim() {
        "" => Ok(None),
        text => match parse_span(text)? {
            span if span < EVERY_MIN_NS => Err("points are no closer than a second".to_owned()),
            span => Ok(Some(span)),
        },
    }
}

/// `scheduled-@1795752931.937`: the time makes it unique.
pub(crate) fn named(what: &str) -> String {
    format!("{what}-{}", crate::describe::clock(now_ns()))
}

pub(crate) struct Point {
    pub(crate) name: String,
    pub(crate) freeze: bool,
    pub(crate) application: bool,
}

impl Point {
    /// Makes it; says what is less than was wanted of it.
    pub(crate) fn make(&self, service: &Service, volume: &str) -> Result<String, ControlError> {
        let op = FilterOp::Mark {
            name: volume.to_owned(),
            label: self.name.clone(),
            freeze: self.freeze,
            application: self.application,
            automatic: true,
        };
        match service.filter()?.call(&op)? {
            FilterReply::Marked { note, .. } => Ok(note),
            _ => Err(error("C005-answer", "blkfilter gave an unexpected answer")),
        }
    }
}

/// A point on the schedule that is being made.
pub(crate) struct UnderWay {
    service: Arc<Service>,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.service.points_under_way.fetch_sub(1, SeqCst);
    }
}

impl Service {
    /// Says that a point on the schedule begins; none: it may not any more.
    pub(crate) fn point_under_way(self: &Arc<Self>) -> Option<UnderWay> {
        // Said first: whoever ends the daemon says that first, then waits for those that have.
        self.points_under_way.fetch_add(1, SeqCst);
        let under_way = UnderWay {
            service: Arc::clone(self),
        };
        (!self.is_ending()).then_some(under_way)
    }

    /// Whether the daemon was told to end.
    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(SeqCst)
    }

    /// To be called before the process ends: what a point on the schedule holds of applications is let go, and images end.
    pub fn end_all(&self) {
        self.ending.store(true, SeqCst);
        let since = Instant::now();
        while self.points_under_way.load(SeqCst) > 0 && since.elapsed() < POINTS_END {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.hide_all();
    }

    /// Where it stands when a volume's last scheduled point was due, in nanoseconds since 1970.
    fn last_point(&self, id: &str) -> PathBuf {
        let volumes = self.paths().store().join("volumes");
        volumes.join(id).join("last-point")
    }

    /// What stands there while the commands around a volume's scheduled point may have run by half.
    pub(crate) fn begun_point(&self, id: &str) -> PathBuf {
        self.last_point(id).with_file_name("begun-point")
    }

    pub(crate) fn note_last_point(&self, id: &str, now: i64) {
        // Lost, the schedule begins anew.
        let _ = std::fs::write(self.last_point(id), now.to_string());
    }
}
