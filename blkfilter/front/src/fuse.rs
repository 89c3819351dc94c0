//! The fallback where the kernel has no ublk: a FUSE file system with one file, and a loop device on it with direct I/O.
//!
//! Limits, stated: when the daemon dies the loop device answers with I/O errors until it is set up again; never use it for swap, for the root
//! file system or under our own store. FSYNC is never answered with ENOSYS: one such answer would make every later flush a silent success.

use crate::channel::{self, JOB_BYTES_MAX, Job, JobSender};
use crate::device::{DeviceFactory, Stopper, Waker};
use crate::{Geometry, RequestKind};
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request as FuseRequest, Session, SessionACL, WriteFlags,
};
use nix::mount::{MntFlags, umount2};
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

const DISK: INodeNo = INodeNo(2);
const NAME: &str = "disk";
const FOREVER: Duration = Duration::from_secs(1 << 30);

struct OneFile {
    jobs: JobSender,
    geometry: Geometry,
}

impl OneFile {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let directory = inode == INodeNo::ROOT;
        let epoch = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino: inode,
            size: if directory { 0 } else { self.geometry.bytes },
            blocks: self.geometry.bytes / 512,
            atime: epoch,
            mtime: epoch,
            ctime: epoch,
            crtime: epoch,
            kind: if directory {
                FileType::Directory
            } else {
                FileType::RegularFile
            },
            perm: if directory { 0o700 } else { 0o600 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    fn send(
        &self,
        kind: RequestKind,
        offset: u64,
        length: u64,
        data: Vec<u8>,
        reply: impl FnOnce(channel::JobResult) + Send + 'static,
    ) {
        self.jobs.send(Job {
            kind,
            offset,
            length,
            data,
            force_unit_access: false,
            reply: Box::new(reply),
        });
    }
}

impl Filesystem for OneFile {
    fn init(&mut self, _request: &FuseRequest, config: &mut KernelConfig) -> io::Result<()> {
        let _ = config.set_max_write(JOB_BYTES_MAX as u32);
        let _ = config.set_max_readahead(JOB_BYTES_MAX as u32);
        let _ = config.set_max_background(128);
        let _ = config.set_congestion_threshold(96);
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO | InitFlags::FUSE_ASYNC_READ);
        Ok(())
    }

    fn lookup(&self, _request: &FuseRequest, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == INodeNo::ROOT && name == OsStr::new(NAME) {
            reply.entry(&FOREVER, &self.attributes(DISK), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(
        &self,
        _request: &FuseRequest,
        inode: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        reply.attr(&FOREVER, &self.attributes(inode));
    }

    fn open(&self, _request: &FuseRequest, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if inode == DISK {
            reply.opened(
                FileHandle(0),
                FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
            );
        } else {
            reply.error(Errno::EISDIR);
        }
    }

    fn read(
        &self,
        _request: &FuseRequest,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let length = u64::from(size).min(self.geometry.bytes.saturating_sub(offset));
        if length == 0 {
            reply.data(&[]);
            return;
        }
        self.send(
            RequestKind::Read,
            offset,
            length,
            Vec::new(),
            move |result| match result {
                Ok(bytes) => reply.data(&bytes),
                Err(errno) => reply.error(Errno::from_i32(errno)),
            },
        );
    }

    fn write(
        &self,
        _request: &FuseRequest,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if self.geometry.read_only {
            reply.error(Errno::EROFS);
            return;
        }
        let length = data.len() as u64;
        self.send(
            RequestKind::Write,
            offset,
            length,
            data.to_vec(),
            move |result| match result {
                Ok(_) => reply.written(length as u32),
                Err(errno) => reply.error(Errno::from_i32(errno)),
            },
        );
    }

    fn flush(
        &self,
        _request: &FuseRequest,
        _inode: INodeNo,
        _handle: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok(); // A close, not a cache flush.
    }

    fn fsync(
        &self,
        _request: &FuseRequest,
        _inode: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.send(RequestKind::Flush, 0, 0, Vec::new(), move |result| {
            answer(reply, result)
        });
    }

    fn fallocate(
        &self,
        _request: &FuseRequest,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        // The loop driver also uses holes for write-zeroes, and reads of a hole in a file give zeroes: exact, not undefined.
        if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) == 0 {
            reply.error(Errno::EOPNOTSUPP);
            return;
        }
        let end = offset.saturating_add(length).min(self.geometry.bytes);
        let jobs = self.jobs.clone();
        // Long and rare: in parts, on a thread of its own.
        std::thread::spawn(move || {
            let parts = (offset..end).step_by(crate::RANGE_BYTES_MAX as usize);
            let outcome = parts.into_iter().try_for_each(|at| {
                let part = (end - at).min(crate::RANGE_BYTES_MAX);
                jobs.call(RequestKind::Zero, at, part, Vec::new(), false)
                    .map(|_| ())
            });
            answer(reply, outcome.map(|()| Vec::new()));
        });
    }
}

fn answer(reply: ReplyEmpty, result: channel::JobResult) {
    match result {
        Ok(_) => reply.ok(),
        Err(errno) => reply.error(Errno::from_i32(errno)),
    }
}

/// Shows the device as a loop device and drives it until `stopper` says stop. `directory` is made for the mount point. `started` is called with
/// the path of the block device. Runs on the calling thread and some more.
pub fn serve(
    directory: &Path,
    geometry: Geometry,
    factory: DeviceFactory,
    waker: &Waker,
    stopper: &Stopper,
    started: impl FnOnce(&str) + Send + 'static,
) -> io::Result<()> {
    clear_dead(directory);
    std::fs::create_dir_all(directory)?;
    let (jobs, receiver) = channel::jobs(waker);
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("varve".to_owned()),
        MountOption::Subtype("varve".to_owned()),
    ];
    config.acl = SessionACL::Owner;
    config.n_threads = Some(2);
    let mount_point = directory.to_path_buf();
    let filesystem = OneFile { jobs, geometry };
    let shown = stopper.clone();
    // Attaching the loop device reads through us, so it happens beside the thread that serves.
    let shower = std::thread::spawn(move || -> io::Result<()> {
        let session = Session::new(filesystem, &mount_point, &config)?.spawn()?;
        let outcome = attach(&mount_point.join(NAME), &geometry);
        let device = match outcome {
            Ok(device) => device,
            Err(error) => {
                shown.stop();
                let _ = session.umount_and_join();
                return Err(error);
            }
        };
        started(&device);
        while !shown.is_stopping() {
            std::thread::sleep(Duration::from_millis(20));
        }
        detach(&device)?;
        session.umount_and_join()
    });
    // The device's thread must go on until the loop device is gone: stop it only then.
    let serving = Stopper::new(waker);
    let (until, waits) = (serving.clone(), stopper.clone());
    let ender = std::thread::spawn(move || {
        let result = shower
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the FUSE thread panicked")));
        waits.stop();
        until.stop();
        result
    });
    channel::serve(&receiver, factory, waker, &serving)?;
    ender
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the FUSE thread panicked")))
}

/// Takes away what a daemon that died has left of a device that it showed in `directory`: a mount of which nothing can be asked any more, and its loop device,
/// which ends when nobody uses it any more. What is served stays.
pub fn clear_dead(directory: &Path) {
    let is_dead = || {
        let asked = std::fs::metadata(directory);
        asked.is_err_and(|error| error.raw_os_error() == Some(libc::ENOTCONN))
    };
    if !is_dead() {
        return;
    }
    let loops = std::fs::read_dir("/sys/block")
        .into_iter()
        .flatten()
        .flatten();
    for entry in loops {
        let backing = std::fs::read_to_string(entry.path().join("loop/backing_file"));
        if backing.is_ok_and(|backing| Path::new(backing.trim_end()) == directory.join(NAME)) {
            let device = Path::new("/dev").join(entry.file_name());
            let _ = Command::new("losetup").arg("--detach").arg(device).output();
        }
    }
    while is_dead() && umount2(directory, MntFlags::MNT_DETACH).is_ok() {}
}

fn attach(file: &Path, geometry: &Geometry) -> io::Result<String> {
    let mut command = Command::new("losetup");
    command
        .args(["--find", "--show", "--direct-io=on", "--partscan"])
        .arg(format!("--sector-size={}", geometry.sector_bytes));
    if geometry.read_only {
        command.arg("--read-only");
    }
    let output = command.arg(file).output()?;
    if !output.status.success() {
        return Err(io::Error::other(format!(
            "losetup: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn detach(device: &str) -> io::Result<()> {
    let output = Command::new("losetup")
        .args(["--detach", device])
        .output()?;
    if !output.status.success() {
        return Err(io::Error::other(format!(
            "losetup: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )));
    }
    // Detaching is lazy while somebody holds the device; wait for the last close.
    let backing = PathBuf::from(format!(
        "/sys/block/{}/loop/backing_file",
        device.trim_start_matches("/dev/")
    ));
    for _ in 0..500 {
        if !backing.exists() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Err(io::Error::other(format!("{device} is still in use")))
}
