//! The keys of the store: read when a history is first opened, opened by the key file that the policy names, or by who knows the passphrase.

use crate::service::{Service, error, store_error};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use varve_control::{
    ControlError, KEY_FILE_BYTES_MAX, KeysAsk, KeysStatus, StorePolicy, StoreReply,
};
use varve_format::{SecretKind, VolumeId};
use varve_store::{KeysInfo, Secret, StoreKeys, VolumeKeys};
use zeroize::Zeroizing;

/// The keys, once they are read.
#[derive(Default)]
pub(crate) struct Keys(Mutex<Option<Loaded>>);

struct Loaded {
    keys: StoreKeys,
    tried: Option<Instant>,
    said: String,
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

/// How often what could not be read, or opened by its key file, is tried again.
const RETRY_EVERY: Duration = Duration::from_secs(15);

impl Keys {
    /// The keys; read, and opened by the key file that the policy names, if that was not done yet.
    fn get(&self, root: &Path, policy: &Path) -> MutexGuard<'_, Option<Loaded>> {
        let mut keys = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = keys.get_or_insert_with(|| Loaded {
            keys: StoreKeys::load(root),
            tried: None,
            said: String::new(),
        });
        let waits = |tried: Instant| tried.elapsed() < RETRY_EVERY;
        if !loaded.tried.is_some_and(waits) {
            loaded.try_to_open(policy);
        }
        keys
    }

    /// What a volume's history is encrypted with. If the keys cannot be read it stays locked.
    pub(crate) fn of_volume(
        &self,
        root: &Path,
        policy: &Path,
        volume: VolumeId,
    ) -> Arc<VolumeKeys> {
        let mut guard = self.get(root, policy);
        let Some(loaded) = guard.as_mut() else {
            return Arc::default();
        };
        let (handle, made) = loaded.keys.of_volume(volume);
        if let Err(failed) = made {
            loaded.say(format!(
                "the keys of the store: {failed}. Nothing is compressed until that is mended"
            ));
        }
        handle
    }
}

impl Keys {
    /// Compares the files of keys on the disk, or those of a copy of the store in `copy`, with what is in use; what is damaged is written anew. In words.
    pub(crate) fn mend(&self, copy: Option<&Path>) -> Vec<String> {
        let guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let keys = guard.as_ref().map(|loaded| &loaded.keys);
        keys.map_or_else(Vec::new, |keys| match copy {
            Some(root) => keys.mend_in(root),
            None => keys.mend(),
        })
    }
}

impl Loaded {
    /// Said once.
    fn say(&mut self, text: String) {
        if text != self.said {
            eprintln!("varved: {text}");
            self.said = text;
        }
    }

    fn try_to_open(&mut self, policy: &Path) {
        self.tried = Some(Instant::now());
        if let Err(failed) = self.keys.refresh() {
            self.say(format!("the keys of the store: {failed}"));
        }
        let by_file = |info: KeysInfo| info.kind == SecretKind::KeyFile && !info.open;
        if !self.keys.info().is_some_and(by_file) {
            return;
        }
        let opened = StorePolicy::load(policy).and_then(|policy| match policy.key_file.as_str() {
            "" => Err("no key_file is named in the policy".to_owned()),
            named => read_key_file(Path::new(named)).and_then(|secret| {
                let opened = self.keys.unlock(&secret);
                opened.map_err(|why| format!("{named}: {why}"))
            }),
        });
        if let Err(why) = opened {
            self.say(format!("the store stays locked: {why}"));
        }
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
            let mut guard = self.keys.get(&root, &policy);
            let Some(Loaded { keys, .. }) = guard.as_mut() else {
                return Err(error(
                    "S016-not-encrypted",
                    "the store's keys are not there",
                ));
            };
            // What cannot be read is said whatever is asked.
            keys.refresh().map_err(wrong)?;
            match ask {
                KeysAsk::Status => {}
                KeysAsk::Init => keys.create(&secret).map_err(wrong)?,
                KeysAsk::Unlock => keys.unlock(&secret).map_err(wrong)?,
                KeysAsk::Rotate => keys.rotate(&secret).map_err(wrong)?,
                KeysAsk::Export if keys.info().is_some_and(|info| info.keys == 0) => {
                    return Err(error(
                        "X015-key",
                        "there is no key yet: each volume gets one when it is protected. Protect first, then export",
                    ));
                }
                KeysAsk::Export => {
                    let exported = keys.export(&secret).map_err(wrong)?;
                    file = exported.iter().map(|byte| format!("{byte:02x}")).collect();
                }
                KeysAsk::Exported if keys.note_exported().map_err(wrong)? => {}
                KeysAsk::Exported => {
                    return Err(error(
                        "X016-export",
                        "the file of keys was written, but not noted: varved was started anew meanwhile, or somebody else exported them at the same moment. If `varve key status` still says that keys were not exported, export them once more",
                    ));
                }
                KeysAsk::Import => status.imported = keys.import(rest, &secret).map_err(wrong)?,
            }
            if let Some(info) = keys.info() {
                status.encrypted = true;
                status.open = info.open;
                status.keys = info.keys;
                status.not_exported = keys.not_exported(None);
                status.kind = match info.kind {
                    SecretKind::Passphrase => "passphrase",
                    SecretKind::KeyFile => "key file",
                }
                .to_owned();
            }
        }
        // What waited for its key is opened anew, and known then.
        for id in &open {
            // One that is in use is opened anew later.
            if self.if_open(id, |store| store.waits_for_key()) == Some(true) {
                drop(self.stores_without(id));
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

impl Service {
    /// How many keys of a volume were never exported.
    pub(crate) fn keys_not_exported(&self, volume: VolumeId) -> usize {
        let (root, policy) = (self.paths().store(), self.paths().store_policy());
        let guard = self.keys.get(&root, &policy);
        let keys = guard.as_ref().map(|loaded| &loaded.keys);
        keys.map_or(0, |keys| keys.not_exported(Some(volume)))
    }

    /// Tries again what could not be read or opened.
    pub(crate) fn retry_keys(&self) {
        let (root, policy) = (self.paths().store(), self.paths().store_policy());
        drop(self.keys.get(&root, &policy));
    }
}
