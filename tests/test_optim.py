"""Each optimiser against a few steps computed by hand in numpy, and ten of PyTorch's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mobilevit_jax import optim
from tests.originals import import_torch

RATE = 0.1
PARAMS = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full((2,), 3.0)}
GRADS = {"kernel": jnp.full((2, 2), 0.5), "bias": jnp.full((2,), -0.25)}
ADAMW = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.2, "clip_norm": 0.0}
SGD = {"momentum": 0.9, "nesterov": False, "weight_decay": 0.2, "clip_norm": 0.0}


def run(tx, steps):
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return float(params["kernel"][0, 0]), float(params["bias"][0])


def adamw_by_hand(value, grad, decay, steps):
    m = v = 0.0
    for t in range(1, steps + 1):
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        direction = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        value -= RATE * (direction + decay * value)
    return value


def sgd_by_hand(value, grad, decay, steps, nesterov):
    trace = 0.0
    for _ in range(steps):
        g = grad + decay * value
        trace = 0.9 * trace + g
        value -= RATE * (g + 0.9 * trace if nesterov else trace)
    return value


@pytest.mark.parametrize("decay_1d", [False, True])
def test_adamw_decays_what_it_should(decay_1d):
    kernel, bias = run(optim.adamw(lambda step: RATE, decay_1d=decay_1d, **ADAMW), 3)
    assert kernel == pytest.approx(adamw_by_hand(2.0, 0.5, 0.2, 3), rel=1e-5)
    assert bias == pytest.approx(adamw_by_hand(3.0, -0.25, 0.2 * decay_1d, 3), rel=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_couples_decay_into_the_momentum(nesterov):
    arguments = SGD | {"nesterov": nesterov}
    kernel, bias = run(optim.sgd(lambda step: RATE, decay_1d=False, **arguments), 3)
    assert kernel == pytest.approx(sgd_by_hand(2.0, 0.5, 0.2, 3, nesterov), rel=1e-5)
    assert bias == pytest.approx(sgd_by_hand(3.0, -0.25, 0.0, 3, nesterov), rel=1e-5)


SHAPES = {"kernel": (3, 3, 4, 5), "linear": (7, 6), "bias": (6,), "scale": (4,), "scalar": ()}


@pytest.mark.parametrize("decay_1d", [False, True])
@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        (
            "AdamW",
            functools.partial(optim.adamw, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.05),
            {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05},
        ),
        (
            "SGD",
            functools.partial(optim.sgd, momentum=0.9, nesterov=False, weight_decay=0.05),
            {"momentum": 0.9, "nesterov": False, "weight_decay": 0.05},
        ),
        (
            "SGD",
            functools.partial(optim.sgd, momentum=0.9, nesterov=True, weight_decay=0.05),
            {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
        ),
        (
            "SGD",
            functools.partial(optim.sgd, momentum=0.0, nesterov=False, weight_decay=0.0),
            {"momentum": 0.0},
        ),
    ],
)
def test_ten_steps_of_the_original(name, ours, theirs, decay_1d):
    """Random gradients, a rate that changes with every step, parameters of every rank."""
    torch = import_torch()
    rng = np.random.default_rng(0)
    start = {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
    rates = rng.uniform(0.001, 0.1, 10).tolist()
    tx = ours(lambda step: jnp.asarray(rates)[step], decay_1d=decay_1d, clip_norm=0.0)
    params = jax.tree.map(jnp.asarray, start)
    state = tx.init(params)
    tensors = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
    # Exactly those of one dimension: a scalar decays, as in cvnets.
    spared = [t for t in tensors.values() if t.ndim == 1 and not decay_1d]
    optimizer = getattr(torch.optim, name)(
        [
            {"params": [t for t in tensors.values() if t.ndim != 1 or decay_1d]},
            *([{"params": spared, "weight_decay": 0.0}] if spared else []),
        ],
        lr=rates[0],
        **theirs,
    )
    update = jax.jit(tx.update)
    for rate in rates:
        grads = {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for k, tensor in tensors.items():
            tensor.grad = torch.tensor(grads[k])
        optimizer.step()
    for k, tensor in tensors.items():
        # Adam's 1 - b2 ** step is 0.001 at first: in float32 it is right to 3e-5.
        np.testing.assert_allclose(params[k], tensor.detach().numpy(), rtol=2e-5, atol=2e-5)
        assert not np.allclose(params[k], start[k], rtol=1e-2)


def test_clipping_is_by_the_global_norm():
    norm = np.sqrt(4 * 0.5**2 + 2 * 0.25**2)
    arguments = SGD | {"clip_norm": 0.1, "weight_decay": 0.0}
    kernel, _ = run(optim.sgd(lambda step: RATE, decay_1d=False, **arguments), 1)
    assert kernel == pytest.approx(2.0 - RATE * 0.5 * 0.1 / norm, rel=1e-5)


def test_the_curve_is_followed():
    tx = optim.sgd(
        lambda step: jnp.where(step == 0, 0.0, RATE), decay_1d=False, **SGD | {"weight_decay": 0.0}
    )
    assert run(tx, 1)[0] == 2.0
    assert run(tx, 2)[0] == pytest.approx(2.0 - RATE * (0.5 + 0.9 * 0.5))


def test_layer_decay_scales_updates_by_depth():
    params = {
        "stem": {"kernel": jnp.ones((2, 2))},
        "layer_4": {"kernel": jnp.ones((2, 2))},
        "expand": {"kernel": jnp.ones((2, 2))},
        "head": {"kernel": jnp.ones((2, 2))},
    }
    arguments = SGD | {"weight_decay": 0.0, "momentum": 0.0}
    tx = optim.layerwise(optim.sgd(lambda s: 1.0, decay_1d=False, **arguments), layer_decay=0.5)
    updates, _ = tx.update(params, tx.init(params), params)
    sizes = {name: -float(update["kernel"][0, 0]) for name, update in updates.items()}
    assert sizes == {"stem": 0.5**6, "layer_4": 0.5**2, "expand": 1.0, "head": 1.0}
    with pytest.raises(ValueError, match=r"layer_decay is 1\.5"):
        optim.layerwise(tx, layer_decay=1.5)


def test_head_only_leaves_the_rest_alone():
    params = {"layer_4": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 2))}}
    tx = optim.head_only(optim.sgd(lambda s: 1.0, decay_1d=False, **SGD))
    updates, _ = tx.update(params, tx.init(params), params)
    assert not updates["layer_4"]["kernel"].any()
    assert updates["head"]["kernel"].all()
