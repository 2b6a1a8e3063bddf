"""Layers every architecture of this package is made of: convolution, norms, inverted residual.

Before editing: maps are NHWC. Parameters are float32 and cast to the module's `dtype` where they
are used; norms reduce and scale in float32 and cast only their result. Parameter paths are public.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mobilevit_jax.models import kernels
from mobilevit_jax.models.convolution import conv, depthwise_conv, pointwise_conv
from mobilevit_jax.models.kernels import Activation, Finish

STAGES = ("stem", "layer_1", "layer_2", "layer_3", "layer_4", "layer_5")  # of every network
NORM_EPSILON = 1e-5
LARGE_MAP = 2**16  # floats of an image's expanded map, from which on it is kept in the cache
BATCH_NORM_MOMENTUM = 0.9  # PyTorch calls the same thing momentum 0.1

Initializer = Callable[..., Array]


def make_divisible(value: float, divisor: int = 8, *, minimum: int | None = None) -> int:
    """Round a channel count to a multiple of `divisor`, at least `minimum`.

    The result is never more than 10% below `value`.
    """
    rounded = max(minimum or divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def bound(value: float, low: float, high: float) -> float:
    """Clip `value` to the interval [low, high]."""
    return max(low, min(high, value))


# --- weights at the start -------------------------------------------------------------------------


def check_weight_init(weight_init: str) -> None:
    """Raise ValueError unless `weight_init` is "torch" or "kaiming".

    "torch" is what the published MobileViT v2 and MobileNet weights really started from: PyTorch's
    own defaults, uniform kernels *and* biases, and Xavier-uniform linear layers. "kaiming" is what
    their recipes say and what v1 started from: normal kernels scaled by fan-out, linear layers of
    standard deviation 0.02, zero biases.
    """
    if weight_init not in ("torch", "kaiming"):
        raise ValueError(f'weight_init is {weight_init!r}; use "torch" or "kaiming"')


def conv_inits(weight_init: str, *, fan_in: int, fan_out: int) -> tuple[Initializer, Initializer]:
    """Initialisers of a convolution's kernel and bias."""
    if weight_init == "torch":
        both = _uniform(1 / math.sqrt(fan_in))
        return both, both
    return _normal(math.sqrt(2 / fan_out)), nn.initializers.zeros


def _linear_init(weight_init: str, *, fan_in: int, fan_out: int) -> Initializer:
    if weight_init == "torch":
        return _uniform(math.sqrt(6 / (fan_in + fan_out)))
    return _normal(0.02)


def _uniform(limit: float) -> Initializer:
    return lambda rng, shape: limit * (2 * _unit_interval(rng, shape) - 1)


def _normal(deviation: float) -> Initializer:
    factor = math.sqrt(2) * deviation
    return lambda rng, shape: factor * lax.erf_inv(2 * _unit_interval(rng, shape) - 1)


def _unit_interval(rng: Array, shape: tuple[int, ...]) -> Array:
    """Uniform numbers strictly between 0 and 1: a hash of the key and of each element's index.

    jax.random compiles a loop per parameter, and a MobileViT v2 has 101 that start at random: three
    quarters of the time to compile its initialisation. The hash is pcg3d (Jarzynski and Olano 2020,
    "Hash functions for GPU rendering").
    """
    words = jax.random.key_data(rng).ravel()
    index = lax.iota(jnp.uint32, math.prod(shape))
    x, y, z = (v * jnp.uint32(1664525) + jnp.uint32(1013904223) for v in (index, *words[:2]))
    for _ in range(2):
        x = x + y * z
        y = y + z * x
        z = z + x * y
        x, y, z = (v ^ (v >> 16) for v in (x, y, z))
    return ((x >> 9).astype(jnp.float32) + 0.5).reshape(shape) / 2**23


# --- fields all architectures share ---------------------------------------------------------------


def check_network(
    image: tuple[int, ...],
    *,
    num_classes: int,
    strides: Sequence[int],
    dropouts: Mapping[str, float | None],
    weight_init: str,
    remat: Sequence[str],
    dtype: DTypeLike,
) -> None:
    """Raise ValueError for a field out of its range and for an image (h, w) too small.

    `dropouts` are rates by field; None stands for a default and passes.
    """
    check_weight_init(weight_init)
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; use 1 or more")
    for name, rate in dropouts.items():
        if rate is not None and not 0 <= rate < 1:
            raise ValueError(f"{name} is {rate}; use a number from 0 to below 1")
    if len(strides) != 6 or any(stride not in (1, 2) for stride in strides):
        raise ValueError(
            f"strides is {strides}; use six numbers, each 1 or 2, for the stem and "
            "layer_1 to layer_5, such as (2, 1, 2, 2, 2, 2)"
        )
    if jnp.dtype(dtype).name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f'dtype is {dtype}; use "float32", "bfloat16" or "float16"')
    check_remat(remat)
    smallest = math.prod(strides)
    if min(image) < smallest:
        raise ValueError(
            f"the image is {image[0]}x{image[1]} pixels; with strides {tuple(strides)} each "
            f"side needs at least {smallest}: use larger images or more strides of 1"
        )


def check_remat(remat: Sequence[str]) -> None:
    """Raise ValueError unless `remat` holds names of stages and nothing else."""
    if isinstance(remat, str) or not set(remat) <= set(STAGES):
        raise ValueError(
            f"remat is {remat!r}; use a tuple of names of stages, of {', '.join(STAGES)}"
        )


def check_width(width: float) -> None:
    """Raise ValueError unless `width`, the multiplier of channel counts, is positive."""
    if width <= 0:
        raise ValueError(f"width is {width}; use a positive number, such as 0.5 or 1.0")


def run_stage(
    stage: nn.Module, x: Float[Array, "b h w c"], *, train: bool, remat: Sequence[str]
) -> Float[Array, "b oh ow d"]:
    """Run a stage; one whose name is in `remat` is computed again for the gradient.

    Of such a stage only the input is kept from the forward to the backward pass, in place of the
    activations of all its layers; it costs that stage's forward pass once more, in all stages about
    a quarter of a training step's arithmetic. Results and parameters are the same. On a CPU the
    compiler moves the second pass to the first, so that nothing is saved there.
    """

    def run(stage: nn.Module, x: Array) -> Array:
        return stage(x, train=train)

    return (nn.remat(run) if stage.name in remat else run)(stage, x)


def add_branch(
    x: Float[Array, "b *n c"],
    branch: Callable[..., Array],
    y: Float[Array, "b *n d"],
    *,
    dropout: float,
    train: bool,
) -> Float[Array, "b *n c"]:
    """x plus the branch of y, with dropout on the branch; for use inside a compact module.

    `branch(y, added=x)` gives both, so that a product can end with the addition.
    """
    if train and dropout:
        return x + nn.Dropout(dropout, deterministic=False)(branch(y))
    return branch(y, added=x)


# --- layers ---------------------------------------------------------------------------------------


class Conv(nn.Module):
    """Square convolution with zeros around the map: `h -> ceil(h / stride)`.

    One of size 1 also takes what has no map, (b, c).

    Parameters: `kernel` (k, k, c / groups, features) and, if asked for, `bias` (features).
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    use_bias: bool = False
    activation: Activation | None = None
    weight_init: str = "torch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *n c"],
        finish: Finish | None = None,
        *,
        added: Float[Array, "b *m d"] | None = None,
    ) -> Float[Array, "b *m d"]:
        """Convolve, and add the bias and activate; or finish as the norm that follows wants it.

        `added` is a map that is added to the result.
        """
        channels, area = x.shape[-1], self.kernel_size**2
        # fan_out counts all output channels, groups or not, as the published code does.
        kernel_init, bias_init = conv_inits(
            self.weight_init, fan_in=area * channels // self.groups, fan_out=area * self.features
        )
        shape = (self.kernel_size, self.kernel_size, channels // self.groups, self.features)
        kernel = self.param("kernel", kernel_init, shape).astype(self.dtype)
        x = x.astype(self.dtype)
        if finish is None:
            finish = Finish(activation=self.activation, added=added)
        if self.use_bias:
            finish = finish._replace(shift=self.param("bias", bias_init, (self.features,)))
        if self.kernel_size == self.stride == self.groups == 1:
            return pointwise_conv(x, kernel[0, 0], finish)
        options = {"stride": self.stride, "dilation": self.dilation, "finish": finish}
        if self.groups == channels == self.features:
            return depthwise_conv(x, kernel, **options)
        return conv(x, kernel, groups=self.groups, **options)


class PointwiseWeights(nn.Module):
    """The parameters of a 1x1 `Conv` with bias, for a module that applies them in pieces."""

    features: int
    weight_init: str = "torch"

    @nn.compact
    def __call__(self, channels: int) -> tuple[Float[Array, "c d"], Float[Array, " d"]]:
        """Return kernel and bias in float32."""
        inits = conv_inits(self.weight_init, fan_in=channels, fan_out=self.features)
        kernel = self.param("kernel", inits[0], (1, 1, channels, self.features))
        return kernel[0, 0], self.param("bias", inits[1], (self.features,))


class Linear(nn.Module):
    """Linear layer over the last axis. Parameters: `kernel` (c, features), `bias` (features)."""

    features: int
    use_bias: bool = True
    activation: Activation | None = None
    weight_init: str = "torch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*b c"], *, added: Float[Array, "*b d"] | None = None
    ) -> Float[Array, "*b d"]:
        """Multiply, add the bias, activate, add another array where there is one."""
        shape = (x.shape[-1], self.features)
        init = _linear_init(self.weight_init, fan_in=shape[0], fan_out=shape[1])
        kernel = self.param("kernel", init, shape).astype(self.dtype)
        finish = Finish(activation=self.activation, added=added)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            finish = finish._replace(shift=bias)
        return pointwise_conv(x.astype(self.dtype), kernel, finish)


class BatchNorm(nn.Module):
    """Batch norm as PyTorch does it, and an activation where one is given.

    The batch is normalised with its biased variance, but the *unbiased* one goes into the running
    variance (flax's own layer stores the biased one). With a batch sharded over devices the
    statistics are those of the whole batch. Parameters: `scale`, `bias`; in the collection
    batch_stats the running `mean` and `var`.
    """

    activation: Activation | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *n c"], *, train: bool, after: Conv | None = None
    ) -> Float[Array, "b *m d"]:
        """Normalise with the batch's statistics when `train`, else with the running ones.

        What is normalised is x or, `after` a convolution, what that makes of it: at inference,
        norm and activation are how it finishes. Raises ValueError when training on one value per
        channel, whose variance is undefined.
        """
        features = x.shape[-1:] if after is None else (after.features,)
        scale = self.param("scale", nn.initializers.ones, features)
        bias = self.param("bias", nn.initializers.zeros, features)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        running_variance = self.variable("batch_stats", "var", jnp.ones, features)
        x = x.astype(self.dtype)
        if not train:
            finish = _running(
                scale, bias, running_mean.value, running_variance.value, self.activation
            )
            return finish(x) if after is None else after(x, finish)

        x = x if after is None else after(x)
        count = x.size // x.shape[-1]
        if count == 1:
            raise ValueError(
                f"batch norm cannot train on a map of shape {x.shape}: one value per channel has "
                "no variance; use a larger batch or larger images"
            )
        y, mean, variance = _norm(x, scale, bias, tuple(range(x.ndim - 1)), self.activation)
        if not self.is_initializing():
            keep = BATCH_NORM_MOMENTUM
            variance = variance.reshape(features) * (count / (count - 1))
            running_mean.value = keep * running_mean.value + (1 - keep) * mean.reshape(features)
            running_variance.value = keep * running_variance.value + (1 - keep) * variance
        return y


def _running(
    scale: Array, bias: Array, mean: Array, var: Array, activation: Activation | None
) -> Finish:
    """A norm with running statistics, as a convolution finishes with it."""
    scale = scale * lax.rsqrt(var + NORM_EPSILON)
    return Finish(scale, bias - mean * scale, activation)


class GroupNorm(nn.Module):
    """Group norm with one group: a mean and variance per example over *all* positions and channels.

    MobileViT v2 calls it layer_norm_2d, but it is not a norm per position. Parameters: `scale` and
    `bias` per channel.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *n c"]) -> Float[Array, "b *n c"]:
        """Normalise every example by itself."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return _norm(x.astype(self.dtype), scale, bias, tuple(range(1, x.ndim)), None)[0]


class LayerNorm(nn.Module):
    """Layer norm: a mean and variance per position, over its channels.

    Parameters: `scale` and `bias` per channel.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        """Normalise every position by itself."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        x = x.astype(self.dtype)
        return (_kernel_layer_norm if kernels.serve(x) else _layer_norm)(x, scale, bias)


@jax.checkpoint  # keeps the input for the gradient, and not also what is computed from it
def _layer_norm(x: Array, scale: Array, bias: Array) -> Array:
    mean = x.mean(-1, dtype=jnp.float32, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    y = (x - mean) * lax.rsqrt(variance + NORM_EPSILON) * scale + bias
    return y.astype(x.dtype)


@jax.custom_vjp
def _kernel_layer_norm(x: Array, scale: Array, bias: Array) -> Array:
    return kernels.layer_norm(x, scale, bias, epsilon=NORM_EPSILON)


def _layer_norm_forward(*operands: Array) -> tuple[Array, tuple[Array, ...]]:
    return _kernel_layer_norm(*operands), operands


def _layer_norm_backward(operands: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
    return jax.vjp(_layer_norm, *operands)[1](cotangent)


_kernel_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _affine(x: Array, mean: Array, variance: Array, scale: Array, bias: Array) -> Array:
    scale = scale * lax.rsqrt(variance + NORM_EPSILON)
    return (x.astype(jnp.float32) * scale + (bias - mean * scale)).astype(x.dtype)


# The gradient is written by hand because JAX's own would keep, for every norm, the centred input,
# the normalised one and the activation's parts; this one keeps the input and recomputes the rest.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _norm(
    x: Array, scale: Array, bias: Array, axes: tuple[int, ...], activation: Activation | None
) -> tuple[Array, Array, Array]:
    """Normalise by the mean and biased variance over `axes`, which are returned too; activate.

    Statistics are float32. No gradient flows through the ones returned.
    """
    if activation in kernels.ACTIVATIONS and kernels.serve(x, scale, bias):
        return kernels.norm(x, scale, bias, axes, activation, epsilon=NORM_EPSILON)
    mean = x.mean(axes, dtype=jnp.float32, keepdims=True)
    # In two passes: a difference of large squares would lose the digits of a small variance.
    variance = jnp.square(x - mean).mean(axes, keepdims=True)
    y = _affine(x, mean, variance, scale, bias)
    return (y if activation is None else activation(y)), mean, variance


def _norm_forward(
    x: Array, scale: Array, bias: Array, axes: tuple[int, ...], activation: Activation | None
) -> tuple:
    y, mean, variance = _norm(x, scale, bias, axes, activation)
    return (y, mean, variance), (x, scale, bias, mean, variance)


def _norm_backward(
    axes: tuple[int, ...], activation: Activation | None, residuals: tuple, cotangents: tuple
) -> tuple[Array, Array, Array]:
    x, scale, bias, mean, variance = residuals
    if activation in kernels.ACTIVATIONS and kernels.serve(x, scale, bias):
        options = {"axes": axes, "activation": activation, "epsilon": NORM_EPSILON}
        return kernels.norm_gradients(residuals, cotangents[0], **options)
    # Without the barrier XLA recognises the forward pass below and keeps its intermediate results.
    x, cotangent = lax.optimization_barrier((x, cotangents[0]))
    if activation is not None:
        (cotangent,) = jax.vjp(activation, _affine(x, mean, variance, scale, bias))[1](cotangent)
    cotangent = cotangent.astype(jnp.float32)

    deviation = lax.rsqrt(variance + NORM_EPSILON)
    unit = x * deviation - mean * deviation
    positions = tuple(axis for axis in axes if axis != x.ndim - 1)
    sums = jnp.stack([cotangent.sum(positions), (cotangent * unit).sum(positions)])  # 2 [b] c
    sums = lax.optimization_barrier(sums)  # lest XLA reduce the map again for each sum of these
    means = sums * scale / math.prod(x.shape[axis] for axis in axes)
    if len(positions) < len(axes):  # the channels share their statistics
        means = means.sum(-1, keepdims=True)
    offset, slope = jnp.expand_dims(means, tuple(axis + 1 for axis in positions))
    # scale * cotangent - offset - slope * unit, all times deviation: spelled out, lest XLA keep the
    # normalised map for the two places that would use it.
    slope = slope * deviation
    shift = (slope * mean - offset) * deviation
    x_gradient = scale * deviation * cotangent - slope * deviation * x + shift
    along_bias, along_scale = sums.reshape(2, -1, scale.size).sum(1)
    return x_gradient.astype(x.dtype), along_scale, along_bias


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
        conv = Conv(
            self.features,
            kernel_size=self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            weight_init=self.weight_init,
            dtype=self.dtype,
            name="conv",
        )
        norm = BatchNorm(self.activation, dtype=self.dtype, name="norm")
        return norm(x, train=train, after=conv)

    def at_inference(self) -> tuple[Float[Array, "k k i d"], Finish]:
        """The kernel, and how it finishes at inference, for what does several layers at once."""
        params, statistics = self.variables["params"], self.variables["batch_stats"]["norm"]
        finish = _running(**params["norm"], **statistics, activation=self.activation)
        return params["conv"]["kernel"], finish


class InvertedResidual(nn.Module):
    """MobileNet v2's block: expand the channels, filter each, project. (Sandler et al. 2018)

    The input is added where stride and channels leave its shape alone. `expansion` 1 leaves the
    expanding convolution out.
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
        layer = functools.partial(ConvNorm, weight_init=self.weight_init, dtype=self.dtype)
        expand = layer(hidden, kernel_size=1, activation=self.activation, name="expand")
        depthwise = layer(
            hidden, stride=self.stride, groups=hidden, activation=self.activation, name="depthwise"
        )
        project = layer(self.features, kernel_size=1, name="project")
        residual = self.stride == 1 and x.shape[-1] == self.features
        if not train and not self.is_initializing() and self._as_one(x, hidden):
            layers = [each.at_inference() for each in (expand, depthwise, project)]
            layers = [
                (kernel if i == 1 else kernel[0, 0], finish)
                for i, (kernel, finish) in enumerate(layers)
            ]
            return kernels.inverted_residual(x, layers, stride=self.stride, residual=residual)
        y = x if self.expansion == 1 else expand(x, train=train)
        y = project(depthwise(y, train=train), train=train)
        return x + y if residual else y

    def _as_one(self, x: Array, hidden: int) -> bool:
        """Whether a kernel does all three, to keep an expanded map in the cache that is large."""
        large = math.prod(x.shape[1:-1]) * hidden >= LARGE_MAP
        known = self.expansion != 1 and self.activation in kernels.ACTIVATIONS
        return large and known and self.dtype == jnp.float32 and kernels.serve(x)
