"""SNES: separable natural evolution strategies, a Gaussian with one sigma per coordinate, moved by natural gradients.

Source: Wierstra, Schaul, Glasmachers, Sun, Peters, Schmidhuber, "Natural evolution strategies", JMLR 15 (2014),
algorithm 6; learning rates and popsize from its table 1.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import shaping, stopping, trees
from evoopt.answers import as_values, settle, told
from evoopt.checks import check_popsize
from evoopt.population import Population
from evoopt.shaping import Utility
from evoopt.stopping import Dispersion
from evoopt.strategies.gaussian import sampling
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree, static


class State(NamedTuple):
    """The state of SNES."""

    mean: Params
    sigma: Params  # standard deviation of each coordinate, shaped like the mean
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class SNES:
    """Separable natural evolution strategy."""

    popsize: int = static()
    sigma: float
    learning_rate: float
    sigma_learning_rate: float | None
    utility: Utility = static()
    regenerate: bool | None = static()
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 2)

    def init(self, params: Params, key: Key) -> State:
        del key
        mean = trees.searchable(params)
        sigma = jax.tree.map(lambda m: jnp.full_like(m, self.sigma), mean)
        return State(mean, sigma, jnp.zeros((), jnp.int32))

    def ask(self, state: State, key: Key) -> Population:
        key = noises.replayable(key)
        scheme, n = sampling.one_sided, self.popsize
        return sampling.sample(noises.gaussian, scheme, key, n, state.mean, state.sigma, self.regenerate)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        u = -self.utility(values)  # (n,), utilities: large for the best
        # line 6: grad_mu = sum_k u_k s_k; line 7: grad_sigma = sum_k u_k (s_k^2 - 1)
        grad_mean, grad_sigma = sampling.moments(sampling.one_sided, population, u, u)
        rate = self.sigma_learning_rate
        if rate is None:
            d = trees.size(state.mean)
            rate = (3 + math.log(d)) / (5 * math.sqrt(d))  # table 1
        mean = jax.tree.map(  # line 8: mu <- mu + eta_mu sigma grad_mu
            lambda m, s, g: m + (jnp.asarray(self.learning_rate, s.dtype) * s * g.astype(s.dtype)).astype(m.dtype),
            state.mean, state.sigma, grad_mean,
        )  # fmt: skip
        sigma = jax.tree.map(  # line 9: sigma <- sigma exp(eta_sigma / 2 grad_sigma)
            lambda s, g: s * jnp.exp(rate / 2 * g).astype(s.dtype), state.sigma, grad_sigma
        )
        return settle(state, State(mean, sigma, state.unanswered), values)

    def moved(self, state: State, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        del state
        return sampling.moved(population, points)

    def dispersion(self, state: State, i: Array) -> Dispersion:
        """The distribution's width, for stopping criteria."""
        mean = trees.flatten(state.mean)
        return stopping.diagonal(mean, trees.flatten(state.sigma).astype(mean.dtype), jnp.zeros_like(mean), i)

    def recommend(self, state: State) -> Params:
        return state.mean


def snes(
    popsize: int = 16,
    *,
    sigma: float = 1.0,
    learning_rate: float = 1.0,
    sigma_learning_rate: float | None = None,
    utility: Utility = shaping.nes,
    regenerate: bool | None = None,
) -> SNES:
    """SNES (Wierstra et al. 2014).

    Args:
        popsize: candidates per generation; the paper's default is 4 + 3 ln d.
        sigma: initial standard deviation of every coordinate, in units of the parameters.
        learning_rate: eta_mu, 1 in the paper.
        sigma_learning_rate: eta_sigma; None means the paper's (3 + ln d) / (5 sqrt d).
        utility: fitness shaping; the paper's utilities by default.
        regenerate: draw the noise again instead of storing it; None decides by its size.

    >>> from evoopt import minimize
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), snes(16), generations=200)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 1e-4)
    True
    """
    return SNES(popsize, sigma, learning_rate, sigma_learning_rate, utility, regenerate)
