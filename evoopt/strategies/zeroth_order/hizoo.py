"""HiZOO: zeroth-order descent preconditioned by a running estimate of the Hessian's diagonal.

Source: Zhao, Dang, Ye, Dai, Qian, Tsang, "Second-order fine-tuning without pain for LLMs: a Hessian informed
zeroth-order optimizer", ICLR 2025, arXiv 2402.15173, algorithm 1. Three forward passes per step, one more copy of the
parameters. The step goes along z / sqrt(H) with the H of the probe; the released code uses the H just updated, and so
steps along a direction it did not probe. Its default smoothing of 0 uses no curvature.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import noise as noises
from evoopt.answers import answered, as_values, finite, told
from evoopt.checks import check_sigma
from evoopt.population import Population
from evoopt.strategies.gaussian import sampling
from evoopt.strategies.zeroth_order import probes
from evoopt.strategies.zeroth_order.probes import Mask
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, error, pytree, static


class State(NamedTuple):
    """The state of HiZOO."""

    mean: Params
    hessian: Params  # H, the estimated diagonal of the Hessian, positive
    unanswered: Array  # () int32, steps that lost one of the three values


def scaled(z: Array, hessian: Array, _: Any) -> Array:
    """z / sqrt(H)."""
    return z / jnp.sqrt(hessian.astype(z.dtype))


@pytree
class HiZOO:
    """Zeroth-order descent in the metric of an estimated diagonal Hessian; see `hizoo`."""

    sigma: float
    learning_rate: float
    smoothing: float  # h
    weight_decay: float
    decayed: Mask = static()
    noise: Any
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        if isinstance(self.smoothing, (int, float)) and not 0 <= self.smoothing < 1:
            raise error("smoothing in [0, 1)", str(self.smoothing), "the weight of the past was given instead")

    def init(self, params: Params, key: Key) -> State:
        del key
        mean = probes.movable(params, self.sigma)
        return State(mean, jax.tree.map(jnp.ones_like, mean), jnp.zeros((), jnp.int32))

    def direction(self, state: State) -> noises.Elementwise:
        """The noise z / sqrt(H)."""
        return noises.Elementwise(self.noise, (state.hessian,), (), scaled)

    def ask(self, state: State, key: Key) -> Population:
        noise = self.direction(state)
        address = noise.addresses(noises.replayable(key), 1)
        three = jax.tree.map(lambda a: jnp.concatenate([a, a, a]), address)
        decode = sampling.Perturbed(state.mean, self.sigma, None, noise)
        return Population(decode, sampling.Genome(three, jnp.array([0.0, 1.0, -1.0], jnp.float32)))

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        ok = answered(values).all() & jnp.isfinite(values).any()
        smoothing, decay = (jnp.where(ok, x, 0) for x in (self.smoothing, self.learning_rate * self.weight_decay))
        center, plus, minus = jnp.where(ok, finite(values), 0)
        g = self.learning_rate * (plus - minus) / (2 * self.sigma)
        curvature = jnp.abs(plus + minus - 2 * center) / (2 * self.sigma**2)
        address = jax.tree.map(lambda a: a[0], population.genomes.address)
        plain = probes.drawer(self.noise, state.mean)
        first = jax.tree.map(lambda a: a[0], address)  # address of the one draw
        pulled = jax.tree.leaves(self.decayed(state.mean))

        def update(i: int, layer: Array | None, mean: Array, hessian: Array) -> tuple[Array, Array]:
            dtype = noises.wide(mean)
            z = plain(first, i, layer, mean).astype(dtype)
            h, x = hessian.astype(dtype), mean.astype(dtype)
            step = g.astype(dtype) * scaled(z, h, None)
            if pulled[i]:
                step = step + decay.astype(dtype) * x
            # H <- (1 - h) H + h |l+ + l- - 2 l| (H z^2) / (2 eps^2), as a difference because 1 - 1e-8 is 1 in float32
            seen = curvature.astype(dtype) * h * z * z
            new = h + smoothing.astype(dtype) * (seen - h)
            return (x - step).astype(mean.dtype), new.astype(hessian.dtype)

        mean, hessian = probes.by_slice(update, state.mean, state.hessian)
        return probes.settle_in_place(
            state, State(mean, hessian, state.unanswered), jnp.where(ok, values, jnp.nan), ("mean", "hessian")
        )

    def recommend(self, state: State) -> Params:
        return state.mean


def hizoo(
    *,
    sigma: float = 1e-3,
    learning_rate: float = 1e-6,
    smoothing: float = 1e-6,
    weight_decay: float = 0.0,
    decayed: Mask = probes.matrices,
    noise: Any = noises.gaussian,
) -> HiZOO:
    """HiZOO (Zhao et al. 2025): theta <- theta - learning_rate g z / sqrt(H), three forward passes per step.

    Args:
        sigma: length of a probe where H is 1, in units of the parameters.
        learning_rate: constant.
        smoothing: h, the weight of a step's curvature in H; the authors use 1e-8 to 1e-4 for models of 1e8 parameters
            and more, because the trace of the Hessian enters every estimate.
        weight_decay: shrinks parameters by learning_rate * weight_decay per step.
        decayed: parameters -> tree of bools, the leaves that shrink; by default all but vectors.
        noise: `gaussian`, `rademacher`, or any other noise whose leaves can be drawn one at a time.

    >>> from evoopt import minimize
    >>> strategy = hizoo(learning_rate=0.1, smoothing=1e-2)
    >>> result = minimize(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3), strategy, generations=400)
    >>> bool(jnp.abs(result.recommended - 1.0).max() < 1e-2)
    True
    """
    return HiZOO(sigma, learning_rate, smoothing, weight_decay, decayed, noise)
