"""Hill climbing: the best neighbour of a point replaces it if it is better.

Source: steepest-ascent and random-mutation hill climbing as in Forrest, Mitchell, "Relative building-block fitness and
the building-block hypothesis", FOGA 2 (1993), on real vectors: a neighbour is a normal step away. The step doubles
after a success and halves after a failure, because real vectors have no smallest step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import answered, as_values, best_place, settle, told
from evoopt.checks import check_popsize, check_sigma
from evoopt.population import Population
from evoopt.strategies.populations import variation
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, error, pytree, static


class State(NamedTuple):
    """The state of the climber."""

    x: Array  # (d,)
    value: Array  # (); +inf until it is answered
    sigma: Array  # ()
    unravel: trees.Unravel
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class HillClimbing:
    """The best of many neighbours; see `hill_climbing`."""

    popsize: int = static()
    sigma: float
    factor: float
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 1)
        if isinstance(self.factor, (int, float)) and self.factor < 1:
            raise error("a factor of at least 1", str(self.factor), "the inverse was given, the factor after failures")

    def init(self, params: Params, key: Key) -> State:
        del key
        check_sigma(self.sigma, "sigma")
        x, unravel = trees.ravel(trees.searchable(params))
        value = variation.unknown(1)[0]
        return State(x, value, jnp.asarray(self.sigma, x.dtype), unravel, jnp.zeros((), jnp.int32))  # type: ignore

    def ask(self, state: State, key: Key) -> Population:
        z = variation.gaussians(noises.replayable(key), (self.popsize, state.x.size), state.x.dtype)
        x = state.x + state.sigma * z
        # One candidate is the start itself until its value is known.
        return Population(state.unravel, x.at[0].set(jnp.where(jnp.isposinf(state.value), state.x, x[0])))

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        new = values.astype(state.value.dtype)
        i = best_place(new)
        better = answered(new[i]) & (new[i] < state.value)
        factor = jnp.asarray(self.factor, state.sigma.dtype)
        least = jnp.finfo(state.sigma.dtype).tiny
        sigma = jnp.maximum(jnp.where(better, state.sigma * factor, state.sigma / factor), least)
        x, value = jnp.where(better, population.genomes[i], state.x), jnp.where(better, new[i], state.value)
        return settle(state, State(x, value, sigma, state.unravel, state.unanswered), values)

    def moved(self, state: State, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        return variation.moved(population, points)

    def recommend(self, state: State) -> Params:
        return state.unravel(state.x)


def hill_climbing(popsize: int = 16, *, sigma: float = 0.1, factor: float = 2.0) -> HillClimbing:
    """Hill climbing on real vectors (Forrest and Mitchell 1993), `popsize` neighbours at a time.

    Args:
        popsize: neighbours per generation.
        sigma: initial standard deviation of a step, in units of the parameters.
        factor: multiplies sigma after a success and divides it after a failure; 1 keeps sigma.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> result = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), hill_climbing(), generations=200)
    >>> result.best_value < 1e-6
    True
    """
    return HillClimbing(popsize, sigma, factor)
