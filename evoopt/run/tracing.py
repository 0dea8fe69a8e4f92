"""JAX's complaint about an objective that is not JAX, as one that says what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

from evoopt.types import error

NOT_JAX = (  # what JAX raises when a traced value meets NumPy or Python; the others are kinds of the second
    jax.errors.TracerArrayConversionError,
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.UnexpectedTracerError,
)
TRACED = ("Tracer", "JAX arrays are immutable")  # words in what Python and other libraries raise in that case


@contextlib.contextmanager
def jax_only(jit: bool) -> Iterator[None]:
    """Turn JAX's complaint about a NumPy objective into an error with a remedy."""
    try:
        yield
    except (*NOT_JAX, TypeError, AttributeError) as reason:
        told = isinstance(reason, NOT_JAX) or any(word in str(reason) for word in TRACED)
        if not jit or not told or "usual cause" in str(reason):
            raise
        raise error(
            "an objective in JAX, which can be traced",
            f"{type(reason).__name__}: {str(reason).splitlines()[0]}",
            "an objective in NumPy or Python: pass jit=False. In JAX, jnp.where replaces `if` on a value",
            TypeError,
        ) from reason
