"""MobileViT v2-0.5 on Fashion-MNIST (Xiao et al., arXiv 1708.07747): 60,000 pictures of clothes.

    apt-get install dataset-fashion-mnist      # or --config.data.root=DIR with the four .gz files
    python launch.py train --config=configs/fashion_mnist.py --workdir=runs/fashion

Two CPU cores, under 20 minutes; at least 91 % of the 10,000 test images. Learning rate and weight
decay are searched by

    python launch.py sweep --config=configs/fashion_mnist.py --workdir=sweeps/fashion
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.batch_size = 128
    config.duration = "5 epochs"

    config.model.width = 0.5
    # 28 pixels: maps of 14, 14, 14, 8, 4, 4.
    config.model.strides = (2, 1, 1, 2, 2, 1)

    config.input.size = (28, 28)
    config.input.resize = 28

    config.unlock()
    config.data = ConfigDict(
        {
            "name": "fashion_mnist",
            # Directory of the four IDX files.
            "root": "/usr/share/datasets/fashion-mnist",
        }
    )
    config.augment = ConfigDict(
        {
            "name": "pad_crop",
            "short": 28,
            "padding": 2,
            "resize": "pil_bilinear",
            # A mirrored shirt is a shirt.
            "flip": True,
        }
    )
    config.lock()
    config.loader.threads = 1  # tiny images: more threads only get in each other's way

    config.optimizer.lr = 3e-3
    config.optimizer.weight_decay = 0.05
    config.schedule.warmup = "0.5 epochs"
    config.schedule.final = 3e-5
    config.ema_decay = 0.995

    config.eval.batch_size = 500
    config.checkpoint.every = "0.5 epochs"
    return config


def sweep(trial: Any) -> dict[str, Any]:
    """Learning rate and weight decay, around what is above; trials share one compiled step."""
    return {
        "optimizer.lr": trial.suggest_float("lr", 3e-4, 3e-2, log=True),
        "optimizer.weight_decay": trial.suggest_float("weight_decay", 1e-3, 0.5, log=True),
    }
