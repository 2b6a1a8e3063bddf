"""ImageNet (ILSVRC2012) as people have it: the official tars, or what they unpacked, into sources.

Nothing is unpacked: images are read out of the tars, also out of tars inside a tar. Whatever form
the files have, the same images come in the same order under the same names: classes sorted by
synset id, images by file name. The labels of the validation images come from their folders, or from
the devkit, or from one of two lists that are in circulation.
"""

import csv
import dataclasses
import io
import re
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from mobilevit_jax.data import storage
from mobilevit_jax.data.record import SPLITS, DataError, Record

IMAGES = {"train": 1_281_167, "val": 50_000}
CLASSES = 1_000
# Where the two splits may lie below the directory: as unpacked by hand, or as Kaggle packs them.
PLACES = ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
TARS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
FOLDERS = {
    "train": ("train", "ILSVRC2012_img_train"),
    "val": ("val", "validation", "ILSVRC2012_img_val"),
}
DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
KAGGLE_LABELS = "LOC_val_solution.csv"
SYNSET_LABELS = "imagenet_2012_validation_synset_labels.txt"

SYNSET = re.compile(r"n\d{8}")
SYNSET_TAR = re.compile(r"(n\d{8})\.tar")
IMAGE = re.compile(r"[^.].*\.jpe?g", re.IGNORECASE)
VAL_STEM = "ILSVRC2012_val_{:08d}"


class _Image(NamedTuple):
    name: str  # of the file, without folders
    synset: str | None  # None: not said by where it lies
    path: str  # of the file to read
    start: int  # of the image in that file
    size: int | None  # None: the whole file


@dataclasses.dataclass(frozen=True)
class Images:
    """One split; record names are bare file names."""

    class_names: tuple[str, ...]
    images: tuple[_Image, ...]
    numbers: dict[str, int]  # the label of each synset

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Record:
        name, synset, path, start, size = self.images[i]
        assert synset is not None
        data = storage.read(path) if size is None else storage.read_range(path, start, size)
        return Record(data, self.numbers[synset], name)

    @property
    def names(self) -> list[str]:
        """Of all records, in order."""
        return [image.name for image in self.images]


def read(root: Path) -> dict[str, Images]:
    """Both splits of the ImageNet in `root`.

    Warns in one line where it is not the whole of it.

    Raises:
      DataError: a split or the labels are missing, or a file is damaged; its text names what is
        looked for.
    """
    if not root.is_dir():
        what = "is not a directory" if root.exists() else "does not exist"
        raise DataError(f"{root} {what}; give --source=DIRECTORY of {' and '.join(TARS.values())}")
    try:
        found = {split: _images(root, split) for split in SPLITS}
        if any(image.synset is None for image in found["val"]):
            found["val"] = _label(found["val"], root)
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename or root}: {error.strerror or error}"
        ) from error
    names = {split: {str(image.synset) for image in images} for split, images in found.items()}
    class_names = tuple(sorted(names["train"] | names["val"]))
    _warn_if_short(root, {split: len(images) for split, images in found.items()}, names)
    labels = {synset: label for label, synset in enumerate(class_names)}
    return {split: Images(class_names, tuple(images), labels) for split, images in found.items()}


def read_val(root: Path) -> Images:
    """The validation images of the ImageNet in `root`; the training images need not be there.

    Raises:
      DataError: the images or their labels are missing, or a file is damaged.
    """
    try:
        images = _images(root, "val")
        if any(image.synset is None for image in images):
            images = _label(images, root)
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename or root}: {error.strerror or error}"
        ) from error
    class_names = tuple(sorted({str(image.synset) for image in images}))
    labels = {synset: label for label, synset in enumerate(class_names)}
    return Images(class_names, tuple(images), labels)


def _warn_if_short(root: Path, images: dict[str, int], names: dict[str, set[str]]) -> None:
    counted = [
        (images["train"], IMAGES["train"], "training images"),
        (images["val"], IMAGES["val"], "validation images"),
        (len(names["train"]), CLASSES, "classes to train on"),
        (len(names["val"]), CLASSES, "classes to validate on"),
    ]
    wrong = [f"{n:,} of {whole:,} {what}" for n, whole, what in counted if n != whole]
    if wrong:
        warnings.warn(f"{root} is not the whole ImageNet: {', '.join(wrong)}", stacklevel=4)


def _images(root: Path, split: str) -> list[_Image]:
    """All images of a split in their order; of validation images the synset may be unknown."""
    searched = []
    for place in PLACES:
        for path in (root / place / TARS[split], *(root / place / f for f in FOLDERS[split])):
            searched.append(str(path.relative_to(root)))
            if not path.exists():
                continue
            found = _in_tar(path) if path.suffix == ".tar" else _in_folder(path)
            images = [image for image in found if split == "val" or image.synset is not None]
            if not images:
                inside = "nXXXXXXXX folders or tars" if split == "train" else "ILSVRC2012_val_*"
                raise DataError(f"found 0 images in {path}; expected {inside} of .JPEG files there")
            # Names of training images begin with the synset, so the classes lie together.
            return sorted(images, key=lambda image: (image.name, image.synset or ""))
    raise DataError(f"no {split} images in {root}; looked for {', '.join(searched)}")


def _in_folder(path: Path) -> Iterator[_Image]:
    folders, files = storage.list_folder(str(path))
    for name in files:
        if IMAGE.fullmatch(name):
            yield _Image(name, None, f"{path}/{name}", 0, None)
        elif SYNSET_TAR.fullmatch(name):
            yield from _in_tar(path / name)
    for synset in filter(SYNSET.fullmatch, folders):
        for name in storage.list_folder(f"{path}/{synset}")[1]:
            if IMAGE.fullmatch(name):
                yield _Image(name, synset, f"{path}/{synset}/{name}", 0, None)


def _in_tar(path: Path) -> Iterator[_Image]:
    """Images of a tar, or of the tars in it; their class is the tar's name or the folder's."""
    with path.open("rb") as file:
        for member in _members(file, str(path)):
            folder, _, name = member.name.rpartition("/")
            inside = SYNSET_TAR.fullmatch(name)
            if inside:
                part = _Part(file, member.offset_data, member.size)
                for image in _members(part, f"{name} in {path}"):
                    start = member.offset_data + image.offset_data
                    if IMAGE.fullmatch(image.name):
                        yield _Image(image.name, inside[1], str(path), start, image.size)
            elif IMAGE.fullmatch(name):
                synset = SYNSET.fullmatch(folder.rpartition("/")[2] or path.stem)
                known = synset[0] if synset else None
                yield _Image(name, known, str(path), member.offset_data, member.size)


class _Part(io.RawIOBase):
    """A stretch of a file as a file, without a buffer: only headers are read from it."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size, self._position = file, start, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._position, 0)
        self._file.seek(self._start + self._position)
        data = self._file.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data


def _members(file: IO[bytes] | _Part, name: str) -> Iterator[tarfile.TarInfo]:
    """The files in a tar that is not compressed, its end included."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            yield from (member for member in tar if member.isfile())
            # tarfile takes a damaged header for the end; the true one is a block of zeros.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{name} is damaged or cut short ({error}); compare its checksum with the one beside "
            "the download, and fetch it again"
        ) from error


# --- labels of the validation images ------------------------------------------------------------


def _label(images: list[_Image], root: Path) -> list[_Image]:
    synsets = _val_synsets(root)
    labelled = [
        image._replace(synset=image.synset or synsets.get(Path(image.name).stem))
        for image in images
    ]
    unknown = [image.name for image in labelled if image.synset is None]
    if unknown:
        raise DataError(
            f"{len(unknown)} validation images in {root} are in no list of labels, first "
            f"{unknown[0]}; "
            "rename them back to ILSVRC2012_val_XXXXXXXX.JPEG, or remove them"
        )
    return labelled


def _val_synsets(root: Path) -> dict[str, str]:
    """The synset of each validation image, by its file name without .JPEG."""
    readers: dict[str, Callable[[Path], dict[str, str]]] = {
        f"{DEVKIT}.tar.gz": _from_devkit_tar,
        DEVKIT: lambda path: _from_devkit(_read_file(path / "data")),
        f"data/{GROUND_TRUTH}": lambda path: _from_devkit(_read_file(path.parent)),
        KAGGLE_LABELS: _from_kaggle,
        SYNSET_LABELS: lambda path: _numbered(path.read_text().split(), path),
    }
    for name, reader in readers.items():
        path = root / name
        if path.exists():
            try:
                return reader(path)
            except (tarfile.TarError, EOFError, zlib.error, ValueError, LookupError) as error:
                raise DataError(f"{path} cannot be read: {error}; fetch it again") from error
    raise DataError(
        f"the labels of the validation images are missing: put {DEVKIT}.tar.gz, {KAGGLE_LABELS} or "
        f"{SYNSET_LABELS} into {root}, or sort the images into val/nXXXXXXXX folders"
    )


def _from_devkit_tar(path: Path) -> dict[str, str]:
    with tarfile.open(path, "r:*") as tar:
        wanted = ("meta.mat", GROUND_TRUTH)
        found = {Path(member.name).name: member for member in tar if member.isfile()}

        def content(name: str) -> bytes:
            file = tar.extractfile(found[name])
            assert file is not None  # it is a regular file
            return file.read()

        missing = [name for name in wanted if name not in found]
        if missing:
            raise ValueError(f"it holds no {' and no '.join(missing)}")
        return _from_devkit(content)


def _read_file(folder: Path) -> Callable[[str], bytes]:
    return lambda name: (folder / name).read_bytes()


def _from_devkit(content: Callable[[str], bytes]) -> dict[str, str]:
    """The ground truth is a line an image, each an ILSVRC2012_ID; meta.mat knows their synsets."""
    synsets = read_meta(content("meta.mat"))
    lines = [int(line) for line in content(GROUND_TRUTH).split()]
    unknown = sorted({line for line in lines if line not in synsets})
    if unknown:
        raise ValueError(f"{GROUND_TRUTH} has the id {unknown[0]}, which meta.mat does not know")
    return {VAL_STEM.format(i): synsets[line] for i, line in enumerate(lines, 1)}


def _from_kaggle(path: Path) -> dict[str, str]:
    """A row an image: its name, then the synset and the box of each object, all of one synset."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    synsets = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    return dict(zip(synsets, _checked(list(synsets.values()), path), strict=True))


def _numbered(synsets: list[str], path: Path) -> dict[str, str]:
    return {VAL_STEM.format(i): name for i, name in enumerate(_checked(synsets, path), 1)}


def _checked(synsets: list[str], path: Path) -> list[str]:
    wrong = [name for name in synsets if not SYNSET.fullmatch(name)]
    if wrong:
        raise ValueError(f"{path.name} has {wrong[0]!r} where a synset such as n01440764 belongs")
    return synsets


# --- MATLAB files -------------------------------------------------------------------------------

# Element types of "MAT-File Format", version 5 (The MathWorks), table 1-1, that hold numbers.
NUMBERS = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}
TEXT = {1: "latin-1", 2: "latin-1", 16: "utf-8", 17: "utf-16", 4: "utf-16"}
MATRIX, COMPRESSED = 14, 15
STRUCT, CHAR = 2, 4  # kinds of matrix


def read_meta(content: bytes) -> dict[int, str]:
    """Reads the devkit's meta.mat: the synset (WNID) of each ILSVRC2012_ID.

    Raises:
      ValueError: it is no MATLAB 5 file, or holds no such struct.
    """
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
    if order is None:
        raise ValueError("meta.mat is no MATLAB 5 file")
    try:
        for kind, payload in _elements(content[128:], order):
            if kind == COMPRESSED:
                kind, payload = next(_elements(zlib.decompress(payload), order))
            if kind == MATRIX:
                synsets = _synsets(payload, order)
                if synsets:
                    return synsets
    except (
        struct.error,
        zlib.error,
        StopIteration,
        LookupError,
        ValueError,
        OverflowError,
    ) as error:
        raise ValueError(f"meta.mat is damaged ({error})") from error
    raise ValueError("meta.mat has no struct with ILSVRC2012_ID and WNID")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Type and content of each data element; they lie at multiples of eight bytes."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        if kind >> 16:  # a small element: its size in the upper half, its content in the tag
            yield kind & 0xFFFF, data[at + 4 : at + 4 + (kind >> 16)]
            at += 8
            continue
        payload = data[at + 8 : at + 8 + size]
        if len(payload) < size:
            raise ValueError("cut short")
        yield kind, payload
        at += 8 + (size if kind == COMPRESSED else -(-size // 8) * 8)


def _synsets(matrix: bytes, order: str) -> dict[int, str]:
    """Of a struct array, the two fields that matter; nothing, if it has no such fields."""
    elements = _elements(matrix, order)
    flags = next(elements)[1]
    if struct.unpack_from(f"{order}I", flags)[0] & 0xFF != STRUCT:
        return {}
    next(elements), next(elements)  # dimensions and name
    width = struct.unpack_from(f"{order}i", next(elements)[1])[0]
    table = next(elements)[1]
    fields = [table[at : at + width].split(b"\0")[0].decode() for at in range(0, len(table), width)]
    if not {"ILSVRC2012_ID", "WNID"} <= set(fields):
        return {}
    values = list(elements)
    rows = [
        dict(zip(fields, values[at:], strict=False)) for at in range(0, len(values), len(fields))
    ]
    return {
        int(_value(row["ILSVRC2012_ID"][1], order)): str(_value(row["WNID"][1], order))
        for row in rows
    }


def _value(matrix: bytes, order: str) -> float | str:
    """A text, or the first number of a matrix."""
    (_, flags), _, _, (kind, payload) = list(_elements(matrix, order))[:4]
    if struct.unpack_from(f"{order}I", flags)[0] & 0xFF == CHAR:
        codec = TEXT[kind]
        if codec == "utf-16":
            codec = "utf-16-le" if order == "<" else "utf-16-be"
        return payload.decode(codec)
    return np.frombuffer(payload, order + NUMBERS[kind])[0].item()
