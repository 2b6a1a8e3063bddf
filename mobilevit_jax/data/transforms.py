"""From a record to a uint8 picture of the asked size: decoding, the evaluation crop, random crops.

Everything is uint8 RGB on the host; scaling, normalisation and channel order are applied on the
device from the `InputSpec`. Resizing is Pillow's on uint8, antialiased, as torchvision and timm do
it on PIL images. A transform is a pure function of (record, generator, size); arguments are checked
when it is made. Sizes are (height, width), Pillow's are (width, height).
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mobilevit_jax.data.record import DataError, Record

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}
CHANNEL_ORDERS = ("rgb", "bgr")
# A fixed list, because Pillow would hand a PostScript file called x.jpg to Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
PIXEL_LIMIT = 89_478_485  # 256 MiB decoded; also where Pillow begins to suspect a bomb


class InputSpec(NamedTuple):
    """How a network wants its images. `evaluation` checks it, and carries out the first three.

    Pixels are divided by 255 before `mean` and `std`.
    """

    size: tuple[int, int]  # (h, w) of the centre crop
    resize: int  # the short side before the crop
    interpolation: str
    channel_order: str  # "rgb" or "bgr"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


Transform = Callable[[Record, np.random.Generator, tuple[int, int]], UInt8[np.ndarray, "h w 3"]]


def decode(record: Record) -> UInt8[np.ndarray, "h w 3"]:
    """The record's image in RGB. It may be a view of the record: do not write to it.

    Grey is repeated, a palette looked up, alpha dropped, CMYK converted, 16 bits scaled to 8; of an
    animation the first frame is taken. EXIF rotation is not applied, as in PIL, torchvision and TF.

    Raises:
      DataError: not an image, cut short, over `PIXEL_LIMIT` pixels, or of a kind without one
        obvious meaning in 8 bits (32-bit, floating point, Lab).
    """
    if isinstance(record.image, np.ndarray):
        grey = record.image.ndim == 2
        return np.repeat(record.image[:, :, None], 3, axis=2) if grey else record.image
    try:
        with Image.open(io.BytesIO(record.image), formats=FORMATS) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise Image.DecompressionBombError
            return _to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{record.name} has more than {PIXEL_LIMIT:,} pixels; make it smaller or delete it"
        ) from error
    except Exception as error:  # a broken file may raise anything inside Pillow, MemoryError too
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "unknown format" if record.image else "the file is empty"
        raise DataError(
            f"cannot decode {record.name} ({reason}); replace it by a whole "
            f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]} file, or delete it"
        ) from error


def _to_rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    if image.mode.startswith("I"):  # I;16 of several byte orders; a 16-bit PGM arrives as I
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels need more than 16 bits; convert it to 8 bits")
        grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; convert it to 8 bits")
    image.info.pop("transparency", None)  # else Pillow warns of what the conversion loses
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def evaluation(spec: InputSpec) -> Callable[[Record], UInt8[np.ndarray, "h w 3"]]:
    """The one exact evaluation transform: short side to `spec.resize`, then the centre `spec.size`.

    The long side becomes int(resize * long / short), truncated; an image whose short side fits is
    not resampled. The crop begins at ((H - h) // 2, (W - w) // 2), negative offsets padded with
    zeros (cvnets; Hugging Face's processor does the same; torchvision rounds the offset).

    Raises:
      ValueError: a value in `spec` is not allowed.
    """
    height, width = _checked_size("InputSpec.size", spec.size)
    short = _checked_int("InputSpec.resize", spec.resize, minimum=1)
    filtering = _resampling(spec.interpolation)
    if spec.channel_order not in CHANNEL_ORDERS:
        raise ValueError(
            f"InputSpec.channel_order is {spec.channel_order!r}; allowed: "
            f"{', '.join(CHANNEL_ORDERS)}"
        )
    if len(spec.mean) != 3 or len(spec.std) != 3 or min(spec.std) <= 0:
        raise ValueError(
            f"InputSpec.mean is {spec.mean} and std is {spec.std}; each needs three numbers, and "
            "those of std must be above 0"
        )

    def transform(record: Record) -> UInt8[np.ndarray, "h w 3"]:
        image = _decode_short(record, short, filtering)
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        if top < 0 or left < 0:
            out = np.zeros((height, width, 3), np.uint8)
            part = image[max(top, 0) : top + height, max(left, 0) : left + width]
            above, before = max(-top, 0), max(-left, 0)
            out[above : above + part.shape[0], before : before + part.shape[1]] = part
            return out
        return image[top : top + height, left : left + width]

    return transform


def random_resized_crop(
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bilinear",
    flip: bool = True,
) -> Transform:
    """Inception's crop by torchvision's rule (GoogLeNet, arXiv 1409.4842), then a mirror image.

    Ten times: draw an area (a share of the image's, uniform in `scale`) and an aspect ratio w / h
    (log-uniform in `ratio`), and take a place for it if it fits. Else the largest centre crop
    whose aspect ratio lies in `ratio`. The crop is cut out first and then resized, so nothing
    outside it leaks in (Pillow's resize(box=...) would let it).

    Args:
      scale: smallest and largest area, as shares in (0, 1].
      ratio: smallest and largest aspect ratio.
      interpolation: bilinear, bicubic, nearest or lanczos.
      flip: mirror left to right with probability 1/2.

    Raises:
      ValueError: a value out of range.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale is {scale}; it must be (low, high) with 0 < low <= high <= 1")
    if not 0 < ratio[0] <= ratio[1] < math.inf:
        raise ValueError(f"ratio is {ratio}; it must be (low, high) with 0 < low <= high")
    filtering = _resampling(interpolation)

    def transform(
        record: Record, rng: np.random.Generator, size: tuple[int, int]
    ) -> UInt8[np.ndarray, "h w 3"]:
        image = decode(record)
        top, left, height, width = _draw_box(image.shape[0], image.shape[1], scale, ratio, rng)
        image = _resize(image[top : top + height, left : left + width], size, filtering)
        return image[:, ::-1] if flip and rng.random() < 0.5 else image

    return transform


def pad_crop(
    *, resize: int, padding: int, interpolation: str = "bilinear", flip: bool = False
) -> Transform:
    """For small images (ResNet's CIFAR recipe, arXiv 1512.03385): a black border, a random crop.

    Args:
      resize: the short side before padding, in pixels.
      padding: width of the border on each side, in pixels.
      interpolation: bilinear, bicubic, nearest or lanczos.
      flip: mirror left to right with probability 1/2.

    Raises:
      ValueError: a value out of range; in use, an asked size larger than the padded image.
    """
    short = _checked_int("resize", resize, minimum=1)
    border = _checked_int("padding", padding, minimum=0)
    filtering = _resampling(interpolation)

    def transform(
        record: Record, rng: np.random.Generator, size: tuple[int, int]
    ) -> UInt8[np.ndarray, "h w 3"]:
        image = _decode_short(record, short, filtering)
        height, width = image.shape[0] + 2 * border, image.shape[1] + 2 * border
        if size[0] > height or size[1] > width:
            raise ValueError(
                f"pad_crop: a crop of {size[0]}x{size[1]} does not fit into {record.name}, "
                f"{height}x{width} with its border; raise resize ({resize}) or padding ({padding})"
            )
        vertical, horizontal, mirror = rng.random(3)
        top = int(vertical * (height - size[0] + 1)) - border
        left = int(horizontal * (width - size[1] + 1)) - border
        # Copy the part of the crop that is image; the border itself is never built.
        out = np.zeros((*size, 3), np.uint8)
        part = image[max(top, 0) : top + size[0], max(left, 0) : left + size[1]]
        above, before = max(-top, 0), max(-left, 0)
        out[above : above + part.shape[0], before : before + part.shape[1]] = part
        return out[:, ::-1] if flip and mirror < 0.5 else out

    return transform


TRANSFORMS: dict[str, Callable[..., Transform]] = {
    "random_resized_crop": random_resized_crop,
    "pad_crop": pad_crop,
}


def _draw_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop, by the rule of `random_resized_crop`."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        share, aspect, vertical, horizontal = rng.random(4).tolist()
        area = height * width * (scale[0] + share * (scale[1] - scale[0]))
        w_over_h = math.exp(low + aspect * (high - low))
        w, h = round(math.sqrt(area * w_over_h)), round(math.sqrt(area / w_over_h))
        if 0 < w <= width and 0 < h <= height:
            return int(vertical * (height - h + 1)), int(horizontal * (width - w + 1)), h, w
    w = min(width, max(round(height * ratio[1]), 1))
    h = min(height, max(round(width / ratio[0]), 1))
    return (height - h) // 2, (width - w) // 2, h, w


def _resize(
    image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int], filtering: Image.Resampling
) -> UInt8[np.ndarray, "h2 w2 3"]:
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), filtering))


def _decode_short(
    record: Record, short: int, filtering: Image.Resampling
) -> UInt8[np.ndarray, "h w 3"]:
    """The decoded image, its short side resized to `short` and its long side truncated."""
    image = decode(record)
    height, width = image.shape[:2]
    if min(height, width) == short:
        return image
    if height < width:
        size = short, int(short * width / height)
    else:
        size = int(short * height / width), short
    if size[0] * size[1] > PIXEL_LIMIT:
        raise DataError(
            f"{record.name} is {width} by {height} pixels, so long that it would have more than "
            f"{PIXEL_LIMIT:,} with its short side at {short}; crop it or delete it"
        )
    return _resize(image, size, filtering)


def _resampling(interpolation: str) -> Image.Resampling:
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"interpolation is {interpolation!r}; allowed: {', '.join(INTERPOLATIONS)}"
        )
    return INTERPOLATIONS[interpolation]


def _checked_int(name: str, value: int | float, *, minimum: int) -> int:
    if int(value) != value or value < minimum:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {minimum}")
    return int(value)


def _checked_size(name: str, size: Sequence[int | float]) -> tuple[int, int]:
    if len(size) != 2:
        raise ValueError(f"{name} is {size!r}; it must be (height, width)")
    return _checked_int(name, size[0], minimum=1), _checked_int(name, size[1], minimum=1)
