"""Configs that take part of themselves from a model."""

import json

import jax
import jax.numpy as jnp
import pytest

from mobilevit_jax import build, optim
from mobilevit_jax.models import zoo
from mobilevit_jax.models.distillation import View
from tests import tiny
from tests.nets import SPEC
from tests.test_configs import load

SPEC = SPEC._replace(size=(64, 64), resize=72, channel_order="bgr", interpolation="bicubic")


def describe(reference):
    assert reference == "somewhere"
    return "mobilevit_v2", zoo.create("mobilevit_v2", num_classes=5, width=0.75), SPEC


def test_a_recipe_without_init_is_left_alone(tmp_path):
    config = load("base")
    assert build.resolve(config, describe, workdir=tmp_path) is config


def test_a_recipe_that_needs_init_says_so(tmp_path):
    with pytest.raises(build.ConfigError, match="give its reference, --config"):
        build.resolve(load("finetune"), describe, workdir=tmp_path)


def test_model_and_input_come_from_the_reference(tmp_path):
    config = load("finetune")
    config.init = "somewhere"
    resolved = build.resolve(config, describe, workdir=tmp_path)
    assert resolved.model.name == "mobilevit_v2"
    assert resolved.model.width == 0.75
    assert "num_classes" not in resolved.model
    assert build.input_spec(resolved) == SPEC
    # The network it describes can be built for other classes.
    assert build.network(resolved, ("a", "b")).model.num_classes == 2


def test_a_size_of_ones_own_stays(tmp_path):
    config = load("finetune")
    config.init, config.input.size = "somewhere", (96, 128)
    spec = build.input_spec(build.resolve(config, describe, workdir=tmp_path))
    assert spec == SPEC._replace(size=(96, 128), resize=96)


def test_going_on_needs_the_reference_no_more(tmp_path):
    config = load("finetune")
    config.init = "somewhere"
    resolved = build.resolve(config, describe, workdir=tmp_path)
    (tmp_path / "config.json").write_text(build.to_json(resolved))
    again = build.resolve(config, lambda reference: 1 / 0, workdir=tmp_path)
    assert json.loads(build.to_json(again)) == json.loads(build.to_json(resolved))


@pytest.mark.parametrize(
    ("backend", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")]
)
def test_precision_is_that_of_the_machine_unless_named(monkeypatch, backend, dtype):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    config = load("quickstart")
    assert build.network(config, ("a", "b")).model.dtype == jnp.dtype(dtype)
    assert json.loads(build.to_json(config))["dtype"] == "auto"
    config.dtype = "float16"
    assert build.network(config, ("a", "b")).model.dtype == jnp.float16


def test_a_run_in_float16_scales_its_loss_and_one_may_compute_stages_again():
    config = tiny.get_config()
    assert build.experiment(config).network.model.remat == ()
    config.dtype, config.remat = "float16", ("stem", "layer_2")
    run = build.experiment(config)
    assert run.network.model.remat == ("stem", "layer_2")
    state = run.tx.init({"head": {"kernel": jnp.ones((2, 2))}})
    assert isinstance(state, optim.LossScaleState)
    # It is how the network is trained, and no part of what it is.
    assert not {"remat", "dtype"} & set(zoo.fields(run.network.model))


def test_the_teacher_comes_from_its_reference(tmp_path):
    config = load("imagenet_distill")
    config.teacher = "somewhere"
    resolved = build.resolve(config, describe, workdir=tmp_path)
    assert resolved.model == config.model
    assert resolved.input == config.input
    assert (resolved.teacher_model.name, resolved.teacher_model.width) == ("mobilevit_v2", 0.75)
    assert resolved.teacher_model.num_classes == 5
    assert build.plain(resolved.teacher_input) == SPEC._asdict()
    (tmp_path / "config.json").write_text(build.to_json(resolved))
    again = build.resolve(config, lambda reference: 1 / 0, workdir=tmp_path)
    assert json.loads(build.to_json(again)) == json.loads(build.to_json(resolved))
    with pytest.raises(ZeroDivisionError):  # another teacher is asked for
        config.teacher = "elsewhere"
        build.resolve(config, lambda reference: 1 / 0, workdir=tmp_path)


def training(config, *, classes=5):
    config = build.resolve(config, describe, workdir=None)
    network = build.network(config, tuple("abcdefgh"[:classes]))
    return network, build.training(config, network, [0, 100])


def test_around_the_network_in_training():
    config = load("imagenet_mobilevit_range_augment:teacher=soft")
    config.teacher = "somewhere"
    network, trained = training(config)
    assert trained.model.network.student == network.model
    assert trained.model.network.teacher.width == 0.75
    # BGR and RGB, without mean and deviation.
    assert trained.model.network.view == View(reverse_channels=True)
    assert trained.task._replace(loss=None) == network.task._replace(loss=None)
    network, trained = training(load("imagenet_mobilenet"))
    assert trained is network


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("imagenet_distill", {"teacher": ""}, "give a teacher, --config.teacher=REFERENCE"),
        ("imagenet_mobilenet", {"teacher": "somewhere"}, "choose how to learn from it"),
        ("imagenet_distill", {"classes": 4}, "somewhere has 5 classes, and the images have 4"),
        ("imagenet_distill", {"distillation.temperature": 0.0}, "temperature is 0.0"),
        ("imagenet_distill:kind=hard", {"distillation.top": 6}, "from 1 to the 5 classes"),
        ("imagenet_distill", {"distillation.name": "medium"}, "there are hard, soft"),
        ("imagenet_distill", {"freeze_backbone": True}, "config.freeze_backbone computes as in"),
        ("base", {"range_augment.psnr": (40.0,)}, "config.range_augment: psnr is"),
        ("base", {"range_augment.operations": ("hue",)}, "choose from brightness, contrast, noise"),
        ("base", {"range_augment.weight": -1.0}, "config.range_augment: weight is -1.0"),
        ("base", {"input.std": (0.5, 0.5, 0.5)}, "works on pixels of 0..1"),
    ],
)
def test_what_does_not_go_together(recipe, changes, message):
    config = load(recipe)
    classes = changes.pop("classes", 5)
    if recipe == "base":
        config.range_augment.psnr = (40.0, 30.0)
    else:
        config.teacher = "" if recipe == "imagenet_mobilenet" else "somewhere"
    config.update_from_flattened_dict(changes)
    with pytest.raises(build.ConfigError, match=message):
        training(config, classes=classes)
