"""Folded batch norms: the same outputs, and nothing left of the norm but an offset."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilevit_jax import tree
from mobilevit_jax.models import layers, zoo
from mobilevit_jax.models.folding import UNIT_VARIANCE, complete, fold_norms
from tests.weights import random_variables

NETWORKS = [
    ("mobilevit", {"variant": "xxs"}),
    ("mobilevit_v2", {"width": 0.5}),
    ("mobilenet_v1", {"width": 0.25}),
    ("mobilenet_v2", {"width": 0.25}),
    ("mobilenet_v3", {"variant": "small"}),
]


@pytest.mark.parametrize(("family", "fields"), NETWORKS)
def test_outputs_are_the_same_and_no_factor_is_left(family, fields):
    model = zoo.create(family, num_classes=7, **fields)
    variables = random_variables(model, seed=3)
    folded = complete(fold_norms(variables))
    assert tree.difference(variables, folded) == []
    image = jnp.asarray(np.random.default_rng(0).random((2, 64, 64, 3), np.float32))
    run = jax.jit(lambda variables: model.apply(variables, image)["logits"])
    expected, found = run(variables), run(folded)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=1e-5)

    statistics = tree.flatten(folded["batch_stats"])
    assert len(statistics) > 20
    for path, values in statistics.items():
        assert np.all(values == (0 if path.endswith("mean") else UNIT_VARIANCE))
        assert values.dtype == np.float32
    norms = {path.rpartition("/")[0] for path in statistics}
    assert all(np.all(tree.flatten(folded["params"])[f"{path}/scale"] == 1) for path in norms)


def test_the_variance_left_makes_the_factor_exactly_one():
    norm = layers.BatchNorm()
    x = jnp.asarray([[0.1, -3.7e5, 1e-20]])
    ones, zeros = jnp.ones(3), jnp.zeros(3)
    variables = {
        "params": {"scale": ones, "bias": zeros},
        "batch_stats": {"mean": zeros, "var": jnp.full(3, UNIT_VARIANCE)},
    }
    np.testing.assert_array_equal(norm.apply(variables, x, train=False), x)


def test_by_hand():
    params = {
        "stem": {
            "conv": {"kernel": np.full((1, 1, 1, 2), 3.0, np.float32)},
            "norm": {
                "scale": np.asarray([2.0, 1.0], np.float32),
                "bias": np.asarray([0.5, 0.0], np.float32),
            },
        },
        "head": {"kernel": np.ones((2, 1), np.float32)},
    }
    norm = {
        "mean": np.asarray([1.0, -2.0], np.float32),
        "var": np.asarray([4.0, 0.25], np.float32) - np.float32(layers.NORM_EPSILON),
    }
    folded = fold_norms({"params": params, "batch_stats": {"stem": {"norm": norm}}})
    # Factors 2 / 2 and 1 / 0.5; offsets 0.5 - 1 * 1 and 0 + 2 * 2.
    np.testing.assert_allclose(folded["stem"]["conv"]["kernel"].ravel(), [3.0, 6.0], rtol=1e-6)
    np.testing.assert_allclose(folded["stem"]["norm"]["bias"], [-0.5, 4.0], rtol=1e-6)
    assert set(folded["stem"]["norm"]) == {"bias"}
    assert folded["head"] is params["head"]
    assert params["stem"]["norm"]["scale"][0] == 2  # the given ones are left as they were
