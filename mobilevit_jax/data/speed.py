"""How fast training images are made: by stage on one core, and by the loader as a whole.

Measured is what training runs, on the examples, sizes and random numbers of its first steps. Only
the share of resizing within a transform comes from Python's profiler, so that the transform need
not know that somebody looks.
"""

import cProfile
import functools
import inspect
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from mobilevit_jax.data import pipeline, rows, transforms
from mobilevit_jax.data.multiscale import Shapes
from mobilevit_jax.data.record import CorruptError, DataError, Record, Source

TIMED = 400  # examples whose stages are timed
SECONDS = 5.0  # for each of the two measurements, about
KEPT = 32  # rows of the first batch

Progress = Callable[[str, int, int], None]  # what, done, of how many


class Stage(NamedTuple):
    """A part of the work for one training image."""

    name: str
    seconds: float  # on one core


class Speed(NamedTuple):
    """How fast training images are made."""

    stages: tuple[Stage, ...]
    images: int  # that the stages were timed with
    workers: str  # "2 threads"
    parallel: int  # how many of them
    cores: int  # that this process may use
    batch_size: int  # of the first step
    first_batch_seconds: float
    loader_images_per_second: float
    batch: pipeline.Batch  # the first rows of the first one

    @property
    def seconds(self) -> float:
        """For one image, on one core."""
        return sum(stage.seconds for stage in self.stages)


def measure(
    source: Source,
    transform: transforms.Transform,
    bare: transforms.Transform | None,
    *,
    shapes: Shapes,
    workers: pipeline.Workers,
    progress: Progress,
) -> Speed:
    """Times the stages in this thread, and the loader.

    Args:
      source: of training.
      transform: of training.
      bare: the same without what comes after the crop; None where nothing does.
      shapes: sizes, batch sizes and seed of training.
      workers: of training.
      progress: is told how far it is.

    Raises:
      DataError: an example cannot be read, or so many are broken that training stops.
      ValueError: the transform cannot make images of these sizes.
    """
    if workers.threads is None:
        workers = workers._replace(threads=pipeline.default_threads())
    batch, first_batch_seconds, rate = _load(source, transform, shapes, workers, progress)
    stages, images = _time_stages(source, transform, bare, shapes, progress)
    return Speed(
        stages=stages,
        images=images,
        workers=_name(workers),
        parallel=workers.processes or workers.threads or 1,
        cores=pipeline.cores(),
        batch_size=shapes.at(0).batch_size,
        first_batch_seconds=first_batch_seconds,
        loader_images_per_second=rate,
        batch=batch,
    )


def _name(workers: pipeline.Workers) -> str:
    if workers.processes:
        return f"{workers.processes} process{'es' if workers.processes > 1 else ''}"
    if workers.threads:
        return f"{workers.threads} thread{'s' if workers.threads > 1 else ''}"
    return "the main thread"


def _load(
    source: Source,
    transform: transforms.Transform,
    shapes: Shapes,
    workers: pipeline.Workers,
    progress: Progress,
) -> tuple[pipeline.Batch, float, float]:
    """The first batch, the seconds until it came, and then images a second."""
    begin = time.perf_counter()
    with (
        warnings.catch_warnings(),
        pipeline.train_batches(
            source, transform, shapes=shapes, seed=shapes.seed, workers=workers, max_corrupt=1.0
        ) as batches,
    ):
        warnings.simplefilter("ignore")  # each broken example would be one
        batch = next(batches)
        first = now = time.perf_counter()
        kept = {key: values[:KEPT].copy() for key, values in batch.items()}
        images = 0
        while now - first < SECONDS:
            batches.recycle(batch)
            batch = next(batches)
            images += len(batch["label"])
            now = time.perf_counter()
            done = min((now - first) / SECONDS, 1.0)
            progress("loading batches", round(100 * done), 100)
    return kept, first - begin, images / (now - first)


def _time_stages(
    source: Source,
    transform: transforms.Transform,
    bare: transforms.Transform | None,
    shapes: Shapes,
    progress: Progress,
) -> tuple[tuple[Stage, ...], int]:
    """Times the work for examples of the first steps in this thread, and says for how many."""
    read, whole, cropped, profiled = [], [], [], 0.0
    crop = bare or transform
    profiler = cProfile.Profile()
    begin = time.perf_counter()
    for epoch, index, out in itertools.islice(_examples(shapes, len(source)), TIMED):
        now = time.perf_counter()
        if now - begin > SECONDS and whole:
            break
        try:
            record = source[index]
            reading = time.perf_counter() - now
            example = functools.partial(_seconds, record, (shapes.seed, epoch, index), out)
            # First, so that the two that are timed find the same in the core's caches.
            profiler.enable()
            try:
                seconds = example(crop)
            finally:
                profiler.disable()
            cropped.append(example(crop))
        except CorruptError:
            continue
        profiled += seconds
        read.append(reading)
        whole.append(cropped[-1] if bare is None else example(transform))
        progress("timing stages", len(whole), TIMED)
    if not whole:
        raise DataError("none of the first examples can be decoded")
    seconds = statistics.fmean(cropped)
    resize = seconds * _resizing(profiler) / profiled
    stages = [
        Stage("read", statistics.fmean(read)),
        Stage("decode", max(seconds - resize, 0.0)),
        Stage("resize, flip", resize),
    ]
    if bare is not None:
        stages.append(Stage("augment", max(statistics.fmean(whole) - seconds, 0.0)))
    return tuple(stages), len(whole)


def _examples(
    shapes: Shapes, num_examples: int
) -> Iterator[tuple[int, int, UInt8[np.ndarray, "h w 3"]]]:
    """(epoch, index, room for the image) of the first examples of each step, from step 0 on."""
    for step in itertools.count():
        batch = pipeline.plan(step, seed=shapes.seed, num_examples=num_examples, shapes=shapes)
        out = np.empty((batch.height, batch.width, 3), np.uint8)
        for epoch, index in zip(batch.epochs[:KEPT], batch.indices[:KEPT], strict=True):
            yield int(epoch), int(index), out


def _seconds(
    record: Record,
    key: tuple[int, int, int],
    out: UInt8[np.ndarray, "h w 3"],
    transform: transforms.Transform,
) -> float:
    begin = time.perf_counter()
    transform(record, rows.augmentation_rng(*key), out)
    return time.perf_counter() - begin


def _resizing(profiler: cProfile.Profile) -> float:
    """Seconds within resizing and mirroring."""
    resize = inspect.unwrap(transforms.resize_into).__code__
    return sum(
        entry.totaltime
        for entry in profiler.getstats()
        if entry.code is resize or (isinstance(entry.code, str) and "flip" in entry.code)
    )
