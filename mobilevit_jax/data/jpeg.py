"""Surgery on JPEG bytes, so that of a picture only what a crop needs is decoded.

Most of decoding is Huffman decoding, which has to begin at the first bit. There are two ways to do
less of it. The *bottom cut* writes a smaller height into the header: rows below are never reached.
The *restart cut* needs a file made by `add_restart_markers`: its entropy-coded data are cut into
short segments that stand alone, and a private APP15 segment tells their lengths, so the segments
under a crop, with the header before them, are a smaller JPEG. Both give the very pixels of a whole
decode, tested bit for bit; hence the margins below, because libjpeg's upsampling of the chroma
planes looks at neighbours. What is unusual is left alone: `read_header` answers None, and Pillow
decodes it. File format: ITU-T T.81, annex B.
"""

import struct
import subprocess
from typing import NamedTuple

import numpy as np
import simplejpeg
from jaxtyping import UInt8

from mobilevit_jax.data.record import DataError

TABLE = 0xEF  # APP15: here the segment lengths travel, as uint16 little endian
SIGNATURE = b"MVRSTLEN"  # what such an APP15 begins with; there are several where one is too short
# libjpeg's warnings of damaged image data. It always fills the picture, by guessing or with grey.
WARNINGS = ("Corrupt JPEG data: ", "Premature end of JPEG file")
SCAN_LIMIT = 100  # cjpeg writes no more; each may take as long as decoding the whole picture

SKIPPED = frozenset([0xDB, 0xC4, 0xFE, *range(0xE0, 0xF0)])  # DQT, DHT, COM and APP0 to APP15
# Sampling factors of luma over plain chroma: 4:4:4, 4:2:2, 4:4:0, 4:2:0, 4:1:1.
SAMPLINGS = frozenset([0x11, 0x21, 0x12, 0x22, 0x41])
_SEGMENT = struct.Struct(">BBH")
_FRAME = struct.Struct(">BHHB")
_SIZE = struct.Struct(">HH")

# What stands before segments 0, 1, 2, …: RST7 (but for the first), RST0, RST1, …
_MARKERS = np.tile(np.roll(np.arange(0xFFD0, 0xFFD8), 1).astype(">u2").view(np.uint16), 8192)
_BEFORE_FIRST = np.frombuffer(b"\x3f\x00", np.uint16)[0]  # the last bytes of a sequential SOS
_AFTER_LAST = np.frombuffer(b"\xff\xd9", np.uint16)[0]  # EOI


class BombError(ValueError):
    """A file made to take minutes; not to be tried with another decoder."""


class Header(NamedTuple):
    """What `decode` and `decode_box` must know; offsets are in bytes from the file's beginning."""

    height: int
    width: int
    unit: tuple[int, int]  # (height, width) in pixels of an MCU, the smallest piece of the scan
    size_at: int  # offset of the two bytes of height, then two of width
    scan_at: int  # offset of the entropy-coded data
    sequential: bool  # all in one scan from top to bottom; else only decoded whole
    restart: int  # MCUs between restart markers; 0 without
    tables: tuple[tuple[int, int], ...]  # where the parts of our table start and stop


def read_header(data: bytes) -> Header | None:
    """Read the segments before the image data, in pure Python and a few microseconds.

    None for what is not to be decoded here: no JPEG, not 8-bit Huffman coding, not grey or three
    channels, a rare subsampling, a broken header, or no end marker behind the image data, which
    says that the file was cut short (libjpeg would fill the rest with grey).
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        return _read_header(data)
    except (struct.error, IndexError):  # the file ends within its header
        return None


def _read_header(data: bytes) -> Header | None:
    at, size_at, channels, restart, progressive = 2, 0, 0, 0, False
    height = width = sampling = 0
    tables = ()
    while True:
        prefix, marker, length = _SEGMENT.unpack_from(data, at)
        if prefix != 0xFF or length < 2:
            return None
        if marker in SKIPPED:
            if marker == TABLE and data.startswith(SIGNATURE, at + 4):
                tables += ((at + 4 + len(SIGNATURE), at + 2 + length),)
        elif 0xC0 <= marker <= 0xC2:  # SOF: baseline, extended sequential, progressive
            precision, height, width, channels = _FRAME.unpack_from(data, at + 4)
            sampling = data[at + 11]
            if size_at or precision != 8 or not height or not width or length != 8 + 3 * channels:
                return None
            if channels == 3:
                if sampling not in SAMPLINGS or data[at + 14] != 0x11 or data[at + 17] != 0x11:
                    return None
            elif channels != 1:
                return None
            size_at, progressive = at + 5, marker == 0xC2
        elif marker == 0xDD:  # DRI
            restart = data[at + 4] << 8 | data[at + 5]
        elif marker == 0xDA:  # SOS
            break
        else:
            return None
        at += 2 + length
    scan_at = at + 2 + length
    if not size_at or length != 6 + 2 * data[at + 4] or data.rfind(b"\xff\xd9", scan_at) < 0:
        return None
    # A single channel is never interleaved: its MCU is one block, whatever its sampling factors.
    unit = (8 * (sampling & 15), 8 * (sampling >> 4)) if channels == 3 else (8, 8)
    sequential = not progressive and data[at + 4] == channels
    if not sequential or not restart:
        tables = ()
    return Header(height, width, unit, size_at, scan_at, sequential, restart, tables)


def decode(data: bytes, header: Header) -> UInt8[np.ndarray, "h w 3"]:
    """The whole picture in RGB, the same bits as Pillow's.

    Damage within the image data passes, as in Pillow, unless there are several scans.

    Raises:
      BombError: it has more than `SCAN_LIMIT` scans.
      ValueError: libjpeg rejects the file.
    """
    return _decode_whole(data, header, halve=False)


def decode_box(
    data: bytes, header: Header, box: tuple[int, int, int, int], *, halve: bool = False
) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of a box, as `decode(data, header)` has them, for less work.

    Args:
      data: the file.
      header: of this file, by `read_header`.
      box: (top, left, height, width) in pixels, within the picture.
      halve: give rows [top // 2, top // 2 + height // 2), and columns alike, of the picture at half
        size, which libjpeg makes straight from the DCT coefficients (each pixel the mean of four,
        nearly). Every side of the box must be at least 2.

    Returns:
      The box, often a view of a larger array.

    Raises:
      BombError: it has more than `SCAN_LIMIT` scans.
      ValueError: libjpeg rejects the file, or the box does not fit.
    """
    top, left, height, width = box
    if min(top, left) < 0 or top + height > header.height or left + width > header.width:
        raise ValueError(f"the box {box} does not fit into {header.height}x{header.width} pixels")
    if min(height, width) < 1 + halve:
        raise ValueError(f"the box {box} is empty")
    # Where chroma has half the size, an odd pixel looks one sample ahead, an even one behind.
    margin = 2 if halve else 1
    if header.tables and (cut := _restart_cut(data, header, box, margin)):
        piece, y, x, piece_height, piece_width = cut
        try:
            image = _decode(piece, piece_height, piece_width, halve=halve, strict=True)
        except ValueError:  # damaged, or a table of another file: then as if there were none
            pass
        else:
            return _crop(image, top - y, left - x, height, width, halve=halve)
    bottom = top + height + margin
    if not header.sequential or bottom >= header.height:
        image = _decode_whole(data, header, halve=halve)
    else:
        lowered = bytearray(data)
        _SIZE.pack_into(lowered, header.size_at, bottom, header.width)
        # Not strict, because libjpeg warns of the data that are left over.
        image = _decode(lowered, bottom, header.width, halve=halve, strict=False)
    return _crop(image, top, left, height, width, halve=halve)


def _decode_whole(data: bytes, header: Header, *, halve: bool) -> UInt8[np.ndarray, "h w 3"]:
    several = not header.sequential
    if several and data.count(b"\xff\xda", header.scan_at) >= SCAN_LIMIT:
        raise BombError(f"it has more than {SCAN_LIMIT} scans")
    # Strict with several scans: there Pillow tells a missing end from other damage, libjpeg not.
    return _decode(data, header.height, header.width, halve=halve, strict=several)


def _decode(
    data: bytes | bytearray, height: int, width: int, *, halve: bool, strict: bool
) -> UInt8[np.ndarray, "h w 3"]:
    # simplejpeg's own strict=False lets an error pass that follows a warning, and returns memory
    # nobody wrote to. So it is always strict, and what it complains of is told by its text.
    least = ((height + 1) // 2, (width + 1) // 2, 2) if halve else (0, 0, 1)
    if halve:
        height, width = least[:2]
    image = np.empty((height, width, 3), np.uint8)
    try:
        shape = simplejpeg.decode_jpeg(data, "RGB", False, False, *least, image).shape
    except ValueError as error:
        if strict or not str(error).startswith(WARNINGS):
            raise
    else:
        if shape != image.shape:
            raise ValueError(f"libjpeg finds {shape}, its header said {image.shape}")
    return image


def _crop(
    image: UInt8[np.ndarray, "h w 3"], top: int, left: int, height: int, width: int, *, halve: bool
) -> UInt8[np.ndarray, "h2 w2 3"]:
    if halve:
        top, left, height, width = top // 2, left // 2, height // 2, width // 2
    return image[top : top + height, left : left + width]


def _restart_cut(
    data: bytes, header: Header, box: tuple[int, int, int, int], margin: int
) -> tuple[bytearray, int, int, int, int] | None:
    """A smaller JPEG that holds the box: (bytes, top, left, height, width) of it in the picture.

    None where the table does not describe this file. Every marker taken is looked at.
    """
    top, left, height, width = box
    unit_height, unit_width = header.unit
    per_row = -(-header.width // unit_width)  # MCUs
    if per_row % header.restart:
        return None
    unit_width *= header.restart  # from here on a unit is a segment
    per_row //= header.restart
    rows = -(-header.height // unit_height)
    marks = _marks(data, header, rows * per_row)
    if marks is None:
        return None

    # The units under the box. Pictures under 5 columns are upsampled by another rule (9 at half
    # size): no piece is cut so narrow from the right border.
    y0 = max(top - margin, 0) // unit_height
    x0 = max(min(left - margin, header.width - 16), 0) // unit_width
    y1 = min(-(-(top + height + margin) // unit_height), rows)
    x1 = min(-(-(left + width + margin) // unit_width), per_row)
    down, across = y1 - y0, x1 - x0

    # Where they begin, then where the last of a row ends; rows of this view may share a mark.
    first, shape = y0 * per_row + x0, (down, across + 1)
    grid = np.ndarray(shape, np.int64, marks, 8 * first, (8 * per_row, 8))
    pairs = np.ndarray((len(data) - header.scan_at + 1,), np.uint16, data, header.scan_at - 2, (1,))
    expected = _markers(rows * per_row)
    if (pairs[grid] != np.ndarray(shape, np.uint16, expected, 2 * first, (2 * per_row, 2))).any():
        return None

    scan = memoryview(data)[header.scan_at :]
    starts, stops = grid[:, 0].tolist(), grid[:, across].tolist()
    bands = [scan[start:stop] for start, stop in zip(starts, stops, strict=True)]
    piece = bytearray().join([data[: header.scan_at], *bands])
    piece_height = min(y1 * unit_height, header.height) - y0 * unit_height
    piece_width = min(x1 * unit_width, header.width) - x0 * unit_width
    _SIZE.pack_into(piece, header.size_at, piece_height, piece_width)

    # Restart markers count modulo 8 from the first one, and the end marker closes the piece.
    moved = (grid[:, across] - grid[:, 0]).cumsum() - grid[:, across]
    pairs = np.ndarray(
        (len(piece) - header.scan_at + 1,), np.uint16, piece, header.scan_at - 2, (1,)
    )
    pairs[grid[:, 1:] + moved[:, None]] = _markers(down * across)[1:].reshape(down, across)
    return piece, y0 * unit_height, x0 * unit_width, piece_height, piece_width


def _marks(data: bytes, header: Header, count: int) -> np.ndarray | None:
    """Offsets in the scan where the `count` segments begin, and where the last ends; int64."""
    table = b"".join([data[start:stop] for start, stop in header.tables])
    if len(table) != 2 * count:
        return None
    marks = np.zeros(count + 1, np.int64)
    np.frombuffer(table, "<u2").cumsum(dtype=np.int64, out=marks[1:])
    return marks if data.startswith(b"\xff\xd9", header.scan_at + int(marks[count]) - 2) else None


def _markers(count: int) -> np.ndarray:
    """The pairs of bytes before segments 0 to `count` - 1, then the end marker; uint16."""
    large = count >= _MARKERS.size
    markers = np.resize(_MARKERS, count + 1) if large else _MARKERS[: count + 1].copy()
    markers[0], markers[count] = _BEFORE_FIRST, _AFTER_LAST
    return markers


def add_restart_markers(data: bytes) -> bytes:
    """Repack a JPEG through `jpegtran` so that `decode_box` can cut from it. No pixel changes.

    About five MCUs of 16 pixels, or eight of 8, become one segment; it must be a divisor of the
    MCUs in a row. A progressive file becomes sequential; metadata are dropped, EXIF rotation too
    (which our decoding ignores).

    Raises:
      DataError: jpegtran is not installed.
      ValueError: `read_header` or `decode` does not take it, or jpegtran finds it damaged.
    """
    header = read_header(data)
    if header is None:
        raise ValueError("no 8-bit grey or colour JPEG of a common subsampling, or cut short")
    pixels = decode(data, header)
    per_row = -(-header.width // header.unit[1])
    aim = 80 // header.unit[1] if header.unit[1] > 8 else 8
    restart = min(
        (r for r in range(1, per_row + 1) if per_row % r == 0), key=lambda r: abs(r - aim)
    )
    command = ["jpegtran", "-copy", "none", "-optimize", "-restart", f"{restart}B"]
    try:
        run = subprocess.run(command, input=data, capture_output=True, timeout=60, check=True)
    except FileNotFoundError as error:
        raise DataError(
            "restart markers need jpegtran, which is not installed; "
            "apt-get install libjpeg-turbo-progs"
        ) from error
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.decode(errors="replace").split())
        raise ValueError(f"jpegtran: {said or error.returncode}") from error
    except subprocess.TimeoutExpired as error:
        raise ValueError("jpegtran takes longer than a minute") from error
    packed = _add_table(run.stdout)
    header = read_header(packed)
    if (
        header is None
        or header.restart != restart
        or not header.tables
        or not np.array_equal(pixels, decode(packed, header))
    ):
        raise ValueError("jpegtran's file has other pixels")
    return packed


def _add_table(data: bytes) -> bytes:
    """Write the segment lengths of a sequential file's scan into APP15 behind its APP0."""
    header = read_header(data)
    if header is None or not header.sequential:
        raise ValueError("jpegtran wrote no sequential JPEG")
    scan = np.frombuffer(data, np.uint8, offset=header.scan_at)
    # 0xFF within image data is followed by 0, unless a marker begins: RSTn, at last EOI.
    ends = np.flatnonzero((scan[:-1] == 0xFF) & (scan[1:] != 0)) + 2
    lengths = np.diff(ends, prepend=0)
    table = lengths.astype("<u2").tobytes()  # 15 MCUs are under 64 KiB, however bad
    most = 0xFFFF - 2 - len(SIGNATURE) - 1  # even
    parts = [SIGNATURE + table[i : i + most] for i in range(0, len(table), most)]
    segments = [_SEGMENT.pack(0xFF, TABLE, 2 + len(part)) + part for part in parts]
    after = 2
    if data[3] == 0xE0:
        after += 2 + (data[4] << 8 | data[5])
    return b"".join([data[:after], *segments, data[after:]])
