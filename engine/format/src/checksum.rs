//! Checksums: CRC-32C for every block that is read back, a 128-bit BLAKE3 prefix for the chain of batches.

use crate::{EpochId, Lsn};
use crc_fast::{CrcAlgorithm, Digest};

/// CRC-32C (Castagnoli; the polynomial of iSCSI and ext4) of `bytes`.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// CRC-32C of several parts, one behind the other.
pub(crate) fn crc32c_of<const N: usize>(parts: [&[u8]; N]) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    parts.into_iter().for_each(|part| digest.update(part));
    digest.finalize() as u32
}

/// CRC-32C of a payload followed by its epoch and LSN: right bytes under a wrong or stale header do not match.
#[must_use]
pub fn payload_crc(epoch: EpochId, lsn: Lsn, payload: &[u8]) -> u32 {
    crc32c_of([payload, &epoch.0, &lsn.0.to_le_bytes()])
}

/// The first 128 bits of a BLAKE3 hash: names a batch in its successor's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hash128(pub [u8; 16]);

impl Hash128 {
    /// Hashes `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Hash128 {
        let mut short = [0u8; 16];
        short.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
        Hash128(short)
    }
}
