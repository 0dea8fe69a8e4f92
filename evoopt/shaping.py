"""Fitness shaping: from a generation's values to the weights of its directions.

A utility maps values (n,) to weights (n,). Weights are ordered like values: the best candidate has the least weight,
and a strategy descends along sum_i weights_i z_i. NaN and -inf are no answers: their weight is 0, and the others are
shaped as if they were absent. +inf is the worst value, never an average: where a utility needs numbers, it counts as
the worst finite one. Tied candidates share their weights evenly.

Source of the forms: Salimans et al. 2017 (centered rank), Hansen, "The CMA evolution strategy: a tutorial" (log rank),
Wierstra et al. 2014 (NES utilities), Mania et al. 2018 (top-k).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp

from evoopt.answers import answered, count, finite
from evoopt.types import Array

Utility = Callable[[Array], Array]


def places(values: Array) -> tuple[Array, Array]:
    """(better, equal), each (n,): how many answers are better than this one, and how many equal it, itself included.

    Both are 0 without an answer. Up to n = 1024, one fused loop of O(n^2) comparisons is faster than a sort.
    """
    n, dtype = values.shape[0], values.dtype
    if n <= 1024:
        other = jnp.where(answered(values), values, jnp.nan)[None, :]  # NaN is neither better nor equal
        return (other < values[:, None]).sum(1).astype(dtype), (other == values[:, None]).sum(1).astype(dtype)
    ordered = jnp.sort(jnp.where(answered(values), values, jnp.nan))  # NaN sorts behind +inf
    better, upto = (jnp.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    ok = answered(values)
    return jnp.where(ok, better, 0).astype(dtype), jnp.where(ok, upto - better, 0).astype(dtype)


def rank(values: Array) -> Array:
    """The rank of every value, (n,) int32: 0 for the best, ties in the order of the candidates, no answer last."""
    order = jnp.argsort(jnp.where(answered(values), values, jnp.nan), stable=True)  # NaN sorts behind +inf
    return jnp.zeros(values.shape, jnp.int32).at[order].set(jnp.arange(values.shape[0], dtype=jnp.int32))


def ranked(values: Array, table: Callable[[Array, Array], Array]) -> Array:
    """Weights by rank: `table(rank, m)` for rank = 0 (best) to m - 1 of m answers; ties share, no answer gets 0."""
    better, equal = places(values)
    m = answered(values).sum().astype(values.dtype)
    # A tie gets the mean over its places, from sums; a place taken alone is read directly, because sums would round it.
    sums = jnp.cumsum(table(jnp.arange(values.shape[0], dtype=values.dtype), m))
    sums = jnp.concatenate([jnp.zeros(1, values.dtype), sums])
    first = better.astype(jnp.int32)
    shared = (sums[first + equal.astype(jnp.int32)] - sums[first]) / jnp.maximum(equal, 1)
    return jnp.where(answered(values), jnp.where(equal > 1, shared, table(better, m)), 0)


def centered_rank(values: Array) -> Array:
    """Ranks scaled to [-0.5, 0.5], the best at -0.5: sums to 0, insensitive to monotone transforms and outliers.

    >>> centered_rank(jnp.array([3.0, 1.0, jnp.nan, 2.0])).tolist()
    [0.5, -0.5, 0.0, 0.0]
    """
    better, equal = places(values)
    m = answered(values).sum().astype(values.dtype)
    rank = better + (equal - 1) / 2  # the middle of a tie
    return jnp.where(answered(values) & (m > 1), rank / jnp.maximum(m - 1, 1) - 0.5, 0)


def log_rank(values: Array) -> Array:
    """Minus the CMA-ES recombination weights: ln((m + 1) / 2) - ln(rank) for the better half, normalised to sum 1.

    >>> log_rank(jnp.array([1.0, 2.0, 3.0, 4.0])).round(1).tolist() == [-jnp.float32(0.8), -jnp.float32(0.2), 0.0, 0.0]
    True
    """
    return _log(values, lambda m: (m + 1) / 2)


def nes(values: Array) -> Array:
    """Minus the utilities of natural evolution strategies: max(0, ln(m/2 + 1) - ln(rank)), normalised, less 1/m.

    Equation: Wierstra et al. 2014, section 3.1 (fitness shaping). Sums to 0, so a constant changes nothing.
    """
    ok = answered(values)
    return _log(values, lambda m: m / 2 + 1) + jnp.where(ok, 1 / count(values), 0)


def _log(values: Array, head: Callable[[Array], Array]) -> Array:
    raw = ranked(values, lambda rank, m: jnp.maximum(0, jnp.log(head(m)) - jnp.log(rank + 1)))
    total = raw.sum()
    return -raw / jnp.where(total > 0, total, 1)


def z_score(values: Array) -> Array:
    """(value - mean) / standard deviation over the answers; 0 where all are equal."""
    # Shifted and scaled first: otherwise rounding makes equal values differ from their mean, and large ones overflow.
    ok, x = answered(values), normalised(values)
    centered = jnp.where(ok, x - x.sum() / count(values), 0)
    deviation = jnp.sqrt((centered**2).sum() / count(values))
    return centered / jnp.where(deviation > 0, deviation, 1)


def normalised(values: Array) -> Array:
    """Values scaled linearly to [-0.5, 0.5], the best at -0.5; 0 where all are equal."""
    ok, x = answered(values), finite(values) / 16  # so that a span cannot overflow nor its inverse vanish
    low = jnp.min(x, where=ok, initial=jnp.inf)
    span = jnp.max(x, where=ok, initial=-jnp.inf) - low
    return jnp.where(ok & (span > 0), (x - low) / jnp.where(span > 0, span, 1) - 0.5, 0)


def identity(values: Array) -> Array:
    """The values themselves, for plain finite differences; no answer weighs 0, +inf as much as the worst finite one."""
    return finite(values)


@functools.cache
def top_k(k: int, utility: Utility = identity) -> Utility:
    """Only the k best candidates count, shaped by `utility` among themselves; the others weigh 0.

    >>> top_k(2, centered_rank)(jnp.array([4.0, 1.0, 3.0, 2.0])).tolist()
    [0.0, -0.5, 0.0, 0.5]
    """

    def weights(values: Array) -> Array:
        return utility(jnp.where(rank(values) < k, values, jnp.nan))

    return weights
