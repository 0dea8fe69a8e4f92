"""Constraints: how violations travel beside values, when a candidate is feasible, and which of two is better.

A violation is signed: an inequality holds where it is at most 0, an equality where its size is at most a tolerance. A
strategy that reads violations has `violated(violation) -> (n,)`, each candidate's total, and `constraints.count`; all
others refuse them. Of two candidates the one that violates less is better, and of two feasible ones the one of less
value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from evoopt import answers as plainly
from evoopt.answers import Answer, WithAux, as_floats, as_values, number, plain, split
from evoopt.population import Population
from evoopt.types import Answers, Array, Objective, error, pytree, static


@pytree
class Constraints:
    """What is known of k constraints.

    >>> two = Constraints((False, True), tolerance=0.5)
    >>> two.total(np.array([[-1.0, 0.25], [2.0, -1.5]])).tolist()
    [0.0, 3.0]
    """

    equality: tuple[bool, ...] = static()
    tolerance: Any = 0.0  # of equalities
    scale: Any = 1.0  # (k,) or a number, by which violations are divided

    @property
    def count(self) -> int:
        return len(self.equality)

    def total(self, violation: Any) -> Any:
        """The total violation of each row, in units of the scales: (n, k) -> (n,), 0 where it is feasible."""
        xp: Any = np if isinstance(violation, np.ndarray) else jnp
        tolerance, scale = (xp.asarray(x).astype(violation.dtype) for x in (self.tolerance, self.scale))
        size = xp.where(np.array(self.equality, bool), xp.abs(violation) - tolerance, violation)
        return (xp.maximum(size, 0) / scale).sum(axis=1)


def constraints(equality: Sequence[bool] | int, tolerance: Any, scale: Any) -> Constraints:
    """The constraints of a wrapper's arguments, checked.

    Raises:
        TypeError: if `equality` is neither a number of constraints nor a sequence of bools.
        ValueError: for a negative tolerance, or scales that are not positive or of another number.
    """
    if isinstance(equality, (int, np.integer)) and not isinstance(equality, bool):
        equality = (False,) * int(equality)
    kinds = (bool, np.bool_)
    if isinstance(equality, (str, bool)) or not all(isinstance(x, kinds) for x in np.ravel(np.asarray(equality))):
        raise error(
            "a number of inequalities, or a bool for each constraint, True for an equality", repr(equality)[:60],
            "one bool for all constraints, whose number is then unknown", TypeError,
        )  # fmt: skip
    kept = tuple(bool(x) for x in np.ravel(np.asarray(equality)))
    known = not any(isinstance(x, Tracer) for x in (tolerance, scale))
    if known and not np.all(np.asarray(tolerance) >= 0):
        raise error("a tolerance of at least 0", repr(tolerance), "a sign: equalities hold where |violation| <= it")
    if isinstance(scale, (list, tuple)):
        scale = np.asarray(scale, float)
    if np.shape(scale) not in ((), (len(kept),)) or (known and not np.all(np.asarray(scale) > 0)):
        cause = "the scales of other constraints, or their inverse signs"
        raise error(f"one positive scale, or {len(kept)}", repr(scale)[:60], cause)
    return Constraints(kept, tolerance, scale)


def reads(strategy: Any) -> bool:
    """Whether a strategy reads violations."""
    return hasattr(strategy, "violated")


def parts(answers: Answers) -> tuple[Any, Any, tuple]:
    """(values, violations or None, the rest) of a generation's answers, as they are."""
    first, *rest = answers if isinstance(answers, tuple) else (answers,)
    if isinstance(first, Answer) and first.violation is not None:
        return first.value, first.violation, tuple(rest)
    return as_values(first), None, tuple(rest)


def joined(values: Any, violations: Any, rest: Sequence[Any]) -> Answers:
    """The inverse of `parts`."""
    first = values if violations is None else Answer(values, violations)
    return (first, *rest) if rest else first


def told(strategy: Any, population: Population, answers: Answers) -> Any:
    """As `answers.told`, with violations (n, k) for a strategy that reads them.

    A candidate with a violation that is NaN has no answer: its value is NaN, its violations are infinite.

    Raises:
        ValueError: if the values are not (n,) or the violations not (n, k).
        TypeError: for violations where they are not read, or none where they are.
    """
    if not reads(strategy):
        return plainly.told(population, answers)
    k, n = strategy.constraints.count, len(population)
    values, violations, rest = parts(answers)
    values = plainly.told(population, values)
    if violations is None and k == 0:
        violations = jnp.zeros((n, 0), values.dtype)
    if violations is None:
        raise unconstrained(k)
    violations = jnp.asarray(violations)
    if violations.shape != (n, k):
        raise error(
            f"violations of shape ({n}, {k}), one for each candidate and constraint", f"shape {violations.shape}",
            "`equality` has another length than the vector of violations, or a constraint is a number and not (1,)",
        )  # fmt: skip
    violations = violations.astype(values.dtype)
    known = plainly.answered(values) & ~jnp.isnan(violations).any(axis=1)
    values, violations = jnp.where(known, values, jnp.nan), jnp.where(known[:, None], violations, jnp.inf)
    return joined(values, violations, jax.tree.map(jnp.asarray, rest))


def unconstrained(k: int) -> Exception:
    """The error for answers without violations."""
    return error(
        f"answers with the violations of {k} constraints", "values alone",
        "an objective that returns its value alone: return Answer(value, violation), or (value, violation)", TypeError,
    )  # fmt: skip


# What a candidate is asked ----------------------------------------------------


@pytree
class Paired:
    """An objective whose pair (value, violation) is an `Answer`."""

    objective: Objective = static()

    def __call__(self, *args: Any) -> Any:
        answer, aux = split(self.objective(*args))
        answer = paired(answer)
        return answer if aux is None else WithAux(answer, aux)


@pytree
class Differentiated:
    """What an oracle that differentiates says of the value and of each violation.

    (Answer(value, violation), Answer(derivative, derivatives)): the gradients of the violations are a tree whose leaves
    have a leading axis k.
    """

    oracle: Callable[..., Objective] = static()
    objective: Objective = static()

    def __call__(self, candidate: Any, *args: Any) -> Any:
        def both(*given: Any) -> WithAux:
            answer, aux = split(self.objective(*given))
            answer = paired(answer)
            if not isinstance(answer, Answer) or answer.violation is None:
                raise unconstrained(1)
            return WithAux(answer.value, (answer.violation, aux))

        (value, grad), (violation, aux) = split(self.oracle(both)(candidate, *args))

        def one(i: Array) -> Any:
            return self.oracle(lambda *given: both(*given).aux[0][i])(candidate, *args)[1]

        grads = jax.vmap(one)(jnp.arange(violation.shape[0], dtype=jnp.int32))
        answers = (Answer(value, violation), Answer(grad, grads))
        return answers if aux is None else WithAux(answers, aux)


def paired(answer: Any) -> Any:
    """An answer whose pair (value, violation) is an `Answer`; all else as it is."""
    if isinstance(answer, tuple) and len(answer) == 2 and not isinstance(answer[0], Answer):
        return Answer(*answer)
    return answer


def asking(oracle: Callable[..., Objective], objective: Objective) -> Objective:
    """The oracle of a strategy that reads violations, from that of the strategy inside."""
    return Paired(objective) if oracle(objective) is objective else Differentiated(oracle, objective)


# On the host ------------------------------------------------------------------


def gathered(strategy: Any, given: Sequence[Any], population: Population) -> Answers:
    """What a Python objective answered for the active candidates, as answers of all n, in float64; NaN for None.

    Raises:
        ValueError: for another number of violations, naming the candidate.
        TypeError: for an answer without violations.
    """
    k, rows, values, rest = strategy.constraints.count, [], [], []
    for i, answer in enumerate(given):
        first, more, row = _read(k, answer, f"candidate {i}")
        rest.append(more)
        rows.append(row)
        values.append(first)
    stacked = lambda *leaves: population.widened(np.stack([np.asarray(x) for x in leaves]))
    more = [jax.tree.map(stacked, *column) for column in zip(*rest, strict=True)] if rest else []
    whole = population.widened(np.stack(rows)) if rows else np.zeros((0, k))
    return _known(population.widened(as_floats(values, len(values))), whole, more)


def single(strategy: Any, answer: Any) -> tuple[float, list[float] | None]:
    """(value, violations) of what was told of one candidate; violations are None for a strategy that reads none."""
    if not reads(strategy):
        return number(plain(answer)), None
    value, _, row = _read(strategy.constraints.count, answer, "the candidate")
    return number(value), row.tolist()


def _read(k: int, answer: Any, who: str) -> tuple[Any, list[Any], np.ndarray]:
    """(value, what comes after it, its k violations)."""
    answer = paired(answer)
    first, *more = answer if isinstance(answer, tuple) else (answer,)
    if not isinstance(first, Answer):
        none = first is None or first != first or k == 0  # NaN alone is no answer
        first = Answer(first, np.full(k, np.nan) if none else None)
    if first.violation is None:
        raise unconstrained(k)
    row = np.asarray(first.violation, np.float64)
    if row.shape != (k,):
        cause = "`equality` has another length than the vector of violations, or a constraint is a number"
        raise error(f"violations of shape ({k},) for {who}", f"shape {row.shape}", cause)
    return first.value, more, row


def apart(strategy: Any, answers: Any, population: Population) -> Answers:
    """What somebody's own loop tells of a generation, in float64.

    `Answer(values, violations)`, (values, violations), (answer, gradients), or a list of such for each candidate.
    """
    answers = tuple(answers) if isinstance(answers, tuple) else answers
    pair = isinstance(answers, tuple) and len(answers) == 2 and not isinstance(answers[0], (Answer, tuple))
    if pair and np.ndim(answers[0]) == 1:
        answers = Answer(*answers)
    first, *rest = answers if isinstance(answers, tuple) and isinstance(answers[0], Answer) else (answers,)
    if not isinstance(first, Answer) or np.ndim(first.value) == 0:
        return gathered(strategy, list(answers), population)
    if first.violation is None:
        raise unconstrained(strategy.constraints.count)
    values = population.widened(as_floats(first.value, population.counted(first.value)))
    violations = population.widened(np.asarray(first.violation, np.float64))
    shape = (len(population), strategy.constraints.count)
    if violations.shape != shape:
        cause = "`equality` has another length than the vectors of violations"
        raise error(f"violations of shape {shape}", f"shape {violations.shape}", cause)
    return _known(values, violations, [jax.tree.map(lambda x: population.widened(np.asarray(x)), x) for x in rest])


def _known(values: np.ndarray, violations: np.ndarray, rest: Sequence[Any]) -> Answers:
    """Answers with NaN values where a violation is NaN."""
    known = ~np.isnan(values) & ~np.isnan(violations).any(axis=1)
    return joined(np.where(known, values, np.nan), np.where(known[:, None], violations, np.inf), rest)


# Which is better --------------------------------------------------------------


def best(values: Any, totals: Any) -> Any:
    """The place of the best candidate, (): of least violation, and of least value among those.

    >>> int(best(jnp.array([3.0, 1.0, 2.0, 0.0]), jnp.array([0.0, 0.5, 0.0, 0.5])))
    2
    """
    xp: Any = np if isinstance(values, np.ndarray) else jnp
    totals = xp.where(xp.isfinite(values), totals, xp.inf)
    among = xp.isfinite(values) & (totals == totals.min())
    return xp.argmin(xp.where(among, values, xp.inf))


def better(value: Any, total: Any, than_value: Any, than_total: Any) -> Any:
    """Whether a finite value with this total violation is better than another, ()."""
    less = (total < than_total) | ((total == than_total) & (value < than_value))
    return (abs(value) < float("inf")) & less
