"""Products with virtual leaves: x (W + s a b^T) = x W + (x s a) b^T, or chunk by chunk if noise is not low-rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core.primitives as primitives
import jax.numpy as jnp
import quax
from jax.typing import ArrayLike

from evoopt import noise as noises
from evoopt.types import Array
from evoopt.virtual.leaves import Either, Factored, drawn, made

CHUNK = 1 << 19  # numbers of a large matrix of full-rank noise that are perturbed at once


class Axis(NamedTuple):
    """An axis of a product: it belongs to the leaf, or to what the leaf meets, or counts the rank."""

    of: int
    place: int = 0


LEAF, OTHER, RANK = 0, 1, Axis(2)


def contract(x: Array, x_axes: Sequence[Axis], y: Array, y_axes: Sequence[Axis], out: Sequence[Axis]) -> Array:
    """einsum of two arrays with named axes. Sums over few products are written out, so that XLA fuses them."""
    summed = [i for i in x_axes if i not in out]
    if len(summed) == 1 and summed[0] in y_axes and x.shape[x_axes.index(summed[0])] <= noises.UNROLLED:
        (k,) = summed

        def spread(f: Array, axes: Sequence[Axis], place: int) -> Array:
            f, axes = jax.lax.index_in_dim(f, place, axes.index(k), keepdims=False), [i for i in axes if i != k]
            f = f.transpose([axes.index(i) for i in out if i in axes])
            return jnp.expand_dims(f, [place for place, i in enumerate(out) if i not in axes])

        ranks = range(x.shape[x_axes.index(k)])
        return sum(spread(x, x_axes, r) * spread(y, y_axes, r) for r in ranks)  # type: ignore[return-value]
    return _einsum(x, x_axes, y, y_axes, out)


def _einsum(
    x: Array, x_axes: Sequence[Axis], y: Array, y_axes: Sequence[Axis], out: Sequence[Axis], dtype: Any = None
) -> Array:
    letters = {axis: chr(ord("a") + i) for i, axis in enumerate(sorted({*x_axes, *y_axes}))}
    word = lambda axes: "".join(letters[axis] for axis in axes)
    return jnp.einsum(f"{word(x_axes)},{word(y_axes)}->{word(out)}", x, y, preferred_element_type=dtype)


def _dot(x: Either, y: Array, first: bool, dimension_numbers: Any, params: dict[str, Any]) -> Any:
    """dot_general of a leaf and an array; `first` says whether the leaf is on the left."""
    (contract_l, contract_r), (batch_l, batch_r) = dimension_numbers
    summed, batch = (contract_l, batch_l) if first else (contract_r, batch_r)
    summed_y, batch_y = (contract_r, batch_r) if first else (contract_l, batch_l)
    product = lambda w, y: primitives.dot_general_p.bind(
        *((w, y) if first else (y, w)), dimension_numbers=dimension_numbers, **params
    )
    free = [i for i in range(x.ndim) if i not in (*summed, *batch)]
    # Axes of the result: the batch, the free ones of the left, the free ones of the right.
    free_y = [Axis(OTHER, i) for i in range(y.ndim) if i not in (*summed_y, *batch_y)]
    mine = [Axis(LEAF, i) for i in free]
    out = [*(Axis(LEAF, i) for i in batch), *((*mine, *free_y) if first else (*free_y, *mine))]
    if isinstance(x, Factored):
        shared = {i: Axis(LEAF, j) for i, j in zip((*summed_y, *batch_y), (*summed, *batch), strict=True)}
        return _dot_factored(x, y, product, out, [shared.get(i, Axis(OTHER, i)) for i in range(y.ndim)])
    if x.is_stack or x.kind.low_rank:
        return NotImplemented
    if x.about.layer or math.prod(x.shape) <= CHUNK:
        return product(x.materialise(), y)
    axis = max(free or range(x.ndim), key=lambda i: x.shape[i])
    if axis not in free:
        return NotImplemented
    whole = jax.eval_shape(product, jax.ShapeDtypeStruct(x.shape, x.dtype), y)
    n = x.shape[axis]
    m = max(1, min(n, noises.chunk_of(math.prod(x.shape), CHUNK) * n // math.prod(x.shape)))
    sizes = [m if i == axis else k for i, k in enumerate(x.shape)]

    def chunk(i: Array, total: Array) -> Array:
        start = jnp.minimum(i * m, n - m)  # the last one overlaps the one before it, with the same numbers
        part = product(x.window([start if i == axis else 0 for i in range(x.ndim)], sizes), y)
        return jax.lax.dynamic_update_slice_in_dim(total, part, start, out.index(Axis(LEAF, axis)))

    return jax.lax.fori_loop(0, -(-n // m), chunk, jnp.zeros(whole.shape, whole.dtype))


def _dot_factored(
    x: Factored, y: Array, product: Callable[..., Array], out: Sequence[Axis], y_axes: Sequence[Axis]
) -> Any:
    """A product with W + a b^T, with axes `out`; axes of y that it shares with the leaf have the leaf's names."""
    base = product(x.weight, y)
    cut = x.batch
    if any(Axis(LEAF, i) not in out for i in range(cut)):
        return NotImplemented  # a sum over layers
    own = lambda side: [i for i in range(x.ndim) if i < cut or x.rows[i - cut] == side]
    axes = {side: [*(Axis(LEAF, i) for i in own(side)), RANK] for side in (True, False)}
    summed = lambda side: math.prod(x.shape[i] for i in own(side) if Axis(LEAF, i) not in out)
    one = summed(True) >= summed(False)  # the factor that takes up most of y comes first
    f, g = (x.a, x.b) if one else (x.b, x.a)
    kept = [i for i in y_axes if i in out or i in axes[not one]]
    middle = [*kept, *(i for i in axes[one] if i not in kept and (i in out or i == RANK))]
    with_rank = _einsum(y, y_axes, f.astype(y.dtype), axes[one], middle, g.dtype)
    if not x.about.layer and base.size > CHUNK and list(out) == middle[:-1] + axes[not one][:-1]:
        # An output head, whose logits can be as large as the model: the sum is written over the product, part by part.
        # As one expression XLA would add again for some uses of it, and keep the product for them beside the sum.
        with_rank, g = with_rank.reshape(-1, g.shape[-1]), g.reshape(-1, g.shape[-1])

        def rows(start: Array, m: int, total: Array) -> Array:
            part, t = (jax.lax.dynamic_slice_in_dim(z, start, m) for z in (total, with_rank))
            part = (part.astype(g.dtype) + noises.outer(t, g)).astype(base.dtype)
            return jax.lax.dynamic_update_slice_in_dim(total, part, start, 0)

        matrix = base.reshape(-1, len(g))
        most = noises.chunk_of(matrix.size, CHUNK) // len(g)
        total = noises.chunked(rows, len(matrix), max(1, min(len(matrix), most)), matrix)
        return total.reshape(base.shape)
    delta = contract(with_rank, middle, g, axes[not one], out)
    return (base.astype(delta.dtype) + delta).astype(base.dtype)


@quax.register(primitives.dot_general_p)
def _(x: Either, y: ArrayLike, *, dimension_numbers: Any, **params: Any) -> Any:
    return _dot_or_make(x, jnp.asarray(y), True, dimension_numbers, params)


@quax.register(primitives.dot_general_p)
def _(y: ArrayLike, x: Either, *, dimension_numbers: Any, **params: Any) -> Any:
    return _dot_or_make(x, jnp.asarray(y), False, dimension_numbers, params)


@quax.register(primitives.dot_general_p)
def _(x: Either, y: Either, *, dimension_numbers: Any, **params: Any) -> Any:
    # Of two virtual leaves the second is made.
    return _dot_or_make(x, made(y, primitives.dot_general_p), True, dimension_numbers, params)


def _dot_or_make(x: Any, y: Array, first: bool, dimension_numbers: Any, params: dict[str, Any]) -> Any:
    result = _dot(x, y, first, dimension_numbers, params)
    if result is NotImplemented:
        result = _dot(drawn(x), y, first, dimension_numbers, params) if drawn(x) is not x else result
    if result is NotImplemented:
        dense = made(x, primitives.dot_general_p)
        pair = (dense, y) if first else (y, dense)
        return primitives.dot_general_p.bind(*pair, dimension_numbers=dimension_numbers, **params)
    return result
