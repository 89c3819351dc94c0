//! The repository over itself: what people forget.
#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use std::path::{Path, PathBuf};
use std::process::Command;

/// Files that may use `unsafe`, each with its reason at the top.
const UNSAFE: [&str; 7] = [
    "blkfilter/filter/src/freeze.rs",
    "blkfilter/filter/src/origin.rs",
    "blkfilter/front/src/device.rs",
    "blkfilter/front/src/loopback.rs",
    "blkfilter/front/src/ublk.rs",
    "engine/log/src/memory.rs",
    "engine/log/src/uring.rs",
];

/// Floors: a crate may use what stands to the left of it, and the crates of its own list.
const MAY_USE: [(&str, &[&str]); 12] = [
    ("engine/format", &[]),
    ("engine/log", &["varve-format"]),
    ("blkfilter/front", &["varve-format", "varve-log"]),
    ("blkfilter/control", &["varve-format"]),
    (
        "blkfilter/filter",
        &["varve-format", "varve-log", "varve-front", "varve-control"],
    ),
    ("engine/store", &["varve-format", "varve-log"]),
    (
        "engine/restore",
        &["varve-format", "varve-log", "varve-store"],
    ),
    (
        "engine/daemon",
        &[
            "varve-format",
            "varve-log",
            "varve-front",
            "varve-control",
            "varve-store",
            "varve-restore",
        ],
    ),
    ("tools/cli", &["varve-format", "varve-control"]),
    (
        "tools/varve",
        &["varve-format", "varve-control", "varve-cli"],
    ),
    ("hcp", &["varve-control", "varve-cli"]),
    (
        "tests",
        &[
            "varve-format",
            "varve-log",
            "varve-store",
            "varve-cli",
            "varve-front",
            "blkfilter",
        ],
    ),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

fn tracked(ending: &str) -> Vec<PathBuf> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "git does not list the files");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines()
        .filter(|line| line.ends_with(ending))
        .map(PathBuf::from)
        .filter(|path| root().join(path).exists())
        .collect()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

#[test]
fn every_source_file_says_what_it_is_and_is_one_idea() {
    let files = tracked(".rs");
    assert!(
        files.len() > 40,
        "only {} files were looked at",
        files.len()
    );
    for path in files {
        let text = read(&path);
        assert!(
            text.starts_with("//! "),
            "{}: no header that says what it is",
            path.display()
        );
        assert!(
            text.lines().count() <= 800,
            "{}: more than 800 lines",
            path.display()
        );
        let outside_tests = !path.starts_with("tests") && !path.ends_with("tests.rs");
        assert!(
            !outside_tests || !text.contains("use super::*"),
            "{}: use super::*",
            path.display()
        );
    }
}

#[test]
fn unsafe_stands_only_where_it_is_listed_and_argued() {
    for path in tracked(".rs") {
        let text = read(&path);
        let listed = UNSAFE.contains(&path.to_str().unwrap());
        assert_eq!(
            text.lines().any(|line| line == "#![expect(unsafe_code)]"),
            listed,
            "{}: the list of files with unsafe is out of date",
            path.display()
        );
        if listed {
            assert!(
                text.contains("\n// UNSAFETY: "),
                "{}: says not why it needs unsafe",
                path.display()
            );
            for (number, line) in text
                .lines()
                .enumerate()
                .filter(|(_, line)| line.contains("unsafe {"))
            {
                let argued = text
                    .lines()
                    .take(number + 1)
                    .skip(number.saturating_sub(4))
                    .any(|line| line.contains("SAFETY:"));
                assert!(
                    argued,
                    "{}:{}: {line}: no SAFETY argument",
                    path.display(),
                    number + 1
                );
            }
        }
    }
}

#[test]
fn no_crate_uses_a_higher_floor() {
    for (folder, allowed) in MAY_USE {
        let manifest = read(&Path::new(folder).join("Cargo.toml"));
        let dependencies = manifest.split("[dev-dependencies]").next().unwrap();
        for line in dependencies
            .lines()
            .filter(|line| line.starts_with("varve-") || line.starts_with("blkfilter"))
        {
            let name = line.split('.').next().unwrap();
            assert!(
                allowed.contains(&name),
                "{folder} uses {name}, which stands above it"
            );
        }
    }
}

#[test]
fn readme_names_only_targets_and_commands_that_exist() {
    let (readme, makefile) = (read(Path::new("README.md")), read(Path::new("Makefile")));
    for target in readme
        .split("`make ")
        .skip(1)
        .filter_map(|rest| rest.split(['`', ' ']).next())
    {
        assert!(
            makefile.contains(&format!("\n{target}:")),
            "README names `make {target}`"
        );
    }
    let commands = read(Path::new("tools/varve/src/main.rs")).to_lowercase();
    for command in readme
        .split("`varve ")
        .skip(1)
        .filter_map(|rest| rest.split(['`', ' ']).next())
    {
        assert!(
            commands.contains(&format!("    {command}")),
            "README names `varve {command}`"
        );
    }
}

#[test]
fn every_dependency_says_why_it_is_here() {
    let manifest = read(Path::new("Cargo.toml"));
    let section = manifest
        .split("[workspace.dependencies]")
        .nth(1)
        .unwrap()
        .split("\n[")
        .next()
        .unwrap();
    for line in section
        .lines()
        .filter(|line| line.contains('=') && !line.contains("path ="))
    {
        assert!(line.contains(" # "), "no reason: {line}");
    }
}
