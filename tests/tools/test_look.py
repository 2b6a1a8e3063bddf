"""`launch.py data`: counts, broken files by name, speeds, hints, pictures, of files made here."""

import io
import itertools
import json
import pathlib
import shutil

import numpy as np
import pytest
from matplotlib import image as pictures
from PIL import Image

import launch
from configs import folder as recipe
from mobilevit_jax import build
from mobilevit_jax.data import jpeg, speed, survey, transforms
from mobilevit_jax.tools import look

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIG = "--config=configs/folder.py"
STAGES = ["read", "decode", "resize, flip"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(speed, "SECONDS", 0.1)


def photo(seed, height=96, width=128):
    """Smooth, so that it is like a photograph to a JPEG encoder."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """12 training files of which 3 are broken, 4 to evaluate on; classes of 8 and 4, of 2 and 2."""
    root = tmp_path_factory.mktemp("files")
    content = {f"train/cat/{i}.jpg": encoded(photo(i)) for i in range(2)}
    content |= {
        "train/cat/cmyk.jpg": encoded(photo(2).convert("CMYK")),
        "train/cat/cut.jpg": encoded(photo(3))[:900],
        "train/cat/empty.jpg": b"",
        "train/cat/grey.jpg": encoded(photo(4).convert("L")),
        "train/cat/progressive.jpg": encoded(photo(5), progressive=True),
        "train/cat/text.jpg": b"no picture at all",
        "train/dog/0.png": encoded(photo(6), "PNG"),
        "train/dog/1.png": encoded(photo(7).convert("P"), "PNG"),
        "train/dog/large.jpg": encoded(photo(8, 300, 500)),
        "train/dog/restart.jpg": encoded(photo(9)),
        **{f"val/{name}/{i}.jpg": encoded(photo(i)) for name in ("cat", "dog") for i in (10, 11)},
    }
    if shutil.which("jpegtran"):
        path = "train/dog/restart.jpg"
        content[path] = jpeg.add_restart_markers(content[path])
    for name, data in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def config_of(root, **input):
    config = recipe.get_config()
    config.data.root = str(root)
    config.batch_size = config.eval.batch_size = 8
    config.input.size, config.input.resize = (64, 64), 72
    config.loader.threads = 2
    config.max_corrupt = 0.5
    return config


def found_in(config, **options):
    told = []
    found = look.look(
        config,
        workdir=options.get("workdir"),
        examples=options.get("examples"),
        progress=lambda what, done, total: told.append((what, done, total)),
    )
    assert all(0 <= done <= total for _, done, total in told)
    assert {what for what, _, _ in told} >= {"looking at examples"}
    return found


@pytest.fixture(scope="module")
def found(files, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "SECONDS", 0.1)
        return found_in(config_of(files), workdir=tmp_path_factory.mktemp("pictures"))


def test_counts(found):
    train, val = found.splits["train"], found.splits["val"]
    assert (train.num_examples, val.num_examples) == (12, 4)
    assert train.class_names == ("cat", "dog")
    assert train.class_counts.tolist() == [8, 4]
    assert val.class_counts.tolist() == [2, 2]
    assert train.labels_known
    assert train.indices.tolist() == list(range(12))
    # 9 are whole, one of them larger
    assert sorted(train.heights.tolist()) == [0] * 3 + [96] * 8 + [300]
    assert sorted(train.widths.tolist()) == [0] * 3 + [128] * 8 + [500]
    assert train.sizes[3:5].tolist() == [900, 0]
    restart = 1 if shutil.which("jpegtran") else 0
    assert {"JPEG, restart markers": 0, **train.formats} == {
        "JPEG": 6 - restart,
        "JPEG, progressive": 1,
        "JPEG, restart markers": restart,
        "PNG": 2,
    }
    assert train.colors == {"colour": 7, "CMYK": 1, "grey": 1}
    assert val.formats == {"JPEG": 4}
    assert val.broken == {}


def test_broken_files_are_named_with_the_reason(found, files):
    broken = found.splits["train"].broken
    assert list(broken) == [3, 4, 7]
    for index, name, reason in (
        (3, "cut.jpg", "truncated"),
        (4, "empty.jpg", "the file is empty"),
        (7, "text.jpg", "unknown format"),
    ):
        assert f"{files}/train/cat/{name}" in broken[index]
        assert reason in broken[index]
    assert found.splits["train"].whole.tolist() == [0, 1, 2, 5, 6, 8, 9, 10, 11]


def test_speed(found):
    assert [stage.name for stage in found.speed.stages] == STAGES
    assert all(stage.seconds > 0 for stage in found.speed.stages)
    assert 0 < found.speed.images <= speed.TIMED * 9 / 12  # of any 12 in a row, 9 are whole
    assert found.speed.workers == "2 threads"
    assert found.speed.parallel == 2
    assert found.speed.loader_images_per_second > 0
    assert found.speed.first_batch_seconds > 0
    assert found.sizes == ((64, 64),)
    assert "images/s with 2 threads" in found.hints[-1]


def test_pictures(found, files):
    samples, augmented, evaluated = (pictures.imread(path) for path in found.pictures)
    assert [path.name for path in found.pictures] == [
        "samples.png",
        "augmentations.png",
        "evaluation.png",
    ]
    # cells of twice 64 pixels, 10 between; a line of text is 15, a title 25, the margin 10
    assert samples.shape[:2] == (35 + (128 + 15 + 10), 10 + 8 * 138)
    assert augmented.shape[:2] == (35 + 6 * (128 + 30 + 10), 10 + 8 * 138)
    assert evaluated.shape[:2] == (35 + (128 + 15 + 10), 10 + 4 * 138)
    for sheet in (samples, augmented, evaluated):
        cells = [sheet[35:163, x : x + 128, :3] for x in range(10, sheet.shape[1], 138)]
        assert all(cell.std() > 0.02 for cell in cells)
        for one, other in itertools.pairwise(cells):
            assert np.abs(one - other).mean() > 0.01
    # the evaluation crop of the first file, pixel by pixel
    out = np.empty((64, 64, 3), np.uint8)
    spec = build.input_spec(config_of(files))
    transforms.evaluation(spec)(build.source(config_of(files), "val")[0], out)
    np.testing.assert_allclose(
        evaluated[35:163, 10:138, :3], out.repeat(2, 0).repeat(2, 1) / 255, atol=1e-6
    )
    # the original is wider than high, so it stands on white
    assert (augmented[35:51, 10:138, :3] == 1).all()
    assert (augmented[51:147, 10:138, :3] < 1).any(axis=2).mean() > 0.99
    assert (augmented[147:163, 10:138, :3] == 1).all()


def test_a_sample_is_evenly_spread(files):
    class Unlabelled:
        class_names = ("cat", "dog")

        def __init__(self):
            self.read = []

        def __len__(self):
            return len(source)

        def __getitem__(self, i):
            self.read.append(i)
            return source[i]

    source = build.source(config_of(files), "train")
    seen = Unlabelled()
    few = survey.survey(seen, examples=3, threads=1, progress=lambda *_: None)
    assert seen.read == few.indices.tolist() == [2, 6, 10]
    assert not few.labels_known
    assert few.class_counts.tolist() == [2, 1]
    assert (few.num_examples, len(few.heights)) == (12, 3)
    every = survey.survey(seen, examples=None, threads=2, progress=lambda *_: None)
    assert every.labels_known
    assert every.class_counts.tolist() == [8, 4]
    assert survey.survey(source, examples=3, threads=1, progress=print).labels_known


def test_augment_is_a_stage_where_there_is_a_policy(files):
    config = config_of(files)
    config.unlock()
    config.policy = {"name": "rand_augment", "num_ops": 8}
    assert [stage.name for stage in found_in(config).speed.stages] == [*STAGES, "augment"]


def timed(**seconds):
    stages = tuple(speed.Stage(name.replace("_", ", "), value) for name, value in seconds.items())
    rate = 2 / sum(seconds.values())
    return speed.Speed(stages, 100, "2 threads", 2, 2, 8, 0.1, rate, {})


def hints(measured, found, size=64):
    return "\n".join(look._speed_hints(measured, found.splits["train"], [(size, size)]))


def test_hints(found):
    said = hints(timed(read=9e-3, decode=1e-3, resize_flip=1e-3), found)
    assert "read (82%)" in said
    assert "--config.loader.readers=8" in said
    decode = timed(read=1e-3, decode=9e-3, resize_flip=1e-3)
    said = hints(decode, found)
    assert "--restart-markers" in said
    assert "--short-side" not in said  # 96 pixels for crops of 64 are no waste
    assert "--short-side=64" in hints(decode, found, size=32)
    assert "augment.resize" in hints(timed(read=1e-3, decode=1e-3, resize_flip=9e-3), found)
    assert "config.policy" in hints(timed(read=1e-3, decode=1e-3, augment=9e-3), found)
    assert "nothing need be done" in hints(timed(read=1e-6, decode=2e-5), found)
    assert "Only 2 threads for 8 cores: --config.loader.threads=8" in hints(
        decode._replace(cores=8), found
    )
    sixteen = decode._replace(cores=32, parallel=16, workers="16 threads")
    assert "--config.loader.processes=32" in hints(sixteen, found)
    four = decode._replace(cores=8, parallel=4, workers="4 processes")
    assert "Only 4 processes for 8 cores: --config.loader.processes=8" in hints(four, found)
    slow = decode._replace(loader_images_per_second=0.9 / decode.seconds)
    assert "only 0.9 times" in hints(slow, found)


def test_too_many_broken_files_are_a_hint(files):
    config = config_of(files)
    config.max_corrupt = 0.01
    assert found_in(config).hints[0].startswith("25.00% of train are broken, more than")


def test_nothing_but_broken_files(tmp_path):
    for path in ("train/a/0.jpg", "train/b/0.jpg", "val/a/0.jpg", "val/b/0.jpg"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(b"?")
    found = found_in(config_of(tmp_path), workdir=tmp_path)
    assert len(found.splits["train"].broken) == 2
    assert found.speed is None
    assert found.pictures == ()
    assert found.hints[0].startswith("Training would stop: 2 examples in a row are broken")
    assert json.loads(json.dumps(look.as_json(found)))["splits"]["train"]["height"] is None


def arguments(root):
    return [
        "data",
        CONFIG,
        f"--config.data.root={root}",
        "--config.batch_size=8",
        "--config.eval.batch_size=8",
        "--config.input.size=(64,64)",
        "--config.input.resize=72",
        "--config.loader.threads=2",
    ]


def test_the_verb(files, tmp_path, capsys):
    assert launch.main([*arguments(files), f"--workdir={tmp_path}/new", "--all"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.out.splitlines()]
    assert ["examples", "12", "4"] in rows
    assert ["examples a class (min / median / max)", "4 / 6 / 8", "2 each"] in rows
    assert ["broken", "3 (25.0%)", "-"] in rows
    assert ["height (min / median / max)", "96 / 96 / 300", "96 each"] in rows
    assert ["CMYK", "1 (8.3%)", "-"] in rows
    assert ["cat", "8 (66.7%)", "2 (50.0%)"] in rows
    assert [row[0] for row in rows if len(row) == 4][-5:-2] == STAGES
    assert "Broken in train: 3 of 12 looked at" in said.out
    assert f"  cannot decode {files}/train/cat/empty.jpg (the file is empty)\n" in said.out
    assert "First batch (8 images) after" in said.out
    assert "- The loader gives" in said.out
    assert f"{tmp_path}/new/augmentations.png" in said.out
    assert len(list((tmp_path / "new").glob("*.png"))) == 3


def test_json(files, capsys):
    assert launch.main([*arguments(files), "--json", "--examples=6"]) == 0
    values = json.loads(capsys.readouterr().out)
    train = values["splits"]["train"]
    assert train["examples"] == 12
    assert train["looked_at"] == 6
    assert train["examples_of_class"] == {"cat": 8, "dog": 4}
    assert train["all_labels_counted"] is True
    assert values["splits"]["val"]["height"] == [96, 96, 96]
    assert values["speed"]["stages"]["decode"]["images_per_second"] > 0
    assert values["speed"]["loader_images_per_second"] > 0
    assert values["pictures"] == []
    assert values["hints"]


def test_images_in_memory(capsys):
    assert launch.main(["data", "--config=tests/tiny.py", "--examples=20"]) == 0
    said = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines()]
    assert ["examples", "4,900", "100"] in rows
    assert ["in memory", "20 (100.0%)", "20 (100.0%)"] in rows
    assert ["examples a class (min / median / max)", "490 each", "10 each"] in rows
    assert "No picture was drawn; --workdir=DIR says where to." in said


@pytest.mark.parametrize(
    ("status", "argv", "words"),
    [
        (2, ["data"], "--config=FILE is missing"),
        (2, ["data", CONFIG, "--config.loader.thread=2"], "did you mean loader.threads"),
        (2, ["data", "--config=tests/tiny.py", "--config.augment.padding=-1"], "padding is -1"),
        (3, ["data", "--config=tests/tiny.py", "--config.augment.short=8"], "does not fit"),
        (2, ["data", "--config=tests/tiny.py", "--config.loader.prefetch=-1"], "loader.prefetch"),
        (2, ["data", "--config=tests/tiny.py", "--workdir=README.md"], "--workdir=README.md"),
        (3, ["data", CONFIG, "--config.data.root=/no/where"], "/no/where does not exist"),
    ],
)
def test_bad_usage(status, argv, words, capsys):
    assert launch.main(argv) == status
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert said.err.startswith("launch.py: ")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("argv", [["--examples=0"], ["--examples=3", "--all"]])
def test_arguments_that_contradict(argv, files, capsys):
    with pytest.raises(SystemExit) as stopped:
        launch.main([*arguments(files), *argv])
    assert stopped.value.code == 2
    assert "--examples" in capsys.readouterr().err


def test_a_file_that_vanishes_is_one_line(files, tmp_path, capsys, monkeypatch):
    root = shutil.copytree(files, tmp_path / "files")
    layout = build.source(config_of(root), "train")
    monkeypatch.setattr(build, "source", lambda config, split: layout)
    (root / "train/dog/0.png").unlink()
    assert launch.main(arguments(root)) == 3
    said = capsys.readouterr().err
    assert f"{root}/train/dog/0.png" in said
    assert said.count("\n") == 1
