"""Dynamic batching: requests that arrive one by one are computed in batches of a few fixed sizes.

Each request brings a function that makes its image; a pool of threads calls it. A few threads
compute what is ready. They wait for more only while more is on its way that would make the batch
larger, and not longer than `max_delay`. The number of requests inside is bounded: one more is
`Overloaded`, at once, and costs nothing.

Before editing: futures may be cancelled at any moment (a client that hangs up), and their callbacks
run in whatever thread does it. The lock is reentrant for that reason.
"""

import collections
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

Image = UInt8[np.ndarray, "h w 3"]
Images = UInt8[np.ndarray, "b h w 3"]


class Overloaded(Exception):
    """There are as many requests inside as may be.

    Attributes:
        retry_after: seconds until about half of them are answered, 1 at least.
    """

    def __init__(self, inside: int, retry_after: int) -> None:
        super().__init__(f"{inside} requests are waiting; try again in {retry_after} s")
        self.retry_after = retry_after


class BatchError(Exception):
    """Computing the batch failed in which the request was; `__cause__` says how."""


class Counts(NamedTuple):
    """What a batcher has done so far, and does.

    Attributes:
        waiting: requests inside, not answered yet.
        batches: how many were computed, by their size.
        images: how many there were in them, without padding.
        seconds: spent on computing them.
        failed: batches that raised.
    """

    waiting: int
    batches: dict[int, int]
    images: int
    seconds: float
    failed: int


class _Ready(NamedTuple):
    image: Image
    future: Future[Any]
    since: float  # seconds, time.monotonic()


def plan(seconds: Mapping[int, float], *, at_once: int) -> list[int]:
    """For 0, 1, 2, … waiting images, the size of the batch to begin with; the last is for more.

    They are to wait as little as can be, all taken together: where a batch costs in proportion to
    its size (CPUs) they are computed one by one, where a larger one costs little more
    (accelerators) 5 of them are padded to 8. But as long as more keep coming, the wait depends on
    the rate alone. So a batch is at least as large as is best for that, of sizes that leave as many
    images for the next batches as are being computed.

    Args:
        seconds: what a batch takes, by its size; 1 must be among the sizes.
        at_once: batches being computed.
    """
    sizes = sorted(seconds, reverse=True)  # of equally good ones the larger: it answers more
    total, first, most = [0.0], [0], 2 * at_once * sizes[0]
    for waiting in range(1, most + 1):
        costs = {size: waiting * seconds[size] + total[max(waiting - size, 0)] for size in sizes}
        first.append(min(costs, key=lambda size: costs[size]))
        total.append(costs[first[-1]])
    for waiting in range(1, most + 1):
        steady = [size for size in sorted(seconds) if 2 * at_once * size <= waiting] or [1]
        fastest = min(steady, key=lambda size: seconds[size] / size)
        first[waiting] = max(first[waiting], fastest)
    return first


class Batcher:
    """Computes images in batches; see the top of this file.

    Args:
        compute: from a batch of images, padded with zeros, to what is answered for each. It is
            called by `at_once` threads.
        seconds: what it takes, by the sizes that it can be called with; 1 must be among them.
        size: (h, w) of the images.
        max_delay: seconds that an image waits at most for others to come with it.
        max_waiting: requests inside at most.
        at_once: batches being computed at most.
        decoders: threads that call the functions given to `submit`.
    """

    def __init__(
        self,
        compute: Callable[[Images], Sequence[Any] | np.ndarray],
        *,
        seconds: Mapping[int, float],
        size: tuple[int, int],
        max_delay: float,
        max_waiting: int,
        at_once: int,
        decoders: Executor,
    ) -> None:
        self._compute, self._size, self._decoders = compute, size, decoders
        self._plan = plan(seconds, at_once=at_once)
        self._max_delay, self._max_waiting = max_delay, max_waiting
        self._rate = max(size / taken for size, taken in seconds.items())  # images/s at best
        self._changed = threading.Condition(threading.RLock())
        self._ready: collections.deque[_Ready] = collections.deque()
        self._inside = self._decoding = 0
        self._closed = False
        self._batches = dict.fromkeys(sorted(seconds), 0)
        self._images, self._seconds, self._failed = 0, 0.0, 0
        self._threads = [
            threading.Thread(target=self._work, name=f"batches-{i}", daemon=True)
            for i in range(at_once)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, decode: Callable[[Image], None]) -> Future[Any]:
        """What `compute` makes of an image, some time later.

        Args:
            decode: writes the image into the array it is given. What it raises, the future raises.

        Raises:
            Overloaded: too many are waiting.
        """
        future: Future[Any] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            if self._inside >= self._max_waiting:
                seconds = math.ceil(self._inside / 2 / self._rate)
                raise Overloaded(self._inside, max(1, seconds))
            self._inside += 1
            self._decoding += 1
        future.add_done_callback(self._answered)
        self._decoders.submit(self._decode, decode, future)
        return future

    def counts(self) -> Counts:
        """What it has done so far."""
        with self._changed:
            batches = dict(self._batches)
            return Counts(self._inside, batches, self._images, self._seconds, self._failed)

    def close(self) -> None:
        """Takes no more, answers what is inside, and ends."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _answered(self, future: Future[Any]) -> None:
        with self._changed:
            self._inside -= 1

    def _decode(self, decode: Callable[[Image], None], future: Future[Any]) -> None:
        image, failure = np.empty((*self._size, 3), np.uint8), None
        if not future.cancelled():
            try:
                decode(image)
            except Exception as error:  # it belongs to the request, whatever it is
                failure = error
        with self._changed:
            self._decoding -= 1
            if failure is None:
                self._ready.append(_Ready(image, future, time.monotonic()))
            self._changed.notify_all()
        if failure is not None and future.set_running_or_notify_cancel():
            future.set_exception(failure)

    def _work(self) -> None:
        while batch := self._next():
            self._run(*batch)

    def _next(self) -> tuple[list[_Ready], int] | None:
        """The images of the next batch, and its size with padding; None when there is no more."""
        with self._changed:
            while (patience := self._patience()) is None or patience > 0:
                if not self._ready and self._closed and not self._decoding:
                    return None
                self._changed.wait(patience)
            ready = len(self._ready)
            # What is on its way waits as well, so a long queue is one for larger batches.
            size = self._first(ready + self._decoding)
            if size > ready:
                size = self._first(ready)
            return [self._ready.popleft() for _ in range(min(size, ready))], size

    def _first(self, waiting: int) -> int:
        return self._plan[min(waiting, len(self._plan) - 1)]

    def _patience(self) -> float | None:
        """Seconds to wait for more images; None for as long as it takes, where there is none."""
        if not self._ready:
            return None
        ready = len(self._ready)
        with_more = max(self._first(ready + more) for more in range(self._decoding + 1))
        if with_more <= self._first(ready):
            return 0.0
        return self._ready[0].since + self._max_delay - time.monotonic()

    def _run(self, ready: list[_Ready], size: int) -> None:
        ready = [each for each in ready if each.future.set_running_or_notify_cancel()]
        if not ready:
            return
        images = np.empty((size, *self._size, 3), np.uint8)
        for row, each in enumerate(ready):
            images[row] = each.image
        images[len(ready) :] = 0
        begin, rows, failure = time.monotonic(), None, None
        try:
            rows = self._compute(images)
        except Exception as error:  # the next batch may go well
            failure = error
        with self._changed:  # before the answers, so that who has one finds it counted
            self._seconds += time.monotonic() - begin
            self._batches[size] += 1
            self._images += len(ready)
            self._failed += failure is not None
        for row, each in enumerate(ready):
            if rows is not None:
                each.future.set_result(rows[row])
                continue
            broken = BatchError(f"a batch of {len(ready)} images failed: {failure}")
            broken.__cause__ = failure
            each.future.set_exception(broken)
