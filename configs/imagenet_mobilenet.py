"""MobileNet v1, v2 and v3 on ImageNet-1k, as cvnets 0.2 trained them beside MobileViT.

    python launch.py prepare imagenet --source=DIR --target=PACK
    python launch.py train --config=configs/imagenet_mobilenet.py:version=2,width=1.0 \\
        --config.data.root=PACK --workdir=runs/mobilenetv2_100

    version=1  top-1     version=2  top-1     version=3      top-1     These are cvnets' networks,
    width=0.25 54.45     width=0.25 53.57     variant=small  66.65     and differ from the papers':
    width=0.5  65.93     width=0.5  65.28     variant=large  75.13     see models/mobilenet.py.
    width=0.75 71.44     width=0.75 70.42
    width=1.0  74.04     width=1.0  72.93

Trained on 4 GPUs (v1) or 8 with 128 images each, v3 with 256. Arithmetic, at 224 pixels and six
times multiply-accumulates times images: 0.1 to 1.3 EFLOP for v1, 0.1 to 0.7 for v2, 0.1 and 0.5 for
v3; the five image sizes, 128 to 320 pixels, have batches of about equal area.
"""

from ml_collections import ConfigDict

from configs import base

# Version: images a step at 224 pixels, GPUs; rate at first, at most and in the end, warm-up.
RECIPES = {
    1: (512, 4, 0.05, 0.4, 2e-4, "7500 steps"),
    2: (1024, 8, 0.05, 0.4, 2e-4, "7500 steps"),
    3: (2048, 8, 0.1, 0.8, 4e-4, "3000 steps"),
}


def get_config(argument: str = "") -> ConfigDict:
    chosen = base.arguments(
        argument,
        defaults={"version": 2, "width": 1.0, "variant": "large"},
        allowed={
            "version": RECIPES,
            "width": (0.25, 0.5, 0.75, 1.0),
            "variant": ("small", "large"),
        },
    )
    version = chosen["version"]
    key, other = ("variant", "width") if version == 3 else ("width", "variant")
    if other in argument:
        raise ValueError(f"version={version} comes by {key}, and has no {other}")
    batch_size, gpus, init, peak, final, warmup = RECIPES[version]
    config = base.get_config()
    config.batch_size = batch_size
    config.duration = "300 epochs"
    config.input.size = (224, 224)
    config.input.resize = 256
    config.augment.resize = "pil_bilinear"

    config.unlock()
    config.model = ConfigDict({"name": f"mobilenet_v{version}", key: chosen[key]})
    config.multiscale = ConfigDict(
        {
            "name": "variable_batch",
            "low": 128,
            "high": 320,
            "scales": 5,
            # GPUs that the recipe was made for: batches are rounded on each of them.
            "replicas": gpus,
            "round_to": gpus,
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
            "lr": peak,
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
    config.schedule.warmup = warmup
    config.schedule.init = init
    config.schedule.final = final
    return config
