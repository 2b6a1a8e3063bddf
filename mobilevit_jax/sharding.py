"""The device mesh, and the one place where host batches become device arrays.

One axis, "data": batches are split along it, the state is on every device.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mobilevit_jax.tree import Tree

Batch = Mapping[str, jax.Array]


def make_mesh() -> Mesh:
    """All devices of all processes on one axis named "data"."""
    # Not jax.make_mesh: its axes are of the Explicit type, and Linen's Dropout then fails to trace.
    return Mesh(np.asarray(jax.devices()), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device: parameters, optimiser state, sums."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """Rows (the leading axis) divided among the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on the mesh as parts of the global arrays.

    On the CPU backend the result may share memory with the numpy arrays, so the caller must never
    write into them again; the pipeline hands out a fresh buffer for every batch.
    """
    rows = split_batch(mesh)
    return {
        name: jax.make_array_from_process_local_data(rows, array) for name, array in batch.items()
    }


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
