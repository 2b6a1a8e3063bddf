"""Where arrays lie: the mesh, the rules, and a train step on any of them."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mobilevit_jax import sharding, steps, tree
from tests.nets import SPEC, Tiny
from tests.test_steps import TX, bind, make_batch

LARGEST = (("", "largest"),)


def shapes(**axes):
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in axes.items()}


def specs(abstract, fsdp, rules):
    placed = sharding.by_rules(abstract, sharding.make_mesh(fsdp), rules)
    return {name: leaf.sharding.spec for name, leaf in tree.flatten(placed).items()}


def test_mesh_groups_the_devices():
    assert dict(sharding.make_mesh().shape) == {"data": 4, "fsdp": 1}
    mesh = sharding.make_mesh(2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2}
    assert [device.id for device in mesh.devices.flat] == [0, 1, 2, 3]
    for fsdp in (3, 0, 8):
        with pytest.raises(ValueError, match=f"4 devices cannot be grouped by {fsdp}"):
            sharding.make_mesh(fsdp)


def test_largest_axis_that_can_be_divided():
    abstract = shapes(a=(3, 3, 64, 128), b=(256, 129), c=(129, 131), d=(2**14 - 2,), e=())
    assert specs(abstract, 2, LARGEST) == {
        "a": P(None, None, None, "fsdp"),
        "b": P("fsdp", None),
        "c": P(),  # odd
        "d": P(),  # small
        "e": P(),
    }
    assert set(specs(abstract, 1, LARGEST).values()) == {P()}


def test_first_rule_that_is_found_counts():
    abstract = {"params": shapes(head=(256, 256), stem=(256, 256)), "mu": shapes(head=(256, 256))}
    rules = (("params/stem", "none"), ("head$", 0), ("", "largest"))
    assert specs(abstract, 2, rules) == {
        "params/head": P("fsdp", None),
        "params/stem": P(),
        "mu/head": P("fsdp", None),
    }
    assert set(specs(abstract, 2, (("tail", 0),)).values()) == {P()}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("(", 0), r"'\(' is no regular expression"),
        (("head", 2), r"axis 2 of head \(6, 5\) cannot be divided by 2"),
        (("head", 1), r"axis 1 of head \(6, 5\) cannot be divided by 2"),
        (("head", "most"), "'most' is no axis: a number, 'largest' or 'none'"),
    ],
)
def test_rules_that_cannot_be_followed(rule, message):
    with pytest.raises(ValueError, match=message):
        specs(shapes(head=(6, 5)), 2, [rule])


def test_local_rows_are_in_order():
    rows = np.arange(24).reshape(8, 3)
    for fsdp in (1, 2, 4):
        mesh = sharding.make_mesh(fsdp)
        batch = sharding.put_batch({"rows": rows}, mesh)
        assert len(batch["rows"].addressable_shards) == 4
        np.testing.assert_array_equal(sharding.local_rows(batch["rows"]), rows)


def test_divided_parameters_learn_the_same():
    """Whatever is divided, the step is that of one device, up to the order of sums."""
    model = Tiny(num_classes=3)
    init = functools.partial(steps.init_state, 0, model=model, tx=TX, size=SPEC.size)
    batch = jax.device_get(make_batch(0, size=8))
    # By hand, because the net is too small for "largest".
    rules = (("stem/kernel$", 3), ("", "none"))

    def trained(fsdp):
        mesh = sharding.make_mesh(fsdp)
        placed = sharding.by_rules(jax.eval_shape(init), mesh, rules)
        shardings = sharding.shardings(placed)
        state = jax.jit(init, out_shardings=shardings)()
        step = jax.jit(
            bind(model, gather=sharding.gather(mesh)),
            out_shardings=(shardings, sharding.replicated(mesh)),
        )
        for _ in range(3):
            state, metrics = step(state, sharding.put_batch(batch, mesh))
        return state, metrics

    whole, whole_metrics = trained(1)
    for fsdp in (2, 4):
        divided, metrics = trained(fsdp)
        kernels = [leaf for path, leaf in tree.flatten(divided).items() if path.endswith("kernel")]
        assert any(not leaf.sharding.is_fully_replicated for leaf in kernels)
        mean = divided.ema["params"]["stem"]["kernel"]
        assert mean.addressable_shards[0].data.shape[3] * fsdp == mean.shape[3]
        for ours, theirs in zip(
            jax.tree.leaves((divided, metrics)),
            jax.tree.leaves((whole, whole_metrics)),
            strict=True,
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
