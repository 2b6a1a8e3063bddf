"""Batch norms folded into the convolutions before them, as a pure function of variables.

At inference a batch norm is a factor and an offset per channel. The factor goes into the kernel of
the convolution ahead of it, and what stays of the norm is the offset. What networks want of a norm
beside it is the same in all of them, and makes a factor of exactly one: a compiler that sees it as
constants drops the product, and a converter makes the sum the convolution's bias.

Before editing: paths and shapes of what is left stay. Folded parameters are for inference only: the
running statistics are gone.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from mobilevit_jax.models.layers import NORM_EPSILON
from mobilevit_jax.tree import Tree

# Of which 1 / sqrt(variance + epsilon) is one in float32, without a rounding error.
UNIT_VARIANCE = np.float32(1) - np.float32(NORM_EPSILON)


def fold_norms(variables: Mapping[str, Tree]) -> Tree:
    """Parameters with the batch norms' factors inside the kernels, and no more of a norm than bias.

    Args:
        variables: "params" and "batch_stats" of any network of this package, as numpy arrays.

    Returns:
        Parameters in float32, for `complete`; outputs at inference differ by rounding only.
    """
    return _fold(variables["params"], variables["batch_stats"])


def complete(folded: Tree) -> dict[str, Tree]:
    """Variables as networks take them; what was added is constant where a program is traced."""
    params, statistics = _complete(folded)
    return {"params": params, "batch_stats": statistics}


def _fold(params: Tree, statistics: Tree) -> Tree:
    """Folds the norms of a module and of those inside it; only a ConvNorm's has running ones."""
    folded = dict(params)
    for name, inside in statistics.items():
        if "mean" not in inside:
            folded[name] = _fold(params[name], inside)
            continue
        norm, conv = params[name], params["conv"]
        variance = inside["var"].astype(np.float64) + NORM_EPSILON
        factor = norm["scale"] / np.sqrt(variance)
        offset = norm["bias"] - inside["mean"] * factor
        folded["conv"] = {**conv, "kernel": np.float32(conv["kernel"] * factor)}
        folded[name] = {"bias": np.float32(offset)}
    return folded


def _complete(folded: Tree) -> tuple[Tree, Tree]:
    params, statistics = dict(folded), {}
    for name, inside in folded.items():
        if not isinstance(inside, Mapping):
            continue
        if set(inside) != {"bias"}:
            params[name], below = _complete(inside)
            if below:
                statistics[name] = below
            continue
        shape = inside["bias"].shape
        params[name] = {"scale": jnp.ones(shape), "bias": inside["bias"]}
        statistics[name] = {"mean": jnp.zeros(shape), "var": jnp.full(shape, UNIT_VARIANCE)}
    return params, statistics
