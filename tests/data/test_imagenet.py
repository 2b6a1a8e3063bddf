"""ImageNet in every form people have it in, damaged ones included."""

import io
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from mobilevit_jax.data import imagenet
from mobilevit_jax.data.record import SPLITS, DataError
from tests.data import ilsvrc


def read(root: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is small
        return imagenet.read(root)


def refused(root: Path) -> str:
    with pytest.raises(DataError) as error:
        read(root)
    said = str(error.value)
    assert "\n" not in said
    assert str(root) in said
    return said


def expected():
    train = [
        (data, k, name)
        for k, (_, files) in enumerate(sorted(ilsvrc.train_files().items()))
        for name, data in sorted(files.items())
    ]
    val = [
        (data, ilsvrc.SYNSETS.index(synset), name)
        for synset, (name, data) in zip(ilsvrc.truth(), ilsvrc.val_files().items(), strict=True)
    ]
    return {"train": train, "val": val}


def tars(root):
    ilsvrc.write_tars(root)


def class_tars(root):
    """The outer tar unpacked only."""
    ilsvrc.write_tars(root)
    (root / "ILSVRC2012_img_train.tar").unlink()
    for synset, files in ilsvrc.train_files().items():
        ilsvrc.write(root / "train", {f"{synset}.tar": ilsvrc.tar(files)})


def folders(root):
    ilsvrc.write_train_folders(root / "train")
    ilsvrc.write(root / "val", ilsvrc.val_files())
    ilsvrc.write(root / "ILSVRC2012_devkit_t12", ilsvrc.devkit_files())


def sorted_folders(root):
    ilsvrc.write_train_folders(root / "train")
    for synset, (name, data) in zip(ilsvrc.truth(), ilsvrc.val_files().items(), strict=True):
        ilsvrc.write(root / "val" / synset, {name: data})
    ilsvrc.write(root / "train", {"notes.txt": b"", ".hidden.JPEG": b""})


def kaggle(root):
    base = root / "ILSVRC" / "Data" / "CLS-LOC"
    ilsvrc.write_train_folders(base / "train")
    ilsvrc.write(base / "val", ilsvrc.val_files())
    rows = [
        f"ILSVRC2012_val_{i:08d},{synset} 1 2 3 4 {synset} 5 6 7 8 "
        for i, synset in enumerate(ilsvrc.truth(), 1)
    ]
    text = "\n".join(["ImageId,PredictionString", *reversed(rows), ""])
    ilsvrc.write(root, {"LOC_val_solution.csv": text.encode()})


def labels_in_a_list(root):
    ilsvrc.write_train_folders(root / "ILSVRC2012_img_train")
    ilsvrc.write(root, {"ILSVRC2012_img_val.tar": ilsvrc.tar(ilsvrc.val_files())})
    name = "imagenet_2012_validation_synset_labels.txt"
    ilsvrc.write(root, {name: "\n".join(ilsvrc.truth()).encode()})


@pytest.mark.parametrize(
    "layout", [tars, class_tars, folders, sorted_folders, kaggle, labels_in_a_list]
)
def test_every_form_gives_the_same_records(layout, tmp_path):
    layout(tmp_path)
    found = read(tmp_path)
    for split in SPLITS:
        assert found[split].class_names == ilsvrc.SYNSETS
        records = [found[split][i] for i in range(len(found[split]))]
        assert records == expected()[split]


def test_a_part_of_it_is_told_in_one_line(tmp_path):
    ilsvrc.write_tars(tmp_path)
    with pytest.warns(UserWarning, match="is not the whole ImageNet") as caught:
        imagenet.read(tmp_path)
    assert [str(warning.message) for warning in caught] == [
        f"{tmp_path} is not the whole ImageNet: 15 of 1,281,167 training images, 7 of 50,000 "
        "validation images, 3 of 1,000 classes to train on, 3 of 1,000 classes to validate on"
    ]


def test_all_of_it_needs_no_word(tmp_path, monkeypatch):
    ilsvrc.write_tars(tmp_path)
    monkeypatch.setattr(imagenet, "IMAGES", {"train": 15, "val": 7})
    monkeypatch.setattr(imagenet, "CLASSES", 3)
    imagenet.read(tmp_path)  # warnings are errors


def test_a_missing_class_moves_no_label(tmp_path):
    folders(tmp_path)
    shutil.rmtree(tmp_path / "train" / ilsvrc.SYNSETS[0])
    found = read(tmp_path)
    assert found["train"].class_names == ilsvrc.SYNSETS
    assert {found["train"][i].label for i in range(10)} == {1, 2}
    assert [record[1] for record in expected()["val"]] == [r.label for r in found["val"]]


# --- meta.mat -----------------------------------------------------------------------------------

SYNSET_OF = {number: synset for synset, number in ilsvrc.IDS.items()}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compressed", [False, True])
def test_meta_by_the_description_of_the_format(order, compressed):
    assert imagenet.read_meta(ilsvrc.meta_mat(order, compressed=compressed)) == SYNSET_OF


@pytest.mark.parametrize("compressed", [False, True])
def test_meta_written_by_scipy(compressed):
    names = [*("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children")]
    rows = np.zeros((4, 1), [(name, object) for name in names])
    for row, (synset, number) in zip(rows[:, 0], ilsvrc.IDS.items(), strict=True):
        row["ILSVRC2012_ID"] = np.float64(number)
        row["WNID"], row["words"], row["gloss"] = synset, "café, coffee", ""
        row["num_children"], row["children"] = np.uint8(2), np.array([[3, 500.0]])
    file = io.BytesIO()
    scipy.io.savemat(file, {"x": 1, "synsets": rows}, do_compression=compressed)
    assert imagenet.read_meta(file.getvalue()) == SYNSET_OF


def test_damaged_meta_is_a_value_error():
    whole = ilsvrc.meta_mat(compressed=False)
    rng = np.random.default_rng(0)
    for case in range(2000):
        broken = bytearray(whole)
        for at in rng.integers(120, len(whole), 1 + case % 3):
            broken[at] = rng.integers(256)
        try:
            assert isinstance(imagenet.read_meta(bytes(broken[: len(whole) - case % 50])), dict)
        except ValueError as error:
            assert "meta.mat" in str(error)


# --- what is wrong ------------------------------------------------------------------------------


def test_nothing_there(tmp_path):
    assert "does not exist" in refused(tmp_path / "nowhere")
    said = refused(tmp_path)
    assert "no train images" in said
    assert "ILSVRC2012_img_train.tar" in said
    (tmp_path / "train").mkdir()
    assert "found 0 images in" in refused(tmp_path)
    ilsvrc.write_train_folders(tmp_path / "train")
    assert "no val images" in refused(tmp_path)
    ilsvrc.write(tmp_path / "file", {"x": b""})
    assert "is not a directory" in refused(tmp_path / "file" / "x")


def test_no_labels(tmp_path):
    folders(tmp_path)
    shutil.rmtree(tmp_path / "ILSVRC2012_devkit_t12")
    said = refused(tmp_path)
    assert "ILSVRC2012_devkit_t12.tar.gz, LOC_val_solution.csv" in said
    assert "val/nXXXXXXXX folders" in said


def test_unknown_validation_image(tmp_path):
    folders(tmp_path)
    ilsvrc.write(tmp_path / "val", {"cat.JPEG": ilsvrc.picture(0)})
    assert "are in no list of labels, first cat.JPEG" in refused(tmp_path)


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
@pytest.mark.parametrize("where", [100, 7000, -11000])  # a tar ends in 10,240 zeros at most
def test_a_tar_cut_short(name, where, tmp_path):
    ilsvrc.write_tars(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:where])
    said = refused(tmp_path)
    assert name in said
    assert "damaged or cut short" in said


def test_a_damaged_header_in_the_middle(tmp_path):
    ilsvrc.write_tars(tmp_path)
    path = tmp_path / "ILSVRC2012_img_train.tar"
    content = path.read_bytes()
    at = content.index(b"n02105855_21.JPEG")
    path.write_bytes(content[:at] + b"m" + content[at + 1 :])
    said = refused(tmp_path)
    assert f"n02105855.tar in {path} is damaged" in said


def test_a_web_page_in_place_of_the_tar(tmp_path):
    ilsvrc.write_tars(tmp_path)
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(b"<html>Please log in</html>")
    assert "ILSVRC2012_img_val.tar is damaged" in refused(tmp_path)
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(b"")
    assert "ILSVRC2012_img_val.tar is damaged" in refused(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"data/meta.mat": b"MATLAB"}, "meta.mat is no MATLAB 5 file"),
        ({"data/meta.mat": ilsvrc.meta_mat()[:200]}, "meta.mat is"),
        ({"data/ILSVRC2012_validation_ground_truth.txt": b"1\n777\n"}, "has the id 777"),
        ({"data/ILSVRC2012_validation_ground_truth.txt": b"1\ncat\n"}, "cat"),
    ],
)
def test_a_damaged_devkit(files, message, tmp_path):
    folders(tmp_path)
    ilsvrc.write(tmp_path / "ILSVRC2012_devkit_t12", files)
    assert message in refused(tmp_path)


def test_a_damaged_devkit_tar(tmp_path):
    ilsvrc.write_tars(tmp_path)
    path = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert path.name in refused(tmp_path)
    path.write_bytes(ilsvrc.tar({"readme.txt": b""}))
    assert "it holds no meta.mat and no ILSVRC2012_validation" in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("LOC_val_solution.csv", "Id,Labels\n1,n01440764\n", "ImageId"),
        ("LOC_val_solution.csv", "ImageId,PredictionString\nx,cat 1 2\n", "'cat'"),
        ("LOC_val_solution.csv", "ImageId,PredictionString\nx,\n", "LOC_val_solution.csv"),
        ("imagenet_2012_validation_synset_labels.txt", "n01440764\ncat\n", "'cat'"),
    ],
)
def test_damaged_lists(name, text, message, tmp_path):
    folders(tmp_path)
    shutil.rmtree(tmp_path / "ILSVRC2012_devkit_t12")
    (tmp_path / name).write_text(text)
    assert message in refused(tmp_path)
