"""Separable, multi-head and Linformer attention against the number of tokens: table, JSON, picture.

Tokens are the patches of 2x2 pixels that attend to one another; every kind sees the same maps. All
kinds of one size are timed in turns, in one process, and reported by the median of the rounds. The
exponent e of time ~ tokens^e is fitted over the upper half of the sizes. Next to it stands what
share of the machine's copying speed the least traffic of the layer (read the map, write the map)
makes up.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \\
        python benchmarks/attention.py --out experiments/DATE-attention
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from rich.console import Console  # noqa: E402

from mobilevit_jax import devices, report  # noqa: E402
from mobilevit_jax.models.attention import ATTENTIONS, PATCH, kind  # noqa: E402

SCORES_LIMIT = 2**32  # bytes of one kind's scores: a gradient keeps three times as much


def programs(
    name: str, tokens: int, *, width: int, heads: int, latents: int, dtype: str
) -> dict[str, Callable[[], Any]] | None:
    """Calls that run a layer forward, and forward and backward; None where it takes too much."""
    keys = {"separable": 1, "multihead": tokens, "linformer": latents}[name]
    if PATCH * PATCH * heads * tokens * keys * 4 > SCORES_LIMIT:
        return None
    side = 1 << (
        tokens.bit_length() // 2
    )  # of a map of patches, as square as a power of two can be
    shape = (1, PATCH * side, PATCH * tokens // side, width)
    image = jax.random.normal(jax.random.key(0), shape, jnp.dtype(dtype))
    layer = kind(name, heads=heads, latents=latents)(
        weight_init="torch", dtype=jnp.dtype(dtype), name=None
    )
    variables = jax.jit(layer.init)(jax.random.key(1), image)

    def loss(variables: Any, image: Any) -> Any:
        return jnp.square(layer.apply(variables, image).astype(jnp.float32)).mean()

    compiled = functools.partial(jax.jit, compiler_options=devices.compiler_options())
    forward = compiled(layer.apply).lower(variables, image).compile()
    backward = compiled(jax.grad(loss, argnums=(0, 1))).lower(variables, image).compile()
    return {
        "forward": lambda: forward(variables, image),
        "forward and backward": lambda: backward(variables, image),
    }


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    return measure.timed(lambda: jax.block_until_ready(call()))


def copy_speed() -> float:
    """Bytes a second that a copy of 256 MiB moves, read and written, at its best of ten."""
    array = jnp.zeros(2**26, jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    jax.block_until_ready(copy(array))
    return 2 * array.nbytes / min(seconds(lambda: copy(array)) for _ in range(10))


def exponent(points: list[tuple[int, float]]) -> float:
    """e of time ~ tokens^e, over the upper half of the points."""
    tokens, times = zip(*points[len(points) // 2 :], strict=True)
    return float(np.polyfit(np.log(tokens), np.log(times), 1)[0])


def by_tokens(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a kind, number of tokens and pass."""
    rows = []
    copying = copy_speed()
    for tokens in (2**i for i in range(6, args.tokens.bit_length())):
        options = {"width": args.width, "heads": args.heads, "latents": args.latents}
        built = {name: programs(name, tokens, dtype=args.dtype, **options) for name in ATTENTIONS}
        calls = {
            (name, which): call
            for name, both in built.items()
            if both is not None
            for which, call in both.items()
        }
        for call in calls.values():
            jax.block_until_ready(call())
        runs = {key: functools.partial(seconds, call) for key, call in calls.items()}
        rounds = measure.by_turns(runs, rounds=5, seconds=args.seconds)
        traffic = 2 * PATCH * PATCH * tokens * args.width * jnp.dtype(args.dtype).itemsize
        for (name, which), times in rounds.items():
            spread = measure.spread(times)
            rows.append(
                {
                    "attention": name,
                    "pass": which,
                    "tokens": tokens,
                    "ms": 1000 * spread["median"],
                    "ms_quartiles": [1000 * spread["low"], 1000 * spread["high"]],
                    "rounds": len(times),
                    "share_of_copy_speed": traffic / spread["median"] / copying,
                }
            )
        print(f"{tokens} tokens measured", file=sys.stderr, flush=True)
    return rows


def curves(rows: list[dict[str, Any]], which: str) -> dict[str, list[tuple[int, float]]]:
    """(tokens, milliseconds) of each kind."""
    return {
        name: [
            (row["tokens"], row["ms"])
            for row in rows
            if (row["attention"], row["pass"]) == (name, which)
        ]
        for name in ATTENTIONS
    }


def draw(path: Path, rows: list[dict[str, Any]], exponents: dict[str, dict[str, float]]) -> None:
    """Time over tokens, both axes logarithmic, a panel a pass."""
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    for axes, which in zip(figure.subplots(1, 2), exponents, strict=True):
        for name, points in curves(rows, which).items():
            label = f"{name}: time ~ tokens^{exponents[which][name]:.2f}"
            axes.loglog(*zip(*points, strict=True), "o-", ms=4, label=label, base=2)
        axes.set(title=which, xlabel="tokens", ylabel="milliseconds")
        axes.set_yscale("log", base=10)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def main() -> None:
    """Measures, prints the table, writes attention.json and attention.png."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=16384, help="up to so many, from 64")
    parser.add_argument("--width", type=int, default=128, help="channels of a token")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--latents", type=int, default=256, help="of Linformer")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seconds", type=float, default=3.0, help="a size, at least")
    parser.add_argument("--out", type=Path, metavar="DIR")
    args = parser.parse_args()
    rows = by_tokens(args)
    passes = dict.fromkeys(row["pass"] for row in rows)
    exponents = {
        which: {name: exponent(points) for name, points in curves(rows, which).items()}
        for which in passes
    }
    table = []
    for which in passes:
        by_kind = {name: dict(points) for name, points in curves(rows, which).items()}
        for tokens in by_kind["separable"]:
            times = [by_kind[name].get(tokens) for name in ATTENTIONS]
            table.append([which, f"{tokens:,}", *(f"{t:,.2f}" if t else "" for t in times)])
        fitted = [f"{exponents[which][name]:.2f}" for name in ATTENTIONS]
        table.append([which, "exponent", *fitted])
    report.print_table(["pass", "tokens", *(f"{n} (ms)" for n in ATTENTIONS)], table, Console())
    if args.out:
        given = {key: value for key, value in vars(args).items() if key != "out"}
        where = {**measure.where(), "device": jax.devices()[0].device_kind}
        record = {**where, **given, "exponents": exponents, "rows": rows}
        measure.write(args.out / "attention.json", record)
        draw(args.out / "attention.png", rows, exponents)


if __name__ == "__main__":
    main()
