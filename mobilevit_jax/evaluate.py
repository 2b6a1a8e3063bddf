"""Runs a network over a split: sums on the device, metrics on the host, every example once."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from mobilevit_jax import build, devices, processes, sharding, steps
from mobilevit_jax.data import imagenet_sets, pipeline, transforms
from mobilevit_jax.data.record import Source
from mobilevit_jax.models import kernels
from mobilevit_jax.tasks import scores
from mobilevit_jax.tree import Tree

# Weights by name -> what their metrics are called.
SCOPES = {"raw": "val", "ema": "val_ema"}


class Evaluator(NamedTuple):
    """A compiled `steps.eval_step` and the split it runs over."""

    program: Any
    # Of the program over parts of a batch.
    loops: int
    # Zeros for the sums, on the mesh.
    totals: Tree
    network: build.Network
    source: Source
    batch_size: int
    workers: pipeline.Workers
    max_corrupt: float
    mesh: Mesh


class Predictions(NamedTuple):
    """Per example, in the order of the source; broken ones are left out."""

    # Into the source.
    index: Int[np.ndarray, " n"]
    label: Int[np.ndarray, " n"]
    predicted: Int[np.ndarray, " n"]
    # Probability of the predicted class, and of the label.
    confidence: Float[np.ndarray, " n"]
    label_probability: Float[np.ndarray, " n"]


def make(
    network: build.Network,
    variables: Tree,
    source: Source,
    *,
    batch_size: int,
    workers: pipeline.Workers,
    max_corrupt: float,
    mesh: Mesh,
) -> Evaluator:
    """Compiles the evaluation of a network over a split.

    Args:
        network: to evaluate.
        variables: its variables, or their shapes.
        source: the split.
        batch_size: images at a time, over all devices and hosts; any size counts every image once.
        workers: who loads the images.
        max_corrupt: share of the split that may be broken; it counts for nothing.
        mesh: where it runs.
    """
    everywhere = sharding.replicated(mesh)
    batch = sharding.abstract_batch(mesh, batch_size=batch_size, size=network.input_spec.size)
    totals = sharding.abstract_like(_abstract_sums(network, batch), everywhere)
    part = devices.images_at_a_time(batch_size, devices=mesh.size, kernels=kernels.serve())
    step = functools.partial(
        steps.eval_step,
        model=network.model,
        task=network.task,
        input_spec=network.input_spec,
        part=part,
    )
    program = jax.jit(
        step,
        out_shardings=(everywhere, sharding.split_batch(mesh)),
        compiler_options=devices.compiler_options(),
    )
    return Evaluator(
        program=program.lower(
            sharding.abstract_like(variables, everywhere), totals, batch
        ).compile(),
        loops=steps.number_of_parts(batch_size, part),
        totals=jax.device_put(
            jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), totals), everywhere
        ),
        network=network,
        source=source,
        batch_size=batch_size,
        workers=workers,
        max_corrupt=max_corrupt,
        mesh=mesh,
    )


def _whole(evaluator: Evaluator, variables: Tree) -> Tree:
    """The variables on every device; training may have divided them."""
    return jax.device_put(variables, sharding.replicated(evaluator.mesh))


def _abstract_sums(network: build.Network, batch: Tree) -> Tree:
    logits = jax.ShapeDtypeStruct((batch["label"].shape[0], len(network.class_names)), np.float32)
    return jax.eval_shape(network.task.sums, {"logits": logits}, batch)


def metric_names(network: build.Network) -> tuple[str, ...]:
    """What an evaluation in training logs: "val/loss" and so on."""
    mesh = sharding.make_mesh()
    batch = sharding.abstract_batch(mesh, batch_size=mesh.size, size=network.input_spec.size)
    sums = _abstract_sums(network, batch)
    names = network.task.summarize(jax.tree.map(lambda leaf: np.ones(leaf.shape), sums))
    return tuple(f"{scope}/{name}" for scope in SCOPES.values() for name in names)


def _batches(evaluator: Evaluator) -> pipeline.Batches:
    return pipeline.eval_batches(
        evaluator.source,
        transforms.evaluation(evaluator.network.input_spec),
        size=evaluator.network.input_spec.size,
        batch_size=evaluator.batch_size,
        workers=evaluator.workers,
        max_corrupt=evaluator.max_corrupt,
        host=processes.place(),
    )


class Halted(Exception):
    """An evaluation was told to end before it was done."""


def metrics(
    evaluator: Evaluator, variables: Tree, *, halted: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Metrics of the split for these variables.

    Args:
        evaluator: what to run, over what.
        variables: of the network.
        halted: asked between batches whether to give up.

    Raises:
        Halted: it was.
    """
    totals = evaluator.totals
    variables = _whole(evaluator, variables)
    with _batches(evaluator) as batches:
        for batch in batches:
            totals, _ = evaluator.program(
                variables, totals, sharding.put_batch(batch, evaluator.mesh)
            )
            # Without waiting, the host would put the whole split on the device ahead of the work.
            jax.block_until_ready(totals)
            batches.recycle(batch)
            if halted():
                raise Halted
    return evaluator.network.task.summarize(jax.device_get(totals))


def predictions(evaluator: Evaluator, variables: Tree) -> Predictions:
    """What the network says of each example."""
    columns: list[tuple[np.ndarray, ...]] = []
    variables = _whole(evaluator, variables)
    rows_here = evaluator.batch_size // jax.process_count()
    with _batches(evaluator) as batches:
        for batch in batches:
            _, outputs = evaluator.program(
                variables, evaluator.totals, sharding.put_batch(batch, evaluator.mesh)
            )
            # Of this process's rows, which are side by side.
            probability = sharding.local_rows(outputs["probability"])  # b k
            label, rows = batch["label"], np.arange(rows_here)
            first = len(columns) * evaluator.batch_size + processes.place()[0] * rows_here
            predicted = probability.argmax(axis=-1)
            chances = probability[rows, predicted], probability[rows, label]
            columns.append((first + rows, label, predicted, *chances, batch["mask"]))
            batches.recycle(batch)
    *each, mask = (processes.gather(np.concatenate(part)) for part in zip(*columns, strict=True))
    order = np.argsort(each[0])
    return Predictions(*(column[order[mask[order]]] for column in each))


def evaluate(
    config: build.Config, network: build.Network, weights: Mapping[str, Tree]
) -> dict[str, float]:
    """Evaluates a network on the validation split of a config.

    Args:
        config: says which images, and how many at a time.
        network: to evaluate.
        weights: variables as numpy arrays under "raw", "ema" or both.

    Returns:
        Metrics named as in training: "val/top1" for raw weights, "val_ema/top1" for averaged ones.
        For a set of data/imagenet_sets.py, those of tasks/scores.py.

    Raises:
        ConfigError: the images have another number of classes than the network.
        DataError: the images are not there or not as they should be.
    """
    source = build.source(config, "val")
    if isinstance(source, imagenet_sets.ImageNetSet):
        network = _scoring(network, source)
    else:
        _check_classes(network, source)
    return _all_metrics(config, network, weights, source, name="val")


def score(
    config: build.Config,
    network: build.Network,
    weights: Mapping[str, Tree],
    source: Source,
    *,
    name: str,
) -> dict[str, float]:
    """Evaluates a network on any images, with the metrics of tasks/scores.py.

    Args:
        config: says how many images at a time, and who loads them.
        network: to evaluate.
        weights: variables as numpy arrays under "raw", "ema" or both.
        source: the images.
        name: of the images: metrics are called "{name}/top1" and "{name}_ema/top1".

    Raises:
        ConfigError: the images have other classes than the network.
        DataError: the images cannot be read.
    """
    return _all_metrics(config, _scoring(network, source), weights, source, name=name)


def _check_classes(network: build.Network, source: Source) -> None:
    """Refuses images of another number of classes, and warns about other names."""
    if source.class_names != network.class_names:
        told = (
            f"the images have {len(source.class_names)} classes "
            f"({', '.join(source.class_names[:3])}, …), the network has "
            f"{len(network.class_names)} ({', '.join(network.class_names[:3])}, …)"
        )
        if len(source.class_names) != len(network.class_names):
            raise build.ConfigError(told)
        # Folders of synset ids against names in words: the order is what counts.
        warnings.warn(f"{told}; they are compared by position", stacklevel=3)


def _scoring(network: build.Network, source: Source) -> build.Network:
    """The network with the scores of a test set as its task."""
    if isinstance(source, imagenet_sets.ImageNetSet):
        names, synsets = network.class_names, imagenet_sets.synsets()
        # Names in words are in ImageNet's order wherever there are 1,000; ids can be compared.
        by_id = set(names) <= set(synsets)
        if len(names) != len(synsets) or (by_id and names != synsets):
            raise build.ConfigError(
                "the images are of the 1,000 classes of ImageNet, and the network has "
                f"{len(names)} ({', '.join(names[:3])}, …)"
            )
        task = scores.with_scores(
            network.task,
            answers=source.answers,
            classes=source.classes,
            group=source.group,
            groups=source.groups,
            baselines=source.baselines,
        )
    else:
        _check_classes(network, source)
        labels = np.arange(len(source.class_names))
        task = scores.with_scores(
            network.task,
            answers=labels[:, None],
            classes=None,
            group=np.zeros_like(labels),
            groups=("",),
            baselines={},
        )
    return network._replace(task=task)


def _all_metrics(
    config: build.Config,
    network: build.Network,
    weights: Mapping[str, Tree],
    source: Source,
    *,
    name: str,
) -> dict[str, float]:
    """Metrics of all weights, under `name` in the place of "val"."""
    mesh = sharding.make_mesh()
    evaluator = make(
        network,
        next(iter(weights.values())),
        source,
        mesh=mesh,
        **build.evaluation(config),
    )
    return {
        f"{SCOPES[which].replace('val', name, 1)}/{metric}": value
        for which, variables in weights.items()
        for metric, value in metrics(evaluator, variables).items()
    }
