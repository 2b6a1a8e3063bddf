"""A student that in training also says what a teacher makes of the same image.

Before editing: the student's parameters must keep the paths that they have without a teacher, for a
trained student is used alone. The teacher's variables are no parameters: they lie in a collection
of their own, which checkpoints hold and no optimiser, average or gradient ever reaches.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

TEACHER = "teacher"  # the collection


class View(NamedTuple):
    """What turns an image as the student takes it into one as the teacher takes it.

    First the channels are reversed, if at all; then each is scaled and moved.
    """

    reverse_channels: bool = False
    scale: tuple[float, ...] = (1.0, 1.0, 1.0)
    offset: tuple[float, ...] = (0.0, 0.0, 0.0)


class Distillation(nn.Module):
    """A student with its teacher; its parameters are those of the student, by path and value.

    A fresh teacher's weights are zeros, for others to fill in: all of its variables are the
    variable "variables" of the collection "teacher". (Hinton et al. 2015, arXiv 1503.02531)
    """

    student: nn.Module
    teacher: nn.Module
    view: View = View()

    def setup(self) -> None:
        """Put the student's parameters where those of this module are."""
        nn.share_scope(self, self.student)

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"], *, train: bool = False) -> dict[str, Any]:
        """Return the student's outputs, and in training `teacher_logits` (b, k).

        The teacher computes as in evaluation, on images of whatever size the student is given.
        """
        teacher = self.teacher.clone(parent=None)

        def zeros() -> dict[str, Any]:
            # Named: what it sows for those who look at it is left out.
            init = functools.partial(teacher.init, mutable=["params", "batch_stats"])
            shapes = jax.eval_shape(init, jax.random.key(0), image)
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), dict(shapes))

        variables = self.variable(TEACHER, "variables", zeros).value
        outputs = self.student(image, train=train)
        if not train:
            return outputs
        # Nothing of the teacher is differentiated, neither its weights nor what it is shown.
        variables, image = jax.lax.stop_gradient((variables, image))
        if self.view.reverse_channels:
            image = image[..., ::-1]
        image = image * jnp.asarray(self.view.scale) + jnp.asarray(self.view.offset)
        of_teacher: Any = teacher.apply(variables, image, train=False)
        return {**outputs, "teacher_logits": of_teacher["logits"]}
