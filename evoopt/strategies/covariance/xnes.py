"""xNES: natural evolution with a full covariance whose square root B moves by a matrix exponential.

Source: Glasmachers, Schaul, Sun, Wierstra, Schmidhuber, "Exponential natural evolution strategies", GECCO 2010,
algorithm 1; learning rates and popsize from table 1 of Wierstra et al., JMLR 15 (2014). The papers sample with B' and
update B from the right, which agree only for a symmetric B; here both use B.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import injection, shaping
from evoopt.answers import as_values, told
from evoopt.checks import check_popsize, check_sigma
from evoopt.population import Population
from evoopt.shaping import Utility
from evoopt.stopping import Dispersion
from evoopt.strategies.covariance import recombination
from evoopt.strategies.covariance.recombination import Step, Stepped
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree, static

EXACT = jax.lax.Precision.HIGHEST  # accelerators otherwise round float32 products to 10 bits


class State(NamedTuple):
    """The state of xNES over d parameters."""

    mean: Array  # (d,), mu
    sigma: Array  # ()
    matrix: Array  # (d, d), B, of determinant 1; the covariance is sigma^2 B B'
    unanswered: Array  # () int32, generations without a finite answer
    unravel: Any  # vector (d,) -> parameters; no leaves


def exponential(symmetric: Array) -> Array:
    """The matrix exponential of a symmetric matrix, by its eigenvalues."""
    eigenvalues, vectors = jnp.linalg.eigh(symmetric)
    return jnp.matmul(vectors * jnp.exp(eigenvalues), vectors.T, precision=EXACT)


@pytree
class XNES:
    """Exponential natural evolution strategy; see `xnes`."""

    popsize: int | None = static()
    sigma: float
    learning_rate: float
    sigma_learning_rate: float | None
    matrix_learning_rate: float | None
    utility: Utility = static()
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        if self.popsize is not None:
            check_popsize(self.popsize, 2)

    def init(self, params: Params, key: Key) -> State:
        del key
        mean, unravel = recombination.flattened(params)
        eye = jnp.eye(mean.shape[0], dtype=mean.dtype)
        return State(mean, jnp.asarray(self.sigma, mean.dtype), eye, jnp.zeros((), jnp.int32), unravel)

    def ask(self, state: State, key: Key) -> Population:
        d = state.mean.shape[0]
        s = recombination.standard_normals(key, self.popsize or recombination.default_popsize(d), d, state.mean.dtype)
        y = jnp.matmul(s, state.matrix.T, precision=EXACT)
        return Population(Stepped(state.mean, state.sigma, state.unravel), Step(s, y))

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        s, d, dtype = population.genomes.z, state.mean.shape[0], state.mean.dtype
        u = -self.utility(values).astype(dtype)
        default = (9 + 3 * math.log(d)) / (5 * d * math.sqrt(d))  # table 1
        rate_sigma = default if self.sigma_learning_rate is None else self.sigma_learning_rate
        rate_matrix = default if self.matrix_learning_rate is None else self.matrix_learning_rate
        eye = jnp.eye(d, dtype=dtype)
        g_delta = u @ s
        g_m = jnp.matmul((u[:, None] * s).T, s, precision=EXACT) - u.sum() * eye
        g_sigma = jnp.trace(g_m) / d
        g_b = g_m - g_sigma * eye
        step = state.sigma * jnp.matmul(state.matrix, g_delta, precision=EXACT)
        mean = state.mean + jnp.asarray(self.learning_rate, dtype) * step
        sigma = state.sigma * jnp.exp(jnp.asarray(rate_sigma, dtype) / 2 * g_sigma)
        change = exponential(jnp.asarray(rate_matrix, dtype) / 2 * g_b)
        matrix = jnp.matmul(state.matrix, change, precision=EXACT)  # B <- B exp(eta_B / 2 G_B)
        new = State(mean, recombination.representable(sigma), matrix, state.unanswered, state.unravel)
        return recombination.keep(state, new, values)

    def moved(self, state: State, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        back = lambda y: jnp.linalg.solve(state.matrix, y.T).T
        genomes = Step(*injection.steps(points, state.mean, state.sigma, population.genomes.z, back))
        return injection.placed(population, points, genomes)

    def dispersion(self, state: State, i: Array) -> Dispersion:
        """The distribution's width, for stopping criteria; columns of B stand for principal axes."""
        columns = jnp.sqrt((state.matrix**2).sum(axis=0))
        std = state.sigma * jnp.sqrt((state.matrix**2).sum(axis=1))
        axis = state.sigma * state.matrix[:, i % state.mean.shape[0]]
        path = state.sigma * jnp.zeros_like(state.mean)
        return Dispersion(state.mean, state.sigma, std, path, axis, columns.min(), columns.max())

    def recommend(self, state: State) -> Params:
        return state.unravel(state.mean)


def xnes(
    popsize: int | None = None,
    *,
    sigma: float = 1.0,
    learning_rate: float = 1.0,
    sigma_learning_rate: float | None = None,
    matrix_learning_rate: float | None = None,
    utility: Utility = shaping.nes,
) -> XNES:
    """Exponential NES (Glasmachers et al. 2010). Time O(n d^2 + d^3) per generation, memory O(d^2).

    Args:
        popsize: candidates per generation, at least 2; None means 4 + floor(3 ln d).
        sigma: initial standard deviation of every coordinate, in units of the parameters.
        learning_rate: eta_mu.
        sigma_learning_rate, matrix_learning_rate: eta_sigma and eta_B; None means (9 + 3 ln d) / (5 d sqrt d).
        utility: fitness shaping.

    Raises:
        ValueError: for a popsize below 2 or a sigma that is not positive.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> tilted = lambda x: (x[0] + x[1] - 3) ** 2 + 100 * (x[0] - x[1]) ** 2
    >>> minimize(tilted, jnp.zeros(2), xnes(), generations=400, target=1e-8).reason
    'target'
    """
    check_sigma(sigma)
    return XNES(popsize, sigma, learning_rate, sigma_learning_rate, matrix_learning_rate, utility)
