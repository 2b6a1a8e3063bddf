"""Serving over loopback beside FastAPI + transformers: images/s, latencies, memory.

`launch.py serve` and the peer (serve_peer.py: one picture at a time, and batches) answer with the
same weights, each a real process; the bare model (the server's own compiled programs, fed with
pictures already decoded) runs in one more. They take turns, round after round; who is not measured
is idle. The load generator is this process: raw HTTP/1.1 over connections that stay open, with JPEG
photographs as bodies. Its CPU time comes out of the same cores as the server's.

    python benchmarks/serve.py --baseline --peer-python=build/peer/bin/python --json=FILE
    python benchmarks/serve.py --requests=100000 --json=FILE            # memory over a long run
"""

import argparse
import asyncio
import concurrent.futures
import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import random
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import uvloop  # noqa: E402
from rich.console import Console  # noqa: E402

from mobilevit_jax import native, report  # noqa: E402

SIZES = (1, 2, 4, 8, 16)  # batches of the bare model: those that the server compiles
AT_ONCE = 2  # batches at a time, as in the server
MAX_DELAY_MS = 5.0  # the server's own default
START_SECONDS = 180  # that a server may take to load
WARM = 64  # requests before the first round
LOADS = ("many", "half", "even", "one")  # clients that ask again, arrivals (two kinds), one client
SAMPLES = 200  # of the memory, over a long run
PACKAGES = ("jax", "jaxlib", "starlette", "uvicorn", "httptools", "uvloop", "simplejpeg")
PEER_PACKAGES = ("torch", "transformers", "fastapi", "uvicorn", "uvloop", "httptools", "pillow")


class Goal(NamedTuple):
    """A number to reach by our server."""

    text: str
    value: str
    at_least: bool
    bound: float


GOALS = (
    Goal("images/s, 32 clients / bare model", "share_of_bare", True, 0.8),
    Goal("p99 at half load, evenly / batch-1 latency", "even_p99_of_batch_1", False, 4.0),
    Goal("p99 at half load, Poisson / batch-1 latency", "half_p99_of_batch_1", False, 4.0),
    Goal("p50, one client / (batch-1 latency + max-delay)", "one_p50_of_allowed", False, 1.0),
)


# --- the load -------------------------------------------------------------------------------------


class Load:
    """Clients of one server, on this process's event loop."""

    def __init__(self, port: int, photographs: Sequence[bytes]) -> None:
        self._port = port
        self._requests = [
            b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
            b"Content-Length: %d\r\n\r\n" % len(photograph) + photograph
            for photograph in photographs
        ]
        self._turn = itertools.cycle(range(len(photographs)))
        self.seconds: list[float] = []
        self.failed = 0
        self.first: dict[int, str] = {}  # the most probable label of each photograph

    async def closed(self, clients: int, *, more: Callable[[], bool]) -> None:
        """Clients that ask again as soon as they are answered."""

        async def client() -> None:
            connection = await self._connect()
            while more():
                await self._ask(connection, time.perf_counter())
            connection[1].close()

        await asyncio.gather(*(client() for _ in range(clients)))

    async def arrivals(self, rate: float, seconds: float, *, seed: int | None = None) -> None:
        """Requests whether others are answered or not, at random moments (a Poisson process).

        Without a seed at equal distances, as wrk2 and vegeta send them.
        """
        draw, idle, tasks = random.Random(seed), [], []

        async def one(due: float) -> None:
            while idle and idle[-1][0].at_eof():  # the server closes what is not used for long
                idle.pop()[1].close()
            connection = idle.pop() if idle else await self._connect()
            await self._ask(connection, due)
            idle.append(connection)

        due = time.perf_counter()
        end = due + seconds
        while (due := due + (1 / rate if seed is None else draw.expovariate(rate))) < end:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(one(due)))
        await asyncio.gather(*tasks)
        for _, writer in idle:
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._port)

    async def _ask(
        self, connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], due: float
    ) -> None:
        reader, writer = connection
        which = next(self._turn)
        writer.write(self._requests[which])
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
        self.seconds.append(time.perf_counter() - due)
        if not head.startswith(b"http/1.1 200 "):
            self.failed += 1
        elif which not in self.first:
            self.first[which] = json.loads(body)[0]["label"]


def measure(
    server: "Server", load: Load, run: Callable[[Load], Coroutine[Any, Any, None]]
) -> dict[str, Any]:
    """What a load comes to; its latencies in seconds are left in it."""
    begin, cpu, busy = time.perf_counter(), server.cpu(), _busy()
    mine = time.process_time()
    _on_loop(run(load))
    wall = time.perf_counter() - begin
    cpu, mine = server.cpu() - cpu, time.process_time() - mine
    return {
        "requests": len(load.seconds),
        "failed": load.failed,
        "images_per_s": (len(load.seconds) - load.failed) / wall,
        "cpu_ms": 1e3 * cpu / len(load.seconds),
        "cores": cpu / wall,
        "generator_cores": mine / wall,
        "others_cores": max(0.0, (_busy() - busy - cpu - mine) / wall),
    }


def _on_loop(run: Coroutine[Any, Any, None]) -> None:
    """On uvloop: what the generator takes of the cores, a server cannot have."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run)


def _busy() -> float:
    """CPU seconds that the whole machine has spent so far."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq


# --- what is measured -----------------------------------------------------------------------------


class Server:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.port, self._process = port, psutil.Process(process.pid)

    def cpu(self) -> float:
        """CPU seconds so far."""
        times = self._process.cpu_times()
        return times.user + times.system

    def memory(self) -> int:
        """Resident bytes."""
        return self._process.memory_info().rss


@contextlib.contextmanager
def started(command: Sequence[str], photograph: bytes) -> Iterator[Server]:
    """A server that has answered once; it is told to end when the context does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([*command, f"--port={port}"], cwd=ROOT, stdout=said, stderr=said)
        try:
            deadline = time.monotonic() + START_SECONDS
            load = Load(port, [photograph])
            while True:
                try:
                    _on_loop(load.closed(1, more=lambda: not load.seconds))
                    break
                except OSError as error:  # it does not listen yet
                    if process.poll() is not None or time.monotonic() > deadline:
                        said.seek(0)
                        text = said.read().decode(errors="replace").strip()
                        raise RuntimeError(f"no server: {text[-2000:]}") from error
                    time.sleep(0.2)
            if load.failed:
                raise RuntimeError(f"{shlex.join(command)} does not answer with 200")
            yield Server(process, port)
        finally:
            process.terminate()
            process.wait(60)


@functools.cache
def _bare_version(reference: str) -> Any:
    from mobilevit_jax.tools import served

    return served.load(
        reference,
        weights="ema",
        checkpoint="newest",
        sizes=SIZES,
        note=lambda line: None,
        max_delay=0.0,
        max_waiting=1,
        decoders=concurrent.futures.ThreadPoolExecutor(1),
    )


class Bare(NamedTuple):
    """What the compiled model takes for pictures in memory, by the batch size.

    Attributes:
        seconds: of each call, one after the other.
        at_once: images/s with as many batches at a time as the server computes.
    """

    seconds: dict[int, list[float]]
    at_once: dict[int, float]


def bare(reference: str, seconds: float) -> Bare:
    """Measures the model itself for so many seconds."""
    version = _bare_version(reference)
    variables, size = version.loaded.pretrained.variables, version.programs.input_spec.size
    rng, result = np.random.default_rng(0), Bare({}, {})
    for batch, program in version.programs.classify.items():
        images = rng.integers(0, 256, (batch, *size, 3), np.uint8)

        def calls(
            program: Callable[..., Any] = program, images: np.ndarray = images
        ) -> list[float]:
            spent, end = [], time.perf_counter() + seconds / len(SIZES) / 2
            while (begin := time.perf_counter()) < end:
                np.asarray(program(variables, images))
                spent.append(time.perf_counter() - begin)
            return spent

        np.asarray(program(variables, images))
        result.seconds[batch] = calls()
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads:
            begin = time.perf_counter()
            futures = [threads.submit(calls) for _ in range(AT_ONCE)]
            count = sum(len(future.result()) for future in futures)
            result.at_once[batch] = batch * count / (time.perf_counter() - begin)
    return result


def compare(args: argparse.Namespace, photographs: list[bytes], console: Console) -> dict[str, Any]:
    """All servers and the bare model by turns; the summary and every run."""
    serve = [sys.executable, "launch.py", "serve"]
    peer = [args.peer_python, "benchmarks/serve_peer.py"]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = folder / "model"
        convert = [sys.executable, "launch.py", "convert", args.reference, model, "--format=hf"]
        subprocess.run(convert, cwd=ROOT, check=True, capture_output=True)
        commands = {
            "launch.py serve": [*serve, str(model), f"--max-delay-ms={MAX_DELAY_MS}"],
            "transformers": [*peer, str(model), "--max-batch=1"],
            "transformers, batches": [*peer, str(model), "--max-batch=16"],
        }
        context = multiprocessing.get_context("spawn")
        pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(1, context))
        # With the allocator that launch.py asks for, to compare like with like.
        with mock.patch.dict(os.environ, native.environment()):
            loading = pool.submit(bare, str(model), 0.1)
        servers = {}
        for name, command in commands.items():
            try:
                servers[name] = stack.enter_context(started(command, photographs[0]))
            except RuntimeError as error:
                if name == "launch.py serve":
                    raise
                console.print(f"{name} is left out: {error}", markup=False)
        loading.result()
        first: dict[str, dict[int, str]] = {}
        for name, server in servers.items():
            load = Load(server.port, photographs)
            measure(server, load, functools.partial(_closed_for, clients=8, requests=WARM))
            first[name] = load.first
        runs: list[dict[str, Any]] = []
        for turn in range(args.rounds):
            alone = pool.submit(bare, str(model), 2 * args.seconds).result()
            runs.append({"round": turn, "what": "bare", **alone._asdict()})
            for name, server in servers.items():
                rate = 0.0
                for what in LOADS:
                    load = Load(server.port, photographs)
                    run = {
                        "many": functools.partial(
                            _closed_for, clients=args.clients, seconds=args.seconds
                        ),
                        "half": lambda load, rate=rate, turn=turn: load.arrivals(
                            rate / 2, 2 * args.seconds, seed=turn
                        ),
                        "even": lambda load, rate=rate: load.arrivals(rate / 2, 2 * args.seconds),
                        "one": functools.partial(_closed_for, clients=1, seconds=args.seconds / 2),
                    }[what]
                    result = measure(server, load, run)
                    rate = result["images_per_s"] if what == "many" else rate
                    result |= {"round": turn, "what": what, "server": name}
                    result |= {"seconds": load.seconds, "memory": server.memory()}
                    runs.append(result)
                    console.print(_line(result), markup=False)
        summary = summarize(runs, list(servers), first)
    return {"summary": summary, "runs": [_short(run) for run in runs]}


async def _closed_for(
    load: Load, *, clients: int, seconds: float = float("inf"), requests: int | None = None
) -> None:
    end, left = time.perf_counter() + seconds, itertools.count(1)

    def more() -> bool:
        return time.perf_counter() < end and (requests is None or next(left) <= requests)

    await load.closed(clients, more=more)


def _line(run: dict[str, Any]) -> str:
    return (
        f"round {run['round'] + 1}, {run['server']}, {run['what']}: {run['images_per_s']:.1f}/s, "
        f"p50 {1e3 * _quantile(run['seconds'], 0.5):.1f} ms, "
        f"p99 {1e3 * _quantile(run['seconds'], 0.99):.1f} ms, {run['cores']:.2f} cores, "
        f"generator {run['generator_cores']:.2f}, others {run['others_cores']:.2f}"
    )


def _quantile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(values, share))


def _short(run: dict[str, Any]) -> dict[str, Any]:
    """A run for the record: quantiles for latencies."""
    short = {key: value for key, value in run.items() if key != "seconds"}
    if run["what"] == "bare":
        return short | {"ms": {n: 1e3 * statistics.median(v) for n, v in run["seconds"].items()}}
    quantiles = {f"p{round(100 * q)}_ms": 1e3 * _quantile(run["seconds"], q) for q in (0.5, 0.99)}
    return short | quantiles


def summarize(
    runs: list[dict[str, Any]], servers: list[str], first: dict[str, dict[int, str]]
) -> dict[str, Any]:
    """Medians of the rounds; latencies of all rounds together."""
    alone = [run for run in runs if run["what"] == "bare"]
    bares = [run["seconds"] for run in alone]
    at_once = {size: statistics.median(run["at_once"][size] for run in alone) for size in SIZES}
    rates = {
        size: statistics.median(size / statistics.median(each[size]) for each in bares)
        for size in SIZES
    }
    best = max(rates, key=lambda size: rates[size])
    latency = statistics.median(statistics.median(each[1]) for each in bares)
    rows = []
    for name in servers:
        mine = [run for run in runs if run.get("server") == name]
        by = {what: [run for run in mine if run["what"] == what] for what in LOADS}
        pooled = {what: [s for run in by[what] for s in run["seconds"]] for what in by}
        many = {
            key: statistics.median(run[key] for run in by["many"])
            for key in ("images_per_s", "cpu_ms", "cores", "generator_cores", "others_cores")
        }
        half_p99, even_p99 = (_quantile(pooled[what], 0.99) for what in ("half", "even"))
        one_p50 = _quantile(pooled["one"], 0.5)
        same = [first[name][i] == label for i, label in first[servers[0]].items()]
        rows.append(
            {
                "server": name,
                **many,
                "share_of_bare": many["images_per_s"] / rates[best],
                "share_of_at_once": many["images_per_s"] / max(at_once.values()),
                "many_p50_ms": 1e3 * _quantile(pooled["many"], 0.5),
                "many_p99_ms": 1e3 * _quantile(pooled["many"], 0.99),
                "half_rate": statistics.median(run["images_per_s"] for run in by["half"]),
                "half_p50_ms": 1e3 * _quantile(pooled["half"], 0.5),
                "half_p99_ms": 1e3 * half_p99,
                "half_p99_of_batch_1": half_p99 / latency,
                "even_p50_ms": 1e3 * _quantile(pooled["even"], 0.5),
                "even_p99_ms": 1e3 * even_p99,
                "even_p99_of_batch_1": even_p99 / latency,
                "one_p50_ms": 1e3 * one_p50,
                "one_p50_of_allowed": one_p50 / (latency + MAX_DELAY_MS / 1e3),
                "memory_mib": mine[-1]["memory"] / 2**20,
                "failed": sum(run["failed"] for run in mine),
                "same_first_label": sum(same) / len(same),
            }
        )
    return {
        "bare_images_per_s": rates,
        "bare_at_once_images_per_s": at_once,
        "bare_best_batch": best,
        "batch_1_ms": 1e3 * latency,
        "servers": rows,
    }


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """The bare model, the servers, and the goals of ours."""
    rates, at_once = summary["bare_images_per_s"], summary["bare_at_once_images_per_s"]
    report.print_table(
        ["bare model, batch of", *map(str, rates)],
        [
            ["images/s", *(f"{rate:.1f}" for rate in rates.values())],
            [f"{AT_ONCE} at once", *(f"{rate:.1f}" for rate in at_once.values())],
        ],
        console,
    )
    console.print(f"a batch of 1: {summary['batch_1_ms']:.1f} ms")
    columns = (
        ("images/s", "images_per_s", ".1f"),
        ("of bare", "share_of_bare", ".2f"),
        ("at once", "share_of_at_once", ".2f"),
        ("CPU ms", "cpu_ms", ".1f"),
        ("half load p50", "half_p50_ms", ".1f"),
        ("p99", "half_p99_ms", ".1f"),
        ("evenly p50", "even_p50_ms", ".1f"),
        ("p99", "even_p99_ms", ".1f"),
        ("one client p50", "one_p50_ms", ".1f"),
        ("MiB", "memory_mib", ".0f"),
        ("same label", "same_first_label", ".2f"),
        ("others' cores", "others_cores", ".2f"),
    )
    report.print_table(
        ["server", *(title for title, _, _ in columns)],
        [
            [row["server"], *(format(row[key], spec) for _, key, spec in columns)]
            for row in summary["servers"]
        ],
        console,
    )
    ours = summary["servers"][0]
    rows = []
    for goal in GOALS:
        value = ours[goal.value]
        reached = value >= goal.bound if goal.at_least else value <= goal.bound
        sign = ">=" if goal.at_least else "<="
        verdict = "reached" if reached else "MISSED"
        rows.append([goal.text, f"{value:.2f}", f"{sign} {goal.bound:g}", verdict])
    report.print_table(["goal", "measured", "to reach", ""], rows, console)


def memory(args: argparse.Namespace, photographs: list[bytes], console: Console) -> dict[str, Any]:
    """Resident memory of our server over many requests, and its slope in the second half.

    A Ctrl-C ends it early.
    """
    command = [sys.executable, "launch.py", "serve", args.reference]
    samples: list[tuple[int, int]] = []
    with started(command, photographs[0]) as server:
        load, every = Load(server.port, photographs), max(1, args.requests // SAMPLES)

        async def run(load: Load) -> None:
            async def watch() -> None:
                while True:
                    answered = len(load.seconds)
                    if not samples or answered >= samples[-1][0] + every:
                        samples.append((answered, server.memory()))
                        if len(samples) % 20 == 1:
                            console.print(f"{answered:,}: {samples[-1][1] / 2**20:.1f} MiB")
                    await asyncio.sleep(0.1)

            watching = asyncio.create_task(watch())
            with contextlib.suppress(asyncio.CancelledError):  # Ctrl-C: what there is, is told
                await _closed_for(load, clients=args.clients, requests=args.requests)
            watching.cancel()
            samples.append((len(load.seconds), server.memory()))

        result = measure(server, load, run)
    slope = memory_slope(samples)
    result |= {
        "memory_mib": [[count, round(size / 2**20, 2)] for count, size in samples],
        "slope_bytes_a_request": slope,
        "p50_ms": 1e3 * _quantile(load.seconds, 0.5),
        "p99_ms": 1e3 * _quantile(load.seconds, 0.99),
    }
    console.print(
        f"{result['requests']:,} requests, {result['failed']} failed, "
        f"{result['images_per_s']:.1f}/s; memory {samples[0][1] / 2**20:.1f} -> "
        f"{samples[-1][1] / 2**20:.1f} MiB, in the second half {slope:+.1f} bytes a request"
    )
    return result


def memory_slope(samples: Sequence[tuple[int, float]]) -> float:
    """Bytes a request: medians of the last quarter and of the one before it, on their distance.

    Medians, because what a batch needs comes and goes.
    """
    quarter = len(samples) // 4
    if not quarter:
        return float("nan")
    before, last = np.array(samples[-2 * quarter : -quarter]), np.array(samples[-quarter:])
    requests, size = np.median(last, axis=0) - np.median(before, axis=0)
    return float(size / requests)


# --- the command ----------------------------------------------------------------------------------


def main() -> None:
    """Measures, prints the tables and writes the record."""
    args = _parse()
    console = Console(width=None if sys.stdout.isatty() else 150)
    photographs = [path.read_bytes() for path in _photographs(args.images)]
    if args.baseline:
        photographs = [_baseline(photograph) for photograph in photographs]
    results = (memory if args.requests else compare)(args, photographs, console)
    if not args.requests:
        print_summary(results["summary"], console)
    if args.json is not None:
        record = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": _commit(),
            "machine": {
                "platform": platform.platform(),
                "cores": len(os.sched_getaffinity(0)),
                "python": platform.python_version(),
            },
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "peer_versions": {} if args.requests else _peer_versions(args.peer_python),
            "photographs": len(photographs),
            "baseline": args.baseline,
            "mean_kb": round(statistics.mean(map(len, photographs)) / 1e3, 1),
            "seconds": args.seconds,
            "clients": args.clients,
            **results,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--reference", default="mobilevitv2_050", help="model; a zoo name has random weights")
    add("--images", type=Path, help="folder of JPEGs (the photographs of the package foolbox)")
    add("--baseline", action="store_true", help="as cameras write JPEGs; foolbox's are progressive")
    add("--rounds", type=int, default=3)
    add("--seconds", type=float, default=6.0, help="of each load; half load takes twice as long")
    add("--clients", type=int, default=32)
    add("--requests", type=int, default=0, help="only our server's memory, over so many requests")
    add("--peer-python", default=sys.executable, help="see requirements-serve.txt")
    add("--json", type=Path, metavar="FILE", help="where the record is written")
    args = parser.parse_args()
    if args.rounds < 1 or args.seconds <= 0 or args.clients < 1 or args.requests < 0:
        parser.error("--rounds, --seconds and --clients must be above 0, --requests not below")
    return args


def _photographs(folder: Path | None) -> list[Path]:
    pattern = "*.jp*g"
    if folder is None:
        found = importlib.util.find_spec("foolbox")
        if found is None or not found.submodule_search_locations:
            sys.exit("serve.py: no photographs: pip install --no-deps foolbox, or give --images")
        folder, pattern = Path(found.submodule_search_locations[0]) / "data", "imagenet_*.jpg"
    paths = sorted(folder.glob(pattern))
    if not paths:
        sys.exit(f"serve.py: {folder} has no JPEGs")
    return paths


def _baseline(photograph: bytes) -> bytes:
    """The same coefficients as a baseline JPEG, which takes a third of the time to decode."""
    command = ["jpegtran", "-copy", "none"]
    try:
        return subprocess.run(command, input=photograph, capture_output=True, check=True).stdout
    except OSError:
        sys.exit("serve.py: --baseline needs jpegtran: apt-get install libjpeg-turbo-progs")


def _peer_versions(python: str) -> dict[str, str]:
    program = (
        "import importlib.metadata as m, json, sys\n"
        "print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run([python, "-c", program, *PEER_PACKAGES], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")


if __name__ == "__main__":
    main()
