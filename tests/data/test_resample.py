"""Pillow's resizing of our own: the same bits, whatever the sizes, filters and boxes."""

import logging

import numpy as np
import pytest
from PIL import Image

from mobilevit_jax import native
from mobilevit_jax.data import resample

FILTERS = [*resample.REACH]


@pytest.fixture
def compiled():
    if reason := resample.library().reason:
        pytest.skip(reason)


def pillow(
    pixels: np.ndarray,
    height: int,
    width: int,
    filtering: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    left, top, right, bottom = box or (0, 0, pixels.shape[1], pixels.shape[0])
    image = Image.fromarray(pixels)
    image = image.resize((width, image.height), filtering, (left, 0, right, image.height))
    return np.asarray(image.resize((width, height), filtering, (0, top, width, bottom)))


def noise(draws: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Black and white beside greys: sums beyond 0 and 255 with the filters that overshoot."""
    pixels = draws.integers(0, 256, (height, width, 3))
    return np.where(draws.random(pixels.shape) < 0.7, pixels // 128 * 255, pixels).astype(np.uint8)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("filtering", FILTERS)
def test_the_bits_are_pillows(filtering: Image.Resampling):
    draws = np.random.default_rng(0)
    for i in range(150):
        height, width, high, wide = draws.integers(1, (40, 300)[i % 2], 4).tolist()
        pixels = noise(draws, height, width)
        box = None
        if i % 3 == 0:
            left, top = (draws.random(2) * [width, height] * 0.5).tolist()
            right, bottom = ([width, height] - draws.random(2) * [width, height] * 0.4).tolist()
            box = left, top, right, bottom
        ours = resample.resize(pixels, high, wide, filtering, box)
        assert np.array_equal(ours, pillow(pixels, high, wide, filtering, box))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("filtering", FILTERS)
@pytest.mark.parametrize("sizes", [(1, 1, 7, 9), (1200, 3, 1, 2), (5, 2000, 300, 1), (9, 9, 9, 9)])
def test_extreme_sizes(sizes: tuple[int, int, int, int], filtering: Image.Resampling):
    height, width, high, wide = sizes
    pixels = noise(np.random.default_rng(1), height, width)
    ours = resample.resize(pixels, high, wide, filtering)
    assert np.array_equal(ours, pillow(pixels, high, wide, filtering))


@pytest.mark.usefixtures("compiled")
def test_views_of_larger_arrays():
    """What a decoder gives is often one; nothing beyond it may be looked at."""
    whole = noise(np.random.default_rng(2), 60, 80)
    views = [
        whole[10:50, 20:60],
        whole[::2, 3:],
        whole[:, ::-1],
        whole[::-1],
        whole[..., ::-1],
        whole.transpose(1, 0, 2),
        np.broadcast_to(whole[:1], (30, 80, 3)),
    ]
    for view in views:
        expected = pillow(np.ascontiguousarray(view), 31, 33, FILTERS[0])
        assert np.array_equal(resample.resize(view, 31, 33, FILTERS[0]), expected)


def test_without_a_compiler_pillow_resizes(monkeypatch, caplog):
    def fails(*args: object) -> None:
        raise native.BuildError("there is no compiler (cc)")

    pixels = noise(np.random.default_rng(3), 50, 40)
    for filtering in (*FILTERS, Image.Resampling.NEAREST):
        for box in (None, (3.5, 2.0, 30.0, 41.25)):
            before = resample.resize(pixels, 20, 30, filtering, box)
            with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
                patch.setattr(native, "compiled", fails)
                resample._library.cache_clear()
                assert np.array_equal(resample.resize(pixels, 20, 30, filtering, box), before)
            resample._library.cache_clear()
    assert "Pillow resizes the images, slower: there is no compiler (cc)" in caplog.text
