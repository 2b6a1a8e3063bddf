"""Losses and metrics against hand-computed numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilevit_jax.tasks import classification

LOGITS = jnp.array([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0], [5.0, 4.0, 6.0]])
BATCH = {"label": jnp.array([0, 1, 2], jnp.int32), "mask": jnp.array([True, True, False])}


def by_hand(logits, label, smoothing):
    logp = np.asarray(logits) - np.log(np.exp(np.asarray(logits)).sum())
    return -(1 - smoothing) * logp[label] - smoothing * logp.mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_mean_over_valid_examples(smoothing):
    task = classification.classification(label_smoothing=smoothing)
    want = np.mean([by_hand(LOGITS[i], i, smoothing) for i in (0, 1)])
    assert float(task.loss({"logits": LOGITS}, BATCH)) == pytest.approx(want, rel=1e-6)


def test_sums_leave_out_padding_and_smoothing():
    task = classification.classification(label_smoothing=0.1)
    totals = task.sums({"logits": LOGITS}, BATCH)
    assert float(totals["count"]) == 2
    assert float(totals["top1"]) == 1
    assert float(totals["top5"]) == 2
    want = by_hand(LOGITS[0], 0, 0) + by_hand(LOGITS[1], 1, 0)
    assert float(totals["loss"]) == pytest.approx(want, rel=1e-6)
    assert task.summarize(jax.device_get(totals)) == pytest.approx(
        {"loss": want / 2, "top1": 0.5, "top5": 1.0}
    )


def test_padding_may_hold_nan():
    task = classification.classification()
    logits = LOGITS.at[2].set(jnp.nan)
    assert all(np.isfinite(float(v)) for v in task.sums({"logits": logits}, BATCH).values())


def test_a_constant_output_scores_nothing():
    label = jnp.zeros(4, jnp.int32)
    assert float(classification.hits(jnp.ones((4, 10)), label, top=5).sum()) == 0
    assert float(classification.hits(jnp.full((4, 10), jnp.nan), label, top=5).sum()) == 0


def test_hits_by_rank():
    logits = jnp.array([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]] * 6)
    label = jnp.arange(6, dtype=jnp.int32)
    assert classification.hits(logits, label, top=5).tolist() == [1, 1, 1, 1, 1, 0]
    assert classification.hits(logits, label, top=1).tolist() == [1, 0, 0, 0, 0, 0]


def test_predict_gives_probabilities():
    task = classification.classification()
    probability = task.predict({"logits": LOGITS.astype(jnp.bfloat16)})["probability"]
    assert probability.dtype == jnp.float32
    np.testing.assert_allclose(probability.sum(axis=-1), 1.0, rtol=1e-6)


def test_smoothing_out_of_range():
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.0"):
        classification.classification(label_smoothing=1.0)


MIXED = {"partner": jnp.array([2, 0, 1], jnp.int32), "share": jnp.array([0.75, 1.0, 0.5])}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_a_mixed_batch(smoothing):
    task = classification.classification(label_smoothing=smoothing)
    first = 0.75 * by_hand(LOGITS[0], 0, smoothing) + 0.25 * by_hand(LOGITS[0], 2, smoothing)
    want = (first + by_hand(LOGITS[1], 1, smoothing)) / 2
    assert float(task.loss({"logits": LOGITS}, BATCH | MIXED)) == pytest.approx(want, rel=1e-6)


def test_gradient_of_a_mixed_batch_is_probability_less_target():
    task = classification.classification(label_smoothing=0.3)
    grad = jax.grad(lambda logits: task.loss({"logits": logits}, BATCH | MIXED))(LOGITS)
    # Smoothed on top of the mix; the third row is padding.
    target = 0.7 * np.array([[0.75, 0, 0.25], [0, 1, 0]]) + 0.1
    np.testing.assert_allclose(grad[:2], (jax.nn.softmax(LOGITS[:2]) - target) / 2, rtol=1e-5)
    assert not grad[2].any()


@pytest.mark.parametrize("arguments", [{}, {"mix_probability": 1.0, "erasing_scale": (0.1, 0.2)}])
def test_by_default_nothing_is_mixed(arguments):
    batch = BATCH | {"image": jnp.ones((3, 4, 4, 3))}
    task = classification.classification(**arguments)
    assert task.mix(batch, jax.random.key(0)) is batch
    # Nor is anything drawn, once compiled.
    assert "threefry" not in jax.jit(task.mix).lower(batch, jax.random.key(0)).as_text()


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        ({"random_erasing": 1.0}, set()),
        ({"mixup": 0.2}, {"partner", "share"}),
        ({"cutmix": 1.0, "random_erasing": 1.0}, {"partner", "share"}),
    ],
)
def test_what_is_asked_for_changes_the_batch(arguments, keys):
    batch = BATCH | {"image": jnp.arange(3.0).reshape(3, 1, 1, 1) + jnp.ones((3, 16, 16, 3))}
    batch["mask"] = jnp.ones(3, bool)
    task = classification.classification(mix_probability=1.0, **arguments)
    mixed = task.mix(batch, jax.random.key(0))
    assert set(mixed) - set(batch) == keys
    assert (mixed["image"] != batch["image"]).any()
    assert mixed["label"] is batch["label"] and mixed["mask"] is batch["mask"]


def test_mixing_does_not_change_what_is_erased():
    batch = BATCH | {"image": jnp.ones((3, 16, 16, 3))}
    erase = classification.classification(random_erasing=0.5)
    both = classification.classification(random_erasing=0.5, mixup=0.2, mix_probability=0.0)
    for seed in range(4):
        rng = jax.random.key(seed)
        np.testing.assert_array_equal(erase.mix(batch, rng)["image"], both.mix(batch, rng)["image"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mixup", -0.1),
        ("cutmix", float("nan")),
        ("mix_probability", 1.5),
        ("random_erasing", -1.0),
        ("erasing_scale", (0.3, 0.2)),
        ("erasing_scale", (0.0, 1.0)),
        ("erasing_ratio", (0.0, 2.0)),
    ],
)
def test_mixing_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} is {re.escape(str(value))}; it must be"):
        classification.classification(**{name: value})
