"""`eval` of several models on several sets, and `convert --average`, through the command line."""

import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

import launch
from mobilevit_jax import build, checkpoint, steps, tree
from mobilevit_jax.models import zoo
from tests import tiny
from tests.data.sets import IDS, write
from tests.weights import random_variables

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "--config=tests/tiny.py"
STEPS = (2, 4, 6)
NAMES = {"loss", "top1", "top5", "ece"}


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def variables(step, which):
    """The weights that the run had after a step."""
    model = zoo.create(num_classes=10, **build.plain(tiny.get_config().model))
    return random_variables(model, seed=10 * step + (which == "ema"), size=(16, 16))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run on digits leaves, as far as eval and convert read it."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    workdir.mkdir()
    (workdir / "config.json").write_text(build.to_json(tiny.get_config()))
    (workdir / "labels.json").write_text(json.dumps([str(k) for k in range(10)]))
    (workdir / "metrics.jsonl").write_text(json.dumps({"step": 6, "val_ema/top1": 0.5}) + "\n")
    with checkpoint.Checkpoints(workdir, keep=len(STEPS), note=print) as checkpoints:
        for step in STEPS:
            raw, ema = variables(step, "raw"), variables(step, "ema")
            state = steps.TrainState(
                step=np.int32(step),
                params=raw["params"],
                model_state={"batch_stats": raw["batch_stats"]},
                opt_state={"count": np.int32(step)},
                ema={"params": ema["params"], "model_state": {"batch_stats": ema["batch_stats"]}},
            )
            checkpoints.save(step, state, {"elapsed": float(step)})
    return workdir


@pytest.fixture(scope="module")
def native(run, tmp_path_factory):
    target = tmp_path_factory.mktemp("native") / "digits"
    assert launch.main(["convert", str(run), str(target), "--format=native"]) == 0
    return target


def says(capsys, *argv):
    assert launch.main(list(argv)) == 0
    return capsys.readouterr().out


def fails(capsys, status, *argv):
    assert launch.main(list(argv)) == status
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said


# --- eval -----------------------------------------------------------------------------------------


def test_several_models_and_sets_as_json(run, native, capsys):
    argv = ["eval", str(run), str(native), "--data=digits", "--json", "--config.eval.batch_size=32"]
    first, second = map(json.loads, says(capsys, *argv).splitlines())
    assert first.pop("reference") == str(run)
    assert first.pop("step") == 6
    assert second.pop("reference") == str(native)
    assert set(first) == {f"{scope}/{name}" for scope in ("digits", "digits_ema") for name in NAMES}
    assert set(second) == {f"digits/{name}" for name in NAMES}
    # The run's digits are those of its config; the other model has base.py's, another division.
    config = says(capsys, "eval", str(native), CONFIG, "--data=digits", "--json")
    for name, value in json.loads(config).items():
        if name != "reference":
            assert value == first[name.replace("digits", "digits_ema")]
    assert second["digits/loss"] != first["digits_ema/loss"]


def test_several_models_without_data(run, native, capsys):
    first, second = map(
        json.loads, says(capsys, "eval", str(run), str(native), CONFIG, "--json").splitlines()
    )
    assert {key for key in first if "/" in key} == {
        f"{scope}/{name}" for scope in ("val", "val_ema") for name in ("loss", "top1", "top5")
    }
    for name in ("loss", "top1", "top5"):
        assert second[f"val/{name}"] == first[f"val_ema/{name}"]
    alone = json.loads(says(capsys, "eval", str(run), CONFIG, "--json"))
    assert {"reference": str(run), **alone} == first


def test_several_checkpoints_of_a_run(run, capsys):
    paths = sorted(map(str, (run / "checkpoints").iterdir()))
    said = map(json.loads, says(capsys, "eval", *paths, CONFIG, "--json").splitlines())
    rows = {row.pop("reference"): row for row in said}
    assert list(rows) == paths
    for path in paths:
        step = path.rpartition("/")[2]
        alone = says(capsys, "eval", str(run), f"--checkpoint={step}", CONFIG, "--json")
        assert rows[path] == json.loads(alone) and rows[path]["step"] == int(step)
    said = fails(capsys, 2, "eval", paths[0], "--checkpoint=6", CONFIG).err
    assert f"{paths[0]} is one checkpoint; checkpoint=6 names another" in said


def test_the_table(run, native, capsys):
    said = says(capsys, "eval", str(run), str(native), CONFIG, "--data=digits")
    numbers = json.loads(says(capsys, "eval", str(run), CONFIG, "--data=digits", "--json"))
    lines = {line.split("│")[1].strip(): line for line in said.splitlines() if "│" in line}
    assert str(run) in said and str(native) in said
    assert lines["step"].split("│")[2].strip() == "6"
    assert f"{100 * numbers['digits/top1']:.2f} %" in lines["digits/top1"]
    assert f"{100 * numbers['digits_ema/ece']:.2f} %" in lines["digits_ema/ece"]
    assert f"{numbers['digits/loss']:.4f}" in lines["digits/loss"]


def test_what_is_done_is_printed_when_a_model_is_broken(run, capsys):
    said = fails(capsys, 2, "eval", str(run), "/nowhere", CONFIG, "--data=digits")
    assert "there is no file, directory or zoo name '/nowhere'" in said.err
    assert "digits_ema/top1" in said.out


@pytest.mark.filterwarnings("always:.* is not the whole:UserWarning")
def test_images_that_cannot_be(run, tmp_path, capsys):
    def complaint(status, *data):
        return fails(capsys, status, "eval", str(run), *data).err

    assert "the same images are given twice" in complaint(2, "--data=digits", "--data=digits")
    assert "unknown name 'imagenet_x'; there are digits," in complaint(2, "--data=imagenet_x=/x")
    assert "Give --data=imagenet_a=DIRECTORY" in complaint(2, "--data=imagenet_a")
    said = complaint(3, f"--data=imagenet_a={tmp_path}")
    assert f"no class folders in {tmp_path}; expected ImageNet-A as" in said
    assert len(said.splitlines()) == 1
    write(tmp_path, {f"{IDS[3]}/a.jpg": 3})
    said = complaint(2, f"--data=imagenet_a={tmp_path}")
    assert "is not the whole ImageNet-A: 1 of 7,500 images, 1 of 200 classes" in said
    assert "of the 1,000 classes of ImageNet, and the network has 10 (0, 1, 2, …)" in said


# --- averaging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["ema", "raw"])
def test_average_by_hand(which, run, tmp_path, capsys):
    target = tmp_path / "mean"
    argv = ["convert", str(run), str(target), "--format=native", "--average=2"]
    says(capsys, *argv, f"--weights={which}")
    got = safetensors.numpy.load_file(target / "model.safetensors")
    parts = [tree.flatten(variables(step, which)) for step in (4, 6)]
    assert set(got) == set(parts[0])
    assert any(path.startswith("batch_stats/") for path in got)
    for path, array in got.items():
        want = (parts[0][path].astype(np.float64) + parts[1][path]) / 2
        np.testing.assert_array_equal(array, want.astype(np.float32), err_msg=path)
    source = json.loads((target / "config.json").read_text())["source"]
    assert source["mean_of"] == [4, 6]
    assert source["metrics"] == {}
    card = (target / "README.md").read_text()
    assert f"the mean of the {which} weights after 4, 6 steps" in card
    assert "top1" not in card


def test_the_mean_of_one_is_itself(run):
    one, newest = checkpoint.read_mean(run, 1), checkpoint.read(run)
    jax.tree.map(np.testing.assert_array_equal, one.state, newest.state)
    assert one.step == 6
    three = checkpoint.read_mean(run, 3)
    assert three.meta["mean_of"] == [2, 4, 6]
    assert three.state["opt_state"]["count"] == three.state["step"] == 6
    head = [variables(step, "raw")["params"]["head"]["bias"] for step in STEPS]
    np.testing.assert_allclose(
        three.state["params"]["head"]["bias"], np.mean(head, axis=0), rtol=1e-6
    )


def test_averages_that_cannot_be(run, native, tmp_path, capsys):
    def complaint(status, source, *more):
        argv = ["convert", str(source), str(tmp_path / "x"), "--format=native", *more]
        said = fails(capsys, status, *argv).err
        assert not (tmp_path / "x").exists()
        return said

    said = complaint(3, run, "--average=4")
    assert "has 3 (2, 4, 6); train with --config.checkpoint.keep=4" in said
    assert "checkpoint=best does not go with it" in complaint(
        2, run, "--average=2", "--checkpoint=best"
    )
    assert "average=2 choose among what a run keeps" in complaint(2, native, "--average=2")
