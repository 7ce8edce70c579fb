"""How programs are compiled: what scoring asks of the compiler, and where compiled programs are kept."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.stages import Lowered, Traced, Wrapped

_SPARING = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def scoring_jit(
    function: Callable[..., Any], dtype: str, platform: str, *, quantized: bool = False, **options: Any
) -> Wrapped:
    """`jax.jit` with what scoring in `dtype` needs of the compiler; `options` are those of `jax.jit`.

    `quantized` says that kernels are of few bits.
    """

    @functools.wraps(function)
    def exact(*arguments: Any, **named: Any) -> Any:
        # Accelerators would multiply float32 matrices in fewer bits without being told.
        with jax.default_matmul_precision("highest" if dtype == "float32" else None):
            return function(*arguments, **named)

    if platform == "cpu" and (dtype == "bfloat16" or quantized):
        # There, products in bfloat16 and of few bits are of weights cast to float32. In its usual order the compiler
        # casts those of all blocks before it needs them: 29 GiB at full size, against less than one in this order.
        return _Sparing(exact, options)
    return jax.jit(exact, **options)


class _Sparing:
    """A compiled function that the compiler is to save memory in, wherever it is no part of another one.

    JAX takes what is asked of the compiler for a whole program only, so in a user's `jax.jit` or `jax.grad` it is left
    out.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]):
        functools.update_wrapper(self, function)
        self._whole = jax.jit(function, **options, compiler_options=_SPARING)
        self._part = jax.jit(function, **options)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return (self._part if _is_traced((arguments, named)) else self._whole)(*arguments, **named)

    def trace(self, *arguments: Any, **named: Any) -> Traced:
        return self._whole.trace(*arguments, **named)

    def lower(self, *arguments: Any, **named: Any) -> Lowered:
        return self._whole.lower(*arguments, **named)


def _is_traced(arguments: Any) -> bool:
    # In a function that is being compiled, all that is made anew is traced, though the arguments may be constants.
    return any(isinstance(leaf, jax.core.Tracer) for leaf in [jnp.zeros(()), *jax.tree.leaves(arguments)])


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX has been told of another place."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]  # set at run time
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "deqa-jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@contextlib.contextmanager
def compilation_cache_in(folder: Path) -> Iterator[None]:
    """What is compiled inside is kept in this folder, and taken from nowhere else."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}

    def use(values: dict[str, Any]) -> None:
        for name, value in values.items():
            jax.config.update(name, value)
        # JAX looks at the folder's name only once.
        compilation_cache.reset_cache()

    use(dict(zip(names, (str(folder), 0.0), strict=True)))
    try:
        yield
    finally:
        use(before)
