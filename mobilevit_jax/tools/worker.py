"""Works on the trials of a study, each an ordinary run in a process of its own.

A worker watches its trials' metrics.jsonl from outside: what a trial logs is what the sampler and
the pruner see, and a trial that is pruned or interrupted gets SIGTERM, saves, and can be gone on
with by hand. No trial runs in the worker's process: what kills one must not kill the others, and an
accelerator belongs to one process.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from mobilevit_jax import build, report, workdirs
from mobilevit_jax.models import zoo
from mobilevit_jax.tools import space, studies, study_report
from mobilevit_jax.writers import replace_file

POLL = 0.5  # seconds between two looks at everything
OUTPUT = "output.txt"  # what a trial prints, in its directory
PROFILE = "profile.json"
CONFIG = "config.py"  # in a sweep's directory: what its trials change
COSTS = ("params", "macs", "latency")  # objectives that no evaluation gives
DIVERGED = 4  # exit status of a run
# A trial must not outlive its worker: Linux sends it SIGTERM, upon which it saves. Said between
# fork and exec by a process that is nothing else, as jax does not stand code in a fork of its own.
DIE_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)

# By these a run finds the other processes of its own (processes.py). A trial has none: whatever the
# cluster says is about the workers.
TOGETHER = ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "MEGASCALE_")

Override = Callable[[build.Config, Sequence[str]], build.Config]


class Stopped(Exception):
    """A signal came; the trials have saved and wait."""


class Slot(NamedTuple):
    """Where one trial at a time runs.

    Attributes:
        environment: of its processes.
        cores: that they may use; empty for all.
    """

    environment: dict[str, str]
    cores: tuple[int, ...]


def slots(workers: int | None, environment: Mapping[str, str]) -> list[Slot]:
    """Shares out this machine's accelerators and cores.

    Args:
        workers: trials at a time; None for one an accelerator, or one where there is none.
        environment: of the processes to come.
    """
    devices = _accelerators(environment)
    count = workers or len(devices) or 1
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = sorted(affinity(0)) if affinity else []
    shared = []
    for i in range(count):
        own = {name: text for name, text in environment.items() if not name.startswith(TOGETHER)}
        if devices:
            own["CUDA_VISIBLE_DEVICES"] = devices[i % len(devices)]
            together = math.ceil(count / len(devices))
            if together > 1:
                own.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / together:.3f}")
        block = cores[i * len(cores) // count : (i + 1) * len(cores) // count]
        shared.append(Slot(own, tuple(block or cores[i % len(cores) :][:1] if cores else ())))
    return shared


def _accelerators(environment: Mapping[str, str]) -> list[str]:
    """NVIDIA's devices that jax would use, as CUDA_VISIBLE_DEVICES names them."""
    if environment.get("JAX_PLATFORMS", "").partition(",")[0] == "cpu":
        return []
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True)
    return listed.stdout.split() if listed.returncode == 0 else []


@dataclasses.dataclass
class Job:
    """A trial that this process works on.

    Attributes:
        trial: Optuna's.
        slot: where it runs.
        directory: of the run.
        arguments: --config.key=value of each override.
        lock: on the directory.
        process: the run, or what measures it afterwards; None until the lock is got.
        reported: evaluations that are told to Optuna.
        ending: what a SIGTERM was sent for: "pruned", "interrupted", "lost"; or "".
        measuring: whether the run is over and `process` measures its latency.
        alive: when the last sign of life was given.
    """

    trial: optuna.Trial
    slot: Slot
    directory: pathlib.Path
    arguments: list[str]
    lock: studies.Lock
    process: subprocess.Popen[bytes] | None = None
    reported: int = 0
    ending: str = ""
    measuring: bool = False
    alive: float = 0.0

    def evaluations(self, metric: str) -> list[float]:
        """A metric's values so far; that of the fresh weights is left out."""
        path = self.directory / "metrics.jsonl"
        rows = report.read_metrics(path) if path.exists() else []
        return [row[metric] for row in rows if row["step"] and metric in row]

    def last_words(self) -> str:
        """What the run said when it failed."""
        text = (self.directory / OUTPUT).read_text(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        told = [
            line.removeprefix("launch.py: ") for line in lines if line.startswith("launch.py: ")
        ]
        return (told or lines or ["it said nothing"])[-1]


class Worker:
    """Takes trials of a study and runs them, a slot each.

    Args:
        study: whose.
        workdir: where the trials' directories are made.
        draw: the space.
        slots: none to look after the study only.
        launcher: path of launch.py.
        override: applies --config.key=value to a config, in place.
    """

    def __init__(
        self,
        study: studies.Study,
        workdir: pathlib.Path,
        *,
        draw: space.Space,
        slots: Sequence[Slot],
        launcher: pathlib.Path,
        override: Override,
    ) -> None:
        self._study, self._workdir, self._draw = study, workdir.absolute(), draw
        self._free, self._jobs = list(slots), list[Job]()
        self._launcher, self._override = launcher, override
        self._config = build.restore(study.settings.config)
        self._metrics = [each.removeprefix("-") for each in study.settings.objectives]
        workdirs.make(workdir)
        text = study_report.recipe(study.settings.config, f"What the trials of {workdir} change.")
        replace_file(self._workdir / CONFIG, text.encode())

    def run(
        self, screen: "study_report.Screen", others: Callable[[], bool] = lambda: False
    ) -> None:
        """Works until every trial of the study is finished.

        Args:
            screen: is shown the trials.
            others: whether somebody else is sure to work on the study; asked by who has no slot.

        Raises:
            Stopped: a signal came.
            StorageError: the storage is gone; the trials were interrupted.
        """
        looked = 0.0
        with _Signals() as signals, studies.talking(self._study.url), self._saving_all():
            while True:
                if signals.count:
                    self._interrupt(kill=signals.count > 1)
                else:
                    while self._free and self._take():
                        pass
                for job in list(self._jobs):
                    self._look(job)
                if time.monotonic() - looked > 2:
                    self._study.bury()
                    trials = self._study.trials()
                    screen.show(trials)
                    looked = time.monotonic()
                    if not self._jobs and studies.over(trials):
                        return
                if not self._jobs and signals.count:
                    raise Stopped(
                        f"{signals.name}: what ran has saved; run the same command again to go on"
                    )
                if not self._jobs and not self._free and not others():
                    raise Stopped("no worker is left; run the same command again to go on")
                time.sleep(POLL)

    @contextlib.contextmanager
    def _saving_all(self) -> Iterator[None]:
        """Whatever goes wrong, no trial is left running without anybody who looks after it."""
        try:
            yield
        finally:
            for job in self._jobs:
                if job.process is not None:
                    job.process.terminate()
                    job.process.wait()

    def _take(self) -> bool:
        """Takes a trial, if one waits."""
        trial = self._study.take()
        if trial is None:
            return False
        frozen = self._study.frozen(trial)
        trial.set_user_attr("worker", f"{platform.node()}:{os.getpid()}")
        try:
            arguments = space.arguments(space.draw(self._draw, trial))
            self._override(build.restore(build.plain(self._config)), arguments)
        except build.ConfigError as error:
            self._end(trial, TrialState.FAIL, str(error))
            return True
        directory = self._workdir / studies.directory(frozen)
        directory.mkdir(exist_ok=True)
        trial.set_user_attr("directory", str(directory))
        lock = studies.Lock(directory / "lock")
        job = Job(trial, self._free.pop(0), directory, arguments, lock)
        job.reported = len(frozen.intermediate_values)
        self._jobs.append(job)
        return True

    def _look(self, job: Job) -> None:
        """One trial's turn: a sign of life, its new evaluations, its end."""
        if job.process is None:
            if job.ending:
                self._leave(job)
                self._study.give_back(job.trial)
            elif job.lock.acquire():  # else what was started by a dead worker is still saving
                job.trial.set_user_attr("lock", job.lock.name)
                arguments = ["train", f"--config={self._workdir / CONFIG}"]
                arguments += [f"--workdir={job.directory}", *job.arguments]
                job.process = self._spawn(job, arguments, job.directory / OUTPUT)
            return
        if time.monotonic() - job.alive > self._study.settings.heartbeat and not job.ending:
            job.alive = time.monotonic()
            try:
                job.trial.set_user_attr("alive", time.time())
            except UpdateFinishedTrialError:  # somebody has taken this process for dead
                job.ending = "lost"
                job.process.terminate()
        # Asked first: what was logged before the end is then surely read.
        status = job.process.poll()
        if len(self._metrics) == 1 and not job.measuring and job.ending != "lost":
            self._report(job, job.process)
        if status is not None:
            self._finished(job, status)

    def _report(self, job: Job, process: "subprocess.Popen[bytes]") -> None:
        """Tells Optuna a trial's new evaluations, and asks whether it is worth going on."""
        values = job.evaluations(self._metrics[0])
        for number in range(job.reported + 1, len(values) + 1):
            with contextlib.suppress(UpdateFinishedTrialError):
                job.trial.report(values[number - 1], number)
            job.reported = number
            # After the last evaluation there is nothing to spare.
            last = number >= self._study.settings.evaluations
            if last or job.ending not in ("", "interrupted"):
                continue
            # Asked of an interrupted trial too: a pruner that is not asked about an evaluation
            # would compare the next one, when the trial goes on, with this one of other trials.
            if job.trial.should_prune():
                if not job.ending:
                    process.terminate()
                job.ending = "pruned"

    def _finished(self, job: Job, status: int) -> None:
        """Says how a trial ended, by the exit status of its process."""
        if status == 0 and job.ending != "lost":
            if "latency" in self._metrics and not job.measuring:
                job.measuring = True
                arguments = ["profile", str(job.directory), "--total", "--json"]
                job.process = self._spawn(job, arguments, job.directory / PROFILE)
                return
            values = self._values(job)
            if all(map(math.isfinite, values)):
                self._end(job.trial, TrialState.COMPLETE, "", values)
            else:
                self._end(job.trial, TrialState.FAIL, f"{self._metrics} is {values}")
        elif job.ending == "pruned":
            self._end(job.trial, TrialState.PRUNED, "")
        elif job.ending == "interrupted":
            self._study.give_back(job.trial)
        elif job.ending == "lost":
            pass
        elif status == DIVERGED and len(self._metrics) == 1:
            # A failure would teach the sampler nothing, and it would come back to such places.
            self._end(job.trial, TrialState.PRUNED, f"diverged: {job.last_words()}")
        elif status in (2, 3, DIVERGED):
            self._end(job.trial, TrialState.FAIL, job.last_words())
        else:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            self._study.died(self._study.frozen(job.trial), f"{how}: {job.last_words()}")
        self._leave(job)

    def _leave(self, job: Job) -> None:
        job.lock.release()
        self._jobs.remove(job)
        self._free.append(job.slot)

    def _values(self, job: Job) -> list[float]:
        """A finished trial's objectives."""
        known: dict[str, float] = {}
        if set(self._metrics) & {"params", "macs"}:
            names = tuple(json.loads((job.directory / "labels.json").read_text()))
            network = build.network(build.from_json(job.directory / build.CONFIG), names)
            total = zoo.summary(network.model, size=network.input_spec.size)[-1]
            known |= {"params": total.params, "macs": total.macs}
        if "latency" in self._metrics:
            measured = json.loads((job.directory / PROFILE).read_text())
            known["latency"] = measured["total"]["seconds"]
        return [
            float(known[name]) if name in known else (job.evaluations(name) or [math.nan])[-1]
            for name in self._metrics
        ]

    def _end(
        self,
        trial: optuna.Trial,
        state: TrialState,
        why: str,
        values: Sequence[float] | None = None,
    ) -> None:
        with contextlib.suppress(UpdateFinishedTrialError):
            trial.set_user_attr("end", why)
        self._study.finish(trial, state, values)

    def _interrupt(self, *, kill: bool) -> None:
        for job in self._jobs:
            if kill and job.process is not None:
                job.process.kill()
            elif not job.ending:
                job.ending = "interrupted"
                if job.process is not None:
                    job.process.terminate()

    def _spawn(
        self, job: Job, arguments: Sequence[str], output: pathlib.Path
    ) -> "subprocess.Popen[bytes]":
        """Starts launch.py in a trial's slot, in a session of its own: Ctrl-C is the worker's."""
        linux = sys.platform == "linux"
        bind = [sys.executable, "-c", DIE_WITH_PARENT] if linux else [sys.executable]
        mode = "wb" if job.measuring else "ab"
        cores = job.slot.cores[:1] if job.measuring else job.slot.cores
        with output.open(mode) as file, bound_to(cores):
            return subprocess.Popen(
                [*bind, str(self._launcher), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.DEVNULL if job.measuring else subprocess.STDOUT,
                env=job.slot.environment,
                pass_fds=[job.lock.file],
                start_new_session=True,
            )


@contextlib.contextmanager
def bound_to(cores: tuple[int, ...]) -> Iterator[None]:
    """What is started inside inherits these cores; jax and our loader count what they may use."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class _Signals:
    """Counts the requests to stop."""

    def __init__(self) -> None:
        self.count, self.name = 0, ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.name = signal.Signals(number).name

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
