"""Workers as tasks of a real Ray cluster, of this machine."""

import csv
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install ray")
def test_ray_does_the_distributing(tmp_path):
    workdir = tmp_path / "sweep"
    argv = ["--config=tests/tiny_sweep.py", f"--workdir={workdir}", "--trials=2", "--workers=2"]
    ended = subprocess.run(
        [sys.executable, "launch.py", "sweep", *argv, "--executor=ray", "--pruner=none"],
        cwd=ROOT,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ended.returncode == 0, ended.stderr
    with (workdir / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["complete"] * 2
    assert len({row["worker"] for row in rows}) == 2
    assert (workdir / "best.py").exists()
