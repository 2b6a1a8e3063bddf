"""Pre-trains MobileViT v2 on ImageNet-21k-P (arXiv 2206.02680; cvnets 0.2).

    python launch.py prepare folder --source=DIR --target=PACK
    python launch.py train --config=configs/imagenet21k_mobilevit_v2.py:width=2.0 \\
        --config.data.root=PACK --workdir=runs/mobilevitv2_200_21k

    width  top-1  top-5   arithmetic        On the 10,450 classes; averaged weights. Trained on 32
    1.5    44.5   74.5    21 EFLOP          GPUs with 128 images each. Arithmetic: six times
    1.75   45.8   75.8    29 EFLOP          multiply-accumulates times 80 epochs of 11 million
    2.0    46.4   76.6    38 EFLOP          images.

DIR is the winter 2021 release of ImageNet-21k as processed by Ridnik et al. (arXiv 2104.10972):
train/<class>/* and val/<class>/*, 10,450 classes, about 11 million and 523 thousand images. The run
begins with the weights for ImageNet-1k that timm has on the Hub, and a new head; one of your own
runs is, for instance, --config.init=runs/mobilevitv2_200. What comes out goes into
configs/imagenet_mobilevit_v2_from21k.py.
"""

from ml_collections import ConfigDict

from configs import base

# Width: weights to begin with, weight decay.
WIDTHS = {
    1.5: ("hf-hub:timm/mobilevitv2_150.cvnets_in1k", 0.029),
    1.75: ("hf-hub:timm/mobilevitv2_175.cvnets_in1k", 0.039),
    2.0: ("hf-hub:timm/mobilevitv2_200.cvnets_in1k", 0.050),
}


def get_config(argument: str = "") -> ConfigDict:
    chosen = base.arguments(argument, defaults={"width": 2.0}, allowed={"width": WIDTHS})
    init, weight_decay = WIDTHS[chosen["width"]]
    config = base.get_config()
    config.batch_size = 4096
    config.duration = "80 epochs"
    config.init = init
    config.model.width = chosen["width"]

    config.unlock()
    # Root: where `launch.py prepare folder` put the images.
    config.data = ConfigDict({"name": "pack", "root": ""})
    config.policy = ConfigDict({"name": "rand_augment", "num_ops": 2, "magnitude": 9})
    config.lock()
    config.input.interpolation = "bicubic"
    config.augment.resize = "pil_bicubic"
    config.task.mixup = 0.2
    config.task.cutmix = 1.0
    config.task.mix_probability = 0.5
    config.task.random_erasing = 0.25

    config.optimizer.lr = 3e-4
    config.optimizer.weight_decay = weight_decay
    config.schedule.name = "cosine_by_epoch"
    config.schedule.warmup = "0 steps"
    config.schedule.init = 3e-4
    config.schedule.final = 1e-6

    # The winter-21 release after Ridnik et al., about 11 million to train.
    config.dry_run.classes = 10_450
    config.dry_run.train = 11_000_000
    config.dry_run.val = 523_000
    return config
