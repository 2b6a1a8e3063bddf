"""Learning from a teacher behind learned augmentation, end to end through the command line."""

import json
import math
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import launch
from mobilevit_jax import checkpoint, tree
from mobilevit_jax.models import zoo
from mobilevit_jax.models.distillation import TEACHER
from mobilevit_jax.models.range_augment import PARAMS
from mobilevit_jax.tools import pretrained
from tests import quick_launch

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "--config=tests/quick.py"
STEPS = 8
TAUGHT = (
    CONFIG,
    "--config.distillation={'name': 'soft', 'label_weight': 0.5}",
    "--config.range_augment.psnr=(40.0, 20.0)",
)


@pytest.fixture(scope="module", autouse=True)
def _from_the_root():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(zoo, "FAMILIES", quick_launch.FAMILIES)
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "teacher"
    assert launch.main(["train", CONFIG, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """A finished run; tests that change it copy it first."""
    workdir = tmp_path_factory.mktemp("runs") / "student"
    argv = ["train", *TAUGHT, f"--config.teacher={teacher}", f"--workdir={workdir}"]
    assert launch.main(argv) == 0
    return workdir


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def last_evaluation(workdir):
    row = [row for row in rows(workdir) if "val/loss" in row][-1]
    return {name: value for name, value in row.items() if name.startswith("val")}


def test_the_checkpoint_holds_the_teacher_as_it_was(teacher, student):
    state = checkpoint.read(student).state
    own = pretrained.read(teacher).pretrained.variables
    jax.tree.map(np.testing.assert_array_equal, state["model_state"][TEACHER]["variables"], own)
    assert state["ema"]["model_state"].keys() == {"batch_stats"}
    assert state["params"][PARAMS].keys() == state["ema"]["params"][PARAMS].keys()
    assert float(state["params"][PARAMS]["brightness_low"]) != 0.5
    config = json.loads((student / "config.json").read_text())
    assert config["teacher_model"]["num_classes"] == 10
    assert config["teacher_input"] == config["input"]
    losses = [row["train/loss"] for row in rows(student) if "train/loss" in row]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))


def test_the_student_is_used_alone(student, tmp_path, capsys):
    assert launch.main(["eval", str(student), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said.pop("step") == STEPS
    assert said == last_evaluation(student)

    image = tmp_path / "one.png"
    Image.fromarray(np.eye(20, dtype=np.uint8) * 255).save(image)
    assert launch.main(["predict", str(student), str(image), "--json", "--top=10"]) == 0
    assert len(json.loads(capsys.readouterr().out)["labels"]) == 10

    exported = tmp_path / "exported"
    assert launch.main(["convert", "--format=native", str(student), str(exported)]) == 0
    state = checkpoint.read(student).state["ema"]
    del state["params"][PARAMS]
    own = tree.flatten({"params": state["params"], **state["model_state"]})
    np.testing.assert_equal(load_file(exported / "model.safetensors"), own)


def test_killed_without_its_teacher_it_ends_the_same(teacher, student, tmp_path):
    workdir, lent = tmp_path / "run", tmp_path / "teacher"
    shutil.copytree(teacher, lent)
    argv = ["train", *TAUGHT, f"--config.teacher={lent}", f"--workdir={workdir}"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "tests/quick_launch.py", *argv], cwd=ROOT, stdout=log, stderr=log
        )
        until = time.monotonic() + 300
        while not checkpoint.complete_steps(workdir / "checkpoints"):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    shutil.rmtree(lent)
    assert launch.main(argv) == 0
    for which in ("newest", "best"):
        ended, expected = checkpoint.read(workdir, which), checkpoint.read(student, which)
        assert ended.step == expected.step
        np.testing.assert_equal(ended.state, expected.state)
    assert last_evaluation(workdir) == last_evaluation(student)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config.teacher=/nowhere",), "there is no file, directory or zoo name '/nowhere'"),
        (
            ("--config.teacher=mobilevitv2_050",),
            "config.teacher: mobilevitv2_050 has 1000 classes, and the images have 10",
        ),
        ((), "config.distillation.name is 'soft', and config.teacher is '': give a teacher"),
    ],
)
def test_bad_teachers(arguments, message, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert launch.main(["train", *TAUGHT, *arguments, f"--workdir={workdir}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"launch.py: {message}")
    assert "Traceback" not in said
    if "nowhere" not in message:  # that one lists all forms of a reference
        assert said.count("\n") == 1
    assert not workdir.exists()
