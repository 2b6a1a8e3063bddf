"""A recipe for tests of sweeps: a small convolutional net, and a space that leaves shapes alone."""

from ml_collections import ConfigDict

from tests import tiny


def get_config():
    config = tiny.get_config()
    config.unlock()
    strides = (2, 1, 2, 1, 1, 1)
    config.model = ConfigDict({"name": "mobilenet_v1", "width": 0.25, "strides": strides})
    config.lock()
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
