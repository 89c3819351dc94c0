//! The payload of a `stable` record: all that recovery needs to know, so that it reads only from the last one.

use crate::{FormatError, Lsn, SpanKind};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Most regions that can be open at once: the list fits one record's payload with room to spare (64 KiB / 4 = 16384).
pub const OPEN_REGIONS_MAX: usize = 8192;

/// Most bytes of an encoded checkpoint.
pub const CHECKPOINT_BYTES_MAX: u64 = (FIXED_BYTES + OPEN_REGIONS_MAX * 4) as u64;

/// State of a volume, as checkpoints and `varve status` name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum VolumeState {
    /// The first full copy is running.
    Synchronising = 1,
    /// Every write is in the history.
    Protected = 2,
    /// The log is out of reach: production goes on, changed blocks are kept, a gap is open.
    Bypass = 3,
    /// A resync or catch-up is running.
    Healing = 4,
    /// The origin may have changed unseen: everything is being read again.
    Unverified = 5,
    /// An image is being written back over the origin.
    Rewinding = 6,
}

impl VolumeState {
    /// Reads the code.
    #[must_use]
    pub fn from_code(code: u8) -> Option<VolumeState> {
        use VolumeState::{Bypass, Healing, Protected, Rewinding, Synchronising, Unverified};
        [
            Synchronising,
            Protected,
            Bypass,
            Healing,
            Unverified,
            Rewinding,
        ]
        .into_iter()
        .find(|state| *state as u8 == code)
    }

    /// The word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            VolumeState::Synchronising => "synchronising",
            VolumeState::Protected => "protected",
            VolumeState::Bypass => "bypass",
            VolumeState::Healing => "healing",
            VolumeState::Unverified => "unverified",
            VolumeState::Rewinding => "rewinding",
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
struct Fixed {
    stable_lsn: U64,
    span_begin: U64,
    copy_cursor: U64,
    span_argument: U64,
    region_count: U32,
    span_kind: u8,
    state: u8,
    reserved: [u8; 26],
}
const FIXED_BYTES: usize = 64;
const _: () = assert!(size_of::<Fixed>() == FIXED_BYTES);

/// A checkpoint: what is settled, what is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The origin holds every write below this LSN durably.
    pub stable_lsn: Lsn,
    /// The open span: its kind, the LSN of its begin record, and its argument.
    pub span: Option<(SpanKind, Lsn, u64)>,
    /// Bytes of the volume at and above this offset are still to be copied in the open span; `u64::MAX` when none are.
    pub copy_cursor: u64,
    /// The volume's state.
    pub state: VolumeState,
    /// Regions (index = offset / region size) that may hold writes that the origin could lose, or that are still to be copied.
    pub regions: Vec<u32>,
}

impl Checkpoint {
    /// Appends the payload to `out`.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        let (span_kind, span_begin, span_argument) =
            self.span.map_or((0, 0, 0), |(kind, begin, argument)| {
                (kind as u8, begin.0, argument)
            });
        let fixed = Fixed {
            stable_lsn: U64::new(self.stable_lsn.0),
            span_begin: U64::new(span_begin),
            copy_cursor: U64::new(self.copy_cursor),
            span_argument: U64::new(span_argument),
            region_count: U32::new(self.regions.len() as u32),
            span_kind,
            state: self.state as u8,
            reserved: [0; 26],
        };
        out.extend_from_slice(fixed.as_bytes());
        for region in &self.regions {
            out.extend_from_slice(&region.to_le_bytes());
        }
    }

    /// Reads a payload.
    pub fn parse(payload: &[u8]) -> Result<Checkpoint, FormatError> {
        let (fixed, rest) =
            Fixed::ref_from_prefix(payload).map_err(|_| FormatError::Truncated {
                needed: FIXED_BYTES as u64,
                found: payload.len() as u64,
            })?;
        let count = fixed.region_count.get() as usize;
        if count > OPEN_REGIONS_MAX || rest.len() < count * 4 {
            return Err(FormatError::Field("checkpoint.region_count"));
        }
        let span = match fixed.span_kind {
            0 => None,
            code => {
                let kind =
                    SpanKind::from_code(code).ok_or(FormatError::Field("checkpoint.span_kind"))?;
                Some((kind, Lsn(fixed.span_begin.get()), fixed.span_argument.get()))
            }
        };
        Ok(Checkpoint {
            stable_lsn: Lsn(fixed.stable_lsn.get()),
            span,
            copy_cursor: fixed.copy_cursor.get(),
            state: VolumeState::from_code(fixed.state)
                .ok_or(FormatError::Field("checkpoint.state"))?,
            regions: rest[..count * 4]
                .chunks_exact(4)
                .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
        })
    }
}
