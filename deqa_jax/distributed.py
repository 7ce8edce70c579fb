"""Several processes as one program: joining them, and waiting for each other."""

import contextlib
import hashlib
import itertools
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np

_ADDRESS, _PROCESSES, _PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
AUTOMATIC = "DEQA_DISTRIBUTED"
"""Set to `auto`, JAX finds the other processes by itself: on TPU VMs, GKE, SLURM and under MPI."""

# A process that is silent for so long is dead, and the others end too.
_HEARTBEAT_SECONDS = 30
# One that has failed gives the others so long to fail by themselves.
_FAREWELL_SECONDS = 10
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
    address, processes, process = None, None, None
    if not automatic:
        if missing := [name for name in (_ADDRESS, _PROCESSES, _PROCESS) if name not in explicit]:
            raise DistributedError(f"{', '.join(explicit)} without {', '.join(missing)}: set all three, or none")
        address, *numbers = (explicit[name] for name in (_ADDRESS, _PROCESSES, _PROCESS))
        if not all(number.isdecimal() for number in numbers) or not int(numbers[1]) < int(numbers[0]):
            raise DistributedError(
                f"{_PROCESS} {numbers[1]} of {_PROCESSES} {numbers[0]}: processes are numbered from 0"
            )
        if not address.rpartition(":")[2].isdecimal():
            raise DistributedError(f"{_ADDRESS} {address}: give host:port of the first process")
        processes, process = map(int, numbers)
    try:
        jax.distributed.initialize(
            address,
            processes,
            process,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            # All leave together, or by `fail`.
            shutdown_timeout_seconds=_FAREWELL_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise DistributedError(f"the processes of this job do not find each other: {error}") from error


def several() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def leave() -> None:
    """Ends this process's part of the job when all others are done too."""
    wait_for_all()
    jax.distributed.shutdown()


def fail(status: int) -> NoReturn:
    """Ends this process, and so the others, which cannot go on without it.

    Where all fail for the same reason, each has the time to say so.
    """
    sys.stdout.flush()
    with contextlib.suppress(Exception):
        _wait("farewell", _FAREWELL_SECONDS)
    # An orderly exit would wait for the others, and they for it.
    os._exit(status)


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def wait_for_all() -> None:
    """Until every process is here; one that has died ends this one.

    Before something that is run together, wherever processes may have taken differently long: on CPU, those that meet
    for the first time in a program give up after half a minute.
    """
    if jax.process_count() > 1:
        _wait(f"deqa {next(_barriers)}", _PATIENCE_SECONDS)


def _wait(name: str, seconds: int) -> None:
    from orbax.checkpoint import multihost

    multihost.sync_global_processes(name, timeout=seconds, processes=set(range(jax.process_count())))


def total(number: int) -> int:
    """The sum over all processes; all of them call it, however far apart in time."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    wait_for_all()
    return int(multihost_utils.process_allgather(np.asarray(number)).sum())


def agree(text: bytes) -> bool:
    """Whether all processes say the same; all of them call it."""
    if jax.process_count() == 1:
        return True
    from jax.experimental import multihost_utils

    wait_for_all()
    digests = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(text).digest(), np.uint8))
    return bool((digests == digests[:1]).all())


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """The first process runs the block, then all others do; they go on when all are done.

    Where it fails in the first, the others try it too, so that each says what is wrong with its files.
    """
    if not is_first():
        wait_for_all()
    try:
        yield
    except Exception:
        if is_first():
            wait_for_all()
        raise
    if is_first():
        wait_for_all()
    # What follows may be run together, and the block may have taken the others long.
    wait_for_all()


def check_shared(folder: Path) -> None:
    """Sees that all processes have the same folder, which is made if it is not there.

    Raises:
      DistributedError: some do not, as on machines without common storage.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    wait_for_all()
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
