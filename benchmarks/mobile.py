"""Latency on the runtimes of phones: v1 beside v2, and separable beside multi-head attention.

One image at one thread, in ONNX Runtime and in LiteRT with XNNPACK, on this machine's CPU. The
networks run by turns, so that whatever else the machine does disturbs all alike, and what counts is
the ratio of medians. Weights are random; values do not change the time.

    python benchmarks/mobile.py --out experiments/DATE-mobile/results.json
"""

import argparse
import functools
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import measure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402

from mobilevit_jax import report, steps  # noqa: E402
from mobilevit_jax.models import zoo  # noqa: E402
from mobilevit_jax.models.folding import fold_norms  # noqa: E402
from mobilevit_jax.tools import export, files  # noqa: E402

PACKAGES = ("jax", "onnxruntime", "ai-edge-litert")


class Pair(NamedTuple):
    """Two networks, of the zoo with another attention or not, and what their ratio tells."""

    slow: tuple[str, str]
    fast: tuple[str, str]
    what: str


# Top-1 on ImageNet as published: 69.0 and 70.2, 74.8 and 75.6, 78.4 and 78.1.
PAIRS = (
    Pair(("mobilevit_xxs", ""), ("mobilevitv2_050", ""), "v1-XXS / v2-0.5"),
    Pair(("mobilevit_xs", ""), ("mobilevitv2_075", ""), "v1-XS / v2-0.75"),
    Pair(("mobilevit_s", ""), ("mobilevitv2_100", ""), "v1-S / v2-1.0"),
    Pair(("mobilevitv2_100", "multihead"), ("mobilevitv2_100", ""), "v2-1.0: multi-head / own"),
    Pair(("mobilevit_s", ""), ("mobilevit_s", "separable"), "v1-S: own / separable"),
)


def write(name: str, attention: str, format: str, size: int, directory: Path) -> Path:
    """A network of the zoo as a file."""
    entry = zoo.ZOO[name]
    fields = {**entry.fields, **({"attention": attention} if attention else {})}
    model = zoo.create(entry.family, num_classes=entry.num_classes, **fields)
    init = functools.partial(steps.init_variables, model, 0, (size, size))
    variables = fold_norms(jax.device_get(steps.run_once(init)))
    spec = export.formats.published_spec(entry.family, (size, size))
    network = export.Network(
        export.inference(model, variables, spec, raw_input=False),
        size=(size, size),
        dtype=np.dtype(np.float32),
        opset=export.onnx_graph.OPSET,
        quantize="",
        calibration=[],
    )
    path = directory / f"{name}-{attention}-{export.FORMATS[format].file}"
    export.FORMATS[format].write(network, path)
    return path


def by_network(format: str, *, size: int, repeats: int, directory: Path) -> dict[str, list[float]]:
    """Seconds of every run, by network."""
    networks = dict.fromkeys(each for pair in PAIRS for each in (pair.slow, pair.fast))
    image = np.random.default_rng(0).random((1, size, size, 3), np.float32)
    runs = {}
    for name, attention in networks:
        path = write(name, attention, format, size, directory)
        opened = export.FORMATS[format].open
        assert opened is not None
        call = functools.partial(opened(path), image)
        runs[f"{name} {attention}".strip()] = functools.partial(measure.timed, call)
    measure.by_turns(runs, rounds=2)
    return measure.by_turns(runs, rounds=repeats)


def main() -> None:
    """Measures in every runtime that is installed, and prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--formats", nargs="+", default=["onnx", "tflite"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    console, results = Console(), {}
    for format in args.formats:
        try:
            files.check_installed(export.FORMATS[format].modules, extra=format)
        except export.build.ConfigError as error:
            console.print(f"{format} is left out: {error}", markup=False)
            continue
        with tempfile.TemporaryDirectory() as directory:
            seconds = by_network(
                format, size=args.size, repeats=args.repeats, directory=Path(directory)
            )
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        ratios = {
            pair.what: medians[" ".join(pair.slow).strip()] / medians[" ".join(pair.fast).strip()]
            for pair in PAIRS
        }
        results[format] = {"median_ms": {k: 1e3 * v for k, v in medians.items()}, "ratios": ratios}
        console.print(format)
        report.print_table(
            ["network", "ms"], [[k, f"{1e3 * v:.1f}"] for k, v in medians.items()], console
        )
        report.print_table(["ratio", ""], [[k, f"{v:.2f}"] for k, v in ratios.items()], console)
    if args.out is not None:
        record = {"size": args.size, "repeats": args.repeats, "results": results}
        measure.write(args.out, {**measure.where(PACKAGES), **record})


if __name__ == "__main__":
    main()
