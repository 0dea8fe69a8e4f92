"""Populations of stored vectors: how they start, who is drawn from them, how they mix, and how they stay in a box.

What differential evolution, genetic algorithms and swarms share. A population is an array (n, d); the parameters they
search are any pytree (`trees.ravel`). Nothing here takes more than O(n d) memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import noise as noises
from evoopt import trees
from evoopt.types import Array, Key, Params, error

Box = tuple[Array, Array] | None  # lower and upper, () or (d,)
Crossover = Callable[[Key, Array, int], Array]  # key, rate (n,), d -> which coordinates come from the mutant, (n, d) bool


def uniforms(key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Uniform numbers in [0, 1), of float32's or float64's precision; narrower types are rounded from float32."""
    n = int(np.prod(shape))
    if dtype == jnp.float64:
        return jax.random.uniform(key, shape, dtype)
    u = (noises.words(key, n)[0] >> 8).astype(jnp.float32) * np.float32(2.0**-24)
    return u.astype(dtype).reshape(shape)


def normals(key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Standard normals of any shape."""
    return noises.normals(key, int(np.prod(shape)), dtype).reshape(shape)


def box(lower: Any, upper: Any, unravel: trees.Unravel) -> Box:
    """The bounds as numbers or vectors (d,), from a number or a tree like the parameters; None without bounds.

    Raises:
        ValueError: with one bound alone, of another structure than the parameters, or where lower < upper fails.
    """
    if lower is None and upper is None:
        return None
    if lower is None or upper is None:
        raise error("both lower and upper, or neither", f"lower={lower}, upper={upper}", "an unbounded side written as None")
    low, high = _bound(lower, unravel), _bound(upper, unravel)
    if not isinstance(low, jax.core.Tracer) and not isinstance(high, jax.core.Tracer) and not bool((low < high).all()):
        raise error("lower < upper in every coordinate", f"lower={lower}, upper={upper}", "bounds given in the wrong order")
    return low, high


def _bound(bound: Any, unravel: trees.Unravel) -> Array:
    dtype = jnp.result_type(*unravel.dtypes)
    leaves, treedef = jax.tree.flatten(bound)
    if len(leaves) == 1 and jnp.ndim(leaves[0]) == 0:
        return jnp.asarray(leaves[0], dtype)
    if treedef != unravel.treedef:
        raise error(
            f"bounds that are a number or have the parameters' structure {unravel.treedef}",
            f"{treedef}",
            "bounds of another model",
        )
    wide = [jnp.broadcast_to(jnp.asarray(b, dtype), s) for b, s in zip(leaves, unravel.shapes, strict=True)]
    return jnp.concatenate([b.reshape(-1) for b in wide])


def scattered(
    params: Params, key: Key, n: int, spread: Any, lower: Any = None, upper: Any = None
) -> tuple[Array, trees.Unravel]:
    """A population (n, d) to start from, and the way from a row back to the parameters.

    Uniform in the box; without one, normal around `params` with standard deviation `spread`. The first row is `params`
    themselves, moved into the box where they lie outside.
    """
    key = noises.replayable(key)
    x0, unravel = trees.ravel(trees.searchable(params))
    bounds = box(lower, upper, unravel)  # type: ignore[arg-type]
    if bounds is None:
        check_positive("spread", spread)
        x = x0 + jnp.asarray(spread, x0.dtype) * normals(key, (n, x0.size), x0.dtype)
    else:
        x = bounds[0] + (bounds[1] - bounds[0]) * uniforms(key, (n, x0.size), x0.dtype)
        x0 = jnp.clip(x0, *bounds)
    return x.at[0].set(x0), unravel  # type: ignore[return-value]


def midpoint(x: Array, parents: Array, bounds: Box) -> Array:
    """x (n, d) with every coordinate outside the box replaced by the middle of its parent and the bound it passed."""
    if bounds is None:
        return x
    lower, upper = bounds
    x = jnp.where(x < lower, (lower + parents) / 2, x)
    return jnp.where(x > upper, (upper + parents) / 2, x)


def distinct(key: Key, size: Any, taken: Sequence[Array]) -> Array:
    """For every row an index drawn uniformly from range(size) without those `taken`, which differ from each other: (n,)."""
    ascending = jnp.sort(jnp.stack(taken), axis=0)
    drawn = jax.random.randint(key, taken[0].shape, 0, size - len(taken))
    for place in ascending:  # the k-th number that is not taken
        drawn = drawn + (drawn >= place).astype(drawn.dtype)
    return drawn


def binomial(key: Key, rate: Array, d: int) -> Array:
    """Every coordinate with probability `rate`, and one at random for certain: (n, d) bool."""
    key_each, key_sure = jax.random.split(key)
    n = rate.shape[0]
    sure = jax.random.randint(key_sure, (n, 1), 0, d)
    return (uniforms(key_each, (n, d), rate.dtype) < rate[:, None]) | (jnp.arange(d) == sure)


def exponential(key: Key, rate: Array, d: int) -> Array:
    """A run of adjacent coordinates (cyclic) from a random start, longer than l with probability rate^l: (n, d) bool."""
    key_start, key_length = jax.random.split(key)
    n = rate.shape[0]
    start = jax.random.randint(key_start, (n, 1), 0, d)
    u = 1 - uniforms(key_length, (n,), rate.dtype)  # (0, 1]
    length = 1 + jnp.floor(jnp.log(u) / jnp.minimum(jnp.log(rate), -jnp.finfo(rate.dtype).tiny))
    return (jnp.arange(d) - start) % d < jnp.clip(length, 1, d).astype(jnp.int32)[:, None]


def unknown(n: int) -> Array:
    """The values of n vectors that nobody was asked about yet: +inf, in the default float type."""
    return jnp.full(n, jnp.inf, jnp.result_type(float))


def check_positive(name: str, number: Any) -> None:
    """Raise the three-part error for a concrete number that is not positive."""
    if not isinstance(number, jax.core.Tracer) and not bool((jnp.asarray(number) > 0).all()):
        raise error(f"{name} above 0", str(number), "a width of zero searches nothing")
