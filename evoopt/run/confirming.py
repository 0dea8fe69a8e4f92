"""What the answer of a noisy search is worth: its recommendation, evaluated again, because the best answer was luck."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import constraints
from evoopt.answers import Answer, answered, as_floats, as_values, split
from evoopt.population import Population
from evoopt.run import programs
from evoopt.run.problem import Carry, Problem
from evoopt.types import Array, Key, Params, pytree


@pytree
class Same:
    """decode: the same candidate, whatever the genome."""

    params: Params

    def __call__(self, genome: Array) -> Params:
        del genome
        return self.params


def confirmations(strategy: Any) -> int:
    """The evaluations that a strategy, or one that it wraps, wants of its recommendation; 0 for most."""
    if hasattr(strategy, "confirmations"):
        return strategy.confirmations
    return confirmations(strategy.strategy) if hasattr(strategy, "strategy") else 0


@dataclasses.dataclass(frozen=True)
class Again:
    """`again(params, context, key) -> (value, evaluations)`, the mean of `times` answers; in place of a `confirm`."""

    problem: Problem
    times: int
    recommended: Callable[[Any], Params]  # state -> parameters as the strategy knows them

    def __call__(self, params: Params, context: Any, key: Key) -> tuple[float, int]:
        del key  # the noise is the objective's: in the context, in `each`, or its own
        p = self.problem
        population = Population(Same(params), jnp.arange(self.times, dtype=jnp.int32))
        args, each = p.arguments(context, self.times)
        if p.jit:
            ask = lambda population, args, each: population.map(p.oracle, *args, each=each)
            values: Any = _value(programs.jit(ask)(population, args, each))
        else:
            row = lambda i: () if each is None else (jax.tree.map(lambda x: x[i], each),)
            given = [p.f(candidate, *args, *row(i)) for i, candidate in enumerate(population)]
            values = as_floats([_value(answer) for answer in given], self.times)
        values = np.asarray(values, np.float64)
        ok = values[np.asarray(answered(jnp.asarray(values)))]
        return float(ok.mean()) if len(ok) else np.nan, self.times

    def chosen(self, carry: Carry) -> Carry:
        """The carry whose best candidate is the recommendation."""
        return carry._replace(best=self.recommended(carry.state), best_context=None)  # that of the end


def _value(given: Any) -> Any:
    """The value in what an objective gave, whatever it says besides."""
    answer, _ = split(given)
    return as_values(answer.value if isinstance(answer, Answer) else answer)


def of(problem: Problem, recommended: Callable[[Any], Params]) -> Again | None:
    """How the recommendation of a strategy for noise is evaluated; None for other strategies.

    None under constraints too: there, the best is the best feasible candidate that was answered.
    """
    times = 0 if constraints.reads(problem.strategy) else confirmations(problem.strategy)
    return Again(problem, times, recommended) if times else None
