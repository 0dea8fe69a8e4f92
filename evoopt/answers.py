"""Answers: the numbers an objective returns, and how strategies treat a missing one.

One rule for every evaluator: NaN is no answer, nor is -inf, because nothing is that good; +inf is the worst value.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from evoopt import trees
from evoopt.types import Answers, Array, error, pytree

if TYPE_CHECKING:
    from evoopt.population import Population

State = TypeVar("State")


@pytree
class Answer:
    """What is known of one candidate, for objectives that know more than its value; with a leading axis, of several.

    >>> jax.vmap(lambda x: Answer(x**2, violation=jnp.maximum(1 - x, 0)))(jnp.arange(3.0)).violation.tolist()
    [1.0, 0.0, 0.0]
    """

    value: Any  # (), minimised
    violation: Any = None  # (k,), how far each constraint is violated, 0 where it holds
    descriptor: Any = None  # (m,), where the candidate belongs among those that are kept


class WithAux(NamedTuple):
    """An answer and what else an objective reports, for `update` and `summarize`.

    A type of its own, so that no pair (value, gradient) is taken for it. `answer` is a number, an `Answer`, or for
    first-order strategies (value, gradient); `aux` is any tree of arrays.
    """

    answer: Any
    aux: Any


def split(given: Any) -> tuple[Any, Any]:
    """(answer, aux) of what an objective or an oracle gave; aux is None where there is none.

    >>> split(WithAux(1.0, {"steps": 3})), split((1.0, "gradient"))
    ((1.0, {'steps': 3}), ((1.0, 'gradient'), None))
    """
    return (given.answer, given.aux) if isinstance(given, WithAux) else (given, None)


def number(x: Any, candidate: Any = "a candidate") -> float:
    """An objective's answer as a float; NaN for None.

    Any real number will do: from Python, NumPy, JAX, `decimal` or `fractions`, of any size, or in an array of one.

    Raises:
        TypeError: for anything else, naming the candidate.

    >>> number(3_000_000_000), number(np.float16(0.5)), number(None), number(np.ones(1)), number(10**400)
    (3000000000.0, 0.5, nan, 1.0, inf)
    """
    if x is None:
        return math.nan
    cause = "an objective that answers text, or a container"
    if isinstance(x, (np.ndarray, np.generic, jax.Array)):
        kind = np.dtype(x.dtype).kind if not jnp.issubdtype(x.dtype, jnp.floating) else "f"
        if np.size(x) == 1 and kind in "fiub":
            return float(np.asarray(x).reshape(()))
        cause = "an objective that answers a vector" if np.size(x) != 1 else "an objective that answers complex numbers"
    elif isinstance(x, (numbers.Real, Decimal)):
        try:
            return float(x)
        except OverflowError:  # an integer too large for a float
            return math.inf if x > type(x)(0) else -math.inf  # type: ignore[operator]
    elif isinstance(x, complex):
        cause = "an objective that answers complex numbers"
    raise error(f"one real number for {candidate}", f"{type(x).__name__} {repr(x)[:60]}", cause, TypeError)


def as_floats(answers: Iterable[Any], n: int) -> np.ndarray:
    """The values of n candidates, (n,) float64, NaN where an answer is None.

    Raises:
        TypeError: if an answer is not a number, naming the candidate, or if all are None.
        ValueError: if there are not n answers.
    """
    if isinstance(answers, (str, bytes, dict, set, frozenset)) or not isinstance(answers, Iterable):
        raise error(
            f"{n} numbers, one for each candidate",
            f"{type(answers).__name__} {repr(answers)[:60]}",
            "the answer of one candidate, or an unordered container of answers",
            TypeError,
        )
    if isinstance(answers, (np.ndarray, jax.Array)) and answers.ndim == 1:
        rows: Any = np.asarray(answers)
    else:
        rows = list(answers)
    if len(rows) != n:
        raise error(
            f"{n} values, one for each candidate",
            f"{len(rows)}",
            "the answers of another generation, or of a slice told with the whole population",
        )
    if n and all(row is None for row in rows):
        raise error("a value for at least one candidate", "None for all", "an objective without `return`", TypeError)
    return np.array([number(row, f"candidate {i}") for i, row in enumerate(rows)], np.float64)


def answered(values: Array) -> Array:
    """Which values are answers, (n,) bool: all but NaN and -inf (nothing is that good)."""
    return ~(jnp.isnan(values) | jnp.isneginf(values))


def best_place(values: Array) -> Array:
    """The place of the best answer, () int: the first if several are best, 0 if there is no answer.

    >>> int(best_place(jnp.array([jnp.nan, 3.0, -jnp.inf, 1.0, 1.0])))
    3
    """
    return jnp.argmin(jnp.where(answered(values), values, jnp.inf))


def count(values: Array) -> Array:
    """The number of answers, (), at least 1 so that it can be a divisor."""
    return jnp.maximum(answered(values).sum(), 1).astype(values.dtype)


def finite(values: Array) -> Array:
    """The values with +inf replaced by the worst finite one and missing answers by 0."""
    ok = jnp.isfinite(values)
    worst = jnp.max(values, where=ok, initial=-jnp.inf)
    worst = jnp.where(ok.any(), worst, 0)
    return jnp.where(answered(values), jnp.where(ok, values, worst), 0)


def plain(answer: Any) -> Any:
    """The value of an `Answer`, the answer itself otherwise.

    Raises:
        TypeError: for violations or descriptors, which are not for this strategy.
    """
    if not isinstance(answer, Answer):
        return answer
    if answer.violation is not None or answer.descriptor is not None:
        raise error(
            "values alone",
            "answers with " + ("violations" if answer.violation is not None else "descriptors"),
            "a strategy without constraints or descriptors: leave them out, or add a penalty to the value",
            TypeError,
        )
    return answer.value


def as_values(answers: Any) -> Array:
    """The values (n,) in a generation's answers: the answers themselves, or the first entry of a tuple."""
    answers = plain(answers)
    return answers[0] if isinstance(answers, tuple) else answers


def told(population: Population, answers: Answers) -> Any:
    """The answers as arrays, after checking that there is one value per candidate. A list of floats will do.

    Raises:
        ValueError: if the values are not (n,).
        TypeError: if they are not numbers.
    """
    n, answers = len(population), plain(answers)
    if isinstance(answers, list):
        try:
            answers = np.asarray(answers, jnp.result_type(float))
        except (TypeError, ValueError) as problem:
            raise error(
                f"{n} numbers",
                f"a list of something else: {problem}",
                "an objective that answers None or an array",
                TypeError,
            ) from problem
    answers = jax.tree.map(jnp.asarray, answers)
    values = as_values(answers)
    if jnp.shape(values) != (n,):
        raise error(
            f"values of shape ({n},), one for each candidate",
            f"shape {jnp.shape(values)}",
            "an objective that answers a vector, or the answers of a slice told with the whole population",
        )
    if not jnp.issubdtype(values.dtype, jnp.floating) or jnp.finfo(values.dtype).bits < 32:  # bfloat16 counts to 256
        values = values.astype(jnp.float32)
        answers = (values, *answers[1:]) if isinstance(answers, tuple) else values
    return answers


def settle(old: State, new: State, values: Array) -> State:
    """`new`, or if no candidate had a finite answer, `old` with the generation counted in `unanswered`.

    Every state has a field `unanswered`, () int32.
    """
    any_answer = jnp.isfinite(values).any()
    kept = trees.where(any_answer, new, old)
    # Every state is a NamedTuple with `unanswered`: the protocol says so, no type does.
    count = old.unanswered + jnp.where(any_answer, 0, 1).astype(jnp.int32)  # type: ignore[attr-defined]
    return kept._replace(unanswered=count)  # type: ignore[attr-defined]
