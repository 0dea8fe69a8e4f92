"""SubZero: zeroth-order descent in a random subspace of every matrix, Z = U S V^T with orthonormal U and V.

Source: Yu, Zhou, Wang, Li, Huang, "SubZero: random subspace zeroth-order optimization for memory-efficient LLM
fine-tuning", ICCV 2025, arXiv 2410.08989, algorithms 1 to 3. U (m, rank) and V (n, rank) are the Q factors of Gaussian
matrices, kept for `interval` steps; S (rank, rank) is drawn every step. As in the released code, Z is scaled by
sqrt(m n) / rank, so that it is as long as Gaussian noise and the estimate is unbiased over subspaces. The bases are
redrawn from their key, not stored.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from evoopt import noise as noises
from evoopt import trees
from evoopt.answers import as_values, told
from evoopt.checks import check_popsize
from evoopt.population import Population
from evoopt.strategies.gaussian import sampling
from evoopt.strategies.zeroth_order import probes
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree, static


class State(NamedTuple):
    """The state of SubZero."""

    mean: Params
    basis: Key  # (), key of the U and V in use
    steps: Array  # () int32, steps taken
    unanswered: Array  # () int32, steps without a usable probe


def subspace(seed: tuple[Key, Key], shape: tuple[int, int], rank: int, dtype: Any) -> tuple[Array, Array]:
    """U S sqrt(m n) / rank, and V: S from the step's key, orthonormal U and V from the kept one."""
    m, n = shape
    rank = min(rank, m, n)  # no more orthonormal columns than rows
    z = noises.normals(seed[1], (m + n) * rank, dtype)
    u, v = jnp.linalg.qr(z[: m * rank].reshape(m, rank))[0], jnp.linalg.qr(z[m * rank :].reshape(n, rank))[0]
    s = noises.normals(seed[0], rank * rank, dtype).reshape(rank, rank)
    return u @ s * jnp.asarray(math.sqrt(m * n) / rank, dtype), v


@pytree
class SubZero:
    """MeZO along U S V^T; see `subzero`."""

    popsize: int = static()
    sigma: float
    learning_rate: float
    rank: int = static()
    interval: int  # T0, steps between redraws of the subspace
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        probes.check(self.popsize, self.sigma)
        check_popsize(self.rank, 1, name="rank")
        if isinstance(self.interval, int):
            check_popsize(self.interval, 1, name="interval")

    def init(self, params: Params, key: Key) -> State:
        zero = jnp.zeros((), jnp.int32)
        return State(probes.movable(params, self.sigma), noises.replayable(key), zero, zero)

    def ask(self, state: State, key: Key) -> Population:
        key = noises.replayable(key)
        basis = trees.where(state.steps % self.interval == 0, noises.fold_in(key, self.popsize), state.basis)
        return probes.pairs(noises.Kept(self.rank, subspace), state.mean, self.sigma, (key, basis), self.popsize)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        weights = self.learning_rate * probes.average(probes.slopes(values, self.sigma))
        addresses = probes.directions(population)
        mean = probes.step(state.mean, noises.Kept(self.rank, subspace), addresses, weights)
        new = State(mean, addresses[1][0], state.steps + 1, state.unanswered)
        return probes.settle_in_place(state, new, sampling.antithetic.used(values))

    def recommend(self, state: State) -> Params:
        return state.mean


def subzero(
    popsize: int = 2, *, sigma: float = 1e-3, learning_rate: float = 1e-6, rank: int = 8, interval: int = 1000
) -> SubZero:
    """SubZero (Yu et al. 2025): MeZO in random subspaces of rank x rank numbers per matrix.

    Args:
        popsize: forward passes per step, 2 n.
        sigma: length of a probe, in units of the parameters, as for Gaussian noise.
        learning_rate: constant.
        rank: rank of U and V, at most the smaller side of a matrix.
        interval: T0, steps after which U and V are redrawn. Vectors are searched along Gaussian noise.

    >>> from evoopt import minimize
    >>> strategy = subzero(learning_rate=0.05, rank=2, interval=5)
    >>> result = minimize(lambda w: jnp.sum((w - 1.0) ** 2), jnp.zeros((3, 2)), strategy, generations=400)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 1e-2)
    True
    """
    return SubZero(popsize, sigma, learning_rate, rank, interval)
