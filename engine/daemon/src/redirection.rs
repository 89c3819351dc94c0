//! Where a rewind goes that was taken back, or sent elsewhere, after it had begun: the log says only where it began to go.
//!
//! Order: the note is durable before the first block is written to the new end, and removed before the next rewind begins. Crash before it: the rewind goes
//! where it began to, and nothing was written for another end. A rewind that is sent on once more has blocks of the end before: the note of that goes when the
//! new one is durable, not before. Notes are numbered: where the disk takes none any more there is one in memory beside an older one on it, or the other way
//! round, and the later one counts.

use crate::service::{Service, error};
use std::fs::File;
use std::path::{Path, PathBuf};
use varve_control::ControlError;
use varve_format::Lsn;

impl Service {
    /// Where it is noted that a rewind goes somewhere else than it began to: the log says only the latter. On a disk that takes no note, in memory.
    fn redirections(&self, id: &str) -> [PathBuf; 2] {
        let name = format!("rewind-{id}");
        [
            self.paths().run().join(&name),
            self.paths().store().join(name),
        ]
    }

    pub(crate) fn note_redirected(&self, id: &str, from: Lsn, to: Lsn) -> Result<(), ControlError> {
        let [in_memory, on_disk] = self.redirections(id);
        let number = self.notes(id, from).map(|(number, _)| number + 1).max();
        let text = format!("{from} {to} {} end\n", number.unwrap_or_default());
        let write = |path: &Path| {
            let new = path.with_extension("new");
            let mut file = File::create(&new)?;
            let written = std::io::Write::write_all(&mut file, text.as_bytes())
                .and_then(|()| file.sync_all())
                .and_then(|()| std::fs::rename(&new, path))
                .and_then(|()| flush_directory_of(path));
            written.inspect_err(|_| drop(std::fs::remove_file(&new)))
        };
        let noted = write(&on_disk).or_else(|_| write(&in_memory));
        noted.map_err(|failed| {
            let message = format!("{}: {failed}. Nothing was written", in_memory.display());
            error("R001-restore", message)
        })
    }

    /// Where a rewind that began to `target` goes now.
    pub(crate) fn redirected(&self, id: &str, target: Lsn) -> Lsn {
        let last = self.notes(id, target).max();
        last.map_or(target, |(_, to)| to)
    }

    /// What is noted of a rewind that began to `target`: the note's number, and where it goes.
    fn notes(&self, id: &str, target: Lsn) -> impl Iterator<Item = (u64, Lsn)> {
        let note = move |path: PathBuf| note(&std::fs::read_to_string(path).ok()?, target);
        self.redirections(id).into_iter().filter_map(note)
    }

    pub(crate) fn forget_redirected(&self, id: &str) {
        for path in self.redirections(id) {
            if std::fs::remove_file(&path).is_ok() {
                let _ = flush_directory_of(&path);
            }
        }
    }
}

/// The number of a note, and where the rewind to `target` goes. Those of before they were numbered come first.
fn note(text: &str, target: Lsn) -> Option<(u64, Lsn)> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let (from, to, number) = match words.as_slice() {
        [from, to, number, "end"] => (from, to, number.parse().ok()?),
        [from, to, "end"] => (from, to, 0),
        _ => return None,
    };
    (from.parse() == Ok(target.0)).then_some((number, Lsn(to.parse().ok()?)))
}

fn flush_directory_of(path: &Path) -> std::io::Result<()> {
    File::open(path.parent().unwrap_or(path))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::note;
    use varve_format::Lsn;

    #[test]
    fn the_last_note_counts_and_old_ones_are_understood() {
        let notes = [
            "7 40 3 end\n",
            "7 50 12 end\n",
            "7 60 end\n",
            "8 70 99 end\n",
        ];
        let of = |target| notes.iter().filter_map(move |text| note(text, Lsn(target)));
        assert_eq!(of(7).max(), Some((12, Lsn(50))));
        assert_eq!(note("7 60 end\n", Lsn(7)), Some((0, Lsn(60))));
        // Torn, or another rewind's.
        for text in [
            "",
            "7",
            "7 40",
            "7 40 3",
            "7 40 3 en",
            "x 40 3 end",
            "8 40 3 end",
        ] {
            assert_eq!(note(text, Lsn(7)), None, "{text}");
        }
    }
}
