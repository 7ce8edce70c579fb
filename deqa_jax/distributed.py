"""Several processes as one program: joining them, and waiting for each other."""

import contextlib
import itertools
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

_ADDRESS, _PROCESSES, _PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
AUTOMATIC = "DEQA_DISTRIBUTED"
"""Set to `auto`, JAX finds the other processes by itself: on TPU VMs, GKE, SLURM and under MPI."""

# A process that is silent for so long is dead, and the others end too.
_HEARTBEAT_SECONDS = 30
# Processes with more work than others are waited for.
_PATIENCE_SECONDS = 7 * 24 * 3600

_barriers = itertools.count()


class DistributedError(RuntimeError):
    """Processes that do not find each other or do not see the same files; the message says what to do."""


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of this job, if the environment speaks of any; to be called before JAX is used.

    Raises:
      DistributedError: it speaks of them in part only, or they cannot be found.
    """
    explicit = {name: environment[name] for name in (_ADDRESS, _PROCESSES, _PROCESS) if environment.get(name)}
    automatic = environment.get(AUTOMATIC, "")
    if automatic not in ("", "auto"):
        raise DistributedError(f"{AUTOMATIC} is auto or not set, not {automatic!r}")
    if not explicit and not automatic:
        return
    arguments: dict[str, object] = {}
    if not automatic:
        if missing := [name for name in (_ADDRESS, _PROCESSES, _PROCESS) if name not in explicit]:
            raise DistributedError(f"{', '.join(explicit)} without {', '.join(missing)}: set all three, or none")
        numbers = [explicit[_PROCESSES], explicit[_PROCESS]]
        if not all(number.isdecimal() for number in numbers) or not int(numbers[1]) < int(numbers[0]):
            raise DistributedError(
                f"{_PROCESS} {numbers[1]} of {_PROCESSES} {numbers[0]}: processes are numbered from 0"
            )
        arguments = {
            "coordinator_address": explicit[_ADDRESS],
            "num_processes": int(numbers[0]),
            "process_id": int(numbers[1]),
        }
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS, **arguments)
    except (RuntimeError, ValueError, OSError) as error:
        raise DistributedError(f"the processes of this job do not find each other: {error}") from error


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def wait_for_all() -> None:
    """Until every process is here; one that has died ends this one."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        everyone = set(range(jax.process_count()))
        name = f"deqa {next(_barriers)}"
        multihost.sync_global_processes(name, timeout=_PATIENCE_SECONDS, processes=everyone)


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """The first process runs the block, then all others do."""
    if not is_first():
        wait_for_all()
    yield
    if is_first():
        wait_for_all()


def check_shared(folder: Path) -> None:
    """Sees that all processes have the same folder, which is made if it is not there.

    Raises:
      DistributedError: some do not, as on machines without common storage.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    token = multihost_utils.broadcast_one_to_all(np.frombuffer(uuid.uuid4().bytes, np.uint8))
    sign = folder / f".shared-{bytes(token).hex()}"
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        sign.touch()
    wait_for_all()
    seen = multihost_utils.process_allgather(np.asarray(sign.exists()))
    wait_for_all()
    if is_first():
        sign.unlink()
    if not seen.all():
        blind = ", ".join(str(process) for process in np.flatnonzero(~seen))
        raise DistributedError(
            f"{folder}: processes {blind} do not see what process 0 writes there; give a folder on storage that all "
            "machines share"
        )
