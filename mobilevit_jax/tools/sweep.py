"""Searches hyper-parameters: checks a space, makes its study, and lays out the trials.

Whoever then works on them (tools/worker.py) needs the study alone: its settings hold the config and
the space, and the storage says which trials are left (tools/studies.py).
"""

import contextlib
import hashlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FixedTrial
from rich.console import Console
from rich.text import Text

from mobilevit_jax import build, evaluate, workdirs
from mobilevit_jax.tools import pretrained, space, studies, study_report, worker

TRIALS = 20


def start(
    config: build.Config,
    workdir: pathlib.Path,
    *,
    draw: space.Space,
    texts: Mapping[str, str],
    recipe: pathlib.Path | None,
    trials: int | None,
    objectives: Sequence[str],
    sampler: str,
    pruner: str | None,
    seed: int,
    heartbeat: float,
    storage: str | None,
    name: str | None,
    override: worker.Override,
) -> studies.Study:
    """Makes the study of a sweep, or opens it to go on, and lays out the trials that are missing.

    Args:
        config: what the trials change.
        workdir: of the sweep.
        draw: the space.
        texts: what `draw` was parsed from; empty where it is the recipe's.
        recipe: file that `draw` is from; None where it is not.
        trials: how many there are to be; None for TRIALS, or all of a grid.
        objectives: metrics or costs to make as large as possible, with a leading minus as small.
        sampler: key of studies.SAMPLERS.
        pruner: key of studies.PRUNERS; None for asha, or none where there are several objectives.
        seed: of the sampler.
        heartbeat: seconds between two signs of life of a trial.
        storage: URL; None for a journal in the workdir.
        name: of the study; None for that of the workdir.
        override: applies --config.key=value to a config, in place.

    Raises:
        ConfigError: something does not fit; nothing was made.
        DataError: the images are not there or not as they should be.
        StorageError: the storage cannot be reached, or the study was made for another sweep.
    """
    if len(objectives) > 1 and pruner not in (None, "none"):
        raise build.ConfigError(
            f"--pruner={pruner} compares one number; with several objectives there is only "
            "--pruner=none"
        )
    drawn = space.corners(draw)
    points = space.grid(drawn) if sampler == "grid" else []
    trials = trials or len(points) or TRIALS
    if points and trials > len(points):
        raise build.ConfigError(f"--trials={trials}: the grid has {len(points)} points")
    steps, evaluations = check(config, drawn, objectives, override)
    settings = studies.Settings(
        config=build.plain(config),
        space=dict(texts),
        recipe=str(recipe or ""),
        recipe_sha256=digest(recipe) if recipe else "",
        objectives=tuple(objectives),
        sampler=sampler,
        pruner=pruner or ("asha" if len(objectives) == 1 else "none"),
        seed=seed,
        trials=trials,
        steps=steps,
        evaluations=evaluations,
        heartbeat=heartbeat,
        workdir=str(workdir.absolute()),
    )
    storage = storage or studies.journal_url(workdir)
    opened = studies.connect(storage, create=True)
    workdirs.make(workdir)
    try:
        study = studies.create(storage, name or workdir.absolute().name, opened, settings)
    except studies.StorageError:
        with contextlib.suppress(OSError):  # it holds another sweep
            workdir.rmdir()
        raise
    with studies.talking(storage):
        study.plan(points, trials)
    return study


def invitation(study: studies.Study) -> str:
    """How many trials there are, and how to work on them from elsewhere."""
    where = f"--storage={studies.shown(study.url)} --study={study.name}"
    return f"{len(study.trials())} trials; to help: launch.py sweep --worker {where}"


def run(
    study: studies.Study,
    workdir: pathlib.Path,
    *,
    draw: space.Space,
    slots: Sequence[worker.Slot],
    launcher: pathlib.Path,
    override: worker.Override,
    ray: bool,
    results: bool,
) -> None:
    """Works on a study until it is finished, and shows it.

    Args:
        study: to work on.
        workdir: of the sweep, or of this worker.
        draw: the space.
        slots: where trials run.
        launcher: path of launch.py.
        override: applies --config.key=value to a config, in place.
        ray: leave the work to as many tasks of a Ray cluster as there are slots.
        results: keep study.csv, and draw and write what came out.

    Raises:
        Stopped: a signal came.
        StorageError: the storage cannot be reached.
        ConfigError: no trial came to its end.
    """
    console = Console()
    others = Ray(study, slots, launcher=launcher) if ray else None
    mine = worker.Worker(
        study,
        workdir,
        draw=draw,
        slots=[] if others else slots,
        launcher=launcher,
        override=override,
    )
    table = workdir / study_report.TABLE if results else None
    if results:
        console.print(Text(invitation(study)), soft_wrap=True)
    try:
        with study_report.Screen(study, console, table) as screen:
            mine.run(screen, others.working if others else lambda: False)
    finally:
        if others:
            others.stop()
    if results:
        _results(study, workdir, draw, override, console)


def _results(
    study: studies.Study,
    workdir: pathlib.Path,
    draw: space.Space,
    override: worker.Override,
    console: Console,
) -> None:
    trials = study.trials()
    best = study_report.front(study, trials)
    study_report.write_table(workdir / study_report.TABLE, study, trials)
    if not best:
        failed = [trial for trial in trials if trial.user_attrs.get("end")]
        why = f": trial {failed[0].number}: {failed[0].user_attrs['end']}" if failed else ""
        raise build.ConfigError(
            f"none of the {len(trials)} trials came to its end{why}; see "
            f"{workdir / study_report.TABLE} and {worker.OUTPUT} in the trials' directories"
        )
    arguments = space.arguments(space.draw(draw, FixedTrial(best[0].params)))
    config = override(build.restore(study.settings.config), arguments)
    study_report.write_best(workdir / study_report.BEST, best[0], build.plain(config), study)
    pictures = study_report.draw(workdir, study, trials)
    for trial in best:
        console.print(Text(study_report.summary(study, trial)), soft_wrap=True)
    console.print(
        Text(
            f"{workdir}: {study_report.TABLE}, {', '.join(pictures)}; train the best with\n"
            f"  python launch.py train --config={workdir / study_report.BEST} --workdir=runs/best"
        ),
        soft_wrap=True,
    )


def digest(recipe: pathlib.Path) -> str:
    """Of a recipe's text; whoever draws from its space must have the same one."""
    return hashlib.sha256(recipe.read_bytes()).hexdigest()


def check(
    config: build.Config,
    drawn: Sequence[space.Corner],
    objectives: Sequence[str],
    override: worker.Override,
) -> tuple[int, int]:
    """Builds the runs at the corners of the space, so that a mistake is told before any is begun.

    Args:
        config: what the trials change.
        drawn: what `space.corners` gives.
        objectives: see `studies.Settings`.
        override: applies --config.key=value to a config, in place.

    Returns:
        Steps and evaluations of a run at the lowest corner.

    Raises:
        ConfigError: an override does not fit the config, a run cannot be built, or an objective is
            none of its metrics.
        DataError: the images are not there or not as they should be.
    """
    lengths = []
    for overrides, _ in drawn:
        arguments = space.arguments(overrides)
        changed = override(build.restore(build.plain(config)), arguments)
        # The devices are the trials', and how many they have is not known here.
        changed = override(changed, ["--config.mesh.fsdp=1"])
        try:
            run = build.experiment(build.resolve(changed, pretrained.describe, workdir=None))
        except build.ConfigError as error:
            raise build.ConfigError(f"with {' '.join(arguments)}: {error}") from error
        every = run.eval_every or run.total_steps
        lengths.append((run.total_steps, -(-run.total_steps // every)))
        metrics = evaluate.metric_names(run.network)
        for objective in objectives:
            name = objective.removeprefix("-")
            if name not in (*metrics, *worker.COSTS):
                raise build.ConfigError(
                    f"--objective={objective}: no evaluation logs {name!r}; there are "
                    f"{', '.join(metrics)}, and {', '.join(worker.COSTS)}"
                )
            if name.endswith(("loss", *worker.COSTS)) and objective == name:
                raise build.ConfigError(
                    f"--objective={name} would be made as large as possible; write "
                    f"--objective=-{name}"
                )
    return lengths[0]


def check_ray() -> None:
    """Says so if Ray is not installed.

    Raises:
        ConfigError: it is not.
    """
    try:
        import ray  # noqa: F401  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise build.ConfigError(
            "--executor=ray needs Ray: pip install 'mobilevit_jax[ray]'"
        ) from error


class Ray:
    """Workers of a study as tasks of a Ray cluster, which places and watches them.

    Args:
        study: whose storage all machines of the cluster can reach.
        slots: of this machine, as many as there are to be tasks. Each is to find as many cores
            free as the first has; on a cluster of this machine alone it is bound to its own, which
            Ray does not do. Where the cluster has GPUs it gets one of them.
        launcher: path of launch.py, the same on all machines.

    Raises:
        ConfigError: the cluster cannot be reached.
    """

    def __init__(
        self, study: studies.Study, slots: Sequence[worker.Slot], *, launcher: pathlib.Path
    ) -> None:
        import ray  # pyrefly: ignore[missing-import]

        self._ray = ray
        if not ray.is_initialized():
            try:
                # RAY_ADDRESS says which cluster; without it, one of this machine alone.
                ray.init(log_to_driver=False, logging_level="error")
            except (ConnectionError, ValueError) as error:
                raise build.ConfigError(f"--executor=ray: {error}") from error
        gpus = int(ray.cluster_resources().get("GPU", 0) > 0)
        cpus = max(len(slots[0].cores), 1)
        task = ray.remote(num_gpus=gpus, num_cpus=cpus, max_retries=0)(_work)
        alone = len(ray.nodes()) == 1
        where = (study.url, study.name, str(launcher), str(pathlib.Path.cwd()))
        self._tasks = [task.remote(*where, slot.cores if alone else ()) for slot in slots]

    def working(self) -> bool:
        """Whether any of the tasks is still there."""
        _, left = self._ray.wait(self._tasks, num_returns=len(self._tasks), timeout=0)
        return bool(left)

    def stop(self) -> None:
        """Interrupts the tasks, whose trials save, and waits for them."""
        for task in self._tasks:
            self._ray.cancel(task, force=False)
        self._ray.wait(self._tasks, num_returns=len(self._tasks))


def _work(url: str, name: str, launcher: str, directory: str, cores: tuple[int, ...]) -> int:
    """A worker process on a machine of the cluster; its exit status."""
    command = [sys.executable, launcher, "sweep", "--worker", f"--study={name}", "--workers=1"]
    environment: dict[str, Any] = {**os.environ, "OPTUNA_STORAGE": url}
    with worker.bound_to(cores):
        process = subprocess.Popen(command, env=environment, cwd=directory)
    try:
        return process.wait()
    finally:  # ray.cancel raises KeyboardInterrupt here
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        process.wait()
