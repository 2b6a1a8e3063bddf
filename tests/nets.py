"""Networks small enough that a test compiles them in a second."""

import flax.linen as nn
import jax.numpy as jnp

from mobilevit_jax.data.transforms import InputSpec

SPEC = InputSpec(
    size=(8, 8),
    resize=8,
    interpolation="bilinear",
    channel_order="rgb",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)


class Tiny(nn.Module):
    """Convolution, batch norm, dropout, classifier: one of each kind of state."""

    num_classes: int = 3
    dropout: float = 0.0
    norm: bool = True

    @nn.compact
    def __call__(self, image, *, train=False):
        # A bias ahead of the norm has no gradient but rounding noise, which Adam would blow up.
        x = nn.Conv(8, (3, 3), strides=2, use_bias=not self.norm, name="stem")(image)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        x = nn.relu(x).mean(axis=(1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return {"logits": nn.Dense(self.num_classes, name="head")(x).astype(jnp.float32)}
