"""MobileViT v1: self-attention between a local convolution and a fusion with the block's input.

Source: Mehta and Rastegari 2021, arXiv 2110.02178, and the code that made the published weights.

Before editing: parameter paths are public, checkpoints and converters rely on them. The four pixel
positions of a patch share all weights and never mix in the attention; the norm is per token.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mobilevit_jax.models import attention, layers
from mobilevit_jax.models.attention import PATCH, MultiHeadSelfAttention
from mobilevit_jax.models.layers import Conv, ConvNorm, InvertedResidual, LayerNorm, Linear


class Variant(NamedTuple):
    """A published size."""

    features: tuple[int, int, int, int, int]  # after layer_1 … layer_5
    token_widths: tuple[int, int, int, int, int]  # of the MobileViT blocks; 0: there is none
    expansion: int  # of the inverted residuals
    block_dropout: float  # of the published recipe


# fmt: off
VARIANTS: Mapping[str, Variant] = {
    "xxs": Variant((16, 24, 48, 64, 80), (0, 0, 64, 80, 96), expansion=2, block_dropout=0.05),
    "xs": Variant((32, 48, 64, 80, 96), (0, 0, 96, 120, 144), expansion=4, block_dropout=0.1),
    "s": Variant((32, 64, 96, 128, 160), (0, 0, 144, 192, 240), expansion=4, block_dropout=0.1),
}
# fmt: on
STEM = 16
RESIDUALS = (1, 3, 1, 1, 1)  # inverted residuals by layer; the first one has the layer's stride
ATTENTION_LAYERS = (0, 0, 2, 4, 3)
MAX_EXPANDED = 960  # channels ahead of the classifier, of at most four times layer_5's


class TransformerLayer(nn.Module):
    """Pre-norm attention and a two-layer feed-forward net, each added to its input."""

    self_attention: Callable[..., nn.Module] = MultiHeadSelfAttention
    dropout: float = 0.0
    weight_init: str = "kaiming"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"], *, train: bool) -> Float[Array, "b h w d"]:
        """Attend, then transform every token."""
        options: dict[str, Any] = {"weight_init": self.weight_init, "dtype": self.dtype}
        add = functools.partial(layers.add_branch, dropout=self.dropout, train=train)
        features = x.shape[-1]
        y = LayerNorm(dtype=self.dtype, name="norm_1")(x)
        x = add(x, self.self_attention(**options, name="attention"), y)

        y = LayerNorm(dtype=self.dtype, name="norm_2")(x)
        y = Linear(2 * features, activation=nn.silu, **options, name="ffn_1")(y)
        return add(x, Linear(features, **options, name="ffn_2"), y)


class MobileViTBlock(nn.Module):
    """Local features, transformer layers between patches, and a fusion with the block's input.

    A map with an odd side is resized to an even one for the transformer only. (Paper, section 3.1)
    """

    token_width: int
    attention_layers: int
    self_attention: Callable[..., nn.Module] = MultiHeadSelfAttention
    dropout: float = 0.0
    weight_init: str = "kaiming"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        """Return a map of the same shape."""
        options: dict[str, Any] = {"weight_init": self.weight_init, "dtype": self.dtype}
        features, size = x.shape[-1], x.shape[1:3]
        conv = functools.partial(ConvNorm, features, activation=nn.silu, **options)

        y = conv(name="local_conv")(x, train=train)
        y = Conv(self.token_width, kernel_size=1, **options, name="local_pointwise")(y)
        y = _resize(y, tuple(math.ceil(side / PATCH) * PATCH for side in size))
        for i in range(self.attention_layers):
            layer = TransformerLayer(
                self.self_attention, dropout=self.dropout, **options, name=f"attention_{i}"
            )
            y = layer(y, train=train)
        y = LayerNorm(dtype=self.dtype, name="norm")(y)
        y = _resize(y, size)
        y = conv(kernel_size=1, name="project")(y, train=train)
        return conv(name="fuse")(jnp.concatenate((x, y), axis=-1), train=train)


class Stage(nn.Module):
    """Inverted residuals, then a MobileViT block where the stage has one."""

    features: int
    stride: int
    residuals: int
    expansion: int
    token_width: int
    attention_layers: int
    self_attention: Callable[..., nn.Module] = MultiHeadSelfAttention
    dropout: float = 0.0
    weight_init: str = "kaiming"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b oh ow d"]:
        """Run the stage."""
        options: dict[str, Any] = {"weight_init": self.weight_init, "dtype": self.dtype}
        for i in range(self.residuals):
            block = InvertedResidual(
                self.features,
                stride=self.stride if i == 0 else 1,
                expansion=self.expansion,
                **options,
                name=f"block_{i}",
            )
            x = block(x, train=train)
        if self.attention_layers:
            x = MobileViTBlock(
                token_width=self.token_width,
                attention_layers=self.attention_layers,
                self_attention=self.self_attention,
                dropout=self.dropout,
                **options,
                name="mobilevit",
            )(x, train=train)
        return x


class MobileViT(nn.Module):
    """The classifier, in the three published sizes; the paper calls them XXS, XS and S.

    Takes images of any size and aspect as long as no map shrinks to nothing: at the standard
    strides 32 pixels a side.
    """

    num_classes: int
    variant: str = "s"  # key of VARIANTS
    strides: Sequence[int] = (2, 1, 2, 2, 2, 2)  # stem, layer_1 … layer_5; each 1 or 2
    dropout: float = 0.1  # before the classifier
    block_dropout: float | None = None  # on both residual branches; None: the variant's own
    attention: str = "multihead"  # key of attention.ATTENTIONS
    heads: int = 4  # of the kinds that have some
    latents: int = 256  # tokens that linformer's attention looks at
    weight_init: str = "kaiming"  # or "torch": see layers.check_weight_init
    remat: Sequence[str] = ()  # of layers.STAGES, computed twice to save memory: layers.run_stage
    dtype: DTypeLike = jnp.float32  # of the computation: float32, bfloat16 or float16

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"], *, train: bool = False) -> dict[str, Any]:
        """Return `logits` (b, k) in float32 and `stages`, the maps after layer_1 … layer_5.

        Training needs the rng "dropout" where a dropout is on, and the collection batch_stats
        mutable. Raises ValueError for an image smaller than the network's total stride and for a
        field out of its range.
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
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; use one of {', '.join(VARIANTS)}")
        variant = VARIANTS[self.variant]
        options: dict[str, Any] = {"weight_init": self.weight_init, "dtype": self.dtype}
        conv = functools.partial(ConvNorm, activation=nn.silu, **options)
        run = functools.partial(layers.run_stage, train=train, remat=self.remat)

        x = run(conv(STEM, stride=self.strides[0], name="stem"), image)
        stages = []
        for i in range(5):
            stage = Stage(
                features=variant.features[i],
                stride=self.strides[1 + i],
                residuals=RESIDUALS[i],
                expansion=variant.expansion,
                token_width=variant.token_widths[i],
                attention_layers=ATTENTION_LAYERS[i],
                self_attention=attention.kind(
                    self.attention, heads=self.heads, latents=self.latents
                ),
                dropout=(
                    variant.block_dropout if self.block_dropout is None else self.block_dropout
                ),
                **options,
                name=f"layer_{i + 1}",
            )
            x = run(stage, x)
            stages.append(x)

        expanded = min(4 * variant.features[-1], MAX_EXPANDED)
        x = conv(expanded, kernel_size=1, name="expand")(x, train=train)
        x = x.astype(jnp.float32).mean((1, 2))  # b c
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        logits = Linear(self.num_classes, weight_init=self.weight_init, name="head")(x)
        return {"logits": logits, "stages": tuple(stages)}


def _resize(x: Float[Array, "b h w d"], size: tuple[int, ...]) -> Float[Array, "b oh ow d"]:
    """Bilinear with half-pixel centres: `align_corners=False` in PyTorch."""
    if size == x.shape[1:3]:
        return x
    shape = (x.shape[0], *size, x.shape[-1])
    return jax.image.resize(x, shape, "bilinear", antialias=False)
