"""Decoding of every kind of file, the exact evaluation transform, and the random crops."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from mobilevit_jax.data import transforms
from mobilevit_jax.data.record import CorruptError, DataError, Record
from mobilevit_jax.data.transforms import (
    InputSpec,
    decode,
    evaluation,
    pad_crop,
    random_resized_crop,
)
from tests.pixels import evaluated, shown

SPEC = InputSpec((256, 256), 288, "bilinear", "rgb", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth and different everywhere, so that a shift by a pixel shows."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> Record:
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, kind, **options)
    return Record(file.getvalue(), 3, f"somewhere/x.{kind.lower()}")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def fails(record: Record) -> str:
    with pytest.raises(DataError) as error:
        transforms.decode(record)
    assert "\n" not in str(error.value)
    assert record.name in str(error.value)
    return str(error.value)


# decode


def test_decode_arrays():
    grey = picture(5, 7)[:, :, 0]
    out = transforms.decode(Record(grey, 0, "a"))
    assert out.shape == (5, 7, 3)
    assert all(np.array_equal(out[:, :, c], grey) for c in range(3))
    colour = picture(5, 7)
    assert np.array_equal(transforms.decode(Record(colour, 0, "a")), colour)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_decode_lossless_formats(kind: str):
    image = picture(13, 17)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(transforms.decode(encode(image, kind, **options)), image)


def test_decode_jpeg_is_pillows():
    record = encode(picture(40, 60), "JPEG", quality=90)
    assert isinstance(record.image, bytes)
    expected = np.asarray(Image.open(io.BytesIO(record.image)).convert("RGB"))
    assert np.array_equal(transforms.decode(record), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_decode_modes(mode: str):
    """All of them hold the same grey ramp (or its two ends)."""
    ramp = np.tile(np.linspace(0, 255, 16).round().astype(np.uint8), (3, 1))
    if mode == "1":
        ramp = np.where(ramp < 128, 0, 255).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode == "P":
        image = Image.fromarray(255 - ramp)
        image.putpalette([255 - i // 3 for i in range(768)])  # colour i is the grey 255 - i
    else:
        image = Image.fromarray(ramp).convert(mode)
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(ramp[:, ::-1]))  # alpha is dropped, not blended
    assert image.mode == mode
    record = encode(image)
    assert isinstance(record.image, bytes)
    assert Image.open(io.BytesIO(record.image)).mode == mode
    out = transforms.decode(record)
    assert out.dtype == np.uint8
    assert np.array_equal(out, np.repeat(ramp[:, :, None], 3, axis=2))


@pytest.mark.parametrize(("kind", "order"), [("PNG", "<"), ("TIFF", "<"), ("TIFF", ">")])
def test_decode_16_bits_are_scaled(kind: str, order: str):
    values = np.array([[0, 128, 129, 256, 300, 32768, 65406, 65407, 65535]], f"{order}u2")
    out = transforms.decode(encode(Image.fromarray(values), kind))
    assert out[0, :, 0].tolist() == [0, 0, 1, 1, 1, 128, 254, 255, 255]
    assert np.array_equal(out[..., 0], out[..., 2])


def test_decode_16_bit_pgm_and_colour_png():
    values = np.array([[0, 300, 65535]], ">u2")
    pgm = b"P5 3 1 65535\n" + values.tobytes()
    assert transforms.decode(Record(pgm, 0, "x.ppm"))[0, :, 0].tolist() == [0, 1, 255]

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    pixels = b"\0" + np.array([[65535, 0, 0x8000]], ">u2").tobytes()
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    png += chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    assert transforms.decode(Record(png, 0, "x.png")).tolist() == [[[255, 0, 128]]]


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_decode_transparent_colour_is_kept(mode: str):
    """Also where Pillow would warn of it (and warnings are errors here)."""
    image = Image.fromarray(picture(6, 6)).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    key: Any = {"P": bytes(range(200)), "RGB": (1, 2, 3), "L": 5}[mode]
    assert np.array_equal(transforms.decode(encode(image, transparency=key)), expected)


def test_decode_cmyk():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    for kind in ("JPEG", "TIFF"):
        out = transforms.decode(encode(cmyk, kind))
        assert np.abs(out.astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_decode_first_frame(kind: str):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    options = {"lossless": True} if kind == "WEBP" else {}
    out = transforms.decode(encode(first, kind, save_all=True, append_images=[second], **options))
    assert np.array_equal(out, np.asarray(first))


def test_decode_ignores_exif_rotation():
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    assert transforms.decode(encode(picture(8, 20), "JPEG", exif=exif)).shape == (8, 20, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_decode_cut_short(kind: str):
    record = encode(picture(64, 64), kind)
    assert isinstance(record.image, bytes)
    text = fails(record._replace(image=record.image[: len(record.image) * 2 // 3]))
    assert text.startswith(f"cannot decode {record.name} (")
    assert "replace it by a whole JPEG, PNG, BMP, WEBP, GIF, TIFF or PPM file, or delete" in text


def test_decode_not_an_image():
    assert "(unknown format)" in fails(Record(b"<html>404</html>", 0, "dog/7.jpg"))
    assert "(the file is empty)" in fails(Record(b"", 0, "dog/8.jpg"))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert "(unknown format)" in fails(Record(postscript, 0, "dog/9.jpg"))


def test_decode_more_than_16_bits():
    deep = Image.fromarray(np.array([[0, 70_000]], np.int32))
    assert "more than 16 bits" in fails(encode(deep, "TIFF"))
    negative = Image.fromarray(np.array([[0, -1]], np.int32))
    assert "more than 16 bits" in fails(encode(negative, "TIFF"))
    real = Image.fromarray(np.array([[0.0, 1.0]], np.float32))
    assert "floating-point" in fails(encode(real, "TIFF"))


def test_decode_too_many_pixels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transforms, "PIXEL_LIMIT", 100)
    assert transforms.decode(encode(picture(10, 10))).shape == (10, 10, 3)
    assert "x.png has more than 100 pixels; make it smaller" in fails(encode(picture(10, 11)))


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
def test_decode_bombs():
    with pytest.warns(Image.DecompressionBombWarning):
        text = fails(Record(b"P6 100000 1000 255\n", 0, "bomb.ppm"))
    assert "bomb.ppm has more than 89,478,485 pixels" in text
    worse = fails(Record(b"P6 60000 60000 255\n", 0, "bomb.ppm"))
    assert worse == text


def test_decode_bomb_when_warnings_are_errors():
    record = Record(b"P6 100000 1000 255\n", 0, "bomb.ppm")
    assert "bomb.ppm has more than 89,478,485 pixels" in fails(record)


def test_decode_many_scans():
    """A progressive file may hold the same scan again and again, each as long as the picture."""
    file = encode(picture(64, 64), "JPEG", progressive=True).image
    assert isinstance(file, bytes)
    begin = file.rindex(b"\xff\xda")
    scan = file[begin:-2]
    bomb = file[:-2] + scan * 200 + file[-2:]
    told = fails(Record(bomb, 0, "bomb.jpg"))
    assert told == "cannot decode bomb.jpg: it has more than 100 scans; delete it"


# evaluation


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos"])
def test_evaluation_matches_pillow(interpolation: str):
    image = picture(375, 500)
    out = evaluated(SPEC._replace(interpolation=interpolation), Record(image, 0, "x"))
    resized = Image.fromarray(image).resize(
        (384, 288), Image.Resampling[interpolation.upper()]
    )  # 288 * 500 / 375 = 384
    assert np.array_equal(out, np.asarray(resized.crop((64, 16, 320, 272))))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos"])
def test_evaluation_does_not_depend_on_what_the_crop_leaves_out(interpolation: str):
    """Bit for bit what resizing the whole image gives, whatever the sizes."""
    filtering = Image.Resampling[interpolation.upper()]
    draws = np.random.default_rng(0)
    for _ in range(25):
        height, width = draws.integers(100, 500, 2).tolist()
        short, size = draws.integers(150, 300), draws.integers(100, 150, 2)
        image = draws.integers(0, 256, (height, width, 3), dtype=np.uint8)
        spec = SPEC._replace(size=(*size.tolist(),), resize=int(short), interpolation=interpolation)
        out = evaluated(spec, Record(image, 0, "x"))
        tall = height > width
        high = int(short * height / width) if tall else int(short)
        wide = int(short) if tall else int(short * width / height)
        whole = Image.fromarray(image)
        if interpolation != "nearest":  # Pillow may choose an order of its own, see resample
            whole = whole.resize((wide, height), filtering)
        whole = np.asarray(whole.resize((wide, high), filtering))
        top, left = (high - size[0]) // 2, (wide - size[1]) // 2
        assert np.array_equal(out, whole[top : top + size[0], left : left + size[1]])


def test_evaluation_truncates_the_long_side():
    image = picture(332, 500)  # 288 * 500 / 332 = 433.73 -> 433
    out = evaluated(SPEC._replace(size=(288, 433)), Record(image, 0, "x"))
    resized = Image.fromarray(image).resize((433, 288), Image.Resampling.BILINEAR)
    assert np.array_equal(out, np.asarray(resized))
    tall = np.swapaxes(picture(353, 500), 0, 1)  # 288 * 500 / 353 = 407.93 -> 407
    out = evaluated(SPEC._replace(size=(407, 288)), Record(tall, 0, "x"))
    resized = Image.fromarray(tall).resize((288, 407), Image.Resampling.BILINEAR)
    assert np.array_equal(out, np.asarray(resized))


def test_evaluation_keeps_a_fitting_image_and_floors_the_offset():
    image = picture(288, 301)
    out = evaluated(SPEC._replace(size=(255, 256)), Record(image, 0, "x"))
    assert np.array_equal(out, image[16:271, 22:278])  # (288 - 255) // 2, (301 - 256) // 2


def test_evaluation_pads_with_zeros():
    image = np.maximum(picture(5, 20), 1)
    out = evaluated(SPEC._replace(size=(8, 6), resize=5), Record(image, 0, "x"))
    assert np.array_equal(out[2:7], image[:, 7:13])  # (5 - 8) // 2 = -2
    assert not out[:2].any()
    assert not out[7:].any()
    both = evaluated(SPEC._replace(size=(8, 30), resize=5), Record(image, 0, "x"))
    assert np.array_equal(both[2:7, 5:25], image)
    assert np.count_nonzero(both) == image.size


def test_evaluation_refuses_a_needle():
    with pytest.raises(DataError, match="needle is 40000 by 2 pixels, so long"):
        evaluated(SPEC, Record(np.zeros((2, 40_000), np.uint8), 0, "needle"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("size", (0, 256), "InputSpec.size is 0; it must be a whole number of at least 1"),
        ("size", (256,), "InputSpec.size is (256,); it must be (height, width)"),
        ("size", (256, 25.5), "InputSpec.size is 25.5; it must be a whole number"),
        ("resize", -1, "InputSpec.resize is -1; it must be a whole number of at least 1"),
        (
            "interpolation",
            "cubic",
            "interpolation is 'cubic'; allowed: bilinear, bicubic, nearest, lanczos",
        ),
        ("channel_order", "RGB", "InputSpec.channel_order is 'RGB'; allowed: rgb, bgr"),
        ("mean", (0.5,), "InputSpec.mean is (0.5,) and std is (1.0, 1.0, 1.0); each needs three"),
        ("std", (1.0, 0.0, 1.0), "those of std must be above 0"),
    ],
)
def test_evaluation_checks_the_spec(field: str, value: Any, message: str):
    with pytest.raises(ValueError) as error:
        evaluation(SPEC._replace(**{field: value}))
    assert message in str(error.value)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpegs_are_cut_before_they_are_decoded(subsampling: int):
    """The same pixels as from the decoded image, in evaluation and in training."""
    for shape in ((375, 500), (500, 333), (40, 51), (700, 900)):
        record = encode(picture(*shape), "JPEG", quality=90, subsampling=subsampling)
        pixels = Record(decode(record), 0, "pixels")
        assert np.array_equal(evaluated(SPEC, record), evaluated(SPEC, pixels))
        for resize in ("linear", "fast_aa", "pil_bilinear", "pil_bicubic"):
            transform = random_resized_crop(resize=resize)
            for seed in range(6):
                ours = shown(transform, record, rng(seed), (352, 256))
                assert np.array_equal(ours, shown(transform, pixels, rng(seed), (352, 256)))


def test_halving_is_for_large_crops_and_fast_antialiasing_only():
    record = encode(picture(1200, 1600), "JPEG", quality=90)
    pixels = Record(decode(record), 0, "pixels")
    for resize, worst in (("linear", 0), ("pil_bilinear", 0), ("fast_aa", 6)):
        transform = random_resized_crop(scale=(0.9, 1.0), resize=resize)
        ours = shown(transform, record, rng(1), (256, 256)).astype(int)
        theirs = shown(transform, pixels, rng(1), (256, 256))
        apart = np.abs(ours - theirs)
        assert apart.max() <= worst
        assert apart.mean() < 0.7


def test_fast_antialiasing_is_near_pillows():
    draws = np.random.default_rng(3)
    for down in (1.02, 1.3, 1.7, 2.1, 3.4):
        size = round(256 * down), round(300 * down)
        noisy = picture(*size).astype(float) + draws.normal(0, 20, (*size, 3))
        image = noisy.clip(0, 255).astype(np.uint8)
        made = {}
        for resize in ("fast_aa", "linear", "pil_bilinear"):
            made[resize] = np.empty((256, 300, 3), np.uint8)
            transforms.resize_into(image, made[resize], resize)
        theirs = made["pil_bilinear"].astype(int)
        apart = {name: np.abs(theirs - each).mean() for name, each in made.items()}
        assert apart["fast_aa"] < 2.2
        assert down < 1.05 or apart["fast_aa"] < 0.7 * apart["linear"]


# random_resized_crop


def torchvision_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draws: np.random.Generator,
) -> tuple[int, int, int, int]:
    """The rule as torchvision's documentation of RandomResizedCrop.get_params has it."""
    for _ in range(10):
        u = draws.random(4)
        target = height * width * (scale[0] + u[0] * (scale[1] - scale[0]))
        aspect = np.exp(np.log(ratio[0]) + u[1] * (np.log(ratio[1]) - np.log(ratio[0])))
        w, h = round(float(np.sqrt(target * aspect))), round(float(np.sqrt(target / aspect)))
        if 0 < w <= width and 0 < h <= height:
            return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w
    if width / height < min(ratio):
        w, h = width, round(width / min(ratio))
    elif width / height > max(ratio):
        w, h = round(height * max(ratio)), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (40, 40), (30, 900), (900, 30), (1, 1)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
def test_random_resized_crop_is_torchvisions(shape: tuple[int, int], scale: tuple[float, float]):
    image = picture(*shape)
    transform = random_resized_crop(scale=scale, resize="pil_bicubic", flip=False)
    for seed in range(8):
        top, left, h, w = torchvision_box(*shape, scale, (3 / 4, 4 / 3), rng(seed))
        cut = Image.fromarray(image).crop((left, top, left + w, top + h))
        across = cut.resize((48, h), Image.Resampling.BICUBIC)  # see resample.resize
        expected = across.resize((48, 32), Image.Resampling.BICUBIC)
        out = shown(transform, Record(image, 0, "x"), rng(seed), (32, 48))
        assert np.array_equal(out, np.asarray(expected))


def test_random_resized_crop_area_and_ratio():
    """Read off a picture whose pixels say where they are."""
    y, x = np.mgrid[0:256, 0:256].astype(np.uint8)
    record = Record(np.stack([y, x, x], axis=-1), 0, "x")
    transform = random_resized_crop(scale=(0.25, 0.5), resize="linear", flip=False)
    draws = rng(1)
    boxes = []
    for _ in range(300):
        out = shown(transform, record, draws, (64, 64)).astype(int)
        height = (out[-1, 0, 0] - out[0, 0, 0]) * 64 / 63
        width = (out[0, -1, 1] - out[0, 0, 1]) * 64 / 63
        boxes.append((height * width / 65536, width / height, out[0, 0, 0], out[0, 0, 1]))
    area, ratio, top, left = np.array(boxes).T
    assert 0.23 < area.min() < 0.3
    assert 0.45 < area.max() < 0.53
    assert abs(area.mean() - 0.375) < 0.02
    assert 0.72 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.4
    assert abs(np.log(ratio).mean()) < 0.04
    for offset in (top, left):
        assert offset.min() <= 5
        assert 35 < offset.mean() < 70


@pytest.mark.parametrize(
    "make",
    [
        lambda flip: random_resized_crop(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=flip),
        lambda flip: pad_crop(short=32, padding=0, flip=flip),
    ],
)
def test_flip(make: Any):
    image = picture(32, 32)
    plain, mirrored = image.tobytes(), image[:, ::-1].tobytes()
    draws = rng(0)
    outs = [shown(make(True), Record(image, 0, "x"), draws, (32, 32)).tobytes() for _ in range(400)]
    assert set(outs) == {plain, mirrored}
    assert 160 < outs.count(plain) < 240
    assert {
        shown(make(False), Record(image, 0, "x"), draws, (32, 32)).tobytes() for _ in range(20)
    } == {plain}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": (0.0, 1.0)}, "scale is (0.0, 1.0); it must be (low, high)"),
        ({"scale": (0.5, 0.1)}, "scale is (0.5, 0.1)"),
        ({"scale": (0.5, 1.1)}, "scale is (0.5, 1.1)"),
        ({"ratio": (1.5, 0.5)}, "ratio is (1.5, 0.5); it must be (low, high)"),
        ({"ratio": (0.0, 0.5)}, "ratio is (0.0, 0.5)"),
        ({"resize": "area"}, "resize is 'area'; allowed: linear, fast_aa, pil_bilinear, pil_bic"),
    ],
)
def test_random_resized_crop_arguments(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError) as error:
        random_resized_crop(**arguments)
    assert message in str(error.value)


# pad_crop


def test_pad_crop_is_every_crop_of_the_padded_image():
    image = np.maximum(picture(6, 6), 1)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    crops = {
        padded[top : top + 6, left : left + 6].tobytes() for top in range(5) for left in range(5)
    }
    transform = pad_crop(short=6, padding=2)
    draws = rng(0)
    outs = [shown(transform, Record(image, 0, "x"), draws, (6, 6)).tobytes() for _ in range(500)]
    assert set(outs) == crops
    assert max(outs.count(crop) for crop in crops) < 45  # 20 each, +- 4.4


def test_pad_crop_of_other_sizes():
    image = np.maximum(picture(4, 9), 1)
    transform = pad_crop(short=4, padding=1)
    for size in ((6, 11), (6, 3), (2, 11), (2, 2)):
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
        for seed in range(10):
            out = shown(transform, Record(image, 0, "x"), rng(seed), size)
            assert out.shape == (*size, 3)
            top, left = (
                int(u * (whole - part + 1))
                for u, whole, part in zip(rng(seed).random(3), (6, 11), size, strict=False)
            )
            assert np.array_equal(out, padded[top : top + size[0], left : left + size[1]])


def test_pad_crop_resizes_the_short_side():
    image = picture(28, 56)
    out = shown(pad_crop(short=32, padding=0), Record(image, 0, "x"), rng(), (32, 64))
    expected = Image.fromarray(image).resize((64, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(out, np.asarray(expected))


def test_pad_crop_too_small():
    with pytest.raises(DataError) as error:
        shown(pad_crop(short=28, padding=1), Record(picture(28, 28), 0, "x"), rng(), (32, 32))
    assert "a crop of 32x32 does not fit into x, 30x30 with its border" in str(error.value)
    assert "raise config.augment.short (28) or padding (1)" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"short": 0, "padding": 2}, "short is 0; it must be a whole number of at least 1"),
        ({"short": 28, "padding": -1}, "padding is -1; it must be a whole number of at least 0"),
        ({"short": 28, "padding": 2, "resize": ""}, "resize is ''; allowed: linear, fast_aa"),
    ],
)
def test_pad_crop_arguments(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError) as error:
        pad_crop(**arguments)
    assert message in str(error.value)


def test_transforms_are_pure():
    image = picture(40, 50)
    copy = image.copy()
    for make in (random_resized_crop(), pad_crop(short=40, padding=4, flip=True)):
        first, second = (shown(make, Record(image, 0, "x"), rng(5), (32, 32)) for _ in range(2))
        assert np.array_equal(first, second)
        assert not np.array_equal(first, shown(make, Record(image, 0, "x"), rng(6), (32, 32)))
    assert np.array_equal(image, copy)
    assert set(transforms.TRANSFORMS) == {"random_resized_crop", "pad_crop"}


@pytest.mark.parametrize("suffix", ["jpeg", "png", "tiff", "webp"])
def test_upright_as_exif_says(suffix):
    pixels = np.arange(40 * 24 * 3, dtype=np.uint32).reshape(40, 24, 3) % 251
    image = Image.fromarray(pixels.astype(np.uint8))
    for orientation in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = io.BytesIO()
        image.save(file, suffix, exif=exif)
        record = Record(file.getvalue(), 0, "x")
        with Image.open(file) as reopened:
            want = np.asarray(ImageOps.exif_transpose(reopened).convert("RGB"))
        assert want.shape[:2] == ((24, 40) if 5 <= orientation <= 8 else (40, 24))
        np.testing.assert_array_equal(transforms.decode(transforms.upright(record)), want)


def test_upright_leaves_the_rest_alone():
    file = io.BytesIO()
    Image.new("RGB", (9, 7)).save(file, "jpeg")
    data = file.getvalue()
    record = Record(data, 0, "x")
    assert transforms.upright(record) is record
    # Data about the picture that are no EXIF: it is whole all the same.
    broken = b"\xff\xe1\x00\x10Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff"
    record = Record(data[:2] + broken + data[2:], 0, "x")
    assert transforms.decode(transforms.upright(record)).shape == (7, 9, 3)
    with pytest.raises(CorruptError, match="unknown format"):
        transforms.upright(Record(b"no image", 0, "x"))


def test_what_is_shown():
    spec = SPEC._replace(size=(8, 16), resize=20)
    assert transforms.shown(encode(picture(40, 80)), spec) == (12 / 40, 6 / 20, 16 / 40, 8 / 20)
    spec = SPEC._replace(size=(32, 32), resize=16)
    assert transforms.shown(encode(picture(16, 20)), spec) == (-6 / 20, -8 / 16, 32 / 20, 32 / 16)
