"""Parts of the loop that need no training."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilevit_jax import checkpoint, sharding, steps, train
from mobilevit_jax.models.distillation import TEACHER, Distillation
from mobilevit_jax.models.range_augment import PARAMS, RangeAugment
from tests.nets import SPEC, Tiny
from tests.test_steps import TX


def state_of(model):
    return steps.init_state(0, model=model, tx=TX, size=SPEC.size)


def variables_of(state):
    return jax.tree.map(lambda leaf: np.asarray(leaf) + 1, state.variables("raw"))


def warm(state, variables):
    placed = sharding.by_rules(state, sharding.make_mesh(), ())
    return train._warm_start(state, variables, "somewhere", sharding.shardings(placed))


def test_warm_start_takes_all_weights():
    state = state_of(Tiny())
    variables = variables_of(state)
    started = warm(state, variables)
    for weights in ("raw", "ema"):
        jax.tree.map(np.testing.assert_array_equal, started.variables(weights), variables)


def test_warm_start_makes_the_head_anew_for_other_classes(capsys):
    variables = variables_of(state_of(Tiny(num_classes=7)))
    state = state_of(Tiny(num_classes=3))
    started = warm(state, variables)
    assert "a fresh head for 3 classes" in capsys.readouterr().err
    np.testing.assert_array_equal(started.params["head"]["kernel"], state.params["head"]["kernel"])
    np.testing.assert_array_equal(
        started.params["stem"]["kernel"], variables["params"]["stem"]["kernel"]
    )


def test_warm_start_leaves_what_is_around_the_network():
    variables = variables_of(state_of(Tiny()))
    state = state_of(RangeAugment(Distillation(Tiny(), Tiny())))
    started = warm(state, variables)
    for weights in ("raw", "ema"):
        jax.tree.map(np.testing.assert_array_equal, started.variables(weights), variables)
    assert started.params[PARAMS] == state.params[PARAMS]
    assert started.ema["params"].keys() == started.params.keys()
    assert started.ema["model_state"].keys() == {"batch_stats"}
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(started.model_state[TEACHER]))


def test_a_teacher_is_put_beside_its_student():
    state = state_of(Distillation(Tiny(), Tiny()))
    variables = variables_of(state_of(Tiny()))
    placed = sharding.shardings(sharding.by_rules(state, sharding.make_mesh(), ()))
    started = train._put_teacher(state, variables, "somewhere", placed)
    own = started.model_state[TEACHER]["variables"]
    jax.tree.map(np.testing.assert_array_equal, own, variables)
    assert started.params is state.params
    assert started.ema is state.ema
    variables["params"]["stem"]["kernel"] = np.zeros((5, 5, 3, 8))
    with pytest.raises(checkpoint.MismatchError, match="weights in somewhere are of another"):
        train._put_teacher(state, variables, "somewhere", placed)


def test_warm_start_refuses_another_network():
    variables = variables_of(state_of(Tiny()))
    variables["params"]["stem"]["kernel"] = np.zeros((5, 5, 3, 8))
    with pytest.raises(checkpoint.MismatchError, match=r"stem/kernel \(5, 5, 3, 8\)"):
        warm(state_of(Tiny()), variables)


def metrics(loss, norm=1.0):
    values = {"loss": loss, "grad_norm": norm, "learning_rate": 0.5}
    return {name: jnp.asarray(value) for name, value in values.items()}


def fetch(losses, *, skipped=0, max_skipped=0, told=None):
    """As after step 10."""
    pending = collections.deque(
        loss if isinstance(loss, dict) else metrics(loss) for loss in losses
    )
    note = [].append if told is None else told.append
    fetched = train._fetch(pending, 10, skipped=skipped, max_skipped=max_skipped, note=note)
    assert not pending
    return fetched


def test_fetch_averages_and_finds_the_first_bad_step():
    values, skipped = fetch([1.0, 3.0])
    assert values == {"train/loss": 2.0, "train/grad_norm": 1.0, "train/learning_rate": 0.5}
    assert skipped == 0
    for bad, step in (([1.0, np.nan, np.nan], 9), ([1.0, 1.0, np.inf], 10)):
        with pytest.raises(train.NonFiniteError, match=f"at step {step}$"):
            fetch(bad)
    with pytest.raises(train.NonFiniteError, match="grad_norm is inf at step 10"):
        fetch([1.0, metrics(1.0, np.inf)])


def test_an_overflow_is_no_error_while_the_scale_of_the_loss_can_fall():
    def scaled(norm, scale):
        return metrics(1.0, norm) | {"loss_scale": jnp.asarray(scale)}

    values, skipped = fetch([scaled(np.inf, 4.0), scaled(np.nan, 2.0), scaled(3.0, 1.0)])
    assert values["train/grad_norm"] == 3.0
    assert (values["train/skipped"], values["train/loss_scale"], skipped) == (2, 1.0, 0)
    with pytest.raises(train.NonFiniteError, match=r"grad_norm is inf at step 10$"):
        fetch([scaled(np.inf, 2.0), scaled(np.inf, 1.0)])
    _, skipped = fetch([scaled(np.inf, 2.0), scaled(np.inf, 1.0)], max_skipped=1)
    assert skipped == 1


def test_skipped_steps_are_told_and_counted_in_a_row():
    told = []
    values, skipped = fetch([1.0, np.nan, 3.0, np.inf, np.nan], max_skipped=2, told=told)
    assert values["train/loss"] == 2.0
    assert values["train/skipped"] == 3
    assert told == [
        "loss is nan at step 7: skipped",
        "loss is inf at step 9: skipped",
        "loss is nan at step 10: skipped",
    ]
    assert skipped == 2
    with pytest.raises(train.NonFiniteError, match="nan at step 9, after 2 skipped steps in a row"):
        fetch([np.nan, 1.0], skipped=skipped, max_skipped=2)
    values, skipped = fetch([1.0, np.nan], skipped=skipped, max_skipped=2)
    assert (values["train/loss"], skipped) == (1.0, 1)
