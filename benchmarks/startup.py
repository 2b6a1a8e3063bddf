"""Time from the start of a process to its first training step, by stage, cold and cached.

Every start is a process of its own that does what `launch.py train` does before and in its first
step. The first of a pair finds the compilation cache empty, the second finds what the first left.

    python benchmarks/startup.py --models=mobilevitv2_100,mobilevit_s --json=FILE
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# What each stage is; compiling is loading where the cache has the program.
STAGES = {
    "interpreter": "until Python runs this file",
    "import": "jax and the package",
    "build": "from the config to ready objects",
    "init": "weights and the optimiser's state on the device, which compiles a program too",
    "trace": "the train step from Python to jaxpr",
    "lower": "from jaxpr to StableHLO",
    "compile": "from StableHLO to machine code, or from the cache",
    "step": "the first step",
}


def start(network: str, batch_size: int, dtype: str, began: float) -> dict[str, float]:
    """Seconds of every stage, in a process that has done nothing yet."""
    clock = [began, time.time()]

    def tick() -> None:
        clock.append(time.time())

    import jax
    import ours

    from mobilevit_jax import sharding, train
    from mobilevit_jax.models import zoo

    jax.devices()
    tick()
    size = zoo.ZOO[network].size
    built = ours.built(ours.config(network, size=size, batch_size=batch_size, dtype=dtype))
    tick()
    state = jax.block_until_ready(built.state())
    tick()
    run, abstract_state = built.run, built.abstract_state
    rates = jax.device_put(run.rates, sharding.replicated(run.mesh))
    batch = sharding.abstract_batch(run.mesh, batch_size=batch_size, size=size)
    traced = train.program(run, abstract_state).trace(abstract_state, batch, rates=rates)
    tick()
    lowered = traced.lower()
    tick()
    compiled = lowered.compile()
    tick()
    ours.stepping(built, compiled, state, ours.noise(batch_size, size))()
    tick()
    seconds = [after - before for before, after in itertools.pairwise(clock)]
    return dict(zip(STAGES, seconds, strict=True))


def begin(network: str, args: argparse.Namespace, cache: str) -> dict[str, float]:
    """Starts a process with a compilation cache, and gives what it measured."""
    environment = measure.environment() | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # as launch.py has it
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, __file__, f"--models={network}", f"--batch={args.batch}"]
    command += [f"--dtype={args.dtype}", f"--began={time.time()!r}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"startup.py: {network}: {(done.stderr.splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Starts every network a number of times, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="mobilevitv2_100", metavar="NAME,…", help="of the zoo")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3, help="pairs of starts")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)  # of one start, by itself
    args = parser.parse_args()
    if args.began is not None:
        print(json.dumps(start(args.models, args.batch, args.dtype, args.began)))
        return
    from mobilevit_jax import report

    networks = args.models.split(",")
    starts: dict[str, dict[str, list[dict[str, float]]]] = {
        network: {"cold": [], "cached": []} for network in networks
    }
    for _ in range(args.rounds):
        for network in networks:
            with tempfile.TemporaryDirectory() as cache:
                for kind in ("cold", "cached"):
                    starts[network][kind].append(begin(network, args, cache))
    rows: list[dict[str, Any]] = []
    for network in networks:
        for kind, runs in starts[network].items():
            stages = {name: measure.spread([run[name] for run in runs]) for name in STAGES}
            total = measure.spread([sum(run.values()) for run in runs])
            rows.append({"network": network, "cache": kind, **stages, "total": total})
    columns = [*STAGES, "total"]
    cells = [
        [f"{row['network']}, {row['cache']}", *(f"{row[name]['median']:.1f}" for name in columns)]
        for row in rows
    ]
    report.print_table(["start, s", *columns], cells, Console())
    if args.json:
        given = {"batch_size": args.batch, "dtype": args.dtype, "rounds": args.rounds}
        measure.write(args.json, {**measure.where(), **given, "stages": STAGES, "starts": rows})


if __name__ == "__main__":
    main()
