"""Labels images with a trained network, and draws where its attention looks."""

import functools
import glob
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from mobilevit_jax import build, devices, report, steps
from mobilevit_jax.data import transforms
from mobilevit_jax.data.record import DataError, Record
from mobilevit_jax.data.transforms import InputSpec
from mobilevit_jax.models import kernels, zoo
from mobilevit_jax.models.attention import PATCH
from mobilevit_jax.tasks import classification
from mobilevit_jax.tasks.task import Task
from mobilevit_jax.tools import pretrained
from mobilevit_jax.tree import Tree

BATCH = 16
THREADS = 4  # that read and decode
SHEET = 400  # images on a sheet at most
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

File = pathlib.Path | Record  # a record is what came from elsewhere, with its name


class Prediction(NamedTuple):
    """What the network says of one image.

    Attributes:
        image: path.
        labels: with their probabilities, most probable first.
        attention: picture of the attention, if asked for.
    """

    image: str
    labels: list[tuple[str, float]]
    attention: pathlib.Path | None = None


def find(arguments: Sequence[str], *, lists: Sequence[str] = ()) -> list[File]:
    """The images that a command line names, in its order; of folders and patterns by name.

    Args:
        arguments: files, folders (with all below them), patterns such as "photos/**/*.jpg", or "-"
            for an image on standard input.
        lists: files with a path a line; "-" for standard input.

    Raises:
        DataError: a folder or pattern holds no image, or a list cannot be read.
    """
    found: list[File] = []
    for argument in [*arguments, *(line for name in lists for line in _lines(name))]:
        path = pathlib.Path(argument)
        if argument == "-":
            found.append(Record(image=sys.stdin.buffer.read(), label=0, name="stdin"))
        elif path.is_dir():
            images = sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES)
            if not images:
                raise DataError(f"there is no image in {path} ({', '.join(SUFFIXES)})")
            found += images
        elif glob.has_magic(argument) and not path.exists():
            matching = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207 (Path's begins at a folder)
            if not matching:
                raise DataError(f"no file is like {argument}")
            found += [pathlib.Path(each) for each in matching if pathlib.Path(each).is_file()]
        else:
            found.append(path)
    return found


def predict(
    model: pretrained.Pretrained,
    images: Sequence[File],
    *,
    top: int = 3,
    attention: pathlib.Path | None = None,
    sheet: pathlib.Path | None = None,
    broken: Callable[[DataError], None] | None = None,
) -> Iterator[Prediction]:
    """Labels image files, in their order. Pictures that lie are turned upright.

    Args:
        model: network and weights.
        images: files of any type that Pillow reads.
        top: how many labels an image; at most the number of classes.
        attention: directory, made if missing, for a picture an image: what the network sees of it,
            and every block's map of attention over it.
        sheet: file for one picture of the images, SHEET at most, with their labels.
        broken: called with what is wrong with an image, which is then passed over; None to stop.

    Raises:
        ConfigError: the network has no attention to draw, or the directory cannot be written to.
        DataError: a file is missing or no image.
    """
    if attention is not None:
        if reason := no_attention(model.model):
            raise build.ConfigError(f"--attention: {reason}")
        _make(attention)
    pictures = _picture_names([pathlib.Path(_name(image)) for image in images])
    step = program(model, steps.predict_step if attention is None else attention_step)
    # One size of batch, so that one program serves all.
    batch_size = min(BATCH, len(images))
    shown: list[np.ndarray] = []
    captions: list[str] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for begin in range(0, len(images), batch_size or 1):
            files = images[begin : begin + batch_size]
            batch = np.zeros((batch_size, *model.input_spec.size, 3), np.uint8)
            look = functools.partial(_look, transforms.evaluation(model.input_spec))
            failures = list(pool.map(look, files, batch))
            outputs = jax.device_get(step(model.variables, batch))
            for row, (file, failure) in enumerate(zip(files, failures, strict=True)):
                if failure is not None:
                    if broken is None:
                        raise failure
                    broken(failure)
                    continue
                each = outputs["probability"][row]
                order = np.argsort(-each, kind="stable")[:top]
                labels = [(model.labels[i], float(each[i])) for i in order]
                picture = None
                if attention is not None:
                    picture = attention / pictures[begin + row]
                    maps = {name: values[row] for name, values in outputs["attention"].items()}
                    name = pathlib.Path(_name(file))
                    _draw(picture, batch[row], maps, title=_title(name, *labels[0]))
                if sheet is not None and len(shown) < SHEET:
                    shown.append(batch[row])
                    label, score = labels[0]
                    captions.append(f"{pathlib.Path(_name(file)).name}\n{label} {score:.1%}")
                yield Prediction(_name(file), labels, picture)
    if sheet is not None and shown:
        report.sample_sheet(sheet, np.stack(shown), captions)


def program(
    model: pretrained.Pretrained, step: Callable[..., Tree] = steps.predict_step
) -> Callable[..., Any]:
    """`steps.predict_step` or `attention_step` of the network, jitted: (variables, image)."""
    bound = functools.partial(
        step,
        model=model.model,
        task=classification.classification(),
        input_spec=model.input_spec,
    )

    def run(variables: Tree, image: UInt8[Array, "b h w 3"]) -> Tree:
        part = devices.images_at_a_time(len(image), kernels=kernels.serve())
        return steps.in_parts(lambda rows: ((), bound(variables, rows)), image, part=part)[1]

    return jax.jit(run, compiler_options=devices.compiler_options())


def attention_step(
    variables: Mapping[str, Tree],
    image: UInt8[Array, "b h w 3"],
    *,
    model: zoo.nn.Module,
    task: Task,
    input_spec: InputSpec,
) -> dict[str, Any]:
    """As `steps.predict_step`, with "attention": how much each block attends to which place.

    Maps (b, mh, mw) by the name of the stage that holds the block, averaged over its layers. A map
    adds up to one. Separable attention has a score for every token, so its map has the pixels of
    the block's; their softmax runs over the patches, for each of the four pixel positions by
    itself, hence the quarter. Of attention between tokens it is what a patch gets, averaged over
    queries, heads and pixel positions.
    """
    outputs, state = model.apply(
        variables, steps.normalize(image, input_spec), train=False, mutable=["attention"]
    )
    maps = {}
    for stage, block in state["attention"].items():
        height, width = outputs["stages"][int(stage.removeprefix("layer_")) - 1].shape[1:3]
        layers = []
        for scores in jax.tree.leaves(block):
            if scores.ndim == 3:  # separable: b h w
                layers.append(scores / PATCH**2)
            else:  # b p heads n n, the patches row by row; maps with an odd side were made even
                received = scores.mean((1, 2, 3))  # b n
                layers.append(received.reshape(-1, -(-height // PATCH), -(-width // PATCH)))
        maps[stage] = sum(layers) / len(layers)
    return {**task.predict(outputs), "attention": maps}


def no_attention(model: zoo.nn.Module) -> str | None:
    """Why there are no maps of a network's attention; None where there are."""
    kind = getattr(model, "attention", None)
    if kind is None:
        return f"a {type(model).__name__} has no attention; that takes a MobileViT, of v1 or v2"
    if kind == "linformer":
        return (
            "linformer's attention goes to mixtures of patches, not to places; there are maps of "
            "separable and multihead"
        )
    return None


def _make(directory: pathlib.Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise build.ConfigError(
            f"--attention: {directory} cannot be made: {error.strerror}"
        ) from error


def _picture_names(images: Sequence[pathlib.Path]) -> list[str]:
    """A name for each image's picture, its own where no image before it has taken that."""
    names: list[str] = []
    for path in images:
        name, count = f"{path.stem}.png", 1
        while name in names:
            count += 1
            name = f"{path.stem}-{count}.png"
        names.append(name)
    return names


def _title(path: pathlib.Path, label: str, score: float) -> str:
    return f"{path.name}: {label} {100 * score:.1f} %"


def _draw(
    path: pathlib.Path,
    image: UInt8[np.ndarray, "h w 3"],
    maps: Mapping[str, Float[np.ndarray, "_ _"]],
    *,
    title: str,
) -> None:
    # As multiples of the average: an attention that has learned nothing is about 1 everywhere.
    relative = {name: values * values.size for name, values in sorted(maps.items())}
    captions = [
        f"{name}, {values.shape[0]}x{values.shape[1]}\n"
        f"{values.min():.3f} to {values.max():.3f} of average"
        for name, values in relative.items()
    ]
    report.overlays(path, image, [*relative.values()], captions, title=title)


def _lines(name: str) -> list[str]:
    try:
        text = sys.stdin.read() if name == "-" else pathlib.Path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list {name} cannot be read: {error}") from error
    return [line for line in text.splitlines() if line.strip()]


def _name(image: File) -> str:
    return image.name if isinstance(image, Record) else str(image)


def _look(view: transforms.View, image: File, out: UInt8[np.ndarray, "h w 3"]) -> DataError | None:
    """Writes what the network sees of an image; says what is wrong where there is nothing."""
    try:
        view(transforms.upright(image if isinstance(image, Record) else _read(image)), out)
    except DataError as error:
        return error
    return None


def _read(path: pathlib.Path) -> Record:
    try:
        return Record(image=path.read_bytes(), label=0, name=str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
