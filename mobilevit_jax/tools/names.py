"""Names of the same tensor in this package and in cvnets, timm and Hugging Face; pure.

One table drives both directions: from our parameter paths it gives the foreign keys and shapes, and
an import looks for exactly those. A path or key that the table does not account for is an error;
errors are collected and raised together.

Before editing: fields in braces are numbers in the path ({early} is layer 1 or 2, {late} 3 to 5);
on the other side {i} is the layer, {s} = i - 1 the stage, {n} the number of attention layers in it,
{stride} that of the block. Array layouts follow from the kinds: torch keeps (out, in, h, w) where
flax keeps (h, w, in, out). Everything was checked against the originals with strict loading.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Leaf(NamedTuple):
    """One array of a module: our collection and name, and the suffix of its key elsewhere."""

    collection: str
    ours: str
    cvnets: str
    timm: str
    hf: str


class Row(NamedTuple):
    """One module. Where a naming has several keys, it splits the output channels among them."""

    ours: str
    kind: str
    cvnets: str
    timm: str
    hf: str | tuple[str, ...]


class Scope(NamedTuple):
    """Modules whose names share a prefix in every naming."""

    ours: str
    cvnets: str
    timm: str
    hf: str
    rows: tuple[Row, ...]


NATIVE = "native"
FOREIGN = ("cvnets", "timm", "hf")
STEM_KERNEL = "params/stem/conv/kernel"
HEAD_KERNEL = "params/head/kernel"

# fmt: off
LEAVES: Mapping[str, tuple[Leaf, ...]] = {
    "conv_norm": (
        Leaf("params", "conv/kernel", "block.conv.weight", "conv.weight", "convolution.weight"),
        Leaf("params", "norm/scale", "block.norm.weight", "bn.weight", "normalization.weight"),
        Leaf("params", "norm/bias", "block.norm.bias", "bn.bias", "normalization.bias"),
        Leaf("batch_stats", "norm/mean",
             "block.norm.running_mean", "bn.running_mean", "normalization.running_mean"),
        Leaf("batch_stats", "norm/var",
             "block.norm.running_var", "bn.running_var", "normalization.running_var"),
    ),
    "conv": (
        Leaf("params", "kernel", "block.conv.weight", "weight", "convolution.weight"),
        Leaf("params", "bias", "block.conv.bias", "bias", "convolution.bias"),
    ),
    "linear": (
        Leaf("params", "kernel", "weight", "weight", "weight"),
        Leaf("params", "bias", "bias", "bias", "bias"),
    ),
    "norm": (
        Leaf("params", "scale", "weight", "weight", "weight"),
        Leaf("params", "bias", "bias", "bias", "bias"),
    ),
}
# Batches seen by a batch norm. Nothing reads it at a fixed momentum, but torch's strict loading
# asks for it: written as 0, accepted and dropped when reading.
COUNTER = "num_batches_tracked"

_STEM = Row("stem", "conv_norm", "conv_1", "stem", "{p}.conv_stem")
_INVERTED_RESIDUAL = (
    Row("expand", "conv_norm", "exp_1x1", "conv1_1x1", "expand_1x1"),
    Row("depthwise", "conv_norm", "conv_3x3", "conv2_kxk", "conv_3x3"),
    Row("project", "conv_norm", "red_1x1", "conv3_1x1", "reduce_1x1"),
)
_MOBILEVIT_RESIDUALS = (
    Scope("layer_{early}/block_{j}/", "layer_{i}.{j}.block.", "stages.{s}.{j}.",
          "{p}.encoder.layer.{s}.layer.{j}.", _INVERTED_RESIDUAL),
    Scope("layer_{late}/block_0/", "layer_{i}.0.block.", "stages.{s}.0.",
          "{p}.encoder.layer.{s}.downsampling_layer.", _INVERTED_RESIDUAL),
)
_BLOCK = ("layer_{late}/mobilevit/", "layer_{i}.1.", "stages.{s}.1.", "{p}.encoder.layer.{s}.")
_ATTENTION = ("layer_{late}/mobilevit/attention_{k}/", "layer_{i}.1.global_rep.{k}.",
              "stages.{s}.1.transformer.{k}.", "{p}.encoder.layer.{s}.transformer.layer.{k}.")

TABLES: Mapping[str, tuple[Scope, ...]] = {
    "mobilevit": (
        Scope("", "", "", "", (
            _STEM,
            Row("expand", "conv_norm", "conv_1x1_exp", "final_conv", "{p}.conv_1x1_exp"),
            Row("head", "linear", "classifier.fc", "head.fc", "classifier"),
        )),
        *_MOBILEVIT_RESIDUALS,
        Scope(*_BLOCK, (
            Row("local_conv", "conv_norm", "local_rep.conv_3x3", "conv_kxk", "conv_kxk"),
            Row("local_pointwise", "conv", "local_rep.conv_1x1", "conv_1x1", "conv_1x1"),
            Row("norm", "norm", "global_rep.{n}", "norm", "layernorm"),
            Row("project", "conv_norm", "conv_proj", "conv_proj", "conv_projection"),
            Row("fuse", "conv_norm", "fusion", "conv_fusion", "fusion"),
        )),
        Scope(*_ATTENTION, (
            Row("norm_1", "norm", "pre_norm_mha.0", "norm1", "layernorm_before"),
            Row("attention/qkv", "linear", "pre_norm_mha.1.qkv_proj", "attn.qkv",
                ("attention.attention.query", "attention.attention.key",
                 "attention.attention.value")),
            Row("attention/out", "linear", "pre_norm_mha.1.out_proj", "attn.proj",
                "attention.output.dense"),
            Row("norm_2", "norm", "pre_norm_ffn.0", "norm2", "layernorm_after"),
            Row("ffn_1", "linear", "pre_norm_ffn.1", "mlp.fc1", "intermediate.dense"),
            Row("ffn_2", "linear", "pre_norm_ffn.4", "mlp.fc2", "output.dense"),
        )),
    ),
    "mobilevit_v2": (
        Scope("", "", "", "", (
            _STEM,
            Row("head", "linear", "classifier.1", "head.fc", "classifier"),
        )),
        *_MOBILEVIT_RESIDUALS,
        Scope(*_BLOCK, (
            Row("local_depthwise", "conv_norm", "local_rep.0", "conv_kxk", "conv_kxk"),
            Row("local_pointwise", "conv", "local_rep.1", "conv_1x1", "conv_1x1"),
            Row("norm", "norm", "global_rep.{n}", "norm", "layernorm"),
            Row("project", "conv_norm", "conv_proj", "conv_proj", "conv_projection"),
        )),
        Scope(*_ATTENTION, (
            Row("norm_1", "norm", "pre_norm_attn.0", "norm1", "layernorm_before"),
            Row("attention/qkv", "conv", "pre_norm_attn.1.qkv_proj", "attn.qkv_proj",
                "attention.qkv_proj"),
            Row("attention/out", "conv", "pre_norm_attn.1.out_proj", "attn.out_proj",
                "attention.out_proj"),
            Row("norm_2", "norm", "pre_norm_ffn.0", "norm2", "layernorm_after"),
            Row("ffn_1", "conv", "pre_norm_ffn.1", "mlp.fc1", "ffn.conv1"),
            Row("ffn_2", "conv", "pre_norm_ffn.3", "mlp.fc2", "ffn.conv2"),
        )),
    ),
    # The MobileNets of timm and Hugging Face are other networks than cvnets' and ours.
    "mobilenet_v1": (
        Scope("", "", "", "", (
            Row("stem", "conv_norm", "conv_1", "", ""),
            Row("head", "linear", "classifier.classifier_fc", "", ""),
        )),
        Scope("layer_{i}/block_{j}/", "layer_{i}.{j}.", "", "", (
            Row("depthwise", "conv_norm", "dw_conv", "", ""),
            Row("pointwise", "conv_norm", "pw_conv", "", ""),
        )),
    ),
    "mobilenet_v2": (
        Scope("", "", "", "", (
            Row("stem", "conv_norm", "conv_1", "", ""),
            Row("expand", "conv_norm", "conv_1x1_exp", "", ""),
            Row("head", "linear", "classifier.classifier_fc", "", ""),
        )),
        Scope("layer_{i}/block_{j}/", "layer_{i}.mv2_block_{j}.block.", "", "",
              _INVERTED_RESIDUAL),
    ),
    "mobilenet_v3": (
        Scope("", "", "", "", (
            Row("stem", "conv_norm", "conv_1.conv_3x3_bn", "", ""),
            Row("expand", "conv_norm", "conv_1x1_exp.conv_1x1", "", ""),
            Row("head_hidden", "linear", "classifier.fc1", "", ""),
            Row("head", "linear", "classifier.classifier_fc", "", ""),
        )),
        Scope("layer_{i}/block_{j}/", "layer_{i}.mv3_s_{stride}_idx_{j}.block.", "", "", (
            *_INVERTED_RESIDUAL,
            Row("squeeze_excite/reduce", "conv", "se.se_layer.fc1", "", ""),
            Row("squeeze_excite/expand", "conv", "se.se_layer.fc2", "", ""),
        )),
    ),
}
# fmt: on
LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "mobilevit": FOREIGN,
    "mobilevit_v2": FOREIGN,
    "mobilenet_v1": ("cvnets",),
    "mobilenet_v2": ("cvnets",),
    "mobilenet_v3": ("cvnets",),
}
HF_PREFIXES = {"mobilevit": "mobilevit", "mobilevit_v2": "mobilevitv2"}
# cvnets spells the strides of MobileNet v3 out: layers whose first block has stride 2.
_V3_SMALL_STRIDED, _V3_LARGE_STRIDED = "1245", "2345"
_V3_ONLY_SMALL = "params/layer_1/block_0/squeeze_excite/reduce/kernel"
_FIELDS = {"i": "[1-5]", "early": "[12]", "late": "[345]", "j": r"\d+", "k": r"\d+"}

# Which naming a file uses, by a key that every network of it has …
_STEMS = (
    (NATIVE, r"^params/stem/"),
    ("cvnets", r"^conv_1\."),
    ("timm", r"^stem\.(conv|bn)\."),
    ("hf", r"^mobilevit(v2)?\.conv_stem\."),
)
# … and which family it holds, by keys that no other has.
_MARKS = (
    ("mobilevit", r"\.pre_norm_mha\.|\.attn\.qkv\.|^mobilevit\.|/fuse/"),
    ("mobilevit_v2", r"\.pre_norm_attn\.|\.attn\.qkv_proj\.|^mobilevitv2\.|/local_depthwise/"),
    ("mobilenet_v1", r"\.dw_conv\.|/pointwise/"),
    ("mobilenet_v2", r"\.mv2_block_"),
    ("mobilenet_v3", r"\.mv3_s_|/squeeze_excite/"),
)
_DENSE = r"^encoder\.|seg_head|segmentation_head|ssd_heads|^aux_head"
# The array whose output channels tell the variant, and what they tell.
_SIZES: Mapping[str, tuple[str, Mapping[int, Mapping[str, Any]] | int]] = {
    "mobilevit": (
        "params/expand/conv/kernel",
        {320: {"variant": "xxs"}, 384: {"variant": "xs"}, 640: {"variant": "s"}},
    ),
    "mobilevit_v2": ("params/layer_5/mobilevit/project/conv/kernel", 512),
    "mobilenet_v1": ("params/layer_5/block_1/pointwise/conv/kernel", 1024),
    "mobilenet_v2": ("params/layer_5/block_3/project/conv/kernel", 320),
    "mobilenet_v3": (
        "params/expand/conv/kernel",
        {576: {"variant": "small"}, 960: {"variant": "large"}},
    ),
}
SHOWN = 8  # lines of a list of failures


class Recognised(NamedTuple):
    """What the names and shapes in a file tell."""

    layout: str
    family: str
    fields: dict[str, Any]  # of the family's module
    num_classes: int


class _Target(NamedTuple):
    """Where one of our arrays lies elsewhere; several keys share its output channels."""

    keys: tuple[str, ...]
    kind: str


def failures(lines: Iterable[str]) -> str:
    """The first of many lines, indented, and how many more there are."""
    lines = list(lines)
    shown = "".join(f"\n  {line}" for line in lines[:SHOWN])
    return shown + (f"\n  … and {len(lines) - SHOWN} more" if len(lines) > SHOWN else "")


@functools.cache
def _patterns(family: str) -> list[tuple[re.Pattern[str], Scope, Row, Leaf]]:
    def pattern(template: str) -> re.Pattern[str]:
        return re.compile(re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{_FIELDS[m[1]]})", template))

    return [
        (pattern(f"{leaf.collection}/{scope.ours}{row.ours}/{leaf.ours}"), scope, row, leaf)
        for scope in TABLES[family]
        for row in scope.rows
        for leaf in LEAVES[row.kind]
    ]


def _match(path: str, family: str) -> tuple[dict[str, str], Scope, Row, Leaf] | None:
    """Where a path stands in the table, with the numbers in it."""
    for pattern, scope, row, leaf in _patterns(family):
        if match := pattern.fullmatch(path):
            return match.groupdict(), scope, row, leaf
    return None


def _targets(paths: Iterable[str], *, family: str, layout: str) -> dict[str, _Target]:
    """Foreign keys of our paths.

    Raises ValueError listing the paths that the other side has no name for.
    """
    if layout not in LAYOUTS[family]:
        raise ValueError(
            f"{family} has no form in {layout}; there is {', '.join((*LAYOUTS[family], NATIVE))}"
        )
    paths = list(paths)
    depths: dict[str, int] = {}  # attention layers by layer of the network
    for path in paths:
        if match := re.search(r"layer_(\d)/mobilevit/attention_(\d+)/", path):
            depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    strided = _V3_SMALL_STRIDED if _V3_ONLY_SMALL in paths else _V3_LARGE_STRIDED

    targets, unknown = {}, []
    for path in paths:
        found = _match(path, family)
        if found is None:
            unknown.append(path)
            continue
        numbers, scope, row, leaf = found
        i = numbers.get("i") or numbers.get("early") or numbers.get("late") or "1"
        fields = {
            "i": i,
            "s": int(i) - 1,
            "j": numbers.get("j"),
            "k": numbers.get("k"),
            "n": depths.get(i),
            "stride": 2 if numbers.get("j") == "0" and i in strided else 1,
            "p": HF_PREFIXES.get(family),
        }
        modules = getattr(row, layout)
        modules = (modules,) if isinstance(modules, str) else modules
        prefix, suffix = getattr(scope, layout), getattr(leaf, layout)
        keys = tuple(f"{prefix}{module}.{suffix}".format(**fields) for module in modules)
        targets[path] = _Target(keys, row.kind)
    if unknown:
        raise ValueError(f"{layout} has no name for{failures(unknown)}")
    return targets


def _foreign_shape(path: str, shape: tuple[int, ...], target: _Target) -> tuple[int, ...]:
    """Shape of each of the foreign arrays that make up ours."""
    if path.endswith("/kernel"):
        height, width, inside, out = shape if len(shape) == 4 else (1, 1, *shape)
        shape = (out, inside) if target.kind == "linear" else (out, inside, height, width)
    return (shape[0] // len(target.keys), *shape[1:])


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution is a linear layer; files have it as either."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def counters(keys: Iterable[str]) -> set[str]:
    """Keys of the batch counters that go with these running variances."""
    ends = tuple(
        getattr(leaf, layout)
        for leaf in LEAVES["conv_norm"]
        if leaf.ours == "norm/var"
        for layout in FOREIGN
    )
    return {key.removesuffix("running_var") + COUNTER for key in keys if key.endswith(ends)}


def to_foreign(
    flat: Mapping[str, np.ndarray], *, family: str, layout: str
) -> dict[str, np.ndarray]:
    """Our arrays by path, as the state dict of a network in cvnets, timm or Hugging Face.

    Args:
        flat: every variable of the network by path, "params/stem/conv/kernel" and so on.
        family: key of `TABLES`.
        layout: one of `FOREIGN`.

    Raises:
        ValueError: the other side has no place for some of them; all are listed.
    """
    targets = _targets(flat, family=family, layout=layout)
    state: dict[str, np.ndarray] = {}
    for path, target in targets.items():
        array = flat[path]
        if path.endswith("/kernel"):
            array = array.transpose((3, 2, 0, 1) if array.ndim == 4 else (1, 0))
        shape = _foreign_shape(path, flat[path].shape, target)
        parts = array.reshape(len(target.keys), *shape)
        state |= {
            key: np.array(part, order="C") for key, part in zip(target.keys, parts, strict=True)
        }
    return state | {key: np.zeros((), np.int64) for key in sorted(counters(state))}


def from_foreign(
    state: Mapping[str, np.ndarray],
    *,
    expected: Mapping[str, Any],
    family: str,
    layout: str,
) -> dict[str, np.ndarray]:
    """The reverse of `to_foreign`, for a network whose variables are known by path and shape.

    Args:
        state: arrays by foreign key.
        expected: anything with a `shape` by our path.
        family: key of `TABLES`.
        layout: one of `FOREIGN`.

    Raises:
        ValueError: keys are missing, too many or of another shape; all of them are counted and
            the first listed.
    """
    targets = _targets(expected, family=family, layout=layout)
    lines, wanted = [], set()
    for path, target in targets.items():
        want = _foreign_shape(path, tuple(expected[path].shape), target)
        for key in target.keys:
            wanted.add(key)
            if key not in state:
                lines.append(f"- {key} {want}")
            elif _squeezed(state[key].shape) != _squeezed(want):
                lines.append(f"~ {key} {state[key].shape}, expected {want}")
    extra = state.keys() - wanted - counters(wanted)
    lines += [f"+ {key} {state[key].shape}" for key in extra]
    if lines:
        raise ValueError(
            f"{len(lines)} tensors are not as they should be "
            f"(- missing, + unexpected, ~ of another shape):{failures(sorted(lines))}"
        )
    flat = {}
    for path, target in targets.items():
        array = np.concatenate([state[key] for key in target.keys])
        if path.endswith("/kernel"):
            shape = expected[path].shape
            if len(shape) == 4:
                array = array.reshape(array.shape[0], array.shape[1], *shape[:2])
                array = array.transpose(2, 3, 1, 0)
            else:
                array = array.reshape(array.shape[:2]).transpose(1, 0)
        flat[path] = np.array(array, order="C")
    return flat


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> Recognised:
    """Naming, family, variant and class count, from the names and shapes in a file.

    Args:
        shapes: shape of every array by key.

    Raises:
        ValueError: it is no classifier of this package's families, or a mixture of several.
    """
    layouts = _found(_STEMS, shapes)
    families = _found(_MARKS, shapes)
    some = ", ".join(list(shapes)[:3]) or "nothing"
    if any(re.search(_DENSE, key) for key in shapes):
        raise ValueError(f"it is a segmentation or detection network (it holds {some}, …)")
    if len(layouts) > 1 or len(families) > 1:
        mixed = [f"{key}  ({name})" for name, key in (layouts | families).items()]
        raise ValueError(f"its keys are of different networks:{failures(mixed)}")
    if not layouts:
        raise ValueError(
            f"it holds {some}, …; a network of this package's families has keys that begin with "
            "conv_1. (cvnets), stem. (timm), mobilevit. or mobilevitv2. (Hugging Face) or "
            "params/ (ours)"
        )
    layout = next(iter(layouts))
    # MobileNet v2 has no part of its own in our naming: it is what none of the others is.
    family = next(iter(families), "mobilenet_v2" if layout == NATIVE else "")
    if not family:
        raise ValueError(f"it holds {some}, … but no layers of a MobileViT or MobileNet")
    if layout not in (*LAYOUTS[family], NATIVE):
        raise ValueError(f"{family} is not read from {layout} files")
    path, rule = _SIZES[family]
    channels = _out_channels(shapes, path, family=family, layout=layout)
    if isinstance(rule, int):
        fields: dict[str, Any] = {"width": channels / rule}
    elif channels in rule:
        fields = dict(rule[channels])
    else:
        raise ValueError(
            f"{path} has {channels} channels; published networks have "
            f"{', '.join(str(number) for number in rule)}"
        )
    num_classes = _out_channels(shapes, HEAD_KERNEL, family=family, layout=layout)
    return Recognised(layout, family, fields, num_classes)


def _found(table: Iterable[tuple[str, str]], keys: Iterable[str]) -> dict[str, str]:
    """Entries of a table with the first key that each one's pattern matches."""
    found = {}
    for name, pattern in table:
        if key := next((key for key in keys if re.search(pattern, key)), None):
            found[name] = key
    return found


def _out_channels(
    shapes: Mapping[str, tuple[int, ...]], path: str, *, family: str, layout: str
) -> int:
    if layout == NATIVE:
        key, axis = path, -1
    else:
        key, axis = _targets([path], family=family, layout=layout)[path].keys[0], 0
    if not shapes.get(key):
        raise ValueError(f"- {key} is missing, which tells the size of the network")
    return shapes[key][axis]
