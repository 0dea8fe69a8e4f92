"""Problems of other libraries over vectors, as objectives in Python: what they have in common.

`coco`, `ioh` and `pymoo` make them; `jit=False` is for all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from evoopt import spaces
from evoopt.answers import Answer
from evoopt.types import error


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A problem of another library: `minimize(problem, problem.space(), cma_es(), evaluations=1000, jit=False)`.

    It is called with a candidate of its space, or with any tree of numbers that make up its vector, and answers a value
    to be minimised; with constraints `evoopt.answers.Answer(value, violation)`, for a strategy that reads violations.

    >>> square = Problem("square", lambda x: float(x @ x), np.full(3, -1.0), np.ones(3), np.full(3, 0.5))
    >>> square.space(), square(np.ones(3)), square({"a": 1.0, "b": [2.0, 0.0]})
    (Real(low=-1.0, high=1.0, log=False, start=(0.5, 0.5, 0.5), scale=0.5, shape=(3,)), 3.0, 5.0)
    """

    name: str
    value: Callable[[np.ndarray], float]
    lower: np.ndarray  # (d,), -inf where there is none
    upper: np.ndarray  # (d,)
    start: np.ndarray  # (d,), within the bounds
    whole: np.ndarray | None = None  # (d,) bool, which variables are whole numbers
    violation: Callable[[np.ndarray], np.ndarray] | None = None  # at most 0 where an inequality holds
    equalities: int = 0  # the last of the constraints, which hold at 0
    optimum: float | None = None  # the least value, where the library knows it

    @property
    def dimension(self) -> int:
        """d, the length of its vectors."""
        return len(self.lower)

    def __call__(self, candidate: Any) -> Any:
        x = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(candidate)]).astype(float)
        if x.shape != (self.dimension,):
            got = f"{len(x)}"
            raise error(f"a candidate of {self.dimension} numbers for {self.name}", got, "a start of another problem")
        if self.violation is None:
            return self.value(x)
        return Answer(self.value(x), np.asarray(self.violation(x), float))

    def space(self) -> Any:
        """What is searched: an `evoopt.spaces` variable, or a list where bounds or kinds differ."""
        whole = np.zeros(self.dimension, bool) if self.whole is None else self.whole
        kinds = zip(self.lower.tolist(), self.upper.tolist(), whole.tolist(), strict=True)
        found, first = [], 0
        for (low, high, is_whole), run in itertools.groupby(kinds):
            last = first + len(list(run))
            found.append(_variable(low, high, is_whole, self.start[first:last]))
            first = last
        return found[0] if len(found) == 1 else found


def _variable(low: float, high: float, whole: bool, start: np.ndarray) -> Any:
    start = np.clip(start, low, high)
    if whole:
        first = np.round(start).astype(int)
        return spaces.integer(int(low), int(high), start=first.tolist(), shape=first.shape)
    sides = [side if np.isfinite(side) else None for side in (low, high)]
    return spaces.real(*sides, start=start.tolist(), shape=start.shape)


def single(objectives: int, name: str) -> None:
    """Refuse a problem with several objectives."""
    if objectives != 1:
        raise error(f"one objective in {name}", str(objectives), "a multi-objective problem: weigh them in one number")


def middle(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """A point within the bounds: their middle, or what is nearest to 0 where one is missing."""
    both = np.isfinite(lower) & np.isfinite(upper)
    with np.errstate(invalid="ignore"):
        return np.where(both, (lower + upper) / 2, np.clip(0.0, lower, upper))
