"""Every key on both sides of the tables, against key lists written down from the originals."""

import functools

import numpy as np
import pytest

from mobilevit_jax import steps, tree
from mobilevit_jax.models import zoo
from mobilevit_jax.tools import formats, names
from tests import originals

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@functools.cache
def shapes(family, **fields):
    model = zoo.create(family, num_classes=5, **fields)
    return tree.flatten(steps.abstract_variables(model, (64, 64)))


@pytest.fixture
def v2():
    return shapes("mobilevit_v2", width=0.5)


def numbered(expected):
    """Arrays whose every value is another one, so that no mix-up goes unseen."""
    start, flat = 0, {}
    for path, leaf in expected.items():
        size = int(np.prod(leaf.shape))
        flat[path] = np.arange(start, start + size, dtype=np.float32).reshape(leaf.shape)
        start += size
    return flat


def conv_norm(stem):
    return [f"{stem}.block.conv.weight", *(f"{stem}.block.norm.{leaf}" for leaf in NORM)]


def both(*stems):
    return [f"{stem}.{leaf}" for stem in stems for leaf in ("weight", "bias")]


def cvnets_v2_keys():
    """cvnets' MobileViT v2, block by block as its modules nest."""
    keys = [*conv_norm("conv_1"), *both("classifier.1")]
    for i, blocks in enumerate((1, 2, 1, 1, 1), start=1):
        for j in range(blocks):
            for part in ("exp_1x1", "conv_3x3", "red_1x1"):
                keys += conv_norm(f"layer_{i}.{j}.block.{part}")
    for i, layers in ((3, 2), (4, 4), (5, 3)):
        block = f"layer_{i}.1"
        keys += [*conv_norm(f"{block}.local_rep.0"), f"{block}.local_rep.1.block.conv.weight"]
        for k in range(layers):
            layer = f"{block}.global_rep.{k}"
            keys += both(f"{layer}.pre_norm_attn.0", f"{layer}.pre_norm_ffn.0")
            keys += both(*(f"{layer}.pre_norm_attn.1.{p}_proj.block.conv" for p in ("qkv", "out")))
            keys += both(*(f"{layer}.pre_norm_ffn.{n}.block.conv" for n in (1, 3)))
        keys += [*both(f"{block}.global_rep.{layers}"), *conv_norm(f"{block}.conv_proj")]
    return keys


def test_v2_has_exactly_the_keys_of_cvnets(v2):
    state = names.to_foreign(numbered(v2), family="mobilevit_v2", layout="cvnets")
    assert sorted(state) == sorted(cvnets_v2_keys())
    assert len(state) == 269


def test_v2_has_exactly_the_keys_and_shapes_of_timm(v2):
    timm = originals.import_timm()
    want = timm.create_model("mobilevitv2_050", num_classes=5).state_dict()
    state = names.to_foreign(numbered(v2), family="mobilevit_v2", layout="timm")
    assert {k: v.shape for k, v in state.items()} == {k: tuple(v.shape) for k, v in want.items()}


def test_v2_has_exactly_the_keys_and_shapes_of_hugging_face(v2):
    transformers = originals.import_transformers()
    config = transformers.MobileViTV2Config(width_multiplier=0.5, num_labels=5)
    want = transformers.MobileViTV2ForImageClassification(config).state_dict()
    state = names.to_foreign(numbered(v2), family="mobilevit_v2", layout="hf")
    assert {k: v.shape for k, v in state.items()} == {k: tuple(v.shape) for k, v in want.items()}


@pytest.mark.parametrize("layout", names.FOREIGN)
def test_there_and_back_changes_nothing(v2, layout):
    flat = numbered(v2)
    state = names.to_foreign(flat, family="mobilevit_v2", layout=layout)
    assert all(array.flags.c_contiguous for array in state.values())
    weights = {key: array for key, array in state.items() if not key.endswith(names.COUNTER)}
    assert tree.count(weights) == tree.count(flat)
    back = names.from_foreign(state, expected=v2, family="mobilevit_v2", layout=layout)
    assert back.keys() == flat.keys()
    for path, array in flat.items():
        np.testing.assert_array_equal(back[path], array, err_msg=path, strict=True)


def test_kernels_are_transposed(v2):
    flat = numbered(v2)
    state = names.to_foreign(flat, family="mobilevit_v2", layout="cvnets")
    kernel, weight = flat["params/stem/conv/kernel"], state["conv_1.block.conv.weight"]
    assert weight.shape == (16, 3, 3, 3)
    assert weight[5, 2, 0, 1] == kernel[0, 1, 2, 5]
    head = state["classifier.1.weight"]
    assert head.shape == (5, 256)
    assert head[4, 7] == flat["params/head/kernel"][7, 4]


def test_a_pointwise_convolution_may_be_a_matrix(v2):
    flat = numbered(v2)
    state = names.to_foreign(flat, family="mobilevit_v2", layout="timm")
    thin = {
        key: array[:, :, 0, 0] if array.ndim == 4 and array.shape[2:] == (1, 1) else array
        for key, array in state.items()
    }
    back = names.from_foreign(thin, expected=v2, family="mobilevit_v2", layout="timm")
    assert all(np.array_equal(back[path], array) for path, array in flat.items())


def test_counters_may_be_missing_but_not_stray(v2):
    state = names.to_foreign(numbered(v2), family="mobilevit_v2", layout="hf")
    bare = {key: array for key, array in state.items() if not key.endswith(names.COUNTER)}
    names.from_foreign(bare, expected=v2, family="mobilevit_v2", layout="hf")
    state[f"classifier.{names.COUNTER}"] = np.zeros((), np.int64)
    with pytest.raises(ValueError, match=r"\+ classifier\.num_batches_tracked \(\)"):
        names.from_foreign(state, expected=v2, family="mobilevit_v2", layout="hf")


def test_all_failures_are_told_together(v2):
    state = names.to_foreign(numbered(v2), family="mobilevit_v2", layout="cvnets")
    del state["classifier.1.bias"]
    state["classifier.2.bias"] = np.zeros(5)
    state["conv_1.block.norm.bias"] = np.zeros(17)
    with pytest.raises(ValueError) as caught:
        names.from_foreign(state, expected=v2, family="mobilevit_v2", layout="cvnets")
    assert str(caught.value).splitlines() == [
        "3 tensors are not as they should be (- missing, + unexpected, ~ of another shape):",
        "  + classifier.2.bias (5,)",
        "  - classifier.1.bias (5,)",
        "  ~ conv_1.block.norm.bias (17,), expected (16,)",
    ]


def test_a_long_list_of_failures_is_cut_with_a_count(v2):
    state = names.to_foreign(numbered(v2), family="mobilevit_v2", layout="cvnets")
    kept = {key: array for key, array in state.items() if not key.startswith("layer_4")}
    with pytest.raises(ValueError, match="… and") as caught:
        names.from_foreign(kept, expected=v2, family="mobilevit_v2", layout="cvnets")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 + names.SHOWN
    missing = [key for key in state.keys() - kept.keys() if not key.endswith(names.COUNTER)]
    assert lines[0].startswith(f"{len(missing)} tensors")
    assert lines[-1] == f"  … and {len(missing) - names.SHOWN} more"


def test_a_path_without_a_name_elsewhere_is_an_error(v2):
    flat = numbered(v2) | {"params/layer_3/mobilevit/attention_0/attention/latent": np.ones(3)}
    with pytest.raises(ValueError, match=r"timm has no name for\n  params/layer_3/.*/latent"):
        names.to_foreign(flat, family="mobilevit_v2", layout="timm")


@pytest.mark.parametrize("layout", names.FOREIGN)
def test_v2_is_recognised(v2, layout):
    state = names.to_foreign(numbered(v2), family="mobilevit_v2", layout=layout)
    found = names.recognise({key: array.shape for key, array in state.items()})
    assert found == names.Recognised(layout, "mobilevit_v2", {"width": 0.5}, 5)


def test_our_own_paths_are_recognised(v2):
    found = names.recognise({path: leaf.shape for path, leaf in v2.items()})
    assert found == names.Recognised("native", "mobilevit_v2", {"width": 0.5}, 5)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "it holds nothing"),
        ({"blocks.0.attn.qkv.weight": (3, 3)}, "mobilevitv2. .Hugging Face."),
        ({"stem.conv.weight": (8, 3, 3, 3), "blocks.0.weight": (3,)}, "no layers of a MobileViT"),
        ({"conv_1.a": (1,), "stem.conv.weight": (1,), "x.pre_norm_mha.0": (1,)}, "different"),
        ({"conv_1.a": (1,), "x.pre_norm_mha.0": (1,), "x.pre_norm_attn.0": (1,)}, "different"),
        ({"mobilevit.conv_stem.a": (1,), "mobilevitv2.conv_stem.a": (1,)}, "different networks"),
        ({"encoder.conv_1.block.conv.weight": (1,)}, "segmentation or detection"),
        ({"conv_1.block.conv.weight": (1,), "x.pre_norm_attn.0": (1,)}, "is missing, which tells"),
    ],
)
def test_other_files_are_told(keys, says):
    with pytest.raises(ValueError, match=says):
        names.recognise(keys)


# --- the other families -----------------------------------------------------------------------


def cvnets_v1_keys():
    keys = [*conv_norm("conv_1"), *conv_norm("conv_1x1_exp"), *both("classifier.fc")]
    for i, blocks in enumerate((1, 3, 1, 1, 1), start=1):
        for j in range(blocks):
            for part in ("exp_1x1", "conv_3x3", "red_1x1"):
                keys += conv_norm(f"layer_{i}.{j}.block.{part}")
    for i, layers in ((3, 2), (4, 4), (5, 3)):
        block = f"layer_{i}.1"
        for part in ("local_rep.conv_3x3", "conv_proj", "fusion"):
            keys += conv_norm(f"{block}.{part}")
        keys += [f"{block}.local_rep.conv_1x1.block.conv.weight"]
        keys += both(f"{block}.global_rep.{layers}")
        for k in range(layers):
            layer = f"{block}.global_rep.{k}"
            keys += both(
                f"{layer}.pre_norm_mha.0", *(f"{layer}.pre_norm_ffn.{n}" for n in (0, 1, 4))
            )
            keys += both(*(f"{layer}.pre_norm_mha.1.{p}_proj" for p in ("qkv", "out")))
    return keys


def test_v1_has_exactly_the_keys_of_cvnets():
    state = names.to_foreign(
        numbered(shapes("mobilevit", variant="xxs")), family="mobilevit", layout="cvnets"
    )
    assert sorted(state) == sorted(cvnets_v1_keys())
    assert len(state) == 311


def test_v1_has_exactly_the_keys_and_shapes_of_timm():
    timm = originals.import_timm()
    want = timm.create_model("mobilevit_xxs", num_classes=5).state_dict()
    state = names.to_foreign(
        numbered(shapes("mobilevit", variant="xxs")), family="mobilevit", layout="timm"
    )
    assert {k: v.shape for k, v in state.items()} == {k: tuple(v.shape) for k, v in want.items()}


def test_v1_has_exactly_the_keys_and_shapes_of_hugging_face():
    transformers = originals.import_transformers()
    values = {**formats.HF_V1_SHARED, **formats.HF_V1["xxs"]}
    config = transformers.MobileViTConfig(**values, num_labels=5)
    want = transformers.MobileViTForImageClassification(config).state_dict()
    state = names.to_foreign(
        numbered(shapes("mobilevit", variant="xxs")), family="mobilevit", layout="hf"
    )
    assert {k: v.shape for k, v in state.items()} == {k: tuple(v.shape) for k, v in want.items()}


def test_v1_query_key_and_value_are_split_in_this_order():
    flat = numbered(shapes("mobilevit", variant="xxs"))
    state = names.to_foreign(flat, family="mobilevit", layout="hf")
    ours = flat["params/layer_3/mobilevit/attention_1/attention/qkv/kernel"]  # 64 192
    stem = "mobilevit.encoder.layer.2.transformer.layer.1.attention.attention"
    for i, part in enumerate(("query", "key", "value")):
        np.testing.assert_array_equal(
            state[f"{stem}.{part}.weight"], ours[:, 64 * i : 64 * (i + 1)].T
        )


@pytest.mark.parametrize("layout", names.FOREIGN)
def test_v1_there_and_back_changes_nothing(layout):
    expected = shapes("mobilevit", variant="xxs")
    flat = numbered(expected)
    state = names.to_foreign(flat, family="mobilevit", layout=layout)
    back = names.from_foreign(state, expected=expected, family="mobilevit", layout=layout)
    assert back.keys() == flat.keys()
    for path, array in flat.items():
        np.testing.assert_array_equal(back[path], array, err_msg=path, strict=True)
    found = names.recognise({key: array.shape for key, array in state.items()})
    assert found == names.Recognised(layout, "mobilevit", {"variant": "xxs"}, 5)


# Family, fields, the number of entries in the original and some of its keys.
MOBILENETS = (
    (
        "mobilenet_v1",
        {"width": 0.25},
        164,
        ("layer_4.5.dw_conv.block.norm.bias", "layer_1.0.pw_conv.block.conv.weight"),
    ),
    (
        "mobilenet_v2",
        {"width": 0.25},
        314,
        ("layer_1.mv2_block_0.block.conv_3x3.block.conv.weight", "conv_1x1_exp.block.norm.weight"),
    ),
    ("mobilenet_v2", {"width": 1.0}, 314, ("layer_4.mv2_block_6.block.red_1x1.block.norm.bias",)),
    (
        "mobilenet_v3",
        {"variant": "small"},
        244,
        (
            "conv_1.conv_3x3_bn.block.conv.weight",
            "layer_1.mv3_s_2_idx_0.block.se.se_layer.fc1.block.conv.bias",
            "layer_3.mv3_s_1_idx_0.block.exp_1x1.block.conv.weight",
            "layer_5.mv3_s_2_idx_0.block.red_1x1.block.norm.running_var",
            "conv_1x1_exp.conv_1x1.block.conv.weight",
            "classifier.fc1.bias",
        ),
    ),
    (
        "mobilenet_v3",
        {"variant": "large"},
        312,
        (
            "layer_1.mv3_s_1_idx_0.block.conv_3x3.block.conv.weight",
            "layer_3.mv3_s_2_idx_0.block.se.se_layer.fc2.block.conv.weight",
            "layer_4.mv3_s_1_idx_5.block.exp_1x1.block.conv.weight",
            "classifier.classifier_fc.weight",
        ),
    ),
)


@pytest.mark.parametrize(("family", "fields", "entries", "some"), MOBILENETS)
def test_mobilenets_there_and_back(family, fields, entries, some):
    expected = shapes(family, **fields)
    flat = numbered(expected)
    state = names.to_foreign(flat, family=family, layout="cvnets")
    assert len(state) == entries
    assert set(some) <= state.keys()
    back = names.from_foreign(state, expected=expected, family=family, layout="cvnets")
    assert all(np.array_equal(back[path], array) for path, array in flat.items())
    found = names.recognise({key: array.shape for key, array in state.items()})
    assert found == names.Recognised("cvnets", family, fields, 5)
    ours = names.recognise({path: leaf.shape for path, leaf in expected.items()})
    assert ours == names.Recognised("native", family, fields, 5)


@pytest.mark.parametrize(
    "name",
    ["mobilevit_xs", "mobilevit_s", "mobilevitv2_075", "mobilevitv2_200", "mobilenetv2_075"],
)
def test_published_networks_are_recognised(name):
    entry = zoo.ZOO[name]
    expected = shapes(entry.family, **entry.fields)
    layout = names.LAYOUTS[entry.family][-1]
    arrays = {path: np.empty(leaf.shape, np.int8) for path, leaf in expected.items()}
    state = names.to_foreign(arrays, family=entry.family, layout=layout)
    found = names.recognise({key: array.shape for key, array in state.items()})
    assert (found.family, found.fields) == (entry.family, dict(entry.fields))


def test_mobilenets_exist_in_cvnets_only():
    with pytest.raises(ValueError, match="mobilenet_v1 has no form in hf; there is cvnets, native"):
        names.to_foreign({}, family="mobilenet_v1", layout="hf")
