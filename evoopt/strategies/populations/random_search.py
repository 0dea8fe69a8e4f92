"""Random search: independent candidates, of which the best is kept. The baseline for every other strategy.

Source: Brooks, "A discussion of random methods for seeking maxima", Operations Research 6 (1958).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import answered, as_values, best_place, settle, told
from evoopt.checks import check_popsize
from evoopt.population import Population
from evoopt.strategies.populations import variation
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree, static


class State(NamedTuple):
    """The state of random search."""

    center: Array  # (d,), the start
    best: Array  # (d,), the best candidate so far
    best_value: Array  # ()
    generation: Array  # () int32
    unravel: trees.Unravel
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class RandomSearch:
    """Independent candidates; see `random_search`."""

    popsize: int = static()
    spread: float
    lower: Any
    upper: Any
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 1)

    def init(self, params: Params, key: Key) -> State:
        x, unravel = variation.scattered(params, key, 1, self.spread, self.lower, self.upper)
        zero = jnp.zeros((), jnp.int32)
        return State(x[0], x[0], variation.unknown(1)[0], zero, unravel, zero)

    def ask(self, state: State, key: Key) -> Population:
        key = noises.replayable(key)
        box = variation.box(self.lower, self.upper, state.unravel)
        x = variation.drawn(box, key, self.popsize, state.center, self.spread)
        return Population(state.unravel, x.at[0].set(jnp.where(state.generation == 0, state.center, x[0])))

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        new = values.astype(state.best_value.dtype)
        i = best_place(new)
        better = answered(new[i]) & (new[i] < state.best_value)
        best = jnp.where(better, population.genomes[i], state.best)
        best_value = jnp.where(better, new[i], state.best_value)
        return settle(
            state,
            State(state.center, best, best_value, state.generation + 1, state.unravel, state.unanswered),
            values,
        )

    def moved(self, state: State, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        return variation.moved(population, points, variation.box(self.lower, self.upper, state.unravel))

    def recommend(self, state: State) -> Params:
        return state.unravel(state.best)


def random_search(popsize: int = 64, *, spread: float = 1.0, lower: Any = None, upper: Any = None) -> RandomSearch:
    """Random search (Brooks 1958). The first candidate is the start itself.

    Args:
        popsize: candidates per generation.
        spread: standard deviation of the candidates around the start, where there is no box.
        lower, upper: bounds to sample uniformly between: numbers, or trees like the parameters.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> result = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), random_search(64), generations=50)
    >>> result.best_value < 0.1
    True
    """
    return RandomSearch(popsize, spread, lower, upper)
