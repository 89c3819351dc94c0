//! Tests of the format: round trips, hostile bytes, and `FORMAT.md` against the code.

use crate::{
    BATCH_HEADER_BYTES, BatchHeader, BatchPosition, BatchView, Checkpoint, EpochId, Fingerprint,
    FormatError, Hash128, Lsn, MapHeader, Record, RecordKind, RunHeader, SavedBlock, SavedKind,
    SegmentFooter, SegmentHeader, SegmentSequence, SettledHeader, SpanKind, SpoolBatch, SpoolHead,
    StateKind, StateSlot, VolumeId, VolumeState, WallTime, layout, payload_crc,
};
use proptest::prelude::{any, prop, proptest};
use zerocopy::IntoBytes;
use zerocopy::little_endian::U32;

fn position() -> BatchPosition {
    BatchPosition {
        volume: VolumeId([1; 16]),
        epoch: EpochId([2; 16]),
        segment: SegmentSequence(3),
        block: 4,
    }
}

fn sample_batch() -> (Vec<u8>, Vec<u8>) {
    let payload: Vec<u8> = (0..1024u32).map(|i| i as u8).collect();
    let mut block = vec![0u8; BATCH_HEADER_BYTES];
    let mut record = Record::new(RecordKind::Write, 8192, 1024, 0);
    record.payload_bytes = U32::new(1024);
    record.payload_crc = U32::new(payload_crc(position().epoch, Lsn(7), &payload));
    block[BatchHeader::record_range(0)].copy_from_slice(record.as_bytes());
    BatchHeader::new(position(), Lsn(7), WallTime(99), Hash128([5; 16])).seal(&mut block, 1, 1024);
    (block, payload)
}

#[test]
fn batch_survives_a_round_trip() {
    let (block, payload) = sample_batch();
    let view = BatchView::parse(&block).unwrap();
    view.check_position(position()).unwrap();
    view.check_payload(&payload).unwrap();
    assert_eq!(view.lsn_end(), Lsn(8));
    assert_eq!(view.stored_bytes(), 8192);
}

#[test]
fn every_bit_flip_in_a_batch_header_is_noticed() {
    let (mut block, _) = sample_batch();
    for bit in 0..block.len() * 8 {
        block[bit / 8] ^= 1 << (bit % 8);
        assert!(BatchView::parse(&block).is_err(), "bit {bit}");
        block[bit / 8] ^= 1 << (bit % 8);
    }
}

#[test]
fn every_bit_flip_in_a_payload_is_noticed() {
    let (block, mut payload) = sample_batch();
    let view = BatchView::parse(&block).unwrap();
    for bit in 0..payload.len() * 8 {
        payload[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(
            view.check_payload(&payload),
            Err((0, FormatError::Checksum))
        );
        payload[bit / 8] ^= 1 << (bit % 8);
    }
}

#[test]
fn batch_of_another_place_is_foreign() {
    let (block, _) = sample_batch();
    let view = BatchView::parse(&block).unwrap();
    let mut wrong = position();
    wrong.block = 5;
    assert_eq!(
        view.check_position(wrong),
        Err(FormatError::Foreign("place in its segment"))
    );
    wrong = position();
    wrong.epoch = EpochId([9; 16]);
    assert_eq!(
        view.check_position(wrong),
        Err(FormatError::Foreign("epoch"))
    );
}

#[test]
fn newer_version_is_refused_by_name() {
    let mut header = SegmentHeader::empty();
    header.region_bytes = U32::new(4096);
    header.version = 9.into();
    assert_eq!(
        SegmentHeader::parse(&header.to_block()).unwrap_err(),
        FormatError::Newer {
            version: 9,
            incompat: 0
        }
    );
}

#[test]
fn checkpoint_survives_a_round_trip() {
    let checkpoint = Checkpoint {
        stable_lsn: Lsn(10),
        span: Some((SpanKind::Resync, Lsn(4), 17)),
        copy_cursor: 77,
        state: VolumeState::Healing,
        regions: vec![1, 5, 9],
    };
    let mut bytes = Vec::new();
    checkpoint.encode_into(&mut bytes);
    assert_eq!(Checkpoint::parse(&bytes).unwrap(), checkpoint);
    assert!(Checkpoint::parse(&bytes[..bytes.len() - 1]).is_err());
}

#[test]
fn state_slot_survives_a_round_trip_and_no_bit_flip() {
    let mut block = StateSlot::encode(
        StateKind::Bypass,
        VolumeId([1; 16]),
        EpochId([2; 16]),
        5,
        WallTime(6),
        (Lsn(1), SegmentSequence(1)),
        Fingerprint::default(),
    );
    assert_eq!(
        StateSlot::parse(&block).unwrap().kind().unwrap(),
        StateKind::Bypass
    );
    for bit in 0..block.len() * 8 {
        block[bit / 8] ^= 1 << (bit % 8);
        assert!(StateSlot::parse(&block).is_err(), "bit {bit}");
        block[bit / 8] ^= 1 << (bit % 8);
    }
}

/// Magics of everything that has a head.
const MAGICS: [&[u8; 4]; 10] = [
    b"VSEG", b"VEND", b"VRUN", b"VMAP", b"VSET", b"VKPT", b"VKEY", b"VSTA", b"VSPO", b"VSPB",
];

/// Reads bytes, whose checksum over the first `head` is made right, as everything that they could be.
fn parse_heads(bytes: &mut [u8], head: usize, file_bytes: u64) {
    let crc = crate::crc32c(&bytes[4..head]);
    bytes[..4].copy_from_slice(&crc.to_le_bytes());
    let length = bytes.len() as u64;
    let _ = SegmentHeader::parse(bytes);
    let _ = SegmentFooter::parse(bytes);
    let _ = StateSlot::parse(bytes);
    let _ = SpoolHead::parse(bytes);
    let _ = SpoolBatch::parse(bytes, [0; 16], 0);
    for length in [length, file_bytes] {
        let _ = RunHeader::parse(bytes, length);
        let _ = MapHeader::parse(bytes, length);
        if let Ok(mut header) = SettledHeader::parse(bytes, length) {
            let tables = bytes.get(header.tables_at.get() as usize..);
            if let Some(tables) = tables {
                header.tables_crc = crate::crc32c(tables).into();
                let _ = crate::parse_settled_tables(&header, tables);
            }
        }
    }
    let _ = crate::parse_kept(bytes);
    let _ = crate::parse_keys(bytes);
}

proptest! {
    #[test]
    fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..9000)) {
        let _ = BatchView::parse(&bytes);
        let _ = SegmentHeader::parse(&bytes);
        let _ = SegmentFooter::parse(&bytes);
        let _ = StateSlot::parse(&bytes);
        let _ = Checkpoint::parse(&bytes);
        let _ = RunHeader::parse(&bytes, bytes.len() as u64);
        let _ = MapHeader::parse(&bytes, bytes.len() as u64);
        let _ = crate::parse_map_page(&bytes, 0, 0, 3);
        let _ = SettledHeader::parse(&bytes, bytes.len() as u64);
    }

    /// The same of the heads of files, each behind its own magic and version.
    #[test]
    fn hostile_heads_never_panic(
        magic in 0usize..MAGICS.len(),
        patches in prop::collection::vec((10usize..4096, any::<u8>()), 0..40),
        small in prop::collection::vec((10usize..400, 0u8..3), 0..20),
        more in prop::collection::vec(any::<u8>(), 0..9000),
        file_bytes in any::<u64>(),
    ) {
        let mut bytes = vec![0u8; 4096];
        bytes[4..8].copy_from_slice(MAGICS[magic]);
        bytes[8] = crate::VERSION as u8;
        for (at, value) in patches.into_iter().chain(small) { bytes[at] = value; }
        bytes.extend_from_slice(&more);
        parse_heads(&mut bytes, 4096, file_bytes);
        // What is shorter than a block has its checksum over all of it.
        let whole = bytes.len();
        parse_heads(&mut bytes, whole, file_bytes);
    }

    /// With a right checksum the fields themselves are hostile.
    #[test]
    fn hostile_fields_never_panic(patches in prop::collection::vec((4usize..4096, any::<u8>()), 0..40)) {
        let (mut block, payload) = sample_batch();
        for (at, value) in patches { block[at] = value; }
        let crc = crate::crc32c(&block[4..]);
        block[..4].copy_from_slice(&crc.to_le_bytes());
        if let Ok(view) = BatchView::parse(&block) {
            let _ = view.check_payload(&payload);
            view.records().iter().for_each(|record| {
                let _ = view.time_of(record);
            });
        }
    }
}

#[test]
fn format_md_holds_the_tables_of_this_code() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/FORMAT.md");
    let text = std::fs::read_to_string(path).unwrap();
    assert!(
        text.contains(&layout::markdown()),
        "FORMAT.md is out of date: replace its tables by `varve dump --layout`"
    );
}

#[test]
fn spool_pages_survive_a_round_trip_and_every_bit_flip_is_noticed() {
    let head = SpoolHead::new([7; 16], VolumeId([1; 16]), 1 << 30, 4096);
    let blocks = [SavedBlock::new(9, 5, SavedKind::Saved); 3];
    let batch = SpoolBatch::new([7; 16], 11, 64, 2, &blocks);
    assert_eq!(
        SpoolHead::parse(head.as_bytes()).unwrap().as_bytes(),
        head.as_bytes()
    );
    let read = SpoolBatch::parse(batch.as_bytes(), [7; 16], 64).unwrap();
    assert_eq!(read.as_bytes(), batch.as_bytes());
    assert_eq!(read.blocks().len(), 3);
    let foreign = |spool, at| SpoolBatch::parse(batch.as_bytes(), spool, at).unwrap_err();
    assert_eq!(foreign([8; 16], 64), FormatError::Foreign("spool"));
    assert_eq!(foreign([7; 16], 128), FormatError::Foreign("place"));
    for (page, parses) in [
        (
            head.as_bytes().to_vec(),
            (|page: &[u8]| SpoolHead::parse(page).is_ok()) as fn(&[u8]) -> bool,
        ),
        (batch.as_bytes().to_vec(), |page| {
            SpoolBatch::parse(page, [7; 16], 64).is_ok()
        }),
    ] {
        let mut page = page;
        for bit in 0..page.len() * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(!parses(&page), "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

#[test]
fn a_batch_that_would_leave_its_extent_is_refused() {
    let block = SavedBlock::new(0, 0, SavedKind::Saved);
    let near_the_end = SpoolBatch::new([7; 16], 1, 62, 1, &[block; 2]);
    let refused = SpoolBatch::parse(near_the_end.as_bytes(), [7; 16], 62).unwrap_err();
    assert_eq!(refused, FormatError::Field("spool_batch.count"));
}
