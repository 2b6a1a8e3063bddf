"""The project's train step as its loop runs it, on one batch that stays on the device."""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402
from models_peers import CLASSES, DECAY, EMA_DECAY, RATE, SMOOTHING  # noqa: E402

from configs import base  # noqa: E402
from mobilevit_jax import build, sharding, steps, train  # noqa: E402
from mobilevit_jax.models import zoo  # noqa: E402
from mobilevit_jax.tools import formats  # noqa: E402


class Built(NamedTuple):
    """A run, how its state begins, and the state's shapes and shardings."""

    run: build.Experiment
    init: Callable[[], steps.TrainState]
    abstract_state: steps.TrainState

    def state(self) -> steps.TrainState:
        """A fresh one, on the device."""
        return steps.run_once(self.init, sharding.shardings(self.abstract_state))


def config(
    network: str,
    *,
    size: tuple[int, int],
    batch_size: int,
    dtype: str = "float32",
    remat: Sequence[str] = (),
) -> Any:
    """The base config with a network of the zoo, without mixing, clipping and dropout."""
    entry, config = zoo.ZOO[network], base.get_config()
    fields = build.plain(zoo.fields(zoo.create(entry.family, num_classes=1, **entry.fields)))
    dropouts = dict.fromkeys(fields.keys() & {"dropout", "block_dropout"}, 0.0)
    with config.unlocked():
        config.model = ConfigDict({"name": entry.family, **fields, **dropouts})
        config.input = ConfigDict(formats.published_spec(entry.family, size)._asdict())
    config.batch_size = config.eval.batch_size = batch_size
    config.dtype, config.remat = dtype, tuple(remat)
    # The curve is an argument of the step, a number each: 300 epochs in small batches are too many.
    config.duration, config.schedule.warmup = "20000 steps", "10000 steps"
    config.optimizer.lr = config.schedule.init = RATE
    config.optimizer.weight_decay, config.optimizer.clip_norm = DECAY, 0.0
    config.task.label_smoothing, config.ema_decay = SMOOTHING, EMA_DECAY
    config.dry_run.classes = CLASSES
    return config


def built(config: Any) -> Built:
    """All of a run but its arrays; the images are made up."""
    run = build.experiment(config, dry_run=True)
    size = run.network.input_spec.size
    init = functools.partial(
        steps.init_state, run.seed, model=run.training.model, tx=run.tx, size=size
    )
    return Built(run, init, build.placed(jax.eval_shape(init), run))


def noise(batch_size: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """A batch on the host."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (batch_size, *size, 3), np.uint8),
        "label": rng.integers(0, CLASSES, batch_size, np.int32),
        "mask": np.ones(batch_size, bool),
    }


def lowered(built: Built) -> Any:
    """The train step, traced and not yet compiled."""
    run = built.run
    ((height, width, batch_size),) = run.shapes.table
    batch = sharding.abstract_batch(run.mesh, batch_size=batch_size, size=(height, width))
    rates = jax.device_put(run.rates, sharding.replicated(run.mesh))
    return train.program(run, built.abstract_state).lower(built.abstract_state, batch, rates=rates)


def stepping(
    built: Built, step: Callable[..., Any], state: steps.TrainState, batch: Mapping[str, np.ndarray]
) -> Callable[[], jax.Array]:
    """Takes one step after another when it is called, waits, and gives the loss.

    Args:
        built: the run.
        step: its program, jitted or compiled.
        state: the first, which is donated.
        batch: on the host; it is put on the device once.
    """
    rates = jax.device_put(built.run.rates, sharding.replicated(built.run.mesh))
    on_device = sharding.put_batch(batch, built.run.mesh)

    def advance() -> jax.Array:
        nonlocal state
        state, metrics = step(state, on_device, rates=rates)
        return jax.block_until_ready(metrics["loss"])

    return advance
