"""Learned augmentation: its ranges at the start, each operation, halves, orders and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilevit_jax import optim, steps
from mobilevit_jax.models import range_augment
from mobilevit_jax.models.distillation import TEACHER, Distillation
from mobilevit_jax.models.range_augment import PARAMS, RangeAugment, Ranges, augment
from tests.nets import Tiny

OPERATIONS = ("brightness", "contrast", "noise")


def images(count, size=8):
    return jnp.asarray(np.random.default_rng(0).random((count, size, size, 3), np.float32)) * 0.4


def fixed(**magnitudes):
    """Ranges of one magnitude only, or of the two given."""
    pairs = {n: m if isinstance(m, tuple) else (m, m) for n, m in magnitudes.items()}
    return {name: (jnp.float32(low), jnp.float32(high)) for name, (low, high) in pairs.items()}


def changed_rows(image, augmented):
    return np.flatnonzero(np.any(np.asarray(image != augmented), axis=(1, 2, 3)))


def test_ranges_at_the_start():
    ranges, variables = Ranges(OPERATIONS).init_with_output(jax.random.key(0))
    # 0.1 + 0.8 sigmoid(0.5), 1.1 + 8.9 sigmoid(1.5); 5e-5 sigmoid(0), 1e-4 + 0.9999 sigmoid(0.1).
    want = {
        "brightness": (0.59797, 8.37637),
        "contrast": (0.59797, 8.37637),
        "noise": (2.5e-5, 0.525027),
    }
    assert {name: tuple(map(float, pair)) for name, pair in ranges.items()} == {
        name: pytest.approx(pair, rel=1e-5) for name, pair in want.items()
    }
    raw = {name: (leaf.shape, float(leaf)) for name, leaf in variables["params"].items()}
    assert raw == {
        "brightness_low": ((), 0.5),
        "brightness_high": ((), 1.5),
        "contrast_low": ((), 0.5),
        "contrast_high": ((), 1.5),
        "noise_low": ((), 0.0),
        "noise_high": ((), pytest.approx(0.1)),
    }


def test_the_scalars_decay_where_what_has_one_axis_does_not():
    params = steps.init_variables(RangeAugment(Tiny()), 0, (8, 8))["params"]
    mask = optim.decay_mask(params, decay_1d=False)
    assert all(mask[PARAMS].values())
    assert not mask["head"]["bias"]


@pytest.mark.parametrize(("count", "half"), [(1, 1), (2, 1), (5, 2), (8, 4)])
def test_half_of_the_batch_is_changed_and_the_rest_is_not(count, half):
    image = images(count)
    augmented = augment(image, fixed(brightness=0.5), jax.random.key(0))
    rows = changed_rows(image, augmented)
    assert len(rows) == half
    np.testing.assert_allclose(augmented[rows], 0.5 * image[rows], rtol=1e-6)


def test_contrast_moves_pixels_from_the_mean_of_their_channel():
    image = jnp.array([[[[0.2, 0.5, 0.0]], [[0.4, 0.5, 0.9]]]])  # 1 2 1 3: means 0.3, 0.5, 0.45
    augmented = augment(image, fixed(contrast=2.0), jax.random.key(0))
    # -mean + 2 x, clipped: 0.1 and 0.5, 0.5 twice, -0.45 and 1.35.
    want = [[[[0.1, 0.5, 0.0]], [[0.5, 0.5, 1.0]]]]
    np.testing.assert_allclose(augmented, want, atol=1e-6)


def test_noise_is_normal_with_the_magnitude_as_deviation():
    image = jnp.full((4, 64, 64, 3), 0.5)
    augmented = augment(image, fixed(noise=0.1), jax.random.key(0))
    added = np.asarray(augmented - image)[changed_rows(image, augmented)]
    assert len(added) == 2
    assert added.mean() == pytest.approx(0.0, abs=0.003)
    assert added.std() == pytest.approx(0.1, rel=0.02)
    assert np.mean(np.abs(added) < 0.1) == pytest.approx(0.6827, abs=0.01)
    assert np.abs(np.corrcoef(added.reshape(2, -1))[0, 1]) < 0.03


def test_every_image_has_a_magnitude_of_its_own():
    image = images(64)
    augmented = augment(image, fixed(brightness=(0.2, 0.8)), jax.random.key(0))
    rows = changed_rows(image, augmented)
    ratio = np.asarray(augmented[rows].sum((1, 2, 3)) / image[rows].sum((1, 2, 3)))
    assert 0.2 <= ratio.min() < 0.3
    assert 0.7 < ratio.max() <= 0.8
    assert len(np.unique(ratio.round(5))) == 32


def test_orders_and_halves_are_drawn_anew():
    # Blackened last, an image is black; before the noise, it is noise.
    image, ranges = images(1), fixed(brightness=0.0, noise=0.1)
    draw = jax.jit(lambda seed: augment(image, ranges, jax.random.key(seed)))
    black = [bool(jnp.all(draw(seed) == 0.0)) for seed in range(20)]
    assert 3 < sum(black) < 17
    image, ranges = images(8), fixed(brightness=0.5)
    draw = jax.jit(lambda seed: augment(image, ranges, jax.random.key(seed)))
    rows = {tuple(changed_rows(image, draw(seed))) for seed in range(10)}
    assert len(rows) > 5
    # Two operations have different halves: both, one or none of them meet an image.
    ranges = fixed(brightness=0.5, contrast=0.0)
    flat = jax.jit(augment)(image, ranges, jax.random.key(1))
    is_flat = np.asarray(flat.std((1, 2)).max(-1) < 1e-6)
    is_dark = np.asarray(flat.mean((1, 2, 3)) < 0.75 * image.mean((1, 2, 3)))
    assert is_flat.sum() == is_dark.sum() == 4
    assert (is_flat != is_dark).any()


def test_gradients_reach_the_ranges():
    model = RangeAugment(Tiny())
    variables = steps.init_variables(model, 0, (8, 8))
    image = images(4)

    @jax.jit
    def mean(ranges):
        params = variables["params"] | {PARAMS: ranges}
        outputs, _ = model.apply(
            variables | {"params": params},
            image,
            train=True,
            mutable=["batch_stats"],
            rngs={"augment": jax.random.key(3)},
        )
        return outputs["augmented_image"].mean()

    ranges = variables["params"][PARAMS]
    gradient = jax.jit(jax.grad(mean))(ranges)
    for name in ranges:
        up, down = (mean(ranges | {name: ranges[name] + d}) for d in (1e-2, -1e-2))
        assert float(gradient[name]) == pytest.approx(float(up - down) / 2e-2, abs=2e-4, rel=0.02)
    assert sum(abs(float(value)) > 1e-3 for value in gradient.values()) >= 4


def test_in_evaluation_there_is_none():
    model = RangeAugment(Tiny())
    variables = steps.init_variables(model, 0, (8, 8))
    outputs = model.apply(variables, images(4))
    assert outputs.keys() == {"logits"}
    own = {name: value for name, value in variables["params"].items() if name != PARAMS}
    want = Tiny().apply(variables | {"params": own}, images(4))
    np.testing.assert_array_equal(outputs["logits"], want["logits"])
    jax.tree.map(
        np.testing.assert_array_equal, own, steps.init_variables(Tiny(), 0, (8, 8))["params"]
    )


def test_student_and_teacher_see_the_same_augmented_image():
    model = RangeAugment(Distillation(Tiny(), Tiny()))
    variables = steps.init_variables(model, 0, (8, 8))
    weights = steps.init_variables(Tiny(), 1, (8, 8))
    variables |= {TEACHER: {"variables": weights}}
    outputs, _ = model.apply(
        variables,
        images(4),
        train=True,
        mutable=["batch_stats"],
        rngs={"augment": jax.random.key(0)},
    )
    want = Tiny().apply(weights, outputs["augmented_image"])["logits"]
    np.testing.assert_array_equal(outputs["teacher_logits"], want)
    assert len(changed_rows(images(4), outputs["augmented_image"])) > 0


@pytest.mark.parametrize("operations", [(), ("brightness", "hue")])
def test_operations_that_there_are_not(operations):
    with pytest.raises(ValueError, match="choose from brightness, contrast, noise"):
        steps.init_variables(RangeAugment(Tiny(), operations), 0, (8, 8))


def test_the_table_is_the_published_one():
    assert range_augment.OPERATIONS.keys() == set(OPERATIONS)
