"""Hyperparameters that change with the generation, such as a decaying learning rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt.checks import check_strategy
from evoopt.population import Population
from evoopt.types import Array, Key, Params, error, pytree, static

Schedule = Callable[[Array], Array]  # generations told, () int32 -> a number


class State(NamedTuple):
    """The inner state, and the place in the schedule."""

    inner: Any
    steps: Array  # () int32, generations told

    @property
    def unanswered(self) -> Array:
        return self.inner.unanswered


@pytree
class Scheduled:
    """A strategy with hyperparameters that depend on the generation; see `scheduled`."""

    strategy: Any
    schedules: tuple[tuple[str, Schedule], ...] = static()

    def oracle(self, objective: Any) -> Any:
        return self.strategy.oracle(objective)

    def at(self, steps: Array) -> Any:
        """The strategy after `steps` generations."""
        with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix integers and floats
            values = {name: jnp.asarray(f(steps), jnp.float32) for name, f in self.schedules}
        return dataclasses.replace(self.strategy, **values)

    def init(self, params: Params, key: Key) -> State:
        return State(self.strategy.init(params, key), jnp.zeros((), jnp.int32))

    def ask(self, state: State, key: Key) -> Population:
        return self.at(state.steps).ask(state.inner, key)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        inner = self.at(state.steps).tell(state.inner, population, answers)
        some = inner.unanswered == state.unanswered  # an unanswered generation is not counted
        return State(inner, state.steps + some.astype(jnp.int32))

    @property
    def moved(self) -> Any:
        moved = self.strategy.moved  # an AttributeError where the strategy has none
        del moved
        return lambda state, *given: self.at(state.steps).moved(state.inner, *given)

    @property
    def dispersion(self) -> Any:
        dispersion = self.strategy.dispersion  # an AttributeError where the strategy has none
        del dispersion
        return lambda state, i: self.at(state.steps).dispersion(state.inner, i)

    def recommend(self, state: State) -> Params:
        return self.at(state.steps).recommend(state.inner)


def scheduled(strategy: Any, **schedules: Schedule) -> Scheduled:
    """`strategy` with fields that are functions of the generations told so far.

    Args:
        strategy: any strategy; the scheduled fields must be numbers, not sizes.
        schedules: a schedule per field, such as `learning_rate=optax.cosine_decay_schedule(1e-3, 2000)`.

    Raises:
        ValueError: for a field that the strategy lacks, or one that is a size.

    >>> import optax
    >>> from evoopt import minimize
    >>> from evoopt.strategies import mezo
    >>> strategy = scheduled(mezo(), learning_rate=optax.cosine_decay_schedule(0.05, 400))
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), strategy, generations=400)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 1e-2)
    True
    """
    check_strategy(strategy)
    numbers = [f.name for f in dataclasses.fields(strategy) if not f.metadata.get("static")]
    for name in schedules:
        if name not in numbers:
            cause = "a misspelt name, a size (which cannot change), or a wrapper around the strategy that has the field"
            raise error(f"fields of {type(strategy).__name__}: {', '.join(numbers)}", repr(name), cause)
    return Scheduled(strategy, tuple(schedules.items()))
