"""Augmentation policies on uint8 RGB images: RandAugment, TrivialAugment and AutoAugment.

Operations, ranges and policies are torchvision's (0.29, transforms/autoaugment.py), and so are the
pixels of its PIL path, to one level inside the picture; along its edges a warp differs (see
`_Canvas`). A policy first draws its operations, always with the same number of random numbers, and
hands them to `apply`. That puts them off as long as it can: consecutive look-up tables become one,
consecutive warps become one, and the image is gone through once for each.

A policy may return its input, never writes into it, keeps nothing between calls and can be
pickled. Sizes are (h, w); coordinates are (x, y), with pixel centres at whole numbers.
"""

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

Policy = Callable[[UInt8[np.ndarray, "h w 3"], np.random.Generator], UInt8[np.ndarray, "h w 3"]]

INTERPOLATIONS = {"bilinear": cv2.INTER_LINEAR, "nearest": cv2.INTER_NEAREST}
# Pillow cuts fractions off when it mixes images, OpenCV rounds them. Not quite a half, so that a
# whole number which comes out a rounding error too small keeps its value.
TRUNCATE = -0.4995
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13  # Pillow's filter of this name
LEVELS = np.arange(256)


class _Scratch(threading.local):
    """Memory of one thread: fresh pages would cost as much as the warp that writes to them."""

    flat = np.empty(0, np.uint8)

    def two(self, height: int, width: int) -> UInt8[np.ndarray, "2 h w 4"]:
        """Two RGBA images of any content; the next call gives out the same memory again."""
        size = 2 * height * width * 4
        if self.flat.size < size:
            self.flat = np.empty(size, np.uint8)
        return self.flat[:size].reshape(2, height, width, 4)


_SCRATCH = _Scratch()


class _Canvas:
    """An image, and either a look-up table or a warp that is still to be applied to it.

    Two warps made one interpolate once where torchvision does twice, so the result is sharper. Half
    a pixel along the edges of the picture is blended with the fill, which Pillow cuts off hard.
    """

    def __init__(self, image: UInt8[np.ndarray, "h w 3"], interpolation: int, fill: int):
        self.image = np.ascontiguousarray(image)
        self.interpolation = interpolation
        self.fill = fill
        self.table: np.ndarray | None = None  # [256] for all channels, or [256, 3]
        self.to_source: np.ndarray | None = None  # [3, 3], from a place in the result to its source
        self.frames: list[np.ndarray] = []  # [4, 2], corners of what earlier warps kept in sight

    def look_up(self, table: UInt8[np.ndarray, "256 *c"]) -> None:
        """Level i becomes table[i], or table[i, c] in channel c."""
        if self.to_source is not None:
            self._warp_now()
        if self.table is None:
            self.table = table
        elif table.ndim == 1 or self.table.ndim == 1:
            self.table = table[self.table]
        else:
            self.table = np.take_along_axis(table, self.table.astype(np.intp), axis=0)

    def warp(self, to_source: Float[np.ndarray, "3 3"]) -> None:
        """The pixel at p = (x, y, 1) is taken from to_source @ p, or is fill outside the image."""
        if self.table is not None:
            self._look_up_now()
        if self.to_source is None:
            self.to_source = to_source
            return
        # What one warp has pushed out of sight must not come back with the next.
        height, width = self.image.shape[:2]
        corners = np.array([[-1, -1, 1], [width, -1, 1], [width, height, 1], [-1, height, 1]])
        self.frames.append((corners @ self.to_source.T)[:, :2])
        self.to_source = self.to_source @ to_source

    def pixels(self) -> UInt8[np.ndarray, "h w 3"]:
        """The image with everything applied. It may be the policy's input: do not write to it."""
        if self.table is not None:
            self._look_up_now()
        if self.to_source is not None:
            self._warp_now()
        return self.image

    def histogram(self) -> Int[np.ndarray, "256 3"]:
        """How often each level occurs once everything is applied."""
        if self.to_source is not None:
            self._warp_now()
        counts = [cv2.calcHist([self.image], [c], None, [256], [0, 256]) for c in range(3)]
        if self.table is not None:
            table = np.broadcast_to(self.table.reshape(256, -1), (256, 3))
            counts = [np.bincount(table[:, c], counts[c].ravel(), 256) for c in range(3)]
        return np.stack([count.ravel() for count in counts], axis=1).astype(np.int64)

    def _look_up_now(self) -> None:
        assert self.table is not None
        table = self.table if self.table.ndim == 1 else np.ascontiguousarray(self.table)[None]
        self.image, self.table = cv2.LUT(self.image, table), None

    def _warp_now(self) -> None:
        assert self.to_source is not None
        height, width = self.image.shape[:2]
        matrix, self.to_source = self.to_source, None
        frames, self.frames = self.frames, []
        x, y = matrix[:2, 2].tolist()
        if matrix[:2, :2].tolist() == [[1, 0], [0, 1]] and x.is_integer() and y.is_integer():
            source = _fill_outside(self.image.copy(), frames, self.fill) if frames else self.image
            self.image = _shifted(source, int(x), int(y), self.fill)
            return
        # Four channels, conversions included, take half the time of three; the result is equal.
        source, warped = _SCRATCH.two(height, width)
        cv2.cvtColor(self.image, cv2.COLOR_RGB2RGBA, dst=source)
        cv2.warpAffine(
            _fill_outside(source, frames, self.fill),
            matrix[:2],
            (width, height),
            dst=warped,
            flags=self.interpolation | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=(self.fill,) * 4,
        )
        self.image = cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB)


def _fill_outside(
    image: UInt8[np.ndarray, "h w c"], frames: Sequence[np.ndarray], fill: int
) -> UInt8[np.ndarray, "h w c"]:
    """Fills, in place, what is not inside all of the frames."""
    height, width = image.shape[:2]
    far = np.array([[-2, -2], [width + 1, -2], [width + 1, height + 1], [-2, height + 1]])
    for corners in frames:  # the far border makes each a polygon with a hole
        polygon = np.rint(np.stack([far, corners]) * 256).astype(np.int32)
        cv2.fillPoly(image, list(polygon), (fill,) * 4, shift=8)
    return image


def _shifted(
    image: UInt8[np.ndarray, "h w 3"], x: int, y: int, fill: int
) -> UInt8[np.ndarray, "h w 3"]:
    """The image with what was at (x, y) at (0, 0)."""
    height, width = image.shape[:2]
    x, y = max(-width, min(x, width)), max(-height, min(y, height))
    out = np.full_like(image, fill)
    out[max(-y, 0) : height - max(y, 0), max(-x, 0) : width - max(x, 0)] = image[
        max(y, 0) : height - max(-y, 0), max(x, 0) : width - max(-x, 0)
    ]
    return out


# The operations. Each takes a magnitude in the units of its row in the tables below.


def _identity(canvas: _Canvas, _: float) -> None:
    pass


def _shear_x(canvas: _Canvas, slope: float) -> None:
    # About the picture's upper left corner, half a pixel from the first pixel's centre.
    canvas.warp(np.array([[1, slope, slope / 2], [0, 1, 0], [0, 0, 1]]))


def _shear_y(canvas: _Canvas, slope: float) -> None:
    canvas.warp(np.array([[1, 0, 0], [slope, 1, slope / 2], [0, 0, 1]]))


def _translate_x(canvas: _Canvas, pixels: float) -> None:
    canvas.warp(np.array([[1.0, 0, -int(pixels)], [0, 1, 0], [0, 0, 1]]))


def _translate_y(canvas: _Canvas, pixels: float) -> None:
    canvas.warp(np.array([[1.0, 0, 0], [0, 1, -int(pixels)], [0, 0, 1]]))


def _translate_x_share(canvas: _Canvas, share: float) -> None:
    _translate_x(canvas, share * canvas.image.shape[1])


def _translate_y_share(canvas: _Canvas, share: float) -> None:
    _translate_y(canvas, share * canvas.image.shape[0])


def _rotate(canvas: _Canvas, degrees: float) -> None:
    # Counter-clockwise about the centre.
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y, x = (canvas.image.shape[0] - 1) / 2, (canvas.image.shape[1] - 1) / 2
    canvas.warp(
        np.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y], [0, 0, 1]])
    )


def _brightness(canvas: _Canvas, change: float) -> None:
    canvas.look_up(_mix_table(0, 1 + change))


def _contrast(canvas: _Canvas, change: float) -> None:
    # Pillow's grey, because OpenCV's differs in a few pixels and the mean is rounded.
    grey = np.asarray(Image.fromarray(canvas.pixels()).convert("L"))
    canvas.look_up(_mix_table(int(cv2.sumElems(grey)[0] / grey.size + 0.5), 1 + change))


def _color(canvas: _Canvas, change: float) -> None:
    image, factor = canvas.pixels(), 1 + change
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    canvas.image = cv2.addWeighted(image, factor, grey, 1 - factor, TRUNCATE)


def _sharpness(canvas: _Canvas, change: float) -> None:
    image, factor = canvas.pixels(), 1 + change
    out = cv2.addWeighted(image, factor, cv2.filter2D(image, -1, SMOOTH), 1 - factor, TRUNCATE)
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):  # Pillow has no SMOOTH there
        out[edge] = image[edge]
    canvas.image = out


def _posterize(canvas: _Canvas, bits: float) -> None:
    canvas.look_up((LEVELS & ~(2 ** (8 - round(bits)) - 1)).astype(np.uint8))


def _solarize(canvas: _Canvas, threshold: float) -> None:
    canvas.look_up(np.where(threshold > LEVELS, LEVELS, 255 - LEVELS).astype(np.uint8))


def _invert(canvas: _Canvas, _: float) -> None:
    canvas.look_up((255 - LEVELS).astype(np.uint8))


def _auto_contrast(canvas: _Canvas, _: float) -> None:
    occurs = canvas.histogram() > 0
    low, high = occurs.argmax(axis=0), 255 - occurs[::-1].argmax(axis=0)
    scale = 255 / np.maximum(high - low, 1)
    table = np.where(low < high, LEVELS[:, None] * scale - low * scale, LEVELS[:, None])
    canvas.look_up(table.clip(0, 255).astype(np.uint8))


def _equalize(canvas: _Canvas, _: float) -> None:
    counts = canvas.histogram()
    brightest = 255 - (counts[::-1] > 0).argmax(axis=0)
    step = (counts.sum(axis=0) - counts[brightest, np.arange(3)]) // 255
    below = counts.cumsum(axis=0) - counts
    table = np.where(step > 0, (step // 2 + below) // np.maximum(step, 1), LEVELS[:, None])
    canvas.look_up(np.minimum(table, 255).astype(np.uint8))


def _mix_table(grey: int, factor: float) -> UInt8[np.ndarray, "256"]:
    """Pillow's blend of a level with grey, in single precision as there."""
    levels = LEVELS.astype(np.float32)
    return (grey + np.float32(factor) * (levels - grey)).clip(0, 255).astype(np.uint8)


class Op(NamedTuple):
    """An operation with its magnitudes, evenly spaced from the first bin to the last."""

    apply: Callable[[_Canvas, float], None]
    first: float = 0.0
    last: float = 0.0
    signed: bool = False  # the magnitude is negated at random

    def magnitude(self, index: int, *, bins: int, negative: bool) -> float:
        """The magnitude at a bin, negated if it is asked for and this operation has a sign."""
        value = self.first + (self.last - self.first) * index / (bins - 1)
        return -value if self.signed and negative else value


# torchvision's RandAugment, 31 bins (RandAugment, arXiv 1909.13719; translations from AutoAugment).
RAND_AUGMENT = {
    "identity": Op(_identity),
    "shear_x": Op(_shear_x, 0.0, 0.3, True),  # slope
    "shear_y": Op(_shear_y, 0.0, 0.3, True),
    "translate_x": Op(_translate_x_share, 0.0, 150 / 331, True),  # share of the width
    "translate_y": Op(_translate_y_share, 0.0, 150 / 331, True),  # of the height
    "rotate": Op(_rotate, 0.0, 30.0, True),  # degrees
    "brightness": Op(_brightness, 0.0, 0.9, True),  # factor - 1, also in the next three
    "color": Op(_color, 0.0, 0.9, True),
    "contrast": Op(_contrast, 0.0, 0.9, True),
    "sharpness": Op(_sharpness, 0.0, 0.9, True),
    "posterize": Op(_posterize, 8.0, 4.0),  # bits, rounded
    "solarize": Op(_solarize, 255.0, 0.0),  # the darkest level that is inverted
    "auto_contrast": Op(_auto_contrast),
    "equalize": Op(_equalize),
}
# torchvision's TrivialAugmentWide, 31 bins (arXiv 2103.10158, table 1).
TRIVIAL_AUGMENT = {
    "identity": Op(_identity),
    "shear_x": Op(_shear_x, 0.0, 0.99, True),
    "shear_y": Op(_shear_y, 0.0, 0.99, True),
    "translate_x": Op(_translate_x, 0.0, 32.0, True),  # pixels
    "translate_y": Op(_translate_y, 0.0, 32.0, True),
    "rotate": Op(_rotate, 0.0, 135.0, True),
    "brightness": Op(_brightness, 0.0, 0.99, True),
    "color": Op(_color, 0.0, 0.99, True),
    "contrast": Op(_contrast, 0.0, 0.99, True),
    "sharpness": Op(_sharpness, 0.0, 0.99, True),
    "posterize": Op(_posterize, 8.0, 2.0),
    "solarize": Op(_solarize, 255.0, 0.0),
    "auto_contrast": Op(_auto_contrast),
    "equalize": Op(_equalize),
}
# torchvision's AutoAugment has RandAugment's ranges in 10 bins, and one operation more.
AUTO_AUGMENT = {**RAND_AUGMENT, "invert": Op(_invert)}
# (name, probability, bin) twice: the ImageNet policy (AutoAugment, arXiv 1805.09501, table 9).
IMAGENET = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("auto_contrast", 0.6, 0)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 0)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
    (("equalize", 0.0, 0), ("equalize", 0.8, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 0)),
    (("color", 0.4, 0), ("equalize", 0.6, 0)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("auto_contrast", 0.6, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
)

Step = tuple[Op, float]  # an operation and its magnitude, sign included


def apply(
    image: UInt8[np.ndarray, "h w 3"],
    steps: Sequence[Step],
    *,
    interpolation: str = "bilinear",
    fill: int = 0,
) -> UInt8[np.ndarray, "h w 3"]:
    """The image after the steps, in their order. Interpolation and fill concern the warps."""
    canvas = _Canvas(image, INTERPOLATIONS[interpolation], fill)
    for op, magnitude in steps:
        op.apply(canvas, magnitude)
    return canvas.pixels()


def draw_rand_augment(rng: np.random.Generator, *, num_ops: int, magnitude: int) -> list[Step]:
    """What `rand_augment` does next; takes 2 * num_ops random numbers."""
    ops = tuple(RAND_AUGMENT.values())
    steps = []
    for choice, side in rng.random((num_ops, 2)).tolist():
        op = ops[int(choice * len(ops))]
        steps.append((op, op.magnitude(magnitude, bins=31, negative=side < 0.5)))
    return steps


def draw_trivial_augment(rng: np.random.Generator) -> list[Step]:
    """What `trivial_augment` does next; takes 3 random numbers."""
    ops = tuple(TRIVIAL_AUGMENT.values())
    choice, share, side = rng.random(3).tolist()
    op = ops[int(choice * len(ops))]
    return [(op, op.magnitude(int(share * 31), bins=31, negative=side < 0.5))]


def draw_auto_augment(rng: np.random.Generator) -> list[Step]:
    """What `auto_augment` does next; takes 5 random numbers."""
    choice, *rest = rng.random(5).tolist()
    steps = []
    pair = IMAGENET[int(choice * len(IMAGENET))]
    for (name, probability, index), chance, side in zip(pair, rest[:2], rest[2:], strict=True):
        if chance < probability:
            op = AUTO_AUGMENT[name]
            steps.append((op, op.magnitude(index, bins=10, negative=side < 0.5)))
    return steps


def no_augment() -> None:
    """Leaves every image as it is, at no cost: there is no policy."""


def rand_augment(
    *, num_ops: int = 2, magnitude: int = 9, interpolation: str = "bilinear", fill: int = 0
) -> Policy:
    """RandAugment (arXiv 1909.13719): operations drawn evenly from 14, all at one magnitude.

    Args:
      num_ops: how many, 1 to 16; the same may come again.
      magnitude: 0 to 30, a bin of the ranges in `RAND_AUGMENT`.
      interpolation: bilinear or nearest.
      fill: the grey level, 0 to 255, of what a warp brings in from outside.

    Raises:
      ValueError: a value is not allowed.
    """
    num_ops = _checked_int("num_ops", num_ops, 1, 16)
    magnitude = _checked_int("magnitude", magnitude, 0, 30)
    draw = functools.partial(draw_rand_augment, num_ops=num_ops, magnitude=magnitude)
    return _policy(draw, interpolation, fill)


def trivial_augment(*, interpolation: str = "bilinear", fill: int = 0) -> Policy:
    """TrivialAugmentWide (arXiv 2103.10158): one operation of 14, at any of 31 magnitudes.

    Arguments and errors as in `rand_augment`.
    """
    return _policy(draw_trivial_augment, interpolation, fill)


def auto_augment(*, interpolation: str = "bilinear", fill: int = 0) -> Policy:
    """AutoAugment (arXiv 1805.09501): one of the 25 pairs of operations learnt on ImageNet.

    Arguments and errors as in `rand_augment`.
    """
    return _policy(draw_auto_augment, interpolation, fill)


POLICIES: dict[str, Callable[..., Policy | None]] = {
    "none": no_augment,
    "rand_augment": rand_augment,
    "trivial_augment": trivial_augment,
    "auto_augment": auto_augment,
}


def _policy(
    draw: Callable[[np.random.Generator], list[Step]], interpolation: str, fill: int
) -> Policy:
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"interpolation is {interpolation!r}; allowed: {', '.join(INTERPOLATIONS)}"
        )
    fill = _checked_int("fill", fill, 0, 255)
    return functools.partial(_run, draw=draw, interpolation=interpolation, fill=fill)


def _run(
    image: UInt8[np.ndarray, "h w 3"],
    rng: np.random.Generator,
    *,
    draw: Callable[[np.random.Generator], list[Step]],
    interpolation: str,
    fill: int,
) -> UInt8[np.ndarray, "h w 3"]:
    return apply(image, draw(rng), interpolation=interpolation, fill=fill)


def _checked_int(name: str, value: int | float, low: int, high: int) -> int:
    if value not in range(low, high + 1):
        raise ValueError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")
    return int(value)
