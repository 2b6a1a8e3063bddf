"""Bytes from local disks and through fsspec: the same answers, and every failure in one line."""

import errno
import os
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mobilevit_jax.data import storage
from mobilevit_jax.data.record import DataError

TREE = {"a/1.jpg": b"one", "a/deep/2.jpg": b"second", "b/3.jpg": b"3" * 1000, "top.txt": b""}


class Flaky(MemoryFileSystem):
    """A remote store that raises what `troubles` holds, one by one, before it answers."""

    protocol = "flaky"
    cachable = False
    troubles: list[Exception] = []  # noqa: RUF012
    whole = False

    def cat_file(self, path, start=None, end=None, **kwargs):
        if self.troubles:
            raise self.troubles.pop(0)
        return bytes(range(20))[None if self.whole else start : None if self.whole else end]


fsspec.register_implementation("flaky", Flaky)


@pytest.fixture(params=["local", "file://", "memory://"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """TREE, on three kinds of storage."""
    if request.param == "memory://":
        system = fsspec.filesystem("memory")
        system.store.clear()
        system.pseudo_dirs[:] = [""]
        for name, data in TREE.items():
            system.pipe_file(f"/bucket/{name}", data)
        return "memory://bucket"
    for name, data in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return str(tmp_path) if request.param == "local" else f"file://{tmp_path}"


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    return waits


def says(error: pytest.ExceptionInfo[DataError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_read(root: str):
    assert storage.is_remote(root) == ("://" in root)
    for name, data in TREE.items():
        assert storage.read(f"{root}/{name}") == data
        assert storage.length(f"{root}/{name}") == len(data)
    assert storage.read_range(f"{root}/a/deep/2.jpg", 1, 3) == b"eco"
    assert storage.read_range(f"{root}/a/deep/2.jpg", 0, 6) == b"second"
    assert storage.read_range(f"{root}/a/deep/2.jpg", 9, 0) == b""


def test_folders(root: str):
    assert storage.list_folder(root) == (["a", "b"], ["top.txt"])
    assert storage.list_folder(f"{root}/a") == (["deep"], ["1.jpg"])
    assert sorted(storage.walk(root)) == sorted(TREE)
    assert sorted(storage.walk(f"{root}/a")) == ["1.jpg", "deep/2.jpg"]
    assert storage.lengths(root) == {"top.txt": 0}
    assert storage.lengths(f"{root}/b") == {"3.jpg": 1000}
    there = {name: storage.exists(f"{root}/{name}") for name in ("a", "top.txt", "c", "a/1")}
    assert there == {"a": True, "top.txt": True, "c": False, "a/1": False}
    assert [storage.is_folder(f"{root}/{name}") for name in ("a", "top.txt", "c")] == [True, 0, 0]


def test_missing(root: str, slept: list[float]):
    missing = f"{root}/none.jpg"
    for call in (
        lambda: storage.read(missing),
        lambda: storage.read_range(missing, 0, 1),
        lambda: storage.length(missing),
        lambda: storage.list_folder(missing),
        lambda: storage.lengths(missing),
    ):
        with pytest.raises(DataError) as error:
            call()
        assert says(error).startswith(f"cannot read {missing}: ")
        assert "was it moved? Check the path" in says(error)
    assert not slept


def test_cut_short(root: str):
    path = f"{root}/a/deep/2.jpg"
    for start, size in ((0, 7), (4, 3), (100, 1)):
        with pytest.raises(DataError) as error:
            storage.read_range(path, start, size)
        assert says(error) == (
            f"{path} is cut short: bytes {start} to {start + size} were asked for, "
            "but it ends at 6; copy it again"
        )


def test_not_the_right_kind(root: str, slept: list[float]):
    with pytest.raises(DataError, match=r"cannot read .*top.txt: Not a directory"):
        storage.list_folder(f"{root}/top.txt")
    if not storage.is_remote(root):
        with pytest.raises(DataError, match=r"cannot read .*/a: Is a directory"):
            storage.read(f"{root}/a")
        with pytest.raises(DataError, match=r"cannot read .*/a: Is a directory"):
            storage.read_range(f"{root}/a", 0, 1)
    assert not slept


def test_links_and_hidden_folders(tmp_path: Path):
    for name in ("a/1.jpg", "a/.cache/2.jpg", ".git/3.jpg", "elsewhere/4.jpg", "a/.5.jpg"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).touch()
    (tmp_path / "tree/a/up").symlink_to(tmp_path / "tree")
    (tmp_path / "tree/elsewhere/again").symlink_to(tmp_path / "tree/a")
    (tmp_path / "tree/gone.jpg").symlink_to(tmp_path / "nothing")
    found = ["a/.5.jpg", "a/1.jpg", "elsewhere/4.jpg", "gone.jpg"]
    again = ["elsewhere/again/.5.jpg", "elsewhere/again/1.jpg"]
    assert sorted(storage.walk(str(tmp_path / "tree"))) == sorted(found + again)


@pytest.mark.parametrize("part", [False, True])
def test_local_troubles_that_pass(
    part: bool, tmp_path: Path, slept: list[float], monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    troubles: list[OSError] = []
    name = "_read_range_local" if part else "_read_local"
    inner = getattr(storage, name)

    def troubled(*args):
        if troubles:
            raise troubles.pop()
        return inner(*args)

    def read():
        return storage.read_range(str(path), 0, 7) if part else storage.read(str(path))

    monkeypatch.setattr(storage, name, troubled)
    for code in (errno.EIO, errno.ESTALE, errno.EMFILE):
        slept.clear()
        troubles[:] = [OSError(code, os.strerror(code))] * 2
        assert read() == b"content"
        assert slept == list(storage.WAITS) == [0.5, 2.0]
    slept.clear()
    troubles[:] = [OSError(errno.EIO, "Input/output error")] * 3
    with pytest.raises(DataError) as error:
        read()
    assert says(error) == (
        f"reading {path} failed three times: [Errno 5] Input/output error; "
        "check the disk and start again"
    )
    assert not troubles
    assert slept == [0.5, 2.0]
    troubles[:] = [PermissionError(errno.EACCES, "Permission denied")]
    with pytest.raises(DataError) as error:
        read()
    assert says(error) == (
        f"cannot read {path}: Permission denied; type `chmod -R u+rX {path}` as its owner"
    )
    assert slept == [0.5, 2.0]


def test_lost_handle_is_opened_anew(
    tmp_path: Path, slept: list[float], monkeypatch: pytest.MonkeyPatch
):
    path = str(tmp_path / "shard")
    Path(path).write_bytes(b"content")
    assert storage.read_range(path, 0, 4) == b"cont"
    lost = storage._descriptors[path]  # held on to, or the next file would get its number
    real = os.pread

    def pread(number, size, start):
        if number == lost.number:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(number, size, start)

    monkeypatch.setattr(os, "pread", pread)
    assert storage.read_range(path, 3, 4) == b"tent"
    assert storage._descriptors[path] is not lost
    assert slept == [0.5]


def test_partial_reads_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "shard"
    path.write_bytes(bytes(range(100)))
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda number, size, at: real(number, min(size, 7), at))
    assert storage.read_range(str(path), 10, 80) == bytes(range(10, 90))
    with pytest.raises(DataError, match="ends at 100"):
        storage.read_range(str(path), 10, 91)


def test_replaced_file_is_noticed(tmp_path: Path):
    path = tmp_path / "shard"
    path.write_bytes(b"old")
    assert storage.read_range(str(path), 0, 3) == b"old"
    (tmp_path / "draft").write_bytes(b"newer")
    (tmp_path / "draft").replace(path)
    assert storage.length(str(path)) == 5
    assert storage.read_range(str(path), 0, 5) == b"newer"


def test_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for i in range(40):
        (tmp_path / str(i)).write_bytes(bytes([i]) * 100)
    monkeypatch.setattr(storage, "_descriptors", {})
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (16, 16))

    def read(i):
        return storage.read_range(f"{tmp_path}/{i % 40}", i % 7, 50) == bytes([i % 40]) * 50

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(4000)))
    # Two threads that open the same file may close one more than they had to.
    kept = len(storage._descriptors)
    assert 1 <= kept <= 8
    opened = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    assert sum(path.startswith(str(tmp_path)) for path in opened) == kept


def test_remote_troubles_that_pass(slept: list[float]):
    Flaky.troubles = [OSError("reset by peer"), RuntimeError("token\n expired")]
    assert storage.read_range("flaky://bucket/x", 2, 3) == b"\x02\x03\x04"
    assert slept == [0.5, 2.0]
    Flaky.troubles = [TimeoutError()] * 3
    with pytest.raises(DataError) as error:
        storage.read("flaky://bucket/x")
    assert says(error) == (
        "reading flaky://bucket/x failed three times: TimeoutError; "
        "check the network and start again"
    )
    slept.clear()
    Flaky.troubles = [PermissionError("bucket/x")]
    with pytest.raises(DataError) as error:
        storage.read("flaky://bucket/x")
    assert says(error) == (
        "cannot read flaky://bucket/x: access denied; log in, or ask its owner for access"
    )
    assert not slept


def test_server_without_ranges(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Flaky, "whole", True)
    with pytest.raises(DataError, match="sends whole files where a part was asked for"):
        storage.read_range("flaky://bucket/x", 2, 3)


def test_bugs_pass_unchanged():
    with pytest.raises(ValueError, match="null byte"):
        storage.read("a\0b")


def test_fsspec_or_its_parts_missing(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DataError, match="Protocol not known: nosuch"):
        storage.read("nosuch://bucket/x")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(DataError) as error:
        storage.read("gs://bucket/x")
    assert "cannot read gs://bucket/x" in says(error)
    assert "type `pip install 'mobilevit_jax[remote]'`" in says(error)
