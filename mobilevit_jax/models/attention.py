"""Attention over a map that is split into patches of 2x2 pixels.

Before editing: every module here takes a map `b h w d` with even h and w and returns one of the same shape, so that a
block can hold any of them. The four pixel positions inside a patch never mix here: each of them is a sequence of its own,
with one token per patch. The score map is sown into the collection "attention", which costs nothing unless it is mutable.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mobilevit_jax.models.layers import Conv, PointwiseWeights, pointwise_conv

PATCH = 2  # pixels along each side of a patch, in every published model


class SeparableSelfAttention(nn.Module):
    """One score per token instead of one per pair: linear in the number of tokens. (MobileViT v2 paper, section 3.1)

    `y = out(relu(v) * sum_n(softmax_n(q) * k))` with a query of one channel. The published code unfolds the map into
    tokens `b p n d` and folds it back; here the softmax and the sum run over the patch axes of a view of the map.
    Parameters: `qkv` (1x1, d -> 1 + 2d, in this order) and `out` (1x1, d -> d). Sows `scores` (b, h, w): the softmax,
    which adds up to one over the patches for every pixel position.
    """

    weight_init: str = "torch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """Mix the tokens of every pixel position."""
        batch, height, width, features = x.shape
        patches = (batch, height // PATCH, PATCH, width // PATCH)  # b nh ph nw; pw stays with d
        weights = PointwiseWeights(1 + 2 * features, weight_init=self.weight_init, name="qkv")
        kernels, biases = (jnp.split(w, (1, 1 + features), axis=-1) for w in weights(features))

        query = pointwise_conv(x, kernels[0].astype(self.dtype)) + biases[0].astype(self.dtype)
        query = query.reshape(*patches, PATCH).astype(jnp.float32)
        scores = jax.nn.softmax(query, axis=(1, 3))  # b nh ph nw pw
        scores = scores.reshape(batch, height, width)
        if not self.is_initializing():  # where every collection is mutable
            self.sow("attention", "scores", scores)

        # The keys are linear in the tokens and the scores add up to one, so the context is the key of the average
        # token: one per pixel position, where forming all keys would be a third of this layer's work.
        average = (x * scores[..., None]).reshape(*patches, -1).sum((1, 3))
        average = average.reshape(batch, PATCH * PATCH, features)
        context = pointwise_conv(average, kernels[1]) + biases[1]
        context = context.reshape(batch, 1, PATCH, 1, -1).astype(self.dtype)  # b 1 ph 1 (pw d)

        value = pointwise_conv(x, kernels[2].astype(self.dtype)) + biases[2].astype(self.dtype)
        y = nn.relu(value).reshape(*patches, -1) * context
        return Conv(
            features,
            kernel_size=1,
            use_bias=True,
            weight_init=self.weight_init,
            dtype=self.dtype,
            name="out",
        )(y.reshape(x.shape))
