"""Bounds by a penalty that adapts: candidates are evaluated at the nearest point of the box, and pay for the distance.

Source: Hansen, Niederberger, Guzzella, Koumoutsakos, "A method for handling uncertainty in evolutionary optimization
with an application to feedback control of combustion", IEEE TEVC 13 (2009), section V-B, with the changes of pycma 4.5,
whose constants are used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import bounds, injection, trees
from evoopt.answers import answered, as_values, told
from evoopt.checks import check_strategy
from evoopt.population import Population
from evoopt.strategies.covariance import recombination
from evoopt.types import Array, Key, Params, error, pytree
from evoopt.wrappers.reparameterized import Transformed

KEPT = 20  # generations whose interquartile ranges are kept, and a few more in high dimension


class State(NamedTuple):
    """The inner state, and the weights of the penalty."""

    inner: Any
    gamma: Array  # (d,), the weight of each coordinate's squared distance
    ranges: Array  # (h,), interquartile ranges of values over mean variances, the newest first; NaN: none yet
    begun: Array  # () bool, whether the mean was outside once, so that gamma was set
    generation: Array  # () int32, generations told

    @property
    def unanswered(self) -> Array:
        return self.inner.unanswered


@pytree
class Clipped:
    """u -> the nearest point of the box."""

    lower: Any
    upper: Any

    def __call__(self, u: Params) -> Params:
        leaves, treedef = jax.tree.flatten(u)
        walls = bounds.sides(self.lower, self.upper, u)
        clip = lambda x, w: x if w.free else jnp.clip(x, *(jnp.asarray(b).astype(x.dtype) for b in (w.low, w.high)))
        return treedef.unflatten([clip(x, w) for x, w in zip(leaves, walls, strict=True)])


@pytree
class PenalizedBounds:
    """A strategy that pays for leaving the box; see `penalized_bounds`."""

    strategy: Any
    lower: Any
    upper: Any

    @property
    def oracle(self) -> Any:
        return self.strategy.oracle

    @property
    def dispersion(self) -> Any:
        return lambda state, i: self.strategy.dispersion(state.inner, i)

    @property
    def moved(self) -> Any:
        moved = self.strategy.moved  # an AttributeError where the strategy has none
        same = lambda points: points
        return lambda state, population, points: injection.through(moved, state.inner, population, points, same)

    @property
    def _clip(self) -> Clipped:
        return Clipped(self.lower, self.upper)

    def init(self, params: Params, key: Key) -> State:
        params = bounds.inside(trees.searchable(params), self.lower, self.upper)
        inner = trees.strong(self.strategy.init(params, key))
        n = len(jax.eval_shape(self.strategy.ask, inner, jax.eval_shape(lambda: jax.random.key(0))))
        x = trees.flatten(params)
        ranges = jnp.full(int(KEPT + 3 * x.size / n), jnp.nan, x.dtype)
        return State(inner, jnp.ones_like(x), ranges, jnp.asarray(False), jnp.zeros((), jnp.int32))

    def ask(self, state: State, key: Key) -> Population:
        inner = self.strategy.ask(state.inner, key)
        return inner.with_decode(Transformed(inner.decode, self._clip))

    def tell(self, state: State, population: Population, answers: Any) -> State:
        answers = told(population, answers)
        values = as_values(answers)
        inner = population.with_decode(population.decode.decode)  # type: ignore[attr-defined]
        new = self._adapted(state, values)
        distance = lambda u: trees.flatten(jax.tree.map(jnp.subtract, u, self._clip(u)))
        apart = jax.vmap(lambda genome: distance(inner.decode(genome)))(inner.genomes)
        d = apart.shape[1]
        penalty = ((apart**2) @ new.gamma / d).astype(values.dtype)
        told_inner = self.strategy.tell(state.inner, inner, values + penalty)
        kept = trees.where(jnp.isfinite(values).any(), new, state)
        return kept._replace(inner=told_inner)

    def recommend(self, state: State) -> Params:
        return self._clip(self.strategy.recommend(state.inner))

    def _adapted(self, state: State, values: Array) -> State:
        """The state with new weights, before these values are told."""
        at = self.strategy.dispersion(state.inner, jnp.zeros((), jnp.int32))
        unravel = self._unravel(state.inner)
        dtype, d = state.gamma.dtype, state.gamma.shape[0]
        variances = (at.std**2).astype(dtype)
        outside = at.mean - trees.flatten(self._clip(unravel(at.mean))).astype(at.mean.dtype)
        distance = jnp.abs(outside / at.std).astype(dtype)  # in standard deviations

        # The middle half of the values, over the mean variance: how much a squared distance is worth.
        m = answered(values).sum()
        ordered = jnp.sort(jnp.where(answered(values), values, jnp.nan)).astype(dtype)  # no answer comes last
        place = lambda i: ordered[jnp.clip(i, 0, jnp.maximum(m - 1, 0))]
        spread = (place(3 * (m + 1) // 4) - place((m + 1) // 4)) / variances.mean()
        some = ~jnp.isnan(state.ranges)
        largest = jnp.max(state.ranges, where=some, initial=0)
        spread = jnp.where(jnp.isposinf(spread) & (some.sum() > 1), largest, spread)
        pushed = jnp.concatenate([spread[None], state.ranges[:-1]])
        ranges = jnp.where(jnp.isfinite(spread) & (spread > 0), pushed, state.ranges)
        known = ~jnp.isnan(ranges[0])
        typical = jnp.where(known, jnp.nanmedian(jnp.where(known, ranges, 0)), 0)

        mu = recombination.logarithmic(values, dtype).mu_eff
        damp = jnp.minimum(1, mu / (10 * d))
        first = (distance > 0).any() & (~state.begun | (state.generation == 1)) & known
        gamma = jnp.where(first, 2 * typical, state.gamma)
        begun = state.begun | first
        excess = distance - 3 * jnp.maximum(1, d**0.5 / mu)
        grown = gamma * jnp.exp(jnp.tanh(jnp.maximum(excess, 0) / 3) / 2 * damp)
        shrunk = jnp.where(grown > 5 * typical, grown * jnp.exp(-damp / 3), grown)
        gamma = jnp.where(begun, shrunk, gamma)
        return State(state.inner, gamma, ranges, begun, state.generation + 1)

    def _unravel(self, inner: Any) -> Any:
        like = jax.eval_shape(self.strategy.recommend, inner)
        leaves, treedef = jax.tree.flatten(like)
        return trees.Unravel(treedef, tuple(x.shape for x in leaves), tuple(x.dtype for x in leaves))


def penalized_bounds(strategy: Any, lower: Params = None, upper: Params = None) -> PenalizedBounds:
    """`strategy` with candidates clipped into [lower, upper], whose values grow with the distance from there.

    The penalty of a candidate is the mean over coordinates of gamma times the squared distance. The gammas are set from
    the interquartile range of values once the mean leaves the box, and adapt so that it stays near. A search whose
    optimum is at a wall sees it as the bottom of a valley.

    Args:
        strategy: one with a distribution (a method `dispersion`): `cma_es`, `sep_cma_es`, `amalgam`.
        lower, upper: numbers, or trees like the parameters; for an array, also a list of numbers. None means no wall;
            equal bounds hold a coordinate.

    Raises:
        TypeError: for a strategy without a distribution.
        ValueError: if a bound is NaN or a lower bound is above its upper one; at `init` if the start is outside or the
            bounds do not fit the parameters.

    >>> from evoopt import minimize
    >>> from evoopt.strategies import cma_es
    >>> f = lambda x: jnp.sum((x - jnp.array([0.5, 3.0])) ** 2)
    >>> minimize(f, jnp.zeros(2), penalized_bounds(cma_es(8), -1.0, 1.0), generations=100).best.round(2).tolist()
    [0.5, 1.0]
    """
    check_strategy(strategy)
    if not hasattr(strategy, "dispersion"):
        raise error(
            "a strategy with a distribution, such as cma_es()", type(strategy).__name__,
            "a population or a gradient method: bounded(), smoothed() and resampled() take any strategy", TypeError,
        )  # fmt: skip
    lower, upper = bounds.opened(lower, upper)
    return PenalizedBounds(strategy, lower, upper)
