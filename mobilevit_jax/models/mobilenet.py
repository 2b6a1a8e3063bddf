"""MobileNet v1, v2 and v3 as the cvnets library has them: the baselines of the MobileViT papers.

Before editing: they differ from the networks usually known by these names, on purpose, since the
published weights do: v1 has no activation between its two convolutions, v2's stem has 32 channels
at any width, v3 has 3x3 kernels only. Parameter paths are public: checkpoints and converters rely
on them.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mobilevit_jax.models import layers
from mobilevit_jax.models.layers import Conv, ConvNorm, InvertedResidual, Linear, make_divisible


class Layer(nn.Module):
    """Blocks one after another, named block_0, block_1, …"""

    blocks: Sequence[Callable[..., nn.Module]]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b oh ow d"]:
        """Run them."""
        for i, block in enumerate(self.blocks):
            x = block(name=f"block_{i}")(x, train=train)
        return x


# --- v1 -------------------------------------------------------------------------------------------

V1_STEM = 32
# By layer: features at width 1, and blocks; the first one has the layer's stride.
V1_LAYERS = ((64, 1), (128, 2), (256, 2), (512, 6), (1024, 2))


class SeparableConv(nn.Module):
    """A depthwise and a pointwise convolution, both with a norm, the second with an activation."""

    features: int
    stride: int = 1
    weight_init: str = "torch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b oh ow d"]:
        """Filter every channel, then mix them."""
        conv = functools.partial(ConvNorm, weight_init=self.weight_init, dtype=self.dtype)
        channels = x.shape[-1]
        x = conv(channels, stride=self.stride, groups=channels, name="depthwise")(x, train=train)
        return conv(self.features, kernel_size=1, activation=nn.relu, name="pointwise")(
            x, train=train
        )


class MobileNetV1(nn.Module):
    """The classifier. (Howard et al. 2017, arXiv 1704.04861)"""

    num_classes: int
    width: float = 1.0  # multiplies every channel count; published: 0.25, 0.5, 0.75, 1.0
    strides: Sequence[int] = (2, 1, 2, 2, 2, 2)  # stem, layer_1 … layer_5; each 1 or 2
    dropout: float | None = None  # before the classifier; None: 0.1 times the width, at most 0.1
    weight_init: str = "torch"  # or "kaiming": see layers.check_weight_init
    remat: Sequence[str] = ()  # of layers.STAGES, computed twice to save memory: layers.run_stage
    dtype: DTypeLike = jnp.float32  # of the computation: float32, bfloat16 or float16

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"], *, train: bool = False) -> dict[str, Any]:
        """Return `logits` (b, k) in float32 and `stages`, the maps after layer_1 … layer_5.

        Raises ValueError for an image smaller than the network's total stride and for a field out
        of its range.
        """
        _check(self, image, self.strides)
        layers.check_width(self.width)

        def scaled(features: int) -> int:
            return make_divisible(math.ceil(features * self.width), 16)

        options: dict[str, Any] = {"weight_init": self.weight_init, "dtype": self.dtype}
        run = functools.partial(layers.run_stage, train=train, remat=self.remat)
        stem = ConvNorm(
            scaled(V1_STEM), stride=self.strides[0], activation=nn.relu, **options, name="stem"
        )
        x = run(stem, image)
        stages = []
        for i, (features, count) in enumerate(V1_LAYERS, start=1):
            blocks = [
                functools.partial(
                    SeparableConv,
                    scaled(features),
                    stride=self.strides[i] if j == 0 else 1,
                    **options,
                )
                for j in range(count)
            ]
            x = run(Layer(blocks, name=f"layer_{i}"), x)
            stages.append(x)
        x = _pool(x)
        x = _dropout(self.dropout, most=0.1, width=self.width, train=train)(x)
        logits = Linear(self.num_classes, weight_init=self.weight_init, name="head")(x)
        return {"logits": logits, "stages": tuple(stages)}


# --- v2 -------------------------------------------------------------------------------------------


class V2Row(NamedTuple):
    """Inverted residuals that are alike; the first of a layer has the layer's stride."""

    expansion: int
    features: int  # at width 1
    blocks: int


V2_STEM = 32  # at any width
V2_EXPANDED = 1280  # channels ahead of the classifier, at any width up to 1
V2_LAYERS = (
    (V2Row(1, 16, 1),),
    (V2Row(6, 24, 2),),
    (V2Row(6, 32, 3),),
    (V2Row(6, 64, 4), V2Row(6, 96, 3)),
    (V2Row(6, 160, 3), V2Row(6, 320, 1)),
)


class MobileNetV2(nn.Module):
    """The classifier. (Sandler et al. 2018, arXiv 1801.04381)"""

    num_classes: int
    width: float = 1.0  # multiplies most channel counts; published: 0.25, 0.5, 0.75, 1.0
    strides: Sequence[int] = (2, 1, 2, 2, 2, 2)  # stem, layer_1 … layer_5; each 1 or 2
    dropout: float | None = None  # before the classifier; None: 0.2 times the width, at most 0.2
    weight_init: str = "torch"  # or "kaiming": see layers.check_weight_init
    remat: Sequence[str] = ()  # of layers.STAGES, computed twice to save memory: layers.run_stage
    dtype: DTypeLike = jnp.float32  # of the computation: float32, bfloat16 or float16

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"], *, train: bool = False) -> dict[str, Any]:
        """Return `logits` (b, k) in float32 and `stages`, the maps after layer_1 … layer_5.

        Raises ValueError for an image smaller than the network's total stride and for a field out
        of its range.
        """
        _check(self, image, self.strides)
        layers.check_width(self.width)
        options: dict[str, Any] = {
            "activation": nn.relu6,
            "weight_init": self.weight_init,
            "dtype": self.dtype,
        }
        run = functools.partial(layers.run_stage, train=train, remat=self.remat)
        x = run(ConvNorm(V2_STEM, stride=self.strides[0], **options, name="stem"), image)
        stages = []
        for i, layer in enumerate(V2_LAYERS, start=1):
            block = functools.partial(InvertedResidual, **options)
            rows = [row for row in layer for _ in range(row.blocks)]
            blocks = [
                functools.partial(
                    block,
                    make_divisible(row.features * self.width, 8),
                    stride=self.strides[i] if j == 0 else 1,
                    expansion=row.expansion,
                )
                for j, row in enumerate(rows)
            ]
            x = run(Layer(blocks, name=f"layer_{i}"), x)
            stages.append(x)
        expanded = make_divisible(V2_EXPANDED * max(1.0, self.width), 8)
        x = ConvNorm(expanded, kernel_size=1, **options, name="expand")(x, train=train)
        x = _pool(x)
        x = _dropout(self.dropout, most=0.2, width=self.width, train=train)(x)
        logits = Linear(self.num_classes, weight_init=self.weight_init, name="head")(x)
        return {"logits": logits, "stages": tuple(stages)}


# --- v3 -------------------------------------------------------------------------------------------


class V3Row(NamedTuple):
    """One block."""

    features: int
    hidden: int  # channels of the depthwise convolution
    hard: bool  # activation: hard-swish, or else ReLU
    squeeze: bool  # whether channels are weighed by squeeze-and-excitation


class V3Variant(NamedTuple):
    """A published size: its rows by layer, its strides, its hidden classifier layer."""

    layers: tuple[tuple[V3Row, ...], ...]
    strides: tuple[int, ...]  # stem, layer_1 … layer_5
    head_hidden: int


V3_STEM = 16
V3_DROPOUT = 0.2
# fmt: off
V3_VARIANTS: Mapping[str, V3Variant] = {
    "large": V3Variant(
        layers=(
            (V3Row(16, 16, False, False),),
            (V3Row(24, 64, False, False), V3Row(24, 72, False, False)),
            (V3Row(40, 72, False, True), V3Row(40, 120, False, True), V3Row(40, 120, False, True)),
            (V3Row(80, 240, True, False), V3Row(80, 200, True, False), V3Row(80, 184, True, False),
             V3Row(80, 184, True, False), V3Row(112, 480, True, True), V3Row(112, 672, True, True)),
            (V3Row(160, 672, True, True), V3Row(160, 960, True, True), V3Row(160, 960, True, True)),
        ),
        strides=(2, 1, 2, 2, 2, 2),
        head_hidden=1280,
    ),
    "small": V3Variant(
        layers=(
            (V3Row(16, 16, False, True),),
            (V3Row(24, 72, False, False),),
            (V3Row(24, 88, False, False),),
            (V3Row(40, 96, True, True), V3Row(40, 240, True, True), V3Row(40, 240, True, True),
             V3Row(48, 120, True, True), V3Row(48, 144, True, True)),
            (V3Row(96, 288, True, True), V3Row(96, 576, True, True), V3Row(96, 576, True, True)),
        ),
        strides=(2, 2, 2, 1, 2, 2),
        head_hidden=1024,
    ),
}
# fmt: on


class SqueezeExcite(nn.Module):
    """Weighs every channel by a gate computed from the means of all. (arXiv 1709.01507)"""

    weight_init: str = "torch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Gate the channels; the gate is a hard sigmoid."""
        conv = functools.partial(
            Conv, kernel_size=1, use_bias=True, weight_init=self.weight_init, dtype=self.dtype
        )
        channels = x.shape[-1]
        squeezed = max(make_divisible(channels // 4, 8), 32)
        # No map of one pixel: of its product with a kernel litert-converter 0.5 makes nothing.
        gate = x.astype(jnp.float32).mean((1, 2))  # b c
        gate = nn.relu(conv(squeezed, name="reduce")(gate))
        gate = nn.hard_sigmoid(conv(channels, name="expand")(gate))
        # Multiplied in float32: the gate's gradient is a sum over the map.
        return (x * gate.astype(jnp.float32)[:, None, None]).astype(self.dtype)


class SqueezeInvertedResidual(nn.Module):
    """An inverted residual with a gate on its hidden channels and a choice of activation."""

    row: V3Row
    stride: int = 1
    weight_init: str = "torch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b oh ow d"]:
        """Expand, filter, weigh, project."""
        options: dict[str, Any] = {"weight_init": self.weight_init, "dtype": self.dtype}
        hidden = self.row.hidden
        active = functools.partial(
            ConvNorm, hidden, activation=nn.hard_swish if self.row.hard else nn.relu, **options
        )
        y = x
        if hidden != x.shape[-1]:
            y = active(kernel_size=1, name="expand")(y, train=train)
        y = active(stride=self.stride, groups=hidden, name="depthwise")(y, train=train)
        if self.row.squeeze:
            y = SqueezeExcite(**options, name="squeeze_excite")(y)
        y = ConvNorm(self.row.features, kernel_size=1, **options, name="project")(y, train=train)
        return x + y if x.shape == y.shape else y


class MobileNetV3(nn.Module):
    """The classifier, in its two published sizes. (Howard et al. 2019, arXiv 1905.02244)"""

    num_classes: int
    variant: str = "large"  # key of V3_VARIANTS
    strides: Sequence[int] | None = None  # stem, layer_1 … layer_5; None: the variant's own
    dropout: float = V3_DROPOUT  # before the classifier
    weight_init: str = "torch"  # or "kaiming": see layers.check_weight_init
    remat: Sequence[str] = ()  # of layers.STAGES, computed twice to save memory: layers.run_stage
    dtype: DTypeLike = jnp.float32  # of the computation: float32, bfloat16 or float16

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"], *, train: bool = False) -> dict[str, Any]:
        """Return `logits` (b, k) in float32 and `stages`, the maps after layer_1 … layer_5.

        Raises ValueError for an image smaller than the network's total stride and for a field out
        of its range.
        """
        if self.variant not in V3_VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; use one of {', '.join(V3_VARIANTS)}")
        variant = V3_VARIANTS[self.variant]
        strides = variant.strides if self.strides is None else self.strides
        _check(self, image, strides)
        options: dict[str, Any] = {"weight_init": self.weight_init, "dtype": self.dtype}
        conv = functools.partial(ConvNorm, activation=nn.hard_swish, **options)
        run = functools.partial(layers.run_stage, train=train, remat=self.remat)
        x = run(conv(V3_STEM, stride=strides[0], name="stem"), image)
        stages = []
        for i, rows in enumerate(variant.layers, start=1):
            blocks = [
                functools.partial(
                    SqueezeInvertedResidual,
                    row,
                    stride=strides[i] if j == 0 else 1,
                    **options,
                )
                for j, row in enumerate(rows)
            ]
            x = run(Layer(blocks, name=f"layer_{i}"), x)
            stages.append(x)
        x = conv(6 * x.shape[-1], kernel_size=1, name="expand")(x, train=train)
        x = _pool(x)
        linear = functools.partial(Linear, weight_init=self.weight_init)
        x = nn.hard_swish(linear(variant.head_hidden, name="head_hidden")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        logits = linear(self.num_classes, name="head")(x)
        return {"logits": logits, "stages": tuple(stages)}


# --- shared ---------------------------------------------------------------------------------------


def _check(
    model: "MobileNetV1 | MobileNetV2 | MobileNetV3", image: Array, strides: Sequence[int]
) -> None:
    layers.check_network(
        image.shape[1:3],
        num_classes=model.num_classes,
        strides=strides,
        dropouts={"dropout": model.dropout},
        weight_init=model.weight_init,
        remat=model.remat,
        dtype=model.dtype,
    )


def _pool(x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
    return x.astype(jnp.float32).mean((1, 2))


def _dropout(rate: float | None, *, most: float, width: float, train: bool) -> nn.Dropout:
    """The classifier's dropout: as given, or as the published recipe scales it with the width."""
    if rate is None:
        rate = layers.bound(round(most * width, 3), 0.0, most)
    return nn.Dropout(rate, deterministic=not train)
