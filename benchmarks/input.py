"""Compares the project's input pipeline with others: images/s, CPU time, memory, first batch.

Every measurement is a fresh process bound to some cores, the engines in turn, round after round;
the numbers are medians of the rounds, the ratios those of the medians of this run. The set of
images is built once (input_set.py); the engines are in input_peers.py, and one whose packages are
not installed is left out: see requirements-input.txt. Disk and network are not measured: the files
are read once before the first round.

    python benchmarks/input.py --data build/input-set --out experiments/DATE-input
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import input_set
import measure
from input_peers import BATCH, ENGINES, SIZE
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
WARM = 8  # batches before the timed ones: tf.data tunes itself
MAX_OTHERS = 0.1  # cores that others may take in the median round before the rates are doubted
TIME_LIMIT = 600  # seconds, of one measurement
TRAINING_PEERS = ("tf_data", "tf_data_antialias", "torch", "raw_decode")
PACKAGES = (
    "mobilevit_jax",
    "numpy",
    "pillow",
    "simplejpeg",
    "opencv-python-headless",
    "tensorflow-cpu",
    "grain",
    "torch",
    "timm",
)


class Goal(NamedTuple):
    """A number to reach on the most cores measured: `value` of `engine`, or of it / `peer`."""

    text: str
    engine: str
    peer: str | None
    value: str
    at_least: bool
    bound: float


GOALS = (
    Goal("plain / tf.data, no antialias", "ours", "tf_data", "rate", True, 1.1),
    Goal("plain / tf.data, antialias", "ours", "tf_data_antialias", "rate", True, 2.0),
    Goal("plain / DataLoader + Pillow", "ours", "torch", "rate", True, 2.1),
    Goal("plain / raw decode rate", "ours", "raw_decode", "rate", True, 0.9),
    Goal("restart / tf.data, no antialias", "ours_restart", "tf_data", "rate", True, 1.4),
    Goal("restart / tf.data, antialias", "ours_restart", "tf_data_antialias", "rate", True, 2.6),
    Goal("restart / DataLoader + Pillow", "ours_restart", "torch", "rate", True, 2.8),
    Goal("RandAugment, images/s a core", "ours_randaugment", None, "rate_a_core", True, 650.0),
    Goal("evaluation / Pillow", "ours_evaluation", "pillow_evaluation", "rate", True, 1.2),
    Goal("first batch, s", "ours", None, "first_batch_s", False, 1.0),
    Goal("memory, MB", "ours", None, "memory_mb", False, 250.0),
)


def main() -> None:
    """Builds the set, measures, prints the tables and writes them."""
    arguments = _parse()
    console = Console(width=None if sys.stdout.isatty() else 190)
    try:
        about = input_set.build(arguments.data, report=console.print)
    except (RuntimeError, OSError) as error:
        sys.exit(f"input.py: {error}")
    console.print(_set_line(about))
    for path in arguments.data.rglob("*"):  # into the page cache
        if path.is_file():
            path.read_bytes()
    runs: list[dict[str, Any]] = []
    try:
        for run in _measure_all(arguments, console):
            runs.append(run)
    except KeyboardInterrupt:
        console.print("interrupted; the tables show what was measured")
    if not runs:
        return
    summary = _summarize(runs)
    for cells in (_engine_rows(summary), _goal_rows(summary)):
        console.print(_rich_table(cells))
    busiest = max(row["others_cores"] for row in summary)
    if busiest > MAX_OTHERS:
        console.print(
            f"Other processes took up to {busiest:.2f} cores: do not trust rates and ratios, only "
            "CPU times, and measure again on a quiet machine."
        )
    record = {
        **measure.where(PACKAGES),
        "settings": {
            "rounds": arguments.rounds,
            "batches": arguments.batches,
            "warm_batches": WARM,
            "batch_size": BATCH,
            "size": SIZE,
        },
        "set": about,
        "summary": summary,
        "runs": runs,
    }
    measure.write(arguments.out / "input.json", record)
    (arguments.out / "input.md").write_text(_markdown(record))
    console.print(f"written to {arguments.out / 'input.json'} and {arguments.out / 'input.md'}")


def _parse() -> argparse.Namespace:
    names = "\n".join(f"  {name:26} {engine.label}" for name, engine in ENGINES.items())
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n    ")[0],
        epilog=f"engines:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build = Path("build")
    add = parser.add_argument
    add("--data", type=Path, default=build / "input-set", help="the set; built if not there")
    add("--out", type=Path, default=build / "input-benchmark", help="for input.json and input.md")
    add("--rounds", type=int, default=5, help="measurements of each engine; 0 only builds the set")
    add("--batches", type=int, default=16, help=f"timed batches of {BATCH} images, after {WARM}")
    add("--cores", type=int, nargs="+", default=[1, 2], help="numbers of cores to bind to")
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="ENGINE")
    arguments = parser.parse_args()
    if arguments.rounds < 0 or arguments.batches < 1 or min(arguments.cores) < 1:
        parser.error("--rounds must be at least 0, --batches and --cores at least 1")
    if shutil.which("taskset") is None:
        parser.error("taskset is not installed; type: apt-get install util-linux")
    return arguments


def _measure_all(arguments: argparse.Namespace, console: Console) -> Iterator[dict[str, Any]]:
    """Every engine on every number of cores, round after round, starting with another each time."""
    allowed = sorted(os.sched_getaffinity(0))
    names = []
    for name in arguments.engines:
        reason = _unusable(name, arguments.data)
        if reason:
            console.print(f"{name} is left out: {reason}")
        else:
            names.append(name)
    for cores in sorted(set(arguments.cores)):
        if cores > len(allowed):
            console.print(f"{cores} cores are left out: this machine lends {len(allowed)}")
    failed: set[str] = set()
    for turn in range(arguments.rounds):
        first = turn % max(len(names), 1)
        for cores in sorted({c for c in arguments.cores if c <= len(allowed)}):
            for name in names[first:] + names[:first]:
                if name in failed:
                    continue
                head = f"round {turn + 1}/{arguments.rounds}, {_cores(cores)}, {name}"
                try:
                    result = _measure(name, arguments, allowed[:cores])
                except RuntimeError as error:
                    failed.add(name)
                    console.print(f"{head} failed and is left out: {error}")
                    continue
                console.print(
                    f"{head}: {result['images_per_s']:.0f} images/s, "
                    f"{result['cpu_ms']:.2f} ms CPU, "
                    f"others took {result['others_cores']:.2f} cores"
                )
                yield {"round": turn, "cores": cores, "engine": name, **result}


def _measure(name: str, arguments: argparse.Namespace, cores: Sequence[int]) -> dict[str, float]:
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    command = ["taskset", "-c", ",".join(map(str, cores)), sys.executable]
    command += [str(HERE / "input_peers.py"), name, "--data", str(arguments.data)]
    command += ["--cores", str(len(cores)), "--warm", str(WARM)]
    command += ["--batches", str(arguments.batches), "--started", repr(time.monotonic())]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"it took more than {TIME_LIMIT} s") from None
    if done.returncode or not done.stdout.strip():
        raise RuntimeError((done.stderr.strip() or f"status {done.returncode}").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def _unusable(name: str, data: Path) -> str | None:
    engine = ENGINES[name]
    missing = [m for m in ("psutil", *engine.needs) if importlib.util.find_spec(m) is None]
    if missing:
        return f"{', '.join(missing)} not installed (see benchmarks/requirements-input.txt)"
    return None if (data / engine.part).is_dir() else f"there is no {data / engine.part}"


def _summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an engine and number of cores: medians of the rounds."""
    rows = []
    for name in ENGINES:
        for cores in sorted({run["cores"] for run in runs}):
            mine = [run for run in runs if (run["engine"], run["cores"]) == (name, cores)]
            if not mine:
                continue
            rates = [run["images_per_s"] for run in mine]
            row = {
                "engine": name,
                "cores": cores,
                "rounds": len(mine),
                "rate": statistics.median(rates),
                "rate_a_core": statistics.median(rates) / cores,
                "slowest": min(rates),
                "fastest": max(rates),
            }
            for key in ("cpu_ms", "first_batch_s", "memory_mb", "others_cores"):
                row[key] = statistics.median(run[key] for run in mine)
            rows.append(row)
    rates = {(row["engine"], row["cores"]): row["rate"] for row in rows}
    for row in rows:
        evaluation = row["engine"].endswith("evaluation")
        peers = ("pillow_evaluation",) if evaluation else TRAINING_PEERS
        row["ratios"] = {
            peer: row["rate"] / rates[peer, row["cores"]]
            for peer in peers
            if (peer, row["cores"]) in rates
        }
    return rows


def _engine_rows(summary: list[dict[str, Any]]) -> list[list[str]]:
    """Heading and rows of the table of engines."""
    cores = sorted({row["cores"] for row in summary})
    heading = ["engine"]
    for count in cores:
        heading += [f"{_cores(count)}, images/s", "CPU ms"]
    peers = (*TRAINING_PEERS, "pillow_evaluation")
    short = ("tf.data", "tf.data AA", "torch", "raw decode", "Pillow eval")
    heading += [f"x {name}" for name in short]
    heading += ["first batch, s", "memory, MB"]
    table = [heading]
    for name, engine in ENGINES.items():
        mine = {row["cores"]: row for row in summary if row["engine"] == name}
        if not mine:
            continue
        line = [engine.label]
        for count in cores:
            row = mine.get(count)
            if row is None:
                line += ["", ""]
            else:
                spread = f"{row['slowest']:.0f}-{row['fastest']:.0f}"
                line += [f"{row['rate']:.0f} ({spread})", f"{row['cpu_ms']:.2f}"]
        for peer in peers:
            found = [row["ratios"][peer] for row in mine.values() if peer in row["ratios"]]
            line.append(" / ".join(f"{ratio:.2f}" for ratio in found))
        last = mine[max(mine)]
        table.append([*line, f"{last['first_batch_s']:.2f}", f"{last['memory_mb']:.0f}"])
    used = [i for i, _ in enumerate(heading) if any(line[i] for line in table[1:])]
    return [[line[i] for i in used] for line in table]


def _goal_rows(summary: list[dict[str, Any]]) -> list[list[str]]:
    """Heading and rows of the table of goals, on the most cores measured."""
    cores = max(row["cores"] for row in summary)
    rows = {row["engine"]: row for row in summary if row["cores"] == cores}
    table = [[f"goal, {_cores(cores)}", "measured", "to reach", ""]]
    for goal in GOALS:
        if goal.engine not in rows or (goal.peer is not None and goal.peer not in rows):
            continue
        value = rows[goal.engine][goal.value]
        if goal.peer is not None:
            value /= rows[goal.peer][goal.value]
        reached = value >= goal.bound if goal.at_least else value < goal.bound
        sign = ">=" if goal.at_least else "<"
        table.append(
            [
                goal.text,
                f"{value:.3g}",
                f"{sign} {goal.bound:g}",
                "reached" if reached else "MISSED",
            ]
        )
    return table


def _rich_table(cells: list[list[str]]) -> Table:
    table = Table()
    for i, title in enumerate(cells[0]):
        table.add_column(title, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for line in cells[1:]:
        table.add_row(*line)
    return table


def _markdown_table(cells: list[list[str]]) -> str:
    heading, *lines = cells
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (heading, rule, *lines))


def _markdown(record: dict[str, Any]) -> str:
    settings, machine = record["settings"], record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    busy = [run["others_cores"] for run in record["runs"]]
    others, most = statistics.median(busy), max(busy)
    paragraphs = (
        "# Input pipeline, side by side",
        f"```bash\n{record['command']}\n```",
        f"{record['date']}, commit {record['commit']}. {machine['cores']} cores of "
        f"{machine['cpu']}, Python {machine['python']}; {versions}.",
        f"{_set_line(record['set'])} Everything in the page cache.",
        f"Random-resized-crop by torchvision's rule to {settings['size']} pixels, flip, uint8 "
        f"batches of {settings['batch_size']}; a fresh process each, bound to its cores; "
        f"{settings['batches']} batches timed after {settings['warm_batches']}; "
        f"{settings['rounds']} interleaved rounds: medians, slowest and fastest; ratios of the "
        f"medians, for each number of cores. Other processes took {others:.2f} cores in the median "
        f"measurement, {most:.2f} in the worst. CPU time and "
        "memory (proportional set size) are those of all processes of an engine; the first batch "
        "counts from the start of its process.",
        _markdown_table(_engine_rows(record["summary"])),
        _markdown_table(_goal_rows(record["summary"])),
    )
    return "\n\n".join(paragraphs) + "\n"


def _set_line(about: dict[str, Any]) -> str:
    sizes = ", ".join(f"{part} {size} kB" for part, size in about["mean_kb"].items())
    return (
        f"{about['images']} JPEGs from {about['photographs']} photographs: mean {sizes}; plain "
        f"median {about['median_kb']} kB, p10/p90 {about['p10_kb']}/{about['p90_kb']} kB, "
        f"{about['mean_megapixels']} MP, {about['bits_per_pixel']} bit/pixel, quality "
        f"{about['mean_quality']}; {about['percent_500x375']} % 500x375, {about['percent_420']} % "
        f"4:2:0, {about['percent_progressive']} % progressive, {about['percent_grey']} % grey."
    )


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"


if __name__ == "__main__":
    main()
