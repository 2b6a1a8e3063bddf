"""Mixup, cutmix and random erasing: by hand, by statistics, against torchvision, over devices."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mobilevit_jax import optim, schedule, steps
from mobilevit_jax.tasks import classification, mixing
from tests import nets, originals

SCALE, RATIO = (0.02, 0.33), (0.3, 3.3)


def make_batch(*, size=(8, 8), count=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.random((count, *size, 3), np.float32)),
        "label": jnp.arange(count, dtype=jnp.int32),
        "mask": jnp.ones(count, bool),
    }


def many(function, count, seed=0):
    """What `function` gives for so many keys, on the host."""
    keys = jax.random.split(jax.random.key(seed), count)
    return jax.device_get(jax.jit(jax.vmap(function))(keys))


def boxes(count, *, size, scale, ratio, attempts=10):
    chosen = jnp.ones(count, bool)
    draw = functools.partial(mixing._boxes, size=size, scale=scale, ratio=ratio, attempts=attempts)
    return np.asarray(jax.jit(draw)(jax.random.key(1), chosen))


def distance(a, b):
    """Largest distance of two samples' cumulative distributions (Kolmogorov and Smirnov)."""
    at = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (a, b)]
    return np.max(np.abs(below[0] - below[1]))


def test_blend_by_hand():
    batch = {
        "image": jnp.array([1.0, 2.0, 4.0]).reshape(3, 1, 1, 1) * jnp.ones((3, 1, 2, 1)),
        "label": jnp.array([7, 8, 9], jnp.int32),
        "mask": jnp.ones(3, bool),
    }
    mixed = mixing.blend(batch, jnp.array([[0.25, 1.0]]), jnp.float32(0.625))
    want = [[0.25 * 1 + 0.75 * 4, 1], [0.25 * 2 + 0.75 * 1, 2], [0.25 * 4 + 0.75 * 2, 4]]
    assert mixed["image"][:, 0, :, 0].tolist() == want
    assert mixed["partner"].tolist() == [9, 7, 8]
    assert mixed["share"].tolist() == [0.625] * 3
    assert mixed["label"] is batch["label"] and mixed["mask"] is batch["mask"]


def test_padding_is_mixed_into_nothing():
    batch = make_batch(count=6)
    batch["mask"] = jnp.arange(6) < 4
    mixed = mixing.blend(batch, jnp.full((8, 8), 0.5), jnp.float32(0.5))
    # Row 0 has padding before it; rows 4 and 5 are padding.
    assert mixed["share"].tolist() == [1.0, 0.5, 0.5, 0.5, 1.0, 1.0]
    np.testing.assert_array_equal(mixed["image"][0], batch["image"][0])
    np.testing.assert_array_equal(mixed["mask"], batch["mask"])


@pytest.mark.parametrize(
    ("share", "center", "rows", "columns"),
    [
        (0.75, (4, 8), (2, 6), (4, 12)),  # half sizes 0.25 * 8 and 0.25 * 16
        (0.75, (0, 15), (0, 2), (11, 16)),  # clipped at two edges
        (0.0, (4, 8), (0, 8), (0, 16)),  # all of the other image
        (0.0, (0, 0), (0, 4), (0, 8)),
        (1.0, (4, 8), (0, 0), (0, 0)),  # all of the own
        (0.6, (4, 8), (2, 6), (3, 13)),  # half sizes 2.53 and 5.06, whole pixels: 2 and 5
    ],
)
def test_cut_by_hand(share, center, rows, columns):
    own, kept = mixing.cut(jnp.float32(share), jnp.array(center), size=(8, 16))
    want = np.ones((8, 16), bool)
    want[slice(*rows), slice(*columns)] = False
    np.testing.assert_array_equal(own, want)
    assert float(kept) == pytest.approx(want.mean(), abs=1e-7)


def test_mixed_images_and_shares_agree():
    """Each batch is one of the three, and its `share` is what its pixels say."""
    batch = make_batch(size=(16, 24), count=2)
    # Own pixels 1 and the other's 0, so that the second image holds the weights.
    batch["image"] = jnp.stack([jnp.zeros((16, 24, 3)), jnp.ones((16, 24, 3))])
    mix = functools.partial(mixing.mix, batch, mixup=4.0, cutmix=4.0, probability=0.5)
    mixed = many(mix, 4000)
    own = mixed["image"][:, 1]
    np.testing.assert_array_equal(mixed["image"][:, 0], 1 - own)
    np.testing.assert_array_equal(mixed["share"][:, 0], mixed["share"][:, 1])
    np.testing.assert_allclose(own.mean((1, 2, 3)), mixed["share"][:, 1], atol=1e-5)
    np.testing.assert_array_equal(mixed["partner"], np.tile([1, 0], (4000, 1)))
    low, high = own.min((1, 2, 3)), own.max((1, 2, 3))
    untouched = low == 1
    cutmix = (low == 0) & (high == 1)
    mixup = (low == high) & ~untouched
    assert (untouched | cutmix | mixup).all()
    # 4 standard deviations of a share of 0.5 and of 0.25.
    assert untouched.mean() == pytest.approx(0.5, abs=0.032)
    assert cutmix.mean() == pytest.approx(0.25, abs=0.028)
    assert mixup.mean() == pytest.approx(0.25, abs=0.028)


@pytest.mark.parametrize(
    ("alphas", "probability"), [((1.0, 0.0), 0.3), ((0.0, 1.0), 0.3), ((1.0, 1.0), 1.0)]
)
def test_share_of_mixed_batches(alphas, probability):
    batch = make_batch(size=(32, 32), count=2)
    mix = functools.partial(
        mixing.mix, batch, mixup=alphas[0], cutmix=alphas[1], probability=probability
    )
    shares = many(lambda key: mix(key)["share"][0], 4000)
    # One in 250 or so boxes of cutmix is smaller than a pixel.
    assert (shares < 1).mean() == pytest.approx(probability, abs=0.035 if probability < 1 else 0.01)


@pytest.mark.parametrize("alpha", [0.02, 0.2, 1.0, 30.0])
def test_shares_are_of_beta(alpha):
    batch = make_batch(size=(1, 1), count=2)
    mix = functools.partial(mixing.mix, batch, mixup=alpha, cutmix=0.0, probability=1.0)
    shares = many(lambda key: mix(key)["share"][0], 20_000)
    assert shares.mean() == pytest.approx(0.5, abs=0.012)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.04)
    want = np.random.default_rng(0).beta(alpha, alpha, 20_000)
    # Small alphas give many shares that are nearer to 0 or 1 than float32 can tell.
    assert distance(np.round(shares, 6), np.round(want, 6)) < 0.02


def test_cutmix_shares_are_those_of_the_rule():
    """The share that is left after clipping, against the rule in plain Python."""
    height, width = 20, 32
    rng = np.random.default_rng(0)
    want = []
    for _ in range(20_000):
        half = 0.5 * math.sqrt(1 - rng.beta(1.0, 1.0))
        row, column = rng.integers(height), rng.integers(width)
        rows = min(row + int(half * height), height) - max(row - int(half * height), 0)
        columns = min(column + int(half * width), width) - max(column - int(half * width), 0)
        want.append(height * width - rows * columns)
    batch = make_batch(size=(height, width), count=2)
    mix = functools.partial(mixing.mix, batch, mixup=0.0, cutmix=1.0, probability=1.0)
    shares = many(lambda key: mix(key)["share"][0], 20_000)
    assert distance(np.round(shares * height * width), want) < 0.02


def test_erased_images_by_share_area_and_value():
    size = (40, 50)
    image = jnp.full((4000, *size, 3), 0.5)
    erase = functools.partial(mixing.random_erasing, probability=0.25, scale=SCALE, ratio=RATIO)
    got = np.asarray(jax.jit(erase)(image, jax.random.key(0)))
    assert set(np.unique(got)) == {0.0, 0.5}
    assert (got == got[..., :1]).all()  # all channels alike
    gone = got[..., 0] == 0
    erased = gone.any((1, 2))
    assert erased.mean() == pytest.approx(0.25, abs=0.028)
    rows, columns = gone[erased].any(2), gone[erased].any(1)
    # One box each, whole, and smaller than the image both ways.
    np.testing.assert_array_equal(gone[erased], rows[:, :, None] & columns[:, None, :])
    for line, length in ((rows, size[0]), (columns, size[1])):
        assert (np.abs(np.diff(np.pad(line, ((0, 0), (1, 1))).astype(int))).sum(1) == 2).all()
        assert line.sum(1).max() < length
    # Both sides are rounded to whole pixels, so the shares may be passed by a little.
    area = rows.sum(1) * columns.sum(1) / (size[0] * size[1])
    assert 0.015 < area.min() < 0.03
    assert 0.31 < area.max() < 0.345


# Boxes of the second row often do not fit; those of the third hardly ever.
@pytest.mark.parametrize(
    ("scale", "ratio"), [(SCALE, RATIO), ((0.3, 0.9), (0.2, 5.0)), ((0.9, 0.99), (0.01, 100.0))]
)
def test_boxes_are_torchvisions(scale, ratio):
    transforms = originals.import_torchvision().transforms
    torch = originals.import_torch()
    torch.manual_seed(0)
    size, count = (48, 64), 2000
    image = torch.zeros(3, *size)
    get = transforms.RandomErasing.get_params
    theirs = np.array([get(image, scale, ratio, [0.0])[:4] for _ in range(count)])
    theirs[:, 2:] += theirs[:, :2]
    ours = boxes(count, size=size, scale=scale, ratio=ratio)
    # What did not fit in ten attempts: the whole image there, an empty box here.
    their_none, our_none = (theirs == (0, 0, *size)).all(1), (ours == 0).all(1)
    assert our_none.mean() == pytest.approx(their_none.mean(), abs=0.05)
    ours, theirs = ours[~our_none], theirs[~their_none]
    # About 1 in 1,000 pairs of samples of the same distribution are further apart.
    limit = 1.95 * math.sqrt(1 / len(ours) + 1 / len(theirs))
    for edge in range(4):
        assert distance(ours[:, edge], theirs[:, edge]) < limit
    ours, theirs = ours[:, 2:] - ours[:, :2], theirs[:, 2:] - theirs[:, :2]
    for of in (lambda box: box.prod(1), lambda box: box[:, 0] / box[:, 1]):
        assert distance(of(ours), of(theirs)) < limit


def test_boxes_reach_every_edge_and_none_lies_outside():
    got = boxes(20_000, size=(9, 12), scale=(0.05, 0.4), ratio=RATIO)
    assert got.min(0).tolist()[:2] == [0, 0]
    assert got.max(0).tolist()[2:] == [9, 12]
    assert (got[:, :2] <= got[:, 2:]).all()


def test_the_first_box_that_fits_is_taken():
    draw = {"size": (8, 8), "scale": (0.5, 0.99), "ratio": (0.3, 3.3)}
    none = [(boxes(4000, attempts=n, **draw) == 0).all(1).mean() for n in (1, 2, 3)]
    # With p the chance that one does not fit, n attempts fail with p^n.
    assert 0.3 < none[0] < 0.9
    assert none[1] == pytest.approx(none[0] ** 2, abs=0.04)
    assert none[2] == pytest.approx(none[0] ** 3, abs=0.04)


TASK = classification.classification(
    label_smoothing=0.1, mixup=0.2, cutmix=1.0, mix_probability=1.0, random_erasing=0.5
)


def test_one_device_and_four_agree():
    assert jax.device_count() == 4
    batch = jax.device_get(make_batch(size=(16, 16)))
    for seed in range(4):
        results = []
        for devices in (jax.devices()[:1], jax.devices()):
            rows = NamedSharding(Mesh(np.asarray(devices), ("data",)), PartitionSpec("data"))
            mixed = jax.jit(TASK.mix)(jax.device_put(batch, rows), jax.random.key(seed))
            results.append(jax.device_get(mixed))
        one, four = results
        assert set(one) == {"image", "label", "mask", "partner", "share"}
        for name in one:
            np.testing.assert_allclose(one[name], four[name], rtol=1e-6, atol=1e-7)


def compiled(shape, devices):
    rows = NamedSharding(Mesh(np.asarray(devices), ("data",)), PartitionSpec("data"))
    batch = {
        name: jax.ShapeDtypeStruct(of, dtype, sharding=rows)
        for name, of, dtype in (
            ("image", shape, np.float32),
            ("label", shape[:1], np.int32),
            ("mask", shape[:1], np.bool_),
        )
    }
    return jax.jit(TASK.mix).lower(batch, jax.random.key(0)).compile()


def test_devices_hand_on_one_image_each():
    """Not the batch: the image before a device's first is all that it lacks."""
    text = compiled((12, 16, 16, 3), jax.devices()).as_text()
    moved = re.findall(r"= (\S+?)\{\S*\} (?:all|collective|reduce|send|recv)[\w-]*\(", text)
    assert sorted(moved) == ["f32[1,16,16,3]", "pred[1]", "s32[1]"]


def test_one_pass_over_the_pixels_without_draws():
    program = compiled((13, 16, 16, 3), jax.devices()[:1])
    whole = [body for body in program.as_text().split("\n\n") if "f32[13,16,16,3]" in body]
    loops = [body for body in whole if "ENTRY" not in body and "HloModule" not in body]
    assert len(loops) == 1
    # Random bits of the boxes would be made again for every pixel.
    assert "u32[13" not in loops[0]


def test_a_mixed_batch_in_parts_is_the_whole_one():
    """Pairs are made of the whole batch, before it is worked on in parts."""
    model = nets.Tiny(norm=False)  # batch statistics are those of the parts, so they would differ
    curve = schedule.constant(peak=1e-2, total=100, warmup=0, init=0.0)
    tx = optim.adamw(
        curve, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, decay_1d=False, clip_norm=1.0
    )
    batch = make_batch(size=(8, 8))
    batch["image"] = (batch["image"] * 255).astype(jnp.uint8)
    batch["label"] = batch["label"] % 3
    state = steps.init_state(0, model=model, tx=tx, size=(8, 8))
    step = functools.partial(
        steps.train_step,
        model=model,
        task=TASK,
        tx=tx,
        curve=curve,
        input_spec=nets.SPEC,
        seed=0,
        ema_decay=0.9,
        freeze_backbone=False,
    )
    whole, parts = (jax.jit(functools.partial(step, accum=n))(state, batch)[1] for n in (1, 4))
    for name in ("loss", "grad_norm"):
        assert float(whole[name]) == pytest.approx(float(parts[name]), rel=1e-5)
    plain = step(state, batch, accum=1, task=classification.classification(label_smoothing=0.1))[1]
    assert float(plain["loss"]) != pytest.approx(float(whole["loss"]), rel=1e-3)
    assert float(whole["grad_norm"]) > 0
