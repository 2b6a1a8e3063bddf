"""Mixup, cutmix and random erasing: a training batch on the device in, a training batch out.

They work on the normalised image inside the train step, over the whole global batch, with static
shapes: random choices become weights of one pass over the pixels, which XLA fuses with the
normalisation, so a batch that is left alone costs what a mixed one does. Mind before editing: XLA
computes anew, for every pixel, whatever it fuses into that pass (`_boxes` says what prevents it).

A mixed batch has two more keys, each per example: `partner`, the label of the image that was mixed
in, and `share`, how much of the target the example's own label keeps.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mobilevit_jax.tasks.task import Batch


def mix(batch: Batch, rng: jax.Array, *, mixup: float, cutmix: float, probability: float) -> Batch:
    """Mixes every image with the one before it in the batch, the first with the last.

    One share for the whole batch, of Beta(alpha, alpha). Mixup (arXiv 1710.09412) adds the images,
    cutmix (arXiv 1905.04899) puts a box of the other image over the own one. Where both are asked
    for, a batch gets either with equal chance. The rules are those of torchvision's training
    references, which CVNets took over; there a batch, with its one share, is that of one device.

    Args:
        batch: `image` float [b, h, w, c], `label` int [b], `mask` bool [b].
        rng: for all choices.
        mixup: alpha of mixup; 0 for none. Small ones give shares near 0 and 1.
        cutmix: alpha of cutmix; 0 for none, if mixup is on. 1 draws the share evenly.
        probability: chance that a batch is mixed at all.

    Returns:
        The batch with its images mixed, and with `partner` and `share`. Padding rows are not mixed
        into others.
    """
    _, height, width, _ = batch["image"].shape
    rng_any, rng_which, rng_share, rng_center = jax.random.split(rng, 4)
    # Equal chances if both are on, else the one that is: 0 or 1 of a draw from [0, 1) is certain.
    chance_of_cutmix = (cutmix > 0) / ((mixup > 0) + (cutmix > 0))
    is_cutmix = jax.random.uniform(rng_which) < chance_of_cutmix
    alpha = jnp.where(is_cutmix, cutmix or 1.0, mixup or 1.0)
    share = _symmetric_beta(rng_share, alpha)
    # A share of 1 leaves a batch as it is, in both.
    share = jnp.where(jax.random.uniform(rng_any) < probability, share, 1.0)
    center = jax.random.randint(rng_center, (2,), 0, np.array([height, width]))
    own, share_of_cutmix = cut(share, center, size=(height, width))
    weight = jnp.where(is_cutmix, own.astype(jnp.float32), share)  # h w
    return blend(batch, weight, jnp.where(is_cutmix, share_of_cutmix, share))


def _symmetric_beta(rng: jax.Array, alpha: Float[Array, ""]) -> Float[Array, ""]:
    """A draw from Beta(alpha, alpha), for any alpha above 0.

    In closed form (R. W. Bailey, Polar generation of random variates with the t-distribution, 1994;
    a t of 2 alpha degrees of freedom makes a symmetric beta). jax.random.beta draws until it
    accepts, and compiles for seconds.
    """
    radius, angle = jax.random.uniform(rng, (2,))
    # Of 1 - radius, which is never 0. It may still overflow, to an infinity that gives 0 or 1.
    square = jnp.expm1(-jnp.log1p(-radius) / alpha)
    cosine = jnp.cos(2 * np.pi * angle)
    return 0.5 + 0.5 * jnp.sign(cosine) / jnp.sqrt(1.0 + 1.0 / (square * cosine**2))


def cut(
    share: Float[Array, ""], center: Int[Array, "2"], *, size: tuple[int, int]
) -> tuple[Bool[Array, "h w"], Float[Array, ""]]:
    """Where cutmix keeps an image of `size` (h, w), and the share of the pixels that it keeps.

    Args:
        share: of the pixels, to keep if the box lay inside the image; it is clipped at the edges.
        center: row and column of the box's centre.
        size: height and width.
    """
    extent = jnp.asarray(size)
    half = jnp.floor(0.5 * jnp.sqrt(1.0 - share) * extent).astype(jnp.int32)
    low, high = jnp.maximum(center - half, 0), jnp.minimum(center + half, extent)
    kept = 1.0 - jnp.prod(high - low) / (size[0] * size[1])
    return ~_inside(jnp.concatenate([low, high])[None], size)[0], kept


def blend(batch: Batch, weight: Float[Array, "h w"], share: Float[Array, ""]) -> Batch:
    """Mixes each example with the one before it.

    Args:
        batch: `image` float [b, h, w, c], `label`, `mask`.
        weight: of an image's own pixels; those of the other have one less this.
        share: of an example's own label in its target.
    """
    image, mask = batch["image"], batch["mask"]
    # What padding rows hold is no image.
    both = mask & jnp.roll(mask, 1)
    weights = jnp.where(both[:, None, None], weight, 1.0)[..., None]  # b h w 1
    return batch | {
        "image": weights * image + (1.0 - weights) * jnp.roll(image, 1, axis=0),
        "partner": jnp.roll(batch["label"], 1),
        "share": jnp.where(both, share, 1.0),
    }


def random_erasing(
    image: Float[Array, "b h w c"],
    rng: jax.Array,
    *,
    probability: float,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    attempts: int = 10,
) -> Float[Array, "b h w c"]:
    """Sets a box of some images to 0, by torchvision's rule (arXiv 1708.04896).

    The value is that of the tensor, as in torchvision and timm: black for networks that take pixels
    from 0 to 1, the mean colour for those that subtract it.

    Args:
        image: normalised.
        rng: for all choices.
        probability: that an image is erased.
        scale: smallest and largest share of the image's area, drawn evenly.
        ratio: smallest and largest height over width, drawn evenly on a log scale.
        attempts: how often a box is drawn until one is lower and narrower than the image; if none
            is, the image stays whole.
    """
    count, height, width, _ = image.shape
    size = (height, width)
    rng_box, rng_chosen = jax.random.split(rng)
    chosen = jax.random.uniform(rng_chosen, (count,)) < probability
    boxes = _boxes(rng_box, chosen, size=size, scale=scale, ratio=ratio, attempts=attempts)
    return jnp.where(_inside(boxes, size)[..., None], 0.0, image)


def _boxes(
    rng: jax.Array,
    chosen: Bool[Array, " b"],
    *,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    attempts: int,
) -> Int[Array, "b 4"]:
    """Top, left, bottom, right (exclusive) for each chosen row; an empty box for the others."""
    area, aspect, top, left = jnp.moveaxis(
        jax.random.uniform(rng, (len(chosen), attempts, 4)), -1, 0
    )  # each b attempts
    area = (scale[0] + area * (scale[1] - scale[0])) * (size[0] * size[1])
    aspect = jnp.exp(np.log(ratio[0]) + aspect * np.log(ratio[1] / ratio[0]))
    height, width = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (height < size[0]) & (width < size[1])
    # Whole pixels from 0 to what the box leaves, each as likely.
    top = jnp.floor(top * (size[0] - height + 1))
    left = jnp.floor(left * (size[1] - width + 1))
    boxes = jnp.stack([top, left, top + height, left + width], axis=-1)  # b attempts 4
    boxes = jnp.where((fits & chosen[:, None])[..., None], boxes, 0.0).astype(jnp.int32)
    # This comes last, though choosing first would be less to compute: a gather's result is stored,
    # and all that came after it would be fused into the pass over the pixels (8 times slower).
    first = jnp.argmax(fits, axis=1)
    return jnp.take_along_axis(boxes, first[:, None, None], axis=1)[:, 0]


def _inside(boxes: Int[Array, "b 4"], size: tuple[int, int]) -> Bool[Array, "b h w"]:
    """Where the pixels of images of `size` (h, w) lie in top, left, bottom, right (exclusive)."""
    top, left, bottom, right = jnp.moveaxis(boxes[:, :, None], 1, 0)  # each b 1
    row, column = jnp.arange(size[0]), jnp.arange(size[1])
    rows = (row >= top) & (row < bottom)  # b h
    columns = (column >= left) & (column < right)  # b w
    return rows[:, :, None] & columns[:, None, :]
