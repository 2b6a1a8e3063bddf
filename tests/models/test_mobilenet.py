"""The MobileNets as cvnets has them: every block of the tables, the gate, the peculiarities."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilevit_jax import steps, tree
from mobilevit_jax.models import zoo
from mobilevit_jax.models.mobilenet import (
    Layer,
    MobileNetV1,
    MobileNetV2,
    MobileNetV3,
    SeparableConv,
    SqueezeExcite,
    SqueezeInvertedResidual,
    V3Row,
)


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 4, 8), np.float32))


def started(module, *args, **kwargs):
    """Variables with weights, scales and statistics that all matter."""
    rng = np.random.default_rng(1)
    init = functools.partial(module.init, **kwargs)
    shapes = jax.eval_shape(init, jax.random.key(0), *args)
    return jax.tree.map(lambda s: jnp.asarray(0.2 + rng.random(s.shape, np.float32)), shapes)


def shapes_of(model):
    return {
        path: s.shape
        for path, s in tree.flatten(steps.abstract_variables(model, (32, 32))["params"]).items()
    }


# Source of all the tables: the published code. Output channels of every stage at every width.
V1_FEATURES = {
    0.25: (16, 16, 32, 64, 128, 256),
    0.5: (16, 32, 64, 128, 256, 512),
    0.75: (32, 48, 96, 192, 384, 768),
    1.0: (32, 64, 128, 256, 512, 1024),
}
V2_FEATURES = {
    0.25: (32, 8, 8, 8, 24, 80),
    0.5: (32, 8, 16, 16, 48, 160),
    0.75: (32, 16, 24, 24, 72, 240),
    1.0: (32, 16, 24, 32, 96, 320),
}


@pytest.mark.parametrize(
    ("family", "width", "features"),
    [("mobilenet_v1", *row) for row in V1_FEATURES.items()]
    + [("mobilenet_v2", *row) for row in V2_FEATURES.items()],
)
def test_costs_and_features_are_the_published_ones(family, width, features):
    entry = zoo.ZOO[f"{family.replace('_', '')}_{100 * width:03.0f}"]
    assert (entry.family, entry.fields) == (family, {"width": width})
    model = zoo.create(family, num_classes=1000, width=width)
    *stages, total = zoo.summary(model, size=entry.size)
    assert (total.params, total.macs) == (entry.params, entry.macs)
    want = [(s, s, c) for s, c in zip((112, 112, 56, 28, 14, 7), features, strict=True)]
    assert [row.shape for row in stages[:6]] == want


@pytest.mark.parametrize(
    ("variant", "sides", "features", "hidden"),
    [
        ("small", (112, 56, 28, 28, 14, 7, 7), (16, 16, 24, 24, 48, 96, 576), 1024),
        ("large", (112, 112, 56, 28, 14, 7, 7), (16, 16, 24, 40, 112, 160, 960), 1280),
    ],
)
def test_v3_costs_what_is_published(variant, sides, features, hidden):
    entry = zoo.ZOO[f"mobilenetv3_{variant}"]
    *stages, total = zoo.summary(MobileNetV3(1000, variant=variant), size=entry.size)
    assert (total.params, total.macs) == (entry.params, entry.macs)
    want = [(s, s, c) for s, c in zip(sides, features, strict=True)]
    assert [row.shape for row in stages[:7]] == want
    assert [(row.name, row.shape) for row in stages[7:]] == [
        ("head_hidden", (hidden,)),
        ("head", (1000,)),
    ]


def test_v1_has_no_activation_between_its_convolutions(x):
    conv = SeparableConv(3, stride=2)
    variables = started(conv, x, train=False)
    params, statistics = variables["params"], variables["batch_stats"]

    def norm(y, name):
        p, s = params[name]["norm"], statistics[name]["norm"]
        return (y - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]

    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = params["depthwise"]["conv"]["kernel"]
    y = sum(
        padded[:, i : i + 5 : 2, j : j + 4 : 2] * kernel[i, j, 0]
        for i in range(3)
        for j in range(3)
    )
    y = norm(y, "depthwise")
    assert y.min() < 0
    y = norm(y @ params["pointwise"]["conv"]["kernel"][0, 0], "pointwise")
    got = conv.apply(variables, x, train=False)
    np.testing.assert_allclose(got, np.maximum(y, 0), rtol=1e-4, atol=1e-4)


def test_v2_expands_all_blocks_but_the_first():
    shapes = shapes_of(MobileNetV2(5))
    blocks = [1, 2, 3, 7, 4]
    names = {path.rpartition("/depthwise/conv/kernel")[0] for path in shapes} - {""}
    assert names == {f"layer_{i}/block_{j}" for i, n in enumerate(blocks, 1) for j in range(n)}
    assert "layer_1/block_0/expand/conv/kernel" not in shapes
    assert shapes["layer_4/block_4/expand/conv/kernel"] == (1, 1, 64, 384)
    assert shapes["layer_4/block_4/project/conv/kernel"] == (1, 1, 384, 96)
    assert shapes["expand/conv/kernel"] == (1, 1, 320, 1280)


def test_squeeze_excite_gates_channels_by_their_means(x):
    gate = SqueezeExcite()
    variables = started(gate, x)
    params = variables["params"]
    assert params["reduce"]["kernel"].shape == (1, 1, 8, 32)  # never fewer than 32
    y = x.mean((1, 2)) @ params["reduce"]["kernel"][0, 0] + params["reduce"]["bias"]
    # The gate is a hard sigmoid: 0 below -3, 1 above 3. The scale puts it in between.
    params["expand"]["kernel"] /= 40
    y = np.maximum(y, 0) @ params["expand"]["kernel"][0, 0] + params["expand"]["bias"]
    assert 0 < np.abs(y).max() < 3
    want = x * np.clip(y + 3, 0, 6)[:, None, None] / 6
    np.testing.assert_allclose(gate.apply(variables, x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hard", [False, True])
def test_v3_block_expands_filters_gates_and_projects(x, hard):
    block = SqueezeInvertedResidual(V3Row(8, 24, hard, True))
    variables = started(block, x, train=False)
    seen = []

    def record(method, args, kwargs, context):
        y = method(*args, **kwargs)
        if context.module.path:
            seen.append((context.module.path[0], y))
        return y

    with nn.intercept_methods(record):
        got = block.apply(variables, x, train=False)
    outputs = dict(seen)  # of the four parts, whose own outputs come last
    assert list(outputs) == ["expand", "depthwise", "squeeze_excite", "project"]
    np.testing.assert_allclose(got, x + outputs["project"], rtol=1e-6)
    lowest = float(outputs["expand"].min())
    assert -0.376 < lowest < -0.3 if hard else lowest == 0.0


# Source: the published code; (hidden, squeezed or None) of every block.
V3_BLOCKS = {
    "large": {
        1: [(16, None)],
        2: [(64, None), (72, None)],
        3: [(72, 32), (120, 32), (120, 32)],
        4: [(240, None), (200, None), (184, None), (184, None), (480, 120), (672, 168)],
        5: [(672, 168), (960, 240), (960, 240)],
    },
    "small": {
        1: [(16, 32)],
        2: [(72, None)],
        3: [(88, None)],
        4: [(96, 32), (240, 64), (240, 64), (120, 32), (144, 40)],
        5: [(288, 72), (576, 144), (576, 144)],
    },
}


@pytest.mark.parametrize("variant", sorted(V3_BLOCKS))
def test_v3_blocks_are_those_of_the_table(variant):
    shapes = shapes_of(MobileNetV3(5, variant=variant))
    for i, blocks in V3_BLOCKS[variant].items():
        for j, (hidden, squeezed) in enumerate(blocks):
            prefix = f"layer_{i}/block_{j}"
            assert shapes[f"{prefix}/depthwise/conv/kernel"] == (3, 3, 1, hidden)
            reduced = shapes.get(f"{prefix}/squeeze_excite/reduce/kernel")
            assert reduced == (squeezed and (1, 1, hidden, squeezed))
            assert (f"{prefix}/expand/conv/kernel" in shapes) == ((i, j) != (1, 0))
        assert f"layer_{i}/block_{len(blocks)}/depthwise/conv/kernel" not in shapes


def used(model):
    """Dropout rate of the classifier, and the activations in order of first use."""
    rates, activations = [], []

    def record(method, args, kwargs, context):
        if isinstance(context.module, nn.Dropout):
            rates.append(context.module.rate)
        activation = getattr(context.module, "activation", None)
        if activation is not None and activation not in activations:
            activations.append(activation)
        return method(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return rates, activations


@pytest.mark.parametrize(
    ("model", "rate", "activations"),
    [
        (MobileNetV1(5, width=0.25), 0.025, [nn.relu]),
        (MobileNetV2(5, width=0.25), 0.05, [nn.relu6]),
        (MobileNetV2(5, width=2.0, dropout=0.4), 0.4, [nn.relu6]),
        (MobileNetV3(5), 0.2, [nn.hard_swish, nn.relu]),
    ],
)
def test_dropout_and_activations_are_the_published_ones(model, rate, activations):
    assert used(model) == ([rate], activations)


def test_dropout_is_bounded_for_wide_networks():
    (rate,), _ = used(MobileNetV1(5, width=2.0))
    assert rate == 0.1


def test_layer_names_its_blocks_in_order(x):
    layer = Layer([functools.partial(SeparableConv, 4), functools.partial(SeparableConv, 6)])
    params = started(layer, x, train=False)["params"]
    assert params["block_0"]["pointwise"]["conv"]["kernel"].shape == (1, 1, 8, 4)
    assert params["block_1"]["pointwise"]["conv"]["kernel"].shape == (1, 1, 4, 6)


def test_outputs_are_float32_logits_and_five_stages():
    model = MobileNetV3(5, variant="small", dtype=jnp.bfloat16)
    variables = steps.abstract_variables(model, (64, 96))
    image = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    outputs = jax.eval_shape(model.apply, variables, image)
    assert (outputs["logits"].shape, outputs["logits"].dtype) == ((2, 5), jnp.float32)
    sides = [stage.shape[1:3] for stage in outputs["stages"]]
    assert sides == [(16, 24), (8, 12), (8, 12), (4, 6), (2, 3)]
    assert {stage.dtype for stage in outputs["stages"]} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MobileNetV1(5, width=0.0), "width is 0.0"),
        (MobileNetV2(5, dropout=1.0), "dropout is 1.0"),
        (MobileNetV3(5, variant="medium"), "variant is 'medium'; use one of large, small"),
        (MobileNetV3(5, strides=(2, 3, 1, 1, 1, 1)), "strides is"),
        (MobileNetV1(0), "num_classes is 0"),
    ],
)
def test_fields_out_of_range_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        steps.abstract_variables(model, (32, 32))
