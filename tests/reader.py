#!/usr/bin/env python3
"""Restores the image of any instant from a store. Written from FORMAT.md alone, and shares nothing with Varve but that.

  reader.py VOLUME_DIRECTORY LSN OUTPUT [KEYS KEY_FILE]

KEYS is the store's file of keys, KEY_FILE what opens it (the key file, or a file that holds the passphrase and nothing else), if the history is encrypted.

It reads segments, sealed, settled or pruned, and the lists of kept instants, and nothing else: no runs, no maps. It checks every checksum that lies
on its way, and refuses an instant that does not resolve.
Needs: Python 3.8; the `zstd` and `lz4` formats through libzstd and liblz4, AES through libcrypto, Argon2id through libargon2
(the shared libraries, by ctypes).
"""

import ctypes
import ctypes.util
import hashlib
import hmac
import os
import struct
import sys

BLOCK = 4096


def make_table():
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


TABLE = make_table()


def crc32c(data, crc=0):
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def must(holds, what):
    if not holds:
        sys.exit(f"reader: {what}")


def head(block, magic, what, known=0):
    """Every structure begins alike: CRC, magic, version, compat, incompat. Gives the features that a reader must know."""
    crc, found, version, _, incompat = struct.unpack_from("<I4sHHI", block)
    must(found == magic, f"{what}: not {magic}")
    must(crc32c(block[4:]) == crc, f"{what}: checksum")
    must(version <= 1 and incompat & ~known == 0, f"{what}: newer than this reader")
    return incompat


def library(name):
    path = ctypes.util.find_library(name)
    must(path, f"lib{name} is not installed")
    return ctypes.CDLL(path)


def unpack(codec, stored, whole):
    if codec == 0:
        return stored
    target = ctypes.create_string_buffer(whole)
    if codec == 1:
        done = library("lz4").LZ4_decompress_safe(stored, target, len(stored), whole)
    else:
        function = library("zstd").ZSTD_decompress
        function.restype = ctypes.c_size_t
        function.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
        done = function(target, whole, stored, len(stored))
    must(done == whole, "a frame does not unpack to its size")
    return target.raw


def hkdf(secret, salt, info):
    """HKDF-SHA-256 to 32 bytes."""
    extracted = hmac.new(salt, secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def argon2id(secret, salt, memory_kib, passes, lanes):
    """Argon2id, version 0x13, to 32 bytes."""
    out = ctypes.create_string_buffer(32)
    size, number = ctypes.c_size_t, ctypes.c_uint32
    done = library("argon2").argon2id_hash_raw(
        number(passes), number(memory_kib), number(lanes), secret, size(len(secret)), salt, size(len(salt)), out, size(32)
    )
    must(done == 0, "keys: Argon2id refuses these numbers")
    return out.raw


def decrypt(key, nonce, about, stored, what):
    """AES-256-GCM; the tag is at the end."""
    crypto = library("crypto")
    for name in ("EVP_CIPHER_CTX_new", "EVP_aes_256_gcm"):
        getattr(crypto, name).restype = ctypes.c_void_p
    context, length = ctypes.c_void_p(crypto.EVP_CIPHER_CTX_new()), ctypes.c_int()
    cipher = ctypes.c_void_p(crypto.EVP_aes_256_gcm())
    body, tag = stored[:-16], stored[-16:]
    out, rest = ctypes.create_string_buffer(len(body) + 16), ctypes.create_string_buffer(16)
    crypto.EVP_DecryptInit_ex(context, cipher, None, key, nonce)
    crypto.EVP_DecryptUpdate(context, None, ctypes.byref(length), about, len(about))
    crypto.EVP_DecryptUpdate(context, out, ctypes.byref(length), body, len(body))
    crypto.EVP_CIPHER_CTX_ctrl(context, 0x11, 16, tag)
    good = crypto.EVP_DecryptFinal_ex(context, rest, ctypes.byref(length))
    crypto.EVP_CIPHER_CTX_free(context)
    must(good == 1, f"{what}: not what was encrypted, or the wrong key")
    return out.raw[: len(body)]


def whole(block, magic):
    """Whether a structure is what it should be, as far as its beginning tells."""
    return len(block) >= 16 and block[4:8] == magic and crc32c(block[4:]) == struct.unpack_from("<I", block)[0]


def contents(paths):
    """The bytes of those of the files that are there."""
    for path in paths:
        if os.path.exists(path):
            with open(path, "rb") as file:
                yield file.read()


def keys_of(path, key_file):
    """The keys of volumes, by their names."""
    found = [data for data in contents([path, path + "-copy"]) if whole(data, b"VKEY")]
    must(found, "keys: neither file is whole")
    generation = FIELDS["keys header"]["generation"]
    data = max(found, key=lambda data: struct.unpack_from("<Q", data, generation)[0])
    head(data, b"VKEY", "keys")
    fields, entry = FIELDS["keys header"], FIELDS["sealed key"]
    kind, salt = data[fields["kind"]], data[fields["salt"] :][:32]
    must(kind in (1, 2), "keys: this kind is not known here")
    with open(key_file, "rb") as file:
        secret = file.read()
    if kind == 1:
        costs = (struct.unpack_from("<I", data, fields[name])[0] for name in ("memory_kib", "passes", "lanes"))
        sealing = argon2id(secret, salt, *costs)
    else:
        sealing = hkdf(secret, salt, b"varve key file 1")
    keys = {}
    for at in range(128, len(data), 104):
        one = data[at : at + 104]
        opened = decrypt(sealing, one[entry["nonce"] :][:12], one[:40], one[entry["sealed"] :][:48], "keys")
        keys[one[entry["id"] :][:16]] = opened
    return keys


def settled(data, name):
    """The bytes of the sealed segment, out of a settled one; and of a pruned one its run."""
    features = head(data[:BLOCK], b"VSET", name, known=7)
    pruned, encrypted = features & 1, features & 2
    sequence, data_bytes, kept, tables_at, tables_crc, tables_bytes, run_bytes = struct.unpack_from("<QQQQIQQ", data, 32)
    in_frame = struct.unpack_from("<I", data, FIELDS["settled segment header"]["frame_blocks"])[0] if features & 4 else 16
    must(1 <= in_frame <= 64, f"{name}: blocks of a frame")
    frame_count, block_count = (kept + in_frame - 1) // in_frame, data_bytes // BLOCK
    tables, run = data[tables_at : len(data) - BLOCK], None
    if pruned:
        must(len(tables) == tables_bytes + run_bytes, f"{name}: size of tables and run")
        tables, run = tables[:tables_bytes], tables[tables_bytes:]
        tables = unpack(2, tables, frame_count * 24 + block_count * 4)
    must(len(tables) == frame_count * 24 + block_count * 4, f"{name}: size of tables")
    must(crc32c(tables) == tables_crc, f"{name}: checksum of tables")
    if encrypted:
        fields, footer, end = FIELDS["settled segment header"], FIELDS["segment footer"], data[-BLOCK:]
        key = KEYS.get(data[fields["key"] :][:16])
        must(key, f"{name}: its key is not among those")
        file_key = hkdf(key, data[fields["salt"] :][:32], b"varve file key 1")
        context = end[footer["volume"] :][:16] + end[footer["epoch"] :][:16]
        for field in ("lsn_start", "lsn_end", "sequence"):
            context += end[footer[field] :][:8]
        sizes = struct.pack("<IQQQ", features, data_bytes, kept, tables_at)
        sizes += struct.pack("<I", in_frame) if features & 4 else b""
        about = b"varve tables 1" + context + sizes + tables + (run or b"")
        decrypt(file_key, b"\xff" * 12, about, data[fields["tables_tag"] :][:16], f"{name}: tables")
    frames = []
    for number in range(frame_count):
        offset, length, crc, codec = struct.unpack_from("<QIIB", tables, number * 24)
        stored = data[offset : offset + length]
        must(crc32c(stored + struct.pack("<QQ", sequence, number)) == crc, f"{name}: frame {number}")
        if encrypted:
            about = b"varve frame 1" + context + struct.pack("<Q", number)
            stored = decrypt(file_key, struct.pack("<QI", number, 0), about, stored, f"{name}: frame {number}")
        frames.append(unpack(codec, stored, min(in_frame, kept - number * in_frame) * BLOCK))
    out = bytearray()
    for number in struct.unpack_from(f"<{block_count}I", tables, frame_count * 24):
        if number >= 0xFFFFFFFE:  # Zero, or gone: no record of the run touches it.
            out += bytes(BLOCK)
        else:
            out += frames[number // in_frame][number % in_frame * BLOCK :][:BLOCK]
    return bytes(out), run


def segment(path):
    """What a segment's file says of it, and its records."""
    with open(path, "rb") as file:
        data = file.read()
    name = os.path.basename(path)
    footer = data[-BLOCK:]
    head(footer, b"VEND", f"{name}: footer")
    if data[4:8] == b"VSET":
        data, run = settled(data, name)
        if run is not None:
            head(run[:BLOCK], b"VRUN", f"{name}: run")
            (pruned_until,) = struct.unpack_from("<Q", run, FIELDS["run header"]["pruned_until"])
            return said(run, "run header", footer) + [pruned_until], run_records(run, data)
    else:
        data = data[:-BLOCK]
    head(data[:BLOCK], b"VSEG", name)
    return said(data, "segment header", footer) + [0], records(data)


def said(block, table, footer):
    names = ("lsn_start", "previous_lsn_end", "volume_bytes")
    (end,) = struct.unpack_from("<Q", footer, FIELDS["segment footer"]["lsn_end"])
    return [struct.unpack_from("<Q", block, FIELDS[table][name])[0] for name in names] + [end]


def run_records(run, data):
    """The same of a pruned segment, by the run that it carries."""
    fields = FIELDS["run header"]
    (count,) = struct.unpack_from("<Q", run, fields["entry_count"])
    (crc,) = struct.unpack_from("<I", run, fields["entries_crc"])
    epoch = run[fields["epoch"] :][:16]
    entries = run[BLOCK : BLOCK + count * 48]
    must(crc32c(entries) == crc, "run: entries")
    for index in range(count):
        lsn, offset, length, _, at, crc, kind, _, detail = struct.unpack_from("<QQQqQIBBB", entries, index * 48)
        payload = data[at : at + length] if kind == 1 else b""
        if payload:
            must(crc32c(payload + epoch + struct.pack("<Q", lsn)) == crc, f"LSN {lsn}: payload")
        yield lsn, kind, detail, offset, length, payload


def kept(folder, limit, pruned_until):
    """Whether retention has left the instant."""
    fields = FIELDS["kept header"]
    for data in contents([f"{folder}/kept", f"{folder}/kept-copy"]):
        (crc,) = struct.unpack_from("<I", data.ljust(BLOCK, b"\0"), fields["entries_crc"])
        if not whole(data[:BLOCK], b"VKPT") or crc32c(data[BLOCK:]) != crc:
            continue
        head(data[:BLOCK], b"VKPT", "kept")
        (below,) = struct.unpack_from("<Q", data, fields["pruned_below"])
        if below < pruned_until:
            break
        return limit >= below or any(lsn == limit for lsn, _ in struct.iter_unpack("<Q16s", data[BLOCK:]))
    return limit >= pruned_until


class Timeline:
    """Whether an instant resolves, as far as segments and their spans tell."""

    def __init__(self, limit):
        self.limit, self.end = limit, 1
        self.hole = self.full_copy = self.open = self.copied = self.given_up = False

    def segment(self, start, before, end, spans):
        """The next segment; spans: (LSN, begins, detail)."""
        if before != self.end:
            self.hole, self.full_copy, self.open = True, False, True
        elif start > before and not self.open:
            self.given_up = before < self.limit <= start
            self.open = start < self.limit and any(begins for _, begins, _ in spans)
        self.end = end
        for lsn, begins, detail in spans:
            if lsn >= self.limit:
                continue
            if begins:
                self.open, self.full_copy = True, detail in (1, 4)
            elif not self.hole or self.full_copy:
                self.hole = self.open = False
                self.copied = True

    def resolves(self):
        return self.copied and not self.open and not self.hole and not self.given_up and self.limit <= self.end


def records(data):
    """(LSN, kind, detail, offset, length, payload) of each record."""
    epoch = data[32:48]
    (lsn_start,) = struct.unpack_from("<Q", data, FIELDS["segment header"]["lsn_start"])
    (checkpoint,) = struct.unpack_from("<I", data, FIELDS["segment header"]["checkpoint_bytes"])
    at = BLOCK + (checkpoint + BLOCK - 1) // BLOCK * BLOCK
    expected = lsn_start
    while at + BLOCK <= len(data):
        block = data[at : at + BLOCK]
        head(block, b"VBAT", "batch")
        batch = FIELDS["batch header"]
        (payload_bytes,) = struct.unpack_from("<I", block, batch["payload_bytes"])
        (lsn,) = struct.unpack_from("<Q", block, batch["lsn_first"])
        (count,) = struct.unpack_from("<I", block, batch["record_count"])
        must(lsn == expected, f"batch at {at}: LSN {lsn}, not {expected}")
        payloads = data[at + BLOCK : at + BLOCK + payload_bytes]
        for index in range(count):
            fields = FIELDS["record"]
            base = 128 + index * 48
            kind, detail = block[base + fields["kind"]], block[base + fields["detail"]]
            offset, length = struct.unpack_from("<QQ", block, base + fields["offset"])
            start, crc = struct.unpack_from("<II", block, base + fields["payload_offset"])
            (size,) = struct.unpack_from("<I", block, base + fields["payload_bytes"])
            payload = payloads[start : start + size]
            if size:
                must(crc32c(payload + epoch + struct.pack("<Q", lsn)) == crc, f"LSN {lsn}: payload")
            yield lsn, kind, detail, offset, length, payload
            lsn += 1
        expected = lsn
        at += BLOCK + (payload_bytes + BLOCK - 1) // BLOCK * BLOCK


def fields_of(text):
    """The byte tables of FORMAT.md: structure → field → offset."""
    tables, current = {}, None
    for line in text.splitlines():
        if line.startswith("### "):
            current = tables.setdefault(line[4:].split(" (")[0].lower(), {})
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if current is not None and len(cells) == 3 and cells[0].isdigit():
            current[cells[2]] = int(cells[0])
    return tables


HERE = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(HERE, "../engine/format/FORMAT.md"), encoding="utf-8") as format_file:
    FIELDS = fields_of(format_file.read())


KEYS = {}


def main():
    must(len(sys.argv) in (4, 6), __doc__)
    folder, limit, output = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if len(sys.argv) == 6:
        KEYS.update(keys_of(*sys.argv[4:]))
    names = sorted(n for n in os.listdir(f"{folder}/segments") if n.endswith(".seg"))
    image, size, timeline, pruned_until = bytearray(), 0, Timeline(limit), 0
    for name in names:
        (start, before, volume_bytes, end, until), found = segment(f"{folder}/segments/{name}")
        pruned_until = max(pruned_until, until)
        found = list(found)
        spans = [(lsn, kind == 7, detail) for lsn, kind, detail, *_ in found if kind in (7, 8)]
        if start < limit or before < limit:
            timeline.segment(start, before, end, spans)
        if start >= limit:
            continue
        # What was written while it was larger stays, and is there when it has grown again.
        size = volume_bytes
        image.extend(bytes(max(0, size - len(image))))
        for lsn, kind, _, offset, length, payload in found:
            if lsn >= limit:
                continue
            if kind == 1:
                image[offset : offset + length] = payload
            elif kind in (2, 3, 14):
                image[offset : offset + length] = bytes(length)
    must(timeline.resolves(), f"LSN {limit} does not resolve")
    must(kept(folder, limit, pruned_until), f"LSN {limit} is not kept")
    with open(output, "wb") as file:
        file.write(image[:size])


main()
