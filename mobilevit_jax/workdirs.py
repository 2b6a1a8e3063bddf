"""What a run's directory holds besides checkpoints and metrics: the record of it, and pictures.

Called by the lead of a run's processes alone, but for nothing else depends on them.
"""

import datetime
import importlib.metadata
import json
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

from mobilevit_jax import build, evaluate, processes, report, steps, tree
from mobilevit_jax.data import transforms
from mobilevit_jax.models import zoo

# What the numbers of a run may depend on.
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "pillow",
    "simplejpeg",
    "opencv-python-headless",
)
SHEET = 32  # images on a sample sheet


def make(workdir: pathlib.Path) -> None:
    """Makes the directory where it is missing.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise build.ConfigError(f"--workdir={workdir} cannot be made: {error.strerror}") from error


def evaluation(workdir: pathlib.Path, step: int | None = None) -> dict[str, float] | None:
    """Metrics on record of the evaluation after `step` steps, such as {"val_ema/top1": 0.78}.

    Those of the newest one for no step, and None where there is none.
    """
    for row in reversed(report.read_metrics(workdir / "metrics.jsonl")):
        if "val/loss" in row and step in (None, row["step"]):
            return {name: value for name, value in row.items() if name.startswith("val")}
    return None


def _write(path: pathlib.Path, text: str) -> None:
    """Writes a whole file or nothing."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    beside.replace(path)


def record(
    workdir: pathlib.Path, config: build.Config, class_names: tuple[str, ...], command: str
) -> None:
    """Writes down what is run: config.json, labels.json and a line in starts.jsonl."""
    config_path = workdir / build.CONFIG
    text = build.to_json(config)
    if config_path.exists() and config_path.read_text() != text:
        _tell_changes(json.loads(config_path.read_text()), json.loads(text))
    _write(config_path, text)
    _write(workdir / "labels.json", json.dumps(class_names, ensure_ascii=False, indent=0))
    start = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "devices": [str(device) for device in jax.devices()],
        "processes": jax.process_count(),
        "host": platform.node(),
    }
    with (workdir / "starts.jsonl").open("a") as file:
        file.write(json.dumps(start) + "\n")


def _tell_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    before, after = tree.flatten_mapping(old), tree.flatten_mapping(new)
    changes = [
        f"{key} {before.get(key, 'unset')} → {after.get(key, 'unset')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    processes.tell(f"the config differs from the one this run began with: {'; '.join(changes)}")


def _commit() -> str:
    """The commit of the code that runs, with a + where files differ from it; "" outside git."""
    root = pathlib.Path(__file__).parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def describe(
    reporter: report.Report,
    run: build.Experiment,
    workdir: pathlib.Path,
    state: steps.TrainState,
    start: int,
) -> None:
    """Says what is about to be trained, on what, from where."""
    network = run.network
    overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    _write(workdir / "parameters.txt", overview)
    reporter.table(zoo.summary(network.model, size=network.input_spec.size))
    reporter.note(
        f"{len(run.train_source):,} training and {len(run.val_source):,} validation images of "
        f"{len(network.class_names)} classes; {run.total_steps:,} steps, "
        f"{run.shapes.position(run.total_steps):,} images, in {network.model.dtype.__name__} on "
        f"{_devices()}; workdir {workdir}"
    )
    if start:
        reporter.note(f"resuming after step {start:,} of {run.total_steps:,}")


def _devices() -> str:
    """Such as "16 NVIDIA H100 of 2 processes"."""
    text = f"{jax.device_count()} {jax.devices()[0].device_kind}"
    return f"{text} of {jax.process_count()} processes" if jax.process_count() > 1 else text


def sample_sheet(
    workdir: pathlib.Path, batch: Mapping[str, np.ndarray], class_names: tuple[str, ...]
) -> None:
    """Draws the first images of a training batch."""
    captions = [class_names[label] for label in batch["label"][:SHEET]]
    report.sample_sheet(
        workdir / "samples.png",
        batch["image"][:SHEET],
        captions,
        title="first training batch, augmented",
    )


def draw(workdir: pathlib.Path, run: build.Experiment, predictions: evaluate.Predictions) -> None:
    """Pictures and tables of a finished run."""
    names = run.network.class_names
    report.learning_curves(workdir / "curves.png", report.read_metrics(workdir / "metrics.jsonl"))
    report.confusion_matrix(
        workdir / "confusion.png", predictions.label, predictions.predicted, names
    )
    report.per_class_csv(workdir / "per_class.csv", predictions.label, predictions.predicted, names)
    wrong = np.flatnonzero(predictions.label != predictions.predicted)
    worst = wrong[np.argsort(predictions.label_probability[wrong], kind="stable")][:SHEET]
    if len(worst):
        spec = run.network.input_spec
        view = transforms.evaluation(spec)
        images = np.empty((len(worst), *spec.size, 3), np.uint8)
        for image, i in zip(images, worst, strict=True):
            view(run.val_source[int(predictions.index[i])], image)
        report.sample_sheet(
            workdir / "mistakes.png",
            images,
            [
                f"{names[predictions.label[i]]} → {names[predictions.predicted[i]]}\n"
                f"{100 * predictions.confidence[i]:.0f} %"
                for i in worst
            ],
            title="worst mistakes: label → prediction, confidence",
        )
