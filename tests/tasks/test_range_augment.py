"""The augmentation's loss and its curriculum: hand-computed numbers, and PyTorch's."""

import jax.numpy as jnp
import numpy as np
import pytest

from mobilevit_jax.tasks import classification, range_augment
from tests import originals

TASK = classification.classification(label_smoothing=0.1)


@pytest.mark.parametrize(
    ("psnr", "error"), [(40.0, 6.5025), (30.0, 65.025), (20.0, 650.25), (10.0, 6502.5)]
)
def test_errors_of_ratios(psnr, error):
    assert range_augment.mse(psnr) == pytest.approx(error)


def test_curriculum():
    """65.025 - 29.26125 (1 + cos(pi e / 4)) in the three epochs: the error, not the ratio."""
    curve = range_augment.target_mse((40.0, 30.0), epoch_starts=[0, 10, 25])
    steps = np.array([0, 9, 10, 24, 25, 99])
    want = [6.5025, 6.5025, 15.0728, 15.0728, 35.76375, 35.76375]
    np.testing.assert_allclose(curve(steps), want, rtol=1e-5)
    # In 300 epochs: half-way after 150.5 of them, and nearly there in the last.
    curve = range_augment.target_mse((40.0, 20.0), epoch_starts=range(300))
    assert float(curve(150)) == pytest.approx(328.376 - 321.874 * 0.005218, abs=2e-3)
    assert float(curve(299)) == pytest.approx(650.25 - 321.874 * 2.1783e-4, abs=2e-3)


@pytest.mark.parametrize("psnr", [(40.0,), (40.0, 30.0, 20.0), (-1.0, 30.0)])
def test_ratios_that_are_none(psnr):
    with pytest.raises(ValueError, match="must be two ratios in dB"):
        range_augment.target_mse(psnr, epoch_starts=[0])


def test_loss_by_hand():
    """Changes of 2 in 255 are an error of 4: off by 2.5 and by 0.5 from the targets."""
    image = jnp.full((3, 4, 4, 3), 0.5)
    augmented = image + 2.0 / 255.0
    got = range_augment.augmentation_loss(image, augmented, jnp.array([6.5, 4.5, 4.0]))
    want = [2.0 * 100 / 65025, 0.125 * 100 / 65025, 0.0]
    np.testing.assert_allclose(got, want, atol=1e-7)


def test_loss_is_that_of_torch():
    torch = originals.import_torch()
    image, augmented = np.random.default_rng(0).random((2, 6, 5, 4, 3), np.float32)
    augmented = 0.9 * image + 0.1 * augmented
    error = torch.from_numpy(((augmented - image) * 255) ** 2).mean((1, 2, 3))
    target = error + torch.tensor([-300.0, -0.9, -0.1, 0.2, 0.99, 300.0])
    want = torch.nn.functional.smooth_l1_loss(error, target, reduction="none") * 100 / 65025
    got = range_augment.augmentation_loss(
        jnp.asarray(image), jnp.asarray(augmented), jnp.asarray(target.numpy())
    )
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-8)


def test_it_is_added_to_the_loss_of_the_task():
    image = jnp.full((3, 4, 4, 3), 0.5)
    batch = {
        "image": image,
        "label": jnp.array([0, 1, 2], jnp.int32),
        "mask": jnp.array([True, True, False]),
        "step": jnp.full(3, 12, jnp.int32),
    }
    change = jnp.array([0.0, 10.0, 99.0])[:, None, None, None] / 255
    outputs = {"logits": jnp.eye(3) * 2, "augmented_image": image + change}
    target = range_augment.target_mse((40.0, 30.0), epoch_starts=[0, 10, 25])
    task = range_augment.with_augmentation_loss(TASK, target=target, weight=3.0)
    # In epoch 1 the target is 15.0728; the third image does not count.
    added = 3.0 * ((15.0728 - 0.5) + (100 - 15.0728 - 0.5)) / 2 * 100 / 65025
    want = float(TASK.loss(outputs, batch)) + added
    assert float(task.loss(outputs, batch)) == pytest.approx(want, rel=1e-5)
    assert task._replace(loss=None) == TASK._replace(loss=None)
    with pytest.raises(ValueError, match="weight is -1"):
        range_augment.with_augmentation_loss(TASK, target=target, weight=-1)
