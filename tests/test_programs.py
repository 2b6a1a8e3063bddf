"""Costs of programs against arithmetic by hand, and compiling several of them."""

import ctypes
import os
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from mobilevit_jax import programs, sharding
from mobilevit_jax.data import multiscale
from mobilevit_jax.programs import Cost

FLOAT = 4  # bytes


def test_cost_of_a_product():
    def multiply(a, b):
        return a @ b

    a, b = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 4), jnp.float32)
    cost = programs.cost(jax.jit(multiply).lower(a, b).compile())
    assert cost.flops == 2 * 8 * 16 * 4
    assert cost.argument_bytes == FLOAT * (8 * 16 + 16 * 4)
    assert cost.extra_bytes >= FLOAT * 8 * 4  # the result


def test_a_donated_argument_makes_room_for_the_result():
    def add(state, batch):
        return state + batch.sum()

    state, batch = jnp.zeros((1000,)), jnp.zeros((10,))
    kept = programs.cost(jax.jit(add).lower(state, batch).compile())
    donated = programs.cost(jax.jit(add, donate_argnums=0).lower(state, batch).compile())
    assert kept.extra_bytes - donated.extra_bytes == FLOAT * 1000
    assert kept.argument_bytes == donated.argument_bytes


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
    def square(x, _):
        return x @ x, None

    def several(x):
        return jax.lax.scan(square, x, length=3)[0]

    program = jax.jit(several).lower(jnp.zeros((16, 16))).compile()
    once, thrice = (programs.cost(program, loops=loops).flops for loops in (1, 3))
    assert thrice == 3 * once
    assert once == pytest.approx(2 * 16**3, rel=0.01)  # and a few operations to count


def test_flops_and_bytes_are_those_of_one_of_the_devices():
    mesh = sharding.make_mesh()
    size = jax.device_count()
    rows = sharding.split_batch(mesh)
    everywhere = sharding.replicated(mesh)
    batch = jax.ShapeDtypeStruct((2 * size, 16), jnp.float32, sharding=rows)
    weights = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=everywhere)
    cost = programs.cost(jax.jit(jnp.matmul).lower(batch, weights).compile())
    assert cost.flops == 2 * 2 * 16 * 4
    assert cost.argument_bytes == programs.device_bytes([batch, weights])
    assert cost.argument_bytes == FLOAT * (2 * 16 + 16 * 4)


def test_the_peak_is_that_of_the_largest_step_and_the_batch_that_waits():
    small, large = Cost(0.0, 100 + 5, 40), Cost(0.0, 100 + 20, 300)
    evaluation = Cost(0.0, 30 + 7, 50)
    sizes = {"state_bytes": 100, "variables_bytes": 30}
    assert programs.predicted_peak([small, large], evaluation, **sizes) == 100 + 20 + 300 + 20
    huge = evaluation._replace(extra_bytes=1000)
    assert programs.predicted_peak([small, large], huge, **sizes) == 100 + 7 + 1000


def test_sizes_are_a_line_or_a_table():
    one = multiscale.Shapes((multiscale.Shape(32, 24, 1000),))
    assert programs.sizes(one) == "1,000 images of 32x24 a step"
    table = (multiscale.Shape(160, 160, 2048), multiscale.Shape(320, 320, 512))
    header, first, second = programs.sizes(multiscale.Shapes(table)).splitlines()
    assert header.split("  ") == ["height x width", "share of steps", "images a step"]
    assert first.split() == ["160", "x", "160", "50.0%", "2,048"]
    assert second.split() == ["320", "x", "320", "50.0%", "512"]
    assert len(header) == len(first) == len(second)


@pytest.mark.parametrize("threads", [1, 3])
def test_every_job_is_done_and_knows_its_place(threads):
    jobs = [lambda n=n: jax.jit(lambda x: x + n).lower(1.0).compile() for n in range(5)]
    results = dict(programs.compile_all(jobs, threads=threads))
    assert [float(results[n](1.0)) for n in range(5)] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_after_one_that_fails_no_other_begins():
    begun = []

    def job(n):
        begun.append(n)
        if n == 1:
            raise ValueError("no such program")
        time.sleep(2 * (n == 2))  # has begun when it is seen that the one before failed

    jobs = [lambda n=n: job(n) for n in range(50)]
    with pytest.raises(ValueError, match="no such program"):
        list(programs.compile_all(jobs, threads=1))
    assert begun in ([0, 1], [0, 1, 2])


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc keeps it, and can be told not to")
def test_memory_that_a_job_has_freed_goes_back_to_the_system():
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("the C library is not glibc")
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

    def resident():
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def job():
        blocks = [libc.malloc(100_000) for _ in range(2000)]
        for block in blocks:
            ctypes.memset(block, 1, 100_000)
        used = resident()
        for block in blocks[:-1]:  # the last one stays, so that glibc cannot shorten its heap
            libc.free(block)
        return used

    ((_, used),) = programs.compile_all([job], threads=1)
    assert resident() < used - 150e6
