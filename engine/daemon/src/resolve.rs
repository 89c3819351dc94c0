//! Which LSN an instant is that somebody names: now, a number, a time, a recovery point. One that does not resolve is refused with its neighbours.

use crate::describe::{PRUNED, clock, describe, span_name};
use crate::service::{error, now_ns, store_error};
use varve_control::{ControlError, Instant};
use varve_format::{Lsn, PointDetail, WallTime};
use varve_store::{Event, VolumeStore};

/// Clocks of a moment ago may be a little ahead of ours.
const FUTURE_SLACK_NS: i64 = 2_000_000_000;
const DAY_NS: i64 = 86_400_000_000_000;
/// Code of the reason why nothing newer than the end of protection is there.
pub(crate) const ENDED: &str = "V022-unprotected";

/// The LSN of an instant. `behind`: why what is newer than the history is not in it; such an instant is refused with that.
pub(crate) fn resolve(
    store: &VolumeStore,
    instant: &Instant,
    behind: Option<&ControlError>,
) -> Result<Lsn, ControlError> {
    let timeline = store.timeline();
    // The last instant of a volume that is protected no more is what `now` means there.
    let may_be_last = |why: &&ControlError| why.code == ENDED && *instant == Instant::Now;
    let behind_it = behind.filter(|why| !may_be_last(why));
    if let Some(why) = behind_it.filter(|_| is_beyond(store, instant)) {
        return Err(not_there(store, why));
    }
    let wanted = match instant {
        Instant::Now => timeline.last().ok_or_else(|| {
            error(
                "I001-none",
                "there is no whole image yet: the first full copy is running",
            )
        })?,
        Instant::Lsn(lsn) => Lsn(*lsn),
        Instant::Time(ns) => {
            let first = timeline.first().map(|lsn| store.time_of(lsn));
            let first = first.transpose().map_err(|e| store_error(&e))?;
            if first.is_some_and(|first| WallTime(*ns) < first) {
                return Err(error(
                    "I002-before",
                    format!(
                        "that is before the history begins, which is at {}",
                        clock(first.map_or(0, |t| t.0))
                    ),
                ));
            }
            if *ns > now_ns() + FUTURE_SLACK_NS {
                return Err(error(
                    "I005-future",
                    "that is in the future; `now` is the newest instant",
                ));
            }
            refuse_after_a_set_back(store, *ns)?;
            let gap = store.gap_at(WallTime(*ns)).map_err(|e| store_error(&e))?;
            if let Some(nearest) = gap {
                return Err(error(
                    "I006-gap",
                    describe("that time", "in a gap without single writes", &nearest),
                ));
            }
            let pruned = store.pruned_at(WallTime(*ns));
            if let Some(nearest) = pruned.map_err(|e| store_error(&e))? {
                return Err(error(
                    "I007-pruned",
                    describe("that time", PRUNED, &nearest),
                ));
            }
            store.at_time(WallTime(*ns)).map_err(|e| store_error(&e))?
        }
        Instant::Point(name) => {
            named(store, name)?
                .map(|point| point.lsn)
                .ok_or_else(|| match behind {
                    Some(why) => not_there(store, why),
                    None => error(
                        "I003-point",
                        format!("no recovery point is named {name:?}; `varve points` lists them"),
                    ),
                })?
        }
    };
    let checked = store.check(wanted).map_err(|e| store_error(&e))?;
    checked.map_err(|nearest| {
        let (code, why) = match (nearest.pruned, nearest.reason) {
            (true, _) => ("I007-pruned", PRUNED),
            (false, Some(kind)) => ("I004-closed", span_name(kind)),
            (false, None) => ("I004-closed", "outside the history"),
        };
        error(code, describe(&format!("LSN {wanted}"), why, &nearest))
    })
}

/// Records never carry a time before that of an earlier one. So while the machine's clock is behind the newest record's (it was set back), a time of the last
/// day may mean two instants, and one of them is not to be told.
fn refuse_after_a_set_back(store: &VolumeStore, ns: i64) -> Result<(), ControlError> {
    let newest = store
        .time_of(store.timeline().end())
        .map_err(|e| store_error(&e))?;
    let now = now_ns();
    if newest.0 <= now + FUTURE_SLACK_NS || ns < now - DAY_NS {
        return Ok(());
    }
    Err(error(
        "I008-clock",
        format!(
            "the machine's clock was set back: the newest record is of {}. Until then a time of the last day may be two instants. Name a point (`varve points`), or an LSN (`varve history`)",
            clock(newest.0)
        ),
    ))
}

/// The newest point of a name, whether it resolves or not: an older one of that name is another instant. One that was pruned is found last: it cannot be
/// gone back to, but that can be said.
fn named<'s>(store: &'s VolumeStore, name: &str) -> Result<Option<&'s Event>, ControlError> {
    // Names are encrypted with the rest.
    let mut names = store.point_names();
    let (mut pruned, mut unread) = (None, None);
    let mut found = None;
    for point in store.timeline().points.iter().rev() {
        match names.of(point) {
            Ok(other) if other != name => {}
            Ok(_) => match store.timeline().check(point.lsn) {
                Err(outside) if outside.pruned => {
                    pruned.get_or_insert(point);
                }
                _ => {
                    found = Some(point);
                    break;
                }
            },
            Err(why) if why.wants_key() => {
                unread.get_or_insert((point, why));
            }
            // Those that are made by themselves have names of their own, and what was pruned would not count.
            Err(_) if point.entry.detail & PointDetail::AUTOMATIC != 0 => {}
            Err(why) => match store.timeline().check(point.lsn) {
                Err(outside) if outside.pruned => {}
                _ => {
                    unread.get_or_insert((point, why));
                }
            },
        }
    }
    match (unread, found) {
        (Some((_, why)), _) if why.wants_key() => Err(store_error(&why)),
        (Some((newer, why)), Some(point)) => Err(error(
            "I003-point",
            format!(
                "the name of a newer point (lsn:{}) cannot be read ({why}): it may be {name:?}. If the one at {} is meant: lsn:{}",
                newer.lsn,
                clock(point.time.0),
                point.lsn
            ),
        )),
        _ => Ok(found.or(pruned)),
    }
}

/// Whether an instant may lie behind all that the store has.
fn is_beyond(store: &VolumeStore, instant: &Instant) -> bool {
    match instant {
        Instant::Now => true,
        Instant::Lsn(lsn) => Lsn(*lsn) > store.timeline().end(),
        Instant::Time(ns) => {
            let newest = store.segments().map(|segment| segment.time_end).max();
            newest.is_none_or(|newest| WallTime(*ns) >= newest)
        }
        Instant::Point(_) => false, // It is found, or not.
    }
}

fn not_there(store: &VolumeStore, why: &ControlError) -> ControlError {
    let newest = store.timeline().last();
    let newest = newest.map_or_else(String::new, |lsn| {
        let time = store.time_of(lsn).map_or(0, |time| time.0);
        format!(" (the newest that is: lsn:{lsn}, {})", clock(time))
    });
    error(
        &why.code,
        format!("that instant is not in the store{newest}. {}", why.message),
    )
}
