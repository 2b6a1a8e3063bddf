"""Separable self-attention against the unfold, softmax, fold of the published code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilevit_jax import tree
from mobilevit_jax.models.attention import SeparableSelfAttention


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 6, 4, 8)), jnp.float32)
    shapes = jax.eval_shape(SeparableSelfAttention().init, jax.random.key(0), x)
    params = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), shapes)
    return x, params


def reference(x, params):
    """Literally: unfold to b p n d, attend over n, fold back. Returns the map and the scores."""
    b, h, w, d = x.shape
    tokens = np.zeros((b, 4, h // 2 * (w // 2), d))
    for p in range(4):
        for n in range(tokens.shape[2]):
            tokens[:, p, n] = np.asarray(x)[:, n // (w // 2) * 2 + p // 2, n % (w // 2) * 2 + p % 2]
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(params).items()}
    qkv = tokens @ flat["params/qkv/kernel"][0, 0] + flat["params/qkv/bias"]
    q, k, v = qkv[..., :1], qkv[..., 1 : 1 + d], qkv[..., 1 + d :]
    scores = np.exp(q - q.max(2, keepdims=True))
    scores /= scores.sum(2, keepdims=True)
    context = (scores * k).sum(2, keepdims=True)
    y = np.maximum(v, 0) * context
    y = y @ flat["params/out/kernel"][0, 0] + flat["params/out/bias"]
    out, score_map = np.zeros(x.shape), np.zeros((b, h, w))
    for p in range(4):
        for n in range(tokens.shape[2]):
            row, column = n // (w // 2) * 2 + p // 2, n % (w // 2) * 2 + p % 2
            out[:, row, column] = y[:, p, n]
            score_map[:, row, column] = scores[:, p, n, 0]
    return out, score_map


def test_separable_attention_equals_the_published_code(case):
    x, params = case
    y, state = SeparableSelfAttention().apply(params, x, mutable=["attention"])
    want, want_scores = reference(x, params)
    assert np.abs(y - want).max() <= 1e-5 * np.abs(want).max()
    (scores,) = state["attention"]["scores"]
    np.testing.assert_allclose(scores, want_scores, rtol=1e-5)
    positions = scores.reshape(2, 3, 2, 2, 2)
    np.testing.assert_allclose(positions.sum((1, 3)), 1, rtol=1e-5)


def test_pixel_positions_do_not_mix(case):
    x, params = case
    module = SeparableSelfAttention()
    changed = x.at[:, ::2, 1::2].add(1)  # the top right pixel of every patch
    difference = np.array(module.apply(params, changed) - module.apply(params, x))
    difference = np.abs(difference).max((0, 3))
    assert (difference[::2, 1::2] > 0).all()
    difference[::2, 1::2] = 0
    np.testing.assert_array_equal(difference, 0)


def test_scores_are_sown_only_when_asked_for(case):
    x, params = case
    assert set(SeparableSelfAttention().init(jax.random.key(0), x)) == {"params"}
    assert isinstance(SeparableSelfAttention().apply(params, x), jax.Array)


def test_attention_in_bfloat16_keeps_softmax_and_context_in_float32(case):
    x, params = case
    module = SeparableSelfAttention(dtype=jnp.bfloat16)
    x = jnp.asarray(x, jnp.bfloat16)
    y, state = module.apply(params, x, mutable=["attention"])
    (scores,) = state["attention"]["scores"]
    assert (y.dtype, scores.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(scores.reshape(2, 3, 2, 2, 2).sum((1, 3)), 1, rtol=1e-5)
    want, _ = reference(np.asarray(x, np.float32), params)
    error = np.linalg.norm(np.asarray(y, np.float32) - want) / np.linalg.norm(want)
    assert error < 2e-2
