"""PGPE: policy gradients with parameter-based exploration, symmetric sampling, one sigma per coordinate.

Source: Sehnke, Osendorfer, Rueckstiess, Graves, Peters, Schmidhuber, "Parameter-exploring policy gradients", Neural
Networks 23 (2010), algorithm 2 (symmetric sampling). As in later implementations, fitness shaping replaces the reward
normalisation (m - r+ - r-), and the relative change of sigma is bounded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from evoopt import noise as noises
from evoopt import shaping, stopping, trees
from evoopt.answers import as_values, count, settle, told
from evoopt.checks import check_popsize
from evoopt.population import Population
from evoopt.shaping import Utility
from evoopt.stopping import Dispersion
from evoopt.strategies.first_order.updates import adam, descend
from evoopt.strategies.gaussian import sampling
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree, static


class State(NamedTuple):
    """The state of PGPE."""

    mean: Params
    sigma: Params  # standard deviation of each coordinate, shaped like the mean
    opt_state: Any
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class PGPE:
    """Gaussian search distribution with one sigma per coordinate and a mean moved by an optimizer."""

    popsize: int = static()
    sigma: float  # initial standard deviation
    learning_rate: float
    sigma_learning_rate: float
    max_change: float  # largest relative change of sigma in a generation
    optimizer: optax.GradientTransformation = static()
    utility: Utility = static()
    regenerate: bool | None = static()
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 2, even=True)

    def init(self, params: Params, key: Key) -> State:
        del key
        mean = trees.searchable(params)
        sigma = jax.tree.map(lambda m: jnp.full_like(m, self.sigma), mean)
        return State(mean, sigma, trees.strong(self.optimizer.init(mean)), jnp.zeros((), jnp.int32))

    def ask(self, state: State, key: Key) -> Population:
        key = noises.replayable(key)
        scheme, n = sampling.antithetic, self.popsize
        return sampling.sample(noises.gaussian, scheme, key, n, state.mean, state.sigma, self.regenerate)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        used = sampling.antithetic.used(values)  # half a pair moves neither mean nor sigma
        both = sampling.antithetic.weigh(values, self.utility)  # (n,), pairs adjacent
        baseline = both.sum() / count(used)  # b; 0 for centered ranks
        weights = both / count(used)
        weights_sigma = jnp.where(jnp.isnan(used), 0, both - baseline) / count(used)
        first, second = sampling.moments(sampling.antithetic, population, weights, weights_sigma)
        # Delta mu = alpha eps (r+ - r-) / 2, eps = sigma z
        grad = jax.tree.map(lambda s, m: (s.astype(m.dtype) * m).astype(s.dtype), state.sigma, first)
        updates, opt_state = descend(self.optimizer, grad, state.opt_state, state.mean)
        mean = jax.tree.map(lambda m, u: m - jnp.asarray(self.learning_rate * u, m.dtype), state.mean, updates)
        # Delta sigma = alpha ((r+ + r-) / 2 - b) (eps^2 - sigma^2) / sigma, where the last factor is sigma (z^2 - 1)
        change = jax.tree.map(
            lambda q: jnp.clip(-self.sigma_learning_rate * q, -self.max_change, self.max_change), second
        )
        sigma = jax.tree.map(lambda s, c: s * (1 + c).astype(s.dtype), state.sigma, change)
        return settle(state, State(mean, sigma, opt_state, state.unanswered), used)

    def dispersion(self, state: State, i: Array) -> Dispersion:
        """The distribution's width, for stopping criteria."""
        mean = trees.flatten(state.mean)
        return stopping.diagonal(mean, trees.flatten(state.sigma).astype(mean.dtype), jnp.zeros_like(mean), i)

    def recommend(self, state: State) -> Params:
        return state.mean


def pgpe(
    popsize: int = 64,
    *,
    sigma: float = 0.1,
    learning_rate: float = 0.05,
    sigma_learning_rate: float = 0.1,
    max_change: float = 0.2,
    optimizer: optax.GradientTransformation | None = None,
    utility: Utility = shaping.centered_rank,
    regenerate: bool | None = None,
) -> PGPE:
    """PGPE with symmetric sampling (Sehnke et al. 2010).

    Args:
        popsize: candidates per generation, even.
        sigma: initial standard deviation of every coordinate, in units of the parameters.
        learning_rate: that of the mean's optimizer.
        sigma_learning_rate: alpha in the update of sigma.
        max_change: largest relative change of sigma in one generation.
        optimizer: an optax transformation of the mean's gradient without its learning rate; Adam by default.
        utility: fitness shaping.
        regenerate: draw the noise again instead of storing it; None decides by its size.

    >>> from evoopt import minimize
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), pgpe(64), generations=200)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 0.1)
    True
    """
    optimizer = adam() if optimizer is None else optimizer
    return PGPE(popsize, sigma, learning_rate, sigma_learning_rate, max_change, optimizer, utility, regenerate)
