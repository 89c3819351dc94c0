//! Encryption of segments at rest: AES-256-GCM for each frame.
//!
//! Each file has a key of its own, made by HKDF-SHA-256 of the volume's key and the file's salt; the nonce is the frame's number. So no nonce is used twice
//! with one key, however often a segment is written anew. With each frame is authenticated where it belongs: volume, epoch, LSNs, segment, frame.

use crate::keys::SecretKey;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Salt};
use ring::rand::{SecureRandom, SystemRandom};
use std::io;
use varve_format::{FRAME_TAG_BYTES, SegmentFooter};
use zeroize::Zeroizing;

const FRAMES: &[u8] = b"varve frame 1";
const TABLES: &[u8] = b"varve tables 1";
const FILE: &[u8] = b"varve file key 1";
/// No frame has this number: the nonce of the tables' tag.
const TABLES_NONCE: [u8; NONCE_LEN] = [0xff; NONCE_LEN];

struct Bytes32;

impl KeyType for Bytes32 {
    fn len(&self) -> usize {
        32
    }
}

/// Random bytes of the kernel's.
pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| io::Error::other("the kernel gives no random bytes"))?;
    Ok(bytes)
}

/// HKDF-SHA-256 to 32 bytes.
pub(crate) fn derived(secret: &[u8], salt: &[u8], purpose: &[u8]) -> SecretKey {
    let mut key = Zeroizing::new([0u8; 32]);
    let made = Salt::new(HKDF_SHA256, salt)
        .extract(secret)
        .expand(&[purpose], Bytes32)
        .and_then(|okm| okm.fill(key.as_mut()));
    debug_assert!(made.is_ok(), "32 bytes are never too many");
    key
}

pub(crate) fn cipher(key: &[u8; 32]) -> io::Result<LessSafeKey> {
    let unbound = UnboundKey::new(&AES_256_GCM, key);
    unbound
        .map(LessSafeKey::new)
        .map_err(|_| io::Error::other("AES-256-GCM is not there"))
}

/// Encrypts and decrypts what belongs to one file.
pub(crate) struct FileCipher {
    key: LessSafeKey,
    /// Where all of it belongs.
    context: Vec<u8>,
}

impl FileCipher {
    pub(crate) fn new(
        volume_key: &SecretKey,
        salt: &[u8; 32],
        footer: &SegmentFooter,
    ) -> io::Result<FileCipher> {
        let mut context = Vec::with_capacity(56);
        context.extend(footer.volume);
        context.extend(footer.epoch);
        for number in [footer.lsn_start, footer.lsn_end, footer.sequence] {
            context.extend(number.get().to_le_bytes());
        }
        let key = derived(volume_key.as_ref(), salt, FILE);
        Ok(FileCipher {
            key: cipher(&key)?,
            context,
        })
    }

    fn frame_parts(&self, frame: u64) -> (Nonce, Vec<u8>) {
        let mut nonce = [0; NONCE_LEN];
        nonce[..8].copy_from_slice(&frame.to_le_bytes());
        let about = [FRAMES, &self.context, &frame.to_le_bytes()].concat();
        (Nonce::assume_unique_for_key(nonce), about)
    }

    /// Encrypts a frame in its place and adds its tag.
    pub(crate) fn seal(&self, frame: u64, bytes: &mut Vec<u8>) -> io::Result<()> {
        let (nonce, about) = self.frame_parts(frame);
        self.key
            .seal_in_place_append_tag(nonce, Aad::from(about), bytes)
            .map_err(|_| io::Error::other("a frame could not be encrypted"))
    }

    /// Decrypts a frame in its place; none if it is not what was encrypted.
    pub(crate) fn open<'a>(&self, frame: u64, bytes: &'a mut [u8]) -> Option<&'a [u8]> {
        let (nonce, about) = self.frame_parts(frame);
        let open = self.key.open_in_place(nonce, Aad::from(about), bytes);
        open.ok().map(|bytes| &*bytes)
    }

    /// The tag of what is not encrypted.
    pub(crate) fn tag(&self, tagged: &[u8]) -> io::Result<[u8; FRAME_TAG_BYTES]> {
        let about = [TABLES, &self.context, tagged].concat();
        let nonce = Nonce::assume_unique_for_key(TABLES_NONCE);
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce, Aad::from(about), &mut [])
            .map_err(|_| io::Error::other("no tag could be made"))?;
        let mut bytes = [0; FRAME_TAG_BYTES];
        bytes.copy_from_slice(tag.as_ref());
        Ok(bytes)
    }
}
