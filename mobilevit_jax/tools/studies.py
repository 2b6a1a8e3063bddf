"""The study of a sweep: Optuna's storage, samplers and pruners, and who works on which trial.

All trials of a sweep are in the storage from the start, waiting. A worker takes one (the storage
lets only one have it), gives it back when it is interrupted, and finishes it otherwise. While it
works it holds a lock in the trial's directory and gives signs of life. A trial whose worker died is
failed (again the storage lets only one do so) and waits once more under a new number, with the same
parameters and in the same directory, so that it goes on from its checkpoints. Optuna's own
heartbeat is not used: the journal has none, and it works in `Study.optimize` only.
"""

import contextlib
import fcntl
import functools
import math
import os
import pathlib
import platform
import re
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import optuna
import sqlalchemy
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mobilevit_jax import build, tree

optuna.logging.set_verbosity(optuna.logging.ERROR)

JOURNAL = "study.journal"  # in a workdir
SETTINGS = "sweep"  # attribute of a study
DRIVERS = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}
RETRIES = 1  # of a trial whose worker died


class StorageError(build.ConfigError):
    """The storage cannot be reached, or does not hold what it should; tells no password."""


# --- samplers and pruners -------------------------------------------------------------------------


def _nsga2(seed: int, trials: int) -> optuna.samplers.BaseSampler:
    # As many generations as members; Optuna's 50 would make most sweeps one random generation.
    population = min(50, max(2, round(math.sqrt(trials))))
    return optuna.samplers.NSGAIISampler(population_size=population, seed=seed)


# Called with a seed and the number of trials. A grid's trials are laid out before they are taken.
SAMPLERS: dict[str, Callable[[int, int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed, trials: optuna.samplers.TPESampler(seed=seed),
    "random": lambda seed, trials: optuna.samplers.RandomSampler(seed=seed),
    "grid": lambda seed, trials: optuna.samplers.RandomSampler(seed=seed),
    "cmaes": lambda seed, trials: optuna.samplers.CmaEsSampler(
        seed=seed, warn_independent_sampling=False
    ),
    "nsga2": _nsga2,
}

# Called with the number of evaluations of a whole run; their unit of time is the evaluation.
PRUNERS: dict[str, Callable[[int], optuna.pruners.BasePruner]] = {
    "asha": lambda evaluations: optuna.pruners.SuccessiveHalvingPruner(
        min_resource=1, reduction_factor=3
    ),
    "hyperband": lambda evaluations: optuna.pruners.HyperbandPruner(
        min_resource=1, max_resource=max(1, evaluations), reduction_factor=3
    ),
    "median": lambda evaluations: optuna.pruners.MedianPruner(n_startup_trials=5),
    "none": lambda evaluations: optuna.pruners.NopPruner(),
}


class Settings(NamedTuple):
    """What a sweep is; kept with the study, and the same for all that work on it.

    Attributes:
        config: the config that trials change, as plain values.
        space: texts of --space by key; empty where the recipe's `sweep` is the space.
        recipe: file of that recipe, or "".
        recipe_sha256: of its text.
        objectives: what to optimise; a leading minus is for less is better.
        sampler: key of SAMPLERS.
        pruner: key of PRUNERS.
        seed: of the samplers.
        trials: how many, for samplers that have to know.
        steps: of a trial's training, as the lowest corner of the space has it.
        evaluations: of a trial, likewise.
        heartbeat: seconds between signs of life; a trial without one for twice as long is dead.
        workdir: where the controller keeps the sweep.
    """

    config: dict[str, Any]
    space: dict[str, str]
    recipe: str
    recipe_sha256: str
    objectives: tuple[str, ...]
    sampler: str
    pruner: str
    seed: int
    trials: int
    steps: int
    evaluations: int
    heartbeat: float
    workdir: str


# What may differ when a sweep goes on.
FREE = ("trials", "steps", "evaluations", "heartbeat", "workdir")


# --- storage --------------------------------------------------------------------------------------


def journal_url(workdir: pathlib.Path) -> str:
    """The storage that a sweep has by itself."""
    return f"journal://{(workdir / JOURNAL).absolute()}"


def shown(url: str) -> str:
    """A storage's URL without its password."""
    if url.startswith("journal://"):
        return url
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return re.sub(r"//.*@", "//***@", url) if "@" in url else "the storage"


def _gist(error: BaseException, url: str) -> str:
    """The first line of the innermost error, without what is secret in the URL."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    secret = re.search(r"//[^:/@]*:(.*)@", url)
    return text.replace(secret[1], "***") if secret and secret[1] else text


@contextlib.contextmanager
def talking(url: str, *others: type[Exception]) -> Iterator[None]:
    """Turns what Optuna and its drivers raise, and others, into a StorageError without password."""
    try:
        yield
    except (OptunaError, sqlalchemy.exc.SQLAlchemyError, *others) as error:
        driver = (
            ""
            if not isinstance(error, ImportError)
            else ("; its driver is missing: pip install 'mobilevit_jax[sweep-storage]'")
        )
        # "from None": a traceback would show the URL.
        raise StorageError(f"{shown(url)}: {_gist(error, url)}{driver}") from None


def connect(url: str, *, create: bool) -> BaseStorage:
    """Opens journal:///FILE, postgresql://… or mysql://….

    Args:
        url: of the storage.
        create: make the file or the tables where they are missing; only one process may do so.

    Raises:
        StorageError: another URL, nothing there, or no way to reach it.
    """
    kind = url.partition(":")[0]
    if kind == "journal":
        path = pathlib.Path(url.removeprefix("journal://"))
        if not create and not path.is_file():
            raise StorageError(f"--storage={url}: there is no such file")
        with talking(url, OSError, ImportError):
            if create:
                path.parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(str(path)))
    if kind not in DRIVERS:
        hint = "; SQLite breaks when several processes write" if kind.startswith("sqlite") else ""
        raise StorageError(
            f"--storage={shown(url)}: write journal:///FILE, postgresql://USER@HOST/DATABASE or "
            f"mysql://USER@HOST/DATABASE{hint}"
        )
    try:
        parsed = sqlalchemy.make_url(url).set(drivername=DRIVERS[kind])
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise StorageError(
            f"--storage={shown(url)} is no URL: write {kind}://USER:PASSWORD@HOST:PORT/DATABASE, "
            "with special characters of the password as %XX"
        ) from None
    with talking(url, OSError, ImportError):
        return RDBStorage(
            parsed.render_as_string(hide_password=False),
            # Workers ask now and then; a connection kept by each of hundreds would be the server's
            # last, and one kept for hours would break.
            engine_kwargs={
                "poolclass": sqlalchemy.pool.NullPool,
                "connect_args": {"connect_timeout": 10},
            },
            skip_table_creation=not create,
        )


class Study:
    """A study and this process's part in it.

    Args:
        url: of the storage.
        name: of the study.
        storage: opened.
    """

    def __init__(self, url: str, name: str, storage: BaseStorage) -> None:
        self.url, self.name, self._storage = url, name, storage
        with talking(url):
            self.optuna = optuna.load_study(study_name=name, storage=storage)
            values = self.optuna.user_attrs[SETTINGS]
        self.settings = Settings(**build.plain(values))
        self.optuna.pruner = PRUNERS[self.settings.pruner](self.settings.evaluations)
        # Of trials that others run: their last sign of life, and when it was seen here.
        self._seen: dict[int, tuple[str, float]] = {}

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number."""
        return self.optuna.get_trials(deepcopy=False)

    def frozen(self, trial: optuna.Trial) -> FrozenTrial:
        """What the storage knows of a trial."""
        return self._storage.get_trial(trial._trial_id)

    def take(self) -> optuna.Trial | None:
        """A trial that waits, now this process's own; None where there is none."""
        # Asked through the study, whose cache must know a trial before it can be drawn for.
        for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            try:
                if not self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                    continue
            except UpdateFinishedTrialError:
                continue
            # A generator of its own for each trial: the draw depends on seed, number and history,
            # not on how often the sweep was interrupted.
            seed = zlib.crc32(f"{self.settings.seed} {trial.number}".encode())
            self.optuna.sampler = SAMPLERS[self.settings.sampler](seed, self.settings.trials)
            return optuna.Trial(self.optuna, trial._trial_id)
        return None

    def give_back(self, trial: optuna.Trial) -> None:
        """Lets an unfinished trial of this process wait, for whoever goes on with it."""
        trial.set_user_attr("lock", "")
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def finish(
        self, trial: optuna.Trial, state: TrialState, values: Sequence[float] | None = None
    ) -> None:
        """Ends a trial of this process; nothing where another process has declared it dead."""
        with contextlib.suppress(ValueError, UpdateFinishedTrialError):
            self.optuna.tell(trial, values=values, state=state)

    def died(self, trial: FrozenTrial, reason: str) -> bool:
        """Fails a trial whose worker or process died, and lets it wait again if it may.

        Returns:
            Whether it was this call that did so.
        """
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(trial._trial_id, "end", f"died: {reason}")
            if self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL):
                self._retry(trial)
                return True
        return False

    def _retry(self, trial: FrozenTrial) -> None:
        earlier = [*retried(trial), trial.number]
        if len(earlier) > RETRIES:
            return
        # The names are Optuna's: its dashboard and RetryHeartbeatStaleTrialCallback know them.
        self.optuna.add_trial(
            optuna.create_trial(
                state=TrialState.WAITING,
                params=trial.params,
                distributions=trial.distributions,
                system_attrs={"failed_trial": earlier[0], "retry_history": earlier},
            )
        )

    def bury(self) -> list[int]:
        """Looks for trials of workers that are no more; returns the numbers of those found."""
        found = []
        for trial in self.trials():
            dead = trial.state is TrialState.RUNNING and not self._alive(trial)
            if dead and self.died(trial, "its worker gave no sign of life"):
                found.append(trial.number)
        return found

    def _alive(self, trial: FrozenTrial) -> bool:
        lock = trial.user_attrs.get("lock", "")
        if lock and Lock.free(lock):
            return False
        sign, now = f"{trial.datetime_start} {trial.user_attrs.get('alive')}", time.monotonic()
        # Compared with what was seen here, not with a time of day: clocks differ.
        last, since = self._seen.get(trial.number, ("", now))
        if sign != last:
            self._seen[trial.number] = sign, now
            return True
        return now - since < 2 * self.settings.heartbeat

    def plan(self, points: Sequence[Mapping[str, Any]], trials: int) -> None:
        """Adds the trials that are missing to `trials`, and retries of those that lack them.

        Args:
            points: parameters of a grid's trials, by number; empty to leave them to the sampler.
            trials: how many there are to be, retries not counted.
        """
        known = self.trials()
        repeated = {number for trial in known for number in retried(trial)}
        for trial in known:
            # Whoever failed it died before it could let it wait again.
            died = str(trial.user_attrs.get("end", "")).startswith("died")
            if trial.state is TrialState.FAIL and died and trial.number not in repeated:
                self._retry(trial)
        for number in range(sum(not retried(trial) for trial in known), trials):
            attrs = {"fixed_params": dict(points[number])} if points else {}
            self.optuna.add_trial(optuna.create_trial(state=TrialState.WAITING, system_attrs=attrs))


def create(url: str, name: str, storage: BaseStorage, settings: Settings) -> Study:
    """Makes a study, or opens the one of that name if it was made for the same.

    Raises:
        StorageError: it was made for another sweep, or not by this program.
    """
    directions = [
        StudyDirection.MINIMIZE if objective.startswith("-") else StudyDirection.MAXIMIZE
        for objective in settings.objectives
    ]
    with talking(url):
        # Asked first: of a study that is there, the journal would note that it is made once more.
        if name in optuna.get_all_study_names(storage):
            study = optuna.load_study(study_name=name, storage=storage)
        else:
            study = optuna.create_study(study_name=name, storage=storage, directions=directions)
        known = study.user_attrs.get(SETTINGS)
        if known is None and study.get_trials(deepcopy=False):
            raise StorageError(
                f"study {name!r} in {shown(url)} was not made by this command; give another name: "
                "--study=NAME"
            )
        if known is None:
            study.set_user_attr(SETTINGS, settings._asdict())
        else:
            _check_same(Settings(**build.plain(known)), settings, f"{name!r} in {shown(url)}")
    return Study(url, name, storage)


def _check_same(old: Settings, new: Settings, where: str) -> None:
    before, after = (tree.flatten_mapping(build.plain(dict(each._asdict()))) for each in (old, new))
    differing = [
        f"{key} was {before.get(key, 'not set')!r} and is {after.get(key, 'not set')!r}"
        for key in sorted(before.keys() | after.keys())
        if key.partition(".")[0] not in FREE and before.get(key) != after.get(key)
    ]
    if differing:
        raise StorageError(
            f"study {where} was made for another sweep: {'; '.join(differing)}; give the options "
            "of then, or another --workdir and --study"
        )


def join(url: str, name: str) -> Study:
    """Opens a study that another process made.

    Raises:
        StorageError: there is none of that name.
    """
    storage = connect(url, create=False)
    with talking(url):
        names = {each.study_name: each.user_attrs for each in storage.get_all_studies()}
    if SETTINGS not in names.get(name, {}):
        made = ", ".join(sorted(each for each in names if SETTINGS in names[each])) or "none"
        raise StorageError(
            f"there is no study {name!r} in {shown(url)}; there are: {made}. launch.py sweep "
            "without --worker makes one"
        )
    return Study(url, name, storage)


# --- what is known of a trial ---------------------------------------------------------------------


def retried(trial: FrozenTrial) -> list[int]:
    """Numbers of the trials that this one repeats, the first one first."""
    return list(trial.system_attrs.get("retry_history", []))


def directory(trial: FrozenTrial) -> str:
    """Name of a trial's directory; a retry goes on in that of the trial that died."""
    return f"trial_{[*retried(trial), trial.number][0]:04d}"


def over(trials: Sequence[FrozenTrial]) -> bool:
    """Whether there is nothing left to do."""
    return all(trial.state.is_finished() for trial in trials)


class Lock:
    """Held by a worker on its trial's directory, and by the processes that it starts there.

    The system releases it when the last of them is gone, whatever they died of.

    Args:
        path: of the file, which is made.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def acquire(self) -> bool:
        """Takes it if it is free."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Gives it up, as far as this process is concerned."""
        os.close(self.file)

    @property
    def name(self) -> str:
        """Says which file on which machine; for `free`."""
        return f"{_machine()} {os.fstat(self.file).st_ino} {self._path}"

    @staticmethod
    def free(name: str) -> bool:
        """Whether the lock of that name is certainly held by nobody: false on other machines."""
        machine, inode, path = name.split(" ", 2)
        if machine != _machine():
            return False
        try:
            file = os.open(path, os.O_RDWR)
        except OSError:
            return False
        try:
            if str(os.fstat(file).st_ino) != inode:
                return False
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(file)
        return True


@functools.cache
def _machine() -> str:
    """This machine since it was started."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    since = boot.read_text().strip() if boot.exists() else str(uuid.getnode())
    return f"{platform.node()}/{since}"
