"""Configs that take part of themselves from a model."""

import json

import jax
import jax.numpy as jnp
import pytest

from mobilevit_jax import build, optim
from mobilevit_jax.models import zoo
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
