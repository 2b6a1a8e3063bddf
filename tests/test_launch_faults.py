"""What befalls a run on its way: a loss that is not finite, a signal in an evaluation, a trace."""

import errno
import functools
import gzip
import json
import os
import pathlib
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import launch
from mobilevit_jax import build, checkpoint, evaluate, report, steps
from mobilevit_jax.models import zoo
from mobilevit_jax.tasks import classification
from tests import quick_launch

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 8


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(zoo, "FAMILIES", quick_launch.FAMILIES)


def train(workdir, *more):
    return launch.main(["train", "--config=tests/quick.py", f"--workdir={workdir}", *more])


def evaluated(workdir):
    rows = report.read_metrics(workdir / "metrics.jsonl")
    return [row["step"] for row in rows if "val/loss" in row]


@pytest.mark.parametrize(("max_skipped", "status"), [(2, 0), (1, 4)])
def test_batches_without_a_finite_loss(tmp_path, capsys, monkeypatch, max_skipped, status):
    """Two in a row, of steps 4 and 5: skipped where so many are allowed, else the run ends."""

    @functools.wraps(classification.classification)
    def poisoned(**options):
        sound = classification.classification(**options)
        bad = jnp.asarray([3, 4])  # of the steps that are done before
        return sound._replace(
            loss=lambda outputs, batch: (
                sound.loss(outputs, batch)
                + jnp.where(jnp.isin(batch["step"][0], bad), jnp.nan, 0.0)
            )
        )

    monkeypatch.setitem(build.TASKS, "classification", poisoned)
    workdir = tmp_path / "run"
    assert train(workdir, f"--config.max_skipped={max_skipped}") == status
    said = capsys.readouterr()
    if status:
        assert "not finite" in said.err or "nan" in said.err
    ended = checkpoint.read(workdir)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ended.state))
    if status:
        assert ended.step == 4  # without an update, and whole
        return
    assert ended.step == STEPS
    adam, rate = ended.state["opt_state"][1], ended.state["opt_state"][3]
    assert (int(adam["count"]), int(rate["count"])) == (STEPS - 2, STEPS)


def test_a_signal_in_an_evaluation_is_not_left_waiting(tmp_path, capsys, monkeypatch):
    """The rest of it is given up, and done by who goes on; its step was due for no save."""
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    every = "--config.checkpoint.every=8 steps"
    assert train(whole, every) == 0

    metrics, calls = evaluate.metrics, []

    def signalled(*args, halted, **options):
        calls.append(1)
        if len(calls) == 3:  # the first of step 4, after both of step 0
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics(*args, halted=halted, **options)

    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "metrics", signalled)
        assert train(workdir, every) == 143
    assert len(calls) == 3
    assert "SIGTERM: saved step 4 of 8" in capsys.readouterr().err
    assert evaluated(workdir) == [0]
    assert train(workdir, every) == 0
    assert evaluated(workdir) == evaluated(whole) == [0, 4, 8]
    for which in ("newest", "best"):
        ended, expected = checkpoint.read(workdir, which), checkpoint.read(whole, which)
        assert ended.step == expected.step
        np.testing.assert_equal(ended.state, expected.state)


def test_a_broken_best_is_set_aside(tmp_path, capsys):
    workdir = tmp_path / "run"
    assert train(workdir) == 0
    step = checkpoint.read(workdir, "best").step
    data = workdir / "best" / str(step) / "state"
    for path in data.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(checkpoint.CheckpointError, match="cannot read the checkpoint in"):
        checkpoint.read(workdir, "best")
    assert train(workdir) == 0
    assert f"{workdir / 'best' / str(step)} cannot be read" in capsys.readouterr().err
    assert checkpoint.read(workdir, "best").step == STEPS  # the last evaluation was on record


def test_a_damaged_newest_checkpoint_is_told_by_who_reads_the_one_before(tmp_path, capsys):
    workdir = tmp_path / "run"
    assert train(workdir) == 0
    before, newest = checkpoint.complete_steps(workdir / "checkpoints")[-2:]
    shutil.rmtree(workdir / "checkpoints" / str(newest) / "state")
    assert checkpoint.read(workdir).step == before
    said = capsys.readouterr().err
    assert f"cannot read {newest} (" in said and f"; read {before}" in said


def test_a_save_that_fails_takes_no_other_errors_place(tmp_path, monkeypatch):
    """Orbax tells it once, to who waits; after a true one its threads would wait five minutes."""
    state = steps.TrainState(*({"x": np.zeros(1, np.float32)} for _ in range(5)))
    troubles, told = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))], []

    def full(manager):
        if troubles:
            raise troubles.pop()

    def fail_to_save():
        with checkpoint.Checkpoints(tmp_path / "run", keep=1, note=told.append) as checkpoints:
            checkpoints.save(1, state, {})
            checkpoints.wait()
            monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", full)
            raise KeyError("the cause")

    with pytest.raises(KeyError, match="the cause"):
        fail_to_save()
    assert len(told) == 1 and "could not save a checkpoint" in told[0]
    assert os.strerror(errno.ENOSPC) in told[0] and "Steps still there and intact: 1" in told[0]


def test_a_trace_of_some_steps(tmp_path, capsys):
    workdir = tmp_path / "run"
    assert train(workdir, "--profile=3:4") == 0
    assert f"trace of steps 3 to 4 in {workdir / 'trace'}" in capsys.readouterr().out
    (trace,) = (workdir / "trace").rglob("perfetto_trace.json.gz")
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert train(workdir, "--profile=3:4") == 0
    assert "no trace: this start takes steps 9 to 8" in capsys.readouterr().out


@pytest.mark.parametrize("best", ["val/top2", "val/loss"])
def test_a_best_that_is_no_metric_to_raise(tmp_path, capsys, best):
    assert train(tmp_path / "run", f"--config.checkpoint.best={best}") == 2
    said = capsys.readouterr().err
    assert f"config.checkpoint.best is '{best}'; the highest is the best, of one of val/" in said
    assert not (tmp_path / "run").exists()


def test_where_the_time_went_is_in_the_metrics(tmp_path):
    assert train(tmp_path / "run") == 0
    rows = report.read_metrics(tmp_path / "run" / "metrics.jsonl")
    last = [row for row in rows if "train/loss" in row][-1]
    parts = [last[f"time/{name}_s"] for name in ("compile", "wait", "evaluate", "save")]
    assert all(0 < part < last["time"] for part in parts)
    assert sum(parts) < last["time"]
