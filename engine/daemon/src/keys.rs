//! The keys of the store: read when a history is first opened, opened by the key file that the policy names, or by who knows the passphrase.

use crate::service::{Service, error, store_error};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use varve_control::{ControlError, KeysAsk, KeysStatus, StorePolicy, StoreReply};
use varve_format::{SecretKind, VolumeId};
use varve_store::{Secret, StoreKeys, VolumeKeys};
use zeroize::Zeroizing;

/// A key file of more than this is none.
const KEY_FILE_BYTES_MAX: u64 = 64 << 10;

/// The keys, once they are read.
#[derive(Default)]
pub(crate) struct Keys(Mutex<Option<StoreKeys>>);

/// No core of this process is written, and nobody looks into its memory: keys and plaintext are there.
pub(crate) fn keep_memory_secret() {
    use nix::sys::resource::{Resource, setrlimit};
    let limited = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    let hidden = nix::sys::prctl::set_dumpable(false);
    if let Err(errno) = limited.and(hidden) {
        eprintln!("varved: core dumps of this process cannot be forbidden: {errno}");
    }
}

/// The content of a key file.
fn read_key_file(path: &Path) -> Result<Secret, String> {
    let wrong = |why: &dyn std::fmt::Display| format!("the key file {}: {why}", path.display());
    let length = std::fs::metadata(path).map_err(|e| wrong(&e))?.len();
    if length > KEY_FILE_BYTES_MAX {
        return Err(wrong(&"it is too long for one"));
    }
    let content = std::fs::read(path).map_err(|e| wrong(&e))?;
    Ok(Secret::KeyFile(Zeroizing::new(content)))
}

impl Keys {
    /// Reads the keys if they are not read yet.
    fn get(
        &self,
        root: &Path,
        policy: &Path,
    ) -> Result<MutexGuard<'_, Option<StoreKeys>>, varve_store::StoreError> {
        let mut keys = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if keys.is_none() {
            let mut loaded = StoreKeys::load(root)?;
            let named = StorePolicy::load(policy).unwrap_or_default().key_file;
            let by_file = |info: varve_store::KeysInfo| info.kind == SecretKind::KeyFile;
            if loaded.info().is_some_and(by_file) && !named.is_empty() {
                let opened = read_key_file(Path::new(&named)).and_then(|secret| {
                    loaded
                        .unlock(&secret)
                        .map_err(|why| format!("{named}: {why}"))
                });
                if let Err(why) = opened {
                    eprintln!("varved: the store stays locked: {why}");
                }
            }
            *keys = Some(loaded);
        }
        Ok(keys)
    }

    /// What a volume's history is encrypted with. If the keys cannot be read it stays locked.
    pub(crate) fn of_volume(
        &self,
        root: &Path,
        policy: &Path,
        volume: VolumeId,
    ) -> Arc<VolumeKeys> {
        let found = self
            .get(root, policy)
            .and_then(|mut keys| match keys.as_mut() {
                Some(keys) => keys.of_volume(volume),
                None => Ok(Arc::default()),
            });
        found.unwrap_or_else(|failed| {
            eprintln!("varved: the keys of the store: {failed}. Nothing is compressed until that is mended and varved restarted");
            Arc::new(VolumeKeys::locked())
        })
    }
}

impl Service {
    /// Answers what is asked of the keys.
    pub(crate) fn keys_asked(
        &self,
        ask: KeysAsk,
        (secret_bytes, is_key_file): (usize, bool),
        attached: Vec<u8>,
    ) -> Result<StoreReply, ControlError> {
        let attached = Zeroizing::new(attached);
        let cut = attached.split_at_checked(secret_bytes);
        let (secret, rest) = cut.ok_or_else(|| error("C003-question", "the secret is cut"))?;
        let secret = Zeroizing::new(secret.to_vec());
        let secret = match is_key_file {
            true => Secret::KeyFile(secret),
            false => Secret::Passphrase(secret),
        };
        let (root, policy) = (self.paths().store(), self.paths().store_policy());
        let wrong = |failed: varve_store::StoreError| store_error(&failed);
        // Whoever opens a history holds the lock of all of them when it asks for keys: so those are asked for first.
        let open = self.open_ids();
        let mut status = KeysStatus::default();
        let mut file = String::new();
        {
            let mut guard = self.keys.get(&root, &policy).map_err(wrong)?;
            let Some(keys) = guard.as_mut() else {
                return Err(error(
                    "S016-not-encrypted",
                    "the store's keys are not there",
                ));
            };
            match ask {
                KeysAsk::Status => {}
                KeysAsk::Init => keys.create(&secret).map_err(wrong)?,
                KeysAsk::Unlock => keys.unlock(&secret).map_err(wrong)?,
                KeysAsk::Rotate => keys.rotate(&secret).map_err(wrong)?,
                KeysAsk::Export => {
                    let exported = keys.export(&secret).map_err(wrong)?;
                    file = exported.iter().map(|byte| format!("{byte:02x}")).collect();
                }
                KeysAsk::Import => status.imported = keys.import(rest, &secret).map_err(wrong)?,
            }
            // Volumes whose history is open get their keys now.
            for id in &open {
                if let Some(volume) = VolumeId::parse(id) {
                    keys.of_volume(volume).map_err(wrong)?;
                }
            }
            if let Some(info) = keys.info() {
                status.encrypted = true;
                status.open = info.open;
                status.keys = info.keys;
                status.kind = match info.kind {
                    SecretKind::Passphrase => "passphrase",
                    SecretKind::KeyFile => "key file",
                }
                .to_owned();
            }
        }
        for id in &open {
            let segments = self.if_open(id, |store| store.shared_list());
            for segment in segments.unwrap_or_default() {
                match segment.is_encrypted() {
                    true => status.plain_and_encrypted.1 += 1,
                    false => status.plain_and_encrypted.0 += 1,
                }
            }
        }
        Ok(StoreReply::Keys { keys: status, file })
    }
}
