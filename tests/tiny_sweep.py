"""A recipe for tests of sweeps: the network of quick_launch.py, in a space that keeps shapes."""

from tests import quick


def get_config():
    config = quick.get_config()
    config.duration = "4 steps"
    config.eval.every = "1 steps"
    config.checkpoint.every = "1 steps"
    config.log.every = "4 steps"
    return config


def sweep(trial):
    return {
        "augment.padding": trial.suggest_int("padding", 0, 3),
        "optimizer.lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True),
    }
