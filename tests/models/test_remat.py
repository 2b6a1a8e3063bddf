"""Stages that are computed again for the gradient: the same numbers, with less kept in between."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mobilevit_jax import steps
from mobilevit_jax.models import layers, mobilevit, mobilevit_v2, zoo

FAMILIES = {
    "mobilevit": {"variant": "xxs"},
    "mobilevit_v2": {"width": 0.25},
    "mobilenet_v1": {"width": 0.25},
    "mobilenet_v2": {"width": 0.25},
    "mobilenet_v3": {"variant": "small"},
}


def create(name, remat=()):
    return zoo.create(name, num_classes=3, remat=remat, **FAMILIES[name])


def train(model, variables, image):
    """Loss and (updated statistics), as a function of the parameters."""
    variables = dict(variables)
    params = variables.pop("params")

    def loss(params):
        logits, updated = model.apply(
            {"params": params, **variables},
            image,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(2)},
        )
        logits = logits["logits"] if isinstance(logits, dict) else logits
        return jnp.square(logits).sum(), updated

    return loss, params


def size_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_parameters_and_less_is_kept_for_the_gradient(name):
    def kept(model):
        def pullback(variables, image):
            loss, params = train(model, variables, image)
            return jax.vjp(loss, params, has_aux=True)[1]

        variables = steps.abstract_variables(model, (32, 32))
        image = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
        residuals = jax.eval_shape(pullback, variables, image)
        return variables, size_of(residuals) - size_of(variables["params"])

    variables, everything = kept(create(name))
    same_variables, rest = kept(create(name, layers.STAGES))
    assert same_variables == variables
    assert rest < 0.35 * everything


class Net(nn.Module):
    """One stage of either kind, with all that changes in training: statistics and dropout."""

    remat: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, image, *, train):
        shape = {"features": 8, "token_width": 8, "attention_layers": 1, "dropout": 0.3}
        stages = (
            layers.ConvNorm(8, name="stem"),
            mobilevit_v2.Stage(stride=1, blocks=1, **shape, name="layer_1"),
            mobilevit.Stage(stride=2, residuals=1, expansion=2, **shape, name="layer_2"),
        )
        for stage in stages:
            image = layers.run_stage(stage, image, train=train, remat=self.remat)
        return image


@pytest.mark.parametrize("remat", [("layer_1",), ("stem", "layer_1", "layer_2")])
def test_the_same_loss_gradients_statistics_and_dropout(remat):
    image = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))

    def compute(model):
        variables = jax.jit(model.init, static_argnames="train")(
            jax.random.key(0), image, train=False
        )
        loss, params = train(model, variables, image)
        program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params).compile()
        return variables, program(params), program.cost_analysis()["flops"]

    init, want, flops = compute(Net())
    same_init, got, more_flops = compute(Net(remat))
    jax.tree.map(np.testing.assert_array_equal, same_init, init)
    assert more_flops > 1.05 * flops
    # The same arithmetic, but for how the compiler fuses it.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
    (_, updated), _ = got
    changed = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), updated["batch_stats"], init["batch_stats"]
    )
    assert all(jax.tree.leaves(changed))


def test_the_table_of_stages_is_the_same():
    tables = (zoo.summary(create("mobilenet_v1", r), size=(32, 32)) for r in ((), layers.STAGES))
    assert next(tables) == next(tables)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_unknown_stage_is_refused(name):
    for remat in (("layer_1", "layer_6"), "stem"):
        message = re.escape(f"remat is {remat!r}") + ".*stem, layer_1, .*layer_5"
        with pytest.raises(ValueError, match=message):
            steps.abstract_variables(create(name, remat), (32, 32))
