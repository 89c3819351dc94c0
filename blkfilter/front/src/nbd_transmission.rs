//! The second half of an NBD connection: requests and their answers. Reads of what does not change are shared among threads, and answered in any order.
//!
//! Bytes from a client are hostile: every length is bounded before anything is allocated. A client that asks for much gets it piece by piece: no more than
//! [`AHEAD`] reads of [`SHARED_BYTES_MAX`] are under way for a connection, and one large one.

use crate::channel::JOB_BYTES_MAX;
use crate::nbd::Served;
use crate::{Errno, RequestKind};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
const REQUEST_BYTES: usize = 28;
const COMMAND_BLOCK_STATUS: u16 = 7;
const FLAG_REQUEST_ONE: u16 = 8;
const CHUNK_DONE: u16 = 1;
const CHUNK_OFFSET_DATA: u16 = 1;
const CHUNK_BLOCK_STATUS: u16 = 5;
const CHUNK_ERROR: u16 = 0x8001;

/// Largest request, in bytes.
pub(crate) const REQUEST_BYTES_MAX: u32 = 32 << 20;
/// Reads up to here are shared; longer ones are served by the connection's own thread.
const SHARED_BYTES_MAX: u32 = 1 << 20;
/// Threads of a connection that read for it.
const READERS: usize = 4;
/// Reads that are given to them, or wait for them.
const AHEAD: usize = 2 * READERS;
/// Up to here an answer is one write with its head.
const ONE_WRITE_BYTES: usize = 64 << 10;

/// Reads bytes from an offset, on any thread.
pub type ReadBytes = Arc<dyn Fn(u64, &mut [u8]) -> Result<(), Errno> + Send + Sync>;

struct ReadJob {
    cookie: u64,
    offset: u64,
    length: u32,
}

/// Where answers go, one at a time.
struct Replies {
    stream: Mutex<UnixStream>,
    /// Reads are answered in chunks.
    structured: bool,
}

/// Threads that read.
struct Readers {
    jobs: Sender<ReadJob>,
    threads: Vec<JoinHandle<()>>,
}

/// A connection behind its negotiation.
pub(crate) struct Transmission {
    requests: BufReader<UnixStream>,
    replies: Arc<Replies>,
    served: Served,
    /// Contexts that the client has chosen.
    selected: Vec<u32>,
    readers: Option<Readers>,
}

impl Replies {
    fn send(&self, head: &[u8], data: &[u8]) -> io::Result<()> {
        if data.len() <= ONE_WRITE_BYTES {
            return self.send_all(&[head, data].concat());
        }
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.write_all(head)?;
        stream.write_all(data)
    }

    /// Sends whole answers, made elsewhere.
    fn send_all(&self, answers: &[u8]) -> io::Result<()> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.write_all(answers)
    }

    fn failed(&self, cookie: u64, errno: Errno) -> io::Result<()> {
        let (errno, no_words) = ((errno as u32).to_be_bytes(), 0u16.to_be_bytes());
        let data = [&errno[..], &no_words].concat();
        self.chunk(cookie, CHUNK_DONE, CHUNK_ERROR, &[], &data)
    }

    /// A chunk whose content is `before` and `data`.
    fn chunk(
        &self,
        cookie: u64,
        flags: u16,
        kind: u16,
        before: &[u8],
        data: &[u8],
    ) -> io::Result<()> {
        let mut head = Vec::with_capacity(20 + before.len());
        head.extend(CHUNK_MAGIC.to_be_bytes());
        head.extend(flags.to_be_bytes());
        head.extend(kind.to_be_bytes());
        head.extend(cookie.to_be_bytes());
        head.extend(((before.len() + data.len()) as u32).to_be_bytes());
        head.extend(before);
        self.send(&head, data)
    }

    fn answer(&self, cookie: u64, result: Result<&[u8], Errno>) -> io::Result<()> {
        let (errno, data) = result.map_or_else(|errno| (errno as u32, &[][..]), |data| (0, data));
        let mut head = Vec::with_capacity(16);
        head.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
        head.extend(errno.to_be_bytes());
        head.extend(cookie.to_be_bytes());
        self.send(&head, data)
    }

    /// The answer to a read.
    fn bytes(&self, cookie: u64, offset: u64, result: Result<&[u8], Errno>) -> io::Result<()> {
        match result {
            _ if !self.structured => self.answer(cookie, result),
            Ok(data) => {
                let from = offset.to_be_bytes();
                self.chunk(cookie, CHUNK_DONE, CHUNK_OFFSET_DATA, &from, data)
            }
            Err(errno) => self.failed(cookie, errno),
        }
    }
}

impl Readers {
    fn new(read: &ReadBytes, replies: &Arc<Replies>) -> Readers {
        let (jobs, taken) = bounded(AHEAD - READERS);
        let thread = |_| {
            let (taken, read, replies) = (taken.clone(), Arc::clone(read), Arc::clone(replies));
            std::thread::spawn(move || serve_reads(&taken, &read, &replies))
        };
        let threads = (0..READERS).map(thread).collect();
        Readers { jobs, threads }
    }
}

/// Hangs up if its thread panics: a client that hears nothing would wait for ever.
struct HangUp<'a>(&'a Replies);

impl Drop for HangUp<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let stream = self.0.stream.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn serve_reads(jobs: &Receiver<ReadJob>, read: &ReadBytes, replies: &Replies) {
    let _hang_up = HangUp(replies);
    let mut buffer = Vec::new();
    for job in jobs {
        // Whoever hears nothing more hangs up.
        if serve_read(&job, &mut buffer, read, replies).is_err() {
            return;
        }
    }
}

fn serve_read(
    job: &ReadJob,
    buffer: &mut Vec<u8>,
    read: &ReadBytes,
    replies: &Replies,
) -> io::Result<()> {
    buffer.resize(job.length as usize, 0);
    let result = read(job.offset, buffer).map(|()| &buffer[..]);
    replies.bytes(job.cookie, job.offset, result)
}

fn be<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

impl Transmission {
    pub(crate) fn new(
        stream: UnixStream,
        served: Served,
        structured: bool,
        selected: Vec<u32>,
    ) -> io::Result<Transmission> {
        let replies = Replies {
            stream: Mutex::new(stream.try_clone()?),
            structured,
        };
        Ok(Transmission {
            requests: BufReader::new(stream),
            replies: Arc::new(replies),
            served,
            selected,
            readers: None,
        })
    }

    /// Until the client hangs up.
    pub(crate) fn run(mut self) -> io::Result<()> {
        let ended = self.serve_all();
        if let Some(readers) = self.readers.take() {
            drop(readers.jobs);
            for thread in readers.threads {
                let _ = thread.join();
            }
        }
        ended
    }

    fn serve_all(&mut self) -> io::Result<()> {
        let mut buffer = Vec::new();
        loop {
            let mut request = [0; REQUEST_BYTES];
            self.requests.read_exact(&mut request)?;
            if u32::from_be_bytes(be(&request, 0)) != REQUEST_MAGIC {
                return Ok(());
            }
            let flags = u16::from_be_bytes(be(&request, 4));
            let kind = u16::from_be_bytes(be(&request, 6));
            let cookie = u64::from_be_bytes(be(&request, 8));
            let offset = u64::from_be_bytes(be(&request, 16));
            let length = u32::from_be_bytes(be(&request, 24));
            let inside = offset
                .checked_add(length.into())
                .is_some_and(|end| end <= self.served.geometry.bytes);
            // The smallest block was told; a part of one is not served.
            let sector = u64::from(self.served.geometry.sector_bytes);
            let inside = inside && (offset | u64::from(length)).is_multiple_of(sector);
            if kind == COMMAND_BLOCK_STATUS {
                let one = flags & FLAG_REQUEST_ONE != 0;
                self.block_status(cookie, offset, length, inside, one)?;
                continue;
            }
            let command = match kind {
                0 => RequestKind::Read,
                1 => RequestKind::Write,
                2 => return Ok(()),
                3 => RequestKind::Flush,
                4 => RequestKind::Discard,
                6 => RequestKind::Zero,
                _ => {
                    self.replies.answer(cookie, Err(libc::EINVAL))?;
                    continue;
                }
            };
            if matches!(command, RequestKind::Read | RequestKind::Write)
                && length > REQUEST_BYTES_MAX
            {
                return Ok(()); // What follows cannot be told apart from requests any more.
            }
            if command == RequestKind::Read && inside {
                let job = ReadJob {
                    cookie,
                    offset,
                    length,
                };
                self.read(job, &mut buffer)?;
                continue;
            }
            let mut data = Vec::new();
            if command == RequestKind::Write {
                data = vec![0u8; length as usize];
                self.requests.read_exact(&mut data)?;
            }
            let result = if !inside {
                Err(libc::EINVAL)
            } else if self.served.geometry.read_only && command != RequestKind::Flush {
                Err(libc::EPERM)
            } else {
                self.serve(command, offset, length.into(), &data, flags & 1 != 0)
            };
            match (command, result) {
                (RequestKind::Read, Err(errno)) => {
                    self.replies.bytes(cookie, offset, Err(errno))?;
                }
                (_, result) => self.replies.answer(cookie, result.map(|_| &[][..]))?,
            }
        }
    }

    fn read(&mut self, job: ReadJob, buffer: &mut Vec<u8>) -> io::Result<()> {
        let Some(read) = &self.served.read else {
            let result = self.serve(RequestKind::Read, job.offset, job.length.into(), &[], false);
            let result = result
                .as_ref()
                .map(|bytes| &bytes[..])
                .map_err(|errno| *errno);
            return self.replies.bytes(job.cookie, job.offset, result);
        };
        // With nothing else to do it is done here, without waking anybody.
        let more = self.requests.buffer().len() >= REQUEST_BYTES;
        if !more || job.length > SHARED_BYTES_MAX {
            return serve_read(&job, buffer, read, &self.replies);
        }
        let readers = match self.readers.take() {
            Some(readers) => readers,
            None => Readers::new(read, &self.replies),
        };
        let given = readers.jobs.send(job);
        self.readers = Some(readers);
        given.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    /// What lies where, by each context that was chosen.
    fn block_status(
        &mut self,
        cookie: u64,
        offset: u64,
        length: u32,
        inside: bool,
        only_one: bool,
    ) -> io::Result<()> {
        if !inside || length == 0 || self.selected.is_empty() {
            return match self.replies.structured {
                true => self.replies.failed(cookie, libc::EINVAL),
                false => self.replies.answer(cookie, Err(libc::EINVAL)),
            };
        }
        let mut answers = Vec::new();
        for id in &self.selected {
            let context = &self.served.contexts[*id as usize];
            match context.extents(offset, length.into(), only_one) {
                Ok(extents) => {
                    let mut data = id.to_be_bytes().to_vec();
                    for (bytes, state) in extents {
                        data.extend(bytes.to_be_bytes());
                        data.extend(state.to_be_bytes());
                    }
                    answers.push(data);
                }
                Err(error) => {
                    let errno = error.raw_os_error().unwrap_or(libc::EIO);
                    return self.replies.failed(cookie, errno);
                }
            }
        }
        // Chunks of one answer stay together only by their cookie: others may come between.
        let last = answers.len() - 1;
        for (index, data) in answers.iter().enumerate() {
            let flags = if index == last { CHUNK_DONE } else { 0 };
            self.replies
                .chunk(cookie, flags, CHUNK_BLOCK_STATUS, &[], data)?;
        }
        Ok(())
    }

    fn serve(
        &self,
        kind: RequestKind,
        offset: u64,
        length: u64,
        data: &[u8],
        durable: bool,
    ) -> Result<Vec<u8>, Errno> {
        let jobs = &self.served.jobs;
        if !matches!(kind, RequestKind::Read | RequestKind::Write) {
            return jobs.call(kind, offset, length, Vec::new(), durable);
        }
        let mut read = Vec::new();
        let mut done = 0;
        while done < length {
            let part = (length - done).min(JOB_BYTES_MAX as u64);
            let slice = if kind == RequestKind::Write {
                data[done as usize..(done + part) as usize].to_vec()
            } else {
                Vec::new()
            };
            read.extend(jobs.call(kind, offset + done, part, slice, durable)?);
            done += part;
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::{READERS, REQUEST_MAGIC, ReadBytes, ReadJob, Readers, Replies, Transmission};
    use crate::nbd::Served;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::{Arc, Barrier, Mutex};
    use std::time::Duration;

    /// Readers for a client, who waits five seconds at most.
    fn readers(read: ReadBytes) -> (Readers, UnixStream) {
        let (client, server) = UnixStream::pair().unwrap();
        let limit = Some(Duration::from_secs(5));
        client.set_read_timeout(limit).unwrap();
        let replies = Arc::new(Replies {
            stream: Mutex::new(server),
            structured: false,
        });
        (Readers::new(&read, &replies), client)
    }

    fn job(cookie: u64) -> ReadJob {
        ReadJob {
            cookie,
            offset: 0,
            length: 512,
        }
    }

    #[test]
    fn reads_are_served_at_the_same_time() {
        let all_at_once = Barrier::new(READERS);
        let (readers, mut client) = readers(Arc::new(move |_, _| {
            all_at_once.wait();
            Ok(())
        }));
        (0..READERS as u64).for_each(|cookie| readers.jobs.send(job(cookie)).unwrap());
        client
            .read_exact(&mut vec![0; READERS * (16 + 512)])
            .unwrap();
    }

    /// What lies at the beginning of a sector is not the answer to who asks for its middle.
    #[test]
    fn a_part_of_a_sector_is_refused() {
        let (mut client, server) = UnixStream::pair().unwrap();
        let (jobs, _taken) = crate::channel::jobs(&crate::Waker::new().unwrap());
        let served = Served {
            geometry: crate::Geometry {
                bytes: 1 << 20,
                sector_bytes: 512,
                physical_bytes: 4096,
                discard_granularity: 0,
                read_only: true,
            },
            jobs,
            read: Some(Arc::new(|_, _| Ok(()))),
            contexts: Arc::default(),
        };
        let transmission = Transmission::new(server, served, false, Vec::new()).unwrap();
        let thread = std::thread::spawn(move || transmission.run());
        let mut ask = |offset: u64, length: u32| {
            let head = [&REQUEST_MAGIC.to_be_bytes()[..], &[0; 4], &[0; 8]].concat();
            let place = [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat();
            std::io::Write::write_all(&mut client, &[head, place].concat()).unwrap();
            let mut reply = [0; 16];
            client.read_exact(&mut reply).unwrap();
            let errno = u32::from_be_bytes(reply[4..8].try_into().unwrap());
            if errno == 0 {
                client.read_exact(&mut vec![0; length as usize]).unwrap();
            }
            errno
        };
        assert_eq!(ask(512, 1024), 0);
        for (offset, length) in [(100, 50), (100, 512), (512, 100), (512, 511)] {
            assert_eq!(
                ask(offset, length),
                libc::EINVAL as u32,
                "{offset} {length}"
            );
        }
        assert_eq!(ask(0, 4096), 0);
        drop(client);
        thread.join().unwrap().unwrap_err();
    }

    #[test]
    fn a_reader_that_panics_hangs_up() {
        let (readers, mut client) = readers(Arc::new(|_, _| panic!("a fault of ours")));
        readers.jobs.send(job(1)).unwrap();
        assert_eq!(client.read(&mut [0; 16]).unwrap(), 0, "the connection ends");
    }
}
