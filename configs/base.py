"""Every knob once, with its default. A recipe calls `base.get_config()`, assigns, and returns it.

A group with a `name` is unpacked into the function of that name, so a recipe that chooses another
name replaces the whole group. Durations are text: "300 epochs", "20000 steps", "1e6 examples".
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict


def arguments(
    text: str, *, defaults: Mapping[str, Any], allowed: Mapping[str, Iterable[Any]]
) -> dict[str, Any]:
    """Reads what stands behind the colon of --config=FILE:TEXT, such as "variant=s,version=head".

    Args:
        text: NAME=VALUE, separated by commas; "" for the defaults.
        defaults: value of each argument that is not given.
        allowed: values of each argument, which come back as they stand here: 1.0 for "1".

    Raises:
        ValueError: an argument that there is not, or a value that is not allowed.
    """
    chosen = dict(defaults)
    usage = ", ".join(f"{name}={'|'.join(map(str, allowed[name]))}" for name in defaults)
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in defaults:
            raise ValueError(f"this recipe has no argument {name!r}; there are {usage}")
        same = [known for known in allowed[name] if value == str(known) or _number(value) == known]
        if not same:
            raise ValueError(f"{name} is {value!r}; there are {usage}")
        chosen[name] = same[0]
    return chosen


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def get_config() -> ConfigDict:
    config = ConfigDict()

    # All randomness (initial weights, order of the data, augmentation, dropout) comes from it.
    config.seed = 0
    # Images in one optimiser step, over all devices and hosts.
    config.batch_size = 1024
    # The batch is worked on in so many parts, which saves memory.
    config.accum = 1
    # What becomes of the parts' gradients: mean | sum. cvnets takes the sum, so that SGD learns
    # `accum` times as fast.
    config.accum_reduction = "mean"
    # Steps in a row that may have a loss or gradient that is no number; they are told and skipped.
    # One more, and the run stops with status 4. With 0 it stops at the first.
    config.max_skipped = 0
    # Length of the run.
    config.duration = "300 epochs"
    # Type of the network's arithmetic: float32 | bfloat16 | float16 | auto, which is bfloat16 on
    # accelerators and float32 on CPUs. Parameters, softmax, statistics and loss are always float32.
    # With float16 the loss is scaled by what keeps the gradients in range.
    config.dtype = "auto"
    # Stages (stem, layer_1 to layer_5) that are computed again for the gradient, to save memory:
    # ("stem", "layer_1", "layer_2") saves half of the activations that MobileViT v2 keeps, all save
    # nine tenths, for a quarter more of arithmetic. On a CPU nothing is saved.
    config.remat = ()

    # Network: models/zoo.py:FAMILIES and the fields of its class.
    config.model = ConfigDict()
    config.model.name = "mobilevit_v2"
    # Multiplier of all feature counts, 0.5 to 2.0 in the paper.
    config.model.width = 1.0
    # Strides of the stem and of layers 1 to 5. Images of 28 to 64 pixels want fewer twos.
    config.model.strides = (2, 1, 2, 2, 2, 2)
    # Dropout before the classifier.
    config.model.dropout = 0.0
    # What its tokens attend by: separable | multihead | linformer.
    config.model.attention = "separable"
    # Heads of the latter two, and the tokens that linformer's looks at.
    config.model.heads = 4
    config.model.latents = 256

    # Weights to begin with: a model reference (a workdir, a directory, a Hub id, a file of weights,
    # a zoo name), or "" for fresh ones. It also says how pixels are interpolated and scaled.
    config.init = ""
    # Train the classifier alone; all else stays as `init` has it.
    config.freeze_backbone = False

    # Goal: build.py:TASKS and the arguments of its function.
    config.task = ConfigDict()
    config.task.name = "classification"
    # Share of the target that is spread over all classes, in training.
    config.task.label_smoothing = 0.1
    # Alpha of mixup, which adds two images of a batch; 0 for none, 0.2 in MobileViT v2.
    config.task.mixup = 0.0
    # Alpha of cutmix, which puts a box of one image into another; 0 for none, 1 in MobileViT v2.
    config.task.cutmix = 0.0
    # Share of the batches that are mixed. With both of them on, either gets half of these.
    config.task.mix_probability = 0.5
    # Share of the images in which a box is set to 0; 0.25 in MobileViT v2.
    config.task.random_erasing = 0.0
    # Share of the image's area that the box covers.
    config.task.erasing_scale = (0.02, 0.33)
    # Height over width of the box.
    config.task.erasing_ratio = (0.3, 3.3)

    # A trained network to learn from, a model reference with the same classes; "" for none.
    config.teacher = ""
    # How: none, or build.py:DISTILLATIONS and the arguments of its function. The labels count for
    # nothing then, unless it has a label_weight.
    config.distillation = ConfigDict()
    config.distillation.name = "none"
    # What the teacher is and how it wants its images: filled in from the reference.
    config.teacher_model = ConfigDict()
    config.teacher_input = ConfigDict()

    # RangeAugment: in training, how strong augmentation may be is learned.
    config.range_augment = ConfigDict()
    # Peak signal-to-noise ratio in dB that augmented images are to have, at the start and in the
    # end, such as (40.0, 30.0); () for no such augmentation.
    config.range_augment.psnr = ()
    # Of the loss that keeps them there.
    config.range_augment.weight = 1.0
    # models/range_augment.py:OPERATIONS.
    config.range_augment.operations = ("brightness", "contrast", "noise")

    # What the network wants to see; travels with its weights (data/transforms.py:InputSpec).
    config.input = ConfigDict()
    # Height and width.
    config.input.size = (256, 256)
    # Evaluation scales the short side to this, then cuts `size` out of the centre.
    config.input.resize = 288
    # bilinear | bicubic | lanczos | nearest, in evaluation.
    config.input.interpolation = "bilinear"
    # rgb | bgr.
    config.input.channel_order = "rgb"
    # Subtracted from and divided into pixels scaled to 0..1. MobileViT uses neither.
    config.input.mean = (0.0, 0.0, 0.0)
    config.input.std = (1.0, 1.0, 1.0)

    # Images: data/sources.py:SOURCES and the arguments of its function.
    config.data = ConfigDict()
    config.data.name = "folder"
    # Directory with train/<class>/*.jpg and val/<class>/*.jpg, or <class>/*.jpg.
    config.data.root = ""
    # Held out of <class>/*.jpg for evaluation, when there is no val directory.
    config.data.val_fraction = 0.1

    # Share of the images that may be broken: named, and replaced by their neighbours. Beyond, stop.
    config.max_corrupt = 0.01

    # Image and batch sizes in training: data/multiscale.py:MULTISCALES and the arguments of its
    # function. "fixed" is config.input.size at config.batch_size in every step.
    config.multiscale = ConfigDict()
    config.multiscale.name = "fixed"

    # Crop in training: data/transforms.py:TRANSFORMS and the arguments of its function.
    config.augment = ConfigDict()
    config.augment.name = "random_resized_crop"
    # Share of the image's area that a crop covers.
    config.augment.scale = (0.08, 1.0)
    # Width over height of a crop.
    config.augment.ratio = (3 / 4, 4 / 3)
    # linear | fast_aa | pil_bilinear | pil_bicubic: from fast to exactly torchvision's.
    config.augment.resize = "fast_aa"
    # Mirror half of the images.
    config.augment.flip = True

    # What happens to the crop then: data/augment.py:POLICIES and the arguments of its function.
    config.policy = ConfigDict()
    config.policy.name = "none"

    config.loader = ConfigDict()
    # Threads that decode and augment; -1 is one a core, at most 16; 0 does it in the main thread.
    config.loader.threads = -1
    # Processes instead, for hosts that give more than 16 cores to loading.
    config.loader.processes = 0
    # Threads that only read, ahead of those that decode: for storage that is slow to answer.
    config.loader.readers = 0
    # Batches made ahead.
    config.loader.prefetch = 2

    # How the devices of all processes share the work.
    config.mesh = ConfigDict()
    # Devices that divide each parameter, its moments and its averages among them, which saves
    # memory; the batch is divided among all devices in any case. 1 keeps everything on each.
    config.mesh.fsdp = 1
    # Which axis of an array is divided: (pattern of its path, a number | "largest" | "none"). The
    # first pattern that is found counts; paths end like those in a run's parameters.txt.
    config.mesh.rules = (("", "largest"),)

    # Optimiser: optim.py:OPTIMIZERS and the arguments of its function.
    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"
    # Highest learning rate, reached at the end of the warm-up.
    config.optimizer.lr = 2e-3
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.01
    # Whether biases and norms decay too.
    config.optimizer.decay_1d = False
    # Largest global norm of the gradient; 0 for no clipping.
    config.optimizer.clip_norm = 10.0
    # Factor on the learning rate for each stage further from the head; 1 for the same everywhere.
    config.optimizer.layer_decay = 1.0

    # Learning rate over time: schedule.py:SCHEDULES and the arguments of its function.
    config.schedule = ConfigDict()
    config.schedule.name = "cosine"
    config.schedule.warmup = "5 epochs"
    # Where the warm-up begins and where the curve ends.
    config.schedule.init = 1e-6
    config.schedule.final = 2e-4

    # What a batch counts for in batch norm's running statistics (PyTorch's momentum) when training
    # ends: after the warm-up it falls to this from 0.1, by epoch, along half a cosine. 0.1 for no
    # annealing; MobileViT v1 has 1e-6.
    config.final_batch_norm_momentum = 0.1

    # Share of the averaged weights and batch statistics that each step keeps.
    config.ema_decay = 0.9995

    config.eval = ConfigDict()
    # Images at a time, over all devices and hosts.
    config.eval.batch_size = 1024
    # Between two evaluations; always after the last step.
    config.eval.every = "1 epochs"

    config.log = ConfigDict()
    # Between two rows in metrics.jsonl.
    config.log.every = "50 steps"
    # Besides metrics.jsonl: writers.py:WRITERS, such as ("tensorboard", "wandb", "mlflow").
    config.log.writers = ()

    # What launch.py train --dry_run takes for granted of images that are not at hand: ImageNet-1k.
    config.dry_run = ConfigDict()
    config.dry_run.classes = 1000
    config.dry_run.train = 1_281_167
    config.dry_run.val = 50_000

    config.checkpoint = ConfigDict()
    # Between two saves; always after the last step.
    config.checkpoint.every = "1 epochs"
    # How many of the newest to keep.
    config.checkpoint.keep = 2
    # The evaluation metric whose highest value chooses what lies in best/.
    config.checkpoint.best = "val_ema/top1"

    return config.lock()
