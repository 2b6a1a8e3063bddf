"""Norms, initial weights and blocks against hand numbers and plain definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mobilevit_jax import tree
from mobilevit_jax.models.layers import (
    BatchNorm,
    Conv,
    ConvNorm,
    GroupNorm,
    InvertedResidual,
    Linear,
    bound,
    make_divisible,
)


def normal(*shape, mean=0.0, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(mean, 1, shape), jnp.float32)


@pytest.mark.parametrize(
    ("value", "options", "want"),
    [
        (24.0, {}, 24),
        (27.9, {}, 24 + 8),  # 24 would lose more than a tenth
        (28.0, {}, 32),
        (8.5, {}, 8),
        (3.0, {}, 8),
        (11.0, {"minimum": 16}, 16),
        (112.0, {"divisor": 16}, 112),
        (39.0, {"divisor": 16}, 48),
        (66.0, {"divisor": 16}, 64),
    ],
)
def test_make_divisible(value, options, want):
    assert make_divisible(value, **options) == want


def test_bound():
    assert [bound(value, 16, 64) for value in (8, 16.5, 100)] == [16, 16.5, 64]


# --- norms ----------------------------------------------------------------------------------------


def test_batch_norm_stores_the_unbiased_variance():
    x = jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)  # mean 2, biased variance 1, unbiased 2
    variables = BatchNorm().init(jax.random.key(0), x, train=True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], [0])  # init changes nothing
    y, updated = BatchNorm().apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y.ravel(), np.array([-1, 1]) / np.sqrt(1 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], [0.9 * 0 + 0.1 * 2], rtol=1e-6)
    np.testing.assert_allclose(updated["batch_stats"]["var"], [0.9 * 1 + 0.1 * 2], rtol=1e-6)
    y = BatchNorm().apply({**variables, **updated}, x, train=False)
    want = (np.array([1, 3]) - 0.2) / np.sqrt(1.1 + 1e-5)
    np.testing.assert_allclose(y.ravel(), want, rtol=1e-6)


def test_batch_norm_refuses_to_train_on_one_value():
    with pytest.raises(ValueError, match=r"shape \(1, 1, 1, 3\).*larger batch"):
        BatchNorm().init(jax.random.key(0), jnp.zeros((1, 1, 1, 3)), train=True)
    BatchNorm().init(jax.random.key(0), jnp.zeros((1, 1, 1, 3)), train=False)


def definition(params, x, *, axes, activation):
    x = x.astype(jnp.float32)
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return activation((x - mean) / jnp.sqrt(variance + 1e-5) * params["scale"] + params["bias"])


NORMS = {
    "batch": (BatchNorm(), (0, 1, 2), lambda x: x),
    "batch and silu": (BatchNorm(nn.silu), (0, 1, 2), nn.silu),
    "batch and relu6": (BatchNorm(nn.relu6), (0, 1, 2), nn.relu6),
    "group": (GroupNorm(), (1, 2, 3), lambda x: x),
}


def norm_case(name, dtype):
    module, axes, activation = NORMS[name]
    x, weight = normal(4, 5, 3, 8, mean=2), normal(4, 5, 3, 8, seed=1)
    params = {"scale": 1 + 0.3 * normal(8, seed=2), "bias": 0.3 * normal(8, seed=3)}
    module = module.clone(dtype=dtype)

    def apply(params, x):
        if isinstance(module, GroupNorm):
            return module.apply({"params": params}, x)
        stats = {"mean": jnp.zeros(8), "var": jnp.ones(8)}
        variables = {"params": params, "batch_stats": stats}
        return module.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    plain = functools.partial(definition, axes=axes, activation=activation)
    return apply, plain, params, x, weight


@pytest.mark.parametrize("name", sorted(NORMS))
def test_norm_and_its_gradients_equal_the_definition(name):
    apply, plain, params, x, weight = norm_case(name, jnp.float32)

    def value_and_gradients(function):
        y, pullback = jax.vjp(function, params, x)
        return y, pullback(weight)

    results = [jax.jit(value_and_gradients, static_argnums=0)(f) for f in (apply, plain)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


@pytest.mark.parametrize("name", ["batch and silu", "group"])
def test_norm_computes_in_float32_whatever_its_output(name):
    apply, plain, params, x, weight = norm_case(name, jnp.bfloat16)
    x = x.astype(jnp.bfloat16)
    y, pullback = jax.vjp(apply, params, x)
    want, want_pullback = jax.vjp(plain, params, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=1.2e-2, atol=1e-2)
    (got, _), (want, _) = pullback(weight.astype(jnp.bfloat16)), want_pullback(weight)
    for key in want:
        assert got[key].dtype == jnp.float32
        error = np.linalg.norm(got[key] - want[key]) / np.linalg.norm(want[key])
        assert error < 1e-2


def test_a_large_mean_does_not_cost_the_variance_its_digits():
    x = normal(64, 4, 4, 3) * 0.1 + 1000
    y = GroupNorm().init_with_output(jax.random.key(0), x)[0]
    np.testing.assert_allclose(y.std((1, 2, 3)), 1, rtol=1e-3)


def test_group_norm_is_not_a_norm_per_position():
    x = normal(2, 4, 4, 6) + normal(4, 1, seed=1)
    y = GroupNorm().init_with_output(jax.random.key(0), x)[0]
    np.testing.assert_allclose(y.mean((1, 2, 3)), 0, atol=1e-5)
    assert np.abs(y.mean(-1)).max() > 0.5


# --- weights at the start -------------------------------------------------------------------------


def started(module, channels, seed=0):
    x = jnp.zeros((1, 4, 4, channels))
    return module.init(jax.random.key(seed), x)["params"]


def check_uniform(weights, limit):
    weights = np.asarray(weights)
    assert np.abs(weights).max() < limit
    assert np.abs(weights).max() > 0.98 * limit
    np.testing.assert_allclose(weights.std(), limit / 3**0.5, rtol=0.03)
    np.testing.assert_allclose(weights.mean(), 0, atol=4 * limit / weights.size**0.5)


def test_convolutions_start_as_in_pytorch():
    params = started(Conv(400, use_bias=True), 30)
    check_uniform(params["kernel"], 1 / (9 * 30) ** 0.5)
    check_uniform(params["bias"], 1 / (9 * 30) ** 0.5)
    check_uniform(started(Conv(2048, groups=2048), 2048)["kernel"], 1 / 3)
    check_uniform(started(Conv(300, kernel_size=1), 64)["kernel"], 1 / 8)
    params = started(Linear(1000), 96)
    check_uniform(params["kernel"], (6 / 1096) ** 0.5)
    np.testing.assert_array_equal(params["bias"], 0)


def test_convolutions_start_as_the_recipes_say():
    params = started(Conv(400, use_bias=True, weight_init="kaiming"), 30)
    np.testing.assert_allclose(params["kernel"].std(), (2 / (9 * 400)) ** 0.5, rtol=0.02)
    np.testing.assert_array_equal(params["bias"], 0)
    kernel = started(Conv(4096, groups=4096, weight_init="kaiming"), 4096)["kernel"]
    np.testing.assert_allclose(kernel.std(), (2 / (9 * 4096)) ** 0.5, rtol=0.02)
    # Fourth moment: a normal distribution, not a uniform one.
    np.testing.assert_allclose((kernel**4).mean() / kernel.var() ** 2, 3, rtol=0.1)
    kernel = started(Linear(1000, weight_init="kaiming"), 96)["kernel"]
    np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.02)


def test_weights_at_the_start_are_independent():
    kernels = [started(Conv(64), 64, seed=seed)["kernel"].ravel() for seed in range(8)]
    kernel = np.asarray(kernels[0]).reshape(-1, 64)
    samples = [*kernels, *(np.roll(kernels[0], shift) for shift in (1, 2, 64, 4096))]
    correlations = np.corrcoef(samples) - np.eye(len(samples))
    assert np.abs(correlations).max() < 5 / kernels[0].size ** 0.5
    spectrum = np.linalg.svd(kernel, compute_uv=False) / kernel.std()
    low, high = 576**0.5 - 64**0.5, 576**0.5 + 64**0.5  # edges of the Marchenko-Pastur law
    assert low * 0.95 < spectrum.min()
    assert spectrum.max() < high * 1.05
    again = started(Conv(64), 64, seed=0)["kernel"].ravel()
    np.testing.assert_array_equal(again, kernels[0])


# --- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stride", "features", "expansion", "added"),
    [(1, 8, 2, True), (1, 16, 2, False), (2, 8, 2, False), (1, 8, 1, True)],
)
def test_inverted_residual_adds_its_input_where_the_shape_is_kept(
    stride, features, expansion, added
):
    x = normal(2, 6, 6, 8)
    block = InvertedResidual(features, stride=stride, expansion=expansion)
    variables = block.init(jax.random.key(0), x, train=False)
    flat = tree.flatten(variables["params"])
    assert ("expand/conv/kernel" in flat) == (expansion != 1)
    assert flat["depthwise/conv/kernel"].shape == (3, 3, 1, 8 * expansion)
    last = variables["params"]["project"]["norm"]
    last["scale"] = jnp.zeros_like(last["scale"])
    y = block.apply(variables, x, train=False)
    np.testing.assert_array_equal(y, x if added else np.zeros_like(y))


def test_a_stride_that_changes_no_shape_still_adds_nothing():
    block = InvertedResidual(8, stride=2)
    x = normal(2, 1, 1, 8)
    variables = block.init(jax.random.key(0), x, train=False)
    last = variables["params"]["project"]["norm"]
    last["scale"] = jnp.zeros_like(last["scale"])
    np.testing.assert_array_equal(block.apply(variables, x, train=False), np.zeros((2, 1, 1, 8)))


def test_expanded_channels_are_a_multiple_of_eight():
    block = InvertedResidual(24, expansion=2.5)
    shapes = jax.eval_shape(
        functools.partial(block.init, train=False), jax.random.key(0), jnp.zeros((1, 4, 4, 12))
    )
    assert shapes["params"]["expand"]["conv"]["kernel"].shape == (1, 1, 12, 32)


@pytest.mark.parametrize("fields", [{"kernel_size": 1}, {"groups": 8}, {"stride": 2}, {}])
def test_conv_norm_is_convolution_norm_activation(fields):
    x = normal(2, 5, 5, 8)
    module = ConvNorm(8, activation=nn.relu, **fields)
    variables = module.init(jax.random.key(0), x, train=False)
    kernel = variables["params"]["conv"]["kernel"]
    assert set(variables["params"]["conv"]) == {"kernel"}
    groups, pad = fields.get("groups", 1), (kernel.shape[0] - 1) // 2
    want = jax.lax.conv_general_dilated(
        x,
        kernel,
        (fields.get("stride", 1),) * 2,
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    want = np.maximum(want / np.sqrt(1 + 1e-5), 0)
    np.testing.assert_allclose(module.apply(variables, x, train=False), want, rtol=1e-5, atol=1e-6)
