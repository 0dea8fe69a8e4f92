"""A portfolio: strategies in turn on one problem, each of which begins at the best point of those before it.

Sources: Loshchilov, Schoenauer, Sebag, "Bi-population CMA-ES algorithms with surrogate models and line searches", GECCO
2013 workshop (HCMA: NEWUOA and a line search first, then CMA-ES); LaTorre, Muelas, Peña, "A MOS-based dynamic memetic
differential evolution algorithm for continuous optimization", Soft Computing 15 (2011): techniques share a best point.

A phase ends when its evaluations are used up, when its strategy says by `ended(state)` that it can go no further, or
when too many evaluations in a row have brought nothing better. The last phase has no end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import as_values, best_place, settle, told
from evoopt.checks import check_strategy
from evoopt.population import Population
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, error, pytree
from evoopt.when import when


@pytree
class Phase:
    """One strategy of a portfolio.

    Attributes:
        strategy: any that reads values alone.
        evaluations: the most that the phase takes; infinite for no limit.
        patience: evaluations in a row without a better value that end the phase; infinite for no such end.
    """

    strategy: Any
    evaluations: float = float("inf")
    patience: float = float("inf")


class State(NamedTuple):
    """Where a portfolio is."""

    states: tuple  # of every phase; of those to come as they would begin at the start
    phase: Array  # () int32, whose turn it is
    evaluations: Array  # () int32, of this phase
    better: Array  # () int32, those of them up to the last better value
    best: Params
    best_value: Array  # ()
    key: Array  # of the beginnings
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class Turn:
    """decode: vector (d,) -> candidate; with the populations of all phases, of which only one was asked."""

    unravel: Callable[[Array], Params]
    populations: tuple

    def __call__(self, x: Array) -> Params:
        return self.unravel(x)


class _Asked(NamedTuple):
    """A phase, and what it asks: `when` takes a function of one tree."""

    strategy: Any
    state: Any
    key: Array
    population: Population
    x: Array  # (n, d)
    active: Array  # (n,) bool


def _ask(asked: _Asked) -> _Asked:
    population = asked.strategy.ask(asked.state, asked.key)
    m = len(population)
    x = jax.vmap(trees.flatten)(population.decoded()).astype(asked.x.dtype)
    return asked._replace(
        population=population,
        x=asked.x.at[:m].set(x),
        active=jnp.zeros_like(asked.active).at[:m].set(population.wanted()),
    )


class _Told(NamedTuple):
    """A phase, and what it is told."""

    strategy: Any
    state: Any
    population: Population
    answers: Any


def _tell(told: _Told) -> _Told:
    return told._replace(state=told.strategy.tell(told.state, told.population, told.answers))


class _Begun(NamedTuple):
    """A phase, and where it begins."""

    strategy: Any
    state: Any
    params: Params
    key: Array


def _begin(begun: _Begun) -> _Begun:
    return begun._replace(state=trees.strong(begun.strategy.init(begun.params, begun.key)))


@pytree
class Portfolio:
    """Strategies in turn; see `portfolio`."""

    phases: tuple
    oracle = staticmethod(value)
    restarting = True  # what ends the last phase is its own affair: see `stopping.restarts_itself`

    def init(self, params: Params, key: Key) -> State:
        key = noises.replayable(key)
        params = trees.searchable(params)
        begin = lambda i: trees.strong(self.phases[i].strategy.init(params, noises.fold_in(key, i)))
        zero, dtype = jnp.zeros((), jnp.int32), trees.flatten(params).dtype
        states = tuple(begin(i) for i in range(len(self.phases)))
        return State(states, zero, zero, zero, params, jnp.asarray(jnp.inf, dtype), key, zero)

    def ask(self, state: State, key: Key) -> Population:
        key = noises.replayable(key)
        shapes = [jax.eval_shape(p.strategy.ask, s, key) for p, s in zip(self.phases, state.states, strict=True)]
        n = max(len(shape) for shape in shapes)
        x, unravel = trees.ravel(state.best)
        x, active, populations = jnp.zeros((n, x.size), x.dtype), jnp.zeros(n, bool), []
        for i, (phase, shape) in enumerate(zip(self.phases, shapes, strict=True)):
            blank = jax.tree.map(_blank, shape)
            asked = _Asked(trees.strong(phase.strategy), state.states[i], key, blank, x, active)
            asked = when(state.phase == i, _ask, asked)
            populations.append(asked.population)
            x, active = asked.x, asked.active
        return Population(Turn(unravel, tuple(populations)), x, active)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        answers = told(population, answers)
        values = as_values(answers)
        turn: Any = population.decode  # the one that `ask` made
        states = []
        for i, (phase, inner) in enumerate(zip(self.phases, turn.populations, strict=True)):
            m = len(inner)
            inner = inner if inner.active is None else inner.with_active(population.active[:m])
            given = _Told(trees.strong(phase.strategy), state.states[i], inner, values[:m])
            states.append(when(state.phase == i, _tell, given).state)
        place = best_place(values)
        best = values[place].astype(state.best_value.dtype)
        better = best < state.best_value
        evaluations = state.evaluations + population.asked()
        new = state._replace(
            states=tuple(states),
            evaluations=evaluations,
            better=jnp.where(better, evaluations, state.better),
            best=trees.where(better, population.decode(population.genomes[place]), state.best),
            best_value=jnp.where(better, best, state.best_value),
        )
        return settle(state, self._moved_on(new), values)

    def _moved_on(self, state: State) -> State:
        """The state in the next phase, if this one has ended."""
        ends = [self._ended(i, state) for i in range(len(self.phases) - 1)]
        ended = jnp.stack([*ends, jnp.asarray(False)])[state.phase]
        phase = state.phase + ended.astype(jnp.int32)
        states = list(state.states)
        for i in range(1, len(self.phases)):
            key = noises.fold_in(state.key, len(self.phases) + i)
            begun = _Begun(trees.strong(self.phases[i].strategy), states[i], state.best, key)
            states[i] = when(ended & (phase == i), _begin, begun).state
        zero = jnp.zeros((), jnp.int32)
        begins = lambda x: jnp.where(ended, zero, x)
        return state._replace(
            states=tuple(states), phase=phase, evaluations=begins(state.evaluations), better=begins(state.better)
        )

    def _ended(self, i: int, state: State) -> Array:
        """Whether phase i, if it's the one whose turn it is, has ended: () bool."""
        phase = self.phases[i]
        real = lambda x: x.astype(jnp.float32)
        used = real(state.evaluations) >= jnp.asarray(phase.evaluations, jnp.float32)
        stale = real(state.evaluations - state.better) >= jnp.asarray(phase.patience, jnp.float32)
        own = getattr(phase.strategy, "ended", lambda state: False)(state.states[i])
        return used | stale | jnp.asarray(own)

    def recommend(self, state: State) -> Params:
        """The best candidate of all phases; before the first answer, the starting point."""
        return state.best


def _objective(params: Params) -> Any:
    return params


def _blank(shape: Any) -> Array:
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.zeros((*shape.shape, 2), jnp.uint32))
    return jnp.zeros(shape.shape, shape.dtype)


def portfolio(*phases: Any) -> Portfolio:
    """Strategies in turn, each of which begins at the best point so far: a local search first, say, then a global one.

    Args:
        phases: in order, `(strategy, evaluations)` or `(strategy, evaluations, patience)`: the most that the phase
            takes, and how many in a row without a better value end it. A bare strategy has no limits of its own, and
            the last phase has none in any case.

    Raises:
        ValueError: without phases, or if one that is not the last could not end.
        TypeError: for a strategy that is told more than values.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> from evoopt.strategies import cma_es, hill_climbing
    >>> strategy = portfolio((hill_climbing(4), 100), cma_es())
    >>> result = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), strategy, evaluations=1000, target=1e-8)
    >>> result.reason, int(result.state.phase)
    ('target', 1)
    """
    made = tuple(Phase(*phase) if type(phase) is tuple else Phase(phase) for phase in phases)
    if not made:
        raise error("at least one strategy", "none", "an empty list")
    for i, phase in enumerate(made):
        check_strategy(phase.strategy)
        if phase.strategy.oracle(_objective) is not _objective:
            raise error(
                "strategies that are told values alone",
                f"{type(phase.strategy).__name__} as phase {i}",
                "one that reads gradients or violations: put the portfolio inside augmented_lagrangian",
                TypeError,
            )
        endless = phase.evaluations == float("inf") == phase.patience and not hasattr(phase.strategy, "ended")
        if i < len(made) - 1 and endless:
            raise error(
                "phases that end, all but the last one",
                f"phase {i} without a limit",
                "a bare strategy in the midst of others: (strategy, 1000) for 1000 evaluations",
            )
    return Portfolio(made)
