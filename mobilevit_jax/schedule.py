"""Learning-rate curves, durations ("12 epochs") and the one rule for when something is due.

A curve is a pure function step -> learning rate, evaluated inside the jitted train step.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

Curve = Callable[[ArrayLike], Array]

UNITS = ("steps", "epochs", "examples")


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


def cosine(*, peak: float, total: int, warmup: int, init: float, final: float) -> Curve:
    """Linear from `init` to `peak` over `warmup` steps, then half a cosine down to `final`.

    Source: Loshchilov and Hutter, SGDR (arXiv 1608.03983), without restarts.

    Raises:
        ValueError: the warm-up is as long as the whole run.
    """
    if warmup >= total:
        raise ValueError(f"a warm-up of {warmup} steps does not fit into a run of {total} steps")

    def curve(step: ArrayLike) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        rising = init + (peak - init) * step / max(warmup, 1)
        share = jnp.clip((step - warmup) / (total - warmup), 0.0, 1.0)
        falling = final + 0.5 * (peak - final) * (1 + jnp.cos(jnp.pi * share))
        return jnp.where(step < warmup, rising, falling)

    return curve


def constant(*, peak: float, total: int, warmup: int, init: float) -> Curve:
    """Linear from `init` to `peak` over `warmup` steps, then `peak`."""
    del total

    def curve(step: ArrayLike) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        return jnp.where(step < warmup, init + (peak - init) * step / max(warmup, 1), peak)

    return curve


SCHEDULES: dict[str, Callable[..., Curve]] = {
    "cosine": cosine,
    "constant": constant,
}
