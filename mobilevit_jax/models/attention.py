"""Attention over a map that is split into patches of 2x2 pixels.

Before editing: every module here takes a map `b h w d` with even sides and returns one of the same
shape, so that a block can hold any of them. The four pixel positions inside a patch never mix here:
each is a sequence of its own with one token per patch. Score maps are sown into the collection
"attention", which costs nothing unless it is mutable.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mobilevit_jax.models import kernels
from mobilevit_jax.models.convolution import pointwise_conv
from mobilevit_jax.models.kernels import Finish
from mobilevit_jax.models.layers import Conv, Linear, PointwiseWeights

PATCH = 2  # pixels along each side of a patch


class SeparableSelfAttention(nn.Module):
    """One score per token, not per pair: linear in their number. (MobileViT v2 paper, section 3.1)

    `y = out(relu(v) * sum_n(softmax_n(q) * k))` with a query of one channel. The published code
    unfolds the map into tokens `b p n d` and folds it back; here the softmax and the sum run over
    the patch axes of a view of the map. Parameters: `qkv` (1x1, d -> 1 + 2d, in this order) and
    `out` (1x1, d -> d). Sows `scores` (b, h, w): the softmax in float32, which adds up to one over
    the patches for every pixel position.
    """

    weight_init: str = "torch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w d"],
        previous: Float[Array, "b ph pw d"] | None = None,
        *,
        added: Float[Array, "b h w d"] | None = None,
    ) -> Float[Array, "b h w d"]:
        """Mix the tokens of every pixel position, and add another map where there is one.

        With a `previous` map, of any even sides, this is cross-attention: the query and the keys
        are taken from it, and only the values from `x`.
        """
        source = x if previous is None else previous
        features = source.shape[-1]
        weights = PointwiseWeights(1 + 2 * features, weight_init=self.weight_init, name="qkv")
        operands = (source.astype(self.dtype), x.astype(self.dtype), *weights(features))
        if kernels.serve(*operands) and not self.is_mutable_collection("attention"):
            y = _separable_by_kernel(*operands)
        else:
            y, scores = _separable(*operands)
            if not self.is_initializing():  # then every collection is mutable
                self.sow("attention", "scores", scores)
        out = Conv(
            features,
            kernel_size=1,
            use_bias=True,
            weight_init=self.weight_init,
            dtype=self.dtype,
            name="out",
        )
        return out(y, added=added)


def _separable(
    source: Float[Array, "b sh sw d"],
    x: Float[Array, "b h w d"],
    kernel: Float[Array, "d m"],
    bias: Float[Array, " m"],
) -> tuple[Float[Array, "b h w d"], Float[Array, "b sh sw"]]:
    """The values of x times the context of their pixel position in `source`, and the scores.

    Kernel and bias are of the score, the key and the value, in this order: `m = 1 + 2d`.
    """
    batch, height, width, features = source.shape
    patches = (batch, height // PATCH, PATCH, width // PATCH)  # b nh ph nw; pw stays with d
    matrices, biases = (jnp.split(w, (1, 1 + features), axis=-1) for w in (kernel, bias))
    query = pointwise_conv(source, matrices[0].astype(x.dtype), Finish(shift=biases[0]))
    query = query.reshape(*patches, PATCH).astype(jnp.float32)
    scores = jax.nn.softmax(query, axis=(1, 3)).reshape(batch, height, width)

    # Keys are linear in the tokens and scores add up to one, so the context is the key of the
    # average token: one key per pixel position, where all keys were a third of this layer.
    average = (source * scores[..., None]).reshape(*patches, -1).sum((1, 3))  # b ph (pw d)
    average = average.reshape(batch, PATCH * PATCH, features)
    context = pointwise_conv(average, matrices[1]) + biases[1]
    context = context.reshape(batch, 1, PATCH, 1, -1)  # b 1 ph 1 (pw d)

    finish = Finish(shift=biases[2], activation=nn.relu)
    value = pointwise_conv(x, matrices[2].astype(x.dtype), finish)
    y = value.reshape(batch, x.shape[1] // PATCH, PATCH, x.shape[2] // PATCH, -1)
    # The context stays float32: its gradient is a sum over all patches.
    return (y * context).astype(x.dtype).reshape(x.shape), scores


@jax.custom_vjp
def _separable_by_kernel(source: Array, x: Array, kernel: Array, bias: Array) -> Array:
    return kernels.separable_attention(source, x, kernel, bias)


def _separable_forward(*operands: Array) -> tuple[Array, Any]:
    y, pullback, _ = jax.vjp(_separable, *operands, has_aux=True)
    return y, pullback


def _separable_backward(pullback: Any, cotangent: Array) -> tuple[Array, ...]:
    return pullback(cotangent)


_separable_by_kernel.defvjp(_separable_forward, _separable_backward)


class MultiHeadSelfAttention(nn.Module):
    """Scaled dot-product attention between all tokens. (Vaswani et al. 2017, arXiv 1706.03762)

    Parameters: `qkv` (d -> 3d, in this order, heads contiguous within each) and `out` (d -> d),
    both linear layers with bias. Sows `scores` (b, p, heads, n, n), the softmax in float32, whose
    rows belong to queries and add up to one.
    """

    heads: int = 4
    weight_init: str = "kaiming"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], *, added: Float[Array, "b h w d"] | None = None
    ) -> Float[Array, "b h w d"]:
        """Mix the tokens of every pixel position, and add another map where there is one.

        Raises ValueError where the heads cannot share the channels equally.
        """
        linear = functools.partial(Linear, weight_init=self.weight_init, dtype=self.dtype)
        _check_heads(self.heads, x.shape[-1])
        qkv = linear(3 * x.shape[-1], name="qkv")(x)
        out = linear(x.shape[-1], name="out")
        if kernels.serve(qkv) and not self.is_mutable_collection("attention"):
            return out(_attention_by_kernel(qkv, self.heads), added=added)
        y, scores = _attention(qkv, self.heads)
        _sow_scores(self, scores, heads=self.heads)
        return out(y, added=added)


class LinformerSelfAttention(nn.Module):
    """Dot-product attention to a fixed number of learned mixtures of the tokens. (arXiv 2006.04768)

    Parameters: as `MultiHeadSelfAttention`, and `key_tokens`, `value_tokens`: linear layers along
    the tokens without bias, (n, latents), shared by the heads and pixel positions. They tie the
    network to one image size. Sows `scores` (b, p, heads, n, latents).
    """

    heads: int = 4
    latents: int = 256
    weight_init: str = "kaiming"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], *, added: Float[Array, "b h w d"] | None = None
    ) -> Float[Array, "b h w d"]:
        """Mix the tokens of every pixel position, and add another map where there is one.

        Raises ValueError where the heads cannot share the channels equally, and for a map of
        another size than that of the initialisation.
        """
        linear = functools.partial(Linear, weight_init=self.weight_init, dtype=self.dtype)
        if self.latents < 1:
            raise ValueError(f"latents is {self.latents}; use at least 1")
        tokens = x.shape[1] // PATCH * (x.shape[2] // PATCH)
        if self.has_variable("params", "key_tokens"):
            built = self.variables["params"]["key_tokens"]["kernel"].shape[0]
            if tokens != built:
                raise ValueError(
                    f"linformer attention was built for {built} patches and this map has "
                    f"{tokens}: use images of the size that the network was built for"
                )
        _check_heads(self.heads, x.shape[-1])
        qkv = linear(3 * x.shape[-1], name="qkv")(x)
        query, key, value = _split_tokens(qkv, heads=self.heads)
        along_tokens = functools.partial(linear, self.latents, use_bias=False)
        key = along_tokens(name="key_tokens")(key.swapaxes(2, 3)).swapaxes(2, 3)
        value = along_tokens(name="value_tokens")(value.swapaxes(2, 3)).swapaxes(2, 3)
        y, scores = _dot_product_attention(query, key, value)
        _sow_scores(self, scores, heads=self.heads)
        return linear(x.shape[-1], name="out")(_merge_tokens(y, size=x.shape), added=added)


def _check_heads(heads: int, channels: int) -> None:
    if channels % heads:
        raise ValueError(f"heads is {heads}; use a divisor of {channels}, the channels of a token")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attention_by_kernel(qkv: Array, heads: int) -> Array:
    return kernels.attention(qkv, heads=heads)


def _attention_forward(qkv: Array, heads: int) -> tuple[Array, Array]:
    return _attention_by_kernel(qkv, heads), qkv


def _attention_backward(heads: int, qkv: Array, cotangent: Array) -> tuple[Array]:
    return jax.vjp(lambda qkv: _attention(qkv, heads)[0], qkv)[1](cotangent)


_attention_by_kernel.defvjp(_attention_forward, _attention_backward)


def _attention(
    qkv: Float[Array, "b h w c"], heads: int
) -> tuple[Float[Array, "b h w d"], Float[Array, "bp hp n m"]]:
    """Attended values as a map, and the scores."""
    y, scores = _dot_product_attention(*_split_tokens(qkv, heads=heads))
    size = (*qkv.shape[:3], qkv.shape[3] // 3)
    return _merge_tokens(y, size=size), scores


def _split_tokens(
    qkv: Float[Array, "b h w c"], *, heads: int
) -> tuple[Float[Array, "bp hp n dh"], ...]:
    """Query, key and value of every head for every pixel position.

    The rows of pixels in a patch go with the batch and the columns with the heads, beside which
    they lie in memory: the transposition that attention wants anyway does most of the unfolding.
    No tensor has more than four axes, since some export formats allow no more than five.
    """
    batch, height, _, channels = qkv.shape
    x = qkv.reshape(batch, height // PATCH, PATCH, -1).swapaxes(1, 2)  # b ph nh (nw pw c)
    x = x.reshape(batch * PATCH, -1, PATCH, channels)  # (b ph) n pw c
    parts = (part.reshape(*x.shape[:2], PATCH * heads, -1) for part in jnp.split(x, 3, axis=-1))
    return tuple(part.swapaxes(1, 2) for part in parts)  # (b ph) (pw heads) n dh


def _merge_tokens(y: Float[Array, "bp hp n dh"], *, size: tuple) -> Float[Array, "b h w d"]:
    """The reverse of `_split_tokens` for one of its parts."""
    batch, height, _, _ = size
    y = y.swapaxes(1, 2).reshape(batch, PATCH, height // PATCH, -1)  # b ph nh (nw pw d)
    return y.swapaxes(1, 2).reshape(size)


def _dot_product_attention(
    query: Float[Array, "bp hp n dh"],
    key: Float[Array, "bp hp m dh"],
    value: Float[Array, "bp hp m dh"],
) -> tuple[Float[Array, "bp hp n dh"], Float[Array, "bp hp n m"]]:
    """Attended values, and the scores in float32."""
    query = query * query.shape[-1] ** -0.5
    products = jnp.einsum("bhnc,bhmc->bhnm", query, key, preferred_element_type=jnp.float32)
    scores = jax.nn.softmax(products, axis=-1)
    return jnp.einsum("bhnm,bhmc->bhnc", scores.astype(value.dtype), value), scores


def _sow_scores(module: nn.Module, scores: Float[Array, "bp hp n m"], *, heads: int) -> None:
    if not module.is_initializing():  # then every collection is mutable
        scores = scores.reshape(-1, PATCH * PATCH, heads, *scores.shape[2:])  # b p heads n m
        module.sow("attention", "scores", scores)


class Kind(NamedTuple):
    """A module and the fields of its own."""

    module: type[nn.Module]
    fields: tuple[str, ...]


ATTENTIONS: Mapping[str, Kind] = {
    "separable": Kind(SeparableSelfAttention, ()),
    "multihead": Kind(MultiHeadSelfAttention, ("heads",)),
    "linformer": Kind(LinformerSelfAttention, ("heads", "latents")),
}


def kind(name: str, *, heads: int, latents: int) -> Callable[..., nn.Module]:
    """Constructor of the attention that `name` names, with the fields bound that this kind has.

    It takes weight_init, dtype and the module's name. Raises ValueError for an unknown kind.
    """
    if name not in ATTENTIONS:
        raise ValueError(f"attention is {name!r}; use one of {', '.join(ATTENTIONS)}")
    module, fields = ATTENTIONS[name]
    given = {"heads": heads, "latents": latents}
    return functools.partial(module, **{field: given[field] for field in fields})
