"""Evaluation pre-processing against Hugging Face and timm, 8-bit level by level."""

import io

import numpy as np
import pytest
from PIL import Image

from mobilevit_jax.data.record import Record
from mobilevit_jax.tools import formats
from tests import originals
from tests.pixels import evaluated

# Height and width: landscape, portrait, odd margins, smaller and just larger than the crop.
SIZES = ((375, 500), (500, 333), (333, 501), (200, 180), (257, 900))


def photograph(size):
    """A picture with gradients, edges and noise, as the record of a PNG file."""
    height, width = size
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9) * np.cos(y / 7), np.sin((x + y) / 23), x / width], axis=-1)
    image = 127 + 90 * waves + rng.normal(0, 12, (height, width, 3))
    image[height // 3 : height // 2, width // 4 : width // 2] = (250, 10, 40)
    file = io.BytesIO()
    picture = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    picture.save(file, "PNG")
    return picture, Record(file.getvalue(), 0, "photograph")


def levels_apart(ours, theirs):
    """Largest difference in 8-bit levels; theirs is c h w, scaled to 0..1."""
    return np.abs(ours.astype(np.float64) - 255 * np.asarray(theirs).transpose(1, 2, 0)).max()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["mobilevit", "mobilevit_v2"])
def test_equals_hugging_face(family, size):
    transformers = originals.import_transformers()
    spec = formats.published_spec(family, (256, 256))._replace(interpolation="bilinear", resize=288)
    processor = transformers.MobileViTImageProcessorPil(**formats.write_preprocessor(spec))
    picture, record = photograph(size)
    theirs = processor(picture, return_tensors="np")["pixel_values"][0]
    ours = evaluated(spec, record)
    assert levels_apart(ours[..., ::-1] if spec.channel_order == "bgr" else ours, theirs) <= 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("crop_pct", "resize", "side"), [(0.9, 284, 256), (0.888, 288, 256), (1.0, 384, 384)]
)
def test_equals_timm(crop_pct, resize, side, size):
    timm = originals.import_timm()
    torch = originals.import_torch()
    theirs = timm.data.create_transform(
        input_size=(3, side, side),
        interpolation="bicubic",
        crop_pct=crop_pct,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    spec = formats.published_spec("mobilevit_v2", (side, side))
    spec = spec._replace(interpolation="bicubic", resize=resize)
    picture, record = photograph(size)
    ours = evaluated(spec, record)
    theirs = theirs(picture)
    assert isinstance(theirs, torch.Tensor)
    # torchvision rounds half a pixel of an odd margin to even, cvnets and we round it down.
    margins = [length * resize // min(size) - side for length in size]
    down, right = (round(margin / 2) - margin // 2 for margin in margins)
    assert levels_apart(ours[down:, right:], theirs[:, : side - down, : side - right]) <= 1
