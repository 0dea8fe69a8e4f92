"""The step-size in a state, whatever wraps the strategy it belongs to."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from evoopt.types import Array


def of(state: Any) -> Array | None:
    """The largest step-size of a state, (); None where a state has none."""
    for name in ("inner", "search"):
        if hasattr(state, name):
            return of(getattr(state, name))
    if not hasattr(state, "sigma"):
        return None
    return jnp.stack([jnp.max(x).astype(jnp.result_type(float)) for x in jax.tree.leaves(state.sigma)]).max()


def scaled(state: Any, factor: Array) -> Any:
    """The state with its step-size times `factor`; itself where it has none."""
    for name in ("inner", "search"):
        if hasattr(state, name):
            return state._replace(**{name: scaled(getattr(state, name), factor)})
    if not hasattr(state, "sigma"):
        return state
    return state._replace(sigma=jax.tree.map(lambda x: x * factor.astype(x.dtype), state.sigma))


def innermost(strategy: Any, state: Any) -> tuple[Any, Any]:
    """The strategy within restarts, and its state; as given where there are no restarts."""
    while getattr(strategy, "restarting", False):
        strategy, state = strategy.strategy, state.search
    return strategy, state
