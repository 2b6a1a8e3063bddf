"""MobileNet v1 on ImageNet-1k, taught by another network, as cvnets 0.4 distils it.

    python launch.py prepare imagenet --source=DIR --target=PACK
    python launch.py train --config=configs/imagenet_distill.py:kind=soft \\
        --config.teacher=REFERENCE --config.data.root=PACK --workdir=runs/mobilenetv1_100_distilled

The teacher is any model reference with the same 1,000 classes in the same order. :kind=soft learns
its probabilities (KL divergence at temperature 1), :kind=hard the class that it decides for. The
labels themselves count for nothing. cvnets ships the soft one, with its ResNet-101 (81.68 top-1) as
the teacher, and publishes no top-1 for it. To be expected is more than the 74.04 of the same
network without a teacher (configs/imagenet_mobilenet.py:version=1,width=1.0); with RangeAugment for
both, cvnets reached 75.2.

Made for 4 GPUs with 128 images each. Arithmetic: 1.3 EFLOP for the student, and two times the
teacher's multiply-accumulates times images, of which 300 epochs have 384 million: for MobileViT
v2-2.0 (7.2 billion at 256 pixels) 5.5 EFLOP.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(argument: str = "") -> ConfigDict:
    chosen = base.arguments(argument, defaults={"kind": "soft"}, allowed={"kind": ("soft", "hard")})
    config = base.get_config()
    config.batch_size = 512
    config.duration = "300 epochs"
    config.dtype = "bfloat16"
    config.input.size = (224, 224)
    config.input.resize = 232
    config.augment.resize = "pil_bilinear"

    config.unlock()
    config.model = ConfigDict({"name": "mobilenet_v1", "width": 1.0})
    if chosen["kind"] == "soft":
        config.distillation = ConfigDict(
            # Temperature: above 1 for softer probabilities. Label weight: of the ordinary loss.
            {"name": "soft", "temperature": 1.0, "weight": 1.0, "label_weight": 0.0}
        )
    else:
        config.distillation = ConfigDict(
            {
                "name": "hard",
                # How many of the teacher's best classes are right.
                "top": 1,
                "label_smoothing": 0.0,
                "weight": 1.0,
                # Of the ordinary loss.
                "label_weight": 0.0,
            }
        )
    config.multiscale = ConfigDict(
        {
            "name": "variable_batch",
            "low": 128,
            "high": 320,
            "scales": 5,
            # GPUs that the recipe was made for: batches are rounded on each of them.
            "replicas": 4,
            "round_to": 1,
            "at_least_base": False,
            # Set it to the devices where they cannot share a batch (the error says so).
            "divisible_by": 1,
        }
    )
    # Root: where `launch.py prepare imagenet` put the images.
    config.data = ConfigDict({"name": "pack", "root": ""})
    config.optimizer = ConfigDict(
        {
            "name": "sgd",
            "lr": 0.4,
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 4e-5,
            "decay_1d": False,
            "clip_norm": 0.0,
            "layer_decay": 1.0,
        }
    )
    config.lock()
    config.schedule.name = "cosine_by_epoch"
    config.schedule.warmup = "7500 steps"
    config.schedule.init = 0.05
    config.schedule.final = 2e-4
    return config
