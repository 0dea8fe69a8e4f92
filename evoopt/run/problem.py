"""What is to be minimised, and what a generation leaves: the words that all engines share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import constraints, trees
from evoopt.answers import answered, best_place, finite, split
from evoopt.population import Population
from evoopt.stopping import Stops, Watch
from evoopt.types import Array, Key, Objective, Params, error

DISPATCH = 512  # most generations in one dispatch


class Carry(NamedTuple):
    """Everything that a run is: saved, restored, and carried from generation to generation."""

    state: Any
    context: Any
    generation: Array  # () int32, told so far
    best: Params | None  # the best candidate seen
    best_value: Any  # (); on the host, float64 of NumPy
    best_context: Any = None  # the context it was seen in; None where contexts do not change
    best_violation: Any = None  # (k,), its violations; None for a strategy that does not read them
    watch: Watch | None = None  # what the stopping criteria look at; None where nothing but the budget ends the run


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be minimised, and how its answers are used: the arguments of `minimize`."""

    f: Objective
    strategy: Any
    key: Key  # of the run: that of a generation is this one folded with its number
    target: float | None = None
    update: Callable[[Any, Any], Any] | None = None
    each: Callable[[Any, int], Any] | None = None
    summarize: Callable[[Array, Any], dict[str, Array]] | None = None
    batch_size: int | None = None
    keep_best: bool = True
    jit: bool = True
    evaluator: Any = None
    stop: Stops | None = None  # tolerances of the criteria that end the run; None: it goes on

    @property
    def oracle(self) -> Callable[..., Any]:
        """What a candidate is asked."""
        return self.strategy.oracle(self.f)

    def apart(self, given: Any) -> tuple[Any, Any]:
        """(answers, aux) of what the oracle gave.

        Raises:
            TypeError: for a pair that is no `WithAux`, where `update` or `summarize` were given.
        """
        answers, aux = split(given)
        uses = self.update is not None or self.summarize is not None
        if uses and aux is None and isinstance(answers, tuple) and self.oracle is self.f:
            raise error(
                "evoopt.answers.WithAux(value, aux) from the objective",
                f"a tuple of {len(answers)}",
                "the pair (value, aux), which could as well be (value, gradient): WithAux tells them apart",
                TypeError,
            )
        return answers, aux

    def arguments(self, context: Any, n: int) -> tuple[tuple, Any]:
        """What the objective gets besides a candidate: the same for all, and a row for each."""
        args = () if context is None and self.each is None else (context,)
        return args, self.each(context, n) if self.each else None


def begun(strategy: Any, state: Any, context: Any, value: Any, keep_best: bool, changes: bool) -> Carry:
    """The carry of a run that has told nothing.

    Args:
        strategy: whose recommendation is the best so far.
        state, context: of the run.
        value: its infinite best value.
        keep_best: whether the best candidate is kept.
        changes: whether contexts change, so that that of the best candidate is kept too.
    """
    best = jax.tree.map(jnp.copy, strategy.recommend(state)) if keep_best else None
    copied = lambda: jax.tree.map(jnp.copy, trees.strong(context))
    seen = copied() if keep_best and changes else None
    violation = None
    if constraints.reads(strategy):
        lib: Any = np if isinstance(value, np.ndarray) else jnp
        violation = lib.full(strategy.constraints.count, np.inf, value.dtype)
    return Carry(state, copied(), jnp.zeros((), jnp.int32), best, value, seen, violation)


def reached(carry: Carry, target: Any, strategy: Any) -> Any:
    """Whether the best candidate is feasible and its value at most the target, ()."""
    met = carry.best_value <= target
    return met if carry.best_violation is None else met & (violation(carry, strategy) <= 0)


def violation(carry: Carry, strategy: Any) -> Any:
    """The total violation of the best candidate, ()."""
    return strategy.violated(carry.best_violation[None])[0]


def statistics(values: Array) -> dict[str, Array]:
    """best, mean, median, worst over the finite answers of a generation (NaN where there is none), and how many."""
    ok = jnp.isfinite(values)
    x = jnp.where(ok, values, jnp.nan)
    n = ok.sum()
    some = n > 0
    clean = finite(values)
    return {
        "best": jnp.where(some, jnp.min(values, where=ok, initial=jnp.inf), jnp.nan),
        "mean": jnp.where(some, jnp.where(ok, clean, 0).sum() / jnp.maximum(n, 1).astype(values.dtype), jnp.nan),
        "median": jnp.nanmedian(x),
        "worst": jnp.where(some, jnp.max(values, where=ok, initial=-jnp.inf), jnp.nan),
        "answered": answered(values).sum(),
    }


def feasibility_of(strategy: Any, carry: Carry) -> dict[str, Any]:
    """What a result says of the best candidate: whether it is feasible, by how much it is not, and its violations."""
    if carry.best_violation is None:
        return {}
    total = float(violation(carry, strategy))
    return {"feasible": total <= 0, "violation": total, "violations": np.asarray(carry.best_violation)}


def watchable(answers: Any, strategy: Any) -> Any:
    """The values that stopping criteria look at, (n,): with the total violation, where there are constraints."""
    values, violations, _ = constraints.parts(answers)
    return values if violations is None else values + strategy.violated(violations).astype(values.dtype)


def feasibility(values: Any, totals: Any) -> dict[str, Any]:
    """How many of a generation are feasible, and the least total violation, NaN where none was answered."""
    lib: Any = np if isinstance(values, np.ndarray) else jnp
    known = lib.isfinite(values)
    least = lib.where(known, totals, lib.inf).min()
    return {"feasible": (known & (totals <= 0)).sum(), "violation": lib.where(known.any(), least, lib.nan)}


def host_statistics(values: np.ndarray) -> dict[str, Any]:
    """The same of float64 values on the host."""
    ok = np.sort(values[np.isfinite(values)])
    m, answered = len(ok), len(values) - int(np.isnan(values).sum()) - int(np.isneginf(values).sum())
    if m == 0:
        return {"best": math.nan, "mean": math.nan, "median": math.nan, "worst": math.nan, "answered": answered}
    median = ok[m // 2] if m % 2 else (ok[m // 2 - 1] + ok[m // 2]) / 2
    found = {"best": ok[0], "mean": ok.mean(), "median": median, "worst": ok[-1]}
    return {name: float(x) for name, x in found.items()} | {"answered": answered}


def after(
    carry: Carry,
    state: Any,
    population: Population,
    answers: Any,
    aux: Any,
    update: Callable[[Any, Any], Any] | None,
    summarize: Callable[[Array, Any], dict[str, Array]] | None,
    strategy: Any,
) -> tuple[Carry, dict[str, Array]]:
    """What a generation leaves besides the state: context, best candidate, the row of metrics."""
    values, violations, _ = constraints.parts(answers)
    context = update(carry.context, aux) if update else carry.context
    row = statistics(values) | {"evaluations": population.asked()}
    i, value, worst = best_place(values), row["best"], carry.best_violation
    better = value < carry.best_value
    if violations is not None:
        totals = strategy.violated(violations)
        row |= feasibility(values, totals)
        i = constraints.best(values, totals)
        value = values[i]
        better = constraints.better(value, totals[i], carry.best_value, violation(carry, strategy))
        worst = jnp.where(better, violations[i], carry.best_violation)
    best = (carry.best, carry.best_context)
    if carry.best is not None:
        genome = jax.tree.map(lambda g: g[i], population.genomes)
        seen = None if carry.best_context is None else carry.context
        best = jax.lax.cond(better, lambda: (population.decode(genome), seen), lambda: best)
    best_value = jnp.where(better, value, carry.best_value)
    row["best_so_far"] = best_value
    if summarize:
        row |= summarize(values, aux)
    return Carry(state, context, carry.generation + 1, best[0], best_value, best[1], worst, carry.watch), row
