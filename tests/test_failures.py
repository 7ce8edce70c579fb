"""What failures are called, and the status that a command exits with because of them."""

import jax
import pytest

from deqa_jax import distributed
from deqa_jax.config import QuantizedError
from deqa_jax.failures import explain

LOST = "UNAVAILABLE: connection reset by peer\nand a trace of many lines"


@pytest.mark.parametrize(
    ("error", "message", "status"),
    [
        (KeyboardInterrupt(), "interrupted; what was finished is written", 130),
        (FileExistsError("M exists already"), "M exists already", 2),
        (NotADirectoryError(20, "Not a directory", "file/M"), "file/M: Not a directory", 2),
        (QuantizedError("M: its weights are quantised"), "M: its weights are quantised", 2),
        (PermissionError(13, "Permission denied", "M"), "M: Permission denied", 1),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device", 1),
        (ChildProcessError("a process was ended"), "a process was ended", 1),
        (distributed.DistributedError("nobody came"), "nobody came", 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_can_happen_has_a_message_and_a_status(error, message, status):
    assert explain(error) == (message, status)


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), AssertionError(), jax.errors.JaxRuntimeError(LOST)])
def test_what_should_never_happen_has_none(error):
    assert explain(error) is None


def test_too_little_memory_names_what_would_help():
    message, status = explain(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 7 bytes\nmore"))
    assert status == 1
    assert "smaller batches" in message
    assert message.endswith("(RESOURCE_EXHAUSTED: 7 bytes)")


def test_among_several_processes_a_lost_connection_is_another_ones_end(monkeypatch):
    monkeypatch.setattr(distributed, "several", lambda: True)
    message, status = explain(jax.errors.JaxRuntimeError(LOST))
    assert status == 1
    assert message.startswith("another process of this job has ended")
    assert message.endswith("(UNAVAILABLE: connection reset by peer)")
    assert explain(ValueError("x")) is None
