//! The NBD front end: one export over a Unix socket, newstyle negotiation with fixed flags (the NBD protocol document). Never TCP. What follows the
//! negotiation is in `nbd_transmission`.
//!
//! Bytes from a client are hostile: every length is bounded before anything is allocated, and an unknown option or command gets the protocol's own error.

use crate::Geometry;
use crate::channel::JobSender;
use crate::device::Stopper;
use crate::nbd_context::{MetaContext, named};
use crate::nbd_transmission::{REQUEST_BYTES_MAX, ReadBytes, Transmission};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

const MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

const FLAG_FIXED_NEWSTYLE: u16 = 1;
const FLAG_NO_ZEROES: u16 = 2;
const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_LIST: u32 = 3;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_LIST_META_CONTEXT: u32 = 9;
const OPT_SET_META_CONTEXT: u32 = 10;
const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
const REP_ERR_UNSUP: u32 = 0x8000_0001;
const REP_ERR_INVALID: u32 = 0x8000_0003;
const REP_ERR_TOO_BIG: u32 = 0x8000_0009;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const TRANSMIT_HAS_FLAGS: u16 = 1;
const TRANSMIT_READ_ONLY: u16 = 2;
const TRANSMIT_FLUSH: u16 = 4;
const TRANSMIT_FUA: u16 = 8;
const TRANSMIT_TRIM: u16 = 32;
const TRANSMIT_ZEROES: u16 = 64;
const TRANSMIT_MULTI_CONN: u16 = 256;

const OPTION_BYTES_MAX: u32 = 64 << 10;

/// What is served.
#[derive(Clone)]
pub struct Served {
    /// Its shape.
    pub geometry: Geometry,
    /// Who does what is asked for, one thing after the other.
    pub jobs: JobSender,
    /// Who reads, several things at once; if not `jobs`.
    pub read: Option<ReadBytes>,
    /// What is told of it.
    pub contexts: Arc<Vec<MetaContext>>,
}

/// Serves it on `socket` from threads of its own until `stopper` says stop.
pub fn listen(socket: &Path, served: Served, stopper: &Stopper) -> io::Result<()> {
    // A socket that a dead server left; anything else is somebody's.
    if std::fs::symlink_metadata(socket).is_ok_and(|found| found.file_type().is_socket()) {
        // One that was told to end does so in a moment.
        let mut tries = 0;
        while UnixStream::connect(socket).is_ok() && tries < 20 {
            std::thread::sleep(Duration::from_millis(25));
            tries += 1;
        }
        if tries == 20 {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another server answers there",
            ));
        }
        let _ = std::fs::remove_file(socket);
    }
    let listener = UnixListener::bind(socket)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    let (stopper, path) = (stopper.clone(), socket.to_path_buf());
    std::thread::spawn(move || {
        let mut open: Vec<(Arc<UnixStream>, JoinHandle<()>)> = Vec::new();
        while !stopper.is_stopping() {
            match listener.accept() {
                Ok((stream, _)) => {
                    open.retain(|connection| !connection.1.is_finished());
                    let Ok(ours) = stream.try_clone().map(Arc::new) else {
                        continue;
                    };
                    let theirs = Arc::clone(&ours);
                    let served = served.clone();
                    let thread = std::thread::spawn(move || {
                        let _ = stream.set_nonblocking(false);
                        let _ = Connection {
                            stream,
                            served,
                            structured: false,
                            selected: Vec::new(),
                        }
                        .run();
                        // We hold it, too: the client is to see its end all the same.
                        let _ = theirs.shutdown(Shutdown::Both);
                    });
                    open.push((ours, thread));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
        let _ = std::fs::remove_file(&path);
        // A client that stays would keep the image.
        for (stream, _) in &open {
            let _ = stream.shutdown(Shutdown::Both);
        }
    });
    Ok(())
}

struct Connection {
    stream: UnixStream,
    served: Served,
    /// Reads are answered in chunks.
    structured: bool,
    /// Contexts that the client has chosen.
    selected: Vec<u32>,
}

impl Connection {
    fn u32(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.stream.read_exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn u64(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.stream.read_exact(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }

    fn run(mut self) -> io::Result<()> {
        let mut hello = Vec::new();
        hello.extend(MAGIC.to_be_bytes());
        hello.extend(OPTION_MAGIC.to_be_bytes());
        hello.extend((FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
        self.stream.write_all(&hello)?;
        let client = self.u32()?;
        if self.negotiate(client & u32::from(FLAG_NO_ZEROES) != 0)? {
            Transmission::new(self.stream, self.served, self.structured, self.selected)?.run()?;
        }
        Ok(())
    }

    fn transmission_flags(&self) -> u16 {
        let flags = TRANSMIT_HAS_FLAGS | TRANSMIT_FLUSH | TRANSMIT_MULTI_CONN;
        if self.served.geometry.read_only {
            flags | TRANSMIT_READ_ONLY
        } else {
            flags | TRANSMIT_FUA | TRANSMIT_TRIM | TRANSMIT_ZEROES
        }
    }

    /// True: transmission begins.
    fn negotiate(&mut self, no_zeroes: bool) -> io::Result<bool> {
        loop {
            if self.u64()? != OPTION_MAGIC {
                return Ok(false);
            }
            let option = self.u32()?;
            let length = self.u32()?;
            if length > OPTION_BYTES_MAX {
                self.reply(option, REP_ERR_TOO_BIG, &[])?;
                return Ok(false);
            }
            let mut data = vec![0u8; length as usize];
            self.stream.read_exact(&mut data)?;
            match option {
                OPT_EXPORT_NAME => {
                    let mut answer = Vec::new();
                    answer.extend(self.served.geometry.bytes.to_be_bytes());
                    answer.extend(self.transmission_flags().to_be_bytes());
                    if !no_zeroes {
                        answer.extend([0u8; 124]);
                    }
                    self.stream.write_all(&answer)?;
                    return Ok(true);
                }
                OPT_ABORT => {
                    self.reply(option, REP_ACK, &[])?;
                    return Ok(false);
                }
                OPT_LIST => {
                    self.reply(option, REP_SERVER, &0u32.to_be_bytes())?;
                    self.reply(option, REP_ACK, &[])?;
                }
                OPT_INFO | OPT_GO => {
                    let mut info = Vec::new();
                    info.extend(INFO_EXPORT.to_be_bytes());
                    info.extend(self.served.geometry.bytes.to_be_bytes());
                    info.extend(self.transmission_flags().to_be_bytes());
                    self.reply(option, REP_INFO, &info)?;
                    let mut sizes = Vec::new();
                    sizes.extend(INFO_BLOCK_SIZE.to_be_bytes());
                    for size in [self.served.geometry.sector_bytes, 4096, REQUEST_BYTES_MAX] {
                        sizes.extend(size.to_be_bytes());
                    }
                    self.reply(option, REP_INFO, &sizes)?;
                    self.reply(option, REP_ACK, &[])?;
                    if option == OPT_GO {
                        return Ok(true);
                    }
                }
                OPT_STRUCTURED_REPLY if data.is_empty() => {
                    self.structured = true;
                    self.reply(option, REP_ACK, &[])?;
                }
                OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => {
                    self.choose(option, &data)?;
                }
                _ => self.reply(option, REP_ERR_UNSUP, &[])?,
            }
        }
    }

    /// Which contexts there are, or are wanted.
    fn choose(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let lists = option == OPT_LIST_META_CONTEXT;
        let found = named(&self.served.contexts, data, lists).filter(|_| self.structured);
        let Some(found) = found else {
            return self.reply(option, REP_ERR_INVALID, &[]);
        };
        for id in &found {
            let mut answer = id.to_be_bytes().to_vec();
            answer.extend(self.served.contexts[*id as usize].name.as_bytes());
            self.reply(option, REP_META_CONTEXT, &answer)?;
        }
        if !lists {
            self.selected = found;
        }
        self.reply(option, REP_ACK, &[])
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut answer = Vec::new();
        answer.extend(REPLY_MAGIC.to_be_bytes());
        answer.extend(option.to_be_bytes());
        answer.extend(kind.to_be_bytes());
        answer.extend((data.len() as u32).to_be_bytes());
        answer.extend(data);
        self.stream.write_all(&answer)
    }
}
