"""A recipe for tests: the whole path on real digits, in seconds."""

from ml_collections import ConfigDict

from configs import base


def get_config():
    config = base.get_config()
    config.batch_size = 16
    config.duration = "8 steps"
    config.model.width = 0.25
    config.model.strides = (2, 1, 2, 1, 1, 1)
    config.model.dropout = 0.1
    config.input.size = (16, 16)
    config.input.resize = 16
    config.unlock()
    config.data = ConfigDict({"name": "digits", "val_fraction": 0.02})
    config.augment = ConfigDict({"name": "pad_crop", "short": 16, "padding": 2})
    config.lock()
    config.loader.threads = 2
    config.schedule.warmup = "2 steps"
    config.ema_decay = 0.5
    config.eval.batch_size = 32
    config.eval.every = "4 steps"
    config.log.every = "2 steps"
    config.checkpoint.every = "2 steps"
    return config
