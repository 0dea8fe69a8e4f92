"""Sparse MeZO: perturbs and updates only the small weights.

Source: Liu, Zhu, Gong, Cheng, Hsieh, You, "Sparse MeZO: less parameters for better performance in zeroth-order LLM
fine-tuning", arXiv 2402.15751, algorithm 1. The mask |theta| <= h is computed from the unperturbed parameters wherever
noise is drawn, never stored; the thresholds h are fixed before the first step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt.answers import as_values, told
from evoopt.population import Population
from evoopt.strategies.gaussian import sampling
from evoopt.strategies.zeroth_order import probes
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, error, pytree, static


class State(NamedTuple):
    """The state of sparse MeZO."""

    mean: Params
    thresholds: Params  # h for each leaf, or each layer of a stack; infinite for vectors
    unanswered: Array  # () int32, steps without a usable probe


@pytree
class SparseMeZO:
    """MeZO on the small weights; see `sparse_mezo`."""

    popsize: int = static()
    sigma: float
    learning_rate: float
    sparsity: float = static()
    noise: Any
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        probes.check(self.popsize, self.sigma)
        if not 0 <= self.sparsity < 1:
            raise error("sparsity in [0, 1), the share of weights that stay", str(self.sparsity), "a percentage")

    def init(self, params: Params, key: Key) -> State:
        del key
        mean = probes.movable(params, self.sigma)
        thresholds, matrix = noises.thresholds(mean, 1 - self.sparsity), probes.matrices(mean)
        thresholds = jax.tree.map(lambda h, m: h if m else jnp.full_like(h, jnp.inf), thresholds, matrix)
        return State(mean, thresholds, jnp.zeros((), jnp.int32))

    def ask(self, state: State, key: Key) -> Population:
        key, noise = noises.replayable(key), noises.Masked(self.noise, None, state.thresholds)
        return sampling.sample(noise, sampling.antithetic, key, self.popsize, state.mean, self.sigma, regenerate=True)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        weights = self.learning_rate * probes.average(probes.slopes(values, self.sigma))
        noise = noises.Masked(self.noise, None, state.thresholds)  # masked by the parameters before the step, as probed
        mean = probes.step(state.mean, noise, probes.directions(population), weights)
        return probes.settle_in_place(
            state, State(mean, state.thresholds, state.unanswered), sampling.antithetic.used(values)
        )

    def recommend(self, state: State) -> Params:
        return state.mean


def sparse_mezo(
    popsize: int = 2,
    *,
    sigma: float = 1e-3,
    learning_rate: float = 1e-6,
    sparsity: float = 0.75,
    noise: Any = noises.gaussian,
) -> SparseMeZO:
    """Sparse MeZO (Liu et al. 2024): the smallest weights of every matrix are searched, the others stay.

    Args:
        popsize: forward passes per step, 2 n.
        sigma: length of a probe, in units of the parameters.
        learning_rate: constant; it can be larger than MeZO's and stay stable.
        sparsity: the share of each matrix, or each layer of a stack, that stays fixed; the paper finds .75 to .8 best.
            Vectors are searched whole.
        noise: `gaussian`, `rademacher`, or any other noise whose leaves can be drawn one at a time.

    >>> from evoopt import minimize
    >>> f = lambda w: jnp.sum((w - 1.0) ** 2)
    >>> strategy = sparse_mezo(learning_rate=0.1, sparsity=0.5)
    >>> minimize(f, jnp.array([[0.1, 5.0]]), strategy, generations=200).recommended.round(2).tolist()
    [[1.0, 5.0]]
    """
    return SparseMeZO(popsize, sigma, learning_rate, sparsity, noise)
