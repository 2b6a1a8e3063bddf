"""What a config's images are, how fast they load and what limits that, and how they look.

The data wing looks and measures (survey.py, speed.py); here is what to make of it: hints, pictures,
tables. Broken examples stop nothing: to find them is what this is for.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from rich.console import Console

from mobilevit_jax import build, report
from mobilevit_jax.data import pipeline, rows, speed, survey, transforms
from mobilevit_jax.data.multiscale import Shapes
from mobilevit_jax.data.record import CorruptError, DataError, Source
from mobilevit_jax.data.speed import Progress, Speed
from mobilevit_jax.data.survey import Survey

EXAMPLES = 1000  # of each split that are decoded, unless asked otherwise
SHEET = 32  # pictures on a sheet
AUGMENTED, VERSIONS = 6, 7  # examples, and how often each is augmented
LISTED = 10  # broken examples named on the screen, and classes when there are more
SMALL = 1e-4  # seconds an image; nobody has a network that fast
SHRUNK = 1.5  # short side of shrunk images over the size of a crop


class Look(NamedTuple):
    """All that was found."""

    splits: dict[str, Survey]
    sizes: tuple[tuple[int, int], ...]  # (h, w) of training crops
    speed: Speed | None  # None where training would stop
    hints: tuple[str, ...]
    pictures: tuple[Path, ...]


def look(
    config: build.Config,
    *,
    workdir: Path | None,
    examples: int | None = EXAMPLES,
    progress: Progress,
) -> Look:
    """Looks at the images of a config.

    Args:
        config: the resolved config.
        workdir: where samples.png, augmentations.png and evaluation.png are drawn; None for none.
        examples: how many of each split to decode; None for all.
        progress: is told how far it is.

    Raises:
        ConfigError: the config names something unknown or out of range, or the workdir cannot be
            made.
        DataError: the images are not there or cannot be read. Broken ones are told in the result.
    """
    shapes, spec = build.shapes(config), build.input_spec(config)
    transform, bare = build.transform(config), _without_policy(config)
    workers, max_corrupt = build.workers(config), build.evaluation(config)["max_corrupt"]
    train, val = build.source(config, "train"), build.source(config, "val")
    if workdir is not None:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise build.ConfigError(
                f"--workdir={workdir} cannot be made: {error.strerror}"
            ) from error
    splits = {
        split: survey.survey(source, examples=examples, threads=pipeline.cores(), progress=progress)
        for split, source in (("train", train), ("val", val))
    }
    sizes = tuple(sorted({(shape.height, shape.width) for shape in shapes.table}))
    hints, measured = _broken_hints(splits, max_corrupt), None
    try:
        measured = speed.measure(
            train, transform, bare, shapes=shapes, workers=workers, progress=progress
        )
        hints += _speed_hints(measured, splits["train"], sizes)
    except DataError as error:
        if not splits["train"].broken:
            raise
        hints.insert(0, f"Training would stop: {error}.")
    except ValueError as error:  # a crop that does not fit
        raise build.ConfigError(f"config.augment: {error}") from error
    pictures = []
    if workdir is not None:
        try:
            pictures = [
                _draw_batch(workdir, measured, train.class_names),
                _draw_augmentations(workdir, train, splits["train"], transform, shapes),
                _draw_evaluation(workdir, val, splits["val"], spec),
            ]
        except PermissionError as error:
            raise build.ConfigError(
                f"--workdir={workdir} cannot be written: {error.strerror}"
            ) from error
    return Look(splits, sizes, measured, tuple(hints), tuple(p for p in pictures if p is not None))


def _without_policy(config: build.Config) -> transforms.Transform | None:
    """The transform without what comes after the crop; None where nothing does."""
    other = config.copy_and_resolve_references()
    with other.unlocked():
        other.policy = {"name": "none"}
    return None if build.plain(other) == build.plain(config) else build.transform(other)


# --- what to do about it -------------------------------------------------------------------------


def _broken_hints(splits: Mapping[str, Survey], max_corrupt: float) -> list[str]:
    hints = []
    for split, found in splits.items():
        share = len(found.broken) / max(len(found.indices), 1)
        if share > max_corrupt:
            hints.append(
                f"{share:.2%} of {split} are broken, more than config.max_corrupt "
                f"({max_corrupt:.2%}): the run would stop. Replace or delete them."
            )
    return hints


def _speed_hints(measured: Speed, train: Survey, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """What limits, and what to do; last what to compare with."""
    slowest = max(measured.stages, key=lambda stage: stage.seconds)
    share = slowest.seconds / measured.seconds
    hints = [f"Most of a core's time for an image goes into: {slowest.name} ({share:.0%})."]
    if measured.seconds < SMALL:
        hints[0] += " At this rate nothing need be done."
    elif slowest.name == "read":
        hints.append(
            "Read ahead: --config.loader.readers=8 (or more, if the storage is far away). Or pack "
            "the images into large files near the machine: launch.py prepare folder."
        )
    elif slowest.name == "decode":
        hints += _decode_hints(train, sizes)
    elif slowest.name == "augment":
        hints.append("A policy with fewer operations costs less: config.policy.")
    else:
        hints.append(
            "--config.augment.resize: fast_aa takes a third of what pil_bilinear does, linear less."
        )
    hints += _worker_hints(measured)
    hints.append(
        f"The loader gives {_rate(measured.loader_images_per_second)} images/s with "
        f"{measured.workers}. Compare with img/s and wait in the training log: where wait stays "
        "near 0 %, loading does not limit."
    )
    return hints


def _decode_hints(train: Survey, sizes: Sequence[tuple[int, int]]) -> list[str]:
    hints = []
    prepare = "launch.py prepare folder --source=DIR --target=DIR"
    whole = train.heights > 0
    if not whole.any():
        return hints
    plain = train.formats.get(survey.BASELINE, 0) + train.formats.get(survey.PROGRESSIVE, 0)
    if plain > 0.5 * whole.sum():
        hints.append(
            f"Without loss: {prepare} --restart-markers, so that crops decode without the rest."
        )
    short = np.median(np.minimum(train.heights, train.widths)[whole])
    target = 32 * math.ceil(SHRUNK * max(map(max, sizes)) / 32)
    if short > 1.1 * target:
        hints.append(
            f"With loss: {prepare} --short-side={target} stores images smaller (the median's short "
            f"side is {short:.0f} pixels, crops are {_sizes(sizes)})."
        )
    return hints or ["Only more cores help, or more threads where some are idle."]


def _worker_hints(measured: Speed) -> list[str]:
    if measured.parallel < measured.cores:
        threads = min(measured.cores, pipeline.MAX_DEFAULT_THREADS)
        if "process" in measured.workers or measured.parallel >= threads:
            more = f"--config.loader.processes={measured.cores}"
        else:
            more = f"--config.loader.threads={threads}"
        return [f"Only {measured.workers} for {measured.cores} cores: {more}."]
    single = 1 / measured.seconds
    gain = measured.loader_images_per_second / single
    if gain < 0.6 * min(measured.parallel, measured.cores) and measured.seconds >= SMALL:
        return [
            f"{measured.workers} load only {gain:.1f} times as much as one core could: they wait "
            "for storage, or other programs use the cores."
        ]
    return []


# --- pictures ------------------------------------------------------------------------------------


def _draw_batch(workdir: Path, measured: Speed | None, class_names: Sequence[str]) -> Path | None:
    if measured is None:
        return None
    images, labels = measured.batch["image"], measured.batch["label"]
    path = workdir / "samples.png"
    report.sample_sheet(
        path,
        images,
        [_text(class_names[label]) for label in labels],
        title=f"first training batch, as the loader gives it: {_sizes([images.shape[1:3]])}",
    )
    return path


def _draw_augmentations(
    workdir: Path,
    source: Source,
    found: Survey,
    transform: transforms.Transform,
    shapes: Shapes,
) -> Path | None:
    shape = shapes.at(0)
    images, captions = [], []
    for index in _spread(found.whole, AUGMENTED):
        record = source[index]
        original = transforms.decode(record)
        images.append(_framed(original, shape.height, shape.width))
        height, width, _ = original.shape
        captions.append(f"{_text(source.class_names[record.label])}\n{height}x{width}")
        for epoch in range(VERSIONS):
            out = np.empty_like(images[0])
            transform(record, rows.augmentation_rng(shapes.seed, epoch, index), out)
            images.append(out)
            captions.append(f"epoch {epoch + 1}")
    if not images:
        return None
    path = workdir / "augmentations.png"
    report.sample_sheet(
        path,
        np.stack(images),
        captions,
        columns=1 + VERSIONS,
        title="training: the whole image, and what the loader makes of it in the first epochs",
    )
    return path


def _draw_evaluation(
    workdir: Path, source: Source, found: Survey, spec: transforms.InputSpec
) -> Path | None:
    view = transforms.evaluation(spec)
    images, captions = [], []
    for index in _spread(found.whole, SHEET):
        record = source[index]
        out = np.empty((*spec.size, 3), np.uint8)
        try:
            view(record, out)
        except CorruptError:  # far too long for its width
            continue
        images.append(out)
        captions.append(_text(source.class_names[record.label]))
    if not images:
        return None
    path = workdir / "evaluation.png"
    report.sample_sheet(
        path,
        np.stack(images),
        captions,
        title=f"evaluation: short side {spec.resize}, centre {_sizes([spec.size])}",
    )
    return path


def _spread(indices: np.ndarray, count: int) -> list[int]:
    count = min(count, len(indices))
    return indices[(2 * np.arange(count) + 1) * len(indices) // max(2 * count, 1)].tolist()


def _framed(image: transforms.Pixels, height: int, width: int) -> UInt8[np.ndarray, "oh ow 3"]:
    """The whole image, as large as fits into so many pixels, on white."""
    scale = min(height / image.shape[0], width / image.shape[1])
    h, w = (max(round(scale * side), 1) for side in image.shape[:2])
    small = np.empty((h, w, 3), np.uint8)
    transforms.resize_into(image, small, "fast_aa")
    frame = np.full((height, width, 3), 255, np.uint8)
    top, left = (height - h) // 2, (width - w) // 2
    frame[top : top + h, left : left + w] = small
    return frame


# --- what people and programs read ---------------------------------------------------------------


def as_json(found: Look) -> dict[str, Any]:
    """All of it as JSON values."""
    return {
        "splits": {split: _split_json(each) for split, each in found.splits.items()},
        "sizes": found.sizes,
        "speed": found.speed and _speed_json(found.speed),
        "hints": found.hints,
        "pictures": [str(path) for path in found.pictures],
    }


def _split_json(found: Survey) -> dict[str, Any]:
    whole = found.heights > 0
    return {
        "examples": found.num_examples,
        "classes": len(found.class_names),
        "examples_of_class": dict(zip(found.class_names, found.class_counts.tolist(), strict=True)),
        "all_labels_counted": found.labels_known,
        "looked_at": len(found.indices),
        "height": _three(found.heights[whole]),
        "width": _three(found.widths[whole]),
        "megapixels": _three((found.heights * found.widths)[whole] / 1e6),
        "bytes": _three(found.sizes),
        "mean_bytes": float(found.sizes.mean()) if len(found.sizes) else None,
        "formats": found.formats,
        "colors": found.colors,
        "broken": list(found.broken.values()),
    }


def _speed_json(measured: Speed) -> dict[str, Any]:
    fields = measured._asdict()
    del fields["batch"]
    fields["stages"] = {
        stage.name: {"seconds": stage.seconds, "images_per_second": 1 / max(stage.seconds, 1e-9)}
        for stage in measured.stages
    }
    fields["core_images_per_second"] = 1 / measured.seconds
    return fields


def print_look(found: Look, console: Console) -> None:
    """Prints all but the pictures."""

    def line(text: str = "") -> None:
        console.print(_text(text), markup=False, highlight=False, soft_wrap=True)

    surveys = list(found.splits.values())
    report.print_table(["", *found.splits], _survey_rows(surveys), console)
    for split, each in found.splits.items():
        if not each.labels_known:
            line(
                f"{split}: labels lie inside its records, so classes are counted among those "
                "looked at; --all counts all."
            )
    if classes := _class_rows(surveys):
        report.print_table(["class", *found.splits], classes, console)
    for split, each in found.splits.items():
        if each.broken:
            line(f"Broken in {split}: {len(each.broken):,} of {len(each.indices):,} looked at")
            for problem in list(each.broken.values())[:LISTED]:
                line(f"  {problem.partition(';')[0]}")
            if len(each.broken) > LISTED:
                line(f"  and {len(each.broken) - LISTED:,} more (--json names all)")
    if found.speed is not None:
        line()
        _print_speed(found.speed, found.sizes, console)
    line()
    for hint in found.hints:
        line(f"- {hint}")


def _survey_rows(surveys: Sequence[Survey]) -> list[list[str]]:
    whole = [each.heights > 0 for each in surveys]
    pairs = list(zip(surveys, whole, strict=True))
    rows = [
        ["examples", *(f"{each.num_examples:,}" for each in surveys)],
        ["classes", *(f"{len(each.class_names):,}" for each in surveys)],
        ["examples a class (min / median / max)", *(_range(each.class_counts) for each in surveys)],
        ["looked at", *(f"{len(each.indices):,}" for each in surveys)],
        ["broken", *(_share(len(each.broken), each) for each in surveys)],
        ["height (min / median / max)", *(_range(each.heights[good]) for each, good in pairs)],
        ["width", *(_range(each.widths[good]) for each, good in pairs)],
        [
            "megapixels",
            *(_range((each.heights * each.widths)[good] / 1e6, ".2f") for each, good in pairs),
        ],
        ["kilobytes", *(_range(each.sizes / 1e3, ",.1f") for each in surveys)],
        ["megabytes in all", *(_megabytes(each) for each in surveys)],
    ]
    for field in ("formats", "colors"):
        counts = [getattr(each, field) for each in surveys]
        for name in dict.fromkeys(itertools.chain(*counts)):
            shares = [
                _share(count.get(name, 0), each)
                for count, each in zip(counts, surveys, strict=True)
            ]
            rows.append([name, *shares])
    return rows


def _class_rows(surveys: Sequence[Survey]) -> list[list[str]]:
    """The largest and the smallest classes; none where all are alike."""
    if all(np.ptp(each.class_counts) == 0 for each in surveys):
        return []
    counts = [each.class_counts.tolist() for each in surveys]
    pairs = [(each, sum(each)) for each in counts]
    order = sorted(range(len(counts[0])), key=lambda k: -counts[0][k])
    rows = [
        [_text(surveys[0].class_names[k]), *(_part(each[k], total) for each, total in pairs)]
        for k in order
    ]
    if len(rows) > LISTED:
        half = LISTED // 2
        between = [f"… {len(rows) - 2 * half:,} between …", *("" for _ in surveys)]
        rows = [*rows[:half], between, *rows[-half:]]
    return rows


def _print_speed(measured: Speed, sizes: Sequence[tuple[int, int]], console: Console) -> None:
    table = [
        [
            stage.name,
            f"{1e3 * stage.seconds:,.3f}",
            _rate(1 / stage.seconds) if stage.seconds else "-",
            f"{stage.seconds / measured.seconds:.0%}",
        ]
        for stage in measured.stages
    ]
    table.append(
        ["all on one core", f"{1e3 * measured.seconds:,.3f}", _rate(1 / measured.seconds), ""]
    )
    each = 1 / measured.loader_images_per_second
    footer = [f"loader, {measured.workers}", f"{1e3 * each:,.3f}", _rate(1 / each), ""]
    console.print(
        f"Training images of {_sizes(sizes)}, mean of {measured.images:,}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    header = ["stage", "ms an image", "images/s", "of a core's time"]
    report.print_table(header, table, console, footer=footer)
    console.print(
        f"First batch ({measured.batch_size:,} images) after {measured.first_batch_seconds:.2f} s; "
        f"{measured.cores} cores may be used",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _three(values: np.ndarray) -> list[float] | None:
    """Least, median, greatest."""
    if not len(values):
        return None
    return [float(f(values)) for f in (np.min, np.median, np.max)]


def _range(values: np.ndarray, form: str = ",.0f") -> str:
    three = _three(values)
    if three is None:
        return "-"
    least, median, most = (format(value, form) for value in three)
    return f"{least} each" if least == most else f"{least} / {median} / {most}"


def _share(count: int, found: Survey) -> str:
    return _part(count, len(found.indices)) if count else "-"


def _part(count: int, total: int) -> str:
    return f"{count:,} ({count / max(total, 1):.1%})"


def _megabytes(found: Survey) -> str:
    if not len(found.sizes):
        return "-"
    about = "" if len(found.sizes) == found.num_examples else "about "
    return f"{about}{found.sizes.mean() * found.num_examples / 1e6:,.1f}"


def _rate(images_per_second: float) -> str:
    return f"{images_per_second:,.0f}"


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    shown = [f"{height}x{width}" for height, width in sizes]
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"


def _text(name: str) -> str:
    """File names need not be text; what is none is shown as a question mark."""
    return name.encode(errors="replace").decode()
