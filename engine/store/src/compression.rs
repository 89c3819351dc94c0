//! Frames, packed and unpacked: Zstandard, LZ4, or as they are. What does not get smaller stays as it is.

use std::cell::RefCell;
use std::fmt;
use varve_format::Codec;

/// How to compress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all; zeroes and repetitions are still left out.
    None,
    /// LZ4: fast.
    Lz4,
    /// Zstandard at this level, 1 to 19.
    Zstd(i32),
}

impl Default for Compression {
    /// Zstandard 3.
    fn default() -> Compression {
        Compression::Zstd(3)
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Compression::None => f.write_str("none"),
            Compression::Lz4 => f.write_str("lz4"),
            Compression::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

impl std::str::FromStr for Compression {
    type Err = String;

    fn from_str(word: &str) -> Result<Compression, String> {
        let level = |level: &str| level.parse().ok().filter(|level| (1..=19).contains(level));
        match word.split_once(':') {
            None if word == "none" => Ok(Compression::None),
            None if word == "lz4" => Ok(Compression::Lz4),
            None if word == "zstd" => Ok(Compression::default()),
            Some(("zstd", number)) if level(number).is_some() => {
                Ok(Compression::Zstd(level(number).unwrap_or_default()))
            }
            _ => Err(format!(
                "{word:?} is not a compression: none, lz4, zstd, zstd:1 to zstd:19"
            )),
        }
    }
}

/// Packs frames one after another, with the same memory.
pub(crate) struct Packer {
    compression: Compression,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    packed: Vec<u8>,
}

impl Packer {
    pub(crate) fn new(compression: Compression) -> std::io::Result<Packer> {
        let zstd = match compression {
            Compression::Zstd(level) => Some(zstd::bulk::Compressor::new(level)?),
            _ => None,
        };
        Ok(Packer {
            compression,
            zstd,
            packed: Vec::new(),
        })
    }

    /// The codec and the bytes to store for a frame.
    pub(crate) fn pack<'a>(&'a mut self, frame: &'a [u8]) -> std::io::Result<(Codec, &'a [u8])> {
        let (codec, length) = match (self.compression, &mut self.zstd) {
            (Compression::Lz4, _) => {
                self.packed
                    .resize(lz4_flex::block::get_maximum_output_size(frame.len()), 0);
                let length = lz4_flex::block::compress_into(frame, &mut self.packed)
                    .map_err(std::io::Error::other)?;
                (Codec::Lz4, length)
            }
            (Compression::Zstd(_), Some(zstd)) => {
                self.packed
                    .resize(zstd::zstd_safe::compress_bound(frame.len()), 0);
                let length = zstd.compress_to_buffer(frame, &mut self.packed[..])?;
                (Codec::Zstd, length)
            }
            _ => return Ok((Codec::Plain, frame)),
        };
        if length >= frame.len() {
            return Ok((Codec::Plain, frame));
        }
        Ok((codec, &self.packed[..length]))
    }
}

/// Unpacks a frame that is `whole` bytes long. `None`: the bytes are not such a frame.
pub(crate) fn unpack(codec: u8, stored: &[u8], whole: usize) -> Option<Vec<u8>> {
    thread_local! {
        // Making one costs as much as unpacking a frame.
        static ZSTD: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
    }
    let frame = match Codec::from_code(codec)? {
        Codec::Plain => stored.to_vec(),
        Codec::Lz4 => lz4_flex::block::decompress(stored, whole).ok()?,
        Codec::Zstd => ZSTD.with_borrow_mut(|kept| {
            if kept.is_none() {
                *kept = zstd::bulk::Decompressor::new().ok();
            }
            kept.as_mut()?.decompress(stored, whole).ok()
        })?,
    };
    (frame.len() == whole).then_some(frame)
}
