"""The architectures and published models by name: how to build them, and what they cost.

Before editing: zoo names are public. The counts of a row are typed in, so that a test can tell when
an architecture drifts; they agree with the published code.
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

from mobilevit_jax.models.attention import (
    PATCH,
    LinformerSelfAttention,
    MultiHeadSelfAttention,
    SeparableSelfAttention,
)
from mobilevit_jax.models.layers import Conv, Linear
from mobilevit_jax.models.mobilenet import MobileNetV1, MobileNetV2, MobileNetV3
from mobilevit_jax.models.mobilevit import MobileViT
from mobilevit_jax.models.mobilevit_v2 import MobileViTV2

_V1 = "mobilevit"
_V2 = "mobilevit_v2"
_MN1, _MN2, _MN3 = "mobilenet_v1", "mobilenet_v2", "mobilenet_v3"

FAMILIES: Mapping[str, type[nn.Module]] = {
    _V1: MobileViT,
    _V2: MobileViTV2,
    _MN1: MobileNetV1,
    _MN2: MobileNetV2,
    _MN3: MobileNetV3,
}
FLOAT32_BYTES = 4  # of an attention's scores, in any dtype of the computation


class ZooEntry(NamedTuple):
    """A published model."""

    family: str  # key of FAMILIES
    fields: Mapping[str, Any]  # of the family's module
    size: tuple[int, int]  # (h, w) of the images it was trained for
    params: int
    macs: int  # for one image of that size, by the rule of `summary`
    num_classes: int = 1000


# Names as in timm where it has the network; its MobileNets are other ones than these. in22k stands
# for ImageNet-21k-P with 10450 classes. Counts: cvnets code at commit 7771756; MACs agree with the
# v2 paper's appendix.
# fmt: off
ZOO: Mapping[str, ZooEntry] = {
    "mobilevit_xxs": ZooEntry(_V1, {"variant": "xxs"}, (256, 256), 1_272_024, 329_179_648),
    "mobilevit_xs": ZooEntry(_V1, {"variant": "xs"}, (256, 256), 2_317_848, 908_635_136),
    "mobilevit_s": ZooEntry(_V1, {"variant": "s"}, (256, 256), 5_578_632, 1_823_196_160),
    "mobilevitv2_050": ZooEntry(_V2, {"width": 0.5}, (256, 256), 1_370_593, 464_594_944),
    "mobilevitv2_075": ZooEntry(_V2, {"width": 0.75}, (256, 256), 2_866_009, 1_027_980_288),
    "mobilevitv2_100": ZooEntry(_V2, {"width": 1.0}, (256, 256), 4_901_841, 1_812_090_880),
    "mobilevitv2_125": ZooEntry(_V2, {"width": 1.25}, (256, 256), 7_478_089, 2_816_926_720),
    "mobilevitv2_150": ZooEntry(_V2, {"width": 1.5}, (256, 256), 10_594_753, 4_042_487_808),
    "mobilevitv2_175": ZooEntry(_V2, {"width": 1.75}, (256, 256), 14_251_833, 5_488_774_144),
    "mobilevitv2_200": ZooEntry(_V2, {"width": 2.0}, (256, 256), 18_449_329, 7_155_785_728),
    "mobilevitv2_050_384": ZooEntry(_V2, {"width": 0.5}, (384, 384), 1_370_593, 1_045_018_624),
    "mobilevitv2_075_384": ZooEntry(_V2, {"width": 0.75}, (384, 384), 2_866_009, 2_312_475_648),
    "mobilevitv2_100_384": ZooEntry(_V2, {"width": 1.0}, (384, 384), 4_901_841, 4_076_564_480),
    "mobilevitv2_125_384": ZooEntry(_V2, {"width": 1.25}, (384, 384), 7_478_089, 6_337_285_120),
    "mobilevitv2_150_384": ZooEntry(_V2, {"width": 1.5}, (384, 384), 10_594_753, 9_094_637_568),
    "mobilevitv2_175_384": ZooEntry(_V2, {"width": 1.75}, (384, 384), 14_251_833, 12_348_621_824),
    "mobilevitv2_200_384": ZooEntry(_V2, {"width": 2.0}, (384, 384), 18_449_329, 16_099_237_888),
    "mobilevitv2_150_in22k": ZooEntry(
        _V2, {"width": 1.5}, (256, 256), 17_861_803, 4_049_745_408, num_classes=10450),
    "mobilevitv2_175_in22k": ZooEntry(
        _V2, {"width": 1.75}, (256, 256), 22_728_483, 5_497_241_344, num_classes=10450),
    "mobilevitv2_200_in22k": ZooEntry(
        _V2, {"width": 2.0}, (256, 256), 28_135_579, 7_165_462_528, num_classes=10450),
    "mobilenetv1_025": ZooEntry(_MN1, {"width": 0.25}, (224, 224), 470_520, 46_248_576),
    "mobilenetv1_050": ZooEntry(_MN1, {"width": 0.5}, (224, 224), 1_331_592, 149_497_088),
    "mobilenetv1_075": ZooEntry(_MN1, {"width": 0.75}, (224, 224), 2_586_264, 333_830_016),
    "mobilenetv1_100": ZooEntry(_MN1, {"width": 1.0}, (224, 224), 4_231_976, 568_740_352),
    "mobilenetv2_025": ZooEntry(_MN2, {"width": 0.25}, (224, 224), 1_520_264, 50_447_776),
    "mobilenetv2_050": ZooEntry(_MN2, {"width": 0.5}, (224, 224), 1_969_448, 105_962_816),
    "mobilenetv2_075": ZooEntry(_MN2, {"width": 0.75}, (224, 224), 2_636_872, 214_288_096),
    "mobilenetv2_100": ZooEntry(_MN2, {"width": 1.0}, (224, 224), 3_504_872, 300_774_272),
    "mobilenetv3_small": ZooEntry(_MN3, {"variant": "small"}, (224, 224), 2_508_712, 52_749_504),
    "mobilenetv3_large": ZooEntry(_MN3, {"variant": "large"}, (224, 224), 5_437_728, 210_645_056),
}
# fmt: on


class SummaryRow(NamedTuple):
    """Cost of one stage, or of the whole model in the row named "total"."""

    name: str
    shape: tuple[int, ...]  # of its output, without the batch axis
    params: int
    macs: int  # for one image
    activation_bytes: int  # for one image


def create(
    name: str, *, num_classes: int, dtype: DTypeLike = jnp.float32, **fields: Any
) -> nn.Module:
    """Build a module of the family `name`.

    Raises ValueError for an unknown family or field, naming the ones there are. What a module finds
    wrong with a field's value it says when it is first called.
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


def fields(model: nn.Module) -> dict[str, Any]:
    """Fields of a network as `create` takes them: all but its classes and how it is computed."""
    others = ("parent", "name", "num_classes", "dtype", "remat")
    return {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in others
    }


def summary(model: nn.Module, *, size: tuple[int, int]) -> list[SummaryRow]:
    """Shape, parameters, multiply-accumulates and activations of every stage for one image.

    A stage is a child of the model; the last row is the total. MACs count convolutions and linear
    layers only, as published figures for MobileViT do: kernel elements times output positions. No
    biases, norms, activations, resizes, nor products inside an attention. Separable attention is
    counted as defined, though it forms fewer keys. Activations are the outputs of the same layers
    and of the two products inside a dot-product attention, as timm counts them, in the dtype of
    the computation; norms and activation functions are taken to work in place. Shapes only:
    nothing is computed.

    Args:
        model: network.
        size: (h, w) of the image.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    macs: Counter[str] = Counter()
    activation_bytes: Counter[str] = Counter()

    def record(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        outputs = call(*args, **kwargs)
        module = context.module
        if context.method_name != "__call__" or not module.path:
            return outputs
        stage = module.path[0]
        if len(module.path) == 1:
            shapes[stage] = outputs.shape[1:]
        if isinstance(module, Conv | Linear | SeparableSelfAttention):
            params = module.variables["params"]
            kernel = params["kernel"] if "kernel" in params else params["qkv"]["kernel"]
            positions = math.prod(outputs.shape[:-1])
            macs[stage] += kernel.size * positions
            activation_bytes[stage] += kernel.shape[-1] * positions * outputs.dtype.itemsize
        if isinstance(module, MultiHeadSelfAttention | LinformerSelfAttention):
            activation_bytes[stage] += _attention_bytes(module, outputs)
        return outputs

    with nn.intercept_methods(record):
        rng = jax.eval_shape(lambda: jax.random.key(0))
        image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
        params = jax.eval_shape(model.init, rng, image)["params"]
    rows = [
        SummaryRow(name, shape, _count(params[name]), macs[name], activation_bytes[name])
        for name, shape in shapes.items()
        if name in params
    ]
    totals = (_count(params), macs.total(), activation_bytes.total())
    return [*rows, SummaryRow("total", rows[-1].shape, *totals)]


def _attention_bytes(
    module: MultiHeadSelfAttention | LinformerSelfAttention, like: jax.Array
) -> int:
    """What the two products inside an attention put out, for a map of this shape."""
    tokens = math.prod(like.shape[1:-1]) // PATCH**2
    keys = module.latents if isinstance(module, LinformerSelfAttention) else tokens
    scores = math.prod(like.shape[:-1]) * module.heads * keys
    return scores * FLOAT32_BYTES + like.size * like.dtype.itemsize


def _count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
