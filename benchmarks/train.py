"""The whole training loop: input, steps, logs, checkpoints and evaluation; goodput and host time.

The real loop runs a config. Goodput is the share of the time that went into steps; beside it stands
what the rest went into. Host time is what the loop's thread computes between two dispatches; the
host runs a step ahead, so it delays a device only where it is longer than a step. Without --config
a tiny network trains on images in memory, so that the device has little to do and what is left is
the loop's own.

    python benchmarks/train.py --steps=300 --json=experiments/DATE-train/results.json
    python benchmarks/train.py --config=configs/folder.py --config.data.root=DIR \\
        --config.batch_size=64 --config.duration="4 epochs" --json=FILE
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import measure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402

import launch  # noqa: E402
from configs import quickstart  # noqa: E402
from mobilevit_jax import build, checkpoint, report, train  # noqa: E402

WARM = 20  # steps before those that count
STEP_MS = 100  # of the GPU step that the share is of


class Step(NamedTuple):
    """CPU seconds of the loop's thread: behind a dispatch until the next, and in the dispatch."""

    between: float
    dispatch: float


class Spent:
    """What every step took, every save (by the step's index), and all else that was no step."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.saves: dict[int, float] = {}
        self.others: dict[str, float] = {}  # as the report has them: wait, compile, evaluate, …
        self._dispatch, self._since = 0.0, None

    _since: float | None

    def step(self, program: Callable[..., Any]) -> Callable[..., Any]:
        """The program; between two of its calls lies a step of the loop."""

        def call(*args: Any) -> Any:
            # Not the wall clock: what the loop waits for, the device above all, is no host time.
            began = time.thread_time()
            if self._since is not None:
                self.steps.append(Step(began - self._since, self._dispatch))
            result = program(*args)
            self._since = time.thread_time()
            self._dispatch = self._since - began
            return result

        return call

    def save(self, function: Callable[..., None]) -> Callable[..., None]:
        """The function that saves."""

        def call(*args: Any) -> None:
            began = time.perf_counter()
            function(*args)
            self.saves[len(self.steps)] = time.perf_counter() - began

        return call


def tiny(steps: int) -> build.Config:
    """A network that takes little of a device, with a save every fifth of the steps."""
    config = quickstart.get_config()
    config.batch_size = 16
    config.model.width = 0.25
    config.duration = f"{WARM + steps} steps"
    config.schedule.warmup = f"{WARM} steps"
    config.log.every = "50 steps"
    config.checkpoint.every = f"{steps // 5} steps"
    config.eval.every = config.duration
    return config


def run(config: build.Config, workdir: Path) -> dict[str, Any]:
    """Trains; what the steps and the loop cost."""
    spent, compile_all = Spent(), train._compile

    def compile_with_clocks(*args: Any) -> Any:
        compiled, *rest = compile_all(*args)
        return {shape: spent.step(program) for shape, program in compiled.items()}, *rest

    save = spent.save(checkpoint.Checkpoints.save)

    spend = report.Report._spend

    def note_spent(reporter: report.Report, name: str, seconds: float) -> None:
        spend(reporter, name, seconds)
        spent.others = reporter._spent

    began = time.perf_counter()
    with (
        mock.patch.object(train, "_compile", compile_with_clocks),
        mock.patch.object(checkpoint.Checkpoints, "save", save),
        mock.patch.object(report.Report, "_spend", note_spent),
    ):
        train.train(config, workdir, command=" ".join(sys.argv), load=lambda reference: {})
    whole = time.perf_counter() - began
    rows = report.read_metrics(workdir / "metrics.jsonl")
    counted = [
        (1000 * step.between, 1000 * step.dispatch)
        for index, step in enumerate(spent.steps)
        if index >= WARM and index not in spent.saves
    ]
    if not counted:
        raise SystemExit(f"train.py: a run of {len(spent.steps) + 1} steps; give it {WARM + 2}")
    between, dispatch = zip(*counted, strict=True)
    host = statistics.mean(between) + statistics.median(dispatch)
    steady = [row for row in rows if "time/img_per_s" in row][1:]
    stepping = [row["time/img_per_s"] for row in steady] or [float("nan")]
    return {
        "steps": len(counted),
        "host_ms_median": round(statistics.median(between), 3),
        "host_ms_mean": round(statistics.mean(between), 3),  # with the logs
        "dispatch_ms_median": round(statistics.median(dispatch), 3),
        f"host_share_of_a_{STEP_MS}_ms_step": round(host / STEP_MS, 5),
        "save_stall_s": [round(seconds, 4) for seconds in spent.saves.values()],
        "images_per_s_in_steps": round(statistics.median(stepping), 1),
        "wait_share_in_steps": round(
            statistics.median([row["time/wait_share"] for row in steady] or [0.0]), 4
        ),
        "images_per_s_over_all": round(rows[-1]["images"] / whole, 1),
        "goodput": round([row["time/goodput"] for row in rows if "time/goodput" in row][-1], 4),
        "seconds": {
            "whole": round(whole, 2),
            **{name: round(seconds, 2) for name, seconds in spent.others.items()},
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the measurement and writes it down with where it was made."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="of the tiny network")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args, overrides = parser.parse_known_args(arguments)
    try:
        config = launch._load_config(overrides) if overrides else tiny(args.steps)
        with tempfile.TemporaryDirectory() as directory:
            result = run(config, Path(directory) / "run")
    except (build.ConfigError, launch.UsageError) as error:
        sys.exit(f"train.py: {error}")
    result["device"] = jax.devices()[0].device_kind
    for name, value in result.items():
        print(f"{name:34} {value}")
    if args.json:
        measure.write(args.json, {**measure.where(), "config": build.plain(config), **result})


if __name__ == "__main__":
    main()
