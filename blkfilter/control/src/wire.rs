//! Lines of JSON over a Unix socket: framing, client, server.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Protocol version. 1: first version.
const VERSION: u32 = 1;
/// Longest question.
const LINE_BYTES_MAX: u64 = 16 << 20;
/// Longest answer: a list of some million ranges. It comes from our own daemon.
const ANSWER_BYTES_MAX: u64 = 512 << 20;
/// Most attached bytes: one write of a rewind.
pub const ATTACH_BYTES_MAX: usize = 1 << 20;
/// How long a client may leave an answer, or a progress line, unread.
const WRITE_WAIT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 20 });
/// Connections at once.
const CONNECTIONS_MAX: usize = 64;

/// Why a call failed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ControlError {
    /// Stable code, like `V012-busy`.
    pub code: String,
    /// What was being done to what, what is wrong, what to do next.
    pub message: String,
}

impl ControlError {
    /// An error with a code and a message.
    #[must_use]
    pub fn new(code: &str, message: impl fmt::Display) -> ControlError {
        ControlError {
            code: code.to_owned(),
            message: message.to_string(),
        }
    }
}

impl fmt::Display for ControlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}]", self.message, self.code)
    }
}

impl std::error::Error for ControlError {}

impl From<io::Error> for ControlError {
    fn from(error: io::Error) -> ControlError {
        ControlError::new("C001-io", error)
    }
}

/// How far a long operation is.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Units done.
    pub done: u64,
    /// Units in all.
    pub total: u64,
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    v: u32,
    op: T,
    #[serde(default)]
    attach: usize,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Line<T> {
    Progress(Progress),
    Ok(T),
    Error(ControlError),
}

fn write_line<T: Serialize>(stream: &mut UnixStream, value: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line)
}

fn read_line<T: DeserializeOwned>(
    reader: &mut BufReader<UnixStream>,
    most: u64,
) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    reader.take(most).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a line is cut or too long",
        ));
    }
    serde_json::from_slice(&line)
        .map(Some)
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// The asking side.
pub struct Client {
    reader: BufReader<UnixStream>,
}

impl Client {
    /// Connects to a daemon's socket.
    pub fn connect(socket: &Path) -> io::Result<Client> {
        Ok(Client {
            reader: BufReader::new(UnixStream::connect(socket)?),
        })
    }

    /// Waits for answers no longer than this.
    pub fn answer_within(self, limit: Duration) -> io::Result<Client> {
        self.reader.get_ref().set_read_timeout(Some(limit))?;
        Ok(self)
    }

    /// Asks and waits for the answer.
    pub fn call<Op: Serialize, Reply: DeserializeOwned>(
        &mut self,
        op: &Op,
    ) -> Result<Reply, ControlError> {
        self.call_with(op, &[], |_| {})
    }

    /// Asks with attached bytes; `progress` hears how far it is.
    pub fn call_with<Op: Serialize, Reply: DeserializeOwned>(
        &mut self,
        op: &Op,
        attached: &[u8],
        mut progress: impl FnMut(Progress),
    ) -> Result<Reply, ControlError> {
        let stream = self.reader.get_mut();
        write_line(
            stream,
            &Envelope {
                v: VERSION,
                op,
                attach: attached.len(),
            },
        )?;
        stream.write_all(attached)?;
        loop {
            match read_line::<Line<Reply>>(&mut self.reader, ANSWER_BYTES_MAX)? {
                Some(Line::Progress(step)) => progress(step),
                Some(Line::Ok(reply)) => return Ok(reply),
                Some(Line::Error(error)) => return Err(error),
                None => {
                    return Err(ControlError::new(
                        "C002-closed",
                        "the daemon closed the connection before it answered; see its log",
                    ));
                }
            }
        }
    }
}

/// What is still to be done when a connection has ended.
#[derive(Default)]
struct AtEnd(Vec<Box<dyn FnOnce() + Send>>);

impl Drop for AtEnd {
    fn drop(&mut self) {
        for work in self.0.drain(..) {
            work();
        }
    }
}

/// Lets a handler tell how far it is.
pub struct Reporter<'a> {
    stream: &'a mut UnixStream,
    at_end: &'a mut AtEnd,
    /// The client was told something that it did not take.
    gone: bool,
}

impl Reporter<'_> {
    /// Tells it. False: the client is gone; it is not told anything more, and nobody waits for it again.
    pub fn report(&mut self, done: u64, total: u64) -> bool {
        let line = Line::<()>::Progress(Progress { done, total });
        self.gone = self.gone || write_line(self.stream, &line).is_err();
        !self.gone
    }

    /// Work for when the client has gone, however it went.
    pub fn at_end(&mut self, work: impl FnOnce() + Send + 'static) {
        self.at_end.0.push(Box::new(work));
    }
}

/// Answers questions on `socket` until the process ends; a thread per connection. A stale socket of a dead daemon is replaced. Once it listens, systemd
/// is told so.
pub fn serve<Op, Reply, Handler>(socket: &Path, handler: Handler) -> io::Result<()>
where
    Op: DeserializeOwned,
    Reply: Serialize,
    Handler:
        Fn(Op, Vec<u8>, &mut Reporter<'_>) -> Result<Reply, ControlError> + Send + Sync + 'static,
{
    if let Some(parent) = socket.parent() {
        std::fs::create_dir_all(parent)?;
    }
    if UnixStream::connect(socket).is_ok() {
        return Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!("another daemon answers on {}", socket.display()),
        ));
    }
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    crate::notify::ready();
    let handler = Arc::new(handler);
    let open = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        if open.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
            open.fetch_sub(1, Ordering::AcqRel);
            continue; // Dropped: the client sees a closed connection.
        }
        let (handler, open) = (Arc::clone(&handler), Arc::clone(&open));
        std::thread::spawn(move || {
            let _ = converse(stream, handler.as_ref());
            open.fetch_sub(1, Ordering::AcqRel);
        });
    }
    Ok(())
}

fn converse<Op, Reply, Handler>(mut stream: UnixStream, handler: &Handler) -> io::Result<()>
where
    Op: DeserializeOwned,
    Reply: Serialize,
    Handler: Fn(Op, Vec<u8>, &mut Reporter<'_>) -> Result<Reply, ControlError>,
{
    // Who does not read (it was stopped, its terminal hangs) counts as gone: what it asked for must not wait for it.
    stream.set_write_timeout(Some(WRITE_WAIT))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut at_end = AtEnd::default();
    loop {
        let envelope = match read_line::<Envelope<Op>>(&mut reader, LINE_BYTES_MAX) {
            Ok(Some(envelope)) => envelope,
            Ok(None) => return Ok(()),
            Err(error) => {
                write_line(
                    &mut stream,
                    &Line::<()>::Error(ControlError::new(
                        "C003-question",
                        format!("not understood: {error}"),
                    )),
                )?;
                return Ok(());
            }
        };
        if envelope.v != VERSION || envelope.attach > ATTACH_BYTES_MAX {
            let message = format!(
                "protocol version {} is not spoken here, only {VERSION}; use the programs of one release",
                envelope.v
            );
            write_line(
                &mut stream,
                &Line::<()>::Error(ControlError::new("C004-version", message)),
            )?;
            return Ok(());
        }
        let mut attached = vec![0u8; envelope.attach];
        reader.read_exact(&mut attached)?;
        let answer = match handler(
            envelope.op,
            attached,
            &mut Reporter {
                stream: &mut stream,
                at_end: &mut at_end,
                gone: false,
            },
        ) {
            Ok(reply) => Line::Ok(reply),
            Err(error) => Line::Error(error),
        };
        write_line(&mut stream, &answer)?;
    }
}

#[cfg(test)]
mod tests {
    use super::{ControlError, Envelope, VERSION, serve, write_line};
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc::channel;
    use std::time::{Duration, Instant};

    /// A client that asks and reads nothing (it was stopped, or its terminal hangs) is waited for once, not at every line.
    #[test]
    fn who_does_not_read_holds_up_nothing() {
        let socket = std::env::temp_dir().join(format!("varve-wire-{}", std::process::id()));
        let (told, ended) = channel();
        let place = socket.clone();
        std::thread::spawn(move || {
            serve(&place, move |_: u32, _, reporter| {
                let lines = (0..1_000_000u64).filter(|done| reporter.report(*done, u64::MAX));
                let _ = told.send(lines.count());
                Ok::<u32, ControlError>(0)
            })
        });
        let since = Instant::now();
        let mut client = loop {
            match UnixStream::connect(&socket) {
                Ok(client) => break client,
                Err(error) => assert!(since.elapsed() < Duration::from_secs(5), "{error}"),
            }
        };
        let question = Envelope {
            v: VERSION,
            attach: 0,
            op: 7u32,
        };
        write_line(&mut client, &question).unwrap();
        let lines = ended.recv_timeout(Duration::from_secs(15)).unwrap();
        assert!(lines < 1_000_000, "all of {lines} lines were taken");
        let _ = std::fs::remove_file(socket);
    }
}
