"""Many workers on one database server, some of which are killed."""

import collections
import contextlib
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
from mobilevit_jax.models import zoo
from mobilevit_jax.tools import studies
from tests import quick_launch

ROOT = pathlib.Path(__file__).parents[2]
PASSWORD = "s3cret/of:the@test"
QUOTED = "s3cret%2Fof%3Athe%40test"


def directory(user):
    """A directory for a server that runs as that user; pytest's own are for one user alone."""
    home = pathlib.Path(tempfile.mkdtemp(prefix="sweep-server-"))
    if os.getuid() == 0:
        shutil.chown(home, user)
    return home


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def postgresql():
    found = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = found[-1] if found else shutil.which("initdb")
    if not initdb:
        pytest.skip("needs a PostgreSQL server: apt-get install postgresql")
    user = "postgres" if os.getuid() == 0 else getpass.getuser()
    switch = ["runuser", "-u", user, "--"] if os.getuid() == 0 else []  # initdb refuses root
    home, port = directory(user), free_port()
    (home / "password").write_text(PASSWORD)
    (home / "password").chmod(0o644)
    quiet = {"check": True, "cwd": home, "stdout": subprocess.DEVNULL}
    subprocess.run(
        [
            *(*switch, initdb, "-D", home / "data", "-U", "sweeper", "-A", "scram-sha-256", "-N"),
            *("--pwfile", home / "password", "--locale=C", "-E", "UTF8"),
        ],
        **quiet,
    )
    options = f"-c listen_addresses=127.0.0.1 -p {port} -k {home} -c fsync=off"
    command = [*switch, pathlib.Path(initdb).parent / "pg_ctl", "-D", home / "data", "-w"]
    subprocess.run([*command, "-l", home / "log", "-o", options, "start"], **quiet)
    try:
        yield f"postgresql://sweeper:{QUOTED}@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*command, "-m", "immediate", "stop"], **quiet)
        shutil.rmtree(home)


@contextlib.contextmanager
def mysql():
    install = shutil.which("mariadb-install-db")
    serve = shutil.which("mariadbd", path=f"{os.environ['PATH']}:/usr/sbin")
    if not install or not serve:
        pytest.skip("needs a MySQL server: apt-get install mariadb-server")
    user = "mysql" if os.getuid() == 0 else getpass.getuser()
    home, port = directory(user), free_port()
    (home / "init.sql").write_text(  # a line each
        "CREATE DATABASE sweeps;\n"
        f"CREATE USER sweeper IDENTIFIED BY '{PASSWORD}';\n"
        "GRANT ALL ON *.* TO sweeper;\n"
    )
    common = ["--no-defaults", f"--user={user}", f"--datadir={home / 'data'}"]
    log = home / "log"
    with log.open("wb") as said:
        subprocess.run([install, *common, "--skip-test-db"], check=True, stdout=said, stderr=said)
        process = subprocess.Popen(
            [
                *(serve, *common, f"--init-file={home / 'init.sql'}"),
                *("--bind-address=127.0.0.1", f"--port={port}", f"--socket={home / 'socket'}"),
                *(f"--pid-file={home / 'pid'}", "--skip-name-resolve"),
            ],
            stdout=said,
            stderr=said,
        )
    try:
        wait_for(lambda: "ready for connections" in log.read_text(), log, process)
        yield f"mysql://sweeper:{QUOTED}@127.0.0.1:{port}/sweeps"
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(home)


@pytest.fixture(scope="module", params=[postgresql, pytest.param(mysql, marks=pytest.mark.long)])
def server(request):
    """URL of a server of its own, on a free port of the loopback device."""
    with request.param() as url:
        yield url


def launch(url, *argv, log):
    environment = {**os.environ, "OPTUNA_STORAGE": url}
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "tests/quick_launch.py", "sweep", *argv],
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
    trials = 3
    controller = launch(
        server, "--config=tests/tiny_sweep.py", f"--workdir={workdir}", f"--trials={trials}",
        "--study=killed", "--workers=1", "--sampler=random", "--pruner=none", log=log,
    )  # fmt: skip

    wait_for(lambda: " trials; to help: " in log.read_text(), log, controller)
    study = studies.join(server, "killed")
    known = study.trials
    assert len(known()) == trials
    # Held until the other has a trial: where both start slowly, this one could take them all. Its
    # trial, too, where it has one already: else that could end meanwhile.
    controller.send_signal(signal.SIGSTOP)
    for child in children(controller.pid):
        os.kill(child, signal.SIGSTOP)
    victim = launch(server, "--worker", "--study=killed", "--workers=1", log=log)
    try:
        # A worker dies, and its trial with it.
        def run_by(pid):  # trials that have some way to go
            return [
                trial
                for trial in known()
                if trial.state is TrialState.RUNNING
                and trial.user_attrs.get("worker", "").endswith(f":{pid}")
                and trial.user_attrs.get("lock")
                and not trial.intermediate_values
            ]

        (lost,) = wait_for(lambda: run_by(victim.pid), log, victim)
        # The lock is there a moment before the process that runs the trial.
        (process,) = wait_for(lambda: children(victim.pid), log, victim)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        controller.send_signal(signal.SIGCONT)
        # A trial dies, and its worker goes on.
        (broken,) = wait_for(lambda: run_by(controller.pid), log, controller)
        child, *_ = wait_for(lambda: children(controller.pid), log, controller)
        os.kill(child, signal.SIGKILL)
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
    nowhere = f"{server.rpartition('/')[0]}/no_such_database"
    garbled = server.replace("127.0.0.1:", "127.0.0.1:x")
    refused, unknown = {
        "postgresql": ("password authentication failed", '"no_such_database" does not exist'),
        "mysql": ("Access denied for user 'sweeper'", "Unknown database 'no_such_database'"),
    }[server.partition(":")[0]]
    for url, message in ((wrong, refused), (nowhere, unknown), (garbled, "is no URL")):
        monkeypatch.setenv("OPTUNA_STORAGE", url)
        assert main(["sweep", "--worker", "--study=x"]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
        for secret in (QUOTED, PASSWORD, "an-0ther"):
            assert secret not in said


def test_nothing_is_made_where_something_is_wrong(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(zoo, "FAMILIES", quick_launch.FAMILIES)
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
