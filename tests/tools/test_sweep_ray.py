"""Workers as tasks of a real Ray cluster, of this machine, one of which is killed."""

import collections
import csv
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from optuna.trial import TrialState

from mobilevit_jax.tools import studies

ROOT = pathlib.Path(__file__).parents[2]


def victim(workdir, process, log):
    """A trial that runs and has some way to go, and its worker's process id."""
    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        if (workdir / "study.csv").exists():
            for trial in studies.join(studies.journal_url(workdir), "sweep").trials():
                going = trial.state is TrialState.RUNNING and not trial.intermediate_values
                if going and trial.user_attrs.get("lock"):
                    return trial.number, int(trial.user_attrs["worker"].rpartition(":")[2])
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install ray")
def test_ray_does_the_distributing(tmp_path):
    workdir, log = tmp_path / "sweep", tmp_path / "log.txt"
    argv = ["--config=tests/tiny_sweep.py", f"--workdir={workdir}", "--trials=4", "--workers=2"]
    argv += ["--executor=ray", "--pruner=none"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "tests/quick_launch.py", "sweep", *argv],
            cwd=ROOT,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        lost, worker = victim(workdir, process, log)
        if sys.platform == "linux":  # two workers share the cores fairly
            assert len(os.sched_getaffinity(worker)) == max(len(os.sched_getaffinity(0)) // 2, 1)
        os.kill(worker, signal.SIGKILL)
        assert process.wait(timeout=500) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    with (workdir / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert collections.Counter(row["state"] for row in rows) == {"complete": 4, "failed": 1}
    (failed,) = [row for row in rows if row["state"] == "failed"]
    (again,) = [row for row in rows if row["retry_of"]]
    assert failed["trial"] == again["retry_of"] == str(lost)
    assert failed["lr"] == again["lr"]
    assert {row["worker"].rpartition(":")[2] for row in rows} > {str(worker)}
    assert (workdir / "best.py").exists()
