"""What the benchmarks share: runs by turns, their spread, and where a measurement was made."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from mobilevit_jax import native  # noqa: E402

K = TypeVar("K")


def by_turns(
    runs: Mapping[K, Callable[[], float]], *, rounds: int, seconds: float = 0.0
) -> dict[K, list[float]]:
    """What every run gave, round after round; what disturbs the machine then disturbs all alike.

    Args:
        runs: each takes its turn, every round beginning with another, and gives its seconds.
        rounds: at least so many.
        seconds: and until so many have passed.
    """
    names = list(runs)
    taken: dict[K, list[float]] = {name: [] for name in names}
    until, done = time.perf_counter() + seconds, 0
    while done < rounds or time.perf_counter() < until:
        first = done % max(len(names), 1)
        for name in names[first:] + names[:first]:
            taken[name].append(runs[name]())
        done += 1
    return taken


def environment() -> dict[str, str]:
    """That of a process as launch.py begins one; what is there already is left alone."""
    return dict(os.environ) | ({} if "GLIBC_TUNABLES" in os.environ else native.environment())


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call by the wall clock; what it gives has to be there when it returns."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of what was measured in several rounds."""
    quarters = statistics.quantiles(values, n=4, method="inclusive") if values[1:] else values * 3
    return {"median": statistics.median(values), "low": quarters[0], "high": quarters[2]}


def where(packages: Iterable[str] = ("jax", "jaxlib")) -> dict[str, Any]:
    """Date, command, commit, machine, load and versions, for the record."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "machine": machine(),
        "load": os.getloadavg()[0],
        "versions": versions(packages),
    }


def machine() -> dict[str, Any]:
    """The processor and how many of its cores are lent to this process."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Of the code that runs, with a + where files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True)
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")


def write(path: Path, record: Mapping[str, Any]) -> None:
    """As JSON, in a directory that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
