"""The train step against devices, batch and resolution; memory against batch and remat.

Devices are made out of one CPU, which has no more cores for it: what two or four of them lose
against one is the overhead of dividing and adding up. The batch is divided among them, and all else
is measured on one. Memory is what the compiler plans for training (programs.predicted_peak), and
beside it what the network keeps for its gradient, which is the same on every platform: XLA for CPUs
ignores remat. Traffic is counted, not measured: see `traffic`.

    python benchmarks/scaling.py --model=mobilevitv2_100 --out=experiments/DATE-scaling

On a GPU, --devices=1 leaves the platform alone.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from matplotlib.figure import Figure  # noqa: E402
from rich.console import Console  # noqa: E402

REMAT = {
    "none": (),
    "stem, layer_1, layer_2": ("stem", "layer_1", "layer_2"),
    "all": ("stem", "layer_1", "layer_2", "layer_3", "layer_4", "layer_5"),
}
MIB = 2**20
PARTS = ("memory", "devices", "batch", "resolution")


# --- in the processes -----------------------------------------------------------------------------


def times(network: str, points: Sequence[tuple[int, int]], args: argparse.Namespace) -> list[dict]:
    """The train step at every (batch size, side), by turns."""
    import ours

    from mobilevit_jax import programs

    runs: list[Callable[[], Any]] = []
    rows: list[dict[str, Any]] = []
    for batch_size, side in points:
        size = side, side
        built = ours.built(ours.config(network, size=size, batch_size=batch_size, dtype=args.dtype))
        program = ours.lowered(built).compile()
        cost = programs.cost(program)
        runs.append(ours.stepping(built, program, built.state(), ours.noise(batch_size, size)))
        runs[-1]()
        counted = traffic(network, side, itemsize=2 if args.dtype == "bfloat16" else 4)
        rows.append(
            {
                "batch_size": batch_size,
                "side": side,
                "gflop": cost.flops / 1e9,
                "gbytes_by_compiler": program.cost_analysis().get("bytes accessed", 0.0) / 1e9,
                **counted,
            }
        )
    turns = {at: functools.partial(measure.timed, run) for at, run in enumerate(runs)}
    for at, seconds in measure.by_turns(turns, rounds=args.rounds).items():
        spread = measure.spread(seconds)
        rows[at] |= {
            "seconds": spread,
            "images_per_s": rows[at]["batch_size"] / spread["median"],
        }
    return rows


def traffic(network: str, side: int, *, itemsize: int) -> dict[str, float]:
    """Least memory traffic and arithmetic of an image, in GB and GFLOP, counted from shapes.

    Norms and activation functions are taken to work where a convolution writes, so an activation is
    the output of a convolution, a linear layer or an attention. Inference writes and reads each
    once. A train step does too, reads each again for the gradients, and writes and reads as much in
    gradients: five passes. Weights are left out: a batch shares them.
    """
    from mobilevit_jax.models import zoo

    entry = zoo.ZOO[network]
    model = zoo.create(entry.family, num_classes=entry.num_classes, **entry.fields)
    total = zoo.summary(model, size=(side, side))[-1]
    activations = total.activation_bytes * itemsize / 4 / 1e9
    return {
        "inference_gb": 2 * activations,
        "train_gb": 5 * activations,
        "inference_gflop": 2 * total.macs / 1e9,
        "train_gflop": 6 * total.macs / 1e9,
    }


def memory(network: str, side: int, args: argparse.Namespace) -> list[dict]:
    """Bytes of training at every batch size, and of what is kept for the gradient, by remat."""
    import jax
    import ours

    from mobilevit_jax import evaluate, programs, sharding

    rows = []
    for batch_size in args.batch:
        for name, stages in REMAT.items():
            config = ours.config(
                network, size=(side, side), batch_size=batch_size, dtype=args.dtype, remat=stages
            )
            built = ours.built(config)
            variables = built.abstract_state.variables("raw")
            run = built.run
            evaluator = evaluate.make(
                run.network, variables, run.val_source, mesh=run.mesh, **run.evaluation
            )
            peak = programs.predicted_peak(
                [programs.cost(ours.lowered(built).compile())],
                programs.cost(evaluator.program),
                state_bytes=programs.device_bytes(built.abstract_state),
                variables_bytes=programs.device_bytes(variables),
            )

            def pullback(params: Any, rest: Any, batch: Any, training: Any = run.training) -> Any:
                def loss(params: Any) -> Any:
                    outputs, _ = training.model.apply(
                        {"params": params, **rest},
                        batch["image"].astype("float32"),
                        train=True,
                        mutable=["batch_stats"],
                        rngs={"dropout": jax.random.key(0), "augment": jax.random.key(0)},
                    )
                    return training.task.loss(outputs, batch)

                return jax.vjp(loss, params)[1]

            params, rest = built.abstract_state.params, built.abstract_state.model_state
            batch = sharding.abstract_batch(run.mesh, batch_size=batch_size, size=(side, side))
            kept = jax.eval_shape(pullback, params, rest, batch)
            rows.append(
                {
                    "batch_size": batch_size,
                    "side": side,
                    "remat": name,
                    "predicted_mib": peak / MIB,
                    "kept_mib": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)) / MIB,
                }
            )
    return rows


# --- in the parent --------------------------------------------------------------------------------


def child(part: str, devices: int, args: argparse.Namespace) -> list[dict]:
    """Runs a part of the measurement in a process that sees so many devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    if devices > 1:
        flags += f" --xla_force_host_platform_device_count={devices}"
    if part == "memory":
        # Plans are made before the code is; the code is not run.
        flags += " --xla_backend_optimization_level=0"
    environment = measure.environment() | {
        "XLA_FLAGS": flags,
    }
    command = [sys.executable, __file__, *sys.argv[1:], f"--part={part}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"scaling.py: {part}: {(done.stderr.splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def draw(path: Path, results: dict[str, Any], network: str) -> None:
    """A panel a question."""
    figure = Figure(figsize=(11, 8), dpi=80, layout="constrained")
    (devices, batch), (side, memory) = figure.subplots(2, 2)
    rows = results["devices"]
    devices.plot(
        [row["devices"] for row in rows], [row["images_per_s"] for row in rows], "o-", ms=4
    )
    title = f"one CPU as several devices, batch {rows[0]['batch_size']}, side {rows[0]['side']}"
    devices.set(title=title, xlabel="devices", ylabel="images/s", ylim=(0, None))
    for axes, key, label in ((batch, "batch_size", "batch size"), (side, "side", "image side")):
        rows = results["batch" if key == "batch_size" else "resolution"]
        axes.plot(
            [row[key] for row in rows],
            [1e3 * row["seconds"]["median"] / row["batch_size"] for row in rows],
            "o-",
            ms=4,
        )
        other = (
            ("side", rows[0]["side"]) if key == "batch_size" else ("batch", rows[0]["batch_size"])
        )
        axes.set(title=f"train step, {other[0]} {other[1]}", xlabel=label)
        axes.set(ylabel="ms an image", ylim=(0, None))
    for name in REMAT:
        mine = [row for row in results["memory"] if row["remat"] == name]
        xs = [row["batch_size"] for row in mine]
        (line,) = memory.plot(xs, [row["kept_mib"] for row in mine], "o-", ms=4)
        line.set_label(f"kept for the gradient, remat: {name}")
    mine = [row for row in results["memory"] if row["remat"] == "none"]
    xs = [row["batch_size"] for row in mine]
    memory.plot(xs, [row["predicted_mib"] for row in mine], "k--", label="whole step, as planned")
    memory.set(title="memory", xlabel="batch size", ylabel="MiB", ylim=(0, None))
    memory.legend()
    for axes in (devices, batch, side, memory):
        axes.grid(alpha=0.3)
    figure.suptitle(f"{network}, train step")
    figure.savefig(path)


def main() -> None:
    """Measures in child processes, prints the tables, writes scaling.json and scaling.png."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument

    def numbers(text: str) -> list[int]:
        return [int(each) for each in text.split(",")]

    add("--model", default="mobilevitv2_100", help="of the zoo")
    add("--devices", type=numbers, default=[1, 2, 4], metavar="N,…")
    add("--batch", type=numbers, default=[1, 2, 4, 8, 16, 32], metavar="N,…")
    add("--side", type=numbers, default=[128, 192, 256, 320], metavar="N,…", help="of the images")
    add("--fixed-batch", type=int, default=8, help="where not the batch is looked at")
    add("--fixed-side", type=int, default=256, help="where not the resolution is looked at")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--rounds", type=int, default=5)
    add("--out", type=Path, metavar="DIR")
    add("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    fixed = args.fixed_batch, args.fixed_side
    if args.part == "memory":
        print(json.dumps(memory(args.model, args.fixed_side, args)))
        return
    if args.part:
        points = {
            "devices": [fixed],
            "batch": [(batch, fixed[1]) for batch in args.batch],
            "resolution": [(fixed[0], side) for side in args.side],
        }[args.part]
        print(json.dumps(times(args.model, points, args)))
        return
    given = {"model": args.model, "dtype": args.dtype, "rounds": args.rounds}
    results: dict[str, Any] = {part: [] for part in PARTS}
    for part in PARTS:
        for devices in args.devices if part == "devices" else [1]:
            results[part] += [{"devices": devices, **row} for row in child(part, devices, args)]
            if args.out:  # after each, so that what was measured is not lost
                measure.write(args.out / "scaling.json", {**measure.where(), **given, **results})
    _print(results, Console())
    if args.out:
        draw(args.out / "scaling.png", results, args.model)


def _print(results: dict[str, Any], console: Console) -> None:
    from mobilevit_jax import report

    cells = [
        [
            part,
            f"{row['devices']}",
            f"{row['batch_size']}",
            f"{row['side']}",
            f"{1e3 * row['seconds']['median']:,.0f}",
            f"{row['images_per_s']:,.1f}",
            f"{row['gflop']:,.1f}",
            f"{row['train_gb'] * row['batch_size']:,.2f}",
            f"{row['train_gb'] * row['batch_size'] / row['seconds']['median']:,.1f}",
        ]
        for part in ("devices", "batch", "resolution")
        for row in results[part]
    ]
    header = ["against", "devices", "batch", "side", "ms", "images/s", "GFLOP", "least GB", "GB/s"]
    report.print_table(header, cells, console)
    cells = [
        [
            f"{row['batch_size']}",
            row["remat"],
            *(f"{row[k]:,.0f}" for k in ("kept_mib", "predicted_mib")),
        ]
        for row in results["memory"]
    ]
    report.print_table(["batch", "remat", "kept, MiB", "planned, MiB"], cells, console)


if __name__ == "__main__":
    main()
