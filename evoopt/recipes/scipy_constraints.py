"""scipy's constraints, of three kinds, as functions of a vector: inequalities hold up to 0, equalities at 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from evoopt.types import error


class Limits(NamedTuple):
    """Constraints as functions of x: inequalities hold up to 0, equalities at 0."""

    inequalities: list[Callable[[np.ndarray], np.ndarray]]
    equalities: list[Callable[[np.ndarray], np.ndarray]]
    count: int = 0
    equal: int = 0  # how many of them are equalities, the last ones

    def violation(self, x: np.ndarray) -> np.ndarray:
        """(k,), signed: at most 0 where an inequality holds."""
        parts = [np.atleast_1d(np.asarray(g(x), float)).ravel() for g in (*self.inequalities, *self.equalities)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def most(self, x: np.ndarray) -> float:
        """How far the constraint that is violated most is, as scipy's `maxcv`."""
        found = self.violation(x)
        found[self.count - self.equal :] = abs(found[self.count - self.equal :])
        return float(np.max(found, initial=0.0))


def limits_of(constraints: Any, start: np.ndarray) -> Limits:
    """scipy's constraints, of three kinds, as functions."""
    found = Limits([], [])
    for given in constraints if isinstance(constraints, (list, tuple)) else [constraints]:
        if isinstance(given, dict):
            _old(given, found)
        elif hasattr(given, "A"):
            matrix = given.A.toarray() if hasattr(given.A, "toarray") else np.atleast_2d(np.asarray(given.A, float))
            _between(partial(np.matmul, matrix), given.lb, given.ub, start, found)
        elif hasattr(given, "fun"):
            _between(given.fun, given.lb, given.ub, start, found)
        else:
            cause = "a function alone: {'type': 'ineq', 'fun': f} holds where f(x) >= 0"
            raise error("constraints as scipy has them", type(given).__name__, cause, TypeError)
    x = lambda: np.array(start, float)
    count = lambda functions: sum(np.size(g(x())) for g in functions)
    equal = count(found.equalities)
    return found._replace(count=count(found.inequalities) + equal, equal=equal)


def _old(given: dict[str, Any], found: Limits) -> None:
    """{'type': 'eq' or 'ineq', 'fun': f, 'args': ()}; an inequality of this kind holds from 0 upwards."""
    kind, fun, args = str(given.get("type", "")).lower(), given.get("fun"), tuple(given.get("args", ()))
    if kind not in ("eq", "ineq") or not callable(fun):
        got = ", ".join(f"{name}={x!r}" for name, x in given.items())[:80]
        raise error("a constraint {'type': 'eq' or 'ineq', 'fun': function}", got, "a key left out or misspelt")
    if kind == "eq":
        found.equalities.append(_Limit(fun, args, 1.0, 0.0, None))
    else:
        found.inequalities.append(_Limit(fun, args, -1.0, 0.0, None))


def _between(fun: Callable[..., Any], lb: Any, ub: Any, start: np.ndarray, found: Limits) -> None:
    """lb <= fun(x) <= ub, each part by itself."""
    size = np.size(fun(np.array(start, float)))
    low, high = (np.broadcast_to(np.asarray(side, float), size) for side in (lb, ub))
    same = low == high
    for where, sign, side, into in (
        (same, 1.0, low, found.equalities),
        (~same & np.isfinite(low), -1.0, low, found.inequalities),
        (~same & np.isfinite(high), 1.0, high, found.inequalities),
    ):
        if where.any():
            into.append(_Limit(fun, (), sign, side[where], np.flatnonzero(where)))


@dataclasses.dataclass(frozen=True)
class _Limit:
    """sign (f(x) - side), of some of the parts of f."""

    fun: Callable[..., Any]
    args: tuple
    sign: float
    side: Any
    parts: Any

    def __call__(self, x: np.ndarray) -> np.ndarray:
        found = np.atleast_1d(np.asarray(self.fun(x, *self.args), float)).ravel()
        return self.sign * ((found if self.parts is None else found[self.parts]) - self.side)
