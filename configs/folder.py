"""MobileViT v2 from scratch on your own images, a folder a class.

    python launch.py train --config=configs/folder.py --config.data.root=DIR --workdir=runs/mine

DIR holds train/<class>/*.jpg and val/<class>/*.jpg, or <class>/*.jpg, of which a tenth is then held
out. Smaller nets and images: --config.model.width=0.5 --config.input.size="(128,128)"
--config.input.resize=144.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.batch_size = 64
    config.duration = "60 epochs"
    config.optimizer.lr = 1e-3
    config.optimizer.weight_decay = 0.05
    config.schedule.final = 1e-5
    config.ema_decay = 0.99
    config.eval.batch_size = 64
    config.log.every = "20 steps"
    return config
