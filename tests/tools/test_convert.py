"""Round trips that change no bit, and targets that their own libraries load as they are."""

import json
import pathlib
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml
from PIL import Image

from mobilevit_jax import build, checkpoint, steps, tree
from mobilevit_jax.data import transforms
from mobilevit_jax.data.record import Record
from mobilevit_jax.models import zoo
from mobilevit_jax.tools import convert, formats, names, pretrained
from tests import originals
from tests.weights import LABELS, random_variables

FORMATS = tuple(convert.FORMATS)
FIELDS = {
    "mobilevit": {"variant": "xxs"},
    "mobilevit_v2": {"width": 0.5},
    "mobilenet_v1": {"width": 0.25},
    "mobilenet_v2": {"width": 0.25},
    "mobilenet_v3": {"variant": "small"},
}


def arrays(directory):
    return safetensors.numpy.load_file(directory / "model.safetensors")


def same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key, strict=True)


def native_directory(directory, *, family="mobilevit_v2", **changes):
    """A directory in our own format, without a run; `changes` are fields and parts of its spec."""
    fields = FIELDS[family] | changes.pop("fields", {})
    spec = formats.SPECS["cvnets", family]._replace(
        size=(64, 64), resize=72, **changes.pop("spec", {})
    )
    model = zoo.create(family, num_classes=len(LABELS), **fields)
    flat = tree.flatten(random_variables(model, seed=5))
    directory.mkdir(parents=True)
    safetensors.numpy.save_file(flat, directory / "model.safetensors")
    config = formats.write_native(family, fields, LABELS, spec, source={})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).random((2, 64, 64, 3), np.float32)


@pytest.fixture(scope="module")
def logits(workdir, image):
    """Of the run's averaged weights, computed here."""
    model, variables, _, _ = pretrained.load(workdir)
    return np.asarray(jax.jit(model.apply)(variables, jnp.asarray(image))["logits"])


def close(theirs, logits):
    theirs = theirs.detach().numpy()
    assert theirs.std() > 0.01  # else they would agree about nothing
    np.testing.assert_allclose(theirs, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_directories_are_complete(format, request):
    directory = request.getfixturevalue(format)
    files = {"config.json", "preprocessor_config.json", "model.safetensors", "README.md"}
    assert {path.name for path in directory.iterdir()} == files | (
        {"model.pt"} if format == "cvnets" else set()
    )
    config = json.loads((directory / "config.json").read_text())
    assert config["id2label"] == {str(i): label for i, label in enumerate(LABELS)}
    assert config["label2id"]["tulip, Tulipa"] == 2
    assert directory.stat().st_mode & 0o777 == directory.parent.stat().st_mode & 0o777 | 0o055
    assert not [path for path in directory.parent.iterdir() if path != directory]


@pytest.mark.parametrize("format", FORMATS)
def test_every_way_round_changes_no_bit(format, native, request, tmp_path):
    directory = request.getfixturevalue(format)
    convert.convert(directory, tmp_path / "native", format="native")
    same(arrays(tmp_path / "native"), arrays(native))
    written = convert.convert(tmp_path / "native", tmp_path / "again", format=format)
    assert written.target == tmp_path / "again"
    assert written.notes == ()
    same(arrays(tmp_path / "again"), arrays(directory))


def test_raw_weights_of_a_run(workdir, native, tmp_path):
    convert.convert(workdir, tmp_path / "raw", format="native", weights="raw", checkpoint="7")
    raw, ema = arrays(tmp_path / "raw"), arrays(native)
    want = tree.flatten(pretrained.read(workdir, weights="raw").pretrained.variables)
    same(raw, want)
    assert not np.array_equal(raw[names.STEM_KERNEL], ema[names.STEM_KERNEL])


def test_the_card_tells_metrics_and_input(native, hf):
    for directory, library in ((native, "mobilevit_jax"), (hf, "transformers")):
        _, head, body = (directory / "README.md").read_text().split("---\n", 2)
        card = yaml.safe_load(head)
        assert card["library_name"] == library
        assert card["pipeline_tag"] == "image-classification"
        metrics = card["model-index"][0]["results"][0]["metrics"]
        assert {"type": "accuracy", "name": "top1", "value": 0.75} in metrics
        assert "| top1 | 0.7500 |" in body
        assert "after 7 steps, ema weights" in body
        assert "resized to 72 pixels (bilinear), centre 64x64, RGB" in body
        assert directory.name in body


def test_a_card_of_weights_from_elsewhere_names_them(native, tmp_path):
    directory = native_directory(tmp_path / "source")
    convert.convert(directory, tmp_path / "out", format="hf")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Converted from source" in text
    assert "model-index" not in text
    # Metrics travel with the native format.
    convert.convert(native, tmp_path / "other", format="hf")
    assert "| top1 | 0.7500 |" in (tmp_path / "other" / "README.md").read_text()


# --- the others load it ---------------------------------------------------------------------------


def test_hugging_face_loads_it(hf, image, logits):
    transformers = originals.import_transformers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = transformers.MobileViTV2ForImageClassification.from_pretrained(
            hf, output_loading_info=True
        )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.id2label == dict(enumerate(LABELS))
    torch = originals.import_torch()
    close(model.eval()(torch.from_numpy(image).permute(0, 3, 1, 2)).logits, logits)


def test_the_pipeline_of_hugging_face_gives_our_probabilities(hf, tmp_path):
    transformers = originals.import_transformers()
    # The short side is what it is resized to: the library's backends differ in how they resize.
    pixels = np.random.default_rng(1).integers(0, 256, (72, 110, 3), np.uint8)
    pixels[:, :, 0] //= 3  # so that the channel order matters
    Image.fromarray(pixels).save(tmp_path / "image.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = transformers.pipeline("image-classification", model=str(hf))
        theirs = pipeline(str(tmp_path / "image.png"), top_k=5)

    model, variables, spec, labels = pretrained.load(hf)
    view = np.empty((*spec.size, 3), np.uint8)
    transforms.evaluation(spec)(Record(pixels, 0, "image"), view)
    prepared = steps.normalize(jnp.asarray(view[None]), spec)
    ours = jax.nn.softmax(jax.jit(model.apply)(variables, prepared)["logits"])[0]
    assert max(ours) - min(ours) > 0.01
    for each in theirs:
        assert abs(each["score"] - ours[labels.index(each["label"])]) < 1e-5


def test_timm_loads_it(timm, image, logits):
    library, torch = originals.import_timm(), originals.import_torch()
    weights = str(timm / "model.safetensors")
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2)
    model = library.create_model("mobilevitv2_050", num_classes=5, checkpoint_path=weights)
    close(model.eval()(pixels), logits)
    model = library.create_model(f"local-dir:{timm}", pretrained=True)
    close(model.eval()(pixels), logits)
    data = library.data.resolve_data_config(model=model)
    assert (data["input_size"], data["interpolation"]) == ([3, 64, 64], "bilinear")
    assert int(64 / data["crop_pct"]) == 72
    assert model.pretrained_cfg["label_names"] == list(LABELS)


def test_cvnets_file_is_a_plain_state_dict(cvnets):
    torch = originals.import_torch()
    state = torch.load(cvnets / "model.pt", weights_only=True)
    assert len(state) == 269
    assert state["conv_1.block.norm.num_batches_tracked"].shape == ()
    assert state["conv_1.block.norm.num_batches_tracked"].dtype == torch.int64
    assert state["layer_5.1.global_rep.3.weight"].shape == (128,)
    same({key: tensor.numpy() for key, tensor in state.items()}, arrays(cvnets))


# --- channel order --------------------------------------------------------------------------------


def test_a_stem_in_bgr_is_reversed_for_those_who_feed_rgb(tmp_path):
    spec = {"channel_order": "bgr"}
    source = native_directory(tmp_path / "source", spec=spec)
    stem = arrays(source)[names.STEM_KERNEL]

    written = convert.convert(source, tmp_path / "timm", format="timm")
    assert "timm feeds RGB, and these weights want BGR" in written.notes[0]
    reversed_stem = arrays(tmp_path / "timm")["stem.conv.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(reversed_stem, stem[:, :, ::-1])
    assert pretrained.load(tmp_path / "timm").input_spec.channel_order == "rgb"

    written = convert.convert(source, tmp_path / "hf", format="hf")
    assert written.notes == ()
    kept = arrays(tmp_path / "hf")["mobilevitv2.conv_stem.convolution.weight"]
    np.testing.assert_array_equal(kept.transpose(2, 3, 1, 0), stem)
    preprocessor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert preprocessor["do_flip_channel_order"] is True
    assert pretrained.load(tmp_path / "hf").input_spec.channel_order == "bgr"


def test_means_turn_with_the_channels(tmp_path):
    spec = {"channel_order": "bgr", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    source = native_directory(tmp_path / "source", spec=spec)
    convert.convert(source, tmp_path / "timm", format="timm")
    turned = pretrained.load(tmp_path / "timm").input_spec
    assert turned.mean == (0.3, 0.2, 0.1)
    assert turned.std == (0.6, 0.5, 0.4)


# --- the other families -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def v1(tmp_path_factory):
    """MobileViT v1 xxs as cvnets and Hugging Face have it, in BGR."""
    return native_directory(tmp_path_factory.mktemp("v1") / "source", family="mobilevit")


@pytest.fixture(scope="module")
def v1_logits(v1, image):
    """For images in RGB, turned into the weights' own order."""
    model, variables, spec, _ = pretrained.load(v1)
    assert spec.channel_order == "bgr"
    return np.asarray(jax.jit(model.apply)(variables, jnp.asarray(image[..., ::-1]))["logits"])


def test_v1_in_hugging_face(v1, image, v1_logits, tmp_path):
    transformers, torch = originals.import_transformers(), originals.import_torch()
    assert convert.convert(v1, tmp_path / "hf", format="hf").notes == ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.MobileViTForImageClassification.from_pretrained(tmp_path / "hf")
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert processor.do_flip_channel_order
    pixels = torch.from_numpy(image[..., ::-1].copy()).permute(0, 3, 1, 2)
    close(model.eval()(pixels).logits, v1_logits)


def test_v1_in_timm(v1, image, v1_logits, tmp_path):
    timm, torch = originals.import_timm(), originals.import_torch()
    written = convert.convert(v1, tmp_path / "timm", format="timm")
    assert "timm feeds RGB, and these weights want BGR" in written.notes[0]
    weights = str(tmp_path / "timm" / "model.safetensors")
    model = timm.create_model("mobilevit_xxs", num_classes=5, checkpoint_path=weights)
    close(model.eval()(torch.from_numpy(image).permute(0, 3, 1, 2)), v1_logits)


@pytest.mark.parametrize("format", FORMATS)
def test_v1_every_way_round_changes_no_bit(format, v1, tmp_path):
    if format == "cvnets":
        originals.import_torch()
    convert.convert(v1, tmp_path / "there", format=format)
    loaded = pretrained.load(tmp_path / "there")
    assert loaded.input_spec.channel_order == ("rgb" if format == "timm" else "bgr")
    convert.convert(tmp_path / "there", tmp_path / "hf", format="hf")
    convert.convert(tmp_path / "hf", tmp_path / "back", format="native")
    same(arrays(tmp_path / "back"), arrays(v1))
    convert.convert(tmp_path / "back", tmp_path / "again", format=format)
    same(arrays(tmp_path / "again"), arrays(tmp_path / "there"))


@pytest.mark.parametrize("family", ["mobilenet_v1", "mobilenet_v2", "mobilenet_v3"])
def test_mobilenets_go_to_cvnets_and_back(family, tmp_path):
    originals.import_torch()
    source = native_directory(tmp_path / "source", family=family)
    convert.convert(source, tmp_path / "cvnets", format="cvnets")
    loaded = pretrained.read(tmp_path / "cvnets" / "model.pt").pretrained
    same(tree.flatten(loaded.variables), arrays(source))
    assert loaded.model == pretrained.load(source).model
    with pytest.raises(build.ConfigError, match="has no form in hf; there is cvnets, native"):
        convert.convert(source, tmp_path / "hf", format="hf")


# --- bad input ------------------------------------------------------------------------------------


def nothing_left(parent, *, but=()):
    return sorted(path.name for path in parent.iterdir()) == sorted(but)


def test_an_existing_target_is_not_overwritten(native, tmp_path):
    target = tmp_path / "mine"
    target.mkdir()
    (target / "thesis.txt").write_text("text")
    for taken in (target, target / "thesis.txt"):
        with pytest.raises(build.ConfigError, match="there already and is not overwritten"):
            convert.convert(native, taken, format="hf")
    assert nothing_left(target, but=["thesis.txt"])
    assert (target / "thesis.txt").read_text() == "text"


def test_an_empty_target_is_taken_and_parents_are_made(native, tmp_path):
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "b"):
        convert.convert(native, target, format="native")
        same(arrays(target), arrays(native))


def test_an_unwritable_target(native, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        checkpoint.CheckpointError, match=r"target cannot be written: .*File exists"
    ):
        convert.convert(native, tmp_path / "file" / "target", format="native")


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_behind(failure, native, tmp_path, monkeypatch):
    write = convert._write_file

    def fail(path, content):
        if path.name == "README.md":
            raise failure
        write(path, content)

    monkeypatch.setattr(convert, "_write_file", fail)
    with pytest.raises((checkpoint.CheckpointError, KeyboardInterrupt)) as caught:
        convert.convert(native, tmp_path / "target", format="native")
    if isinstance(failure, OSError):
        assert "No space left on device" in str(caught.value)
    assert nothing_left(tmp_path)


def test_a_broken_source_leaves_nothing_behind(native, tmp_path):
    source = shutil.copytree(native, tmp_path / "source")
    (source / "model.safetensors").write_bytes(b"half")
    with pytest.raises(checkpoint.CheckpointError, match="no whole safetensors file"):
        convert.convert(source, tmp_path / "target", format="hf")
    assert nothing_left(tmp_path, but=["source"])


def test_an_unknown_format(native, tmp_path):
    with pytest.raises(build.ConfigError, match="'onnx'; there are native, hf, timm, cvnets"):
        convert.convert(native, tmp_path / "target", format="onnx")


@pytest.mark.parametrize("format", ["hf", "timm", "cvnets"])
def test_networks_that_the_others_do_not_have(format, tmp_path):
    if format == "cvnets":
        originals.import_torch()
    source = native_directory(tmp_path / "source", fields={"strides": (1, 1, 2, 2, 2, 2)})
    with pytest.raises(build.ConfigError, match=r"no network with strides \(1, 1, .*native"):
        convert.convert(source, tmp_path / "target", format=format)
    assert nothing_left(tmp_path, but=["source"])
    convert.convert(source, tmp_path / "target", format="native")
    assert pretrained.load(tmp_path / "target").model.strides == (1, 1, 2, 2, 2, 2)


def test_widths_that_timm_has_no_name_for(tmp_path):
    source = native_directory(tmp_path / "source", fields={"width": 0.25})
    with pytest.raises(build.ConfigError, match=r"timm has no name for .*0.25.* mobilevitv2_050"):
        convert.convert(source, tmp_path / "target", format="timm")
    convert.convert(source, tmp_path / "hf", format="hf")
    assert pretrained.load(tmp_path / "hf").model.width == 0.25


def test_means_that_hugging_face_does_not_subtract(tmp_path):
    source = native_directory(tmp_path / "source", spec={"mean": (0.5, 0.5, 0.5)})
    with pytest.raises(build.ConfigError, match=r"cannot be written as hf: .* no mean"):
        convert.convert(source, tmp_path / "target", format="hf")


def test_sizes_at_which_hugging_face_computes_something_else(tmp_path):
    source = native_directory(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["input_spec"]["size"] = [96, 96]
    (source / "config.json").write_text(json.dumps(config))
    written = convert.convert(source, tmp_path / "target", format="hf")
    assert "logits at 96x96 differ" in written.notes[0]


def test_all_of_the_source_is_told_when_it_is_unknown(tmp_path):
    with pytest.raises(build.ConfigError, match="A model reference is one of"):
        convert.convert("nonsense", tmp_path / "target", format="hf")
    assert not pathlib.Path(tmp_path / "target").exists()
