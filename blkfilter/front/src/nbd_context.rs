//! Metadata contexts of an NBD export: what lies where, without reading it (the NBD protocol document, "Metadata querying").

use std::io;

/// In `base:allocation`: nothing is stored there.
pub const STATE_HOLE: u32 = 1;
/// In `base:allocation`: it reads zero.
pub const STATE_ZERO: u32 = 2;
/// In a dirty bitmap: it was written.
pub const STATE_DIRTY: u32 = 1;
/// The context that every client knows.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Most extents in one answer: the client asks on where it ends.
const EXTENTS_MAX: usize = 4096;
/// Bytes that are looked at in one go.
const STEP_BYTES: u64 = 64 << 20;
/// An extent says its length in 32 bits.
const EXTENT_BYTES_MAX: u64 = 1 << 31;

/// States of `[offset, offset + length)`, in order and without holes: (bytes, state).
type Tell = dyn Fn(u64, u64) -> io::Result<Vec<(u64, u32)>> + Send + Sync;

/// One context.
pub struct MetaContext {
    /// Its name: `base:allocation`, `qemu:dirty-bitmap:NAME`.
    pub name: String,
    /// What it says.
    pub tell: Box<Tell>,
}

impl MetaContext {
    /// Extents (bytes, state) from `offset` on: at least one, none of no bytes, and no more than one answer holds; neighbours differ.
    pub(crate) fn extents(
        &self,
        offset: u64,
        length: u64,
        only_one: bool,
    ) -> io::Result<Vec<(u32, u32)>> {
        let mut extents: Vec<(u64, u32)> = Vec::new();
        let (mut at, end) = (offset, offset + length);
        // The last one may grow with the next step, so one more than is wanted is looked for.
        let most = if only_one { 1 } else { EXTENTS_MAX };
        while at < end && extents.len() <= most {
            let step = STEP_BYTES.min(end - at);
            for (bytes, state) in (self.tell)(at, step)? {
                match extents.last_mut() {
                    Some(last) if last.1 == state && last.0 + bytes <= EXTENT_BYTES_MAX => {
                        last.0 += bytes;
                    }
                    _ if bytes > 0 => extents.push((bytes, state)),
                    _ => {}
                }
            }
            at += step;
        }
        extents.truncate(most);
        if extents.is_empty() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok(extents
            .into_iter()
            .map(|(bytes, state)| (bytes as u32, state))
            .collect())
    }
}

/// The contexts that a client's option names, by number; none: the option is not well-formed. `lists`: a namespace stands for all in it, nothing for all.
pub(crate) fn named(contexts: &[MetaContext], data: &[u8], lists: bool) -> Option<Vec<u32>> {
    let number = |bytes: &'_ [u8]| {
        let head = bytes.first_chunk::<4>()?;
        Some(u32::from_be_bytes(*head) as usize)
    };
    let name_bytes = number(data)?;
    let mut rest = data.get(4..)?.get(name_bytes..)?;
    let count = number(rest)?;
    rest = &rest[4..];
    let mut found = Vec::new();
    if count == 0 && lists {
        found.extend(0..contexts.len() as u32);
    }
    for _ in 0..count {
        let length = number(rest)?;
        let (query, tail) = rest[4..].split_at_checked(length)?;
        rest = tail;
        let fits = |context: &MetaContext| {
            let name = context.name.as_bytes();
            name == query || lists && query.ends_with(b":") && name.starts_with(query)
        };
        let numbered = (0..).zip(contexts);
        found.extend(
            numbered
                .filter(|(_, context)| fits(context))
                .map(|(id, _)| id),
        );
    }
    found.sort_unstable();
    found.dedup();
    rest.is_empty().then_some(found)
}

#[cfg(test)]
mod tests {
    use super::{EXTENTS_MAX, MetaContext, named};

    fn context(name: &str, tell: fn(u64) -> u32) -> MetaContext {
        MetaContext {
            name: name.to_owned(),
            tell: Box::new(move |offset, length| {
                Ok((offset..offset + length)
                    .step_by(4096)
                    .map(|at| (4096.min(offset + length - at), tell(at)))
                    .collect())
            }),
        }
    }

    fn option(export: &str, queries: &[&str]) -> Vec<u8> {
        let text = |text: &str| [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat();
        let mut data = text(export);
        data.extend((queries.len() as u32).to_be_bytes());
        for query in queries {
            data.extend(text(query));
        }
        data
    }

    #[test]
    fn contexts_are_found_by_name_and_by_namespace() {
        let all = [
            context("base:allocation", |_| 0),
            context("qemu:dirty-bitmap:varve", |_| 0),
        ];
        let ask = |queries: &[&str], lists| named(&all, &option("", queries), lists);
        assert_eq!(ask(&[], true), Some(vec![0, 1]));
        assert_eq!(ask(&[], false), Some(vec![]));
        assert_eq!(ask(&["qemu:"], true), Some(vec![1]));
        assert_eq!(ask(&["qemu:"], false), Some(vec![]));
        assert_eq!(
            ask(&["base:allocation", "x:y", "base:allocation"], false),
            Some(vec![0])
        );
        let whole = option("name", &["base:allocation"]);
        for length in 0..whole.len() {
            assert_eq!(named(&all, &whole[..length], false), None, "{length}");
        }
        let mut huge = option("", &["base:allocation"]);
        huge[8..12].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(named(&all, &huge, false), None);
    }

    #[test]
    fn extents_cover_what_was_asked_for_and_are_bounded() {
        let halves = context("x", |at| u32::from(at >= 100 << 20));
        let found = halves.extents(4096, 200 << 20, false).unwrap();
        assert_eq!(found, [((100 << 20) - 4096, 0), ((100 << 20) + 4096, 1)]);
        assert_eq!(halves.extents(4096, 200 << 20, true).unwrap(), found[..1]);
        let stripes = context("x", |at| (at / 4096 % 2) as u32);
        assert_eq!(
            stripes.extents(0, 1 << 30, false).unwrap().len(),
            EXTENTS_MAX
        );
        assert_eq!(stripes.extents(0, 512, true).unwrap(), [(512, 0)]);
        let broken = MetaContext {
            name: String::new(),
            tell: Box::new(|_, _| Ok(Vec::new())),
        };
        assert!(broken.extents(0, 4096, false).is_err());
    }
}
