"""Batches: pure in (seed, step), whatever the threads and hosts; every example where it belongs."""

import dataclasses
import gc
import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mobilevit_jax.data import pipeline, sources
from mobilevit_jax.data.pipeline import Batch, eval_batches, num_eval_batches, plan, train_batches
from mobilevit_jax.data.record import DataError, Record
from mobilevit_jax.data.transforms import InputSpec, evaluation, pad_crop, random_resized_crop

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
            plan(step, seed=1, num_examples=num_examples, batch_size=batch_size)
            for step in range(steps)
        ]
        positions = np.concatenate([p.positions for p in plans])
        epochs = np.concatenate([p.epochs for p in plans])
        indices = np.concatenate([p.indices for p in plans])
        assert positions.tolist() == list(range(steps * batch_size))
        assert positions.dtype == epochs.dtype == indices.dtype == np.int64
        for epoch in range(3):
            assert sorted(indices[epochs == epoch]) == list(range(num_examples))
            assert np.flatnonzero(epochs == epoch)[0] == epoch * num_examples


def test_plan_is_keyed_by_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[int]:
        return plan(epoch, seed=seed, num_examples=50, batch_size=50).indices.tolist()

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
        train_batches(
            source, pad_crop(resize=8, padding=0), size=(8, 8), seed=3, batch_size=8, threads=2
        ),
    )
    for step, batch in enumerate(batches):
        indices = plan(step, seed=3, num_examples=20, batch_size=8).indices
        assert batch["label"].tolist() == indices.tolist()
        assert batch["label"].dtype == np.int32
        assert batch["mask"].tolist() == [True] * 8
        for row, index in enumerate(indices):
            assert np.array_equal(batch["image"][row], source[index].image)


@pytest.mark.parametrize(
    "transform", [pad_crop(resize=8, padding=3, flip=True), random_resized_crop()]
)
def test_threads_and_start_do_not_matter(transform):
    def batches(start: int, threads: int, count: int, prefetch: int = 2) -> list[Batch]:
        made = train_batches(
            Numbered(50),
            transform,
            size=(8, 8),
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
        made = train_batches(
            Numbered(40),
            pad_crop(resize=8, padding=2),
            size=(8, 8),
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
        made = train_batches(
            Numbered(6), transform, size=(8, 8), seed=seed, batch_size=6, threads=0
        )
        return take(40, made)

    plain = batches(0, pad_crop(resize=8, padding=0))
    crops = batches(0, pad_crop(resize=8, padding=2))
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
    for seed, position in ((0, 0), (5, 2**40), (2**64 - 1, 7)):
        key = np.array([seed, position], np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 1]))
        expected = (rng.random(3), rng.integers(9, dtype=np.uint32), rng.random())
        for _ in range(2):  # what was drawn before leaves no trace
            rng = pipeline._augmentation_rng(seed, position)
            drawn = (rng.random(3), rng.integers(9, dtype=np.uint32), rng.random())
            assert all(np.array_equal(a, b) for a, b in zip(drawn, expected, strict=True))
        permutes = np.random.Generator(np.random.Philox(key=key))
        assert not np.array_equal(permutes.random(3), expected[0])


def test_batch_larger_than_the_dataset():
    batch, after = take(
        2,
        train_batches(
            Numbered(3),
            pad_crop(resize=8, padding=0),
            size=(8, 8),
            seed=0,
            batch_size=10,
            threads=2,
        ),
    )
    labels = [*batch["label"].tolist(), *after["label"].tolist()]
    assert [sorted(labels[i : i + 3]) for i in range(0, 18, 3)] == [[0, 1, 2]] * 6


def test_batches_are_fresh_memory():
    with train_batches(
        Numbered(8), pad_crop(resize=8, padding=0), size=(8, 8), seed=0, batch_size=8, threads=1
    ) as batches:
        first = next(batches)
        copy = {key: value.copy() for key, value in first.items()}
        for _ in range(6):
            next(batches)["image"][:] = 0
        assert same([first], [copy])


def test_real_digits():
    (batch,) = take(
        1,
        train_batches(
            sources.digits("train"),
            pad_crop(resize=28, padding=2),
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
        ({"batch_size": 0}, "batch_size is 0"),
        ({"host": (2, 2)}, "host (2, 2)"),
        ({"seed": -1}, "seed is -1"),
        ({"start_step": -1}, "start_step -1"),
        ({"size": (0, 8)}, "size is (0, 8)"),
        ({"threads": -1}, "threads is -1"),
        ({"prefetch": -1}, "prefetch -1"),
    ],
)
def test_train_arguments(arguments: dict, message: str):
    defaults: dict[str, Any] = {"size": (8, 8), "seed": 0, "batch_size": 8}
    with pytest.raises(ValueError) as error:
        train_batches(Numbered(9), pad_crop(resize=8, padding=0), **(defaults | arguments))
    assert message in str(error.value)


def test_empty_source():
    with pytest.raises(DataError, match="no examples"):
        train_batches(Numbered(0), pad_crop(resize=8, padding=0), size=(8, 8), seed=0, batch_size=8)
    with pytest.raises(DataError, match="no examples"):
        eval_batches(Numbered(0), EVALUATION, batch_size=8, threads=0)


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
        with eval_batches(
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


def test_transform_of_changing_size():
    def crooked(record: Record) -> np.ndarray:
        return np.zeros((8, 8 + record.label // 5, 3), np.uint8)

    with eval_batches(Numbered(8), crooked, batch_size=8, threads=0) as batches:
        with pytest.raises(ValueError) as error:
            next(batches)
        assert "made uint8 (8, 9, 3) of numbered[5]; this batch holds uint8 (8, 8, 3)" in str(
            error.value
        )


# errors


def photos(root: Path) -> Path:
    for i in range(40):
        path = root / "val" / "ab"[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 20, 3), i, np.uint8)).save(path)
    for name in "ab":
        (root / "train" / name).mkdir(parents=True)
    return root


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_a_corrupt_image_surfaces_in_its_batch(threads: int, tmp_path: Path):
    photos(tmp_path)
    source = sources.folder("val", root=str(tmp_path))
    names = [source[i].name for i in range(40)]
    for i in (17, 19, 33):  # in the second batch of 10 and in the fourth
        Path(names[i]).write_bytes(Path(names[i]).read_bytes()[:300])
    seen: list[object] = []
    with eval_batches(source, EVALUATION, batch_size=10, threads=threads) as batches:
        for _ in range(4):
            try:
                seen.append(next(batches)["label"].tolist())
            except DataError as error:
                seen.append(str(error).split(" (")[0])
    assert seen == [
        [0] * 10,
        f"cannot decode {names[17]}",
        [1] * 10,
        f"cannot decode {names[33]}",
    ]


def test_a_corrupt_image_surfaces_in_training(tmp_path: Path):
    photos(tmp_path)
    source = sources.folder("val", root=str(tmp_path))
    bad = source[5].name
    Path(bad).write_text("not an image")
    step = next(
        step for step in range(4) if 5 in plan(step, seed=0, num_examples=40, batch_size=10).indices
    )
    with train_batches(
        source, random_resized_crop(), size=(8, 8), seed=0, batch_size=10, threads=2
    ) as batches:
        for _ in range(step):
            next(batches)
        with pytest.raises(DataError) as error:
            next(batches)
    assert f"cannot decode {bad} (unknown format)" in str(error.value)


# threads


def test_prefetch_works_so_far_ahead_and_no_further():
    reads = []

    def read(record: Record, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        reads.append(record.label)
        return np.asarray(record.image)

    def settles_at(count: int) -> bool:
        deadline = time.perf_counter() + 5
        while len(reads) < count and time.perf_counter() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        return len(reads) == count

    with train_batches(
        Numbered(100), read, size=(8, 8), seed=0, batch_size=10, threads=3, prefetch=2
    ) as batches:
        assert settles_at(20)  # before anyone asks
        next(batches)
        assert settles_at(30)
    reads.clear()
    with train_batches(
        Numbered(100), read, size=(8, 8), seed=0, batch_size=10, threads=0, prefetch=2
    ) as batches:
        assert settles_at(0)
        next(batches)
        assert settles_at(10)


def test_close_is_prompt_and_final():
    batches = train_batches(
        Slow(1000, seconds=0.1),
        pad_crop(resize=8, padding=0),
        size=(8, 8),
        seed=0,
        batch_size=500,
        threads=2,
    )
    time.sleep(0.05)
    begin = time.perf_counter()
    batches.close()
    assert time.perf_counter() - begin < 0.5  # a piece takes 0.8 s, what is in flight 50 s
    assert not workers()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)
    with eval_batches(Numbered(9), EVALUATION, batch_size=4, threads=0) as batches:
        next(batches)
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_leaving_the_context_by_an_error_stops_the_threads():
    with (
        pytest.raises(KeyError),
        train_batches(
            Slow(1000),
            pad_crop(resize=8, padding=0),
            size=(8, 8),
            seed=0,
            batch_size=100,
            threads=2,
        ) as batches,
    ):
        next(batches)
        raise KeyError
    assert not workers()


def test_an_abandoned_iterator_stops_its_threads():
    batches = train_batches(
        Slow(1000),
        pad_crop(resize=8, padding=0),
        size=(8, 8),
        seed=0,
        batch_size=500,
        threads=2,
        prefetch=3,
    )
    assert workers()
    del batches
    gc.collect()
    deadline = time.perf_counter() + 2
    while workers() and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert not workers()


def test_default_threads(monkeypatch: pytest.MonkeyPatch):
    for cores, threads in ((1, 1), (3, 3), (96, 16)):
        monkeypatch.setattr(
            pipeline.os, "sched_getaffinity", lambda pid, n=cores: set(range(n)), raising=False
        )
        assert pipeline._default_threads() == threads
