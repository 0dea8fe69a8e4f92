"""A conditional that stays one under `vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from evoopt import trees
from evoopt.types import Array


def when(predicate: Array, f: Callable[[Any], Any], x: Any) -> Any:
    """`f(x)` if `predicate`, else `x`. Under `vmap`, `f` is still skipped when the predicate holds for no run.

    `lax.cond` under `vmap` always computes both sides. `f` must not close over arrays and must return what it is given.

    >>> jax.vmap(lambda p, x: when(p, jnp.sqrt, x))(jnp.array([True, False]), jnp.array([4.0, 4.0])).tolist()
    [2.0, 4.0]
    """

    @jax.custom_batching.custom_vmap
    def run(predicate: Array, x: Any) -> Any:
        return jax.lax.cond(predicate, f, lambda x: x, x)

    @run.def_vmap
    def _(size: int, batched: Any, predicate: Array, x: Any) -> Any:
        of_predicate, of_x = batched
        x = jax.tree.map(lambda leaf, b: leaf if b else jnp.broadcast_to(leaf, (size, *jnp.shape(leaf))), x, of_x)
        if not of_predicate:
            out = when(predicate, jax.vmap(f), x)
        else:
            some = lambda px: (px[0], jax.vmap(lambda p, x: trees.where(p, f(x), x))(*px))
            out = when(predicate.any(), some, (predicate, x))[1]
        return out, jax.tree.map(lambda _: True, out)

    return run(predicate, x)
