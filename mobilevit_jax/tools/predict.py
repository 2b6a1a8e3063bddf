"""Labels images with a trained network."""

import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from mobilevit_jax import steps
from mobilevit_jax.data import sources, transforms
from mobilevit_jax.tasks import classification
from mobilevit_jax.tools import pretrained

BATCH = 16


class Prediction(NamedTuple):
    """Labels of one image with their probabilities, most probable first."""

    image: str
    labels: list[tuple[str, float]]


def predict(
    model: pretrained.Pretrained, images: Sequence[pathlib.Path], *, top: int = 3
) -> Iterator[Prediction]:
    """Labels image files, in their order.

    Args:
        model: network and weights.
        images: files of any type that Pillow reads.
        top: how many labels an image; at most the number of classes.

    Raises:
        DataError: a file is missing or no image.
    """
    size = model.input_spec.size
    view = transforms.evaluation(model.input_spec)
    step = jax.jit(
        functools.partial(
            steps.predict_step,
            model=model.model,
            task=classification.classification(),
            input_spec=model.input_spec,
        )
    )
    # One size of batch, so that one program serves all.
    batch_size = min(BATCH, len(images))
    for begin in range(0, len(images), batch_size):
        paths = images[begin : begin + batch_size]
        batch = np.zeros((batch_size, *size, 3), np.uint8)
        for row, path in enumerate(paths):
            batch[row] = view(_read(path))
        probability = np.asarray(step(model.variables, batch)["probability"])  # b k
        for path, each in zip(paths, probability, strict=False):
            order = np.argsort(-each, kind="stable")[:top]
            labels = [(model.labels[i], float(each[i])) for i in order]
            yield Prediction(str(path), labels)


def _read(path: pathlib.Path) -> sources.Record:
    try:
        return sources.Record(image=path.read_bytes(), label=0, name=str(path))
    except OSError as error:
        raise sources.DataError(f"{path} cannot be read: {error.strerror}") from error
