"""Costs of networks: sums, counts taken another way, and what the command line prints."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

import launch
from mobilevit_jax import build
from mobilevit_jax.models import layers, zoo
from mobilevit_jax.tools import profile

COUNTS = ("params", "macs", "activation_bytes")
SMALL = "mobilenetv1_025"  # the quickest to compile


def fails(capsys, *argv):
    assert launch.main(["profile", *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("launch.py: ")
    return said


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050_384", "mobilenetv3_small"])
def test_counts_are_the_zoos_and_stages_add_up(name):
    found = profile.profile(name, measure="nothing")
    entry = zoo.ZOO[name]
    assert (found.name, found.size, found.dtype) == (name, entry.size, "float32")
    assert (found.total.params, found.total.macs) == (entry.params, entry.macs)
    assert found.total.shape == (1000,)
    for count in COUNTS:
        assert sum(getattr(row, count) for row in found.stages) == getattr(found.total, count)
    assert found.measured is None
    assert {row.seconds for row in [*found.stages, found.total]} == {None}


# Millions, as on timm's model cards of these networks.
@pytest.mark.parametrize(
    ("name", "activations"),
    [("mobilevit_xxs", 8.34), ("mobilevit_s", 19.94), ("mobilevitv2_050", 8.04)],
)
def test_activations_are_those_that_timm_counts(name, activations):
    found = profile.profile(name, measure="nothing")
    assert found.total.activation_bytes / 4e6 == pytest.approx(activations, abs=0.005)


@pytest.mark.parametrize("attention", ["multihead", "linformer"])
def test_activations_by_capturing_the_layers(attention):
    model = zoo.create(
        "mobilevit", num_classes=5, variant="xxs", attention=attention, latents=3, heads=2
    )
    image = jnp.zeros((1, 64, 96, 3))
    kinds = (layers.Conv, layers.Linear)

    def run(image):
        variables = model.init(jax.random.key(0), image, mutable=["params", "batch_stats"])
        _, state = model.apply(
            variables,
            image,
            mutable=["attention", "intermediates"],
            capture_intermediates=lambda module, method: isinstance(module, kinds),
        )
        return state

    state = jax.eval_shape(run, image)
    outputs = sum(leaf.size for leaf in jax.tree.leaves(state["intermediates"]))
    scores = [leaf.shape for leaf in jax.tree.leaves(state["attention"])]
    assert len(scores) == 9
    # Attended values are as many as go into the layer behind them.
    widths = {24: 64, 6: 80, 2: 96}  # by patches, of the three blocks
    attended = sum(4 * n * widths[n] for _, _, _, n, _ in scores)
    want = 4 * (outputs + sum(map(math.prod, scores)) + attended)
    assert zoo.summary(model, size=(64, 96))[-1].activation_bytes == want


def test_bfloat16_halves_the_activations():
    full, half = (
        zoo.summary(
            zoo.create("mobilevit_v2", num_classes=5, width=0.25, dtype=dtype), size=(32, 32)
        )
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    for row, other in zip(full[:-2], half[:-2], strict=True):
        assert row.activation_bytes == 2 * other.activation_bytes > 0
    assert full[-2].activation_bytes == half[-2].activation_bytes == 5 * 4  # logits


def test_times_add_up(monkeypatch):
    calls = []
    wait = jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda x: calls.append(x.shape) or wait(x))
    found = profile.profile(SMALL, size=(32, 64), batch_size=3, repeats=4)
    assert found.measured is not None
    assert found.measured[:2] == (3, 4)
    assert found.measured.device == "cpu (cpu)"
    assert found.measured.workspace_bytes > 0
    seconds = [row.seconds for row in found.stages]
    assert min(seconds) >= 0
    assert sum(seconds) == pytest.approx(found.total.seconds)
    assert found.total.seconds > 0
    # Every stage's own output, and no other, is waited for: warm-up and repeats.
    assert calls == (4 + profile.WARM_UP) * [(3, *row.shape) for row in found.stages]
    assert found.total.shape == found.stages[-1].shape


def test_noise_makes_no_stage_negative():
    times = {"stem": 1.0, "layer_1": 5.0, "layer_2": 4.0, "total": 6.0}
    assert profile._differences(times, last="head") == pytest.approx(
        {"stem": 1.0, "layer_1": 3.0, "layer_2": 0.0, "head": 2.0, "total": 6.0}
    )


def test_a_run(workdir):
    found = profile.profile(str(workdir), measure="nothing")
    assert found.size == (64, 64)
    # The classifier has 5 outputs for 1000, of 256 channels.
    assert found.total.params == zoo.ZOO["mobilevitv2_050"].params - 995 * 257


def test_command_line(capsys):
    argv = ["profile", SMALL, "--size=32,64", "--repeats=1", "--batch=2"]
    assert launch.main(argv) == 0
    said = capsys.readouterr().out
    entry = zoo.ZOO[SMALL]
    assert f"{SMALL}, images of 32x64, float32" in said
    assert "a batch of 2 on cpu" in said
    assert profile.MACS_RULE in said
    assert profile.ACTIVATIONS_RULE in said
    rows = [line.split("│")[1:-1] for line in said.splitlines() if line.startswith("│")]
    names = [row[0].strip() for row in rows]
    assert names == ["stem", *(f"layer_{i}" for i in range(1, 6)), "head", "total"]
    assert rows[-1][2].strip() == f"{entry.params:,}"
    assert 0 < float(rows[-1][5].replace(",", "")) < 60_000
    assert all(cell.strip() for row in rows for cell in row)


def test_the_whole_zoo_is_one_table(capsys, monkeypatch):
    names = ("mobilenetv1_025", "mobilenetv1_050")
    monkeypatch.setattr(zoo, "ZOO", {name: zoo.ZOO[name] for name in names})
    assert launch.main(["profile", "--all"]) == 0
    said = capsys.readouterr().out
    rows = [line.split("│")[1:-1] for line in said.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row][:4] for row in rows] == [
        ["mobilenetv1_025", "224x224", "470,520", "46.2"],
        ["mobilenetv1_050", "224x224", "1,331,592", "149.5"],
    ]
    assert "latency" not in said
    assert launch.main(["profile", "--all", "--json", "--measure", "--size=32"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["name"] for each in said] == list(names)
    for each in said:
        assert each["size"] == [32, 32]
        assert each["measured"]["batch_size"] == 1
        assert each["total"]["params"] == zoo.ZOO[each["name"]].params
        assert each["total"]["seconds"] > 0
        assert sum(row["macs"] for row in each["stages"]) == each["total"]["macs"]
        assert {row["seconds"] for row in each["stages"]} == {None}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give a model or --all"),
        ([SMALL, "--all"], "give a model or --all"),
        ([SMALL, "--size=32x32"], "--size is '32x32'; write height and width: --size=256,256"),
        ([SMALL, "--size=0,32"], "size is 0,32"),
        ([SMALL, "--size=16,64"], "each side needs at least 32"),
        ([SMALL, "--batch=0"], "batch is 0"),
        ([SMALL, "--repeats=-1"], "repeats is -1"),
    ],
)
def test_bad_usage_is_one_line(argv, message, capsys):
    said = fails(capsys, *argv)
    assert message in said
    assert said.count("\n") == 1


def test_unknown_name(capsys):
    assert "there is no file, directory or zoo name 'mobilevit_m'" in fails(capsys, "mobilevit_m")
    with pytest.raises(build.ConfigError, match="mobilevitv2_050"):
        profile.profile("mobilevit_m")
