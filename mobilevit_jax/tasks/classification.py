"""Single-label classification: cross-entropy with label smoothing, top-1 and top-5 accuracy."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from mobilevit_jax.tasks.task import Batch, Outputs, Task


def cross_entropy(
    logits: Float[Array, "b k"], label: Int[Array, " b"], *, smoothing: float = 0.0
) -> Float[Array, " b"]:
    """Cross-entropy of each example in nats, float32.

    Label smoothing spreads `smoothing` evenly over all k classes (arXiv 1512.00567, section 7).
    """
    target = jax.nn.one_hot(label, logits.shape[-1], dtype=jnp.float32)
    target = optax.smooth_labels(target, smoothing)
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), target)


def hits(logits: Float[Array, "b k"], label: Int[Array, " b"], *, top: int) -> Float[Array, " b"]:
    """1.0 where the label is among the `top` largest logits, else 0.0.

    Logits equal to the label's count against it, so a constant output scores nothing; so do NaNs.
    """
    own = jnp.take_along_axis(logits, label[:, None], axis=-1)  # b 1
    rivals = jnp.sum(~(logits < own), axis=-1) - 1  # the label itself is one of them
    return (rivals < top).astype(jnp.float32)


def classification(*, label_smoothing: float = 0.0) -> Task:
    """Builds the task; smoothing applies to the training loss only.

    Raises:
        ValueError: smoothing outside [0, 1).
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 1")

    def mix(batch: Batch, rng: jax.Array) -> Batch:
        del rng
        return batch

    def loss(outputs: Outputs, batch: Batch) -> Float[Array, ""]:
        each = cross_entropy(outputs["logits"], batch["label"], smoothing=label_smoothing)
        mask = batch["mask"].astype(jnp.float32)
        return jnp.sum(each * mask) / jnp.maximum(jnp.sum(mask), 1.0)

    def sums(outputs: Outputs, batch: Batch) -> dict[str, Float[Array, ""]]:
        logits, label = outputs["logits"], batch["label"]
        each = {
            "loss": cross_entropy(logits, label),
            "top1": hits(logits, label, top=1),
            "top5": hits(logits, label, top=5),
            "count": jnp.ones(label.shape, jnp.float32),
        }
        # Padding rows may hold anything, NaN included, so they are replaced and not multiplied.
        return {name: jnp.sum(jnp.where(batch["mask"], value, 0.0)) for name, value in each.items()}

    def summarize(totals: Mapping[str, np.ndarray | float]) -> dict[str, float]:
        count = float(totals["count"])
        return {name: float(totals[name]) / count for name in ("loss", "top1", "top5")}

    def predict(outputs: Outputs) -> dict[str, Array]:
        return {"probability": jax.nn.softmax(outputs["logits"].astype(jnp.float32), axis=-1)}

    return Task(mix=mix, loss=loss, sums=sums, summarize=summarize, predict=predict)
