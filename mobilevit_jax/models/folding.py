"""Batch norms folded into the convolutions before them, as a pure function of variables.

At inference a batch norm is a factor and an offset per channel. The factor goes into the kernel of
the convolution ahead of it, and what stays of the norm is the offset: its factor is exactly one, so
that every compiler and converter drops the product and makes the sum the convolution's bias.

Before editing: the tree keeps its paths and shapes, so folded variables go wherever others do. They
are for inference only: the running statistics are no longer those of anything.
"""

import numpy as np

from mobilevit_jax.models.layers import NORM_EPSILON
from mobilevit_jax.tree import Tree

# Of which 1 / sqrt(variance + epsilon) is one in float32, without a rounding error.
UNIT_VARIANCE = np.float32(1) - np.float32(NORM_EPSILON)


def fold_norms(variables: dict[str, Tree]) -> dict[str, Tree]:
    """Variables of the same network with the batch norms' factors inside the kernels.

    Args:
        variables: "params" and "batch_stats" of any network of this package, as numpy arrays.

    Returns:
        The same tree in float32; its outputs at inference differ by rounding only.
    """
    params, statistics = _fold(variables["params"], variables["batch_stats"])
    return {**variables, "params": params, "batch_stats": statistics}


def _fold(params: Tree, statistics: Tree) -> tuple[Tree, Tree]:
    """Folds the norms of a module and of those inside it; only a ConvNorm's has running ones."""
    folded, left = dict(params), dict(statistics)
    for name, inside in statistics.items():
        if "mean" not in inside:
            folded[name], left[name] = _fold(params[name], inside)
            continue
        norm, conv = params[name], params["conv"]
        variance = inside["var"].astype(np.float64) + NORM_EPSILON
        factor = norm["scale"] / np.sqrt(variance)
        offset = norm["bias"] - inside["mean"] * factor
        folded["conv"] = {**conv, "kernel": np.float32(conv["kernel"] * factor)}
        folded[name] = {"scale": np.ones_like(norm["scale"]), "bias": np.float32(offset)}
        left[name] = {
            "mean": np.zeros_like(inside["mean"]),
            "var": np.full_like(inside["var"], UNIT_VARIANCE),
        }
    return folded, left
