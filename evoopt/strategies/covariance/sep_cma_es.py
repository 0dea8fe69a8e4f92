"""Separable CMA-ES: one variance per coordinate, in linear time and memory.

Source: Ros and Hansen, "A simple modification in CMA-ES achieving linear time and space complexity", PPSN X (2008):
the (mu/mu_w, lambda)-CMA-ES of section 2 with a diagonal C, whose learning rate is (d + 2) / 3 times larger.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from evoopt import injection
from evoopt.answers import as_values, told
from evoopt.checks import check_popsize, check_sigma
from evoopt.population import Population
from evoopt.stopping import Dispersion
from evoopt.strategies.covariance import recombination
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree, static


class State(NamedTuple):
    """The state of separable CMA-ES over d parameters."""

    mean: Array  # (d,)
    sigma: Array  # ()
    variances: Array  # (d,), the diagonal of C
    path_sigma: Array  # (d,)
    path_c: Array  # (d,)
    generation: Array  # () int32
    unanswered: Array  # () int32, generations without a finite answer
    unravel: Any  # vector (d,) -> parameters; no leaves


@pytree
class Sample:
    """decode: z (d,) -> mean + sigma sqrt(c) z."""

    mean: Array
    sigma: Array
    variances: Array
    unravel: Any

    def __call__(self, z: Array) -> Params:
        return self.unravel(self.mean + self.sigma * jnp.sqrt(self.variances) * z)


@pytree
class SepCMAES:
    """CMA-ES with a diagonal covariance; see `sep_cma_es`."""

    popsize: int | None = static()
    sigma: float
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        if self.popsize is not None:
            check_popsize(self.popsize, 2)

    def init(self, params: Params, key: Key) -> State:
        del key
        mean, unravel = recombination.flattened(params)
        zero, count = jnp.zeros_like(mean), jnp.zeros((), jnp.int32)
        return State(mean, jnp.asarray(self.sigma, mean.dtype), zero + 1, zero, zero, count, count, unravel)

    def ask(self, state: State, key: Key) -> Population:
        d = state.mean.shape[0]
        z = recombination.standard_normals(key, self.popsize or recombination.default_popsize(d), d, state.mean.dtype)
        return Population(Sample(state.mean, state.sigma, state.variances, state.unravel), z)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        z, d, dtype = population.genomes, state.mean.shape[0], state.mean.dtype
        w = recombination.logarithmic(values, dtype)
        mu = w.mu_eff
        c_sigma = (mu + 2) / (d + mu + 3)
        d_sigma = 1 + 2 * jnp.maximum(0, jnp.sqrt(jnp.maximum(mu - 1, 0) / (d + 1)) - 1) + c_sigma
        c_c = 4 / (d + 4)
        # the learning rate of C with mu_cov = mu_eff, times (d + 2) / 3: section 3
        c_cov = 2 / (mu * (d + 2**0.5) ** 2) + (1 - 1 / mu) * jnp.minimum(1, (2 * mu - 1) / ((d + 2) ** 2 + mu))
        c_cov = jnp.minimum(1, c_cov * (d + 2) / 3)

        deviations = jnp.sqrt(state.variances)
        z_w = w.positive @ z
        mean = state.mean + state.sigma * deviations * z_w  # (2)
        path_sigma = (1 - c_sigma) * state.path_sigma + jnp.sqrt(c_sigma * (2 - c_sigma) * mu) * z_w  # (3)
        norm, chi = jnp.sqrt((path_sigma**2).sum()), recombination.expected_norm(d)
        generation = state.generation + 1
        decay = jnp.sqrt(1 - (1 - c_sigma) ** (2 * generation.astype(dtype)))
        h = (norm / decay < (1.4 + 2 / (d + 1)) * chi).astype(dtype)
        path_c = (1 - c_c) * state.path_c + h * jnp.sqrt(c_c * (2 - c_c) * mu) * deviations * z_w  # (4)
        rank_mu = state.variances * (w.positive @ z**2)
        variances = (1 - c_cov) * state.variances + c_cov / mu * path_c**2 + c_cov * (1 - 1 / mu) * rank_mu  # (5)
        # sigma grows at most e-fold, as in pycma
        sigma = state.sigma * jnp.exp(jnp.minimum(1, c_sigma / d_sigma * (norm / chi - 1)))  # (6)
        floor = jnp.finfo(dtype).tiny * 2.0**20  # otherwise a coordinate without effect may lose its variance for good
        new = State(
            mean, recombination.representable(sigma), jnp.maximum(variances, floor), path_sigma, path_c, generation,
            state.unanswered, state.unravel,
        )  # fmt: skip
        return recombination.keep(state, new, values)

    def moved(self, state: State, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        back = lambda y: y / jnp.sqrt(state.variances)
        z, _ = injection.steps(points, state.mean, state.sigma, population.genomes, back)
        return injection.placed(population, points, z)

    def recommend(self, state: State) -> Params:
        return state.unravel(state.mean)

    def dispersion(self, state: State, i: Array) -> Dispersion:
        """The distribution's width, for stopping criteria; principal axes are coordinates."""
        lengths = jnp.sqrt(state.variances)
        std = state.sigma * lengths
        axis = jnp.where(jnp.arange(std.shape[0], dtype=jnp.int32) == i % std.shape[0], std, 0)
        return Dispersion(state.mean, state.sigma, std, state.sigma * state.path_c, axis, lengths.min(), lengths.max())


def sep_cma_es(popsize: int | None = None, *, sigma: float = 1.0) -> SepCMAES:
    """Separable CMA-ES (Ros and Hansen 2008), for many parameters or parameters that do not interact.

    Deviation: the weights begin with ln((n + 1) / 2), as in every later CMA-ES, instead of the paper's ln(mu + 1).

    Args:
        popsize: candidates per generation, at least 2; None means 4 + floor(3 ln d).
        sigma: initial standard deviation of every coordinate, in units of the parameters.

    Raises:
        ValueError: for a popsize below 2 or a sigma that is not positive.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> scales = jnp.array([1.0, 10.0, 100.0, 1000.0])
    >>> bowl = lambda x: jnp.sum(scales * (x - 1) ** 2)
    >>> minimize(bowl, jnp.zeros(4), sep_cma_es(), generations=400, target=1e-8).reason
    'target'
    """
    check_sigma(sigma)
    return SepCMAES(popsize, sigma)
