"""What a failure is called in a sentence, and the status that a command exits with because of it."""

import sys

from deqa_jax.arguments import USAGE_STATUS
from deqa_jax.config import QuantizedError

FAILED, INTERRUPTED = 1, 130


def fail(message: str, status: int) -> int:
    """Says what went wrong; returns the status to exit with."""
    print(f"deqa: {message}", file=sys.stderr)
    return status


def explain(error: BaseException) -> tuple[str, int] | None:
    """A message and an exit status for what can happen to any command; None for what should never happen."""
    match error:
        case KeyboardInterrupt():
            return "interrupted; what was finished is written", INTERRUPTED
        case FileExistsError() | NotADirectoryError():
            return _reason(error), USAGE_STATUS
        case QuantizedError():
            return str(error), USAGE_STATUS
        case OSError():
            return _reason(error), FAILED
    # What JAX reports, if it is there: none of it is loaded for a sentence.
    return _explain_jax(error) if "jax" in sys.modules else None


def _explain_jax(error: BaseException) -> tuple[str, int] | None:
    import jax

    from deqa_jax import distributed

    if isinstance(error, distributed.DistributedError):
        return str(error), FAILED
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    shown = str(error).splitlines()[0]
    if "RESOURCE_EXHAUSTED" in shown:
        return (
            "not enough memory; take smaller batches, bfloat16, or a mesh that splits the model over more devices. "
            f"`deqa plan` says what fits ({shown})",
            FAILED,
        )
    if distributed.several():
        return (
            "another process of this job has ended or does not answer; its own output says why, and the same "
            f"command goes on from what is finished ({shown})",
            FAILED,
        )
    return None


def _reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)
