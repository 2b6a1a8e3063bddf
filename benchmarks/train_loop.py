"""What the training loop itself costs: Python between two steps, checkpoints, and goodput, as JSON.

The real loop trains a tiny network on images in memory, so that the device has little to do and
what is left is the loop's own. Host time is what the loop's thread computes between two dispatches;
the host runs a step ahead, so it delays a device only where it is longer than a step.

    python benchmarks/train_loop.py --steps 300 --out experiments/DATE-train-loop/results.json
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402

from configs import quickstart  # noqa: E402
from mobilevit_jax import checkpoint, report, train  # noqa: E402

WARM = 20  # steps before those that count
STEP_MS = 100  # of the GPU step that the share is of


class Step(NamedTuple):
    """CPU seconds of the loop's thread: behind a dispatch until the next, and in the dispatch."""

    between: float
    dispatch: float


class Spent:
    """What every step took, and every save (seconds by the wall clock, by the step's index)."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.saves: dict[int, float] = {}
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


def run(steps: int, workdir: Path) -> dict[str, Any]:
    """Trains for so many steps, with a save every fifth of them; what the loop cost."""
    config = quickstart.get_config()
    config.batch_size = 16
    config.model.width = 0.25
    config.duration = f"{WARM + steps} steps"
    config.schedule.warmup = f"{WARM} steps"
    config.log.every = "50 steps"
    config.checkpoint.every = f"{steps // 5} steps"
    config.eval.every = config.duration
    spent, compile_all = Spent(), train._compile

    def compile_with_clocks(*args: Any) -> Any:
        compiled, *rest = compile_all(*args)
        return {shape: spent.step(program) for shape, program in compiled.items()}, *rest

    save = spent.save(checkpoint.Checkpoints.save)
    with (
        mock.patch.object(train, "_compile", compile_with_clocks),
        mock.patch.object(checkpoint.Checkpoints, "save", save),
    ):
        train.train(config, workdir, command=" ".join(sys.argv), load=lambda reference: {})
    counted = [
        (1000 * step.between, 1000 * step.dispatch)
        for index, step in enumerate(spent.steps)
        if index >= WARM and index not in spent.saves
    ]
    between, dispatch = zip(*counted, strict=True)
    rows = report.read_metrics(workdir / "metrics.jsonl")
    return {
        "steps": len(counted),
        "host_ms_median": round(statistics.median(between), 3),
        "host_ms_mean": round(statistics.mean(between), 3),  # with the logs
        "dispatch_ms_median": round(statistics.median(dispatch), 3),
        f"host_share_of_a_{STEP_MS}_ms_step": round(
            (statistics.mean(between) + statistics.median(dispatch)) / STEP_MS, 5
        ),
        "save_stall_s": [round(seconds, 4) for seconds in spent.saves.values()],
        "goodput": round([row["time/goodput"] for row in rows if "time/goodput" in row][-1], 4),
    }


def main() -> None:
    """Runs the measurement and writes it down with where it was made."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = run(args.steps, Path(directory) / "run")
    result |= {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "platform": platform.platform(),
        "jax": jax.__version__,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
