"""Losses and metrics against hand-computed numbers."""

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
