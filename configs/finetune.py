"""Fine-tunes a pretrained model on your own images, a folder a class.

    python launch.py train --config=configs/finetune.py --config.init=REFERENCE \\
        --config.data.root=DIR --workdir=runs/mine

REFERENCE is a workdir, a directory or Hub id of Hugging Face or timm, a cvnets .pt file, a
directory of this package, or a zoo name. The network and what it wants of its images come from it;
the head is made anew when the classes differ in number. DIR holds train/<class>/*.jpg and
val/<class>/*.jpg, or <class>/*.jpg, of which a tenth is then held out.

The classifier alone: --config.freeze_backbone. Gentler below: --config.optimizer.layer_decay=0.7.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.batch_size = 64
    config.duration = "20 epochs"

    config.unlock()
    # "" and zeros: as `init` has them.
    config.model = ConfigDict({"name": ""})
    config.lock()
    config.input.size = (0, 0)
    config.input.resize = 0

    config.augment.scale = (0.25, 1.0)
    config.optimizer.lr = 3e-4
    config.optimizer.weight_decay = 0.05
    config.schedule.warmup = "1 epochs"
    config.schedule.final = 1e-6
    # Short runs: an average over the last hundred steps or so.
    config.ema_decay = 0.99
    config.eval.batch_size = 64
    config.log.every = "20 steps"
    return config
