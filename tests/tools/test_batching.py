"""Batches: sizes, waiting, bounds, failures and the end, with events instead of clocks."""

import functools
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest

from mobilevit_jax.tools import batching

LINEAR = {1: 1.0, 2: 2.0, 4: 4.0}
GROWING = {1: 1.0, 2: 1.2, 4: 1.7}
FLAT = {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}
FOREVER = 60.0  # seconds, in a test that would hang


class Compute:
    """Sums of the images; keeps the batches, waits where it is told to."""

    def __init__(self):
        self.batches, self.free, self.begun = [], threading.Event(), threading.Event()
        self.free.set()
        self.fail = None

    def __call__(self, images):
        self.batches.append(images.copy())
        self.begun.set()
        assert self.free.wait(FOREVER)
        if self.fail:
            raise self.fail
        return images.sum((1, 2, 3), dtype=np.float32)[:, None]


def fill(value):
    def decode(image):
        image[...] = value

    return decode


@pytest.fixture
def compute():
    return Compute()


@pytest.fixture
def made(compute):
    """Makes batchers, and ends them."""
    decoders, batchers = ThreadPoolExecutor(4), []

    def make(**options):
        options = {
            "seconds": GROWING,
            "max_delay": 0.0,
            "max_waiting": 100,
            "at_once": 1,
            **options,
        }
        batchers.append(batching.Batcher(compute, size=(2, 1), decoders=decoders, **options))
        return batchers[-1]

    yield make
    compute.free.set()
    for batcher in batchers:
        batcher.close()
    decoders.shutdown()


def sizes(compute):
    return [len(batch) for batch in compute.batches]


def block(compute, batcher):
    """One image in a batch that does not end before `compute.free` is set."""
    compute.free.clear()
    compute.begun.clear()
    first = batcher.submit(fill(0))
    assert compute.begun.wait(FOREVER)
    return first


def wait_for(batcher, count):
    """Until so many images are decoded and wait."""
    with batcher._changed:
        assert batcher._changed.wait_for(lambda: len(batcher._ready) == count, FOREVER)


def test_plan():
    plan = functools.partial(batching.plan, at_once=2)
    assert plan(LINEAR) == [0, *[1] * 16]
    assert plan(GROWING)[:5] == [0, 1, 2, 2, 4]  # 3 are 2 and 1
    assert plan(FLAT) == [0, *[8] * 32]
    # 4 cost as much as 2 single ones: 2 images are computed alone, 3 are padded, 5 are 4 and 1.
    assert plan({1: 1.0, 4: 2.0})[:5] == [0, 1, 1, 4, 4]
    assert plan({1: 1.0, 4: 2.0, 8: 6.0})[5:7] == [4, 4]


def test_a_long_queue_is_for_the_best_rate():
    seconds = {1: 1.0, 2: 1.98, 4: 3.9, 8: 7.9}
    plan = batching.plan(seconds, at_once=2)
    assert plan[:8] == [0, *[1] * 7]
    assert plan[8:16] == [2] * 8  # of 8, two batches of 2 are computed, and as many are left
    assert plan[16:] == [4] * 17  # 8 at a time would be slower
    assert batching.plan(seconds, at_once=1)[4:9] == [2, 2, 2, 2, 4]


def test_one_image_does_not_wait_for_others_that_do_not_come(made, compute):
    batcher = made(max_delay=FOREVER)
    assert batcher.submit(fill(7)).result(FOREVER / 2).tolist() == [7 * 6]
    assert sizes(compute) == [1]


def test_an_image_does_not_wait_where_a_batch_saves_nothing(made, compute):
    batcher, gate = made(max_delay=FOREVER, seconds=LINEAR), threading.Event()
    slow = batcher.submit(lambda image: gate.wait(FOREVER))
    assert batcher.submit(fill(7)).result(FOREVER / 2).tolist() == [7 * 6]
    gate.set()
    slow.result(FOREVER)
    assert sizes(compute) == [1, 1]


def test_an_image_waits_for_one_that_is_being_decoded(made, compute):
    batcher, gate = made(max_delay=FOREVER), threading.Event()

    def slowly(image):
        assert gate.wait(FOREVER)
        image[...] = 2

    slow = batcher.submit(slowly)
    fast = batcher.submit(fill(1))
    wait_for(batcher, 1)
    assert not compute.batches
    gate.set()
    assert [slow.result(FOREVER)[0], fast.result(FOREVER)[0]] == [12, 6]
    assert sizes(compute) == [2]


def test_and_not_longer_than_the_delay(made, compute):
    batcher, gate = made(max_delay=0.01), threading.Event()
    slow = batcher.submit(lambda image: gate.wait(FOREVER))
    assert batcher.submit(fill(1)).result(FOREVER)[0] == 6
    assert not slow.done()
    gate.set()
    slow.result(FOREVER)
    assert sizes(compute) == [1, 1]


def test_what_came_meanwhile_is_one_batch_and_every_row_its_own(made, compute):
    batcher = made(seconds=FLAT)
    first = block(compute, batcher)
    futures = [batcher.submit(fill(i)) for i in range(1, 7)]
    wait_for(batcher, 6)
    compute.free.set()
    assert [future.result(FOREVER)[0] for future in futures] == [6 * i for i in range(1, 7)]
    assert first.result(FOREVER)[0] == 0
    assert sizes(compute) == [8, 8]
    assert not compute.batches[1][6:].any()  # padding
    counts = batcher.counts()
    assert (counts.waiting, counts.images, counts.failed) == (0, 7, 0)
    assert counts.batches == {1: 0, 2: 0, 4: 0, 8: 2}


def test_too_many_are_refused_at_once_and_room_comes_back(made, compute):
    batcher = made(max_waiting=3, seconds={1: 4.0})
    first = block(compute, batcher)
    others = [batcher.submit(fill(1)) for _ in range(2)]
    with pytest.raises(batching.Overloaded) as refused:
        batcher.submit(fill(1))
    assert refused.value.retry_after == 6  # half of three, four seconds each
    others[1].cancel()
    third = batcher.submit(fill(3))
    compute.free.set()
    assert [first.result(FOREVER)[0], others[0].result(FOREVER)[0]] == [0, 6]
    assert third.result(FOREVER)[0] == 18
    assert len(compute.batches) == 3  # the cancelled one was not computed
    with pytest.raises(CancelledError):
        others[1].result()


def test_two_batches_at_once_and_not_three(made, compute):
    batcher = made(at_once=2)
    first = block(compute, batcher)
    second = block(compute, batcher)
    third = batcher.submit(fill(7))
    wait_for(batcher, 1)
    assert sizes(compute) == [1, 1]
    compute.free.set()
    for future, value in ((first, 0), (second, 0), (third, 2 * 3 * 7)):
        assert future.result(FOREVER) == [value]
    assert batcher.counts().images == 3


def test_a_broken_batch_fails_its_own_and_the_next_goes_well(made, compute):
    batcher = made()
    compute.fail = ValueError("boom")
    with pytest.raises(batching.BatchError, match="boom") as failed:
        batcher.submit(fill(1)).result(FOREVER)
    assert failed.value.__cause__ is compute.fail
    compute.fail = None
    assert batcher.submit(fill(1)).result(FOREVER)[0] == 6
    assert batcher.counts().failed == 1


def test_what_cannot_be_decoded_concerns_nobody_else(made, compute):
    batcher = made()

    def broken(image):
        raise KeyError("no image")

    first, second = batcher.submit(broken), batcher.submit(fill(1))
    with pytest.raises(KeyError, match="no image"):
        first.result(FOREVER)
    assert second.result(FOREVER)[0] == 6
    assert batcher.counts().waiting == 0


def test_closing_answers_what_is_inside(made, compute):
    batcher = made()
    first = block(compute, batcher)
    others = [batcher.submit(fill(i)) for i in range(5)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    compute.free.set()
    closing.join(FOREVER)
    assert not closing.is_alive()
    assert first.done()
    assert [future.result(0)[0] for future in others] == [6 * i for i in range(5)]
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(fill(1))


def test_many_threads_get_their_own_rows(made, compute):
    batcher = made(max_delay=0.002, seconds=FLAT)
    with ThreadPoolExecutor(16) as clients:
        values = [i % 256 for i in range(400)]
        rows = clients.map(lambda value: batcher.submit(fill(value)).result(FOREVER)[0], values)
        assert list(rows) == [6 * value for value in values]
    assert batcher.counts().images == 400
