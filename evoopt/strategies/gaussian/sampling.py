"""Candidates around a mean: their directions and sides, with noise stored or drawn again.

A Gaussian search distribution asks at mean + sigma * sign * z. A genome is (the address of z, sign). Stored directions
are drawn once and looked up, and each takes as much memory as the parameters. Regenerated ones are drawn again in
`decode` and in `tell`, and each candidate takes a few integers. The noise is the same either way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import injection, trees
from evoopt import noise as noises
from evoopt.answers import answered
from evoopt.population import Population
from evoopt.shaping import Utility
from evoopt.types import Array, Key, Params, pytree, static

STORED_BYTES = 1 << 30  # the most noise stored per generation; more is drawn again


@pytree
class Scheme:
    """How n candidates are placed on directions, and how their values are weighted."""

    layout: Callable[[int], tuple[np.ndarray, np.ndarray]] = static()  # n -> (direction of candidate (n,), sign (n,))
    weigh: Callable[[Array, Utility], Array] = static()  # values (n,), utility -> weights (n,)
    used: Callable[[Array], Array] = static()  # values (n,) -> the same, NaN where they measure no direction
    even: bool = static(default=False)  # candidates come in pairs


def _pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(np.arange(n // 2), 2), np.tile([1.0, -1.0], n // 2)


def _both_or_none(values: Array) -> Array:
    # A lost partner silences its pair: half a difference is no estimate of the slope.
    both = answered(values).reshape(-1, 2).all(axis=1)
    return jnp.where(jnp.repeat(both, 2), values, jnp.nan)


def _singles(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(n), np.ones(n)


def _from_center(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.maximum(np.arange(n) - 1, 0), np.r_[0.0, np.ones(n - 1)]


def _less_center(values: Array, utility: Utility) -> Array:
    ok = answered(values) & answered(values[0])
    weights = utility(jnp.where(ok, values, jnp.nan))
    return jnp.where(ok, weights - weights[0], 0)


def _beside_center(values: Array) -> Array:
    return jnp.where(answered(values[0]), values, jnp.nan).at[0].set(jnp.nan)


antithetic = Scheme(_pairs, lambda values, utility: utility(_both_or_none(values)), _both_or_none, even=True)
"""Candidates 2i and 2i + 1 at +z_i and -z_i: odd terms of the objective cancel."""

one_sided = Scheme(_singles, lambda values, utility: utility(values), lambda values: values)
"""Every candidate has its own direction: for utilities that sum to 0."""

forward = Scheme(_from_center, _less_center, _beside_center)
"""Candidate 0 at the mean itself, the others at +z: forward differences."""


@pytree
class Genome:
    """The direction a candidate lies along, and the side."""

    address: Any  # the place of a stored direction, () int32, or the noise's address of one that is drawn again
    sign: Array  # () float32


@pytree
class Perturbed:
    """decode: genome -> mean + sigma * sign * z.

    `rows` are the generation's stored directions, each leaf (directions, ...). They are kept here because the two
    candidates of a pair share one. None if directions are drawn again.
    """

    mean: Params
    sigma: Any  # a number, or a tree like the mean
    rows: Params | None
    noise: Any

    def direction(self, genome: Genome) -> Params:
        """sign * z."""
        z = direction(self.noise, self.rows, genome.address, self.mean)
        return jax.tree.map(lambda z: genome.sign.astype(z.dtype) * z, z)

    def __call__(self, genome: Genome) -> Params:
        sigma = trees.like(self.sigma, self.mean)
        return jax.tree.map(lambda m, s, z: m + jnp.asarray(s, z.dtype) * z, self.mean, sigma, self.direction(genome))

    def virtual(self, genome: Genome) -> Params:
        """The same candidate, with virtual leaves where directions are drawn again and it pays."""
        large = any(noises.is_large(x) for x in jax.tree.leaves(self.mean))
        if self.rows is not None or not large or not isinstance(self.noise, noises.Sliced):
            return self(genome)
        from evoopt.virtual import perturbed  # quax takes half a second to import

        sides = jax.tree.map(lambda s: s * genome.sign.astype(jnp.result_type(s)), self.sigma)
        return perturbed(self.mean, self.noise, genome.address, sides)


@pytree
class Moved:
    """decode: genome -> mean + genome, for perturbations stored flat, (d,)."""

    mean: Params

    def __call__(self, genome: Array) -> Params:
        _, unravel = trees.ravel(self.mean)
        return jax.tree.map(jnp.add, self.mean, unravel(genome))


def direction(noise: Any, rows: Params | None, address: Any, like: Params) -> Params:
    """The direction z of one address, looked up or drawn."""
    return noise.draw(address, like) if rows is None else jax.tree.map(lambda r: r[address], rows)


def sample(
    noise: Any, scheme: Scheme, key: Key, n: int, mean: Params, sigma: Any, regenerate: bool | None = None
) -> Population:
    """n candidates around `mean`. `regenerate=None` stores the noise if it takes at most a gigabyte."""
    place, sign = scheme.layout(n)
    count = int(place[-1]) + 1
    if regenerate is None:
        regenerate = 4 * count * trees.size(mean) > STORED_BYTES
    if regenerate:
        rows, addresses = None, jax.tree.map(lambda a: a[place], noise.addresses(key, count))
    else:
        rows, addresses = noise.rows(key, count, mean), jnp.asarray(place, jnp.int32)
    return Population(Perturbed(mean, sigma, rows, noise), Genome(addresses, jnp.asarray(sign, jnp.float32)))


def moved(population: Population, points: Params) -> Population:
    """`population` at `points`, where every candidate has its own direction; see `evoopt.injection`.

    The directions are stored from then on.
    """
    decode: Any = population.decode
    genomes, n = population.genomes, len(population)
    drawn = jax.vmap(decode.direction)(genomes)
    sigma = trees.like(decode.sigma, decode.mean)
    step = lambda p, m, s, z: ((p - m) / jnp.asarray(s, m.dtype)).astype(z.dtype)
    z = jax.tree.map(step, points, decode.mean, sigma, drawn)
    wide = lambda tree: injection.vectors(tree, jnp.result_type(float))
    factor = injection.shortening(wide(z), wide(drawn))[:, 0]
    stay = injection.same(population, points)

    def row(z: Array, own: Array) -> Array:
        column = lambda x: x.reshape(-1, *(1,) * (z.ndim - 1))
        return jnp.where(column(stay), own, z * column(factor).astype(z.dtype))

    rows = jax.tree.map(row, z, drawn)
    there = Genome(jnp.arange(n, dtype=jnp.int32), jnp.ones(n, jnp.float32))
    return population.with_genomes(there).with_decode(dataclasses.replace(decode, rows=rows))


def add_first_moment(
    scheme: Scheme, population: Population, weights: Array, mean: Params, *, scale: Any = 1.0, decay: Any = 0.0
) -> Params:
    """(1 - decay) mean + scale sum_i weights_i sign_i z_i, in place, for directions that are drawn again."""
    addresses, signed, _ = _by_direction(scheme, population, weights)
    scale = jnp.asarray(scale, signed.dtype)
    return noises.add_weighted(mean, population.decode.noise, addresses, scale * signed, decay=decay)


def first_moment(scheme: Scheme, population: Population, weights: Array) -> Params:
    """sum_i weights_i sign_i z_i."""
    addresses, signed, _ = _by_direction(scheme, population, weights)
    return _sum(population, addresses, signed, lambda z: z)


def moments(scheme: Scheme, population: Population, w1: Array, w2: Array) -> tuple[Any, Any]:
    """sum_i w1_i sign_i z_i and sum_i w2_i (z_i^2 - 1), in one pass over the noise."""
    addresses, signed, _ = _by_direction(scheme, population, w1)
    _, _, plain = _by_direction(scheme, population, w2)
    return _sum(population, addresses, (signed, plain), lambda z: (z, jax.tree.map(lambda x: x * x - 1, z)))


def _sum(population: Population, addresses: Any, weights: Any, of: Callable[[Params], Any]) -> Any:
    decode = population.decode
    # A running sum over one direction at a time: rows are read once, and nothing of their size is made.
    draw = (lambda row: row) if decode.rows is not None else (lambda a: decode.noise.draw(a, decode.mean))
    return noises.weighted_sum(draw, addresses if decode.rows is None else decode.rows, weights, decode.mean, of)


def _by_direction(scheme: Scheme, population: Population, weights: Array) -> tuple[Any, Array, Array]:
    """Each direction's address, and the sums of its candidates' weights with and without their signs."""
    place, sign = scheme.layout(weights.shape[0])
    first = np.unique(place, return_index=True)[1]
    if len(place) == 2 * len(first) and (place[::2] == place[1::2]).all():
        pair = lambda w: w[::2] + w[1::2]
    elif len(place) == len(first):
        pair = lambda w: w
    else:
        pair = lambda w: jax.ops.segment_sum(w, place, len(first), indices_are_sorted=True)
    addresses = jax.tree.map(lambda a: a[first], population.genomes.address)
    return addresses, pair(weights * jnp.asarray(sign, weights.dtype)), pair(weights)
