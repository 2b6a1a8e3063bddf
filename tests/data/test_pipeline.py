"""Batches: pure in (seed, step), whatever the threads and hosts; every example where it belongs."""

import dataclasses
import gc
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mobilevit_jax.data import pipeline, rows, sources
from mobilevit_jax.data.multiscale import Shape, Shapes
from mobilevit_jax.data.pipeline import Batch, Workers, num_eval_batches, plan
from mobilevit_jax.data.record import DataError, Record, Source
from mobilevit_jax.data.transforms import (
    InputSpec,
    Transform,
    View,
    evaluation,
    pad_crop,
    random_resized_crop,
)

ROOT = Path(__file__).parents[2]
EVALUATION = evaluation(InputSpec((8, 8), 8, "bilinear", "rgb", (0, 0, 0), (1, 1, 1)))


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Example i has label i, and an image that nobody else has."""

    count: int
    class_names: tuple[str, ...] = ("a", "b")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Record:
        image = np.random.default_rng(i).integers(1, 256, (8, 8, 3), dtype=np.uint8)
        return Record(image, i, f"numbered[{i}]")


@dataclasses.dataclass(frozen=True)
class Slow(Numbered):
    """Takes its time over each example."""

    seconds: float = 0.01

    def __getitem__(self, i: int) -> Record:
        time.sleep(self.seconds)
        return Numbered.__getitem__(self, i)


def trained(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    size: tuple[int, int] = (8, 8),
    seed: int = 0,
    start_step: int = 0,
    host: tuple[int, int] = (0, 1),
    max_corrupt: float = 0.0,
    **workers: Any,
) -> pipeline.Batches:
    return pipeline.train_batches(
        source,
        transform,
        shapes=fixed_shapes(batch_size, size),
        seed=seed,
        start_step=start_step,
        workers=Workers(**workers),
        max_corrupt=max_corrupt,
        host=host,
    )


def looked_at(
    source: Source,
    view: View,
    *,
    batch_size: int,
    host: tuple[int, int] = (0, 1),
    max_corrupt: float = 0.0,
    **workers: Any,
) -> pipeline.Batches:
    return pipeline.eval_batches(
        source,
        view,
        size=(8, 8),
        batch_size=batch_size,
        workers=Workers(**workers),
        max_corrupt=max_corrupt,
        host=host,
    )


def fixed_shapes(batch_size: int, size: tuple[int, int] = (8, 8)) -> Shapes:
    return Shapes((Shape(*size, batch_size),))


@dataclasses.dataclass(frozen=True)
class WithoutJax(Numbered):
    """Refuses to be read where jax is loaded, except in this process."""

    parent: int = dataclasses.field(default_factory=os.getpid)

    def __getitem__(self, i: int) -> Record:
        assert "jax" not in sys.modules or os.getpid() == self.parent
        return Numbered.__getitem__(self, i)


def take(count: int, batches: pipeline.Batches) -> list[Batch]:
    with batches:
        return list(itertools.islice(batches, count))


def same(left: Iterable[Batch], right: Iterable[Batch]) -> bool:
    return all(
        a.keys() == b.keys() == {"image", "label", "mask"}
        and all(np.array_equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)
        for a, b in zip(left, right, strict=True)
    )


def workers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("batches")]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert not workers()


# plan


def test_plan_is_a_permutation_of_every_epoch():
    for num_examples, batch_size in ((10, 4), (7, 7), (12, 5), (5, 16), (1, 3)):
        steps = -(-3 * num_examples // batch_size)
        plans = [
            plan(step, seed=1, num_examples=num_examples, shapes=fixed_shapes(batch_size))
            for step in range(steps)
        ]
        epochs = np.concatenate([p.epochs for p in plans])
        indices = np.concatenate([p.indices for p in plans])
        assert len(indices) == steps * batch_size
        assert epochs.dtype == indices.dtype == np.int64
        for epoch in range(3):
            assert sorted(indices[epochs == epoch]) == list(range(num_examples))
            assert np.flatnonzero(epochs == epoch)[0] == epoch * num_examples


def test_plan_is_keyed_by_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[int]:
        return plan(epoch, seed=seed, num_examples=50, shapes=fixed_shapes(50)).indices.tolist()

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(o) for o in orders}) == 9
    assert order(2**64 - 1, 0) == order(2**64 - 1, 0) != order(0, 0)
    expected = np.random.Generator(np.random.Philox(key=[1, 2])).permutation(50)
    assert order(1, 2) == expected.tolist()


# train_batches


def test_train_batches_follow_the_plan():
    source = Numbered(20)
    batches = take(
        6,
        trained(source, pad_crop(short=8, padding=0), seed=3, batch_size=8, threads=2),
    )
    for step, batch in enumerate(batches):
        indices = plan(step, seed=3, num_examples=20, shapes=fixed_shapes(8)).indices
        assert batch["label"].tolist() == indices.tolist()
        assert batch["label"].dtype == np.int32
        assert batch["mask"].tolist() == [True] * 8
        for row, index in enumerate(indices):
            assert np.array_equal(batch["image"][row], source[index].image)


@pytest.mark.parametrize(
    "transform", [pad_crop(short=8, padding=3, flip=True), random_resized_crop()]
)
def test_threads_and_start_do_not_matter(transform):
    def batches(start: int, threads: int, count: int, prefetch: int = 2) -> list[Batch]:
        made = trained(
            Numbered(50),
            transform,
            seed=5,
            batch_size=21,
            start_step=start,
            threads=threads,
            prefetch=prefetch,
        )
        return take(count, made)

    expected = batches(0, 0, 8)
    assert not same(expected[:1], expected[1:2])
    for threads in (0, 2, 5):
        assert same(batches(0, threads, 8), expected)
        assert same(batches(3, threads, 5), expected[3:])
        assert same(batches(7, threads, 1, prefetch=0), expected[7:])
    assert same(batches(0, 2, 8, prefetch=0), expected)
    assert same(batches(0, 5, 8, prefetch=7), expected)


def test_hosts_share_the_global_batch():
    def batches(host: tuple[int, int], threads: int) -> list[Batch]:
        made = trained(
            Numbered(40),
            pad_crop(short=8, padding=2),
            seed=0,
            batch_size=12,
            threads=threads,
            host=host,
        )
        return take(5, made)

    whole = batches((0, 1), 0)
    for count in (2, 3):
        parts = [batches((index, count), 2) for index in range(count)]
        joined = [
            {key: np.concatenate([part[step][key] for part in parts]) for key in whole[0]}
            for step in range(5)
        ]
        assert same(joined, whole)


def test_augmentation_differs_by_position_and_seed_but_not_the_order():
    def batches(seed: int, transform) -> list[Batch]:
        made = trained(Numbered(6), transform, seed=seed, batch_size=6, threads=0)
        return take(40, made)

    plain = batches(0, pad_crop(short=8, padding=0))
    crops = batches(0, pad_crop(short=8, padding=2))
    mixed = batches(0, random_resized_crop())
    for a, b, c in zip(plain, crops, mixed, strict=True):
        assert a["label"].tolist() == b["label"].tolist() == c["label"].tolist()
    seen = {
        batch["image"][row].tobytes()
        for batch in crops
        for row in range(6)
        if batch["label"][row] == 0
    }
    assert len(seen) > 15  # 40 draws of 25 crops give 20 of them


def test_augmentation_generator():
    for seed, epoch, index in ((0, 0, 0), (5, 1, 0), (5, 300, 2**40 - 1), (2**64 - 1, 0, 7)):
        key = np.array([seed, epoch * 2**40 + index], np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 1]))
        expected = (rng.random(3), rng.integers(9, dtype=np.uint32), rng.random())
        for _ in range(2):  # what was drawn before leaves no trace
            rng = rows.augmentation_rng(seed, epoch, index)
            drawn = (rng.random(3), rng.integers(9, dtype=np.uint32), rng.random())
            assert all(np.array_equal(a, b) for a, b in zip(drawn, expected, strict=True))
        permutes = np.random.Generator(np.random.Philox(key=key))
        assert not np.array_equal(permutes.random(3), expected[0])


def test_batch_larger_than_the_dataset():
    batch, after = take(
        2,
        trained(
            Numbered(3),
            pad_crop(short=8, padding=0),
            seed=0,
            batch_size=10,
            threads=2,
        ),
    )
    labels = [*batch["label"].tolist(), *after["label"].tolist()]
    assert [sorted(labels[i : i + 3]) for i in range(0, 18, 3)] == [[0, 1, 2]] * 6


def test_batches_are_fresh_memory():
    with trained(
        Numbered(8), pad_crop(short=8, padding=0), seed=0, batch_size=8, threads=1
    ) as batches:
        first = next(batches)
        copy = {key: value.copy() for key, value in first.items()}
        for _ in range(6):
            next(batches)["image"][:] = 0
        assert same([first], [copy])


def test_real_digits():
    (batch,) = take(
        1,
        trained(
            sources.digits("train"),
            pad_crop(short=28, padding=2),
            size=(28, 28),
            seed=0,
            batch_size=64,
        ),
    )
    assert batch["image"].shape == (64, 28, 28, 3)
    assert len(set(batch["label"].tolist())) == 10
    assert 20 < batch["image"].mean() < 45  # ink on black


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 10, "host": (0, 4)}, "batch_size 10 cannot be divided among 4 hosts"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"host": (2, 2)}, "host (2, 2)"),
        ({"seed": -1}, "seed is -1"),
        ({"start_step": -1}, "start_step -1"),
        ({"size": (0, 8)}, "shapes are (Shape(height=0, width=8, batch_size=8),)"),
        ({"threads": -1}, "threads=-1"),
        ({"prefetch": -1}, "no number may be below 0"),
        ({"processes": -2}, "processes=-2"),
        ({"max_corrupt": 1.5}, "max_corrupt is 1.5; it is a share"),
    ],
)
def test_train_arguments(arguments: dict, message: str):
    defaults: dict[str, Any] = {"size": (8, 8), "seed": 0, "batch_size": 8}
    with pytest.raises(ValueError) as error:
        trained(Numbered(9), pad_crop(short=8, padding=0), **(defaults | arguments))
    assert message in str(error.value)


def test_empty_source():
    with pytest.raises(DataError, match="no examples"):
        trained(Numbered(0), pad_crop(short=8, padding=0), seed=0, batch_size=8)
    with pytest.raises(DataError, match="no examples"):
        looked_at(Numbered(0), EVALUATION, batch_size=8, threads=0)


# eval_batches


@pytest.mark.parametrize("num_examples", [1, 7, 12, 24, 25])
@pytest.mark.parametrize(("batch_size", "count"), [(1, 1), (12, 1), (12, 2), (12, 3), (40, 4)])
@pytest.mark.parametrize("threads", [0, 3])
def test_eval_counts_every_example_once(
    num_examples: int, batch_size: int, count: int, threads: int
):
    source = Numbered(num_examples)
    hosts = []
    for index in range(count):
        with looked_at(
            source, EVALUATION, batch_size=batch_size, threads=threads, host=(index, count)
        ) as batches:
            hosts.append(list(batches))
            assert next(batches, None) is None  # and it stays at its end
    assert {len(host) for host in hosts} == {num_eval_batches(num_examples, batch_size)}
    labels = []
    for parts in zip(*hosts, strict=True):
        for part in parts:
            rows = batch_size // count
            assert part["image"].shape == (rows, 8, 8, 3)
            assert [part[key].dtype for key in ("image", "label", "mask")] == ["u1", "i4", "?"]
            labels += part["label"][part["mask"]].tolist()
            for row in range(rows):
                if part["mask"][row]:
                    assert np.array_equal(part["image"][row], source[part["label"][row]].image)
                else:
                    assert part["label"][row] == 0
                    assert not part["image"][row].any()
    assert labels == list(range(num_examples))


def test_num_eval_batches():
    assert [num_eval_batches(n, 4) for n in (1, 3, 4, 5, 8, 9)] == [1, 1, 1, 2, 2, 3]


# errors


def photos(root: Path) -> Path:
    for i in range(40):
        path = root / "val" / "ab"[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 20, 3), i, np.uint8)).save(path)
    for name in "ab":
        (root / "train" / name).mkdir(parents=True)
    return root


@pytest.fixture
def broken(tmp_path: Path) -> Source:
    """Of forty photographs, those numbered 17, 18 and 33 are broken."""
    source = sources.folder("val", root=str(photos(tmp_path)))
    Path(source[17].name).write_bytes(Path(source[17].name).read_bytes()[:300])
    Path(source[18].name).write_bytes(b"")
    Path(source[33].name).write_text("not an image")
    return source


WORKERS = [{"threads": 0}, {"threads": 3}, {"threads": 2, "readers": 3}, {"processes": 2}]


@pytest.mark.parametrize("workers", WORKERS)
def test_broken_images_do_not_count_in_evaluation(workers: dict, broken: Source):
    with (
        pytest.warns(UserWarning, match="broken example") as told,
        looked_at(broken, EVALUATION, batch_size=12, max_corrupt=0.1, **workers) as batches,
    ):
        made = list(batches)
    mask = np.concatenate([batch["mask"] for batch in made])
    images = np.concatenate([batch["image"] for batch in made])
    assert np.flatnonzero(~mask).tolist() == [17, 18, 33, *range(40, 48)]
    assert not images[~mask].any()
    assert images[mask][1:].any(axis=(1, 2, 3)).all()
    assert [str(each.message).split(": ")[0] for each in told] == [
        "broken example 1",
        "broken example 2",
        "broken example 3",
    ]
    assert f"cannot decode {broken[18].name} (the file is empty)" in str(told[1].message)


def test_broken_images_are_replaced_in_training(broken: Source):
    def batches(start: int, count: int, **workers: int) -> list[Batch]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            made = trained(
                broken,
                random_resized_crop(),
                batch_size=10,
                start_step=start,
                max_corrupt=0.1,
                **workers,
            )
            batches = take(count, made)
        assert sorted(made.corrupt) == [17, 18, 33]
        assert len(told) == 3  # each is told once, however often it comes
        return batches

    expected = batches(0, 8, threads=0)
    for workers in WORKERS:
        assert same(batches(0, 8, **workers), expected)
        assert same(batches(4, 4, **workers), expected[4:])
    for step in range(8):
        indices = plan(step, seed=0, num_examples=40, shapes=fixed_shapes(10)).indices
        stand_in = {17: 19, 18: 19, 33: 34}
        labels = [broken[stand_in.get(i, i)].label for i in indices.tolist()]
        assert expected[step]["label"].tolist() == labels
        assert expected[step]["mask"].all()


@pytest.mark.parametrize("workers", WORKERS)
def test_too_many_broken_images(workers: dict, broken: Source):
    with (
        pytest.warns(UserWarning, match="broken example [12]"),
        pytest.raises(DataError) as error,
        looked_at(broken, EVALUATION, batch_size=10, max_corrupt=0.05, **workers) as batches,
    ):
        list(batches)
    assert "3 of 40 examples are broken, more than config.max_corrupt (5.00%) allows" in str(
        error.value
    )
    assert f"the last: cannot decode {broken[33].name} (unknown format)" in str(error.value)


def test_nothing_but_broken_images(tmp_path: Path):
    photos(tmp_path)
    for path in tmp_path.glob("val/*/*.jpg"):
        path.write_bytes(b"")
    source = sources.folder("val", root=str(tmp_path))
    with (
        pytest.raises(DataError, match="16 examples in a row are broken; the last: cannot decode"),
        trained(source, random_resized_crop(), batch_size=4, threads=2, max_corrupt=1.0) as batches,
    ):
        next(batches)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_directory_that_vanishes(workers: dict, tmp_path: Path):
    photos(tmp_path)
    source = sources.folder("val", root=str(tmp_path))
    with trained(source, random_resized_crop(), batch_size=4, max_corrupt=1.0, **workers) as made:
        next(made)
        shutil.rmtree(tmp_path / "val")
        with pytest.raises(DataError) as error:
            for _ in range(5):
                next(made)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


# memory


def test_recycled_memory_is_used_again():
    source = Numbered(50)
    expected = take(12, trained(source, pad_crop(short=8, padding=2), batch_size=8))
    for workers in ({"threads": 0}, {"threads": 2}, {"processes": 1}):
        with trained(source, pad_crop(short=8, padding=2), batch_size=8, **workers) as batches:
            seen = set()
            for want in expected:
                batch = next(batches)
                assert same([batch], [want])
                address = batch["image"].ctypes.data
                assert address % 64 == 0  # else jax copies it
                seen.add(address)
                batches.recycle(batch)
        assert len(seen) <= 4


def test_recycling_what_is_not_ours():
    with trained(Numbered(9), pad_crop(short=8, padding=0), batch_size=4, threads=0) as batches:
        batch = next(batches)
        with pytest.raises(ValueError, match="only a batch of these batches"):
            batches.recycle({"image": batch["image"].copy()})


def test_memory_grows_with_the_largest_shape():
    shapes = Shapes((Shape(8, 8, 6), Shape(16, 8, 5), Shape(4, 4, 9)), seed=1)
    arguments: dict[str, Any] = {"shapes": shapes, "seed": 0}
    transform = random_resized_crop()
    fresh = pipeline.train_batches(Numbered(50), transform, **arguments, workers=Workers(threads=0))
    expected = take(12, fresh)
    assert {batch["image"].shape for batch in expected} == {
        (shape.batch_size, shape.height, shape.width, 3) for shape in shapes.table
    }
    for step, batch in enumerate(expected):
        assert len(batch["label"]) == shapes.at(step).batch_size
        assert batch["image"].any(axis=(1, 2, 3)).all()
    for workers in (Workers(threads=2), Workers(processes=2)):
        with pipeline.train_batches(
            Numbered(50), transform, **arguments, start_step=3, workers=workers
        ) as batches:
            for want in expected[3:]:
                batch = next(batches)
                assert same([batch], [want])
                batches.recycle(batch)


# processes


def test_processes_make_the_same_batches_without_jax():
    def batches(**workers: int) -> list[Batch]:
        made = trained(
            WithoutJax(30), random_resized_crop(), batch_size=12, start_step=1, **workers
        )
        return take(4, made)

    assert same(batches(processes=2), batches(threads=0))


@pytest.mark.parametrize("noticed", [False, True], ids=["at once", "later"])
def test_a_killed_process_is_told(noticed):
    with trained(Slow(500), pad_crop(short=8, padding=0), batch_size=100, processes=1) as batches:
        next(batches)
        (child,) = multiprocessing.active_children()
        assert child.pid
        os.kill(child.pid, signal.SIGTERM)  # meant for the run, and ignored by its workers
        next(batches)
        os.kill(child.pid, signal.SIGKILL)
        if noticed:  # the pool takes no more work, rather than losing what it has
            time.sleep(1)
        with pytest.raises(DataError, match="a loader process was killed"):
            for _ in range(9):
                next(batches)


def test_processes_end_with_the_run():
    text = (
        "from tests.data.test_pipeline import Slow, trained, pad_crop\n"
        "import multiprocessing, os\n"
        "if __name__ == '__main__':\n"
        "    transform = pad_crop(short=8, padding=0)\n"
        "    batches = trained(Slow(500), transform, batch_size=8, processes=1)\n"
        "    next(batches)\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    run = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=ROOT)
    worker = int(run.stdout)
    deadline = time.perf_counter() + 60
    while _alive(worker) and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert not _alive(worker)


def _alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


# threads


def test_prefetch_works_so_far_ahead_and_no_further():
    reads = []

    def read(record: Record, rng: np.random.Generator, out: np.ndarray) -> None:
        reads.append(record.label)

    def settles_at(count: int) -> bool:
        deadline = time.perf_counter() + 60
        while len(reads) < count and time.perf_counter() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        return len(reads) == count

    with trained(Numbered(100), read, seed=0, batch_size=10, threads=3, prefetch=2) as batches:
        assert settles_at(20)  # before anyone asks
        next(batches)
        assert settles_at(30)
    reads.clear()
    with trained(Numbered(100), read, seed=0, batch_size=10, threads=0, prefetch=2) as batches:
        assert settles_at(0)
        next(batches)
        assert settles_at(10)


def test_close_is_prompt_and_final():
    begun = []

    def read(record: Record, rng: np.random.Generator, out: np.ndarray) -> None:
        begun.append(record.label)
        time.sleep(0.5)

    batches = trained(Numbered(1000), read, seed=0, batch_size=500, threads=2)
    while not begun:
        time.sleep(0.01)
    before = len(begun)
    batches.close()
    assert len(begun) <= before + 4  # of a piece of 8 for each thread, and 500 in flight
    assert not workers()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)
    with looked_at(Numbered(9), EVALUATION, batch_size=4, threads=0) as batches:
        next(batches)
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_leaving_the_context_by_an_error_stops_the_threads():
    with (
        pytest.raises(KeyError),
        trained(
            Slow(1000),
            pad_crop(short=8, padding=0),
            seed=0,
            batch_size=100,
            threads=2,
        ) as batches,
    ):
        next(batches)
        raise KeyError
    assert not workers()


def test_an_abandoned_iterator_stops_its_threads():
    batches = trained(
        Slow(1000),
        pad_crop(short=8, padding=0),
        seed=0,
        batch_size=500,
        threads=2,
        prefetch=3,
    )
    assert workers()
    del batches
    gc.collect()
    deadline = time.perf_counter() + 60
    while workers() and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert not workers()


def testdefault_threads(monkeypatch: pytest.MonkeyPatch):
    for cores, threads in ((1, 1), (3, 3), (96, 16)):
        monkeypatch.setattr(
            pipeline.os, "sched_getaffinity", lambda pid, n=cores: set(range(n)), raising=False
        )
        assert pipeline.default_threads() == threads
