//! The front end for requests that come from other threads of this process: FUSE's, NBD's, a rewind's, a test's.

use crate::device::{Device, DeviceFactory, Stopper, Waker};
use crate::loopback::{arm_bell, dispatch, drop_ring, make_ring, wait_own};
use crate::{Errno, Request, RequestKind};
use crossbeam_channel::{Receiver, Sender, bounded};
use varve_log::Buffer;

/// What a job gives back: the bytes read, or nothing, or an error.
pub type JobResult = Result<Vec<u8>, Errno>;

/// A request from another thread.
pub struct Job {
    /// What it asks for.
    pub kind: RequestKind,
    /// First byte.
    pub offset: u64,
    /// Length in bytes, at most [`JOB_BYTES_MAX`] for reads and writes.
    pub length: u64,
    /// What to write.
    pub data: Vec<u8>,
    /// Answer only once durable.
    pub force_unit_access: bool,
    /// Called on the device's thread with the result.
    pub reply: Box<dyn FnOnce(JobResult) + Send>,
}

/// Most bytes of one job.
pub const JOB_BYTES_MAX: usize = 256 << 10;
/// Jobs in flight.
const DEPTH: usize = 64;

/// The sending side.
#[derive(Clone)]
pub struct JobSender {
    sender: Sender<Job>,
    waker: Waker,
}

impl JobSender {
    /// Sends a job; its reply is called later. If the device is gone, at once, with EIO.
    pub fn send(&self, job: Job) {
        match self.sender.send(job) {
            Ok(()) => self.waker.wake(),
            Err(error) => (error.0.reply)(Err(libc::EIO)),
        }
    }

    /// Sends a job and waits for its end.
    pub fn call(
        &self,
        kind: RequestKind,
        offset: u64,
        length: u64,
        data: Vec<u8>,
        force_unit_access: bool,
    ) -> JobResult {
        let (done, result) = bounded(1);
        let reply = Box::new(move |outcome| {
            let _ = done.send(outcome);
        });
        self.send(Job {
            kind,
            offset,
            length,
            data,
            force_unit_access,
            reply,
        });
        result.recv().unwrap_or(Err(libc::EIO))
    }
}

/// A channel to a device that [`serve`] will drive.
#[must_use]
pub fn jobs(waker: &Waker) -> (JobSender, Receiver<Job>) {
    let (sender, receiver) = bounded(DEPTH * 2);
    (
        JobSender {
            sender,
            waker: waker.clone(),
        },
        receiver,
    )
}

/// Drives a device with jobs until `stopper` says stop. Runs on the calling thread.
pub fn serve(
    jobs: &Receiver<Job>,
    factory: DeviceFactory,
    waker: &Waker,
    stopper: &Stopper,
) -> std::io::Result<()> {
    let port = make_ring(1024)?;
    let mut device = factory(port.clone());
    let buffers = (0..DEPTH)
        .map(|_| Buffer::anonymous(JOB_BYTES_MAX))
        .collect::<std::io::Result<Vec<_>>>()?;
    let mut running: Vec<Option<Job>> = (0..DEPTH).map(|_| None).collect();
    let mut free: Vec<usize> = (0..DEPTH).rev().collect();
    let mut taken = Vec::with_capacity(1024);
    arm_bell(&port, waker);
    loop {
        while let Some(tag) = free.pop() {
            let Ok(job) = jobs.try_recv() else {
                free.push(tag);
                break;
            };
            running[tag] = admit(device.as_mut(), tag, job, &buffers[tag]);
            if running[tag].is_none() {
                free.push(tag);
            }
        }
        device.run();
        while let Some(answer) = device.take_answer() {
            let tag = answer.tag as usize;
            let Some(job) = running[tag].take() else {
                continue;
            };
            let bytes = if job.kind == RequestKind::Read && answer.result.is_ok() {
                buffers[tag]
                    .slice(0, job.length as usize)
                    .read_with(<[u8]>::to_vec)
            } else {
                Vec::new()
            };
            (job.reply)(answer.result.map(|()| bytes));
            free.push(tag);
        }
        if stopper.is_stopping() && free.len() == DEPTH && jobs.is_empty() && device.is_quiet() {
            break;
        }
        if !free.is_empty() && !jobs.is_empty() {
            continue;
        }
        wait_own(device.end_turn().1, &mut taken)?;
        for (user_data, result) in taken.drain(..) {
            dispatch(device.as_mut(), &port, waker, user_data, result);
        }
    }
    device.closed();
    drop(device);
    drop_ring();
    Ok(())
}

fn admit(device: &mut dyn Device, tag: usize, job: Job, buffer: &Buffer) -> Option<Job> {
    let has_bytes = matches!(job.kind, RequestKind::Read | RequestKind::Write);
    if has_bytes
        && (job.length as usize > JOB_BYTES_MAX
            || (job.kind == RequestKind::Write && job.data.len() as u64 != job.length))
    {
        (job.reply)(Err(libc::EINVAL));
        return None;
    }
    let buffer = has_bytes.then(|| buffer.slice(0, job.length as usize));
    if let (Some(buffer), RequestKind::Write) = (&buffer, job.kind) {
        buffer.write_with(|bytes| bytes.copy_from_slice(&job.data));
    }
    device.submit(Request {
        tag: tag as u32,
        kind: job.kind,
        offset: job.offset,
        length: job.length,
        force_unit_access: job.force_unit_access,
        buffer,
    });
    Some(job)
}
