"""Sums and products of virtual leaves with numbers and arrays: they act on the weight and on the noise apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.extend.core.primitives as primitives
import jax.numpy as jnp
import quax
from jax.typing import ArrayLike

from evoopt import noise as noises
from evoopt.types import Array
from evoopt.virtual.leaves import Either, Factored, Virtual, drawn, made
from evoopt.virtual.register import rule


def _linear(x: Any) -> Either | None:
    """`x` in a form in which sums and products act on weight and noise apart; None if it has none.

    It has none if a conversion or a wall comes between, or if the noise depends on the weight, as a mask by size does.
    """
    x = drawn(x)
    if isinstance(x, Factored):
        return x
    kind = x.kind.kind if isinstance(x.kind, noises.Whole) else x.kind
    plain = isinstance(kind, noises.Independent)
    return x if plain and x.walls is None and x.to == x.weight.dtype else None


def _scaled(x: Either, c: Any, weight: Array) -> Either:
    """The leaf whose weight is `weight` and whose noise is c times that of `x`, for a number c."""
    if isinstance(x, Factored):
        return dataclasses.replace(x, weight=weight, a=x.a * jnp.asarray(c, x.a.dtype))
    return dataclasses.replace(x, weight=weight, scale=x.scale * jnp.asarray(c, x.scale.dtype))


def _arithmetic(
    x: Either, primitive: Any, change: Callable[[Array], Array], c: Any, dense: Callable[[Array], Any]
) -> Any:
    """The leaf with its weight changed and its noise multiplied by c; `dense` of the array where it has to be made."""
    form = _linear(x)
    return dense(made(x, primitive)) if form is None else _scaled(form, c, change(form.weight))


def _fits(x: Either, y: Any) -> bool:
    """Whether y can be added to the weight: a number, or an array like a leaf that is not transposed."""
    transposed = isinstance(x, Virtual) and x.is_transposed
    return jnp.ndim(y) == 0 or (jnp.shape(y) == x.shape and not transposed)


def _times(x: Either, y: Any, primitive: Any) -> Any:
    product = lambda w: primitive.bind(w, y)
    if jnp.ndim(y):
        return product(made(x, primitive))
    return _arithmetic(x, primitive, product, y, product)


def _plus(x: Either, y: Any, primitive: Any) -> Any:
    total = lambda w: primitive.bind(w, y)
    return _arithmetic(x, primitive, total, 1, total) if _fits(x, y) else total(made(x, primitive))


for _primitive, _of in ((primitives.mul_p, _times), (primitives.add_p, _plus), (primitives.add_jaxvals_p, _plus)):

    @quax.register(_primitive)
    def _(x: Either, y: ArrayLike, *, _p=_primitive, _of=_of, **_: Any) -> Any:
        return _of(x, y, _p)

    @quax.register(_primitive)
    def _(y: ArrayLike, x: Either, *, _p=_primitive, _of=_of, **_: Any) -> Any:
        return _of(x, y, _p)


@quax.register(primitives.sub_p)
def _(x: Either, y: ArrayLike, **_: Any) -> Any:
    rest = lambda w: primitives.sub_p.bind(w, y)
    return _arithmetic(x, primitives.sub_p, rest, 1, rest) if _fits(x, y) else rest(made(x, primitives.sub_p))


@quax.register(primitives.sub_p)
def _(y: ArrayLike, x: Either, **_: Any) -> Any:
    rest = lambda w: primitives.sub_p.bind(y, w)
    fits = _fits(x, y) and (jnp.ndim(y) > 0 or x.ndim == 0)
    change = rest if fits else lambda w: primitives.sub_p.bind(jnp.broadcast_to(jnp.asarray(y, w.dtype), w.shape), w)
    return _arithmetic(x, primitives.sub_p, change, -1, rest) if _fits(x, y) else rest(made(x, primitives.sub_p))


@quax.register(primitives.div_p)
def _(x: Either, y: ArrayLike, **_: Any) -> Any:
    quotient = lambda w: primitives.div_p.bind(w, y)
    if jnp.ndim(y):
        return quotient(made(x, primitives.div_p))
    return _arithmetic(x, primitives.div_p, quotient, 1 / jnp.asarray(y), quotient)


@rule(primitives.neg_p)
def _(x: Either, **_: Any) -> Any:
    form = _linear(x)
    return NotImplemented if form is None else _scaled(form, -1, -form.weight)
