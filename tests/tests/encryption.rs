//! Encrypted histories: nothing of them is to be read without the key, everything with it; what was tampered with is noticed; keys change without a loss.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use std::path::Path;
use std::process::Command;
use varve_format::{Lsn, SegmentSequence};
use varve_store::{
    Compression, Image, Secret, StoreError, StoreKeys, VolumeStore, volume_directory,
};
use varve_tests::sample::{
    Sample, VOLUME, files, frames_of, prune_to, read, scrub, scrub_stored, with_checksums,
};

const VOLUME_BYTES: u64 = 4 << 20;
const SEGMENT_BYTES: u64 = 256 << 10;
const MARKER: &[u8] = b"the secret of the house is kept in the third drawer";

fn passphrase(words: &str) -> Secret {
    Secret::Passphrase(words.as_bytes().to_vec().into())
}

fn key_file(byte: u8) -> Secret {
    Secret::KeyFile(vec![byte; 64].into())
}

fn open(root: &Path, secret: &Secret) -> Result<VolumeStore, StoreError> {
    let mut keys = StoreKeys::load(root);
    keys.unlock(secret)?;
    let (handle, made) = keys.of_volume(VOLUME);
    made?;
    VolumeStore::open_with(root, VOLUME, handle)
}

/// An encrypted store with a history; the marker is in it many times.
fn history(root: &Path, secret: &Secret) -> Sample {
    let mut keys = StoreKeys::load(root);
    keys.create(secret).unwrap();
    let store = VolumeStore::open_with(root, VOLUME, keys.of_volume(VOLUME).0).unwrap();
    let mut sample = Sample::with(store, VOLUME_BYTES, SEGMENT_BYTES, true);
    marked(&mut sample, 200);
    sample
}

fn marked(sample: &mut Sample, count: u64) {
    for number in 0..count {
        let mut page = MARKER.to_vec();
        page.extend_from_slice(&number.to_le_bytes());
        page.resize(4096, number as u8);
        sample.write(number * 4096 % VOLUME_BYTES, page);
        sample.mixed(4);
    }
}

/// How many files of the store hold the marker.
fn files_that_tell(root: &Path) -> usize {
    let holds = |bytes: &[u8]| bytes.windows(MARKER.len()).any(|part| part == MARKER);
    ["segments", "runs", "maps"]
        .iter()
        .flat_map(|kind| files(root, kind))
        .filter(|path| holds(&std::fs::read(path).unwrap()))
        .count()
}

fn encrypt_all(store: &mut VolumeStore) -> u64 {
    let (mut done, mut from) = (0, SegmentSequence(0));
    loop {
        let (job, next) = store
            .next_to_encrypt(Compression::Zstd(1), from, 5, &|_| false, &|_| false)
            .unwrap();
        match job {
            Some(job) => {
                let proved = job.compress(1).unwrap().prove().unwrap();
                store.replace(&proved).unwrap();
                done += 1;
            }
            None if next == from => return done,
            None => {}
        }
        from = next;
    }
}

#[test]
fn without_the_key_nothing_is_to_be_read_and_with_it_everything() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let mut sample = history(root, &passphrase("correct horse"));
    assert!(
        files_that_tell(root) > 0,
        "the marker is in no segment: nothing would be proved"
    );
    // Uncompressed, so that only encryption hides it.
    assert!(sample.settle_all(Compression::None) > 3);
    sample.map_all();
    assert_eq!(files_that_tell(root), 0);
    let end = sample.store.timeline().end();
    for lsn in [Lsn(5), Lsn(end.0 / 2), end] {
        assert!(read(&sample.store, lsn) == sample.image(lsn), "{lsn}");
    }
    assert!(scrub(&sample.store).damage.is_empty());
    let wanted = sample.image(end);
    drop(sample);
    // Another process, with the right secret, the wrong one, and none.
    assert!(read(&open(root, &passphrase("correct horse")).unwrap(), end) == wanted);
    for wrong in [passphrase("correct horse "), key_file(3)] {
        assert!(matches!(open(root, &wrong), Err(StoreError::WrongKey)));
    }
    let mut keys = StoreKeys::load(root);
    let mut store = VolumeStore::open_with(root, VOLUME, keys.of_volume(VOLUME).0).unwrap();
    let cannot = |store: &VolumeStore| {
        let later = matches!(Image::open(store, end), Err(StoreError::NoKey));
        // The first segment is not the one that is looked at first.
        later && matches!(Image::open(store, Lsn(5)), Err(StoreError::NoKey))
    };
    assert!(cannot(&store));
    assert!(matches!(
        store.next_to_encrypt(Compression::Lz4, SegmentSequence(0), 5, &|_| false, &|_| {
            false
        }),
        Err(StoreError::NoKey)
    ));
    // What is recorded while it is locked waits as it is.
    assert!(store.next_to_settle(Compression::Lz4, &|_| false).is_none());
    // The same store, once the keys are there.
    keys.unlock(&passphrase("correct horse")).unwrap();
    assert!(read(&store, end) == wanted);
    assert_eq!(encrypt_all(&mut store), 0, "all of it is encrypted already");
    // A store opened without regard to keys reads nothing of it either.
    drop(store);
    let store = VolumeStore::open(root, VOLUME).unwrap();
    assert!(cannot(&store));
    // Nor is it gone on with in the clear where keys are lost.
    assert!(matches!(store.encrypts(), Err(StoreError::NoKey)));
    drop(store);
    for name in ["keys", "keys-copy"] {
        std::fs::remove_file(root.join(name)).unwrap();
    }
    let mut keys = StoreKeys::load(root);
    let store = VolumeStore::open_with(root, VOLUME, keys.of_volume(VOLUME).0).unwrap();
    let _ = keys.of_volume(VOLUME);
    assert!(matches!(store.encrypts(), Err(StoreError::NoKey)));
}

#[test]
fn whoever_changes_a_file_and_its_checksums_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let secret = key_file(9);
    let mut sample = history(root, &secret);
    // As it is, so that nothing but a tag could tell a frame from another.
    sample.settle_all(Compression::None);
    let end = sample.store.timeline().end();
    drop(sample);
    let parsed = |path: &Path| {
        let whole = std::fs::read(path).unwrap();
        let header = varve_format::SettledHeader::parse(&whole[..4096], whole.len() as u64);
        (header.unwrap(), whole)
    };
    let path = files(root, "segments").into_iter();
    let path = path
        .max_by_key(|path| parsed(path).0.frame_count())
        .unwrap();
    let (header, whole) = parsed(&path);
    let tables = header.tables_at.get() as usize;
    let entry = |number: usize| tables + number * varve_format::FRAME_ENTRY_BYTES;
    assert!(
        with_checksums(whole.clone()) == whole,
        "the test makes checksums as the store does"
    );
    let mut flipped = whole.clone();
    flipped[5000] ^= 1;
    let mut swapped = whole.clone();
    let (first, second) = frames_of(&whole, 0, 1);
    assert_eq!(first.len(), second.len(), "as they are, and so of one size");
    for (one, other) in first.zip(second) {
        swapped.swap(one, other);
    }
    let mut moved = whole.clone();
    let blocks = entry(header.frame_count() as usize);
    for byte in 0..4 {
        moved.swap(blocks + byte, blocks + 400 + byte);
    }
    for (what, changed) in [
        ("a bit", flipped),
        ("two frames", swapped),
        ("two blocks", moved),
    ] {
        assert!(changed != whole, "{what}");
        std::fs::write(&path, with_checksums(changed)).unwrap();
        let store = open(root, &secret).unwrap();
        assert!(!scrub(&store).damage.is_empty(), "{what}");
        // By its tag, before any checksum of what is in it is looked at.
        let image = Image::open(&store, end).unwrap();
        let mut bytes = [0; 4096];
        let whys: Vec<String> = (0..image.bytes() / 4096)
            .filter_map(|block| image.read(block * 4096, &mut bytes).err())
            .map(|error| error.to_string())
            .collect();
        let by_tag = |why: &String| {
            why.contains("frame") || why.contains("checksum") && why.contains(".seg")
        };
        assert!(
            !whys.is_empty() && whys.iter().all(by_tag),
            "{what}: {whys:?}"
        );
    }
    std::fs::write(&path, &whole).unwrap();
    assert!(scrub(&open(root, &secret).unwrap()).damage.is_empty());
}

/// The list of keys that a history wants is only a list: damaged or unreadable, it neither locks the history nor lets it go on in the clear.
#[test]
fn a_list_of_keys_that_is_damaged_is_made_good_by_the_segments() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let secret = key_file(3);
    let mut sample = history(root, &secret);
    sample.settle_all(Compression::Lz4);
    let end = sample.store.timeline().end();
    let wanted = sample.image(end);
    drop(sample);
    let list = volume_directory(root, VOLUME).join("keys-used");
    let whole = std::fs::read(&list).unwrap();
    let check = |what: &str| {
        let store = open(root, &secret).unwrap();
        assert!(
            store.healed()[0].contains("keys-used"),
            "{what}: {:?}",
            store.healed()
        );
        assert!(read(&store, end) == wanted, "{what}");
        drop(store);
        // Without any key it is locked all the same, not in the clear.
        let store = VolumeStore::open(root, VOLUME).unwrap();
        assert!(
            store.encrypts().is_err() && Image::open(&store, end).is_err(),
            "{what}"
        );
    };
    let mut other = whole.clone();
    other[5] = if other[5] == b'0' { b'1' } else { b'0' };
    std::fs::write(&list, &other).unwrap();
    check("another key");
    std::fs::write(&list, [&b"zz"[..], &whole].concat()).unwrap();
    check("no key");
    std::fs::remove_file(&list).unwrap();
    std::fs::create_dir(&list).unwrap();
    check("unreadable");
}

#[test]
fn another_secret_opens_it_and_the_old_one_does_not() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let mut sample = history(root, &key_file(1));
    sample.settle_all(Compression::Lz4);
    let end = sample.store.timeline().end();
    let wanted = sample.image(end);
    drop(sample);
    let old = std::fs::read(root.join("keys")).unwrap();
    let mut keys = StoreKeys::load(root);
    assert!(matches!(
        keys.rotate(&passphrase("new")),
        Err(StoreError::NoKey)
    ));
    keys.unlock(&key_file(1)).unwrap();
    for weak in [passphrase(""), Secret::KeyFile(vec![1; 31].into())] {
        assert!(matches!(keys.rotate(&weak), Err(StoreError::WeakKey)));
    }
    keys.rotate(&passphrase("new")).unwrap();
    assert!(matches!(
        open(root, &key_file(1)),
        Err(StoreError::WrongKey)
    ));
    assert!(read(&open(root, &passphrase("new")).unwrap(), end) == wanted);
    // The process died between the two files: the newer one counts, whichever it is.
    for name in ["keys", "keys-copy"] {
        let new = std::fs::read(root.join(name)).unwrap();
        std::fs::write(root.join(name), &old).unwrap();
        assert!(open(root, &passphrase("new")).is_ok(), "{name}");
        assert!(
            std::fs::read(root.join("keys")).unwrap()
                == std::fs::read(root.join("keys-copy")).unwrap(),
            "the older one is left as it was: {name}"
        );
        assert!(std::fs::read(root.join(name)).unwrap() == new);
    }
    // One of the two is damaged, or lost.
    for name in ["keys", "keys-copy"] {
        let new = std::fs::read(root.join(name)).unwrap();
        let mut bad = new.clone();
        bad[200] ^= 1;
        std::fs::write(root.join(name), &bad).unwrap();
        assert!(open(root, &passphrase("new")).is_ok(), "{name}");
        assert!(
            std::fs::read(root.join(name)).unwrap() == new,
            "not made good: {name}"
        );
        std::fs::remove_file(root.join(name)).unwrap();
        assert!(open(root, &passphrase("new")).is_ok(), "{name}");
        assert!(
            std::fs::read(root.join(name)).unwrap() == new,
            "not made good: {name}"
        );
    }
    // No new keys over those that are there, whoever has looked before they were.
    let mut early = StoreKeys::load(&root.join("volumes"));
    assert!(early.info().is_none());
    for name in ["keys", "keys-copy"] {
        std::fs::copy(root.join(name), root.join("volumes").join(name)).unwrap();
    }
    assert!(matches!(
        early.create(&key_file(3)),
        Err(StoreError::HasKeys)
    ));
    for name in ["keys", "keys-copy"] {
        std::fs::remove_file(root.join("volumes").join(name)).unwrap();
    }
    // A change of which only half can be written is none.
    let copy = root.join("keys-copy");
    let whole = std::fs::read(&copy).unwrap();
    let mut keys = StoreKeys::load(root);
    keys.unlock(&passphrase("new")).unwrap();
    std::fs::remove_file(&copy).unwrap();
    std::fs::create_dir_all(copy.join("in the way")).unwrap();
    assert!(keys.rotate(&passphrase("newer")).is_err());
    std::fs::remove_dir_all(&copy).unwrap();
    std::fs::write(&copy, &whole).unwrap();
    assert!(open(root, &passphrase("newer")).is_err());
    assert!(read(&open(root, &passphrase("new")).unwrap(), end) == wanted);
    assert!(matches!(
        keys.rotate(&passphrase("new")),
        Err(StoreError::SameSecret)
    ));
    // Both are damaged: that is said, and no new keys are made in their place.
    for name in ["keys", "keys-copy"] {
        let mut bad = std::fs::read(root.join(name)).unwrap();
        bad[200] ^= 1;
        std::fs::write(root.join(name), &bad).unwrap();
    }
    let mut keys = StoreKeys::load(root);
    assert!(matches!(keys.refresh(), Err(StoreError::Damaged(..))));
    assert!(matches!(
        keys.create(&key_file(1)),
        Err(StoreError::Damaged(..))
    ));
    // What is recorded meanwhile is not written in the clear.
    let store = VolumeStore::open_with(root, VOLUME, keys.of_volume(VOLUME).0).unwrap();
    assert!(matches!(store.encrypts(), Err(StoreError::NoKey)));
}

/// What a disk has spoilt is found without keys, and what is whole is not called damaged.
#[test]
fn what_is_stored_is_compared_without_its_key() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let mut sample = history(root, &key_file(1));
    sample.settle_all(Compression::Lz4);
    drop(sample);
    let flip = |path: &Path, at: usize| {
        let mut bytes = std::fs::read(path).unwrap();
        bytes[at] ^= 8;
        std::fs::write(path, bytes).unwrap();
    };
    let handle = StoreKeys::load(root).of_volume(VOLUME).0;
    let store = VolumeStore::open_with(root, VOLUME, handle).unwrap();
    assert!(store.encrypts().is_err_and(|error| error.wants_key()));
    assert_eq!(scrub_stored(&store).damage, []);
    // A frame; and the last record of a run.
    let (segment, run) = (&files(root, "segments")[1], &files(root, "runs")[1]);
    let end = std::fs::metadata(run).unwrap().len() as usize;
    for (path, at, loses) in [(segment, 4096 + 100, true), (run, end - 50, false)] {
        flip(path, at);
        let damage = scrub_stored(&store).damage;
        assert_eq!(damage.len(), 1, "{}: {damage:?}", path.display());
        assert!(damage[0].what.contains("varve key unlock"), "{damage:?}");
        let told = (damage[0].from.is_some(), !damage[0].blocks.is_empty());
        assert_eq!(told, (loses, loses), "{damage:?}");
        // The quick check does not look at frames, and knows no more of a run.
        let quick = store.scrub().structure();
        assert_eq!(quick.len(), usize::from(!loses), "{quick:?}");
        assert!(
            quick.iter().all(|damage| damage.blocks.is_empty()),
            "{quick:?}"
        );
        flip(path, at);
    }
    // Both: no more can be told than that at most all of it is lost.
    flip(segment, 4096 + 100);
    flip(run, end - 50);
    let damage = scrub_stored(&store).damage;
    assert!(!damage[0].blocks.is_empty(), "{damage:?}");
    flip(segment, 4096 + 100);
    flip(run, end - 50);
    assert_eq!(scrub_stored(&store).damage, []);
}

#[test]
fn keys_that_were_exported_open_what_is_left_of_a_store() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let mut sample = history(root, &key_file(1));
    sample.settle_all(Compression::Lz4);
    let end = sample.store.timeline().end();
    let wanted = sample.image(end);
    drop(sample);
    let mut keys = StoreKeys::load(root);
    assert!(matches!(
        keys.export(&passphrase("rescue")),
        Err(StoreError::NoKey)
    ));
    keys.unlock(&key_file(1)).unwrap();
    let exported = keys.export(&passphrase("rescue")).unwrap();
    assert_eq!(keys.not_exported(Some(VOLUME)), 1);
    assert!(keys.note_exported().unwrap());
    assert_eq!(keys.not_exported(Some(VOLUME)), 0);
    drop(keys);
    // It is known while they are locked, too.
    assert_eq!(StoreKeys::load(root).not_exported(None), 0);
    for name in ["keys", "keys-copy", "keys-exported"] {
        std::fs::remove_file(root.join(name)).unwrap();
    }
    let mut keys = StoreKeys::load(root);
    assert!(!keys.note_exported().unwrap(), "it knows of no file");
    assert!(keys.info().is_none());
    keys.create(&key_file(2)).unwrap();
    assert!(matches!(
        keys.import(&exported, &passphrase("rescu")),
        Err(StoreError::WrongKey)
    ));
    assert!(matches!(
        keys.import(&exported[..100], &passphrase("rescue")),
        Err(StoreError::Damaged(..))
    ));
    // A key was made for the volume meanwhile: that one stays for what is new.
    let handle = keys.of_volume(VOLUME).0;
    let store = VolumeStore::open_with(root, VOLUME, handle).unwrap();
    // Its keys are open, and not those that this history wants: that is known before anything is read.
    assert!(matches!(
        Image::open(&store, end),
        Err(StoreError::OtherKey)
    ));
    assert_eq!(keys.import(&exported, &passphrase("rescue")).unwrap(), 1);
    assert_eq!(keys.import(&exported, &passphrase("rescue")).unwrap(), 0);
    assert_eq!((keys.not_exported(None), keys.info().unwrap().keys), (1, 2));
    assert!(read(&store, end) == wanted);
    drop(store);
    assert!(read(&open(root, &key_file(2)).unwrap(), end) == wanted);
}

/// Keys of two times: the newest segment opens, older ones do not.
#[test]
fn a_key_that_is_missing_is_known_before_anything_is_begun() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let mut sample = history(root, &key_file(1));
    let count = sample.store.segments().count();
    // All but the newest one are encrypted with the first key.
    for _ in 1..count {
        let job = sample.store.next_to_settle(Compression::Lz4, &|_| false);
        let proved = job.unwrap().compress(1).unwrap().prove().unwrap();
        sample.store.replace(&proved).unwrap();
    }
    drop(sample);
    for name in ["keys", "keys-copy"] {
        std::fs::remove_file(root.join(name)).unwrap();
    }
    let mut keys = StoreKeys::load(root);
    keys.create(&key_file(2)).unwrap();
    let handle = keys.of_volume(VOLUME).0;
    let mut store = VolumeStore::open_with(root, VOLUME, handle.clone()).unwrap();
    // The newest one with the new key: what is asked first opens.
    let job = store.next_to_settle(Compression::Lz4, &|_| false).unwrap();
    let proved = job.compress(1).unwrap().prove().unwrap();
    store.replace(&proved).unwrap();
    drop(store);
    let mut store = VolumeStore::open_with(root, VOLUME, handle).unwrap();
    let end = store.timeline().end();
    assert!(matches!(
        Image::open(&store, end),
        Err(StoreError::OtherKey)
    ));
    assert!(matches!(
        store.refuse_without_key(Lsn(2)),
        Err(StoreError::OtherKey)
    ));
    assert!(
        store.encrypts().unwrap(),
        "what is new is encrypted with the new key"
    );
    assert!(store.next_to_settle(Compression::Lz4, &|_| false).is_none());
    assert_eq!(encrypt_all(&mut store), 0);
}

/// A run is lost while the store is locked: its segment is not taken for lost.
#[test]
fn what_waits_for_its_key_is_no_hole() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let secret = passphrase("later");
    let mut sample = history(root, &secret);
    sample.settle_all(Compression::Lz4);
    assert!(sample.map_all() > 0);
    let end = sample.store.timeline().end();
    let wanted = sample.image(end);
    drop(sample);
    let maps = files(root, "maps");
    std::fs::remove_file(&files(root, "runs")[1]).unwrap();
    let mut keys = StoreKeys::load(root);
    let store = VolumeStore::open_with(root, VOLUME, keys.of_volume(VOLUME).0).unwrap();
    assert!(store.waits_for_key());
    let told = scrub_stored(&store).damage;
    let hole = told.iter().find(|damage| damage.what.contains("hole"));
    assert!(
        hole.is_some_and(|hole| hole.what.contains("varve key unlock")),
        "{told:?}"
    );
    drop(store);
    assert!(files(root, "maps") == maps, "maps were given up for a key");
    keys.unlock(&secret).unwrap();
    let store = VolumeStore::open_with(root, VOLUME, keys.of_volume(VOLUME).0).unwrap();
    assert!(!store.waits_for_key() && store.timeline().check(end).is_ok());
    assert!(read(&store, end) == wanted);
}

#[test]
fn what_was_plain_becomes_encrypted_pruned_or_not() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let mut sample = Sample::new(root, VOLUME_BYTES, SEGMENT_BYTES, true);
    marked(&mut sample, 150);
    sample.settle_all(Compression::None);
    assert!(files_that_tell(root) > 0);
    let end = sample.store.timeline().end();
    assert!(prune_to(&mut sample.store, 10, Compression::None).unwrap() > 0);
    let wanted = sample.image(end);
    drop(sample);
    let mut keys = StoreKeys::load(root);
    keys.create(&key_file(5)).unwrap();
    let mut store = VolumeStore::open_with(root, VOLUME, keys.of_volume(VOLUME).0).unwrap();
    let count = store.segments().count() as u64;
    assert!(read(&store, end) == wanted, "what is plain still reads");
    assert_eq!(encrypt_all(&mut store), count);
    assert_eq!(files_that_tell(root), 0);
    assert!(read(&store, end) == wanted);
    assert!(scrub(&store).damage.is_empty());
    assert_eq!(encrypt_all(&mut store), 0);
    drop(store);
    // Somebody else reads it, by the documents alone: with the key file, then with a passphrase.
    let read_by_another = |secret: &[u8]| {
        let (file, out) = (root.join("secret"), root.join("out"));
        std::fs::write(&file, secret).unwrap();
        let _ = std::fs::remove_file(&out);
        let reader = Command::new("python3")
            .arg(varve_tests::guest::repository().join("tests/reader.py"))
            .arg(volume_directory(root, VOLUME))
            .arg(end.to_string())
            .arg(&out)
            .arg(root.join("keys"))
            .arg(&file)
            .output()
            .unwrap();
        match reader.status.success() {
            true => Ok(std::fs::read(&out).unwrap()),
            false => Err(String::from_utf8_lossy(&reader.stderr).into_owned()),
        }
    };
    assert!(read_by_another(&[5; 64]).unwrap() == wanted);
    keys.rotate(&Secret::Passphrase(b"what nobody knows".to_vec().into()))
        .unwrap();
    assert!(read_by_another(b"what nobody knows").unwrap() == wanted);
    let refused = read_by_another(b"what nobody knew").unwrap_err();
    assert!(refused.contains("wrong key"), "{refused}");
}
