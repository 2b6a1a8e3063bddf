"""The training loop, top to bottom. There is one; what it trains comes from build.py.

The numbered comments are its stages in order. Checkpoint N holds the state after N steps, and a
resumed run asks the data for batch N: the state and the step are all there is to restore.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.typing import ArrayLike

from mobilevit_jax import (
    build,
    checkpoint,
    devices,
    evaluate,
    optim,
    processes,
    programs,
    report,
    schedule,
    sharding,
    steps,
    tree,
    workdirs,
)
from mobilevit_jax.data import multiscale, pipeline
from mobilevit_jax.models.distillation import TEACHER
from mobilevit_jax.tree import Tree


class NonFiniteError(Exception):
    """The loss or the gradient is no longer a number."""


class SavedAndStopped(Exception):
    """A signal asked the run to stop, and it has saved its state."""


class Trace:
    """Records what host and device do in steps `first` to `last`, for Perfetto and XProf."""

    def __init__(self, workdir: pathlib.Path, span: tuple[int, int] | None) -> None:
        self._directory = workdir / "trace"
        self._first, self._last = span or (0, 0)
        self._on = False

    def begin(self, step: int) -> None:
        """Call it before a step, ahead of the wait for its batch."""
        if step == self._first:
            jax.profiler.start_trace(str(self._directory), create_perfetto_trace=True)
            self._on = True

    def end(self, step: int, result: Tree, note: Callable[[str], None]) -> None:
        """Call it after a step, with what the step gives."""
        if self._on and step == self._last:
            jax.block_until_ready(result)
            self.close()
            note(f"trace of steps {self._first} to {step} in {self._directory}")

    def close(self) -> None:
        """Ends a trace that is still on."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()


def train(
    config: build.Config,
    workdir: pathlib.Path,
    *,
    command: str,
    load: Callable[[str], dict[str, Tree]],
    trace_steps: tuple[int, int] | None = None,
    dry_run: bool = False,
) -> dict[str, float]:
    """Trains, or goes on with, the run in `workdir`; returns its last evaluation.

    Args:
        config: the resolved config.
        workdir: made where it is missing; everything about the run lies there.
        command: what was typed, for the record.
        load: reads the variables of the model references that `config.init` and `config.teacher`
            may hold.
        trace_steps: first and last step to record in the workdir's `trace/`; None for none.
        dry_run: takes two steps on made-up images.

    Raises:
        ConfigError, DataError, CheckpointError: see build, data/sources and checkpoint.
        NonFiniteError: training diverged; the checkpoints are from before.
        SavedAndStopped: a signal came; the state is saved.
    """
    # 1 Workdir.
    workdir = workdir.absolute()
    # 2 Mesh, 3 build. Bad configs and missing data end here, before anything is written or
    # compiled.
    run = build.experiment(config, dry_run=dry_run)
    network, mesh = run.network, run.mesh
    _check_best(run)
    processes.by_lead(lambda: workdirs.make(workdir))

    # 4 Abstract state and shardings; arrays are born sharded.
    init = functools.partial(
        steps.init_state,
        run.seed,
        model=run.training.model,
        tx=run.tx,
        size=network.input_spec.size,
    )
    abstract_state = build.placed(jax.eval_shape(init), run)
    shardings = sharding.shardings(abstract_state)
    with contextlib.ExitStack() as stack:
        # 5 Own checkpoint > warm start > scratch.
        checkpoints = stack.enter_context(
            checkpoint.Checkpoints(workdir, keep=run.keep, note=processes.tell)
        )
        restored = checkpoints.restore(abstract_state)
        if restored:
            state = restored.state
        else:
            state = steps.run_once(init, shardings)
            for reference, put in ((run.init, _warm_start), (run.teacher, _put_teacher)):
                if reference:
                    state = put(state, load(reference), reference, shardings)
        start = restored.step if restored else 0
        best = checkpoints.best_metric()
        # Only now: a config that does not fit the checkpoints must not take the place of the one
        # that made them.
        if processes.is_lead():
            workdirs.record(workdir, config, network.class_names, command)
        reporter = stack.enter_context(
            report.Report(
                workdir if processes.is_lead() else None,
                total_steps=run.total_steps,
                start_step=start,
                images=run.shapes.position,
                writers=run.writers,
                config=tree.flatten_mapping(build.plain(config)),
                elapsed=restored.meta["elapsed"] if restored else 0.0,
            )
        )
        if processes.is_lead():
            workdirs.describe(reporter, run, workdir, state, start)
        interrupt = stack.enter_context(processes.Interrupt())

        # 6 Compile ahead of time.
        with reporter.pausing("compile"):
            compiled, evaluator, forecast = _compile(run, abstract_state, reporter)

        def evaluate_both() -> dict[str, float]:
            values = {}
            for weights, scope in evaluate.SCOPES.items():
                each = evaluate.metrics(
                    evaluator,
                    state.variables(weights),
                    halted=lambda: interrupt.asked() is not None,
                )
                values |= {f"{scope}/{name}": value for name, value in each.items()}
            return values

        def save(step: int) -> None:
            with reporter.pausing("save"):
                checkpoints.save(step, state, {"elapsed": reporter.elapsed})

        def leave(step: int, stop: str | None) -> NoReturn:
            checkpoints.wait()
            raise SavedAndStopped(
                f"{stop}: saved step {step} of {run.total_steps} in {workdir}; "
                "run the same command again to go on"
            )

        def evaluate_and_keep_best(
            step: int, best: float | None, *, known: dict[str, float] | None = None
        ) -> float | None:
            with reporter.pausing("evaluate"):
                try:
                    values = known or evaluate_both()
                except evaluate.Halted:  # it may take longer than there is time to leave
                    save(step)
                    leave(step, interrupt.asked())
                if not known:
                    reporter.evaluation(step, values)
                value = values[run.best]
                # Fresh weights are not worth a checkpoint; than a NaN, nothing would be better.
                if step and math.isfinite(value) and (best is None or value > best):
                    best = value
                    meta = {"elapsed": reporter.elapsed, "best": best, "metrics": values}
                    checkpoints.save_best(step, state, meta)
            return best

        stack.enter_context(jax.transfer_guard("disallow"))
        # 7 Evaluate at step 0, and where the run ended after a save and before its evaluation, or
        # before the best one's save.
        if start == 0 or schedule.due(start, every=run.eval_every, total=run.total_steps):
            known = processes.by_lead(lambda: workdirs.evaluation(workdir, start))
            best = evaluate_and_keep_best(start, best, known=known)

        # 8 Step, log, save, evaluate.
        batches = stack.enter_context(
            pipeline.train_batches(
                run.train_source,
                run.transform,
                shapes=run.shapes,
                seed=run.seed,
                start_step=start,
                workers=run.workers,
                max_corrupt=run.max_corrupt,
                host=processes.place(),
            )
        )
        pending: collections.deque[dict[str, jax.Array]] = collections.deque()
        skipped, flops = 0, 0.0
        trace = Trace(workdir, trace_steps if processes.is_lead() else None)
        stack.callback(trace.close)
        if trace_steps and not start < trace_steps[0] <= run.total_steps:
            reporter.note(f"no trace: this start takes steps {start + 1} to {run.total_steps}")
        reading: collections.deque[pipeline.Batch] = collections.deque()
        for step in range(start + 1, run.total_steps + 1):
            trace.begin(step)
            with reporter.waiting():
                batch = next(batches)
            if step == 1 and processes.is_lead():
                workdirs.sample_sheet(workdir, batch, network.class_names)
            shape = run.shapes.at(step - 1)
            state, step_metrics = compiled[shape](state, sharding.put_batch(batch, mesh))
            flops += forecast.flops[shape]
            pending.append(step_metrics)
            reading.append(batch)
            if len(pending) > 1:
                # The host stays one step ahead of the device and no more, or batches pile up there.
                jax.block_until_ready(pending[-2])
            while len(reading) > 1:
                batches.recycle(reading.popleft())
            reporter.advance(step)
            trace.end(step, step_metrics, reporter.note)

            due = functools.partial(schedule.due, step, total=run.total_steps)
            stop = interrupt.asked()
            save_due = bool(stop) or due(every=run.save_every)
            eval_due = due(every=run.eval_every)
            if save_due or eval_due or due(every=run.log_every):
                # Looked at before every save, so that what is saved is always finite.
                values, skipped = _fetch(
                    pending, step, skipped=skipped, max_skipped=run.max_skipped, note=reporter.note
                )
                broken = {"data/broken": len(batches.corrupt)} if batches.corrupt else {}
                memory = devices.memory()
                used = {"device/memory_gib": memory.peak / 2**30} if memory else {}
                reporter.log(step, values | broken | used, ideal=forecast.seconds(flops))
                flops = 0.0
            if save_due:
                save(step)
            if eval_due and not stop:
                best = evaluate_and_keep_best(step, best)
            if stop:
                leave(step, stop)

        # 9 Wait for the saves, then draw.
        checkpoints.wait()
        with reporter.pausing("draw"):
            predictions = evaluate.predictions(evaluator, state.variables("ema"))
            if processes.is_lead():
                workdirs.draw(workdir, run, predictions)
        if start < run.total_steps:  # else this start had no step to take
            reporter.note(reporter.goodput()[1])
            if memory := devices.memory():
                reporter.note(
                    f"peak memory {memory.peak / 2**20:,.0f} MiB a device "
                    f"(predicted {forecast.bytes / 2**20:,.0f})"
                )
        reporter.note(f"done: {run.total_steps} steps, {reporter.elapsed:.0f} s; see {workdir}")
        return processes.by_lead(lambda: workdirs.evaluation(workdir)) or {}


def _check_best(run: build.Experiment) -> None:
    names = [name for name in evaluate.metric_names(run.network) if not name.endswith("/loss")]
    if run.best not in names:
        raise build.ConfigError(
            f"config.checkpoint.best is {run.best!r}; the highest is the best, of one of "
            f"{', '.join(names)}"
        )


def _warm_start(
    state: steps.TrainState, variables: dict[str, Tree], reference: str, shardings: Tree
) -> steps.TrainState:
    """Puts the weights of another model into a fresh state; a head of other classes stays fresh.

    Args:
        state: on the mesh.
        variables: of the other model, as numpy arrays.
        reference: of the other model, for messages.
        shardings: of the leaves of the state.
    """
    fresh = state.variables("raw")
    params = dict(variables["params"])
    model_state = {name: variables[name] for name in fresh if name != "params"}
    if tree.difference(state.params["head"], params.get("head", {})):
        classes = state.params["head"]["bias"].size
        processes.tell(
            f"{reference} has other classes: a fresh head for {classes} classes takes its place"
        )
        params["head"] = jax.tree.map(processes.fetch, state.params["head"])
    checkpoint.check_matches(fresh, {"params": params, **model_state}, where=reference)

    def put(now: Mapping[str, Tree], weights: Mapping[str, Tree], where: Tree) -> dict[str, Tree]:
        # What is there in training only stays as it is.
        return {**now, **{name: jax.device_put(weights[name], where[name]) for name in weights}}

    return dataclasses.replace(
        state,
        params=put(state.params, params, shardings.params),
        model_state=put(state.model_state, model_state, shardings.model_state),
        # Put twice: the train step is donated its state, and a buffer cannot be donated twice.
        ema={
            "params": put(state.ema["params"], params, shardings.ema["params"]),
            "model_state": put(state.ema["model_state"], model_state, shardings.ema["model_state"]),
        },
    )


def _put_teacher(
    state: steps.TrainState, variables: dict[str, Tree], reference: str, shardings: steps.TrainState
) -> steps.TrainState:
    """Puts the weights of the teacher into a fresh state."""
    collection = {"variables": variables}
    checkpoint.check_matches(state.model_state[TEACHER]["variables"], variables, where=reference)
    where = shardings.model_state[TEACHER]
    model_state = {**state.model_state, TEACHER: jax.device_put(collection, where)}
    return dataclasses.replace(state, model_state=model_state)


def bound_step(run: build.Experiment) -> Callable[..., Any]:
    """The train step of a run: (state, batch) -> (state, metrics)."""
    return functools.partial(
        steps.train_step,
        model=run.training.model,
        task=run.training.task,
        tx=run.tx,
        curve=run.curve,
        input_spec=run.training.input_spec,
        seed=run.seed,
        ema_decay=run.ema_decay,
        accum=run.accum,
        freeze_backbone=run.freeze_backbone,
        accum_reduction=run.accum_reduction,
        skip_non_finite=run.max_skipped > 0,
        batch_norm_momentum=run.batch_norm_momentum,
        gather=sharding.gather(run.mesh),
    )


def program(run: build.Experiment, abstract_state: steps.TrainState) -> Any:
    """`bound_step`, jitted, with `run.rates` as an argument: (state, batch, rates=…).

    Args:
        run: built.
        abstract_state: its shapes and shardings.

    Returns:
        A jitted function of the state, which is donated, and the batch: new state and metrics.
    """

    def step(state: steps.TrainState, batch: Tree, rates: Tree) -> Any:
        def curve(at: ArrayLike) -> jax.Array:
            return rates["learning_rate"][at]

        tx = run.optimizer(curve, {"weight_decay": rates["weight_decay"]})
        return bound_step(run._replace(tx=tx, curve=curve))(state, batch)

    out = sharding.shardings(abstract_state), sharding.replicated(run.mesh)
    options = devices.compiler_options()
    return jax.jit(step, donate_argnums=0, out_shardings=out, compiler_options=options)


class Forecast(NamedTuple):
    """What the compiled programs of a run will take of each device.

    Attributes:
        flops: of a step, by its shape.
        peak_flops: of the device, a second; None where it is not known.
        bytes: most memory at a time, as far as it can be foreseen.
    """

    flops: dict[multiscale.Shape, float]
    peak_flops: float | None
    bytes: int

    def seconds(self, flops: float) -> float | None:
        """How long a device at its peak would take for so many."""
        return flops / self.peak_flops if self.peak_flops else None


def _compile(
    run: build.Experiment, abstract_state: steps.TrainState, reporter: report.Report
) -> tuple[dict[multiscale.Shape, Any], evaluate.Evaluator, Forecast]:
    """The programs of all shapes and of evaluation; tells of each, and of what they will take."""
    table, began = run.shapes.table, reporter.elapsed
    variables = abstract_state.variables("raw")
    train_step = program(run, abstract_state)
    rates = jax.device_put(run.rates, sharding.replicated(run.mesh))

    def compile_step(shape: multiscale.Shape) -> Any:
        size = shape.height, shape.width
        batch = sharding.abstract_batch(run.mesh, batch_size=shape.batch_size, size=size)
        return train_step.lower(abstract_state, batch, rates=rates).compile()

    reporter.note(programs.sizes(run.shapes))
    jobs: list[Callable[[], Any]] = [functools.partial(compile_step, shape) for shape in table]
    jobs.append(
        functools.partial(
            evaluate.make, run.network, variables, run.val_source, mesh=run.mesh, **run.evaluation
        )
    )
    results: dict[int, Any] = {}
    costs: dict[int, programs.Cost] = {}
    # XLA's compiler for CPUs is parallel by itself; two at a time take longer than one by one.
    # Several processes may tune kernels together, so they compile in the same order.
    alone = jax.default_backend() != "cpu" and jax.process_count() == 1
    threads = pipeline.cores() if alone else 1
    for index, result in programs.compile_all(jobs, threads=threads):
        results[index] = result
        if index < len(table):
            name = (
                f"{table[index].batch_size:,} images of {table[index].height}x{table[index].width}"
            )
            costs[index] = programs.cost(result, loops=run.accum)
        else:
            name, costs[index] = "evaluation", programs.cost(result.program, loops=result.loops)
        reporter.note(
            f"compiled {len(results)}/{len(jobs)}: {name}, {reporter.elapsed - began:.1f} s; "
            f"{costs[index].flops / 1e9:,.2f} GFLOP on a device"
        )
    *compiled, evaluator = (results[i] for i in range(len(jobs)))
    *train_costs, evaluation_cost = (costs[i] for i in range(len(jobs)))
    forecast = Forecast(
        flops={shape: cost.flops for shape, cost in zip(table, train_costs, strict=True)},
        peak_flops=devices.peak_flops(
            jax.devices()[0].device_kind, run.network.model.dtype.__name__
        ),
        bytes=programs.predicted_peak(
            train_costs,
            evaluation_cost,
            state_bytes=programs.device_bytes(abstract_state),
            variables_bytes=programs.device_bytes(variables),
        ),
    )
    reporter.note(f"predicted peak memory {forecast.bytes / 2**20:,.0f} MiB a device")
    limit = devices.memory_limit()
    if limit is not None and forecast.bytes > limit:
        reporter.note(
            f"warning: a device has only {limit / 2**20:,.0f} MiB; raise config.accum, "
            "lower config.batch_size or set config.remat"
        )
    given = [functools.partial(program, rates=rates) for program in compiled]
    return dict(zip(table, given, strict=True)), evaluator, forecast


def _fetch(
    pending: collections.deque[dict[str, jax.Array]],
    step: int,
    *,
    skipped: int,
    max_skipped: int,
    note: Callable[[str], None],
) -> tuple[dict[str, float], int]:
    """The metrics of the steps since the last call, in one transfer; empties `pending`.

    Args:
        pending: of each step, the last being `step`.
        step: the last.
        skipped: how many steps in a row had been skipped when it was last called.
        max_skipped: how many there may be; steps that a smaller loss scale may mend do not count.
        note: is told of each.

    Returns:
        Metrics of the steps that were not skipped, and `skipped` for the next call.

    Raises:
        NonFiniteError: too many steps in a row have a loss or gradient that is no number.
    """
    fetched = jax.device_get(list(pending))
    pending.clear()
    taken = []
    for at, values in enumerate(fetched, step - len(fetched) + 1):
        wrong = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
        if not wrong:
            taken.append(values)
            skipped = 0
            continue
        if values.get("loss_scale", optim.SMALLEST_LOSS_SCALE) > optim.SMALLEST_LOSS_SCALE:
            continue  # float16 overflowed, which half the scale should mend
        skipped += 1
        told = f"{wrong[0]} is {values[wrong[0]]} at step {at}"
        if skipped > max_skipped:
            after = f", after {max_skipped} skipped steps in a row" if max_skipped else ""
            raise NonFiniteError(told + after)
        note(f"{told}: skipped")
    metrics = {"train/learning_rate": float(fetched[-1]["learning_rate"])}
    for name in ("loss", "grad_norm"):
        metrics[f"train/{name}"] = float(np.mean([values[name] for values in taken or fetched]))
    if "loss_scale" in fetched[-1]:
        metrics["train/loss_scale"] = float(fetched[-1]["loss_scale"])
    if len(taken) < len(fetched):
        metrics["train/skipped"] = len(fetched) - len(taken)
    return metrics, skipped
