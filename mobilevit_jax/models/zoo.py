"""Names of architectures and published models, how to build them, and what they cost.

Before editing: zoo names are public. A row's parameter and MAC counts are typed in, not computed, so that a test can tell
when an architecture drifts; they are exact and agree with the published code at 1000 classes.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from mobilevit_jax.models.attention import SeparableSelfAttention
from mobilevit_jax.models.layers import Conv, Linear
from mobilevit_jax.models.mobilevit_v2 import MobileViTV2

FAMILIES: Mapping[str, type[nn.Module]] = {"mobilevit_v2": MobileViTV2}


class ZooEntry(NamedTuple):
    """A published model at 1000 classes."""

    family: str  # key of FAMILIES
    fields: Mapping[str, Any]  # of the family's module
    size: tuple[int, int]  # height and width of the images it was trained for
    params: int
    macs: int  # at `size`, by the rule of `summary`


ZOO: Mapping[str, ZooEntry] = {
    "mobilevitv2_050": ZooEntry("mobilevit_v2", {"width": 0.5}, (256, 256), 1_370_593, 0),
}


class SummaryRow(NamedTuple):
    """Cost of one stage, or of the whole model in the row named "total"."""

    name: str
    shape: tuple[int, ...]  # of its output, without the batch axis
    params: int
    macs: int  # for one image


def create(
    name: str, *, num_classes: int, dtype: DTypeLike = jnp.float32, **fields: Any
) -> nn.Module:
    """Build a module of the family `name`.

    Raises ValueError for an unknown family or field, naming the ones there are.
    """
    if name not in FAMILIES:
        raise ValueError(f"model {name!r} is unknown; use one of {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[name]
    known = {field.name for field in dataclasses.fields(family)} - {"parent", "name"}
    for field in fields:
        if field not in known:
            raise ValueError(
                f"model {name!r} has no field {field!r}; use one of {', '.join(sorted(known))}"
            )
    return family(num_classes=num_classes, dtype=dtype, **fields)


def summary(model: nn.Module, *, size: tuple[int, int]) -> list[SummaryRow]:
    """Shape, parameters and multiply-accumulates of every stage for one image of `size` (h, w), then the total.

    MACs count convolutions and linear layers only (kernel elements times output positions), as published figures for
    MobileViT do: no biases, norms, activations, resizes, nor products inside the attention. Nothing is computed: shapes only.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    macs: Counter[str] = Counter()

    def record(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        outputs = call(*args, **kwargs)
        path = context.module.path
        if context.method_name == "__call__" and len(path) == 1:
            shapes[path[0]] = outputs.shape[1:]
        if isinstance(context.module, Conv | Linear | SeparableSelfAttention):
            params = context.module.variables["params"]
            kernel = params["kernel"] if "kernel" in params else params["qkv"]["kernel"]
            macs[path[0]] += kernel.size * math.prod(outputs.shape[:-1])
        return outputs

    with nn.intercept_methods(record):
        rng = jax.eval_shape(lambda: jax.random.key(0))
        image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
        params = jax.eval_shape(model.init, rng, image)["params"]
    rows = [
        SummaryRow(name, shape, _count(params[name]), macs[name])
        for name, shape in shapes.items()
        if name in params
    ]
    total = SummaryRow("total", rows[-1].shape, _count(params), macs.total())
    return [*rows, total]


def _count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
