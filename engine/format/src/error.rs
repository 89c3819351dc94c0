//! What can be wrong with bytes that claim to be Varve's. Every corruption has a name.

use std::fmt;

/// Why bytes were refused. Whoever reads adds where they came from (file, segment, offset).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FormatError {
    /// Fewer bytes than the structure needs: a truncated file or a torn write.
    Truncated {
        /// Bytes that were needed.
        needed: u64,
        /// Bytes that were there.
        found: u64,
    },
    /// The magic number is another's: not Varve's bytes, or never written.
    NotVarve,
    /// The checksum does not match: torn or rotten.
    Checksum,
    /// Written by a newer version, or with an incompatible feature that this one does not know.
    Newer {
        /// The version that was found.
        version: u16,
        /// Incompatible features that are unknown here.
        incompat: u32,
    },
    /// A field holds a value that this version never writes.
    Field(&'static str),
    /// Valid bytes of another volume, epoch, segment or place: misdirected, stale or forked.
    Foreign(&'static str),
}

impl FormatError {
    /// A stable code for the documents and `--json`.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            FormatError::Truncated { .. } => "F001-truncated",
            FormatError::NotVarve => "F002-not-varve",
            FormatError::Checksum => "F003-checksum",
            FormatError::Newer { .. } => "F004-newer",
            FormatError::Field(_) => "F005-field",
            FormatError::Foreign(_) => "F006-foreign",
        }
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FormatError::Truncated { needed, found } => {
                write!(f, "truncated: {found} bytes of {needed}")
            }
            FormatError::NotVarve => write!(f, "not written by Varve, or never written"),
            FormatError::Checksum => write!(f, "the checksum does not match: torn or damaged"),
            FormatError::Newer { version, incompat } => write!(
                f,
                "written by a newer Varve (version {version}, features {incompat:#x}); read it with that version"
            ),
            FormatError::Field(name) => write!(f, "the field `{name}` holds an impossible value"),
            FormatError::Foreign(what) => write!(f, "valid, but of another {what}"),
        }
    }
}

impl std::error::Error for FormatError {}
