"""Pillow's resizing, bit for bit, in a fraction of its time where there is a compiler.

Evaluation and the recipes of timm resize with Pillow's filters, and published weights were made
with their very pixels. resample.c computes the same ones with the vectors of the processor; where
it cannot be compiled, and for other filters, Pillow does.
"""

import ctypes
import functools
import logging
import pathlib
import platform
import threading
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mobilevit_jax import native

SOURCE = pathlib.Path(__file__).with_name("resample.c")
# How many pixels of the coarser grid each filter reaches to either side.
REACH = {
    Image.Resampling.BILINEAR: 1,
    Image.Resampling.BICUBIC: 2,
    Image.Resampling.LANCZOS: 3,
}
_one_at_a_time = threading.Lock()


class Library(NamedTuple):
    """The compiled function, or the reason why there is none."""

    resample: Any = None
    reason: str = ""


def library() -> Library:
    """The function, compiled where this machine has not done so yet."""
    with _one_at_a_time:  # threads of a pipeline come together
        return _library()


@functools.cache
def _library() -> Library:
    if platform.machine() not in ("x86_64", "AMD64"):
        return Library(reason="by Pillow: ours is for x86-64")
    # Fused products and sums would round the weights otherwise than Pillow does.
    flags = ["-O3", "-march=native", "-ffp-contract=off", "-lm"]
    try:
        resample = ctypes.CDLL(str(native.compiled(SOURCE, flags))).resample
    except (native.BuildError, OSError) as error:
        logging.getLogger(__name__).warning("Pillow resizes the images, slower: %s", error)
        return Library(reason=str(error))
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    box = ctypes.POINTER(ctypes.c_float)
    resample.argtypes = [pointer, long, long, long, box, ctypes.c_int, pointer, long, long]
    return Library(resample)


def resize(
    pixels: UInt8[np.ndarray, "h w 3"],
    height: int,
    width: int,
    filtering: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> UInt8[np.ndarray, "oh ow 3"]:
    """What Pillow's `Image.resize` makes of a picture, horizontally first.

    That is how all its releases did it until 12, and so how the published weights were trained and
    evaluated; 13 takes whichever order is less work, which changes pixels of some tall images (by
    rounding, and with bicubic by up to 23 levels next to hard edges: measured).

    Args:
      pixels: RGB.
      height: of the result.
      width: of the result.
      filtering: Pillow's filter.
      box: left, top, right and bottom of the part to resize, in pixels of the picture; pixels
        around it are looked at.
    """
    left, top, right, bottom = box or (0, 0, pixels.shape[1], pixels.shape[0])
    resample = library().resample
    if resample is None or filtering not in REACH:
        image = Image.fromarray(pixels)
        if filtering in REACH:
            image = image.resize((width, image.height), filtering, (left, 0, right, image.height))
            left, right = 0, width
        return np.asarray(image.resize((width, height), filtering, (left, top, right, bottom)))
    if pixels.strides[1:] != (3, 1) or pixels.strides[0] < 0:
        pixels = np.ascontiguousarray(pixels)
    out = np.empty((height, width, 3), np.uint8)
    if not resample(
        pixels.ctypes.data,
        pixels.strides[0],
        pixels.shape[0],
        pixels.shape[1],
        (ctypes.c_float * 4)(left, top, right, bottom),
        REACH[filtering],
        out.ctypes.data,
        height,
        width,
    ):
        raise MemoryError("no memory to resize a picture")
    return out
