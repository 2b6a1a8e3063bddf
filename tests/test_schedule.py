import math

import jax
import numpy as np
import pytest

from mobilevit_jax import schedule
from mobilevit_jax.data import multiscale
from mobilevit_jax.models import layers

STEPS = multiscale.Shapes((multiscale.Shape(256, 256, 1024),)).steps


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("20000 steps", 20000),
        ("1 step", 1),
        ("300 epochs", 375352),  # 300 * 1281167 / 1024 = 375,341.9 rounded; see below
        ("0.5 epochs", 626),
        ("1e6 examples", 977),
        ("0 epochs", 0),
        ("1 examples", 1),  # never rounded down to nothing
    ],
)
def test_duration(text, steps):
    if text == "300 epochs":
        steps = round(300 * 1281167 / 1024)
        assert steps == 375342
    assert schedule.duration(text, num_examples=1281167, steps=STEPS) == steps


@pytest.mark.parametrize(
    "text", ["", "12", "epochs", "12 parsecs", "-1 epochs", "inf steps", "nan steps"]
)
def test_bad_duration_says_how_to_write_one(text):
    with pytest.raises(ValueError, match="'20000 steps' or '300 epochs'"):
        schedule.duration(text, num_examples=10, steps=STEPS)


def test_due():
    def steps(every):
        return [s for s in range(11) if schedule.due(s, every=every, total=10)]

    assert steps(4) == [4, 8, 10]
    assert steps(0) == [10]
    assert steps(100) == [10]


def test_cosine_against_the_formula():
    curve = schedule.cosine(peak=2e-3, total=110, warmup=10, init=2e-4, final=1e-4)
    assert float(curve(0)) == pytest.approx(2e-4)
    assert float(curve(5)) == pytest.approx(1.1e-3)
    assert float(curve(10)) == pytest.approx(2e-3)
    # cvnets' period is one longer than the 100 steps that are left.
    for step in (35, 60, 109):
        share = (step - 10) / 101
        want = 1e-4 + 0.5 * 1.9e-3 * (1 + math.cos(math.pi * share))
        assert float(curve(step)) == pytest.approx(want, rel=1e-6)
    assert float(curve(111)) == pytest.approx(1e-4)


def test_cosine_by_epoch_is_a_staircase_that_ignores_the_warm_up():
    # Four epochs of unequal length; the warm-up ends inside the second.
    curve = jax.jit(
        schedule.cosine_by_epoch(
            peak=1.0, total=40, warmup=15, init=0.1, final=0.2, epoch_starts=[0, 10, 22, 31]
        )
    )
    rates = [float(curve(step)) for step in range(40)]
    np.testing.assert_allclose(rates[:15], 0.1 + 0.06 * np.arange(15), rtol=1e-6)
    # 0.2 + 0.4 (1 + cos(45, 90 and 135 degrees)), to 8 decimals.
    np.testing.assert_allclose(rates[15:22], 0.88284271, rtol=1e-7)
    np.testing.assert_allclose(rates[22:31], 0.6, rtol=1e-7)
    np.testing.assert_allclose(rates[31:], 0.31715729, rtol=1e-7)


def test_rates_by_epoch_have_eight_decimals():
    curve = schedule.cosine_by_epoch(
        peak=1.1e-7, total=3, warmup=0, init=0.0, final=0.0, epoch_starts=[0, 1, 2]
    )
    # Of 1.1e-7, 8.25e-8 and 2.75e-8.
    assert [float(curve(s)) for s in range(3)] == np.float32([1.1e-7, 8e-8, 3e-8]).tolist()


def test_cosine_by_epoch_adjusted_to_the_warm_up():
    arguments = {"peak": 1.0, "total": 40, "init": 0.0, "final": 0.0, "adjust_period": True}
    curve = schedule.cosine_by_epoch(warmup=15, epoch_starts=[0, 10, 22, 31], **arguments)
    # The warm-up's last epoch is 1: (e - 2) / (4 - 1) of half a cosine.
    wants = {15: 0.75, 22: 1.0, 31: 0.75}
    # It ends with an epoch: its last step is one of epoch 1 all the same.
    curve_at_the_edge = schedule.cosine_by_epoch(
        warmup=22, epoch_starts=[0, 10, 22, 31], **arguments
    )
    for step, want in wants.items():
        assert float(curve(step)) == pytest.approx(want)
        if step >= 22:
            assert float(curve_at_the_edge(step)) == pytest.approx(want)
    # Without a warm-up cvnets takes epoch 0 for its last one.
    curve = schedule.cosine_by_epoch(warmup=0, epoch_starts=[0, 10, 22, 31], **arguments)
    np.testing.assert_allclose(
        [float(curve(s)) for s in (0, 10, 22, 31)], [0.85355339, 1.0, 0.85355339, 0.5], rtol=1e-6
    )


def test_rates_of_mobilevit_v2():
    """The spec's numbers for width 2.0: 1024 of 1,281,167 images a step, 300 epochs."""
    shapes = multiscale.Shapes((multiscale.Shape(256, 256, 1024),))
    starts = shapes.epoch_starts(1_281_167, 300)
    assert starts[:3].tolist() == [0, 1252, 2503]  # 1251.14 and 2502.28, rounded up
    curve = schedule.cosine_by_epoch(
        peak=0.002, total=375_342, warmup=20_000, init=1e-6, final=0.0002, epoch_starts=starts
    )
    assert float(curve(10_000)) == pytest.approx((1e-6 + 0.002) / 2, rel=1e-6)
    assert starts[15] < 20_000 < starts[16]
    factor = (1 + math.cos(math.pi * 15 / 300)) / 2
    assert factor == pytest.approx(0.9938, abs=5e-5)
    assert float(curve(20_000)) == pytest.approx(0.0002 + 0.0018 * factor, abs=6e-9)
    assert float(curve(starts[16])) == pytest.approx(0.0019874, abs=5e-8)
    assert float(curve(375_341)) == pytest.approx(0.00020005, rel=1e-6)  # not quite 0.0002


def test_polynomial():
    curve = schedule.polynomial(peak=1.0, total=99, warmup=0, init=0.0, final=0.1, power=2.0)
    assert [float(curve(s)) for s in (0, 50, 100)] == pytest.approx([1.0, 0.325, 0.1])
    curve = schedule.polynomial(peak=1.0, total=109, warmup=10, init=0.5, final=0.0)
    assert [float(curve(s)) for s in (0, 5, 10)] == pytest.approx([0.5, 0.75, 1.0])
    assert float(curve(60)) == pytest.approx(0.5**0.9, rel=1e-6)


def test_multi_step():
    curve = schedule.multi_step(
        peak=0.5,
        total=40,
        warmup=4,
        init=0.1,
        milestones=(1, 3),
        gamma=0.2,
        epoch_starts=[0, 10, 22, 31],
    )
    wants = {0: 0.1, 2: 0.3, 4: 0.5, 9: 0.5, 10: 0.1, 30: 0.1, 31: 0.02, 39: 0.02}
    for step, want in wants.items():
        assert float(curve(step)) == pytest.approx(want)


def test_momentum_of_batch_norm():
    """cvnets 0.1: 1e-6 + (0.1 - 1e-6) (1 + cos(pi e / E)) / 2 after the warm-up, to 6 decimals."""
    starts = np.arange(300) * 7
    curve = schedule.batch_norm_momentum(final=1e-6, warmup=10, epoch_starts=starts)
    wants = {0: 0.1, 9: 0.1, 10: 0.099997, 700: 0.075, 1400: 0.025001, 2099: 4e-6}
    for step, want in wants.items():
        assert float(curve(step)) == pytest.approx(want, rel=1e-6)
    own = 1 - layers.BATCH_NORM_MOMENTUM  # flax and PyTorch mean the opposite by it
    assert own == pytest.approx(schedule.BATCH_NORM_MOMENTUM)
    for final in (0.0, 0.2):
        with pytest.raises(ValueError, match=r"must be above 0 and at most 0\.1"):
            schedule.batch_norm_momentum(final=final, warmup=0, epoch_starts=starts)


def test_constant_after_the_warm_up():
    curve = schedule.constant(peak=1e-3, total=100, warmup=4, init=0.0)
    assert [float(curve(s)) for s in (0, 2, 4, 99)] == pytest.approx([0, 5e-4, 1e-3, 1e-3])


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warm-up of 100 steps does not fit into a run of 100"):
        schedule.cosine(peak=1.0, total=100, warmup=100, init=0.0, final=0.0)
    with pytest.raises(ValueError, match="warm-up of 101 steps does not fit"):
        schedule.cosine_by_epoch(
            peak=1.0, total=100, warmup=101, init=0.0, final=0.0, epoch_starts=[0]
        )
