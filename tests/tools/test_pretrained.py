"""Every form of reference, and every kind of bad file that may stand behind one."""

import json
import os
import shutil
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import mobilevit_jax
from mobilevit_jax import build, checkpoint, tree
from mobilevit_jax.data.transforms import InputSpec
from mobilevit_jax.models import zoo
from mobilevit_jax.tools import files, formats, names, pretrained, served
from tests import originals
from tests.weights import LABELS, random_variables

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
RUN_SPEC = InputSpec((64, 64), 72, "bilinear", "rgb", ZERO, ONE)


def same(one, other):
    one, other = tree.flatten(jax.device_get(one)), tree.flatten(jax.device_get(other))
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path, strict=True)


def hugging_face(directory, *, labels=LABELS, width=0.5, preprocessor=None, **changes):
    """A directory as Hugging Face's own tools write it; `changes` go into its config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    model = zoo.create("mobilevit_v2", num_classes=len(labels), width=width)
    flat = tree.flatten(random_variables(model, seed=3))
    state = names.to_foreign(flat, family="mobilevit_v2", layout="hf")
    safetensors.numpy.save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["MobileViTV2ForImageClassification"],
        "model_type": "mobilevitv2",
        "width_multiplier": width,
        "hidden_act": "swish",
        "id2label": {str(i): label for i, label in enumerate(labels)},
        **changes,
    }
    (directory / "config.json").write_text(json.dumps(config))
    if preprocessor is not None:
        (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return directory


def rewrite(directory, target, change):
    """A copy of a directory with its tensors changed."""
    shutil.copytree(directory, target)
    path = target / "model.safetensors"
    state = safetensors.numpy.load_file(path)
    change(state)
    safetensors.numpy.save_file(state, path)
    return target


# --- forms of reference ---------------------------------------------------------------------------


def test_a_run(workdir):
    loaded = pretrained.load(workdir)
    assert loaded.labels == LABELS
    assert loaded.input_spec == RUN_SPEC
    model = zoo.create("mobilevit_v2", num_classes=5, width=0.5)
    same(loaded.variables, random_variables(model, seed=1))
    same(pretrained.load(str(workdir), weights="raw").variables, random_variables(model, seed=0))
    logits = jax.jit(loaded.model.apply)(loaded.variables, jnp.ones((1, 64, 64, 3)))["logits"]
    assert logits.shape == (1, 5)


def test_a_run_knows_its_metrics(workdir):
    loaded = pretrained.read(workdir, weights="raw", checkpoint="7")
    assert loaded.source == {
        "reference": "flowers",
        "weights": "raw",
        "step": 7,
        "data": "folder",
        "metrics": {"top1": 0.625, "loss": 1.5},
    }
    with pytest.raises(checkpoint.CheckpointError):
        pretrained.load(workdir, checkpoint="3")


def test_a_checkpoint_of_a_run(workdir, tmp_path, monkeypatch):
    monkeypatch.chdir(workdir / "checkpoints")
    assert pretrained.read("7").source == pretrained.read(workdir).source
    assert pretrained.find_run(workdir / "best" / "7") == (workdir, "best")
    assert pretrained.find_run(tmp_path / "checkpoints" / "7") is None  # of no run
    assert served.identify("7") == "flowers-7"
    assert served.identify(str(workdir)) == "flowers"


@pytest.mark.parametrize("format", ["native", "hf", "timm", "cvnets"])
def test_directories_hold_the_run(format, workdir, request):
    directory = request.getfixturevalue(format)
    loaded, run = pretrained.load(directory), pretrained.load(workdir)
    same(loaded.variables, run.variables)
    assert loaded.labels == LABELS
    assert loaded.input_spec == RUN_SPEC
    assert loaded.model == run.model


def test_a_pytorch_file(cvnets, workdir):
    loaded = pretrained.load(cvnets / "model.pt")
    same(loaded.variables, pretrained.load(workdir).variables)
    assert loaded.model == zoo.create("mobilevit_v2", num_classes=5, width=0.5)
    assert loaded.labels == tuple(f"LABEL_{i}" for i in range(5))
    assert loaded.input_spec == InputSpec((256, 256), 288, "bicubic", "rgb", ZERO, ONE)


def test_a_bare_safetensors_file(hf, workdir):
    loaded = pretrained.load(hf / "model.safetensors")
    same(loaded.variables, pretrained.load(workdir).variables)


def test_pytorch_weights_in_a_directory(hf, workdir, tmp_path):
    torch = originals.import_torch()
    directory = shutil.copytree(hf, tmp_path / "old")
    state = safetensors.numpy.load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    tensors = {key: torch.from_numpy(array) for key, array in state.items()}
    torch.save(tensors, directory / "pytorch_model.bin")
    same(pretrained.load(directory).variables, pretrained.load(workdir).variables)


def test_a_zoo_name_has_random_weights(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    whole = pretrained.read("mobilevitv2_050", num_classes=3)
    assert whole.notes == ("the weights of mobilevitv2_050 are random, not trained",)
    loaded = whole.pretrained
    assert loaded.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert tree.count(loaded.variables["params"]) == 1_370_593 - 997 * 257
    assert loaded.variables["params"]["stem"]["conv"]["kernel"].std() > 0.05
    with pytest.raises(build.ConfigError, match="num_classes is 0"):
        pretrained.load("mobilevitv2_050", num_classes=0)


def test_a_reference_described_without_its_weights(workdir, hf, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for reference in (workdir, hf):
        family, model, spec = pretrained.describe(str(reference))
        assert (family, spec) == ("mobilevit_v2", RUN_SPEC)
        assert model == zoo.create("mobilevit_v2", num_classes=5, width=0.5)
    family, model, spec = pretrained.describe("mobilevitv2_150_in22k")
    assert (family, spec.size) == ("mobilevit_v2", (256, 256))
    assert model == zoo.create("mobilevit_v2", num_classes=10450, width=1.5)
    with pytest.raises(build.ConfigError, match="A model reference is one of"):
        pretrained.describe("nonsense")


def test_the_package_offers_it():
    assert mobilevit_jax.load is pretrained.load
    assert mobilevit_jax.create is zoo.create
    assert mobilevit_jax.__version__.count(".") == 2
    assert {"load", "create", "__version__"} <= set(dir(mobilevit_jax))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = mobilevit_jax.nonsense


def test_half_precision_is_widened(hf, workdir, tmp_path):
    def halve(state):
        for key in state:
            if state[key].dtype == np.float32:
                state[key] = state[key].astype(jnp.bfloat16)

    loaded = pretrained.load(rewrite(hf, tmp_path / "half", halve))
    for path, array in tree.flatten(loaded.variables).items():
        assert array.dtype == np.float32, path
    want = pretrained.load(workdir).variables
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), want)
    same(loaded.variables, rounded)


# --- input specification --------------------------------------------------------------------------

OLD = {
    "feature_extractor_type": "MobileViTFeatureExtractor",
    "crop_size": 256,
    "size": 288,
    "resample": 2,
    "do_flip_channel_order": True,
}
NEW = {
    "image_processor_type": "MobileViTImageProcessor",
    "crop_size": {"height": 64, "width": 96},
    "size": {"shortest_edge": 72},
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "do_flip_channel_order": False,
}


def test_an_old_preprocessor_of_hugging_face(tmp_path):
    labels = formats.default_labels(1000)
    loaded = pretrained.load(hugging_face(tmp_path / "a", labels=labels, preprocessor=OLD))
    # The file asks for BGR, and Apple's v2 weights want RGB.
    assert loaded.input_spec == InputSpec((256, 256), 288, "bilinear", "rgb", ZERO, ONE)
    assert loaded.labels[0] == "tench, Tinca tinca"
    assert loaded.labels[999].startswith("toilet tissue")


def test_a_new_preprocessor_of_hugging_face(tmp_path):
    loaded = pretrained.load(hugging_face(tmp_path / "a", preprocessor=NEW))
    assert loaded.input_spec == InputSpec((64, 96), 72, "bicubic", "rgb", ZERO, ONE)


def test_no_preprocessor_means_what_is_published(tmp_path):
    loaded = pretrained.load(hugging_face(tmp_path / "a", image_size=384))
    assert loaded.input_spec == InputSpec((384, 384), 384, "bilinear", "rgb", ZERO, ONE)


def test_bgr_of_a_fine_tuned_v2_is_doubted_aloud(tmp_path):
    directory = hugging_face(tmp_path / "a", preprocessor=OLD)
    with pytest.warns(UserWarning, match='put "channel_order": "bgr" into their config.json'):
        assert pretrained.load(directory).input_spec.channel_order == "rgb"
    directory = hugging_face(tmp_path / "b", preprocessor=OLD, channel_order="bgr")
    assert pretrained.load(directory).input_spec.channel_order == "bgr"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"do_center_crop": False}, "do_center_crop is false"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ({"size": {"height": 72, "width": 72}}, "use shortest_edge"),
        ({"resample": 5}, "resample is 5"),
        ({"image_processor_type": "ViTImageProcessor"}, "ViTImageProcessor is not known"),
        ({"crop_size": {"height": 64}}, "config.json: 'width'"),
    ],
)
def test_preprocessors_that_cannot_be_meant(change, says, tmp_path):
    directory = hugging_face(tmp_path / "a", preprocessor=NEW | change)
    with pytest.raises(checkpoint.CheckpointError, match=says):
        pretrained.load(directory)


@pytest.mark.parametrize("variant", ["xxs", "xs", "s"])
def test_v1_of_hugging_face_is_told_by_its_config(variant):
    config = {"model_type": "mobilevit", **formats.HF_V1[variant], "hidden_act": "silu"}
    found = formats.read_hf(config, OLD)
    assert (found.family, found.fields) == ("mobilevit", {"variant": variant})
    assert found.input_spec == InputSpec((256, 256), 288, "bilinear", "bgr", ZERO, ONE)
    rgb = formats.read_hf(config, OLD | {"do_flip_channel_order": False})
    assert rgb.input_spec.channel_order == "rgb"
    with pytest.raises(ValueError, match="expand_ratio is 3, not"):
        formats.read_hf(config | {"expand_ratio": 3}, OLD)


@pytest.mark.parametrize("nested", [True, False])
def test_timm_configs_new_and_old(nested, timm, tmp_path):
    values = {
        "input_size": [3, 256, 256],
        "crop_pct": 0.888,
        "interpolation": "bicubic",
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "num_classes": 5,
    }
    config = {"architecture": "mobilevitv2_050"}
    config |= {"num_classes": 5, "pretrained_cfg": values} if nested else values
    directory = shutil.copytree(timm, tmp_path / "timm")
    (directory / "config.json").write_text(json.dumps(config))
    loaded = pretrained.load(directory)
    assert loaded.input_spec == InputSpec((256, 256), 288, "bicubic", "rgb", ZERO, ONE)
    assert loaded.labels[4] == "LABEL_4"


@pytest.mark.parametrize(
    "size", [(256, 284), (256, 288), (384, 384), (224, 256), (64, 72), (32, 9)]
)
def test_crop_shares_name_the_resize(size):
    spec = InputSpec((size[0], size[0]), size[1], "bicubic", "rgb", ZERO, ONE)
    config = formats.write_timm("mobilevit_v2", {"width": 0.5}, LABELS, spec, features=256)
    assert formats.read_timm(config).input_spec == spec


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("mobilevit_s", InputSpec((256, 256), 288, "bilinear", "bgr", ZERO, ONE)),
        ("mobilevitv2_100", InputSpec((256, 256), 288, "bicubic", "rgb", ZERO, ONE)),
        ("mobilevitv2_100_384", InputSpec((384, 384), 384, "bicubic", "rgb", ZERO, ONE)),
        ("mobilenetv1_025", InputSpec((224, 224), 256, "bilinear", "rgb", ZERO, ONE)),
    ],
)
def test_zoo_names_have_the_published_specification(name, spec):
    entry = zoo.ZOO[name]
    assert formats.published_spec(entry.family, entry.size) == spec


def test_native_files_keep_the_whole_specification():
    spec = InputSpec((48, 64), 72, "lanczos", "bgr", (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    config = formats.write_native("mobilevit_v2", {"width": 0.5}, LABELS, spec, source={})
    read = formats.read_native(json.loads(json.dumps(config)))
    assert read.input_spec == spec
    assert read.labels == LABELS
    # Hugging Face's form normalises first, in RGB.
    assert formats.write_preprocessor(spec)["image_mean"] == [0.3, 0.2, 0.1]


# --- the Hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache of the Hub, and no network."""
    constants = pytest.importorskip(
        "huggingface_hub.constants", reason="huggingface_hub is not installed"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments):
        raise AssertionError("the network is asked for something")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path / "hub"


def cached(cache, repository, directory, *, leave_out=()):
    """Puts a directory into the cache as the Hub's client lays it out."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(revision)
    snapshot = root / "snapshots" / revision
    shutil.copytree(directory, snapshot, ignore=shutil.ignore_patterns(*leave_out))
    return revision


def test_a_hub_id_from_the_cache(hub, tmp_path):
    directory = hugging_face(tmp_path / "a", preprocessor=NEW)
    cached(hub, "apple/mobilevitv2-0.5-imagenet1k-256", directory)
    loaded = pretrained.load("apple/mobilevitv2-0.5-imagenet1k-256")
    same(loaded.variables, pretrained.load(directory).variables)
    assert loaded.input_spec.size == (64, 96)


def test_a_hub_id_without_its_preprocessor(hub, tmp_path):
    cached(hub, "someone/flowers", hugging_face(tmp_path / "a"))
    with pytest.warns(UserWarning, match="prepared as for the published weights"):
        loaded = pretrained.load("someone/flowers")
    assert loaded.input_spec == formats.SPECS["hf", "mobilevit_v2"]


def test_a_hub_id_with_half_its_files(hub, tmp_path):
    directory = hugging_face(tmp_path / "a", preprocessor=NEW)
    cached(hub, "someone/flowers", directory, leave_out=("model.safetensors",))
    with pytest.raises(checkpoint.CheckpointError, match=r"model\.safetensors is not in the cache"):
        pretrained.load("someone/flowers")


@pytest.mark.parametrize("revision", ["", "@main", "@0123456789abcdef0123456789abcdef01234567"])
def test_a_timm_id_from_the_cache(revision, hub, timm, workdir):
    cached(hub, "timm/mobilevitv2_050.cvnets_in1k", timm, leave_out=("preprocessor_config.json",))
    loaded = pretrained.load(f"hf-hub:timm/mobilevitv2_050.cvnets_in1k{revision}")
    same(loaded.variables, pretrained.load(workdir).variables)


def test_a_hub_id_that_is_not_there_and_no_network(hub):
    with pytest.raises(checkpoint.CheckpointError) as caught:
        pretrained.load("apple/mobilevit-small")
    said = str(caught.value)
    assert "apple/mobilevit-small: config.json is not in the cache" in said
    assert "hf download apple/mobilevit-small" in said
    assert "There is no directory apple/mobilevit-small" in said


@pytest.mark.parametrize("status", [401, 404])
def test_a_hub_id_that_does_not_exist(status, hub, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    def answer(*arguments, local_files_only=False, **options):
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        raise error

    error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    Exception.__init__(error, f"{status} Client Error.\nRepository Not Found for url: …")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)
    with pytest.raises(checkpoint.CheckpointError, match=f"cannot be fetched .*: {status} Client"):
        pretrained.load("someone/nothing")


def test_a_hub_id_that_cannot_be_one(hub):
    with pytest.raises(checkpoint.CheckpointError, match=r"some--one/it cannot be fetched"):
        pretrained.load("some--one/it")


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["nonsense", "./apple/mobilevit", "a/b/c", "/no/such/path"])
def test_an_unknown_reference_lists_the_forms(reference):
    with pytest.raises(build.ConfigError) as caught:
        pretrained.load(reference)
    for form in ("workdir", "Hugging Face", "hf-hub:timm", ".pt", "mobilevitv2_050"):
        assert form in str(caught.value)


def test_a_mistyped_path_is_not_asked_of_the_hub(hub, tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(
        build.ConfigError, match=r"name 'runs/x' \(an id on the Hub\? hf-hub:runs/x"
    ):
        pretrained.load("runs/x")
    with pytest.raises(checkpoint.CheckpointError, match="not in the cache"):
        pretrained.load("hf-hub:runs/x")


def test_a_directory_without_weights(tmp_path):
    with pytest.raises(build.ConfigError, match="holds no weights"):
        pretrained.load(tmp_path)


def test_arguments_that_do_not_go_together(native):
    with pytest.raises(build.ConfigError, match="is no workdir of a run: weights=raw"):
        pretrained.load(native, weights="raw")
    with pytest.raises(build.ConfigError, match="weights is 'last'"):
        pretrained.load(native, weights="last")
    with pytest.raises(build.ConfigError, match="has 5 classes, not 10"):
        pretrained.load(native, num_classes=10)


def damage(data, how):
    return {
        "empty": b"",
        "text": b"<html>404 Not Found</html>",
        "half": data[: len(data) // 2],
        "header length": b"\xff" * 8 + data[8:],
        "header text": data[:8] + b"x" + data[9:],
    }[how]


@pytest.mark.parametrize("how", ["empty", "text", "half", "header length", "header text"])
def test_broken_safetensors(how, hf, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage((hf / path.name).read_bytes(), how))
    with pytest.raises(
        checkpoint.CheckpointError, match=r"no whole safetensors file .*half a down"
    ):
        pretrained.load(path)


@pytest.mark.parametrize("how", ["empty", "text", "half"])
def test_broken_pytorch_files(how, cvnets, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(damage((cvnets / path.name).read_bytes(), how))
    with pytest.raises(
        checkpoint.CheckpointError, match=r"no whole PyTorch file .*half a download"
    ):
        pretrained.load(path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_execute_code_is_refused(legacy, tmp_path, monkeypatch):
    torch = originals.import_torch()
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, "evil.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(checkpoint.CheckpointError, match=r"Python code .*system.* is refused"):
        pretrained.load("evil.pt")
    assert not (tmp_path / "executed").exists()


def test_a_training_checkpoint_is_no_state_dict(tmp_path):
    torch = originals.import_torch()
    torch.save({"epoch": 3, "model_state_dict": {}}, tmp_path / "a.pt")
    with pytest.raises(checkpoint.CheckpointError, match="besides tensors it holds epoch, model_"):
        pretrained.load(tmp_path / "a.pt")
    torch.save([1, 2], tmp_path / "b.pth")
    with pytest.raises(checkpoint.CheckpointError, match="holds a list, no state dict"):
        pretrained.load(tmp_path / "b.pth")


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "cat.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(build.ConfigError, match=r"cat\.jpg is no file of weights; those end in"):
        pretrained.load(tmp_path / "cat.jpg")


def test_torch_may_be_missing(cvnets, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(build.ConfigError, match=r"model\.pt was written by PyTorch.*install torch"):
        files.read_tensors(cvnets / "model.pt")


def test_our_own_weights_without_their_config(native, tmp_path):
    path = shutil.copy(native / "model.safetensors", tmp_path)
    with pytest.raises(build.ConfigError, match=r"needs the config\.json"):
        pretrained.load(path)


def test_mixed_keys_of_v1_and_v2(hf, tmp_path):
    def mix(state):
        state["mobilevit.conv_stem.convolution.weight"] = np.zeros((16, 3, 3, 3), np.float32)

    directory = rewrite(hf, tmp_path / "mixed", mix)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"of different networks:(.*\n)*.*mobilevit"
    ):
        pretrained.load(directory)


def test_another_family_than_the_config_says(hf, tmp_path):
    directory = shutil.copytree(hf, tmp_path / "other")
    config = json.loads((hf / "config.json").read_text())
    config = {"model_type": "mobilevit", "id2label": config["id2label"]}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        checkpoint.CheckpointError, match=r"describes a mobilevit, and .* a mobilevit_v2"
    ):
        pretrained.load(directory)


def test_another_class_count_than_the_config_says(tmp_path):
    directory = hugging_face(tmp_path / "a", id2label={"0": "a", "1": "b"})
    with pytest.raises(checkpoint.CheckpointError, match=r"names 2 classes, and .* has 5"):
        pretrained.load(directory)


def test_another_width_than_the_config_says(tmp_path):
    directory = hugging_face(tmp_path / "a", width_multiplier=0.75)
    with pytest.raises(checkpoint.CheckpointError, match=r"~ .*, expected .*(\n.*)*… and \d+ more"):
        pretrained.load(directory)


@pytest.mark.parametrize(
    ("format", "lost"), [("native", "batch_stats/stem/norm/mean"), ("hf", "classifier.bias")]
)
def test_missing_and_extra_keys_are_both_listed(format, lost, request, tmp_path):
    def rename(state):
        state["surplus"] = state.pop(lost)

    directory = rewrite(request.getfixturevalue(format), tmp_path / "renamed", rename)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        pretrained.load(directory)
    said = str(caught.value)
    assert "2 " in said
    assert f"\n  - {lost} (" in said
    assert "\n  + surplus (" in said


def test_values_that_are_no_numbers_are_told(hf, tmp_path):
    def break_it(state):
        state["classifier.bias"][2] = np.nan

    directory = rewrite(hf, tmp_path / "nan", break_it)
    with pytest.warns(
        UserWarning, match=r"1 arrays hold values that are no finite .*\n  params/head"
    ):
        loaded = pretrained.load(directory)
    assert np.isnan(loaded.variables["params"]["head"]["bias"][2])


def test_arrays_of_another_type(hf, tmp_path):
    def break_it(state):
        state["classifier.bias"] = np.zeros(5, np.int32)

    with pytest.raises(
        checkpoint.CheckpointError, match=r"not float32.*\n  classifier\.bias int32"
    ):
        pretrained.load(rewrite(hf, tmp_path / "int", break_it))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"model_type": "mobi', "cannot be read"),
        ("[1]", "holds no JSON object"),
        ("{}", "is not of Hugging Face"),
        ('{"model_type": "vit"}', "model_type is 'vit'; known: mobilevit, mobilevitv2"),
        ('{"architecture": "resnet50"}', "architecture is 'resnet50'"),
        ('{"architecture": 3}', r"config\.json: "),
        ('{"library_name": "mobilevit_jax"}', "something is missing"),
        (
            '{"model_type": "mobilevitv2", "architectures": ["MobileViTV2Model"]}',
            "it is a MobileViTV2Model; only MobileViTV2ForImageClassification",
        ),
        (
            '{"model_type": "mobilevitv2", "n_attn_blocks": [1, 1, 1]}',
            r"n_attn_blocks is \[1, 1, 1",
        ),
        ('{"model_type": "mobilevitv2", "id2label": {"0": "a", "2": "b"}}', "without gaps"),
    ],
)
def test_config_files_that_cannot_be_meant(text, says, hf, tmp_path):
    directory = shutil.copytree(hf, tmp_path / "bad")
    (directory / "config.json").write_text(text)
    with pytest.raises(checkpoint.CheckpointError, match=says):
        pretrained.load(directory)
