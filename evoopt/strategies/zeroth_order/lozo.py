"""LOZO and LOZO-M: zeroth-order descent along low-rank directions U V^T, with U drawn every step and V kept for many.

Source: Chen, Zhang, Cao, Yuan, Wen, "Enhancing zeroth-order fine-tuning for language models with low-rank structures",
ICLR 2025, arXiv 2410.07698, algorithms 1 and 2. As in the paper and unlike the released code, the step is divided by
the rank, which makes the estimate unbiased. In the code, a step that redraws V does not use the U it probed; here both
are drawn from one address, (key of U, key of V), which the genomes carry.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
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
    """The state of LOZO."""

    mean: Params
    momentum: Params  # N, shaped like U for a matrix, (m, rank) or (layers, m, rank); for a vector the momentum itself
    basis: Key  # (), key of the V in use
    steps: Array  # () int32, steps taken
    unanswered: Array  # () int32, steps without a usable probe


def lazy(seed: tuple[Key, Key], shape: tuple[int, int], rank: int, dtype: Any) -> tuple[Array, Array]:
    """U (m, rank) from the step's key and V (n, rank) from the kept one, both standard normal."""
    draw = lambda key, rows: noises.normals(key, rows * rank, dtype).reshape(rows, rank)
    return draw(seed[0], shape[0]), draw(seed[1], shape[1])


@pytree
class LOZO:
    """Descent along U V^T, with or without momentum in U; see `lozo` and `lozo_m`."""

    popsize: int = static()
    sigma: float
    learning_rate: float
    rank: int = static()
    interval: int  # nu, steps between redraws of V
    momentum: float  # b1
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        probes.check(self.popsize, self.sigma)
        check_popsize(self.rank, 1, name="rank")
        if isinstance(self.interval, int):
            check_popsize(self.interval, 1, name="interval")

    def init(self, params: Params, key: Key) -> State:
        mean, noise = probes.movable(params, self.sigma), noises.Kept(self.rank, lazy)
        leaves, treedef = jax.tree.flatten(mean)

        def momentum(x: Array, kind: Any) -> Array:
            if isinstance(kind, noises.Fresh):
                return jnp.zeros(x.shape, noises.wide(x))
            layers, shape = (x.shape[:1], x.shape[1:]) if noises.is_cut(kind, x) else ((), x.shape)
            return jnp.zeros((*layers, math.prod(shape[: noises.split(shape)]), self.rank), noises.wide(x))

        zero = jnp.zeros((), jnp.int32)
        n = treedef.unflatten([momentum(x, kind) for x, kind in zip(leaves, noise.kinds(mean), strict=True)])
        return State(mean, n, noises.replayable(key), zero, zero)

    def ask(self, state: State, key: Key) -> Population:
        key = noises.replayable(key)
        basis = trees.where(state.steps % self.interval == 0, noises.fold_in(key, self.popsize), state.basis)
        return probes.pairs(noises.Kept(self.rank, lazy), state.mean, self.sigma, (key, basis), self.popsize)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        used = sampling.antithetic.used(values)
        some = jnp.isfinite(used).any()
        weights = probes.average(probes.slopes(values, self.sigma))
        fresh, bases = probes.directions(population)
        basis, noise = bases[0], noises.Kept(self.rank, lazy)
        leaves, kinds = jax.tree.leaves(state.mean), noise.kinds(state.mean)
        new_basis = (state.steps % self.interval == 0) & (state.steps > 0)

        def update(i: int, layer: Array | None, mean: Array, old: Array) -> tuple[Array, Array]:
            kind, dtype = kinds[i], old.dtype
            assert kind is not None
            b1, rate = jnp.asarray(self.momentum, dtype), jnp.where(some, self.learning_rate, 0).astype(dtype)
            seeds = lambda key, v: kind.seeds((key, v), i, leaves[i], layer)
            if isinstance(kind, noises.Fresh):
                g = noises.slice_sum(lambda key: kind.slice(seeds(key, basis), mean), fresh, weights, mean)
                n = b1 * old + (1 - b1) * g
                return (mean.astype(dtype) - rate * n).astype(mean.dtype), jnp.where(some, n, old)
            assert noises.is_low_rank(kind)
            flat = lambda f: f.reshape(-1, self.rank)
            _, v = map(flat, kind.factors(seeds(fresh[0], basis), mean))
            _, before = map(flat, kind.factors(seeds(fresh[0], state.basis), mean))
            # N V^T is about N' V'^T with N' = N V^T V' / n, because V'^T V' is about n I for V' of n rows
            turned = jnp.where(new_basis, old @ (before.T @ v) / v.shape[0], old)
            u = lambda key: flat(kind.factors(seeds(key, basis), mean)[0])
            n = b1 * turned + (1 - b1) * noises.slice_sum(u, fresh, weights, turned)
            step = (rate / self.rank * n @ v.T).reshape(mean.shape)
            return (mean.astype(dtype) - step).astype(mean.dtype), jnp.where(some, n, old)

        mean, momentum = probes.by_slice(update, state.mean, state.momentum)
        new = State(mean, momentum, basis, state.steps + 1, state.unanswered)
        return probes.settle_in_place(state, new, used, ("mean", "momentum"))

    def recommend(self, state: State) -> Params:
        return state.mean


def lozo(
    popsize: int = 2, *, sigma: float = 1e-3, learning_rate: float = 1e-6, rank: int = 2, interval: int = 50
) -> LOZO:
    """LOZO (Chen et al. 2025): MeZO along low-rank directions whose column space is kept for `interval` steps.

    Args:
        popsize: forward passes per step, 2 n.
        sigma: scale of the probe U V^T; its entries have variance rank sigma^2.
        learning_rate: constant.
        rank: r; the authors find 2 to 4 best.
        interval: nu, steps after which V is redrawn: 50 or 100. Vectors are searched along Gaussian noise.

    >>> from evoopt import minimize
    >>> strategy = lozo(learning_rate=0.05, interval=5)
    >>> result = minimize(lambda w: jnp.sum((w - 1.0) ** 2), jnp.zeros((3, 2)), strategy, generations=400)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 1e-2)
    True
    """
    return LOZO(popsize, sigma, learning_rate, rank, interval, 0.0)


def lozo_m(
    popsize: int = 2,
    *,
    sigma: float = 1e-3,
    learning_rate: float = 1e-6,
    rank: int = 2,
    interval: int = 50,
    momentum: float = 0.9,
) -> LOZO:
    """LOZO-M (Chen et al. 2025): LOZO with momentum kept as an (m, rank) factor, turned when V is redrawn.

    Args:
        popsize, sigma, learning_rate, rank, interval: as in `lozo`.
        momentum: b1 in N <- b1 N + (1 - b1) g U.

    >>> from evoopt import minimize
    >>> strategy = lozo_m(learning_rate=0.03, interval=20, momentum=0.5)
    >>> result = minimize(lambda w: jnp.sum((w - 1.0) ** 2), jnp.zeros((3, 2)), strategy, generations=600)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 0.1)
    True
    """
    return LOZO(popsize, sigma, learning_rate, rank, interval, momentum)
