"""MobileViT v2 without its original; tests/models/test_parity.py holds it to PyTorch's."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilevit_jax import steps, tree
from mobilevit_jax.models import zoo
from mobilevit_jax.models.attention import SeparableSelfAttention
from mobilevit_jax.models.convolution import resize_align_corners
from mobilevit_jax.models.layers import InvertedResidual, Linear
from mobilevit_jax.models.mobilevit_v2 import AttentionLayer, MobileViTV2, MobileViTV2Block
from tests.weights import random_variables

# Source: the published code. stem, layer_1 … layer_5, head.
STAGE_PARAMS = {
    0.5: (464, 2_016, 25_280, 103_426, 387_460, 594_947, 257_000),
    0.75: (696, 4_176, 54_816, 228_866, 863_812, 1_328_643, 385_000),
    1.0: (928, 7_104, 95_616, 403_458, 1_528_580, 2_353_155, 513_000),
    1.25: (1_160, 10_800, 147_680, 627_202, 2_381_764, 3_668_483, 641_000),
    1.5: (1_392, 15_264, 211_008, 900_098, 3_423_364, 5_274_627, 769_000),
    1.75: (1_624, 20_496, 285_600, 1_222_146, 4_653_380, 7_171_587, 897_000),
    2.0: (1_856, 26_496, 371_456, 1_593_346, 6_071_812, 9_359_363, 1_025_000),
}
# Source: the published counts in millions at 224 (last maps odd), 256 and 384 pixels.
MACS = {
    0.5: (362.0, 464.6, 1045.0),
    0.75: (801.0, 1028.0, 2312.5),
    1.0: (1412.2, 1812.1, 4076.6),
    1.25: (2195.4, 2816.9, 6337.3),
    1.5: (3150.6, 4042.5, 9094.6),
    1.75: (4278.0, 5488.8, 12348.6),
    2.0: (5577.4, 7155.8, 16099.2),
}
SMALL_IMAGES = (1, 1, 2, 2, 2, 1)


@pytest.mark.parametrize("width", sorted(STAGE_PARAMS))
def test_every_stage_has_as_many_parameters_as_published(width):
    *stages, total = zoo.summary(MobileViTV2(1000, width=width), size=(224, 224))
    assert [row.name for row in stages] == ["stem", *(f"layer_{i}" for i in range(1, 6)), "head"]
    assert tuple(row.params for row in stages) == STAGE_PARAMS[width]
    assert total.params == sum(STAGE_PARAMS[width])
    assert abs(total.macs / 1e6 - MACS[width][0]) < 0.051  # 0.5's was rounded twice


def test_the_zoo_has_every_width_at_both_sizes_with_the_published_counts():
    for width, params in STAGE_PARAMS.items():
        name = f"mobilevitv2_{round(100 * width):03}"
        for entry, size, macs in (
            (zoo.ZOO[name], 256, MACS[width][1]),
            (zoo.ZOO[f"{name}_384"], 384, MACS[width][2]),
        ):
            assert (entry.family, entry.fields) == ("mobilevit_v2", {"width": width})
            assert (entry.size, entry.params) == ((size, size), sum(params))
            assert round(entry.macs / 1e6, 1) == macs
    widths = {e.fields["width"] for e in zoo.ZOO.values() if e.family == "mobilevit_v2"}
    assert widths == set(STAGE_PARAMS)


def stage_sizes(model, size):
    image = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    outputs, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    assert outputs["logits"].shape == (2, model.num_classes)
    return [stage.shape[1:3] for stage in outputs["stages"]]


@pytest.mark.parametrize(
    ("size", "strides", "want"),
    [
        ((256, 256), (2, 1, 2, 2, 2, 2), [(128, 128), (64, 64), (32, 32), (16, 16), (8, 8)]),
        ((224, 224), (2, 1, 2, 2, 2, 2), [(112, 112), (56, 56), (28, 28), (14, 14), (8, 8)]),
        ((225, 160), (2, 1, 2, 2, 2, 2), [(113, 80), (57, 40), (30, 20), (16, 10), (8, 6)]),
        ((32, 33), (2, 1, 2, 2, 2, 2), [(16, 17), (8, 9), (4, 6), (2, 4), (2, 2)]),
        ((32, 32), SMALL_IMAGES, [(32, 32), (16, 16), (8, 8), (4, 4), (4, 4)]),
        ((8, 9), SMALL_IMAGES, [(8, 9), (4, 5), (2, 4), (2, 2), (2, 2)]),
    ],
)
def test_maps_of_any_size_with_odd_ones_resized_up_for_good(size, strides, want):
    assert stage_sizes(MobileViTV2(10, width=0.5, strides=strides), size) == want


@pytest.mark.parametrize(
    ("size", "strides", "smallest"),
    [((31, 64), (2, 1, 2, 2, 2, 2), 32), ((64, 7), SMALL_IMAGES, 8)],
)
def test_an_image_smaller_than_the_strides_is_refused(size, strides, smallest):
    message = rf"{size[0]}x{size[1]} pixels.*at least {smallest}:"
    with pytest.raises(ValueError, match=message):
        steps.abstract_variables(MobileViTV2(10, strides=strides), size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 0}, "num_classes is 0; use 1 or more"),
        ({"width": 0.0}, "width is 0.0; use a positive number"),
        ({"strides": (2, 1, 2, 2, 2)}, "use six numbers, each 1 or 2"),
        ({"strides": (4, 1, 2, 2, 2, 2)}, r"strides is \(4, 1, .* each 1 or 2"),
        ({"dropout": 1.0}, "dropout is 1.0; use a number from 0 to below 1"),
        ({"block_dropout": -0.1}, "block_dropout is -0.1"),
        ({"weight_init": "xavier"}, 'weight_init is \'xavier\'; use "torch" or "kaiming"'),
        ({"dtype": jnp.int8}, 'int8.*; use "float32", "bfloat16" or "float16"'),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        steps.abstract_variables(MobileViTV2(**{"num_classes": 10, **fields}), (64, 64))


def test_parameter_paths():
    flat = tree.flatten(steps.abstract_variables(MobileViTV2(10, width=0.5), (64, 64)))
    shapes = {path: leaf.shape for path, leaf in flat.items()}

    def norm(path, features):
        leaves = {"params": ("scale", "bias"), "batch_stats": ("mean", "var")}
        return {f"{c}/{path}/{leaf}": (features,) for c in leaves for leaf in leaves[c]}

    def group_norm(path, features):
        return {f"params/{path}/{leaf}": (features,) for leaf in ("scale", "bias")}

    block, attention = "layer_3/mobilevit", "layer_3/mobilevit/attention_1"
    want = {
        "params/stem/conv/kernel": (3, 3, 3, 16),
        **norm("stem/norm", 16),
        "params/layer_2/block_1/expand/conv/kernel": (1, 1, 64, 128),
        **norm("layer_2/block_1/expand/norm", 128),
        "params/layer_2/block_1/depthwise/conv/kernel": (3, 3, 1, 128),
        **norm("layer_2/block_1/depthwise/norm", 128),
        "params/layer_2/block_1/project/conv/kernel": (1, 1, 128, 64),
        **norm("layer_2/block_1/project/norm", 64),
        f"params/{block}/local_depthwise/conv/kernel": (3, 3, 1, 128),
        **norm(f"{block}/local_depthwise/norm", 128),
        f"params/{block}/local_pointwise/kernel": (1, 1, 128, 64),
        **group_norm(f"{attention}/norm_1", 64),
        f"params/{attention}/attention/qkv/kernel": (1, 1, 64, 129),
        f"params/{attention}/attention/qkv/bias": (129,),
        f"params/{attention}/attention/out/kernel": (1, 1, 64, 64),
        f"params/{attention}/attention/out/bias": (64,),
        **group_norm(f"{attention}/norm_2", 64),
        f"params/{attention}/ffn_1/kernel": (1, 1, 64, 128),
        f"params/{attention}/ffn_1/bias": (128,),
        f"params/{attention}/ffn_2/kernel": (1, 1, 128, 64),
        f"params/{attention}/ffn_2/bias": (64,),
        **group_norm(f"{block}/norm", 64),
        f"params/{block}/project/conv/kernel": (1, 1, 64, 128),
        **norm(f"{block}/project/norm", 128),
        "params/head/kernel": (256, 10),
        "params/head/bias": (10,),
    }
    assert {path: shapes.get(path) for path in want} == want
    # The published state has 269 entries, of which 25 count the batches seen by a norm.
    assert len(shapes) == 269 - 25
    assert {leaf.dtype for leaf in flat.values()} == {jnp.dtype("float32")}


def test_an_odd_map_is_resized_before_the_block():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 6, 8)), jnp.float32)
    block = MobileViTV2Block(8, 1, SeparableSelfAttention)
    init = jax.jit(functools.partial(block.init, train=False))
    variables = init(jax.random.key(0), x)
    apply = functools.partial(block.apply, variables, train=False)
    y = apply(x)
    assert y.shape == (2, 6, 6, 8)
    np.testing.assert_allclose(y, apply(resize_align_corners(x, size=(6, 6))), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def small():
    """A network for small images, weights that all matter, and a batch."""
    model = MobileViTV2(10, width=0.5, strides=SMALL_IMAGES)
    image = np.random.default_rng(0).random((8, 16, 16, 3), np.float32)
    variables = random_variables(model, seed=1, size=(16, 16))
    return model, jax.tree.map(jnp.asarray, variables), jnp.asarray(image)


def test_bfloat16_agrees_with_float32(small):
    model, variables, image = small
    want = jax.jit(model.apply)(variables, image)
    got = jax.jit(model.clone(dtype="bfloat16").apply)(variables, image)
    assert got["logits"].dtype == jnp.float32
    assert {stage.dtype for stage in got["stages"]} == {jnp.dtype("bfloat16")}
    for a, b in zip(
        (got["logits"], *got["stages"]), (want["logits"], *want["stages"]), strict=True
    ):
        error = np.linalg.norm(a.astype(jnp.float32) - b) / np.linalg.norm(b)
        assert error < 5e-2  # some hundred roundings of 2^-9 on the way


def test_attention_maps_are_given_on_request(small):
    model, variables, image = small
    apply = functools.partial(model.apply, mutable=["attention"])
    _, state = jax.eval_shape(apply, variables, image)
    flat = tree.flatten(state["attention"])
    layers = [(f"layer_{i}/mobilevit", n, side) for i, n, side in ((3, 2, 4), (4, 4, 2), (5, 3, 2))]
    want = {
        f"{block}/attention_{i}/attention/scores/0": (8, side, side)
        for block, n, side in layers
        for i in range(n)
    }
    assert {path: leaf.shape for path, leaf in flat.items()} == want


def test_dropout_acts_in_training_only():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 16)), jnp.float32)
    layer = AttentionLayer(SeparableSelfAttention, dropout=0.5)
    variables = jax.jit(functools.partial(layer.init, train=False))(jax.random.key(0), x)

    @functools.partial(jax.jit, static_argnames="dropout")
    def train(seed, *, dropout):
        rngs = {"dropout": jax.random.key(seed)}
        return layer.clone(dropout=dropout).apply(variables, x, train=True, rngs=rngs)

    outside = layer.apply(variables, x, train=False)
    np.testing.assert_allclose(outside, train(0, dropout=0.0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(train(0, dropout=0.5), train(0, dropout=0.5))
    assert np.abs(train(0, dropout=0.5) - train(1, dropout=0.5)).max() > 0.1


def test_dropouts_sit_before_the_head_and_on_both_branches():
    rates = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.Dropout) and not context.module.deterministic:
            rates.append(context.module.rate)
        return call(*args, **kwargs)

    model = MobileViTV2(10, width=0.5, dropout=0.3, block_dropout=0.2)
    variables = steps.abstract_variables(model, (64, 64))
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    rngs = {"dropout": jax.random.key(0)}
    with nn.intercept_methods(record):
        jax.eval_shape(model.apply, variables, jnp.zeros((2, 64, 64, 3)))
        assert rates == []
        jax.eval_shape(apply, variables, jnp.zeros((2, 64, 64, 3)), rngs=rngs)
    assert rates == [0.2] * 2 * (2 + 4 + 3) + [0.3]


class Tiny(nn.Module):
    """One of each part of the network, soon compiled."""

    @nn.compact
    def __call__(self, x, *, train):
        x = InvertedResidual(16, stride=2, name="block")(x, train=train)
        block = MobileViTV2Block(16, 1, SeparableSelfAttention, name="mobilevit")
        return Linear(3, name="head")(block(x, train=train).mean((1, 2)))


def test_a_batch_over_four_devices_gives_what_one_device_gives():
    x = jnp.asarray(np.random.default_rng(0).random((8, 9, 12, 8), np.float32))
    label = jnp.arange(8) % 3
    model = Tiny()
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), x)

    def loss(params, x, label):
        given = {**variables, "params": params}
        logits, state = model.apply(given, x, train=True, mutable=["batch_stats"])
        losses = -jnp.take_along_axis(nn.log_softmax(logits), label[:, None], axis=1)
        return losses.mean(), (logits, state)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))  # make_mesh: explicit axes
    assert mesh.size == 4
    everywhere, split = (jax.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P("data")))
    want = step(variables["params"], x, label)
    got = step(
        jax.device_put(variables["params"], everywhere),
        jax.device_put(x, split),
        jax.device_put(label, split),
    )
    check = functools.partial(jax.tree_util.tree_map_with_path, close)
    check(got[0], want[0], jax.tree.map(lambda leaf: np.abs(leaf).max(), want[0]))
    # Against the largest of all: a bias ahead of a norm has no gradient but rounding noise.
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(want[1]))
    check(got[1], want[1], jax.tree.map(lambda _: largest, want[1]))


def close(path, got, want, scale):
    assert np.abs(got - want).max() <= 2e-6 * scale, path
