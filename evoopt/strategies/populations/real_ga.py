"""The real-coded genetic algorithm: simulated binary crossover, polynomial mutation, elitism.

Source: Deb, Agrawal, "Simulated binary crossover for continuous search space", Complex Systems 9 (1995), equations (4)
to (10); Deb, Goyal, "A combined genetic adaptive search (GeneAS) for engineering design", 1996 (polynomial mutation).

Deviation: crossover and mutation ignore the bounds; a child outside moves to the middle of its parent and the bound.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import as_values, settle, told
from evoopt.checks import check_popsize
from evoopt.population import Population
from evoopt.strategies.populations import variation
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, error, pytree, static

Selection = Callable[[Key, int, int], Array]  # key, n, count -> places of `count` parents among n rows, best first


@functools.cache
def tournament(size: int = 2) -> Selection:
    """The best of `size` drawn with replacement. Rows are best first, so the lowest index wins."""
    return lambda key, n, count: variation.integers(key, (size, count), n).min(axis=0)


@functools.cache
def truncation(share: float = 0.5) -> Selection:
    """One of the best `share` of the population."""
    return lambda key, n, count: variation.integers(key, (count,), max(1, round(share * n)))


class State(NamedTuple):
    """The state of the genetic algorithm."""

    x: Array  # (n, d), best first
    values: Array  # (n,); +inf until they are answered
    generation: Array  # () int32
    unravel: trees.Unravel
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class RealGA:
    """Genetic algorithm on real vectors; see `real_ga`."""

    popsize: int = static()
    elites: int = static()
    selection: Selection = static()
    crossover_rate: float
    crossover_index: float  # eta_c
    mutation_rate: float | None
    mutation_index: float  # eta_m
    spread: float
    lower: Any
    upper: Any
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 2)
        if self.popsize % 2:
            raise error("an even popsize", str(self.popsize), "two parents have two children")
        if not 0 <= self.elites < self.popsize:
            got = f"elites={self.elites}, popsize={self.popsize}"
            raise error("0 <= elites < popsize", got, "a small popsize with the default number of elites")

    def init(self, params: Params, key: Key) -> State:
        x, unravel = variation.scattered(params, key, self.popsize, self.spread, self.lower, self.upper)
        zero = jnp.zeros((), jnp.int32)
        return State(x, variation.unknown(self.popsize), zero, unravel, zero)

    def ask(self, state: State, key: Key) -> Population:
        keys = jax.random.split(noises.replayable(key), 4)
        x, (n, d) = state.x, state.x.shape
        real = x.dtype  # at least float32
        first, second = x[self.selection(keys[0], n, n)].reshape(2, n // 2, d)
        mixed = variation.uniforms(keys[1], (n // 2, 1), real) < jnp.asarray(self.crossover_rate, real)
        share = noises.stored(lambda: self._shares(keys[2], (n // 2, d), real))
        half = jnp.where(mixed, share, 0).astype(x.dtype) * (second - first)
        parents = jnp.concatenate([first, second])
        child = jnp.concatenate([first + half, second - half])
        delta = noises.stored(lambda: self._mutations(keys[3], (n, d), real)).astype(x.dtype)
        box = variation.box(self.lower, self.upper, state.unravel)
        # Without bounds, the range that holds nearly all of the first population.
        span = 6 * jnp.asarray(self.spread, x.dtype)
        span = span if box is None else jnp.where(jnp.isinf(box[0]), span, box[1] - box[0])
        child = variation.midpoint(child + delta * span, parents, box)
        return Population(state.unravel, jnp.where(state.generation == 0, x, child))

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        new = values.astype(state.values.dtype)
        place, kept = variation.survivors(new, state.values, self.elites, self.popsize)
        x = jnp.concatenate([population.genomes, state.x])[place]
        return settle(state, State(x, kept, state.generation + 1, state.unravel, state.unanswered), values)

    def moved(self, state: State, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        return variation.moved(population, points, variation.box(self.lower, self.upper, state.unravel))

    def recommend(self, state: State) -> Params:
        return state.unravel(state.x[0])

    def _shares(self, key: Key, shape: tuple[int, ...], real: Any) -> Array:
        """Crossover: (1 - beta) / 2, how far children move towards the other parent; 0 with probability one half.

        beta spreads children around their parents as one-point crossover of binary strings does.
        """
        u, coin = variation.uniform_pairs(key, shape, real)
        base = jnp.where(u <= 0.5, 2 * u, 1 / (2 * (1 - u)))
        beta = _power(base, 1 / (jnp.asarray(self.crossover_index, real) + 1))
        return jnp.where(coin < 0.5, (1 - beta) / 2, 0)

    def _mutations(self, key: Key, shape: tuple[int, ...], real: Any) -> Array:
        """Mutation: delta in units of the span, 0 for coordinates that do not mutate."""
        u, coin = variation.uniform_pairs(key, shape, real)
        delta = _power(jnp.where(u < 0.5, 2 * u, 2 * (1 - u)), 1 / (jnp.asarray(self.mutation_index, real) + 1)) - 1
        rate = 1 / shape[1] if self.mutation_rate is None else jnp.asarray(self.mutation_rate, real)
        return jnp.where(coin < rate, jnp.where(u < 0.5, delta, -delta), 0)


def _power(x: Array, p: Array) -> Array:
    """x**p for x >= 0 and p > 0, by functions that XLA vectorizes; `pow` takes one number at a time."""
    return jnp.exp(p * jnp.log(x))


def real_ga(
    popsize: int = 100,
    *,
    elites: int = 1,
    selection: Selection | None = None,
    crossover_rate: float = 0.9,
    crossover_index: float = 15.0,
    mutation_rate: float | None = None,
    mutation_index: float = 20.0,
    spread: float = 1.0,
    lower: Any = None,
    upper: Any = None,
) -> RealGA:
    """A genetic algorithm on real vectors with SBX and polynomial mutation (Deb and Agrawal 1995).

    Args:
        popsize: candidates per generation, even.
        elites: how many of the old population compete with the children; popsize - 1 is (mu + lambda).
        selection: `tournament(size)`, of two by default, `truncation(share)`, or (key, n, count) -> places.
        crossover_rate: probability that a pair mixes; each coordinate then mixes with probability one half.
        crossover_index: eta_c; the larger it is, the closer children are to their parents.
        mutation_rate: probability that a coordinate mutates; 1 / d by default.
        mutation_index: eta_m; the larger it is, the smaller mutations are.
        spread: standard deviation of the first population around the start, where there is no box.
        lower, upper: bounds: numbers, or trees like the parameters. The first population is uniform between them.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> result = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), real_ga(50), generations=150)
    >>> result.best_value < 1e-2
    True
    """
    selection = tournament() if selection is None else selection
    return RealGA(
        popsize,
        elites,
        selection,
        crossover_rate,
        crossover_index,
        mutation_rate,
        mutation_index,
        spread,
        lower,
        upper,
    )
