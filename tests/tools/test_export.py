"""The export verb: files that other runtimes read, compared with the network, or nothing."""

import functools
import importlib
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import launch
from mobilevit_jax import build, checkpoint, steps
from mobilevit_jax.data import transforms
from mobilevit_jax.data.record import DataError, Record
from mobilevit_jax.models import folding, zoo
from mobilevit_jax.tools import compare, export, litert, onnx_graph, pretrained
from tests.weights import LABELS, random_variables

FILES = {"config.json", "export.json", "labels.txt"}
ZOO = ("mobilevit_xxs", "mobilevit_s", "mobilevitv2_050", "mobilevitv2_100", "mobilevitv2_200")
MOBILENETS = ("mobilenetv2_025", "mobilenetv3_small", "mobilenetv3_large")


def needs(format):
    missing = [
        name for name in export.FORMATS[format].modules if importlib.util.find_spec(name) is None
    ]
    return pytest.mark.skipif(
        bool(missing), reason=f"pip install '.[{format}]': {', '.join(missing)} is missing"
    )


EVERY = [pytest.param(format, marks=needs(format)) for format in export.FORMATS]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
        (folder / str(i)).mkdir()
        Image.fromarray(pixels).save(folder / str(i) / "photo.png")
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(compare, "REPEATS", 2)


@functools.cache
def expected(reference, images):
    """What the network says of the images, and the pixels that it is given of them."""
    loaded = pretrained.load(reference)
    view = transforms.evaluation(loaded.input_spec)
    paths = sorted(images.rglob("*.png"))
    pixels = np.zeros((len(paths), *loaded.input_spec.size, 3), np.uint8)
    for path, row in zip(paths, pixels, strict=True):
        view(Record(image=path.read_bytes(), label=0, name=str(path)), row)
    normal = steps.normalize(jnp.asarray(pixels), loaded.input_spec)
    logits = jax.jit(loaded.model.apply)(loaded.variables, normal)["logits"]
    return pixels, np.asarray(normal), np.asarray(logits)


@pytest.mark.parametrize("format", EVERY)
def test_a_directory_has_all_that_it_takes(format, native, images, tmp_path, capfd):
    target = tmp_path / "out" / format
    arguments = ["export", str(native), str(target), f"--format={format}", f"--images={images}"]
    assert launch.main(arguments) == 0
    row = export.FORMATS[format]
    assert {path.name for path in target.iterdir()} == {row.file, *FILES}
    assert [path.name for path in target.parent.iterdir()] == [format]
    config = json.loads((target / "config.json").read_text())
    assert config["input_spec"] == json.loads((native / "config.json").read_text())["input_spec"]
    assert (target / "labels.txt").read_text().splitlines() == list(LABELS)
    record = json.loads((target / "export.json").read_text())
    assert record["file"] == row.file
    inside = [path for path in (target / row.file).rglob("*") if path.is_file()]
    assert record["bytes"] == sum(p.stat().st_size for p in inside or [target / row.file])
    assert record["bytes"] > 1_000_000  # the weights of v2-0.5
    assert record["input"]["shape"][1:] == [64, 64, 3]
    printed = capfd.readouterr().out
    if row.open is None:
        assert record["comparison"] is None
        assert "Apple" in printed
    else:
        assert record["comparison"]["images"] == 3
        assert record["comparison"]["share"] < 1e-4
        assert record["comparison"]["agreement"] == 1
        assert f"3 images of {images}" in printed


@needs("onnx")
@pytest.mark.parametrize("raw_input", [False, True])
def test_onnx_takes_pixels_or_normalised_images(raw_input, native, images, tmp_path):
    exported = export.export(
        native, tmp_path / "x", format="onnx", raw_input=raw_input, images=images
    )
    pixels, normal, logits = expected(native, images)
    found = export.open_onnx(exported.path)(pixels if raw_input else normal)
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-4 * np.ptp(logits))
    record = json.loads((tmp_path / "x" / "export.json").read_text())["input"]
    assert record["dtype"] == ("uint8" if raw_input else "float32")
    assert record["shape"] == ["batch", 64, 64, 3]


def test_stablehlo_takes_any_batch_and_names_its_platforms(native, images, tmp_path):
    exported = export.export(
        native, tmp_path / "x", format="stablehlo", raw_input=True, images=images
    )
    program = jax.export.deserialize(bytearray(exported.path.read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    pixels, _, logits = expected(native, images)
    for count in (1, 3):
        found = program.call(pixels[:count])
        np.testing.assert_allclose(found, logits[:count], rtol=0, atol=1e-4 * np.ptp(logits))


def test_random_weights_are_called_so(untrained, images, tmp_path):
    exported = export.export(untrained, tmp_path / "x", format="stablehlo", images=images)
    assert exported.notes[-1] == "Note: the weights of untrained are random, not trained."


@needs("onnx")
def test_another_size(native, images, tmp_path):
    export.export(native, tmp_path / "x", format="onnx", size=(96, 128), images=images)
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    spec = config["input_spec"]
    assert spec["size"] == [96, 128]
    assert spec["resize"] == 108  # 72 * 96 / 64


@needs("onnx")
def test_the_weights_asked_for(workdir, images, tmp_path):
    taken = {}
    for weights in ("raw", "ema"):
        exported = export.export(
            workdir, tmp_path / weights, format="onnx", weights=weights, images=images
        )
        _, normal, _ = expected(workdir, images)
        taken[weights] = export.open_onnx(exported.path)(normal)
    assert np.abs(taken["raw"] - taken["ema"]).max() > 0.1


@pytest.mark.skipif(importlib.util.find_spec("foolbox") is None, reason="foolbox is missing")
def test_photographs_of_imagenet_are_compared_where_there_are_some(native, tmp_path):
    export.export(native, tmp_path / "x", format="stablehlo")
    compared = json.loads((tmp_path / "x" / "export.json").read_text())["comparison"]
    assert compared["images"] == 20
    assert "foolbox" in compared["source"]
    assert compared["agreement"] == 1
    assert 0 < compared["share"] < 1e-4


@needs("tflite")
def test_quantised(native, images, tmp_path):
    export.export(native, tmp_path / "float", format="tflite", images=images)
    plain = json.loads((tmp_path / "float" / "export.json").read_text())
    for quantize, most in {"fp16": 0.55, "dynamic": 0.4, "int8": 0.45}.items():
        target = tmp_path / quantize
        calibrate = images if quantize == "int8" else None
        options = {"quantize": quantize, "calibrate": calibrate, "images": images}
        export.export(native, target, format="tflite", **options)
        small = json.loads((target / "export.json").read_text())
        assert small["bytes"] < most * plain["bytes"]
        assert small["quantize"] == quantize
        # It has lost something, and no more than allowed.
        assert plain["comparison"]["share"] < small["comparison"]["share"]
        assert small["comparison"]["share"] <= export.TOLERANCES[quantize]
    interpreter = importlib.import_module("ai_edge_litert.interpreter")
    made = interpreter.Interpreter(str(tmp_path / "int8" / "model.tflite"))
    types = {each["name"]: each["dtype"] for each in made.get_tensor_details()}
    squares = [kind for name, kind in types.items() if name.endswith("norm_1/square")]
    assert len(squares) > 1 and {*squares} == {np.float32}
    assert sum(kind is np.int8 for kind in types.values()) > len(types) / 3


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_file_that_computes_something_else_is_not_written(native, images, tmp_path, monkeypatch):
    fold = folding.fold_norms

    def broken(variables):
        folded = fold(variables)
        return {**folded, "head": {**folded["head"], "bias": np.ones(5, np.float32)}}

    monkeypatch.setattr(folding, "fold_norms", broken)
    with pytest.raises(checkpoint.CheckpointError, match="computes something else: on 3 images"):
        export.export(native, tmp_path / "x", format="stablehlo", images=images)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onnx", "quantize": "int8"}, "only tflite is quantised"),
        ({"format": "tflite", "quantize": "int4"}, "quantize is 'int4'; there are fp16, dynamic"),
        ({"format": "tflite", "quantize": "int8"}, "--calibrate=DIR"),
        ({"format": "onnx", "opset": 12}, "opset is 12; there are 13 to 21"),
        ({"format": "caffe"}, "format is 'caffe'; there are stablehlo, onnx, tflite, coreml"),
        ({"format": "stablehlo", "size": (16, 16)}, "16x16"),
    ],
)
def test_options_that_do_not_go(options, message, native, tmp_path):
    with pytest.raises(build.ConfigError, match=message):
        export.export(native, tmp_path / "x", **options)
    assert list(tmp_path.iterdir()) == []


@needs("onnx")
def test_a_network_that_onnx_cannot_express(native, images, tmp_path, monkeypatch, capfd):
    monkeypatch.delitem(onnx_graph.OTHERS, "broadcast_in_dim")
    target = tmp_path / "out"
    argv = ["export", str(native), str(target), "--format=onnx", f"--images={images}"]
    assert launch.main(argv) == 2
    said = capfd.readouterr().err
    assert said == (
        "launch.py: this network cannot be expressed: broadcast_in_dim has no form in ONNX here\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["onnx", "tflite", "coreml"])
def test_a_missing_package_is_named(format, native, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(export.importlib.sys.modules, export.FORMATS[format].modules[0], None)
    arguments = ["export", str(native), str(tmp_path / "x"), f"--format={format}"]
    assert launch.main(arguments) == 2
    assert f"pip install 'mobilevit_jax[{format}]'" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_taken(native, tmp_path, capfd):
    (tmp_path / "mine").write_text("kept")
    arguments = ["export", str(native), str(tmp_path), "--format=stablehlo"]
    assert launch.main(arguments) == 2
    assert "is there already and is not overwritten" in capfd.readouterr().err
    assert (tmp_path / "mine").read_text() == "kept"


def test_a_folder_without_images(native, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        export.export(native, tmp_path / "x", format="stablehlo", images=tmp_path / "empty")


# --- the zoo --------------------------------------------------------------------------------------


def quantized(name):
    how = [
        pytest.param(name, "tflite", each, marks=needs("tflite")) for each in litert.QUANTIZATIONS
    ]
    return [pytest.param(name, *each.values, "", marks=each.marks) for each in EVERY] + how


CASES = [case for name in ZOO for case in quantized(name)]
CASES += [pytest.param(name, "tflite", "", marks=needs("tflite")) for name in MOBILENETS]


@pytest.mark.long
@pytest.mark.parametrize(("name", "format", "quantize"), CASES)
def test_the_zoo_in_every_format(
    name, format, quantize, images, tmp_path, monkeypatch, record_property
):
    read = pretrained.read

    def drawn(*source, **options):  # fresh networks answer uniformly, and hardly tell images apart
        loaded = read(*source, **options)
        network = loaded.pretrained
        gain = 1.5 if name in MOBILENETS else 2.0
        size = network.input_spec.size
        variables = random_variables(network.model, seed=8, size=size, gain=gain)
        return loaded._replace(pretrained=network._replace(variables=variables))

    monkeypatch.setattr(pretrained, "read", drawn)
    monkeypatch.setattr(compare, "REPEATS", 10)
    options = {"quantize": quantize, "calibrate": images if quantize == "int8" else None}
    exported = export.export(name, tmp_path / "x", format=format, raw_input=True, **options)
    found = exported.comparison
    record_property("bytes", exported.bytes)
    for key, value in (found._asdict() if found is not None else {}).items():
        record_property(key, value)
    # Bytes a weight, without the norms' factors; of Core ML in float16.
    least = {"": 1.95 if format == "coreml" else 3.9, "fp16": 1.95}.get(quantize, 0.95)
    assert least < exported.bytes / zoo.ZOO[name].params < least + 0.9
    if found is not None and not quantize:
        assert found.agreement == 1
