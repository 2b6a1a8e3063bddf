"""Fine-tunes MobileViT v2 at 384 pixels, for ten epochs (arXiv 2206.02680; cvnets 0.2).

    python launch.py prepare imagenet --source=DIR --target=PACK
    python launch.py train --config=configs/imagenet_mobilevit_v2_384.py:width=1.0 \\
        --config.data.root=PACK --workdir=runs/mobilevitv2_100_384

    width  top-1   with 21k   arithmetic    Averaged weights. Trained on 2 GPUs with 64 images each;
    0.5    72.14              0.08 EFLOP    the arithmetic, six times multiply-accumulates times
    0.75   76.98              0.18 EFLOP    images, is a twelfth of that of the run at 256 pixels.
    1.0    79.68              0.31 EFLOP
    1.25   80.94              0.49 EFLOP
    1.5    81.50    82.60     0.70 EFLOP
    1.75   82.04    82.93     0.95 EFLOP
    2.0    82.17    83.41     1.24 EFLOP

It begins with the weights at 256 pixels that timm has on the Hub; one of your own runs is, for
instance, --config.init=runs/mobilevitv2_100. :width=2.0,from=21k begins with the network that had
learnt ImageNet-21k-P first, and augments as the training at 256 pixels does: that is the paper's,
whose recipe is not published.
"""

from ml_collections import ConfigDict

from configs import base

# Width: weights from ImageNet-1k alone, weights from ImageNet-21k-P, both at 256 pixels.
INITS = {
    0.5: {"1k": "hf-hub:timm/mobilevitv2_050.cvnets_in1k"},
    0.75: {"1k": "hf-hub:timm/mobilevitv2_075.cvnets_in1k"},
    1.0: {"1k": "hf-hub:timm/mobilevitv2_100.cvnets_in1k"},
    1.25: {"1k": "hf-hub:timm/mobilevitv2_125.cvnets_in1k"},
    1.5: {
        "1k": "hf-hub:timm/mobilevitv2_150.cvnets_in1k",
        "21k": "hf-hub:timm/mobilevitv2_150.cvnets_in22k_ft_in1k",
    },
    1.75: {
        "1k": "hf-hub:timm/mobilevitv2_175.cvnets_in1k",
        "21k": "hf-hub:timm/mobilevitv2_175.cvnets_in22k_ft_in1k",
    },
    2.0: {
        "1k": "hf-hub:timm/mobilevitv2_200.cvnets_in1k",
        "21k": "hf-hub:timm/mobilevitv2_200.cvnets_in22k_ft_in1k",
    },
}


def get_config(argument: str = "") -> ConfigDict:
    chosen = base.arguments(
        argument,
        defaults={"width": 1.0, "from": "1k"},
        allowed={"width": INITS, "from": ("1k", "21k")},
    )
    width, origin = chosen["width"], chosen["from"]
    if origin not in INITS[width]:
        raise ValueError(f"from=21k is for width=1.5|1.75|2.0, not for {width}")
    config = base.get_config()
    config.batch_size = 128
    config.duration = "10 epochs"
    config.init = INITS[width][origin]
    config.model.width = width
    config.input.size = (384, 384)
    config.input.resize = 384
    config.input.interpolation = "bicubic"

    config.unlock()
    # Root: where `launch.py prepare imagenet` put the images.
    config.data = ConfigDict({"name": "pack", "root": ""})
    if origin == "21k":
        config.policy = ConfigDict({"name": "rand_augment", "num_ops": 2, "magnitude": 9})
        config.task.mixup = 0.2
        config.task.cutmix = 1.0
        config.task.mix_probability = 0.5
        config.task.random_erasing = 0.25
    config.optimizer = ConfigDict(
        {
            "name": "sgd",
            "lr": 1e-3,
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 4e-5,
            "decay_1d": False,
            "clip_norm": 10.0,
            "layer_decay": 1.0,
        }
    )
    config.schedule = ConfigDict({"name": "constant", "warmup": "0 steps", "init": 1e-3})
    config.lock()
    config.augment.resize = "pil_bicubic"
    config.ema_decay = 0.99995
    config.eval.batch_size = 512
    return config
