"""From a reference to a network with its weights; the other tools take their models from here.

A reference is a run's workdir, a directory in Hugging Face's, timm's, cvnets' or our own layout, a
Hub id, a weights file, or a zoo name. Weights come as they are, in float32: what they want of their
images is told by the input specification, not changed in them.

Before editing: directories come from strangers. Whatever is wrong with what they hold is one
message that names the file, and every key of theirs and ours is accounted for.
"""

import functools
import json
import math
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mobilevit_jax import build, checkpoint, report, steps, tree
from mobilevit_jax.data.transforms import InputSpec, evaluation
from mobilevit_jax.models import zoo
from mobilevit_jax.tools import files, formats, names
from mobilevit_jax.tree import Tree

FORMS = """A model reference is one of
  a workdir of a training run                    runs/flowers
  one of its checkpoints                         runs/flowers/checkpoints/3000
  a directory of Hugging Face, timm or this package, with config.json and model.safetensors
  an id on the Hugging Face Hub                  apple/mobilevitv2-1.0-imagenet1k-256
  an id of timm's on the Hub                     hf-hub:timm/mobilevitv2_100.cvnets_in1k
  a file of weights (.pt .pth .bin .safetensors) mobilevitv2-1.0.pt
  a name of the zoo, for random weights          mobilevitv2_100"""


class Pretrained(NamedTuple):
    """A network with weights.

    Attributes:
        model: `model.apply(variables, image)["logits"]`, for float images scaled to 0..1 in the
            channel order of the input specification.
        variables: "params" and "batch_stats", arrays in float32.
        input_spec: how the weights want their images.
        labels: class names, in the order of the logits.
    """

    model: zoo.nn.Module
    variables: dict[str, Tree]
    input_spec: InputSpec
    labels: tuple[str, ...]


class Loaded(NamedTuple):
    """A network with what is known of its origin.

    Attributes:
        pretrained: the network.
        family: key of zoo.FAMILIES.
        source: where the weights come from, as JSON values: "reference", and for those of a run
            "weights", "step", "data" and "metrics".
    """

    pretrained: Pretrained
    family: str
    source: dict[str, Any]

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever uses these weights should be told."""
        if self.source.get("weights") != "random":
            return ()
        return (f"the weights of {self.source['reference']} are random, not trained",)


class Run(NamedTuple):
    """What a training run left.

    Attributes:
        network: model, task, input specification, class names.
        weights: variables as numpy arrays, under "raw" and "ema".
        step: optimiser steps done.
        mean_of: the steps whose weights were averaged; empty where they are those of `step`.
    """

    network: build.Network
    weights: dict[str, Tree]
    step: int
    mean_of: tuple[int, ...]


def load(
    reference: str | pathlib.Path,
    *,
    weights: str = "ema",
    checkpoint: str = "newest",
    num_classes: int | None = None,
) -> Pretrained:
    """The network that a reference means; see the top of this file for what there is.

    Args:
        reference: what is there as a file or directory is taken as such, else as a name.
        weights: of a run: "ema" or "raw".
        checkpoint: of a run: "newest", "best" or a step.
        num_classes: of a zoo name: outputs of the classifier (None: as published). Of anything
            else: as many as there must be.

    Raises:
        ConfigError: the reference means nothing, or an argument does not go with it.
        CheckpointError: there are no such weights, or they cannot be read.
    """
    loaded = read(reference, weights=weights, checkpoint=checkpoint, num_classes=num_classes)
    variables = jax.tree.map(jnp.asarray, loaded.pretrained.variables)
    return loaded.pretrained._replace(variables=variables)


def read(
    reference: str | pathlib.Path,
    *,
    weights: str = "ema",
    checkpoint: str = "newest",
    num_classes: int | None = None,
    average: int = 1,
) -> Loaded:
    """`load` for tools: numpy arrays, and what is known of where the weights come from.

    Of a run, `average` is the number of newest checkpoints whose mean the weights are to be.
    """
    if weights not in ("ema", "raw"):
        raise build.ConfigError(f"weights is {weights!r}; write ema or raw")
    path, name = pathlib.Path(reference).expanduser(), str(reference)
    if run := find_run(path, checkpoint):
        path, which = run
        loaded = _read_run(path, weights=weights, which=which, average=average)
    elif (weights, checkpoint, average) != ("ema", "newest", 1):
        raise build.ConfigError(
            f"{name} is no workdir of a run: weights={weights}, checkpoint={checkpoint} and "
            f"average={average} choose among what a run keeps"
        )
    elif path.is_dir():
        loaded = _read_directory(path)
    elif path.is_file():
        loaded = _assemble(path, None, beside=path)
    elif name in zoo.ZOO:
        return _random(name, num_classes)
    elif files.is_hub_id(name):
        loaded = _read_directory(files.download(name))
    else:
        could_be = files.HUB_ID.fullmatch(name) is not None
        hint = f" (an id on the Hub? {files.HUB_PREFIX}{name})" if could_be else ""
        raise build.ConfigError(
            f"there is no file, directory or zoo name {name!r}{hint}.\n{FORMS}\n"
            f"Names of the zoo: {', '.join(zoo.ZOO)}"
        )
    found = len(loaded.pretrained.labels)
    if num_classes not in (None, found):
        raise build.ConfigError(f"{name} has {found} classes, not {num_classes}")
    _warn_not_finite(loaded.pretrained.variables, name)
    # Of a path only the name: where it lies on this machine is nobody's business elsewhere.
    reference = path.resolve().name if path.exists() else name
    return loaded._replace(source={**loaded.source, "reference": reference})


def find_run(path: pathlib.Path, which: str = "newest") -> tuple[pathlib.Path, str] | None:
    """The workdir of a training run and which of its checkpoints a reference means.

    Args:
        path: a workdir, or a checkpoint inside of one.
        which: of a workdir, "newest", "best" or a step.

    Returns:
        Workdir and "newest", "best" or a step; None where the path is neither.

    Raises:
        ConfigError: the path is a checkpoint, and `which` another.
    """
    if _is_workdir(path):
        return path, which
    kind, workdir = path.absolute().parent.name, path.absolute().parent.parent
    if kind not in (checkpoint.NEWEST, checkpoint.BEST) or not path.name.isdigit():
        return None
    if not _is_workdir(workdir):
        return None
    named = "best" if kind == checkpoint.BEST else path.name
    if which not in ("newest", named):
        raise build.ConfigError(f"{path} is one checkpoint; checkpoint={which} names another")
    return workdir, named


def _is_workdir(path: pathlib.Path) -> bool:
    if any((path / name).is_file() for name in files.WEIGHTS):
        return False
    return (path / "labels.json").is_file() or (path / checkpoint.NEWEST).is_dir()


def describe(reference: str) -> tuple[str, zoo.nn.Module, InputSpec]:
    """Family, network and input specification of what a reference means, for `build.resolve`.

    Raises:
        ConfigError, CheckpointError: as `load`.
    """
    if reference in zoo.ZOO and not pathlib.Path(reference).exists():
        return _published(reference, None)
    loaded = read(reference)
    return loaded.family, loaded.pretrained.model, loaded.pretrained.input_spec


def _nest(flat: Mapping[str, np.ndarray]) -> dict[str, Tree]:
    """Arrays by path, "params/stem/conv/kernel", as nested dicts."""
    variables: dict[str, Any] = {}
    for path, array in flat.items():
        *parents, leaf = path.split("/")
        node = variables
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return variables


def _warn_not_finite(variables: dict[str, Tree], name: str) -> None:
    broken = [path for path, array in tree.flatten(variables).items() if not _finite(array)]
    if broken:
        warnings.warn(
            f"{name}: {len(broken)} arrays hold values that are no finite numbers:"
            f"{names.failures(broken)}",
            stacklevel=3,
        )


def _finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array).all())


# --- runs and the zoo ---------------------------------------------------------------------------


def load_run(
    workdir: pathlib.Path,
    *,
    config: build.Config | None = None,
    which: str = "newest",
    average: int = 1,
) -> Run:
    """Reads a run's network and weights, on whatever devices it was trained.

    Args:
        workdir: of the run.
        config: whose model to put the weights into; None for the run's own.
        which: checkpoint: "newest", "best" or a step number.
        average: with "newest", how many of the newest to take the mean of.

    Raises:
        ConfigError: the directory is no run, or `average` does not go with `which`.
        CheckpointError: there is no such checkpoint, or it cannot be read.
        MismatchError: the weights are of another model than the config's.
    """
    if not workdir.is_dir():
        raise build.ConfigError(f"there is no directory {workdir}")
    config = config or build.from_json(workdir / "config.json")
    labels_path = workdir / "labels.json"
    try:
        class_names = tuple(json.loads(labels_path.read_text()))
    except (OSError, ValueError) as error:
        raise build.ConfigError(f"{labels_path} cannot be read: {error}") from error
    network = build.network(config, class_names)
    if average == 1:
        restored = checkpoint.read(workdir, which)
    elif which == "newest":
        restored = checkpoint.read_mean(workdir, average)
    else:
        raise build.ConfigError(
            f"the newest {average} checkpoints are averaged; checkpoint={which} does not go with it"
        )
    state = steps.TrainState(**restored.state)
    expected = steps.abstract_variables(network.model, network.input_spec.size)
    checkpoint.check_matches(expected, state.variables("raw"), where=workdir)
    weights = {name: state.variables(name) for name in ("raw", "ema")}
    return Run(network, weights, restored.step, tuple(restored.meta.get("mean_of", ())))


def _read_run(workdir: pathlib.Path, *, weights: str, which: str, average: int) -> Loaded:
    config = build.from_json(workdir / "config.json")
    run = load_run(workdir, config=config, which=which, average=average)
    source: dict[str, Any] = {"weights": weights, "step": run.step, "data": config.data.name}
    if run.mean_of:  # nobody has evaluated the mean
        source |= {"metrics": {}, "mean_of": list(run.mean_of)}
    else:
        path = workdir / "metrics.jsonl"
        source["metrics"] = _metrics(path, weights=weights, step=run.step)
    network = run.network
    variables = run.weights[weights]
    pretrained = Pretrained(network.model, variables, network.input_spec, network.class_names)
    return Loaded(pretrained, config.model.name, source)


def _metrics(path: pathlib.Path, *, weights: str, step: int) -> dict[str, float]:
    """What the evaluation after a step said, such as {"top1": 0.9}; empty where there was none."""
    prefix = {"raw": "val/", "ema": "val_ema/"}[weights]
    metrics: dict[str, float] = {}
    for row in report.read_metrics(path) if path.is_file() else ():
        if row["step"] == step:
            metrics |= {
                key.removeprefix(prefix): value
                for key, value in row.items()
                if key.startswith(prefix) and math.isfinite(value)
            }
    return metrics


def _published(name: str, num_classes: int | None) -> tuple[str, zoo.nn.Module, InputSpec]:
    entry = zoo.ZOO[name]
    if num_classes is None:
        num_classes = entry.num_classes
    if num_classes < 1:
        raise build.ConfigError(f"num_classes is {num_classes}; it must be at least 1")
    model = zoo.create(entry.family, num_classes=num_classes, **entry.fields)
    return entry.family, model, formats.published_spec(entry.family, entry.size)


def _random(name: str, num_classes: int | None) -> Loaded:
    family, model, spec = _published(name, num_classes)
    init = functools.partial(steps.init_variables, model, 0, spec.size)
    variables = jax.device_get(steps.run_once(init))
    labels = formats.default_labels(variables["params"]["head"]["bias"].size)
    source = {"reference": name, "weights": "random"}
    return Loaded(Pretrained(model, variables, spec, labels), family, source)


# --- directories and files ----------------------------------------------------------------------


def _read_directory(directory: pathlib.Path) -> Loaded:
    config_path = directory / "config.json"
    paths = [directory / name for name in files.WEIGHTS if (directory / name).is_file()]
    if not paths:
        raise build.ConfigError(
            f"{directory} holds no weights ({', '.join(files.WEIGHTS)}) and is no workdir of a run "
            f"(labels.json and {checkpoint.NEWEST}/).\n{FORMS}"
        )
    if not config_path.is_file():
        return _assemble(paths[0], None, beside=paths[0])
    return _assemble(paths[0], _describe(config_path), beside=config_path)


def _describe(config_path: pathlib.Path) -> formats.Description:
    """What the config files of a directory say."""
    config = files.read_json(config_path)
    preprocessor_path = config_path.with_name("preprocessor_config.json")
    try:
        if config.get("library_name") == formats.LIBRARY:
            return formats.read_native(config)
        if "architecture" in config:
            return formats.read_timm(config)
        if "model_type" in config:
            there = preprocessor_path.is_file()
            return formats.read_hf(config, files.read_json(preprocessor_path) if there else None)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        # Strangers' files: a value of another type than its key promises ends up here too.
        raise checkpoint.CheckpointError(f"{config_path}: {error}") from error
    raise checkpoint.CheckpointError(
        f"{config_path} is not of Hugging Face (model_type), timm (architecture) or "
        f'{formats.LIBRARY} (library_name "{formats.LIBRARY}")'
    )


def _assemble(
    path: pathlib.Path, description: formats.Description | None, *, beside: pathlib.Path
) -> Loaded:
    """Puts the weights of a file into the network that is described, or else recognised."""
    state = files.read_tensors(path)
    try:
        found = names.recognise({key: array.shape for key, array in state.items()})
    except ValueError as error:
        raise checkpoint.CheckpointError(f"{path}: {error}") from error
    if description is None:
        if found.layout == names.NATIVE:
            raise build.ConfigError(
                f"{path} needs the config.json that was beside it; give the whole directory"
            )
        spec = formats.SPECS[found.layout, found.family]
        description = formats.Description(found.family, found.fields, None, None, spec)
    if description.family != found.family:
        raise checkpoint.CheckpointError(
            f"{beside} describes a {description.family}, and {path.name} holds a {found.family}"
        )
    if description.num_classes not in (None, found.num_classes):
        raise checkpoint.CheckpointError(
            f"{beside} names {description.num_classes} classes, and the classifier in {path.name} "
            f"has {found.num_classes}"
        )
    if description.note:
        warnings.warn(f"{beside.parent}: {description.note}", stacklevel=4)
    try:
        evaluation(description.input_spec)  # checks the values
        model = zoo.create(description.family, num_classes=found.num_classes, **description.fields)
        expected = steps.abstract_variables(model, description.input_spec.size)
        flat = _import(state, tree.flatten(expected), found)
    except (ValueError, TypeError) as error:
        raise checkpoint.CheckpointError(f"{path}: {error}") from error
    labels = description.labels or formats.default_labels(found.num_classes)
    pretrained = Pretrained(model, _nest(flat), description.input_spec, labels)
    return Loaded(pretrained, description.family, dict(description.source))


def _import(
    state: Mapping[str, np.ndarray], expected: Mapping[str, Any], found: names.Recognised
) -> dict[str, np.ndarray]:
    if found.layout != names.NATIVE:
        return names.from_foreign(
            state, expected=expected, family=found.family, layout=found.layout
        )
    if lines := tree.difference(expected, state):
        raise ValueError(
            f"{len(lines)} arrays are not as they should be "
            f"(- missing, + unexpected, ~ of another shape):{names.failures(lines)}"
        )
    return {path: state[path] for path in expected}
