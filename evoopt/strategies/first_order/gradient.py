"""Any optax optimizer in the same loop: its one candidate is the current point, answered by (value, gradient)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from evoopt import trees
from evoopt.answers import settle, told
from evoopt.population import Population
from evoopt.strategies.first_order.updates import descend
from evoopt.strategy import value_and_grad
from evoopt.types import Array, Key, Params, error, pytree, static


class State(NamedTuple):
    """The state of gradient descent."""

    mean: Params  # the current point
    opt_state: Any
    unanswered: Array  # () int32, steps without a finite value and gradient


def _constant(params: Params, genome: Array) -> Params:
    del genome  # there is only one candidate
    return params


@pytree
class Gradient:
    """An optax optimizer as a strategy."""

    optimizer: optax.GradientTransformation = static()
    oracle = staticmethod(value_and_grad)

    def init(self, params: Params, key: Key) -> State:
        del key
        mean = trees.searchable(params)
        return State(mean, trees.strong(self.optimizer.init(mean)), jnp.zeros((), jnp.int32))

    def ask(self, state: State, key: Key) -> Population:
        del key
        return Population(Partial(_constant, state.mean), jnp.zeros(1))

    def tell(self, state: State, population: Population, answers: Any) -> State:
        if not isinstance(answers, tuple) or len(answers) != 2:
            raise error(
                "answers (values, gradients)", type(answers).__name__,
                "the objective was asked instead of strategy.oracle(objective)", TypeError,
            )  # fmt: skip
        values, grads = told(population, answers)
        grad = jax.tree.map(lambda g: g[0], grads)
        # A gradient that is not finite is no answer, whatever its value.
        sound = jnp.all(jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grad)]))
        updates, opt_state = descend(self.optimizer, grad, state.opt_state, state.mean)
        mean = optax.apply_updates(state.mean, updates)
        return settle(state, State(mean, opt_state, state.unanswered), jnp.where(sound, values, jnp.nan))

    def recommend(self, state: State) -> Params:
        return state.mean


def gradient(optimizer: optax.GradientTransformation) -> Gradient:
    """Any optax optimizer, e.g. `gradient(optax.adam(1e-3))`.

    >>> from evoopt import minimize
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), gradient(optax.adam(0.1)), generations=200)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 1e-2)
    True
    """
    return Gradient(optimizer)
