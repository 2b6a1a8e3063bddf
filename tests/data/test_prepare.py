"""Packing: what is written, that it is always the same, and every way of being interrupted."""

import collections
import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobilevit_jax.data import jpeg, pack, prepare, shards, sources, transforms
from mobilevit_jax.data.record import SPLITS, DataError, Record
from tests.data import ilsvrc

ROOT = Path(__file__).parent.parent.parent
needs_jpegtran = pytest.mark.skipif(not shutil.which("jpegtran"), reason="needs jpegtran")


def quiet(what: str, done: int, total: int) -> None:
    del what, done, total


def encoded(pixels, kind="JPEG", **options) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


def make_folder(root: Path, *, classes: int = 3, images: int = 12) -> Path:
    for k in range(classes):
        ilsvrc.write(
            root / f"class {k}",
            {f"{i:02d}.jpg": ilsvrc.picture(100 * k + i) for i in range(images)},
        )
    return root


def pack_folder(source, target, *, workers=2, progress=quiet, val_fraction=0.25, **options):
    return prepare.folder(
        str(source),
        target,
        val_fraction=val_fraction,
        options=shards.Options(**{"shard_size": 5, **options}),
        workers=workers,
        progress=progress,
    )


def pack_imagenet(source, target, *, workers=2, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is small
        return prepare.imagenet(
            str(source),
            target,
            options=shards.Options(**{"shard_size": 4, **options}),
            workers=workers,
            progress=quiet,
        )


def content(target: Path) -> dict[str, str]:
    """A digest of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in target.iterdir()}


def refused(kind, call, *args, **options) -> str:
    with pytest.raises(kind) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images") / "source")


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("pack") / "target"
    pack_folder(source, target)
    return target


# --- what is written ----------------------------------------------------------------------------


def test_all_records_arrive_unchanged(source, packed):
    for split in SPLITS:
        given = sources.folder(split, root=str(source), val_fraction=0.25)
        read = pack.pack(split, root=str(packed))
        assert read.class_names == given.class_names
        before = sorted((r.name.removeprefix(f"{source}/"), r.label, r.image) for r in given)
        after = sorted((r.name.partition(": ")[2], r.label, r.image) for r in read)
        assert after == before


def test_shards_are_plain_tars_by_webdatasets_rules(packed):
    assert sorted(path.name for path in packed.iterdir()) == sorted(
        ["pack.json", "train.npz", "val.npz"]
        + [f"train-{k:05d}.tar" for k in range(len(list(packed.glob("train*.tar"))))]
        + [f"val-{k:05d}.tar" for k in range(len(list(packed.glob("val*.tar"))))]
    )
    read = pack.pack("train", root=str(packed))
    position = 0
    for path in sorted(packed.glob("train-*.tar")):
        assert path.stat().st_size % 10240 == 0
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
            for image, label in zip(members[::2], members[1::2], strict=True):
                # webdataset groups what has the same name up to the first dot, if it is adjacent
                assert image.name == f"{position:09d}.jpg"
                assert label.name == f"{position:09d}.cls"
                assert (image.mtime, image.uid, image.mode) == (0, 0, 0o644)
                assert tar.extractfile(image).read() == read[position].image
                assert int(tar.extractfile(label).read()) == read[position].label
                position += 1
    assert position == len(read)
    if shutil.which("tar"):
        subprocess.run(["tar", "-tf", str(packed / "train-00000.tar")], check=True)


def test_the_order_is_fixed_and_mixes_the_classes():
    assert prepare._order(12).tolist() == [7, 2, 10, 6, 1, 9, 5, 3, 11, 4, 8, 0]
    order = prepare._order(100_000)
    assert np.array_equal(np.sort(order), np.arange(100_000))
    first = np.bincount(order[:10_000] // 1000, minlength=100)  # of 100 classes of 1000 each
    assert first.min() > 60
    assert first.max() < 140


def test_imagenet_from_tars_and_from_folders_is_the_same_pack(tmp_path):
    ilsvrc.write_tars(tmp_path / "tars")
    ilsvrc.write_train_folders(tmp_path / "folders" / "train")
    ilsvrc.write(tmp_path / "folders" / "val", ilsvrc.val_files())
    ilsvrc.write(tmp_path / "folders" / "ILSVRC2012_devkit_t12", ilsvrc.devkit_files())
    summary = pack_imagenet(tmp_path / "tars", tmp_path / "a")
    pack_imagenet(tmp_path / "folders", tmp_path / "b", workers=1)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert summary.class_names == ilsvrc.SYNSETS
    assert summary.splits["train"].images == 15
    assert summary.splits["val"].images == 7
    val = {
        record.name.partition(": ")[2]: record
        for record in pack.pack("val", root=str(tmp_path / "a"))
    }
    for i, (name, data) in enumerate(ilsvrc.val_files().items(), 1):
        assert val[name].image == data
        assert ilsvrc.SYNSETS[val[name].label] == ilsvrc.val_synset(i)
    kinds = collections.Counter()
    for path in (tmp_path / "a").glob("train-*.tar"):
        with tarfile.open(path) as tar:
            kinds.update(Path(name).suffix for name in tar.getnames())
    assert kinds == {".jpg": 14, ".png": 1, ".cls": 15}  # the PNG is called .JPEG


@pytest.mark.parametrize(
    ("data", "name", "extension"),
    [
        (ilsvrc.picture(0), "x.png", "jpg"),
        (ilsvrc.picture(0, "PNG"), "x.JPEG", "png"),
        (ilsvrc.picture(0, "GIF"), "x", "gif"),
        (ilsvrc.picture(0, "BMP"), "x", "bmp"),
        (ilsvrc.picture(0, "TIFF"), "x", "tif"),
        (ilsvrc.picture(0, "WEBP"), "x", "webp"),
        (ilsvrc.picture(0, "PPM"), "x", "ppm"),
        (b"", "broken.JPG", "jpg"),
        (b"<html>", "x.html", "bin"),
    ],
)
def test_the_extension_says_what_it_is(data, name, extension):
    assert shards._extension(data, name) == extension


def test_names_of_any_bytes(tmp_path):
    source = make_folder(tmp_path / "source", classes=2, images=6)
    odd = [os.fsdecode(b"\xff\xfe.jpg"), "Gänse [1].jpg", "a\nb.jpg"]
    for name in odd:
        (source / "class 0" / name).write_bytes(ilsvrc.picture(7))
    pack_folder(source, tmp_path / "target")
    index = [
        shards.names_of(pack.parse_index((tmp_path / "target" / f"{split}.npz").read_bytes(), ""))
        for split in SPLITS
    ]
    assert {f"class 0/{name}" for name in odd} <= set(index[0] + index[1])
    assert all(record.name for record in pack.pack("train", root=str(tmp_path / "target")))


# --- the same bytes, always ---------------------------------------------------------------------


def test_workers_do_not_change_a_byte(source, packed, tmp_path):
    for workers in (1, 7):
        pack_folder(source, tmp_path / str(workers), workers=workers)
        assert content(tmp_path / str(workers)) == content(packed)


@pytest.mark.parametrize("images", [0, 1, 13, 30])
def test_interrupted_and_resumed_it_is_the_same(images, source, packed, tmp_path, monkeypatch):
    target = tmp_path / "target"
    read, left = shards._stored, [images]

    def fails_after_some(record, options):
        left[0] -= 1
        if left[0] < 0:
            raise DataError("the disk went away")
        return read(record, options)

    monkeypatch.setattr(shards, "_stored", fails_after_some)
    assert refused(DataError, pack_folder, source, target, workers=1) == "the disk went away"
    assert not (target / "pack.json").exists()
    assert not list(target.glob(".*.tar.part"))
    finished = {path.name: path.stat().st_mtime_ns for path in target.glob("*.tar")}
    assert len(finished) == images // 5
    assert "is not finished" in refused(DataError, pack.pack, "train", root=str(target))
    monkeypatch.setattr(shards, "_stored", read)
    pack_folder(source, target)
    assert content(target) == content(packed)
    after = {path.name: path.stat().st_mtime_ns for path in target.glob("*.tar")}
    assert finished.items() <= after.items()  # they were not written again


def launched(source, target, *options):
    # A suite that runs in the background of a shell has SIGINT ignored, and all it starts as well.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import sys, launch; status = launch.main(sys.argv[1:]); "
        "assert 'jax' not in sys.modules; sys.exit(status)"
    )
    argv = ["prepare", "folder", f"--source={source}", f"--target={target}", "--shard-size=5"]
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_shards(process, target, count):
    until = time.monotonic() + 60
    while len(list(target.glob("*.tar"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)


@needs_jpegtran
def test_killed_and_interrupted_for_real(tmp_path):
    source, target = make_folder(tmp_path / "source", classes=4, images=50), tmp_path / "target"
    pack_folder(source, tmp_path / "whole", restart_markers=True, val_fraction=0.1)
    for kill, finished in ((signal.SIGKILL, 2), (signal.SIGINT, 9), (signal.SIGTERM, 16)):
        process = launched(source, target, "--restart-markers", "--workers=2")
        wait_for_shards(process, target, finished)
        os.killpg(process.pid, kill)  # as a terminal does it: jpegtran gets the signal too
        _, said = process.communicate(timeout=60)
        if kill == signal.SIGINT:
            assert process.returncode == 143
            assert said.count("\n") == 1
            assert "the same command goes on" in said
        else:
            assert process.returncode == -kill
        assert not (target / "pack.json").exists()
    process = launched(source, target, "--restart-markers", "--workers=3")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "4 classes" in out
    assert content(target) == content(tmp_path / "whole")


def test_killed_in_front_of_each_file_that_is_renamed(source, tmp_path, monkeypatch):
    original, left = Path.replace, [0]
    pack_folder(source, tmp_path / "whole", shard_size=18)

    def stops(self, target):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(self, target)

    renamed = 0
    for stop in range(100):
        target = tmp_path / str(stop)
        left[0] = stop
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", stops)
            try:
                pack_folder(source, target, workers=1, shard_size=18)
            except KeyboardInterrupt:
                renamed += 1
        pack_folder(source, target, shard_size=18)
        assert content(target) == content(tmp_path / "whole")
        if left[0] >= 0:
            break
    assert renamed == 1 + 2 * 3 + 3


def test_a_finished_shard_that_was_damaged_is_written_again(source, packed, tmp_path, monkeypatch):
    target = tmp_path / "target"
    monkeypatch.setattr(prepare, "_finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pack_folder(source, target)
    monkeypatch.undo()
    (target / "train-00001.tar").write_bytes(b"cut")
    (target / ".train-00002.npz").write_bytes(b"cut")
    (target / ".train-00003.npz").unlink()
    (target / "train-00000.tar").unlink()
    pack_folder(source, target)
    assert content(target) == content(packed)


def test_a_finished_pack_is_left_alone(source, packed, tmp_path):
    copy = shutil.copytree(packed, tmp_path / "copy")
    (copy / ".prepare.json").write_text("left over")
    before = {path.name: path.stat().st_mtime_ns for path in packed.iterdir()}
    summary = pack_folder(tmp_path / "nowhere", copy)  # not even the source is looked at
    assert summary.splits["train"].images + summary.splits["val"].images == 36
    assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == before


def test_progress_counts_to_the_end(source, tmp_path):
    seen = []
    pack_folder(source, tmp_path / "target", progress=lambda *what: seen.append(what))
    totals = {what: total for what, _, total in seen}
    for split in SPLITS:
        counts = [done for what, done, _ in seen if what == split]
        assert counts == list(range(totals[split] + 1))
    assert totals["train"] + totals["val"] == 36


# --- refusals -----------------------------------------------------------------------------------


def begun(source, target, monkeypatch, **options):
    monkeypatch.setattr(prepare, "_finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pack_folder(source, target, **options)
    monkeypatch.undo()


@pytest.mark.parametrize("finished", [False, True])
def test_other_options_are_refused(finished, source, tmp_path, monkeypatch):
    target = tmp_path / "target"
    if finished:
        pack_folder(source, target)
    else:
        begun(source, target, monkeypatch)
    before = content(target)
    for options, told in (
        ({"shard_size": 6}, "shard_size was 5 and is now 6"),
        ({"short_side": 30}, "quality was null and is now 90, short_side was null and is now 30"),
        ({"restart_markers": True}, "restart_markers was false and is now true"),
        ({"val_fraction": 0.5}, "val_fraction was 0.25 and is now 0.5"),
    ):
        assert told in refused(prepare.OptionsError, pack_folder, source, target, **options)
    said = refused(prepare.OptionsError, pack_imagenet, source, target, shard_size=5)
    assert 'dataset was "folder" and is now "imagenet"' in said
    assert content(target) == before


def test_options_bind_only_where_a_shard_is_there(source, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_write_shards", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pack_folder(source, tmp_path / "target", shard_size=7)
    monkeypatch.undo()
    pack_folder(source, tmp_path / "target")
    assert content(tmp_path / "target") == content(packed)


def test_other_images_are_refused(source, tmp_path, monkeypatch):
    copy, target = shutil.copytree(source, tmp_path / "copy"), tmp_path / "target"
    begun(copy, target, monkeypatch)
    (copy / "class 0" / "99.jpg").write_bytes(ilsvrc.picture(9))
    assert "begun with other images" in refused(prepare.OptionsError, pack_folder, copy, target)
    (copy / "class 0" / "05.jpg").unlink()  # as many as before, but others
    assert "begun with other images" in refused(prepare.OptionsError, pack_folder, copy, target)
    (copy / "class 0" / "99.jpg").rename(copy / "class 0" / "05.jpg")
    pack_folder(copy, target)


def test_a_target_with_something_else_in_it(source, tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"")
    said = refused(prepare.OptionsError, pack_folder, source, tmp_path)
    assert "holds other files (holiday.jpg)" in said
    for inside in (source, source / "class 0" / "pack"):
        assert "lies inside" in refused(prepare.OptionsError, pack_folder, source, inside)
    (tmp_path / "holiday.jpg").unlink()
    (tmp_path / "train-00000.tar").write_bytes(b"somebody else's")
    assert ".prepare.json" in refused(prepare.OptionsError, pack_folder, source, tmp_path)
    said = refused(prepare.OptionsError, pack_folder, source, tmp_path / "train-00000.tar" / "x")
    assert "cannot be made" in said


def test_two_at_once_in_one_target(source, tmp_path):
    with prepare._alone_in(tmp_path):
        said = refused(prepare.OptionsError, pack_folder, source, tmp_path)
    assert "another `launch.py prepare` is writing" in said
    pack_folder(source, tmp_path)


def test_bad_sources(tmp_path):
    said = refused(DataError, pack_folder, tmp_path / "nowhere", tmp_path / "target")
    assert "nowhere" in said
    assert "--config.data" not in said
    said = refused(DataError, pack_imagenet, tmp_path / "nowhere", tmp_path / "target")
    assert "--source=DIRECTORY" in said
    assert "ILSVRC2012_img_train.tar" in said


def test_an_image_that_vanishes(source, tmp_path, monkeypatch):
    copy, target = shutil.copytree(source, tmp_path / "copy"), tmp_path / "target"
    lost, begin = copy / "class 1" / "03.jpg", prepare._begin

    def loses_one(*args):
        begin(*args)
        lost.unlink()

    monkeypatch.setattr(prepare, "_begin", loses_one)
    assert f"cannot read {lost}" in refused(DataError, pack_folder, copy, target)
    assert not (target / "pack.json").exists()
    monkeypatch.undo()
    lost.write_bytes((source / "class 1" / "03.jpg").read_bytes())
    pack_folder(copy, target)
    pack_folder(source, tmp_path / "whole")
    assert content(target) == content(tmp_path / "whole")


def test_full_disk(source, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root on Linux")
    try:
        target = disk / "target"
        said = refused(DataError, pack_folder, source, target)
        assert "No space left on device" in said
        assert "run the same command again" in said
        there = set(target.glob("*.tar"))
        assert 0 < len(there) < 8
        assert not list(target.glob(".*.part"))
        subprocess.run(["mount", "-o", "remount,size=9m", str(disk)], check=True)
        pack_folder(source, target)
        pack_folder(source, tmp_path / "whole")
        assert content(target) == content(tmp_path / "whole")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# --- what is done to the images -----------------------------------------------------------------


def with_odd_images(root: Path) -> Path:
    """All in one class, and none held out but for one of each class."""
    rng = np.random.default_rng(0)
    pixels = np.asarray(Image.open(io.BytesIO(ilsvrc.picture(1, size=(200, 140)))))
    grey16 = rng.integers(0, 65535, (120, 100), dtype=np.uint16)
    whole = ilsvrc.picture(2, size=(200, 140))
    files = {
        "big.jpg": encoded(pixels, quality=95, subsampling=0),
        "progressive.jpg": encoded(pixels, progressive=True),
        "small.jpg": ilsvrc.picture(3, size=(64, 99)),
        "grey.jpg": encoded(pixels[..., 0]),
        "cmyk.jpg": encoded(Image.fromarray(pixels).convert("CMYK")),
        "big.png": ilsvrc.picture(4, "PNG", size=(90, 200)),
        "small.png": ilsvrc.picture(5, "PNG", size=(50, 50)),
        "sixteen.png": encoded(Image.fromarray(grey16), "PNG"),
        "cut.jpg": whole[: len(whole) // 2],
        "empty.jpg": b"",
        "text.jpg": b"not an image",
    }
    ilsvrc.write(root / "train" / "a", files)
    for part in ("train/b", "val/a", "val/b"):
        ilsvrc.write(root / part, {"x.jpg": ilsvrc.picture(6)})
    return root


def stored(target):
    return {
        Path(record.name).name: record.image
        for record in pack.pack("train", root=str(target))
        if record.label == 0
    }


def opened(data):
    return Image.open(io.BytesIO(data))


def test_shrinking(tmp_path):
    source = with_odd_images(tmp_path / "source")
    before = {path.name: path.read_bytes() for path in (source / "train" / "a").iterdir()}
    summary = pack_folder(source, tmp_path / "target", short_side=64, quality=85)
    after = stored(tmp_path / "target")
    kept = {"cut.jpg", "empty.jpg", "text.jpg"}
    assert {name for name in after if after[name] == before[name]} == kept
    for name, size in {
        "big.jpg": (91, 64),
        "progressive.jpg": (91, 64),
        "grey.jpg": (91, 64),
        "cmyk.jpg": (91, 64),
        "big.png": (64, 142),
        "sixteen.png": (64, 77),
        # Small enough, but fewer bytes at this quality.
        "small.jpg": (64, 99),
        "small.png": (50, 50),
    }.items():
        image = opened(after[name])
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", size), name
        header = jpeg.read_header(after[name])
        assert header is not None
        assert header.unit == (16, 16)  # 4:2:0
    big = transforms.decode(pack.Record(before["big.jpg"], 0, ""))
    small = Image.fromarray(big).resize((91, 64), Image.Resampling.BICUBIC)
    expected = encoded(small, quality=85, subsampling="4:2:0", optimize=True)
    assert after["big.jpg"] == expected
    assert summary.splits["train"].counts == {"with restart markers": 0, "shrunk": 9}
    assert sorted(summary.splits["train"].corrupt) == [
        f"train/a/{name}" for name in ("cut.jpg", "empty.jpg", "text.jpg")
    ]
    assert summary.options["quality"] == 85


def test_shrinking_never_makes_a_small_image_larger():
    low = encoded(opened(ilsvrc.picture(3, size=(64, 99))), quality=30, optimize=True)
    assert shards._shrink(Record(low, 0, "low.jpg"), 64, 90) == (low, 0)
    assert shards._shrink(Record(low, 0, "low.jpg"), 32, 90)[1] == shards.SHRUNK


@needs_jpegtran
def test_restart_markers_change_no_pixel(tmp_path):
    source = with_odd_images(tmp_path / "source")
    before = {path.name: path.read_bytes() for path in (source / "train" / "a").iterdir()}
    summary = pack_folder(source, tmp_path / "target", restart_markers=True)
    after = stored(tmp_path / "target")
    marked = {name for name in after if after[name] != before[name]}
    assert marked == {"big.jpg", "progressive.jpg", "small.jpg", "grey.jpg"}
    assert summary.splits["train"].counts == {"with restart markers": 5, "shrunk": 0}
    assert summary.splits["train"].corrupt == ()  # nobody looked
    for name in marked:
        header = jpeg.read_header(after[name])
        assert header is not None
        assert header.tables
        old, new = (transforms.decode(pack.Record(d[name], 0, "")) for d in (before, after))
        assert np.array_equal(old, new), name


@needs_jpegtran
def test_both_together(tmp_path):
    source = with_odd_images(tmp_path / "source")
    summary = pack_folder(source, tmp_path / "a", restart_markers=True, short_side=64)
    pack_folder(source, tmp_path / "b", short_side=64)
    assert summary.splits["train"].counts == {"with restart markers": 9, "shrunk": 9}
    marked, plain = stored(tmp_path / "a"), stored(tmp_path / "b")
    for name in ("big.jpg", "big.png", "cmyk.jpg"):
        assert jpeg.add_restart_markers(plain[name]) == marked[name]


def test_without_jpegtran(source, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    target = tmp_path / "target"
    said = refused(DataError, pack_folder, source, target, restart_markers=True)
    assert "libjpeg-turbo-progs" in said
    pack_folder(source, target)  # the other option does not bind


def test_a_killed_jpegtran_says_nothing_of_the_image(source, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "jpegtran"
    script.write_text("#!/bin/sh\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    said = refused(DataError, pack_folder, source, tmp_path / "target", restart_markers=True)
    assert re.search(r"killed by signal 9 at .*\.jpg; run the same command again", said)


# --- verify -------------------------------------------------------------------------------------


def verify(target, workers=2):
    return prepare.verify(str(target), workers=workers, progress=quiet)


def test_verify_a_whole_pack(packed, tmp_path):
    checked = verify(packed)
    size = sum(path.stat().st_size for path in packed.glob("*.tar"))
    assert checked.images["train"] + checked.images["val"] == 36
    assert (checked.bytes, checked.unreadable) == (size, ())
    pack_folder(with_odd_images(tmp_path / "source"), tmp_path / "target")
    # the header of cut.jpg is whole
    assert sorted(verify(tmp_path / "target").unreadable) == [
        "train: train/a/empty.jpg",
        "train: train/a/text.jpg",
    ]


def test_verify_sees_any_changed_byte(packed, tmp_path):
    copy = shutil.copytree(packed, tmp_path / "copy")
    path = copy / "train-00001.tar"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    # a header, a name, an image, the end, and anything
    for at in [0, 9, 10, 100, 600, len(whole) - 1, *rng.integers(0, len(whole), 40).tolist()]:
        broken = bytearray(whole)
        broken[at] ^= 1 + rng.integers(255)
        path.write_bytes(broken)
        said = refused(DataError, verify, copy)
        assert f"1 images in 1 shards are not what was written: {path}" in said
    path.write_bytes(whole)
    verify(copy)


def test_verify_counts_the_damage(packed, tmp_path):
    copy = shutil.copytree(packed, tmp_path / "copy")
    for path in copy.glob("train-*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    total = pack.read_summary(str(copy)).splits["train"]
    said = refused(DataError, verify, copy)
    assert f"{total.images} images in {len(total.shards)} shards" in said
    assert "…" in said


def test_verify_says_what_the_reader_says(packed, tmp_path):
    copy = shutil.copytree(packed, tmp_path / "copy")
    (copy / "val-00000.tar").unlink()
    assert "1 of 3 val shards are missing" in refused(DataError, verify, copy)
    assert "no pack in" in refused(DataError, verify, tmp_path)


def test_one_sixth_of_a_pack_is_a_fair_sample(tmp_path):
    source = make_folder(tmp_path / "source", classes=4, images=60)
    pack_folder(source, tmp_path / "target", shard_size=36)
    read = pack.pack("train", root=str(tmp_path / "target"))
    labels = collections.Counter(read[i].label for i in range(36))
    assert set(labels) == {0, 1, 2, 3}
    assert max(labels.values()) < 20
