"""One run in several processes: the same result as in one, whoever is stopped or killed."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from mobilevit_jax import checkpoint, processes, report

STEPS = 20
# Often enough that a run can be met in its middle.
EVERY = (
    "--config.checkpoint.every=5 steps",
    "--config.checkpoint.keep=12",
    "--config.log.every=1 steps",
    "--config.eval.every=20 steps",
)
ROOT = pathlib.Path(__file__).parent.parent
DEVICES = "--xla_force_host_platform_device_count"
# Plain SGD: Adam makes a step of full size out of a gradient that is rounding noise.
SGD = (
    "--config.optimizer={'name': 'sgd', 'lr': 0.01, 'momentum': 0.9, 'nesterov': False, "
    "'weight_decay': 0.01, 'decay_1d': False, 'clip_norm': 10.0, 'layer_decay': 1.0}"
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Run:
    """Starts a training run in `count` processes of `devices` fake devices each."""

    def __init__(self, workdir, *, count, devices, more=()):
        self.workdir, self.count = workdir, count
        where = f"--coordinator=127.0.0.1:{free_port()}"
        environment = os.environ | {"XLA_FLAGS": f"{DEVICES}={devices}"}
        self.processes = []
        for index in range(count):
            several = [where, f"--num_processes={count}", f"--process_id={index}"]
            command = [
                *(sys.executable, "tests/quick_launch.py", "train", "--config=tests/quick.py", SGD),
                *(f"--workdir={workdir}", f"--config.duration={STEPS} steps", *EVERY, *more),
                *(several if count > 1 else []),
            ]
            with self.log(index).open("a") as log:
                self.processes.append(
                    subprocess.Popen(
                        command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment
                    )
                )

    def log(self, index):
        return self.workdir.parent / f"{self.workdir.name}.{index}.log"

    def said(self):
        return "\n".join(self.log(index).read_text() for index in range(self.count))

    def finish(self, seconds=300):
        statuses = [process.wait(timeout=seconds) for process in self.processes]
        assert statuses == [0] * self.count, self.said()

    def wait_until_saved(self, step):
        where = self.workdir / "checkpoints"
        self.wait_until(lambda: max(checkpoint.complete_steps(where), default=0) >= step)

    def wait_until(self, condition, seconds=300):
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, self.said()
            assert all(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.01)

    def kill(self):
        for process in self.processes:
            process.kill()
            process.wait()


def forget(workdir, *, after):
    """Takes away what a run has saved after a step."""
    for kind in ("checkpoints", "best"):
        for step in checkpoint.complete_steps(workdir / kind):
            if step > after:
                shutil.rmtree(workdir / kind / str(step))


def state(workdir, step):
    return checkpoint.read(workdir, str(step)).state


def assert_same_steps(ours, theirs, steps):
    """Equal up to the order of sums."""
    first, second = (
        {row["step"]: row for row in report.read_metrics(workdir / "metrics.jsonl")}
        for workdir in (ours, theirs)
    )
    for step in steps:
        assert first[step]["images"] == second[step]["images"]
        for name in ("train/loss", "train/grad_norm"):
            assert first[step][name] == pytest.approx(second[step][name], rel=1e-4), (step, name)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    Run(workdir, count=1, devices=4).finish()
    return workdir


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "run"
    run = Run(workdir, count=2, devices=2)
    run.finish()
    return workdir


def test_two_processes_equal_one(one_process, two_processes):
    assert_same_steps(two_processes, one_process, range(1, STEPS))
    # Pictures and tables are of all examples, each once, and in their order.
    tables = [(where / "per_class.csv").read_text() for where in (one_process, two_processes)]
    supports = [re.findall(r"^(\w+),(\d+)", table, re.MULTILINE) for table in tables]
    assert supports[0] == supports[1]
    assert sum(int(count) for _, count in supports[0]) == 100


def test_one_lead_speaks_and_writes(two_processes):
    lead, other = ((two_processes.parent / f"run.{index}.log").read_text() for index in range(2))
    assert "on 4 cpu of 2 processes" in lead
    assert lead.count(f"step {STEPS}  val") == 1
    assert "step" not in other
    assert len((two_processes / "starts.jsonl").read_text().splitlines()) == 1


def test_stopped_and_killed_in_one_process(two_processes, tmp_path):
    """Whichever process is asked to stop, all do, at the same place; killed, none is lost."""
    workdir = tmp_path / "run"

    def stopped(begun):
        run = Run(workdir, count=2, devices=2)
        # Both listen by then; the runs before have said it, too.
        run.wait_until(lambda: run.said().count("compiled 1/2") > begun)
        os.kill(run.processes[1].pid, signal.SIGUSR1)
        assert [process.wait(timeout=300) for process in run.processes] == [143, 143], run.said()
        step = max(checkpoint.complete_steps(workdir / "checkpoints"))
        assert f"SIGTERM: saved step {step} of {STEPS}" in run.said()
        return step

    assert stopped(begun=0) == 0  # in the evaluation that comes first

    run = Run(workdir, count=2, devices=2)
    run.wait_until_saved(1)
    run.processes[1].kill()
    run.kill()
    forget(workdir, after=5)  # it may have come further, or even to its end, by then

    assert 5 < stopped(begun=2) < STEPS  # in a step: no evaluation is due where it goes on

    run = Run(workdir, count=2, devices=2)
    run.finish()
    assert "resuming after step 5" in run.said()
    np.testing.assert_equal(state(workdir, STEPS), state(two_processes, STEPS))


@pytest.mark.long
def test_the_others_leave_when_one_is_killed(tmp_path):
    run = Run(tmp_path / "run", count=2, devices=2, more=["--config.duration=5000 steps"])
    run.wait_until_saved(4)
    run.processes[1].kill()
    assert run.processes[0].wait(timeout=3 * processes.SILENCE) not in (0, 143)
    run.kill()


def test_resumed_on_other_devices_and_processes(one_process, tmp_path):
    """From four devices of one process to one each of two, which divide the parameters."""
    workdir = tmp_path / "run"
    shutil.copytree(one_process, workdir)
    forget(workdir, after=10)
    run = Run(workdir, count=2, devices=1, more=["--config.mesh.fsdp=2"])
    run.wait_until_saved(15)
    run.kill()
    assert "resuming after step 10" in run.said()
    assert_same_steps(workdir, one_process, range(11, 16))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "localhost:1"}, "give all of --coordinator=HOST:PORT"),
        ({"coordinator": "localhost:1", "count": 2, "index": 2}, "counts from 0 to 1"),
    ],
)
def test_join_wants_sound_arguments(given, message):
    with pytest.raises(processes.JoinError, match=message):
        processes.join(**given)


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "8"}, False),  # a shell in an allocation, without srun
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://a:1", "OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "host0,host1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "host0:8080"}, True),
    ],
)
def test_clusters_are_recognised(monkeypatch, environment, several):
    for name in ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes._started_by_a_cluster() == several


def test_alone_the_lead_decides_and_fails_as_ever():
    assert processes.is_lead() and processes.place() == (0, 1)
    assert processes.by_lead(lambda: 3) == 3
    with pytest.raises(KeyError):
        processes.by_lead(lambda: {}["missing"])
    rows = np.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(processes.gather(rows), rows)
