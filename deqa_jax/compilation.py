"""How programs are compiled: what scoring asks of the compiler, and where compiled programs are kept."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.stages import Wrapped


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
        options["compiler_options"] = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    return jax.jit(exact, **options)


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
