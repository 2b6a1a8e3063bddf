"""Writes a model as a directory that Hugging Face, timm, cvnets or this package loads as it is.

A directory appears whole or not at all: it is written beside its place and then renamed. Weights
are not altered, except that the stem's input channels are reversed where the target's loaders feed
them in the other order (formats.CHANNEL_ORDERS).
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from mobilevit_jax import build, tree
from mobilevit_jax.models import zoo
from mobilevit_jax.tools import files, formats, names, pretrained

# Fields of a network that the directory it is written to need not say: they concern training.
TRAINING_FIELDS = ("dropout", "block_dropout", "weight_init")
VARIANT_FIELDS = ("variant", "width")
APPLE_LICENCE = "https://github.com/apple/ml-cvnets/blob/main/LICENSE"


class Converted(NamedTuple):
    """What was written: the directory, its files, and remarks for the user."""

    target: pathlib.Path
    files: tuple[str, ...]
    notes: tuple[str, ...]


class _Model(NamedTuple):
    """A network that is to be written; its arrays are in the target's channel order."""

    family: str
    fields: dict[str, Any]
    flat: dict[str, np.ndarray]
    spec: formats.InputSpec
    labels: tuple[str, ...]
    source: dict[str, Any]

    @property
    def variant(self) -> dict[str, Any]:
        return {key: self.fields[key] for key in VARIANT_FIELDS if key in self.fields}


def convert(
    source: str | pathlib.Path,
    target: str | pathlib.Path,
    *,
    format: str,
    weights: str = "ema",
    checkpoint: str = "newest",
    average: int = 1,
) -> Converted:
    """Writes the model that a reference means to a new directory.

    Args:
        source: model reference, see pretrained.FORMS.
        target: directory that is not there yet, or empty.
        format: key of `FORMATS`.
        weights: of a run: "ema" or "raw".
        checkpoint: of a run: "newest", "best" or a step.
        average: of a run: the number of newest checkpoints to write the mean of, batch statistics
            included.

    Raises:
        ConfigError: the target is taken, or the format has no form for this network.
        CheckpointError: the source cannot be read or the target not be written.
    """
    if format not in FORMATS:
        raise build.ConfigError(f"format is {format!r}; there are {', '.join(FORMATS)}")
    target = pathlib.Path(target).expanduser()
    files.check_free(target)
    if format == "cvnets":
        files.optional("torch", "cvnets reads PyTorch's own files")
    loaded = pretrained.read(source, weights=weights, checkpoint=checkpoint, average=average)
    model, notes = _prepare(loaded, format)
    try:
        contents = FORMATS[format](model)
    except ValueError as error:
        raise build.ConfigError(f"{source} cannot be written as {format}: {error}") from error
    contents["preprocessor_config.json"] = formats.write_preprocessor(model.spec)
    contents["README.md"] = _card(model, format, title=target.absolute().name)
    with files.new_directory(target) as directory:
        for name, content in contents.items():
            _write_file(directory / name, content)
    return Converted(target, tuple(sorted(contents)), tuple(notes))


def _prepare(loaded: pretrained.Loaded, format: str) -> tuple[_Model, list[str]]:
    """Checks that the format can express the network, and brings the stem into its order."""
    network, spec = loaded.pretrained.model, loaded.pretrained.input_spec
    fields = zoo.fields(network)
    flat = tree.flatten(loaded.pretrained.variables)
    notes = []
    if format != "native":
        _check_expressible(network, fields, format)
    wanted = formats.CHANNEL_ORDERS.get((format, loaded.family), spec.channel_order)
    if wanted != spec.channel_order:
        notes.append(
            f"the stem's input channels are reversed: {format} feeds {wanted.upper()}, and these "
            f"weights want {spec.channel_order.upper()}"
        )
        flat[names.STEM_KERNEL] = flat[names.STEM_KERNEL][:, :, ::-1]
        spec = spec._replace(channel_order=wanted, mean=spec.mean[::-1], std=spec.std[::-1])
    if (format, loaded.family) == ("hf", "mobilevit_v2") and any(side % 64 for side in spec.size):
        notes.append(
            "at sizes that are not multiples of 64, Hugging Face's MobileViTV2 zeroes the last row "
            "and column of maps with odd sides, where cvnets, timm and this package resize them: "
            f"its logits at {spec.size[0]}x{spec.size[1]} differ from those here"
        )
    labels = loaded.pretrained.labels
    return _Model(loaded.family, fields, flat, spec, labels, loaded.source), notes


def _check_expressible(network: Any, fields: Mapping[str, Any], format: str) -> None:
    """Refuses networks whose fields change what is computed in a way that others do not know."""
    defaults = {field.name: field.default for field in dataclasses.fields(network)}
    changed = [
        f"{name} {value!r} (it has {defaults[name]!r})"
        for name, value in fields.items()
        if name not in (*TRAINING_FIELDS, *VARIANT_FIELDS) and value != defaults[name]
    ]
    if changed:
        raise build.ConfigError(
            f"{format} has no network with {', '.join(changed)}; use --format=native"
        )


# --- formats: contents of the directory by file name ----------------------------------------------

Contents = dict[str, Any]  # a dict of arrays, JSON values or text, as the file's suffix says


def _native(model: _Model) -> Contents:
    config = formats.write_native(
        model.family, model.fields, model.labels, model.spec, source=model.source
    )
    return {"model.safetensors": model.flat, "config.json": config}


def _hf(model: _Model) -> Contents:
    state = names.to_foreign(model.flat, family=model.family, layout="hf")
    config = formats.write_hf(model.family, model.fields, model.labels, model.spec)
    return {"model.safetensors": state, "config.json": config}


def _timm(model: _Model) -> Contents:
    state = names.to_foreign(model.flat, family=model.family, layout="timm")
    features = model.flat[names.HEAD_KERNEL].shape[0]
    config = formats.write_timm(
        model.family, model.variant, model.labels, model.spec, features=features
    )
    return {"model.safetensors": state, "config.json": config}


def _cvnets(model: _Model) -> Contents:
    state = names.to_foreign(model.flat, family=model.family, layout="cvnets")
    # cvnets has no config file of its own for this; ours keeps labels and input specification.
    config = formats.write_native(
        model.family, model.fields, model.labels, model.spec, source=model.source
    )
    return {"model.safetensors": state, "model.pt": state, "config.json": config}


FORMATS: Mapping[str, Callable[[_Model], Contents]] = {
    "native": _native,
    "hf": _hf,
    "timm": _timm,
    "cvnets": _cvnets,
}


# --- writing --------------------------------------------------------------------------------------


def _write_file(path: pathlib.Path, content: Any) -> None:
    if path.suffix == ".safetensors":
        # safetensors writes the buffer as it lies in memory, whatever the strides say.
        whole = {key: np.array(array, order="C") for key, array in content.items()}
        safetensors.numpy.save_file(whole, path, metadata={"format": "pt"})
    elif path.suffix == ".pt":
        torch = files.optional("torch", "cvnets reads PyTorch's own files")
        torch.save({key: torch.from_numpy(array) for key, array in content.items()}, path)
    elif path.suffix == ".json":
        files.write_json(path, content)
    else:
        path.write_text(content, encoding="utf-8")


# --- model card -----------------------------------------------------------------------------------

LIBRARIES = {"native": formats.LIBRARY, "hf": "transformers", "timm": "timm", "cvnets": "cvnets"}
USAGE = {
    "native": """import mobilevit_jax

model, variables, input_spec, labels = mobilevit_jax.load("{title}")
logits = model.apply(variables, image)["logits"]  # image: b h w 3, scaled to 0..1""",
    "hf": """from transformers import pipeline

print(pipeline("image-classification", model="{title}")("image.jpg"))""",
    "timm": """import timm

model = timm.create_model(
    "{name}", num_classes={classes}, checkpoint_path="{title}/model.safetensors"
).eval()""",
    "cvnets": """import torch

model.load_state_dict(torch.load("{title}/model.pt", weights_only=True), strict=True)""",
}


def _card(model: _Model, format: str, *, title: str) -> str:
    """README.md: what it is, how it was evaluated, how to feed it and how to load it."""
    spec, source = model.spec, model.source
    reference = source["reference"]
    metrics: Mapping[str, float] = source.get("metrics") or {}
    shown = ", ".join(f"{key} {value}" for key, value in model.variant.items())
    count = sum(array.size for path, array in model.flat.items() if path.startswith("params/"))
    lines = [
        "---",
        f"library_name: {LIBRARIES[format]}",
        "pipeline_tag: image-classification",
        "tags: [image-classification, vision, mobilevit]",
        *(_model_index(title, source["data"], metrics) if metrics else ()),
        "---",
        "",
        f"# {title}",
        "",
        f"{model.family} ({shown}), {count:,} parameters, {len(model.labels)} classes. "
        f"{_origin(source)}",
        "",
    ]
    if metrics:
        lines += [
            f"Evaluated on the validation split of `{source['data']}` after "
            f"{source['step']:,} steps, {source['weights']} weights:",
            "",
            "| metric | value |",
            "|---|---|",
            *(f"| {name} | {value:.4f} |" for name, value in metrics.items()),
            "",
        ]
    normal = (spec.mean, spec.std) == (formats.ZERO, formats.ONE)
    lines += [
        "## Input",
        "",
        f"Short side resized to {spec.resize} pixels ({spec.interpolation}), centre "
        f"{spec.size[0]}x{spec.size[1]}, {spec.channel_order.upper()}, pixels divided by 255"
        + ("." if normal else f", less {spec.mean}, over {spec.std}."),
        "",
        "## Use",
        "",
        "```python",
        USAGE[format].format(title=title, classes=len(model.labels), name=_timm_name(model)),
        "```",
        "",
    ]
    if "step" not in source:
        lines += [
            f"The licence of the weights is that of {reference}; Apple's published weights are "
            f"under {APPLE_LICENCE}.",
            "",
        ]
    return "\n".join(lines)


def _origin(source: Mapping[str, Any]) -> str:
    if source.get("weights") == "random":
        return f"Random weights of {source['reference']}, not trained."
    if source.get("mean_of"):
        steps = ", ".join(f"{step:,}" for step in source["mean_of"])
        return (
            f"Trained with {formats.LIBRARY}; the mean of the {source['weights']} weights after "
            f"{steps} steps."
        )
    if "step" in source:
        return f"Trained with {formats.LIBRARY}."
    return f"Converted from {source['reference']} by {formats.LIBRARY}."


def _timm_name(model: _Model) -> str:
    row = (model.family, model.variant)
    return next((name for name, known in formats.TIMM_NAMES.items() if known == row), "")


def _model_index(title: str, data: str, metrics: Mapping[str, float]) -> list[str]:
    """The metrics in the form in which the Hub shows them."""
    lines = [
        "model-index:",
        f"- name: {json.dumps(title)}",
        "  results:",
        "  - task:",
        "      type: image-classification",
        "    dataset:",
        f"      name: {json.dumps(data)}",
        f"      type: {json.dumps(data)}",
        "    metrics:",
    ]
    kinds = {"top1": "accuracy", "top5": "accuracy"}
    for name, value in metrics.items():
        lines += [f"    - type: {kinds.get(name, name)}", f"      name: {name}"]
        lines += [f"      value: {value}"]
    return lines
