"""MobileViT v2 on ImageNet-1k, as published (arXiv 2206.02680; cvnets 0.2, whose weights they are).

    python launch.py prepare imagenet --source=DIR --target=PACK
    python launch.py train --config=configs/imagenet_mobilevit_v2.py:width=1.0 \\
        --config.data.root=PACK --workdir=runs/mobilevitv2_100

    width  top-1   arithmetic        Averaged weights. Trained on 8 GPUs with 128 images each; the
    0.5    70.18    1.1 EFLOP        widest took 2 days on 8 A100, which is 12 TFLOP/s on each.
    0.75   75.56    2.4 EFLOP        Arithmetic: six times multiply-accumulates times images.
    1.0    78.09    4.2 EFLOP
    1.25   79.65    6.5 EFLOP
    1.5    80.38    9.3 EFLOP
    1.75   80.84   12.7 EFLOP
    2.0    81.17   16.5 EFLOP

375,342 steps. A quarter of the batches is mixed by mixup and a quarter by cutmix: the recipe leaves
the probability to cvnets, where it was 0.5 then (1 since 0.4).
"""

from ml_collections import ConfigDict

from configs import base

# Width: highest learning rate, weight decay.
RATES = {
    0.5: (0.0090, 0.004),
    0.75: (0.0090, 0.008),
    1.0: (0.0075, 0.013),
    1.25: (0.0049, 0.020),
    1.5: (0.0035, 0.029),
    1.75: (0.0026, 0.039),
    2.0: (0.0020, 0.050),
}


def get_config(argument: str = "") -> ConfigDict:
    chosen = base.arguments(argument, defaults={"width": 1.0}, allowed={"width": RATES})
    lr, weight_decay = RATES[chosen["width"]]
    config = base.get_config()
    config.batch_size = 1024
    config.duration = "300 epochs"
    config.model.width = chosen["width"]

    config.unlock()
    # Root: where `launch.py prepare imagenet` put the images.
    config.data = ConfigDict({"name": "pack", "root": ""})
    config.policy = ConfigDict({"name": "rand_augment", "num_ops": 2, "magnitude": 9})
    config.lock()
    config.input.interpolation = "bicubic"
    config.augment.resize = "pil_bicubic"
    config.task.mixup = 0.2
    config.task.cutmix = 1.0
    config.task.mix_probability = 0.5
    config.task.random_erasing = 0.25

    config.optimizer.lr = lr
    config.optimizer.weight_decay = weight_decay
    config.schedule.name = "cosine_by_epoch"
    config.schedule.warmup = "20000 steps"
    config.schedule.init = 1e-6
    config.schedule.final = lr / 10
    return config
