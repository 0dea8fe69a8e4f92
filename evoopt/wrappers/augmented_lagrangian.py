"""Constraints by an augmented Lagrangian, whose multipliers and penalty weights adapt from generation to generation.

Source: Atamna, Auger, Hansen, "Linearly convergent evolution strategies via augmented Lagrangian constraint handling",
FOGA 2017, algorithm 1, in the form of pycma 4.5 (`constraints_handler.AugmentedLagrangian`, its algorithm 0), whose
constants, initialisation and conditions are used. As there, the multipliers follow the generation's best candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import constraints, trees
from evoopt.answers import answered
from evoopt.checks import check_strategy
from evoopt.constraints import Constraints, asking
from evoopt.population import Population
from evoopt.types import Array, Key, Params, pytree

DAMPING = 5  # of the multipliers
LONGEST = 1000  # generations whose violations are kept, where there are as many parameters


class State(NamedTuple):
    """The inner state, and the coefficients of k constraints."""

    inner: Any
    lam: Array  # (k,), the multipliers
    mu: Array  # (k,), the penalty weights; 0: not yet set
    set: Array  # (k,) bool, whose initial coefficients are final
    history: Array  # (h, k), violations of the best of the last generations, the newest first; NaN: none yet
    changes: Array  # (k,) int32, how often in a row mu grew, or shrank (below 0)
    updates: Array  # () int32
    reference: Array  # (), subtracted from values, so that small differences survive; NaN before the first answer

    @property
    def unanswered(self) -> Array:
        return self.inner.unanswered


class Spread(NamedTuple):
    """How much values and violations differ within a generation."""

    value: Array  # ()
    violation: Array  # (k,)
    square: Array  # (k,), of squared violations
    above: Array  # (k,), the share of candidates with a violation above 0
    largest: Array  # (k,), the largest violation in size
    dimension: int


@pytree
class AugmentedLagrangian:
    """A strategy under constraints; see `augmented_lagrangian`."""

    strategy: Any
    constraints: Constraints

    def oracle(self, objective: Any) -> Any:
        return asking(self.strategy.oracle, objective)

    def violated(self, violation: Any) -> Any:
        return self.constraints.total(violation)

    @property
    def dispersion(self) -> Any:
        inner = self.strategy.dispersion
        return lambda state, i: inner(state.inner, i)

    @property
    def moved(self) -> Any:
        moved = self.strategy.moved  # an AttributeError where the strategy has none
        return lambda state, population, points: moved(state.inner, population, points)

    def init(self, params: Params, key: Key) -> State:
        inner = self.strategy.init(params, key)
        return self._begun(inner, jnp.asarray(jnp.nan, jnp.result_type(float)))

    def _begun(self, inner: Any, reference: Array) -> State:
        """The state in which nothing is known of the constraints."""
        d = trees.size(jax.eval_shape(self.strategy.recommend, inner))
        k, dtype = self.constraints.count, jnp.result_type(float)
        zero, count = jnp.zeros(k, dtype), jnp.zeros((), jnp.int32)
        history = jnp.full((5 + min(d, LONGEST), k), jnp.nan, dtype)
        return State(inner, zero, zero, jnp.zeros(k, bool), history, jnp.zeros(k, jnp.int32), count, reference)

    def ask(self, state: State, key: Key) -> Population:
        return self.strategy.ask(state.inner, key)

    def tell(self, state: State, population: Population, answers: Any) -> State:
        values, violations, rest = constraints.parts(constraints.told(self, population, answers))
        dtype = state.lam.dtype
        g = violations.astype(dtype) / jnp.asarray(self.constraints.scale).astype(dtype)
        ok = jnp.isfinite(values) & (g < jnp.inf).all(axis=1)
        g = jnp.where(ok[:, None], jnp.maximum(g, -(jnp.finfo(dtype).max ** 0.25)), 0)
        f = values.astype(dtype)
        reference = jnp.where(jnp.isnan(state.reference), jnp.min(f, where=ok, initial=jnp.inf), state.reference)
        penalized = jnp.where(ok, f - reference + self._penalty(state, g), jnp.inf)
        grads = [self._gradient(state, g, slopes.value, slopes.violation) for slopes in rest]
        inward = jnp.where(answered(values), penalized, jnp.nan).astype(values.dtype)
        inner = self.strategy.tell(state.inner, population, constraints.joined(inward, None, grads))

        best = jnp.argmin(penalized)
        crossed = ((state.mu * g > -state.lam) & ok[:, None]).any(axis=0)
        spread = self._steepness(g, *rest) if rest and len(population) == 1 else _spread(f, g, ok, self._size(state))
        new = state._replace(reference=reference, history=jnp.concatenate([g[best][None], state.history[:-1]]))
        new = self._updated(self._initialised(new, spread), g[best], crossed)
        new = trees.where(ok.any(), new, state)._replace(inner=inner)
        if not hasattr(inner, "restarts"):
            return new
        # A run that begins again learns its coefficients again: those of a run that went wrong may have diverged.
        return trees.where(inner.restarts != state.inner.restarts, self._begun(inner, reference), new)

    def recommend(self, state: State) -> Params:
        return self.strategy.recommend(state.inner)

    def _size(self, state: State) -> int:
        """How many parameters are searched."""
        return trees.size(jax.eval_shape(self.strategy.recommend, state.inner))

    @property
    def _equality(self) -> np.ndarray:
        return np.array(self.constraints.equality, bool)

    def _penalty(self, state: State, g: Array) -> Array:
        """Sum of lam g + mu g^2 / 2 over the constraints, (n,), constant where an inequality holds by far."""
        flat = ~self._equality & (state.mu * g < -state.lam)
        g = jnp.where(flat, -state.lam / jnp.where(state.mu > 0, state.mu, 1), g)
        return (state.lam * g + state.mu * g**2 / 2).sum(axis=1)

    def _gradient(self, state: State, g: Array, grads: Params, each: Params) -> Params:
        """The gradient of value and penalty."""
        weight = jnp.where(~self._equality & (state.mu * g < -state.lam), 0, state.lam + state.mu * g)
        weight = weight / jnp.asarray(self.constraints.scale).astype(weight.dtype)
        return jax.tree.map(lambda x, y: x + jnp.einsum("nk,nk...->n...", weight.astype(y.dtype), y), grads, each)

    def _initialised(self, state: State, s: Spread) -> State:
        """Coefficients from interquartile ranges, until each constraint was both held and violated often enough."""
        lam, mu, equality, d = state.lam, state.mu, self._equality, s.dimension
        sign = 2 * s.above - 1
        # Where values are all alike, as of an objective that is constant, any weight will do; pycma leaves it at 0.
        s = s._replace(value=jnp.where(s.value > 0, s.value, 1))
        due = (~state.set | (mu == 0)) & ((sign > -0.8) | equality)
        small = 1e-11 * (s.value + 1)
        fresh = 0.4 * s.value / d / (s.violation + 1e-6 * s.square + small)
        lam = jnp.where(due & ~equality, s.value / (d * s.violation + small), lam)
        close = jnp.abs(sign) <= 0.2
        less = (close | (~equality & (sign <= 0.2))) & ((mu == 0) | (mu > fresh)) & due
        lam = jnp.where(less & (mu > 0), lam * fresh / jnp.where(mu > 0, mu, 1), lam)
        mu = jnp.where(due, fresh, mu)
        raised = jnp.minimum(20 * mu, jnp.maximum(mu, lam / (1e-22 + s.largest)))
        mu = jnp.where(due, raised, mu)
        final = due & ((state.updates > 2 + d) | (jnp.abs(sign) < 0.8))
        whole = (state.set & (state.mu > 0)).all() | state.set.all()
        pick = lambda new, old: jnp.where(whole, old, new)
        return state._replace(lam=pick(lam, state.lam), mu=pick(mu, state.mu), set=state.set | (final & ~whole))

    def _updated(self, state: State, g: Array, crossed: Array) -> State:
        """The coefficients after the generation whose best candidate has the violations g (k,)."""
        lam, mu, equality, k = state.lam, state.mu, self._equality, self.constraints.count
        d = self._size(state)
        used = mu > 0
        # Unlike in the paper, not where a constraint played no part in this generation nor for the best before it.
        crossed = crossed | (state.history[1] * mu > -lam)
        moves = used & (equality | (g * mu > -lam) | crossed)
        lam = jnp.where(moves, lam + mu * g / DAMPING, lam)
        negative = used & ~equality & (lam < 0)
        lam = jnp.where(negative, 0, lam)
        idle = negative | (~equality & (g * mu < -lam))
        past = ~jnp.isnan(state.history)
        below = jnp.where(past, (1 - jnp.sign(state.history)) / 2, 0)  # 0 counts half
        held = below.sum(axis=0) / jnp.maximum(past.sum(axis=0), 1).astype(below.dtype)
        grows = used & ~idle & ((g > 0) | ((g * mu > -lam) & (held > 0.95)))
        shrinks = used & ~idle & ~grows & (held < 0.9) & (g < 0)
        way = grows.astype(jnp.int32) - shrinks.astype(jnp.int32)
        changes = jnp.where(way == 0, state.changes, jnp.where(way * state.changes < 0, 0, state.changes) + way)
        # From 2 + k changes in a row on, larger ones, up to five times as large.
        patience = 2 + k
        extra = 4 / patience * jnp.clip(jnp.abs(changes) - patience, 0, patience).astype(mu.dtype)
        mu = mu * jnp.exp2(way.astype(mu.dtype) * (1 + extra) / (20 * d))
        return state._replace(lam=lam, mu=mu, changes=changes, updates=state.updates + 1)

    def _steepness(self, g: Array, slopes: Any) -> Spread:
        """For one candidate with gradients: what a step of length 1 along them changes."""
        square = lambda x, axis: (x.astype(g.dtype) ** 2).sum(axis=tuple(range(axis, x.ndim)))
        norm = lambda tree, axis: jnp.sqrt(sum(square(x, axis) for x in jax.tree.leaves(tree)))
        value = norm(slopes.value, 1)[0]
        each = norm(slopes.violation, 2)[0] / jnp.asarray(self.constraints.scale).astype(g.dtype)
        return Spread(value, each, 2 * jnp.abs(g[0]) * each, (g[0] > 0).astype(g.dtype), jnp.abs(g[0]), 1)


def _spread(f: Array, g: Array, ok: Array, d: int) -> Spread:
    """Interquartile ranges over the answered candidates."""
    m = jnp.maximum(ok.sum(), 1).astype(f.dtype)

    def middle(x: Array) -> Array:  # (n, ...) -> (...)
        x = jnp.sort(jnp.where(ok.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.inf), axis=0)

        def at(share: float) -> Array:
            place = share * (m - 1)
            low = jnp.floor(place).astype(jnp.int32)
            high = jnp.minimum(low + 1, (m - 1).astype(jnp.int32))
            return x[low] + (place - low.astype(place.dtype)) * (x[high] - x[low])

        return at(0.75) - at(0.25)

    above = ((g > 0) & ok[:, None]).sum(axis=0).astype(f.dtype) / m
    largest = jnp.max(jnp.abs(g), axis=0, where=ok[:, None], initial=0)
    return Spread(middle(f), middle(g), middle(g**2), above, largest, d)


def augmented_lagrangian(
    strategy: Any, equality: Sequence[bool] | int, *, tolerance: float = 1e-8, scale: Any = 1.0
) -> AugmentedLagrangian:
    """`strategy` under constraints, which is told value + sum over i of lam_i g_i + mu_i g_i^2 / 2.

    The coefficients adapt. With the right multipliers lam, the constrained optimum is a minimum of this function, where
    the sum is 0: the strategy converges as without constraints, with the optimum inside its distribution. An inequality
    that holds by more than lam_i / mu_i is left out. `minimize` keeps the best feasible candidate; what the strategy
    recommends, the mean of a distribution, is near it and may be infeasible by as little as the search has converged.

    The objective returns `evoopt.answers.Answer(value, violation)` or (value, violation), violation (k,): an inequality
    holds where it is at most 0, an equality where its size is at most the tolerance. For first-order strategies the
    gradients of value and violations are combined. Wrap this one last: bounds and restarts belong inside it, and
    restarts begin with new coefficients. Give them `tolfun=0, tolfunhist=0`: at the optimum the function is flat, so a
    run that ends where values differ by 1e-11 has the constraints right to no more than the root of that. Values
    and violations that differ by less than float32 resolves need float64 (docs/float64.md).

    Args:
        strategy: any strategy, wrapped or not, best one with a distribution, such as `cma_es()`.
        equality: the number of inequalities, or a bool for each constraint, True for an equality.
        tolerance: of equalities, in units of the violation; the search itself drives them to 0.
        scale: by which violations are divided, a number or one for each constraint, so that they are alike in size.

    Raises:
        TypeError: if `equality` is one bool.
        ValueError: for a negative tolerance, or scales that are not positive.

    >>> from evoopt import minimize
    >>> from evoopt.strategies import cma_es
    >>> f = lambda x: (jnp.sum(x**2), 1 - x[:1])  # x[0] is at least 1
    >>> result = minimize(f, jnp.zeros(2), augmented_lagrangian(cma_es(), 1), generations=200)
    >>> result.feasible, round(result.best_value, 3)
    (True, 1.0)
    """
    check_strategy(strategy)
    return AugmentedLagrangian(strategy, constraints.constraints(equality, tolerance, scale))
