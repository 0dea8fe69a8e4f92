"""Linear and quadratic models of an objective, fitted to points by weighted least squares: of fixed shapes, in batches.

Source: Hansen, "A global surrogate assisted CMA-ES", GECCO 2019, section 3: the model has as many terms as there are
data for: linear, then with squares, then with products. Unlike there, points are centred and scaled before they are
squared, so that the normal equations hold in float32 too; for the linear and the full model that changes nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve, solve_triangular

from evoopt.types import Array

EXACT = jax.lax.Precision.HIGHEST  # accelerators otherwise round float32 products to 10 bits
LINEAR, SQUARES, FULL = range(3)  # kinds of models


class Quadratic(NamedTuple):
    """A model x -> level + coefficients . features(u), where x = center + axes u."""

    center: Array  # (d,)
    axes: Array  # (d, d), lower triangular
    inverse: Array  # (d, d), of the axes
    coefficients: Array  # (terms,)
    level: Array  # ()
    kind: Array  # () int32, LINEAR, SQUARES or FULL

    def __call__(self, x: Array) -> Array:
        """Values at x (n, d), (n,), without the level, which is best added last."""
        u = jnp.matmul(x - self.center, self.inverse.T, precision=EXACT)
        return jnp.matmul(features(u), self.coefficients, precision=EXACT)


def terms(d: int) -> tuple[int, int, int]:
    """How many coefficients the models in d dimensions have, by their kind.

    >>> terms(5)
    (6, 11, 21)
    """
    return d + 1, 2 * d + 1, d * (d + 3) // 2 + 1


def features(u: Array) -> Array:
    """1, u_i, u_i^2 and u_i u_j of points (n, d): (n, terms)."""
    i, j = np.triu_indices(u.shape[1], 1)
    return jnp.concatenate([jnp.ones_like(u[:, :1]), u, u * u, u[:, i] * u[:, j]], axis=1)


def empty(d: int, dtype: np.dtype) -> Quadratic:
    """The model 0."""
    eye, zero = jnp.eye(d, dtype=dtype), jnp.zeros((), dtype)
    return Quadratic(jnp.zeros(d, dtype), eye, eye, jnp.zeros(terms(d)[FULL], dtype), zero, jnp.zeros((), jnp.int32))


def fit(x: Array, y: Array, weights: Array, kind: Array) -> Quadratic:
    """The model of this kind with the least sum of (weights * errors)^2; of several, that with small coefficients.

    Args:
        x: points, (m, d).
        y: their values, (m,), finite where the weight is not 0.
        weights: (m,), 0 for a point that does not count.
        kind: () int32.
    """
    d, eps = x.shape[1], jnp.finfo(x.dtype).eps
    some = weights > 0
    level = jnp.min(y, where=some, initial=jnp.inf)
    level = jnp.where(jnp.isfinite(level), level, 0)
    y = jnp.where(some, y - level, 0).astype(x.dtype)
    share = weights / jnp.maximum(weights.sum(), eps)
    # Centred twice: points that lie close together far from 0 leave their rounding in the first mean.
    center = share @ x
    center = center + share @ (x - center)
    away = jnp.where(some[:, None], x - center, 0)
    width = jnp.sqrt(share @ away**2)
    width = jnp.where(width > 0, width, 1)
    away = away / width
    # Products are as well conditioned as the points themselves in coordinates without correlation. Squares alone are
    # not those of other coordinates, so a model of squares keeps the objective's.
    correlation = jnp.matmul((share[:, None] * away).T, away, precision=EXACT) + 64 * eps * jnp.eye(d, dtype=x.dtype)
    root = jnp.where(kind == FULL, jnp.linalg.cholesky(correlation), jnp.eye(d, dtype=x.dtype))
    back = solve_triangular(root, jnp.eye(d, dtype=x.dtype), lower=True)
    u = jnp.matmul(away, back.T, precision=EXACT)
    used = jnp.arange(terms(d)[FULL], dtype=jnp.int32) < jnp.asarray(terms(d), jnp.int32)[kind]
    z = jnp.where(used, weights[:, None] * features(u), 0)
    normal = jnp.matmul(z.T, z, precision=EXACT)
    ridge = 16 * eps * jnp.trace(normal)
    factor = jnp.linalg.cholesky(
        normal + jnp.maximum(ridge, jnp.finfo(x.dtype).tiny) * jnp.eye(len(used), dtype=x.dtype)
    )
    solve = lambda errors: cho_solve((factor, True), jnp.matmul(z.T, errors, precision=EXACT))
    coefficients = solve(weights * y)
    for _ in range(2):  # what rounding and the ridge left
        coefficients = coefficients + solve(weights * y - jnp.matmul(z, coefficients, precision=EXACT))
    sound = jnp.isfinite(coefficients).all()
    return Quadratic(
        center, width[:, None] * root, back / width, jnp.where(sound, coefficients, 0), level.astype(x.dtype), kind
    )  # fmt: skip


def hessian(model: Quadratic) -> Array:
    """Second derivatives in the coordinates u: (d, d)."""
    d = model.center.shape[0]
    i, j = np.triu_indices(d, 1)
    products = jnp.zeros((d, d), model.center.dtype).at[i, j].set(model.coefficients[2 * d + 1 :])
    return products + products.T + 2 * jnp.diag(model.coefficients[d + 1 : 2 * d + 1])


def optimum(model: Quadratic, best: Array) -> Array:
    """Where the model is least, as seen from `best` (d,): (d,); of a linear one, a point far down.

    A convex model's optimum does not depend on `best`. Of others this is no saddle: where the curvature is negative,
    the step goes down as far as it would for a positive one (Dauphin et al., "Identifying and attacking the saddle
    point problem", 2014). Deviation: Hansen's implementation goes to the saddle, and solves fewer functions.
    """
    d = model.center.shape[0]
    second = hessian(model)
    b = jnp.matmul(model.inverse, best - model.center, precision=EXACT)
    gradient = model.coefficients[1 : d + 1] + jnp.matmul(second, b, precision=EXACT)
    curvature, vectors = jnp.linalg.eigh(second)
    curvature = jnp.abs(curvature)
    flat = curvature <= d * jnp.finfo(curvature.dtype).eps * curvature.max()
    steps = jnp.where(flat, 0, (gradient @ vectors) / jnp.where(flat, 1, curvature))
    norm = jnp.sqrt((gradient**2).sum())
    down = 2 * np.asarray(np.sqrt(d), norm.dtype) * gradient / jnp.where(norm > 0, norm, 1)
    return best - model.axes @ jnp.where(model.kind == LINEAR, down, vectors @ steps)
