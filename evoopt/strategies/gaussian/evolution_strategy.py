"""Evolution strategies with a fixed search distribution: the gradient of the objective smoothed by noise.

The gradient of E f(mean + sigma z) is E f(mean + sigma z) z / sigma (Nesterov & Spokoiny 2017, eq. 21); a generation's
estimate of it goes into any optax transformation. OpenAI-ES, ARS and SPSA differ only in noise, sampling scheme,
fitness shaping and optimizer, so each is one `return`.

Sources: Salimans, Ho, Chen, Sidor, Sutskever, "Evolution strategies as a scalable alternative to reinforcement
learning", arXiv 1703.03864, algorithm 2. Mania, Guy, Recht, "Simple random search provides a competitive approach to
reinforcement learning", arXiv 1803.07055, algorithms 1 and 2. Liu, Chen, Chen, Hong, "signSGD via zeroth-order
oracle", ICLR 2019, algorithm 1. Sarkar et al., "Evolution strategies at the hyperscale", arXiv 2511.16652. Spall,
"Multivariate stochastic approximation using a simultaneous perturbation gradient approximation", IEEE TAC 1992.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from evoopt import noise as noises
from evoopt import shaping, trees
from evoopt.answers import answered, as_values, count, settle, told
from evoopt.checks import check_popsize
from evoopt.population import Population
from evoopt.shaping import Utility
from evoopt.strategies.first_order.updates import adam, descend
from evoopt.strategies.gaussian import sampling
from evoopt.strategies.zeroth_order.probes import movable
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, error, pytree, static


class State(NamedTuple):
    """The state of an evolution strategy."""

    mean: Params
    opt_state: Any
    unanswered: Array  # () int32, generations without a finite answer


@pytree
class EvolutionStrategy:
    """Noise x sampling scheme x utility x optax transformation.

    mean <- mean - learning_rate * optimizer(g),  g = sum_i weights_i sign_i z_i / (m sigma)

    with weights the shaped values and m the number of candidates that count: whole pairs, or all but the center. Where
    `differences` is set, g is not divided by sigma.
    Memory: one copy of the parameters per direction while noise is stored, two copies when it is regenerated. With
    regenerated noise, plain descent and a donated state, only that of one evaluation: no gradient is formed, and noise
    is added to the mean in place.
    """

    popsize: int = static()
    sigma: float  # standard deviation of the candidates, in units of the parameters
    learning_rate: float
    optimizer: optax.GradientTransformation | None = static(default=None)  # None: plain descent
    utility: Utility = static(default=shaping.centered_rank)
    noise: Any = noises.gaussian
    scheme: sampling.Scheme = static(default=sampling.antithetic)
    regenerate: bool | None = static(default=None)
    differences: bool = static(default=False)  # g is a sum of differences, not of slopes: not divided by sigma
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 2, even=self.scheme.even)

    def init(self, params: Params, key: Key) -> State:
        del key
        mean = movable(params, self.sigma)
        opt_state = () if self.optimizer is None else trees.strong(self.optimizer.init(mean))
        return State(mean, opt_state, jnp.zeros((), jnp.int32))

    def ask(self, state: State, key: Key) -> Population:
        key = noises.replayable(key)
        return sampling.sample(self.noise, self.scheme, key, self.popsize, state.mean, self.sigma, self.regenerate)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        used = self.scheme.used(values)
        weights = self.scheme.weigh(values, self.utility) / count(used)
        if self.optimizer is None and population.decode.rows is None:
            # No `settle`: it would hold the old mean beside the new one. Weights of 0 leave the mean unchanged.
            weights = jnp.where(jnp.isfinite(used).any(), weights, 0)
            scale = -self.learning_rate / self._length
            mean = sampling.add_first_moment(self.scheme, population, weights, state.mean, scale=scale)
            lost = jnp.where(jnp.isfinite(used).any(), 0, 1).astype(jnp.int32)
            return State(mean, state.opt_state, state.unanswered + lost)
        total = sampling.first_moment(self.scheme, population, weights)
        grad = jax.tree.map(lambda g, m: (g / self._length).astype(m.dtype), total, state.mean)
        updates, opt_state = grad, state.opt_state
        if self.optimizer is not None:
            updates, opt_state = descend(self.optimizer, grad, opt_state, state.mean)
        mean = jax.tree.map(lambda m, u: m - jnp.asarray(self.learning_rate * u, m.dtype), state.mean, updates)
        return settle(state, State(mean, opt_state, state.unanswered), used)

    @property
    def _length(self) -> Any:
        return 1.0 if self.differences else self.sigma

    def recommend(self, state: State) -> Params:
        return state.mean


def openai_es(
    popsize: int = 256,
    *,
    sigma: float = 0.05,
    learning_rate: float = 0.01,
    optimizer: optax.GradientTransformation | None = None,
    weight_decay: float = 0.0,
    noise: Any = noises.gaussian,
    utility: Utility = shaping.centered_rank,
    regenerate: bool | None = None,
) -> EvolutionStrategy:
    """OpenAI-ES (Salimans et al. 2017): antithetic Gaussian noise, centered ranks, Adam.

    Args:
        popsize: candidates per generation, even.
        sigma: standard deviation of the perturbation, in units of the parameters.
        learning_rate: the optimizer's.
        optimizer: an optax transformation without its learning rate; Adam (b1 = 0.9, b2 = 0.999) by default.
        weight_decay: pulls the mean towards 0 by learning_rate * weight_decay * mean per generation, as in the paper.
        noise: `gaussian`, `rademacher`, or `Orthogonal(gaussian)`.
        utility: fitness shaping.
        regenerate: draw the noise again instead of storing it; None decides by its size.

    >>> from evoopt import minimize
    >>> strategy = openai_es(64, sigma=0.1, learning_rate=0.05)
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), strategy, generations=200)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 0.1)
    True
    """
    optimizer = optimizer or adam()
    if weight_decay:
        optimizer = optax.chain(optimizer, optax.add_decayed_weights(weight_decay))
    return EvolutionStrategy(popsize, sigma, learning_rate, optimizer, utility, noise, sampling.antithetic, regenerate)


def ars(
    popsize: int = 16,
    *,
    top: int | None = None,
    sigma: float = 0.03,
    learning_rate: float = 0.02,
    regenerate: bool | None = None,
) -> EvolutionStrategy:
    """Augmented random search (Mania et al. 2018): only the best pairs, scaled by the deviation of their values.

    V1 and V2 are the same search; V2 is V1 on an environment that normalises its observations.

    Args:
        popsize: candidates per generation, 2 N in the paper; even.
        top: b, the pairs that count; all by default (V1, V2), fewer for V1-t and V2-t.
        sigma: nu, the standard deviation of the perturbation.
        learning_rate: alpha.
        regenerate: draw the noise again instead of storing it; None decides by its size.

    Raises:
        ValueError: if `top` is not in 1..popsize/2.
    """
    check_popsize(popsize, 2, even=True)
    pairs = popsize // 2
    top = pairs if top is None else top
    if not 1 <= top <= pairs:
        raise error(
            f"top between 1 and {pairs} (pairs of a popsize of {popsize})", str(top), "top counts pairs, not candidates"
        )
    # Line 7 of the algorithm divides by b sigma_R, the class by m, which the utility corrects.
    return EvolutionStrategy(
        popsize, sigma, learning_rate, utility=best_pairs(top), regenerate=regenerate, differences=True
    )


@functools.cache  # equal recipes are equal
def best_pairs(top: int) -> Utility:
    """ARS's fitness shaping: the values of the `top` pairs with the best members, over their standard deviation.

    Equation: Mania et al. 2018, algorithm 2, lines 6 and 7. Values (n,) come in pairs 2i, 2i + 1.
    """

    def weights(values: Array) -> Array:
        m = count(values)
        best = jnp.where(answered(values), values, jnp.nan).reshape(-1, 2).min(axis=1)
        place = jnp.argsort(jnp.argsort(best))
        chosen = jnp.where(jnp.repeat(place < top, 2), values, jnp.nan)
        shaped = shaping.z_score(chosen)  # the mean cancels in a pair's difference
        used = jnp.minimum(top, m / 2)
        return shaped * m / used

    return weights


def spsa(
    popsize: int = 2,
    *,
    sigma: float = 1e-2,
    learning_rate: float = 1e-2,
    optimizer: optax.GradientTransformation | None = None,
    noise: Any = noises.rademacher,
    regenerate: bool | None = None,
) -> EvolutionStrategy:
    """SPSA (Spall 1992): central differences averaged over popsize / 2 directions, and any optax transformation.

    With Gaussian noise this is MeZO's estimate; `spsa(optimizer=optax.scale_by_adam(), regenerate=True)` is ZO-Adam
    with stored moments. MeZO itself, which stores nothing, is `mezo`.

    Args:
        popsize: candidates per generation, even.
        sigma: c in the paper, the length of a probe in units of the parameters.
        learning_rate: the optimizer's.
        optimizer: an optax transformation without its learning rate; plain descent by default.
        noise: `rademacher` as in the paper, or `gaussian`.
        regenerate: draw the noise again instead of storing it; None decides by its size.

    >>> from evoopt import minimize
    >>> strategy = spsa(4, sigma=1e-3, learning_rate=0.05, optimizer=optax.trace(0.5))
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), strategy, generations=200)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 1e-2)
    True
    """
    return EvolutionStrategy(
        popsize, sigma, learning_rate, optimizer, shaping.identity, noise, sampling.antithetic, regenerate
    )


def zo_sign_sgd(
    popsize: int = 2,
    *,
    sigma: float = 1e-3,
    learning_rate: float = 1e-4,
    noise: Any = noises.gaussian,
    regenerate: bool | None = None,
) -> EvolutionStrategy:
    """ZO-signSGD (Liu, Chen, Chen, Hong 2019): the sign of every coordinate of the estimate.

    theta <- theta - learning_rate sign(1/n sum_j g_j z_j). The variant that takes only the sign of the slope, and so
    steps along the probe itself, is `comparison_descent`.

    Args:
        popsize: candidates per step, 2 n.
        sigma: length of a probe, in units of the parameters.
        learning_rate: the length of a step in every coordinate.
        noise: `gaussian`, `rademacher`, or any other noise addressed by keys.
        regenerate: draw the noise again instead of storing it; None decides by its size.

    >>> from evoopt import minimize
    >>> strategy = zo_sign_sgd(8, learning_rate=0.01)
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), strategy, generations=300)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 0.1)
    True
    """
    return EvolutionStrategy(
        popsize, sigma, learning_rate, SIGN, shaping.identity, noise, sampling.antithetic, regenerate
    )


SIGN = optax.stateless(lambda grad, params: jax.tree.map(jnp.sign, grad))


def eggroll(
    popsize: int = 256,
    *,
    rank: int = 1,
    sigma: float = 1e-3,
    learning_rate: float = 1e-3,
    optimizer: optax.GradientTransformation | None = None,
    utility: Utility = shaping.z_score,
) -> EvolutionStrategy:
    """EGGROLL (Sarkar et al. 2025): an evolution strategy with low-rank noise, for populations of 1e5 and more.

    Each member perturbs a matrix by a b^T / sqrt(rank). Members evaluated at once share one product with the
    parameters, to which each adds rank (m + n) numbers. The noise is always drawn again, and the update sums all
    members' factors in one product of full rank.

    Args:
        popsize: candidates per generation, even.
        rank: rank of a perturbation; 1 in the paper.
        sigma: standard deviation of the perturbation, in units of the parameters.
        learning_rate: alpha / sigma in the paper.
        optimizer: an optax transformation without its learning rate; plain descent by default.
        utility: fitness shaping; (value - mean) / standard deviation by default, as in the paper.

    >>> from evoopt import minimize
    >>> strategy = eggroll(64, sigma=0.05, learning_rate=0.005)
    >>> result = minimize(lambda w: jnp.sum((w - 1.0) ** 2), jnp.zeros((3, 2)), strategy, generations=300)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 0.1)
    True
    """
    low_rank = noises.LowRank(rank)
    return EvolutionStrategy(
        popsize, sigma, learning_rate, optimizer, utility, low_rank, sampling.antithetic, regenerate=True
    )
