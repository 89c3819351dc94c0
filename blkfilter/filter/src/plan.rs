//! What do the state file, the log and surviving memory say, and what must be read again before the history is whole?
//!
//! | state file | log | memory | then |
//! |---|---|---|---|
//! | nothing | nothing | – | new volume: base copy |
//! | log speaks | its epoch, or a child of it | survived | warm: redo what was in flight; nothing is lost, nothing is read again |
//! | log speaks | its epoch, or a child of it | gone | resync of the open regions; a gap is declared |
//! | clean | closed cleanly, same fingerprint | – | go on |
//! | bypass | any | survived | catch-up of the marked blocks |
//! | any, of another size | – | – | the device was resized: everything is read again |
//! | anything else | anything else | – | unverified: everything is read again |

use crate::bitmap::Bitmap;
use crate::close::fingerprint;
use crate::config::VolumeConfig;
use crate::heal::OldEpoch;
use crate::start::StartError;
use crate::surviving::SurvivingMemory;
use varve_format::{
    Checkpoint, EpochId, Fingerprint, Hash128, Lsn, RecordKind, SegmentSequence, SpanKind,
    StateKind, StateSlot, VolumeState,
};
use varve_log::{BatchBuffer, IoError, Medium, ScanResult, SurvivingRecord, note_record};

/// If the log is lost, numbering goes on this far above what the state file remembers: more records than any epoch writes.
const LSN_JUMP: u64 = 1 << 40;
const SEQUENCE_JUMP: u64 = 1 << 20;
/// What the volume begins with.
pub(crate) struct Plan {
    pub summary: String,
    pub checkpoint: Checkpoint,
    /// New span, unless the checkpoint has one that goes on.
    pub span: Option<SpanKind>,
    pub gap: bool,
    pub mark: Mark,
    pub records: Vec<SurvivingRecord>,
    pub epoch_detail: u8,
    /// The origin may have been written by somebody else: what else depends on it (hot copies) cannot be believed.
    pub origin_in_doubt: bool,
}

impl Plan {
    fn in_doubt(self) -> Plan {
        Plan {
            origin_in_doubt: true,
            ..self
        }
    }
}

/// What the bitmap begins with.
pub(crate) enum Mark {
    /// As it survived, and these ranges, whose writes the origin may lack.
    Kept(Vec<(u64, u64)>),
    /// What the checkpoint leaves open, and ranges of failed writes.
    Open(Vec<(u64, u64)>),
    /// Everything.
    All,
}

pub(crate) struct Found {
    pub slot: Option<StateSlot>,
    pub scan: Option<ScanResult>,
    pub log_error: Option<IoError>,
}

pub(crate) fn old_epoch(found: &Found) -> OldEpoch {
    match (&found.scan, &found.slot) {
        (Some(scan), _) => OldEpoch {
            sequence: scan.tail.sequence,
            epoch: scan.tail.epoch,
            durable: scan.tail.durable,
            next: scan.tail.lsn_end,
            bytes: scan.tail.bytes,
            hash: scan.tail.hash,
            oldest_held: scan.oldest,
        },
        (None, slot) => {
            // The log is gone or out of reach. What the state file remembers keeps numbers from being used twice.
            let (epoch, lsn, sequence) = slot.as_ref().map_or(
                (EpochId::default(), Lsn::FIRST, SegmentSequence(0)),
                |slot| {
                    (
                        EpochId(slot.epoch),
                        Lsn(slot.lsn_start.get() + LSN_JUMP),
                        SegmentSequence(slot.sequence.get() + SEQUENCE_JUMP),
                    )
                },
            );
            OldEpoch {
                sequence,
                epoch,
                durable: lsn,
                next: lsn,
                bytes: 0,
                hash: Hash128::default(),
                oldest_held: SegmentSequence(sequence.0 + 1),
            }
        }
    }
}

/// The size that the history knows, if the device has another one now.
pub(crate) fn resized(found: &Found, config: &VolumeConfig) -> Option<u64> {
    let before = found.scan.as_ref()?.volume_bytes;
    (before != config.volume_bytes).then_some(before)
}

pub(crate) fn mark_open(
    bitmap: &mut Bitmap,
    checkpoint: &Checkpoint,
    failed: &[(u64, u64)],
    config: &VolumeConfig,
) {
    let region_bytes = u64::from(config.region_bytes);
    for region in &checkpoint.regions {
        let offset = u64::from(*region) * region_bytes;
        if offset < config.volume_bytes {
            bitmap.set(offset, region_bytes.min(config.volume_bytes - offset));
        }
    }
    for (offset, length) in failed {
        if *offset < config.volume_bytes {
            bitmap.set(*offset, (*length).min(config.volume_bytes - offset));
        }
    }
    if checkpoint.copy_cursor < config.volume_bytes {
        bitmap.set(
            checkpoint.copy_cursor,
            config.volume_bytes - checkpoint.copy_cursor,
        );
    }
}

pub(crate) fn plan(
    medium: &mut dyn Medium,
    config: &VolumeConfig,
    surviving: &SurvivingMemory,
    buffer: &BatchBuffer,
    found: &Found,
    kernel: Fingerprint,
) -> Result<Plan, StartError> {
    let nothing = Checkpoint {
        stable_lsn: Lsn(0),
        span: None,
        copy_cursor: u64::MAX,
        state: VolumeState::Protected,
        regions: Vec::new(),
    };
    let resized = resized(found, config);
    // An unfinished rewind stays one, whatever else is in doubt; but it cannot be finished on a device of another size.
    let rewinding = found
        .scan
        .as_ref()
        .and_then(|scan| scan.checkpoint.span)
        .filter(|span| span.0 == SpanKind::Rewind && resized.is_none());
    let whole = |summary: &str, kind: SpanKind, gap: bool| Plan {
        summary: summary.to_owned(),
        checkpoint: Checkpoint {
            copy_cursor: 0,
            span: rewinding,
            ..nothing.clone()
        },
        span: Some(kind),
        gap,
        mark: Mark::All,
        records: Vec::new(),
        epoch_detail: 0,
        origin_in_doubt: false,
    };
    if let Some(before) = resized {
        let how = if before < config.volume_bytes {
            "grown"
        } else {
            "shrunk"
        };
        let summary = format!(
            "the device has {how} from {before} to {} bytes: everything is read again",
            config.volume_bytes
        );
        return Ok(whole(&summary, SpanKind::Verify, true).in_doubt());
    }
    let (Some(slot), Some(scan)) = (&found.slot, &found.scan) else {
        return Ok(match (&found.slot, &found.scan) {
            (None, None) => whole(
                "new volume: its first full copy begins",
                SpanKind::BaseCopy,
                false,
            ),
            (None, Some(_)) => whole(
                "the state file is lost: everything is read again",
                SpanKind::Verify,
                true,
            )
            .in_doubt(),
            _ => whole(
                "the log is lost: everything is read again",
                SpanKind::Verify,
                true,
            ),
        });
    };
    let kind = slot
        .kind()
        .map_err(|e| StartError::Format("the state file", e))?;
    let same_epoch = slot.epoch == scan.tail.epoch.0;
    let descends = same_epoch || slot.epoch == scan.tail.parent_epoch.0;
    let claimed = surviving.epoch();
    let believed = claimed == Some(scan.tail.epoch) || claimed == Some(scan.tail.parent_epoch);
    let warm = if believed {
        survivors(buffer, scan)
    } else {
        None
    };
    match (kind, warm) {
        (StateKind::LogSpeaks, Some(records)) if descends => {
            let mut checkpoint = scan.checkpoint.clone();
            let region_bytes = u64::from(config.region_bytes);
            for survivor in records
                .iter()
                .filter(|survivor| survivor.lsn >= scan.tail.lsn_end)
            {
                if let Ok(kind) = survivor.record.kind() {
                    note_record(
                        &mut checkpoint,
                        kind,
                        survivor.lsn,
                        &survivor.record,
                        &survivor.payload,
                        region_bytes,
                    );
                }
            }
            Ok(Plan {
                summary: "restarted: nothing was lost".to_owned(),
                checkpoint,
                span: None,
                gap: false,
                mark: Mark::Kept(Vec::new()),
                records,
                epoch_detail: 2,
                origin_in_doubt: false,
            })
        }
        (StateKind::Bypass, Some(records)) if descends => Ok(Plan {
            summary: "restarted in bypass: blocks that changed meanwhile are copied".to_owned(),
            checkpoint: scan.checkpoint.clone(),
            span: Some(SpanKind::CatchUp),
            gap: true,
            mark: Mark::Kept(
                records
                    .iter()
                    .filter(|r| !r.done && r.record.kind().is_ok_and(RecordKind::changes_image))
                    .map(|r| (r.record.offset.get(), r.record.length.get()))
                    .collect(),
            ),
            records: Vec::new(),
            epoch_detail: 2,
            origin_in_doubt: false,
        }),
        (StateKind::LogSpeaks, None) if descends => {
            let open = !scan.checkpoint.regions.is_empty() || !scan.failed.is_empty();
            Ok(Plan {
                summary: "not closed cleanly: open regions are read again".to_owned(),
                checkpoint: scan.checkpoint.clone(),
                span: open.then_some(SpanKind::Resync),
                gap: true,
                mark: Mark::Open(scan.failed.clone()),
                records: Vec::new(),
                epoch_detail: 0,
                origin_in_doubt: false,
            })
        }
        (StateKind::Clean, _) if same_epoch && scan.clean_close => {
            let now = fingerprint(medium, config.volume_bytes, kernel)
                .map_err(|e| StartError::Io("the device", e))?;
            let then = slot.fingerprint();
            let counted = now.boot != then.boot || now.kernel_writes == then.kernel_writes;
            if now.content != then.content || now.volume_bytes != then.volume_bytes || !counted {
                return Ok(whole(
                    "the device was written without Varve: everything is read again",
                    SpanKind::Verify,
                    true,
                )
                .in_doubt());
            }
            Ok(Plan {
                summary: "closed cleanly before: nothing to do".to_owned(),
                checkpoint: scan.checkpoint.clone(),
                span: None,
                gap: false,
                mark: Mark::Open(Vec::new()),
                records: Vec::new(),
                epoch_detail: 1,
                origin_in_doubt: false,
            })
        }
        (StateKind::Bypass, _) => Ok(whole(
            "power was lost in bypass: everything is read again",
            SpanKind::Verify,
            true,
        )),
        (StateKind::Clean, _) => Ok(whole(
            "the log is not the one that was closed cleanly: everything is read again",
            SpanKind::Verify,
            true,
        )
        .in_doubt()),
        _ => Ok(whole(
            "log and state file do not belong together: everything is read again",
            SpanKind::Verify,
            true,
        )
        .in_doubt()),
    }
}

/// What survived in memory, if what is not in the log follows it without a break. Older records matter too: the origin may not have them.
fn survivors(buffer: &BatchBuffer, scan: &ScanResult) -> Option<Vec<SurvivingRecord>> {
    let all = buffer.survivors();
    let first = scan.tail.lsn_end;
    let mut expected = first;
    for record in all.iter().filter(|record| record.lsn >= first) {
        if record.lsn != expected {
            return None;
        }
        expected = expected.plus(1);
    }
    Some(all)
}
