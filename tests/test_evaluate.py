"""Metrics of whole sets to the digit: a network whose answers are known, on real JPEGs."""

import math
import warnings

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from mobilevit_jax import build, evaluate
from mobilevit_jax.data import imagenet_sets
from mobilevit_jax.tasks import classification
from tests import nets, tiny
from tests.data.sets import IDS, corrupted, real, write

pytestmark = pytest.mark.filterwarnings("ignore:.* is not the whole:UserWarning")
# Of the class that a grey of 0..255 far from the ends means, by `Level` below.
CONFIDENCE = (math.e - 1) / (math.e + 1)


class Level(nn.Module):
    """Takes an image of grey v for class v; next come its neighbours."""

    num_classes: int = 1000

    def __call__(self, image, *, train=False):
        level = 255 * image.mean(axis=(1, 2, 3))[:, None]
        return {"logits": -jnp.abs(jnp.arange(self.num_classes) - level)}


def network(class_names=IDS):
    return build.Network(
        model=Level(len(class_names)),
        task=classification.classification(),
        input_spec=nets.SPEC,
        class_names=class_names,
    )


def score(name, root, *, net=None, weights=("raw",)):
    config = build.with_data(tiny.get_config(), name, str(root))
    variables = {which: {"params": {"unused": np.zeros(1, np.float32)}} for which in weights}
    source = build.source(config, "val")
    return evaluate.score(config, net or network(), variables, source, name=name)


def test_a_set_of_few_classes(tmp_path):
    # Class 40 is taken for 40 and 42, class 60 for 49 and 51.
    files = {f"{IDS[40]}/a.jpg": 40, f"{IDS[40]}/b.jpg": 42}
    write(tmp_path, files | {f"{IDS[60]}/a.jpg": 49, f"{IDS[60]}/b.jpg": 51})
    got = score("imagenet_a", tmp_path, weights=("raw", "ema"))
    for scope in ("imagenet_a", "imagenet_a_ema"):
        assert got[f"{scope}/top1"] == 0.25
        assert got[f"{scope}/top5"] == 0.5
        # Among the two classes 49 is nearer to 40, and 51 to 60.
        assert got[f"{scope}/top1_subset"] == 0.75
        assert got[f"{scope}/top5_subset"] == 1
        assert got[f"{scope}/ece"] == pytest.approx(CONFIDENCE - 0.25, rel=1e-4)
        loss = -math.log(CONFIDENCE) + (0 + 2 + 11 + 9) / 4
        assert got[f"{scope}/loss"] == pytest.approx(loss, rel=1e-4)
    assert len(got) == 12


def test_v2_is_of_all_classes_in_the_order_of_numbers(tmp_path):
    write(tmp_path, {f"{k}/a.jpeg": k if k < 100 else 0 for k in range(0, 1000, 9)})
    got = score("imagenet_v2_matched_frequency", tmp_path)
    assert got["imagenet_v2_matched_frequency/top1"] == pytest.approx(12 / 112)


def test_real(tmp_path):
    names = [f"val/{IDS[50]}/ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 2, 3, 4)]
    write(tmp_path, dict(zip(names, (50, 70, 90, 110), strict=True)))
    real(tmp_path, [[50], [50, 70], [], [112, 150]])
    got = score("imagenet_real", tmp_path)
    assert got["imagenet_real/top1"] == pytest.approx(2 / 3)
    assert got["imagenet_real/top5"] == 1
    # On the original labels, of the same files, one of four is right.
    assert score("imagenet_val", tmp_path)["imagenet_val/top1"] == 0.25


def test_corruption_errors(tmp_path):
    fog, frost = corrupted("", "fog", 0), corrupted("weather/", "frost", 0)
    extra = corrupted("extra/", "spatter", 0)
    # Of fog the image of class 4 is right at severities 1 and 2; of frost all but one.
    for files, right in ((fog, 2), (frost, 9), (extra, 0)):
        for i, name in enumerate(sorted(files, key=lambda file: (file.split("/")[-2], file))):
            number = IDS.index(name.split("/")[-2])
            files[name] = number if i < right else 200
    write(tmp_path, fog | frost | extra)
    got = score("imagenet_c", tmp_path)
    assert got["imagenet_c/error/fog"] == pytest.approx(0.8)
    assert got["imagenet_c/error/frost"] == pytest.approx(0.1)
    assert got["imagenet_c/error/spatter"] == 1
    assert got["imagenet_c/corruption_error"] == pytest.approx(0.45)
    assert got["imagenet_c/mce"] == pytest.approx((0.8 / 0.819324 + 0.1 / 0.826572) / 2)
    assert got["imagenet_c/top1"] == pytest.approx(11 / 30)
    assert "imagenet_c/top1_subset" not in got


def test_a_set_in_the_config_has_the_same_metrics(tmp_path):
    write(tmp_path, {f"{IDS[40]}/a.jpg": 40})
    config = build.with_data(tiny.get_config(), "imagenet_r", str(tmp_path))
    variables = {"raw": {"params": {"unused": np.zeros(1, np.float32)}}}
    got = evaluate.evaluate(config, network(), variables)
    want = score("imagenet_r", tmp_path)
    assert got == {f"val/{key.partition('/')[2]}": value for key, value in want.items()}


def test_any_other_source_has_scores_too():
    digits = tuple(str(k) for k in range(10))
    got = score("digits", "", net=network(digits))
    assert set(got) == {f"digits/{name}" for name in ("loss", "top1", "top5", "ece")}


def test_networks_of_other_classes(tmp_path):
    write(tmp_path, {f"{IDS[40]}/a.jpg": 40})
    for names in (("cat", "dog"), IDS[:5], IDS[::-1]):
        with pytest.raises(build.ConfigError, match="of the 1,000 classes of ImageNet"):
            score("imagenet_a", tmp_path, net=network(names))
    words = tuple(f"class {k}" for k in range(1000))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compared by position")
        assert score("imagenet_a", tmp_path, net=network(words))["imagenet_a/top1"] == 1


def test_where_images_are():
    config = tiny.get_config()
    assert build.with_data(config, "digits", "") is config
    assert build.with_data(config, "fashion_mnist", "").data.to_dict() == {"name": "fashion_mnist"}
    moved = build.with_data(config, "imagenet_a", "/x")
    assert moved.data.to_dict() == {"name": "imagenet_a", "root": "/x"}
    assert build.with_data(moved, "imagenet_r", "").data.root == "/x"
    with pytest.raises(build.ConfigError, match="Give --data=imagenet_a=DIRECTORY"):
        build.with_data(config, "imagenet_a", "")
    with pytest.raises(build.ConfigError, match="digits has no directory"):
        build.with_data(config, "digits", "/x")
    with pytest.raises(
        build.ConfigError, match=r"unknown name 'imagenet_b'; there are .*_val, pack"
    ):
        build.with_data(config, "imagenet_b", "/x")
    assert set(imagenet_sets.ABOUT) < set(build.sources.SOURCES)
