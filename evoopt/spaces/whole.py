"""Whole numbers in a Gaussian: a floor under their deviation, and steps counted from where they were evaluated.

Sources: Marty, Hansen, Auger, Semet, Heron, "LB+IC-CMA-ES: two simple modifications of CMA-ES to handle mixed-integer
problems", PPSN 2024 (floor and centering); Hamano et al., GECCO 2022, arXiv 2205.13482 (a matrix beside C).

Strategies are translation invariant, so a mean M and a diagonal A beside the strategy's own m do for any of them:
candidates are v = M + A (x - m), and M moves by A (m' - m).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.scipy.special import ndtri

from evoopt.types import Array

FLOOR = 0.2  # of the deviation, in steps: a neighbour is drawn once in 80 times from the middle of a cell


def widened(scale: Array, std: Array, steps: Array, mu_eff: Array) -> Array:
    """A, (d,), with which no deviation is below min(0.2, mu_eff / d) steps.

    It never shrinks again: what a covariance matrix learns of a coordinate has to show in its candidates.

    Args:
        scale: A before.
        std: sigma sqrt(C_jj), without A.
        steps: from a whole number to the next, (d,).
        mu_eff: of the weights.
    """
    least = jnp.minimum(jnp.asarray(FLOOR, std.dtype), mu_eff / len(std)) * steps
    return jnp.maximum(scale, least / jnp.maximum(std, jnp.finfo(std.dtype).tiny))


def centering(v: Array, cells: Array, centers: Array, own: Array, weights: Array) -> Array:
    """How much further M goes, (d,), if candidates of another cell than its own count from the middle of their cell.

    Where within its cell a candidate was drawn did not matter, so a rare step to a neighbour, mostly drawn just beyond
    the threshold, would bring M only a part of the way. Deviation: the paper centers before the covariance is updated,
    and moves the rest against the bias.

    Args:
        v: candidates, (n, d).
        cells, centers: the whole numbers that they are, and where those are in units of v, (n, d).
        own: the whole numbers of M, (d,).
        weights: (n,), of the better half; 0 for others.
    """
    moves = (cells != own) & (weights > 0)[:, None]
    return jnp.where(moves, weights[:, None] * (centers - v), 0).sum(axis=0)


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
