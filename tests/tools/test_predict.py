"""Pictures of attention: maps against the sown scores, files by their pixels."""

import csv
import functools
import io
import json
import pathlib

import jax
import matplotlib.image
import numpy as np
import pytest
from PIL import Image

import launch
from mobilevit_jax import build, report
from mobilevit_jax.data.record import DataError
from mobilevit_jax.models import zoo
from mobilevit_jax.tasks import classification
from mobilevit_jax.tools import predict, pretrained
from tests.nets import SPEC
from tests.weights import LABELS, random_variables

SIZE = (64, 96)  # a map of 2x3 at the end: odd
BLOCKS = {"layer_3": 2, "layer_4": 4, "layer_5": 3}  # layers


def network(family, **fields):
    model = zoo.create(family, num_classes=len(LABELS), **fields)
    variables = random_variables(model, seed=0, size=SIZE)
    return pretrained.Pretrained(model, variables, SPEC._replace(size=SIZE, resize=64), LABELS)


@pytest.fixture(scope="module")
def v2():
    return network("mobilevit_v2", width=0.25)


@pytest.fixture(scope="module")
def v1():
    return network("mobilevit", variant="xxs")


@pytest.fixture
def images():
    return np.random.default_rng(1).integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)


@functools.cache
def _programs(model, input_spec):
    def look(variables, image):
        return model.apply(variables, image, mutable=["attention"])

    options = {
        "model": model,
        "task": classification.classification(),
        "input_spec": input_spec,
    }
    step = functools.partial(predict.attention_step, **options)
    return jax.jit(step), jax.jit(look)


def attended(loaded, images):
    return _programs(loaded.model, loaded.input_spec)[0](loaded.variables, images)


def sown(loaded, images):
    look = _programs(loaded.model, loaded.input_spec)[1]
    outputs, state = look(loaded.variables, images.astype(np.float32) / 255)
    scores = {}
    for block, count in BLOCKS.items():
        layers = state["attention"][block]["mobilevit"]
        each = [layers[f"attention_{i}"]["attention"]["scores"] for i in range(count)]
        assert len(layers) == count
        scores[block] = [np.asarray(layer) for (layer,) in each]
    return outputs, scores


def test_v2_maps_are_the_mean_of_the_context_scores(v2, images):
    got = attended(v2, images)
    _, scores = sown(v2, images)
    shapes = {"layer_3": (2, 8, 12), "layer_4": (2, 4, 6), "layer_5": (2, 2, 4)}
    assert {name: values.shape for name, values in got["attention"].items()} == shapes
    for name, values in got["attention"].items():
        np.testing.assert_allclose(values, np.mean(scores[name], axis=0) / 4, rtol=1e-5)
        np.testing.assert_allclose(values.sum((1, 2)), 1, rtol=1e-5)
        assert np.ptp(values[0]) > 0


def test_v1_maps_are_what_a_patch_gets(v1, images):
    got = attended(v1, images)
    _, scores = sown(v1, images)
    shapes = {"layer_3": (2, 4, 6), "layer_4": (2, 2, 3), "layer_5": (2, 1, 2)}
    assert {name: values.shape for name, values in got["attention"].items()} == shapes
    for name, values in got["attention"].items():
        b, nh, nw = values.shape
        want = np.zeros((b, nh, nw))
        for layer in scores[name]:  # b p heads n n
            queries = layer.shape[1] * layer.shape[2] * layer.shape[3]
            for i in range(nh * nw):
                given = layer[..., i].reshape(b, -1).sum(1) / queries
                want[:, i // nw, i % nw] += given / len(scores[name])
        np.testing.assert_allclose(values, want, rtol=1e-5)
        np.testing.assert_allclose(values.sum((1, 2)), 1, rtol=1e-5)


def test_v2_with_the_other_kind(images):
    loaded = network("mobilevit_v2", width=0.25, attention="multihead")
    maps = attended(loaded, images)["attention"]
    assert [maps[name].shape for name in BLOCKS] == [(2, 4, 6), (2, 2, 3), (2, 1, 2)]


def test_looking_changes_no_probability(v1, images):
    outputs, _ = sown(v1, images)
    want = jax.nn.softmax(outputs["logits"])
    np.testing.assert_allclose(attended(v1, images)["probability"], want, rtol=1e-5)


@pytest.mark.parametrize("which", ["v1", "v2"])
def test_a_picture_an_image(which, images, tmp_path, request, monkeypatch):
    loaded = request.getfixturevalue(which)
    paths = [tmp_path / name for name in ("one.png", "one.bmp", "two.png")]
    for path, image in zip(paths, [*images, images[0]], strict=True):
        Image.fromarray(image).save(path)
    drawn, overlays = [], report.overlays

    def spy(path, image, maps, captions, *, title):
        drawn.append((maps, captions, title))
        overlays(path, image, maps, captions, title=title)

    monkeypatch.setattr(report, "overlays", spy)
    target = tmp_path / "made" / "here"
    got = list(predict.predict(loaded, paths, top=2, attention=target))
    plain = list(predict.predict(loaded, paths, top=2))
    assert [each.attention for each in plain] == [None] * 3
    for each, want in zip(got, plain, strict=True):
        assert each.image == want.image
        for (label, score), (want_label, want_score) in zip(each.labels, want.labels, strict=True):
            assert label == want_label
            assert score == pytest.approx(want_score, rel=1e-4)
    names = ["one.png", "one-2.png", "two.png"]
    assert [each.attention for each in got] == [target / name for name in names]
    assert sorted(path.name for path in target.iterdir()) == sorted(names)

    for image, path in zip(images, got, strict=False):
        picture = (matplotlib.image.imread(path.attention)[..., :3] * 255).round().astype(np.uint8)
        # 64x96 three times larger; a title, two lines of caption and margins above.
        assert picture.shape == (10 + 25 + 33 + 192 + 10, 10 + 4 * (288 + 10), 3)
        first = picture[68 : 68 + 192, 10 : 10 + 288]
        np.testing.assert_array_equal(first, image.repeat(3, 0).repeat(3, 1))
    maps, captions, title = drawn[0]
    want = attended(loaded, images)["attention"]
    for name, values, caption in zip(BLOCKS, maps, captions, strict=True):
        np.testing.assert_allclose(values, want[name][0] * want[name][0].size, rtol=1e-3)
        assert caption.startswith(f"{name}, {values.shape[0]}x{values.shape[1]}\n")
    label, score = got[0].labels[0]
    assert title == f"one.png: {label} {100 * score:.1f} %"


def test_names_stay_apart():
    paths = [pathlib.Path(name) for name in ("a/x.png", "b/x.jpg", "x-2.png", "x", "y.z.w")]
    names = ["x.png", "x-2.png", "x-2-2.png", "x-3.png", "y.z.png"]
    assert predict._picture_names(paths) == names


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("mobilenet_v1", {"width": 0.25}, "a MobileNetV1 has no attention"),
        ("mobilevit_v2", {"width": 0.25, "attention": "linformer"}, "mixtures of patches"),
    ],
)
def test_networks_without_maps(family, fields, message, tmp_path):
    model = zoo.create(family, num_classes=2, **fields)
    loaded = pretrained.Pretrained(model, {}, SPEC, ("a", "b"))
    with pytest.raises(build.ConfigError, match=message):
        next(predict.predict(loaded, [tmp_path / "x.png"], attention=tmp_path / "maps"))
    assert not (tmp_path / "maps").exists()


def test_command_line(workdir, images, tmp_path, capsys):
    path, target = tmp_path / "x.png", tmp_path / "maps"
    Image.fromarray(images[0]).save(path)
    argv = ["predict", str(workdir), str(path), f"--attention={target}"]
    assert launch.main([*argv, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["attention"] == str(target / "x.png")
    (target / "x.png").unlink()
    assert launch.main(argv) == 0
    assert capsys.readouterr().out.endswith(f"-> {target / 'x.png'}\n")
    assert (target / "x.png").is_file()

    assert launch.main([*argv[:-1], f"--attention={path}"]) == 2
    said = capsys.readouterr().err
    assert said == f"launch.py: --attention: {path} cannot be made: File exists\n"


def test_random_weights_are_called_so(untrained, images, tmp_path, capsys):
    Image.fromarray(images[0]).save(tmp_path / "x.png")
    assert launch.main(["predict", str(untrained), str(tmp_path / "x.png")]) == 0
    said = capsys.readouterr().err
    assert said == "launch.py: warning: the weights of untrained are random, not trained\n"


def tree_of(tmp_path, images):
    folder = tmp_path / "photos" / "below"
    folder.mkdir(parents=True)
    names = ("photos/b.PNG", "photos/below/a.png", "photos/c.bmp")
    for name, image in zip(names, [*images, images[0]], strict=True):
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return [tmp_path / name for name in names]


def test_what_a_command_line_names(images, tmp_path, monkeypatch):
    b, a, c = tree_of(tmp_path, images)
    (tmp_path / "x[1].png").write_bytes(b.read_bytes())
    photos = tmp_path / "photos"
    assert predict.find([str(photos)]) == [b, a, c]
    assert predict.find([f"{photos}/**/*.p*"]) == [a]
    assert predict.find([str(c), f"{photos}/*.PNG", "none.png"]) == [c, b, pathlib.Path("none.png")]
    assert predict.find([str(tmp_path / "x[1].png")]) == [tmp_path / "x[1].png"]
    (tmp_path / "list").write_text(f"{c}\n\n{photos}\n")
    assert predict.find([str(a)], lists=[str(tmp_path / "list")]) == [a, c, b, a, c]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b.read_bytes())))
    (record,) = predict.find(["-"])
    assert record.image == b.read_bytes()
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{c}\n"))
    assert predict.find([], lists=["-"]) == [c]
    (tmp_path / "empty").mkdir()
    for arguments, lists, message in (
        ([str(tmp_path / "empty")], [], "there is no image in"),
        (["*.nothing"], [], r"no file is like \*.nothing"),
        ([], [str(tmp_path / "none")], "cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            predict.find(arguments, lists=lists)


def test_broken_images_are_passed_over(workdir, images, tmp_path, capsys):
    b, a, c = tree_of(tmp_path, images)
    b.write_bytes(b.read_bytes()[:200])
    sheet = tmp_path / "sheet.png"
    argv = ["predict", str(workdir), str(tmp_path / "photos"), "nowhere.png", "--top=2"]
    assert launch.main([*argv, "--csv", f"--sheet={sheet}"]) == 3
    said = capsys.readouterr()
    rows = list(csv.reader(io.StringIO(said.out)))
    assert rows[0] == ["image", "rank", "label", "score"]
    assert [row[:2] for row in rows[1:]] == [[str(p), rank] for p in (a, c) for rank in "12"]
    assert all(row[2] in LABELS and 0 < float(row[3]) < 1 for row in rows[1:])
    lines = said.err.splitlines()
    assert lines[0].startswith(f"launch.py: cannot decode {b}")
    assert "nowhere.png cannot be read" in lines[1]
    assert lines[2] == "launch.py: 2 of 4 images could not be labelled"
    height, width = matplotlib.image.imread(sheet).shape[:2]
    assert height > 64
    assert width > 2 * 96
    assert launch.main([*argv[:-2], "--json"]) == 3
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["image"] for each in said] == [str(a), str(c)]
    assert launch.main(["predict", str(workdir)]) == 2
    assert "which images?" in capsys.readouterr().err


def test_lying_pictures_are_turned(workdir, images, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    Image.fromarray(np.rot90(images[0], -1)).save(tmp_path / "b.png", exif=exif)
    loaded = pretrained.load(workdir)
    a, b = predict.predict(loaded, [tmp_path / "a.png", tmp_path / "b.png"])
    assert a.labels == b.labels
