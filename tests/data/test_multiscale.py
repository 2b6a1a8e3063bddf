"""Sizes of steps: the published tables, running sums, and the same draw from any start."""

import itertools

import numpy as np
import pytest

from mobilevit_jax.data import multiscale
from mobilevit_jax.data.multiscale import Shape, Shapes

BASE = {"seed": 0, "multiple_of": 8}
V1 = {"size": (256, 256), "low": 160, "high": 320}
MOBILENET = {"size": (224, 224), "low": 128, "high": 320}


@pytest.mark.parametrize(
    ("arguments", "batch_size", "sides", "each"),
    [
        # Batches of one GPU of eight, as cvnets v0.3, v0.2 and v0.1 compute them.
        (V1, 1024, (160, 192, 256, 288, 320), (327, 227, 128, 101, 81)),
        (V1 | {"round_to": 8}, 1024, (160, 192, 256, 288, 320), (328, 224, 128, 104, 80)),
        (
            V1 | {"round_to": 8, "at_least_base": True},
            1024,
            (160, 192, 256, 288, 320),
            (328, 224, 128, 128, 128),
        ),
        (MOBILENET, 1024, (128, 192, 224, 288, 320), (392, 174, 128, 77, 62)),
        (MOBILENET | {"round_to": 8}, 1024, (128, 192, 224, 288, 320), (392, 176, 128, 80, 64)),
        (MOBILENET, 2048, (128, 192, 224, 288, 320), (784, 348, 256, 154, 125)),
        (MOBILENET, 4096, (128, 192, 224, 288, 320), (1568, 696, 512, 309, 250)),
    ],
)
def test_published_tables(arguments, batch_size, sides, each):
    shapes = multiscale.variable_batch(**BASE, **arguments, batch_size=batch_size)
    expected = [Shape(side, side, 8 * rows) for side, rows in zip(sides, each, strict=True)]
    assert list(shapes.table) == expected


@pytest.mark.parametrize(
    ("arguments", "low", "high"),
    [(V1, 922, 930), (V1 | {"round_to": 8, "at_least_base": True}, 852, 858)],
)
def test_steps_of_an_imagenet_epoch(arguments, low, high):
    """cvnets takes about 925 steps an epoch, its first version 855, where 1252 were of one size."""
    shapes = multiscale.variable_batch(**BASE, **arguments, batch_size=1024)
    assert low < shapes.steps(300 * 1_281_167) / 300 < high


def test_batches_do_not_depend_on_the_devices():
    asked = {**V1, "seed": 0, "batch_size": 1024}
    tables = [multiscale.variable_batch(**asked, multiple_of=parts).table for parts in (1, 2, 8)]
    assert tables[0] == tables[1] == tables[2]
    with pytest.raises(ValueError, match=r"at 160x160 the batch is 2616, .* divisible_by to 96"):
        multiscale.variable_batch(**asked, multiple_of=96)
    cut = multiscale.variable_batch(**asked, multiple_of=96, divisible_by=96)
    assert [shape.batch_size for shape in cut.table] == [2592, 1728, 960, 768, 576]
    assert multiscale.variable_batch(**asked, multiple_of=1, divisible_by=96) == cut


def test_every_shape_comes_as_often():
    table = (Shape(8, 8, 3), Shape(4, 4, 12), Shape(8, 4, 6))
    drawn = [Shapes(table, seed=1).at(step) for step in range(9000)]
    assert [abs(drawn.count(shape) - 3000) < 200 for shape in table] == [True] * 3
    assert drawn[:50] != [Shapes(table, seed=2).at(step) for step in range(50)]
    assert drawn[4096:4146] != drawn[:50]


def test_positions_are_running_sums():
    shapes = Shapes((Shape(8, 8, 3), Shape(4, 4, 11)), seed=5)
    sizes = [shapes.at(step).batch_size for step in range(9000)]
    sums = [0, *itertools.accumulate(sizes)]
    for step in (0, 1, 2, 4095, 4096, 4097, 8191, 8192, 9000):
        assert shapes.position(step) == sums[step]
    for examples in (1, 2, 3, 500, sums[4096] - 2, sums[4096], sums[4096] + 2, 60_000):
        nearest = shapes.steps(examples)
        distance = abs(sums[nearest] - examples)
        assert nearest == 1 or distance == min(abs(np.array(sums) - examples))
    assert shapes.steps(0) == 0


@pytest.mark.parametrize("table", [(Shape(8, 8, 3), Shape(4, 4, 11)), (Shape(8, 8, 7),)])
@pytest.mark.parametrize("num_examples", [5, 100, 10_000])
def test_an_epoch_starts_with_the_first_batch_that_begins_in_it(table, num_examples):
    shapes = Shapes(table, seed=3)
    epochs = 70_000 // num_examples
    starts = shapes.epoch_starts(num_examples, epochs)
    assert starts.shape == (epochs,) and starts[0] == 0
    begun = np.cumsum([0, *(shapes.at(step).batch_size for step in range(starts[-1]))])
    # In other words: the epoch of a step is that of the example it begins with.
    epoch = np.searchsorted(starts, np.arange(starts[-1] + 1), side="right") - 1
    np.testing.assert_array_equal(epoch, np.minimum(begun // num_examples, epochs - 1))


def test_epochs_of_variable_batches_take_about_855_steps():
    shapes = multiscale.variable_batch(
        **BASE, **V1, round_to=8, at_least_base=True, batch_size=1024
    )
    starts = shapes.epoch_starts(1_281_167, 301)
    lengths = np.diff(starts)
    assert 852 < lengths.mean() < 858
    assert lengths.min() < 840 and lengths.max() > 870
    # A run of 300 epochs has 300 of them.
    last = shapes.steps(300 * 1_281_167) - 1
    assert starts[299] < last <= starts[300]


def test_one_shape():
    shapes = multiscale.fixed(size=(32, 48), batch_size=24, seed=0, multiple_of=8)
    assert shapes == Shapes((Shape(32, 48, 24),))
    assert shapes.position(7) == 168
    assert [shapes.steps(n) for n in (0, 1, 24, 35, 37)] == [0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 0}, "low is 0, high 320, scales 5; 0 < low <= high"),
        ({"low": 330}, "low is 330"),
        ({"scales": 0}, "scales 0"),
        ({"batch_size": 30}, "a batch of 30 is no multiple of 8 replicas"),
        ({"divisible_by": 0}, "divisible_by is 0"),
        ({"batch_size": 8, "divisible_by": 16}, "at 192x192 the batch is 8 and divisible_by 16"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        multiscale.variable_batch(**(BASE | V1 | {"batch_size": 1024} | arguments))
    with pytest.raises(ValueError, match="a batch of 30 is no multiple of 8"):
        multiscale.fixed(size=(8, 8), batch_size=30, **BASE)
    with pytest.raises(ValueError, match="seed is -1"):
        Shapes((Shape(8, 8, 3),), seed=-1)
    with pytest.raises(ValueError, match="each needs a height"):
        Shapes(())
