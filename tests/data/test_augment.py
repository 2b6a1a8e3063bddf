"""Every operation against Pillow and torchvision, the draws, and what a policy promises."""

import collections
import concurrent.futures
import math
import pickle
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image, ImageChops, ImageEnhance, ImageOps

from mobilevit_jax.data import augment
from mobilevit_jax.data.augment import AUTO_AUGMENT, RAND_AUGMENT, TRIVIAL_AUGMENT, apply
from tests import originals

FACTORS = (-0.99, -0.9, -0.27, 0.0, 0.27, 0.5, 0.9, 0.99)  # minus 1
LOOK_UPS = (
    "brightness",
    "contrast",
    "posterize",
    "solarize",
    "invert",
    "auto_contrast",
    "equalize",
)
SHAPES = ((97, 131), (64, 64), (2, 3), (1, 7), (1, 1))
PIL = {"bilinear": Image.Resampling.BILINEAR, "nearest": Image.Resampling.NEAREST}


def photograph(height: int = 97, width: int = 131, seed: int = 0) -> np.ndarray:
    """Gradients, an edge and noise; channels of different ranges, so that stretching shows."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9) * np.cos(y / 7), np.sin((x + y) / 23), x / width], axis=-1)
    image = 120 + 80 * waves * (1, 0.8, 0.5) + rng.normal(0, 8, (height, width, 3))
    image[height // 3 : height // 2, width // 4 : width // 2] = (230, 20, 60)
    return image.clip(9, 240).astype(np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """No detail, so that interpolating once or twice makes no difference."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 31), np.cos(y / 27), np.sin((x - y) / 40)], axis=-1)
    return (128 + 100 * waves).astype(np.uint8)


def difference(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    assert ours.dtype == theirs.dtype == np.uint8
    assert ours.shape == theirs.shape
    return ours.astype(int) - theirs.astype(int)


def one(
    name: str, image: np.ndarray, magnitude: float = 0.0, interpolation: str = "bilinear"
) -> np.ndarray:
    return apply(image, [(AUTO_AUGMENT[name], magnitude)], interpolation=interpolation)


def pillow(
    name: str, image: np.ndarray, magnitude: float = 0.0, interpolation: str = "bilinear"
) -> np.ndarray:
    """The operation as torchvision does it to a PIL image; translations in shares of the side."""
    picture = Image.fromarray(image)
    size, how = picture.size, PIL[interpolation]
    affine = Image.Transform.AFFINE
    share_x, share_y = int(magnitude * size[0]), int(magnitude * size[1])
    results = {
        "identity": lambda: picture,
        "shear_x": lambda: picture.transform(size, affine, (1, magnitude, 0, 0, 1, 0), how),
        "shear_y": lambda: picture.transform(size, affine, (1, 0, 0, magnitude, 1, 0), how),
        "translate_x": lambda: picture.transform(size, affine, (1, 0, -share_x, 0, 1, 0), how),
        "translate_y": lambda: picture.transform(size, affine, (1, 0, 0, 0, 1, -share_y), how),
        "rotate": lambda: picture.rotate(magnitude, how),
        "brightness": lambda: ImageEnhance.Brightness(picture).enhance(1 + magnitude),
        "color": lambda: ImageEnhance.Color(picture).enhance(1 + magnitude),
        "contrast": lambda: ImageEnhance.Contrast(picture).enhance(1 + magnitude),
        "sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(1 + magnitude),
        "posterize": lambda: ImageOps.posterize(picture, int(magnitude)),
        "solarize": lambda: ImageOps.solarize(picture, math.ceil(magnitude)),
        "invert": lambda: ImageChops.invert(picture),
        "auto_contrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
    }
    return np.asarray(results[name]())


def magnitudes(name: str) -> tuple[float, ...]:
    if name == "posterize":
        return (1, 2, 3, 4, 5, 6, 7, 8)
    if name == "solarize":
        return (0.0, 28.3, 127.5, 128.0, 178.5, 255.0)
    return FACTORS if name in ("brightness", "contrast") else (0.0,)


# Operations


@pytest.mark.parametrize("name", LOOK_UPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_look_ups_are_pillows(name: str, shape: tuple[int, int]):
    image = photograph(*shape)
    for magnitude in magnitudes(name):
        assert np.array_equal(one(name, image, magnitude), pillow(name, image, magnitude))


@pytest.mark.parametrize("name", LOOK_UPS)
def test_look_ups_of_few_levels(name: str):
    rng = np.random.default_rng(1)
    one_level = np.full((20, 20, 3), 77, np.uint8)
    two_levels = rng.choice(np.array([3, 250], np.uint8), (20, 20, 3))
    one_channel = one_level.copy()
    one_channel[..., 1] = rng.integers(0, 256, (20, 20))
    small_steps = rng.integers(0, 256, (17, 23, 3), dtype=np.uint8)  # 255 < pixels < 2 * 255
    for image in (one_level, two_levels, one_channel, small_steps):
        for magnitude in magnitudes(name):
            assert np.array_equal(one(name, image, magnitude), pillow(name, image, magnitude))


def test_contrast_is_exact_where_greys_mean_is_rounded():
    rng = np.random.default_rng(0)
    for _ in range(200):  # of so few pixels that the mean often lies near a half
        image = rng.integers(0, 256, (3, 2, 3), dtype=np.uint8)
        assert np.array_equal(one("contrast", image, 0.9), pillow("contrast", image, 0.9))


@pytest.mark.parametrize("name", ["color", "sharpness"])
@pytest.mark.parametrize("change", FACTORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_color_and_sharpness_within_a_level(name: str, change: float, shape: tuple[int, int]):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for image in (photograph(*shape), noise):
        off = difference(one(name, image, change), pillow(name, image, change))
        assert abs(off).max() <= 1
        assert np.mean(off != 0) < 0.005


@pytest.mark.parametrize("name", ["translate_x", "translate_y"])
@pytest.mark.parametrize("interpolation", PIL)
@pytest.mark.parametrize("shape", SHAPES)
def test_translations_are_pillows(name: str, interpolation: str, shape: tuple[int, int]):
    image = photograph(*shape)
    for share in (0.0, 0.136, -0.136, 0.453, -0.453, 1.0, -1.0, 2.0, -2.0):
        ours = one(name, image, share, interpolation)
        assert np.array_equal(ours, pillow(name, image, share, interpolation))


WARPS = [("shear_x", 0.09), ("shear_x", -0.3), ("shear_x", 0.99), ("shear_y", -0.09)]
WARPS += [("shear_y", 0.3), ("rotate", 9.0), ("rotate", -9.0), ("rotate", 30.0), ("rotate", -135.0)]


def inside_outside(white: np.ndarray, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """Where a warp shows the picture and where the fill, `margin` pixels off the line between."""
    around = np.ones((2 * margin + 1, 2 * margin + 1), np.uint8)
    frame = {"borderType": cv2.BORDER_CONSTANT, "borderValue": 0}
    inside = cv2.erode(white[..., 0], around, **frame) == 255
    return inside, cv2.dilate(white[..., 0], around) == 0


@pytest.mark.parametrize(("name", "magnitude"), WARPS)
@pytest.mark.parametrize("shape", [(97, 131), (64, 64)])
def test_warps_are_pillows_but_for_an_edge(name: str, magnitude: float, shape: tuple[int, int]):
    image = photograph(*shape)
    white = pillow(name, np.full_like(image, 255), magnitude, "nearest")
    inside, outside = inside_outside(white, 1)
    assert inside.sum() > 0.2 * inside.size
    ours, theirs = one(name, image, magnitude), pillow(name, image, magnitude)
    off = difference(ours, theirs)
    assert off[inside].min() >= 0  # Pillow cuts fractions off: 0 or 1, a half on average
    assert off[inside].max() <= 1
    assert 0.4 < off[inside].mean() < 0.6
    assert ours[outside].sum() == theirs[outside].sum() == 0
    edge = ~inside & ~outside
    assert abs(off[edge]).mean() < 60
    # Nearest: a neighbour where two are all but equally near (square, 135 degrees: 1.4 %).
    ours, theirs = (f(name, image, magnitude, "nearest") for f in (one, pillow))
    assert np.mean((ours != theirs).any(axis=-1)) < 0.02


@pytest.mark.parametrize("interpolation", PIL)
def test_fill(interpolation: str):
    image = np.full((40, 50, 3), 200, np.uint8)
    for name, magnitude in [("rotate", 30.0), ("shear_x", 0.3), ("translate_y", 0.5)]:
        steps = [(AUTO_AUGMENT[name], magnitude)]
        out = apply(image, steps, interpolation=interpolation, fill=90)
        assert {90, 200} <= set(np.unique(out)) <= set(range(90, 201))
        twice = apply(image, [*steps, (RAND_AUGMENT["shear_y"], 0.3)], fill=90)
        assert {90, 200} <= set(np.unique(twice)) <= set(range(90, 201))


# Sequences


def test_look_ups_in_a_row_are_pillows():
    rng = np.random.default_rng(0)
    image = photograph()
    for _ in range(100):
        expected, steps = image, []
        for name in rng.choice(LOOK_UPS, rng.integers(2, 5)):
            magnitude = float(rng.choice(magnitudes(name)))
            steps.append((AUTO_AUGMENT[name], magnitude))
            expected = pillow(name, expected, magnitude)
        assert np.array_equal(apply(image, steps), expected)


def test_translations_in_a_row_are_pillows():
    rng = np.random.default_rng(0)
    image = photograph()
    for _ in range(50):  # there and back again too: what was pushed out stays out
        expected, steps = image, []
        for name in rng.choice(["translate_x", "translate_y"], 3):
            share = float(rng.choice([-0.4, -0.136, 0.136, 0.4]))
            steps.append((RAND_AUGMENT[str(name)], share))
            expected = pillow(str(name), expected, share)
        assert np.array_equal(apply(image, steps), expected)


@pytest.mark.parametrize("interpolation", PIL)
def test_warps_in_a_row_are_pillows_but_for_an_edge(interpolation: str):
    rng = np.random.default_rng(0)
    image, white = smooth(120, 150), np.full((120, 150, 3), 255, np.uint8)
    moves = {"shear_x": 0.3, "shear_y": 0.3, "rotate": 30.0, "translate_x": 0.4, "translate_y": 0.4}
    for _ in range(40):
        expected, seen, steps = image, white, []
        for name in rng.choice(list(moves), rng.integers(2, 4)):
            magnitude = moves[name] * rng.uniform(-1, 1)
            steps.append((RAND_AUGMENT[name], magnitude))
            expected = pillow(name, expected, magnitude, interpolation)
            seen = pillow(name, seen, magnitude, "nearest")
        inside, outside = inside_outside(seen, 3)
        off = difference(apply(image, steps, interpolation=interpolation), expected)
        assert abs(off[inside]).max() <= (3 if interpolation == "bilinear" else 14)
        assert abs(off[inside].mean()) < 2
        assert not off[outside].any()
        assert inside.sum() + outside.sum() > 0.8 * inside.size


def test_one_table_and_one_warp(monkeypatch: pytest.MonkeyPatch):
    calls = collections.Counter()

    def counted(name: str):
        original = getattr(cv2, name)

        def call(*args, **options):
            calls[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(cv2, name, call)

    counted("LUT")
    counted("warpAffine")
    image = photograph()
    ops = [AUTO_AUGMENT[n] for n in ("posterize", "equalize", "invert", "auto_contrast")]
    apply(image, [(op, 4.0) for op in ops])
    assert calls == {"LUT": 1}
    apply(image, [(RAND_AUGMENT["shear_x"], 0.1), (RAND_AUGMENT["rotate"], 9.0)])
    assert calls == {"LUT": 1, "warpAffine": 1}
    apply(image, [(RAND_AUGMENT["shear_x"], 0.1), (ops[2], 0.0), (RAND_AUGMENT["rotate"], 9.0)])
    assert calls == {"LUT": 2, "warpAffine": 3}


# torchvision


@pytest.fixture(scope="module")
def torchvision():
    originals.import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchvision", reason="torchvision is not installed")
        from torchvision.transforms import autoaugment
    return autoaugment


def theirs(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


@pytest.mark.parametrize("size", [(256, 256), (160, 224), (320, 131), (331, 331), (1, 1)])
def test_ranges_are_torchvisions(torchvision, size: tuple[int, int]):
    spaces = (
        (RAND_AUGMENT, torchvision.RandAugment()._augmentation_space(31, size), 31),
        (TRIVIAL_AUGMENT, torchvision.TrivialAugmentWide()._augmentation_space(31), 31),
        (AUTO_AUGMENT, torchvision.AutoAugment()._augmentation_space(10, size), 10),
    )
    for ours, space, bins in spaces:
        assert {theirs(name) for name in ours} - {"Identity"} == set(space) - {"Identity"}
        for name, op in ours.items():
            if name == "identity":
                continue
            values, signed = space[theirs(name)]
            assert op.signed == signed
            for index in range(bins) if values.ndim else (0,):
                expected = values[index].item() if values.ndim else 0.0
                value = op.magnitude(index, bins=bins, negative=False)
                if op.apply in (augment._translate_x_share, augment._translate_y_share):
                    value *= size[1] if name == "translate_x" else size[0]
                if name == "posterize":
                    value = round(value)
                assert value == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert list(RAND_AUGMENT) == list(TRIVIAL_AUGMENT)


def test_auto_augment_is_torchvisions(torchvision):
    policies = torchvision.AutoAugment().policies
    for ours, pair in zip(augment.IMAGENET, policies, strict=True):
        assert [(theirs(name), p, i) for name, p, i in ours] == [(n, p, i or 0) for n, p, i in pair]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("space", ["rand", "trivial", "auto"])
def test_operations_are_torchvisions(torchvision, space: str, sign: int):
    """At every magnitude; each operation's own bounds are in the tests above."""
    image = photograph(90, 120)
    ops = {"rand": RAND_AUGMENT, "trivial": TRIVIAL_AUGMENT, "auto": AUTO_AUGMENT}[space]
    bins = 10 if space == "auto" else 31
    for name, op in ops.items():
        for index in range(0, bins, 3):
            value = op.magnitude(index, bins=bins, negative=sign < 0)
            told = value
            if name.startswith("translate") and space != "trivial":
                told = value * (120 if name == "translate_x" else 90)
            if name == "posterize":
                told = round(value)
            expected = torchvision._apply_op(
                Image.fromarray(image),
                theirs(name),
                told,
                torchvision.InterpolationMode.BILINEAR,
                None,
            )
            off = abs(difference(apply(image, [(op, value)]), np.asarray(expected)))
            if name in ("shear_x", "shear_y", "rotate"):
                assert np.mean(off > 1) < 0.06  # the edges
            else:
                exact = name in LOOK_UPS or name.startswith(("translate", "identity"))
                assert off.max() <= (0 if exact else 1)


# Draws


def test_magnitudes_at_nine():
    """The numbers of the recipes: RandAugment(2, 9) of 31 bins, at 256 pixels."""
    at = {name: op.magnitude(9, bins=31, negative=False) for name, op in RAND_AUGMENT.items()}
    assert at["shear_x"] == at["shear_y"] == pytest.approx(0.09)
    assert int(at["translate_x"] * 256) == int(at["translate_y"] * 256) == 34
    assert at["rotate"] == pytest.approx(9)
    for name in ("brightness", "color", "contrast", "sharpness"):
        assert at[name] == pytest.approx(0.27)
    assert round(at["posterize"]) == 7
    assert at["solarize"] == 178.5
    negative = {n: op.magnitude(9, bins=31, negative=True) for n, op in RAND_AUGMENT.items()}
    for name in RAND_AUGMENT:
        unsigned = name in ("identity", "posterize", "solarize", "auto_contrast", "equalize")
        assert negative[name] == (at[name] if unsigned else -at[name])
    edge = apply(
        np.full((256, 256, 3), 9, np.uint8), [(RAND_AUGMENT["translate_x"], at["translate_x"])]
    )
    assert (edge[:, :34] == 0).all()
    assert (edge[:, 34:] == 9).all()


def near(count: int, total: int, probability: float) -> bool:
    """Within five standard deviations."""
    return abs(count - total * probability) <= 5 * math.sqrt(
        total * probability * (1 - probability)
    )


def test_rand_augment_draws():
    rng, total = np.random.default_rng(0), 14_000
    names = {op: name for name, op in RAND_AUGMENT.items()}
    counts: collections.Counter[tuple[int, str]] = collections.Counter()
    signs: collections.Counter[str] = collections.Counter()
    pairs = set()
    for _ in range(total):
        steps = augment.draw_rand_augment(rng, num_ops=2, magnitude=9)
        drawn = [names[op] for op, _ in steps]
        pairs.add(tuple(drawn))
        counts.update(enumerate(drawn))
        signs.update(names[op] for op, magnitude in steps if magnitude < 0)
    for name, op in RAND_AUGMENT.items():
        assert near(counts[0, name], total, 1 / 14)
        assert near(counts[1, name], total, 1 / 14)
        assert near(signs[name], 2 * total, 1 / 28) if op.signed else signs[name] == 0
    assert len(pairs) == 14 * 14  # with replacement, any after any


def test_trivial_augment_draws():
    rng, total = np.random.default_rng(0), 14_000
    names = {op: name for name, op in TRIVIAL_AUGMENT.items()}
    counts: collections.Counter[str] = collections.Counter()
    bins: collections.Counter[int] = collections.Counter()
    negative = 0
    for _ in range(total):
        ((op, magnitude),) = augment.draw_trivial_augment(rng)
        counts[names[op]] += 1
        if names[op] == "solarize":
            bins[round((255 - magnitude) / 255 * 30)] += 1
        negative += magnitude < 0
    assert all(near(counts[name], total, 1 / 14) for name in TRIVIAL_AUGMENT)
    assert set(bins) == set(range(31))
    assert all(near(count, counts["solarize"], 1 / 31) for count in bins.values())
    assert near(negative, total, 9 / 14 / 2 * 30 / 31)  # bin 0 has no sign


def test_auto_augment_draws():
    rng, total = np.random.default_rng(0), 25_000
    counts = collections.Counter(
        tuple(op.apply for op, _ in augment.draw_auto_augment(rng)) for _ in range(total)
    )
    expected: collections.defaultdict[tuple, float] = collections.defaultdict(float)
    for (first, p, _), (second, q, _) in augment.IMAGENET:
        a, b = AUTO_AUGMENT[first].apply, AUTO_AUGMENT[second].apply
        for steps, probability in (
            ((a, b), p * q),
            ((a,), p * (1 - q)),
            ((b,), (1 - p) * q),
            ((), (1 - p) * (1 - q)),
        ):
            expected[steps] += probability / 25
    assert sum(expected.values()) == pytest.approx(1)
    assert all(near(counts[steps], total, p) for steps, p in expected.items())
    assert all(expected[steps] > 0 for steps in counts)


# Policies

MAKE = {
    "rand": augment.rand_augment,
    "rand5": lambda: augment.rand_augment(num_ops=5, magnitude=30, interpolation="nearest"),
    "rand16": lambda: augment.rand_augment(num_ops=16, magnitude=30, fill=128),
    "trivial": augment.trivial_augment,
    "auto": augment.auto_augment,
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_policy_promises(make):
    policy = make()
    again = pickle.loads(pickle.dumps(policy))
    for shape in SHAPES:
        image = photograph(*shape)
        image.setflags(write=False)
        before = image.copy()
        for seed in range(30):
            out = policy(image, np.random.default_rng(seed))
            assert out.shape == image.shape
            assert out.dtype == np.uint8
            assert np.array_equal(image, before)
            assert np.array_equal(out, again(image, np.random.default_rng(seed)))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_policy_takes_any_view(make):
    policy = make()
    base = photograph(60, 80)
    views = (
        base[:, ::-1],
        base[::-1],
        base[..., ::-1],
        base[5:40, 7:50],
        base[::2, ::3],
        base.transpose(1, 0, 2),
        np.broadcast_to(base[:, :, :1], base.shape),
    )
    for view in views:
        before = view.copy()
        for seed in range(10):
            out = policy(view, np.random.default_rng(seed))
            assert np.array_equal(out, policy(view.copy(), np.random.default_rng(seed)))
            assert np.array_equal(view, before)


@pytest.mark.parametrize(
    ("make", "numbers"), [("rand", 4), ("rand5", 10), ("trivial", 3), ("auto", 5)]
)
def test_every_image_takes_as_many_random_numbers(make: str, numbers: int):
    policy = MAKE[make]()
    for seed in range(50):
        rng, other = np.random.default_rng(seed), np.random.default_rng(seed)
        policy(photograph(9, 8), rng)
        other.random(numbers)
        assert rng.random() == other.random()


def test_threads_do_not_share_scratch():
    policy = augment.rand_augment(num_ops=3)
    images = [photograph(64 + 32 * (i % 3), 96, i) for i in range(4)]

    def work(seed: int) -> np.ndarray:
        return policy(images[seed % 4], np.random.default_rng(seed))

    expected = [work(seed) for seed in range(200)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for out, alone in zip(pool.map(work, range(200)), expected, strict=True):
            assert np.array_equal(out, alone)


def test_results_do_not_change_later():
    steps = [(RAND_AUGMENT["rotate"], 9.0)]
    first = apply(photograph(), steps)
    before = first.copy()
    apply(photograph(seed=1), steps)
    assert np.array_equal(first, before)


def test_table_of_policies():
    assert set(augment.POLICIES) == {"none", "rand_augment", "trivial_augment", "auto_augment"}
    assert augment.POLICIES["none"]() is None


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("rand_augment", {"num_ops": 0}, "num_ops is 0; it must be a whole number from 1 to 16"),
        ("rand_augment", {"num_ops": 17}, "num_ops is 17"),
        ("rand_augment", {"magnitude": 31}, "magnitude is 31; .* from 0 to 30"),
        ("trivial_augment", {"interpolation": "cubic"}, "'cubic'; allowed: bilinear, nearest"),
        ("auto_augment", {"fill": 256}, "fill is 256; .* from 0 to 255"),
    ],
)
def test_bad_arguments(name: str, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        augment.POLICIES[name](**arguments)
