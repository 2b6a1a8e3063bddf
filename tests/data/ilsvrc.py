"""A small ImageNet in its official form: tars of tars and a devkit, of real JPEGs."""

import io
import struct
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

SYNSETS = ("n01440764", "n02105855", "n03995372")
IDS = {"n03995372": 1, "n01440764": 2, "n02105855": 3, "n00001740": 1001}  # the last has children
TRAIN, VAL = 5, 7  # images a class, and in all


def picture(number: int, kind: str = "JPEG", size: tuple[int, int] = (60, 45)) -> bytes:
    """An image with structure, different for each number."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def train_files() -> dict[str, dict[str, bytes]]:
    """Images by synset and file name; one of them is a PNG, as in the original."""
    return {
        synset: {
            f"{synset}_{10 * i + 1}.JPEG": picture(100 * k + i, "PNG" if k == i == 1 else "JPEG")
            for i in range(TRAIN)
        }
        for k, synset in enumerate(SYNSETS)
    }


def val_files() -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{i:08d}.JPEG": picture(1000 + i) for i in range(1, VAL + 1)}


def val_synset(number: int) -> str:
    return SYNSETS[5 * number // 2 % 3]


def truth() -> list[str]:
    return [val_synset(i) for i in range(1, VAL + 1)]


def tar(files: Mapping[str, bytes], order: Iterable[str] | None = None) -> bytes:
    """A tar as GNU tar would write it."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name in order or files:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(files[name]), 1_340_000_000
            archive.addfile(member, io.BytesIO(files[name]))
    return content.getvalue()


def train_tar() -> bytes:
    """Classes and images are not in the order of their names, as in the original."""
    classes = {
        f"{synset}.tar": tar(files, sorted(files, key=lambda name: name[::-1]))
        for synset, files in train_files().items()
    }
    return tar(classes, sorted(classes, reverse=True))


def devkit_files(meta: bytes | None = None) -> dict[str, bytes]:
    lines = "".join(f"{IDS[synset]}\n" for synset in truth())
    return {
        "readme.txt": b"ILSVRC2012 development kit",
        "data/meta.mat": meta_mat() if meta is None else meta,
        "data/ILSVRC2012_validation_ground_truth.txt": lines.encode(),
    }


def devkit_tar() -> bytes:
    import gzip

    files = {f"ILSVRC2012_devkit_t12/{name}": data for name, data in devkit_files().items()}
    return gzip.compress(tar(files), mtime=0)


def write_tars(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "ILSVRC2012_img_train.tar").write_bytes(train_tar())
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar(val_files()))
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit_tar())
    return root


def write(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_train_folders(root: Path) -> None:
    for synset, files in train_files().items():
        write(root / synset, files)


# --- meta.mat, by the description of the format ---------------------------------------------------


def meta_mat(order: str = "<", *, compressed: bool = True) -> bytes:
    import zlib

    def element(kind: int, data: bytes) -> bytes:
        if 0 < len(data) <= 4:  # the short form
            return struct.pack(f"{order}I", len(data) << 16 | kind) + data.ljust(4, b"\0")
        padding = bytes(-len(data) % 8)
        return struct.pack(f"{order}II", kind, len(data)) + data + padding

    def matrix(kind: int, dims: tuple[int, ...], *content: bytes, name: str = "") -> bytes:
        head = element(6, struct.pack(f"{order}II", kind, 0))
        head += element(5, struct.pack(f"{order}{len(dims)}i", *dims))
        return element(14, head + element(1, name.encode()) + b"".join(content))

    def number(value: int) -> bytes:
        return matrix(6, (1, 1), element(2 if value < 256 else 4, _packed(value, order)))

    def text(value: str) -> bytes:
        return matrix(4, (1, len(value)), element(16, value.encode()))

    fields = ("ILSVRC2012_ID", "WNID", "words", "children")
    table = b"".join(field.encode().ljust(32, b"\0") for field in fields)
    children = matrix(6, (1, 2), element(9, struct.pack(f"{order}dd", 1.0, 2.0)))
    rows = [
        number(i) + text(synset) + text(f"the words of {synset}, and more") + children
        for synset, i in IDS.items()
    ]
    width = element(5, struct.pack(f"{order}i", 32))
    synsets = matrix(2, (len(IDS), 1), width, element(1, table), *rows, name="synsets")
    other = matrix(6, (1, 1), element(9, struct.pack(f"{order}d", 0.5)), name="something")
    content = [other, synsets]
    if compressed:
        content = [zlib.compress(each) for each in content]
        content = [struct.pack(f"{order}II", 15, len(each)) + each for each in content]
    mark = struct.pack(f"{order}HH", 0x0100, 0x4D49)
    return b"MATLAB 5.0 MAT-file".ljust(124) + mark + b"".join(content)


def _packed(value: int, order: str) -> bytes:
    return struct.pack(f"{order}B" if value < 256 else f"{order}H", value)
