"""Bounds by a smooth map: the identity well inside the box, quadratic near its walls, as pycma's `BoundTransform`."""

from __future__ import annotations

from typing import Any

import jax
from jax.tree_util import Partial

from evoopt import bounds
from evoopt.checks import check_strategy
from evoopt.types import Params, pytree
from evoopt.wrappers.reparameterized import Reparameterized


@pytree
class Smooth:
    """u -> `bounds.smooth(u)`, leaf by leaf; a leaf without walls is passed on."""

    lower: Any
    upper: Any

    def __call__(self, u: Params) -> Params:
        return _each(bounds.smooth, u, self.lower, self.upper)


def _start(params: Params, lower: Any, upper: Any) -> Params:
    return _each(bounds.smooth_inverse, bounds.inside(params, lower, upper), lower, upper)


def _each(one: Any, tree: Params, lower: Any, upper: Any) -> Params:
    leaves, treedef = jax.tree.flatten(tree)
    walls = bounds.sides(lower, upper, tree)
    return treedef.unflatten([x if w.free else one(x, w.low, w.high) for x, w in zip(leaves, walls, strict=True)])


def smoothed(strategy: Any, lower: Params = None, upper: Params = None) -> Reparameterized:
    """`strategy` with candidates kept in [lower, upper] by a smooth map of what it searches.

    The map is the identity in the middle nine tenths of a box, so that sigma keeps its meaning there. It has a
    continuous slope, which `bounded` has not at its mirrors. At a wall the slope is 0: a first-order strategy that
    starts there cannot leave it. A side that is infinite or None has no wall; equal bounds hold a coordinate.

    Args:
        strategy: any strategy, including first-order ones.
        lower, upper: numbers, or trees like the parameters; for an array, also a list of numbers. None means no wall.

    Raises:
        ValueError: if a bound is NaN or a lower bound is above its upper one; at `init` if the start is outside or the
            bounds do not fit the parameters.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> from evoopt.strategies import snes
    >>> f = lambda x: jnp.sum((x - jnp.array([0.5, 3.0])) ** 2)
    >>> minimize(f, jnp.zeros(2), smoothed(snes(16), -1.0, 1.0), generations=200).best.round(2).tolist()
    [0.5, 1.0]
    """
    check_strategy(strategy)
    lower, upper = bounds.opened(lower, upper)
    return Reparameterized(strategy, Partial(Smooth(lower, upper)), Partial(_start, lower=lower, upper=upper))
