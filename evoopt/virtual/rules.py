"""What primitives do with virtual leaves without making them: conversion, views of a part, gathered rows, scan.

Products and arithmetic have rules in files of their own, which this one imports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core.primitives as primitives
import jax.numpy as jnp
import numpy as np
import quax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.typing import ArrayLike

from evoopt.types import Array
from evoopt.virtual import arithmetic as _arithmetic  # noqa: F401 (importing it registers its rules)
from evoopt.virtual.leaves import Either, Factored, Virtual, converted, drawn_ahead, made, transposed
from evoopt.virtual.private import scan_quax, unpack_scan_args
from evoopt.virtual.products import LEAF, OTHER, RANK, Axis, contract
from evoopt.virtual.register import rule


@rule(primitives.convert_element_type_p)
def _(x: Either, *, new_dtype: Any, **_: Any) -> Any:
    return converted(x, new_dtype) if jnp.issubdtype(new_dtype, jnp.floating) else NotImplemented


@rule(primitives.copy_p, primitives.stop_gradient_p, primitives.sharding_constraint_p)
def _(x: Either, **_: Any) -> Either:
    return x


@rule(primitives.transpose_p)
def _(x: Either, *, permutation: Sequence[int]) -> Any:
    return transposed(x, permutation)


@rule(primitives.squeeze_p)
def _(x: Either, *, dimensions: Sequence[int]) -> Any:
    shape = x.shape
    return _reshape(x, tuple(n for i, n in enumerate(shape) if i not in dimensions))


@rule(primitives.reshape_p)
def _(x: Either, *, new_sizes: Sequence[int], dimensions: Any = None, **_: Any) -> Any:
    return NotImplemented if dimensions is not None else _reshape(x, tuple(new_sizes))


@rule(primitives.broadcast_in_dim_p)
def _(x: Either, *others: Any, shape: Sequence[int], broadcast_dimensions: Sequence[int], **_: Any) -> Any:
    added = [n for i, n in enumerate(shape) if i not in broadcast_dimensions]
    grown = any(shape[d] != n for d, n in zip(broadcast_dimensions, x.shape, strict=True))
    return NotImplemented if others or grown or any(n != 1 for n in added) else _reshape(x, tuple(shape))


def _reshape(x: Either, shape: tuple[int, ...]) -> Any:
    if shape == x.shape:
        return x
    if isinstance(x, Virtual):
        if x.is_stack and x.shape == (1, *shape):
            return x.layers(lambda f: f[0])
        return NotImplemented
    cut = x.batch
    if cut and x.shape == (1, *shape):
        return Factored(x.weight[0], x.a[0], x.b[0], x.rows, x.about)
    if shape[:cut] != x.shape[:cut]:
        return NotImplemented
    rows: list[bool] = []  # axes of 1 come and go; those of a group, all of one factor, merge or split
    for old, new in _groups(x.shape[cut:], shape[cut:]):
        of = {x.rows[i] for i in old}
        if len(of) > 1:
            return NotImplemented
        rows += [of.pop() if of else True] * len(new)
    sizes = lambda mine: [n for n, r in zip(shape[cut:], rows, strict=True) if r == mine]
    factor = lambda f, mine: f.reshape(*f.shape[:cut], *sizes(mine), f.shape[-1])
    return Factored(x.weight.reshape(shape), factor(x.a, True), factor(x.b, False), tuple(rows), x.about)


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Places of axes in `old` and in `new` with the same product, in the smallest groups; axes of 1 are alone."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        if i < len(old) and old[i] == 1:
            groups.append(([i], []))
            i += 1
        elif j < len(new) and new[j] == 1:
            groups.append(([], [j]))
            j += 1
        else:
            first, second, m, n = [i], [j], old[i], new[j]
            while m != n:
                if m < n:
                    first.append(first[-1] + 1)
                    m *= old[first[-1]]
                else:
                    second.append(second[-1] + 1)
                    n *= new[second[-1]]
            groups.append((first, second))
            i, j = first[-1] + 1, second[-1] + 1
    return groups


@rule(primitives.slice_p)
def _(x: Either, *, start_indices: Sequence[int], limit_indices: Sequence[int], strides: Any) -> Any:
    sizes = [n - i for i, n in zip(start_indices, limit_indices, strict=True)]
    if strides is None or all(step == 1 for step in strides):
        return _sliced(x, start_indices, sizes)
    whole = all(step == 1 for step in strides[1:])
    if isinstance(x, Virtual) and not (x.is_stack and whole and tuple(sizes[1:]) == x.shape[1:]):
        return NotImplemented  # low-rank noise comes again as its factors; other noise is made
    some = lambda f, axis, i: jax.lax.slice_in_dim(f, start_indices[i], limit_indices[i], strides[i], axis)
    if isinstance(x, Virtual):
        return x.layers(lambda f: some(f, 0, 0))
    for i in range(x.ndim):
        x = x.on(i, lambda f, axis, i=i: some(f, axis, i))
    return x


@rule(primitives.dynamic_slice_p)
def _(x: Either, *starts: Any, slice_sizes: Sequence[int]) -> Any:
    # A slice that would leave the array is moved back into it.
    inside = [jnp.clip(s, 0, n - size) for s, n, size in zip(starts, x.shape, slice_sizes, strict=True)]
    return _sliced(x, inside, slice_sizes)


def _sliced(x: Either, starts: Sequence[Any], sizes: Sequence[int]) -> Any:
    if isinstance(x, Factored):
        for axis, (start, n) in enumerate(zip(starts, sizes, strict=True)):
            if n != x.shape[axis]:
                x = x.on(axis, lambda f, i, s=start, n=n: jax.lax.dynamic_slice_in_dim(f, s, n, i))
        return x
    if not x.is_stack:
        return NotImplemented if x.kind.low_rank else x.window(starts, sizes)
    if tuple(sizes[1:]) != x.shape[1:]:
        return NotImplemented
    return x.layers(lambda f: jax.lax.dynamic_slice_in_dim(f, starts[0], sizes[0]))


@rule(jax.lax.split_p)
def _(x: Either, *, sizes: Sequence[int], axis: int) -> Any:
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    part = lambda start, n: _sliced(
        x, [start if i == axis else 0 for i in range(x.ndim)], [n if i == axis else m for i, m in enumerate(x.shape)]
    )
    parts = [part(start, n) for start, n in zip(starts, sizes, strict=True)]
    return NotImplemented if any(p is NotImplemented for p in parts) else parts


@rule(primitives.gather_p)
def _(x: Any, indices: Array, **params: Any) -> Any:
    """Whole rows of a table, as an embedding is read: by an index, or by the `vmap` of a slice at (index, 0).

    Of a stack, whole layers, each with its seed: the experts that a router chose.
    """
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if isinstance(x, Virtual) and x.is_stack:
        return _layers(x, indices, params)
    whole = 0 in numbers.start_index_map and tuple(sizes) == (1, *x.shape[1:])
    if numbers.operand_batching_dims or not whole or numbers.collapsed_slice_dims not in ((), (0,)):
        return NotImplemented
    asked = indices[..., numbers.start_index_map.index(0)]
    rows = jnp.clip(asked, 0, x.shape[0] - 1)

    def there(probed: Array, plain: Array) -> Array:
        """The gather of the weight decides what is out of bounds: a fill value has no noise."""
        if params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP:
            return probed
        inside = jnp.expand_dims((asked >= 0) & (asked < x.shape[0]), numbers.offset_dims)
        return jnp.where(inside, probed, plain.astype(probed.dtype))

    axes = [i for i in range(x.ndim) if i not in numbers.collapsed_slice_dims]  # of a row
    pick = lambda table: primitives.gather_p.bind(table, indices, **params)
    if isinstance(x, Virtual):
        if x.is_stack or x.kind.low_rank or x.is_transposed:
            return NotImplemented
        size = math.prod(x.shape[1:])
        inside = jnp.arange(size, dtype=jnp.uint32).reshape([sizes[i] for i in axes])
        last = range(rows.ndim, rows.ndim + inside.ndim)
        places = jnp.expand_dims(rows.astype(jnp.uint32) * np.uint32(size), last) + inside
        plain = pick(x.weight)
        return there(x.part(plain, jnp.moveaxis(places, last, numbers.offset_dims), pick), plain).astype(x.to)
    if x.batch:
        return NotImplemented
    weight = pick(x.weight)
    mine = x.rows[0]  # the factor that has the rows
    table, other = (x.a, x.b) if mine else (x.b, x.a)
    table = table[rows]  # (..., axes of the table's factor but the first, rank)
    table = jnp.expand_dims(table, rows.ndim) if 0 in axes else table
    asked_axes = [Axis(OTHER, i) for i in range(rows.ndim)]
    of = lambda side: [Axis(LEAF, i) for i in axes if x.rows[i] == side]
    out = [*asked_axes]
    for place, axis in zip(numbers.offset_dims, axes, strict=True):
        out.insert(place, Axis(LEAF, axis))
    delta = contract(table, [*asked_axes, *of(mine), RANK], other, [*of(not mine), RANK], out)
    return there((weight.astype(delta.dtype) + delta).astype(weight.dtype), weight)


def _layers(x: Virtual, indices: Array, params: dict[str, Any]) -> Any:
    """Layers of a stack by a vector of numbers, as a stack; NotImplemented for any other gather."""
    numbers = params["dimension_numbers"]
    chosen = (
        tuple(numbers.start_index_map) == (0,) and tuple(numbers.collapsed_slice_dims) == (0,) and indices.ndim == 2
        and tuple(params["slice_sizes"]) == (1, *x.shape[1:]) and not numbers.operand_batching_dims
        and tuple(numbers.offset_dims) == tuple(range(1, x.ndim))
        and params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP
    )  # fmt: skip
    if not chosen:
        return NotImplemented
    rows = jnp.clip(indices[:, 0], 0, x.shape[0] - 1)
    return x.layers(lambda f: f[rows])


@quax.register(primitives.scan_p, precedence=1)
def _(*args: ArrayLike | quax.ArrayValue, **params: Any) -> Any:
    """A stack is cut by `scan`. Other leaves, such as a matrix that is scanned over its rows, are made first."""
    consts, carry, xs = unpack_scan_args(args, params)
    uncut = lambda x: not (x.is_stack if isinstance(x, Virtual) else x.batch if isinstance(x, Factored) else True)
    xs = [made(x, primitives.scan_p) if uncut(x) else drawn_ahead(x) for x in xs]
    return scan_quax(*consts, *carry, *xs, **params)


@quax.register(primitives.remat_p)
def _(*args: ArrayLike | quax.ArrayValue, jaxpr: Any, **params: Any) -> Any:
    """Nothing is differentiated through virtual leaves, so there is nothing to compute again."""
    if not any(isinstance(x, quax.ArrayValue) for x in args):
        return primitives.remat_p.bind(*args, jaxpr=jaxpr, **params)
    return quax.quaxify(jaxpr_as_fun(ClosedJaxpr(jaxpr, ())))(*args)
