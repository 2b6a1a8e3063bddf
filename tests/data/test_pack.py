"""Reading packs, from disk and through fsspec, and every way in which one can be wrong."""

import itertools
import json
import os
import pickle
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilevit_jax.data import pack, prepare, shards, storage
from mobilevit_jax.data.record import SPLITS, DataError, Record, Source
from tests.data import ilsvrc


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    top = tmp_path_factory.mktemp("pack")
    for name in "abc":
        files = {f"{i}.jpg": ilsvrc.picture(100 * ord(name) + i) for i in range(9)}
        ilsvrc.write(top / "source" / name, files)
    prepare.folder(
        str(top / "source"),
        top / "target",
        val_fraction=0.3,
        options=shards.Options(shard_size=4),
        workers=2,
        progress=lambda *_: None,
    )
    return top / "target"


@pytest.fixture
def copied(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "copy")


def records(root, split="train") -> list[Record]:
    source = pack.pack(split, root=str(root))
    return [source[i] for i in range(len(source))]


def refused(root, split="train") -> str:
    with pytest.raises(DataError) as error:
        pack.pack(split, root=str(root))
    said = str(error.value)
    assert "\n" not in said
    assert str(root) in said
    return said


def change(root, split="train", **arrays):
    """Writes other arrays into an index, with a right checksum."""
    path = root / f"{split}.npz"
    index = pack.parse_index(path.read_bytes(), "")
    changed = {**index._asdict(), **{name: make(index) for name, make in arrays.items()}}
    path.write_bytes(shards.npz({name: a for name, a in changed.items() if a is not None}))
    summary = json.loads((root / "pack.json").read_text())
    summary["splits"][split]["index_crc32"] = zlib.crc32(path.read_bytes())
    (root / "pack.json").write_text(json.dumps(summary))


# --- reading ------------------------------------------------------------------------------------


def test_a_pack_is_a_source(packed):
    source = pack.pack("train", root=str(packed))
    assert isinstance(source, Source)
    assert source.class_names == ("a", "b", "c")
    assert len(source) + len(pack.pack("val", root=str(packed))) == 27
    assert list(source) == records(packed)  # so it raises IndexError at its end
    assert source[-1] == source[len(source) - 1]
    for i in (len(source), -len(source) - 1):
        with pytest.raises(IndexError):
            source[i]
    for record in source:
        path, _, name = record.name.partition(": ")
        assert Path(path).parent == packed
        original = packed.parent / "source" / name
        assert record.image == original.read_bytes()
        assert record.label == "abc".index(name[0])


def test_pickled_it_is_small_and_reads_the_index_again(packed):
    for split in SPLITS:
        source = pack.pack(split, root=str(packed))
        pickled = pickle.dumps(source)
        assert len(pickled) < 500
        assert list(pickle.loads(pickled)) == list(source)


def test_many_threads(packed):
    source = pack.pack("train", root=str(packed))
    expected = list(source)
    with ThreadPoolExecutor(8) as pool:
        order = list(range(len(source))) * 20
        assert list(pool.map(source.__getitem__, order)) == [expected[i] for i in order]


def test_home_and_a_slash_at_the_end(packed, monkeypatch):
    monkeypatch.setenv("HOME", str(packed.parent))
    assert records("~/target/") == records(packed)


def test_memory_for_as_many_images_as_imagenet_has(copied):
    n = 1_281_167
    names = b"n01440764_10026.JPEG"
    index = pack.Index(
        shard=np.zeros(n, np.int32),
        offset=np.full(n, 512, np.int64),
        size=np.full(n, 10, np.uint32),
        label=np.arange(n, dtype=np.int32) % 3,
        crc32=np.zeros(n, np.uint32),
        name_size=np.full(n, len(names), np.uint32),
        names=np.frombuffer(names * n, np.uint8),
    )
    change(copied, **{name: lambda _, a=array: a for name, array in index._asdict().items()})
    summary = json.loads((copied / "pack.json").read_text())
    summary["splits"]["train"]["images"] = n
    (copied / "pack.json").write_text(json.dumps(summary))
    source = pack.pack("train", root=str(copied))
    arrays = [*source.index, source.name_ends]
    assert sum(array.nbytes for array in arrays) < 60 * n
    assert source[n - 1].label == (n - 1) % 3
    assert source[n - 1].name.endswith(": n01440764_10026.JPEG")
    assert len(pickle.dumps(source)) < 500


# --- remote -------------------------------------------------------------------------------------


@pytest.fixture
def remote(packed):
    files = fsspec.filesystem("memory")
    for path in packed.iterdir():
        files.pipe_file(f"/bucket/pack/{path.name}", path.read_bytes())
    yield "memory://bucket/pack"
    files.rm("/bucket", recursive=True)


def test_remote(remote, packed):
    for split in SPLITS:
        expected = records(packed, split)
        for root in (remote, remote + "/"):
            found = records(root, split)
            assert [r[:2] for r in found] == [r[:2] for r in expected]
        assert found[0].name.startswith(f"{remote}/{split}-00000.tar: ")
    source = pack.pack("val", root=remote)
    assert list(pickle.loads(pickle.dumps(source))) == list(source)
    checked = prepare.verify(remote, workers=2, progress=lambda *_: None)
    assert sum(checked.images.values()) == 27


def test_remote_faults(remote, packed):
    files = fsspec.filesystem("memory")
    assert "no pack in memory://bucket/nothing" in refused("memory://bucket/nothing")
    whole = (packed / "train-00001.tar").read_bytes()
    files.pipe_file("/bucket/pack/train-00001.tar", whole[:5000])
    assert "train-00001.tar is cut short: 5000 bytes" in refused(remote)
    files.rm("/bucket/pack/train-00001.tar")
    assert "shards are missing" in refused(remote)


def test_a_lost_connection_is_tried_three_times(remote, monkeypatch):
    source = pack.pack("train", root=remote)
    calls = itertools.count()
    monkeypatch.setattr(storage, "WAITS", (0.0, 0.0))

    def breaks(*_, **__):
        next(calls)
        raise ConnectionResetError("connection reset by peer")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", breaks)
    with pytest.raises(DataError, match="failed three times: connection reset"):
        source[0]
    assert next(calls) == 3


# --- what is wrong ------------------------------------------------------------------------------


def test_the_split_is_checked(packed):
    with pytest.raises(ValueError, match="split is 'test'; allowed: train, val"):
        pack.pack("test", root=str(packed))


def test_no_pack(tmp_path):
    for root in (tmp_path / "nowhere", tmp_path):
        said = refused(root)
        assert "no pack in" in said
        assert "launch.py prepare" in said
    (tmp_path / ".prepare.json").write_text("{}")
    assert "is not finished; run the same `launch.py prepare` again" in refused(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        "{",
        "\0",
        '{"format": "mobilevit_jax pack", "version": 1}',
        "[1e999]",
    ],
)
def test_another_pack_json(text, copied):
    (copied / "pack.json").write_text(text)
    assert "is damaged, or was not written by `launch.py prepare`" in refused(copied)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_other_value_in_pack_json_is_a_data_error_or_harmless(packed, data):
    """Opens a copy with a changed summary; whatever it says, nothing but DataError comes out."""
    path = packed.parent / "changed"
    if not path.exists():
        shutil.copytree(packed, path)
    summary = json.loads((packed / "pack.json").read_text())
    place = data.draw(st.sampled_from([summary, summary["splits"], summary["splits"]["train"]]))
    key = data.draw(st.sampled_from(sorted(place)))
    scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=3)
    place[key] = data.draw(
        scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=3), scalars)
    )
    (path / "pack.json").write_text(json.dumps(summary))
    try:
        source = pack.pack("train", root=str(path))
        list(source)
    except DataError as error:
        assert "\n" not in str(error)


def test_a_newer_version(copied):
    summary = json.loads((copied / "pack.json").read_text())
    (copied / "pack.json").write_text(json.dumps({**summary, "version": 2}))
    assert "is of version 2, but this program reads version 1" in refused(copied)


def test_the_index_of_another_pack(copied):
    shutil.copy(copied / "val.npz", copied / "train.npz")
    assert "train.npz is damaged, or belongs to another pack" in refused(copied)
    (copied / "train.npz").unlink()
    assert "train.npz" in refused(copied)


@pytest.mark.parametrize("content", [b"", b"PK", b"\x93NUMPY", b"not a zip", None])
def test_no_index(content, copied):
    path = copied / "train.npz"
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)
    summary = json.loads((copied / "pack.json").read_text())
    summary["splits"]["train"]["index_crc32"] = zlib.crc32(path.read_bytes())
    (copied / "pack.json").write_text(json.dumps(summary))
    assert "train.npz is no index of a pack" in refused(copied)


def replaced(name, value):
    def make(index):
        array = getattr(index, name).copy()
        array[3] = value
        return array

    return {name: make}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (replaced("label", 3), "gives image 3 the label 3, which is none of the 3 classes"),
        (replaced("label", -1), "gives image 3 the label -1"),
        (replaced("offset", 10**9), "points outside the shards"),
        (replaced("offset", 2**63 - 1), "points outside the shards"),
        (replaced("offset", -1), "points outside the shards"),
        (replaced("size", 2**31), "points outside the shards"),
        (replaced("shard", 99), "points outside the shards"),
        (replaced("shard", -1), "points outside the shards"),
        (replaced("name_size", 0), "does not list the"),
        ({"label": lambda index: index.label[1:]}, "does not list the"),
        (
            {name: lambda index, n=name: getattr(index, n)[:0] for name in pack.Index._fields},
            "does not list the",
        ),
        ({"label": lambda _: None}, "is no index of a pack"),
        ({"label": lambda index: index.label.astype(object)}, "is no index of a pack"),
        ({"label": lambda index: index.label.astype(np.float64)}, "is no index of a pack"),
        ({"offset": lambda index: index.offset[:, None]}, "is no index of a pack"),
    ],
)
def test_a_wrong_index(arrays, message, copied):
    change(copied, **arrays)
    assert message in refused(copied)


def test_shards_that_are_missing_or_not_whole(copied):
    path = copied / "train-00001.tar"
    whole = path.read_bytes()
    for content, message in (
        (whole[:7000], "is cut short: 7000 bytes, but"),
        (b"", "is cut short: 0 bytes"),
        (whole + bytes(512), "is not the shard of this index"),
    ):
        path.write_bytes(content)
        assert f"{path} {message}" in refused(copied)
    path.unlink()
    said = refused(copied)
    assert "shards are missing in" in said
    assert "first train-00001.tar" in said
    assert records(copied, "val")  # is whole


def test_a_directory_that_vanishes(copied):
    source = pack.pack("train", root=str(copied))
    pickled = pickle.dumps(source)
    shutil.rmtree(copied)
    with pytest.raises(DataError, match="cannot read"):
        source[0]
    with pytest.raises(DataError, match="no pack in"):
        pickle.loads(pickled)


def test_a_shard_cut_short_while_it_is_read(copied):
    source = pack.pack("train", root=str(copied))
    source[0]
    os.truncate(copied / "train-00000.tar", 700)
    with pytest.raises(DataError, match=r"train-00000\.tar is cut short"):
        source[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden(copied):
    (copied / "pack.json").chmod(0)
    assert "chmod" in refused(copied)
