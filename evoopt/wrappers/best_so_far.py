"""Recommend the best candidate seen, not the strategy's own choice: for objectives without noise."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import trees
from evoopt.answers import answered, as_values, best_place, told
from evoopt.checks import check_strategy
from evoopt.population import Population
from evoopt.types import Array, Key, Params, pytree


class State(NamedTuple):
    """The inner state, and the best candidate."""

    inner: Any
    best: Params
    value: Array  # (), +inf before the first answer

    @property
    def unanswered(self) -> Array:
        return self.inner.unanswered


@pytree
class BestSoFar:
    """A strategy that remembers its best candidate; see `best_so_far`."""

    strategy: Any

    def oracle(self, objective: Any) -> Any:
        return self.strategy.oracle(objective)

    def init(self, params: Params, key: Key) -> State:
        return State(
            self.strategy.init(params, key), trees.searchable(params), jnp.full((), jnp.inf, jnp.result_type(float))
        )

    def ask(self, state: State, key: Key) -> Population:
        return self.strategy.ask(state.inner, key)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        answers = told(population, answers)
        inner = self.strategy.tell(state.inner, population, answers)
        values = as_values(answers)
        i = best_place(values)
        value = values[i].astype(state.value.dtype)
        better = answered(value) & (value < state.value)
        candidate = population.decode(jax.tree.map(lambda g: g[i], population.genomes))
        return State(inner, trees.where(better, candidate, state.best), jnp.where(better, value, state.value))

    @property
    def moved(self) -> Any:
        moved = self.strategy.moved  # an AttributeError where the strategy has none
        return lambda state, population, points: moved(state.inner, population, points)

    @property
    def dispersion(self) -> Any:
        dispersion = self.strategy.dispersion  # an AttributeError where the strategy has none
        return lambda state, i: dispersion(state.inner, i)

    def recommend(self, state: State) -> Params:
        return state.best


def best_so_far(strategy: Any) -> BestSoFar:
    """`strategy`, recommending the best candidate seen so far (x0 until there is one).

    >>> from evoopt import minimize
    >>> from evoopt.strategies import snes
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), best_so_far(snes(16)), generations=50)
    >>> bool((result.recommended == result.best).all())
    True
    """
    check_strategy(strategy)
    return BestSoFar(strategy)
