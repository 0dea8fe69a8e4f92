"""CMA-ES with margin: no whole number is left with so small a probability that the search can't come back to it.

Sources: Hamano, Saito, Nomura, Shirakawa, "CMA-ES with margin: lower-bounding marginal probability for mixed-integer
black-box optimization", GECCO 2022, arXiv 2205.13482, equations (9) to (23); where there is one threshold, the lower
bound of A of Hamano et al., "CatCMA with margin", GECCO 2025, arXiv 2504.07884.

The paper samples v = m + sigma A y and gives x = m + sigma y to CMA-ES. Strategies are translation invariant, so a mean M
beside the strategy's own m does the same for any of them: v = M + A (x - m).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri

from evoopt.types import Array

TINY = 1e-7  # probabilities are held this far from 0 and 1/2, whose quantiles are infinite and 0


class Cells(NamedTuple):
    """Where the mean's cell ends, for each coordinate: thresholds and middle, (d,); at an end of the range low == up."""

    low: Array
    up: Array
    middle: Array


def corrected(mean: Array, scale: Array, std: Array, cells: Cells, alpha: Any) -> tuple[Array, Array]:
    """The mean and A whose marginal probabilities of other cells are at least alpha: (d,), (d,).

    Args:
        mean: M, after the update.
        scale: A.
        std: sigma sqrt(C_jj), without A.
        cells: around the mean.
        alpha: the margin; the paper's is 1 / (d popsize).
    """
    low, up, middle = cells
    alpha = jnp.asarray(alpha, mean.dtype)
    std = jnp.maximum(std, jnp.finfo(std.dtype).tiny)
    quantile = lambda p: -ndtri(jnp.clip(p, TINY, 0.5 - TINY))  # sqrt(chi2_ppf(1 - 2 p)): the distance with tail p
    below, beyond = ndtr((low - mean) / (scale * std)), ndtr((mean - up) / (scale * std))  # (12), (13)

    # One threshold: at an end of the range, and wherever there are two values.
    # The lower bound of A keeps the mean in the middle of its cell or further out, or it would come so close to the
    # threshold that floats don't tell them apart.
    a = jnp.maximum(scale, jnp.abs(middle - up) / (std * quantile(alpha)))
    rare = jnp.minimum(below, beyond)
    sign = jnp.where(mean < up, -1, 1).astype(mean.dtype)
    distance = a * std * quantile(jnp.maximum(rare, alpha))  # (11)
    at_end = up + sign * distance

    # Two thresholds: (14) to (23).
    p_low, p_up = jnp.maximum(below, alpha / 2), jnp.maximum(beyond, alpha / 2)
    p_mid = 1 - below - beyond
    surplus = (1 - p_low - p_up - p_mid) / (p_low + p_mid + p_up - 1.5 * alpha)
    p_low, p_up = p_low + surplus * (p_low - alpha / 2), p_up + surplus * (p_up - alpha / 2)
    q_low, q_up = quantile(p_low), quantile(p_up)
    inner_mean = (low * q_up + up * q_low) / (q_low + q_up)
    inner_scale = (up - low) / ((q_low + q_up) * std)

    edge = (up <= low) | (jnp.maximum(below, beyond) > 0.5)
    return jnp.where(edge, at_end, inner_mean), jnp.where(edge, a, inner_scale)
