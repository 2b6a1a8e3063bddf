"""From a record to a uint8 picture of the asked size: decoding, the evaluation crop, random crops.

Everything is uint8 RGB on the host; scaling, normalisation and channel order are applied on the
device from the `InputSpec`. A transform writes into a row of the batch and is a pure function of
(record, generator, height and width of the row); arguments are checked when it is made, and it can
be pickled for worker processes. Sizes are (height, width); Pillow's and OpenCV's (width, height).

JPEGs are decoded by libjpeg-turbo, and in training only as far as the crop needs it (jpeg.py); the
pixels are those that Pillow would decode. Whatever that path does not take, Pillow does.
"""

import functools
import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from mobilevit_jax.data import jpeg, resample
from mobilevit_jax.data.augment import Policy
from mobilevit_jax.data.record import CorruptError, DataError, Record

cv2.setNumThreads(0)  # the loader has a thread for every core already

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}
PILLOW = {
    "pil_bilinear": Image.Resampling.BILINEAR,
    "pil_bicubic": Image.Resampling.BICUBIC,
}
RESIZES = ("linear", "fast_aa", *PILLOW)
ATTEMPTS = 10  # torchvision's, to find a crop that fits
# fast_aa blurs where an image shrinks by more than the first and no more than the second; three
# taps cannot imitate a wider triangle, and averaging areas is exact enough from there on.
MIN_BLUR, MAX_BLUR = 1.05, 2.2
CHANNEL_ORDERS = ("rgb", "bgr")
# A fixed list, because Pillow would hand a PostScript file called x.jpg to Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
PIXEL_LIMIT = 89_478_485  # 256 MiB decoded; also where Pillow begins to suspect a bomb
# EXIF's orientations but the upright one, 1: what turns the pixels upright. CIPA DC-008, 4.6.5.1.
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels),
}


Pixels = UInt8[np.ndarray, "h w 3"]
Out = UInt8[np.ndarray, "oh ow 3"]  # of another size, in the same signature


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


Transform = Callable[[Record, np.random.Generator, Out], None]
View = Callable[[Record, Out], None]  # of evaluation: nothing is random


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def decode(record: Record) -> Pixels:
    """The record's image in RGB. It may be a view of the record: do not write to it.

    Grey is repeated, a palette looked up, alpha dropped, CMYK converted, 16 bits scaled to 8; of an
    animation the first frame is taken. EXIF rotation is not applied, as in PIL, torchvision and TF.

    Raises:
      CorruptError: not an image, cut short, over `PIXEL_LIMIT` pixels, or of a kind without one
        obvious meaning in 8 bits (32-bit, floating point, Lab).
    """
    image = _open(record)
    return image.whole()


def upright(record: Record) -> Record:
    """The record, or one of its pixels turned upright where its EXIF data say that it lies.

    Photographs of phones often do. Training and evaluation leave them as they are, like PIL,
    torchvision and TF; this is for images that people bring (Hugging Face's pipeline does it too).
    Data about the picture that cannot be read say nothing.

    Raises:
      CorruptError: as `decode`, for what has to be decoded here.
    """
    if isinstance(record.image, np.ndarray):
        return record
    header = jpeg.read_header(record.image)
    if header is None:
        return record._replace(image=_decode_with_pillow(record, turn=True))
    about = record.image[: header.scan_at]
    if b"Exif" not in about and b"Orientation" not in about:  # the latter in XMP
        return record
    try:
        with Image.open(io.BytesIO(record.image), formats=FORMATS) as image:
            turn = _turn(image)
    except Exception:  # whatever Pillow raises, `decode` has the say
        return record
    return record if turn is None else record._replace(image=_turned(decode(record), turn))


def _turn(image: Image.Image) -> Callable[[np.ndarray], np.ndarray] | None:
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever Pillow raises on bad data about a picture that may be whole
        return None


def _turned(pixels: Pixels, turn: Callable[[np.ndarray], np.ndarray]) -> Out:
    return np.ascontiguousarray(turn(pixels))


class _Jpeg:
    """A JPEG of which any part can be decoded."""

    def __init__(self, data: bytes, header: jpeg.Header, record: Record) -> None:
        self.height, self.width = header.height, header.width
        self._data, self._header, self._record = data, header, record

    def whole(self) -> Pixels:
        try:
            return jpeg.decode(self._data, self._header)
        except ValueError as error:
            return self._second_opinion(error)

    def part(self, box: Box, *, halve: bool = False) -> Pixels:
        try:
            return jpeg.decode_box(self._data, self._header, box, halve=halve)
        except ValueError as error:
            return _cut(self._second_opinion(error), box)

    def _second_opinion(self, error: ValueError) -> Pixels:
        """Pillow has the last word on what is broken, and says how."""
        if isinstance(error, jpeg.BombError):
            raise CorruptError(f"cannot decode {self._record.name}: {error}; delete it") from error
        return _decode_with_pillow(self._record)


class _Decoded:
    """An image of which all pixels are there."""

    def __init__(self, pixels: Pixels) -> None:
        self.height, self.width = pixels.shape[:2]
        self._pixels = pixels

    def whole(self) -> Pixels:
        return self._pixels

    def part(self, box: Box, *, halve: bool = False) -> Pixels:
        del halve  # it saves decoding, and that is done
        return _cut(self._pixels, box)


def _open(record: Record) -> _Jpeg | _Decoded:
    """Size and pixels of a record; a JPEG's are decoded when they are asked for."""
    if isinstance(record.image, np.ndarray):
        grey = record.image.ndim == 2
        return _Decoded(np.repeat(record.image[:, :, None], 3, axis=2) if grey else record.image)
    header = jpeg.read_header(record.image)
    if header is None:
        return _Decoded(_decode_with_pillow(record))
    if header.height * header.width > PIXEL_LIMIT:
        raise _too_large(record)
    return _Jpeg(record.image, header, record)


def _decode_with_pillow(record: Record, *, turn: bool = False) -> Pixels:
    assert isinstance(record.image, bytes)
    try:
        with Image.open(io.BytesIO(record.image), formats=FORMATS) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise Image.DecompressionBombError
            pixels = _to_rgb(image)
            # Asked after decoding: of a TIFF, Pillow has turned it by then.
            upright = _turn(image) if turn else None
            return pixels if upright is None else _turned(pixels, upright)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(record) from error
    except Exception as error:  # a broken file may raise anything inside Pillow, MemoryError too
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "unknown format" if record.image else "the file is empty"
        raise CorruptError(
            f"cannot decode {record.name} ({reason}); replace it by a whole "
            f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]} file, or delete it"
        ) from error


def _too_large(record: Record) -> CorruptError:
    return CorruptError(
        f"{record.name} has more than {PIXEL_LIMIT:,} pixels; make it smaller or delete it"
    )


def _to_rgb(image: Image.Image) -> Pixels:
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


def evaluation(spec: InputSpec) -> View:
    """The one exact evaluation transform: short side to `spec.resize`, then the centre `spec.size`.

    The long side becomes int(resize * long / short), truncated; an image whose short side fits is
    not resampled. The crop begins at ((H - h) // 2, (W - w) // 2), negative offsets padded with
    zeros (cvnets; Hugging Face's processor does the same; torchvision rounds the offset). Only what
    the crop shows is decoded and resized, with the result of doing it to the whole image.

    Raises:
      ValueError: a value in `spec` is not allowed.
    """
    size = _checked_size("InputSpec.size", spec.size)
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
    return functools.partial(_evaluation, size=size, short=short, filtering=filtering)


def _evaluation(
    record: Record,
    out: Out,
    *,
    size: tuple[int, int],
    short: int,
    filtering: Image.Resampling,
) -> None:
    image = _open(record)
    height, width = _short_size(record, image.height, image.width, short)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    if top < 0 or left < 0 or filtering not in resample.REACH:
        _paste(_short(record, short, filtering), out, top, left)
        return
    across = _reach(left, size[1], image.width, width, filtering)
    down = _reach(top, size[0], image.height, height, filtering)
    part = image.part(Box(down.first, across.first, down.length, across.length))
    box = across.low, down.low, across.high, down.high
    resized = resample.resize(part, down.count, across.count, filtering, box)
    out[...] = _cut(resized, Box(top - down.start, left - across.start, *size))


def shown(record: Record, spec: InputSpec) -> tuple[float, float, float, float]:
    """What `evaluation` shows of an image: left, top, width, height, as shares of its sides.

    Where the picture is padded, the box begins below 0 and ends above 1.

    Raises:
      CorruptError: not an image.
    """
    image = _open(record)
    height, width = _short_size(record, image.height, image.width, spec.resize)
    top, left = (height - spec.size[0]) // 2, (width - spec.size[1]) // 2
    return left / width, top / height, spec.size[1] / width, spec.size[0] / height


class _Reach(NamedTuple):
    """Along one side of an image: what some resized pixels are made of."""

    start: int  # the first of them that is computed
    count: int
    first: int  # the first pixel of the image that is needed
    length: int
    low: float  # where the computed ones begin and end in the image, from `first` on
    high: float


def _reach(start: int, count: int, old: int, new: int, filtering: Image.Resampling) -> _Reach:
    """Where `count` pixels from `start` on come from, when `old` pixels become `new`.

    Pillow takes the place of a part in single precision. A few more pixels are computed, so that
    the part begins and ends where that is exact: then its pixels are those of the whole, bit for
    bit. That is at multiples of the odd part of the scale's denominator.
    """
    denominator = new // math.gcd(old, new)
    every = denominator // (denominator & -denominator)
    end = -(-(start + count) // every) * every
    start = start // every * every
    low, high = start * old / new, end * old / new
    margin = resample.REACH[filtering] * max(old / new, 1.0) + 1
    first = max(math.floor(low - margin), 0)
    last = min(math.ceil(high + margin), old)
    return _Reach(start, end - start, first, last - first, low - first, high - first)


def random_resized_crop(
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    resize: str = "fast_aa",
    flip: bool = True,
    policy: Policy | None = None,
) -> Transform:
    """Inception's crop by torchvision's rule (GoogLeNet, arXiv 1409.4842), then a mirror image.

    Ten times: draw an area (a share of the image's, uniform in `scale`) and an aspect ratio w / h
    (log-uniform in `ratio`), and take a place for it if it fits. Else the largest centre crop
    whose aspect ratio lies in `ratio`. The crop is cut out first and then resized, so nothing
    outside it leaks in (Pillow's resize(box=...) would let it).

    Args:
      scale: smallest and largest area, as shares in (0, 1].
      ratio: smallest and largest aspect ratio.
      resize: linear (no antialiasing: OpenCV, as MobileViT v1 was trained), fast_aa (antialiased,
        OpenCV, within about 1/255 of pil_bilinear), pil_bilinear or pil_bicubic (as torchvision and
        timm on PIL images).
      flip: mirror left to right with probability 1/2.
      policy: what happens to the picture then (augment.py); None is nothing.

    Raises:
      ValueError: a value out of range.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale is {scale}; it must be (low, high) with 0 < low <= high <= 1")
    if not 0 < ratio[0] <= ratio[1] < math.inf:
        raise ValueError(f"ratio is {ratio}; it must be (low, high) with 0 < low <= high")
    _checked_resize(resize)
    return functools.partial(
        _random_resized_crop, scale=scale, ratio=ratio, resize=resize, flip=flip, policy=policy
    )


def _random_resized_crop(
    record: Record,
    rng: np.random.Generator,
    out: Out,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    resize: str,
    flip: bool,
    policy: Policy | None,
) -> None:
    image = _open(record)
    # All drawn at once, so that the policy's draws do not depend on how many the crop needed.
    *draws, mirror = rng.random(4 * ATTEMPTS + 1).tolist()
    box = draw_box(image.height, image.width, scale, ratio, draws)
    # Half the resolution straight out of the decoder, where that is still more than is asked.
    halve = resize == "fast_aa" and box.height >= 2 * out.shape[0] and box.width >= 2 * out.shape[1]
    part = image.part(box, halve=halve)
    _finish(part, rng, out, resize=resize, mirror=flip and mirror < 0.5, policy=policy)


def pad_crop(
    *,
    short: int,
    padding: int,
    resize: str = "pil_bilinear",
    flip: bool = False,
    policy: Policy | None = None,
) -> Transform:
    """For small images (ResNet's CIFAR recipe, arXiv 1512.03385): a black border, a random crop.

    Args:
      short: the short side before padding, in pixels.
      padding: width of the border on each side, in pixels.
      resize: linear, fast_aa, pil_bilinear or pil_bicubic.
      flip: mirror left to right with probability 1/2.
      policy: what happens to the picture then (augment.py); None is nothing.

    Raises:
      ValueError: a value out of range. In use, DataError: a crop larger than the padded image.
    """
    short = _checked_int("short", short, minimum=1)
    padding = _checked_int("padding", padding, minimum=0)
    _checked_resize(resize)
    return functools.partial(
        _pad_crop, short=short, padding=padding, resize=resize, flip=flip, policy=policy
    )


def _pad_crop(
    record: Record,
    rng: np.random.Generator,
    out: Out,
    *,
    short: int,
    padding: int,
    resize: str,
    flip: bool,
    policy: Policy | None,
) -> None:
    image = _open(record)
    small = np.empty((*_short_size(record, image.height, image.width, short), 3), np.uint8)
    resize_into(image.whole(), small, resize)
    height, width = small.shape[0] + 2 * padding, small.shape[1] + 2 * padding
    if out.shape[0] > height or out.shape[1] > width:
        raise DataError(
            f"pad_crop: a crop of {out.shape[0]}x{out.shape[1]} does not fit into {record.name}, "
            f"{height}x{width} with its border; raise config.augment.short ({short}) or padding "
            f"({padding})"
        )
    vertical, horizontal, mirror = rng.random(3).tolist()
    top = int(vertical * (height - out.shape[0] + 1)) - padding
    left = int(horizontal * (width - out.shape[1] + 1)) - padding
    crop = np.empty_like(out)
    _paste(small, crop, top, left)
    _finish(crop, rng, out, resize=resize, mirror=flip and mirror < 0.5, policy=policy)


TRANSFORMS: dict[str, Callable[..., Transform]] = {
    "random_resized_crop": random_resized_crop,
    "pad_crop": pad_crop,
}


def _finish(
    part: Pixels,
    rng: np.random.Generator,
    out: Out,
    *,
    resize: str,
    mirror: bool,
    policy: Policy | None,
) -> None:
    """Resizes, mirrors, applies the policy; only the last of them writes into `out`."""
    target = out if policy is None and not mirror else np.empty_like(out)
    resize_into(part, target, resize)
    if mirror:
        target = cv2.flip(target, 1, dst=out if policy is None else None)
    if policy is not None:
        out[...] = policy(target, rng)


def draw_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draws: Sequence[float],
) -> Box:
    """A random crop of an image by the rule of `random_resized_crop`.

    Args:
      height: of the image.
      width: of the image.
      scale: smallest and largest area, as shares.
      ratio: smallest and largest aspect ratio.
      draws: four numbers in [0, 1) for each of the `ATTEMPTS`.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for i in range(0, 4 * ATTEMPTS, 4):
        share, aspect, vertical, horizontal = draws[i : i + 4]
        area = height * width * (scale[0] + share * (scale[1] - scale[0]))
        w_over_h = math.exp(low + aspect * (high - low))
        w, h = round(math.sqrt(area * w_over_h)), round(math.sqrt(area / w_over_h))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(vertical * (height - h + 1)), int(horizontal * (width - w + 1)), h, w)
    w = min(width, max(round(height * ratio[1]), 1))
    h = min(height, max(round(width / ratio[0]), 1))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def resize_into(pixels: Pixels, out: Out, resize: str) -> None:
    """Resizes to the size of `out` and writes there, by a way named as in `random_resized_crop`."""
    if pixels.shape == out.shape:
        out[...] = pixels
    elif resize in PILLOW:
        out[...] = resample.resize(pixels, out.shape[0], out.shape[1], PILLOW[resize])
    else:
        down = pixels.shape[0] / out.shape[0], pixels.shape[1] / out.shape[1]
        interpolation = cv2.INTER_LINEAR
        if resize == "fast_aa" and max(down) > MAX_BLUR:
            interpolation = cv2.INTER_AREA
        elif resize == "fast_aa" and max(down) > MIN_BLUR:
            kernels = [_blur(factor) for factor in down]
            pixels = cv2.sepFilter2D(
                pixels, -1, kernels[1], kernels[0], borderType=cv2.BORDER_REPLICATE
            )
        cv2.resize(pixels, (out.shape[1], out.shape[0]), dst=out, interpolation=interpolation)


def _blur(factor: float) -> np.ndarray:
    """Three taps with the variance that a triangle widened by `factor` has beyond a plain one."""
    outer = (factor**2 - 1) / 12 if factor > MIN_BLUR else 0.0
    return np.array([outer, 1 - 2 * outer, outer], np.float32)


def _cut(pixels: Pixels, box: Box) -> Out:
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width]


def _paste(image: Pixels, out: Out, top: int, left: int) -> None:
    """Fills `out` with the image from (top, left) on, and black where there is none."""
    height, width = out.shape[:2]
    out[...] = 0
    part = image[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    above, before = max(-top, 0), max(-left, 0)
    out[above : above + part.shape[0], before : before + part.shape[1]] = part


def _short(record: Record, short: int, filtering: Image.Resampling) -> Pixels:
    """The decoded image, its short side resized to `short` and its long side truncated."""
    image = decode(record)
    height, width = _short_size(record, image.shape[0], image.shape[1], short)
    if (height, width) == image.shape[:2]:
        return image
    return resample.resize(image, height, width, filtering)


def _short_size(record: Record, height: int, width: int, short: int) -> tuple[int, int]:
    if min(height, width) == short:
        return height, width
    if height < width:
        size = short, int(short * width / height)
    else:
        size = int(short * height / width), short
    if size[0] * size[1] > PIXEL_LIMIT:
        raise CorruptError(
            f"{record.name} is {width} by {height} pixels, so long that it would have more than "
            f"{PIXEL_LIMIT:,} with its short side at {short}; crop it or delete it"
        )
    return size


def _checked_resize(resize: str) -> None:
    if resize not in RESIZES:
        raise ValueError(f"resize is {resize!r}; allowed: {', '.join(RESIZES)}")


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
