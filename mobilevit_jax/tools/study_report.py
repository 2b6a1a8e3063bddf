"""What a person sees of a study: the trials as they go, a table, pictures, the best as a config."""

import collections
import csv
import datetime
import io
import math
import pathlib
import pprint
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mobilevit_jax import report
from mobilevit_jax.tools import studies
from mobilevit_jax.writers import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STATES = {
    TrialState.WAITING: "waits",
    TrialState.RUNNING: "runs",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
TABLE = "study.csv"
BEST = "best.py"


class Screen:
    """Shows a study while it goes on: a live table on a terminal, else a line for each event.

    Args:
        study: whose.
        console: where to.
        table: file that is to have every trial as a row, and is kept up to date; None for none.
    """

    def __init__(
        self, study: studies.Study, console: Console, table: pathlib.Path | None = None
    ) -> None:
        self._study, self._console, self._table = study, console, table
        self._known: dict[int, tuple[TrialState, int]] = {}
        self._trials: list[FrozenTrial] = []
        plain = not console.is_terminal or console.is_dumb_terminal
        self._live = None if plain else Live(get_renderable=self._draw, console=console)

    def __enter__(self) -> "Screen":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, trials: Sequence[FrozenTrial]) -> None:
        """Takes notice of the trials as they are."""
        self._trials = list(trials)
        news = []
        for trial in trials:
            now = trial.state, len(trial.intermediate_values)
            if now != self._known.get(trial.number, (TrialState.WAITING, 0)):
                news.append(trial)
            self._known[trial.number] = now
        if self._live is None:
            for trial in news:
                self._console.print(Text(self._line(trial)), soft_wrap=True)
        if self._table is not None and (news or not self._table.exists()):
            write_table(self._table, self._study, trials)

    def _line(self, trial: FrozenTrial) -> str:
        settings, state = self._study.settings, STATES[trial.state]
        parts = [f"trial {trial.number} {state}"]
        if trial.values is not None:
            parts.append(_values(trial.values, settings.objectives))
        elif trial.intermediate_values:
            step = max(trial.intermediate_values)
            value = _values([trial.intermediate_values[step]], settings.objectives)
            parts.append(f"evaluation {step} of {settings.evaluations}: {value}")
        else:
            parts += [f"{name} {_number(value)}" for name, value in trial.params.items()]
        parts += [str(trial.user_attrs["end"])] if trial.user_attrs.get("end") else []
        if trial.state.is_finished():
            parts.append(self._progress())
        return "  ".join(parts)

    def _progress(self) -> str:
        done = sum(trial.state.is_finished() for trial in self._trials)
        parts = [f"{done} of {len(self._trials)} done"]
        best = front(self._study, self._trials)
        if best and len(self._study.settings.objectives) == 1:
            value = _values(best[0].values or (), self._study.settings.objectives)
            parts.append(f"best {value} (trial {best[0].number})")
        elif best:
            parts.append(f"{len(best)} on the Pareto front")
        left = remaining(self._trials)
        return ", ".join([*parts, f"ETA {left}"] if left else parts)

    def _draw(self) -> Table:
        table = Table(title=f"study {self._study.name}", caption=self._progress())
        table.add_column("trial", justify="right")
        table.add_column("state")
        table.add_column(" ".join(self._study.settings.objectives))
        table.add_column("evaluations")
        table.add_column("parameters")
        table.add_column("time", justify="right")
        best = {trial.number for trial in front(self._study, self._trials)}
        begun = [trial for trial in self._trials if trial.state is not TrialState.WAITING]
        # What goes on and what is best stay in sight, however many trials there are.
        room = max(self._console.height - 8, 5)
        urgent = [t for t in begun if t.state is TrialState.RUNNING or t.number in best]
        others = [t for t in begun if t not in urgent][-max(room - len(urgent), 0) :]
        for trial in sorted([*urgent, *others], key=lambda trial: trial.number)[-room:]:
            table.add_row(
                f"{trial.number}{' *' if trial.number in best else ''}",
                STATES[trial.state],
                Text(_values(trial.values or (), self._study.settings.objectives)),
                " ".join(_number(trial.intermediate_values[s]) for s in _last(trial)),
                Text(" ".join(f"{name}={_number(v)}" for name, v in trial.params.items())),
                _duration(trial),
            )
        return table


def _last(trial: FrozenTrial) -> list[int]:
    return sorted(trial.intermediate_values)[-4:]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _values(values: Sequence[float], objectives: Sequence[str]) -> str:
    names = [name.removeprefix("-") for name in objectives]
    return "  ".join(f"{name} {_number(value)}" for name, value in zip(names, values, strict=False))


def summary(study: studies.Study, trial: FrozenTrial) -> str:
    """A line on one of the best trials."""
    params = "  ".join(f"{name} {_number(value)}" for name, value in trial.params.items())
    values = _values(trial.values or (), study.settings.objectives)
    return f"best trial {trial.number}: {values}  {params}"


def seconds(trial: FrozenTrial) -> float | None:
    """How long a trial has been worked on since it was last begun."""
    if trial.datetime_start is None:
        return None
    end = trial.datetime_complete or datetime.datetime.now()
    return max((end - trial.datetime_start).total_seconds(), 0.0)


def _duration(trial: FrozenTrial) -> str:
    spent = seconds(trial)
    return "" if spent is None else str(datetime.timedelta(seconds=round(spent)))


def remaining(trials: Sequence[FrozenTrial]) -> str:
    """When all will be done, if the rest take as long as those before; "" where none is done."""
    spent = [
        seconds(trial) or 0.0
        for trial in trials
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    ]
    states = collections.Counter(trial.state for trial in trials)
    left = states[TrialState.WAITING] + states[TrialState.RUNNING]
    if not spent or not left:
        return ""
    at_a_time = max(states[TrialState.RUNNING], 1)
    return str(datetime.timedelta(seconds=round(sum(spent) / len(spent) * left / at_a_time)))


def front(study: studies.Study, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The best trial, or with several objectives the Pareto front; by the first objective.

    A trial is on the front where none is as good in all objectives and better in one.
    """
    signs = [-1 if name.startswith("-") else 1 for name in study.settings.objectives]
    done = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    scores = {
        trial.number: tuple(
            sign * value for sign, value in zip(signs, trial.values or (), strict=True)
        )
        for trial in done
    }
    best = [
        trial
        for trial in done
        if not any(_beats(other, scores[trial.number]) for other in scores.values())
    ]
    best.sort(key=lambda trial: (*(-score for score in scores[trial.number]), trial.number))
    return best if len(signs) > 1 else best[:1]


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


# --- files ----------------------------------------------------------------------------------------


def write_table(path: pathlib.Path, study: studies.Study, trials: Sequence[FrozenTrial]) -> None:
    """Writes a CSV row for each trial.

    Columns: trial, state, best (1 on the Pareto front), a column an objective, evaluations (how
    many there were), seconds, end (why it failed), retry_of, worker, directory, and the parameters.
    """
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    best = {trial.number for trial in front(study, trials)}
    objectives = [name.removeprefix("-") for name in study.settings.objectives]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    about = ("evaluations", "seconds", "end", "retry_of", "worker", "directory")
    table.writerow(["trial", "state", "best", *objectives, *about, *names])
    for trial in trials:
        spent = seconds(trial)
        values = trial.values or [""] * len(objectives)
        table.writerow(
            [
                trial.number,
                STATES[trial.state],
                int(trial.number in best),
                *values,
                len(trial.intermediate_values),
                "" if spent is None else round(spent, 1),
                trial.user_attrs.get("end", ""),
                (studies.retried(trial) or [""])[-1],
                trial.user_attrs.get("worker", ""),
                trial.user_attrs.get("directory", ""),
                *(trial.params.get(name, "") for name in names),
            ]
        )
    replace_file(path, text.getvalue().encode())


def recipe(config: Mapping[str, Any], about: str) -> str:
    """A config as the text of a recipe.

    Args:
        config: plain values.
        about: its docstring.
    """
    values = pprint.pformat(config, width=96, sort_dicts=False)
    return (
        f'"""{about}"""\n\nfrom ml_collections import ConfigDict\n\nVALUES = {values}\n\n\n'
        "def get_config() -> ConfigDict:\n    return ConfigDict(VALUES).lock()\n"
    )


def write_best(
    path: pathlib.Path,
    trial: FrozenTrial,
    config: Mapping[str, Any],
    study: studies.Study,
) -> None:
    """Writes the config of a trial as a recipe, ready to be trained."""
    lines = [
        f"Trial {trial.number} of study {study.name}: "
        f"{_values(trial.values or (), study.settings.objectives)}.",
        "",
        f"    python launch.py train --config={path} --workdir=runs/best",
        "",
        *(f"{name} = {value}" for name, value in trial.params.items()),
        "",
    ]
    replace_file(path, recipe(config, "\n".join(lines)).encode())


# --- pictures -------------------------------------------------------------------------------------


def draw(workdir: pathlib.Path, study: studies.Study, trials: Sequence[FrozenTrial]) -> list[str]:
    """Draws what the trials show; returns the names of the files.

    history.png (objectives by trial), evaluations.png (of each trial), slices.png (objectives by
    parameter), importance.png (PED-ANOVA, arXiv 2304.10255) and, with several objectives,
    pareto.png. What needs more trials than there are is left out.
    """
    drawn = {"history.png": _history(workdir / "history.png", study, trials)}
    drawn["evaluations.png"] = _evaluations(workdir / "evaluations.png", study, trials)
    drawn["slices.png"] = _slices(workdir / "slices.png", study, trials)
    drawn["importance.png"] = _importance(workdir / "importance.png", study, trials)
    drawn["pareto.png"] = _pareto(workdir / "pareto.png", study, trials)
    return [name for name, there in drawn.items() if there]


def _points(
    trials: Sequence[FrozenTrial], state: TrialState, objective: int
) -> Iterator[tuple[FrozenTrial, float]]:
    for trial in trials:
        if trial.state is state and trial.values and math.isfinite(trial.values[objective]):
            yield trial, trial.values[objective]


def _style(axes: "Axes", xlabel: str, ylabel: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _history(path: pathlib.Path, study: studies.Study, trials: Sequence[FrozenTrial]) -> bool:
    from matplotlib.ticker import MaxNLocator

    objectives = study.settings.objectives
    figure = report.blank_figure(900, 80 + 340 * len(objectives))
    for i, objective in enumerate(objectives):
        axes = figure.add_subplot(len(objectives), 1, i + 1)
        done = list(_points(trials, TrialState.COMPLETE, i))
        pruned = list(_points(trials, TrialState.PRUNED, i))
        if pruned:
            at, values = [t.number for t, _ in pruned], [value for _, value in pruned]
            axes.plot(at, values, "x", color="0.6", label="pruned, last evaluation")
        at, values = [t.number for t, _ in done], [value for _, value in done]
        axes.plot(at, values, "o", color="C0", ms=5, label="complete")
        better = min if objective.startswith("-") else max
        best = [better(values[: n + 1]) for n in range(len(values))]
        axes.plot(at, best, color="C1", drawstyle="steps-post", label="best so far")
        axes.legend()
        axes.set_xlim(-0.5, max(len(trials), 2) - 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
        _style(axes, "trial", objective.removeprefix("-"))
    figure.suptitle(f"study {study.name}: {len(trials)} trials")
    report.save_figure(path, figure)
    return True


def _evaluations(path: pathlib.Path, study: studies.Study, trials: Sequence[FrozenTrial]) -> bool:
    from matplotlib.ticker import MaxNLocator

    curves = [trial for trial in trials if trial.intermediate_values]
    if not curves:
        return False
    best = {trial.number for trial in front(study, trials)}
    figure = report.blank_figure(900, 480)
    axes = figure.add_subplot()
    labels: set[str] = set()
    for trial in sorted(curves, key=lambda trial: trial.number in best):  # the best one on top
        state = "best" if trial.number in best else STATES[trial.state]
        color, width = {"best": ("C1", 2.5), "complete": ("C0", 1.2)}.get(state, ("0.6", 1.0))
        steps, values = zip(*sorted(trial.intermediate_values.items()), strict=True)
        label = None if state in labels else state
        labels.add(state)
        axes.plot(steps, values, color=color, lw=width, marker="o", ms=3, label=label)
    axes.legend()
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    _style(axes, "evaluation", study.settings.objectives[0].removeprefix("-"))
    figure.suptitle(f"study {study.name}: evaluations of each trial")
    report.save_figure(path, figure)
    return True


def _slices(path: pathlib.Path, study: studies.Study, trials: Sequence[FrozenTrial]) -> bool:
    distributions = {name: each for trial in trials for name, each in trial.distributions.items()}
    objectives = study.settings.objectives
    columns = len(distributions)
    figure = report.blank_figure(120 + 320 * columns, 60 + 300 * len(objectives))
    last = max(len(trials) - 1, 1)
    for row, objective in enumerate(objectives):
        for column, (name, distribution) in enumerate(distributions.items()):
            axes = figure.add_subplot(len(objectives), columns, row * columns + column + 1)
            choices: list[Any] = []
            if isinstance(distribution, CategoricalDistribution):
                choices = list(distribution.choices)
                axes.set_xticks(range(len(choices)), [str(choice) for choice in choices])
            elif getattr(distribution, "log", False):
                axes.set_xscale("log")
                # Within a decade matplotlib labels the ticks between as well, which then overlap.
                axes.tick_params(axis="x", which="both", labelrotation=45, labelsize=7)
            for state, marker in ((TrialState.PRUNED, "x"), (TrialState.COMPLETE, "o")):
                points = [
                    (trial.params[name], value, trial.number)
                    for trial, value in _points(trials, state, row)
                    if name in trial.params
                ]
                if points:
                    at, values, numbers = zip(*points, strict=True)
                    at = [choices.index(value) for value in at] if choices else at
                    axes.scatter(
                        at,
                        values,
                        c=numbers,
                        cmap="Blues",
                        vmin=-0.4 * last,
                        vmax=last,
                        marker=marker,
                        s=30,
                        label=STATES[state],
                    )
            if choices:
                axes.set_xlim(-0.5, len(choices) - 0.5)
            _style(axes, name, "" if column else objective.removeprefix("-"))
    figure.suptitle("later trials are darker; crosses were pruned")
    report.save_figure(path, figure)
    return True


def _importance(path: pathlib.Path, study: studies.Study, trials: Sequence[FrozenTrial]) -> bool:
    objectives = study.settings.objectives
    done = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    names = {name for trial in done for name in trial.params}
    if len(done) < 4 or len(names) < 2:
        return False
    shares = []
    for i, objective in enumerate(objectives):
        sign = 1 if objective.startswith("-") else -1

        def target(trial: FrozenTrial, i: int = i, sign: int = sign) -> float:
            return sign * (trial.values or ())[i]  # PED-ANOVA takes less for better

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this is what it does
            shares.append(optuna.importance.get_param_importances(study.optuna, target=target))
    if not all(shares):
        return False
    figure = report.blank_figure(800, 100 + 40 * len(names) * len(objectives))
    axes = figure.add_subplot()
    order = list(shares[0])[::-1]
    height = 0.8 / len(objectives)
    for i, objective in enumerate(objectives):
        at = [place - i * height for place in range(len(order))]
        bars = axes.barh(at, [shares[i].get(name, 0.0) for name in order], height)
        axes.bar_label(bars, fmt="%.2f", padding=3)
        bars.set_label(objective.removeprefix("-"))
    axes.set_yticks([place - 0.4 + height / 2 for place in range(len(order))], order)
    if len(objectives) > 1:
        axes.legend()
    axes.set_xlim(0, 1.05)
    _style(axes, "importance for being among the best (PED-ANOVA)", "")
    figure.suptitle(f"study {study.name}: what mattered among {len(done)} complete trials")
    report.save_figure(path, figure)
    return True


def _pareto(path: pathlib.Path, study: studies.Study, trials: Sequence[FrozenTrial]) -> bool:
    objectives = [name.removeprefix("-") for name in study.settings.objectives]
    if len(objectives) == 1:
        return False
    best = {trial.number for trial in front(study, trials)}
    figure = report.blank_figure(80 + 520 * (len(objectives) - 1), 460)
    for other in range(1, len(objectives)):
        axes = figure.add_subplot(1, len(objectives) - 1, other)
        points = [
            (trial.number, x, y)
            for (trial, x), (_, y) in zip(
                _points(trials, TrialState.COMPLETE, other),
                _points(trials, TrialState.COMPLETE, 0),
                strict=True,
            )
        ]
        rest = [(x, y) for number, x, y in points if number not in best]
        if rest:
            axes.plot(*zip(*rest, strict=True), "o", color="0.6", ms=4, label="others")
        top = sorted((x, y, number) for number, x, y in points if number in best)
        x, y, numbers = zip(*top, strict=True)
        line = "o-" if len(objectives) == 2 else "o"  # of more, this is a projection
        axes.plot(x, y, line, color="C1", label="Pareto front")
        for place in zip(x, y, numbers, strict=True):
            axes.annotate(str(place[2]), place[:2], xytext=(4, 4), textcoords="offset points")
        axes.legend()
        _style(axes, objectives[other], objectives[0])
    figure.suptitle(f"study {study.name}: numbers are trials")
    report.save_figure(path, figure)
    return True
