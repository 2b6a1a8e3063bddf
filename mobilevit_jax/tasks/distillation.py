"""Losses against a teacher's logits, which a training model adds to the outputs of its student.

Each function takes a task and gives it another loss; how it mixes, evaluates and predicts stays.
Source: cvnets 0.4, losses soft_kl_loss and hard_distillation. There the labels count for nothing,
unless a composite loss adds the ordinary one: here that is `label_weight`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mobilevit_jax.tasks.classification import cross_entropy
from mobilevit_jax.tasks.task import Batch, Outputs, Task, masked_mean


def soft_kl(
    logits: Float[Array, "b k"], teacher_logits: Float[Array, "b k"], *, temperature: float
) -> Float[Array, " b"]:
    """T² KL(teacher || student) of each example in nats, both divided by the temperature T before.

    The square keeps the gradient's size whatever the temperature is (arXiv 1503.02531, section 2).
    """
    log_student = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    log_teacher = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    each = optax.losses.kl_divergence_with_log_targets(log_student, log_teacher)
    return temperature**2 * each


def hard_labels(
    logits: Float[Array, "b k"],
    teacher_logits: Float[Array, "b k"],
    *,
    top: int,
    label_smoothing: float,
) -> Float[Array, " b"]:
    """Cross-entropy of each example with the teacher's `top` best classes as its labels.

    For one it is that of classification. For more it is the sum over all classes of the binary one,
    whose target shares 1 - label_smoothing among the best, and label_smoothing among the others.
    """
    logits = logits.astype(jnp.float32)
    if top == 1:
        return cross_entropy(logits, teacher_logits.argmax(axis=-1), smoothing=label_smoothing)
    classes = logits.shape[-1]
    _, best = jax.lax.top_k(teacher_logits, top)  # b top
    among = jax.nn.one_hot(best, classes, dtype=bool).any(axis=-2)  # b k
    # With top = classes there are no others.
    rest = label_smoothing / max(classes - top, 1)
    target = jnp.where(among, (1.0 - label_smoothing) / top, rest)
    return optax.sigmoid_binary_cross_entropy(logits, target).sum(axis=-1)


def soft(
    task: Task,
    *,
    num_classes: int,
    temperature: float = 1.0,
    weight: float = 1.0,
    label_weight: float = 0.0,
) -> Task:
    """Learns the probabilities that the teacher gives.

    Args:
        task: what is learned.
        num_classes: not used.
        temperature: above 1 for softer probabilities, of both.
        weight: of the loss against the teacher.
        label_weight: of the task's own loss, which is added.

    Raises:
        ValueError: an argument out of range.
    """
    del num_classes
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")

    def each(outputs: Outputs) -> Float[Array, " b"]:
        return soft_kl(outputs["logits"], outputs["teacher_logits"], temperature=temperature)

    return _composite(task, each, weight=weight, label_weight=label_weight)


def hard(
    task: Task,
    *,
    num_classes: int,
    top: int = 1,
    label_smoothing: float = 0.0,
    weight: float = 1.0,
    label_weight: float = 0.0,
) -> Task:
    """Learns the classes that the teacher decides for.

    Args:
        task: what is learned.
        num_classes: of the student and the teacher.
        top: how many of the teacher's best classes are right.
        label_smoothing: share of the target that goes to other classes (with `top` of 1: to all).
        weight: of the loss against the teacher.
        label_weight: of the task's own loss, which is added.

    Raises:
        ValueError: an argument out of range.
    """
    if not 1 <= top <= num_classes:
        raise ValueError(f"top is {top}; it must be from 1 to the {num_classes} classes")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 1")

    def each(outputs: Outputs) -> Float[Array, " b"]:
        return hard_labels(
            outputs["logits"],
            outputs["teacher_logits"],
            top=top,
            label_smoothing=label_smoothing,
        )

    return _composite(task, each, weight=weight, label_weight=label_weight)


def _composite(
    task: Task,
    each: Callable[[Outputs], Float[Array, " b"]],
    *,
    weight: float,
    label_weight: float,
) -> Task:
    for name, value in (("weight", weight), ("label_weight", label_weight)):
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it must be at least 0")

    def loss(outputs: Outputs, batch: Batch) -> Float[Array, ""]:
        total = weight * masked_mean(each(outputs), batch["mask"])
        if label_weight:
            total += label_weight * task.loss(outputs, batch)
        return total

    return task._replace(loss=loss)
