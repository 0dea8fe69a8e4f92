"""(1+1)-ES: one parent, one child, and Rechenberg's one-fifth success rule for the step-size.

Source: Auger, "Benchmarking the (1+1) evolution strategy with one-fifth success rule on the BBOB-2009 function
testbed", GECCO 2009, algorithm 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from evoopt import injection, stopping
from evoopt.answers import answered, as_values, settle, told
from evoopt.checks import check_sigma
from evoopt.population import Population
from evoopt.stopping import Dispersion
from evoopt.strategies.covariance import recombination
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, error, pytree


class State(NamedTuple):
    """The state of the (1+1)-ES over d parameters."""

    parent: Array  # (d,)
    parent_value: Array  # (), +inf before the first answer
    sigma: Array  # ()
    unanswered: Array  # () int32, generations without a finite answer
    unravel: Any  # vector (d,) -> parameters; no leaves


@pytree
class Sample:
    """decode: z (d,) -> parent + sigma z."""

    parent: Array
    sigma: Array
    unravel: Any

    def __call__(self, z: Array) -> Params:
        return self.unravel(self.parent + self.sigma * z)


@pytree
class OnePlusOneES:
    """The (1+1)-ES; see `one_plus_one_es`."""

    sigma: float
    growth: float
    oracle = staticmethod(value)

    def init(self, params: Params, key: Key) -> State:
        del key
        parent, unravel = recombination.flattened(params)
        unknown = jnp.asarray(jnp.inf, parent.dtype)
        return State(parent, unknown, jnp.asarray(self.sigma, parent.dtype), jnp.zeros((), jnp.int32), unravel)

    def ask(self, state: State, key: Key) -> Population:
        z = recombination.standard_normals(key, 1, state.parent.shape[0], state.parent.dtype)
        # As in the paper, the first generation evaluates the starting point.
        z = jnp.where(jnp.isinf(state.parent_value), 0, z)
        return Population(Sample(state.parent, state.sigma, state.unravel), z)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        dtype = state.parent.dtype
        child, z = values[0].astype(dtype), population.genomes[0]
        success = answered(values[0]) & (child <= state.parent_value)
        growth = jnp.asarray(self.growth, dtype)
        first = jnp.isinf(state.parent_value)
        factor = jnp.where(first, 1, jnp.where(success, growth, growth**-0.25))  # 1.5 and 1.5^(-1/4)
        parent = jnp.where(success, state.parent + state.sigma * z, state.parent)
        parent_value = jnp.where(success, child, state.parent_value)
        sigma = recombination.representable(state.sigma * factor)
        return settle(state, State(parent, parent_value, sigma, state.unanswered, state.unravel), values)

    def moved(self, state: State, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        # No step is shortened: no length is learned from, and a parent has to be the point that has its value.
        z = (injection.vectors(points, state.parent.dtype) - state.parent) / state.sigma
        return injection.placed(population, points, z)

    def dispersion(self, state: State, i: Array) -> Dispersion:
        """The distribution's width, for stopping criteria."""
        zero = jnp.zeros_like(state.parent)
        return stopping.diagonal(state.parent, zero + state.sigma, zero, i)

    def recommend(self, state: State) -> Params:
        return state.unravel(state.parent)


def one_plus_one_es(*, sigma: float = 1.0, growth: float = 1.5) -> OnePlusOneES:
    """The (1+1)-ES with the one-fifth success rule (Auger 2009). One candidate per generation.

    Args:
        sigma: initial standard deviation of every coordinate, in units of the parameters.
        growth: factor of sigma after a success; its -1/4th power is the factor after a failure.

    Raises:
        ValueError: for a sigma that is not positive, or a growth of at most 1.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), one_plus_one_es(), generations=2000, target=1e-8).reason
    'target'
    """
    check_sigma(sigma)
    if isinstance(growth, (int, float)) and not growth > 1:
        raise error("growth above 1", str(growth), "the factor for failures was given instead")
    return OnePlusOneES(sigma, growth)
