"""Tiny forms of ImageNet's test sets, of real JPEGs, in every layout."""

import io
import pickle
from typing import Any, ClassVar

import numpy as np
import pytest
import tensorflow_datasets

from mobilevit_jax.data import imagenet_sets, prepare, prepared, shards, sources, transforms
from mobilevit_jax.data.record import DataError, Source
from tests.data import ilsvrc
from tests.data.sets import IDS, corrupted, grey, real, write

INCOMPLETE = "is not the whole"


def contents(source):
    """For every example its grey and the classes that are right."""
    found = []
    for i in range(len(source)):
        record = source[i]
        value = int(transforms.decode(record)[0, 0, 0])
        found.append((value, [k for k in source.answers[record.label].tolist() if k >= 0]))
    return found


def make(name, root, **arguments):
    with pytest.warns(UserWarning, match=INCOMPLETE):
        return sources.SOURCES[name]("val", root=str(root), **arguments)


def complaint(name, root, **arguments):
    with pytest.raises(DataError) as error:
        sources.SOURCES[name]("val", root=str(root), **arguments)
    text = str(error.value)
    assert "\n" not in text
    return text


def pack(source, target):
    prepare.folder(
        str(source),
        target,
        val_fraction=0.5,
        options=shards.Options(),
        workers=1,
        progress=lambda *_: None,
    )
    return target


class SetOfTFDS(tensorflow_datasets.core.GeneratorBasedBuilder):
    """As TFDS makes them: all 1,000 classes have names, wherever images are of few."""

    VERSION = tensorflow_datasets.core.Version("1.0.0")
    ROWS: ClassVar[dict[str, list[tuple[int, int]]]] = {
        "test": [(10, 999), (20, 2), (30, 999)],
        "validation": [(40, 1), (50, 2)],
    }

    def _info(self):
        features: dict[str, Any] = {
            "image": tensorflow_datasets.features.Image(shape=(None, None, 3)),
            "label": tensorflow_datasets.features.ClassLabel(names=list(IDS)),
            "file_name": tensorflow_datasets.features.Text(),
        }
        return tensorflow_datasets.core.DatasetInfo(
            builder=self, features=tensorflow_datasets.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(rows) for split, rows in self.ROWS.items()}

    def _generate_examples(self, rows):
        for i, (value, label) in enumerate(rows):
            name = f"ILSVRC2012_val_{i + 1:08d}.JPEG"
            yield i, {"image": io.BytesIO(grey(value)), "label": label, "file_name": name}


@pytest.fixture(scope="module")
def tfds_root(tmp_path_factory):
    builder = SetOfTFDS(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_path


def test_the_synsets_are_sorted_and_known():
    assert len(IDS) == len(set(IDS)) == 1000
    assert list(IDS) == sorted(IDS)
    assert (IDS[0], IDS[1], IDS[999]) == ("n01440764", "n01443537", "n15075141")  # tench … tissue


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r", "imagenet_sketch"])
def test_folders_of_synsets(name, tmp_path):
    files = {f"{IDS[7]}/b.jpg": 70, f"{IDS[7]}/a.JPEG": 71, f"{IDS[999]}/c.jpeg": 99}
    write(tmp_path, files)
    (tmp_path / "README.txt").write_text("about")
    source = make(name, tmp_path)
    assert isinstance(source, Source)
    assert source.class_names == IDS
    assert contents(source) == [(71, [7]), (70, [7]), (99, [999])]
    assert source.classes.tolist() == [7, 999]
    again = pickle.loads(pickle.dumps(source))
    assert contents(again) == contents(source)


def test_the_set_may_lie_below_under_its_usual_name(tmp_path):
    write(tmp_path / "imagenet-a", {f"{IDS[3]}/a.jpg": 3})
    write(tmp_path / "sketch", {f"{IDS[4]}/a.jpg": 4})
    assert contents(make("imagenet_a", tmp_path)) == [(3, [3])]
    assert contents(make("imagenet_sketch", tmp_path)) == [(4, [4])]


def test_what_is_missing_is_told(tmp_path):
    write(tmp_path, {f"{IDS[3]}/a.jpg": 3})
    with pytest.warns(UserWarning, match="ImageNet-A: 1 of 7,500 images, 1 of 200 classes"):
        imagenet_sets.imagenet_a("val", root=str(tmp_path))


def test_another_set_is_refused(tmp_path):
    write(tmp_path, {f"{synset}/a.jpg": 1 for synset in IDS[:201]})
    said = complaint("imagenet_a", tmp_path)
    assert "holds 201 images and 201 classes, more than 7,500 and 200" in said


def test_folders_of_numbers(tmp_path):
    folder = tmp_path / "imagenetv2-top-images-format-val"
    write(folder, {"0/a.jpeg": 1, "10/a.jpeg": 2, "2/a.jpeg": 3, "999/a.jpeg": 4})
    for root in (tmp_path, folder):
        source = make("imagenet_v2_top_images", root)
        assert contents(source) == [(1, [0]), (2, [10]), (3, [2]), (4, [999])]
    write(folder, {"1000/a.jpeg": 5})
    assert "no classes of ImageNet: '1000'" in complaint("imagenet_v2_top_images", folder)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("imagenet_v2_matched_frequency", "imagenetv2-matched-frequency-format-val"),
        ("imagenet_v2_threshold", "imagenetv2-threshold0.7-format-val"),
    ],
)
def test_the_other_two_of_v2(name, folder, tmp_path):
    write(tmp_path / folder, {"5/a.jpeg": 1})
    assert contents(make(name, tmp_path)) == [(1, [5])]


def test_numbers_say_nothing_elsewhere(tmp_path):
    write(tmp_path, {"0/a.jpg": 1})
    said = complaint("imagenet_r", tmp_path)
    assert "no classes of ImageNet: '0'" in said
    assert "expected ImageNet-R as" in said
    assert "<synset id, such as n01440764>/*.jpg" in said


def test_a_pack_counts_whole(tmp_path):
    write(tmp_path / "a", {f"{IDS[k]}/{i}.jpg": 10 * k + i for k in (2, 5) for i in range(4)})
    pack(tmp_path / "a", tmp_path / "packed")
    source = make("imagenet_a", tmp_path / "packed")
    want = [(10 * k + i, [k]) for k in (2, 5) for i in range(4)]
    assert sorted(contents(source)) == want
    assert source.classes.tolist() == [2, 5]


def test_tfds(tfds_root):
    for name in ("imagenet_a", "imagenet_v2_threshold"):
        source = make(name, tfds_root)
        assert sorted(contents(source)) == [(10, [999]), (20, [2]), (30, [999])]
    assert make("imagenet_a", tfds_root).classes.tolist() == [2, 999]
    assert sorted(contents(make("imagenet_val", tfds_root))) == [(40, [1]), (50, [2])]


# --- the validation images ------------------------------------------------------------------------


def test_val_in_all_forms(tmp_path):
    number = {synset: k for k, synset in enumerate(IDS)}
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "ILSVRC2012_img_val.tar").write_bytes(ilsvrc.tar(ilsvrc.val_files()))
    (tmp_path / "tars" / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(ilsvrc.devkit_tar())
    for root in ("folders/val", "direct"):
        for i, (name, data) in enumerate(ilsvrc.val_files().items(), 1):
            ilsvrc.write(tmp_path / root / ilsvrc.val_synset(i), {name: data})
    want = {name: number[ilsvrc.val_synset(i)] for i, name in enumerate(ilsvrc.val_files(), 1)}
    for root in ("tars", "folders", "direct"):
        source = make("imagenet_val", tmp_path / root)
        records = [source[i] for i in range(len(source))]
        assert {r.name.rpartition("/")[2]: r.label for r in records} == want
        for record in records:
            assert record.image == ilsvrc.val_files()[record.name.rpartition("/")[2]]


def test_real_labels(tmp_path, tfds_root):
    root = write(
        tmp_path / "set",
        {
            f"val/{IDS[7]}/ILSVRC2012_val_00000001.JPEG": 11,
            f"val/{IDS[3]}/ILSVRC2012_val_00000003.JPEG": 33,
            f"val/{IDS[5]}/ILSVRC2012_val_00000002.JPEG": 22,
        },
    )
    real(root, [[8, 7], [], [3], [7, 8]])
    source = make("imagenet_real", root)
    assert sorted(contents(source)) == [(11, [7, 8]), (22, []), (33, [3])]
    assert source.class_names == (f"{IDS[7]}+{IDS[8]}", "none", IDS[3])
    assert source.classes is None
    # The list may lie elsewhere, and images in a dataset of TFDS.
    source = make("imagenet_real", tfds_root, labels=str(root / "real.json"))
    assert sorted(contents(source)) == [(40, [7, 8]), (50, [])]
    assert pickle.loads(pickle.dumps(make("imagenet_real", root)))[0].label == 0


def test_real_labels_that_are_missing_or_wrong(tmp_path):
    root = write(tmp_path, {f"val/{IDS[3]}/ILSVRC2012_val_00000003.JPEG": 33})
    assert "no real.json in" in complaint("imagenet_real", root)
    for wrong in ([], {"a": 1}, [[1], 2], [[1000]], [["1"]]):
        real(root, wrong)
        assert "is not a list with a list of classes" in complaint("imagenet_real", root)
    (root / "real.json").write_text("[[1], ")
    assert "is not a list with a list of classes" in complaint("imagenet_real", root)
    real(root, [[1], [2]])
    source = make("imagenet_real", root)
    with pytest.raises(DataError, match=r"is none of the 2 images that .*real\.json has"):
        source[0]


# --- corruptions ----------------------------------------------------------------------------------


def test_corruptions(tmp_path):
    write(tmp_path, corrupted("", "fog", 10) | corrupted("weather/", "frost", 20))
    with pytest.warns(
        UserWarning, match=r"lacks brightness, .*; 10 folders have not 50,000 images"
    ):
        source = imagenet_sets.imagenet_c("val", root=str(tmp_path))
    assert source.groups == ("fog",) * 5 + ("frost",) * 5
    assert contents(source) == [
        (base + s, [k]) for base in (10, 20) for s in range(1, 6) for k in (4, 9)
    ]
    groups = [int(source.group[source[i].label]) for i in range(len(source))]
    assert groups == [g for g in range(10) for _ in range(2)]
    assert source.class_names[source[19].label] == f"frost/5/{IDS[9]}"
    assert set(source.baselines) >= {"fog", "frost"}
    assert len(imagenet_sets.ALEXNET_ERRORS) == 15


def test_corruptions_in_packs_and_of_tfds(tmp_path, tfds_root):
    write(tmp_path / "files", {f"{IDS[k]}/{i}.jpg": 10 * k + i for k in (2, 5) for i in range(2)})
    packed = pack(tmp_path / "files", tmp_path / "packed")
    for severity in "12345":
        for name, target in ((f"fog/{severity}", packed), (f"snow_{severity}/1.0.0", tfds_root)):
            link = tmp_path / "imagenet-c" / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)
    source = make("imagenet_c", tmp_path)
    assert source.groups == ("fog",) * 5 + ("snow",) * 5
    once = [(20, [2]), (21, [2]), (50, [5]), (51, [5])]
    assert sorted(contents(source)) == sorted(5 * once + 5 * [(40, [1]), (50, [2])])


def test_a_missing_severity(tmp_path):
    files = corrupted("", "fog", 10)
    write(tmp_path, {name: value for name, value in files.items() if "fog/3" not in name})
    said = complaint("imagenet_c", tmp_path)
    assert "lacks fog/3; expected ImageNet-C as" in said
    assert "<corruption, such as fog>/<severity, 1 to 5>/<synset id" in said


# --- what can be wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", imagenet_sets.ABOUT)
def test_bad_layouts(name, tmp_path):
    assert f"{tmp_path / 'no'} does not exist" in complaint(name, tmp_path / "no")
    (tmp_path / "file").write_text("x")
    assert "is not a directory" in complaint(name, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    real(tmp_path, [[1]])
    assert str(tmp_path / "empty") in complaint(name, tmp_path / "empty")
    write(tmp_path / "cats", {"cat/a.jpg": 1, "dog/a.jpg": 1})
    assert str(tmp_path / "cats") in complaint(name, tmp_path / "cats")


def test_a_class_without_images(tmp_path):
    write(tmp_path, {f"{IDS[3]}/a.jpg": 3, f"{IDS[4]}/a.txt": 3})
    assert f"class folders without JPEGs in {tmp_path}: '{IDS[4]}'" in complaint(
        "imagenet_a", tmp_path
    )


@pytest.mark.parametrize("name", imagenet_sets.ABOUT)
def test_none_is_to_train_on(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} is for evaluation"):
        sources.SOURCES[name]("train", root=str(tmp_path))


def test_a_tfds_dataset_without_file_names(tfds_root, monkeypatch):
    source = prepared.tfds("val", root=str(tfds_root))
    assert isinstance(source, imagenet_sets._Named)
    monkeypatch.setattr(prepared.tfrecord, "parse_example", lambda *_, **__: {})
    with pytest.raises(DataError, match="has no file_name"):
        source.file_name(0)


def test_labels_are_numbers_of_the_set(tmp_path):
    write(tmp_path, {f"{IDS[3]}/a.jpg": 3})
    source = make("imagenet_r", tmp_path)
    assert source.answers.shape == (1000, 1)
    np.testing.assert_array_equal(source.group, np.zeros(1000))
    with pytest.raises(IndexError):
        source[1]
