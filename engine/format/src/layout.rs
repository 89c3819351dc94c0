//! Byte tables of every structure, for `FORMAT.md` and `varve dump --layout`; a test compares the two.

use crate::{
    BatchHeader, FrameEntry, KeptEntry, KeptHeader, KeysHeader, MapExtent, MapHeader, MapPageHead,
    Record, RunEntry, RunHeader, SavedBlock, SealedKey, SegmentFooter, SegmentHeader,
    SettledHeader, SpoolBatch, SpoolHead, StateSlot,
};
use std::fmt::Write;
use std::mem::offset_of;

macro_rules! table {
    ($out:expr, $title:literal, $type:ty, [$($field:ident),+ $(,)?]) => {{
        let mut starts = vec![$((offset_of!($type, $field), stringify!($field))),+];
        starts.sort_unstable();
        let _ = writeln!($out, "### {} ({} bytes)\n\n| offset | bytes | field |\n|---|---|---|", $title, size_of::<$type>());
        for (index, (start, name)) in starts.iter().enumerate() {
            let end = starts.get(index + 1).map_or(size_of::<$type>(), |next| next.0);
            let _ = writeln!($out, "| {start} | {} | {name} |", end - start);
        }
        let _ = writeln!($out);
    }};
}

/// The byte tables in Markdown.
#[must_use]
pub fn markdown() -> String {
    let mut out = String::new();
    table!(
        out,
        "Record",
        Record,
        [
            kind,
            flags,
            detail,
            reserved,
            time_delta_us,
            offset,
            length,
            payload_offset,
            payload_crc,
            argument,
            payload_bytes,
            reserved_2,
            reserved_3
        ]
    );
    table!(
        out,
        "Batch header",
        BatchHeader,
        [
            crc,
            magic,
            version,
            compat,
            incompat,
            volume,
            epoch,
            segment,
            block,
            payload_bytes,
            lsn_first,
            record_count,
            reserved,
            wall_time,
            previous_hash,
            reserved_2
        ]
    );
    table!(
        out,
        "Segment header",
        SegmentHeader,
        [
            crc,
            magic,
            version,
            compat,
            incompat,
            volume,
            epoch,
            parent_epoch,
            sequence,
            lsn_start,
            previous_lsn_end,
            previous_bytes,
            previous_hash,
            wall_time,
            volume_bytes,
            segment_bytes,
            sector_bytes,
            region_bytes,
            checkpoint_bytes,
            checkpoint_crc,
            oldest_held,
            reserved
        ]
    );
    table!(
        out,
        "Segment footer",
        SegmentFooter,
        [
            crc,
            magic,
            version,
            compat,
            incompat,
            volume,
            epoch,
            sequence,
            lsn_start,
            lsn_end,
            time_start,
            time_end,
            data_bytes,
            root,
            previous_lsn_end,
            reserved
        ]
    );
    table!(
        out,
        "Run header",
        RunHeader,
        [
            crc,
            magic,
            version,
            compat,
            incompat,
            volume,
            sequence,
            entry_count,
            entries_crc,
            events_crc,
            event_count,
            epoch,
            lsn_start,
            lsn_end,
            previous_lsn_end,
            time_start,
            time_end,
            data_bytes,
            root,
            volume_bytes,
            payload_bytes,
            sector_bytes,
            pruned_for,
            pruned_until,
            stored_at,
            reserved
        ]
    );
    table!(
        out,
        "Run entry",
        RunEntry,
        [
            lsn,
            offset,
            length,
            wall_time,
            payload,
            payload_crc,
            kind,
            flags,
            detail,
            reserved
        ]
    );
    table!(
        out,
        "Map header",
        MapHeader,
        [
            crc,
            magic,
            version,
            compat,
            incompat,
            volume,
            level,
            fences_crc,
            group,
            segment_count,
            extent_count,
            page_count,
            bitmap_bytes,
            bitmap_crc,
            reserved
        ]
    );
    table!(out, "Map page", MapPageHead, [crc, page, tag]);
    table!(
        out,
        "Map extent",
        MapExtent,
        [
            offset,
            length,
            lsn,
            segment,
            payload,
            payload_crc,
            payload_bytes,
            skip,
            kind,
            reserved
        ]
    );
    table!(
        out,
        "Settled segment header",
        SettledHeader,
        [
            crc,
            magic,
            version,
            compat,
            incompat,
            volume,
            sequence,
            data_bytes,
            kept_blocks,
            tables_at,
            tables_crc,
            tables_bytes,
            run_bytes,
            kept_root,
            key,
            salt,
            tables_tag,
            frame_blocks,
            reserved
        ]
    );
    table!(
        out,
        "Frame entry",
        FrameEntry,
        [offset, length, crc, codec, reserved]
    );
    table!(
        out,
        "Kept header",
        KeptHeader,
        [
            crc,
            magic,
            version,
            compat,
            incompat,
            volume,
            pruned_below,
            pruned_below_time,
            count,
            entries_crc,
            reserved
        ]
    );
    table!(
        out,
        "Keys header",
        KeysHeader,
        [
            crc,
            magic,
            version,
            compat,
            incompat,
            kind,
            reserved,
            memory_kib,
            passes,
            lanes,
            salt,
            entry_count,
            generation,
            reserved_2
        ]
    );
    table!(
        out,
        "Sealed key",
        SealedKey,
        [volume, id, created, nonce, reserved, sealed]
    );
    table!(out, "Kept entry", KeptEntry, [lsn, time, flags, reserved]);
    table!(
        out,
        "State slot",
        StateSlot,
        [
            crc,
            magic,
            version,
            kind,
            reserved,
            incompat,
            volume,
            epoch,
            generation,
            wall_time,
            volume_bytes,
            kernel_writes,
            content,
            boot,
            lsn_start,
            sequence,
            reserved_2
        ]
    );
    table!(
        out,
        "Spool head",
        SpoolHead,
        [
            crc,
            magic,
            version,
            reserved,
            incompat,
            spool,
            volume,
            volume_bytes,
            extents,
            reserved_2
        ]
    );
    table!(
        out,
        "Spool batch",
        SpoolBatch,
        [
            crc, magic, version, count, incompat, spool, sequence, page, generation, reserved,
            blocks, reserved_2
        ]
    );
    table!(out, "Saved block", SavedBlock, [block, crc, kind]);
    out
}
