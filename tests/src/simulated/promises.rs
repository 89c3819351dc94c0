//! What the simulated volume has promised, held against what its disks hold.

use super::{Issued, SECTOR, Simulated, VOLUME_BYTES, stamp_of};
use crate::history::History;
use blkfilter::Rules;
use varve_format::RecordKind;
use varve_front::RequestKind;
use varve_log::Disk;

impl<R: Rules> Simulated<R> {
    /// Checks every promise. An error says which one was broken.
    pub fn check(&self) -> Result<(), String> {
        if let Some(broken) = &self.broken {
            return Err(broken.clone());
        }
        let history = self.history();
        let machine = self.machine.borrow();
        let origin = machine.content(Disk::Origin);
        let end = history.end;
        let image = history.image(end, VOLUME_BYTES);
        for (index, (left, right)) in image.chunks(SECTOR).zip(origin.chunks(SECTOR)).enumerate() {
            if left != right {
                return Err(format!(
                    "sector {index}: the image at the end has request {}, the origin {}",
                    stamp_of(left),
                    stamp_of(right)
                ));
            }
        }
        if let Some(copies) = &self.copies {
            copies.check(&history)?;
        }
        self.check_flushed(origin)?;
        self.check_order(&history)?;
        self.check_copies(&history)?;
        for (lsn, content) in &self.snapshots {
            if !history.resolves(*lsn) {
                continue; // Given up in a bypass: a gap says so.
            }
            self.instants.set(self.instants.get() + 1);
            if history.image(*lsn, VOLUME_BYTES) != *content {
                return Err(format!(
                    "the image at {lsn} is not what the origin was then"
                ));
            }
        }
        Ok(())
    }

    /// Every sector of the origin holds its last durable write, or one that was issued later or was never ordered against it.
    fn check_flushed(&self, origin: &[u8]) -> Result<(), String> {
        for (index, sector) in origin.chunks(SECTOR).enumerate() {
            let touches = |request: &Issued| {
                request.kind != RequestKind::Flush
                    && request.offset <= index * SECTOR
                    && index * SECTOR < request.offset + request.length
            };
            let found = stamp_of(sector);
            // Under a hot copy a discard may do nothing.
            let may_be_nothing =
                |r: &Issued| self.copies.is_some() && r.kind == RequestKind::Discard;
            let durable = self
                .issued
                .iter()
                .enumerate()
                .filter(|(_, r)| r.durable && touches(r) && !may_be_nothing(r));
            for (number, request) in durable {
                // Stale: the sector's content was answered before the durable write was issued, and nothing else explains it.
                let explained = if found == 0 {
                    self.issued.iter().any(|r| {
                        touches(r)
                            && r.kind != RequestKind::Write
                            && r.answered_at.is_none_or(|a| a >= request.issued_at)
                    })
                } else {
                    match self.issued.get(found as usize - 1) {
                        Some(writer) => writer.answered_at.is_none_or(|a| a >= request.issued_at),
                        None => self.kernel_writes > 0, // A stranger's.
                    }
                };
                if !explained {
                    return Err(format!(
                        "sector {index}: request {} was flushed, the origin has request {found}",
                        number + 1
                    ));
                }
            }
        }
        Ok(())
    }

    /// What was copied lies in a span: only there it may change an image.
    fn check_copies(&self, history: &History) -> Result<(), String> {
        let mut open = false;
        for entry in history.entries.values() {
            match entry.kind {
                RecordKind::SpanBegin => open = true,
                RecordKind::SpanEnd => open = false,
                _ if entry.flags & varve_format::RecordFlags::COPIED != 0 && !open => {
                    return Err(format!("LSN {}: a copy outside of any span", entry.lsn));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Log order is device order: a write that was answered before another was issued has the lower LSN; payloads are what was submitted.
    fn check_order(&self, history: &History) -> Result<(), String> {
        let mut newest_issue = 0;
        for entry in history.entries.values() {
            if entry.kind != RecordKind::Write
                || entry.flags & varve_format::RecordFlags::COPIED != 0
            {
                continue;
            }
            let number = stamp_of(&entry.payload);
            let Some(request) = self.issued.get((number as usize).wrapping_sub(1)) else {
                return Err(format!("LSN {}: a payload that nobody wrote", entry.lsn));
            };
            for (index, sector) in entry.payload.chunks(SECTOR).enumerate() {
                let place = u64::from_le_bytes(sector[8..16].try_into().unwrap());
                if stamp_of(sector) != number
                    || place != entry.offset / SECTOR as u64 + index as u64
                {
                    return Err(format!(
                        "LSN {}: the payload is not request {number}'s",
                        entry.lsn
                    ));
                }
            }
            if request
                .answered_at
                .is_some_and(|answered| answered < newest_issue)
            {
                return Err(format!(
                    "LSN {}: request {number} was answered before an earlier record's request was issued",
                    entry.lsn
                ));
            }
            newest_issue = newest_issue.max(request.issued_at);
        }
        Ok(())
    }
}
