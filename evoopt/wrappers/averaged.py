"""Recommend the mean of the last recommendations: the middle of a noisy search is better than where it ends."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import trees
from evoopt.checks import check_popsize, check_strategy
from evoopt.population import Population
from evoopt.types import Array, Key, Params, pytree


class State(NamedTuple):
    """The inner state, and the mean."""

    inner: Any
    mean: Params  # mean of the recommendations so far, at least float32
    steps: Array  # () int32, generations told

    @property
    def unanswered(self) -> Array:
        return self.inner.unanswered


@pytree
class Averaged:
    """A strategy that recommends its average position; see `averaged`."""

    strategy: Any
    window: float

    def oracle(self, objective: Any) -> Any:
        return self.strategy.oracle(objective)

    def init(self, params: Params, key: Key) -> State:
        wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = jax.tree.map(wide, trees.searchable(params))
        return State(self.strategy.init(params, key), mean, jnp.zeros((), jnp.int32))

    def ask(self, state: State, key: Key) -> Population:
        return self.strategy.ask(state.inner, key)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        inner = self.strategy.tell(state.inner, population, answers)
        some = inner.unanswered == state.unanswered  # an unanswered generation is not averaged
        steps = state.steps + some.astype(jnp.int32)
        # A plain mean over the first `window` generations, an exponential one afterwards.
        share = jnp.where(some, 1 / jnp.clip(steps.astype(jnp.float32), 1, self.window), 0)
        moved = lambda old, x: old + share.astype(old.dtype) * (x.astype(old.dtype) - old)
        return State(inner, jax.tree.map(moved, state.mean, self.strategy.recommend(inner)), steps)

    @property
    def moved(self) -> Any:
        moved = self.strategy.moved  # an AttributeError where the strategy has none
        return lambda state, population, points: moved(state.inner, population, points)

    @property
    def dispersion(self) -> Any:
        dispersion = self.strategy.dispersion  # an AttributeError where the strategy has none
        return lambda state, i: dispersion(state.inner, i)

    def recommend(self, state: State) -> Params:
        return jax.tree.map(lambda m, x: m.astype(x.dtype), state.mean, self.strategy.recommend(state.inner))


def averaged(strategy: Any, window: int = 100) -> Averaged:
    """`strategy`, recommending the mean of its recommendations over about the last `window` generations.

    The search itself is unchanged. With a constant learning rate it ends in a cloud around the optimum, and this is the
    cloud's middle (Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control 1992).
    Costs one more copy of the parameters.

    >>> from evoopt import minimize
    >>> from evoopt.strategies import mezo
    >>> strategy = averaged(mezo(learning_rate=0.05))
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), strategy, generations=600)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 1e-2)
    True
    """
    check_popsize(window, 1, name="window")
    check_strategy(strategy)
    return Averaged(strategy, float(window))
