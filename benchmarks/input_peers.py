"""The engines that benchmarks/input.py compares, and the measurement of one of them.

Run by input.py in a fresh process for every measurement: `python input_peers.py ENGINE ...` prints
one line of JSON. An engine is an endless iterator of batches, uint8 [128, 256, 256, 3] (PyTorch's
are [128, 3, 256, 256]), over the same files. All draw torchvision's crop boxes: what TensorFlow and
Grain users would take instead is another recipe with smaller crops. Each engine imports what it
needs in its own function, because imports are part of the time to the first batch.
"""

import argparse
import collections
import concurrent.futures
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SIZE = 256
BATCH = 128
SEED = 0
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
SHORT_SIDE = 288  # of the evaluation, before the centre crop
EXTRA = 2  # batches after the timed ones, at which memory is sampled


class Engine(NamedTuple):
    """Something that makes batches out of the set's directory, on a number of cores."""

    label: str
    part: str  # of the set
    needs: tuple[str, ...]  # importable modules
    batches: Callable[[Path, int], Iterator[Any]]


def ours(root: Path, *, resize: str = "fast_aa", policy: str = "none") -> Iterator[Any]:
    """The project's training batches, as its train loop reads them."""
    from mobilevit_jax.data.augment import POLICIES
    from mobilevit_jax.data.multiscale import fixed
    from mobilevit_jax.data.pipeline import train_batches
    from mobilevit_jax.data.sources import folder
    from mobilevit_jax.data.transforms import random_resized_crop

    transform = random_resized_crop(
        scale=SCALE, ratio=RATIO, resize=resize, policy=POLICIES[policy]()
    )
    source = folder("train", root=str(root))
    shapes = fixed(size=(SIZE, SIZE), batch_size=BATCH, seed=SEED, multiple_of=1)
    with train_batches(source, transform, shapes=shapes, seed=SEED) as batches:
        for batch in batches:
            yield batch["image"]
            batches.recycle(batch)


def ours_evaluation(root: Path) -> Iterator[Any]:
    """The project's evaluation batches, again and again."""
    from mobilevit_jax.data.pipeline import eval_batches
    from mobilevit_jax.data.sources import folder
    from mobilevit_jax.data.transforms import InputSpec, evaluation

    spec = InputSpec(
        size=(SIZE, SIZE),
        resize=SHORT_SIDE,
        interpolation="bilinear",
        channel_order="rgb",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    source = _Again(folder("val", root=str(root)))
    with eval_batches(source, evaluation(spec), size=(SIZE, SIZE), batch_size=BATCH) as batches:
        for batch in batches:
            yield batch["image"]
            batches.recycle(batch)


class _Again:
    """A source as if it were a hundred times as long, so that evaluation does not end."""

    def __init__(self, source: Any) -> None:
        self.class_names = source.class_names
        self._source = source

    def __len__(self) -> int:
        return 100 * len(self._source)

    def __getitem__(self, i: int) -> Any:
        return self._source[i % len(self._source)]


def tf_data(shards: Path, cores: int, *, antialias: bool) -> Iterator[Any]:
    """tf.data as big_vision and Flax's ImageNet example write it: decode_and_crop_jpeg, AUTOTUNE.

    Only the crop boxes are torchvision's, drawn by TensorFlow's operators.
    """
    import tensorflow as tf

    auto = tf.data.AUTOTUNE
    features = {
        "image": tf.io.FixedLenFeature([], tf.string),
        "label": tf.io.FixedLenFeature([], tf.int64),
    }

    def draw_box(height: tf.Tensor, width: tf.Tensor) -> list[tf.Tensor]:
        h, w = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
        area = h * w * tf.random.uniform([10], *SCALE)
        ratio = tf.exp(tf.random.uniform([10], math.log(RATIO[0]), math.log(RATIO[1])))
        heights = tf.cast(tf.round(tf.sqrt(area / ratio)), tf.int32)
        widths = tf.cast(tf.round(tf.sqrt(area * ratio)), tf.int32)
        fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
        first = tf.argmax(tf.cast(fits, tf.int32))
        fallback_height = tf.minimum(height, tf.cast(tf.round(w / RATIO[0]), tf.int32))
        fallback_width = tf.minimum(width, tf.cast(tf.round(h * RATIO[1]), tf.int32))
        fitted = tf.reduce_any(fits)
        crop_height = tf.where(fitted, heights[first], fallback_height)
        crop_width = tf.where(fitted, widths[first], fallback_width)
        rest_height, rest_width = height - crop_height, width - crop_width
        place = tf.random.uniform([2])
        top = tf.cast(place[0] * tf.cast(rest_height + 1, tf.float32), tf.int32)
        left = tf.cast(place[1] * tf.cast(rest_width + 1, tf.float32), tf.int32)
        top = tf.where(fitted, tf.minimum(top, rest_height), rest_height // 2)
        left = tf.where(fitted, tf.minimum(left, rest_width), rest_width // 2)
        return [top, left, crop_height, crop_width]

    def prepare(example: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        parsed = tf.io.parse_single_example(example, features)
        shape = tf.io.extract_jpeg_shape(parsed["image"])
        box = tf.stack(draw_box(shape[0], shape[1]))
        image = tf.io.decode_and_crop_jpeg(parsed["image"], box, channels=3)
        image = tf.image.resize(image, [SIZE, SIZE], "bilinear", antialias=antialias)
        return tf.image.random_flip_left_right(tf.cast(image, tf.uint8)), parsed["label"]

    names = sorted(str(path) for path in shards.iterdir())
    dataset = tf.data.Dataset.from_tensor_slices(names).shuffle(len(names), seed=SEED).repeat()
    dataset = dataset.interleave(
        tf.data.TFRecordDataset, cycle_length=len(names), num_parallel_calls=auto
    )
    dataset = dataset.shuffle(512, seed=SEED).map(prepare, num_parallel_calls=auto)
    dataset = dataset.batch(BATCH, drop_remainder=True).prefetch(auto)
    options = tf.data.Options()
    options.deterministic = False
    options.threading.private_threadpool_size = cores + 1
    for image, _ in dataset.with_options(options).as_numpy_iterator():
        yield image


def grain_pil(root: Path, cores: int) -> Iterator[Any]:
    """Grain's MapDataset on threads, decoding and resizing with Pillow."""
    import grain
    import numpy as np
    from PIL import Image

    class Files:
        def __init__(self, paths: list[Path]) -> None:
            self._paths = paths

        def __len__(self) -> int:
            return len(self._paths)

        def __getitem__(self, i: int) -> tuple[Path, int]:
            return self._paths[i], int(self._paths[i].parent.name.removeprefix("class_"))

    class Crop(grain.transforms.RandomMap):
        def random_map(self, element: tuple[Path, int], rng: np.random.Generator) -> Any:
            path, number = element
            with Image.open(path) as opened:
                image = opened.convert("RGB")
            top, left, height, width = draw_box(image.height, image.width, rng)
            image = image.crop((left, top, left + width, top + height))
            image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            if rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return {"image": np.asarray(image), "label": number}

    dataset = grain.MapDataset.source(Files(_files(root)))
    dataset = dataset.seed(SEED).shuffle().repeat().random_map(Crop())
    options = grain.ReadOptions(num_threads=cores + 1, prefetch_buffer_size=2 * BATCH)
    for batch in dataset.to_iter_dataset(options).batch(BATCH, drop_remainder=True):
        yield batch["image"]


def draw_box(height: int, width: int, rng: Any) -> tuple[int, int, int, int]:
    """Top, left, height, width: torchvision's RandomResizedCrop.get_params."""
    for share in rng.uniform(*SCALE, size=10):
        area = height * width * share
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def torch_pil(root: Path, cores: int) -> Iterator[Any]:
    """PyTorch's DataLoader, one worker process a core, with timm's transforms and collate."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    # timm imports torchvision, whose operators do not load beside a torch without CUDA.
    if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        library.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    from timm.data import ImageDataset, create_transform
    from timm.data.loader import fast_collate

    transform = create_transform(
        SIZE,
        is_training=True,
        use_prefetcher=True,  # uint8 arrays; normalised on the device
        scale=SCALE,
        ratio=RATIO,
        hflip=0.5,
        color_jitter=None,
        auto_augment=None,
        interpolation="bilinear",
    )
    dataset = ImageDataset(str(root / "train"), transform=transform)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=BATCH,
        # More than one epoch in one go: the workers would wait at the border of two.
        sampler=torch.utils.data.RandomSampler(dataset, num_samples=1000 * BATCH),
        num_workers=cores,
        collate_fn=fast_collate,
        drop_last=True,
    )
    for image, _ in loader:
        yield image.numpy()


def raw_decode(root: Path, cores: int) -> Iterator[Any]:
    """Whole images through libjpeg-turbo, from memory, one thread a core: nothing but decoding."""
    import threading

    import numpy as np
    import simplejpeg

    data = [path.read_bytes() for path in _files(root)]
    pixels = 3 * max(math.prod(simplejpeg.decode_jpeg_header(item)[:2]) for item in data)
    thread = threading.local()

    def decode(item: bytes) -> None:
        if not hasattr(thread, "buffer"):
            thread.buffer = np.empty(pixels, np.uint8)
        simplejpeg.decode_jpeg(item, "RGB", buffer=thread.buffer)

    blank = np.zeros((BATCH, SIZE, SIZE, 3), np.uint8)  # the engine's batches carry no pictures
    yield from (blank for _ in _threaded(decode, itertools.cycle(data), cores))


def pillow_evaluation(root: Path, cores: int) -> Iterator[Any]:
    """Evaluation as torchvision does it: the whole image decoded and resized, then cropped."""
    import numpy as np
    from PIL import Image

    def view(path: Path) -> np.ndarray:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        short = min(image.size)
        width, height = (int(SHORT_SIDE * side / short) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - SIZE) // 2, (height - SIZE) // 2
        return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))

    paths = itertools.cycle(_files(root))
    for images in _threaded(view, paths, cores):
        yield np.stack(images)


def _files(root: Path) -> list[Path]:
    return sorted(root.glob("train/*/*.jpg"))


def _threaded(work: Callable[[Any], Any], items: Iterable[Any], cores: int) -> Iterator[list[Any]]:
    """`work` of BATCH items after another on threads that are kept two batches ahead."""

    def piece(chunk: list[Any]) -> list[Any]:
        return [work(item) for item in chunk]

    endless = iter(items)
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        flight: collections.deque[concurrent.futures.Future[list[Any]]] = collections.deque()
        while True:
            while len(flight) < 3 * BATCH // 8:
                flight.append(pool.submit(piece, list(itertools.islice(endless, 8))))
            yield [result for _ in range(BATCH // 8) for result in flight.popleft().result()]


OURS = ("mobilevit_jax", "simplejpeg", "cv2")
ENGINES = {
    "ours": Engine("ours, plain JPEG", "plain", OURS, lambda d, c: ours(d)),
    "ours_linear": Engine(
        "ours, plain JPEG, no antialias", "plain", OURS, lambda d, c: ours(d, resize="linear")
    ),
    "ours_randaugment": Engine(
        "ours, plain JPEG, RandAugment",
        "plain",
        OURS,
        lambda d, c: ours(d, policy="rand_augment"),
    ),
    "ours_restart": Engine("ours, restart markers", "restart", OURS, lambda d, c: ours(d)),
    "ours_restart_randaugment": Engine(
        "ours, restart markers, RandAugment",
        "restart",
        OURS,
        lambda d, c: ours(d, policy="rand_augment"),
    ),
    "ours_shrunk": Engine("ours, shrunk to 384", "shrunk", OURS, lambda d, c: ours(d)),
    "tf_data": Engine(
        "tf.data, no antialias",
        "tfrecord",
        ("tensorflow",),
        lambda d, c: tf_data(d, c, antialias=False),
    ),
    "tf_data_antialias": Engine(
        "tf.data, antialias",
        "tfrecord",
        ("tensorflow",),
        lambda d, c: tf_data(d, c, antialias=True),
    ),
    "grain": Engine("Grain MapDataset + Pillow", "plain", ("grain",), grain_pil),
    "torch": Engine(
        "PyTorch DataLoader + Pillow (timm)", "plain", ("torch", "torchvision", "timm"), torch_pil
    ),
    "raw_decode": Engine(
        "libjpeg-turbo, whole images: the limit", "plain", ("simplejpeg",), raw_decode
    ),
    "ours_evaluation": Engine("evaluation: ours", "plain", OURS, lambda d, c: ours_evaluation(d)),
    "pillow_evaluation": Engine("evaluation: Pillow, whole images", "plain", (), pillow_evaluation),
}


def measure(batches: Iterator[Any], *, warm: int, count: int, started: float) -> dict[str, float]:
    """Times `count` batches after `warm` others, and samples memory before and after these.

    CPU time and memory are those of this process and its children. `others_cores` is how much of
    the cores went to anybody else meanwhile: where it is not near 0, only CPU times tell something.
    """
    first = next(batches)
    first_batch = time.monotonic() - started
    if (
        first.shape not in ((BATCH, SIZE, SIZE, 3), (BATCH, 3, SIZE, SIZE))
        or first.dtype != "uint8"
    ):
        raise RuntimeError(f"the engine makes batches of {first.dtype} {first.shape}")
    del first
    memory = [_memory()]
    for _ in range(warm):
        next(batches)
    busy, cpu, clock = _busy_seconds(), _cpu_seconds(), time.monotonic()
    for _ in range(count):
        next(batches)
    clock, cpu, busy = time.monotonic() - clock, _cpu_seconds() - cpu, _busy_seconds() - busy
    for _ in range(EXTRA):
        memory.append(_memory())
        next(batches)
    images = count * BATCH
    return {
        "images_per_s": images / clock,
        "cpu_ms": 1000 * cpu / images,
        "first_batch_s": first_batch,
        "memory_mb": max(memory) / 1e6,
        "others_cores": max(busy - cpu, 0.0) / clock,
    }


def _family() -> list[Any]:
    import psutil

    process = psutil.Process()
    return [process, *process.children(recursive=True)]


def _memory() -> float:
    return sum(process.memory_full_info().pss for process in _family())


def _cpu_seconds() -> float:
    return sum(sum(process.cpu_times()[:2]) for process in _family())


def _busy_seconds() -> float:
    """Time that the cores of this process were not idle, stolen by the hypervisor included."""
    import psutil

    times = psutil.cpu_times(percpu=True)
    return sum(
        core.user + core.nice + core.system + core.irq + core.softirq + core.steal
        for core in (times[number] for number in os.sched_getaffinity(0))
    )


def main() -> None:
    """Measures one engine, and prints the numbers as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--data", type=Path, required=True, help="directory of the set")
    parser.add_argument("--cores", type=int, required=True)
    parser.add_argument("--warm", type=int, required=True, help="batches before the timed ones")
    parser.add_argument("--batches", type=int, required=True, help="timed batches")
    parser.add_argument("--started", type=float, required=True, help="time.monotonic() at launch")
    arguments = parser.parse_args()
    engine = ENGINES[arguments.engine]
    result = measure(
        engine.batches(arguments.data / engine.part, arguments.cores),
        warm=arguments.warm,
        count=arguments.batches,
        started=arguments.started,
    )
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
