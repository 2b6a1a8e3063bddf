"""`launch.py prepare` through the command line: what it prints, and how it fails."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import launch
from mobilevit_jax.data import pack
from tests.data import ilsvrc

ROOT = Path(__file__).parent.parent


def run(capsys, *argv, status=0) -> tuple[str, str]:
    assert launch.main(["prepare", *map(str, argv)]) == status
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.out, said.err


def fails(capsys, status, *argv) -> str:
    out, err = run(capsys, *argv, status=status)
    assert out == ""
    assert err.startswith("launch.py: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return ilsvrc.write_tars(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture
def images(tmp_path):
    for name in ("cat", "dog"):
        ilsvrc.write(tmp_path / "images" / name, {f"{i}.jpg": ilsvrc.picture(i) for i in range(9)})
    return tmp_path / "images"


@pytest.mark.filterwarnings("always")
def test_imagenet(tars, tmp_path, capsys):
    target = tmp_path / "pack"
    out, err = run(capsys, "imagenet", f"--source={tars}", f"--target={target}", "--shard-size=4")
    assert err == (
        f"launch.py: warning: {tars} is not the whole ImageNet: 15 of 1,281,167 training images, "
        "7 of 50,000 validation images, 3 of 1,000 classes to train on, 3 of 1,000 classes to "
        "validate on\n"
    )
    assert out.splitlines()[0] == f"{target}: 3 classes"
    assert "train 15 images, 0.1 MB in 4 tar files" in " ".join(out.split())
    assert "val 7 images" in " ".join(out.split())
    assert f"'name': 'pack', 'root': '{target}'" in out
    assert len(pack.pack("train", root=str(target))) == 15
    assert pack.pack("val", root=str(target)).class_names == ilsvrc.SYNSETS

    again = run(capsys, "imagenet", f"--source={tars}", f"--target={target}", "--shard-size=4")
    assert again == (out, "")  # nothing is read for that
    size = sum(path.stat().st_size for path in target.glob("*.tar")) / 1e6
    for argv in ([target], [f"--target={target}", "--workers=1"]):
        out, _ = run(capsys, "verify", *argv)
        assert out == f"{target}: 15 train and 7 val images in {size:.1f} MB, all as written\n"


def test_folder(images, tmp_path, capsys):
    (images / "cat" / "text.jpg").write_bytes(b"no image")
    (images / "dog" / "text.jpg").write_bytes(b"no image")
    target = tmp_path / "pack"
    out, err = run(
        capsys,
        *("folder", f"--source={images}", f"--target={target}", "--short-side=32"),
        *("--quality=80", "--val-fraction=0.4", "--workers=3"),
    )
    assert err == ""
    summary = pack.read_summary(str(target))
    train, val = summary.splits["train"], summary.splits["val"]
    assert summary.options == {
        "dataset": "folder",
        "val_fraction": 0.4,
        "restart_markers": False,
        "short_side": 32,
        "quality": 80,
        "shard_size": 1024,
    }
    assert train.images + val.images == 20
    assert train.counts["shrunk"] + val.counts["shrunk"] == 18
    assert f"train {train.images} images, {train.counts['shrunk']} shrunk" in " ".join(out.split())
    assert "cannot be decoded and stayed as they are: " in out
    assert "cat/text.jpg" in out
    out, _ = run(capsys, "verify", target)
    assert "2 images cannot be opened, nor could they in the source: " in out


def test_what_is_wrong(images, tars, tmp_path, capsys):
    target, nowhere = tmp_path / "pack", tmp_path / "nowhere"
    for kind in ("imagenet", "folder"):
        said = fails(capsys, 3, kind, f"--source={nowhere}", f"--target={target}")
        assert str(nowhere) in said
        assert "--source=" in said
    both = (f"--source={images}", f"--target={target}")
    assert "--short-side=PIXELS" in fails(capsys, 2, "folder", *both, "--quality=80")
    assert "holds other files" in fails(
        capsys, 2, "folder", f"--source={images}", f"--target={tars}"
    )
    assert "--target=/proc/x cannot be made" in fails(
        capsys, 2, "folder", f"--source={images}", "--target=/proc/x"
    )
    run(capsys, "folder", *both)
    assert "begun with other options" in fails(capsys, 2, "folder", *both, "--shard-size=3")
    assert "which pack? prepare verify DIR" in fails(capsys, 2, "verify")
    assert "which pack?" in fails(capsys, 2, "verify", target, f"--target={target}")
    assert f"no pack in {nowhere}" in fails(capsys, 3, "verify", nowhere)
    shard = target / "train-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert f"are not what was written: {shard}" in fails(capsys, 3, "verify", target)
    assert "takes no --config.x" in fails(capsys, 2, "verify", target, "--config.x=1")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["tfds"],
        ["imagenet", "--source=x"],
        ["imagenet", "--target=x"],
        ["imagenet", "--source=x", "--target=x", "--quality=96", "--short-side=9"],
        ["imagenet", "--source=x", "--target=x", "--short-side=0"],
        ["imagenet", "--source=x", "--target=x", "--short=9"],
        ["folder", "--source=x", "--target=x", "--val-fraction=1"],
        ["folder", "--source=x", "--target=x", "--workers=none"],
        ["imagenet", "--source=x", "--target=x", "--val-fraction=0.5"],
    ],
)
def test_argparse_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        launch.main(["prepare", *argv])
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("source", ["images", "nowhere"])
def test_neither_jax_nor_tensorflow_is_imported(source, images, tmp_path):
    """Done or failed: it starts in less than a second, and runs where jax is not installed."""
    code = (
        "import sys, launch; status = launch.main(sys.argv[1:]); "
        "print({'jax', 'tensorflow', 'tensorflow_datasets', 'cv2', 'torch'} & set(sys.modules)); "
        "sys.exit(status)"
    )
    argv = ["prepare", "folder", f"--source={images.parent / source}", f"--target={tmp_path / 'p'}"]
    ended = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == (0 if source == "images" else 3), ended.stderr
    assert ended.stdout.splitlines()[-1] == "set()"


@pytest.mark.filterwarnings("default")
def test_from_the_official_tars_to_an_accuracy(tars, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    target, workdir = tmp_path / "pack", tmp_path / "run"
    markers = ["--restart-markers"] if shutil.which("jpegtran") else []
    run(capsys, "imagenet", f"--source={tars}", f"--target={target}", *markers)
    argv = [
        "train",
        "--config=tests/tiny.py",
        f"--workdir={workdir}",
        f"--config.data={{'name': 'pack', 'root': '{target}'}}",
        "--config.augment={'name': 'random_resized_crop'}",
        "--config.policy={'name': 'rand_augment'}",
    ]
    assert launch.main(argv) == 0
    said = capsys.readouterr()
    assert "15 training and 7 validation images of 3 classes" in said.out
    assert "broken" not in said.err  # the PNG called .JPEG is none
    trained = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert launch.main(["eval", str(workdir), "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    last = next(row for row in reversed(trained) if "val/top1" in row)
    assert evaluated == {"step": 8} | {k: v for k, v in last.items() if k.startswith("val")}
    assert json.loads((workdir / "labels.json").read_text()) == list(ilsvrc.SYNSETS)
