//! The real files behind a volume: origin, log ring, state file, surviving memory. Opening them claims them.
//!
//! The origin is opened O_EXCL (a block device) or locked (a file). Both claims end only when the last reference is gone, and a dead daemon's
//! operations in flight hold such references: so whoever gets the claim knows that no old write can still land.

// UNSAFETY: three ioctls that read a block device's shape.
#![expect(unsafe_code)]

use nix::fcntl::{FallocateFlags, OFlag};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};
use varve_format::{Fingerprint, Hash128};
use varve_front::Geometry;

// linux/fs.h: BLKGETSIZE64, BLKSSZGET, BLKPBSZGET.
mod ioctl {
    nix::ioctl_read!(block_bytes, 0x12, 114, u64);
    nix::ioctl_read_bad!(sector_bytes, nix::request_code_none!(0x12, 104), i32);
    nix::ioctl_read_bad!(physical_bytes, nix::request_code_none!(0x12, 123), u32);
}

/// How long a claim is waited for when a dead daemon may still have operations in flight.
const CLAIM_WAIT: Duration = Duration::from_secs(20);

/// Opens and claims an origin. Busy means: mounted, in use, or another daemon's.
pub fn claim_origin(path: &Path, wait: bool) -> io::Result<File> {
    while_busy(wait, || try_claim(path))
}

/// A dead daemon's claims end only with its last operation in flight.
fn while_busy(wait: bool, claim: impl Fn() -> io::Result<File>) -> io::Result<File> {
    let start = Instant::now();
    loop {
        match claim() {
            Err(error)
                if wait
                    && error.raw_os_error() == Some(libc::EBUSY)
                    && start.elapsed() < CLAIM_WAIT =>
            {
                std::thread::sleep(Duration::from_millis(2));
            }
            result => return result,
        }
    }
}

fn try_claim(path: &Path) -> io::Result<File> {
    let is_block = std::fs::metadata(path)?.file_type().is_block_device();
    let exclusive = if is_block { libc::O_EXCL } else { 0 };
    let file = open_direct(path, exclusive)?;
    if is_block { Ok(file) } else { lock(file) }
}

fn open_direct(path: &Path, flags: i32) -> io::Result<File> {
    open_past_cache(OpenOptions::new().read(true).write(true), path, flags)
}

/// Opens something for reading past the page cache, without a claim.
pub(crate) fn open_for_reading(path: &Path) -> io::Result<File> {
    open_past_cache(OpenOptions::new().read(true), path, 0)
}

fn open_past_cache(options: &mut OpenOptions, path: &Path, flags: i32) -> io::Result<File> {
    let mut open = |direct: i32| {
        options
            .custom_flags(flags | direct | libc::O_CLOEXEC)
            .open(path)
    };
    match open(libc::O_DIRECT) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => open(0), // A file system without direct I/O (tmpfs).
        result => result,
    }
}

/// The lock belongs to the open file and ends with its last reference.
fn lock(file: File) -> io::Result<File> {
    file.try_lock()
        .map_err(|_| io::Error::from_raw_os_error(libc::EBUSY))?;
    Ok(file)
}

/// The shape of a device or file.
pub fn geometry(file: &File) -> io::Result<Geometry> {
    let metadata = file.metadata()?;
    if !metadata.file_type().is_block_device() {
        let bytes = metadata.len() / 512 * 512;
        return Ok(Geometry {
            bytes,
            sector_bytes: 512,
            physical_bytes: 4096,
            discard_granularity: 4096,
            read_only: false,
        });
    }
    let (mut bytes, mut sector, mut physical) = (0u64, 0i32, 0u32);
    // SAFETY: each ioctl writes one integer of the type given; the descriptor is a live block device.
    unsafe {
        ioctl::block_bytes(file.as_raw_fd(), &raw mut bytes)?;
        ioctl::sector_bytes(file.as_raw_fd(), &raw mut sector)?;
        ioctl::physical_bytes(file.as_raw_fd(), &raw mut physical)?;
    }
    let discard = sysfs(&metadata, "queue/discard_granularity")
        .or_else(|| sysfs(&metadata, "../queue/discard_granularity"));
    let discard_granularity = discard
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0);
    Ok(Geometry {
        bytes,
        sector_bytes: sector as u32,
        physical_bytes: physical,
        discard_granularity,
        read_only: false,
    })
}

fn sysfs(metadata: &std::fs::Metadata, name: &str) -> Option<String> {
    std::fs::read_to_string(varve_control::sysfs(metadata.rdev()).join(name)).ok()
}

/// This boot.
#[must_use]
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// The kernel's count of writes to the device, and this boot; of a file the time of its last write.
#[must_use]
pub fn kernel_counters(file: &File) -> Fingerprint {
    let boot = Hash128::of(boot_id().as_bytes()).0;
    let Ok(metadata) = file.metadata() else {
        return Fingerprint {
            boot,
            ..Fingerprint::default()
        };
    };
    if metadata.is_file() {
        // A file tells when it was written last, over reboots, too.
        let nanoseconds = metadata.mtime() * 1_000_000_000 + metadata.mtime_nsec();
        return Fingerprint {
            kernel_writes: nanoseconds as u64,
            ..Fingerprint::default()
        };
    }
    // Fields of /sys/block/*/stat: writes are the fifth, discards the twelfth.
    let stat = sysfs(&metadata, "stat").unwrap_or_default();
    let field = |index: usize| {
        stat.split_whitespace()
            .nth(index)
            .and_then(|text| text.parse::<u64>().ok())
            .unwrap_or(0)
    };
    Fingerprint {
        kernel_writes: field(4) + field(11),
        boot,
        ..Fingerprint::default()
    }
}

/// A device's or file's identity while this boot lasts.
pub fn identity(file: &File) -> io::Result<String> {
    let metadata = file.metadata()?;
    Ok(if metadata.file_type().is_block_device() {
        format!("block {}", metadata.rdev())
    } else {
        format!("file {} {}", metadata.dev(), metadata.ino())
    })
}

/// Opens a log ring, making and zero-filling it if it is not there: flushes are then flushes of data alone.
/// `wait`: a dead daemon may still have writes to it in flight.
pub fn open_log(path: &Path, bytes: u64, wait: bool) -> io::Result<File> {
    if !path.exists() {
        make_filled(path, bytes)?;
    }
    while_busy(wait, || claim_log(path, bytes))
}

fn claim_log(path: &Path, bytes: u64) -> io::Result<File> {
    let is_block = std::fs::metadata(path)?.file_type().is_block_device();
    let file = open_direct(path, if is_block { libc::O_EXCL } else { 0 })?;
    let metadata = file.metadata()?;
    let found = io::Seek::seek(&mut &file, io::SeekFrom::End(0))?;
    if found < bytes {
        return Err(io::Error::other(format!(
            "it has {found} bytes, {bytes} are needed: too small (--log-size chooses another size), or truncated"
        )));
    }
    if metadata.file_type().is_block_device() {
        return Ok(file);
    }
    lock(file)
}

/// Takes away what a volume kept at a place: a file goes, the used part of a device becomes zero.
pub fn wipe(path: &Path, bytes: u64) -> io::Result<()> {
    use nix::fcntl::{FallocateFlags, fallocate};
    if path.is_file() {
        return std::fs::remove_file(path);
    }
    let device = OpenOptions::new().write(true).open(path)?;
    let flags = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&device, flags, 0, bytes as i64)?;
    device.sync_all()
}

/// Refuses a place that holds somebody's data: a file that is not all zero, a device whose first or last MiB is not.
pub fn refuse_data(path: &Path) -> io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    const AREA: u64 = 1 << 20;
    let Ok(mut file) = File::open(path) else {
        return Ok(()); // Not there yet, or not for us: opening it says so.
    };
    let bytes = file.seek(SeekFrom::End(0))?;
    let is_device = file.metadata()?.file_type().is_block_device();
    let mut area = vec![0u8; AREA as usize];
    let mut at = 0;
    while at < bytes {
        let part = (bytes - at).min(AREA) as usize;
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(&mut area[..part])?;
        if area[..part].iter().any(|byte| *byte != 0) {
            return Err(io::Error::other(
                "it holds data already, which was not touched. Choose another place; if the data is not needed, remove it first (a file: rm; a device: wipefs -a, blkdiscard)",
            ));
        }
        let last = bytes.saturating_sub(AREA);
        at = if is_device && at < last {
            last
        } else {
            at + AREA
        };
    }
    Ok(())
}

/// Makes a file of zeroes: complete under its name, or not at all.
fn make_filled(path: &Path, bytes: u64) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".varve-new");
    let new = path.with_file_name(name);
    fill(&new, bytes)
        .and_then(|()| std::fs::rename(&new, path))
        .inspect_err(|_| {
            let _ = std::fs::remove_file(&new);
        })?;
    path.parent()
        .map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}

fn fill(new: &Path, bytes: u64) -> io::Result<()> {
    use std::io::Write;
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(new)?;
    let zeroes = vec![0u8; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        let part = left.min(zeroes.len() as u64) as usize;
        file.write_all(&zeroes[..part])?;
        left -= part as u64;
    }
    file.sync_all()
}

/// Opens a state file, making it if it is not there.
pub fn open_state(path: &Path) -> io::Result<File> {
    if !path.exists() {
        make_filled(
            path,
            (varve_format::STATE_SLOTS * varve_format::STATE_SLOT_BYTES) as u64,
        )?;
    }
    open_direct(path, 0)
}

/// Opens surviving memory: a file on a file system that lives in RAM, with its blocks allocated.
pub fn open_memory(path: &Path, bytes: usize) -> io::Result<File> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlag::O_CLOEXEC.bits())
        .open(path)?;
    if file.metadata()?.len() != bytes as u64 {
        file.set_len(0)?;
        file.set_len(bytes as u64)?;
    }
    nix::fcntl::fallocate(&file, FallocateFlags::empty(), 0, bytes as i64)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::open_log;
    use std::time::Duration;

    #[test]
    fn a_log_that_a_dying_daemon_still_holds_is_waited_for() {
        let path = std::env::temp_dir().join(format!("varve-claim-{}", std::process::id()));
        let held = open_log(&path, 1 << 20, false).unwrap();
        let refused = open_log(&path, 1 << 20, false).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EBUSY));
        let holder = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            drop(held);
        });
        open_log(&path, 1 << 20, true).unwrap();
        holder.join().unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}
