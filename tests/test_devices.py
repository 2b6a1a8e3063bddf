"""The table of peaks, by the names that jax gives devices."""

import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilevit_jax import devices


@pytest.mark.parametrize(
    ("kind", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "float32", 494.7),
        ("NVIDIA A100-SXM4-80GB", "float16", 312.0),
        ("TPU v5 lite", "bfloat16", 197.0),
        ("TPU v4", "float32", 275.0),
        ("Tesla T4", "float16", 65.0),
    ],
)
def test_peaks(kind, dtype, tera):
    assert devices.peak_flops(kind, dtype) == tera * 1e12


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("cpu", "float32"),
        ("Tesla T4", "bfloat16"),
        ("TPU v4 lite", "bfloat16"),  # another chip than v4
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16"),  # a seventh of one
    ],
)
def test_what_has_no_known_peak(kind, dtype):
    assert devices.peak_flops(kind, dtype) is None


def test_memory_is_counted_where_the_backend_counts_it(monkeypatch):
    assert devices.memory() is None  # on CPU
    stats = {"bytes_in_use": 3, "peak_bytes_in_use": 5, "bytes_limit": 9}
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert devices.memory() == devices.Memory(peak=5, limit=9)


def test_a_cpu_has_the_memory_of_its_machine_or_container(monkeypatch, tmp_path):
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(devices, "CONTAINER", (tmp_path / "none", tmp_path / "max"))
    assert devices.memory_limit() == machine // jax.local_device_count()
    for said, limit in (("max\n", machine), (f"{2**63}\n", machine), ("8192\n", 8192)):
        (tmp_path / "max").write_text(said)
        assert devices.memory_limit() == limit // jax.local_device_count()
    monkeypatch.setattr(devices, "memory", lambda: devices.Memory(peak=5, limit=9))
    assert devices.memory_limit() == 9


def test_compiler_options_change_rounding_only():
    """On a CPU XLA has the products and the library the reductions; elsewhere nothing is set."""

    def loss(weights, x):
        y = jax.nn.silu(x @ weights[0])
        return jnp.square((y - y.mean(0)) @ weights[1]).mean()

    rng = np.random.default_rng(0)
    shapes = (64, 32), (32, 8), (256, 64)
    *weights, x = (rng.standard_normal(shape, np.float32) for shape in shapes)
    options = devices.compiler_options()
    assert (options is not None) == (jax.default_backend() == "cpu")
    programs = [
        jax.jit(jax.value_and_grad(loss), compiler_options=each).lower(weights, x).compile()
        for each in (None, options)
    ]
    plain, ours = (program(weights, x) for program in programs)
    for expected, got in zip(*map(jax.tree.leaves, (plain, ours)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    if options:
        given, kept = (each.as_text().count("kind=kCustom") for each in programs)
        assert given > kept


def test_an_option_that_jaxlib_has_not_is_left_out(monkeypatch):
    monkeypatch.setattr(devices, "YNNPACK", "xla_cpu_no_such_option")
    options = devices.compiler_options.__wrapped__()
    assert options == ({devices.VECTORS: 512} if jax.default_backend() == "cpu" else None)
