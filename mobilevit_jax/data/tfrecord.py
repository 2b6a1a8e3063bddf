"""Random access to TFRecord shards, and the parsing of tf.train.Example, without TensorFlow.

A shard is a row of records: the length (8 bytes, little-endian), the masked CRC-32C of those bytes
(4), the data, the masked CRC-32C of the data (4). Nothing says where record i begins, so each shard
is scanned once, jumping from length to length, and the offsets are kept in a file: in the folder of
the shards, or in the user's cache where that folder cannot be written. Checksums of lengths are
verified when scanning. Those of the data are not: without a package for it that would take longer
than decoding the image; instead the length is read again with its record, so that an index and
a shard that do not belong together are noticed.
"""

import contextlib
import hashlib
import io
import os
import struct
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8, UInt32

from mobilevit_jax.data import storage
from mobilevit_jax.data.record import DataError

INDEX = "mobilevit_jax-index.npz"  # name, bytes and record offsets of every shard scanned so far
HEADER, FOOTER = 12, 4  # bytes around the data of a record
SCAN_THREADS = 8
BLOCK = {False: 4096, True: 8 << 20}  # bytes per read when scanning; remote: what 30 ms are worth

_LENGTH = struct.Struct("<Q")


def offsets(folder: str, sizes: Mapping[str, int]) -> dict[str, Int64[np.ndarray, " n"]]:
    """Where the records of shards begin, from the index, which is brought up to date if need be.

    Args:
      folder: of the shards, local or remote.
      sizes: bytes of each shard by its name; a shard of another size than the index knows is
        scanned anew.

    Returns:
      By shard, the first byte of each record's header, and after the last one the shard's size.

    Raises:
      DataError: a shard is cut short, or damaged, or cannot be read.
    """
    places = _places(folder)
    known: dict[str, Int64[np.ndarray, " n"]] = {}
    for place in reversed(places):
        known |= _load(place)
    fresh = [name for name, size in sizes.items() if name not in known or known[name][-1] != size]
    if fresh:
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            found = pool.map(lambda name: scan(f"{folder}/{name}", size=sizes[name]), fresh)
            known |= dict(zip(fresh, found, strict=True))
        for place in places:
            if not storage.is_remote(place) and _save(place, known):
                break
    return {name: known[name] for name in sizes}


def scan(path: str, *, size: int) -> Int64[np.ndarray, " n"]:
    """Offsets of a shard's records, and `size`, its bytes, after the last one.

    Raises:
      DataError: the shard is cut short, or a length does not fit its checksum.
    """
    starts: list[int] = []
    headers: list[bytes] = []
    block = BLOCK[storage.is_remote(path)]
    at = base = 0
    buffer = b""
    while at + HEADER <= size:
        if not base <= at <= base + len(buffer) - HEADER:
            buffer, base = storage.read_range(path, at, min(block, size - at)), at
        starts.append(at)
        headers.append(buffer[at - base : at - base + HEADER])
        at += HEADER + _LENGTH.unpack(headers[-1][:8])[0] + FOOTER
    _check_lengths(path, headers)
    if at != size:
        where = f"record {len(starts) - 1} of {path}" if at > size else f"{path} after its last one"
        raise DataError(f"{where} is cut off: the file has {size} bytes; copy it again")
    return np.array([*starts, size], np.int64)


def read_record(path: str, start: int, end: int) -> bytes:
    """The record between two offsets: its data after `HEADER` bytes, and its checksum left out.

    Raises:
      DataError: the shard is cut short or cannot be read, or the index is of another shard.
    """
    data = storage.read_range(path, start, end - start - FOOTER)
    if _LENGTH.unpack_from(data)[0] != len(data) - HEADER:
        raise DataError(
            f"{path} has no record at byte {start} any more: its index is out of date; "
            f"delete {' and '.join(_places(path.rpartition('/')[0]))}, whichever there is"
        )
    return data


def parse_example(
    data: bytes, names: Collection[str], *, start: int = 0
) -> dict[str, list[bytes] | list[int]]:
    """The values of some features of a serialised tf.train.Example.

    Args:
      data: the message.
      names: the features wanted, of byte strings or integers; those not there are left out.
      start: where the message begins in `data`.

    Raises:
      ValueError: these bytes are no Example, or a feature wanted holds floating-point numbers.
    """
    values: dict[str, list[bytes] | list[int]] = {}
    try:
        for tag, at, end in _fields(data, start, len(data)):
            if tag == _FEATURES:
                for entry in _fields(data, at, end):
                    name, value = _entry(data, entry)
                    if name in names:
                        values[name] = _values(data, *value)
    except IndexError as error:
        raise ValueError("the message ends within a number") from error
    return values


# Fields of the messages in tensorflow/core/example/{example,feature}.proto: their number times
# eight plus the wire type, as they are written.
_FEATURES = 1 << 3 | 2  # of Example
_MAP_ENTRY = 1 << 3 | 2  # of Features
_KEY, _VALUE = 1 << 3 | 2, 2 << 3 | 2  # of an entry
_BYTES_LIST, _FLOAT_LIST, _INT64_LIST = 1 << 3 | 2, 2 << 3 | 2, 3 << 3 | 2  # of Feature
_ITEM, _PACKED = 1 << 3, 1 << 3 | 2  # of Int64List: a number, or many in one run of bytes


def _entry(data: bytes, field: tuple[int, int, int]) -> tuple[str, tuple[int, int]]:
    """The name of a feature, and where its value lies."""
    name, value = "", (0, 0)
    tag, at, end = field
    if tag == _MAP_ENTRY:
        for part, first, last in _fields(data, at, end):
            if part == _KEY:
                name = data[first:last].decode()
            elif part == _VALUE:
                value = first, last
    return name, value


def _values(data: bytes, start: int, stop: int) -> list[bytes] | list[int]:
    """The values of one Feature."""
    for kind, at, end in _fields(data, start, stop):
        if kind == _BYTES_LIST:
            return [data[a:b] for tag, a, b in _fields(data, at, end) if tag == _PACKED]
        if kind == _INT64_LIST:
            numbers: list[int] = []
            for tag, first, last in _fields(data, at, end):
                while tag in (_ITEM, _PACKED) and first < last:
                    number, first = _varint(data, first)
                    numbers.append(number - (1 << 64) if number >> 63 else number)
            return numbers
        if kind == _FLOAT_LIST:
            raise ValueError("a feature of floating-point numbers where bytes or integers belong")
    return []


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message: tag, and where its content begins and ends."""
    while at < end:
        tag, at = data[at], at + 1
        if tag > 127:  # most take one byte, and two calls less are a fifth of the time
            tag, at = _varint(data, at - 1)
        wire = tag & 7
        if wire == 2:  # bytes, or a message
            size, at = data[at], at + 1
            if size > 127:
                size, at = _varint(data, at - 1)
            stop = at + size
        elif wire == 0:
            stop = _varint(data, at)[1]
        elif wire in (1, 5):  # eight or four bytes
            stop = at + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"a field of the unknown wire type {wire} at byte {at}")
        if stop > end:
            raise ValueError(f"a field at byte {at} ends {stop - end} bytes after its message")
        yield tag, at, stop
        at = stop


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where the next byte is."""
    byte = data[at]
    if byte < 128:
        return byte, at + 1
    value, shift = byte & 127, 7
    while shift < 70:
        at += 1
        byte = data[at]
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, at + 1
        shift += 7
    raise ValueError(f"a number of more than ten bytes before byte {at}")


def _check_lengths(path: str, headers: list[bytes]) -> None:
    table = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, HEADER)
    told = table[:, 8:].copy().view("<u4")[:, 0]
    wrong = np.flatnonzero(masked_crc(table[:, :8]) != told)
    if wrong.size:
        raise DataError(
            f"record {wrong[0]} of {path} is damaged: its length does not fit its checksum; "
            "is that a TFRecord file? Copy it again"
        )


def masked_crc(rows: UInt8[np.ndarray, "n b"]) -> UInt32[np.ndarray, " n"]:
    """The CRC-32C of each row, masked as TFRecord stores it. A numpy call per byte of a row."""
    crc = np.full(len(rows), 0xFFFFFFFF, np.uint32)
    for column in rows.T:
        crc = _CRC_TABLE[(crc ^ column) & 0xFF] ^ (crc >> np.uint32(8))
    crc = ~crc
    return (crc >> np.uint32(15) | crc << np.uint32(17)) + np.uint32(0xA282EAD8)


def _crc_table() -> UInt32[np.ndarray, " 256"]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):  # Castagnoli's polynomial, its bits in reverse
        table = table >> np.uint32(1) ^ np.uint32(0x82F63B78) * (table & np.uint32(1))
    return table


_CRC_TABLE = _crc_table()


def _places(folder: str) -> list[str]:
    """Where the index of a folder may lie, the best place first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mobilevit_jax"
    whole = folder if storage.is_remote(folder) else os.path.realpath(folder)
    digest = hashlib.blake2b(os.fsencode(whole), digest_size=8).hexdigest()
    return [f"{folder}/{INDEX}", str(cache / f"{digest}-{INDEX}")]


def _load(place: str) -> dict[str, Int64[np.ndarray, " n"]]:
    """The index at `place`; nothing if there is none or it is damaged, for it can be made anew."""
    try:
        if not storage.exists(place):
            return {}
        with np.load(io.BytesIO(storage.read(place))) as index:
            names, ends, starts = index["names"], index["ends"], index["starts"]
        if ends.shape != names.shape or not ends.size or ends[-1] != len(starts):
            return {}
        parts = np.split(starts.astype(np.int64), ends[:-1])
        return {str(name): part for name, part in zip(names, parts, strict=True) if part.size}
    except (DataError, ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile):
        return {}


def _save(place: str, known: Mapping[str, Int64[np.ndarray, " n"]]) -> bool:
    """Writes the index in one move, so that nobody reads half of it; whether that was possible."""
    path = Path(place)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(
                    file,
                    names=np.array(list(known)),
                    ends=np.cumsum([len(part) for part in known.values()]),
                    starts=np.concatenate(list(known.values())),
                )
            Path(draft).chmod(0o644)  # mkstemp's files are private
            Path(draft).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(draft).unlink()
            raise
    except OSError:  # read-only, or full
        return False
    return True
