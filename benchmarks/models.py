"""The project beside timm, Hugging Face and ONNX Runtime: inference, and the whole train step.

Every system is a process of its own with the same weights, images, cores and dtype. All of them are
built first and must compute the same: the probabilities of the classes, or the losses of the first
steps. Then they run by turns, one at a time, and the ratio of a peer is how much longer it takes
than the project, by the medians of the rounds. A train step is forward, loss, backward, AdamW and
the average of weights and statistics; the project's also scales the uint8 images, which its peers
get as floats, and gives the gradient's norm. Where torch.compile has never seen a network, building
takes minutes; its cache makes a second run short, so run twice where the machine is shared.

    python benchmarks/models.py --models=mobilevitv2_100,mobilevit_s --batch=1,16 \\
        --mode=inference,train --json=experiments/DATE-models/results.json

On an NVIDIA GPU (written for it, and not yet run on one), with CUDA builds of jax and PyTorch:

    python benchmarks/models.py --models=mobilevitv2_100,mobilevit_s --batch=256,1024 \\
        --mode=inference,train --device=cuda --dtype=bfloat16 --json=FILE
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
from models_peers import CLASSES, INFERENCE, SYSTEMS, TRAIN, Job

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of this process, which measures nothing

import numpy as np  # noqa: E402
import safetensors.numpy  # noqa: E402
from rich.console import Console  # noqa: E402

from mobilevit_jax import build, native, report, tree  # noqa: E402
from mobilevit_jax.models import zoo  # noqa: E402
from mobilevit_jax.tools import convert, names, pretrained  # noqa: E402
from tests.weights import random_variables  # noqa: E402

PACKAGES = (
    "jax", "jaxlib", "flax", "torch", "timm", "transformers", "onnxruntime", "triton", "numpy",
)  # fmt: skip
# Largest difference to the project's, of log-probabilities as a share of their range in an image,
# or of the losses; the latter of several steps, where rounding grows.
TOLERANCES = {
    ("float32", INFERENCE): 1e-3,
    ("float32", TRAIN): 1e-2,
    ("bfloat16", INFERENCE): 5e-2,
    ("bfloat16", TRAIN): 5e-2,
}


class FailedError(Exception):
    """A system could not be built, or gave up."""


class Process:
    """A system in a process of its own, which does nothing until it is its turn."""

    def __init__(self, job: Job, *, huge_pages: bool) -> None:
        environment = os.environ | {
            "JAX_PLATFORMS": job.device,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # others want of the GPU's memory too
            "GLIBC_TUNABLES": native.HUGE_PAGES if huge_pages else "",
            "HF_HUB_OFFLINE": "1",
        }
        if huge_pages and job.system == "ours":
            environment |= native.environment()  # as launch.py does
        self._errors = Path(job.directory) / f"{job.system}.log"
        command = [sys.executable, str(measure.HERE / "models_peers.py"), json.dumps(job._asdict())]
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            self.ready = self._answer()
        except BaseException:
            self.close()
            raise

    def turn(self, seconds: float) -> float:
        """Runs for so long, once at least; the median time of a call."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer then says why
            self._process.stdin.write(f"{seconds}\n")
            self._process.stdin.flush()
        return float(np.median(self._answer()))

    def memory_mb(self) -> float:
        """The most memory of the host that the process ever had."""
        status = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        said = self._errors.read_text(errors="replace").strip().splitlines()
        raise FailedError(f"status {status}: {said[-1] if said else 'it says nothing'}")


def prepare(network: str, batch_size: int, size: tuple[int, int], directory: Path) -> dict:
    """Writes one batch, and random weights for every library.

    Returns:
        The channel order that the weights want, by library.
    """
    rng, entry = np.random.default_rng(0), zoo.ZOO[network]
    np.save(directory / "image.npy", rng.integers(0, 256, (batch_size, *size, 3), np.uint8))
    np.save(directory / "label.npy", rng.integers(0, CLASSES, batch_size, np.int32))
    native = directory / "native"
    convert.convert(network, native, format="native")
    # As they are initialised, the networks hardly tell images apart, and agree on nothing.
    model = zoo.create(entry.family, num_classes=entry.num_classes, **entry.fields)
    arrays = tree.flatten(random_variables(model, seed=0, size=size))
    safetensors.numpy.save_file(arrays, native / "model.safetensors")
    layouts = list(names.LAYOUTS[entry.family])
    for layout in layouts:
        convert.convert(native, directory / layout, format=layout)
    orders = {
        layout: pretrained.describe(str(directory / layout))[2].channel_order
        for layout in ("native", *layouts)
    }
    # timm has no converter to its MobileNets: it is given cvnets' weights.
    return {"timm": orders["cvnets"], **orders}


def difference(directory: Path, system: str, mode: str) -> float:
    """Of what a system computed and what the project did; see TOLERANCES."""
    mine, theirs = (np.load(directory / f"{name}.npy") for name in ("ours", system))
    if mode == TRAIN:
        return float(np.max(np.abs(mine - theirs) / np.abs(mine)))
    # The smallest are lost to float32.
    mine, theirs = (np.log(np.maximum(each, 1e-30))[0] for each in (mine, theirs))
    return float(np.max(np.abs(mine - theirs).max(-1) / np.ptp(mine, axis=-1)))


def compare(
    network: str, batch_size: int, mode: str, args: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """All systems on one network, batch size and mode: a row each, by system."""
    entry = zoo.ZOO[network]
    size = (args.size, args.size) if args.size else entry.size
    rows: dict[str, dict[str, Any]] = {}
    processes: dict[str, Process] = {}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        orders = prepare(network, batch_size, size, directory)
        try:
            for name in args.systems:
                system = SYSTEMS[name]
                if mode not in system.modes or not {*system.layouts} & {"native", *orders}:
                    continue
                missing = [each for each in system.needs if importlib.util.find_spec(each) is None]
                if missing:
                    console.print(f"{name} is left out: {', '.join(missing)} not installed")
                    continue
                job = Job(
                    system=name,
                    network=network,
                    mode=mode,
                    size=size,
                    dtype=args.dtype,
                    device=args.device,
                    cores=args.cores,
                    directory=temporary,
                    orders=orders,
                )
                huge = args.huge_pages == "both" or (args.huge_pages, name) == ("ours", "ours")
                try:
                    process = Process(job, huge_pages=huge)
                except FailedError as error:
                    console.print(f"{name} failed and is left out: {error}", markup=False)
                    if name == "ours":
                        raise
                    continue
                processes[name] = process
                apart = difference(directory, name, mode)
                rows[name] = {
                    "label": system.label,
                    "huge_pages": huge,
                    "difference": apart,
                    **process.ready,
                }
                tolerance = TOLERANCES[args.dtype, mode]
                if not apart <= tolerance:
                    raise SystemExit(
                        f"models.py: {network}, {mode}: {name} differs by {apart:.2g} from ours, "
                        f"allowed is {tolerance:g}: not the same network"
                    )
                seconds = process.ready["build_s"] + process.ready["first_call_s"]
                console.print(f"{name} built in {seconds:.0f} s, differs by {apart:.1e}")
            failed: dict[str, str] = {}

            def turn(name: str) -> float:
                try:
                    return math.nan if name in failed else processes[name].turn(args.turn)
                except FailedError as error:
                    failed[name] = str(error)
                    return math.nan

            runs = {name: functools.partial(turn, name) for name in processes}
            times = measure.by_turns(runs, rounds=args.rounds, seconds=args.seconds)
            for name, error in failed.items():
                console.print(f"{name} failed and is left out: {error}", markup=False)
                del rows[name]
            if "ours" in failed:
                raise FailedError(failed["ours"])
            for name in rows:
                rows[name]["memory_mb"] = round(processes[name].memory_mb())
        finally:
            for process in processes.values():
                process.close()
    for name, row in rows.items():
        row["seconds"] = measure.spread(times[name])
        row["images_per_s"] = batch_size / row["seconds"]["median"]
        row["ratio"] = row["seconds"]["median"] / rows["ours"]["seconds"]["median"]
        row["rounds"] = times[name]
    return {
        "network": network,
        "mode": mode,
        "batch_size": batch_size,
        "size": size,
        "macs": entry.macs,
        "load": os.getloadavg()[0],
        "systems": rows,
    }


def table(case: dict[str, Any], console: Console) -> None:
    """Prints a row a system, the fastest first."""
    height, width = case["size"]
    console.print(
        f"\n{case['network']}, {case['mode']}, batch {case['batch_size']}, {height}x{width}",
        highlight=False,
    )
    rows = sorted(case["systems"].values(), key=lambda row: row["ratio"])
    report.print_table(
        ["system", "ms", "quartiles", "images/s", "ratio", "first call s", "memory MB"],
        [
            [
                row["label"],
                f"{1e3 * row['seconds']['median']:,.1f}",
                f"{1e3 * row['seconds']['low']:,.1f}-{1e3 * row['seconds']['high']:,.1f}",
                f"{row['images_per_s']:,.1f}",
                f"{row['ratio']:.2f}",
                f"{row['first_call_s']:.1f}",
                f"{row['memory_mb']:,}",
            ]
            for row in rows
        ],
        console,
    )


def _parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n    ")[0],
        epilog="systems:\n" + "\n".join(f"  {n:20} {s.label}" for n, s in SYSTEMS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cores = len(os.sched_getaffinity(0))
    add = parser.add_argument
    add("--models", default="mobilevitv2_100", metavar="NAME,…", help="of the zoo, and of timm")
    add("--batch", default="16", metavar="N,…", help="images at a time")
    add("--mode", default=INFERENCE, metavar=f"{INFERENCE},{TRAIN}")
    add("--size", type=int, default=0, help="of the images; 0: the network's own")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--cores", type=int, default=cores, help="of the processor, for every system")
    add("--systems", default=",".join(SYSTEMS), metavar="NAME,…", help="ours and some of its peers")
    add("--rounds", type=int, default=7, help="turns of every system, at least")
    add("--seconds", type=float, default=0.0, help="of all rounds together, at least")
    add("--turn", type=float, default=0.3, help="seconds of a turn, which is one call at least")
    add(
        "--huge-pages",
        default="both",
        choices=("both", "ours", "none"),
        help="who has the allocator's huge pages, which launch.py gives itself",
    )
    add("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    args.models, args.mode = args.models.split(","), args.mode.split(",")
    args.systems = list(dict.fromkeys(["ours", *args.systems.split(",")]))
    for option, allowed in (
        ("models", zoo.ZOO),
        ("mode", (INFERENCE, TRAIN)),
        ("systems", SYSTEMS),
    ):
        if wrong := [name for name in getattr(args, option) if name not in allowed]:
            parser.error(f"--{option}: there is no {wrong[0]}; use {', '.join(allowed)}")
    try:
        args.batch = [int(number) for number in args.batch.split(",")]
    except ValueError:
        parser.error(f"--batch is {args.batch!r}; give numbers, such as 1,16")
    if min(*args.batch, args.rounds) < 1 or not 1 <= args.cores <= cores:
        parser.error(f"--batch and --rounds are at least 1, --cores is 1 to {cores}")
    return args


def main() -> None:
    """Measures every network, mode and batch size, prints the tables and writes them."""
    args = _parse()
    console = Console(width=None if sys.stdout.isatty() else 120)
    cases = []
    for network, mode, batch_size in itertools.product(args.models, args.mode, args.batch):
        try:
            cases.append(compare(network, batch_size, mode, args, console))
        except (FailedError, build.ConfigError) as error:
            sys.exit(f"models.py: {network}: {error}")
        table(cases[-1], console)
        if args.json is not None:  # after each, so that what was measured is not lost
            settings = {
                "dtype": args.dtype,
                "device": args.device,
                "cores": args.cores,
                "huge_pages": args.huge_pages,
                "turn_s": args.turn,
            }
            record = {**measure.where(PACKAGES), "settings": settings, "cases": cases}
            measure.write(args.json, record)


if __name__ == "__main__":
    main()
