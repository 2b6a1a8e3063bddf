"""Where a run's numbers go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

One signature for all, `open(workdir, start_step, config, note)`, and one row each in WRITERS.
TensorBoard's files are written in place. W&B and MLflow talk to servers that may be slow or away:
a thread of their own feeds them, so that no step waits for them, tries again at the next row, and
says once what is wrong.

A run that resumes from a checkpoint takes some steps again. TensorBoard hides the earlier values of
those (purge_step). The histories of W&B and MLflow can only grow (W&B's rewind is a preview, and
needs its server), so the first values stay and the second are not sent: how far each metric got is
kept, beside the run's id, in the workdir's `wandb.json` and `mlflow.json`. A run that begins at
step 0 is a new run in both.
"""

import collections
import importlib.util
import json
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

PROJECT = "mobilevit_jax"  # W&B's project and MLflow's experiment, unless the environment says more
REACH = 10  # seconds to wait for an answer of a server
FLUSH = 20.0  # seconds that the end of a run waits for what is still to be sent
BACKLOG = 10_000  # rows kept for a server that is away
ERRORS = 200  # characters of an error that are told

Note = Callable[[str], None]


class Writer(Protocol):
    """What a run tells its numbers to."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Takes one point for each value."""

    def close(self, *, finished: bool) -> None:
        """Hands over what is left; `finished` is False where the run was interrupted or failed."""


class Row(NamedTuple):
    """What is known of a step: values by metric, at a time in seconds since 1970."""

    step: int
    time: float
    values: Mapping[str, float]


class Connection(Protocol):
    """A run at a server, or in files that stand for one."""

    id: str

    def send(self, row: Row) -> None:
        """Adds a row; raises where it is not sure to have arrived."""

    def finish(self, *, finished: bool) -> None:
        """Says that no more will come."""


class TensorBoard:
    """Event files under workdir/tensorboard, through tensorboardX, which needs no TensorFlow."""

    def __init__(self, workdir: Path, start_step: int, config: Mapping[str, Any], note: Note):
        from tensorboardX import SummaryWriter

        # TensorBoard hides what earlier starts logged from purge_step on: those steps come again.
        purge = start_step + 1 if start_step else 0
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge)
        lines = [f"    {name}: {value}" for name, value in config.items()]  # indented: as it stands
        self._writer.add_text("config", "\n".join(lines), start_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one point for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, finished: bool) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


class Courier:
    """Brings rows to a connection from a thread, each value once.

    Args:
        name: of the server, for messages.
        path: file that keeps the run's id and the last step of every metric that arrived.
        start_step: step of the checkpoint that this start resumes from; at 0 the file is not read.
        where: which server or store; an id of another one is no use.
        connect: id of the run to go on with, or None for a new one -> connection.
        note: is told once if something goes wrong, and of what did not arrive.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        *,
        start_step: int,
        where: str,
        connect: Callable[[str | None], Connection],
        note: Note,
    ):
        self._name, self._path, self._where, self._note = name, path, where, note
        self._connect, self._connection = connect, None
        self._id, self._sent = None, {}
        if start_step and path.exists():
            kept = json.loads(path.read_text())
            if kept["where"] == where:
                self._id, self._sent = kept["id"], kept["sent"]
        self._told = False
        self._rows: queue.SimpleQueue[Row | bool] = queue.SimpleQueue()
        self._backlog: collections.deque[Row] = collections.deque(maxlen=BACKLOG)
        # A daemon: what a server does not take must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"writer-{name}", daemon=True)
        self._thread.start()

    _id: str | None
    _connection: Connection | None
    _sent: dict[str, int]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Hands a row to the thread."""
        self._rows.put(Row(step, time.time(), dict(values)))

    def close(self, *, finished: bool) -> None:
        """Waits, but not for long, until all has been sent."""
        self._rows.put(finished)
        self._thread.join(FLUSH)
        if self._thread.is_alive():
            self._note(
                f"{self._name}: no answer within {FLUSH:.0f} s; metrics.jsonl has all values"
            )

    def _run(self) -> None:
        row: Row | bool | None = None  # the first turn only connects, while the run compiles
        while not isinstance(row, bool):
            self._try(self._deliver)
            row = self._rows.get()
            if isinstance(row, Row):
                self._backlog.append(row)
        self._try(self._deliver)
        if self._connection is not None:
            connection, finished = self._connection, row
            self._try(lambda: connection.finish(finished=finished))
        if self._backlog:
            self._note(f"{self._name}: {len(self._backlog)} rows were not sent; see metrics.jsonl")

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a server or its library does, the run goes on
            if not self._told:
                self._told = True
                self._note(f"{self._name}: {str(error)[:ERRORS]}; trying again with later rows")

    def _deliver(self) -> None:
        if self._connection is None:
            self._connection = self._connect(self._id)
            if self._connection.id != self._id:
                self._id, self._sent = self._connection.id, {}
            self._keep()
        while self._backlog:
            row = self._backlog[0]
            values = {
                name: value
                for name, value in row.values.items()
                if row.step > self._sent.get(name, -1)
            }
            if values:
                self._connection.send(row._replace(values=values))
                self._sent |= dict.fromkeys(values, row.step)
                self._keep()
            self._backlog.popleft()

    def _keep(self) -> None:
        kept = {"where": self._where, "id": self._id, "sent": self._sent}
        replace_file(self._path, json.dumps(kept).encode())


class _WandbRun:
    def __init__(self, workdir: Path, config: Mapping[str, Any], run_id: str | None, note: Note):
        import wandb

        self.id = run_id or secrets.token_hex(4)
        settings = wandb.Settings(
            # The terminal, the repository and the machine are the run's own business.
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_save_requirements=False,
            silent=True,
            finish_timeout=FLUSH,
        )

        def begin(mode: str) -> Any:
            # Offline, only a busy machine is waited for.
            settings.init_timeout = FLUSH if mode == "offline" else REACH
            return wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", workdir.name),
                dir=workdir,
                id=self.id,
                resume="allow",
                config=dict(config),
                allow_val_change=True,
                mode=mode,  # pyrefly: ignore
                settings=settings,
            )

        mode = os.environ.get("WANDB_MODE")
        if mode is None:
            # Not left to init, which would ask for a key in the terminal.
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
            if mode == "offline":
                note(f"W&B: not logged in; {_sync_later(workdir)}")
        try:
            self._run = begin(mode)
        except wandb.Error as error:
            if mode == "offline":
                raise
            wandb.teardown()  # else the id counts as in use
            note(f"W&B: {str(error)[:ERRORS]}; {_sync_later(workdir)}")
            self._run = begin("offline")
        # Not W&B's own step: it would refuse the rest of a step that was half sent before a stop.
        self._run.define_metric("*", step_metric="step")

    def send(self, row: Row) -> None:
        """Adds a row to the run's queue; W&B itself keeps it on disk until it has arrived."""
        self._run.log({"step": row.step, **row.values})

    def finish(self, *, finished: bool) -> None:
        """Ends the run; anything but 0 is shown as failed."""
        import wandb

        self._run.finish(exit_code=0 if finished else 1)
        # W&B's own process writes the last 32 KiB of a run's file after that, and a container that
        # ends with ours would end it first: wait for it.
        wandb.teardown()


def _sync_later(workdir: Path) -> str:
    return f"written to disk, to be sent with: wandb sync {workdir / 'wandb'}/offline-run-*"


def open_wandb(workdir: Path, start_step: int, config: Mapping[str, Any], note: Note) -> Courier:
    """A W&B run; offline under workdir/wandb where WANDB_MODE says so or no server answers."""
    return Courier(
        "W&B",
        workdir / "wandb.json",
        start_step=start_step,
        where="wandb",  # offline runs are sent under the same id
        connect=lambda run_id: _WandbRun(workdir, config, run_id, note),
        note=note,
    )


class _MlflowRun:
    def __init__(self, workdir: Path, uri: str, config: Mapping[str, Any], run_id: str | None):
        from mlflow import MlflowClient, entities

        for name in ("mlflow", "alembic", "urllib3"):  # what goes wrong, the courier says
            logging.getLogger(name).setLevel(logging.ERROR)
        self._entities, self._client = entities, MlflowClient(tracking_uri=uri)
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            self.id = run_id
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self.id = self._client.create_run(number, run_name=workdir.name).info.run_id
        # Only here: MLflow never changes a parameter, and a resumed run may have changed some.
        params = [entities.Param(key, str(value)) for key, value in config.items()]
        for i in range(0, len(params), 100):  # as many as a call may hold
            self._client.log_batch(self.id, params=params[i : i + 100])

    def send(self, row: Row) -> None:
        """Sends a row, and waits for the answer."""
        time_ms = int(1000 * row.time)
        metrics = [
            self._entities.Metric(name, value, time_ms, row.step)
            for name, value in row.values.items()
        ]
        self._client.log_batch(self.id, metrics=metrics)

    def finish(self, *, finished: bool) -> None:
        """Ends the run as finished or killed."""
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


def open_mlflow(workdir: Path, start_step: int, config: Mapping[str, Any], note: Note) -> Courier:
    """An MLflow run at MLFLOW_TRACKING_URI, or else in workdir/mlflow.db.

    SQLite, because MLflow has given up stores of plain files.
    """
    # Set before mlflow is imported, which reads them, and before the thread, as getenv is not safe
    # beside putenv. The courier itself tries again; MLflow would hold it up for minutes.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REACH))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workdir.absolute()}/mlflow.db"
    return Courier(
        "MLflow",
        workdir / "mlflow.json",
        start_step=start_step,
        where=uri,
        connect=lambda run_id: _MlflowRun(workdir, uri, config, run_id),
        note=note,
    )


class Kind(NamedTuple):
    """A writer, the modules that it needs, and the extra of this package that installs them."""

    open: Callable[[Path, int, Mapping[str, Any], Note], Writer]
    modules: tuple[str, ...]
    extra: str


WRITERS = {
    "tensorboard": Kind(TensorBoard, ("tensorboardX",), "log"),
    "wandb": Kind(open_wandb, ("wandb",), "wandb"),
    "mlflow": Kind(open_mlflow, ("mlflow", "sqlalchemy", "alembic"), "mlflow"),
}


def check(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is not in WRITERS, or whose library is not installed."""
    for name in names:
        if name not in WRITERS:
            raise ValueError(f"unknown name {name!r}; there are {', '.join(sorted(WRITERS))}")
        for module in WRITERS[name].modules:
            if importlib.util.find_spec(module) is None:
                extra = WRITERS[name].extra
                raise ValueError(f"{name} needs {module}: pip install 'mobilevit_jax[{extra}]'")


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file so that a reader finds the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
