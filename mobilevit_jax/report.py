"""What a person sees of a run: progress line, metrics.jsonl, the clock, and pictures of results.

Knows neither jax nor models: numbers arrive as host scalars, images as uint8 arrays. `Report`
belongs to one training run; the functions below it draw what a run or an evaluation left behind.
Every file is written beside its place and renamed over it, so a reader never meets half of one;
only metrics.jsonl grows in place, a row at a time. matplotlib, slow to import, is imported where
something is drawn, and used through `Figure`: pyplot keeps global state.
"""

import contextlib
import csv
import functools
import io
import json
import math
import os
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np
from jaxtyping import Float, Integer, UInt8
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mobilevit_jax.writers import WRITERS, replace_file

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.figure import Figure

CELL_TEXT_CLASSES = 20  # a confusion matrix writes counts into its cells up to here,
ALL_CLASSES = 200  # draws every class up to here,
MOST_CONFUSED = 30  # and only so many beyond
THUMBNAIL = 96  # pixels on the short side that a sample sheet gives a picture at least
PANEL = 192  # the same for overlays


class Report:
    """Progress line, metrics.jsonl, writers and clock of one run; a context manager.

    On a terminal there is one live line; in a pipe or a file, one plain line for each `log`. A row
    of metrics.jsonl holds step, images (seen), time (seconds, earlier starts included) and values.

    Args:
        workdir: rows of its metrics.jsonl after `start_step` are dropped, as those steps are taken
            again; at 0 all are, as the first evaluation is repeated too. None writes nothing, as in
            all processes of a run but one.
        total_steps: length of the whole run.
        start_step: step of the checkpoint this start resumes from, else 0.
        images: how many have been seen after a step, over all hosts.
        writers: names in writers.WRITERS, which `writers.check` has passed.
        config: what is trained, by dotted name, for the writers.
        elapsed: seconds trained before this start, from the checkpoint.
        console: where to print; by default standard output.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        workdir: Path | None,
        *,
        total_steps: int,
        start_step: int,
        images: Callable[[int], int],
        writers: Sequence[str] = (),
        config: Mapping[str, Any] = types.MappingProxyType({}),
        elapsed: float = 0.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._start, self._images = total_steps, start_step, images
        path = Path(os.devnull)
        if workdir is not None:
            path = workdir / "metrics.jsonl"
            rows = read_metrics(path) if start_step and path.exists() else []
            kept = "".join(map(_encode, (row for row in rows if row["step"] <= start_step)))
            replace_file(path, kept.encode())
        self._file = path.open("a", encoding="utf-8")
        self._clock, self._before, self._created = clock, elapsed, clock()
        self._loop_began: float | None = None  # the first wait for data; compiling comes before it
        self._logged_at, self._logged_step = self._created, start_step
        self._waited = self._paused = 0.0  # seconds since the last log
        self._spent: dict[str, float] = {}  # seconds of this start that were no steps, by what
        self._pauses: list[str] = []  # names of the open `pausing` blocks, outermost first
        self._step, self._shown = start_step, ""
        self.console = console or Console()
        self._plain = not self.console.is_terminal or self.console.is_dumb_terminal
        self._writers = []
        if workdir is not None:
            self._writers = [
                WRITERS[name].open(workdir, start_step, config, self.note) for name in writers
            ]
        self._live = Live(get_renderable=self._draw, console=self.console, refresh_per_second=4)

    def __enter__(self) -> "Report":
        if not self._plain:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Stops the live line, which stays on the screen, and closes files and writers."""
        self._live.stop()
        self._file.close()
        for writer in self._writers:
            writer.close(finished=kind is None)

    @property
    def elapsed(self) -> float:
        """Seconds of this run so far, pauses and earlier starts included."""
        return self._before + self._clock() - self._created

    def note(self, text: str) -> None:
        """Prints a line, above the progress line if there is one; never wrapped, never markup."""
        self.console.print(Text(text), soft_wrap=True)

    def table(self, rows: Iterable[Any]) -> None:
        """Prints a `stage_table` where the notes go."""
        stage_table(rows, self.console)

    def scalars(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Appends one row to metrics.jsonl, flushed at once, and feeds the writers.

        JSON has no NaN or infinity: they are written as null, and `read_metrics` gives NaN.
        """
        numbers = {name: float(value) for name, value in values.items()}
        row = {"step": step, "images": self._images(step), "time": round(self.elapsed, 3)}
        self._file.write(_encode(row | numbers | row))  # what `log` gives of these, too
        self._file.flush()
        for writer in self._writers:
            writer.scalars(step, numbers)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside is waiting for data (inside a pause it is just pause)."""
        began = self._clock()
        if self._loop_began is None and not self._pauses:
            self._loop_began = self._logged_at = began
            self._paused = 0.0
        try:
            yield
        finally:
            if not self._pauses:
                seconds = self._clock() - began
                self._waited += seconds
                self._spend("wait", seconds)

    @contextlib.contextmanager
    def pausing(self, name: str) -> Iterator[None]:
        """Time inside is not training; the progress line shows `name` (evaluate, save, compile).

        Steps still queued on the device would hide in the pause: wait for them before entering.
        """
        self._pauses.append(name)
        began = self._clock()
        try:
            yield
        finally:
            self._pauses.pop()
            if not self._pauses:  # an inner pause is part of the outer one
                seconds = self._clock() - began
                self._paused += seconds
                self._spend(name, seconds)

    def _spend(self, name: str, seconds: float) -> None:
        self._spent[name] = self._spent.get(name, 0.0) + seconds

    def goodput(self) -> tuple[float, str]:
        """The share of this start that went into steps, and a line on what the rest went into."""
        whole = max(self._clock() - self._created, 1e-9)
        share = 1.0 - sum(self._spent.values()) / whole
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._spent.items())
        return share, f"goodput {share:.0%} of {whole:.1f} s" + (f"; {parts}" if parts else "")

    def advance(self, step: int) -> None:
        """Says that `step` steps are done; the live line reads it at its next refresh."""
        self._step = step

    def log(
        self, step: int, values: Mapping[str, SupportsFloat], *, ideal: float | None = None
    ) -> None:
        """Records `values` and the speed since the last `log`; call it when they are on the host.

        Adds time/img_per_s and time/wait_share, a fraction, which both leave pauses out, and
        time/goodput, the share of this start so far that went into steps; what the rest went into,
        in seconds, is time/compile_s, wait_s, evaluate_s and save_s. train/loss and
        train/learning_rate go on the progress line.

        Args:
            step: the last that the values are of.
            values: by name.
            ideal: seconds that the steps since the last `log` would have taken at the devices' peak
                arithmetic, which gives time/mfu, the share of it that they reached; None for none.
        """
        now = self._clock()
        seconds = now - self._logged_at - self._paused
        seconds = seconds if seconds > 0 else math.nan
        speed = (self._images(step) - self._images(self._logged_step)) / seconds
        share = self._waited / seconds
        times = {
            "time/img_per_s": speed,
            "time/wait_share": share,
            "time/goodput": self.goodput()[0],
            **{f"time/{name}_s": seconds for name, seconds in self._spent.items()},
            "images": self._images(step),  # for the writers, where sizes differ by step
        }
        if ideal is not None:
            times["time/mfu"] = ideal / seconds
        numbers = {**values, **times}
        self.scalars(step, numbers)
        self._logged_at, self._logged_step, self._waited, self._paused = now, step, 0.0, 0.0
        self._step = step
        loss, lr = (float(values.get(f"train/{k}", math.nan)) for k in ("loss", "learning_rate"))
        self._shown = f"  loss {loss:.4g}  {speed:,.0f} img/s  wait {share:.0%}  lr {lr:.3g}"
        for name, form in (("device/memory_gib", "  {:.1f} GiB"), ("time/mfu", "  MFU {:.0%}")):
            if name in numbers:  # on accelerators
                self._shown += form.format(float(numbers[name]))
        if self._plain:
            self.note(f"step {self._line()}")

    def evaluation(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Records an evaluation and prints it on one line.

        Names are val/… for the raw weights and val_ema/… for their average; top1 and top5 are
        fractions, printed in percent.
        """
        self.scalars(step, values)
        groups: dict[str, list[str]] = {}
        for name, value in values.items():
            scope, _, metric = name.rpartition("/")
            form = "{} {:.2%}" if metric in ("top1", "top5") else "{} {:.4g}"
            scope = "EMA" if scope == "val_ema" else scope
            groups.setdefault(scope, []).append(form.format(metric, float(value)))
        texts = [f"{scope} {'  '.join(metrics)}" for scope, metrics in groups.items()]
        self.note(f"step {step:,}  {'  | '.join(texts)}")

    def _line(self) -> str:
        """Steps done of all, times, and the numbers of the last log or the pause we are in."""
        done, now = self._step - self._start, self._clock()
        began = self._created if self._loop_began is None else self._loop_began
        left = (now - began) / done * (self._total - self._step) if done > 0 else math.nan
        percent = 100 * self._step / max(self._total, 1)
        # A slice, not a test and an index: the live line's thread runs while a pause may end.
        state = "".join(f"  {name} ..." for name in self._pauses[:1]) or self._shown
        times = f"time {_duration(self.elapsed)}  ETA {_duration(left)}"
        return f"{self._step:,}/{self._total:,} {percent:.1f}%  {times}{state}"

    def _draw(self) -> Table:
        line = Text(self._line(), no_wrap=True, overflow="ellipsis")
        grid = Table.grid(padding=(0, 1))
        room = self.console.width - line.cell_len - 2
        bar = ProgressBar(total=max(self._total, 1), completed=self._step, width=min(room, 40))
        grid.add_row(*([bar] if room >= 10 else []), line)
        return grid


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; null is read as NaN.

    A kill can leave the last line half written: it is left out. Anything else that is not JSON is a
    ValueError.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no newline after it: unfinished, or the empty end
                break
            raise ValueError(f"{path}:{number} is not JSON, delete it: {line[:60]}") from error
        rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def learning_curves(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws loss, top-1, learning rate and speed over steps as a PNG, from rows of metrics.jsonl.

    A panel without data is left out. The loss is on a logarithmic axis if it spans over a decade.
    """
    from matplotlib.ticker import MaxNLocator

    panels = (  # metric, whose, title, axis, factor
        ("loss", ("train", "val", "val_ema"), "Loss", "loss", 1),
        ("top1", ("val", "val_ema"), "Validation top-1", "top-1 (%)", 100),
        ("learning_rate", ("train",), "Learning rate", "learning rate", 1),
        ("img_per_s", ("time",), "Training speed", "images per second", 1),
    )
    colors = {"train": "C0", "time": "C0", "val": "C1", "val EMA": "C2"}
    figure, drawn = blank_figure(1200, 760), 0
    for metric, scopes, title, unit, factor in panels:
        curves = {}
        for scope in scopes:
            points = [(r["step"], factor * r.get(f"{scope}/{metric}", math.nan)) for r in rows]
            points = [point for point in points if math.isfinite(point[1])]
            curves |= {scope.replace("val_ema", "val EMA"): points} if points else {}
        if not curves:
            continue
        drawn += 1
        axes = figure.add_subplot(2, 2, drawn)
        for label, points in curves.items():
            marker = "o" if len(points) <= 40 else ""
            axes.plot(*zip(*points, strict=True), colors[label], label=label, marker=marker, ms=4)
        values = [value for points in curves.values() for _, value in points]
        if metric == "loss" and min(values) > 0 and max(values) > 10 * min(values):
            axes.set_yscale("log")
        elif metric == "img_per_s":
            axes.set_ylim(0, 1.1 * max(values))
        elif metric == "top1":
            found = [(v, -step, label) for label, p in curves.items() for step, v in p]
            best, step, label = max(found)  # of equals, the first
            label = f"best {best:.2f}% ({label}, step {-step:,})"
            axes.plot(-step, best, "*", color="C3", ms=13, zorder=3, label=label)
        if len(axes.lines) > 1:
            axes.legend()
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if not drawn:
        figure.suptitle("nothing logged yet")
    save_figure(path, figure)


def confusion_matrix(
    path: Path,
    labels: Integer[np.ndarray, " n"],
    predicted: Integer[np.ndarray, " n"],
    class_names: Sequence[str],
) -> None:
    """Draws as a PNG which class (row) is taken for which (column), shaded by share of the row.

    Up to CELL_TEXT_CLASSES classes the cells show counts; beyond ALL_CLASSES only the MOST_CONFUSED
    classes are drawn: those with most errors, missed and false ones together. A share is always of
    all examples of the class, also of those whose prediction is not drawn.
    """
    from matplotlib.colors import PowerNorm

    _check_classes(labels, predicted, class_names)
    k, wrong = len(class_names), labels != predicted
    shown, title = np.arange(k), "Confusion matrix"
    if k > ALL_CLASSES:
        errors = np.bincount(np.r_[labels[wrong], predicted[wrong]], minlength=k)
        shown = np.sort(np.argsort(-errors, kind="stable")[:MOST_CONFUSED])
        title += f": the {MOST_CONFUSED} most confused of {k:,} classes"
    m = len(shown)
    place = np.full(k, -1)
    place[shown] = np.arange(m)
    rows, columns = place[labels], place[predicted]
    inside = (rows >= 0) & (columns >= 0)
    counts = np.bincount(rows[inside] * m + columns[inside], minlength=m * m).reshape(m, m)
    share = counts / np.maximum(np.bincount(labels, minlength=k)[shown, None], 1)

    texts = m <= CELL_TEXT_CLASSES
    side = m * max(40, 10 * len(str(counts.max()))) if texts else 800  # pixels
    figure = blank_figure(max(500, side + 300), max(400, side + 200))
    axes = figure.add_subplot()
    norm = PowerNorm(0.5, vmin=0, vmax=1)  # brings out the rare mistakes
    image = axes.imshow(share, cmap="Blues", norm=norm, interpolation="nearest")
    for i, j in np.argwhere(counts) if texts else ():
        color = "white" if share[i, j] > 0.3 else "black"
        axes.text(j, i, f"{counts[i, j]}", ha="center", va="center", fontsize=8, color=color)
    ticks = range(0, m, math.ceil(m / 40))
    names = [class_names[shown[i]] for i in ticks]
    names = [name if len(name) <= 20 else f"{name[:19]}…" for name in names]
    axes.set_yticks(ticks, names, fontsize=8, parse_math=False)
    upright = max(map(len, names)) > 3
    axes.set_xticks(ticks, names, fontsize=8, rotation=90 * upright, parse_math=False)
    right = f"{len(labels) - wrong.sum():,} of {len(labels):,} right"
    axes.set_title(f"{title}\n{right} ({1 - wrong.mean():.2%})" if len(labels) else title)
    axes.set(xlabel="predicted class", ylabel="true class")
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    save_figure(path, figure)


def per_class_csv(
    path: Path,
    labels: Integer[np.ndarray, " n"],
    predicted: Integer[np.ndarray, " n"],
    class_names: Sequence[str],
) -> None:
    """Writes one CSV row for each class, in class order.

    Columns: class, count (examples), correct, accuracy (correct / count, the recall), precision
    (correct / times predicted), f1, most_confused_with (what its mistakes are most often taken for)
    and times (how often). A ratio with nothing to divide by is left empty.
    """
    _check_classes(labels, predicted, class_names)
    k, wrong = len(class_names), labels != predicted
    count, guessed = np.bincount(labels, minlength=k), np.bincount(predicted, minlength=k)
    correct = np.bincount(labels[~wrong], minlength=k)
    pairs = np.stack([labels[wrong], predicted[wrong]]).astype(np.int64)
    (true, taken), times = np.unique(pairs, axis=1, return_counts=True)
    # Of a class's mistakes the last in this order stays: the most frequent, of equals the first.
    confused = {
        int(true[i]): (class_names[taken[i]], times[i]) for i in np.lexsort((-taken, times))
    }

    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    header = ("class", "count", "correct", "accuracy", "precision", "f1")
    table.writerow([*header, "most_confused_with", "times"])
    for i, name in enumerate(class_names):
        hits, of = int(correct[i]), (count[i], guessed[i], (count[i] + guessed[i]) / 2)
        ratios = [f"{hits / n:.6f}" if n else "" for n in of]  # f1 is their harmonic mean
        table.writerow([name, count[i], hits, *ratios, *confused.get(i, ("", 0))])
    replace_file(path, text.getvalue().encode())


def sample_sheet(
    path: Path,
    images: UInt8[np.ndarray, "n h w 3"],
    captions: Sequence[str],
    *,
    columns: int = 8,
    title: str = "",
) -> None:
    """Draws images in a grid as a PNG, each with its caption below, which may have several lines.

    Small images are enlarged in whole pixels to at least THUMBNAIL on the short side, large ones
    averaged down to not much more. A line too long for its cell ends in an ellipsis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    n = len(images)
    if not n or n != len(captions):
        raise ValueError(f"{n} images and {len(captions)} captions; need as many, and at least one")

    images = _scale(images, THUMBNAIL)
    h, w = images.shape[1:3]

    line, gap, columns = 15, 10, min(columns, n)  # pixels of a line of text, and between cells
    lines = max(caption.count("\n") + 1 for caption in captions)
    down, right = h + lines * line + gap, w + gap
    top = gap + (line + gap if title else 0)
    width = max(gap + columns * right, 400 if title else 0)
    height = top + math.ceil(n / columns) * down
    figure = blank_figure(width, height)
    renderer = FigureCanvasAgg(figure).get_renderer()

    write = functools.partial(_write, figure, renderer)
    with _missing_glyphs_ignored():
        write(gap, gap, title, width - 2 * gap, 10, "left")
        for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
            x, y = gap + i % columns * right, top + i // columns * down
            figure.figimage(image, x, height - y - h)
            for j, text in enumerate(caption.split("\n")):
                write(x + w // 2, y + h + 2 + j * line, text, w + gap // 2, 8, "center")
    save_figure(path, figure)


def overlays(
    path: Path,
    image: UInt8[np.ndarray, "h w 3"],
    maps: Sequence[Float[np.ndarray, "_ _"]],
    captions: Sequence[str],
    *,
    title: str = "",
) -> None:
    """Draws an image and beside it, for each map, the image in grey under the map in colour.

    Maps are stretched over the image, whatever their size, between the centres of their cells
    linearly. Colours run from a map's lowest value (dark) to its highest (bright). The picture is
    one row; a caption is above its panel and may have several lines.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if len(maps) != len(captions):
        raise ValueError(f"{len(maps)} maps and {len(captions)} captions; need as many")
    image = _scale(image[None], PANEL)[0]
    h, w, _ = image.shape
    grey = np.repeat(image @ [[0.299], [0.587], [0.114]], 3, axis=2)  # luma of ITU-R BT.601
    panels = [image]
    for values in maps:
        span = values.max() - values.min()
        shares = (values - values.min()) / (span or 1)
        colors = matplotlib.colormaps["inferno"](_stretch(shares, (h, w)))[..., :3]
        panels.append((0.45 * grey + 0.55 * 255 * colors).round().astype(np.uint8))

    line, gap = 15, 10  # pixels of a line of text, and between panels
    lines = max((caption.count("\n") + 1 for caption in captions), default=0)
    top = gap + (line + gap if title else 0) + lines * line + 3
    width, height = gap + len(panels) * (w + gap), top + h + gap
    figure = blank_figure(width, height)
    write = functools.partial(_write, figure, FigureCanvasAgg(figure).get_renderer())
    with _missing_glyphs_ignored():
        write(gap, gap, title, width - 2 * gap, 10, "left")
        for i, (panel, caption) in enumerate(zip(panels, ("", *captions), strict=True)):
            x = gap + i * (w + gap)
            figure.figimage(panel, x, gap)
            for j, text in enumerate(caption.split("\n")):
                write(x + w // 2, top - 3 - (lines - j) * line, text, w, 8, "center")
    save_figure(path, figure)


def stage_table(rows: Iterable[Any], console: Console) -> None:
    """Prints a model's stages and their total.

    Args:
        rows: objects with .name, .shape (of the output), .params and .macs (counts); a row named
            "total" is passed over, for the total is summed here.
        console: where to.
    """
    stages = [row for row in rows if row.name != "total"]
    params, macs = sum(row.params for row in stages), sum(row.macs for row in stages)
    table = Table("stage", "output shape", show_footer=True)
    table.columns[0].footer = "total"
    table.add_column("parameters", f"{params:,}", justify="right")
    table.add_column("MACs (M)", f"{macs / 1e6:,.1f}", justify="right")
    for row in stages:
        shape = " x ".join(map(str, row.shape))
        table.add_row(Text(row.name), shape, f"{row.params:,}", f"{row.macs / 1e6:,.1f}")
    _print_whole(table, console)


def print_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    console: Console,
    *,
    footer: Sequence[str] = (),
) -> None:
    """Prints rows of text; columns but the first are aligned on the right."""
    table = Table(show_footer=bool(footer))
    for i, name in enumerate(header):
        foot = footer[i] if footer else ""
        table.add_column(Text(name), Text(foot), justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    _print_whole(table, console)


def _print_whole(table: Table, console: Console) -> None:
    natural = console.measure(table, options=console.options.update(width=1000))
    table.width = natural.maximum  # whole numbers, however narrow the terminal
    console.print(table, soft_wrap=True)


def _encode(row: Mapping[str, Any]) -> str:
    """One line of JSON; NaN and infinity become null."""
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "-:--:--"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _check_classes(labels: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]) -> None:
    k = len(class_names)
    spans = [(a.min(initial=0), a.max(initial=0)) for a in (labels, predicted)]
    if len(labels) != len(predicted) or any(low < 0 or high >= k for low, high in spans):
        raise ValueError(
            f"{len(labels)} labels in {spans[0]} and {len(predicted)} predictions in {spans[1]}; "
            f"need as many, all from 0 to {k - 1}, one for each class name"
        )


def _scale(images: UInt8[np.ndarray, "n h w 3"], side: int) -> UInt8[np.ndarray, "n oh ow 3"]:
    """Repeats pixels until the short side has `side`, or averages them down to not much more."""
    n, h, w, _ = images.shape
    larger, smaller = math.ceil(side / min(h, w)), max(1, min(h, w) // (side + side // 6))
    h, w = h // smaller, w // smaller
    images = images[:, : h * smaller, : w * smaller].reshape(n, h, smaller, w, smaller, 3)
    return images.mean((2, 4)).round().astype(np.uint8).repeat(larger, 1).repeat(larger, 2)


def _stretch(values: Float[np.ndarray, "_ _"], size: tuple[int, int]) -> Float[np.ndarray, "_ _"]:
    """Linear interpolation between the centres of cells; beyond the outermost, their values."""

    def weights(cells: int, pixels: int) -> Float[np.ndarray, "_ _"]:
        at = (np.arange(pixels) + 0.5) * cells / pixels - 0.5
        return np.stack([np.interp(at, np.arange(cells), each) for each in np.eye(cells)], axis=1)

    return weights(values.shape[0], size[0]) @ values @ weights(values.shape[1], size[1]).T


def _write(
    figure: "Figure",
    renderer: "RendererAgg",
    x: int,
    y: int,
    text: str,
    room: int,
    size: int,
    align: str,
) -> None:
    """Text with its top at (x, y), in pixels from the top left, cut to a width of `room` pixels."""
    width, height = figure.get_size_inches() * figure.dpi
    artist = figure.text(x / width, 1 - y / height, text, fontsize=size, ha=align, va="top")
    artist.set_parse_math(False)
    while artist.get_window_extent(renderer).width > room and text:
        text = text[:-1]
        artist.set_text(f"{text}…")


def blank_figure(width: int, height: int) -> "Figure":
    """An empty figure of `width` by `height` pixels; its axes keep clear of one another."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    return Figure(figsize=(width / 100, height / 100), dpi=100, layout=layout)


@contextlib.contextmanager
def _missing_glyphs_ignored() -> Iterator[None]:
    """Names come in any script, matplotlib's font in a few: draws a box, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def save_figure(path: Path, figure: "Figure") -> None:
    """Writes a figure as a PNG, the whole or nothing."""
    data = io.BytesIO()
    with _missing_glyphs_ignored():
        figure.savefig(data, format="png")
    replace_file(path, data.getvalue())
