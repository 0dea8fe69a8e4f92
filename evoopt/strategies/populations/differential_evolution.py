"""Differential evolution: steps are differences of population members, and one trial competes with each parent.

Source: Storn, Price, "Differential evolution - a simple and efficient heuristic for global optimization over
continuous spaces", J. Global Optimization 11 (1997); the variants' names and exponential crossover as in Price, Storn,
Lampinen, "Differential Evolution", Springer 2005. Repair of bounds: Zhang, Sanderson, "JADE", IEEE TEVC 13 (2009).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import answered, as_values, settle, told
from evoopt.checks import check_popsize
from evoopt.population import Population
from evoopt.strategies.populations import variation
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree, static

Mutation = Callable[[Array, Array, tuple[Array, Array, Array], Array], Array]


def rand_1(x: Array, best: Array, r: tuple[Array, Array, Array], weight: Array) -> Array:
    """DE/rand/1: v = x_r1 + F (x_r2 - x_r3)."""
    del best
    return x[r[0]] + weight * (x[r[1]] - x[r[2]])


def best_1(x: Array, best: Array, r: tuple[Array, Array, Array], weight: Array) -> Array:
    """DE/best/1: v = x_best + F (x_r1 - x_r2)."""
    return best + weight * (x[r[0]] - x[r[1]])


def current_to_best_1(x: Array, best: Array, r: tuple[Array, Array, Array], weight: Array) -> Array:
    """DE/current-to-best/1: v = x + F (x_best - x) + F (x_r1 - x_r2)."""
    return x + weight * (best - x) + weight * (x[r[0]] - x[r[1]])


class State(NamedTuple):
    """The state of differential evolution."""

    x: Array  # (n, d), the parents
    values: Array  # (n,), of the parents; +inf until they are answered
    generation: Array  # () int32
    unravel: trees.Unravel
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class DifferentialEvolution:
    """Classic differential evolution; see `differential_evolution`."""

    popsize: int = static()
    weight: float  # F
    crossover_rate: float  # CR
    mutation: Mutation = static()
    crossover: variation.Crossover = static()
    spread: float
    lower: Any
    upper: Any
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 4)  # a parent and three others, all distinct

    def init(self, params: Params, key: Key) -> State:
        x, unravel = variation.scattered(params, key, self.popsize, self.spread, self.lower, self.upper)
        zero = jnp.zeros((), jnp.int32)
        return State(x, variation.unknown(self.popsize), zero, unravel, zero)

    def ask(self, state: State, key: Key) -> Population:
        keys = jax.random.split(noises.replayable(key), 4)
        x, (n, d) = state.x, state.x.shape
        places = [jnp.arange(n, dtype=jnp.int32)]
        for k in keys[:3]:
            places.append(variation.distinct(k, n, places))
        best = x[jnp.argmin(state.values)]
        mutant = self.mutation(x, best, (places[1], places[2], places[3]), jnp.asarray(self.weight, x.dtype))
        rate = jnp.full(n, self.crossover_rate, x.dtype)
        trial = jnp.where(self.crossover(keys[3], rate, d), mutant, x)
        trial = variation.midpoint(trial, x, variation.box(self.lower, self.upper, state.unravel))
        # The first generation evaluates the parents themselves.
        return Population(state.unravel, jnp.where(state.generation == 0, x, trial))

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        new = values.astype(state.values.dtype)
        won = answered(new) & (new <= state.values)  # a tie counts as a win, so plateaus are crossed by drifting
        x = jnp.where(won[:, None], population.genomes, state.x)
        new = jnp.where(won, new, state.values)
        return settle(state, State(x, new, state.generation + 1, state.unravel, state.unanswered), values)

    def moved(self, state: State, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        return variation.moved(population, points, variation.box(self.lower, self.upper, state.unravel))

    def recommend(self, state: State) -> Params:
        return state.unravel(state.x[jnp.argmin(state.values)])


def differential_evolution(
    popsize: int = 64,
    *,
    weight: float = 0.5,
    crossover_rate: float = 0.9,
    mutation: Mutation = rand_1,
    crossover: variation.Crossover = variation.binomial,
    spread: float = 1.0,
    lower: Any = None,
    upper: Any = None,
) -> DifferentialEvolution:
    """Differential evolution (Storn and Price 1997), DE/rand/1/bin by default.

    Args:
        popsize: candidates per generation, at least 4; the paper uses 5 to 10 times the dimension.
        weight: F, the factor of the differences.
        crossover_rate: CR, the share of coordinates that come from the mutant.
        mutation: `rand_1`, `best_1`, `current_to_best_1`, or a function (x, best, (r1, r2, r3), F) -> mutants.
        crossover: `variation.binomial`, `variation.exponential`, or a function (key, rates, d) -> mask.
        spread: standard deviation of the first population around the start, where there is no box.
        lower, upper: bounds: numbers, or trees like the parameters. The first population is uniform between them.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> result = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), differential_evolution(32), generations=150)
    >>> result.best_value < 1e-6
    True
    """
    return DifferentialEvolution(popsize, weight, crossover_rate, mutation, crossover, spread, lower, upper)
