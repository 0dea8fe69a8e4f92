"""Running mean and variance of observations, merged over a population by Chan, Golub and LeVeque (1979).

Within an episode the moments are updated one observation at a time (Welford 1962), between candidates and generations
they are merged. Neither forms a sum of squares, so an offset that is large against the spread costs no digits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from evoopt.types import Array, pytree

# float32 cannot count single observations past 2^24, but only whole generations are added to a large count. Capped
# here, a generation of 64 observations is never lost in the sum, and later ones keep a weight: nothing freezes.
MAX_COUNT = 2.0**30


@pytree
class Moments:
    """Moments of `count` observations of shape s; a population of them has a leading axis n on every leaf."""

    count: Array  # (), float32
    mean: Array  # s
    var: Array  # s, the biased variance: what is divided by is `count`


def empty(shape: tuple[int, ...]) -> Moments:
    """Moments of no observation: `normalize` with them only clips."""
    return Moments(jnp.zeros(()), jnp.zeros(shape), jnp.ones(shape))


def observe(moments: Moments, observation: Array, counts: Array) -> Moments:
    """`moments` with one more observation (of shape s) where `counts` (a bool) holds, unchanged elsewhere."""
    count = moments.count + 1
    delta = observation - moments.mean
    mean = moments.mean + delta / count
    var = moments.var + (delta * (observation - mean) - moments.var) / count
    return jax.tree.map(lambda new, old: jnp.where(counts, new, old), Moments(count, mean, var), moments)


def merge(moments: Moments, rows: Moments, use: Array | bool = True) -> Moments:
    """`moments` and `rows` (leading axis n) together, in sums over n.

    use: (n,) bool. Rows where it is false, and rows that hold NaN or infinity, are left out.

    >>> a, b = jnp.arange(6.0).reshape(3, 2), jnp.arange(20.0).reshape(10, 2)
    >>> rows = Moments(jnp.array([3.0, 10.0]), jnp.stack([a.mean(0), b.mean(0)]), jnp.stack([a.var(0), b.var(0)]))
    >>> both = merge(empty((2,)), rows)
    >>> float(both.count), bool(jnp.allclose(both.var, jnp.concatenate([a, b]).var(0)))
    (13.0, True)
    """
    each = lambda leaf: jnp.isfinite(leaf).reshape(len(rows.count), -1).all(1)
    use = use & each(rows.mean) & each(rows.var)
    column = lambda x: x.reshape(-1, *(1,) * moments.mean.ndim)
    counts = jnp.where(use, rows.count, 0)
    total = moments.count + counts.sum()
    old = moments.count / jnp.maximum(total, 1)
    weights = column(counts / jnp.maximum(total, 1))  # with `old` they sum to 1
    delta = jnp.where(column(use), rows.mean - moments.mean, 0)  # from the running mean: nothing large cancels
    shift = (weights * delta).sum(0)
    within = jnp.where(column(use), rows.var, 0)
    var = old * (moments.var + shift**2) + (weights * (within + (delta - shift) ** 2)).sum(0)
    return Moments(jnp.minimum(total, MAX_COUNT), moments.mean + shift, jnp.where(total > 0, var, moments.var))


def normalize(moments: Moments, observation: Array, *, clip: float = 10.0, epsilon: float = 1e-8) -> Array:
    """The observation in running standard deviations from the running mean, clipped to ±clip."""
    return jnp.clip((observation - moments.mean) * jax.lax.rsqrt(moments.var + epsilon), -clip, clip)
