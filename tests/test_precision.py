"""What stays float32 in half precision, and the scale of float16's loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mobilevit_jax import optim, schedule, steps
from mobilevit_jax.models import layers, mobilenet, mobilevit, mobilevit_v2, zoo
from mobilevit_jax.models.attention import SeparableSelfAttention
from mobilevit_jax.tasks import classification
from tests.nets import SPEC
from tests.originals import import_torch

HALF = ("bfloat16", "float16")
CURVE = schedule.constant(peak=1e-2, total=100, warmup=0, init=0.0)
SGD = {"momentum": 0.9, "nesterov": False, "weight_decay": 0.0, "decay_1d": False, "clip_norm": 0.0}
PLAIN = optim.sgd(CURVE, **SGD)
SCALED = optim.loss_scaled(PLAIN)


def relative_error(got, want):
    """Of two trees, by the norm over all leaves."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    error = sum(np.sum(np.square(np.asarray(a, np.float64) - b)) for a, b in pairs)
    return np.sqrt(error / sum(np.sum(np.square(np.asarray(b, np.float64))) for _, b in pairs))


# --- what is float32 in any case ------------------------------------------------------------------


def equations(jaxpr):
    """Of a program and of all that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for part in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def primitives(jaxpr, dtype):
    """Names of the operations that take an array of this type first."""
    found = set()
    for equation in equations(jaxpr):
        operand = getattr(equation.invars[0], "aval", None) if equation.invars else None
        if operand is not None and operand.dtype == dtype:
            found.add(equation.primitive.name)
    return found


# Sums, and what softmax, norms and the loss are made of. A sigmoid is one operation, "logistic".
DELICATE = {"reduce_sum", "reduce_max", "cumsum", "exp", "exp2", "log", "log1p", "rsqrt", "sqrt"}


@pytest.mark.parametrize("dtype", HALF)
def test_the_search_finds_a_softmax_in_half_precision(dtype):
    jaxpr = jax.make_jaxpr(jax.jit(jax.nn.softmax))(jnp.zeros((2, 3), dtype)).jaxpr
    assert {"reduce_max", "exp"} <= primitives(jaxpr, dtype)


@pytest.mark.parametrize(
    ("name", "fields", "dtype"),
    [
        ("mobilevit_v2", {"width": 0.25, "dropout": 0.1, "block_dropout": 0.1}, "bfloat16"),
        ("mobilevit", {"variant": "xxs"}, "float16"),
        ("mobilenet_v1", {"width": 0.25}, "bfloat16"),
        ("mobilenet_v2", {"width": 0.25}, "float16"),
        ("mobilenet_v3", {"variant": "small"}, "float16"),
    ],
)
def test_a_train_step_sums_and_exponentiates_in_float32(name, fields, dtype):
    """Softmax, statistics, context sum, pooling, loss, and the gradients' sums over positions."""
    model = zoo.create(name, num_classes=3, dtype=jnp.dtype(dtype), **fields)
    tx = SCALED if dtype == "float16" else PLAIN
    init = functools.partial(steps.init_state, 0, model=model, tx=tx, size=(32, 32))
    state = jax.eval_shape(init)
    batch = {
        "image": jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((4,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((4,), bool),
    }
    step = bind(model, tx)
    jaxpr, (after, metrics) = jax.make_jaxpr(step, return_shape=True)(state, batch)
    in_half = primitives(jaxpr.jaxpr, dtype)
    assert {"conv_general_dilated", "dot_general"} <= in_half
    assert not in_half & DELICATE
    assert {"exp", "log", "reduce_sum", "rsqrt"} <= primitives(jaxpr.jaxpr, "float32")
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(
        lambda leaf: leaf.dtype, state
    )
    kinds = {leaf.dtype for leaf in jax.tree.leaves((after.params, after.model_state, after.ema))}
    assert kinds == {leaf.dtype for leaf in metrics.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["conv", "linear"])
def test_the_gradient_of_a_bias_is_a_sum_of_all_positions(name, dtype):
    module = {"conv": layers.Conv(2, use_bias=True), "linear": layers.Linear(2)}[name]
    module = module.clone(dtype=dtype)
    x = jnp.zeros((4, 64, 64, 2), dtype)
    params = module.init(jax.random.key(0), x)
    y, pullback = jax.vjp(lambda params: module.apply(params, x), params)
    (gradient,) = pullback(jnp.full_like(y, 0.125))
    # Summed in bfloat16 these come to 32: adding an eighth to that leaves it as it is.
    np.testing.assert_array_equal(gradient["params"]["bias"], [0.125 * 4 * 64 * 64] * 2)


@pytest.mark.parametrize("dtype", HALF)
def test_the_context_is_a_sum_over_many_tokens(dtype):
    """Of 4096 patches, whose keys differ by less than half precision tells in their sum."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(1 + 0.1 * rng.standard_normal((1, 128, 128, 8)), dtype)
    params = SeparableSelfAttention().init(jax.random.key(0), jnp.zeros((1, 2, 2, 8)))

    def results(dtype):
        module = SeparableSelfAttention(dtype=dtype)
        y, pullback = jax.vjp(lambda params: module.apply(params, x.astype(dtype)), params)
        return np.asarray(y, np.float32), pullback(y)[0]

    (y, gradient), (want, want_gradient) = results(dtype), results("float32")
    assert relative_error(y, want) < {"bfloat16": 1e-2, "float16": 1e-3}[dtype]
    assert relative_error(gradient, want_gradient) < {"bfloat16": 1e-2, "float16": 1e-3}[dtype]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["batch", "group", "layer"])
def test_statistics_of_a_map_whose_squares_overflow(name, dtype):
    """In float16, and in bfloat16 they lose the variance."""
    module = {"batch": layers.BatchNorm, "group": layers.GroupNorm, "layer": layers.LayerNorm}[name]
    train = {"train": True} if name == "batch" else {}
    x = 1000 + 50 * jax.random.normal(jax.random.key(0), (2, 16, 16, 8)).astype(dtype)
    variables = module().init(jax.random.key(0), x, **train)

    def results(dtype):
        y, state = module(dtype=dtype).apply(variables, x, **train, mutable=["batch_stats"])
        return np.asarray(y, np.float32), state

    (y, state), (want, want_state) = results(dtype), results("float32")
    assert np.std(y) == pytest.approx(1, abs=0.01)
    np.testing.assert_allclose(y, want, atol={"bfloat16": 2e-2, "float16": 2e-3}[dtype])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, want_state)


def test_logits_that_half_precision_cannot_hold():
    logits = jnp.asarray([[1e5, 0.0], [1e5, 99_990.0]])
    loss = classification.cross_entropy(logits, jnp.asarray([1, 1]))
    np.testing.assert_allclose(loss, [1e5, 10 + np.log1p(np.exp(-10))], rtol=1e-5)
    assert loss.dtype == jnp.float32
    loss = classification.cross_entropy(jnp.asarray([[256.0, 255.0]], "bfloat16"), jnp.asarray([0]))
    np.testing.assert_allclose(loss, [np.log1p(np.exp(-1))], rtol=1e-5)


BLOCKS = {
    "squeeze": mobilenet.SqueezeInvertedResidual(mobilenet.V3Row(16, 32, True, True)),
    "mobilevit": mobilevit.MobileViTBlock(16, attention_layers=1),
    "mobilevit v2": mobilevit_v2.MobileViTV2Block(16, attention_layers=1),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_of_blocks_are_those_of_float32(name):
    block = BLOCKS[name]
    x, weight = jax.random.normal(jax.random.key(0), (2, 2, 16, 16, 16))
    variables = jax.jit(functools.partial(block.init, train=False))(jax.random.key(1), x)

    def gradients(dtype):
        def loss(params, x):
            y, _ = block.clone(dtype=dtype).apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return jnp.mean(y * weight) * scale

        scale = optim.FIRST_LOSS_SCALE if dtype == "float16" else 1.0
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(variables["params"], x)
        program = lowered.compile(compiler_options={"xla_backend_optimization_level": "0"})
        return jax.tree.map(lambda g: g / scale, program(variables["params"], x))

    want = gradients("float32")
    # A rounding is 0.4 % and 0.05 %. More than that comes of the few values that it carries over
    # the kink of a ReLU or of a hard sigmoid.
    assert relative_error(gradients("bfloat16"), want) < 2e-2
    assert relative_error(gradients("float16"), want) < 1e-2


# --- the scale of the loss ------------------------------------------------------------------------


class Net(nn.Module):
    """Convolution, attention and classifier of this package, in any precision."""

    dtype: str = "float16"

    @nn.compact
    def __call__(self, image, *, train=False):
        x = layers.ConvNorm(8, stride=2, dtype=self.dtype, name="stem")(image, train=train)
        x = x + SeparableSelfAttention(dtype=self.dtype, name="layer_1")(x)
        x = nn.relu(x).astype(jnp.float32).mean((1, 2))
        return {"logits": layers.Linear(3, name="head")(x)}


def times(factor):
    """The task with its loss multiplied by `factor(label)`."""
    sound = classification.classification()
    return sound._replace(
        loss=lambda outputs, batch: sound.loss(outputs, batch) * factor(batch["label"])
    )


def bind(model, tx, **changes):
    arguments = {
        "model": model,
        "task": classification.classification(),
        "tx": tx,
        "curve": CURVE,
        "input_spec": SPEC,
        "seed": 0,
        "ema_decay": 0.9,
        "accum": 1,
        "freeze_backbone": False,
    }
    return functools.partial(steps.train_step, **arguments | changes)


@functools.cache
def init(tx, dtype="float16"):
    return jax.jit(lambda: steps.init_state(0, model=Net(dtype), tx=tx, size=SPEC.size))()


def make_batch(label=None):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 8).astype(np.int32)
    image = rng.integers(0, 60, (8, 8, 8, 3)).astype(np.uint8)
    image[np.arange(8), :, :, labels] += 150  # the class is the brightest channel
    if label is not None:
        labels[0] = label
    batch = {"image": image, "label": labels, "mask": np.ones(8, bool)}
    return jax.tree.map(jnp.asarray, batch)


def poisoned(label):
    """No number where the first label is 2."""
    return 1.0 / (label[0] != 2)


def leaves_equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_the_scale_moves_as_that_of_pytorch(monkeypatch):
    torch = import_torch()
    monkeypatch.setattr(optim, "LOSS_SCALE_GROWTH_INTERVAL", 3)
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    step = jax.jit(bind(Net("float32"), SCALED, task=times(poisoned)))
    state = init(SCALED, "float32")
    for finite in [1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1]:
        state, metrics = step(state, make_batch(1 if finite else 2))
        assert float(metrics["loss_scale"]) == scaler.get_scale()
        optimizer.zero_grad()
        scaler.scale(weight.sum() * (1.0 if finite else float("inf"))).backward()
        scaler.step(optimizer)
        scaler.update()
        assert float(state.opt_state.scale) == scaler.get_scale()
    assert float(state.opt_state.scale) == 65536 * 2 / 2**3 * 2**2 / 2**4 * 2


def test_the_scale_doubles_after_2000_good_steps_within_bounds():
    step = jax.jit(bind(Net(), SCALED, task=times(poisoned)))

    def after(label, scale, good_steps):
        state = init(SCALED)
        opt_state = state.opt_state._replace(
            scale=jnp.asarray(scale), good_steps=jnp.asarray(good_steps, jnp.int32)
        )
        opt_state = step(state.replace(opt_state=opt_state), make_batch(label))[0].opt_state
        return float(opt_state.scale), int(opt_state.good_steps)

    assert init(SCALED).opt_state.scale == 65536
    assert after(1, 4.0, 1998) == (4.0, 1999)
    assert after(1, 4.0, 1999) == (8.0, 0)
    assert after(2, 4.0, 1999) == (2.0, 0)
    assert after(2, 1.0, 5) == (1.0, 0)
    updates = {"w": jnp.ones(2)}
    largest = SCALED.init(updates)._replace(
        scale=jnp.asarray(2.0**127), good_steps=jnp.asarray(1999)
    )
    assert float(SCALED.update(updates, largest, updates)[1].scale) == 2.0**127


@pytest.mark.parametrize("accum", [1, 2])
def test_a_step_that_overflows_moves_only_its_number_and_the_scale(accum):
    step = jax.jit(bind(Net(), SCALED, task=times(poisoned), accum=accum))
    before, metrics = step(init(SCALED), make_batch(1))
    assert np.isfinite(metrics["grad_norm"])
    after, metrics = step(before, make_batch(2))
    assert not np.isfinite(metrics["grad_norm"])
    assert (int(before.step), int(after.step)) == (1, 2)
    assert float(after.opt_state.scale) == float(before.opt_state.scale) / 2
    for part in ("params", "model_state", "ema"):
        assert leaves_equal(getattr(after, part), getattr(before, part))
    *inner, rate = after.opt_state.inner
    assert leaves_equal(inner, before.opt_state.inner[:-1])
    assert (int(before.opt_state.inner[-1].count), int(rate.count)) == (1, 2)  # with the steps
    assert not leaves_equal(before.params, init(SCALED).params)


def test_a_gradient_that_overflows_at_first_recovers_and_learns():
    """At 65536 the gradients are beyond the 65504 of float16; a smaller scale has room for them."""
    tx = optim.loss_scaled(optim.sgd(CURVE, **SGD | {"clip_norm": 1.0}))
    step = jax.jit(bind(Net(), tx, task=times(lambda label: 1000.0)))
    state, scales, losses = init(tx), [], []
    for _ in range(40):
        before = state.params
        state, metrics = step(state, make_batch())
        assert leaves_equal(state.params, before) == (not np.isfinite(metrics["grad_norm"]))
        scales.append(float(metrics["loss_scale"]))
        losses.append(float(metrics["loss"]))
    assert scales[:3] == [65536.0, 32768.0, 16384.0]
    assert 1.0 < scales[-1] == scales[-20] < 65536.0
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("accum", "reduction"), [(1, "mean"), (4, "sum")])
def test_loss_and_gradient_are_told_without_the_scale(accum, reduction):
    """And so small a gradient as this would be nothing in float16 without it."""
    small = {"task": times(lambda label: 1e-5), "accum": accum, "accum_reduction": reduction}

    def one_step(dtype, tx):
        state, metrics = jax.jit(bind(Net(dtype), tx, **small))(init(tx, dtype), make_batch())
        change = jax.tree.map(jnp.subtract, state.params, init(tx, dtype).params)
        return change, metrics

    want, want_metrics = one_step("float32", PLAIN)
    got, metrics = one_step("float16", SCALED)
    for name in ("loss", "grad_norm"):
        assert float(metrics[name]) == pytest.approx(float(want_metrics[name]), rel=3e-3)
    error = relative_error(jax.tree.leaves(got["stem"]), jax.tree.leaves(want["stem"]))
    assert error < 2e-2
    unscaled, _ = one_step("float16", PLAIN)
    lost = relative_error(jax.tree.leaves(unscaled["stem"]), jax.tree.leaves(want["stem"]))
    assert lost > 5 * error
    assert "loss_scale" not in want_metrics


@pytest.mark.parametrize("wrap", [lambda tx: optim.layerwise(tx, layer_decay=0.5), optim.head_only])
def test_scaling_changes_nothing_of_the_optimiser_in_it(wrap):
    """A power of two multiplied in and divided out leaves every bit of a float32 as it was."""
    plain, scaled = wrap(PLAIN), optim.loss_scaled(wrap(PLAIN))
    want, got = init(plain, "float32"), init(scaled, "float32")
    step, scaled_step = (jax.jit(bind(Net("float32"), tx)) for tx in (plain, scaled))
    for _ in range(3):
        want, _ = step(want, make_batch())
        got, _ = scaled_step(got, make_batch())
    assert not leaves_equal(want.params, init(plain, "float32").params)
    error = relative_error(got.params, want.params)
    assert error < 1e-6
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        got.opt_state.inner,
        want.opt_state,
    )
