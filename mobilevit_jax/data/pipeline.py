"""Batches from a source: which examples make up a step, and workers that make them ahead of time.

A training batch is a pure function of (seed, step): `plan` says which example sits in which row,
and each row augments with a generator of its own, keyed by (seed, epoch, index). So to resume takes
only the step, and neither threads nor processes nor hosts change what is seen. Decoding, resizing
and reading release the GIL, hence threads; a host with more than some 16 cores for loading does
better with processes, which write into the same memory.

Batches lie in buffers that are used again once they are given back by `recycle`. On CPU jax shares
the memory of a numpy array that it is given, so give a batch back only when the step that reads it
is over; that rule is right for every device.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import threading
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from mobilevit_jax.data import buffers, rows
from mobilevit_jax.data.multiscale import Shapes
from mobilevit_jax.data.record import DataError, Source
from mobilevit_jax.data.transforms import Transform, View

Batch = dict[str, np.ndarray]  # image uint8 [b, h, w, 3], label int32 [b], mask bool [b]

MAX_DEFAULT_THREADS = 16  # beyond, threads of one process only wait for the GIL


class Plan(NamedTuple):
    """Which examples make up one global training batch, and the size of their images."""

    height: int
    width: int
    epochs: Int[np.ndarray, " b"]
    indices: Int[np.ndarray, " b"]  # into the source


def plan(step: int, *, seed: int, num_examples: int, shapes: Shapes) -> Plan:
    """The examples of training step `step` (from 0). Pure; every epoch is a new permutation.

    An epoch may begin in the middle of a batch: nothing is dropped and nothing repeated.
    """
    height, width, batch_size = shapes.at(step)
    first = shapes.position(step)
    positions = np.arange(first, first + batch_size, dtype=np.int64)
    epochs, offsets = np.divmod(positions, num_examples)
    indices = np.empty_like(positions)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        indices[here] = _permutation(seed, epoch, num_examples)[offsets[here]]
    return Plan(height, width, epochs, indices)


class Workers(NamedTuple):
    """Who makes the batches, and how far ahead."""

    # That decode and augment; 0 does it in the calling thread; None is one per core, at most 16.
    threads: int | None = None
    # In place of threads, on hosts with many cores: each starts in about a second.
    processes: int = 0
    # Threads that only read, ahead of those that decode; for storage with long answering times.
    readers: int = 0
    # Batches worked on ahead of the one asked for.
    prefetch: int = 2


class Batches:
    """An iterator of batches, made by `train_batches` or `eval_batches`; close it, or use `with`.

    What goes wrong in a worker is raised by the `next` of the batch that it belongs to; the
    following `next` goes on with the batch after. An iterator that is dropped stops its workers.

    Attributes:
        corrupt: what is wrong with each broken example met so far, by its number in the source.
    """

    def __init__(
        self,
        make: rows.TrainRows | rows.EvalRows,
        jobs: Iterator[rows.Job],
        *,
        workers: Workers,
        max_corrupt: float,
    ) -> None:
        threads = default_threads() if workers.threads is None else workers.threads
        if min(threads, workers.processes, workers.readers, workers.prefetch) < 0:
            raise ValueError(f"{workers}: no number may be below 0")
        if not 0.0 <= max_corrupt <= 1.0:
            raise ValueError(f"max_corrupt is {max_corrupt}; it is a share, from 0 to 1")
        self.corrupt: dict[int, str] = {}
        self._make, self._jobs, self._max_corrupt = make, jobs, max_corrupt
        self._ahead = workers.prefetch
        self._flight: collections.deque[tuple[rows.Job, Batch, list[Future[list[rows.Row]]]]] = (
            collections.deque()
        )
        self._buffers = buffers.Buffers(shared=bool(workers.processes))
        self._stop = threading.Event()
        self._closed = False
        self._pool: Executor | None = None
        self._readers: ThreadPoolExecutor | None = None
        if workers.processes:
            self._pool = ProcessPoolExecutor(
                workers.processes,
                # Never fork: jax has threads by now.
                mp_context=multiprocessing.get_context("spawn"),
                initializer=rows.start_process,
                initargs=(make,),
            )
        elif threads:
            self._pool = ThreadPoolExecutor(threads, "batches")
            if workers.readers:
                self._readers = ThreadPoolExecutor(workers.readers, "readers")
        # Holds no reference to self, nor does any job: so a dropped iterator is collected.
        self._pools: list[Executor] = [pool for pool in (self._readers, self._pool) if pool]
        self._finalizer = weakref.finalize(self, _shut_down, self._pools, self._stop, wait=False)
        if self._pool is not None:
            with _told_if_killed():
                self._launch(self._ahead)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("these batches are closed; make new ones to go on reading")
        if self._pool is None:
            job = next(self._jobs)
            batch = self._empty(job)
            pieces = [
                rows.fill(self._make, job, batch["image"], piece, None) for piece in job.pieces()
            ]
            return self._finished(batch, pieces)
        with _told_if_killed():
            self._launch(self._ahead + 1)
        if not self._flight:
            raise StopIteration
        job, batch, futures = self._flight.popleft()
        with _told_if_killed():
            # In order of rows, so that the first row's error is the one raised.
            pieces = [future.result() for future in futures]
        return self._finished(batch, pieces)

    def recycle(self, batch: Batch) -> None:
        """Takes back the memory of a batch that nothing reads any more, for a batch to come."""
        self._buffers.give(batch["image"])

    def close(self) -> None:
        """Stops the workers after the row they are at, and waits for that. May be called twice."""
        self._closed = True
        self._finalizer.detach()
        _shut_down(self._pools, self._stop, wait=True)
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

    def _empty(self, job: rows.Job) -> Batch:
        return {
            "image": self._buffers.take((job.num_rows, job.height, job.width, 3)),
            "label": np.zeros(job.num_rows, np.int32),
            "mask": np.zeros(job.num_rows, np.bool_),
        }

    def _launch(self, limit: int) -> None:
        assert self._pool is not None
        while len(self._flight) < limit:
            job = next(self._jobs, None)
            if job is None:
                return
            batch = self._empty(job)
            futures = [self._submit(job, batch["image"], piece) for piece in job.pieces()]
            self._flight.append((job, batch, futures))

    def _submit(self, job: rows.Job, images: np.ndarray, piece: range) -> Future[list[rows.Row]]:
        assert self._pool is not None
        if isinstance(self._pool, ProcessPoolExecutor):
            part = dataclasses.replace(
                job,
                epochs=job.epochs[piece.start : piece.stop],
                indices=job.indices[piece.start : piece.stop],
            )
            where = buffers.shared_path(images)
            return self._pool.submit(rows.fill_shared, part, where, piece.start)
        reads = None
        if self._readers is not None:
            source = self._make.source
            reads = [self._readers.submit(source.__getitem__, job.indices[i]) for i in piece]
        return self._pool.submit(rows.fill, self._make, job, images, piece, reads, self._stop)

    def _finished(self, batch: Batch, pieces: list[list[rows.Row]]) -> Batch:
        done = list(itertools.chain.from_iterable(pieces))
        for i, row in enumerate(done):
            batch["label"][i] = row.label
            batch["mask"][i] = row.valid
            for index, problem in row.problems:
                self._count(index, problem)
        batch["image"][len(done) :] = 0  # padding: black, not what the buffer held before
        return batch

    def _count(self, index: int, problem: str) -> None:
        if index in self.corrupt:
            return
        self.corrupt[index] = problem
        num_examples = len(self._make.source)
        if len(self.corrupt) > self._max_corrupt * num_examples:
            raise DataError(
                f"{len(self.corrupt)} of {num_examples} examples are broken, more than "
                f"config.max_corrupt ({self._max_corrupt:.2%}) allows; the last: {problem}"
            )
        warnings.warn(f"broken example {len(self.corrupt)}: {problem}", stacklevel=3)


def train_batches(
    source: Source,
    transform: Transform,
    *,
    shapes: Shapes,
    seed: int,
    start_step: int = 0,
    workers: Workers = Workers(),  # noqa: B008  (immutable)
    max_corrupt: float = 0.0,
    host: tuple[int, int] = (0, 1),
) -> Batches:
    """Endless training batches, from that of step `start_step` on.

    A broken example is replaced by the next of the source: in a folder mostly of its class.

    Args:
      source: the examples.
      transform: how a record becomes an image.
      shapes: image size and global batch size of each step.
      seed: of the order and of the augmentation, at least 0.
      start_step: number of steps already taken.
      workers: who makes the batches.
      max_corrupt: share of the source that may be broken before the run stops.
      host: (index, count) of this host, which yields rows index * b // count and following.

    Raises:
      ValueError: a batch size is not a multiple of the number of hosts, or a value out of range.
      DataError: from `next`, if an example cannot be read, or too many are broken.
    """
    if not 0 <= seed < 2**64 or start_step < 0:
        raise ValueError(f"seed is {seed} and start_step {start_step}; neither may be below 0")
    hosts_rows = {shape.batch_size: _host_rows(shape.batch_size, host) for shape in shapes.table}
    num_examples = _num_examples(source)

    def job(step: int) -> rows.Job:
        batch = plan(step, seed=seed, num_examples=num_examples, shapes=shapes)
        own = hosts_rows[len(batch.indices)]
        return rows.Job(
            height=batch.height,
            width=batch.width,
            num_rows=len(own),
            epochs=batch.epochs[own.start : own.stop].tolist(),
            indices=batch.indices[own.start : own.stop].tolist(),
        )

    return Batches(
        rows.TrainRows(source, transform, seed),
        map(job, itertools.count(start_step)),
        workers=workers,
        max_corrupt=max_corrupt,
    )


def eval_batches(
    source: Source,
    view: View,
    *,
    size: tuple[int, int],
    batch_size: int,
    workers: Workers = Workers(),  # noqa: B008  (immutable)
    max_corrupt: float = 0.0,
    host: tuple[int, int] = (0, 1),
) -> Batches:
    """Every example once, in the source's order; the same number of batches on every host.

    The last batch is filled up with black images, where `mask` is false; so is a broken example.

    Args:
      source: the examples.
      view: how a record becomes an image.
      size: (height, width) of the images.
      batch_size: global; may exceed the number of examples.
      workers: who makes the batches.
      max_corrupt: share of the source that may be broken before the run stops.
      host: (index, count) of this host, which yields rows index * b // count and following.

    Raises:
      ValueError: `batch_size` is not a multiple of the number of hosts, or a value is out of range.
      DataError: from `next`, if an example cannot be read, or too many are broken.
    """
    own = _host_rows(batch_size, host)
    num_examples = _num_examples(source)

    def job(step: int) -> rows.Job:
        first = step * batch_size
        indices = [first + row for row in own if first + row < num_examples]
        return rows.Job(*size, num_rows=len(own), epochs=[0] * len(indices), indices=indices)

    steps = range(num_eval_batches(num_examples, batch_size))
    return Batches(
        rows.EvalRows(source, view), map(job, steps), workers=workers, max_corrupt=max_corrupt
    )


def num_eval_batches(num_examples: int, batch_size: int) -> int:
    """Number of batches of `eval_batches`, on every host."""
    return -(-num_examples // batch_size)


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs; 8 bytes an example
def _permutation(seed: int, epoch: int, num_examples: int) -> Int[np.ndarray, " n"]:
    key = np.array([seed, epoch], np.uint64)
    permutation = np.random.Generator(np.random.Philox(key=key)).permutation(num_examples)
    permutation.setflags(write=False)
    return permutation


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


def cores() -> int:
    """How many this process may use: on Linux those that the container lends."""
    affinity = getattr(os, "sched_getaffinity", None)
    return (len(affinity(0)) if affinity else os.cpu_count()) or 1


def default_threads() -> int:
    """One a core, but no more than a process can keep busy."""
    return min(cores(), MAX_DEFAULT_THREADS)


@contextlib.contextmanager
def _told_if_killed() -> Iterator[None]:
    # Met where work is handed out, too, once the pool has noticed.
    try:
        yield
    except BrokenProcessPool as error:
        raise DataError(
            "a loader process was killed, perhaps for want of memory; lower "
            "--config.loader.processes and run the same command again"
        ) from error


def _shut_down(pools: list[Executor], stop: threading.Event, *, wait: bool) -> None:
    stop.set()
    for pool in pools:
        pool.shutdown(wait=wait, cancel_futures=True)
