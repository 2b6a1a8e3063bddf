"""RangeAugment: how much brightness, contrast and noise may change is learned with the network.

Source: Mehta et al. 2022, arXiv 2212.10553, and cvnets 0.4 (neural_augmentor, mode "distribution").

Before editing: it sees images of 0..1. The network's parameters must keep the paths that they have
without it, for a trained network is used alone; its own are the one entry `range_augment`. They are
scalars without an axis, so that they decay where only parameters of one axis do not.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

PARAMS = "range_augment"  # the entry

Scalar = Float[Array, ""]


class Bound(NamedTuple):
    """An end of a range of magnitudes: sigmoid(a parameter), from 0..1 to `least`..`most`."""

    start: float  # of the parameter
    least: float
    most: float


class Operation(NamedTuple):
    """What is done to images, for magnitudes [b, 1, 1, 1] drawn evenly between two learned ends."""

    low: Bound
    high: Bound
    apply: Callable[[Array, Array, jax.Array], Array]


def _brightness(x: Array, magnitude: Array, rng: jax.Array) -> Array:
    del rng
    return magnitude * x


def _contrast(x: Array, magnitude: Array, rng: jax.Array) -> Array:
    del rng
    return (1.0 - magnitude) * x.mean((1, 2), keepdims=True) + magnitude * x


def _noise(x: Array, magnitude: Array, rng: jax.Array) -> Array:
    return x + magnitude * jax.random.normal(rng, x.shape)


OPERATIONS: Mapping[str, Operation] = {
    "brightness": Operation(Bound(0.5, 0.1, 0.9), Bound(1.5, 1.1, 10.0), _brightness),
    "contrast": Operation(Bound(0.5, 0.1, 0.9), Bound(1.5, 1.1, 10.0), _contrast),
    "noise": Operation(Bound(0.0, 0.0, 5e-5), Bound(0.1, 1e-4, 1.0), _noise),
}


class Ranges(nn.Module):
    """The learned ranges."""

    operations: Sequence[str]

    @nn.compact
    def __call__(self) -> dict[str, tuple[Scalar, Scalar]]:
        """Return the lowest and highest magnitude of each operation."""

        def end(name: str, bound: Bound) -> Scalar:
            raw = self.param(name, nn.initializers.constant(bound.start), ())
            return bound.least + jax.nn.sigmoid(raw) * (bound.most - bound.least)

        return {
            name: (
                end(f"{name}_low", OPERATIONS[name].low),
                end(f"{name}_high", OPERATIONS[name].high),
            )
            for name in self.operations
        }


class RangeAugment(nn.Module):
    """A network behind learned augmentation, which is there in training only.

    Raises ValueError for an operation that there is not, and for none at all.
    """

    network: nn.Module
    operations: Sequence[str] = tuple(OPERATIONS)

    def setup(self) -> None:
        """Put the network's parameters where those of this module are."""
        nn.share_scope(self, self.network)

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"], *, train: bool = False) -> dict[str, Any]:
        """Return the network's outputs for images of 0..1, in training for augmented ones.

        Then `augmented_image` (b h w 3) is among the outputs, and the rng "augment" is needed.
        """
        if not self.operations or not set(self.operations) <= OPERATIONS.keys():
            raise ValueError(
                f"operations is {tuple(self.operations)}; choose from {', '.join(OPERATIONS)}"
            )
        ranges = Ranges(self.operations, name=PARAMS)()
        if not train:
            return self.network(image, train=False)
        image = augment(image, ranges, self.make_rng("augment"))
        return {**self.network(image, train=True), "augmented_image": image}


def augment(
    image: Float[Array, "b h w 3"], ranges: Mapping[str, tuple[Scalar, Scalar]], rng: jax.Array
) -> Float[Array, "b h w 3"]:
    """Apply all operations in an order drawn for the batch, each to a half of it of its own.

    A half is rounded down, and is at least one image.

    Args:
        image: pixels of 0..1.
        ranges: lowest and highest magnitude by operation.
        rng: for all choices.

    Returns:
        The images, clipped to 0..1.
    """
    rng_order, rng = jax.random.split(rng)
    operations = []
    for i, (name, (low, high)) in enumerate(ranges.items()):
        rng_rows, rng_magnitude, rng_apply = jax.random.split(jax.random.fold_in(rng, i), 3)
        chosen = jax.random.permutation(rng_rows, len(image)) < max(1, len(image) // 2)
        share = jax.random.uniform(rng_magnitude, (len(image), 1, 1, 1))
        operation = functools.partial(
            _to_chosen,
            apply=OPERATIONS[name].apply,
            chosen=chosen,
            magnitude=low + share * (high - low),
            rng=rng_apply,
        )
        operations.append(operation)
    order = jax.random.permutation(rng_order, len(operations))
    for i in range(len(operations)):
        image = jax.lax.switch(order[i], operations, image)
    return jnp.clip(image, 0.0, 1.0)


def _to_chosen(
    image: Float[Array, "b h w 3"],
    *,
    apply: Callable[[Array, Array, jax.Array], Array],
    chosen: Bool[Array, " b"],
    magnitude: Float[Array, "b 1 1 1"],
    rng: jax.Array,
) -> Float[Array, "b h w 3"]:
    return jnp.where(chosen[:, None, None, None], apply(image, magnitude, rng), image)
