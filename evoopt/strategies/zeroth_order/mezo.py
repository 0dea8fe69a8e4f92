"""MeZO: stochastic gradient descent on finite differences along noise that is redrawn, never stored.

Source: Malladi, Gao, Nichani, Damian, Lee, Chen, Arora, "Fine-tuning language models with just forward passes",
NeurIPS 2023, arXiv 2305.17333, algorithm 1 (two-sided, n-SPSA), and section B.1 for one-sided and residual one-point
estimates. The paper perturbs the parameters in place, +sigma, -2 sigma, +sigma; here probing only reads them, so
nothing drifts and nothing has to be restored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from evoopt import noise as noises
from evoopt.answers import as_values, told
from evoopt.population import Population
from evoopt.strategies.gaussian import sampling
from evoopt.strategies.zeroth_order import probes
from evoopt.strategies.zeroth_order.probes import Mask
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree, static


class State(NamedTuple):
    """The state of MeZO: the parameters, and nothing else of their size."""

    mean: Params
    unanswered: Array  # () int32, steps without a usable probe


def as_they_are(slopes: Array) -> Array:
    """The slopes themselves."""
    return slopes


@pytree
class MeZO:
    """theta <- theta - learning_rate (1/n sum_j shape(g_j) z_j + weight_decay theta), g_j the slope along z_j."""

    popsize: int = static()  # 2 n two-sided, n + 1 one-sided
    sigma: float
    learning_rate: float
    weight_decay: float
    two_sided: bool = static(default=True)
    decayed: Mask = static(default=probes.matrices)
    noise: Any = noises.gaussian
    shape: Callable[[Array], Array] = static(default=as_they_are)  # slopes (n,) -> (n,)
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        probes.check(self.popsize, self.sigma, self.two_sided)

    def init(self, params: Params, key: Key) -> State:
        del key
        return State(probes.movable(params, self.sigma), jnp.zeros((), jnp.int32))

    def ask(self, state: State, key: Key) -> Population:
        key, scheme = noises.replayable(key), probes.scheme(self.two_sided)
        return sampling.sample(self.noise, scheme, key, self.popsize, state.mean, self.sigma, regenerate=True)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        addresses, weights, shrink = self.update(population, values)
        mean = probes.step(state.mean, self.noise, addresses, weights, shrink, self.decayed)
        used = probes.scheme(self.two_sided).used(values)
        return probes.settle_in_place(state, State(mean, state.unanswered), used)

    def update(self, population: Population, values: Array) -> tuple[Any, Array, Array]:
        """The parts of a step: (addresses, weights (n,), share by which decayed leaves shrink)."""
        g = probes.slopes(values, self.sigma, self.two_sided)
        weights = self.learning_rate * probes.average(self.shape(g))
        some = jnp.isfinite(probes.scheme(self.two_sided).used(values)).any()
        shrink = jnp.where(some, self.learning_rate * self.weight_decay, 0)  # a step without an answer changes nothing
        return probes.directions(population, self.two_sided), weights, shrink

    def recommend(self, state: State) -> Params:
        return state.mean


def mezo(
    popsize: int = 2,
    *,
    sigma: float = 1e-3,
    learning_rate: float = 1e-6,
    two_sided: bool = True,
    weight_decay: float = 0.0,
    decayed: Mask = probes.matrices,
    noise: Any = noises.gaussian,
) -> MeZO:
    """MeZO (Malladi et al. 2023): fine-tuning in the memory of inference.

    Learning rates of about 1e-7 to 1e-6 suit full fine-tuning of a language model (350 M to 13 B), ten times as much
    suits models below 25 M; sigma is 1e-3 for all parameters, 1e-2 for LoRA, 1e-1 for prefixes. The rate should grow
    with the number of probes. For an optax transformation of the same estimate, see `spsa(optimizer=...)`, which stores
    the optimizer's state; for momentum and Adam without it, `mezo_momentum` and `mezo_adam`.

    Args:
        popsize: forward passes per step: 2 n two-sided, n + 1 one-sided.
        sigma: epsilon in the paper, the length of a probe in units of the parameters.
        learning_rate: constant; `dataclasses.replace` changes it without another compilation.
        two_sided: central differences; False for forward differences from one shared value at the parameters.
        weight_decay: shrinks parameters by learning_rate * weight_decay per step.
        decayed: parameters -> tree of bools, the leaves that shrink; by default those with two axes or more.
        noise: `gaussian`, `rademacher`, or any other noise addressed by keys.

    Raises:
        ValueError: for an odd two-sided popsize, or at `init` for a sigma that the parameters' dtype rounds away.

    >>> from evoopt import minimize
    >>> strategy = mezo(learning_rate=0.05)
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), strategy, generations=400)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 1e-2)
    True
    """
    return MeZO(popsize, sigma, learning_rate, weight_decay, two_sided, decayed, noise)


def comparison_descent(
    popsize: int = 2, *, sigma: float = 1e-3, learning_rate: float = 1e-6, noise: Any = noises.gaussian
) -> MeZO:
    """Fixed-length steps along each probe, towards its better side: theta <- theta - learning_rate sign(g) z.

    The released code of ZO-Bench calls this ZO-signSGD; that algorithm takes the sign of every coordinate and is
    `zo_sign_sgd` here. It needs only comparisons, so monotone transforms of the values change nothing.

    >>> from evoopt import minimize
    >>> strategy = comparison_descent(8, learning_rate=0.02)
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), strategy, generations=300)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 0.2)
    True
    """
    return MeZO(popsize, sigma, learning_rate, 0.0, noise=noise, shape=jnp.sign)
