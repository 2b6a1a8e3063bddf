"""What the devices can do, and how much of their memory is in use.

A device that is not in PEAKS has no known peak, and a run on it logs no time/mfu: add a row.
"""

import contextlib
import functools
import os
import pathlib
from typing import NamedTuple

import jax

# What a container may take, by control groups of versions 2 and 1; without a limit "max" or 2^63.
CONTAINER = (
    pathlib.Path("/sys/fs/cgroup/memory.max"),
    pathlib.Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)

# Options of XLA for CPUs: what it leaves to the library YNNPACK, and bits of its vectors at most.
YNNPACK, VECTORS = "xla_cpu_experimental_ynn_fusion_type", "xla_cpu_prefer_vector_width"


class Peak(NamedTuple):
    """Dense arithmetic of one jax device, TFLOP/s, by the dtype that a network computes in.

    float32 is as jax multiplies by default: TensorFloat-32 on GPUs that have it, one pass of
    bfloat16 on TPUs. Half precision accumulates in float32. None where the hardware has it not.
    """

    bfloat16: float | None
    float16: float | None
    float32: float | None


_A100 = Peak(312, 312, 156)
_TPU_V5E, _TPU_V5P, _TPU_V6E = Peak(197, None, 197), Peak(459, None, 459), Peak(918, None, 918)

# By jax's device_kind. Makers' tables often give twice as much, for matrices half of zeros.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": _A100,  # A100 data sheet
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA H100 80GB HBM3": Peak(989.4, 989.4, 494.7),  # H100 architecture white paper, table 2
    "NVIDIA H100 PCIe": Peak(756, 756, 378),
    "NVIDIA H100 NVL": Peak(835.5, 835.5, 417.5),  # H100 data sheet
    "NVIDIA H200": Peak(989.4, 989.4, 494.7),  # H200 data sheet
    "NVIDIA H200 NVL": Peak(835.5, 835.5, 417.5),
    "NVIDIA L4": Peak(121, 121, 60),  # L4 data sheet
    "Tesla T4": Peak(None, 65, 8.1),  # T4 data sheet
    "NVIDIA GeForce RTX 4090": Peak(165.2, 165.2, 82.6),  # Ada architecture white paper, appendix A
    # cloud.google.com/tpu/docs/system-architecture. Of v2 and v3 each of a chip's two cores is a
    # device, of later ones a chip is. XLA calls v5e "v5 lite", v5p "v5" and v6e "v6 lite".
    "TPU v2": Peak(22.5, None, 22.5),
    "TPU v3": Peak(61.5, None, 61.5),
    "TPU v4": Peak(275, None, 275),
    "TPU v5 lite": _TPU_V5E,
    "TPU v5e": _TPU_V5E,
    "TPU v5": _TPU_V5P,
    "TPU v5p": _TPU_V5P,
    "TPU v6 lite": _TPU_V6E,
    "TPU v6e": _TPU_V6E,
}


def peak_flops(kind: str, dtype: str) -> float | None:
    """FLOP/s of a device of this `device_kind`, or None where they are not known.

    Args:
        kind: jax's device_kind.
        dtype: that the network computes in: bfloat16, float16 or float32.
    """
    if kind not in PEAKS:
        return None
    tera = PEAKS[kind]._asdict()[dtype]
    return None if tera is None else 1e12 * tera


class Memory(NamedTuple):
    """Bytes of the first device of this process: the most in use so far, and all it has."""

    peak: int
    limit: int


def memory() -> Memory | None:
    """None where the backend does not count: the CPU's does not."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is None:
        return None
    return Memory(stats["peak_bytes_in_use"], stats["bytes_limit"])


def memory_limit() -> int | None:
    """Bytes that the first device of this process has, or None where they are not known.

    Devices of a CPU share what the machine has, or what a container may take of it.
    """
    if counted := memory():
        return counted.limit
    if jax.default_backend() != "cpu":
        return None
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in CONTAINER:
        with contextlib.suppress(OSError, ValueError):
            limit = min(limit, int(path.read_text()))
    return limit // jax.local_device_count()


def out_of_memory(error: Exception) -> bool:
    """Whether a device had too little memory for what it was to do."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def images_at_a_time(batch_size: int, *, devices: int = 1, kernels: bool) -> int | None:
    """How many images of a batch inference works on at a time; None for all of them.

    Of XLA's layers on a CPU, the maps of two images stay in its cache from one layer to the next,
    those of sixteen go to memory and back. The kernels (models/kernels.py) keep what they can
    themselves: there more images, up to 16, read the weights less often (benchmarks/settings.py).

    Args:
        batch_size: over all devices.
        devices: that share a batch.
        kernels: whether the network uses them.
    """
    if jax.default_backend() != "cpu":
        return None
    if not kernels:
        return 2 * devices
    return next((n for n in range(min(16, batch_size), 1, -1) if batch_size % n == 0), None)


@functools.cache
def compiler_options() -> dict[str, str | int] | None:
    """What the train step and inference are compiled with, as `jax.jit` takes it.

    On a CPU matrix products and convolutions are XLA's own, and reductions YNNPACK's: by default
    jaxlib leaves it the products, too, which takes 1.06 to 1.14 times as long; without it in
    reductions, a train step takes 1.4 to 1.55 times as long. Vectors are as long as the processor
    has them: XLA's default of 256 bits takes 1.04 to 1.1 times as long where there are 512
    (benchmarks/settings.py). An option that a jaxlib has not is left out.
    """
    if jax.default_backend() != "cpu":
        return None
    options = {YNNPACK: "LIBRARY_FUSION_TYPE_REDUCE", VECTORS: 512}
    return {name: value for name, value in options.items() if _compiles_with({name: value})}


def _compiles_with(options: dict[str, str | int]) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
