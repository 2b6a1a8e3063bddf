"""The loss that keeps learned augmentation as strong as it should be, on top of any task's own.

Source: RangeAugment (arXiv 2212.10553), section 3, and cvnets 0.4 (loss neural_augmentation).
"""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mobilevit_jax.schedule import Curve, EpochStarts, by_epoch, half_cosine
from mobilevit_jax.tasks.task import Batch, Outputs, Task, masked_mean

WHITE = 255.0  # images are compared in these units
SCALE = 100.0 / WHITE**2  # of the loss, in cvnets


def mse(psnr: float) -> float:
    """Mean squared error, for pixels of 0..255, at a peak signal-to-noise ratio in dB."""
    return WHITE**2 / 10.0 ** (psnr / 10.0)


def target_mse(psnr: tuple[float, ...], *, epoch_starts: EpochStarts) -> Curve:
    """The error to aim at by step: from that of the first ratio to that of the second, by epoch.

    In epoch e of E the error, not the ratio, is that of half a cosine at e / (E + 1).

    Args:
        psnr: in dB, at the start and in the end.
        epoch_starts: first step of each of the E epochs.

    Raises:
        ValueError: not two ratios, or a negative one.
    """
    if len(psnr) != 2 or not min(psnr) >= 0:
        raise ValueError(f"psnr is {psnr}; it must be two ratios in dB, such as (40.0, 30.0)")
    start, end = map(mse, psnr)
    epochs = len(epoch_starts)
    targets = [half_cosine(start, end, epoch / (epochs + 1)) for epoch in range(epochs)]
    return by_epoch(targets, epoch_starts=epoch_starts)


def augmentation_loss(
    image: Float[Array, "b h w c"],
    augmented: Float[Array, "b h w c"],
    target: Float[Array, " b"],
) -> Float[Array, " b"]:
    """How far each image's change is from the target, by 100/65025 of PyTorch's smooth L1.

    Args:
        image: pixels of 0..1.
        augmented: the same images, changed.
        target: mean squared error to have, for pixels of 0..255.
    """
    changed = jnp.mean(jnp.square(WHITE * (augmented - image)), axis=(1, 2, 3))
    return SCALE * optax.losses.huber_loss(changed, target)


def with_augmentation_loss(task: Task, *, target: Curve, weight: float) -> Task:
    """The task with the augmentation's loss added to its own in training.

    Args:
        task: what is learned.
        target: mean squared error to aim at, by step.
        weight: of the augmentation's loss.

    Raises:
        ValueError: a negative weight.
    """
    if not weight >= 0:
        raise ValueError(f"weight is {weight}; it must be at least 0")

    def loss(outputs: Outputs, batch: Batch) -> Float[Array, ""]:
        each = augmentation_loss(batch["image"], outputs["augmented_image"], target(batch["step"]))
        return task.loss(outputs, batch) + weight * masked_mean(each, batch["mask"])

    return task._replace(loss=loss)
