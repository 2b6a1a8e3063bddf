"""What is shown of a study: lines, tables, pictures, the best."""

import csv
import datetime
import importlib.util
import io
import math

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console

from mobilevit_jax import report
from mobilevit_jax.tools import study_report
from tests.tools.test_studies import made


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn, by name of the file."""
    found, save = {}, report.save_figure
    monkeypatch.setattr(
        report,
        "save_figure",
        lambda path, figure: (found.update({path.name: figure}), save(path, figure)),
    )
    return found


def single(directory):
    """Six complete trials, of which number 4 is best, one pruned, one failed, one waiting."""
    study = made(directory, 9, evaluations=2)
    for number in range(8):
        trial = study.take()
        lr = trial.suggest_float("lr", 1e-4, 1e-2, log=True)
        trial.suggest_categorical("width", ["0.5", "1.0"])
        if number == 7:
            trial.set_user_attr("end", "no space left")
            study.finish(trial, TrialState.FAIL)
            break
        trial.report(0.1 * number, 1)
        if number == 6:
            study.finish(trial, TrialState.PRUNED)
        else:
            value = 0.9 if number == 4 else 0.5 - abs(math.log10(lr) + 3) / 10
            study.finish(trial, TrialState.COMPLETE, [value])
    return study


def costs(directory):
    study = made(directory, 4, objectives=("val_ema/top1", "-params"), pruner="none")
    for values in ((0.8, 30.0), (0.9, 40.0), (0.7, 20.0), (0.8, 35.0)):
        trial = study.take()
        trial.suggest_float("lr", 1e-4, 1e-2, log=True)
        study.finish(trial, TrialState.COMPLETE, values)
    return study


def test_the_best_of_one_objective(tmp_path, figures):
    study = single(tmp_path)
    trials = study.trials()
    assert [trial.number for trial in study_report.front(study, trials)] == [4]
    names = ["history.png", "evaluations.png", "slices.png", "importance.png"]
    assert study_report.draw(tmp_path, study, trials) == names == list(figures)
    (history,) = figures["history.png"].axes
    lines = {line.get_label(): line for line in history.lines}
    assert list(lines["complete"].get_xdata()) == [0, 1, 2, 3, 4, 5]
    assert list(lines["pruned, last evaluation"].get_xdata()) == [6]
    best = list(lines["best so far"].get_ydata())
    assert best == sorted(best)
    assert best[4:] == [0.9, 0.9]
    lr, width = figures["slices.png"].axes
    assert lr.get_xscale() == "log"
    assert [label.get_text() for label in width.get_xticklabels()] == ["0.5", "1.0"]
    bars = [bar.get_width() for bar in figures["importance.png"].axes[0].patches]
    assert sum(bars) == pytest.approx(1.0)


def test_a_table_of_all(tmp_path):
    study = single(tmp_path)
    study_report.write_table(tmp_path / "study.csv", study, study.trials())
    with (tmp_path / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    states = ["complete"] * 6 + ["pruned", "failed", "waits"]
    assert [row["state"] for row in rows] == states
    assert [row["best"] for row in rows] == ["0"] * 4 + ["1"] + ["0"] * 4
    assert rows[4]["val_ema/top1"] == "0.9"
    assert rows[7]["end"] == "no space left"
    assert rows[8]["lr"] == ""
    assert float(rows[0]["lr"]) == study.trials()[0].params["lr"]


def test_the_front_of_two_objectives(tmp_path, figures):
    study = costs(tmp_path)
    trials = study.trials()
    assert [trial.number for trial in study_report.front(study, trials)] == [1, 0, 2]
    assert "pareto.png" in study_report.draw(tmp_path, study, trials)
    assert "evaluations.png" not in figures
    (axes,) = figures["pareto.png"].axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["Pareto front"].get_xdata()) == [20.0, 30.0, 40.0]
    assert list(lines["others"].get_xdata()) == [35.0]
    params = figures["history.png"].axes[1].lines[-1]
    assert list(params.get_ydata()) == [30.0, 30.0, 20.0, 20.0]


def test_the_best_as_a_recipe(tmp_path):
    study = single(tmp_path)
    config = {"optimizer": {"lr": 1e-3, "name": "adamw"}, "model": {"strides": (2, 1)}, "seed": 0}
    study_report.write_best(tmp_path / "best.py", study.trials()[4], config, study)
    spec = importlib.util.spec_from_file_location("best", tmp_path / "best.py")
    best = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(best)
    assert best.get_config().to_dict() == config
    assert best.get_config().is_locked
    assert "Trial 4 of study s: val_ema/top1 0.9." in best.__doc__


def shown(study, **how):
    text = io.StringIO()
    console = Console(file=text, width=140, height=30, **how)
    with study_report.Screen(study, console) as screen:
        screen.show(study.trials())
        screen.show(study.trials())
    return text.getvalue()


def test_lines_where_there_is_no_terminal(tmp_path):
    lines = shown(single(tmp_path)).splitlines()
    assert len(lines) == 8  # once each; not the one that waits
    assert lines[4].startswith("trial 4 complete  val_ema/top1 0.9  8 of 9 done, best val_ema/top1")
    assert lines[6].startswith("trial 6 pruned  val_ema/top1 0.6")
    assert "no space left" in lines[7]
    assert "ETA 0:00:00" in lines[7]


def test_a_table_on_a_terminal(tmp_path):
    said = shown(single(tmp_path), force_terminal=True)
    assert "study s" in said
    assert "4 *" in said
    assert "8 of 9 done, best val_ema/top1 0.9 (trial 4)" in said


def test_how_long_the_rest_takes():
    start = datetime.datetime(2026, 1, 1)

    def trial(state, seconds):
        made_up = optuna.create_trial(
            state=state, value=0.5 if state is TrialState.COMPLETE else None
        )
        made_up.datetime_start = start
        made_up.datetime_complete = start + datetime.timedelta(seconds=seconds)
        return made_up

    done = [trial(TrialState.COMPLETE, 100), trial(TrialState.PRUNED, 20)]
    waiting = [trial(TrialState.WAITING, 0)] * 4
    running = [trial(TrialState.RUNNING, 0)] * 2
    assert study_report.remaining(waiting) == ""
    assert study_report.remaining(done) == ""
    assert study_report.remaining(done + waiting) == "0:04:00"
    assert study_report.remaining(done + waiting + running) == "0:03:00"
