"""A run that is stopped anywhere, however rudely, ends to the bit where an undisturbed one does."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mobilevit_jax import checkpoint, report

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 24


def command(workdir):
    return [
        sys.executable,
        "tests/quick_launch.py",
        "train",
        "--config=tests/quick.py",
        f"--workdir={workdir}",
        f"--config.duration={STEPS} steps",
        "--config.eval.every=8 steps",
    ]


def start(workdir):
    with (workdir.parent / f"{workdir.name}.log").open("a") as log:
        return subprocess.Popen(command(workdir), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def said(workdir):
    return (workdir.parent / f"{workdir.name}.log").read_text()


def finish(workdir):
    process = start(workdir)
    assert process.wait(timeout=600) == 0, said(workdir)


def wait_for(process, condition, seconds=300):
    """Polls until the condition holds; False when the process ended before."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    raise TimeoutError("the run did not get there")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(workdir)
    return workdir


def assert_same_end(workdir, undisturbed):
    for which in ("newest", "best"):
        ended, expected = checkpoint.read(workdir, which), checkpoint.read(undisturbed, which)
        assert ended.step == expected.step
        np.testing.assert_equal(ended.state, expected.state)
    assert logged(workdir) == logged(undisturbed)


def logged(workdir):
    """(step, what) of every row; a signal's own row, between two that were due, is left out."""
    rows = report.read_metrics(workdir / "metrics.jsonl")
    steps = [(row["step"], "val/loss" in row) for row in rows]
    return [(step, evaluated) for step, evaluated in steps if step % 2 == 0]


def step_saved(workdir, step):
    return lambda: any(done >= step for done in checkpoint.complete_steps(workdir / "checkpoints"))


def saving(workdir, after):
    """A save is under way that began after step `after` was complete."""
    there = step_saved(workdir, after)
    return lambda: there() and any((workdir / "checkpoints").glob("*tmp*"))


def test_killed_in_the_middle_of_a_save(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir)
    assert wait_for(process, saving(workdir, 4)), said(workdir)
    process.kill()
    process.wait()
    finish(workdir)
    assert "resuming after step" in said(workdir)
    assert_same_end(workdir, undisturbed)


def kill_at_random(workdir, times, seed):
    rng = random.Random(seed)
    for _ in range(times):
        process = start(workdir)
        reached = rng.randrange(0, STEPS, 2)
        wait_for(process, step_saved(workdir, reached) if reached else lambda: workdir.exists())
        time.sleep(rng.random() * 0.5)
        process.kill()
        process.wait()


def test_killed_at_random_moments(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    kill_at_random(workdir, times=2, seed=0)
    finish(workdir)
    assert_same_end(workdir, undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 6))
def test_killed_at_many_random_moments(undisturbed, tmp_path, seed):
    workdir = tmp_path / "run"
    kill_at_random(workdir, times=6, seed=seed)
    finish(workdir)
    assert_same_end(workdir, undisturbed)


@pytest.mark.parametrize(
    "name",
    ["SIGTERM", *(pytest.param(name, marks=pytest.mark.long) for name in ("SIGINT", "SIGUSR1"))],
)
def test_a_signal_saves_and_leaves_with_143(undisturbed, tmp_path, name):
    workdir = tmp_path / "run"
    process = start(workdir)
    assert wait_for(process, step_saved(workdir, 4)), said(workdir)
    os.kill(process.pid, getattr(signal, name))
    assert process.wait(timeout=120) == 143, said(workdir)
    assert f"{name}: saved step" in said(workdir)
    assert "Traceback" not in said(workdir)
    finish(workdir)
    assert_same_end(workdir, undisturbed)
