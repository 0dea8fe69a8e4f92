"""CMA-ES: a Gaussian whose mean, covariance and step-size adapt; active update, cumulative step-size control.

Source: Hansen, "The CMA evolution strategy: a tutorial", arXiv 1604.00772v2, figure 6 and table 1. Where pycma 4.5
(Hansen's current implementation) differs from the tutorial, its constants are used, and the line says so.

Two measures keep every number finite in runs of any length, in float32 too: eigenvalues of C are held above the
rounding error of the largest, and a C that drifts out of scale is rescaled by a power of four against sigma, which
changes no bit of the search. A search that can make no further progress is reported in `stalled`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import injection, trees
from evoopt.answers import as_values, settle, told
from evoopt.checks import check_popsize, check_sigma
from evoopt.population import Population
from evoopt.stopping import Dispersion
from evoopt.strategies.covariance import recombination
from evoopt.strategies.covariance.recombination import Step, Stepped, Weights
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree, static

EXACT = jax.lax.Precision.HIGHEST  # accelerators otherwise round float32 products to 10 bits


class State(NamedTuple):
    """The state of CMA-ES over d parameters."""

    mean: Array  # (d,)
    sigma: Array  # ()
    covariance: Array  # (d, d), C
    axes: Array  # (d, d), B, eigenvectors of C in its columns
    lengths: Array  # (d,), D, square roots of C's eigenvalues, ascending
    path_sigma: Array  # (d,), p_sigma
    path_c: Array  # (d,), p_c
    generation: Array  # () int32, generations told so far
    stalled: Array  # () int32, consecutive generations whose values were all equal or whose steps rounding swallowed
    unanswered: Array  # () int32, generations without a finite answer
    unravel: Any  # vector (d,) -> parameters; no leaves


class Rates(NamedTuple):
    """Table 1, for the candidates that answered. All but the weights are ()."""

    weights: Array  # (n,), of the rank-mu update, some negative
    c_sigma: Array
    d_sigma: Array
    c_c: Array
    c_1: Array
    c_mu: Array


def rates(w: Weights, d: int, active: bool = True) -> Rates:
    """Table 1 of the tutorial: the default strategy parameters."""
    mu = w.mu_eff
    c_sigma = jnp.minimum(0.5, (mu + 2) / (d + mu + 3))  # (55), with pycma's 3 instead of 5, and at most 1/2
    # (55), with pycma 4.5's stronger damping where mu_eff is large compared with d
    inner = max(1.0, 3 * (1 - 0.5 ** (d / 9)))
    d_sigma = 1 + 2 * jnp.maximum(0, inner * jnp.sqrt(jnp.maximum(mu - 1, 0) / (d + 1)) - 1) + c_sigma
    c_c = (4 + mu / d) / (d + 4 + 2 * mu / d)  # (56)
    c_1 = jnp.minimum(1, w.m / 6) * 2 / ((d + 1.3) ** 2 + mu)  # (57), with pycma's factor for popsizes below 6
    c_mu = jnp.minimum(1 - c_1, 2 * (0.25 + mu + 1 / mu - 2) / ((d + 2) ** 2 + mu))  # (58)
    c_mu = jnp.maximum(c_mu, 0)
    safe = jnp.maximum(c_mu, 1e-30)
    alpha = jnp.minimum(1 + c_1 / safe, 1 + 2 * w.mu_eff_minus / (mu + 2))  # (50), (51)
    alpha = jnp.minimum(alpha, (1 - c_1 - c_mu) / (d * safe))  # (52)
    weights = w.positive - alpha * w.negative if active else w.positive  # (53)
    return Rates(weights, c_sigma, d_sigma, c_c, c_1, c_mu)


def decompose(matrices: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """C, B, D -> C with its eigenvalues held above rounding error, and its new B and D."""
    c = matrices[0]
    eigenvalues, axes = jnp.linalg.eigh(c)  # (d,) ascending
    floor = 4 * jnp.finfo(c.dtype).eps * eigenvalues[-1]
    lift = jnp.maximum(floor - eigenvalues[0], 0)  # added to the diagonal, which leaves B unchanged
    eigenvalues = jnp.maximum(eigenvalues + lift, floor)
    return c + lift * jnp.eye(c.shape[0], dtype=c.dtype), axes, jnp.sqrt(eigenvalues)


@pytree
class CMAES:
    """Covariance matrix adaptation; see `cma_es`."""

    popsize: int | None = static()
    sigma: float
    active: bool = static()
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        if self.popsize is not None:
            check_popsize(self.popsize, 2)

    def init(self, params: Params, key: Key) -> State:
        del key
        mean, unravel = recombination.flattened(params)
        eye, zero, count = jnp.eye(mean.shape[0], dtype=mean.dtype), jnp.zeros_like(mean), jnp.zeros((), jnp.int32)
        sigma = jnp.asarray(self.sigma, mean.dtype)
        return State(mean, sigma, eye, eye, zero + 1, zero, zero, count, count, count, unravel)

    def ask(self, state: State, key: Key) -> Population:
        d = state.mean.shape[0]
        n = self.popsize or recombination.default_popsize(d)
        z = recombination.standard_normals(key, n, d, state.mean.dtype)  # (38)
        y = jnp.matmul(z * state.lengths, state.axes.T, precision=EXACT)  # (39)
        return Population(Stepped(state.mean, state.sigma, state.unravel), Step(z, y))  # (40)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        (z, y), d, dtype = population.genomes, state.mean.shape[0], state.mean.dtype
        w = recombination.logarithmic(values, dtype)
        weights, c_sigma, d_sigma, c_c, c_1, c_mu = rates(w, d, self.active)
        generation = state.generation + 1
        y_w = w.positive @ y  # (41)
        mean = state.mean + state.sigma * y_w  # (42), c_m = 1

        # (43); C^(-1/2) y_w = B z_w, without a division
        z_w = jnp.matmul(state.axes, w.positive @ z, precision=EXACT)
        path_sigma = (1 - c_sigma) * state.path_sigma + jnp.sqrt(c_sigma * (2 - c_sigma) * w.mu_eff) * z_w
        norm = jnp.sqrt((path_sigma**2).sum())
        change = c_sigma / d_sigma * (norm / recombination.expected_norm(d) - 1)
        sigma = state.sigma * jnp.exp(jnp.minimum(1, change))  # (44); at most e-fold, as in pycma

        # h_sigma as in pycma: squares instead of norms
        decay = 1 - (1 - c_sigma) ** (2 * generation.astype(dtype))
        h = (norm**2 / decay / d < 2 + 4 / (d + 1)).astype(dtype)
        path_c = (1 - c_c) * state.path_c + h * jnp.sqrt(c_c * (2 - c_c) * w.mu_eff) * y_w  # (45)

        # (46): negative weights times d / ||C^(-1/2) y||^2; ||C^(-1/2) y|| = ||z||
        scaled = weights * jnp.where(weights < 0, d / jnp.maximum((z**2).sum(axis=1), 1e-9), 1)
        kept = 1 + c_1 * (1 - h) * c_c * (2 - c_c) - c_1 - c_mu * weights.sum()
        covariance = kept * state.covariance + c_1 * jnp.outer(path_c, path_c)
        covariance += c_mu * jnp.matmul((scaled[:, None] * y).T, y, precision=EXACT)  # (47)

        gap = jnp.maximum(1, jnp.floor(1 / (10 * d * (c_1 + c_mu)))).astype(jnp.int32)  # section B.2
        matrices = (covariance, state.axes, state.lengths)
        covariance, axes, lengths = recombination.when(generation % gap == 0, decompose, matrices)
        new = State(
            mean, sigma, covariance, axes, lengths, path_sigma, path_c, generation, state.stalled, state.unanswered,
            state.unravel,
        )  # fmt: skip
        new = rescaled(new)._replace(stalled=stalled(state, new, values))
        sound = jnp.isfinite(mean).all() & jnp.isfinite(new.lengths).all() & (new.sigma > 0) & jnp.isfinite(new.sigma)
        new = trees.where(sound, new, state._replace(generation=generation, stalled=state.stalled + 1))
        return settle(state, new, values)

    def moved(self, state: State, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        # (39) backwards: z = D^-1 B' y, of length ||C^(-1/2) y||
        back = lambda y: jnp.matmul(y, state.axes, precision=EXACT) / state.lengths
        genomes = Step(*injection.steps(points, state.mean, state.sigma, population.genomes.z, back))
        return injection.placed(population, points, genomes)

    def recommend(self, state: State) -> Params:
        return state.unravel(state.mean)

    def dispersion(self, state: State, i: Array) -> Dispersion:
        """The distribution's width, for stopping criteria; `i` chooses a principal axis."""
        i = i % state.mean.shape[0]
        std = state.sigma * jnp.sqrt(jnp.diagonal(state.covariance))
        axis = state.sigma * state.lengths[i] * state.axes[:, i]
        shortest, longest = state.lengths.min(), state.lengths.max()
        return Dispersion(state.mean, state.sigma, std, state.sigma * state.path_c, axis, shortest, longest)


def stalled(old: State, new: State, values: Array) -> Array:
    """Consecutive generations without information: all values equal, or steps that rounding swallows."""
    ok = jnp.isfinite(values)
    flat = jnp.max(values, where=ok, initial=-jnp.inf) <= jnp.min(values, where=ok, initial=jnp.inf)
    step = 0.2 * new.sigma * jnp.sqrt(jnp.diagonal(new.covariance))
    lost = (new.mean + step == new.mean).all()
    return jnp.where(flat | lost, old.stalled + 1, 0)


def rescaled(state: State) -> State:
    """The same distribution with C near 1 again, if it drifted past 2^+-30, and sigma within the range of floats."""
    power = jnp.round(jnp.log2(state.lengths[-1]))
    power = jnp.where(jnp.abs(power) > 15, power, 0)
    scale = jnp.exp2(-power).astype(state.sigma.dtype)  # a power of two, so exact
    return state._replace(
        sigma=recombination.representable(state.sigma / scale),
        covariance=state.covariance * scale * scale,
        lengths=state.lengths * scale,
        path_c=state.path_c * scale,
    )


def cma_es(popsize: int | None = None, *, sigma: float = 1.0, active: bool = True) -> CMAES:
    """CMA-ES (Hansen, arXiv 1604.00772) with the constants of pycma 4.5.

    Time O(n d^2) per generation, plus O(d^3) every max(1, 1 / (10 d (c_1 + c_mu))) generations; memory O(d^2 + n d).
    Candidates without an answer are left out: m answers are weighted as a population of m.

    Args:
        popsize: candidates per generation, at least 2; None means 4 + floor(3 ln d).
        sigma: initial standard deviation of every coordinate, in units of the parameters: about a third of the
            distance to the optimum. Scale a parameter that needs a different one in the objective.
        active: give the worse half negative weights, which shrink C where steps failed.

    Raises:
        ValueError: for a popsize below 2 or a sigma that is not positive.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> valley = lambda x: jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)
    >>> result = minimize(valley, jnp.zeros(4), cma_es(sigma=0.5), generations=400, target=1e-7)
    >>> result.reason, int(result.state.stalled)
    ('target', 0)
    """
    check_sigma(sigma)
    return CMAES(popsize, sigma, active)
