"""The device mesh, where arrays lie on it, and the one place where host batches become arrays.

Two axes: batches are split over both, "data" and "fsdp"; parameters, and whatever is kept for each
of them, may be divided along "fsdp" and are the same along "data".
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mobilevit_jax import tree
from mobilevit_jax.tree import Tree

Batch = Mapping[str, jax.Array]
Rules = Sequence[tuple[str, int | str]]

AXES = ("data", "fsdp")
# Elements. To gather a smaller array takes longer than the memory is worth.
MIN_DIVIDED = 2**14


def make_mesh(fsdp: int = 1) -> Mesh:
    """All devices of all processes: `fsdp` along the axis of that name, the others along "data".

    Raises:
        ValueError: the devices cannot be shared out so.
    """
    # Those of a process side by side: its rows of a batch are then one piece of it, and what is
    # divided along "fsdp" is gathered within a host, as far as it has devices enough.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"{len(devices)} devices cannot be grouped by {fsdp}")
    # Not jax.make_mesh: its axes are of the Explicit type, and Linen's Dropout then fails to trace.
    return Mesh(np.asarray(devices).reshape(-1, fsdp), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device: metrics, sums, what is too small to divide."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """Rows (the leading axis) divided among the devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def by_rules(abstract: Tree, mesh: Mesh, rules: Rules) -> Tree:
    """The shapes of a tree, with the sharding that each leaf gets.

    Args:
        abstract: arrays or their shapes; those of an optimiser have the path of their parameter at
            the end of their own.
        mesh: where they are to lie.
        rules: (pattern, axis): the first pattern that is found in the path of a leaf says which of
            its axes is divided along "fsdp": a number, "largest" of those that can be, or "none".
            Where no pattern is found, none is.

    Raises:
        ValueError: another axis, one that the leaf has not, or one that cannot be divided.
    """
    parts = mesh.shape["fsdp"]
    compiled = [(_pattern(pattern), axis) for pattern, axis in rules]

    def place(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
        axis = next((axis for pattern, axis in compiled if pattern.search(path)), "none")
        divided = _axis(path, leaf.shape, axis, parts)
        names = ["fsdp" if i == divided else None for i in range(len(leaf.shape))]
        spec = PartitionSpec(*names) if divided is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return tree.map_with_path(place, abstract)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from error


def _axis(path: str, shape: tuple[int, ...], axis: int | str, parts: int) -> int | None:
    """The axis of a leaf that is divided into `parts`; None where it stays whole."""
    if axis == "none":
        return None
    if axis == "largest":
        able = [i for i, length in enumerate(shape) if length % parts == 0]
        if parts == 1 or not able or np.prod(shape) < MIN_DIVIDED:
            return None
        return max(able, key=lambda i: shape[i])
    if not isinstance(axis, int):
        raise ValueError(f"{axis!r} is no axis: a number, 'largest' or 'none'")
    if not 0 <= axis < len(shape) or shape[axis] % parts:
        raise ValueError(f"axis {axis} of {path} {shape} cannot be divided by {parts}")
    return axis


def shardings(placed: Tree) -> Tree:
    """Of the leaves that `by_rules` gave a place."""
    return jax.tree.map(lambda leaf: leaf.sharding, placed)


def gather(mesh: Mesh) -> Callable[[Tree], Tree]:
    """For a compiled step: brings divided arrays together, and splits their gradients again."""
    return functools.partial(jax.lax.with_sharding_constraint, shardings=replicated(mesh))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on the mesh as parts of the global arrays.

    On the CPU backend the result may share memory with the numpy arrays, so the caller must never
    write into them again; the pipeline hands out a fresh buffer for every batch.
    """
    rows = split_batch(mesh)
    # This is the transfer that the loop is allowed; among several processes it counts as implicit.
    with jax.transfer_guard_host_to_device("allow"):
        return {
            name: jax.make_array_from_process_local_data(rows, array)
            for name, array in batch.items()
        }


def local_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of an array that is split like a batch."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate(jax.device_get([shard.data for shard in shards]))


def abstract_batch(
    mesh: Mesh, *, batch_size: int, size: tuple[int, int]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch of images, for compiling ahead of time."""
    rows = split_batch(mesh)
    shapes = {
        "image": ((batch_size, *size, 3), np.uint8),
        "label": ((batch_size,), np.int32),
        "mask": ((batch_size,), np.bool_),
    }
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for name, (shape, dtype) in shapes.items()
    }


def abstract_like(tree: Tree, sharding: NamedSharding) -> Tree:
    """Shapes, dtypes and the given sharding for every leaf of an abstract or concrete tree."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
