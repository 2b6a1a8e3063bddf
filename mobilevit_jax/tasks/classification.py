"""Single-label classification: cross-entropy with label smoothing, top-1 and top-5 accuracy.

Training batches may be mixed and erased on the device (tasks/mixing.py); evaluation never is.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from mobilevit_jax.tasks import mixing
from mobilevit_jax.tasks.scores import reached
from mobilevit_jax.tasks.task import Batch, Outputs, Task, masked_mean


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
    own = jnp.take_along_axis(logits, label[:, None], axis=-1)[:, 0]  # b
    return reached(logits, own, label, top=top)


def classification(
    *,
    label_smoothing: float = 0.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    mix_probability: float = 0.5,
    random_erasing: float = 0.0,
    erasing_scale: tuple[float, float] = (0.02, 0.33),
    erasing_ratio: tuple[float, float] = (0.3, 3.3),
) -> Task:
    """Builds the task; all arguments are about training only, and mixing is off by default.

    Erasing works on the normalised image, as torchvision and timm do it, and before mixing.

    Args:
        label_smoothing: share of the target that is spread over all classes, after mixing.
        mixup: alpha of mixup, 0 for none; with cutmix too, a batch gets either with equal chance.
        cutmix: alpha of cutmix, 0 for none.
        mix_probability: that a batch is mixed; CVNets 0.2 and 0.3 have 0.5, its last version 1.
        random_erasing: probability that a box of an image is set to 0.
        erasing_scale: smallest and largest share of the image's area that the box covers.
        erasing_ratio: smallest and largest height over width of the box.

    Raises:
        ValueError: an argument out of range.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 1")
    for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
        if not 0.0 <= alpha < np.inf:
            raise ValueError(f"{name} is {alpha}; it must be 0 for none, or an alpha above 0")
    for name, chance in (("mix_probability", mix_probability), ("random_erasing", random_erasing)):
        if not 0.0 <= chance <= 1.0:
            raise ValueError(f"{name} is {chance}; it must be from 0 to 1")
    if len(erasing_scale) != 2 or not 0.0 < erasing_scale[0] <= erasing_scale[1] < 1.0:
        raise ValueError(
            f"erasing_scale is {erasing_scale}; it must be two numbers above 0 and below 1, "
            "the smaller one first"
        )
    if len(erasing_ratio) != 2 or not 0.0 < erasing_ratio[0] <= erasing_ratio[1] < np.inf:
        raise ValueError(
            f"erasing_ratio is {erasing_ratio}; it must be two numbers above 0, "
            "the smaller one first"
        )

    def mix(batch: Batch, rng: jax.Array) -> Batch:
        # Both always get their own: switching one on or off changes nothing of the other.
        rng_erase, rng_mix = jax.random.split(rng)
        if random_erasing:
            image = mixing.random_erasing(
                batch["image"],
                rng_erase,
                probability=random_erasing,
                scale=erasing_scale,
                ratio=erasing_ratio,
            )
            batch = batch | {"image": image}
        if mixup or cutmix:
            batch = mixing.mix(
                batch, rng_mix, mixup=mixup, cutmix=cutmix, probability=mix_probability
            )
        return batch

    def loss(outputs: Outputs, batch: Batch) -> Float[Array, ""]:
        logits = outputs["logits"]
        each = cross_entropy(logits, batch["label"], smoothing=label_smoothing)
        if "partner" in batch:
            # Cross-entropy is linear in the target, and smoothing is too.
            other = cross_entropy(logits, batch["partner"], smoothing=label_smoothing)
            each = batch["share"] * each + (1.0 - batch["share"]) * other
        return masked_mean(each, batch["mask"])

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
