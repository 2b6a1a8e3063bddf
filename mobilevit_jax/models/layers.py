"""Building blocks every architecture of this package is made of: convolution, norms, inverted residual, resize.

Before editing: maps are NHWC; parameters are float32 and cast to the module's `dtype` where they are used; norms reduce and
scale in float32 and only their result is cast. Padding is explicit and symmetric, as in PyTorch: flax's "SAME" pads a
stride-2 convolution differently. The two fast paths (`depthwise_conv`, `pointwise_conv`) are there because XLA's own
convolutions are up to ten times slower on a CPU; tests/models/test_layers.py holds them to the plain convolution.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.9  # PyTorch calls the same thing momentum 0.1
WEIGHT_INITS = ("torch", "kaiming")

Activation = Callable[[Array], Array]
Initializer = Callable[..., Array]


def make_divisible(value: float, divisor: int = 8, *, minimum: int | None = None) -> int:
    """Round a channel count to a multiple of `divisor`, at least `minimum`, never more than 10% below `value`."""
    rounded = max(minimum or divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def bound(value: float, low: float, high: float) -> float:
    """Clip `value` to the interval [low, high]."""
    return max(low, min(high, value))


# --- convolution ---------------------------------------------------------------------------------------------------


def pointwise_conv(x: Float[Array, "*b c"], kernel: Float[Array, "c d"]) -> Float[Array, "*b d"]:
    """1x1 convolution, as one matrix product over all positions.

    Flattening first lets the kernel's gradient contract axis 0 with axis 0: with the map's own axes XLA would write
    transposed copies of both activations on a CPU.
    """
    flat = x.reshape(-1, x.shape[-1])  # (b h w) c
    return (flat @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x: Array, kernel: Array, stride: int, dilation: int) -> Array:
    # The choice sits inside the custom gradient: differentiating through platform_dependent would keep what every
    # platform's branch needs for its gradient.
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_depthwise_taps, stride=stride, dilation=dilation),
        default=functools.partial(_depthwise_xla, stride=stride, dilation=dilation),
    )


def _depthwise_forward(x: Array, kernel: Array, stride: int, dilation: int) -> tuple:
    return _depthwise(x, kernel, stride, dilation), (x, kernel)


def _depthwise_backward(stride: int, dilation: int, residuals: tuple, cotangent: Array) -> tuple:
    return lax.platform_dependent(
        *residuals,
        cotangent,
        cpu=functools.partial(_depthwise_taps_gradient, stride=stride, dilation=dilation),
        default=functools.partial(_depthwise_xla_gradient, stride=stride, dilation=dilation),
    )


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def depthwise_conv(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"], *, stride: int, dilation: int
) -> Float[Array, "b oh ow c"]:
    """Convolve every channel with its own odd-sized kernel; `oh = ceil(h / stride)`, zeros outside the map.

    On a CPU: shifted multiply-adds with a gradient written by hand. Elsewhere: XLA's grouped convolution.
    Reverse-mode differentiation only.
    """
    return _depthwise(x, kernel, stride, dilation)


def _depthwise_xla(x: Array, kernel: Array, *, stride: int, dilation: int) -> Array:
    return _conv(x, kernel, stride=stride, dilation=dilation, groups=x.shape[-1])


def _depthwise_xla_gradient(
    x: Array, kernel: Array, cotangent: Array, *, stride: int, dilation: int
) -> tuple[Array, Array]:
    conv = functools.partial(_depthwise_xla, stride=stride, dilation=dilation)
    return jax.vjp(conv, x, kernel)[1](cotangent)


def _taps(x: Array, kernel: Array, *, stride: int, dilation: int, size: tuple[int, int]) -> Array:
    """Sum over the kernel's taps of one strided view of the padded `x` times one row of weights, in float32."""
    height, width = size
    total = None
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            top, left = i * dilation, j * dilation
            view = x[
                :,
                top : top + (height - 1) * stride + 1 : stride,
                left : left + (width - 1) * stride + 1 : stride,
            ]
            term = view.astype(jnp.float32) * kernel[i, j, 0].astype(jnp.float32)
            total = term if total is None else total + term
    return total


def _depthwise_taps(x: Array, kernel: Array, *, stride: int, dilation: int) -> Array:
    # Without the barriers XLA computes the producer of x (norm and activation) in every one of the nine taps, and the
    # taps in both passes of the norm that follows.
    padded = lax.optimization_barrier(_pad(x, kernel.shape[0], dilation))
    size = (_strided(x.shape[1], stride), _strided(x.shape[2], stride))
    y = _taps(padded, kernel, stride=stride, dilation=dilation, size=size)
    return lax.optimization_barrier(y.astype(x.dtype))


def _depthwise_taps_gradient(
    x: Array, kernel: Array, cotangent: Array, *, stride: int, dilation: int
) -> tuple[Array, Array]:
    _, height, width, _ = x.shape
    _, out_height, out_width, channels = cotangent.shape
    n = kernel.shape[0]
    pad = _padding(n, dilation)

    # Input: the same taps with the kernel flipped, over the cotangent spread out by the stride.
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
    # XLA merges this padding with the one of the forward pass and keeps its result instead of x.
    padded, spread = lax.optimization_barrier((_pad(x, n, dilation), spread))
    x_gradient = _taps(
        spread, kernel[::-1, ::-1], stride=1, dilation=dilation, size=(height, width)
    )

    # Kernel: one output row of the whole batch at a time, so that the rows stay in cache for the nine products, into
    # sums that keep the batch axis: a batch sharded over devices is then added up once, at the end.
    def columns(row: Array, start: int) -> Array:
        return row[:, start : start + (out_width - 1) * stride + 1 : stride]

    def add_row(row: Array, sums: list[Array]) -> list[Array]:
        rows = [
            lax.dynamic_index_in_dim(padded, row * stride + i * dilation, 1, keepdims=False)
            for i in range(n)
        ]
        outer = lax.dynamic_index_in_dim(spread, row * stride + pad, 1, keepdims=False)
        rows, outer = lax.optimization_barrier((rows, columns(outer, pad).astype(jnp.float32)))
        views = [columns(rows[i], j * dilation) for i in range(n) for j in range(n)]
        return [total + view * outer for total, view in zip(sums, views, strict=True)]

    zeros = jnp.zeros((x.shape[0], out_width, channels), jnp.float32)
    sums = lax.fori_loop(0, out_height, add_row, [zeros] * (n * n))
    kernel_gradient = jnp.stack(sums).sum((1, 2)).reshape(kernel.shape)
    return (
        lax.optimization_barrier(x_gradient.astype(x.dtype)),
        kernel_gradient.astype(kernel.dtype),
    )


def _pad(x: Array, kernel_size: int, dilation: int) -> Array:
    pad = _padding(kernel_size, dilation)
    return jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))


def _padding(kernel_size: int, dilation: int) -> int:
    return (kernel_size - 1) // 2 * dilation


def _strided(size: int, stride: int) -> int:
    return (size - 1) // stride + 1


def _conv(x: Array, kernel: Array, *, stride: int, dilation: int, groups: int) -> Array:
    pad = _padding(kernel.shape[0], dilation)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


# --- weights at the start ------------------------------------------------------------------------------------------


def _uniform(limit: float) -> Initializer:
    return lambda rng, shape: jax.random.uniform(rng, shape, minval=-limit, maxval=limit)


def _conv_inits(weight_init: str, *, fan_in: int, fan_out: int) -> tuple[Initializer, Initializer]:
    """Initialisers of a convolution's kernel and bias."""
    if weight_init == "torch":
        both = _uniform(1 / math.sqrt(fan_in))
        return both, both
    # fan_out counts all output channels, groups or not: a depthwise kernel starts much smaller than usual.
    return nn.initializers.normal(math.sqrt(2 / fan_out)), nn.initializers.zeros


def _linear_init(weight_init: str, *, fan_in: int, fan_out: int) -> Initializer:
    if weight_init == "torch":
        return _uniform(math.sqrt(6 / (fan_in + fan_out)))
    return nn.initializers.normal(0.02)


def check_weight_init(weight_init: str) -> None:
    """Raise ValueError unless `weight_init` is one of WEIGHT_INITS.

    "torch" is what the published MobileViT v2 and MobileNet weights really started from (PyTorch's own defaults: uniform
    kernels *and* biases, Xavier-uniform linear layers); "kaiming" is what their recipes say and what v1 started from
    (normal kernels scaled by fan-out, linear layers with standard deviation 0.02, zero biases).
    """
    if weight_init not in WEIGHT_INITS:
        raise ValueError(f'weight_init is {weight_init!r}; use "torch" or "kaiming"')


# --- layers --------------------------------------------------------------------------------------------------------


class Conv(nn.Module):
    """Square convolution with zeros around the map: `h -> ceil(h / stride)`.

    Parameters: `kernel` (k, k, c / groups, features) and, if asked for, `bias` (features).
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    use_bias: bool = False
    weight_init: str = "torch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow d"]:
        """Convolve."""
        channels, area = x.shape[-1], self.kernel_size**2
        kernel_init, bias_init = _conv_inits(
            self.weight_init, fan_in=area * channels // self.groups, fan_out=area * self.features
        )
        shape = (self.kernel_size, self.kernel_size, channels // self.groups, self.features)
        kernel = self.param("kernel", kernel_init, shape).astype(self.dtype)
        x = x.astype(self.dtype)
        if self.kernel_size == self.stride == self.groups == 1:
            x = pointwise_conv(x, kernel[0, 0])
        elif self.groups == channels == self.features:
            x = depthwise_conv(x, kernel, stride=self.stride, dilation=self.dilation)
        else:
            x = _conv(x, kernel, stride=self.stride, dilation=self.dilation, groups=self.groups)
        if self.use_bias:
            x = x + self.param("bias", bias_init, (self.features,)).astype(self.dtype)
        return x


class PointwiseWeights(nn.Module):
    """The parameters of a 1x1 `Conv` with bias, for a module that applies them in pieces."""

    features: int
    weight_init: str = "torch"

    @nn.compact
    def __call__(self, channels: int) -> tuple[Float[Array, "c d"], Float[Array, " d"]]:
        """Return kernel and bias in float32."""
        kernel_init, bias_init = _conv_inits(
            self.weight_init, fan_in=channels, fan_out=self.features
        )
        kernel = self.param("kernel", kernel_init, (1, 1, channels, self.features))
        return kernel[0, 0], self.param("bias", bias_init, (self.features,))


class Linear(nn.Module):
    """Linear layer over the last axis. Parameters: `kernel` (c, features) and `bias` (features)."""

    features: int
    weight_init: str = "torch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
        """Multiply and add the bias."""
        shape = (x.shape[-1], self.features)
        init = _linear_init(self.weight_init, fan_in=shape[0], fan_out=shape[1])
        kernel = self.param("kernel", init, shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return pointwise_conv(x.astype(self.dtype), kernel) + bias


class BatchNorm(nn.Module):
    """Batch norm as PyTorch does it; parameters `scale`, `bias`, running `mean`, `var` in the collection batch_stats.

    The batch is normalised with its biased variance, but the *unbiased* one goes into the running variance (flax's own
    layer stores the biased one). With a batch sharded over devices the statistics are those of the whole batch.
    """

    activation: Activation | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *n c"], *, train: bool) -> Float[Array, "b *n c"]:
        """Normalise with the batch's statistics when `train`, else with the running ones; then activate.

        Raises ValueError when training on a single value per channel, whose variance is undefined.
        """
        features = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, features)
        bias = self.param("bias", nn.initializers.zeros, features)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        running_variance = self.variable("batch_stats", "var", jnp.ones, features)
        x = x.astype(self.dtype)
        if not train:
            y = _normalize(x, running_mean.value, running_variance.value, scale, bias)
            y = y.astype(x.dtype)
            return y if self.activation is None else self.activation(y)

        count = x.size // x.shape[-1]
        if count == 1:
            raise ValueError(
                f"batch norm cannot train on an input of shape {x.shape}: one value per channel has no variance; "
                "use a larger batch or image"
            )
        y, mean, variance = _norm(x, scale, bias, tuple(range(x.ndim - 1)), self.activation)
        if not self.is_initializing():
            keep = BATCH_NORM_MOMENTUM
            variance = variance.reshape(features) * (count / (count - 1))
            running_mean.value = keep * running_mean.value + (1 - keep) * mean.reshape(features)
            running_variance.value = keep * running_variance.value + (1 - keep) * variance
        return y


class GroupNorm(nn.Module):
    """Group norm with a single group: one mean and variance per example over *all* its positions and channels.

    This is what MobileViT v2 calls layer_norm_2d; it is not a norm per position. Parameters: `scale`, `bias` per channel.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *n c"]) -> Float[Array, "b *n c"]:
        """Normalise every example by itself."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return _norm(x.astype(self.dtype), scale, bias, tuple(range(1, x.ndim)), None)[0]


def _normalize(x: Array, mean: Array, variance: Array, scale: Array, bias: Array) -> Array:
    scale = scale * lax.rsqrt(variance + NORM_EPSILON)
    return x.astype(jnp.float32) * scale + (bias - mean * scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _norm(
    x: Array, scale: Array, bias: Array, axes: tuple[int, ...], activation: Activation | None
) -> tuple[Array, Array, Array]:
    """Normalise over `axes` by their own statistics, then activate; also return the mean and the biased variance.

    All arithmetic is float32. The gradient is written by hand because JAX's own would keep, per layer, the centred
    input, the normalised one and the sigmoid; this one keeps the input and recomputes the rest. No gradient flows
    through the returned statistics.
    """
    mean = x.mean(axes, dtype=jnp.float32, keepdims=True)
    # In two passes: a difference of large squares would lose the digits of a small variance.
    variance = jnp.square(x - mean).mean(axes, keepdims=True)
    y = _normalize(x, mean, variance, scale, bias).astype(x.dtype)
    return (y if activation is None else activation(y)), mean, variance


def _norm_forward(
    x: Array, scale: Array, bias: Array, axes: tuple[int, ...], activation: Activation | None
) -> tuple:
    y, mean, variance = _norm(x, scale, bias, axes, activation)
    return (y, mean, variance), (x, scale, bias, mean, variance)


def _norm_backward(
    axes: tuple[int, ...], activation: Activation | None, residuals: tuple, cotangents: tuple
) -> tuple:
    x, scale, bias, mean, variance = residuals
    # The barrier keeps XLA from recognising the forward pass here, whose intermediates it would then keep in memory.
    x, cotangent = lax.optimization_barrier((x, cotangents[0]))
    if activation is not None:
        y = _normalize(x, mean, variance, scale, bias).astype(x.dtype)
        (cotangent,) = jax.vjp(activation, y)[1](cotangent)
    cotangent = cotangent.astype(jnp.float32)
    deviation = lax.rsqrt(variance + NORM_EPSILON)

    positions = tuple(axis for axis in axes if axis != x.ndim - 1)
    along_bias = cotangent.sum(positions, keepdims=True)
    unit = x * deviation - mean * deviation
    along_scale = (cotangent * unit).sum(positions, keepdims=True)
    count = math.prod(x.shape[axis] for axis in axes)
    offset, slope = scale * along_bias / count, scale * along_scale / count
    if len(positions) < len(axes):  # the statistics are shared by the channels
        offset, slope = offset.sum(-1, keepdims=True), slope.sum(-1, keepdims=True)
    # Written as a sum over maps with factors per channel, lest XLA write out the normalised x.
    slope = slope * deviation
    x_gradient = scale * deviation * cotangent - slope * deviation * x + (slope * mean - offset) * deviation
    return (
        x_gradient.astype(x.dtype),
        along_scale.reshape(-1, scale.size).sum(0),
        along_bias.reshape(-1, scale.size).sum(0),
    )


_norm.defvjp(_norm_forward, _norm_backward)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, and an activation where one is given."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    activation: Activation | None = None
    weight_init: str = "torch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b oh ow d"]:
        """Convolve, normalise, activate."""
        x = Conv(
            self.features,
            kernel_size=self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            weight_init=self.weight_init,
            dtype=self.dtype,
            name="conv",
        )(x)
        return BatchNorm(self.activation, dtype=self.dtype, name="norm")(x, train=train)


class InvertedResidual(nn.Module):
    """MobileNet v2's block: expand the channels, filter each, project; added to the input where the shapes agree.

    `expansion` 1 leaves the expanding convolution out. (Sandler et al. 2018, section 3.3)
    """

    features: int
    stride: int = 1
    expansion: float = 2
    activation: Activation = nn.silu
    weight_init: str = "torch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b oh ow d"]:
        """Expand, filter, project."""
        hidden = make_divisible(round(x.shape[-1] * self.expansion), 8)
        conv = functools.partial(ConvNorm, weight_init=self.weight_init, dtype=self.dtype)
        y = x
        if self.expansion != 1:
            y = conv(hidden, kernel_size=1, activation=self.activation, name="expand")(
                y, train=train
            )
        y = conv(
            hidden, stride=self.stride, groups=hidden, activation=self.activation, name="depthwise"
        )(y, train=train)
        y = conv(self.features, kernel_size=1, name="project")(y, train=train)
        return x + y if x.shape == y.shape else y


# --- resize --------------------------------------------------------------------------------------------------------


def resize_align_corners(
    x: Float[Array, "b h w c"], *, size: tuple[int, int]
) -> Float[Array, "b oh ow c"]:
    """Bilinear resize that maps corner pixels onto corner pixels (`align_corners=True` in PyTorch).

    Output pixel `o` reads the input at `o * (in - 1) / (out - 1)`, at 0 if there is one output pixel. jax.image has only
    the other convention. Two products with constant matrices: no gather in an exported model, no scatter in the gradient.
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
    """Matrix (new_size, size) whose row holds the weights of the two neighbours of one output pixel."""
    source = np.arange(new_size) * ((size - 1) / max(new_size - 1, 1))
    lower = np.minimum(source.astype(np.int64), size - 1)
    upper = np.minimum(lower + 1, size - 1)
    matrix = np.zeros((new_size, size), np.float32)
    np.add.at(matrix, (np.arange(new_size), lower), 1 - (source - lower))
    np.add.at(matrix, (np.arange(new_size), upper), source - lower)
    return matrix
