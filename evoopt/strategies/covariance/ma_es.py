"""MA-ES: CMA-ES without C; the square root M is adapted directly and nothing is decomposed.

Source: Beyer and Sendhoff, "Simplify your covariance matrix adaptation evolution strategy", IEEE TEVC 21 (2017),
figure 3 (lines M1 to M12); constants of section IV.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import injection
from evoopt.answers import as_values, told
from evoopt.checks import check_popsize, check_sigma
from evoopt.population import Population
from evoopt.stopping import Dispersion
from evoopt.strategies.covariance import recombination
from evoopt.strategies.covariance.recombination import Step, Stepped
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree, static

EXACT = jax.lax.Precision.HIGHEST  # accelerators otherwise round float32 products to 10 bits


class State(NamedTuple):
    """The state of MA-ES over d parameters."""

    mean: Array  # (d,), y
    sigma: Array  # ()
    matrix: Array  # (d, d), M
    path: Array  # (d,), s
    unanswered: Array  # () int32, generations without a finite answer
    unravel: Any  # vector (d,) -> parameters; no leaves


@pytree
class MAES:
    """Matrix adaptation; see `ma_es`."""

    popsize: int | None = static()
    sigma: float
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        if self.popsize is not None:
            check_popsize(self.popsize, 2)

    def init(self, params: Params, key: Key) -> State:
        del key
        mean, unravel = recombination.flattened(params)
        eye = jnp.eye(mean.shape[0], dtype=mean.dtype)
        sigma = jnp.asarray(self.sigma, mean.dtype)
        return State(mean, sigma, eye, jnp.zeros_like(mean), jnp.zeros((), jnp.int32), unravel)

    def ask(self, state: State, key: Key) -> Population:
        d = state.mean.shape[0]
        z = recombination.standard_normals(
            key, self.popsize or recombination.default_popsize(d), d, state.mean.dtype
        )  # M4
        y = jnp.matmul(z, state.matrix.T, precision=EXACT)  # M5
        return Population(Stepped(state.mean, state.sigma, state.unravel), Step(z, y))  # M6

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        (z, moved), d, m = population.genomes, state.mean.shape[0], state.matrix  # z and M z, (n, d)
        w = recombination.logarithmic(values, state.mean.dtype)
        mu = w.mu_eff
        c_s = (mu + 2) / (mu + d + 5)  # (41)
        c_1 = 2 / ((d + 1.3) ** 2 + mu)  # (42)
        c_w = jnp.minimum(1 - c_1, 2 * (mu + 1 / mu - 2) / ((d + 2) ** 2 + mu))  # (43)
        d_sigma = 1 + c_s + 2 * jnp.maximum(0, jnp.sqrt(jnp.maximum(mu - 1, 0) / (d + 1)) - 1)  # (44)

        z_w = w.positive @ z
        mean = state.mean + state.sigma * jnp.matmul(m, z_w, precision=EXACT)  # M9
        path = (1 - c_s) * state.path + jnp.sqrt(mu * c_s * (2 - c_s)) * z_w  # M10
        # M11: M (I + c_1 / 2 (s s' - I) + c_w / 2 (<z z'>_w - I)), without multiplying two d x d matrices
        rank_mu = jnp.matmul((w.positive[:, None] * moved).T, z, precision=EXACT)
        rank_one = jnp.outer(jnp.matmul(m, path, precision=EXACT), path)
        matrix = (1 - (c_1 + c_w) / 2) * m + c_1 / 2 * rank_one + c_w / 2 * rank_mu
        norm, chi = jnp.sqrt((path**2).sum()), recombination.expected_norm(d)
        # sigma grows at most e-fold, as in pycma
        sigma = state.sigma * jnp.exp(jnp.minimum(1, c_s / d_sigma * (norm / chi - 1)))  # M12
        new = State(mean, recombination.representable(sigma), matrix, path, state.unanswered, state.unravel)
        return recombination.keep(state, new, values)

    def moved(self, state: State, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        back = lambda y: jnp.linalg.solve(state.matrix, y.T).T
        genomes = Step(*injection.steps(points, state.mean, state.sigma, population.genomes.z, back))
        return injection.placed(population, points, genomes)

    def dispersion(self, state: State, i: Array) -> Dispersion:
        """The distribution's width, for stopping criteria; columns of M stand for principal axes."""
        columns = jnp.sqrt((state.matrix**2).sum(axis=0))
        std = state.sigma * jnp.sqrt((state.matrix**2).sum(axis=1))
        axis = state.sigma * state.matrix[:, i % state.mean.shape[0]]
        path = state.sigma * jnp.matmul(state.matrix, state.path, precision=EXACT)
        return Dispersion(state.mean, state.sigma, std, path, axis, columns.min(), columns.max())

    def recommend(self, state: State) -> Params:
        return state.unravel(state.mean)


def ma_es(popsize: int | None = None, *, sigma: float = 1.0) -> MAES:
    """MA-ES (Beyer and Sendhoff 2017). Time O(n d^2) per generation, memory O(d^2).

    Args:
        popsize: candidates per generation, at least 2; None means 4 + floor(3 ln d).
        sigma: initial standard deviation of every coordinate, in units of the parameters.

    Raises:
        ValueError: for a popsize below 2 or a sigma that is not positive.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> valley = lambda x: jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)
    >>> minimize(valley, jnp.zeros(4), ma_es(sigma=0.5), generations=600, target=1e-7).reason
    'target'
    """
    check_sigma(sigma)
    return MAES(popsize, sigma)
