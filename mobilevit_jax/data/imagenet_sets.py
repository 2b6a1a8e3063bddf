"""ImageNet's validation images, their newer labels, and the sets that test robustness.

All of them have labels among ImageNet's 1,000 classes, numbered by their sorted synset ids, and are
for evaluation only. Which class a folder means is told by its name: a synset id, or in ImageNet-V2
the number of the class. Each set is read from folders, from packs made of them by `prepare folder`
(all images of a pack, held out or not), or from the directory that TFDS prepared.

Before editing: a label of such a set need not be a class of the network. In ImageNet-C it is a
class under a corruption, in ReaL a set of classes; `answers` tells which classes are right.
"""

import bisect
import dataclasses
import functools
import importlib.resources
import itertools
import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32

from mobilevit_jax.data import imagenet, pack, prepared, storage
from mobilevit_jax.data.record import SPLITS, DataError, Labelled, Record, Source

SEVERITIES = ("1", "2", "3", "4", "5")
# AlexNet's top-1 error, mean of the five severities, for each corruption of the benchmark
# (arXiv 1903.12261; github.com/hendrycks/robustness).
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
REAL_LABELS = "real.json"
VAL_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")
TFDS_CORRUPTION = re.compile(r"(\w+)_([1-5])")


class About(NamedTuple):
    """What is known of a set."""

    title: str
    images: int
    classes: int
    tfds_split: str
    folders: tuple[str, ...]  # what its folder is called where it was unpacked
    layout: str


_BY_SYNSET = "<synset id, such as n01440764>/*.jpg"
_BY_NUMBER = "<number of the class, 0 to 999>/*.jpeg"
_VAL = "ILSVRC2012_img_val.tar with the devkit, or val/<synset id, such as n01440764>/*.JPEG"

ABOUT = {
    "imagenet_val": About("ImageNet val", 50_000, 1000, "validation", (), _VAL),
    "imagenet_real": About("ImageNet ReaL", 50_000, 1000, "validation", (), _VAL),
    "imagenet_v2_matched_frequency": About(
        "ImageNet-V2 matched-frequency",
        10_000,
        1000,
        "test",
        ("imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency"),
        _BY_NUMBER,
    ),
    "imagenet_v2_threshold": About(
        "ImageNet-V2 threshold-0.7",
        10_000,
        1000,
        "test",
        ("imagenetv2-threshold0.7-format-val", "imagenetv2-threshold0.7"),
        _BY_NUMBER,
    ),
    "imagenet_v2_top_images": About(
        "ImageNet-V2 top-images",
        10_000,
        1000,
        "test",
        ("imagenetv2-top-images-format-val", "imagenetv2-top-images"),
        _BY_NUMBER,
    ),
    "imagenet_a": About("ImageNet-A", 7_500, 200, "test", ("imagenet-a",), _BY_SYNSET),
    "imagenet_r": About("ImageNet-R", 30_000, 200, "test", ("imagenet-r",), _BY_SYNSET),
    "imagenet_sketch": About(
        "ImageNet-Sketch", 50_889, 1000, "test", ("sketch", "imagenet-sketch"), _BY_SYNSET
    ),
    "imagenet_c": About(
        "ImageNet-C",
        50_000,  # of each corruption and severity
        1000,
        "validation",
        ("imagenet-c", "ImageNet-C"),
        f"<corruption, such as fog>/<severity, 1 to 5>/{_BY_SYNSET}",
    ),
}


@functools.cache
def synsets() -> tuple[str, ...]:
    """The synset ids of ImageNet's 1,000 classes; sorted order is the number of the class."""
    file = importlib.resources.files("mobilevit_jax.data").joinpath("imagenet_synsets.txt")
    return tuple(file.read_text().split())


@functools.cache
def _numbers() -> dict[str, int]:
    return {synset: number for number, synset in enumerate(synsets())}


class _Part(NamedTuple):
    source: Source
    labels: Int32[np.ndarray, " k"]  # label in the source -> label in the set


@dataclasses.dataclass(frozen=True, eq=False)
class ImageNetSet:
    """A source whose labels mean classes of ImageNet.

    Attributes:
      class_names: of the labels.
      answers: for each label the classes that are right, filled up with -1. A label without any is
        that of images that do not count.
      classes: of ImageNet that the set is about, ascending; None for all.
      group: for each label the number of its group.
      groups: the corruption of each group; its severities are groups of their own. A single "" for
        sets without corruptions.
      baselines: errors to divide by, by corruption.
    """

    class_names: tuple[str, ...]
    answers: Int32[np.ndarray, "m s"]
    classes: Int[np.ndarray, " c"] | None
    group: Int32[np.ndarray, " m"]
    groups: tuple[str, ...]
    baselines: Mapping[str, float]
    parts: tuple[_Part, ...]
    ends: tuple[int, ...]  # one past the last example of each part

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> Record:
        i = range(len(self))[i]  # IndexError behind the end
        k = bisect.bisect_right(self.ends, i)
        part = self.parts[k]
        record = part.source[i - (self.ends[k - 1] if k else 0)]
        return record._replace(label=int(part.labels[record.label]))


@dataclasses.dataclass(frozen=True)
class _ClassFolders:
    """Images in folders of classes; `ends[k]` is one past the last of class k."""

    root: str
    class_names: tuple[str, ...]
    names: tuple[str, ...]  # without folders; those of ImageNet-C repeat 75 times and are interned
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Record:
        label = bisect.bisect_right(self.ends, i)
        path = f"{self.root}/{self.class_names[label]}/{self.names[i]}"
        return Record(storage.read(path), label, path)

    @property
    def labels(self) -> Int[np.ndarray, " n"]:
        return np.repeat(np.arange(len(self.ends)), np.diff(self.ends, prepend=0))


@runtime_checkable
class _Named(Protocol):
    """A source whose records do not show the names that their files had."""

    def file_name(self, i: int) -> str: ...


@dataclasses.dataclass(frozen=True, eq=False)
class _Relabelled:
    """Validation images under the labels of a list, by the number in their file's name."""

    source: Source
    class_names: tuple[str, ...]
    rows: Int32[np.ndarray, " n"]  # label of image number i at i - 1
    path: str  # of the list

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Record:
        record = self.source[i]
        name = self.source.file_name(i) if isinstance(self.source, _Named) else record.name
        number = VAL_NUMBER.search(name)
        if number is None or not 1 <= int(number[1]) <= len(self.rows):
            raise DataError(
                f"{name} is none of the {len(self.rows):,} images that {self.path} has labels of; "
                "expected ILSVRC2012_val_XXXXXXXX in its name"
            )
        return record._replace(label=int(self.rows[int(number[1]) - 1]))


# --- the sets -------------------------------------------------------------------------------------


def imagenet_val(split: str, *, root: str) -> ImageNetSet:
    """ILSVRC2012's 50,000 validation images.

    Args:
      split: "val"; none of these sets has images to train on.
      root: directory of ILSVRC2012_img_val.tar and the devkit, or of val/<synset id>/*.JPEG, or of
        <synset id>/*.JPEG; a pack of `launch.py prepare imagenet`; or TFDS's imagenet2012.

    Raises:
      DataError: there are no such images, or another set.
    """
    return _plain("imagenet_val", split, root)


def imagenet_real(split: str, *, root: str, labels: str = "") -> ImageNetSet:
    """The validation images with the labels of "Are we done with ImageNet?" (arXiv 2006.07159).

    An image may have several labels, each of which is right, or none, and then does not count.

    Args:
      split: "val".
      root: of the images, as for `imagenet_val`; in a TFDS dataset with the feature file_name.
      labels: real.json of github.com/google-research/reassessed-imagenet; "" for real.json in
        `root` or in the folder above.

    Raises:
      DataError: the images or the labels are not there or not as they should be.
    """
    about = _about("imagenet_real", split)
    top = _top(root, about)
    path = labels or _find_real_labels(top)
    answers, rows = _read_real_labels(path)
    ids = synsets()
    class_names = tuple("+".join(ids[k] for k in row if k >= 0) or "none" for row in answers)
    everything = np.arange(len(answers), dtype=np.int32)
    parts = tuple(
        _Part(_Relabelled(source, class_names, rows, path), everything)
        for source in _open(top, about)
    )
    _check_whole(top, about, parts, None)
    return _joined(parts, class_names=class_names, answers=answers)


def imagenet_v2_matched_frequency(split: str, *, root: str) -> ImageNetSet:
    """ImageNet-V2 (arXiv 1902.10811), the set that is usually meant.

    Args:
      split: "val".
      root: directory of the folders 0 to 999, or the one above; a pack or TFDS's
        imagenet_v2/matched-frequency.

    Raises:
      DataError: there are no such images, or another set.
    """
    return _plain("imagenet_v2_matched_frequency", split, root)


def imagenet_v2_threshold(split: str, *, root: str) -> ImageNetSet:
    """ImageNet-V2, images that at least 0.7 of the annotators chose; as above."""
    return _plain("imagenet_v2_threshold", split, root)


def imagenet_v2_top_images(split: str, *, root: str) -> ImageNetSet:
    """ImageNet-V2, the ten images a class that most annotators chose; as above."""
    return _plain("imagenet_v2_top_images", split, root)


def imagenet_a(split: str, *, root: str) -> ImageNetSet:
    """ImageNet-A (arXiv 1907.07174): natural images that fool ResNet-50, of 200 classes.

    Args:
      split: "val".
      root: directory of the folders n01498041 …, or the one above imagenet-a; a pack or TFDS's.

    Raises:
      DataError: there are no such images, or another set.
    """
    return _plain("imagenet_a", split, root)


def imagenet_r(split: str, *, root: str) -> ImageNetSet:
    """ImageNet-R (arXiv 2006.16241): art, toys and other renditions of 200 classes; as above."""
    return _plain("imagenet_r", split, root)


def imagenet_sketch(split: str, *, root: str) -> ImageNetSet:
    """ImageNet-Sketch (arXiv 1905.13549): sketches of all classes; as above, usually in sketch/."""
    return _plain("imagenet_sketch", split, root)


def imagenet_c(split: str, *, root: str) -> ImageNetSet:
    """ImageNet-C (arXiv 1903.12261): the validation images under corruptions of five severities.

    Args:
      split: "val".
      root: directory of <corruption>/<1 to 5>/<synset id>/*.JPEG, where the corruptions may
        also lie in noise, blur, weather, digital and extra, and each <1 to 5> may be a pack; or
        TFDS's imagenet2012_corrupted, with <corruption>_<1 to 5>/<version>/.

    Raises:
      DataError: there are no such images, or a corruption lacks a severity.
    """
    about = _about("imagenet_c", split)
    top = _top(root, about)
    found = sorted(_corruptions(top))
    if not found:
        raise _unexpected(f"no corruptions in {top}", top, about)
    there = {(corruption, severity) for corruption, severity, _ in found}
    groups = [(name, severity) for name in sorted({c for c, _ in there}) for severity in SEVERITIES]
    missing = [f"{name}/{severity}" for name, severity in groups if (name, severity) not in there]
    if missing:
        raise _unexpected(f"{top} lacks {', '.join(missing[:5])}", top, about)
    parts, short = [], []
    for corruption, severity, path in found:
        sources = _open(path, about)
        number = groups.index((corruption, severity))
        if sum(map(len, sources)) != about.images:
            short.append(f"{corruption}/{severity}")
        for source in sources:
            classes = _classes(source.class_names, path, about)
            parts.append(_Part(source, number * 1000 + classes))
    absent = sorted(set(ALEXNET_ERRORS) - {name for name, _ in groups})
    problems = [f"it lacks {', '.join(absent)}"] if absent else []
    if short:
        problems.append(f"{len(short)} folders have not 50,000 images, first {short[0]}")
    if problems:
        warnings.warn(f"{top} is not the whole ImageNet-C: {'; '.join(problems)}", stacklevel=3)
    ids, count = synsets(), len(groups)
    return _joined(
        tuple(parts),
        class_names=tuple(f"{c}/{s}/{synset}" for c, s in groups for synset in ids),
        answers=np.tile(np.arange(1000, dtype=np.int32), count)[:, None],
        group=np.repeat(np.arange(count, dtype=np.int32), 1000),
        groups=tuple(corruption for corruption, _ in groups),
        baselines=ALEXNET_ERRORS,
    )


def _about(name: str, split: str) -> About:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    if split != "val":
        raise ValueError(f"{name} is for evaluation; it has no images to train on")
    return ABOUT[name]


def _plain(name: str, split: str, root: str) -> ImageNetSet:
    """A set whose labels are ImageNet's classes."""
    about = _about(name, split)
    top = _top(root, about)
    parts = tuple(
        _Part(source, _classes(source.class_names, top, about)) for source in _open(top, about)
    )
    classes = _present(parts, scan=about.classes < 1000)
    _check_whole(top, about, parts, classes)
    return _joined(
        parts,
        class_names=synsets(),
        answers=np.arange(1000, dtype=np.int32)[:, None],
        classes=classes,
    )


def _joined(
    parts: tuple[_Part, ...],
    *,
    class_names: tuple[str, ...],
    answers: Int32[np.ndarray, "m s"],
    classes: Int[np.ndarray, " c"] | None = None,
    group: Int32[np.ndarray, " m"] | None = None,
    groups: tuple[str, ...] = ("",),
    baselines: Mapping[str, float] | None = None,
) -> ImageNetSet:
    return ImageNetSet(
        class_names=class_names,
        answers=answers,
        classes=None if classes is None or len(classes) == 1000 else classes,
        group=np.zeros(len(answers), np.int32) if group is None else group,
        groups=groups,
        baselines=baselines or {},
        parts=parts,
        ends=tuple(itertools.accumulate(len(part.source) for part in parts)),
    )


# --- where the images are -------------------------------------------------------------------------


def _unexpected(what: str, root: str, about: About) -> DataError:
    return DataError(
        f"{what}; expected {about.title} as {root}/{about.layout}, a pack of it or its TFDS "
        "directory; give --data=NAME=DIRECTORY or --config.data.root=DIRECTORY"
    )


def _top(root: str, about: About) -> str:
    """The directory of the set, which may lie in `root` under its usual name."""
    root = storage.directory(root)
    if not storage.is_folder(root):
        what = "is not a directory" if storage.exists(root) else "does not exist"
        raise _unexpected(f"{root} {what}", root, about)
    below = storage.list_folder(root)[0]
    return next((f"{root}/{name}" for name in about.folders if name in below), root)


def _open(root: str, about: About) -> tuple[Source, ...]:
    """The images in a directory, in whatever form they are."""
    if storage.exists(f"{root}/{pack.SUMMARY}"):
        splits = ("val",) if about.layout == _VAL else ("train", "val")
        return tuple(pack.pack(split, root=root) for split in splits)
    if storage.exists(f"{root}/dataset_info.json"):
        return (prepared.tfds("val", root=root, val_split=about.tfds_split),)
    folders = [name for name in storage.list_folder(root)[0] if not name.startswith(".")]
    if about.layout == _VAL and not set(folders) & set(synsets()):
        if storage.is_remote(root):
            raise _unexpected(f"no folders of synset ids in {root}", root, about)
        return (imagenet.read_val(Path(root)),)
    if not folders:
        raise _unexpected(f"no class folders in {root}", root, about)
    return (_class_folders(root, folders, about),)


def _class_folders(root: str, folders: list[str], about: About) -> _ClassFolders:
    _classes(folders, root, about)  # before all files are listed
    files: dict[str, list[str]] = {name: [] for name in folders}
    for path in storage.walk(root):
        folder, _, name = path.partition("/")
        if folder in files and imagenet.IMAGE.fullmatch(name):
            files[folder].append(sys.intern(name))
    empty = [name for name, names in files.items() if not names]
    if empty:
        raise _unexpected(f"class folders without JPEGs in {root}: {_some(empty)}", root, about)
    names = tuple(name for found in files.values() for name in sorted(found))
    ends = tuple(itertools.accumulate(map(len, files.values())))
    return _ClassFolders(root, tuple(folders), names, ends)


def _classes(names: Sequence[str], root: str, about: About) -> Int32[np.ndarray, " k"]:
    """The class of ImageNet that each of these names means: synset ids, or numbers in V2."""
    numbers = _numbers()
    if about.layout == _BY_NUMBER and all(name.isdecimal() for name in names):
        numbers = {name: int(name) for name in names if int(name) < len(numbers)}
    unknown = [name for name in names if name not in numbers]
    if unknown:
        raise _unexpected(f"{root} has no classes of ImageNet: {_some(unknown)}", root, about)
    return np.array([numbers[name] for name in names], np.int32)


def _corruptions(root: str) -> Iterator[tuple[str, str, str]]:
    """Corruption, severity and directory of everything in `root` that is such a folder."""
    for name in storage.list_folder(root)[0]:
        inside = storage.list_folder(f"{root}/{name}")[0]
        tfds = TFDS_CORRUPTION.fullmatch(name)
        if severities := [each for each in inside if each in SEVERITIES]:
            yield from ((name, severity, f"{root}/{name}/{severity}") for severity in severities)
        elif tfds is not None:
            versions = [f"{root}/{name}", *(f"{root}/{name}/{each}" for each in inside[::-1])]
            for path in versions:
                if storage.exists(f"{path}/dataset_info.json"):
                    yield tfds[1], tfds[2], path
                    break
        elif not imagenet.SYNSET.fullmatch(name):
            for each in inside:
                severities = storage.list_folder(f"{root}/{name}/{each}")[0]
                for severity in sorted(set(severities) & set(SEVERITIES)):
                    yield each, severity, f"{root}/{name}/{each}/{severity}"


def _present(parts: Sequence[_Part], *, scan: bool) -> Int[np.ndarray, " c"]:
    """The classes of ImageNet that occur; with `scan`, labels inside of records are looked at."""
    found: set[int] = set()
    for source, labels in parts:
        if isinstance(source, Labelled):
            found |= set(labels[np.unique(source.labels)].tolist())
        elif scan:  # TFDS names all 1,000 classes also where 200 occur
            found |= {int(labels[source[i].label]) for i in range(len(source))}
        else:
            found |= set(labels.tolist())
    return np.array(sorted(found))


def _check_whole(
    root: str, about: About, parts: Sequence[_Part], classes: Int[np.ndarray, " c"] | None
) -> None:
    """Warns where something is missing; something else than the set is an error."""
    counted = [(sum(len(part.source) for part in parts), about.images, "images")]
    if classes is not None:
        counted.append((len(classes), about.classes, "classes"))
    if any(n > whole for n, whole, _ in counted):
        found = " and ".join(f"{n:,} {what}" for n, _, what in counted)
        expected = " and ".join(f"{whole:,}" for _, whole, _ in counted)
        raise _unexpected(f"{root} holds {found}, more than {expected}", root, about)
    if wrong := [f"{n:,} of {whole:,} {what}" for n, whole, what in counted if n != whole]:
        warnings.warn(f"{root} is not the whole {about.title}: {', '.join(wrong)}", stacklevel=4)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return f"{', '.join(map(repr, names[:3]))}{more}"


# --- ReaL ---------------------------------------------------------------------------------------


def _find_real_labels(top: str) -> str:
    places = [f"{top}/{REAL_LABELS}", f"{top.rpartition('/')[0]}/{REAL_LABELS}"]
    path = next((path for path in places if storage.exists(path)), None)
    if path is None:
        raise DataError(
            f"no {REAL_LABELS} in {top} or the folder above; fetch it from "
            "github.com/google-research/reassessed-imagenet and put it there"
        )
    return path


def _read_real_labels(path: str) -> tuple[Int32[np.ndarray, "m s"], Int32[np.ndarray, " n"]]:
    """The sets of classes that occur, filled up with -1, and for each image which of them."""
    try:
        images = json.loads(storage.read(path))
        sets = [tuple(sorted(set(classes))) for classes in images]
        if not sets or not all(type(k) is int and 0 <= k < 1000 for each in sets for k in each):
            raise ValueError("a label is no number from 0 to 999")
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path} is not a list with a list of classes for each validation image ({error}); "
            "fetch it again"
        ) from error
    labels = {each: label for label, each in enumerate(dict.fromkeys(sets))}
    answers = np.full((len(labels), max(1, *map(len, labels))), -1, np.int32)
    for each, label in labels.items():
        answers[label, : len(each)] = each
    return answers, np.array([labels[each] for each in sets], np.int32)
