"""Convolutions and the resize as pure functions of a map, fast on a CPU as well as elsewhere.

Before editing: maps are NHWC, kernels HWIO; padding is explicit and symmetric, as in PyTorch, where
flax's "SAME" pads a stride-2 convolution differently. Why so much code for a depthwise convolution:
XLA's own is ten times slower than this one on a CPU, its gradient twenty times. The optimisation
barriers decide what XLA keeps in memory; measure before you move one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from mobilevit_jax.models import kernels
from mobilevit_jax.models.kernels import Finish

PLAIN = Finish()  # nothing follows


def conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k i d"],
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    finish: Finish = PLAIN,
) -> Float[Array, "b oh ow d"]:
    """Convolution with an odd-sized kernel, finished: `oh = ceil(h / stride)`, zeros outside."""
    if groups == 1 and kernels.serve(x, kernel, *finish.arrays()):
        return kernels.conv(x, kernel, finish, stride=stride, dilation=dilation)
    return finish(_conv(x, kernel, stride=stride, dilation=dilation, groups=groups))


def _conv(x: Array, kernel: Array, *, stride: int, dilation: int, groups: int) -> Array:
    pad = _padding(kernel, dilation)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def pointwise_conv(
    x: Float[Array, "*b c"], kernel: Float[Array, "c d"], finish: Finish = PLAIN
) -> Float[Array, "*b d"]:
    """1x1 convolution, as one matrix product over all positions, finished.

    Flat, the kernel's gradient contracts axis 0 with axis 0. Over the map's own axes XLA would
    write transposed copies of both activations on a CPU.
    """
    if kernel.shape[1] > 1 and kernels.serve(x, kernel, *finish.arrays()):
        return kernels.pointwise_conv(x, kernel, finish)
    flat = x.reshape(-1, x.shape[-1])  # (b h w) c
    return finish((flat @ kernel).reshape(*x.shape[:-1], kernel.shape[-1]))


def depthwise_conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k 1 c"],
    *,
    stride: int,
    dilation: int,
    finish: Finish = PLAIN,
) -> Float[Array, "b oh ow c"]:
    """Convolve every channel with its own odd-sized kernel: `oh = ceil(h / stride)`, zeros outside.

    On a CPU: a kernel of our own or, where there is none, shifted multiply-adds and a gradient
    written by hand. Elsewhere: XLA's grouped convolution. Sums in float32. Can be differentiated in
    reverse mode only.
    """
    if kernel.shape[0] in kernels.DEPTHWISE_SIZES and kernels.serve(x, kernel, *finish.arrays()):
        return kernels.depthwise_conv(x, kernel, finish, stride=stride, dilation=dilation)
    return finish(_depthwise(x, kernel, stride, dilation))


# The choice sits inside the custom gradient: differentiating through platform_dependent would keep
# what every platform's branch needs for its gradient.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x: Array, kernel: Array, stride: int, dilation: int) -> Array:
    options = {"stride": stride, "dilation": dilation}
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_depthwise_taps, **options),
        default=functools.partial(_conv, **options, groups=x.shape[-1]),
    )


def _depthwise_forward(x: Array, kernel: Array, stride: int, dilation: int) -> tuple:
    return _depthwise(x, kernel, stride, dilation), (x, kernel)


def _depthwise_backward(stride: int, dilation: int, residuals: tuple, cotangent: Array) -> tuple:
    options = {"stride": stride, "dilation": dilation}
    return lax.platform_dependent(
        *residuals,
        cotangent,
        cpu=functools.partial(_depthwise_taps_gradient, **options),
        default=functools.partial(_depthwise_xla_gradient, **options),
    )


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _depthwise_xla_gradient(
    x: Array, kernel: Array, cotangent: Array, *, stride: int, dilation: int
) -> tuple[Array, Array]:
    grouped = functools.partial(_conv, stride=stride, dilation=dilation, groups=x.shape[-1])
    return jax.vjp(grouped, x, kernel)[1](cotangent)


def _depthwise_taps(x: Array, kernel: Array, *, stride: int, dilation: int) -> Array:
    # With the barrier, what computes x (norm and activation) writes the padded map in one pass, and
    # x itself never exists. Without it XLA computes a part of that once more for the taps.
    padded = lax.optimization_barrier(_pad(x, kernel, dilation))
    size = ((x.shape[1] - 1) // stride + 1, (x.shape[2] - 1) // stride + 1)
    return _taps(padded, kernel, stride=stride, dilation=dilation, size=size).astype(x.dtype)


def _depthwise_taps_gradient(
    x: Array, kernel: Array, cotangent: Array, *, stride: int, dilation: int
) -> tuple[Array, Array]:
    height, width = x.shape[1:3]
    out_height, out_width = cotangent.shape[1:3]
    n, pad = kernel.shape[0], _padding(kernel, dilation)
    spread = lax.pad(
        cotangent,
        jnp.zeros((), cotangent.dtype),
        (
            (0, 0, 0),
            (pad, pad + height - (out_height - 1) * stride - 1, stride - 1),
            (pad, pad + width - (out_width - 1) * stride - 1, stride - 1),
            (0, 0, 0),
        ),
    )
    # XLA merges this padding of x with the one of the forward pass, whose result it keeps.
    padded, spread = lax.optimization_barrier((_pad(x, kernel, dilation), spread))

    # Gradient of x: the same taps with the kernel flipped, over the cotangent spread by the stride.
    flipped = kernel[::-1, ::-1]
    x_gradient = _taps(spread, flipped, stride=1, dilation=dilation, size=(height, width))

    # Gradient of the kernel: one row of the whole batch at a time, to have it in cache for all nine
    # products, which are added to sums that keep the batch axis. So a batch sharded over devices
    # needs no communication before the end.
    def columns(row: Array, start: int) -> Array:
        return row[:, start : start + (out_width - 1) * stride + 1 : stride]

    def add_row(row: Array, sums: list[Array]) -> list[Array]:
        rows = [
            lax.dynamic_index_in_dim(padded, row * stride + i * dilation, 1, keepdims=False)
            for i in range(n)
        ]
        other = lax.dynamic_index_in_dim(spread, row * stride + pad, 1, keepdims=False)
        # One barrier, one buffer a row: XLA's code for slices of slices is not vectorised.
        rows, other = lax.optimization_barrier((rows, columns(other, pad).astype(jnp.float32)))
        views = [columns(rows[i], j * dilation) for i in range(n) for j in range(n)]
        return [total + view * other for total, view in zip(sums, views, strict=True)]

    zeros = jnp.zeros(cotangent[:, 0].shape, jnp.float32)  # b ow c
    sums = lax.fori_loop(0, out_height, add_row, [zeros] * (n * n))
    kernel_gradient = jnp.stack(sums).sum((1, 2)).reshape(kernel.shape)
    return x_gradient.astype(x.dtype), kernel_gradient.astype(kernel.dtype)


def _taps(x: Array, kernel: Array, *, stride: int, dilation: int, size: tuple[int, int]) -> Array:
    """Sum, over the kernel's taps, of a strided view of the padded `x` times a row of weights."""
    height, width = size
    total = jnp.zeros((), jnp.float32)
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            top, left = i * dilation, j * dilation
            view = x[
                :,
                top : top + (height - 1) * stride + 1 : stride,
                left : left + (width - 1) * stride + 1 : stride,
            ]
            total = total + view.astype(jnp.float32) * kernel[i, j, 0].astype(jnp.float32)
    return total


def _padding(kernel: Array, dilation: int) -> int:
    return (kernel.shape[0] - 1) // 2 * dilation


def _pad(x: Array, kernel: Array, dilation: int) -> Array:
    pad = _padding(kernel, dilation)
    return jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))


def resize_align_corners(
    x: Float[Array, "b h w c"], *, size: tuple[int, int]
) -> Float[Array, "b oh ow c"]:
    """Bilinear resize that puts corner pixels on corner pixels (PyTorch's `align_corners=True`).

    Output pixel `o` reads the input at `o * (in - 1) / (out - 1)`, at 0 if there is one output
    pixel; jax.image has only the other convention. Two products with constant matrices: no gather
    in an exported model, no scatter in the gradient.
    """
    rows, columns = (_interpolation(n, m) for n, m in zip(x.shape[1:3], size, strict=True))
    return jnp.einsum(
        "bhwc,ph,qw->bpqc",
        x,
        rows.astype(x.dtype),
        columns.astype(x.dtype),
        precision=lax.Precision.HIGHEST,
    )


def _interpolation(size: int, new_size: int) -> np.ndarray:
    """Matrix (new_size, size): a row has the weights of an output pixel's two neighbours."""
    source = np.arange(new_size) * ((size - 1) / max(new_size - 1, 1))
    lower = np.minimum(source.astype(np.int64), size - 1)
    upper = np.minimum(lower + 1, size - 1)
    matrix = np.zeros((new_size, size), np.float32)
    np.add.at(matrix, (np.arange(new_size), lower), 1 - (source - lower))
    np.add.at(matrix, (np.arange(new_size), upper), source - lower)
    return matrix
