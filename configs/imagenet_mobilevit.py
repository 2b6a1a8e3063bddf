"""MobileViT v1 on ImageNet-1k, as published (arXiv 2110.02178; cvnets 0.1, whose weights they are).

    python launch.py prepare imagenet --source=DIR --target=PACK
    python launch.py train --config=configs/imagenet_mobilevit.py:variant=s \\
        --config.data.root=PACK --workdir=runs/mobilevit_s

    variant  top-1  arithmetic       Averaged weights. Trained on 8 GPUs with 128 images each.
    xxs       69.0   0.9 EFLOP       Arithmetic: six times multiply-accumulates times images, with
    xs        74.7   2.4 EFLOP       those of attention. A GPU of 100 TFLOP/s that reaches a tenth
    s         78.3   4.6 EFLOP       of them does 1 EFLOP in 28 hours.

BGR images, crops without antialiasing, one batch a step of one of five sizes that never has fewer
images than at 256 pixels, momentum of batch norm annealed to nothing, everything decays. The
published evaluation scales without antialiasing too (OpenCV); this one is Pillow's bilinear.

:version=head is the recipe of cvnets 0.4 for the same networks: RGB, Pillow, a longer warm-up,
smaller batches at large sizes, PyTorch's initial weights (as its code runs). No weights of it were
published.
"""

from ml_collections import ConfigDict

from configs import base

# Dropout in the transformers, by version.
BLOCK_DROPOUT = {
    "xxs": {"0.1": 0.05, "head": 0.1},
    "xs": {"0.1": 0.1, "head": 0.1},
    "s": {"0.1": 0.1, "head": 0.1},
}


def get_config(argument: str = "") -> ConfigDict:
    chosen = base.arguments(
        argument,
        defaults={"variant": "s", "version": "0.1"},
        allowed={"variant": BLOCK_DROPOUT, "version": ("0.1", "head")},
    )
    variant, head = chosen["variant"], chosen["version"] == "head"
    config = base.get_config()
    config.batch_size = 1024
    config.duration = "300 epochs"

    config.unlock()
    config.model = ConfigDict(
        {
            "name": "mobilevit",
            "variant": variant,
            # Before the classifier.
            "dropout": 0.1,
            # On both residual branches of every attention layer.
            "block_dropout": BLOCK_DROPOUT[variant][chosen["version"]],
            # kaiming: normal, as the recipe says. torch: the constructors' own.
            "weight_init": "torch" if head else "kaiming",
        }
    )
    config.multiscale = ConfigDict(
        {
            "name": "variable_batch",
            "low": 160,
            "high": 320,
            "scales": 5,
            # GPUs that the recipe was made for: batches are rounded on each of them.
            "replicas": 8,
            "round_to": 1 if head else 8,
            "at_least_base": not head,
            # Set it to the devices where they cannot share a batch (the error says so).
            "divisible_by": 1,
        }
    )
    # Root: where `launch.py prepare imagenet` put the images.
    config.data = ConfigDict({"name": "pack", "root": ""})
    config.lock()
    config.input.channel_order = "rgb" if head else "bgr"
    config.augment.resize = "pil_bilinear" if head else "linear"

    config.optimizer.lr = 2e-3
    config.optimizer.weight_decay = 0.01
    config.optimizer.decay_1d = True
    config.optimizer.clip_norm = 0.0
    config.schedule.name = "cosine_by_epoch"
    config.schedule.warmup = "20000 steps" if head else "3000 steps"
    config.schedule.init = 2e-4
    config.schedule.final = 2e-4
    config.final_batch_norm_momentum = 0.1 if head else 1e-6
    return config
