"""Compiling our own C, and the blocks of memory that stay with a process."""

import os
import subprocess
import sys

import pytest

from mobilevit_jax import native


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "seven.c"
    path.write_text("int seven(void) { return 7; }\n")
    return path


def test_it_is_compiled_once(cache, source):
    path = native.compiled(source, ["-O1"])
    assert path.is_relative_to(cache)
    before = path.stat().st_mtime_ns
    assert native.compiled(source, ["-O1"]) == path
    assert path.stat().st_mtime_ns == before
    assert len(list(path.parent.iterdir())) == 1  # nothing is left beside it
    assert native.compiled(source, ["-O2"]) != path
    assert native.compiled(source, ["-O1"], versions=["2"]) != path
    source.write_text("int seven(void) { return 8 - 1; }\n")
    assert native.compiled(source, ["-O1"]) != path


def test_what_is_in_the_way_is_one_line(cache, source, tmp_path, monkeypatch):
    source.write_text("int seven(void) { return six; }\n")
    with pytest.raises(native.BuildError, match=r"fails: .*seven\.c:1.*six"):
        native.compiled(source, [])
    assert list((cache / "mobilevit_jax" / "native").iterdir()) == []
    source.write_text("int seven(void) { return 7; }\n")
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.raises(native.BuildError, match="file/mobilevit_jax/native: Not a directory"):
            native.compiled(source, [])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native.BuildError, match=r"no compiler \(cc\): apt-get install g\+\+"):
        native.compiled(source, [])
    assert native.environment() == {"GLIBC_TUNABLES": native.HUGE_PAGES}


PROGRAM = """
import ctypes, random, threading
libc = ctypes.CDLL(None)
libc.realloc.restype = libc.malloc.restype = ctypes.c_void_p
libc.malloc_usable_size.restype = ctypes.c_size_t
MB = 2**20
def take(size):
    pointer = ctypes.c_void_p()
    assert libc.posix_memalign(ctypes.byref(pointer), 64, ctypes.c_size_t(size)) == 0
    return pointer.value
def free(pointer):
    libc.free(ctypes.c_void_p(pointer))
def usable(pointer):
    return libc.malloc_usable_size(ctypes.c_void_p(pointer))
block = take(100 * MB)
assert block % (2 * MB) == 0 and usable(block) == 100 * MB
ctypes.memset(block, 7, 100 * MB)
free(block)
assert take(99 * MB) == block and ctypes.string_at(block + 98 * MB, 1) == b"\\x07"  # the same, kept
other = take(100 * MB)
assert other != block
free(block)
assert take(40 * MB) != block  # far too small for it
moved = libc.realloc(ctypes.c_void_p(other), ctypes.c_size_t(MB))
ctypes.memset(moved, 1, MB)
free(moved)
small = take(MB)
assert usable(small) < 2 * MB
free(small)
many = [take(32 * MB) for _ in range(100)]  # more than it keeps account of
assert len(set(many)) == 100
for pointer in many:
    free(pointer)
def hammer(seed):
    rng = random.Random(seed)
    for _ in range(300):
        size = rng.choice((32, 48, 64)) * MB
        pointer = take(size)
        ctypes.memset(pointer, seed, 64)
        ctypes.memset(pointer + size - 64, seed, 64)
        assert ctypes.string_at(pointer, 64) == bytes([seed]) * 64
        free(pointer)
threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(1, 5)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print("good")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is on Linux")
def test_large_blocks_stay():
    try:
        preload = str(native.compiled(native.BLOCKS, native.BLOCKS_FLAGS))
    except native.BuildError as error:
        pytest.skip(str(error))
    environment = os.environ | {"LD_PRELOAD": preload}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True)
    assert (done.stdout, done.returncode) == (b"good\n", 0), done.stderr.decode()


def test_what_is_preloaded_already_stays(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/lib/other.so")
    preload = native.environment().get("LD_PRELOAD", "x:/lib/other.so")
    assert preload.endswith(":/lib/other.so")
