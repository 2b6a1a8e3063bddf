"""Who works on which trial, and what storages say when something is wrong."""

import json
import multiprocessing
import subprocess
import time

import optuna
import pytest
from optuna.trial import TrialState

from mobilevit_jax import build
from mobilevit_jax.tools import studies, worker
from tests import tiny_sweep

SETTINGS = studies.Settings(
    config={"optimizer": {"lr": 1.0, "betas": (0.9, 0.99)}, "seed": 0},
    space={"optimizer.lr": "log:1e-4:1e-2"},
    recipe="",
    recipe_sha256="",
    objectives=("val_ema/top1",),
    sampler="tpe",
    pruner="none",
    seed=0,
    trials=3,
    steps=100,
    evaluations=5,
    heartbeat=60,
    workdir="somewhere",
)


def made(directory, count=3, points=(), **changes):
    url = studies.journal_url(directory)
    storage = studies.connect(url, create=True)
    study = studies.create(url, "s", storage, SETTINGS._replace(**changes))
    study.plan(points, count)
    return study


def joined(workdir):
    return studies.join(studies.journal_url(workdir), "s")


def lr(trial):
    return trial.suggest_float("lr", 1e-4, 1e-2, log=True)


def states(study):
    return [trial.state.name for trial in study.trials()]


def test_every_trial_is_taken_once(tmp_path):
    one, other = made(tmp_path), joined(tmp_path)
    taken = [one.take(), other.take(), one.take()]
    assert [trial.number for trial in taken] == [0, 1, 2]
    assert one.take() is None
    assert other.take() is None
    one.finish(taken[0], TrialState.COMPLETE, [0.5])
    other.finish(taken[1], TrialState.PRUNED)
    assert states(one) == states(other) == ["COMPLETE", "PRUNED", "RUNNING"]


def test_a_trial_that_is_given_back_keeps_its_number_and_parameters(tmp_path):
    one = made(tmp_path)
    trial = one.take()
    drawn = lr(trial)
    trial.report(0.25, 1)
    one.give_back(trial)
    again = joined(tmp_path).take()
    assert again.number == trial.number == 0
    assert lr(again) == drawn
    assert one.trials()[0].intermediate_values == {1: 0.25}


def test_draws_depend_on_seed_number_and_history_alone(tmp_path):
    def draws(workdir, reopen, **changes):
        workdir.mkdir()
        study, drawn = made(workdir, 14, **changes), []
        for number in range(14):
            study = joined(workdir) if reopen else study
            trial = study.take()
            assert trial.number == number
            drawn.append(lr(trial))
            study.finish(trial, TrialState.COMPLETE, [-(drawn[-1] ** 2)])
        return drawn

    whole = draws(tmp_path / "a", False)  # beyond ten trials, TPE looks at the history
    assert draws(tmp_path / "b", True) == whole
    assert len(set(whole)) == 14
    assert draws(tmp_path / "c", False, seed=1) != whole


def test_a_dead_trial_is_tried_once_more_with_its_parameters(tmp_path):
    study = made(tmp_path, 1)
    trial = study.take()
    drawn = lr(trial)
    assert study.died(study.frozen(trial), "signal 9")
    assert not study.died(study.frozen(trial), "signal 9")  # somebody else found it as well
    assert states(study) == ["FAIL", "WAITING"]
    study.finish(trial, TrialState.COMPLETE, [1.0])  # its worker was not dead after all
    assert states(study) == ["FAIL", "WAITING"]
    again = study.take()
    assert lr(again) == drawn
    frozen = study.frozen(again)
    assert studies.retried(frozen) == [0]
    assert studies.directory(frozen) == "trial_0000"
    assert study.died(frozen, "signal 9")
    assert states(study) == ["FAIL", "FAIL"]
    assert study.trials()[1].user_attrs["end"] == "died: signal 9"
    study.plan((), 1)
    assert states(study) == ["FAIL", "FAIL"]
    study.plan((), 2)  # more trials are asked for
    assert states(study) == ["FAIL", "FAIL", "WAITING"]


def test_a_retry_that_was_never_made_is_made_when_the_sweep_goes_on(tmp_path, monkeypatch):
    study = made(tmp_path, 1)
    trial = study.take()
    lr(trial)
    monkeypatch.setattr(studies.Study, "_retry", lambda self, trial: None)
    study.died(study.frozen(trial), "signal 9")
    monkeypatch.undo()
    assert states(study) == ["FAIL"]
    study.plan((), 1)
    study.plan((), 1)
    assert states(study) == ["FAIL", "WAITING"]


def test_without_signs_of_life_a_trial_is_taken_for_dead(tmp_path, monkeypatch):
    study, now = made(tmp_path, 1), time.monotonic()
    trial = joined(tmp_path).take()

    def bury(after):
        monkeypatch.setattr(time, "monotonic", lambda: now + after)
        return study.bury()

    assert bury(0) == []
    assert bury(119) == []
    trial.set_user_attr("alive", 1)
    assert bury(121) == []
    assert bury(240) == []
    assert bury(242) == [0]
    assert states(study) == ["FAIL", "WAITING"]
    assert bury(400) == []


def hold(path, pipe):
    lock = studies.Lock(path)
    pipe.send((lock.acquire(), lock.name))
    pipe.recv()


def test_a_lock_is_free_when_its_holder_is_gone(tmp_path):
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path / "lock", there))
    process.start()
    acquired, name = here.recv()
    assert acquired
    lock = studies.Lock(tmp_path / "lock")
    assert not lock.acquire()
    assert not studies.Lock.free(name)

    study = made(tmp_path, 1)
    trial = study.take()
    trial.set_user_attr("lock", name)
    assert study.bury() == []
    process.kill()
    process.join()
    assert studies.Lock.free(name)
    assert not studies.Lock.free(f"elsewhere {name.split(' ', 1)[1]}")
    assert study.bury() == [0]  # at once, without waiting for signs of life
    assert lock.acquire()
    assert not studies.Lock.free(lock.name)
    lock.release()
    assert studies.Lock.free(name)
    (tmp_path / "lock").unlink()
    assert not studies.Lock.free(name)  # perhaps another file system: not for sure


def test_a_grid_is_laid_out(tmp_path):
    points = [{"lr": 1e-3}, {"lr": 2e-3}]
    study = made(tmp_path, 2, points, sampler="grid")
    assert [lr(study.take()) for _ in points] == [1e-3, 2e-3]
    assert study.take() is None


@pytest.mark.parametrize("sampler", studies.SAMPLERS)
@pytest.mark.parametrize("pruner", studies.PRUNERS)
def test_samplers_and_pruners(tmp_path, sampler, pruner):
    study = made(
        tmp_path, 4, [{"lr": 1e-3}] * 4 if sampler == "grid" else (), sampler=sampler, pruner=pruner
    )
    for number in range(4):
        trial = study.take()
        assert 1e-4 <= lr(trial) <= 1e-2
        assert 0.0 <= trial.suggest_float("wd", 0.0, 0.1) <= 0.1
        trial.report(0.1 * number, 1)
        assert trial.should_prune() in (True, False)
        study.finish(trial, TrialState.COMPLETE, [0.1 * number])
    assert states(study) == ["COMPLETE"] * 4


def test_pruners_prune(tmp_path):
    for pruner in ("asha", "hyperband", "median"):
        workdir = tmp_path / pruner
        workdir.mkdir()
        study = made(workdir, 16, pruner=pruner, evaluations=9)
        pruned = []
        for number in range(16):
            trial, value = study.take(), -number  # each worse than all before
            lr(trial)
            for step in range(1, 10):
                trial.report(value, step)
                if trial.should_prune():
                    pruned.append(number)
                    break
            study.finish(
                trial,
                TrialState.PRUNED if number in pruned else TrialState.COMPLETE,
                None if number in pruned else [value],
            )
        assert pruned, pruner
        assert 0 not in pruned


def test_another_sweep(tmp_path):
    made(tmp_path)
    made(tmp_path, 5, heartbeat=1, trials=5)  # these may change
    with pytest.raises(studies.StorageError) as error:
        made(tmp_path, space={"optimizer.lr": "log:1e-5:1e-2"}, sampler="random")
    told = str(error.value)
    assert "made for another sweep" in told
    assert "space.optimizer.lr was 'log:1e-4:1e-2' and is 'log:1e-5:1e-2'" in told
    assert "sampler was 'tpe' and is 'random'" in told
    config = {**SETTINGS.config, "seed": 3}
    with pytest.raises(studies.StorageError, match=r"config\.seed was 0 and is 3"):
        made(tmp_path, config=config)


def test_a_study_of_somebody_else(tmp_path):
    storage = studies.connect(studies.journal_url(tmp_path), create=True)
    study = optuna.create_study(study_name="s", storage=storage)
    study.add_trial(optuna.create_trial(state=TrialState.WAITING))
    with pytest.raises(studies.StorageError, match="was not made by this command"):
        made(tmp_path)
    with pytest.raises(studies.StorageError, match="there is no study 's'"):
        joined(tmp_path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("journal:///nowhere/study.journal", "there is no such file"),
        ("sqlite:///x.db", "SQLite breaks when several processes write"),
        ("mongodb://u:s3cret@h/d", "mongodb://u:***@h/d: write journal:///FILE"),
        ("postgresql://u:s3cret@localhost:x/d", "is no URL"),
        ("postgresql://u:s3/c@ret@localhost:1/d", "postgresql://"),
        ("postgresql://u:s3cret@127.0.0.1:1/d", "postgresql://u:***@127.0.0.1:1/d: "),
        ("mysql://u:s3cret@127.0.0.1:1/d", "mysql://u:***@127.0.0.1:1/d: "),
        ("s3cret", "the storage"),
    ],
)
def test_bad_storages(url, message):
    with pytest.raises(studies.StorageError) as error:
        studies.connect(url, create=False)
    told = str(error.value)
    assert message in told
    assert "\n" not in told
    for secret in ("s3cret", "s3/c@ret", "c@ret"):
        assert secret not in told
    assert error.value.__suppress_context__ or error.value.__context__ is None


class Told(subprocess.Popen):
    """A process that only notes what it is told."""

    def __init__(self):
        self.terminated = 0

    def __del__(self):
        """There is no process to wait for."""

    def terminate(self):
        self.terminated += 1


def test_a_pruner_is_asked_about_every_evaluation(tmp_path):
    config = build.plain(tiny_sweep.get_config())
    study = made(tmp_path, 4, config=config, pruner="asha", evaluations=9)
    keen = worker.Worker(
        study, tmp_path, draw=tiny_sweep.sweep, slots=[], launcher=tmp_path, override=print
    )

    def run(values, ending):
        trial = study.take()
        directory = tmp_path / f"trial_{trial.number:04d}"
        directory.mkdir()
        job = worker.Job(
            trial, worker.Slot({}, ()), directory, [], studies.Lock(directory / "lock")
        )
        job.ending = ending
        rows = [{"step": i, "val_ema/top1": value} for i, value in enumerate(values)]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        process = Told()
        keen._report(job, process)
        job.lock.release()
        rungs = study.frozen(trial).system_attrs
        return job.ending, process.terminated, job.reported, rungs

    # The first value is that of fresh weights. Rungs are at evaluations 1, 3, 9.
    good = [0.0, 0.5, 0.5, 0.6, 0.7]
    first = {"completed_rung_0": 0.5, "completed_rung_1": 0.6}
    assert run(good, "") == ("", 0, 4, first)
    assert run(good, "interrupted") == ("interrupted", 0, 4, first)
    bad = [0.0, 0.5, 0.5, 0.1, 0.7]
    second = {"completed_rung_0": 0.5, "completed_rung_1": 0.1}
    assert run(bad, "") == ("pruned", 1, 4, second)
    assert run(bad, "interrupted") == ("pruned", 0, 4, second)
