"""How the rows of a batch are made from records: here, in a thread, or in a worker process.

A row is a pure function of (seed, epoch, index into the source). What a worker process needs is
pickled once, when it starts; after that it is told numbers only, and writes into shared memory.
"""

import dataclasses
import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from mobilevit_jax.data import buffers
from mobilevit_jax.data.record import CorruptError, DataError, Record, Source
from mobilevit_jax.data.transforms import Transform, View

PIECE = 8  # rows a worker takes at a time: enough to hide the queue, few enough to share a batch
MAX_REPLACEMENTS = 16  # so many broken examples in a row are no accident


@dataclasses.dataclass(frozen=True)
class Job:
    """One batch of this host to be made, or a piece of one."""

    height: int
    width: int
    num_rows: int
    epochs: list[int]
    indices: list[int]  # examples of the first rows; the rows after them are padding

    def pieces(self) -> list[range]:
        """The rows that a worker takes at a time."""
        rows = range(len(self.indices))
        return [rows[i : i + PIECE] for i in range(0, len(rows), PIECE)]


class Row(NamedTuple):
    """What became of one row, besides its pixels."""

    label: int
    valid: bool
    problems: tuple[tuple[int, str], ...] = ()  # examples that were broken, and how


@dataclasses.dataclass(frozen=True)
class TrainRows:
    """Makes a training row. Here and in worker processes, so it can be pickled."""

    source: Source
    transform: Transform
    seed: int

    def __call__(self, epoch: int, index: int, out: np.ndarray, read: Future[Record] | None) -> Row:
        """Makes example `index`, which may have been read ahead, into `out` [h, w, 3]."""
        problems = []
        for _ in range(min(MAX_REPLACEMENTS, len(self.source))):
            try:
                record = self.source[index] if read is None else read.result()
                self.transform(record, augmentation_rng(self.seed, epoch, index), out)
                return Row(record.label, True, tuple(problems))
            except CorruptError as error:
                problems.append((index, str(error)))
                index, read = (index + 1) % len(self.source), None
        raise DataError(
            f"{len(problems)} examples in a row are broken; the last: {problems[-1][1]}"
        )


@dataclasses.dataclass(frozen=True)
class EvalRows:
    """Makes an evaluation row."""

    source: Source
    view: View

    def __call__(self, epoch: int, index: int, out: np.ndarray, read: Future[Record] | None) -> Row:
        """As in training; the epoch makes no difference."""
        try:
            record = self.source[index] if read is None else read.result()
            self.view(record, out)
            return Row(record.label, True)
        except CorruptError as error:
            out[...] = 0
            return Row(0, False, ((index, str(error)),))


def fill(
    make: TrainRows | EvalRows,
    job: Job,
    images: UInt8[np.ndarray, "b h w 3"],
    piece: range,
    reads: list[Future[Record]] | None,
    stop: threading.Event | None = None,
) -> list[Row]:
    """Makes the rows of a piece, until `stop` is set."""
    rows = []
    for i, row in enumerate(piece):
        if stop is not None and stop.is_set():
            break
        read = None if reads is None else reads[i]
        rows.append(make(job.epochs[row], job.indices[row], images[row], read))
    return rows


_process_make: TrainRows | EvalRows | None = None  # of a worker process


def start_process(make: TrainRows | EvalRows) -> None:
    """The first thing that a worker process does."""
    global _process_make
    _process_make = make
    # Whoever stops the run means the process that trains; that one ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    # Without it, workers of a run that was killed would wait for work for ever.
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(process: multiprocessing.process.BaseProcess) -> None:
    process.join()
    os._exit(1)


def fill_shared(piece: Job, memory: tuple[str, int], first: int) -> list[Row]:
    """Makes the rows of a piece, which begin at row `first` of the memory, in a worker process."""
    assert _process_make is not None
    row_size = piece.height * piece.width * 3
    rows = len(piece.indices)
    images = buffers.attached(*memory)[first * row_size : (first + rows) * row_size]
    images = images.reshape(rows, piece.height, piece.width, 3)
    return fill(_process_make, piece, images, range(rows), None)


_thread = threading.local()


def augmentation_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Generator(Philox(key=[seed, epoch << 40 | index], counter=[0, 0, 0, 1])); good for one image.

    It depends on what is augmented and not on where it stands, so another order or another
    augmentation leaves all else alone. The permutations' generators and those of the sizes differ
    in the counter's last word, and none gets as far as 2**192: no two share a number. One generator
    a thread is set anew instead of built, which takes 3 us and not 13.
    """
    if not hasattr(_thread, "rng"):
        counter = np.array([0, 0, 0, 1], np.uint64)
        philox = np.random.Philox(key=np.zeros(2, np.uint64), counter=counter)
        _thread.rng, _thread.state = np.random.Generator(philox), philox.state
    _thread.state["state"]["key"][:] = seed, epoch << 40 | index
    _thread.rng.bit_generator.state = _thread.state
    return _thread.rng
