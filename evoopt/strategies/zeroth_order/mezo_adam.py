"""MeZO-momentum and MeZO-Adam without buffers: moments are recomputed from a window of (address, slope) pairs.

The moments are sums over past scalars and noise that keys reproduce,
m_t = (1 - b1) sum_s b1^(t - s) g_s z_s and v_t = (1 - b2) sum_s b2^(t - s) (g_s z_s)^2, so nothing of the parameters'
size is kept: each leaf in turn replays the last `window` steps, oldest first, at a cost of `window` draws of noise per
step. Older steps have decayed to b^window of their first weight and are left out; bias is corrected for the terms that
are summed, so that a moment stays a weighted mean. Up to step `window` this equals the stored form exactly.

Source: Malladi et al. 2023 (MeZO), section 2.2 and appendix B.2, which no released code follows; Kingma & Ba 2015.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt.answers import as_values, told
from evoopt.checks import check_popsize
from evoopt.population import Population
from evoopt.strategies.gaussian import sampling
from evoopt.strategies.zeroth_order import probes
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree, static


class State(NamedTuple):
    """The state of the search; its history is a few numbers per step."""

    mean: Params
    addresses: Any  # addresses of the last steps' directions, oldest first; leaves (window, n, ...)
    weights: Array  # (window, n) float32, their slopes over the number of probes; 0 for lost probes and steps to come
    steps: Array  # () int32, steps taken
    unanswered: Array  # () int32, steps without a usable probe


@pytree
class Replayed:
    """Momentum or Adam on MeZO's estimate, by replay; see `mezo_adam`."""

    popsize: int = static()
    sigma: float
    learning_rate: float
    b1: float
    b2: float
    eps: float
    window: int = static()
    adaptive: bool = static()  # divide by the root of the second moment, with bias correction; False for momentum only
    two_sided: bool = static()
    noise: Any
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        probes.check(self.popsize, self.sigma, self.two_sided)
        check_popsize(self.window, 1, name="window")

    def init(self, params: Params, key: Key) -> State:
        n = self.popsize // 2 if self.two_sided else self.popsize - 1
        unused = self.noise.addresses(noises.replayable(key), n)  # any: their weights are 0
        addresses = jax.tree.map(lambda a: jnp.broadcast_to(a, (self.window, *a.shape)), unused)
        zero = jnp.zeros((), jnp.int32)
        return State(
            probes.movable(params, self.sigma), addresses, jnp.zeros((self.window, n), jnp.float32), zero, zero
        )

    def ask(self, state: State, key: Key) -> Population:
        key, scheme = noises.replayable(key), probes.scheme(self.two_sided)
        return sampling.sample(self.noise, scheme, key, self.popsize, state.mean, self.sigma, regenerate=True)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        new = probes.average(probes.slopes(values, self.sigma, self.two_sided)).astype(jnp.float32)
        push = lambda old, x: jnp.concatenate([old[1:], x[None]])
        addresses = jax.tree.map(push, state.addresses, probes.directions(population, self.two_sided))
        weights, steps = push(state.weights, new), state.steps + 1
        used = probes.scheme(self.two_sided).used(values)
        rate = jnp.where(jnp.isfinite(used).any(), self.learning_rate, 0)  # a step without an answer changes nothing
        draw, update = probes.drawer(self.noise, state.mean), self._update(steps, rate)

        def moved(i: int, layer: Array | None, x: Array) -> tuple[Array]:
            # (1/n) sum_j g_j z_j for one step; all steps of a slice come before the next slice
            estimate = lambda past: noises.slice_sum(lambda a: draw(a, i, layer, x), past[0], past[1], x)
            return (update(x, estimate, (addresses, weights)),)

        (mean,) = probes.by_slice(moved, state.mean)
        return probes.settle_in_place(state, State(mean, addresses, weights, steps, state.unanswered), used)

    def _update(self, steps: Array, rate: Array) -> Callable[[Array, Callable[[Any], Array], Any], Array]:
        def update(x: Array, estimate: Callable[[Any], Array], history: Any) -> Array:
            dtype = noises.wide(x)
            b1, b2 = jnp.asarray(self.b1, dtype), jnp.asarray(self.b2, dtype)

            def add(moments: tuple[Array, Array], past: Any) -> tuple[tuple[Array, Array], None]:
                m, v = moments
                g = estimate(past)
                return (b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g if self.adaptive else v), None

            zero = jnp.zeros(x.shape, dtype)
            (m, v), _ = jax.lax.scan(add, (zero, zero if self.adaptive else jnp.zeros((), dtype)), history)
            if self.adaptive:
                summed = jnp.minimum(steps, self.window).astype(dtype)
                m = m / (1 - b1**summed) / (jnp.sqrt(v / (1 - b2**summed)) + jnp.asarray(self.eps, dtype))
            return (x.astype(dtype) - rate.astype(dtype) * m).astype(x.dtype)

        return update

    def recommend(self, state: State) -> Params:
        return state.mean


def mezo_momentum(
    popsize: int = 2,
    *,
    sigma: float = 1e-3,
    learning_rate: float = 1e-6,
    momentum: float = 0.9,
    window: int = 64,
    two_sided: bool = True,
    noise: Any = noises.gaussian,
) -> Replayed:
    """MeZO with momentum but no buffer: theta <- theta - learning_rate m, m = momentum m + (1 - momentum) g z.

    Args:
        popsize: forward passes per step: 2 n two-sided, n + 1 one-sided.
        sigma: length of a probe, in units of the parameters.
        learning_rate: constant.
        momentum: b1.
        window: steps replayed; with 64, the steps left out weigh at most 0.9^64, a thousandth of the newest.
        two_sided: central differences; False for forward differences.
        noise: `gaussian`, `rademacher`, or any other noise whose leaves can be drawn one at a time.

    >>> from evoopt import minimize
    >>> strategy = mezo_momentum(4, learning_rate=0.05, window=32)
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), strategy, generations=400)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 1e-2)
    True
    """
    return Replayed(popsize, sigma, learning_rate, momentum, 0.0, 0.0, window, False, two_sided, noise)


def mezo_adam(
    popsize: int = 2,
    *,
    sigma: float = 1e-3,
    learning_rate: float = 1e-5,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    window: int = 64,
    two_sided: bool = True,
    noise: Any = noises.gaussian,
) -> Replayed:
    """MeZO with Adam but no buffers. A window below 1 / (1 - b2) makes the second moment nearly a plain mean.

    Args:
        popsize: forward passes per step: 2 n two-sided, n + 1 one-sided.
        sigma: length of a probe, in units of the parameters.
        learning_rate: constant.
        b1, b2, eps: Adam's.
        window: steps replayed, and so the draws of noise per step.
        two_sided: central differences; False for forward differences.
        noise: `gaussian`, `rademacher`, or any other noise whose leaves can be drawn one at a time.

    >>> from evoopt import minimize
    >>> strategy = mezo_adam(4, learning_rate=0.05, window=32)
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), strategy, generations=400)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 0.1)
    True
    """
    return Replayed(popsize, sigma, learning_rate, b1, b2, eps, window, True, two_sided, noise)
