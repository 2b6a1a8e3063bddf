"""A student with a teacher: the same student, and a teacher that nothing changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilevit_jax import build, steps, tree
from mobilevit_jax.models import zoo
from mobilevit_jax.models.distillation import TEACHER, Distillation, View
from mobilevit_jax.models.range_augment import PARAMS, RangeAugment
from tests.nets import SPEC, Tiny
from tests.weights import random_variables

SIZE = (32, 32)
IMAGE = jnp.asarray(np.random.default_rng(0).random((4, *SIZE, 3), np.float32))
SAME = View()


def taught(student, teacher, view=SAME):
    """The module, its variables with a teacher of random weights, and these weights."""
    model = Distillation(student, teacher, view)
    variables = steps.init_variables(model, 0, SIZE)
    weights = random_variables(teacher, seed=1, size=SIZE)
    assert tree.difference(weights, variables[TEACHER]["variables"]) == []
    return model, variables | {TEACHER: {"variables": weights}}, weights


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_parameters_keep_their_paths(family):
    student = zoo.create(family, num_classes=3)
    model = RangeAugment(Distillation(student, Tiny()))
    variables = steps.abstract_variables(model, SIZE)
    alone = steps.abstract_variables(student, SIZE)
    assert tree.difference(alone, variables | {"params": alone["params"]}) == [
        f"+ {path} {shape}"
        for path, shape in sorted(
            (f"teacher/variables/{path}", leaf.shape)
            for path, leaf in tree.flatten(steps.abstract_variables(Tiny(), SIZE)).items()
        )
    ]
    ranges = variables["params"].pop(PARAMS)
    assert tree.difference(alone["params"], variables["params"]) == []
    assert len(ranges) == 6


def test_the_student_is_what_it_is_alone():
    student = Tiny(dropout=0.5)
    model, variables, _ = taught(student, Tiny())
    alone = steps.init_variables(student, 0, SIZE)
    assert variables.keys() == alone.keys() | {TEACHER}
    for name, value in alone.items():
        jax.tree.map(np.testing.assert_array_equal, variables[name], value)
    how = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(1)}}
    outputs, changed = model.apply(variables, IMAGE, **how)
    want, want_changed = student.apply(alone, IMAGE, **how)
    np.testing.assert_array_equal(outputs["logits"], want["logits"])
    jax.tree.map(np.testing.assert_array_equal, dict(changed), dict(want_changed))
    assert outputs.keys() == want.keys() | {"teacher_logits"}
    assert model.apply(variables, IMAGE).keys() == want.keys()


def test_the_teacher_computes_as_in_evaluation():
    teacher = Tiny(dropout=0.5)
    model, variables, weights = taught(Tiny(), teacher)
    outputs, _ = model.apply(variables, IMAGE, train=True, mutable=["batch_stats"])
    want = teacher.apply(weights, IMAGE, train=False)["logits"]
    np.testing.assert_array_equal(outputs["teacher_logits"], want)
    assert np.abs(want).max() > 0.1


def test_the_teacher_gets_no_gradient_and_gives_none_to_the_image():
    model, variables, _ = taught(Tiny(), Tiny())

    def total(variables, image):
        outputs, _ = model.apply(variables, image, train=True, mutable=["batch_stats"])
        return outputs["teacher_logits"].sum()

    gradients = jax.grad(total, argnums=(0, 1))(variables, IMAGE)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_the_teacher_sees_images_as_it_wants_them(order):
    """Normalised for the student and turned, an image is as if normalised for the teacher."""
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8))
    students = SPEC._replace(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5), channel_order="bgr")
    teachers = SPEC._replace(mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 2.0), channel_order=order)
    view = build._view(students, teachers)
    model, variables, weights = taught(Tiny(), Tiny(), view)
    outputs, _ = model.apply(
        variables, steps.normalize(pixels, students), train=True, mutable=["batch_stats"]
    )
    want = Tiny().apply(weights, steps.normalize(pixels, teachers))["logits"]
    np.testing.assert_allclose(outputs["teacher_logits"], want, rtol=1e-5, atol=1e-5)
    other = Tiny().apply(weights, steps.normalize(pixels, students))["logits"]
    assert np.abs(want - other).max() > 0.1


def test_the_same_input_is_left_as_it_is():
    assert build._view(SPEC, SPEC) == SAME
