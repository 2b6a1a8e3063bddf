"""Images packed into plain tar files, with an index: the fastest source to read, local or remote.

    pack.json            classes, options, and of each split: images, shard sizes, checksum of index
    train.npz            the index: where each image lies in which shard, its label, CRC-32 and name
    train-00000.tar …    000000123.jpg (or .png …) with 000000123.cls, the label as text: webdataset
    val.npz  val-00000.tar …                                                       and tar read them

`prepare.py` writes this. Images lie in a fixed pseudo-random order, so the first n of them, or some
of the shards, are a fair sample of the classes. Reading an image is one read at a known place; the
tar headers are for others. Checksums are for `launch.py prepare verify`: a loader that computed
them would lose a twentieth of its speed.
"""

import dataclasses
import functools
import io
import json
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt8, UInt32

from mobilevit_jax.data import storage
from mobilevit_jax.data.record import SPLITS, DataError, Record, Source, gist

FORMAT, VERSION = "mobilevit_jax pack", 1
SUMMARY = "pack.json"
UNFINISHED = ".prepare.json"  # there while a pack is being written
INDEX = "{split}.npz"
SHARD = "{split}-{number:05d}.tar"
LOOKERS = 32  # threads that ask for the sizes of shards: a store in the cloud takes its time


class Index(NamedTuple):
    """Where the images of a split lie; the arrays of its .npz file. Shard by shard, in order."""

    shard: Int32[np.ndarray, " n"]
    offset: Int64[np.ndarray, " n"]  # of the image's first byte, behind its tar header
    size: UInt32[np.ndarray, " n"]  # bytes
    label: Int32[np.ndarray, " n"]
    crc32: UInt32[np.ndarray, " n"]
    name_size: UInt32[np.ndarray, " n"]  # bytes of each name in `names`
    names: UInt8[np.ndarray, " m"]  # where the images came from, one after the other


DTYPES = dict(zip(Index._fields, ("i4", "i8", "u4", "i4", "u4", "u4", "u1"), strict=True))


class Split(NamedTuple):
    """What pack.json says of a split."""

    images: int
    shards: tuple[int, ...]  # bytes of each
    index_crc32: int
    counts: dict[str, int]  # what was done to how many images
    corrupt: tuple[str, ...]  # images found broken when they were to be shrunk


class Summary(NamedTuple):
    """What pack.json says."""

    class_names: tuple[str, ...]
    options: dict[str, Any]  # what was asked of `prepare`
    splits: dict[str, Split]


@dataclasses.dataclass(frozen=True, repr=False)
class _Pack:
    """One split. It costs about 60 bytes of memory an image, names included."""

    root: str
    split: str
    class_names: tuple[str, ...]
    paths: tuple[str, ...]  # of the shards
    index: Index
    name_ends: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.index.label)

    def __getitem__(self, i: int) -> Record:
        i = range(len(self))[i]  # IndexError behind the end
        path = self.paths[self.index.shard[i]]
        end = int(self.name_ends[i])
        name = self.index.names[end - int(self.index.name_size[i]) : end].tobytes()
        image = storage.read_range(path, int(self.index.offset[i]), int(self.index.size[i]))
        return Record(image, int(self.index.label[i]), f"{path}: {name.decode(errors='replace')}")

    @property
    def labels(self) -> Int32[np.ndarray, " n"]:
        return self.index.label

    def __reduce__(self) -> tuple[Callable[..., Source], tuple[str]]:
        # A worker process reads the index itself: that is faster than through a pipe.
        return functools.partial(pack, root=self.root), (self.split,)


def pack(split: str, *, root: str) -> Source:
    """A dataset written by `launch.py prepare`.

    Args:
      split: "train" or "val".
      root: its directory, or a URL of one, such as gs://bucket/imagenet.

    Raises:
      DataError: there is none, it is not finished, a shard is missing or cut short, the index
        belongs to other shards, or a label to none of the classes.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    root = storage.directory(root)
    summary = read_summary(root)
    about = summary.splits[split]
    index = read_index(root, split, summary)
    check_shards(root, split, about)
    return _Pack(
        root=root,
        split=split,
        class_names=summary.class_names,
        paths=tuple(shard_path(root, split, k) for k in range(len(about.shards))),
        index=index._replace(crc32=index.crc32[:0]),  # of no use from here on
        name_ends=np.cumsum(index.name_size, dtype=np.int64),
    )


def shard_path(root: str, split: str, number: int) -> str:
    """Where shard `number` of a split lies."""
    return f"{root}/{SHARD.format(split=split, number=number)}"


def read_summary(root: str) -> Summary:
    """What pack.json in `root` says.

    Raises:
      DataError: it is not there, or is not one of this version.
    """
    path = f"{root}/{SUMMARY}"
    if not storage.exists(path):
        if storage.exists(f"{root}/{UNFINISHED}"):
            raise DataError(
                f"the pack in {root} is not finished; run the same `launch.py prepare` again, it "
                "goes on where it stopped"
            )
        raise DataError(
            f"no pack in {root}: {SUMMARY} is missing; make one with `launch.py prepare`, or give "
            "--config.data.root=DIRECTORY"
        )
    content = storage.read(path)
    try:
        values = json.loads(content)
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {values['format']!r}")
        if values["version"] != VERSION:
            raise DataError(
                f"{path} is of version {values['version']}, but this program reads version "
                f"{VERSION}; update it, or prepare the dataset again"
            )
        splits = {name: _split(values["splits"][name]) for name in SPLITS}
        return Summary(tuple(map(str, values["class_names"])), dict(values["options"]), splits)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{path} is damaged, or was not written by `launch.py prepare` "
            f"({type(error).__name__}: {gist(error)}); copy or prepare the dataset again"
        ) from error


def _split(values: dict[str, Any]) -> Split:
    return Split(
        images=int(values["images"]),
        shards=tuple(np.asarray(list(map(int, values["shards"])), np.int64).tolist()),
        index_crc32=int(values["index_crc32"]),
        counts={str(what): int(count) for what, count in values["counts"].items()},
        corrupt=tuple(map(str, values["corrupt"])),
    )


def read_index(root: str, split: str, summary: Summary) -> Index:
    """The index of a split, checked against pack.json.

    Raises:
      DataError: it is missing or damaged, is that of other shards, or has a label of no class.
    """
    path = f"{root}/{INDEX.format(split=split)}"
    about = summary.splits[split]
    content = storage.read(path)
    if zlib.crc32(content) != about.index_crc32:
        raise DataError(
            f"{path} is damaged, or belongs to another pack than {SUMMARY} beside it; copy or "
            "prepare the dataset again"
        )
    index = parse_index(content, path)
    count = {len(array) for array in index[:-1]}
    if count != {about.images} or int(index.name_size.sum()) != len(index.names):
        raise DataError(f"{path} does not list the {about.images} images that {SUMMARY} counts")
    wrong = np.flatnonzero((index.label < 0) | (index.label >= len(summary.class_names)))
    if len(wrong):
        raise DataError(
            f"{path} gives image {wrong[0]} the label {index.label[wrong[0]]}, which is none of "
            f"the {len(summary.class_names)} classes; prepare the dataset again"
        )
    known = (index.shard >= 0) & (index.shard < len(about.shards))
    lengths = np.asarray([*about.shards, 0], np.int64)
    inside = lengths[np.where(known, index.shard, -1)]
    if ((index.offset < 0) | (index.offset > inside - index.size)).any():
        raise DataError(
            f"{path} points outside the shards that {SUMMARY} lists; prepare the dataset again"
        )
    return index


def parse_index(content: bytes, path: str) -> Index:
    """The arrays of an .npz file.

    Raises:
      DataError: they are not all there.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            index = Index(*(file[name] for name in Index._fields))
        for (name, dtype), array in zip(DTYPES.items(), index, strict=True):
            if array.dtype != np.dtype(dtype) or array.ndim != 1:
                raise ValueError(f"{name} is {array.dtype}{list(array.shape)}")
        return index
    except Exception as error:  # numpy and zipfile raise anything on broken bytes
        raise DataError(
            f"{path} is no index of a pack ({gist(error)}); copy or prepare the dataset again"
        ) from error


def check_shards(root: str, split: str, about: Split) -> None:
    """Looks whether all shards are there, in full.

    Raises:
      DataError: one is missing, or of another size than it was written with.
    """
    there = set(storage.list_folder(root)[1])
    names = [SHARD.format(split=split, number=k) for k in range(len(about.shards))]
    missing = [name for name in names if name not in there]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(names)} {split} shards are missing in {root}, first "
            f"{missing[0]}; copy them there, or prepare the dataset again"
        )
    paths = [f"{root}/{name}" for name in names]
    with ThreadPoolExecutor(LOOKERS if storage.is_remote(root) else 1) as pool:
        for path, size, expected in zip(
            paths, pool.map(storage.length, paths), about.shards, strict=True
        ):
            if size != expected:
                what = "is cut short" if size < expected else "is not the shard of this index"
                raise DataError(
                    f"{path} {what}: {size} bytes, but {expected} were written; copy it again, or "
                    "prepare the dataset again"
                )
