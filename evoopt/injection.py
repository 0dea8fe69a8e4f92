"""Points from elsewhere in a population: what strategies and wrappers share for their optional method `moved`.

`strategy.moved(state, population, points)` is `population` with its candidates replaced by `points`, a tree like the
parameters with leading axis n, as though they had been sampled: what `tell` then reads belongs to the new points.
Repaired candidates, those of another search, and late ones come in like this. A candidate that is already where its
point is keeps its genome, bit for bit.

Source: Hansen, "Injecting external solutions into CMA-ES", arXiv 1110.4181.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from evoopt import trees
from evoopt.population import Population
from evoopt.types import Array, Params


def vectors(points: Params, dtype: Any) -> Array:
    """Points (n, ...) as vectors, (n, d)."""
    return jax.vmap(trees.flatten)(points).astype(dtype)


def same(population: Population, points: Params) -> Array:
    """Which candidates are where their points are, bit for bit: (n,) bool."""
    n = len(population)
    equal = lambda x, p: (x == jnp.asarray(p).astype(x.dtype)).reshape(n, -1).all(axis=1)
    return jnp.stack(jax.tree.leaves(jax.tree.map(equal, population.decoded(), points))).all(axis=0)


def chosen(which: Array, a: Any, b: Any) -> Any:
    """Rows of `a` where `which` (n,) is True, of `b` elsewhere, leaf by leaf in the types of `a`."""
    row = lambda x: which.reshape(-1, *(1,) * (x.ndim - 1))
    return jax.tree.map(lambda x, y: jnp.where(row(x), x, y.astype(x.dtype)), a, b)


def placed(population: Population, points: Params, genomes: Any) -> Population:
    """`population` with the genomes of `points`; candidates that are there already keep theirs."""
    return population.with_genomes(chosen(same(population, points), population.genomes, genomes))


def through(
    moved: Callable[..., Population],
    state: Any,
    population: Population,
    points: Params,
    inverse: Callable[[Params], Any],
    name: str = "decode",
) -> Population:
    """`moved` of a wrapped strategy, whose candidates the wrapper decodes further.

    Args:
        moved, state: of the wrapped strategy.
        population: of the wrapper; the field `name` of its `decode` is the wrapped strategy's.
        points: of the wrapper.
        inverse: a point of the wrapper -> one of the wrapped strategy that decodes to it.
    """
    inner = population.with_decode(getattr(population.decode, name))
    # A candidate may have come from elsewhere than the inverse leads, from beyond a mirror for example.
    back = chosen(same(population, points), inner.decoded(), jax.vmap(inverse)(points))
    new = moved(state, inner, back)
    return new.with_decode(dataclasses.replace(population.decode, **{name: new.decode}))  # type: ignore[type-var]


def reach(d: int) -> float:
    """The longest step from elsewhere that is not shortened: c_y = sqrt(d) + 2 d / (d + 2); most samples are within.

    >>> round(reach(2), 3), round(reach(100), 3)
    (2.414, 11.961)
    """
    return math.sqrt(d) + 2 * d / (d + 2)


def norms(z: Array) -> Array:
    """Lengths of the rows of z (n, d): (n, 1), without overflow."""
    most = jnp.abs(z).max(axis=1, keepdims=True)
    scale = jnp.where(most > 0, most, 1)
    return most * jnp.sqrt(((z / scale) ** 2).sum(axis=1, keepdims=True))


def shortening(z: Array, drawn: Array) -> Array:
    """Factors min(1, c_y / ||z||) of steps z (n, d) in a standard normal's units: (n, 1).

    ||z|| is the Mahalanobis length ||C^(-1/2) (x - m) / sigma||, so a far point gives the direction, not the length.
    Deviation: c_y is at least as long as the step that was `drawn` in its place, so that no sample is shortened.
    """
    allowed = jnp.maximum(norms(drawn), reach(z.shape[1]))
    return jnp.minimum(1, allowed / jnp.maximum(norms(z), jnp.finfo(z.dtype).tiny))


def steps(
    points: Params, mean: Array, scale: Any, drawn: Array, whiten: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """The genomes of points in a Gaussian: z (n, d) of a standard normal, and y (n, d) with x = mean + scale y.

    Args:
        points: a tree with leading axis n.
        mean, scale: of the distribution, (d,) and () or (d,).
        drawn: (n, d), the z that these points replace.
        whiten: y -> z, (n, d).
    """
    y = (vectors(points, mean.dtype) - mean) / scale
    z = whiten(y)
    factor = shortening(z, drawn)
    return z * factor, y * factor
