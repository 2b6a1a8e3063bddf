"""Many workers on one PostgreSQL server, some of which are killed."""

import collections
import getpass
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest
from optuna.trial import TrialState

from launch import main
from mobilevit_jax.tools import studies

ROOT = pathlib.Path(__file__).parents[2]
PASSWORD = "s3cret/of:the@test"
QUOTED = "s3cret%2Fof%3Athe%40test"


def programs():
    found = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


@pytest.fixture(scope="module")
def server():
    """URL of a server of its own, on a free port of the loopback device."""
    bin = programs() or (shutil.which("initdb") and pathlib.Path(shutil.which("initdb")).parent)
    if not bin:
        pytest.skip("needs a PostgreSQL server: apt-get install postgresql")
    user = "postgres" if os.getuid() == 0 else getpass.getuser()
    # initdb refuses root, and pytest's own directories are for one user alone.
    switch = ["runuser", "-u", user, "--"] if os.getuid() == 0 else []
    home = pathlib.Path(tempfile.mkdtemp(prefix="postgresql-"))
    (home / "password").write_text(PASSWORD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if switch:
        shutil.chown(home, user)
        shutil.chown(home / "password", user)
    data, log = home / "data", home / "log"
    quiet = {"check": True, "cwd": home, "stdout": subprocess.DEVNULL}
    subprocess.run(
        [
            *(*switch, bin / "initdb", "-D", data, "-U", "sweeper", "-A", "scram-sha-256", "-N"),
            *("--pwfile", home / "password", "--locale=C", "-E", "UTF8"),
        ],
        **quiet,
    )
    options = f"-c listen_addresses=127.0.0.1 -p {port} -k {home} -c fsync=off"
    command = [*switch, bin / "pg_ctl", "-D", data, "-w"]
    subprocess.run([*command, "-l", log, "-o", options, "start"], **quiet)
    try:
        yield f"postgresql://sweeper:{QUOTED}@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*command, "-m", "immediate", "stop"], **quiet)
        shutil.rmtree(home)


def launch(url, *argv, log):
    environment = {**os.environ, "OPTUNA_STORAGE": url}
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "launch.py", "sweep", *argv],
            cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def wait_for(what, log, process, seconds=240):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        found = what()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"waited in vain; {log.read_text()}")


def children(pid):
    return [
        int(each) for each in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_killed_workers_lose_no_trial(server, tmp_path):
    log, workdir = tmp_path / "log.txt", tmp_path / "sweep"
    trials = 5
    controller = launch(
        server, "--config=tests/tiny_sweep.py", f"--workdir={workdir}", f"--trials={trials}",
        "--study=killed", "--workers=1", "--sampler=random", "--pruner=none", log=log,
    )  # fmt: skip

    wait_for(lambda: " trials; to help: " in log.read_text(), log, controller)
    study = studies.join(server, "killed")
    known = study.trials
    assert len(known()) == trials
    victim = launch(server, "--worker", "--study=killed", "--workers=1", log=log)
    try:
        # A worker dies, and its trial with it.
        def run_by(pid):
            return [
                trial
                for trial in known()
                if trial.state is TrialState.RUNNING
                and trial.user_attrs.get("worker", "").endswith(f":{pid}")
                and trial.user_attrs.get("lock")
            ]

        (lost,) = wait_for(lambda: run_by(victim.pid), log, victim)
        (process,) = children(victim.pid)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        # A trial dies, and its worker goes on.
        (broken,) = wait_for(lambda: run_by(controller.pid), log, controller)
        os.kill(children(controller.pid)[0], signal.SIGKILL)
        helper = launch(server, "--worker", "--study=killed", "--workers=1", log=log)
        assert controller.wait(timeout=300) == 0, log.read_text()
        assert helper.wait(timeout=60) == 0, log.read_text()
        assert not pathlib.Path(f"/proc/{process}").exists()
    finally:
        for each in (controller, victim):
            each.kill()
            each.wait()

    done = known()
    states = collections.Counter(trial.state for trial in done)
    assert states == {TrialState.COMPLETE: trials, TrialState.FAIL: 2}
    first = [trial for trial in done if not studies.retried(trial)]
    assert [trial.number for trial in first] == list(range(trials))
    again = {studies.retried(trial)[0]: trial for trial in done if studies.retried(trial)}
    assert sorted(again) == sorted([lost.number, broken.number])
    for number, trial in again.items():
        assert trial.state is TrialState.COMPLETE
        assert trial.params == done[number].params != {}
        assert studies.directory(trial) == f"trial_{number:04d}"
        assert done[number].user_attrs["end"].startswith("died: ")
    names = sorted(path.name for path in workdir.glob("trial_*"))
    assert names == [f"trial_{number:04d}" for number in range(trials)]
    for trial in first:
        rows = (workdir / f"trial_{trial.number:04d}" / "metrics.jsonl").read_text().splitlines()
        assert '"step": 4' in rows[-1]
    workers = {trial.user_attrs["worker"] for trial in done}
    assert len(workers) >= 2
    rows = (workdir / "study.csv").read_text().splitlines()
    assert len(rows) == 1 + trials + 2
    said = log.read_text()
    assert PASSWORD not in said
    assert QUOTED not in said
    assert "Traceback" not in said


def test_a_password_is_never_printed(server, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    wrong = server.replace(QUOTED, "an-0ther")
    nowhere = server.replace("/postgres", "/no_such_database")
    garbled = server.replace("127.0.0.1:", "127.0.0.1:x")
    for url, message in (
        (wrong, "password authentication failed"),
        (nowhere, 'database "no_such_database" does not exist'),
        (garbled, "is no URL"),
    ):
        monkeypatch.setenv("OPTUNA_STORAGE", url)
        assert main(["sweep", "--worker", "--study=x"]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
        for secret in (QUOTED, PASSWORD, "an-0ther"):
            assert secret not in said


def test_nothing_is_made_where_something_is_wrong(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OPTUNA_STORAGE", server)
    config = "--config=tests/tiny_sweep.py"
    make = ["sweep", config, "--executor=none", "--study=made", "--trials=2"]
    assert main([*make, "--workdir=/proc/sweep"]) == 2
    assert "--workdir=/proc/sweep cannot be made" in capsys.readouterr().err
    assert main(["sweep", "--worker", "--study=made"]) == 2
    assert "there is no study 'made'" in capsys.readouterr().err
    assert main([*make, f"--workdir={tmp_path / 'a'}"]) == 0
    assert "2 trials; to help: launch.py sweep --worker" in capsys.readouterr().out
    assert main([*make, f"--workdir={tmp_path / 'b'}", "--seed=1"]) == 2
    assert "seed was 0 and is 1" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
