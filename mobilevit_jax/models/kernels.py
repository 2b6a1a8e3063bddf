"""The layers that take a network's time on a CPU, in float32, as kernels of our own (kernels.cc).

XLA's thread pool takes as long to wake as a layer of an image takes to compute, its depthwise
convolutions and reductions are slow, and it stores what a norm and an activation could finish in
registers. The kernels need a C++ compiler, as torch.compile does: they are compiled once a machine,
at the first use, into the user's cache. Without one, with several devices and in other dtypes the
networks are XLA's alone (convolution.py, layers.py), which also is what gets exported; the tests
compare the two.

Before editing: XLA cannot divide a kernel among devices, nor see into it. A program that was
compiled with a kernel names it, so the names hold a digest of the source.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import logging
import os
import pathlib
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from mobilevit_jax import native

Activation = Callable[[Array], Array]

SOURCE = pathlib.Path(__file__).with_suffix(".cc")
SWITCH = "MOBILEVIT_KERNELS"  # environment variable; "off" does without
# By their numbers in kernels.cc.
ACTIVATIONS: tuple[Activation | None, ...] = (None, nn.silu, nn.relu, nn.relu6, nn.hard_swish)
DEPTHWISE_SIZES = (3, 5)
# The kernels, and additions and multiplications of a call by the shapes of operands and of the last
# result; those of norms, finishes and softmax are left out.
HANDLERS: Mapping[str, Callable[[Sequence[tuple[int, ...]], tuple[int, ...]], int]] = {
    "Matmul": lambda x, y: 2 * prod(y) * x[1][0],
    "MatmulKernelGradient": lambda x, y: 2 * prod(y) * x[0][0],
    "Convolution": lambda x, y: 2 * prod(y) * prod(x[1][:3]),
    "ConvolutionKernelGradient": lambda x, y: 2 * prod(x[1]) * prod(y[:3]),
    "Attention": lambda x, y: prod(y) * prod(y[1:3]),
    "Depthwise": lambda x, y: 2 * prod(y) * prod(x[1][:2]),
    "DepthwiseInputGradient": lambda x, y: 2 * prod(x[0]) * prod(x[1][:2]),
    "DepthwiseKernelGradient": lambda x, y: 2 * prod(x[1]) * prod(y[1:3]),
    "InvertedResidual": lambda x, y: (
        2 * (prod(x[0][:3]) * prod(x[1]) + prod(y[:3]) * (prod(x[4]) + prod(x[7])))
    ),
    "SeparableContext": lambda x, y: 4 * prod(x[0]) + 2 * prod(y) * y[2],
    "SeparableValues": lambda x, y: 2 * prod(y) * y[3],
    "Norm": lambda x, y: 0,
    "LayerNorm": lambda x, y: 0,
    "NormGradientSums": lambda x, y: 0,
    "NormGradient": lambda x, y: 0,
}
# A call in the text of a compiled program: result, handler, operands.
_CALL = re.compile(
    r"= (\S+) custom-call\([^\n]*?custom_call_target=\"mobilevit_jax\.kernels-\w+\.(\w+)\", "
    r"operand_layout_constraints={(.*?)}, api_version"
)
_SHAPE = re.compile(r"f32\[([\d,]*)\]")
# Into so many parts, at most, the rows of a batch are divided for a depthwise kernel's gradient:
# sums of their own, which the threads share, so not a number that depends on them.
PARTS = 16


# --- whether, and how they come to be -------------------------------------------------------------


class Library(NamedTuple):
    """The kernels: the name that is ahead of their own in a program, or what is in the way."""

    prefix: str = ""
    reason: str = ""
    loaded: ctypes.CDLL | None = None


_wanted: list[bool] = []  # of the innermost `use`, last


@contextlib.contextmanager
def use(wanted: bool) -> Iterator[None]:
    """What is traced inside has the kernels, or has not, whatever the devices are."""
    _wanted.append(wanted)
    try:
        yield
    finally:
        _wanted.pop()


def serve(*arrays: Array | None) -> bool:
    """Whether a layer of these arrays, as it is traced, is to use the kernels.

    Raises RuntimeError inside `use(True)` where they cannot be compiled.
    """
    if any(array is not None and array.dtype != jnp.float32 for array in arrays):
        return False
    if _wanted:
        if _wanted[-1] and library().reason:
            raise RuntimeError(library().reason)
        return _wanted[-1]
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return False
    return not library().reason


@functools.cache
def library() -> Library:
    """The kernels, compiled where this machine has not done so yet, and known to jax."""
    if os.environ.get(SWITCH) == "off":
        return Library(reason=f"switched off by {SWITCH}=off")
    x86 = platform.machine() in ("x86_64", "AMD64")
    flags = ["-std=c++20", "-O3", "-march=native" if x86 else "-mcpu=native"]
    try:
        path = native.compiled(
            SOURCE,
            flags,
            headers=[jax.ffi.include_dir()],
            versions=[importlib.metadata.version("jaxlib")],
        )
        loaded = ctypes.CDLL(str(path))
    except (native.BuildError, OSError) as error:
        logging.getLogger(__name__).warning(
            "The networks run without their CPU kernels, slower: %s", error
        )
        return Library(reason=str(error))
    prefix = f"mobilevit_jax.{path.stem}."
    for handler in HANDLERS:
        capsule = jax.ffi.pycapsule(getattr(loaded, handler))
        jax.ffi.register_ffi_target(prefix + handler, capsule, platform="cpu")
    return Library(prefix, loaded=loaded)


def program() -> contextlib.AbstractContextManager[None]:
    """A program runs inside; for those who run several at a time.

    Threads help a program with its layers. Where there is as much work as there are cores they do
    not: each keeps its own core busy, and none waits for another's.
    """
    return _counted("begin_program", "end_program")


def work() -> contextlib.AbstractContextManager[None]:
    """As `program`, for something else that keeps a core busy, in the thread that is inside."""
    return _counted("begin_work", "end_work")


@contextlib.contextmanager
def _counted(begin: str, end: str) -> Iterator[None]:
    loaded = library().loaded if serve() else None
    if loaded is None:
        yield
        return
    getattr(loaded, begin)()
    try:
        yield
    finally:
        getattr(loaded, end)()


def flops(program: str) -> int:
    """Additions and multiplications of the kernels in a compiled program, given as its text."""
    total = 0
    for result, handler, operands in _CALL.findall(program):
        shapes = [
            tuple(int(size) for size in sizes.split(",") if size)
            for sizes in _SHAPE.findall(operands + result)
        ]
        total += HANDLERS[handler](shapes[:-1], shapes[-1])
    return total


def _calls(
    handler: str,
    results: Sequence[tuple[int, ...]],
    *arrays: Array | None,
    **numbers: int | np.float32,
) -> list[Array]:
    """A kernel's results, of these shapes; None stands for an operand that is absent."""
    call = jax.ffi.ffi_call(
        library().prefix + handler,
        [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results],
        vmap_method="sequential",
    )
    given = [jnp.zeros((0,), jnp.float32) if array is None else array for array in arrays]
    typed = {n: np.int64(v) if isinstance(v, int) else v for n, v in numbers.items()}
    return list(call(*given, **typed))


def _call(
    handler: str, result: tuple[int, ...], *arrays: Array | None, **numbers: int | np.float32
) -> Array:
    """The result of a kernel that has one."""
    return _calls(handler, [result], *arrays, **numbers)[0]


# --- convolutions ---------------------------------------------------------------------------------


class Finish(NamedTuple):
    """What follows a convolution: times a scale, plus a shift, activated, plus another map."""

    scale: Float[Array, " d"] | None = None
    shift: Float[Array, " d"] | None = None
    activation: Activation | None = None
    added: Float[Array, "*n d"] | None = None

    def __call__(self, y: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """Without a kernel; in the dtype of `y`, but scaled and shifted in float32.

        So are the gradients of scale and shift, sums over all positions: in bfloat16, a thousand
        equal terms may come to less than a tenth of their sum.
        """
        if self.scale is not None or self.shift is not None:
            x = y.astype(jnp.float32)
            x = x if self.scale is None else x * self.scale
            y = (x if self.shift is None else x + self.shift).astype(y.dtype)
        # The gradient of an activation needs y, not also what is computed on the way.
        y = y if self.activation is None else jax.checkpoint(self.activation)(y)
        return y if self.added is None else y + self.added

    def arrays(self) -> tuple[Array | None, ...]:
        """Those that it holds."""
        return self.scale, self.shift, self.added


class _Kind(NamedTuple):
    """A convolution: its kernel, and those of its gradients, as functions.

    `forward(x, kernel, finish)` and `gradients(x, kernel, cotangent)`; hashable, so it is made by
    functions that are cached.
    """

    forward: Callable[[Array, Array, Finish], Array]
    gradients: Callable[[Array, Array, Array], tuple[Array, Array]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def _convolve(
    kind: _Kind,
    x: Array,
    kernel: Array,
    scale: Array | None,
    shift: Array | None,
    activation: Activation | None,
    added: Array | None,
) -> Array:
    if activation not in ACTIVATIONS:
        rest = Finish(activation=activation, added=added)
        return rest(kind.forward(x, kernel, Finish(scale, shift)))
    return kind.forward(x, kernel, Finish(scale, shift, activation, added))


def _convolve_forward(
    kind: _Kind,
    x: Array,
    kernel: Array,
    scale: Array | None,
    shift: Array | None,
    activation: Activation | None,
    added: Array | None,
) -> tuple:
    residuals = (x, kernel, scale, shift, None if added is None else ())  # which has no leaves
    if activation is None:
        return _convolve(kind, x, kernel, scale, shift, None, added), (*residuals, None)
    # Where there will be a gradient, the activation is not the kernel's: its input is needed again.
    y = _convolve(kind, x, kernel, scale, shift, None, None)
    return Finish(activation=activation, added=added)(y), (*residuals, y)


def _convolve_backward(
    kind: _Kind, activation: Activation | None, residuals: tuple, cotangent: Array
) -> tuple:
    x, kernel, scale, shift, had_added, activated = residuals
    along_added = None if had_added is None else cotangent
    if activation is not None:
        (cotangent,) = jax.vjp(activation, activated)[1](cotangent)
    positions = tuple(range(cotangent.ndim - 1))
    along_shift = None if shift is None else cotangent.sum(positions)
    along_scale = None
    if scale is not None:
        along_scale = (cotangent * kind.forward(x, kernel, Finish())).sum(positions)
        cotangent = cotangent * scale
    return *kind.gradients(x, kernel, cotangent), along_scale, along_shift, along_added


_convolve.defvjp(_convolve_forward, _convolve_backward)


def pointwise_conv(
    x: Float[Array, "*b c"], kernel: Float[Array, "c d"], finish: Finish
) -> Float[Array, "*b d"]:
    """1x1 convolution, finished."""
    return _convolve(_pointwise(), x, kernel, *finish)


def conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k c d"],
    finish: Finish,
    *,
    stride: int,
    dilation: int,
) -> Float[Array, "b oh ow d"]:
    """Convolution with an odd-sized kernel, finished: `oh = ceil(h / stride)`, zeros outside."""
    return _convolve(_dense(stride, dilation), x, kernel, *finish)


def depthwise_conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k 1 c"],
    finish: Finish,
    *,
    stride: int,
    dilation: int,
) -> Float[Array, "b oh ow c"]:
    """Every channel with its own kernel, of DEPTHWISE_SIZES, finished."""
    return _convolve(_depthwise(stride, dilation), x, kernel, *finish)


def inverted_residual(
    x: Float[Array, "b h w c"],
    layers: Sequence[tuple[Array, Finish]],
    *,
    stride: int,
    residual: bool,
) -> Float[Array, "b oh ow d"]:
    """Three convolutions at inference, of which what lies between them never leaves the cache.

    Args:
        x: the map.
        layers: kernels and finishes of expansion (c, e), depthwise (3, 3, 1, e) and projection
            (e, d), with scale and shift; the first two have the same activation, the last none.
        stride: of the depthwise one.
        residual: whether x is added.
    """
    operands = tuple((kernel, finish.scale, finish.shift) for kernel, finish in layers)
    return _inverted_residual(x, operands, layers[0][1].activation, stride, residual)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _inverted_residual(
    x: Array,
    operands: tuple[tuple[Array, Array, Array], ...],
    activation: Activation | None,
    stride: int,
    residual: bool,
) -> Array:
    result = (*_out(x, stride), operands[2][0].shape[1])
    numbers = {"stride": stride, "activation": ACTIVATIONS.index(activation)}
    flat = [each for layer in operands for each in layer]
    return _call("InvertedResidual", result, x, *flat, residual=int(residual), **numbers)


def _inverted_residual_forward(
    x: Array, operands: tuple, activation: Activation | None, stride: int, residual: bool
) -> tuple:
    return _inverted_residual(x, operands, activation, stride, residual), (x, operands)


def _inverted_residual_backward(
    activation: Activation | None, stride: int, residual: bool, residuals: tuple, cotangent: Array
) -> tuple:
    def in_steps(x: Array, operands: tuple) -> Array:
        y = _convolve(_pointwise(), x, *operands[0], activation, None)
        y = _convolve(_depthwise(stride, 1), y, *operands[1], activation, None)
        return _convolve(_pointwise(), y, *operands[2], None, x if residual else None)

    return jax.vjp(in_steps, *residuals)[1](cotangent)


_inverted_residual.defvjp(_inverted_residual_forward, _inverted_residual_backward)


def _finished(handler: str, result: tuple[int, ...], x: Array, kernel: Array, finish: Finish, **at):
    number = ACTIVATIONS.index(finish.activation)
    return _call(handler, result, x, kernel, *finish.arrays(), activation=number, **at)


@functools.cache
def _pointwise() -> _Kind:
    def forward(x: Array, kernel: Array, finish: Finish) -> Array:
        flat = x.reshape(-1, x.shape[-1])  # (b h w) c
        result = (flat.shape[0], kernel.shape[1])
        if finish.added is not None:
            finish = finish._replace(added=finish.added.reshape(result))
        y = _finished("Matmul", result, flat, kernel, finish)
        return y.reshape(*x.shape[:-1], kernel.shape[1])

    def gradients(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
        rows = (array.reshape(-1, array.shape[-1]) for array in (x, cotangent))
        return (
            forward(cotangent, kernel.T, Finish()),
            _call("MatmulKernelGradient", kernel.shape, *rows),
        )

    return _Kind(forward, gradients)


@functools.cache
def _dense(stride: int, dilation: int) -> _Kind:
    def forward(x: Array, kernel: Array, finish: Finish) -> Array:
        result = (*_out(x, stride), kernel.shape[-1])
        padded = _padded(x, kernel, dilation)
        at = {"stride": stride, "dilation": dilation}
        return _finished("Convolution", result, padded, kernel, finish, **at)

    def gradients(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
        # Of x: the flipped kernel, channels exchanged, over the cotangent spread by the stride.
        rest = [
            size - (out - 1) * stride - 1
            for size, out in zip(x.shape[1:3], cotangent.shape[1:3], strict=True)
        ]
        spread = lax.pad(
            cotangent,
            jnp.float32(0),
            ((0, 0, 0), (0, rest[0], stride - 1), (0, rest[1], stride - 1), (0, 0, 0)),
        )
        flipped = kernel[::-1, ::-1].swapaxes(2, 3)
        along_x = _dense(1, dilation).forward(spread, flipped, Finish())
        padded = _padded(x, kernel, dilation)
        at = {"stride": stride, "dilation": dilation}
        return along_x, _call("ConvolutionKernelGradient", kernel.shape, padded, cotangent, **at)

    return _Kind(forward, gradients)


@functools.cache
def _depthwise(stride: int, dilation: int) -> _Kind:
    at = {"stride": stride, "dilation": dilation}

    def forward(x: Array, kernel: Array, finish: Finish) -> Array:
        return _finished("Depthwise", (*_out(x, stride), x.shape[-1]), x, kernel, finish, **at)

    def gradients(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
        if stride == 1:  # the same with the kernel flipped
            along_x = forward(cotangent, kernel[::-1, ::-1], Finish())
        else:
            along_x = _call("DepthwiseInputGradient", x.shape, cotangent, kernel, **at)
        parts = min(PARTS, cotangent.shape[0] * cotangent.shape[1])
        sums = _call("DepthwiseKernelGradient", (parts, *kernel.shape), x, cotangent, **at)
        return along_x, sums.sum(0)

    return _Kind(forward, gradients)


def _out(x: Array, stride: int) -> tuple[int, int, int]:
    return x.shape[0], -(-x.shape[1] // stride), -(-x.shape[2] // stride)


def _padded(x: Array, kernel: Array, dilation: int) -> Array:
    pad = (kernel.shape[0] - 1) // 2 * dilation
    return jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))


# --- attention ------------------------------------------------------------------------------------


def attention(qkv: Float[Array, "b h w c"], *, heads: int) -> Float[Array, "b h w d"]:
    """Dot-product attention between the patches of 2x2, for every pixel position and head.

    It has no gradient of its own.

    Args:
        qkv: queries, keys and values, one after another, heads contiguous within each.
        heads: of which all have `c / 3 / heads` channels.
    """
    return _call("Attention", (*qkv.shape[:3], qkv.shape[3] // 3), qkv, heads=heads)


def separable_attention(
    source: Float[Array, "b sh sw d"],
    x: Float[Array, "b h w d"],
    kernel: Float[Array, "d m"],
    bias: Float[Array, " m"],
) -> Float[Array, "b h w d"]:
    """The values of x times the context, taken from `source`, of their place in a patch of 2x2.

    It has no gradient of its own.

    Args:
        source: what scores and keys are taken from.
        x: what values are taken from.
        kernel: of the score, the key and the value, in this order: `m = 1 + 2d`.
        bias: of the same.
    """
    places = (x.shape[0], 4, x.shape[3])
    context = _call("SeparableContext", places, source, kernel, bias)
    return _call("SeparableValues", x.shape, x, kernel, bias, context)


# --- norms ----------------------------------------------------------------------------------------


def norm(
    x: Float[Array, "b *n c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    axes: tuple[int, ...],
    activation: Activation | None,
    *,
    epsilon: float,
) -> tuple[Array, Array, Array]:
    """Normalises by the mean and biased variance over `axes`, which are returned too; activates.

    Args:
        x: a map, or rows.
        scale: by channel, as `bias`.
        bias: added after that.
        axes: all but the first or the last one of x, or all but the first and the last.
        activation: of ACTIVATIONS.
        epsilon: added to the variance.
    """
    groups = _groups(x, axes)
    together = x.ndim - 1 in axes  # the channels share their statistics
    statistics = (groups.shape[0], 1 if together else groups.shape[2])
    y, mean, variance = _calls(
        "Norm",
        [groups.shape, statistics, statistics],
        groups,
        scale,
        bias,
        epsilon=np.float32(epsilon),
        together=int(together),
        activation=ACTIVATIONS.index(activation),
    )
    shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    return y.reshape(x.shape), mean.reshape(shape), variance.reshape(shape)


def norm_gradients(
    residuals: tuple[Array, Array, Array, Array, Array],
    cotangent: Float[Array, "b *n c"],
    *,
    axes: tuple[int, ...],
    activation: Activation | None,
    epsilon: float,
) -> tuple[Array, Array, Array]:
    """Gradients along x, scale and bias of `norm`.

    Args:
        residuals: x, scale, bias, and the mean and variance that came out.
        cotangent: of y; none flows through mean and variance.
        axes: see `norm`.
        activation: see `norm`.
        epsilon: see `norm`.
    """
    x, scale, bias, mean, variance = residuals
    groups, above = _groups(x, axes), _groups(cotangent, axes)
    mean, variance = (each.reshape(groups.shape[0], -1) for each in (mean, variance))  # g c, or g 1
    deviation = lax.rsqrt(variance + epsilon)
    slopes, shifts = _slopes(groups, mean, deviation, scale, bias)
    shape, number = slopes.shape, ACTIVATIONS.index(activation)

    def spread(each: Array) -> Array:
        return jnp.broadcast_to(each, shape)

    # Of the cotangent ahead of the activation, and of it times the normalised x.
    operands = (groups, above, slopes, shifts)
    statistics = (spread(mean), spread(deviation))
    sums = _call("NormGradientSums", (2, *shape), *operands, *statistics, activation=number)
    means = sums * scale / groups.shape[1]
    if mean.shape[-1] == 1:
        means = means.mean(-1, keepdims=True)
    offset, slope = means
    slope = slope * deviation
    factors = (scale * deviation, -slope * deviation, (slope * mean - offset) * deviation)
    along_x = _call(
        "NormGradient", groups.shape, *operands, *map(spread, factors), activation=number
    )
    along_bias, along_scale = sums.sum(1)
    return along_x.reshape(x.shape), along_scale, along_bias


def layer_norm(
    x: Float[Array, "*n c"], scale: Float[Array, " c"], bias: Float[Array, " c"], *, epsilon: float
) -> Float[Array, "*n c"]:
    """Normalises every position by its own mean and variance; it has no gradient of its own.

    Args:
        x: positions with their channels.
        scale: by channel, as `bias`.
        bias: added after that.
        epsilon: added to the variance.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = _call("LayerNorm", rows.shape, rows, scale, bias, epsilon=np.float32(epsilon))
    return y.reshape(x.shape)


def _groups(x: Array, axes: tuple[int, ...]) -> Float[Array, "g r c"]:
    """Groups of rows, each of which has statistics of its own, for each channel or for all."""
    return x.reshape(1 if 0 in axes else x.shape[0], -1, x.shape[-1])


def _slopes(
    groups: Array, mean: Array, deviation: Array, scale: Array, bias: Array
) -> tuple[Float[Array, "g c"], Float[Array, "g c"]]:
    """What a norm multiplies by and adds, of each group and channel."""
    slopes = scale * deviation
    shape = (groups.shape[0], groups.shape[2])
    return jnp.broadcast_to(slopes, shape), jnp.broadcast_to(bias - mean * slopes, shape)
