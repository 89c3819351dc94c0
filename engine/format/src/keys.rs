//! The file of keys: each volume's keys, sealed by a key that is made of a passphrase or of a key file. It lies in the store; by itself it opens nothing.
//!
//!   128-byte header │ 104-byte entries
//!
//! The first entry is of no volume: opening it tells whether the secret is the right one.

use crate::segment::check_head;
use crate::{FormatError, VERSION, crc32c};
use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 4] = *b"VKEY";
/// Size of the header.
pub const KEYS_HEADER_BYTES: usize = 128;
/// Size of an entry.
pub const SEALED_KEY_BYTES: usize = 104;
/// A file of more than this is none of ours.
pub const KEYS_FILE_BYTES_MAX: u64 = 16 << 20;

/// What the sealing key is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SecretKind {
    /// A passphrase, by Argon2id.
    Passphrase = 1,
    /// The content of a file, by HKDF-SHA-256.
    KeyFile = 2,
}

/// The header.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, PartialEq, Eq,
)]
pub struct KeysHeader {
    /// CRC-32C of everything after itself, entries included.
    pub crc: U32,
    /// `VKEY`.
    pub magic: [u8; 4],
    /// Format version.
    pub version: U16,
    /// Features that a reader may ignore.
    pub compat: U16,
    /// Features that a reader must know.
    pub incompat: U32,
    /// [`SecretKind`].
    pub kind: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// Argon2id: memory in KiB.
    pub memory_kib: U32,
    /// Argon2id: passes.
    pub passes: U32,
    /// Argon2id: lanes.
    pub lanes: U32,
    /// Of Argon2id or HKDF.
    pub salt: [u8; 32],
    /// Entries.
    pub entry_count: U32,
    /// One more each time that the file is written: of two copies the one with more counts.
    pub generation: U64,
    /// Zero.
    pub reserved_2: [u8; 52],
}
const _: () = assert!(size_of::<KeysHeader>() == KEYS_HEADER_BYTES);

impl KeysHeader {
    /// A header with magic and version set and everything else zero.
    #[must_use]
    pub fn empty() -> KeysHeader {
        let mut header: KeysHeader = KeysHeader::new_zeroed();
        header.magic = MAGIC;
        header.version = U16::new(VERSION);
        header
    }

    /// What the sealing key is made of.
    pub fn kind(&self) -> Result<SecretKind, FormatError> {
        match self.kind {
            1 => Ok(SecretKind::Passphrase),
            2 => Ok(SecretKind::KeyFile),
            _ => Err(FormatError::Field("keys.kind")),
        }
    }
}

/// A key, sealed by AES-256-GCM.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, PartialEq, Eq,
)]
pub struct SealedKey {
    /// The volume; zero for the entry that tells whether the secret is right.
    pub volume: [u8; 16],
    /// Which of its keys: what segments name.
    pub id: [u8; 16],
    /// When it was made, in nanoseconds since 1970.
    pub created: I64,
    /// Nonce.
    pub nonce: [u8; 12],
    /// Zero.
    pub reserved: [u8; 4],
    /// The key and its tag; `volume`, `id` and `created` are authenticated with it.
    pub sealed: [u8; 48],
}
const _: () = assert!(size_of::<SealedKey>() == SEALED_KEY_BYTES);

impl SealedKey {
    /// What is authenticated beside the key.
    #[must_use]
    pub fn context(&self) -> &[u8] {
        &self.as_bytes()[..40]
    }
}

/// A whole file.
#[must_use]
pub fn encode_keys(header: &KeysHeader, entries: &[SealedKey]) -> Vec<u8> {
    let mut header = *header;
    header.entry_count = (entries.len() as u32).into();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(entries.as_bytes());
    let crc = crc32c(&bytes[4..]);
    bytes[..4].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Checks a whole file. What it asks Argon2id for is bounded: a hostile file must not take the machine's memory.
pub fn parse_keys(bytes: &[u8]) -> Result<(KeysHeader, Vec<SealedKey>), FormatError> {
    let (header, rest) =
        KeysHeader::read_from_prefix(bytes).map_err(|_| FormatError::Truncated {
            needed: KEYS_HEADER_BYTES as u64,
            found: bytes.len() as u64,
        })?;
    check_head(
        header.magic == MAGIC,
        header.crc.get(),
        bytes,
        header.version.get(),
        header.incompat.get(),
    )?;
    header.kind()?;
    let needed = header.entry_count.get() as usize * SEALED_KEY_BYTES;
    if rest.len() != needed || needed == 0 {
        return Err(FormatError::Truncated {
            needed: (KEYS_HEADER_BYTES + needed) as u64,
            found: bytes.len() as u64,
        });
    }
    let bounded = |value: &U32, most: u32| (1..=most).contains(&value.get());
    if header.kind()? == SecretKind::Passphrase
        && !(bounded(&header.memory_kib, 256 << 10)
            && bounded(&header.passes, 10)
            && bounded(&header.lanes, 16)
            && header.memory_kib.get() >= 8 * header.lanes.get())
    {
        return Err(FormatError::Field("keys.memory_kib"));
    }
    let entries =
        <[SealedKey]>::ref_from_bytes(rest).map_err(|_| FormatError::Field("keys.entries"))?;
    Ok((header, entries.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::{KeysHeader, SealedKey, SecretKind, encode_keys, parse_keys};
    use zerocopy::FromZeros;

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let mut header = KeysHeader::empty();
        header.kind = SecretKind::Passphrase as u8;
        (header.memory_kib, header.passes, header.lanes) = (64.into(), 3.into(), 1.into());
        let mut entry = SealedKey::new_zeroed();
        entry.id = [7; 16];
        let bytes = encode_keys(&header, &[entry, entry]);
        let (read, entries) = parse_keys(&bytes).unwrap();
        assert_eq!(
            (read.kind().unwrap(), entries),
            (SecretKind::Passphrase, vec![entry, entry])
        );
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(parse_keys(&changed).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(parse_keys(&bytes[..length]).is_err(), "{length}");
        }
        header.memory_kib = (1 << 20).into();
        assert!(parse_keys(&encode_keys(&header, &[entry])).is_err());
    }
}
