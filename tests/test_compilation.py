"""Where compiled programs are kept, and what scoring asks of the compiler."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from deqa_jax.compilation import compilation_cache_in, scoring_jit


def test_programs_are_kept_in_the_folder_that_is_named_as_long_as_it_is(tmp_path):
    users, named = tmp_path / "users", tmp_path / "named"
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(users))
    try:
        with compilation_cache_in(named):
            jax.jit(lambda x: 3 * x + 41).lower(1.0).compile()
        assert list(named.iterdir())
        assert not users.exists()
        jax.jit(lambda x: 3 * x + 42).lower(1.0).compile()
        assert list(users.iterdir())
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


@pytest.mark.parametrize(("dtype", "exact"), [("float32", True), ("bfloat16", False)])
def test_products_in_float32_are_asked_to_be_exact(dtype, exact):
    x = jnp.ones((2, 2), dtype)
    traced = scoring_jit(jnp.matmul, dtype, "cpu").trace(x, x)
    assert ("Precision.HIGHEST" in str(traced.jaxpr)) == exact


def test_options_reach_the_compiler():
    function = scoring_jit(lambda x, *, twice: 2 * x if twice else x, "bfloat16", "cpu", static_argnames="twice")
    assert function(jnp.float32(3), twice=True) == 6


@pytest.mark.parametrize(
    ("dtype", "platform", "quantized", "sparing"),
    [
        ("float32", "cpu", False, False),
        ("bfloat16", "cpu", False, True),
        ("float32", "cpu", True, True),
        ("bfloat16", "cuda", True, False),
    ],
)
def test_weights_that_are_cast_are_cast_when_they_are_needed(dtype, platform, quantized, sparing, monkeypatch):
    monkeypatch.setattr(jax, "jit", lambda function, **options: lambda *arguments: options)
    found = scoring_jit(jnp.matmul, dtype, platform, quantized=quantized)(1.0)
    schedule = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    assert found == ({"compiler_options": schedule} if sparing else {})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_compiled_can_be_part_of_another_program(dtype):
    square = scoring_jit(lambda x, *, times: times * x * x, dtype, "cpu", static_argnames="times")
    x = jnp.float32(3)
    assert jax.jit(lambda x: square(x, times=2))(x) == 18
    assert jax.jit(lambda y: y + square(x, times=2))(x) == 21
    assert jax.grad(lambda x: square(x, times=2))(x) == 12
    assert jax.jit(jax.value_and_grad(lambda x: square(x, times=2)))(x) == (18, 12)
    assert square.lower(x, times=2).compile()(x) == 18
