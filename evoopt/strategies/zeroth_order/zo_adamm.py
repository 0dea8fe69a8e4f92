"""ZO-AdaMM: AMSGrad on one-sided estimates along the unit sphere, with projection onto a box.

Source: Chen, Liu, Xu, Li, Lin, Hong, Cox, "ZO-AdaMM: zeroth-order adaptive momentum method for black-box optimization",
NeurIPS 2019, algorithm 1. Projection onto a box in the metric of sqrt(v^) is clipping. As in the paper, steps are
divided by the root of v^ = max(v^, v); the released code divides by that of v.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import bounds, trees
from evoopt import noise as noises
from evoopt.answers import as_values, settle, told
from evoopt.checks import check_popsize, check_sigma
from evoopt.population import Population
from evoopt.strategies.gaussian import sampling
from evoopt.strategies.zeroth_order import probes
from evoopt.strategy import value
from evoopt.types import Array, Key, Params, pytree, static

LEAST = 1e-7  # initial v^


class State(NamedTuple):
    """The state of ZO-AdaMM."""

    mean: Params
    m: Params  # first moment
    v: Params  # second moment
    v_max: Params  # v^, the greatest second moment so far
    unanswered: Array  # () int32, steps without a usable probe


@pytree
class Sphere:
    """Directions uniform on the unit sphere: Gaussian ones divided by their length over all leaves."""

    def addresses(self, key: Key, n: int) -> Any:
        return noises.gaussian.addresses(key, n)

    def draw(self, address: Any, like: Params) -> Params:
        z = noises.gaussian.draw(address, like)
        squares = [jnp.sum(jnp.square(x.astype(noises.wide(x)))) for x in jax.tree.leaves(z)]
        length = jnp.sqrt(jnp.sum(jnp.stack([s.astype(squares[0].dtype) for s in squares])))
        return jax.tree.map(lambda x: x / length.astype(x.dtype), z)

    def rows(self, key: Key, n: int, like: Params) -> Params:
        return jax.vmap(lambda a: self.draw(a, like))(self.addresses(key, n))


@pytree
class ZOAdaMM:
    """AMSGrad on zeroth-order estimates; see `zo_adamm`."""

    popsize: int = static()  # q + 1
    sigma: float  # mu
    learning_rate: float
    b1: float
    b2: float
    lower: Any
    upper: Any
    oracle = staticmethod(value)

    def __post_init__(self) -> None:
        check_popsize(self.popsize, 2)
        check_sigma(self.sigma)

    def init(self, params: Params, key: Key) -> State:
        del key
        mean = probes.movable(params, self.sigma)
        bounds.sides(self.lower, self.upper, mean)  # refuses bad bounds here rather than at the first step
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, noises.wide(x)), mean)
        return State(mean, zero, zero, jax.tree.map(lambda x: jnp.full_like(x, LEAST), zero), jnp.zeros((), jnp.int32))

    def ask(self, state: State, key: Key) -> Population:
        key, scheme = noises.replayable(key), sampling.forward
        return sampling.sample(Sphere(), scheme, key, self.popsize, state.mean, self.sigma, regenerate=True)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values = as_values(told(population, answers))
        # g = d / (q mu) sum_j (f(x + mu u_j) - f(x)) u_j
        weights = trees.size(state.mean) * probes.average(probes.slopes(values, self.sigma, two_sided=False))
        addresses = probes.directions(population, two_sided=False)
        g = noises.weighted_sum(lambda a: Sphere().draw(a, state.mean), addresses, weights, state.mean)
        decayed = lambda b: lambda old, new: jnp.asarray(b, old.dtype) * old + jnp.asarray(1 - b, old.dtype) * new
        m = jax.tree.map(decayed(self.b1), state.m, g)
        v = jax.tree.map(decayed(self.b2), state.v, jax.tree.map(jnp.square, g))
        v_max = jax.tree.map(jnp.maximum, state.v_max, v)

        def moved(x: Array, m: Array, v: Array, low: Any, high: Any) -> Array:
            new = x.astype(m.dtype) - jnp.asarray(self.learning_rate, m.dtype) * m / jnp.sqrt(v)
            return jnp.clip(new, jnp.asarray(low, m.dtype), jnp.asarray(high, m.dtype)).astype(x.dtype)

        walls = bounds.sides(self.lower, self.upper, state.mean)
        of_leaf = jax.tree.structure(state.mean).unflatten
        lower, upper = of_leaf([wall.low for wall in walls]), of_leaf([wall.high for wall in walls])
        mean = jax.tree.map(moved, state.mean, m, v_max, lower, upper)
        return settle(state, State(mean, m, v, v_max, state.unanswered), sampling.forward.used(values))

    def recommend(self, state: State) -> Params:
        return state.mean


def zo_adamm(
    popsize: int = 11,
    *,
    sigma: float = 5e-3,
    learning_rate: float = 1e-3,
    b1: float = 0.9,
    b2: float = 0.9,
    lower: Any = -float("inf"),
    upper: Any = float("inf"),
) -> ZOAdaMM:
    """ZO-AdaMM (Chen et al. 2019): adaptive momentum under constraints, with three more copies of the parameters.

    Args:
        popsize: q + 1, one candidate at the parameters and q probes.
        sigma: mu in the paper, the length of a whole probe in units of the parameters.
        learning_rate: alpha.
        b1, b2: decay of the moments; the paper takes b2 = 0.9 or 0.3.
        lower, upper: bounds of the parameters: numbers, or trees like the parameters. Probes may pass them.

    >>> from evoopt import minimize
    >>> f = lambda x: jnp.sum((x - jnp.array([0.5, 3.0])) ** 2)
    >>> strategy = zo_adamm(learning_rate=0.02, upper=1.0)
    >>> x = minimize(f, jnp.zeros(2), strategy, generations=300).recommended
    >>> bool(abs(x[0] - 0.5) < 0.1 and x[1] == 1.0)
    True
    """
    return ZOAdaMM(popsize, sigma, learning_rate, b1, b2, lower, upper)
