"""Gaussian-process regression for surrogates: a Matern-5/2 kernel with a lengthscale for each number, fitted by MAP.

Sources: Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), algorithm 2.1 and equation 4.17; the
prior of the lengthscales is that of Hvarfner, Hellsten, Nardi, "Vanilla Bayesian optimization performs great in high
dimensions", ICML 2024; the expected improvement in logarithms is that of Ament et al., "Unexpected improvements to
expected improvement for Bayesian optimization", NeurIPS 2023.

Arrays have room for a fixed number of points, and a mask says which are there: shapes never change.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import optax

from evoopt.types import Array

STEPS = 30  # of L-BFGS in a fit
LEAST_NOISE = 1e-6  # variance, of values with variance 1
NOISE = (-6.0, 2.0)  # mean and standard deviation of the logarithm of the noise's variance


class Data(NamedTuple):
    """Points in the unit box and what was seen there."""

    x: Array  # (n, d)
    values: Array  # (n,), with mean 0 and variance 1; anything where there is no point
    there: Array  # (n,) bool


class Scales(NamedTuple):
    """Hyperparameters, in logarithms."""

    lengths: Array  # (d,)
    noise: Array  # (), of the variance


class Process(NamedTuple):
    """A fitted process."""

    data: Data
    scales: Scales
    chol: Array  # (n, n), of the covariance with noise; rows of the identity where there is no point
    alpha: Array  # (n,), the inverse covariance times y


def scales(d: int, dtype: Any) -> Scales:
    """Where a fit begins: the mode of the prior."""
    mean, std = _prior(d)
    return Scales(jnp.full(d, mean - std**2, dtype), jnp.asarray(NOISE[0], dtype))


def _prior(d: int) -> tuple[float, float]:
    """Mean and standard deviation of the logarithm of a lengthscale."""
    return math.sqrt(2) + math.log(d) / 2, math.sqrt(3)


def matern(a: Array, b: Array, lengths: Array) -> Array:
    """The kernel between the rows of a (n, d) and of b (m, d): (n, m). Rasmussen and Williams 4.17 with nu = 5/2."""
    difference = (a[:, None, :] - b[None, :, :]) / lengths
    square = (difference**2).sum(axis=2)
    r = jnp.sqrt(5 * jnp.maximum(square, 1e-12))  # the root has no derivative at 0
    return (1 + r + r**2 / 3) * jnp.exp(-r)


def _covariance(data: Data, scales: Scales) -> Array:
    pairs = data.there[:, None] & data.there[None, :]
    k = jnp.where(pairs, matern(data.x, data.x, jnp.exp(scales.lengths)), 0)
    return k + jnp.diag(jnp.where(data.there, jnp.exp(scales.noise) + _jitter(k.dtype), 1))


def _jitter(dtype: Any) -> Any:
    return jnp.asarray(max(LEAST_NOISE, 30 * float(jnp.finfo(dtype).eps)), dtype)


def loss(scales: Scales, data: Data) -> Array:
    """Minus the logarithm of the posterior of the hyperparameters: (). Algorithm 2.1, line 7, and the priors."""
    chol = jnp.linalg.cholesky(_covariance(data, scales))
    y = jnp.where(data.there, data.values, 0)
    half = jsp.linalg.solve_triangular(chol, y, lower=True)
    evidence = (half**2).sum() / 2 + jnp.log(jnp.diagonal(chol)).sum()
    mean, std = _prior(data.x.shape[1])
    prior = (((scales.lengths - mean) / std) ** 2).sum() / 2 + scales.lengths.sum()  # log-normal, in the lengths
    return evidence + prior + ((scales.noise - NOISE[0]) / NOISE[1]) ** 2 / 2


def fit(data: Data, start: Scales, steps: int = STEPS) -> Process:
    """The process whose hyperparameters have the largest posterior, from `start` by L-BFGS."""
    objective = lambda s: loss(s, data)
    solver = optax.lbfgs(memory_size=8, linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=8))
    gradient = optax.value_and_grad_from_state(objective)

    def step(carry: Any, _: Any) -> Any:
        now, state, best, least = carry
        value, grad = gradient(now, state=state)
        better = value < least
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), now, best)
        updates, state = solver.update(grad, state, now, value=value, grad=grad, value_fn=objective)
        after: Any = optax.apply_updates(now, updates)
        sound = jnp.isfinite(after.lengths).all() & jnp.isfinite(after.noise)
        after = jax.tree.map(lambda a, b: jnp.where(sound, jnp.clip(a, -12, 12), b), after, best)
        return (after, state, best, jnp.where(better, value, least)), None

    begin = (start, solver.init(start), start, jnp.asarray(jnp.inf, data.x.dtype))
    best = jax.lax.scan(step, begin, None, length=steps)[0][2]
    return conditioned(data, best)


def conditioned(data: Data, scales: Scales) -> Process:
    """The process with these hyperparameters. Algorithm 2.1, lines 2 and 3."""
    chol = jnp.linalg.cholesky(_covariance(data, scales))
    alpha = jsp.linalg.cho_solve((chol, True), jnp.where(data.there, data.values, 0))
    return Process(data, scales, chol, alpha)


def posterior(process: Process, x: Array) -> tuple[Array, Array]:
    """Mean and standard deviation at the rows of x (m, d): (m,), (m,). Algorithm 2.1, lines 4 to 6."""
    k = matern(process.data.x, x, jnp.exp(process.scales.lengths))
    k = jnp.where(process.data.there[:, None], k, 0)
    v = jsp.linalg.solve_triangular(process.chol, k, lower=True)
    return k.T @ process.alpha, jnp.sqrt(jnp.maximum(1 - (v**2).sum(axis=0), 1e-10))


def log_expected_improvement(process: Process, x: Array, best: Array) -> Array:
    """The logarithm of the expected improvement over `best`, for values to be small: (m,). Ament et al., equation 9."""
    mean, std = posterior(process, x)
    return jnp.log(std) + _log_h((best - mean) / std)


def _log_h(z: Array) -> Array:
    """log(phi(z) + z Phi(z)), also where z is far below 0."""
    near = jnp.maximum(z, -1)
    direct = jnp.log(jsp.stats.norm.pdf(near) + near * jsp.stats.norm.cdf(near))
    far = jnp.minimum(z, -1)
    # Phi(z)/phi(z) = exp(log Phi - log phi); phi + z Phi = phi (1 + z Phi/phi), of which the bracket is about 1/z^2
    bracket = 1 + far * jnp.exp(jsp.stats.norm.logcdf(far) - jsp.stats.norm.logpdf(far))
    least = 1 / (far**2 + 3)  # a lower bound of the bracket, which it loses to rounding
    tail = jsp.stats.norm.logpdf(far) + jnp.log(jnp.maximum(bracket, least))
    return jnp.where(z > -1, direct, tail)
