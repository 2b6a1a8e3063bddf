"""Optimisers as optax chains in reading order: clip, precondition, decay, learning rate.

The optimiser is the only thing that is chosen by name; all of them take the curve first and the
same two arguments for weight decay.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mobilevit_jax import tree
from mobilevit_jax.schedule import Curve

Optimizer = optax.GradientTransformation
HEAD_DEPTH = 6  # a stem and five stages lie below the head

# Of the loss in float16, as PyTorch's GradScaler has them; it halves without end.
FIRST_LOSS_SCALE = 65536.0
LOSS_SCALE_GROWTH_INTERVAL = 2000  # steps in a row without an overflow, then it doubles
LARGEST_LOSS_SCALE = 2.0**127  # doubled, this power of two would be infinite and stay so
SMALLEST_LOSS_SCALE = 1.0  # what overflows at this does so by itself


def decay_mask(params: tree.Tree, *, decay_1d: bool) -> tree.Tree:
    """Which parameters decay: all, or (`decay_1d=False`) all but those with exactly one axis.

    One axis have biases and the scales and shifts of norms. Source: spec of the cvnets recipes
    (`no_decay_bn_filter_bias`).
    """
    return jax.tree.map(lambda leaf: decay_1d or leaf.ndim != 1, params)


def _decay(weight_decay: float | jax.Array, decay_1d: bool) -> Optimizer:
    return optax.add_decayed_weights(
        weight_decay, mask=lambda params: decay_mask(params, decay_1d=decay_1d)
    )


def depth(path: str) -> int:
    """How deep in the network a parameter lies: 0 for the stem, i for layer_i, 6 above those."""
    top = path.partition("/")[0]
    if top == "stem":
        return 0
    return int(top.removeprefix("layer_")) if top.startswith("layer_") else HEAD_DEPTH


def layerwise(tx: Optimizer, *, layer_decay: float) -> Optimizer:
    """Learns slower the further a layer is from the head: by `layer_decay` for each step down.

    For fine-tuning; the classifier and the last convolution learn at the full rate. Source: ELECTRA
    (arXiv 2003.10555), appendix A, with the stem and the five stages as layers.

    Raises:
        ValueError: `layer_decay` is not above 0 and at most 1.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is {layer_decay}; it must be above 0 and at most 1")
    if layer_decay == 1:
        return tx

    def scale(updates: tree.Tree, params: tree.Tree | None) -> tree.Tree:
        del params
        return tree.map_with_path(
            lambda path, update: update * layer_decay ** (HEAD_DEPTH - depth(path)), updates
        )

    return optax.chain(tx, optax.stateless(scale))


def head_only(tx: Optimizer) -> Optimizer:
    """Leaves every parameter as it is but those of the classifier, the module `head`."""

    def label(params: tree.Tree) -> tree.Tree:
        return tree.map_with_path(
            lambda path, _: "train" if path.startswith("head/") else "freeze", params
        )

    return optax.multi_transform({"train": tx, "freeze": optax.set_to_zero()}, label)


class LossScaleState(NamedTuple):
    """Optimiser state of a run whose loss is scaled, so that float16 holds its small gradients.

    Attributes:
        inner: state of the optimiser itself.
        scale: the next step multiplies its loss by this, and divides its gradient.
        good_steps: since the scale last changed.
    """

    inner: optax.OptState
    scale: Float[Array, ""]
    good_steps: Int[Array, ""]


def loss_scaled(tx: Optimizer) -> Optimizer:
    """Keeps a loss scale beside the state of `tx`, and lets it grow with every update.

    Whoever computes gradients multiplies the loss by the state's scale, divides the gradients by it
    (they come here as they are of the loss), and where one of them is not finite takes no update
    but `skipped`. Source: mixed precision training (arXiv 1710.03740), section 3.2.
    """

    def init(params: tree.Tree) -> LossScaleState:
        return LossScaleState(
            inner=tx.init(params),
            scale=jnp.asarray(FIRST_LOSS_SCALE, jnp.float32),
            good_steps=jnp.zeros((), jnp.int32),
        )

    def update(
        updates: tree.Tree, state: tree.Tree, params: tree.Tree | None = None
    ) -> tuple[tree.Tree, tree.Tree]:
        updates, inner = tx.update(updates, state.inner, params)
        good_steps = state.good_steps + 1
        grows = good_steps == LOSS_SCALE_GROWTH_INTERVAL
        return updates, LossScaleState(
            inner=inner,
            scale=jnp.minimum(jnp.where(grows, 2.0, 1.0) * state.scale, LARGEST_LOSS_SCALE),
            good_steps=jnp.where(grows, 0, good_steps),
        )

    return optax.GradientTransformation(init, update)


def skipped(before: tree.Tree, after: tree.Tree) -> tree.Tree:
    """The state of an optimiser whose step is not taken: as before, but for what counts all steps.

    The learning rate goes on along its curve, as that of a scheduler beside PyTorch's GradScaler
    does, and a scale of the loss is halved.

    Args:
        before: the state before the step.
        after: the state that the step would have left.
    """
    if isinstance(before, LossScaleState):
        return LossScaleState(
            inner=skipped(before.inner, after.inner),
            scale=jnp.maximum(before.scale / 2.0, SMALLEST_LOSS_SCALE),
            good_steps=jnp.zeros_like(before.good_steps),
        )

    def counts_steps(node: tree.Tree) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda old, new: new if counts_steps(new) else old, before, after, is_leaf=counts_steps
    )


def _clip(clip_norm: float) -> Optimizer:
    return optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()


def adamw(
    curve: Curve,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float | jax.Array,
    decay_1d: bool,
    clip_norm: float,
) -> Optimizer:
    """AdamW with decoupled decay (arXiv 1711.05101), PyTorch's form: decay is scaled by the rate.

    Args:
        curve: learning rate by step.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: factor on the parameters.
        decay_1d: whether biases and norm parameters decay too.
        clip_norm: largest global L2 norm of the gradient; 0 for no clipping.
    """
    return optax.chain(
        _clip(clip_norm),
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        _decay(weight_decay, decay_1d),
        optax.scale_by_learning_rate(curve),
    )


def sgd(
    curve: Curve,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: float | jax.Array,
    decay_1d: bool,
    clip_norm: float,
) -> Optimizer:
    """SGD with momentum; decay is added to the gradient (coupled L2), as PyTorch does.

    Args:
        curve: learning rate by step.
        momentum: decay of the accumulated gradient.
        nesterov: whether to look ahead.
        weight_decay: factor on the parameters.
        decay_1d: whether biases and norm parameters decay too.
        clip_norm: largest global L2 norm of the gradient; 0 for no clipping.
    """
    return optax.chain(
        _clip(clip_norm),
        _decay(weight_decay, decay_1d),
        optax.trace(decay=momentum, nesterov=nesterov),
        optax.scale_by_learning_rate(curve),
    )


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": adamw,
    "sgd": sgd,
}
