"""launch.py with one more network, which traces in a tenth of the time that the others take.

For tests of many processes. It is what a sweep started here starts its trials with.
"""

import pathlib
import sys

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import launch
from mobilevit_jax.models import zoo
from mobilevit_jax.models.layers import ConvNorm, Linear


class OneConv(nn.Module):
    """A convolution with its norm, dropout, and the classifier."""

    num_classes: int
    width: float = 1.0
    dropout: float = 0.0
    remat: tuple[str, ...] = ()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"], *, train: bool = False) -> dict[str, Array]:
        """Return `logits` (b, k)."""
        stem = ConvNorm(
            int(16 * self.width), stride=2, activation=nn.relu, dtype=self.dtype, name="stem"
        )
        x = stem(image, train=train).mean(axis=(1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return {"logits": Linear(self.num_classes, dtype=self.dtype, name="head")(x)}


FAMILIES = {**zoo.FAMILIES, "one_conv": OneConv}

if __name__ == "__main__":
    zoo.FAMILIES = FAMILIES
    launch.__file__ = __file__
    sys.exit(launch.main(sys.argv[1:]))
