"""The train, eval and predict steps: pure functions of state and batch.

They are called bare in tests; train.py and the tools bind the keyword arguments, jit, donate and
shard them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, UInt8

from mobilevit_jax import optim
from mobilevit_jax.data.transforms import InputSpec
from mobilevit_jax.models import distillation, range_augment
from mobilevit_jax.schedule import BATCH_NORM_MOMENTUM, Curve
from mobilevit_jax.tasks.task import Batch, Task
from mobilevit_jax.tree import Tree

# Collections of a model that change in training beside its parameters.
MODEL_STATE = ("batch_stats",)

T = TypeVar("T")


@struct.dataclass
class TrainState:
    """Everything that changes in training, arrays only; all of it is saved.

    Attributes:
        step: number of optimiser steps done, int32.
        params: parameters, float32.
        model_state: the other collections of the model (batch statistics, a teacher's weights).
        opt_state: optimiser state.
        ema: {"params", "model_state"}, the exponential moving average of both, where they change.
    """

    # Trees all of them: the same struct also holds shapes, shardings and numpy arrays.
    step: Tree
    params: Tree
    model_state: Tree
    opt_state: Tree
    ema: Tree

    def variables(self, weights: str) -> dict[str, Tree]:
        """What the network takes when it is used, with the "raw" or the "ema" weights.

        It is then without what is around it in training only, and so are the variables.
        """
        average = weights == "ema"
        params = self.ema["params"] if average else self.params
        model_state = self.ema["model_state"] if average else self.model_state
        own = {name: value for name, value in params.items() if name != range_augment.PARAMS}
        rest = {n: value for n, value in model_state.items() if n != distillation.TEACHER}
        return {"params": own, **rest}


def changing(model_state: Mapping[str, Tree]) -> dict[str, Tree]:
    """The collections that change in training."""
    return {name: value for name, value in model_state.items() if name in MODEL_STATE}


def normalize(image: UInt8[Array, "b h w 3"], input_spec: InputSpec) -> Float[Array, "b h w 3"]:
    """Scales uint8 RGB to 0..1, in the network's channel order, less mean, over std; float32."""
    x = image.astype(jnp.float32) / 255.0
    if input_spec.channel_order == "bgr":
        x = jnp.flip(x, -1)  # of an index with a step, a symbolic batch makes a gather
    if input_spec.mean != (0.0, 0.0, 0.0) or input_spec.std != (1.0, 1.0, 1.0):
        x = (x - jnp.asarray(input_spec.mean)) / jnp.asarray(input_spec.std)
    return x


def abstract_variables(model: nn.Module, size: tuple[int, int]) -> dict[str, Tree]:
    """Shapes and dtypes of a model's variables, for images of `size` (h, w)."""
    return jax.eval_shape(functools.partial(init_variables, model, 0, size))


def init_variables(model: nn.Module, seed: int, size: tuple[int, int]) -> dict[str, Tree]:
    """Fresh weights and statistics of a model, for images of `size` (h, w)."""
    variables = model.init(
        jax.random.key(seed),
        jnp.zeros((1, *size, 3)),
        # Named, so that what a model sows for those who look at it is no part of the state.
        mutable=["params", *MODEL_STATE, distillation.TEACHER],
    )
    return dict(variables)


def run_once(function: Callable[[], T], out_shardings: Tree = None) -> T:
    """Compiles and calls a function that nobody will call again, such as an initialiser.

    Args:
        function: of nothing.
        out_shardings: one, or a tree of them like the result; None for the default device.
    """
    # Without optimising, the CPU's compiler is done in a third of the time.
    options: dict[str, str | bool] = {}
    if jax.default_backend() == "cpu":
        options["xla_backend_optimization_level"] = "0"
    lowered = jax.jit(function, out_shardings=out_shardings).lower()
    return lowered.compile(compiler_options=options)()


def init_state(
    seed: int, *, model: nn.Module, tx: optax.GradientTransformation, size: tuple[int, int]
) -> TrainState:
    """Fresh weights for images of `size` (h, w); the average starts as a copy of them.

    A teacher has none yet (models/distillation.py).
    """
    variables = init_variables(model, seed, size)
    params = variables["params"]
    model_state = {name: value for name, value in variables.items() if name != "params"}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=tx.init(params),
        # Copied: the train step is donated its state, and a buffer cannot be donated twice.
        ema=jax.tree.map(jnp.copy, {"params": params, "model_state": changing(model_state)}),
    )


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    task: Task,
    tx: optax.GradientTransformation,
    curve: Curve,
    input_spec: InputSpec,
    seed: int,
    ema_decay: float,
    accum: int,
    freeze_backbone: bool,
    accum_reduction: str = "mean",
    batch_norm_momentum: Curve | None = None,
    skip_non_finite: bool = False,
    gather: Callable[[Tree], Tree] | None = None,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One optimiser step on one batch.

    Args:
        state: before the step.
        batch: `image` uint8, `label`, `mask`; b rows.
        model: network.
        task: loss and mixing.
        tx: optimiser; one of `optim.loss_scaled` has the loss scaled, and a step whose loss or
            gradient is no number is then skipped in any case.
        curve: learning rate by step, for the metrics (the optimiser holds it too).
        input_spec: what the network expects of its input.
        seed: all randomness is drawn from (seed, step), so no generator is part of the state.
        ema_decay: share of the average that is kept at each step, such as 0.9995.
        accum: the batch is worked on in this many equal parts; batch statistics are those of the
            parts.
        freeze_backbone: the network computes as in evaluation (running statistics, no dropout),
            for an optimiser that trains the head alone.
        accum_reduction: "mean" or "sum" of the parts' gradients. cvnets sums them; the loss among
            the metrics is the mean in any case.
        batch_norm_momentum: by step, what a batch counts for in the running statistics; None for
            what the network does by itself.
        skip_non_finite: where the loss or the gradient is no number, all but the number of the step
            and the learning rate stays as it was; the optimiser does not see such a step.
        gather: brings parameters that are divided among devices together for the network (left to
            itself, the compiler also divides activations and statistics); None where none is.

    Returns:
        The state after the step, and loss, grad_norm, learning_rate and, where the loss is scaled,
        loss_scale (that of this step) as scalars; loss and grad_norm are without the scale.
    """
    scaled = isinstance(state.opt_state, optim.LossScaleState)
    scale = state.opt_state.scale if scaled else 1.0
    rng_mix, rng_dropout = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
    given = {
        "image": normalize(batch["image"], input_spec),
        "step": jnp.full(batch["mask"].shape, state.step),
    }
    batch = task.mix(dict(batch) | given, rng_mix)

    def loss_fn(params: Tree, model_state: Tree, part: Batch, rng: jax.Array) -> tuple:
        variables = {"params": params, **model_state}
        outputs, changed = model.apply(
            gather(variables) if gather else variables,
            part["image"],
            train=not freeze_backbone,
            mutable=list(MODEL_STATE),
            rngs={"dropout": rng, "augment": jax.random.fold_in(rng, 0)},
        )
        if batch_norm_momentum is not None:
            # The network moved its running averages by BATCH_NORM_MOMENTUM times their distance to
            # the batch's statistics. As that is linear, a share of the way is a smaller momentum.
            share = batch_norm_momentum(state.step) / BATCH_NORM_MOMENTUM
            changed = jax.tree.map(
                lambda old, new: old + share * (new - old), changing(model_state), dict(changed)
            )
        loss = task.loss(outputs, part)
        return loss * scale, (loss, {**model_state, **changed})

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if accum == 1:
        (_, (loss, model_state)), grads = grad_fn(
            state.params, state.model_state, batch, rng_dropout
        )
    else:
        weight = 1.0 if accum_reduction == "sum" else 1.0 / accum
        # Part i takes rows i, i + accum, …: every device keeps its own rows.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accum, *x.shape[1:]).swapaxes(0, 1), batch
        )  # accum b/accum …

        def add_part(carry: tuple, part_and_rng: tuple) -> tuple[tuple, None]:
            loss, model_state, grads = carry
            part, rng = part_and_rng
            (_, (part_loss, model_state)), part_grads = grad_fn(
                state.params, model_state, part, rng
            )
            grads = jax.tree.map(lambda total, g: total + weight * g, grads, part_grads)
            return (loss + part_loss / accum, model_state, grads), None

        zero_grads = jax.tree.map(jnp.zeros_like, state.params)
        carry = (jnp.zeros((), jnp.float32), state.model_state, zero_grads)
        rngs = jax.random.split(rng_dropout, accum)
        (loss, model_state, grads), _ = jax.lax.scan(add_part, carry, (parts, rngs))

    grads = jax.tree.map(lambda g: g / scale, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = jax.tree.map(
        lambda average, new: average * ema_decay + new * (1.0 - ema_decay),
        state.ema,
        {"params": params, "model_state": changing(model_state)},
    )
    metrics = {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": curve(state.step),
    }
    if scaled:
        metrics["loss_scale"] = scale
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        model_state=model_state,
        opt_state=opt_state,
        ema=ema,
    )
    if skip_non_finite or scaled:
        finite = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])
        before = dataclasses.replace(
            state,
            step=new_state.step,
            opt_state=optim.skipped(state.opt_state, opt_state),
        )
        new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, before)
    return new_state, metrics


def number_of_parts(rows: int, part: int | None) -> int:
    """How many parts of `part` rows a batch is worked on in; one where they do not divide it."""
    return 1 if part is None or rows % part else max(rows // part, 1)


def in_parts(
    function: Callable[[Tree], tuple[Tree, Tree]], batch: Tree, *, part: int | None
) -> tuple[Tree, Tree]:
    """A function of a batch, worked on in parts of it.

    Args:
        function: of a batch: sums over its rows, and a tree of arrays of as many rows.
        batch: arrays of b rows.
        part: rows at a time (devices.images_at_a_time); see `number_of_parts`.

    Returns:
        The sums over all rows, and the rows in the batch's order.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    parts = number_of_parts(rows, part)
    if parts == 1:
        return function(batch)
    # Part i takes rows i, i + parts, …: every device keeps its own rows.
    split = jax.tree.map(
        lambda x: x.reshape(part, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )  # parts part …
    sums, results = jax.lax.map(function, split)
    results = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, *x.shape[2:]), results)
    return jax.tree.map(lambda total: total.sum(0), sums), results


def eval_step(
    variables: Mapping[str, Tree],
    totals: dict[str, Float[Array, "..."]],
    batch: Batch,
    *,
    model: nn.Module,
    task: Task,
    input_spec: InputSpec,
    part: int | None = None,
) -> tuple[dict[str, Float[Array, "..."]], dict[str, Array]]:
    """Adds one batch's sums over its valid examples to `totals`; gives the predictions as well.

    Predictions that nobody fetches cost next to nothing, and one program serves both uses. `part`
    is that of `in_parts`.
    """

    def run(batch: Batch) -> tuple[Tree, Tree]:
        outputs = model.apply(variables, normalize(batch["image"], input_spec), train=False)
        return task.sums(outputs, batch), task.predict(outputs)

    sums, predictions = in_parts(run, batch, part=part)
    return jax.tree.map(jnp.add, totals, sums), predictions


def predict_step(
    variables: Mapping[str, Tree],
    image: UInt8[Array, "b h w 3"],
    *,
    model: nn.Module,
    task: Task,
    input_spec: InputSpec,
) -> dict[str, Array]:
    """The task's predictions for uint8 RGB images."""
    return task.predict(model.apply(variables, normalize(image, input_spec), train=False))
