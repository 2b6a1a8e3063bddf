"""Every kind of attention against its definition on tokens, unfolded by hand as `b p n d`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilevit_jax import steps, tree
from mobilevit_jax.models import zoo
from mobilevit_jax.models.attention import (
    ATTENTIONS,
    LinformerSelfAttention,
    MultiHeadSelfAttention,
    SeparableSelfAttention,
    kind,
)
from mobilevit_jax.models.mobilevit import MobileViTBlock
from mobilevit_jax.models.mobilevit_v2 import MobileViTV2Block

HEADS, LATENTS, WIDTH = 2, 3, 8


def unfold(x):
    """Pixel positions and patches, both row by row: b h w d -> b p n d."""
    b, h, w, d = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, d).transpose(0, 2, 4, 1, 3, 5).reshape(b, 4, -1, d)


def fold(tokens, h, w):
    b, _, _, d = tokens.shape
    tokens = tokens.reshape(b, 2, 2, h // 2, w // 2, d)
    return tokens.transpose(0, 3, 1, 4, 2, 5).reshape(b, h, w, d)


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 6, WIDTH), np.float32))


def started(module, x):
    """Its variables, none of them zero, and the same as numpy arrays by path."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    arrays = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32) / 2, shapes)
    return jax.tree.map(jnp.asarray, arrays), tree.flatten(arrays["params"])


def dot_product(x, flat, *, heads, mixed):
    """Attention of each pixel position and head by itself; `mixed` shortens keys and values."""
    tokens = unfold(np.asarray(x))
    q, k, v = np.split(tokens @ flat["qkv/kernel"] + flat["qkv/bias"], 3, axis=-1)
    y, scores = np.zeros_like(tokens), []
    d = x.shape[-1] // heads
    for head in range(heads):
        own = slice(head * d, (head + 1) * d)
        keys, values = mixed("key_tokens", k[..., own]), mixed("value_tokens", v[..., own])
        scores.append(softmax(q[..., own] @ keys.swapaxes(-1, -2) / np.sqrt(d), -1))
        y[..., own] = scores[-1] @ values
    y = y @ flat["out/kernel"] + flat["out/bias"]
    return fold(y, *x.shape[1:3]), np.stack(scores, axis=2)  # b p heads n m


def assert_attends(module, variables, x, want, want_scores):
    got, sown = module.apply(variables, x, mutable=["attention"])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    (scores,) = sown["attention"]["scores"]
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, want_scores, rtol=1e-4, atol=1e-6)


def test_multihead_is_dot_product_attention(x):
    module = MultiHeadSelfAttention(HEADS)
    variables, flat = started(module, x)
    want, scores = dot_product(x, flat, heads=HEADS, mixed=lambda name, tokens: tokens)
    np.testing.assert_allclose(scores.sum(-1), 1, rtol=1e-5)
    assert_attends(module, variables, x, want, scores)


def test_linformer_attends_to_mixtures_of_tokens(x):
    module = LinformerSelfAttention(HEADS, LATENTS)
    variables, flat = started(module, x)

    def mixed(name, tokens):
        return np.einsum("bpnd,nm->bpmd", tokens, flat[f"{name}/kernel"])

    want, scores = dot_product(x, flat, heads=HEADS, mixed=mixed)
    assert scores.shape == (2, 4, HEADS, 6, LATENTS)
    assert_attends(module, variables, x, want, scores)


def separable(x, previous, flat):
    kernels = np.split(flat["qkv/kernel"][0, 0], (1, 1 + WIDTH), axis=-1)
    biases = np.split(flat["qkv/bias"], (1, 1 + WIDTH))
    x, previous = np.asarray(x), np.asarray(previous)
    query, key = (unfold(previous) @ kernels[i] + biases[i] for i in (0, 1))
    scores = softmax(query, 2)  # b p n 1
    context = (key * scores).sum(2, keepdims=True)
    y = np.maximum(unfold(x) @ kernels[2] + biases[2], 0) * context
    y = y @ flat["out/kernel"][0, 0] + flat["out/bias"]
    return fold(y, *x.shape[1:3]), fold(scores, *previous.shape[1:3])[..., 0]


def test_separable_cross_attention_takes_only_values_from_its_input(x):
    module = SeparableSelfAttention()
    variables, flat = started(module, x)
    previous = jnp.asarray(np.random.default_rng(3).standard_normal((2, 6, 2, WIDTH), np.float32))
    apply = functools.partial(module.apply, mutable=["attention"])
    got, sown = apply(variables, x, previous)
    want, scores = separable(x, previous, flat)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sown["attention"]["scores"][0], scores, rtol=1e-4, atol=1e-6)

    across, _ = apply(variables, x, x)
    by_itself, _ = apply(variables, x)
    np.testing.assert_array_equal(across, by_itself)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("separable", 3 * WIDTH**2 + 4 * WIDTH + 1),
        ("multihead", 4 * WIDTH**2 + 4 * WIDTH),
        ("linformer", 4 * WIDTH**2 + 4 * WIDTH + 2 * 6 * LATENTS),
    ],
)
def test_all_kinds_are_built_and_called_alike(x, name, count):
    module = kind(name, heads=HEADS, latents=LATENTS)(weight_init="torch", dtype=jnp.bfloat16)
    y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    assert (y.shape, y.dtype) == (x.shape, jnp.bfloat16)
    assert set(variables) == {"params"}  # nothing that is sown is part of the weights
    assert tree.count(variables) == count
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize("block", [MobileViTBlock, MobileViTV2Block])
@pytest.mark.parametrize("name", sorted(ATTENTIONS))
def test_every_kind_fits_into_both_blocks(x, block, name):
    attention = kind(name, heads=HEADS, latents=LATENTS)
    block = block(WIDTH, attention_layers=2, self_attention=attention)
    init = functools.partial(block.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), x)
    paths = tree.flatten(variables["params"]["attention_1"]["attention"])
    assert ("key_tokens/kernel" in paths) == (name == "linformer")
    assert paths["qkv/kernel"].ndim == (4 if name == "separable" else 2)
    apply = functools.partial(block.apply, train=False, mutable=["attention"])
    y, sown = jax.eval_shape(apply, variables, x)
    assert y.shape == x.shape
    assert len(jax.tree.leaves(sown)) == 2  # a map from each attention layer


@pytest.mark.parametrize(
    ("family", "fields"), [("mobilevit", {"variant": "xxs"}), ("mobilevit_v2", {"width": 0.25})]
)
def test_the_config_chooses_the_kind(family, fields):
    choice = {"attention": "linformer", "heads": 2, "latents": LATENTS}
    model = zoo.create(family, num_classes=5, **fields, **choice)
    variables = steps.abstract_variables(model, (32, 64))
    paths = tree.flatten(variables["params"])
    for i, layers, tokens in ((3, 2, 8), (4, 4, 2), (5, 3, 1)):
        for k in range(layers):
            shape = paths[f"layer_{i}/mobilevit/attention_{k}/attention/key_tokens/kernel"].shape
            assert shape == (tokens, LATENTS)


def test_cost_of_linformer_counts_its_mixing():
    rows = {
        name: zoo.summary(
            zoo.create("mobilevit", num_classes=5, variant="xxs", attention=name, latents=LATENTS),
            size=(64, 64),
        )[-1]
        for name in ("multihead", "linformer")
    }
    # By layer: tokens at 64x64 pixels, width, attention layers; four pixel positions, two mixings.
    blocks = ((16, 64, 2), (4, 80, 4), (1, 96, 3))
    params = sum(2 * n * LATENTS * layers for n, _, layers in blocks)
    macs = sum(2 * 4 * n * d * LATENTS * layers for n, d, layers in blocks)
    assert rows["linformer"].params - rows["multihead"].params == params
    assert rows["linformer"].macs - rows["multihead"].macs == macs


def test_unusable_choices_are_refused(x):
    with pytest.raises(ValueError, match="attention is 'flash'; use one of separable, multihead"):
        kind("flash", heads=4, latents=256)
    with pytest.raises(ValueError, match="heads is 3; use a divisor of 8"):
        jax.eval_shape(MultiHeadSelfAttention(3).init, jax.random.key(0), x)
    with pytest.raises(ValueError, match="latents is 0; use at least 1"):
        jax.eval_shape(LinformerSelfAttention(2, 0).init, jax.random.key(0), x)
    linformer = LinformerSelfAttention(HEADS, LATENTS)
    variables, _ = started(linformer, x)
    with pytest.raises(ValueError, match="built for 6 patches and this map has 4"):
        linformer.apply(variables, x[:, :, :4])
