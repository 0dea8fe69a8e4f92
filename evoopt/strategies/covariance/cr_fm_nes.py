"""CR-FM-NES: natural evolution with a covariance D (I + v v') D in linear time, its step-size adapted by phase.

Source: Nomura and Ono, "Fast moving natural evolution strategy for high-dimensional problems", CEC 2022, arXiv
2201.11422, as in the first author's program (crfmnes 1.0.0); distance weights and sigma's learning rates from Nomura
and Ono, "Natural evolution strategy for unconstrained and implicitly constrained problems with ridge structure"
(FM-NES), SSCI 2021; the natural gradient of D and v from Akimoto, Auger, Hansen, "Comparison-based natural gradient
optimization in high dimension" (VD-CMA), GECCO 2014.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from evoopt import injection
from evoopt.answers import answered, as_values, told
from evoopt.checks import check_popsize, check_sigma
from evoopt.population import Population
from evoopt.stopping import Dispersion
from evoopt.strategies.covariance import recombination
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree, static


class State(NamedTuple):
    """The state of CR-FM-NES over d parameters."""

    mean: Array  # (d,)
    sigma: Array  # ()
    scales: Array  # (d,), D
    v: Array  # (d,), the one stretched direction
    path_sigma: Array  # (d,)
    path_c: Array  # (d,)
    unanswered: Array  # () int32, generations without a finite answer
    unravel: Any  # vector (d,) -> parameters; no leaves


def stretched(z: Array, v: Array) -> Array:
    """The steps y = (I + (sqrt(1 + |v|^2) - 1) vbar vbar') z for z (..., d)."""
    square = (v**2).sum()
    bar = v / jnp.sqrt(square)
    return z + (jnp.sqrt(1 + square) - 1) * (z @ bar)[..., None] * bar


def unstretched(y: Array, v: Array) -> Array:
    """The inverse of `stretched`."""
    square = (v**2).sum()
    bar = v / jnp.sqrt(square)
    return y + (1 / jnp.sqrt(1 + square) - 1) * (y @ bar)[..., None] * bar


@pytree
class Sample:
    """decode: z (d,) -> mean + sigma D y(z)."""

    mean: Array
    sigma: Array
    scales: Array
    v: Array
    unravel: Any

    def __call__(self, z: Array) -> Params:
        return self.unravel(self.mean + self.sigma * self.scales * stretched(z, self.v))


def distance_exponent(d: int) -> float:
    """h^-1(d): the a that solves (1 + a^2) exp(a^2 / 2) / 0.24 - 10 - d = 0."""
    low, high = 0.0, 10.0 + math.sqrt(math.log(d + 11))
    for _ in range(200):
        a = (low + high) / 2
        low, high = (low, a) if (1 + a * a) * math.exp(a * a / 2) / 0.24 > 10 + d else (a, high)
    return (low + high) / 2


@pytree
class CRFMNES:
    """Cost-reduced fast-moving natural evolution strategy; see `cr_fm_nes`."""

    popsize: int | None = static()
    sigma: float
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        if self.popsize is not None:
            check_popsize(self.popsize, 4, even=True)

    def init(self, params: Params, key: Key) -> State:
        mean, unravel = recombination.flattened(params)
        d, zero = mean.shape[0], jnp.zeros_like(mean)
        v = recombination.standard_normals(key, 1, d, mean.dtype)[0] / math.sqrt(d)
        return State(
            mean, jnp.asarray(self.sigma, mean.dtype), zero + 1, v, zero, zero, jnp.zeros((), jnp.int32), unravel
        )

    def ask(self, state: State, key: Key) -> Population:
        d = state.mean.shape[0]
        n = self.popsize or 2 * (recombination.default_popsize(d) // 2)
        half = recombination.standard_normals(key, n // 2, d, state.mean.dtype)
        z = jnp.concatenate([half, -half])
        return Population(Sample(state.mean, state.sigma, state.scales, state.v, state.unravel), z)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        z, d, dtype = population.genomes, state.mean.shape[0], state.mean.dtype
        ok = answered(values)
        m = jnp.maximum(ok.sum(), 1).astype(dtype)  # lambda: the candidates that answered
        feasible = jnp.isfinite(values).sum().astype(dtype)  # lambda_F
        lengths = jnp.sqrt((z**2).sum(axis=1))
        order = jnp.lexsort((lengths, jnp.where(ok, values, jnp.nan)))  # infeasible ones (+inf) by distance
        rank = jnp.zeros(z.shape[0], dtype).at[order].set(jnp.arange(z.shape[0], dtype=dtype))
        hat = jnp.where(ok, jnp.maximum(0, jnp.log(m / 2 + 1) - jnp.log(rank + 1)), 0)
        share = lambda w: jnp.where(ok, w / jnp.maximum(w.sum(), 1e-30) - 1 / m, 0)
        w_rank = share(hat)
        mu = 1 / jnp.maximum(((w_rank + jnp.where(ok, 1 / m, 0)) ** 2).sum(), 1e-30)
        c_sigma = (mu + 2) / (d + mu + 5)
        c_c = (4 + mu / d) / (d + 4 + 2 * mu / d)

        path_sigma = (1 - c_sigma) * state.path_sigma + jnp.sqrt(c_sigma * (2 - c_sigma) * mu) * (w_rank @ z)
        norm, chi = jnp.sqrt((path_sigma**2).sum()), recombination.expected_norm(d)
        moving, converging = norm >= chi, norm < 0.1 * chi
        # distance weights favour far samples while the search moves
        alpha = distance_exponent(d) * jnp.minimum(1, jnp.sqrt(m / d)) * jnp.sqrt(feasible / m)
        exponent = alpha * lengths
        far = hat * jnp.exp(exponent - exponent.max())  # the same once normalised, and cannot overflow
        w = jnp.where(moving, share(far), w_rank)
        stagnation = jnp.tanh((0.024 * feasible + 0.7 * d + 20) / (d + 12))
        convergence = 2 * jnp.tanh((0.025 * feasible + 0.75 * d + 10) / (d + 4))
        eta_sigma = jnp.where(moving, 1, jnp.where(converging, convergence, stagnation))
        # The paper's (d - 5) / 6 is negative below 5 dimensions and would unlearn the path there.
        c_1 = 2 / ((d + 1.3) ** 2 + mu) * max(0, d - 5) / 6 * feasible / m
        eta_b = jnp.tanh((jnp.minimum(0.02 * feasible, 3 * math.log(d)) + 5) / (0.23 * d + 25))

        y = stretched(z, state.v)
        shift = state.sigma * state.scales * (w @ y)
        path_c = (1 - c_c) * state.path_c + jnp.sqrt(c_c * (2 - c_c) * mu) * shift / state.sigma
        mean = state.mean + shift
        rows = jnp.concatenate([y, (path_c / state.scales)[None]])
        weights = jnp.concatenate([eta_b * w, c_1[None]])
        to_scales, to_v = _gradient(rows, weights, state.v)
        square = (state.v**2).sum()
        v = state.v + to_v / jnp.sqrt(square)
        scales = state.scales * (1 + to_scales)

        g = ((z**2 - 1).sum(axis=1) @ w) / d
        sigma = state.sigma * jnp.exp(eta_sigma / 2 * g)
        scales = scales / jnp.exp(_log_root(scales, v))  # det(D (I + v v') D) = 1
        new = State(
            mean, recombination.representable(sigma), scales, v, path_sigma, path_c, state.unanswered, state.unravel
        )
        return recombination.keep(state, new, values)

    def moved(self, state: State, population: Population, points: Params) -> Population:
        """The candidates at `points`, for injection; see `evoopt.injection`."""
        back = lambda y: unstretched(y, state.v)
        scale = state.sigma * state.scales
        z, _ = injection.steps(points, state.mean, scale, population.genomes, back)
        return injection.placed(population, points, z)

    def dispersion(self, state: State, i: Array) -> Dispersion:
        """The distribution's width, for stopping criteria; columns of D (I + v v')^(1/2) stand for principal axes."""
        relative = state.scales * jnp.sqrt(1 + state.v**2)  # the diagonal of D (I + v v') D
        d, v = state.v.shape[0], state.v
        column = stretched((jnp.arange(d, dtype=jnp.int32) == i % d).astype(v.dtype), v)
        axis, path = state.sigma * state.scales * column, state.sigma * state.path_c
        std = state.sigma * relative
        return Dispersion(state.mean, state.sigma, std, path, axis, relative.min(), relative.max())

    def recommend(self, state: State) -> Params:
        return state.unravel(state.mean)


def _log_root(scales: Array, v: Array) -> Array:
    """The logarithm of det(A)^(1/d) for A = D (I + v v')^(1/2)."""
    d = v.shape[0]
    return jnp.log(scales).sum() / d + jnp.log1p((v**2).sum()) / (2 * d)


def _gradient(y: Array, weights: Array, v: Array) -> tuple[Array, Array]:
    """The weighted natural gradients of D (relative) and v (times |v|): VD-CMA, theorem 3.1; y is (k, d)."""
    square = (v**2).sum()
    bar = v / jnp.sqrt(square)
    bar2, gamma = bar**2, 1 + square
    alpha = jnp.minimum(1, jnp.sqrt(square**2 + (2 * gamma - jnp.sqrt(gamma)) / bar2.max()) / (2 + square))
    b = -(1 - alpha**2) * square**2 / gamma + 2 * alpha**2
    inverse = 1 / (2 - (b + 2 * alpha**2) * bar2)  # H^-1
    inner = (y @ bar)[:, None]
    t = y * inner - bar * (inner**2 + gamma) / 2
    s = y**2 - square / gamma * (y * bar * inner) - 1
    s = s - alpha / gamma * ((2 + square) * (t * bar) - square * (t @ bar)[:, None] * bar2)
    s = s * inverse - b / (1 + b * (bar2 * inverse * bar2).sum()) * (s @ (inverse * bar2))[:, None] * (inverse * bar2)
    t = t - alpha * ((2 + square) * (s * bar) - (s @ bar2)[:, None] * bar)
    return weights @ s, weights @ t


def cr_fm_nes(popsize: int | None = None, *, sigma: float = 1.0) -> CRFMNES:
    """CR-FM-NES (Nomura and Ono 2022). Time and memory O(n d).

    Args:
        popsize: candidates per generation, at least 4 and even; None means 4 + floor(3 ln d), made even.
        sigma: initial standard deviation of every coordinate, in units of the parameters.

    Raises:
        ValueError: for a popsize that is odd or below 4, or a sigma that is not positive.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> valley = lambda x: jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)
    >>> minimize(valley, jnp.zeros(6), cr_fm_nes(sigma=0.5), generations=2000, target=1e-6).reason
    'target'
    """
    check_sigma(sigma)
    return CRFMNES(popsize, sigma)
