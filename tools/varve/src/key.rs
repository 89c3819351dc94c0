//! `varve key`: what opens an encrypted store. Secrets come from the terminal, from standard input or from a file; never from the command line.

use crate::past::unexpected;
use crate::{Context, daemons};
use clap::{Args, Subcommand};
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};
use std::fs::File;
use std::io::{BufRead, IsTerminal, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use varve_control::{
    ControlError, KEY_FILE_BYTES_MAX, KeysAsk, KeysStatus, StoreOp, StorePolicy, StoreReply,
    keep_memory_secret,
};
use zeroize::Zeroizing;

/// Bytes of a key file that is made here.
const KEY_FILE_BYTES: usize = 64;

#[derive(Args)]
pub struct By {
    /// The key file that opens it (default: a passphrase, asked for on the terminal or read from standard input).
    #[arg(long, value_name = "PATH")]
    key_file: Option<PathBuf>,
}

#[derive(Subcommand)]
pub enum KeyCommand {
    /// Is the store encrypted, and open?
    Status,
    /// Encrypt the store: what is compressed from now on, and, in the background, what is there. A key file that is not there is made.
    Init(By),
    /// Open it: history can be read again, and is compressed again.
    Unlock(By),
    /// Another passphrase or key file opens it from now on.
    Rotate(By),
    /// Write all keys into a file that a passphrase opens. Keep it somewhere else: without keys nothing can be read.
    Export {
        /// The new file.
        file: PathBuf,
    },
    /// Take keys out of such a file.
    Import {
        /// The file.
        file: PathBuf,
    },
}

fn refused(why: String) -> ControlError {
    ControlError::new("X015-key", why)
}

/// `varve key`.
pub fn run(context: &Context, command: &KeyCommand) -> Result<(), ControlError> {
    keep_memory_secret("varve");
    let ask = |what, secret: Option<&Secret>, file: &[u8]| ask(context, what, secret, file);
    match command {
        KeyCommand::Status => show(context, &ask(KeysAsk::Status, None, &[])?.0),
        KeyCommand::Init(by) => {
            // Before a key is made for nothing.
            if ask(KeysAsk::Status, None, &[])?.0.encrypted {
                return Err(ControlError::new(
                    "S017-encrypted",
                    "the store is encrypted already; varve key rotate changes what opens it",
                ));
            }
            can_note(context)?;
            let secret = new_secret(context, by)?;
            let (status, _) = ask(KeysAsk::Init, Some(&secret), &[])?;
            noted(context, by)?;
            show(context, &status);
            context
                .output
                .say("  Without keys nothing of this history can be read");
        }
        KeyCommand::Unlock(by) => {
            let secret = known_secret("Passphrase: ", by)?;
            show(context, &ask(KeysAsk::Unlock, Some(&secret), &[])?.0);
        }
        KeyCommand::Rotate(by) => {
            can_note(context)?;
            let secret = new_secret(context, by)?;
            let (status, _) = ask(KeysAsk::Rotate, Some(&secret), &[])?;
            noted(context, by)?;
            show(context, &status);
        }
        KeyCommand::Export { file } => {
            if lies_in_the_store(context, file)? {
                return Err(refused(format!(
                    "{} lies in the store itself, and would be lost with it. Choose another place, on another disk",
                    file.display()
                )));
            }
            let secret = new_secret(context, &By { key_file: None })?;
            let (_, bytes) = ask(KeysAsk::Export, Some(&secret), &[])?;
            write_new(file, &bytes)?;
            let (status, _) = ask(KeysAsk::Exported, None, &[])?;
            context.output.result(&status, || {
                context.output.say(format!(
                    "{} keys are in {}; keep it somewhere else, and the passphrase with somebody else",
                    status.keys,
                    file.display()
                ));
            });
        }
        KeyCommand::Import { file } => {
            let bytes = read_bounded(file)?;
            let secret = known_secret("Passphrase of the file: ", &By { key_file: None })?;
            let (status, _) = ask(KeysAsk::Import, Some(&secret), &bytes)?;
            context.output.result(&status, || {
                context.output.say(format!(
                    "{} keys were new; the store has {}",
                    status.imported, status.keys
                ));
            });
        }
    }
    Ok(())
}

/// A passphrase, or the content of a key file.
struct Secret {
    bytes: Zeroizing<Vec<u8>>,
    is_key_file: bool,
}

fn ask(
    context: &Context,
    what: KeysAsk,
    secret: Option<&Secret>,
    file: &[u8],
) -> Result<(KeysStatus, Vec<u8>), ControlError> {
    let bytes: &[u8] = secret.map_or(&[], |secret| secret.bytes.as_slice());
    let op = StoreOp::Keys {
        ask: what,
        secret_bytes: bytes.len(),
        is_key_file: secret.is_some_and(|secret| secret.is_key_file),
    };
    let attached = Zeroizing::new([bytes, file].concat());
    match daemons::store(context)?.call_with(&op, &attached, |_| {})? {
        StoreReply::Keys { keys, file } => {
            let digits: Vec<u8> = file.bytes().collect();
            let byte = |pair: &[u8]| {
                let text = std::str::from_utf8(pair).ok()?;
                u8::from_str_radix(text, 16).ok()
            };
            let bytes: Option<Vec<u8>> = digits.chunks(2).map(byte).collect();
            Ok((keys, bytes.ok_or_else(unexpected)?))
        }
        _ => Err(unexpected()),
    }
}

fn show(context: &Context, status: &KeysStatus) {
    context.output.result(status, || {
        if !status.encrypted {
            println!("the store is not encrypted; varve key init makes it so");
            return;
        }
        let open = match status.open {
            true => "open",
            false => "LOCKED: history can neither be read nor compressed; varve key unlock",
        };
        println!("the store is encrypted by a {}, and {open}", status.kind);
        let (plain, encrypted) = status.plain_and_encrypted;
        println!(
            "  {} keys of volumes; {encrypted} segments are encrypted, {plain} are not yet",
            status.keys
        );
        if status.not_exported > 0 {
            println!(
                "  {} of the keys lie in this store only. Next: varve key export FILE, and keep FILE somewhere else",
                status.not_exported
            );
        }
    });
}

fn read_bounded(path: &Path) -> Result<Zeroizing<Vec<u8>>, ControlError> {
    let wrong = |why: String| refused(format!("{}: {why}", path.display()));
    let file = File::open(path).map_err(|e| wrong(e.to_string()))?;
    let mut bytes = Zeroizing::new(Vec::new());
    file.take(KEY_FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| wrong(e.to_string()))?;
    if bytes.len() as u64 > KEY_FILE_BYTES_MAX {
        return Err(wrong("it is too long".to_owned()));
    }
    Ok(bytes)
}

/// A file that was not there, for nobody else's eyes, durably.
fn write_new(path: &Path, bytes: &[u8]) -> Result<(), ControlError> {
    let write = || {
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        let path = std::path::absolute(path)?;
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    };
    write().map_err(|error: std::io::Error| refused(format!("{}: {error}", path.display())))
}

fn lies_in_the_store(context: &Context, path: &Path) -> Result<bool, ControlError> {
    let place = std::fs::canonicalize(context.paths.store()).unwrap_or_default();
    let absolute = std::path::absolute(path)?;
    let parent = absolute.parent().map(std::fs::canonicalize).transpose()?;
    let inside = |parent: PathBuf| parent.starts_with(&place) && !place.as_os_str().is_empty();
    Ok(parent.is_some_and(inside))
}

/// What opens the store already.
fn known_secret(question: &str, by: &By) -> Result<Secret, ControlError> {
    let is_key_file = by.key_file.is_some();
    let bytes = match &by.key_file {
        Some(path) => read_bounded(path)?,
        None => passphrase(question)?,
    };
    Ok(Secret { bytes, is_key_file })
}

/// What is to open it: a passphrase that was said twice, or a key file, which is made if it is not there.
fn new_secret(context: &Context, by: &By) -> Result<Secret, ControlError> {
    if let Some(path) = &by.key_file {
        if lies_in_the_store(context, path)? {
            return Err(refused(format!(
                "{} lies in the store itself: whoever takes the store takes the key. Choose another place",
                path.display()
            )));
        }
        if !path.exists() {
            let mut bytes = Zeroizing::new(vec![0; KEY_FILE_BYTES]);
            File::open("/dev/urandom")?.read_exact(&mut bytes)?;
            write_new(path, &bytes)?;
            context.output.say(format!("{}: made", path.display()));
        }
        if std::fs::metadata(path)?.mode() & 0o077 != 0 {
            return Err(refused(format!(
                "{} can be read by others: chmod 600 it, and think of who has it by now",
                path.display()
            )));
        }
        return known_secret("", by);
    }
    let bytes = passphrase("New passphrase: ")?;
    if bytes.is_empty() {
        return Err(refused("an empty passphrase protects nothing".to_owned()));
    }
    if std::io::stdin().is_terminal() && *passphrase("Again: ")? != *bytes {
        return Err(refused(
            "the two are not the same. Nothing was changed".to_owned(),
        ));
    }
    Ok(Secret {
        bytes,
        is_key_file: false,
    })
}

/// The daemon finds the key file by the policy, or stops looking for one.
fn name_key_file(context: &Context, by: &By) -> Result<(), ControlError> {
    let path = context.paths.store_policy();
    let mut policy = StorePolicy::load(&path).map_err(refused)?;
    policy.key_file = match &by.key_file {
        Some(file) => std::path::absolute(file)?.display().to_string(),
        None => String::new(),
    };
    policy.save(&path).map_err(refused)
}

/// Before keys are changed: whether it can be noted what opens them.
fn can_note(context: &Context) -> Result<(), ControlError> {
    let path = context.paths.store_policy();
    let policy = StorePolicy::load(&path).map_err(refused)?;
    match path.exists() {
        true => policy.save(&path).map_err(refused),
        false => Ok(()),
    }
}

/// Notes it. If that fails the keys are changed all the same.
fn noted(context: &Context, by: &By) -> Result<(), ControlError> {
    name_key_file(context, by).map_err(|failed| {
        let what = match &by.key_file {
            Some(file) => format!("only {} opens the store", file.display()),
            None => "only the new passphrase opens the store".to_owned(),
        };
        refused(format!(
            "the keys ARE changed, and {what} from now on; but that could not be noted: {}. Set key_file there by hand",
            failed.message
        ))
    })
}

/// Reads a line, without showing it if a terminal would.
fn passphrase(question: &str) -> Result<Zeroizing<Vec<u8>>, ControlError> {
    let stdin = std::io::stdin();
    let shown = tcgetattr(&stdin).ok();
    if let Some(shown) = &shown {
        eprint!("{question}");
        let mut hidden = shown.clone();
        hidden.local_flags.remove(LocalFlags::ECHO);
        let _ = tcsetattr(&stdin, SetArg::TCSAFLUSH, &hidden);
    }
    let mut line = Zeroizing::new(Vec::new());
    let read = stdin
        .lock()
        .take(KEY_FILE_BYTES_MAX)
        .read_until(b'\n', &mut line);
    if let Some(shown) = &shown {
        let _ = tcsetattr(&stdin, SetArg::TCSAFLUSH, shown);
        eprintln!();
    }
    read?;
    while line
        .last()
        .is_some_and(|byte| matches!(byte, b'\n' | b'\r'))
    {
        line.pop();
    }
    Ok(line)
}
