"""The config files that travel with weights: Hugging Face's, timm's and ours, read and written.

Pure: dicts in, dicts out; what cannot be meant is a ValueError. Before editing: an input
specification says how the weights want their images, and never follows from the format alone.
Decisions about what the formats leave open:

* cvnets files say nothing. MobileViT v1 was trained on OpenCV images: BGR, resized bilinearly
  without antialiasing. Pillow's bilinear filter is the nearest that `InputSpec` has, and is what
  Hugging Face's files name for the same weights.
* Hugging Face's files for MobileViT v2 ask for BGR, but Apple trained those weights on RGB, which
  is what reproduces the published accuracy. So v2 is read as RGB whatever the file says, except
  where this package wrote it: then `channel_order` in config.json decides.
* timm feeds RGB always; its v1 weights are cvnets' with the stem's input channels reversed.
"""

import importlib.resources
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mobilevit_jax.data.transforms import InputSpec

LIBRARY = "mobilevit_jax"
ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
# What published weights were evaluated with, where no file says so.
SPECS: Mapping[tuple[str, str], InputSpec] = {
    ("cvnets", "mobilevit"): InputSpec((256, 256), 288, "bilinear", "bgr", ZERO, ONE),
    ("cvnets", "mobilevit_v2"): InputSpec((256, 256), 288, "bicubic", "rgb", ZERO, ONE),
    ("cvnets", "mobilenet_v1"): InputSpec((224, 224), 256, "bilinear", "rgb", ZERO, ONE),
    ("cvnets", "mobilenet_v2"): InputSpec((224, 224), 256, "bilinear", "rgb", ZERO, ONE),
    ("cvnets", "mobilenet_v3"): InputSpec((224, 224), 256, "bilinear", "rgb", ZERO, ONE),
    ("timm", "mobilevit"): InputSpec((256, 256), 284, "bicubic", "rgb", ZERO, ONE),
    ("timm", "mobilevit_v2"): InputSpec((256, 256), 288, "bicubic", "rgb", ZERO, ONE),
    ("hf", "mobilevit"): InputSpec((256, 256), 288, "bilinear", "bgr", ZERO, ONE),
    ("hf", "mobilevit_v2"): InputSpec((256, 256), 288, "bilinear", "rgb", ZERO, ONE),
}
# The channel order that a format's own loaders assume of a family; any other order is turned into
# it by reversing the stem's input channels. Where there is no row, the files tell the order.
CHANNEL_ORDERS: Mapping[tuple[str, str], str] = {
    ("timm", "mobilevit"): "rgb",
    ("timm", "mobilevit_v2"): "rgb",
    ("cvnets", "mobilevit"): "bgr",
    ("cvnets", "mobilevit_v2"): "rgb",
    ("cvnets", "mobilenet_v1"): "rgb",
    ("cvnets", "mobilenet_v2"): "rgb",
    ("cvnets", "mobilenet_v3"): "rgb",
    ("hf", "mobilevit"): "bgr",
}
# Pillow's numbers of its filters.
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}

# fmt: off
TIMM_NAMES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "mobilevit_xxs": ("mobilevit", {"variant": "xxs"}),
    "mobilevit_xs": ("mobilevit", {"variant": "xs"}),
    "mobilevit_s": ("mobilevit", {"variant": "s"}),
    "mobilevitv2_050": ("mobilevit_v2", {"width": 0.5}),
    "mobilevitv2_075": ("mobilevit_v2", {"width": 0.75}),
    "mobilevitv2_100": ("mobilevit_v2", {"width": 1.0}),
    "mobilevitv2_125": ("mobilevit_v2", {"width": 1.25}),
    "mobilevitv2_150": ("mobilevit_v2", {"width": 1.5}),
    "mobilevitv2_175": ("mobilevit_v2", {"width": 1.75}),
    "mobilevitv2_200": ("mobilevit_v2", {"width": 2.0}),
}
# Hugging Face's hyper-parameters that decide what is computed …
HF_SHARED: Mapping[str, Any] = {
    "num_channels": 3, "patch_size": 2, "conv_kernel_size": 3, "hidden_act": "silu",
    "output_stride": 32, "layer_norm_eps": 1e-5,
}
HF_V1: Mapping[str, Mapping[str, Any]] = {
    "s": {"hidden_sizes": [144, 192, 240], "expand_ratio": 4.0,
          "neck_hidden_sizes": [16, 32, 64, 96, 128, 160, 640]},
    "xs": {"hidden_sizes": [96, 120, 144], "expand_ratio": 4.0,
           "neck_hidden_sizes": [16, 32, 48, 64, 80, 96, 384]},
    "xxs": {"hidden_sizes": [64, 80, 96], "expand_ratio": 2.0,
            "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 320]},
}
HF_V1_SHARED: Mapping[str, Any] = {"num_attention_heads": 4, "mlp_ratio": 2.0, "qkv_bias": True}
HF_V2: Mapping[str, Any] = {
    "base_attn_unit_dims": [128, 192, 256], "n_attn_blocks": [2, 4, 3], "expand_ratio": 2.0,
    "ffn_multiplier": 2,
}
# … and those that only matter to training or to other heads.
HF_TRAINING: Mapping[str, Mapping[str, Any]] = {
    "mobilevit": {
        "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02, "aspp_out_channels": 256,
        "aspp_dropout_prob": 0.1, "atrous_rates": [6, 12, 18], "semantic_loss_ignore_index": 255,
    },
    "mobilevit_v2": {
        "attn_dropout": 0.0, "ffn_dropout": 0.0, "initializer_range": 0.02,
        "aspp_out_channels": 512, "aspp_dropout_prob": 0.1, "atrous_rates": [6, 12, 18],
        "semantic_loss_ignore_index": 255,
    },
}
# fmt: on
HF_TYPES = {"mobilevit": "mobilevit", "mobilevitv2": "mobilevit_v2"}
HF_ARCHITECTURES = {
    "mobilevit": "MobileViTForImageClassification",
    "mobilevit_v2": "MobileViTV2ForImageClassification",
}
HF_PROCESSOR = "MobileViTImageProcessor"


class Description(NamedTuple):
    """What config files say of the weights beside them."""

    family: str
    fields: dict[str, Any]  # of the family's module
    num_classes: int | None  # None: they do not say
    labels: tuple[str, ...] | None
    input_spec: InputSpec
    note: str = ""  # something that the user should know
    source: Mapping[str, Any] = {}  # where the weights come from, as `write_native` stored it


def published_spec(family: str, size: tuple[int, int]) -> InputSpec:
    """How cvnets evaluates its networks of a family at a size (h, w)."""
    spec = SPECS["cvnets", family]
    # Those for larger images than usual are evaluated on the whole centre.
    return spec if size == spec.size else spec._replace(size=size, resize=min(size))


# --- labels --------------------------------------------------------------------------------


def default_labels(num_classes: int) -> tuple[str, ...]:
    """Class names of weights that come without: ImageNet's for 1000 classes, else LABEL_0 …"""
    if num_classes == 1000:
        # The words of the 1000 synsets in WordNet, by class index, as Hugging Face has them.
        text = (
            importlib.resources.files("mobilevit_jax.tools")
            .joinpath("imagenet_labels.txt")
            .read_text()
        )
        return tuple(text.splitlines())
    return tuple(f"LABEL_{i}" for i in range(num_classes))


def _labels(id2label: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    if id2label is None:
        return None
    try:
        named = {int(index): str(name) for index, name in id2label.items()}
        return tuple(named[i] for i in range(len(named)))
    except (AttributeError, ValueError, KeyError) as error:
        raise ValueError("id2label does not number the classes from 0 on without gaps") from error


def _id2label(labels: Sequence[str]) -> dict[str, Any]:
    label2id: dict[str, int] = {}
    for i, label in enumerate(labels):
        label2id.setdefault(label, i)  # labels may repeat: ImageNet has two cranes
    return {"id2label": {str(i): label for i, label in enumerate(labels)}, "label2id": label2id}


# --- Hugging Face --------------------------------------------------------------------------------


def _hf_network(family: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    if family == "mobilevit":
        return {**HF_SHARED, **HF_V1_SHARED, **HF_V1[fields["variant"]]}
    return {**HF_SHARED, **HF_V2, "width_multiplier": float(fields["width"])}


def read_hf(config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None) -> Description:
    """Reads config.json and, where there is one, preprocessor_config.json of Hugging Face.

    Raises:
        ValueError: another network than ours, or images prepared in another way than we can.
    """
    family = HF_TYPES.get(config["model_type"])
    if family is None:
        raise ValueError(f"model_type is {config['model_type']!r}; known: {', '.join(HF_TYPES)}")
    wanted = HF_ARCHITECTURES[family]
    if wanted not in (config.get("architectures") or [wanted]):
        raise ValueError(f"it is a {config['architectures'][0]}; only {wanted} is read")
    fields = _hf_fields(family, config)
    size = config.get("image_size", 256)
    height, width = (size, size) if isinstance(size, int) else size
    spec = SPECS["hf", family]
    if (height, width) != spec.size:
        spec = spec._replace(size=(height, width), resize=min(height, width))
    labels, note = _labels(config.get("id2label")), ""
    if preprocessor is not None:
        spec = _read_preprocessor(preprocessor, spec)
    if "channel_order" in config:
        spec = spec._replace(channel_order=config["channel_order"])
    elif family == "mobilevit_v2" and spec.channel_order == "bgr":
        spec = spec._replace(channel_order="rgb")
        if labels is not None and len(labels) != 1000:
            note = (
                "preprocessor_config.json asks for BGR; Apple's MobileViT v2 weights want RGB in "
                "spite of it, so these are taken for RGB too. If they were fine-tuned with Hugging "
                'Face\'s processor, put "channel_order": "bgr" into their config.json'
            )
    num_classes = len(labels) if labels is not None else config.get("num_labels")
    return Description(family, fields, num_classes, labels, spec, note)


def _hf_fields(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of our module whose hyper-parameters are the config's."""
    if family == "mobilevit":
        candidates: list[dict[str, Any]] = [{"variant": variant} for variant in HF_V1]
    else:
        candidates = [{"width": float(config.get("width_multiplier", 1.0))}]
    # Hugging Face's defaults are those of v1 s and of v2 with width 1.
    default = _hf_network(family, {"variant": "s", "width": 1.0})
    lines = []
    for fields in candidates:
        network = _hf_network(family, fields)
        given = {key: _plain(config.get(key, default[key])) for key in network}
        wrong = [key for key in network if given[key] != network[key]]
        if not wrong:
            return fields
        lines.append("; ".join(f"{key} is {given[key]}, not {network[key]}" for key in wrong))
    nearest = min(lines, key=lambda line: line.count(";"))
    raise ValueError(f"it describes no network of this package: {nearest}")


def _plain(value: Any) -> Any:
    value = list(value) if isinstance(value, tuple) else value
    return {"swish": "silu"}.get(value, value) if isinstance(value, str) else value


def _read_preprocessor(preprocessor: Mapping[str, Any], default: InputSpec) -> InputSpec:
    """The input specification in Hugging Face's form, old (integer sizes) or new."""
    kind = preprocessor.get("image_processor_type") or preprocessor.get(
        "feature_extractor_type", HF_PROCESSOR
    )
    if not kind.startswith("MobileViT"):
        raise ValueError(f"preprocessor_config.json: {kind} is not known; {HF_PROCESSOR} is")
    for key in ("do_resize", "do_center_crop", "do_rescale"):
        if preprocessor.get(key) is False:
            raise ValueError(f"preprocessor_config.json: {key} is false; only true is understood")
    factor = preprocessor.get("rescale_factor", 1 / 255)
    if not math.isclose(factor, 1 / 255, rel_tol=1e-4):
        raise ValueError(f"preprocessor_config.json: rescale_factor is {factor}; it must be 1/255")
    size = preprocessor.get("size", default.resize)
    if isinstance(size, Mapping):
        if "shortest_edge" not in size:
            raise ValueError(f"preprocessor_config.json: size is {dict(size)}; use shortest_edge")
        size = size["shortest_edge"]
    crop = preprocessor.get("crop_size", default.size)
    if isinstance(crop, Mapping):
        crop = (crop["height"], crop["width"])
    filters = {number: name for name, number in RESAMPLE.items()}
    resample = preprocessor.get("resample", RESAMPLE[default.interpolation])
    if resample not in filters:
        raise ValueError(f"preprocessor_config.json: resample is {resample}; known: {filters}")
    return default._replace(
        size=(crop, crop) if isinstance(crop, int) else tuple(crop),
        resize=size,
        interpolation=filters[resample],
        channel_order="bgr" if preprocessor.get("do_flip_channel_order", True) else "rgb",
    )


def write_preprocessor(spec: InputSpec) -> dict[str, Any]:
    """preprocessor_config.json in Hugging Face's form, every field explicit."""
    # The processor would normalise before it turns RGB into BGR.
    order = slice(None, None, -1 if spec.channel_order == "bgr" else 1)
    return {
        "image_processor_type": HF_PROCESSOR,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": spec.resize},
        "resample": RESAMPLE[spec.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": spec.size[0], "width": spec.size[1]},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": (spec.mean, spec.std) != (ZERO, ONE),
        "image_mean": list(spec.mean[order]),
        "image_std": list(spec.std[order]),
        "do_flip_channel_order": spec.channel_order == "bgr",
        "do_reduce_labels": False,
    }


def write_hf(
    family: str, fields: Mapping[str, Any], labels: Sequence[str], spec: InputSpec
) -> dict[str, Any]:
    """config.json for `from_pretrained`.

    Raises:
        ValueError: Hugging Face's image processor cannot prepare images in this way.
    """
    if (spec.mean, spec.std) != (ZERO, ONE):
        raise ValueError(
            f"{HF_PROCESSOR} subtracts no mean and divides by no standard deviation, and these "
            f"weights want mean {spec.mean} and std {spec.std}; use --format=native or timm"
        )
    size = spec.size[0] if spec.size[0] == spec.size[1] else list(spec.size)
    return {
        "architectures": [HF_ARCHITECTURES[family]],
        "model_type": next(name for name, ours in HF_TYPES.items() if ours == family),
        "dtype": "float32",
        "image_size": size,
        **_hf_network(family, fields),
        **HF_TRAINING[family],
        **_hf_dropouts(family, fields),
        "problem_type": "single_label_classification",
        **_id2label(labels),
        "channel_order": spec.channel_order,
    }


def _hf_dropouts(family: str, fields: Mapping[str, Any]) -> dict[str, float]:
    dropouts = {"classifier_dropout_prob": float(fields.get("dropout", 0.0))}
    if family == "mobilevit":
        block = fields.get("block_dropout")
        published = 0.05 if fields["variant"] == "xxs" else 0.1
        dropouts["hidden_dropout_prob"] = published if block is None else float(block)
    return dropouts


# --- timm --------------------------------------------------------------------------------


def read_timm(config: Mapping[str, Any]) -> Description:
    """Reads timm's config.json, the present form or the older one without a pretrained_cfg.

    Raises:
        ValueError: another network than ours, or images prepared in another way than we can.
    """
    name = config["architecture"].split(".")[0]
    if name not in TIMM_NAMES:
        raise ValueError(f"architecture is {name!r}; known: {', '.join(TIMM_NAMES)}")
    family, fields = TIMM_NAMES[name]
    values = config.get("pretrained_cfg", config)
    default = SPECS["timm", family]
    if values.get("crop_mode", "center") != "center":
        raise ValueError(f"crop_mode is {values['crop_mode']!r}; only 'center' is understood")
    _, height, width = values.get("input_size", (3, *default.size))
    crop = values.get("crop_pct", min(default.size) / default.resize)
    spec = InputSpec(
        size=(height, width),
        resize=math.floor(min(height, width) / crop),
        interpolation=values.get("interpolation", default.interpolation),
        channel_order="rgb",
        mean=_triple(values.get("mean", ZERO)),
        std=_triple(values.get("std", ONE)),
    )
    num_classes = config.get("num_classes", values.get("num_classes"))
    names = config.get("label_names") or values.get("label_names") or values.get("labels")
    labels = None
    if names:
        texts = config.get("label_descriptions") or values.get("label_descriptions") or {}
        keys = (_labels(names) or ()) if isinstance(names, Mapping) else names
        labels = tuple(str(texts.get(key, key)) for key in keys)
    return Description(family, dict(fields), num_classes, labels, spec)


def write_timm(
    family: str, fields: Mapping[str, Any], labels: Sequence[str], spec: InputSpec, *, features: int
) -> dict[str, Any]:
    """config.json for `timm.create_model("local-dir:…")` and timm's Hub.

    Args:
        family: key of zoo.FAMILIES.
        fields: of the network, those that tell its variant.
        labels: class names.
        spec: in RGB.
        features: channels that enter the classifier.

    Raises:
        ValueError: timm has no name for such a network.
    """
    same = [name for name, row in TIMM_NAMES.items() if row == (family, dict(fields))]
    if not same:
        raise ValueError(
            f"timm has no name for a {family} with {dict(fields)}; it has {', '.join(TIMM_NAMES)}"
        )
    return {
        "architecture": same[0],
        "num_classes": len(labels),
        "num_features": features,
        "global_pool": "avg",
        "label_names": list(labels),
        "pretrained_cfg": {
            "tag": LIBRARY,
            "custom_load": False,
            "input_size": [3, *spec.size],
            "fixed_input_size": False,
            "interpolation": spec.interpolation,
            "crop_pct": _crop_share(min(spec.size), spec.resize),
            "crop_mode": "center",
            "mean": list(spec.mean),
            "std": list(spec.std),
            "num_classes": len(labels),
            "pool_size": [math.ceil(side / 32) for side in spec.size],
            "first_conv": "stem.conv",
            "classifier": "head.fc",
        },
        **_id2label(labels),
    }


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)


def _crop_share(size: int, resize: int) -> float:
    """The shortest decimal number c for which timm's floor(size / c) is `resize`."""
    for digits in range(1, 16):
        share = math.floor(10**digits * size / resize) / 10**digits
        if share and math.floor(size / share) == resize:
            return share
    return size / resize


# --- ours --------------------------------------------------------------------------------


def read_native(config: Mapping[str, Any]) -> Description:
    """Reads what `write_native` wrote.

    Raises:
        ValueError: a key is missing or of another type.
    """
    try:
        fields = {key: _tuples(value) for key, value in config["model"].items()}
        family = fields.pop("name")
        labels = _labels(config["id2label"]) or ()
        spec = InputSpec(**{key: _tuples(value) for key, value in config["input_spec"].items()})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"something is missing or of another type: {error}") from error
    return Description(family, fields, len(labels), labels, spec, source=config.get("source", {}))


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def write_native(
    family: str,
    fields: Mapping[str, Any],
    labels: Sequence[str],
    spec: InputSpec,
    *,
    source: Mapping[str, Any],
) -> dict[str, Any]:
    """config.json of our own directories, with every field of the network.

    Args:
        family: key of zoo.FAMILIES.
        fields: of the network, all.
        labels: class names.
        spec: input specification.
        source: where the weights come from, JSON values.
    """
    return {
        "library_name": LIBRARY,
        "model": {"name": family, **fields},
        "input_spec": spec._asdict(),
        "source": dict(source),
        **_id2label(labels),
    }
