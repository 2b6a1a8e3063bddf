"""What a transform makes of a record, as an array of its own."""

import numpy as np

from mobilevit_jax.data import transforms
from mobilevit_jax.data.record import Record


def shown(
    transform: transforms.Transform,
    record: Record,
    rng: np.random.Generator,
    size: tuple[int, int],
) -> np.ndarray:
    out = np.full((*size, 3), 99, np.uint8)
    transform(record, rng, out)
    return out


def evaluated(spec: transforms.InputSpec, record: Record) -> np.ndarray:
    out = np.full((*spec.size, 3), 99, np.uint8)
    transforms.evaluation(spec)(record, out)
    return out
