"""The recipe of tests/tiny.py with the network of quick_launch.py, for what no network can change.

It is started by that launcher, or where zoo.FAMILIES is quick_launch.FAMILIES.
"""

from ml_collections import ConfigDict

from tests import tiny


def get_config():
    config = tiny.get_config()
    config.unlock()
    config.model = ConfigDict({"name": "one_conv", "width": 1.0, "dropout": 0.1})
    return config.lock()
