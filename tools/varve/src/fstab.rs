//! /etc/fstab: which lines mount a device, and changing them so that one command changes them back.
//!
//! A changed line stands behind a comment that holds what it was:
//!
//!   # varve NAME was: UUID=1234 /srv ext4 defaults 0 2
//!   /dev/varve/NAME /srv ext4 defaults,x-systemd.after=blkfilter.service 0 2
//!
//! Crash: the new file is written beside the old one, flushed, and renamed over it: at any moment one of the two is whole.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Makes systemd start the data path before the mount, and stop it after the unmount. Not `requires`: a restart of the daemon would unmount.
const ORDER: &str = "x-systemd.after=blkfilter.service";

/// A line that mounts a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Number of the line.
    index: usize,
    /// Where it is mounted.
    pub place: String,
    fields: Vec<String>,
}

fn marker(name: &str) -> String {
    format!("# varve {name} was: ")
}

/// The lines of `text` for whose source `is_device` says so. Swap and pseudo file systems are left out.
pub fn entries(text: &str, is_device: impl Fn(&str) -> bool) -> Vec<Entry> {
    let entry = |(index, line): (usize, &str)| {
        let fields: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let mounts = fields.len() >= 3 && !fields[0].starts_with('#') && fields[2] != "swap";
        (mounts && is_device(&fields[0])).then(|| Entry {
            index,
            place: fields[1].clone(),
            fields,
        })
    };
    text.lines().enumerate().filter_map(entry).collect()
}

/// `text` with these entries mounting `mapped` instead, each behind a comment with the old line.
pub fn rewritten(text: &str, entries: &[Entry], name: &str, mapped: &Path) -> String {
    let mut lines = String::new();
    for (index, line) in text.lines().enumerate() {
        if let Some(entry) = entries.iter().find(|entry| entry.index == index) {
            let mut fields = entry.fields.clone();
            fields[0] = mapped.display().to_string();
            let options = fields.get(3).cloned().unwrap_or("defaults".to_owned());
            fields.truncate(3);
            fields.push(format!("{options},{ORDER}"));
            fields.extend(entry.fields.iter().skip(4).cloned());
            lines += &format!("{}{line}\n{}\n", marker(name), fields.join(" "));
        } else {
            lines += line;
            lines.push('\n');
        }
    }
    lines
}

/// Whether a line mounts the volume of this name.
fn took_its_place(line: &str, name: &str) -> bool {
    let source = line.split_whitespace().next().map(Path::new);
    source
        .is_some_and(|path| path.is_absolute() && path.file_name().is_some_and(|last| last == name))
}

/// `text` as it was before, or nothing if no line of it is marked with `name`.
pub fn restored(text: &str, name: &str) -> Option<String> {
    let marker = marker(name);
    let mut lines = String::new();
    let (mut found, mut skip) = (false, false);
    for line in text.lines() {
        if let Some(old) = line.strip_prefix(&marker) {
            lines += old;
            lines.push('\n');
            (found, skip) = (true, true);
        } else if std::mem::take(&mut skip) && took_its_place(line, name) {
            // Gone again.
        } else {
            lines += line;
            lines.push('\n');
        }
    }
    found.then_some(lines)
}

/// Whether an fstab source (a path, UUID=, LABEL=, PARTUUID=, PARTLABEL=) means `device`.
pub fn means(source: &str, device: &Path) -> bool {
    let source = source.trim_matches('"');
    let path = match source.split_once('=') {
        Some((tag, value)) if !source.starts_with('/') => {
            let value = value.trim_matches('"');
            let directory = format!("/dev/disk/by-{}", tag.to_ascii_lowercase());
            let link = Path::new(&directory).join(value);
            if link.exists() {
                link
            } else {
                // Without udev: what the superblocks say.
                let found = std::process::Command::new("findfs")
                    .arg(format!("{tag}={value}"))
                    .output();
                match found {
                    Ok(output) if output.status.success() => {
                        PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
                    }
                    _ => return false,
                }
            }
        }
        _ => PathBuf::from(source),
    };
    std::fs::canonicalize(path).is_ok_and(|path| path == device)
}

/// Replaces the file, keeping its permissions.
pub fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    let new = path.with_extension("varve-new");
    let mode = std::fs::metadata(path).map_or(0o644, |metadata| metadata.permissions().mode());
    let mut file = std::fs::File::create(&new)?;
    file.set_permissions(std::fs::Permissions::from_mode(mode))?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    path.parent()
        .map_or(Ok(()), |parent| std::fs::File::open(parent)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::{entries, restored, rewritten};
    use std::path::Path;

    const TABLE: &str = "# a comment\nUUID=1 / ext4 errors=remount-ro 0 1\nUUID=2\t/srv  ext4\tnoatime 0 2\nUUID=2 none swap sw 0 0\n/dev/sdc1 /data xfs\n";

    #[test]
    fn a_line_is_changed_and_changed_back() {
        let found = entries(TABLE, |source| source == "UUID=2");
        assert_eq!(found.len(), 1, "swap is left alone: {found:?}");
        assert_eq!(found[0].place, "/srv");
        let new = rewritten(TABLE, &found, "srv", Path::new("/dev/varve/srv"));
        assert!(new.contains(
            "\n# varve srv was: UUID=2\t/srv  ext4\tnoatime 0 2\n/dev/varve/srv /srv ext4 noatime,x-systemd.after=blkfilter.service 0 2\n"
        ), "{new}");
        assert!(new.contains("UUID=1 / ext4"), "other lines stay: {new}");
        assert_eq!(restored(&new, "srv").unwrap(), TABLE);
        assert_eq!(restored(&new, "other"), None);
    }

    #[test]
    fn a_line_that_somebody_put_there_stays() {
        let text = "# varve d was: /dev/sdc1 /data xfs\n/dev/sdd1 /home ext4 defaults 0 2\n";
        let old = restored(text, "d").unwrap();
        assert_eq!(
            old,
            "/dev/sdc1 /data xfs\n/dev/sdd1 /home ext4 defaults 0 2\n"
        );
    }

    #[test]
    fn missing_fields_get_their_defaults() {
        let found = entries(TABLE, |source| source == "/dev/sdc1");
        let new = rewritten(TABLE, &found, "d", Path::new("/dev/varve/d"));
        assert!(
            new.contains("/dev/varve/d /data xfs defaults,x-systemd.after=blkfilter.service\n"),
            "{new}"
        );
        assert_eq!(restored(&new, "d").unwrap(), TABLE);
    }
}
