"""Takes MobileViT v2 from ImageNet-21k-P to ImageNet-1k (arXiv 2206.02680; cvnets 0.2).

    python launch.py prepare imagenet --source=DIR --target=PACK
    python launch.py train --config=configs/imagenet_mobilevit_v2_from21k.py \\
        --config.init=runs/mobilevitv2_200_21k --config.data.root=PACK \\
        --workdir=runs/mobilevitv2_200_from21k

    width  top-1   arithmetic        Averaged weights. Trained on 2 GPUs with 128 images each.
    1.5    81.46    1.6 EFLOP        Arithmetic: six times multiply-accumulates times images.
    1.75   81.94    2.1 EFLOP
    2.0    82.36    2.7 EFLOP

config.init is what configs/imagenet21k_mobilevit_v2.py trained: nobody published it. The network is
its, but for the head. The published recipe does not clip gradients; the paper says that it does, at
10: --config.optimizer.clip_norm=10.0. At 384 pixels it goes on with
configs/imagenet_mobilevit_v2_384.py:width=2.0,from=21k.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.batch_size = 256
    config.duration = "50 epochs"

    config.unlock()
    # "": as `init` has it.
    config.model = ConfigDict({"name": ""})
    # Root: where `launch.py prepare imagenet` put the images.
    config.data = ConfigDict({"name": "pack", "root": ""})
    config.policy = ConfigDict({"name": "rand_augment", "num_ops": 2, "magnitude": 9})
    config.optimizer = ConfigDict(
        {
            "name": "sgd",
            "lr": 1e-2,
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 4e-5,
            "decay_1d": False,
            "clip_norm": 0.0,
            "layer_decay": 1.0,
        }
    )
    config.lock()
    config.input.interpolation = "bicubic"
    config.augment.resize = "pil_bicubic"
    config.task.mixup = 0.2
    config.task.cutmix = 1.0
    config.task.mix_probability = 0.5
    config.task.random_erasing = 0.25

    config.schedule.name = "cosine_by_epoch"
    config.schedule.warmup = "0 steps"
    config.schedule.init = 1e-2
    config.schedule.final = 1e-3
    return config
