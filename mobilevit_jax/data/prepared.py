"""Datasets prepared by tensorflow_datasets (TFDS), stored as ArrayRecord or TFRecord.

TFDS tells which shards hold a split and what its classes are called; the records are read and
parsed here, without TensorFlow and without protobuf (a third of the time). TFRecord shards may lie
on remote storage; array_record reads local files only.
"""

import bisect
import dataclasses
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from mobilevit_jax.data import storage, tfrecord
from mobilevit_jax.data.record import SPLITS, CorruptError, DataError, Record, Source, gist

FEATURES = ("image", "label")  # those that are read


@dataclasses.dataclass(frozen=True)
class _ArrayRecords:
    """Rows in ArrayRecord files: a serialised tf.train.Example each, from byte `start` on."""

    records: Any  # an ArrayRecordDataSource
    shards: tuple[str, ...]
    ends: tuple[int, ...]  # one past the last row of each shard
    start: int = 0

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> bytes:
        problem: Exception | None = None
        try:
            if data := self.records[i]:
                return data
        except Exception as error:  # from array_record's C++, of many types
            problem = error
        # a shard that was cut short gives empty records
        why = gist(problem) if problem else "the record is empty"
        shard = self.shards[bisect.bisect_right(self.ends, i)]
        raise DataError(f"{why}; is {shard} whole? Copy it again") from problem


@dataclasses.dataclass(frozen=True, eq=False)
class _TFRecords:
    """The same in TFRecord files: row i is `records[i]` of `shards[places[i]]`."""

    shards: tuple[str, ...]
    places: Int32[np.ndarray, " n"]
    records: Int32[np.ndarray, " n"]
    begins: Int64[np.ndarray, " n"]
    ends: Int64[np.ndarray, " n"]
    start: int = tfrecord.HEADER

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> bytes:
        shard = self.shards[self.places[i]]
        try:
            return tfrecord.read_record(shard, int(self.begins[i]), int(self.ends[i]))
        except DataError as error:
            raise DataError(f"record {self.records[i]}: {error}") from error


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """One split of a TFDS dataset."""

    root: str
    name: str
    class_names: tuple[str, ...]
    rows: _ArrayRecords | _TFRecords

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Record:
        name = f"{self.name}[{i}]"
        try:
            data = self.rows[i]
        except DataError as error:
            raise DataError(f"cannot read {name} of {self.root}: {error}") from error
        try:
            values = tfrecord.parse_example(data, FEATURES, start=self.rows.start)
            (image,), (label,) = (values[key] for key in FEATURES)
        except (ValueError, KeyError) as error:
            raise CorruptError(
                f"{name} of {self.root} is broken: it lacks an image or a label ({gist(error)})"
            ) from error
        if not isinstance(image, bytes) or not isinstance(label, int):
            raise CorruptError(f"{name} of {self.root} is broken: its features have other types")
        if not 0 <= label < len(self.class_names):
            raise DataError(
                f"{name} of {self.root} has label {label}, which is none of the "
                f"{len(self.class_names)} classes; choose a split that is labelled"
            )
        return Record(image, label, name)

    def file_name(self, i: int) -> str:
        """The name that the file of example i had, where the dataset keeps it.

        Raises:
          DataError: it does not.
        """
        try:
            values = tfrecord.parse_example(self.rows[i], ("file_name",), start=self.rows.start)
            (name,) = values["file_name"]
            return name.decode() if isinstance(name, bytes) else str(name)
        except (ValueError, KeyError) as error:
            raise DataError(f"{self.name}[{i}] of {self.root} has no file_name") from error


def tfds(
    split: str, *, root: str, train_split: str = "train", val_split: str = "validation"
) -> Source:
    """A TFDS dataset already prepared, as ArrayRecord or TFRecord, read without TensorFlow.

    Args:
      split: "train" or "val".
      root: the prepared directory, e.g. ~/tensorflow_datasets/imagenet2012/5.1.0, or for TFRecord
        its URL. The first time, the shards are scanned for where their records begin, which is
        kept in a file there, or under ~/.cache/mobilevit_jax.
      train_split: TFDS's name of the training split; slices such as "train[:90%]" and sums such as
        "train+validation" are allowed.
      val_split: the same for the images to evaluate on.

    Raises:
      DataError: no such dataset, another file format, no image or label feature, unknown split,
        a shard that is missing, cut short or damaged.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    wanted = train_split if split == "train" else val_split
    folder = storage.directory(root)
    _check_folder(folder)
    with _local_metadata(folder) as metadata:
        import tensorflow_datasets  # 0.8 s, and only this source needs it

        try:
            info: Any = tensorflow_datasets.builder_from_directory(metadata).info
        except Exception as error:  # of many types; the files come from any version of TFDS
            raise DataError(
                f"TFDS cannot read the dataset_info.json and features.json of {folder}: "
                f"{gist(error)}; prepare the dataset again"
            ) from error
        _check_features(info.features, tensorflow_datasets.features, folder)
        pieces = _pieces(info.splits, wanted, folder, split)
    stored_as = info.file_format.value
    if stored_as == "tfrecord":
        rows = _tfrecords(pieces, folder)
    elif stored_as == "array_record":
        rows = _array_records(pieces, folder)
    else:
        raise DataError(
            f"the TFDS dataset in {folder} is stored as {stored_as}, which is not read here; "
            'prepare it again with file_format="array_record"'
        )
    class_names = tuple(info.features["label"].names)
    return _Prepared(folder, f"{info.name}/{wanted}", class_names, rows)


def _check_folder(folder: str) -> None:
    if storage.exists(f"{folder}/dataset_info.json"):
        return
    below: list[Path] = []
    if not storage.is_remote(folder):
        patterns = ("*/dataset_info.json", "*/*/dataset_info.json")
        below = sorted(path for pattern in patterns for path in Path(folder).glob(pattern))
    hint = " or ".join(str(found.parent) for found in below[:3])
    raise DataError(
        f"no prepared TFDS dataset in {folder}: dataset_info.json is missing; "
        + (f"did you mean {hint}?" if hint else "give --config.data.root=DIRECTORY")
    )


@contextmanager
def _local_metadata(folder: str) -> Iterator[Path]:
    """A local folder with the files that describe the dataset, all that TFDS gets to read."""
    if not storage.is_remote(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as copy:
        for name in storage.list_folder(folder)[1]:
            if name.endswith((".json", ".txt")):
                (Path(copy) / name).write_bytes(storage.read(f"{folder}/{name}"))
        yield Path(copy)


def _check_features(features: Any, types: Any, folder: str) -> None:
    there = features if isinstance(features, types.FeaturesDict) else {}
    for key, kind in (("image", types.Image), ("label", types.ClassLabel)):
        if key not in there or not isinstance(there[key], kind):
            has = [f"{name} ({type(f).__name__})" for name, f in sorted(there.items())]
            raise DataError(
                f"the TFDS dataset in {folder} has no feature `{key}` of type {kind.__name__}; "
                f"it has: {', '.join(has) or 'none'}"
            )


class _Piece(NamedTuple):
    """`take` records of a shard after the first `skip`."""

    shard: str
    skip: int
    take: int
    records: int  # in the whole shard, as TFDS counted them


def _pieces(splits: Any, wanted: str, folder: str, split: str) -> list[_Piece]:
    """What TFDS says `wanted` consists of, with shards in `folder`."""
    names = re.findall(r"(?:^|\+)\s*([^\[+]+)", wanted)
    if not names or not {name.strip() for name in names} <= set(splits):
        raise DataError(
            f"the TFDS dataset in {folder} has no split {wanted!r}; it has: "
            f"{', '.join(sorted(splits))}; set --config.data.{split}_split"
        )
    try:
        instructions = splits[wanted].file_instructions
    except Exception as error:  # ValueError, AssertionError and others, by what is wrong
        raise DataError(
            f"TFDS cannot make the split {wanted!r} of {folder}: {gist(error)}"
        ) from error
    pieces = [
        _Piece(f"{folder}/{Path(i.filename).name}", i.skip, i.take, i.examples_in_shard)
        for i in instructions
    ]
    if not sum(piece.take for piece in pieces):
        raise DataError(f"the split {wanted!r} of the TFDS dataset in {folder} is empty")
    return pieces


def _check_shards(pieces: list[_Piece], folder: str) -> dict[str, int]:
    """Bytes of each shard, by its name."""
    there = storage.lengths(folder)
    names = dict.fromkeys(piece.shard.rpartition("/")[2] for piece in pieces)
    missing = [name for name in names if name not in there]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(names)} shards are missing, first {folder}/{missing[0]}; "
            "copy them there, or prepare the dataset again"
        )
    return {name: there[name] for name in names}


def _array_records(pieces: list[_Piece], folder: str) -> _ArrayRecords:
    if storage.is_remote(folder):
        raise DataError(
            f"{folder} is stored as array_record, which is read from local disks only; copy it to "
            "one, or prepare it with file_format='tfrecord'"
        )
    _check_shards(pieces, folder)
    from array_record.python import array_record_data_source  # 0.1 s

    paths = [f"{piece.shard}[{piece.skip}:{piece.skip + piece.take}]" for piece in pieces]
    records = array_record_data_source.ArrayRecordDataSource(paths)
    ends = np.cumsum([piece.take for piece in pieces])
    return _ArrayRecords(records, tuple(piece.shard for piece in pieces), tuple(ends.tolist()))


def _tfrecords(pieces: list[_Piece], folder: str) -> _TFRecords:
    index = tfrecord.offsets(folder, _check_shards(pieces, folder))
    shards = tuple(dict.fromkeys(piece.shard for piece in pieces))
    numbers = {shard: number for number, shard in enumerate(shards)}
    columns = []
    for piece in pieces:
        starts = index[piece.shard.rpartition("/")[2]]
        if len(starts) - 1 != piece.records:
            raise DataError(
                f"{piece.shard} holds {len(starts) - 1} records, but dataset_info.json says "
                f"{piece.records}; copy both again"
            )
        records = np.arange(piece.skip, piece.skip + piece.take)
        places = np.full(len(records), numbers[piece.shard])
        columns.append(np.stack([places, records, starts[records], starts[records + 1]]))
    places, records, begins, ends = np.concatenate(columns, axis=1)
    return _TFRecords(shards, places.astype(np.int32), records.astype(np.int32), begins, ends)
