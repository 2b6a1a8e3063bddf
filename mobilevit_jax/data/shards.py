"""One shard of a pack: its images made ready, written as a tar, read back and compared.

`prepare.py` says which images lie in which shard; here a shard is written, by one thread, and then
renamed into place, after its part of the index. Before editing: a change of a single byte that is
written needs a new `pack.VERSION`.
"""

import io
import os
import subprocess
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64
from PIL import Image

from mobilevit_jax.data import pack, sources, storage
from mobilevit_jax.data.record import CorruptError, DataError, Record, Source

QUALITY = 90
SIZE = 1024  # images in a shard; about 110 MB of ImageNet
# What a shard's part of the index knows besides: what was done to an image, bit by bit.
MARKED, SHRUNK, CORRUPT = 1, 2, 4
PART = ".{split}-{number:05d}.npz"
MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"P6", "ppm"),
)
TAR_END = 20 * tarfile.BLOCKSIZE  # tar pads its files to a multiple of this


class Stopped(Exception):
    """Another worker failed."""


class Options(NamedTuple):
    """What is done to the images.

    Attributes:
      restart_markers: repack JPEGs without loss so that parts of them can be decoded.
      short_side: shrink larger images to this short side, in pixels; None leaves all as they are.
      quality: of the JPEGs that shrinking writes, 1 to 95.
      shard_size: images in a shard.
    """

    restart_markers: bool = False
    short_side: int | None = None
    quality: int = QUALITY
    shard_size: int = SIZE


class Shard(NamedTuple):
    """A shard to be written."""

    target: Path
    split: str
    number: int
    positions: range  # in the split as packed
    images: Int64[np.ndarray, " n"]  # their numbers in the source

    @property
    def path(self) -> Path:
        """Where the tar file belongs."""
        return self.target / pack.SHARD.format(split=self.split, number=self.number)

    @property
    def part(self) -> Path:
        """Where its part of the index lies until all is done."""
        return part_path(self.target, self.split, self.number)


def part_path(target: Path, split: str, number: int) -> Path:
    """Where a shard's part of the index lies until all is done."""
    return target / PART.format(split=split, number=number)


def is_finished(shard: Shard) -> bool:
    """Whether a shard and its part of the index are there, in full; the part was renamed first."""
    try:
        size = shard.path.stat().st_size
        part = read_part(shard.part)
        return len(part["label"]) == len(shard.images) and int(part["bytes"]) == size
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
        return False  # both are written again


def read_part(path: Path) -> dict[str, np.ndarray]:
    """A shard's arrays of `pack.Index` but `shard`; `done` by image; `bytes`, of the shard."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def write(
    shard: Shard,
    source: Source,
    options: Options,
    *,
    prefix: str,
    counted: Callable[[], None],
    stop: threading.Event,
) -> None:
    """Writes a shard and its part of the index.

    Args:
      shard: what, and where to.
      source: where its images are.
      options: what is to be done to them.
      prefix: taken away from the names of records.
      counted: called after each image.
      stop: when it is set, `Stopped` is raised at the next image.

    Raises:
      DataError: an image cannot be read, or jpegtran cannot be run.
      OSError: the shard cannot be written.
    """
    temporary = shard.target / f".{shard.path.name}.part"
    rows, names, at = [], [], 0
    try:
        with temporary.open("wb") as file:
            for position, i in zip(shard.positions, shard.images.tolist(), strict=True):
                if stop.is_set():
                    raise Stopped
                record = source[i]
                data, done = _stored(record, options)
                file.write(_members(position, _extension(data, record.name), data, record.label))
                start = at + tarfile.BLOCKSIZE
                rows.append((start, len(data), record.label, zlib.crc32(data), done))
                names.append(os.fsencode(record.name.removeprefix(prefix)))
                at = file.tell()
                counted()
            file.write(bytes(-(at + 2 * tarfile.BLOCKSIZE) % TAR_END + 2 * tarfile.BLOCKSIZE))
            size = file.tell()
            _sync(file)
        offsets, sizes, labels, sums, done = zip(*rows, strict=True)
        part = {
            "offset": np.asarray(offsets, np.int64),
            "size": np.asarray(sizes, np.uint32),
            "label": np.asarray(labels, np.int32),
            "crc32": np.asarray(sums, np.uint32),
            "name_size": np.asarray([len(name) for name in names], np.uint32),
            "names": np.frombuffer(b"".join(names), np.uint8),
            "done": np.asarray(done, np.uint8),
            "bytes": np.asarray(size, np.int64),
        }
        replace(shard.part, npz(part))
        temporary.replace(shard.path)
    finally:
        temporary.unlink(missing_ok=True)  # after an error: room for those who look at the disk


def _members(position: int, extension: str, data: bytes, label: int) -> bytes:
    """An image and its label as members of a tar, the same bytes on every machine and day."""
    content = ((extension, data), ("cls", str(label).encode()))
    pieces = []
    for name, body in content:
        header = tarfile.TarInfo(f"{position:09d}.{name}")  # owner 0, time 0, mode 0644
        header.size = len(body)
        pieces += [
            header.tobuf(tarfile.USTAR_FORMAT),
            body,
            bytes(-len(body) % tarfile.BLOCKSIZE),
        ]
    return b"".join(pieces)


def _extension(data: bytes, name: str) -> str:
    """By what the file is, not by what it is called: ImageNet has a PNG called .JPEG."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    suffix = Path(name).suffix.lower()
    other = suffix[1:] if suffix in sources.EXTENSIONS else "bin"
    return next((kind for magic, kind in MAGIC if data.startswith(magic)), other)


def _stored(record: Record, options: Options) -> tuple[bytes, int]:
    """The bytes to store for an image, and what was done to it."""
    assert isinstance(record.image, bytes)
    data, done = record.image, 0
    if options.short_side is not None:
        data, done = _shrink(record, options.short_side, options.quality)
    if options.restart_markers:
        from mobilevit_jax.data import jpeg

        try:
            data, done = jpeg.add_restart_markers(data), done | MARKED
        except ValueError as error:  # not a JPEG, or one that jpegtran does not take
            cause = error.__cause__
            if isinstance(cause, subprocess.CalledProcessError) and cause.returncode < 0:
                # By Ctrl-C, or for want of memory: that says nothing of the image.
                raise DataError(
                    f"jpegtran was killed by signal {-cause.returncode} at {record.name}; run the "
                    "same command again, it goes on where it stopped"
                ) from error
    return data, done


def _shrink(record: Record, short_side: int, quality: int) -> tuple[bytes, int]:
    """The image as an RGB JPEG with a short side of no more than `short_side`.

    One that is small enough and would only get more bytes stays; so does what cannot be decoded.
    """
    from mobilevit_jax.data import transforms  # OpenCV with it

    assert isinstance(record.image, bytes)
    try:
        pixels = transforms.decode(record)
    except CorruptError:
        return record.image, CORRUPT
    height, width = pixels.shape[:2]
    short = min(height, width)
    image = Image.fromarray(pixels)
    if short > short_side:
        size = round(width * short_side / short), round(height * short_side / short)
        image = image.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling="4:2:0", optimize=True)
    if short <= short_side and file.tell() >= len(record.image):
        return record.image, 0
    return file.getvalue(), SHRUNK


def npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """An .npz file, the same for the same arrays."""
    file = io.BytesIO()
    named: Any = arrays
    np.savez(file, **named)  # writes no time into it
    return file.getvalue()


def replace(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or a power cut, meets all of it or nothing."""
    temporary = path.with_name(f".{path.name.removeprefix('.')}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            _sync(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def names_of(index: pack.Index) -> list[str]:
    """The names of its images."""
    content = index.names.tobytes()
    ends = np.cumsum(index.name_size, dtype=np.int64).tolist()
    return [os.fsdecode(content[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


# --- reading it back ----------------------------------------------------------------------------


class Written(NamedTuple):
    """A shard to be checked."""

    path: str
    index: pack.Index
    images: range  # that lie in it
    size: int  # bytes


def check(
    shard: Written, *, counted: Callable[[], None], stop: threading.Event
) -> tuple[list[int], list[int]]:
    """Images of which a byte is wrong (header, padding and label too), and those not to be opened.

    The last image answers for the end of the shard.
    """
    damaged, unreadable = [], []
    index = shard.index
    starts = index.offset[shard.images.start : shard.images.stop] - tarfile.BLOCKSIZE
    bounds = [*starts.tolist(), shard.size]
    for i, start, end in zip(shard.images, bounds, bounds[1:], strict=False):
        if stop.is_set():
            raise Stopped
        block = storage.read_range(shard.path, start, end - start)
        data = block[tarfile.BLOCKSIZE :][: int(index.size[i])]
        extension = block[:100].split(b"\0")[0].decode("ascii", "replace").partition(".")[2]
        expected = _members(i, extension, data, int(index.label[i]))
        if i == shard.images[-1]:
            expected = expected.ljust(len(block), b"\0")
        if block != expected or zlib.crc32(data) != index.crc32[i]:
            damaged.append(i)
        elif not _opens(data):
            unreadable.append(i)
        counted()
    return damaged, unreadable


def _opens(data: bytes) -> bool:
    from mobilevit_jax.data import transforms

    try:
        with Image.open(io.BytesIO(data), formats=transforms.FORMATS) as image:
            return min(image.size) > 0
    except Exception:  # Pillow raises anything on broken files
        return False
