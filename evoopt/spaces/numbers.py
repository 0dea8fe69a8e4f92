"""Numbers as users write them, checked and made hashable; and numbers in a narrower type."""

from __future__ import annotations

import math
import numbers as abstract
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evoopt.types import Array, error

Nested = Any  # a number, or a tuple of tuples of numbers


def real_kind() -> Any:
    """The float type of searches: float32, or float64 where JAX has it."""
    return np.dtype(jnp.result_type(float))


def known(u: Array) -> Array:
    """u with 0, the start, for NaN."""
    return jnp.where(jnp.isnan(u), 0, u)


def above(x: float, kind: Any) -> Any:
    """The smallest number of a type that is not below x."""
    with np.errstate(over="ignore"):
        near = np.asarray(x, kind)
    return np.nextafter(near, np.asarray(np.inf, kind)) if float(near) < x else near


def below(x: float, kind: Any) -> Any:
    """The largest number of a type that is not above x."""
    return -above(-float(x), kind)


def within(x: Any, low: Any, high: Any, kind: Any) -> bool:
    """Whether x lies between two numbers but for the rounding of a type."""
    x = np.asarray(x, float)
    with np.errstate(invalid="ignore"):
        slack = [4 * float(np.finfo(kind).eps) * np.where(np.isfinite(side), np.abs(side), 0) for side in (low, high)]
    return bool(((x >= low - slack[0]) & (x <= high + slack[1])).all())


def interval(low: Any, high: Any) -> str:
    """The bounds in words."""
    return f"[{'-inf' if low is None else low}, {'inf' if high is None else high}]"


def short(x: Any) -> str:
    return " ".join(str(x).split())[:80]


def item(x: Any) -> Any:
    """A scalar of NumPy or JAX as Python's; anything else as it is."""
    if isinstance(x, (np.ndarray, np.generic, jax.Array)) and np.ndim(x) == 0:
        return np.asarray(x)[()].item()
    return x


def same(a: Any, b: Any) -> bool:
    """Whether two choices are one: equal, and both bools or neither."""
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    try:
        return a is b or bool(a == b)
    except (TypeError, ValueError):
        return False


def number(x: Any, word: str) -> float | None:
    """A bound as a float, None for none."""
    x = item(x)
    if x is None:
        return None
    if isinstance(x, bool) or not isinstance(x, abstract.Real):
        cause = "text, or bounds in an array: one variable for each, or the same bounds and a shape"
        raise error(f"{word} as a number", repr(x)[:60], cause, TypeError)
    if math.isnan(x):
        raise error(f"{word} that is not NaN", "nan", "a bound computed from missing data; an open side is None")
    return float(x)


def whole(x: Any, word: str) -> int:
    """A whole number as an int."""
    x = item(x)
    if isinstance(x, bool) or not isinstance(x, abstract.Real):
        raise error(
            f"{word} as a whole number", repr(x)[:60], "text, a list, or None: integers have both bounds", TypeError
        )
    if not float(x).is_integer():
        raise error(f"{word} as a whole number", str(x), "a bound of a real variable, or an open side")
    return int(x)  # type: ignore[arg-type]


def positive(x: Any, word: str) -> float:
    got = number(x, word)
    if got is None or not 0 < got < math.inf:
        raise error(f"{word} > 0", str(x), "a wrong sign, or a range with equal ends")
    return got


def shape(x: Any) -> tuple[int, ...]:
    """A shape as a tuple; a number is one axis."""
    sizes = (x,) if isinstance(x, (int, np.integer)) else x
    if not isinstance(sizes, (tuple, list)) or not all(isinstance(n, (int, np.integer)) and n > 0 for n in sizes):
        raise error("a shape: a number of at least 1, or a tuple of them", repr(x)[:60], "a size of 0", TypeError)
    return tuple(int(n) for n in sizes)


def frozen(x: Any) -> Nested:
    """Lists as tuples."""
    return tuple(frozen(y) for y in x) if isinstance(x, (list, tuple)) else x


def array(x: Any, wanted: tuple[int, ...], name: str) -> np.ndarray:
    """Numbers of a shape in float64."""
    try:
        found = np.asarray(x)
        numeric = found.dtype.kind in "fiub" or jnp.issubdtype(found.dtype, jnp.floating)
    except (ValueError, TypeError):
        found, numeric = np.empty(0), False
    if not numeric:
        raise error(
            f"numbers of shape {wanted} at '{name}'", repr(x)[:60], "text, or lists of several lengths", TypeError
        )
    found = found.astype(float)
    if found.shape != wanted:
        raise error(f"numbers of shape {wanted} at '{name}'", f"shape {found.shape}", "a value of another variable")
    if np.isnan(found).any():
        raise error(f"numbers at '{name}' that are not NaN", short(found), "a value computed from missing data")
    return found


def nested(x: Any, wanted: tuple[int, ...], name: str, kind: type = float) -> Nested:
    """Numbers of a shape, or one number for all, as a number or nested tuples."""
    found = array(x, wanted if np.ndim(x) else (), name)
    if not np.isfinite(found).all():
        raise error(f"finite numbers as {name}", short(found), "a start taken from a diverged run")
    if kind is int and not (found == np.round(found)).all():
        raise error(f"whole numbers as {name}", short(found), "the start of a real variable")
    return frozen(np.broadcast_to(found, wanted).astype(kind).tolist())


def filled(shape: tuple[int, ...], x: Any, name: str) -> np.ndarray:
    """Nested lists as an array of objects."""
    cells = np.empty(shape, object)
    for at in np.ndindex(cells.shape):
        cell = x
        for axis, i in enumerate(at):
            if not isinstance(cell, (list, tuple, np.ndarray)) or len(cell) != cells.shape[axis]:
                raise error(f"choices of shape {cells.shape} at '{name}'", short(x), "one choice for several")
            cell = cell[i]
        cells[at] = cell
    return cells


def middle(low: float | None, high: float | None, log: bool) -> float:
    """Where a search begins if nothing is said."""
    if low is not None and high is not None:
        return min(max(math.sqrt(low) * math.sqrt(high) if log else low / 2 + high / 2, low), high)
    if log:
        return 1.0 if low is None and high is None else low * math.e if low is not None else high / math.e  # type: ignore[operator]
    return low + 1 if low is not None else high - 1 if high is not None else 0.0
