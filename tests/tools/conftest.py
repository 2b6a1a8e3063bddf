"""Models of width 0.5 with random weights in every format, made once."""

import functools
import importlib.util
import json
import pathlib
import shutil

import numpy as np
import pytest

from configs import base
from mobilevit_jax import build, checkpoint, steps
from mobilevit_jax.models import zoo
from mobilevit_jax.tools import convert
from tests import originals
from tests.weights import LABELS, random_variables

STEP = 7


@pytest.fixture(scope="session", autouse=True)
def _traced_once():
    """The same few networks would be traced for their shapes again and again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "abstract_variables", functools.cache(steps.abstract_variables))
        yield


@pytest.fixture(scope="session")
def photographs():
    """Files of 20 photographs of ImageNet, in the package foolbox; the tests skip without it."""
    found = importlib.util.find_spec("foolbox")
    if found is None:
        pytest.skip("foolbox is not installed, which has the photographs")
    (place,) = found.submodule_search_locations
    return sorted((pathlib.Path(place) / "data").glob("imagenet_*.jpg"))


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """What a training run leaves, as far as tools read it."""
    workdir = tmp_path_factory.mktemp("runs") / "flowers"
    workdir.mkdir()
    config = base.get_config()
    config.model.width = 0.5
    config.input.size = (64, 64)
    config.input.resize = 72
    (workdir / "config.json").write_text(build.to_json(config))
    (workdir / "labels.json").write_text(json.dumps(LABELS))
    rows = [
        {"step": 3, "val/top1": 0.1, "val_ema/top1": 0.2},
        {"step": STEP, "train/loss": 1.0},
        {"step": STEP, "val/top1": 0.625, "val/loss": 1.5, "val_ema/top1": 0.75, "val_ema/loss": 1},
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = zoo.create("mobilevit_v2", num_classes=len(LABELS), width=0.5)
    raw, ema = (random_variables(model, seed=seed) for seed in (0, 1))
    state = steps.TrainState(
        step=np.int32(STEP),
        params=raw["params"],
        model_state={"batch_stats": raw["batch_stats"]},
        opt_state={},
        ema={"params": ema["params"], "model_state": {"batch_stats": ema["batch_stats"]}},
    )
    with checkpoint.Checkpoints(workdir, keep=1, note=print) as checkpoints:
        checkpoints.save(STEP, state, {"elapsed": 1.0})
    return workdir


def _converted(format):
    @pytest.fixture(scope="session", name=format)
    def directory(workdir, tmp_path_factory):
        if format == "cvnets":
            originals.import_torch()
        target = tmp_path_factory.mktemp("converted") / f"flowers-{format}"
        convert.convert(workdir, target, format=format)
        return target

    return directory


native, hf, timm, cvnets = map(_converted, ("native", "hf", "timm", "cvnets"))


@pytest.fixture
def untrained(native, tmp_path):
    """As `convert` writes a name of the zoo."""
    directory = shutil.copytree(native, tmp_path / "untrained")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["source"] = {"reference": "mobilevitv2_050", "weights": "random"}
    path.write_text(json.dumps(config))
    return directory
