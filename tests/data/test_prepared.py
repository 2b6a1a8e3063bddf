"""Datasets prepared by TFDS, in both forms, read without TensorFlow."""

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import tensorflow_datasets
from array_record.python import array_record_data_source
from PIL import Image

from mobilevit_jax.data import prepared, storage, tfrecord
from mobilevit_jax.data.record import CorruptError, DataError, Record, Source

FORMS = ("array_record", "tfrecord")


def encoded(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def framed(records: Sequence[bytes]) -> bytes:
    """A TFRecord file. Its format is tested in test_tfrecord.py; checksums of data are not read."""
    lengths = [struct.pack("<Q", len(data)) for data in records]
    crcs = tfrecord.masked_crc(np.frombuffer(b"".join(lengths), np.uint8).reshape(-1, 8))
    return b"".join(
        length + struct.pack("<I", crc) + data + bytes(4)
        for length, crc, data in zip(lengths, crcs, records, strict=True)
    )


class TinyPictures(tensorflow_datasets.core.GeneratorBasedBuilder):
    """Pictures as files in memory: an array would have to be encoded, which takes TensorFlow."""

    VERSION = tensorflow_datasets.core.Version("1.0.0")
    FEATURES: ClassVar[dict[str, Any]] = {
        "image": tensorflow_datasets.features.Image(shape=(None, None, 3)),
        "label": tensorflow_datasets.features.ClassLabel(names=["cat", "dog", "newt"]),
        "file_name": tensorflow_datasets.features.Text(),
    }

    def _info(self):
        features = tensorflow_datasets.features.FeaturesDict(self.FEATURES)
        return tensorflow_datasets.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10), "held": self._generate_examples(4)}

    def _generate_examples(self, count):
        for i in range(count):
            row = {
                "image": io.BytesIO(encoded(10 * i)),
                "label": -1 if i == 9 else i % 3,
                "file_name": f"{i}.png",
                "id": i,
            }
            yield i, {key: value for key, value in row.items() if key in self.FEATURES}


class NoImages(TinyPictures):
    FEATURES: ClassVar[dict[str, Any]] = {
        "id": tensorflow_datasets.features.Scalar(dtype=np.int64),
        "label": tensorflow_datasets.features.ClassLabel(num_classes=3),
    }


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same dataset in both forms; TFRecord in three shards of 4, 3, 3 and one of 4 records."""
    builder = TinyPictures(
        data_dir=tmp_path_factory.mktemp("tensorflow_datasets"), file_format="array_record"
    )
    builder.download_and_prepare()
    root = Path(builder.data_path)
    other = tmp_path_factory.mktemp("tfrecord") / "tiny_pictures" / "1.0.0"
    other.mkdir(parents=True)
    for path in (*root.glob("*.json"), *root.glob("*.txt")):
        shutil.copy(path, other)
    for split, lengths in (("train", [4, 3, 3]), ("held", [4])):
        (shard,) = root.glob(f"*{split}.array_record*")
        rows = list(array_record_data_source.ArrayRecordDataSource(str(shard)))
        for i, length in enumerate(lengths):
            name = f"tiny_pictures-{split}.tfrecord-{i:05}-of-{len(lengths):05}"
            (other / name).write_bytes(framed(rows[:length]))
            rows = rows[length:]
        edit(other, split, shardLengths=[str(length) for length in lengths])
    edit(other, fileFormat="tfrecord")
    return {"array_record": root, "tfrecord": other}


@pytest.fixture(params=FORMS)
def root(request: pytest.FixtureRequest, originals: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the dataset, in each form."""
    copy = tmp_path / "tiny_pictures" / "1.0.0"
    shutil.copytree(originals[request.param], copy)
    return copy


@pytest.fixture
def tfrecords(originals: dict[str, Path], tmp_path: Path) -> Path:
    copy = tmp_path / "tiny_pictures" / "1.0.0"
    shutil.copytree(originals["tfrecord"], copy)
    return copy


def edit(root: Path, split: str | None = None, **values: Any) -> None:
    """Changes dataset_info.json, or its entry on a split."""
    path = root / "dataset_info.json"
    info = json.loads(path.read_text())
    (found,) = [info] if split is None else [s for s in info["splits"] if s["name"] == split]
    found |= values
    path.write_text(json.dumps(info))


def says(error: pytest.ExceptionInfo[DataError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_reads_both_forms(root: Path):
    val = prepared.tfds("val", root=str(root), val_split="held")
    assert val.class_names == ("cat", "dog", "newt")
    assert len(val) == 4
    seen = {(val[i].image, val[i].label) for i in range(4)}
    assert seen == {(encoded(10 * i), i % 3) for i in range(4)}
    assert val[2].name == "tiny_pictures/held[2]"


@pytest.mark.parametrize(
    "spec",
    [
        "held",
        "held[:90%]",
        "held[-1:]",
        "train[:3]+held",
        "held + train[1:8]",
        "train[30%:60%]",
        "train[2:5]+train[7:8]+train[:2]",
    ],
)
def test_slices_are_those_of_tfds(spec: str, root: Path, originals: dict[str, Path]):
    builder: Any = tensorflow_datasets.builder_from_directory(originals["array_record"])
    rows = builder.as_data_source(
        spec, decoders={"image": tensorflow_datasets.decode.SkipDecoding()}
    )
    source = prepared.tfds("train", root=str(root), train_split=spec)
    assert len(source) == len(rows) > 0
    for i, row in enumerate(rows):
        if row["label"] >= 0:
            assert source[i] == Record(row["image"], row["label"], f"tiny_pictures/{spec}[{i}]")


def test_read_from_many_threads(root: Path):
    expected = prepared.tfds("val", root=str(root), val_split="held")
    numbers = [0, 1, 2, 3] * 25
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):  # a new source opens its files when it is first read
            source = prepared.tfds("val", root=str(root), val_split="held")
            records = list(pool.map(source.__getitem__, numbers))
            assert records == [expected[i] for i in numbers]


def test_pickles(root: Path):
    source = prepared.tfds("val", root=str(root), val_split="held[1:]")
    assert isinstance(source, Source)
    source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert (len(copy), copy.class_names) == (3, source.class_names)
    assert [copy[i] for i in range(3)] == [source[i] for i in range(3)]


def test_tensorflow_is_never_imported(originals: dict[str, Path]):
    code = (
        "import sys\n"
        "from mobilevit_jax.data import sources\n"
        "early = [name for name in ('tensorflow_datasets', 'fsspec') if name in sys.modules]\n"
        "for root in sys.argv[1:]:\n"
        "    source = sources.SOURCES['tfds']('val', root=root, val_split='held')\n"
        "    print(len([source[i] for i in range(len(source))]))\n"
        "print(early, [name for name in ('tensorflow', 'jax', 'torch') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, originals.values())],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert done.stdout == "4\n4\n[] []\n"


def test_remote(originals: dict[str, Path], cache: Path):
    system = fsspec.filesystem("memory")
    for form, root in originals.items():
        for path in root.iterdir():
            system.pipe_file(f"/{form}/1.0.0/{path.name}", path.read_bytes())
    source = prepared.tfds("train", root="memory://tfrecord/1.0.0/", train_split="train[:9]")
    local = prepared.tfds("train", root=str(originals["tfrecord"]), train_split="train[:9]")
    labelled = [i for i in range(9) if b"\xff\xff" not in local.rows[i]]
    assert [source[i] for i in labelled] == [local[i] for i in labelled]
    assert source.class_names == ("cat", "dog", "newt")
    assert len(list(cache.glob("mobilevit_jax/*"))) == 1
    with pytest.raises(DataError) as error:
        prepared.tfds("train", root="memory://array_record/1.0.0")
    assert "array_record, which is read from local disks only" in says(error)
    with pytest.raises(DataError, match="no prepared TFDS dataset in memory://nowhere"):
        prepared.tfds("train", root="memory://nowhere")
    system.rm("/tfrecord", recursive=True)
    system.rm("/array_record", recursive=True)


def test_unlabelled_record(root: Path):
    train = prepared.tfds("train", root=str(root))
    messages = []
    for i in range(len(train)):
        try:
            train[i]
        except DataError as error:
            assert not isinstance(error, CorruptError)
            messages.append(str(error))
    assert len(messages) == 1
    assert f"of {root} has label -1, which is none of the 3 classes" in messages[0]


def test_missing(root: Path, tmp_path: Path):
    with pytest.raises(DataError) as error:
        prepared.tfds("train", root=str(tmp_path / "nowhere"))
    assert f"no prepared TFDS dataset in {tmp_path}/nowhere" in says(error)
    assert "give --config.data.root" in says(error)
    for above in (root.parent, root.parent.parent):
        with pytest.raises(DataError) as error:
            prepared.tfds("train", root=str(above))
        assert f"did you mean {root}?" in says(error)


@pytest.mark.parametrize("name", ["test", "", "train[:2]+test"])
def test_unknown_split(name: str, root: Path):
    with pytest.raises(DataError) as error:
        prepared.tfds("val", root=str(root), val_split=name)
    assert f"has no split {name!r}; it has: held, train" in says(error)
    assert "--config.data.val_split" in says(error)


def test_our_own_splits_are_two(root: Path):
    with pytest.raises(ValueError, match="split is 'test'; allowed: train, val"):
        prepared.tfds("test", root=str(root))


@pytest.mark.parametrize("name", ["train[:x]", "train[2:2]", "train[:300%]"])
def test_bad_slice(name: str, root: Path):
    with pytest.raises(DataError) as error:
        prepared.tfds("train", root=str(root), train_split=name)
    assert repr(name) in says(error)


def test_other_file_format(root: Path):
    edit(root, fileFormat="parquet")
    with pytest.raises(DataError) as error:
        prepared.tfds("train", root=str(root))
    assert "stored as parquet, which is not read here" in says(error)
    assert 'file_format="array_record"' in says(error)


def test_metadata_missing_or_damaged(root: Path):
    for name, content in (
        ("features.json", None),
        ("features.json", "{"),
        ("dataset_info.json", "{"),
    ):
        path = root / name
        before = path.read_text()
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(DataError) as error:
            prepared.tfds("train", root=str(root))
        assert f"TFDS cannot read the dataset_info.json and features.json of {root}" in says(error)
        path.write_text(before)


def test_no_images(tmp_path: Path):
    builder = NoImages(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    with pytest.raises(DataError) as error:
        prepared.tfds("train", root=str(builder.data_path))
    assert "has no feature `image` of type Image; it has: id (Scalar), label" in says(error)


def test_shards_missing(root: Path):
    shards = sorted(root.glob("*-train.*"))
    shards[-1].unlink()
    with pytest.raises(DataError) as error:
        prepared.tfds("train", root=str(root))
    assert f"1 of {len(shards)} shards are missing, first {shards[-1]}" in says(error)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.99])
def test_array_record_cut_short(share: float, originals: dict[str, Path], tmp_path: Path):
    root = tmp_path / "1.0.0"
    shutil.copytree(originals["array_record"], root)
    whole = prepared.tfds("train", root=str(root), train_split="held+train")
    expected = {whole.rows[i] for i in range(len(whole))}
    (shard,) = root.glob("*train.array_record*")
    os.truncate(shard, int(share * shard.stat().st_size))
    source = prepared.tfds("train", root=str(root), train_split="held+train")
    failed = 0
    for i in range(14):
        try:
            assert source.rows[i] in expected
        except DataError:
            failed += 1
            with pytest.raises(DataError) as error:
                source[i]
            assert i >= 4
            assert f"cannot read tiny_pictures/held+train[{i}] of {root}: " in says(error)
            assert f"is {shard} whole? Copy it again" in says(error)
            assert not isinstance(error.value, CorruptError)
    assert failed


def test_tfrecord_cut_short(tfrecords: Path):
    shard = sorted(tfrecords.glob("*-train.*"))[1]
    source = prepared.tfds("train", root=str(tfrecords))
    size = shard.stat().st_size
    os.truncate(shard, size - 10)
    with pytest.raises(DataError) as error:  # while it is used
        source[6]
    assert says(error).startswith(f"cannot read tiny_pictures/train[6] of {tfrecords}: record 2: ")
    assert f"{shard} is cut short" in says(error)
    assert not isinstance(error.value, CorruptError)
    with pytest.raises(DataError) as error:  # before
        prepared.tfds("train", root=str(tfrecords))
    assert says(error) == (
        f"record 2 of {shard} is cut off: the file has {size - 10} bytes; copy it again"
    )
    shard.unlink()
    storage._descriptors.clear()
    with pytest.raises(DataError) as error:  # vanished
        source[6]
    assert f"cannot read {shard}: No such file or directory" in says(error)


def test_tfrecord_of_another_length(tfrecords: Path):
    edit(tfrecords, "train", shardLengths=["4", "2", "4"])
    with pytest.raises(DataError) as error:
        prepared.tfds("train", root=str(tfrecords))
    assert "00001-of-00003 holds 3 records, but dataset_info.json says 2" in says(error)


def test_broken_examples_can_be_replaced(tfrecords: Path):
    (shard,) = tfrecords.glob("*-held.*")
    feature = tensorflow_datasets.proto.tf_feature_pb2
    bytes_list = feature.Feature(bytes_list=feature.BytesList(value=[b"1"]))
    message = tensorflow_datasets.proto.tf_example_pb2.Example(
        features=feature.Features(feature={"image": bytes_list, "label": bytes_list})
    )
    shard.write_bytes(framed([b"\xff" * 30, b"", b"\x0a\x7f", message.SerializeToString()]))
    source = prepared.tfds("val", root=str(tfrecords), val_split="held")
    for i in range(4):
        with pytest.raises(CorruptError) as error:
            source[i]
        assert f"tiny_pictures/held[{i}] of {tfrecords} is broken" in says(error)
