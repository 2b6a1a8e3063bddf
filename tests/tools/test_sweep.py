"""Sweeps through the command line: whole, interrupted, killed, mistaken."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from optuna.trial import TrialState

import launch
from mobilevit_jax.models import zoo
from mobilevit_jax.tools import studies, worker
from tests import quick_launch

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "--config=tests/tiny_sweep.py"


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(zoo, "FAMILIES", quick_launch.FAMILIES)
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)


def started(*argv, log, launcher="tests/quick_launch.py", **environment):
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, launcher, "sweep", *map(str, argv)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )


def swept(*argv, log, status=0, **more):
    process = started(*argv, log=log, **more)
    assert process.wait(timeout=300) == status, log.read_text()
    said = log.read_text()
    assert "Traceback" not in said
    return said


def table(workdir):
    with (workdir / "study.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_whole_sweep(tmp_path, capsys):
    workdir, log = tmp_path / "sweep", tmp_path / "log.txt"
    argv = [CONFIG, f"--workdir={workdir}", "--workers=2", "--sampler=random", "--pruner=none"]
    said = swept(*argv, "--trials=3", log=log, JAX_DEBUG_LOG_MODULES="jax._src.compiler")
    assert "3 of 3 done" in said
    assert "best trial " in said

    rows = table(workdir)
    assert [row["trial"] for row in rows] == ["0", "1", "2"]
    assert {row["state"] for row in rows} == {"complete"}
    assert len({row["lr"] for row in rows}) == 3
    best = max(float(row["val_ema/top1"]) for row in rows)
    (chosen,) = [row for row in rows if row["best"] == "1"]
    assert float(chosen["val_ema/top1"]) == best
    for i, row in enumerate(rows):
        run = workdir / f"trial_{i:04d}"
        assert row["directory"] == str(run)
        assert json.loads((run / "config.json").read_text())["optimizer"]["lr"] == float(row["lr"])
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert logged[-1]["val_ema/top1"] == float(row["val_ema/top1"])
        assert (run / "checkpoints" / "4").is_dir()
    for name in ("history.png", "evaluations.png", "slices.png"):
        assert (workdir / name).stat().st_size > 1000
    # Learning rate, augmentation: the same programs, so a later trial compiles nothing.
    later = (workdir / "trial_0002" / "output.txt").read_text()
    assert "compilation cache hit for 'jit_step'" in later
    assert "CACHE MISS" not in later

    assert launch.main(["train", f"--config={workdir / 'best.py'}", "--print_config"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert config["optimizer"]["lr"] == float(chosen["lr"])
    assert config["augment"]["padding"] == int(chosen["padding"])

    # Again: there is nothing left to do. With another space: it is another sweep.
    before = (workdir / "study.journal").read_bytes()
    assert launch.main(["sweep", *argv, "--trials=3"]) == 0
    assert launch.main(["sweep", *argv, "--trials=3", "--space.seed=int:0:9"]) == 2
    assert "was made for another sweep" in capsys.readouterr().err
    assert (workdir / "study.journal").read_bytes() == before


def wait_for_evaluations(study, process, log, count):
    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        if any(len(trial.intermediate_values) >= count for trial in study.trials()):
            return
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="trials outlive a killed worker elsewhere")
@pytest.mark.long
def test_interrupted_and_killed(tmp_path):
    workdir, log = tmp_path / "sweep", tmp_path / "log.txt"
    argv = [CONFIG, f"--workdir={workdir}", "--trials=1", "--config.duration=60 steps"]
    process = started(*argv, log=log)
    while not (workdir / "trial_0000").exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    study = studies.join(studies.journal_url(workdir), "sweep")
    wait_for_evaluations(study, process, log, 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 143, log.read_text()
    assert "run the same command again to go on" in log.read_text()
    (trial,) = study.trials()
    assert trial.state is TrialState.WAITING
    output = workdir / "trial_0000" / "output.txt"
    assert "SIGTERM: saved step" in output.read_text()
    reached = len(trial.intermediate_values)

    process = started(*argv, log=log)
    wait_for_evaluations(study, process, log, reached + 2)
    process.kill()
    process.wait()

    said = swept(*argv, log=log)
    assert output.read_text().count("resuming after step") == 2
    first, again = study.trials()
    assert first.state is TrialState.FAIL
    assert first.user_attrs["end"] == "died: its worker gave no sign of life"
    assert again.state is TrialState.COMPLETE
    assert again.params == first.params
    assert studies.retried(again) == [0]
    assert len(again.intermediate_values) == 60
    logged = (workdir / "trial_0000" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in logged]
    assert [row["step"] for row in rows if "val/loss" in row] == list(range(61))
    assert sorted(path.name for path in workdir.glob("trial_*")) == ["trial_0000"]
    assert "best trial 1" in said


def test_a_pruned_trial_saves_and_keeps_its_checkpoints(tmp_path):
    workdir, log = tmp_path / "sweep", tmp_path / "log.txt"
    argv = ["--sampler=grid", "--space.optimizer.lr=choice:1e-3,10.0", "--objective=-val/loss"]
    argv += ["--config.duration=60 steps", "--config.checkpoint.every=60 steps"]
    swept(CONFIG, f"--workdir={workdir}", *argv, log=log)
    good, bad = table(workdir)
    assert good["state"] == "complete"
    assert good["evaluations"] == "60"
    assert bad["state"] == "pruned"
    assert bad["end"] == ""
    assert 1 < int(bad["evaluations"]) < 60
    assert float(bad["val/loss"]) > float(good["val/loss"])
    assert "SIGTERM: saved step" in (workdir / "trial_0001" / "output.txt").read_text()
    assert any((workdir / "trial_0001" / "checkpoints").iterdir())
    assert (workdir / "trial_0001" / "best").is_dir()


@pytest.mark.long
def test_accuracy_against_costs(tmp_path):
    workdir, log = tmp_path / "sweep", tmp_path / "log.txt"
    swept(
        *(CONFIG, f"--workdir={workdir}", "--space.model.width=choice:0.5,1.0", "--sampler=grid"),
        "--objective=val_ema/top1,-params,-macs,-latency",
        log=log,
    )
    small, large = table(workdir)
    for cost in ("params", "macs"):
        assert 0 < float(small[cost]) < float(large[cost])
    for row in (small, large):
        profile = json.loads((pathlib.Path(row["directory"]) / "profile.json").read_text())
        assert float(row["latency"]) == profile["total"]["seconds"] > 0
        assert float(row["params"]) == profile["total"]["params"]
        assert float(row["macs"]) == profile["total"]["macs"]
    assert small["best"] == "1"
    assert (workdir / "pareto.png").stat().st_size > 1000


def test_no_trial_comes_to_its_end(tmp_path):
    workdir, log = tmp_path / "sweep", tmp_path / "log.txt"
    argv = [f"--workdir={workdir}", "--trials=1", "--space.optimizer.lr=choice:1e30"]
    said = swept("--config=tests/small.py", *argv, log=log, launcher="launch.py", status=2)
    assert "none of the 1 trials came to its end: trial 0: diverged: " in said
    assert [row["state"] for row in table(workdir)] == ["pruned"]
    assert not (workdir / "best.py").exists()
    assert not (workdir / "history.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--space.optimizr.lr=log:1e-4:1e-2"], "did you mean optimizer.lr?"),
        (["--space.optimizer.momentum=log:1e-4:1e-2"], "optimizer has b1, b2, clip_norm"),
        (["--space.batch_size=uniform:8:16"], "--config.batch_size=8.0"),
        (["--space.optimizer.lr=choice:1e-3,fast"], "--config.optimizer.lr=fast"),
        (["--space.optimizer.lr=1e-3"], "--space.optimizer.lr=1e-3: '1e-3' is unknown; write "),
        (
            ["--config=tests/small.py", "--space.model.width=choice:0.25,-1.0"],
            "with --config.model.width=-1.0: config.model: width is -1.0",
        ),
        (["--config=tests/tiny.py"], "the space is empty: tests/tiny.py has no sweep(trial)"),
        (["--objective=val_ema/top2"], "no evaluation logs 'val_ema/top2'; there are val/loss, "),
        (["--objective=val_ema/loss"], "write --objective=-val_ema/loss"),
        (["--objective=val/top1,params"], "write --objective=-params"),
        (["--objective=params", "--objective=val/top1"], "write --objective=-params"),
        (["--objective=val/top1,-params", "--pruner=median"], "there is only --pruner=none"),
        (["--sampler=bayes"], "--sampler=bayes is unknown; there are tpe, random, grid"),
        (["--pruner=hard"], "--pruner=hard is unknown; there are asha, hyperband, median, none"),
        (["--sampler=grid"], "--sampler=grid has no grid of lr"),
        (
            ["--sampler=grid", "--space.augment.padding=int:0:2", "--trials=4"],
            "--trials=4: the grid has 3 points",
        ),
        (["--storage=sqlite:///x.db"], "SQLite breaks when several processes write"),
        (["--storage=postgresql://u:s3cret@127.0.0.1:1/d"], "postgresql://u:***@127.0.0.1:1/d: "),
        (["--worker"], "a worker needs --storage=URL"),
        (["--executor=ray"], "--executor=ray needs Ray: pip install 'mobilevit_jax[ray]'"),
        (["--config.data.val_fraction=2.0"], "config.data: "),
    ],
)
def test_bad_input(arguments, message, tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "sweep"
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    assert launch.main(["sweep", CONFIG, f"--workdir={workdir}", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("launch.py: ")
    assert said.count("\n") == 1
    assert message in said
    assert "s3cret" not in said
    assert not workdir.exists()


def test_bad_usage(tmp_path, capsys):
    assert launch.main(["sweep", CONFIG]) == 2
    assert launch.main(["sweep", f"--workdir={tmp_path / 'x'}"]) == 2
    assert launch.main(["train", CONFIG, "--space.optimizer.lr=log:1e-4:1e-2"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "--workdir=DIR is missing" in said[0]
    assert "--config=FILE is missing" in said[1]
    assert "train takes no --space.optimizer.lr" in said[2]
    url = f"--storage=journal://{tmp_path}/study.journal"
    assert launch.main(["sweep", "--worker", url, "--study=x"]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_slots(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(worker.shutil, "which", lambda _: None)
    (alone,) = worker.slots(None, {"A": "b"})
    assert alone == ({"A": "b"}, (0, 1, 2, 3, 4, 5))
    assert [slot.cores for slot in worker.slots(3, {})] == [(0, 1), (2, 3), (4, 5)]
    assert [slot.cores for slot in worker.slots(4, {})] == [(0,), (1, 2), (3,), (4, 5)]
    assert [slot.cores for slot in worker.slots(8, {})][:3] == [(0,), (0,), (1,)]
    two = worker.slots(None, {"CUDA_VISIBLE_DEVICES": "4,GPU-x"})
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in two] == ["4", "GPU-x"]
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in two[0].environment
    packed = worker.slots(4, {"CUDA_VISIBLE_DEVICES": "4,5"})
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in packed] == ["4", "5"] * 2
    assert packed[0].environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.450"
    (cluster,) = worker.slots(None, {"SLURM_STEP_NODELIST": "a[0-7]", "SLURM_NTASKS": "8"})
    assert cluster.environment == {
        "SLURM_NTASKS": "8"
    }  # a trial is alone, though its worker is not
    (cpu,) = worker.slots(None, {"CUDA_VISIBLE_DEVICES": "4,5", "JAX_PLATFORMS": "cpu"})
    assert cpu.environment["CUDA_VISIBLE_DEVICES"] == "4,5"
