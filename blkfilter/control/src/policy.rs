//! What the store does by itself: `etc/varve/store.toml`. Without the file everything has a sane default.

use serde::{Deserialize, Serialize};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use toml_edit::{DocumentMut, Item, Table, Value};

/// More processors than that compressing does not take.
const PERCENT_MAX: u32 = 1600;

/// A key file, or a file of exported keys, of more than this is none.
pub const KEY_FILE_BYTES_MAX: u64 = 512 << 10;

/// How the store treats what it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StorePolicy {
    /// `none`, `lz4`, `zstd` or `zstd:1` to `zstd:19`.
    pub compression: String,
    /// Percent of one processor that compressing, merging and pruning may take; 200: compressing takes two, and so on.
    pub background_percent: u32,
    /// How much of the past is kept: `all 48h, 1m 7d, 1h 30d, 1d 1y`, or `all`.
    pub keep: String,
    /// What is younger is never pruned, whatever `keep` says: `7d`; empty: nothing is held so.
    pub immutable: String,
    /// How much space all histories together may take before the oldest instants go: `500G`, `90%` of the store's disk; empty: as much as there is.
    pub space: String,
    /// The file that opens an encrypted store when its daemon starts; empty: somebody says the passphrase (`varve key unlock`).
    pub key_file: String,
    /// Recovery points that are made by themselves.
    pub points: PointPolicy,
}

/// Which recovery points are made by themselves: `[points]` in `store.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PointPolicy {
    /// How often: `15m`, `1h`, `1d`; empty: on no schedule. Where nothing was written since the last one there is none.
    pub every: String,
    /// Those on the schedule are made with the file systems frozen for that moment.
    pub freeze: bool,
    /// Run before each on the schedule; exit code 0: applications are ready. The point is made in any case.
    pub before: String,
    /// Run after it, in any case.
    pub after: String,
    /// Each of the two is ended after so many seconds.
    pub hook_seconds: u64,
    /// At mount, unmount and boot.
    pub events: bool,
}

impl Default for PointPolicy {
    fn default() -> PointPolicy {
        PointPolicy {
            every: String::new(),
            freeze: false,
            before: String::new(),
            after: String::new(),
            hook_seconds: 30,
            events: true,
        }
    }
}

impl Default for StorePolicy {
    fn default() -> StorePolicy {
        StorePolicy {
            compression: "zstd:3".to_owned(),
            background_percent: 50,
            keep: "all 48h, 1m 7d, 1h 30d, 1d 1y".to_owned(),
            immutable: String::new(),
            space: "90%".to_owned(),
            key_file: String::new(),
            points: PointPolicy::default(),
        }
    }
}

impl StorePolicy {
    /// Writes the policy: the whole file is there, or the old one. Comments stay, and what is as it was.
    pub fn save(&self, path: &Path) -> Result<(), String> {
        let wrong = |why: &dyn std::fmt::Display| format!("{}: {why}", path.display());
        let old = std::fs::read_to_string(path).unwrap_or_default();
        let text = self.text(&old).map_err(|why| wrong(&why))?;
        let new = path.with_extension("new");
        let folder = path.parent().unwrap_or(path);
        let write = || {
            std::fs::create_dir_all(folder)?;
            // Commands in it may have passwords: who could not read the old file cannot read the new one.
            let mode = std::fs::metadata(path).map_or(0o600, |old| old.permissions().mode());
            let _ = std::fs::remove_file(&new);
            let mut file = std::fs::File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&new)?;
            file.set_permissions(std::fs::Permissions::from_mode(mode & 0o777))?;
            std::io::Write::write_all(&mut file, text.as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&new, path)?;
            std::fs::File::open(folder)?.sync_all()
        };
        write().map_err(|error| wrong(&error))
    }

    /// Its text, made of another one's.
    fn text(&self, old: &str) -> Result<String, String> {
        let document = |policy: &StorePolicy| {
            let text = toml::to_string(policy).map_err(|error| error.to_string())?;
            text.parse::<DocumentMut>()
                .map_err(|error| error.to_string())
        };
        let (new, default) = (document(self)?, document(&StorePolicy::default())?);
        let mut text = old.parse::<DocumentMut>().unwrap_or_default();
        merge(text.as_table_mut(), new.as_table(), default.as_table());
        Ok(text.to_string())
    }

    /// Reads the policy; the default if there is no file. An error says what is wrong with which file.
    pub fn load(path: &Path) -> Result<StorePolicy, String> {
        let wrong = |why: &dyn std::fmt::Display| {
            format!(
                "{}: {why}; until it is mended the defaults count",
                path.display()
            )
        };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(wrong(&error)),
        };
        let policy: StorePolicy = toml::from_str(&text).map_err(|error| wrong(&error.message()))?;
        if !(1..=PERCENT_MAX).contains(&policy.background_percent) {
            return Err(wrong(&format_args!(
                "background_percent must be 1 to {PERCENT_MAX} (100: all of one processor)"
            )));
        }
        space_bytes(&policy.space, u64::MAX).map_err(|error| wrong(&error))?;
        Ok(policy)
    }

    /// The same with what is to be otherwise.
    #[must_use]
    pub fn with(mut self, change: PolicyChange) -> StorePolicy {
        for (value, new) in [
            (&mut self.keep, change.keep),
            (&mut self.immutable, change.immutable),
            (&mut self.points.every, change.points),
            (&mut self.space, change.space),
        ] {
            if let Some(new) = new {
                *value = new;
            }
        }
        self
    }
}

/// Brings what `new` says into `old`; what is not there and is as `default` says stays away.
fn merge(old: &mut Table, new: &Table, default: &Table) {
    let same = |one: &Value, other: &Value| {
        one.as_str() == other.as_str()
            && one.as_integer() == other.as_integer()
            && one.as_bool() == other.as_bool()
    };
    for (key, item) in new {
        match (old.get_mut(key), item) {
            (Some(Item::Table(old)), Item::Table(new)) => {
                let none = Table::new();
                let default = default.get(key).and_then(Item::as_table);
                merge(old, new, default.unwrap_or(&none));
            }
            (Some(Item::Value(old)), Item::Value(new)) => {
                if !same(old, new) {
                    let decor = old.decor().clone();
                    *old = new.clone();
                    *old.decor_mut() = decor;
                }
            }
            (Some(old), new) => *old = new.clone(),
            (None, Item::Table(new)) => {
                let mut table = Table::new();
                let none = Table::new();
                let default = default.get(key).and_then(Item::as_table);
                merge(&mut table, new, default.unwrap_or(&none));
                if !table.is_empty() {
                    old.insert(key, Item::Table(table));
                }
            }
            (None, new) => {
                let usual = default
                    .get(key)
                    .and_then(Item::as_value)
                    .zip(new.as_value());
                if !usual.is_some_and(|(usual, new)| same(usual, new)) {
                    old.insert(key, new.clone());
                }
            }
        }
    }
}

/// What of a policy is to be otherwise than it is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PolicyChange {
    /// Another ladder.
    pub keep: Option<String>,
    /// Another immutable window.
    pub immutable: Option<String>,
    /// Another schedule of recovery points.
    pub points: Option<String>,
    /// Another space.
    pub space: Option<String>,
}

/// Reads `500G`, `1.5T`, `90%`: in bytes, of a disk of `disk` bytes; None: no limit.
pub fn space_bytes(text: &str, disk: u64) -> Result<Option<u64>, String> {
    const UNITS: [(&str, u32); 4] = [("M", 20), ("G", 30), ("T", 40), ("P", 50)];
    let text = text.trim();
    if text.is_empty() {
        return Ok(None);
    }
    let wrong = || {
        format!(
            "`{text}` is not a space; write it like 500G, 1.5T (M, G, T, P: times 1024), or 90% of the store's disk"
        )
    };
    let positive = |number: &str| {
        let number = number.trim().parse::<f64>().ok();
        number.filter(|number| number.is_finite() && *number > 0.0)
    };
    if let Some(percent) = text.strip_suffix('%') {
        let percent = positive(percent).filter(|percent| *percent <= 100.0);
        return percent
            .map(|percent| Some((disk as f64 * percent / 100.0) as u64))
            .ok_or_else(wrong);
    }
    let short = text.strip_suffix("iB").unwrap_or(text);
    let unit = UNITS.iter().find(|(unit, _)| short.ends_with(unit));
    unit.and_then(|(unit, shift)| {
        let bytes = positive(short.strip_suffix(unit)?)? * (1u64 << shift) as f64;
        // No disk has more.
        (bytes < (1u64 << 62) as f64).then_some(Some(bytes as u64))
    })
    .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::{StorePolicy, space_bytes};

    #[test]
    fn space_is_read_in_bytes() {
        for (text, bytes) in [
            ("", None),
            ("64M", Some(64 << 20)),
            ("1.5T", Some(3 << 39)),
            ("2 GiB", Some(2 << 30)),
            ("50%", Some(500)),
            ("100 %", Some(1000)),
        ] {
            assert_eq!(space_bytes(text, 1000), Ok(bytes), "{text}");
        }
        for text in [
            "0G", "-1G", "5", "5k", "G", "%", "0%", "101%", "nanG", "infT", "1e400P", "99999P",
        ] {
            let said = space_bytes(text, 1000).unwrap_err();
            assert!(said.contains("500G"), "{text}: {said}");
        }
    }

    #[test]
    fn a_policy_has_defaults_and_refuses_what_it_does_not_know() {
        let path = std::env::temp_dir().join(format!("varve-policy-{}", std::process::id()));
        let load = |text: &str| {
            std::fs::write(&path, text).unwrap();
            StorePolicy::load(&path)
        };
        assert_eq!(load("").unwrap(), StorePolicy::default());
        let policy = load("compression = \"lz4\"").unwrap();
        assert_eq!(
            (policy.compression.as_str(), policy.background_percent),
            ("lz4", 50)
        );
        assert!(
            load("compresion = \"lz4\"")
                .unwrap_err()
                .contains("compresion")
        );
        assert!(load("background_percent = 0").is_err());
        assert!(load("space = \"5 apples\"").is_err());
        assert!(load("background_percent = 200").is_ok());
        assert!(load("background_percent = 1601").is_err());
        std::fs::remove_file(&path).unwrap();
        assert_eq!(StorePolicy::load(&path).unwrap(), StorePolicy::default());
    }

    #[test]
    fn who_could_not_read_the_file_cannot_read_the_new_one() {
        use std::os::unix::fs::PermissionsExt;
        let path = std::env::temp_dir().join(format!("varve-policy-mode-{}", std::process::id()));
        let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        let mut policy = StorePolicy::default();
        for (given, days) in [
            (None, 7),
            (Some(0o640), 8),
            (Some(0o644), 9),
            (Some(0o600), 10),
        ] {
            if let Some(given) = given {
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(given)).unwrap();
            }
            policy.keep = format!("all {days}d");
            policy.save(&path).unwrap();
            assert_eq!(mode(), given.unwrap_or(0o600));
            assert_eq!(StorePolicy::load(&path).unwrap(), policy);
        }
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn what_somebody_wrote_into_the_file_stays() {
        let old =
            "# Ours\nkeep = 'all 7d'   # as agreed\n\n[points]\n# each night\nevery = \"1d\"\n";
        let policy: StorePolicy = toml::from_str(old).unwrap();
        assert_eq!(policy.text(old).unwrap(), old);
        let other = StorePolicy {
            keep: "all 9d".to_owned(),
            space: "500G".to_owned(),
            ..policy.clone()
        };
        let text = other.text(old).unwrap();
        assert_eq!(toml::from_str::<StorePolicy>(&text).unwrap(), other);
        for kept in ["# Ours", "\"all 9d\"   # as agreed", "# each night"] {
            assert!(text.contains(kept), "{text}");
        }
        assert!(!text.contains("compression"), "{text}");
        // Of nothing, or of what is no such file.
        for old in ["", "key = [", "points = { every = '1h' }"] {
            let text = other.text(old).unwrap();
            assert_eq!(
                toml::from_str::<StorePolicy>(&text).unwrap(),
                other,
                "{text}"
            );
        }
    }
}
