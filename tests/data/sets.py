"""Tiny test sets in the layouts of ImageNet's, of real JPEGs of one grey each."""

import io
import json

from PIL import Image

from mobilevit_jax.data import imagenet_sets
from tests.data import ilsvrc

IDS = imagenet_sets.synsets()


def grey(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (16, 16), value).save(file, "JPEG", quality=95)
    return file.getvalue()


def write(root, files):
    """Files by name, of the grey that each is to have."""
    return ilsvrc.write(root, {name: grey(value) for name, value in files.items()})


def real(root, sets):
    (root / "real.json").write_text(json.dumps(sets))


def corrupted(root, name, value):
    files = {f"{root}{name}/{s}/{IDS[k]}/x.JPEG" for s in range(1, 6) for k in (4, 9)}
    return {file: value + int(file.split("/")[-3]) for file in sorted(files)}
