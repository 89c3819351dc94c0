//! Which versions a file had. Two images in which the file has the same inode and the same time of change hold the same version, so only where they
//! differ is looked between them; the newest first. (What a file system has not yet noted in the inode is not seen: some seconds, at most.)

use crate::Context;
use crate::files::place::Place;
use crate::files::{Tree, kind_of, modified_ns};
use crate::past::{ask, fetch_history, middle, unexpected};
use serde::Serialize;
use std::cell::Cell;
use std::os::unix::fs::MetadataExt;
use varve_cli::{show_bytes, show_time};
use varve_control::{ControlError, Instant, StoreOp, StoreReply};

/// How often an interval is halved in which the file is missing at both ends.
const HALVED_WHERE_MISSING: u32 = 5;

/// What is looked for.
pub struct Wanted {
    /// None: from the beginning of the history.
    pub since: Option<Instant>,
    /// The end.
    pub until: Instant,
    /// Intervals that are shorter are not looked into, ns.
    pub step_ns: i64,
    /// Versions.
    pub most: usize,
}

/// What is seen of a file in an image.
#[derive(Clone, PartialEq, Eq, Serialize)]
struct Seen {
    kind: &'static str,
    bytes: u64,
    modified_ns: i64,
    mode: u32,
    uid: u32,
    gid: u32,
    #[serde(skip)]
    inode: u64,
    #[serde(skip)]
    changed: (i64, i64),
}

#[derive(Clone)]
struct Look {
    lsn: u64,
    time_ns: i64,
    seen: Option<Seen>,
}

/// A version, or an interval without the file.
#[derive(Serialize)]
struct Version {
    /// First and last instant at which it was seen.
    first_lsn: u64,
    first_ns: i64,
    last_lsn: u64,
    last_ns: i64,
    /// None: there was no such file.
    file: Option<Seen>,
}

#[derive(Serialize)]
struct Versions {
    versions: Vec<Version>,
    /// Older ones were looked for, too.
    complete: bool,
    /// Instants that were looked at. A file that was missing at two neighbours may have been there between them.
    looked_at: usize,
}

/// Finds and lists them.
pub fn run(context: &Context, place: &Place, wanted: &Wanted) -> Result<(), ControlError> {
    let history = fetch_history(context, &place.volume)?;
    let resolve = |instant: &Instant| {
        let op = StoreOp::Resolve {
            volume: place.volume.clone(),
            instant: instant.clone(),
        };
        match ask(context, &op, "")? {
            StoreReply::Resolved { lsn, .. } => Ok(lsn),
            _ => Err(unexpected()),
        }
    };
    let oldest = match &wanted.since {
        Some(instant) => resolve(instant)?,
        None => history
            .kept
            .first()
            .map_or(history.first_lsn, |kept| kept.lsn.min(history.first_lsn)),
    };
    let newest = resolve(&wanted.until)?;
    // Where nothing can be mounted there is nothing to say about files.
    let (mounted, unmountable) = (Cell::new(false), Cell::new(None));
    let look = |lsn: u64| {
        let (look, failed) = look(context, place, lsn)?;
        match failed {
            Some(failed) => unmountable.set(Some(failed)),
            None => mounted.set(true),
        }
        Ok::<Look, ControlError>(look)
    };
    let middle = |after: u64, before: u64| middle(context, &place.volume, after, before);
    let (looks, complete) = search(look(oldest)?, look(newest)?, wanted, look, middle)?;
    let mut versions = group(&looks);
    versions.reverse();
    if let Some(failed) = unmountable.take().filter(|_| !mounted.get()) {
        return Err(failed);
    }
    if versions.iter().all(|version| version.file.is_none()) {
        return Err(ControlError::new(
            "X003-unknown",
            format!(
                "{} was not found at any of {} instants from {} to {}. `varve files list DIRECTORY --at INSTANT` shows what there was",
                place.named.display(),
                looks.len(),
                show_time(looks.first().map_or(0, |look| look.time_ns)),
                show_time(looks.last().map_or(0, |look| look.time_ns)),
            ),
        ));
    }
    let found = Versions {
        versions,
        complete,
        looked_at: looks.len(),
    };
    context.output.result(&found, || {
        for version in &found.versions {
            let what = match &version.file {
                None => "not there".to_owned(),
                Some(file) => format!(
                    "{}, {:04o} {}:{}, modified {}",
                    match file.kind {
                        "file" => show_bytes(file.bytes),
                        kind => kind.to_owned(),
                    },
                    file.mode,
                    file.uid,
                    file.gid,
                    show_time(file.modified_ns)
                ),
            };
            println!(
                "{} to {}  lsn:{}  {what}",
                show_time(version.first_ns),
                show_time(version.last_ns),
                version.last_lsn
            );
        }
        if !complete {
            context.output.say(format!(
                "Older ones were not looked for: --most {} was reached",
                wanted.most
            ));
        }
        context.output.say(format!(
            "Get one with: varve files get {} --at lsn:N",
            place.named.display()
        ));
    });
    Ok(())
}

/// What is seen at an instant; and why it could not be mounted, if so.
fn look(
    context: &Context,
    place: &Place,
    lsn: u64,
) -> Result<(Look, Option<ControlError>), ControlError> {
    let tree = match Tree::open(context, place, &Instant::Lsn(lsn)) {
        Ok(tree) => tree,
        // There may have been no file system yet.
        Err(failed) if failed.code == "X006-mount" => {
            let time_ns = time_of(context, place, lsn)?;
            let seen = None;
            return Ok((Look { lsn, time_ns, seen }, Some(failed)));
        }
        Err(failed) => return Err(failed),
    };
    let seen = match tree.find(&place.inside) {
        Ok(file) => {
            let metadata = file.metadata()?;
            Some(Seen {
                kind: kind_of(&metadata),
                bytes: metadata.len(),
                modified_ns: modified_ns(&metadata),
                mode: metadata.mode() & 0o7777,
                uid: metadata.uid(),
                gid: metadata.gid(),
                inode: metadata.ino(),
                changed: (metadata.ctime(), metadata.ctime_nsec()),
            })
        }
        Err(failed) if failed.code == "X003-unknown" => None,
        Err(failed) => return Err(failed),
    };
    let (lsn, time_ns) = (tree.image.lsn, tree.image.time_ns);
    tree.close()?;
    Ok((Look { lsn, time_ns, seen }, None))
}

fn time_of(context: &Context, place: &Place, lsn: u64) -> Result<i64, ControlError> {
    let op = StoreOp::Resolve {
        volume: place.volume.clone(),
        instant: Instant::Lsn(lsn),
    };
    match ask(context, &op, "")? {
        StoreReply::Resolved { time_ns, .. } => Ok(time_ns),
        _ => Err(unexpected()),
    }
}

/// Looks between two instants until neighbours differ by less than a step; false: there were too many versions.
fn search(
    oldest: Look,
    newest: Look,
    wanted: &Wanted,
    mut look: impl FnMut(u64) -> Result<Look, ControlError>,
    mut middle: impl FnMut(u64, u64) -> Result<Option<u64>, ControlError>,
) -> Result<(Vec<Look>, bool), ControlError> {
    let mut looks = vec![oldest.clone(), newest.clone()];
    let mut changes = 0;
    // What is still to be looked into; the newest is on top.
    let mut intervals = vec![(oldest, newest, HALVED_WHERE_MISSING)];
    while let Some((old, new, missing)) = intervals.pop() {
        let same = old.seen == new.seen;
        if same && (old.seen.is_some() || missing == 0) {
            continue;
        }
        // A clock that was set back says nothing.
        let wide = !(0..=wanted.step_ns).contains(&(new.time_ns - old.time_ns));
        let between = match wide {
            true => middle(old.lsn, new.lsn)?,
            false => None,
        };
        let Some(between) = between else {
            changes += usize::from(!same);
            if changes >= wanted.most {
                // What is older was not looked into.
                looks.retain(|look| look.lsn >= old.lsn);
                looks.sort_by_key(|look| look.lsn);
                return Ok((looks, false));
            }
            continue;
        };
        let found = look(between)?;
        looks.push(found.clone());
        let missing = if same { missing - 1 } else { missing };
        intervals.push((old, found.clone(), missing));
        intervals.push((found, new, missing));
    }
    looks.sort_by_key(|look| look.lsn);
    Ok((looks, true))
}

fn group(looks: &[Look]) -> Vec<Version> {
    let mut versions: Vec<Version> = Vec::new();
    for look in looks {
        match versions.last_mut() {
            Some(version) if version.file == look.seen => {
                (version.last_lsn, version.last_ns) = (look.lsn, look.time_ns);
            }
            _ => versions.push(Version {
                first_lsn: look.lsn,
                first_ns: look.time_ns,
                last_lsn: look.lsn,
                last_ns: look.time_ns,
                file: look.seen.clone(),
            }),
        }
    }
    versions
}

#[cfg(test)]
mod tests {
    use super::{Look, Seen, Wanted, group, search};
    use varve_control::Instant;

    /// The file at LSN 0 to 1000: which version is there, at one ns a record.
    fn found(
        version: impl Fn(u64) -> Option<i64>,
        most: usize,
    ) -> (Vec<(u64, Option<i64>)>, bool, usize) {
        let look = |lsn: u64| Look {
            lsn,
            time_ns: lsn as i64,
            seen: version(lsn).map(|number| Seen {
                kind: "file",
                bytes: 1,
                modified_ns: number,
                mode: 0,
                uid: 0,
                gid: 0,
                inode: 1,
                changed: (number, 0),
            }),
        };
        let wanted = Wanted {
            since: None,
            until: Instant::Now,
            step_ns: 0,
            most,
        };
        let mut looked = 0;
        let (looks, whole) = search(
            look(0),
            look(1000),
            &wanted,
            |lsn| {
                looked += 1;
                Ok(look(lsn))
            },
            |after, before| Ok((before > after + 1).then_some(after + (before - after) / 2)),
        )
        .unwrap();
        let versions = group(&looks)
            .iter()
            .map(|v| (v.first_lsn, v.file.as_ref().map(|f| f.modified_ns)))
            .collect();
        (versions, whole, looked)
    }

    #[test]
    fn every_version_is_found_at_the_record_that_made_it() {
        let (versions, whole, looked) = found(
            |lsn| match lsn {
                0..17 => None,
                17..400 => Some(1),
                400..402 => Some(2),
                402..999 => Some(3),
                _ => Some(4),
            },
            50,
        );
        assert!(whole && looked < 50, "{looked}");
        assert_eq!(
            versions,
            [
                (0, None),
                (17, Some(1)),
                (400, Some(2)),
                (402, Some(3)),
                (999, Some(4))
            ]
        );
    }

    #[test]
    fn a_file_that_came_and_went_is_found() {
        let (versions, ..) = found(|lsn| (300..450).contains(&lsn).then_some(1), 50);
        assert_eq!(versions, [(0, None), (300, Some(1)), (450, None)]);
    }

    #[test]
    fn of_too_many_versions_the_newest_are_found() {
        let (versions, whole, _) = found(|lsn| Some(lsn as i64 / 100), 3);
        assert!(!whole);
        assert_eq!(versions.last().unwrap(), &(1000, Some(10)));
        assert!(
            versions.contains(&(800, Some(8))) && !versions.contains(&(600, Some(6))),
            "{versions:?}"
        );
    }
}
