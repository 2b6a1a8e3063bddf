"""Memory for batches of images that is used again and again, and that other processes may fill.

Fresh memory costs a page fault every 4 KiB, which at 200 MB a batch is a good part of the time that
decoding takes; memory that comes back is there already.
"""

import functools
import itertools
import math
import mmap
import os
import tempfile
import weakref

import numpy as np
from jaxtyping import UInt8


class _Memory(mmap.mmap):
    """Memory that a worker process opens by its path."""

    path: str
    number: int  # of its process; a path may be that of other memory later


_numbers = itertools.count()


class Buffers:
    """Memory for images: what is given back is taken again, so that its pages are there already.

    It is mapped and not allocated, because then it begins at a page, as sharing with jax wants it.
    """

    def __init__(self, *, shared: bool) -> None:
        self._new = _map_shared if shared else functools.partial(mmap.mmap, -1)
        self._free: list[np.ndarray] = []  # flat

    def take(self, shape: tuple[int, int, int, int]) -> UInt8[np.ndarray, "b h w 3"]:
        """Images of any content."""
        size = math.prod(shape)
        fitting = [i for i, flat in enumerate(self._free) if flat.size >= size]
        if fitting:
            flat = self._free.pop(min(fitting, key=lambda i: self._free[i].size))
        else:
            self._free.clear()  # all too small: let go of them, or they would pile up
            flat = np.frombuffer(self._new(size), np.uint8)
        return flat[:size].reshape(shape)

    def give(self, images: UInt8[np.ndarray, "b h w 3"]) -> None:
        """Takes back what `take` gave out; nobody may read or write it any more.

        Raises:
          ValueError: it is from elsewhere.
        """
        flat = images.base
        if not isinstance(flat, np.ndarray) or not isinstance(flat.base, memoryview):
            raise ValueError("only a batch of these batches can be recycled")
        self._free.append(flat)


def _map_shared(size: int) -> _Memory:
    if hasattr(os, "memfd_create"):  # Linux: it is gone with the last process that holds it
        file = os.memfd_create("batches")
        path = f"/proc/{os.getpid()}/fd/{file}"
        gone = functools.partial(os.close, file)
    else:
        file, path = tempfile.mkstemp()
        gone = functools.partial(_remove, file, path)
    os.ftruncate(file, size)
    memory = _Memory(file, size)
    memory.path, memory.number = path, next(_numbers)
    weakref.finalize(memory, gone)
    return memory


def _remove(file: int, path: str) -> None:
    os.close(file)
    os.unlink(path)  # noqa: PTH108  (Path may be gone when the interpreter ends)


def shared_path(images: UInt8[np.ndarray, "b h w 3"]) -> tuple[str, int]:
    """Where another process finds the memory of a batch: the arguments of `attached`."""
    flat = images.base
    assert isinstance(flat, np.ndarray) and isinstance(flat.base, memoryview)
    memory = flat.base.obj
    assert isinstance(memory, _Memory)
    return memory.path, memory.number


@functools.lru_cache(maxsize=8)  # more than a ring of buffers has
def attached(path: str, number: int) -> UInt8[np.ndarray, " n"]:
    """The memory that another process lent."""
    del number  # only for the cache
    with open(path, "r+b") as file:  # noqa: PTH123  (a link in /proc, which Path would resolve)
        return np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
