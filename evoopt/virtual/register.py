"""How rules for virtual leaves are registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import quax
from jax.typing import ArrayLike

from evoopt.virtual.leaves import Either, Leaf, drawn, made


def rule(primitive: Any, *more: Any) -> Callable[[Any], Any]:
    """Register `rule(leaf, *others, **params)`; if it answers NotImplemented the leaf is made.

    It is asked once more before, with low-rank noise drawn, if the leaf has any.
    """

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        for p in (primitive, *more):

            @quax.register(p)
            def _(x: Either, *others: ArrayLike | quax.ArrayValue, _p=p, **params):
                if any(isinstance(y, Leaf) for y in others):
                    others = tuple(made(y, _p) for y in others)
                out = rule(x, *others, **params)
                if out is NotImplemented and drawn(x) is not x:
                    out = rule(drawn(x), *others, **params)
                return Leaf.default(_p, (x, *others), params) if out is NotImplemented else out

        return rule

    return register
