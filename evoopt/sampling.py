"""Candidates around a mean: which directions, on which side, stored or drawn again.

A Gaussian search distribution asks at mean + sigma * sign * z. What differs from candidate to candidate is (z, sign).
Stored genomes hold the rows sign * z: drawn once, n times the memory of the parameters. Regenerated genomes hold the
address of z and the sign: drawn again in `decode` and in `tell`, a few integers a candidate. Same noise either way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import noise as noises
from evoopt import trees
from evoopt.types import Array, Key, Params, pytree, static
from evoopt.utilities import Utility, answered

STORED_BYTES = 1 << 30  # above this much noise a generation, it is drawn again instead of stored


@pytree
class Scheme:
    """How n candidates sit on their directions, and what their values weigh together."""

    layout: Callable[[int], tuple[np.ndarray, np.ndarray]] = static()  # n -> (direction of candidate (n,), sign (n,))
    weigh: Callable[[Array, Utility], Array] = static()  # values (n,), utility -> weights (n,)
    even: bool = static(default=False)  # candidates come in pairs


def _pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(np.arange(n // 2), 2), np.tile([1.0, -1.0], n // 2)


def _both_or_none(values: Array, utility: Utility) -> Array:
    # A partner that was lost silences its pair: half a difference is not an estimate of the slope.
    both = answered(values).reshape(-1, 2).all(axis=1)
    return utility(jnp.where(jnp.repeat(both, 2), values, jnp.nan))


def _singles(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(n), np.ones(n)


def _from_center(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.maximum(np.arange(n) - 1, 0), np.r_[0.0, np.ones(n - 1)]


def _less_center(values: Array, utility: Utility) -> Array:
    ok = answered(values) & answered(values[0])
    weights = utility(jnp.where(ok, values, jnp.nan))
    return jnp.where(ok, weights - weights[0], 0)


antithetic = Scheme(_pairs, _both_or_none, even=True)
"""Candidates 2i and 2i + 1 at +z_i and -z_i: odd terms of the objective cancel."""

one_sided = Scheme(_singles, lambda values, utility: utility(values))
"""Every candidate its own direction: for utilities that sum to 0."""

forward = Scheme(_from_center, _less_center)
"""Candidate 0 at the mean itself, the others at +z: forward differences."""


@pytree
class Row:
    """The genome of a stored direction."""

    z: Params  # sign * z, each leaf (n, ...)


@pytree
class Address:
    """The genome of a direction that is drawn again."""

    address: Any  # of the noise, every leaf with leading axis n
    sign: Array  # (n,) float32


def sample(
    noise: Any, scheme: Scheme, key: Key, n: int, like: Params, regenerate: bool | None = None
) -> Row | Address:
    """The genomes of n candidates. `regenerate=None` stores the noise where it takes at most a gigabyte."""
    place, sign = scheme.layout(n)
    count = int(place[-1]) + 1
    if regenerate is None:
        regenerate = 4 * n * trees.size(like) > STORED_BYTES
    if not regenerate:
        rows = noise.rows(key, count, like)
        return Row(jax.tree.map(lambda r: _signed(r, place, sign), rows))
    addresses = noise.addresses(key, count)
    return Address(jax.tree.map(lambda a: a[place], addresses), jnp.asarray(sign, jnp.float32))


def _signed(rows: Array, place: np.ndarray, sign: np.ndarray) -> Array:
    if len(place) == rows.shape[0] and (sign == 1).all():
        return rows
    if len(place) == 2 * rows.shape[0]:  # pairs: an interleaved copy, cheaper than a gather
        return jnp.stack([rows, -rows], axis=1).reshape(len(place), *rows.shape[1:])
    return rows[place] * jnp.asarray(sign, rows.dtype).reshape(-1, *(1,) * (rows.ndim - 1))


def direction(noise: Any, like: Params, genome: Row | Address) -> Params:
    """sign * z of one candidate."""
    if isinstance(genome, Row):
        return genome.z
    return jax.tree.map(lambda z: genome.sign.astype(z.dtype) * z, noise.draw(genome.address, like))


@pytree
class Perturbed:
    """decode: genome -> mean + sigma * sign * z. `sigma` is a number, or a tree like the mean."""

    mean: Params
    sigma: Any
    noise: Any = static()

    def __call__(self, genome: Row | Address) -> Params:
        z = direction(self.noise, self.mean, genome)
        sigma = trees.like(self.sigma, self.mean)
        return jax.tree.map(lambda m, s, z: m + jnp.asarray(s, z.dtype) * z, self.mean, sigma, z)


def first_moment(noise: Any, scheme: Scheme, genomes: Row | Address, weights: Array, like: Params) -> Params:
    """sum_i weights_i sign_i z_i."""
    if isinstance(genomes, Row):
        return noises.weighted_rows(genomes.z, weights)
    addresses, signed, _ = _by_direction(scheme, genomes, weights)
    return noises.weighted_sum(noise, addresses, signed, like)


def moments(noise: Any, scheme: Scheme, genomes: Row | Address, w1: Array, w2: Array, like: Params) -> tuple[Any, Any]:
    """sum_i w1_i sign_i z_i and sum_i w2_i (z_i^2 - 1), in one pass over the noise."""
    minus = lambda z: jax.tree.map(lambda x: x * x - 1, z)
    if isinstance(genomes, Row):
        return noises.weighted_rows(genomes.z, w1), noises.weighted_rows(minus(genomes.z), w2)
    addresses, signed, _ = _by_direction(scheme, genomes, w1)
    _, _, plain = _by_direction(scheme, genomes, w2)
    return noises.weighted_sum(noise, addresses, (signed, plain), like, of=lambda z: (z, minus(z)))


def _by_direction(scheme: Scheme, genomes: Address, weights: Array) -> tuple[Any, Array, Array]:
    """A direction's address once, with the sums of its candidates' weights: with their signs, and without."""
    place, _ = scheme.layout(weights.shape[0])
    first = np.unique(place, return_index=True)[1]
    total = lambda w: jax.ops.segment_sum(w, place, len(first), indices_are_sorted=True)
    signed = total(weights * genomes.sign.astype(weights.dtype))
    return jax.tree.map(lambda a: a[first], genomes.address), signed, total(weights)
