"""Constraints by three rules for populations that compare or rank: feasible first, then by value, else by violation.

Source: Deb, "An efficient constraint handling method for genetic algorithms", Computer Methods in Applied Mechanics and
Engineering 186 (2000), equation (4). There an infeasible candidate gets the worst feasible value of its generation plus
its violation, which changes from generation to generation; here it gets a number that does not, so that parents that
keep theirs compare with later offspring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from evoopt import constraints
from evoopt.checks import check_strategy
from evoopt.constraints import Constraints, asking
from evoopt.population import Population
from evoopt.types import Array, Key, Params, pytree


@pytree
class FeasibilityRules:
    """A strategy that prefers what is feasible; see `feasibility_rules`."""

    strategy: Any
    constraints: Constraints

    def oracle(self, objective: Any) -> Any:
        return asking(self.strategy.oracle, objective)

    def violated(self, violation: Any) -> Any:
        return self.constraints.total(violation)

    @property
    def dispersion(self) -> Any:
        return self.strategy.dispersion

    @property
    def moved(self) -> Any:
        return self.strategy.moved

    def init(self, params: Params, key: Key) -> Any:
        return self.strategy.init(params, key)

    def ask(self, state: Any, key: Key) -> Population:
        return self.strategy.ask(state, key)

    def tell(self, state: Any, population: Population, answers: Any) -> Any:
        values, violations, rest = constraints.parts(constraints.told(self, population, answers))
        totals = self.violated(violations)
        if rest:  # downhill in value where feasible, in violation where not
            rest = (self._downhill(violations, totals, rest[0].value, rest[0].violation),)
        return self.strategy.tell(state, population, constraints.joined(ordered(values, totals), None, rest))

    def recommend(self, state: Any) -> Params:
        return self.strategy.recommend(state)

    def _downhill(self, violations: Array, totals: Array, grads: Params, each: Params) -> Params:
        slopes = jax.vmap(jax.grad(lambda v: self.violated(v[None])[0]))(violations)  # (n, k)

        def one(grad: Array, rows: Array) -> Array:
            up = jnp.einsum("nk,nk...->n...", slopes.astype(rows.dtype), rows)
            return jnp.where((totals > 0).reshape(-1, *(1,) * (grad.ndim - 1)), up, grad)

        return jax.tree.map(one, grads, each)


def ordered(values: Array, totals: Array) -> Array:
    """One number for each candidate, (n,): the values of feasible ones, and above them the violations of the others.

    A violation v > 0 becomes c v^(1/8): any v of the float type stays apart from its neighbours within eight units in
    the last place, lies above 2^64 (float32), and is far from overflow. Feasible values end there.

    >>> x = ordered(jnp.array([5.0, 1.0, 1.0, jnp.nan]), jnp.array([0.0, 1e-30, 2e-30, 0.0]))
    >>> bool(x[0] == 5.0), bool(x[0] < x[1]), bool(x[1] < x[2]), bool(jnp.isnan(x[3]))
    (True, True, True, True)
    """
    limits = jnp.finfo(values.dtype)
    wide = limits.maxexp  # 128 for float32
    base = jnp.asarray(2.0 ** (5 * wide // 8), values.dtype)  # 2^80, times 2^-16 to 2^16
    least = jnp.asarray(2.0 ** (wide // 2), values.dtype)
    # The root in three steps, because there is no eighth root; a denormal v counts as the smallest normal one.
    root = jnp.sqrt(jnp.sqrt(jnp.sqrt(jnp.maximum(totals, limits.tiny))))
    feasible = jnp.where(jnp.isfinite(values), jnp.minimum(values, least / 2), values)
    infeasible = jnp.where(jnp.isfinite(values) & jnp.isfinite(totals), base * root, jnp.inf)
    known = ~jnp.isnan(values)
    return jnp.where(known & (totals > 0), infeasible, feasible)


def feasibility_rules(
    strategy: Any, equality: Sequence[bool] | int, *, tolerance: float = 1e-8, scale: Any = 1.0
) -> FeasibilityRules:
    """`strategy` under constraints, for populations that compare or rank values, such as differential evolution.

    A feasible candidate is better than an infeasible one; of two feasible ones that of less value, of two infeasible
    ones that of less total violation is better. Strategies that use the size of values, not only their order, are
    better served by `augmented_lagrangian`, and so are optima at the meeting of many constraints. A first-order
    strategy descends the value where it is feasible and the total violation where it is not.

    The objective returns `evoopt.answers.Answer(value, violation)` or (value, violation), violation (k,): an inequality
    holds where it is at most 0, an equality where its size is at most the tolerance. Wrap this one last: other wrappers
    belong inside it.

    Args:
        strategy: any strategy, wrapped or not.
        equality: the number of inequalities, or a bool for each constraint, True for an equality.
        tolerance: of equalities, in units of the violation. A population needs a generous one, such as 1e-3.
        scale: by which violations are divided in the total, a number or one for each constraint.

    Raises:
        TypeError: if `equality` is one bool.
        ValueError: for a negative tolerance, or scales that are not positive.

    >>> from evoopt import minimize
    >>> from evoopt.strategies import differential_evolution
    >>> f = lambda x: (jnp.sum(x**2), 1 - x[:1])  # x[0] is at least 1
    >>> result = minimize(f, jnp.zeros(2), feasibility_rules(differential_evolution(20), 1), generations=80)
    >>> result.feasible, round(result.best_value, 3)
    (True, 1.0)
    """
    check_strategy(strategy)
    return FeasibilityRules(strategy, constraints.constraints(equality, tolerance, scale))
