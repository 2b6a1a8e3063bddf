"""How a file of another runtime compares with the network that it was made of, on real images."""

import importlib.util
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from mobilevit_jax import build, checkpoint
from mobilevit_jax.data import transforms
from mobilevit_jax.data.record import DataError, Record
from mobilevit_jax.data.sources import EXTENSIONS

IMAGES = 64  # compared at most
REPEATS = 20  # of the network, for its latency

Run = Callable[[np.ndarray], np.ndarray]  # images to logits, at one thread


class Comparison(NamedTuple):
    """What the file computes, next to the network it was made of.

    Attributes:
        images: number of them.
        source: what they are.
        difference: max |Δ logit|.
        share: the same, of the range of an image's logits.
        tolerance: what `share` may be.
        agreement: share of the images with the same most probable label.
        latency: seconds for one image at one thread, the median; None where the runtime takes as
            many threads as there are.
    """

    images: int
    source: str
    difference: float
    share: float
    tolerance: float
    agreement: float
    latency: float | None


def images(
    folder: pathlib.Path | None, spec: transforms.InputSpec
) -> tuple[list[UInt8[np.ndarray, "1 h w 3"]], str]:
    """Images to compare on, a batch each, and what they are."""
    if folder is not None:
        return read_folder(folder, spec, most=IMAGES), f"images of {folder}"
    found = importlib.util.find_spec("foolbox")
    places = (found.submodule_search_locations or ()) if found is not None else ()
    for place in places:
        photographs = sorted((pathlib.Path(place) / "data").glob("imagenet_*.jpg"))
        if photographs:
            return _decode(photographs, spec), "photographs of ImageNet, of the package foolbox"
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (8, 1, *spec.size, 3), np.uint8)
    return list(noise), "images of noise"


def read_folder(
    folder: pathlib.Path, spec: transforms.InputSpec, *, most: int
) -> list[UInt8[np.ndarray, "1 h w 3"]]:
    """Images of a folder and those inside it, evenly spread, a batch each.

    Raises:
        ConfigError: there is no such folder.
        DataError: it holds no image, or a broken one.
    """
    if not folder.is_dir():
        raise build.ConfigError(f"there is no directory {folder}")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise DataError(f"{folder} holds no images ({', '.join(EXTENSIONS)})")
    # In folders of classes the first ones would be of one class.
    chosen = np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int)
    return _decode([paths[i] for i in chosen], spec)


def _decode(
    paths: Sequence[pathlib.Path], spec: transforms.InputSpec
) -> list[UInt8[np.ndarray, "1 h w 3"]]:
    view = transforms.evaluation(spec)
    decoded = [np.zeros((1, *spec.size, 3), np.uint8) for _ in paths]
    for path, image in zip(paths, decoded, strict=True):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        view(Record(image=content, label=0, name=str(path)), image[0])
    return decoded


def compare(
    run: Run,
    reference: Callable[[Any], Any],
    images: Sequence[UInt8[np.ndarray, "1 h w 3"]],
    prepare: Run,
    *,
    source: str,
    tolerance: float,
    single: bool,
) -> Comparison:
    """Runs both on the same images.

    Args:
        run: the file; of images as `prepare` makes them.
        reference: the network; of uint8 RGB.
        images: uint8 RGB.
        prepare: from those to what the file takes.
        source: what the images are.
        tolerance: of the difference, as a share of the range of the logits.
        single: whether `run` takes one thread, so that its latency means something.
    """
    expected = np.concatenate([np.asarray(reference(image)) for image in images])
    inputs = [prepare(image) for image in images]
    found = np.concatenate([run(each) for each in inputs])
    seconds = []
    for _ in range(REPEATS if single else 0):
        begin = time.perf_counter()
        run(inputs[0])
        seconds.append(time.perf_counter() - begin)
    return Comparison(
        images=len(images),
        source=source,
        **_differences(expected, found),
        tolerance=tolerance,
        latency=statistics.median(seconds) if seconds else None,
    )


def _differences(
    expected: Float[np.ndarray, "n k"], found: Float[np.ndarray, "n k"]
) -> dict[str, float]:
    apart = np.abs(expected - found).max(1)
    return {
        "difference": float(apart.max()),
        "share": float((apart / np.ptp(expected, axis=1)).max()),
        "agreement": float((expected.argmax(1) == found.argmax(1)).mean()),
    }


def check_same(comparison: Comparison, name: str) -> None:
    """Raises CheckpointError where the file is further from the network than the tolerance."""
    if comparison.share <= comparison.tolerance:
        return
    raise checkpoint.CheckpointError(
        f"{name} computes something else: on {comparison.images} {comparison.source} its logits "
        f"differ by up to {comparison.share:.1e} of their range, and {comparison.tolerance:.2g} is "
        f"the tolerance ({100 * comparison.agreement:.0f} % have the same label); nothing is "
        "written"
    )
