"""Command line: python launch.py VERB …; each verb parses its arguments and makes one call.

    train     train a config, or go on with the run in a workdir
    sweep     search hyper-parameters of a config, or go on with a sweep
    eval      evaluate a run, or any other model
    predict   label images
    convert   write a model for Hugging Face, timm, cvnets or this package
    export    write a model for phones and other runtimes: StableHLO, ONNX, LiteRT, Core ML
    serve     answer over HTTP, as the Hugging Face Inference API does
    profile   count parameters, MACs and activations of a model, and time it
    data      look at a config's images: counts, broken files, loading speed, pictures
    prepare   pack ImageNet or a folder of images for fast training, or verify a pack
    doctor    say what is installed and what is missing

Exit status: 0 done, 2 config or usage, 3 data or checkpoint, 4 loss or gradient not finite, 143
interrupted and saved.
"""

import os
import sys

if __name__ == "__main__" and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    # The process starts over, for the C library to see it. A value that is there is left alone.
    from mobilevit_jax import native

    os.environ.update(native.environment())
    os.execv(sys.executable, [sys.executable, *sys.argv])

import argparse
import contextlib
import csv
import difflib
import errno
import functools
import importlib.util
import json
import logging
import pathlib
import re
import resource
import shlex
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    from ml_collections import ConfigDict
    from rich.progress import TaskID

    from mobilevit_jax.data.record import Source
    from mobilevit_jax.tools.predict import Prediction
    from mobilevit_jax.tools.pretrained import Loaded
    from mobilevit_jax.tools.space import Space

REFERENCE = "workdir, directory, Hub id, file of weights or zoo name"
LESS_MEMORY = (
    "Smaller batches need less (config.batch_size, --max-batch), in training also a higher "
    "config.accum, or config.remat"
)
CONFIG_ARGUMENT = re.compile(r"--?(no)?config([.=]|$)")
SPACE_ARGUMENT = re.compile(r"--?space\.([^=]+)=(.*)", re.DOTALL)


class UsageError(Exception):
    """The command line asks for something that there is not."""


class Interrupted(Exception):
    """The user wants to go on later."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch.py",
        description="MobileViT in JAX: train, evaluate, predict.",
        allow_abbrev=False,
        epilog="Exit status: 0 done, 2 config or usage, 3 data or checkpoint, 4 loss not finite, "
        "143 interrupted and saved.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = verbs.add_parser(
        "train",
        help="train a config, or go on with the run in a workdir",
        epilog="Any value of the config: --config.optimizer.weight_decay=0.05. See them all with "
        "--print_config.",
        allow_abbrev=False,
    )
    train.add_argument("--config", metavar="FILE", help="recipe, such as configs/quickstart.py")
    train.add_argument(
        "--workdir", type=pathlib.Path, help="directory of the run; resumed if there"
    )
    train.add_argument(
        "--profile",
        type=_span,
        metavar="FIRST:LAST",
        help="record these steps, for ui.perfetto.dev and XProf",
    )
    train.add_argument(
        "--dry_run",
        action="store_true",
        help="try everything but the data: two steps on made-up images, of which nothing is kept",
    )
    train.add_argument(
        "--print_config", action="store_true", help="print the resolved config and stop"
    )

    evaluate = verbs.add_parser(
        "eval",
        help="evaluate a run, or any other model",
        epilog="Of a run, the images are those of its own config: --config.data.root=… changes a "
        "value of it. Of other models --config=FILE says which images. --data says so for all of "
        "them, several times if you like: --data=imagenet_val=DIR --data=imagenet_a=DIR; an "
        "unknown name lists all. It adds the calibration error, and what belongs to a set: "
        "accuracy among its classes only, corruption errors.",
        allow_abbrev=False,
    )
    evaluate.add_argument("references", nargs="+", metavar="REFERENCE", help=REFERENCE)
    evaluate.add_argument("--config", metavar="FILE", help="recipe whose data to evaluate on")
    evaluate.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME[=DIR]",
        help="images to evaluate on; without DIR those in --config.data.root",
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object a model")

    predict = verbs.add_parser(
        "predict",
        help="label images",
        epilog="Broken images are named and passed over; the exit status is 3 then.",
        allow_abbrev=False,
    )
    predict.add_argument("reference", metavar="REFERENCE", help=REFERENCE)
    predict.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="file, folder, pattern ('photos/**/*.jpg'), or - for an image on standard input",
    )
    predict.add_argument(
        "--from-file",
        action="append",
        default=[],
        metavar="LIST",
        help="file with a path a line; - for standard input",
    )
    predict.add_argument(
        "--top", type=_positive, default=3, metavar="N", help="labels an image (3)"
    )
    form = predict.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object an image")
    form.add_argument("--csv", action="store_true", help="print a row a label: image,rank,…")
    predict.add_argument(
        "--sheet", type=pathlib.Path, metavar="FILE", help="draw images and labels there, a PNG"
    )
    predict.add_argument(
        "--attention", type=pathlib.Path, metavar="DIR", help="draw each block's attention there"
    )

    convert = verbs.add_parser(
        "convert",
        help="write a model for Hugging Face, timm, cvnets or this package",
        allow_abbrev=False,
    )
    convert.add_argument("source", metavar="REFERENCE", help=REFERENCE)
    convert.add_argument("target", metavar="TARGET", type=pathlib.Path, help="directory to make")
    convert.add_argument("--format", required=True, choices=("hf", "timm", "cvnets", "native"))
    convert.add_argument(
        "--average",
        type=_positive,
        default=1,
        metavar="N",
        help="of a run, write the mean of its last N checkpoints (1)",
    )

    export = _add_export(verbs)

    profile = verbs.add_parser(
        "profile",
        help="count parameters, MACs and activations of a model, and time it",
        epilog="All of the zoo is counted only, unless --measure is given: that takes minutes.",
        allow_abbrev=False,
    )
    profile.add_argument("reference", nargs="?", metavar="REFERENCE", help=REFERENCE)
    profile.add_argument("--all", action="store_true", help="the whole zoo, a row a model")
    profile.add_argument("--measure", action="store_true", help="time the models of --all too")
    profile.add_argument("--total", action="store_true", help="time the whole, not each stage")
    profile.add_argument("--size", type=_size, metavar="H,W", help="of the images (the model's)")
    profile.add_argument("--batch", type=int, default=1, metavar="N", help="images a batch (1)")
    profile.add_argument("--repeats", type=int, default=20, metavar="N", help="batches timed (20)")
    profile.add_argument("--json", action="store_true", help="print one JSON object a model")

    _add_sweep(verbs)
    serve = _add_serve(verbs)
    _add_data(verbs)
    _add_prepare(verbs)

    for verb in (predict, convert, export, serve):
        verb.add_argument(
            "--weights", choices=("ema", "raw"), default="ema", help="averaged (default) or last"
        )
    for verb in (evaluate, predict, convert, export, serve):
        verb.add_argument(
            "--checkpoint", default="newest", metavar="WHICH", help="newest (default), best, a step"
        )

    for verb in (train, evaluate):
        together = verb.add_argument_group(
            "several processes",
            "Started by Slurm's srun, Open MPI's mpirun, on Cloud TPU or GKE, they find one "
            "another; elsewhere give each of them all three:",
        )
        together.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process")
        together.add_argument("--num_processes", type=int, metavar="N", help="how many there are")
        together.add_argument("--process_id", type=int, metavar="I", help="this one, from 0")

    verbs.add_parser("doctor", help="say what is installed and what is missing")
    return parser


def _add_sweep(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    sweep = verbs.add_parser(
        "sweep",
        help="search hyper-parameters of a config, or go on with a sweep",
        epilog="The space is the recipe's sweep(trial), or --space.KEY=TEXT for each key of the "
        "config: uniform:LOW:HIGH, log:LOW:HIGH, int:LOW:HIGH, choice:A,B. Interrupted, the same "
        "command goes on.",
        allow_abbrev=False,
    )
    sweep.add_argument("--config", metavar="FILE", help="recipe, such as configs/fashion_mnist.py")
    sweep.add_argument("--workdir", type=pathlib.Path, metavar="DIR", help="directory of the sweep")
    sweep.add_argument("--trials", type=_positive, metavar="N", help="how many (20)")
    sweep.add_argument(
        "--objective",
        action="append",
        metavar="NAMES",
        help="what is to be large, with a minus small: any metric of an evaluation, params, macs, "
        "latency; several with commas or one by one (val_ema/top1)",
    )
    sweep.add_argument("--sampler", default="tpe", help="tpe (default), random, grid, cmaes, nsga2")
    sweep.add_argument("--pruner", help="asha (default), hyperband, median, none")
    sweep.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampler (0)")
    sweep.add_argument(
        "--workers", type=_positive, metavar="N", help="trials at a time (one an accelerator)"
    )
    sweep.add_argument(
        "--storage",
        metavar="URL",
        default=os.environ.get("OPTUNA_STORAGE"),
        help="journal:///FILE, postgresql://…, mysql://… ($OPTUNA_STORAGE; a journal in --workdir)",
    )
    sweep.add_argument("--study", metavar="NAME", help="name in the storage (that of --workdir)")
    sweep.add_argument(
        "--worker", action="store_true", help="work on the trials of a study that is there"
    )
    sweep.add_argument(
        "--executor",
        choices=("local", "ray", "none"),
        default="local",
        help="who starts the workers: this process, a Ray cluster, or nobody yet",
    )
    sweep.add_argument(
        "--heartbeat",
        type=_positive,
        default=60,
        metavar="SECONDS",
        help="between signs of life; after two without, a trial is begun again elsewhere (60)",
    )


def _add_export(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> argparse.ArgumentParser:
    export = verbs.add_parser(
        "export",
        help="write a model for phones and other runtimes: StableHLO, ONNX, LiteRT, Core ML",
        epilog="The file is compared with the model, and past the tolerance not written. What "
        "predict takes is made by convert --format=native.",
        allow_abbrev=False,
    )
    export.add_argument("source", metavar="REFERENCE", help=REFERENCE)
    export.add_argument("target", metavar="TARGET", type=pathlib.Path, help="directory to make")
    export.add_argument(
        "--format", required=True, choices=("stablehlo", "onnx", "tflite", "coreml")
    )
    export.add_argument(
        "--raw-input",
        action="store_true",
        help="take uint8 RGB pixels, and scale them inside (default: take normalised floats)",
    )
    export.add_argument("--size", type=_size, metavar="H,W", help="of the images (the model's)")
    export.add_argument(
        "--quantize",
        choices=("fp16", "dynamic", "int8"),
        default="",
        help="of tflite: float16 weights, int8 weights, or also int8 activations",
    )
    export.add_argument(
        "--calibrate",
        type=pathlib.Path,
        metavar="DIR",
        help="images like those it will see, for int8",
    )
    export.add_argument("--opset", type=_positive, default=17, metavar="N", help="of ONNX (17)")
    export.add_argument(
        "--images",
        type=pathlib.Path,
        metavar="DIR",
        help="to compare on (photographs of the package foolbox, or noise)",
    )
    return export


def _add_serve(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> argparse.ArgumentParser:
    serve = verbs.add_parser(
        "serve",
        help="answer over HTTP, as the Hugging Face Inference API does",
        epilog="POST an image to / or /models/NAME; GET / shows a page to try it. NAME is that of "
        "the directory or file, or the Hub id. SIGTERM and Ctrl-C finish what was accepted.",
        allow_abbrev=False,
    )
    serve.add_argument("references", nargs="+", metavar="REFERENCE", help=REFERENCE)
    serve.add_argument("--host", default="127.0.0.1", help="address (127.0.0.1; 0.0.0.0 for all)")
    serve.add_argument("--port", type=int, default=8000, help="0 for any that is free (8000)")
    serve.add_argument(
        "--token",
        default=os.environ.get("MOBILEVIT_TOKEN"),
        help="that requests must bear (the environment's MOBILEVIT_TOKEN, which ps does not show)",
    )
    serve.add_argument(
        "--max-batch", type=_positive, default=16, metavar="N", help="images at once (16)"
    )
    serve.add_argument(
        "--max-delay-ms",
        type=_milliseconds,
        default=5.0,
        metavar="MS",
        help="that an image waits at most for others (5)",
    )
    serve.add_argument(
        "--max-waiting",
        type=_positive,
        default=128,
        metavar="N",
        help="requests of a model at a time; more are told to come again (128)",
    )
    return serve


def _add_data(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    data = verbs.add_parser(
        "data",
        help="look at a config's images: counts, broken files, loading speed, pictures",
        epilog="Any value of the config: --config.loader.threads=8. It takes some 15 seconds, with "
        "--all as long as decoding everything.",
        allow_abbrev=False,
    )
    data.add_argument("--config", metavar="FILE", help="recipe whose images to look at")
    data.add_argument(
        "--workdir",
        type=pathlib.Path,
        metavar="DIR",
        help="draw samples.png, augmentations.png and evaluation.png there",
    )
    which = data.add_mutually_exclusive_group()
    which.add_argument(
        "--examples",
        type=_positive,
        metavar="N",
        help="of each split to decode, evenly spread (1000)",
    )
    which.add_argument("--all", action="store_true", help="decode every example")
    data.add_argument("--json", action="store_true", help="print one JSON object")


def _add_prepare(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    prepare = verbs.add_parser(
        "prepare",
        help="pack ImageNet or a folder of images for fast training, or verify a pack",
        allow_abbrev=False,
    )
    kinds = prepare.add_subparsers(dest="kind", required=True, metavar="WHAT")
    imagenet = kinds.add_parser(
        "imagenet",
        help="the official ILSVRC2012 tars and devkit, or what they unpacked",
        allow_abbrev=False,
    )
    folder = kinds.add_parser(
        "folder",
        help="a folder of classes: train/<class>/*.jpg or <class>/*.jpg",
        allow_abbrev=False,
    )
    folder.add_argument(
        "--val-fraction",
        type=_share,
        default=0.1,
        metavar="SHARE",
        help="held out for validation where there is no val folder (0.1)",
    )
    for kind in (imagenet, folder):
        kind.add_argument("--source", required=True, metavar="DIR", help="where the images are")
        kind.add_argument(
            "--target", required=True, type=pathlib.Path, metavar="DIR", help="directory to make"
        )
        kind.add_argument(
            "--restart-markers",
            action="store_true",
            help="repack JPEGs without loss so that crops decode faster (needs jpegtran)",
        )
        kind.add_argument(
            "--short-side",
            type=_positive,
            metavar="PIXELS",
            help="shrink images to this short side and encode them anew, with loss",
        )
        kind.add_argument(
            "--quality", type=_quality, metavar="Q", help="of the JPEGs that --short-side makes"
        )
        kind.add_argument("--shard-size", type=_positive, metavar="N", help="images in a tar file")
        kind.epilog = (
            "Interrupted, the same command goes on where it stopped. The result does not depend on "
            "--workers."
        )
    verify = kinds.add_parser(
        "verify", help="read a pack and compare every byte with its checksums", allow_abbrev=False
    )
    verify.add_argument("pack", nargs="?", metavar="DIR", help="directory of the pack")
    verify.add_argument("--target", metavar="DIR", help="the same")
    for kind in (imagenet, folder, verify):
        kind.add_argument(
            "--workers", type=_positive, metavar="N", help="threads (one for each core)"
        )


def _span(text: str) -> tuple[int, int]:
    steps = re.fullmatch(r"(\d+):(\d+)", text)
    if steps is None or not 0 < int(steps[1]) <= int(steps[2]):
        raise UsageError(f"--profile is {text!r}; write the first and last step: --profile=100:110")
    return int(steps[1]), int(steps[2])


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _milliseconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 10_000:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 10,000")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def _quality(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 95:
        raise argparse.ArgumentTypeError(f"{value} is not between 1 and 95")
    return value


def _size(text: str) -> tuple[int, int]:
    sides = re.fullmatch(r"(\d+)(?:,(\d+))?", text)
    if sides is None:
        raise UsageError(f"--size is {text!r}; write height and width: --size=256,256")
    return int(sides[1]), int(sides[2] or sides[1])


def _split_config_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes --config=FILE and --config.key=value out of the arguments."""
    config_arguments, rest = [], []
    waiting = False
    for argument in argv:
        if waiting:
            config_arguments[-1] += f"={argument}"
            waiting = False
        elif CONFIG_ARGUMENT.match(argument):
            config_arguments.append("--" + argument.lstrip("-"))
            waiting = "=" not in argument and not argument.lstrip("-").startswith("noconfig.")
        else:
            rest.append(argument)
    if waiting:
        raise UsageError(f"{config_arguments[-1]} needs a value: {config_arguments[-1]}=…")
    # ml_collections wants the file before the overrides; people write them in any order.
    return sorted(config_arguments, key=lambda text: not text.startswith("--config=")), rest


def _override(config: "ConfigDict", overrides: Sequence[str]) -> "ConfigDict":
    """Applies --config.key=value to a config, by ml_collections' rules for types."""
    from absl import flags
    from ml_collections import config_flags

    from mobilevit_jax import build, tree

    known = tree.flatten_mapping(build.plain(config))
    groups = {key.rsplit(".", i)[0] for key in known for i in range(1, key.count(".") + 1)}
    for argument in overrides:
        key = re.sub(r"^--(no)?config\.", "", argument).partition("=")[0]
        if key not in known and key not in groups:
            raise build.ConfigError(f"the config has no {key!r}{_nearest(key, known)}")
    values = flags.FlagValues()
    argv = ["launch.py", *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except flags.Error as error:
        raise build.ConfigError(str(error).splitlines()[0]) from error
    return values.config


def _nearest(key: str, known: Mapping[str, object]) -> str:
    """What a mistyped key may have meant: the nearest one, or else all of its group."""
    group, _, leaf = key.rpartition(".")
    inside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == group}
    if inside and group:
        near = difflib.get_close_matches(leaf, inside, n=1)
        return (
            f"; did you mean {group}.{near[0]}?" if near else f"; {group} has {', '.join(inside)}"
        )
    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]}?" if near else "; see all of them with --print_config"


def _load_config(arguments: Sequence[str], run: pathlib.Path | None = None) -> "ConfigDict":
    """The config of --config=FILE, or else of a run, with the overrides of the command line."""
    from mobilevit_jax import build

    files = [text for text in arguments if text.startswith("--config=")]
    overrides = [text for text in arguments if not text.startswith("--config=")]
    if files:
        return _override(_load_recipe(files[-1].partition("=")[2]), overrides)
    if run is None:
        raise UsageError("--config=FILE is missing, for instance --config=configs/quickstart.py")
    return _override(build.from_json(run / "config.json"), overrides)


def _load_recipe(reference: str) -> "ConfigDict":
    """Calls get_config of FILE, or with the text behind the colon of FILE:TEXT."""
    from mobilevit_jax import build

    path, colon, argument = reference.partition(":")
    recipe = _recipe(path)
    try:
        return recipe.get_config(*([argument] if colon else []))
    except Exception as error:  # a recipe is code, and may raise anything
        raise build.ConfigError(f"{reference} cannot be loaded: {error}") from error


def _recipe(path: str) -> "ModuleType":
    """The module of a recipe's file."""
    from mobilevit_jax import build

    if not pathlib.Path(path).is_file():
        raise UsageError(f"--config: there is no file {path}")
    spec = importlib.util.spec_from_file_location("recipe", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--config: {path} is no Python file")
    recipe = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(recipe)
    except Exception as error:  # a recipe is code, and may raise anything
        raise build.ConfigError(f"{path} cannot be loaded: {error}") from error
    return recipe


def _prepare_environment() -> None:
    """Settings that jax reads when it is imported, and no more noise than needed."""
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(home / "mobilevit_jax" / "xla"))
    # The default thresholds leave out the small programs that add up to most of a start.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    # The shards of a dataset stay open; the usual limit of 1,024 files is less than ImageNet has.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 65_536 if hard == resource.RLIM_INFINITY else hard
    if soft not in (resource.RLIM_INFINITY, hard):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, enough), hard))
    # Orbax logs every file that it opens, and a traceback for every error that it raises besides.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _train(args: argparse.Namespace, config: "ConfigDict", command: str) -> None:
    if args.print_config:
        from mobilevit_jax import build

        print(build.to_json(config))
        return
    if args.dry_run:
        # What is on trial is a fresh start, whatever is in the workdir.
        with tempfile.TemporaryDirectory(prefix="dry_run_") as workdir:
            _train_in(pathlib.Path(workdir), args, config, command)
        print("dry run: two steps, a save and an evaluation went well; nothing is kept")
        return
    if args.workdir is None:
        raise UsageError("--workdir=DIR is missing: where the run is to be kept")
    _train_in(args.workdir, args, config, command)


def _train_in(
    workdir: pathlib.Path, args: argparse.Namespace, config: "ConfigDict", command: str
) -> None:
    from mobilevit_jax import build, train
    from mobilevit_jax.tools import pretrained

    train.train(
        build.resolve(config, pretrained.describe, workdir=workdir),
        workdir,
        command=command,
        load=lambda reference: _read(reference).pretrained.variables,
        trace_steps=args.profile,
        dry_run=args.dry_run,
    )


def _read(reference: str, *, weights: str = "ema", checkpoint: str = "newest") -> "Loaded":
    """`pretrained.read`, and says what one should know of the weights."""
    from mobilevit_jax.tools import pretrained

    loaded = pretrained.read(reference, weights=weights, checkpoint=checkpoint)
    for note in loaded.notes:
        _show_warning(note)
    return loaded


def _sweep(
    args: argparse.Namespace, config_arguments: Sequence[str], space_texts: Mapping[str, str]
) -> None:
    environment = dict(os.environ)
    # While jax is imported: the accelerators belong to the trials.
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        from mobilevit_jax.tools import studies, sweep, worker
    except ModuleNotFoundError as error:
        if error.name not in ("optuna", "sqlalchemy"):
            raise
        raise UsageError("sweep needs Optuna: pip install 'mobilevit_jax[sweep]'") from error
    finally:
        os.environ.pop("JAX_PLATFORMS")
        os.environ.update(environment)
    environment.pop("OPTUNA_STORAGE", None)  # trials have no need of the password in it
    for name, value, table in (
        ("sampler", args.sampler, studies.SAMPLERS),
        ("pruner", args.pruner, studies.PRUNERS),
    ):
        if value is not None and value not in table:
            raise UsageError(f"--{name}={value} is unknown; there are {', '.join(table)}")
    if args.executor == "ray":
        sweep.check_ray()
    if args.worker:
        if config_arguments or space_texts or args.storage is None or args.study is None:
            raise UsageError(
                "a worker needs --storage=URL (or $OPTUNA_STORAGE) and --study=NAME; config and "
                "space come from the study"
            )
        study = studies.join(args.storage, args.study)
        draw = _space(study.settings.space, study.settings.recipe, study.settings.recipe_sha256)
        workdir = args.workdir or pathlib.Path(study.settings.workdir)
    else:
        if args.workdir is None:
            raise UsageError("--workdir=DIR is missing: where the sweep is to be kept")
        config = _load_config(config_arguments)
        files = [text for text in config_arguments if text.startswith("--config=")]
        file = files[-1].partition("=")[2].partition(":")[0]
        draw = _space(space_texts, file)
        study = sweep.start(
            config,
            args.workdir,
            draw=draw,
            texts=space_texts,
            recipe=None if space_texts else pathlib.Path(file),
            trials=args.trials,
            objectives=[
                name.strip() for name in ",".join(args.objective or ["val_ema/top1"]).split(",")
            ],
            sampler=args.sampler,
            pruner=args.pruner,
            seed=args.seed,
            heartbeat=args.heartbeat,
            storage=args.storage,
            name=args.study,
            override=_override,
        )
        workdir = args.workdir
    if args.executor == "none":
        print(sweep.invitation(study))
        return
    try:
        sweep.run(
            study,
            workdir,
            draw=draw,
            slots=worker.slots(args.workers, environment),
            launcher=pathlib.Path(__file__).absolute(),
            override=_override,
            ray=args.executor == "ray",
            results=not args.worker,
        )
    except worker.Stopped as error:
        raise Interrupted(str(error)) from error


def _space(texts: Mapping[str, str], recipe: str, sha256: str | None = None) -> "Space":
    """The space on the command line, or else that of a recipe, which must be of this digest."""
    from mobilevit_jax.tools import space, sweep

    if texts:
        return space.parse(texts)
    if sha256 and pathlib.Path(recipe).is_file() and sweep.digest(pathlib.Path(recipe)) != sha256:
        raise UsageError(f"{recipe} is not the one that the study was made with; its space differs")
    module = _recipe(recipe)
    if not hasattr(module, "sweep"):
        raise UsageError(
            f"the space is empty: {recipe} has no sweep(trial); give --space.KEY=, such as "
            "--space.optimizer.lr=log:1e-4:1e-2"
        )
    return module.sweep


def _eval(args: argparse.Namespace, config_arguments: Sequence[str]) -> None:
    if len(set(args.data)) < len(args.data):
        raise UsageError("--data: the same images are given twice")
    if args.data and not any(text.startswith("--config=") for text in config_arguments):
        default = pathlib.Path(__file__).parent / "configs" / "base.py"
    else:
        default = None
    table: list[tuple[str, dict[str, float]]] = []
    opened: dict[str, Source] = {}  # ImageNet-C is 3,750,000 files to list
    try:
        for reference in args.references:
            about, metrics = _evaluate(reference, args, config_arguments, default, opened)
            if args.data or len(args.references) > 1:
                if args.json:
                    print(json.dumps({"reference": reference, **about, **metrics}), flush=True)
                else:
                    table.append((reference, {**about, **metrics}))
            elif args.json:
                print(json.dumps({**about, **metrics}))
            else:
                print(" ".join([reference, *(f"{name} {value}" for name, value in about.items())]))
                for name, value in metrics.items():
                    print(f"  {name:14s} {_shown(name, value)}")
    finally:
        if table:  # also where a model further on is broken: it may have taken hours
            _print_evaluations(table)


def _evaluate(
    reference: str,
    args: argparse.Namespace,
    config_arguments: Sequence[str],
    default: pathlib.Path | None,
    opened: "dict[str, Source]",
) -> tuple[dict[str, int], dict[str, float]]:
    """What is known of a model, and its metrics; `default` is the recipe of those without.

    The sources in `opened`, by what config.data says, are used again.
    """
    from mobilevit_jax import build, evaluate
    from mobilevit_jax.tools import pretrained

    if found := pretrained.find_run(pathlib.Path(reference), args.checkpoint):
        workdir, which = found
        config = _load_config(config_arguments, workdir)
        run = pretrained.load_run(workdir, config=config, which=which)
        network, weights, about = run.network, run.weights, {"step": run.step}
    else:
        loaded = _read(reference, checkpoint=args.checkpoint).pretrained
        recipe = [] if default is None else [f"--config={default}"]
        config = _load_config([*recipe, *config_arguments])
        network = build.Network(
            model=loaded.model,
            task=build.task(config),
            input_spec=loaded.input_spec,
            class_names=loaded.labels,
        )
        weights, about = {"raw": loaded.variables}, {}
    if not args.data:
        return about, evaluate.evaluate(config, network, weights)
    names = [text.partition("=")[0] for text in args.data]
    metrics = {}
    for text, name in zip(args.data, names, strict=True):
        images = build.with_data(config, name, text.partition("=")[2])
        called = name if names.count(name) == 1 else text
        key = str(build.plain(images.data))
        if key not in opened:
            opened[key] = build.source(images, "val")
        metrics |= evaluate.score(images, network, weights, opened[key], name=called)
    return about, metrics


def _shown(name: str, value: float) -> str:
    share = re.search(r"/(top|ece|error/|corruption_error|mce)", name)
    return f"{100 * value:.2f} %" if share else f"{value:.4f}"


def _print_evaluations(table: Sequence[tuple[str, Mapping[str, float]]]) -> None:
    """A row a metric, a column a model."""
    from rich.console import Console

    from mobilevit_jax import report

    names = dict.fromkeys(name for _, values in table for name in values)
    rows = [
        [name, *(_cell(name, values[name]) if name in values else "" for _, values in table)]
        for name in names
    ]
    report.print_table(["", *(reference for reference, _ in table)], rows, Console())


def _cell(name: str, value: float) -> str:
    return f"{value:,}" if name == "step" else _shown(name, value)


def _predict(args: argparse.Namespace) -> None:
    from mobilevit_jax.data.record import DataError
    from mobilevit_jax.tools import predict

    images = predict.find(args.images, lists=args.from_file)
    if not images:
        raise UsageError("which images? Give files, folders, patterns, - or --from-file=LIST")
    loaded = _read(args.reference, weights=args.weights, checkpoint=args.checkpoint)
    broken: list[DataError] = []

    def tell(error: DataError) -> None:
        broken.append(error)
        _fail(error, 3)

    predictions = predict.predict(
        loaded.pretrained,
        images,
        top=args.top,
        attention=args.attention,
        sheet=args.sheet,
        broken=tell,
    )
    out = sys.stdout  # a bar would lead what is printed to itself
    write = csv.writer(out, lineterminator="\n").writerow
    if args.csv:
        write(("image", "rank", "label", "score"))
    with _progress(shown=not out.isatty()) as progress:
        for done, each in enumerate(predictions, start=1):
            if args.csv:
                for rank, (label, score) in enumerate(each.labels, start=1):
                    write((each.image, rank, label, score))
            else:
                print(_prediction(each, as_json=args.json), file=out)
            progress("images", done + len(broken), len(images))
    if broken:
        raise DataError(f"{len(broken):,} of {len(images):,} images could not be labelled")


def _prediction(each: "Prediction", *, as_json: bool) -> str:
    if as_json:
        labels = [{"label": label, "score": score} for label, score in each.labels]
        drawn = {"attention": str(each.attention)} if each.attention else {}
        return json.dumps({"image": each.image, "labels": labels, **drawn}, ensure_ascii=False)
    shown = [f"{label} {100 * score:.1f} %" for label, score in each.labels]
    drawn = [f"-> {each.attention}"] if each.attention else []
    return f"{each.image}: {'  '.join([*shown, *drawn])}"


def _convert(args: argparse.Namespace) -> None:
    from mobilevit_jax.tools import convert

    converted = convert.convert(
        args.source,
        args.target,
        format=args.format,
        weights=args.weights,
        checkpoint=args.checkpoint,
        average=args.average,
    )
    print(f"{converted.target}: {', '.join(converted.files)}")
    for note in converted.notes:
        print(note)


def _export(args: argparse.Namespace) -> None:
    from rich.console import Console

    from mobilevit_jax.tools import export

    options = {name: value for name, value in vars(args).items() if name != "verb"}
    exported = export.export(options.pop("source"), options.pop("target"), **options)
    directory = exported.path.parent
    print(f"{directory}: {', '.join(sorted(path.name for path in directory.iterdir()))}")
    export.print_exported(exported, Console())


def _serve(args: argparse.Namespace) -> None:
    wanted = ("starlette", "uvicorn", "httptools")
    if missing := [name for name in wanted if not importlib.util.find_spec(name)]:
        raise UsageError(f"serve needs {' and '.join(missing)}: pip install 'mobilevit_jax[serve]'")
    from mobilevit_jax.tools import serve

    serve.serve(
        args.references,
        host=args.host,
        port=args.port,
        token=args.token,
        max_batch=args.max_batch,
        max_delay=args.max_delay_ms / 1e3,
        max_waiting=args.max_waiting,
        weights=args.weights,
        checkpoint=args.checkpoint,
        note=functools.partial(print, flush=True),
    )


def _profile(args: argparse.Namespace) -> None:
    if (args.reference is None) != args.all:
        raise UsageError("give a model or --all: profile mobilevitv2_100; profile --all")
    from rich.console import Console
    from rich.progress import track

    from mobilevit_jax.models import zoo
    from mobilevit_jax.tools import profile

    options = {"size": args.size, "batch_size": args.batch, "repeats": args.repeats}
    if args.all:
        measure = "total" if args.measure else "nothing"
        waiting = Console(stderr=True)
        profiles = list(
            track(
                profile.profile_zoo(measure=measure, **options),
                "profiling the zoo",
                total=len(zoo.ZOO),
                console=waiting,
                transient=True,
                disable=not waiting.is_terminal,
            )
        )
    else:
        measure = "total" if args.total else "stages"
        profiles = [profile.profile(args.reference, measure=measure, **options)]
    if args.json:
        for each in profiles:
            print(json.dumps(profile.as_json(each)))
    elif args.all:
        profile.print_totals(profiles, Console())
    else:
        profile.print_stages(profiles[0], Console())


def _data(args: argparse.Namespace, config_arguments: Sequence[str]) -> None:
    # Before jax is imported: an accelerator is of no use here, and another run may be on it.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from rich.console import Console

    from mobilevit_jax import build
    from mobilevit_jax.tools import look, pretrained

    config = build.resolve(
        _load_config(config_arguments), pretrained.describe, workdir=args.workdir
    )
    examples = None if args.all else args.examples or look.EXAMPLES
    try:
        with _progress() as progress:
            found = look.look(config, workdir=args.workdir, examples=examples, progress=progress)
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted; nothing is left to go on with") from error
    if args.json:
        print(json.dumps(look.as_json(found)))
        return
    look.print_look(found, Console())
    if args.workdir is None:
        print("No picture was drawn; --workdir=DIR says where to.")
    elif found.pictures:
        print(f"Pictures: {', '.join(map(str, found.pictures))}")


def _prepare(args: argparse.Namespace) -> None:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux: the cores that a container lends
    workers = args.workers or (len(affinity(0)) if affinity else os.cpu_count()) or 1
    if args.kind == "verify":
        _verify(args, workers)
        return
    if args.quality is not None and args.short_side is None:
        raise UsageError("--quality is of the images that --short-side=PIXELS shrinks; give both")
    from mobilevit_jax.data import prepare, shards

    options = shards.Options(
        restart_markers=args.restart_markers,
        short_side=args.short_side,
        quality=args.quality or shards.QUALITY,
        shard_size=args.shard_size or shards.SIZE,
    )
    where = {"source": args.source, "target": args.target}
    try:
        with _progress() as progress:
            how = {"options": options, "workers": workers, "progress": progress}
            if args.kind == "imagenet":
                summary = prepare.imagenet(**where, **how)
            else:
                summary = prepare.folder(**where, val_fraction=args.val_fraction, **how)
    except prepare.OptionsError as error:
        raise UsageError(str(error)) from error
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"interrupted; {args.target} keeps what is finished, and the same command goes on there"
        ) from error
    print(f"{args.target}: {len(summary.class_names):,} classes")
    for name, split in summary.splits.items():
        size = f"{sum(split.shards) / 1e6:,.1f} MB in {len(split.shards):,} tar files"
        done = [f"{count:,} {what}" for what, count in split.counts.items() if count]
        print(f"  {name:5s} {', '.join([f'{split.images:,} images', *done, size])}")
        if split.corrupt:
            print(f"  {name:5s} {_some(split.corrupt, 'cannot be decoded and stayed as they are')}")
    print(f"Train on it: --config.data=\"{{'name': 'pack', 'root': '{args.target}'}}\"")


def _verify(args: argparse.Namespace, workers: int) -> None:
    if (args.pack is None) == (args.target is None):
        raise UsageError("which pack? prepare verify DIR")
    from mobilevit_jax.data import prepare

    target = args.pack or args.target
    try:
        with _progress() as progress:
            checked = prepare.verify(target, workers=workers, progress=progress)
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted; nothing is known of the pack") from error
    counts = " and ".join(f"{count:,} {split}" for split, count in checked.images.items())
    print(f"{target}: {counts} images in {checked.bytes / 1e6:,.1f} MB, all as written")
    if checked.unreadable:
        print(_some(checked.unreadable, "cannot be opened, nor could they in the source"))


def _some(names: Sequence[str], what: str) -> str:
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f"{len(names):,} images {what}: {', '.join(names[:5])}{more}"


@contextlib.contextmanager
def _progress(*, shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for everything that is counted, on a terminal; called with what, done, total."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    waiting = Console(stderr=True)
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars: dict[str, TaskID] = {}
    with Progress(
        *columns, console=waiting, transient=True, disable=not (shown and waiting.is_terminal)
    ) as progress:

        def show(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total or None)
            progress.update(bars[what], completed=done, total=total or None)

        yield show


def _doctor() -> int:
    from mobilevit_jax.tools import doctor

    findings = doctor.examine()
    for finding in findings:
        print(f"{'ok     ' if finding.ok else 'MISSING'} {finding.name:23s} {finding.value}")
    return 0 if all(finding.ok for finding in findings) else 2


def _run(argv: Sequence[str]) -> int:
    config_arguments, rest = _split_config_arguments(argv)
    spaces = [SPACE_ARGUMENT.fullmatch(text) for text in rest]
    space_texts = {found[1]: found[2] for found in spaces if found}
    args = _parser().parse_args(
        [text for text, found in zip(rest, spaces, strict=True) if not found]
    )
    if space_texts and args.verb != "sweep":
        raise UsageError(f"{args.verb} takes no --space.{next(iter(space_texts))}")
    if config_arguments and args.verb not in ("train", "sweep", "eval", "data"):
        raise UsageError(f"{args.verb} takes no {config_arguments[0].partition('=')[0]}")
    _prepare_environment()
    if args.verb in ("train", "eval"):
        from mobilevit_jax import processes

        processes.join(
            coordinator=args.coordinator, count=args.num_processes, index=args.process_id
        )
        if processes.joined() and not processes.is_lead():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the lead says it
    if args.verb == "train":
        config = _load_config(config_arguments)
        _train(args, config, shlex.join(["python", "launch.py", *argv]))
    elif args.verb == "sweep":
        _sweep(args, config_arguments, space_texts)
    elif args.verb == "eval":
        _eval(args, config_arguments)
    elif args.verb == "predict":
        _predict(args)
    elif args.verb == "convert":
        _convert(args)
    elif args.verb == "export":
        _export(args)
    elif args.verb == "serve":
        _serve(args)
    elif args.verb == "profile":
        _profile(args)
    elif args.verb == "data":
        _data(args, config_arguments)
    elif args.verb == "prepare":
        _prepare(args)
    else:
        return _doctor()
    return 0


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns its exit status and prints a user's mistake as one message."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return _run(argv)
        except UsageError as error:
            return _fail(error, 2)
        except Interrupted as error:
            return _fail(error, 143)
        except Exception as error:
            if _out_of_memory(error):
                return _fail(UsageError(f"{str(error).splitlines()[0]} {LESS_MEMORY}"), 2)
            return _fail(error, _status(error))


def _leave(argv: Sequence[str]) -> int:
    """Runs one command, and ends the process at once where it alone of several has failed."""
    status = 1
    try:
        status = main(argv)
    except Exception:
        if not _joined():
            raise
        traceback.print_exc()
        again = "another process may say why; run the same command in all of them again"
        print(f"launch.py: this process cannot go on; {again}", file=sys.stderr)
    if status not in (0, 143) and _joined():
        # An orderly exit would wait for the others, which wait for this one.
        sys.stderr.flush()
        os._exit(status)
    return status


def _joined() -> bool:
    processes = sys.modules.get("mobilevit_jax.processes")
    return processes is not None and processes.joined()


def _out_of_memory(error: Exception) -> bool:
    devices = sys.modules.get("mobilevit_jax.devices")  # to import it takes seconds
    return devices is not None and devices.out_of_memory(error)


def _status(error: Exception) -> int:
    """The exit status of an error that a user can mend; any other is raised again."""
    from mobilevit_jax.data import record

    if isinstance(error, record.DataError):  # by itself: the imports below take seconds
        return 3
    from mobilevit_jax import build, checkpoint, processes, train

    statuses = {
        build.ConfigError: 2,
        processes.JoinError: 2,
        checkpoint.MismatchError: 2,
        checkpoint.CheckpointError: 3,
        train.NonFiniteError: 4,
        train.SavedAndStopped: 143,
    }
    for kind, status in statuses.items():
        if isinstance(error, kind):
            return status
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return 3
    raise error


def _show_warning(message: Warning | str, *where: object, **more: object) -> None:
    print(f"launch.py: warning: {message}", file=sys.stderr)


def _fail(error: Exception, status: int) -> int:
    print(f"launch.py: {error}", file=sys.stderr)
    return status


def _report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    # When a save fails (a full disk), Orbax closes the event loop under writes of TensorStore that
    # are still on their way; each of them would print a traceback around our one message.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    sys.unraisablehook = _report_unraisable
    sys.exit(_leave(sys.argv[1:]))
