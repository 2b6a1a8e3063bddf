"""Accuracy, calibration and corruption errors against hand-computed numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilevit_jax.tasks import classification, scores


def scored(answers, *, classes=None, group=None, groups=("",), baselines=None):
    answers = np.array(answers)
    return scores.with_scores(
        classification.classification(label_smoothing=0.1),
        answers=answers,
        classes=classes,
        group=np.zeros(len(answers), int) if group is None else np.array(group),
        groups=groups,
        baselines=baselines or {},
    )


def summary(task, logits, label, mask=None):
    batch = {
        "label": jnp.array(label, jnp.int32),
        "mask": jnp.ones(len(label), bool) if mask is None else jnp.array(mask),
    }
    totals = jax.device_get(jax.jit(task.sums)({"logits": jnp.asarray(logits)}, batch))
    return task.summarize(totals)


def logits_of(probabilities):
    return np.log(np.array(probabilities, np.float32))


def test_with_one_answer_a_label_it_is_what_classification_says():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(40, 12)).astype(np.float32), rng.integers(0, 12, 40)
    mask = np.arange(40) < 33
    plain = classification.classification()
    want = summary(plain, logits, label, mask)
    got = summary(scored(np.arange(12)[:, None]), logits, label, mask)
    ece = got.pop("ece")
    assert 0 < ece < 1
    assert got.pop("loss") == pytest.approx(want.pop("loss"), rel=1e-6)
    assert got == want


def test_ece_by_hand():
    # Confidence 0.7 is in bin (10/15, 11/15], 0.72 as well, 0.9 in (13/15, 14/15].
    probabilities = [[0.7, 0.2, 0.1], [0.14, 0.72, 0.14], [0.05, 0.05, 0.9], [0.9, 0.06, 0.04]]
    got = summary(scored([[0], [1], [2]]), logits_of(probabilities), [0, 0, 2, 0])
    # Bin 10: one of two right at 1.42 in sum; bin 13: two of two right at 1.8.
    assert got["ece"] == pytest.approx((abs(1 - 1.42) + abs(2 - 1.8)) / 4, rel=1e-5)
    assert got["top1"] == 0.75


def test_a_bin_holds_its_upper_edge_and_opposite_errors_cancel_within_one_only():
    task = scored([[0], [1], [2]])
    batch = {"label": jnp.array([0, 1, 0], jnp.int32), "mask": jnp.ones(3, bool)}
    # 1 is in the last bin; 0.5 + eps of float32 in bin 7.
    logits = jnp.array([[200.0, 0, 0], [200.0, 0, 0], [0.0, 0.0, -200.0]])
    totals = jax.device_get(task.sums({"logits": logits}, batch))
    np.testing.assert_array_equal(totals["confidence_bins"].nonzero()[0], [7, 14])
    assert totals["confidence_bins"][14] == 2
    assert totals["top1_bins"][14] == 1
    assert task.summarize(totals)["ece"] == pytest.approx((1 + 0.5) / 3)


def test_any_of_several_answers_is_right_and_none_does_not_count():
    answers = [[0, -1], [1, 2], [-1, -1]]
    probabilities = [[0.2, 0.3, 0.5], [0.6, 0.1, 0.3], [0.8, 0.1, 0.1], [0.8, 0.1, 0.1]]
    got = summary(scored(answers), logits_of(probabilities), [1, 1, 0, 2])
    assert got["top1"] == pytest.approx(2 / 3)
    want = -(math.log(0.8) + math.log(0.4) + math.log(0.8)) / 3
    assert got["loss"] == pytest.approx(want, rel=1e-5)


def test_the_fifth_place_with_several_answers():
    logits = np.array([[9.0, 8, 7, 6, 5, 4, 3]])
    assert summary(scored([[5, 4]]), logits, [0])["top5"] == 1
    assert summary(scored([[5, 6]]), logits, [0])["top5"] == 0


def test_the_subset_chooses_among_its_classes():
    logits = np.array([[1.0, 9, 8, 7, 6, 5, 4], [0.0, 9, 8, 7, 6, 5, 4]])
    task = scored(np.arange(7)[:, None], classes=np.array([0, 6]))
    got = summary(task, logits, [6, 0])
    assert (got["top1"], got["top5"]) == (0, 0)
    assert (got["top1_subset"], got["top5_subset"]) == (0.5, 1)


def test_padding_may_hold_nan_and_nan_is_never_right():
    logits = np.array([[2.0, 1, 0], [np.nan] * 3])
    task = scored(np.arange(3)[:, None], classes=np.array([0, 2]))
    got = summary(task, logits, [0, 0], [True, False])
    assert got["top1"] == got["top1_subset"] == 1
    assert all(map(math.isfinite, got.values()))
    got = summary(task, logits[1:], [0])
    assert got["top1"] == got["top1_subset"] == 0


def test_corruption_errors_by_hand():
    groups = ("blur", "blur", "fog", "snow")
    # Labels 2g and 2g + 1 are classes 0 and 1 in group g.
    task = scored(
        [[k % 2] for k in range(8)],
        group=[k // 2 for k in range(8)],
        groups=groups,
        baselines={"fog": 0.5, "snow": 0.8},
    )
    right, wrong = [3.0, 1.0], [1.0, 3.0]
    logits = [right, wrong, wrong, right, right, wrong, right, right, wrong]
    label = [0, 0, 0, 2, 2, 4, 4, 6, 6]
    got = summary(task, logits, label)
    # Severities count alike, whatever their number of images.
    assert got["error/blur"] == pytest.approx((2 / 3 + 0) / 2)
    assert got["error/fog"] == got["error/snow"] == 0.5
    assert got["corruption_error"] == 0.5
    assert got["mce"] == pytest.approx((0.5 / 0.5 + 0.5 / 0.8) / 2)
    assert got["top1"] == pytest.approx(5 / 9)
