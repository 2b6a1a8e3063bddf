"""The ImageNet-like set of JPEGs that benchmarks/input.py measures with, made from photographs.

The photographs come from pip and Debian packages; `PHOTOGRAPHS` names them. Sizes, bit rates,
qualities, chroma and the shares of grey and progressive files imitate ImageNet's. How long a JPEG
takes to decode follows its bits per pixel, so these are drawn too, and sensor noise is added until
a file has them. Everything is drawn from (SEED, number of the image): the same photographs and the
same Pillow make the same files.
"""

import concurrent.futures
import functools
import importlib.util
import io
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageEnhance, ImageFilter

SEED = 2026
NUM_IMAGES = 2000
NUM_CLASSES = 50
NUM_SHARDS = 8  # of the TFRecord files
SHORT_SIDE, SHRUNK_QUALITY = 384, 90
MIN_PHOTOGRAPHS = 25  # with fewer, the set would be a few pictures over and over
MAX_NOISE = 24.0  # standard deviation, in levels

PARTS = {
    "plain": "as a camera or an editor would write them",
    "restart": "the same pixels, repacked with restart markers and a table of segments",
    "shrunk": f"short side at most {SHORT_SIDE}, quality {SHRUNK_QUALITY}, with restart markers",
    "tfrecord": f"the plain files in {NUM_SHARDS} TFRecord shards",
}


class Package(NamedTuple):
    """Photographs of one package."""

    install: str  # what to type to have it
    folder: str  # absolute, or the name of a Python package
    files: tuple[str, ...]


PHOTOGRAPHS = (
    Package(
        "pip install scikit-learn",
        "sklearn",
        ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    ),
    Package(
        "pip install scikit-image",
        "skimage",
        (
            "data/astronaut.png",
            "data/chelsea.png",
            "data/coffee.png",
            "data/motorcycle_left.png",
            "data/rocket.jpg",
        ),
    ),
    Package("pip install matplotlib", "matplotlib", ("mpl-data/sample_data/grace_hopper.jpg",)),
    Package(
        "apt-get install lomiri-wallpapers-16.04",
        "/usr/share/backgrounds",
        (
            "Bridge_by_Sander_Klootwijk.jpg",
            "Dragonfly_by_Bolly.jpg",
            "Picture_0B_by_freespace.jpg",
            "Picture_1A_by_freespace.jpg",
            "Wine_by_Jakkub_Mede.jpg",
            "aitzgorri_by_Aitzol_Berasategi.jpg",
            "free_by_Peter_Nerlich.jpg",
            "friends_by_Aitzol_Berasategi.jpg",
            "greentock_by_Peter_Nerlich.jpg",
            "life_by_Aitzol_Berasategi.jpg",
            "picosdeeuropa_by_Aitzol_Berasategi.jpg",
            "seeding_by_Clements_Engelhardt.jpg",
            "sunset_by_Aitzol_Berasategi.jpg",
        ),
    ),
    Package(
        "apt-get install lomiri-wallpapers-20.04",
        "/usr/share/backgrounds",
        ("Kleiber_by_Lukas_Baubkus.jpg",),
    ),
    Package(
        "apt-get install mate-backgrounds",
        "/usr/share/backgrounds/mate/nature",
        (
            "Aqua.jpg",
            "Blinds.jpg",
            "Dune.jpg",
            "Garden.jpg",
            "GreenMeadow.jpg",
            "LadyBird.jpg",
            "RainDrops.jpg",
            "Storm.jpg",
            "TwoWings.jpg",
            "Wood.jpg",
            "YellowFlower.jpg",
        ),
    ),
    Package(
        "apt-get install plasma-workspace-wallpapers",
        "/usr/share/wallpapers",
        tuple(
            f"{name}/contents/images/2560x1600.jpg"
            for name in (
                "BytheWater",
                "ColdRipple",
                "ColorfulCups",
                "DarkestHour",
                "EveningGlow",
                "FallenLeaf",
                "Grey",
                "Kite",
                "OneStandsOut",
                "Path",
                "summer_1am",
            )
        ),
    ),
)

# (height, width) of the 35 % and of the 4 %; 45 % are 375x500, the rest is random.
COMMON = (
    (500, 375),
    (333, 500),
    (500, 333),
    (375, 500),
    (334, 500),
    (400, 500),
    (500, 400),
    (500, 500),
)
LARGE = ((480, 640), (640, 480), (600, 800), (768, 1024), (1200, 1600))
# Quality -> (share of the files, bits per pixel in their middle).
QUALITIES = {
    75: (0.05, 2.0),
    85: (0.10, 2.7),
    90: (0.10, 3.2),
    92: (0.10, 3.4),
    95: (0.50, 4.0),
    98: (0.15, 5.0),
}
SPREAD = 0.25  # of the logarithm of the bits per pixel


class Recipe(NamedTuple):
    """How one image of the set is made."""

    index: int
    photograph: int
    height: int
    width: int
    quality: int
    subsampling: str
    progressive: bool
    grey: bool
    bits: float  # per pixel, aimed at


def build(directory: Path, *, report: Callable[[str], None]) -> dict[str, Any]:
    """Builds what is missing of the set, and returns its statistics.

    Each part is `directory/PART/{train,val}/CLASS/NUMBER.jpg`, both splits being the same files;
    the part "tfrecord" is shards. A part for which a program or package is missing is left out.

    Raises:
      RuntimeError: too few photographs are installed.
    """
    makers: dict[str, Callable[[Path], None]] = {
        "plain": _make_plain,
        "restart": functools.partial(_convert, directory / "plain", _restart),
        "shrunk": functools.partial(_convert, directory / "plain", _shrink),
        "tfrecord": functools.partial(_make_tfrecords, directory / "plain"),
    }
    for part, make in makers.items():
        if (directory / part).is_dir():
            continue
        if part == "tfrecord" and importlib.util.find_spec("tensorflow") is None:
            report(f"{directory / part} is left out: TensorFlow is not installed")
            continue
        if part in ("restart", "shrunk") and shutil.which("jpegtran") is None:
            report(f"{directory / part} is left out; type: apt-get install libjpeg-turbo-progs")
            continue
        report(f"building {directory / part}: {PARTS[part]}")
        unfinished = directory / f"{part}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(unfinished)
        if part != "tfrecord":
            (unfinished / "val").symlink_to("train")
        unfinished.rename(directory / part)
    return _statistics(directory)


def files(directory: Path, part: str) -> list[Path]:
    """The JPEGs of one part, in order."""
    return sorted((directory / part / "train").glob("*/*.jpg"), key=lambda path: path.name)


def label(path: Path) -> int:
    """Class of one of `files`."""
    return int(path.parent.name.removeprefix("class_"))


def photographs() -> tuple[list[Path], list[str]]:
    """The photographs that are installed, and what to type for the others."""
    found, missing = [], []
    for package in PHOTOGRAPHS:
        folder = Path(package.folder)
        if not folder.is_absolute():
            spec = importlib.util.find_spec(package.folder)
            places = spec.submodule_search_locations if spec else None
            folder = Path(places[0]) if places else Path("/nonexistent")
        paths = [folder / name for name in package.files]
        found += [path for path in paths if path.is_file()]
        if not all(path.is_file() for path in paths):
            missing.append(package.install)
    return found, missing


def _make_plain(target: Path) -> None:
    found, missing = photographs()
    if len(found) < MIN_PHOTOGRAPHS:
        raise RuntimeError(
            f"only {len(found)} photographs are installed, at least {MIN_PHOTOGRAPHS} are needed: "
            + "; ".join(missing)
        )
    sizes = []
    for path in found:
        with Image.open(path) as image:
            sizes.append((image.height, image.width))
    recipes = [_recipe(index, sizes) for index in range(NUM_IMAGES)]
    for name in range(NUM_CLASSES):
        (target / "train" / f"class_{name:02d}").mkdir(parents=True)
    with _processes() as pool:
        jobs = [
            pool.submit(_render_all, path, [r for r in recipes if r.photograph == number], target)
            for number, path in enumerate(found)
        ]
        for job in jobs:
            job.result()
    about = {
        "photographs": [str(path) for path in found],
        "missing": missing,
        "recipes": [recipe._asdict() for recipe in recipes],
        "pillow": PIL.__version__,
    }
    (target / "about.json").write_text(json.dumps(about, indent=1))


def _recipe(index: int, sizes: list[tuple[int, int]]) -> Recipe:
    rng = np.random.Generator(np.random.Philox(key=[SEED, index]))
    kind = rng.random()
    if kind < 0.45:
        height, width = 375, 500
    elif kind < 0.80:
        height, width = COMMON[rng.integers(len(COMMON))]
    elif kind < 0.84:
        height, width = LARGE[rng.integers(len(LARGE))]
    else:
        height, width = (int(side) for side in rng.integers(180, 641, size=2))
    large_enough = [i for i, (h, w) in enumerate(sizes) if h >= height and w >= width]
    shares = [share for share, _ in QUALITIES.values()]
    quality = int(rng.choice(list(QUALITIES), p=shares))
    return Recipe(
        index=index,
        photograph=int(rng.choice(large_enough)),
        height=height,
        width=width,
        quality=quality,
        subsampling="4:2:0" if rng.random() < 0.7 else "4:4:4",
        progressive=bool(rng.random() < 0.02),
        grey=bool(rng.random() < 0.015),
        bits=QUALITIES[quality][1] * math.exp(SPREAD * rng.standard_normal()),
    )


def _render_all(path: Path, recipes: list[Recipe], target: Path) -> None:
    with Image.open(path) as image:
        photograph = image.convert("RGB")
    for recipe in recipes:
        name = f"class_{recipe.index % NUM_CLASSES:02d}/{recipe.index:06d}.jpg"
        (target / "train" / name).write_bytes(_render(photograph, recipe))


def _render(photograph: Image.Image, recipe: Recipe) -> bytes:
    """A crop at one to three times the size, changed a little; noise gives it its bit rate."""
    rng = np.random.Generator(np.random.Philox(key=[SEED, recipe.index], counter=[0, 0, 0, 1]))
    height, width = recipe.height, recipe.width
    most = min(3.0, photograph.height / height, photograph.width / width)
    zoom = rng.uniform(1.0, most)
    left = rng.uniform(0, photograph.width - zoom * width)
    top = rng.uniform(0, photograph.height - zoom * height)
    box = left, top, left + zoom * width, top + zoom * height
    image = photograph.resize((width, height), Image.Resampling.LANCZOS, box)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(rng.uniform(0.8, 1.2))
    image = image.filter(ImageFilter.UnsharpMask(1, int(rng.uniform(0, 120)), 2))
    pixels = np.asarray(image, np.float32)
    grain = 0.8 * rng.standard_normal((height, width, 1), np.float32)
    grain = grain + 0.4 * rng.standard_normal((height, width, 3), np.float32)

    def encode(noise: float) -> bytes:
        noisy = Image.fromarray(np.clip(pixels + noise * grain, 0, 255).astype(np.uint8))
        return _encode(
            noisy.convert("L") if recipe.grey else noisy,
            quality=recipe.quality,
            subsampling=None if recipe.grey else recipe.subsampling,
            progressive=recipe.progressive,
        )

    wanted = recipe.bits * height * width / 8
    low, high = 0.0, MAX_NOISE
    data = encode(low)
    if len(data) >= wanted:
        return data
    for _ in range(6):
        middle = (low + high) / 2
        data = encode(middle)
        if len(data) < wanted:
            low = middle
        else:
            high = middle
    return data


def _encode(
    image: Image.Image, *, quality: int, subsampling: str | None, progressive: bool = False
) -> bytes:
    buffer = io.BytesIO()
    chroma = {} if subsampling is None else {"subsampling": subsampling}
    image.save(buffer, "JPEG", quality=quality, progressive=progressive, **chroma)
    return buffer.getvalue()


def _convert(source: Path, change: Callable[[bytes], bytes], target: Path) -> None:
    def convert(path: Path) -> None:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(change(path.read_bytes()))

    with concurrent.futures.ThreadPoolExecutor(_num_cores()) as pool:
        for _ in pool.map(convert, sorted((source / "train").glob("*/*.jpg"))):
            pass


def _restart(data: bytes) -> bytes:
    from mobilevit_jax.data.jpeg import add_restart_markers

    try:
        return add_restart_markers(data)
    except ValueError:  # of a kind that cannot be repacked: it stays as it is
        return data


def _shrink(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        scale = SHORT_SIDE / min(image.size)
        if scale < 1:
            width, height = (max(round(scale * side), SHORT_SIDE) for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        chroma = None if image.mode == "L" else "4:2:0"
        return _restart(_encode(image, quality=SHRUNK_QUALITY, subsampling=chroma))


def _make_tfrecords(source: Path, target: Path) -> None:
    with _processes(1) as pool:  # another process: TensorFlow would stay in this one
        pool.submit(_write_tfrecords, source, target).result()


def _write_tfrecords(source: Path, target: Path) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    paths = sorted((source / "train").glob("*/*.jpg"), key=lambda path: path.name)
    for shard in range(NUM_SHARDS):
        name = f"train-{shard:05d}-of-{NUM_SHARDS:05d}"
        with tf.io.TFRecordWriter(str(target / name)) as writer:
            for path in paths[shard::NUM_SHARDS]:
                image = tf.train.BytesList(value=[path.read_bytes()])
                number = tf.train.Int64List(value=[label(path)])
                feature = {
                    "image": tf.train.Feature(bytes_list=image),
                    "label": tf.train.Feature(int64_list=number),
                }
                example = tf.train.Example(features=tf.train.Features(feature=feature))
                writer.write(example.SerializeToString())


def _statistics(directory: Path) -> dict[str, Any]:
    about = json.loads((directory / "plain" / "about.json").read_text())
    recipes = [Recipe(**recipe) for recipe in about["recipes"]]
    pixels = np.array([recipe.height * recipe.width for recipe in recipes])
    bytes_of = {
        part: np.array([path.stat().st_size for path in files(directory, part)])
        for part in ("plain", "restart", "shrunk")
        if (directory / part).is_dir()
    }
    plain = bytes_of["plain"]

    def share(predicate: Callable[[Recipe], bool]) -> float:
        return round(100 * sum(map(predicate, recipes)) / len(recipes), 1)

    return {
        "images": len(recipes),
        "classes": NUM_CLASSES,
        "photographs": len(about["photographs"]),
        "missing_packages": about["missing"],
        "mean_kb": {part: round(sizes.mean() / 1000, 1) for part, sizes in bytes_of.items()},
        "median_kb": round(float(np.median(plain)) / 1000, 1),
        "p10_kb": round(float(np.percentile(plain, 10)) / 1000, 1),
        "p90_kb": round(float(np.percentile(plain, 90)) / 1000, 1),
        "mean_megapixels": round(pixels.mean() / 1e6, 3),
        "bits_per_pixel": round(8 * plain.sum() / pixels.sum(), 2),
        "mean_quality": round(float(np.mean([recipe.quality for recipe in recipes])), 1),
        "percent_500x375": share(lambda r: (r.height, r.width) == (375, 500)),
        "percent_420": share(lambda r: r.subsampling == "4:2:0"),
        "percent_progressive": share(lambda r: r.progressive),
        "percent_grey": share(lambda r: r.grey),
        "pillow": about["pillow"],
    }


def _processes(count: int | None = None) -> concurrent.futures.ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(count or _num_cores(), mp_context=context)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))
