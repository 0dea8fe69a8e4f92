"""A categorical distribution that is learned beside a Gaussian: the categories of CatCMA.

Source: Hamano, Saito, Nomura, Uchida, Shirakawa, "CatCMA: stochastic optimization for mixed-category problems", GECCO
2024, arXiv 2405.09962: section 3 (joint distribution, natural gradient, margin); Akimoto et al., "Adaptive stochastic
natural gradient method for one-shot neural architecture search", ICML 2019 (ASNG, the step-size).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evoopt.strategies.populations import variation
from evoopt.types import Array, Key

STARTED = 0.5  # the probability of a choice to start from: a wrong one costs half of a generation
ALPHA = 1.5  # ASNG: how much of the accumulated signal is expected of noise alone


class State(NamedTuple):
    """c categories of at most k choices."""

    q: Array  # (c, k), probabilities; 0 beyond a category's own choices
    path: Array  # (c, k), s of ASNG; the last choice of each has none
    gamma: Array  # (), how much of the path there is
    trust: Array  # (), Delta: the step is 1 / Delta


def initial(sizes: tuple[int, ...], dtype: np.dtype) -> State:
    """Uniform distributions over `sizes` choices."""
    q = _own(sizes) / np.asarray(sizes)[:, None]
    one = jnp.ones((), dtype)
    return State(jnp.asarray(q, dtype), jnp.zeros(q.shape, dtype), 0 * one, one)


def started(state: State, sizes: tuple[int, ...], places: Array, given: Array) -> State:
    """The state with most probability at the choices (c,) where they are `given` (c,); others share the rest."""
    k = np.asarray(sizes)[:, None]
    first = jax.nn.one_hot(places, state.q.shape[1], dtype=bool)
    rest = _own(sizes) * (1 - STARTED) / (k - 1)
    q = jnp.where(first, STARTED, jnp.asarray(rest, state.q.dtype)).astype(state.q.dtype)
    return state._replace(q=jnp.where(given[:, None], q, state.q))


def sampled(state: State, key: Key, n: int) -> Array:
    """Choices of n candidates, (n, c) int32."""
    u = variation.uniforms(key, (n, state.q.shape[0], 1), state.q.dtype)
    ends = jnp.cumsum(state.q, axis=1)
    # The last sum is 1 but for rounding, which must not lead to a choice that there is not.
    return jnp.minimum((u >= ends).sum(axis=2), (state.q > 0).sum(axis=1) - 1).astype(jnp.int32)


def learned(state: State, sizes: tuple[int, ...], choices: Array, weights: Array) -> State:
    """The state after an update with the candidates' weights, (n,), which are 0 for the worse half and sum to 1."""
    q, dtype, k = state.q, state.q.dtype, state.q.shape[1]
    own = jnp.asarray(_own(sizes), bool)
    last = jnp.asarray(np.arange(k) == np.asarray(sizes)[:, None] - 1)
    drawn = jax.nn.one_hot(choices, k, dtype=dtype)  # (n, c, k)
    gradient = jnp.where(own, (weights[:, None, None] * (drawn - q)).sum(axis=0), 0)
    # The gradient in units of the square root of the Fisher information: ASNG, appendix B.
    root = jnp.sqrt(jnp.where(own, q, 1))
    q_last, rest = jnp.where(last, q, 0).sum(axis=1, keepdims=True), jnp.where(last, 0, gradient)
    signal = rest / root + root * rest.sum(axis=1, keepdims=True) / (q_last + jnp.sqrt(q_last))
    signal = jnp.where(own & ~last, signal, 0)
    norm = jnp.sqrt((signal**2).sum()) + jnp.asarray(1e-30, dtype)
    step = 1 / state.trust
    q = q + step / norm * gradient
    beta = step / np.asarray(math.sqrt(sum(sizes) - len(sizes)), dtype)
    path = (1 - beta) * state.path + jnp.sqrt(beta * (2 - beta)) * signal / norm
    gamma = (1 - beta) ** 2 * state.gamma + beta * (2 - beta)
    trust = state.trust * jnp.exp(beta * (gamma - (path**2).sum() / np.asarray(ALPHA, dtype)))
    # The rate beta of the path is at most 1, and no number overflows in runs of any length.
    least = np.asarray(1 / math.sqrt(sum(sizes) - len(sizes)), dtype)
    return State(_held(q, sizes), path, gamma, jnp.clip(trust, least, np.asarray(1e30, dtype)))


def _held(q: Array, sizes: tuple[int, ...]) -> Array:
    """q with no probability below the margin: each category is all right with probability 0.73^(1/c) at most."""
    counts = np.asarray(sizes)[:, None]
    own = jnp.asarray(_own(sizes), bool)
    least = np.asarray((1 - 0.73 ** (1 / len(sizes))) / (counts - 1), q.dtype)
    q = jnp.where(own, jnp.maximum(q, least), 0)
    total = q.sum(axis=1, keepdims=True)
    q = q - jnp.where(own, (total - 1) * (q - least) / (total - least * counts.astype(q.dtype)), 0)
    return q / q.sum(axis=1, keepdims=True)


def _own(sizes: tuple[int, ...]) -> np.ndarray:
    """Which places are choices, (c, k) float."""
    return (np.arange(max(sizes)) < np.asarray(sizes)[:, None]).astype(float)
