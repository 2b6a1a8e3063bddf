"""TFRecord shards framed by hand, their index, and Examples made by the real protobuf."""

import errno
import io
import os
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from mobilevit_jax.data import storage, tfrecord
from mobilevit_jax.data.record import DataError


def crc32c(data: bytes) -> int:
    """Bit by bit, as in RFC 3720."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def framed(records: Sequence[bytes]) -> bytes:
    """A TFRecord file: length, masked CRC of the length, data, masked CRC of the data."""
    lengths = [struct.pack("<Q", len(data)) for data in records]
    return b"".join(
        length + masked(length) + data + masked(data)
        for length, data in zip(lengths, records, strict=True)
    )


RECORDS = [b"first", b"", b"x" * 5000, b"last one"]
STARTS = [0, 21, 37, 5053, 5077]  # and the end


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mobilevit_jax"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a").write_bytes(framed(RECORDS))
    (tmp_path / "shards" / "b").write_bytes(framed([b"other"]))
    return tmp_path / "shards"


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards scanned."""
    names: list[str] = []
    scan = tfrecord.scan

    def counted(path: str, *, size: int):
        names.append(path.rpartition("/")[2])
        return scan(path, size=size)

    monkeypatch.setattr(tfrecord, "scan", counted)
    return names


def offsets(folder: Path | str, *names: str) -> dict[str, list[int]]:
    sizes = storage.lengths(str(folder))
    found = tfrecord.offsets(str(folder), {name: sizes[name] for name in names})
    return {name: part.tolist() for name, part in found.items()}


def test_crc_is_castagnolis():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of the CRC catalogue
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    rows = np.random.default_rng(0).integers(0, 256, (50, 8), np.uint8)
    expected = [int.from_bytes(masked(row.tobytes()), "little") for row in rows]
    assert tfrecord.masked_crc(rows).tolist() == expected


def test_scan_and_read(folder: Path):
    path = str(folder / "a")
    assert tfrecord.scan(path, size=5077).tolist() == STARTS
    for i, data in enumerate(RECORDS):
        record = tfrecord.read_record(path, STARTS[i], STARTS[i + 1])
        assert record[tfrecord.HEADER :] == data
    (folder / "empty").touch()
    assert tfrecord.scan(str(folder / "empty"), size=0).tolist() == [0]


@pytest.mark.parametrize("block", [12, 13, 40, 4096, 10**6])
def test_scan_in_blocks_of_any_size(block: int, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tfrecord, "BLOCK", {False: block, True: block})
    assert tfrecord.scan(str(folder / "a"), size=5077).tolist() == STARTS


def test_index_is_kept_beside_the_shards(folder: Path, cache: Path, scanned: list[str]):
    assert offsets(folder, "a") == {"a": STARTS}
    assert offsets(folder, "a") == {"a": STARTS}
    assert scanned == ["a"]
    assert offsets(folder, "b", "a") == {"b": [0, 21], "a": STARTS}
    assert offsets(folder, "a", "b") == {"a": STARTS, "b": [0, 21]}
    assert scanned == ["a", "b"]
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", tfrecord.INDEX]
    assert (folder / tfrecord.INDEX).stat().st_mode & 0o777 == 0o644
    assert not cache.exists()


def test_index_follows_its_shards(folder: Path, scanned: list[str]):
    offsets(folder, "a", "b")
    (folder / "b").write_bytes(framed([b"longer than before", b"and two"]))
    scanned.clear()
    assert offsets(folder, "a", "b") == {"a": STARTS, "b": [0, 34, 57]}
    assert scanned == ["b"]


@pytest.mark.parametrize("damage", ["empty", "cut", "other", "short"])
def test_damaged_index_is_made_anew(damage: str, folder: Path, scanned: list[str]):
    offsets(folder, "a", "b")
    index = folder / tfrecord.INDEX
    whole = index.read_bytes()
    if damage in ("empty", "cut"):
        index.write_bytes(whole[: 0 if damage == "empty" else len(whole) // 2])
    else:
        arrays = dict(np.load(io.BytesIO(whole)))
        arrays |= {"starts": arrays["starts"][:-1]} if damage == "short" else {}
        np.savez(index, **{k: v for k, v in arrays.items() if damage == "short" or k != "ends"})
    scanned.clear()
    assert offsets(folder, "a") == {"a": STARTS}
    assert scanned == ["a"]
    assert offsets(folder, "a") == {"a": STARTS}
    assert scanned == ["a"]


def test_index_in_the_cache_where_the_folder_is_read_only(
    folder: Path, cache: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch
):
    make = tempfile.mkstemp

    def mkstemp(prefix: str, dir: Path):
        if dir == folder or not writable:
            raise OSError(errno.EROFS, "Read-only file system", str(dir))
        return make(prefix=prefix, dir=dir)

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    writable = False
    assert offsets(folder, "a") == {"a": STARTS}  # nowhere to keep it
    writable = True
    for _ in range(2):
        assert offsets(folder, "a") == {"a": STARTS}
    assert scanned == ["a", "a"]
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    (file,) = cache.iterdir()
    assert file.name.endswith(tfrecord.INDEX)


def test_full_disk_leaves_no_draft(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def savez(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    assert offsets(folder, "a") == {"a": STARTS}
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]


def test_index_of_remote_shards(folder: Path, cache: Path, scanned: list[str]):
    system = fsspec.filesystem("memory")
    for name in ("a", "b"):
        system.pipe_file(f"/tfrecord/{name}", (folder / name).read_bytes())
    for _ in range(2):
        assert offsets("memory://tfrecord", "a", "b") == {"a": STARTS, "b": [0, 21]}
    assert sorted(scanned) == ["a", "b"]
    (file,) = cache.iterdir()
    # somebody may put the index beside them
    system.pipe_file(f"/tfrecord/{tfrecord.INDEX}", file.read_bytes())
    file.unlink()
    assert offsets("memory://tfrecord", "a", "b") == {"a": STARTS, "b": [0, 21]}
    assert sorted(scanned) == ["a", "b"]
    system.rm("/tfrecord", recursive=True)


def test_shard_cut_short(folder: Path):
    path = folder / "a"
    whole = path.read_bytes()
    for size in (1, 11, 12, 20, 22, 36, 48, 5000, 5076):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError) as error:
            offsets(folder, "a")
        complete = sum(start <= size for start in STARTS[1:])
        assert str(path) in str(error.value)
        assert f"the file has {size} bytes; copy it again" in str(error.value)
        if size >= STARTS[complete] + tfrecord.HEADER:
            assert str(error.value).startswith(f"record {complete} of {path} is cut off")
    assert not (folder / tfrecord.INDEX).exists()


@pytest.mark.parametrize("at", [0, 7, 8, 21, 37, 5060])
def test_damaged_length(at: int, folder: Path):
    path = folder / "a"
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)
    number = sum(start <= at for start in STARTS) - 1
    with pytest.raises(DataError) as error:
        offsets(folder, "a")
    assert str(error.value).startswith(f"record {number} of {path} is damaged")


def test_not_a_tfrecord_file(folder: Path):
    for content in (b"<html>not found</html>", bytes(1000), os.urandom(1000)):
        (folder / "a").write_bytes(content)
        with pytest.raises(DataError, match=r"record 0 of .*/a is damaged"):
            offsets(folder, "a")


def test_index_of_another_shard(folder: Path):
    path = folder / "a"
    starts = offsets(folder, "a")["a"]
    path.write_bytes(framed([b"", b"first", b"x" * 5000, b"last one"]))  # as many bytes
    with pytest.raises(DataError) as error:
        tfrecord.read_record(str(path), starts[0], starts[1])
    assert "has no record at byte 0 any more: its index is out of date" in str(error.value)
    assert f"delete {folder}/{tfrecord.INDEX} and " in str(error.value)
    os.truncate(path, 30)
    with pytest.raises(DataError, match="is cut short: bytes 37 to 5049 were asked for"):
        tfrecord.read_record(str(path), starts[2], starts[3])


def example(**features: list[bytes] | list[int] | list[float]) -> bytes:
    """Made by protobuf, from the messages' own definition."""
    rows = {}
    for name, values in features.items():
        if values and isinstance(values[0], bytes):
            feature = tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=values))
        elif values and isinstance(values[0], float):
            feature = tf_feature_pb2.Feature(float_list=tf_feature_pb2.FloatList(value=values))
        else:
            feature = tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=values))
        rows[name] = feature
    return tf_example_pb2.Example(
        features=tf_feature_pb2.Features(feature=rows)
    ).SerializeToString()


integers = st.integers(-(2**63), 2**63 - 1)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=20),
        st.one_of(
            st.lists(st.binary(max_size=300), min_size=1, max_size=4),
            st.lists(integers, max_size=20),
        ),
        max_size=5,
    ),
    st.binary(max_size=20),
)
def test_parses_what_protobuf_writes(features: dict[str, list[bytes] | list[int]], before: bytes):
    data = before + example(**features)
    parsed = tfrecord.parse_example(data, list(features), start=len(before))
    assert parsed == features
    assert tfrecord.parse_example(data, [], start=len(before)) == {}


def test_parses_only_what_is_wanted():
    data = example(image=[b"\xff\xd8"], label=[-1], box=[0.5, 1.5], file_name=[b"1.jpg"])
    assert tfrecord.parse_example(data, ("image", "label")) == {
        "image": [b"\xff\xd8"],
        "label": [-1],
    }
    assert tfrecord.parse_example(data, ("mask",)) == {}
    with pytest.raises(ValueError, match="floating-point numbers"):
        tfrecord.parse_example(data, ("box",))


def part(number: int, content: bytes) -> bytes:
    """A field of bytes shorter than 128."""
    return bytes([number << 3 | 2, len(content)]) + content


def test_parses_what_other_writers_may_write():
    unpacked = part(3, bytes([1 << 3, 7, 1 << 3, 0x96, 0x01]))  # 7 and 150, each with its tag
    entry = part(2, unpacked) + part(1, b"label")  # the value before the key
    unknown = (
        bytes([9 << 3, 5]) + bytes([10 << 3 | 1, *range(8)]) + bytes([11 << 3 | 5, 1, 2, 3, 4])
    )
    data = unknown + part(1, part(1, entry) + unknown + part(5, b"x")) + part(7, b"later")
    assert tfrecord.parse_example(data, ("label",)) == {"label": [7, 150]}
    no_value = part(1, part(1, part(1, b"label")))
    assert tfrecord.parse_example(no_value, ("label",)) == {"label": []}


@settings(
    deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_mutated_examples_are_refused_or_parsed(data: st.DataObject):
    message = bytearray(example(image=[b"\xff\xd8" * 30], label=[5], other=[1.5]))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(message) - 1))
        message[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        values = tfrecord.parse_example(bytes(message), ("image", "label"))
    except ValueError:
        return
    assert set(values) <= {"image", "label"}
