"""What a training goal is: five pure functions between a model's outputs and a batch.

A task knows no model and a model knows no task: they meet through the two dicts `batch` and
`outputs`. A new goal (segmentation, detection, distillation) is a new value of `Task`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

Batch = dict[str, Array]
Outputs = Any  # Mapping[str, Array or tuple of Arrays]; the keys decide which


class Task(NamedTuple):
    """The functions that the train and eval steps call.

    Attributes:
        mix: (batch, rng) -> batch; mixes examples of a training batch (mixup, cutmix).
        loss: (outputs, batch) -> scalar; mean over the valid examples, differentiable. The train
            step adds `step`, int32 b, to the batch: the number of the step, in every row.
        sums: (outputs, batch) -> scalars or vectors by name, each a sum over the valid examples,
            with "count"; sums of batches add up to the sum of the split.
        summarize: sums on the host -> metrics by name.
        predict: outputs -> arrays by name, leading axis = example.
    """

    mix: Callable[[Batch, jax.Array], Batch]
    loss: Callable[[Outputs, Batch], Float[Array, ""]]
    sums: Callable[[Outputs, Batch], dict[str, Float[Array, "..."]]]
    summarize: Callable[[Mapping[str, np.ndarray | float]], dict[str, float]]
    predict: Callable[[Outputs], dict[str, Array]]


def masked_mean(each: Float[Array, " b"], mask: Bool[Array, " b"]) -> Float[Array, ""]:
    """Mean over the valid examples; 0 where there is none."""
    weight = mask.astype(jnp.float32)
    return jnp.sum(each * weight) / jnp.maximum(jnp.sum(weight), 1.0)
