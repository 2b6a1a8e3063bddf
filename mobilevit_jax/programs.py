"""Compiling ahead of time: several programs at once, with progress, and what each will cost."""

import concurrent.futures
import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

from mobilevit_jax.data import multiscale
from mobilevit_jax.models import kernels
from mobilevit_jax.tree import Tree

T = TypeVar("T")


class Cost(NamedTuple):
    """Of one call of a compiled program, on one device.

    Attributes:
        flops: additions and multiplications; 0 where the compiler does not count them.
        argument_bytes: arguments: those that are donated hold results afterwards.
        extra_bytes: what the program needs besides while it runs, its other results included.
    """

    flops: float
    argument_bytes: int
    extra_bytes: int


def cost(program: Any, *, loops: int = 1) -> Cost:
    """What the compiler says of a program.

    Args:
        program: a jax.stages.Compiled.
        loops: how often the loop runs in which it spends its time; XLA counts a loop's body once.
    """
    flops = max((program.cost_analysis() or {}).get("flops", 0.0), 0.0)
    if jax.default_backend() == "cpu":
        flops += kernels.flops(program.as_text())  # of which XLA knows nothing
    memory = program.memory_analysis()
    if memory is None:
        return Cost(loops * flops, 0, 0)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Cost(
        flops=loops * flops,
        argument_bytes=memory.argument_size_in_bytes,
        extra_bytes=memory.temp_size_in_bytes + results,
    )


def device_bytes(tree: Tree) -> int:
    """Of a tree of arrays, or of their shapes and shardings, on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def predicted_peak(
    train: Sequence[Cost], evaluation: Cost, *, state_bytes: int, variables_bytes: int
) -> int:
    """The most bytes that training or evaluation holds at a time, on one device.

    The few scalars of each step that wait for the next log are left out.

    Args:
        train: of the train steps; their arguments are the state and a batch. While one runs, the
            batch of the next is already there.
        evaluation: its arguments are variables, which are part of the state, and a batch.
        state_bytes: of the train state, which stays during an evaluation.
        variables_bytes: of the variables among them.
    """
    next_batch = max(each.argument_bytes for each in train) - state_bytes
    stepping = max(each.argument_bytes + each.extra_bytes for each in train) + next_batch
    evaluating = evaluation.argument_bytes - variables_bytes + evaluation.extra_bytes
    return max(stepping, state_bytes + evaluating)


def sizes(shapes: multiscale.Shapes) -> str:
    """What is trained at which size, for the terminal: a line, or a table where there are more."""
    if len(shapes.table) == 1:
        height, width, batch_size = shapes.table[0]
        return f"{batch_size:,} images of {height}x{width} a step"
    share = 1 / len(shapes.table)
    rows = [
        f"{f'{height} x {width}':>14s}  {share:14.1%}  {batch_size:13,d}"
        for height, width, batch_size in shapes.table
    ]
    return "\n".join([f"{'height x width':14s}  share of steps  images a step", *rows])


def compile_all(jobs: Sequence[Callable[[], T]], *, threads: int) -> Iterator[tuple[int, T]]:
    """Compiles several programs at a time; gives each one's index and result when it is done.

    Args:
        jobs: functions that trace and compile a program. Tracing is Python, of which one thread
            runs at a time, but XLA compiles beside it.
        threads: how many at a time.
    """
    with concurrent.futures.ThreadPoolExecutor(max(1, min(threads, len(jobs)))) as pool:
        futures = {pool.submit(job): index for index, job in enumerate(jobs)}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        finally:  # of one that failed, or of a Ctrl-C: what has not begun never does
            pool.shutdown(wait=False, cancel_futures=True)
    _trim()


def _trim() -> None:
    """Gives the memory back to the system that compiling has left behind, where the libc is glibc.

    It would keep it: of the six programs of a server, 750 MiB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
