"""Every published model by name: exact counts, and errors that say what to type."""

import flax.linen as nn
import jax.numpy as jnp
import pytest

from mobilevit_jax.models import zoo
from mobilevit_jax.models.layers import Conv, ConvNorm, Linear


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_counts_are_those_typed_in(name):
    entry = zoo.ZOO[name]
    model = zoo.create(entry.family, num_classes=entry.num_classes, **entry.fields)
    *stages, total = zoo.summary(model, size=entry.size)
    assert (total.name, total.shape) == ("total", (entry.num_classes,))
    assert (total.params, total.macs) == (entry.params, entry.macs)
    assert total.params == sum(row.params for row in stages)
    assert total.macs == sum(row.macs for row in stages)


def test_every_family_is_in_the_zoo():
    assert {entry.family for entry in zoo.ZOO.values()} == set(zoo.FAMILIES)


class TwoStages(nn.Module):
    @nn.compact
    def __call__(self, image, *, train=False):
        x = ConvNorm(4, stride=2, name="stem")(image, train=train)
        x = Conv(6, kernel_size=1, use_bias=True, name="mix")(x)
        x = ConvNorm(6, groups=6, name="filter")(x, train=train)
        return {"logits": Linear(5, name="head")(x.mean((1, 2))), "stages": ()}


def test_summary_counts_kernels_times_positions():
    rows = zoo.summary(TwoStages(), size=(7, 10))
    assert [(row.name, row.shape, row.params, row.macs) for row in rows] == [
        ("stem", (4, 5, 4), 27 * 4 + 8, 27 * 4 * 20),
        ("mix", (4, 5, 6), 24 + 6, 24 * 20),
        ("filter", (4, 5, 6), 9 * 6 + 12, 9 * 6 * 20),
        ("head", (5,), 30 + 5, 30),
        ("total", (5,), 116 + 30 + 66 + 35, 2160 + 480 + 1080 + 30),
    ]


def test_create_passes_fields_on():
    model = zoo.create("mobilevit_v2", num_classes=7, dtype=jnp.bfloat16, width=0.5, dropout=0.1)
    assert (model.num_classes, model.dtype, model.width) == (7, jnp.bfloat16, 0.5)
    assert (model.dropout, model.strides) == (0.1, (2, 1, 2, 2, 2, 2))


def test_create_names_what_there_is():
    with pytest.raises(ValueError, match=r"model 'mobilevitv2' is unknown; .*mobilevit_v2"):
        zoo.create("mobilevitv2", num_classes=10)
    with pytest.raises(ValueError, match=r"no field 'widht'; use one of .*strides.*width"):
        zoo.create("mobilevit_v2", num_classes=10, widht=0.5)
