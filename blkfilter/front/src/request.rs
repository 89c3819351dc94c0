//! A request as every front end gives it, and what a front end must know of the device behind it.

use varve_log::Buffer;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// Fill the buffer.
    Read,
    /// Write the buffer.
    Write,
    /// Make every completed write durable.
    Flush,
    /// The range's content no longer matters.
    Discard,
    /// The range reads zero from now on.
    Zero,
}

/// One request.
#[derive(Clone)]
pub struct Request {
    /// Names the request in its answer; below the front end's depth.
    pub tag: u32,
    /// What it asks for.
    pub kind: RequestKind,
    /// First byte.
    pub offset: u64,
    /// Length in bytes; zero for a flush.
    pub length: u64,
    /// Answer only once the write is durable.
    pub force_unit_access: bool,
    /// The bytes of a read or write; it belongs to the device until the answer.
    pub buffer: Option<Buffer>,
}

/// What a device looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes; a multiple of `sector_bytes`.
    pub bytes: u64,
    /// Logical sector: 512 or 4096.
    pub sector_bytes: u32,
    /// Physical block.
    pub physical_bytes: u32,
    /// Whether discards do anything; zero granularity means no.
    pub discard_granularity: u32,
    /// Whether writes are refused.
    pub read_only: bool,
}
