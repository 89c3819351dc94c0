//! The way of a write: overlap → what hot copies need → region → record → gate → origin → answer.

use crate::config::Rules;
use crate::hot_copy::Saving;
use crate::volume::{OriginWrite, Phase, Volume, request_token};
use varve_format::{
    Lsn, RECORD_PAYLOAD_BYTES_MAX, Record, RecordFlags, RecordKind, SpanKind, VolumeState,
};
use varve_front::{Request, RequestKind};
use varve_log::{Chunk, Disk, IoError, Medium, Operation};

/// Regions that a sequential writer is expected to reach next; their intents ride along with a batch that is written anyway.
const PREFETCH_REGIONS: u64 = 4;

/// Why a request was not admitted.
enum Blocked {
    /// Another write or a copy holds the range.
    Overlap,
    /// A hot copy needs what it would overwrite, and that is not saved yet.
    Saving,
    /// No room: nothing behind it can be admitted either.
    Room,
}

impl<R: Rules> Volume<R> {
    pub(crate) fn admit(&mut self, medium: &mut dyn Medium) {
        if self.held_until_ns > medium.now().monotonic_ns {
            return;
        }
        let mut index = 0;
        while index < self.pending.len() {
            let id = self.pending[index];
            match self.try_admit(medium, id, index) {
                Ok(()) => {
                    self.pending.remove(index);
                }
                Err(Blocked::Overlap) => {
                    self.counters.overlaps += 1;
                    index += 1;
                }
                Err(Blocked::Saving) => index += 1,
                Err(Blocked::Room) => return,
            }
        }
    }

    /// Whether the range overlaps a write that came earlier and still waits.
    fn overlaps_earlier(&self, index: usize, start: u64, end: u64) -> bool {
        self.pending.iter().take(index).any(|id| {
            self.table[*id as usize]
                .request
                .as_ref()
                .is_some_and(|r| r.offset < end && start < r.offset + r.length)
        })
    }

    fn try_admit(&mut self, medium: &mut dyn Medium, id: u16, index: usize) -> Result<(), Blocked> {
        let Some(request) = self.table[id as usize].request.clone() else {
            return Ok(());
        };
        let (start, end) = (request.offset, request.offset + request.length);
        if R::OVERLAP_WAITS
            && (self.locks.overlaps(start, end) || self.overlaps_earlier(index, start, end))
        {
            return Err(Blocked::Overlap);
        }
        if request.length == 0 {
            self.finish(id, Ok(()));
            return Ok(());
        }
        match self.save_for_copies(medium, id, request.kind, (start, end)) {
            Saving::Done => {}
            Saving::Waits => return Err(Blocked::Saving),
            Saving::Dropped => {
                self.finish(id, Ok(()));
                return Ok(());
            }
        }
        if self.state == VolumeState::Bypass {
            return self.admit_bypass(medium, id, &request);
        }
        let missing = self.regions.missing(start, request.length);
        if missing > 0 && !self.regions.has_room(missing) {
            self.regions_wanted = true;
            return Err(Blocked::Room);
        }
        let payload = if request.kind == RequestKind::Write {
            request.length as usize
        } else {
            0
        };
        let records = payload.div_ceil(RECORD_PAYLOAD_BYTES_MAX as usize).max(1);
        if !self
            .writer
            .has_room(records + PREFETCH_REGIONS as usize, payload, false)
        {
            return Err(Blocked::Room);
        }
        let lock = self.locks.lock(start, end).ok_or(Blocked::Room)?;
        let sequential = start == self.last_write_end;
        self.last_write_end = end;
        let gate_before = self.regions.gate(start, request.length);
        let lsn_first = self.append_records(medium, id, &request);
        if missing > 0 && sequential && request.kind == RequestKind::Write {
            self.prefetch(medium, end);
        }
        // Regions that were not open have opened with these records: the last of them must be durable.
        let gate = gate_before.unwrap_or(self.writer.next_lsn());
        self.counters.writes += 1;
        self.counters.write_bytes += request.length;
        let active = &mut self.table[id as usize];
        active.lock = Some(lock);
        active.logged = true;
        active.lsn_first = lsn_first;
        self.admitted += 1;
        active.admitted_as = self.admitted;
        if gate <= self.writer.durable_lsn() || !R::LOG_BEFORE_COLD_WRITE {
            self.start_origin(medium, id);
        } else {
            active.phase = Phase::Gated(gate);
            active.since_ns = medium.now().monotonic_ns;
            self.counters.cold_writes += 1;
            self.writer.want_durable(gate);
        }
        Ok(())
    }

    /// Appends the request's records and notes the origin writes that carry them; neighbouring records of one batch go as one.
    fn append_records(&mut self, medium: &mut dyn Medium, id: u16, request: &Request) -> Lsn {
        let lsn_first = self.writer.next_lsn();
        let now = medium.now();
        self.last_record_time = now.wall;
        let Some(buffer) = request
            .buffer
            .as_ref()
            .filter(|_| request.kind == RequestKind::Write)
        else {
            let kind = if request.kind == RequestKind::Discard {
                RecordKind::Discard
            } else {
                RecordKind::Zero
            };
            let record = Record::new(kind, request.offset, request.length, 0);
            let (lsn, chunk) = self.writer.append(now, record, 0, |_| {});
            self.regions.touch(request.offset, request.length, lsn);
            self.note_origin_write(
                id,
                OriginWrite {
                    chunk,
                    payload_offset: 0,
                    offset: request.offset,
                    length: 0,
                },
            );
            return lsn_first;
        };
        let mut done = 0;
        while done < request.length {
            let part = (request.length - done).min(RECORD_PAYLOAD_BYTES_MAX) as usize;
            let more = done + (part as u64) < request.length;
            let record = Record::new(RecordKind::Write, request.offset + done, part as u64, 0)
                .with_flags(if more { RecordFlags::CONTINUES } else { 0 });
            let source = buffer.slice(done as usize, part);
            let (lsn, chunk) = self.writer.append(now, record, part, |target| {
                source.read_with(|bytes| target.copy_from_slice(bytes))
            });
            self.regions.touch(request.offset + done, part as u64, lsn);
            let payload_offset = self.writer.buffer().payload_bytes(chunk.slot as usize) - part;
            self.note_origin_write(
                id,
                OriginWrite {
                    chunk,
                    payload_offset,
                    offset: request.offset + done,
                    length: part,
                },
            );
            done += part as u64;
        }
        lsn_first
    }

    fn note_origin_write(&mut self, id: u16, write: OriginWrite) {
        let active = &mut self.table[id as usize];
        if let Some(last) = active.writes.last_mut()
            && last.chunk.slot == write.chunk.slot
        {
            last.chunk.count += 1;
            last.length += write.length;
            return;
        }
        self.writer.buffer().hold(write.chunk.slot as usize);
        self.table[id as usize].writes.push(write);
    }

    fn prefetch(&mut self, medium: &mut dyn Medium, end: u64) {
        let region_bytes = u64::from(self.config.region_bytes);
        let first = end.div_ceil(region_bytes);
        let last = self.config.volume_bytes.div_ceil(region_bytes);
        for region in first..(first + PREFETCH_REGIONS).min(last) {
            let offset = region * region_bytes;
            if self.regions.missing(offset, 1) > 0
                && self.regions.has_room(1)
                && !self.regions.is_crowded()
            {
                let length = region_bytes.min(self.config.volume_bytes - offset);
                let (lsn, _) = self.append(
                    medium,
                    Record::new(RecordKind::Intent, offset, length, 0),
                    &[],
                );
                self.regions.touch(offset, length, lsn);
            }
        }
    }

    fn admit_bypass(
        &mut self,
        medium: &mut dyn Medium,
        id: u16,
        request: &Request,
    ) -> Result<(), Blocked> {
        if R::MARK_BEFORE_BYPASS && !self.healer.may_bypass() {
            return Err(Blocked::Room);
        }
        let lock = self
            .locks
            .lock(request.offset, request.offset + request.length)
            .ok_or(Blocked::Room)?;
        self.bitmap.set(request.offset, request.length);
        self.counters.bypassed_bytes += request.length;
        let active = &mut self.table[id as usize];
        active.lock = Some(lock);
        active.outstanding = 1;
        self.admitted += 1;
        active.admitted_as = self.admitted;
        active.phase = Phase::Origin;
        let operation = match (request.kind, &request.buffer) {
            (RequestKind::Write, Some(buffer)) => Operation::Write {
                offset: request.offset,
                buffer: buffer.clone(),
            },
            (RequestKind::Discard, _) => Operation::Discard {
                offset: request.offset,
                length: request.length,
            },
            _ => Operation::Zero {
                offset: request.offset,
                length: request.length,
            },
        };
        medium.submit(Disk::Origin, request_token(id, 0), operation);
        Ok(())
    }

    /// Sends an admitted write to the origin, out of the batch buffer.
    pub(crate) fn start_origin(&mut self, medium: &mut dyn Medium, id: u16) {
        let Some(request) = self.table[id as usize].request.clone() else {
            return;
        };
        let count = self.table[id as usize].writes.len();
        self.table[id as usize].phase = Phase::Origin;
        self.table[id as usize].outstanding = count as u16;
        for index in 0..count {
            let write = self.table[id as usize].writes[index];
            let operation = match request.kind {
                RequestKind::Write => Operation::Write {
                    offset: write.offset,
                    buffer: self.writer.buffer().payload_buffer(
                        write.chunk.slot as usize,
                        write.payload_offset,
                        write.length,
                    ),
                },
                RequestKind::Discard => Operation::Discard {
                    offset: request.offset,
                    length: request.length,
                },
                _ => Operation::Zero {
                    offset: request.offset,
                    length: request.length,
                },
            };
            medium.submit(Disk::Origin, request_token(id, index), operation);
        }
    }

    pub(crate) fn complete_request(
        &mut self,
        medium: &mut dyn Medium,
        id: u16,
        write: usize,
        result: Result<(), IoError>,
    ) {
        let active = &mut self.table[id as usize];
        if let Err(error) = result {
            active.error.get_or_insert(error);
        }
        if active.logged
            && let Some(write) = active.writes.get(write)
        {
            let chunk: Chunk = write.chunk;
            self.writer.buffer().mark_done(chunk);
            self.writer.buffer().release(chunk.slot as usize);
        }
        let active = &mut self.table[id as usize];
        active.outstanding -= 1;
        if active.outstanding > 0 {
            return;
        }
        let is_read = active
            .request
            .as_ref()
            .is_none_or(|r| r.kind == RequestKind::Read);
        if let Some(place) = active.lock.take() {
            self.locks.unlock(place);
        }
        // An origin that cannot discard keeps what it has, which "undefined" allows.
        let request = self.table[id as usize].request.as_ref();
        if request.is_some_and(|r| r.kind == RequestKind::Discard)
            && matches!(
                self.table[id as usize].error,
                Some(IoError(libc::EOPNOTSUPP | libc::EINVAL))
            )
        {
            self.table[id as usize].error = None;
        }
        match self.table[id as usize].error {
            Some(error) if is_read => self.finish(id, Err(error)),
            Some(error) => {
                self.note_failed_write(medium, id);
                self.finish(id, Err(error));
            }
            None if !is_read && self.wants_durability(id) => self.wait_durable(medium, id),
            None => self.finish(id, Ok(())),
        }
    }

    /// The origin refused a write: what it holds now is unknown, so the log says so and the range is read again.
    fn note_failed_write(&mut self, medium: &mut dyn Medium, id: u16) {
        self.counters.origin_errors += 1;
        let active = &self.table[id as usize];
        let Some((offset, length)) = active.request.as_ref().map(|r| (r.offset, r.length)) else {
            return;
        };
        let (logged, lsn) = (active.logged, active.lsn_first);
        self.doubt_again();
        self.bitmap.set(offset, length);
        if logged && self.is_logging() && self.writer.has_room(2, 0, true) {
            self.append(
                medium,
                Record::new(RecordKind::Failed, offset, length, lsn.0),
                &[],
            );
            self.begin_span(medium, SpanKind::Resync, VolumeState::Healing);
        }
        // Otherwise the volume is in bypass or about to be, and the bit is enough.
    }

    /// Opens a span unless one is open. The bitmap says what it copies.
    pub(crate) fn begin_span(&mut self, medium: &dyn Medium, kind: SpanKind, state: VolumeState) {
        if self.span.is_some() && self.span_end.is_none() {
            return;
        }
        let (lsn, _) = self.append(
            medium,
            Record::new(RecordKind::SpanBegin, 0, 0, 0).with_detail(kind as u8),
            &[],
        );
        self.writer.want_durable(lsn.plus(1));
        self.span = Some((kind, lsn, 0));
        self.span_end = None;
        self.state = state;
    }

    pub(crate) fn release_gates(&mut self, medium: &mut dyn Medium) {
        let durable = self.writer.durable_lsn();
        let bypass = self.state == VolumeState::Bypass && self.healer.may_bypass();
        for id in 0..self.table.len() {
            if let Phase::Gated(gate) = self.table[id].phase
                && (gate <= durable || bypass)
            {
                self.start_origin(medium, id as u16);
            }
        }
    }

    pub(crate) fn release_durable(&mut self) {
        let durable = self.writer.durable_lsn();
        let bypass = self.state == VolumeState::Bypass && self.healer.may_bypass();
        for id in 0..self.table.len() {
            if let Phase::Durable { origin, log } = self.table[id].phase
                && (log <= durable || bypass)
                && self.flusher.has_ended(origin)
            {
                let result = self.table[id].error.map_or(Ok(()), Err);
                self.finish(id as u16, result);
            }
        }
    }
}
