"""W&B and MLflow with their real libraries, offline and against servers that fail; one real run."""

import collections
import http.server
import io
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from mobilevit_jax import report, writers

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = {"optimizer.lr": 2e-3, "input.size": (16, 16), "batch_size": 16}


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    yield
    for thread in threading.enumerate():  # none tries again beneath a later test
        if thread.name.startswith("writer-"):
            thread.join(60)
            assert not thread.is_alive()


def start(workdir, writer, *, step=0):
    return report.Report(
        workdir,
        total_steps=100,
        start_step=step,
        images=lambda step: step,
        writers=[writer],
        config=CONFIG,
        console=Console(file=io.StringIO(), width=40),
    )


def said(run):
    return run.console.file.getvalue()


def wandb_records(path):
    """The records of an offline run: LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""  # behind W&B's own header
    while len(data) - at >= 7:
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def wandb_run(directory):
    """(id, config, [{metric: value}], exit code) of an offline run."""
    (path,) = directory.glob("*.wandb")
    run_id, config, rows, code = None, {}, [], None
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id = record.run.run_id
            config |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        elif kind == "history":
            items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            rows.append({k: json.loads(v) for k, v in items.items() if not k.startswith("_")})
        elif kind == "exit":
            code = record.exit.exit_code
    return run_id, config, rows, code


def test_wandb_offline_goes_on_with_its_run_and_sends_nothing_twice(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install 'mobilevit_jax[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    workdir = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), start(workdir, "wandb") as run:
        for step in (2, 4, 6):
            run.scalars(step, {"train/loss": 1 / step})
        run.scalars(4, {"val/top1": 0.5})
        raise KeyboardInterrupt
    (first,) = (workdir / "wandb").glob("offline-run-*")
    with start(workdir, "wandb", step=4) as run:  # the evaluation of step 6 had not been sent
        for step in (6, 8):
            run.scalars(step, {"train/loss": 9.0, "val/top1": step / 10})
    assert "WANDB_SERVICE" not in os.environ  # its process, which wrote the files, has ended
    (second,) = set((workdir / "wandb").glob("offline-run-*")) - {first}
    first_id, config, rows, code = wandb_run(first)
    assert config["optimizer.lr"] == 2e-3
    assert config["input.size"] == [16, 16]
    assert rows == [
        *({"step": step, "train/loss": 1 / step} for step in (2, 4, 6)),
        {"step": 4, "val/top1": 0.5},
    ]
    assert code == 1
    second_id, _, rows, code = wandb_run(second)
    assert second_id == first_id
    assert rows == [
        {"step": 6, "val/top1": 0.6},
        {"step": 8, "train/loss": 9.0, "val/top1": 0.8},
    ]
    assert code == 0
    assert said(run) == ""


def test_wandb_writes_to_disk_where_no_server_answers(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install 'mobilevit_jax[wandb]'")
    monkeypatch.setattr(writers, "REACH", 1)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    with start(tmp_path, "wandb") as run:
        run.scalars(1, {"train/loss": 0.5})
        assert not said(run)  # the thread waits, not the run
    assert "connection refused; written to disk, to be sent with: wandb sync" in said(run)
    assert said(run).count("written to disk") == 1
    (directory,) = (tmp_path / "wandb").glob("offline-run-*")
    assert wandb_run(directory)[2] == [{"step": 1, "train/loss": 0.5}]


def test_wandb_without_a_key_asks_nothing(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install 'mobilevit_jax[wandb]'")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with start(tmp_path / "run", "wandb") as run:
        run.scalars(1, {"train/loss": 0.5})
    assert said(run).startswith("W&B: not logged in; written to disk")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


# MLflow's tables use what SQLAlchemy 2.1 is about to drop.
@pytest.mark.filterwarnings("ignore:The ``noload``")
def test_mlflow_in_the_workdir_goes_on_with_its_run_and_sends_nothing_twice(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="pip install 'mobilevit_jax[mlflow]'")
    with pytest.raises(KeyboardInterrupt), start(tmp_path, "mlflow") as run:
        for step in (2, 4, 6):
            run.scalars(step, {"train/loss": 1 / step})
        raise KeyboardInterrupt
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'mobilevit_jax'")
    (stopped,) = client.search_runs([experiment.experiment_id])
    assert stopped.info.status == "KILLED"
    assert stopped.info.run_name == tmp_path.name
    assert stopped.data.params == {name: str(value) for name, value in CONFIG.items()}
    with start(tmp_path, "mlflow", step=4) as run:
        for step in (6, 8):
            run.scalars(step, {"train/loss": 9.0, "val/top1": step / 10})
    (ended,) = client.search_runs([experiment.experiment_id])
    assert ended.info.run_id == stopped.info.run_id
    assert ended.info.status == "FINISHED"

    def history(metric):
        return [(m.step, m.value) for m in client.get_metric_history(ended.info.run_id, metric)]

    assert history("train/loss") == [(2, 1 / 2), (4, 1 / 4), (6, 1 / 6), (8, 9.0)]
    assert history("val/top1") == [(6, 0.6), (8, 0.8)]
    assert said(run) == ""
    with start(tmp_path, "mlflow"):  # from scratch: another run
        pass
    assert len(client.search_runs([experiment.experiment_id])) == 2


class Server:
    """As much of MLflow's REST interface as a run calls; `away` answers nothing but 503."""

    def __init__(self):
        self.away, self.calls, self.points = False, collections.Counter(), []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def _answer(self):
                call = self.path.partition("?")[0].partition("/mlflow/")[2]
                size = int(self.headers.get("Content-Length") or 0)
                status, body = server.answer(call, json.loads(self.rfile.read(size) or "{}"))
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = _answer

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, call, body):
        self.calls[call] += 1
        if self.away:
            return 503, {}
        if call == "runs/log-batch":
            self.points += [(m["key"], m["step"], m["value"]) for m in body.get("metrics", [])]
        run = {"info": {"run_id": "r1", "run_uuid": "r1", "experiment_id": "7"}, "data": {}}
        return 200, {
            "experiments/get-by-name": {"experiment": {"experiment_id": "7", "name": "x"}},
            "runs/create": {"run": run},
            "runs/get": {"run": run},
            "runs/update": {"run_info": run["info"]},
        }.get(call, {})

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("mlflow", reason="pip install 'mobilevit_jax[mlflow]'")
    server = Server()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield server
    server.close()


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_server_away_in_mid_run_is_told_once_and_gets_everything_when_it_is_back(
    server, tmp_path
):
    with start(tmp_path, "mlflow") as run:
        run.scalars(1, {"train/loss": 0.5})
        wait_for(lambda: server.points)
        server.away = True
        for step in (2, 3, 4):
            run.scalars(step, {"train/loss": float(step)})
        calls = server.calls["runs/log-batch"]
        wait_for(lambda: server.calls["runs/log-batch"] >= calls + 1 and said(run))
        server.away = False
        run.scalars(5, {"train/loss": 5.0})
    assert [point[1] for point in server.points] == [1, 2, 3, 4, 5]
    assert [point[2] for point in server.points] == [0.5, 2.0, 3.0, 4.0, 5.0]
    (line,) = said(run).splitlines()
    assert line.startswith("MLflow: ")
    assert "trying again with later rows" in line


def test_a_server_that_stays_away_costs_the_run_nothing_but_two_lines(server, tmp_path):
    server.away = True
    with start(tmp_path, "mlflow") as run:
        for step in (1, 2):
            run.scalars(step, {"train/loss": 0.5})
    warned, ended = said(run).splitlines()
    assert "trying again" in warned
    assert ended == "MLflow: 2 rows were not sent; see metrics.jsonl"
    assert [row["step"] for row in report.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_server_that_never_answers_does_not_hold_up_the_end(server, tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "FLUSH", 0.2)
    answered = threading.Event()
    monkeypatch.setattr(server, "answer", lambda call, body: (answered.wait(20), (503, {}))[1])
    with start(tmp_path, "mlflow") as run:
        run.scalars(1, {"train/loss": 0.5})
    assert "MLflow: no answer within 0 s; metrics.jsonl has all values" in said(run)
    answered.set()


def test_what_is_not_there_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="'tensorbord'; there are mlflow, tensorboard, wandb"):
        writers.check(["tensorbord"])
    for name, module, extra in [
        ("tensorboard", "tensorboardX", "log"),
        ("wandb", "wandb", "wandb"),
        ("mlflow", "sqlalchemy", "mlflow"),
    ]:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            message = rf"{name} needs {module}: pip install 'mobilevit_jax\[{extra}\]'"
            with pytest.raises(ValueError, match=message):
                writers.check([name])


def every_writer():
    for name in ("wandb", "mlflow"):
        pytest.importorskip(name, reason=f"pip install 'mobilevit_jax[{name}]'")
    return os.environ | {"WANDB_MODE": "offline"}


def test_none_takes_our_signals_or_imports_tensorflow_or_keeps_a_process_from_ending(tmp_path):
    code = (
        "import os, pathlib, signal, sys\n"
        "from mobilevit_jax.report import Report\n"
        "seen = []\n"
        "signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)\n"
        "for number in signals: signal.signal(number, lambda number, frame: seen.append(number))\n"
        "arguments = dict(total_steps=9, start_step=0, images=int)\n"
        "writers = ('tensorboard', 'wandb', 'mlflow')\n"
        "with Report(pathlib.Path(sys.argv[1]), writers=writers, **arguments) as run:\n"
        "    run.scalars(1, {'x': 1.0})\n"
        "    for number in signals: os.kill(os.getpid(), number)\n"
        "for number in signals: os.kill(os.getpid(), number)\n"
        "assert seen == [*signals, *signals], seen\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env=every_writer(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    for name in ("wandb", "mlflow"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["sent"] == {"x": 1}


@pytest.mark.long
def test_a_run_with_every_writer_is_stopped_by_a_signal_and_goes_on(tmp_path):
    workdir = tmp_path / "run"
    argv = [
        sys.executable,
        "launch.py",
        "train",
        "--config=tests/tiny.py",
        f"--workdir={workdir}",
        "--config.duration=60 steps",
        "--config.eval.every=60 steps",
        "--config.checkpoint.every=60 steps",
        "--config.log.every=10 steps",
        "--config.log.writers=('tensorboard','wandb','mlflow')",
    ]
    log = tmp_path / "log"
    with log.open("w") as file:
        environment = every_writer()
        process = subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=file, stderr=file)
        metrics = workdir / "metrics.jsonl"
        wait_until = time.monotonic() + 120
        while not (metrics.exists() and '"train/loss"' in metrics.read_text()):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < wait_until
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143, log.read_text()
        ids = [json.loads((workdir / f"{name}.json").read_text()) for name in ("wandb", "mlflow")]
        subprocess.run(
            argv, cwd=ROOT, env=environment, stdout=file, stderr=file, check=True, timeout=120
        )
    for name, before in zip(("wandb", "mlflow"), ids, strict=True):
        after = json.loads((workdir / f"{name}.json").read_text())
        assert after["id"] == before["id"]
        assert after["sent"]["train/loss"] == after["sent"]["val/loss"] == 60
    assert "Traceback" not in log.read_text()
    assert "W&B:" not in log.read_text()
    assert "MLflow:" not in log.read_text()
