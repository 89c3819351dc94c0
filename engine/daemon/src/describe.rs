//! A store's timeline in words and numbers.

use varve_control::{CheckInfo, DrillInfo, KeptInfo, PointInfo, VolumeHistory};
use varve_format::{Lsn, PointDetail, WallTime};
use varve_store::{Drill, Event, Nearest, StoreError, VolumeStore};

/// So many names of points may be read under the lock of the stores.
const READ_HERE: usize = 8;

pub(crate) fn history(store: &VolumeStore) -> Result<VolumeHistory, StoreError> {
    let timeline = store.timeline();
    let mut answer = VolumeHistory {
        records: timeline.records(),
        stored_bytes: store.stored_bytes(),
        unsettled_bytes: store.unsettled_bytes(),
        locked: store.encrypts().is_err_and(|error| error.wants_key()),
        payload_bytes: store.segments().map(|segment| segment.payload_bytes).sum(),
        ..VolumeHistory::default()
    };
    if let (Some(first), Some(last)) = (timeline.first(), timeline.last()) {
        (answer.first_lsn, answer.first_ns) = (first.0, store.time_of(first)?.0);
        (answer.last_lsn, answer.last_ns) = (last.0, store.time_of(last)?.0);
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
    // They were read before, without the lock; but for those that came since, and those that cannot be read.
    let (mut names, mut unread) = (store.point_names(), 0);
    let mut name_of = |point: &Event| {
        store.known_name(point).or_else(|| {
            unread += 1;
            (unread <= READ_HERE)
                .then(|| names.of(point).ok())
                .flatten()
        })
    };
    answer.points = timeline
        .points
        .iter()
        // What the policy has pruned cannot be gone back to.
        .filter(|point| timeline.check(point.lsn).is_ok())
        .map(|point| PointInfo {
            // A name that cannot be read does not hide the others.
            name: name_of(point).unwrap_or_default(),
            lsn: point.lsn.0,
            time_ns: point.time.0,
            file_system_consistent: point.entry.detail & PointDetail::FILE_SYSTEM != 0,
            application_consistent: point.entry.detail & PointDetail::APPLICATION != 0,
            automatic: point.entry.detail & PointDetail::AUTOMATIC != 0,
        })
        .collect();
    let kept = timeline.kept();
    (answer.pruned_below_lsn, answer.pruned_below_ns) = (kept.below.0, kept.below_time.0);
    answer.kept = kept
        .entries
        .iter()
        .map(|entry| KeptInfo {
            lsn: entry.lsn().0,
            time_ns: entry.time().0,
            pinned: entry.is_pinned(),
        })
        .collect();
    answer.last_check = store.last_check().map(|check| CheckInfo {
        time_ns: check.time_ns,
        lsn: check.lsn,
        differing_bytes: check.differing_bytes,
    });
    let (last, proven) = store.drills();
    answer.last_drill = last.as_ref().map(drill);
    answer.last_proven = proven.as_ref().map(drill);
    Ok(answer)
}

fn drill(drill: &Drill) -> DrillInfo {
    DrillInfo {
        held_ns: drill.held.0,
        lsn: drill.lsn.0,
        time_ns: drill.time.0,
        proven: drill.proven,
        found: drill.found.clone(),
    }
}

pub(crate) fn span_name(kind: varve_format::SpanKind) -> &'static str {
    use varve_format::SpanKind::{BaseCopy, CatchUp, Resync, Rewind, Verify};
    match kind {
        BaseCopy => "first full copy",
        Resync => "resync after a crash",
        CatchUp => "catch-up after a bypass",
        Verify => "full check",
        Rewind => "rewind",
    }
}

/// Why an instant does not resolve that did once.
pub(crate) const PRUNED: &str = "pruned by the policy";

pub(crate) fn describe(wanted: &str, why: &str, nearest: &Nearest) -> String {
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
pub(crate) fn clock(ns: i64) -> String {
    format!(
        "@{}.{:03}",
        ns.div_euclid(1_000_000_000),
        ns.rem_euclid(1_000_000_000) / 1_000_000
    )
}
