"""Checkpoints: Orbax behind one small door.

A run keeps two directories, each written by its own manager: `checkpoints/` holds the newest steps
(resume reads it) and `best/` the one step with the best evaluation metric. Two managers, because
Orbax's own best-of policy deletes the newest step as soon as the metric worsens.

Beside the state goes a small JSON, `meta`: seconds trained, the metric that was best, and so on.
A save is asynchronous, lands under a temporary name and is renamed when complete, so a run that is
killed in the middle of a save still has the one before.
"""

import datetime
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from mobilevit_jax import processes, tree
from mobilevit_jax.tree import Tree

Meta = dict[str, Any]
NEWEST, BEST, UNREADABLE = "checkpoints", "best", "unreadable"


class CheckpointError(Exception):
    """A checkpoint could not be written or read; the message says which and what to do."""


class MismatchError(CheckpointError):
    """A checkpoint is of another model than the one it should go into."""


class Restored(NamedTuple):
    """What a checkpoint held."""

    step: int
    state: Tree
    meta: Meta


def _manager(directory: pathlib.Path, keep: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
        # Both directories may save the same step at a time, and the processes wait for one another
        # by names that hold the step alone.
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            barrier_sync_key_prefix=directory.name
        ),
    )
    # Orbax accepts a relative directory and then fails at the first save.
    return ocp.CheckpointManager(directory.absolute(), options=options)


def _here() -> ocp.options.MultiprocessingOptions:
    """For reading in this process, whatever the others of the run do."""
    me, _ = processes.place()
    return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})


def _state_reader() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=_here())


def _metadata(reader: ocp.Checkpointer, directory: pathlib.Path) -> Tree:
    item = reader.metadata(directory / "state").item_metadata
    if item is None:  # how Orbax says that it cannot read its own files
        raise CheckpointError("its metadata is damaged or missing")
    return item.tree


def _shapes(directory: pathlib.Path) -> Tree:
    """Names, shapes and dtypes of a stored state, without reading the arrays."""
    with _state_reader() as reader:
        stored = _metadata(reader, directory)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)


def check_matches(expected: Tree, stored: Tree, *, where: pathlib.Path | str) -> None:
    """Compares names and shapes of what a config builds and what a checkpoint holds.

    Both are mappings with "params" among their keys.

    Raises:
        MismatchError: naming the first that differ.
    """
    # The parameters say what differs; the rest (statistics, moments, averages) only repeats it.
    params = [{"params": part["params"]} for part in (expected, stored)]
    lines = tree.difference(*params) or tree.difference(expected, stored)
    if not lines:
        return
    shown = "\n".join(f"  {line}" for line in lines[:8])
    more = f"\n  … and {len(lines) - 8} more" if len(lines) > 8 else ""
    raise MismatchError(
        f"the weights in {where} are of another model, class count or optimiser than the config "
        f"(- missing there, + only there, ~ another shape):\n{shown}{more}\n"
        "Use the config that wrote it, or another --workdir."
    )


def _one_copy(leaf: Any) -> Any:
    """Of an array of which every device has a copy, one of those.

    Orbax would have each device write a part of it: thousands of slices, for which the training
    loop waits. Among several processes it is the processes that share the writing.
    """
    alone = isinstance(leaf, jax.Array) and jax.process_count() == 1
    return leaf.addressable_data(0) if alone and leaf.is_fully_replicated else leaf


def _as_dicts(state: Tree) -> Tree:
    """The state as nested dicts keyed as Orbax stores it."""
    return ocp.tree.serialize_tree(state, keep_empty_nodes=True)


class Checkpoints:
    """The checkpoints of one run, for the training loop; tools use `read`."""

    def __init__(self, workdir: pathlib.Path, *, keep: int, note: Callable[[str], None]) -> None:
        """Opens (and where needed makes) the directories; all processes of a run do.

        Args:
            workdir: of the run.
            keep: how many of the newest steps to keep, at least 1.
            note: called with one line when something must be told.
        """
        self._workdir = workdir.absolute()
        self._note = note
        self._newest = _manager(self._workdir / NEWEST, keep)
        self._best = _manager(self._workdir / BEST, 1)

    def save(self, step: int, state: Tree, meta: Mapping[str, Any]) -> None:
        """Starts saving the state after `step` steps; returns once it may be overwritten.

        Raises:
            CheckpointError: this or the previous save failed.
        """
        # Who resumes from here must find the best one of the steps before.
        with self._explained(self._best):
            self._best.wait_until_finished()
        self._save(self._newest, step, state, meta)

    def save_best(self, step: int, state: Tree, meta: Mapping[str, Any]) -> None:
        """The same, in place of the best one so far."""
        self._save(self._best, step, state, meta)

    def _save(
        self, manager: ocp.CheckpointManager, step: int, state: Tree, meta: Mapping[str, Any]
    ) -> None:
        if step in manager.all_steps():
            return  # saved before, by the run that we continue
        with self._explained(manager):
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(jax.tree.map(_one_copy, state)),
                    meta=ocp.args.JsonSave(dict(meta)),
                ),
                force=True,
            )

    def wait(self) -> None:
        """Returns when all saves are on disk.

        Raises:
            CheckpointError: one of them failed.
        """
        for manager in (self._newest, self._best):
            with self._explained(manager):
                manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Waits and gives back the threads; a failed save takes no other error's place."""
        try:
            self.wait()
        except CheckpointError as failed:
            if error is None:
                raise
            if not isinstance(error, CheckpointError):
                self._note(str(failed))
        finally:
            self._newest.close()
            self._best.close()

    def restore(self, abstract_state: Tree) -> Restored | None:
        """The newest readable state, or None where there is none.

        Steps newer than that one, which cannot be read, are moved to `unreadable/` and told.

        Args:
            abstract_state: shapes, dtypes and shardings of the state.

        Raises:
            MismatchError: the checkpoint is of another model, class count or optimiser.
            CheckpointError: there are checkpoints and none of them can be read.
        """
        step = processes.by_lead(lambda: self._newest_readable(abstract_state))
        self._newest.reload()
        if step is None:
            return None
        restored = self._newest.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore()
            ),
        )
        return Restored(step, restored["state"], restored["meta"])

    def _newest_readable(self, abstract_state: Tree) -> int | None:
        """The newest step that can be read, after setting aside those that cannot."""
        directory = self._workdir / NEWEST
        steps = complete_steps(directory)[::-1]
        broken: list[tuple[pathlib.Path, Exception]] = []
        for step in steps:
            where = directory / str(step)
            try:
                check_matches(_as_dicts(abstract_state), _shapes(where), where=where)
                # All of it, because a process that fails alone would leave the others waiting.
                _read_step(directory, step)
            except MismatchError:
                raise
            except Exception as error:  # whatever Orbax and its file formats raise on bad bytes
                broken.append((where, error))
            else:
                for path, reason in broken:
                    self._set_aside(path, reason)
                return step
        if not steps:
            return None
        reasons = "\n".join(f"  {path}: {_first_line(error)}" for path, error in broken)
        raise CheckpointError(
            f"none of the checkpoints can be read:\n{reasons}\n"
            f"Nothing was changed. To begin anew, move {directory} away."
        )

    def best_metric(self) -> float | None:
        """The metric of the best checkpoint; None where there is none that can be read."""
        best = processes.by_lead(self._best_metric)
        self._best.reload()
        return best

    def _best_metric(self) -> float | None:
        steps = complete_steps(self._workdir / BEST)
        if not steps:
            return None
        where = self._workdir / BEST / str(steps[-1])
        try:
            # All of it: one that only looked whole would be kept until there is a better one.
            return float(_read_step(where.parent, steps[-1]).meta["best"])
        except Exception as error:
            self._set_aside(where, error)
            return None

    def _set_aside(self, where: pathlib.Path, error: Exception) -> None:
        # Left in place it would be taken for the newest step for ever, and the step with the same
        # number could not be saved again.
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        target = self._workdir / UNREADABLE / f"{where.parent.name}-{where.name}-{now}"
        target.parent.mkdir(exist_ok=True)
        where.rename(target)
        self._note(
            f"checkpoint {where} cannot be read ({_first_line(error)}); moved it to {target} and "
            "went back to the one before"
        )

    def _explained(self, manager: ocp.CheckpointManager) -> "_SaveErrors":
        return _SaveErrors(self._workdir, manager)


class _SaveErrors:
    """Re-words what goes wrong while saving."""

    def __init__(self, workdir: pathlib.Path, manager: ocp.CheckpointManager) -> None:
        self._workdir = workdir
        self._manager = manager

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception):
            return
        kept = ", ".join(str(step) for step in sorted(complete_steps(self._workdir / NEWEST)))
        raise CheckpointError(
            f"could not save a checkpoint in {self._workdir}: {_first_line(error)}. "
            f"Steps still there and intact: {kept or 'none'}. "
            "Make room (or fix the permissions) and run the same command again."
        ) from error


def _first_line(error: Exception) -> str:
    """The gist of an error of Orbax, whose texts run over pages."""
    text = str(error)
    for known in ("No space left on device", "Disk quota exceeded", "Permission denied"):
        if known in text:
            return known
    if isinstance(error, CheckpointError):  # our own words
        return text
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]


def complete_steps(directory: pathlib.Path) -> list[int]:
    """Steps that lie in a directory of checkpoints, ascending; unfinished saves do not count."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def read(workdir: pathlib.Path, which: str = "newest") -> Restored:
    """Reads a run's state as nested dicts of numpy arrays, whatever devices wrote it.

    Args:
        workdir: of the run.
        which: "newest", "best", or a step number.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    directory = workdir.absolute() / (BEST if which == "best" else NEWEST)
    steps = complete_steps(directory)
    if which in ("newest", "best"):
        candidates = steps[::-1]
    elif which.isdigit():
        candidates = [step for step in steps if step == int(which)]
    else:
        raise CheckpointError(f"checkpoint {which!r}: write newest, best or a step number")
    if not candidates:
        there = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"no checkpoint {which!r} in {directory}; steps there: {there}")
    reasons = []
    for step in candidates:
        try:
            restored = _read_step(directory, step)
        except Exception as error:  # whatever Orbax and its file formats raise on bad bytes
            reasons.append(f"{step} ({_first_line(error)})")
        else:
            if reasons:
                processes.tell(f"{directory}: cannot read {'; '.join(reasons)}; read {step}")
            return restored
    raise CheckpointError(f"cannot read the checkpoint in {directory}: {'; '.join(reasons)}")


def read_mean(workdir: pathlib.Path, count: int) -> Restored:
    """The newest checkpoint with the mean of the newest `count` in place of its weights.

    Parameters, batch statistics and the moving averages of both are averaged; the rest of the state
    is that of the newest. `meta["mean_of"]` lists the steps.

    Raises:
        CheckpointError: there are fewer checkpoints, or one cannot be read.
    """
    directory = workdir.absolute() / NEWEST
    steps = complete_steps(directory)
    if not 1 <= count <= len(steps):
        raise CheckpointError(
            f"{count} checkpoints are to be averaged, and {directory} has {len(steps)} "
            f"({', '.join(map(str, steps)) or 'none'}); train with "
            f"--config.checkpoint.keep={count} to keep so many"
        )
    newest = _read_one(directory, steps[-1])
    weights = {name: newest.state[name] for name in ("params", "model_state", "ema")}
    # Summed in float64: the mean of equal weights is these weights, to the last bit.
    totals = jax.tree.map(lambda leaf: leaf.astype(np.float64), weights)
    for step in steps[-count:-1]:
        state = _read_one(directory, step).state
        other = {name: state[name] for name in weights}
        check_matches(weights, other, where=directory / str(step))
        totals = jax.tree.map(np.add, totals, other)
    mean = jax.tree.map(lambda total, leaf: (total / count).astype(leaf.dtype), totals, weights)
    return Restored(newest.step, newest.state | mean, newest.meta | {"mean_of": steps[-count:]})


def _read_one(directory: pathlib.Path, step: int) -> Restored:
    try:
        return _read_step(directory, step)
    except Exception as error:  # whatever Orbax and its file formats raise on bad bytes
        raise CheckpointError(
            f"cannot read the checkpoint {directory / str(step)}: {_first_line(error)}"
        ) from error


def _read_step(directory: pathlib.Path, step: int) -> Restored:
    path = directory / str(step)
    with _state_reader() as reader:
        stored = _metadata(reader, path)
        # Numpy, because the devices that wrote it need not exist here.
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        state = reader.restore(path / "state", restore_args=as_numpy)
    return Restored(step, state, _read_meta(path))


def _read_meta(step_directory: pathlib.Path) -> Meta:
    reader = ocp.Checkpointer(ocp.JsonCheckpointHandler(), multiprocessing_options=_here())
    with reader:
        return reader.restore(step_directory / "meta")
