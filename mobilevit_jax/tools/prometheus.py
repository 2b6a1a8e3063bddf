"""Counts of requests and batches in the text format of Prometheus."""

import json
import pathlib
import resource
from collections.abc import Mapping

from mobilevit_jax.tools import batching

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
STATM = pathlib.Path("/proc/self/statm")  # Linux


class Requests:
    """Counts of requests, as Prometheus reads them."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, int], int] = {}
        self._buckets: dict[str, list[int]] = {}
        self._seconds: dict[str, float] = {}

    def count(self, route: str, status: int, seconds: float) -> None:
        """Counts a request by the route's pattern, which strangers cannot make longer."""
        key = (route, status)
        self._requests[key] = self._requests.get(key, 0) + 1
        self._seconds[route] = self._seconds.get(route, 0.0) + seconds
        buckets = self._buckets.setdefault(route, [0] * (len(BUCKETS) + 1))
        buckets[next((i for i, most in enumerate(BUCKETS) if seconds <= most), len(BUCKETS))] += 1

    def text(self, models: Mapping[str, batching.Counts]) -> str:
        """Prometheus' text format, version 0.0.4."""
        lines = ["# TYPE mobilevit_requests_total counter"]
        for (route, status), count in sorted(self._requests.items()):
            labels = f"route={json.dumps(route)},status={json.dumps(str(status))}"
            lines.append(f"mobilevit_requests_total{{{labels}}} {count}")
        lines.append("# TYPE mobilevit_request_seconds histogram")
        for route, buckets in sorted(self._buckets.items()):
            name, total = f"route={json.dumps(route)}", 0
            for most, count in zip((*BUCKETS, "+Inf"), buckets, strict=True):
                total += count
                lines.append(f'mobilevit_request_seconds_bucket{{{name},le="{most}"}} {total}')
            lines.append(f"mobilevit_request_seconds_sum{{{name}}} {self._seconds[route]}")
            lines.append(f"mobilevit_request_seconds_count{{{name}}} {total}")
        for what, kind, value in (
            ("waiting_requests", "gauge", lambda counts: counts.waiting),
            ("images_total", "counter", lambda counts: counts.images),
            ("batch_seconds_total", "counter", lambda counts: counts.seconds),
            ("failed_batches_total", "counter", lambda counts: counts.failed),
        ):
            lines.append(f"# TYPE mobilevit_{what} {kind}")
            for model, counts in models.items():
                lines.append(f"mobilevit_{what}{{model={json.dumps(model)}}} {value(counts)}")
        lines.append("# TYPE mobilevit_batches_total counter")
        for model, counts in models.items():
            for size, count in counts.batches.items():
                labels = f'model={json.dumps(model)},size="{size}"'
                lines.append(f"mobilevit_batches_total{{{labels}}} {count}")
        if STATM.is_file():
            memory = int(STATM.read_text().split()[1]) * resource.getpagesize()
            lines += [
                "# TYPE process_resident_memory_bytes gauge",
                f"process_resident_memory_bytes {memory}",
            ]
        return "\n".join(lines) + "\n"
