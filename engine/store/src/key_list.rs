//! A file that names keys, each on a line, by 32 hexadecimal digits: those that a history is encrypted with, those that were exported. No key is in it.

use crate::{StoreError, durable};
use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::Path;

/// Keys, by their names.
pub(crate) type KeyNames = BTreeSet<[u8; 16]>;

/// What is listed; and whether all of it could be read.
pub(crate) fn read(path: &Path) -> io::Result<(KeyNames, bool)> {
    let text = std::fs::read_to_string(path)?;
    let id = |line: &str| u128::from_str_radix(line, 16).ok().map(u128::to_be_bytes);
    let whole = text.lines().all(|line| id(line).is_some());
    Ok((text.lines().filter_map(id).collect(), whole))
}

/// Writes the list, durably: the whole of it is there, or the old one.
pub(crate) fn write(path: &Path, names: &KeyNames) -> Result<(), StoreError> {
    let line = |id: &[u8; 16]| format!("{:032x}\n", u128::from_be_bytes(*id));
    let text: String = names.iter().map(line).collect();
    durable::create(path, |file| {
        file.write_all(text.as_bytes())
            .map_err(StoreError::io(path))
    })
}
