//! The keys of a store: a key for each volume, sealed by a key that is made of a passphrase or of a key file.
//!
//! Two files, written one after the other, with the same content, each whole or not there: what one bad sector takes, the other has. Order: a volume's new
//! key is durable before anything is encrypted with it. Rotation seals all keys anew; crash between the two files: the one with more generations counts,
//! and the other still opens with the old secret, as it did before.
//! Keys in memory are wiped when they are let go. Nothing here prints one.

use crate::crypt::{self, FileCipher};
use crate::key_list::{self, KeyNames};
use crate::lists::mended;
use crate::{StoreError, durable};
use nix::fcntl::{Flock, FlockArg};
use ring::aead::{Aad, NONCE_LEN, Nonce};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use varve_format::{
    FormatError, KEYS_FILE_BYTES_MAX, KeysHeader, SealedKey, SecretKind, SegmentFooter, VolumeId,
    encode_keys, parse_keys,
};
use zerocopy::FromZeros;
use zeroize::Zeroizing;

const NAMES: [&str; 2] = ["keys", "keys-copy"];
/// Which of them were exported, so that it can be said of which there is no second copy.
const EXPORTED: &str = "keys-exported";
/// Argon2id, as RFC 9106 proposes where memory is not plenty: 64 MiB, three passes.
const MEMORY_KIB: u32 = 64 << 10;
const PASSES: u32 = 3;
const FROM_FILE: &[u8] = b"varve key file 1";
/// A key file has at least as many bytes: less could be guessed.
const KEY_FILE_BYTES_MIN: usize = 32;

/// 256 bits that are wiped.
pub type SecretKey = Zeroizing<[u8; 32]>;

/// What opens a store.
pub enum Secret {
    /// A passphrase.
    Passphrase(Zeroizing<Vec<u8>>),
    /// The content of a key file.
    KeyFile(Zeroizing<Vec<u8>>),
}

/// What a volume's history is encrypted with.
enum State {
    /// The store has no keys: nothing is encrypted.
    Off,
    /// It could not be told: locked, until it can be.
    Unknown,
    /// It has, and they are not open; or they are gone, and the history wants them.
    Locked,
    /// Open; the last one is for new segments.
    Open(Vec<([u8; 16], SecretKey)>),
}

/// The keys of one volume, shared by all who read its history; they are opened later, or never.
pub struct VolumeKeys(RwLock<State>);

impl Default for VolumeKeys {
    fn default() -> VolumeKeys {
        VolumeKeys(RwLock::new(State::Off))
    }
}

impl fmt::Debug for VolumeKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VolumeKeys")
    }
}

/// What a new file is encrypted with.
pub(crate) struct NewFile {
    pub(crate) cipher: FileCipher,
    /// Which of the volume's keys.
    pub(crate) key: [u8; 16],
    /// Of this file alone.
    pub(crate) salt: [u8; 32],
}

impl VolumeKeys {
    fn state(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// History that is encrypted is not gone on with in the clear because its keys are gone.
    pub(crate) fn lock_if_off(&self) {
        let mut state = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if matches!(*state, State::Off | State::Unknown) {
            *state = State::Locked;
        }
    }

    /// Whether new segments are encrypted; an error if they should be and cannot.
    pub fn wanted(&self) -> Result<bool, StoreError> {
        match &*self.state() {
            State::Off => Ok(false),
            State::Locked | State::Unknown => Err(StoreError::NoKey),
            // No key was made for this volume yet: nothing of it is written in the clear meanwhile.
            State::Open(keys) if keys.is_empty() => Err(StoreError::NoKey),
            State::Open(_) => Ok(true),
        }
    }

    /// Whether all of these keys are there.
    pub(crate) fn have(&self, ids: &BTreeSet<[u8; 16]>) -> Result<(), StoreError> {
        match &*self.state() {
            _ if ids.is_empty() => Ok(()),
            State::Locked | State::Unknown => Err(StoreError::NoKey),
            State::Off => Err(StoreError::OtherKey),
            State::Open(keys) => match ids.iter().all(|id| keys.iter().any(|key| key.0 == *id)) {
                true => Ok(()),
                false => Err(StoreError::OtherKey),
            },
        }
    }

    /// A cipher for a new file; none if it is not to be encrypted.
    pub(crate) fn new_file(&self, footer: &SegmentFooter) -> Result<Option<NewFile>, StoreError> {
        if !self.wanted()? {
            return Ok(None);
        }
        let State::Open(keys) = &*self.state() else {
            return Err(StoreError::NoKey);
        };
        let (id, key) = keys.last().ok_or(StoreError::NoKey)?;
        let made = crypt::random().and_then(|salt| {
            let cipher = FileCipher::new(key, &salt, footer)?;
            let key = *id;
            Ok(NewFile { cipher, key, salt })
        });
        made.map(Some).map_err(StoreError::io(Path::new("keys")))
    }

    /// The cipher of a file; none while its key is not there.
    pub(crate) fn of_file(
        &self,
        id: [u8; 16],
        salt: &[u8; 32],
        footer: &SegmentFooter,
    ) -> Option<FileCipher> {
        let state = self.state();
        let State::Open(keys) = &*state else {
            return None;
        };
        let (_, key) = keys.iter().find(|key| key.0 == id)?;
        FileCipher::new(key, salt, footer).ok()
    }
}

struct Key {
    volume: VolumeId,
    id: [u8; 16],
    created_ns: i64,
    key: SecretKey,
}

/// All keys of a store.
pub struct StoreKeys {
    root: PathBuf,
    file: Option<KeysFile>,
    /// The files are there and cannot be read, or one of them cannot: nothing is written over what may be newer.
    failed: Option<String>,
    /// The sealing key and what it seals, once it is open.
    open: Option<(SecretKey, Vec<Key>)>,
    handles: BTreeMap<VolumeId, Arc<VolumeKeys>>,
    /// What was exported last.
    exporting: KeyNames,
}

/// What is known of a store's keys without opening them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeysInfo {
    /// What opens them.
    pub kind: SecretKind,
    /// They are open.
    pub open: bool,
    /// Keys of volumes.
    pub keys: usize,
}

fn sealing_key(header: &KeysHeader, secret: &Secret) -> Result<SecretKey, StoreError> {
    let wrong = || StoreError::WrongKey;
    match (header.kind().map_err(|_| wrong())?, secret) {
        (SecretKind::Passphrase, Secret::Passphrase(words)) => {
            let (memory, passes, lanes) = (header.memory_kib, header.passes, header.lanes);
            let params = argon2::Params::new(memory.get(), passes.get(), lanes.get(), Some(32));
            let argon = argon2::Argon2::new(
                argon2::Algorithm::Argon2id,
                argon2::Version::V0x13,
                params.map_err(|_| wrong())?,
            );
            let mut key = Zeroizing::new([0; 32]);
            argon
                .hash_password_into(words, &header.salt, key.as_mut())
                .map_err(|_| wrong())?;
            Ok(key)
        }
        (SecretKind::KeyFile, Secret::KeyFile(content)) => {
            Ok(crypt::derived(content, &header.salt, FROM_FILE))
        }
        _ => Err(wrong()),
    }
}

fn new_header(secret: &Secret) -> Result<KeysHeader, StoreError> {
    let mut header = KeysHeader::empty();
    header.salt = crypt::random().map_err(StoreError::io(Path::new("keys")))?;
    match secret {
        Secret::Passphrase(words) if words.is_empty() => return Err(StoreError::WeakKey),
        Secret::KeyFile(content) if content.len() < KEY_FILE_BYTES_MIN => {
            return Err(StoreError::WeakKey);
        }
        Secret::Passphrase(_) => {
            header.kind = SecretKind::Passphrase as u8;
            header.memory_kib = MEMORY_KIB.into();
            header.passes = PASSES.into();
            header.lanes = 1.into();
        }
        Secret::KeyFile(_) => header.kind = SecretKind::KeyFile as u8,
    }
    Ok(header)
}

fn seal(sealing: &SecretKey, key: &Key) -> io::Result<SealedKey> {
    let mut entry = SealedKey::new_zeroed();
    entry.volume = key.volume.0;
    entry.id = key.id;
    entry.created = key.created_ns.into();
    let nonce: [u8; NONCE_LEN] = crypt::random()?;
    entry.nonce = nonce;
    let mut bytes = Zeroizing::new(*key.key);
    let tag = crypt::cipher(sealing)?
        .seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(entry.context()),
            bytes.as_mut(),
        )
        .map_err(|_| io::Error::other("a key could not be sealed"))?;
    entry.sealed[..32].copy_from_slice(bytes.as_ref());
    entry.sealed[32..].copy_from_slice(tag.as_ref());
    Ok(entry)
}

fn unseal(sealing: &SecretKey, entry: &SealedKey) -> Result<Key, StoreError> {
    let mut bytes = Zeroizing::new(entry.sealed);
    let cipher = crypt::cipher(sealing).map_err(|_| StoreError::WrongKey)?;
    let nonce = Nonce::assume_unique_for_key(entry.nonce);
    let opened = cipher
        .open_in_place(nonce, Aad::from(entry.context()), bytes.as_mut())
        .map_err(|_| StoreError::WrongKey)?;
    let mut key = Zeroizing::new([0; 32]);
    key.copy_from_slice(opened);
    Ok(Key {
        volume: VolumeId(entry.volume),
        id: entry.id,
        created_ns: entry.created.get(),
        key,
    })
}

/// Opens all entries of a file; the first one, of no volume, is left out.
fn unseal_all(
    (header, entries): &KeysFile,
    secret: &Secret,
) -> Result<(SecretKey, Vec<Key>), StoreError> {
    let sealing = sealing_key(header, secret)?;
    let mut keys = Vec::new();
    for entry in entries {
        keys.push(unseal(&sealing, entry)?);
    }
    keys.retain(|key| key.volume != VolumeId([0; 16]));
    Ok((sealing, keys))
}

type KeysFile = (KeysHeader, Vec<SealedKey>);

/// The newest of the two files that is whole; the other is made the same. And what is wrong if one cannot be read that may be newer, or none can.
fn read_files(root: &Path) -> (Option<KeysFile>, Option<StoreError>) {
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    let (mut bad, mut failed) = (Vec::new(), None);
    for name in NAMES {
        let path = root.join(name);
        let bounded = std::fs::metadata(&path).and_then(|metadata| {
            match metadata.len() > KEYS_FILE_BYTES_MAX {
                true => Err(io::Error::other("too many bytes")),
                false => std::fs::read(&path),
            }
        });
        match bounded.map(|bytes| (parse_keys(&bytes), bytes)) {
            Ok((Ok(file), bytes)) => found.push((file, bytes, path)),
            // Damaged beyond doubt: it is kept for who wants to look at it.
            Ok((Err(error), _)) if is_damage(&error) => {
                bad.push((StoreError::Damaged(path.clone(), error), path));
            }
            Ok((Err(error), _)) => failed = Some(StoreError::Damaged(path, error)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(path),
            Err(error) => failed = Some(StoreError::io(&path)(error)),
        }
    }
    found.sort_by_key(|(file, ..)| std::cmp::Reverse(file.0.generation.get()));
    let Some((file, bytes, _)) = found.first() else {
        return (None, failed.or_else(|| bad.pop().map(|bad| bad.0)));
    };
    if failed.is_some() {
        return (Some(file.clone()), failed);
    }
    for (_, path) in &bad {
        let _ = std::fs::rename(path, path.with_extension("damaged"));
    }
    let older = found[1..]
        .iter()
        .filter(|other| other.1 != *bytes)
        .map(|other| &other.2);
    for path in bad.iter().map(|bad| &bad.1).chain(&missing).chain(older) {
        let _ = write_file(path, bytes); // One is enough to read; the next start tries again.
    }
    (Some(file.clone()), None)
}

/// Whether a file is damaged beyond doubt, not only newer.
fn is_damage(error: &FormatError) -> bool {
    matches!(
        error,
        FormatError::Checksum | FormatError::Truncated { .. } | FormatError::NotVarve
    )
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    durable::create(path, |file| {
        let mode = std::fs::Permissions::from_mode(0o600);
        let written = file
            .set_permissions(mode)
            .and_then(|()| file.write_all(bytes));
        written.map_err(StoreError::io(path))
    })
}

/// A file's bytes: a first entry of no volume, then the keys.
fn sealed_file(
    header: &KeysHeader,
    sealing: &SecretKey,
    keys: &[Key],
) -> io::Result<(Vec<u8>, Vec<SealedKey>)> {
    let first = Key {
        volume: VolumeId([0; 16]),
        id: [0; 16],
        created_ns: 0,
        key: Zeroizing::new(crypt::random()?),
    };
    let mut entries = Vec::new();
    for key in std::iter::once(&first).chain(keys) {
        entries.push(seal(sealing, key)?);
    }
    Ok((encode_keys(header, &entries), entries))
}

impl StoreKeys {
    /// Reads what a store has; nothing is opened. What cannot be read is told by [`StoreKeys::refresh`], and keeps all handles locked.
    #[must_use]
    pub fn load(root: &Path) -> StoreKeys {
        let mut keys = StoreKeys {
            root: root.to_path_buf(),
            file: None,
            failed: None,
            open: None,
            handles: BTreeMap::new(),
            exporting: KeyNames::new(),
        };
        let _ = keys.refresh();
        keys
    }

    /// Reads the files (again) while there are none, or one of them could not be read. Of two that differ the newer one counts, and is written over the other.
    pub fn refresh(&mut self) -> Result<(), StoreError> {
        if self.file.is_some() && self.failed.is_none() {
            return Ok(());
        }
        let (read, failed) = read_files(&self.root);
        self.failed = failed.as_ref().map(ToString::to_string);
        if let Some(file) = read {
            let known = |file: &(KeysHeader, _)| file.0.generation.get();
            if self
                .file
                .as_ref()
                .is_none_or(|old| known(old) < known(&file))
            {
                self.file = Some(file);
                self.open = None;
            }
            self.tell();
            return Ok(());
        }
        self.tell();
        failed.map_or(Ok(()), Err)
    }

    /// Whether files may be written: not over what cannot be read, and may be newer.
    fn may_write(&mut self) -> Result<(), StoreError> {
        self.refresh()?;
        match &self.failed {
            Some(why) => Err(StoreError::Unread(why.clone())),
            None => Ok(()),
        }
    }

    /// What is known of them; none: the store is not encrypted.
    #[must_use]
    pub fn info(&self) -> Option<KeysInfo> {
        let (header, entries) = self.file.as_ref()?;
        Some(KeysInfo {
            kind: header.kind().ok()?,
            open: self.open.is_some(),
            keys: entries.len().saturating_sub(1),
        })
    }

    /// Reads both files again, from the disk, and writes anew what is not what is in use. Says what was wrong, in words.
    #[must_use]
    pub fn mend(&self) -> Vec<String> {
        match &self.failed {
            Some(why) => vec![why.clone()],
            None => self.mend_in(&self.root),
        }
    }

    /// The same with the files of a copy of the store.
    #[must_use]
    pub fn mend_in(&self, root: &Path) -> Vec<String> {
        let Some((header, entries)) = &self.file else {
            return Vec::new();
        };
        let right = encode_keys(header, entries);
        let mut wrong = Vec::new();
        for name in NAMES {
            let path = root.join(name);
            durable::forget_cached(&path);
            let why = match std::fs::read(&path) {
                Ok(bytes) if bytes == right => continue,
                Ok(bytes) => match parse_keys(&bytes) {
                    Ok((found, _)) if found.generation.get() >= header.generation.get() => {
                        wrong.push(format!(
                            "{}: somebody else has written it, and these keys are not those in use. It is left as it is: is another varved at work on this store?",
                            path.display()
                        ));
                        continue;
                    }
                    Ok(_) => "it is older than the keys in use".to_owned(),
                    Err(error) if is_damage(&error) => error.to_string(),
                    Err(error) => {
                        wrong.push(format!("{}: {error}. It is left as it is", path.display()));
                        continue;
                    }
                },
                // It may be newer; in a copy there is nothing that could be.
                Err(error) if error.kind() != io::ErrorKind::NotFound && root == self.root => {
                    wrong.push(format!("{}: {error}. It is left as it is", path.display()));
                    continue;
                }
                Err(error) => error.to_string(),
            };
            wrong.push(mended(&path, &why, write_file(&path, &right)));
        }
        wrong
    }

    /// Makes the store an encrypted one.
    pub fn create(&mut self, secret: &Secret) -> Result<(), StoreError> {
        self.may_write()?;
        if self.file.is_some() {
            return Err(StoreError::HasKeys);
        }
        let header = new_header(secret)?;
        let sealing = sealing_key(&header, secret)?;
        let keys = self.missing(&[])?;
        self.put(header, sealing, keys)
    }

    /// Opens them.
    pub fn unlock(&mut self, secret: &Secret) -> Result<(), StoreError> {
        let _ = self.refresh();
        let file = self.file.as_ref().ok_or(StoreError::NoKeys)?;
        self.open = Some(unseal_all(file, secret)?);
        // What has no key yet stays locked if none can be made.
        let made = self.add_missing();
        self.tell();
        made
    }

    /// Another secret opens them from now on, and the old one does not.
    pub fn rotate(&mut self, secret: &Secret) -> Result<(), StoreError> {
        self.may_write()?;
        let (known, _) = self.open.as_ref().ok_or(StoreError::NoKey)?;
        let old = self.file.as_ref().ok_or(StoreError::NoKeys)?;
        if sealing_key(&old.0, secret).is_ok_and(|same| *same == **known) {
            return Err(StoreError::SameSecret);
        }
        let header = new_header(secret)?;
        let sealing = sealing_key(&header, secret)?;
        let (old, keys) = self.open.take().ok_or(StoreError::NoKey)?;
        // What failed leaves them open as they were.
        let known: Vec<Key> = keys.iter().map(Key::again).collect();
        self.put(header, sealing, keys)
            .inspect_err(|_| self.open = Some((old, known)))
    }

    /// A file that another secret opens, with all keys: to be kept somewhere else.
    pub fn export(&mut self, secret: &Secret) -> Result<Vec<u8>, StoreError> {
        let (_, keys) = self.open.as_ref().ok_or(StoreError::NoKey)?;
        let header = new_header(secret)?;
        let sealing = sealing_key(&header, secret)?;
        let sealed = sealed_file(&header, &sealing, keys);
        let bytes = sealed.map_err(StoreError::io(Path::new("keys")))?.0;
        self.exporting = keys.iter().map(|key| key.id).collect();
        Ok(bytes)
    }

    /// Notes that what was exported last lies in a file somewhere else; false: nothing was, since the keys were read.
    pub fn note_exported(&mut self) -> Result<bool, StoreError> {
        if self.exporting.is_empty() {
            return Ok(false);
        }
        self.note_elsewhere(self.exporting.clone())?;
        self.exporting.clear();
        Ok(true)
    }

    fn note_elsewhere(&self, names: KeyNames) -> Result<(), StoreError> {
        let mut all = self.exported();
        all.extend(names);
        key_list::write(&self.root.join(EXPORTED), &all)
    }

    /// What was exported; if that cannot be told, nothing.
    fn exported(&self) -> KeyNames {
        key_list::read(&self.root.join(EXPORTED)).map_or_else(|_| KeyNames::new(), |list| list.0)
    }

    /// How many keys of a volume, or of all, lie in no file somewhere else. They need not be open.
    #[must_use]
    pub fn not_exported(&self, volume: Option<VolumeId>) -> usize {
        let Some((_, entries)) = &self.file else {
            return 0;
        };
        let exported = self.exported();
        let asked = |entry: &&SealedKey| match volume {
            Some(volume) => entry.volume == volume.0,
            None => entry.volume != [0; 16],
        };
        let missing = entries.iter().filter(asked);
        missing
            .filter(|entry| !exported.contains(&entry.id))
            .count()
    }

    /// Takes keys out of such a file; gives how many were new.
    pub fn import(&mut self, bytes: &[u8], secret: &Secret) -> Result<usize, StoreError> {
        let file = parse_keys(bytes)
            .map_err(|error| StoreError::Damaged(PathBuf::from("the file of keys"), error))?;
        let (_, imported) = unseal_all(&file, secret)?;
        self.may_write()?;
        let (sealing, mut keys) = self.open.take().ok_or(StoreError::NoKey)?;
        let known: Vec<Key> = keys.iter().map(Key::again).collect();
        // In front: the last one of a volume is for new segments.
        let mut new: Vec<Key> = imported
            .into_iter()
            .filter(|key| keys.iter().all(|known| known.id != key.id))
            .collect();
        let count = new.len();
        new.append(&mut keys);
        let header = self.file.as_ref().ok_or(StoreError::NoKeys)?.0;
        let same = Zeroizing::new(*sealing);
        let names: KeyNames = new[..count].iter().map(|key| key.id).collect();
        self.put(header, sealing, new)
            .inspect_err(|_| self.open = Some((same, known)))?;
        // They lie in the file that they came from. Should that not be noted, the advice to export them stays.
        let _ = self.note_elsewhere(names);
        Ok(count)
    }

    /// The handle of a volume's keys. If the store is encrypted and open, and the volume has no key yet, one is made; if that fails the handle stays locked.
    pub fn of_volume(&mut self, volume: VolumeId) -> (Arc<VolumeKeys>, Result<(), StoreError>) {
        let handle = Arc::clone(self.handles.entry(volume).or_default());
        let made = self.refresh().and_then(|()| self.add_missing());
        self.tell();
        (handle, made)
    }

    /// New keys for volumes that have a handle and none among `keys`.
    fn missing(&self, keys: &[Key]) -> Result<Vec<Key>, StoreError> {
        let io = StoreError::io(&self.root);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let created_ns = now.map_or(0, |now| now.as_nanos() as i64);
        let lacks = |volume: &&VolumeId| keys.iter().all(|key| key.volume != **volume);
        let mut new = Vec::new();
        for volume in self.handles.keys().filter(lacks) {
            new.push(Key {
                volume: *volume,
                id: crypt::random().map_err(&io)?,
                created_ns,
                key: Zeroizing::new(crypt::random().map_err(&io)?),
            });
        }
        Ok(new)
    }

    /// Makes keys that are missing, durably.
    fn add_missing(&mut self) -> Result<(), StoreError> {
        let (Some((sealing, keys)), Some((header, _))) = (&self.open, &self.file) else {
            return Ok(());
        };
        let mut new = self.missing(keys)?;
        if new.is_empty() {
            return Ok(());
        }
        if let Some(why) = &self.failed {
            return Err(StoreError::Unread(why.clone()));
        }
        let (header, sealing) = (*header, sealing.clone());
        let mut all: Vec<Key> = keys.iter().map(Key::again).collect();
        all.append(&mut new);
        let known = self.open.take();
        self.put(header, sealing, all)
            .inspect_err(|_| self.open = known)
    }

    /// Writes both files, then takes what is in them into use.
    fn put(
        &mut self,
        mut header: KeysHeader,
        sealing: SecretKey,
        keys: Vec<Key>,
    ) -> Result<(), StoreError> {
        let generation = self.file.as_ref().map_or(0, |file| file.0.generation.get());
        header.generation = generation.saturating_add(1).into();
        std::fs::create_dir_all(&self.root).map_err(StoreError::io(&self.root))?;
        let _alone = self.only_writer(generation)?;
        let io = StoreError::io(&self.root);
        let (bytes, entries) = sealed_file(&header, &sealing, &keys).map_err(&io)?;
        let old = self
            .file
            .as_ref()
            .map(|(header, entries)| encode_keys(header, entries));
        for (index, name) in NAMES.iter().enumerate() {
            write_file(&self.root.join(name), &bytes).inspect_err(|_| {
                // Half a change is none: what was told to have failed must not count after a restart.
                for name in &NAMES[..=index] {
                    let path = self.root.join(name);
                    let _ = match &old {
                        Some(old) => write_file(&path, old),
                        None => std::fs::remove_file(&path).map_err(StoreError::io(&path)),
                    };
                }
            })?;
        }
        self.file = Some((header, entries));
        self.open = Some((sealing, keys));
        self.tell();
        Ok(())
    }

    /// Keeps another process from writing keys at the same time; one that has done so since `known` was read is not written over: its keys would be lost.
    fn only_writer(&mut self, known: u64) -> Result<Flock<File>, StoreError> {
        let io = StoreError::io(&self.root);
        let directory = File::open(&self.root).map_err(&io)?;
        let lock = Flock::lock(directory, FlockArg::LockExclusive)
            .map_err(|(_, errno)| io(io::Error::from(errno)))?;
        let newest = NAMES.iter().filter_map(|name| {
            let bytes = std::fs::read(self.root.join(name)).ok()?;
            Some(parse_keys(&bytes).ok()?.0.generation.get())
        });
        if newest.max().is_some_and(|newest| newest > known) {
            let why = "another process has written keys since they were read".to_owned();
            self.failed = Some(why.clone()); // So they are read again.
            return Err(StoreError::Unread(why));
        }
        Ok(lock)
    }

    /// Tells all who read.
    fn tell(&self) {
        for (volume, handle) in &self.handles {
            let state = match (&self.file, &self.open) {
                (None, _) if matches!(*handle.state(), State::Locked) => continue,
                (None, _) if self.failed.is_some() => State::Unknown,
                (None, _) if matches!(*handle.state(), State::Unknown) => State::Off,
                (None, _) => continue, // Off, or locked if keys are gone.
                (Some(_), None) => State::Locked,
                (Some(_), Some((_, keys))) => State::Open(
                    keys.iter()
                        .filter(|key| key.volume == *volume)
                        .map(|key| (key.id, key.key.clone()))
                        .collect(),
                ),
            };
            *handle.0.write().unwrap_or_else(PoisonError::into_inner) = state;
        }
    }
}

impl Key {
    fn again(&self) -> Key {
        Key {
            key: self.key.clone(),
            ..*self
        }
    }
}
