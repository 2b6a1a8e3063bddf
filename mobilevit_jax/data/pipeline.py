"""Batches from a source: which examples make up a step, and threads that decode them ahead of time.

A training batch is a pure function of (seed, step): `plan` says which example sits in which row,
and each row augments with a generator of its own, keyed by (seed, position). So to resume takes
only the step, and neither threads nor hosts change what is seen. Decoding, resizing and reading
release the GIL; hence threads and no processes. Buffers are not recycled: on CPU jax aliases
the memory of a numpy array it is given, so writing into it again would change the jax array.
"""

import collections
import dataclasses
import functools
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from mobilevit_jax.data.record import DataError, Record, Source
from mobilevit_jax.data.transforms import Transform

Batch = dict[str, np.ndarray]  # image uint8 [b, h, w, 3], label int32 [b], mask bool [b]

PIECE = 8  # rows a thread takes at a time: enough to hide the queue, few enough to share a batch
MAX_DEFAULT_THREADS = 16  # beyond, threads of one process only wait for the GIL


class Plan(NamedTuple):
    """Which examples make up one global training batch."""

    positions: Int[np.ndarray, " b"]  # int64: examples since step 0
    epochs: Int[np.ndarray, " b"]
    indices: Int[np.ndarray, " b"]  # into the source


def plan(step: int, *, seed: int, num_examples: int, batch_size: int) -> Plan:
    """The examples of training step `step` (from 0). Pure; every epoch is a new permutation.

    An epoch may begin in the middle of a batch: nothing is dropped and nothing repeated.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, offsets = np.divmod(positions, num_examples)
    indices = np.empty_like(positions)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        rows = epochs == epoch
        indices[rows] = _permutation(seed, epoch, num_examples)[offsets[rows]]
    return Plan(positions, epochs, indices)


class Batches:
    """An iterator of batches, made by `train_batches` or `eval_batches`; close it, or use `with`.

    What goes wrong in a thread is raised by the `next` of the batch that it belongs to; the
    following `next` goes on with the batch after. An iterator that is dropped stops its threads.
    """

    def __init__(
        self,
        job: Callable[[int], "_Job"],
        steps: Iterator[int],
        *,
        threads: int | None,
        prefetch: int,
    ) -> None:
        threads = _default_threads() if threads is None else threads
        if threads < 0 or prefetch < 0:
            raise ValueError(
                f"threads is {threads} and prefetch {prefetch}; neither may be below 0"
            )
        self._job, self._steps, self._prefetch = job, steps, prefetch
        self._flight: collections.deque[tuple[_Job, list[Future[None]]]] = collections.deque()
        self._stop = threading.Event()
        self._closed = False
        self._pool = ThreadPoolExecutor(threads, "batches") if threads else None
        # Holds no reference to self, nor does any job: so a dropped iterator is collected.
        self._finalizer = weakref.finalize(self, _shut_down, self._pool, self._stop, wait=False)
        if self._pool is not None:
            self._launch(prefetch)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("these batches are closed; make new ones to go on reading")
        if self._pool is None:
            job = self._job(next(self._steps))
            for piece in job.pieces():
                job.fill(piece, self._stop)
            return job.batch()
        self._launch(self._prefetch + 1)
        if not self._flight:
            raise StopIteration
        job, futures = self._flight.popleft()
        for future in futures:  # in order of rows, so that the first row's error is the one raised
            future.result()
        return job.batch()

    def close(self) -> None:
        """Stops the threads after the row they are at, and waits for that. May be called twice."""
        self._closed = True
        self._finalizer.detach()
        _shut_down(self._pool, self._stop, wait=True)
        self._flight.clear()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _launch(self, limit: int) -> None:
        assert self._pool is not None
        while len(self._flight) < limit:
            step = next(self._steps, None)
            if step is None:
                return
            job = self._job(step)
            futures = [self._pool.submit(job.fill, piece, self._stop) for piece in job.pieces()]
            self._flight.append((job, futures))


def train_batches(
    source: Source,
    transform: Transform,
    *,
    size: tuple[int, int],
    seed: int,
    batch_size: int,
    start_step: int = 0,
    threads: int | None = None,
    prefetch: int = 2,
    host: tuple[int, int] = (0, 1),
) -> Batches:
    """Endless training batches, from that of step `start_step` on.

    Args:
      source: the examples.
      transform: how a record becomes an image.
      size: (height, width) of the images.
      seed: of the order and of the augmentation, at least 0.
      batch_size: global; may exceed the number of examples.
      start_step: number of steps already taken.
      threads: that decode; 0 decodes in the calling thread; None is one per core, at most 16.
      prefetch: number of batches worked on ahead of the one asked for.
      host: (index, count) of this host, which yields rows index * b // count and following.

    Raises:
      ValueError: `batch_size` is not a multiple of the number of hosts, or a value is out of range.
      DataError: from `next`, if an example cannot be read or decoded.
    """
    if not 0 <= seed < 2**64 or start_step < 0:
        raise ValueError(f"seed is {seed} and start_step {start_step}; neither may be below 0")
    if min(size) < 1:
        raise ValueError(f"size is {size}; height and width must be at least 1")
    rows = _host_rows(batch_size, host)
    num_examples = _num_examples(source)

    def job(step: int) -> _Job:
        batch = plan(step, seed=seed, num_examples=num_examples, batch_size=batch_size)
        positions = batch.positions[rows.start : rows.stop].tolist()
        indices = batch.indices[rows.start : rows.stop].tolist()

        def render(row: int, record: Record) -> UInt8[np.ndarray, "h w 3"]:
            return transform(record, _augmentation_rng(seed, positions[row]), size)

        return _Job(source, render, indices, len(rows))

    return Batches(job, itertools.count(start_step), threads=threads, prefetch=prefetch)


def eval_batches(
    source: Source,
    transform: Callable[[Record], UInt8[np.ndarray, "h w 3"]],
    *,
    batch_size: int,
    threads: int | None = None,
    prefetch: int = 2,
    host: tuple[int, int] = (0, 1),
) -> Batches:
    """Every example once, in the source's order; the same number of batches on every host.

    The last batch is filled up with zeros, where `mask` is false.

    Args:
      source: the examples.
      transform: how a record becomes an image; all must come out of one size.
      batch_size: global; may exceed the number of examples.
      threads: as in `train_batches`.
      prefetch: as in `train_batches`.
      host: (index, count) of this host, which yields rows index * b // count and following.

    Raises:
      ValueError: `batch_size` is not a multiple of the number of hosts, or a value is out of range.
      DataError: from `next`, if an example cannot be read or decoded.
    """
    rows = _host_rows(batch_size, host)
    num_examples = _num_examples(source)

    def render(row: int, record: Record) -> UInt8[np.ndarray, "h w 3"]:
        return transform(record)

    def job(step: int) -> _Job:
        first = step * batch_size
        indices = [first + row for row in rows if first + row < num_examples]
        return _Job(source, render, indices, len(rows))

    steps = iter(range(num_eval_batches(num_examples, batch_size)))
    return Batches(job, steps, threads=threads, prefetch=prefetch)


def num_eval_batches(num_examples: int, batch_size: int) -> int:
    """Number of batches of `eval_batches`, on every host."""
    return -(-num_examples // batch_size)


@dataclasses.dataclass
class _Job:
    """One batch in the making. Its pieces are filled by any threads, in any order."""

    source: Source
    render: Callable[[int, Record], UInt8[np.ndarray, "h w 3"]]  # takes the row, for its generator
    indices: list[int]  # examples of the first rows; the rows after them are padding
    num_rows: int

    def __post_init__(self) -> None:
        self._image: np.ndarray | None = None
        self._label = np.zeros(self.num_rows, np.int32)
        self._lock = threading.Lock()

    def pieces(self) -> list[range]:
        """Cuts the rows into pieces; a batch of only padding is one empty piece."""
        rows = range(len(self.indices))
        return [rows[i : i + PIECE] for i in range(0, len(rows), PIECE)] or [rows]

    def fill(self, piece: range, stop: threading.Event) -> None:
        """Decodes the rows of a piece into the batch, until `stop` is set."""
        for row in piece:
            if stop.is_set():
                return
            record = self.source[self.indices[row]]
            image = self.render(row, record)
            buffer = self._buffer(image)
            if image.shape != buffer.shape[1:] or image.dtype != np.uint8:
                raise ValueError(
                    f"the transform made {image.dtype} {image.shape} of {record.name}; "
                    f"this batch holds uint8 {buffer.shape[1:]}"
                )
            buffer[row] = image
            self._label[row] = record.label
        if not piece:  # nothing but padding: any example tells the size
            self._buffer(self.render(0, self.source[0]))

    def batch(self) -> Batch:
        """The finished batch."""
        assert self._image is not None
        mask = np.arange(self.num_rows) < len(self.indices)
        return {"image": self._image, "label": self._label, "mask": mask}

    def _buffer(self, image: UInt8[np.ndarray, "h w 3"]) -> np.ndarray:
        """The batch's images, made when the first one tells their size."""
        with self._lock:
            if self._image is None:
                self._image = np.zeros((self.num_rows, *image.shape), np.uint8)
            return self._image


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs; 8 bytes an example
def _permutation(seed: int, epoch: int, num_examples: int) -> Int[np.ndarray, " n"]:
    key = np.array([seed, epoch], np.uint64)
    permutation = np.random.Generator(np.random.Philox(key=key)).permutation(num_examples)
    permutation.setflags(write=False)
    return permutation


_thread = threading.local()


def _augmentation_rng(seed: int, position: int) -> np.random.Generator:
    """Generator(Philox(key=[seed, position], counter=[0, 0, 0, 1])), good until the next call.

    The permutations' generators have the same keys but count from 0, and none gets as far as
    2**192: the two never share a number. One generator a thread is set anew instead of built,
    which takes 3 us and not 13.
    """
    if not hasattr(_thread, "rng"):
        counter = np.array([0, 0, 0, 1], np.uint64)
        philox = np.random.Philox(key=np.zeros(2, np.uint64), counter=counter)
        _thread.rng, _thread.state = np.random.Generator(philox), philox.state
    _thread.state["state"]["key"][:] = seed, position
    _thread.rng.bit_generator.state = _thread.state
    return _thread.rng


def _host_rows(batch_size: int, host: tuple[int, int]) -> range:
    index, count = host
    if batch_size < 1 or not 0 <= index < count:
        raise ValueError(
            f"batch_size is {batch_size} and host {host}; batch_size must be at least 1, and host "
            "(index, count) with 0 <= index < count"
        )
    if batch_size % count:
        raise ValueError(
            f"batch_size {batch_size} cannot be divided among {count} hosts; "
            f"give a multiple of {count}"
        )
    return range(index * batch_size // count, (index + 1) * batch_size // count)


def _num_examples(source: Source) -> int:
    if not len(source):
        raise DataError("the source holds no examples")
    return len(source)


def _default_threads() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux; the cores a container lends
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cores, MAX_DEFAULT_THREADS)


def _shut_down(pool: ThreadPoolExecutor | None, stop: threading.Event, *, wait: bool) -> None:
    stop.set()
    if pool is not None:
        pool.shutdown(wait=wait, cancel_futures=True)
