"""Several processes on this machine as one job: `python -m deqa_jax.launch.local -n 2 -- deqa train …`.

For a machine with several GPUs one process does as well. This is for trying, without a cluster, what runs on one.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import IO

# What a failed process leaves the others to end by themselves.
_PATIENCE_SECONDS = 20


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. Exits with the status of the process that failed first, or 0."""
    parser = argparse.ArgumentParser(
        prog="python -m deqa_jax.launch.local",
        description="Run a command as several processes of one job on this machine. When one fails, the others are "
        "ended, and its status is this command's.",
        epilog="example: python -m deqa_jax.launch.local -n 2 --devices 2 -- "
        "deqa score examples/ --model mix3 --output together.txt",
    )
    parser.add_argument("-n", "--processes", type=_positive, required=True, metavar="N", help="how many")
    parser.add_argument(
        "--devices", type=_positive, metavar="N", help="CPU devices that each process is to have, instead of its own"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run nothing")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="what each process runs")
    options = parser.parse_args(arguments)
    environments = _environments(options.processes, options.devices)
    if options.dry_run:
        for environment in environments:
            print("env", *(f"{name}={value}" for name, value in environment.items()), shlex.join(options.command))
        return
    try:
        sys.exit(run(options.command, environments))
    except OSError as error:
        parser.error(f"{options.command[0]}: {error.strerror}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def _environments(processes: int, devices: int | None) -> list[dict[str, str]]:
    """What tells each process about the others; see `deqa_jax.distributed.join`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
    if devices is not None:
        common |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return [{**common, "JAX_PROCESS_ID": str(process)} for process in range(processes)]


def run(command: Sequence[str], environments: Sequence[dict[str, str]]) -> int:
    """Runs a command once in each environment, on top of this process's own, with the number before every line.

    Returns:
      0, or the status of the first that failed; 128 and the signal's number if a signal ended it, as in a shell.

    Raises:
      OSError: there is no such command.
    """
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    lock, readers = threading.Lock(), []
    try:
        for environment in environments:
            process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # A terminal's Ctrl-C reaches each once, through this one.
                start_new_session=True,
            )
            processes.append(process)
            for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                assert source is not None  # as it is a pipe
                name = f"[{environment['JAX_PROCESS_ID']}] ".encode()
                readers.append(threading.Thread(target=_copy, args=(name, source, target.buffer, lock)))
                readers[-1].start()
        status = _wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for reader in readers:
            reader.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status


def _copy(name: bytes, source: IO[bytes], target: IO[bytes], lock: threading.Lock) -> None:
    with source:
        for line in source:
            with lock:
                target.write(name + line)
                target.flush()


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Until all have ended, or one has failed and the others have had time to."""
    while (failed := _failed(processes)) is None and any(process.poll() is None for process in processes):
        time.sleep(0.05)
    if failed is None and (failed := _failed(processes)) is None:
        return 0
    status = processes[failed].returncode
    print(f"process {failed} {_how(status)}; ending the others", file=sys.stderr, flush=True)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    return status if status > 0 else 128 - status


def _failed(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    return next((number for number, process in enumerate(processes) if process.poll()), None)


def _how(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with status {status}"


if __name__ == "__main__":
    main()
