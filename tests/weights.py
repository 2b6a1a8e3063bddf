"""Weights to compare and convert networks with."""

import numpy as np

from mobilevit_jax import steps, tree

LABELS = ("daisy", "rose", "tulip, Tulipa", "fern", "moss")


def random_variables(model, *, seed, size=(64, 64), gain=2.0):
    """Weights under which every part of the network matters.

    With a gain too high for its depth a network magnifies rounding, with one too low it hardly
    tells images apart.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape)
        if path.endswith(("scale", "var")):
            values = 0.5 + rng.random(leaf.shape)
        elif path.endswith("kernel"):
            values *= (gain / np.prod(leaf.shape[:-1])) ** 0.5
        else:
            values *= 0.2
        return values.astype(np.float32)

    return tree.map_with_path(draw, steps.abstract_variables(model, size))
