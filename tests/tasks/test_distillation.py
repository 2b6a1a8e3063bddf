"""Losses against a teacher: hand-computed numbers, and PyTorch's."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from mobilevit_jax.tasks import classification, distillation
from tests import originals

RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(size=(2, 6, 5)).astype(np.float32) * 3
TASK = classification.classification(label_smoothing=0.1)


def batch_of(label, mask=None):
    mask = np.ones(len(label), bool) if mask is None else np.asarray(mask)
    return {"label": jnp.asarray(label, jnp.int32), "mask": jnp.asarray(mask)}


def loss_of(task, mask=None):
    outputs = {"logits": jnp.asarray(STUDENT), "teacher_logits": jnp.asarray(TEACHER)}
    return float(task.loss(outputs, batch_of([0, 1, 2, 3, 4, 0], mask)))


@pytest.mark.parametrize(("temperature", "want"), [(1.0, 0.192745), (2.0, 0.226532)])
def test_soft_by_hand(temperature, want):
    """Teacher (0.8, 0.2) and student (0.5, 0.5); at temperature 2 it says (2/3, 1/3)."""
    teacher = jnp.log(jnp.array([[0.8, 0.2]])) + 7.0
    loss = distillation.soft_kl(jnp.ones((1, 2)), teacher, temperature=temperature)
    assert loss.tolist() == pytest.approx([want], abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_is_that_of_torch(temperature):
    torch = originals.import_torch()
    student, teacher = torch.from_numpy(STUDENT), torch.from_numpy(TEACHER)
    want = temperature**2 * torch.nn.functional.kl_div(
        torch.nn.functional.log_softmax(student / temperature, dim=-1),
        torch.nn.functional.softmax(teacher / temperature, dim=-1),
        reduction="batchmean",
    )
    task = distillation.soft(TASK, num_classes=5, temperature=temperature)
    assert loss_of(task) == pytest.approx(float(want), rel=1e-5)


def test_hard_by_hand():
    logits = jnp.array([[2.0, 0.0, 0.0, 0.0]])
    teacher = jnp.array([[5.0, 6.0, -1.0, 0.0]])  # class 1, then 0
    total = math.log(math.exp(2) + 3)
    one = distillation.hard_labels(logits, teacher, top=1, label_smoothing=0.0)
    assert one.tolist() == pytest.approx([total])
    # 0.9 of class 1, and 0.1 evenly on all four, of which one has 2.
    one = distillation.hard_labels(logits, teacher, top=1, label_smoothing=0.1)
    assert one.tolist() == pytest.approx([total - 0.1 / 4 * 2])
    # Targets 0.45 0.45 0.05 0.05.
    two = distillation.hard_labels(logits, teacher, top=2, label_smoothing=0.1)
    want = math.log(1 + math.exp(2)) - 0.45 * 2 + 3 * math.log(2)
    assert want == pytest.approx(3.306369, abs=1e-6)
    assert two.tolist() == pytest.approx([want])
    # All classes are right: 0.25 each.
    four = distillation.hard_labels(logits, teacher, top=4, label_smoothing=0.0)
    assert four.tolist() == pytest.approx([math.log(1 + math.exp(2)) - 0.5 + 3 * math.log(2)])


def test_hard_is_that_of_torch():
    torch = originals.import_torch()
    student, teacher = torch.from_numpy(STUDENT), torch.from_numpy(TEACHER)
    want = torch.nn.functional.cross_entropy(student, teacher.argmax(-1), label_smoothing=0.2)
    task = distillation.hard(TASK, num_classes=5, label_smoothing=0.2)
    assert loss_of(task) == pytest.approx(float(want), rel=1e-5)

    target = torch.full((6, 5), 0.2 / 2).scatter(1, teacher.topk(3).indices, 0.8 / 3)
    want = 5 * torch.nn.functional.binary_cross_entropy_with_logits(student, target)
    task = distillation.hard(TASK, num_classes=5, top=3, label_smoothing=0.2)
    assert loss_of(task) == pytest.approx(float(want), rel=1e-5)


def test_weights_add_the_ordinary_loss():
    plain = loss_of(distillation.soft(TASK, num_classes=5))
    both = distillation.soft(TASK, num_classes=5, weight=0.5, label_weight=2.0)
    assert loss_of(both) == pytest.approx(0.5 * plain + 2.0 * loss_of(TASK), rel=1e-6)


def test_only_valid_examples_count_and_the_rest_of_the_task_stays():
    task = distillation.soft(TASK, num_classes=5)
    mask = [True, True, False, True, False, False]
    rows = jnp.asarray(STUDENT[mask]), jnp.asarray(TEACHER[mask])
    kept = distillation.soft_kl(*rows, temperature=1.0)
    assert loss_of(task, mask) == pytest.approx(float(kept.mean()), rel=1e-6)
    assert task._replace(loss=None) == TASK._replace(loss=None)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("soft", {"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ("soft", {"weight": -1.0}, "weight is -1.0"),
        ("hard", {"top": 0}, "top is 0; it must be from 1 to the 5 classes"),
        ("hard", {"top": 6}, "top is 6"),
        ("hard", {"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ("hard", {"label_weight": float("nan")}, "label_weight is nan"),
    ],
)
def test_arguments_out_of_range(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(distillation, kind)(TASK, num_classes=5, **arguments)
