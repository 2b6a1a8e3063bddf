"""What a split holds, found by decoding some of its examples: sizes, formats, labels, broken ones.

Nothing is kept of an example but a few numbers, so that all of ImageNet may be looked at.
"""

import collections
import dataclasses
import functools
import io
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from PIL import Image

from mobilevit_jax.data import jpeg, transforms
from mobilevit_jax.data.record import CorruptError, Labelled, Record, Source

PIECE = 32  # examples that a thread takes at a time

MEMORY = "in memory"
BASELINE = "JPEG"
PROGRESSIVE = "JPEG, progressive"
RESTART = "JPEG, restart markers"  # with our table of them, which cutting needs
COLORS = {"1": "grey", "L": "grey", "LA": "grey", "La": "grey", "CMYK": "CMYK"}

Progress = Callable[[str, int, int], None]  # what, done, of how many


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a split holds. Arrays have an entry for each example that was looked at."""

    num_examples: int
    class_names: tuple[str, ...]
    class_counts: Int[np.ndarray, " k"]
    labels_known: bool  # all examples were counted; else those looked at
    indices: Int[np.ndarray, " n"]  # into the source
    sizes: Int[np.ndarray, " n"]  # in bytes, encoded; 0 where nothing could be read
    heights: Int[np.ndarray, " n"]  # in pixels; 0 for a broken example
    widths: Int[np.ndarray, " n"]
    formats: Mapping[str, int]  # how many are stored how, broken ones left out
    colors: Mapping[str, int]  # colour, grey or CMYK
    broken: Mapping[int, str]  # by index: what is wrong

    @property
    def whole(self) -> Int[np.ndarray, " m"]:
        """Indices of those looked at that are not broken."""
        return self.indices[self.heights > 0]


class _Seen(NamedTuple):
    label: int
    size: int = 0
    height: int = 0
    width: int = 0
    format: str = ""
    color: str = ""
    problem: str = ""


def survey(source: Source, *, examples: int | None, threads: int, progress: Progress) -> Survey:
    """Decodes examples, evenly spread over the source, and sums up what they are.

    Args:
      source: the examples.
      examples: how many; None for all.
      threads: that decode.
      progress: is told how many are done.

    Raises:
      DataError: an example cannot be read. Broken ones are told in the result.
    """
    total = len(source)
    count = total if examples is None else min(examples, total)
    indices = (2 * np.arange(count) + 1) * total // (2 * count)
    pieces = [indices[i : i + PIECE] for i in range(0, count, PIECE)]
    numbers = np.zeros((4, count), np.int64)
    formats, colors = collections.Counter(), collections.Counter()
    broken, done = {}, 0
    pool = ThreadPoolExecutor(threads, "survey")
    try:
        for seen in pool.map(functools.partial(_look_at, source), pieces):
            for each in seen:
                numbers[:, done] = each[:4]
                if each.problem:
                    broken[int(indices[done])] = each.problem
                else:
                    formats[each.format] += 1
                    colors[each.color] += 1
                done += 1
            progress("looking at examples", done, count)
    finally:
        pool.shutdown(cancel_futures=True)
    known = isinstance(source, Labelled)
    labels = source.labels if known else numbers[0][numbers[0] >= 0]
    return Survey(
        num_examples=total,
        class_names=source.class_names,
        class_counts=np.bincount(labels, minlength=len(source.class_names)),
        labels_known=known or count == total,
        indices=indices,
        sizes=numbers[1],
        heights=numbers[2],
        widths=numbers[3],
        formats=dict(formats.most_common()),
        colors=dict(colors.most_common()),
        broken=broken,
    )


def _look_at(source: Source, indices: Int[np.ndarray, " n"]) -> list[_Seen]:
    return [_see(source, int(i)) for i in indices]


def _see(source: Source, index: int) -> _Seen:
    try:
        record = source[index]
    except CorruptError as error:
        return _Seen(label=-1, problem=str(error))
    size = record.image.nbytes if isinstance(record.image, np.ndarray) else len(record.image)
    try:
        height, width, _ = transforms.decode(record).shape
    except CorruptError as error:
        return _Seen(record.label, size, problem=str(error))
    return _Seen(record.label, size, height, width, *_kind(record))


def _kind(record: Record) -> tuple[str, str]:
    """How an example that can be decoded is stored, and its colours."""
    if isinstance(record.image, np.ndarray):
        return MEMORY, "grey" if record.image.ndim == 2 else "colour"
    with Image.open(io.BytesIO(record.image), formats=transforms.FORMATS) as image:
        name, mode = image.format or "", image.mode
        progressive = bool(image.info.get("progressive"))
    if name in ("JPEG", "MPO"):  # MPO: several JPEGs in a file, as some cameras write
        header = jpeg.read_header(record.image)
        name = PROGRESSIVE if progressive else BASELINE
        if header is not None and header.tables:
            name = RESTART
    return name, COLORS.get(mode, "grey" if mode.startswith("I") else "colour")
