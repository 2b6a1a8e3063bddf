"""Every shipped recipe: its resolved text against a golden file, and its whole train step by shape.

After a change that is meant: UPDATE_GOLDEN=1 pytest tests/test_configs.py, and read the diff.
"""

import functools
import os
import pathlib

import jax
import numpy as np
import pytest

import launch
from mobilevit_jax import build, sharding, steps, tree
from mobilevit_jax.data.record import Record

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = pathlib.Path(__file__).parent / "golden"
# Recipe, and argument where it takes one.
RECIPES = ("base", "quickstart", "fashion_mnist", "folder", "finetune")


class Stub:
    """A source of the right form, as the data of most recipes are not there."""

    def __init__(self, num_classes, num_examples):
        self.class_names = tuple(f"class {i}" for i in range(num_classes))
        self._num_examples = num_examples

    def __len__(self):
        return self._num_examples

    def __getitem__(self, i):
        return Record(np.zeros((8, 8), np.uint8), 0, f"stub[{i}]")


def load(recipe):
    name, colon, argument = recipe.partition(":")
    return launch._load_recipe(f"{ROOT / 'configs' / name}.py{colon}{argument}")


def test_every_recipe_is_covered():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert files == {recipe.partition(":")[0] for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES)
def test_resolved_text(recipe):
    flat = tree.flatten_mapping(build.plain(load(recipe)))
    text = "".join(f"{key}: {value!r}\n" for key, value in sorted(flat.items()))
    path = GOLDEN / f"{recipe.replace(':', '-').replace('=', '-')}.txt"
    if "UPDATE_GOLDEN" in os.environ:
        path.write_text(text)
    assert path.read_text() == text


@pytest.mark.parametrize("recipe", RECIPES)
def test_whole_train_step_by_shape(recipe, monkeypatch):
    monkeypatch.setattr(build, "source", lambda config, split: Stub(10, 50_000))
    config = load(recipe)
    if not config.model.name:
        pytest.skip("takes its network from a reference: tests/test_build.py")
    run = build.experiment(config)
    network = run.network
    init = functools.partial(
        steps.init_state, 0, model=network.model, tx=run.tx, size=network.input_spec.size
    )
    state = jax.eval_shape(init)
    step = functools.partial(
        steps.train_step,
        model=network.model,
        task=network.task,
        tx=run.tx,
        curve=run.curve,
        input_spec=network.input_spec,
        seed=run.seed,
        ema_decay=run.ema_decay,
        accum=run.accum,
        freeze_backbone=run.freeze_backbone,
    )
    mesh = sharding.make_mesh()
    for height, width, batch_size in run.shapes.table:
        batch = sharding.abstract_batch(mesh, batch_size=batch_size, size=(height, width))
        new_state, metrics = jax.eval_shape(step, state, batch)
        assert tree.difference(state, new_state) == []
        assert metrics["loss"].shape == ()
    assert run.total_steps > run.eval_every > 0
