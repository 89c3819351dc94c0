//! A volume in doubt is compared with its history: blocks that are equal need not be copied into the log again.
//!
//! The data path knows no store, so another process compares, and says which blocks equal the image of everything that the store held when it
//! began. Those are unmarked; copying follows behind it. If it stays silent, all marked blocks are copied.
//!
//! Why this is right while the device is being written: every later image is that image with the later records laid over it, so a block that was
//! equal when it was read differs later only by what those records say.
//!
//! Crash scenarios:
//! * A write fails, or the log is bypassed, after the comparison began: what was equal may not be any more, and the block is marked again. The
//!   comparison is over then: what it says about its number is not heeded ([`Volume::doubt_again`]).
//! * A write that went past the log is still under way when the volume heals: it is marked, not recorded, and not on the disk that is read. A
//!   comparison begins only when none is left; there are no new ones.
//! * Power cut: what was compared lay only in the origin's cache, left there by whoever wrote without Varve. The comparing process flushes the origin
//!   before it reads; what was written since is in open regions.
//! * Kill: the bitmap survives with what was unmarked; the next start asks for a comparison of what is left.

use crate::bitmap::BITMAP_BLOCK_BYTES;
use crate::config::Rules;
use crate::volume::{Active, Phase, Volume};
use varve_format::{SpanKind, VolumeState};
use varve_front::RequestKind;
use varve_log::Medium;

/// Who compares may be silent this many times as long as it may take to come forward.
const PATIENCE: u64 = 6;

/// The comparison, if one is wanted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Verifier {
    /// Names the comparison; 0: none is wanted.
    number: u64,
    /// Below it all is compared: what is still marked there may be copied.
    below: u64,
    /// If nothing was heard until then, copying goes on without it.
    until_ns: u64,
}

impl Verifier {
    /// Copying may go up to here.
    pub(crate) fn limit(&mut self, now_ns: u64) -> u64 {
        if self.number != 0 && now_ns >= self.until_ns {
            self.number = 0;
        }
        if self.number == 0 {
            u64::MAX
        } else {
            self.below
        }
    }

    /// The number of the comparison that is wanted, if one is.
    #[must_use]
    pub fn wanted(&self) -> u64 {
        self.number
    }
}

impl<R: Rules> Volume<R> {
    /// Asks for a comparison if a span of doubt is open.
    pub(crate) fn ask_for_verification(&mut self, now_ns: u64) {
        self.verifier = Verifier::default();
        if matches!(self.span, Some((SpanKind::Verify, ..))) && self.config.verify_wait_ns > 0 {
            self.verifier = Verifier {
                // Every span has records of its own: no two comparisons have the same number.
                number: self.writer.next_lsn().0,
                below: 0,
                until_ns: now_ns + self.config.verify_wait_ns,
            };
        }
    }

    /// The store lacks a part of the history: everything is in doubt. Whether a span of doubt is open now; not in bypass, in a rewind, or while another
    /// copy runs: whoever asks asks again.
    pub fn doubt(&mut self, medium: &mut dyn Medium) -> bool {
        if self.state != VolumeState::Protected
            || self.span.is_some()
            || !self.is_logging()
            || !self.writer.has_room(1, 0, true)
        {
            return false;
        }
        self.bitmap.set(0, self.config.volume_bytes);
        self.begin_span(medium, SpanKind::Verify, VolumeState::Unverified);
        self.ask_for_verification(medium.now().monotonic_ns);
        true
    }

    /// Blocks were marked for another reason: a comparison that is running knows nothing of it.
    pub(crate) fn doubt_again(&mut self) {
        self.verifier.number = 0;
    }

    /// The comparison of this number has come up to `below`; `equal` are ranges (offset, length) that equal the history. False: it is not wanted any
    /// more.
    pub fn verified(&mut self, now_ns: u64, number: u64, below: u64, equal: &[(u64, u64)]) -> bool {
        let wanted = self.verifier.limit(now_ns) != u64::MAX
            && number == self.verifier.number
            && self.state == VolumeState::Unverified
            && self.is_logging()
            && matches!(self.span, Some((SpanKind::Verify, ..)));
        // What went past the log and is still on its way to the origin is neither recorded nor on the disk that is compared.
        let bypassed = |active: &Active| {
            !active.logged
                && active.phase == Phase::Origin
                && active
                    .request
                    .as_ref()
                    .is_some_and(|request| request.kind != RequestKind::Read)
        };
        if !wanted || (self.verifier.below == 0 && self.table.iter().any(bypassed)) {
            return false;
        }
        for &(offset, length) in equal {
            let Some(end) = offset
                .checked_add(length)
                .filter(|end| *end <= self.config.volume_bytes)
            else {
                continue;
            };
            let first = offset.div_ceil(BITMAP_BLOCK_BYTES) * BITMAP_BLOCK_BYTES;
            let last = if end == self.config.volume_bytes {
                end
            } else {
                end / BITMAP_BLOCK_BYTES * BITMAP_BLOCK_BYTES
            };
            if first < last {
                self.bitmap.clear(first, last - first);
                self.counters.verified_bytes += last - first;
            }
        }
        if below >= self.config.volume_bytes {
            self.verifier.number = 0; // It has seen everything.
        }
        self.verifier.below = below / BITMAP_BLOCK_BYTES * BITMAP_BLOCK_BYTES;
        self.verifier.until_ns = now_ns + PATIENCE * self.config.verify_wait_ns;
        true
    }
}
