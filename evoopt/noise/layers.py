"""Which leaves of the parameters are stacks of layers, which are vectors, and which are large.

A model scans over a stack, so its noise is drawn layer by layer. The name of a stack says what it is: its leaves are
below `layers`, `blocks`, or a name given to `name_stacks`. A shape can't say it, for an attention kernel has three axes
too.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from evoopt import trees
from evoopt.types import Params, error

_STACKS = {"layers", "blocks"}  # names below which the first axis of a leaf counts the layers of a model
LARGE = 1024  # leaves of at least this many numbers may be virtual: making smaller ones costs little


def name_stacks(*names: str) -> None:
    """Declare that leaves below these names are stacks of layers that the model scans over, like those below `layers`.

    This holds for the whole process. Call it before the search begins: a stack is drawn layer by layer, so its
    directions change, and only a stack that `scan` cuts can stay virtual layer by layer.

    >>> import jax.numpy as jnp
    >>> params = {"decoder": {"w": jnp.zeros((4, 8, 8)), "b": jnp.zeros((4, 8))}}
    >>> stacks(params)
    [False, False]
    >>> name_stacks("decoder")
    >>> stacks(params)
    [True, True]
    """
    for name in names:
        if not isinstance(name, str) or not name:
            cause = "a path: give the one name in it that stands for the stack"
            raise error("names of parts of the parameters, as in 'decoder'", repr(name), cause, TypeError)
    _STACKS.update(names)


def stacks(params: Params) -> list[bool]:
    """Which leaves have the layers of a model as their first axis, in the order of `jax.tree.leaves`.

    They are below a name of a stack, all leaves there have the same first axis, and at least one has three axes. A list
    of layers, or a dict of numbered ones, is no stack.
    """
    named = jax.tree_util.tree_leaves_with_path(params)
    name = lambda key: str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", ""))))
    parts: dict[str, list[int]] = {}  # a part of the tree that may be a stack -> its leaves
    for i, (path, _) in enumerate(named):
        names = [name(key) for key in path]
        for place, word in enumerate(names):
            if word in _STACKS and not _numbered(names[place + 1 :]):
                parts.setdefault(trees.path_name(path[: place + 1]), []).append(i)
                break
    found = [False] * len(named)
    for leaves in parts.values():
        shapes = [named[i][1].shape for i in leaves]
        if all(len(s) for s in shapes) and len({s[0] for s in shapes}) == 1 and any(len(s) >= 3 for s in shapes):
            for i, shape in zip(leaves, shapes, strict=True):
                found[i] = len(shape) >= 2
    return found


def _numbered(names: list[str]) -> bool:
    return bool(names) and names[0].isdigit()


def is_stack(leaf: Any) -> bool:
    """Whether a leaf whose kind is `cut` is drawn layer by layer: it has three or more axes."""
    return len(leaf.shape) >= 3


def is_large(leaf: Any) -> bool:
    """Whether a leaf may be virtual: a matrix or a stack, and not small."""
    return len(leaf.shape) >= 2 and math.prod(leaf.shape) >= LARGE


def are_vectors(params: Params) -> list[bool]:
    """Which leaves are biases or scales: they have fewer than two axes, or the shape (layers, d) in a stack."""
    leaves = zip(jax.tree.leaves(params), stacks(params), strict=True)
    return [len(x.shape) < 2 + stack for x, stack in leaves]
