"""Every verb end to end through the command line, bad input included."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest
from PIL import Image

import launch
from mobilevit_jax import checkpoint, devices, optim, schedule, steps, train

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "--config=tests/small.py"
STEPS = 8


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run; tests that change it copy it first."""
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    os.chdir(ROOT)
    assert launch.main(["train", CONFIG, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def last_evaluation(workdir):
    row = [row for row in rows(workdir) if "val/loss" in row][-1]
    return {name: value for name, value in row.items() if name.startswith("val")}


def fails(capsys, status, *argv):
    """Runs a command that must fail; returns what it said, which must not be a traceback."""
    assert launch.main(list(argv)) == status
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.startswith("launch.py: ") or "\nlaunch.py: " in said
    return said


def test_train_leaves_a_whole_record(trained):
    for name in (
        "config.json",
        "labels.json",
        "starts.jsonl",
        "parameters.txt",
        "metrics.jsonl",
        "samples.png",
        "curves.png",
        "confusion.png",
        "mistakes.png",
        "per_class.csv",
    ):
        assert (trained / name).stat().st_size > 0, name
    assert checkpoint.complete_steps(trained / "checkpoints") == [6, 8]
    assert len(checkpoint.complete_steps(trained / "best")) == 1
    logged = [row["step"] for row in rows(trained) if "train/loss" in row]
    assert logged == [2, 4, 6, 8]
    assert [row["step"] for row in rows(trained) if "val/loss" in row] == [0, 4, 8]
    start = json.loads((trained / "starts.jsonl").read_text())
    assert start["command"] == f"python launch.py train {CONFIG} --workdir={trained}"
    assert start["packages"]["jax"]
    assert json.loads((trained / "labels.json").read_text()) == [str(i) for i in range(10)]


def test_eval_gives_the_last_numbers_of_training(trained, capsys):
    assert launch.main(["eval", str(trained), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said.pop("step") == STEPS
    assert said == last_evaluation(trained)
    assert launch.main(["eval", str(trained), CONFIG]) == 0
    said = capsys.readouterr().out
    assert f"{100 * last_evaluation(trained)['val_ema/top1']:.2f} %" in said


def test_eval_counts_every_image_once_for_any_batch_size(trained, capsys):
    assert launch.main(["eval", str(trained), "--json", "--config.eval.batch_size=52"]) == 0
    said = json.loads(capsys.readouterr().out)
    for name, value in last_evaluation(trained).items():
        assert said[name] == pytest.approx(value, rel=1e-5), name


def test_predict(trained, tmp_path, capsys):
    digit = np.zeros((28, 28), np.uint8)
    digit[4:24, 12:16] = 255
    paths = [str(tmp_path / name) for name in ("one.png", "two.jpg", "three [x].bmp")]
    for path in paths:
        Image.fromarray(digit).resize((40, 30)).save(path)
    assert launch.main(["predict", str(trained), *paths, "--json", "--top=20"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["image"] for each in said] == paths
    for each in said:
        scores = [label["score"] for label in each["labels"]]
        assert sorted(label["label"] for label in each["labels"]) == [str(i) for i in range(10)]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1.0, rel=1e-5)
    assert launch.main(["predict", str(trained), paths[0], "--weights=raw"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{paths[0]}: ")
    assert said.count("%") == 3


def test_a_finished_run_is_not_trained_again(copied, capsys):
    before = checkpoint.read(copied).state
    assert launch.main(["train", CONFIG, f"--workdir={copied}"]) == 0
    after = checkpoint.read(copied).state
    np.testing.assert_equal(before, after)
    assert f"resuming after step {STEPS}" in capsys.readouterr().out
    assert [row["step"] for row in rows(copied) if "val/loss" in row] == [0, 4, 8]


def test_a_best_that_was_evaluated_and_not_saved_is_saved_after_all(copied):
    """As where a run was killed between the two."""
    expected, length = last_evaluation(copied), len(rows(copied))
    shutil.rmtree(copied / "best")
    assert launch.main(["train", CONFIG, f"--workdir={copied}"]) == 0
    best = checkpoint.read(copied, "best")
    assert (best.step, best.meta["metrics"]) == (STEPS, expected)
    np.testing.assert_equal(best.state, checkpoint.read(copied).state)
    assert len(rows(copied)) == length


def test_a_later_step_is_on_disk_only_after_the_best_of_those_before(tmp_path):
    large, small = (
        steps.TrainState(*({"x": np.arange(size, dtype=np.float32)} for _ in range(5)))
        for size in (2**24, 1)
    )
    with checkpoint.Checkpoints(tmp_path, keep=2, note=print) as checkpoints:
        checkpoints.save_best(1, large, {"best": 0.5})
        checkpoints.save(2, small, {})
        assert checkpoint.complete_steps(tmp_path / "best") == [1]


def test_too_little_memory_is_one_line(copied, capsys, monkeypatch):
    shutil.rmtree(copied / "checkpoints" / "8")
    monkeypatch.setattr(devices, "memory_limit", lambda: 2**20)

    def fetch(*arguments, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n")

    monkeypatch.setattr(train, "_fetch", fetch)
    assert launch.main(["train", CONFIG, f"--workdir={copied}"]) == 2
    said = capsys.readouterr()
    assert "warning: a device has only 1 MiB; raise config.accum, lower config.batch" in said.out
    assert said.err.splitlines()[-1] == (
        f"launch.py: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes. {launch.LESS_MEMORY}"
    )


def test_memory_and_mfu_are_logged_where_the_device_is_known(copied, capsys, monkeypatch):
    shutil.rmtree(copied / "checkpoints" / "8")
    monkeypatch.setattr(devices, "memory", lambda: devices.Memory(peak=2**30, limit=2**20))
    monkeypatch.setattr(devices, "peak_flops", lambda kind, dtype: {"float32": 1e12}[dtype])
    assert launch.main(["train", CONFIG, f"--workdir={copied}"]) == 0
    said = capsys.readouterr().out
    flops = float(re.search(r"compiled \d/2: 16 images of 16x16, .* s; ([\d.]+) GFLOP", said)[1])
    before, after = [row for row in rows(copied) if "train/loss" in row][-2:]
    assert not [name for name in before if "mfu" in name or "memory" in name]  # the CPU's own
    assert after["device/memory_gib"] == 1.0
    seconds = 2 * 16 / after["time/img_per_s"]
    assert after["time/mfu"] == pytest.approx(2 * 1e9 * flops / 1e12 / seconds, rel=0.01 / flops)
    (predicted,) = re.findall(r"predicted peak memory (\d+) MiB a device", said)
    assert f"peak memory 1,024 MiB a device (predicted {predicted})" in said
    assert "warning: a device has only 1 MiB; raise config.accum, lower config.batch_size" in said


def test_a_run_begins_with_the_weights_of_another(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert launch.main(["train", CONFIG, f"--workdir={workdir}", f"--config.init={trained}"]) == 0
    first = rows(workdir)[0]
    expected = last_evaluation(trained)
    assert first["step"] == 0
    for name in ("loss", "top1", "top5"):
        assert first[f"val/{name}"] == first[f"val_ema/{name}"] == expected[f"val_ema/{name}"]
    capsys.readouterr()
    argv = ["train", CONFIG, f"--workdir={workdir}", "--config.init=nowhere"]
    assert "no file, directory or zoo name 'nowhere'" in fails(capsys, 2, *argv)


def test_convert_and_use_what_came_out(trained, tmp_path, capsys):
    target = tmp_path / "native"
    argv = ["convert", str(trained), str(target), "--format=native"]
    assert launch.main(argv) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert launch.main(["eval", str(target), CONFIG, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    expected = last_evaluation(trained)
    assert said == {f"val/{name}": expected[f"val_ema/{name}"] for name in ("loss", "top1", "top5")}
    assert str(target) in fails(capsys, 2, *argv)  # never over what is there
    assert "--config=FILE is missing" in fails(capsys, 2, "eval", str(target))


def test_print_config_shows_the_overrides(capsys):
    argv = ["train", "--config.optimizer.lr=0.125", CONFIG, "--print_config"]
    assert launch.main([*argv, "--config.input.size=(24,16)", "--noconfig.optimizer.decay_1d"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["optimizer"]["lr"] == 0.125
    assert said["input"]["size"] == [24, 16]
    assert said["optimizer"]["decay_1d"] is False


def test_dry_run_keeps_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    argv = [CONFIG, "--dry_run", "--config.data={'name': 'pack', 'root': '/nowhere'}"]
    assert launch.main(["train", *argv, "--config.dry_run.classes=10"]) == 0
    said = capfd.readouterr().out
    assert "1,281,167 training and 32 validation images of 10 classes; 2 steps" in said
    assert "step 2/2" in said and "step 2  val loss" in said
    assert said.splitlines()[-1].startswith("dry run: two steps, a save and an evaluation went")
    assert list(tmp_path.iterdir()) == []


def test_doctor(capsys):
    assert launch.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "orbax-checkpoint" in said
    assert "devices" in said


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.optimizr.lr=1", "did you mean optimizer.lr?"),
        ("--config.optimizer.momentum=1", "optimizer has b1, b2, clip_norm"),
        ("--config.stepz=1", "the config has no 'stepz'"),
        ("--config.batch_size=abc", "--config.batch_size=abc"),
        ("--config.batch_size=0.5", "--config.batch_size=0.5"),
        ("--config.batch_size=18", "config.batch_size is 18; it must be a multiple of 4 devices"),
        ("--config.accum=3", "config.accum is 3"),
        ("--config.duration=12", "config.duration: '12' is no duration"),
        ("--config.duration='0 steps'", "config.duration"),
        ("--config.schedule.warmup=9 steps", "config.schedule: a warm-up of 9 steps"),
        ("--config.model.name=resnet", "config.model: model 'resnet' is unknown"),
        ("--config.model.width=-1.0", "config.model: width is -1.0"),
        ("--config.model.strides=(2,2)", "config.model: strides"),
        ("--config.input.size=(2,2)", "config.model: the image is 2x2"),
        ("--config.input.channel_order=gbr", "config.input: "),
        (
            "--config.dtype=float8",
            "config.dtype: unknown name 'float8'; there are auto, bfloat16, float16, float32",
        ),
        ("--config.remat=('layer_1','layer_9')", "config.remat: remat is ('layer_1', 'layer_9')"),
        ("--config.task.label_smoothing=2.0", "config.task: label_smoothing is 2.0"),
        ("--config.data.name=imagenet", "config.data: unknown name 'imagenet'"),
        ("--config.optimizer.name=sgd", "config.optimizer: sgd has no argument 'b1'"),
        ("--config.ema_decay=1.0", "config.ema_decay is 1.0"),
        ("--config.log.writers=('wandbb',)", "config.log.writers: unknown name 'wandbb'"),
        ("--config.checkpoint.keep=0", "config.checkpoint.keep is 0"),
    ],
)
def test_bad_config_values(argument, message, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert message in fails(capsys, 2, "train", CONFIG, f"--workdir={workdir}", argument)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--workdir=x"], "--config=FILE is missing"),
        (["train", CONFIG], "--workdir=DIR is missing"),
        (["train", "--config=nowhere.py", "--workdir=x"], "there is no file nowhere.py"),
        (["train", "--config=README.md", "--workdir=x"], "README.md is no Python file"),
        (["train", "--config=setup.cfg:x", "--workdir=x"], "there is no file setup.cfg"),
        (["train", f"{CONFIG}:x", "--workdir=x"], "tests/small.py:x cannot be loaded"),
        (["train", "--config"], "--config needs a value"),
        (["train", CONFIG, "--workdir=/proc/x"], "--workdir=/proc/x cannot be made"),
        (["eval", "/nowhere"], "there is no file, directory or zoo name '/nowhere'"),
        (["predict", "/nowhere", "x.png"], "/nowhere"),
        (["doctor", "--config.x=1"], "doctor takes no --config.x"),
    ],
)
def test_bad_usage(argv, message, capsys):
    assert message in fails(capsys, 2, *argv)


@pytest.mark.parametrize(
    "argv", [[], ["fly"], ["train", "--confg.x=1"], ["predict", "run", "--top=0", "x"]]
)
def test_argparse_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        launch.main(argv)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def images(root, *classes, each=40):
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(np.full((20, 20), i, np.uint8)).save(root / name / f"{i}.png")


@pytest.mark.filterwarnings("default:broken example")
def test_bad_data(tmp_path, capsys):
    workdir, root = tmp_path / "run", tmp_path / "images"

    def complaint():
        data = f"--config.data={{'name': 'folder', 'root': '{root}', 'val_fraction': 0.5}}"
        return fails(capsys, 3, "train", CONFIG, f"--workdir={workdir}", data)

    assert str(root) in complaint()
    root.mkdir()
    assert "found 0 images" in complaint()
    images(root, "cat", *"012345678")  # ten classes, so that the compiled programs are at hand
    (root / "bird").mkdir()
    assert "bird" in complaint()
    assert not workdir.exists()
    shutil.rmtree(root / "bird")
    for path in root.glob("cat/*.png"):
        path.write_bytes(path.read_bytes()[:45])
    told = complaint()
    assert "warning: broken example 1: cannot decode" in told
    assert "examples are broken, more than config.max_corrupt (1.00%) allows" in told
    assert str(root / "cat") in told
    assert checkpoint.complete_steps(workdir / "checkpoints") == []


@pytest.mark.filterwarnings("default:broken example")
def test_a_broken_image_is_named_and_replaced(tmp_path, capsys):
    workdir, root = tmp_path / "run", tmp_path / "images"
    images(root / "train", *"01234567", each=13)
    images(root / "train", *"89", each=12)  # 128 in all, one epoch: every image comes once
    images(root / "val", *"0123456789", each=2)
    (root / "train" / "3" / "7.png").write_bytes(b"")
    data = f"--config.data={{'name': 'folder', 'root': '{root}'}}"
    assert launch.main(["train", CONFIG, f"--workdir={workdir}", data]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "broken example" in line]
    assert len(told) == 1
    path = root / "train" / "3" / "7.png"
    assert f"warning: broken example 1: cannot decode {path} (the file is" in told[0]
    assert [row["data/broken"] for row in rows(workdir) if "data/broken" in row][-1] == 1


def test_predict_names_what_it_cannot_read(trained, tmp_path, capsys):
    text = tmp_path / "text.png"
    text.write_text("not an image")
    assert f"cannot decode {text}" in fails(capsys, 3, "predict", str(trained), str(text))
    assert "nowhere.png cannot be read" in fails(capsys, 3, "predict", str(trained), "nowhere.png")


def test_another_model_in_the_same_workdir(copied, capsys):
    config = (copied / "config.json").read_text()
    argv = ("train", CONFIG, f"--workdir={copied}", "--config.model.width=0.5")
    said = fails(capsys, 2, *argv)
    assert "another model" in said
    assert "params/head/kernel" in said
    assert checkpoint.complete_steps(copied / "checkpoints") == [6, 8]
    assert (copied / "config.json").read_text() == config
    argv = ("eval", str(copied), CONFIG, "--config.model.width=0.5")
    assert "another model" in fails(capsys, 2, *argv)


def test_other_classes_in_eval(trained, tmp_path, capsys):
    images(tmp_path / "images", "cat", "dog")
    data = f"--config.data={{'name': 'folder', 'root': '{tmp_path / 'images'}'}}"
    said = fails(capsys, 2, "eval", str(trained), data)
    assert "the images have 2 classes (cat, dog" in said


def test_changed_settings_are_told(copied, capsys):
    argv = ["train", CONFIG, f"--workdir={copied}", "--config.log.every=4 steps"]
    assert launch.main(argv) == 0
    assert "log.every 2 steps → 4 steps" in capsys.readouterr().err


# When one read fails, TensorStore's others find their event loop closed; launch.py, as a program,
# drops what Python says of them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_unreadable_newest_checkpoint(copied, capsys):
    whole = checkpoint.read(copied).state
    data = max((copied / "checkpoints" / "8" / "state").rglob("*"), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    (copied / "checkpoints" / "99").mkdir()  # a stray directory looks like the newest step
    assert launch.main(["train", CONFIG, f"--workdir={copied}"]) == 0
    said = capsys.readouterr()
    assert f"checkpoint {copied / 'checkpoints' / '99'} cannot be read" in said.err
    assert f"checkpoint {copied / 'checkpoints' / '8'} cannot be read" in said.err
    assert "resuming after step 6" in said.out
    assert len(list((copied / "unreadable").iterdir())) == 2
    np.testing.assert_equal(checkpoint.read(copied).state, whole)
    assert [row["step"] for row in rows(copied) if "train/loss" in row] == [2, 4, 6, 8]


def test_no_readable_checkpoint_at_all(copied, capsys):
    for step in (6, 8):
        shutil.rmtree(copied / "checkpoints" / str(step) / "state")
    said = fails(capsys, 3, "train", CONFIG, f"--workdir={copied}")
    assert "none of the checkpoints can be read" in said
    assert checkpoint.complete_steps(copied / "checkpoints") == [6, 8]


def test_non_finite_loss_stops_and_keeps_the_last_good_step(copied, capsys):
    # Weights that are finite and give no finite loss, saved as step 6.
    for step in (6, 8):
        shutil.rmtree(copied / "checkpoints" / str(step))
    whole = checkpoint.read(copied, "best")
    params = jax.tree.map(lambda leaf: np.full_like(leaf, 1e30), whole.state["params"])
    curve = schedule.constant(peak=1.0, total=8, warmup=0, init=0.0)
    tx = optim.adamw(
        curve, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, decay_1d=False, clip_norm=10.0
    )
    state = steps.TrainState(**whole.state | {"params": params, "opt_state": tx.init(params)})
    state = state.replace(step=np.asarray(6, np.int32))
    with checkpoint.Checkpoints(copied, keep=2, note=print) as checkpoints:
        checkpoints.save(6, state, {"elapsed": 1.0})
    said = fails(capsys, 4, "train", CONFIG, f"--workdir={copied}")
    assert "is nan at step 7" in said  # the loss or its gradient, whichever overflows first
    assert checkpoint.complete_steps(copied / "checkpoints") == [6]


def test_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root on Linux")
    try:
        argv = [sys.executable, "launch.py", "train", CONFIG, f"--workdir={disk / 'run'}"]
        ended = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert ended.returncode == 3, ended.stderr
        assert "No space left on device" in ended.stderr
        assert "run the same command again" in ended.stderr
        assert "Traceback" not in ended.stderr
        for step in checkpoint.complete_steps(disk / "run" / "checkpoints"):
            checkpoint.read(disk / "run", str(step))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
