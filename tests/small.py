"""The recipe of tests/tiny.py with a network that takes a third of the time to compile."""

from ml_collections import ConfigDict

from tests import tiny


def get_config():
    config = tiny.get_config()
    config.unlock()
    config.model = ConfigDict(
        {"name": "mobilenet_v1", "width": 0.25, "strides": (2, 1, 2, 1, 1, 1), "dropout": 0.1}
    )
    return config.lock()
