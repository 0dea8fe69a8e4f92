"""LM-MA-ES: matrix adaptation whose matrix is a product of a few rank-one factors, for thousands of parameters.

Source: Loshchilov, Glasmachers, Beyer, "Large scale black-box optimization by limited-memory matrix adaptation", IEEE
TEVC 23 (2019), arXiv 1705.06693, algorithm 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import injection
from evoopt.answers import as_values, told
from evoopt.checks import check_popsize, check_sigma
from evoopt.population import Population
from evoopt.strategies.covariance import recombination
from evoopt.strategies.covariance.recombination import Step, Stepped
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree, static


class State(NamedTuple):
    """The state of LM-MA-ES over d parameters, with m directions remembered."""

    mean: Array  # (d,)
    sigma: Array  # ()
    directions: Array  # (m, d), m_i
    path: Array  # (d,), p_sigma
    generation: Array  # () int32
    unanswered: Array  # () int32, generations without a finite answer
    unravel: Any  # vector (d,) -> parameters; no leaves


def fading(m: int, d: int) -> np.ndarray:
    """c_d: how far each direction bends a step, (m,)."""
    # line 2, held to 1/2, which matters only for d = 1, where the paper's 1 would replace the step
    return np.minimum(0.5, 1 / (1.5 ** np.arange(m) * d))


def bend(z: Array, directions: Array, generation: Array) -> Array:
    """Steps z (..., d) through the factors in use: lines 7 to 9."""

    def factor(i: Array, z: Array) -> Array:
        c, m_i = jnp.asarray(fading(*directions.shape), z.dtype)[i], directions[i]
        bent = (1 - c) * z + c * m_i * (z @ m_i)[..., None]
        return jnp.where(i < generation, bent, z)

    return jax.lax.fori_loop(0, directions.shape[0], factor, z)


def unbend(y: Array, directions: Array, generation: Array) -> Array:
    """The inverse of `bend`: each factor (1 - c) I + c m m' by Sherman and Morrison, the last one first."""
    last = directions.shape[0] - 1

    def factor(k: Array, y: Array) -> Array:
        i = last - k
        c, m_i = jnp.asarray(fading(*directions.shape), y.dtype)[i], directions[i]
        share = c / ((1 - c) + c * (m_i**2).sum())
        straight = (y - share * m_i * (y @ m_i)[..., None]) / (1 - c)
        return jnp.where(i < generation, straight, y)

    return jax.lax.fori_loop(0, directions.shape[0], factor, y)


@pytree
class LMMAES:
    """Limited-memory matrix adaptation; see `lm_ma_es`."""

    popsize: int | None = static()
    sigma: float
    memory: int | None = static()
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        for name, number, least in (("popsize", self.popsize, 2), ("memory", self.memory, 1)):
            if number is not None:
                check_popsize(number, least, name=name)

    def init(self, params: Params, key: Key) -> State:
        del key
        mean, unravel = recombination.flattened(params)
        m = self.memory or recombination.default_popsize(mean.shape[0])
        sigma, count = jnp.asarray(self.sigma, mean.dtype), jnp.zeros((), jnp.int32)
        return State(
            mean, sigma, jnp.zeros((m, mean.shape[0]), mean.dtype), jnp.zeros_like(mean), count, count, unravel
        )

    def ask(self, state: State, key: Key) -> Population:
        d = state.mean.shape[0]
        z = recombination.standard_normals(key, self.popsize or recombination.default_popsize(d), d, state.mean.dtype)
        y = bend(z, state.directions, state.generation)
        return Population(Stepped(state.mean, state.sigma, state.unravel), Step(z, y))

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        (z, y), (m, d) = population.genomes, state.directions.shape
        w = recombination.logarithmic(values, state.mean.dtype)
        # Line 2 has c_sigma = 2 lambda / d and c_c = lambda / (4^(i - 1) d), which can pass 2 and turn roots into NaN
        # when lambda > d. They are held to 1/2 and 1, which changes nothing for the paper's lambda and dimensions.
        c_sigma = jnp.minimum(0.5, 2 * w.m / d)
        c_c = jnp.minimum(1, w.m / jnp.asarray(4.0 ** np.arange(m) * d, state.mean.dtype))[:, None]
        z_w = w.positive @ z
        mean = state.mean + state.sigma * (w.positive @ y)  # line 11
        path = (1 - c_sigma) * state.path + jnp.sqrt(w.mu_eff * c_sigma * (2 - c_sigma)) * z_w  # line 12
        directions = (1 - c_c) * state.directions + jnp.sqrt(w.mu_eff * c_c * (2 - c_c)) * z_w  # line 14
        # sigma grows at most e-fold, as in pycma
        sigma = state.sigma * jnp.exp(jnp.minimum(1, c_sigma / 2 * ((path**2).sum() / d - 1)))  # line 15
        new = State(
            mean,
            recombination.representable(sigma),
            directions,
            path,
            state.generation + 1,
            state.unanswered,
            state.unravel,
        )
        return recombination.keep(state, new, values)

    def moved(self, state: State, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        back = lambda y: unbend(y, state.directions, state.generation)
        genomes = Step(*injection.steps(points, state.mean, state.sigma, population.genomes.z, back))
        return injection.placed(population, points, genomes)

    def recommend(self, state: State) -> Params:
        return state.unravel(state.mean)


def lm_ma_es(popsize: int | None = None, *, sigma: float = 1.0, memory: int | None = None) -> LMMAES:
    """LM-MA-ES (Loshchilov, Glasmachers, Beyer 2019). Time O(n m d) per generation, memory O((n + m) d).

    Args:
        popsize: candidates per generation, at least 2, of any size; None means 4 + floor(3 ln d).
        sigma: initial standard deviation of every coordinate, in units of the parameters.
        memory: m, the directions remembered; None means 4 + floor(3 ln d).

    Raises:
        ValueError: for a popsize below 2 or a sigma that is not positive.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(30), lm_ma_es(), generations=600, target=1e-8).reason
    'target'
    """
    check_sigma(sigma)
    return LMMAES(popsize, sigma, memory)
