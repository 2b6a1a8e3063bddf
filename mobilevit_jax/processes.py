"""The processes of a run: how they find one another, agree, and stop together.

Each is started with the same command, by Slurm, GKE or a shell; jax joins their devices into one
mesh. The first of them, the lead, does what is done once: it writes the run's files and decides
where a look at the disk decides. With one process all of this is next to nothing.
"""

import importlib.util
import os
import pickle
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

PATIENCE = 300  # seconds to wait for the others at the start: nodes boot at different speeds
SILENCE = 60  # seconds after which a process that gives no sign of life is taken for dead


class JoinError(Exception):
    """The processes of a run do not find one another."""


def join(
    *, coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> None:
    """Joins the processes of a run; call it before anything asks jax for devices.

    Without arguments, whoever started the process is asked: Slurm's srun, Open MPI's mpirun, Cloud
    TPU and GKE say it in the environment. A process that is alone is left alone.

    Args:
        coordinator: HOST:PORT of the first process, as the others reach it.
        count: how many processes there are.
        index: of this one, from 0.

    Raises:
        JoinError: one argument without the others, or nobody answers.
    """
    given = (coordinator, count, index)
    if given == (None, None, None):
        if not _started_by_a_cluster():
            return
    elif coordinator is None or count is None or index is None:
        raise JoinError(
            "give all of --coordinator=HOST:PORT --num_processes=N --process_id=I, or none of them"
        )
    elif not 0 <= index < count:
        raise JoinError(f"--process_id is {index}; it counts from 0 to {count - 1}")
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            initialization_timeout=PATIENCE,
            heartbeat_timeout_seconds=SILENCE,
        )
    except (RuntimeError, ValueError) as error:
        where = coordinator or "the address that the cluster gives"
        raise JoinError(
            f"the processes of the run do not meet at {where}: {str(error).splitlines()[0]}"
        ) from error


def _started_by_a_cluster() -> bool:
    """Whether the environment tells of other processes of the same run."""
    several = [
        # Set in a job step, that is by srun; a batch script or a shell in a job has no step.
        ("SLURM_STEP_NODELIST", "SLURM_NTASKS"),
        ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE"),
    ]
    if any(mark in os.environ and int(os.environ.get(size, "1")) > 1 for mark, size in several):
        return True
    # Several TPU hosts. GKE names them, and so does whoever joins slices; on a Cloud TPU VM only
    # the metadata server knows, and jax asks it.
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:
        return True
    chips = any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0")))
    return not hosts and chips and importlib.util.find_spec("libtpu") is not None


def joined() -> bool:
    """Whether this process has others beside it; does not start the devices."""
    return jax.distributed.is_initialized()


def is_lead() -> bool:
    """Whether this is the process that writes the files of the run."""
    return jax.process_index() == 0


def place() -> tuple[int, int]:
    """Index of this process and how many there are, as the input pipeline wants it."""
    return jax.process_index(), jax.process_count()


def tell(text: str) -> None:
    """Says a line on standard error, once for all processes."""
    if is_lead():
        print(text, file=sys.stderr, flush=True)


def by_lead(function: Callable[[], T]) -> T:
    """Lets the lead alone call a function, and gives what it returned (or raised) to all.

    For whatever depends on the disk: processes that look for themselves may see different things,
    and then wait for one another for ever. All must call it.

    Args:
        function: what it returns, or raises, is pickled.
    """
    if jax.process_count() == 1:
        return function()
    value: Any = None
    failure: Exception | None = None
    if is_lead():
        try:
            value = function()
        except Exception as error:
            failure = error
    with jax.transfer_guard("allow"):
        data = np.frombuffer(pickle.dumps((value, failure)), np.uint8)
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
        # The others hold as many bytes of no meaning.
        mine = data if is_lead() else np.zeros(size, np.uint8)
        told = np.asarray(multihost_utils.broadcast_one_to_all(mine))
    value, failure = pickle.loads(told.tobytes())
    if failure is not None:
        raise failure
    return value


def gather(rows: np.ndarray) -> np.ndarray:
    """The rows of all processes, in their order; each must bring as many."""
    if jax.process_count() == 1:
        return rows
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.process_allgather(rows)).reshape(-1, *rows.shape[1:])


def fetch(array: jax.Array) -> np.ndarray:
    """An array of the mesh, whole, in every process; all must call it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return jax.device_get(array)
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class Interrupt:
    """Remembers a request to stop, so that the loop can save and leave between two steps.

    The processes of a run stop at the same place, whichever of them was asked: a signal to one is
    told to all by jax's preemption service, which settles on a call of `asked` that none of them
    has come to.
    """

    def __init__(self) -> None:
        self._name: str | None = None
        self._together = False
        self._calls = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        self._together = joined()
        # SIGUSR1 is what Slurm's --signal sends ahead of the end of a job.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            if self._together and number == signal.SIGTERM:
                continue  # jax listens to it, in C++
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._name = signal.Signals(number).name
        # A second Ctrl-C stops at once.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def asked(self) -> str | None:
        """The signal that asks to stop here, if any.

        Call it after every step, and wherever else there is time to lose: all processes at the same
        places, in the same order.
        """
        self._calls += 1
        # True at one call only.
        if self._together and multihost_utils.reached_preemption_sync_point(self._calls):
            self._name = signal.SIGTERM.name
        return self._name

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
