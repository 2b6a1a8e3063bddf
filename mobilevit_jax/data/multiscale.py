"""Which image size and batch size a training step has: a pure function of (seed, step).

Training at several sizes with batches of about equal area costs less than at the largest size and
makes a network that bears other sizes (MobileViT, arXiv 2110.02178, section 3.3). Batch sizes
differ, so the number of examples before a step is a running sum; it is kept here too.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

BLOCK = 4096  # steps whose sizes are drawn at once
_STREAM = 2  # upper word of the counter: 0 permutes epochs and 1 augments (pipeline.py)


class Shape(NamedTuple):
    """What the batch of one step looks like, over all hosts."""

    height: int
    width: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes of a run. One row: every step has it. More: each step draws one of them evenly.

    Attributes:
        table: all that occur, each compiled once.
        seed: of the draws, at least 0.
    """

    table: tuple[Shape, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.table or any(min(shape) < 1 for shape in self.table):
            raise ValueError(f"shapes are {self.table}; each needs a height, width and batch size")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")

    def at(self, step: int) -> Shape:
        """The shape of training step `step` (from 0)."""
        if len(self.table) == 1:
            return self.table[0]
        return self.table[_draws(self.table, self.seed, step // BLOCK).choices[step % BLOCK]]

    def position(self, step: int) -> int:
        """Examples in the steps before `step`, over all hosts."""
        if len(self.table) == 1:
            return step * self.table[0].batch_size
        block, rest = divmod(step, BLOCK)
        before = sum(self._total(i) for i in range(block))
        return before + int(_draws(self.table, self.seed, block).positions[rest])

    def steps(self, examples: float) -> int:
        """How many steps come nearest to so many examples; one at least, unless none is asked."""
        if examples <= 0:
            return 0
        if len(self.table) == 1:
            return max(1, round(examples / self.table[0].batch_size))
        block = 0
        while examples > self._total(block):
            examples -= self._total(block)
            block += 1
        positions = _draws(self.table, self.seed, block).positions
        after = bisect.bisect_left(positions, examples)
        nearer = examples - positions[after - 1] < positions[after] - examples if after else False
        return max(1, block * BLOCK + after - int(nearer))

    def epoch_starts(self, num_examples: int, epochs: int) -> Int64[np.ndarray, " epochs"]:
        """The first step of each of the first epochs: whose batch begins in it, or else behind it.

        A batch may end in the epoch after the one it begins in, as nothing is left over or repeated
        at an epoch's end. One that is larger than an epoch begins several, all with the same step.

        Args:
            num_examples: examples in an epoch.
            epochs: how many epochs.
        """
        firsts = np.arange(epochs, dtype=np.int64) * num_examples
        if len(self.table) == 1:
            return -(-firsts // self.table[0].batch_size)
        starts = np.empty_like(firsts)
        block = found = before = 0
        while found < epochs:
            positions = before + _draws(self.table, self.seed, block).positions
            upto = int(np.searchsorted(firsts, positions[-1], side="right"))
            starts[found:upto] = block * BLOCK + np.searchsorted(positions, firsts[found:upto])
            block, found, before = block + 1, upto, int(positions[-1])
        return starts

    def _total(self, block: int) -> int:
        return int(_draws(self.table, self.seed, block).positions[-1])


class _Block(NamedTuple):
    choices: Sequence[int]
    positions: np.ndarray  # BLOCK + 1 running sums, from 0


@functools.lru_cache(maxsize=1024)
def _draws(table: tuple[Shape, ...], seed: int, block: int) -> _Block:
    philox = np.random.Philox(
        key=np.array([seed, block], np.uint64), counter=np.array([0, 0, 0, _STREAM], np.uint64)
    )
    choices = np.random.Generator(philox).integers(len(table), size=BLOCK)
    sizes = np.array([shape.batch_size for shape in table])[choices]
    return _Block(choices.tolist(), np.concatenate([[0], np.cumsum(sizes)]))


def fixed(*, size: tuple[int, int], batch_size: int, seed: int, multiple_of: int) -> Shapes:
    """Every step alike.

    Raises:
        ValueError: the batch is no multiple of `multiple_of`, the devices times accumulated parts.
    """
    if batch_size % multiple_of:
        raise ValueError(f"a batch of {batch_size} is no multiple of {multiple_of}")
    return Shapes((Shape(*size, batch_size),), seed)


def variable_batch(
    *,
    size: tuple[int, int],
    batch_size: int,
    seed: int,
    multiple_of: int,
    low: int,
    high: int,
    scales: int = 5,
    divisor: int = 32,
    replicas: int = 8,
    round_to: int = 1,
    at_least_base: bool = False,
    divisible_by: int = 1,
) -> Shapes:
    """cvnets' variable batch sampler: squares from `low` to `high`, batches of about equal area.

    Sizes are `scales` even steps, each made divisible by `divisor`, and `size` besides. The batch
    of each is that of one replica times `replicas`, because the published recipes round there. It
    does not depend on the devices, so that a run can go on with others: where those cannot share
    it, `divisible_by` has to say so.

    Args:
        size: base (height, width), to which `batch_size` belongs.
        batch_size: of the base size, over all replicas.
        seed: of the draws.
        multiple_of: devices times accumulated parts, which must be able to share each batch.
        low: smallest height and width, in pixels.
        high: largest height and width, in pixels.
        scales: how many even steps.
        divisor: of heights and widths.
        replicas: GPUs of the recipe.
        round_to: each replica's batch becomes divisible by it (v0.1 and v0.2: the GPUs).
        at_least_base: no replica's batch is smaller than that of the base size (v0.1).
        divisible_by: batches are rounded down to a multiple of it.

    Raises:
        ValueError: a value out of range, or a batch that cannot be shared.
    """
    if not 0 < low <= high or scales < 1:
        raise ValueError(f"low is {low}, high {high}, scales {scales}; 0 < low <= high, scales > 0")
    if divisible_by < 1:
        raise ValueError(f"divisible_by is {divisible_by}; it must be at least 1")
    if batch_size % replicas:
        raise ValueError(f"a batch of {batch_size} is no multiple of {replicas} replicas")
    squares = {(side, side) for side in map(int, np.linspace(low, high, scales))}
    sizes = {tuple(_divisible(side, divisor) for side in square) for square in squares} | {size}
    base = batch_size // replicas
    table = []
    for height, width in sorted(sizes):
        each = max(1, int(round(size[0] * size[1] * base / (height * width), 2)))
        each = max(base, each) if at_least_base else each
        total = replicas * (_divisible(each, round_to) if round_to > 1 else each)
        rounded = total // divisible_by * divisible_by
        if not rounded:
            raise ValueError(
                f"at {height}x{width} the batch is {total} and divisible_by {divisible_by}; raise "
                f"batch_size ({batch_size})"
            )
        if rounded % multiple_of:
            raise ValueError(
                f"at {height}x{width} the batch is {rounded}, which the devices and accumulated "
                f"parts cannot share equally; set divisible_by to "
                f"{math.lcm(divisible_by, multiple_of)}"
            )
        table.append(Shape(height, width, rounded))
    return Shapes(tuple(table), seed)


MULTISCALES = {"fixed": fixed, "variable_batch": variable_batch}


def _divisible(value: int, divisor: int) -> int:
    """The nearest multiple, but no less than 90 % of the value (MobileNets' rule)."""
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest
