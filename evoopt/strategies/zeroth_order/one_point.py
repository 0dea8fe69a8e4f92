"""One-point estimates with residual feedback: one forward pass per step, compared with that of the step before.

g_t = (L(theta_t + sigma z_t; B_t) - L(theta_(t-1) + sigma z_(t-1); B_(t-1))) / sigma
theta <- theta - learning_rate g_t z_t

Source: Zhang, Zhou, Ji, Zavlanos, "A new one-point residual-feedback oracle for black-box learning and control",
Automatica 2022; in Malladi et al. 2023 (MeZO), section B.1. Clearly worse than two points at equal forward passes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from evoopt import noise as noises
from evoopt.answers import as_values, finite, told
from evoopt.checks import check_sigma
from evoopt.population import Population
from evoopt.strategies.gaussian import sampling
from evoopt.strategies.zeroth_order import probes
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree


class State(NamedTuple):
    """The state of the one-point search."""

    mean: Params
    last_value: Array  # () float32, the last answer; NaN before the first
    unanswered: Array  # () int32, steps without an answer


@pytree
class OnePoint:
    """Residual one-point descent; see `one_point`."""

    sigma: float
    learning_rate: float
    noise: Any = noises.gaussian
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_sigma(self.sigma)

    def init(self, params: Params, key: Key) -> State:
        del key
        return State(probes.movable(params, self.sigma), jnp.full((), jnp.nan, jnp.float32), jnp.zeros((), jnp.int32))

    def ask(self, state: State, key: Key) -> Population:
        key = noises.replayable(key)
        return sampling.sample(self.noise, sampling.one_sided, key, 1, state.mean, self.sigma, regenerate=True)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        # After a lost step the residual spans two steps. The first answer has no residual and causes no move.
        g = (finite(values) - state.last_value.astype(values.dtype)) / self.sigma  # (1,)
        weights = self.learning_rate * jnp.where(jnp.isfinite(values) & ~jnp.isnan(g), g, 0)
        mean = probes.step(state.mean, self.noise, population.genomes.address, weights)
        return probes.settle_in_place(state, State(mean, values[0].astype(jnp.float32), state.unanswered), values)

    def recommend(self, state: State) -> Params:
        return state.mean


def one_point(*, sigma: float = 1e-3, learning_rate: float = 1e-7, noise: Any = noises.gaussian) -> OnePoint:
    """Residual one-point estimates (Zhang et al. 2022): a single forward pass per step.

    Args:
        sigma: length of a probe, in units of the parameters.
        learning_rate: much smaller than for two points, because the residual includes the last step's whole change.
        noise: `gaussian`, `rademacher`, or any other noise addressed by keys.

    >>> from evoopt import minimize
    >>> strategy = one_point(sigma=0.1, learning_rate=0.01)
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(2), strategy, generations=2000)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 0.2)
    True
    """
    return OnePoint(sigma, learning_rate, noise)
