"""DeQA-Score in JAX: image quality as a distribution over five words."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deqa_jax.scorer import Prediction, Scorer

__all__ = ["Prediction", "Scorer"]


def __getattr__(name: str) -> Any:
    """Loads JAX only for those who need it: `deqa --help` does not."""
    if name in __all__:
        from deqa_jax import scorer

        return getattr(scorer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
