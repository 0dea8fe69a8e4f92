"""Points as arrays: those of a population, and those that somebody gives a session, which have to be of its search."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from evoopt import trees
from evoopt.population import Population
from evoopt.types import Params, error


def checked(given: Iterable[Params], session: Any) -> list[Params]:
    """The points as NumPy arrays in the structure that the session's strategy decodes.

    Raises:
        ValueError: for another structure or shape, NaN, or a point outside the bounds.
        TypeError: for what is no list of points, or no numbers.
    """
    if isinstance(given, (dict, str)) or not isinstance(given, Iterable):
        got, cause = type(given).__name__, "a single point: write [point]"
        raise error("a list of points", got, cause, TypeError)
    return [_checked(point, i, session) for i, point in enumerate(given)]


def _checked(point: Params, i: int, session: Any) -> Params:
    like = session._like()
    if session.space is not None:
        point = session.space.decode(session.space.encode(point))
        return jax.tree.map(np.asarray, point)
    treedef = jax.tree.structure(like)
    if jax.tree.structure(point) != treedef:
        got = f"point {i}: {jax.tree.structure(point)}"
        raise error(f"points with the parameters' structure {treedef}", got, "a point of another search")
    pairs = zip(jax.tree_util.tree_leaves_with_path(like), jax.tree.leaves(point), strict=True)
    leaves = [_leaf(x, wanted, i, trees.path_name(path)) for (path, wanted), x in pairs]
    point = treedef.unflatten(leaves)
    if trees.types(trees.strong(point)) == session._kind:  # as a start would be checked: is it within the bounds?
        jax.eval_shape(lambda key: session.strategy.init(point, key), jax.random.key(0))
    return point


def _leaf(x: Any, wanted: Any, i: int, name: str) -> np.ndarray:
    try:
        array = np.asarray(x)
        number = array.dtype.kind in "iufb" or jnp.issubdtype(array.dtype, jnp.floating)
    except (TypeError, ValueError):
        number = False
    if not number:
        raise error(f"numbers at '{name}' of point {i}", type(x).__name__, "text among the numbers", TypeError)
    if array.shape != wanted.shape:
        got, cause = f"shape {array.shape}", "a point of another search"
        raise error(f"shape {wanted.shape} at '{name}' of point {i}", got, cause)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        cause = "a result that was never computed"
        raise error(f"finite numbers at '{name}' of point {i}", "NaN or infinite ones", cause)
    return array.astype(wanted.dtype)


def arrays(population: Population, places: np.ndarray) -> Iterator[Params]:
    """The candidates at these places as NumPy arrays, as the strategy decodes them, whatever objectives get."""
    presented = hasattr(population.decode, "present")
    bare = population.with_decode(Partial(operator.call, population.decode)) if presented else population
    return bare.candidates(places)


def equal(a: Any, b: Any) -> bool:
    """Whether two points are the same, bit for bit."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def as_many(values: Iterable[Any], n: int) -> list[Any]:
    """What is told of n points, as a list."""
    rows = list(values)
    if len(rows) != n:
        raise error(f"{n} values, one for each point", str(len(rows)), "points and values of other lists")
    return rows
