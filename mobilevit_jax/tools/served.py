"""A model that answers requests: compiled and warm, its weights exchanged while it works.

A `Version` is a model with one set of weights, and its queue. Reloading makes another one, which
takes over the compiled programs where the network is the same; requests that the old one accepted
are answered by it. Batch norms are folded into the convolutions: of v2-0.5, a third of the arrays
need not be handed over, nor 50 small operations run. Preprocessing is the evaluation transform of
`data.transforms`, on the upright picture.
"""

import functools
import math
import pathlib
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from mobilevit_jax import devices, programs, steps
from mobilevit_jax.data import transforms
from mobilevit_jax.data.record import Record
from mobilevit_jax.data.transforms import InputSpec
from mobilevit_jax.models import folding, kernels, zoo
from mobilevit_jax.tasks import classification
from mobilevit_jax.tools import batching, files, predict, pretrained
from mobilevit_jax.tree import Tree

AT_ONCE = 2  # batches: one alone leaves a part of the cores idle, and an accelerator its host
TIMED, TIMED_SECONDS = 5, 0.3  # runs of a program at least, of which the fastest one counts


class Programs(NamedTuple):
    """What is compiled of a network; weights are arguments, as `folding.fold_norms` leaves them.

    Attributes:
        model: the network.
        input_spec: how it wants its images.
        classify: from (weights, images) to logits, by the number of images.
        attend: the same for one image, with its attention; None where there is none to show.
        seconds: what `classify` takes, by the number of images.
        attend_seconds: what `attend` takes.
    """

    model: zoo.nn.Module
    input_spec: InputSpec
    classify: dict[int, Callable[..., Any]]
    attend: Callable[..., Any] | None
    seconds: dict[int, float]
    attend_seconds: float


class Attention(NamedTuple):
    """What a network says of one image, and where it looked.

    Attributes:
        probability: of each class.
        maps: by the name of the stage that holds the block; multiples of the average.
    """

    probability: Float[np.ndarray, " k"]
    maps: dict[str, Float[np.ndarray, "_ _"]]


class Version:
    """A model with one set of weights.

    Attributes:
        loaded: the model; its variables are the weights for the programs, on the device.
        programs: compiled for it.
        parameters: how many numbers were trained.
        since: seconds since the epoch when it was loaded.
    """

    def __init__(
        self,
        loaded: pretrained.Loaded,
        programs: Programs,
        *,
        parameters: int,
        max_delay: float,
        max_waiting: int,
        decoders: Executor,
    ) -> None:
        self.loaded, self.programs, self.since = loaded, programs, time.time()
        self.parameters = parameters
        self._view = transforms.evaluation(programs.input_spec)
        how = {"size": programs.input_spec.size, "decoders": decoders}
        self._queue = batching.Batcher(
            self._classify,
            seconds=programs.seconds,
            max_delay=max_delay,
            max_waiting=max_waiting,
            at_once=AT_ONCE,
            **how,
        )
        self._looks: batching.Batcher | None = None
        if programs.attend is not None:
            self._looks = batching.Batcher(
                self._attend,
                seconds={1: programs.attend_seconds},
                max_delay=0.0,
                max_waiting=max(programs.classify),
                at_once=1,
                **how,
            )

    def classify(self, image: bytes) -> Future[Float[np.ndarray, " k"]]:
        """The logits of an image file, some time later.

        The future raises DataError if it is no image, BatchError if computing failed.

        Raises:
            Overloaded: too many are waiting.
        """
        return self._queue.submit(functools.partial(self._decode, image))

    def attend(self, image: bytes) -> Future[Attention] | None:
        """As `classify`, with the attention; None where the network has none to show."""
        if self._looks is None:
            return None
        return self._looks.submit(functools.partial(self._decode, image))

    def shown(self, image: bytes) -> tuple[float, float, float, float]:
        """What the network sees of an image, see `transforms.shown`."""
        return transforms.shown(transforms.upright(_record(image)), self.programs.input_spec)

    def counts(self) -> batching.Counts:
        """What the queue has done so far."""
        return self._queue.counts()

    def close(self) -> None:
        """Answers what it has accepted, and ends."""
        self._queue.close()
        if self._looks is not None:
            self._looks.close()

    def _decode(self, image: bytes, out: UInt8[np.ndarray, "h w 3"]) -> None:
        with kernels.work():
            self._view(transforms.upright(_record(image)), out)

    def _classify(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b k"]:
        program = self.programs.classify[len(images)]
        with kernels.program():
            return _finite(np.asarray(program(self.loaded.pretrained.variables, images)))

    def _attend(self, images: UInt8[np.ndarray, "b h w 3"]) -> list[Attention]:
        assert self.programs.attend is not None
        with kernels.program():
            outputs = jax.device_get(self.programs.attend(self.loaded.pretrained.variables, images))
        maps = {name: values[0] for name, values in sorted(outputs["attention"].items())}
        relative = {name: values * values.size for name, values in maps.items()}
        return [Attention(_finite(outputs["probability"])[0], relative)]


def identify(reference: str) -> str:
    """What a model is called in addresses: a directory or file by its name, others as they are."""
    path = pathlib.Path(reference).expanduser()
    if path.is_dir():
        path = path.resolve()
        run = pretrained.find_run(path)
        # Of one checkpoint of a run, the step alone says little.
        return f"{run[0].name}-{path.name}" if run and run[0] != path else path.name
    return path.stem if path.is_file() else reference.removeprefix(files.HUB_PREFIX)


def load(
    reference: str,
    *,
    weights: str,
    checkpoint: str,
    sizes: tuple[int, ...],
    before: Programs | None = None,
    note: Callable[[str], None],
    **queue: Any,
) -> Version:
    """Reads a model, compiles it and warms it up.

    Args:
        reference: see `pretrained`.
        weights: of a run, "ema" or "raw".
        checkpoint: of a run, "newest", "best" or a step.
        sizes: of batches.
        before: programs to use again if they are of the same network.
        note: called with a line about what is going on.
        **queue: see `Version`.

    Raises:
        ConfigError, CheckpointError: as `pretrained.load`.
    """
    loaded = pretrained.read(reference, weights=weights, checkpoint=checkpoint)
    for each in loaded.notes:
        note(each)
    network = loaded.pretrained
    parameters = sum(leaf.size for leaf in jax.tree.leaves(network.variables["params"]))
    variables: dict[str, Tree] = jax.device_put(folding.fold_norms(network.variables))
    loaded = loaded._replace(pretrained=network._replace(variables=variables))
    same = before is not None and before[:2] == (network.model, network.input_spec)
    if not same:
        note(f"{identify(reference)}: compiling for batches of {', '.join(map(str, sizes))}")
        before = _compile(loaded.pretrained, sizes)
    assert before is not None
    return Version(loaded, before, parameters=parameters, **queue)


def scores(logits: Float[np.ndarray, " k"], function: str) -> Float[np.ndarray, " k"]:
    """Logits as scores, by one of `questions.FUNCTIONS`."""
    values = logits.astype(np.float64)
    if function == "softmax":
        values = np.exp(values - values.max())
        return values / values.sum()
    return (1 + np.tanh(values / 2)) / 2 if function == "sigmoid" else values


def card(version: Version, name: str) -> dict[str, Any]:
    """What there is to know of a model, as JSON values."""
    family, source = version.loaded.family, dict(version.loaded.source)
    metrics = source.pop("metrics", {})
    network = version.loaded.pretrained
    milliseconds = {size: round(1e3 * each, 3) for size, each in version.programs.seconds.items()}
    return {
        "id": name,
        "pipeline_tag": "image-classification",
        "library_name": "mobilevit_jax",
        "family": family,
        "parameters": version.parameters,
        "classes": len(network.labels),
        "input": network.input_spec._asdict(),
        "source": source,
        "metrics": {key: value for key, value in metrics.items() if math.isfinite(value)},
        "attention": version.programs.attend is not None,
        "device": jax.devices()[0].device_kind,
        "batch_milliseconds": milliseconds,
        "loaded": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(version.since)),
    }


def _record(image: bytes) -> Record:
    return Record(image=image, label=0, name="the image")


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise FloatingPointError("the network's outputs are not finite; are its weights?")
    return values


def _compile(network: pretrained.Pretrained, sizes: tuple[int, ...]) -> Programs:
    model, spec = network.model, network.input_spec

    def classify(weights: Tree, image: UInt8[Array, "b h w 3"]) -> Float[Array, "b k"]:
        variables = folding.complete(weights)

        def run(image: UInt8[Array, "b h w 3"]) -> tuple[tuple, Float[Array, "b k"]]:
            outputs: Any = model.apply(variables, steps.normalize(image, spec), train=False)
            return (), outputs["logits"].astype(jnp.float32)

        part = devices.images_at_a_time(len(image), kernels=kernels.serve())
        return steps.in_parts(run, image, part=part)[1]

    def attend(weights: Tree, image: UInt8[Array, "1 h w 3"]) -> dict[str, Any]:
        return predict.attention_step(
            folding.complete(weights),
            image,
            model=model,
            task=classification.classification(),
            input_spec=spec,
        )

    jobs = [functools.partial(_compile_one, classify, network, size) for size in sizes]
    if predict.no_attention(model) is None:
        jobs.append(functools.partial(_compile_one, attend, network, 1))
    compiled = dict(programs.compile_all(jobs, threads=len(jobs)))
    seconds = _seconds(
        network, [(compiled[i], size) for i, size in enumerate((*sizes, 1)) if i in compiled]
    )
    # Others only ever add to a time: what a larger batch takes, a smaller one takes at most.
    for i in range(len(sizes) - 2, -1, -1):
        seconds[i] = min(seconds[i], seconds[i + 1])
    return Programs(
        model=model,
        input_spec=spec,
        classify={size: compiled[i] for i, size in enumerate(sizes)},
        attend=compiled.get(len(sizes)),
        seconds=dict(zip(sizes, seconds, strict=False)),
        attend_seconds=seconds[-1],
    )


def _compile_one(
    step: Callable[..., Any], network: pretrained.Pretrained, size: int
) -> Callable[..., Any]:
    images = jax.ShapeDtypeStruct((size, *network.input_spec.size, 3), jnp.uint8)
    program = jax.jit(step, compiler_options=devices.compiler_options())
    return program.lower(network.variables, images).compile()


def _seconds(
    network: pretrained.Pretrained, sized: list[tuple[Callable[..., Any], int]]
) -> list[float]:
    """What programs take when they are warm, each for batches of its size."""
    times: list[list[float]] = [[] for _ in sized]

    def enough(spent: list[float]) -> bool:
        return len(spent) > TIMED and sum(spent[1:]) > TIMED_SECONDS

    while due := [each for each in zip(sized, times, strict=True) if not enough(each[1])]:
        for (program, size), spent in due:  # by turns: they are to be compared
            images = np.zeros((size, *network.input_spec.size, 3), np.uint8)
            begin = time.monotonic()
            jax.block_until_ready(program(network.variables, images))
            spent.append(time.monotonic() - begin)
    return [min(spent[1:]) for spent in times]
