"""FZOO: one-sided batches of Rademacher probes, with the step normalised by the deviation of their values.

theta <- theta - learning_rate / (N s) sum_i (l_i - l_0) u_i, s the standard deviation of l_1 ... l_N

Since s is about sigma |gradient|, this is normalised descent without a second-moment state. The form is the released
code's and free of scale: the paper divides the gradient estimate by s, a step 1 / sigma times as long. As in the code,
the standard deviation is the biased one.

Source: Dang, Guo, Zhao, Ye, Zheng, Dai, Tsang, "FZOO: fast zeroth-order optimizer for fine-tuning large language models
towards Adam-scale speed", arXiv 2506.09034, algorithm 1 and the code released with it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from evoopt import noise as noises
from evoopt.answers import as_values, count, told
from evoopt.checks import check_popsize, check_sigma
from evoopt.population import Population
from evoopt.strategies.gaussian import sampling
from evoopt.strategies.zeroth_order import probes
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree, static


class State(NamedTuple):
    """The state of FZOO."""

    mean: Params
    unanswered: Array  # () int32, steps without a usable probe


@pytree
class FZOO:
    """Normalised one-sided descent; see `fzoo`."""

    popsize: int = static()  # N + 1
    sigma: float
    learning_rate: float
    noise: Any
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 3)  # the deviation of a single value is 0
        check_sigma(self.sigma)

    def init(self, params: Params, key: Key) -> State:
        del key
        return State(probes.movable(params, self.sigma), jnp.zeros((), jnp.int32))

    def ask(self, state: State, key: Key) -> Population:
        key, scheme = noises.replayable(key), sampling.forward
        return sampling.sample(self.noise, scheme, key, self.popsize, state.mean, self.sigma, regenerate=True)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        change = probes.slopes(values, 1.0, two_sided=False)  # l_i - l_0 (N,), NaN where lost
        ok, m = ~jnp.isnan(change), count(change)
        known = jnp.where(ok, change, 0)
        spread = jnp.where(ok, known - known.sum() / m, 0)
        s = jnp.sqrt((spread**2).sum() / m)
        weights = jnp.where(s > 0, self.learning_rate * known / (m * jnp.where(s > 0, s, 1)), 0)
        mean = probes.step(state.mean, self.noise, probes.directions(population, two_sided=False), weights)
        return probes.settle_in_place(state, State(mean, state.unanswered), sampling.forward.used(values))

    def recommend(self, state: State) -> Params:
        return state.mean


def fzoo(popsize: int = 9, *, sigma: float = 1e-3, learning_rate: float = 1e-5, noise: Any = noises.rademacher) -> FZOO:
    """FZOO (Dang et al. 2025): N + 1 forward passes per step, whose length does not depend on the values' scale.

    Args:
        popsize: N + 1, one candidate at the parameters and N probes; the authors take N = 8.
        sigma: epsilon in the paper, the length of a probe in units of the parameters.
        learning_rate: about the length of a step divided by the square root of the number of parameters.
        noise: `rademacher` as in the paper, `gaussian`, or any other noise addressed by keys.

    >>> from evoopt import minimize
    >>> strategy = fzoo(learning_rate=0.02)
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), strategy, generations=300)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 0.1)
    True
    """
    return FZOO(popsize, sigma, learning_rate, noise)
