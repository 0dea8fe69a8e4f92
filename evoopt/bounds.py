"""Boxes: the bounds of every leaf, from numbers or trees, and the fold that keeps a point inside.

A side that is infinite, or None, is no bound.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from evoopt import trees
from evoopt.types import Array, Params, error


class Side(NamedTuple):
    """The bounds of one leaf; numbers, or arrays that broadcast to it."""

    name: str
    low: Any
    high: Any


def sides(lower: Any, upper: Any, params: Params) -> list[Side]:
    """The bounds of each leaf of `params`; `lower` and `upper` are numbers, trees like the parameters, or None.

    Where the parameters have an array, a list of numbers will do for its bounds.

    Raises:
        ValueError: for another structure or shape, NaN, or a lower bound that is not below its upper one.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [trees.path_name(path) for path, _ in paths]
    lows, highs = _side(lower, treedef, "lower", -math.inf), _side(upper, treedef, "upper", math.inf)
    for name, (_, leaf), low, high in zip(names, paths, lows, highs, strict=True):
        for word, bound in (("lower", low), ("upper", high)):
            shape = jnp.shape(bound)
            try:
                fits = np.broadcast_shapes(shape, jnp.shape(leaf)) == jnp.shape(leaf)
            except ValueError:
                fits = False
            if not fits:
                raise error(
                    f"a {word} bound of shape () or {jnp.shape(leaf)} at '{name}'",
                    f"shape {shape}",
                    "bounds of another number of parameters",
                )
        if not isinstance(low, Tracer) and not isinstance(high, Tracer) and not (low < high).all():
            raise error(
                f"lower < upper at '{name}', without NaN",
                f"lower={low}, upper={high}",
                "bounds in the wrong order, or equal",
            )
    return [Side(*side) for side in zip(names, lows, highs, strict=True)]


def _side(bound: Any, treedef: Any, word: str, absent: float) -> list[Any]:
    """One bound for each leaf: NumPy arrays, so that they are known under `jit` too, or tracers."""
    if bound is None:
        bound = absent
    if jnp.ndim(bound) == 0 if not isinstance(bound, (list, tuple, dict)) else False:
        parts = [bound] * treedef.num_leaves
    else:
        try:
            parts = treedef.flatten_up_to(bound)
        except (ValueError, TypeError) as problem:
            raise error(
                f"a {word} bound that is a number or has the parameters' structure {treedef}",
                f"{jax.tree.structure(bound)}",
                "bounds of another model, or a list for a tree of several leaves",
            ) from problem
    return [_array(part, word) for part in parts]


def _array(bound: Any, word: str) -> Any:
    traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(bound))
    try:
        return jnp.asarray(bound) if traced else np.asarray(bound, float)
    except (ValueError, TypeError) as problem:
        cause = "a bound that was computed as text, or lists of several lengths"
        raise error(f"numbers as {word} bounds", repr(bound)[:80], cause, TypeError) from problem


def inside(params: Params, lower: Any, upper: Any) -> Params:
    """`params`, after checking that they lie within the bounds.

    Raises:
        ValueError: naming the leaf that does not.
    """
    for (name, low, high), leaf in zip(sides(lower, upper, params), jax.tree.leaves(params), strict=True):
        if any(isinstance(x, Tracer) for x in (leaf, low, high)):
            continue
        x = np.asarray(leaf)
        # A bound is met as precisely as the leaf can hold it: 0.1 in float32 is not 0.1.
        close = low.astype(x.dtype), high.astype(x.dtype)
        if not ((x >= close[0]) & (x <= close[1])).all():
            raise error(
                f"a start within the bounds at '{name}', [{low}, {high}]",
                f"values from {float(x.min()):g} to {float(x.max()):g}",
                "bounds in other units than the parameters",
            )
    return params


def fold(u: Array, low: Any, high: Any) -> Array:
    """`u` folded into [low, high] as by mirrors at the walls: the identity inside, and where there is no wall.

    >>> fold(jnp.array([-3.0, -0.5, 0.5, 1.25]), 0.0, 1.0).tolist()
    [1.0, 0.5, 0.5, 0.75]
    >>> fold(jnp.array([-3.0, 0.5, 9.0]), 0.0, jnp.inf).tolist()
    [3.0, 0.5, 9.0]
    """
    low, high = jnp.asarray(low, u.dtype), jnp.asarray(high, u.dtype)
    most = jnp.finfo(u.dtype).max
    x = jnp.clip(u, -most, most)  # a search that diverged stays inside too
    width = high - low
    two = jnp.isfinite(width)
    # Safe numbers where the other branch is taken, so that no NaN reaches a gradient.
    start, period = jnp.where(two, low, 0), jnp.where(two, width, 1)
    between = start + period - jnp.abs(jnp.mod(x - start, 2 * period) - period)
    left, right = (jnp.where(jnp.isfinite(b), b, 0) for b in (low, high))
    beyond = jnp.where(x < low, left + (left - x), jnp.where(x > high, right - (x - right), x))
    folded = jnp.clip(jnp.where(two, between, beyond), jnp.maximum(low, -most), jnp.minimum(high, most))
    return jnp.where((u >= low) & (u <= high), u, folded)  # inside, u itself: arithmetic would round it
