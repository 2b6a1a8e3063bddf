"""Top-1 by the size it is evaluated at: python draw.py DIR, with evaluations.txt in DIR."""

import json
import re
import sys
from pathlib import Path

from matplotlib.figure import Figure

directory = Path(sys.argv[1])
curves: dict[str, dict[int, float]] = {}
for line in (directory / "evaluations.txt").read_text().splitlines():
    run, size, values = re.fullmatch(r"(\S+) at (\d+): (.*)", line).groups()
    curves.setdefault(run, {})[int(size)] = 100 * json.loads(values)["val/top1"]
figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
axes = figure.subplots()
for run, points in curves.items():
    axes.plot(*zip(*sorted(points.items()), strict=True), "o-", label=run)
axes.set(xlabel="evaluated at (pixels)", ylabel="top-1 of 10,000 test images (%)")
axes.set_xticks(sorted({size for points in curves.values() for size in points}))
axes.grid(alpha=0.3)
axes.legend()
figure.savefig(directory / "sizes.png")
