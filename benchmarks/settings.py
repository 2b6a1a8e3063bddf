"""What the project sets for itself on a CPU, each against doing without: by turns, in one process.

Inference and the train step: with the kernels for CPUs (models/kernels.py) or with XLA's layers,
and of these matrix products by XLA or by YNNPACK, and vectors of 512 or 256 bits
(devices.compiler_options). Inference, too: a batch in parts as the project chooses
(devices.images_at_a_time), or otherwise. The train step, too: reductions by YNNPACK or XLA. All
compute the same up to rounding, which is checked first.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \\
        python benchmarks/settings.py --models=mobilevitv2_100,mobilevit_s --json=FILE
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import measure
import numpy as np
import ours
from rich.console import Console

from mobilevit_jax import devices, report
from mobilevit_jax.models import kernels, zoo
from mobilevit_jax.tools import predict, pretrained

KINDS = ("INDIVIDUAL_CONVOLUTION", "INDIVIDUAL_DOT", "REDUCE")
PRODUCTS = {devices.YNNPACK: ",".join(f"LIBRARY_FUSION_TYPE_{kind}" for kind in KINDS)}


class Setting(NamedTuple):
    """What is in place of the project's own choice."""

    kernels: bool = True
    part: int = 0  # of a batch, which is worked on at a time; 0: as the project chooses
    options: Mapping[str, Any] = {}  # of the compiler


SETTINGS: dict[str, dict[str, Setting]] = {
    "inference": {
        "as it is": Setting(),
        "two images at a time": Setting(part=2),
        "XLA's layers": Setting(kernels=False),
        "… a batch at once": Setting(kernels=False, part=2**30),
        "… YNNPACK's products": Setting(kernels=False, options=PRODUCTS),
        "… vectors of 256 bits": Setting(kernels=False, options={devices.VECTORS: 256}),
    },
    "train": {
        "as it is": Setting(),
        "XLA's layers": Setting(kernels=False),
        "… YNNPACK's products": Setting(kernels=False, options=PRODUCTS),
        "… vectors of 256 bits": Setting(kernels=False, options={devices.VECTORS: 256}),
        "… no YNNPACK": Setting(kernels=False, options={devices.YNNPACK: ""}),
    },
}


def call(network: str, batch_size: int, mode: str, setting: str) -> Callable[[], Any]:
    """The program of one setting, compiled, as a call that waits for what it gives."""
    chosen = SETTINGS[mode][setting]
    options = (devices.compiler_options() or {}) | chosen.options
    size = zoo.ZOO[network].size
    with (
        kernels.use(chosen.kernels),
        mock.patch.object(devices, "compiler_options", lambda: options),
        mock.patch.object(
            devices,
            "images_at_a_time",
            (lambda *_, **__: chosen.part) if chosen.part else devices.images_at_a_time,
        ),
    ):
        if mode == "train":
            built = ours.built(ours.config(network, size=size, batch_size=batch_size))
            program = ours.lowered(built).compile()
            return ours.stepping(built, program, built.state(), ours.noise(batch_size, size))
        model = pretrained.load(network)
        images = ours.noise(batch_size, model.input_spec.size)["image"]
        program = predict.program(model).lower(model.variables, images).compile()
    return lambda: jax.block_until_ready(program(model.variables, images)["probability"])


def main() -> None:
    """Measures every network, mode and batch size, prints a table of ratios and writes them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="mobilevitv2_100", metavar="NAME,…", help="of the zoo")
    parser.add_argument("--batch", default="1,16", metavar="N,…", help="images at a time")
    parser.add_argument("--mode", default="inference,train", choices=(*SETTINGS, "inference,train"))
    parser.add_argument("--rounds", type=int, default=9, help="turns of every setting")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if jax.default_backend() != "cpu":
        parser.error("these are settings for CPUs")
    cases, rows = [], []
    networks, modes = args.models.split(","), args.mode.split(",")
    if wrong := [name for name in networks if name not in zoo.ZOO]:
        parser.error(f"--models: there is no {wrong[0]}; use {', '.join(zoo.ZOO)}")
    sizes = [int(number) if number.isdecimal() else 0 for number in args.batch.split(",")]
    if min(*sizes, args.rounds) < 1:
        parser.error(f"--batch is {args.batch}, --rounds {args.rounds}; give numbers from 1 on")
    for network, mode, batch_size in itertools.product(networks, modes, sizes):
        if mode == "train" and batch_size == 1:
            continue
        calls = {name: call(network, batch_size, mode, name) for name in SETTINGS[mode]}
        first = {name: np.asarray(run()) for name, run in calls.items()}
        for result in first.values():
            np.testing.assert_allclose(result, first["as it is"], rtol=1e-4, atol=1e-6)
        taken = measure.by_turns(
            {name: functools.partial(measure.timed, run) for name, run in calls.items()},
            rounds=args.rounds,
        )
        spreads = {name: measure.spread(seconds) for name, seconds in taken.items()}
        cases.append({"model": network, "mode": mode, "batch": batch_size, "seconds": spreads})
        base = spreads["as it is"]["median"]
        for name, each in spreads.items():
            low, median, high = (1e3 * each[key] for key in ("low", "median", "high"))
            told = (f"{median:,.0f} ({low:,.0f}-{high:,.0f})", f"{each['median'] / base:.2f}")
            rows.append([network, mode, str(batch_size), name, *told])
        if args.json is not None:  # after each, so that what was measured is not lost
            measure.write(args.json, {**measure.where(), "cases": cases})
    report.print_table(
        ["network", "", "images", "setting", "ms (quartiles)", "times as long"],
        rows,
        Console(width=None if sys.stdout.isatty() else 120),
    )


if __name__ == "__main__":
    main()
