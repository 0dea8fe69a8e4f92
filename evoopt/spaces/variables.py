"""What is searched: numbers, choices, orders, shares, and what exists only under a choice. All of them are hashable."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from evoopt.spaces import numbers
from evoopt.spaces.kinds import OUTSIDE, Categorical, Conditional, Integer, Permutation, Real, Simplex, is_variable
from evoopt.spaces.numbers import Nested
from evoopt.types import error


def real(
    low: float | None = None,
    high: float | None = None,
    *,
    log: bool = False,
    start: Any = None,
    scale: float | None = None,
    shape: int | tuple[int, ...] = (),
) -> Real:
    """Real numbers between `low` and `high`, ends included; a side that is None is open. Equal sides fix the value.

    Args:
        low, high: numbers.
        log: search the logarithm: what differs by a factor is equally far apart.
        start: where the search begins; a number, or an array of `shape`. None: the middle (with log the geometric one),
            or 1 inside of the only bound, or 0.
        scale: initial standard deviation, in log units (factors of e) with `log`. None: a quarter of the range; with an
            open side max(1, |start|), with `log` 1.
        shape: of an array of such numbers.

    Raises:
        ValueError: for bounds in the wrong order, NaN, log with low <= 0, or a start outside.
        TypeError: for what is not a number.

    >>> real(1e-5, 1e-1, log=True).start
    0.001
    """
    low, high = numbers.number(low, "low"), numbers.number(high, "high")
    low, high = None if low == -math.inf else low, None if high == math.inf else high
    if low is not None and high is not None and low > high:
        raise error("low <= high", f"low={low}, high={high}", "bounds in the wrong order")
    if low == math.inf or high == -math.inf:
        raise error("bounds with something between them", f"low={low}, high={high}", "an infinity with a wrong sign")
    if log and ((low is not None and low <= 0) or (high is not None and high <= 0)):
        raise error("low > 0 with log", f"low={low}, high={high}", "zero has no logarithm: a small positive number")
    shape = numbers.shape(shape)
    if start is None:
        start = numbers.middle(low, high, log)
    start = numbers.nested(start, shape, "start")
    start = _started(start, low, high)
    if log and not (np.asarray(start) > 0).all():
        raise error("start > 0 with log", f"start={start}", "zero has no logarithm")
    if scale is None and low is not None and high is not None:
        scale = (math.log(high) - math.log(low)) / 4 if log else high / 4 - low / 4
        scale = scale or 1.0
    elif scale is None:
        scale = 1.0 if log else max(1.0, float(np.abs(start).max()))
    return Real(low, high, bool(log), start, numbers.positive(scale, "scale"), shape)


def integer(
    low: int,
    high: int,
    *,
    log: bool = False,
    start: Any = None,
    scale: float | None = None,
    shape: int | tuple[int, ...] = (),
) -> Integer:
    """Whole numbers from `low` to `high`, both included. Equal ones fix the value.

    The search moves a float. In float32 whole numbers further than 4 million from the start (with `log`, above about
    100,000) are not all reached.

    Args:
        low, high: whole numbers, at most 2^30 apart and from 0.
        log, start, scale, shape: as in `real`.

    >>> integer(1, 1000, log=True).start
    32
    """
    low, high = numbers.whole(low, "low"), numbers.whole(high, "high")
    if low > high:
        raise error("low <= high", f"low={low}, high={high}", "bounds in the wrong order")
    if max(abs(low), abs(high), high - low) > 2**30:
        raise error("low and high at most 2^30 apart and from 0", f"low={low}, high={high}", "a range of all integers")
    if log and low < 1:
        raise error("low >= 1 with log", f"low={low}", "zero has no logarithm: start from 1, or search without log")
    shape = numbers.shape(shape)
    if start is None:
        start = round(math.sqrt(low * high)) if log else (low + high) // 2
    start = numbers.nested(start, shape, "start", int)
    if not ((np.asarray(start) >= low) & (np.asarray(start) <= high)).all():
        raise error(f"start within [{low}, {high}]", f"start={start}", OUTSIDE)
    if scale is None:
        scale = (math.log(high + 0.5) - math.log(low - 0.5)) / 4 if log else (high - low + 1) / 4
    return Integer(low, high, bool(log), start, numbers.positive(scale, "scale"), shape)


_UNGIVEN = object()


def categorical(choices: Iterable[Any], start: Any = _UNGIVEN, shape: int | tuple[int, ...] = ()) -> Categorical:
    """One of `choices`, which have no order: text, numbers, tuples, None, functions. One choice fixes the value.

    An objective in JAX gets the choice where all choices are numbers, otherwise its place (int32); one in Python gets
    the choice itself.

    Args:
        choices: hashable, all different.
        start: the choice to begin with; None or not given: the first. With a `shape`, one for all or an array.
            Where probabilities are learned, a choice that is given has half at first; otherwise all have as much.
        shape: of an array of such choices.

    >>> categorical(["rbf", "linear", "poly"]).choices
    ('rbf', 'linear', 'poly')
    """
    if isinstance(choices, (str, bytes)) or not isinstance(choices, Iterable):
        raise error(
            "a list of choices", repr(choices)[:60], "one choice, or text, which is a sequence of letters", TypeError
        )
    listed = tuple(numbers.item(c) for c in choices)
    if not listed:
        raise error("at least one choice", "none", "a list that was filtered until nothing was left")
    for i, choice in enumerate(listed):
        if not isinstance(choice, Hashable) or _unhashable(choice):
            raise error("choices that are hashable", repr(choice)[:60], "a list: write a tuple instead", TypeError)
        if isinstance(choice, float) and math.isnan(choice):
            raise error("choices that are not NaN", repr(listed)[:60], "a choice computed from missing data")
        if any(numbers.same(choice, other) for other in listed[:i]):
            raise error("choices that all differ", f"{choice!r} twice", "a list joined from two")
    made = Categorical(listed, 0, numbers.shape(shape))
    table = made.table
    if table is not None and len(np.unique(table)) < len(table):
        raise error(f"choices that {table.dtype} tells apart", repr(listed)[:60], "numbers that differ in late digits")
    given = start is not _UNGIVEN and (start is not None or None in listed)
    if not given:
        places = np.zeros(made.shape, int)
    elif made.shape and not isinstance(start, (list, np.ndarray)):
        places = np.full(made.shape, made._one(start, "start"))
    else:
        places = made._places(start, "start")
    return dataclasses.replace(made, start=numbers.frozen(places.tolist()), given=given)


def _unhashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return True
    return False


def boolean(start: Any = False, shape: int | tuple[int, ...] = ()) -> Categorical:
    """False or True.

    >>> boolean(True).choices
    (False, True)
    """
    return categorical((False, True), start, shape)


def permutation(n: int) -> Permutation:
    """An order of 0 to n - 1, searched by keys: a candidate is the order that sorts n floats (Bean 1994).

    >>> import jax.numpy as jnp
    >>> permutation(3).decode(jnp.array([0.5, -1.0, 0.0])).tolist()
    [1, 2, 0]
    """
    if (n := numbers.whole(n, "n")) < 1:
        raise error("n of at least 1", str(n), "the length of something empty")
    return Permutation(n)


def simplex(n: int) -> Simplex:
    """n numbers, none negative, that sum to 1; it starts with equal ones.

    >>> import jax.numpy as jnp
    >>> simplex(4).decode(jnp.zeros(4)).tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    if (n := numbers.whole(n, "n")) < 1:
        raise error("n of at least 1", str(n), "the length of something empty")
    return Simplex(n)


def conditional(variable: Any, on: str, equal: Any) -> Conditional:
    """`variable` exists only where the variable named `on` has one of the values `equal`, and exists itself.

    Where it does not exist it has no influence: an objective in Python does not find its key (None in a list), one in
    JAX finds it at its start.

    Args:
        variable: any variable, or a fixed value.
        on: the name of a `categorical`, `boolean` or `integer` without a shape: its keys joined by "/".
        equal: one value, or a tuple of values.

    >>> conditional(real(0.0, 1.0), on="kernel", equal=("rbf", "poly")).equal
    ('rbf', 'poly')
    """
    if isinstance(variable, Conditional):
        raise error(
            "one condition", "a conditional in a conditional", "nest by `on`: a parent may be conditional itself"
        )
    if not is_variable(variable) and isinstance(variable, (dict, list, tuple)):
        raise error(
            "one variable", type(variable).__name__, "a container: a condition for each of its variables", TypeError
        )
    if not isinstance(on, str):
        raise error("the name of a variable", repr(on)[:60], "the variable itself instead of its key", TypeError)
    values = tuple(equal) if isinstance(equal, (tuple, list, set, frozenset)) else (equal,)
    if not values:
        raise error(f"at least one value of '{on}'", "none", "a variable that never exists: leave it out")
    return Conditional(variable, on, values)


def _started(start: Nested, low: float | None, high: float | None) -> Nested:
    """The start, within the bounds: clipped with a warning if rounding put it outside, refused otherwise."""
    x = np.asarray(start, float)
    least, most = (side if bound is None else bound for bound, side in ((low, -np.inf), (high, np.inf)))
    if ((x >= least) & (x <= most)).all():
        return start
    if not numbers.within(x, least, most, np.float32):
        raise error(f"start within {numbers.interval(low, high)}", f"start={start}", OUTSIDE)
    warnings.warn(f"start={start} is rounded into {numbers.interval(low, high)}", stacklevel=3)
    return numbers.frozen(np.clip(x, least, most).tolist())
