"""The fast convolutions against XLA's own, gradients too; the resize against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilevit_jax.models.convolution import (
    conv,
    depthwise_conv,
    pointwise_conv,
    resize_align_corners,
)


def arrays(*shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def value_and_gradients(function, x, kernel, cotangent):
    @jax.jit
    def both(x, kernel, cotangent):
        y, pullback = jax.vjp(function, x, kernel)
        return y, *pullback(cotangent)

    return both(x, kernel, cotangent)


def relative_norm(got, want):
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "dilation"),
    [
        *(((9, 7), 3, stride, dilation) for stride in (1, 2) for dilation in (1, 2, 4)),
        ((8, 12), 3, 1, 1),
        ((8, 11), 3, 2, 1),
        ((6, 6), 5, 2, 1),
        ((1, 2), 3, 1, 1),
    ],
)
def test_depthwise_equals_grouped_convolution(size, kernel_size, stride, dilation):
    out = tuple(-(-side // stride) for side in size)
    x, kernel, cotangent = arrays((3, *size, 5), (kernel_size, kernel_size, 1, 5), (3, *out, 5))
    options = {"stride": stride, "dilation": dilation}
    got = value_and_gradients(functools.partial(depthwise_conv, **options), x, kernel, cotangent)
    want = value_and_gradients(functools.partial(conv, **options, groups=5), x, kernel, cotangent)
    assert got[0].shape == (3, *out, 5)
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_in_bfloat16_sums_in_float32(stride):
    out = -(-9 // stride)
    operands = arrays((3, 9, 9, 4), (3, 3, 1, 4), (3, out, out, 4), dtype=jnp.bfloat16)
    options = {"stride": stride, "dilation": 1}
    got = value_and_gradients(functools.partial(depthwise_conv, **options), *operands)
    exact = (operand.astype(jnp.float32) for operand in operands)
    want = value_and_gradients(functools.partial(conv, **options, groups=4), *exact)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        assert relative_norm(a, b) <= 4e-3  # no more than the rounding of the result


def lowered(function, *operands, platform):
    return jax.jit(function).trace(*operands).lower(lowering_platforms=(platform,)).as_text()


def test_every_platform_gets_its_own_depthwise():
    x, kernel = arrays((2, 8, 8, 4), (3, 3, 1, 4))
    forward = functools.partial(depthwise_conv, stride=1, dilation=1)
    gradients = jax.grad(lambda x, kernel: forward(x, kernel).sum(), argnums=(0, 1))
    for function in (forward, gradients):
        assert "stablehlo.convolution" not in lowered(function, x, kernel, platform="cpu")
        on_tpu = lowered(function, x, kernel, platform="tpu")
        assert "stablehlo.convolution" in on_tpu
        assert "stablehlo.while" not in on_tpu


def test_depthwise_leaves_a_sharded_batch_where_it_is():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    batch = jax.NamedSharding(mesh, jax.P("data"))
    x, kernel = arrays((8, 6, 6, 4), (3, 3, 1, 4))

    def loss(x, kernel):
        return jnp.sin(depthwise_conv(x, kernel, stride=2, dilation=1)).sum()

    gradients = jax.grad(loss, argnums=(0, 1))
    compiled = jax.jit(gradients).lower(jax.device_put(x, batch), kernel).compile()
    assert "all-gather" not in compiled.as_text()
    for a, b in zip(
        compiled(jax.device_put(x, batch), kernel), jax.jit(gradients)(x, kernel), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_pointwise_equals_convolution():
    x, kernel, cotangent = arrays((2, 5, 3, 7), (7, 4), (2, 5, 3, 4))
    got = value_and_gradients(pointwise_conv, x, kernel, cotangent)
    want = value_and_gradients(conv, x, kernel[None, None], cotangent)
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.mark.parametrize("size", [4, 5])
def test_stride_two_pads_both_sides_alike(size):
    x = np.arange(size * size, dtype=np.float32).reshape(1, size, size, 1)
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[0, 0] = 1  # the pixel above and to the left of the centre
    y = np.asarray(conv(jnp.asarray(x), jnp.asarray(kernel), stride=2))[0, :, :, 0]
    want = np.zeros((-(-size // 2),) * 2)
    want[1:, 1:] = x[0, 1:-1:2, 1:-1:2, 0]
    np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize(
    ("size", "new"), [((7, 5), (8, 6)), ((3, 4), (7, 9)), ((6, 5), (3, 5)), ((1, 4), (2, 1))]
)
def test_resize_puts_corners_on_corners(size, new):
    (x,) = arrays((2, *size, 3))
    got = resize_align_corners(x, size=new)
    want = np.zeros((2, *new, 3))
    for p in range(new[0]):
        for q in range(new[1]):
            sy = p * (size[0] - 1) / (new[0] - 1) if new[0] > 1 else 0.0
            sx = q * (size[1] - 1) / (new[1] - 1) if new[1] > 1 else 0.0
            y0, x0 = min(int(sy), size[0] - 1), min(int(sx), size[1] - 1)
            y1, x1 = min(y0 + 1, size[0] - 1), min(x0 + 1, size[1] - 1)
            top = (1 - (sx - x0)) * x[:, y0, x0] + (sx - x0) * x[:, y0, x1]
            bottom = (1 - (sx - x0)) * x[:, y1, x0] + (sx - x0) * x[:, y1, x1]
            want[:, p, q] = (1 - (sy - y0)) * top + (sy - y0) * bottom
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
