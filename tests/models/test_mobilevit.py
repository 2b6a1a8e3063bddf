"""MobileViT v1 without its original; tests/models/test_parity.py holds it to PyTorch's."""

import collections
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilevit_jax import steps
from mobilevit_jax.models import zoo
from mobilevit_jax.models.attention import MultiHeadSelfAttention
from mobilevit_jax.models.layers import Conv, LayerNorm, Linear
from mobilevit_jax.models.mobilevit import MobileViT, MobileViTBlock, _resize

# Source: the published code. stem, layer_1 … layer_5, expand, head.
STAGE_PARAMS = {
    "xxs": (464, 1_472, 7_696, 139_888, 341_824, 433_440, 26_240, 321_000),
    "xs": (464, 3_968, 54_048, 297_152, 699_152, 840_432, 37_632, 385_000),
    "s": (464, 3_968, 86_528, 656_768, 1_772_032, 2_314_192, 103_680, 641_000),
}


@pytest.mark.parametrize("variant", sorted(STAGE_PARAMS))
def test_every_stage_has_as_many_parameters_as_published(variant):
    *stages, total = zoo.summary(MobileViT(1000, variant=variant), size=(256, 256))
    assert tuple(row.params for row in stages) == STAGE_PARAMS[variant]
    entry = zoo.ZOO[f"mobilevit_{variant}"]
    assert (total.params, total.macs) == (entry.params, entry.macs)
    assert [row.shape[:2] for row in stages[1:6]] == [
        (256 // s, 256 // s) for s in (2, 4, 8, 16, 32)
    ]


# Source: the published counts in millions at 224 pixels, where the last maps are odd.
@pytest.mark.parametrize(("variant", "macs"), [("xxs", 255.4), ("xs", 703.2), ("s", 1416.8)])
def test_odd_maps_cost_what_is_published(variant, macs):
    total = zoo.summary(MobileViT(1000, variant=variant), size=(224, 224))[-1]
    assert round(total.macs / 1e6, 1) == macs


def test_layer_norm_is_per_position():
    # As many rows as channels: cvnets' newest code would norm along the rows here.
    x = np.random.default_rng(0).normal(3, 2, (2, 8, 5, 8)).astype(np.float32)
    scale, bias = np.random.default_rng(1).random((2, 8), np.float32)
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    want = (x - x.mean(-1, keepdims=True)) / deviation * scale + bias
    got = LayerNorm().apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "new"), [((7, 5), (8, 6)), ((8, 6), (7, 5)), ((1, 2), (2, 2))])
def test_resize_takes_pixels_by_their_centres(size, new):
    x = np.random.default_rng(0).random((1, *size, 2), np.float32)

    def along(x, n, axis):
        old = x.shape[axis]
        source = np.maximum((np.arange(n) + 0.5) * old / n - 0.5, 0)
        low = np.floor(source).astype(int)
        high, share = np.minimum(low + 1, old - 1), source - low
        shape = [-1 if i == axis else 1 for i in range(4)]
        share = share.reshape(shape)
        return x.take(low, axis) * (1 - share) + x.take(high, axis) * share

    want = along(along(x, new[0], 1), new[1], 2)
    np.testing.assert_allclose(_resize(jnp.asarray(x), new), want, rtol=1e-5, atol=1e-6)


def test_block_keeps_an_odd_map_and_fuses_it_with_its_input():
    block = MobileViTBlock(8, 1, functools.partial(MultiHeadSelfAttention, 2))
    x = jnp.asarray(np.random.default_rng(0).random((1, 5, 3, 4), np.float32))
    variables = jax.jit(functools.partial(block.init, train=False))(jax.random.key(0), x)
    params = variables["params"]
    assert params["fuse"]["conv"]["kernel"].shape == (3, 3, 8, 4)
    # With a kernel that looks only at the first half of the channels, the input passes through.
    kernel = jnp.zeros((3, 3, 8, 4)).at[1, 1, :4].set(jnp.eye(4))
    params = {**params, "fuse": {**params["fuse"], "conv": {"kernel": kernel}}}
    apply = jax.jit(functools.partial(block.apply, train=False))
    y = apply({**variables, "params": params}, x)
    np.testing.assert_allclose(y, nn.silu(x / np.sqrt(1 + 1e-5)), rtol=1e-5)


def choices(model, **call):
    """How often each dropout rate is applied, and the initialisations in use."""
    rates, inits = collections.Counter(), set()

    def record(method, args, kwargs, context):
        module = context.module
        if isinstance(module, nn.Dropout) and not module.deterministic:
            rates[module.rate] += 1
        if isinstance(module, Conv | Linear):
            inits.add(module.weight_init)
        return method(*args, **kwargs)

    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    image = jnp.zeros((1, 32, 32, 3))
    with nn.intercept_methods(record):
        jax.eval_shape(functools.partial(model.init, **call), rngs, image)
    return dict(rates), inits


def test_training_is_the_recipes():
    # Two dropouts in each of nine attention layers, one ahead of the classifier. At these strides
    # no norm trains on a single value.
    model = functools.partial(MobileViT, 5, strides=(1, 1, 2, 2, 2, 2))
    assert choices(model(variant="xxs"), train=True) == ({0.05: 18, 0.1: 1}, {"kaiming"})
    assert choices(model(variant="s"), train=True) == ({0.1: 19}, {"kaiming"})
    changed = model(dropout=0.3, block_dropout=0.2, weight_init="torch")
    assert choices(changed, train=True) == ({0.2: 18, 0.3: 1}, {"torch"})
    assert choices(changed, train=False) == ({}, {"torch"})


def test_computes_in_bfloat16_and_keeps_float32_where_it_matters():
    model = MobileViT(5, variant="xxs", dtype=jnp.bfloat16)
    variables = steps.abstract_variables(model, (64, 64))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    outputs = jax.eval_shape(
        model.apply, variables, jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    )
    assert (outputs["logits"].shape, outputs["logits"].dtype) == ((2, 5), jnp.float32)
    assert {stage.dtype for stage in outputs["stages"]} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "m"}, "variant is 'm'; use one of xxs, xs, s"),
        ({"strides": (2, 2)}, "strides is .* use six numbers"),
        ({"block_dropout": 1.0}, "block_dropout is 1.0"),
        ({"attention": "none"}, "attention is 'none'; use one of"),
        ({"heads": 7}, "heads is 7; use a divisor of 144"),
        ({"weight_init": "xavier"}, "weight_init is 'xavier'"),
        ({"dtype": jnp.int8}, 'int8.*use "float32", "bfloat16" or "float16"'),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        steps.abstract_variables(MobileViT(5, **fields), (64, 64))


def test_an_image_smaller_than_the_strides_is_refused():
    with pytest.raises(ValueError, match=r"31x64 pixels.*at least 32"):
        steps.abstract_variables(MobileViT(5), (31, 64))
