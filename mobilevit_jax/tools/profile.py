"""What a network costs: parameters, MACs, activation memory and time, by stage and in total.

Counts come from shapes alone. Times are measured on the first device, with weights drawn at random:
values do not change them. Of a stage there is no program by itself, so the network is compiled up
to the end of each stage, and a stage's time is what it adds to that of the stages before it.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from mobilevit_jax import build, devices, report, steps
from mobilevit_jax.models import zoo
from mobilevit_jax.tools import pretrained
from mobilevit_jax.tree import Tree

MACS_RULE = (
    "multiply-accumulates of convolutions and linear layers, for one image; none of norms, "
    "activation functions, biases, nor of the products inside an attention"
)
ACTIVATIONS_RULE = (
    "outputs of convolutions, linear layers and the products inside a dot-product attention, added "
    "up, for one image; norms and activation functions are taken to work in place"
)
WARM_UP = 2  # calls before the first that counts


class Row(NamedTuple):
    """One stage, or the whole network.

    Attributes:
        name: of the stage, or "total".
        shape: of its output, without the batch axis.
        params: number of parameters.
        macs: for one image, by MACS_RULE.
        activation_bytes: for one image, by ACTIVATIONS_RULE.
        seconds: for one batch; None where nothing was measured.
    """

    name: str
    shape: tuple[int, ...]
    params: int
    macs: int
    activation_bytes: int
    seconds: float | None


class Measured(NamedTuple):
    """How the times were taken.

    Attributes:
        batch_size: images in a batch.
        repeats: batches of which the time is the median.
        device: what they ran on.
        workspace_bytes: memory that the compiler plans for a batch beside weights, input and
            output; None where it does not say.
    """

    batch_size: int
    repeats: int
    device: str
    workspace_bytes: int | None


class Profile(NamedTuple):
    """Costs of one network.

    Attributes:
        name: the reference.
        size: (h, w) of the images.
        dtype: of the computation.
        stages: in order of computation.
        total: of the whole network.
        measured: None where only shapes were looked at.
    """

    name: str
    size: tuple[int, int]
    dtype: str
    stages: list[Row]
    total: Row
    measured: Measured | None


def profile(
    reference: str,
    *,
    size: tuple[int, int] | None = None,
    batch_size: int = 1,
    repeats: int = 20,
    measure: str = "stages",
) -> Profile:
    """Costs of the network that a reference means.

    Args:
        reference: see `pretrained`; names of the zoo need no weights.
        size: (h, w) of the images; None for the network's own.
        batch_size: images in a measured batch.
        repeats: measured batches.
        measure: time of "stages" and total, of the "total" alone, or of "nothing".

    Raises:
        ConfigError: the reference means nothing, a number is below 1, the images are too small for
            the network, or a batch too large for the device.
        CheckpointError: the reference's files cannot be read.
    """
    for name, value in {"batch": batch_size, "repeats": repeats}.items():
        if value < 1:
            raise build.ConfigError(f"{name} is {value}; it must be at least 1")
    if size is not None and min(size) < 1:
        raise build.ConfigError(f"size is {size[0]},{size[1]}; height and width are at least 1")
    _, model, input_spec = pretrained.describe(reference)
    size = size or input_spec.size
    try:
        *rows, total = zoo.summary(model, size=size)
        times: dict[str, float] = {}
        measured = None
        if measure != "nothing":
            ends = [row.name for row in rows[:-1]] if measure == "stages" else []
            times, measured = _measure(
                model, ends, size=size, batch_size=batch_size, repeats=repeats
            )
            if measure == "stages":
                times = _differences(times, last=rows[-1].name)
    except ValueError as error:  # the network's own words for images that it cannot take
        raise build.ConfigError(
            f"{reference} with images of {size[0]}x{size[1]}: {error}"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        if not devices.out_of_memory(error):
            raise
        raise build.ConfigError(
            f"a batch of {batch_size} images of {size[0]}x{size[1]} needs more memory than the "
            "device has; lower --batch"
        ) from error
    return Profile(
        name=reference,
        size=size,
        dtype=jnp.dtype(getattr(model, "dtype", jnp.float32)).name,
        stages=[Row(*row, times.get(row.name)) for row in rows],
        total=Row(*total, times.get("total")),
        measured=measured,
    )


def profile_zoo(
    *,
    size: tuple[int, int] | None = None,
    batch_size: int = 1,
    repeats: int = 20,
    measure: str = "nothing",
) -> Iterator[Profile]:
    """`profile` of every published network, in the zoo's order."""
    for name in zoo.ZOO:
        yield profile(name, size=size, batch_size=batch_size, repeats=repeats, measure=measure)


def _measure(
    model: zoo.nn.Module,
    ends: Sequence[str],
    *,
    size: tuple[int, int],
    batch_size: int,
    repeats: int,
) -> tuple[dict[str, float], Measured]:
    """Seconds from the image to the end of each of the stages `ends`, and of the "total"."""
    rng = np.random.default_rng(0)
    variables, image = jax.device_put(
        (
            jax.tree.map(
                lambda leaf: rng.uniform(0.0, 0.1, leaf.shape).astype(leaf.dtype),
                steps.abstract_variables(model, size),
            ),
            rng.random((batch_size, *size, 3), np.float32),
        ),
        jax.devices()[0],
    )

    def upto(end: str) -> jax.stages.Compiled:
        def run(variables: Mapping[str, Tree], image: jax.Array) -> Any:
            outputs, state = model.apply(
                variables,
                image,
                capture_intermediates=lambda module, method: (
                    method == "__call__" and len(module.path) == 1
                ),
                mutable=["intermediates"],
            )
            # The compiler drops whatever the one result does not need.
            if end == "total":
                return outputs["logits"]
            return state["intermediates"][end]["__call__"][0]

        program = jax.jit(run, compiler_options=devices.compiler_options())
        return program.lower(variables, image).compile()

    programs = {end: upto(end) for end in (*ends, "total")}
    seconds: dict[str, list[float]] = {end: [] for end in programs}
    for repeat in range(-WARM_UP, repeats):
        # All by turns: what else the machine does meanwhile then disturbs all alike.
        for end, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(variables, image))
            if repeat >= 0:
                seconds[end].append(time.perf_counter() - begin)
    memory = programs["total"].memory_analysis()
    device = jax.devices()[0]
    measured = Measured(
        batch_size=batch_size,
        repeats=repeats,
        device=f"{device.device_kind} ({device.platform})",
        workspace_bytes=None if memory is None else memory.temp_size_in_bytes,
    )
    return {end: statistics.median(each) for end, each in seconds.items()}, measured


def _differences(times: Mapping[str, float], *, last: str) -> dict[str, float]:
    """From the times up to each stage to those of each stage, which add up to the total.

    No stage ends later than one behind it: what noise says otherwise is cut off.
    """
    upto = np.minimum.accumulate([*times.values()][::-1])[::-1]
    names = [*(name for name in times if name != "total"), last]
    return {**dict(zip(names, np.diff(upto, prepend=0.0).tolist(), strict=True)), "total": upto[-1]}


# --- what people and programs read ---------------------------------------------------------------


def as_json(profile: Profile) -> dict[str, Any]:
    """All of a profile as JSON values."""
    fields = profile._asdict()
    fields["stages"] = [row._asdict() for row in profile.stages]
    fields["total"] = profile.total._asdict()
    fields["measured"] = profile.measured and profile.measured._asdict()
    return fields


def print_stages(profile: Profile, console: Console) -> None:
    """Prints one network: a row a stage, the total, and the rules below."""
    header = ["stage", "output shape", *_header(profile)]
    rows = [
        [row.name, " x ".join(map(str, row.shape)), *_cells(row, profile.measured)]
        for row in [*profile.stages, profile.total]
    ]
    console.print(
        f"{profile.name}, images of {profile.size[0]}x{profile.size[1]}, {profile.dtype}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    report.print_table(header, rows[:-1], console, footer=rows[-1])
    _print_rules([profile], console)


def print_totals(profiles: Sequence[Profile], console: Console) -> None:
    """Prints several networks: a row each, and the rules below."""
    header = ["network", "images", *_header(profiles[0])]
    rows = [
        [each.name, f"{each.size[0]}x{each.size[1]}", *_cells(each.total, each.measured)]
        for each in profiles
    ]
    report.print_table(header, rows, console)
    _print_rules(profiles, console)


def _header(profile: Profile) -> list[str]:
    counts = ["parameters", "MACs (M)", "activations (MB)"]
    return [*counts, "latency (ms)", "images/s"] if profile.measured else counts


def _cells(row: Row, measured: Measured | None) -> list[str]:
    cells = [
        f"{row.params:,}",
        f"{row.macs / 1e6:,.1f}",
        f"{row.activation_bytes / 1e6:,.2f}",
    ]
    if measured is not None and row.seconds is not None:
        rate = f"{measured.batch_size / row.seconds:,.0f}" if row.seconds else "-"
        cells += [f"{1e3 * row.seconds:,.2f}", rate]
    return cells


def _print_rules(profiles: Sequence[Profile], console: Console) -> None:
    lines = [f"MACs: {MACS_RULE}.", f"Activations: {ACTIVATIONS_RULE}."]
    measured = profiles[0].measured
    if measured is not None:
        lines.append(
            f"Latency: of a batch of {measured.batch_size} on {measured.device}, median of "
            f"{measured.repeats}"
            + ("; of a stage, what it adds to those before it." if len(profiles) == 1 else ".")
        )
        if len(profiles) == 1 and measured.workspace_bytes is not None:
            lines.append(
                f"Workspace of the compiled network: {measured.workspace_bytes / 1e6:,.2f} MB a "
                "batch, beside weights, input and output."
            )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
