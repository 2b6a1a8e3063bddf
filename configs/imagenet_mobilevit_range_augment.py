"""MobileViT-S on ImageNet-1k with RangeAugment (arXiv 2212.10553), as cvnets 0.4 trains it.

    python launch.py prepare imagenet --source=DIR --target=PACK
    python launch.py train --config=configs/imagenet_mobilevit_range_augment.py \\
        --config.data.root=PACK --workdir=runs/mobilevit_s_range_augment

                    top-1   Averaged weights. Trained on 8 GPUs with 128 images each. Arithmetic:
                     78.2   4.6 EFLOP, as configs/imagenet_mobilevit.py; a GPU of 100 TFLOP/s that
    :teacher=soft    79.4   reaches a tenth of them does 1 EFLOP in 28 hours.

How far brightness, contrast and noise may change an image is learned with the network, towards an
error that rises over the epochs: from 40 to 30 dB of peak signal-to-noise ratio. All else is
configs/imagenet_mobilevit.py:variant=s,version=head, but that evaluation crops nothing off the
short side.

:teacher=soft also learns the probabilities of a network, in place of the labels, and goes to 20 dB:
give --config.teacher=REFERENCE. cvnets' own was its ResNet-101 trained with RangeAugment; its
arithmetic, or that of another, comes to the above as in configs/imagenet_distill.py.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(argument: str = "") -> ConfigDict:
    chosen = base.arguments(
        argument, defaults={"teacher": "none"}, allowed={"teacher": ("none", "soft")}
    )
    taught = chosen["teacher"] == "soft"
    config = base.get_config()
    config.batch_size = 1024
    config.duration = "300 epochs"
    config.dtype = "bfloat16"
    config.input.resize = 256
    config.augment.resize = "pil_bilinear"
    config.range_augment.psnr = (40.0, 20.0) if taught else (40.0, 30.0)

    config.unlock()
    config.model = ConfigDict(
        {
            "name": "mobilevit",
            "variant": "s",
            # Before the classifier.
            "dropout": 0.1,
            # On both residual branches of every attention layer.
            "block_dropout": 0.1,
            # PyTorch's constructors' own, as cvnets' code runs.
            "weight_init": "torch",
        }
    )
    if taught:
        config.distillation = ConfigDict(
            # Temperature: above 1 for softer probabilities. Label weight: of the ordinary loss.
            {"name": "soft", "temperature": 1.0, "weight": 1.0, "label_weight": 0.0}
        )
    config.multiscale = ConfigDict(
        {
            "name": "variable_batch",
            "low": 160,
            "high": 320,
            "scales": 5,
            # GPUs that the recipe was made for: batches are rounded on each of them.
            "replicas": 8,
            "round_to": 1,
            "at_least_base": False,
            # Set it to the devices where they cannot share a batch (the error says so).
            "divisible_by": 1,
        }
    )
    # Root: where `launch.py prepare imagenet` put the images.
    config.data = ConfigDict({"name": "pack", "root": ""})
    config.lock()

    config.optimizer.lr = 2e-3
    config.optimizer.weight_decay = 0.01
    config.optimizer.decay_1d = True
    config.optimizer.clip_norm = 0.0
    config.schedule.name = "cosine_by_epoch"
    config.schedule.warmup = "20000 steps"
    config.schedule.init = 2e-4
    config.schedule.final = 2e-4
    return config
