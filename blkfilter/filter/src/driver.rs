//! A volume behind a front end: the state machine, its medium, and messages from the daemon's other threads.

use crate::copies::files::{CopyMemoryFile, SpoolFiles};
use crate::hot_copy::{HotCopies, Lost};
use crate::points::PointLabel;
use crate::volume::Volume;
use crate::{Law, StartReport, VolumeStatus};
use crossbeam_channel::{Receiver, Sender};
use std::collections::VecDeque;
use std::time::Duration;
use varve_format::{Fingerprint, Lsn, SegmentSequence, VolumeState, WallTime};
use varve_front::{Answer, Device, Request, RingPort};
use varve_log::{Disk, Medium, OwnRing, UringMedium};

/// A message to a volume's thread.
pub enum Message {
    /// Tell your figures.
    Status(Sender<VolumeStatus>),
    /// Append a recovery point; answered with its bits when it has its place in the order, and again once it is durable, or with nothing if it cannot be.
    Mark(PointLabel, Sender<u8>, Sender<Option<Lsn>>),
    /// Seal the open segment; answered with the first open sequence and the LSN before it.
    Seal(Sender<(SegmentSequence, Lsn)>),
    /// The store has everything below.
    Release(SegmentSequence),
    /// The history lacks something: begin a span of doubt. Answered with whether there is one now.
    Doubt(Sender<bool>),
    /// The history ends here, behind this log, at this time: begin an epoch behind it. Answered with whether that is done.
    GoOnAbove((SegmentSequence, Lsn), WallTime, Sender<bool>),
    /// A comparison has come this far: its number, the end of what it has seen, ranges that are equal. Answered with whether to go on.
    Verified(u64, u64, Vec<(u64, u64)>, Sender<bool>),
    /// End the rewind span; answered once that is durable.
    EndRewind(Sender<bool>),
    /// From here on there can be hot copies. Answered with what went wrong, if anything did.
    AttachCopies(Box<SpoolFiles>, Sender<Result<(), String>>),
    /// There are none any more. Answered with whether that is so.
    DetachCopies(Sender<bool>),
    /// Hold new writes back, no longer than this.
    Hold(Duration, Sender<()>),
    /// Cut a hot copy; answered with the LSN of the cut, and again once the copy may be read.
    Cut(CopyMemoryFile, Sender<Result<Lsn, String>>, Sender<()>),
    /// Let writes go on.
    GoOn,
    /// Forget a hot copy.
    RemoveCopy(u32, Sender<()>),
    /// It is durably known which hot copies are valid no more.
    CopiesMarked,
}

/// Hot copies of a volume were given up.
pub struct CopyAlert {
    /// The volume's name.
    pub volume: String,
    /// Why.
    pub why: Lost,
}

/// The end of a rewind finds its place within this, or not: a little less than it is waited for.
const END_REWIND_WITHIN: Duration = Duration::from_secs(50);

enum Waiting {
    /// The point until there is room for it, its LSN then.
    Mark(Result<Lsn, PointLabel>, Sender<u8>, Sender<Option<Lsn>>),
    Seal(SegmentSequence, Lsn, Sender<(SegmentSequence, Lsn)>),
    /// Its end, once it has a place; until when (monotonic, ns) somebody waits for it.
    EndRewind(Option<Lsn>, u64, Sender<bool>),
    /// What was admitted before the cut must land; a copy that must last waits for a flush, too.
    Settle(u64, bool, Option<u64>, Sender<()>),
}

/// The device that a front end drives.
pub struct VolumeDevice {
    volume: Volume<Law>,
    medium: Option<UringMedium<RingPort>>,
    messages: Receiver<Message>,
    waiting: Vec<Waiting>,
    answers: VecDeque<Answer>,
    kernel: fn(&std::fs::File) -> Fingerprint,
    closed: Option<Sender<Result<(), String>>>,
    name: String,
    alerts: Sender<CopyAlert>,
}

impl VolumeDevice {
    /// A device for a volume that has been started over a ring of its own.
    #[must_use]
    pub fn new(
        volume: Volume<Law>,
        medium: UringMedium<OwnRing>,
        port: RingPort,
        messages: Receiver<Message>,
        kernel: fn(&std::fs::File) -> Fingerprint,
        closed: Sender<Result<(), String>>,
        (name, alerts): (String, Sender<CopyAlert>),
    ) -> VolumeDevice {
        let medium = Some(medium.with_port(port));
        VolumeDevice {
            volume,
            medium,
            messages,
            waiting: Vec::new(),
            answers: VecDeque::new(),
            kernel,
            closed: Some(closed),
            name,
            alerts,
        }
    }

    fn serve_waiting(&mut self) {
        let Some(medium) = self.medium.as_mut() else {
            return;
        };
        let volume = &mut self.volume;
        let durable = volume.durable_lsn();
        let bypassed = volume.state() == VolumeState::Bypass;
        let now = medium.now().monotonic_ns;
        self.waiting.retain_mut(|waiting| match waiting {
            Waiting::Mark(point, placed, reply) => {
                if let Err(label) = point {
                    let detail = label.detail_now();
                    if let Some(lsn) = volume.mark_point(medium, &label.name, detail) {
                        let _ = placed.send(detail);
                        *point = Ok(lsn);
                    }
                }
                let lsn = point.as_ref().ok().copied();
                let ended = lsn.is_some_and(|lsn| durable > lsn) || bypassed;
                if ended {
                    let _ = reply.send(lsn.filter(|_| !bypassed));
                }
                !ended
            }
            Waiting::Seal(sequence, lsn_end, reply) => {
                let open = volume.status().log.sequence;
                if open > *sequence || bypassed || *lsn_end == Lsn(0) {
                    let _ = reply.send((open, *lsn_end));
                    return false;
                }
                true
            }
            Waiting::EndRewind(end, until, reply) => {
                if end.is_none() && volume.end_rewind(medium) {
                    *end = Some(volume.next_lsn());
                }
                // It had its place before, and whoever asked then did not wait for it.
                let ended = !volume.in_span() && volume.state() == VolumeState::Protected;
                let answer = match end {
                    Some(lsn) if durable >= *lsn || bypassed => Some(!bypassed),
                    None if ended => Some(true),
                    // Later it would end what somebody writes by then.
                    None if bypassed || now >= *until => Some(false),
                    _ => None,
                };
                if let Some(ended) = answer {
                    let _ = reply.send(ended);
                }
                answer.is_none()
            }
            Waiting::Settle(cut, lasting, flush, reply) => {
                if !volume.is_settled(*cut) {
                    return true;
                }
                if *lasting {
                    let generation = *flush.get_or_insert_with(|| volume.flush_origin(medium));
                    if !volume.is_flushed(generation) {
                        return true;
                    }
                }
                let _ = reply.send(());
                false
            }
        });
    }
}

impl Device for VolumeDevice {
    fn submit(&mut self, request: Request) {
        if let Some(medium) = self.medium.as_mut() {
            medium.hold_time();
            self.volume.submit(medium, request);
        }
    }

    fn completion(&mut self, user_data: u64, result: i32) {
        if let Some(medium) = self.medium.as_mut()
            && let Some(completion) = medium.take(user_data, result)
        {
            medium.hold_time();
            self.volume.complete(medium, completion);
        }
    }

    fn woken(&mut self) {
        let Some(medium) = self.medium.as_mut() else {
            return;
        };
        medium.hold_time();
        while let Ok(message) = self.messages.try_recv() {
            match message {
                Message::Status(reply) => {
                    let _ = reply.send(self.volume.status());
                }
                Message::Mark(label, placed, reply) => {
                    self.waiting.push(Waiting::Mark(Err(label), placed, reply));
                }
                Message::Seal(reply) => {
                    let empty = self.volume.segment_is_empty();
                    let status = self.volume.status().log;
                    if empty {
                        let _ = reply.send((status.sequence, status.next_lsn));
                    } else {
                        self.volume.seal();
                        self.waiting
                            .push(Waiting::Seal(status.sequence, status.next_lsn, reply));
                    }
                }
                Message::Release(below) => self.volume.release_segments_below(below),
                Message::Doubt(reply) => {
                    let _ = reply.send(self.volume.doubt(medium));
                }
                Message::GoOnAbove(end, since, reply) => {
                    let _ = reply.send(self.volume.go_on_above(medium, end, since));
                }
                Message::Verified(number, below, equal, reply) => {
                    let now = medium.now().monotonic_ns;
                    let _ = reply.send(self.volume.verified(now, number, below, &equal));
                }
                Message::EndRewind(reply) => {
                    let until = medium.now().monotonic_ns + END_REWIND_WITHIN.as_nanos() as u64;
                    self.waiting.push(Waiting::EndRewind(None, until, reply));
                }
                Message::AttachCopies(files, reply) => {
                    let attached = if self.volume.detach_copies() {
                        let attached = files.attach_empty(&mut self.volume, medium);
                        attached.map_err(|error| error.to_string())
                    } else {
                        Err("the disk of the copies before does not answer; look at it, or restart blkfilter".to_owned())
                    };
                    let _ = reply.send(attached);
                }
                Message::DetachCopies(reply) => {
                    let free = self.volume.detach_copies();
                    if free {
                        medium.set(Disk::Spool, None);
                    }
                    let _ = reply.send(free);
                }
                Message::Hold(limit, reply) => {
                    let until = medium.now().monotonic_ns + limit.as_nanos() as u64;
                    self.volume.hold_writes(until);
                    let _ = reply.send(());
                }
                Message::Cut(file, cut, settled) => {
                    let outcome = file.fresh().map_err(|error| error.to_string());
                    let outcome = outcome.and_then(|copy| {
                        let lasting = copy.persist;
                        let at = self.volume.cut_copy(copy).ok_or("there is no spool")?;
                        self.waiting
                            .push(Waiting::Settle(at, lasting, None, settled));
                        // In bypass and in spans no LSN means this instant.
                        let named =
                            self.volume.state() == VolumeState::Protected && !self.volume.in_span();
                        Ok(if named {
                            self.volume.next_lsn()
                        } else {
                            Lsn(0)
                        })
                    });
                    let _ = cut.send(outcome);
                }
                Message::GoOn => self.volume.release_writes(),
                Message::RemoveCopy(generation, reply) => {
                    self.volume.remove_copy(generation);
                    let _ = reply.send(());
                }
                Message::CopiesMarked => {
                    if let Some(hot) = self.volume.copies_mut() {
                        hot.marked();
                    }
                }
            }
        }
    }

    fn run(&mut self) {
        let Some(medium) = self.medium.as_mut() else {
            return;
        };
        medium.hold_time();
        // Completions that never reached the kernel.
        while let Some(completion) = medium.poll(false) {
            self.volume.complete(medium, completion);
        }
        self.volume.run(medium);
        while let Some(answer) = self.volume.take_answer() {
            self.answers.push_back(Answer {
                tag: answer.tag,
                result: answer.result.map_err(|error| error.0),
            });
        }
        if let Some(why) = self.volume.copies_mut().and_then(HotCopies::take_alert) {
            let volume = self.name.clone();
            let _ = self.alerts.send(CopyAlert { volume, why });
        }
        if !self.waiting.is_empty() {
            self.serve_waiting();
        }
    }

    fn take_answer(&mut self) -> Option<Answer> {
        self.answers.pop_front()
    }

    fn end_turn(&mut self) -> (u64, u64) {
        let Some(medium) = self.medium.as_mut() else {
            return (varve_front::monotonic_ns(), 1_000_000_000);
        };
        medium.hold_time();
        let now = medium.now().monotonic_ns;
        medium.let_time_pass();
        (
            now,
            self.volume.deadline_ns(now).saturating_sub(now).max(20_000),
        )
    }

    fn is_quiet(&self) -> bool {
        self.volume.is_idle()
            && self.answers.is_empty()
            && self
                .medium
                .as_ref()
                .is_none_or(|medium| medium.in_flight() == 0)
    }

    fn closed(&mut self) {
        let Some(medium) = self.medium.take() else {
            return;
        };
        let result = if medium.in_flight() > 0 {
            Err("operations were still in flight: not closed cleanly, the next start reads open regions again".to_owned())
        } else {
            OwnRing::new(64)
                .map_err(|error| error.to_string())
                .and_then(|ring| {
                    let mut medium = medium.with_port(ring);
                    let origin = medium
                        .file(Disk::Origin)
                        .ok_or("there is no origin")?
                        .try_clone()
                        .map_err(|error| error.to_string())?;
                    let kernel = self.kernel;
                    self.volume
                        .close(&mut medium, || kernel(&origin))
                        .map_err(|error| error.to_string())
                })
        };
        if let Some(closed) = self.closed.take() {
            let _ = closed.send(result);
        }
    }
}

/// Stands in for a volume that could not be started: every request fails at once.
pub struct FailedDevice {
    answers: VecDeque<Answer>,
}

impl FailedDevice {
    /// A device that fails.
    #[must_use]
    pub fn new() -> FailedDevice {
        FailedDevice {
            answers: VecDeque::new(),
        }
    }
}

impl Default for FailedDevice {
    fn default() -> FailedDevice {
        FailedDevice::new()
    }
}

impl Device for FailedDevice {
    fn submit(&mut self, request: Request) {
        self.answers.push_back(Answer {
            tag: request.tag,
            result: Err(libc::EIO),
        });
    }
    fn completion(&mut self, _user_data: u64, _result: i32) {}
    fn woken(&mut self) {}
    fn run(&mut self) {}
    fn take_answer(&mut self) -> Option<Answer> {
        self.answers.pop_front()
    }
    fn end_turn(&mut self) -> (u64, u64) {
        (varve_front::monotonic_ns(), 1_000_000_000)
    }
    fn is_quiet(&self) -> bool {
        self.answers.is_empty()
    }
    fn closed(&mut self) {}
}

/// Words for the start, for the log and `varve status`.
#[must_use]
pub fn describe(report: &StartReport) -> String {
    let mut text = report.summary.clone();
    if report.records_survived + report.records_redone > 0 {
        text += &format!(
            "; {} records survived in memory, {} written to the device again",
            report.records_survived, report.records_redone
        );
    }
    if report.reread_bytes > 0 {
        text += &format!(
            "; {} MiB are being read again",
            report.reread_bytes.div_ceil(1 << 20)
        );
    }
    if let Some(error) = report.state_error {
        text += &format!("; WARNING: the state file cannot be written ({error})");
    }
    text
}
