"""Arithmetic on pytrees, and pytrees as vectors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from evoopt.types import Array, Params, error


def path_name(path: tuple) -> str:
    """The displayed name of a leaf, such as `layers/0/w`; the whole tree is `.`."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "."


def strong(tree: Params) -> Params:
    """Every leaf as an array without a weak type, so that a state's types never change."""

    def one(x: Any) -> Array:
        if isinstance(x, Tracer):
            return jnp.asarray(x, jnp.result_type(x))
        if not isinstance(x, jax.Array):  # converted by NumPy, which compiles nothing
            x = np.asarray(x, jnp.result_type(x))
        with jax.ensure_compile_time_eval():  # known values stay known under `jit`, where they can still be checked
            return jnp.asarray(x, jnp.result_type(x))

    return jax.tree.map(one, tree)


def searchable(params: Params) -> Params:
    """`params` as arrays that can be searched: at least one float leaf, no other kind, every number finite.

    Raises:
        ValueError: if there are no leaves, a leaf is not floating point, or a number is NaN or infinite.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves or not any(np.size(leaf) for _, leaf in leaves):
        raise error(
            "parameters: a pytree with at least one float number",
            f"{jax.tree.structure(params)}",
            "a module whose arrays were filtered out, or an empty dict",
        )
    for path, leaf in leaves:
        name = path_name(path)
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (int, float)):
            raise error(
                f"an array or a float at '{name}'",
                f"{type(leaf).__name__}",
                "functions and strings belong in the objective, not in the parameters",
                TypeError,
            )
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise error(
                f"floating-point parameters at '{name}'",
                f"dtype {jnp.result_type(leaf)}",
                "integers in x0, as in [1, 2]; write [1.0, 2.0], or search over a continuous relaxation",
                TypeError,
            )
        if isinstance(leaf, Tracer):
            continue
        if bad := _not_finite(leaf):
            raise error(
                f"finite numbers to start from at '{name}'",
                f"{bad} of {np.size(leaf)} entries NaN or infinite",
                "a start taken from a diverged run, or a division by zero in computing it",
            )
    return strong(params)


def _not_finite(leaf: Any) -> int:
    """How many entries are NaN or infinite: counted by NumPy, without a program, if they are in this memory."""
    if not isinstance(leaf, jax.Array) or (leaf.is_fully_addressable and jax.default_backend() == "cpu"):
        return int((~np.isfinite(np.asarray(leaf, dtype=jnp.result_type(leaf)))).sum())
    with jax.ensure_compile_time_eval():  # a known number even under `jit`
        return int((~jnp.isfinite(leaf)).sum())


def size(tree: Params) -> int:
    """The number of scalars in `tree`."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


def dot(a: Params, b: Params) -> Array:
    """The inner product of two trees of the same structure: ()."""
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))  # type: ignore[return-value]


def where(condition: Any, a: Params, b: Params) -> Params:
    """`a` if the scalar `condition` holds, otherwise `b`, leaf by leaf; PRNG keys are leaves like any other."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def like(x: Any, tree: Params) -> Params:
    """`x` as a tree with the structure of `tree`; a single number stands for every leaf."""
    return x if jax.tree.structure(x) == jax.tree.structure(tree) else jax.tree.map(lambda _: x, tree)


def types(tree: Any) -> Any:
    """Shape, dtype and weak type of each leaf, without computing anything."""
    return jax.tree.map(jax.typeof, tree)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Unravel:
    """vector (d,) -> params. Hashable, picklable, and without leaves."""

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]

    def __call__(self, x: Array) -> Params:
        ends = np.cumsum([math.prod(s) for s in self.shapes])[:-1].tolist()
        parts = jnp.split(x, ends)
        return self.treedef.unflatten(
            [p.reshape(s).astype(t) for p, s, t in zip(parts, self.shapes, self.dtypes, strict=True)]
        )


def flatten(params: Params) -> Array:
    """params -> vector (d,), in the widest dtype of its leaves but at least float32: narrower ones have no QR."""
    leaves = jax.tree.leaves(params)
    with jax.numpy_dtype_promotion("standard"):  # the only place where leaves of several types meet
        dtype = jnp.result_type(*leaves, jnp.float32)
    return jnp.concatenate([jnp.asarray(x, dtype).reshape(-1) for x in leaves])


def ravel(params: Params) -> tuple[Array, Unravel]:
    """params -> (vector (d,), its inverse map).

    >>> x, unravel = ravel({"w": jnp.ones((2, 2)), "b": jnp.zeros(3)})
    >>> x.shape, unravel(x)["w"].shape
    ((7,), (2, 2))
    """
    params = strong(params)
    leaves, treedef = jax.tree.flatten(params)
    return flatten(params), Unravel(treedef, tuple(x.shape for x in leaves), tuple(x.dtype for x in leaves))
