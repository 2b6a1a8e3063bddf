import math

import pytest

from mobilevit_jax import schedule
from mobilevit_jax.data import multiscale

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
    assert float(curve(60)) == pytest.approx((2e-3 + 1e-4) / 2)
    quarter = 1e-4 + 0.5 * 1.9e-3 * (1 + math.cos(math.pi / 4))
    assert float(curve(35)) == pytest.approx(quarter, rel=1e-6)
    assert float(curve(110)) == pytest.approx(1e-4)


def test_constant_after_the_warm_up():
    curve = schedule.constant(peak=1e-3, total=100, warmup=4, init=0.0)
    assert [float(curve(s)) for s in (0, 2, 4, 99)] == pytest.approx([0, 5e-4, 1e-3, 1e-3])


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warm-up of 100 steps does not fit into a run of 100"):
        schedule.cosine(peak=1.0, total=100, warmup=100, init=0.0, final=0.0)
