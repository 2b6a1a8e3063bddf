"""Search spaces: texts, corners, grids."""

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from mobilevit_jax import build
from mobilevit_jax.tools import space


def trial(**params):
    return optuna.trial.FixedTrial(params)


def test_texts():
    texts = {
        "optimizer.lr": "log:1e-4:1e-2",
        "optimizer.weight_decay": "uniform:0:0.1",
        "accum": "int:1:4",
        "model.strides": "choice:(2, 1, 2), (2,2,2)",
        "optimizer": "choice:{'name': 'sgd', 'lr': 1.0},{'name': 'adamw', 'lr': 2.0}",
    }
    draw = space.parse(texts)
    (low, distributions), (high, _) = space.corners(draw)
    assert distributions["optimizer.lr"] == FloatDistribution(1e-4, 1e-2, log=True)
    assert distributions["optimizer.weight_decay"] == FloatDistribution(0.0, 0.1)
    assert distributions["accum"] == IntDistribution(1, 4)
    assert distributions["model.strides"] == CategoricalDistribution(("(2, 1, 2)", "(2,2,2)"))
    assert low == {
        "optimizer.lr": 1e-4,
        "optimizer.weight_decay": 0.0,
        "accum": 1,
        "model.strides": "(2, 1, 2)",
        "optimizer": "{'name': 'sgd', 'lr': 1.0}",
    }
    assert high["accum"] == 4
    assert high["model.strides"] == "(2,2,2)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1e-4:1e-2", "'1e-4' is unknown; write uniform:LOW:HIGH, log:"),
        ("normal:0:1", "'normal' is unknown"),
        ("log:0:1", "low"),
        ("log:1e-2", "write uniform:LOW:HIGH"),
        ("uniform:2:1", "write uniform:LOW:HIGH"),
        ("uniform:a:1", "'a'"),
        ("int:0.5:2", "'0.5'"),
        ("choice:", "choices"),
        ("choice:1,1", "a choice is given twice"),
    ],
)
def test_bad_texts(text, message):
    with pytest.raises(build.ConfigError) as error:
        space.parse({"optimizer.lr": text})
    told = str(error.value)
    assert told.startswith(f"--space.optimizer.lr={text}: ")
    assert message in told
    assert "\n" not in told


def test_arguments_are_what_the_command_line_takes():
    overrides = {"a.lr": 1e-5, "b": (2, 1), "c": "(2, 1)", "d": False, "e": "8 epochs"}
    assert space.arguments(overrides) == [
        "--config.a.lr=1e-05",
        "--config.b=(2, 1)",
        "--config.c=(2, 1)",
        "--config.d=False",
        "--config.e=8 epochs",
    ]


def test_corners_try_every_choice():
    def draw(trial):
        kind = trial.suggest_categorical("kind", ["a", "b", "c"])
        return {"kind": kind, "n": trial.suggest_int("n", 1, 9) if kind == "c" else 0}

    assert [overrides for overrides, _ in space.corners(draw)] == [
        {"kind": "a", "n": 0},
        {"kind": "b", "n": 0},
        {"kind": "c", "n": 9},
    ]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda trial: {}, "the space is empty"),
        (lambda trial: {"batch_size": 3}, "the space is empty"),
        (lambda trial: trial.suggest_int("n", 1, 2), "must give a dict"),
        (lambda trial: {}["x"], "sweep(trial) fails: KeyError: 'x'"),
    ],
)
def test_bad_spaces(draw, message):
    with pytest.raises(build.ConfigError) as error:
        space.corners(draw)
    assert message in str(error.value)


def test_grid():
    draw = space.parse({"a": "choice:x,y", "b": "int:1:3"})
    points = space.grid(space.corners(draw))
    assert points == [{"a": a, "b": b} for a in ("x", "y") for b in (1, 2, 3)]
    assert [draw(trial(**point)) for point in points] == points

    def halves(trial):
        return {"lr": trial.suggest_float("rate", 0.5, 1.5, step=0.5)}

    assert space.grid(space.corners(halves)) == [{"rate": 0.5}, {"rate": 1.0}, {"rate": 1.5}]
    with pytest.raises(build.ConfigError, match=r"no grid of lr, a range without steps"):
        space.grid(space.corners(space.parse({"lr": "log:1e-4:1e-2"})))
    with pytest.raises(build.ConfigError, match=r"draws the same in every trial"):
        space.grid(
            space.corners(
                lambda trial: (
                    {"n": trial.suggest_int("n", 0, 1)}
                    if trial.suggest_categorical("c", [False, True])
                    else {}
                )
            )
        )
