"""CMA-ES with margin: no whole number is left with so small a probability that the search can't come back to it.

Sources: Hamano, Saito, Nomura, Shirakawa, "CMA-ES with margin: lower-bounding marginal probability for mixed-integer
black-box optimization", GECCO 2022, arXiv 2205.13482, section 4.

The paper samples v = m + sigma A y and gives x = m + sigma y to CMA-ES. Strategies are translation invariant, so a mean
M beside the strategy's own m does the same for any of them: v = M + A (x - m).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri

from evoopt.types import Array

TINY = 1e-7  # probabilities are held this far from 0 and 1/2, whose quantiles are infinite and 0


class Cells(NamedTuple):
    """The thresholds next to the mean, for each coordinate: (d,). At an end of the range low == up."""

    low: Array
    up: Array


def corrected(mean: Array, scale: Array, std: Array, cells: Cells, alpha: Any) -> tuple[Array, Array]:
    """The mean and A whose marginal probabilities of other cells are at least alpha: (d,), (d,).

    Args:
        mean: M, after the update.
        scale: A.
        std: sigma sqrt(C_jj), without A.
        cells: around the mean.
        alpha: the margin; the paper's is 1 / (d popsize).
    """
    low, up = cells
    alpha = jnp.asarray(alpha, mean.dtype)
    std = jnp.maximum(std, jnp.finfo(std.dtype).tiny)
    quantile = lambda p: -ndtri(jnp.clip(p, TINY, 0.5 - TINY))  # sqrt(chi2_ppf(1 - 2 p)): the distance with tail p
    below, beyond = ndtr((low - mean) / (scale * std)), ndtr((mean - up) / (scale * std))

    # One threshold: at an end of the range, and wherever there are two values.
    # Deviation: A is at least so large that floats still tell the mean from the threshold, however small sigma becomes.
    a = jnp.maximum(scale, 64 * jnp.finfo(mean.dtype).eps * jnp.maximum(jnp.abs(up), 1) / std)
    rare = jnp.minimum(below, beyond)
    sign = jnp.where(mean < up, -1, 1).astype(mean.dtype)
    distance = a * std * quantile(jnp.maximum(rare, alpha))
    at_end = up + sign * distance

    # Two thresholds: each of the three cells gets at least half the margin, the others pay for it in proportion.
    p_low, p_up = jnp.maximum(below, alpha / 2), jnp.maximum(beyond, alpha / 2)
    p_mid = 1 - below - beyond
    surplus = (1 - p_low - p_up - p_mid) / (p_low + p_mid + p_up - 1.5 * alpha)
    p_low, p_up = p_low + surplus * (p_low - alpha / 2), p_up + surplus * (p_up - alpha / 2)
    q_low, q_up = quantile(p_low), quantile(p_up)
    inner_mean = (low * q_up + up * q_low) / (q_low + q_up)
    inner_scale = (up - low) / ((q_low + q_up) * std)

    edge = (up <= low) | (jnp.maximum(below, beyond) > 0.5)
    return jnp.where(edge, at_end, inner_mean), jnp.where(edge, a, inner_scale)


def swappable(keys: Array, std: Array, alpha: Any) -> Array:
    """The means of an order's keys, (n,), so close that neighbours change places with probability alpha at least.

    Ours, in the manner of the margin: an order depends on differences of keys over their deviations only, and without
    a bound these grow until no other order is drawn.
    """
    place = jnp.argsort(keys, stable=True)
    ordered, s = keys[place], std[place]
    most = -ndtri(jnp.asarray(alpha, keys.dtype)) * jnp.sqrt(s[1:] ** 2 + s[:-1] ** 2)
    gaps = jnp.minimum(ordered[1:] - ordered[:-1], most)
    closer = jnp.concatenate([jnp.zeros(1, keys.dtype), jnp.cumsum(gaps)])
    return jnp.zeros_like(keys).at[place].set(closer - closer.mean())
