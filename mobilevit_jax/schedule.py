"""Learning-rate curves, durations ("12 epochs") and the one rule for when something is due.

A curve is a pure function step -> learning rate; a run evaluates it once, for all steps. The curves
are those of the published recipes, the code of cvnets: they count optimiser steps from 0, warm up
linearly, and know of epochs only where they begin (`multiscale.Shapes.epoch_starts`), as batches
of several sizes make epochs of unequal length. cvnets rounds each rate to 8 decimals. Where a curve
is a value for each epoch, so does this file, in double precision; where it is one for each step it
does not: that would be up to 5e-9 of difference, and nothing at all in float32 above 0.08.
"""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

Curve = Callable[[ArrayLike], Array]
EpochStarts = Sequence[int] | np.ndarray  # first step of every epoch, from 0

UNITS = ("steps", "epochs", "examples")
BATCH_NORM_MOMENTUM = 0.1  # what a batch counts for, where nothing is annealed


def duration(text: str, *, num_examples: int, steps: Callable[[float], int]) -> int:
    """Steps in a duration such as "20000 steps", "300 epochs", "0.5 epochs" or "1e6 examples".

    Args:
        text: an amount and a unit, one of `UNITS`.
        num_examples: examples in an epoch.
        steps: how many steps it takes to see so many examples.

    Raises:
        ValueError: no amount, a negative one, or an unknown unit.
    """
    amount_text, _, unit = text.strip().partition(" ")
    unit = unit.strip()
    try:
        amount = float(amount_text)
    except ValueError:
        amount = -1.0
    if unit.rstrip("s") + "s" not in UNITS or not 0 <= amount < float("inf"):
        raise ValueError(
            f"{text!r} is no duration: write an amount and one of {', '.join(UNITS)}, "
            "for instance '20000 steps' or '300 epochs'"
        )
    if unit.startswith("step"):
        return round(amount)
    examples = amount * num_examples if unit.startswith("epoch") else amount
    return steps(examples)


def due(step: int, *, every: int, total: int) -> bool:
    """Whether something done `every` so many steps is due after `step`; always after the last one.

    `every=0` means only after the last step.
    """
    return step == total or (every > 0 and step > 0 and step % every == 0)


# --- curves ---------------------------------------------------------------------------------------


def cosine(
    *,
    peak: float,
    total: int,
    warmup: int,
    init: float,
    final: float,
    epoch_starts: EpochStarts = (0,),
) -> Curve:
    """Linear from `init` to `peak` over `warmup` steps, then half a cosine down to `final`.

    Source: Loshchilov and Hutter, SGDR (arXiv 1608.03983), without restarts; cvnets' form by
    iteration, whose period is one longer than the steps that are left: `final` would be the rate of
    step total + 1.

    Args:
        peak: rate at the end of the warm-up.
        total: steps of the run.
        warmup: steps of the warm-up.
        init: rate of step 0, if there is a warm-up.
        final: where the curve ends.
        epoch_starts: not used.

    Raises:
        ValueError: the warm-up is as long as the whole run.
    """
    del epoch_starts
    _check_warmup(warmup, total)

    def falling(step: ArrayLike) -> Array:
        share = jnp.clip((step - warmup) / (total - warmup + 1), 0.0, 1.0)
        return final + 0.5 * (peak - final) * (1 + jnp.cos(jnp.pi * share))

    return _warm_up(falling, warmup=warmup, init=init, peak=peak)


def cosine_by_epoch(
    *,
    peak: float,
    total: int,
    warmup: int,
    init: float,
    final: float,
    epoch_starts: EpochStarts,
    adjust_period: bool = False,
) -> Curve:
    """The cosine of every published MobileViT: a staircase, one rate for each epoch.

    In epoch e of E it is final + (peak - final) (1 + cos(pi e / E)) / 2: the last epoch's rate lies
    above `final`, and the curve does not begin where the warm-up ends but where it would be had
    there been none, so that the rate drops a little there. Source: cvnets, CosineScheduler with
    is_iteration_based off.

    Args:
        peak: rate at the end of the warm-up.
        total: steps of the run.
        warmup: steps of the warm-up.
        init: rate of step 0, if there is a warm-up.
        final: where the curve would be in epoch E.
        epoch_starts: first step of each of the E epochs.
        adjust_period: begin the cosine after the warm-up's last epoch w (0 without a warm-up), with
            (e - w - 1) / (E - w); cvnets' adjust_period_for_epochs, which no recipe sets.

    Raises:
        ValueError: the warm-up is as long as the whole run.
    """
    _check_warmup(warmup, total)
    epochs, late, spared = len(epoch_starts), 0, 0
    if adjust_period:
        spared = int(np.searchsorted(epoch_starts, max(warmup - 1, 0), side="right")) - 1
        late = spared + 1
    rates = [
        round(half_cosine(peak, final, (epoch - late) / (epochs - spared)), 8)
        for epoch in range(epochs)
    ]
    falling = by_epoch(rates, epoch_starts=epoch_starts)
    return _warm_up(falling, warmup=warmup, init=init, peak=peak)


def polynomial(
    *,
    peak: float,
    total: int,
    warmup: int,
    init: float,
    final: float,
    power: float = 0.9,
    epoch_starts: EpochStarts = (0,),
) -> Curve:
    """Linear from `init` to `peak` over `warmup` steps, then (1 - share done) ** power to `final`.

    Source: cvnets, PolynomialScheduler by iteration; the period is that of `cosine`.

    Raises:
        ValueError: the warm-up is as long as the whole run.
    """
    del epoch_starts
    _check_warmup(warmup, total)

    def falling(step: ArrayLike) -> Array:
        share = jnp.clip((step - warmup) / (total - warmup + 1), 0.0, 1.0)
        return final + (peak - final) * (1.0 - share) ** power

    return _warm_up(falling, warmup=warmup, init=init, peak=peak)


def multi_step(
    *,
    peak: float,
    total: int,
    warmup: int,
    init: float,
    milestones: Sequence[int],
    gamma: float = 0.1,
    epoch_starts: EpochStarts,
) -> Curve:
    """Linear from `init` to `peak` over `warmup` steps, then `peak` times gamma for each milestone.

    Args:
        peak: rate at the end of the warm-up.
        total: steps of the run.
        warmup: steps of the warm-up.
        init: rate of step 0, if there is a warm-up.
        milestones: epochs, from 0, with whose first step the rate falls.
        gamma: by how much.
        epoch_starts: first step of every epoch.

    Raises:
        ValueError: the warm-up is as long as the whole run.
    """
    _check_warmup(warmup, total)
    rates = [
        round(peak * gamma ** sum(epoch >= milestone for milestone in set(milestones)), 8)
        for epoch in range(len(epoch_starts))
    ]
    falling = by_epoch(rates, epoch_starts=epoch_starts)
    return _warm_up(falling, warmup=warmup, init=init, peak=peak)


def constant(
    *, peak: float, total: int, warmup: int, init: float, epoch_starts: EpochStarts = (0,)
) -> Curve:
    """Linear from `init` to `peak` over `warmup` steps, then `peak`."""
    del total, epoch_starts
    return _warm_up(lambda step: jnp.float32(peak), warmup=warmup, init=init, peak=peak)


SCHEDULES: dict[str, Callable[..., Curve]] = {
    "cosine": cosine,
    "cosine_by_epoch": cosine_by_epoch,
    "polynomial": polynomial,
    "multi_step": multi_step,
    "constant": constant,
}


def batch_norm_momentum(*, final: float, warmup: int, epoch_starts: EpochStarts) -> Curve:
    """What a batch counts for in the running statistics: 0.1, and after the warm-up ever less.

    Then it is, in epoch e of E, final + (0.1 - final) (1 + cos(pi e / E)) / 2, rounded to 6
    decimals. cvnets 0.1 does so, with 1e-6, whatever a recipe says: the published MobileViT v1 were
    trained so.

    Args:
        final: where the curve would be in epoch E; PyTorch's momentum, so above 0 and at most 0.1.
        warmup: steps at 0.1.
        epoch_starts: first step of each of the E epochs.

    Raises:
        ValueError: `final` out of range.
    """
    if not 0.0 < final <= BATCH_NORM_MOMENTUM:
        raise ValueError(f"{final} must be above 0 and at most {BATCH_NORM_MOMENTUM}")
    epochs = len(epoch_starts)
    values = [
        round(half_cosine(BATCH_NORM_MOMENTUM, final, epoch / epochs), 6) for epoch in range(epochs)
    ]
    falling = by_epoch(values, epoch_starts=epoch_starts)
    return _warm_up(falling, warmup=warmup, init=BATCH_NORM_MOMENTUM, peak=BATCH_NORM_MOMENTUM)


def by_epoch(values: Sequence[float], *, epoch_starts: EpochStarts) -> Curve:
    """A staircase: `values[e]` from step epoch_starts[e] to before step epoch_starts[e + 1]."""
    starts, table = np.asarray(epoch_starts, np.int32), np.asarray(values, np.float32)

    def curve(step: ArrayLike) -> Float[Array, "*steps"]:
        # For one step a few hundred comparisons, quicker to compile than a search that halves; for
        # all steps of a run they would fill the memory.
        method = "compare_all" if jnp.ndim(step) == 0 else "sort"
        after = jnp.searchsorted(starts, step, side="right", method=method)
        return jnp.asarray(table)[after - 1]

    return curve


def half_cosine(high: float, low: float, share: float) -> float:
    """From `high` at share 0 to `low` at share 1."""
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * share))


def _check_warmup(warmup: int, total: int) -> None:
    if warmup >= total:
        raise ValueError(f"a warm-up of {warmup} steps does not fit into a run of {total} steps")


def _warm_up(after: Curve, *, warmup: int, init: float, peak: float) -> Curve:
    """Linear from `init` towards `peak`, which it would reach at step `warmup`; then `after`."""

    def curve(step: ArrayLike) -> Float[Array, "*steps"]:
        step = jnp.asarray(step)
        rising = init + (peak - init) * step / max(warmup, 1)
        return jnp.where(step < warmup, rising, after(step))

    return curve
