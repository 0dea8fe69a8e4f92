"""Shared by the covariance strategies: recombination weights by rank, correlated steps, and what keeps floats sound.

Weights are per candidate, not per rank: only n floats are sorted. m counts the answered candidates and is an array, so
a population that answered (or was active) only in part is weighted as a population of that size.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import answered, settle
from evoopt.shaping import rank
from evoopt.strategies.populations import variation
from evoopt.types import Array, Key, Params, pytree
from evoopt.when import when as when  # so that strategies find it with the rest


class Weights(NamedTuple):
    """The weights of n candidates, in the candidates' order."""

    positive: Array  # (n,), of the better half, sum to 1
    negative: Array  # (n,), >= 0, of the worse half, sum to 1 (0 where m < 2)
    mu_eff: Array  # (), 1 / sum positive^2
    mu_eff_minus: Array  # (), 1 / sum negative^2, 0 if no weight is negative
    rank: Array  # (n,) int32, 0 for the best; unanswered candidates come last
    m: Array  # (), answered candidates, at least 1


def logarithmic(values: Array, dtype: Any) -> Weights:
    """ln((m + 1) / 2) - ln(i) for the i-th best of m: Hansen, arXiv 1604.00772, equation (49).

    >>> w = logarithmic(jnp.array([3.0, 1.0, 2.0, jnp.nan, 4.0]), jnp.float32)
    >>> print((100 * w.positive).round(), (100 * w.negative).round(), w.m)
    [ 0. 80. 20.  0.  0.] [28.  0.  0.  0. 72.] 4.0
    """
    place = rank(values)
    ok = answered(values)
    m = jnp.maximum(ok.sum(), 1).astype(dtype)
    raw = jnp.log((m + 1) / 2) - jnp.log(place.astype(dtype) + 1)
    raw = jnp.where(ok, jnp.where(m > 1, raw, 1), 0)
    positive, negative = (part / jnp.maximum(part.sum(), 1e-30) for part in (jnp.maximum(raw, 0), jnp.maximum(-raw, 0)))
    inverse = lambda w: jnp.where(w.any(), 1 / jnp.maximum((w * w).sum(), 1e-30), 0)
    return Weights(positive, negative, inverse(positive), inverse(negative), place, m)


def flattened(params: Params) -> tuple[Array, Any]:
    """The parameters as a vector (d,) of at least float32, and the way back."""
    leaves, treedef = jax.tree.flatten(trees.searchable(params))
    wide = jnp.float64 if any(x.dtype.itemsize > 4 for x in leaves) else jnp.float32
    unravel = trees.Unravel(treedef, tuple(x.shape for x in leaves), tuple(x.dtype for x in leaves))
    return jnp.concatenate([x.astype(wide).reshape(-1) for x in leaves]), unravel


def standard_normals(key: Key, n: int, d: int, dtype: Any) -> Array:
    """Standard normals in n rows, (n, d); the first rows do not depend on n."""
    return variation.gaussians(noises.replayable(key), (n, d), dtype)


def keep(old: Any, new: Any, values: Array) -> Any:
    """`settle`, or `old` if a number of `new` was lost to overflow: a search that diverged stays where it was."""
    leaves = [x for x in jax.tree.leaves(new) if jnp.issubdtype(x.dtype, jnp.inexact)]
    sound = jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()
    return settle(old, trees.where(sound, new, old), values)


def representable(sigma: Array) -> Array:
    """Sigma within the range of floats, so that a converged search neither reaches 0 nor overflows."""
    limits = jnp.finfo(sigma.dtype)
    return jnp.clip(sigma, limits.tiny * 2.0**20, limits.max * 2.0**-40)


class Step(NamedTuple):
    """A genome of a correlated Gaussian; with a leading axis, several."""

    z: Array  # (d,), standard normal
    y: Array  # (d,), z through the distribution's axes


@pytree
class Stepped:
    """decode: a `Step` -> mean + sigma y. Elementwise, so its bits do not depend on what is decoded beside it."""

    mean: Array
    sigma: Array
    unravel: Any

    def __call__(self, genome: Step) -> Params:
        return self.unravel(self.mean + self.sigma * genome.y)


def expected_norm(d: int) -> float:
    """E||N(0, I)|| in d dimensions: sqrt(2) Gamma((d + 1) / 2) / Gamma(d / 2)."""
    return math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))


def default_popsize(d: int) -> int:
    """4 + floor(3 ln d): Hansen, arXiv 1604.00772, equation (48)."""
    return 4 + int(3 * math.log(d))
