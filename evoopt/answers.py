"""What a Python objective answers, as the numbers it gave: one rule for every evaluator.

A search computes in JAX's float type, float32 unless x64 is on; an objective on the host answers in float64. Values
such as 1e9 + 1e-3 would all be equal in float32, and the search would stand still. So host values are kept in float64,
and what a strategy is told is their difference from an offset, which moves only when float32 would swallow it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt.types import error

# State fields that hold values told earlier; they move with the offset. A test finds a strategy whose field is missing.
REMEMBERED = (
    "value", "values", "best_value", "parent_value", "elite_value", "run_best", "recent_best", "long_best",
    "long_median", "last_value", "fitness", "best_fitness",
)  # fmt: skip
RESOLUTION = 2.0**-12  # the spread of a generation must be this many times above the rounding of its largest value


def number(x: Any, candidate: Any = "a candidate") -> float:
    """The float that an objective's answer stands for; NaN for None.

    Any real number will do: of Python, NumPy, JAX, `decimal` or `fractions`, of any size, alone or in an array of one.

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
        except OverflowError:  # an integer that no float holds
            return math.inf if x > type(x)(0) else -math.inf  # type: ignore[operator]
    elif isinstance(x, complex):
        cause = "an objective that answers complex numbers"
    raise error(f"one real number for {candidate}", f"{type(x).__name__} {repr(x)[:60]}", cause, TypeError)


def as_floats(answers: Iterable[Any], n: int) -> np.ndarray:
    """The values of n candidates, (n,) float64, NaN where an answer is None.

    Raises:
        TypeError: for an answer that is no number, naming the candidate; and where all are None.
        ValueError: for another number of answers.
    """
    if isinstance(answers, (str, bytes, dict, set, frozenset)) or not isinstance(answers, Iterable):
        raise error(
            f"{n} numbers, one for each candidate",
            f"{type(answers).__name__} {repr(answers)[:60]}",
            "the answer of one candidate, or a container of answers without an order",
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


class Offset:
    """What is subtracted from host values before a strategy of narrower floats is told them.

    >>> offset, state = Offset(), None
    >>> state, values = offset.told(state, np.array([1e9 + 0.25, 1e9]))
    >>> offset.value, values.tolist()
    (1000000000.0, [0.25, 0.0])
    """

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def told(self, state: Any, values: np.ndarray) -> tuple[Any, np.ndarray]:
        """The state, its remembered values moved where the offset moved, and the values to tell it.

        The offset becomes the best of these values once their spread is too small for the float type to resolve.
        """
        dtype = np.dtype(jnp.result_type(float))
        ok = np.isfinite(values)
        if dtype == np.float64 or not ok.any():
            return state, (values - self.value).astype(dtype)
        finite = values[ok]
        most = np.abs(finite - self.value).max()
        spread = finite.max() - finite.min()
        if np.spacing(np.asarray(min(most, np.finfo(dtype).max), dtype)) > spread * RESOLUTION and most > 0:
            new = float(finite.min())
            state, self.value = shifted(state, new - self.value), new
        with np.errstate(over="ignore"):  # what float32 does not hold is infinite
            return state, (values - self.value).astype(dtype)


def shifted(state: Any, by: float) -> Any:
    """`state` with all the values it remembers less `by`."""

    def moved(path: tuple, leaf: Any) -> Any:
        names = [getattr(key, "name", None) for key in path]
        if not any(name in REMEMBERED for name in names) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return (np.asarray(leaf, np.float64) - by).astype(leaf.dtype)

    if by == 0 or state is None:
        return state
    return jax.tree_util.tree_map_with_path(moved, state)
