"""Boxes: the bounds of every leaf, from numbers or trees, and the maps that keep a point inside.

An infinite side, or None, is no bound. A coordinate whose two bounds are equal is held at them.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from evoopt import trees
from evoopt.types import Array, Params, error

ROUNDING = 8  # a start may pass a wall by this many units in the last place of the bounds


class Side(NamedTuple):
    """The bounds of one leaf: numbers, or arrays that broadcast to it."""

    name: str
    low: Any
    high: Any
    free: bool  # whether neither side has a wall anywhere


def opened(lower: Any, upper: Any) -> tuple[Any, Any]:
    """Both bounds, with None for a bound that is infinite throughout, because structure stays known under `jit`.

    Raises:
        ValueError: for NaN, or if lower <= upper fails, as far as can be told without the parameters.
        TypeError: for bounds that are not numbers.
    """
    lows, highs = _opened(lower, "lower", -math.inf), _opened(upper, "upper", math.inf)
    single = [jax.tree_util.all_leaves([x]) for x in (lows, highs)]  # one number or one array for all parameters
    if any(single) or jax.tree.structure(lows) == jax.tree.structure(highs):
        tree = highs if single[0] else lows
        low, high = (jax.tree.leaves(trees.like(x, tree)) for x in (lows, highs))
        for a, b in zip(low, high, strict=True):
            if not isinstance(a, Tracer) and not isinstance(b, Tracer) and _meet(np.shape(a), np.shape(b)):
                _check_order("", np.asarray(a), np.asarray(b))
    return lows, highs


def _opened(bound: Any, word: str, absent: float) -> Any:
    def one(x: Any) -> Any:
        array = _array(x, word)
        return None if not isinstance(array, Tracer) and (array == absent).all() else x

    return jax.tree.map(one, bound)


def sides(lower: Any, upper: Any, params: Params) -> list[Side]:
    """The bounds of each leaf of `params`; `lower` and `upper` are numbers, trees like the parameters, or None.

    An array's bounds may be a list of numbers. None anywhere is an open side.

    Raises:
        ValueError: for another structure or shape, NaN, or a lower bound above its upper one, or equal to it only after
            rounding to the leaf's type.
        TypeError: for bounds that are not numbers.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [trees.path_name(path) for path, _ in paths]
    lows, highs = _side(lower, treedef, "lower", -math.inf), _side(upper, treedef, "upper", math.inf)
    found = []
    for name, (_, leaf), low, high in zip(names, paths, lows, highs, strict=True):
        for word, bound in (("lower", low), ("upper", high)):
            shape = jnp.shape(bound)
            if not _meet(shape, jnp.shape(leaf)) or np.broadcast_shapes(shape, jnp.shape(leaf)) != jnp.shape(leaf):
                raise error(
                    f"{word} bounds of shape {jnp.shape(leaf)} at '{name}', or one number",
                    f"shape {shape}",
                    "bounds for another number of parameters",
                )
        known = not isinstance(low, Tracer) and not isinstance(high, Tracer)
        if known:
            _check_order(name, low, high)
            with np.errstate(over="ignore"):
                narrow = low.astype(jnp.result_type(leaf)), high.astype(jnp.result_type(leaf))
            if not ((narrow[0] < narrow[1]) | ((low == high) & np.isfinite(narrow[0]))).all():
                dtype = jnp.result_type(leaf)
                got = f"lower={_short(low)}, upper={_short(high)}"
                cause = f"a box too narrow or too far out for {dtype}: scale the parameters, or use float64"
                raise error(f"lower < upper at '{name}' in {dtype}, or equal bounds", got, cause)
        found.append(Side(name, low, high, known and bool(np.isneginf(low).all() and np.isposinf(high).all())))
    return found


def _side(bound: Any, treedef: Any, word: str, absent: float) -> list[Any]:
    """One bound for each leaf: a NumPy array, which stays known under `jit`, or a tracer."""
    if bound is None or (jax.tree_util.all_leaves([bound]) and np.ndim(bound) == 0):
        parts = [bound] * treedef.num_leaves
    else:
        try:
            parts = treedef.flatten_up_to(bound)
            if any(isinstance(part, dict) for part in parts):
                raise ValueError("a dict where the parameters have an array")
        except (ValueError, TypeError) as problem:
            raise error(
                f"a {word} bound that is a number or has the parameters' structure {treedef}",
                f"{jax.tree.structure(bound)}",
                "bounds for another model, or a list (a tree of numbers) for a tree of several leaves",
            ) from problem
    with_absent = lambda part: jax.tree.map(lambda x: absent if x is None else x, part, is_leaf=lambda x: x is None)
    return [_array(with_absent(part), word) for part in parts]


def _array(bound: Any, word: str) -> Any:
    traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(bound))
    try:
        array = jnp.asarray(bound) if traced else np.asarray(bound, float)
        numeric = jax.tree_util.all_leaves([array]) and not any(isinstance(x, str) for x in jax.tree.leaves(bound))
    except (ValueError, TypeError) as problem:
        numeric, reason = False, problem
    else:
        reason = None
    if not numeric:
        cause = "text, lists of several lengths, or an object that holds both bounds: give them separately"
        raise error(f"numbers as {word} bounds", _short(repr(bound)), cause, TypeError) from reason
    if not traced and np.isnan(array).any():
        cause = "a bound computed from missing data; a side without a bound is None or infinite"
        raise error(f"{word} bounds that are not NaN", _short(bound), cause)
    return array


def _check_order(name: str, low: Any, high: Any) -> None:
    if not ((low < high) | ((low == high) & np.isfinite(low))).all():
        where, got = f" at '{name}'" if name else "", f"lower={_short(low)}, upper={_short(high)}"
        cause = "bounds in the wrong order, or both infinite on the same side"
        raise error(f"lower <= upper{where}", got, cause)


def _meet(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    try:
        np.broadcast_shapes(a, b)
    except ValueError:
        return False
    return True


def _short(x: Any) -> str:
    return " ".join(str(x).split())[:80]


def inside(params: Params, lower: Any, upper: Any) -> Params:
    """`params`, after checking that they lie within the bounds; moved to a wall that they pass by rounding alone.

    Raises:
        ValueError: naming a leaf that lies outside by more than that.
    """
    leaves, treedef = jax.tree.flatten(params)
    walls = sides(lower, upper, params)
    return treedef.unflatten([_inside(x, *wall[:3]) for x, wall in zip(leaves, walls, strict=True)])


def _inside(leaf: Any, name: str, low: Any, high: Any) -> Any:
    if any(isinstance(x, Tracer) for x in (leaf, low, high)):
        return leaf
    x = np.asarray(leaf)
    # A bound is checked in the leaf's own precision: 0.1 in float32 is not 0.1.
    with np.errstate(over="ignore"):
        low, high = low.astype(x.dtype), high.astype(x.dtype)
    if ((x >= low) & (x <= high)).all():
        return leaf
    size = np.maximum(*(np.where(np.isfinite(wall), np.abs(wall), 0) for wall in (low, high)))
    slack = ROUNDING * float(jnp.finfo(x.dtype).eps) * size.astype(np.float64)
    if not ((x >= low - slack) & (x <= high + slack)).all():
        raise error(
            f"a start within the bounds at '{name}', [{low}, {high}]",
            f"values from {float(x.min()):g} to {float(x.max()):g}",
            "bounds in other units than the parameters",
        )
    warnings.warn(f"the start at '{name}' passes a bound by rounding, and was moved to it", stacklevel=2)
    return jnp.asarray(np.clip(x, low, high))


def fold(u: Array, low: Any, high: Any) -> Array:
    """`u` folded into [low, high] as if by mirrors at the walls; the identity inside, and where there is no wall.

    >>> fold(jnp.array([-3.0, -0.5, 0.5, 1.25]), 0.0, 1.0).tolist()
    [1.0, 0.5, 0.5, 0.75]
    >>> fold(jnp.array([-3.0, 0.5, 9.0]), 0.0, jnp.inf).tolist()
    [3.0, 0.5, 9.0]
    """
    with np.errstate(over="ignore"):  # a bound too large for the type is no wall
        low, high = jnp.asarray(low, u.dtype), jnp.asarray(high, u.dtype)
    wide = u.dtype if jnp.finfo(u.dtype).bits >= 32 else jnp.float32
    most = jnp.finfo(wide).max
    # In quarters, so that no sum overflows; an infinite u, from a diverged search, also ends inside.
    x, a, b = (jnp.clip(y.astype(wide), -most, most) / 4 for y in (u, low, high))
    left, right = jnp.isfinite(low), jnp.isfinite(high)
    width = jnp.where(left & right & (b > a), b - a, 1)  # a safe number where unused
    between = a + width - jnp.abs(jnp.mod(x - a, 2 * width) - width)
    beyond = jnp.where(left, a + jnp.abs(x - a), jnp.where(right, b - jnp.abs(b - x), x))
    # A sum may round past the wall. Inside, u itself is returned, because arithmetic would round it.
    folded = (4 * jnp.clip(jnp.where(left & right, between, beyond), a, b)).astype(u.dtype)
    return jnp.where((u >= low) & (u <= high), u, folded)


def smooth(u: Array, low: Any, high: Any) -> Array:
    """`u` in [low, high], by a map with a continuous slope: the identity well inside, quadratic near a wall.

    A wall w is reached at the distance a beyond it, where the map turns round as at a mirror: from w - a to w + a it is
    w + (u - w + a)^2 / 4a. Source: pycma's `BoxConstraintsLinQuadTransformation`.

    >>> print(smooth(jnp.array([-0.05, 0.0, 0.5, 1.05]), 0.0, 1.0))
    [0.     0.0125 0.5    1.    ]
    """
    wide = u.dtype if jnp.finfo(u.dtype).bits >= 32 else jnp.float32
    low, high, a, b = _margins(low, high, wide)
    x = fold(u.astype(wide), low - a, high + b)
    left, right = jnp.isfinite(low), jnp.isfinite(high)
    low_, high_ = jnp.where(left, low, 0), jnp.where(right, high, 0)  # safe numbers where unused
    part = lambda way, m: jnp.clip((way + m) / (2 * jnp.where(m > 0, m, 1)), 0, 1)  # 0 at the turn, 1 at the margin
    below, above = low_ + a * part(x - low_, a) ** 2, high_ - b * part(high_ - x, b) ** 2
    bent = jnp.where(left & (x < low + a), below, jnp.where(right & (x > high - b), above, x))
    return jnp.clip(bent, low, high).astype(u.dtype)  # type: ignore[arg-type]


def smooth_inverse(x: Array, low: Any, high: Any) -> Array:
    """The u nearest to the box for which `smooth(u, low, high)` is `x`.

    >>> print(smooth_inverse(jnp.array([0.0, 0.0125, 0.5, 1.0]), 0.0, 1.0).round(6))
    [-0.05  0.    0.5   1.05]
    """
    wide = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32
    low, high, a, b = _margins(low, high, wide)
    u = x.astype(wide)
    root = lambda m, gap: 2 * jnp.sqrt(m * jnp.maximum(jnp.where(jnp.isfinite(gap), gap, 0), 0))
    near, far = jnp.isfinite(low) & (u < low + a), jnp.isfinite(high) & (u > high - b)
    bent = jnp.where(near, low - a + root(a, u - low), jnp.where(far, high + b - root(b, high - u), u))
    return bent.astype(x.dtype)


def _margins(low: Any, high: Any, dtype: Any) -> tuple[Array, Array, Array, Array]:
    """Both walls and their margins: a twentieth of the box, or beside an open side of the wall's size, at least 1.

    pycma takes a twentieth of the wall's size for boxes too, which depends on where the box lies.
    """
    with np.errstate(over="ignore"):
        low, high = jnp.asarray(low).astype(dtype), jnp.asarray(high).astype(dtype)
    closed = jnp.isfinite(low) & jnp.isfinite(high)
    width = jnp.where(closed, high / 20 - low / 20, 0)

    def margin(wall: Array) -> Array:
        size = jnp.abs(jnp.where(jnp.isfinite(wall), wall, 1))
        room = jnp.finfo(dtype).max / 2 - size / 2  # beyond the wall there are no numbers to turn round at
        return jnp.minimum(jnp.where(closed, width, jnp.maximum(1, size) / 20), room)

    return low, high, margin(low), margin(high)
