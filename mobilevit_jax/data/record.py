"""What the data wing passes around: a labelled image, a source of them, and what can go wrong."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

SPLITS = ("train", "val")


class DataError(Exception):
    """The data are missing, broken or not laid out as expected; its text is one line for users."""


class CorruptError(DataError):
    """One example is broken. Training may put another in its place (`data.max_corrupt`)."""


def gist(error: BaseException) -> str:
    """The text of an error on one line, to be put into a `DataError`."""
    return " ".join(str(error).split()) or type(error).__name__


class Record(NamedTuple):
    """One labelled image, not yet decoded."""

    image: bytes | np.ndarray  # an encoded file, or uint8 [h, w] or [h, w, 3]
    label: int
    name: str  # for messages: a file path, or "digits[17]"


@runtime_checkable
class Source(Protocol):
    """What a dataset has to offer, and nothing else. Thread-safe and picklable."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of label i at position i."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Record: ...


@runtime_checkable
class Labelled(Protocol):
    """A source that knows its labels without reading its examples. Training asks for no such."""

    @property
    def labels(self) -> Integer[np.ndarray, " n"]:
        """The label of example i at position i."""
        ...
