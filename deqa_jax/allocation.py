"""What becomes of freed memory."""

import ctypes

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, where its C library is glibc; elsewhere nothing changes.

    On CPU a compiled program takes memory for its temporaries at each call and frees it behind. glibc hands large
    pieces back to the system, which has to clear every page of the next: a training step of deqa-tiny spent more than a
    third of its time on that. The process stays as large as it once was.

    To be called before JAX has made its threads, with the first look at its devices: a thread stays with the arena that
    it began with, and none but the first arena keeps pieces of more than 64 MiB.

    >>> keep_freed_memory()
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # One arena for all threads, nothing in pieces of its own, and no limit to what is kept.
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
