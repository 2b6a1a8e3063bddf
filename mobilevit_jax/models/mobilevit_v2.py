"""MobileViT v2: separable self-attention among MobileNet v2's inverted residuals.

Mehta and Rastegari 2022, "Separable self-attention for mobile vision transformers", arXiv
2206.02680. Before editing: the network follows the code that made the published weights, which has
two inverted residuals in layer_2 where the paper's table reads as three. Parameter paths are
public: checkpoints and converters rely on them.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mobilevit_jax.models import attention, layers
from mobilevit_jax.models.attention import PATCH, SeparableSelfAttention
from mobilevit_jax.models.convolution import resize_align_corners
from mobilevit_jax.models.layers import Conv, ConvNorm, GroupNorm, InvertedResidual, Linear


class StageRow(NamedTuple):
    """One stage at width 1."""

    features: int
    divisor: int  # the scaled feature count is a multiple of it
    blocks: int  # inverted residuals; the first one has the stage's stride
    token_width: int  # of the MobileViT block that follows them
    attention_layers: int  # in that block; with 0 there is no block


STAGES = (
    StageRow(features=64, divisor=16, blocks=1, token_width=0, attention_layers=0),
    StageRow(features=128, divisor=8, blocks=2, token_width=0, attention_layers=0),
    StageRow(features=256, divisor=8, blocks=1, token_width=128, attention_layers=2),
    StageRow(features=384, divisor=8, blocks=1, token_width=192, attention_layers=4),
    StageRow(features=512, divisor=8, blocks=1, token_width=256, attention_layers=3),
)


class AttentionLayer(nn.Module):
    """Pre-norm attention and a two-layer feed-forward net, each added to its input."""

    self_attention: Callable[..., nn.Module] = SeparableSelfAttention
    dropout: float = 0.0
    weight_init: str = "torch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"], *, train: bool) -> Float[Array, "b h w d"]:
        """Attend, then transform every token."""
        options = {"weight_init": self.weight_init, "dtype": self.dtype}
        add = functools.partial(layers.add_branch, dropout=self.dropout, train=train)
        y = GroupNorm(dtype=self.dtype, name="norm_1")(x)
        x = add(x, self.self_attention(**options, name="attention"), y)

        hidden = 2 * x.shape[-1] // 16 * 16
        y = GroupNorm(dtype=self.dtype, name="norm_2")(x)
        conv = functools.partial(Conv, kernel_size=1, use_bias=True, **options)
        y = conv(hidden, activation=nn.silu, name="ffn_1")(y)
        return add(x, conv(x.shape[-1], name="ffn_2"), y)


class MobileViTV2Block(nn.Module):
    """Local features by a depthwise convolution, global ones by attention; no skip, no fusion.

    A map with an odd side is first resized up to an even one and stays so: 7x7 in, 8x8 out.
    """

    token_width: int
    attention_layers: int
    self_attention: Callable[..., nn.Module] = SeparableSelfAttention
    dropout: float = 0.0
    weight_init: str = "torch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b eh ew c"]:
        """Return a map of the same features and even sides."""
        options = {"weight_init": self.weight_init, "dtype": self.dtype}
        features = x.shape[-1]
        height, width = (math.ceil(side / PATCH) * PATCH for side in x.shape[1:3])
        if (height, width) != x.shape[1:3]:
            x = resize_align_corners(x, size=(height, width))

        local = ConvNorm(
            features, groups=features, activation=nn.silu, **options, name="local_depthwise"
        )
        x = local(x, train=train)
        x = Conv(self.token_width, kernel_size=1, **options, name="local_pointwise")(x)
        for i in range(self.attention_layers):
            layer = AttentionLayer(
                self.self_attention, dropout=self.dropout, **options, name=f"attention_{i}"
            )
            x = layer(x, train=train)
        x = GroupNorm(dtype=self.dtype, name="norm")(x)
        return ConvNorm(features, kernel_size=1, **options, name="project")(x, train=train)


class Stage(nn.Module):
    """Inverted residuals, then a MobileViT block where the stage has one."""

    features: int
    stride: int
    blocks: int
    token_width: int
    attention_layers: int
    self_attention: Callable[..., nn.Module] = SeparableSelfAttention
    dropout: float = 0.0
    weight_init: str = "torch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b oh ow d"]:
        """Run the stage."""
        options = {"weight_init": self.weight_init, "dtype": self.dtype}
        for i in range(self.blocks):
            stride = self.stride if i == 0 else 1
            block = InvertedResidual(self.features, stride=stride, **options, name=f"block_{i}")
            x = block(x, train=train)
        if self.attention_layers:
            block = MobileViTV2Block(
                token_width=self.token_width,
                attention_layers=self.attention_layers,
                self_attention=self.self_attention,
                dropout=self.dropout,
                **options,
                name="mobilevit",
            )
            x = block(x, train=train)
        return x


class MobileViTV2(nn.Module):
    """The classifier; `width` 0.5 to 2.0 are the published sizes.

    Takes images of any size and aspect whose sides are at least the product of the strides, 32.
    """

    num_classes: int
    width: float = 1.0  # multiplies every channel count
    strides: Sequence[int] = (2, 1, 2, 2, 2, 2)  # stem, layer_1 … layer_5; each 1 or 2
    dropout: float = 0.0  # before the classifier
    block_dropout: float = 0.0  # on both residual branches of every attention layer
    attention: str = "separable"  # key of attention.ATTENTIONS
    heads: int = 4  # of the kinds that have some
    latents: int = 256  # tokens that linformer's attention looks at
    weight_init: str = "torch"  # or "kaiming": see layers.check_weight_init
    remat: Sequence[str] = ()  # of layers.STAGES, computed twice to save memory: layers.run_stage
    dtype: DTypeLike = jnp.float32  # of the computation: float32, bfloat16 or float16

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"], *, train: bool = False) -> dict[str, Any]:
        """Return `logits` (b, k) in float32 and `stages`, the maps after layer_1 … layer_5.

        Training needs the collection batch_stats mutable and, where a dropout is on, the rng
        "dropout". Raises ValueError for a field out of its range and for an image too small.
        """
        layers.check_network(
            image.shape[1:3],
            num_classes=self.num_classes,
            strides=self.strides,
            dropouts={"dropout": self.dropout, "block_dropout": self.block_dropout},
            weight_init=self.weight_init,
            remat=self.remat,
            dtype=self.dtype,
        )
        layers.check_width(self.width)
        run = functools.partial(layers.run_stage, train=train, remat=self.remat)
        options = {"weight_init": self.weight_init, "dtype": self.dtype}
        features = layers.make_divisible(layers.bound(32 * self.width, 16, 64), 8, minimum=16)
        stem = ConvNorm(
            features, stride=self.strides[0], activation=nn.silu, **options, name="stem"
        )
        x = run(stem, image)
        stages = []
        for i, (row, stride) in enumerate(zip(STAGES, self.strides[1:], strict=True), start=1):
            stage = Stage(
                features=layers.make_divisible(row.features * self.width, row.divisor),
                stride=stride,
                blocks=row.blocks,
                token_width=layers.make_divisible(row.token_width * self.width, 8),
                attention_layers=row.attention_layers,
                self_attention=attention.kind(
                    self.attention, heads=self.heads, latents=self.latents
                ),
                dropout=self.block_dropout,
                **options,
                name=f"layer_{i}",
            )
            x = run(stage, x)
            stages.append(x)

        x = x.astype(jnp.float32).mean((1, 2))  # b c
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        logits = Linear(self.num_classes, weight_init=self.weight_init, name="head")(x)
        return {"logits": logits, "stages": tuple(stages)}
