"""Report under a clock that only the test moves; pictures by their pixels and their texts."""

import ast
import collections
import csv
import importlib
import io
import itertools
import json
import math
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from mobilevit_jax import report

Stage = collections.namedtuple("Stage", "name shape params macs")


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def plain_console():
    return Console(file=io.StringIO(), width=40)


def make(workdir, clock, **changes):
    arguments: dict[str, Any] = {
        "total_steps": 100,
        "start_step": 0,
        "images": lambda step: 32 * step,
        "console": plain_console(),
    }
    return report.Report(workdir, clock=clock, **(arguments | changes))


def printed(console):
    return console.file.getvalue()


def strict_rows(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def train(run, clock, steps, *, wait=0.25, work=0.75):
    for step in steps:
        with run.waiting():
            clock.now += wait
        clock.now += work
        run.advance(step)


def test_speed_share_and_eta_leave_out_or_average_in_the_pauses(tmp_path):
    clock, console = Clock(), plain_console()
    with make(tmp_path, clock, console=console, elapsed=500.0) as run:
        with run.pausing("compile"):
            clock.now += 60
        train(run, clock, range(1, 11))  # 10 s
        run.log(10, {"train/loss": 2.0, "train/learning_rate": 5e-4})
        with run.pausing("evaluate"):
            with run.waiting():  # a pause, not a wait for training data
                clock.now += 4
            with run.pausing("save"):  # counted once
                clock.now += 6
        train(run, clock, range(11, 21), wait=0.5, work=1.5)  # 20 s
        run.log(20, {"train/loss": 1.0, "train/learning_rate": 5e-4})
        assert run.elapsed == 500 + 60 + 10 + 10 + 20
    first, second = strict_rows(tmp_path / "metrics.jsonl")
    assert first == {
        "step": 10,
        "images": 320,
        "time": 570.0,
        "train/loss": 2.0,
        "train/learning_rate": 5e-4,
        "time/img_per_s": 32.0,
        "time/wait_share": 0.25,
        "time/goodput": pytest.approx(7.5 / 70),  # 60 s of compiling and 2.5 of waiting are not
        "time/compile_s": 60.0,
        "time/wait_s": 2.5,
    }
    assert (second["time"], second["time/img_per_s"], second["time/wait_share"]) == (600, 16, 0.25)
    assert second["time/goodput"] == pytest.approx(0.225)
    assert (second["time/evaluate_s"], second["time/wait_s"]) == (10.0, 7.5)
    assert run.goodput()[1] == "goodput 22% of 100.0 s; compile 60.0 s, wait 7.5 s, evaluate 10.0 s"
    # Since the loop began 10 steps took 10 s: 90 s for 90; then 20 steps 40 s, pauses included.
    assert printed(console).splitlines() == [
        "step 10/100 10.0%  time 0:09:30  ETA 0:01:30  loss 2  32 img/s  wait 25%  lr 0.0005",
        "step 20/100 20.0%  time 0:10:00  ETA 0:02:40  loss 1  16 img/s  wait 25%  lr 0.0005",
    ]


def test_eta_after_a_resume_counts_only_the_steps_of_this_start(tmp_path):
    clock, console = Clock(), plain_console()
    with make(tmp_path, clock, console=console, start_step=90, elapsed=7200.0) as run:
        train(run, clock, range(91, 96), wait=1.0, work=7199.0)
        run.log(95, {})
    assert "95/100 95.0%  time 12:00:00  ETA 10:00:00  " in printed(console)
    (row,) = strict_rows(tmp_path / "metrics.jsonl")
    assert (row["images"], row["time"]) == (95 * 32, 43200)


def test_mfu_is_the_ideal_time_over_that_of_the_steps_without_pauses(tmp_path):
    clock = Clock()
    with make(tmp_path, clock) as run:
        train(run, clock, range(1, 11))  # 10 s
        with run.pausing("evaluate"):
            clock.now += 30
        run.log(10, {}, ideal=4.0)
        train(run, clock, range(11, 16))
        run.log(15, {})
    first, second = strict_rows(tmp_path / "metrics.jsonl")
    assert first["time/mfu"] == 0.4
    assert "time/mfu" not in second


def test_logging_twice_at_one_moment_gives_no_speed_rather_than_an_error(tmp_path):
    clock = Clock()
    with make(tmp_path, clock) as run:
        run.log(0, {"train/loss": np.float32(0.5)})
    (row,) = strict_rows(tmp_path / "metrics.jsonl")
    assert row["train/loss"] == 0.5
    assert row["time/img_per_s"] is None


def test_non_finite_values_are_null_in_the_file_and_nan_when_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = {"a": math.nan, "b": math.inf, "c": np.float32(-math.inf), "d": np.asarray(2)}
    with make(tmp_path, Clock()) as run:
        run.scalars(3, values)
    (row,) = strict_rows(path)
    assert [row[name] for name in "abcd"] == [None, None, None, 2.0]
    (row,) = report.read_metrics(path)
    assert row["step"] == 3
    assert math.isnan(row["a"])
    assert math.isnan(row["b"])


def test_resume_drops_later_rows_and_the_half_written_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with make(tmp_path, Clock()) as run:
        for step in (0, 10, 20, 20, 30):
            run.scalars(step, {"x": step / 7, "y": math.nan})
    whole = path.read_text()
    path.write_text(whole + '{"step": 40, "x": 0.1')
    assert [row["step"] for row in report.read_metrics(path)] == [0, 10, 20, 20, 30]
    with make(tmp_path, Clock(), start_step=20) as run:
        assert path.read_text() == "".join(whole.splitlines(keepends=True)[:4])
        run.scalars(21, {"x": 1.0})
    assert [row["step"] for row in strict_rows(path)] == [0, 10, 20, 20, 21]
    with make(tmp_path, Clock()):  # from scratch: even step 0 happens again
        assert path.read_text() == ""
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_whole_last_row_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    with make(tmp_path, Clock(), start_step=2):
        assert [row["step"] for row in strict_rows(path)] == [1, 2]


def test_a_broken_row_inside_the_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r'metrics\.jsonl:2 is not JSON, delete it: \{"ste'):
        report.read_metrics(path)


def test_a_row_outlives_a_kill(tmp_path):
    code = (
        "import os, pathlib, sys; from mobilevit_jax.report import Report\n"
        "run = Report(pathlib.Path(sys.argv[1]), total_steps=9, start_step=0, images=int)\n"
        "run.scalars(1, {'x': 1.0}); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (row,) = strict_rows(tmp_path / "metrics.jsonl")
    assert row["x"] == 1.0


def test_plain_lines_are_never_wrapped_and_brackets_and_colons_are_no_markup(tmp_path):
    console = plain_console()
    text = "[bold]kept[/bold] :smile: " + "/a/very/long/path" * 20
    with make(tmp_path, Clock(), console=console) as run, run.pausing("compile"):
        run.note(text)
    assert printed(console) == text + "\n"


def test_an_evaluation_is_one_readable_line(tmp_path):
    console = plain_console()
    values = {
        "val/top1": 0.971,
        "val/top5": 1.0,
        "val/loss": 0.1234567,
        "val_ema/top1": np.float32(0.98),
        "val_ema/loss": math.nan,
    }
    with make(tmp_path, Clock(), console=console) as run:
        run.evaluation(1500, values)
    assert printed(console) == (
        "step 1,500  val top1 97.10%  top5 100.00%  loss 0.1235  | EMA top1 98.00%  loss nan\n"
    )
    (row,) = strict_rows(tmp_path / "metrics.jsonl")
    assert (row["val/top1"], row["val_ema/loss"]) == (0.971, None)


@pytest.mark.parametrize("width", [60, 80, 130])
def test_on_a_terminal_one_line_is_drawn_again_and_again(tmp_path, width):
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True, width=width, _environ={})
    with make(tmp_path, clock, console=console, total_steps=4) as run:
        train(run, clock, [1, 2])
        run.log(2, {"train/loss": 0.5, "train/learning_rate": 0.1})
        run._live.refresh()
        run.note("[note]")
        with run.pausing("evaluate"):
            run._live.refresh()
        train(run, clock, [3])
    text = printed(console)
    assert text.count("\x1b[2K") >= 3  # erases its own line
    assert "\x1b[2K[note]\n" in text  # in its place, the line below anew
    assert "2/4 50.0%  time 0:00:02  ETA 0:00:02  evaluate ..." in text
    last = text.rsplit("\r", 1)[1]
    assert "3/4 75.0%  time 0:00:03  ETA 0:00:01" in last
    assert ("wait 25%  lr 0.1" in last) == (width > 60)
    assert ("━" in last) == (width == 130)
    assert "step" not in text  # no plain lines besides


def test_a_dumb_terminal_gets_plain_lines(tmp_path):
    console = Console(
        file=io.StringIO(), force_terminal=True, color_system=None, _environ={"TERM": "dumb"}
    )
    clock = Clock()
    with make(tmp_path, clock, console=console) as run:
        train(run, clock, [1])
        run.log(1, {})
    assert printed(console).startswith("step 1/100")
    assert "\x1b" not in printed(console)


def events(path):
    event_type = importlib.import_module("tensorboardX.proto.event_pb2").Event
    data = path.read_bytes()
    while data:  # length, its checksum, the event, its checksum
        (size,) = struct.unpack("<Q", data[:8])
        event, data = event_type.FromString(data[12 : 12 + size]), data[16 + size :]
        yield event


def test_tensorboard_gets_every_scalar_and_hides_what_is_taken_again(tmp_path):
    arguments = {"writers": ["tensorboard"], "config": {"optimizer.lr": 0.5}}
    with make(tmp_path, Clock(), start_step=7, **arguments) as run:
        run.scalars(8, {"train/loss": 0.5, "val/top1": math.nan})
        run.log(10, {})
    (path,) = (tmp_path / "tensorboard").iterdir()
    found = list(events(path))
    config, *values = [(e.step, v) for e in found for v in e.summary.value]
    assert config[1].tensor.string_val == [b"    optimizer.lr: 0.5"]
    values = [(step, value.tag, value.simple_value) for step, value in values]
    assert values[0] == (8, "train/loss", 0.5)
    assert values[1][:2] == (8, "val/top1")
    assert math.isnan(values[1][2])
    assert (10, "images", 320.0) in values
    assert any(event.session_log.status == 1 and event.step == 8 for event in found)  # START


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    path.write_text("old")

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        report.per_class_csv(path, np.array([0]), np.array([0]), ["a"])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# Pictures.


@pytest.fixture
def drawn(monkeypatch):
    """The figures drawn, in order, beside their being saved."""
    figures, save = [], report.save_figure
    monkeypatch.setattr(
        report, "save_figure", lambda path, figure: (figures.append(figure), save(path, figure))
    )
    return figures


def read_png(path):
    assert path.read_bytes().startswith(b"\x89PNG")
    return (matplotlib.image.imread(path)[..., :3] * 255).round().astype(np.uint8)


def assert_margins_are_white(picture):
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == 255).all()  # nothing is cut off


def test_learning_curves(tmp_path, drawn):
    rows = [{"step": s, "train/loss": 4.0 * 0.9**s, "train/learning_rate": 0.1} for s in range(60)]
    rows += [{"step": 20, "val/loss": 1.0, "val/top1": 0.9, "val_ema/top1": 0.5}]
    rows += [{"step": 40, "val/loss": math.nan, "val/top1": 0.8, "val_ema/top1": 0.95}]
    rows += [{"step": 50, "val_ema/top1": 0.95}, {"step": 50, "time/img_per_s": 700.0}]
    report.learning_curves(tmp_path / "curves.png", rows)
    picture = read_png(tmp_path / "curves.png")
    assert picture.shape == (760, 1200, 3)
    assert_margins_are_white(picture)
    loss, top1, rate, speed = drawn[0].axes
    assert [axes.get_title() for axes in drawn[0].axes] == [
        "Loss",
        "Validation top-1",
        "Learning rate",
        "Training speed",
    ]
    assert loss.get_yscale() == "log"
    assert [line.get_xydata().tolist() for line in loss.lines[1:]] == [[[20, 1.0]]]
    texts = [text.get_text() for text in top1.get_legend().get_texts()]
    assert texts == ["val", "val EMA", "best 95.00% (val EMA, step 40)"]
    assert top1.lines[2].get_xydata().tolist() == [[40, 95]]
    assert (rate.get_legend(), speed.get_ylim()[0]) == (None, 0)


def test_learning_curves_of_one_point_and_of_nothing(tmp_path, drawn):
    rows = [{"step": 5, "train/loss": 2.0}, {"step": 5, "val/top1": math.nan}]
    report.learning_curves(tmp_path / "one.png", rows)
    (axes,) = drawn[0].axes
    assert (axes.get_title(), axes.get_yscale()) == ("Loss", "linear")
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [5]
    report.learning_curves(tmp_path / "none.png", [])
    assert not drawn[1].axes
    assert read_png(tmp_path / "none.png").min() == 0  # says so


def test_confusion_matrix_of_few_classes(tmp_path, drawn):
    labels, predicted = np.array([0, 0, 0, 0, 1, 1, 2]), np.array([0, 0, 0, 1, 1, 2, 1])
    names = ["cat", "$dog$", "狗 a name much too long to show", "never seen"]
    report.confusion_matrix(tmp_path / "c.png", labels, predicted, names)
    assert_margins_are_white(read_png(tmp_path / "c.png"))
    axes = drawn[0].axes[0]
    share = [[0.75, 0.25, 0, 0], [0, 0.5, 0.5, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(axes.images[0].get_array(), share)
    cells = {(*text.get_position(), text.get_text()) for text in axes.texts}
    assert cells == {(0, 0, "3"), (1, 0, "1"), (1, 1, "1"), (2, 1, "1"), (1, 2, "1")}  # x, y
    assert axes.get_title() == "Confusion matrix\n4 of 7 right (57.14%)"
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == ["cat", "$dog$", "狗 a name much too l…", "never seen"]


@pytest.mark.parametrize("k", [20, 101, 200])
def test_confusion_matrix_of_many_classes(tmp_path, drawn, k):
    labels = np.arange(k).repeat(3)
    names = [f"class number {i}" for i in range(k)]
    report.confusion_matrix(tmp_path / "c.png", labels, labels, names)
    picture = read_png(tmp_path / "c.png")
    assert_margins_are_white(picture)
    assert max(picture.shape) <= 1200
    axes = drawn[0].axes[0]
    assert axes.images[0].get_array().shape == (k, k)
    assert len(axes.texts) == (k if k == 20 else 0)
    assert len(axes.get_xticks()) <= 40
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(boxes))  # none overlap


def test_confusion_matrix_of_a_thousand_classes_shows_the_most_confused(tmp_path, drawn):
    labels = np.arange(1000).repeat(4)
    predicted = labels.copy()
    predicted[: 15 * 4 : 4] = 999  # one mistake in each of the first 15 classes, all towards 999
    predicted[100 * 4 : 114 * 4] = np.arange(500, 514).repeat(4)  # 14 classes wholly mistaken
    names = [f"c{i}" for i in range(1000)]
    report.confusion_matrix(tmp_path / "c.png", labels, predicted, names)
    axes = drawn[0].axes[0]
    assert axes.get_title().startswith("Confusion matrix: the 30 most confused of 1,000 classes\n")
    shown = [label.get_text() for label in axes.get_yticklabels()]
    expected = [0, *range(100, 114), *range(500, 514), 999]
    assert shown == [f"c{i}" for i in expected]
    share = axes.images[0].get_array()
    assert share[0, [0, -1]].tolist() == [0.75, 0.25]
    assert share[1, 15] == 1.0  # 100 taken for 500
    assert share[15, 15] == 1.0


def test_an_empty_split_still_draws(tmp_path):
    nothing = np.zeros(0, np.int32)
    report.confusion_matrix(tmp_path / "c.png", nothing, nothing, ["a", "b"])
    report.per_class_csv(tmp_path / "c.csv", nothing, nothing, ["a", "b"])
    assert (tmp_path / "c.csv").read_text().splitlines()[1:] == ["a,0,0,,,,,0", "b,0,0,,,,,0"]


@pytest.mark.parametrize(
    ("labels", "predicted"), [([0, 2], [0, 1]), ([0, 1], [0, -1]), ([0, 1], [0])]
)
def test_classes_without_a_name_are_refused(tmp_path, labels, predicted):
    write = report.per_class_csv if len(labels) == len(predicted) else report._check_classes
    arguments = [np.array(labels), np.array(predicted), ["a", "b"]]
    with pytest.raises(ValueError, match="need as many, all from 0 to 1"):
        write(*([tmp_path / "c.csv"] if write is report.per_class_csv else []), *arguments)


def test_per_class_csv(tmp_path):
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 2], np.int32)
    predicted = np.array([0, 0, 2, 2, 1, 1, 1, 0, 1], np.int32)
    names = ["cat", "dog, brown", "bird", "unseen"]
    report.per_class_csv(tmp_path / "c.csv", labels, predicted, names)
    with (tmp_path / "c.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [list(row.values()) for row in rows] == [
        # recall 2/6, precision 2/3, f1 2*2/(6+3); dog and bird tie at two: the first is named
        ["cat", "6", "2", "0.333333", "0.666667", "0.444444", "dog, brown", "2"],
        ["dog, brown", "2", "1", "0.500000", "0.250000", "0.333333", "cat", "1"],
        ["bird", "1", "0", "0.000000", "0.000000", "0.000000", "dog, brown", "1"],
        ["unseen", "0", "0", "", "", "", "", "0"],
    ]
    header = "class count correct accuracy precision f1 most_confused_with times"
    assert list(rows[0]) == header.split()


def test_sample_sheet_enlarges_in_whole_pixels(tmp_path, drawn):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 10, 3), dtype=np.uint8)
    captions = ["9 → 4  98%", "a caption that is much longer than its cell", "$x$", "狗", ""]
    report.sample_sheet(tmp_path / "s.png", images, captions, columns=4, title="Mistakes")
    picture = read_png(tmp_path / "s.png")
    assert_margins_are_white(picture)
    big = images.repeat(12, 1).repeat(12, 2)  # 96 x 120
    places = [(35 + row * 121, 10 + column * 130) for row in range(2) for column in range(4)]
    for image, (y, x) in zip(big, places, strict=False):
        np.testing.assert_array_equal(picture[y : y + 96, x : x + 120], image)
    assert picture.shape == (35 + 2 * 121, 10 + 4 * 130, 3)
    texts = [text.get_text() for text in drawn[0].texts]
    assert texts[:2] == ["Mistakes", "9 → 4  98%"]
    assert texts[2].startswith("a caption that")
    assert texts[2].endswith("…")
    assert drawn[0].texts[2].get_window_extent().width <= 125
    assert texts[3:] == ["$x$", "狗", ""]


def test_sample_sheet_averages_large_images_down(tmp_path):
    images = np.full((1, 224, 448, 3), 10, np.uint8)
    images[:, ::2] = 20
    report.sample_sheet(tmp_path / "s.png", images, ["two\nlines"])
    picture = read_png(tmp_path / "s.png")
    assert picture.shape == (10 + 112 + 30 + 10, 10 + 224 + 10, 3)
    assert (picture[10:122, 10:234] == 15).all()


def test_sample_sheet_refuses_what_it_cannot_draw(tmp_path):
    images = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="2 images and 1 captions"):
        report.sample_sheet(tmp_path / "s.png", images, ["a"])
    with pytest.raises(ValueError, match="at least one"):
        report.sample_sheet(tmp_path / "s.png", images[:0], [])


def test_overlays_show_the_image_and_each_map_over_it(tmp_path, drawn):
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    image[:, 48:] = 0
    maps = [np.array([[1.0, 1.0, 3.0, 3.0]]), np.full((2, 3), 7.0)]
    captions = ["layer $3$\nfrom 1 to 3", "flat"]
    report.overlays(tmp_path / "o.png", image, maps, captions, title="x.png: cat 90.0 %")
    picture = read_png(tmp_path / "o.png")
    assert picture.shape == (10 + 25 + 33 + 192 + 10, 10 + 3 * 298, 3)
    assert_margins_are_white(picture)
    panels = [picture[68 : 68 + 192, x : x + 288] for x in (10, 308, 606)]
    np.testing.assert_array_equal(panels[0], image.repeat(3, 0).repeat(3, 1))
    # Black there, so that the colour is all there is: that of the highest and of the lowest value.
    high, low = (np.array(matplotlib.colormaps["inferno"](x)[:3]) * 255 * 0.55 for x in (1.0, 0.0))
    np.testing.assert_array_equal(panels[1][:, 252:], np.broadcast_to(high.round(), (192, 36, 3)))
    np.testing.assert_array_equal(panels[2][:, 144:], np.broadcast_to(low.round(), (192, 144, 3)))
    assert np.ptp(panels[1][:, :144], axis=2).max() > 30  # and in colour over the grey
    between = panels[1][0, 144:252].astype(int).sum(axis=1)
    assert (np.diff(between) >= -2).all()
    assert between[0] < between[-1]
    texts = [text.get_text() for text in drawn[0].texts]
    assert texts == ["x.png: cat 90.0 %", "", "layer $3$", "from 1 to 3", "flat"]


def test_overlays_refuse_maps_without_a_caption(tmp_path):
    with pytest.raises(ValueError, match="1 maps and 0 captions"):
        report.overlays(tmp_path / "o.png", np.zeros((8, 8, 3), np.uint8), [np.ones((2, 2))], [])


def test_print_table_is_never_cut_and_knows_no_markup():
    console = plain_console()
    rows = [["[bold]a[/bold]", "1,234,567,890", "9" * 30], ["b", "1", "2"]]
    report.print_table(["name", "count", "more"], rows, console, footer=["total", "3", "4"])
    cells = [
        [cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]]
        for line in printed(console).splitlines()
        if line[0] in "│┃"
    ]
    assert cells == [["name", "count", "more"], *rows, ["total", "3", "4"]]


def test_stage_table_sums_its_rows_and_is_never_cut(tmp_path):
    console = plain_console()
    rows = [
        Stage("stem[0]", (128, 128, 16), 1_234, 5_250_000),
        Stage("stage_5", (8, 8, 160), 2_000_000, 5_000_040_000),
        Stage("total", (1000,), 99, 99),
    ]
    with make(tmp_path, Clock(), console=console) as run:
        run.table(rows)
    cells = [
        [cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]]
        for line in printed(console).splitlines()
        if line[0] in "│┃"
    ]
    assert cells == [
        ["stage", "output shape", "parameters", "MACs (M)"],
        ["stem[0]", "128 x 128 x 16", "1,234", "5.2"],
        ["stage_5", "8 x 8 x 160", "2,000,000", "5,000.0"],
        ["total", "", "2,001,234", "5,005.3"],
    ]


def test_importing_report_loads_no_drawing_and_no_jax():
    code = (
        "import sys, mobilevit_jax.report; "
        "print([m for m in ('jax', 'matplotlib', 'tensorboardX') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert output.stdout == "[]\n"
    tree = ast.parse(Path(report.__file__).read_text())
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not any("pyplot" in str(module) for module in imported)
