"""Accuracy and calibration on test sets, whose labels need not be the network's classes.

A label stands for one or several classes that are right (`answers`), and belongs to a group, such
as a severity of a corruption. Everything is a sum on the device, vectors for bins and groups, so
that sums of batches add up to those of the set.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mobilevit_jax.tasks.task import Batch, Outputs, Task

BINS = 15  # of confidence, as in arXiv 1706.04599


def reached(
    logits: Float[Array, "b k"], own: Float[Array, " b"], place: Int[Array, " b"], *, top: int
) -> Float[Array, " b"]:
    """1.0 where fewer than `top` logits beside that at `place` are as large as `own`, or NaN."""
    # Left out by its place: the compiler may round the two copies of the same logit differently.
    others = jnp.arange(logits.shape[-1]) != place[:, None]  # b k
    rivals = jnp.sum(~(logits < own[:, None]) & others, axis=-1)
    return (rivals < top).astype(jnp.float32)


def with_scores(
    task: Task,
    *,
    answers: Int[np.ndarray, "m s"],
    classes: Int[np.ndarray, " c"] | None,
    group: Int[np.ndarray, " m"],
    groups: Sequence[str],
    baselines: Mapping[str, float],
) -> Task:
    """The task with the sums and the summary of a test set in place of its own.

    The metrics, of which accuracies, errors and ECE are shares of 1:

        loss         mean of -log(probability that the right classes have together), nats
        top1, top5   a right class is among the highest 1 or 5 logits of all
        top1_subset, top5_subset   the same among the logits of `classes`, where they are given
        ece          expected calibration error of the highest probability over all logits
        error/fog    top-1 error of a corruption: mean of its groups
        corruption_error   mean of these errors over the corruptions that have a baseline
        mce          mean of these errors over their baselines (mCE of arXiv 1903.12261)

    Args:
        task: of the network.
        answers: for each label the classes that are right, filled up with -1; labels without any
            are of examples that do not count.
        classes: to choose among for the metrics of the subset.
        group: of each label.
        groups: for each group the corruption that it belongs to.
        baselines: by corruption; none for sets without.
    """

    def sums(outputs: Outputs, batch: Batch) -> dict[str, Float[Array, "..."]]:
        logits = outputs["logits"].astype(jnp.float32)  # b k
        right = jnp.asarray(answers)[batch["label"]]  # b s
        there = right >= 0
        counts = batch["mask"] & there.any(axis=-1)
        each = jnp.take_along_axis(logits, jnp.maximum(right, 0), axis=-1)  # b s
        each = jnp.where(there, each, -jnp.inf)
        own = each.max(axis=-1)  # b
        place = jnp.take_along_axis(right, each.argmax(axis=-1)[:, None], axis=-1)[:, 0]  # b
        log_total = jax.nn.logsumexp(logits, axis=-1)
        first = reached(logits, own, place, top=1)
        values = {
            "loss": log_total - jax.nn.logsumexp(each, axis=-1),
            "top5": reached(logits, own, place, top=5),
        }
        if classes is not None:
            inside = np.isin(np.arange(logits.shape[-1]), classes)
            within = jnp.where(inside, logits, -jnp.inf)
            values |= {f"top{top}_subset": reached(within, own, place, top=top) for top in (1, 5)}
        confidence = jnp.exp(logits.max(axis=-1) - log_total)
        # Bin i is the confidences above i/15 up to (i+1)/15.
        bins = jnp.clip(jnp.ceil(confidence * BINS).astype(jnp.int32) - 1, 0, BINS - 1)
        number = jnp.asarray(group)[batch["label"]]
        totals = {name: _sum(value, counts) for name, value in values.items()}
        return totals | {
            "count": _sums_of(jnp.ones_like(first), number, counts, size=len(groups)),
            "top1": _sums_of(first, number, counts, size=len(groups)),
            "confidence_bins": _sums_of(confidence, bins, counts, size=BINS),
            "top1_bins": _sums_of(first, bins, counts, size=BINS),
        }

    def summarize(totals: Mapping[str, np.ndarray | float]) -> dict[str, float]:
        count = float(np.sum(totals["count"]))
        plain = {name: float(np.sum(totals[name])) for name in totals if "_bins" not in name}
        names = ["loss", "top1", "top5", *(name for name in plain if name.endswith("_subset"))]
        gaps = np.asarray(totals["top1_bins"]) - np.asarray(totals["confidence_bins"])
        return {
            **{name: _ratio(plain[name], count) for name in names},
            "ece": _ratio(float(np.abs(gaps).sum()), count),
            **(_corruption_errors(totals, groups, baselines) if baselines else {}),
        }

    return task._replace(sums=sums, summarize=summarize)


def _sum(value: Float[Array, " b"], counts: Bool[Array, " b"]) -> Float[Array, ""]:
    # Padding rows may hold anything, NaN included, so they are replaced and not multiplied.
    return jnp.sum(jnp.where(counts, value, 0.0))


def _sums_of(
    value: Float[Array, " b"], place: Int[Array, " b"], counts: Bool[Array, " b"], *, size: int
) -> Float[Array, " size"]:
    """Sums by place."""
    here = jax.nn.one_hot(place, size, dtype=bool) & counts[:, None]  # b size
    return jnp.sum(jnp.where(here, value[:, None], 0.0), axis=0)


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan


def _corruption_errors(
    totals: Mapping[str, np.ndarray | float], groups: Sequence[str], baselines: Mapping[str, float]
) -> dict[str, float]:
    top1, count = np.atleast_1d(totals["top1"]), np.atleast_1d(totals["count"])
    errors = {
        name: float(
            np.mean(
                [
                    1.0 - _ratio(float(top1[i]), float(count[i]))
                    for i, of in enumerate(groups)
                    if of == name
                ]
            )
        )
        for name in dict.fromkeys(groups)
    }
    metrics = {f"error/{name}": error for name, error in errors.items()}
    known = [name for name in errors if name in baselines]
    if known:
        metrics["corruption_error"] = float(np.mean([errors[name] for name in known]))
        metrics["mce"] = float(np.mean([errors[name] / baselines[name] for name in known]))
    return metrics
