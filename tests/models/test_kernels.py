"""The CPU kernels against the layers they stand for, gradients included; what they leave alone.

The suite sees four devices, where networks do without the kernels; `kernels.use(True)` asks for
them all the same.
"""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mobilevit_jax.models import attention, kernels, layers, zoo
from mobilevit_jax.models.convolution import conv, depthwise_conv, pointwise_conv
from mobilevit_jax.models.kernels import Finish
from tests.weights import random_variables


@pytest.fixture(autouse=True, scope="module")
def compiled():
    reason = kernels.library().reason
    if "no compiler" in reason:
        pytest.skip(reason)
    assert not reason


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def both_ways(function, *operands):
    """Compares value and gradients of a function with and without the kernels; gives the value.

    Operands are arrays, or trees of them.
    """

    def all_of(*operands):
        y, pullback = jax.vjp(function, *operands)
        (cotangent,) = arrays(y.shape, seed=1)
        return y, *jax.tree.leaves(pullback(cotangent))

    results = {}
    for wanted in (True, False):
        with kernels.use(wanted):
            # Alone, too: a value that is not differentiated may take another way.
            alone = jax.jit(lambda *operands: function(*operands))(*operands)
            text = jax.jit(partial(all_of)).lower(*operands).as_text()
            results[wanted] = (alone, *jax.jit(lambda *operands: all_of(*operands))(*operands))
        assert ("mobilevit_jax.kernels" in text) is wanted
    for got, want in zip(results[True], results[False], strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert np.abs(got - want).max() <= 1e-5 * max(np.abs(want).max(), 1e-3)
    return results[True][0]


FINISHES = [(False, False, None), (False, True, None), (True, True, jnp.tanh)]
FINISHES += [(True, True, activation) for activation in kernels.ACTIVATIONS]
FINISHES += [(False, True, nn.silu), (False, False, nn.relu)]


@pytest.mark.parametrize(("scaled", "shifted", "activation"), FINISHES)
def test_all_that_follows_a_convolution(scaled, shifted, activation):
    x, kernel, scale, shift, added = arrays((2, 5, 7, 24), (24, 40), (40,), (40,), (2, 5, 7, 40))

    def function(x, kernel, scale, shift, added):
        finish = Finish(scale if scaled else None, shift if shifted else None, activation)
        return pointwise_conv(x, kernel, finish._replace(added=added if shifted else None))

    both_ways(function, x, kernel, scale, shift, added)


def test_what_is_added_to_a_map():
    x, cube, filters, added = arrays((2, 8, 6, 24), (3, 3, 24, 24), (3, 3, 1, 24), (2, 4, 3, 24))

    def function(x, cube, filters, added):
        finish = Finish(activation=nn.silu, added=added)
        y = conv(x, cube, stride=2, finish=finish)
        return y + depthwise_conv(x, filters, stride=2, dilation=1, finish=finish)

    both_ways(lambda *each: jax.checkpoint(partial(function))(*each), x, cube, filters, added)


@pytest.mark.parametrize(
    ("rows", "depth", "features"),
    [(1, 1, 2), (1, 512, 1000), (7, 3, 5), (100, 24, 33), (1500, 40, 72), (700, 65, 64)],
)
def test_pointwise(rows, depth, features):
    both_ways(pointwise_conv, *arrays((rows, depth), (depth, features)))


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "dilation", "channels"),
    [
        ((9, 7), 3, 1, 1, 5),
        ((9, 7), 3, 2, 1, 24),
        ((9, 7), 3, 1, 2, 16),
        ((9, 7), 3, 2, 2, 24),
        ((8, 12), 5, 1, 1, 24),
        ((8, 11), 5, 2, 1, 40),
        ((1, 2), 3, 1, 1, 24),
        ((2, 1), 5, 2, 2, 7),
    ],
)
def test_depthwise(size, kernel_size, stride, dilation, channels):
    x, kernel, scale, shift = arrays(
        (3, *size, channels), (kernel_size, kernel_size, 1, channels), (channels,), (channels,)
    )

    def function(x, kernel, scale, shift):
        finish = Finish(scale, shift, nn.silu)
        return depthwise_conv(x, kernel, stride=stride, dilation=dilation, finish=finish)

    both_ways(function, x, kernel, scale, shift)


@pytest.mark.parametrize(
    ("size", "stride", "dilation", "channels", "features"),
    [
        ((9, 7), 1, 1, 3, 16),
        ((9, 7), 2, 1, 24, 40),
        ((10, 8), 2, 1, 3, 16),
        ((8, 33), 1, 2, 40, 7),
        ((1, 2), 2, 1, 24, 40),
    ],
)
def test_dense(size, stride, dilation, channels, features):
    x, kernel, shift = arrays((2, *size, channels), (3, 3, channels, features), (features,))

    def function(x, kernel, shift):
        return conv(x, kernel, stride=stride, dilation=dilation, finish=Finish(shift=shift))

    both_ways(function, x, kernel, shift)


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2, 3)])
@pytest.mark.parametrize("shape", [(3, 40, 33, 40), (2, 2, 2, 3)])
def test_norms(shape, axes, activation):
    x, scale, bias = arrays(shape, shape[-1:], shape[-1:])

    def function(x, scale, bias):
        return layers._norm(3 * x + 5, scale, bias, axes, activation)[0]

    both_ways(function, x, scale, bias)
    with kernels.use(True):
        _, mean, variance = layers._norm(3 * x + 5, scale, bias, axes, activation)
    np.testing.assert_allclose(mean, (3 * x + 5).mean(axes, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(variance, (3 * x).var(axes, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 7, 5, 40), (1, 1, 1, 3), (700, 16)])
def test_layer_norm(shape):
    x, scale, bias = arrays(shape, shape[-1:], shape[-1:])
    params = {"scale": scale, "bias": bias}
    norm = layers.LayerNorm()
    both_ways(lambda x, params: norm.apply({"params": params}, 3 * x + 5), x, params)


def test_a_small_variance_beside_a_large_mean():
    (x,) = arrays((1, 64, 64, 16))
    x = 1000 + 0.01 * x
    with kernels.use(True):
        _, _, variance = layers._norm(x, jnp.ones(16), jnp.zeros(16), (0, 1, 2), None)
    want = np.asarray(x, np.float64).var((0, 1, 2), keepdims=True)
    np.testing.assert_allclose(variance, want, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "channels", "heads"), [((4, 6), 24, 4), ((2, 2), 8, 1), ((16, 12), 60, 2)]
)
def test_attention(size, channels, heads):
    module = attention.MultiHeadSelfAttention(heads=heads)
    (x,) = arrays((2, *size, channels))
    params = module.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: 3 * leaf, params)
    both_ways(lambda x: module.apply({"params": params}, x), x)
    with kernels.use(True):  # whoever wants to see the scores sees them
        _, seen = module.apply({"params": params}, x, mutable=["attention"])
    assert seen["attention"]["scores"][0].shape[:3] == (2, 4, heads)


@pytest.mark.parametrize(("size", "other"), [((8, 12), None), ((2, 2), (6, 4)), ((36, 34), None)])
def test_separable_attention(size, other):
    module = attention.SeparableSelfAttention()
    x, source = arrays((2, *size, 40), (2, *(other or size), 40))
    params = jax.tree.map(lambda leaf: 3 * leaf, module.init(jax.random.key(0), x)["params"])
    both_ways(lambda x, params: module.apply({"params": params}, x, added=x), x, params)
    both_ways(lambda x, source: module.apply({"params": params}, x, source), x, source)
    with kernels.use(True):  # whoever wants to see the scores sees them
        _, seen = module.apply({"params": params}, x, mutable=["attention"])
    np.testing.assert_allclose(seen["attention"]["scores"][0].sum((1, 2)), 4, rtol=1e-5)


@pytest.mark.parametrize("activation", [nn.silu, nn.relu6])
@pytest.mark.parametrize(
    ("size", "stride", "features"),
    [((64, 64), 1, 8), ((64, 64), 2, 12), ((33, 47), 2, 8), ((96, 3), 1, 24), ((1, 5), 1, 8)],
)
def test_inverted_residual(size, stride, features, activation, monkeypatch):
    monkeypatch.setattr(layers, "LARGE_MAP", 0)
    module = layers.InvertedResidual(features, stride, expansion=8, activation=activation)
    (x,) = arrays((2, *size, 8))
    abstract = jax.eval_shape(partial(module.init, train=False), jax.random.key(0), x)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(0.5 + rng.random(leaf.shape, np.float32)), abstract
    )
    variables["params"] = jax.tree.map(lambda leaf: leaf - 0.9, variables["params"])
    both_ways(lambda x: module.apply(variables, x, train=False), x)
    with kernels.use(True):
        text = jax.jit(partial(module.apply, train=False)).lower(variables, x).as_text()
    assert text.count("mobilevit_jax.kernels") == 1  # one call does it all


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050", "mobilenetv2_050"])
def test_whole_networks(name):
    entry, size = zoo.ZOO[name], (128, 96)
    model = zoo.create(entry.family, num_classes=10, **entry.fields)
    variables = random_variables(model, seed=0, size=size)
    (image,) = arrays((2, *size, 3))

    def gradients(params):
        def loss(params):
            outputs, _ = model.apply(
                {**variables, "params": params},
                image,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )
            return jax.nn.log_softmax(outputs["logits"])[:, 0].sum()

        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.grad(loss)(params))])

    logits, slopes = {}, {}
    smooth = not name.startswith("mobilenet")  # a kink turns a rounding error into a derivative
    for wanted in (True, False):
        with kernels.use(wanted):
            logits[wanted] = jax.jit(partial(model.apply))(variables, image)["logits"]
            if smooth:
                slopes[wanted] = jax.jit(lambda params: gradients(params))(variables["params"])
    assert np.abs(logits[True] - logits[False]).max() <= 1e-5 * np.ptp(logits[False])
    if smooth:
        apart = np.linalg.norm(slopes[True] - slopes[False])
        assert apart <= 1e-4 * np.linalg.norm(slopes[False])


def test_their_arithmetic_is_counted():
    x, square, filters, cube = arrays((2, 8, 8, 16), (16, 32), (3, 3, 1, 32), (3, 3, 32, 8))

    def function(x, square, filters, cube):
        y = depthwise_conv(pointwise_conv(x, square), filters, stride=2, dilation=1)
        return jnp.sin(conv(y, cube)).sum()

    counted = {}
    for wanted in (True, False):
        with kernels.use(wanted):
            slopes = jax.grad(lambda *operands: function(*operands), argnums=(0, 1, 2, 3))
            counted[wanted] = kernels.flops(
                jax.jit(slopes).lower(x, square, filters, cube).compile().as_text()
            )
    products = 128 * 16 * 32, 32 * 32 * 9, 32 * 32 * 8 * 9  # of which each is done three times
    assert counted == {True: 6 * sum(products), False: 0}


def test_no_number_stays_none():
    x, kernel, filters = arrays((1, 4, 4, 16), (16, 16), (3, 3, 1, 16))
    x = x.at[0, 1, 1, 3].set(np.uint32(0x7FC00001).view(np.float32))  # one of many that are none
    with kernels.use(True):
        for activation in kernels.ACTIVATIONS:
            finish = Finish(activation=activation)
            y = depthwise_conv(x, filters, stride=1, dilation=1, finish=finish)
            assert np.isnan(y[0, :3, :3, 3]).all() and np.isnan(y).sum() == 9
            assert np.isnan(pointwise_conv(x, kernel, finish)[0, 1, 1]).all()
            y = layers._norm(x, jnp.ones(16), jnp.zeros(16), (0, 1, 2), activation)[0]
            assert np.isnan(y[..., 3]).all()
        assert np.isnan(kernels.attention(jnp.tile(x, 3), heads=1)[0, 1, 1]).any()
        assert np.isnan(kernels.layer_norm(x, x[0, 0, 0], x[0, 0, 0], epsilon=1e-5)[0, 1, 1]).all()
        kernel, bias = jnp.ones((16, 33)), jnp.ones(33)
        y = kernels.separable_attention(x, jnp.ones_like(x), kernel, bias)
        assert np.isnan(y[0, 1::2, 1::2]).all() and np.isfinite(y[0, ::2]).all()


def test_who_does_without():
    (x,) = arrays((2, 3))
    assert not kernels.serve(x)  # four devices
    with kernels.use(True):
        assert kernels.serve(x, None)
        assert not kernels.serve(x, x.astype(jnp.bfloat16))
        with kernels.use(False):
            assert not kernels.serve(x)
        assert kernels.serve(x)


PROGRAM = """
import os, sys
if sys.argv[1] == "one":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
import jax, numpy as np
from mobilevit_jax.models import kernels, layers
from mobilevit_jax.models.convolution import conv, depthwise_conv, pointwise_conv
assert jax.device_count() == 1
if sys.argv[1] == "busy":  # a program for every core: none is helped
    for _ in range(os.cpu_count()):
        kernels.program().__enter__()
rng = np.random.default_rng(0)
draw = lambda *shape: jax.numpy.asarray(rng.standard_normal(shape), "float32")
x, square, filters, cube = draw(4, 33, 17, 24), draw(24, 40), draw(3, 3, 1, 24), draw(3, 3, 24, 8)
def loss(x, square, filters, cube):
    y = layers._norm(x, filters[0, 0, 0], filters[1, 0, 0], (0, 1, 2), jax.nn.silu)[0]
    y = y + layers._norm(x, filters[0, 0, 0], filters[1, 0, 0], (1, 2, 3), None)[0]
    y = depthwise_conv(y, filters, stride=2, dilation=1)
    return pointwise_conv(y, square).sum() + jax.numpy.sin(conv(y, cube)).sum()
def inference(x, square, filters, cube):
    finish = kernels.Finish(square[0, :24], square[1, :24], jax.nn.silu)
    block = [(square[:, :24], finish), (filters, finish), (square[:, :24], finish)]
    x = kernels.inverted_residual(x, block, stride=1, residual=True)[:, :32, :16]
    x = kernels.layer_norm(x, square[0, :24], square[1, :24], epsilon=1e-5)
    qkv = cube.reshape(24, -1)[:, :49]
    x = kernels.separable_attention(x, x, qkv, cube.ravel()[:49])
    return kernels.attention(x, heads=2)
program = jax.jit(lambda *operands: (jax.grad(loss, (0, 1, 2, 3))(*operands), inference(*operands)))
assert "mobilevit_jax.kernels" in program.lower(x, square, filters, cube).as_text()
results = jax.tree.leaves(program(x, square, filters, cube))
assert all(np.isfinite(result).all() for result in results)
sys.stdout.buffer.write(b"".join(np.asarray(result).tobytes() for result in results))
"""


def test_threads_change_no_bit():
    environment = os.environ | {"XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": ""}
    results = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM, threads], env=environment, capture_output=True
        )
        for threads in ("one", "all", "all", "busy")
    ]
    assert [done.returncode for done in results] == [0] * 4, results[0].stderr.decode()
    assert results[0].stdout and len({done.stdout for done in results}) == 1


SEATS = """
import collections, ctypes, os, threading
from mobilevit_jax.models import kernels
here = ctypes.CDLL(None).sched_getcpu
both = set(sorted(os.sched_getaffinity(0))[:2])
kept = []
def sit(stayed, done, until):
    os.sched_setaffinity(0, {min(both)})
    os.sched_setaffinity(0, both)
    with kernels.work():
        stayed.append(here() == min(both))
        kept.append(os.sched_getaffinity(0) == both)
        done.set()
        until.wait()
def seated():
    stayed, free, threads = [], threading.Event(), []
    for _ in range(3):  # the second finds the first on its core; the third finds no core free
        done = threading.Event()
        threads.append(threading.Thread(target=sit, args=(stayed, done, free)))
        threads[-1].start()
        done.wait(10)
    free.set()
    for thread in threads:
        thread.join()
    return stayed
kernels.library()
print(collections.Counter(str(seated()) for _ in range(21)).most_common(1)[0][0], all(kept))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores"
)
def test_who_finds_another_on_its_core_goes_to_a_free_one():
    environment = os.environ | {"XLA_FLAGS": ""}  # one device
    done = subprocess.run([sys.executable, "-c", SEATS], env=environment, capture_output=True)
    # Of many tries, as Linux itself moves threads now and then, the more the busier it is.
    assert done.stdout.decode().strip() == "[True, False, True] True", done.stderr.decode()


def test_it_can_be_switched_off():
    code = "from mobilevit_jax.models import kernels; print(kernels.library().reason)"
    environment = os.environ | {kernels.SWITCH: "off"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stdout.decode().strip() == "switched off by MOBILEVIT_KERNELS=off"
