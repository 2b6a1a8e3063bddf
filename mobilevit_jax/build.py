"""From a config to ready objects; the only file that reads a config.

Every group is unpacked into the function that it names, so the functions' signatures say what a
group may hold. What a function rejects (ValueError, TypeError) becomes a `ConfigError` that names
the group.
"""

import contextlib
import difflib
import inspect
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from ml_collections import ConfigDict as Config

from mobilevit_jax import optim, schedule, sharding, steps, writers
from mobilevit_jax.data import augment, multiscale, pipeline, sources, transforms
from mobilevit_jax.data.record import DataError, Source
from mobilevit_jax.models import layers, zoo
from mobilevit_jax.models.distillation import Distillation, View
from mobilevit_jax.models.range_augment import RangeAugment
from mobilevit_jax.tasks import classification, distillation, range_augment
from mobilevit_jax.tasks.task import Task

TASKS: dict[str, Callable[..., Task]] = {"classification": classification.classification}
DISTILLATIONS: dict[str, Callable[..., Task]] = {
    "soft": distillation.soft,
    "hard": distillation.hard,
}
CONFIG = "config.json"  # in a workdir
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

# Reference -> family, model, input specification.
Describe = Callable[[str], tuple[str, zoo.nn.Module, transforms.InputSpec]]
T = TypeVar("T")


class ConfigError(Exception):
    """A config holds something that cannot be built; the message names the key."""


class Network(NamedTuple):
    """What tools need of a run: the network and how to feed it."""

    model: zoo.nn.Module
    task: Task
    input_spec: transforms.InputSpec
    class_names: tuple[str, ...]


class Experiment(NamedTuple):
    """Everything the training loop needs, built. Durations are in steps."""

    network: Network
    # The same in training: inside what is around it only there, with the losses of that.
    training: Network
    train_source: Source
    val_source: Source
    transform: transforms.Transform
    # Image and batch size of every step.
    shapes: multiscale.Shapes
    tx: optim.Optimizer
    curve: schedule.Curve
    # Numbers that the compiled train step is given and does not contain, so that runs that differ
    # in them alone share it: learning_rate of every step, weight_decay.
    rates: dict[str, np.ndarray]
    # The optimiser with this curve, and with these arguments instead of the config's.
    optimizer: Callable[[schedule.Curve, Mapping[str, ArrayLike]], optim.Optimizer]
    seed: int
    accum: int
    accum_reduction: str
    max_skipped: int
    batch_norm_momentum: schedule.Curve | None
    ema_decay: float
    init: str
    teacher: str
    freeze_backbone: bool
    # Arguments of evaluate.make.
    evaluation: dict[str, Any]
    workers: pipeline.Workers
    max_corrupt: float
    mesh: Mesh
    # Where on it the arrays of the state lie (sharding.by_rules).
    mesh_rules: sharding.Rules
    total_steps: int
    eval_every: int
    log_every: int
    save_every: int
    keep: int
    best: str
    writers: tuple[str, ...]


@contextlib.contextmanager
def _reading(key: str) -> Iterator[None]:
    """Turns a constructor's complaint into one about `config.<key>`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config.{key}: {error}") from error


def _choose(table: Mapping[str, T], name: str) -> T:
    if name not in table:
        raise ValueError(f"unknown name {name!r}; there are {', '.join(sorted(table))}")
    return table[name]


def _call(
    key: str, table: Mapping[str, Callable[..., T]], group: Mapping[str, Any], **given: Any
) -> T:
    """Calls the function that `group.name` names with the rest of the group and with `given`."""
    arguments = dict(group)
    with _reading(key):
        function = _choose(table, arguments.pop("name"))
        _check_arguments(function, arguments)
        return function(**given, **arguments)


def _check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    known = list(inspect.signature(function).parameters)
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"{function.__name__} has no argument {name!r}{hint} "
                "(a group with another name is replaced as a whole)"
            )


def plain(value: Any) -> Any:
    """A config, or a part of one, as dicts and tuples (JSON turns tuples into lists)."""
    if isinstance(value, Config | dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    return value


def to_json(config: Config) -> str:
    """The resolved config as text, for config.json and --print_config."""
    return json.dumps(plain(config), indent=2)


def restore(values: Mapping[str, Any]) -> Config:
    """A config of its own from what `plain`, or JSON, made of one."""
    return Config(plain(values)).lock()


def from_json(path: pathlib.Path) -> Config:
    """Reads what `to_json` wrote.

    Raises:
        ConfigError: the file is missing or no JSON object.
    """
    try:
        return restore(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path.parent} is no run: there is no {path.name}. "
            "Give the --workdir of a run that launch.py train began."
        ) from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def resolve(
    config: Config,
    describe: Describe,
    *,
    workdir: pathlib.Path | None,
) -> Config:
    """Fills in what a recipe leaves to the models it takes: `config.init` and `config.teacher`.

    Of the first that is the whole of config.model where its name is "", config.input.size and
    resize where they are zero, and always how pixels are interpolated, ordered and scaled: it goes
    with the weights. Of the second it is config.teacher_model and config.teacher_input.

    Args:
        config: as the recipe and the command line have it.
        describe: reference -> family, model, input specification.
        workdir: of the run, if there is one; one that began with the same models already knows
            them, so that going on needs the references no more.

    Raises:
        ConfigError: the recipe leaves the network to a model, and none is given.
    """
    path = workdir and workdir / CONFIG
    before = from_json(path) if path and path.exists() else None
    if config.init:
        config = _with_init(config, describe, before)
    elif not config.model.name:
        raise ConfigError(
            "config.init is empty, and this recipe begins with a trained model: give its "
            "reference, --config.init=REFERENCE"
        )
    if config.teacher:
        config = _with_teacher(config, describe, before)
    return config


def _with_init(config: Config, describe: Describe, before: Config | None) -> Config:
    """The config with what it leaves to the model that it begins with."""
    if before is not None and before.init == config.init:
        group, spec = plain(before.model), input_spec(before)
    else:
        family, model, spec = describe(config.init)
        group = {"name": family, **plain(zoo.fields(model))}
    size, resize = plain(config.input.size), config.input.resize
    if any(size):
        spec = spec._replace(size=size, resize=resize or min(size))
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if not config.model.name:
            config.model = Config(group)
        config.input = Config(spec._asdict())
    return config.lock()


def _with_teacher(config: Config, describe: Describe, before: Config | None) -> Config:
    """The config with what its teacher is and how it wants its images."""
    if before is not None and before.teacher == config.teacher:
        group, spec = plain(before.teacher_model), plain(before.teacher_input)
    else:
        family, model, input_spec = describe(config.teacher)
        group = {"name": family, "num_classes": model.num_classes, **plain(zoo.fields(model))}
        spec = input_spec._asdict()
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.teacher_model, config.teacher_input = Config(group), Config(spec)
    return config.lock()


def _positive(key: str, value: float) -> None:
    if value < 1:
        raise ConfigError(f"config.{key} is {value}; it must be at least 1")


def input_spec(config: Config) -> transforms.InputSpec:
    """The input specification of the network.

    Raises:
        ConfigError: a value that no image can have.
    """
    with _reading("input"):
        spec = transforms.InputSpec(**plain(config.input))
        transforms.evaluation(spec)  # checks the values
        return spec


def network(config: Config, class_names: tuple[str, ...]) -> Network:
    """The network for these classes, its task and its input specification.

    Raises:
        ConfigError: the config names something unknown or out of range.
    """
    with _reading("dtype"):
        auto = DTYPES["float32" if jax.default_backend() == "cpu" else "bfloat16"]
        dtype = _choose({"auto": auto, **DTYPES}, config.dtype)
    spec, remat = input_spec(config), plain(config.remat)
    with _reading("remat"):
        layers.check_remat(remat)
    with _reading("model"):
        model = zoo.create(
            num_classes=len(class_names), dtype=dtype, remat=remat, **plain(config.model)
        )
        steps.abstract_variables(model, spec.size)  # what a module rejects, it rejects when called
    return Network(
        model=model,
        task=task(config),
        input_spec=spec,
        class_names=class_names,
    )


def training(config: Config, network: Network, epoch_starts: schedule.EpochStarts) -> Network:
    """The network as it is trained: inside what is around it only there, with the losses of that.

    The parameters keep their paths; those of learned augmentation, and the teacher, come to them.

    Args:
        config: resolved.
        network: as it is used.
        epoch_starts: first step of every epoch.

    Raises:
        ConfigError: a teacher that does not go with the network, or an argument out of range.
    """
    trained = _with_range_augment(config, _distilled(config, network), epoch_starts)
    if config.freeze_backbone and trained is not network:
        raise ConfigError(
            "config.freeze_backbone computes as in evaluation, where there is neither a teacher "
            "nor config.range_augment: leave out one of them"
        )
    return trained


def _distilled(config: Config, network: Network) -> Network:
    """The network beside the teacher, if the config has one."""
    kind = config.distillation.name
    if bool(config.teacher) != (kind != "none"):
        raise ConfigError(
            f"config.distillation.name is {kind!r}, and config.teacher is {config.teacher!r}: give "
            "a teacher, --config.teacher=REFERENCE, and choose how to learn from it, "
            "--config.distillation.name=soft|hard; or neither"
        )
    if not config.teacher:
        return network
    classes = len(network.class_names)
    if config.teacher_model.num_classes != classes:
        raise ConfigError(
            f"config.teacher: {config.teacher} has {config.teacher_model.num_classes} classes, and "
            f"the images have {classes}"
        )
    group = plain(config.distillation)
    task = _call("distillation", DISTILLATIONS, group, task=network.task, num_classes=classes)
    with _reading("teacher"):
        spec = transforms.InputSpec(**plain(config.teacher_input))
        teacher = zoo.create(dtype=network.model.dtype, **plain(config.teacher_model))
        model = Distillation(network.model, teacher, _view(network.input_spec, spec))
        steps.abstract_variables(model, network.input_spec.size)
    return network._replace(model=model, task=task)


def _view(student: transforms.InputSpec, teacher: transforms.InputSpec) -> View:
    """How a teacher has to look at an image that is normalised for its student."""
    mean, std = np.array(student.mean), np.array(student.std)
    reverse = student.channel_order != teacher.channel_order
    if reverse:
        mean, std = mean[::-1], std[::-1]
    scale, offset = std / teacher.std, (mean - teacher.mean) / teacher.std
    return View(reverse, tuple(scale.tolist()), tuple(offset.tolist()))


def _with_range_augment(
    config: Config, network: Network, epoch_starts: schedule.EpochStarts
) -> Network:
    """The network behind learned augmentation, if the config has it."""
    group = plain(config.range_augment)
    psnr = group.pop("psnr")
    if not psnr:
        return network
    spec = network.input_spec
    if spec.mean != (0.0, 0.0, 0.0) or spec.std != (1.0, 1.0, 1.0):
        raise ConfigError(
            "config.range_augment works on pixels of 0..1: config.input.mean must be (0, 0, 0) and "
            f"std (1, 1, 1), not {spec.mean} and {spec.std}"
        )
    with _reading("range_augment"):
        model = RangeAugment(network.model, operations=group["operations"])
        steps.abstract_variables(model, spec.size)  # what a module rejects, it rejects when called
        target = range_augment.target_mse(psnr, epoch_starts=epoch_starts)
        task = range_augment.with_augmentation_loss(
            network.task, target=target, weight=group["weight"]
        )
    return network._replace(model=model, task=task)


def task(config: Config) -> Task:
    """The task of a config.

    Raises:
        ConfigError: an unknown task or argument.
    """
    return _call("task", TASKS, plain(config.task))


def source(config: Config, split: str) -> Source:
    """The images of a split, "train" or "val".

    Raises:
        ConfigError: an unknown source or argument.
        DataError: the images are not there or not as they should be.
    """
    return _call("data", sources.SOURCES, plain(config.data), split=split)


def with_data(config: Config, name: str, root: str) -> Config:
    """The config with the images of another source.

    Args:
        config: whose data to replace; where it has them already, it stays as it is.
        name: of the source, key of data/sources.py:SOURCES.
        root: where they are; "" for config.data.root, or where the source looks by itself.

    Raises:
        ConfigError: there is no such source, it has no root, or needs one.
    """
    with _reading("data"):
        parameters = inspect.signature(_choose(sources.SOURCES, name)).parameters
    if name == config.data.name and not root:
        return config
    group = {"name": name}
    if "root" in parameters:
        root = root or plain(config.data).get("root", "")
        if root:
            group["root"] = root
        elif parameters["root"].default is inspect.Parameter.empty:
            raise ConfigError(f"where is {name}? Give --data={name}=DIRECTORY")
    elif root:
        raise ConfigError(f"{name} has no directory; write --data={name}")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data = Config(group)
    return config.lock()


def transform(config: Config) -> transforms.Transform:
    """What a training image goes through.

    Raises:
        ConfigError: an unknown crop or policy, or an argument of one.
    """
    policy = _call("policy", augment.POLICIES, plain(config.policy))
    return _call("augment", transforms.TRANSFORMS, plain(config.augment), policy=policy)


def workers(config: Config) -> pipeline.Workers:
    """Who loads the images.

    Raises:
        ConfigError: a negative number.
    """
    group = plain(config.loader)
    threads = group.pop("threads")
    for key, value in [("threads", threads + 1), *group.items()]:
        if value < 0:
            raise ConfigError(f"config.loader.{key} is {getattr(config.loader, key)}, too small")
    return pipeline.Workers(threads=None if threads == -1 else threads, **group)


def evaluation(config: Config) -> dict[str, Any]:
    """How a split is read: batch_size, workers, max_corrupt.

    Raises:
        ConfigError: a batch that the devices cannot share equally.
    """
    return {
        "batch_size": _shared(config.eval.batch_size, "eval.batch_size"),
        "workers": workers(config),
        "max_corrupt": _share("max_corrupt", config.max_corrupt),
    }


def _shared(batch_size: int, key: str) -> int:
    _positive(key, batch_size)
    if batch_size % jax.device_count():
        raise ConfigError(
            f"config.{key} is {batch_size}; it must be a multiple of {jax.device_count()} devices"
        )
    return batch_size


def mesh(config: Config) -> Mesh:
    """The devices, as the config groups them.

    Raises:
        ConfigError: they cannot be.
    """
    with _reading("mesh.fsdp"):
        return sharding.make_mesh(config.mesh.fsdp)


def placed(abstract_state: steps.TrainState, run: Experiment) -> steps.TrainState:
    """The shapes of a run's state, with the sharding of each.

    Raises:
        ConfigError: a rule of config.mesh.rules that cannot be followed.
    """
    with _reading("mesh.rules"):
        return sharding.by_rules(abstract_state, run.mesh, run.mesh_rules)


def _share(key: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"config.{key} is {value}; it is a share, from 0 to 1")
    return value


def shapes(config: Config) -> multiscale.Shapes:
    """Image size and batch size of every training step.

    Raises:
        ConfigError: a batch that the devices, or the accumulated parts, cannot share equally.
    """
    _positive("accum", config.accum)
    parts = config.accum * jax.device_count()
    if _shared(config.batch_size, "batch_size") % parts:
        raise ConfigError(
            f"config.accum is {config.accum}; config.batch_size ({config.batch_size}) must be a "
            f"multiple of accum times {jax.device_count()} devices, that is of {parts}"
        )
    return _call(
        "multiscale",
        multiscale.MULTISCALES,
        plain(config.multiscale),
        size=input_spec(config).size,
        batch_size=config.batch_size,
        seed=config.seed,
        multiple_of=parts,
    )


def _batch_norm_momentum(
    config: Config, warmup: int, epoch_starts: schedule.EpochStarts
) -> schedule.Curve | None:
    final = config.final_batch_norm_momentum
    with _reading("final_batch_norm_momentum"):
        curve = schedule.batch_norm_momentum(final=final, warmup=warmup, epoch_starts=epoch_starts)
    return None if final == schedule.BATCH_NORM_MOMENTUM else curve


def _made_up(config: Config, split: str) -> Source:
    """A source like that of the config, where it is at hand, but without its images."""
    try:
        real = source(config, split)
        return sources.made_up(real.class_names, len(real))
    except DataError:
        assumed = config.dry_run
        names = tuple(f"class {i}" for i in range(assumed.classes))
        return sources.made_up(names, assumed.train if split == "train" else assumed.val)


def experiment(config: Config, *, dry_run: bool = False) -> Experiment:
    """Builds all of a training run except its state.

    Args:
        config: of the run.
        dry_run: builds the first two steps of it, on made-up images, and a short evaluation.

    Raises:
        ConfigError: the config names something unknown or out of range.
        DataError: the images are not there or not as they should be.
    """
    _positive("checkpoint.keep", config.checkpoint.keep)
    if config.max_skipped < 0:
        raise ConfigError(f"config.max_skipped is {config.max_skipped}; it must be at least 0")
    step_shapes = shapes(config)
    if config.accum_reduction not in ("mean", "sum"):
        raise ConfigError(f"config.accum_reduction is {config.accum_reduction!r}; use mean or sum")
    if not 0.0 <= config.ema_decay < 1.0:
        raise ConfigError(
            f"config.ema_decay is {config.ema_decay}; it must be at least 0 and below 1"
        )
    with _reading("log.writers"):
        writers.check(config.log.writers)

    open_split = _made_up if dry_run else source
    train_source = open_split(config, "train")
    val_source = open_split(config, "val")

    def in_steps(key: str, text: str) -> int:
        with _reading(key):
            return schedule.duration(text, num_examples=len(train_source), steps=step_shapes.steps)

    total_steps = in_steps("duration", config.duration)
    _positive("duration", total_steps)
    warmup = in_steps("schedule.warmup", config.schedule.warmup)
    epochs = 1 + step_shapes.position(total_steps - 1) // len(train_source)
    epoch_starts = step_shapes.epoch_starts(len(train_source), epochs)
    optimizer_group = plain(config.optimizer)
    peak, layer_decay = optimizer_group.pop("lr"), optimizer_group.pop("layer_decay")
    curve_group = plain(config.schedule) | {"warmup": warmup}
    curve = _call(
        "schedule",
        schedule.SCHEDULES,
        curve_group,
        total=total_steps,
        peak=peak,
        epoch_starts=epoch_starts,
    )

    def optimizer(curve: schedule.Curve, instead: Mapping[str, ArrayLike]) -> optim.Optimizer:
        tx = _call("optimizer", optim.OPTIMIZERS, {**optimizer_group, **instead}, curve=curve)
        with _reading("optimizer"):
            tx = optim.layerwise(tx, layer_decay=layer_decay)
        if config.freeze_backbone:
            tx = optim.head_only(tx)
        return optim.loss_scaled(tx) if config.dtype == "float16" else tx

    tx = optimizer(curve, {})
    rates = {
        "learning_rate": np.asarray(curve(np.arange(total_steps)), np.float32),
        "weight_decay": np.asarray(optimizer_group["weight_decay"], np.float32),
    }
    used = network(config, train_source.class_names)
    run = Experiment(
        network=used,
        training=training(config, used, epoch_starts),
        train_source=train_source,
        val_source=val_source,
        transform=transform(config),
        shapes=step_shapes,
        tx=tx,
        curve=curve,
        rates=rates,
        optimizer=optimizer,
        seed=config.seed,
        accum=config.accum,
        accum_reduction=config.accum_reduction,
        max_skipped=config.max_skipped,
        batch_norm_momentum=_batch_norm_momentum(config, warmup, epoch_starts),
        ema_decay=config.ema_decay,
        init=config.init,
        teacher=config.teacher,
        freeze_backbone=config.freeze_backbone,
        evaluation=evaluation(config),
        workers=workers(config),
        max_corrupt=_share("max_corrupt", config.max_corrupt),
        mesh=mesh(config),
        mesh_rules=plain(config.mesh.rules),
        total_steps=total_steps,
        eval_every=in_steps("eval.every", config.eval.every),
        log_every=in_steps("log.every", config.log.every),
        save_every=in_steps("checkpoint.every", config.checkpoint.every),
        keep=config.checkpoint.keep,
        best=config.checkpoint.best,
        writers=tuple(config.log.writers),
    )
    return _shortened(run) if dry_run else run


def _shortened(run: Experiment) -> Experiment:
    total = min(2, run.total_steps)
    val_source = sources.made_up(run.network.class_names, run.evaluation["batch_size"])
    every = {"eval_every": total, "log_every": 1, "save_every": total}
    return run._replace(total_steps=total, val_source=val_source, writers=(), **every)
