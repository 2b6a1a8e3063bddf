"""The pure steps on a tiny network: learning, averaging, accumulation, devices, resuming."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh

from mobilevit_jax import optim, schedule, sharding, steps, tree
from mobilevit_jax.models.distillation import TEACHER, Distillation
from mobilevit_jax.models.range_augment import PARAMS, RangeAugment
from mobilevit_jax.tasks import classification, distillation, range_augment
from tests.nets import SPEC, Tiny
from tests.weights import random_variables

CURVE = schedule.constant(peak=1e-2, total=100, warmup=0, init=0.0)
TX = optim.adamw(
    CURVE, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, decay_1d=False, clip_norm=1.0
)


def make_batch(seed, size=16):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, size).astype(np.int32)
    image = rng.integers(0, 60, (size, 8, 8, 3)).astype(np.uint8)
    image[np.arange(size), :, :, label] += 150  # the class is the brightest channel
    batch = {"image": image, "label": label, "mask": np.ones(size, bool)}
    return jax.tree.map(jnp.asarray, batch)


def bind(model, **changes):
    arguments = {
        "model": model,
        "task": classification.classification(),
        "tx": TX,
        "curve": CURVE,
        "input_spec": SPEC,
        "seed": 0,
        "ema_decay": 0.9,
        "accum": 1,
        "freeze_backbone": False,
    }
    return functools.partial(steps.train_step, **arguments | changes)


def init(model):
    return steps.init_state(0, model=model, tx=TX, size=SPEC.size)


def leaves_equal(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_a_step_that_is_not_finite_is_skipped():
    sound = classification.classification()

    def poisoned(outputs, batch):
        return sound.loss(outputs, batch) / (batch["label"][0] != 2)

    step = jax.jit(bind(Tiny(), task=sound._replace(loss=poisoned), skip_non_finite=True))
    plain = jax.jit(bind(Tiny()))
    good, bad = make_batch(0), make_batch(1)
    good["label"], bad["label"] = good["label"].at[0].set(1), bad["label"].at[0].set(2)
    before, _ = step(init(Tiny()), good)
    assert leaves_equal(before, plain(init(Tiny()), good)[0])
    after, metrics = step(before, bad)
    assert not np.isfinite(metrics["loss"])
    assert (int(before.step), int(after.step)) == (1, 2)
    # The learning rate goes on with the steps; Adam's count, of the updates it has seen, does not.
    *others, rate = after.opt_state
    assert int(rate.count) == 2
    opt_state = (*others, before.opt_state[-1])
    assert leaves_equal(after.replace(step=before.step, opt_state=opt_state), before)


def test_loss_on_one_batch_falls():
    step = jax.jit(bind(Tiny()))
    state, batch = init(Tiny()), make_batch(0)
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 30
    assert float(metrics["learning_rate"]) == pytest.approx(1e-2)


def test_average_holds_parameters_and_batch_statistics():
    before = init(Tiny())
    after, _ = jax.jit(bind(Tiny()))(before, make_batch(0))
    for part in ("params", "model_state"):
        want = jax.tree.map(
            lambda old, new: 0.9 * old + 0.1 * new, getattr(before, part), getattr(after, part)
        )
        for got, expected in zip(
            jax.tree.leaves(after.ema[part]), jax.tree.leaves(want), strict=True
        ):
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)
    assert not leaves_equal(before.model_state, after.model_state)


def test_accumulation_averages_gradients():
    model = Tiny(norm=False)  # batch statistics are those of the parts, so they would differ
    batch = make_batch(0)
    whole, metrics = jax.jit(bind(model))(init(model), batch)
    parts, metrics_of_parts = jax.jit(bind(model, accum=4))(init(model), batch)
    assert float(metrics["loss"]) == pytest.approx(float(metrics_of_parts["loss"]), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(
        float(metrics_of_parts["grad_norm"]), rel=1e-5
    )
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_accumulation_may_sum_gradients():
    """As cvnets does: the gradient is `accum` times that of the batch, and so is SGD's step."""
    model, batch = Tiny(norm=False), make_batch(0)
    tx = optim.sgd(
        CURVE, momentum=0.0, nesterov=False, weight_decay=0.0, decay_1d=False, clip_norm=0.0
    )
    before = steps.init_state(0, model=model, tx=tx, size=SPEC.size)
    whole, metrics = jax.jit(bind(model, tx=tx))(before, batch)
    summed = bind(model, tx=tx, accum=4, accum_reduction="sum")
    parts, metrics_of_parts = jax.jit(summed)(before, batch)
    assert float(metrics["loss"]) == pytest.approx(float(metrics_of_parts["loss"]), rel=1e-6)
    assert float(metrics_of_parts["grad_norm"]) == pytest.approx(
        4 * float(metrics["grad_norm"]), rel=1e-5
    )
    want = jax.tree.map(lambda old, new: old + 4 * (new - old), before.params, whole.params)
    for a, b in zip(jax.tree.leaves(parts.params), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accum", [1, 2])
def test_momentum_of_batch_norm_is_that_of_a_norm_with_it(accum):
    """Scaling the update of the running statistics equals a norm built with another momentum."""

    class Momentum(Tiny):
        @nn.compact
        def __call__(self, image, *, train=False):
            x = nn.Conv(8, (3, 3), strides=2, use_bias=False, name="stem")(image)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.97, name="norm")(x)
            x = nn.relu(x).mean(axis=(1, 2))
            return {"logits": nn.Dense(self.num_classes, name="head")(x)}

    batch, before = make_batch(0), init(Tiny())
    momentum = schedule.by_epoch([0.1, 0.03], epoch_starts=[0, 1])
    ours = jax.jit(bind(Tiny(), accum=accum, batch_norm_momentum=momentum))
    theirs = jax.jit(bind(Momentum(), accum=accum))
    plain, _ = jax.jit(bind(Tiny(), accum=accum))(before, batch)
    state, _ = ours(before, batch)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)  # 0.1 is what the norm has by itself
    # The second step is one with 0.03; parameters do not see the running statistics.
    want, _ = theirs(state, batch)
    got, _ = ours(state, batch)
    plain, _ = jax.jit(bind(Tiny(), accum=accum))(state, batch)
    assert not np.allclose(
        got.model_state["batch_stats"]["norm"]["var"],
        plain.model_state["batch_stats"]["norm"]["var"],
        rtol=1e-3,
    )
    for part in ("params", "model_state", "ema"):
        pairs = zip(
            jax.tree.leaves(getattr(got, part)), jax.tree.leaves(getattr(want, part)), strict=True
        )
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wrapped", [False, True])
def test_one_device_and_four_agree(wrapped):
    assert jax.device_count() == 4
    batch = make_batch(0)
    before, bound = taught() if wrapped else (init(Tiny()), bind(Tiny()))
    before, results = jax.device_get(before), []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = Mesh(np.asarray(devices).reshape(-1, 1), sharding.AXES)
        everywhere = sharding.replicated(mesh)
        state = jax.device_put(before, everywhere)
        step = jax.jit(bound, out_shardings=everywhere)
        for _ in range(3):
            state, metrics = step(state, sharding.put_batch(jax.device_get(batch), mesh))
        results.append((jax.device_get(state.params), float(metrics["loss"])))
    (one, one_loss), (four, four_loss) = results
    assert one_loss == pytest.approx(four_loss, rel=1e-5)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def taught(**changes):
    """A state and a step with all that may be around a network in training."""
    model = RangeAugment(Distillation(Tiny(), Tiny()))
    before = init(model)
    weights = jax.tree.map(jnp.asarray, random_variables(Tiny(), seed=1, size=SPEC.size))
    before = before.replace(model_state=before.model_state | {TEACHER: {"variables": weights}})
    task = range_augment.with_augmentation_loss(
        distillation.soft(classification.classification(), num_classes=3),
        target=range_augment.target_mse((40.0, 20.0), epoch_starts=[0, 2]),
        weight=1.0,
    )
    return before, bind(model, task=task, **changes)


@pytest.mark.parametrize(
    "changes",
    [{}, {"accum": 2, "batch_norm_momentum": schedule.by_epoch([0.05], epoch_starts=[0])}],
)
def test_a_teacher_stays_as_it_is_and_is_not_averaged(changes):
    before, step = taught(skip_non_finite=True, **changes)
    after, metrics = jax.jit(step)(before, make_batch(0))
    assert np.isfinite(metrics["loss"])
    assert leaves_equal(before.model_state[TEACHER], after.model_state[TEACHER])
    assert not leaves_equal(before.model_state["batch_stats"], after.model_state["batch_stats"])
    assert after.ema["model_state"].keys() == {"batch_stats"}
    for name, old in before.params[PARAMS].items():
        new, average = after.params[PARAMS][name], after.ema["params"][PARAMS][name]
        assert new != old
        assert float(average) == pytest.approx(0.9 * float(old) + 0.1 * float(new), abs=1e-7)
    alone = steps.abstract_variables(Tiny(), SPEC.size)
    for weights in ("raw", "ema"):
        assert tree.difference(alone, after.variables(weights)) == []


def test_a_student_comes_to_say_what_its_teacher_does():
    """Also where the labels say something else."""
    model = Distillation(Tiny(), Tiny())
    before, _ = taught()
    state = init(model)
    state = state.replace(model_state=before.model_state)
    task = distillation.soft(classification.classification(), num_classes=3)
    step, batch = jax.jit(bind(model, task=task)), make_batch(0)
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(("accum", "rows"), [(1, 16), (2, 8)])
def test_the_loss_is_told_the_step(accum, rows):
    task = classification.classification()._replace(
        loss=lambda outputs, batch: jnp.sum(batch["step"] + 0.0 * outputs["logits"].sum())
    )
    state = init(Tiny()).replace(step=jnp.asarray(7))
    _, metrics = jax.jit(bind(Tiny(), task=task, accum=accum))(state, make_batch(0))
    assert float(metrics["loss"]) == 7 * rows


def test_dropout_is_a_function_of_seed_and_step():
    model = Tiny(dropout=0.5)
    state, batch = init(model), make_batch(0)
    first = bind(model)(state, batch)[1]["loss"]
    assert float(bind(model)(state, batch)[1]["loss"]) == float(first)
    assert float(bind(model, seed=1)(state, batch)[1]["loss"]) != float(first)
    later = state.replace(step=state.step + 1)
    assert float(bind(model)(later, batch)[1]["loss"]) != float(first)


def test_a_frozen_backbone_keeps_its_parameters_and_statistics():
    model = Tiny(dropout=0.5)
    before, batch = init(model), make_batch(0)
    tx = optim.head_only(TX)
    before = before.replace(opt_state=tx.init(before.params))
    step = bind(model, tx=tx, freeze_backbone=True)
    after, _ = jax.jit(step)(before, batch)
    assert leaves_equal(before.params["stem"], after.params["stem"])
    assert leaves_equal(before.params["norm"], after.params["norm"])
    assert leaves_equal(before.model_state, after.model_state)
    assert not leaves_equal(before.params["head"], after.params["head"])


def test_eval_counts_valid_examples_only():
    model = Tiny()
    state, batch = init(model), make_batch(0)
    batch["mask"] = batch["mask"].at[10:].set(False)
    task = classification.classification()
    zeros = {name: jnp.zeros(()) for name in ("loss", "top1", "top5", "count")}
    step = functools.partial(steps.eval_step, model=model, task=task, input_spec=SPEC)
    totals, outputs = step(state.variables("raw"), zeros, batch)
    assert float(totals["count"]) == 10
    assert outputs["probability"].shape == (16, 3)
    short = {name: array[:10] for name, array in batch.items()}
    totals_of_short, _ = step(state.variables("raw"), zeros, short)
    assert float(totals["loss"]) == pytest.approx(float(totals_of_short["loss"]), rel=1e-6)


@pytest.mark.parametrize("part", [2, 8, 5, 16, 32])  # 5 and 32 do not divide a batch of 16
def test_inference_in_parts_is_that_of_the_whole_batch(part):
    model, task = Tiny(), classification.classification()
    state, batch = init(model), make_batch(0)
    batch["mask"] = batch["mask"].at[10:].set(False)
    variables, zeros = (
        state.variables("raw"),
        {n: jnp.zeros(()) for n in ("loss", "top1", "top5", "count")},
    )
    assert steps.number_of_parts(16, part) == {2: 8, 8: 2, 16: 1}.get(part, 1)

    def run(step, *arguments, **options):
        options |= {"model": model, "task": task, "input_spec": SPEC}
        return jax.jit(functools.partial(step, **options))(*arguments)

    whole = run(steps.eval_step, variables, zeros, batch)
    parts = run(steps.eval_step, variables, zeros, batch, part=part)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), whole, parts)
    predict = functools.partial(steps.predict_step, model=model, task=task, input_spec=SPEC)
    _, predicted = steps.in_parts(
        lambda image: ((), predict(variables, image)), batch["image"], part=part
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), whole[1], predicted)


def test_normalize():
    image = jnp.array([[[[0, 51, 255]]]], jnp.uint8)
    rgb = steps.normalize(image, SPEC)
    np.testing.assert_allclose(rgb[0, 0, 0], [0.0, 0.2, 1.0], rtol=1e-6)
    bgr = steps.normalize(
        image, SPEC._replace(channel_order="bgr", mean=(0.5, 0.0, 0.0), std=(0.5, 2.0, 1.0))
    )
    np.testing.assert_allclose(bgr[0, 0, 0], [1.0, 0.1, 0.0], rtol=1e-6)
