"""Every shipped recipe: its resolved text against a golden file, and its whole train step by shape.

A golden file has the recipe as it is without an argument, and what each argument changes in it: new
values, and with a minus what there no longer is.

After a change that is meant: UPDATE_GOLDEN=1 pytest tests/test_configs.py, and read the diff.
"""

import functools
import os
import pathlib

import jax
import numpy as np
import pytest

import launch
from mobilevit_jax import build, sharding, steps, train, tree
from mobilevit_jax.data.record import Record
from mobilevit_jax.models import zoo
from tests.nets import SPEC

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = pathlib.Path(__file__).parent / "golden"
V2_WIDTHS = ("width=0.5", "width=0.75", "width=1.0", "width=1.25", "width=1.5", "width=1.75")
# All of the arguments of every recipe.
RECIPES = {
    "base": (),
    "quickstart": (),
    "fashion_mnist": (),
    "folder": (),
    "finetune": (),
    "imagenet_mobilevit": tuple(
        f"variant={variant},version={version}"
        for variant in ("xxs", "xs", "s")
        for version in ("0.1", "head")
    ),
    "imagenet_mobilevit_v2": (*V2_WIDTHS, "width=2.0"),
    "imagenet_mobilevit_v2_384": (
        *V2_WIDTHS,
        "width=2.0",
        "width=1.5,from=21k",
        "width=1.75,from=21k",
        "width=2.0,from=21k",
    ),
    "imagenet21k_mobilevit_v2": ("width=1.5", "width=1.75", "width=2.0"),
    "imagenet_mobilevit_v2_from21k": (),
    "imagenet_mobilenet": (
        *(f"version={v},width={w}" for v in (1, 2) for w in (0.25, 0.5, 0.75, 1.0)),
        "version=3,variant=small",
        "version=3,variant=large",
    ),
    "imagenet_distill": ("kind=hard",),
    "imagenet_mobilevit_range_augment": ("teacher=soft",),
}
# One of each network, and of each way to be taught.
SHAPED = (
    *(name for name, arguments in RECIPES.items() if not arguments),
    "imagenet_distill:kind=soft",
    "imagenet_distill:kind=hard",
    "imagenet_mobilevit_range_augment:teacher=soft",
    "imagenet_mobilevit:variant=xxs",
    "imagenet_mobilevit_v2:width=0.5",
    "imagenet_mobilevit_v2_384:width=0.5",
    "imagenet21k_mobilevit_v2:width=1.5",
    "imagenet_mobilenet:version=1,width=0.25",
    "imagenet_mobilenet:version=2,width=0.25",
    "imagenet_mobilenet:version=3,variant=small",
)
IMAGES = 1_281_167  # of ImageNet-1k: enough for every warm-up


BAD_ARGUMENTS = [
    (
        "imagenet_mobilevit:variant=m",
        r"variant is 'm'; there are variant=xxs\|xs\|s, version=0.1\|head",
    ),
    ("imagenet_mobilevit:width=1.0", r"no argument 'width'; there are variant=xxs\|xs\|s"),
    ("imagenet_mobilevit_v2:1.0", r"no argument '1.0'; there are width=0.5\|0.75\|1.0\|1.25"),
    ("imagenet_mobilevit_v2:width=", r"width is ''; there are width=0.5"),
    ("imagenet_mobilevit_v2_384:width=1.0,from=21k", r"from=21k is for width=1.5\|1.75\|2.0"),
    ("imagenet21k_mobilevit_v2:width=1.0", r"width is '1.0'; there are width=1.5\|1.75\|2.0"),
    ("imagenet_mobilenet:version=3,width=0.5", "version=3 comes by variant, and has no width"),
    ("imagenet_distill:kind=firm", r"kind is 'firm'; there are kind=soft\|hard"),
    ("imagenet_mobilenet:version=4", r"version is '4'; there are version=1\|2\|3"),
]


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
    assert files == RECIPES.keys()
    assert {recipe.partition(":")[0] for recipe in SHAPED} == files


def lines(recipe):
    flat = tree.flatten_mapping(build.plain(load(recipe)))
    return [f"{key}: {value!r}\n" for key, value in sorted(flat.items())]


@pytest.mark.parametrize("recipe", RECIPES)
def test_resolved_text(recipe):
    default = lines(recipe)
    text = "".join(default)
    for argument in RECIPES[recipe]:
        own = lines(f"{recipe}:{argument}")
        kept = {line.partition(":")[0] for line in own}
        gone = [f"-{line}" for line in default if line.partition(":")[0] not in kept]
        text += "".join([f"\n{argument}\n", *(line for line in own if line not in default), *gone])
    path = GOLDEN / f"{recipe}.txt"
    if "UPDATE_GOLDEN" in os.environ:
        path.write_text(text)
    assert path.read_text() == text


@pytest.mark.parametrize(("recipe", "message"), BAD_ARGUMENTS)
def test_a_bad_argument_says_what_there_is(recipe, message):
    with pytest.raises(build.ConfigError, match=message):
        load(recipe)


def test_numbers_may_be_written_in_any_way():
    for text in ("width=2", "width=2.0", "width=2.00"):
        assert load(f"imagenet_mobilevit_v2:{text}").model.width == 2.0


@pytest.mark.parametrize(
    ("recipe", "batches"),
    [
        # Of all replicas together; recipes.md has those of one.
        ("imagenet_mobilevit", (8 * 328, 8 * 224, 8 * 128, 8 * 128, 8 * 128)),
        ("imagenet_mobilevit:version=head", (8 * 327, 8 * 227, 8 * 128, 8 * 101, 8 * 81)),
        ("imagenet_mobilenet:version=1", (4 * 392, 4 * 176, 4 * 128, 4 * 76, 4 * 64)),
        ("imagenet_mobilenet:version=2", (8 * 392, 8 * 176, 8 * 128, 8 * 80, 8 * 64)),
        ("imagenet_mobilevit_v2", (1024,)),
        ("imagenet_mobilevit_v2_384", (128,)),
        ("imagenet21k_mobilevit_v2", (4096,)),
        ("imagenet_mobilevit_v2_from21k", (256,)),
        ("imagenet_distill", (4 * 392, 4 * 174, 4 * 128, 4 * 77, 4 * 62)),
        ("imagenet_mobilevit_range_augment", (8 * 327, 8 * 227, 8 * 128, 8 * 101, 8 * 81)),
    ],
)
def test_batches_of_the_published_recipes(recipe, batches):
    table = build.shapes(load(recipe)).table
    assert tuple(shape.batch_size for shape in table) == batches


@pytest.mark.parametrize(
    ("recipe", "epoch", "rate"),
    [
        # max_lr - min_lr is ten times 0.00018; the epoch after the warm-up's last.
        ("imagenet_mobilevit_v2:width=2.0", 16, 0.0019874),
        ("imagenet_mobilevit_v2:width=0.5", 150, (0.009 + 0.0009) / 2),
        ("imagenet_mobilevit_v2:width=1.0", 299, 0.00075019),
        # 2e-4 + 1.8e-3 * (1 + cos(60 degrees)) / 2.
        ("imagenet_mobilevit", 100, 0.00155),
        ("imagenet_mobilevit:version=head", 200, 0.00065),
        ("imagenet_mobilenet:version=3", 100, 4e-4 + 0.75 * (0.8 - 4e-4)),
        ("imagenet21k_mobilevit_v2", 0, 3e-4),
        ("imagenet21k_mobilevit_v2", 40, (3e-4 + 1e-6) / 2),
        ("imagenet_mobilevit_v2_from21k", 25, 0.0055),
        ("imagenet_mobilevit_v2_384", 9, 1e-3),
    ],
)
def test_rates_of_the_published_recipes(recipe, epoch, rate, monkeypatch):
    run = experiment(recipe, monkeypatch)
    start = run.shapes.epoch_starts(IMAGES, epoch + 1)[-1]
    end = min(run.shapes.epoch_starts(IMAGES, epoch + 2)[-1], run.total_steps) - 1
    assert float(run.curve(start)) == pytest.approx(rate, abs=6e-9, rel=1e-6)
    assert float(run.curve(end)) == float(run.curve(start))
    # What the compiled step is given.
    assert run.rates["learning_rate"].shape == (run.total_steps,)
    assert run.rates["learning_rate"][end] == run.rates["learning_rate"][start]
    assert run.rates["learning_rate"][start] == pytest.approx(rate, abs=6e-9, rel=1e-6)


@pytest.mark.parametrize(
    ("recipe", "warmup", "init", "peak"),
    [
        ("imagenet_mobilevit", 3000, 2e-4, 2e-3),
        ("imagenet_mobilevit:version=head", 20000, 2e-4, 2e-3),
        ("imagenet_mobilevit_v2:width=1.25", 20000, 1e-6, 0.0049),
        ("imagenet_mobilenet:version=1", 7500, 0.05, 0.4),
        ("imagenet_mobilenet:version=3", 3000, 0.1, 0.8),
        ("imagenet_distill", 7500, 0.05, 0.4),
        ("imagenet_mobilevit_range_augment", 20000, 2e-4, 2e-3),
    ],
)
def test_warm_ups_of_the_published_recipes(recipe, warmup, init, peak, monkeypatch):
    curve = experiment(recipe, monkeypatch).curve
    assert float(curve(0)) == pytest.approx(init)
    assert float(curve(warmup // 2)) == pytest.approx((init + peak) / 2)
    assert float(curve(warmup - 1)) == pytest.approx(peak - (peak - init) / warmup)
    assert 0.95 * peak < float(curve(warmup)) < peak


def test_batch_norm_of_mobilevit_v1(monkeypatch):
    run = experiment("imagenet_mobilevit", monkeypatch)
    starts = run.shapes.epoch_starts(IMAGES, 300)
    steps_and_values = [(0, 0.1), (2999, 0.1), (starts[100], 0.075), (starts[299], 4e-6)]
    for step, value in steps_and_values:
        assert float(run.batch_norm_momentum(step)) == pytest.approx(value, rel=1e-6)
    assert experiment("imagenet_mobilevit:version=head", monkeypatch).batch_norm_momentum is None
    config = load("base")
    config.final_batch_norm_momentum = 0.2
    with pytest.raises(build.ConfigError, match=r"final_batch_norm_momentum: 0\.2 must be above 0"):
        build.experiment(config)
    config = load("base")
    config.accum_reduction = "max"
    with pytest.raises(build.ConfigError, match="accum_reduction is 'max'; use mean or sum"):
        build.experiment(config)


def experiment(recipe, monkeypatch):
    """A run of a recipe on as many images as ImageNet-1k has, without its network."""
    monkeypatch.setattr(build, "source", lambda config, split: Stub(10, IMAGES))
    monkeypatch.setattr(build, "network", lambda config, class_names: None)
    monkeypatch.setattr(build, "training", lambda config, network, epoch_starts: None)
    return build.experiment(load(recipe))


def describe(reference):
    model = zoo.create("mobilevit_v2", num_classes=1000, width=0.5)
    return "mobilevit_v2", model, SPEC._replace(size=(64, 64), resize=64)


@pytest.mark.parametrize("recipe", SHAPED)
def test_dry_run_by_shape(recipe):
    """What launch.py train --dry_run compiles, at the batch and image sizes of the recipe."""
    config = load(recipe)
    config.init = config.init or "" if config.model.name else "somewhere"
    config.teacher = "" if config.distillation.name == "none" else "somewhere"
    run = build.experiment(build.resolve(config, describe, workdir=None), dry_run=True)
    assert (run.total_steps, run.eval_every, run.save_every) == (2, 2, 2)
    assert len(run.val_source) == run.evaluation["batch_size"]
    if recipe.startswith("imagenet"):  # which is not here
        classes = 10_450 if recipe.startswith("imagenet21k") else 1000
        assert len(run.network.class_names) == classes
        assert len(run.train_source) == config.dry_run.train > 1e6
    network = run.network
    init = functools.partial(
        steps.init_state, 0, model=run.training.model, tx=run.tx, size=network.input_spec.size
    )
    state = jax.eval_shape(init)
    # One of the sizes: the smallest, which is not the one that the state was made with.
    height, width, batch_size = run.shapes.table[0]
    batch = sharding.abstract_batch(run.mesh, batch_size=batch_size, size=(height, width))
    new_state, metrics = jax.eval_shape(train.bound_step(run), state, batch)
    assert tree.difference(state, new_state) == []
    assert metrics["loss"].shape == ()
    used = steps.abstract_variables(network.model, network.input_spec.size)
    for weights in ("raw", "ema"):
        assert tree.difference(used, state.variables(weights)) == []
    outputs = jax.eval_shape(
        functools.partial(network.model.apply, train=False),
        used,
        jax.ShapeDtypeStruct((8, *network.input_spec.size, 3), "float32"),
    )
    assert outputs["logits"].shape == (8, len(network.class_names))


def test_durations_in_steps(monkeypatch):
    run = experiment("imagenet_mobilevit_v2", monkeypatch)
    assert run.total_steps > run.eval_every > 0
